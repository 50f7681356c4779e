"""Nodes that are killed, stopped and started again."""

import os
import signal
import time
import types

import psutil
import pytest

import dispy
from clients import Client
from conftest import eventually
from dispy import DispyJob
from dispynode import ResultSpool
from ledger import Ledger, enter, one_more_each
from nodes import NodeProcess
from proxy import Proxy

PULSE = 0.2   # s; a node that is silent for five is lost


def compute(path, number, seconds=0.0):
    enter(path, number)
    time.sleep(seconds)
    return number


def cluster_of(*nodes, **options):
    options.setdefault('pulse_interval', PULSE)
    options.setdefault('ping_interval', 0.5)
    return dispy.JobCluster(compute, depends=[enter], nodes=[node.address for node in nodes],
                            **options)


class Answers(list):
    """Numbers of jobs that have ended, by `job_status`: each must be told once."""

    def __call__(self, job):
        self.append(job.id)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / 'ledger')


@pytest.fixture
def kills(request):
    """How often a node is killed."""
    return 10 if request.config.getoption('--long') else 5


def restart(node, cpus=2):
    """The same node again: port, directory."""
    return NodeProcess(node.directory, cpus=cpus, port=node.port)


@pytest.mark.long
def test_a_node_is_killed_under_load_and_started_again_reentrant(tmp_path, ledger, kills):
    ended = Answers()
    node = NodeProcess(tmp_path / 'node')
    try:
        with cluster_of(node, reentrant=True, job_status=ended) as cluster:
            jobs = []
            for _ in range(kills):
                before = len(ended)
                jobs += [cluster.submit_job_id(len(jobs) + n, ledger.path, len(jobs) + n, 0.002)
                         for n in range(100)]
                eventually(lambda: len(ended) >= before + 20, 30)
                node.kill()
                node = restart(node)
            assert cluster.wait(120), cluster.status()
            assert ([job.result for job in jobs]
                    == list(range(len(jobs)))), [job.exception for job in jobs if job.exception][:3]
            tally = ledger.check(range(100 * kills), ended)
            assert tally.clean, tally
            one_more_each(cluster, ledger.path, 'more')
    finally:
        node.stop()


@pytest.mark.long
def test_a_node_is_killed_under_load_and_started_again_not_reentrant(tmp_path, ledger, kills):
    ended = Answers()
    node = NodeProcess(tmp_path / 'node')
    try:
        with cluster_of(node, job_status=ended) as cluster:
            jobs = []
            for _ in range(kills):
                before = len(ended)
                jobs += [cluster.submit_job_id(len(jobs) + n, ledger.path, len(jobs) + n, 0.002)
                         for n in range(100)]
                eventually(lambda: len(ended) >= before + 20, 30)
                node.kill()
                node = restart(node)
            assert cluster.wait(120), cluster.status()
            assert all(job.result == job.id if job.status == DispyJob.Finished else job.status
                       == DispyJob.Abandoned and str(node.port) in job.exception for job in jobs)
            tally = ledger.check(range(100 * kills), ended)
            assert tally.clean and not tally.again, tally
            one_more_each(cluster, ledger.path, 'more')
    finally:
        node.stop()


def test_jobs_that_run_on_a_killed_node_are_abandoned_at_once(tmp_path, ledger):
    """At once: long before five default pulses are over, although nothing is started in its
    place."""
    with NodeProcess(tmp_path / 'node') as node, cluster_of(node, pulse_interval=60) as cluster:
        jobs = [cluster.submit(ledger.path, number, 600) for number in range(2)]
        eventually(lambda: len(ledger.attempts()) == 2)
        node.kill()
        began = time.monotonic()
        assert [job(20) for job in jobs] == [None, None]
        assert time.monotonic() - began < 5   # 1 s in quiet
        assert all(job.status == DispyJob.Abandoned and node.host in job.exception for job in jobs)


@pytest.mark.skipif(not hasattr(signal, 'SIGSTOP'), reason='no SIGSTOP here')
def test_results_that_were_not_acknowledged_are_delivered_after_a_restart(tmp_path, ledger):
    """The client is stopped and the network swallows the results; the node notices, keeps them, and
    is killed."""
    def kept():
        return [os.path.join(node.prefix, name)
                for name in os.listdir(node.prefix) if name.startswith('r-')]
    with NodeProcess(tmp_path / 'node') as node, Proxy(node.address) as proxy:
        with Client('''
            with cluster(pulse_interval=0.2, ping_interval=0.5) as cluster:
                jobs = [cluster.submit(path, number, 1) for number in range(2)]
                print('ready', flush=True)
                cluster.wait()
                print([(job.result, job.exception) for job in jobs])
            ''', ledger.path,
                    types.SimpleNamespace(host=proxy.address[0], port=proxy.address[1])) as client:
            eventually(lambda: len(ledger.attempts()) == 2)
            client.process.send_signal(signal.SIGSTOP)
            proxy.hold()
            eventually(lambda: 'ended: nothing was received' in node.log())
            # Both
            eventually(lambda: [len(list(ResultSpool(path).rows())) for path in kept()] == [2])
            node.kill()
            with restart(node) as again:
                assert '2 results of an earlier computation' in again.log()
                proxy.cut()
                proxy.resume()
                client.process.send_signal(signal.SIGCONT)
                assert '[(0, None), (1, None)]\n' in client.rest()
                eventually(lambda: not kept())
        assert len(ledger.attempts()) == 2


@pytest.mark.skipif(not hasattr(signal, 'SIGSTOP'), reason='no SIGSTOP here')
def test_a_node_stopped_for_less_than_five_pulses_runs_nothing_twice(tmp_path, ledger):
    ended = Answers()
    with NodeProcess(tmp_path / 'one') as one, NodeProcess(tmp_path / 'two') as two:
        with cluster_of(one, two, reentrant=True, pulse_interval=1.0, job_status=ended) as cluster:
            cluster.wait_nodes(2, 20)
            jobs = [cluster.submit_job_id(number, ledger.path, number, 0.02)
                    for number in range(300)]
            for _ in range(3):
                one.process.send_signal(signal.SIGSTOP)
                time.sleep(1.5)
                one.process.send_signal(signal.SIGCONT)
                time.sleep(0.3)
            assert cluster.wait(60)
            tally = ledger.check(range(300), ended)
            assert (tally.clean and not tally.again
                    and {job.status for job in jobs} == {DispyJob.Finished})
            one_more_each(cluster, ledger.path, 'more')


def stop_all(process, number):
    """The daemon with its runner and workers, as a host that hangs."""
    for one in [*process.children(recursive=True), process]:
        one.send_signal(number)


@pytest.mark.skipif(not hasattr(signal, 'SIGSTOP'), reason='no SIGSTOP here')
def test_jobs_of_a_node_stopped_for_more_than_five_pulses_run_elsewhere_and_its_results_are_dropped(
        tmp_path, ledger):
    ended = Answers()
    with NodeProcess(tmp_path / 'one') as one, NodeProcess(tmp_path / 'two') as two:
        with cluster_of(one, two, reentrant=True, job_status=ended) as cluster:
            cluster.wait_nodes(2, 20)
            jobs = [cluster.submit_job_id(number, ledger.path, number, 0.5) for number in range(4)]
            eventually(lambda: len(ledger.attempts()) == 4)
            stop_all(psutil.Process(one.process.pid), signal.SIGSTOP)
            assert cluster.wait(30)
            assert {job.status for job in jobs} == {DispyJob.Finished}
            tally = ledger.check(range(4), ended)
            assert tally.clean and len(tally.again) == 2 and tally.executions == 6
            stop_all(psutil.Process(one.process.pid), signal.SIGCONT)
            eventually(lambda: [node.state for node in cluster.status().all_nodes]
                       == ['ready', 'ready'], 30)
            one_more_each(cluster, ledger.path, 'more')
            used = {job.ip_addr for job in jobs}
            assert len(ended) == 8 and used
            tally = ledger.check(range(4), ended[:4])
            assert tally.duplicated == [] and tally.lost == []


def kills_its_node(path, number):
    enter(path, number)
    if number == 'poison':
        import psutil as processes
        for parent in processes.Process().parents():   # worker <- runner <- daemon
            if 'dispynode.py' in ' '.join(parent.cmdline()):
                parent.kill()
        time.sleep(600)
    return number


def test_a_job_that_kills_its_node_is_given_up_after_three_nodes_with_their_names(tmp_path, ledger):
    nodes = [NodeProcess(tmp_path / name, '--name', name, cpus=1)
             for name in ('ann', 'ben', 'cid', 'dan')]
    try:
        with dispy.JobCluster(kills_its_node, depends=[enter],
                              nodes=[node.address for node in nodes], reentrant=True,
                              pulse_interval=PULSE) as cluster:
            cluster.wait_nodes(4, 20)
            poison = cluster.submit(ledger.path, 'poison')
            assert poison(60) is None and poison.status == DispyJob.Abandoned
            dead = [node for node in nodes if node.process.poll() is not None]
            assert len(dead) == 3
            assert all(os.path.basename(node.directory) in poison.exception
                       for node in dead), poison.exception
            assert cluster.submit(ledger.path, 'other')(60) == 'other'
    finally:
        for node in nodes:
            node.stop()


@pytest.mark.long
def test_half_of_eight_nodes_killed_at_once(tmp_path, ledger):
    ended = Answers()
    nodes = [NodeProcess(tmp_path / str(number), cpus=1) for number in range(8)]
    try:
        with cluster_of(*nodes, reentrant=True, job_status=ended) as cluster:
            cluster.wait_nodes(8, 30)
            jobs = [cluster.submit_job_id(number, ledger.path, number, 0.02)
                    for number in range(1000)]
            eventually(lambda: len(ended) > 100, 60)
            for node in nodes[::2]:
                node.process.send_signal(signal.SIGKILL)
            assert cluster.wait(120)
            assert {job.status for job in jobs} == {DispyJob.Finished}
            tally = ledger.check(range(1000), ended)
            assert tally.clean, tally
            one_more_each(cluster, ledger.path, 'more')
    finally:
        for node in nodes:
            node.stop()
