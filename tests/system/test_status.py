"""What a job's status, futures and cancel say of jobs that wait on nodes: only what is on a CPU
runs."""

import concurrent.futures
import math
import os
import random
import time

import pytest

import dispy
from conftest import eventually
from dispy import DispyJob
from nodes import NodeProcess, SchedulerProcess


@pytest.fixture
def node(tmp_path):
    with NodeProcess(tmp_path / 'node', cpus=2) as node:
        yield node


@pytest.fixture
def cluster(make_cluster, node):
    cluster = make_cluster(wait_for, nodes=[node.address],
                           cluster_status=lambda *told: TOLD.append(told))
    TOLD.clear()
    yield cluster
    cluster.close(terminate=True)


@pytest.fixture
def executor(make_cluster, monkeypatch, node):
    monkeypatch.setattr(dispy.DispyExecutor, '_cluster_class', staticmethod(make_cluster))
    with dispy.DispyExecutor(nodes=[node.address]) as executor:
        yield executor


@pytest.fixture
def flag(tmp_path):
    """A file that ends the jobs that wait for it; they do not outlive the test."""
    path = str(tmp_path / 'flag')
    yield path
    open(path, 'w').close()


TOLD = []


def wait_for(path):
    """A job that ends when there is a file."""
    import os
    import time
    while path and not os.path.exists(path):
        time.sleep(0.005)
    return path


def note(directory, name, path):
    """A job that leaves a file when it begins."""
    import os
    open(os.path.join(directory, str(name)), 'w').close()
    return wait_for(path)


def statuses(jobs):
    return [job.status for job in jobs]


def quick_ones(cluster, count=300):
    """After these a node holds many jobs ahead."""
    for job in [cluster.submit('') for _ in range(count)]:
        job()


def test_only_what_is_on_a_cpu_is_running(cluster, flag):
    quick_ones(cluster)
    jobs = [cluster.submit(flag) for _ in range(20)]
    eventually(lambda: statuses(jobs).count(DispyJob.Running) == 2)
    running = [job for job in jobs if job.status == DispyJob.Running]
    assert all(job.status == DispyJob.Created and job.start_time is None
               for job in jobs if job not in running)
    assert all(job.ip_addr == '127.0.0.1' and 0 <= time.time() - job.start_time < 60
               for job in running)
    assert cluster.status().nodes[0].busy == 2
    open(flag, 'w').close()
    assert cluster.wait(30) and set(statuses(jobs)) == {DispyJob.Finished}
    assert all(job.ip_addr == '127.0.0.1' and job.start_time <= job.end_time for job in jobs)


def test_each_job_is_told_to_run_before_it_ends(cluster):
    jobs = [cluster.submit('') for _ in range(50)]
    assert cluster.wait(30)
    eventually(lambda: sum(job is not None and status == DispyJob.Finished
                           for status, _, job in TOLD) == 50)
    for job in jobs:
        assert [status for status, _, other in TOLD if other is job] == [
            DispyJob.Created, DispyJob.Running, DispyJob.Finished]


@pytest.mark.fork('jobs wait for a worker while it is started')
def test_what_a_node_says_agrees_with_the_status(cluster, node, flag):
    """Also of jobs that came to it together with the question."""
    for _ in range(5):
        jobs = [cluster.submit(flag) for _ in range(4)]
        eventually(lambda: cluster.node_jobs(node.address))
        asked = cluster.node_jobs(node.address, from_node=True)
        assert asked and set(statuses(asked)) == {DispyJob.Running}
        eventually(lambda: len(cluster.node_jobs(node.address, from_node=True)) == 2)
        there = cluster.node_jobs(node.address)
        assert (set(cluster.node_jobs(node.address, from_node=True))
                == {job for job in there if job.status == DispyJob.Running})
        for job in jobs:
            cluster.cancel(job)
        assert cluster.wait(30)


def test_cancel_waiting_cancels_what_waits_on_nodes_too(cluster, flag):
    quick_ones(cluster)
    jobs = [cluster.submit(flag) for _ in range(50)]
    eventually(lambda: statuses(jobs).count(DispyJob.Running) == 2)
    cluster.cancel_waiting()
    eventually(lambda: statuses(jobs).count(DispyJob.Cancelled) == 48)
    open(flag, 'w').close()
    assert cluster.wait(30) and statuses(jobs).count(DispyJob.Finished) == 2


def test_a_future_that_waits_on_a_node_is_cancelled(executor, flag):
    for future in [executor.submit(len, 'x') for _ in range(300)]:
        future.result(30)
    futures = [executor.submit(wait_for, flag) for _ in range(44)]
    eventually(lambda: sum(future.running() for future in futures) == 2)
    assert sum(future.cancel() for future in futures) == 42
    assert (sum(future.cancelled() for future in futures) == 42
            and sum(future.running() for future in futures) == 2)
    open(flag, 'w').close()
    done, left = concurrent.futures.wait(futures, 30)
    assert not left and sum(future.cancelled() for future in done) == 42


def test_shutdown_cancels_what_has_not_begun(executor, flag):
    for future in [executor.submit(len, 'x') for _ in range(300)]:
        future.result(30)
    futures = [executor.submit(wait_for, flag) for _ in range(50)]
    eventually(lambda: sum(future.running() for future in futures) == 2)
    executor.shutdown(wait=False, cancel_futures=True)
    eventually(lambda: sum(future.cancelled() for future in futures) == 48)
    open(flag, 'w').close()
    concurrent.futures.wait(futures, 30)


def test_what_was_cancelled_never_begins(executor, tmp_path):
    """At random moments: of those for which cancel() said so none has left its file."""
    rng, begun = random.Random(7), tmp_path / 'begun'
    begun.mkdir()
    futures = [executor.submit(note, str(begun), n, '') for n in range(200)]
    cancelled = {}
    for n in rng.sample(range(200), 200):
        cancelled[n] = futures[n].cancel()
    concurrent.futures.wait(futures, 60)
    names = set(os.listdir(str(begun)))
    assert not [n for n in cancelled if cancelled[n] and str(n) in names]
    assert not [n for n in cancelled if not cancelled[n] and str(n) not in names]


def test_cancel_in_a_callback(executor, flag):
    first = executor.submit(len, 'x')
    futures = [executor.submit(wait_for, flag) for _ in range(10)]
    seen = []
    first.add_done_callback(lambda future: seen.append([other.cancel() for other in futures]))
    eventually(lambda: seen, 30)
    assert seen[0].count(True) >= 8 and [future.cancelled() for future in futures] == seen[0]
    open(flag, 'w').close()


def test_map_drops_what_waits_after_an_exception(executor, tmp_path, flag):
    begun = tmp_path / 'begun'
    begun.mkdir()

    def compute(n):
        if n == 0:
            raise ValueError(n)
        return note(str(begun), n, flag)
    with pytest.raises(ValueError):
        list(executor.map(compute, range(60)))
    open(flag, 'w').close()
    executor.cluster.wait(30)
    assert len(os.listdir(str(begun))) < 30


@pytest.mark.parametrize('chunksize', (1, 2))
def test_map_drops_what_waits_when_its_iterator_is_closed(executor, tmp_path, flag, chunksize):
    begun = tmp_path / 'begun'
    begun.mkdir()

    def compute(n):
        return note(str(begun), n, flag) if n > 1 else n
    results = executor.map(compute, range(80), chunksize=chunksize)
    assert next(results) == 0
    results.close()
    open(flag, 'w').close()
    executor.cluster.wait(30)
    assert len(os.listdir(str(begun))) < 40


def test_without_a_connection_to_the_node_nothing_is_cancelled(tmp_path, flag):
    with NodeProcess(tmp_path / 'far', cpus=1) as node:
        with dispy.DispyExecutor(nodes=[node.address], reentrant=True) as executor:
            futures = [executor.submit(wait_for, flag) for _ in range(2)]
            eventually(futures[0].running)
            node.kill()
            waiting = futures[1]
            eventually(lambda: executor.cluster.status().all_nodes[0].state != 'ready')
            assert waiting.cancel() in (True, False)   # it waits here again, or is not answered for
            executor.cluster.close(terminate=True)


# -- CPUs that are shared or limited ---------------------------------------------------------------

def test_two_clusters_of_one_program_use_a_node_together(make_cluster, node, flag):
    first, second = make_cluster(wait_for,
                                 nodes=[node.address]), make_cluster(wait_for, nodes=[node.address])
    for cluster in (first, second):
        cluster.wait_nodes(1, 20)
    jobs = [cluster.submit(flag) for _ in range(4) for cluster in (first, second)]
    eventually(lambda: statuses(jobs).count(DispyJob.Running) == 2)
    busy = [cluster.status().nodes[0].busy for cluster in (first, second)]
    assert sum(busy) == 2, 'the node has two CPUs'
    open(flag, 'w').close()
    for cluster in (first, second):
        assert cluster.wait(30)
        cluster.close()


def test_nodes_of_one_host_and_name_are_counted_one_by_one(tmp_path):
    with NodeProcess(tmp_path / 'a', cpus=1) as a, NodeProcess(tmp_path / 'b', cpus=1) as b, \
            SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:%d' % a.port, '-n',
                             '127.0.0.1:%d' % b.port) as scheduler:
        for cluster in (dispy.JobCluster(math.sqrt, nodes=[a.address, b.address]),
                        dispy.SharedJobCluster(math.sqrt, scheduler_port=scheduler.port)):
            with cluster:
                cluster.wait_nodes(2, 20)
                wanted = {a.port: 3, b.port: 5}
                for port, count in wanted.items():
                    jobs = [cluster.submit_node(('127.0.0.1', port), n) for n in range(count)]
                    assert all(job.wait(20) for job in jobs)
                found = cluster.status().nodes
                assert len({(node.ip_addr, node.name) for node in found}) == 1
                assert {node.port: node.jobs_done for node in found} == wanted


def stamp(seconds=0.05):
    import time
    began = time.time()
    time.sleep(seconds)
    return began


def test_two_clusters_on_one_cpu_take_turns(make_cluster, tmp_path):
    with NodeProcess(tmp_path / 'one', cpus=1) as node:
        first, second = (make_cluster(stamp, nodes=[node.address]),
                         make_cluster(stamp, nodes=[node.address]))
        for cluster in (first, second):
            cluster.wait_nodes(1, 20)
        many, few = [first.submit() for _ in range(40)], [second.submit() for _ in range(5)]
        assert second.wait(60)
        last = max(job.result for job in few)
        between = sum(job.status == DispyJob.Finished and job.result < last for job in many)
        assert between <= 20, ('%d jobs of the first cluster ran before the five of the second'
                               % between)
        for cluster in (first, second):
            cluster.close(terminate=True)


class Base(dispy.NodeAllocate):
    """A subclass that leaves allocate() as it is."""


class Calls(dispy.NodeAllocate):
    """One that calls it."""

    def allocate(self, *args, **kwargs):
        return super().allocate(*args, **kwargs)


class Fixed(dispy.NodeAllocate):
    """One that says so itself."""

    def allocate(self, cluster, ip_addr, name, cpus, **kwargs):
        return self.cpus


def test_an_allocator_limits_by_its_cpus(make_cluster, tmp_path):
    with NodeProcess(tmp_path / 'node', cpus=4) as node:
        for kind in (dispy.NodeAllocate, Base, Calls, Fixed):
            for cpus, used in ((1, 1), (-1, 3), (3, 3)):
                cluster = make_cluster(stamp, nodes=[kind('127.0.0.1', node.port, cpus=cpus)])
                cluster.wait_nodes(1, 20)
                assert cluster.status().nodes[0].cpus == used, (kind, cpus)
                cluster.close()
