"""What other systems and versions of Python do differently; something stands in for each here."""

import _pyio
import concurrent.futures
import errno
import os
import platform
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
import dispy_httpd
import dispynode
import dispyscheduler
from conftest import ROOT, eventually
from dispynode import Link, Loop, Role, Session, StartError
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

def test_without_fork_workers_are_started_anew(tmp_path):
    """Guards against: a node said that it needs fork, and did not start."""
    (tmp_path / 'sitecustomize.py').write_text('import os\ndel os.fork\n')
    path = os.pathsep.join([str(tmp_path), os.environ['PYTHONPATH']])
    with NodeProcess(tmp_path / 'node', env={'PYTHONPATH': path, 'DISPY_START_METHOD': ''}) as node:
        with dispy.JobCluster(hex, nodes=[node.address]) as cluster:
            assert cluster.submit(10)(60) == '0xa'
        with dispy.JobCluster(hex, nodes=[node.address], start_method='fork') as cluster:
            with pytest.raises(dispy.NoNodes, match='cannot be started with fork'):
                eventually(lambda: [one
                                    for one in cluster.status().all_nodes if 'fork' in one.reason])
                cluster.wait_nodes(1, 0.1)


def node_with(directory, setting):
    """A script that is dispynode with a setting of another system in its module."""
    path = directory / 'node_with.py'
    path.write_text('import sys\nsys.path.insert(0, %r)\nimport dispynode\ndispynode.%s\n'
                    'sys.exit(dispynode.main())\n' % (ROOT, setting))
    return str(path)


# -- Windows and macOS, as far as another system can pretend ---------------------------------------

@pytest.mark.parametrize('name', ['NUL', 'nul.txt', 'data/con', 'COM1', 'lpt9.log', 'aux .c', 'a.',
                                  'a ', 'a/b./c', 'a?b', 'a*', 'a|b', '<a>', 'a"b'])
def test_names_that_mean_something_else_on_windows(monkeypatch, name):
    assert dispynode.check_name(name)
    monkeypatch.setattr(dispynode, 'IS_WINDOWS', True)
    with pytest.raises(ValueError, match='Windows'):
        dispynode.check_name(name)
    assert dispynode.check_name('nullable/com10.txt') == ('nullable', 'com10.txt')


@pytest.mark.parametrize('names', [('A', 'a'), ('dir/File.txt', 'DIR/file.txt'),
                                   ('caf\u00e9', 'cafe\u0301')])
def test_names_that_are_one_file(monkeypatch, tmp_path, names):
    """Guards against: the second of two files overwrote the first without a word."""
    rows = [(name, 1, bytes(dispynode.DIGEST_SIZE), 0o600) for name in names]
    receiver = dispynode.FileReceiver({dispynode.Purpose.DEPENDS: str(tmp_path)})
    assert len(receiver.want(dispynode.Purpose.DEPENDS, rows)) == 2
    monkeypatch.setattr(dispynode, 'NAMES_ARE_FOLDED', True)
    with pytest.raises(ValueError, match='would be one file'):
        receiver.want(dispynode.Purpose.DEPENDS, rows)
    assert len(receiver.want(dispynode.Purpose.DEPENDS, rows[:1])) == 1


def test_a_phrase_without_scrypt(monkeypatch):
    monkeypatch.delattr(dispynode.hashlib, 'scrypt')
    assert len(dispynode.derive_key(b'5eed' * 16)) == 32   # one that was made needs none
    with pytest.raises(dispy.SecretError, match='has no scrypt'):
        dispynode.derive_key(b'a phrase for which there is no key yet')


def test_more_connections_than_select_can_wait_for(monkeypatch):
    """The last is refused with the reason, and the loop goes on. Guards against: it ended at its
    next turn."""
    monkeypatch.setattr(dispynode.selectors, 'DefaultSelector', dispynode.selectors.SelectSelector)
    monkeypatch.setattr(dispynode, 'SELECT_MOST', 2)   # of which the loop itself has one
    ended = []

    class Bounded(Loop):
        def on_broken(self, channel, text):
            ended.append((channel, text))
            self.detach(channel)
    loop = Bounded()
    pairs = [socket.socketpair() for _ in range(3)]
    try:
        session = Session(b'k' * 32, b'k' * 32, bytes(16), Role.CLIENT)
        links = [Link(ours, session, 'here', loop.clock()) for ours, _ in pairs]
        for link in links:
            loop.attach(link)
        loop.turn(0)
        assert [link for link, _ in ended] == links[1:] and all('more than 2 connections' in text
                                                                for _, text in ended)
        assert loop.links == {links[0].number: links[0]}
    finally:
        loop.close()
        for _, theirs in pairs:
            theirs.close()


def test_a_pipe_stays_open_here_until_it_has_arrived(monkeypatch, tmp_path):
    """macOS: who closes it at once may leave the receiver with a dead socket."""
    monkeypatch.setenv('DISPY_START_METHOD', 'fork')
    (tmp_path / 'sitecustomize.py').write_text('import dispynode\ndispynode.LATE_PASSING = True\n')
    path = os.pathsep.join([str(tmp_path), os.environ['PYTHONPATH']])   # for runner and workers
    script = node_with(tmp_path, 'LATE_PASSING = True')
    for method in ('fork', 'spawn'):
        with NodeProcess(tmp_path / method, '--start-method', method, script=script,
                         env={'PYTHONPATH': path}) as node:
            def sockets(pid):
                return sum(item.type == socket.SOCK_STREAM
                           for item in psutil.Process(pid).net_connections('unix'))
            with dispy.JobCluster(os.getppid, nodes=[node.address]) as cluster:
                runner = cluster.submit()(60)
                before = sockets(node.process.pid), sockets(runner)
                assert cluster.wait()
                cluster.submit()(60)
                assert (sockets(node.process.pid), sockets(runner)) == before


@pytest.mark.parametrize('number', [errno.EMSGSIZE, errno.ENOBUFS, errno.ETOOMANYREFS])
def test_a_pipe_for_which_there_is_no_room_is_passed_later(number):
    """Guards against: the runner was given up."""
    class Full(socket.socket):
        is_full = True

        def sendmsg(self, *args):
            if self.is_full:
                raise OSError(number, os.strerror(number))
            return super().sendmsg(*args)
    ours, theirs = socket.socketpair()
    full = Full(fileno=ours.detach())
    passing = socket.socket()
    with full, theirs:
        pipe = dispynode.Pipe(full, 'c')
        pipe.push([b'record'], passing)
        pipe.write()
        assert pipe.wants_write and passing.fileno() >= 0
        full.is_full = False
        pipe.write()
        assert not pipe.wants_write and passing.fileno() < 0 and theirs.recv(100) == b'record'


def test_a_node_is_found_where_loopback_has_no_broadcast(monkeypatch, tmp_path):
    """macOS and Windows: guards against an ear at an address that is not there."""
    script = node_with(tmp_path, 'LOOPBACK = "127.0.0.1"')
    monkeypatch.setattr(dispynode, 'LOOPBACK', '127.0.0.1')
    with NodeProcess(tmp_path / 'node', script=script) as node:
        with dispy.JobCluster(os.getppid) as cluster:
            runner = cluster.submit()(60)
            assert psutil.Process(runner).ppid() == node.process.pid


@pytest.mark.parametrize('text, path, expected', [
    ('#!/usr/bin/env python3\n', 'a.sh', [sys.executable]),
    ('#!/usr/bin/python3.11 -u\n', 'a', [sys.executable, '-u']),
    ('#!/usr/bin/env -S no-such-shell -e\n', 'a', ['no-such-shell', '-e']),
    ('print()\n', 'a.PY', [sys.executable]),
    ('MZ', 'a.exe', []), ('echo', 'a.bat', []), ('#!\n', 'a', [])])
def test_who_runs_a_script_on_windows(monkeypatch, tmp_path, text, path, expected):
    file = tmp_path / path
    file.write_text(text)
    assert dispynode.interpreter_of(str(file)) == []
    monkeypatch.setattr(dispynode, 'IS_WINDOWS', True)
    assert dispynode.interpreter_of(str(file)) == expected
    assert dispynode.interpreter_of(str(tmp_path / 'none')) == []


@pytest.mark.parametrize('name, start, expected', [
    ('a.bat', b'@e', True), ('A.CMD', b'', True), ('a.py', b'im', True), ('a', b'MZ', True),
    ('a.txt', b'ab', False),
    ('a', b'ab', False)])
def test_what_windows_runs(monkeypatch, name, start, expected):
    monkeypatch.setattr(dispy.os, 'name', 'nt')
    monkeypatch.setenv('PATHEXT', '.COM;.EXE;.BAT;.CMD')
    assert dispy.is_executable(name, start) is expected


def test_a_command_in_the_working_directory_of_windows(monkeypatch, tmp_path):
    """Guards against: it was found in PATH, where Windows looks into that directory first, and the
    nodes had no such program."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'say.bat').write_text('@echo off')
    (tmp_path / 'bin').mkdir()
    monkeypatch.setattr(dispy.os, 'name', 'nt')
    monkeypatch.setattr(dispy.shutil, 'which', lambda name: os.path.join('.', name))
    assert dispy.ProgramFile.find('say.bat') == ('./say.bat', 'say.bat', False)
    monkeypatch.setattr(dispy.shutil, 'which', lambda name: str(tmp_path / 'bin' / name))
    assert dispy.ProgramFile.find('say.bat') == ('say.bat', None, False)


def test_exit_codes_of_windows_are_told_in_words():
    assert (dispynode.exit_text(0xC0000005)
            == 'ended with exit code 3221225477 (0xC0000005, access violation)')
    assert ('0xC0001234' in dispynode.exit_text(0xC0001234)
            and dispynode.exit_text(7) == 'ended with exit code 7')


USER = 'S-1-5-21-1-2-3-1001'
OF_USER = '(A;;FA;;;SY)(A;;FA;;;BA)(A;OICI;FA;;;%s)' % USER


@pytest.mark.parametrize('access, readers, writers', [
    ('D:P' + OF_USER, [], []),
    ('D:AI(A;ID;0x1301bf;;;AU)(A;ID;0x1200a9;;;BU)' + OF_USER, ['all users', 'all users'],
     ['all users']),
    ('D:(A;;FR;;;WD)' + OF_USER, ['everybody'], []),
    ('D:(A;;FX;;;WD)(D;;FA;;;WD)(A;OICIIO;FA;;;WD)' + OF_USER, [], []),
    ('D:(A;;0x1301ff;;;S-1-5-21-1-2-3-1002)', ['S-1-5-21-1-2-3-1002'], ['S-1-5-21-1-2-3-1002']),
    ('D:(A;CIOI;GA;;;WD)', ['everybody'], ['everybody']),
    ('D:(A;;CCLC;;;BG)(A;;WO;;;AN)', ['guests'], ['guests', 'AN']),
    ('D:P', [], []), ('D:NO_ACCESS_CONTROL', ['everybody'], ['everybody']),
    ('', ['everybody'], ['everybody'])])
def test_who_may_use_a_file_of_windows(access, readers, writers):
    assert dispynode.others_with(dispynode.READS, access, USER) == readers
    assert dispynode.others_with(dispynode.WRITES, access, USER) == writers


class Lists:
    """In place of the lists of access of Windows: all files have this one."""
    access = ''

    def user(self):
        return USER

    def of(self, path):
        if not self.access:
            raise OSError(50, 'The request is not supported')
        return self.access


@pytest.mark.parametrize('access, who', [('D:(A;;FR;;;WD)' + OF_USER, 'everybody'),
                                         ('', 'perhaps everybody')])
def test_a_secret_that_others_can_read_on_windows(monkeypatch, tmp_path, access, who):
    path = tmp_path / 'secret'
    path.write_text('5eed' * 16)
    path.chmod(0o644)   # says nothing there
    monkeypatch.setattr(dispynode, 'IS_WINDOWS', True)
    monkeypatch.setattr(dispynode, 'AccessLists', Lists)
    monkeypatch.setattr(Lists, 'access', access)
    with pytest.raises(dispy.SecretError) as refused:
        dispynode.read_secret(str(path))
    text = str(refused.value)
    assert 'by others (%s' % who in text and 'icacls "%s"' % path in text
    monkeypatch.setattr(Lists, 'access', 'D:' + OF_USER)
    assert dispynode.read_secret(str(path)) == b'5eed' * 16


def test_a_junction_is_a_link(monkeypatch, tmp_path):
    """Guards against: a file was stored below a directory that leads elsewhere."""
    (tmp_path / 'c').mkdir()
    monkeypatch.setattr(dispynode, '_WALKS', False)
    lstat = os.lstat
    monkeypatch.setattr(os, 'lstat', lambda path: types.SimpleNamespace(
        st_mode=lstat(path).st_mode, st_reparse_tag=0xa0000003 * (path == str(tmp_path / 'c'))))
    assert dispynode.is_link(str(tmp_path / 'c')) and not dispynode.is_link(str(tmp_path))
    receiver = dispynode.FileReceiver({dispynode.Purpose.DEPENDS: str(tmp_path)})
    row, = receiver.want(dispynode.Purpose.DEPENDS, [('c/a', 1, dispynode.digest_of(b'a'), 0o600)])
    stored = receiver.take(dispynode.FilePiece('c', *row, 0, b'a'))
    assert 'is a link' in stored.error and not (tmp_path / 'c' / 'a').exists()


def test_a_file_that_a_scanner_has_open(monkeypatch, tmp_path):
    """Guards against: a secret, a token or a file of a job could not be stored in that moment."""
    path, left, replace = str(tmp_path / 'file'), [3], os.replace

    def refuse(*paths, **options):
        left[0] -= 1
        if left[0] >= 0:
            raise PermissionError(13, 'Access denied')
        replace(*paths, **options)
    monkeypatch.setattr(os, 'replace', refuse)
    with pytest.raises(PermissionError):
        dispynode.write_private(path, b'elsewhere that is no reason to try again')
    monkeypatch.setattr(dispynode, 'IS_WINDOWS', True)
    dispynode.write_private(path, b'text')
    with open(path) as file:
        assert file.read() == 'text'
    assert os.listdir(str(tmp_path)) == ['file']


def test_a_file_of_the_state_that_a_scanner_has_open(monkeypatch, tmp_path):
    """Guards against: the scheduler ended."""
    files = dispyscheduler.LargeFiles(str(tmp_path))
    paths = [files.path(number, 'p') for number in (1, 2)]
    for path in paths:
        open(path, 'w').close()
    unlink = os.unlink

    def refuse(path):
        if path == paths[0]:
            raise PermissionError(13, 'Access denied')
        unlink(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, 'unlink', refuse)
        files.numbers.update((1, 2))
        files.remove(frozenset((1, 2)))
        files.unlink_gone()
        assert list(map(os.path.exists, paths)) == [True, False] and not files.has_gone
    files.unlink_gone()
    assert os.listdir(str(tmp_path)) == []


def test_a_port_is_for_one_process_alone(monkeypatch):
    """Windows: guards against a process that binds the same port and gets the connections."""
    monkeypatch.setattr(socket, 'SO_EXCLUSIVEADDRUSE', -5, raising=False)
    told = []

    class Socket(socket.socket):
        def setsockopt(self, level, option, *value):
            told.append((level, option, *value))
            if option != -5:
                super().setsockopt(level, option, *value)

        def bind(self, address):
            told.append('bound')
            super().bind(address)
    monkeypatch.setattr(socket, 'socket', Socket)
    acceptor = dispynode.Acceptor(('127.0.0.1', 0), b'k' * 32, Role.NODE, [Role.CLIENT], bytes(16),
                                  lambda found: None)
    acceptor.server_close()
    assert told.index((socket.SOL_SOCKET, -5, 1)) < told.index('bound')
    del told[:]
    with dispy.JobCluster(abs, nodes=[('127.0.0.1', 9)]) as cluster:
        dispy_httpd.DispyHTTPServer(cluster, port=0).shutdown()
    assert (socket.SOL_SOCKET, -5, 1) in told[:told.index('bound')]


def test_a_program_that_ctrl_break_ends(monkeypatch, tmp_path):
    """The job was interrupted; one that ends by itself then has returned."""
    flag = str(tmp_path / 'flag')
    monkeypatch.setattr(dispynode, 'IS_WINDOWS', True)
    monkeypatch.setattr(dispynode, 'send_break', lambda pid: open(flag, 'w').close())
    monkeypatch.setattr(dispynode, 'BREAK_STATUS', 66)
    words = ['/bin/sh', '-c', 'until [ -e %s ]; do sleep 0.01; done; exit $0' % flag]

    class Interrupted(dispynode.Program):
        interrupted = property(lambda self: True, lambda self, value: None)
    program = Interrupted('')
    with pytest.raises(KeyboardInterrupt):
        program.run([*words, '66'])
    os.remove(flag)
    assert program.run([*words, '3']) == 3


@pytest.mark.skipif(not hasattr(os, 'getuid'), reason='no limits of resources here')
@pytest.mark.parametrize('platform, most', [('linux', 1 << 16), ('darwin', 10240)])
def test_the_scheduler_raises_its_limit_of_descriptors(monkeypatch, platform, most):
    import resource
    limits = [256, resource.RLIM_INFINITY]
    monkeypatch.setattr(sys, 'platform', platform)
    monkeypatch.setattr(resource, 'getrlimit', lambda which: tuple(limits))
    monkeypatch.setattr(resource, 'setrlimit', lambda which,
                        pair: limits.__setitem__(slice(None), pair))
    dispyscheduler.raise_descriptors()
    assert limits == [most, resource.RLIM_INFINITY]
    limits[:] = [256, 512]
    dispyscheduler.raise_descriptors()
    assert limits == [512, 512]


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
    assert found.pop('disk_total') >= found.pop('disk') > 0
    assert found == {'memory': 7, 'memory_total': None, 'cpu': None, 'swap': None}
    assert dispynode.availability(str(tmp_path / 'removed'))['disk'] is None


@pytest.mark.skipif(sys.platform != 'linux', reason='/proc is as Linux has it')
def test_linux_tells_without_importing_psutil_what_that_would_tell(tmp_path):
    code = """if True:
        import sys, dispynode
        found = [dispynode.availability(sys.argv[1], True) for _ in range(2)]
        assert 'psutil' not in sys.modules
        import psutil
        for one in found:
            assert set(one) == {'cpu', 'memory', 'memory_total', 'swap', 'disk', 'disk_total'}
            assert 0 <= one['cpu'] <= 100
            assert one['memory_total'] == psutil.virtual_memory().total
            assert abs(one['memory'] - psutil.virtual_memory().available) < 1 << 30
            assert abs(one['swap'] - psutil.swap_memory().free) < 1 << 30
        found = dispynode.availability(sys.argv[1])
        assert 0 <= found['cpu'] <= 100 and found['memory'] and found['disk']
    """
    subprocess.run([sys.executable, '-c', code, str(tmp_path)], check=True, cwd=ROOT)


def test_what_psutil_cannot_tell(monkeypatch):
    monkeypatch.setitem(sys.modules, 'psutil', Failing())
    monkeypatch.setattr(dispynode, '_own_addresses', {})   # those known from before are kept
    assert dispynode.own_addresses() == {}
    assert dispynode.own_host('127.0.0.1') == '127.0.0.1'
    monkeypatch.setattr(sys, 'platform', 'darwin')
    monkeypatch.setattr(dispynode, 'open', open_nothing, raising=False)
    assert dispynode.memory_of(os.getpid()) == 0


def test_a_node_that_cannot_limit_memory_says_so(tmp_path):
    """Guards against: dispy_memory had no effect, and nobody was told."""
    path = tmp_path / 'node.py'
    path.write_text('import sys\nsys.path.insert(0, %r)\nimport dispynode\n'
                    'dispynode.importlib.util.find_spec = lambda name: None\n'
                    'sys.platform = sys.argv.pop()\nsys.exit(dispynode.main())\n' % ROOT)
    for system, told in (('darwin', 1), ('linux', 0)):
        with NodeProcess(tmp_path / system, system, script=str(path)) as node:
            text = 'this Python has no psutil, which limits the memory of jobs here (dispy_memory)'
            assert node.log().count(text) == told


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


@pytest.mark.skipif(not hasattr(socket, 'TCP_KEEPIDLE'), reason='stands in for macOS here')
def test_keep_alive_by_the_name_that_macos_has(monkeypatch):
    option = socket.TCP_KEEPIDLE
    monkeypatch.delattr(socket, 'TCP_KEEPIDLE')
    monkeypatch.setattr(socket, 'TCP_KEEPALIVE', option, raising=False)
    with socket.socket() as sock:
        dispynode.set_tcp_options(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, option) == 15


def test_a_link_does_without_options_that_are_not_known(old_system, tmp_path):
    with NodeProcess(tmp_path) as node, dispy.JobCluster(abs, nodes=[node.address]) as cluster:
        assert cluster.submit(-3)(20) == 3


def test_a_daemon_does_without_options_that_are_not_known(old_system, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'platform', 'freebsd')   # where SO_REUSEPORT would be set
    loop = Loop()
    sockets = dispynode.DiscoverySockets(loop, 'loopback', [1], [0], lambda *data: None)
    try:
        assert sockets.listeners and sockets.error == ''
    finally:
        sockets.close()
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


# -- what a node tells of its host -----------------------------------------------------------------

@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere it is asked of `platform`')
def test_the_platform_is_told_without_starting_a_process(monkeypatch):
    known = platform.platform()
    monkeypatch.setattr(subprocess, 'Popen', None)
    text = dispynode.platform_text()
    assert text == known or platform.uname().processor not in ('', platform.machine())
