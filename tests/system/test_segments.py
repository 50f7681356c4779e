"""Large values pass between a node and its workers in memory segments."""

import array
import contextlib
import fcntl
import mmap
import os
import pickle
import signal
import socket
import threading

import pytest

import dispy
import dispynode
from conftest import eventually
from dispynode import (
    FROM_WORKER, MappedSegment, MemorySegment, PeerError, Pipe, RecordBuffer, RecordType,
    SegmentIntake, WorkerPipe, dumps, goes_in_segment, is_read, loads, pack_record, segment_record)
from nodes import NodeProcess

numpy = pytest.importorskip('numpy')
pytestmark = pytest.mark.skipif(not dispynode.HAS_SEGMENTS, reason='memory has no descriptor here')

NAME = '/memfd:' + MemorySegment.NAME
COUNT = 3 << 17    # of float64: 3 MiB


def segments():
    """The memory segments that this process has, by descriptors and by mappings."""
    held = []
    for name in os.listdir('/proc/self/fd'):
        with contextlib.suppress(OSError):
            held.append(os.readlink('/proc/self/fd/' + name))
    with open('/proc/self/maps') as file:
        mapped = [line for line in file if NAME in line]
    return [path for path in held if path.startswith(NAME)], mapped


@pytest.fixture(autouse=True)
def nothing_is_kept():
    """What passed is gone when nobody uses it any more."""
    yield
    assert eventually(lambda: segments() == ([], []))


# -- both ways -------------------------------------------------------------------------------------

def serve(word, *args):
    import signal
    import numpy

    def mapped():
        with open('/proc/self/maps') as file:
            return sum('/memfd:dispy-value' in line for line in file)
    if word == 'make':
        return numpy.arange(args[0], dtype='f8')
    if word == 'negate':     # in place
        for part in args[0]:
            part *= -1
        return mapped(), args[0]
    if word == 'mapped':
        return mapped()
    if word == 'pid':
        return os.getpid()
    if word == 'many':
        return [numpy.full(1 << 15, n, 'f8') for n in range(args[0])]
    if word == 'narrow':     # no file may be longer, and a memory segment is one
        import resource
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        return numpy.arange(args[0], dtype='f8')
    if word == 'die':
        os.kill(os.getpid(), signal.SIGKILL)
    return None


@pytest.fixture(scope='module')
def node(tmp_path_factory):
    with NodeProcess(tmp_path_factory.mktemp('node'), cpus=1) as node:
        yield node


@pytest.fixture(params=['in the program', 'dispynode'])
def place(request):
    return request.param


@pytest.fixture
def cluster(place, node):
    local = place == 'in the program'
    with dispy.JobCluster(serve, nodes='local' if local else [node.address]) as cluster:
        if local:
            cluster.wait_nodes(1, 30)
            cluster.set_node_cpus('127.0.0.1', 1)
        yield cluster


def test_arrays_come_both_ways_and_can_be_written(cluster, place):
    """Each who gets a value may change it, and nobody else sees that."""
    parts = [numpy.arange(1 << 15, dtype='f8') + n for n in range(16)]   # each below SHARED_FROM
    there = []
    for job in [cluster.submit('negate', parts) for _ in range(3)]:
        mapped, negated = job(30)
        assert job.exception is None and mapped == 1
        for before, after in zip(parts, negated):
            assert (after == -before).all()
            assert after.flags.writeable and after.flags.aligned
            after += 1
        there.append(negated)
    assert all((part == -before + 1).all() for negated in there
               for part, before in zip(negated, parts))
    assert len(segments()[1]) == (3 if place == 'in the program' else 0)
    assert cluster.submit('mapped')(30) == 0     # the worker keeps no arguments
    result = cluster.submit('make', COUNT)(30)
    assert (result == numpy.arange(COUNT)).all() and result.flags.writeable
    result[:] = 5
    assert (cluster.submit('make', COUNT)(30) == numpy.arange(COUNT)).all()


def test_where_a_worker_has_no_room_its_results_come_through_the_pipe(cluster):
    for _ in range(2):
        job = cluster.submit('narrow', COUNT)
        assert (job(30) == numpy.arange(COUNT)).all() and job.exception is None
        assert not segments()[1]


def test_where_the_program_has_no_room_arguments_go_through_the_pipe(monkeypatch):
    parts = [numpy.arange(1 << 15, dtype='f8') for _ in range(16)]
    with dispy.JobCluster(serve, nodes='local') as cluster:
        assert cluster.submit('negate', parts)(30)[0] == 1

        def no_memory(*args):
            raise OSError(28, 'No space left on device')
        monkeypatch.setattr(os, 'write', no_memory)
        job = cluster.submit('negate', parts)
        mapped, negated = job(30)
        assert mapped == 0 and (negated[3] == -parts[3]).all()
        monkeypatch.undo()
        monkeypatch.setattr(os, 'memfd_create', no_memory)
        assert cluster.submit('negate', parts)(30)[0] == 0


def test_a_system_that_has_none(monkeypatch):
    parts = [numpy.arange(1 << 15, dtype='f8') for _ in range(16)]
    monkeypatch.setattr(dispynode, 'HAS_SEGMENTS', False)
    for name in ('fcntl', 'termios', '_MSG_CTRUNC'):
        monkeypatch.delattr(dispynode, name)
    with dispy.JobCluster(serve, nodes='local') as cluster:
        job = cluster.submit('mapped', parts)
        assert job(30) == 0 and job.exception is None


def test_a_program_that_keeps_results_has_few_mappings(monkeypatch):
    monkeypatch.setattr(dispynode, 'SEGMENTS_MOST', 4)
    with dispy.JobCluster(serve, nodes='local') as cluster:
        kept = [job(30) for job in [cluster.submit('many', 10) for _ in range(12)]]
        assert len(segments()[1]) == 4 and len(segments()[0]) <= 4
        for parts in kept:
            assert all((part == n).all() and part.flags.writeable for n, part in enumerate(parts))
        del kept, parts
        assert eventually(lambda: not segments()[1])
        again = cluster.submit('many', 10)(30)
        assert len(segments()[1]) == 1 and (again[9] == 9).all()


def test_what_killed_workers_leave_is_freed(cluster):
    parts = [numpy.arange(1 << 15, dtype='f8') for _ in range(16)]
    jobs = [cluster.submit('die' if n % 3 == 0 else 'negate', parts) for n in range(9)]
    for n, job in enumerate(jobs):
        job.wait(30)
        if n % 3 == 0:
            assert job.status == job.Terminated and 'signal' in job.exception
        else:
            assert (job.result[1][5] == -parts[5]).all()


def test_a_side_that_does_not_read_makes_the_other_wait(pipe, tmp_path):
    """Segments do not gather on their way."""
    pipe, theirs = pipe
    payload = dumps(numpy.arange(COUNT)).payload
    writer = WorkerPipe(theirs, str(tmp_path))

    def send_all():
        for number in range(20):
            writer.send_result(1, number, 1.0, 2.0, payload, b'', b'')
    thread = threading.Thread(target=send_all, daemon=True)
    thread.start()
    assert eventually(lambda: not is_read(theirs))   # a part of a value stands in the pipe
    found = []
    assert eventually(lambda: found.extend(pipe.records(0.0)) or len(found) == 20)
    thread.join(20)
    assert [record.serial for record in found] == list(range(20))
    kinds = [type(record.bodies[0].obj) is MappedSegment for record in found]
    assert kinds[0] and not all(kinds[:10])
    for record in found:
        assert (loads(record.bodies[0]) == numpy.arange(COUNT)).all()
    theirs.setblocking(False)
    back = Pipe(theirs, 'c', 1)
    for number in range(20):
        back.push_value(segment_record(RecordType.RESULT, 1, number, 1.0, 2.0, payload), payload)
    back.write()
    assert back.wants_write and back.queued > 1 << 20    # the rest of a value that went whole
    found = []
    assert eventually(lambda: back.write() or found.extend(pipe.records(0.0)) or len(found) == 20)
    kinds = [type(record.bodies[0].obj) is MappedSegment for record in found]
    assert kinds[0] and not all(kinds[:10])
    for record in found:
        assert (loads(record.bodies[0]) == numpy.arange(COUNT)).all()


# -- what comes from a worker is not believed ------------------------------------------------------

@pytest.fixture
def pipe():
    ours, theirs = socket.socketpair()
    pipe = Pipe(ours, 'c', 1)
    yield pipe, theirs
    pipe.close()
    theirs.close()


def send(sock, head, *handles):
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', handles))]
    sock.sendmsg([head], ancillary if handles else [])


def head(size):
    return segment_record(RecordType.RESULT, 1, 5, 1.0, 2.0, bytes(size), b'out', b'err')


def memory(size, seals=dispynode.SEALED):
    handle = os.memfd_create('test', os.MFD_ALLOW_SEALING)
    os.ftruncate(handle, size)
    if seals:
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, seals)
    return handle


def test_a_value_comes_with_what_stands_beside_it(pipe):
    pipe, theirs = pipe
    payload = dumps(numpy.arange(COUNT)).payload
    assert goes_in_segment(payload)
    segment = MemorySegment(payload)
    while not segment.is_whole:
        segment.fill(1000000)
    send(theirs, segment_record(RecordType.RESULT, 1, 5, 1.0, 2.0, payload, b'out', b'err'),
         segment.fileno())
    segment.close()
    (record,) = pipe.records(0.0)
    value, out, err = record.bodies
    assert (bytes(out), bytes(err), record.serial) == (b'out', b'err', 5)
    assert type(value.obj) is MappedSegment
    assert (loads(value) == numpy.arange(COUNT)).all()
    assert (loads(value, True) == numpy.arange(COUNT)).all()


@pytest.mark.parametrize('length, size, seals', [
    (4000, 4096, dispynode.SEALED), (4097, 4096, dispynode.SEALED), (4096, 4096, 0),
    (4096, 4096, fcntl.F_SEAL_WRITE), (4096, 4096, fcntl.F_SEAL_SHRINK)])
def test_a_segment_that_could_end_this_process_is_refused(pipe, length, size, seals):
    pipe, theirs = pipe
    before = len(os.listdir('/proc/self/fd'))
    handle = memory(length, seals)
    send(theirs, head(size), handle)
    os.close(handle)
    with pytest.raises(PeerError, match='segment'):
        pipe.records(0.0)
    assert len(os.listdir('/proc/self/fd')) == before


def test_descriptors_and_records_that_do_not_belong_together_are_refused(pipe, tmp_path):
    pipe, theirs = pipe
    send(theirs, head(4096))
    with pytest.raises(PeerError, match='has not come'):
        pipe.records(0.0)
    with open(str(tmp_path / 'file'), 'wb+') as file:
        file.truncate(4096)
        send(theirs, head(4096), file.fileno())
        with pytest.raises(PeerError, match='segment'):
            pipe.records(0.0)
        before = len(os.listdir('/proc/self/fd'))
        send(theirs, pack_record(RecordType.RESULT, 1, 5, 1.0, 2.0, bytes(1 << 20))[0])
        with pytest.raises(PeerError, match='belong to nothing'):
            for _ in range(SegmentIntake.WAITING_MOST + 1):
                send(theirs, bytes(1), file.fileno())
                pipe.records(0.0)
        pipe.close()
        assert len(os.listdir('/proc/self/fd')) < before


def test_the_limits_of_size_hold():
    most = FROM_WORKER[RecordType.RESULT][0]
    head = bytearray(segment_record(RecordType.RESULT, 1, 5, 1.0, 2.0, b'x'))
    intake = RecordBuffer(FROM_WORKER)
    at = dispynode._RECORD.size - 16
    for size, fits in ((most, True), (most + 1, False)):
        head[at:at + 8] = size.to_bytes(8, 'big')
        if fits:
            assert intake.measure(bytes(head)) == 0
        else:
            with pytest.raises(PeerError, match='bodies of %d' % size):
                intake.measure(bytes(head))


def test_without_a_descriptor_left_there_is_an_error_for_this_job(pipe):
    """The kernel drops the descriptor and says so."""
    pipe, theirs = pipe
    intake = SegmentIntake()
    intake.came([], socket.MSG_CTRUNC)
    body = intake.take(1 << 30)
    with pytest.raises(OSError, match='1073741824 bytes.*ulimit -n'):
        loads(body, True)


def test_what_goes_in_a_segment():
    array = numpy.arange(COUNT)
    assert goes_in_segment(dumps(array).payload)
    assert not goes_in_segment(dumps(array[:1000]).payload)
    # What stands in the pickle is copied when it is opened: the pipe does as well
    assert not goes_in_segment(dumps(bytes(1 << 23)).payload)
    assert not goes_in_segment(dumps([bytes(1 << 23), 'x' * (1 << 23)]).payload)


def test_buffers_of_odd_sizes_are_aligned_where_they_are_used():
    parts = [numpy.arange(count, dtype=kind) for count, kind in
             ((1 << 21, 'u1'), ((1 << 20) + 1, 'u1'), (1 << 18, 'f8'), (100003, 'f4'))]
    payload = dumps(parts).payload
    whole = b''.join(bytes(piece) for piece in payload)
    handle = memory(len(whole), 0)
    os.pwrite(handle, whole, 0)
    segment = MappedSegment(handle, len(whole), access=mmap.ACCESS_COPY)
    os.close(handle)
    found = loads(memoryview(segment), True)
    for before, after in zip(parts, found):
        assert (before == after).all() and after.flags.aligned and after.flags.writeable
    assert pickle.loads(pickle.dumps(found, 5))[0][5] == 5
    assert signal.getsignal(signal.SIGBUS) == signal.SIG_DFL
