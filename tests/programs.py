"""Programs of a user's for tests: files in a directory, run in processes of their own, on the
embedded node, on a node that has nothing of the user's, or through a scheduler that has such a
node."""

import contextlib
import functools
import glob
import json
import os
import shutil
import subprocess
import sys
import textwrap

from conftest import ROOT
from nodes import NodeProcess, SchedulerProcess, start_here

# Beside every program: what makes its clusters, from the words of its command line.
CLUSTERS = '''
import json
import logging
import sys

import dispy

# A node that imports this module has a command line of its own.
WORDS = [word.split(',') for word in sys.argv] + [['local']]
MODE, *PORTS = next(words for words in WORDS if words[0] in ('local', 'node', 'scheduler'))
PORTS = [int(port) for port in PORTS]
ALONE = [('127.0.0.1', PORTS[-1])] if PORTS else 'local'


KIND = dispy.SharedJobCluster if MODE == 'scheduler' else dispy.JobCluster


def make_cluster(computation, nodes=None, **options):
    """A JobCluster or SharedJobCluster. `setup_args` are those of the node, which is not
    an embedded one."""
    if MODE == 'scheduler':
        options['scheduler_port'] = PORTS[0]
    setup_args = options.pop('setup_args', None)
    options['nodes'] = nodes or ALONE
    if setup_args is not None:
        options['nodes'] = [dispy.NodeAllocate('127.0.0.1', PORTS[-1], setup_args=setup_args)]
    options.setdefault('loglevel', logging.WARNING)
    return KIND(computation, **options)


def make_executor(**options):
    """A DispyExecutor on the same nodes."""
    kept = dispy.DispyExecutor._cluster_class
    dispy.DispyExecutor._cluster_class = staticmethod(make_cluster)
    try:
        return dispy.DispyExecutor(**options)
    finally:
        dispy.DispyExecutor._cluster_class = kept


_patience = [20]


def outcome(job):
    """What came of a job: its result, or the text of its failure. After one that gave no answer,
    others have less time."""
    try:
        result = job(_patience[0])
    except TimeoutError:
        _patience[0] = 1
        return 'no answer'
    return result if job.status == job.Finished else 'status %d: %s' % (job.status, job.exception)


def attempt(call, *args, **options):
    """What a call gives, or the text of what it raises."""
    try:
        return call(*args, **options)
    except Exception as exc:
        return '%s: %s' % (type(exc).__name__, exc)


def show(**values):
    """One line of JSON for the test."""
    print(json.dumps(values), flush=True)
'''


class Done:
    """What came of a run."""

    def __init__(self, process):
        self.code = process.returncode
        self.out = process.stdout.decode(errors='replace')
        self.err = process.stderr.decode(errors='replace')

    def values(self):
        """All that the program gave to `show`."""
        assert self.code == 0, self.text()
        found = {}
        for line in self.out.splitlines():
            if line.startswith('{'):
                found.update(json.loads(line))
        return found

    def text(self):
        return 'exit code %s\n%s\n%s' % (self.code, self.out, self.err)


class Project:
    """A directory of a user's. `where` is the first word of its programs: how they make their
    clusters."""

    def __init__(self, directory, where='local'):
        self.directory = str(directory)
        self.where = where
        os.makedirs(self.directory, exist_ok=True)
        self.write('clusters.py', CLUSTERS)

    def write(self, name, text):
        """A file, with its directories; the text may be indented."""
        path = os.path.join(self.directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'w') as file:
            file.write(textwrap.dedent(text))
        return path

    def files(self, **texts):
        """Modules by name."""
        for name, text in texts.items():
            self.write(name + '.py', text)

    def run(self, *command, python=sys.executable, timeout=60, env=None, cwd=None):
        """Run `python COMMAND... WHERE` in the directory."""
        command = command or ('script.py',)
        process = subprocess.run([python, *command, self.where], cwd=cwd or self.directory,
                                 timeout=timeout, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, env=dict(os.environ, **(env or {})))
        return Done(process)


def make_venv(directory, python=sys.executable):
    """The Python of a virtual environment that has no packages."""
    subprocess.run([python, '-m', 'venv', '--without-pip', str(directory)], check=True,
                   env=dict(os.environ, PYTHONPATH=''))
    return os.path.join(str(directory), 'Scripts' if os.name == 'nt' else 'bin', 'python')


def bare_node(directory, *options, python=sys.executable, env=None, **more):
    """A dispynode in an empty directory, with nothing of the user's or of this project's beside
    dispynode.py. Who looks for nodes does not find it: it may be there for a whole run of tests."""
    os.makedirs(str(directory))
    script = shutil.copy(os.path.join(ROOT, 'dispynode.py'), str(directory))
    return NodeProcess(directory, *options, python=python, script=script,
                       env=dict({'PYTHONPATH': '', 'PYTHONNOUSERSITE': '1',
                                 'DISPY_DISCOVERY': 'off'}, **(env or {})),
                       start=functools.partial(start_here, cwd=str(directory)), **more)


@contextlib.contextmanager
def somewhere(kind, directory):
    """The word for `Project`: for 'local', for a bare 'node', or for a 'scheduler' with such a
    node."""
    if kind == 'local':
        yield 'local'
        return
    with bare_node(os.path.join(str(directory), 'node')) as node:
        if kind == 'node':
            yield 'node,%d' % node.port
            return
        with SchedulerProcess(os.path.join(str(directory), 'scheduler'), '-n',
                              '127.0.0.1:%d' % node.port) as scheduler:
            yield 'scheduler,%d,%d' % (scheduler.port, node.port)


HERE = '%d.%d' % sys.version_info[:2]   # the version of this Python


@functools.lru_cache(maxsize=None)
def other_pythons():
    """Python executables of other minor versions from 3.8 on, one a version."""
    pyenv = os.environ.get('PYENV_ROOT', os.path.join(os.path.expanduser('~'), '.pyenv'))
    found = sorted(glob.glob(os.path.join(pyenv, 'versions', '*', 'bin', 'python3'))
                   + glob.glob('/usr/bin/python3.[0-9]*'))
    others = {}
    for path in found:
        try:
            minor = subprocess.check_output([path, '-c', 'import sys; '
                                             'print("%d.%d" % sys.version_info[:2])'],
                                            stderr=subprocess.DEVNULL).decode().strip()
        except (OSError, subprocess.CalledProcessError):
            continue
        if minor != HERE and tuple(map(int, minor.split('.'))) >= (3, 8):
            others.setdefault(minor, path)
    return others
