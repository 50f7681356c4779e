#!/usr/bin/env python3
"""A variable that the jobs of a node share: made once by `setup`, seen and changed by all processes
there."""

import dispy

WANTED = 1000


def setup():
    """Once on each node, before the first job."""
    global found
    import multiprocessing
    found = multiprocessing.Value('q', 0)   # a 64-bit integer with a lock


def primes(first, last):
    """Primes of a range, until the jobs on this node have found as many as are wanted, all
    together."""
    mine = []
    for n in range(first, last):
        if all(n % divisor for divisor in range(2, int(n ** 0.5) + 1)):
            with found.get_lock():   # no other job looks or writes meanwhile
                if found.value == WANTED:
                    break
                found.value += 1
            mine.append(n)
    return mine


with dispy.JobCluster(primes, nodes='local', setup=setup) as cluster:
    jobs = [cluster.submit(n, n + 1000) for n in range(1000000, 1100000, 1000)]
    numbers = [len(job()) for job in jobs]
print('%d primes, found by %d of %d jobs' % (sum(numbers), sum(map(bool, numbers)), len(jobs)))
