#!/usr/bin/env python3
"""Priorities, and jobs that want several CPUs: what is urgent goes before what waits, whenever it
was submitted."""

import time

import dispy


def work(name, seconds):
    time.sleep(seconds)
    return name


with dispy.JobCluster(work, nodes='local') as cluster:
    cluster.wait_nodes(1)
    # Each job takes all CPUs of the node, so one runs at a time
    whole = cluster.status().nodes[0].cpus
    # Until it is known how long jobs take, a node has one more in hand
    cluster.submit('trial', 0.2, dispy_cpus=whole)()
    jobs = [cluster.submit('any', 0.4, dispy_cpus=whole)]
    while jobs[0].status != dispy.DispyJob.Running:
        time.sleep(0.01)
    jobs += [cluster.submit('low', 0.15, dispy_cpus=whole, dispy_priority=-1) for _ in range(2)]
    jobs += [cluster.submit('normal', 0.15, dispy_cpus=whole) for _ in range(2)]
    jobs += [cluster.submit('urgent', 0.15, dispy_cpus=whole, dispy_priority=10) for _ in range(2)]
    cluster.wait()
print('submitted:', *[job.result for job in jobs])
print('ran:      ', *[job.result for job in sorted(jobs, key=lambda job: job.start_time)])
