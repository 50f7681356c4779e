"""What a user can do with the nodes of a cluster while it runs."""

import functools
import os
import time

import pytest

import dispy
import dispynode
from conftest import KINDS, eventually
from dispy import DispyJob
from nodes import NodeProcess, SchedulerProcess
from scenes import Gate, hold, where


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """A callable that starts a node on loopback: (name, CPUs). With a secret of their own: other
    tests may run on this machine."""
    monkeypatch.setenv('DISPY_SECRET', os.urandom(32).hex())
    started = []

    def start(name='one', cpus=2, **options):
        started.append(NodeProcess(tmp_path / name, '--name', name, cpus=cpus, **options))
        return started[-1]
    yield start
    for node in started:
        node.stop()


@pytest.fixture(params=KINDS)
def make_cluster(request, nodes, tmp_path):
    """As that of all tests, with a scheduler that knows the secret of these nodes and finds them by
    itself."""
    if request.param == 'JobCluster':
        yield dispy.JobCluster
        return
    with SchedulerProcess(tmp_path / 'scheduler') as scheduler:
        yield functools.partial(dispy.SharedJobCluster, scheduler_port=scheduler.port)


class Holding(Gate):
    """A gate, and jobs of a cluster of `hold` that wait there."""

    def __init__(self, cluster, path, count, node=None):
        super().__init__(path)
        submit = functools.partial(cluster.submit_node, node) if node else cluster.submit
        self.jobs = [submit(self.path) for _ in range(count)]
        eventually(lambda: sum(job.status == DispyJob.Running for job in self.jobs) >= 1)


def states(cluster):
    return {node.name: node.state for node in cluster.status().all_nodes}


# -- deallocate, allocate --------------------------------------------------------------------------

def test_deallocate_and_allocate(make_cluster, nodes, tmp_path):
    one = nodes()
    with make_cluster(hold, nodes=[one.address]) as cluster:
        gate = Holding(cluster, tmp_path / 'gate', 1)
        assert cluster.deallocate_node('one') == 0
        later = cluster.submit(gate.path)
        node, = cluster.status().nodes
        assert (node.state, node.reason, node.cpus) == ('ready', 'deallocated', 0)
        gate.open()
        assert gate.jobs[0](20) == 'one'               # what runs goes on
        assert not later.wait(0.3) and later.status == DispyJob.Created
        assert cluster.allocate_node(one.address) == 0
        assert later(20) == 'one' and cluster.status().nodes[0].cpus == 2


def test_a_node_of_the_same_host_at_another_port_is_another_one(make_cluster, nodes):
    one, two = nodes('one'), nodes('two')
    with make_cluster(where, nodes=[one.address]) as cluster:
        cluster.wait_nodes(1, timeout=20)
        cluster.allocate_node(two.address)
        cluster.wait_nodes(2, timeout=20)
        assert ({cluster.submit_node(name)(20) for name in ('one', 'two', one.address, two.address)}
                == {'one', 'two'})
        assert cluster.submit_node(('two', two.port))(20) == 'two'
        with pytest.raises(ValueError, match='several nodes are'):
            cluster.submit_node('127.0.0.1')


def test_discover_nodes_takes_a_list(make_cluster, nodes):
    one, two, three = (nodes(name) for name in ('one', 'two', 'three'))
    with make_cluster(where, nodes=[one.address]) as cluster:
        assert cluster.discover_nodes([two.address,
                                       {'host': '127.0.0.1', 'port': three.port, 'cpus': 1}]) == 0
        cluster.wait_nodes(3, timeout=20)
        assert {node.name: node.cpus for node in cluster.status().nodes} == {'one': 2, 'two': 2,
                                                                             'three': 1}
        for wrong, error in (('', ValueError), (5, TypeError), (('a', 0), ValueError),
                             ([], ValueError)):
            with pytest.raises(error):
                cluster.discover_nodes(wrong)


@pytest.mark.skipif(os.name == 'nt', reason='datagrams of loopback alone')
def test_discover_nodes_by_a_wildcard(make_cluster, nodes):
    one = nodes('lab-one', cpus=1)
    two = nodes('lab-two', cpus=1)
    with make_cluster(where, nodes=[one.address]) as cluster:
        cluster.wait_nodes(1, timeout=20)
        cluster.discover_nodes('lab*')
        cluster.wait_nodes(2, timeout=20)
        assert states(cluster) == {'lab-one': 'ready', 'lab-two': 'ready'}
        assert two.port in [node.port for node in cluster.status().nodes]


# -- close -----------------------------------------------------------------------------------------


def hooks(path):
    """setup and cleanup that write to a file here: nodes are on this machine."""
    def setup():
        with open(path, 'a') as file:
            file.write('setup ')

    def cleanup():
        with open(path, 'a') as file:
            file.write('cleanup ')
    return {'setup': setup, 'cleanup': cleanup}


def read(path):
    return path.read_text().split() if path.exists() else []


@pytest.mark.fork('setup and cleanup run once in each worker: see test_start_method.py')
def test_close_node_waits_for_what_runs_and_cleans_up(make_cluster, nodes, tmp_path):
    one, log = nodes(), tmp_path / 'log'
    with make_cluster(hold, nodes=[one.address], **hooks(str(log))) as cluster:
        gate = Holding(cluster, tmp_path / 'gate', 2)
        eventually(lambda: len(cluster.node_jobs('one', from_node=True)) == 2)
        waiting = [cluster.submit(gate.path) for _ in range(6)]
        assert cluster.close_node(one.address) == 0
        eventually(lambda: states(cluster) == {'one': 'draining'})
        gate.open()
        assert [job(20) for job in gate.jobs] == ['one', 'one']
        eventually(lambda: states(cluster) == {'one': 'closed'})
        eventually(lambda: read(log) == ['setup', 'cleanup'])
        assert {job.status for job in waiting} <= {DispyJob.Created, DispyJob.Finished}
        cluster.allocate_node(one.address)
        assert [job(20) for job in waiting] == ['one'] * 6
        assert read(log)[:3] == ['setup', 'cleanup', 'setup']
    eventually(lambda: read(log) == ['setup', 'cleanup'] * 2)


@pytest.mark.fork('a worker that runs a job is killed, and runs no cleanup')
@pytest.mark.parametrize('reentrant', (False, True))
def test_close_node_at_once(make_cluster, nodes, tmp_path, reentrant):
    one, two, log = nodes('one', cpus=1), nodes('two', cpus=1), tmp_path / 'log'
    with make_cluster(hold, nodes=[one.address, two.address], reentrant=reentrant,
                      **hooks(str(log))) as cluster:
        cluster.wait_nodes(2, timeout=20)
        gate = Holding(cluster, tmp_path / 'gate', 2)
        eventually(lambda: all(job.status == DispyJob.Running for job in gate.jobs))
        there, = cluster.node_jobs('one')
        assert cluster.close_node('one', terminate_pending=True) == 0
        eventually(lambda: 'cleanup' in read(log))
        if reentrant:
            gate.open()
            assert [job(20) for job in gate.jobs] == ['two', 'two']
        else:
            assert (there.wait(20) and there.status == DispyJob.Abandoned
                    and 'closed by the program' in there.exception)
            gate.open()
            assert sorted(filter(None, [job(20) for job in gate.jobs])) == ['two']
        assert states(cluster) == {'one': 'closed', 'two': 'ready'}


def test_a_closed_node_is_free_for_others(make_cluster, nodes):
    one = nodes()
    with make_cluster(where, nodes=[one.address]) as cluster:
        cluster.wait_nodes(1, timeout=20)
        cluster.close_node('one')
        eventually(lambda: 'free' in one.log())
        cluster.close_node('one')      # once more does nothing
        assert states(cluster) == {'one': 'closed'}


# -- set up anew -----------------------------------------------------------------------------------

def content(name='data.txt'):
    with open(name) as file:
        return file.read()


@pytest.mark.parametrize('at_once', (False, True))
def test_resetup_node_brings_files_as_they_are_now(make_cluster, nodes, tmp_path, monkeypatch,
                                                   at_once):
    monkeypatch.chdir(tmp_path)
    one, log = nodes(), tmp_path / 'log'
    (tmp_path / 'data.txt').write_text('old')
    with make_cluster(content, nodes=[one.address], depends=['data.txt'],
                      **hooks(str(log))) as cluster:
        assert cluster.submit()(20) == 'old'
        (tmp_path / 'data.txt').write_text('new and longer')
        assert cluster.submit()(20) == 'old'
        assert cluster.resetup_node('one', terminate_pending=at_once) == 0
        eventually(lambda: read(log) == ['setup', 'cleanup', 'setup'])
        assert cluster.submit()(20) == 'new and longer'
        (tmp_path / 'data.txt').unlink()
        with pytest.raises(OSError):
            cluster.resetup_node('one')
        assert cluster.submit()(20) == 'new and longer'
    eventually(lambda: read(log) == ['setup', 'cleanup'] * 2)


def test_resetup_node_lets_what_runs_end(make_cluster, nodes, tmp_path):
    one, log = nodes(), tmp_path / 'log'
    with make_cluster(hold, nodes=[one.address], **hooks(str(log))) as cluster:
        gate = Holding(cluster, tmp_path / 'gate', 2)
        cluster.resetup_node('one')
        later = cluster.submit(gate.path)
        gate.open()
        assert [job(20) for job in [*gate.jobs, later]] == ['one'] * 3
        eventually(lambda: read(log) == ['setup', 'cleanup', 'setup'])


# -- CPUs ------------------------------------------------------------------------------------------

def test_set_node_cpus_limits_what_runs_at_once(make_cluster, nodes, tmp_path):
    one = nodes(cpus=4)
    with make_cluster(hold, nodes=[one.address]) as cluster:
        cluster.wait_nodes(1, timeout=20)
        assert cluster.set_node_cpus('one', 1) == 1
        gate = Holding(cluster, tmp_path / 'gate', 6)
        time.sleep(0.3)    # more would have begun by now
        assert len(cluster.node_jobs('one', from_node=True)) == 1
        assert cluster.set_node_cpus('one', 3) == 3
        eventually(lambda: len(cluster.node_jobs('one', from_node=True)) == 3)
        assert (cluster.set_node_cpus('one', -1) == 3 and cluster.set_node_cpus('one', -9) == 0
                and cluster.set_node_cpus('one', 0) == 0)
        for wrong, error in ((5, ValueError), ('2', TypeError), (True, TypeError),
                             (1.5, TypeError)):
            with pytest.raises(error):
                cluster.set_node_cpus('one', wrong)
        assert cluster.set_node_cpus('one', 4) == 4
        gate.open()
        assert [job(20) for job in gate.jobs] == ['one'] * 6


# -- jobs, files -----------------------------------------------------------------------------------

def test_node_jobs(make_cluster, nodes, tmp_path):
    one, two = nodes('one', cpus=1), nodes('two', cpus=1)
    with make_cluster(hold, nodes=[one.address, two.address]) as cluster:
        cluster.wait_nodes(2, timeout=20)
        gate = Holding(cluster, tmp_path / 'gate', 2, node='one')
        assert set(cluster.node_jobs('one')) <= set(gate.jobs) and cluster.node_jobs('two') == []
        assert (cluster.node_jobs('one', from_node=True) == gate.jobs[:1]
                and cluster.node_jobs('two', from_node=True) == [])
        gate.open()
        assert [job(20) for job in gate.jobs] == ['one', 'one']
        eventually(lambda: cluster.node_jobs('one') == [])


def test_send_file(make_cluster, nodes, tmp_path):
    one = nodes()
    path = tmp_path / 'data.txt'
    path.write_text('first')
    with make_cluster(content, nodes=[one.address]) as cluster:
        cluster.wait_nodes(1, timeout=20)
        assert cluster.send_file(str(path), 'one', timeout=20) == 0
        assert cluster.submit()(20) == 'first'
        path.write_text('the second, longer')
        assert cluster.send_file(path, 'one') == 0
        assert cluster.submit()(20) == 'the second, longer'
        path.write_text('')
        assert cluster.send_file(path, 'one') == 0 and cluster.submit()(20) == ''
        large = tmp_path / 'large'
        large.write_bytes(b'0123456789abcdef' * 250000)     # 4 MB: several pieces
        assert cluster.send_file(str(large), 'one', timeout=20) == 0
        assert cluster.submit('large')(20) == '0123456789abcdef' * 250000
        with pytest.raises(OSError):
            cluster.send_file(str(tmp_path / 'absent'), 'one')
        cluster.close_node('one')
        with pytest.raises(RuntimeError, match='not ready: closed by the program'):
            cluster.send_file(str(path), 'one')


def test_a_file_that_cannot_be_read_on_while_it_is_sent(make_cluster, nodes, tmp_path, monkeypatch):
    """It is an error of `send_file` alone; the next one comes whole."""
    one = nodes()
    path = tmp_path / 'data.txt'
    path.write_bytes(b'0123456789abcdef' * 250000)
    read_pieces = dispynode.read_pieces

    def failing(source, size):
        yield next(read_pieces(source, size))
        raise OSError(5, 'Input/output error')
    with make_cluster(content, nodes=[one.address]) as cluster:
        cluster.wait_nodes(1, timeout=20)
        monkeypatch.setattr(dispynode, 'read_pieces', failing)
        with pytest.raises(OSError, match='cannot be read.*Input/output error'):
            cluster.send_file(str(path), 'one', timeout=20)
        monkeypatch.setattr(dispynode, 'read_pieces', read_pieces)
        assert cluster.send_file(str(path), 'one', timeout=20) == 0
        assert cluster.submit()(20) == '0123456789abcdef' * 250000


def test_a_node_that_is_not_there(make_cluster, nodes, tmp_path):
    one = nodes()
    path = tmp_path / 'file'
    path.write_text('')
    with make_cluster(where, nodes=[one.address]) as cluster:
        cluster.wait_nodes(1, timeout=20)
        for call in (cluster.deallocate_node, cluster.close_node, cluster.resetup_node,
                     cluster.node_jobs, lambda node: cluster.set_node_cpus(node, 1),
                     lambda node: cluster.send_file(str(path), node)):
            with pytest.raises(ValueError, match="no node is 'nobody'; this cluster knows one"):
                call('nobody')
        node, = cluster.status().nodes
        # A DispyNode means a node, too
        assert cluster.deallocate_node(node) == 0 and cluster.allocate_node(node) == 0
        assert cluster.submit_node(node)(20) == 'one'


def test_what_was_done_to_a_node_holds_when_it_is_back(make_cluster, nodes, tmp_path):
    """One that is restarted: closed is closed, its limit is its limit."""
    one, two = nodes('one'), nodes('two', cpus=4)
    with make_cluster(where, nodes=[one.address, two.address], ping_interval=0.5) as cluster:
        cluster.wait_nodes(2, timeout=20)
        cluster.close_node('one')
        cluster.set_node_cpus('two', 1)
        ports = one.port, two.port
        for node in (one, two):
            node.kill()
        eventually(lambda: states(cluster)['two'] != 'ready')
        nodes('one', port=ports[0])
        nodes('two', cpus=4, port=ports[1])
        eventually(lambda: states(cluster) == {'one': 'closed', 'two': 'ready'})
        assert ({node.name: node.cpus for node in cluster.status().nodes if node.state == 'ready'}
                == {'two': 1})


# -- NodeAllocate ----------------------------------------------------------------------------------

class Some(dispy.NodeAllocate):
    """So many CPUs, and how often it was asked."""

    def __init__(self, address, count):
        super().__init__(*address)
        self.count, self.asked = count, []

    def allocate(self, cluster, ip_addr, name, cpus, avail_info=None, platform=''):
        self.asked.append((ip_addr, name, cpus, bool(platform)))
        return self.count


def test_two_clusters_allocate_one_node_differently(make_cluster, nodes, tmp_path):
    one = nodes(cpus=4)
    few, more, none = Some(one.address, 1), Some(one.address, 3), Some(one.address, 0)
    with make_cluster(hold, nodes=[few]) as first, make_cluster(hold, nodes=[more]) as second, \
            make_cluster(hold, nodes=none) as third:
        gates = Holding(second, tmp_path / 'second', 5), Holding(first, tmp_path / 'first', 4)
        eventually(lambda: [len(cluster.node_jobs('one', from_node=True))
                            for cluster in (first, second)] == [1, 3])
        row, = eventually(lambda: [node
                                   for node in third.status().all_nodes if node.state == 'refused'])
        assert row.reason == 'allocate() returned 0'
        for gate in gates:
            gate.open()
    assert ([allocator.asked for allocator in (few, more, none)]
            == [[('127.0.0.1', 'one', 4, True)]] * 3)


def test_an_allocator_that_fails(make_cluster, nodes):
    one = nodes()

    class Broken(dispy.NodeAllocate):
        def allocate(self, cluster, ip_addr, name, cpus, avail_info=None, platform=''):
            raise LookupError('no such table')

    with make_cluster(where, nodes=[Broken(*one.address)]) as cluster:
        with pytest.raises(dispy.NoNodes, match='no such table'):
            cluster.wait_nodes(1, timeout=1)


def test_an_allocator_with_a_wildcard(make_cluster, nodes):
    one = nodes('lab-one', cpus=4)
    chosen = Some(('lab-*', 9701), 2)
    with make_cluster(where, nodes=[chosen]) as cluster:
        cluster.wait_nodes(1, timeout=20)
        assert (cluster.status().nodes[0].cpus == 2
                and chosen.asked == [('127.0.0.1', 'lab-one', 4, True)])
    assert one.port
