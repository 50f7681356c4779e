#!/usr/bin/env python3
"""What `speculate=True` does for a run on four nodes of which one is five times slower.

    python tests/bench/speculation.py [--rounds N] [--jobs N] [--seconds S] [--times N]

The nodes are real, have two CPUs each and are reached over loopback. A job waits for so many
seconds, give or take a half by chance; on the slow node it waits so many times as long. Each round
is a run without `speculate` and one with it, of the same jobs, from the first submission to the
last result. Without it the last jobs are waited for as long as the slow node takes; with it for
twice their median and once more the length of a job, if that is less.
"""

import argparse
import contextlib
import logging
import os
import random
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


def run(addresses, lengths, times, speculate):
    """Seconds of a run, and how many results came from the slow node."""
    import dispy
    options = {'nodes': addresses, 'loglevel': logging.ERROR, 'reentrant': True}
    with dispy.JobCluster(wait, speculate=speculate, **options) as cluster:
        cluster.wait_nodes(len(NAMES), 30)
        began = time.perf_counter()
        jobs = [cluster.submit(length, times) for length in lengths]
        places = cluster.gather(jobs, 300)
        return time.perf_counter() - began, places.count('slow')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=8)
    parser.add_argument('--jobs', type=int, default=40)
    parser.add_argument('--seconds', type=float, default=0.7)
    parser.add_argument('--times', type=float, default=5.0)
    args = parser.parse_args()
    import conftest   # noqa: F401 - the environment of the tests
    from nodes import NodeProcess
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(NodeProcess(os.path.join(root, name), '--name', name))
                 for name in NAMES]
        addresses = [node.address for node in nodes]
        found = {False: [], True: []}
        for number in range(args.rounds):
            chance = random.Random(number)
            lengths = [args.seconds * chance.uniform(0.5, 1.5) for _ in range(args.jobs)]
            for speculate in (False, True):
                seconds, slow = run(addresses, lengths, args.times, speculate)
                found[speculate].append(seconds)
                print('speculate=%-5s  %6.2f s, %d results from the slow node'
                      % (speculate, seconds, slow), flush=True)
        for name, mean in (('median', statistics.median), ('mean', statistics.mean),
                           ('longest', max)):
            without, given = mean(found[False]), mean(found[True])
            print('%-7s without %.2f s, with %.2f s: %.0f %% less time'
                  % (name, without, given, 100 * (1 - given / without)))


if __name__ == '__main__':
    main()
