"""What it costs that many jobs have one large array in their arguments: memory of the program, and
bytes on the links to nodes.

    python tests/bench/values.py [--jobs N] [--mb N]
"""

import argparse
import os
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests'), os.path.join(ROOT, 'tests', 'faults')]
os.environ['DISPY_DISCOVERY'] = 'loopback'
os.environ['DISPY_SECRET'] = 'a secret of the benchmark alone'
os.environ['PYTHONPATH'] = os.pathsep.join(sys.path[:3])


def total(array):
    """Looks at all of it, and changes it."""
    found = float(array.sum())
    array[:10] = 0
    return found


def main():
    """The figures."""
    import numpy
    import psutil
    import dispy
    from nodes import NodeProcess
    from proxy import DOWN, UP, Proxy
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--jobs', type=int, default=1000)
    parser.add_argument('--mb', type=int, default=48)
    options = parser.parse_args()
    array = numpy.ones(options.mb * 1000000 // 8)
    own = psutil.Process()
    with tempfile.TemporaryDirectory() as directory, NodeProcess(directory + '/a', cpus=1) as one, \
            NodeProcess(directory + '/b', cpus=1) as two, \
            Proxy(one.address) as first, Proxy(two.address) as second:
        with dispy.JobCluster(total, nodes=[first.address, second.address]) as cluster:
            cluster.wait_nodes(2)
            before, most, began = own.memory_info().rss, 0, time.perf_counter()
            jobs = []
            for _ in range(options.jobs):
                jobs.append(cluster.submit(array))
                most = max(most, own.memory_info().rss - before)
            submitted = time.perf_counter() - began
            right = sum(job() == len(array) for job in jobs)
            print('%d of %d jobs with %d MB each returned what they should; '
                  'submitted in %.1f s, ended after %.1f s'
                  % (right, options.jobs, options.mb, submitted, time.perf_counter() - began))
            print("the program's memory grew by %.1f MB at most" % (most / 1e6))
            for proxy in (first, second):
                sent = [sum(connection.sent[way] for connection in proxy.connections) / 1e6
                        for way in (UP, DOWN)]
                print('a node was sent %.2f MB, and sent %.2f MB' % tuple(sent))


if __name__ == '__main__':
    main()
