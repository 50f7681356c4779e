"""A real dispynode process for tests, on loopback, with a directory of its own."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from conftest import ROOT, eventually

SSHD = shutil.which('sshd') or shutil.which('sshd', path='/usr/sbin:/usr/local/sbin')
needs_sshd = pytest.mark.skipif(
    not SSHD or not shutil.which('ssh') or not shutil.which('ssh-keygen'),
    reason='needs ssh, ssh-keygen and sshd (Debian: openssh-client, openssh-server)')


def start_here(argv, env=None, **options):
    """subprocess.Popen; `env` comes on top of this process's own."""
    return subprocess.Popen(argv, env=dict(os.environ, **(env or {})), **options)


CLOCK = """
import os, time
real, step = time.time, 0.0


def stepped():
    global step
    try:
        with open(os.environ['TEST_CLOCK']) as file:
            step = float(file.read() or 0)
    except OSError:   # a clock works without descriptors, too
        pass
    return real() + step


time.time = stepped
"""


class Clock:
    """A clock on the wall that can be set, for the processes that get `environment`, and what these
    start."""

    def __init__(self, directory):
        self._path = os.path.join(str(directory), 'step')
        self.set(0)
        with open(os.path.join(str(directory), 'sitecustomize.py'), 'w') as file:
            file.write(CLOCK)
        path = os.pathsep.join([str(directory), os.environ['PYTHONPATH']])
        self.environment = {'PYTHONPATH': path, 'TEST_CLOCK': self._path}

    def set(self, seconds):
        """So much later than it is."""
        with open(self._path + '-new', 'w') as file:
            file.write(str(seconds))
        os.replace(file.name, self._path)


def script_of(name, env):
    """What runs the module: the command that is installed, which loads it from the cache of
    compiled modules. `python dispynode.py` compiles the whole file at each start; so starts who has
    another PYTHONPATH."""
    if 'PYTHONPATH' in (env or {}):
        return os.path.join(ROOT, name + '.py')
    return os.path.join(ROOT, 'commands', name + '.py')


class NodeProcess:
    """A dispynode with options; `port` once it listens, `log()` what it said. `host` is where
    clients reach it, `start` starts it: both differ for a node on another host."""

    def __init__(self, directory, *options, cpus=2, python=sys.executable, script=None,
                 port=0, env=None, host='127.0.0.1', listen=('-i', '127.0.0.1'), start=start_here):
        self.host = host
        self.directory = str(directory)
        os.makedirs(self.directory, exist_ok=True)
        self._log = os.path.join(self.directory, 'log')
        self.prefix = os.path.join(self.directory, 'node')
        with open(self._log, 'ab') as log:
            self._from = log.tell()
            self.process = start([python, script or script_of('dispynode', env), *listen, '-p',
                                  str(port), '-c', str(cpus), '--dest-path-prefix', self.prefix,
                                  *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                 env=env)
        self._wait('start of a node')

    def _wait(self, what):
        """Until it listens. One that does not is killed."""
        try:   # another Python may have to compile all that it imports
            self.port = int(eventually(self._listening, 90, what))
        except BaseException:
            self.kill()
            raise

    def log(self):
        with open(self._log, errors='replace') as file:
            file.seek(self._from)
            return file.read()

    def _listening(self):
        assert self.process.poll() is None, self.log()
        found = re.search(r'(?:CPUs?|serves) at port (\d+)', self.log())
        return found and found.group(1)

    @property
    def address(self):
        return (self.host, self.port)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()


class SchedulerProcess(NodeProcess):
    """A dispyscheduler with options."""

    def __init__(self, directory, *options, port=0, env=None, script=None):
        self.host = '127.0.0.1'

        self.directory = str(directory)
        os.makedirs(self.directory, exist_ok=True)
        self._log = os.path.join(self.directory, 'log')
        self.state = os.path.join(self.directory, 'state')
        with open(self._log, 'ab') as log:
            self._from = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, script or script_of('dispyscheduler', env), '-i', '127.0.0.1',
                 '-p', str(port), '--state-dir', self.state, *options], stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, env=dict(os.environ, **(env or {})))
        self._wait('start of a scheduler')

    def page(self):
        """The link to its web page (--httpd), from the file in its state directory: the log, which
        others can read, has no token."""
        path = os.path.join(self.state, 'monitor')
        eventually(lambda: os.path.exists(path), what='link of the page')
        with open(path) as file:
            return file.read().split()[-1]


def runners_of(node):
    """The runners of a node, one a computation."""
    found = []
    for child in psutil.Process(node.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):   # a zombie too
            if any('runner_start' in word for word in child.cmdline()):
                found.append(child)
    return found


def runner_of(node):
    """The runner of a node that serves one computation."""
    found = runners_of(node)
    assert len(found) == 1, found
    return found[0]


def run_node(*options, env=None, stdin=subprocess.DEVNULL, python=sys.executable):
    """A node that is expected not to start: (exit code, stderr)."""
    done = subprocess.run([python, script_of('dispynode', env), '-i', '127.0.0.1', *options],
                          stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30,
                          env=dict(os.environ, **(env or {})))
    return done.returncode, done.stderr.decode()
