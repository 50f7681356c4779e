#!/usr/bin/env python3
"""Provisional results: many searches for the same thing; when one has come near enough, all are
stopped."""

import random

import dispy


def search(seed, target):
    """Random walk of bisections towards the cube root of `target`; tells each better value."""
    random.seed(seed)
    low, high = 0.0, float(target)
    while True:
        middle = random.uniform(low, high)
        if middle ** 3 < target:
            low = middle
        else:
            high = middle
        # A name that every job knows
        dispy_provisional_result((high - low, (low + high) / 2))   # noqa: F821


best = {'width': float('inf'), 'value': None}


def look(job):
    """Called for every provisional result, of each job in order, and at each job's end."""
    if job.status == dispy.DispyJob.ProvisionalResult:
        width, value = job.result
        if width < best['width']:
            best.update(width=width, value=value)
        if best['width'] < 1e-9:
            cluster.cancel(job)


with dispy.JobCluster(search, nodes='local', job_status=look) as cluster:
    jobs = [cluster.submit(seed, 27) for seed in range(4)]
    cluster.wait()
print('cube root of 27 is about %.6f; jobs are %s'
      % (best['value'], ', '.join(job.status_text() for job in jobs)))
