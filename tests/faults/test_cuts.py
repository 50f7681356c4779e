"""Short cuts are short: forwarders that are away, addresses that change, names that nobody answers
for."""

import collections
import contextlib
import socket
import threading
import time

import pytest

import dispy
import dispynode
from conftest import eventually
from dispy import DispyJob
from ledger import Ledger, enter
from nodes import NodeProcess, SchedulerProcess
from proxy import DOWN, UP, Proxy


def compute(path, number, seconds):
    enter(path, number)
    time.sleep(seconds)
    return number


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / 'ledger')


@pytest.fixture
def node(tmp_path):
    with NodeProcess(tmp_path / 'node', cpus=2) as node:
        yield node


def all_once(ledger, jobs):
    """Whether every job has finished, and has begun once."""
    assert ({job.status for job in jobs}
            == {DispyJob.Finished}), [job.exception for job in jobs if job.exception][:2]
    begun = collections.Counter(attempt.job for attempt in ledger.attempts())
    return set(begun.values()) == {1} and len(begun) == len(jobs)


def cluster_at(*proxies, **options):
    return dispy.JobCluster(compute, depends=[enter], nodes=[proxy.address for proxy in proxies],
                            ping_interval=0.5, **options)


def test_a_forwarder_that_is_away_proves_no_end_of_the_node(node, ledger):
    """Nothing listens at the address for a while, as when `ssh -L` is started anew: what runs goes
    on."""
    with Proxy(node.address) as proxy, cluster_at(proxy) as cluster:
        jobs = [cluster.submit(ledger.path, number, 3.0) for number in range(2)]
        eventually(lambda: len(ledger.attempts()) == 2)
        proxy.refuse()
        proxy.cut()
        eventually(lambda: not cluster.status().nodes[0].state == 'ready')
        time.sleep(1.5)   # several dials are refused
        proxy.accept()
        assert cluster.wait(30)
        assert all_once(ledger, jobs)


def test_a_node_that_was_killed_on_this_machine_is_known_to_have_ended(tmp_path, ledger):
    """By its lock file: what ran there is lost at once, what waited has not begun and goes
    elsewhere."""
    with NodeProcess(tmp_path / 'a', cpus=1) as node, NodeProcess(tmp_path / 'b', cpus=1) as other:
        with dispy.JobCluster(compute, depends=[enter], nodes=[node.address],
                              pulse_interval=60) as cluster:
            jobs = [cluster.submit(ledger.path, number, 0.001) for number in range(300)]
            jobs.append(cluster.submit(ledger.path, 'long', 600))
            jobs += [cluster.submit(ledger.path, number, 0.001) for number in range(300, 400)]
            eventually(lambda: any(attempt.job == 'long' for attempt in ledger.attempts()))
            assert all(job.wait(20) for job in jobs[:300])   # or their results die with the node
            node.kill()
            cluster.allocate_node(other.address)
            assert cluster.wait(30)   # the limit is 300 s
    assert jobs[300].status == DispyJob.Abandoned and 'its process has ended' in jobs[300].exception
    del jobs[300]
    assert {job.status for job in jobs} == {DispyJob.Finished}
    assert max(collections.Counter(attempt.job for attempt in ledger.attempts()).values()) == 1


@pytest.mark.parametrize('kind', ['JobCluster', 'SharedJobCluster'])
def test_a_second_connection_is_tried_while_the_first_is_silent(tmp_path, node, ledger, kind):
    with SchedulerProcess(tmp_path / 's', '-n', '127.0.0.1:%d' % node.port) as scheduler:
        with Proxy(node.address if kind == 'JobCluster' else scheduler.address) as proxy:
            if kind == 'JobCluster':
                cluster = cluster_at(proxy, pulse_interval=0.5)
            else:
                cluster = dispy.SharedJobCluster(
                    compute, depends=[enter], scheduler_host=proxy.address[0],
                    scheduler_port=proxy.address[1], pulse_interval=0.5)
            with cluster:
                jobs = [cluster.submit(ledger.path, number, 6.0) for number in range(2)]
                eventually(lambda: len(ledger.attempts()) == 2)
                proxy.forget()
                assert cluster.wait(30)
                assert all_once(ledger, jobs)
                assert proxy.count == 2


@pytest.mark.parametrize('way', [UP, DOWN])
def test_silence_one_way_for_less_than_the_limit_costs_nothing(node, ledger, way):
    with Proxy(node.address) as proxy, cluster_at(proxy, pulse_interval=1.0) as cluster:
        jobs = [cluster.submit(ledger.path, number, 7.0) for number in range(2)]
        eventually(lambda: len(ledger.attempts()) == 2)
        proxy.swallow(way)
        time.sleep(4.0)   # of a limit of 5
        proxy.swallow()
        assert cluster.wait(30)
        assert all_once(ledger, jobs)


def test_the_wait_of_redials_begins_anew_with_each_connection():
    dialling = dispynode.Reconnector(0.5, 30.0)
    for _ in range(10):
        dialling.again(100.0)
    assert dialling.due == 130.0
    dialling.again(200.0, lived=0.2)
    assert dialling.due == 200.5
    dues = []
    for _ in range(12):
        dialling.again(300.0, lived=0.01)
        dues.append(dialling.due - 300.0)
    assert dues[-1] == 30.0, 'a link that ends at once again and again is no storm of connects'


def test_what_has_lost_its_connection_is_tried_often_and_not_for_long():
    """As long as jobs there are not lost: after that with long waits, as what was never reached."""
    dialling, now = dispynode.Reconnector(0.5, 30.0), 1000.0
    dialling.again(now)
    assert dialling.patience(now, 2.0) == dispynode.HANDSHAKE_TIME
    dialling.again(now, lived=100.0, pulse=2.0)
    waits, patiences = [], []
    while len(waits) < 8:
        waits.append(dialling.due - now)
        now = dialling.due
        patiences.append(dialling.patience(now, 2.0))
        dialling.again(now)   # it is refused at once
    assert waits == [0.5, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 30.0]
    assert patiences == 6 * [2.0] + 2 * [dispynode.HANDSHAKE_TIME]
    dialling.again(now, lived=100.0, pulse=0.2)
    assert ([dialling.patience(now, 0.2, trip) for trip in (0.0, 0.3, 5.0)]
            == [1.0, 3.0, dispynode.HANDSHAKE_TIME])
    for _ in range(8):
        dialling.again(now, lived=0.01)
    assert (dialling.due > now
            + 5.0), 'a link that ends at once again and again is no storm of connects'


@pytest.mark.parametrize('way', [UP, DOWN])
@pytest.mark.parametrize('who', ['the program', 'the node'])
def test_an_attempt_that_is_never_answered_is_not_waited_for_until_jobs_are_lost(tmp_path, ledger,
                                                                                 way, who):
    """The connection is cut, and what is tried next falls into silence. When that is over nobody
    answers this attempt either, as where a router has forgotten it, but another one, which has to
    come before the jobs are lost."""
    with contextlib.ExitStack() as stack:
        if who == 'the program':
            node = stack.enter_context(NodeProcess(tmp_path / 'node', cpus=2))
            proxy = stack.enter_context(Proxy(node.address))
            cluster = stack.enter_context(cluster_at(proxy, pulse_interval=1.5))
        else:
            scheduler = stack.enter_context(SchedulerProcess(tmp_path / 's', '-n', '127.0.0.1:9',
                                                             '--pulse-interval', '1.5'))
            proxy = stack.enter_context(Proxy(scheduler.address))
            stack.enter_context(NodeProcess(tmp_path / 'node', '--scheduler-host',
                                            '127.0.0.1:%d' % proxy.address[1], cpus=2))
            cluster = stack.enter_context(
                dispy.SharedJobCluster(compute, depends=[enter], scheduler_host=scheduler.host,
                                       scheduler_port=scheduler.port))
        jobs = [cluster.submit(ledger.path, number, 10.0) for number in range(2)]
        eventually(lambda: len(ledger.attempts()) == 2, 40)
        count = proxy.count
        proxy.swallow(way)
        proxy.cut()
        eventually(lambda: proxy.count > count)
        time.sleep(1.0)
        proxy.swallow()
        assert cluster.wait(30)
        assert all_once(ledger, jobs)


def test_nobody_waits_for_a_name_that_is_not_answered(monkeypatch):
    """A thread that asks for a name cannot be woken: it is not waited for, and makes no connection
    when the name comes."""
    answer, posted, joined = threading.Event(), [], []
    made = []
    listener = socket.create_server(('127.0.0.1', 0))

    def slow(host, port, *rest):
        answer.wait(60)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, '', listener.getsockname())]

    def dial(note):
        monkeypatch.setattr(dispynode.socket, 'getaddrinfo', slow)
        return dispynode.dial('slow.example', 1, b'k' * 32, dispynode.Role.CLIENT,
                              dispynode.Role.NODE, b'i' * 16, note=note)
    before = set(threading.enumerate())
    dialling = dispynode.Reconnector(0.5, 30.0)
    dialling.start(posted.append, 'peer', dial)
    thread, = set(threading.enumerate()) - before
    join = thread.join
    monkeypatch.setattr(thread, 'join', lambda *args: joined.append(args))
    dialling.abort()
    assert not joined
    answer.set()
    join(20)
    assert [type(event) for event in posted] == [dispynode.ConnectFailed]
    listener.settimeout(0.0)
    with pytest.raises(BlockingIOError):
        made.append(listener.accept())
    listener.close()


def test_a_connection_that_comes_when_its_loop_has_ended_is_closed():
    """Whether it is posted before that or after, and although somebody was to be woken then."""
    loop, pairs = dispynode.Loop(), [socket.socketpair() for _ in range(3)]
    loop.post(dispynode.Connected('peer', pairs[0][0], None, 'address'))
    loop.close()
    for pair in pairs[1:]:
        loop.post(dispynode.Connected('peer', pair[0], None, 'address'))
    assert [pair[0].fileno() for pair in pairs] == [-1, -1, -1]
    for pair in pairs:
        pair[1].close()


def length_of(name):
    import os
    return os.path.getsize(name) if os.path.exists(name) else len(os.listdir('.'))


@pytest.mark.parametrize('kind', ['JobCluster', 'SharedJobCluster'])
@pytest.mark.parametrize('what', ['large', 'many'])
def test_a_link_that_breaks_while_files_come_goes_on_where_it_was(tmp_path, node, kind, what):
    """Twice, at two places: what is half there is dropped, and what is wanted is said again on the
    new link."""
    files = tmp_path / 'files'
    files.mkdir()
    for number in range(1 if what == 'large' else 300):
        (files / ('file-%d' % number)).write_bytes(b'x' * (8 << 20 if what == 'large' else 4096))
    with SchedulerProcess(tmp_path / 's', '-n', '127.0.0.1:%d' % node.port) as scheduler:
        with Proxy(node.address if kind == 'JobCluster' else scheduler.address) as proxy:
            for byte in (3 << 20, 5 << 20) if what == 'large' else (300000, 700000):
                proxy.at(byte, 'reset')
            options = {'depends': [str(files / name.name) for name in files.iterdir()],
                       'ping_interval': 0.5}
            if kind == 'JobCluster':
                cluster = dispy.JobCluster(length_of, nodes=[proxy.address], **options)
            else:
                cluster = dispy.SharedJobCluster(length_of, scheduler_host=proxy.address[0],
                                                 scheduler_port=proxy.address[1], **options)
            with cluster:
                job = cluster.submit('file-0')
                assert job(60) == (8 << 20 if what == 'large' else 4096)
                assert proxy.count >= 3 and not proxy.armed
