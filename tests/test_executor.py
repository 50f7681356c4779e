"""Standard interfaces: concurrent.futures and joblib."""

import concurrent.futures
import logging
import os
import time

import pytest

import dispy
from conftest import eventually


@pytest.fixture(autouse=True)
def over_each_kind(make_cluster, monkeypatch):
    """Executors and joblib's backend make their cluster themselves."""
    monkeypatch.setattr(dispy, 'JobCluster', make_cluster)


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
    futures = [executor.submit(square, 3), executor.submit(square, 3, m=1), executor.submit(lambda n: n + offset, 1),
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
    assert sorted(future.result() for future in concurrent.futures.as_completed(futures)) == [n * n for n in range(50)]


@pytest.mark.parametrize('chunksize', [1, 7, 1000])
def test_map(executor, chunksize):
    assert list(executor.map(square, range(100), range(100), chunksize=chunksize)) == [n * n + n for n in range(100)]
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


# -- joblib ---------------------------------------------------------------------------------------------------------------

def test_joblib():
    joblib = pytest.importorskip('joblib')
    dispy.register_joblib()
    offset = 10
    with joblib.parallel_backend('dispy', nodes='local'):
        results = joblib.Parallel(n_jobs=-1)(joblib.delayed(lambda n: n * n + offset)(n) for n in range(100))
    assert results == [n * n + 10 for n in range(100)]


def test_joblib_raises_what_a_call_raised():
    joblib = pytest.importorskip('joblib')
    dispy.register_joblib()
    with joblib.parallel_backend('dispy', nodes='local'):
        with pytest.raises(Odd, match='no'):
            joblib.Parallel()(joblib.delayed(fail)(n) for n in range(10))


def test_a_grid_search_of_scikit_learn():
    joblib = pytest.importorskip('joblib')
    pytest.importorskip('sklearn')
    from sklearn.datasets import load_iris
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC
    dispy.register_joblib()
    data, target = load_iris(return_X_y=True)
    search = GridSearchCV(SVC(), {'C': [0.1, 1, 10], 'gamma': [0.01, 0.1]}, cv=3)
    with joblib.parallel_backend('dispy', nodes='local'):
        search.fit(data, target)
    assert search.best_score_ > 0.9
