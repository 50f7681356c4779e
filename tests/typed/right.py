"""A program that type checkers find right, and that runs: see test_types.py. assert_type says what
they know of an expression."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

import dispy
import dispy_httpd
import dispynode
import dispyscheduler

if TYPE_CHECKING:
    from typing_extensions import assert_type

    from dispy import dispy_job_path, dispy_node_name, dispy_provisional_result, dispy_send_file
else:
    def assert_type(value: Any, kind: Any) -> Any:
        return value


os.environ['DISPY_RESOURCES'] = 'gpu=1'   # what the program's own node offers


def area(width: int, height: float = 1.0, *, unit: str = 'm') -> str:
    return '%s %s' % (width * height, unit)


def square(number: int) -> int:
    return number * number


def total(*numbers: int) -> int:
    return sum(numbers)


def named(*, name: str = '') -> str:
    return name


def search(limit: int) -> float:
    dispy_provisional_result(0.5)
    with open(os.path.join(dispy_job_path, 'found.txt'), 'w') as file:
        file.write(dispy_node_name)
    dispy_send_file('found.txt')
    return float(limit)


class Scale:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, number: float) -> float:
        return self.factor * number


class Half(dispy.NodeAllocate):
    def allocate(self, cluster: dispy.JobCluster[..., Any], ip_addr: str, name: str, cpus: int,
                 avail_info: Optional[dispy.DispyNodeAvailInfo] = None, platform: str = '') -> int:
        if avail_info is not None and avail_info.cpu is not None and avail_info.cpu < 1.0:
            return 0
        self.depends.append(square)
        return max(1, cpus // 2)


def ended(job: dispy.DispyJob) -> None:
    if job.status == dispy.DispyJob.Finished:
        texts.append(job.result)


def changed(status: int, node: Optional[dispy.DispyNode],
            job: Optional[dispy.DispyJob[Any]]) -> None:
    if node is not None and status == dispy.DispyNode.Initialized:
        names.append(node.name)


def printed(job: dispy.DispyJob[Any], stream: str, text: str) -> None:
    sys.stderr.write(text)


texts: List[str] = []
names: List[str] = []
logged: List[int] = [dispy.logger.DEBUG, dispy.logger.getEffectiveLevel(), logging.INFO]


def functions() -> None:
    with dispy.JobCluster(area, nodes='local', job_status=ended, cluster_status=changed,
                          on_output=printed, loglevel=dispy.logger.WARNING, setup=None,
                          cleanup=True, pulse_interval=2, recover_file=False) as cluster:
        job = cluster.submit(2, 3.5, unit='cm')
        assert_type(job, dispy.DispyJob[str])
        assert_type(job(), Optional[str])
        assert_type(job.get(10), str)
        assert_type(job.status, int)
        assert job.ip_addr.startswith('127.') and job.end_time - job.start_time >= 0
        if job.status == dispy.DispyJob.Terminated:
            sys.stderr.write(job.exception.splitlines()[-1])
        more = [cluster.submit(2), cluster.submit_job_id('mine', 2, height=2.0),
                cluster.submit(2, unit='km', dispy_timeout=60, dispy_retries=1),
                cluster.submit(2, dispy_retries=2, dispy_retry_on=(OSError,)),
                cluster.submit(2, dispy_priority=1), cluster.submit(2, dispy_job_depends=[square]),
                cluster.submit_job_id(5, 2, dispy_cpus=1)]
        assert_type(more, List[dispy.DispyJob[str]])
        assert_type(cluster.gather(more), List[str])
        for each in cluster.as_completed(more, timeout=60):
            assert_type(each, dispy.DispyJob[str])
        node = cluster.status().nodes[0]
        assert_type(node.avail_info, Optional[dispy.DispyNodeAvailInfo])
        at = cluster.submit_node(node, 2)
        assert_type(at.get(), str)
        assert_type(cluster.submit_job_id_node('there', node, 3, dispy_memory=1 << 30).get(), str)
        assert_type(cluster.submit(4, dispy_resources={'gpu': 1}).get(), str)
        assert_type(node.resources, Dict[str, int])
        assert_type(cluster.wait(60), bool)
        assert cluster(60) and not cluster.jobs() and cluster.cancel_all() == 0
        cluster.print_status()
    assert len(texts) == 11 and names


def other_functions() -> None:
    """Maps; callables of other kinds; values for many jobs; coroutines."""
    with dispy.JobCluster(square, nodes='local') as squares:
        results = squares.map(range(3), in_flight=2)
        for number in results:
            assert_type(number, int)
        results.close()
        ref = squares.put(3)
        assert squares.submit(ref).get() == 9
        assert asyncio.run(waits_for(squares)) == 16
    with dispy.JobCluster(area, nodes='local') as areas:
        assert_type(list(areas.map([1, 2], [2.0, 3.0])), List[str])
        assert_type(list(areas.map([1, 2])), List[str])
    with dispy.JobCluster(functools.partial(area, unit='cm'), nodes='local') as partial:
        assert_type(partial.submit(2).get(), str)
    with dispy.JobCluster(Scale(2.0), nodes='local') as scale:
        assert_type(scale.submit(2).get(), float)
        assert list(scale.map([1, 2.5])) == [2.0, 5.0]
    with dispy.JobCluster(lambda x, y: x + y, nodes='local') as anything:
        assert anything.submit(1, 2).get() == 3
    with dispy.JobCluster(total, nodes='local') as totals:
        assert totals.submit(1, 2, 3).get() == 6
        assert list(totals.map([1, 2], [3, 4])) == [4, 6]
    with dispy.JobCluster(named, nodes='local') as nameds:
        assert nameds.submit(name='a').get() == 'a'
    with dispy.JobCluster(search, nodes='local') as searches:
        assert searches.submit(3).get() == 3.0 and os.path.exists('found.txt')


async def waits_for(cluster: dispy.JobCluster[[int], int]) -> int:
    result = await cluster.submit(4)
    assert_type(result, int)
    return result


def handed_on(cluster: dispy.JobCluster[..., Any], jobs: Sequence[dispy.DispyJob[object]]) -> int:
    return cluster.cancel_all() + len(jobs)


def programs() -> None:
    with dispy.JobCluster('/bin/echo', nodes='local', depends=[__file__]) as echo:
        job = echo.submit('-n', 'a', 5)
        assert job.get() == 0 and job.stdout == b'a 5'
        assert handed_on(echo, [job]) == 1


def nodes_of_all_kinds(known: dispy.DispyNode) -> dispy.ClusterStatus:
    with dispy.JobCluster(square, nodes=[
            '10.0.0.1', ('10.0.0.2', 9701), ('10.0.0.3', 9701, 4), known,
            {'host': '10.0.0.4', 'cpus': 1}, Half('10.0.0.*')]) as cluster:
        cluster.discover_nodes('*')
        cluster.allocate_node(('10.0.0.5', 9701))
        cluster.set_node_cpus(known, cluster.set_node_cpus('10.0.0.1', -1))
        cluster.send_file(__file__, '10.0.0.1', timeout=5)
        return cluster.status()


def shared(host: str) -> None:
    with dispy.SharedJobCluster(square, scheduler_host=host, scheduler_port=9702, exclusive=True,
                                reentrant=True, secret=b'secret') as cluster:
        assert_type(cluster.submit(2), dispy.DispyJob[int])
        assert_type(list(cluster.map([1, 2])), List[int])
    with dispy.SharedJobCluster('/bin/true', ['10.0.0.*'], scheduler_host=host) as program:
        program.submit('a').get()


def executors() -> None:
    with dispy.DispyExecutor(max_workers=2, nodes='local', initializer=square, initargs=(2,),
                             loglevel='WARNING') as executor:
        future = executor.submit(area, 2, unit='cm')
        assert_type(future, dispy.DispyFuture[str])
        assert_type(future.result(), str)
        assert_type(future.job, Optional[dispy.DispyJob[str]])
        assert_type(list(executor.map(square, [1, 2], chunksize=2)), List[int])
        assert_type(list(executor.map(area, [1, 2], [3, 4])), List[str])
        quick = executor.with_options(timeout=60, priority=1, resources={'gpu': 1})
        futures = [quick.submit(square, number) for number in range(3)]
        for done in concurrent.futures.as_completed(futures):
            assert_type(done.result(), int)
        any_executor(executor)


def any_executor(executor: concurrent.futures.Executor) -> Tuple[int, str]:
    return executor.submit(square, 2).result(), executor.submit(area, 2).result()


def monitored() -> None:
    with dispy.JobCluster(square, nodes='local') as cluster:
        with dispy_httpd.DispyHTTPServer(cluster, port=0, show_job_args=False) as server:
            assert_type(server.url, str)
            server.del_cluster(cluster)


def recovered(path: str) -> List[dispy.DispyJob[Any]]:
    for lost in dispy.recoverable():
        return dispy.recover_jobs(lost, timeout=5)
    try:
        return dispy.recover_jobs(path, terminate_pending=True)
    except (dispy.NothingToRecover, dispy.SecretError, dispynode.DispyError, OSError) as error:
        sys.stderr.write('%s\n' % error)
    return dispy.fault_recover_jobs()


if len(sys.argv) > 1:
    sys.exit(dispyscheduler.main(['--help']) or dispy_httpd.main() or dispynode.main())
if __name__ == '__main__':
    functions()
    other_functions()
    programs()
    executors()
    monitored()
    print('right', dispy.__version__)
