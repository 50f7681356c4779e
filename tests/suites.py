"""Runs test suites of others over DispyExecutor: those of CPython's concurrent.futures, where that
Python has its `test` package, and those of loky, from its source distribution. None of their code
is here, only what stands between.

    python suites.py cpython [KIND] [PATTERN]   # KIND: Spawn, Fork or Forkserver, to start
    python suites.py loky DIRECTORY [PATTERN]   # of an unpacked source distribution

The last line of stdout is JSON: {test: [outcome, text]} with the outcomes ok, failed and skipped.
"""

import faulthandler
import gc
import json
import multiprocessing
import multiprocessing.connection
import os
import queue
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

import dispy  # noqa: E402

# Programs of the suites shall write nothing to stderr
dispy._methods_noted.update(('spawn', 'forkserver', 'loky'))


TEST_TIME = 60   # s of one test


class Server:
    """Semaphores, events and queues of the suites live in this process; workers, which are no
    children of it, call them over loopback. Those of multiprocessing can only be inherited by
    children."""

    def __init__(self):
        self.key = os.urandom(16)
        self.things = {}
        self.listener = multiprocessing.connection.Listener(('127.0.0.1', 0), backlog=100,
                                                            authkey=self.key)
        threading.Thread(target=self._accept, name='things', daemon=True).start()

    def __reduce__(self):
        return type(None), ()   # workers have this module without it

    def _accept(self):
        while True:
            threading.Thread(target=self._serve, args=(self.listener.accept(),),
                             daemon=True).start()

    def _serve(self, connection):
        with connection:
            number, name, args = connection.recv()
            try:
                answer = (getattr(self.things[number], name)(*args), None)
            except Exception as exc:  # what it raises is the caller's
                answer = (None, exc)
            connection.send(answer)

    def make(self, thing):
        self.things[len(self.things)] = thing
        return Thing(self.listener.address, self.key, len(self.things) - 1)


class Thing:
    """One of them, as any process sees it."""

    def __init__(self, *where):
        self.where = where

    def _call(self, name, *args):
        address, key, number = self.where
        with multiprocessing.connection.Client(address, authkey=key) as connection:
            connection.send((number, name, args))
            value, error = connection.recv()
        if error is not None:
            raise error
        return value

    def acquire(self, *args):
        return self._call('acquire', *args)

    def release(self):
        return self._call('release')

    def set(self):
        return self._call('set')

    def clear(self):
        return self._call('clear')

    def is_set(self):
        return self._call('is_set')

    def wait(self, timeout=None):
        return self._call('wait', timeout)

    def put_nowait(self, item):
        return self._call('put_nowait', item)

    def get_nowait(self):
        return self._call('get_nowait')


class Context:
    """A context of multiprocessing to the suites."""

    def __init__(self, method):
        self.method = method

    def get_start_method(self, allow_none=False):
        return self.method

    def Queue(self):
        return server.make(queue.Queue())

    def Semaphore(self, value=1):
        return server.make(threading.Semaphore(value))

    def Event(self):
        return server.make(threading.Event())

    def Manager(self):
        return self

    def shutdown(self):
        """As a manager."""

    def join(self):
        """As a manager."""


class Ended:
    """Something of an executor that can be waited for: here its cluster."""

    def __init__(self, cluster):
        self.cluster = cluster

    def join(self, timeout=60):
        until = time.monotonic() + timeout
        while not dispy.core_of(self.cluster).closed and time.monotonic() < until:
            time.sleep(0.01)
        assert dispy.core_of(self.cluster).closed

    join_thread = join


def workers_of(cluster):
    """Process number -> worker process of a cluster on this machine. Workers are children of a
    runner, which is a child of this process; a runner whose workers are forked works in the
    directory of the computation, too."""
    import psutil
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            in_directory = dispy.core_of(cluster).comp in process.cwd()
            tracks = 'resource_tracker' in ' '.join(process.cmdline())   # that of multiprocessing
            if in_directory and not tracks and process.ppid() != os.getpid():
                process.join = process.wait
                found[process.pid] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied, AttributeError):
            continue
    return found


class Adapted(dispy.DispyExecutor):
    """With the names under which the suites look at what is inside of a process pool."""

    def __init__(self, max_workers=None, mp_context=None, initializer=None, initargs=(), *,
                 max_tasks_per_child=None, context=None):
        super().__init__(max_workers, mp_context or context, initializer, initargs,
                         max_tasks_per_child=max_tasks_per_child, nodes='local')
        self._max_workers = max_workers or os.cpu_count()
        self.cluster.wait_nodes(1, 60)   # processes of a pool are there at once

    def _started(self):
        """Workers of calls that wait: where there are as many as there will be at the latest."""
        until = time.monotonic() + 10
        while time.monotonic() < until:
            found = workers_of(self.cluster)
            if len(found) >= min(self._max_workers,
                                 max(1, dispy.core_of(self.cluster).book.pending)):
                break
            time.sleep(0.05)
        found = workers_of(self.cluster)
        gc.collect()   # exceptions of psutil keep frames, and these what is looked at
        return found

    _processes = property(_started)
    _broken = property(lambda self: dispy.core_of(self.cluster).unusable)
    _executor_manager_thread = _call_queue = property(lambda self: Ended(self.cluster))


def program_of(code):
    """What a program of the suites begins with, which runs by itself."""
    import cloudpickle   # such programs have no PYTHONPATH
    paths = [HERE, os.path.dirname(os.path.dirname(cloudpickle.__file__))]
    return 'import sys; sys.path[:0] = %r; import suites; suites.install()\n%s' % (paths, code)


def install():
    """In the place of the process pool."""
    import concurrent.futures.process
    Adapted.__name__ = Adapted.__qualname__ = 'ProcessPoolExecutor'
    concurrent.futures.ProcessPoolExecutor = concurrent.futures.process.ProcessPoolExecutor = (
        Adapted)
    concurrent.futures.process._RemoteTraceback = dispy.RemoteTraceback
    multiprocessing.get_context = Context


def cpython(kind='Spawn', pattern=''):
    """Outcomes of the tests of CPython."""
    import unittest
    install()
    from test import support
    from test.support import script_helper
    names = ['test_' + name
             for name in ('wait', 'as_completed', 'init', 'shutdown', 'process_pool', 'deadlock')]
    modules = [__import__('test.test_concurrent_futures.' + name, fromlist=['x']) for name in names]
    support.use_resources = ['walltime', 'cpu']
    run = script_helper.assert_python_ok
    for module in modules:
        if hasattr(module, 'assert_python_ok'):
            module.assert_python_ok = lambda option, code: run(option, program_of(code))
    outcomes = {}

    class Result(unittest.TestResult):
        def addSuccess(self, test):
            outcomes.setdefault(test.id(), ['ok', ''])

        def addError(self, test, err):
            outcomes[test.id()] = ['failed', self._exc_info_to_string(err, test)]

        def addSubTest(self, test, subtest, err):
            if err is not None:
                self.addError(test, err)

        addFailure = addError

        def addSkip(self, test, reason):
            outcomes[test.id()] = ['skipped', reason]

        def startTest(self, test):
            super().startTest(test)
            faulthandler.dump_traceback_later(TEST_TIME, exit=True)

        def stopTest(self, test):
            super().stopTest(test)
            faulthandler.cancel_dump_traceback_later()
            print(test.id(), outcomes.get(test.id(), ['ended', ''])[0], flush=True)

    suite = unittest.TestSuite()
    for module in modules:
        for test in unittest.defaultTestLoader.loadTestsFromModule(module):
            for case in test:
                name = type(case).__name__
                of_kind = (name.startswith('ProcessPool%s' % kind)
                           and not name.startswith('ProcessPool%sserver' % kind))
                if (of_kind or name.startswith('Failing')) and pattern in case.id():
                    suite.addTest(case)
    suite.run(Result())
    return outcomes


class Flags:
    """What loky's executors tell of themselves; here what their calls have told."""
    broken = None

    def __init__(self, cluster):
        self.cluster = cluster

    shutdown = property(lambda self: dispy.core_of(self.cluster).closed)

    def note(self, future):
        if not future.cancelled() and isinstance(future.exception(), dispy.WorkerLost):
            self.broken = future.exception()


class AdaptedLoky(Adapted):
    """With loky's parameters and what its tests look at besides. What it alone has is not
    tested."""

    def __init__(self, max_workers=None, job_reducers=None, result_reducers=None, timeout=None,
                 context=None, initializer=None, initargs=(), env=None):
        import pytest
        for name, value in (('job_reducers', job_reducers), ('timeout', timeout), ('env', env)):
            if value is not None:
                pytest.skip("%s= is loky's own" % name)
        super().__init__(max_workers, context, initializer, initargs)
        self._flags = Flags(self.cluster)
        for _ in range(20):   # loky's processes are all there from the first on
            if len(workers_of(self.cluster)) >= self._max_workers:
                break
            list(super().map(time.sleep, [0.2] * self._max_workers))

    def submit(self, fn, /, *args, **kwargs):
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(self._flags.note)
        return future

    def shutdown(self, wait=True, kill_workers=False):
        if kill_workers:
            self._pool.terminate()
        super().shutdown(wait)


def check_workers(executor=None, expected_process_number=None, expected_max_process_number=None,
                  patience=10):
    """Workers are started when there is work for them, so that there may be fewer."""
    most = (expected_max_process_number if expected_process_number is None
            else expected_process_number)
    if executor is not None:
        until = time.monotonic() + patience
        while len(workers_of(executor.cluster)) > most and time.monotonic() < until:
            time.sleep(0.05)
        assert len(workers_of(executor.cluster)) <= most


def no_workers(cls, patience=5, sleep_duration=0.01):
    import psutil
    until = time.monotonic() + patience
    while psutil.Process().children(recursive=True) and time.monotonic() < until:
        time.sleep(sleep_duration)
    assert not psutil.Process().children(recursive=True)


def install_loky():
    """In the place of loky's executor."""
    import concurrent.futures.process
    import loky.backend
    import loky.process_executor as replaced
    AdaptedLoky.__name__ = AdaptedLoky.__qualname__ = 'ProcessPoolExecutor'
    replaced.ProcessPoolExecutor = AdaptedLoky
    replaced.BrokenProcessPool = concurrent.futures.process.BrokenProcessPool
    replaced.TerminatedWorkerError, replaced.ShutdownExecutorError = dispy.WorkerLost, RuntimeError
    replaced._RemoteTraceback = dispy.RemoteTraceback
    loky.backend.get_context = Context


def loky(directory, pattern=''):
    """Outcomes of the tests of loky's executor."""
    import pytest
    os.chdir(directory)
    sys.path.insert(0, directory)
    install_loky()
    from tests import _executor_mixin, _test_process_executor
    _executor_mixin._check_subprocesses_number = check_workers
    _executor_mixin.ExecutorMixin.check_no_running_workers = classmethod(no_workers)
    run = _test_process_executor.check_subprocess_call
    program = ('import sys; sys.path[:0] = [%r, %r]; import suites; suites.install_loky()\n'
               % (HERE, directory))
    _test_process_executor.check_subprocess_call = lambda command, **options: run(
        [*command[:-1], program + command[-1]], **options)
    outcomes = {}

    class Plugin:
        @staticmethod
        def pytest_runtest_logreport(report):
            name = report.nodeid.partition('::')[2]
            if report.skipped:
                outcomes[name] = ['skipped', str(report.longrepr[2])]
            elif report.failed:
                outcomes[name] = ['failed', str(report.longrepr)]
            else:
                outcomes.setdefault(name, ['ok', ''])

    # This one waits for something inside of loky and then for minutes.
    left_out = 'TestsProcessPoolLokyExecutor::test_killed_child_with_cancelled_work_items'
    outcomes[left_out] = ['skipped', "it waits for what stands in loky's _running_work_items"]
    pytest.main(['-v', '--deselect', 'tests/test_process_executor_loky.py::' + left_out, '-p',
                 'no:cacheprovider', '--skip-high-memory', '--loky-verbosity=40', '-o',
                 'faulthandler_timeout=%d' % TEST_TIME, '-o', 'faulthandler_exit_on_timeout=1',
                 'tests/test_process_executor_loky.py', *(('-k', pattern) if pattern else ())],
                plugins=[Plugin])
    return outcomes


server = None


def main(argv):
    global server
    server = Server()
    outcomes = {'cpython': cpython, 'loky': loky}[argv[0]](*argv[1:])
    print(json.dumps(outcomes))
    return 0


if __name__ == '__main__':
    sys.path.remove(HERE)
    sys.path.insert(0, HERE)
    import suites   # by its own name, which workers import
    sys.exit(suites.main(sys.argv[1:]))
