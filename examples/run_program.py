#!/usr/bin/env python3
"""A program instead of a function: it is copied to the nodes and run once per argument list; result
is its exit status."""

import os

import dispy

program = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'primes.sh')

with dispy.JobCluster(program, nodes='local') as cluster:
    jobs = [cluster.submit(first, first + 20) for first in range(100, 200, 20)]
    for job in jobs:
        print('exit status %s: %s' % (job(), job.stdout.decode().strip().replace('\n', ' ')))
