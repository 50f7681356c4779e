"""What other systems and versions of Python do differently; something stands in for each here."""

import _pyio
import concurrent.futures
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types

import psutil
import pytest

import dispy
import dispynode
from conftest import ROOT, eventually
from dispynode import Loop, StartError
from nodes import NodeProcess, SchedulerProcess

KINDS = ('DeprecationWarning', 'PendingDeprecationWarning')
MODULES = ('dispynode', 'dispy', 'dispyscheduler', 'dispy_httpd')


def run_python(*args, env=()):
    """What Python says and how it ends, at most 60 s later."""
    return subprocess.run([sys.executable, *args], env=dict(os.environ, **dict(env)), timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)


# -- deprecations are errors of a later Python -----------------------------------------------------

def test_nothing_that_is_deprecated_is_used(tmp_path):
    """All four modules, in processes where a DeprecationWarning in one of them is an error."""
    env = {'PYTHONWARNINGS': ','.join('error::%s:%s' % (kind, module) for module in MODULES
                                      for kind in KINDS)}
    program = tmp_path / 'program.py'
    program.write_text(textwrap.dedent('''
        import sys
        import dispy, dispy_httpd

        def square(n):
            return n * n

        if __name__ == '__main__':
            node, scheduler = map(int, sys.argv[1:])
            for cluster in (dispy.JobCluster(square, nodes='local'),
                            dispy.JobCluster(square, nodes=[('127.0.0.1', node)]),
                            dispy.SharedJobCluster(square, scheduler_port=scheduler)):
                with cluster, dispy_httpd.DispyHTTPServer(cluster, port=0):
                    jobs = [cluster.submit(n) for n in range(50)]
                    print(sum(job() for job in jobs))
                    cluster.print_status()
        '''))
    with NodeProcess(tmp_path / 'node', env=env) as node:
        options = ['-n', '127.0.0.1:%d' % node.port, '--httpd', '0']
        with SchedulerProcess(tmp_path / 'scheduler', *options, env=env) as scheduler:
            done = run_python(str(program), str(node.port), str(scheduler.port), env=env)
        assert scheduler.stop() == 0, scheduler.log()
    assert node.stop() == 0, node.log()
    assert (done.returncode, done.stdout.count('40425\n')) == (0, 3), done.stdout + done.stderr
    for said in (done.stderr, node.log(), scheduler.log()):
        assert 'Traceback' not in said and 'Deprecation' not in said


# -- no fork ---------------------------------------------------------------------------------------

NO_FORK = 'fork, which Windows does not have'


@pytest.fixture
def no_fork(monkeypatch):
    monkeypatch.delattr(os, 'fork', raising=False)


def test_without_fork_a_node_refuses_to_start():
    program = 'import os, sys; del os.fork; import dispynode; sys.exit(dispynode.main())'
    done = run_python('-c', program, '-i', '127.0.0.1', '-p', '0', '-c', '1')
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (1, '', 1)
    assert done.stderr.startswith('dispynode: ') and NO_FORK in done.stderr


@pytest.mark.parametrize('nodes, reach', [('local', 'loopback'), (None, 'off')])
def test_without_fork_no_cluster_has_a_node_of_its_own(no_fork, monkeypatch, nodes, reach):
    monkeypatch.setenv('DISPY_DISCOVERY', reach)
    with pytest.raises(StartError, match=NO_FORK):
        dispy.JobCluster(abs, nodes=nodes)


def test_without_fork_none_is_started_where_no_other_answers(no_fork):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:   # nobody answers at its port
        sock.bind(('127.0.0.1', 0))
        port = sock.getsockname()[1]
    with dispy.JobCluster(abs, dispy_port=port, loglevel=logging.CRITICAL) as cluster:
        with pytest.raises(dispy.NoNodes, match=NO_FORK):
            eventually(lambda: [node for node in cluster.status().all_nodes if 'fork' in node.reason])
            cluster.wait_nodes(1, 0.1)


def test_without_fork_clients_use_the_nodes_of_others(tmp_path, monkeypatch):
    with NodeProcess(tmp_path) as node:
        monkeypatch.delattr(os, 'fork', raising=False)
        with dispy.JobCluster(abs, nodes=[node.address]) as cluster:
            assert cluster.submit(-3)(20) == 3


# -- psutil raises what it likes -------------------------------------------------------------------

class Failing(types.ModuleType):
    """A psutil of which everything fails, except what is in `answers`."""

    def __init__(self, **answers):
        super().__init__('psutil')
        self.__dict__.update(answers)

    def __getattr__(self, name):
        raise RuntimeError('PdhAddEnglishCounterW failed. Performance counters may be disabled')


def test_what_psutil_can_tell_is_told_without_the_rest(monkeypatch, tmp_path):
    memory = types.SimpleNamespace(available=7)
    monkeypatch.setitem(sys.modules, 'psutil', Failing(virtual_memory=lambda: memory))
    found = dispynode.availability(str(tmp_path))
    assert found.pop('disk') > 0 and found == {'memory': 7, 'cpu': None, 'swap': None}
    assert dispynode.availability(str(tmp_path / 'removed'))['disk'] is None


def test_what_psutil_cannot_tell(monkeypatch):
    monkeypatch.setitem(sys.modules, 'psutil', Failing())
    monkeypatch.setattr(dispynode, '_own_addresses', {})   # those known from before are kept
    assert dispynode.own_addresses() == {}
    assert dispynode.own_host('127.0.0.1') == '127.0.0.1'
    monkeypatch.setattr(sys, 'platform', 'darwin')
    monkeypatch.setattr(dispynode, 'open', open_nothing, raising=False)
    assert dispynode.memory_of(os.getpid()) == 0


def test_the_start_of_a_process_where_there_is_no_proc(monkeypatch):
    monkeypatch.setattr(dispynode, 'open', open_nothing, raising=False)
    monkeypatch.setattr(os.path, 'isdir', lambda path: False)
    assert float(dispynode.start_of(os.getpid())) > 0
    assert dispynode.is_child(os.getpid(), os.getppid())
    monkeypatch.setitem(sys.modules, 'psutil', None)
    assert dispynode.start_of(os.getpid()) == ''
    assert not dispynode.is_child(os.getpid(), os.getppid())


def open_nothing(path, *args, **kwargs):
    raise FileNotFoundError(path)


@pytest.mark.parametrize('text', ["raise AttributeError('as by another file of that name')",
                                  "def __getattr__(name): raise RuntimeError(name)"])
def test_a_node_serves_whatever_psutil_does(tmp_path, text):
    (tmp_path / 'psutil.py').write_text(text)
    path = os.pathsep.join([str(tmp_path), os.environ['PYTHONPATH']])
    with NodeProcess(tmp_path / 'node', env={'PYTHONPATH': path}) as node:
        with dispy.JobCluster(abs, nodes=[node.address]) as cluster:
            assert cluster.submit(-3)(20) == 3
            assert cluster.status().nodes[0].avail_info.memory is None
    assert 'Traceback' not in node.log()


# -- options of sockets that the system does not know ----------------------------------------------

@pytest.fixture
def old_system(monkeypatch):
    """A system that knows no option which only makes a socket better."""
    known = (socket.SO_REUSEADDR, socket.SO_BROADCAST)

    def setsockopt(self, level, option, *value):
        if level == socket.IPPROTO_TCP or level == socket.SOL_SOCKET and option not in known:
            raise OSError(10042, 'an unknown, invalid, or unsupported option was specified')
        return super(socket.socket, self).setsockopt(level, option, *value)
    monkeypatch.setattr(socket.socket, 'setsockopt', setsockopt, raising=False)


def test_a_link_does_without_options_that_are_not_known(old_system, tmp_path):
    with NodeProcess(tmp_path) as node, dispy.JobCluster(abs, nodes=[node.address]) as cluster:
        assert cluster.submit(-3)(20) == 3


def test_a_daemon_does_without_options_that_are_not_known(old_system, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'platform', 'freebsd')   # where SO_REUSEPORT would be set
    loop = Loop()
    ears = dispynode.DiscoverySockets(loop, 'loopback', [1], [0], lambda *data: None)
    try:
        assert ears.ears and ears.error == ''
    finally:
        ears.close()
        loop.close()


# -- line ends -------------------------------------------------------------------------------------

def test_output_of_jobs_keeps_its_line_ends(monkeypatch, tmp_path):
    """Python's own `open` in Python, which asks for the system's line end when it writes."""
    monkeypatch.setattr(os, 'linesep', '\r\n')
    monkeypatch.setattr(dispynode, 'open', _pyio.open, raising=False)
    with open(str(tmp_path / 'output'), 'w+b') as file:
        stream = dispynode.output_stream(file.fileno(), 1)
        stream.write('one\ntwo\r\n')
        stream.close()
        file.seek(0)
        assert file.read() == b'one\ntwo\r\n'


# -- the lock of a directory -----------------------------------------------------------------------

class Msvcrt(types.ModuleType):
    """Windows' locks: of bytes, from where the file stands, until it is closed."""
    LK_NBLCK = 2

    def __init__(self):
        super().__init__('msvcrt')
        self.locked = {}

    def locking(self, number, mode, count):
        assert mode == self.LK_NBLCK
        status, at = os.fstat(number), os.lseek(number, 0, os.SEEK_CUR)
        for byte in range(at, at + count):
            if self.locked.setdefault((status.st_ino, byte), number) != number:
                raise PermissionError(13, 'Permission denied')


def test_the_lock_on_windows(monkeypatch, tmp_path):
    windows, path = Msvcrt(), str(tmp_path / 'lock')
    monkeypatch.setitem(sys.modules, 'msvcrt', windows)
    with monkeypatch.context() as patched:
        patched.setattr(os, 'name', 'nt')
        with dispynode.take_lock(path, 9701):
            for _ in range(2):   # with a text there, and after one that was refused
                with pytest.raises(StartError, match='PID %d, port 9701' % os.getpid()):
                    dispynode.take_lock(path, 9801)
            with open(path) as file:
                text = file.read()
    assert text == 'PID %d, port 9701\n' % os.getpid()
    # Others cannot read a byte that is locked.
    assert min(byte for _, byte in windows.locked) >= len(text)


# -- signals that do not end the wait --------------------------------------------------------------

# Another thread gets the signals of this process. So the main thread's system call is not
# interrupted: on Windows this is always so, elsewhere when a signal comes just before it.
DEAF = '''
import signal, sys, threading
sys.path.insert(0, {root!r})
import {module} as module
{more}
threading.Thread(target=threading.Event().wait, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
sys.exit(module.main())
'''
ALONE = {'DISPY_DISCOVERY': 'off'}   # a datagram of other programs would end the wait
needs_masks = pytest.mark.skipif(not hasattr(signal, 'pthread_sigmask'), reason='no masks here')


def idle(process):
    """Whether nothing runs in it: it has left the processor for good."""
    before = psutil.Process(process.pid).num_ctx_switches()
    time.sleep(0.2)
    return psutil.Process(process.pid).num_ctx_switches() == before


def deaf(tmp_path, module, more=''):
    path = tmp_path / 'deaf.py'
    path.write_text(DEAF.format(root=ROOT, module=module, more=more))
    return str(path)


@needs_masks
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_an_idle_node_is_seen(tmp_path, number):
    with NodeProcess(tmp_path, script=deaf(tmp_path, 'dispynode'), env=ALONE) as node:
        eventually(lambda: idle(node.process))
        node.process.send_signal(number)
        assert node.process.wait(20) == 0


@needs_masks
def test_a_signal_to_an_idle_scheduler_is_seen(tmp_path):
    # Otherwise it asks for nodes now and then.
    script = deaf(tmp_path, 'dispyscheduler', 'module.Scheduler.next_timer = lambda self: None')
    with SchedulerProcess(tmp_path, script=script, env=ALONE) as scheduler:
        eventually(lambda: idle(scheduler.process))
        scheduler.process.send_signal(signal.SIGTERM)
        assert scheduler.process.wait(20) == 0


@needs_masks
def test_a_signal_to_an_idle_monitor_is_seen(tmp_path):
    command = [sys.executable, deaf(tmp_path, 'dispy_httpd'), '--nodes', '127.0.0.1', '--port', '0']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert next(line for line in process.stdout if b'http://' in line)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_loop_leaves_no_descriptor_to_the_signals_behind():
    loop = Loop()
    loop.wake_on_signals()
    loop.close()
    assert signal.set_wakeup_fd(-1) == -1


# -- the end of an embedded node -------------------------------------------------------------------

def test_an_embedded_node_ends_by_a_signal_without_an_abort(tmp_path):
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'dispynode.py'), '--embedded', '-i', '127.0.0.1',
         '-p', '0', '--dest-path-prefix', str(tmp_path / 'node')],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        process.stdin.write(b'secret' * 8 + b'\n')
        process.stdin.flush()
        assert int(process.stdout.readline()) > 0
        process.send_signal(signal.SIGTERM)
        assert (process.wait(20), process.stderr.read()) == (0, b'')


# -- Ctrl-C where it does not end a wait -----------------------------------------------------------

@pytest.fixture
def waits(monkeypatch):
    """How long the main thread has waited at a stretch, where it may wait `slice` s."""
    found = []

    def noted(name, wait):
        def noting(self, *args, **kwargs):
            timeout = kwargs.get('timeout', args[-1] if args else None)
            if threading.current_thread() is threading.main_thread() and not starts_a_thread():
                found.append((name, timeout))
            return wait(self, *args, **kwargs)
        return noting

    class Queue(queue.Queue):
        """One whose waits are those of a Condition."""
    monkeypatch.setattr(dispy, 'FOREVER', 0.05)
    monkeypatch.setattr(threading.Condition, 'wait', noted('wait', threading.Condition.wait))
    monkeypatch.setattr(threading.Thread, 'join', noted('join', threading.Thread.join))
    monkeypatch.setattr(queue, 'SimpleQueue', Queue)
    yield found
    assert found and [each for each in found if each[1] is None or each[1] > 0.05 + 0.1] == []


def starts_a_thread():
    frame = sys._getframe(1)
    while frame is not None:
        if (frame.f_globals['__name__'], frame.f_code.co_name) == ('threading', 'start'):
            return True
        frame = frame.f_back
    return False


def nap(seconds):
    time.sleep(seconds)


@pytest.mark.parametrize('wait', [
    lambda cluster, job: job.wait(),
    lambda cluster, job: job.wait(20),
    lambda cluster, job: job(),
    lambda cluster, job: job(20),
    lambda cluster, job: cluster.wait(),
    lambda cluster, job: cluster.wait(20),
    lambda cluster, job: cluster.wait_nodes(1, 20),
    lambda cluster, job: list(cluster.as_completed([job])),
    lambda cluster, job: list(cluster.as_completed([job], 20)),
    lambda cluster, job: list(cluster.map([0.1])),
    lambda cluster, job: cluster.close(),
    lambda cluster, job: cluster.node_jobs(cluster.status().nodes[0].ip_addr, from_node=True),
    lambda cluster, job: cluster.send_file(__file__, cluster.status().nodes[0].ip_addr),
    lambda cluster, job: cluster.send_file(__file__, cluster.status().nodes[0].ip_addr, 20)])
def test_every_wait_is_cut_into_slices(waits, make_cluster, wait):
    with make_cluster(nap, nodes='local') as cluster:
        cluster.wait_nodes(1, 20)
        wait(cluster, cluster.submit(0.2))


def test_the_wait_of_a_recovery_is_cut_into_slices(waits, tmp_path):
    path = str(tmp_path / 'jobs')
    with NodeProcess(tmp_path / 'node') as node:
        program = '''
            import os, sys, time
            sys.path.insert(0, %r)
            import dispy
            cluster = dispy.JobCluster(time.sleep, nodes=[('127.0.0.1', %d)], recover_file=%r)
            job = cluster.submit(1)
            while job.status != job.Running:
                time.sleep(0.01)
            os._exit(0)
            ''' % (ROOT, node.port, path)
        assert subprocess.run([sys.executable, '-c', textwrap.dedent(program)]).returncode == 0
        job, = dispy.recover_jobs(path, 20)
        assert job.status == job.Finished


def test_the_command_line_waits_in_slices(waits, tmp_path, capfd):
    program = tmp_path / 'program'
    program.write_text('#!/bin/sh\nsleep 0.2\necho done\n')
    program.chmod(0o755)
    assert dispy.main(['-n', 'local', '-a', '1', '-a', '2', '--', str(program)]) == 0
    assert capfd.readouterr().out == 'done\ndone\n'


def test_what_a_wait_in_slices_returns():
    future, ended = concurrent.futures.Future(), queue.SimpleQueue()
    with pytest.raises(concurrent.futures.TimeoutError):
        dispy.answer_of(future, 0)
    future.set_exception(KeyError('it'))
    with pytest.raises(KeyError):
        dispy.answer_of(future, None)
    with pytest.raises(queue.Empty):
        dispy.next_of(ended, 0.01)
    ended.put(None)
    assert dispy.next_of(ended, 0) is None
