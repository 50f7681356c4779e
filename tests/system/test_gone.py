"""A program that is gone, at a scheduler: what waits is cancelled, what runs goes on, and who comes
back loses nothing."""

import logging
import math
import os
import re
import subprocess
import sys

import pytest

import dispy
from conftest import ROOT, eventually
from dispy import ConnectionSettings, DispyJob, has_ended, own_process
from dispy_httpd import SchedulerLink
from dispynode import PULSE
from dispyscheduler import Absence
from nodes import NodeProcess, SchedulerProcess, start_here
from proxy import Proxy

ELSEWHERE = ('another machine', 1, 'then')


@pytest.fixture
def node(tmp_path):
    with NodeProcess(tmp_path / 'one', cpus=2) as node:
        yield node


@pytest.fixture
def serve(tmp_path, node):
    """Starts a scheduler with options."""
    started = []

    def start(*options, port=0):
        started.append(SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:%d' % node.port,
                                        '--pulse-interval', '1',
                                        '--ping-interval', '1', *options, port=port))
        return started[-1]
    yield start
    for scheduler in started:
        scheduler.stop()


@pytest.fixture
def begun(tmp_path):
    """A directory where jobs leave files when they begin; they run until there is one called
    'end'."""
    directory = tmp_path / 'begun'
    directory.mkdir()
    yield directory
    end(directory)


def end(directory):
    (directory / 'end').touch()


def names(directory):
    return {path.name for path in directory.iterdir()} - {'end'}


class Overview:
    """What the scheduler says of all clusters."""

    def __init__(self, scheduler):
        self._link = SchedulerLink('127.0.0.1', scheduler.port, ConnectionSettings(
            dispy.find_secret(None), None, None, None, PULSE, 1.0))

    def of(self, pid=None):
        """The one cluster there is, or that of a program."""
        try:
            _, rows = self._link.ask('clusters', 0, 100)
        except RuntimeError:   # not connected yet
            return {'cancelled': None, 'done': None}
        found = [row for row in rows if pid in (None, int(row['program'].rpartition(' ')[2]))]
        return found[0]

    def programs(self):
        """The programs that have a cluster."""
        return [row['program'] for row in self._link.ask('clusters', 0, 100)[1]]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._link.close()


def hold(directory, name):
    import os
    import time
    open(os.path.join(directory, str(name)), 'w').close()
    while not os.path.exists(os.path.join(directory, 'end')):
        time.sleep(0.01)
    return name


PROGRAM = '''
import os, sys, time
import dispy
scheduler, directory, recover, tells = (int(sys.argv[1]), sys.argv[2], sys.argv[3] or None,
                                        sys.argv[4])
def hold(directory, name):
    import os, time
    open(os.path.join(directory, str(name)), 'w').close()
    while not os.path.exists(os.path.join(directory, 'end')):
        time.sleep(0.01)
    return name
tell_scheduler = dispy.SharedProgramCluster.tell_scheduler
def changed(core, nodes, recovers):
    tell_scheduler(core, nodes, tells == 'recovers')
dispy.SharedProgramCluster.tell_scheduler = changed
cluster = dispy.SharedJobCluster(hold, scheduler_port=scheduler, recover_file=recover)
jobs = [cluster.submit_job_id(n, directory, n) for n in range(30)]
while sum(job.status == dispy.DispyJob.Running for job in jobs) < 2:
    time.sleep(0.01)
print('ready', flush=True)
time.sleep(600)
'''


def killed(scheduler, begun, recover='', tells='nothing'):
    """A program with 30 jobs, two of which run, is no more. Its PID."""
    program = start_here([sys.executable, '-c', PROGRAM, str(scheduler.port), str(begun), recover,
                          tells], stdout=subprocess.PIPE, cwd=ROOT)
    with program.stdout:
        assert program.stdout.readline() == b'ready\n'
    program.kill()
    program.wait()
    return program.pid


def test_what_waits_is_cancelled_at_once_when_the_process_is_gone(serve, begun):
    """And the log tells the story of both programs, and of the node."""
    scheduler = serve('--gone-after', '3600')
    pid = killed(scheduler, begun)
    with Overview(scheduler) as overview:
        with dispy.SharedJobCluster(hold, scheduler_port=scheduler.port) as cluster:
            eventually(lambda: overview.of(pid)['cancelled'] == 28)
            jobs = [cluster.submit(str(begun), 'mine-%d' % n) for n in range(3)]
            end(begun)
            assert all(job.wait(30) for job in jobs)
            eventually(lambda: overview.of(pid)['done'] == 2, what='the end of what ran')
        eventually(lambda: len(overview.programs()) == 1)
    assert len([name for name in names(begun) if not name.startswith('mine')]) == 2
    scheduler.stop()
    log = scheduler.log()
    for pattern in (
            r'INFO: node \S+ \(127.0.0.1:\d+\) is connected, and offers 2 CPUs\n',
            r'INFO: \S+ PID %d is connected from 127.0.0.1\n' % pid,
            r'INFO: hold: begins \(computation 1 of \S+ PID %d\)\n' % pid,
            r'INFO: \S+: node \S+ \(127.0.0.1:\d+\) is used, with 2 CPUs\n',
            r'WARNING: lost the connection to \S+ PID %d: .*; 30 of its jobs have not ended\n'
            % pid,
            r'its 28 jobs that have not begun are cancelled',
            r'INFO: hold: begins \(computation 2 of \S+ PID %d\)\n' % os.getpid(),
            r'is over: 3 jobs, 3 done, 0 failed, 0 cancelled, 0 not ended; '
            r'\d+\.\d CPU seconds \(computation 2 of \S+ PID %d\)\n'
            % os.getpid()):
        assert re.search(pattern, log), (pattern, log)


def test_with_a_recover_file_everything_goes_on(serve, begun, tmp_path):
    scheduler = serve('--gone-after', '0.1')
    pid = killed(scheduler, begun, str(tmp_path / 'recover'), 'recovers')
    end(begun)
    with Overview(scheduler) as overview:
        eventually(lambda: overview.of(pid)['done'] == 30)
    assert len(names(begun)) == 30


def test_jobs_cancelled_so_are_recovered_as_cancelled(serve, begun, tmp_path):
    scheduler = serve()
    pid = killed(scheduler, begun, str(tmp_path / 'recover'))
    with Overview(scheduler) as overview:
        eventually(lambda: overview.of(pid)['cancelled'] == 28)
    scheduler.stop()
    scheduler = serve(port=scheduler.port)   # it remembers
    end(begun)
    jobs = dispy.recover_jobs(str(tmp_path / 'recover'), 30)
    cancelled = [job for job in jobs if job.status == DispyJob.Cancelled]
    assert len(jobs) == 30 and len(cancelled) == 28
    assert all('had not begun' in job.exception and '--gone-after' in job.exception
               for job in cancelled)
    assert len(names(begun)) == 2


def test_a_program_that_comes_back_is_told_and_loses_nothing(serve, begun, caplog):
    scheduler = serve('--gone-after', '0.5')
    caplog.set_level(logging.WARNING, 'dispy')
    with Proxy(('127.0.0.1', scheduler.port)) as proxy:
        cluster = dispy.SharedJobCluster(hold, scheduler_port=proxy.address[1])
        jobs = [cluster.submit(str(begun), n) for n in range(30)]
        eventually(lambda: sum(job.status == DispyJob.Running for job in jobs) == 2)
        with Overview(scheduler) as overview:
            proxy.refuse()
            proxy.cut()
            eventually(lambda: overview.of()['cancelled'] == 28)
            proxy.accept()
        end(begun)
        assert cluster.wait(60)
        assert {job.status for job in jobs} == {DispyJob.Finished} and len(names(begun)) == 30
        assert sum('sent again' in record.getMessage() for record in caplog.records) == 1
        cluster.close()


def test_a_program_that_is_back_in_time_notices_nothing(serve, begun, caplog):
    scheduler = serve('--gone-after', '3600')
    with Proxy(('127.0.0.1', scheduler.port)) as proxy:
        cluster = dispy.SharedJobCluster(hold, scheduler_port=proxy.address[1])
        jobs = [cluster.submit(str(begun), n) for n in range(10)]
        eventually(lambda: sum(job.status == DispyJob.Running for job in jobs) == 2)
        proxy.cut()
        end(begun)
        assert cluster.wait(60) and {job.status for job in jobs} == {DispyJob.Finished}
        assert not [record for record in caplog.records if 'sent again' in record.getMessage()]
        cluster.close()


# -- the decision ----------------------------------------------------------------------------------

def test_absence_of_a_program_elsewhere():
    absence = Absence(False, ELSEWHERE)
    assert absence.look_at == math.inf
    absence.begin(100.0, 60.0)
    assert absence.look_at == 160.0
    assert absence.is_over(160.0) and absence.gone and absence.look_at == math.inf
    absence.end()
    assert not absence.gone
    absence.begin(200.0, 60.0)
    absence.end()
    assert absence.look_at == math.inf


def test_absence_of_a_program_on_this_machine():
    child = start_here([sys.executable, '-c', 'import sys; sys.path.insert(0, '
                        '%r); import dispy; print(dispy.own_process(), flush=True); input()'
                        % ROOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child.stdin, child.stdout:
        process = eval(child.stdout.readline())
        absence = Absence(False, process)
        absence.begin(0.0, 60.0)
        assert absence.look_at == 0.0 and not absence.is_over(0.0) and 0.0 < absence.look_at <= 1.0
        child.kill()
        eventually(lambda: has_ended(process))   # a zombie has ended
        assert absence.is_over(1.0)
    child.wait()
    assert has_ended(process)


def test_a_program_with_a_recover_file_is_waited_for():
    absence = Absence(True, (*own_process()[:2], 'another time'))
    absence.begin(0.0, 60.0)
    assert absence.look_at == math.inf


def test_a_process_of_the_same_number_is_another():
    machine, pid, start = own_process()
    assert has_ended((machine, pid, start)) is False
    assert has_ended((machine, pid, start + '1')) is True
    assert has_ended(('elsewhere', pid, start)) is None and has_ended((machine, pid, '')) is None
