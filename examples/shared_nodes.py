#!/usr/bin/env python3
"""Two clusters share the nodes of a dispyscheduler: the one that comes later does not wait for the
other's queue.

    python dispynode.py &                           # on each host
    python dispyscheduler.py &                      # on one host
    python examples/shared_nodes.py [HOST[:PORT]]   # of the scheduler

Several programs may do the last at once.
"""

import sys
import time

import dispy


def compute(n):
    time.sleep(0.05)
    return n * n


host = sys.argv[1] if sys.argv[1:] else '127.0.0.1'
with dispy.SharedJobCluster(compute, scheduler_host=host) as many, \
        dispy.SharedJobCluster(compute, scheduler_host=host) as few:
    try:
        few.wait_nodes(1, timeout=20)
    except dispy.NoNodes as exc:
        many.close(terminate=True)
        sys.exit(str(exc))
    queue = [many.submit(n) for n in range(200)]
    queue[9].wait()
    began = time.time()
    print('few: %s' % [job() for job in [few.submit(n) for n in range(4)]])
    waiting = sum(job.status != dispy.DispyJob.Finished for job in queue)
    print('after %.1f s, while %d jobs of the other still wait or run'
          % (time.time() - began, waiting))
    many.cancel_waiting()
