#!/usr/bin/env python3
"""One workload over several engines side by side, in one run: dispy with the node that is a part of
the program, dispy with a real dispynode process and a secret over loopback, without and with TLS,
concurrent.futures.ProcessPoolExecutor, multiprocessing.Pool and, where it is installed, loky; two
workers each.

    python tests/bench/throughput.py [--json] [--rounds N] [--quick]
    python tests/bench/throughput.py --against DIR [--rounds N] [--quick] [--only PART ...]

The engines take turns within a round, and the median over rounds is shown, since machines are
noisy: compare the ratios of one run, not figures of two. The second form compares this copy of
dispy with another one, in DIR, which take turns too: on 2 CPUs, on a node of 16 CPUs whose jobs
sleep, on a link with a round trip of 150 ms, and in a scheduler with 200 nodes that are made up by
one process.
"""

import argparse
import importlib.util
import json
import logging
import multiprocessing
import os
import queue
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor

OWN = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ROOT = os.environ.get('DISPY_BENCH_TREE') or OWN   # where dispy is
sys.path.insert(0, ROOT)
os.environ['DISPY_DISCOVERY'] = 'loopback'
os.environ['DISPY_SECRET'] = 'a secret of the benchmark alone'

import dispy  # noqa: E402

WORKERS = 2


def empty(x):
    return x


def burn(seconds):
    import time
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return seconds


def rest(seconds):
    import time
    time.sleep(seconds)


def distant(port, trip):
    """Another port that leads to this one, on a link on which a message and its answer take so many
    seconds. Bytes are late, and as many of them are on their way as there may be."""
    listener = socket.create_server(('127.0.0.1', 0))

    def pump(source, target):
        late = queue.SimpleQueue()

        def deliver():
            for when, data in iter(late.get, None):
                time.sleep(max(0.0, when - time.monotonic()))
                target.sendall(data)
            target.close()
        threading.Thread(target=deliver, daemon=True).start()
        for data in iter(lambda: source.recv(1 << 18), b''):
            late.put((time.monotonic() + trip / 2, data))
        late.put(None)

    def accept():
        while True:
            client, server = listener.accept()[0], socket.create_connection(('127.0.0.1', port))
            for source, target in ((client, server), (server, client)):
                target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=pump, args=(source, target), daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


class Futures:
    """ProcessPoolExecutor."""
    name = 'ProcessPoolExecutor'

    def __init__(self):
        self._pool = ProcessPoolExecutor(WORKERS)

    def submit(self, function, argument):
        return self._pool.submit(function, argument)

    def get(self, handle):
        return handle.result()

    def is_done(self, handle):
        return handle.done()

    def close(self):
        self._pool.shutdown()


class Pool:
    """multiprocessing.Pool."""
    name = 'Pool'

    def __init__(self):
        self._pool = multiprocessing.Pool(WORKERS)

    def submit(self, function, argument):
        return self._pool.apply_async(function, (argument,))

    def get(self, handle):
        return handle.get()

    def is_done(self, handle):
        return handle.ready()

    def close(self):
        self._pool.close()
        self._pool.join()


class Loky:
    """The executor of joblib."""
    name = 'loky'

    def __init__(self):
        from joblib.externals import loky
        self._pool = loky.ProcessPoolExecutor(WORKERS)

    def submit(self, function, argument):
        return self._pool.submit(function, argument)

    def get(self, handle):
        return handle.result()

    def is_done(self, handle):
        return handle.done()

    def close(self):
        self._pool.shutdown()


class Dispy:
    """This project: a real daemon, a secret, TCP over loopback."""
    name = 'dispy over TCP'

    def __init__(self, cpus=WORKERS, trip=0.0):
        self._directory = tempfile.TemporaryDirectory()
        with open(os.path.join(self._directory.name, 'log'), 'w') as log:
            self._node = subprocess.Popen(
                [sys.executable, os.path.join(ROOT, 'dispynode.py'), '-c', str(cpus), '-i',
                 '127.0.0.1', '-p', '0',
                 '--dest-path-prefix', os.path.join(self._directory.name, 'node'), *self._words()],
                stdin=subprocess.DEVNULL, stderr=log)
        self._port = self._wait_for_port()
        if trip:
            self._port = distant(self._port, trip)
        self._clusters = {}

    def _wait_for_port(self):
        path = os.path.join(self._directory.name, 'node', 'lock')
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                with open(path) as file:
                    return int(re.search(r', port (\d+)\n', file.read()).group(1))
            except (OSError, AttributeError):   # not there yet, or not written yet
                time.sleep(0.02)
        raise RuntimeError('the node did not start')

    def _words(self):
        return ()

    def _options(self):
        return {}

    def submit(self, function, argument):
        cluster = self._clusters.get(function)
        if cluster is None:
            for other in self._clusters.values():
                other.close()
            cluster = dispy.JobCluster(function, nodes=[('127.0.0.1', self._port)],
                                       loglevel=logging.ERROR, **self._options())
            self._clusters = {function: cluster}
        return cluster.submit(argument)

    def get(self, job):
        result = job()
        if job.exception:
            raise RuntimeError(job.exception)
        return result

    def is_done(self, job):
        return job.end_time is not None

    def close(self):
        for cluster in self._clusters.values():
            cluster.close()
        self._node.terminate()
        self._node.wait(30)
        self._directory.cleanup()


class Tls(Dispy):
    """The same with TLS, one certificate for both."""
    name = 'dispy over TLS'

    def _certificate(self):
        paths = [os.path.join(self._directory.name, name)
                 for name in ('certificate.pem', 'key.pem')]
        if not os.path.exists(paths[0]):
            subprocess.run(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days',
                            '2', '-subj', '/CN=benchmark', '-out', paths[0], '-keyout', paths[1]],
                           check=True, stderr=subprocess.DEVNULL)
        return paths

    def _words(self):
        certificate, key = self._certificate()
        return '--certfile', certificate, '--keyfile', key

    def _options(self):
        certificate, key = self._certificate()
        return {'certfile': certificate, 'keyfile': key}


class Local(Dispy):
    """The node that is a part of the program."""
    name = 'dispy local'

    def __init__(self, cpus=WORKERS):
        self._cpus = cpus
        self._clusters = {}

    def submit(self, function, argument):
        if function not in self._clusters:
            for other in self._clusters.values():
                other.close()
            self._clusters = {function: dispy.JobCluster(function, nodes='local',
                                                         loglevel=logging.ERROR)}
            if self._cpus != WORKERS:
                self._clusters[function].wait_nodes(1, 30)
                self._clusters[function].set_node_cpus('127.0.0.1', self._cpus)
        return self._clusters[function].submit(argument)

    def close(self):
        for cluster in self._clusters.values():
            cluster.close()


class Recoverable(Dispy):
    """The same with a recover_file."""
    name = 'dispy, recover_file'

    def _options(self):
        return {'recover_file': os.path.join(self._directory.name, 'jobs')}


def gather(engine, function, arguments):
    """Seconds for all of them."""
    start = time.perf_counter()
    handles = [engine.submit(function, argument) for argument in arguments]
    for handle in handles:
        engine.get(handle)
    return time.perf_counter() - start


def measure_empty(engine, count):
    gather(engine, empty, range(200))
    return {'empty jobs/s': count / gather(engine, empty, range(count))}


def measure_round_trip(engine, count):
    gather(engine, empty, range(200))
    times = []
    for number in range(count):
        start = time.perf_counter()
        engine.get(engine.submit(empty, number))
        times.append(time.perf_counter() - start)
    times.sort()
    return {'round trip p50 ms': times[count // 2] * 1e3,
            'round trip p99 ms': times[int(count * 0.99)] * 1e3}


def measure_cpu(engine, count):
    """Of the program's own process, without its children."""
    gather(engine, empty, range(200))
    start = time.process_time()
    gather(engine, empty, range(count))
    return {'program us/job': (time.process_time() - start) / count * 1e6}


def measure_array(engine, count):
    try:
        import numpy
    except ImportError:
        return {}
    array = numpy.frombuffer(os.urandom(64 << 20), dtype=numpy.uint8)
    gather(engine, empty, range(8))
    return {'64 MiB MB/s': 2 * count * array.nbytes / 1e6
            / sum(gather(engine, empty, [array]) for _ in range(count))}


def measure_short(engine, count):
    gather(engine, burn, [0.001] * 20)
    return {'efficiency 2 ms': count * 0.002 / WORKERS / gather(engine, burn, [0.002] * count)}


def measure_beside(engine, seconds, count):
    """Efficiency while the main thread computes in pure Python."""
    gather(engine, burn, [0.001] * 20)
    start = time.perf_counter()
    handles = [engine.submit(burn, seconds) for _ in range(count)]
    while not all(map(engine.is_done, handles[-WORKERS:])):
        sum(number * number for number in range(5000))
    took = time.perf_counter() - start
    for handle in handles:
        engine.get(handle)
    return count * seconds / WORKERS / took


def measure_beside_2(engine, count):
    return {'busy, 2 ms': measure_beside(engine, 0.002, count)}


def measure_beside_half(engine, count):
    return {'busy, 0.5 ms': measure_beside(engine, 0.0005, count)}


def measure_large(engine, count):
    blob = os.urandom(1 << 20)
    gather(engine, empty, [blob] * 8)
    return {'1 MiB MB/s': 2 * count * len(blob) / 1e6 / gather(engine, empty, [blob] * count)}


def measure_one_by_one(engine, count):
    """Each when the one before has come back, as the floor of a pipe is measured."""
    blob = os.urandom(1 << 20)
    gather(engine, empty, [blob] * 8)
    return {'1 MiB in turn MB/s': 2 * count * len(blob) / 1e6
            / sum(gather(engine, empty, [blob]) for _ in range(count))}


def measure_efficiency(engine, count):
    gather(engine, burn, [0.001] * 20)
    return {'efficiency 20 ms': count * 0.02 / WORKERS / gather(engine, burn, [0.02] * count)}


def measure_recoverable(count):
    """Empty jobs a second of a cluster with a recover_file, and of one without beside it."""
    found = []
    for engine_class in (Dispy, Recoverable):
        engine = engine_class()
        try:
            found.append(measure_empty(engine, count)['empty jobs/s'])
        finally:
            engine.close()
    return found


def measure_sleepers(engine_class, count):
    """Jobs a second of 8 workers whose jobs sleep for 1 ms."""
    engine = engine_class(8)
    try:
        gather(engine, rest, [0.001] * 80)
        return count / gather(engine, rest, [0.001] * count)
    finally:
        engine.close()


def measure_first_result():
    """Seconds from constructing a cluster with an embedded node to its first result."""
    start = time.perf_counter()
    cluster = dispy.JobCluster(empty, nodes='local', loglevel=logging.ERROR)
    assert cluster.submit(1)() == 1
    seconds = time.perf_counter() - start
    cluster.close()
    return seconds


MEMORY = """
import sys, tracemalloc
sys.path.insert(0, {root!r})
import dispy
# Nothing listens there: all are queued
cluster = dispy.JobCluster(lambda x: x, nodes=[('127.0.0.1', 9)], loglevel=50)
warm = [cluster.submit(None) for _ in range(1000)]
cluster.cancel(warm[-1])    # answered by the driver: it has taken what was posted before
tracemalloc.start()
jobs = [cluster.submit(None) for _ in range({count})]
cluster.cancel(jobs[-1])
print(tracemalloc.get_traced_memory()[0] / {count}
      - sys.getsizeof(getattr(jobs[0], 'payload', None) or jobs[0]._payload))
cluster.close(terminate=True)
"""


def measure_memory(count):
    """Bytes of client memory a queued job takes besides its arguments, in a process of its own. The
    allocations are counted: how much the process grows depends on what it has freed before, above
    all on whether it had to compile its modules."""
    out = subprocess.run([sys.executable, '-c', MEMORY.format(root=ROOT, count=count)],
                         stdout=subprocess.PIPE, check=True)
    return float(out.stdout)


PROCESSES = """
import sys
sys.path.insert(0, {root!r})
import dispy, psutil


def empty(x):
    return x


def size(process):
    found = process.memory_full_info()
    return getattr(found, 'pss', found.uss) / (1 << 20)


if __name__ == '__main__':
    cluster = dispy.JobCluster(empty, nodes='local', loglevel=50)
    cluster.wait_nodes(1, 30)
    cluster.set_node_cpus('127.0.0.1', 2)
    for job in [cluster.submit(None) for _ in range(2000)]:
        job()
    program = psutil.Process()
    print(size(program), sum(map(size, program.children(recursive=True))))
    cluster.close()
"""


def measure_processes():
    """MiB of a program that has run a few jobs, and of its runner and two idle workers; what
    processes share is counted once where the system tells it."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, 'program.py')
        with open(path, 'w') as file:
            file.write(PROCESSES.format(root=ROOT))
        out = subprocess.run([sys.executable, path], stdout=subprocess.PIPE, check=True)
    return tuple(map(float, out.stdout.split()))


def measure_lengths(cpus, trip, function, jobs):
    """Jobs a second of a node, empty ones and of three lengths; for each as many as are in
    `jobs`."""
    engine, found = Dispy(cpus, trip), {}
    try:
        gather(engine, empty, range(200))
        found['empty'] = jobs[0] / gather(engine, empty, range(jobs[0]))
        for seconds, count in zip((0.001, 0.005, 0.02), jobs[1:]):
            gather(engine, function, [seconds] * 4 * cpus)
            found['%g ms' % (seconds * 1e3)] = count / gather(engine, function, [seconds] * count)
    finally:
        engine.close()
    return found


def measure_crowd(quick):
    """Jobs a second of a scheduler with 200 nodes, by the benchmark of that copy."""
    command = [sys.executable, os.path.join(ROOT, 'tests', 'bench', 'scheduler.py'), '--only',
               'crowd'] + ['--quick'] * quick
    text = subprocess.run(command, stdout=subprocess.PIPE, check=True,
                          universal_newlines=True).stdout
    return {'empty': float(re.search(r'^empty jobs a second +([0-9.]+)', text, re.M).group(1))}


def counts(quick, *jobs):
    """So many, or a tenth."""
    return [count // 10 if quick else count for count in jobs]


# part: its name in the table, and what it measures, of fewer jobs if it is to be quick
PARTS = {
    '2': ('2 CPUs, jobs that compute',
          lambda quick: measure_lengths(2, 0.0, burn, counts(quick, 20000, 3000, 800, 200))),
    '16': ('16 CPUs, jobs that sleep',
           lambda quick: measure_lengths(16, 0.0, rest, counts(quick, 20000, 12000, 6000, 3200))),
    'far': ('16 CPUs, link of 150 ms, jobs that sleep',
            lambda quick: measure_lengths(16, 0.15, rest, counts(quick, 20000, 12000, 6000, 3200))),
    'crowd': ('200 nodes of 8 CPUs and 10 programs, on a scheduler', measure_crowd)}


def compare(other, rounds, parts, quick):
    """The table of two copies of dispy, this one and another, which take turns."""
    found = {}
    for number in range(rounds):
        for part in parts:
            for tree in (other, OWN)[::-1 if number % 2 else 1]:
                command = ([sys.executable, os.path.abspath(__file__), '--part', part]
                           + ['--quick'] * quick)
                environ = dict(os.environ, DISPY_BENCH_TREE=os.path.abspath(tree))
                out = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environ,
                                     timeout=600).stdout
                for name, value in json.loads(out.splitlines()[-1]).items():
                    found.setdefault((part, name), {}).setdefault(tree, []).append(value)
    print('%-54s %-8s %10s %10s %8s %14s' % ('jobs a second, median of %d' % rounds, 'jobs of',
                                             'there', 'here', 'ratio', 'of ratios'))
    for (part, name), values in found.items():
        there, here = statistics.median(values[other]), statistics.median(values[OWN])
        ratios = sorted(new / old for new, old in zip(values[OWN], values[other]))
        print('%-54s %-8s %10.0f %10.0f %8.2f %14s'
              % (PARTS[part][0], name, there, here, here / there,
                 '%.2f to %.2f' % (ratios[0], ratios[-1])), flush=True)


ENGINES = (Local, Dispy, Tls, Futures, Pool, Loky)
OWN_ENGINES = [engine.name for engine in ENGINES if issubclass(engine, Dispy)]
# measurement, count; of each the ratio of dispy to the others is shown
WORKLOADS = {'empty': (measure_empty, 20000), 'trip': (measure_round_trip, 500),
             'cpu': (measure_cpu, 20000), 'large': (measure_large, 100),
             'inturn': (measure_one_by_one, 100),
             'array': (measure_array, 4), '20ms': (measure_efficiency, 200),
             '2ms': (measure_short, 1000), 'busy2ms': (measure_beside_2, 400),
             'busy0.5ms': (measure_beside_half, 1000)}


def measure_own(rounds, divide):
    """What has no counterpart in the other engines."""
    without, recoverable = zip(*(measure_recoverable(20000 // divide) for _ in range(rounds)))
    own = {}
    for engine_class in (Local, Dispy):
        sleepers = [measure_sleepers(engine_class, 8000 // divide) for _ in range(rounds)]
        own['8 workers, 1 ms of sleep, jobs/s, %s' % engine_class.name] = statistics.median(
            sleepers)
    program, others = zip(*(measure_processes() for _ in range(rounds)))
    own['MiB of the program, local'] = statistics.median(program)
    own['MiB of runner and 2 workers, local'] = statistics.median(others)
    return {**own, 'empty jobs/s with recover_file': statistics.median(recoverable),
            'ratio to those without': statistics.median(recoverable) / statistics.median(without),
            'first result s': statistics.median(measure_first_result() for _ in range(rounds)),
            'bytes per queued job': measure_memory(100000 // divide)}


def is_there(engine_class):
    """Whether what an engine needs is installed."""
    if engine_class is Tls:
        return shutil.which('openssl') is not None
    return engine_class is not Loky or importlib.util.find_spec('joblib') is not None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--json', action='store_true', help='print JSON instead of the table')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--quick', action='store_true',
                        help='a tenth of the jobs, one round: to see that it runs')
    parser.add_argument('--against', metavar='DIR', help='compare with the copy of dispy there')
    parser.add_argument('--only', nargs='+', choices=PARTS, default=list(PARTS), metavar='PART',
                        help='what is compared with it, of: %s' % ' '.join(PARTS))
    parser.add_argument('--workloads', nargs='+', choices=WORKLOADS, default=list(WORKLOADS),
                        metavar='NAME', help='what is measured, of: %s' % ' '.join(WORKLOADS))
    parser.add_argument('--engines', nargs='+', choices=[engine.name for engine in ENGINES],
                        metavar='NAME',
                        default=[engine.name for engine in ENGINES], help='of: %(choices)s')
    parser.add_argument('--skip-own', action='store_true',
                        help='leave out what the other engines have no counterpart of')
    parser.add_argument('--part', choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part][1](args.quick)))
        return
    if args.against:
        compare(args.against, 1 if args.quick else args.rounds, args.only, args.quick)
        return
    rounds, divide = (1, 10) if args.quick else (args.rounds, 1)
    engines = [engine for engine in ENGINES if engine.name in args.engines and is_there(engine)]
    figures = {engine.name: {} for engine in engines}
    for _ in range(rounds):
        for engine_class in engines:
            engine = engine_class()
            try:
                for workload, count in map(WORKLOADS.get, args.workloads):
                    for name, value in workload(engine, max(1, count // divide)).items():
                        figures[engine.name].setdefault(name, []).append(value)
            finally:
                engine.close()
    table = {name: {key: statistics.median(values) for key, values in found.items()}
             for name, found in figures.items()}
    ratios = {'%s / %s'
              % (own, other): {key: table[own][key] / table[other][key] for key in table[own]}
              for own in table if own in OWN_ENGINES for other in table if other not in OWN_ENGINES}
    own = {} if args.skip_own else measure_own(rounds, divide)
    if args.json:
        print(json.dumps({'rounds': rounds, 'python': sys.version.split()[0],
                          'cpus': os.cpu_count(), 'median': table,
                          'ratios': ratios, 'dispy': own, 'all': figures}))
        return
    keys = list(next(iter(table.values())))
    for name, found in table.items():
        print('%-36s' % name + '  '.join('%s %.3f' % (key, found[key]) for key in keys))
    for name, found in ratios.items():
        print('%-36s' % name + '  '.join('%s %.2f' % (key, found[key]) for key in keys))
    for name, value in own.items():
        print('%s: %.3f' % (name, value))


if __name__ == '__main__':
    main()
