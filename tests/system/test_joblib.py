"""The backend for joblib: what joblib promises of its backends holds for ours."""

import os
import pickle
import subprocess
import sys
import textwrap
import warnings

import psutil
import pytest

import dispy
from conftest import eventually
from nodes import NodeProcess

joblib = pytest.importorskip('joblib')
delayed, Parallel = joblib.delayed, joblib.Parallel


@pytest.fixture(autouse=True)
def clusters():
    """Clusters are kept for a while; not beyond a test."""
    dispy.register_joblib()
    yield
    dispy.joblib_clusters.close()


def pid(*_):
    return os.getpid()


def meet(directory, count, seconds=20):
    """Whether so many calls are under way at once, at some time."""
    import time
    path = os.path.join(directory, str(os.getpid()))
    until = time.monotonic() + seconds
    open(path, 'w').close()
    while time.monotonic() < until:
        if len(os.listdir(directory)) >= count:
            return True
        time.sleep(0.01)
    return False


def most_at_once(directory, n):
    """How many calls are under way, while this one is."""
    import time
    path = os.path.join(directory, str(n))
    open(path, 'w').close()
    time.sleep(0.05)
    there = len(os.listdir(directory))
    os.unlink(path)
    return there


def test_one_cluster_serves_all_calls_and_is_kept_after_them():
    with joblib.parallel_config(backend='dispy', nodes='local'):
        pids = {*Parallel(n_jobs=2)(delayed(pid)(n) for n in range(20)),
                *Parallel(n_jobs=2)(delayed(pid)(n) for n in range(20))}
        with Parallel(n_jobs=2) as parallel:
            pids.update(parallel(delayed(pid)(n) for n in range(20)))
    with joblib.parallel_config(backend='dispy', nodes='local'):
        pids.update(Parallel(n_jobs=2)(delayed(pid)(n) for n in range(20)))
    assert len(pids) <= 2 and len(dispy.joblib_clusters._kept) == 1
    with joblib.parallel_config(backend='dispy', nodes='local', inner_max_num_threads=2):
        others = set(Parallel(n_jobs=2)(delayed(pid)(n) for n in range(20)))
    assert not others & pids
    dispy.joblib_clusters.close()
    eventually(lambda: not any(map(psutil.pid_exists, pids | others)))


def test_a_cluster_that_is_not_used_ends_after_a_while(monkeypatch):
    monkeypatch.setattr(dispy.JoblibClusters, 'KEPT', 0.5)
    with joblib.parallel_config(backend='dispy', nodes='local'):
        pids = set(Parallel(n_jobs=2)(delayed(pid)(n) for n in range(4)))
    eventually(lambda: not any(map(psutil.pid_exists, pids)))
    assert not dispy.joblib_clusters._kept
    with joblib.parallel_config(backend='dispy', nodes='local'):
        assert Parallel(n_jobs=2)(delayed(abs)(n) for n in (-1, -2)) == [1, 2]


def test_what_n_jobs_means_and_that_asking_starts_nothing(tmp_path):
    before = set(psutil.Process().children(recursive=True))
    with joblib.parallel_config(backend='dispy', nodes='local'):
        own = joblib.parallel.get_active_backend()[0]
        cpus = own.effective_n_jobs(-1)
        assert cpus == len(os.sched_getaffinity(0)) and own.effective_n_jobs(cpus + 3) == cpus + 3
        assert [own.effective_n_jobs(n) for n in (1, None, -cpus - 5)] == [1, 1, 1]
    assert set(psutil.Process().children(recursive=True)) == before
    with NodeProcess(tmp_path / 'node', cpus=4) as node:
        with joblib.parallel_config(backend='dispy', nodes=[node.address]):
            named = joblib.parallel.get_active_backend()[0]
            assert [named.effective_n_jobs(n) for n in (-1, -2, -3)] == [4, 3, 2]
            with pytest.raises(ValueError, match='no meaning'):
                Parallel(n_jobs=0)(delayed(abs)(n) for n in range(2))
            assert not dispy.joblib_clusters._kept
            # no more calls at once than were asked for, though there are more CPUs
            (tmp_path / 'calls').mkdir()
            assert max(Parallel(n_jobs=2, batch_size=1, pre_dispatch='all')(
                delayed(most_at_once)(str(tmp_path / 'calls'), n) for n in range(20))) <= 2
        dispy.joblib_clusters.close()


def test_there_may_be_more_calls_at_once_than_cpus(tmp_path):
    count = len(os.sched_getaffinity(0)) + 2
    with joblib.parallel_config(backend='dispy', nodes='local'):
        assert all(Parallel(n_jobs=count, batch_size=1)(delayed(meet)(str(tmp_path), count)
                                                        for _ in range(count)))


def fail(n):
    raise KeyError(n)


def unfit():
    raise AttributeError('not like this')


class Unpicklable:
    def __reduce__(self):
        unfit()


def test_what_calls_raise_and_what_cannot_be_pickled():
    with joblib.parallel_config(backend='dispy', nodes='local'):
        with pytest.raises(KeyError, match='3'):
            Parallel(n_jobs=2)(delayed(fail)(n) for n in (3, 3, 3))
        with pytest.raises(pickle.PicklingError, match='not like this'):
            Parallel(n_jobs=2)(delayed(abs)(Unpicklable()) for _ in range(9))
        assert Parallel(n_jobs=2)(delayed(abs)(n) for n in (-1, -2)) == [1, 2]


def speak(n):
    import warnings
    print('call %d prints' % n)
    sys.stderr.write('call %d complains\n' % n)
    warnings.warn('call %d warns' % n)


def test_what_calls_print_and_warn_appears(capsys):
    with joblib.parallel_config(backend='dispy', nodes='local'):
        Parallel(n_jobs=2)(delayed(speak)(n) for n in range(6))
    out, err = capsys.readouterr()
    for n in range(6):
        assert ('call %d prints\n' % n in out and 'call %d complains\n' % n in err
                and 'call %d warns' % n in err)


def mark(word):
    sys.marks = [*getattr(sys, 'marks', ()), word]   # two functions by value share no variable


def marked(n):
    return (os.getpid(), sys.marks, os.environ.get('OMP_NUM_THREADS'),
            os.environ.get('NUMBA_NUM_THREADS'))


def test_an_initializer_and_the_threads_of_numerical_libraries():
    with joblib.parallel_config(backend='dispy', nodes='local', initializer=mark,
                                initargs=('here',), inner_max_num_threads=3):
        rows = Parallel(n_jobs=2, batch_size=1)(delayed(marked)(n) for n in range(20))
    assert {row[1:2] == (['here'],) for row in rows} == {True}
    assert {row[2:] for row in rows} == {('3', '3')}
    assert Parallel(n_jobs=2, backend='dispy', nodes='local', initializer=mark,
                    initargs=('there',))(delayed(marked)(n) for n in range(2))[0][1] == ['there']


def nested(backend):
    import warnings
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        values = Parallel(n_jobs=2, backend=backend)(delayed(pid)(n) for n in range(4))
    return set(values) == {os.getpid()}, [str(one.message) for one in seen]


def test_a_call_on_a_node_may_name_the_backend():
    """It has one CPU there."""
    with joblib.parallel_config(backend='dispy', nodes='local'):
        assert Parallel(n_jobs=2)(delayed(nested)('dispy') for _ in range(2)) == [(True, [])] * 2


def test_below_threads_calls_run_one_after_the_other_with_a_warning():
    with warnings.catch_warnings(record=True):
        warnings.simplefilter('always')
        found = Parallel(n_jobs=2, backend='threading')(delayed(nested)('dispy') for _ in range(2))
    assert all(same for same, _ in found)
    assert any('cannot be nested below threads' in text for _, texts in found for text in texts)


def change(array):
    before = float(array.sum())
    array[:] = 0
    return before


def test_each_call_has_a_large_array_of_its_own():
    numpy = pytest.importorskip('numpy')
    array = numpy.ones(1 << 18)
    with joblib.parallel_config(backend='dispy', nodes='local'):
        assert (Parallel(n_jobs=2, batch_size=1)(delayed(change)(array) for _ in range(12))
                == [float(1 << 18)] * 12)
    assert array.sum() == 1 << 18


def test_many_small_calls_go_in_batches():
    with joblib.parallel_config(backend='dispy', nodes='local'):
        assert Parallel(n_jobs=2)(delayed(abs)(-n) for n in range(5000)) == list(range(5000))
    cluster = dispy.joblib_clusters._kept[0].cluster
    assert sum(node.jobs_done for node in cluster.status().nodes) < 1000


@pytest.mark.parametrize('before', ['import dispy, joblib', 'import joblib, dispy',
                                    'import dispy\nfrom joblib import Parallel\nimport joblib'])
def test_the_backend_is_found_whichever_is_imported_first(tmp_path, before):
    (tmp_path / 'program.py').write_text(before + textwrap.dedent('''
        import math, sys
        assert not any(type(finder).__name__ == '_WhenJoblibComes' for finder in sys.meta_path)
        with joblib.parallel_config(backend='dispy', nodes='local'):
            print(joblib.Parallel(n_jobs=2)(joblib.delayed(math.sqrt)(n * n) for n in range(3)))
        '''))
    found = subprocess.run([sys.executable, str(tmp_path / 'program.py')], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, timeout=60)
    assert found.stdout == b'[0.0, 1.0, 2.0]\n' and found.stderr == b''


def test_a_grid_search_of_scikit_learn():
    pytest.importorskip('sklearn')
    from sklearn.datasets import load_iris
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC
    data, target = load_iris(return_X_y=True)
    search = GridSearchCV(SVC(), {'C': [0.1, 1, 10], 'gamma': [0.01, 0.1]}, cv=3)
    with joblib.parallel_backend('dispy', nodes='local'):
        search.fit(data, target)
    assert search.best_score_ > 0.9
