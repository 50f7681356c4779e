"""Files and objects that belong to one job, and files that a job sends back."""

import hashlib
import logging
import os
import shutil
import time

import psutil
import pytest

from conftest import eventually
from dispy import DispyJob
from nodes import NodeProcess
from proxy import Proxy


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The client's working directory."""
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    return tmp_path / 'here'


def make(name, size):
    os.makedirs(os.path.dirname(name) or '.', exist_ok=True)
    block = os.urandom(min(size, 1 << 20))
    with open(name, 'wb') as file:
        for _ in range(size // len(block) if size else 0):
            file.write(block)
    with open(name, 'rb') as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    return digest, dispy_send_file(name)   # noqa: F821


@pytest.mark.parametrize('name, size',
                         [('one.bin', 3 << 20), ('deep/er/two \u00e4.bin', 12345), ('empty', 0)])
def test_a_file_comes_back_before_the_job_has_ended(make_cluster, here, name, size):
    with make_cluster(make, nodes='local') as cluster:
        job = cluster.submit(name, size)
        digest, answer = job(30)
        assert answer == 0
        data = (here / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest and len(data) == size


def test_files_of_many_jobs_at_once(make_cluster, here):
    with make_cluster(make, nodes='local') as cluster:
        jobs = [cluster.submit('file %d' % n, 1000 * (n + 1)) for n in range(40)]
        for n, job in enumerate(jobs):
            digest, answer = job(30)
            assert (answer == 0
                    and hashlib.sha256((here / ('file %d' % n)).read_bytes()).hexdigest() == digest)
    assert sorted(os.listdir(str(here))) == sorted('file %d' % n for n in range(40))


def test_log_lines_of_many_quick_jobs(make_cluster, caplog):
    """A worker's next job speaks in the same read of its pipe in which the last one's result
    comes."""
    def compute(n):
        logging.getLogger('own').warning('line %d', n)
    with make_cluster(compute, nodes='local', forward_logs=True) as cluster:
        for job in [cluster.submit(n) for n in range(300)]:
            job(30)
        eventually(lambda: sum('own: line' in text for text in caplog.messages) == 300)


def test_paths_elsewhere_and_absolute_ones(make_cluster, here, tmp_path):
    def compute(path):
        inside = os.path.join(os.getcwd(), 'sub', 'inside.txt')
        os.makedirs(os.path.dirname(inside))
        for name in (path, inside):
            with open(name, 'w') as file:
                file.write(name)
            dispy_send_file(name)   # noqa: F821
    with make_cluster(compute, nodes='local') as cluster:
        job = cluster.submit(str(tmp_path / 'elsewhere.txt'))
        job(30)
        assert job.status == DispyJob.Finished, job.exception
    assert (here / 'elsewhere.txt').exists() and (here / 'sub' / 'inside.txt').exists()


@pytest.mark.parametrize('path, error', [('../up', 'ValueError'), ('a/../../up', 'ValueError'),
                                         ('missing', 'FileNotFoundError')])
def test_what_cannot_be_sent_is_an_error_in_the_job(make_cluster, here, path, error):
    def compute(path):
        if path.startswith(('..', 'a')):
            os.makedirs('a', exist_ok=True)
            with open(os.path.normpath(path), 'w'):
                pass
        dispy_send_file(path)   # noqa: F821
    with make_cluster(compute, nodes='local') as cluster:
        job = cluster.submit(path)
        assert job(30) is None and job.status == DispyJob.Terminated and error in job.exception
    assert os.listdir(str(here)) == [] and not (here.parent / 'up').exists()


def test_what_cannot_be_kept_on_the_client_is_an_error_in_the_job(make_cluster, here):
    def compute():
        with open('taken', 'w') as file:
            file.write('x' * 5000000)
        try:
            dispy_send_file('taken')   # noqa: F821
        except OSError as exc:
            return str(exc)
    (here / 'taken').mkdir()
    with make_cluster(compute, nodes='local') as cluster:
        assert 'on the client' in cluster.submit()(30)
        assert cluster.submit()(30)
    assert os.listdir(str(here)) == ['taken']


@pytest.mark.long
def test_a_large_file_does_not_stand_in_memory(make_cluster, here, tmp_path, request):
    """256 MiB, or 1 GiB with --long, pass the worker, the node and the client, whose memory stays
    where it was."""
    size = 1 << 30 if request.config.getoption('--long') else 1 << 28
    marks = {0: b'first', size // 2 - 3: b'middle', size - 4: b'last'}
    if shutil.disk_usage(str(here)).free < 2 * size:
        pytest.skip('less than %d MiB are free on the disk of %s' % (2 * size >> 20, tmp_path))

    def compute(size, marks):
        with open('large', 'wb') as file:
            file.truncate(size)
            for offset, text in marks.items():
                file.seek(offset)
                file.write(text)
        return dispy_send_file('large')   # noqa: F821
    with NodeProcess(tmp_path / 'node',
                     cpus=1) as node, make_cluster(compute, nodes=[node.address]) as cluster:
        assert cluster.submit(1 << 20, {})(30) == 0
        daemon = psutil.Process(node.process.pid)
        processes = [psutil.Process(), daemon, *daemon.children(recursive=True)]
        before = [process.memory_info().rss for process in processes]
        most = list(before)
        job = cluster.submit(size, marks)
        while not job.wait(0.01):
            most = [max(old, process.memory_info().rss) for old, process in zip(most, processes)]
        assert job.result == 0, job.exception
        assert len(processes) >= 4, 'client, daemon, runner, worker'
        assert all(high - low < 96 << 20 for high, low
                   in zip(most, before)), [(h - l) >> 20 for h, l in zip(most, before)]
        assert (here / 'large').stat().st_size == size
        with open(str(here / 'large'), 'rb') as file:
            for offset, text in marks.items():
                file.seek(offset)
                assert file.read(len(text)) == text


def test_the_node_is_lost_while_a_file_is_sent(make_cluster, here, tmp_path):
    node = NodeProcess(tmp_path / 'node')

    def compute():
        with open('large', 'wb') as file:
            file.truncate(32 << 20)
        return dispy_send_file('large')   # noqa: F821
    with Proxy(node.address, rate=2 << 20) as proxy, \
            make_cluster(compute, nodes=[proxy.address], loglevel=logging.CRITICAL) as cluster:
        job = cluster.submit()
        eventually(lambda: os.listdir(str(here)))
        node.kill()
        assert job.wait(60) and job.status == DispyJob.Abandoned
        eventually(lambda: os.listdir(str(here)) == [], what='the half file to be removed')


def test_the_cluster_is_closed_while_a_file_is_sent(make_cluster, here, tmp_path):
    def compute():
        with open('large', 'wb') as file:
            file.truncate(32 << 20)
        return dispy_send_file('large')   # noqa: F821
    with NodeProcess(tmp_path / 'node') as node, Proxy(node.address, rate=2 << 20) as proxy:
        cluster = make_cluster(compute, nodes=[proxy.address])
        job = cluster.submit()
        eventually(lambda: os.listdir(str(here)))
        cluster.close(terminate=True)
        assert job.status == DispyJob.Cancelled and os.listdir(str(here)) == []


# -- dispy_job_depends -----------------------------------------------------------------------------

def read(name):
    with open(name) as file:
        text = file.read()
    time.sleep(0.02)
    with open(name) as file:
        assert file.read() == text
    return text, sorted(os.listdir('.'))


def test_each_job_has_its_own_file_of_one_name(make_cluster, tmp_path):
    common = tmp_path / 'common.txt'
    common.write_text('for all')
    paths = []
    for n in range(8):
        directory = tmp_path / str(n)
        directory.mkdir()
        (directory / 'input.txt').write_text('input %d' % n)
        paths.append(str(directory / 'input.txt'))
    with make_cluster(read, nodes='local', depends=[str(common)]) as cluster:
        jobs = [cluster.submit('input.txt', dispy_job_depends=[path]) for path in paths]
        assert [job(30) for job in jobs] == [('input %d' % n, ['common.txt', 'input.txt'])
                                             for n in range(8)]
        assert cluster.submit('common.txt')(30) == ('for all', ['common.txt'])
        job = cluster.submit('input.txt')
        job(30)
        assert 'FileNotFoundError' in job.exception


def test_objects_of_one_job_are_known_by_name_and_gone_afterwards(make_cluster):
    names = {}
    exec('def compute(n):\n    try:\n        return helper(n) + Table.width\n'
         '    except NameError:\n        return "unknown"\n', names)

    def helper(n):
        return n + 1

    class Table:
        width = 10
    with make_cluster(names['compute'], nodes='local', max_jobs_per_worker=None) as cluster:
        for _ in range(5):
            assert cluster.submit(1, dispy_job_depends=[helper, Table])(30) == 12
            assert cluster.submit(1)(30) == 'unknown'


def test_files_of_a_job_beside_a_program(make_cluster, tmp_path):
    data = tmp_path / 'data.txt'
    data.write_text('beside')
    program = tmp_path / 'program'
    program.write_text('#!/bin/sh\ncat data.txt\n')
    with make_cluster(str(program), nodes='local') as cluster:
        job = cluster.submit(dispy_job_depends=[str(data)])
        assert (job(30), job.stdout) == (0, b'beside')
        assert cluster.submit()(30) != 0


@pytest.mark.parametrize('depends, error',
                         [([5], TypeError), ('name', TypeError), (['/no/such'], FileNotFoundError)])
def test_bad_depends_of_a_job(make_cluster, depends, error):
    with make_cluster(len, nodes='local') as cluster:
        with pytest.raises(error):
            cluster.submit('', dispy_job_depends=depends)
        assert cluster.status().jobs_pending == 0
