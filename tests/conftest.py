"""What all tests share: only loopback, a secret and a home of the tests' own, and nothing may be
left over."""

import atexit
import contextlib
import ctypes
import gc
import hashlib
import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests', 'faults')]   # the tools there are for others too
os.environ['DISPY_DISCOVERY'] = 'loopback'
# What a later Python will not do any more is an error in our modules; for this process setup.cfg
# says it.
os.environ['PYTHONWARNINGS'] = ','.join(
    'error::%s:%s' % (kind, module) for kind in ('DeprecationWarning', 'PendingDeprecationWarning')
    for module in ('dispy', 'dispynode', 'dispyscheduler', 'dispy_httpd'))
# as a shell starts what it puts into the background; programs started here would not hear it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# 64 hexadecimal digits, as dispy makes by itself: a phrase takes each process 50 ms of CPU time.
os.environ['DISPY_SECRET'] = hashlib.sha256(b'the secret of the test suite').hexdigest()
WORKER = os.environ.get('PYTEST_XDIST_WORKER', '')   # a worker of `pytest -n`, or none
CHUNK = 20   # tests of a file that stay with one worker: they may share what they have made


def take_network():
    """Give this process a network of its own, which has loopback only: what another worker of
    `pytest -n` starts is not found here, and its ports are free. Raises OSError where that is not
    allowed. See unshare(2) and netdevice(7)."""
    import fcntl
    unshare = getattr(ctypes.CDLL(None, use_errno=True), 'unshare', None)
    if unshare is None or unshare(0x40000000):   # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), 'no network namespace')
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        flags = struct.pack('16sh14x', b'lo', 1)   # IFF_UP
        fcntl.ioctl(sock, 0x8914, flags)           # SIOCSIFFLAGS


def pytest_xdist_auto_num_workers(config):
    """`pytest -n auto`: tests wait more than they compute, so that there are more processes than
    CPUs. One process where workers would meet."""
    try:
        subprocess.run(['unshare', '--net', 'true'], check=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return 0
    if config.option.dist == 'no':   # not given
        config.option.dist = 'worksteal'   # some tests take a minute
    # Each of them collects all tests: what they import is compiled once, before they ask for it.
    name = '%s-%08x' % (sys.implementation.cache_tag, zlib.crc32(repr(config.args).encode()))
    collected = os.path.join(os.environ['PYTHONPYCACHEPREFIX'], name)
    if not os.path.exists(collected):   # else an earlier run has done it
        subprocess.run([sys.executable, '-m', 'pytest', '-q', '--collect-only', *config.args],
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
        open(collected, 'w').close()
    return 3 * (os.cpu_count() or 1) + 2


def pytest_collection_modifyitems(config, items):
    """Tests that take long begin first: one that is begun last would be waited for alone.
    `worksteal` gives each worker a part of the tests in their order, so each part begins with some
    of them. Those of a file that are marked so with `together` stay with one worker, as they share
    what takes long to make. Of the others each part gets some of every directory, and each second
    one in the opposite order: some wait for most of their time, others compute."""
    parts = getattr(config, 'workerinput', {}).get('workercount', 1)
    if parts == 1:
        return
    long, others = {}, {}
    for item in items:
        mark = item.get_closest_marker('long')
        if mark is None:
            others.setdefault(item.fspath, []).append(item)
        elif mark.kwargs.get('together'):
            long.setdefault(item.fspath, []).append(item)
        else:
            long[item] = [item]
    units = sorted(long.values(), key=len, reverse=True)
    chunks = [found[at:at + CHUNK] for found in others.values()
              for at in range(0, len(found), CHUNK)]
    dealt = []
    for part in range(parts):
        rest = chunks[part::parts][::-1 if part % 2 else 1]
        dealt.append([item for unit in units[part::parts] + rest for item in unit])
    left = len(items)
    surplus, sizes = [], []
    for part, found in enumerate(dealt):
        sizes.append(left // (parts - part))   # as `worksteal` counts
        left -= sizes[-1]
        surplus += found[sizes[-1]:]
        del found[sizes[-1]:]
    items[:] = []
    for size, found in zip(sizes, dealt):
        lacking = size - len(found)
        items += found + surplus[:lacking]
        del surplus[:lacking]


def pytest_collection_finish():
    """What has been collected stays until the end. The garbage collector need not look at it again
    and again."""
    pickle_by_value()
    gc.collect()
    gc.freeze()


def pickle_by_value():
    """Functions of the tests travel to nodes by value. By their names each runner would import the
    module of the test, and with it pytest, which takes more CPU time than most tests do. Unit tests
    have no runners."""
    import cloudpickle
    tests = os.path.join(ROOT, 'tests', '')
    for module in list(sys.modules.values()):
        path = getattr(module, '__file__', None) or ''
        if path.startswith(tests) and not path.startswith(os.path.join(tests, 'unit', '')):
            cloudpickle.register_pickle_by_value(module)


def compiled_code():
    """A directory for the compiled code of all modules, which stays for the next run; without that
    of the tests' own programs, which are made anew each time."""
    path = os.path.join(ROOT, '.pytest_cache', 'pycache')
    try:
        os.makedirs(path, exist_ok=True)
    except OSError:   # of somebody else
        return os.path.join(os.environ['DISPY_TESTS'], 'pycache')
    temporary = tempfile.gettempdir()
    there = path + os.path.splitdrive(temporary)[1]

    def forget():
        for name in os.listdir(there) if os.path.isdir(there) else ():
            if not (ROOT + os.sep).startswith(os.path.join(temporary, name, '')):
                shutil.rmtree(os.path.join(there, name), True)
    atexit.register(forget)
    return path


OURS = 'dispy-tests-%s-' % WORKER
if OURS not in os.environ.get('DISPY_TESTS', ''):
    # This module is imported by jobs as well, in the environment of the tests.
    os.environ['DISPY_TESTS'] = tempfile.mkdtemp(prefix=OURS)
    os.environ['XDG_CONFIG_HOME'] = os.environ['XDG_STATE_HOME'] = os.environ['DISPY_TESTS']
    atexit.register(shutil.rmtree, os.environ['DISPY_TESTS'], True)
    if not WORKER:
        # The tests start thousands of processes, and each would compile the modules anew without a
        # cache. Workers have that of the process which has started them.
        os.environ.pop('PYTHONDONTWRITEBYTECODE', None)
        os.environ['PYTHONPYCACHEPREFIX'] = compiled_code()
os.environ['PYTHONPATH'] = os.pathsep.join([ROOT, *filter(None, [os.environ.get('PYTHONPATH')])])

import psutil  # noqa: E402
import pytest  # noqa: E402

import dispy  # noqa: E402

# Of pytest-xdist, which may not be there
pytest.hookimpl(optionalhook=True)(pytest_xdist_auto_num_workers)
KINDS = ['JobCluster', 'SharedJobCluster']


def pytest_configure(config):
    config.addinivalue_line('markers', 'long: takes long, and is begun before others')
    config.addinivalue_line('markers', 'fork(reason): workers must be forked, and the reason')
    if config.option.start_method:
        os.environ['DISPY_START_METHOD'] = config.option.start_method
    if hasattr(config, 'workerinput'):   # a worker itself, and not a program that it has started
        take_network()
        os.environ['TMPDIR'] = tempfile.mkdtemp(prefix=OURS + 'tmp-')
        os.chmod(os.environ['TMPDIR'], 0o1777)
        atexit.register(shutil.rmtree, os.environ['TMPDIR'], True)
        tempfile.tempdir = None   # asked for anew


def pytest_addoption(parser):
    parser.addoption('--long', action='store_true',
                     help='tests that can be longer are: a million inputs, not a hundred thousand')
    parser.addoption('--dispynode', action='store_true',
                     help='tests for every kind of cluster run those of JobCluster on a dispynode, '
                     'and not on the node of this program')
    parser.addoption('--start-method', choices=('fork', 'spawn'),
                     help='how nodes start workers in tests that do not say it')


def pytest_runtest_setup(item):
    mark = item.get_closest_marker('fork')
    if mark is not None and os.environ.get('DISPY_START_METHOD') == 'spawn':
        pytest.skip('workers are not forked: %s' % mark.args[0])


_of_session = set()   # processes that outlive a test on purpose


@pytest.fixture(scope='session')
def scheduler_and_node(tmp_path_factory):
    """Ports of a dispyscheduler and of a node that it has, for all tests of this run."""
    from nodes import NodeProcess, SchedulerProcess
    root = tmp_path_factory.mktemp('shared')
    with NodeProcess(root / 'node') as node, \
            SchedulerProcess(root / 'scheduler', '-n', '127.0.0.1:%d' % node.port) as scheduler:
        _of_session.update((node.process.pid, scheduler.process.pid))
        yield scheduler.port, node.port
        _of_session.clear()


@pytest.fixture(scope='session')
def own_dispynode(tmp_path_factory):
    """The address of a dispynode for all tests of this run that ask for it by --dispynode."""
    from nodes import NodeProcess
    with NodeProcess(tmp_path_factory.mktemp('dispynode') / 'node') as node:
        _of_session.add(node.process.pid)
        yield node.address
        _of_session.discard(node.process.pid)


class Places:
    """The places of programs.py, each made when it is first asked for, and anew when a test has
    failed there."""

    def __init__(self, make_directory):
        self._make_directory = make_directory
        self._made = {}     # kind -> (what ends it, the word for `Project`)

    def of(self, kind):
        """The word for `Project`."""
        if kind not in self._made:
            from programs import somewhere
            before = set(_child_pids())
            stack = contextlib.ExitStack()
            word = stack.enter_context(somewhere(kind, self._make_directory('place')))
            _of_session.update(set(_child_pids()) - before)
            self._made[kind] = stack, word
        return self._made[kind][1]

    def end(self):
        for stack, _ in self._made.values():
            stack.close()
        self._made.clear()


@pytest.fixture(scope='session')
def all_places(tmp_path_factory):
    places = Places(tmp_path_factory.mktemp)
    yield places
    places.end()


@pytest.fixture
def places(request, all_places):
    """Nodes that have nothing of the user's, and schedulers of such nodes, for all tests of this
    run."""
    failed = request.session.testsfailed
    yield all_places
    if request.session.testsfailed > failed:
        all_places.end()   # what this test has left there is not for the next one


def on_dispynode(address):
    """JobCluster, for which 'local' and None are the dispynode with this address."""
    def make(computation, nodes=None, *args, **options):
        own = nodes is None or (isinstance(nodes, str) and nodes == 'local')
        return dispy.JobCluster(computation, [address] if own else nodes, *args, **options)
    return make


@pytest.fixture(params=KINDS)
def make_cluster(request):
    """A callable with the parameters of JobCluster: what a test does with it holds for every kind
    of cluster."""
    if request.param == 'JobCluster':
        if request.config.getoption('--dispynode'):
            return on_dispynode(request.getfixturevalue('own_dispynode'))
        return dispy.JobCluster
    scheduler, node = request.getfixturevalue('scheduler_and_node')

    def make(computation, nodes=None, *args, **options):
        """'local' and None are a node that the scheduler has."""
        own = nodes is None or (isinstance(nodes, str) and nodes == 'local')
        return dispy.SharedJobCluster(computation, [('127.0.0.1', node)] if own else nodes, *args,
                                      scheduler_port=scheduler, **options)
    return make


def eventually(condition, seconds=20.0, what='condition'):
    """Wait for a condition, not for time; its last value is returned, and must be true."""
    until = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < until, '%s did not come about within %s s' % (what, seconds)
        time.sleep(0.01)


def lives(pid):
    """Whether there is such a process, and it is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def on_a_terminal(*command):
    """Run a program whose stderr is a terminal: (exit code, what it showed there)."""
    pty, termios = (pytest.importorskip('pty', reason='no pseudo-terminals here'),
                    pytest.importorskip('termios'))
    fcntl = pytest.importorskip('fcntl')
    ours, theirs = pty.openpty()
    # Tqdm shows nothing in no columns
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('4H', 24, 80, 0, 0))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    text = b''
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:   # Linux: the other end was closed
            break
        if not piece:
            break
        text += piece
    os.close(ours)
    return process.wait(30), text


def walk_seeds(walk_class, seeds):
    """A random walk for each seed; one that fails stands in the message, and walk_class(seed)
    repeats it."""
    for seed in seeds:
        walk = walk_class(seed)
        try:
            for _ in range(250):
                walk.step()
            walk.drain()
        except Exception as exc:
            raise AssertionError('seed %d: %s: %s' % (seed, type(exc).__name__, exc)) from exc


def _child_pids():
    """The children of this process: as Linux lists them, which costs much less than a look at all
    processes does."""
    if not os.path.exists('/proc/self/task/%d/children' % os.getpid()):
        return [child.pid for child in psutil.Process().children()]
    found = []
    for thread in os.listdir('/proc/self/task'):
        try:
            with open('/proc/self/task/%s/children' % thread) as file:
                found += map(int, file.read().split())
        except (FileNotFoundError, ProcessLookupError):   # the thread has ended meanwhile
            continue
    return found


def _children():
    """All below this process but what is there for the whole run."""
    found = []
    for pid in _child_pids():
        if pid not in _of_session:
            try:
                child = psutil.Process(pid)
                words = ' '.join(child.cmdline())
                # These two live as long as this process
                if 'multiprocessing.resource_tracker' in words:
                    continue
                if 'multiprocessing.forkserver' not in words:
                    found.append(child)
                found += child.children(recursive=True)
            except psutil.NoSuchProcess:   # it has ended meanwhile
                continue
    return found


def _sockets():
    if not os.path.isdir('/proc/self/fd'):
        return {str(connection) for connection in psutil.Process().net_connections()}
    found = set()
    for number in os.listdir('/proc/self/fd'):
        try:
            target = os.readlink('/proc/self/fd/' + number)
        except OSError:
            continue
        if target.startswith('socket:') or 'eventpoll' in target:
            found.add(target)
    return found


# What a test of tests/unit may not do: it is for what decides, which has neither.
OF_PROCESSES_AND_SOCKETS = {
    'os.exec', 'os.fork', 'os.forkpty', 'os.posix_spawn', 'os.system', 'socket.bind',
    'socket.connect', 'subprocess.Popen'}
_audited = []      # such events of the unit test that runs
_auditing = []     # not empty while one runs


def _audit(event, _args):
    if _auditing and event in OF_PROCESSES_AND_SOCKETS:
        _audited.append(event)


sys.addaudithook(_audit)   # for as long as this process lives: it cannot be taken away


@pytest.fixture(autouse=True)
def unit_tests_are_alone(request):
    """Fails a test of tests/unit that starts a process or connects a socket."""
    if os.path.dirname(str(request.fspath)) != os.path.join(ROOT, 'tests', 'unit'):
        yield
        return
    del _audited[:]
    _auditing.append(request)
    yield
    _auditing.clear()
    assert not _audited, 'a unit test uses %s' % sorted(set(_audited))


@pytest.fixture
def small_disk(request, tmp_path):
    """A directory that is a file system of its own, of '4m' or what the test asks for as its
    parameter."""
    path = tmp_path / 'small'
    path.mkdir()
    size = getattr(request, 'param', '4m')
    try:
        subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=%s' % size, 'tmpfs', str(path)],
                       check=True, stderr=subprocess.PIPE, universal_newlines=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip('a file system is mounted here, which takes root on Linux: %s'
                    % (getattr(exc, 'stderr', '') or exc))
    yield str(path)
    subprocess.run(['umount', '--lazy', str(path)], check=True)


@pytest.fixture
def whole_arguments(monkeypatch):
    """Arguments travel as a whole, not as values that are known by digest."""
    import dispy
    monkeypatch.setattr(dispy, 'SHARED_FROM', 1 << 62)


@pytest.fixture(autouse=True)
def log_as_before():
    """What a test sets of the loggers (a cluster's `loglevel`, a daemon's `main`) is that test's
    alone."""
    loggers = [logging.getLogger(name)
               for name in ('dispy', 'dispynode', 'dispyscheduler', 'dispy_httpd')]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, logger.propagate, logger.handlers[:]) in zip(loggers, before):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def nothing_is_left_over():
    """Fails a test that leaves a thread, a child process or a socket."""
    threads = set(threading.enumerate())
    children = {child.pid for child in _children()}
    sockets = _sockets()
    yield

    def left():
        return ([thread.name for thread in threading.enumerate() if thread not in threads],
                [child for child in _children() if child.pid not in children],
                _sockets() - sockets)
    until = time.monotonic() + 8
    while any(left()) and time.monotonic() < until:
        time.sleep(0.02)
    threads_left, children_left, sockets_left = left()
    assert not threads_left, 'threads left: %s' % threads_left
    assert not children_left, 'processes left: %s' % children_left
    assert not sockets_left, 'sockets left: %s' % sockets_left
