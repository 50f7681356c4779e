#!/usr/bin/env python3
"""Pi by throwing darts: a lazy stream of inputs with `map`, stopped when the estimate is good
enough."""

import itertools
import math

import dispy


def throw(seed, darts=100000):
    import random
    rng = random.Random(seed)
    return sum(rng.random() ** 2 + rng.random() ** 2 < 1 for _ in range(darts)), darts


inside = thrown = 0
with dispy.JobCluster(throw, nodes='local') as cluster:
    # Inputs without end; at most 8 jobs under way
    results = cluster.map(itertools.count(), in_flight=8)
    for hits, darts in results:
        inside, thrown = inside + hits, thrown + darts
        estimate, error = 4 * inside / thrown, 4 * math.sqrt(0.17 / thrown)
        if error < 0.002:
            break
    results.close()   # cancels what is under way
print('pi is %.4f give or take %.4f, after %d darts' % (estimate, error, thrown))
