#!/usr/bin/env python3
"""The shortest program: a function, some inputs, all CPUs of this machine. Output and failures come
back too."""

import dispy


def compute(n):
    print('looking at', n)
    if n == 7:
        raise ValueError('7 is not liked here')
    return sum(k for k in range(1, n) if n % k == 0)


with dispy.JobCluster(compute, nodes='local') as cluster:
    jobs = [cluster.submit(n) for n in (6, 7, 28, 496, 8128)]
    for job in jobs:
        if job() is None:
            print('job %s failed: %s' % (job.id, job.exception.splitlines()[-1]))
        else:
            print('job %s on %s: %s, it printed %r' % (job.id, job.ip_addr, job.result, job.stdout))
    cluster.print_status()
