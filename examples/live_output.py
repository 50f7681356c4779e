#!/usr/bin/env python3
"""What jobs print and log, while they run: `on_output` hears the one, the program's own logging the
other."""

import logging
import sys
import time

import dispy


def work(steps):
    log = logging.getLogger('my.model')
    for step in range(steps):
        print('step', step)
        time.sleep(0.5)
    log.warning('no convergence after %d steps', steps)


def heard(job, stream, text):
    """Called within a second of its being printed; perhaps several lines at once."""
    for line in text.splitlines():
        print('job %s, %s, %s: %s' % (job.id, job.status_text(), stream, line))


logging.basicConfig(stream=sys.stdout, format='%(levelname)s %(message)s')
with dispy.JobCluster(work, nodes='local', on_output=heard, forward_logs=True,
                      loglevel=logging.WARNING) as cluster:
    for n in (3, 4):
        cluster.submit_job_id('of %d steps' % n, n)
