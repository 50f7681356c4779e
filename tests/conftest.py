"""What all tests share: only loopback, a secret and a home of the tests' own, and nothing may be left over."""

import atexit
import os
import shutil
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ['DISPY_DISCOVERY'] = 'loopback'
os.environ['DISPY_SECRET'] = 'the secret of the test-suite'
os.environ['XDG_CONFIG_HOME'] = tempfile.mkdtemp(prefix='dispy-tests-')
atexit.register(shutil.rmtree, os.environ['XDG_CONFIG_HOME'], True)
os.environ['PYTHONPATH'] = os.pathsep.join([ROOT, *filter(None, [os.environ.get('PYTHONPATH')])])

import psutil  # noqa: E402
import pytest  # noqa: E402


def eventually(condition, seconds=20.0, what='condition'):
    """Wait for a condition, not for time; its last value is returned, and must be true."""
    until = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < until, '%s did not come about within %s s' % (what, seconds)
        time.sleep(0.01)


def walk_seeds(walk_class, first):
    """Twenty random walks; a failing seed stands in the message, and walk_class(seed) repeats it."""
    for seed in range(first, first + 20):
        walk = walk_class(seed)
        try:
            for _ in range(250):
                walk.step()
            walk.drain()
        except Exception as exc:
            raise AssertionError('seed %d: %s: %s' % (seed, type(exc).__name__, exc)) from exc


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


@pytest.fixture(autouse=True)
def nothing_is_left_over():
    """Fails a test that leaves a thread, a child process or a socket."""
    threads = set(threading.enumerate())
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    sockets = _sockets()
    yield

    def left():
        return ([thread.name for thread in threading.enumerate() if thread not in threads],
                [child for child in psutil.Process().children(recursive=True) if child.pid not in children],
                _sockets() - sockets)
    until = time.monotonic() + 8
    while any(left()) and time.monotonic() < until:
        time.sleep(0.02)
    threads_left, children_left, sockets_left = left()
    assert not threads_left, 'threads left: %s' % threads_left
    assert not children_left, 'processes left: %s' % children_left
    assert not sockets_left, 'sockets left: %s' % sockets_left
