"""Numbers, texts and flags of all kinds are taken as what they are, or refused with a text; what a
node refuses is not sent for ever."""

import decimal
import enum
import fractions
import logging
import math
import pickle
import threading

import pytest

import dispy
from dispy import _seconds, flag_of, in_range, plain_number
from dispynode import REFUSED_MOST
from nodes import NodeProcess

numpy = pytest.importorskip('numpy')


class Number(enum.IntEnum):
    ONE = 1
    TEN = 10


class Text(str):
    pass


def test_plain_numbers():
    for value, plain in ((5, 5), (numpy.int64(5), 5), (Number.ONE, 1), (2.5, 2.5),
                         (numpy.float64(2.5), 2.5), (numpy.float32(2.5), 2.5),
                         (fractions.Fraction(5, 2), 2.5), (numpy.uint8(7), 7)):
        assert plain_number(value) == plain and type(plain_number(value)) is type(plain)
    for value in (True, numpy.bool_(True), 'x', None, [], math.nan, numpy.nan, 1j, b'5',
                  decimal.Decimal):
        assert plain_number(value) is None
    for value in (2.5, 2.0, numpy.float64(2)):
        assert plain_number(value, True) is None


def test_ranges_flags_and_times():
    assert type(in_range('n', numpy.int64(3), 1, 1, 5)) is int
    for value in (0, 6, 'x', True, math.nan, math.inf):
        with pytest.raises(ValueError, match='n=.*between 1 and 5'):
            in_range('n', value, 1, 1, 5)
    assert [flag_of('f', value) for value in (True, 0, numpy.bool_(True))] == [True, False, True]
    for value in ('no', '', 5, None, [], numpy.array([1, 0])):
        with pytest.raises(TypeError, match='f='):
            flag_of('f', value)
    assert (_seconds('t', None) is None and _seconds('t', math.inf) is None
            and _seconds('t', 1e10) is None and _seconds('t', numpy.float32(2)) == 2.0)
    for value, kind in (('x', TypeError), ([], TypeError), (math.nan, ValueError)):
        with pytest.raises(kind, match='t='):
            _seconds('t', value)


def square(n):
    return n * n


def test_options_of_jobs(make_cluster):
    """As trial: dispy_timeout computed by numpy; also other kinds of numbers."""
    with make_cluster(square, nodes='local') as cluster:
        for options in ({'dispy_timeout': 3 * numpy.mean([8.0, 12.0])},
                        {'dispy_timeout': numpy.float32(3)}, {'dispy_cpus': numpy.int64(1)},
                        {'dispy_priority': numpy.int32(1)}, {'dispy_priority': Number.TEN},
                        {'dispy_memory': numpy.int64(1 << 30)}, {'dispy_retries': Number.ONE}):
            job = cluster.submit(3, **options)
            assert job(20) == 9, (options, job.exception)


def test_options_of_clusters(tmp_path):
    with NodeProcess(tmp_path) as node:
        with dispy.JobCluster(
                square, nodes=[(Text('127.0.0.1'), numpy.int64(node.port), numpy.int64(1))],
                pulse_interval=numpy.float32(1),
                ping_interval=numpy.int64(5), dest_path=Text('place'), reentrant=numpy.bool_(True),
                max_jobs_per_worker=numpy.int64(5),
                loglevel=numpy.int64(30), forward_logs=True, dispy_port=Number.TEN) as cluster:
            assert cluster.submit(4)(20) == 16
            cluster.wait_nodes(numpy.int64(1), numpy.float64(10))
            assert cluster.set_node_cpus(('127.0.0.1', node.port), numpy.int64(1)) == 1
            assert cluster.wait(numpy.float64(5))


@pytest.mark.parametrize('options, error', [
    ({'reentrant': 'no'}, TypeError), ({'cleanup': 'x'}, TypeError), ({'cleanup': 5}, TypeError),
    ({'dispy_port': 9701.5}, ValueError),
    ({'max_jobs_per_worker': 1.5}, ValueError), ({'nodes': 'a,b'}, ValueError),
    ({'nodes': ['local']}, ValueError), ({'nodes': 'a\0b'}, ValueError),
    ({'nodes': [('a', True)]}, ValueError), ({'dest_path': 5}, TypeError),
    ({'dest_path': True}, TypeError), ({'dest_path': ['x']}, TypeError),
    ({'host': 5}, TypeError), ({'host': []}, TypeError), ({'host': b'x'}, TypeError),
    ({'host': ('127.0.0.1',)}, TypeError),
    ({'certfile': '\0'}, ValueError), ({'certfile': ''}, ValueError),
    ({'keyfile': 'x'}, ValueError), ({'cafile': 'x'}, ValueError),
    ({'recover_file': '\0'}, ValueError), ({'recover_file': b'x'}, TypeError),
    ({'forward_logs': 'no'}, TypeError)])
def test_parameters_that_make_no_sense(options, error):
    """The text names the parameter."""
    with pytest.raises(error, match=next(iter(options))):
        dispy.JobCluster(square, **{'nodes': [('127.0.0.1', 1)], **options})


def test_exclusive_and_ports_of_a_shared_cluster():
    for options, error in (({'exclusive': 'no'}, TypeError), ({'scheduler_port': 1.5}, ValueError),
                           ({'scheduler_port': True}, ValueError)):
        with pytest.raises(error, match=next(iter(options))):
            dispy.SharedJobCluster(square, **options)


def test_times_to_wait(make_cluster):
    with make_cluster(square, nodes='local') as cluster:
        job = cluster.submit(3)
        for timeout in (math.inf, 1e10, None, numpy.float64(20)):
            assert job(timeout) == 9 and cluster.wait(timeout)
            assert list(cluster.as_completed([job], timeout)) == [job]
        event = threading.Event()
        threading.Timer(0.1, event.set).start()
        slow = cluster.submit(4)
        assert slow.wait(math.inf)
        for timeout in ('x', []):
            for call in (cluster.submit(1).wait, cluster.wait):
                with pytest.raises(TypeError, match='timeout'):
                    call(timeout)


# -- what the other side cannot use ----------------------------------------------------------------

class Odd(float):
    """Pickled by name, which no node opens."""


def test_what_a_node_cannot_use_is_not_sent_for_ever(tmp_path, caplog):
    """Past all checks: the job ends with a text, the others run, and there are few connections."""
    caplog.set_level(logging.WARNING, 'dispy')
    with NodeProcess(tmp_path) as node, dispy.JobCluster(square, nodes=[node.address]) as cluster:
        assert cluster.submit(2)(20) == 4
        job = dispy.DispyJob(dispy.core_of(cluster).comp, pickle.dumps(((3,), {}), 5),
                             {'timeout': Odd(5.0)}, 'odd')
        core = dispy.core_of(cluster)
        with core.book.lock:
            core.book.enter(job)
            core.driver.post(job)
        assert (job.wait(60) and job.status == job.Terminated
                and 'cannot use what was sent' in job.exception), job.exception
        assert cluster.submit(5)(60) == 25
        assert node.log().count('cannot be used') <= REFUSED_MOST + 1
        assert node.process.poll() is None


def test_a_shared_cluster_ends_such_a_job_too(tmp_path):
    from nodes import SchedulerProcess
    with NodeProcess(tmp_path / 'n') as node, SchedulerProcess(tmp_path / 's', '-n', '127.0.0.1:%d'
                                                               % node.port) as scheduler:
        with dispy.SharedJobCluster(square, scheduler_port=scheduler.port) as cluster:
            assert cluster.submit(2)(20) == 4
            job = dispy.DispyJob(dispy.core_of(cluster).comp, pickle.dumps(((3,), {}), 5),
                                 {'timeout': Odd(5.0)}, 'odd')
            core = dispy.core_of(cluster)
            with core.book.lock:
                core.book.enter(job)
                core.driver.post(job)
            assert job.wait(60) and 'cannot use what was sent' in job.exception, job.exception
            assert cluster.submit(5)(60) == 25
