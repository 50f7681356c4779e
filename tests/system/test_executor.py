"""Standard interfaces: concurrent.futures and joblib."""

import asyncio
import concurrent.futures
import gc
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import time
import weakref

import psutil
import pytest

import dispy
from conftest import eventually, lives


@pytest.fixture(autouse=True)
def over_each_kind(make_cluster, monkeypatch):
    """Executors and joblib's backend make their cluster themselves."""
    monkeypatch.setattr(dispy.DispyExecutor, '_cluster_class', staticmethod(make_cluster))
    yield
    dispy.joblib_clusters.close()   # they are kept for a while


@pytest.fixture
def executor(over_each_kind):
    with dispy.DispyExecutor(nodes='local') as executor:
        yield executor


def square(n, m=0):
    return n * n + m


class Odd(Exception):
    pass


def fail(n):
    raise Odd('no %d' % n)


def test_any_function_a_call(executor):
    offset = 5
    futures = [executor.submit(square, 3), executor.submit(square, 3, m=1),
               executor.submit(lambda n: n + offset, 1),
               executor.submit(len, 'four'), executor.submit('{}-{}'.format, 1, 2)]
    assert [future.result(30) for future in futures] == [9, 10, 6, 4, '1-2']
    with pytest.raises(TypeError, match='cannot be called'):
        executor.submit(5)


def test_original_exceptions_with_the_remote_traceback_as_cause(executor):
    future = executor.submit(fail, 7)
    with pytest.raises(Odd, match='no 7') as caught:
        future.result(30)
    assert 'in fail' in str(caught.value.__cause__) and isinstance(future.exception(), Odd)
    with pytest.raises(dispy.JobFailed, match='exit code 3'):
        executor.submit(os._exit, 3).result(30)


def test_wait_and_as_completed(executor):
    futures = [executor.submit(square, n) for n in range(50)]
    done, left = concurrent.futures.wait(futures, timeout=30)
    assert done == set(futures) and not left
    assert (sorted(future.result() for future in concurrent.futures.as_completed(futures))
            == [n * n for n in range(50)])


@pytest.mark.parametrize('chunksize', [1, 7, 1000])
def test_map(executor, chunksize):
    assert (list(executor.map(square, range(100), range(100), chunksize=chunksize))
            == [n * n + n for n in range(100)])
    with pytest.raises(Odd, match='no 0'):
        list(executor.map(fail, range(3), chunksize=chunksize))
    with pytest.raises(ValueError, match='chunksize=0'):
        executor.map(square, [1], chunksize=0)


def test_map_with_a_timeout(executor):
    with pytest.raises(concurrent.futures.TimeoutError):
        list(executor.map(time.sleep, [1000], timeout=0.1))
    executor.cluster.close(terminate=True)


def test_done_callbacks(executor):
    seen = []
    future = executor.submit(square, 4)
    future.add_done_callback(lambda future: seen.append(future.result()))
    eventually(lambda: seen == [16])


def test_cancel_what_waits():
    with dispy.DispyExecutor(nodes=[('127.0.0.1', 9)], loglevel=logging.CRITICAL) as executor:
        futures = [executor.submit(square, n) for n in range(5)]
        assert futures[0].cancel() and futures[0].cancelled() and not futures[1].running()
        with pytest.raises(concurrent.futures.CancelledError):
            futures[0].result(5)
        executor.shutdown(cancel_futures=True)
        assert all(future.cancelled() for future in futures)
        done, _ = concurrent.futures.wait(futures, timeout=10)
        assert done == set(futures)
        with pytest.raises(RuntimeError, match='closed'):
            executor.submit(square, 1)


def test_control_c_ends_what_runs():
    with pytest.raises(KeyboardInterrupt):
        with dispy.DispyExecutor(nodes='local') as executor:
            future = executor.submit(time.sleep, 600)
            eventually(future.running)
            raise KeyboardInterrupt
    assert future.cancelled() or isinstance(future.exception(20), Exception)


def test_what_runs_is_not_cancelled(executor, tmp_path):
    flag = str(tmp_path / 'flag')

    def compute(flag):
        while not os.path.exists(flag):
            time.sleep(0.01)
        return 'done'
    future = executor.submit(compute, flag)
    eventually(future.running)
    assert not future.cancel()
    with open(flag, 'w'):
        pass
    assert future.result(30) == 'done' and future.done() and not future.running()


def meet(directory, count, name):
    """Wait until so many calls are here at once."""
    with open(os.path.join(directory, str(name)), 'w'):
        pass
    until = time.monotonic() + 20
    while len(os.listdir(directory)) < count and time.monotonic() < until:
        time.sleep(0.01)
    return len(os.listdir(directory)) >= count


def own_pid(seconds=0.0):
    time.sleep(seconds)
    return os.getpid()


def capture(*args, **kwargs):
    return args, kwargs


class Thing:
    """Can be referred to weakly."""

    def __init__(self, n):
        self.n = n


class Bad:
    """Cannot be opened."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        return throw, (self.error,)


class Stubborn:
    """Cannot be pickled."""

    def __reduce__(self):
        raise pickle.PicklingError('not this')


def throw(error):
    raise error


def begin_and_end(_):
    """When a call of 50 ms has begun and ended, by the clock that processes share."""
    began = time.monotonic()
    time.sleep(0.05)
    return began, time.monotonic()


def test_so_many_calls_at_once_over_all_nodes(tmp_path):
    """More than the machine has CPUs, on a node of this program's own; or fewer."""
    for number, most in enumerate((1, 2)):   # the node of the tests has so many CPUs at least
        directory = tmp_path / str(number)
        directory.mkdir()
        with dispy.DispyExecutor(most, nodes='local') as executor:
            assert all(executor.map(meet, [str(directory)] * most, [most] * most, range(most)))
            times = list(executor.map(begin_and_end, range(6)))
            at_once = [sum(began <= moment < ended for began, ended in times)
                       for moment, _ in times]
            assert max(at_once) <= most
    for wrong, error in ((0, ValueError), (-1, ValueError), ('local', TypeError), (1.5, TypeError)):
        with pytest.raises(error, match='max_workers must be'):
            dispy.DispyExecutor(wrong)


def test_more_calls_at_once_than_there_are_cpus(tmp_path):
    most = (os.cpu_count() or 1) + 2
    with dispy.DispyExecutor(most, nodes='local') as executor:
        if type(executor.cluster) is not dispy.JobCluster:
            pytest.skip('the node of a scheduler is not started by the program')
        assert all(executor.map(meet, [str(tmp_path)] * most, [most] * most, range(most)))


def begin(value):
    os.environ['SET_BY_INITIALIZER'] = value + str(os.getpid())


def test_an_initializer_runs_in_every_worker_process():
    with dispy.DispyExecutor(initializer=begin, initargs=('x',), max_tasks_per_child=2,
                             nodes='local') as executor:
        futures = [executor.submit(lambda: (os.environ['SET_BY_INITIALIZER'], os.getpid()))
                   for _ in range(8)]
        found = [future.result(30) for future in futures]
    assert all(text == 'x%d' % pid for text, pid in found)
    assert max([pid for _, pid in found].count(pid) for _, pid in found) <= 2
    with pytest.raises(TypeError, match='initializer'):
        dispy.DispyExecutor(initializer=5)
    with pytest.raises(ValueError, match='max_tasks_per_child'):
        dispy.DispyExecutor(max_tasks_per_child=0)


@pytest.mark.parametrize('how', [lambda: fail(7), lambda: os._exit(3)],
                         ids=['raises', 'ends the process'])
def test_an_initializer_that_fails_breaks_the_executor(how):
    with dispy.DispyExecutor(initializer=how, nodes='local', loglevel=logging.CRITICAL) as executor:
        futures = [executor.submit(square, n) for n in range(20)]
        for future in futures:
            with pytest.raises(concurrent.futures.BrokenExecutor, match='initializer'):
                future.result(60)
            assert isinstance(future.exception(), dispy.JobFailed)
        with pytest.raises(concurrent.futures.BrokenExecutor, match='initializer'):
            executor.submit(square, 1)


def test_the_start_method_is_noted_once(caplog, monkeypatch):
    monkeypatch.setattr(dispy, '_methods_noted', set())
    with caplog.at_level(logging.INFO, 'dispy'):
        for context in ('forkserver', 'forkserver', 'spawn', multiprocessing.get_context('spawn'),
                        None, 'fork'):
            dispy.DispyExecutor(mp_context=context, nodes=[('127.0.0.1', 9)],
                                loglevel=logging.INFO).shutdown()
    assert [record.getMessage()
            for record in caplog.records if 'mp_context' in record.getMessage()] == [
                'mp_context: workers are started by spawn, as there is no forkserver']


def test_any_name_can_be_a_keyword_of_the_call(executor, make_cluster):
    given = {'self': 1, 'fn': 2, 'id': 3, 'node': 4, 'dispy_timeout': 5, 'args': 6}
    assert executor.submit(capture, 0, **given).result(30) == ((0,), given)
    given.pop('dispy_timeout')
    with make_cluster(capture, nodes='local') as cluster:
        assert cluster.submit(0, **given)(30) == ((0,), given)
        assert cluster.submit_job_id('own', 0, **given)(30) == ((0,), given)
        node = eventually(lambda: cluster.status().nodes)[0]
        assert cluster.submit_node(node, 0, **given)(30) == ((0,), given)
        assert cluster.submit_job_id_node('own', node, 0, **given)(30) == ((0,), given)


def test_what_cannot_be_pickled_or_opened_is_the_exception_of_the_future(executor):
    assert isinstance(executor.submit(square, Stubborn()).exception(5), pickle.PicklingError)
    with pytest.raises(pickle.PicklingError):
        list(executor.map(square, [1, Stubborn()]))
    for there in (executor.submit(capture, Bad(ValueError('odd'))),
                  executor.submit(Bad, SystemExit(3))):
        error = there.exception(30)
        assert isinstance(error, dispy.WorkerLost) and isinstance(error,
                                                                  concurrent.futures.BrokenExecutor)
    assert executor.submit(square, 3).result(30) == 9   # it goes on


def test_a_worker_that_is_killed(executor):
    future = executor.submit(own_pid)
    pid = future.result(30)
    assert psutil.pid_exists(pid)
    error = executor.submit(os.kill, 0, signal.SIGKILL).exception(30)
    assert (isinstance(error, concurrent.futures.BrokenExecutor)
            and isinstance(error, dispy.JobFailed))
    assert executor.submit(square, 4).result(30) == 16
    late = executor.with_options(timeout=0.2).submit(time.sleep, 60).exception(30)
    assert type(late) is dispy.JobFailed


def test_a_future_shows_that_it_runs(executor):
    future = executor.submit(own_pid, 1.0)
    eventually(future.running)
    assert future._state == 'RUNNING' and 'state=running' in repr(future) and not future.cancel()
    assert (future.result(30) and future._state == 'FINISHED'
            and future.job.status == dispy.DispyJob.Finished)


def test_results_are_freed_with_the_last_reference(executor):
    """By counting references alone: nothing here waits for the collector."""
    gc.collect()
    gc.disable()
    try:
        for thing in executor.map(Thing, range(20), buffersize=3):
            seen = weakref.ref(thing)
            del thing
            eventually(lambda: seen() is None, what='the end of a result')
        future = executor.submit(Thing, 1)
        job, seen = weakref.ref(future), weakref.ref(future.result(30))
        del future
        eventually(lambda: seen() is None and job() is None,
                   what='the end of a future and its result')
    finally:
        gc.enable()


def test_map_takes_inputs_as_results_are_taken(executor):
    taken = []
    results = executor.map(square, (taken.append(n) or n for n in itertools.count()), buffersize=3)
    assert next(results) == 0 and next(results) == 1 and len(taken) == 5
    results.close()
    taken.clear()
    chunks = executor.map(square, (taken.append(n) or n for n in itertools.count()), buffersize=2,
                          chunksize=10)
    assert [next(chunks) for _ in range(3)] == [0, 1, 4] and len(taken) == 30
    chunks.close()
    for wrong, error in ((0, ValueError), ('x', TypeError)):
        with pytest.raises(error, match='buffersize'):
            executor.map(square, [1], buffersize=wrong)


def test_options_of_calls(tmp_path):
    with dispy.DispyExecutor(1, nodes='local') as executor:
        flag = tmp_path / 'flag'
        blocked = executor.submit(wait_for, str(flag))
        eventually(blocked.running)
        urgent = executor.with_options(priority=5).with_options(cpus=1, retries=1)
        order = []
        futures = [executor.submit(square, 1), urgent.submit(square, 2)]
        for number, future in enumerate(futures):
            future.add_done_callback(lambda future, number=number: order.append(number))
        flag.write_text('')
        assert [future.result(30) for future in futures] == [1, 4]
        eventually(lambda: len(order) == 2)
        assert order == [1, 0] and futures[1].job.options['retries'] == 1
        with pytest.raises(ValueError, match='dispy_cpus'):
            executor.with_options(cpus=0)
        urgent.shutdown()
        with pytest.raises(RuntimeError, match='after shutdown'):
            executor.submit(square, 1)


def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.01)
    return os.getpid()


def test_no_more_calls_after_shutdown_and_those_before_it_end(tmp_path):
    executor = dispy.DispyExecutor(nodes='local')
    flag = tmp_path / 'flag'
    future = executor.submit(wait_for, str(flag))
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match='cannot schedule new futures after shutdown'):
        executor.submit(square, 1)
    with pytest.raises(RuntimeError, match='cannot schedule new futures after shutdown'):
        executor.map(square, [1])
    flag.write_text('')
    assert future.result(30)
    executor.shutdown()   # waits for what has begun before


def test_an_executor_that_is_dropped_ends_its_workers(tmp_path):
    executor = dispy.DispyExecutor(nodes='local')
    pid = executor.submit(own_pid).result(30)
    flag = tmp_path / 'flag'
    future = executor.submit(wait_for, str(flag))
    other, cluster = executor.with_options(priority=1), executor.cluster
    del executor
    assert not dispy.core_of(cluster).closed and lives(pid)
    del other
    flag.write_text('')
    assert future.result(30)   # what was submitted is done
    eventually(lambda: dispy.core_of(cluster).closed and not lives(pid))


def test_asyncio(executor, tmp_path):
    flag = tmp_path / 'flag'

    async def program():
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(executor, square, 5) == 25
        with pytest.raises(Odd):
            await loop.run_in_executor(executor, fail, 5)
        assert await asyncio.gather(*(asyncio.wrap_future(executor.submit(square, n))
                                      for n in range(20))) == [n * n for n in range(20)]
        blocking = [executor.submit(wait_for, str(flag)) for _ in range(2 * (os.cpu_count() or 1))]
        waiting = executor.submit(square, 1)
        wrapped = asyncio.wrap_future(waiting)
        wrapped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wrapped
        return blocking, waiting
    blocking, waiting = asyncio.run(program())
    eventually(waiting.cancelled)
    flag.write_text('')
    assert all(future.result(30) for future in blocking)


# -- joblib ----------------------------------------------------------------------------------------

def test_joblib():
    joblib = pytest.importorskip('joblib')
    dispy.register_joblib()
    offset = 10
    with joblib.parallel_backend('dispy', nodes='local'):
        results = joblib.Parallel(n_jobs=-1)(joblib.delayed(lambda n: n * n + offset)(n)
                                             for n in range(100))
    assert results == [n * n + 10 for n in range(100)]


def test_joblib_raises_what_a_call_raised():
    joblib = pytest.importorskip('joblib')
    dispy.register_joblib()
    with joblib.parallel_backend('dispy', nodes='local'):
        with pytest.raises(Odd, match='no'):
            joblib.Parallel()(joblib.delayed(fail)(n) for n in range(10))
