#!/usr/bin/env python3
"""A file for each job alone, and a file back from each: jobs make their input upper case."""

import os
import tempfile

import dispy


def upper(name):
    with open(name) as source, open('upper-' + name, 'w') as target:
        target.write(source.read().upper())
    # The file is on the client when this returns
    return dispy_send_file('upper-' + name)   # noqa: F821


with tempfile.TemporaryDirectory() as directory:
    os.chdir(directory)   # files of jobs come below the client's directory
    for n in range(3):
        with open('text-%d' % n, 'w') as file:
            file.write('this is text number %d' % n)
    with dispy.JobCluster(upper, nodes='local') as cluster:
        jobs = [cluster.submit('text-%d' % n, dispy_job_depends=['text-%d' % n]) for n in range(3)]
        for job in jobs:
            job()
    for n in range(3):
        with open('upper-text-%d' % n) as file:
            print(file.read())
    os.chdir('/')
