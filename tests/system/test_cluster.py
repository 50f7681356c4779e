"""What a user can do with a JobCluster, on an embedded node."""

import functools
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

import dispy
from conftest import ROOT, eventually
from dispy import DispyJob
from nodes import NodeProcess


def square(n):
    return n * n


@pytest.fixture
def cluster(make_cluster):
    with make_cluster(square, nodes='local') as cluster:
        yield cluster


def packages():
    return set(sys.modules)


def script(text, *args, **kwargs):
    """Run a program of a user's in a process of its own; (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(text), *args],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          cwd=kwargs.pop('cwd', ROOT), timeout=60, **kwargs)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# -- jobs ------------------------------------------------------------------------------------------

def test_results_come_back_with_all_that_belongs_to_them(cluster):
    before = time.time()
    job = cluster.submit(7)
    assert job() == 49
    assert ((job.id, job.status, job.exception, job.error, job.stdout, job.stderr)
            == (1, DispyJob.Finished, None, None, '', ''))
    assert before - 1 <= job.submit_time <= job.start_time <= job.end_time <= time.time() + 1
    assert job.ip_addr == '127.0.0.1'
    assert job.finish.is_set() and job.wait(0) and job(0) == 49
    assert repr(job) == '<DispyJob 1 finished>'


def test_the_numbers_of_states_are_those_of_dispy_4():
    names = 'Created Running ProvisionalResult Cancelled Terminated Abandoned Finished'
    assert [getattr(DispyJob, name) for name in names.split()] == [5, 6, 7, 8, 9, 10, 11]


def test_many_jobs(cluster):
    jobs = [cluster.submit(n) for n in range(5000)]
    assert [job() for job in jobs] == [n * n for n in range(5000)]
    assert cluster.wait(0) and cluster.status().jobs_pending == 0
    node, = cluster.status().nodes
    assert (node.state, node.jobs_done, node.busy) == ('ready', 5000, 0)


def test_a_job_imports_nothing_of_the_tests(make_cluster):
    """Each runner would take more CPU time for pytest than for most jobs of the tests."""
    with make_cluster(packages, nodes='local') as cluster:
        assert {'pytest', 'conftest', 'test_cluster'} & cluster.submit()(20) == set()


def test_ids_are_the_users(cluster):
    job = cluster.submit_job_id(('mine', 1), 3)
    assert (job(), job.id) == (9, ('mine', 1))
    job.id = 'changed'
    assert job.id == 'changed'


def test_keyword_arguments(make_cluster):
    def compute(a, b=1, **others):
        return a, b, others
    with make_cluster(compute, nodes='local') as cluster:
        assert cluster.submit(1, b=2, c=3)() == (1, 2, {'c': 3})


def test_arguments_are_taken_when_submitted(make_cluster, cluster):
    with make_cluster(sum, nodes='local') as cluster:
        numbers = [1, 2, 3]
        big = bytearray(1 << 20)
        first, second = cluster.submit(numbers), cluster.submit(big)
        numbers.append(100)
        big[:] = b'\x01' * len(big)
        assert (first(), second()) == (6, 0)


def test_what_cannot_be_pickled_raises_in_submit_and_leaves_nothing(cluster):
    with pytest.raises(TypeError):
        cluster.submit(threading.Lock())
    assert cluster.status().jobs_pending == 0
    assert cluster.submit(2)() == 4


@pytest.mark.parametrize('option, value, error, text', [
    ('dispy_timeout', -1, ValueError, 'dispy_timeout=-1'),
    ('dispy_cpus', 0, ValueError, 'dispy_cpus=0'),
    ('dispy_priority', 'high', ValueError, "dispy_priority='high'"),
    ('dispy_colour', 1, TypeError, 'dispy_colour')])
def test_bad_options_of_a_job(cluster, option, value, error, text):
    with pytest.raises(error, match=text):
        cluster.submit(1, **{option: value})
    assert cluster.status().jobs_pending == 0


def test_priorities(make_cluster):
    def compute(n):
        time.sleep(0.05)
        return time.time()
    with make_cluster(compute, nodes='local') as cluster:
        cluster.wait_nodes(1, 20)
        cpus = cluster.status().nodes[0].cpus
        first = [cluster.submit(n) for n in range(2 * cpus)]       # all CPUs, and one more for each
        low = [cluster.submit(n, dispy_priority=-1) for n in range(2 * cpus)]
        high = [cluster.submit(n, dispy_priority=5) for n in range(2 * cpus)]
        assert cluster.wait(30)
        assert max(job.start_time for job in high) <= min(job.start_time for job in low) + 0.04
        assert all(job.status == DispyJob.Finished for job in first)


def test_a_job_that_takes_all_cpus_is_alone(make_cluster):
    def compute(n, log):
        with open(log, 'a') as file:
            file.write('+')
        time.sleep(0.02)
        with open(log, 'a') as file:
            file.write('-')
    import tempfile
    with tempfile.NamedTemporaryFile() as log, make_cluster(compute, nodes='local') as cluster:
        cluster.wait_nodes(1, 20)
        cpus = cluster.status().nodes[0].cpus
        for n in range(10):
            cluster.submit(n, log.name, dispy_cpus=cpus)
        assert cluster.wait(30)
        assert log.read() == b'+-' * 10


def test_two_jobs_of_three_cpus_are_never_together_on_a_node_of_four(make_cluster, tmp_path):
    def compute(log, marks):
        with open(log, 'ab', 0) as file:
            file.write(marks[:1])
            time.sleep(0.02)
            file.write(marks[1:])
    log = tmp_path / 'log'
    with NodeProcess(tmp_path / 'node',
                     cpus=4) as node, make_cluster(compute, nodes=[node.address]) as cluster:
        for _ in range(20):
            cluster.submit(str(log), b'<>', dispy_cpus=3)
            cluster.submit(str(log), b'ab')
        assert cluster.wait(30)
    text = log.read_bytes()
    assert text.count(b'a') == text.count(b'b') == 20
    assert text.replace(b'a', b'').replace(b'b', b'') == b'<>' * 20
    assert b'<>' * 20 not in text   # a job of one CPU beside them: they were not alone


def test_timeout_of_waiting_and_of_calling(make_cluster, cluster):
    with make_cluster(time.sleep, nodes='local') as sleepers:
        job = sleepers.submit(1000)
        assert not job.wait(0.05)
        with pytest.raises(TimeoutError):
            job(0.05)
        assert not sleepers.wait(0.05)
        assert not sleepers.close(timeout=0.05)
        eventually(lambda: job.status == DispyJob.Running)
        assert sleepers.cancel(job) == 0
        assert job.wait(20) and job.status == DispyJob.Cancelled and job() is None


def test_cancel_a_waiting_job(make_cluster):
    with make_cluster(square, nodes=[('127.0.0.1', 9)], loglevel=logging.CRITICAL) as cluster:
        jobs = [cluster.submit(n) for n in range(10)]
        assert cluster.cancel(jobs[4]) == 0
        assert jobs[4].wait(5) and jobs[4].status == DispyJob.Cancelled
        assert jobs[5].status == DispyJob.Created
        assert cluster.close(terminate=True)
        assert {job.status for job in jobs} == {DispyJob.Cancelled}


# -- what can be a computation ---------------------------------------------------------------------

FACTOR = 3


def scale(n):
    return helper(n) * FACTOR


def helper(n):
    return n + 1


class Shape:
    def __init__(self, side):
        self.side = side

    def area(self, times=1):
        return square(self.side) * times

    @classmethod
    def unit(cls, n):
        return cls(n).area()

    @staticmethod
    def twice(n):
        return 2 * n

    def __call__(self, n):
        return self.side + n


def adder(n):
    return lambda m: n + m


@pytest.mark.parametrize('computation, argument, expected', [
    (scale, 1, 6), (lambda n: n + FACTOR, 1, 4), (adder(10), 1, 11),
    (functools.partial(pow, 2), 5, 32), (Shape(4).area, 2, 32),
    (Shape.unit, 3, 9), (Shape.twice, 4, 8), (Shape(1), 2, 3), (len, 'four', 4), (Shape, 5, None)])
def test_any_callable_is_a_computation(make_cluster, computation, argument, expected):
    with make_cluster(computation, nodes='local') as cluster:
        job = cluster.submit(argument)
        result = job()
        assert job.exception is None
        if expected is None:
            assert type(result) is Shape and result.area() == 25
        else:
            assert result == expected


def test_functions_as_arguments(make_cluster):
    def apply(function, *args):
        return function(*args)
    with make_cluster(apply, nodes='local') as cluster:
        assert cluster.submit(scale, 1)() == 6
        assert cluster.submit(lambda: FACTOR)() == 3
        assert cluster.submit(Shape(3).area)() == 9


def test_depends_files_directories_modules_functions(make_cluster, tmp_path):
    (tmp_path / 'data.txt').write_text('42')
    package = tmp_path / 'shapes_package'
    (package / 'inner').mkdir(parents=True)
    (package / '__init__.py').write_text('from .inner.deep import DEEP\n')
    (package / 'inner' / '__init__.py').write_text('')
    (package / 'inner' / 'deep.py').write_text('DEEP = "deep"\n')
    sys.path.insert(0, str(tmp_path))
    try:
        import shapes_package

        def compute():
            import shapes_package
            with open('data.txt') as file:
                return (file.read(), shapes_package.DEEP,
                        os.path.exists('shapes_package/inner/deep.py'), unseen(5))

        def unseen(n):
            return n + 1

        source = textwrap.dedent('''
            def compute():
                import shapes_package
                with open('data.txt') as file:
                    return file.read(), shapes_package.DEEP, unseen(5)
        ''')
        names = {}
        exec(source, names)   # a function that cannot see `unseen`
        depends = [str(tmp_path / 'data.txt'), shapes_package, unseen]
        with make_cluster(names['compute'], nodes='local', depends=depends) as cluster:
            job = cluster.submit()
            assert job() == ('42', 'deep', 6), job.exception
    finally:
        sys.path.remove(str(tmp_path))
        for name in [name for name in sys.modules if name.startswith('shapes_package')]:
            del sys.modules[name]


def test_a_program(make_cluster, tmp_path):
    program = tmp_path / 'a program.sh'
    program.write_text('#!/bin/sh\nfor a in "$@"; do echo "<$a>"; done\necho error >&2\n'
                       'printf "\\377"\nexit 3\n')
    with make_cluster(str(program), nodes='local') as cluster:
        job = cluster.submit('one', 'two words', 3)
        assert job() == 3 and job.status == DispyJob.Finished
        assert (job.stdout, job.stderr) == (b'<one>\n<two words>\n<3>\n\xff', b'error\n')
        with pytest.raises(TypeError, match='keyword'):
            cluster.submit(a=1)


def test_a_program_is_interrupted_and_killed(make_cluster, tmp_path):
    program = tmp_path / 'sleeper.sh'
    program.write_text('#!/bin/sh\ntouch "$1"\nexec sleep 1000\n')
    flag = str(tmp_path / 'flag')
    with make_cluster(str(program), nodes='local') as cluster:
        job = cluster.submit(flag)
        eventually(lambda: os.path.exists(flag))
        cluster.cancel(job)
        assert job.wait(20) and job.status == DispyJob.Cancelled


# -- bad input: a clear error at once, nothing started ---------------------------------------------

@pytest.mark.parametrize('arguments, error, text', [
    (dict(computation=5), TypeError,
     'computation must be a function or the path of a program, not int'),
    (dict(computation='/no/such/program'), FileNotFoundError, '/no/such/program'),
    (dict(nodes=5), TypeError, 'nodes: 5'), (dict(nodes=['a:b']), ValueError, "'a:b'"),
    (dict(nodes=['a:70000']), ValueError, '70000'), (dict(secret=5), TypeError, 'secret'),
    (dict(nodes=['']), ValueError, "''"), (dict(nodes=[5]), TypeError, '5'),
    (dict(nodes=[('host', 70000)]), ValueError, '70000'),
    (dict(nodes=[('host', 1, 'x')]), TypeError, "'x'"),
    (dict(nodes=[{'host': 'a', 'colour': 1}]), TypeError, 'colour'),
    (dict(pulse_interval=0), ValueError, 'pulse_interval=0'),
    (dict(ping_interval='x'), ValueError, "ping_interval='x'"),
    (dict(dispy_port=0), ValueError, 'dispy_port=0'),
    (dict(max_jobs_per_worker=0), ValueError, 'max_jobs_per_worker=0'),
    (dict(job_status=1), TypeError, 'job_status'), (dict(depends='x'), TypeError, 'depends'),
    (dict(depends=['/no/such/file']), FileNotFoundError, '/no/such/file'),
    (dict(depends=[5]), TypeError, 'depends'),
    (dict(setup=5), TypeError, 'setup'), (dict(dest_path='../up'), ValueError, 'up'),
    (dict(certfile='/no/such.pem'), dispy.SecretError, '/no/such.pem'),
    (dict(colour='red'), TypeError, 'colour')])
def test_bad_arguments_of_a_cluster(make_cluster, arguments, error, text):
    with pytest.raises(error, match=text):
        make_cluster(**dict(dict(computation=square, nodes='local'), **arguments))


def test_a_program_that_cannot_be_run(make_cluster, tmp_path):
    path = tmp_path / 'data'
    path.write_text('no program')
    with pytest.raises(ValueError, match='not executable'):
        make_cluster(str(path), nodes='local')


def test_submit_on_a_closed_cluster(make_cluster):
    cluster = make_cluster(square, nodes='local')
    assert cluster.close() and cluster.close()
    with pytest.raises(RuntimeError, match='closed'):
        cluster.submit(1)
    assert cluster.status().jobs_pending == 0


def test_bad_environment(make_cluster, monkeypatch):
    monkeypatch.setenv('DISPY_DISCOVERY', 'everywhere')
    with pytest.raises(ValueError, match='DISPY_DISCOVERY'):
        make_cluster(square)


# -- callbacks -------------------------------------------------------------------------------------

def test_callbacks_are_called_once_and_waited_for(make_cluster):
    called, lock = [], threading.Lock()

    def ended(job):
        time.sleep(0.01)
        with lock:
            called.append((job.id, job.status, job.result))
    with make_cluster(square, nodes='local', job_status=ended) as cluster:
        for n in range(100):
            cluster.submit_job_id(n, n)
        assert cluster.wait(30)
        assert sorted(called) == [(n, DispyJob.Finished, n * n) for n in range(100)]


def test_callbacks_that_raise_block_and_submit(make_cluster, caplog):
    more, go = [], threading.Event()

    def ended(job):
        if job.id == 'raise':
            raise ValueError('from the callback')
        if job.id == 'block':
            go.wait(30)
        if job.id == 'submit':
            more.append(cluster.submit_job_id('second', 4))
            more.append(more[0]())
            assert cluster.cancel(more[0]) == -1 and cluster.status().nodes
        if job.id == 'second':
            go.set()
    with make_cluster(square, nodes='local', callback=ended) as cluster:
        for name in ('raise', 'block', 'submit'):
            cluster.submit_job_id(name, 3)
        assert cluster.wait(30)
    assert more[1] == 16 and go.is_set()
    assert any('from the callback' in str(record.exc_info) for record in caplog.records)


def test_waiting_in_a_callback(make_cluster):
    done = []

    def ended(job):
        if job.id == 1:
            done.append(cluster.wait(20))
    with make_cluster(square, nodes='local', callback=ended) as cluster:
        for n in range(10):
            cluster.submit(n)
    assert done == [True]


def test_a_node_is_named_with_its_port(make_cluster, tmp_path):
    with NodeProcess(tmp_path, '--name', 'one') as node:
        where = '127.0.0.1:%d' % node.port
        with make_cluster(square, nodes=[where]) as cluster:
            assert cluster.submit_node(where, 3)(20) == 9 and cluster.set_node_cpus(where, 1) == 1


def test_what_is_no_job(make_cluster):
    with make_cluster(square, nodes='local') as cluster:
        with pytest.raises(TypeError, match='7 is not a job'):
            cluster.cancel(7)
        with pytest.raises(TypeError, match='7 is not a job'):
            next(cluster.as_completed([7]))


def test_cluster_status_is_told_every_change_in_order(make_cluster, tmp_path):
    seen = []
    node = NodeProcess(tmp_path, '--name', 'one')
    with make_cluster(square, nodes=[node.address], loglevel=logging.CRITICAL,
                      cluster_status=lambda *change: seen.append(change)) as cluster:
        job = cluster.submit(4)
        assert job(20) == 16
        eventually(lambda: len(seen) == 5)
        node.stop()
        eventually(lambda: len(seen) == 6)
    of_node = dispy.DispyNode
    assert ([status for status, _, other in seen if other is job]
            == [DispyJob.Created, DispyJob.Running, DispyJob.Finished])
    assert [node and node.name for _, node, other in seen if other is job] == [None, 'one', 'one']
    assert [(status, node.name) for status, node, other in seen if other is None] == [
        (of_node.Initialized, 'one'), (of_node.AvailInfo, 'one'), (of_node.Closed, 'one')]


# -- several clusters ------------------------------------------------------------------------------

def test_clusters_one_after_another_at_once_and_from_threads(make_cluster):
    def work(n):
        with make_cluster(adder(n), nodes='local') as cluster:
            results[n] = [job() for job in [cluster.submit(m) for m in range(50)]]
    results = {}
    for n in range(2):
        work(n)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(2, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [n + m for m in range(50)] for n in range(6)}


def test_two_clusters_share_an_embedded_node():
    with dispy.JobCluster(os.getppid,
                          nodes='local') as one, dispy.JobCluster(square, nodes='local') as two:
        assert one.submit()() and two.submit(3)() == 9
        children = [' '.join(child.cmdline()) for child in psutil.Process().children()]
        assert (len([line for line in children if 'runner_start' in line]) == 2
                and not [line for line in children if '--embedded' in line])
        assert (dispy.core_of(one).driver.connector.local
                is dispy.core_of(two).driver.connector.local)
        one.close()
        assert two.submit(4)() == 16


def test_nodes_none_starts_a_node_when_none_answers(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    with dispy.JobCluster(square, dispy_port=9) as cluster:   # nothing listens at 9
        assert cluster.submit(5)() == 25
    assert (len([record for record in caplog.records if 'one is started' in record.getMessage()])
            == 1)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# -- leaving ---------------------------------------------------------------------------------------

def test_leaving_by_an_exception_cancels_and_lets_it_through(make_cluster):
    with pytest.raises(ZeroDivisionError):
        with make_cluster(time.sleep, nodes='local') as cluster:
            job = cluster.submit(1000)
            1 / 0
    assert job.status == DispyJob.Cancelled


PROGRAM = '''
    import sys, dispy, time, os
    cluster = dispy.JobCluster(time.sleep, nodes='local')
    jobs = [cluster.submit(1000) for _ in range(4)]
    while not any(job.status == job.Running for job in jobs): time.sleep(0.01)
'''
WAIT = '''
try:
    print(os.getpid(), flush=True)
    jobs[0]()
except KeyboardInterrupt:
    print("interrupted", flush=True)
    raise
'''


def test_a_program_that_just_ends_leaves_nothing(tmp_path):
    code, out, err = script(PROGRAM)
    assert code == 0 and '4 jobs that have not ended' in err


def test_control_c_in_a_wait():
    process = subprocess.Popen([sys.executable, '-c', textwrap.dedent(PROGRAM) + WAIT],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.readline()
    program = psutil.Process(process.pid)
    # One job runs; the worker of another may not be there yet
    eventually(lambda: len(program.children(recursive=True)) >= 3)
    children = program.children(recursive=True)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert b'interrupted' in out and process.returncode != 0
    eventually(lambda: not any(child.is_running() for child in children),
               what='end of all processes')


def test_kill_9_of_the_client_ends_its_embedded_node():
    process = subprocess.Popen([sys.executable, '-c', textwrap.dedent(PROGRAM) + WAIT],
                               stdout=subprocess.PIPE, cwd=ROOT)
    process.stdout.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    process.stdout.close()
    eventually(lambda: not any(child.is_running() for child in children),
               what='end of all processes')


def test_the_main_program_needs_no_guard(tmp_path):
    """A script without `if __name__ == '__main__'`, functions and classes of __main__ as arguments
    and results."""
    path = tmp_path / 'main.py'
    path.write_text(textwrap.dedent('''
        import dispy
        print('main runs')
        class Point:
            def __init__(self, x): self.x = x
        def compute(point): return Point(point.x + 1)
        cluster = dispy.JobCluster(compute, nodes='local')
        result = cluster.submit(Point(1))()
        print(type(result) is Point, result.x)
        cluster.close()
    '''))
    done = subprocess.run([sys.executable, str(path)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=60)
    assert (done.stdout.decode(), done.stderr.decode(), done.returncode) == ('main runs\nTrue 2\n',
                                                                             '', 0)


def test_a_job_may_use_a_pool_of_processes_with_functions_of_the_main_program():
    code, out, err = script('''
        import dispy
        class Point:
            def __init__(self, x): self.x = x
        def square(n): return Point(n * n)
        def compute(n):
            import multiprocessing
            with multiprocessing.Pool(2) as pool:
                return pool.map(square, range(n))
        with dispy.JobCluster(compute, nodes='local') as cluster:
            job = cluster.submit(5)
            points = job(30)
            print(job.exception, [(type(point) is Point, point.x) for point in points or []][-2:])
    ''')
    assert (code, out) == (0, 'None [(True, 9), (True, 16)]\n'), (out, err)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_a_forked_child_neither_hangs_nor_speaks_for_its_parent():
    code, out, err = script('''
        import dispy, os, sys
        cluster = dispy.JobCluster(abs, nodes='local')
        assert cluster.submit(-1)() == 1
        pid = os.fork()
        if pid == 0:
            try:
                cluster.submit(-2)
            except RuntimeError as exc:
                assert 'forked' in str(exc)
                with dispy.JobCluster(abs, nodes='local') as own:
                    assert own.submit(-3)() == 3
                sys.exit(7)
        assert os.waitpid(pid, 0)[1] == 7 << 8
        print(cluster.submit(-4)())
        cluster.close()
    ''')
    assert (code, out) == (0, '4\n'), err


# -- status ----------------------------------------------------------------------------------------

def test_print_status(cluster, capsys):
    for n in range(20):
        cluster.submit(n)
    cluster.wait()
    cluster.print_status()
    out = capsys.readouterr().out
    assert '127.0.0.1' in out and 'Jobs pending: 0' in out and ' 20 ' in out


def test_what_is_free_on_a_node(cluster):
    cluster.wait_nodes(1, 20)
    node, = cluster.status().nodes
    assert (0 <= node.avail_info.cpu <= 100 and node.avail_info.memory > 0
            and node.avail_info.disk > 0)
    assert node.platform and node.cpus >= 1 and repr(node).startswith('<DispyNode 127.0.0.1')


def test_a_client_without_a_node_says_so(make_cluster, caplog, monkeypatch):
    monkeypatch.setattr(dispy, 'WARN_AFTER', 0.1)
    with make_cluster(square, nodes=[('127.0.0.1', 9), 'no-such-host.invalid']) as cluster:
        job = cluster.submit(1)
        text = eventually(lambda: [r.getMessage() for r in caplog.records
                                   if 'waits for a node' in r.getMessage()])[0]
        assert '127.0.0.1:9' in text and 'no program listens there' in text and 'dispynode' in text
        with pytest.raises(dispy.NoNodes, match='no-such-host'):
            cluster.wait_nodes(1, timeout=0.2)
        cluster.cancel(job)


def test_a_failure_of_the_driver_ends_all_jobs(caplog, monkeypatch):
    """Our own bug in the driver's thread: nobody waits for ever."""
    cluster = dispy.JobCluster(time.sleep, nodes='local')
    jobs = [cluster.submit(1000) for _ in range(5)]
    eventually(lambda: jobs[0].status == DispyJob.Running)

    def fail(*args):
        raise AssertionError('a bug')
    monkeypatch.setattr(dispy.core_of(cluster).driver.schedule, 'flush', fail)
    dispy.core_of(cluster).driver.post(dispy.RunInDriver(lambda: None,
                                                         dispy.concurrent.futures.Future()))
    assert cluster.wait(20)
    assert {job.status for job in jobs} == {DispyJob.Abandoned} and 'a bug' in jobs[0].exception
    with pytest.raises(RuntimeError, match='a bug'):
        cluster.submit(1)
    cluster.close()


# -- after a crash ---------------------------------------------------------------------------------

def test_jobs_that_are_being_recovered_end_when_their_cluster_is_closed(tmp_path):
    path = str(tmp_path / 'jobs')
    # as a program has left it that was killed while a node ran its job
    journal = dispy.Journal(path)
    journal.begin('c', 'square', False, False, None)
    lost = dispy.KeptJob('c', dispy.pack_arguments((7,), {}, dispy.ModuleBundles('c')), None, 1)
    journal.submitted(lost)
    lost.serial += 1
    journal.sent([lost], '127.0.0.1:1', '')
    journal.commit()
    journal._db.close()
    os.close(journal._new)
    cluster = dispy.JobCluster(square, nodes='local', recover_file=path)
    job, = cluster.recovered
    assert job.status == DispyJob.Running
    cluster.close(terminate=True)
    assert job.wait(5) and job.status == DispyJob.Cancelled and 'closed' in job.exception
