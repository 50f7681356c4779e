"""The process that makes workers: killed under load, stopped, held open by its children, without
room for a worker."""

import collections
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import dispy
import dispynode
from conftest import eventually, lives
from dispy import DispyJob
from ledger import Ledger, enter
from nodes import NodeProcess, runner_of

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='workers are forked here')


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / 'ledger')


def compute(path, number, seconds):
    enter(path, number)
    time.sleep(seconds)
    return number


@pytest.mark.parametrize('seconds', [0.001, 0])
def test_a_runner_that_is_killed_takes_no_job_with_it_that_has_not_begun(tmp_path, ledger, seconds):
    with NodeProcess(tmp_path / 'node', cpus=2) as node:
        with dispy.JobCluster(compute, depends=[enter], nodes=[node.address]) as cluster:
            jobs = [cluster.submit(ledger.path, number, seconds) for number in range(6000)]
            eventually(lambda: sum(job.status == DispyJob.Finished for job in jobs) > 500)
            runner_of(node).kill()
            assert cluster.wait(60)
    assert {job.status for job in jobs} <= {DispyJob.Finished, DispyJob.Terminated}
    failed = [job for job in jobs if job.status == DispyJob.Terminated]
    assert len(failed) <= 2 and all('runner process ended' in job.exception
                                    for job in failed), failed
    begun = collections.Counter(attempt.job for attempt in ledger.attempts())
    # A job that had begun may have had no time to write so.
    assert {str(number) for number, job in enumerate(jobs) if job not in failed} <= set(
        map(str, begun))
    assert max(begun.values()) == 1


def limited(words, *argv):
    """`start` of a NodeProcess that gives it limits by a shell."""
    def start(command, env=None, **options):
        return subprocess.Popen(['sh', '-c', words + '; exec "$@"', 'sh', *argv, *command],
                                env=dict(os.environ, **(env or {})), **options)
    return start


@contextlib.contextmanager
def group_of_processes(most):
    """The `cgroup.procs` of a new cgroup with so many processes at most."""
    for root in ('/sys/fs/cgroup/pids', '/sys/fs/cgroup'):
        group = '%s/dispy-test-%d' % (root, os.getpid())
        try:
            os.mkdir(group)
            with open(group + '/pids.max', 'w') as file:
                file.write(str(most))
        except OSError:
            with contextlib.suppress(OSError):
                os.rmdir(group)
            continue
        try:
            yield group + '/cgroup.procs'
        finally:
            eventually(lambda: not open(group + '/cgroup.procs').read())
            os.rmdir(group)
        return
    pytest.skip('no cgroup can be made here')


@pytest.mark.parametrize('what', ['descriptors', 'processes'])
def test_a_worker_that_cannot_be_made_is_told_and_the_others_go_on(tmp_path, ledger, caplog, what):
    with contextlib.ExitStack() as stack:
        if what == 'descriptors':
            start, text = limited('ulimit -n 64'), 'no more descriptors: limit 64'
        else:
            group = stack.enter_context(group_of_processes(12))
            start, text = limited('echo $$ > %s' % group), 'no more processes: limit 12'
        node = stack.enter_context(NodeProcess(tmp_path / 'node', cpus=40, start=start))
        with dispy.JobCluster(compute, depends=[enter], nodes=[node.address]) as cluster:
            jobs = [cluster.submit(ledger.path, number, 0.02) for number in range(200)]
            assert cluster.wait(60)
        assert ({job.status for job in jobs}
                == {DispyJob.Finished}), [job.exception for job in jobs if job.exception][:1]
        assert len(ledger.attempts()) == 200
        told = [record
                for record in caplog.records
                if 'cannot start a worker process' in record.getMessage()]
        assert len(told) == 1 and text in told[0].getMessage(), told


def leave_child(how):
    """A setup that leaves a child behind which holds all that is open."""
    global child
    child = os.fork() if how == 'python' else ctypes.CDLL(None).fork()
    while not child:
        time.sleep(1)


def child_of_setup():
    return child


@pytest.mark.parametrize('how', ['python', 'C'])
def test_a_runner_that_is_killed_while_a_child_of_setup_lives_is_noticed(tmp_path, how):
    if how == 'C' and not hasattr(os, 'pidfd_open') and sys.version_info >= (3, 9):
        pytest.skip('processes cannot be watched here')
    with NodeProcess(tmp_path / 'node', cpus=1) as node:
        with dispy.JobCluster(child_of_setup, nodes=[node.address],
                              setup=dispy_setup(how)) as cluster:
            first = cluster.submit()
            left = first(30)
            assert lives(left)
            runner_of(node).kill()
            eventually(lambda: cluster.submit()(30) not in (None, left), 30, 'a new runner')
            eventually(lambda: not lives(left))


def dispy_setup(how):
    import functools
    return functools.partial(leave_child, how)


def stop_runner():
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(600)


def any_job(what):
    return stop_runner() if what == 'stop' else what


def test_a_runner_that_is_stopped_is_ended(tmp_path):
    with NodeProcess(tmp_path / 'node', cpus=1) as node:
        with dispy.JobCluster(any_job, nodes=[node.address]) as cluster:
            assert cluster.submit('first')(30) == 'first'
            job, behind = cluster.submit('stop', dispy_timeout=0.5), cluster.submit('behind')
            assert job.wait(40) and behind.wait(40)
            assert job.status == DispyJob.Terminated and 'dispy_timeout' in job.exception
            assert behind.result == 'behind'


class Deaf:
    """Children that a SIGKILL does not end, as those that sleep on a disk that has died."""

    def __init__(self, monkeypatch):
        self.workers = dispynode.WorkerProcesses({}, None, None, print)
        self.child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
        monkeypatch.setattr(dispynode.os, 'kill', lambda pid, number: None)
        monkeypatch.setattr(dispynode, 'children_here',
                            lambda: [self.child.pid] if self.child.returncode is None else [])


def test_nobody_waits_for_a_stray_process_that_cannot_be_killed(monkeypatch):
    deaf = Deaf(monkeypatch)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (deaf.workers.kill_strays(), done.set()))
    thread.start()
    try:
        assert done.wait(20), 'it is waited for without end'
        assert deaf.workers._undead == {deaf.child.pid}
        deaf.workers.kill_strays()   # it is known, and not waited for again
    finally:
        monkeypatch.undo()
        deaf.child.kill()
        thread.join(20)
    eventually(lambda: deaf.workers.reap() or not deaf.workers._undead)


@pytest.fixture
def freezer():
    """`cgroup.procs` of a cgroup whose processes sleep and cannot be killed (version 1 of
    cgroups)."""
    group = '/sys/fs/cgroup/freezer/dispy-test-%d' % os.getpid()
    try:
        os.mkdir(group)
        with open(group + '/freezer.state', 'w') as file:
            file.write('FROZEN')
    except OSError as exc:
        pytest.skip('processes cannot be frozen here: %s' % exc)
    yield group
    with open(group + '/freezer.state', 'w') as file:
        file.write('THAWED')
    eventually(lambda: not open(group + '/cgroup.procs').read())
    os.rmdir(group)


def freeze(path, group, whom):
    """The job itself, or a child that it leaves, sleeps and cannot be killed."""
    if whom == 'child' and os.fork():
        return whom
    if whom == 'nobody':
        return whom
    if whom == 'child':
        os.setsid()
    with open(group + '/cgroup.procs', 'w') as file:
        enter(path, whom)
        file.write(str(os.getpid()))
        file.flush()
    time.sleep(600)


def test_a_child_that_cannot_be_killed_stops_nobody(tmp_path, freezer, ledger):
    with NodeProcess(tmp_path / 'node', cpus=1) as node:
        with dispy.JobCluster(freeze, depends=[enter], nodes=[node.address]) as cluster:
            assert cluster.submit(ledger.path, freezer, 'child')(30) == 'child'
            for _ in range(5):
                assert cluster.submit(ledger.path, freezer, 'nobody')(30) == 'nobody'
        thaw(freezer)


def test_a_job_that_cannot_be_killed_is_told_and_costs_its_cpu(tmp_path, freezer, ledger):
    with NodeProcess(tmp_path / 'node', cpus=2) as node:
        with dispy.JobCluster(freeze, depends=[enter], nodes=[node.address]) as cluster:
            job = cluster.submit(ledger.path, freezer, 'job')
            eventually(ledger.attempts)
            cluster.cancel(job)
            assert job.wait(40) and job.status == DispyJob.Cancelled
            assert cluster.submit(ledger.path, freezer, 'nobody')(30) == 'nobody'   # the other CPU
            thaw(freezer)
            assert ([cluster.submit(ledger.path, freezer, 'nobody')(30) for _ in range(4)]
                    == 4 * ['nobody'])


def thaw(group):
    with open(group + '/freezer.state', 'w') as file:
        file.write('THAWED')
