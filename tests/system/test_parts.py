"""Values that are too large for a frame travel in parts. In most tests frames are small, so that a
few MiB are large."""

import collections
import hashlib
import logging
import os
import socket
import subprocess
import sys
import textwrap

import psutil
import pytest

import dispy
import dispynode
from clients import PATHS
from conftest import eventually
from dispynode import (
    HOLLOW, MESSAGES, OPS, Done, InParts, ClientHello, Jobs, Link, Outcome, Part, PeerError,
    Refused, Results, Role, Session, Started, Unfit, Values, NodeHello, Wrong, out_of_band, batches,
    with_size)
from nodes import NodeProcess, SchedulerProcess
from proxy import DOWN, UP, Proxy
from scenes import pattern
from small_frames import FRAME, LAZY, MIB, stand_in
from talk_link import Talk

pytestmark = pytest.mark.usefixtures('whole_arguments')


@pytest.fixture
def large_memory():
    """12 GiB, for one test at a time: `pytest -n` runs several."""
    fcntl = pytest.importorskip('fcntl')
    with open(os.path.join(os.path.dirname(os.environ['DISPY_TESTS']), 'dispy-tests-memory'),
              'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if psutil.virtual_memory().available < 12 << 30:
            pytest.skip('needs 12 GiB of free memory')
        yield


@pytest.fixture
def small_frames(monkeypatch):
    """In this process."""
    monkeypatch.setitem(MESSAGES, 4, (Jobs, FRAME))
    monkeypatch.setitem(MESSAGES, 37, (Results, FRAME))
    monkeypatch.setattr(dispynode, 'LAZY', LAZY)
    monkeypatch.setattr(dispy, 'LAZY', LAZY)


@pytest.fixture(params=['node', 'embedded', 'scheduler'])
def make_large(request, tmp_path, monkeypatch, small_frames):
    """Makes a cluster with small frames."""
    script = stand_in(tmp_path / 'changed')
    if request.param == 'embedded':
        monkeypatch.setattr(dispynode, '__file__', script)
        yield lambda *args, **options: dispy.JobCluster(*args, nodes='local', **options)
        return
    with NodeProcess(tmp_path / 'node', script=script) as node:
        if request.param == 'node':
            yield lambda *args, **options: dispy.JobCluster(*args, nodes=[node.address], **options)
            return
        with SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:%d' % node.port,
                              script=script.replace('dispynode.py',
                                                    'dispyscheduler.py')) as scheduler:
            yield lambda *args, **options: dispy.SharedJobCluster(
                *args, nodes=[node.address], scheduler_port=scheduler.port, **options)
            large = os.path.join(scheduler.state, 'large')
            try:
                eventually(lambda: not os.listdir(large))
            except AssertionError:
                raise AssertionError('left over: %s\n%s' % (os.listdir(large), scheduler.log()))


def work(data, kind, size):
    """Returns a digest of `data`, and lets `size` bytes come back in one of the ways."""
    digest = hashlib.sha256(data).digest()
    if kind == 'provisional':
        for seed in (b'a', b'b'):
            dispy_provisional_result(pattern(size, seed))   # noqa: F821
    if kind == 'exception':
        raise Fat(pattern(size), digest)
    return (digest, pattern(size)) if kind == 'result' else digest


class Fat(Exception):
    pass


# -- end to end ------------------------------------------------------------------------------------

def test_arguments_and_results(make_large):
    with make_large(work) as cluster:
        data = pattern(10 * MIB, b'data')
        jobs = [cluster.submit(data, 'result', size) for size in (0, 8 * MIB, 20 * MIB + 1)]
        small = [cluster.submit(b'small', '', 0) for _ in range(20)]
        for job, size in zip(jobs, (0, 8 * MIB, 20 * MIB + 1)):
            assert job(60) == (hashlib.sha256(data).digest(), pattern(size))
        assert {job(30) for job in small} == {hashlib.sha256(b'small').digest()}


def test_arrays_can_be_written_to(make_large):
    numpy = pytest.importorskip('numpy')

    def compute(array, more):
        array += 1
        return array, more
    with make_large(compute) as cluster:
        array, more = cluster.submit(numpy.zeros(MIB), b'x' * 5 * MIB)(60)
        assert array.sum() == MIB and more == b'x' * 5 * MIB
        array += 1


def test_provisional_results_come_in_order(make_large):
    seen = []
    with make_large(work, job_status=lambda job: seen.append((job.status, job.result))) as cluster:
        job = cluster.submit(b'data', 'provisional', 6 * MIB)
        assert job(60) == hashlib.sha256(b'data').digest()
        eventually(lambda: len(seen) == 3)
    assert [status for status, _ in seen] == [job.ProvisionalResult, job.ProvisionalResult,
                                              job.Finished]
    assert [value for _, value in seen[:2]] == [pattern(6 * MIB, b'a'), pattern(6 * MIB, b'b')]


def test_an_exception(make_large):
    with make_large(work) as cluster:
        job = cluster.submit(b'data', 'exception', 7 * MIB)
        job.wait(60)
        assert job.status == job.Terminated and 'Fat' in job.exception
        assert job.error.args == (pattern(7 * MIB), hashlib.sha256(b'data').digest())


def test_a_cancelled_job_is_not_sent_on(make_large):
    with make_large(work) as cluster:
        jobs = [cluster.submit(pattern(20 * MIB, bytes([n])), 'result', MIB) for n in range(6)]
        for job in jobs[1:]:
            cluster.cancel(job)
        assert jobs[0](60)[1] == pattern(MIB)
        for job in jobs[1:]:
            job.wait(60)
            assert job.status in (job.Cancelled, job.Finished)
        assert cluster.submit(b'', '', 0)(60)


def test_a_cluster_that_closes_while_values_are_on_their_way(make_large):
    with make_large(work) as cluster:
        assert cluster.submit(b'', '', 0)(60)
        for n in range(4):
            cluster.submit(pattern(30 * MIB), 'result', 30 * MIB)
        cluster.close(terminate=True)
    with make_large(work) as cluster:
        assert (cluster.submit(pattern(5 * MIB), '', 0)(60)
                == hashlib.sha256(pattern(5 * MIB)).digest())


# -- faults ----------------------------------------------------------------------------------------

def counted(path, data, size):
    """Notes that it has begun."""
    with open(path, 'ab') as file:
        file.write(b'.')
    os.path.getsize(path)
    return len(data), pattern(size)


@pytest.mark.parametrize('way, reset', [(UP, 'reset'), (UP, 'cut'), (DOWN, 'reset'), (DOWN, 'cut')])
def test_a_link_that_is_cut_in_the_middle(tmp_path, small_frames, way, reset):
    """The value is sent once more, the job begins once, and nobody is left with a half."""
    with NodeProcess(tmp_path / 'node',
                     script=stand_in(tmp_path / 'changed')) as node, Proxy(node.address) as proxy:
        with dispy.JobCluster(counted, nodes=[proxy.address]) as cluster:
            assert cluster.submit(str(tmp_path / 'first'), b'', 0)(30)
            sent = proxy.connections[0].sent[way]
            proxy.at(sent + 4 * MIB, reset, way)
            job = cluster.submit(str(tmp_path / 'begun'), pattern(9 * MIB if way == UP else 9),
                                 9 * MIB if way == DOWN else 9)
            size, back = job(60)
            assert not proxy.armed and (size, len(back)) == ((9 * MIB, 9) if way == UP
                                                             else (9, 9 * MIB))
        assert (tmp_path / 'begun').read_bytes() == b'.'
        assert proxy.count == 2


def test_a_result_that_waits_for_its_program_on_the_disk(tmp_path, small_frames):
    with NodeProcess(tmp_path / 'node',
                     script=stand_in(tmp_path / 'changed')) as node, Proxy(node.address) as proxy:
        with dispy.JobCluster(work, nodes=[proxy.address]) as cluster:
            assert cluster.submit(b'', '', 0)(30)
            proxy.refuse()
            proxy.at(proxy.connections[0].sent[DOWN] + 4 * MIB, 'cut', DOWN)
            job = cluster.submit(b'data', 'result', 9 * MIB)
            eventually(lambda: [name for name in os.listdir(node.prefix) if name.startswith('r-')],
                       30)
            proxy.accept()
            assert job(60)[1] == pattern(9 * MIB)


def test_a_scheduler_that_is_killed_has_what_it_was_given(tmp_path, small_frames):
    def compute(data, path):
        import os
        import time
        while not os.path.exists(path):
            time.sleep(0.01)
        return data
    script = stand_in(tmp_path / 'changed')
    with NodeProcess(tmp_path / 'node', script=script) as node:
        options = ('-n', '127.0.0.1:%d' % node.port)
        there = dict(script=script.replace('dispynode.py', 'dispyscheduler.py'))
        with SchedulerProcess(tmp_path / 'scheduler', *options, **there) as scheduler:
            with dispy.SharedJobCluster(compute, scheduler_port=scheduler.port,
                                        nodes=[node.address]) as cluster:
                jobs = [cluster.submit(pattern(6 * MIB, bytes([n])), str(tmp_path / 'go'))
                        for n in range(5)]
                large = os.path.join(scheduler.state, 'large')
                eventually(lambda: sorted(os.listdir(large))[-1:]
                           and len([n for n in os.listdir(large) if n.endswith('.p')]) == 5)
                scheduler.kill()
                with open(os.path.join(large, 'new-9.part'), 'w'):
                    pass   # as if one more had been on its way
                with SchedulerProcess(tmp_path / 'scheduler', *options, port=scheduler.port,
                                      **there):
                    assert not [name for name in os.listdir(large) if name.startswith('new-')]
                    (tmp_path / 'go').write_text('')
                    for n, job in enumerate(jobs):
                        assert job(60) == pattern(6 * MIB, bytes([n]))
                    cluster.close()


# -- what finds no room ----------------------------------------------------------------------------

def test_arguments_for_which_a_node_has_no_memory_end_their_job_alone(tmp_path, small_frames):
    """With a text; the job takes no second node with it, and the link goes on."""
    script = stand_in(tmp_path / 'changed', 'def free_memory(): return 15 << 20')
    with NodeProcess(tmp_path / 'a',
                     script=script) as one, NodeProcess(tmp_path / 'b', script=script) as two:
        with Proxy(one.address) as first, Proxy(two.address) as second:
            with dispy.JobCluster(work, nodes=[first.address, second.address],
                                  reentrant=True) as cluster:
                cluster.wait_nodes(2, 30)
                job, small = cluster.submit(pattern(9 * MIB), '',
                                            0), cluster.submit(b'small', '', 0)
                job.wait(30)
                assert job.status == job.Terminated
                for word in ('arguments of 94', 'bytes of memory are free', 'on node', 'depends'):
                    assert word in job.exception
                assert small(30) and cluster.submit(pattern(4 * MIB), '', 0)(30)
            assert min(sum(connection.sent[UP] for connection in proxy.connections)
                       for proxy in (first, second)) < 9 * MIB
            assert first.count == second.count == 1


def test_a_result_for_which_a_program_has_no_memory(tmp_path, small_frames, monkeypatch):
    with NodeProcess(tmp_path / 'node',
                     script=stand_in(tmp_path / 'changed')) as node, Proxy(node.address) as proxy:
        with dispy.JobCluster(work, nodes=[proxy.address]) as cluster:
            assert cluster.submit(b'', '', 0)(30)
            monkeypatch.setattr(dispynode, 'free_memory', lambda: 8 << 20)
            job = cluster.submit(b'', 'result', 9 * MIB)
            job.wait(30)
            assert (job.status == job.Terminated and 'a result of 94' in job.exception
                    and 'in the program' in job.exception)
            assert cluster.submit(b'', 'result', 4 * MIB)(30) and proxy.count == 1


def test_a_provisional_result_for_which_there_is_no_memory_ends_nothing(tmp_path, small_frames,
                                                                        monkeypatch, caplog):
    with NodeProcess(tmp_path / 'node', script=stand_in(tmp_path / 'changed')) as node:
        with dispy.JobCluster(work, nodes=[node.address]) as cluster:
            assert cluster.submit(b'', '', 0)(30)
            monkeypatch.setattr(dispynode, 'free_memory', lambda: 8 << 20)
            assert cluster.submit(b'', 'provisional', 9 * MIB)(30)
    assert 'provisional: a result of 94' in caplog.text


def test_a_result_for_which_its_worker_finds_no_memory(tmp_path, small_frames):
    script = stand_in(tmp_path / 'changed', 'def free_memory(): return 5 << 20')
    with NodeProcess(tmp_path / 'node', script=script) as node:
        with dispy.JobCluster(work, nodes=[node.address]) as cluster:
            job = cluster.submit(b'', 'result', 9 * MIB)
            job.wait(30)
            assert (job.status == job.Terminated
                    and '5242880 bytes of memory are free on the node' in job.exception)
            assert cluster.submit(b'', 'result', 4 * MIB)(30)


@pytest.mark.parametrize('size', [2 * MIB, 9 * MIB], ids=['in one frame', 'in parts'])
def test_the_option_of_a_node(tmp_path, small_frames, size):
    """--max-value holds for what comes in one frame too."""
    with NodeProcess(tmp_path / 'node', '--max-value', '1m',
                     script=stand_in(tmp_path / 'changed')) as node:
        with dispy.JobCluster(work, nodes=[node.address]) as cluster:
            for data, kind, text in ((pattern(size), '', 'arguments of'),
                                     (b'', 'result', 'the result has')):
                job = cluster.submit(data, kind, size)
                job.wait(30)
                assert (job.status == job.Terminated and text in job.exception
                        and str(MIB) in job.exception)
            assert cluster.submit(b'', 'result', MIB - 1000)(30)


@pytest.mark.parametrize('size', [2 * MIB, 9 * MIB], ids=['in one frame', 'in parts'])
def test_the_option_of_a_scheduler(tmp_path, small_frames, size):
    script = stand_in(tmp_path / 'changed')
    with NodeProcess(tmp_path / 'node', script=script) as node, SchedulerProcess(
            tmp_path / 'scheduler', '--max-value', '1m', '-n', '127.0.0.1:%d' % node.port,
            script=script.replace('dispynode.py', 'dispyscheduler.py')) as scheduler:
        with dispy.SharedJobCluster(work, scheduler_port=scheduler.port,
                                    nodes=[node.address]) as cluster:
            job = cluster.submit(pattern(size), '', 0)
            job.wait(30)
            assert job.status == job.Terminated and 'at the scheduler, --max-value' in job.exception
            assert cluster.submit(b'', '', 0)(30)


def test_an_option_that_is_too_small(tmp_path):
    with pytest.raises(AssertionError, match='--max-value 1024: the least is 1048576'):
        NodeProcess(tmp_path, '--max-value', '1k')


@pytest.mark.parametrize('small_disk', ['20m'], indirect=True)
def test_a_scheduler_without_room_on_its_disk(tmp_path, small_frames, small_disk):
    script = stand_in(tmp_path / 'changed')
    with NodeProcess(tmp_path / 'node', script=script) as node, SchedulerProcess(
            os.path.join(small_disk, 'scheduler'), '-n', '127.0.0.1:%d' % node.port,
            script=script.replace('dispynode.py', 'dispyscheduler.py')) as scheduler:
        with dispy.SharedJobCluster(work, scheduler_port=scheduler.port,
                                    nodes=[node.address]) as cluster:
            for data, kind, size in ((pattern(30 * MIB), '', 0), (b'', 'result', 30 * MIB)):
                job = cluster.submit(data, kind, size)
                job.wait(60)
                assert (job.status == job.Terminated
                        and 'bytes are free on its disk (at the scheduler)' in job.exception)
            assert cluster.submit(pattern(5 * MIB), 'result', 5 * MIB)(60)[1] == pattern(5 * MIB)


def test_a_recovery_file_has_its_own_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(dispy, 'JOURNAL_MOST', MIB)
    path = str(tmp_path / 'jobs')
    with NodeProcess(tmp_path / 'node') as node:
        with dispy.JobCluster(work, nodes=[node.address], recover_file=path) as cluster:
            with pytest.raises(ValueError, match='recover_file'):
                cluster.submit(pattern(2 * MIB), '', 0)
            job = cluster.submit(b'', 'result', 2 * MIB)
            # It is too large for the file, and not for this program
            assert job(30)[1] == pattern(2 * MIB)
            assert cluster.submit(b'', 'result', 10)(30)[1] == pattern(10)


def test_what_a_recovery_file_says_of_a_result_that_was_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(dispy, 'JOURNAL_MOST', MIB)
    journal = dispy.Journal(str(tmp_path / 'jobs'))
    journal.begin('c', 'work', False, False, None)
    job = dispy.KeptJob('c', b'payload', None, 1)
    job.submit_time = 1.0
    journal.submitted(job)
    job.state = dispy.JobState.FINISHED
    journal.ended(job, (job.serial, int(Outcome.RETURNED), 1.0, 2.0, bytes(2 * MIB), b'out', b''))
    assert journal.commit()
    [(_, state, _, found)] = journal.known()
    assert (state == journal.ENDED and found[0] == Outcome.RAISED
            and b'was not kept in the recovery file' in found[3])
    journal.close(remove=True)


# -- opening ---------------------------------------------------------------------------------------

def mapped_payload(payload):
    data = b''.join(bytes(piece) for piece in dispynode.pieces_of(payload))
    memory = dispynode.mapped(len(data))
    memory[:] = data
    return memory


class Buffers:
    """Has large buffers beside its pickle."""

    def __init__(self, *contents):
        self.contents = contents

    def __reduce_ex__(self, protocol):
        import pickle
        return Buffers, tuple(map(pickle.PickleBuffer, self.contents))


@pytest.mark.parametrize('once', [False, True])
@pytest.mark.parametrize('needs', [False, True])
def test_large_payloads_open_as_small_ones_do(monkeypatch, once, needs):
    monkeypatch.setattr(dispynode, 'COPIED_AT_ONCE', MIB + 5)
    values = [pattern(9 * MIB), [bytearray(pattern(7 * MIB, b'1')), 'text' * MIB,
                                 {'a': pattern(5 * MIB)}, list(range(10000))],
              Buffers(bytearray(pattern(6 * MIB)), bytearray(b'small'),
                      bytearray(pattern(9 * MIB + 3, b'2')))]
    for value in values:
        payload = dispynode.dumps(value).payload
        if needs:
            payload = dispynode.with_needs(payload, [3, 4])
        small = dispynode.loads(mapped_payload(payload))
        monkeypatch.setattr(dispynode, 'LAZY', MIB)
        for place in (mapped_payload(payload),
                      memoryview(b'x' + bytes(mapped_payload(payload)))[1:]):
            large = dispynode.loads(place, once)
            if isinstance(value, Buffers):
                assert (large.contents == small.contents == value.contents
                        and type(large.contents[0]) is bytearray)
            else:
                assert large == small == value
        monkeypatch.undo()


@pytest.mark.skipif(sys.platform != 'linux', reason='memory is given back so on Linux alone')
@pytest.mark.parametrize('make', [bytes, lambda data: Buffers(bytearray(data))],
                         ids=['bytes', 'buffers'])
def test_what_is_opened_once_is_there_once(make):
    """The peak of memory of a process of its own, which opens 300 MiB."""
    code = textwrap.dedent('''
        import resource, sys
        import dispynode
        from test_parts import Buffers, mapped_payload
        payload = dispynode.dumps(%s).payload
        memory = dispynode.mapped(sum(map(len, dispynode.pieces_of(payload))))
        at = 0
        for piece in dispynode.pieces_of(payload):
            memory[at:at + len(piece)] = piece
            at += len(piece)
        del payload, piece
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        value = dispynode.loads(memory, True)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    ''' % ("b'x' * (300 << 20)" if make is bytes else "Buffers(bytearray(300 << 20))"))
    path = os.pathsep.join([os.path.dirname(os.path.abspath(__file__)), *PATHS])
    more = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, check=True,
                          env=dict(os.environ, PYTHONPATH=path)).stdout
    assert int(more) < 60 << 10


def test_what_came_in_parts_and_waits_keeps_no_link_from_being_read(monkeypatch):
    """Its memory was looked for before it came; cancels of other jobs are read on."""
    from talk_node import Talk as NodeTalk
    monkeypatch.setattr(dispynode, 'MAX_FRAME', 3 * MIB)
    monkeypatch.setattr(dispynode, 'RECEIVE_BUDGET', MIB)
    talk = NodeTalk(cpus=1)
    talk.ready()
    talk.jobs(1)
    talk.jobs(2, payload=bytes(4 * MIB))
    assert talk.node.attempts.held_bytes >= 4 * MIB and not talk.node.attempts.is_full()
    talk.jobs(3, payload=bytes(2 * MIB))
    assert talk.node.attempts.is_full()
    talk.say(dispynode.Cancel('c', [3]))
    assert not talk.node.attempts.is_full()
    talk.say(dispynode.Cancel('c', [2]))
    talk.jobs(4, payload=bytes(2 * MIB))
    assert talk.node.attempts.is_full() and not talk.node.attempts._in_parts


# -- lies ------------------------------------------------------------------------------------------

def job_part(total, offset, data, serial=1):
    return Part('c', (serial, HOLLOW, None) if not offset else (), total, offset, data)


LIES = {
    'no beginning': [job_part(100, 10, b'x' * 10)],
    'a gap': [job_part(100, 0, b'x' * 10), job_part(100, 20, b'x' * 10)],
    'an overlap': [job_part(100, 0, b'x' * 10), job_part(100, 5, b'x' * 10)],
    'the same again': [job_part(100, 0, b'x' * 10), job_part(100, 10, b'x' * 10),
                       job_part(100, 10, b'x' * 10)],
    'more than announced': [job_part(100, 0, b'x' * 60), job_part(100, 60, b'x' * 60)],
    'more than announced at once': [job_part(100, 0, b'x' * 101)],
    'another total': [job_part(100, 0, b'x' * 10), job_part(101, 10, b'x' * 10)],
    'nothing': [job_part(100, 0, b''), job_part(100, 0, b'')],
    'a result': [Part('c', (1, 1, 0.0, 0.0, HOLLOW, b'', b''), 100, 0, b'x' * 10)],
    'another computation': [job_part(100, 0, b'x' * 10), Part('d', (), 100, 10, b'x' * 10)],
}


@pytest.mark.parametrize('lie', LIES)
def test_lies_are_refused(lie):
    values, takes = Values('here', logging.getLogger()), (OPS[Jobs],)
    with pytest.raises(PeerError):
        for part in LIES[lie]:
            values.take(1, part, takes)


@pytest.mark.parametrize('fields', [
    ('c', (), 100, 0, b'x'), ('c', (1, HOLLOW, None), 100, 5, b'x'),
    ('c', (1, HOLLOW), 100, 0, b'x'), ('c', (1, HOLLOW, {'x': 1}), 100, 0, b'x'),
    ('c', (), 100, 101, b''), ('c', (), -1, -1, b''),
    ('c', (1, 99, 0.0, 0.0, HOLLOW, b'', b''), 9, 0, b'x'), ('c', (), 1 << 70, 5, b''),
    ('c', (), 100, 5, 'text'), ('c', (), 100, 5, [b'x']), ('c', (1, HOLLOW, None), 0, 0, b'')],
                         ids=repr)
def test_wrong_parts_are_refused(fields):
    import pickle
    with pytest.raises(PeerError):
        dispynode.decode(OPS[Part], 0, pickle.dumps(fields, 5))


def test_an_outcome_that_its_payload_does_not_fit():
    values, takes = Values('here', logging.getLogger()), (OPS[Results],)
    # The length of the text is more than there is
    with pytest.raises(PeerError, match='wrong values'):
        values.take(1, Part('c', (1, int(Outcome.RAISED), 0.0, 0.0, HOLLOW, b'', b''), 8, 0,
                            b'\xff' * 8), takes)


def test_what_is_announced_takes_no_memory():
    values, takes = Values('here', logging.getLogger()), (OPS[Jobs],)
    before = psutil.Process().memory_info().rss
    for link in range(4):
        values.take(link, job_part(1 << 30, 0, b'x' * MIB), takes)
    assert psutil.Process().memory_info().rss - before < 50 * MIB
    for link in range(4):
        values.drop(link)
    assert not values._coming


@pytest.mark.parametrize(
    'lie', [lie for lie in LIES if lie not in ('nothing', 'another computation')] + ['silence'])
def test_a_liar_ends_its_own_link_alone(tmp_path, lie):
    """The node goes on, has not taken what was announced, and serves the next one."""
    with NodeProcess(tmp_path) as node:
        with Talk(node.port, wanted=Role.NODE) as talk:
            talk.say(ClientHello('x', 600.0))
            talk.hear(NodeHello)
            before = psutil.Process(node.process.pid).memory_info().rss
            if lie == 'silence':
                talk.say(job_part(2 << 30, 0, b'x' * MIB))
            else:
                talk.say(*LIES[lie])
                assert 'part' in talk.hear(Wrong).text or lie == 'a result'
            assert psutil.Process(node.process.pid).memory_info().rss - before < 50 * MIB
        with dispy.JobCluster(len, nodes=[node.address]) as cluster:
            assert cluster.submit('abc')(60) == 3
        assert node.process.poll() is None


def test_a_value_of_more_than_the_limit_is_refused_when_it_is_announced():
    values, takes = Values('on node x', logging.getLogger()), (OPS[Jobs],)
    total = dispynode.VALUE_MOST + 1
    unfit = values.take(1, job_part(total, 0, b'x' * 10), takes)
    assert (type(unfit) is Unfit and unfit.row[0] == 1 and 'limit' in unfit.text
            and 'on node x' in unfit.text)
    assert values.take(1, job_part(total, 10, b'x' * 10), takes) is None   # passed over
    whole = values.take(1, job_part(3, 0, b'abc', 2), takes)
    assert whole.rows[0][0] == 2 and bytes(whole.rows[0][1]) == b'abc'


# -- links -----------------------------------------------------------------------------------------

class Ends:
    """Two links that are each other's, without a loop."""

    def __init__(self):
        self.socks = socket.socketpair()
        for sock in self.socks:   # so that little is on the way
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        session = Session(b'k' * 32, b'k' * 32, bytes(16), Role.CLIENT)
        self.here, self.there = (Link(sock, session, 'there', 0.0) for sock in self.socks)
        self.there.values = Values('there', logging.getLogger())
        self.heard = []

    def turn(self):
        self.here.write()
        if self.here.later:
            self.here.go_on()
        self.heard += self.there.messages(0.0)

    def begin(self):
        """Turns until a part of a value has come, but not all of it."""
        for _ in range(10):
            self.turn()
            if self.there.values._coming:
                return
        raise AssertionError('no part has come')

    def rest(self):
        while self.here.wants_write:
            self.turn()
        self.heard += self.there.messages(0.0)
        assert self.here.queued == self.here.unmade == 0
        return [type(message) for message in self.heard]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.here.close()
        self.there.close()


def row_of(serial, data, outcome=Outcome.RETURNED):
    return with_size((serial, int(outcome), 1.0, 2.0, data, b'out', b'err'))[0]


def test_a_row_comes_as_it_was(small_frames):
    pieces = (b'head', pattern(2 * MIB), memoryview(pattern(3 * MIB + 7)), b'', b'end')
    options = {'cpus': 2, 'timeout': 3.5}
    with Ends() as ends:
        ends.here.send(Jobs('c', [(5, out_of_band(pieces), options)]))
        assert ends.rest() == [Jobs]
        [(serial, payload, told)] = ends.heard[0].rows
        assert (serial, told) == (5, options) and bytes(payload) == b''.join(pieces)


def test_others_overtake_and_the_same_job_does_not(small_frames):
    with Ends() as ends:
        ends.here.send(Results('c', [row_of(1, pattern(9 * MIB), Outcome.PROVISIONAL)]))
        ends.turn()
        for message in (Started('c', [(7, 0.5)]), Results('c', [row_of(2, b'small')]),
                        Results('c', [row_of(1, b'last')]),
                        Results('c', [row_of(1, b'last of all'), row_of(3, b'too')]),
                        Results('d', [row_of(1, b'other')]), Refused('c', 'room', 'text')):
            ends.here.send(message)
        assert ends.rest() == [Started, Results, Results, Results, Results, Results, Refused]
        told = [[(message.comp, row[0], len(row[4])) for row in message.rows]
                for message in ends.heard if type(message) is Results]
        assert told == [[('c', 2, 5)], [('d', 1, 5)], [('c', 1, 9 * MIB)], [('c', 1, 4)],
                        [('c', 1, 11), ('c', 3, 3)]]


def test_values_of_several_computations_take_turns(small_frames):
    with Ends() as ends:
        ends.here.send(Jobs('c', [(1, out_of_band(pattern(20 * MIB)), None)]))
        ends.here.send(Jobs('d', [(1, out_of_band(pattern(4 * MIB)), None)]))
        assert (ends.rest() == [Jobs, Jobs]
                and [message.comp for message in ends.heard] == ['d', 'c'])


def test_what_is_abandoned_is_let_go(small_frames):
    with Ends() as ends:
        for serial in (1, 2, 3):
            ends.here.send(Jobs('c', [(serial, out_of_band(pattern(9 * MIB)), None)]))
        ends.begin()
        assert ends.here.abandon('c', [1, 3, 9]) == [1, 3]
        assert (ends.rest() == [Jobs] and ends.heard[0].rows[0][0] == 2
                and not ends.there.values._coming)
        ends.here.send(Jobs('c', [(4, out_of_band(pattern(9 * MIB)), None)]))
        ends.turn()
        ends.here.send(Done('c'))
        assert ends.rest() == [Jobs, Done] and not ends.there.values._coming


def test_a_link_that_ends_lets_go(small_frames):
    with Ends() as ends:
        ends.here.send(Jobs('c', [(1, out_of_band(pattern(9 * MIB)), None)]))
        ends.begin()
        ends.there.close()
        assert not ends.there.values._coming


def test_large_rows_come_alone():
    rows = [(('small', n), 100) for n in range(3)] + [(('large', 0), 2 * MIB), (('small', 9), 100)]
    assert ([[row[0] for row in message] for message in batches(lambda comp, some: some, 'c', rows)]
            == [['small'] * 3, ['large'], ['small']])


def test_parts_are_of_bounded_size():
    pieces = tuple(pattern(size) for size in (10, 5 * MIB, 3, 100000, 100000, MIB))
    whole = InParts(Jobs('c', [(1, out_of_band(pieces), None)]))
    parts = list(iter(whole.next, None))
    assert whole.left == 0 and all(sum(len(memoryview(data)) for data in part.data)
                                   <= dispynode.FILE_PIECE for part in parts)
    assert b''.join(bytes(data) for part in parts for data in part.data) == b''.join(pieces)
    assert len(parts) == -(-whole.total // dispynode.FILE_PIECE)
    outputs = bytes(dispynode.OUTPUT_MOST)
    first = InParts(
        Results('c', [(1, 1, 0.0, 1.0, out_of_band(pattern(5 * MIB)), outputs, outputs)])).next()
    assert sum(map(len, dispynode.encode(first)[2])) <= MESSAGES[OPS[Part]][1]


def test_memory_that_is_promised_counts(monkeypatch, small_frames):
    monkeypatch.setattr(dispynode, 'free_memory', lambda: 70 * MIB)
    values, takes = Values('here', logging.getLogger()), (OPS[Jobs],)
    assert values.take(1, job_part(20 * MIB, 0, b'x'), takes) is None
    assert type(values.take(2, job_part(20 * MIB, 0, b'x'), takes)) is Unfit
    values.drop(1)
    assert values.take(2, job_part(20 * MIB, 0, b'x'), takes) is None
    values.drop(2)


def test_free_memory_is_that_of_the_cgroup(tmp_path, monkeypatch):
    free = dispynode.free_memory()
    assert free and free <= psutil.virtual_memory().total
    monkeypatch.setattr(dispynode, '_free_of_cgroup', lambda: 5)
    assert dispynode.free_memory() == 5


# -- as large as it gets ---------------------------------------------------------------------------

def extremes(data, size):
    """Their ends; returns so many bytes with two marks."""
    back = bytearray(size)
    if size:
        back[0], back[-1] = 1, 2
    return len(data), bytes(data[:1]), bytes(data[-1:]), back


@pytest.mark.long
@pytest.mark.parametrize('way', ['argument', 'result'])
def test_gibibytes_through_a_node(large_memory, tmp_path, way, request):
    """One value, of more bytes than 31 bits can count, and 3.5 GiB with --long; the link lives, and
    small jobs go on beside it. A result is of half a GiB without --long."""
    size = (1 << 31) + (1 << 20) if way == 'argument' else 1 << 29
    if request.config.getoption('--long'):
        size = 7 << 29
    with NodeProcess(tmp_path / 'node') as node, dispy.JobCluster(extremes,
                                                                  nodes=[node.address]) as cluster:
        assert cluster.submit(b'', 0)(30)
        data = b'\x07' + bytes(size - 2) + b'\x08' if way == 'argument' else b''
        job = cluster.submit(data, 0 if way == 'argument' else size)
        del data
        beside_it = collections.Counter()
        while not job.wait(0.05):
            beside_it[cluster.submit(b'', 0)(60)[0]] += 1
        assert job.exception is None and beside_it[0] > 5
        length, first, last, back = job.result
        if way == 'argument':
            assert (length, first, last) == (size, b'\x07', b'\x08')
        else:
            assert len(back) == size and (back[0], back[-1]) == (1, 2)
        assert node.process.poll() is None
