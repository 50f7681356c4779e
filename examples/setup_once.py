#!/usr/bin/env python3
"""Data that every job needs, loaded once a node by `setup` and shared by its jobs; results by
callback as they come."""

import collections
import os
import sys

import dispy


def setup():
    """Once on each node, in the directory that holds the files of `depends`."""
    global words
    with open('licence.txt', encoding='utf-8') as file:
        words = file.read().split()


def count(first_letter):
    """Every job sees `words`; nothing of it is sent with the job."""
    return sum(1 for word in words if word.lower().startswith(first_letter))


totals = collections.Counter()


def ended(job):
    """Called in a thread of the cluster's for each job that has ended."""
    if job.status == dispy.DispyJob.Finished:
        totals[job.id] = job.result
    else:
        print(job.exception, file=sys.stderr)


def main():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    directory = os.path.join(root, 'LICENSE')
    import shutil
    import tempfile
    with tempfile.TemporaryDirectory() as scratch:
        path = shutil.copy(directory, os.path.join(scratch, 'licence.txt'))
        with dispy.JobCluster(count, nodes='local', setup=setup, depends=[path],
                              job_status=ended) as cluster:
            for letter in 'abcdefghijklmnopqrstuvwxyz':
                cluster.submit_job_id(letter, letter)
    print(', '.join('%s %d' % item for item in totals.most_common(5)))


if __name__ == '__main__':
    main()
