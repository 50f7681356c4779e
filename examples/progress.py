#!/usr/bin/env python3
"""How far it is: `progress=True` shows it on a terminal, as a bar if tqdm is installed; into a file
or pipe, nothing."""

import dispy


def divisors(n):
    return sum(1 for k in range(1, n + 1) if n % k == 0)


with dispy.JobCluster(divisors, nodes='local') as cluster:
    jobs = [cluster.submit(n) for n in range(100000, 100200)]
    most = max((job.result, job.id) for job in cluster.as_completed(jobs, progress=True))
    for n in range(100200, 100400):
        cluster.submit(n)
    cluster.wait(progress=True)
print('most divisors: %d, of %d' % (most[0], 100000 + most[1] - 1))
