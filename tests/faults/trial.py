#!/usr/bin/env python3
"""Three programs, three nodes and a scheduler under random faults; then everything is looked at
from outside.

    python tests/faults/trial.py --seed 1 --seconds 60            one run; a failing seed is printed
    python tests/faults/trial.py --first 1 --runs 40              many of them

Programs: one that collects by `recover_jobs` what it had when it was killed, one that carries on
with its recover_file, and a plain one of the scheduler. All they use is the public interface; what
became of jobs is read from what they and the jobs themselves write.

Afterwards: lost 0, told twice 0, begun twice 0 (none is reentrant), Terminated only if begun,
Abandoned only if begun or if the node did not come back before the limit, since several faults had
kept it away for that long, one after the other; and nothing is left within 30 s: processes, files,
rows of the scheduler, descriptors.
"""

import argparse
import collections
import contextlib
import logging
import os
import random
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)),
                os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

from ledger import Ledger, open_files  # noqa: E402
from nodes import Clock, NodeProcess, SchedulerProcess  # noqa: E402
from proxy import DOWN, UP, Proxy  # noqa: E402
from clients import PATHS  # noqa: E402

import psutil  # noqa: E402

PROGRAM = '''
import faulthandler, os, signal, sys, time
sys.path[:0] = {paths!r}
import dispy
faulthandler.register(signal.SIGUSR1, all_threads=True)
from ledger import enter

kind, name, life, directory, host, port = *sys.argv[1:5], sys.argv[5], int(sys.argv[6])
ledger, file, stop = (os.path.join(directory, what) for what in ('ledger', 'file-' + name, 'stop'))


def compute(path, job, seconds):
    enter(path, job)
    time.sleep(seconds)
    return job


def note(what, *fields):
    handle = os.open(os.path.join(directory, what), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(handle, ('\\t'.join(map(str, fields)) + '\\n').encode())
    os.close(handle)


mine = set()   # jobs of this life that have ended


def tell(job, way='called'):
    if str(job.id).startswith('%s-%s-' % (name, life)):
        mine.add(job.id)
    text = (job.exception or '').strip().splitlines()[-1:] or ['']
    note('told', life, job.id, job.status_text(), text[0], way, time.monotonic())


def main():
    options = dict(depends=[enter], job_status=tell, ping_interval=1.0, loglevel={level})
    if kind == 'plain':
        cluster = dispy.SharedJobCluster(compute, scheduler_host=host, scheduler_port=port,
                                         **options)
    else:
        if kind == 'recovers' and os.path.exists(file):
            for job in dispy.recover_jobs(file, timeout=15):
                if job.status in (dispy.DispyJob.Finished, dispy.DispyJob.Terminated,
                                  dispy.DispyJob.Abandoned, dispy.DispyJob.Cancelled):
                    tell(job, 'collected')
        cluster = dispy.JobCluster(compute, nodes=[(host, port)], recover_file=file, **options)
    for job in getattr(cluster, 'recovered', ()):
        if job.status in (dispy.DispyJob.Finished, dispy.DispyJob.Terminated,
                          dispy.DispyJob.Abandoned, dispy.DispyJob.Cancelled):
            tell(job, 'recovered')   # one that has ended after the start comes to job_status too
    with cluster:
        number = 0
        while not os.path.exists(stop):
            if number - len(mine) > 12:
                time.sleep(0.02)
                continue
            job = '%s-%s-%d' % (name, life, number)
            cluster.submit_job_id(job, ledger, job, (number * 7 % 10) * 0.03)
            note('submitted', life, job)
            number += 1
        cluster.wait()


main()
'''
KINDS = ('recovers', 'carries on', 'plain')


class Program:
    """One of the three, started again when it has ended before its time."""

    def __init__(self, trial, kind, address):
        self.trial, self.kind, self.name, self.address = trial, kind, kind.replace(' ', ''), address
        self.lives, self.due, self.process = 0, None, None
        self.begin()

    def begin(self):
        self.lives += 1
        self.due = None
        with open(os.path.join(self.trial.directory, 'log-' + self.name), 'a') as log:
            self.process = subprocess.Popen(
                [sys.executable, '-c', PROGRAM.format(paths=PATHS, level=self.trial.level),
                 self.kind, self.name,
                 str(self.lives), self.trial.directory, self.address[0], str(self.address[1])],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=dict(os.environ, **self.trial.clock.environment))

    def look(self, now):
        """Start it again, a while after its end."""
        if self.process.poll() is None or self.ended_well:
            return
        if self.due is None:
            self.due = now + self.trial.rng.uniform(0.0, 2.0)
        elif now >= self.due:
            self.begin()

    @property
    def ended_well(self):
        return self.process.poll() == 0

    def signal(self, number):
        if self.process.poll() is None:
            self.process.send_signal(number)

    def doing(self):
        """The end of what it has printed, with what its threads do."""
        self.signal(signal.SIGUSR1)
        time.sleep(1)
        with open(os.path.join(self.trial.directory, 'log-' + self.name)) as log:
            return ['%s: %s' % (self.kind, line.rstrip()) for line in log.readlines()[-60:]]


class Absence:
    """When nodes and those that have jobs there could not reach each other.

    What is on a node is lost LOST s after it was last heard, which may be a PULSE before the fault;
    an attempt to reach it that was begun during the fault takes a PULSE. So one fault that lasts
    less than LOST - 2 * PULSE explains no loss. Several do, if there are less than MEET s between
    them: for an attempt that was begun before, the wait after it, and a new one.
    """
    LOST, PULSE, MEET = 10.0, 2.0, 5.0
    TOLD = 20.0   # s after the last fault by which it is told

    def __init__(self):
        self._rows = collections.defaultdict(list)   # node -> [begin, end]

    def begin(self, nodes, lasts=float('inf')):
        """Returns how it ends, if it does not by itself."""
        now = time.monotonic()
        rows = [[now, now + lasts] for _ in nodes]
        for node, row in zip(nodes, rows):
            self._rows[node].append(row)

        def end():
            for row in rows:
                row[1] = time.monotonic()
        return end

    def explains(self, node, told):
        """Whether jobs of a node may have been lost, as they were told at a time."""
        chains = []
        for begin, end in sorted(self._rows[node]):
            if chains and begin < chains[-1][1] + self.MEET:
                chains[-1][1] = max(chains[-1][1], end)
            else:
                chains.append([begin, end])
        return any(end - begin >= self.LOST - 2 * self.PULSE and begin
                   + self.LOST - self.PULSE <= told <= end + self.TOLD for begin, end in chains)


class Disk:
    """A directory that is a small file system of its own, if this may be mounted."""

    def __init__(self, path):
        self.path, self._filler = path, os.path.join(path, 'filler')
        os.makedirs(path)
        self.is_small = (os.geteuid() == 0 and subprocess.call(
            ['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', path], stderr=subprocess.DEVNULL)
                         == 0)

    def fill(self):
        with open(self._filler, 'wb', buffering=0) as file:
            for size in (65536, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._filler)

    def close(self):
        if self.is_small:
            subprocess.call(['umount', '--lazy', self.path])


class Trial:
    """Everything of one run."""

    def __init__(self, seed, directory, debug=False):
        self.rng, self.seed, self.directory = random.Random(seed), seed, directory
        self.level = logging.DEBUG if debug else logging.INFO
        self.words = ['-d'] if debug else []    # of the commands of daemons
        self.history, self.heals = [], []     # faults; (when, call) to end them
        self.clock = Clock(directory)
        self.clock.environment['XDG_STATE_HOME'] = os.path.join(directory, 'state-of-programs')
        # Each node and the scheduler (the last) have a small disk, where one can be mounted.
        self.disks = [Disk(os.path.join(directory, 'disk-%d' % number)) for number in range(4)]
        self.faults = {name: count for name, count in self.FAULTS.items() if name != 'disk_full'
                       or self.disks[0].is_small}
        self.nodes = [self._node(number) for number in range(3)]
        self.proxies = [Proxy(node.address) for node in self.nodes]
        for proxy in self.proxies:
            proxy.accept()
        self.scheduler = self._scheduler(0)
        self.door = Proxy(('127.0.0.1', self.scheduler.port))
        self.door.accept()
        self.before = {node.port: len(open_files(node.process.pid)) for node in self.nodes}
        addresses = [self.proxies[0].address, self.proxies[1].address, self.door.address]
        self.programs = [Program(self, kind, address) for kind, address in zip(KINDS, addresses)]
        self.busy = set()                     # what has a fault now
        self.absence = Absence()

    def _node(self, number, port=0):
        prefix = os.path.join(self.disks[number].path, 'node')
        node = NodeProcess(os.path.join(self.directory, 'node-%d' % number), '--name',
                           'node-%d' % number, '--dest-path-prefix', prefix, *self.words,
                           cpus=2, port=port,
                           env=self.clock.environment)
        node.prefix = prefix
        return node

    def _scheduler(self, port):
        state = os.path.join(self.disks[3].path, 'state')
        scheduler = SchedulerProcess(os.path.join(self.directory, 'scheduler'), '-n',
                                     '127.0.0.1:%d' % self.proxies[2].address[1],
                                     '--state-dir', state, *self.words, port=port,
                                     env=self.clock.environment)
        scheduler.state = state
        return scheduler

    # -- faults --------------------------------------------------------------------------------

    # Each returns how it ends, or None; `lasts` is less than the limit of a silent link.

    def program_killed(self, which):
        self.programs[which].signal(signal.SIGKILL)

    def program_stopped(self, which):
        program = self.programs[which].process
        self.programs[which].signal(signal.SIGSTOP)
        return lambda: program.poll() is None and program.send_signal(signal.SIGCONT)

    def node_killed(self, which):
        self.nodes[which].kill()
        return lambda: self._start_node(which)

    def node_ended(self, which):
        self.nodes[which].stop()
        return lambda: self._start_node(which)

    def _start_node(self, which):
        self.nodes[which] = self._node(which, self.nodes[which].port)

    def node_stopped(self, which):
        process = self.nodes[which].process
        process.send_signal(signal.SIGSTOP)
        return lambda: process.send_signal(signal.SIGCONT)

    def scheduler_killed(self, which):
        self.scheduler.kill()
        port = self.scheduler.port

        def again():
            self.scheduler = self._scheduler(port)
        return again

    def scheduler_stopped(self, which):
        process = self.scheduler.process
        process.send_signal(signal.SIGSTOP)
        return lambda: process.send_signal(signal.SIGCONT)

    def _below(self, which, name):
        with contextlib.suppress(psutil.Error):
            runners = [child for child in psutil.Process(self.nodes[which].process.pid).children()
                       if any('runner_start' in word for word in child.cmdline())]
            found = runners if name == 'runner' else [worker for runner in runners
                                                      for worker in runner.children()]
            if found:
                return self.rng.choice(sorted(found, key=lambda process: process.pid))
        return None

    def runner_killed(self, which):
        runner = self._below(which, 'runner')
        if runner is not None:
            with contextlib.suppress(psutil.Error):
                runner.kill()

    def runner_stopped(self, which):
        runner = self._below(which, 'runner')
        if runner is not None:
            with contextlib.suppress(psutil.Error):
                runner.suspend()

            def go_on():
                with contextlib.suppress(psutil.Error):
                    runner.resume()
            return go_on

    def worker_killed(self, which):
        worker = self._below(which, 'worker')
        if worker is not None:
            with contextlib.suppress(psutil.Error):
                worker.kill()

    def _proxy(self, which):
        return (*self.proxies, self.door)[which]

    def link_cut(self, which):
        self._proxy(which).refuse()
        self._proxy(which).cut()
        return self._proxy(which).accept

    def link_forgotten(self, which):
        self._proxy(which).forget()

    def link_silent_one_way(self, which):
        self._proxy(which).swallow(self.rng.choice((UP, DOWN)))
        return self._proxy(which).swallow

    def link_held(self, which):
        self._proxy(which).hold()
        return self._proxy(which).resume

    def link_slow(self, which):
        self._proxy(which).delay = 0.05

        def fast():
            self._proxy(which).delay = 0.0
        return fast

    def no_descriptors(self, which):
        process = self.nodes[which].process
        limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE,
                         (len(open_files(process.pid)), limits[1]))

        def back():
            if process.poll() is None:
                resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)
        return back

    def disk_full(self, which):
        self.disks[which].fill()
        return self.disks[which].free

    def clock_stepped(self, which):
        self.clock.set(self.rng.choice((-7200, -60, 0, 60, 7200)))

    FAULTS = {'program_killed': 3, 'program_stopped': 3, 'node_killed': 3, 'node_ended': 3,
              'node_stopped': 3, 'scheduler_killed': 1, 'scheduler_stopped': 1, 'runner_killed': 3,
              'runner_stopped': 3, 'worker_killed': 3, 'link_cut': 4, 'link_forgotten': 4,
              'link_silent_one_way': 4, 'link_held': 4, 'link_slow': 4, 'no_descriptors': 3,
              'disk_full': 4, 'clock_stepped': 1}   # and among how many

    def strike(self, now):
        name = self.rng.choice(sorted(self.faults))
        which, lasts = self.rng.randrange(self.faults[name]), self.rng.uniform(0.2, 4.0)
        kind = name.partition('_')[0]
        victim = (kind if kind in ('program', 'link', 'clock', 'scheduler') else 'node'), which
        if name == 'disk_full' and which == 3:
            victim = 'scheduler', 0
        if victim in self.busy or (victim[0] == 'node'
                                   and self.nodes[which].process.poll() is not None):
            return
        self.history.append((round(now - self.began, 1), name, which, round(lasts, 1)))
        back = self.absence.begin(self.apart(name, which),
                                  2 * Absence.PULSE if name == 'link_forgotten' else float('inf'))
        heal = getattr(self, name)(which)
        if heal is not None:
            self.busy.add(victim)
            self.heals.append((now + lasts, victim, lambda: (heal(), back())))

    @staticmethod
    def apart(name, which):
        """The nodes that cannot be reached during a fault."""
        kind = name.partition('_')[0]
        if kind == 'scheduler':
            return [2]
        if kind == 'program':
            return [which] if name == 'program_stopped' and which < 2 else []
        if name in ('node_killed', 'node_ended', 'node_stopped', 'no_descriptors'):
            return [which]
        return [which] if kind == 'link' and name != 'link_slow' and which < 3 else []

    def heal(self, now):
        for entry in [entry for entry in self.heals if entry[0] <= now]:
            self.heals.remove(entry)
            self.busy.discard(entry[1])
            entry[2]()

    # -- a run -------------------------------------------------------------------------------------

    def run(self, seconds):
        self.began = time.monotonic()
        strike_at = self.began + 2.0
        while time.monotonic() < self.began + seconds:
            now = time.monotonic()
            self.heal(now)
            if now >= strike_at:
                self.strike(now)
                strike_at = now + self.rng.uniform(0.3, 1.5)
            for program in self.programs:
                program.look(now)
            time.sleep(0.02)
        self.heal(float('inf'))
        open(os.path.join(self.directory, 'stop'), 'w').close()
        until = time.monotonic() + 120
        while not all(program.ended_well for program in self.programs):
            for program in self.programs:
                program.look(time.monotonic())
            if time.monotonic() > until:
                last = [program for program in self.programs if not program.ended_well]
                found = ['does not end: %s' % [program.kind for program in last]]
                for program in last:
                    found += program.doing()
                return found + self.findings(False)
            time.sleep(0.05)
        return self.findings(True)

    def _rows(self, name):
        with contextlib.suppress(FileNotFoundError), \
                open(os.path.join(self.directory, name)) as file:
            return [line.rstrip('\n').split('\t') for line in file]
        return []

    def findings(self, ended):
        found = []
        submitted = [(life, job) for life, job in self._rows('submitted')]
        told, ways = collections.defaultdict(list), collections.Counter()
        for life, job, status, text, way, when in self._rows('told'):
            told[job].append((life, status, text, float(when)))
            ways[job, life, way] += 1
        begun = collections.Counter(attempt.job for attempt
                                    in Ledger(os.path.join(self.directory, 'ledger')).attempts())
        last = {program.name: str(program.lives) for program in self.programs}
        self.counts = collections.Counter(rows[-1][1] for rows in told.values())
        self.counts.update(submitted=len(submitted), begun=sum(begun.values()))
        if ended:
            lost = [job for life, job in submitted if job not in told
                    and (not job.startswith('plain') or life == last['plain'])]
            found += ['lost: %s' % job for job in lost]
        found += ['told %d times in life %s (%s): %s' % (count, life, way, job)
                  for (job, life, way), count in ways.items() if count > 1]
        for job, rows in told.items():
            if len({row[1] for row in rows}) > 1:
                found.append('told in two ways: %s %s' % (job, rows))
            if rows[-1][1] == 'cancelled':
                found.append('cancelled by nobody: %s: %s' % (job, rows[-1][2]))
            if (
                    rows[-1][1] in ('abandoned', 'terminated') and not begun[job]
                    and not self._is_explained(*rows[-1])):
                found.append('%s and never begun: %s: %s' % (rows[-1][1], job, rows[-1][2]))
        found += ['begun %d times: %s' % (count, job) for job, count in begun.items() if count > 1]
        if ended:
            # What killed programs have left may be collected for a day; here nobody wants it.
            subprocess.run([sys.executable, '-m', 'dispy', '--cancel-lost'],
                           stdout=subprocess.DEVNULL, timeout=60, cwd=self.directory,
                           env=dict(os.environ, **self.clock.environment), check=True)
            found += self.left_over()
        return found

    def _is_explained(self, life, status, text, when):
        node = re.match(r'abandoned: lost with node node-(\d) ', text)
        explained = (status == 'abandoned' and node is not None
                     and self.absence.explains(int(node.group(1)), when))
        self.counts['lost with a node that was away'] += explained
        return explained

    def left_over(self):
        until = time.monotonic() + 30
        while True:
            left = []
            for node in self.nodes:
                children = [child
                            for child in psutil.Process(node.process.pid).children(recursive=True)
                            if not any('resource_tracker' in word for word in child.cmdline())]
                files = [name for name in os.listdir(node.prefix) if name != 'p-.modules' and (
                    name.startswith(('p-', 'c-', 'k-', 'r-')) or name.endswith('.part'))]
                more = len(open_files(node.process.pid)) - self.before[node.port]
                left += ['%s: left %s' % (os.path.basename(node.directory), what)
                         for what in (children, files) if what]
                left += (['%s: %d descriptors more' % (os.path.basename(node.directory), more)]
                         if more > 6 else [])
            if not left or time.monotonic() > until:
                break
            time.sleep(0.2)
        self.scheduler.stop()
        with contextlib.closing(
                sqlite3.connect(os.path.join(self.scheduler.state, 'state.db'))) as db:
            rows = [db.execute('SELECT count(*) FROM %s' % table).fetchone()[0]
                    for table in ('comps', 'jobs')]
        return left + (['scheduler: %d computations, %d jobs are left' % tuple(rows)] if any(rows)
                       else [])

    def close(self):
        with contextlib.suppress(Exception):
            self.heal(float('inf'))
        for program in self.programs:
            program.process.kill()
            program.process.wait()
        for proxy in (*self.proxies, self.door):
            proxy.close()
        for process in (*self.nodes, self.scheduler):
            process.process.send_signal(signal.SIGCONT) if process.process.poll() is None else None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.stop()
                continue
            process.kill()
        for disk in self.disks:
            disk.close()


def trial(seed, seconds, directory, debug=False):
    """One run: (findings, faults, counts)."""
    one = Trial(seed, directory, debug)
    try:
        return one.run(seconds), one.history, one.counts
    finally:
        one.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seed', type=int)
    parser.add_argument('--first', type=int, default=1)
    parser.add_argument('--runs', type=int, default=1)
    parser.add_argument('--seconds', type=float, default=60)
    parser.add_argument('--keep', help='directory for what a run leaves')
    parser.add_argument('--debug', action='store_true', help='logs have every event')
    args = parser.parse_args()
    failed = []
    for seed in [args.seed] if args.seed is not None else range(args.first, args.first + args.runs):
        with contextlib.ExitStack() as stack:
            directory = args.keep or stack.enter_context(tempfile.TemporaryDirectory())
            os.makedirs(directory, exist_ok=True)
            findings, history, counts = trial(seed, args.seconds, directory, args.debug)
        print('seed %d: %d faults, %s: %s'
              % (seed, len(history), dict(counts),
                 'clean' if not findings else '%d FINDINGS' % len(findings)), flush=True)
        if findings:
            failed.append(seed)
            print('  ' + '\n  '.join(findings[:80]), flush=True)
            print('  faults: %s' % history, flush=True)
    if failed:
        print('failing seeds: %s' % failed)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
