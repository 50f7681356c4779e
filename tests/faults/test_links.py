"""Connections that break, hang and crawl, between a client and nodes that live."""

import os
import random
import socket
import threading
import time

import pytest

import dispy
from conftest import eventually
from dispy import DispyJob
from hosts import Hosts
from ledger import Ledger, enter, one_more_each
from nodes import NodeProcess
from proxy import DOWN, UP, Proxy


def compute(path, number, seconds=0.0, size=0):
    enter(path, number)
    time.sleep(seconds)
    return number, bytes(size) if isinstance(size, int) else b''


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / 'ledger')


@pytest.fixture
def node(tmp_path):
    with NodeProcess(tmp_path / 'node') as node:
        yield node


def cluster_of(*proxies, **options):
    options.setdefault('pulse_interval', 1.0)
    return dispy.JobCluster(compute, depends=[enter], nodes=[proxy.address for proxy in proxies],
                            ping_interval=0.5, **options)


def submit(cluster, ledger, numbers, seconds=0.02, size=0):
    return [cluster.submit_job_id(number, ledger.path, number, seconds, size) for number in numbers]


def finished(jobs):
    """Numbers of jobs with their results."""
    assert not [job.exception for job in jobs
                if job.exception], [job.exception for job in jobs if job.exception][:3]
    return [job.result[0] for job in jobs]


def test_a_link_cut_for_a_second_costs_nothing(node, ledger):
    """Nothing is lost, and nothing runs twice, although the jobs are not reentrant."""
    ended = []
    with Proxy(node.address) as proxy, \
            cluster_of(proxy, job_status=lambda job: ended.append(job.id)) as cluster:
        jobs = submit(cluster, ledger, range(200))
        eventually(lambda: len(ended) > 20)
        proxy.hold()
        proxy.cut()
        time.sleep(1.0)
        proxy.resume()
        assert cluster.wait(60)
        tally = ledger.check(range(200), ended)
        assert finished(jobs) == list(range(200)) and tally.clean and not tally.again
        one_more_each(cluster, ledger.path, 'more')


@pytest.mark.parametrize('reentrant', (True, False))
def test_a_link_cut_for_longer_than_the_limit(node, ledger, reentrant):
    """As 20 s of a limit of 10. The node drops what it still runs when the client is back; what was
    abandoned stays so."""
    with Hosts() as hosts:
        client, far = hosts.host('client'), hosts.host('far')
        with far.node():
            shown = client.start_python('''
                import time
                import dispy

                def compute(number):
                    time.sleep(0.05)
                    return number

                with dispy.JobCluster(compute, nodes=[(%r, 9701)], reentrant=%r,
                                      pulse_interval=0.2, ping_interval=0.5,
                                      loglevel=50) as cluster:   # its output is read
                    cluster.wait_nodes(1, timeout=20)
                    jobs = [cluster.submit(number) for number in range(200)]
                    while jobs[10].status < 9:
                        time.sleep(0.01)
                    print('ready', flush=True)
                    cluster.wait(60)
                    print(sum(job.result == number for number, job in enumerate(jobs)),
                          {job.status_text() for job in jobs} <= {'finished', 'abandoned'})
                    more = cluster.submit(1)
                    print(more(30))
                ''' % (far.ip, reentrant))
            lines = iter(shown.stdout.readline, '')
            assert 'ready\n' in lines
            far.cut()
            time.sleep(3.0)
            far.mend()
            rest = [line for line in lines if not line.startswith(('node ', 'compute '))]
            shown.wait(30)
            count, known = rest[0].split()
            assert known == 'True' and rest[1] == '1\n' and (count == '200') == reentrant, rest


@pytest.mark.parametrize('sent, received', ((True, False), (False, True)))
def test_a_link_cut_in_one_direction_only(sent, received):
    """Both sides notice; for less than the limit nothing is lost, for more a reentrant job runs
    again."""
    with Hosts() as hosts:
        client, far = hosts.host('client'), hosts.host('far')
        with far.node():
            shown = client.start_python('''
                import time
                import dispy

                def compute(number):
                    time.sleep(0.02)
                    return number

                with dispy.JobCluster(compute, nodes=[(%r, 9701)], reentrant=True,
                                      pulse_interval=0.2, ping_interval=0.5) as cluster:
                    jobs = [cluster.submit(number) for number in range(200)]
                    jobs[10]()
                    print('ready', flush=True)
                    print([job() for job in jobs] == list(range(200)))
                ''' % far.ip)
            lines = iter(shown.stdout.readline, '')
            assert 'ready\n' in lines
            for seconds in (0.5, 2.5):
                far.cut(sent=sent, received=received)
                time.sleep(seconds)
                far.mend()
                time.sleep(0.2)
            assert 'True\n' in list(lines)
            shown.wait(30)


@pytest.mark.parametrize('sent, received', ((True, False), (False, True)))
def test_packets_of_full_size_that_are_lost_are_named_and_avoided(sent, received):
    """A link with a small MTU whose routers say nothing. Short packets arrive, so that a connection
    comes about each time."""
    with Hosts() as hosts:
        client, far = hosts.host('client'), hosts.host('far')
        client.commands('ip link set dev eth0 gso_max_segs 1')
        client.uplink.commands('ip link set dev %s gso_max_segs 1' % client.port)
        with far.node() as node:
            far.lose_long(1400, sent=received, received=sent)
            shown = client.python('''
                import os
                import sys
                import dispy

                def compute(number, data):
                    return number, os.urandom(3000)

                with dispy.JobCluster(compute, nodes=[sys.argv[1]], pulse_interval=0.5,
                                      ping_interval=0.5) as cluster:
                    jobs = [cluster.submit(number, os.urandom(3000)) for number in range(20)]
                    print([job.get(60)[0] for job in jobs] == list(range(20)))
                ''', far.ip)
            assert 'True' in shown.splitlines(), shown
            told = [line for line in shown.splitlines() if 'MTU' in line]
            for part in (far.ip, 'mtu 1280', 'ICMP', 'at most 1200 bytes'):
                assert part in told[0], shown
            assert len(told) == 1 and 'refused' not in shown and 'MTU' in node.log()


def test_a_flapping_link_costs_nothing_and_brings_no_storm_of_connects(node, ledger):
    ended = []
    with Proxy(node.address) as proxy, \
            cluster_of(proxy, job_status=lambda job: ended.append(job.id)) as cluster:
        jobs = submit(cluster, ledger, range(300))
        began = time.monotonic()
        for _ in range(20):
            eventually(lambda: proxy.open, 30)
            time.sleep(0.1)
            proxy.cut()
        flapped = time.monotonic() - began
        assert cluster.wait(60)
        tally = ledger.check(range(300), ended)
        assert finished(jobs) == list(range(300)) and tally.clean and not tally.again
        assert proxy.count <= 24 and flapped > 2   # one for each cut; a storm has thousands


def test_a_node_that_hangs_up_brings_no_storm_of_connects(ledger):
    """Each connection is accepted and closed at once."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen(64)
        count, over = [], threading.Event()

        def accept():
            while not over.is_set():
                sock, _ = listener.accept()
                sock.close()
                count.append(1)
        thread = threading.Thread(target=accept)
        thread.start()
        with dispy.JobCluster(abs, nodes=[listener.getsockname()], pulse_interval=0.2):
            time.sleep(4)
        over.set()
        socket.create_connection(listener.getsockname()).close()
        thread.join()
    assert 1 <= len(count) <= 8


def recorded(node, ledger):
    """Bytes each way of a session that has a bit of everything."""
    with Proxy(node.address, record=True) as proxy:
        with cluster_of(proxy) as cluster:
            jobs = submit(cluster, ledger, ['r%d' % number for number in range(6)], 0.001, 3000)
            assert cluster.wait(30)
            assert len(finished(jobs)) == 6
        return {way: len(proxy.connections[0].recorded[way]) for way in (UP, DOWN)}


@pytest.mark.long
@pytest.mark.parametrize('way', (UP, DOWN))
@pytest.mark.parametrize('fault', ('cut', 'reset', 'flip'))
def test_a_link_broken_at_any_byte_of_any_message(node, ledger, way, fault, request):
    """Bytes spread over a recorded session; with --long every 7th of them. Each time all jobs end
    with their results."""
    size = recorded(node, ledger)[way]
    places = (range(0, size, 7) if request.config.getoption('--long')
              else sorted(random.Random(fault + way).sample(range(size), 4)) + [0])
    for place in places:
        names = ['%s-%d-%d' % (fault, place, number) for number in range(6)]
        ended = []
        with Proxy(node.address) as proxy, \
                cluster_of(proxy, job_status=lambda job: ended.append(job.id)) as cluster:
            proxy.at(place, fault, way)
            jobs = submit(cluster, ledger, names, 0.001, 3000)
            assert cluster.wait(30), (place, cluster.status())
            assert finished(jobs) == names, place
            assert sorted(ended) == sorted(names)
    again = [attempt.job for attempt in ledger.attempts()]
    assert len(again) == len(set(again))


def test_a_slow_link_full_of_data_is_not_called_dead(node, ledger):
    """Results of 2 MB over 400 kB/s with a limit of 1 s: no pulse fits between them, and the
    connection is never made anew."""
    with Proxy(node.address) as proxy, cluster_of(proxy, pulse_interval=0.2) as cluster:
        cluster.wait_nodes(1, 20)
        proxy.rate = 400000
        jobs = submit(cluster, ledger, range(2), 0, 1 << 20)
        assert cluster.wait(60)
        assert finished(jobs) == [0, 1] and proxy.count == 1
        jobs = [cluster.submit(ledger.path, 'up', 0, os.urandom(1 << 20))]   # and the other way
        assert cluster.wait(60) and finished(jobs) == ['up'] and proxy.count == 1


def test_a_link_that_hangs_is_noticed_and_nothing_is_lost(node, ledger):
    """No byte passes, and no connection ends, for 3 s of a limit of 1 s; the same with nothing to
    do."""
    ended = []
    with Proxy(node.address) as proxy:
        with cluster_of(proxy, pulse_interval=0.2, reentrant=True,
                        job_status=lambda job: ended.append(job.id)) as cluster:
            jobs = submit(cluster, ledger, range(100), 0.01)
            eventually(lambda: len(ended) > 10)
            proxy.hold()
            eventually(lambda: [one.state for one in cluster.status().all_nodes] != ['ready'], 20)
            proxy.resume()
            assert cluster.wait(60)
            assert finished(jobs) == list(range(100)) and ledger.check(range(100), ended).clean
            proxy.hold()
            eventually(lambda: [one.state for one in cluster.status().all_nodes] != ['ready'], 20)
            proxy.resume()
            eventually(lambda: [one.state for one in cluster.status().all_nodes] == ['ready'], 30)
            one_more_each(cluster, ledger.path, 'more')


@pytest.mark.long
def test_a_client_that_does_not_read_holds_back_the_jobs_and_not_the_memory(node, ledger):
    """Results of 400 MB while the link crawls: what does not fit stays in the workers, and the
    daemon's memory is bounded."""
    import psutil
    process, most = psutil.Process(node.process.pid), []
    over = threading.Event()

    def watch():
        while not over.wait(0.02):
            most.append(process.memory_info().rss)
    with Proxy(node.address) as proxy, cluster_of(proxy) as cluster:
        cluster.wait_nodes(1, 20)
        before = process.memory_info().rss
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            proxy.rate = 1 << 20
            jobs = submit(cluster, ledger, range(100), 0, 4 << 20)
            time.sleep(5)
            started = len(ledger.attempts())
            proxy.rate = None
            assert cluster.wait(120)
        finally:
            over.set()
            watcher.join()
        assert finished(jobs) == list(range(100)) and started < 30
    assert max(most) - before < 128 << 20, (max(most) - before) >> 20
    assert {job.status for job in jobs} == {DispyJob.Finished}
