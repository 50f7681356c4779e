"""What workers and runners send is checked: odd records end whoever sent them, and nobody else."""

import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile

import psutil
import pytest

import dispy
import dispynode
from conftest import ROOT, eventually
from dispynode import (VALUE_MOST, RecordType, Outcome, PeerError, RecordBuffer, is_outcome,
                       pack_record)
from nodes import NodeProcess

INF, NAN = float('inf'), float('nan')
MEMO_BOMB = b'\x80\x05Nr\xff\xff\xff\x0f.'   # LONG_BINPUT: four gigabytes of memory for nine bytes


def send_raw(kind, number=0, serial=None, start=1.0, end=1.0, sizes=None, bodies=(b'', b'', b'')):
    """In a job: a record into the worker's pipe as no worker writes it; `serial` None: of this
    job."""
    import gc
    import time
    import dispynode
    worker, = [each for each in gc.get_objects() if isinstance(each, dispynode.Worker)]
    serial = worker._slots[0] if serial is None else serial
    head = dispynode._RECORD.pack(kind, 0, number, serial, start, end, *(sizes or map(len, bodies)))
    worker._pipe._sock.sendall(head + b''.join(bodies))
    time.sleep(60)


ODD_OF_WORKERS = {
    'outcome 99': (RecordType.RESULT, 99),
    'outcome of a node': (RecordType.RESULT, int(Outcome.CANCELLED)),
    'infinite times': (RecordType.RESULT, 1, None, 0.0, INF),
    'times that are no numbers': (RecordType.RESULT, 1, None, NAN, NAN),
    'times far apart': (RecordType.RESULT, 1, None, -1e308, 1e308),
    'backwards': (RecordType.RESULT, 1, None, 2.0, 1.0),
    'no value': (RecordType.RESULT, 1), 'an error without text': (
        RecordType.RESULT, int(Outcome.RAISED), None, 1.0, 1.0, None, (b'\0\0', b'', b'')),
    'an error with less text': (RecordType.RESULT, int(Outcome.RAISED), None, 1.0, 1.0, None,
                                (b'\0\0\0\7x', b'', b'')),
    'another job': (RecordType.RESULT, 1, 12345 << 16, 1.0, 1.0, None, (b'\x80\x05N.', b'', b'')),
    'jobs back, 3 bytes': (RecordType.JOBS_RETURNED, 0, 0, 0.0, 0.0, None, (b'abc', b'', b'')),
    'a log record that is none': (RecordType.LOGGED, 0, None, 0.0, 0.0, None, (b'abc', b'', b'')),
    'a log record of a list': (RecordType.LOGGED, 0, None, 0.0, 0.0, None,
                               (pickle.dumps([1]), b'', b'')),
    'a log record with a level of 2**40': (RecordType.LOGGED, 0, None, 0.0, 0.0, None,
                                           (pickle.dumps((1 << 40, 'a', 'b')), b'', b'')),
    'a log record of 3 MiB': (RecordType.LOGGED, 0, None, 0.0, 0.0, None,
                              (bytes(3 << 20), b'', b'')),
    'a file that is none': (RecordType.FILE, 0, None, 0.0, 0.0, None,
                            (pickle.dumps(('a', 'b')), b'x', b'')),
    'a piece of 3 MiB': (RecordType.FILE, 0, None, 0.0, 0.0, None,
                         (pickle.dumps(('a', 1, b'x', 0)), bytes(3 << 20), b'')),
    'a memo bomb': (RecordType.FILE, 0, None, 0.0, 0.0, None, (MEMO_BOMB, b'x', b'')),
    'a promise of 12 GiB': (RecordType.RESULT, 1, None, 1.0, 1.0, (0xffffffff,) * 3),
    'a kind that there is not': (77,), 'what runners send': (RecordType.WORKER_EXITED,)}


@pytest.fixture(scope='module')
def node(tmp_path_factory):
    # One for all: it must outlive every one of them. Not `with`: the fixture of the session counts
    # processes of each test.
    process = NodeProcess(tmp_path_factory.mktemp('node'))
    import conftest
    conftest._of_session.add(process.process.pid)
    yield process
    process.stop()
    conftest._of_session.discard(process.process.pid)


@pytest.mark.parametrize('odd', ODD_OF_WORKERS.values(), ids=list(ODD_OF_WORKERS))
def test_an_odd_record_ends_its_worker_alone(node, odd):
    def neighbour(path):
        import os
        import time
        while not os.path.exists(path):
            time.sleep(0.01)
        return 'fine'
    with tempfile.TemporaryDirectory() as directory:
        flag = os.path.join(directory, 'flag')
        with dispy.JobCluster(lambda function, *args: function(*args), nodes=[node.address],
                              loglevel=logging.CRITICAL) as cluster:
            other = cluster.submit(neighbour, flag)
            job = cluster.submit(send_raw, *odd)
            assert (job.wait(30) and job.status == job.Terminated
                    and 'sent nonsense' in job.exception), job.exception
            with open(flag, 'w'):
                pass
            assert other(30) == 'fine' and cluster.submit(pow, 2, 3)(30) == 8
    assert node.process.poll() is None
    assert psutil.Process(node.process.pid).memory_info().rss < 150 << 20


def runner_sends(kind, number=0, serial=0, start=0.0, end=0.0, bodies=(b'', b'', b'')):
    """In setup(): a record into the runner's pipe."""
    import gc
    import dispynode
    runner, = [each for each in gc.get_objects() if isinstance(each, dispynode.Runner)]
    runner._control.sendall(dispynode._RECORD.pack(kind, 0, number, serial, start, end,
                                                   *map(len, bodies)) + b''.join(bodies))


ODD_OF_RUNNERS = {
    'gone with no number': (RecordType.WORKER_EXITED, 1, 0, NAN),
    'gone with infinity': (RecordType.WORKER_EXITED, 1, 0, INF),
    'printed': (RecordType.PRINTED, 1, 0, NAN, NAN),
    'printed 3 MiB': (RecordType.PRINTED, 1, 0, 1.0, 0.0, (bytes(3 << 20), b'', b'')),
    'failed, 17 MiB': (RecordType.FAILED, 0, 0, 0.0, 0.0, (bytes(17 << 20), b'', b'')),
    'born 2**40': (RecordType.WORKER_STARTED, 1, 1 << 40),
    'born 0': (RecordType.WORKER_STARTED, 1, 0), 'a kind that there is not': (99,),
    'a result': (RecordType.RESULT, 1)}


@pytest.mark.parametrize('odd', ODD_OF_RUNNERS.values(), ids=list(ODD_OF_RUNNERS))
def test_an_odd_record_of_a_runner_ends_its_computation_alone(node, odd):
    def setup(function, odd):
        function(*odd)

    allocator = dispy.NodeAllocate(*node.address, setup_args=(runner_sends, odd))
    with dispy.JobCluster(pow, nodes=[allocator], setup=setup,
                          loglevel=logging.CRITICAL) as cluster:
        job = cluster.submit(2, 3)
        eventually(lambda: job.status == job.Finished
                   or any(each.state == 'refused' for each in cluster.status().all_nodes))
        cluster.close(terminate=True)
    with dispy.JobCluster(pow, nodes=[node.address], loglevel=logging.CRITICAL) as cluster:
        assert cluster.submit(2, 4)(30) == 16
    assert node.process.poll() is None


def test_numbers_of_processes_come_from_the_kernel(node):
    """A runner that calls another process its worker does not get it killed."""
    victim = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],
                              start_new_session=True)
    try:
        def setup(function, pid):
            import os
            for worker in range(1, 50):
                function(18, worker, pid)
            os._exit(1)
        allocator = dispy.NodeAllocate(*node.address, setup_args=(runner_sends, victim.pid))
        with dispy.JobCluster(pow, nodes=[allocator], setup=setup,
                              loglevel=logging.CRITICAL) as cluster:
            cluster.submit(2, 3)
            eventually(lambda: any(each.state == 'refused' for each in cluster.status().all_nodes))
            cluster.close(terminate=True)

        def compute(pid):
            """The same while a worker runs."""
            import os
            import signal
            os.kill(os.getppid(), signal.SIGKILL)
        with dispy.JobCluster(compute, nodes=[node.address], loglevel=logging.CRITICAL) as cluster:
            cluster.submit(victim.pid).wait(30)
            cluster.close(terminate=True)
        with dispy.JobCluster(pow, nodes=[node.address], loglevel=logging.CRITICAL) as cluster:
            assert cluster.submit(2, 4)(30) == 16
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='numbers are given anew by hand here')
def test_a_number_that_another_process_has_by_now_is_not_killed():
    run = dispynode.ComputationProcesses(dispynode.ComputationDirectory('c', '/', '/', True, 0))
    process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],
                               start_new_session=True)
    try:
        run.known(1, process.pid)
        right = run.pids[1]
        run.pids[1] = (process.pid, '1' + right[1])
        run.kill(1)
        assert process.poll() is None
        run.pids[1] = right
        run.kill(1)
        assert process.wait(10) == -signal.SIGKILL
        run.known(2, 0)
        run.known(3, 1)
        assert 2 not in run.pids and 3 not in run.pids
    finally:
        process.kill()
        process.wait()


def test_a_client_outlives_what_no_node_sends():
    payload = b'\x80\x05N.'
    assert is_outcome(1, 1.0, 2.0, payload, b'', b'')
    for row in ((1, -1e308, 1e308), (1, 0.0, NAN), (1, 0.0, INF), (1, 2.0, 1.0)):
        assert not is_outcome(*row, payload, b'', b'')
    assert (not is_outcome(Outcome.RAISED, 0.0, 0.0, b'', b'', b'')
            and not is_outcome(1, 0.0, 0.0, b'', b'', b''))
    for wrong in (dispynode.Output('c', 1, 9, 0, b'x'), dispynode.Output('c', 1, 1, -1, b'x'),
                  dispynode.Results('c', [(1, 3, 0.0, 0.0, b'', b'', b'')])):
        op, encoding, pieces = dispynode.encode(wrong)
        with pytest.raises(PeerError):
            dispynode.decode(op, encoding, b''.join(map(bytes, pieces)))


def test_a_record_may_not_be_larger_than_its_kind():
    intake = RecordBuffer(dispynode.FROM_WORKER)
    for kind, sizes in ((RecordType.LOGGED, (1 << 30, 0, 0)), (RecordType.JOBS_RETURNED, (8, 1, 0)),
                        (RecordType.RESULT, (VALUE_MOST + 1, 0, 0)), (RecordType.READY, (0, 0, 0))):
        with pytest.raises(PeerError):
            intake.measure(dispynode._RECORD.pack(kind, 0, 0, 0, 0.0, 0.0, *sizes))
    assert intake.measure(
        pack_record(RecordType.RESULT, 1, 1, 0.0, 0.0, b'abc')[0][:dispynode._RECORD.size]) == 3


# -- what jobs find of the daemon's ----------------------------------------------------------------

def look_for(word):
    """Places in which a job finds a word: its environment, its arguments, and those of all
    processes."""
    import os
    import sys
    found = [name for name in os.environ if word in os.environ[name]]
    if any(word in arg for arg in sys.argv):
        found.append('sys.argv')
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open('/proc/%s/environ' % pid, 'rb') as file:
                if word.encode() in file.read():
                    found.append(pid)
        except OSError:
            continue
    return found


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='there is no /proc')
@pytest.mark.parametrize('way', ['environment', 'option'])
def test_jobs_do_not_find_the_secret_of_their_daemon(tmp_path, monkeypatch, way):
    word = 'secret-of-this-test-%d' % os.getpid()
    monkeypatch.delenv('DISPY_SECRET')
    options, env = (['-s', word], {}) if way == 'option' else ([], {'DISPY_SECRET': word})
    with NodeProcess(tmp_path, *options, env=env) as node:
        with dispy.JobCluster(look_for, nodes=[node.address], secret=word) as cluster:
            found = cluster.submit(word)(30)
        if not os.getuid():   # root may read everything: what counts is that it is root's
            own = str(node.process.pid)
            assert own not in found or os.stat('/proc/%s/environ' % own).st_uid == 0
            found = [place for place in found if place != own]
        assert found == []


def test_a_setup_neither_reads_the_terminal_nor_has_it(tmp_path):
    pty = pytest.importorskip('pty')

    def setup():
        import os
        import sys
        try:
            terminal = os.open('/dev/tty', os.O_RDWR)
            os.close(terminal)
        except OSError:
            terminal = -1
        global seen
        seen = (os.read(0, 100), [os.isatty(n) for n in range(3)], terminal, sys.argv[1:])

    def compute():
        return seen   # noqa: F821
    ours, theirs = pty.openpty()
    log = open(tmp_path / 'log', 'wb')
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'dispynode.py'), '-i',
                                '127.0.0.1', '-p', '0', '--dest-path-prefix', str(tmp_path / 'n')],
                               stdin=theirs, stdout=theirs, stderr=log, start_new_session=True)
    try:
        os.close(theirs)
        os.write(ours, b'cpus 1\ntyped for the daemon')

        def port():
            for line in open(tmp_path / 'log'):
                if 'at port' in line:
                    return int(line.split('at port ')[1].split(',')[0])
        with dispy.JobCluster(compute, nodes=[('127.0.0.1', eventually(port))],
                              setup=setup) as cluster:
            assert cluster.submit()(30) == (b'', [False] * 3, -1, [])
    finally:
        process.terminate()
        process.wait(20)
        os.close(ours)
        log.close()


def test_jobs_of_a_user_get_little_of_roots_environment(monkeypatch):
    monkeypatch.setattr(os, 'environ', {'PATH': '/bin', 'LC_ALL': 'C', 'EXTRA_SECRET_OF_ROOT': 'x',
                                        'PYTHONPATH': '/p', 'AWS_SECRET': 'y'})
    dispynode.clear_environment()
    assert os.environ == {'PATH': '/bin', 'LC_ALL': 'C', 'PYTHONPATH': '/p'}
