#!/usr/bin/env python3
"""What it costs that modules travel: a program with a package of 200 modules, of about 150 lines
each.

    python tests/bench/modules.py [--modules N] [--rounds N]

For the embedded node and for a real dispynode it prints the median time from the making of a
cluster to its first result, for the first and for the second cluster of a program, and the bytes of
files that the node gets. Beside them stands the same for a function of the script that uses none of
the modules.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests')]
os.environ['DISPY_DISCOVERY'] = 'loopback'
os.environ['DISPY_SECRET'] = 'a secret of the benchmark alone'

BODY = '''
LIMIT_{0} = {0}
TABLE_{0} = {{'a': 1, 'b': [2, 3]}}


def function_{0}(n):
    """Adds {0} to n, and does nothing else with it."""
    total = n + {0}
    for _ in range(0):
        total += LIMIT_{0}
    return total


class Class_{0}:
    """Holds a number."""
    level = {0}

    def __init__(self, n):
        self.n = n

    def doubled(self):
        return 2 * self.n
'''
PROGRAM = '''
import json, sys, time
import dispy
import pkg.m0

def of_package(n):
    return pkg.m0.chain(n)

def plain(n):
    return n

nodes = json.loads(sys.argv[1])
nodes = nodes if nodes == 'local' else [tuple(nodes)]
found = {}
for name, function in (('none', plain), ('first', of_package), ('second', of_package)):
    start = time.perf_counter()
    with dispy.JobCluster(function, nodes=nodes) as cluster:
        assert cluster.submit(1)(60) is not None
        found[name] = time.perf_counter() - start
        found['bytes of '
              + name] = sum(row[1] for row in dispy.core_of(cluster).bundles.rows(nodes == 'local'))
print(json.dumps(found))
'''


def write_package(directory, count):
    """Each module imports two others."""
    os.makedirs(os.path.join(directory, 'pkg'))
    open(os.path.join(directory, 'pkg', '__init__.py'), 'w').close()
    for number in range(count):
        others = [other for other in (2 * number + 1, 2 * number + 2) if other < count]
        imports = ''.join('from pkg import m%d\n' % other for other in others)
        chain = 'def chain(n):\n    return %s\n' % ('m%d.chain(n)' % others[0] if others else 'n')
        body = ''.join(BODY.format(part) for part in range(6))
        with open(os.path.join(directory, 'pkg', 'm%d.py' % number), 'w') as file:
            file.write(imports + '\n\n' + chain + body)


def measure(directory, nodes, rounds):
    """Medians over some runs of the program."""
    import json
    runs = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, 'program.py', json.dumps(nodes)], cwd=directory,
                              check=True,
                              env=dict(os.environ, PYTHONPATH=ROOT), stdout=subprocess.PIPE)
        runs.append(json.loads(done.stdout))
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=textwrap.dedent(__doc__).splitlines()[0])
    parser.add_argument('--modules', type=int, default=200)
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    from nodes import NodeProcess
    with tempfile.TemporaryDirectory() as directory:
        write_package(directory, args.modules)
        with open(os.path.join(directory, 'program.py'), 'w') as file:
            file.write(PROGRAM)
        with NodeProcess(os.path.join(directory, 'node')) as node:
            print('%-12s %14s %14s %14s %12s'
                  % ('node', 'no modules, s', 'first, s', 'second, s', 'bytes'))
            for name, nodes in (('embedded', 'local'), ('dispynode', list(node.address))):
                found = measure(directory, nodes, args.rounds)
                print('%-12s %14.2f %14.2f %14.2f %12d' % (
                    name, found['none'], found['first'], found['second'], found['bytes of first']))


if __name__ == '__main__':
    main()
