"""Workers that are started anew (`spawn`) and load the computation themselves, beside those that
are forked."""

import glob
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time

import psutil
import pytest

import dispy
import dispynode
from conftest import ROOT, eventually, lives
from nodes import NodeProcess
from talk_node import Talk, fed, only, said


@pytest.fixture
def spawned(make_cluster):
    """make_cluster on a node of this machine, with workers that are started anew."""
    def make(computation, nodes='local', **options):
        return make_cluster(computation, nodes=nodes, start_method='spawn', **options)
    return make


def refusal(cluster, *parts):
    """Wait until the node is refused with all of these in the text."""
    def found():
        return [node.reason for node in cluster.status().all_nodes
                if all(part in node.reason for part in parts)]
    return eventually(found, 60, what='refusal with %r; it is now: %s' % (
        parts, [node.reason for node in cluster.status().all_nodes]))


def notes_in(path):
    try:
        with open(path) as file:
            return [tuple(line.split()) for line in file]
    except FileNotFoundError:
        return []


# -- which one -------------------------------------------------------------------------------------

@pytest.mark.parametrize('platform, forks, given, expected', [
    ('linux', True, '', 'fork'), ('darwin', True, '', 'spawn'), ('win32', False, '', 'spawn'),
    ('linux', True, 'spawn', 'spawn'), ('darwin', True, 'fork', 'fork')])
def test_the_method_of_a_system(monkeypatch, platform, forks, given, expected):
    monkeypatch.setattr(sys, 'platform', platform)
    monkeypatch.setenv('DISPY_START_METHOD', given)
    if not forks:
        monkeypatch.delattr(os, 'fork')
    assert dispynode.default_start_method() == expected


def test_a_method_that_there_is_not(monkeypatch):
    with pytest.raises(ValueError,
                       match="start_method='forkserver' must be 'fork', 'spawn' or None"):
        dispy.JobCluster(abs, nodes='local', start_method='forkserver')
    monkeypatch.setenv('DISPY_START_METHOD', 'thread')
    with pytest.raises(dispynode.StartError,
                       match='DISPY_START_METHOD=thread .* must be fork or spawn'):
        dispynode.default_start_method()
    command = [sys.executable, '-c', 'import dispynode, sys; sys.exit(dispynode.main())',
               '--start-method', 'thread']
    done = subprocess.run(command, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 2 and '--start-method' in done.stderr


def test_the_program_says_it_or_else_the_node(tmp_path, monkeypatch):
    """Guards against: the node's default counted more than what the program wants."""
    monkeypatch.delenv('DISPY_START_METHOD', raising=False)
    path = str(tmp_path / 'setups')

    def setup():
        with open(path, 'a') as file:
            file.write('%d\n' % os.getpid())

    def compute(n):
        return os.getpid()
    seen = {}
    with NodeProcess(tmp_path / 'node', '--start-method', 'spawn') as node:
        for method in (None, 'fork'):
            with dispy.JobCluster(compute, nodes=[node.address], setup=setup,
                                  start_method=method) as cluster:
                worker = cluster.submit(0).get(30)
            seen[method] = [int(pid) == worker for pid, in notes_in(path)]
            os.remove(path)
    assert any(seen[None]) and seen['fork'] == [False]


def test_an_executor_takes_it_from_its_context():
    for context in (multiprocessing.get_context('spawn'), 'spawn', 'forkserver'):
        with dispy.DispyExecutor(mp_context=context, nodes=[('127.0.0.1', 9)]) as executor:
            assert dispy.core_of(executor.cluster).packed.spec['start_method'] == 'spawn'


# -- setup and cleanup -----------------------------------------------------------------------------

class Ending:
    """A worker for its runner, and the end of its connection: what it is told."""

    def __init__(self, slots):
        self.slots, self.is_up, self.told = slots, True, []
        self.line = self.process = self

    def tell(self, kind):
        self.told.append(kind)

    def join(self, seconds):
        self.told.append('waited for')


def test_a_worker_that_has_just_sent_its_result_runs_cleanup():
    """It notes a moment later that its job has ended; that one runs until the end is another
    thing."""
    class Workers(dispynode.SpawnedWorkers):
        def __init__(self, children):
            self._children, self.killed = children, []

        def _kill(self, child):
            self.killed.append(child)

        def reap(self):
            pass
    idle, ended, busy = Ending([0]), Ending([65537]), Ending([65538])
    timer = threading.Timer(0.05, ended.slots.__setitem__, (0, 0))
    timer.start()
    workers = Workers({1: idle, 2: ended, 3: busy})
    workers._end_in_order()
    timer.join()
    close = dispynode.RecordType.CLOSE
    assert idle.told == ended.told == [close, 'waited for'] and workers.killed == [busy]


def test_setup_and_cleanup_run_in_each_worker_and_nothing_in_the_runner(spawned, tmp_path,
                                                                        monkeypatch):
    module = tmp_path / 'noted_import.py'
    module.write_text('import os\nwith open(%r, "a") as file:\n'
                      '    file.write("import %%d\\n" %% os.getpid())\n' % str(tmp_path / 'notes'))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, 'noted_import', None)
    del sys.modules['noted_import']
    import noted_import
    os.remove(str(tmp_path / 'notes'))   # what is in it is this process
    path = str(tmp_path / 'notes')

    def note(what):
        with open(path, 'a') as file:
            file.write('%s %d\n' % (what, os.getpid()))

    def setup():
        global of_worker
        of_worker = os.getpid()
        print('not of a job')
        note('setup')

    def cleanup():
        assert of_worker == os.getpid()
        note('cleanup')

    def compute(seconds):
        noted_import.os.getpid()
        time.sleep(seconds)
        return os.getpid(), of_worker, os.getppid()
    with spawned(compute, setup=setup, cleanup=cleanup) as cluster:
        jobs = [cluster.submit(0.3) for _ in range(6)]
        seen = [job.get(60) for job in jobs]
        assert [job.stdout for job in jobs] == [''] * 6
    workers = {pid for pid, _, _ in seen}
    runner, = {parent for _, _, parent in seen}
    assert all(pid == of_worker for pid, of_worker, _ in seen)
    eventually(lambda: not lives(runner), what='end of the runner')
    notes = notes_in(path)
    for what in ('import', 'setup'):
        pids = [int(pid) for kind, pid in notes if kind == what]
        assert workers <= set(pids) and len(pids) == len(set(pids)) and runner not in pids
    cleaned = [int(pid) for kind, pid in notes if kind == 'cleanup']
    assert workers <= set(cleaned) and len(cleaned) == len(set(cleaned))


def refuse():
    return 'no licence'


def fail():
    print('about to fail', file=sys.stderr)
    raise LookupError('nothing there')


def leave():
    print('the last words', file=sys.stderr, flush=True)
    os._exit(3)


@pytest.mark.parametrize('setup, texts', [
    (refuse, ["setup returned 'no licence'"]),
    (fail, ['LookupError: nothing there', 'in fail', 'about to fail']),
    (leave, ['ended with exit code 3', 'the last words'])])
def test_a_setup_that_fails_refuses_the_node(spawned, setup, texts):
    with spawned(abs, setup=setup) as cluster:
        refusal(cluster, *texts)


def test_a_setup_that_fails_in_a_later_worker(spawned, tmp_path):
    """Jobs go on in the worker that there is; when that is gone and no other can be had, the node
    is refused."""
    path = str(tmp_path / 'first')

    def setup():
        if os.path.exists(path):
            raise LookupError('only one may')
        open(path, 'w').close()

    def compute(die):
        if die:
            os._exit(1)
        time.sleep(0.1)
        return os.getpid()
    with spawned(compute, setup=setup) as cluster:
        assert len({cluster.submit(False).get(60) for _ in range(3)}) == 1
        assert cluster.submit(True)(60) is None
        cluster.submit(False)

        refusal(cluster, 'LookupError: only one may', 'while they load')
        cluster.close(terminate=True)


def test_what_setup_has_started_does_not_cost_the_worker_its_life(spawned):
    """Guards against: each job ended with a child there, and its worker was replaced, with another
    setup."""
    def setup():
        global child
        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])

    def compute(leaves):
        if leaves:
            subprocess.Popen(['sleep', '1000'])
        return os.getpid(), child.pid, child.poll()
    with spawned(compute, setup=setup) as cluster:
        seen = {cluster.submit(False).get(60) for _ in range(5)}
        assert len({pid for pid, _, _ in seen}) < 5 and all(status is None for _, _, status in seen)
        # What a job has left is still the end of its worker
        worker, *_ = cluster.submit(True).get(60)
        eventually(lambda: not lives(worker))
        assert cluster.submit(False).get(60)[0] != worker
    eventually(lambda: not any(lives(pid) for _, pid, _ in seen),
               what='end of what setup has started')


# -- what only forked processes share --------------------------------------------------------------

def make_value():
    global shared
    shared = multiprocessing.Value('i', 0)


def make_lock():
    global shared
    shared = {'lock': multiprocessing.Lock()}


def make_queue():
    global shared
    shared = multiprocessing.Queue()


def make_pipe():
    global shared
    shared = multiprocessing.Pipe()


def make_array():
    global shared
    shared = multiprocessing.RawArray('d', 10)


def make_manager():
    global shared
    manager = multiprocessing.get_context('fork').Manager()
    shared = manager.dict()
    shared['manager'] = manager.address


@pytest.mark.parametrize('setup, kind', [(make_value, 'Synchronized'), (make_lock, 'Lock'),
                                         (make_queue, 'Queue'), (make_pipe, 'Connection'),
                                         (make_array, 'shared array'), (make_manager, 'manager')])
def test_shared_variables_of_setup_are_refused(setup, kind):
    """Guards against: each worker had a variable of its own, and results were wrong without a
    word."""
    def compute():
        return shared is not None
    with dispy.JobCluster(compute, nodes='local', setup=setup, start_method='spawn') as cluster:
        refusal(cluster, 'the global variable shared', kind, "start_method='fork'")


def test_what_is_not_shared_is_not_refused():
    import queue
    import threading
    plain = {'lock': threading.Lock(), 'queue': queue.Queue(), 'module': multiprocessing,
             'kind': multiprocessing.Value, 'event': threading.Event(), 'process': psutil.Process(),
             'rows': [[multiprocessing]], 'text': 'x'}
    dispynode.check_not_shared([plain])
    with pytest.raises(RuntimeError, match='variable flag is a Event of multiprocessing'):
        dispynode.check_not_shared([plain, {'flag': multiprocessing.Event()}])


# -- how workers end -------------------------------------------------------------------------------

def test_a_node_that_cannot_fork_says_so(monkeypatch):
    """The node's state alone: who wants what it cannot do is told the reason and the remedy."""
    monkeypatch.setattr(dispynode, 'can_fork', lambda: False)
    talk = Talk()
    talk.link()
    refused, = said(talk.compute(start_method='fork'), dispynode.Refused)
    assert (refused.code, "start_method='spawn'" in refused.text) == ('start_method', True)
    assert only(talk.compute(start_method='spawn'), dispynode.PrepareDirectory)


def test_jobs_wait_for_workers_that_load():
    """Guards against: a job stood behind a worker that took a second to start while another was
    idle."""
    talk = Talk(cpus=2)
    talk.ready(start_method='spawn')
    actions = talk.jobs(1, 2)
    workers = [action.worker for action in only(actions, dispynode.StartWorker)]
    assert len(workers) == 2 and not fed(actions)
    actions = talk.tell(dispynode.WorkerInitialized(workers[0], ''))
    assert [worker for worker, _ in fed(actions)] == workers[:1]
    actions = talk.results(workers[0], 1)
    assert [worker for worker, _ in fed(actions)] == workers[:1]


def test_all_is_gone_when_the_node_is_killed(tmp_path):
    def compute():
        return os.getpid(), os.getppid()
    with NodeProcess(tmp_path / 'node', '--start-method', 'spawn') as node:
        with dispy.JobCluster(compute, nodes=[node.address]) as cluster:
            pids = cluster.submit().get(60)
            node.kill()
            eventually(lambda: not any(map(lives, pids)), what='end of runner and worker')


def test_all_tests_that_mean_fork_are_listed():
    """With their reasons, in the README of the tests."""
    found = set()
    for directory in ('unit', 'system', 'faults'):
        for path in glob.glob(os.path.join(ROOT, 'tests', directory, 'test_*.py')):
            with open(path) as file:
                for name in re.findall(r'^@pytest\.mark\.fork\((?s:.*?)^def (\w+)', file.read(),
                                       re.MULTILINE):
                    found.add('%s::%s' % (os.path.basename(path), name))
    with open(os.path.join(ROOT, 'tests', 'README.md')) as file:
        text = file.read().partition('\n## Workers that are started anew')[2]
    section = text.partition('\n## ')[0]
    assert found and found == set(re.findall(r'^\| `(\S+)` \|', section, re.MULTILINE))
