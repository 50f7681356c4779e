"""Nothing is too large to be said: what is over a limit becomes an error of its own job or
computation."""

import enum
import logging
import os

import psutil
import pytest

import dispy
import dispynode
from conftest import eventually
from dispynode import NAMES_MOST, SERIALS_MOST, TEXT_MOST, Ack, in_parts, needs, shorten
from nodes import NodeProcess
from small_frames import stand_in

large_memory = pytest.mark.skipif(psutil.virtual_memory().available < 9 << 30,
                                  reason='needs 9 GiB of free memory')


def test_a_shortened_text_keeps_both_ends():
    text = 'begin' + 'x' * 10 * TEXT_MOST + 'end'
    short = shorten(text)
    assert short.startswith('begin') and short.endswith('end') and len(short) < TEXT_MOST + 100
    assert '%d characters left out' % (len(text) - TEXT_MOST) in short
    assert shorten('short') == 'short'


def test_lists_are_sent_in_parts():
    serials = list(range(2 * SERIALS_MOST + 5))
    parts = list(in_parts(Ack, 'c', serials))
    assert [serial for part in parts for serial in part.serials] == serials and len(parts) == 3
    files = [(1, 0, ('%d' % n * 40, n, bytes(32), 0o600)) for n in range(100000)]
    parts = list(needs('c', files))
    assert [file for part in parts for file in part.files] == files
    for part in parts:
        op, _, pieces = dispynode.encode(part)
        assert sum(map(len, pieces)) <= dispynode.MESSAGES[op][1]


# -- what a worker refuses; the limit is made small so that nobody needs the memory ----------------

def limited(most, then):
    """In a worker: lower its limit, then do this."""
    import dispynode
    dispynode.VALUE_MOST = most
    return then()


class Fat(Exception):
    pass


def fat_error():
    raise Fat(b'x' * 200000)


def fat_provisional():
    try:
        dispy_provisional_result(b'x' * 200000)   # noqa: F821
    except ValueError as exc:
        return str(exc)


@pytest.fixture
def limits(make_cluster):
    with make_cluster(limited, nodes='local') as cluster:
        yield cluster


def test_a_result_over_the_limit_is_refused_by_the_worker(limits):
    job = limits.submit(100000, lambda: b'x' * 200000)
    assert job(30) is None and job.status == job.Terminated
    for word in ('200', '100000', 'dispy_send_file'):
        assert word in job.exception
    assert limits.submit(100000, lambda: 5)(30) == 5


def test_an_exception_over_the_limit_leaves_its_text(limits):
    job = limits.submit(100000, fat_error)
    job.wait(30)
    assert job.status == job.Terminated and job.error is None
    assert ('Fat' in job.exception and 'limit' in job.exception
            and len(job.exception) < 2 * TEXT_MOST)


def test_a_provisional_result_over_the_limit_raises_in_the_job(limits):
    text = limits.submit(100000, fat_provisional)(30)
    assert 'limit' in text and '100000' in text


def test_the_text_of_an_error_keeps_both_ends(make_cluster):
    def compute():
        raise ValueError('begin' + 'x' * 5000000 + 'end')
    with make_cluster(compute, nodes='local') as cluster:
        job = cluster.submit()
        job.wait(30)
        assert ('begin' in job.exception and job.exception.rstrip().endswith('end')
                and len(job.exception) < 2 * TEXT_MOST)


def test_a_setup_that_raises_100_mb_of_text(tmp_path):
    """The client is told, and the node serves the next one."""
    def setup():
        raise ValueError('begin' + 'x' * 100000000)

    def compute(n):
        return n
    with NodeProcess(tmp_path) as node:
        with dispy.JobCluster(compute, nodes=[node.address], setup=setup,
                              loglevel=logging.CRITICAL) as cluster:
            cluster.submit(1)
            refused = eventually(lambda: [node for node in cluster.status().all_nodes
                                          if node.state == 'refused'], 60)
            assert 'begin' in refused[0].reason and len(refused[0].reason) < 2 * TEXT_MOST
            cluster.close(terminate=True)
        with dispy.JobCluster(compute, nodes=[node.address]) as cluster:
            assert cluster.submit(2)(30) == 2


@pytest.mark.parametrize('kind', ['JobCluster', 'SharedJobCluster'])
def test_a_computation_over_the_limit_raises_in_the_constructor(monkeypatch, kind):
    monkeypatch.setattr(dispy, 'WHOLE_MOST', 100000)
    data = b'x' * 200000

    def compute():
        return len(data)
    with pytest.raises(ValueError, match='200.*100000.*setup'):
        getattr(dispy, kind)(compute)


def test_names_of_files_over_the_limit_raise_in_the_constructor(monkeypatch, tmp_path):
    monkeypatch.setattr(dispy, 'NAMES_MOST', 1000)
    for n in range(20):
        (tmp_path / ('f%d' % n)).write_text('')
    with pytest.raises(ValueError, match='20 files.*1000'):
        dispy.JobCluster(len, nodes='local', depends=[str(tmp_path)])
    assert NAMES_MOST > 100000 * (255 + 80)


def test_setup_args_over_the_limit_raise_in_the_constructor():
    allocator = dispy.NodeAllocate('127.0.0.1', setup_args=(b'x' * 20000000,))
    with pytest.raises(ValueError, match='setup_args.*limit'):
        dispy.SharedJobCluster(len, nodes=[allocator], scheduler_port=1)


@large_memory
def test_a_result_over_the_limit_of_its_node_ends_its_job_alone(tmp_path):
    def compute(size, seconds):
        import time
        time.sleep(seconds)
        return bytes(size)
    with NodeProcess(tmp_path, '--max-value', '1g') as node, \
            dispy.JobCluster(compute, nodes=[node.address], reentrant=True) as cluster:
        neighbour = cluster.submit(3, 2)
        large = cluster.submit(1100000000, 0)
        large.wait(60)
        assert large.status == large.Terminated and 'dispy_send_file' in large.exception
        assert neighbour(60) == bytes(3) and cluster.submit(4, 0)(30) == bytes(4)
        assert node.process.poll() is None


# -- logging of jobs -------------------------------------------------------------------------------

class Level(enum.IntEnum):
    NOTICE = 25


def log_oddly():
    log = logging.getLogger('app')
    log.warning('%d items', 'three')
    log.log(Level.NOTICE, 'level of an enum')
    log.warning('begin' + 'x' * 3000000)
    return 'returned'


def test_odd_log_records_cost_nothing_but_themselves(make_cluster, caplog):
    caplog.set_level(logging.INFO, 'dispy')
    with make_cluster(log_oddly, nodes='local', forward_logs=True) as cluster:
        assert cluster.submit()(30) == 'returned'
    records = [record for record in caplog.records if getattr(record, 'job_logger', '') == 'app']
    assert [record.levelno for record in records] == [25, 30]
    assert ('level of an enum' in records[0].getMessage()
            and len(records[1].getMessage()) < 2 * TEXT_MOST)


def log_from_children(count, size):
    children = []
    for child in range(count):
        pid = os.fork()
        if not pid:
            for n in range(20):
                logging.getLogger('app').warning('%s%s', '<' + 'x' * size, '>')
                dispy_provisional_result(b'y' * size)   # noqa: F821
            os._exit(0)
        children.append(pid)
    for n in range(20):
        dispy_provisional_result(b'z' * size)   # noqa: F821
    for pid in children:
        os.waitpid(pid, 0)
    return 'returned'


def test_records_of_the_children_of_a_job_come_whole(make_cluster, caplog):
    """They and the job itself write into one pipe, by turns."""
    caplog.set_level(logging.INFO, 'dispy')
    seen = []
    with make_cluster(log_from_children, nodes='local', forward_logs=True,
                      job_status=lambda job: seen.append(job.result)) as cluster:
        assert cluster.submit(3, 60000)(60) == 'returned'
    texts = [record.getMessage()
             for record in caplog.records if getattr(record, 'job_logger', '') == 'app']
    assert len(texts) == 60 and all(text.endswith('x>') and 60000 < len(text) < 60100
                                    for text in texts)
    assert sorted(seen, key=str) == [b'y' * 60000] * 60 + [b'z' * 60000] * 20 + ['returned']


@pytest.mark.long
def test_the_list_of_missing_files_is_longer_than_a_message_may_be(tmp_path, request):
    """Names of 200 bytes, and a node whose messages must be short. With --long, 100,000 files and
    messages of the real length."""
    count, script = 2000, None
    if request.config.getoption('--long'):
        count = 100000
    else:
        script = stand_in(tmp_path / 'changed', 'BATCH_BYTES, MESSAGES[35] = 50000, (Need, 100000)')
    source = tmp_path / 'many'
    source.mkdir()
    for n in range(count):
        (source / ('%0190d' % n)).write_bytes(b'')

    def compute():
        return len(os.listdir('many'))
    with NodeProcess(tmp_path / 'node', script=script) as node, dispy.JobCluster(
            compute, nodes=[node.address], depends=[str(source)]) as cluster:
        assert cluster.submit()(600) == count
        assert node.process.poll() is None
