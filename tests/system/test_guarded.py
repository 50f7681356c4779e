"""Every turn of a loop is guarded: an unexpected exception ends what it concerns, and the loop goes
on."""

import contextlib
import logging
import os
import socket
import subprocess
import sys

import pytest

import dispy
import dispynode
from conftest import ROOT, eventually
from dispynode import Faults, Link, Loop, LoopFailed, Pulse, Role, Session
from nodes import NodeProcess, SchedulerProcess


class Odd(Exception):
    pass


class Fragile(Loop):
    """A loop that raises where it is told to."""

    def __init__(self):
        super().__init__()
        self.raises, self.seen, self.broken, self.concerned = set(), [], [], []

    def _maybe(self, where):
        if where in self.raises:
            raise Odd(where)

    def on_event(self, event):
        self.seen.append(event)
        self._maybe(event)

    def on_channel(self, channel):
        channel.messages(self.now)
        self._maybe('channel')

    def on_broken(self, channel, text):
        self.broken.append(text)
        self._maybe('broken')

    def end_of_turn(self):
        self._maybe('end')

    def next_timer(self):
        self._maybe('timer')

    def on_fault(self, subject, text):
        self.concerned.append(subject)
        self._maybe('fault')
        return super().on_fault(subject, text)


@pytest.fixture
def loop():
    made = Fragile()
    yield made
    made.close()


def link_of(loop):
    """A link of this loop, and the socket at its other end."""
    ours, theirs = socket.socketpair()
    link = Link(ours, Session(b'k' * 32, b'k' * 32, bytes(16), Role.CLIENT), 'here', loop.clock())
    loop.attach(link)
    return link, theirs


@pytest.mark.parametrize('where', ['one', 'end', 'timer'])
def test_the_loop_goes_on_after_a_fault(loop, where, caplog):
    loop.raises.add(where)
    loop.post('one')
    loop.post('two')
    for _ in range(3):
        loop.turn(0)
    assert loop.seen == ['one', 'two']
    assert 'Traceback' in caplog.text and where in caplog.text


@pytest.mark.parametrize('also', [(), ('broken',), ('fault',)])
def test_a_fault_while_a_channel_is_read_ends_the_channel_alone(loop, also):
    link, theirs = link_of(loop)
    other, others = link_of(loop)
    loop.raises.update(('channel', *also))
    sender = dispynode.FrameEncoder(b'k' * 32)
    theirs.sendall(b''.join(map(bytes, sender.seal(Pulse()))))
    loop.turn(0)
    if also != ('fault',):
        assert not link.is_attached and len(loop.broken) == 1
    assert other.is_attached
    theirs.close()
    others.close()


def test_send_never_raises_and_breaks_the_link(loop):
    link, theirs = link_of(loop)
    loop.send(link, dispynode.Bye('x' * dispynode.MAX_CONTROL))
    loop.send(link, dispynode.Bye(lambda: None))
    loop.turn(0)
    assert not link.is_attached and 'limit' in loop.broken[0]
    theirs.close()


def test_a_loop_that_fails_again_and_again_stops(loop):
    loop.raises.add('end')
    with pytest.raises(LoopFailed, match='%d faults' % Faults.MOST):
        while True:
            loop.post('go on')
            loop.turn(0)
            if loop.has_ended:
                loop.run()


def test_faults_that_concern_something_do_not_stop_the_loop(loop):
    for _ in range(2 * Faults.MOST):
        ours, theirs = socket.socketpair()
        loop.fault(type('Event', (), {'sock': ours})(), Odd('this one'))
        assert ours.fileno() == -1
        theirs.close()
    assert not loop.has_ended


def test_faults_that_are_far_apart_are_no_reason_to_stop():
    faults = Faults()
    assert not any(faults.are_many(now) for now in range(3 * Faults.MOST))
    assert any(faults.are_many(1000.0) for now in range(Faults.MOST))


# -- the daemons -----------------------------------------------------------------------------------

# Runs a daemon's module with one method replaced by one that raises while a file is there.
BROKEN = '''
import os, sys
import dispy, dispynode, dispyscheduler
if __name__ == '__main__':   # and not in a runner
    owner, name, flag, module, *argv = sys.argv[1:]
    cls = getattr(dispynode, owner, None) or getattr(dispyscheduler, owner)
    real = getattr(cls, name)
    def broken(*args, **kwargs):
        if os.path.exists(flag):
            raise ZeroDivisionError('on purpose')
        return real(*args, **kwargs)
    setattr(cls, name, broken)
    sys.exit(sys.modules[module].main(argv))
'''


def square(n):
    return n * n


def broken_node(tmp_path, owner, name, flag):
    script = tmp_path / 'broken.py'
    script.write_text(BROKEN)
    return NodeProcess(tmp_path / 'node', script=str(script),
                       listen=(owner, name, str(flag), 'dispynode', '-i', '127.0.0.1'))


@pytest.mark.parametrize('owner, name', [
    ('Attempts', 'on_jobs'), ('CpuScheduler', '_dispatch'), ('UndeliveredResults', 'deliver'),
    ('Node', '_on_compute'), ('Computations', 'on_runner_up'),
    ('ComputationFiles', 'prepare'), ('ProcessHost', 'start_runner'),
    ('WorkerPipes', 'start_worker'), ('WorkerPipes', 'feed'), ('NodeHost', '_send'),
    ('ProcessHost', '_from_worker')])
def test_a_node_outlives_its_faults(tmp_path, owner, name):
    """What the fault concerns ends; afterwards the next program is served."""
    flag = tmp_path / 'flag'
    flag.write_text('')
    with broken_node(tmp_path, owner, name, flag) as node:
        with dispy.JobCluster(square, nodes=[node.address], loglevel=logging.CRITICAL) as cluster:
            job = cluster.submit(3)
            eventually(lambda: 'on purpose' in node.log(), what='the fault')
            assert node.process.poll() is None
            flag.unlink()
            cluster.close(terminate=True)
            # Or it has been delivered since the flag is gone
            ended = (job.Cancelled, job.Abandoned, job.Terminated)
            assert job.status in ended or job.result == 9, node.log()
        with dispy.JobCluster(square, nodes=[node.address], loglevel=logging.CRITICAL) as cluster:
            assert cluster.submit(4)(30) == 16
        assert node.stop() == 0


def test_exit_status_3_says_that_a_fault_has_ended_it(tmp_path):
    flag = tmp_path / 'flag'
    with broken_node(tmp_path, 'Node', 'flush', flag) as node:
        flag.write_text('')
        with dispy.JobCluster(square, nodes=[node.address], loglevel=logging.CRITICAL) as cluster:
            cluster.submit(3)
            eventually(lambda: node.process.poll() is not None, what='its end')
            cluster.close(terminate=True)
        assert node.process.poll() == 3 and 'has to be started again' in node.log()


@pytest.mark.parametrize('module', ['dispynode', 'dispyscheduler'])
def test_help_tells_the_exit_statuses(module):
    text = subprocess.run([sys.executable, os.path.join(ROOT, module + '.py'), '--help'],
                          capture_output=True, text=True, check=True).stdout
    assert '3, it was ended by a fault of its own' in ' '.join(text.split())


# -- the client ------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['send_jobs', 'jobs_ended', 'take_submitted', 'on_results'])
def test_after_a_fault_in_the_driver_every_job_ends(monkeypatch, name):
    """A fault that is over afterwards: the jobs that were in hand end, and later ones run."""
    times = []

    def broken(self, *args):
        if args or name == 'take_submitted' and self.submitted:
            if not times:
                times.append(1)
                if name == 'take_submitted':
                    self.submitted.clear()   # taken, and then it failed
                raise ZeroDivisionError('on purpose')
        return real(self, *args)
    with dispy.JobCluster(square, nodes='local', loglevel=logging.CRITICAL) as cluster:
        assert cluster.submit(2)(30) == 4
        real = getattr(dispy.JobExchange, name)
        monkeypatch.setattr(dispy.JobExchange, name, broken)
        for action, method in list(dispy.core_of(cluster).driver._acts.items()):
            if method.__name__ == name:
                dispy.core_of(cluster).driver._acts[action] = lambda action: broken(
                    dispy.core_of(cluster).driver.jobs, action)
        for message, method in list(dispy.core_of(cluster).driver._messages.items()):
            if method.__name__ == name:
                dispy.core_of(cluster).driver._messages[message] = lambda peer, message: broken(
                    dispy.core_of(cluster).driver.jobs, peer, message)
        jobs = [cluster.submit(n) for n in range(5)]
        assert cluster.wait(30), [job.status_text() for job in jobs]
        assert times
        assert cluster.submit(5)(30) == 25


def test_when_the_driver_ends_every_job_ends(monkeypatch):
    """A driver that fails for good: jobs that wait, run and are in hand end as Abandoned."""
    with dispy.JobCluster(square, nodes='local', loglevel=logging.CRITICAL) as cluster:
        assert cluster.submit(2)(30) == 4

        def broken(*args):
            raise ZeroDivisionError('on purpose')
        monkeypatch.setattr(dispy.core_of(cluster).driver.schedule, 'flush', broken)
        monkeypatch.setattr(dispy.core_of(cluster).driver.schedule, 'handle', broken)
        jobs = []
        with contextlib.suppress(RuntimeError):   # it has ended already
            for n in range(5):
                jobs.append(cluster.submit(n))
        assert cluster.wait(30), [job.status_text() for job in jobs]
        assert {job.status for job in jobs} == {dispy.DispyJob.Abandoned}
        assert 'on purpose' in jobs[0].exception


def test_a_scheduler_outlives_its_faults(tmp_path):
    flag = tmp_path / 'flag'
    script = tmp_path / 'broken.py'
    script.write_text(BROKEN)
    with NodeProcess(tmp_path / 'node') as node:
        scheduler = SchedulerProcess.__new__(SchedulerProcess)
        scheduler.directory, scheduler._log, scheduler._from = str(tmp_path), str(
            tmp_path / 'log'), 0
        with open(scheduler._log, 'ab') as log:
            scheduler.process = subprocess.Popen(
                [sys.executable, str(script), 'ProgramComputations', 'end_turn_of', str(flag),
                 'dispyscheduler', '-i', '127.0.0.1', '-p', '0',
                 '--state-dir', str(tmp_path / 'state'), '-n', '127.0.0.1:%d' % node.port],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        with scheduler:
            scheduler.port = int(eventually(scheduler._listening, what='start'))
            flag.write_text('')
            cluster = dispy.SharedJobCluster(square, scheduler_port=scheduler.port,
                                             loglevel=logging.CRITICAL)
            cluster.submit(3)
            eventually(lambda: 'on purpose' in scheduler.log(), what='the fault')
            flag.unlink()
            cluster.close(terminate=True)
            with dispy.SharedJobCluster(square, scheduler_port=scheduler.port,
                                        loglevel=logging.CRITICAL) as cluster:
                assert cluster.submit(4)(30) == 16
            assert scheduler.process.poll() is None
