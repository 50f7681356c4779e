#!/usr/bin/env python3
"""Files and functions for one job alone: `dispy_job_depends`. One name is another thing in each
job, and gone after it."""

import math
import os
import tempfile

import dispy


def total_area(name):
    with open(name) as file:
        return sum(area(float(line)) for line in file)   # noqa: F821 - each job brings its own


def square():
    def area(size):
        return size * size
    return area


def circle():
    def area(size):
        return math.pi * size * size / 4
    return area


with tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, 'sizes.txt')
    with open(path, 'w') as file:
        file.write('1\n2\n3\n')
    with dispy.JobCluster(total_area, nodes='local') as cluster:
        for shape in (square, circle):
            job = cluster.submit('sizes.txt', dispy_job_depends=[path, shape()])
            print('%s: %.3f' % (shape.__name__, job()))
        job = cluster.submit('sizes.txt')
        job()
        print('without them:', job.exception.splitlines()[-1])
