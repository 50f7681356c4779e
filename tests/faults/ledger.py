"""The ledger of a run: who was started where, what came of it, and whether anything is left.

    lost = submitted - ended
    unexpected = ended - submitted
    duplicated = ended more than once
"""

import collections
import contextlib
import os
import socket
from typing import NamedTuple

import psutil


def enter(path, job):
    """One attempt of a job: a line with job, host and process ID, by one write, so that lines never
    mix. Give it to jobs by `depends=[enter]`, or call it in a computation that refers to it."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, ('%s\t%s\t%d\n' % (job, socket.gethostname(), os.getpid())).encode())
    finally:
        os.close(fd)


class Attempt(NamedTuple):
    job: str
    host: str
    pid: int


class Tally(NamedTuple):
    """Jobs by their names as text, sorted; `again`: jobs that were started more than once;
    executions: attempts of all jobs."""
    submitted: int
    ended: int
    lost: list
    unexpected: list
    duplicated: list
    again: list
    executions: int

    @property
    def clean(self):
        return not (self.lost or self.unexpected or self.duplicated)


class Ledger:
    """The file of attempts at `path`."""

    def __init__(self, path):
        self.path = str(path)

    def attempts(self):
        """All there were, in order."""
        try:
            with open(self.path) as file:
                rows = [line.rstrip('\n').split('\t') for line in file]
        except FileNotFoundError:
            return []
        return [Attempt(job, host, int(pid)) for job, host, pid in rows]

    def check(self, submitted, ended):
        """A Tally of the jobs (numbers or text) that were submitted and those that have ended, once
        for every time they did."""
        ended = collections.Counter(map(str, ended))
        submitted = set(map(str, submitted))
        started = collections.Counter(attempt.job for attempt in self.attempts())
        return Tally(len(submitted), sum(ended.values()), sorted(submitted - set(ended)),
                     sorted((set(ended) | set(started)) - submitted),
                     sorted(job for job in ended if ended[job] > 1),
                     sorted(job for job in started if started[job] > 1), sum(started.values()))


def open_files(pid):
    """What the descriptors of a process lead to, sorted; files and connections alone where /proc is
    missing."""
    if not os.path.isdir('/proc/self/fd'):
        process = psutil.Process(pid)
        return sorted([file.path for file in process.open_files()]
                      + [str(found) for found in process.net_connections()])
    found = []
    for number in os.listdir('/proc/%d/fd' % pid):
        with contextlib.suppress(FileNotFoundError):   # closed meanwhile
            found.append(os.readlink('/proc/%d/fd/%s' % (pid, number)))
    return sorted(found)


@contextlib.contextmanager
def nothing_left(*pids, seconds=20.0):
    """At its end these processes have, within so many seconds, no more children and descriptors
    than at its beginning. Begin when a node has served a client: it has a helper of
    multiprocessing's and a pipe to it from then on."""
    from conftest import eventually   # with pytest, which jobs that call `enter` need not import

    def held(pid):
        return len(psutil.Process(pid).children(recursive=True)), len(open_files(pid))
    before = {pid: held(pid) for pid in pids}
    yield
    for pid in pids:
        try:
            eventually(lambda: all(now <= then for now, then in zip(held(pid), before[pid])),
                       seconds)
        except AssertionError:
            raise AssertionError('process %d had %d children and %d descriptors; left are %s and %s'
                                 % (pid, *before[pid], psutil.Process(pid).children(recursive=True),
                                    open_files(pid))) from None


def one_more_each(cluster, *args, timeout=60):
    """One more job for each CPU of the cluster's nodes succeeds; returns the jobs."""
    cpus = sum(node.cpus for node in cluster.status().nodes if node.state == 'ready')
    jobs = [cluster.submit(*args) for _ in range(cpus)]
    assert jobs, 'no node is ready: %s' % cluster.status().nodes
    assert cluster.wait(timeout), 'the last jobs did not end: %s' % [job.status for job in jobs]
    failed = [(job, job.exception) for job in jobs if job.exception]
    assert not failed, failed
    return jobs
