"""Results as they come: provisional ones, in order, as completed."""

import gc
import itertools
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

import dispy
from conftest import ROOT, eventually, on_a_terminal
from dispy import DispyJob


def steps(count, value=lambda n: n):
    for n in range(count):
        dispy_provisional_result(value(n))   # noqa: F821
    return 'final'


@pytest.mark.parametrize('value', [lambda n: n, lambda n: {n}, lambda n: lambda: n, lambda n: b'%d'
                                   % n * 50000], ids=['plain', 'set', 'function', 'large'])
def test_provisional_results_come_in_order_and_then_the_final_one(make_cluster, value):
    seen = []

    def ended(job):
        seen.append((job.status, job.result))
        time.sleep(0.0005)
    with make_cluster(steps, nodes='local', job_status=ended) as cluster:
        job = cluster.submit(100, value)
        assert job(60) == 'final'
        assert cluster.wait(30)
    plain = [result() if callable(result) else result for _, result in seen]
    expected = [value(n)() if callable(value(n)) else value(n) for n in range(100)]
    assert plain == expected + ['final']
    assert ([status for status, _ in seen]
            == [DispyJob.ProvisionalResult] * 100 + [DispyJob.Finished])


def test_provisional_results_without_a_callback(make_cluster):
    def compute(flag):
        dispy_provisional_result('first')   # noqa: F821
        while not os.path.exists(flag):
            time.sleep(0.01)
        raise ValueError('in the end')
    import tempfile
    with tempfile.TemporaryDirectory() as directory, make_cluster(compute,
                                                                  nodes='local') as cluster:
        flag = os.path.join(directory, 'flag')
        job = cluster.submit(flag)
        eventually(lambda: job.status == DispyJob.ProvisionalResult)
        assert job.result == 'first' and not job.finish.is_set()
        with open(flag, 'w'):
            pass
        assert (job(20) is None and job.status == DispyJob.Terminated and job.result is None
                and 'in the end' in job.exception)


def test_provisional_results_from_threads_of_a_job(make_cluster):
    def compute():
        def send(n):
            for m in range(20):
                dispy_provisional_result((n, m))   # noqa: F821

        threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    seen = []
    with make_cluster(compute, nodes='local',
                      job_status=lambda job: seen.append(job.result)) as cluster:
        job = cluster.submit()
        job(30)
        assert job.status == DispyJob.Finished, job.exception
    assert seen.pop() is None
    assert sorted(seen) == [(n, m) for n in range(4) for m in range(20)]
    assert [m for n, m in seen if n == 2] == list(range(20))


def test_a_job_is_cancelled_on_its_provisional_result(make_cluster):
    """Early stop: enough is known."""
    def compute(n):
        for k in itertools.count():
            dispy_provisional_result(k)   # noqa: F821
            time.sleep(0.001)

    def look(job):
        if job.status == DispyJob.ProvisionalResult and job.result >= 5:
            cluster.cancel(job)
    with make_cluster(compute, nodes='local', job_status=look) as cluster:
        jobs = [cluster.submit(n) for n in range(3)]
        assert cluster.wait(30)
    assert {job.status for job in jobs} == {DispyJob.Cancelled}


def test_a_callback_that_raises_on_a_provisional_result(make_cluster, caplog):
    seen = []

    def ended(job):
        seen.append(job.result)
        raise ValueError('no matter')
    with make_cluster(steps, nodes='local', job_status=ended) as cluster:
        cluster.submit(3)
    assert seen == [0, 1, 2, 'final']


# -- map and as_completed --------------------------------------------------------------------------

def square(n, m=0):
    return n * n + m


def test_map_keeps_order_and_is_lazy(make_cluster):
    taken = []

    def inputs():
        for n in itertools.count():
            taken.append(n)
            yield n
    with make_cluster(square, nodes='local') as cluster:
        assert list(cluster.map(range(500), itertools.repeat(1))) == [n * n + 1 for n in range(500)]
        results = cluster.map(inputs(), in_flight=20)
        assert taken == []
        assert [next(results) for _ in range(100)] == [n * n for n in range(100)]
        assert len(taken) <= 120
        results.close()
        assert cluster.wait(20)
        with pytest.raises(ValueError, match='in_flight=0'):
            cluster.map([1], in_flight=0)


@pytest.mark.long
def test_map_over_very_many_inputs_keeps_memory_flat(make_cluster, pytestconfig):
    """Ten times as many inputs, the same peak: 2,500 and 25,000, with --long 100,000 and a
    million."""
    process, alive, peaks = psutil.Process(), [], []
    with make_cluster(square, nodes='local') as cluster:
        for count in (100000, 1000000) if pytestconfig.getoption('long') else (2500, 25000):
            peak = total = 0
            for n, result in enumerate(cluster.map(k for k in range(count))):
                total += result
                if n % 1000 == 0:
                    peak = max(peak, process.memory_info().rss)
                if n == count // 2:
                    alive.append(sum(type(thing) is DispyJob for thing in gc.get_objects()))
            assert total == sum(k * k for k in range(count))
            peaks.append(peak)
    assert max(alive) < 4000, 'jobs that have ended are kept'
    assert peaks[1] - peaks[0] < 8 << 20, '%d MiB more' % ((peaks[1] - peaks[0]) >> 20)


def test_map_raises_what_a_job_raised_with_the_remote_traceback(make_cluster):
    def compute(n):
        if n == 3:
            raise KeyError('three')
        if n == 4:
            os._exit(1)
        return n
    with make_cluster(compute, nodes='local') as cluster:
        results = cluster.map([1, 2, 3])
        assert [next(results), next(results)] == [1, 2]
        with pytest.raises(KeyError) as caught:
            next(results)
        assert 'in compute' in str(caught.value.__cause__)
        with pytest.raises(dispy.JobFailed, match='exit code 1'):
            list(cluster.map([4]))


def test_as_completed(make_cluster):
    with make_cluster(time.sleep, nodes='local') as cluster:
        jobs = [cluster.submit(1000)] + [cluster.submit(0) for _ in range(10)]
        ended = cluster.as_completed(jobs)
        assert {next(ended) for _ in range(10)} == set(jobs[1:])
        with pytest.raises(TimeoutError, match='1 of 11'):
            list(cluster.as_completed(jobs, timeout=0.05))
        cluster.cancel(jobs[0])
        assert list(ended) == [jobs[0]]
        assert set(cluster.as_completed(jobs)) == set(jobs)


# -- progress --------------------------------------------------------------------------------------

PROGRAM = '''
import sys, time, dispy
if sys.argv[1] == 'plain':
    sys.modules['tqdm'] = None   # as if it were not installed
with dispy.JobCluster(time.sleep, nodes='local') as cluster:
    jobs = [cluster.submit(0.02) for _ in range(20)]
    assert len(list(cluster.as_completed(jobs[:10], progress=True))) == 10
    assert cluster.wait(progress=True) and cluster.wait(timeout=0, progress=True)
    job = cluster.submit(1000)
    assert not cluster.wait(timeout=0.05, progress=True)
    cluster.cancel(job)
'''


def test_progress_on_a_terminal_and_silence_elsewhere():
    code, text = on_a_terminal(sys.executable, '-c', PROGRAM, 'plain')
    assert code == 0, text
    assert b'10 of 10 jobs' in text and b'20 of 20 jobs' in text and b'20 of 21 jobs' in text
    done = subprocess.run([sys.executable, '-c', PROGRAM, 'plain'], stderr=subprocess.PIPE,
                          cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (0, b'')


def test_progress_with_tqdm(monkeypatch):
    tqdm = pytest.importorskip('tqdm')
    monkeypatch.setattr(tqdm.tqdm, 'monitor_interval', 0)   # or it keeps a thread
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    with dispy.Progress() as shown:
        for n in range(5):
            shown.show(n + 1, 5)
        assert (shown._bar.n, shown._bar.total) == (5, 5)


# -- setup pays once, numpy ------------------------------------------------------------------------

def test_a_slow_import_is_paid_once(make_cluster, tmp_path):
    """2 s of setup and a hundred jobs: each job takes a moment."""
    module = tmp_path / 'slow_module_of_a_test.py'
    module.write_text('import time\ntime.sleep(2)\nVALUE = 5\n')

    def setup():
        global slow_module_of_a_test
        import slow_module_of_a_test

    def compute(n):
        import slow_module_of_a_test as again
        return slow_module_of_a_test.VALUE + n, again is slow_module_of_a_test
    with make_cluster(compute, nodes='local', setup=setup, depends=[str(module)]) as cluster:
        jobs = [cluster.submit(n) for n in range(100)]
        assert [job(60) for job in jobs] == [(5 + n, True) for n in range(100)]
        assert max(job.end_time - job.start_time for job in jobs) < 2


@pytest.mark.fork('a multiprocessing.Value of setup is refused: see test_start_method.py')
def test_a_shared_value_is_shared_by_the_jobs_of_a_node(make_cluster):
    def setup():
        global total
        import multiprocessing
        total = multiprocessing.Value('i', 0)

    def compute(n):
        with total.get_lock():
            total.value += n
        return total.value
    with make_cluster(compute, nodes='local', setup=setup) as cluster:
        jobs = [cluster.submit(n) for n in range(200)]
        assert cluster.wait(60)
        assert max(job.result for job in jobs) == sum(range(200))


def test_numpy_arrays_travel_and_can_be_written_to(make_cluster):
    numpy = pytest.importorskip('numpy')

    def compute(array, small):
        array += 1
        return array[::2], small, array
    with make_cluster(compute, nodes='local') as cluster:
        array = numpy.arange(500000, dtype='f8').reshape(500, 1000)
        job = cluster.submit(array, numpy.arange(3))
        array[:] = -1   # too late to matter
        half, small, whole = job(30)
        expected = numpy.arange(500000, dtype='f8').reshape(500, 1000) + 1
        assert ((half == expected[::2]).all() and (whole == expected).all()
                and list(small) == [0, 1, 2])
        whole[0, 0] = 7


def test_a_trace_names_the_file_and_shows_the_line(make_cluster):
    def fails():
        return 1 / 0   # here
    with make_cluster(fails, nodes='local') as cluster:
        job = cluster.submit()
        job.wait(20)
        assert ('File "%s", line' % os.path.abspath(__file__) in job.exception
                and 'return 1 / 0   # here' in job.exception)
