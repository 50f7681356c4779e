#!/usr/bin/env python3
"""What a dispyscheduler can bear, and what a job costs in it: each line of the table is a real
dispyscheduler process over loopback, but for those of `Schedule`, which is called in this process.

    python tests/bench/scheduler.py [--quick] [--only PART ...]

Parts: queued (a program queues a million jobs), crowd (200 nodes and 10 programs, made up by one
process that speaks the protocol for all of them), real (one node of 2 CPUs, beside JobCluster),
decide (`Schedule` alone), durable (the disk).
"""

import argparse
import contextlib
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
os.environ['DISPY_DISCOVERY'] = 'loopback'
os.environ['DISPY_SECRET'] = 'a secret of the benchmark alone'

import psutil  # noqa: E402

import dispy  # noqa: E402
import dispynode  # noqa: E402
import dispyscheduler  # noqa: E402
from dispynode import (   # noqa: E402
                       Ack, Bye, Compute, ClientHello, Jobs, Link, Loop, Outcome, Ready, ReturnJobs,
                       Results, JobsReturned, Role, NodeHello, derive_key, dial)

SPAWN = multiprocessing.get_context('spawn')


def empty(x):
    return x


def rest(seconds):
    import time
    time.sleep(seconds)


class Daemon:
    """A dispyscheduler or dispynode on loopback; `port` when it listens."""

    def __init__(self, program, *options, before=''):
        self._directory = tempfile.TemporaryDirectory()
        path = self.root = self._directory.name
        own = (('--state-dir', os.path.join(path, 'state')) if program == 'dispyscheduler'
               else ('--dest-path-prefix', os.path.join(path, 'node')))
        code = 'import sys, {0}\n{1}\nsys.exit({0}.main())'.format(program, before)
        with open(os.path.join(path, 'log'), 'w') as log:
            self._process = subprocess.Popen([sys.executable, '-c', code, '-i', '127.0.0.1', '-p',
                                              '0', *own, *options], cwd=ROOT,
                                             stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.usage = psutil.Process(self._process.pid)
        self.port = self._wait_for_port()

    def _wait_for_port(self):
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with open(os.path.join(self.root, 'log')) as file:
                for line in file:
                    if ' at port ' in line:
                        return int(line.split(' at port ')[1].split()[0].rstrip(',:'))
            time.sleep(0.02)
        raise RuntimeError('it did not start: %s' % open(os.path.join(self.root, 'log')).read())

    def seconds(self):
        """CPU time until now."""
        return sum(self.usage.cpu_times()[:2])

    def settled(self):
        """Bytes of memory, when it has come to rest."""
        last = -1.0
        while self.seconds() - last > 0.02:
            last = self.seconds()
            time.sleep(0.5)
        return self.usage.memory_info().rss

    def disk(self):
        """Bytes of the files that hold its state."""
        directory = os.path.join(self.root, 'state')
        return sum(os.path.getsize(os.path.join(directory, name))
                   for name in os.listdir(directory) if name.startswith('state.db'))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._process.terminate()
        self._process.wait(60)
        self._directory.cleanup()


def in_another(function, *args):
    """Run it in a process of its own; a pair of that process and the pipe that is its first
    argument."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=function, args=(theirs, *args), daemon=True)
    process.start()
    return process, ours


# --------------------------------------------------------------------------------------------------
# A million jobs that wait
# --------------------------------------------------------------------------------------------------

def queue_many(pipe, port, seconds, count):
    """A program that submits as fast as it can."""
    cluster = dispy.SharedJobCluster(rest, scheduler_port=port, loglevel=logging.ERROR)
    cluster.cancel(cluster.submit(0.0))
    pipe.send('begun')
    pipe.recv()
    for _ in range(count):
        cluster.submit(seconds)
    cluster.status()   # the scheduler answers when it has taken them
    pipe.send('submitted')
    pipe.recv()
    os._exit(0)   # with nothing said: to end a million jobs is not what is measured here


def measure_queued(quick):
    """One program's jobs wait, and the first of another comes."""
    count, seconds = (50000 if quick else 1000000), 0.2
    with Daemon('dispynode', '-c', '2') as node, Daemon('dispyscheduler', '-n',
                                                        '127.0.0.1:%d' % node.port) as scheduler:
        program, pipe = in_another(queue_many, scheduler.port, seconds, count)
        pipe.recv()
        before, start = scheduler.settled(), time.perf_counter()
        pipe.send('go')
        pipe.recv()
        submitted = time.perf_counter()
        after = scheduler.settled()
        yield 'jobs queued', '%d' % count
        yield '... a second', '%.0f' % (count / (submitted - start))
        yield 'bytes of memory a job', '%.0f' % ((after - before) / count)
        yield 'bytes on disk a job', '%.0f' % (scheduler.disk() / count)
        waits = []
        with contextlib.closing(dispy.SharedJobCluster(rest, scheduler_port=scheduler.port,
                                                       loglevel=logging.ERROR)) as cluster:
            for _ in range(5):
                begun = time.time()
                job = cluster.submit(0.0)
                job()
                waits.append(job.start_time - begun)
        yield ('s until the first job of another starts, jobs of %.1f s run' % seconds,
               '%.3f, most %.3f' % (statistics.median(waits), max(waits)))
        program.kill()
        program.join()


# --------------------------------------------------------------------------------------------------
# Many nodes and many programs
# --------------------------------------------------------------------------------------------------

class Crowd(Loop):
    """Nodes that answer each job at once, and programs; one thread."""
    FACTS = {'python': tuple(sys.version_info[:3]), 'dispy': dispy.__version__, 'cloudpickle': ''}
    SPEC = {'name': 'crowd', 'kind': 'function', 'code': b'', 'files': [], 'cleanup': False,
            'dest_path': '', 'max_jobs': 0, 'live': False, 'logs': 0,
            'python': FACTS['python'], 'support': {}, 'program': '', 'cpus': 0, 'setup_args': b'',
            'modules': [], 'portable': False, 'sys_path': [], 'argv': [],
            'shared': {'nodes': None, 'reentrant': False, 'exclusive': False, 'cloudpickle': '',
                       'recovers': False, 'collected': False, 'process': dispy.own_process()}}

    def __init__(self, port, nodes, programs):
        super().__init__()
        self.ready = self.results = 0
        self.ended_by = ''
        self.set_up = {}     # computations of nodes' links -> how many nodes have them
        self.programs = [self._dial(port, Role.CLIENT) for _ in range(programs)]
        for number, link in enumerate(self.programs):
            self.send(link, ClientHello('program %d' % number, 5.0))
            self.send(link, Compute('program%d' % number, self.SPEC))
        self.nodes = [self._dial(port, Role.NODE) for _ in range(nodes)]
        while sum(self.set_up.values()) < nodes * programs or self.ready < programs:
            self.wait(0.1)

    def _dial(self, port, role):
        arrival = dial('127.0.0.1', port, derive_key(os.environ['DISPY_SECRET'].encode()), role,
                       Role.SCHEDULER, os.urandom(16))
        link = Link(arrival.sock, arrival.session, arrival.address, self.now)
        link.role = role
        self.attach(link)
        return link

    def on_channel(self, channel):
        for message in channel.messages(self.now):
            kind, at = type(message), time.time()
            if kind is Jobs:
                self.send(channel, Results(
                    message.comp, [(serial, int(Outcome.RETURNED), at, at + 1e-5, payload, b'', b'')
                                   for serial, payload, _ in message.rows]))
            elif kind is Results:
                self.results += len(message.rows)
                self.send(channel, Ack(message.comp, [row[0] for row in message.rows]))
            elif kind is ClientHello:
                self.send(channel, NodeHello('node %d' % channel.number, 8, self.FACTS))
            elif kind is Compute:
                self.set_up[message.comp] = self.set_up.get(message.comp, 0) + 1
                self.send(channel, Ready(message.comp, []))
            elif kind is ReturnJobs:
                self.send(channel, JobsReturned(message.comp, []))
            elif kind is Ready:
                self.ready += 1
            elif kind is Bye:
                self.ended_by = message.text

    def on_broken(self, channel, text):
        self.ended_by = '%s: %s' % (channel.address, text)   # an exception would only end that link

    def wait(self, seconds):
        """A turn; the process ends with an error when a link has ended."""
        self.turn(seconds)
        if self.ended_by:
            sys.exit('a link to the scheduler has ended: %s' % self.ended_by)

    def run_jobs(self, count, first):
        """So many of each program."""
        payload, wanted = (b''.join(dispynode.pieces_of(dispynode.dumps(((1,), {}))[0])),
                           self.results + count * len(self.programs))
        for number, link in enumerate(self.programs):
            for begin in range(first, first + count, 1000):
                self.send(link, Jobs('program%d' % number,
                                     [(serial << 16, payload, None) for serial
                                      in range(begin, min(begin + 1000, first + count))]))
        while self.results < wanted:
            self.wait(1.0)


def be_crowd(pipe, port, nodes, programs):
    """The process that all nodes and programs are."""
    crowd, first = Crowd(port, nodes, programs), 1
    pipe.send('begun')
    while True:
        while not pipe.poll():
            crowd.wait(0.05)
        count = pipe.recv()
        if not count:
            break
        start = time.perf_counter()
        crowd.run_jobs(count, first)
        first += count
        pipe.send(time.perf_counter() - start)


def measure_crowd(quick):
    """The scheduler's own speed."""
    nodes, programs, count, rounds = 200, 10, 1000 if quick else 10000, 2 if quick else 10
    with Daemon('dispyscheduler', '-n', '127.0.0.1:9') as scheduler:
        process, pipe = in_another(be_crowd, scheduler.port, nodes, programs)
        start = time.perf_counter()
        pipe.recv()
        yield ('%d nodes of 8 CPUs, %d programs: s until all is set up' % (nodes, programs),
               '%.1f' % (time.perf_counter() - start))
        rates, costs, memory, disk = [], [], [], []
        for _ in range(rounds):
            cpu = scheduler.seconds()
            pipe.send(count)
            rates.append(count * programs / pipe.recv())
            costs.append((scheduler.seconds() - cpu) / count / programs * 1e6)
            memory.append(scheduler.settled())
            disk.append(scheduler.disk())
        yield 'empty jobs a second', '%.0f' % statistics.median(rates)
        yield 'us of CPU a job in the scheduler', '%.1f' % statistics.median(costs)
        yield ('MB of memory after %d jobs, after %d'
               % (programs * count, programs * count * rounds),
               '%.1f, %.1f' % (memory[0] / 1e6, memory[-1] / 1e6))
        yield 'MB on disk, the same', '%.1f, %.1f' % (disk[0] / 1e6, disk[-1] / 1e6)
        pipe.send(0)
        process.join()


# --------------------------------------------------------------------------------------------------
# Real nodes and programs
# --------------------------------------------------------------------------------------------------

def gather(cluster, count):
    """Jobs a second."""
    start = time.perf_counter()
    for job in [cluster.submit(number) for number in range(count)]:
        job()
    return count / (time.perf_counter() - start)


def round_trip(cluster, count):
    """Median in ms."""
    times = []
    for number in range(count):
        start = time.perf_counter()
        cluster.submit(number)()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def measure_real(quick):
    """One program, one node of 2 CPUs: with the scheduler, and without."""
    count, trips = (2000, 50) if quick else (20000, 500)
    with Daemon('dispynode', '-c', '2') as node:
        with contextlib.closing(dispy.JobCluster(empty, nodes=[('127.0.0.1', node.port)],
                                                 loglevel=logging.ERROR)) as cluster:
            gather(cluster, 200)
            alone = gather(cluster, count), round_trip(cluster, trips)
        figures = {}
        for sync in ('FULL', 'NORMAL'):
            with Daemon('dispyscheduler', '-n', '127.0.0.1:%d' % node.port,
                        before='dispyscheduler.State.SYNC = %r' % sync) as scheduler:
                with contextlib.closing(dispy.SharedJobCluster(empty, scheduler_port=scheduler.port,
                                                               loglevel=logging.ERROR)) as cluster:
                    gather(cluster, 200)
                    figures[sync] = gather(cluster, count), round_trip(cluster, trips)
    for name, (rate, trip) in (('JobCluster', alone), ('SharedJobCluster', figures['FULL']),
                               ('... synchronous=NORMAL', figures['NORMAL'])):
        yield '%s: empty jobs a second, round trip p50 ms' % name, '%.0f, %.3f' % (rate, trip)


# --------------------------------------------------------------------------------------------------
# Schedule alone
# --------------------------------------------------------------------------------------------------

def decide(nodes, batch, events):
    """us an event, `handle` and its part of `flush`, when each turn has `batch` results of full
    nodes."""
    schedule = dispy.Schedule()
    schedule.handle(dispy.Opened('c', 'program', False), 0.0)
    for key in range(nodes):
        schedule.handle(dispy.NodeReady(key, 'c', 8, []), 0.0)
    running, spent, count = [], 0.0, 0

    def act(actions):
        for action in actions:
            if type(action) is dispy.SendJobs:
                running.extend((action.node, work.serial) for work in action.works)
    schedule.handle(
        dispy.Submitted([dispy.ScheduledJob('c', b'') for _ in range(8 * nodes + events)]), 0.0)
    act(schedule.flush(0.0))
    while count < events:
        ended = (
            [dispy.NodeResults(key, 'c', [(serial, int(Outcome.RETURNED), 0.0, 1.0, b'', b'', b'')])
             for key, serial in running[count:count + batch]])
        count += len(ended)
        start = time.thread_time()   # other processes do not count
        for event in ended:
            schedule.handle(event, 0.0)
        actions = schedule.flush(0.0)
        spent += time.thread_time() - start
        act(actions)
    return spent / count * 1e6


def measure_decide(quick):
    """Whether decisions get slower with more nodes."""
    for nodes in (10, 100, 1000, 10000):
        yield ('Schedule, %d nodes: us an event, alone in its turn and with up to 99 others'
               % nodes, '%.1f, %.1f'
               % tuple(min(decide(nodes, batch, 2000 if quick else 20000) for _ in range(3))
                       for batch in (1, 100)))


# --------------------------------------------------------------------------------------------------
# The disk
# --------------------------------------------------------------------------------------------------

def measure_durable(quick):
    """What a transaction costs: a job is submitted and removed in it, or a thousand."""
    for sync in ('FULL', 'NORMAL'):
        for batch, turns in ((1, 50 if quick else 1000), (1000, 5 if quick else 50)):
            with tempfile.TemporaryDirectory() as directory:
                state = type('Other', (dispyscheduler.State,), {'SYNC': sync})(directory)
                state._comps['c'] = 1
                start, number = time.perf_counter(), 0
                for _ in range(turns):
                    for number in range(number + 1, number + batch + 1):
                        state.submitted(dispyscheduler.ClientJob('c', None, None, number << 16,
                                                                 number), b'x' * 50)
                    state.commit()
                spent = time.perf_counter() - start
                state.close()
            yield ('synchronous=%s, %d new jobs each: transactions a second, us a job'
                   % (sync, batch), '%.0f, %.1f' % (turns / spent, spent / turns / batch * 1e6))


PARTS = {'queued': measure_queued, 'crowd': measure_crowd, 'real': measure_real,
         'decide': measure_decide, 'durable': measure_durable}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='fewer jobs, to see that it runs')
    parser.add_argument('--only', nargs='+', choices=PARTS, default=list(PARTS), metavar='PART',
                        help='of: %s' % ' '.join(PARTS))
    args = parser.parse_args()
    for part in args.only:
        for name, value in PARTS[part](args.quick):
            print('%-80s %s' % (name, value), flush=True)


if __name__ == '__main__':
    main()
