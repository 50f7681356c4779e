#!/usr/bin/env python3
"""What `speculate=True` does for a run on four nodes of which one is five times slower.

    python tests/bench/speculation.py [--rounds N] [--jobs N] [--seconds S] [--times N]

The nodes are real, have two CPUs each and are reached over loopback. A job waits for so many
seconds, give or take a half; on the slow node it waits so many times as long. Runs without and with
`speculate` alternate; each is measured from its first submission to its last result.
"""

import argparse
import contextlib
import logging
import os
import statistics
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), os.path.dirname(HERE)]

NAMES = ('one', 'two', 'three', 'slow')


def wait(seconds, times):
    """The work of a job; returns where it was done."""
    import time
    if dispy_node_name == 'slow':   # noqa: F821
        seconds *= times
    time.sleep(seconds)
    return dispy_node_name   # noqa: F821


def run(addresses, args, speculate):
    """Seconds of a run, and how many results came from the slow node."""
    import dispy
    options = {'nodes': addresses, 'loglevel': logging.ERROR, 'reentrant': True}
    with dispy.JobCluster(wait, speculate=speculate, **options) as cluster:
        cluster.wait_nodes(len(NAMES), 30)
        began = time.perf_counter()
        jobs = [cluster.submit(args.seconds * (0.5 + number % 11 / 10), args.times)
                for number in range(args.jobs)]
        places = cluster.gather(jobs, 300)
        return time.perf_counter() - began, places.count('slow')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--jobs', type=int, default=64)
    parser.add_argument('--seconds', type=float, default=0.5)
    parser.add_argument('--times', type=float, default=5.0)
    args = parser.parse_args()
    import conftest   # noqa: F401 - the environment of the tests
    from nodes import NodeProcess
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(NodeProcess(os.path.join(root, name), '--name', name))
                 for name in NAMES]
        addresses = [node.address for node in nodes]
        found = {False: [], True: []}
        for _ in range(args.rounds):
            for speculate in (False, True):
                seconds, slow = run(addresses, args, speculate)
                found[speculate].append(seconds)
                print('speculate=%-5s  %6.2f s, %d results from the slow node'
                      % (speculate, seconds, slow), flush=True)
        without, given = (statistics.median(found[speculate]) for speculate in (False, True))
        print('median without %.2f s, with %.2f s: %.0f %% less time'
              % (without, given, 100 * (1 - given / without)))


if __name__ == '__main__':
    main()
