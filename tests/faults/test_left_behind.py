"""A program that is gone holds no node, no process and no memory once what it may still collect has
ended."""

import contextlib
import gc
import hashlib
import os
import resource
import signal
import time
import weakref

import pytest

import dispy
from clients import Client, There, program
from conftest import eventually
from dispynode import Memory, ModuleStore, Outcome, AttemptHistory, ResultSpool
from ledger import Ledger, open_files
from nodes import NodeProcess, SchedulerProcess, runners_of
from proxy import Proxy
from scenes import fill


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / 'ledger')


def answer():
    return 42


@pytest.mark.parametrize('kept', [False, True])
def test_a_program_of_a_scheduler_that_was_killed_holds_no_node(tmp_path, ledger, kept):
    """Another cluster that wants the node has it soon; results that are kept are files, and are had
    by who comes back."""
    with NodeProcess(tmp_path / 'node', cpus=1) as node, \
            SchedulerProcess(tmp_path / 's', '-n', '127.0.0.1:%d' % node.port) as scheduler:
        with Client(program('SharedJobCluster', '''
cluster_ = make(KIND, recover_file=directory + '/file' if %r else None)
cluster_.submit(path, 'first')()
if %r:
    cluster_.submit(path, 'second', 1.0)
    while len(Ledger(path).attempts()) < 2:
        time.sleep(0.01)
print('ready', flush=True)
time.sleep(600)
''' % (kept, kept)), ledger.path, There(scheduler.address)) as client:
            client.kill()
        assert runners_of(node)
        eventually(lambda: not runners_of(node), 20, 'the end of the runner')
        with dispy.JobCluster(answer, nodes=[node.address]) as cluster:
            assert cluster.submit()(30) == 42
        if kept:
            found = dispy.recover_jobs(str(tmp_path / 'file'), timeout=20)
            assert sorted(job.result for job in found) == ['first', 'second']


def test_a_program_that_comes_back_has_its_nodes_again(tmp_path, ledger):
    """It was stopped for so long that they were let go."""
    with NodeProcess(tmp_path / 'node', cpus=1) as node, \
            SchedulerProcess(tmp_path / 's', '-n', '127.0.0.1:%d' % node.port) as scheduler:
        with Client(program('SharedJobCluster', '''
with make(KIND, pulse_interval=0.2, ping_interval=0.5) as cluster_:
    job = cluster_.submit(path, 'first', 3.0)
    while len(Ledger(path).attempts()) < 1:
        time.sleep(0.01)
    print('ready', flush=True)
    print(job())
    print(cluster_.submit(path, 'second')())
'''), ledger.path, There(scheduler.address)) as client:
            client.process.send_signal(signal.SIGSTOP)
            eventually(lambda: not runners_of(node), 30, 'the end of the runner')
            client.process.send_signal(signal.SIGCONT)
            assert ([line for line in client.rest().splitlines() if line in ('first', 'second')]
                    == ['first', 'second'])
    assert len(ledger.attempts()) == 2


class Large:
    """A result that can be seen to be gone."""

    def __init__(self):
        self.data = bytes(1000)


def large():
    return Large()


def test_the_last_result_of_a_cluster_is_not_kept_by_it(tmp_path):
    with NodeProcess(tmp_path / 'node', cpus=1) as node:
        with dispy.JobCluster(large, nodes=[node.address], depends=[Large]) as cluster:
            job = cluster.submit()
            watched = weakref.ref(job(30))
            del job
            eventually(lambda: gc.collect() is not None and watched() is None)


def test_results_that_a_program_had_noted_are_not_kept_by_nodes(tmp_path, ledger):
    """It noted them, and was killed before they were acknowledged; who collects them acknowledges
    them too."""
    with NodeProcess(tmp_path / 'node', cpus=1) as node:
        with Client('''
dispy.JobExchange.acknowledge = lambda self, peer: None
cluster_ = cluster(recover_file=directory + '/file')
for number in range(3):
    cluster_.submit(path, number)
cluster_.wait()
print('ready', flush=True)
time.sleep(600)
''', ledger.path, node) as client:
            client.kill()
        eventually(lambda: any(name.startswith('r-') for name in os.listdir(node.prefix)))
        assert (sorted(job.result for job in dispy.recover_jobs(str(tmp_path / 'file'), timeout=20))
                == [0, 1, 2])
        eventually(lambda: not any(name.startswith('r-') for name in os.listdir(node.prefix)))


def row(serial, data):
    return (serial, int(Outcome.RETURNED), 0.0, 1.0, data, b'', b'')


def test_a_node_leaves_no_file_of_what_it_could_not_write(tmp_path, small_disk):
    """The disk is full. What is left of a file that could not be made is removed at once: results
    that stay in memory are acknowledged later, and then nobody knows that there is a file."""
    shelf, before = (ResultSpool(os.path.join(small_disk, 'r-full')),
                     ResultSpool(os.path.join(small_disk, 'r-before')))
    store, memory = ModuleStore(os.path.join(small_disk, 'modules')), Memory(small_disk)
    before.append(b'a' * 16, [row(1, b'kept')])
    os.mkdir(os.path.join(small_disk, 'modules'))
    source = tmp_path / 'source.py'
    source.write_bytes(bytes(8192))
    there = sorted(os.listdir(small_disk))
    filler = fill(small_disk)
    # A page, so that something can be written
    os.truncate(filler, os.path.getsize(filler) // 4096 * 4096 - 4096)
    for full in (shelf, before):
        with pytest.raises(OSError):
            full.append(b'a' * 16, [row(2, b'fits'), row(3, bytes(100000))])
    store.keep(str(tmp_path), [('source.py', 8192, hashlib.sha256(bytes(8192)).digest(), 0o600)])
    memory.write('given-up', AttemptHistory(given_up=frozenset(range(100000))))
    os.unlink(filler)
    left = sorted(os.listdir(small_disk))
    assert ([name for name in left if name not in there] == []
            and os.listdir(os.path.join(small_disk, 'modules')) == [])
    assert [number for number, *_ in before.rows()] == [1]


def test_results_that_cannot_be_packed_leave_no_file(tmp_path):
    """Whatever the reason is, not a part of them is kept."""
    shelf = ResultSpool(str(tmp_path / 'r-c'))
    with pytest.raises(TypeError):
        shelf.append(b'a' * 16, [row(1, b'good'), row(2, None)])
    assert os.listdir(str(tmp_path)) == []


def slow_answer(path):
    import time
    with open(path, 'w'):
        time.sleep(1.0)
    return 42


def notes_of(comp):
    """Files by which others can know of a computation."""
    directory = dispy.state_directory()
    return [os.path.join(directory, name) for name in os.listdir(directory) if comp[:12] in name]


def results_on(node):
    """Files of results on a node."""
    return [name for name in os.listdir(node.prefix) if name.startswith('r-')]


@pytest.mark.parametrize('kind', ['JobCluster', 'SharedJobCluster'])
def test_a_node_that_was_away_when_a_cluster_closed_keeps_nothing(tmp_path, kind):
    """The process that used it lives on, and tells it when it is back."""
    begun = tmp_path / 'begun'
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(NodeProcess(tmp_path / 'node', cpus=2))
        proxy = stack.enter_context(Proxy(('127.0.0.1', node.port)))
        options = {'nodes': [proxy.address]}
        if kind == 'SharedJobCluster':
            scheduler = stack.enter_context(SchedulerProcess(tmp_path / 's', '-n',
                                                             '127.0.0.1:%d' % proxy.address[1]))
            options = {'scheduler_host': '127.0.0.1', 'scheduler_port': scheduler.port}
        make = getattr(dispy, kind)
        with make(answer, **options) as other:
            assert other.submit()(30) == 42
            cluster = make(slow_answer, **options)
            cluster.submit(str(begun))
            eventually(begun.exists, 20, 'the start of the job')
            proxy.refuse()
            proxy.cut()
            eventually(lambda: results_on(node), 20, 'the result on the disk')
            cluster.close(terminate=True)
            proxy.accept()
            assert other.submit()(60) == 42
            eventually(lambda: not results_on(node), 30, 'the end of the result')


@pytest.mark.parametrize('file', ['', 'file'])
def test_a_program_that_is_gone_told_nodes_later(tmp_path, file):
    """A node was away when its cluster closed, and the program has ended: who looks for what is
    left tells the node."""
    begun = tmp_path / 'begun'
    with NodeProcess(tmp_path / 'node', cpus=2) as node, Proxy(('127.0.0.1', node.port)) as proxy:
        cluster = dispy.JobCluster(slow_answer, nodes=[proxy.address],
                                   recover_file=str(tmp_path / file) if file else None)
        comp = dispy.core_of(cluster).comp
        cluster.submit(str(begun))
        eventually(begun.exists, 20, 'the start of the job')
        proxy.refuse()
        proxy.cut()
        eventually(lambda: results_on(node), 20, 'the result on the disk')
        cluster.close(terminate=True)
        assert notes_of(comp) and not os.path.exists(str(tmp_path / 'file'))
        proxy.accept()
        assert notes_of(comp)[0] not in [row.path for row in dispy.recoverable()]
        assert not notes_of(comp)
        eventually(lambda: not results_on(node), 30, 'the end of the result')


@pytest.mark.skipif(not hasattr(resource, 'prlimit'), reason='prlimit is of Linux')
def test_directories_that_cannot_be_removed_without_descriptors_are_removed_later(tmp_path):
    def directories():
        return [name for name in os.listdir(node.prefix) if name.startswith(('c-', 'p-'))
                and name != 'p-.modules']

    with NodeProcess(tmp_path / 'node', cpus=1) as node:
        pid = node.process.pid
        idle = len(open_files(pid))
        with dispy.JobCluster(answer, nodes=[node.address]) as cluster:
            assert cluster.submit()(30) == 42
            assert len(directories()) == 2
            limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            eventually(lambda: len(open_files(pid)) <= idle, 20, 'the end of runner and link')
            time.sleep(0.3)   # the node has tried to remove them, which nothing shows
            assert len(directories()) == 2, 'or nothing is shown'
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        eventually(lambda: not directories(), 20, 'the end of the directories')
