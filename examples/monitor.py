#!/usr/bin/env python3
"""Watch jobs in a browser: open the link that is printed. Without one, nothing else is different.

    python examples/monitor.py [number of jobs] [node ...]
"""

import random
import sys
import time

import dispy
import dispy_httpd


def simulate(seed, steps):
    rng, x = random.Random(seed), 1.0
    for step in range(steps):
        x += rng.gauss(0, 0.2)
        print('step %2d  x = %.3f' % (step, x))     # to be seen on the node's page while it runs
        if x < 0.1:
            raise ArithmeticError('it fell below 0.1')
        time.sleep(0.02)
    return x


count = int(sys.argv[1]) if sys.argv[1:] else 500
with dispy.JobCluster(simulate, nodes=sys.argv[2:] or 'local') as cluster:
    server = dispy_httpd.DispyHTTPServer(cluster, port=0)      # port 0: any that is free
    jobs = [cluster.submit(seed, steps=random.randint(5, 30)) for seed in range(count)]
    cluster.wait()
    failed = [job for job in jobs if job.exception]
    server.shutdown()
print('%d jobs, %d of them failed: %s'
      % (len(jobs), len(failed), failed[0].exception.splitlines()[-1] if failed else 'none'))
