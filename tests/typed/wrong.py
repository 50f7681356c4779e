"""A program in which type checkers find an error in each line that says so: see test_types.py."""

from __future__ import annotations

from typing import List

import dispy
import dispy_httpd


def area(width: int, height: float = 1.0, *, unit: str = 'm') -> str:
    return '%s %s' % (width * height, unit)


def square(number: int) -> int:
    return number * number


cluster = dispy.JobCluster(area)
cluster.submit('2')   # wrong
cluster.submit()   # wrong
cluster.submit(2, 1.0, 'cm')   # wrong
cluster.submit(2, units='cm')   # wrong
cluster.submit(2, dispy_timeout='60')   # wrong
cluster.submit(2, dispy_retries=1, dispy_retry_on='OSError')   # wrong
cluster.submit(2, dispy_time=60)   # wrong
cluster.submit_job_id('id', '2')   # wrong
cluster.submit_node('host', '2')   # wrong
cluster.submit_node(7, 2)   # wrong
cluster.submit_job_id_node('id', 'host', '2')   # wrong
number: int = cluster.submit(2).get()   # wrong
text: str = cluster.submit(2)()   # wrong
flag: bool = cluster.submit(2).result   # wrong
cluster.submit(2).results   # wrong
numbers: List[int] = cluster.gather([cluster.submit(2)])   # wrong
cluster.map(['1', '2'])   # wrong
cluster.map([1, 2], ['1', '2'])   # wrong
cluster.map([1, 2], in_flight='3')   # wrong
cluster.cancel(5)   # wrong
cluster.close(5, False, True)   # wrong
dispy.JobCluster(area, nodes=5)   # wrong
dispy.JobCluster(area, depends='file.txt')   # wrong
dispy.JobCluster(area, None, [], None, None, None, 9701, '10.0.0.1')   # wrong
dispy.JobCluster(area, no_such_parameter=1)   # wrong
dispy.JobCluster(area, job_status=area)   # wrong
dispy.JobCluster(5)   # wrong
dispy.SharedJobCluster(area, scheduler_host=5)   # wrong
dispy.SharedJobCluster(area, reentrant='yes')   # wrong
executor = dispy.DispyExecutor(nodes='local')
executor.submit(square, '2')   # wrong
executor.submit(square, number=2, dispy_timeout=5)   # wrong
result: str = executor.submit(square, 2).result()   # wrong
executor.map(square, ['2'])   # wrong
executor.with_options(time=5)   # wrong
dispy.DispyExecutor(max_workers='2')   # wrong
dispy.DispyExecutor(no_such_parameter=2)   # wrong
dispy.logger.DBUG   # wrong
dispy.NodeAllocate('host', cpus='2')   # wrong
dispy.recover_jobs(5)   # wrong
dispy.Driver   # wrong
dispy_httpd.DispyHTTPServer(area)   # wrong
