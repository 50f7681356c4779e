"""Odd uses that once hung or lost something: callbacks that wait and exit, questions to closed
clusters, jobs that fork."""

import os
import threading
import time

import pytest

import dispy
from nodes import NodeProcess


@pytest.fixture
def node(tmp_path):
    with NodeProcess(tmp_path, cpus=1) as process:
        yield process


def double(x):
    return x * 2


@pytest.mark.parametrize('method', ['wait', 'close'])
def test_two_callbacks_wait(make_cluster, node, method):
    """Guards against: two callbacks that call wait() or close() waited for each other for ever."""
    failed = []

    def ended(job):
        if method == 'wait' and not cluster.wait(8):
            failed.append(job)
        if method == 'close' and not cluster.close(8):
            failed.append(job)
    cluster = make_cluster(double, nodes=[node.address], job_status=ended)
    for n in range(4):
        cluster.submit(n)
    ok = cluster.wait(12)
    cluster.close(terminate=True)
    assert ok and not failed


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_callbacks_exit(make_cluster, node):
    """Guards against: SystemExit or KeyboardInterrupt ended a callback thread; after 16 none was
    left: wait() hung."""
    def ended(job):
        raise (SystemExit if job.id % 2 else KeyboardInterrupt)
    cluster = make_cluster(double, nodes=[node.address], job_status=ended)
    for n in range(40):
        cluster.submit(n)
    assert cluster.wait(8)
    cluster.close()


def test_asked_after_close(make_cluster, node):
    """Guards against: a question to a driver that has ended blocked 30 s, wait_nodes() without
    timeout for ever."""
    cluster = make_cluster(double, nodes=[node.address])
    cluster.wait_nodes(1, 10)
    cluster.close()
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        cluster.wait_nodes(1, 0.2)
    with pytest.raises(RuntimeError):
        dispy.core_of(cluster).driver.ask(lambda: None)
    assert time.monotonic() - began < 3


def test_status_while_closing(make_cluster, node):
    """Guards against: status() of another thread while close() is at work blocked 30 s, then
    TimeoutError."""
    for _ in range(30):
        cluster, errors, stop = make_cluster(double, nodes=[node.address]), [], []

        def watch():
            try:
                while not stop:
                    cluster.status()
            except BaseException as exc:
                errors.append(exc)
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        time.sleep(0.01)
        cluster.close(terminate=True)
        stop.append(1)
        thread.join(3)
        assert not thread.is_alive() and not errors


def fork_slowly(child_first):
    pid = os.fork()
    if (pid == 0) != child_first:
        time.sleep(0.3)
    return 'parent' if pid else 'child'


@pytest.mark.parametrize('child_first', [True, False])
def test_fork_both_return(make_cluster, node, child_first):
    """Guards against: the child of a job that forked went on as a worker: its result counted, and
    it took the next jobs."""
    def compute(n):
        return fork_slowly(child_first) if n < 0 else n
    with make_cluster(compute, nodes=[node.address]) as cluster:
        for _ in range(3):
            jobs = [cluster.submit(-1)] + [cluster.submit(n) for n in range(3)]
            assert [job(10) for job in jobs] == ['parent', 0, 1, 2], [job.exception for job in jobs]


def test_runner_killed(make_cluster, node):
    """Guards against: a job that kills the runner (or the OOM killer): the node was never used
    again."""
    def compute(n):
        import signal
        if n < 0:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(1)
        return n
    cluster = make_cluster(compute, nodes=[node.address])
    bad = cluster.submit(-1)
    assert bad.wait(8) and bad.status in (dispy.DispyJob.Terminated, dispy.DispyJob.Abandoned)
    good = cluster.submit(3)
    ok = good.wait(8)
    cluster.close(terminate=True)
    assert ok and good.result == 3


@pytest.mark.parametrize('what', ['ITIMER_VIRTUAL', 'ITIMER_PROF', 'mask'])
def test_timers_and_mask(make_cluster, node, what):
    """Guards against: an interval timer or a signal mask of a job struck the next one."""
    def compute(x):
        import signal
        if x == 'mask':
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGUSR1])
        elif x:
            signal.setitimer(getattr(signal, x), 0.2)
        else:
            until = time.process_time() + 0.5
            while time.process_time() < until:
                pass
            return sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ())))
    with make_cluster(compute, nodes=[node.address]) as cluster:
        assert cluster.submit(what).wait(10)
        job = cluster.submit('')
        assert job(10) == [], job.exception


def test_a_cluster_closed_while_it_dials(make_cluster, node, monkeypatch):
    """Guards against: a connection that came when its driver had ended stayed open."""
    dial = dispy.dial
    gone = threading.Event()

    def slowly(*args):
        found = dial(*args)
        gone.wait(0.3)
        return found
    monkeypatch.setattr(dispy, 'dial', slowly)
    for _ in range(3):
        cluster = make_cluster(double, nodes=[node.address])
        time.sleep(0.05)   # into the middle of it
        cluster.close(terminate=True)
        assert not [thread for thread in threading.enumerate() if thread.name == 'dispy-dial']
