"""What came of a job, as a value or an exception; and what is tried again."""

import asyncio
import concurrent.futures
import os
import subprocess

import pytest

import dispy
import dispy_httpd
from conftest import eventually
from dispy import DispyJob


class Odd(Exception):
    pass


class Worse(Odd):
    pass


def square(n):
    if n < 0:
        raise Odd('no %d' % n)
    return n * n


def at_the(times, path, error=Odd):
    """Fails until it is called so often."""
    with open(path, 'a') as file:
        file.write('x')
    if os.path.getsize(path) < times:
        raise error('call %d' % os.path.getsize(path))
    return os.path.getsize(path)


def die(path):
    with open(path, 'a') as file:
        file.write('x')
    os._exit(3)


PROGRAM = """#!/bin/sh
echo out
echo x >> "$1"
[ $(wc -l < "$1") -ge "$2" ] || exit 4
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / 'program.sh'
    path.write_text(PROGRAM)
    path.chmod(0o755)
    return str(path)


def test_get_gather_and_await(make_cluster):
    with make_cluster(square, nodes='local') as cluster:
        job = cluster.submit(4)
        assert job.get(30) == job.get() == 16
        bad = cluster.submit(-1)
        with pytest.raises(Odd, match='no -1') as caught:
            bad.get(30)
        assert (isinstance(caught.value.__cause__, dispy.RemoteTraceback)
                and 'in square' in caught.value.__cause__.tb)
        assert bad() is None   # as in dispy 4
        assert cluster.gather((cluster.submit(n) for n in range(5)), timeout=30) == [0, 1, 4, 9, 16]
        with pytest.raises(Odd, match='no -2'):
            cluster.gather([cluster.submit(3), cluster.submit(-2), cluster.submit(-3)])

        async def program():
            first, second = cluster.submit(2), cluster.submit(-5)
            assert await first == 4 and await first == 4
            with pytest.raises(Odd, match='no -5'):
                await second
            return await asyncio.gather(*map(asyncio.ensure_future,
                                             map(wait_for, map(cluster.submit, range(10)))))

        async def wait_for(job):
            return await job
        assert asyncio.run(program()) == [n * n for n in range(10)]
    with make_cluster(square, nodes=[('127.0.0.1', 9)], loglevel=50) as cluster:
        job = cluster.submit(1)
        for wait in (lambda: job.get(0.05), lambda: cluster.gather([job], 0.05)):
            with pytest.raises(TimeoutError):
                wait()

        async def cancelled():
            task = asyncio.ensure_future(wait_for(job))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        asyncio.run(cancelled())
        assert job.status == DispyJob.Created   # the job is not the task's
        cluster.cancel(job)
        with pytest.raises(dispy.JobFailed, match='cancelled'):
            job.get(30)


def test_as_completed_of_any_iterable(make_cluster):
    with make_cluster(square, nodes='local') as cluster:
        for jobs in ((cluster.submit(n) for n in range(6)), map(cluster.submit, range(6)),
                     iter([cluster.submit(n) for n in range(6)]),
                     {cluster.submit(n): 1 for n in range(6)}):
            assert (sorted(job.result for job in cluster.as_completed(jobs, timeout=30))
                    == [n * n for n in range(6)])
        shown = cluster.as_completed((cluster.submit(n) for n in range(6)), progress=True)
        assert sorted(job.result for job in shown) == [n * n for n in range(6)]
        with pytest.raises(TypeError, match='is not a job'):
            cluster.as_completed([5])


def test_map_that_raises_leaves_nothing_behind(make_cluster):
    with make_cluster(square, nodes='local') as cluster:
        with pytest.raises(Odd, match='no -1'):
            list(cluster.map([3, -1, *range(500)]))
        assert cluster.wait(30)
        assert cluster.status().jobs_pending == 0


def test_what_a_job_raised_is_tried_again(make_cluster, tmp_path):
    with make_cluster(at_the, nodes='local') as cluster:
        job = cluster.submit(3, str(tmp_path / 'a'), dispy_retries=5, dispy_retry_on=Odd,
                             dispy_retry_delay=0.01)
        assert job.get(30) == 3 and job.status == DispyJob.Finished and job.exception is None
        job = cluster.submit(9, str(tmp_path / 'b'), Worse, dispy_retries=2,
                             dispy_retry_on=[ValueError, Odd])
        with pytest.raises(Worse, match='call 3'):
            job.get(30)
        for number, on in enumerate((ValueError, None)):
            path = tmp_path / str(number)
            options = {'dispy_retry_on': on} if on else {}
            with pytest.raises(Odd, match='call 1'):
                cluster.submit(9, str(path), dispy_retries=5, **options).get(30)
            assert path.stat().st_size == 1
        assert (cluster.submit(2, str(tmp_path / 'c'), dispy_retries=1, dispy_retry_on=True).get(30)
                == 2)
        resting = cluster.submit(9, str(tmp_path / 'd'), dispy_retries=9, dispy_retry_on=True,
                                 dispy_retry_delay=1000)
        eventually(lambda: (tmp_path / 'd').exists())
        for number in range(8):   # those that came later have ended, and so it has
            assert cluster.submit(1, str(tmp_path / ('e%d' % number))).get(30) == 1
        eventually(lambda: resting.status == DispyJob.Created)
        assert (cluster.cancel(resting) == 0 and resting.wait(30)
                and resting.status == DispyJob.Cancelled)
        for options, text in (({'dispy_retry_on': True}, 'needs dispy_retries'),
                              ({'dispy_retry_delay': 1}, 'needs dispy_retry_on'),
                              ({'dispy_retry_on': True, 'dispy_retries': 1,
                                'dispy_retry_delay': -1}, 'dispy_retry_delay')):
            with pytest.raises(ValueError, match=text):
                cluster.submit(1, '', **options)
        for wrong in (5, 'Odd', [Odd, 5], Odd('x')):
            with pytest.raises(TypeError, match='dispy_retry_on'):
                cluster.submit(1, '', dispy_retries=1, dispy_retry_on=wrong)
        left = cluster.submit(9, str(tmp_path / 'e'), dispy_retries=9, dispy_retry_on=True,
                              dispy_retry_delay=1000)
        eventually(lambda: (tmp_path / 'e').exists() and left.status == DispyJob.Created)
        cluster.close(terminate=True)
        assert left.wait(30) and left.status == DispyJob.Cancelled


def test_a_worker_that_is_lost_counts_as_a_try(make_cluster, tmp_path):
    path = tmp_path / 'a'
    with make_cluster(die, nodes='local') as cluster:
        job = cluster.submit(str(path), dispy_retries=2, dispy_retry_on=True)
        with pytest.raises(dispy.WorkerLost) as caught:
            job.get(60)
    assert isinstance(caught.value, concurrent.futures.BrokenExecutor) and path.stat().st_size == 3


def test_exit_statuses_are_failures(make_cluster, program, tmp_path):
    with make_cluster(program, nodes='local') as cluster:
        http = dispy_httpd.DispyHTTPServer(cluster, port=0)
        try:
            good, bad = cluster.submit(tmp_path / 'a', 1), cluster.submit(tmp_path / 'b', 9)
            assert good.get(30) == 0
            with pytest.raises(subprocess.CalledProcessError) as caught:
                bad.get(30)
            assert ((caught.value.returncode, caught.value.output, bad.status, bad.result, bad())
                    == (4, b'out\n', DispyJob.Finished, 4, 4))
            again = cluster.submit(tmp_path / 'c', 3, dispy_retries=4, dispy_retry_on=True)
            assert again.get(30) == 0 and (tmp_path / 'c').read_text() == 'x\n' * 3
            other = cluster.submit(tmp_path / 'd', 3, dispy_retries=4,
                                   dispy_retry_on=subprocess.CalledProcessError)
            assert other.get(30) == 0
            cluster.wait(30)
            counts = dispy_httpd.counts_of(dispy.core_of(cluster))
            assert (counts['done'], counts['failed']) == (3, 1), counts
        finally:
            http.shutdown(wait=False)
