#!/usr/bin/env python3
"""Jobs under faults, for so many minutes: what was submitted has to end, once, and nothing may
grow.

    python tests/faults/soak.py --minutes 10 --seed 1
    python tests/faults/soak.py --local ...      on the node that is part of the program

Prints a line a minute and, at the end, submitted, ended, lost, unexpected, duplicated, executions;
memory and descriptors of each process at start and end; exit status 1 if anything was lost or came
twice.
"""

import argparse
import array
import logging
import os
import sys
import tempfile
import time

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)),
                os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

from ledger import Ledger, enter, open_files  # noqa: E402
from nemesis import OwnNemesis, nemesis  # noqa: E402

import psutil  # noqa: E402

import dispy  # noqa: E402

WAITING_MOST = 400   # jobs that may wait: enough to keep all CPUs busy


def compute(path, number, seconds):
    enter(path, number)
    time.sleep(seconds)
    return number


def held(pid):
    """MiB and descriptors of a process."""
    return psutil.Process(pid).memory_info().rss / (1 << 20), len(open_files(pid))


def soak(directory, seconds, seed, every=3.0, jobs_most=None, nodes=4, faults=None, say=print,
         local=False):
    """Jobs and faults, with `local` on the node of this program. Returns (tally, history of faults,
    texts of jobs that failed, table of memory and descriptors)."""
    ledger, failed = Ledger(os.path.join(directory, 'ledger')), []
    ended = array.array('L')   # not a list: what is measured is dispy's memory

    def done(job):
        if job.id != 'first':
            ended.append(job.id)
        if local and 'killed by signal' in (job.exception or ''):
            return   # its own worker was killed, which is its end
        if job.exception or job.result != job.id:
            failed.append(job.exception or 'job %s returned %r' % (job.id, job.result))
    options = {'faults': faults} if faults else {}
    if local:
        nodes, trouble = 1, OwnNemesis(directory, seed, every=every, **options)
    else:
        trouble = nemesis(seed, directory, count=nodes, every=every, **options)
    with trouble:
        with dispy.JobCluster(compute, depends=[enter], nodes=trouble.addresses, reentrant=True,
                              job_status=done, pulse_interval=0.5, ping_interval=1.0,
                              loglevel=logging.CRITICAL) as cluster:
            cluster.wait_nodes(nodes, 30)
            for _ in range(2 * nodes):
                cluster.submit_job_id('first', ledger.path, 'first', 0)
            cluster.wait(30)
            start = {pid: held(pid) for pid in [os.getpid(), *trouble.pids]}
            trouble.start()
            count, until, told = 0, time.monotonic() + seconds, time.monotonic()
            while time.monotonic() < until and count != jobs_most:
                if count - len(ended) < WAITING_MOST:
                    cluster.submit_job_id(count, ledger.path, count, 0.001 * (count % 20))
                    count += 1
                else:
                    time.sleep(0.01)
                if time.monotonic() > told + 60:
                    told = time.monotonic()
                    say('%d submitted, %d ended, %d faults'
                        % (count, len(ended), len(trouble.history)))
            cluster.wait(120 if jobs_most is None else seconds)
            trouble.end()
            cluster.wait(120)
            final = {pid: held(pid) for pid in [os.getpid(), *trouble.pids]}
        rows = [('client', os.getpid(), start[os.getpid()], final[os.getpid()])]
        rows += [('node-%d' % number, pid, start.get(pid), final[pid])
                 for number, pid in enumerate(trouble.pids)]
    attempts = Ledger(os.path.join(directory, 'ledger'))
    tally = attempts.check([*range(count), 'first'], [*ended, 'first'])
    return tally, trouble.history, failed, rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=10)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--every', type=float, default=3.0, help='seconds between faults')
    parser.add_argument('--local', action='store_true', help='on the node of this program')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        tally, history, failed, rows = soak(directory, 60 * args.minutes, args.seed, args.every,
                                            local=args.local)
    print('seed %d, %d faults: %s' % (args.seed, len(history), ', '.join(
        '%d %s' % (sum(fault == name for fault, _, _ in history), name)
        for name in sorted({fault for fault, _, _ in history}))))
    print('submitted %d  ended %d  lost %d  unexpected %d  duplicated %d  executions %d  failed %d'
          % (tally.submitted - 1, tally.ended - 1, len(tally.lost), len(tally.unexpected),
             len(tally.duplicated), tally.executions, len(failed)))
    for text in failed[:5]:
        print('  ' + text.strip())
    print('%-8s %8s %18s %18s' % ('process', 'PID', 'MiB, start -> end', 'descriptors'))
    for name, pid, before, after in rows:
        print('%-8s %8d %18s %18s'
              % (name, pid, '%s -> %.1f' % ('%.1f' % before[0] if before else 'new', after[0]),
                 '%s -> %d' % (before[1] if before else 'new', after[1])))
    return 0 if tally.clean and not failed else 1


if __name__ == '__main__':
    sys.exit(main())
