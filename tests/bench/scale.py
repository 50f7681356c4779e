#!/usr/bin/env python3
"""One scheduler with many nodes, programs and jobs, and a kill of the scheduler in the middle.

    python tests/bench/scale.py [--nodes N] [--programs N] [--jobs N] [--length S]

Nodes are real daemons (`dispynode.Daemon`), each a process of its own with a connection to the
scheduler, forked from one parent so that they share memory. Their workers alone are replaced: a job
is a timer in the daemon, since 1,000 nodes with a runner and a worker for each of 10 programs would
be 20,000 processes more. Programs are processes with a SharedJobCluster, and all use all nodes.
Nodes and programs have a lower priority (`nice`) than the scheduler, which has a CPU of its own
where nodes are other machines.
"""

import argparse
import collections
import contextlib
import heapq
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.abspath(__file__)
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(HERE)))
SECRET = 'c0ffee42' * 8      # such as dispy makes: none is stretched
GROUP = 250          # nodes that are forked from one parent
BEHIND = 10          # by which the priority of nodes and programs is lower
PATIENCE = 420.0     # s after which the measurement is given up


# -- nodes -----------------------------------------------------------------------------------------

def make_daemon(port, number, root, length):
    """A daemon whose jobs are timers."""
    import dispynode

    class Timers(dispynode.WorkerPipes):
        """What is done with workers."""

        def start_worker(self, action):
            """There is none."""

        def feed(self, action):
            now = self._host.now
            for attempt in action.attempts:
                # One after the other
                began = max(now, self._busy_until.get(action.worker, 0.0))
                self._busy_until[action.worker] = began + length
                heapq.heappush(self.ends, (began + length, attempt.serial, action.worker, began))
            self._look_soon()

        def __init__(self, host, look_soon):
            super().__init__(host, {}.__getitem__, look_soon)
            self.ends = []
            self._busy_until = {}

        def take_back(self, action):
            """All that a worker has not begun."""
            now = self._host.now
            back = [serial for _, serial, worker, began in self.ends
                    if worker == action.worker and began > now]
            self.ends = [end for end in self.ends if end[1] not in back]
            heapq.heapify(self.ends)
            self._busy_until[action.worker] = max(
                (end[0] for end in self.ends if end[2] == action.worker), default=0.0)
            self._host.post(dispynode.WorkerReturnedJobs(action.worker, back))

    class Processes(dispynode.ProcessHost):
        """What is done with runners."""

        def __init__(self, host, files, options):
            super().__init__(host, files, options)
            self.workers = Timers(host, self._look)

        def _look(self):
            self.look_at = self.workers.ends[0][0] if self.workers.ends else math.inf

        def start_runner(self, action):
            self._host.post(dispynode.RunnerUp(action.comp))

        def stop_runner(self, action, text=''):
            self._files.discard(action.comp)
            self._host.post(dispynode.RunnerGone(action.comp, text))

        def see_to_runners(self):
            now = self._host.now
            wall = time.time()
            ended = {}
            while self.workers.ends and self.workers.ends[0][0] <= now:
                _, serial, worker, _ = heapq.heappop(self.workers.ends)
                ended.setdefault(worker, []).append(
                    (serial, int(dispynode.Outcome.RETURNED), wall - length, wall,
                     pickle.dumps(serial), b'', b''))
            for worker, rows in ended.items():
                self._host.post(dispynode.WorkerResults(worker, rows))
            self._look()

    def host(loop, options):
        return dispynode.NodeHost(loop, options, processes=Processes)

    options = dispynode.Options(
        1, hosts=('127.0.0.1',), port=0, name='node%d' % number, secret=SECRET.encode(),
        prefix=os.path.join(root, 'node%d' % number), schedulers=(('127.0.0.1', port),))
    return dispynode.Daemon(options, host)


def run_nodes(first, count, port, root, length):
    """Fork the nodes of one group, and end them when this process is told to end."""
    import logging

    import dispynode   # once, for all of them
    os.nice(BEHIND)
    logging.getLogger('dispynode').setLevel(logging.CRITICAL)
    ending = {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    children = []
    for number in range(first, first + count):
        pid = os.fork()
        if not pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ending)
            daemon = make_daemon(port, number, root, length)
            daemon.start()
            try:
                dispynode.run_until_ended(daemon)
            finally:
                os._exit(0)
        children.append(pid)
    signal.sigwait(ending)
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    for pid in children:
        os.waitpid(pid, 0)


# -- programs --------------------------------------------------------------------------------------

def job(number):
    """What the nodes are to run."""
    return number


def run_program(port, jobs):
    """Submit jobs, and print a line of JSON now and then, the last with what came out."""
    import logging

    import dispy
    os.nice(BEHIND)
    ended = []

    def note(status, node, job):
        if status == dispy.DispyJob.Finished:
            ended.append(time.time())

    cluster = dispy.SharedJobCluster(job, scheduler_host='127.0.0.1', scheduler_port=port,
                                     loglevel=logging.CRITICAL, cluster_status=note)
    began = time.time()
    handles = [cluster.submit(number) for number in range(jobs)]
    submitted = time.time()

    def say(**more):
        print(json.dumps(dict(more, done=len(ended))), flush=True)
    while not cluster.wait(1.0):
        say()
    states = {}
    reasons = {}
    for handle in handles:
        name = dispy.JobState(handle.status).name
        states[name] = states.get(name, 0) + 1
        if handle.exception:
            # Names of nodes and numbers of jobs differ
            reason = re.sub(r'\d+', 'N', str(handle.exception).splitlines()[-1])
            reasons[reason] = reasons.get(reason, 0) + 1
    say(began=began, submitted=submitted, first=min(ended), last=max(ended), states=states,
        reasons=reasons)
    cluster.close()


# -- the measurement -------------------------------------------------------------------------------

class Scheduler:
    """A dispyscheduler."""

    def __init__(self, root, port=0):
        self.log = os.path.join(root, 'scheduler.log')
        begin = os.path.getsize(self.log) if os.path.exists(self.log) else 0
        with open(self.log, 'ab') as log:
            self.process = subprocess.Popen(
                [sys.executable, os.path.join(ROOT, 'dispyscheduler.py'), '--daemon', '-i',
                 '127.0.0.1', '-p', str(port), '--state-dir', os.path.join(root, 'state'), '-n',
                 '127.0.0.1:9'], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.port = 0
        while not self.port:
            with open(self.log) as log:
                log.seek(begin)
                found = re.search(r'serves at port (\d+)', log.read())
            self.port = int(found.group(1)) if found else 0
            assert self.process.poll() is None
            time.sleep(0.05)

    def ask(self, *question):
        """The answer of the scheduler, or None while it has none."""
        import dispy
        import dispy_httpd
        access = dispy.ConnectionSettings(SECRET.encode(), None, None, None, dispy.PULSE,
                                          dispy.REDIAL_MOST)
        link = dispy_httpd.SchedulerLink('127.0.0.1', self.port, access)
        try:
            why = link.why_not()
            if not why:
                return link.ask(*question)[1]
        except Exception as exc:   # it is busy, or starts
            why = exc
        finally:
            link.close()
        print('  (no answer: %s)' % why, file=sys.stderr)
        return None

    def memory(self):
        """MB."""
        import psutil
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def cpu(self):
        """CPU seconds that it has used."""
        import psutil
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system


class Program:
    """A process that runs `run_program`, and what it has said last."""

    def __init__(self, port, jobs):
        self.said = {'done': 0}
        self.process = subprocess.Popen(
            [sys.executable, HERE, '--run-program', json.dumps([port, jobs])],
            stdout=subprocess.PIPE)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self):
        for line in self.process.stdout:
            self.said = json.loads(line)


class Measurement:
    """What is measured, and the processes for it."""

    def __init__(self, root, args):
        self.root, self.args = root, args
        self.rows = []
        self.scheduler = Scheduler(root)
        self.most_memory = 0.0
        self.loads = []
        self.cpu_seconds = 0.0
        self._until = time.monotonic() + PATIENCE
        self.groups = [subprocess.Popen(
            [sys.executable, HERE, '--run-nodes', json.dumps(
                [first, min(GROUP, args.nodes - first), self.scheduler.port, root, args.length])])
                       for first in range(0, args.nodes, GROUP)]
        self.programs = []

    def row(self, text, value):
        self.rows.append((text, value))
        print('%-72s %s' % (text, value), flush=True)

    def done(self):
        return sum(program.said['done'] for program in self.programs)

    def wait(self, condition):
        """Wait, and look at the scheduler meanwhile."""
        looked = 0.0
        while not condition():
            if time.monotonic() > self._until:
                raise TimeoutError('given up after %d s' % PATIENCE)
            if any(program.process.poll() for program in self.programs):
                raise RuntimeError('a program has failed')
            if time.monotonic() - looked > 5.0:
                self.most_memory = max(self.most_memory, self.scheduler.memory())
                looked = time.monotonic()
            time.sleep(0.1)

    def connected(self):
        """Whether all nodes are connected to the scheduler."""
        load = self.scheduler.ask('load')
        return load is not None and load['links'] > self.args.nodes

    def look(self, name):
        """The turns of the scheduler until now."""
        load = self.scheduler.ask('load')
        self.cpu_seconds += self.scheduler.cpu()
        if load is not None:
            self.row('turns %s: number, mean, longest of the last minute' % name,
                     '%d, %.1f ms, %.0f ms' % (load['turns'], 1e3 * load['seconds'] / load['turns'],
                                               1e3 * load['longest']))

    def run(self):
        args = self.args
        began = time.monotonic()
        self.wait(self.connected)
        self.row('%d nodes are connected after their start' % args.nodes,
                 '%.1f s' % (time.monotonic() - began))
        self.row('memory of the scheduler with these nodes', '%.0f MB' % self.scheduler.memory())
        each = args.jobs // args.programs
        start = time.time()
        self.programs = [Program(self.scheduler.port, each) for _ in range(args.programs)]
        half = args.jobs // 2
        self.wait(lambda: self.done() >= half)
        self.row('half of %d jobs of %d programs have ended after' % (args.jobs, args.programs),
                 '%.1f s' % (time.time() - start))
        self.look('until then')
        self.row('memory of the scheduler then', '%.0f MB' % self.scheduler.memory())
        self.restart()
        self.wait(lambda: all('states' in program.said for program in self.programs))
        self.look('after the new start')
        said = [program.said for program in self.programs]
        for program in self.programs:
            program.process.wait()
        end = max(words['last'] for words in said)
        self.row('a program submits its %d jobs in, at most' % each,
                 '%.1f s' % max(words['submitted'] - words['began'] for words in said))
        self.row('first result of a program after its first submit: first, last program',
                 '%.1f s, %.1f s' % (min(words['first'] - words['began'] for words in said),
                                     max(words['first'] - words['began'] for words in said)))
        self.row('all jobs have ended after', '%.1f s' % (end - start))
        self.row('jobs a second, with the new start', '%.0f' % (args.jobs / (end - start)))
        self.row('CPU of the scheduler for a job', '%.0f us' % (1e6 * self.cpu_seconds / args.jobs))
        self.row('most memory of the scheduler', '%.0f MB' % self.most_memory)
        states = collections.Counter()
        reasons = collections.Counter()
        for words in said:
            states.update(words['states'])
            reasons.update(words['reasons'])
        self.row('what became of the jobs', ', '.join('%d %s' % (count, name)
                                                      for name, count in sorted(states.items())))
        for reason, count in reasons.most_common():
            self.row('jobs with the exception "%s"' % reason, count)

    def restart(self):
        """Kill the scheduler and start it again."""
        self.scheduler.process.kill()
        self.scheduler.process.wait()
        began = time.monotonic()
        before = self.done()
        self.scheduler = Scheduler(self.root, self.scheduler.port)
        self.row('killed and started again: it listens after',
                 '%.1f s' % (time.monotonic() - began))
        # Results that were on their way come in any case
        self.wait(lambda: self.done() > before + self.args.nodes)
        self.row('%d jobs more have ended after' % self.args.nodes,
                 '%.1f s' % (time.monotonic() - began))
        self.wait(self.connected)
        self.row('all nodes are connected again after', '%.1f s' % (time.monotonic() - began))

    def close(self):
        for program in self.programs:
            if program.process.poll() is None:
                program.process.kill()
        for group in self.groups:
            group.send_signal(signal.SIGTERM)
        for group in self.groups:
            group.wait()
        self.scheduler.process.terminate()
        self.scheduler.process.wait()


def main():
    import platform
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit('ended by a signal'))
    with tempfile.TemporaryDirectory() as root:
        measurement = Measurement(root, ARGS)
        with contextlib.closing(measurement):
            measurement.row('machine', '%s, %d CPUs, Python %s' % (
                platform.platform(), os.cpu_count(), platform.python_version()))
            measurement.run()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--nodes', type=int, default=1000)
    parser.add_argument('--programs', type=int, default=10)
    parser.add_argument('--jobs', type=int, default=200000)
    parser.add_argument('--length', type=float, default=0.5, help='s of a job')
    parser.add_argument('--run-nodes', help=argparse.SUPPRESS)
    parser.add_argument('--run-program', help=argparse.SUPPRESS)
    ARGS = parser.parse_args()
    sys.path.insert(0, ROOT)
    os.environ['DISPY_DISCOVERY'] = 'loopback'
    os.environ['DISPY_SECRET'] = SECRET
    if ARGS.run_nodes:
        run_nodes(*json.loads(ARGS.run_nodes))
    elif ARGS.run_program:
        run_program(*json.loads(ARGS.run_program))
    else:
        main()
