#!/usr/bin/env python3
"""What cancelling does, on a real node of 2 CPUs over loopback.

    python tests/bench/cancel.py [--tree DIR] [--rounds N]

`--tree` measures another copy of dispy. A call that says of itself that it was cancelled must not
have run: each of them writes a line into a file of its own.
"""

import argparse
import logging
import os
import random
import statistics
import sys
import tempfile
import time

from fairness import ROOT, Place

PROMISED_CANCELLED = 44     # of 50
PROMISED_SECONDS = 0.6


def rest(seconds):
    import time
    time.sleep(seconds)


def note(directory, number):
    """It takes 10 ms, and writes that it began."""
    import os
    import time
    with open(os.path.join(directory, '%d' % number), 'a') as file:
        file.write('begun\n')
    time.sleep(0.01)


def executor(place, **options):
    return dispy.DispyExecutor(nodes=place.nodes, loglevel=logging.ERROR, **options)


def at_shutdown(place):
    """How many of 50 calls of 0.2 s after 3,000 quick ones are cancelled by `shutdown`, and s until
    it returns."""
    pool = executor(place)
    for future in [pool.submit(rest, 0.0) for _ in range(3000)]:
        future.result()
    futures = [pool.submit(rest, 0.2) for _ in range(50)]
    time.sleep(0.1)   # as many as may be are on the node
    began = time.monotonic()
    pool.shutdown(wait=True, cancel_futures=True)
    return sum(future.cancelled() for future in futures), time.monotonic() - began


def at_random(place, rng):
    """Of 200 calls of 10 ms that are cancelled at random times: how many say that they were, how
    many of these ran, how many that were not did not run."""
    with tempfile.TemporaryDirectory() as directory, executor(place) as pool:
        futures = [pool.submit(note, directory, number) for number in range(200)]
        order = list(range(200))
        rng.shuffle(order)
        answers = {}
        for number in order:
            time.sleep(rng.uniform(0.0, 0.01))
            answers[number] = futures[number].cancel()
        for number, gone in answers.items():
            if not gone:
                futures[number].result()
        ran = {int(name) for name in os.listdir(directory)}
    gone = {number for number, answer in answers.items() if answer}
    return len(gone), len(gone & ran), len(set(answers) - gone - ran)


def main():
    print('%-76s %-30s %s' % (ARGS.tree[-76:], 'measured', 'promised'))
    with Place(2, tree=ARGS.tree) as place:
        found = [at_shutdown(place) for _ in range(ARGS.rounds)]
        print('%-76s %-30s %s'
              % ('of 50 calls of 0.2 s after 3,000 quick ones, cancelled: fewest, median',
                 '%d, %d' % (min(found)[0], statistics.median(count for count, _ in found)),
                 'at least %d' % PROMISED_CANCELLED))
        print('%-76s %-30s %s'
              % ('... shutdown(cancel_futures=True) returns: median, latest', '%.2f s, %.2f s'
                 % (statistics.median(took for _, took in found), max(took for _, took in found)),
                 'within %.1f s' % PROMISED_SECONDS), flush=True)
        rows = [at_random(place, random.Random(number)) for number in range(ARGS.rounds)]
        print('%-76s %-30s %s'
              % ('200 calls of 10 ms cancelled at random times, %d rounds: cancel() was True'
                 % len(rows), '%d to %d' % (min(rows)[0], max(rows)[0]), 'some'))
        print('%-76s %-30s %s'
              % ('... of these, ran all the same', '%d' % sum(row[1] for row in rows), '0'))
        print('%-76s %-30s %s' % ('... cancel() was False, and did not run',
                                  '%d' % sum(row[2] for row in rows), '0'))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tree', default=ROOT, metavar='DIR',
                        help='where dispy.py is (default: this tree)')
    parser.add_argument('--rounds', type=int, default=5)
    ARGS = parser.parse_args()
    sys.path.insert(0, os.path.abspath(ARGS.tree))
    os.environ['DISPY_DISCOVERY'] = 'loopback'
    os.environ['DISPY_SECRET'] = 'a secret of the benchmark alone'
    import dispy
    main()
