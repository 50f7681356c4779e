"""The last jobs of a run are started a second time (speculate=True), on real nodes and by a
scheduler."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

import dispy
from clients import PATHS
from conftest import KINDS, eventually, lives
from dispy import DispyJob
from nodes import NodeProcess, SchedulerProcess

NAMES = ('a', 'b')


def attempt(directory, tag, kind='function'):
    """A job that ends when it may. Its first line is that it has begun, where, and its process; a
    quick one has no tag."""
    import os
    import time
    if not tag:
        return tag
    since = time.monotonic_ns()   # the file of a second attempt may be stored sooner
    name = dispy_node_name   # noqa: F821
    print('printed at', name, flush=True)
    dispy_provisional_result('provisional at ' + name)   # noqa: F821
    with open(tag + '.txt', 'w') as file:
        file.write('written at ' + name)
    dispy_send_file(tag + '.txt')   # noqa: F821
    begun = os.path.join(directory, '%s.%s' % (tag, name))
    try:
        with open(begun + '.part', 'w') as file:
            file.write('%d %d' % (since, os.getpid()))
        os.rename(begun + '.part', begun)
        while True:
            for where in (name, 'all'):
                if os.path.exists(os.path.join(directory, '%s-ends-%s' % (tag, where))):
                    return 'result at ' + name
                if os.path.exists(os.path.join(directory, '%s-fails-%s' % (tag, where))):
                    raise ValueError('failed at ' + name)
            time.sleep(0.01)
    except KeyboardInterrupt:   # it is cancelled
        with open(begun + '.cancelled', 'w'):
            raise


class Attempts:
    """The attempts of jobs, by files in a directory."""

    def __init__(self, directory):
        self.directory = str(directory)
        os.makedirs(self.directory, exist_ok=True)

    def begun(self, tag):
        """(name of the node, process) of those of a job, the first one first."""
        found = []
        for name in NAMES:
            path = os.path.join(self.directory, '%s.%s' % (tag, name))
            if os.path.exists(path):
                with open(path) as file:
                    found.append((*map(int, file.read().split()), name))
        return [(name, pid) for _, pid, name in sorted(found)]

    def both(self, tag):
        """The same when there are two."""
        return eventually(lambda: len(self.begun(tag)) == 2 and self.begun(tag),
                          what='second attempt')

    def first(self, tag):
        """The first when that has begun."""
        return eventually(lambda: self.begun(tag), what='first attempt')[0]

    def is_cancelled(self, tag, name):
        """Whether one has heard that it is not wanted any more."""
        return os.path.exists(os.path.join(self.directory, '%s.%s.cancelled' % (tag, name)))

    def let(self, tag, what, name='all'):
        """It ends or fails, at a node or wherever it is."""
        with open(os.path.join(self.directory, '%s-%s-%s' % (tag, what, name)), 'w'):
            pass


class Place:
    """Two nodes, or a scheduler that has them, and clusters that use them."""

    def __init__(self, kind, root, nodes, scheduler):
        self.kind, self.root, self.nodes, self.scheduler = kind, root, nodes, scheduler

    def cluster(self, computation, **options):
        if self.scheduler is not None:
            return dispy.SharedJobCluster(computation, scheduler_port=self.scheduler.port,
                                          **options)
        return dispy.JobCluster(computation, nodes=[node.address for node in self.nodes.values()],
                                **options)


@contextlib.contextmanager
def place_of(kind, root, cpus=1):
    with contextlib.ExitStack() as stack:
        nodes = {name: stack.enter_context(NodeProcess(root / name, '--name', name, cpus=cpus))
                 for name in NAMES}
        scheduler = None
        if kind == 'SharedJobCluster':
            words = [word for node in nodes.values()
                     for word in ('-n', '127.0.0.1:%d' % node.port)]
            scheduler = stack.enter_context(SchedulerProcess(root / 'scheduler', *words))
        yield Place(kind, root, nodes, scheduler)


@pytest.fixture(params=KINDS)
def place(request, tmp_path, monkeypatch):
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    with place_of(request.param, tmp_path) as place:
        yield place


class Watched:
    """A cluster, and what its functions were told of each job."""

    def __init__(self, place, **options):
        self.attempts = Attempts(place.root / 'attempts')
        self.results, self.printed, self.statuses = [], [], []
        self._lock = threading.Lock()
        self.cluster = place.cluster(attempt, reentrant=True, speculate=True,
                                     job_status=self._job, cluster_status=self._status,
                                     on_output=self._output, **options)
        self.cluster.wait_nodes(2, 30)
        quick = [self.cluster.submit(self.attempts.directory, '') for _ in range(12)]
        self.cluster.gather(quick, 30)

    def _job(self, job):
        with self._lock:
            self.results.append((job.id, job.status, job.result))

    def _output(self, job, stream, text):
        with self._lock:
            self.printed.append((job.id, text))

    def _status(self, status, node, job):
        if job is not None:
            self.statuses.append((job.id, status))

    def start(self, tag, **options):
        return self.cluster.submit_job_id(tag, self.attempts.directory, tag, **options)

    def told(self, rows, tag):
        """What the functions were told of a job."""
        with self._lock:
            return [row[1:] for row in rows if row[0] == tag]

    def jobs_done(self):
        return sum(node.jobs_done for node in self.cluster.status().nodes)


def text_of(tag):
    with open(tag + '.txt') as file:
        return file.read()


def test_what_finishes_first_counts_and_all_else_sees_one_job(place):
    watched = Watched(place)
    attempts, cluster = watched.attempts, watched.cluster
    with cluster:
        # The first finishes
        job = watched.start('first')
        (first, _), (second, _) = attempts.both('first')
        assert job.status == DispyJob.ProvisionalResult and text_of('first') == (
            'written at ' + first)
        done = watched.jobs_done()
        attempts.let('first', 'ends', first)
        assert job.get(30) == 'result at ' + first and job.stdout == 'printed at %s\n' % first
        assert text_of('first') == 'written at ' + first
        eventually(lambda: watched.told(watched.printed, 'first'))
        assert watched.told(watched.printed, 'first') == [('printed at %s\n' % first,)]
        eventually(lambda: watched.told(watched.results, 'first')[-1][0] == DispyJob.Finished)
        assert watched.told(watched.results, 'first') == [
            (DispyJob.ProvisionalResult, 'provisional at ' + first),
            (DispyJob.Finished, 'result at ' + first)]
        assert watched.jobs_done() == done + 1

        # The second fails, and the first ends; the first fails, and the second fails later
        job = watched.start('later')
        (first, _), (second, _) = attempts.both('later')
        attempts.let('later', 'fails', second)
        attempts.let('later', 'ends', first)
        assert job.get(30) == 'result at ' + first
        job = watched.start('sooner')
        (first, _), (second, _) = attempts.both('sooner')
        attempts.let('sooner', 'fails', first)
        eventually(lambda: job.result == 'provisional at ' + second)
        assert job.status == DispyJob.ProvisionalResult
        attempts.let('sooner', 'fails', second)
        assert job.wait(30) and job.status == DispyJob.Terminated
        assert 'failed at ' + second in job.exception and job.stdout == (
            'printed at %s\n' % second)
        eventually(lambda: (DispyJob.Terminated, None) in watched.told(watched.results, 'sooner'))
        assert watched.told(watched.results, 'sooner').count((DispyJob.Terminated, None)) == 1

        # Cancel ends both
        job = watched.start('cancelled')
        attempts.both('cancelled')
        cluster.cancel(job)
        assert job.wait(30) and job.status == DispyJob.Cancelled
        eventually(lambda: all(attempts.is_cancelled('cancelled', name) for name in NAMES))

        # A job for one node is not moved
        job = cluster.submit_node('a', attempts.directory, 'pinned')
        attempts.first('pinned')
        assert cluster.submit(attempts.directory, '').get(30) == ''
        assert [name for name, _ in attempts.begun('pinned')] == ['a']
        attempts.let('pinned', 'ends')
        assert job.get(30) == 'result at a'
        assert [name for name, _ in attempts.begun('pinned')] == ['a']

        # The second finishes, as the worker of the first is stopped
        job = watched.start('second')
        (first, pid), (second, other) = attempts.both('second')
        began = job.start_time
        os.kill(pid, signal.SIGSTOP)
        attempts.let('second', 'ends')
        assert job.get(30) == 'result at ' + second and job.stdout == 'printed at %s\n' % second
        assert job.start_time > began and job.status == DispyJob.Finished
        assert text_of('second') == 'written at ' + second
        eventually(lambda: watched.told(watched.printed, 'second')[-1:] == [
            ('printed at %s\n' % second,)])
        eventually(lambda: watched.told(watched.results, 'second')[-1][0] == DispyJob.Finished)
        assert watched.told(watched.results, 'second') == [
            (DispyJob.ProvisionalResult, 'provisional at ' + first),
            (DispyJob.ProvisionalResult, 'provisional at ' + second),
            (DispyJob.Finished, 'result at ' + second)]
        seen = watched.told(watched.statuses, 'second')
        assert seen.count((DispyJob.Running,)) <= 1 and seen.count((DispyJob.Finished,)) == 1
        assert [name for name in os.listdir('.') if not name.endswith('.txt')] == []


def test_a_waiting_job_takes_the_cpu_of_a_second_attempt(place):
    watched = Watched(place)
    attempts = watched.attempts
    with watched.cluster, place.cluster(attempt) as other:
        job = watched.start('long')
        (first, _), (second, _) = attempts.both('long')
        # Of another cluster, which is another program to the scheduler and to the Schedule
        assert other.submit(attempts.directory, '').get(30) == ''
        eventually(lambda: attempts.is_cancelled('long', second))
        eventually(lambda: job.status == DispyJob.ProvisionalResult)
        assert not attempts.is_cancelled('long', first)
        attempts.let('long', 'ends', first)
        assert job.get(30) == 'result at ' + first


@pytest.mark.parametrize('which', ['first', 'second'])
def test_the_node_of_one_attempt_is_lost(place, which):
    watched = Watched(place, pulse_interval=0.5)
    with watched.cluster:
        job = watched.start('job')
        (first, _), (second, _) = watched.attempts.both('job')
        lost, left = (first, second) if which == 'first' else (second, first)
        place.nodes[lost].kill()
        watched.attempts.let('job', 'ends', left)
        assert job.get(60) == 'result at ' + left and text_of('job') == 'written at ' + left
        assert job.stdout == 'printed at %s\n' % left
        eventually(lambda: watched.told(watched.results, 'job')[-1] == (
            DispyJob.Finished, 'result at ' + left))


PROGRAM = '''#!/bin/sh
case $PWD in */a/node/*) node=a;; *) node=b;; esac
[ $2 = quick ] && { echo quick > out.dat; exit 0; }
touch $1/$2.$node
while [ ! -e $1/$2-ends-$node ]; do sleep 0.02; done
echo "from $node" > out.dat
'''


def test_files_of_a_program_are_those_of_the_attempt_that_counts(place):
    with open('program', 'w') as file:
        file.write(PROGRAM)
    os.chmod('program', 0o755)
    directory = place.root / 'attempts'
    directory.mkdir()
    with place.cluster('./program', reentrant=True, speculate=True, returns=['out.dat'],
                       dest='results/{id}') as cluster:
        cluster.wait_nodes(2, 30)
        cluster.gather([cluster.submit(str(directory), 'quick') for _ in range(12)], 60)
        job = cluster.submit_job_id('slow', str(directory), 'slow')
        begun = [directory / ('slow.%s' % name) for name in NAMES]
        eventually(lambda: all(path.exists() for path in begun), what='second attempt')
        first = min(begun, key=lambda path: path.stat().st_mtime_ns).suffix[1:]
        second = 'b' if first == 'a' else 'a'
        (directory / ('slow-ends-%s' % second)).touch()
        assert job.get(30) == 0
        with open('results/slow/out.dat') as file:
            assert file.read() == 'from %s\n' % second
        assert os.listdir('results/slow') == ['out.dat']
    assert sorted(os.listdir('.')) == ['program', 'results']
    assert not [name for name in os.listdir('results') if name.startswith('.')]


@pytest.mark.parametrize('cluster', [dispy.JobCluster, dispy.SharedJobCluster])
def test_speculate_needs_reentrant(cluster):
    with pytest.raises(ValueError, match='speculate=True needs reentrant=True'):
        cluster(attempt, speculate=True)
    with pytest.raises(TypeError, match='speculate'):
        cluster(attempt, reentrant=True, speculate='yes')


def test_one_node_never_does(make_cluster, tmp_path):
    attempts = Attempts(tmp_path / 'attempts')
    with make_cluster(attempt, nodes='local', reentrant=True, speculate=True) as cluster:
        cluster.gather([cluster.submit(attempts.directory, '') for _ in range(12)], 30)
        job = cluster.submit(attempts.directory, 'one', dispy_cpus=1)
        eventually(lambda: os.path.exists('one.txt'))
        os.unlink('one.txt')
        assert cluster.submit(attempts.directory, '').get(30) == ''
        job_count = len(cluster.jobs())
        cluster.cancel(job)
        assert job.wait(30) and job_count <= 1


# -- programs that are killed ----------------------------------------------------------------------

KILLED = '''
import os, signal, sys
sys.path[:0] = {paths!r}
import cloudpickle
import dispy
import test_second_attempts
from test_second_attempts import Attempts, attempt

cloudpickle.register_pickle_by_value(test_second_attempts)   # nodes import no pytest
kind, directory, options, *ports = sys.argv[1:]
options = eval(options)
if kind == 'JobCluster':
    cluster = dispy.JobCluster(attempt, nodes=[('127.0.0.1', int(port)) for port in ports],
                               reentrant=True, speculate=True, **options)
else:
    cluster = dispy.SharedJobCluster(attempt, scheduler_port=int(ports[0]), reentrant=True,
                                     speculate=True, **options)
attempts = Attempts(directory)
cluster.wait_nodes(2, 30)
cluster.gather([cluster.submit(directory, '') for _ in range(12)], 30)
job = cluster.submit_job_id('job', directory, 'job')
print(attempts.both('job'), flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
'''
PATHS_HERE = [*PATHS, os.path.dirname(os.path.abspath(__file__))]


def killed(place, attempts, **options):
    """A program that was killed when its job ran twice; (name, process) of both."""
    ports = [node.port for node in place.nodes.values()]
    if place.scheduler is not None:
        ports = [place.scheduler.port]
    process = subprocess.Popen(
        [sys.executable, '-c', textwrap.dedent(KILLED).format(paths=PATHS_HERE), place.kind,
         attempts.directory, repr(options), *map(str, ports)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, universal_newlines=True)
    try:
        both = eval(process.stdout.readline())
        process.communicate('die\n', timeout=30)
    finally:
        process.kill()
        process.wait()
    return both


@pytest.mark.parametrize('wins', ['first', 'second'])
@pytest.mark.parametrize('noted', [True, False])
def test_recovery_sees_one_job(place, tmp_path, caplog, wins, noted):
    attempts = Attempts(tmp_path / 'attempts')
    path = str(tmp_path / 'jobs') if noted else None
    both = killed(place, attempts, recover_file=path)
    (name, _), (loser, pid) = both if wins == 'first' else both[::-1]
    attempts.let('job', 'ends', name)
    if noted:
        jobs = dispy.recover_jobs(path, timeout=60)
    else:
        [left] = [row for row in dispy.recoverable() if row.jobs]
        jobs = dispy.recover_jobs(left.path, timeout=60)
    [job] = [job for job in jobs if job.result and 'result at' in str(job.result)]
    assert len(jobs) <= 13 and job.status == DispyJob.Finished
    assert job.result == 'result at ' + name
    eventually(lambda: not lives(pid), what='end of the other attempt')
    if place.scheduler is None or wins == 'first':
        assert text_of('job') == 'written at ' + name
    else:
        # The scheduler may have passed the file on before its program was killed
        assert 'job.txt have not come' in caplog.text or text_of('job') == 'written at ' + name
    assert os.listdir('.') == ['job.txt']


@pytest.mark.parametrize('wins', ['first', 'second'])
def test_a_scheduler_that_is_started_again_knows_of_both(tmp_path, monkeypatch, wins):
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    with place_of('SharedJobCluster', tmp_path) as place:
        watched = Watched(place, pulse_interval=0.5)
        with watched.cluster:
            job = watched.start('job')
            (first, _), (second, _) = watched.attempts.both('job')
            place.scheduler.kill()
            words = [word for node in place.nodes.values()
                     for word in ('-n', '127.0.0.1:%d' % node.port)]
            with SchedulerProcess(tmp_path / 'scheduler', *words, port=place.scheduler.port):
                name = first if wins == 'first' else second
                watched.attempts.let('job', 'ends', name)
                assert job.get(60) == 'result at ' + name
                assert text_of('job') == 'written at ' + name
                watched.cluster.close(30)
