#!/usr/bin/env python3
"""What the schedule promises, measured on real nodes over loopback: how long a job of high priority
waits, how two programs share nodes, when a latecomer begins, and whether a job waits behind a full
node beside an idle one.

    python tests/bench/fairness.py [--tree DIR] [--only NAME]... [--rounds N] [--seconds S]

The jobs sleep, so that a small machine can stand for a large one. `--tree` measures another copy of
dispy, so that two versions can be compared on the same machine.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.abspath(__file__)
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(HERE)))
USERS = ('ada', 'bob')
BOTH = 2.0          # s after which both have begun: before that, one may have been alone
LATE = 5.0          # s after which the latecomer begins, and for which its jobs are counted


def sleep(seconds):
    """A job of this length."""
    import time
    time.sleep(seconds)


class Service:
    """A dispynode or a dispyscheduler; `port` once it listens."""

    def __init__(self, root, name, options, lock, tree):
        self.log = os.path.join(root, 'log-%s' % os.path.basename(lock.strip('/')))
        with open(self.log, 'w') as log:
            self.process = subprocess.Popen([sys.executable, os.path.join(tree, name), *options],
                                            stdin=subprocess.DEVNULL, stderr=log, stdout=log)
        self.port = self._wait_for_port(lock)

    def _wait_for_port(self, lock):
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with open(self.log) as file:
                words = file.read().replace(':', ' ').replace(',', ' ').split()
            if 'port' in words:
                return int(words[words.index('port') + 1])
            time.sleep(0.05)
        raise RuntimeError('%s did not start' % lock)

    def end(self):
        self.process.terminate()
        self.process.wait(30)


def secret_of(user):
    """The secret of one of the USERS."""
    return 'the secret of %s in this benchmark' % user


def note_used(root, used):
    """Write into the state of a scheduler what users have used."""
    from dispyscheduler import State
    state = State(root)
    state.note_used(used, time.time())
    state.close()


class Place:
    """A directory with nodes of so many CPUs, and a scheduler for them."""

    def __init__(self, *cpus, scheduler=False, tree=None, options=(), used=None):
        """`options` of the scheduler are for users 'ada' and 'bob', who have secrets then. `used`
        are the CPUs that they have used in the mean of the past."""
        tree = tree or ARGS.tree
        self._directory = tempfile.TemporaryDirectory()
        root = self._directory.name
        self.services = [Service(root, 'dispynode.py', [
            '-c', str(count), '-i', '127.0.0.1', '-p', '0', '--dest-path-prefix',
            os.path.join(root, 'n%d' % number)], 'node%d' % number, tree)
                         for number, count in enumerate(cpus)]
        self.nodes = [('127.0.0.1', service.port) for service in self.services]
        self.scheduler = None
        if scheduler:
            named = [word for host, port in self.nodes for word in ('-n', '%s:%d' % (host, port))]
            state = os.path.join(root, 'state')
            if options:
                named += ['--cluster-secret-file', self._secrets(root), *options]
                note_used(state, used or {})
            self.scheduler = Service(root, 'dispyscheduler.py', [
                '-i', '127.0.0.1', '-p', '0', '--state-dir', state, *named], 'scheduler', tree)
            self.services.append(self.scheduler)

    @staticmethod
    def _secrets(root):
        directory = os.path.join(root, 'users')
        os.mkdir(directory)
        for user in USERS:
            path = os.path.join(directory, user)
            with open(path, 'w') as file:
                file.write(secret_of(user))
            os.chmod(path, 0o600)
        return directory

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for service in reversed(self.services):
            service.end()
        self._directory.cleanup()


def priority_after(first):
    """Seconds until a job of high priority is done that comes after 45 jobs of 1 s on 3 CPUs;
    before these, others."""
    with Place(3) as place:
        cluster = dispy.JobCluster(sleep, nodes=place.nodes, loglevel=logging.ERROR)
        cluster.wait_nodes()
        for seconds in first:
            cluster.submit(*seconds)
        cluster.wait()
        jobs = [cluster.submit(1.0) for _ in range(45)]
        time.sleep(0.3)   # all that is sent ahead is on the node now
        began = time.monotonic()
        cluster.submit(0.0, dispy_priority=1000)()
        took = time.monotonic() - began
        assert all(job.exception is None for job in jobs)   # the arguments were right
        cluster.close(terminate=True)
    return took


def measure_priority():
    """The table of what comes first."""
    for name, first in (
            [('%d quick jobs' % count, [(0.0,)] * count) for count in (0, 1, 3, 10, 100)]
            + [('3 jobs that fail', [('nonsense',)] * 3),
               ('ascending lengths', [(0.001 * 1.5 ** number,) for number in range(15)])]):
        yield ('job of high priority, after %s' % name, '%.2f s' % priority_after(first),
               'under 1.2 s')


def program(port, quick, jobs, length, start):
    """A program of its own: prints how many of its long jobs have ended after each second since the
    start."""
    cluster = dispy.SharedJobCluster(sleep, scheduler_host='127.0.0.1', scheduler_port=port,
                                     loglevel=logging.ERROR)
    cluster.wait_nodes()
    time.sleep(max(0.0, start - time.time()))
    for _ in range(quick):
        cluster.submit(0.0)
    handles = [cluster.submit(length) for _ in range(jobs)]
    time.sleep(max(0.0, start + BOTH + ARGS.seconds - time.time()))
    ends = sorted(job.end_time - start for job in handles if job.end_time)
    print(json.dumps(ends))
    sys.stdout.flush()
    cluster.close(terminate=True)


def run_programs(rows, length=0.5, **users):
    """Rows of (quick jobs first, s after which it begins) of programs side by side; a list of ends
    for each. With options of users the first is ada's and the second is bob's."""
    with Place(2, 2, 2, scheduler=True, **users) as place:
        start = time.time() + 3.0
        programs = []
        for (quick, late), user in zip(rows, USERS):
            secret = secret_of(user) if users else os.environ['DISPY_SECRET']
            programs.append(subprocess.Popen(
                [sys.executable, HERE, '--tree', ARGS.tree, '--seconds', str(ARGS.seconds),
                 '--program', json.dumps([place.scheduler.port, quick,
                                          int(10 * ARGS.seconds / length), length,
                                          start + late])],
                stdout=subprocess.PIPE, env=dict(os.environ, DISPY_SECRET=secret)))
        return [json.loads(process.communicate()[0]) for process in programs]


def measure_shares():
    """Two programs with 400 jobs of 0.5 s each on 6 CPUs."""
    for first, second in ((0, 0), (20, 0), (0, 20), (20, 20)):
        ends = run_programs([(first, 0.0), (second, 0.0)])
        yield ('two programs, first with %d quick jobs, second with %d: jobs in %d s'
               % (first, second, ARGS.seconds),
               ' : '.join(str(sum(end > BOTH for end in found)) for found in ends), '1 : 1')


def measure_users():
    """Two users who want 6 CPUs all the time."""
    for text, options, used, promised in (
            ('shares 3 and 1', ['--share', 'ada=3'], {}, '3 : 1'),
            ('ada has used 3 CPUs in the mean of the past', ['--half-life', '1'], {'ada': 3.0},
             '1 : 3'),
            ('limit of ada 1 CPU', ['--limit', 'ada=cpus:1'], {}, '1 : 5')):
        for length in (0.5, 0.02):
            ends = run_programs([(0, 0.0), (0, 0.0)], length, options=options, used=used)
            counts = [sum(end > BOTH for end in found) for found in ends]
            yield ('two users, %s: jobs of %g s in %d s' % (text, length, ARGS.seconds),
                   '%d : %d, %.2f : 1' % (*counts, counts[0] / max(1, counts[1])), promised)


def measure_latecomer():
    """Jobs that a program gets in its first seconds beside one that has been there."""
    for quick in (0, 20):
        ends = run_programs([(quick, 0.0), (0, LATE)])
        yield ('latecomer beside a program that began with %d quick jobs: jobs in its first %d s'
               % (quick, LATE), str(sum(end <= LATE for end in ends[1])), 'about 27')


def measure_idle():
    """A short call of another cluster while one node is full and another has an idle CPU."""
    found = []
    with Place(2, 2) as place:
        for _ in range(ARGS.rounds):
            first = dispy.JobCluster(sleep, nodes=place.nodes, loglevel=logging.ERROR)
            first.wait_nodes(2)
            for _ in range(3):
                first.submit(12.0)
            time.sleep(0.2)
            began = time.monotonic()
            second = dispy.JobCluster(len, nodes=place.nodes, loglevel=logging.ERROR)
            second.submit('four')()
            found.append(time.monotonic() - began)
            first.close(terminate=True)
            second.close(terminate=True)
    yield ('short call beside 3 jobs of 12 s on 2 x 2 CPUs: longest wait of %d rounds' % len(found),
           '%.2f s (median %.2f s, %d over 1 s)'
           % (max(found), statistics.median(found), sum(wait > 1 for wait in found)), 'under 1 s')


MEASURES = {'priority': measure_priority, 'shares': measure_shares, 'latecomer': measure_latecomer,
            'idle': measure_idle, 'users': measure_users}


def main():
    print('%-86s %-42s %s' % (ARGS.tree[-86:], 'measured', 'promised'))
    for name in ARGS.only or MEASURES:
        for row in MEASURES[name]():
            print('%-86s %-42s %s' % row, flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tree', default=ROOT, metavar='DIR',
                        help='where dispy.py is (default: this tree)')
    parser.add_argument('--only', action='append', choices=list(MEASURES),
                        help='measure this alone; may be repeated')
    parser.add_argument('--seconds', type=float, default=20.0,
                        help='for which programs that share are watched (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=20,
                        help='of the idle node beside the full one')
    parser.add_argument('--program', help=argparse.SUPPRESS)
    ARGS = parser.parse_args()
    sys.path.insert(0, os.path.abspath(ARGS.tree))
    os.environ['DISPY_DISCOVERY'] = 'loopback'
    if not ARGS.program:   # that is given its user's
        os.environ['DISPY_SECRET'] = 'a secret of the benchmark alone'
    import dispy
    if ARGS.program:
        program(*json.loads(ARGS.program))
    else:
        main()
