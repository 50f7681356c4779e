"""Nodes, programs, schedulers and the command line on Windows, which is Wine here: DISPY_WINE is
the directory that .ci/wine has made, with python.exe and what it needs."""

import os
import re
import subprocess
import threading
import urllib.request

import pytest

import dispy
import windows_jobs
from conftest import ROOT, eventually
from dispy import DispyJob
from nodes import NodeProcess

WINE = os.environ.get('DISPY_WINE', '')
pytestmark = [pytest.mark.skipif(not WINE, reason='DISPY_WINE names no '
                                 'Windows Python: .ci/wine makes one where Wine can be had')]
HERE = os.path.dirname(os.path.abspath(__file__))


def on_windows(path):
    return 'Z:' + path.replace('/', '\\')


def environment(**more):
    found = {name: value for name, value in os.environ.items()
             if name not in ('DISPLAY', 'TMPDIR', 'PYTHONPYCACHEPREFIX')}
    found.update(WINEPREFIX=os.path.join(WINE, 'prefix'), WINEDEBUG='-all',
                 WINEDLLOVERRIDES='mscoree=;mshtml=',
                 PYTHONPATH=';'.join(map(on_windows, (ROOT, HERE))),
                 PYTHONPYCACHEPREFIX=on_windows(os.path.join(WINE, 'pycache')),
                 APPDATA=on_windows(os.environ['DISPY_TESTS']), DISPY_DISCOVERY='loopback')
    return dict(found, **more)


COMMAND = ['/usr/lib/wine/wine64', os.path.join(WINE, 'python', 'python.exe')]


def start(*args, **options):
    """A Windows Python; its stdout and stderr are a pipe, as Wine's Python dies of files that a
    shell has opened."""
    return subprocess.Popen([*COMMAND, *args], env=environment(), stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            universal_newlines=True, errors='replace', **options)


def run(*args, cwd=None, status=0):
    """What it printed."""
    process = start(*args, cwd=cwd)
    timer = threading.Timer(100, process.kill)
    timer.start()
    try:
        output = process.communicate()[0].replace('\r\n', '\n')
    finally:
        timer.cancel()
    assert process.returncode == status, output
    return output


def program(*args):
    """What windows_program.py printed."""
    return run(on_windows(os.path.join(HERE, 'windows_program.py')), *map(str, args))


class WindowsProcess:
    """A daemon on Windows. `port` once it listens."""

    def __init__(self, script, *options, log=None):
        self._log = log   # a file, if it does not tell stderr
        self.process = start(on_windows(os.path.join(ROOT, script)), '-i', '127.0.0.1', '-p', '0',
                             *options)
        self.lines = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            self.port = int(eventually(self._listening, 90, what='start of %s' % script))
        except BaseException:
            self.stop()
            raise

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)

    def log(self):
        if self._log is not None and self._log.exists():
            return self._log.read_text()
        return ''.join(self.lines)

    def _listening(self):
        assert self.process.poll() is None, self.log()
        found = re.search(r'(?:CPUs?|serves) at port (\d+)', self.log())
        return found and found.group(1)

    @property
    def address(self):
        return ('127.0.0.1', self.port)

    def stop(self):
        self.process.kill()
        self.process.wait()
        self._reader.join(20)
        self.process.stdout.close()


@pytest.fixture(scope='module')
def ended():
    """Whatever was started on Windows ends with its server."""
    yield
    subprocess.run(['/usr/lib/wine/wineserver64', '-k'], env=environment())


@pytest.fixture(scope='module')
def windows_node(ended, tmp_path_factory):
    node = WindowsProcess('dispynode.py', '-c', '2', '--dest-path-prefix',
                          on_windows(str(tmp_path_factory.mktemp('node'))))
    yield node
    node.stop()


@pytest.fixture
def cluster(windows_node):
    """cluster(function, ...) on the Windows node."""
    made = []

    def make(function, **options):
        made.append(dispy.JobCluster(function, nodes=[windows_node.address], **options))
        return made[-1]
    yield make
    for one in made:
        one.close(terminate=True)


@pytest.fixture(autouse=True)
def nothing_is_left_over():
    """In place of the fixture for all tests: processes of Wine live as long as its server."""


@pytest.mark.parametrize('module', ['dispynode', 'dispy', 'dispyscheduler', 'dispy_httpd'])
def test_import_and_help(ended, module):
    assert 'usage: ' in run('-m', module, '--help')


def test_a_thousand_jobs_and_setup(cluster):
    made = cluster(windows_jobs.of_setup, setup=windows_jobs.setup)
    assert {job.get(100) for job in [made.submit(n) for n in range(1000)]} == {(True, 'nt')}


def test_a_setup_that_fails(cluster):
    made = cluster(windows_jobs.double, setup=windows_jobs.failing_setup)
    reason = eventually(lambda: [node.reason for node in made.status().all_nodes
                                 if 'LookupError' in node.reason], 60)
    assert 'in failing_setup' in reason[0]


def test_ways_to_die(cluster):
    made = cluster(windows_jobs.die)
    words = {'raise': 'ValueError: as it was told', 'exit': 'SystemExit: 3', '_exit': 'exit code 7',
             'fault': 'access violation', 'killed': 'exit code', 'abort': 'exit code', 'none': None}
    jobs = {way: made.submit(way) for way in words}
    for way, job in jobs.items():
        assert job.wait(60)
        if way == 'none':
            assert job.result == 'none'
        else:
            assert (job.status == DispyJob.Terminated
                    and words[way] in job.exception), (way, job.exception)


def test_cancel_and_timeout(cluster):
    made = cluster(windows_jobs.endless)
    for how, status in (('loop', DispyJob.Cancelled), ('sleep', DispyJob.Cancelled),
                        ('interrupted', DispyJob.Finished)):
        job = made.submit(how)
        eventually(lambda: job.status == DispyJob.Running, 60)
        assert made.cancel(job) == 0 and job.wait(30) and job.status == status, how
    job = made.submit('sleep', dispy_timeout=0.5)
    assert job.wait(30) and 'exceeded its time limit' in job.exception


def test_process_trees_end_with_their_job(cluster, tmp_path):
    made, path = cluster(windows_jobs.tree), str(tmp_path / 'pids')
    job = made.submit(on_windows(path))
    eventually(lambda: os.path.exists(path), 60)
    with open(path) as file:
        pids = list(map(int, file.read().split()))
    assert len(pids) == 2
    made.cancel(job)
    assert job.wait(30)
    made.close()
    which = cluster(windows_jobs.which_live)
    eventually(lambda: which.submit(pids).get(60) == [], 30, what='end of the tree')


def test_jobs_have_a_console_of_their_own(cluster, tmp_path):
    """Ctrl-C for the node or a program with one does not reach them; it has no window. A program
    that does not hear Ctrl-Break, which Wine does not have, is killed with what it has started."""
    made = cluster(windows_jobs.console)
    window, pid, parent, pids = made.submit().get(60)
    assert window == 0 and sorted(pids) == sorted((pid, parent))
    made.close()
    path = tmp_path / 'sleeps.py'
    path.write_text('#!/usr/bin/env python3\nimport sys, time\n'
                    'open(sys.argv[1], "w").close()\ntime.sleep(1000)\n')
    made = cluster(str(path))
    job = made.submit(on_windows(str(tmp_path / 'begun')))
    eventually((tmp_path / 'begun').exists, 60)
    made.cancel(job)
    assert job.wait(30) and job.status == DispyJob.Cancelled


def test_what_a_job_leaves_ends_its_worker(cluster):
    made = cluster(windows_jobs.leaves_a_child)
    assert made.submit().get(60) != made.submit().get(60)


def test_output(cluster, tmp_path):
    records = []
    shown, flag = [], str(tmp_path / 'flag')
    made = cluster(windows_jobs.prints, forward_logs=True)
    handler = dispy.logger.handlers
    job = made.submit(5)
    assert job.get(60) == 5
    assert job.stdout.replace('\r\n', '\n').split('\n') == ['from Python 5', 'from a child',
                                                            'from the shell', '']
    assert job.stdout.startswith('from Python 5\n') and job.stderr.startswith('to stderr\n')
    made.close()
    made = cluster(windows_jobs.prints_slowly, on_output=lambda job, stream,
                   text: shown.append(text))
    job = made.submit(on_windows(flag))
    eventually(lambda: ''.join(shown) == 'early\n', 60)
    open(flag, 'w').close()
    assert job.wait(60) and job.stdout == 'early\nlate\n'
    assert records == [] and handler is dispy.logger.handlers


def test_files_there_and_back(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = os.urandom(3 << 20)
    (tmp_path / 'data.bin').write_bytes(data)
    made = cluster(windows_jobs.files, depends=['data.bin'])
    size, names = made.submit('data.bin').get(60)
    assert size == len(data) and 'data.bin' in names
    assert (tmp_path / 'back.bin').read_bytes() == data[::-1]
    made.close()
    (tmp_path / 'own.txt').write_text('of this job')
    made = cluster(windows_jobs.own_file, depends=['data.bin'])
    assert made.submit('own.txt', dispy_job_depends=['own.txt']).get(60) == ('of this job', True)
    assert made.submit('own.txt').exception is None
    job = made.submit('own.txt')
    assert job.wait(60) and 'FileNotFoundError' in job.exception


def test_what_a_windows_node_refuses(cluster, tmp_path, monkeypatch):
    """Names that mean something else there or would be one file, and workers that are forked."""
    monkeypatch.chdir(tmp_path)
    for name in ('NUL', 'A', 'a'):
        (tmp_path / name).write_text(name)
    for options, text in (({'depends': ['NUL']}, 'something else on Windows'),
                          ({'depends': ['A', 'a']}, 'would be one file'),
                          ({'start_method': 'fork'}, 'cannot be started with fork')):
        made = cluster(windows_jobs.double, **options)
        eventually(lambda: [node for node in made.status().all_nodes if text in node.reason], 60,
                   what=text)
        made.close()


def test_between_jobs_all_is_put_back(cluster):
    made = cluster(windows_jobs.changes)
    assert made.submit().get(60) is None
    made.close()
    made = cluster(windows_jobs.surroundings)
    assert made.submit().get(60) == (True, False)


def test_memory_provisional_results_and_fresh_workers(cluster):
    made = cluster(windows_jobs.takes)
    job = made.submit(1 << 29, dispy_memory=1 << 28)
    assert job.wait(60) and 'dispy_memory' in job.exception
    made.close()
    made = cluster(windows_jobs.provisional)
    job = made.submit(4)
    assert job.get(60) == 4
    made.close()
    made = cluster(windows_jobs.pid, max_jobs_per_worker=1)
    assert len({made.submit().get(60) for _ in range(3)}) == 3


def test_a_node_that_is_killed_can_be_started_again(ended, tmp_path):
    """Its directory is free at once, and nothing of it is left."""
    for _ in range(2):
        node = WindowsProcess('dispynode.py', '-c', '1', '--dest-path-prefix',
                              on_windows(str(tmp_path / 'node')))
        try:
            with dispy.JobCluster(windows_jobs.double, nodes=[node.address]) as made:
                assert made.submit(4).get(60) == 8
        finally:
            node.stop()


def test_a_node_without_a_terminal(ended, tmp_path):
    """It has left its console, and tells a file what it has to tell."""
    log = tmp_path / 'log'
    node = WindowsProcess('dispynode.py', '-c', '1', '--daemon', '--log-file',
                          on_windows(str(log)), '--dest-path-prefix',
                          on_windows(str(tmp_path / 'node')), log=log)
    try:
        with dispy.JobCluster(windows_jobs.double, nodes=[node.address]) as made:
            assert made.submit(4).get(60) == 8
        for private in (log, tmp_path / 'node'):
            assert not private.stat().st_mode & 0o007
    finally:
        node.stop()


def test_secrets_that_others_can_read(ended, tmp_path):
    path = tmp_path / 'secret'
    path.write_text('5eed' * 16)
    path.chmod(0o644)
    node = on_windows(os.path.join(ROOT, 'dispynode.py'))
    refused = run(node, '--secret-file', on_windows(str(path)), status=1)
    assert 'can be read or written by others (everybody)' in refused and 'icacls' in refused
    path.chmod(0o600)
    code = 'import dispynode, sys; print(dispynode.read_secret(sys.argv[1])[:8])'
    assert run('-c', code, on_windows(str(path))) == "b'5eed5eed'\n"
    made = tmp_path / 'made'
    code = ('import dispynode, sys; dispynode.make_secret(sys.argv[1]); '
            'print(len(dispynode.read_secret(sys.argv[1])))')
    assert run('-c', code, on_windows(str(made))) == '64\n'
    assert not made.stat().st_mode & 0o007


def test_a_program_with_a_node_of_its_own(ended):
    output = program('local')
    assert "{(True, 'nt')} ['', '']" in output and 'cancelled True' in output


def test_a_program_that_has_no_guard(ended, tmp_path):
    """Guards against: each runner ran the program's main module again."""
    path = tmp_path / 'program.py'
    path.write_text('import dispy\nprint("begins")\n'
                    'with dispy.JobCluster(abs, nodes="local") as cluster:\n'
                    '    print(cluster.submit(-3)(60))\n')
    output = run(on_windows(str(path)))
    assert output.count('begins') == 1 and output.endswith('3\n')


def test_a_program_with_a_node_on_linux(ended, tmp_path):
    with NodeProcess(tmp_path / 'node') as node:
        assert '999000' in program('remote', node.port)


def test_a_scheduler_and_its_page(ended, tmp_path):
    """A scheduler on Windows, a node on Linux, programs on both."""
    with NodeProcess(tmp_path / 'node') as node:
        scheduler = WindowsProcess('dispyscheduler.py', '--state-dir',
                                   on_windows(str(tmp_path / 'state')),
                                   '-n', '127.0.0.1:%d' % node.port, '--httpd', '0')
        try:
            with dispy.SharedJobCluster(windows_jobs.double, scheduler_port=scheduler.port) as made:
                assert sum(job.get(60) for job in [made.submit(n) for n in range(1000)]) == 999000
            assert '999000' in program('shared', scheduler.port)
            url, = set(re.findall(r'http://\S+', scheduler.log()))
            with urllib.request.urlopen(url, timeout=20) as page:
                assert b'<html' in page.read().lower()
        finally:
            scheduler.stop()


def test_the_command_line(ended, tmp_path):
    """`python -m dispy` with a .bat, a .py and a script that names Python, on a node of its own."""
    (tmp_path / 'say.bat').write_text('@echo bat %1\r\n@exit /b %1\r\n')
    (tmp_path / 'say.py').write_text('import sys\nprint("py", sys.argv[1])\n')
    (tmp_path / 'say').write_text('#!/usr/bin/env python3\nimport sys\n'
                                  'print("script", sys.argv[1])\n')
    output = run('-m', 'dispy', '-n', 'local', '-a', '0', '-a', '3', 'say.bat', cwd=str(tmp_path),
                 status=1)
    assert 'bat 0' in output and 'bat 3' in output
    for name, word in (('say.py', 'py 5'), ('say', 'script 5')):
        assert word in run('-m', 'dispy', '-n', 'local', '-a', '5', name, cwd=str(tmp_path))
