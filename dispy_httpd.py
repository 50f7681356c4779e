#!/usr/bin/env python3
"""See and manage clusters in a browser.

    import dispy, dispy_httpd
    cluster = dispy.JobCluster(compute)
    server = dispy_httpd.DispyHTTPServer(cluster)   # prints a link with a token, to be opened
    ...
    server.shutdown()

    python -m dispy_httpd --scheduler HOST[:PORT]   # a dispyscheduler: all programs, all nodes
    dispyscheduler --httpd [PORT]                   # the same, in its process
    python -m dispy_httpd --nodes HOST...           # nodes, which stay with their client

    program                                                          browsers
    +-----------------------------------------------------------+       +------------------------+
    | driver threads <- ask - snapshot thread -> Snapshot       |       | page, script, style    |
    | (dispy)                 at most 4 a second  |  condition  |       |   of this file         |
    |                         accept thread       v             | <---> | fetch: event stream,   |
    |                         a thread a request: view of it,   |       |   or a poll where that |
    |                                             JSON          |       |   fails                |
    +-----------------------------------------------------------+       +------------------------+

One thread takes snapshots in the driver's turn, whatever the number of browsers. A snapshot costs
O(nodes), not O(jobs), and slow ones are taken less often. Requests sort it and select a page.
Failures of jobs, their output, and the last 10,000 jobs that have ended are noted. A list of jobs
is made at most once a second and only while a browser shows it; the timeline is extended. A
scheduler is asked by `Call`, for 100 to 500 rows at once. A monitor authenticates with the secret
of the programs, as they do, and sees and manages everything that belongs to them.

Safety. The server listens on 127.0.0.1 unless told otherwise. Page, script, style and icon hold no
data; all else needs the token: `Authorization: Bearer TOKEN`. The token stands in the fragment of
the link, which browsers do not send. There are no cookies. Host, Origin and Sec-Fetch-Site are
checked. Changes are made by POST of application/json alone. The page runs no script but its own and
shows what comes as text. `certfile` (and `keyfile`) give TLS; without it, what is sent over a
network can be read there, the token too.

GET is answered in JSON; with `Accept: text/event-stream` as a stream: `data:` with the same JSON
whenever it has changed (there, `plot` only when it has), `event: end` when the server stops. Tables
take ?sort=FIELD&desc=0|1&page=N (from 1)&per=N (1 to 200) and are objects with

    time               s since the epoch
    rows, total        the rows of this page; how many there are in all
    page, pages, per, sort, desc
    manages            bool: whether POST can change anything
    shared             bool: whether a scheduler is watched
    source             str: what is watched, or why it cannot be
    nothing            str: what is to be said where there is no cluster
    home               str: the page to begin with, 'clusters' or 'nodes'
    jobs               {submitted, ended, failed} of all clusters that are open
    clusters           [{number, name}]
    snapshot_seconds   of the driver's thread for the last snapshot

/api/clusters
    number int, name str
    program str: user@host PID n of who uses a scheduler, else ''
    state 'working', 'idle', 'waiting for a node' or 'closed'
    submitted, waiting, running, done, failed, cancelled: jobs (running: those that nodes have CPUs
        for; failed: Terminated or Abandoned)
    rate jobs ended a second over 30 s at most, left s or null, elapsed s, job_seconds s
    nodes int (ready); cpus, used: CPUs
    plot [[s since the epoch, jobs ended, CPUs used, CPUs], ...] at most 240
/api/nodes
    id str, name str, address str, port int, platform str, offered int: CPUs
    state str, reason str: why it is not used
    cpus, used: CPUs; jobs: ended there; job_seconds s
    resources str: 'gpu 1 of 2', those that jobs have of what it offers; '' for none
    memory, disk: bytes free, or null; memory_total, disk_total: bytes in all, or null
    load %: of its CPUs, or null
    heard s since its last sign of life, or null
    holder str: who holds it, known with --nodes only
    clusters [{number, name, state, reason, cpus, used, jobs, job_seconds}]
/api/node?id=ID, a table of the node's jobs with `node`: its row above and, as `plot` there,
    [[s since the epoch, CPUs used, CPUs, load % or null, bytes of memory free or null], ...] at
    most 240
    cluster int, job int: a number for `cancel`, id str (of a scheduler's job: its number in its
        program)
    arguments str (short form; of what is no builtin only the type)
    state 'running' or 'waits there'
    seconds s since it was sent or, where the node has said so, that it has run; null: not known
    stdout, stderr: the last 4 KiB printed
    live bool: whether that is what it has printed until now; false or null: it was asked for a
        moment ago, and is not there yet
/api/failures, jobs that have failed, by the last line of their tracebacks without numbers and
    names of nodes; of the last 500 of each cluster, or of a scheduler
    group str: for /api/jobs; text str: that line, trace str: of the last one
    count int, last s since the epoch, cluster int, name str and user str: of the cluster
    jobs [{job, id, arguments, node, status, time}], at most 10
/api/jobs, all jobs that wait, run and are known to have ended; and with ?state=, one of waiting,
    running, done, failed, cancelled, ended; ?cluster=, ?node=ID, ?group=, ?search=TEXT some of them
    cluster, job, id, arguments, seconds: as of /api/node
    state 'waiting', 'waits there', 'running', 'done', 'failed' or 'cancelled'
    status str: how it ended; node str: the id of its node, where str: that node's name
    attempts int: the number of the last; cpus int
    submitted, began, ended: s since the epoch, or null where not known
    text str: the last line of what says why it has failed
    and beside the rows unlisted {waiting int, ended int}: jobs that are counted and not listed
/api/job?cluster=N&job=N: one row, as of /api/jobs, with
    trace str: why it has failed; stdout, stderr: the last 4 KiB; lost_with [str, ...]: nodes that
        were lost while the job was there
    failed_attempts [{number, node, began, ended, text}, ...], known by the program that tries again
/api/timeline?span=S, a table of nodes (as /api/nodes), with `bin`: the s of one bin
    id, name, address, state, cpus
    lanes [[CPU, number of the first run, [bins from the end of the run before (at first since the
        epoch) to its first bin, from there to its last, kind, jobs, ...]], ...]; kind 0: done, 1:
        cancelled, 2: failed. A stream has only new data: for each CPU the runs from that number on
    running [[CPU, s since the epoch when it began, cluster, job], ...]
/api/accounts?by=user|day|computation&days=N, of a scheduler: jobs in its history (--history)
    user str, day 'YYYY-MM-DD' (the last one), computation str, program str; the
        requested ones identify the row
    jobs, done, failed, cancelled int; cpu_seconds s
    and beside the rows by str, complete bool: whether all was read, none str: why there are no rows
/api/at?node=ID&lane=CPU&ms=T&around=MS: jobs that ran there T ms since the epoch, as of /api/jobs
/metrics
    text for Prometheus; needs the token as well (`authorization: {credentials_file: F}`, and
    `--token-file F` here). With a scheduler, jobs that have ended are counted since it was started,
    and clusters are shown until their program closes them.

POST takes a JSON object and returns {done int}. `cluster` is the number of a cluster. If it is
optional and missing, the request applies to all clusters that use the node; with a scheduler it
always does so, and applies to later clusters too.

    /api/cancel           {cluster, node: id, jobs: [number, ...] or 'all'}: end jobs on a node;
                          {cluster, jobs: [number, ...]}: wherever they are
    /api/stacks           {cluster, job}: answered by {done: 1, text str}, the stacks of the
                          process of a running job, which goes on
    /api/cancel_waiting   {cluster}: end jobs that do not run
    /api/add              {cluster, host str, port int?, cpus int?}: use a node, or all nodes that
                          match a pattern with *
    /api/use              {node, cluster?}: use it again
    /api/drain            {node, cluster?}: send no more jobs to it
    /api/release          {node, cluster?}: release it when its jobs have ended
    /api/cpus             {node, cpus int, cluster?}: use at most so many CPUs

Errors: {error str} with 400 (not understood), 401 (token), 403 (another site's page asks), 404,
405, 409 (cannot be done now), 411, 413 (over 64 KiB), 414, 415, 417, 421 (another Host), 431, 501,
503 (over 64 connections), 505.

Files this program needs: this one, dispy.py, dispynode.py, cloudpickle.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import heapq
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import math
import operator
import os
import pickle
import re
import reprlib
import secrets
import pickletools
import signal
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
import uuid
from typing import (
    Any, Callable, Deque, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple, Type)

try:
    from dispy import drivers
except ImportError as exc:   # this file was copied alone, or with one of another release
    text = str(exc)
    if exc.name == 'dispy':
        text = ('dispy_httpd.py needs the files dispy.py and dispynode.py of the same release '
                'beside it, in %s (%s)')
        directory = os.path.dirname(os.path.abspath(__file__))
        text %= (directory, exc)
    if __name__ == '__main__':
        sys.exit(text)
    raise ImportError(text, name=exc.name, path=exc.path) from exc

import dispy
from dispy import (
    ARGUMENTS_MOST, FAILURES_KEPT, HTTPD_PORT, REPORTS_APART, SHORT, ConnectionSettings, DispyJob,
    EndedJob, EndedJobs, FailedAttempt, FailedJob, FailedJobs, JobAtNode, JobCluster, JobSight,
    Monitor, NodeInfo, NodeSpec, NodeUse, SharedJobCluster, words_of)
from dispynode import (NODE_PORT, PULSE, SCHEDULER_PORT, DispyError, SecretError, job_number,
                       __version__, claim_port, find_secret, host_and_port, _no_password,
                       write_private, pieces_of, read_secret, size_of, tls_files, split_needs, Each,
                       HANDSHAKE_TIME, ServiceManager, attempt_number, write_stacks_on_signal)

__all__ = ['DispyHTTPServer']

# --------------------------------------------------------------------------------------------------
# Constants
# --------------------------------------------------------------------------------------------------

SNAPSHOTS_APART = 0.25        # minimum s between two snapshots
SAMPLES_APART = 1.0           # s between two points of a plot, and two snapshots if nobody watches
PLOT_POINTS = 240             # when there are so many, every second one is dropped
RATE_SPAN = 30.0              # s over which the rate is measured
REPORTS_A_TURN = 20           # requests that are made in one turn of the driver
# Seconds after a request during which snapshots are still taken as often as requested
LOOKED_FOR = 5.0
# Bytes of a running job's output; jobs with output
OUTPUT_KEPT = 4096
OUTPUTS_KEPT = 1000
PER_PAGE = 50
PER_PAGE_MOST = 200
SCHEDULER_PAGE = 100          # rows in one answer of a scheduler: a few ms of its loop
TEXTS_KEPT = 20000            # texts of arguments of jobs
JOBS_PAGE = 500               # rows about jobs in one answer of a scheduler
LIST_APART = 1.0              # minimum s between two lists of all jobs
WAITING_LISTED = 2000         # waiting jobs of a cluster that are listed
BARS_KEPT = 200000            # bars of the timeline
# Seconds after which nodes are asked for their history if nobody watches
HISTORY_APART = 10.0
STACKS_TIME = 5.0             # s that a node may take to send the stacks of a job
STACKS_STEP = 0.1             # s between two requests for them
ACCOUNTS_KEPT = 50000         # sums for a day, user and computation
DAY = 86400.0                 # s
NODE_POINTS = 240             # points of a node's history
BINS = 600                    # bins of the time that the timeline shows
BARS_NAMED = 5                # jobs that are named if a bar stands for many
RUNS_KEPT = 60.0              # s that runs of a width are kept after a request
# Seconds by which a job may seem to begin before the previous one has ended
CLOCK_STEP = 0.005
SNAPSHOT_SHARE = 20           # a snapshot that takes the driver 1 s is the only one in so many s
# Limits of a request in bytes
MAX_LINE = 4096
MAX_HEAD = 16384
MAX_BODY = 65536
MAX_CONNECTIONS = 64
IO_TIME = 10.0                # s for a request to arrive, and for an answer to be received
SIGNAL_CHECK = 0.5            # maximum s until a signal is handled
HEALTHY_AGE = 30.0            # s since the last snapshot after which the server is not healthy
METRICS_CLUSTERS = 100        # rows of metrics for clusters; older ones are one row
METRICS_USERS = 50            # the same for users
OTHERS = 'others'             # the label of that row
TOKEN = re.compile('[A-Za-z0-9_-]{16,200}')
HEARTBEAT = 2.0   # s between signs of life in a stream, which show whether the browser is gone

logger = dispy.logger


class Refusal(Exception):
    """A request that is refused, with the HTTP status and a text."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers


# --------------------------------------------------------------------------------------------------
# What can be shown of a job. No code of the user's is called: opening the objects could run it.
# --------------------------------------------------------------------------------------------------

def _new_instance(cls: type, *args: Any, **kwargs: Any) -> Any:
    return object.__new__(cls)


def _do_nothing(self: Any, *args: Any, **kwargs: Any) -> None:
    """Do nothing, in the place of what a pickle does to an object."""


def _return_self(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


class _Placeholder(type):
    """The base of classes that replace classes which are not builtins. Their instances accept what
    a pickle does to them, and are shown as their type."""
    METHODS = {
        '__new__': _new_instance,
        '__init__': _do_nothing,
        '__setstate__': _do_nothing,
        'append': _do_nothing,
        'extend': _do_nothing,
        'add': _do_nothing,
        '__setitem__': _do_nothing,
        '__call__': _return_self,
        '__reduce__': None,
    }

    def __new__(mcs, name: str) -> '_Placeholder':
        methods: Dict[str, Any] = dict(mcs.METHODS)
        methods['__repr__'] = lambda self: '<%s>' % name
        return super().__new__(mcs, name, (), methods)

    def __init__(cls, name: str) -> None:
        super().__init__(name, (), {})

    def __repr__(cls) -> str:
        return cls.__name__


class _SafeUnpickler(pickle.Unpickler):
    """Opens a pickle of builtin values. A placeholder replaces every other class."""

    def find_class(self, module: str, name: str) -> Any:
        # The names by which a class of the program itself is pickled
        if (module, name) == ('dispynode', 'class_of'):
            return lambda tracker, version, module, name, make, args: _Placeholder(name)
        if (module, name) == ('dispynode', 'function_of'):
            return _Placeholder('function')
        if module == 'builtins':
            return {'complex': complex, 'range': range}.get(name, _Placeholder(name))
        return _Placeholder('%s.%s' % (module, name))

    def persistent_load(self, number: Any) -> Any:
        raise pickle.UnpicklingError('a persistent id')


LONG = reprlib.Repr()         # for the arguments of a job that is shown alone
LONG.maxlevel = 6
LONG.maxstring = LONG.maxother = 2000
LONG.maxlist = LONG.maxtuple = LONG.maxdict = LONG.maxset = 100
LONG_MOST = 10000             # characters of these


def arguments_text(payload: Any, form: Optional[reprlib.Repr] = None) -> str:
    """Return the short form of a job's packed arguments, or a longer one by `form`. Large arguments
    are not opened."""
    if payload is None:
        return ''
    if isinstance(payload, int):
        return '%s of arguments' % bytes_text(payload)
    size = size_of(payload)
    hidden = '%s of arguments' % bytes_text(size)
    if size > ARGUMENTS_MOST:
        return hidden
    data = b''.join(pieces_of(payload))
    try:
        _, body = split_needs(data)
        _check_memo(bytes(body))
        opener = _SafeUnpickler(io.BytesIO(body))
        args, kwargs = opener.load()[:2]
        # No program packs arguments so: they might be endless
        if type(args) is not tuple or type(kwargs) is not dict:
            raise ValueError('no arguments')
        if form is None:
            return words_of(args, kwargs)
        words = list(map(form.repr, args))
        for name, value in kwargs.items():
            word = form.repr(value)
            words.append('%.80s=%s' % (name, word))
        return ', '.join(words)[:LONG_MOST]
    except Exception:  # an unpickler without the real classes may raise anything
        return hidden


def _check_memo(data: bytes) -> None:
    """Raise ValueError for a pickle that is truncated, or that uses a large memo index, for which
    memory would be allocated."""
    for opcode, value, _ in pickletools.genops(data):
        if opcode.name not in ('PUT', 'BINPUT', 'LONG_BINPUT') or value is None:
            continue
        if value > len(data):
            raise ValueError('an index of the memo that is larger than the pickle')


def bytes_text(size: float) -> str:
    """Return a number of bytes as text for people."""
    for unit in ('bytes', 'KiB', 'MiB'):
        if size < 1024:
            return '%.*f %s' % (unit != 'bytes', size, unit)
        size /= 1024
    return '%.1f GiB' % size


def last_line(text: str) -> str:
    """Return the last line of a traceback, which says what was raised."""
    last = text.strip().rpartition('\n')[2]
    return last.strip()[:300]


class History:
    """The numbers of ended jobs and of CPUs in use over time, and the rate. The snapshot thread
    uses this class."""

    def __init__(self) -> None:
        self.points: List[List[float]] = []
        self._apart = SAMPLES_APART
        # (time, jobs ended) of the last RATE_SPAN seconds
        self._recent: Deque[Tuple[float, int]] = collections.deque()

    def add(self, now: float, ended: int, used: int, cpus: int) -> float:
        """Add a point and return how many jobs end in a second. The time before the first job ended
        does not count."""
        self._add_recent(now, ended)
        last = -math.inf
        if self.points:
            last = self.points[-1][0]
        if now - last >= self._apart:
            self._add_point([round(now, 2), ended, used, cpus])
        since, ended_then = self._recent[0]
        if now - since < 0.5:
            return 0.0
        return (ended - ended_then) / (now - since)

    def _add_recent(self, now: float, ended: int) -> None:
        recent = self._recent
        last = -math.inf
        if recent:
            last, _ = recent[-1]
        if now - last >= SAMPLES_APART:
            recent.append((now, ended))
        while len(recent) > 1:
            first, ended_then = recent[0]
            _, ended_next = recent[1]
            was_idle = ended_next == ended_then and ended > ended_then
            if now - first <= RATE_SPAN and not was_idle:
                break
            recent.popleft()

    def _add_point(self, point: List[float]) -> None:
        points = self.points
        if len(points) >= PLOT_POINTS:
            points = points[::2]
        # This is a new list, because others may be reading the old one
        self.points = [*points, point]
        if len(self.points) > PLOT_POINTS // 2 + 1:
            return
        span = point[0] - self.points[0][0]
        if span > PLOT_POINTS * self._apart:
            self._apart *= 2


# --------------------------------------------------------------------------------------------------
# The timeline: when jobs ran on the CPUs of nodes. Ended jobs are merged into runs of bins as they
# come, and a browser gets the new ones: the cost of neither depends on earlier jobs.
# --------------------------------------------------------------------------------------------------

JobKey = Tuple[int, int]   # cluster, number of the job there
# Node -> its running jobs: lane, beginning, cluster and number of the job
Placed = Dict[str, List[List[Any]]]


def key_of(row: dict) -> JobKey:
    """Return the key that identifies a listed job."""
    return row['cluster'], row['job']


class Bar(NamedTuple):
    """A job on one CPU of a node, as the timeline shows it."""
    began: float
    ended: float
    kind: int      # place in BAR_KINDS
    key: JobKey


# In the order in which one hides another if both are too short to be visible
BAR_KINDS = ('done', 'cancelled', 'failed')


class Runs:
    """The bars of a CPU in bins of one width. A run is four numbers: its first bin since the epoch,
    its last bin, the kind, and the number of jobs that it stands for. Only the last run may still
    change.

    first - how many runs have been forgotten
    changes - how many bars were added
    used - when it was last requested
    """
    __slots__ = ('width', 'first', 'runs', 'changes', 'used')

    def __init__(self, width: float) -> None:
        self.width = width
        self.first = 0
        self.runs: Deque[List[int]] = collections.deque()
        self.changes = 0
        self.used = 0.0

    def add(self, bar: Bar) -> None:
        """Add a bar that has ended after all others."""
        self.changes += 1
        first = int(bar.began / self.width)
        last = int(bar.ended / self.width)
        if self.runs:
            before = self.runs[-1]
            is_short = last - first < 2
            if first <= before[1] and is_short:
                before[1] = max(before[1], last)
                before[2] = max(before[2], bar.kind)
                before[3] += 1
                return
            first = max(first, min(before[1] + 1, last))
        self.runs.append([first, last, bar.kind, 1])

    def forget_before(self, time_left: float) -> None:
        """Forget the runs that have ended before this time."""
        bin_left = int(time_left / self.width)
        while self.runs and self.runs[0][1] < bin_left:
            self.runs.popleft()
            self.first += 1

    def after(self, known: int) -> Tuple[int, List[int]]:
        """Return the number of the first run of which a browser with so many runs does not have the
        present state, and four numbers for each run from there on: bins from the end of the
        previous one (for the first, since the epoch), bins to its last one, kind, jobs."""
        begin = max(known - 1, self.first)
        found: List[int] = []
        end = 0
        for first, last, kind, jobs in itertools.islice(self.runs, begin - self.first, None):
            found += (first - end, last - first, kind, jobs)
            end = last
        return begin, found


class Lane:
    """The jobs that ran on one CPU of a node, in the order in which they ended."""
    __slots__ = ('bars', 'runs')

    def __init__(self) -> None:
        self.bars: Deque[Bar] = collections.deque()
        self.runs: Dict[float, Runs] = {}

    def end(self) -> float:
        """Return when the last bar ends."""
        if not self.bars:
            return 0.0
        return self.bars[-1].ended

    def add(self, bar: Bar) -> None:
        """Add a bar."""
        self.bars.append(bar)
        for runs in self.runs.values():
            runs.add(bar)

    def runs_of(self, width: float, left: float) -> Runs:
        """Return the runs with bins of this width since a time."""
        runs = self.runs.get(width)
        now = time.monotonic()
        if runs is None:
            runs = Runs(width)
            for bar in self.bars:
                if bar.ended >= left:
                    runs.add(bar)
            for other in list(self.runs.values()):
                if now - other.used > RUNS_KEPT:
                    del self.runs[other.width]
            self.runs[width] = runs
        runs.forget_before(left)
        runs.used = now
        return runs

    def bars_at(self, begin: float, end: float) -> List[Bar]:
        """Return the bars between two times, the last first."""
        found = []
        for bar in reversed(self.bars):
            if bar.ended < begin:
                break
            if bar.began <= end:
                found.append(bar)
        return found


class Timeline:
    """The last BARS_KEPT bars of jobs, on the CPUs of nodes. Which CPU a job had is not known: it
    is assigned one that was free then. Only one thread at a time calls its methods, see
    `JobList`."""

    def __init__(self) -> None:
        self._nodes: Dict[str, List[Lane]] = {}
        # Lanes in the order in which their bars came
        self._order: Deque[Lane] = collections.deque()
        self.count = 0   # the number of bars that have come
        # Running jobs -> their node, and the lanes on which they are shown
        self._held: Dict[JobKey, Tuple[str, List[int]]] = {}
        self._taken: Dict[str, Set[int]] = {}   # these lanes, by node

    def add(self, row: dict) -> None:
        """Add a job that has ended."""
        key = key_of(row)
        node, held = self._held.pop(key, ('', []))
        if node:
            self._taken[node].difference_update(held)
        if row['began'] is None or not row['node']:
            return
        if node != row['node']:
            held = self._free(row)
        kind = BAR_KINDS.index(row['state'])
        bar = Bar(row['began'], row['ended'], kind, key)
        lanes = self._nodes[row['node']]
        for number in held:
            lane = lanes[number]
            lane.add(bar)
            self._order.append(lane)
            self.count += 1
        while len(self._order) > BARS_KEPT:
            self._order.popleft().bars.popleft()

    def _free(self, row: dict) -> List[int]:
        """Return lanes of a job's node that were free when it began, those that were used last;
        lanes are added if there are too few."""
        lanes = self._nodes.setdefault(row['node'], [])
        taken = self._taken.get(row['node'], ())
        latest = row['began'] + CLOCK_STEP
        fitting = []
        for number, lane in enumerate(lanes):
            if number in taken:
                continue
            end = lane.end()
            if end <= latest:
                fitting.append((-end, number))
        count = row['cpus']
        best = heapq.nsmallest(count, fitting)
        found = [number for _, number in best]
        while len(found) < count:
            found.append(len(lanes))
            lanes.append(Lane())
        return found

    def place(self, running: List[dict]) -> Placed:
        """Return for each node the jobs that run: lane, beginning, cluster and number of the
        job."""
        before = self._held
        self._held = {}
        self._taken = collections.defaultdict(set)
        new = []
        for row in running:
            node, numbers = before.get(key_of(row), ('', []))
            if node == row['node']:
                self._hold(row, numbers)
            else:
                new.append(row)
        for row in new:
            self._hold(row, self._free(row))
        found: Placed = collections.defaultdict(list)
        for row in running:
            key = key_of(row)
            node, numbers = self._held[key]
            began = round(row['began'], 2)
            for number in numbers:
                bar = [number, began, *key]
                found[node].append(bar)
        return found

    def _hold(self, row: dict, numbers: List[int]) -> None:
        self._held[key_of(row)] = (row['node'], numbers)
        self._taken[row['node']].update(numbers)

    def lanes_of(self, node: str, cpus: int) -> List[Lane]:
        """Return the lanes of a node, at least so many."""
        lanes = self._nodes.setdefault(node, [])
        while len(lanes) < cpus:
            lanes.append(Lane())
        return lanes

    def bars_at(self, node: str, lane: int, begin: float, end: float) -> List[Bar]:
        """Return the bars of a lane between two times, the last first."""
        lanes = self._nodes.get(node, [])
        if lane >= len(lanes):
            return []
        return lanes[lane].bars_at(begin, end)

    def forget_nodes(self, known: Iterable[str]) -> None:
        """Forget the nodes that have no bars left, except those that are known."""
        for node in set(self._nodes).difference(known):
            if not any(lane.bars for lane in self._nodes[node]):
                del self._nodes[node]


# --------------------------------------------------------------------------------------------------
# Jobs one by one: a list of those that wait, run and have ended. It is made for requests, whatever
# the source is; nothing here belongs to a driver's thread.
# --------------------------------------------------------------------------------------------------

# The word `state` of a request -> the states of the jobs that it gets
STATE_GROUPS: Dict[str, Tuple[str, ...]] = {
    '': ('waiting', 'waits there', 'running', 'done', 'failed', 'cancelled'),
    'waiting': ('waiting', 'waits there'),
    'running': ('running',),
    'done': ('done',),
    'failed': ('failed',),
    'cancelled': ('cancelled',),
    'ended': ('done', 'failed', 'cancelled'),
}
ENDED_STATES = frozenset(STATE_GROUPS['ended'])
# Fields of a listed job that are sent, after `payload` and `name` were replaced by texts
LISTED_FIELDS = ('cluster', 'job', 'id', 'arguments', 'state', 'status', 'node', 'where', 'seconds',
                 'attempts', 'submitted', 'began', 'ended', 'cpus', 'text')
# The fields of a node's row that the timeline needs
TIMELINE_FIELDS = ('id', 'name', 'address', 'state', 'cpus')
NEW_LISTED_JOB: Dict[str, Any] = {
    'name': None,
    'payload': None,
    'status': '',
    'node': '',
    'where': '',
    'seconds': None,
    'attempts': 0,
    'submitted': None,
    'began': None,
    'ended': None,
    'cpus': 1,
    'text': '',
    'stdout': b'',
    'stderr': b'',
    'lost_with': (),   # nodes that were lost while the job was there
    'known': False,   # whether the arguments are here and need not be requested
}


def listed_job(cluster: int, job: int, name: Any, state: str, **fields: Any) -> dict:
    """Return the row of a job in the list; `name` is its id, of any type."""
    row = dict(NEW_LISTED_JOB)
    row.update(fields)
    row['cluster'] = cluster
    row['job'] = job
    row['name'] = name
    row['id'] = id_text(name)
    row['state'] = state
    return row


def last_time(row: dict) -> float:
    """Return the sort key of jobs: the time of the last event of a job; for jobs that wait, a
    number that decreases with the order of submission."""
    for name in ('ended', 'began'):
        if row[name] is not None:
            return float(row[name])
    return -float(row['job'])


def state_word(status: int) -> str:
    """Return the state of a job as a word."""
    state = dispy.JobState(status)
    return state.name.lower()


def state_of_end(status: int, text: str) -> str:
    """Return the state of a job that has ended; `text` says why it failed, if it did."""
    if status == DispyJob.Cancelled:
        return 'cancelled'
    if text or status != DispyJob.Finished:
        return 'failed'
    return 'done'


def listed_end(job: EndedJob, node: str) -> dict:
    """Return the row of a job that has ended; `node` is the id of its node for the page."""
    state = state_of_end(job.status, job.text)
    row = listed_job(job.cluster, job.key, job.job, state)
    row['status'] = state_word(job.status)
    row['payload'] = job.payload
    row['known'] = True
    row['node'] = node
    row['where'] = job.where
    row['attempts'] = job.attempts
    row['cpus'] = job.cpus
    row['submitted'] = job.submitted
    row['began'] = job.began
    row['ended'] = job.ended
    if job.began is not None:
        row['seconds'] = max(0.0, job.ended - job.began)
    row['stdout'] = job.stdout
    row['stderr'] = job.stderr
    row['lost_with'] = list(job.lost_with)
    if row['state'] == 'failed':
        row['text'] = job.text
    return row


def listed_bar(bar: Bar) -> dict:
    """Return the row of a job of which only its bar is still known."""
    cluster, job = bar.key
    state = BAR_KINDS[bar.kind]
    row = listed_job(cluster, job, job, state)
    row['began'] = bar.began
    row['ended'] = bar.ended
    row['seconds'] = bar.ended - bar.began
    row['known'] = True
    return row


def listed_failure(failed: FailedJob) -> dict:
    """Return the row of a job of which only its failure is still known."""
    row = listed_job(failed.cluster, failed.key, failed.job, 'failed')
    row['status'] = state_word(failed.status)
    row['payload'] = failed.payload
    row['known'] = True
    row['where'] = failed.node
    row['ended'] = failed.time
    row['time'] = failed.time
    row['text'] = failed.text
    return row


class JobTexts:
    """The texts of the arguments of those jobs that were shown last. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._texts: 'collections.OrderedDict[JobKey, str]' = collections.OrderedDict()

    def missing(self, rows: Iterable[dict]) -> List[dict]:
        """Return the rows whose texts must be made."""
        with self._lock:
            return [row for row in rows if key_of(row) not in self._texts]

    def add(self, row: dict, text: str) -> None:
        """Keep the text of a job."""
        with self._lock:
            self._texts[key_of(row)] = text
            while len(self._texts) > TEXTS_KEPT:
                self._texts.popitem(last=False)

    def of(self, row: dict) -> str:
        """Return the text of a job; it is empty if it is not known."""
        return self._texts.get(key_of(row), '')


class JobList:
    """All jobs of a source that can be shown. The list is made again at most once in LIST_APART
    seconds, for all browsers. `jobs` is the part of the source that knows the jobs, such as
    ClusterJobs, with these methods:

    ended() - return EndedJob and id of the node, for the jobs that have ended since the last call
    current() - return the rows of jobs that wait or run, and set `unlisted` to the number of
        further waiting jobs
    failures() - return FailedJob of the jobs that have failed
    arguments(rows) - return the packed arguments of rows whose arguments are not `known`
    details(row) - return what else is known of a job that has not ended
    attempts(row) - return FailedAttempt of a job
    sights(keys, wants_stacks) - return JobSight of running jobs, None for those of which it is not
        known yet
    """

    def __init__(self, jobs: Any) -> None:
        self._jobs = jobs
        self._lock = threading.Lock()       # guards all below
        self._ended: 'collections.OrderedDict[JobKey, dict]' = collections.OrderedDict()
        self._rows: List[dict] = []
        self._made = -math.inf
        self._asked = False                 # whether a page has requested jobs
        self._counted = 0                   # jobs that had ended at the last snapshot
        # Jobs that are not in the list, which has all that were counted before it was made
        self.unlisted = {'waiting': 0, 'ended': 0}
        self._placed: Placed = {}           # running jobs, for the timeline
        self._placed_at = -math.inf
        self.texts = JobTexts()
        self.shows_arguments = True
        self.timeline = Timeline()

    def follow(self, clusters: List[dict]) -> None:
        """Take the jobs that have ended in the meantime, once a page has asked for jobs. The
        snapshot thread."""
        counted = 0
        for row in clusters:
            counted += row['done']
            counted += row['failed']
            counted += row['cancelled']
        self._counted = counted
        if not self._asked:
            return
        try:
            with self._lock:
                self._take()
        except (RuntimeError, concurrent.futures.TimeoutError) as exc:
            logger.debug('the jobs that have ended cannot be asked: %s', exc)

    def forget(self) -> None:
        """Forget all jobs, because their numbers will stand for other jobs."""
        with self._lock:
            self._ended.clear()
            self._rows = []
            self._made = -math.inf
            self.texts = JobTexts()
            self.timeline = Timeline()

    def _take(self) -> None:
        self._asked = True
        for job, node in self._jobs.ended():
            row = listed_end(job, node)
            row['time'] = last_time(row)
            self._ended.pop(key_of(row), None)
            self._ended[key_of(row)] = row
            self.timeline.add(row)
        while len(self._ended) > dispy.ENDED_KEPT:
            self._ended.popitem(last=False)

    def rows(self) -> List[dict]:
        """Return the rows of all jobs, which do not change any more. Raises RuntimeError."""
        with self._lock:
            now = time.monotonic()
            if now - self._made < LIST_APART:
                return self._rows
            current = []
            counted = self._counted
            try:
                current = self._jobs.current()
                self._take()   # after `current`, so that no job is missing
            except (RuntimeError, concurrent.futures.TimeoutError) as exc:
                logger.debug('the jobs cannot be asked: %s', exc)
            found = {key_of(row): row for row in current}
            found.update(self._ended)
            for failed in self._jobs.failures():
                key = (failed.cluster, failed.key)
                if key not in found:
                    found[key] = listed_failure(failed)
            for row in current:
                row['time'] = last_time(row)
            self._rows = list(found.values())
            ended = [row for row in self._rows if row['state'] in ENDED_STATES]
            missing = max(0, counted - len(ended))
            self.unlisted = {'waiting': self._jobs.unlisted, 'ended': missing}
            self._made = time.monotonic()
            return self._rows

    def bars(self, nodes: List[dict], span: int) -> Tuple[List[dict], int]:
        """Return the rows of the timeline for these nodes, with the Runs of their CPUs in the last
        so many seconds, and a number that changes with them. Raises RuntimeError."""
        with self._lock:
            now = time.monotonic()
            if now - self._placed_at >= SNAPSHOTS_APART:
                running = {key_of(row): row for row in self._jobs.running()}
                self._take()
                # Each once, even if it runs a second time
                once = list(running.values())
                self._placed = self.timeline.place(once)
                self._placed_at = time.monotonic()
            width = span / BINS
            left = time.time() - span
            rows = []
            for node in nodes:
                row = {name: node[name] for name in TIMELINE_FIELDS}
                name = node['id']
                lanes = self.timeline.lanes_of(name, node['cpus'])
                row['lanes'] = [lane.runs_of(width, left) for lane in lanes]
                row['running'] = self._placed.get(name, [])
                rows.append(row)
            return rows, self.timeline.count

    def new_runs(self, row: dict, known: 'Dict[Runs, Tuple[int, int]]') -> List[List[Any]]:
        """Return what a browser does not have of the lanes in a row of `bars`: the lane, the number
        of the first run, and the numbers of runs. `known` is how many runs of each lane it has."""
        found: List[List[Any]] = []
        with self._lock:
            for number, runs in enumerate(row['lanes']):
                count = runs.first + len(runs.runs)
                changes = runs.changes
                if known.get(runs) == (count, changes):
                    continue
                have, _ = known.get(runs, (0, 0))
                begin, numbers = runs.after(have)
                known[runs] = (count, changes)
                if numbers:
                    found.append([number, begin, numbers])
        return found

    def at(self, node: str, lane: int, begin: float, end: float) -> List[dict]:
        """Return the rows of jobs that ran on a CPU of a node between two times, the last
        first."""
        with self._lock:
            self._take()   # jobs that no longer run
            bars = self.timeline.bars_at(node, lane, begin, end)
            rows = []
            for bar in bars:
                row = self._ended.get(bar.key)
                if row is None:
                    row = listed_bar(bar)
                rows.append(row)
            return rows

    def find(self, key: JobKey) -> dict:
        """Return the row of a job. Raises Refusal."""
        for row in self.rows():
            if key_of(row) == key:
                return row
        raise Refusal(404, 'job %d of cluster %d is not known any more' % (key[1], key[0]))

    def fill_in(self, rows: List[dict], most: int = PER_PAGE_MOST) -> None:
        """Make the texts of these jobs' arguments, for at most so many of those that must be
        requested."""
        if not self.shows_arguments:
            return
        unknown = []
        for row in self.texts.missing(rows):
            if row['known']:
                text = arguments_text(row['payload'])
                self.texts.add(row, text)
            else:
                unknown.append(row)
        for at in range(0, min(len(unknown), most), SCHEDULER_PAGE):
            some = unknown[at:at + SCHEDULER_PAGE]
            for row, payload in zip(some, self._jobs.arguments(some)):
                if payload is not None:   # otherwise it has ended in the meantime
                    self.texts.add(row, arguments_text(payload))

    def shown(self, row: dict) -> dict:
        """Return the part of a row that is sent."""
        shown = {name: row.get(name) for name in LISTED_FIELDS}
        shown['arguments'] = self.texts.of(row)
        shown['text'] = last_line(row['text'])
        for name in ('seconds', 'submitted', 'began', 'ended'):
            if row[name] is not None:
                shown[name] = round(row[name], 3)
        return shown

    def details(self, key: JobKey) -> dict:
        """Return everything that is known of a job. Raises Refusal."""
        row = self.find(key)
        self.fill_in([row])
        shown = self.shown(row)
        shown['trace'] = row['text']
        shown['stdout'] = row['stdout']
        shown['stderr'] = row['stderr']
        shown['live'] = None
        shown['lost_with'] = row['lost_with']
        shown['failed_attempts'] = []
        for attempt in self._attempts(row):
            shown['failed_attempts'].append(attempt._asdict())
        if row['state'] not in ENDED_STATES:
            shown.update(self._jobs.details(row))
        printed = shown['stdout'] or shown['stderr']
        if row['state'] == 'running' and not printed:
            self.show_output([shown])
        for stream in ('stdout', 'stderr'):
            if isinstance(shown[stream], bytes):
                shown[stream] = shown[stream].decode('utf-8', 'replace')
        if row['known'] and self.shows_arguments:
            shown['arguments'] = arguments_text(row['payload'], LONG)
        return shown

    def _attempts(self, row: dict) -> List[FailedAttempt]:
        try:
            return self._jobs.attempts(row)  # type: ignore[no-any-return]
        except RuntimeError as exc:   # closed in the meantime
            logger.debug('the attempts of a job: %s', exc)
            return []

    def show_output(self, rows: List[dict]) -> None:
        """Request what running jobs have printed, and fill in what is known of it."""
        keys = list(map(key_of, rows))
        try:
            sights = self._jobs.sights(keys, False)
        except (RuntimeError, concurrent.futures.TimeoutError) as exc:
            logger.debug('what jobs print cannot be asked: %s', exc)
            return
        for row, sight in zip(rows, sights):
            if sight is not None:
                row['stdout'] = sight.stdout
                row['stderr'] = sight.stderr
                row['live'] = True

    def stacks(self, key: JobKey) -> str:
        """Return the present stacks of the process of a running job. Raises Refusal."""
        began = time.monotonic()
        while True:
            sight, = self._jobs.sights([key], True)
            passed = time.monotonic() - began
            is_new = sight is not None and sight.age < passed
            if is_new and sight.error:
                raise Refusal(409, sight.error)
            if is_new and sight.stacks:
                text: str = sight.stacks
                return text
            if passed > STACKS_TIME:
                raise Refusal(409, 'the job does not run, or its node does not answer')
            time.sleep(STACKS_STEP)


class JobFilter:
    """Which jobs a query requests; its words are removed from the query. Raises Refusal."""

    def __init__(self, query: Dict[str, str]) -> None:
        state = query.pop('state', '')
        if state not in STATE_GROUPS:
            known = ', '.join(filter(None, STATE_GROUPS))
            raise Refusal(400, 'state=%.40s: it is one of %s' % (state, known))
        self._states = frozenset(STATE_GROUPS[state])
        self._cluster = number_in(query, 'cluster', 0, 0, 10 ** 9)
        self._node = query.pop('node', '')
        self._group = query.pop('group', '')
        self.search = query.pop('search', '').lower()

    def fits(self, row: dict) -> bool:
        """Return whether the query requests a row, whatever text it searches."""
        if row['state'] not in self._states:
            return False
        if self._cluster and row['cluster'] != self._cluster:
            return False
        if self._node and row['node'] != self._node:
            return False
        return not self._group or group_key(row) == self._group

    def search_in(self, rows: List[dict], texts: JobTexts) -> List[dict]:
        """Return the rows that contain the text that is searched."""
        found = []
        for row in rows:
            arguments = texts.of(row)
            if self.is_found(row, arguments):
                found.append(row)
        return found

    def is_found(self, row: dict, arguments: str) -> bool:
        """Return whether a row contains the text that is searched."""
        reason = last_line(row['text'])
        texts = (row['id'], arguments, row['where'], reason)
        everything = '\n'.join(texts)
        return self.search in everything.lower()


# --------------------------------------------------------------------------------------------------
# Sources: where snapshots come from. Each has `snapshot`, `jobs`, `failures`, `act`, `close`, and
# returns plain values.
# --------------------------------------------------------------------------------------------------

# The fields of a node's row that are shown over time
_history_of = operator.itemgetter('used', 'cpus', 'load', 'memory')


class NodeHistories:
    """CPUs in use, load, and free memory and disk of nodes over time: NODE_POINTS of each; when
    there are so many, every second one is dropped. The snapshot thread uses this class."""

    def __init__(self) -> None:
        self._points: Dict[str, List[tuple]] = {}
        self._apart: Dict[str, float] = {}

    def add(self, rows: List[dict], now: float) -> None:
        """Add the present figures of all nodes, and put into each row as `plot` those of the node
        over time; forget the nodes that have gone."""
        seen = set()
        for row in rows:
            name = row['id']
            seen.add(name)
            self._add_point(name, row, now)
            row['plot'] = self._points[name]
        gone = set(self._points).difference(seen)
        for name in gone:
            del self._points[name]
            del self._apart[name]

    def _add_point(self, name: str, row: dict, now: float) -> None:
        """Add a point if the last one is old enough."""
        points = self._points.get(name, [])
        apart = self._apart.setdefault(name, SAMPLES_APART)
        if points:
            last = points[-1][0]
            if now - last < apart:
                return
        if len(points) >= NODE_POINTS:
            points = points[::2]
            self._apart[name] = 2 * apart
        at = round(now, 1)
        values = _history_of(row)
        # This is a new list, because requests may be reading the old one
        self._points[name] = [*points, (at, *values)]


class ClusterView(Monitor):
    """A cluster that is shown: `given` is the object that the program has, `cluster` what its
    driver knows of it. `output` and `live_from` belong to the driver's thread."""

    def __init__(self, number: int, given: Any) -> None:
        self.number = number
        self.given = given
        self.cluster = dispy.core_of(given)
        self.history = History()
        self.failed_jobs = FailedJobs()
        self.ended_jobs = EndedJobs()
        # Job -> the end of what it has printed to stdout and to stderr
        self.output: 'collections.OrderedDict[DispyJob, List[bytes]]' = collections.OrderedDict()
        # Node -> its link when this view began: output is not sent on it
        self.live_from: Dict[Any, Any] = {}
        self.closed_at = 0.0   # when the cluster was closed, in s since the epoch

    @property
    def looks_only(self) -> bool:
        """Return whether this stands for nodes that are observed and not for a cluster."""
        return self.cluster.packed is None

    def failed(self, job: DispyJob, payload: Any) -> None:
        """Note a job that has failed."""
        if job.status == DispyJob.Cancelled:
            return
        text = job._exception   # without the arguments, which must not be shown
        if text is None:
            text = 'exit status %s' % (job.result,)
        node = job.ip_addr or ''
        key = job_number(job.serial)
        ended = job.end_time or 0.0
        self.failed_jobs.add(ended, self.number, job.id, payload, job.status, node, text, key)

    def ended(self, jobs: List[Tuple[DispyJob, Any]], peer: Any) -> None:
        """Note jobs that have ended."""
        key = None
        where = ''
        if peer is not None:
            key = peer.key
            where = peer.name or peer.ip_addr
        for job, payload in jobs:
            text = job._exception or ''
            if not text and dispy.has_exit_status(job):
                text = 'exit status %s' % (job.result,)
            number = job_number(job.serial)
            attempt = attempt_number(job.serial)
            cpus = dispy.cpus_of(job)
            ended = job.end_time or time.time()
            row = (self.number, number, job.id, payload, job.status, attempt, key, where, cpus,
                   job.submit_time, job.start_time, ended)
            stdout = job.stdout or ''
            stderr = job.stderr or ''
            self.ended_jobs.add(row, stdout, stderr, text, job.lost_with)
            self.output.pop(job, None)

    def printed(self, job: DispyJob, stream: int, offset: int, data: bytes) -> None:
        """Keep the end of what a job prints."""
        ends = self.output.setdefault(job, [b'', b''])
        before = b''
        if offset:
            before = ends[stream - 1]
        shown = before + data
        ends[stream - 1] = shown[-OUTPUT_KEPT:]
        if len(self.output) > OUTPUTS_KEPT:
            self._forget_output()

    def _forget_output(self) -> None:
        """Forget the output of jobs that have ended, or else that of the first job."""
        for job in list(self.output):
            if job.status in dispy.ENDED:
                del self.output[job]
        if len(self.output) > OUTPUTS_KEPT:
            self.output.popitem(last=False)

    def attach(self) -> None:
        """Begin to observe the cluster. The driver's thread."""
        cluster = self.cluster
        if self.looks_only:
            return
        if not cluster.packed.spec['live']:
            for peer in self._peers():
                if peer.uses[cluster.comp].offered:
                    self.live_from[peer.key] = peer.link
        cluster.live_output.add_monitor(self)

    def _peers(self) -> List[Any]:
        return self.cluster.driver.nodes.of(self.cluster.comp)  # type: ignore[no-any-return]

    def refresh(self) -> None:
        """Request figures from others, before the driver is asked. The snapshot thread."""

    def nodes(self) -> List[Any]:
        """Return its nodes, which have a `key`. The driver's thread."""
        return list(self._peers())

    def sent_to(self, key: Any) -> Dict[int, DispyJob]:
        """Return a dictionary from serials to the jobs that were sent to a node. The driver's
        thread."""
        overview = self.cluster.driver.overview
        return overview.sent_to(key, self.cluster.comp)  # type: ignore[no-any-return]

    def jobs_at(self, key: Any) -> List[JobAtNode]:
        """Return the jobs that were sent to a node, with what is known of how long they have run.
        The driver's thread."""
        overview = self.cluster.driver.overview
        return overview.jobs_at(key, self.cluster.comp)  # type: ignore[no-any-return]

    def known_jobs_at(self, key: Any) -> List[JobAtNode]:
        """Return the same from what is known already, without asking the node."""
        overview = self.cluster.driver.overview
        return overview.known_jobs_at(key, self.cluster.comp)  # type: ignore[no-any-return]

    def failed_attempts(self, number: int) -> List[FailedAttempt]:
        """Return the attempts of a job that have failed. Any thread but the driver's."""
        cluster = self.cluster
        attempts = cluster.driver.overview.attempts
        return cluster.driver.ask(  # type: ignore[no-any-return]
            lambda: attempts.of(cluster.comp, number))

    def sights(self, numbers: List[int], wants_stacks: bool) -> List[Optional[JobSight]]:
        """Return what the jobs with these numbers do. Any thread but the driver's."""
        cluster = self.cluster
        overview = cluster.driver.overview
        return cluster.driver.ask(  # type: ignore[no-any-return]
            lambda: overview.sights(cluster.comp, numbers, wants_stacks))

    def is_live(self, key: Any) -> bool:
        """Return whether a node sends the output of jobs while they run. The driver's thread."""
        peer = self.cluster.driver.nodes.by_key[key]
        return peer.link is not self.live_from.get(key, False)

    def node_rows(self, asking: bool) -> List[dict]:
        """Return the rows of its nodes, see `node_row`. With `asking`, some of the nodes are asked
        for their free resources. The driver's thread."""
        cluster = self.cluster
        overview = cluster.driver.overview
        left = 0
        if asking:
            left = REPORTS_A_TURN
        apart = REPORTS_APART
        if self.looks_only:
            apart = SAMPLES_APART
        rows = []
        nodes = cluster.driver.queries.nodes_of(cluster.comp)
        for peer, state, reason, cpus, _ in nodes:
            if left and overview.ask_node(peer, cluster.comp, apart):
                left -= 1
            rows.append(self._node_row(peer, state, reason, cpus))
        return rows

    def _node_row(self, peer: Any, state: str, reason: str, cpus: int) -> dict:
        comp = self.cluster.comp
        overview = self.cluster.driver.overview
        free = overview.free_at(peer, comp)
        by_comp = overview.running_at(peer.key)
        running, used = by_comp.get(comp, (0, 0))
        known = overview.node_row(peer, free)
        row = node_row(known, state, reason, cpus, running, used)
        if self.looks_only:   # the number of jobs of all users of the node
            row['cpus'] = peer.offered
            row['used'] = free.get('busy', 0)
            holder = peer.facts.get('holder', '')
            row['holder'] = str(free.get('holder', holder))
        return row


def sight_of(row: Optional[tuple]) -> Optional[JobSight]:
    """Return what a scheduler has reported of a job in its own form."""
    if row is None:
        return None
    return JobSight(*row)


# (address, name) of a node -> serial -> job there
SentTo = Dict[Tuple[str, str], Dict[int, DispyJob]]


class SharedClusterView(ClusterView):
    """A SharedJobCluster that is shown. Its nodes are those of the scheduler, which is asked for
    them. The scheduler tells the cluster where its jobs are."""

    def __init__(self, number: int, cluster: Any) -> None:
        super().__init__(number, cluster)
        self._known: Dict[Any, NodeInfo] = {}   # nodes by their keys
        self._sent: SentTo = {}

    def refresh(self) -> None:
        """Ask the scheduler for its nodes. While the scheduler is away, it is shown instead of its
        nodes, with the reason."""
        cluster = self.cluster
        driver = cluster.driver
        sent: SentTo = {}
        for job, place in cluster.delivery.places.copy().items():
            there = sent.setdefault((place.ip_addr, place.name), {})
            there[job.serial] = job
        self._sent = sent
        try:
            rows = dispy.pages_of_nodes(self._page_of_nodes)
        except (ConnectionError, concurrent.futures.TimeoutError):
            own = driver.ask(lambda: driver.queries.rows_of(cluster.comp))
            rows = [row._replace(cpus=0) for row in own]
        self._known = {row.key: row for row in rows}

    def _page_of_nodes(self, first: int, most: int) -> List[tuple]:
        cluster = self.cluster
        calls = cluster.driver.calls
        future = cluster.driver.ask(lambda: calls.call(cluster.comp, 'nodes', first, most))
        return dispy.answer_of(future, dispy.CALL_TIME)  # type: ignore[no-any-return]

    def nodes(self) -> List[Any]:
        """Return the nodes that the scheduler has reported."""
        return list(self._known.values())

    def sent_to(self, key: Any) -> Dict[int, DispyJob]:
        """Return a dictionary from serials to the jobs that are on a node of the scheduler."""
        row = self._known.get(key)
        if row is None:
            return {}
        return self._sent.get((row.ip_addr, row.name), {})

    def _running_at(self, row: NodeInfo) -> List[int]:
        """Return the serials of the jobs that run on a node: those that are known to have begun,
        then the first of the others, as many as the scheduler reports."""
        begun = []
        others = []
        for serial, job in self.sent_to(row.key).items():
            if job.status in (DispyJob.Running, DispyJob.ProvisionalResult):
                begun.append(serial)
            elif job.status == DispyJob.Created:
                others.append(serial)
        more = max(0, row.busy - len(begun))
        return begun + others[:more]

    def jobs_at(self, key: Any) -> List[JobAtNode]:
        """Return the jobs on a node. How long a job has run follows from its start_time."""
        running = set(self._running_at(self._known[key]))
        rows = []
        for serial, job in self.sent_to(key).items():
            rows.append(JobAtNode(serial, job, serial in running, None))
        return rows

    known_jobs_at = jobs_at

    def sights(self, numbers: List[int], wants_stacks: bool) -> List[Optional[JobSight]]:
        """Return what jobs do, as the scheduler reports it."""
        cluster = self.cluster
        calls = cluster.driver.calls
        places = cluster.delivery.places.copy()
        known = {job_number(job.serial): job.serial for job in places}
        serials = [known.get(number, 0) for number in numbers]
        future = cluster.driver.ask(
            lambda: calls.call(cluster.comp, 'looks', serials, wants_stacks))
        rows = dispy.answer_of(future, dispy.CALL_TIME)
        return list(map(sight_of, rows))

    def is_live(self, key: Any) -> bool:
        """Return whether the scheduler passes output on while jobs run."""
        links = {peer.link for peer in self._peers()}
        return not links & set(self.live_from.values())

    def node_rows(self, asking: bool) -> List[dict]:
        """Return the rows of the scheduler's nodes. The nodes are not asked."""
        return [self._known_row(row) for row in self.nodes()]

    def _known_row(self, row: NodeInfo) -> dict:
        # The scheduler knows it from the beginning only
        free = dict(row.facts.get('available', {}), cpu=None)
        running = self._running_at(row)
        sent = self.sent_to(row.key)
        used = sum(dispy.cpus_of(sent[serial]) for serial in running)
        known = dispy.row_of_node(row, free, None)
        return node_row(known, row.state, row.reason, row.cpus, len(running), used)


def node_row(known: dict, state: str, reason: str, cpus: int, running: int, used: int) -> dict:
    """Return the row of a node for the page, made from a row of `dispy.row_of_node` and from how
    the node is used."""
    row = {name: known[name] for name in ('key', 'name', 'address', 'port', 'offered', 'platform')}
    row['state'] = dispy.shown_state(state, reason)
    row['reason'] = reason.strip()[-2000:]
    row['cpus'] = cpus
    row['running'] = running
    row['used'] = used
    row['resources'] = ', '.join('%s %d of %d' % (name, used, count) for name, (used, count)
                                 in known.get('resources', {}).items())
    row['holder'] = ''
    row['memory'], row['disk'], idle = known['free']
    memory, disk = known.get('totals', (None, None))
    row['memory_total'] = memory
    row['disk_total'] = disk
    row['load'] = None
    if idle is not None:
        row['load'] = round(100.0 - idle, 1)
    row['heard'] = known['heard']
    if row['heard'] is not None:
        row['heard'] = round(row['heard'], 1)
    return row


def gone_row(peer: Any) -> dict:
    """Return the row of a node that no cluster uses any more."""
    row = dispy.row_of_node(peer, {}, None)
    row['offered'] = 0
    return node_row(row, 'closed', 'no cluster uses it any more', 0, 0, 0)


def use_row(use: NodeUse, name: str) -> dict:
    """Return a description for the page of how a cluster of this name uses a node."""
    row: Dict[str, Any] = use._asdict()
    del row['running']
    row['name'] = name
    row['job_seconds'] = round(row.pop('seconds'), 3)
    return row


NEW_JOB_ROW: Dict[str, Any] = {
    'arguments': None,
    'state': 'waits there',
    'seconds': None,
    'stdout': b'',
    'stderr': b'',
    'live': None,
}


def job_row(cluster: int, job: int, name: Any, is_running: bool,
            seconds: Optional[float]) -> Dict[str, Any]:
    """Return the row of a job on a node. Its arguments and its output are filled in later. `job` is
    its number for `cancel`, `name` its id."""
    row = dict(NEW_JOB_ROW)
    row['cluster'] = cluster
    row['job'] = job
    row['id'] = name
    if is_running:
        row['state'] = 'running'
    if seconds is not None:
        row['seconds'] = round(max(0.0, seconds), 1)
    return row


def cluster_row(row: dict, history: History, closed: bool = False) -> dict:
    """Return the row of a cluster, with figures derived from its numbers."""
    ended = row['done'] + row['failed'] + row['cancelled']
    pending = max(0, row['submitted'] - ended)
    running = min(pending, row['running'])
    rate = 0.0
    if not closed:
        now = time.time()
        rate = history.add(now, ended, row['used'], row['cpus'])
    left = None
    if pending and rate > 0:
        left = round(pending / rate, 1)
    row = dict(row)
    row['waiting'] = pending - running
    row['running'] = running
    row['rate'] = round(rate, 3)
    row['left'] = left
    row['elapsed'] = round(row['elapsed'], 1)
    row['job_seconds'] = round(row['job_seconds'], 3)
    row['plot'] = history.points
    row['state'] = _cluster_state(closed, pending, row['nodes'])
    return row


def _cluster_state(closed: bool, pending: int, nodes: int) -> str:
    if closed:
        return 'closed'
    if not pending:
        return 'idle'
    if nodes:
        return 'working'
    return 'waiting for a node'


class ClusterJobs:
    """The jobs of a ClusterSource one by one, see `JobList`. Requests and the snapshot thread use
    this class, one at a time."""

    def __init__(self, source: 'ClusterSource') -> None:
        self._source = source
        self._known: Dict[int, int] = {}   # number of a cluster -> number of its last ended job
        self.unlisted = 0

    def ended(self) -> List[Tuple[EndedJob, str]]:
        """Return the jobs that have ended since the last call, with the ids of nodes."""
        rows: List[Tuple[EndedJob, str]] = []
        for watched in self._source.watched():
            known = self._known.get(watched.number, 0)
            for job in watched.ended_jobs.since(known, dispy.ENDED_KEPT):
                self._known[watched.number] = job.number
                node = ''
                if job.node is not None:
                    node = self._source.node_id(watched, job.node)
                rows.append((job, node))
        return rows

    def current(self) -> List[dict]:
        """Return the rows of jobs that run, and of the first of those that wait."""
        rows = []
        self.unlisted = 0
        for watched in self._source.watched():
            there = self._at_nodes(watched)
            rows += there
            rows += self._waiting(watched, {row['job'] for row in there})
        return rows

    def running(self) -> List[dict]:
        """Return the rows of jobs that run."""
        rows = []
        for watched in self._source.watched():
            rows += self._at_nodes(watched)
        return [row for row in rows if row['state'] == 'running']

    def _at_nodes(self, watched: ClusterView) -> List[dict]:
        """Return the rows of a cluster's jobs that were sent to nodes."""
        if watched.looks_only or watched.cluster.closed:
            return []
        turn = functools.partial(self._turn, watched)
        try:
            found = watched.cluster.driver.ask(turn)
        except RuntimeError:   # closed in the meantime
            return []
        rows = []
        now = time.time()
        for key, where, (serial, job, is_running, seconds) in found:
            row = self._row(watched, job, 'waits there')
            row['job'] = job_number(serial)
            row['node'] = self._source.node_id(watched, key)
            row['where'] = where
            row['attempts'] = attempt_number(serial)
            if is_running:
                row['state'] = 'running'
                row['began'] = job.start_time or now
                if seconds is not None:
                    row['began'] = now - seconds
                row['seconds'] = max(0.0, now - row['began'])
            rows.append(row)
        return rows

    @staticmethod
    def _turn(watched: ClusterView) -> List[Tuple[Any, str, JobAtNode]]:
        """Return the jobs on all nodes of a cluster, with the keys and the names of the nodes. The
        driver's thread."""
        rows = []
        for peer in watched.nodes():
            for job in watched.known_jobs_at(peer.key):
                rows.append((peer.key, peer.name or peer.ip_addr, job))
        return rows

    def _waiting(self, watched: ClusterView, at_nodes: Set[int]) -> List[dict]:
        waiting = []
        for job in watched.cluster.book.jobs_owed():
            number = job_number(job.serial)
            if number and number not in at_nodes and job.status not in dispy.ENDED:
                waiting.append((number, job))
        first = heapq.nsmallest(WAITING_LISTED, waiting, key=operator.itemgetter(0))
        self.unlisted += len(waiting) - len(first)
        return [self._row(watched, job, 'waiting') for _, job in first]

    @staticmethod
    def _row(watched: ClusterView, job: DispyJob, state: str) -> dict:
        row = listed_job(watched.number, job_number(job.serial), job.id, state)
        row['payload'] = job.payload
        row['known'] = job.payload is not None
        row['submitted'] = job.submit_time
        row['cpus'] = dispy.cpus_of(job)
        row['lost_with'] = list(job.lost_with)
        row['object'] = job
        return row

    def failures(self) -> List[FailedJob]:
        """Return the last jobs of each cluster that have failed."""
        rows: List[FailedJob] = []
        for watched in self._source.watched():
            rows += watched.failed_jobs.all()
        return rows

    def arguments(self, rows: List[dict]) -> List[Any]:
        """Return the packed arguments of jobs; those that have ended have none any more."""
        return [None for _ in rows]

    def sights(self, keys: List[JobKey], wants_stacks: bool) -> List[Optional[JobSight]]:
        """Return what running jobs do, in this order."""
        by_cluster: Dict[int, List[int]] = {}
        for cluster, number in keys:
            of_cluster = by_cluster.setdefault(cluster, [])
            of_cluster.append(number)
        found: Dict[JobKey, Optional[JobSight]] = {}
        for cluster, numbers in by_cluster.items():
            watched = self._source.cluster(cluster)
            sights = watched.sights(numbers, wants_stacks)
            for number, sight in zip(numbers, sights):
                found[cluster, number] = sight
        return [found[key] for key in keys]

    def details(self, row: dict) -> dict:
        """Return what a job that has not ended has printed, and on which nodes it was lost
        before."""
        watched = self._source.cluster(row['cluster'])
        job = row['object']
        stdout, stderr = watched.output.get(job, (b'', b''))
        return {'stdout': stdout, 'stderr': stderr}

    def attempts(self, row: dict) -> List[FailedAttempt]:
        """Return the attempts of a job that have failed, if the job may be tried again."""
        for watched in self._source.watched():
            if watched.number == row['cluster'] and not watched.cluster.closed:
                return watched.failed_attempts(row['job'])
        return []


class ClusterSource:
    """Shows the clusters of this program or, with a `NodeMonitor`, nodes beside any program."""
    text = 'clusters of this program'
    nothing = 'No cluster is shown: the program has none, or has removed it (del_cluster).'
    manages = True
    shared = False
    is_up = True      # whether the shown clusters or nodes can be asked
    home = 'clusters'   # the first page
    page = ''   # the link to the page that shows them

    def __init__(self) -> None:
        # Guards the two below; user threads, requests, snapshot thread
        self._lock = threading.Lock()
        self._watched: List[ClusterView] = []
        self._count = 0
        # A node's id begins with the number of its driver here; snapshot thread and requests
        self._drivers: List[Any] = []
        self.job_list = JobList(ClusterJobs(self))

    def measures(self) -> Dict[str, float]:
        """Return metrics of everything that is shown, by the fields of SCHEDULER_METRICS."""
        return {}

    def add(self, cluster: Any) -> None:
        """Begin to observe a cluster. Raises TypeError for another object, RuntimeError if the
        cluster was closed."""
        if not isinstance(cluster, (JobCluster, NodeMonitor)):
            raise TypeError('%.80r is not a cluster' % (cluster,))
        kind: Type[ClusterView] = ClusterView
        if isinstance(cluster, SharedJobCluster):
            kind = SharedClusterView
        with self._lock:
            if any(watched.given is cluster for watched in self._watched):
                return
            self._count += 1
            watched = kind(self._count, cluster)
            watched.page = self.page
            driver = watched.cluster.driver
            driver.ask(watched.attach)
            self._watched.append(watched)
            if driver not in self._drivers:
                self._drivers.append(driver)

    def publish(self, page: str) -> None:
        """Tell the clusters that this is the link to their page."""
        with self._lock:
            self.page = page
            for watched in self._watched:
                watched.page = page

    def remove(self, cluster: Any) -> None:
        """Stop observing a cluster. Nothing happens if it was not observed."""
        with self._lock:
            for watched in list(self._watched):
                if watched.given is not cluster:
                    continue
                self._watched.remove(watched)
                if not watched.looks_only:
                    core = watched.cluster
                    detach = functools.partial(core.live_output.remove_monitor, watched)
                    with contextlib.suppress(RuntimeError):   # the driver has ended
                        core.driver.ask(detach)

    def close(self) -> None:
        """Stop observing all clusters."""
        for watched in self.watched():
            self.remove(watched.given)

    def watched(self) -> List[ClusterView]:
        """Return a copy of the list. Any thread."""
        with self._lock:
            return list(self._watched)

    # -- snapshots; their thread -------------------------------------------------------------------

    def snapshot(self, asking: bool) -> Tuple[List[dict], List[dict], float]:
        """Return the rows of clusters and of nodes, and the seconds of the drivers' threads that
        this took. With `asking`, nodes are asked for their free resources."""
        clusters: List[dict] = []
        nodes: Dict[str, dict] = {}
        cost = 0.0
        for watched in self.watched():
            rows, counts, took = self._look(watched, asking)
            cost += took
            if not watched.looks_only:
                clusters.append(self._cluster_row(watched, rows, counts))
            self._merge(watched, rows, nodes)
        return clusters, list(nodes.values()), cost

    def _look(self, watched: ClusterView, asking: bool) -> Tuple[List[dict], Dict[str, int], float]:
        """Do what `_turn` does, from another thread. A cluster that is closed has no nodes."""
        cluster = watched.cluster
        if not cluster.closed:
            try:
                watched.refresh()
                return cluster.driver.ask(  # type: ignore[no-any-return]
                    functools.partial(self._turn, watched, asking))
            except RuntimeError:
                logger.debug('%s was closed meanwhile, or its driver has failed', cluster.name)
        watched.closed_at = watched.closed_at or time.time()
        return [], counts_of(cluster), 0.0

    @staticmethod
    def _turn(watched: ClusterView, asking: bool) -> Tuple[List[dict], Dict[str, int], float]:
        """Return the rows of a cluster's nodes, its counts, and the seconds that this took. The
        driver's thread does nothing else in the meantime, so that the jobs on nodes and those that
        have ended are consistent."""
        began = time.perf_counter()
        cluster = watched.cluster
        cluster.driver.jobs.take_submitted()
        rows = watched.node_rows(asking)
        counts = counts_of(cluster)
        return rows, counts, time.perf_counter() - began

    @staticmethod
    def _cluster_row(watched: ClusterView, rows: List[dict], counts: Dict[str, int]) -> dict:
        cluster = watched.cluster
        ready = [row for row in rows if row['state'] == 'ready']
        row: Dict[str, Any] = dict(counts)
        row['number'] = watched.number
        row['name'] = cluster.name
        row['program'] = ''
        row['running'] = sum(row['running'] for row in rows)
        row['used'] = sum(row['used'] for row in rows)
        row['cpus'] = sum(row['cpus'] for row in ready)
        row['nodes'] = len(ready)
        until = watched.closed_at or time.time()
        row['elapsed'] = until - cluster.book.began
        counted = cluster.jobs_at_nodes().values()
        row['job_seconds'] = sum(seconds for _, _, seconds in counted)
        return cluster_row(row, watched.history, bool(watched.closed_at))

    def _prefix(self, watched: ClusterView) -> str:
        """Return the beginning of the ids of a cluster's nodes."""
        place = self._drivers.index(watched.cluster.driver)
        return '%d.' % (place + 1)

    def node_id(self, watched: ClusterView, key: Any) -> str:
        """Return the id of a cluster's node by its key."""
        return self._prefix(watched) + key_text(key)

    def _merge(self, watched: ClusterView, rows: List[dict], nodes: Dict[str, dict]) -> None:
        """Merge the rows of one cluster's nodes into those of all clusters."""
        prefix = self._prefix(watched)
        counts = watched.cluster.jobs_at_nodes()
        for row in rows:
            key = row.pop('key')
            row['id'] = prefix + key_text(key)
            place = (row['address'], row['port'], row['name'])
            _, jobs, seconds = counts.pop(place, (None, 0, 0.0))
            self._put(nodes, row, watched, jobs, seconds)
        for peer, jobs, seconds in counts.values():   # nodes that are not used any more
            row = gone_row(peer)
            del row['key']
            row['id'] = '%sgone:%s:%d:%s' % (prefix, *dispy.place_of(peer))
            self._put(nodes, row, watched, jobs, seconds)

    @staticmethod
    def _put(nodes: Dict[str, dict], row: dict, watched: ClusterView, jobs: int,
             seconds: float) -> None:
        """Add the row of a cluster's node to those of all clusters. `jobs` have ended there and ran
        for so many seconds."""
        there = nodes.setdefault(row['id'], row)
        if there is row:
            there['clusters'] = []
            there['jobs'] = 0
            there['job_seconds'] = 0.0
        if not watched.looks_only:
            state = {name: row[name] for name in ('state', 'reason', 'cpus', 'running', 'used')}
            use = NodeUse(number=watched.number, jobs=jobs, seconds=seconds, **state)
            there['clusters'].append(use_row(use, watched.cluster.name))
        there['jobs'] += jobs
        total = there['job_seconds'] + seconds
        there['job_seconds'] = round(total, 3)
        if there is not row:
            merge_uses(there, row)

    # -- one node ----------------------------------------------------------------------------------

    def _uses(self, node: str, number: Optional[int] = None) -> List[Tuple[ClusterView, Any]]:
        """Return (cluster, key of its node) for each cluster that uses the node with this id.
        Raises Refusal if there is none."""
        found = []
        for watched in self.watched():
            prefix = self._prefix(watched)
            if number not in (None, watched.number):
                continue
            if watched.cluster.closed or not node.startswith(prefix):
                continue
            for peer in watched.cluster.driver.ask(watched.nodes):
                if prefix + key_text(peer.key) == node:
                    found.append((watched, peer.key))
        if found:
            return found
        where = ''
        if number is not None:
            where = ' in cluster %d' % number
        raise Refusal(404, 'there is no node %.80s%s' % (node, where))

    def jobs(self, node: str) -> List[dict]:
        """Return the rows of a node's jobs. Any thread but a driver's."""
        rows: List[dict] = []
        for watched, key in self._uses(node):
            turn = functools.partial(self._jobs_turn, watched, key)
            try:
                rows += watched.cluster.driver.ask(turn)
            except RuntimeError:   # closed in the meantime
                continue
        return rows

    @staticmethod
    def _jobs_turn(watched: ClusterView, key: Any) -> List[dict]:
        """Return the rows of a cluster's jobs on a node. The driver's thread; opening the arguments
        takes time and is left to the caller."""
        rows = []
        live = watched.is_live(key)
        now = time.time()
        for serial, job, is_running, seconds in watched.jobs_at(key):
            if seconds is None:   # that it was sent is known at least
                seconds = now - (job.start_time or now)
            row = job_row(watched.number, job_number(serial), job.id, is_running, seconds)
            row['arguments'] = job.payload
            row['live'] = live
            if job in watched.output:
                row['stdout'], row['stderr'] = watched.output[job]
            rows.append(row)
        return rows

    def complete(self, rows: List[dict]) -> None:
        """Fill in those parts of the rows of shown jobs that take time. Any thread."""
        running = [row for row in rows if row['state'] == 'running']
        silent = [row for row in running if not row['live']]
        self.job_list.show_output(silent)
        for row in rows:
            if self.job_list.shows_arguments:
                row['arguments'] = arguments_text(row['arguments'])
            else:
                row['arguments'] = ''

    # -- changes -----------------------------------------------------------------------------------

    def cluster(self, number: int) -> ClusterView:
        """Return the cluster with this number. Raises Refusal."""
        for watched in self.watched():
            if watched.number == number:
                return watched
        raise Refusal(404, 'there is no cluster %d' % number)

    def cancel(self, cluster: int, jobs: Any, node: Optional[str] = None) -> int:
        """End jobs on a node or, if none is named, jobs that are listed wherever they are. Return
        the number of jobs."""
        numbers = chosen_jobs(jobs, node)
        if node is not None:
            (watched, key), = self._uses(node, cluster)
        else:
            watched = self.cluster(cluster)
        driver = watched.cluster.driver

        def end() -> int:
            if node is None:
                chosen = watched.cluster.book.jobs_owed()
            else:
                chosen = list(watched.sent_to(key).values())
            if numbers is not None:
                wanted = frozenset(numbers)
                chosen = [job for job in chosen if job_number(job.serial) in wanted]
            for job in chosen:
                driver.cancels.cancel(job)
            return len(chosen)
        return driver.ask(end)  # type: ignore[no-any-return]

    def cancel_waiting(self, cluster: int) -> int:
        """End jobs that have not begun, including those that wait on nodes. Return the number of
        jobs."""
        watched = self.cluster(cluster).cluster
        driver = watched.driver
        return driver.ask(  # type: ignore[no-any-return]
            lambda: driver.cancels.cancel_waiting(watched.comp))

    def add_node(self,
                 cluster: int,
                 host: str,
                 port: Optional[int] = None,
                 cpus: Optional[int] = None) -> int:
        """Look for a node."""
        self.cluster(cluster).given.discover_nodes([(host, port, cpus)])
        return 1

    def _each(self, node: str, cluster: Optional[int], call: Callable[..., Any]) -> int:
        uses = self._uses(node, cluster)
        for watched, key in uses:
            call(watched.given, key)
        return len(uses)

    def use(self, node: str, cluster: Optional[int] = None) -> int:
        """Use a node again that was drained or released."""
        return self._each(node, cluster, JobCluster.allocate_node)

    def drain(self, node: str, cluster: Optional[int] = None) -> int:
        """Send no more jobs to a node."""
        return self._each(node, cluster, JobCluster.deallocate_node)

    def release(self, node: str, cluster: Optional[int] = None) -> int:
        """Release a node when its jobs have ended."""
        return self._each(node, cluster, JobCluster.close_node)

    def cpus(self, node: str, cpus: int, cluster: Optional[int] = None) -> int:
        """Use at most so many CPUs of a node."""
        def limit(which: Any, key: Any) -> None:
            which.set_node_cpus(key, cpus)
        return self._each(node, cluster, limit)


# The state of a node that several clusters use is the first of their states in this order
_STATE_ORDER = [
    'ready', 'draining', 'drained', 'setting up', 'asking', 'connected', 'dialling', 'waiting',
    'found', 'refused', 'down', 'unreachable', 'no such name', 'no name service', 'lost', 'closed'
]


def merge_uses(there: dict, row: dict) -> None:
    """Add what another cluster knows of a node to the node's row."""
    most = max(there['offered'], row['cpus'], there['cpus'])
    used = there['used'] + row['used']
    there['used'] = min(used, most)
    there['cpus'] = max(there['cpus'], row['cpus'])
    rank = _STATE_ORDER.index(row['state'])
    if rank < _STATE_ORDER.index(there['state']):
        there['state'] = row['state']
        there['reason'] = row['reason']


# What differs from job to job where the fault is the same: numbers, addresses of objects
VARIES = re.compile(r'0x[0-9a-fA-F]+|\d+(?:\.\d+)*(?:[eE][-+]?\d+)?')


def pattern_of(line: str, names: Sequence[str] = ()) -> str:
    """Return the last line of a traceback in which # replaces each number, and each name of a
    node."""
    for name in names:
        if len(name) > 1:
            line = line.replace(name, '#')
    return VARIES.sub('#', line)


def group_key(row: dict) -> str:
    """Return what the jobs of a cluster that failed for the same reason have in common."""
    pattern = pattern_of(last_line(row['text']), (row['where'],))
    digest = hashlib.blake2b(pattern.encode('utf-8', 'replace'), digest_size=8)
    return '%d-%s' % (row['cluster'], digest.hexdigest())


def grouped(rows: Iterable[dict]) -> List[Tuple[str, List[dict]]]:
    """Return the keys of the groups of failed jobs, and their jobs in the order in which they
    failed."""
    groups: Dict[str, List[dict]] = {}
    failed = [row for row in rows if row['state'] == 'failed']
    for row in sorted(failed, key=operator.itemgetter('ended')):
        members = groups.setdefault(group_key(row), [])
        members.append(row)
    return list(groups.items())


def group_row(key: str, members: List[dict], jobs: JobList) -> dict:
    """Return the row of a group of failed jobs for the page."""
    last = members[-1]
    lines = {last_line(row['text']) for row in members}
    text = last_line(last['text'])
    if len(lines) > 1:
        text = pattern_of(text, (last['where'],))
    newest = members[:-11:-1]
    jobs.fill_in(newest)
    row: Dict[str, Any] = {'group': key, 'text': text}
    row['count'] = len(members)
    row['cluster'] = last['cluster']
    row['last'] = last['ended']
    row['trace'] = last['text']
    row['jobs'] = [_failed_row(jobs.shown(failed)) for failed in newest]
    return row


def _failed_row(shown: dict) -> dict:
    row = {name: shown[name] for name in ('job', 'id', 'arguments', 'status')}
    row['node'] = shown['where']
    row['time'] = shown['ended']
    return row


def key_text(key: Any) -> str:
    """Return the key by which a driver knows a node, for an id: HOST:PORT, or one word."""
    if isinstance(key, tuple):
        return ':'.join(map(str, key))
    return str(key)


def chosen_jobs(jobs: Any, node: Optional[str]) -> Optional[List[int]]:
    """Return the numbers of jobs in a request, None for all jobs of a node. Raises Refusal."""
    if jobs == 'all' and node is not None:
        return None
    if isinstance(jobs, list):
        kinds = set(map(type, jobs))
        if kinds <= {int}:
            return jobs
    raise Refusal(400, "jobs is neither a list of numbers nor, of a node, 'all'")


def counts_of(cluster: Any) -> Dict[str, int]:
    """Return how many jobs of a cluster were submitted and how many have ended. Any thread."""
    submitted, done, failed, cancelled = cluster.jobs_counted()
    return {'submitted': submitted, 'done': done, 'cancelled': cancelled, 'failed': failed}


class NodeMonitor(dispy.NodeScan):
    """Observes nodes for a source. Their lease remains with the client that has it."""
    name = 'nodes'

    def close(self) -> None:
        """Release the nodes. It may be called twice."""
        if not self.closed:
            self.closed = True
            with contextlib.suppress(RuntimeError):   # the driver has failed
                super().close()


class NodesSource(ClusterSource):
    """Shows nodes, whatever program uses them, and does not change them."""
    text = 'nodes, whoever uses them'
    nothing = 'This monitor shows nodes and no clusters: see the page Nodes.'
    manages = False
    home = 'nodes'

    def __init__(self, survey: NodeMonitor) -> None:
        super().__init__()
        self.add(survey)

    def close(self) -> None:
        """Release the nodes."""
        for watched in self.watched():
            watched.given.close()
        super().close()


class SchedulerLink(dispy.NodeScan):
    """A link to a dispyscheduler like that of a program. For the driver it is a cluster that only
    observes."""
    name = 'a web monitor'

    def __init__(self, host: str, port: int, access: ConnectionSettings) -> None:
        self.specs = [NodeSpec(host, port, scheduler=True)]
        self.address = (host, port)
        self.port = port
        self.comp = uuid.uuid4().hex
        self.driver = drivers.acquire(access)
        self.driver.ask(lambda: self.driver.open(self, False))

    def why_not(self) -> str:
        """Return why the scheduler cannot be asked if that is known, or an empty text if it can be
        asked."""
        until = time.monotonic() + HANDSHAKE_TIME
        while True:
            peer, = self.driver.ask(lambda: self.driver.nodes.of(self.comp))
            if peer.link is not None and peer.name:
                return ''
            if peer.failures or time.monotonic() >= until:
                return str(peer.reason).strip() or 'it does not answer'
            time.sleep(0.02)

    def ask(self, *question: Any) -> Any:
        """Return what `ProgramOverview.answer` of the scheduler returns, and raise what it raises.
        Raises RuntimeError if the scheduler is not connected. Any thread."""
        calls = self.driver.calls
        try:
            future = self.driver.ask(lambda: calls.call(self.comp, 'overview', *question))
            return dispy.answer_of(future, dispy.CALL_TIME)
        except ConnectionError:
            row, = self.driver.ask(lambda: self.driver.queries.rows_of(self.comp))
            where = dispy.format_address(row.key[1], row.key[2])
            why = row.reason or row.state
            raise RuntimeError('the scheduler %s is not connected: %s' % (where, why)) from None


class SchedulerJobs:
    """The jobs of a SchedulerSource one by one, see `JobList`. Requests and the snapshot thread use
    this class, one at a time."""

    def __init__(self, source: 'SchedulerSource') -> None:
        self._source = source
        self._known = 0
        self.unlisted = 0

    def _all(self, name: str, *args: Any, most: int = sys.maxsize) -> List[Any]:
        """Return all rows of an answer that comes in pages."""
        rows: List[Any] = []
        while len(rows) < most:
            page = self._source.ask(name, *args, len(rows), JOBS_PAGE)
            rows += page
            if len(page) < JOBS_PAGE:
                break
        return rows

    def ended(self) -> List[Tuple[EndedJob, str]]:
        """Return the jobs that have ended since the last call, with the ids of nodes."""
        found = []
        while True:
            rows = self._source.ask('ended', self._known)
            for job in itertools.starmap(EndedJob, rows):
                self._known = job.number
                node = ''
                if job.node is not None:
                    node = scheduler_node_id(job.node)
                found.append((job, node))
            if not rows:
                return found

    def current(self) -> List[dict]:
        """Return the rows of jobs that are on nodes, and of the first of those that wait."""
        rows = self._at_nodes()
        self.unlisted = 0
        for cluster, count in self._source.waiting().items():
            waiting = self._all('waiting', cluster, most=WAITING_LISTED)
            if len(waiting) >= WAITING_LISTED:   # about: they were counted before
                self.unlisted += max(0, count - len(waiting))
            for job in waiting:
                number = job_number(job)
                row = listed_job(cluster, job, number, 'waiting')
                rows.append(row)
        return rows

    def running(self) -> List[dict]:
        """Return the rows of jobs that run."""
        return [row for row in self._at_nodes() if row['state'] == 'running']

    def _at_nodes(self) -> List[dict]:
        rows = []
        now = time.time()
        names = self._source.node_names()
        for cluster, job, attempt, key, is_running, seconds, cpus in self._all('at_nodes'):
            row = listed_job(cluster, job, job_number(job), 'waits there')
            row['node'] = scheduler_node_id(key)
            row['where'] = names.get(row['node'], '')
            row['attempts'] = attempt
            row['cpus'] = cpus
            if is_running:
                row['state'] = 'running'
                row['seconds'] = seconds or 0.0
                row['began'] = now - row['seconds']
            rows.append(row)
        return rows

    def failures(self) -> List[FailedJob]:
        """Return the last jobs that have failed."""
        return self._source.failed_jobs()

    def arguments(self, rows: List[dict]) -> List[Any]:
        """Return the packed arguments of jobs, None for those that have ended."""
        jobs = [key_of(row) for row in rows]
        return self._source.ask('arguments', jobs)  # type: ignore[no-any-return]

    def details(self, row: dict) -> dict:
        """Return nothing: the output of a job is passed on to its program and is not kept."""
        return {}

    def attempts(self, row: dict) -> List[FailedAttempt]:
        """Return nothing: the program of a job decides whether the job is tried again."""
        return []

    def sights(self, keys: List[JobKey], wants_stacks: bool) -> List[Optional[JobSight]]:
        """Return what running jobs do, in this order."""
        rows = self._source.ask('looks', keys, wants_stacks)
        return list(map(sight_of, rows))


class HistoryRow(NamedTuple):
    """A job of the history that a scheduler keeps, in the form in which the scheduler sends it."""
    user: str
    proven: int      # whether that is shown by a secret
    program: str
    name: str        # of its computation
    job: int
    node: str
    began: float     # these two in s since the epoch
    ended: float
    cpus: int
    outcome: str     # 'done', 'failed' or 'cancelled'
    comp: str


class Accounts:
    """Sums over the history that a scheduler keeps (--history), for each day, user and computation.
    Each time the history is read on from where the reading stopped, some pages at a time. Requests
    use this class."""
    PAGES = 20       # of the history that are read for one request

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask
        self._lock = threading.Lock()    # guards all below
        self._after = 0
        self._last: Set[tuple] = set()   # jobs of the last page, of which more may come
        # (day, user, computation, its name) -> row
        self._sums: Dict[tuple, dict] = {}
        self.is_complete = False

    def read(self) -> List[dict]:
        """Read on, and return the sums. Raises RuntimeError if the scheduler is away, ValueError if
        it keeps no history."""
        with self._lock:
            for _ in range(self.PAGES):
                self.is_complete = self._read_page()
                if self.is_complete:
                    break
            if len(self._sums) > ACCOUNTS_KEPT:
                self._forget_oldest()
            return [dict(row) for row in self._sums.values()]

    def _read_page(self) -> bool:
        """Read a page. Return whether it is the last one for now."""
        after, rows = self._ask('history', self._after, 0.0)
        known = self._last
        self._last = set()
        for row in rows:
            job = HistoryRow(*row)
            key = (job.comp, job.job, job.ended)
            self._last.add(key)
            if key not in known:
                self._add(job)
        if after < 0:
            return True
        self._after = after
        self._last = set()
        return False

    def _add(self, job: HistoryRow) -> None:
        local = time.localtime(job.ended)
        day = time.strftime('%Y-%m-%d', local)
        user = job.user
        if user and not job.proven:
            user += ' (not proven)'
        key = (day, user, job.comp, job.name)
        row = self._sums.get(key)
        if row is None:
            row = dict(NEW_SUM)
            row['day'] = day
            row['user'] = user
            row['computation'] = job.name
            row['program'] = job.program
            self._sums[key] = row
        row['jobs'] += 1
        row[job.outcome] += 1
        seconds = job.ended - job.began
        row['cpu_seconds'] += seconds * job.cpus

    def _forget_oldest(self) -> None:
        keys = sorted(self._sums)
        count = len(keys) - ACCOUNTS_KEPT
        for key in keys[:count]:
            del self._sums[key]


SUMMED = ('jobs', 'done', 'failed', 'cancelled', 'cpu_seconds')
NEW_SUM: Dict[str, Any] = dict.fromkeys(SUMMED, 0)
OF_PROGRAMS = ('user', 'computation', 'program')
# What sums are asked by -> what a row of these is about
SUMMED_BY: Dict[str, Tuple[str, ...]] = {
    'user': ('user',), 'day': ('day',), 'computation': OF_PROGRAMS
}


def summed(rows: List[dict], by: str) -> List[dict]:
    """Return one row for each value of a field: 'user' or 'day', or for each computation of each
    program, over all days."""
    found: Dict[tuple, dict] = {}
    names = SUMMED_BY[by]
    for row in rows:
        key = tuple(row[name] for name in names)
        total = found.get(key)
        if total is None:
            total = dict(NEW_SUM)
            total['day'] = row['day']
            for name in OF_PROGRAMS:
                total[name] = ''
            total.update(zip(names, key))
            found[key] = total
        for field in SUMMED:
            total[field] += row[field]
        total['day'] = max(total['day'], row['day'])
    for row in found.values():
        row['cpu_seconds'] = round(row['cpu_seconds'], 3)
    return list(found.values())


def scheduler_node_id(key: Any) -> str:
    """Return the id of a node of a scheduler."""
    return '1.' + key_text(key)


class SchedulerSource:
    """Shows all clusters of all programs of a dispyscheduler. `ask` sends a question to its
    `ProgramOverview` and returns (seconds, answer)."""
    nothing = 'No program uses the scheduler now.'
    manages = True
    shared = True
    home = 'clusters'

    def __init__(self, ask: Callable[..., Tuple[float, Any]], text: str,
                 close: Callable[[], None]) -> None:
        self._ask = ask
        self._text = text
        self.text = text
        self.close = close
        self._histories: Dict[str, History] = {}
        self._failures: Deque[FailedJob] = collections.deque(maxlen=FAILURES_KEPT)
        self._names: Dict[str, str] = {}              # id of a node -> its name
        self._waiting: Dict[int, int] = {}            # number of a cluster -> jobs that wait
        self.job_list = JobList(SchedulerJobs(self))
        self.accounts = Accounts(self.ask)
        self._failed = 0                              # number of the last failure that was told
        self._lock = threading.Lock()                 # guards the three below: requests
        self._keys: Dict[str, Any] = {}               # id of a node -> its key there
        # Id -> when, what was told of its jobs
        self._jobs: Dict[str, Tuple[float, List[tuple]]] = {}
        # (cluster, job) -> arguments
        self._texts: 'collections.OrderedDict[Tuple[int, int], str]' = collections.OrderedDict()

    # -- snapshots; their thread -------------------------------------------------------------------

    @property
    def is_up(self) -> bool:
        """Return whether the scheduler could be asked."""
        return self.text == self._text

    def measures(self) -> Dict[str, float]:
        """Return metrics of the scheduler, or nothing if it does not send them."""
        try:
            return dict(self._ask('load')[1])
        except (RuntimeError, ValueError, concurrent.futures.TimeoutError) as exc:
            logger.debug('the load of the scheduler: %s', exc)
            return {}

    def _pages(self, name: str, *args: Any) -> Tuple[List[dict], float]:
        rows: List[dict] = []
        cost = 0.0
        while True:
            took, page = self._ask(name, len(rows), SCHEDULER_PAGE, *args)
            rows += page
            cost += took
            if len(page) < SCHEDULER_PAGE:
                return rows, cost

    def snapshot(self, asking: bool) -> Tuple[List[dict], List[dict], float]:
        """Return the rows as ClusterSource does. While the scheduler is away there is only the
        reason."""
        try:
            clusters, cost = self._pages('clusters')
            nodes, more = self._pages('nodes', asking)
            self._take_failures()
        except (RuntimeError, concurrent.futures.TimeoutError) as exc:
            self.text = str(exc) or 'the scheduler does not answer'
            self.accounts = Accounts(self.ask)
            self.job_list.forget()   # numbers may mean others when it is there again
            with self._lock:
                self._texts.clear()
                self._jobs.clear()
            return [], [], 0.0
        self.text = self._text
        by_number = {}
        for row in clusters:
            row.update(running=0, used=0, cpus=0, nodes=0)
            by_number[row['number']] = row
        found = {}
        for node in nodes:
            row = self._node_row(node, by_number)
            found[row['id']] = row
        self._keep_histories(clusters)
        self._names = {}
        for name, row in found.items():
            self._names[name] = row['name'] or row['address']
        with self._lock:
            self._keys = {}
            for name, row in found.items():
                self._keys[name] = row.pop('key')
        rows = [self._cluster_row(row) for row in by_number.values()]
        self._waiting = {row['number']: row['waiting'] for row in rows}
        return rows, list(found.values()), cost + more

    def _keep_histories(self, clusters: List[dict]) -> None:
        histories = {}
        for row in clusters:
            comp = row['comp']
            histories[comp] = self._histories.get(comp) or History()
        self._histories = histories

    def _cluster_row(self, row: dict) -> dict:
        connected = row.pop('connected')
        history = self._histories[row.pop('comp')]
        if not connected:
            row['program'] = (row['program'] + ' (not connected)').strip()
        return cluster_row(row, history)

    @staticmethod
    def _node_row(node: dict, clusters: Dict[int, dict]) -> dict:
        """Return a row of /api/nodes, and add what it contains about clusters to their rows."""
        uses = []
        refused = ''
        for use in itertools.starmap(NodeUse, node['uses']):
            cluster = clusters.get(use.number)
            if cluster is None:
                continue   # it began meanwhile
            uses.append(use_row(use, cluster['name']))
            _add_use(cluster, use)
            if use.reason and not refused:
                why = use.reason.strip()
                refused = '%s: %s' % (cluster['name'], why)
        state = node['state']
        reason = node['reason'].strip()
        if state == 'connected':
            if any(use['state'] == 'ready' for use in uses):
                state = 'ready'
            reason = reason or refused
        used = sum(use['used'] for use in uses)
        row = node_row(node, state, reason, node['cpus'], 0, used)
        row['id'] = scheduler_node_id(node['key'])
        row['clusters'] = uses
        row['jobs'] = node['jobs']
        row['job_seconds'] = round(node['job_seconds'], 3)
        return row

    def _take_failures(self) -> None:
        while True:
            rows = self._ask('failures', self._failed)[1]
            for row in itertools.starmap(FailedJob, rows):
                self._failed = row.number
                self._failures.append(row)
            if not rows:
                return

    # -- requests ----------------------------------------------------------------------------------

    def _key(self, node: str) -> Any:
        with self._lock:
            if node not in self._keys:
                raise Refusal(404, 'there is no node %.80s' % node)
            return self._keys[node]

    def jobs(self, node: str) -> List[dict]:
        """Return the rows of a node's jobs as ClusterSource does. The scheduler is asked at most
        four times a second. `complete` adds the arguments."""
        key = self._key(node)
        with self._lock:
            jobs = self._jobs_of(node, key)
        rows = []
        for cluster, job, is_running, seconds in jobs:
            row = job_row(cluster, job, job_number(job), is_running, seconds)
            rows.append(row)
        return rows

    def _jobs_of(self, node: str, key: Any) -> List[tuple]:
        """Return what the scheduler answers about the jobs on a node, or has answered a moment ago.
        The lock must be held."""
        now = time.monotonic()
        at, jobs = self._jobs.get(node, (-math.inf, []))
        if now - at < SNAPSHOTS_APART:
            return jobs
        jobs = self._ask('jobs', key)[1]
        now = time.monotonic()
        self._jobs[node] = (now, jobs)
        for name, (at, _) in list(self._jobs.items()):
            if now - at >= LOOKED_FOR:
                del self._jobs[name]
        return jobs

    def complete(self, rows: List[dict]) -> None:
        """Add the arguments to the rows of shown jobs. The scheduler is asked once for each of
        them."""
        running = [row for row in rows if row['state'] == 'running']
        self.job_list.show_output(running)
        jobs = [(row['cluster'], row['job']) for row in rows]
        with self._lock:
            missing = [job for job in jobs if job not in self._texts]
            payloads: Sequence[Any] = ()
            if missing:
                payloads = self._ask('arguments', missing)[1]
            for job, payload in zip(missing, payloads):
                self._texts[job] = 'it has ended meanwhile'
                if payload is not None:
                    self._texts[job] = arguments_text(payload)
            for job, row in zip(jobs, rows):
                row['arguments'] = self._texts[job]
            while len(self._texts) > TEXTS_KEPT:
                self._texts.popitem(last=False)

    def ask(self, *question: Any) -> Any:
        """Return the scheduler's answer. Raises RuntimeError if it is away."""
        return self._ask(*question)[1]

    def waiting(self) -> Dict[int, int]:
        """Return how many jobs of each cluster wait, by the numbers of the clusters."""
        return self._waiting

    def node_names(self) -> Dict[str, str]:
        """Return the names of nodes by their ids."""
        return self._names

    def failed_jobs(self) -> List[FailedJob]:
        """Return the last jobs that have failed."""
        return list(self._failures)

    # -- changes -----------------------------------------------------------------------------------

    def _order(self, *order: Any) -> int:
        return self._ask(*order)[1]  # type: ignore[no-any-return]

    def _for_all(self, name: str, node: str, cluster: Optional[int], *args: Any) -> int:
        if cluster is not None:
            raise ValueError('cluster: nodes of a scheduler are managed for all clusters at once')
        return self._order(name, self._key(node), *args)

    def cancel(self, cluster: int, jobs: Any, node: Optional[str] = None) -> int:
        """End jobs on a node or, if none is named, wherever they are. Return the number of jobs."""
        numbers = chosen_jobs(jobs, node)
        key = None
        if node is not None:
            key = self._key(node)
        return self._order('cancel', cluster, key, numbers)

    def cancel_waiting(self, cluster: int) -> int:
        """End jobs that do not run, including those that wait on nodes. Return the number of
        jobs."""
        return self._order('cancel_waiting', cluster)

    def add_node(self,
                 cluster: int,
                 host: str,
                 port: Optional[int] = None,
                 cpus: Optional[int] = None) -> int:
        """Look for a node, for all clusters whose `nodes` match it."""
        if cpus is not None:
            raise ValueError('cpus: set them when the node is there')
        return self._order('add', host, port)

    def use(self, node: str, cluster: Optional[int] = None) -> int:
        """Use a node again that was drained or released."""
        return self._for_all('use', node, cluster)

    def drain(self, node: str, cluster: Optional[int] = None) -> int:
        """Send no more jobs to a node."""
        return self._for_all('cpus', node, cluster, 0)

    def release(self, node: str, cluster: Optional[int] = None) -> int:
        """Release a node when its jobs have ended."""
        return self._for_all('release', node, cluster)

    def cpus(self, node: str, cpus: int, cluster: Optional[int] = None) -> int:
        """Let each cluster use at most so many CPUs of a node."""
        return self._for_all('cpus', node, cluster, cpus)


def _add_use(cluster: dict, use: NodeUse) -> None:
    """Add a node to the row of a cluster that uses it."""
    cluster['running'] += use.running
    cluster['used'] += use.used
    if use.state == 'ready':
        cluster['cpus'] += use.cpus
        cluster['nodes'] += 1


# --------------------------------------------------------------------------------------------------
# Views: from a snapshot and the words of a query, these make plain values for JSON.
# --------------------------------------------------------------------------------------------------

class Snapshot(NamedTuple):
    """Everything that is shown except jobs and failures. It is not changed after it was made."""
    version: int
    time: float
    cost: float
    clusters: List[dict]
    nodes: List[dict]
    final: bool


_PLAIN = frozenset((int, float, str, bool, type(None), bytes))


def id_text(number: Any) -> str:
    """Return the id of a job as text. It may be any object of the user's: a plain value is shown,
    for others only the type."""
    kind = type(number)
    if kind is str:
        return number[:200]  # type: ignore[no-any-return]
    parts = [number]
    if kind is tuple:
        parts = number
    if _PLAIN.issuperset(map(type, parts)):
        return SHORT.repr(number)
    return '<%s>' % kind.__name__


def number_in(query: Dict[str, str], name: str, default: int, low: int, high: int) -> int:
    text = query.pop(name, str(default))
    if re.fullmatch('[0-9]{1,19}', text):
        number = int(text)
        if low <= number <= high:
            return number
    raise Refusal(400, '%s=%.40s is not a number between %d and %d' % (name, text, low, high))


def _order(value: Any) -> Any:
    """Return the sort key. Numbers in texts count as numbers, so that node10 comes after node9."""
    if not isinstance(value, str):
        return value
    parts: List[Any] = re.split('([0-9]+)', value)
    parts[1::2] = map(int, parts[1::2])
    return parts


def table(rows: List[dict],
          query: Dict[str, str],
          columns: Sequence[str],
          descending: Sequence[str] = ()) -> dict:
    """Return the page of a table that a query requests, and remove the words for that from the
    query. Rows without a value to sort by come last. Raises Refusal."""
    sort = query.pop('sort', columns[0])
    if sort not in columns:
        raise Refusal(400, 'sort=%.40s: it is one of %s' % (sort, ', '.join(columns)))
    desc = number_in(query, 'desc', int(sort in descending), 0, 1)
    per = number_in(query, 'per', PER_PAGE, 1, PER_PAGE_MOST)
    pages = max(1, -(-len(rows) // per))
    page = min(number_in(query, 'page', 1, 1, 10 ** 9), pages)
    ordered = []
    without = []
    for row in rows:
        if row[sort] in (None, ''):
            without.append(row)
        else:
            ordered.append(row)
    ordered.sort(key=lambda row: _order(row[sort]), reverse=bool(desc))
    ordered += without
    first = (page - 1) * per
    found: Dict[str, Any] = {'rows': ordered[first:first + per]}
    found['total'] = len(rows)
    found['sort'] = sort
    found['desc'] = desc
    found['per'] = per
    found['page'] = page
    found['pages'] = pages
    return found


# Fields to sort a table by, the first if nothing else is said; those of NODE_DESCENDING begin with
# the largest
CLUSTER_FIELDS = ('number', 'name', 'state', 'waiting', 'running', 'done', 'failed', 'rate', 'left')
NODE_FIELDS = ('name', 'address', 'state', 'cpus', 'used', 'jobs', 'job_seconds', 'memory', 'disk',
               'load', 'heard')
NODE_DESCENDING = ('cpus', 'used', 'jobs', 'job_seconds', 'load')
JOB_FIELDS = ('seconds', 'job', 'cluster', 'state')
FAILURE_FIELDS = ('count', 'last', 'text', 'cluster')
ACCOUNT_FIELDS = ('cpu_seconds', 'jobs', 'done', 'failed', 'cancelled', 'user', 'day',
                  'computation')
ACCOUNT_DESCENDING = ('cpu_seconds', 'jobs', 'done', 'failed', 'cancelled', 'day')
LISTED_DESCENDING = ('time', 'seconds', 'attempts')
LISTED_ORDER = ('time', 'id', 'job', 'cluster', 'state', 'where', 'seconds', 'attempts',
                'submitted', 'began', 'ended')


def clusters_view(source: Any, snapshot: Snapshot, query: Dict[str, str]) -> dict:
    """Answer /api/clusters."""
    return table(snapshot.clusters, query, CLUSTER_FIELDS)


def nodes_view(source: Any, snapshot: Snapshot, query: Dict[str, str]) -> dict:
    """Answer /api/nodes."""
    found = table(snapshot.nodes, query, NODE_FIELDS, NODE_DESCENDING)
    rows = []
    for row in found['rows']:
        row = dict(row)
        del row['plot']
        rows.append(row)
    found['rows'] = rows
    return found


def jobs_of_all(clusters: List[dict]) -> Dict[str, int]:
    """Return how many jobs were submitted, how many have ended, and how many of these have failed,
    for all clusters that are open or, if none is, for all."""
    rows = [row for row in clusters if row['state'] != 'closed']
    found = {'submitted': 0, 'ended': 0, 'failed': 0}
    for row in rows or clusters:
        found['submitted'] += row['submitted']
        found['failed'] += row['failed']
        found['ended'] += row['failed']
        found['ended'] += row['done']
        found['ended'] += row['cancelled']
    return found


def node_view(source: Any, snapshot: Snapshot, query: Dict[str, str]) -> dict:
    """Answer /api/node."""
    name = query.pop('id', '')
    nodes = {row['id']: row for row in snapshot.nodes}
    if name not in nodes:
        raise Refusal(404, 'there is no node %.80s' % name)
    rows = []
    if 'gone:' not in name:
        rows = source.jobs(name)
    found = table(rows, query, JOB_FIELDS, ('seconds',))
    source.complete(found['rows'])
    for row in found['rows']:
        row['id'] = id_text(row['id'])
        row['stdout'] = row['stdout'].decode('utf-8', 'replace')
        row['stderr'] = row['stderr'].decode('utf-8', 'replace')
    found['node'] = nodes[name]
    return found


def failures_view(source: Any, snapshot: Snapshot, query: Dict[str, str]) -> dict:
    """Answer /api/failures."""
    clusters = {row['number']: row for row in snapshot.clusters}
    rows = []
    for key, members in grouped(source.job_list.rows()):
        row = group_row(key, members, source.job_list)
        cluster = clusters.get(row['cluster'], {})
        row['name'] = cluster.get('name', '')
        row['user'] = cluster.get('user', '')
        rows.append(row)
    return table(rows, query, FAILURE_FIELDS, ('count', 'last'))


def jobs_view(source: Any, snapshot: Snapshot, query: Dict[str, str]) -> dict:
    """Answer /api/jobs."""
    jobs = source.job_list
    wanted = JobFilter(query)
    everything = jobs.rows()
    rows = list(filter(wanted.fits, everything))
    if wanted.search:
        jobs.fill_in(rows)
        rows = wanted.search_in(rows, jobs.texts)
    found = table(rows, query, LISTED_ORDER, LISTED_DESCENDING)
    jobs.fill_in(found['rows'])
    found['rows'] = list(map(jobs.shown, found['rows']))
    found['unlisted'] = jobs.unlisted
    return found


def timeline_view(source: Any, snapshot: Snapshot, query: Dict[str, str]) -> dict:
    """Answer /api/timeline. `Known` adds the lanes."""
    span = number_in(query, 'span', 300, 10, 10 ** 7)
    query.setdefault('per', str(PER_PAGE_MOST))
    found = table(snapshot.nodes, query, NODE_FIELDS, NODE_DESCENDING)
    rows, count = source.job_list.bars(found['rows'], span)
    found['rows'] = rows
    found['count'] = count
    found['span'] = span
    found['bin'] = span / BINS
    return found


def accounts_view(source: Any, snapshot: Snapshot, query: Dict[str, str]) -> dict:
    """Answer /api/accounts."""
    by = query.pop('by', 'user')
    days = number_in(query, 'days', 36500, 1, 36500)
    if by not in SUMMED_BY:
        raise Refusal(400, 'by=%.40s: it is one of user, day, computation' % by)
    if not source.shared:
        raise Refusal(404, 'only a dispyscheduler keeps accounts')
    rows = []
    nothing = ''
    try:
        rows = source.accounts.read()
    except ValueError as exc:   # it keeps none
        nothing = str(exc)
    since = time.localtime(time.time() - days * DAY)
    first = time.strftime('%Y-%m-%d', since)
    recent = [row for row in rows if row['day'] > first]
    found = table(summed(recent, by), query, (by, *ACCOUNT_FIELDS), ACCOUNT_DESCENDING)
    found['by'] = by
    found['complete'] = source.accounts.is_complete
    found['none'] = nothing
    return found


def at_view(source: Any, snapshot: Snapshot, query: Dict[str, str]) -> dict:
    """Answer /api/at."""
    node = query.pop('node', '')
    lane = number_in(query, 'lane', 0, 0, 10 ** 6)
    when = number_in(query, 'ms', 0, 0, 10 ** 15)
    around = number_in(query, 'around', 0, 0, 10 ** 10)
    jobs = source.job_list
    begin = (when - around) / 1000.0
    end = (when + around) / 1000.0
    rows = jobs.at(node, lane, begin, end)
    first = rows[:BARS_NAMED]
    jobs.fill_in(first)
    shown = list(map(jobs.shown, first))
    found = table(shown, query, ('ended',), ('ended',))
    found['total'] = len(rows)
    return found


def job_view(source: Any, snapshot: Snapshot, query: Dict[str, str]) -> dict:
    """Answer /api/job."""
    cluster = number_in(query, 'cluster', 0, 0, 10 ** 9)
    job = number_in(query, 'job', 0, 0, 10 ** 18)
    row = source.job_list.details((cluster, job))
    return table([row], query, ('job',))


VIEWS: Dict[str, Callable[[Any, Snapshot, Dict[str, str]], dict]] = {
    '/api/clusters': clusters_view, '/api/nodes': nodes_view, '/api/node': node_view,
    '/api/failures': failures_view, '/api/jobs': jobs_view, '/api/job': job_view,
    '/api/timeline': timeline_view, '/api/at': at_view, '/api/accounts': accounts_view
}

# path -> (method of the source, {field: (type, whether it must be there)})
CHANGES: Dict[str, Tuple[str, Dict[str, Tuple[Any, bool]]]] = {
    '/api/cancel': ('cancel',
                    {'cluster': (int, True), 'node': (str, False), 'jobs': ((list, str), True)}),
    '/api/cancel_waiting': ('cancel_waiting', {'cluster': (int, True)}),
    '/api/add': ('add_node', {
        'cluster': (int, True), 'host': (str, True), 'port': (int, False), 'cpus': (int, False)
    }),
    '/api/use': ('use', {'node': (str, True), 'cluster': (int, False)}),
    '/api/drain': ('drain', {'node': (str, True), 'cluster': (int, False)}),
    '/api/release': ('release', {'node': (str, True), 'cluster': (int, False)}),
    '/api/stacks': ('stacks', {'cluster': (int, True), 'job': (int, True)}),
    '/api/cpus': ('cpus', {'node': (str, True), 'cpus': (int, True), 'cluster': (int, False)}),
}


# Name of a metric -> kind, help, field of the row it is of
CLUSTER_METRICS = {
    'dispy_jobs_submitted_total': ('counter', 'Jobs submitted.', 'submitted'),
    'dispy_job_seconds_total': ('counter', 'Seconds that jobs have run.', 'job_seconds'),
    'dispy_cluster_cpus': ('gauge', 'CPUs of ready nodes.', 'cpus'),
    'dispy_cluster_cpus_used': ('gauge', 'CPUs used.', 'used'),
}
# The same of users, each with the sum of the rows of his programs
USER_METRICS = {
    'dispy_user_cpus_used': ('gauge', 'CPUs used.', 'used'),
    'dispy_user_jobs_waiting': ('gauge', 'Jobs that wait.', 'waiting'),
    'dispy_user_jobs_running': ('gauge', 'Jobs that run.', 'running'),
    'dispy_user_job_seconds': ('gauge', 'Seconds that jobs of present programs have run.',
                               'job_seconds'),
}
# The same of a scheduler
SCHEDULER_METRICS = {
    'dispy_scheduler_turns_total': ('counter', 'Turns of its loop.', 'turns'),
    'dispy_scheduler_turn_seconds_total': ('counter', 'Seconds that its turns took.', 'seconds'),
    'dispy_scheduler_turn_seconds_longest': ('gauge', 'The longest turn of the last minute.',
                                             'longest'),
    'dispy_scheduler_jobs_waiting': ('gauge', 'Jobs that wait for a CPU.', 'waiting'),
    'dispy_scheduler_results_waiting': ('gauge', 'Results that programs do not have yet.',
                                        'results'),
    'dispy_scheduler_bytes_waiting': ('gauge', 'Bytes that wait in connections.', 'bytes'),
    'dispy_scheduler_connections': ('gauge', 'Connections to programs and nodes.', 'links'),
    'dispy_scheduler_disk_full': ('gauge', '1 while its disk is full.', 'stuck'),
}
# Name of a metric -> kind, help, values of its label `state`, each a field of a cluster's row
JOB_METRICS = {
    'dispy_jobs': ('gauge', 'Jobs that have not ended.', ('waiting', 'running')),
    'dispy_jobs_ended_total': ('counter', 'Jobs that have ended.', ('done', 'failed', 'cancelled')),
}
NODE_METRICS = {
    'dispy_node_cpus': ('gauge', 'CPUs that may be used.', 'cpus'),
    'dispy_node_cpus_used': ('gauge', 'CPUs used.', 'used'),
    'dispy_node_jobs_ended_total': ('counter', 'Jobs ended there.', 'jobs'),
    'dispy_node_job_seconds_total': ('counter', 'Seconds that jobs have run there.', 'job_seconds'),
    'dispy_node_memory_free_bytes': ('gauge', 'Memory free.', 'memory'),
    'dispy_node_disk_free_bytes': ('gauge', 'Disk free.', 'disk'),
    'dispy_node_load_percent': ('gauge', 'CPU load of the host.', 'load'),
    'dispy_node_heard_seconds': ('gauge', 'Seconds since its last sign of life.', 'heard'),
}


class MetricsText:
    """Builds a text in Prometheus' format, version 0.0.4."""

    def __init__(self) -> None:
        self._lines: List[str] = []

    def begin(self, name: str, kind: str, text: str) -> None:
        """Begin a family of samples."""
        self._lines.append('# HELP %s %s' % (name, text))
        self._lines.append('# TYPE %s %s' % (name, kind))

    def add(self, name: str, labels: Dict[str, Any], value: Any) -> None:
        """Add a sample. An unknown value is left out."""
        if value is None:
            return
        inside = ','.join(map(self._label, labels.items()))
        if inside:
            inside = '{%s}' % inside
        self._lines.append('%s%s %s' % (name, inside, value))

    @staticmethod
    def _label(label: Tuple[str, Any]) -> str:
        name, value = label
        text = str(value)
        for plain, escaped in (('\\', '\\\\'), ('"', '\\"'), ('\n', '\\n')):
            text = text.replace(plain, escaped)
        return '%s="%s"' % (name, text)

    def __str__(self) -> str:
        return '\n'.join(self._lines) + '\n'


def bounded(rows: List[dict], most: int, fields: Iterable[str], **others: Any) -> List[dict]:
    """Return the last `most` rows, and before them one row with the sums of these fields over all
    others, which has the values `others` besides."""
    left_out = len(rows) - most
    if left_out <= 0:
        return rows
    rest = dict(others)
    for field in fields:
        rest[field] = sum(row[field] or 0 for row in rows[:left_out])
    return [rest, *rows[left_out:]]


def by_user(clusters: List[dict]) -> List[dict]:
    """Return a row for each user of a scheduler; those with the highest use come last."""
    fields = [field for _, _, field in USER_METRICS.values()]
    found: Dict[str, dict] = {}
    for cluster in clusters:
        user = cluster.get('user', '')
        if not user:
            continue
        row = found.setdefault(user, dict.fromkeys(fields, 0.0))
        row['user'] = user
        for field in fields:
            row[field] += cluster[field]
    rows = sorted(found.values(), key=lambda row: (row['used'], row['running'], row['user']))
    return bounded(rows, METRICS_USERS, fields, user=OTHERS)


def metrics(snapshot: Snapshot, is_up: bool = True,
            measures: Optional[Dict[str, float]] = None) -> str:
    """Answer /metrics. `measures` are those of SCHEDULER_METRICS that are known."""
    found = MetricsText()
    found.begin('dispy_up', 'gauge', '1 if what is shown can be asked.')
    found.add('dispy_up', {}, int(is_up))
    found.begin('dispy_info', 'gauge', 'The version of this monitor.')
    found.add('dispy_info', {'version': __version__}, 1)
    for name, (kind, text, field) in SCHEDULER_METRICS.items():
        if measures and field in measures:
            found.begin(name, kind, text)
            found.add(name, {}, measures[field])
    clusters = _bounded_clusters(snapshot.clusters)
    _add_job_metrics(found, clusters)
    for name, (kind, text, field) in CLUSTER_METRICS.items():
        found.begin(name, kind, text)
        for row in clusters:
            found.add(name, _cluster_labels(row), row[field])
    users = by_user(snapshot.clusters)
    for name, (kind, text, field) in USER_METRICS.items():
        if users:
            found.begin(name, kind, text)
        for row in users:
            found.add(name, {'user': row['user']}, row[field])
    name = 'dispy_node_state'
    found.begin(name, 'gauge', '1 for the state that a node is in.')
    for row in snapshot.nodes:
        labels = _node_labels(row)
        labels['state'] = row['state']
        found.add(name, labels, 1)
    for name, (kind, text, field) in NODE_METRICS.items():
        found.begin(name, kind, text)
        for row in snapshot.nodes:
            found.add(name, _node_labels(row), row[field])
    name = 'dispy_snapshot_seconds'
    found.begin(name, 'gauge', "Seconds of the driver's thread that the last snapshot took.")
    found.add(name, {}, snapshot.cost)
    return str(found)


def _bounded_clusters(clusters: List[dict]) -> List[dict]:
    fields = [field for _, _, field in CLUSTER_METRICS.values()]
    for _, _, states in JOB_METRICS.values():
        fields += states
    rows = sorted(clusters, key=lambda row: row['number'])
    return bounded(rows, METRICS_CLUSTERS, fields, name=OTHERS, number='')


def _add_job_metrics(found: MetricsText, clusters: List[dict]) -> None:
    for name, (kind, text, states) in JOB_METRICS.items():
        found.begin(name, kind, text)
        for row in clusters:
            labels = _cluster_labels(row)
            for state in states:
                labels['state'] = state
                found.add(name, labels, row[state])


def _cluster_labels(row: dict) -> Dict[str, Any]:
    return {'cluster': row['name'], 'number': row['number']}


def _node_labels(row: dict) -> Dict[str, Any]:
    name = row['name'] or row['address']
    return {'node': name, 'id': row['id']}


class SnapshotThread:
    """The thread that takes snapshots. All requests read the latest one."""

    def __init__(self, source: Any, every: float) -> None:
        self._source = source
        self.every = every
        self._changed = threading.Condition()
        self._wanted_until = 0.0
        self._ending = False
        self.last: Optional[Snapshot] = None
        self._histories = NodeHistories()
        self._thread = threading.Thread(target=self._run, name='dispy-httpd-snapshots', daemon=True)

    def start(self) -> None:
        """Begin to take snapshots."""
        self._thread.start()

    def _run(self) -> None:
        version = 0
        cost = 0.0
        asked = -math.inf
        while True:
            began = time.monotonic()
            ending = self._ending
            asking = began < self._wanted_until
            if began - asked >= HISTORY_APART:
                asking = True
            if asking:
                asked = began
            try:
                clusters, nodes, cost = self._source.snapshot(asking)
                self._source.job_list.follow(clusters)
                self._histories.add(nodes, time.time())
            except Exception:
                # Our own fault, or a driver that does not answer; the next one may come
                logger.exception('a snapshot for the web monitor failed')
            else:
                version += 1
                with self._changed:
                    self.last = Snapshot(version, time.time(), cost, clusters, nodes, ending)
                    self._changed.notify_all()
            if ending:
                return
            with self._changed:
                self._wait_since(began, cost)

    def _wait_since(self, began: float, cost: float) -> None:
        """Wait until the next snapshot is due, which may become earlier in the meantime. The lock
        must be held."""
        while not self._ending:
            now = time.monotonic()
            apart = self.every
            if now >= self._wanted_until:   # nobody looks
                apart = max(apart, SAMPLES_APART)
            due = began + max(apart, SNAPSHOT_SHARE * cost)
            left = due - now
            if left <= 0:
                break
            self._changed.wait(left)

    def newer(self, version: int, timeout: float) -> Optional[Snapshot]:
        """Wait for a snapshot after this version, and return it; when the time is over, return the
        latest one. Any thread."""
        until = time.monotonic() + timeout
        with self._changed:
            if time.monotonic() >= self._wanted_until:
                self._changed.notify_all()
            self._wanted_until = time.monotonic() + LOOKED_FOR
            while not self._is_newer(version):
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return self.last

    def _is_newer(self, version: int) -> bool:
        """Return whether there is a snapshot after this version, or none will follow."""
        last = self.last
        if last is None:
            return False
        return last.version > version or last.final

    def is_well(self) -> bool:
        """Return whether snapshots are taken. Any thread."""
        last = self.last
        if last is None:
            return False
        return last.final or time.time() - last.time < max(HEALTHY_AGE, 3 * self.every)

    def current(self) -> Snapshot:
        """Return a snapshot that is not older than the interval between two. Raises Refusal."""
        last = self.last
        if last is None:
            last = self.newer(0, IO_TIME / 2)
        elif not last.final:
            age = time.time() - last.time
            if age > self.every:
                last = self.newer(last.version, IO_TIME / 2)
        if last is None:
            raise Refusal(503, 'there is no snapshot yet')
        return last

    def close(self) -> None:
        """Take the last snapshot, and end."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join()


# --------------------------------------------------------------------------------------------------
# HTTP. There is a thread for each connection, and one request on each connection.
# --------------------------------------------------------------------------------------------------

HEADERS = {
    'Content-Security-Policy': "default-src 'none'; script-src 'self'; style-src 'self'; img-src "
                               "'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
                               "frame-ancestors 'none'",
    'X-Content-Type-Options': 'nosniff', 'X-Frame-Options': 'DENY',
    'Referrer-Policy': 'no-referrer', 'Cache-Control': 'no-store',
    'Cross-Origin-Opener-Policy': 'same-origin', 'Cross-Origin-Resource-Policy': 'same-origin',
    'Connection': 'close'
}
# Headers
ONCE = ('host', 'origin', 'authorization', 'content-length', 'content-type', 'transfer-encoding',
        'sec-fetch-site')
JSON = 'application/json'
EVENTS = 'text/event-stream'
METRICS = 'text/plain; version=0.0.4; charset=utf-8'
TEXT = 'text/plain; charset=utf-8'


HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
NOT_IN_HEADER = re.compile(r'[\x00-\x08\x0a-\x1f\x7f]')
SHOWN = frozenset(VIEWS) | {'/metrics'}   # paths that need the token, besides CHANGES
HEALTH = '/healthz'


def checked_fields(body: Any, fields: 'Dict[str, Tuple[Any, bool]]') -> dict:
    """Return the arguments of a change, without those that are null. Raises Refusal."""
    if not isinstance(body, dict) or not set(fields).issuperset(body):
        raise Refusal(400, 'the body is no object of %s' % ', '.join(fields))
    found = {field: value for field, value in body.items() if value is not None}
    for field, (kind, is_needed) in fields.items():
        if field in found:
            _check_field(field, found[field], kind)
        elif is_needed:
            raise Refusal(400, '%s is missing' % field)
    return found


def _check_field(field: str, value: Any, kind: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        name = getattr(kind, '__name__', 'list or text')
        raise Refusal(400, '%s is no %s' % (field, name))


class Known:
    """Which parts of plots and of the timeline the browser at the end of a stream has."""

    def __init__(self, jobs: JobList) -> None:
        self._jobs = jobs
        self._plots: Dict[Any, Any] = {}   # by the number of a cluster or the id of a node
        self._runs: Dict[Runs, Tuple[int, int]] = {}

    def news(self, view: dict) -> dict:
        """Return a view without the plots and without the runs that the browser has."""
        rows = []
        for row in view['rows']:
            if 'plot' in row:
                row = self._without_known_plot(row, row['number'])
            elif 'lanes' in row:
                row = dict(row, lanes=self._jobs.new_runs(row, self._runs))
            rows.append(row)
        view = dict(view, rows=rows)
        if 'node' in view:
            node = view['node']
            view['node'] = self._without_known_plot(node, node['id'])
        return view

    def _without_known_plot(self, row: dict, key: Any) -> dict:
        if self._plots.get(key) is not row['plot']:
            self._plots[key] = row['plot']
            return row
        row = dict(row)
        del row['plot']
        return row


class LimitedReader:
    """Reads the first bytes of a connection: no more than MAX_HEAD of them are read as lines."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._left = MAX_HEAD

    def readline(self, size: int) -> bytes:
        """Read a line as a file does. Raises LineTooLong when all lines together are too long."""
        most = min(size, self._left + 1)
        line = self._file.readline(most)
        self._left -= len(line)
        if self._left < 0:
            raise http.client.LineTooLong('head')
        return bytes(line)

    def read(self, size: int) -> bytes:
        """Read from the body."""
        return bytes(self._file.read(size))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def closed(self) -> bool:
        """Return whether the file is closed."""
        return bool(self._file.closed)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one request, in a thread of its own."""
    protocol_version = 'HTTP/1.1'
    server_version = 'dispy'
    sys_version = ''
    server: 'Server'
    timeout = IO_TIME

    def setup(self) -> None:
        """Set up TLS, and a limit on what is read."""
        if self.server.tls is not None:
            self.request.settimeout(IO_TIME)
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().setup()
        self.rfile: Any = LimitedReader(self.rfile)
        self.server.serving[self] = time.monotonic() + IO_TIME

    def finish(self) -> None:
        """Close the connection, including what socketserver does not know under TLS."""
        self.server.serving.pop(self, None)
        with contextlib.suppress(OSError):   # it has hung up
            super().finish()
        if self.server.tls is not None:
            self.request.close()

    def cut(self) -> None:
        """End the connection from another thread."""
        with contextlib.suppress(OSError):   # it has ended
            self.connection.shutdown(socket.SHUT_RDWR)

    def handle_one_request(self) -> None:
        """Read a request, check it and answer it; then the connection ends."""
        self.close_connection = True
        self.requestline = ''
        self.command = ''
        self.request_version = 'HTTP/1.1'
        try:
            try:
                self.raw_requestline = self.rfile.readline(MAX_LINE + 1)
                if not self.raw_requestline:
                    return
                if len(self.raw_requestline) > MAX_LINE:
                    raise Refusal(414, 'the request line is over %d bytes' % MAX_LINE)
                if self.parse_request():   # otherwise it has answered
                    self.close_connection = True
                    self._answer()
            except Refusal as exc:
                self._error(exc.status, str(exc), exc.headers)
        except OSError as exc:   # it hung up, or was too slow
            logger.debug('the web monitor: %s: %s', self.client_address[0], exc)

    def handle_expect_100(self) -> bool:
        """Refuse the request: no request that is served is large enough for this."""
        raise Refusal(417, 'Expect is not served')

    def send_error(self,
                   code: int,
                   message: Optional[str] = None,
                   explain: Optional[str] = None) -> None:
        """Send the answer for an error that parse_request finds."""
        known = http.client.responses.get(code, '')
        self._error(code, message or known, {})

    def log_message(self, format: str, *args: Any) -> None:
        """Log a request at DEBUG only."""
        logger.debug('the web monitor: %s: ' + format, self.client_address[0], *args)

    # -- answers -----------------------------------------------------------------------------------

    def _error(self, status: int, text: str, headers: Dict[str, str]) -> None:
        self.request_version = 'HTTP/1.1'
        body = json.dumps({'error': text})
        self._reply(status, JSON, body.encode(), **headers)

    def _begin(self, status: int, kind: str, **headers: Any) -> None:
        self.send_response(status)
        all_headers = dict(HEADERS)
        all_headers['Content-Type'] = kind
        for name, value in headers.items():
            all_headers[name.replace('_', '-')] = str(value)
        for name, value in all_headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _reply_json(self, value: Any) -> None:
        self._reply(200, JSON, json.dumps(value).encode())

    def _reply(self, status: int, kind: str, body: bytes, **headers: Any) -> None:
        self.server.serving[self] = time.monotonic() + IO_TIME
        self._begin(status, kind, Content_Length=len(body), **headers)
        if self.command != 'HEAD':
            self.wfile.write(body)

    # -- checks ------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Check what applies to every request. Raises Refusal."""
        if self.request_version not in ('HTTP/1.0', 'HTTP/1.1'):
            raise Refusal(505, '%s is not supported here' % self.request_version)
        self._check_headers()
        host = self.headers.get('Host')
        if host is None:
            raise Refusal(400, 'there is no header Host')
        if not self.server.is_own(host):
            raise Refusal(421,
                          'this server is not %.80s; with another name, give it as host=' % host)
        origin = self.headers.get('Origin')
        own = '%s://%s' % (self.server.scheme, host)
        if not self._is_from_here() or origin not in (None, own):
            raise Refusal(403, 'a page of another site may not ask')
        if self.headers.get('Transfer-Encoding') is not None:
            raise Refusal(501, 'Transfer-Encoding is not served')

    def _check_headers(self) -> None:
        if self.headers.defects:
            raise Refusal(400, 'the headers are malformed')
        for name, value in self.headers.items():
            if not HEADER_NAME.fullmatch(name) or NOT_IN_HEADER.search(value):
                raise Refusal(400, 'a header is malformed')
        for name in ONCE:
            if len(self.headers.get_all(name, ())) > 1:
                raise Refusal(400, 'there are two headers %s' % name)

    def _is_from_here(self) -> bool:
        """Return whether a request comes from this site, as far as the browser tells. The page
        itself may be opened by a link from anywhere."""
        site = self.headers.get('Sec-Fetch-Site', 'none')
        if site in ('none', 'same-origin'):
            return True
        path = self.path.partition('?')[0]
        if self.command != 'GET' or path != '/':
            return False
        mode = self.headers.get('Sec-Fetch-Mode')
        destination = self.headers.get('Sec-Fetch-Dest')
        return mode == 'navigate' and destination == 'document'

    def _check_token(self) -> None:
        kind, _, token = self.headers.get('Authorization', '').partition(' ')
        given = token.strip().encode('latin-1', 'replace')
        is_own = hmac.compare_digest(given, self.server.token.encode())
        if kind.lower() != 'bearer' or not is_own:
            text = ('the token is missing or is not the one of this server: use the link that it '
                    'printed')
            raise Refusal(401, text, WWW_Authenticate='Bearer')

    def _length(self) -> int:
        text = self.headers.get('Content-Length')
        if text is not None and not re.fullmatch(r'[0-9]{1,18}', text):
            raise Refusal(400, 'Content-Length is not a number')
        if text is None and self.command == 'POST':
            raise Refusal(411, 'there is no header Content-Length')
        return int(text or 0)

    def _answer(self) -> None:
        self._check()
        path, _, words = self.path.partition('?')
        self._check_method(path)
        length = self._length()
        if path not in STATIC and path != HEALTH:
            self._check_token()
        if self.command != 'POST' and length:
            raise Refusal(400, 'a GET has no body')
        if path in CHANGES:
            self._change(path, words, length)
        elif path in STATIC:
            kind, body = STATIC[path]
            self._reply(200, kind, body.encode())
        elif path == HEALTH:
            self._tell_health()
        else:
            self._show(path, self._query(words))

    def _check_method(self, path: str) -> None:
        """Raise Refusal for an unknown path, or for one that does not have this method."""
        allowed: Tuple[str, ...] = ('GET', 'HEAD')
        if path in CHANGES:
            allowed = ('POST',)
        what = self.command
        if what in ('GET', 'HEAD', 'POST'):
            if not path.startswith('/'):
                raise Refusal(400, 'the request names no path')
            if not any(path in known for known in (CHANGES, STATIC, SHOWN, (HEALTH,))):
                raise Refusal(404, 'there is nothing at %.80s' % path)
            what = '%s is not served at %s' % (what, path)
        elif what in ('PUT', 'DELETE', 'PATCH', 'OPTIONS', 'TRACE', 'CONNECT'):
            what = '%s is not served' % what
        else:
            raise Refusal(501, 'the method is unknown')
        if self.command not in allowed:
            raise Refusal(405, what, Allow=', '.join(allowed))

    @staticmethod
    def _query(words: str) -> Dict[str, str]:
        if not words:
            return {}
        parse = urllib.parse.parse_qsl
        try:
            pairs = parse(words, True, True, errors='strict', max_num_fields=10)
        except ValueError as exc:
            raise Refusal(400, 'the query is malformed') from exc
        query = dict(pairs)
        if len(query) != len(pairs):
            raise Refusal(400, 'the query has a parameter twice')
        return query

    # -- reads -------------------------------------------------------------------------------------

    def _tell_health(self) -> None:
        """Answer whether the server works and can ask for what it shows, and nothing else, since
        anybody may request this."""
        server = self.server
        if server.watch.is_well() and server.source.is_up:
            self._reply(200, TEXT, b'ok\n')
        else:
            self._reply(503, TEXT, b'not ok\n')

    def _show(self, path: str, query: Dict[str, str]) -> None:
        snapshot = self.server.watch.current()
        accepted = self.headers.get('Accept', '')
        if path == '/metrics':
            source = self.server.source
            text = metrics(snapshot, source.is_up, source.measures())
            self._reply(200, METRICS, text.encode())
        elif accepted.startswith(EVENTS) and self.command == 'GET':
            self._stream(path, query, snapshot)
        else:
            known = Known(self.server.source.job_list)
            self._reply_json(known.news(self._view(path, query, snapshot)))

    def _view(self, path: str, query: Dict[str, str], snapshot: Snapshot) -> dict:
        source = self.server.source
        words = dict(query)
        try:
            view = VIEWS[path](source, snapshot, words)
        except (RuntimeError, TimeoutError, concurrent.futures.TimeoutError) as exc:
            # Of a driver that has ended, or is very busy
            raise Refusal(409, str(exc) or 'it does not answer') from exc
        if words:
            raise Refusal(400, 'the query has unknown parameters: %.80s' % ', '.join(words))
        view['time'] = round(snapshot.time, 3)
        view['snapshot_seconds'] = round(snapshot.cost, 6)
        view['manages'] = source.manages
        view['shared'] = source.shared
        view['source'] = source.text
        view['home'] = source.home
        view['jobs'] = jobs_of_all(snapshot.clusters)
        view['nothing'] = source.nothing
        view['clusters'] = names = []
        for row in snapshot.clusters[:PER_PAGE_MOST]:
            names.append({'number': row['number'], 'name': row['name']})
        return view

    def _stream(self, path: str, query: Dict[str, str], snapshot: Snapshot) -> None:
        """Send events until the browser disconnects or the server ends."""
        watch: SnapshotThread = self.server.watch
        known = Known(self.server.source.job_list)
        spoke = time.monotonic()
        view = self._view(path, query, snapshot)
        sent: Any = None
        self.server.serving[self] = None
        self._begin(200, EVENTS)
        while True:
            same = dict(view)
            del same['time'], same['snapshot_seconds']
            if same != sent:
                sent = same
                self._event(json.dumps(known.news(view)))
                spoke = time.monotonic()
            elif time.monotonic() - spoke > HEARTBEAT:
                self.wfile.write(b': still here\n\n')
                spoke = time.monotonic()
            if snapshot.final:
                self.wfile.write(b'event: end\ndata: {}\n\n')
                return
            snapshot = watch.newer(snapshot.version, HEARTBEAT) or snapshot
            try:
                view = self._view(path, query, snapshot)
            except Refusal as exc:   # its node has gone
                error = {'error': str(exc), 'status': exc.status}
                self._event(json.dumps(error))
                return

    def _event(self, data: str) -> None:
        self.wfile.write(b'data: %s\n\n' % data.encode())

    # -- changes -----------------------------------------------------------------------------------

    def _change(self, path: str, words: str, length: int) -> None:
        if words:
            raise Refusal(400, 'a POST has no query')
        charset = self.headers.get_content_charset('utf-8')
        kind = self.headers.get_content_type()   # it has a default
        if 'Content-Type' not in self.headers or (kind, charset) != (JSON, 'utf-8'):
            raise Refusal(415, 'the body must be application/json')
        name, fields = CHANGES[path]
        body = checked_fields(self._body(length), fields)
        source = self.server.source
        if not source.manages:
            raise Refusal(
                409,
                'nodes are only looked at here; what they do is decided by the program that uses '
                'them')
        try:
            if name == 'stacks':
                text = source.job_list.stacks(key_of(body))
                self._reply_json({'done': 1, 'text': text})
                return
            done = getattr(source, name)(**body)
        except (ValueError, TypeError) as exc:
            raise Refusal(400, str(exc)) from exc
        except (RuntimeError, TimeoutError, concurrent.futures.TimeoutError) as exc:
            raise Refusal(409, str(exc) or 'it does not answer') from exc
        logger.info('the web monitor: %s %s by %s', name, body, self.client_address[0])
        self._reply_json({'done': done})

    def _body(self, length: int) -> Any:
        """Return the JSON in the body of a request. Raises Refusal."""
        if length > MAX_BODY:
            raise Refusal(413, 'the body is over %d bytes' % MAX_BODY)
        data = self.rfile.read(length)
        if len(data) < length:
            raise Refusal(400, 'the body is shorter than its Content-Length')
        try:
            return json.loads(data.decode('utf-8'))
        except (ValueError, RecursionError) as exc:
            raise Refusal(400, 'the body is not JSON: %.80s' % exc) from exc


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections, up to a limit, and ends those that take too long."""
    daemon_threads = True
    allow_reuse_address = os.name != 'nt'
    request_queue_size = 64

    def __init__(self, address: Tuple[str, int], source: Any, watch: SnapshotThread,
                 tls: Any, token: str = '') -> None:
        self.source = source
        self.watch = watch
        self.tls = tls
        if tls is not None:
            self.scheme = 'https'
        else:
            self.scheme = 'http'
        self.token = token or secrets.token_urlsafe(24)
        # -> until when, monotonic; None: a stream
        self.serving: Dict[Handler, Optional[float]] = {}
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.threads: Dict[int, threading.Thread] = {}
        if ':' in address[0]:
            self.address_family = socket.AF_INET6
        else:
            self.address_family = socket.AF_INET
        names = [address[0], 'localhost', '127.0.0.1', '::1', socket.gethostname()]
        self._names = {name.lower() for name in names if name}
        self._any_address = address[0] in ('', '0.0.0.0', '::')
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Bind as HTTPServer does, without looking up the name of the host."""
        claim_port(self.socket)
        socketserver.TCPServer.server_bind(self)
        self.server_name = str(self.server_address[0])
        self.server_port = self.server_address[1]

    def is_own(self, host: str) -> bool:
        """Return whether a header Host names this server. Ports may differ, because ssh may forward
        others. A foreign name that leads here (DNS rebinding) is refused; addresses are
        accepted."""
        found = re.fullmatch(r'(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(:[0-9]{1,5})?', host)
        if not found:
            return False
        name = found.group(1).strip('[]').lower()
        if name in self._names:
            return True
        with contextlib.suppress(ValueError):
            return self._any_address and bool(ipaddress.ip_address(name))
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread if there are not too many."""
        if not self._places.acquire(blocking=False):
            with contextlib.suppress(OSError):   # it does not listen
                request.setblocking(False)
                if self.tls is None:
                    request.send(
                        b'HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: '
                        b'close\r\n\r\n'
                    )
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:   # no thread could be started
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection in its thread."""
        thread = threading.current_thread()
        thread.name = 'dispy-httpd-request'
        self.threads[id(thread)] = thread
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()
            del self.threads[id(thread)]

    def service_actions(self) -> None:
        """Close connections that are too slow. The accept thread calls this twice a second."""
        now = time.monotonic()
        for handler, until in list(self.serving.items()):
            if until is not None and now > until:
                handler.cut()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log that a request's thread has failed. A failed TLS handshake is logged at DEBUG only;
        everything else is a fault of dispy."""
        if isinstance(sys.exc_info()[1], OSError):
            logger.debug('the web monitor: %s: %s', client_address[0], sys.exc_info()[1])
        else:
            logger.exception('the web monitor: a request of %s failed', client_address[0])


# --------------------------------------------------------------------------------------------------
# Public class
# --------------------------------------------------------------------------------------------------

def _web_tls(certfile: str, keyfile: Optional[str]) -> Any:
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certfile, keyfile, _no_password)
    except (OSError, ssl.SSLError) as exc:
        raise SecretError('the certificate %s with key %s cannot be used: %s' %
                          (certfile, keyfile or 'in the same file', exc)) from exc
    return context


class DispyHTTPServer:
    """A web server that shows clusters and lets people manage them; the link to open is printed
    once, to stderr.

    cluster - a JobCluster or SharedJobCluster; None: none yet (see add_cluster)
    host - the address to listen at; any other than 127.0.0.1 makes the server accessible from other
        hosts, whose users need the token too: use certfile then
    port - the TCP port; 0: a free one
    poll_sec - the time in seconds between two updates of a page (0.25 to 3600)
    keyfile, certfile - paths of files in PEM format, for TLS
    show_job_args - False: arguments of jobs are not shown
    DocumentRoot - accepted for old scripts; it has no effect any more
    url - the link, with the token in its fragment

    Raises TypeError, ValueError, SecretError, OSError (the port is in use), or RuntimeError (the
    cluster was closed). The server is a context manager.
    """

    def __init__(self,
                 cluster: Optional[JobCluster] = None,
                 host: str = '127.0.0.1',
                 port: int = HTTPD_PORT,
                 poll_sec: float = 0.5,
                 keyfile: Optional[str] = None,
                 certfile: Optional[str] = None,
                 show_job_args: bool = True,
                 DocumentRoot: Optional[str] = None) -> None:
        source = ClusterSource()
        source.job_list.shows_arguments = dispy.flag_of('show_job_args', show_job_args)
        dispy.old_names.tell_given(DocumentRoot=DocumentRoot)
        if cluster is not None:
            source.add(cluster)
        try:
            self._start(source, host, port, poll_sec, keyfile, certfile)
        except BaseException:
            source.close()
            raise
        source.publish(self.url)

    def _start(self, source: Any, host: str, port: int, poll_sec: float, keyfile: Optional[str],
               certfile: Optional[str], token: str = '') -> None:
        if not isinstance(host, str):
            raise TypeError('host=%.80r must be an address of this host, not %s' %
                            (host, type(host).__name__))
        port = dispy.in_range('port', port, HTTPD_PORT, 0, 65535, True)
        every = float(dispy.in_range('poll_sec', poll_sec, 0.5, SNAPSHOTS_APART, 3600))
        certfile, keyfile, _ = tls_files(certfile, keyfile)
        if certfile:
            tls = _web_tls(certfile, keyfile)
        else:
            tls = None
        self._source = source
        self._watch = SnapshotThread(source, every)
        try:
            self._server = Server((host, port), source, self._watch, tls, token)
        except OSError as exc:
            text = ('the web monitor cannot listen at %s port %d: %s; choose another port (0: any '
                    'that is free)')
            text %= (host or '*', port, exc.strerror or exc)
            raise OSError(exc.errno, text) from exc
        if host in ('', '0.0.0.0', '::'):
            shown = 'localhost'
        elif ':' in host:
            shown = '[%s]' % host
        else:
            shown = host
        server = self._server
        self.url = '%s://%s:%d/#token=%s' % (
            server.scheme, shown, server.server_port, server.token)
        self._accepts = threading.Thread(target=self._server.serve_forever,
                                         name='dispy-httpd',
                                         daemon=True)
        self._closed = False
        self._watch.start()
        self._accepts.start()
        if host not in ('127.0.0.1', '::1', 'localhost') and tls is None:
            logger.warning(
                'the web monitor listens at %s without TLS: whoever can read the network can read '
                'its token; give certfile=',
                host or 'all addresses')
        self._tell('dispy monitor: %s' % self.url)

    @staticmethod
    def _tell(text: str) -> None:
        print(text, file=sys.stderr)

    def cluster_status(self, *told: Any) -> None:
        """Accept an event of a cluster: this method may be given as cluster_status of a cluster, or
        called by the program's own function, as dispy 4 required: with (status, node, job), or with
        these after an element of `_clusters`. The server observes everything by itself and need not
        be told; without this function the cluster has less to do."""
        if len(told) not in (3, 4):
            raise TypeError(
                'cluster_status takes (status, node, job), and %d arguments were given' % len(told))

    @property
    def _clusters(self) -> Dict[str, Any]:
        """The clusters that are shown, by name, which scripts for dispy 4 pass to
        cluster_status."""
        return {watched.given.name: watched.given for watched in list(self._source.watched())}

    def add_cluster(self, cluster: JobCluster) -> None:
        """Show this cluster too. Nothing happens if it is shown already. Raises TypeError, and
        RuntimeError if it was closed. Any thread."""
        self._source.add(cluster)

    def del_cluster(self, cluster: JobCluster) -> None:
        """Stop showing this cluster. Any thread."""
        self._source.remove(cluster)

    def shutdown(self, wait: bool = True) -> None:
        """End the server. With `wait`, browsers first receive the final state. The method may be
        called twice. Any thread."""
        if self._closed:
            return
        self._closed = True
        self._server.shutdown()
        self._accepts.join()
        self._server.server_close()
        self._watch.close()
        # A stream ends by itself when it has shown the last snapshot
        until = time.monotonic() + (2.0 if wait else 0.0)
        for thread in list(self._server.threads.values()):
            thread.join(max(0.0, until - time.monotonic()))
        for handler in list(self._server.serving):
            handler.cut()
        for thread in list(self._server.threads.values()):
            thread.join(2.0)
        self._source.close()

    close = shutdown

    def __enter__(self) -> 'DispyHTTPServer':
        return self

    def __exit__(self, *exc: Any) -> None:
        self.shutdown()


class SourceHTTPServer(DispyHTTPServer):
    """A web server for a source that is not a cluster of this program. It closes the source. `tell`
    is called with the line that contains the link, and `token` is that of an earlier server."""

    def __init__(self,
                 source: Any,
                 host: str = '127.0.0.1',
                 port: int = HTTPD_PORT,
                 poll_sec: float = 0.5,
                 keyfile: Optional[str] = None,
                 certfile: Optional[str] = None,
                 tell: Optional[Callable[[str], None]] = None,
                 token: str = '') -> None:
        self._tell = tell or self._tell  # type: ignore[assignment]
        try:
            self._start(source, host, port, poll_sec, keyfile, certfile, token)
        except BaseException:
            source.close()
            raise

    def keep_token(self, path: str) -> None:
        """Write the token to a file that nobody else can read. Raises OSError."""
        absolute_path = os.path.abspath(path)
        write_private(absolute_path, self._server.token.encode())

    def call_if_well(self, call: Callable[[], None]) -> None:
        """Wait until snapshots are taken, then call a function; a thread of ServiceManager does
        this."""
        while not self._watch.is_well():
            time.sleep(SAMPLES_APART)
        call()


def kept_token(path: str, option: str) -> str:
    """Return the token that an earlier server has left in a file, or an empty text if there is no
    file. Raises SecretError, naming the option, for a file that others can read, and for one that
    contains no token."""
    if not os.path.lexists(path):
        return ''
    try:
        data = read_secret(path)
    except SecretError as exc:
        raise SecretError('%s: %s' % (option, exc)) from exc
    token = data.decode('ascii', 'replace')
    if not TOKEN.fullmatch(token):
        raise SecretError('%s: the file %s holds no token, which has 16 to 200 letters, digits, - '
                          'and _' % (option, path))
    return token


def without_token(text: str) -> str:
    """Return a text with a link in the form that others may see."""
    return text.partition('#token=')[0]


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

SOURCE_OPTIONS: List[Tuple[Tuple[str, ...], Dict[str, Any]]] = [
    (('-n', '--node', '--nodes'), {
        'action': Each,
        'nargs': '+',
        'default': [],
        'dest': 'nodes',
        'metavar': 'HOST[:PORT]',
        'help': 'nodes to watch; may be repeated; HOST may have * for any characters '
                '(default: the dispyscheduler of this machine, or, if there is none, all '
                'nodes that answer)'}),
    (('--scheduler', '--scheduler-host'), {
        'metavar': 'HOST[:PORT]',
        'help': 'a dispyscheduler to watch'}),
]

OPTIONS: List[Tuple[Tuple[str, ...], Dict[str, Any]]] = [
    (('-i', '--host'), {
        'default': '127.0.0.1',
        'metavar': 'ADDR',
        'help': 'address to listen at (default: %(default)s); with another give --certfile '
                'too'}),
    (('-p', '--port'), {
        'type': int,
        'default': HTTPD_PORT,
        'metavar': 'N',
        'help': 'port to listen at (default: %(default)s; 0: any that is free)'}),
    (('--poll-sec',), {
        'type': float,
        'default': 0.5,
        'metavar': 'S',
        'help': 'seconds between two updates of a page (default: %(default)s, at least '
                '0.25)'}),
    (('--certfile',), {
        'metavar': 'FILE',
        'help': 'certificate of this web server, for TLS'}),
    (('--keyfile',), {
        'metavar': 'FILE',
        'help': "the certificate's key, if not in the same file"}),
    (('--token-file',), {
        'metavar': 'FILE',
        'help': 'keep the token there, readable by this user alone, for the next start, for '
                'Prometheus and for scripts; where standard error is no terminal, the link is '
                'printed without it then'}),
    (('--secret-file',), {
        'metavar': 'FILE',
        'help': 'file with the secret of the nodes, or of the programs of the scheduler '
                '(default: the one of this user)'}),
    (('--node-certfile',), {
        'metavar': 'FILE',
        'help': 'certificate for TLS with the nodes or the scheduler'}),
    (('--node-keyfile',), {
        'metavar': 'FILE',
        'help': "that certificate's key, if not in the same file"}),
    (('--version',), {
        'action': 'version',
        'version': '%(prog)s ' + __version__}),
]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='dispy-httpd',
        description='Show a dispyscheduler in a browser, or nodes, whoever uses them: these are '
                    'not taken from their client. The link to open is printed; Ctrl-C ends it.')
    which = parser.add_mutually_exclusive_group()
    for names, settings in SOURCE_OPTIONS:
        which.add_argument(*names, **settings)
    for names, settings in OPTIONS:
        parser.add_argument(*names, **settings)
    return parser


def _source_of(args: argparse.Namespace) -> Any:
    secret = find_secret(None, args.secret_file)
    nodes: Any = [host_and_port(text, NODE_PORT) for text in args.nodes]
    if not nodes:
        link = _scheduler_of(args, secret)
        if link is not None:
            where = dispy.format_address(*link.address)
            return SchedulerSource(
                link.ask, 'all programs of the dispyscheduler at %s' % where, link.close)
        nodes = '*'
    survey = NodeMonitor(
        nodes, secret=secret, certfile=args.node_certfile, keyfile=args.node_keyfile)
    return NodesSource(survey)


def _scheduler_of(args: argparse.Namespace, secret: bytes) -> Optional[SchedulerLink]:
    """Return the scheduler that is to be shown. If none is named, it is the one of this machine, or
    None if that cannot be shown; in that case the reason is printed."""
    where = args.scheduler
    if where is None:
        where = '127.0.0.1'
    host, port = host_and_port(where, SCHEDULER_PORT)
    files = tls_files(args.node_certfile, args.node_keyfile, None, '--node-%s')
    link = SchedulerLink(host, port, ConnectionSettings(secret, *files, PULSE, dispy.REDIAL_MOST))
    if args.scheduler is not None:
        return link
    level = logger.level
    logger.setLevel('ERROR')   # that there is none is said below
    why = link.why_not()
    logger.setLevel(level)
    there = dispy.format_address(host, port)
    text = 'the dispyscheduler at %s is shown' % there
    if why:
        link.close()
        text = 'no dispyscheduler at %s can be shown (%s): the nodes that answer are shown' % (
            there, why)
    print('dispy-httpd: ' + text, file=sys.stderr)
    if why:
        return None
    return link


def _tell_link(is_kept: bool, text: str) -> None:
    """Print the line with the link. The token is left out if it is in a file and the line may go to
    a log that others can read."""
    if is_kept and not sys.stderr.isatty():
        text = without_token(text)
    print(text, file=sys.stderr)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line. Return 0 when a signal has ended it, 1 when it could not start."""
    manager = ServiceManager()
    parser = make_parser()
    args = parser.parse_args(argv)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    write_stacks_on_signal()
    try:
        tls_files(args.certfile, args.keyfile, None, '--%s')
        token = ''
        if args.token_file is not None:
            token = kept_token(args.token_file, '--token-file')
        source = _source_of(args)
        tell = functools.partial(_tell_link, args.token_file is not None)
        server = SourceHTTPServer(source, args.host, args.port, args.poll_sec, args.keyfile,
                                  args.certfile, tell, token)
    except (ValueError, TypeError, OSError, DispyError) as exc:
        print('dispy-httpd: %s' % exc, file=sys.stderr)
        return 1
    with server:
        try:
            if args.token_file is not None and not token:
                server.keep_token(args.token_file)
        except OSError as exc:
            text = '--token-file %s cannot be written: %s' % (
                args.token_file, exc.strerror or exc)
            print('dispy-httpd: ' + text, file=sys.stderr)
            return 1
        manager.ready(without_token(server.url), server.call_if_well)
        # A signal that comes just before the wait begins does not end it: its handler has not
        # run yet.
        while not stop.wait(SIGNAL_CHECK):
            continue
    return 0


# --------------------------------------------------------------------------------------------------
# The page: what browsers get. It contains no data and needs no token.
# --------------------------------------------------------------------------------------------------

HTML = r'''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>dispy</title>
<link rel="icon" href="icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="style.css">
<script src="app.js" defer></script>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>
  <span class="brand"><img src="icon.svg" alt="" width="22" height="22">dispy</span>
  <nav id="nav" aria-label="Pages"></nav>
  <span id="link" class="link" role="status"></span>
</header>
<main id="main" tabindex="-1"><p class="empty">Loading.</p></main>
<p id="note" class="note" role="status" aria-live="polite" hidden></p>
<noscript>
<p class="empty">This page needs JavaScript, all of which comes from this server.</p>
</noscript>
</body>
</html>
'''

ICON = r'''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">
<rect width="32" height="32" rx="7" fill="#1f6f66"/>
<g fill="none" stroke="#fff" stroke-width="2.4" stroke-linecap="round">
<path d="M8 23V9M8 16h8M16 16l8-7M16 16h8M16 16l8 7"/>
</g>
<g fill="#fff">
<circle cx="24" cy="9" r="2.6"/>
<circle cx="24" cy="16" r="2.6"/>
<circle cx="24" cy="23" r="2.6"/>
</g>
</svg>
'''

CSS = r'''
/* Colours; the second ones are for a dark screen */
:root {
  --paper: #f4f3ef;
  --panel: #fffefb;
  --sunk: #eceae4;
  --ink: #1b2225;
  --soft: #59656a;
  --line: #d9d6cd;
  --faint: #e7e4dc;
  --done: #1f7a6c;
  --run: #2c69b0;
  --wait: #a9b0b1;
  --fail: #b0342a;
  --stop: #8a6a16;
  --accent: #1f6f66;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #121618;
    --panel: #191f22;
    --sunk: #0e1214;
    --ink: #e4e8e8;
    --soft: #98a5a9;
    --line: #2e373b;
    --faint: #242c30;
    --done: #4fb8a6;
    --run: #6ea6e6;
    --wait: #66737a;
    --fail: #ee7b6e;
    --stop: #d3ab4e;
    --accent: #5cc2b2;
  }
}

/* The page */
* { box-sizing: border-box; }
html {
  background: var(--paper);
  color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%;
}
body { margin: 0; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
:focus-visible {
  outline: 2px solid var(--accent);
  outline-offset: 2px;
  border-radius: 3px;
}
main:focus { outline: none; }
.skip { position: absolute; left: -99em; }
.skip:focus {
  left: 1em;
  top: 0.6em;
  background: var(--panel);
  padding: 0.3em 0.8em;
  z-index: 3;
}
header {
  display: flex;
  align-items: center;
  gap: 1.6rem;
  padding: 0 1.5rem;
  height: 3.4rem;
  background: var(--panel);
  border-bottom: 1px solid var(--line);
}
.brand {
  display: flex;
  align-items: center;
  gap: 0.55rem;
  font-weight: 650;
  letter-spacing: 0.01em;
}
nav {
  display: flex;
  gap: 0.2rem;
  height: 100%;
}
nav a {
  display: flex;
  align-items: center;
  padding: 0 0.8rem;
  color: var(--soft);
  border-bottom: 2px solid transparent;
  border-top: 2px solid transparent;
}
nav a:hover { color: var(--ink); text-decoration: none; }
nav a[aria-current] {
  color: var(--ink);
  border-bottom-color: var(--accent);
  font-weight: 550;
}
.link {
  margin-left: auto;
  color: var(--soft);
  font-size: 0.87rem;
  white-space: nowrap;
}
main {
  max-width: 74rem;
  margin: 0 auto;
  padding: 1.6rem 1.5rem 4rem;
}
h1 {
  font-size: 1.3rem;
  font-weight: 620;
  margin: 0;
  letter-spacing: -0.005em;
}
h2 {
  font-size: 1rem;
  font-weight: 620;
  margin: 0;
}
.top {
  display: flex;
  align-items: baseline;
  gap: 0.5rem 1rem;
  margin-bottom: 1.1rem;
  flex-wrap: wrap;
}
.soft, .top p { color: var(--soft); margin: 0; }
.card {
  background: var(--panel);
  border: 1px solid var(--line);
  border-radius: 8px;
  padding: 1.15rem 1.3rem 1.2rem;
  margin-bottom: 1.1rem;
}
.card > .top { margin-bottom: 0.9rem; align-items: center; }
.card > .top .actions { margin-left: auto; }
.wrap + .soft, .pager + .soft { margin-top: 0.9rem; }
.empty {
  color: var(--soft);
  padding: 2.5rem 1rem;
  text-align: center;
}
.note {
  position: fixed;
  left: 50%;
  bottom: 1.4rem;
  transform: translateX(-50%);
  margin: 0;
  max-width: min(40rem, 92vw);
  background: var(--ink);
  color: var(--paper);
  padding: 0.6rem 1.1rem;
  border-radius: 6px;
  z-index: 3;
  box-shadow: 0 4px 18px rgba(0, 0, 0, 0.22);
  overflow-wrap: anywhere;
}
.note[hidden] { display: none; }

/* Clusters */
.figures {
  display: grid;
  grid-template-columns: repeat(auto-fit, minmax(6rem, 1fr));
  gap: 0.9rem 1rem;
  margin: 0;
}
.figures div { min-width: 0; }
.figures dt {
  color: var(--soft);
  font-size: 0.84rem;
  white-space: nowrap;
}
.figures dd {
  margin: 0;
  font-size: 1.5rem;
  line-height: 1.25;
  font-variant-numeric: tabular-nums;
  letter-spacing: -0.015em;
  white-space: nowrap;
}
.figures dd small {
  font-size: 0.9rem;
  color: var(--soft);
  letter-spacing: 0;
}
.mark {
  display: inline-block;
  width: 0.7em;
  height: 0.7em;
  margin-right: 0.45em;
  vertical-align: baseline;
}
.mark.done { background: var(--done); border-radius: 1px; }
.mark.run { background: var(--run); border-radius: 50%; }
.mark.wait { border: 2px solid var(--wait); border-radius: 50%; }
.mark.fail { background: var(--fail); clip-path: polygon(50% 0, 100% 100%, 0 100%); }
.mark.stop {
  background: var(--stop);
  clip-path: polygon(50% 0, 100% 50%, 50% 100%, 0 50%);
}
.bar {
  display: block;
  width: 100%;
  height: 12px;
  margin: 0 0 1rem;
  border-radius: 3px;
  overflow: hidden;
  background: var(--faint);
}
.s-done { fill: var(--done); }
.s-fail { fill: var(--fail); }
.s-stop { fill: var(--stop); }
.s-run { fill: var(--run); }
.s-hatch {
  stroke: var(--panel);
  stroke-width: 1.6;
  opacity: 0.55;
}
.plots {
  display: grid;
  grid-template-columns: 1fr 1fr;
  gap: 1.6rem;
  margin-top: 1.2rem;
}
.plot { margin: 0; min-width: 0; }
.plot figcaption {
  display: flex;
  justify-content: space-between;
  color: var(--soft);
  font-size: 0.84rem;
  margin-bottom: 0.25rem;
  font-variant-numeric: tabular-nums;
}
.plot svg {
  display: block;
  width: 100%;
  height: 8.2rem;
  background: var(--sunk);
  border-radius: 4px;
}
.plot path {
  fill: none;
  stroke-width: 1.8;
  vector-effect: non-scaling-stroke;
  stroke-linejoin: round;
}
.p-done { stroke: var(--done); }
.p-area-done {
  fill: var(--done) !important;
  opacity: 0.13;
  stroke: none;
}
.p-used { stroke: var(--run); }
.p-area-used {
  fill: var(--run) !important;
  opacity: 0.15;
  stroke: none;
}
.plot .p-cpus {
  stroke: var(--soft);
  stroke-width: 1.2;
  stroke-dasharray: 4 4;
}
.plot .grid { stroke: var(--line); stroke-width: 1; }
.axis {
  display: flex;
  justify-content: space-between;
  color: var(--soft);
  font-size: 0.8rem;
  font-variant-numeric: tabular-nums;
  margin-top: 0.2rem;
}

/* Tables and one node */
.wrap {
  overflow-x: auto;
  background: var(--panel);
  border: 1px solid var(--line);
  border-radius: 8px;
}
table {
  border-collapse: collapse;
  width: 100%;
  font-variant-numeric: tabular-nums;
}
th, td {
  text-align: left;
  padding: 0.55rem 0.8rem;
  vertical-align: top;
}
th {
  font-weight: 500;
  font-size: 0.84rem;
  color: var(--soft);
  border-bottom: 1px solid var(--line);
  white-space: nowrap;
}
th a { color: inherit; }
th[aria-sort] a { color: var(--ink); font-weight: 600; }
tr + tr td { border-top: 1px solid var(--faint); }
.n { text-align: right; white-space: nowrap; }
td .sub, .line .sub, .facts .sub {
  color: var(--soft);
  font-size: 0.84rem;
  display: block;
  overflow-wrap: anywhere;
}
td .reason { max-width: 26rem; white-space: pre-line; }
.nowrap { white-space: nowrap; }
.state::before {
  content: attr(data-shape);
  display: inline-block;
  width: 1.25em;
  font-size: 0.92em;
}
.state { white-space: nowrap; }
.state.good { color: var(--done); }
.state.busy { color: var(--run); }
.state.bad { color: var(--fail); }
.state.warn { color: var(--stop); }
.state.off { color: var(--soft); }
.meter {
  display: block;
  width: 6.5rem;
  height: 6px;
  margin-top: 0.35rem;
  margin-left: auto;
  border-radius: 2px;
  background: var(--faint);
}
.meter rect { fill: var(--run); }
code, pre, .mono { font-family: var(--mono); font-size: 0.86rem; }
h1 .mono { font-size: inherit; overflow-wrap: anywhere; }
.args { overflow-wrap: anywhere; white-space: pre-wrap; }
pre {
  background: var(--sunk);
  border-radius: 4px;
  padding: 0.6rem 0.8rem;
  margin: 0.5rem 0 0;
  overflow: auto;
  max-height: 22rem;
  white-space: pre-wrap;
  overflow-wrap: anywhere;
}
pre.err { border-left: 3px solid var(--stop); }
.facts {
  display: grid;
  grid-template-columns: repeat(auto-fill, minmax(min(11rem, 42%), 1fr));
  gap: 0.7rem 1.4rem;
  margin: 0;
}
.facts dt { color: var(--soft); font-size: 0.84rem; }
.facts dd {
  margin: 0;
  overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums;
}
.pager {
  display: flex;
  gap: 1rem;
  align-items: center;
  margin-top: 0.9rem;
  color: var(--soft);
  flex-wrap: wrap;
}
.tools {
  display: flex;
  gap: 0.6rem;
  align-items: center;
  flex-wrap: wrap;
  margin: 0 0 0.9rem;
}

/* Forms */
button, input, select {
  font: inherit;
  color: inherit;
  background: var(--panel);
  border: 1px solid var(--line);
  border-radius: 5px;
  padding: 0.28rem 0.75rem;
  min-height: 2.15rem;
}
button { cursor: pointer; white-space: nowrap; }
button:hover:not(:disabled) { border-color: var(--soft); }
button:disabled { opacity: 0.45; cursor: default; }
button.main {
  background: var(--accent);
  border-color: var(--accent);
  color: var(--panel);
}
button.sure {
  background: var(--fail);
  border-color: var(--fail);
  color: var(--panel);
}
input[type="number"] { width: 5rem; }
input[type="checkbox"] {
  width: 1.15rem;
  height: 1.15rem;
  min-height: 0;
  accent-color: var(--accent);
  margin: 0.15rem 0 0;
}
form {
  display: flex;
  flex-wrap: wrap;
  gap: 0.8rem 1rem;
  align-items: flex-end;
}
label {
  display: grid;
  gap: 0.2rem;
  color: var(--soft);
  font-size: 0.84rem;
}
label input, label select { color: var(--ink); font-size: 0.95rem; }
.actions {
  display: flex;
  flex-wrap: wrap;
  gap: 0.45rem;
  justify-content: flex-end;
}
.actions form { gap: 0.4rem; flex-wrap: nowrap; }

/* Jobs and the timeline */
.tabs { display: flex; flex-wrap: wrap; gap: 0.2rem; }
.tabs a {
  padding: 0.28rem 0.65rem;
  border-radius: 5px;
  color: var(--soft);
}
.tabs a[aria-current] {
  background: var(--faint);
  color: var(--ink);
  font-weight: 550;
}
input[type="search"] { width: min(17rem, 100%); }
.part { margin: 1.4rem 0; }
.plots.three { grid-template-columns: repeat(3, 1fr); }
.sub.bad { color: var(--fail); }
.line .sub { font-family: system-ui, sans-serif; }
.legend {
  display: flex;
  flex-wrap: wrap;
  gap: 0.3rem 1.1rem;
  color: var(--soft);
  font-size: 0.87rem;
}
.bars {
  position: relative;
  background: var(--panel);
  border: 1px solid var(--line);
  border-radius: 8px;
  padding: 0.7rem;
}
.bars canvas { display: block; cursor: crosshair; }
.bars canvas.named { cursor: pointer; }
.tip {
  position: absolute;
  z-index: 2;
  max-width: min(24rem, 90%);
  padding: 0.4rem 0.7rem;
  background: var(--panel);
  border: 1px solid var(--line);
  border-radius: 6px;
  box-shadow: 0 3px 12px rgba(0, 0, 0, 0.18);
  font-size: 0.87rem;
}
.tip[hidden] { display: none; }
.tip p { margin: 0.1rem 0; }
.tip .args { display: block; }

/* Failures */
details { border-top: 1px solid var(--faint); }
details:first-child { border-top: 0; }
summary {
  display: flex;
  gap: 1rem;
  align-items: baseline;
  padding: 0.7rem 1rem;
  cursor: pointer;
  list-style: none;
}
summary::-webkit-details-marker { display: none; }
summary::before { content: "\25B8"; color: var(--soft); }
details[open] > summary::before { content: "\25BE"; }
summary .line {
  flex: 1;
  min-width: 0;
  overflow-wrap: anywhere;
}
details > div { padding: 0 1rem 1.1rem 2.6rem; }
details table { margin-top: 0.9rem; }
details th, details td { padding: 0.35rem 0.8rem 0.35rem 0; }
.count {
  font-variant-numeric: tabular-nums;
  font-weight: 620;
  white-space: nowrap;
  color: var(--fail);
}

/* Narrow windows: a row of a table becomes a block */
@media (max-width: 44rem) {
  header {
    gap: 0.3rem 0.8rem;
    padding: 0.5rem 1rem 0;
    height: auto;
    flex-wrap: wrap;
  }
  nav {
    order: 3;
    width: 100%;
    height: 2.6rem;
    gap: 0;
    margin: 0 -0.4rem;
    overflow-x: auto;
    scrollbar-width: none;
  }
  nav a { padding: 0 0.33rem; font-size: 0.9rem; }
  td pre { max-height: 11rem; }
  main { padding: 1.1rem 1rem 3.5rem; }
  .plots, .plots.three { grid-template-columns: 1fr; gap: 1.1rem; }
  .figures { grid-template-columns: repeat(3, 1fr); gap: 0.8rem; }
  .figures dd { font-size: 1.2rem; }
  .stack thead { position: absolute; left: -99em; }
  .stack, .stack tbody { display: block; }
  .stack tr {
    display: grid;
    grid-template-columns: 1fr 1fr;
    gap: 0.15rem 1rem;
    padding: 0.8rem 1rem;
  }
  .stack tr + tr { border-top: 1px solid var(--line); }
  .stack td {
    display: block;
    border: 0 !important;
    padding: 0.1rem 0;
    text-align: left;
  }
  .stack td[data-label]::before {
    content: attr(data-label);
    display: block;
    color: var(--soft);
    font-size: 0.78rem;
  }
  .stack td.wide { grid-column: 1 / -1; }
  .stack .meter { margin-left: 0; }
  .actions { justify-content: flex-start; }
  details > div { padding-left: 1rem; }
  .card { padding: 1rem; }
  .card > .top .actions { margin-left: 0; }
  details .stack tr { padding: 0.6rem 0; }
  .sorts { display: flex !important; }
}
.sorts {
  display: none;
  gap: 0.35rem 0.9rem;
  flex-wrap: wrap;
  margin-bottom: 0.8rem;
  font-size: 0.87rem;
  color: var(--soft);
}
@media (prefers-reduced-motion: no-preference) {
  .s-done, .s-fail, .s-stop, .s-run, .meter rect { transition: all 0.3s linear; }
}
'''

SCRIPT = r'''"use strict";
// The page. Functions that draw return plain descriptions of elements (see `h`), and `patch`
// changes the document until it is as they describe it. What comes from the server becomes text
// nodes and attributes, never markup.

// -- describing elements, and bringing the document up to the description -------------------------

const SVG_NAMESPACE = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "rect", "line", "g", "title"]);
// The user changes these attributes, so that they are not updated after an element was made. An
// element with data-own is not updated at all.
const READERS_OWN = new Set(["value", "checked", "open"]);
const DASH = "\u2013";
const THIN = "\u2009";   // a space between thousands

function isAbsent(value) {
  return value === null || value === undefined || value === false;
}

// Describe an element. Children are descriptions, texts, numbers, or arrays of these.
function h(tag, attributes, ...children) {
  const kids = children.flat(Infinity).filter(kid => !isAbsent(kid));
  return {tag, attributes: attributes || {}, kids};
}

function attributeText(value) {
  return value === true ? "" : String(value);
}

function keyOf(item) {
  const key = typeof item === "object" ? item.attributes["data-key"] : undefined;
  return key === undefined ? undefined : String(key);
}

function make(item) {
  if (typeof item !== "object") return document.createTextNode(String(item));
  const element = SVG_TAGS.has(item.tag)
    ? document.createElementNS(SVG_NAMESPACE, item.tag)
    : document.createElement(item.tag);
  for (const [name, value] of Object.entries(item.attributes)) {
    if (!isAbsent(value)) element.setAttribute(name, attributeText(value));
  }
  for (const kid of item.kids) element.appendChild(make(kid));
  return element;
}

// Whether a node of the document can be updated to the description.
function fits(node, item) {
  if (typeof item !== "object") return node.nodeType === Node.TEXT_NODE;
  if (node.nodeType !== Node.ELEMENT_NODE) return false;
  if (node.tagName.toLowerCase() !== item.tag) return false;
  return (node.getAttribute("data-key") || "") === (keyOf(item) || "");
}

function update(node, item) {
  if (typeof item !== "object") {
    if (node.data !== String(item)) node.data = String(item);
    return;
  }
  if (item.attributes["data-own"]) return;
  for (const {name} of [...node.attributes]) {
    if (!READERS_OWN.has(name) && isAbsent(item.attributes[name])) node.removeAttribute(name);
  }
  for (const [name, value] of Object.entries(item.attributes)) {
    if (READERS_OWN.has(name) || isAbsent(value)) continue;
    const text = attributeText(value);
    if (node.getAttribute(name) !== text) node.setAttribute(name, text);
  }
  patch(node, item.kids);
}

function childrenByKey(parent) {
  const keyed = new Map();
  for (const child of parent.children) {
    if (child.hasAttribute("data-key")) keyed.set(child.getAttribute("data-key"), child);
  }
  return keyed;
}

// The child that is to be updated: the one with the same key, at any position, or else the one at
// this position. Null if there is no suitable one.
function findChild(keyed, at, item) {
  const found = keyed.get(keyOf(item)) || at;
  return found && fits(found, item) ? found : null;
}

function patch(parent, items) {
  const keyed = childrenByKey(parent);
  let at = parent.firstChild;
  for (const item of items) {
    const child = findChild(keyed, at, item);
    if (child === null) {
      parent.insertBefore(make(item), at);
      continue;
    }
    if (child === at) {
      at = at.nextSibling;
    } else {
      parent.insertBefore(child, at);
    }
    update(child, item);
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}

// -- words and numbers ----------------------------------------------------------------------------

function count(n) {
  return Math.round(n).toLocaleString("en").replace(/,/g, THIN);
}

// A number with as many digits as matter.
function few(n) {
  if (n === 0) return "0";
  if (n >= 100) return count(n);
  return n.toFixed(n >= 10 ? 1 : 2);
}

// A span of time, given in seconds.
function span(seconds) {
  if (isAbsent(seconds)) return DASH;
  if (seconds < 10) return seconds.toFixed(1) + " s";
  if (seconds < 90) return Math.round(seconds) + " s";
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return minutes + " min";
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return hours + " h " + String(minutes % 60).padStart(2, "0") + " min";
  return Math.floor(hours / 24) + " d " + hours % 24 + " h";
}

function size(bytes) {
  if (isAbsent(bytes)) return DASH;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let number = bytes;
  let unit = 0;
  while (number >= 1024 && unit < units.length - 1) {
    number /= 1024;
    unit++;
  }
  const isWhole = unit < 2 || number >= 100;
  return (isWhole ? Math.round(number) : number.toFixed(1)) + " " + units[unit];
}

// The time of day, of seconds since the epoch.
function clock(seconds) {
  const parts = {hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false};
  return new Date(seconds * 1000).toLocaleTimeString([], parts);
}

function many(n, word) {
  return count(n) + " " + word + (n === 1 ? "" : "s");
}

function lastLine(text) {
  const lines = (text || "").trim().split("\n");
  return lines[lines.length - 1];
}

function percent(value) {
  return value === null ? DASH : Math.round(value) + " %";
}

function ago(seconds) {
  return seconds === null ? DASH : span(seconds) + " ago";
}

const FULL = "\u25cf";
const HOLLOW = "\u25cb";
const DOTTED = "\u25cc";
const HALF = "\u25d1";
const QUARTER = "\u25d4";
const PLAY = "\u25b6";
const WARNING = "\u25b2";
const CROSS = "\u2715";
const SQUARE = "\u25a1";
const SQUARE_FULL = "\u25a0";
const DIAMOND = "\u25c6";
// State -> shape and kind. The colour of the kind only repeats the meaning of word and shape.
const STATES = {
  "ready": [FULL, "good"],
  "connected": [FULL, "good"],
  "working": [PLAY, "busy"],
  "running": [PLAY, "busy"],
  "idle": [HOLLOW, "off"],
  "setting up": [QUARTER, "busy"],
  "asking": [QUARTER, "busy"],
  "dialling": [DOTTED, "off"],
  "found": [DOTTED, "off"],
  "waiting": [DOTTED, "off"],
  "waits there": [DOTTED, "off"],
  "waiting for a node": [DOTTED, "warn"],
  "draining": [HALF, "warn"],
  "drained": [HALF, "warn"],
  "refused": [WARNING, "bad"],
  "down": [WARNING, "bad"],
  "unreachable": [WARNING, "bad"],
  "no such name": [WARNING, "bad"],
  "no name service": [WARNING, "bad"],
  "lost": [CROSS, "bad"],
  "closed": [SQUARE, "off"],
  "done": [SQUARE_FULL, "good"],
  "failed": [WARNING, "bad"],
  "cancelled": [DIAMOND, "warn"],
};

function withShape(shape, kind, words) {
  return h("span", {class: "state " + kind, "data-shape": shape}, words);
}

function state(word) {
  const [shape, kind] = STATES[word] || [HOLLOW, "off"];
  return withShape(shape, kind, word);
}

function mark(kind) {
  return h("span", {class: "mark " + kind, "aria-hidden": "true"});
}

// -- which page is shown --------------------------------------------------------------------------

const PAGES = {
  clusters: "Clusters",
  timeline: "Timeline",
  jobs: "Jobs",
  nodes: "Nodes",
  failures: "Failures",
  accounts: "Accounts",
  manage: "Manage",
};
// Pages that are shown if only nodes are observed
const NODE_PAGES = new Set(["nodes", "manage"]);
// A page without an entry in the navigation -> the entry that is marked for it
const ENTRY = {node: "nodes", job: "jobs"};
const TITLES = {node: "Node", job: "Job"};
// Page -> the path that it requests from the server
const SOURCES = {
  clusters: "clusters",
  timeline: "timeline",
  jobs: "jobs",
  job: "job",
  nodes: "nodes",
  node: "node",
  failures: "failures",
  accounts: "accounts",
  manage: "nodes",
};
// Words of the query that make it another page, which is drawn from scratch
const OF_PLACE = {node: ["id"], job: ["cluster", "job"], timeline: ["span", "page", "per", "sort"]};
let token = sessionStorage.getItem("dispy-token") || "";
let place = null;           // the page and its query
let view = null;            // what the server told last of it, or {error, status}
let plots = new Map();      // number of a cluster -> its plot
let chosen = new Set();     // keys of the jobs that the reader has marked
let sure = "";              // the name of the button that asks once more
let reading = null;         // ends the request that is being read

function byId(id) {
  return document.getElementById(id);
}

function placeKey() {
  const words = (OF_PLACE[place.page] || []).map(word => place.query.get(word) || "");
  return [place.page, ...words].join(" ");
}

// The token is in the link that was opened. It is kept for this tab and removed from the address.
function takeToken() {
  const found = location.hash.match(/^#token=(.+)$/);
  if (!found) return;
  token = found[1];
  sessionStorage.setItem("dispy-token", token);
  history.replaceState(null, "", "#/");
}

function go() {
  takeToken();
  const [path, words] = location.hash.replace(/^#\/?/, "").split("?");
  const before = place && placeKey();
  const page = SOURCES[path] ? path : "clusters";
  place = {page, query: new URLSearchParams(words || ""), isHome: path === ""};
  if (before !== placeKey()) {
    view = null;
    chosen.clear();
    sure = "";
    window.scrollTo(0, 0);
    bars.clear();
  }
  plots.clear();
  listen();
  draw();
}

// The address of a page. For the current page, the words of its query are kept.
function href(page, changes) {
  const words = new URLSearchParams(page === place.page ? place.query : "");
  for (const [name, value] of Object.entries(changes || {})) words.set(name, value);
  const text = words.toString();
  return "#/" + page + (text ? "?" + text : "");
}

// -- talking to the server ------------------------------------------------------------------------

function ask(path, options) {
  const headers = {Authorization: "Bearer " + token, ...options.headers};
  return fetch(path, {cache: "no-store", credentials: "omit", ...options, headers});
}

function addressOfView() {
  const words = place.query.toString();
  return "api/" + SOURCES[place.page] + (words ? "?" + words : "");
}

// Show the data of this page, until another page is shown or the server has ended. The data is read
// as a stream; if a stream does not get through, it is polled.
async function listen() {
  if (reading) reading.abort();
  const mine = new AbortController();
  const signal = mine.signal;
  const url = addressOfView();
  reading = mine;
  let wait = 500;
  while (!signal.aborted) {
    try {
      const answer = await ask(url, {signal, headers: {Accept: "text/event-stream"}});
      if (!await taken(answer)) return;
      tell("live");
      wait = 500;
      if (await readEvents(answer.body.getReader(), signal)) {
        tell("ended");
        return;
      }
    } catch (error) {
      if (signal.aborted) return;
    }
    try {
      const answer = await ask(url, {signal});
      if (!await taken(answer)) return;
      show(await answer.json());
      tell("polled");
      wait = 1000;
    } catch (error) {
      if (signal.aborted) return;
      tell("lost");
      wait = Math.min(2 * wait, 10000);
    }
    await new Promise(done => setTimeout(done, wait));
  }
}

// Whether an answer has the requested data. A refusal is shown; a fault of the server is thrown.
async function taken(answer) {
  if (answer.ok) return true;
  const body = await answer.json().catch(() => ({}));
  const text = body.error || answer.statusText;
  if (answer.status >= 500) throw new Error(text);
  view = {error: text, status: answer.status};
  tell(answer.status === 401 ? "locked" : "live");
  draw();
  return false;
}

// Show the events of a stream. Returns true when the server has ended, false when the stream has.
async function readEvents(reader, signal) {
  const decoder = new TextDecoder();
  const data = "data: ";
  let text = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done || signal.aborted) return false;
    text += decoder.decode(value, {stream: true});
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      if (event.startsWith("event: end")) return true;
      if (event.startsWith(data)) show(JSON.parse(event.slice(data.length)));
    }
  }
}

// A plot is sent only when it has changed.
function fillInPlots(rows) {
  for (const row of rows) {
    if (row.plot) {
      plots.set(row.number, row.plot);
    } else {
      row.plot = plots.get(row.number) || [];
    }
  }
}

function fillInPlot(node) {
  if (node.plot) {
    plots.set(node.id, node.plot);
  } else {
    node.plot = plots.get(node.id) || [];
  }
}

function show(data) {
  if (place.isHome && data.home && data.home !== place.page) {
    location.replace("#/" + data.home);
    return;
  }
  if (place.page === "clusters" && data.rows) fillInPlots(data.rows);
  if (data.node) fillInPlot(data.node);
  view = data;
  if (place.page === "timeline" && data.rows) bars.take(data);
  draw();
}

// Request a change; `words` makes a text for the user from the number of objects concerned.
async function post(path, body, words) {
  const headers = {"Content-Type": "application/json"};
  try {
    const answer = await ask("api/" + path, {method: "POST", headers, body: JSON.stringify(body)});
    const told = await answer.json();
    note(answer.ok ? words(told.done) : told.error);
  } catch (error) {
    note("The server does not answer: " + error.message);
  }
}

const NOTE_TIME = 6000;   // ms
let hiding = 0;

function note(text) {
  const box = byId("note");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => { box.hidden = true; }, NOTE_TIME);
}

const LINKS = {
  live: [FULL, "good", "live"],
  polled: ["\u25d0", "warn", "polled"],
  lost: [CROSS, "bad", "no connection"],
  ended: [SQUARE, "off", "the program has ended"],
  locked: [WARNING, "bad", "no token"],
};

function tell(how) {
  patch(byId("link"), [withShape(...LINKS[how])]);
}

// -- parts of pages -------------------------------------------------------------------------------

function heading(text, ...more) {
  return h("div", {class: "top"}, h("h1", {}, text), h("p", {}, ...more));
}

function empty(text) {
  return h("p", {class: "empty"}, text);
}

function subline(text, kind) {
  return h("span", {class: kind ? "sub " + kind : "sub"}, text);
}

function button(act, row, words) {
  const attributes = {type: "button", "data-key": act, "data-act": act, "data-node": row.id};
  return h("button", attributes, words);
}

// A button that asks for confirmation of an action that cannot be undone.
function doubt(name, words, attributes, disabled) {
  if (sure !== name) {
    const first = {
      type: "button",
      "data-key": "ask" + name,
      "data-act": "sure",
      "data-name": name,
      disabled: Boolean(disabled),
    };
    return h("button", first, words);
  }
  const yes = {type: "button", class: "sure", "data-key": "sure" + name, ...attributes};
  const no = {type: "button", "data-key": "no" + name, "data-act": "unsure"};
  return [
    h("button", yes, "Yes: " + words.charAt(0).toLowerCase() + words.slice(1)),
    h("button", no, "No"),
  ];
}

// A link that sorts the current table.
function sortLink(words, field, firstDescending) {
  const isSorted = view.sort === field;
  const desc = isSorted ? 1 - view.desc : Number(firstDescending);
  const down = " \u25be";
  const up = " \u25b4";
  let arrow = "";
  if (isSorted) arrow = view.desc ? down : up;
  return h("a", {href: href(place.page, {sort: field, desc, page: 1})}, words + arrow);
}

function headCell(column) {
  const [words, field, kind] = column;
  const attributes = {scope: "col", class: kind || false};
  if (field && view.sort === field) {
    attributes["aria-sort"] = view.desc ? "descending" : "ascending";
  }
  return h("th", attributes, field ? sortLink(words, field, false) : words);
}

function bodyCell(column, row) {
  const [words, , kind, cell] = column;
  return h("td", {class: kind || false, "data-label": words || false}, cell(row));
}

// The rows of the view. A column is [words, field to sort by or "", class, function of a row].
function tableOf(columns, key, caption) {
  const sortable = columns.filter(column => column[1]);
  const links = sortable.map(([words, field]) => sortLink(words, field, false));
  const head = h("tr", {}, columns.map(headCell));
  const body = view.rows.map(row => {
    const cells = columns.map(column => bodyCell(column, row));
    return h("tr", {"data-key": key(row)}, cells);
  });
  const parts = [
    h("caption", {hidden: true}, caption),
    h("thead", {}, head),
    h("tbody", {}, body),
  ];
  return [
    h("div", {class: "sorts"}, "Sort by", links),
    h("div", {class: "wrap"}, h("table", {class: "stack"}, parts)),
    pager(),
  ];
}

function pageLink(page, words) {
  if (page < 1 || page > view.pages) return h("span", {}, words);
  return h("a", {href: href(place.page, {page})}, words);
}

function pager() {
  if (view.pages < 2) return null;
  const from = (view.page - 1) * view.per + 1;
  const to = from + view.rows.length - 1;
  return h("nav", {class: "pager", "aria-label": "Pages of the table"},
    pageLink(view.page - 1, "\u2190 Previous"),
    h("span", {}, count(from) + " to " + count(to) + " of " + count(view.total)),
    pageLink(view.page + 1, "Next \u2192"));
}

// -- clusters -------------------------------------------------------------------------------------

function figure(word, value, unit, kind) {
  const small = unit ? h("small", {}, " " + unit) : null;
  return h("div", {},
    h("dt", {}, kind ? mark(kind) : null, word),
    h("dd", {"data-figure": word}, value, small));
}

function linkTo(page, words, text) {
  const query = new URLSearchParams(words).toString();
  return h("a", {href: "#/" + page + "?" + query}, text);
}

// A number of jobs, and a link to them.
function jobsFigure(word, row, state, kind) {
  const n = row[state];
  const value = n ? linkTo("jobs", {cluster: row.number, state}, count(n)) : count(n);
  return h("div", {},
    h("dt", {}, mark(kind), word),
    h("dd", {"data-figure": word}, h("span", {}, value)));
}

// Shares of all jobs in one bar.
function bar(row) {
  const all = Math.max(1, row.submitted);
  const parts = [
    ["done", row.done],
    ["fail", row.failed],
    ["stop", row.cancelled],
    ["run", row.running],
  ];
  const rects = [];
  let x = 0;
  for (const [kind, n] of parts) {
    const width = 100 * n / all;
    const sides = {x: x.toFixed(3), y: 0, width: width.toFixed(3), height: 12};
    rects.push(h("rect", {class: "s-" + kind, ...sides}));
    x += width;
  }
  const shares = [
    row.done + " done",
    row.failed + " failed",
    row.cancelled + " cancelled",
    row.running + " running",
    row.waiting + " waiting",
  ];
  const attributes = {
    class: "bar",
    viewBox: "0 0 100 12",
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": "of " + many(row.submitted, "job") + " " + shares.join(", "),
  };
  return h("svg", attributes, rects);
}

// The functions that map times and values to positions in a plot of 600 by 120; its base is at 118.
function scales(from, to, top) {
  const x = time => (600 * (time - from) / Math.max(1, to - from)).toFixed(1);
  const y = value => (118 - 110 * value / top).toFixed(1);
  return {x, y, end: x(to)};
}

// The path of a series; one that goes by steps keeps each value until the next point.
function linePath(points, series, {x, y, end}) {
  let path = "";
  for (const point of points) {
    const there = x(point[0]) + " " + y(point[series.at]);
    if (path === "") {
      path = "M" + there;
    } else if (series.step) {
      path += "H" + x(point[0]) + "V" + y(point[series.at]) + "M" + there;
    } else {
      path += "L" + there;
    }
  }
  if (series.step && points.length) path += "H" + end;
  return path;
}

function areaPath(points, series, {x, y, end}) {
  if (!series.area || !points.length) return "";
  let path = "M" + x(points[0][0]) + " 118";
  for (const point of points) {
    const value = y(point[series.at]);
    path += series.step ? "H" + x(point[0]) + "V" + value : "L" + x(point[0]) + " " + value;
  }
  if (series.step) path += "H" + end;
  return path + "V118Z";
}

// points: [[time, value, ...], ...]. A series is {at: index of its value, kind: class of its line,
// area: class of what is below it, step: whether it goes by steps}.
function plot(points, word, series, options) {
  const {top: least = 1, words = count} = options || {};
  const first = points.length ? points[0] : [0];
  const last = points.length ? points[points.length - 1] : [0];
  const from = first[0];
  const to = last[0];
  const highest = point => Math.max(...series.map(one => point[one.at]));
  const top = Math.max(least, ...points.map(highest));
  const scale = scales(from, to, top);
  const lines = series.map(one => {
    const area = areaPath(points, one, scale);
    return [
      area ? h("path", {class: one.area, d: area}) : null,
      h("path", {class: one.kind, d: linePath(points, one, scale)}),
    ];
  });
  const grid = [0.5, 1].map(part => {
    return h("path", {class: "grid", d: "M0 " + scale.y(top * part) + "H600"});
  });
  const now = points.length ? ", now " + series.map(one => words(last[one.at])).join(" of ") : "";
  const attributes = {
    viewBox: "0 0 600 120",
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": word + now,
  };
  const caption = [h("span", {}, word), h("span", {}, "0 to " + words(top))];
  const axis = [clock(from), span(to - from), clock(to)].map(text => h("span", {}, text));
  return h("figure", {class: "plot"},
    h("figcaption", {}, caption),
    h("svg", attributes, grid, lines),
    h("div", {class: "axis"}, axis));
}

const ENDED_PLOT = [{at: 1, kind: "p-done", area: "p-area-done"}];
const CPUS_PLOT = [
  {at: 2, kind: "p-used", area: "p-area-used", step: true},
  {at: 3, kind: "p-cpus", step: true},
];

function cancelWaiting(row) {
  if (!view.manages || !row.waiting || row.state === "closed") return null;
  const attributes = {"data-act": "cancel_waiting", "data-cluster": row.number};
  const words = "Cancel " + many(row.waiting, "waiting job");
  return h("span", {class: "actions"}, doubt("waiting" + row.number, words, attributes));
}

function clusterInWords(row) {
  const owner = row.program ? "of " + row.program + ", " : "";
  const nodes = h("a", {href: "#/nodes"}, many(row.nodes, "node") + " ready");
  return [owner + "cluster " + row.number + ", ", nodes, ", open for " + span(row.elapsed)];
}

function clusterCard(row) {
  const figures = [
    jobsFigure("Done", row, "done", "done"),
    jobsFigure("Failed", row, "failed", "fail"),
    jobsFigure("Cancelled", row, "cancelled", "stop"),
    jobsFigure("Running", row, "running", "run"),
    jobsFigure("Waiting", row, "waiting", "wait"),
    figure("Rate", few(row.rate), "/ s"),
    figure("Time left", span(row.left)),
    figure("CPUs used", row.used, "of " + row.cpus),
    figure("Job time", span(row.job_seconds)),
  ];
  const top = [
    h("h2", {class: "mono"}, row.name),
    state(row.state),
    h("p", {}, clusterInWords(row)),
    cancelWaiting(row),
  ];
  const card = {
    class: "card",
    "data-key": "c" + row.number,
    "aria-label": "cluster " + row.name,
  };
  return h("section", card,
    h("div", {class: "top"}, top),
    bar(row),
    h("dl", {class: "figures"}, figures),
    h("div", {class: "plots"},
      plot(row.plot, "Jobs ended", ENDED_PLOT),
      plot(row.plot, "CPUs used (dashed: offered)", CPUS_PLOT)));
}

function clustersPage() {
  const total = view.total > 1 ? ", " + view.total + " in all" : "";
  const cards = view.rows.length ? view.rows.map(clusterCard) : empty(view.nothing);
  return [heading("Clusters", view.source + total), cards, pager()];
}

// -- nodes ----------------------------------------------------------------------------------------

function addressOf(node) {
  return node.address + (node.port ? ":" + node.port : "");
}

function nodeName(row) {
  const link = "#/node?id=" + encodeURIComponent(row.id);
  return [h("a", {href: link}, row.name || row.address), subline(addressOf(row))];
}

function meter(row) {
  const width = Math.min(100, 100 * row.used / Math.max(1, row.cpus));
  const attributes = {
    class: "meter",
    viewBox: "0 0 100 6",
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  };
  return h("svg", attributes, h("rect", {x: 0, y: 0, height: 6, width: width.toFixed(1)}));
}

function cpusCell(row) {
  const isLinked = row.used && view.home !== "nodes";
  const used = isLinked ? linkTo("jobs", {node: row.id, state: "running"}, row.used) : row.used;
  return [used, " of " + row.cpus, meter(row)];
}

function stateCell(row) {
  const hasReason = row.reason && row.reason !== "deallocated";
  return [
    state(row.state),
    row.holder ? subline("held by " + row.holder, "reason") : null,
    hasReason ? subline(lastLine(row.reason), "reason") : null,
  ];
}

// The free amount and the total.
function free(part, all) {
  return [size(part), all ? subline("of " + size(all)) : null];
}

function jobsAtNode(row) {
  if (!row.jobs || view.home === "nodes") return count(row.jobs);
  return linkTo("jobs", {node: row.id, state: "ended"}, count(row.jobs));
}

const NODE_COLUMNS = [
  ["Node", "name", "wide", nodeName],
  ["State", "state", "wide", stateCell],
  ["CPUs used", "used", "n", cpusCell],
  ["Jobs done", "jobs", "n", jobsAtNode],
  ["Job time", "job_seconds", "n", row => span(row.job_seconds)],
  ["Memory free", "memory", "n", row => free(row.memory, row.memory_total)],
  ["Disk free", "disk", "n", row => free(row.disk, row.disk_total)],
  ["Load", "load", "n", row => percent(row.load)],
  ["Last heard", "heard", "n", row => ago(row.heard)],
];

function isConnected(row) {
  return row.state === "ready" || row.state === "connected";
}

function nodesInWords() {
  const nodes = many(view.total, "node");
  if (view.pages > 1) return nodes;   // the others are not here, and cannot be counted
  let used = 0;
  let all = 0;
  for (const row of view.rows) {
    used += row.used;
    if (isConnected(row)) all += row.cpus;
  }
  return nodes + ", " + used + " of " + many(all, "CPU") + " used";
}

function nodesPage() {
  const rows = view.rows.length
    ? tableOf(NODE_COLUMNS, row => "n" + row.id, "Nodes")
    : empty("No nodes are known yet.");
  return [heading("Nodes", nodesInWords()), rows];
}

// -- one node -------------------------------------------------------------------------------------

function jobKey(row) {
  return row.cluster + "." + row.job;
}

function chooseCell(row) {
  if (!view.manages) return "";
  return h("input", {
    type: "checkbox",
    "data-act": "choose",
    "data-job": jobKey(row),
    "aria-label": "select job " + row.id,
  });
}

function clusterName(number) {
  const found = view.clusters.find(one => one.number === number);
  return found ? found.name : "cluster " + number;
}

function jobCell(row) {
  const cluster = view.clusters.length > 1 ? subline(clusterName(row.cluster)) : null;
  const link = linkTo("job", {cluster: row.cluster, job: row.job}, row.id);
  return [h("span", {class: "mono"}, link), cluster];
}

// What a job prints; `follow` keeps the end of it in sight.
function printed(name, text) {
  if (!text) return null;
  const kind = name === "stderr" ? "err" : false;
  return h("pre", {class: kind, "aria-label": name, "data-follow": true}, text);
}

function outputCell(row) {
  return [
    h("div", {class: "mono args"}, row.arguments || "none"),
    printed("stdout", row.stdout),
    printed("stderr", row.stderr),
  ];
}

function cancelCell(row) {
  if (!view.manages) return null;
  const attributes = {
    type: "button",
    "data-act": "cancel",
    "data-job": jobKey(row),
    "aria-label": "cancel job " + row.id,
  };
  return h("button", attributes, "Cancel");
}

const JOB_COLUMNS = [
  ["", "", "", chooseCell],
  ["Job", "job", "", jobCell],
  ["State", "state", "", row => state(row.state)],
  ["Time", "seconds", "n", row => span(row.seconds)],
  ["Arguments and output", "", "wide", outputCell],
  ["", "", "n", cancelCell],
];

function factsOf(node) {
  const uses = node.clusters.map(use => use.name + ": " + use.jobs + " done");
  return [
    ["State", stateCell(node)],
    ["CPUs used", node.used + " of " + node.cpus],
    ["Resources", node.resources || DASH],
    ["Jobs done", jobsAtNode(node)],
    ["Job time", span(node.job_seconds)],
    ["Memory free", [size(node.memory), " of ", size(node.memory_total)]],
    ["Disk free", [size(node.disk), " of ", size(node.disk_total)]],
    ["Load", percent(node.load)],
    ["Last heard", ago(node.heard)],
    ["Platform", node.platform || DASH],
    ["Clusters", uses.join(", ") || DASH],
  ];
}

function nodeCard(node) {
  const facts = factsOf(node).map(([word, value]) => {
    return h("div", {}, h("dt", {}, word), h("dd", {}, value));
  });
  const reason = node.reason.includes("\n") ? h("pre", {}, node.reason) : null;
  return h("section", {class: "card"},
    h("dl", {class: "facts"}, facts), reason, nodePlots(node));
}

const LOAD_PLOT = [{at: 3, kind: "p-done", area: "p-area-done", step: true}];
const MEMORY_PLOT = [{at: 4, kind: "p-used", area: "p-area-used", step: true}];

function nodePlots(node) {
  const known = at => node.plot.filter(point => point[at] !== null);
  if (node.plot.length < 2) return null;
  const memory = node.memory_total || 0;
  const used = known(4).map(point => [point[0], 0, 0, 0, memory - point[4]]);
  return h("div", {class: "plots three"},
    plot(node.plot.map(point => [point[0], 0, point[1], point[2]]),
      "CPUs used by jobs (dashed: offered)", CPUS_PLOT),
    plot(known(3), "Load in %", LOAD_PLOT, {top: 100}),
    memory ? plot(used, "Memory used", MEMORY_PLOT, {top: memory, words: size}) : null);
}

function jobTools() {
  if (!view.manages || !view.total) return null;
  const some = chosen.size ? many(chosen.size, "selected job") : "selected jobs";
  return h("div", {class: "tools"},
    doubt("some", "Cancel " + some, {"data-act": "cancel_some"}, !chosen.size),
    doubt("all", "Cancel all " + count(view.total), {"data-act": "cancel_all"}));
}

function noJobs() {
  if (view.manages) return empty("There are no jobs on this node.");
  return empty("Only the program that uses this node knows its jobs.");
}

// Jobs that have ended in the meantime are not selected any more.
function forgetEndedJobs() {
  const there = new Set(view.rows.map(jobKey));
  for (const key of chosen) {
    if (!there.has(key)) chosen.delete(key);
  }
}

function nodePage() {
  const node = view.node;
  forgetEndedJobs();
  const jobs = view.rows.length
    ? tableOf(JOB_COLUMNS, row => "j" + jobKey(row), "Jobs on this node")
    : noJobs();
  return [
    h("p", {class: "soft"}, h("a", {href: "#/nodes"}, "\u2190 Nodes")),
    heading(node.name || node.address, addressOf(node)),
    nodeCard(node),
    h("div", {class: "top"}, h("h2", {}, "Jobs on this node"), h("p", {}, count(view.total))),
    jobTools(),
    jobs,
  ];
}

// -- the list of jobs, and one job ----------------------------------------------------------------

const JOB_STATES = ["", "waiting", "running", "done", "failed", "cancelled"];

function stateLinks() {
  const now = place.query.get("state") || "";
  return h("span", {class: "tabs"}, JOB_STATES.map(state => {
    const attributes = {
      href: href("jobs", {state, group: "", page: 1}),
      "aria-current": state === now ? "true" : false,
    };
    return h("a", attributes, state || "all");
  }));
}

function clusterFilter() {
  if (view.clusters.length < 2) return null;
  const now = Number(place.query.get("cluster") || 0);
  const all = h("option", {value: 0, "data-key": 0, selected: now === 0}, "all clusters");
  const options = view.clusters.map(one => {
    const attributes = {
      value: one.number,
      "data-key": one.number,
      selected: one.number === now,
    };
    return h("option", attributes, one.number + " " + one.name);
  });
  const select = {name: "cluster", "data-act": "word", "aria-label": "cluster"};
  return h("select", select, all, options);
}

// The other conditions of the list, each with a link that removes it.
function narrowed() {
  const words = [];
  const node = place.query.get("node");
  if (node) words.push(["of one node", {node: ""}]);
  if (place.query.get("group")) words.push(["of one group of failures", {group: ""}]);
  return words.map(([text, changes]) => {
    return h("span", {class: "soft"}, text + " ",
      h("a", {href: href("jobs", {...changes, page: 1})}, "(show all)"));
  });
}

function jobFilters() {
  const search = {
    name: "search",
    type: "search",
    "data-act": "search",
    "data-key": "search",
    placeholder: "id, arguments, node, error",
    "aria-label": "search jobs",
    value: place.query.get("search") || "",
    autocomplete: "off",
    spellcheck: "false",
  };
  return h("form", {class: "tools", "data-act": "search", role: "search"},
    stateLinks(), h("input", search), clusterFilter(), narrowed());
}

function placeCell(row) {
  if (!row.where) return DASH;
  if (!row.node) return row.where;
  return linkTo("node", {id: row.node}, row.where);
}

function whenCell(row) {
  const at = row.ended || row.began || row.submitted;
  if (!at) return DASH;
  return h("span", {class: "nowrap"}, clock(at));
}

function listedArguments(row) {
  return [
    h("span", {class: "mono args"}, row.arguments || DASH),
    row.text ? subline(row.text, "bad") : null,
  ];
}

const LISTED_COLUMNS = [
  ["Job", "id", "", jobCell],
  ["State", "state", "", row => state(row.state)],
  ["Node", "where", "", placeCell],
  ["Run time", "seconds", "n", row => span(row.seconds)],
  ["Attempts", "attempts", "n", row => row.attempts || DASH],
  ["Last change", "time", "n", whenCell],
  ["Arguments", "", "wide", listedArguments],
];

function unlistedWords() {
  const {waiting, ended} = view.unlisted;
  const parts = [];
  if (waiting) parts.push(many(waiting, "waiting job"));
  if (ended) parts.push(many(ended, "ended job"));
  if (!parts.length) return null;
  const words = "Not listed: " + parts.join(" and ") + ". The list has the last 10" + THIN +
    "000 jobs that ended while the monitor was running, and the first 2" + THIN + "000 " +
    "waiting jobs of each cluster.";
  return h("p", {class: "soft"}, words);
}

function jobsPage() {
  const rows = view.rows.length
    ? tableOf(LISTED_COLUMNS, row => "l" + jobKey(row), "Jobs")
    : empty("No jobs match.");
  return [heading("Jobs", many(view.total, "job")), jobFilters(), rows, unlistedWords()];
}

function jobFacts(row) {
  const isNews = row.status && row.status !== "finished" && row.status !== row.state;
  const facts = [
    ["State", [state(row.state), isNews ? subline(row.status) : null]],
    ["Cluster", clusterName(row.cluster)],
    ["Node", placeCell(row)],
    ["CPUs", row.cpus],
    ["Submitted", row.submitted ? moment(row.submitted) : DASH],
    ["Started", row.began ? moment(row.began) : DASH],
    ["Ended", row.ended ? moment(row.ended) : DASH],
    ["Run time", span(row.seconds)],
    ["Waited", row.submitted && row.began ? span(row.began - row.submitted) : DASH],
    ["Attempts", row.attempts || DASH],
  ];
  return facts.map(([word, value]) => h("div", {}, h("dt", {}, word), h("dd", {}, value)));
}

// Date and time, of seconds since the epoch.
function moment(seconds) {
  const date = new Date(seconds * 1000);
  const isToday = date.toDateString() === new Date().toDateString();
  return (isToday ? "" : date.toLocaleDateString() + " ") + clock(seconds);
}

function isOver(row) {
  return row.state === "done" || row.state === "failed" || row.state === "cancelled";
}

function jobActions(row) {
  if (!view.manages || isOver(row)) return null;
  const cancel = {"data-act": "cancel_one", "data-job": jobKey(row)};
  const look = {type: "button", "data-act": "stacks", "data-key": "stacks",
    "data-job": jobKey(row)};
  return h("span", {class: "actions"},
    row.state === "running" ? h("button", look, "Show stack") : null,
    doubt("one" + jobKey(row), "Cancel", cancel));
}

let stacks = null;   // what was told of a job: {job, text, time}

async function askForStacks(data) {
  const [cluster, job] = data.job.split(".").map(Number);
  const headers = {"Content-Type": "application/json"};
  const body = JSON.stringify({cluster, job});
  try {
    const answer = await ask("api/stacks", {method: "POST", headers, body});
    const told = await answer.json();
    if (!answer.ok) {
      note(told.error);
      return;
    }
    stacks = {job: data.job, text: told.text, time: Date.now() / 1000};
    draw();
  } catch (error) {
    note("The server does not answer: " + error.message);
  }
}

function stacksPart(row) {
  if (!stacks || stacks.job !== jobKey(row)) return null;
  return part("Stack at " + clock(stacks.time), h("pre", {}, stacks.text.trim()));
}

function part(title, ...content) {
  return h("section", {class: "part", "data-key": title}, h("h2", {}, title), content);
}

function attemptsPart(row) {
  const lost = row.lost_with.map(name => h("li", {}, "lost with node " + name));
  const failed = row.failed_attempts.map(attempt => {
    const ran = span(attempt.ended - attempt.began);
    return h("li", {}, "attempt " + attempt.number + " on " + attempt.node + " until " +
      moment(attempt.ended) + ", " + ran + ": ", h("span", {class: "mono"}, attempt.text));
  });
  if (!lost.length && !failed.length) return null;
  return part("Failed attempts", h("ul", {}, lost, failed));
}

function jobPage() {
  const row = view.rows[0];
  const output = [printed("stdout", row.stdout), printed("stderr", row.stderr)];
  const hasOutput = row.stdout || row.stderr;
  return [
    h("p", {class: "soft"}, h("a", {href: "#/jobs"}, "\u2190 Jobs")),
    h("div", {class: "top"},
      h("h1", {}, "Job ", h("span", {class: "mono"}, row.id)), jobActions(row)),
    h("section", {class: "card"}, h("dl", {class: "facts"}, jobFacts(row))),
    part("Arguments", h("pre", {}, row.arguments || "none")),
    row.trace ? part("Failure", h("pre", {class: "err"}, row.trace.trim())) : null,
    attemptsPart(row),
    stacksPart(row),
    part("Output", hasOutput ? output : h("p", {class: "soft"}, outputWords(row))),
  ];
}

function outputWords(row) {
  return isOver(row) ? "There is no output." : "There is no output yet.";
}

// -- the timeline ---------------------------------------------------------------------------------

const SPANS = [
  [60, "1 minute"], [300, "5 minutes"], [900, "15 minutes"], [3600, "1 hour"],
  [21600, "6 hours"], [86400, "1 day"],
];
const KINDS = ["done", "cancelled", "failed"];   // in the order of the server
const COLOURS = {done: "--done", cancelled: "--stop", failed: "--fail", running: "--run"};

// The runs of one CPU, four numbers each: first bin, last bin, kind, jobs.
class BarRow {
  constructor() {
    this.first = 0;
    this.runs = [];
  }

  take(begin, numbers) {
    const at = 4 * (begin - this.first);
    if (at < 0 || at > this.runs.length) {
      this.first = begin;
      this.runs = [];
    } else {
      this.runs.length = at;
    }
    let end = 0;
    for (let run = 0; run < numbers.length; run += 4) {
      const from = end + numbers[run];
      end = from + numbers[run + 1];
      this.runs.push(from, end, numbers[run + 2], numbers[run + 3]);
    }
  }

  // Forget from time to time the runs that ended before this bin.
  trim(bin) {
    let gone = 0;
    while (4 * gone < this.runs.length && this.runs[4 * gone + 1] < bin) gone++;
    if (gone < 200) return;
    this.runs.splice(0, 4 * gone);
    this.first += gone;
  }
}

// The bars of the nodes that are shown, and the canvas that they are painted on. Only the part that
// is in sight is painted.
class Bars {
  constructor() {
    this.rows = new Map();    // id of a node -> its BarRows
    this.nodes = [];          // what the server told of nodes, each with `top` and `height` in px
    this.isAwaited = false;   // it will be painted with the next frame
    this.cursor = null;       // {node, lane, time} that is looked at
    this.pointer = "";        // where the pointer was seen last
    this.asking = 0;
    this.shift = 0;           // s that the server's clock is ahead
  }

  clear() {
    this.rows.clear();
    this.nodes = [];
    this.cursor = null;
    this.hide();
  }

  take(data) {
    this.shift = data.time - Date.now() / 1000;
    this.span = data.span;
    this.bin = data.bin;
    for (const node of data.rows) {
      const rows = this.rows.get(node.id) || [];
      this.rows.set(node.id, rows);
      for (const [lane, begin, numbers] of node.lanes) {
        while (rows.length <= lane) rows.push(new BarRow());
        rows[lane].take(begin, numbers);
      }
      node.count = Math.max(node.cpus, rows.length, ...node.running.map(one => one[0] + 1));
    }
    this.nodes = data.rows.filter(node => node.count > 0);
  }

  paintSoon() {
    if (this.isAwaited || !byId("bars")) return;
    this.isAwaited = true;
    requestAnimationFrame(() => {
      this.isAwaited = false;
      if (byId("bars")) this.paint(byId("bars"));
    });
  }

  // Give each node its place from above.
  arrange() {
    const lanes = this.nodes.reduce((sum, node) => sum + node.count, 0);
    this.lane = 4;
    if (lanes <= 200) this.lane = 8;
    if (lanes <= 48) this.lane = 14;
    if (lanes > 3000) this.lane = 2;
    let top = 22;
    for (const node of this.nodes) {
      node.top = top;
      node.height = Math.max(node.count * this.lane, 13);
      top += node.height + 5;
    }
    return top;
  }

  // Set the size of the canvas, which clears it, if that has changed.
  fit(canvas) {
    const height = this.arrange();
    const box = getComputedStyle(canvas.parentElement);
    const padding = parseFloat(box.paddingLeft) + parseFloat(box.paddingRight);
    const width = Math.floor(canvas.parentElement.clientWidth - padding);
    const ratio = window.devicePixelRatio || 1;
    const scale = height * ratio > 16000 ? 1 : ratio;   // browsers have a limit
    this.gutter = width < 600 ? 76 : 130;
    this.width = width;
    const pixels = {width: Math.round(width * scale), height: Math.round(height * scale)};
    if (canvas.width !== pixels.width || canvas.height !== pixels.height) {
      Object.assign(canvas, pixels);
      canvas.style.width = width + "px";
      canvas.style.height = height + "px";
    }
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    return context;
  }

  now() {
    return Date.now() / 1000 + this.shift;
  }

  x(time) {
    const part = (time - this.left) / this.span;
    return this.gutter + Math.max(0, Math.min(1, part)) * (this.width - this.gutter);
  }

  paint(canvas) {
    const began = performance.now();
    const context = this.fit(canvas);
    const style = getComputedStyle(document.documentElement);
    this.colours = {};
    for (const [kind, name] of Object.entries(COLOURS)) {
      this.colours[kind] = style.getPropertyValue(name).trim();
    }
    this.ground = style.getPropertyValue("--sunk").trim();
    this.ink = style.getPropertyValue("--soft").trim();
    this.left = this.now() - this.span;
    const place = canvas.getBoundingClientRect();
    const from = -place.top - 50;
    const to = from + window.innerHeight + 100;
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.clearRect(0, from, this.width, to - from);
    if (from < 22) this.paintAxis(context);
    let painted = 0;
    for (const node of this.nodes) {
      if (node.top + node.height < from || node.top > to) continue;
      this.paintNode(context, node);
      painted++;
    }
    if (this.cursor) this.paintCursor(context);
    canvas.dataset.nodes = painted;
    canvas.dataset.ms = (performance.now() - began).toFixed(2);
  }

  paintAxis(context) {
    context.fillStyle = this.ink;
    const steps = this.width < 600 ? 2 : 4;
    for (let step = 0; step <= steps; step++) {
      const time = this.left + this.span * step / steps;
      context.textAlign = "center";
      if (step === 0) context.textAlign = "left";
      if (step === steps) context.textAlign = "right";
      context.fillText(step === steps ? "now" : clock(time), this.x(time), 9);
    }
  }

  paintNode(context, node) {
    const rows = this.rows.get(node.id) || [];
    context.fillStyle = this.ink;
    context.textAlign = "left";
    const name = node.name || node.address;
    context.fillText(name, 0, node.top + Math.min(7, node.height / 2), this.gutter - 8);
    context.fillStyle = this.ground;
    context.fillRect(this.gutter, node.top, this.width - this.gutter, node.count * this.lane);
    rows.forEach((row, lane) => {
      row.trim(this.left / this.bin);
      this.paintRow(context, row.runs, node.top + lane * this.lane);
    });
    for (const [lane, began] of node.running) this.paintRunning(context, node, lane, began);
  }

  paintRow(context, runs, top) {
    const height = this.lane > 4 ? this.lane - 2 : this.lane - 1;
    const right = this.left / this.bin;
    const perBin = (this.width - this.gutter) * this.bin / this.span;
    for (let at = 0; at < runs.length; at += 4) {
      if (runs[at + 1] < right) continue;
      const begin = this.gutter + Math.max(0, runs[at] - right) * perBin;
      const end = Math.min(this.width, this.gutter + (runs[at + 1] + 1 - right) * perBin);
      const gap = end - begin > 3 ? 1 : 0;
      const length = Math.max(1, end - begin - gap);
      this.paintBar(context, KINDS[runs[at + 2]], begin, top, length, height);
    }
  }

  // Colour and shape show how a job ended: a cancelled one has half the height, a failed one has a
  // line in it.
  paintBar(context, kind, begin, top, width, height) {
    context.fillStyle = this.colours[kind];
    if (kind === "cancelled") {
      context.fillRect(begin, top + height / 2, width, height / 2);
      return;
    }
    context.fillRect(begin, top, width, height);
    if (kind === "failed" && height > 4) {
      context.fillStyle = this.ground;
      context.fillRect(begin, top + Math.floor(height / 2), width, 1);
    }
  }

  paintRunning(context, node, lane, began) {
    const top = node.top + lane * this.lane;
    const height = this.lane > 4 ? this.lane - 2 : this.lane - 1;
    const begin = this.x(began);
    const width = Math.max(1, this.width - begin);
    context.fillStyle = this.colours.running;
    context.globalAlpha = 0.55;
    context.fillRect(begin, top, width, height);
    context.globalAlpha = 1;
    context.fillRect(this.width - 2, top, 2, height);
  }

  paintCursor(context) {
    const {node, lane, time} = this.cursor;
    context.strokeStyle = this.ink;
    context.lineWidth = 1;
    const x = this.x(time);
    context.strokeRect(x - 3, node.top + lane * this.lane - 1.5, 6, this.lane + 1);
  }

  // The CPU and the time at a position of the canvas; null if there is none.
  find(x, y) {
    const node = this.nodes.find(one => y >= one.top && y < one.top + one.height);
    if (!node) return null;
    const lane = Math.min(node.count - 1, Math.floor((y - node.top) / this.lane));
    const part = (x - this.gutter) / (this.width - this.gutter);
    return {node, lane, time: this.left + part * this.span, isName: part < 0};
  }

  look(cursor, x, y) {
    this.cursor = cursor;
    clearTimeout(this.asking);
    if (!cursor || cursor.isName) {
      this.hide();
      return;
    }
    this.asking = setTimeout(() => this.askFor(cursor, x, y), 100);
  }

  // The jobs at a position: one that runs, or those that have ended there.
  async jobsAt(cursor) {
    const {node, lane, time} = cursor;
    const running = node.running.find(one => one[0] === lane && one[1] <= time + this.bin);
    if (running) {
      const [, , cluster, job] = running;
      const answer = await ask("api/job?cluster=" + cluster + "&job=" + job, {});
      return answer.ok ? answer.json() : {rows: [], total: 0};
    }
    const around = Math.round(1000 * this.bin);
    const words = new URLSearchParams({
      node: node.id, lane, ms: Math.round(1000 * time), around,
    });
    const answer = await ask("api/at?" + words, {});
    return answer.ok ? answer.json() : {rows: [], total: 0};
  }

  async askFor(cursor, x, y) {
    try {
      const found = await this.jobsAt(cursor);
      if (this.cursor === cursor) this.tell(cursor, found, x, y);
    } catch (error) {
      this.hide();
    }
  }

  tell(cursor, found, x, y) {
    const tip = byId("tip");
    if (!tip) return;
    const where = (cursor.node.name || cursor.node.address) + ", CPU " + (cursor.lane + 1);
    const lines = found.rows.map(row => {
      return h("p", {},
        state(row.state), " ", linkTo("job", {cluster: row.cluster, job: row.job}, row.id), " ",
        span(row.seconds), h("span", {class: "mono args"}, row.arguments || ""));
    });
    const more = found.total - found.rows.length;
    patch(tip, [
      h("p", {class: "soft"}, where + ", " + clock(cursor.time)),
      ...lines,
      lines.length ? "" : h("p", {}, "No jobs ran."),
      more > 0 ? h("p", {class: "soft"}, "and " + many(more, "other job")) : "",
    ].filter(item => item !== ""));
    cursor.found = found;
    tip.hidden = false;
    const left = Math.max(0, Math.min(x + 12, this.width - tip.offsetWidth - 4));
    tip.style.left = left + "px";
    tip.style.top = y + 16 + "px";
  }

  hide() {
    const tip = byId("tip");
    if (tip) tip.hidden = true;
  }

  // The arrow keys move the cursor.
  move(key) {
    if (!this.nodes.length) return;
    const cursor = this.cursor || {node: this.nodes[0], lane: 0, time: this.now() - this.bin};
    let {node, lane, time} = cursor;
    const at = this.nodes.findIndex(one => one.id === node.id);
    node = this.nodes[Math.max(0, at)];
    if (key === "ArrowLeft") time -= 4 * this.bin;
    if (key === "ArrowRight") time += 4 * this.bin;
    if (key === "ArrowDown") lane++;
    if (key === "ArrowUp") lane--;
    if (lane < 0 && at > 0) {
      node = this.nodes[at - 1];
      lane = node.count - 1;
    } else if (lane >= node.count && at < this.nodes.length - 1) {
      node = this.nodes[at + 1];
      lane = 0;
    }
    lane = Math.max(0, Math.min(node.count - 1, lane));
    time = Math.max(this.left, Math.min(this.now(), time));
    this.look({node, lane, time}, this.x(time), node.top + lane * this.lane);
    this.paintSoon();
  }

  open() {
    if (!this.cursor) return;
    if (this.cursor.isName) {
      location.hash = "#/node?id=" + encodeURIComponent(this.cursor.node.id);
    } else if (this.cursor.found && this.cursor.found.rows.length) {
      const [row] = this.cursor.found.rows;
      location.hash = "#/job?cluster=" + row.cluster + "&job=" + row.job;
    }
  }
}

const bars = new Bars();

function spanChoice() {
  const options = SPANS.map(([seconds, words]) => {
    return h("option", {value: seconds, "data-key": seconds, selected: seconds === view.span},
      words);
  });
  const select = {name: "span", "data-act": "word", "aria-label": "time range"};
  return h("select", select, options);
}

function legend() {
  const entries = [["done", "done"], ["run", "running"], ["stop", "cancelled"], ["fail", "failed"]];
  return h("span", {class: "legend"}, entries.map(([kind, words]) => {
    return h("span", {}, mark(kind), words);
  }));
}

function timelinePage() {
  if (!view.rows.length) return [heading("Timeline"), empty("No nodes are known yet.")];
  const busy = view.rows.reduce((sum, node) => sum + node.running.length, 0);
  const all = view.rows.reduce((sum, node) => sum + node.count, 0);
  const words = busy + " of " + many(all, "CPU") + " used";
  const canvas = {
    id: "bars",
    "data-own": true,
    "data-key": "bars",
    tabindex: 0,
    role: "img",
    "aria-label": "Timeline of the jobs on each CPU. The arrow keys move along the bars, and " +
      "Enter opens a job. The Jobs page shows the same jobs as a table.",
  };
  const tip = {id: "tip", class: "tip", "data-own": true, "data-key": "tip", role: "status",
    hidden: true};
  return [
    heading("Timeline", words),
    h("div", {class: "tools"}, spanChoice(), legend()),
    h("div", {class: "bars"}, h("canvas", canvas), h("div", tip)),
    pager(),
  ];
}

document.addEventListener("mousemove", event => {
  if (event.target.id !== "bars") return;
  // The bars below a pointer at rest have changed: the cursor of the keyboard stays where it is.
  const point = event.clientX + " " + event.clientY;
  if (point === bars.pointer) return;
  bars.pointer = point;
  const {offsetX: x, offsetY: y} = event;
  bars.look(bars.find(x, y), x, y);
  event.target.classList.toggle("named", Boolean(bars.cursor && bars.cursor.isName));
});
document.addEventListener("mouseout", event => {
  if (event.target.id === "bars" && !(event.relatedTarget && event.relatedTarget.closest("#tip"))) {
    bars.pointer = "";
    bars.look(null);
  }
});
document.addEventListener("keydown", event => {
  if (event.target.id !== "bars") return;
  if (event.key.startsWith("Arrow")) {
    event.preventDefault();
    bars.move(event.key);
  } else if (event.key === "Enter") {
    bars.open();
  }
});
document.addEventListener("click", event => {
  if (event.target.id !== "bars") return;
  const cursor = bars.find(event.offsetX, event.offsetY);
  if (cursor && cursor.isName) {
    bars.cursor = cursor;
    bars.open();
  } else if (cursor) {
    bars.jobsAt(cursor).then(found => {
      bars.cursor = {...cursor, found};
      bars.open();
    }, () => {});
  }
});
document.addEventListener("scroll", () => bars.paintSoon(), {passive: true});
window.addEventListener("resize", () => bars.paintSoon());
// Time goes on even if no job begins or ends.
setInterval(() => {
  if (place && place.page === "timeline" && !document.hidden) bars.paintSoon();
}, 1000);

// -- failures -------------------------------------------------------------------------------------

const FAILED_JOB_COLUMNS = [
  ["Job", "mono", job => linkTo("job", {cluster: job.cluster, job: job.job}, job.id)],
  ["Arguments", "mono args wide", job => job.arguments || "none"],
  ["Status", "", job => job.status],
  ["Node", "", job => job.node || DASH],
  ["Time", "nowrap", job => clock(job.time)],
];

function failedJob(job) {
  const cells = FAILED_JOB_COLUMNS.map(([word, kind, cell]) => {
    return h("td", {class: kind || false, "data-label": word}, cell(job));
  });
  return h("tr", {}, cells);
}

// Failed jobs whose tracebacks have the same last line, except for numbers and names of nodes.
function failureGroup(group) {
  const head = FAILED_JOB_COLUMNS.map(([word]) => h("th", {scope: "col"}, word));
  const jobs = h("table", {class: "stack"},
    h("thead", {}, h("tr", {}, head)),
    h("tbody", {}, group.jobs.map(job => failedJob({...job, cluster: group.cluster}))));
  const summary = [
    h("span", {class: "count"}, mark("fail"), count(group.count)),
    h("span", {class: "line mono"}, group.text || "no error text", subline(ownerOf(group))),
    h("span", {class: "soft nowrap"}, clock(group.last)),
  ];
  const all = linkTo("jobs", {state: "failed", group: group.group},
    group.count === 1 ? "show this job in the list"
      : "show all " + count(group.count) + " in the list");
  return h("details", {"data-key": "f" + group.group},
    h("summary", {}, summary),
    h("div", {}, h("p", {}, all), h("pre", {}, group.trace.trim()), jobs));
}

function ownerOf(group) {
  const name = group.name || "cluster " + group.cluster;
  return group.user ? name + " of " + group.user : name;
}

function failuresPage() {
  const words = "grouped by the last line of their tracebacks, in which # replaces numbers and " +
    "names of nodes; sorted by ";
  const byNumber = sortLink("number", "count", true);
  const byTime = sortLink("time", "last", true);
  const groups = view.rows.length
    ? h("div", {class: "wrap"}, view.rows.map(failureGroup))
    : empty("No jobs have failed.");
  return [heading("Failures", words, byNumber, ", ", byTime), groups, pager()];
}

// -- accounts -------------------------------------------------------------------------------------

const SUMS = {user: "User", day: "Day", computation: "Computation"};
const PERIODS = [[1, "today"], [7, "7 days"], [31, "31 days"], [36500, "all time"]];

function sumCell(row) {
  const name = row[view.by] || "no name";
  return [name, view.by === "computation" ? subline(row.program) : null];
}

function sumColumns() {
  const numbers = ["done", "failed", "cancelled"].map(field => {
    return [field[0].toUpperCase() + field.slice(1), field, "n", row => count(row[field])];
  });
  return [
    [SUMS[view.by], view.by, "wide", sumCell],
    ["CPU time", "cpu_seconds", "n", row => span(row.cpu_seconds)],
    ["Jobs", "jobs", "n", row => count(row.jobs)],
    ...numbers,
  ];
}

function sumLinks() {
  return h("span", {class: "tabs"}, Object.entries(SUMS).map(([by, words]) => {
    const current = by === view.by ? "true" : false;
    const sort = by === "day" ? "day" : "cpu_seconds";
    const link = href("accounts", {by, sort, desc: 1, page: 1});
    return h("a", {href: link, "aria-current": current}, "by " + words.toLowerCase());
  }));
}

function periodChoice() {
  const now = Number(place.query.get("days") || 36500);
  const options = PERIODS.map(([days, words]) => {
    return h("option", {value: days, "data-key": days, selected: days === now}, words);
  });
  return h("select", {name: "days", "data-act": "word", "aria-label": "period"}, options);
}

function accountsPage() {
  if (view.none) return [heading("Accounts"), empty(view.none)];
  const words = view.complete
    ? "from the history of the scheduler" : "reading the history of the scheduler";
  const rows = view.rows.length
    ? tableOf(sumColumns(), row => "a" + row.user + row.day + row.computation + row.program,
      "Accounts")
    : empty("No jobs ended in this period.");
  return [heading("Accounts", words),
    h("div", {class: "tools"}, sumLinks(), periodChoice()), rows];
}

// -- managing -------------------------------------------------------------------------------------

function clusterChoice() {
  if (view.clusters.length < 2 || view.shared) return null;
  const options = view.clusters.map(one => {
    return h("option", {value: one.number, "data-key": one.number}, one.number + " " + one.name);
  });
  return h("label", {}, "Cluster", h("select", {name: "cluster"}, options));
}

function cpusToUse() {
  if (view.shared) return null;
  const input = h("input", {name: "cpus", type: "number", placeholder: "all"});
  return h("label", {}, "Maximum CPUs", input);
}

function addForm() {
  const host = {
    name: "host",
    required: true,
    autocomplete: "off",
    autocapitalize: "none",
    spellcheck: "false",
    size: 22,
  };
  const port = {name: "port", type: "number", min: 1, max: 65535, placeholder: "9701"};
  const what = "a host on which dispynode runs, or a pattern with * for all nodes that answer";
  return h("section", {class: "card"},
    h("div", {class: "top"}, h("h2", {}, "Add a node"), h("p", {}, what)),
    h("form", {"data-act": "add"},
      clusterChoice(),
      h("label", {}, "Host", h("input", host)),
      h("label", {}, "Port", h("input", port)),
      cpusToUse(),
      h("button", {class: "main"}, "Add")));
}

function cpusForm(row) {
  if (row.state === "closed") return DASH;
  const input = {
    name: "cpus",
    type: "number",
    value: row.cpus,
    max: row.offered || false,
    "aria-label": "CPUs of " + (row.name || row.address),
  };
  return h("form", {"data-act": "cpus", "data-node": row.id},
    h("input", input),
    " ",
    h("button", {}, "Set"));
}

function drainOrUse(row) {
  if (row.id.includes("gone:")) return null;
  const isIdle = row.state === "closed" || row.state === "drained";
  return isIdle ? button("use", row, "Use again") : button("drain", row, "Drain");
}

function releaseButton(row) {
  if (row.state === "closed") return null;
  const attributes = {"data-act": "release", "data-node": row.id};
  return doubt("release" + row.id, "Release", attributes);
}

function nodeActions(row) {
  return h("div", {class: "actions"}, drainOrUse(row), releaseButton(row));
}

const MANAGE_COLUMNS = [
  ["Node", "name", "", nodeName],
  ["State", "state", "", stateCell],
  ["CPUs used", "used", "n", cpusCell],
  ["CPUs to use", "", "wide", cpusForm],
  ["", "", "wide", nodeActions],
];

const NOT_MANAGED = "This page only shows nodes. The program that uses them manages them.";
const DRAIN_AND_RELEASE = "Drain: no more jobs are sent to the node. Release: when its jobs " +
  "have ended, the node is free for other programs.";
const FOR_ALL = " This applies to all clusters, including later ones. The number of CPUs is the " +
  "maximum for each cluster.";

function managePage() {
  if (!view.manages) return [heading("Manage"), empty(NOT_MANAGED)];
  const rows = view.rows.length
    ? tableOf(MANAGE_COLUMNS, row => "m" + row.id, "Nodes")
    : empty("No nodes are known yet.");
  const words = DRAIN_AND_RELEASE + (view.shared ? FOR_ALL : "");
  return [heading("Manage"), addForm(), rows, h("p", {class: "soft"}, words)];
}

// -- drawing --------------------------------------------------------------------------------------

const DRAW = {
  clusters: clustersPage,
  timeline: timelinePage,
  jobs: jobsPage,
  job: jobPage,
  nodes: nodesPage,
  node: nodePage,
  failures: failuresPage,
  accounts: accountsPage,
  manage: managePage,
};

let entry = "";   // of the navigation, that is marked

// Whether the source has data for a page.
function isServed(page) {
  if (!view) return page !== "accounts";
  if (view.home === "nodes") return NODE_PAGES.has(page);
  return page !== "accounts" || Boolean(view.shared);
}

function drawNavigation() {
  const shown = ENTRY[place.page] || place.page;
  const entries = Object.entries(PAGES).filter(([name]) => isServed(name));
  const links = entries.map(([name, words]) => {
    return h("a", {href: "#/" + name, "aria-current": name === shown ? "page" : false}, words);
  });
  patch(byId("nav"), links);
  if (shown !== entry) {   // in a narrow window it may be out of sight
    entry = shown;
    const current = document.querySelector("nav a[aria-current]");
    if (current) current.scrollIntoView({block: "nearest", inline: "nearest"});
  }
  const words = [PAGES[place.page] || TITLES[place.page], "dispy"];
  document.title = [...progressWords(), ...words].join(" \u00b7 ");
}

// How far all jobs are, for the title of the window.
function progressWords() {
  const jobs = view && view.jobs;
  if (!jobs || !jobs.submitted) return [];
  const words = [Math.floor(100 * jobs.ended / jobs.submitted) + " %"];
  if (jobs.failed) words.push(count(jobs.failed) + " failed");
  return words;
}

function content() {
  if (view === null) return h("p", {class: "empty", "data-key": "loading"}, "Loading.");
  if (view.error) {
    const noToken = "Open this page with the link that the program printed: it contains the token.";
    const text = view.status === 401 ? noToken : view.error;
    return h("p", {class: "empty", "data-key": "error"}, text);
  }
  return h("div", {"data-key": placeKey()}, DRAW[place.page]());
}

// The outputs whose end the reader has scrolled away from.
function outputsLeft() {
  const outputs = [...document.querySelectorAll("[data-follow]")];
  return new Set(outputs.filter(box => box.scrollHeight - box.scrollTop - box.clientHeight > 4));
}

function followOutputs(left) {
  for (const box of document.querySelectorAll("[data-follow]")) {
    if (!left.has(box)) box.scrollTop = box.scrollHeight;
  }
}

function draw() {
  drawNavigation();
  const focused = document.activeElement;
  const left = outputsLeft();
  patch(byId("main"), [content()]);
  followOutputs(left);
  if (place.page === "timeline") bars.paintSoon();
  // An element that was moved has lost the focus.
  if (focused && focused !== document.activeElement && focused.isConnected) {
    focused.focus({preventScroll: true});
  }
}

// -- what the reader does -------------------------------------------------------------------------

function endingWords(n) {
  return many(n, "job") + (n === 1 ? " is" : " are") + " being ended.";
}

function cancelledWords(n) {
  return many(n, "job") + (n === 1 ? " is" : " are") + " cancelled.";
}

async function cancelJobs(keys) {
  const byCluster = new Map();
  for (const key of keys) {
    const [cluster, job] = key.split(".").map(Number);
    byCluster.set(cluster, [...(byCluster.get(cluster) || []), job]);
  }
  for (const [cluster, jobs] of byCluster) {
    await post("cancel", {cluster, node: view.node.id, jobs}, endingWords);
  }
}

async function cancelAll() {
  sure = "";
  const node = view.node;
  for (const use of node.clusters) {
    await post("cancel", {cluster: use.number, node: node.id, jobs: "all"}, endingWords);
  }
}

function askAgain(data) {
  sure = data.name;
  draw();
  const yes = document.querySelector("button.sure");
  if (yes) yes.focus();
}

function askNoMore() {
  sure = "";
  draw();
}

function choose(data, box) {
  if (box.checked) {
    chosen.add(data.job);
  } else {
    chosen.delete(data.job);
  }
  draw();
}

function cancelOne(data) {
  sure = "";
  const [cluster, job] = data.job.split(".").map(Number);
  post("cancel", {cluster, jobs: [job]}, endingWords);
}

function cancelChosen() {
  sure = "";
  cancelJobs([...chosen]);
}

function cancelWaitingJobs(data) {
  sure = "";
  post("cancel_waiting", {cluster: Number(data.cluster)}, cancelledWords);
}

function release(data) {
  sure = "";
  post("release", {node: data.node}, () => "The node will be released when its jobs have ended.");
}

// Search when the reader has not typed for a moment.
let searching = 0;

function searchSoon(input) {
  clearTimeout(searching);
  searching = setTimeout(() => {
    if (place.page !== "jobs") return;
    location.replace(href("jobs", {search: input.value, page: 1}));
  }, 250);
}

function chooseWord(select) {
  location.hash = href(place.page, {[select.name]: select.value, page: 1});
}

document.addEventListener("input", event => {
  if (event.target.dataset.act === "search") searchSoon(event.target);
});
document.addEventListener("change", event => {
  if (event.target.dataset.act === "word") chooseWord(event.target);
});

// data-act of an element -> what a click on it does
const CLICKS = {
  sure: askAgain,
  unsure: askNoMore,
  choose,
  cancel: data => cancelJobs([data.job]),
  cancel_some: cancelChosen,
  cancel_all: cancelAll,
  cancel_waiting: cancelWaitingJobs,
  cancel_one: cancelOne,
  stacks: askForStacks,
  use: data => post("use", {node: data.node}, () => "The node is used again."),
  drain: data => post("drain", {node: data.node}, () => "No more jobs are sent to the node."),
  release,
};

function numberOrNull(text) {
  return text ? Number(text) : null;
}

function addNode(data, words) {
  const [first] = view.clusters;
  const body = {
    cluster: Number(words.get("cluster") || (first ? first.number : 0)),
    host: words.get("host").trim(),
    port: numberOrNull(words.get("port")),
    cpus: numberOrNull(words.get("cpus")),
  };
  post("add", body, () => "Looking for the node, which will appear below.");
}

function setCpus(data, words) {
  const body = {node: data.node, cpus: Number(words.get("cpus"))};
  post("cpus", body, () => "The number of CPUs is set.");
}

// data-act of a form -> what is done when it is sent
const FORMS = {add: addNode, cpus: setCpus, search: () => {}};

document.addEventListener("click", event => {
  const target = event.target.closest("[data-act]");
  if (!target || target.tagName === "FORM") return;
  const click = CLICKS[target.dataset.act];
  if (click) click(target.dataset, target);
});
document.addEventListener("submit", event => {
  event.preventDefault();
  const form = event.target;
  const send = FORMS[form.dataset.act];
  if (send) send(form.dataset, new FormData(form));
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && sure) askNoMore();
});
// A hidden window requests nothing.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    if (reading) reading.abort();
  } else if (place) {
    plots.clear();
    listen();
  }
});
window.addEventListener("hashchange", go);
document.querySelector(".skip").addEventListener("click", event => {
  event.preventDefault();
  byId("main").focus();
});
go();
'''

STATIC = {
    '/': ('text/html; charset=utf-8', HTML), '/style.css': ('text/css; charset=utf-8', CSS),
    '/app.js': ('text/javascript; charset=utf-8', SCRIPT), '/icon.svg': ('image/svg+xml', ICON)
}


if __name__ == '__main__':
    # Once more under its own name, so that classes have one identity.
    import importlib
    sys.exit(importlib.import_module('dispy_httpd').main())
