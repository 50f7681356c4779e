"""What jobs do to their worker, and what becomes of them: real processes on an embedded node."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

import dispy
import dispynode
from conftest import eventually, lives
from nodes import NodeProcess

KEPT = 256 * 1024
SPAWNS = os.environ.get('DISPY_START_METHOD') == 'spawn'


@pytest.fixture
def run(make_cluster):
    """run(function, *args) -> ended job, all on one embedded node; further clusters share it."""
    clusters = {}

    def call(function, *args, **kwargs):
        if function not in clusters:
            clusters[function] = make_cluster(function, nodes='local')
        job = clusters[function].submit(*args, **kwargs)
        assert job.wait(30), 'the job did not end'
        return job

    call.clusters = clusters
    yield call
    for cluster in clusters.values():
        cluster.close(terminate=True)


def die(way):
    if way == 'killed':
        os.kill(os.getpid(), signal.SIGKILL)
    elif way == 'segfault':
        ctypes.string_at(0)
    elif way == 'abort':
        os.abort()
    elif way == 'exit 0':
        os._exit(0)
    elif way == 'exit 7':
        os._exit(7)
    return way


WAYS = {'killed': 'SIGKILL', 'segfault': 'SIGSEGV', 'abort': 'SIGABRT', 'exit 0': 'exit code 0',
        'exit 7': 'exit code 7'}


def test_a_thousand_jobs_of_which_two_hundred_kill_their_worker(make_cluster):
    """All end, each with the right status and text, and every CPU can be used afterwards. Where
    each worker is started anew, which takes much longer, twenty."""
    apart = 50 if SPAWNS else 5
    with make_cluster(die, nodes='local') as cluster:
        ways = list(WAYS)
        jobs = [cluster.submit(ways[n // apart % 5] if n % apart == 0 else n) for n in range(1000)]
        assert cluster.wait(120)
        for n, job in enumerate(jobs):
            if n % apart:
                assert (job.status, job.result, job.exception) == (job.Finished, n, None)
            else:
                assert job.status == job.Terminated and job.result is None
                assert WAYS[ways[n // apart % 5]] in job.exception, job.exception
        node, = cluster.status().nodes
        assert node.busy == 0 and node.jobs_done == 1000
        assert (sorted(job() for job in [cluster.submit(n) for n in range(2 * node.cpus)])
                == list(range(2 * node.cpus)))


def test_the_text_of_a_killed_job_has_the_node_and_the_end_of_stderr(run):
    def compute():
        print('printed before', flush=True)
        sys.stderr.write('last words\n')
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    job = run(compute)
    node, = run.clusters[compute].status().nodes
    assert (node.name in job.exception and 'last words' in job.exception
            and 'memory' in job.exception)
    assert job.stdout == 'printed before\n' and job.stderr == 'last words\n'


class Refuses:
    def __reduce__(self):
        raise ValueError('I do not travel')


class OpensBadly:
    def __reduce__(self):
        return (int, ('no number',))


class ErrorOfTwo(Exception):
    def __init__(self, one, two):
        super().__init__('%s %s' % (one, two))


class ErrorThatCannotBeShown(Exception):
    def __str__(self):
        raise ValueError('not even this')


def misbehave(how):
    if how == 'unpicklable result':
        return Refuses()
    if how == 'lock':
        return threading.Lock()
    if how == 'result that does not open':
        return OpensBadly()
    if how == 'error that does not open':
        raise ErrorOfTwo('this', 'that')
    if how == 'error that cannot be shown':
        raise ErrorThatCannotBeShown
    if how == 'base exception':
        raise BaseException('from the bottom')
    if how == 'sys.exit':
        sys.exit(3)
    if how == 'keyboard interrupt':
        raise KeyboardInterrupt
    if how == 'recursion':
        return misbehave(how)
    if how == 'memory':
        raise MemoryError('no more')
    return how


@pytest.mark.parametrize('how, text', [
    ('unpicklable result', 'I do not travel'), ('lock', 'could not be pickled'),
    ('result that does not open', 'no number'),
    ('error that does not open', 'this that'),
    ('error that cannot be shown', 'ErrorThatCannotBeShown'),
    ('base exception', 'from the bottom'), ('sys.exit', 'SystemExit: 3'),
    ('keyboard interrupt', 'KeyboardInterrupt'),
    ('recursion', 'RecursionError'), ('memory', 'no more')])
def test_jobs_that_fail_in_odd_ways_are_terminated_with_a_text(run, how, text):
    job = run(misbehave, how)
    assert job.status == job.Terminated and job.result is None
    assert text in job.exception
    assert run(misbehave, 'well').result == 'well'


def test_an_exception_comes_back_as_an_object_and_as_text(run):
    def compute(x):
        raise ValueError('bad %s' % x)
    job = run(compute, 5)
    assert isinstance(job.error, ValueError) and job.error.args == ('bad 5',)
    assert (job.exception.startswith('Traceback') and 'in compute' in job.exception
            and 'dispynode' not in job.exception)


def test_a_class_of_this_module_comes_back_as_itself(run):
    job = run(misbehave, ErrorOfTwo)
    assert job.result is ErrorOfTwo


# -- output ----------------------------------------------------------------------------------------

def print_much(how, megabytes):
    block = b'x' * 1023 + b'\n'
    sys.stdout.write('first\n')
    sys.stdout.flush()
    if how == 'python':
        for _ in range(megabytes * 1024):
            sys.stdout.write(block.decode())
    elif how == 'child':
        subprocess.check_call([sys.executable, '-c', 'import os\nfor '
                               'n in range(%d): os.write(1, %r * 64)' % (megabytes * 16, block)])
    elif how == 'C':   # with the interpreter lock held all the while
        libc = ctypes.PyDLL(None)
        for _ in range(megabytes * 16):
            libc.write(1, block * 64, 65536)
    sys.stdout.write('last\n')


@pytest.mark.parametrize('how', ['python', 'child', 'C'])
def test_of_a_hundred_megabytes_printed_the_ends_are_kept(run, how):
    job = run(print_much, how, 100)
    assert job.status == job.Finished, job.exception
    assert job.stdout.startswith('first\nxxx') and job.stdout.endswith('xxx\nlast\n')
    assert 'bytes left out here' in job.stdout
    assert len(job.stdout) < 2 * KEPT + 100
    assert run(print_much, 'nothing', 0).stdout == 'first\nlast\n'


def test_output_of_python_c_and_children_is_the_jobs(run):
    def compute(n):
        print('python', n)
        sys.stdout.flush()
        subprocess.check_call(['sh', '-c', 'echo child; echo oops >&2'])
        ctypes.CDLL(None).puts(b'C')
        return n
    for n in range(3):
        job = run(compute, n)
        assert job.stdout == 'python %d\nchild\nC\n' % n
        assert job.stderr == 'oops\n'


def test_output_is_bounded_at_its_exact_edge(run):
    def compute(size):
        sys.stdout.write('x' * size)
    for size in (2 * KEPT - 1, 2 * KEPT):
        assert run(compute, size).stdout == 'x' * size
    assert '[dispy: 1 bytes left out here]' in run(compute, 2 * KEPT + 1).stdout


@pytest.mark.skipif(not sys.platform.startswith('linux'),
                    reason='blocks in the middle of a file are given back on Linux only')
def test_the_disk_holds_only_the_ends_of_much_output(tmp_path):
    catch = dispynode.CapturedOutput(str(tmp_path))
    try:
        for letter in b'abc':
            for _ in range(10):
                os.write(catch.handle, bytes([letter]) * (1 << 20))
            catch.shorten(dispynode._libc())
            if os.fstat(catch.handle).st_blocks * 512 > 5 << 20:
                pytest.skip('this file system keeps the blocks')
        text = catch.take(os.fstat(catch.handle).st_size)
        assert (text.startswith(b'a' * KEPT) and text.endswith(b'c' * KEPT)
                and len(text) < 2 * KEPT + 100)
        assert b'%d bytes left out' % ((30 << 20) - 2 * KEPT) in text
        assert os.fstat(catch.handle).st_size == 0
    finally:
        catch.close()


# -- what a job leaves behind ----------------------------------------------------------------------

def leave(what):
    """Change the process; afterwards `look` must not see it."""
    if what == 'cwd':
        os.chdir('/')
    elif what == 'environment':
        os.environ['LEFT'] = 'behind'
        del os.environ['PATH']
    elif what == 'handlers':
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
    elif what == 'alarm':
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    elif what == 'umask':
        os.umask(0o777)
    elif what == 'recursion':
        sys.setrecursionlimit(100000)
    elif what == 'trace':
        sys.settrace(lambda *args: None)
    elif what == 'stdout':
        sys.stdout = sys.stderr = sys.stdin = None
    elif what == 'closed stdout':
        sys.stdout.close()
    elif what == 'descriptors':
        os.closerange(0, 1024)
    elif what == 'redirected':
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    elif what == 'thread':
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    elif what == 'child':
        return subprocess.Popen(['sleep', '1000']).pid
    elif what == 'daemon child':
        out = subprocess.check_output(['sh', '-c', 'setsid sleep 1000 >/dev/null 2>&1 & echo $!'])
        return int(out)
    return None


def look(what):
    if what != 'look':
        return leave(what)
    print('to stdout')
    print('to stderr', file=sys.stderr)
    time.sleep(0.1)
    return (os.getcwd() == dispy_job_path,   # noqa: F821
            os.environ.get('LEFT'), 'PATH' in os.environ,
            [signal.getsignal(number) == signal.SIG_DFL
             for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)],
            threading.active_count(), sys.stdin.read(), os.umask(0o022) == 0o777,
            sys.getrecursionlimit() > 50000, sys.gettrace())


@pytest.mark.parametrize('what', ['cwd', 'environment', 'handlers', 'alarm', 'umask', 'recursion',
                                  'trace', 'stdout', 'closed stdout', 'descriptors',
                                  'redirected', 'thread', 'child', 'daemon child'])
def test_nothing_of_a_job_is_left_for_the_next(make_cluster, what):
    with make_cluster(look, nodes='local') as cluster:
        cpus = (cluster.submit('nothing')
                and eventually(lambda: [n for n in cluster.status().nodes if n.cpus])[0].cpus)
        pids = [job() for job in [cluster.submit(what) for _ in range(cpus * 2)]]
        jobs = [cluster.submit('look') for _ in range(cpus * 2)]
        for job in jobs:
            assert job() == (True, None, True, [True] * 3, 1, '', False, False, None), job.exception
            assert (job.stdout, job.stderr) == ('to stdout\n', 'to stderr\n')
        eventually(lambda: not any(pid and psutil.pid_exists(pid) for pid in pids),
                   what='the end of the children')


def test_globals_of_the_computation_stay_within_a_worker(run):
    """What a job does to the computation's globals is the one thing that the next one sees."""
    def compute():
        global seen_before
        try:
            seen_before += 1
        except NameError:
            seen_before = 1
        return os.getpid(), seen_before
    counts = [run(compute).result for _ in range(10)]
    assert max(count for _, count in counts) > 1


# -- ending jobs -----------------------------------------------------------------------------------

def stubborn(flag):
    """Ignores what can be ignored, and has a child and a grandchild that do too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    script = 'trap "" INT TERM; (setsid sleep 1000 >/dev/null 2>&1) & sleep 1000 & echo $$; wait'
    process = subprocess.Popen(['sh', '-c', script], stdout=subprocess.PIPE)
    with open(flag + '.tmp', 'w') as file:
        file.write('%d %d' % (os.getpid(), int(process.stdout.readline())))
    os.rename(flag + '.tmp', flag)
    while True:
        time.sleep(1)


@pytest.mark.parametrize('how', ['cancel', 'timeout'])
def test_a_job_that_ignores_signals_is_gone_with_its_descendants(make_cluster, tmp_path, how):
    flag = str(tmp_path / 'flag')
    with make_cluster(stubborn, nodes='local') as cluster:
        job = cluster.submit(flag, dispy_timeout=0.5 if how == 'timeout' else None)
        eventually(lambda: os.path.exists(flag))
        with open(flag) as file:
            pids = [int(pid) for pid in file.read().split()]
        family = [child for pid in pids for child in psutil.Process(pid).children(recursive=True)]
        assert len(family) >= 3
        if how == 'cancel':
            assert cluster.cancel(job) == 0
        assert job.wait(15)
        assert job.status == (job.Cancelled if how == 'cancel' else job.Terminated)
        assert ('cancelled' if how == 'cancel' else 'dispy_timeout') in job.exception
        eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids))
        eventually(lambda: not any(child.is_running() and child.status() != 'zombie'
                                   for child in family))
        assert cluster.cancel(job) == -1


def test_a_cancelled_job_sees_keyboard_interrupt_and_may_still_return(make_cluster):
    def compute(flag, give_in):
        with open(flag, 'w'):
            pass
        try:
            time.sleep(1000)
        except KeyboardInterrupt:
            if give_in:
                raise
            return 'saved'

    with make_cluster(compute, nodes='local') as cluster:
        import tempfile
        with tempfile.TemporaryDirectory() as directory:
            jobs = [cluster.submit(os.path.join(directory, str(give_in)), give_in)
                    for give_in in (False, True)]
            eventually(lambda: len(os.listdir(directory)) == 2)
            for job in jobs:
                cluster.cancel(job)
            assert cluster.wait(20)
        assert (jobs[0].status, jobs[0].result) == (dispy.DispyJob.Finished, 'saved')
        assert jobs[1].status == dispy.DispyJob.Cancelled


def test_a_job_that_is_cancelled_before_its_worker_has_read_it_never_begins(make_cluster, tmp_path):
    def compute(path):
        if path:
            with open(path, 'w'):
                pass
        time.sleep(0.02)
        return os.getpid()

    flag = str(tmp_path / 'flag')
    with make_cluster(compute, nodes='local') as cluster:
        cluster.wait_nodes(1, 30)
        cpus = cluster.status().nodes[0].cpus
        pids = set()
        eventually(lambda: pids.update(job() for job in [cluster.submit('') for _ in range(20)])
                   or len(pids) == cpus)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            jobs = [cluster.submit(flag) for _ in range(cpus)]
            eventually(lambda: jobs[0].status == dispy.DispyJob.Running)
            for job in jobs:
                cluster.cancel(job)
            time.sleep(0.5)   # the runner, which nothing shows, has noted the end of the jobs
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        assert cluster.wait(20)
    for job in jobs:
        assert job.status == dispy.DispyJob.Cancelled and 'before it started' in job.exception
    assert not os.path.exists(flag)


def test_cancelling_hits_no_other_job(make_cluster):
    """Jobs are cancelled in the moment in which they end: no interrupt strays into the next."""
    def compute(n):
        return n
    with make_cluster(compute, nodes='local') as cluster:
        jobs = []
        for n in range(300):
            job = cluster.submit(n)
            jobs.append(job)
            if n % 3 == 0:
                cluster.cancel(job)
        assert cluster.wait(60)
    for n, job in enumerate(jobs):
        if n % 3:
            assert (job.status, job.result) == (job.Finished, n), job.exception
        else:
            assert job.status in (job.Finished, job.Cancelled)


def test_a_job_behind_a_long_one_is_given_back_and_run_elsewhere(make_cluster):
    """Short jobs are handed to workers ahead; those that stand behind a long one do not wait for
    it."""
    def compute(flag):
        if flag:
            while not os.path.exists(flag):
                time.sleep(0.01)
        return flag

    import tempfile
    with tempfile.TemporaryDirectory() as directory, make_cluster(compute,
                                                                  nodes='local') as cluster:
        for _ in range(3):
            # So they are known to be short
            assert all(job() is None for job in [cluster.submit(None) for _ in range(300)])
            flag = os.path.join(directory, 'flag')
            long, short = cluster.submit(flag), [cluster.submit(None) for _ in range(200)]
            assert all(job.wait(20) for job in short)
            assert long.status not in dispy.ENDED
            with open(flag, 'w'):
                pass
            assert long(20) == flag
            os.unlink(flag)


@pytest.mark.parametrize('more, printed', [(0, 'lives\n'), (1, '')])
def test_a_worker_whose_runner_has_ended_before_it_could_ask_ends(more, printed):
    """Nobody knows of it, and it would run jobs that another worker runs as well."""
    code = ("import os, dispynode; dispynode.end_with_parent(None, os.getppid() + %d); "
            "print('lives')" % more)
    found = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, timeout=60,
                           universal_newlines=True)
    assert found.stdout == printed and found.returncode == more


# -- setup -----------------------------------------------------------------------------------------

@pytest.mark.fork('setup runs once in each worker: see test_start_method.py')
def test_setup_runs_once_and_shares_its_globals(make_cluster):
    def setup():
        global table
        table = {'made by': os.getpid()}

    def compute(n):
        return table['made by'], os.getpid(), n

    with make_cluster(compute, nodes='local', setup=setup) as cluster:
        results = [job() for job in [cluster.submit(n) for n in range(50)]]
    assert len({made for made, _, _ in results}) == 1
    assert all(made != pid for made, pid, _ in results)
    assert [n for _, _, n in results] == list(range(50))


def test_what_setup_started_ends_with_the_computation(make_cluster, tmp_path):
    flag = str(tmp_path / 'pid')

    def setup():
        process = subprocess.Popen(['sleep', '1000'], start_new_session=True)
        with open(flag, 'w') as file:
            file.write(str(process.pid))

    with make_cluster(os.getpid, nodes='local', setup=setup) as cluster:
        assert cluster.submit()() and cluster.submit()()
        with open(flag) as file:
            pid = int(file.read())
        assert psutil.pid_exists(pid)
    eventually(lambda: not psutil.pid_exists(pid))


def test_cleanup_runs_after_the_last_job(make_cluster, tmp_path):
    mark = str(tmp_path / 'cleaned')

    def setup():
        global path
        path = mark

    def cleanup():
        with open(path, 'w') as file:
            file.write(str(os.getpid()))

    with make_cluster(os.getpid, nodes='local', setup=setup, cleanup=cleanup) as cluster:
        assert cluster.submit()() > 0
        assert not os.path.exists(mark)
    eventually(lambda: os.path.exists(mark))


def _raise():
    raise ValueError('no data here')


def _refuse():
    return 'not today'


@pytest.mark.parametrize('setup, text', [(_raise, 'no data here'), (_refuse, 'not today'),
                                         (lambda: os._exit(5), 'exit code 5'),
                                         (lambda: sys.exit('over'), 'over')])
def test_setup_that_fails_refuses_the_node_and_says_why(make_cluster, setup, text, caplog):
    cluster = make_cluster(abs, nodes='local', setup=setup)
    job = cluster.submit(-1)
    node = eventually(lambda: [node for node in cluster.status().all_nodes
                               if node.state == 'refused'])[0]
    assert text in node.reason
    with pytest.raises(dispy.NoNodes, match=text):
        cluster.wait_nodes(1, timeout=0.1)
    assert any(text in record.getMessage() for record in caplog.records)
    assert job.status == job.Created
    cluster.close(terminate=True)
    assert job.status == job.Cancelled


@pytest.mark.parametrize('ignores_signals', [False, True])
def test_a_setup_that_hangs_is_ended_by_a_limit(make_cluster, tmp_path, ignores_signals):
    """The node says so, nothing of it is left there, and it serves the next."""
    flag = str(tmp_path / 'flag')

    def setup():
        if ignores_signals:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        process = subprocess.Popen(['sleep', '1000'], start_new_session=not ignores_signals)
        with open(flag + '.tmp', 'w') as file:
            file.write('%d %d' % (os.getpid(), process.pid))
        os.rename(flag + '.tmp', flag)
        time.sleep(1000)
    node_of_little_patience = tmp_path / 'impatient.py'
    seconds = 8 if SPAWNS else 2   # a Python starts within that time
    node_of_little_patience.write_text(
        'import dispynode, sys\ndispynode.SETUP_TIME = %d.0\n' % seconds +
        'if __name__ == "__main__":\n    sys.exit(dispynode.main())\n')
    with NodeProcess(tmp_path / 'node', script=str(node_of_little_patience)) as node:
        with make_cluster(abs, nodes=[node.address], setup=setup,
                          loglevel=logging.CRITICAL) as cluster:
            job = cluster.submit(-1)
            reason = eventually(lambda: [n.reason for n in cluster.status().all_nodes
                                         if n.state == 'refused'])[0]
            assert 'setup did not end within %d s' % seconds in reason
            with open(flag) as file:
                pids = [int(pid) for pid in file.read().split()]
            eventually(lambda: not any(map(lives, pids)))
            with pytest.raises(dispy.NoNodes, match='setup did not end within %d s' % seconds):
                cluster.wait_nodes(1, 0.1)
            assert job.status == job.Created and cluster.cancel(job) == 0
        with make_cluster(abs, nodes=[node.address]) as cluster:
            assert cluster.submit(-2)(20) == 2


def test_what_a_setup_started_ends_when_it_fails(make_cluster, tmp_path):
    flag = str(tmp_path / 'pid')

    def setup():
        with open(flag, 'w') as file:
            file.write(str(subprocess.Popen(['sleep', '1000'], start_new_session=True).pid))
        raise ValueError('no')
    with make_cluster(abs, nodes='local', setup=setup, loglevel=logging.CRITICAL) as cluster:
        eventually(lambda: [n for n in cluster.status().all_nodes if n.state == 'refused'])
        with open(flag) as file:
            pid = int(file.read())
        eventually(lambda: not psutil.pid_exists(pid))


def test_max_jobs_per_worker(make_cluster):
    with make_cluster(os.getpid, nodes='local', max_jobs_per_worker=3) as cluster:
        pids = [job() for job in [cluster.submit() for _ in range(30)]]
    assert max(pids.count(pid) for pid in pids) <= 3


def test_random_numbers_differ_between_workers(make_cluster):
    def compute(flag):
        import random
        return os.getpid(), random.random()
    with make_cluster(compute, nodes='local', max_jobs_per_worker=1) as cluster:
        numbers = [job()[1] for job in [cluster.submit(n) for n in range(10)]]
    assert len(set(numbers)) == 10
