"""Large parts of arguments that many jobs have in common are sent once to a node; each job has its
own copy of them."""

import gc
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

import dispy
import dispynode
from clients import PATHS
from conftest import eventually
from dispynode import DropValue, FetchValue, ValueRequests, dumps, loads
from nodes import NodeProcess, SchedulerProcess
from proxy import UP, Proxy
from scenes import pattern
from small_frames import stand_in

MIB = 1 << 20


# -- which values are there, and who waits for some ------------------------------------------------

class One:
    """Whoever needs values: pairs of a name, which stands for a digest, and a size."""

    def __init__(self, *values):
        self.values = tuple((size, name.encode()) for name, size in values)


def fetched(desk):
    """Names of what is to be fetched and of what is dropped, and how many wait no more."""
    served, actions = desk.serve()
    return ([action.digest.decode() for action in actions if isinstance(action, FetchValue)],
            [action.digest.decode() for action in actions if isinstance(action, DropValue)],
            len(served))


def test_a_value_is_fetched_once_for_all_who_need_it():
    desk = ValueRequests(100)
    ones = [One(('a', 10)) for _ in range(3)]
    assert not any(desk.admit('c', one) for one in ones)
    assert fetched(desk) == (['a'], [], 0) and fetched(desk) == ([], [], 0)
    desk.came('c')
    assert fetched(desk) == ([], [], 3) and not desk
    assert desk.admit('c', One(('a', 10))) and desk.total == 10
    assert not desk.admit('another', One(('a', 10)))


def test_what_nobody_needs_makes_room_the_one_not_needed_for_longest_first():
    desk = ValueRequests(30)
    ones = {name: One((name, 10)) for name in 'abcd'}
    for name in 'abc':
        desk.admit('c', ones[name])
        assert fetched(desk)[0] == [name]
        desk.came('c')
        fetched(desk)
    for name in 'bac':
        desk.release('c', ones[name])
    assert desk.admit('c', ones['a'])
    desk.release('c', ones['a'])
    desk.admit('c', ones['d'])
    assert fetched(desk) == (['d'], ['b'], 0) and desk.total == 20


def test_what_is_needed_stays_and_others_wait_for_room():
    desk = ValueRequests(30)
    first, second = One(('a', 20)), One(('b', 20))
    desk.admit('c', first)
    fetched(desk)
    desk.came('c')
    assert fetched(desk)[2] == 1
    desk.admit('c', second)
    late = One(('a', 20))
    assert not desk.admit('c', late)   # it would come before one that waits, again and again
    assert fetched(desk) == ([], [], 0)
    desk.release('c', first)
    assert fetched(desk) == (['b'], ['a'], 0)
    desk.came('c')
    assert fetched(desk) == ([], [], 1)
    desk.release('c', second)
    assert fetched(desk) == (['a'], ['b'], 0)


def test_one_that_needs_more_than_may_be_kept_is_served_alone():
    desk = ValueRequests(30)
    one = One(('a', 25), ('b', 25))
    desk.admit('c', one)
    assert fetched(desk)[0] == ['a']
    desk.came('c')
    assert fetched(desk) == (['b'], [], 0)   # and a stays: it is needed soon
    desk.came('c')
    assert fetched(desk)[2] == 1 and desk.total == 50


def test_who_leaves_fails_or_loses_the_program_waits_no_more():
    desk = ValueRequests(100)
    ones = [One(('a', 10)), One(('a', 10), ('b', 10)), One(('b', 10))]
    for one in ones:
        desk.admit('c', one)
    assert desk.leave('c', (ones[0],)) == [ones[0]] and list(desk.waiting('c')) == ones[1:]
    fetched(desk)
    assert desk.failed('c') == [ones[1]] and list(desk.waiting('c')) == ones[2:]
    assert fetched(desk)[0] == ['b']
    assert desk.interrupt('c') == [ones[2]] and not desk and not desk.coming('c')
    desk.release('c', ones[2])   # it was never served
    assert not desk.admit('c', ones[0])


# -- payloads --------------------------------------------------------------------------------------

def test_large_parts_stand_apart_wherever_they_are():
    large = pattern(2 * MIB)
    value = ['before', large, {'text': 'x' * 3 * MIB}, bytearray(large[::-1]), 5]
    payload = dumps(value, share=dispy.shared_values.payload).payload
    assert type(payload) is dispy.SharedPayload and len(payload) < 1000 and len(payload.values) == 3
    assert payload.values[0].data is large   # nobody can change it: it is not copied
    assert loads(payload) == value and loads(payload)[3] is not loads(payload)[3]
    small = dumps(['x' * 1000], share=dispy.shared_values.payload).payload
    assert type(small) is not dispy.SharedPayload


def test_a_buffer_is_known_by_its_content():
    numpy = pytest.importorskip('numpy')
    array = numpy.arange(1 << 18, dtype='f8')

    def value_of(array):
        return dumps(array, share=dispy.shared_values.payload).payload.values[0]
    first = value_of(array)
    assert value_of(array) is first and value_of(array.copy()) is first
    array[77777] += 1   # between the places that are looked at first
    second = value_of(array)
    assert second is not first and second.digest == hashlib.sha256(array).digest()
    digest = first.digest
    del first
    gc.collect()
    assert (dispy.shared_values.find(digest) is None
            and dispy.shared_values.find(second.digest) is second)


def test_values_are_plain_rows_on_the_wire():
    good = (1, bytes(32))
    for rows, right in (((), True), ((good,), True), ([good], False), (((1, b'x'),), False),
                        (((0, bytes(32)),), False),
                        (((True, bytes(32)),), False), (((1 << 63, bytes(32)),), False)):
        assert dispynode._is_options({'values': rows}) is right, rows


# -- jobs ------------------------------------------------------------------------------------------

def change(array, n):
    """Changes what it gets; returns what it was."""
    before = float(array[n])
    array[:] = -1
    return before


def test_each_job_has_its_own_copy_and_a_changed_value_is_another(make_cluster):
    numpy = pytest.importorskip('numpy')
    array = numpy.arange(1 << 18, dtype='f8')
    with make_cluster(change, nodes='local') as cluster:
        jobs = [cluster.submit(array, n) for n in range(40)]
        array[:40] = 7
        more = [cluster.submit(array, n) for n in range(40)]
        assert [job(60) for job in jobs] == list(range(40))
        assert [job(60) for job in more] == [7.0] * 40
        assert array[100] == 100.0


def test_a_value_that_was_put(make_cluster):
    """It has no buffers, is the job's own, and goes when nobody has it."""
    def compute(number, *values):
        for value in values:
            value['rows'].append(number)
        return number, [len(value['rows']) for value in values], values[0] is values[-1]
    with make_cluster(compute, nodes='local') as cluster:
        value = {'rows': list(range(100000)), 'kind': Marked(3)}
        ref = cluster.put(value)
        value['rows'].clear()
        for n in range(6):
            assert cluster.submit(n, ref, ref)(60) == (n, [100002, 100002], True)
        assert ref.get()['kind'].level == 3 and len(ref.get()['rows']) == 100000
        job = cluster.submit(7, ref)
        digest = ref._values[0].digest
        del ref
        assert job(60) == (7, [100001], True)
        gc.collect()
        assert dispy.shared_values.find(digest) is None


class Marked:
    def __init__(self, level):
        self.level = level


def test_a_ref_goes_to_jobs_alone(make_cluster):
    with make_cluster(change, nodes='local') as cluster:
        ref = cluster.put([1])
        assert ref.get() == [1] and 'bytes' in repr(ref)
        with pytest.raises(TypeError, match='jobs of this program'):
            pickle.dumps(ref)
        with pytest.raises((TypeError, pickle.PicklingError)):
            cluster.put(open(os.devnull).fileno)


def last(array, path=''):
    """Waits for a file, if one is named."""
    import os
    import time
    while path and not os.path.exists(path):
        time.sleep(0.01)
    return float(array[-1])


def test_each_node_is_sent_a_value_once_and_the_program_has_one_copy(tmp_path):
    numpy = pytest.importorskip('numpy')
    array = numpy.ones(3 * MIB, dtype='f8')
    with NodeProcess(tmp_path / 'a') as one, NodeProcess(tmp_path / 'b') as two, \
            Proxy(one.address) as first, Proxy(two.address) as second:
        with dispy.JobCluster(last, nodes=[first.address, second.address]) as cluster:
            cluster.wait_nodes(2, 30)
            before = psutil.Process().memory_info().rss
            jobs = [cluster.submit(array) for _ in range(60)]
            assert psutil.Process().memory_info().rss - before < 2 * array.nbytes
            assert {job(60) for job in jobs} == {1.0}
            eventually(lambda: all(
                sum(connection.sent[UP] for connection in proxy.connections) > array.nbytes
                or not used for proxy, used in zip((first, second), used_by(cluster))))
            for proxy in (first, second):
                # Files of modules, too
                assert (sum(connection.sent[UP] for connection in proxy.connections) < array.nbytes
                        + 2 * MIB)


def used_by(cluster):
    return [node.jobs_done > 0 for node in cluster.status().nodes]


def test_a_node_keeps_no_more_than_it_may(tmp_path):
    numpy = pytest.importorskip('numpy')
    script = stand_in(tmp_path / 'changed', 'VALUES_KEPT = 5 << 20')
    with NodeProcess(tmp_path / 'node', script=script) as node, Proxy(node.address) as proxy:
        with dispy.JobCluster(last, nodes=[proxy.address]) as cluster:
            arrays = [numpy.full(2 * MIB // 8 + 1, n, dtype='f8') for n in range(6)]
            for _ in range(2):
                assert [cluster.submit(array)(60) for array in arrays] == list(range(6))
            assert 1 <= len(values_on(node)) <= 2
            jobs = [cluster.submit(arrays[n % 6]) for n in range(60)]   # all at once
            assert [job(60) for job in jobs] == [n % 6 for n in range(60)]
        eventually(lambda: not values_on(node))


def values_on(node):
    return [name for where, _, names in os.walk(node.prefix)
            for name in names if os.path.basename(where) == 'values']


def test_a_value_that_is_too_large_for_the_node_ends_its_jobs_alone(tmp_path):
    numpy = pytest.importorskip('numpy')
    with NodeProcess(tmp_path / 'node', '--max-value', '3m') as node:
        with dispy.JobCluster(last, nodes=[node.address]) as cluster:
            jobs = [cluster.submit(numpy.ones(MIB)) for _ in range(3)]
            for job in jobs:
                job.wait(30)
                assert job.status == job.Terminated
                assert 'arguments of 8388' in job.exception and 'depends' in job.exception
            assert cluster.submit(numpy.ones(2 * MIB // 8 + 1))(30) == 1.0


def test_a_job_that_waits_for_its_value_has_not_begun(tmp_path):
    """It can be cancelled; when the link breaks it waits again, though the cluster is not
    reentrant."""
    numpy = pytest.importorskip('numpy')
    array = numpy.ones(4 * MIB, dtype='f8')
    with NodeProcess(tmp_path / 'node') as node, Proxy(node.address) as proxy:
        with dispy.JobCluster(last, nodes=[proxy.address]) as cluster:
            cluster.wait_nodes(1, 30)
            connection = proxy.open[0]
            proxy.rate = 2 * MIB
            jobs = [cluster.submit(array) for _ in range(4)]
            eventually(lambda: connection.sent[UP] > MIB)
            assert [job.status for job in jobs] == [jobs[0].Created] * 4
            cluster.cancel(jobs[1])
            assert jobs[1].wait(20) and jobs[1].status == jobs[1].Cancelled
            assert connection.sent[UP] < array.nbytes
            connection.cut()
            proxy.rate = None
            for job in (jobs[0], *jobs[2:]):
                assert job(60) == 1.0 and job.status == job.Finished
            assert proxy.count == 2


@pytest.mark.parametrize('at', [0.3, 0.9, 1.0001])
def test_the_link_breaks_while_a_value_comes(tmp_path, at):
    numpy = pytest.importorskip('numpy')
    array = numpy.ones(MIB // 2, dtype='f8')
    with NodeProcess(tmp_path / 'node') as node, Proxy(node.address) as proxy:
        with dispy.JobCluster(last, nodes=[proxy.address], reentrant=True) as cluster:
            cluster.wait_nodes(1, 30)
            proxy.at(proxy.open[0].sent[UP] + int(at * array.nbytes), 'reset', UP)
            assert [job(60) for job in [cluster.submit(array) for _ in range(6)]] == [1.0] * 6
            assert proxy.count == 2


def test_a_node_that_is_started_again_asks_again(tmp_path):
    numpy = pytest.importorskip('numpy')
    array = numpy.ones(MIB, dtype='f8')
    node = NodeProcess(tmp_path / 'node')
    with dispy.JobCluster(last, nodes=[node.address], reentrant=True,
                          pulse_interval=0.5) as cluster:
        assert cluster.submit(array)(30) == 1.0
        jobs = [cluster.submit(array, str(tmp_path / 'go')) for _ in range(4)]
        eventually(lambda: any(job.status == job.Running for job in jobs))
        node.kill()
        with NodeProcess(tmp_path / 'node', port=node.port):
            (tmp_path / 'go').write_text('')
            assert [job(60) for job in jobs] == [1.0] * 4
            cluster.close()


def test_a_scheduler_keeps_values_until_no_job_needs_them(tmp_path):
    """Once for all jobs, over its own death; those of programs that are gone run all the same."""
    numpy = pytest.importorskip('numpy')
    array, other = numpy.ones(MIB, dtype='f8'), numpy.full(MIB, 2.0)
    with NodeProcess(tmp_path / 'node') as node:
        options = ('-n', '127.0.0.1:%d' % node.port)
        scheduler = SchedulerProcess(tmp_path / 'scheduler', *options)
        with Proxy(scheduler.address) as proxy, dispy.SharedJobCluster(
                last, scheduler_port=proxy.address[1], nodes=[node.address]) as cluster:
            jobs = [cluster.submit(array, str(tmp_path / 'go')) for _ in range(6)]
            late = cluster.submit(other, str(tmp_path / 'go'))
            eventually(lambda: len(values_at(scheduler)) == 2)
            assert (sum(connection.sent[UP] for connection in proxy.connections) < 2 * array.nbytes
                    + 2 * MIB)
            scheduler.kill()
            with SchedulerProcess(tmp_path / 'scheduler', *options,
                                  port=scheduler.port) as scheduler:
                (tmp_path / 'go').write_text('')
                assert [job(60) for job in jobs] == [1.0] * 6 and late(60) == 2.0
                assert sum(connection.sent[UP]
                           for connection in proxy.connections) < 2 * array.nbytes + 2 * MIB
                cluster.close()
                eventually(lambda: not values_at(scheduler))


def values_at(scheduler):
    return [name for _, _, names in os.walk(scheduler.state) for name in names if len(name) == 64]


def test_jobs_that_wait_at_a_scheduler_for_a_value_can_be_cancelled(tmp_path):
    numpy = pytest.importorskip('numpy')
    with NodeProcess(tmp_path / 'node') as node, \
            SchedulerProcess(tmp_path / 'scheduler',
                             '-n', '127.0.0.1:%d' % node.port) as scheduler, \
            Proxy(scheduler.address) as proxy:
        with dispy.SharedJobCluster(last, scheduler_port=proxy.address[1],
                                    nodes=[node.address]) as cluster:
            cluster.wait_nodes(1, 30)
            proxy.rate = 2 * MIB
            jobs = [cluster.submit(numpy.ones(MIB)) for _ in range(3)]
            eventually(lambda: proxy.open[0].sent[UP] > MIB)
            cluster.cancel(jobs[1])
            assert jobs[1].wait(20) and jobs[1].status == jobs[1].Cancelled
            proxy.open[0].cut()
            proxy.rate = None
            assert [job(60) for job in (jobs[0], jobs[2])] == [1.0] * 2


PROGRAM = '''
import os, sys, time
import numpy
import dispy
sys.path[:0] = %(paths)r
from test_values import last

if __name__ == '__main__':
    cluster = dispy.JobCluster(last, nodes=[('127.0.0.1', %(port)d)], recover_file=%(path)r)
    array = numpy.ones(1 << 20)
    jobs = [cluster.submit(array, %(go)r) for _ in range(8)]
    jobs.append(cluster.submit(numpy.full(1 << 18, 3.0), %(go)r))
    while not any(job.status == job.Running for job in jobs):
        time.sleep(0.01)
    print('begun', flush=True)
    time.sleep(100)
'''


def test_values_outlive_the_program_with_a_recover_file(tmp_path):
    """Each is in the file once, and goes when no job needs it."""
    pytest.importorskip('numpy')
    path, go = str(tmp_path / 'recover'), str(tmp_path / 'go')
    with NodeProcess(tmp_path / 'node') as node:
        script = tmp_path / 'program.py'
        script.write_text(textwrap.dedent(PROGRAM % {
            'paths': [os.path.dirname(os.path.abspath(__file__)), *PATHS], 'port': node.port,
            'path': path, 'go': go}))
        program = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
        assert program.stdout.readline().strip() == b'begun'
        program.send_signal(signal.SIGKILL)
        program.wait()
        program.stdout.close()
        size = sum(os.path.getsize(path + end)
                   for end in ('', '-new', '-wal') if os.path.exists(path + end))
        assert size < 4 * 8 * MIB   # in FILE-new, in the log and in the file itself
        (tmp_path / 'go').write_text('')
        with dispy.JobCluster(last, nodes=[node.address], recover_file=path) as cluster:
            assert len(cluster.recovered) == 9
            assert sorted(job(60) for job in cluster.recovered) == [1.0] * 8 + [3.0]
            assert len(cluster.recovered[0].arguments) < 300
            assert cluster.submit([1.0])(30) == 1.0
            left = dispy.core_of(cluster).journal._db.execute('SELECT count(*) '
                                                              'FROM vals').fetchone()[0]
            assert left == 0


def test_arguments_of_a_job_are_shown_with_their_values(make_cluster):
    numpy = pytest.importorskip('numpy')
    array = numpy.arange(1 << 18)
    with make_cluster(last, nodes='local') as cluster:
        cluster.wait_nodes(1, 30)
        job = cluster.submit(array, 'no such file')
        assert (job.args[0] == array).all() and job.args[1] == 'no such file' and job.kwargs == {}
        job.args[0][:] = 0
        assert (job.args[0] == array).all()
        cluster.cancel(job)
        assert job.wait(20)


def test_a_job_whose_program_changes_values_itself(make_cluster):
    """A job is a program too: what it gets by digest and what it gives to clusters of its own are
    both opened."""
    def compute(array):
        import dispy
        values = dispy.shared_values
        payload = dispy.dumps(array, share=values.payload).payload
        return float(dispy.loads(payload)[-1]), type(payload).__name__
    numpy = pytest.importorskip('numpy')
    with make_cluster(compute, nodes='local') as cluster:
        for _ in range(3):
            assert cluster.submit(numpy.ones(1 << 18))(60) == (1.0, 'SharedPayload')


def test_kept_values_are_read_where_there_are_many_mappings(tmp_path):
    """Each mapping may hold a descriptor."""
    data = pattern(2 * MIB)
    digest = hashlib.sha256(data).digest()
    (tmp_path / digest.hex()).write_bytes(data)
    files = dispynode.ValueFiles(str(tmp_path))
    opened = [files.open(len(data), digest) for _ in range(files.MAPPED_MOST + 5)]
    assert {bytes(value[:]) == data for value in opened} == {True} and type(opened[-1]) is bytearray
    opened[0][:4] = opened[-1][:4] = b'mine'
    os.unlink(str(tmp_path / digest.hex()))
    assert bytes(opened[1][:]) == data and opened[0][:4] == b'mine'
    with pytest.raises(OSError):
        files.open(len(data), digest)
