"""What a job finds around it in its process: put back after each job, whatever the last one did."""

import glob
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import textwrap
import threading
import time

import pytest

import dispy
from conftest import ROOT, eventually
from nodes import NodeProcess


def change(what):
    """Do one thing to the process, as jobs do."""
    import asyncio
    import decimal
    import gc
    import locale
    import logging
    import os
    import resource
    import signal
    import socket
    import sys
    import threading
    import time
    import warnings

    def set_zone():
        os.environ['TZ'] = 'Asia/Tokyo'
        time.tzset()

    def set_zone_and_hide_it():
        set_zone()
        del os.environ['TZ']

    def set_zone_in_c():
        os.environ['TZ'] = 'Asia/Tokyo'
        time.mktime(time.localtime(0))   # it reads TZ, which Python does not notice

    def handle_all():
        for number in range(1, signal.NSIG):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):   # not to be handled
                pass

    def replace_lists():
        sys.argv, sys.path, warnings.filters = ['replaced'], ['/nowhere'], []

    def change_lists():
        sys.argv.append('more')
        sys.path.insert(0, '/nowhere')
        gc.callbacks.append(print)

    def replace_hooks():
        for name in ('excepthook', 'unraisablehook', 'displayhook', 'breakpointhook'):
            setattr(sys, name, print)
        threading.excepthook = print

    def lower_limit():
        soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))

    def configure_gc():
        gc.disable()
        gc.set_threshold(7, 7, 7)
        gc.set_debug(gc.DEBUG_SAVEALL)

    async def nothing():
        return None

    ways = {
        'zone': set_zone,
        'zone, hidden': set_zone_and_hide_it,
        'zone, in C': set_zone_in_c,
        'locale': lambda: locale.setlocale(locale.LC_ALL, 'C'),
        'affinity': lambda: os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]),
        'niceness': lambda: os.nice(3),
        'policy': lambda: os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0)),
        'limits': lower_limit,
        'handlers': handle_all,
        'wakeup': lambda: asyncio.run(nothing()),
        'filters': lambda: warnings.simplefilter('error'),
        'captured warnings': lambda: logging.captureWarnings(True),
        'showwarning': lambda: setattr(warnings, 'showwarning', print),
        'decimal': lambda: setattr(decimal.getcontext(), 'prec', 3),
        'timeout': lambda: socket.setdefaulttimeout(0.5),
        'gc': configure_gc,
        'logging': lambda: logging.disable(logging.CRITICAL),
        'replaced lists': replace_lists,
        'changed lists': change_lists,
        'hooks': replace_hooks,
        'switch interval': lambda: sys.setswitchinterval(1),
        'bytecode': lambda: setattr(sys, 'dont_write_bytecode', True),
        'half of a hook': lambda: delattr(sys, 'excepthook'),
        'the rights of root': lambda: os.seteuid(12345),
    }
    if what == 'which':
        return list(ways)
    ways[what]()
    return os.getpid()


def surroundings(what):
    """All that must be equal for each job; `change` for another argument."""
    if what is not None:
        return change(what)
    import decimal
    import gc
    import locale
    import logging
    import os
    import resource
    import signal
    import socket
    import sys
    import time
    import warnings
    warnings.warn('a warning')   # raises if the filters of another job say so
    names = [name for name in dir(resource) if name.startswith('RLIMIT_')]
    handlers = []
    for number in range(1, signal.NSIG):
        try:
            handlers.append(str(signal.getsignal(number)).partition(' at 0x')[0])
        except ValueError:
            handlers.append('')
    return os.getpid(), dict(
        zone=time.strftime('%H:%M %Z', time.localtime(0)), names=time.tzname,
        environment=dict(os.environ), locale=locale.setlocale(locale.LC_ALL),
        affinity=os.sched_getaffinity(0), niceness=os.nice(0), policy=os.sched_getscheduler(0),
        limits={name: resource.getrlimit(getattr(resource, name)) for name in names},
        handlers=handlers, wakeup=signal.set_wakeup_fd(-1), filters=list(warnings.filters),
        precision=decimal.getcontext().prec, timeout=socket.getdefaulttimeout(),
        gc=(gc.isenabled(), gc.get_threshold(), gc.get_debug(), len(gc.callbacks)),
        disabled=logging.root.manager.disable, argv=sys.argv, path=sys.path,
        hooks=[str(hook).partition(' at 0x')[0] for hook in (
            sys.excepthook, sys.unraisablehook, sys.displayhook, sys.breakpointhook,
            threading.excepthook, warnings.showwarning)],
        interval=sys.getswitchinterval(), bytecode=sys.dont_write_bytecode, user=os.geteuid())


def result_of(job):
    value = job(30)
    assert job.exception is None, job.exception
    return value


def use_one_cpu(cluster):
    """So that each job comes behind the last one in the same worker."""
    node = eventually(lambda: [n for n in cluster.status().nodes if n.cpus])[0]
    cluster.set_node_cpus(node, 1)
    eventually(lambda: cluster.status().nodes[0].cpus == 1)


NEW_PROCESS = {'half of a hook', 'the rights of root'}   # what cannot be put back


@pytest.mark.skipif(not hasattr(os, 'sched_setscheduler'), reason='these calls are Linux only')
def test_what_a_job_changes_in_its_process_is_put_back(make_cluster):
    """In the same process, so that what is loaded there stays; else in a new one."""
    with make_cluster(surroundings, nodes='local') as cluster:
        use_one_cpu(cluster)
        pid, before = result_of(cluster.submit(None))
        for what in change('which'):
            if what == 'the rights of root' and os.geteuid() != 0:
                continue
            assert result_of(cluster.submit(what)) == pid, what
            after, now = result_of(cluster.submit(None))
            assert now == before, what
            assert (after != pid) == (what in NEW_PROCESS), what
            pid = after


# -- imports ------------------------------------------------------------------------------------

def test_what_a_job_has_imported_goes_on_finding_its_own(make_cluster, tmp_path):
    """A module that a job imports extends sys.path. That is put back, while the module remains."""
    (tmp_path / 'first' / 'second').mkdir(parents=True)
    (tmp_path / 'first' / 'plugin_host.py').write_text(textwrap.dedent('''
        import os, sys
        sys.path.append(os.path.join(os.path.dirname(__file__), 'second'))
        def load():
            import plugin_of_it
            return plugin_of_it.NAME
        '''))
    (tmp_path / 'first' / 'second' / 'plugin_of_it.py').write_text('NAME = "found"\n')

    def compute(directory, what):
        if what == 'import':
            sys.path.insert(0, directory)
            import plugin_host   # noqa: F401
        elif what == 'use':
            return sys.modules['plugin_host'].load()
        elif what == 'import alone':
            import plugin_of_it   # noqa: F401
        return [entry for entry in sys.path if entry.startswith(directory)]

    directory = str(tmp_path / 'first')
    with make_cluster(compute, nodes='local') as cluster:
        use_one_cpu(cluster)
        assert len(result_of(cluster.submit(directory, 'import'))) == 2
        assert result_of(cluster.submit(directory, 'nothing')) == []
        failed = cluster.submit(directory, 'import alone')
        assert failed(30) is None and 'plugin_of_it' in failed.exception
        assert result_of(cluster.submit(directory, 'use')) == 'found'


# -- threads ------------------------------------------------------------------------------------

def numeric_threads():
    import numpy   # noqa: F401
    from threadpoolctl import threadpool_info
    return os.environ.get('OMP_NUM_THREADS'), {pool['num_threads'] for pool in threadpool_info()}


def test_numerical_libraries_use_as_many_threads_as_the_job_has_cpus(make_cluster, monkeypatch):
    """Also those that were loaded when the number was another; none that the user has set."""
    pytest.importorskip('numpy')
    pytest.importorskip('threadpoolctl')
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    with make_cluster(numeric_threads, nodes='local') as cluster:
        if eventually(lambda: [n for n in cluster.status().nodes if n.cpus])[0].cpus < 2:
            pytest.skip('a node of two CPUs is needed')
        for cpus in (1, 2, 1, 2):
            got = result_of(cluster.submit(dispy_cpus=cpus))
            assert got == (str(cpus), {cpus})


def test_threads_that_the_user_has_set_stay(monkeypatch):
    pytest.importorskip('numpy')
    pytest.importorskip('threadpoolctl')
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    with dispy.JobCluster(numeric_threads, nodes='local') as cluster:
        node = eventually(lambda: [n for n in cluster.status().nodes if n.cpus])[0]
        for cpus in (1, min(2, node.cpus)):
            assert result_of(cluster.submit(dispy_cpus=cpus))[0] == '3'


def test_an_idle_thread_of_a_library_costs_no_process(make_cluster):
    """tqdm keeps one; a thread of the job's own code would disturb the next job."""
    pytest.importorskip('tqdm')

    def compute(kind):
        import tqdm
        if kind == 'library':
            for _ in tqdm.tqdm(range(3)):
                pass
        elif kind == 'own':
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        elif kind == 'own, later':
            timer = threading.Timer(1000, print)
            timer.daemon = True
            timer.start()
        return os.getpid(), [thread.name for thread in threading.enumerate()]

    with make_cluster(compute, nodes='local') as cluster:
        use_one_cpu(cluster)
        first, threads = result_of(cluster.submit('library'))
        assert len(threads) == 2
        assert {result_of(cluster.submit('library'))[0] for _ in range(20)} == {first}
        for kind in ('own', 'own, later'):
            before, _ = result_of(cluster.submit(kind))
            after, threads = result_of(cluster.submit('nothing'))
            assert after != before and len(threads) == 1, kind


@pytest.mark.fork('`setup` runs in the worker itself, where its threads are')
def test_threads_that_setup_leaves_draw_a_warning(make_cluster, caplog):
    def setup():
        global pool
        from concurrent.futures import ThreadPoolExecutor
        pool = ThreadPoolExecutor(2, 'of-setup')
        list(pool.map(abs, range(8)))

    def compute():
        return threading.active_count()

    with make_cluster(compute, nodes='local', setup=setup) as cluster:
        assert result_of(cluster.submit()) == 1
        eventually(lambda: 'setup() has left' in caplog.text)
        assert 'of-setup_0' in caplog.text


# -- what the program shares with jobs on its machine -------------------------------------------

@pytest.mark.skipif(not os.path.isdir('/dev/shm'), reason='there is no /dev/shm here')
def test_shared_memory_of_the_program_outlives_local_nodes():
    """Jobs attach to it; the tracker of their node must not destroy it. What a job makes is its
    node's."""
    code = '''
        from multiprocessing import shared_memory
        import os
        import time
        import dispy

        def compute(name, what):
            from multiprocessing import shared_memory
            if what == 'make':
                made = shared_memory.SharedMemory(create=True, size=100)
                made.buf[0] = 5
                made.close()
                return made.name
            memory = shared_memory.SharedMemory(name=name)
            value = memory.buf[0]
            memory.close()
            if what == 'unlink':
                memory.unlink()
            return value

        mine = shared_memory.SharedMemory(create=True, size=100)
        mine.buf[0] = 7
        got = []
        for _ in range(2):
            with dispy.JobCluster(compute, nodes='local') as cluster:
                got.append(cluster.submit(mine.name, 'read')(20))
        with dispy.JobCluster(compute, nodes='local') as cluster:
            name = cluster.submit(None, 'make')(20)
            got.append(cluster.submit(name, 'read')(20))
            got.append(cluster.submit(name, 'unlink')(20))
            left = cluster.submit(None, 'make')(20)
        until = time.monotonic() + 20   # the tracker of the node ends after it
        while os.path.exists('/dev/shm/' + left) and time.monotonic() < until:
            time.sleep(0.01)
        got.append(os.path.exists('/dev/shm/' + left))
        mine.unlink()
        print(got)
        '''
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True,
                          text=True, timeout=120, env=dict(os.environ, PYTHONPATH=ROOT), cwd=ROOT)
    assert done.stdout == '[7, 7, 5, 5, False]\n', done.stderr
    assert 'KeyError' not in done.stderr, done.stderr


@pytest.fixture
def memories(monkeypatch):
    """A callable that tells which of the blocks of shared memory are left that `make_memory` has
    made in this test."""
    if not os.path.isdir('/dev/shm'):
        pytest.skip('there is no /dev/shm here')
    monkeypatch.setenv('TEST_MEMORY', 'dispy-test-%s' % os.urandom(8).hex())
    return lambda: glob.glob('/dev/shm/%s*' % os.environ['TEST_MEMORY'])


def make_memory():
    import os
    from multiprocessing import shared_memory
    name = '%s-%d' % (os.environ['TEST_MEMORY'], os.getpid())
    shared_memory.SharedMemory(name, create=True, size=100).close()


def tracked(what):
    """Make shared memory, or a child that does, or do nothing. The runner and the resource trackers
    that it has."""
    import multiprocessing
    import os
    import psutil
    if what == 'make':
        make_memory()
    elif what == 'fork':
        child = multiprocessing.get_context('fork').Process(target=make_memory)
        child.start()
        child.join()
    runner = os.getppid()
    while True:
        trackers = [child.pid for child in psutil.Process(runner).children(recursive=True)
                    if 'resource_tracker' in ' '.join(child.cmdline())]
        if trackers or what == 'nothing':
            return runner, trackers


@pytest.mark.fork('where workers are spawned each is handed the tracker at its start')
def test_one_resource_tracker_begins_when_it_is_needed_and_removes_what_is_left(memories):
    with dispy.JobCluster(tracked, nodes='local', depends=[make_memory]) as cluster:
        runner, found = result_of(cluster.submit('nothing'))
        assert found == []
        rows = [result_of(cluster.submit(what)) for what in ('make', 'fork')]
        assert rows[0] == rows[1] and rows[0][0] == runner and len(rows[0][1]) == 1, rows
        assert len(memories()) == 2
    eventually(lambda: not memories())


@pytest.mark.parametrize('options', ({'setup': make_memory}, {'cleanup': make_memory}),
                         ids=lambda options: ''.join(options))
def test_shared_memory_that_setup_and_cleanup_leave_is_removed(memories, options, caplog):
    with dispy.JobCluster(abs, nodes='local', **options) as cluster:
        assert result_of(cluster.submit(-1)) == 1
        assert len(memories()) == ('setup' in options)
    eventually(lambda: not memories())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def put(queue, value):
    queue.put(value)
    return value


def test_proxies_of_a_manager_work_in_jobs_on_this_machine():
    with multiprocessing.Manager() as manager:
        queue, values = manager.Queue(), manager.dict()
        values['a'] = 1
        with dispy.JobCluster(put, nodes='local') as cluster:
            assert result_of(cluster.submit(queue, 'value')) == 'value'
            assert queue.get(timeout=20) == 'value'


def test_output_is_in_the_order_in_which_it_was_printed(make_cluster):
    """That of the job, of C code in it, and of programs that it runs."""
    def compute():
        import ctypes
        print('before')
        subprocess.run(['echo', 'program'])
        print('between')
        os.system('echo shell')
        ctypes.CDLL(None).puts(b'C code')
        print('part of a line', end='', flush=True)
        if os.fork() == 0:
            print(', child')
            os._exit(0)
        os.wait()
        print('after')

    with make_cluster(compute, nodes='local') as cluster:
        job = cluster.submit()
        job(30)
    assert job.stdout.splitlines() == [
        'before', 'program', 'between', 'shell', 'C code', 'part of a line, child', 'after']


# -- processes of the program -------------------------------------------------------------------

def run_script(tmp_path, code, *args, **variables):
    """A program of its own; (exit code, stdout, stderr)."""
    script = tmp_path / 'script.py'
    script.write_text(textwrap.dedent(code))
    done = subprocess.run([sys.executable, str(script), *args], capture_output=True, text=True,
                          timeout=60, cwd=tmp_path,
                          env=dict(os.environ, PYTHONPATH=ROOT, **variables))
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='there is no fork here')
def test_processes_that_are_forked_while_a_node_starts_do_not_hold_it_up(tmp_path):
    """Popen in one thread reads a pipe to its end, which a child that is forked meanwhile would
    hold open."""
    code, out, err = run_script(tmp_path, '''
        import itertools
        import multiprocessing
        import os
        import threading
        import dispy

        original, numbers, pipes = os.pipe, itertools.count(1), threading.Event()

        def pipe():
            """The only pipe that Popen makes is the one by which it learns that the program runs:
            this program forks in just this moment, or as soon as it may."""
            made = original()
            if threading.current_thread() is not threading.main_thread() and next(numbers) == 1:
                pipes.set()
                forked.wait(1)
            return made

        def compute(n):
            return n * 2

        if __name__ == '__main__':
            forked, ended = threading.Event(), multiprocessing.get_context('fork').Event()
            os.pipe = pipe
            with dispy.JobCluster(compute, nodes='local') as cluster:
                assert pipes.wait(20)
                process = multiprocessing.get_context('fork').Process(target=ended.wait)
                process.start()
                forked.set()
                print(cluster.submit(4)(30))
                ended.set()
                process.join()
        ''')
    assert (code, out) == (0, '8\n'), err


def test_a_frozen_program_does_not_start_itself(tmp_path):
    """`sys.executable` is the program. The text says what to do."""
    code, out, err = run_script(tmp_path, '''
        import multiprocessing
        import os
        import sys
        real, sys.executable, sys.frozen = sys.executable, os.path.abspath('app'), True
        import dispy

        def compute(x):
            return x + 1

        for nodes in ('local', None):
            try:
                dispy.JobCluster(compute, nodes=nodes).wait_nodes(1, 5)
            except (dispy.DispyError, dispy.NoNodes) as exc:
                print('frozen into one executable' in str(exc))
        multiprocessing.set_executable(real)
        with dispy.JobCluster(compute, nodes='local') as cluster:
            print(cluster.submit(1)(30))
        ''', DISPY_DISCOVERY='off')
    assert (code, out) == (0, 'True\n' * 2 + '2\n'), err


# -- clusters that are dropped ------------------------------------------------------------------

def test_clusters_to_which_nothing_refers_are_closed(make_cluster, caplog):
    """A cell of a notebook that is run again binds its names anew; what had jobs is closed when
    they have ended. Three clusters of one function that are open draw one warning."""
    gate = threading.Event()
    dispy._told_of_many.clear()

    def compute(n):
        time.sleep(n)
        return n

    cluster = None
    for _ in range(4):
        cluster = make_cluster(compute, nodes='local')
        assert result_of(cluster.submit(0)) == 0
    number = sum('clusters of this function are open' in message for message in caplog.messages)
    assert number == 1
    busy = make_cluster(compute, nodes='local', job_status=lambda job: gate.wait(60))
    job = busy.submit(0.1)
    assert job(30) == 0.1
    del busy
    mine = {cluster.name}
    eventually(lambda: len([one for one in list(dispy._clusters) if one.name in mine]) == 2,
               what='the end of the clusters that were dropped')
    gate.set()
    eventually(lambda: [one for one in list(dispy._clusters) if one.name in mine] == [cluster],
               what='the end of the cluster whose callback has returned')
    assert result_of(cluster.submit(0)) == 0
    cluster.close()


# -- what a job's own processes leave -----------------------------------------------------------

def nap(array, seconds):
    time.sleep(seconds)
    return float(array[0])


def shared_names():
    return {name for name in os.listdir('/dev/shm') if 'joblib' in name or 'loky' in name}


@pytest.mark.skipif(not os.path.isdir('/dev/shm'), reason='there is no /dev/shm here')
def test_nothing_of_joblib_in_a_job_stays_in_shared_memory(make_cluster, tmp_path):
    """Whether the job returns, runs past its time, or its cluster is closed."""
    pytest.importorskip('joblib')
    pytest.importorskip('numpy')

    def compute(seconds, path):
        import joblib
        import numpy
        array, names = numpy.ones(1_000_000), shared_names()
        calls = (joblib.delayed(nap)(array, 0.0) for _ in range(2))
        got = joblib.Parallel(n_jobs=2)(calls)
        with open(path, 'w') as file:
            own = re.compile('[_-]%d[_-]' % os.getpid())
            file.write('\n'.join(filter(own.search, shared_names() - names)))
        if seconds:
            joblib.Parallel(n_jobs=2)(joblib.delayed(nap)(array, seconds) for _ in range(2))
        return got

    def names_of(path):
        return set(path.read_text().split()) if path.exists() else set()

    paths = [tmp_path / name for name in ('returned', 'late', 'closed')]
    cluster = make_cluster(compute, nodes='local')
    assert result_of(cluster.submit(0, str(paths[0]))) == [1.0, 1.0]
    late = cluster.submit(1000, str(paths[1]))
    eventually(lambda: names_of(paths[1]), what='shared memory of the second job')
    cluster.cancel(late)
    assert late.wait(60)
    cluster.submit(1000, str(paths[2]))
    eventually(lambda: names_of(paths[2]), what='shared memory of the third job')
    cluster.close(terminate=True)
    for path in paths:
        assert names_of(path), path
        eventually(lambda: not names_of(path) & shared_names(),
                   what='the end of what was shared when the job had %s' % path.name)


def test_a_worker_whose_job_was_interrupted_in_an_import_is_replaced(tmp_path, monkeypatch):
    """What is half imported stays in sys.modules, and the next import of it would fail."""
    package = tmp_path / 'parts'
    package.mkdir()
    (package / '__init__.py').write_text('from .inner import *\nimport os, time\n'
                                         'open(os.environ["PARTS_BEGUN"], "w").close()\n'
                                         'while not os.path.exists(os.environ["PARTS_GATE"]): '
                                         'time.sleep(0.01)\nfound = inner.VALUE\n')
    (package / 'inner.py').write_text('VALUE = 42\n')
    begun, gate = str(tmp_path / 'begun'), str(tmp_path / 'gate')
    environ = {'PARTS_BEGUN': begun, 'PARTS_GATE': gate}

    def find(path, environ):
        import os
        import sys
        os.environ.update(environ)
        if path not in sys.path:
            sys.path.insert(0, path)
        import parts
        return parts.found

    with NodeProcess(tmp_path / 'node', cpus=1) as node, \
            dispy.JobCluster(find, nodes=[node.address]) as cluster:
        first = cluster.submit(str(tmp_path), environ)
        eventually(lambda: os.path.exists(begun))
        cluster.cancel(first)
        assert first.wait(20) and first.status == first.Cancelled
        open(gate, 'w').close()
        again = cluster.submit(str(tmp_path), environ)
        assert again(20) == 42, again.exception
