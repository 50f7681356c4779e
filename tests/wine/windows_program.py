"""A program on Windows: a client of nodes there and elsewhere, started by test_windows.py."""

import sys
import time

import dispy
import windows_jobs


def local():
    """A node that the program starts itself."""
    with dispy.JobCluster(windows_jobs.of_setup, nodes='local',
                          setup=windows_jobs.setup) as cluster:
        jobs = [cluster.submit(n) for n in range(1000)]
        print(set(job.get(120) for job in jobs), [job.stdout for job in jobs[:2]])
    with dispy.JobCluster(windows_jobs.endless, nodes='local') as cluster:
        job = cluster.submit('loop')
        while not job.start_time:
            time.sleep(0.01)
        cluster.cancel(job)
        job.wait(30)
        print('cancelled', job.status == dispy.DispyJob.Cancelled)


def remote(port):
    """A node on Linux."""
    with dispy.JobCluster(windows_jobs.double, nodes=[('127.0.0.1', port)]) as cluster:
        jobs = [cluster.submit(n) for n in range(1000)]
        print(sum(job.get(60) for job in jobs))


def shared(port):
    with dispy.SharedJobCluster(windows_jobs.double, scheduler_port=port) as cluster:
        jobs = [cluster.submit(n) for n in range(1000)]
        print(sum(job.get(60) for job in jobs))


if __name__ == '__main__':
    {'local': local, 'remote': remote, 'shared': shared}[sys.argv[1]](*map(int, sys.argv[2:]))
