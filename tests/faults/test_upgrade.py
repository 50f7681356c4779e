"""A rolling upgrade under load: nodes and the scheduler are started anew, one after the other,
while a program goes on. Every job runs, and runs once."""

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

import dispy
from conftest import eventually
from nodes import NodeProcess, SchedulerProcess

AT_ONCE = 20     # jobs that are under way at any time


def once(directory, number):
    """Leave a mark for each time that it runs."""
    handle = os.open(os.path.join(directory, str(number)), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, b'x')
    os.close(handle)
    time.sleep(0.03)
    return number


def order(scheduler, *words):
    done = subprocess.run([sys.executable, '-m', 'dispyscheduler', *words, '--scheduler-host',
                           '127.0.0.1:%d' % scheduler.port], stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(signal, 'SIGUSR1'), reason='this system has no SIGUSR1')
def test_nodes_and_the_scheduler_are_replaced_under_load(tmp_path):
    marks = tmp_path / 'marks'
    marks.mkdir()
    jobs, ended, is_enough = [], [], []
    numbers = itertools.count()

    def feed(job):
        """A job has ended: another takes its place."""
        ended.append(job)
        if not is_enough:
            jobs.append(cluster.submit(str(marks), next(numbers)))

    with NodeProcess(tmp_path / 'a', '--name', 'a') as first, \
            NodeProcess(tmp_path / 'b', '--name', 'b') as second:
        names = ('-n', '127.0.0.1:%d' % first.port, '127.0.0.1:%d' % second.port)
        with SchedulerProcess(tmp_path / 'scheduler', *names) as scheduler, dispy.SharedJobCluster(
                once, scheduler_port=scheduler.port, callback=feed,
                loglevel=dispy.logger.CRITICAL) as cluster:
            for _ in range(AT_ONCE):
                jobs.append(cluster.submit(str(marks), next(numbers)))

            def goes_on():
                """Wait until more jobs have ended."""
                before = len(ended)
                eventually(lambda: len(ended) > before)
            goes_on()
            # A node that is drained for it
            order(scheduler, 'drain', 'a', '--reason', 'upgrade', '--wait')
            goes_on()
            assert first.stop() == 0
            with NodeProcess(tmp_path / 'a', '--name', 'a', port=first.port):
                order(scheduler, 'resume', 'a')
                goes_on()
                # One that ends by itself
                second.process.send_signal(signal.SIGUSR1)
                assert second.process.wait(30) == 0
                goes_on()
                with NodeProcess(tmp_path / 'b', '--name', 'b', port=second.port):
                    goes_on()
                    # The scheduler
                    assert scheduler.stop() == 0
                    with SchedulerProcess(tmp_path / 'scheduler', *names, port=scheduler.port):
                        goes_on()
                        is_enough.append(True)
                        eventually(lambda: len(ended) == len(jobs))
                        cluster.close()
    assert sorted(job.result for job in jobs) == list(range(len(jobs)))
    runs = {name.name: name.stat().st_size for name in marks.iterdir()}
    assert runs == {str(number): 1 for number in range(len(jobs))}
