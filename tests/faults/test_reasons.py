"""Reasons for which a node does not take a computation: those that pass are tried again, those that
do not are final."""

import contextlib
import functools
import os
import re
import resource
import time

import pytest

import dispy
from conftest import ROOT, eventually
from dispynode import REASONS
from nodes import NodeProcess, SchedulerProcess, runner_of, runners_of
from scenes import fill


def answer():
    return 42


def refusals(caplog):
    return [record.getMessage()
            for record in caplog.records if 'does not take' in record.getMessage()]


def test_every_code_of_a_refusal_stands_in_the_table():
    """Also those that are not tested by tests of their own."""
    found = set()
    for name in ('dispy.py', 'dispynode.py', 'dispyscheduler.py'):
        with open(os.path.join(ROOT, name)) as file:
            text = file.read()
        found |= set(re.findall(r"Refused\([\w.]+, '(\w+)'", text)) | set(
            re.findall(r"\.refuse\(comp, '(\w+)'", text))
        found |= set(re.findall(r"ForcedEnd\('(\w+)'", text))
        found |= set(re.findall(r"\.refuse\(comp, '\w+' if \w+ else '(\w+)'", text))
        found |= set(re.findall(r"\bcode(?:, \w+)? = '(\w+)'", text)) & set(REASONS)
    assert found <= set(REASONS) and {'busy', 'closing', 'stopping', 'released', 'worker'} <= found
    assert {code for code, reason in REASONS.items() if not reason.passes} == {
        'transfer', 'setup', 'code', 'version', 'allocate', 'module', 'cpus', 'initializer',
        'start_method', 'python'}


# There is room for this module as well, which imports dispy, whose files travel along.
@pytest.mark.parametrize('small_disk', ['4m'], indirect=True)
@pytest.mark.parametrize('where', ['node', 'scheduler'])
def test_a_disk_that_was_full_when_files_came_is_tried_again(tmp_path, small_disk, caplog, where):
    """There is room for 200 KB, as daemons write a little too, and a file has more."""
    data = tmp_path / 'data'
    data.write_bytes(os.urandom(300000))
    with contextlib.ExitStack() as stack:
        if where == 'node':
            node = stack.enter_context(NodeProcess(tmp_path / 'node', '--dest-path-prefix',
                                                   small_disk))
        else:
            node = stack.enter_context(NodeProcess(tmp_path / 'node'))
            scheduler = stack.enter_context(SchedulerProcess(
                tmp_path / 's', '-n', '127.0.0.1:%d' % node.port, '--state-dir', small_disk))
        filler = fill(small_disk)
        os.truncate(filler, os.path.getsize(filler) - 200000)
        if where == 'node':
            cluster = dispy.JobCluster(answer, nodes=[node.address], depends=[str(data)])
        else:
            cluster = dispy.SharedJobCluster(answer, scheduler_port=scheduler.port,
                                             depends=[str(data)])
        with cluster:
            job = cluster.submit()
            eventually(lambda: refusals(caplog))
            time.sleep(0.5)   # it is tried several times
            os.unlink(filler)
            assert job(30) == 42
        assert len(refusals(caplog)) == 1, refusals(caplog)
        assert 'tried again' in refusals(caplog)[0]


def wait_for_file(path):
    """A setup that does not end before there is a file."""
    while not os.path.exists(path):
        time.sleep(0.01)


def test_a_runner_that_was_killed_in_setup_is_started_again(tmp_path, caplog):
    with NodeProcess(tmp_path / 'node') as node:
        with dispy.JobCluster(answer, nodes=[node.address], setup=functools.partial(
                wait_for_file, str(tmp_path / 'go'))) as cluster:
            job = cluster.submit()
            for _ in range(3):
                eventually(lambda: runners_of(node))
                runner_of(node).kill()
                time.sleep(0.3)
            (tmp_path / 'go').touch()
            assert job(40) == 42
        assert len(refusals(caplog)) == 1 and 'SIGKILL' in refusals(caplog)[0]


@pytest.mark.skipif(not hasattr(resource, 'prlimit'),
                    reason='limits of another process cannot be set here')
def test_descriptors_that_were_lacking_for_a_runner_are_back(tmp_path, caplog):
    with NodeProcess(tmp_path / 'node') as node:
        with dispy.JobCluster(len, nodes=[node.address]) as first:
            assert first.submit('abc')(30) == 3
        limits = resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE)
        with dispy.JobCluster(answer, nodes=[node.address]) as cluster:
            assert cluster.submit()(30) == 42
            resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE,
                             (len(os.listdir('/proc/%d/fd' % node.process.pid)), limits[1]))
            with dispy.JobCluster(len, nodes=[node.address]) as other:
                job = other.submit('abcd')
                eventually(lambda: refusals(caplog))
                resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, limits)
                assert job(40) == 4


def refuse(path):
    with open(path, 'a') as file:
        file.write('x')
    raise ValueError('not here')


def test_a_setup_that_raised_is_final(tmp_path):
    with NodeProcess(tmp_path / 'node') as node:
        with dispy.JobCluster(answer, nodes=[node.address],
                              setup=functools.partial(refuse, str(tmp_path / 'ran'))) as cluster:
            cluster.submit()
            eventually(lambda: cluster.status().all_nodes
                       and cluster.status().all_nodes[0].state == 'refused')
            # What is final does not keep others from being tried
            with dispy.JobCluster(len, nodes=[node.address]) as other:
                assert other.submit('ab')(30) == 2
            time.sleep(1.0)   # a reason that passes would have been tried again several times
            assert (tmp_path / 'ran').read_text() == 'x'
            cluster.close(terminate=True)
