#!/usr/bin/env python3
"""See and manage clusters in a browser.

    import dispy, dispy_httpd
    cluster = dispy.JobCluster(compute)
    server = dispy_httpd.DispyHTTPServer(cluster)     # prints a link with a token: open it in a
    browser
    ...
    server.shutdown()

    python -m dispy_httpd --scheduler HOST[:PORT]     # a dispyscheduler: all clusters of all
    programs, all nodes
    dispyscheduler --httpd [PORT]                     # the same, in its process
    python -m dispy_httpd --nodes HOST...             # nodes beside any program; they are not taken
    from their client

    program                                                                       browsers
    +--------------------------------------------------------------------+       +--------------------------+
    | driver threads   <- ask -  snapshot thread  -> Snapshot (plain)    |       | page, script, style      |
    | (dispy)                    at most 4 a second   |  condition       |       |   of this file           |
    |                            accept thread        v                  | <---> | fetch: event stream, or  |
    |                            a thread a request: view of it, JSON    |       | a poll where that fails  |
    +--------------------------------------------------------------------+       +--------------------------+

One thread takes snapshots in the driver's turn, whatever the number of browsers; it costs O(nodes),
not O(jobs), and what takes long is done less often. Requests sort it and cut a page out of it. Jobs
tell nothing while they run well: only what fails and what is printed is noted. A scheduler is asked
by `Call`, 100 rows at once. A monitor proves that it knows the secret of the programs, as they do,
and sees and manages what belongs to all of them.

Safety. It listens on 127.0.0.1 unless told otherwise. All but page, script, style and icon, which
hold no data, need the token: `Authorization: Bearer TOKEN`. It stands in the fragment of the link,
which browsers do not send. There are no cookies; Host, Origin and Sec-Fetch-Site are checked;
changes are made by POST of application/json alone; the page runs no script but its own and shows
what comes as text. `certfile` (and `keyfile`) give TLS; without it, what is sent over a network can
be read there, the token too.

GET, answered in JSON; with `Accept: text/event-stream` as a stream: `data:` with the same JSON
whenever it has changed (there, `plot` only when it has), `event: end` when the server stops. Tables
take ?sort=FIELD&desc=0|1&page=N (from 1)&per=N (1 to 200) and are
  {time s since the epoch, rows [...], total, page, pages, sort, desc, per, manages bool: whether
  POST can change anything,
   shared bool: whether a scheduler is watched, source str: what is watched, or why it cannot be,
   nothing str: to be said where there is no
   cluster, clusters [{number, name}], snapshot_seconds: of the driver's thread for the last
   snapshot}
/api/clusters  rows {number int, name str, program str: user@host PID n of who uses a scheduler,
else '',
               state: 'working' | 'idle' | 'waiting for a node' | 'closed', submitted, waiting,
               running, done, failed, cancelled: jobs (running: those that nodes have CPUs for;
               failed: Terminated or Abandoned), rate jobs ended a second over 30 s at
               most, left s or null, elapsed s, job_seconds s, nodes int (ready), cpus, used: CPUs,
               plot [[s since the
               epoch, jobs ended, CPUs used, CPUs], ...] at most 240}
/api/nodes     rows {id str, name str, address str, port int, state str, reason str: why it is not
used, cpus, used: CPUs, jobs: ended
               there, job_seconds s, memory, disk: bytes free, or null, load %: of its CPUs, or
               null, heard s since its last sign of life, or
               null, holder str: who holds it, known with --nodes only, offered int: CPUs, platform
               str, clusters [{number, name, state, reason,
               cpus, used, jobs, job_seconds}]}
/api/node      ?id=ID, a table of its jobs with `node`: the row above; rows {cluster int, job int: a
number for `cancel`, id str,
               arguments str (short form; of what is no builtin only the type), state: 'running' |
               'waits there', seconds s since it was sent or, where
               the node has said so, that it has run; null: not known yet, stdout, stderr: the last
               4 KiB printed, live bool: whether output is
               sent while it is printed, which it is by nodes that were set up after this server was
               made, or if the cluster has on_output; null: a scheduler's, which
               passes output on and does not keep it. There `id` is the number of the job in its
               program}
/api/failures  rows {text str: the last line, count int, last s since the epoch, cluster int, trace
str: of the last one, jobs [{id, arguments,
               node, status, time}], at most 10}; of the last 500 failed jobs of each cluster, or of
               a scheduler
/metrics       text for Prometheus; needs the token as well (`authorization: {credentials_file: F}`,
and `--token-file F` here) With a scheduler jobs that have ended are counted since it was started,
and clusters are shown until their program closes them. POST, a JSON object; answered by {done int}.
`cluster` is its number; where it may be missing, all clusters that use the node are meant, which
with a scheduler is always so, and holds for clusters that come later too. /api/cancel
{cluster, node: id, jobs: [number, ...] or 'all'}: end jobs that are on a node /api/cancel_waiting
{cluster}: end jobs that do not run /api/add             {cluster, host str, port int?, cpus int?}:
use a node, or all that a word with * means /api/use, /api/drain, /api/release  {node, cluster?}:
use it again; send nothing new there; let it go when its jobs have ended /api/cpus            {node,
cpus int, cluster?}: use at most so many Errors: {error str} with 400 (not understood), 401 (token),
403 (another site's page asks), 404, 405, 409 (cannot be done now), 411, 413 (over 64 KiB), 414,
415, 417, 421 (another Host), 431, 501, 503 (over 64 connections), 505.

Files this program needs: this one, dispy.py, dispynode.py, cloudpickle.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import math
import os
import pickle
import re
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
from typing import Any, Callable, Deque, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

try:
    from dispy import Driver
except ImportError as exc:   # this file was copied alone, or beside one of another release
    text = str(exc)
    if exc.name == 'dispy':
        text = 'dispy_httpd.py needs the files dispy.py and dispynode.py of the same release beside it, in %s (%s)' % (
            os.path.dirname(os.path.abspath(__file__)), exc)
    if __name__ == '__main__':
        sys.exit(text)
    raise ImportError(text, name=exc.name, path=exc.path) from exc

import dispy
from dispy import SHORT, ConnectionSettings, DispyJob, JobCluster, Monitor, NodeSpec, SharedJobCluster, words_of
from dispynode import (NODE_PORT, PULSE, SCHEDULER_PORT, DispyError, Query, SecretError,
                       __version__, find_secret, host_and_port, _no_password, _write_private,
                       size_of, tls_files, split_needs, Each, HANDSHAKE_TIME)

__all__ = ['DispyHTTPServer']

# --------------------------------------------------------------------------------------------------
# Constants
# --------------------------------------------------------------------------------------------------

HTTPD_PORT = 8181
SNAPSHOTS_APART = 0.25        # s between two snapshots at least
SAMPLES_APART = 1.0           # s between two points of a plot, and two snapshots when nobody looks
PLOT_POINTS = 240             # then every second one is dropped
RATE_SPAN = 30.0              # s over which the rate is measured
REPORTS_APART = 5.0           # s between two questions to a node for what is free there
REPORTS_A_TURN = 20           # questions asked in one turn of the driver
# S after a request that snapshots are still taken as often as asked for
LOOKED_FOR = 5.0
# Failed jobs of a cluster, and characters of a traceback
FAILURES_KEPT = 500
FAILURE_TEXT = 8000
ARGUMENTS_MOST = 16384        # bytes of pickled arguments that are opened to be shown
# Bytes of a running job's output; jobs with output
OUTPUT_KEPT = 4096
OUTPUTS_KEPT = 1000
PER_PAGE = 50
PER_PAGE_MOST = 200
SCHEDULER_PAGE = 100          # rows asked of a scheduler at once: a few ms of its loop
TEXTS_KEPT = 5000             # arguments of jobs of a scheduler's nodes
SNAPSHOT_SHARE = 20           # a snapshot that takes the driver 1 s is the only one in so many
# Bytes of a request
MAX_LINE = 4096
MAX_HEAD = 16384
MAX_BODY = 65536
MAX_CONNECTIONS = 64
IO_TIME = 10.0                # s for a request to come, and for an answer to be taken
SIGNAL_CHECK = 0.5            # s after which a signal is seen at the latest
HEARTBEAT = 2.0               # s of silence in a stream: a browser that has gone is noticed

logger = dispy.logger


class Refusal(Exception):
    """A request that is not served: HTTP status and text."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers


# --------------------------------------------------------------------------------------------------
# What of a job can be shown. Nothing of the user's is called: opening his objects could run his
# code.
# --------------------------------------------------------------------------------------------------

class _Placeholder(type):
    """A class that stands for one that is no builtin: its instances take what a pickle does to
    them, and are shown as their type."""

    def __new__(mcs, name: str) -> '_Placeholder':
        return super().__new__(
            mcs, name, (), {
                '__new__': lambda cls, *args, **kwargs: object.__new__(cls),
                '__repr__': lambda self: '<%s>' % name,
                '__call__': lambda self, *args, **kwargs: self, '__reduce__': None,
                **dict.fromkeys(('__init__', '__setstate__', 'append', 'extend', 'add', '__setitem__'), lambda self, *args, **kwargs: None)
            })

    def __init__(cls, name: str) -> None:
        super().__init__(name, (), {})

    def __repr__(cls) -> str:
        return cls.__name__


class _SafeUnpickler(pickle.Unpickler):
    """Opens builtins; every other name becomes a class that stands for it."""

    def find_class(self, module: str, name: str) -> Any:
        # How a class of the program itself travels
        if (module, name) == ('dispynode', 'class_of'):
            return lambda tracker, version, module, name, make, args: _Placeholder(name)
        if module == 'builtins':
            return {'complex': complex, 'range': range}.get(name, _Placeholder(name))
        return _Placeholder('function' if (module, name) == ('dispynode',
                                                       'function_of') else '%s.%s' % (module, name))

    def persistent_load(self, number: Any) -> Any:
        raise pickle.UnpicklingError('a persistent id')


def arguments_text(payload: Any) -> str:
    """The short form of a job's packed arguments; what is large is not opened."""
    if payload is None:
        return ''
    if isinstance(payload, int) or size_of(payload) > ARGUMENTS_MOST:
        return '%s of arguments' % bytes_text(
            payload if isinstance(payload, int) else size_of(payload))
    if isinstance(payload, tuple):
        data = b''.join(payload)
    else:
        data = bytes(payload)
    try:
        _, body = split_needs(data)
        _check_memo(bytes(body))
        args, kwargs = _SafeUnpickler(io.BytesIO(body)).load()[:2]
        # As no program packs them: they might have no end
        if type(args) is not tuple or type(kwargs) is not dict:
            raise ValueError('no arguments')
        return words_of(args, kwargs)
    except Exception:  # an unpickler without the real classes may stumble over anything
        return '%s of arguments' % bytes_text(size_of(payload))


def _check_memo(data: bytes) -> None:
    """Raise ValueError for a pickle that ends in the middle, or whose memo would be given memory up
    to some far index."""
    for opcode, value, _ in pickletools.genops(data):
        if opcode.name in ('PUT', 'BINPUT',
                           'LONG_BINPUT') and value is not None and value > len(data):
            raise ValueError('an index of the memo that is larger than the pickle')


def bytes_text(size: float) -> str:
    """A number of bytes for people."""
    for unit in ('bytes', 'KiB', 'MiB'):
        if size < 1024:
            return '%.*f %s' % (unit != 'bytes', size, unit)
        size /= 1024
    return '%.1f GiB' % size


def last_line(text: str) -> str:
    """Of a traceback: what was raised."""
    return (text.strip().splitlines() or [''])[-1].strip()[:300]


class History:
    """Jobs ended and CPUs used over time; also the rate. The snapshot thread's."""

    def __init__(self) -> None:
        self.points: List[List[float]] = []
        self._apart = SAMPLES_APART
        self._recent: Deque[Tuple[float, int]] = collections.deque()

    def add(self, now: float, ended: int, used: int, cpus: int) -> float:
        """A point; returns jobs ended a second. Time that nothing ended in before the first did
        does not count."""
        recent = self._recent
        if not recent or now - recent[-1][0] >= SAMPLES_APART:
            recent.append((now, ended))
        while len(recent) > 1 and (now - recent[0][0] > RATE_SPAN
                                   or recent[1][1] == recent[0][1] and ended > recent[0][1]):
            recent.popleft()
        if not self.points or now - self.points[-1][0] >= self._apart:
            self.points = [
                *(self.points if len(self.points) < PLOT_POINTS else self.points[::2]),
                [round(now, 2), ended, used, cpus]
            ]
            if len(self.points) <= PLOT_POINTS // 2 + 1 and self.points[-1][0] - self.points[0][
                    0] > PLOT_POINTS * self._apart:
                self._apart *= 2
        if now - recent[0][0] >= 0.5:
            return (ended - recent[0][1]) / (now - recent[0][0])
        return 0.0


# --------------------------------------------------------------------------------------------------
# Sources: where snapshots come from. Each has `snapshot`, `jobs`, `failures`, `act`, `close`, and
# gives plain values.
# --------------------------------------------------------------------------------------------------

class ClusterView(Monitor):
    """A cluster that is watched. `output` and `reports` are the driver thread's."""

    def __init__(self, number: int, cluster: Any) -> None:
        self.number = number
        self.cluster = cluster
        self.history = History()
        self.failures: Deque[Tuple[float, Any, Any, int, str,
                                   str]] = collections.deque(maxlen=FAILURES_KEPT)
        self.output: 'collections.OrderedDict[DispyJob, List[bytes]]' = collections.OrderedDict()
        # Node -> when it was asked what is there
        self.asked: Dict[Any, float] = {}
        self.reports: Dict[Any, Tuple[float, Any]] = {}     # node -> when it answered, what
        # Node -> its link when this began: output is not sent along it
        self.live_from: Dict[Any, Any] = {}
        self.ended: float = 0.0                             # when it was closed, s since the epoch

    def failed(self, job: DispyJob, payload: Any) -> None:
        if job.status != DispyJob.Cancelled:
            if payload is not None:
                size = size_of(payload)
            else:
                size = 0
            self.failures.append(
                (job.end_time or time.time(), job.id, payload if size <= ARGUMENTS_MOST else size,
                 job.status, job.ip_addr
                 or '', (job._exception or 'exit status %s' % (job.result, ))[-FAILURE_TEXT:]))

    def printed(self, job: DispyJob, stream: int, offset: int, data: bytes) -> None:
        tails = self.output.setdefault(job, [b'', b''])
        tails[stream - 1] = ((tails[stream - 1] if offset else b'') + data)[-OUTPUT_KEPT:]
        if len(self.output) > OUTPUTS_KEPT:
            for old in [old for old in self.output if old.status in dispy.ENDED]:
                del self.output[old]
        if len(self.output) > OUTPUTS_KEPT:
            self.output.popitem(last=False)

    def attach(self) -> None:
        """The driver's thread."""
        cluster = self.cluster
        if cluster.cargo is not None:
            if not cluster.cargo.spec['live']:
                self.live_from = {
                    peer.key: peer.link
                    for peer in cluster.driver.nodes.of(cluster.comp)
                    if peer.uses[cluster.comp].offered
                }
            cluster.add_monitor(self)

    def ask(self, peer: Any, apart: float) -> bool:
        """Ask a node what is there, `apart` s after the last time. The driver's thread."""
        comp = self.cluster.comp
        driver = self.cluster.driver
        if peer.link is None or not peer.name or driver.now - self.asked.get(peer.key,
                                                                             -apart) < apart:
            return False
        self.asked[peer.key] = driver.now
        future = peer.answers.get((comp, ''))
        if future is None:
            future = peer.answers[comp, ''] = concurrent.futures.Future()
            driver.send(peer.link, Query(comp))
        future.add_done_callback(functools.partial(self._reported, peer.key))
        return True

    def _reported(self, key: Any, future: Any) -> None:
        if future.exception() is None:
            self.reports[key] = (self.cluster.driver.now, future.result())

    def refresh(self) -> None:
        """Before a turn of the driver: what others know. The snapshot thread."""

    def nodes(self) -> List[Any]:
        """Its nodes, with their keys. The driver's thread."""
        return list(self.cluster.driver.nodes.of(self.cluster.comp))

    def in_flight(self, key: Any) -> Dict[int, Any]:
        """Serial -> job of what was sent to a node. The driver's thread."""
        node = self.cluster.driver.schedule.nodes.get(key)
        if node is not None:
            return node.in_flight.get(self.cluster.comp, {})
        return {}

    def runs(self, peer: Any) -> List[int]:
        """Serials of jobs that run on a node; others wait there. O(CPUs). The driver's thread."""
        return self.cluster.driver.schedule.runs(peer.key).get(self.cluster.comp, [])

    def running(self, peer: Any) -> Tuple[int, int]:
        """How many that are, and their CPUs."""
        flight = self.in_flight(peer.key)
        serials = self.runs(peer)
        return len(serials), sum(dispy.cpus_of(flight[serial]) for serial in serials)

    def look(self, asks: List[int]) -> List[dict]:
        """Rows of its nodes. The driver's thread."""
        cluster = self.cluster
        driver = self.cluster.driver
        rows = []
        for peer, state, reason, cpus, _ in driver.queries.nodes_of(cluster.comp):
            survey = cluster.cargo is None
            if asks[0] > 0 and self.ask(peer, SAMPLES_APART if survey else REPORTS_APART):
                asks[0] -= 1
            report = self.reports.get(peer.key, (0.0, None))[1]
            running, used = self.running(peer)
            free = dict(peer.facts.get('available', {}),
                        **(report.available if report is not None else {}))
            rows.append({
                'key': peer.key, 'name': peer.name, 'address': peer.ip_addr, 'port': peer.port,
                'reason': reason.strip()[-2000:],
                'state': 'drained' if state == 'ready' and reason == 'deallocated' else state,
                'cpus': peer.offered if survey else cpus, 'offered': peer.offered,
                'running': running, 'memory': free.get('memory'), 'disk': free.get('disk'),
                'used': free.get('busy', 0) if survey else used,
                'load': None if free.get('cpu') is None else round(100.0 - free['cpu'], 1),
                'heard': round(max(0.0,
                                   driver.clock() -
                                   peer.link.heard), 1) if peer.link is not None else None,
                'holder': str(free.get('holder', peer.facts.get('holder', ''))) if survey else '',
                'platform': str(peer.facts.get('platform', ''))
            })
        return rows

    def times(self, key: Any) -> Tuple[Dict[int, float], Set[int], bool]:
        """Of a node: serial -> seconds that the job has run, which run as far as is known, whether
        output comes. The driver's thread."""
        driver = self.cluster.driver
        peer = driver.nodes.by_key[key]
        self.ask(peer, SAMPLES_APART)
        at, report = self.reports.get(key, (0.0, None))
        if report is not None:
            runs = {serial: seconds + driver.clock() - at for serial, seconds in report.running}
        else:
            runs = {}
        return runs, set(self.runs(peer)), peer.link is not self.live_from.get(key, False)


class SharedClusterView(ClusterView):
    """A SharedJobCluster: its nodes are known to the scheduler, which is asked; where its jobs are,
    it is told."""
    _known: Dict[Any, dispy.NodeInfo] = {}                     # nodes by their keys
    # (address, name) of a node -> serial -> job there
    _flights: Dict[Tuple[str, str], Dict[int, Any]] = {}

    def refresh(self) -> None:
        """As above. While the scheduler is away there is one node: the scheduler, and why."""
        cluster = self.cluster
        driver = self.cluster.driver
        flights: Dict[Tuple[str, str], Dict[int, Any]] = {}
        for job, place in cluster._places.copy().items():
            flights.setdefault((place.ip_addr, place.name), {})[job.serial] = job
        self._flights = flights
        with contextlib.suppress(ConnectionError, concurrent.futures.TimeoutError):
            rows = dispy.pages_of_nodes(lambda first, most: dispy.answer_of(
                driver.ask(lambda: driver.calls.call(cluster.comp, 'nodes', first, most)), dispy.
                CALL_TIME))
            self._known = {row.key: row for row in rows}
            return
        self._known = {
            row.key: row._replace(cpus=0)
            for row in driver.ask(lambda: driver.queries.rows_of(cluster.comp))
        }

    def nodes(self) -> List[Any]:
        """As above."""
        return list(self._known.values())

    def in_flight(self, key: Any) -> Dict[int, Any]:
        """As above."""
        row = self._known.get(key)
        if row is not None:
            return self._flights.get((row.ip_addr, row.name), {})
        return {}

    def runs(self, peer: Any) -> List[int]:
        """As above: those that are known to have begun, then the first, as many as the scheduler
        says."""
        flight = self.in_flight(peer.key)
        is_on = (dispy.DispyJob.Running, dispy.DispyJob.ProvisionalResult)
        begun = [serial for serial, job in flight.items() if job.status in is_on]
        more = (serial for serial, job in flight.items() if job.status == dispy.DispyJob.Created)
        return begun + list(itertools.islice(more, max(0, peer.busy - len(begun))))

    def look(self, asks: List[int]) -> List[dict]:
        """As above."""
        rows = []
        for row in self.nodes():
            running, used = self.running(row)
            free = row.facts.get('available', {})
            rows.append({
                'key': row.key, 'name': row.name, 'address': row.ip_addr, 'port': row.port,
                'reason': row.reason.strip()[-2000:], 'state': 'drained'
                if row.state == 'ready' and row.reason == 'deallocated' else row.state,
                'cpus': row.cpus, 'offered': row.offered, 'running': running,
                'memory': free.get('memory'), 'disk': free.get('disk'), 'used': used, 'load': None,
                'heard': None, 'holder': '', 'platform': str(row.facts.get('platform', ''))
            })
        return rows

    def times(self, key: Any) -> Tuple[Dict[int, float], Set[int], bool]:
        """As above; how long a job has run is known by its start_time."""
        row = self._known[key]
        links = {peer.link for peer in self.cluster.driver.nodes.of(self.cluster.comp)}
        return {}, set(self.runs(row)), not links & set(self.live_from.values())


def cluster_row(row: dict, history: History, closed: bool = False) -> dict:
    """The rest of a cluster's row: what follows from its numbers."""
    ended = row['done'] + row['failed'] + row['cancelled']
    pending = max(0, row['submitted'] - ended)
    running = min(pending, row['running'])
    if not closed:
        rate = history.add(time.time(), ended, row['used'], row['cpus'])
    else:
        rate = 0.0
    return dict(row,
                waiting=pending - running,
                running=running,
                rate=round(rate, 3),
                left=round(pending / rate, 1) if rate > 0 and pending else None,
                elapsed=round(row['elapsed'], 1),
                job_seconds=round(row['job_seconds'], 3),
                plot=history.points,
                state='closed' if closed else
                'idle' if not pending else 'working' if row['nodes'] else 'waiting for a node')


class ClusterSource:
    """Clusters of this program; or, with a `NodeMonitor`, nodes beside any program."""
    text = 'clusters of this program'
    nothing = 'No cluster is shown: the program has none, or has taken it away (del_cluster).'
    manages = True
    shared = False
    shows_arguments = True
    page = ''   # the link to the page that shows them

    def __init__(self) -> None:
        # Guards the two below; user threads, requests, snapshot thread
        self._lock = threading.Lock()
        self._watched: List[ClusterView] = []
        self._count = 0
        # A node's id begins with its driver's place here; snapshot thread and requests
        self._drivers: List[Any] = []

    def add(self, cluster: Any) -> None:
        """Begin to watch. Raises TypeError for what is no cluster, RuntimeError if it was
        closed."""
        if not isinstance(cluster, (JobCluster, NodeMonitor)):
            raise TypeError('%.80r is no cluster' % (cluster,))
        with self._lock:
            if any(watched.cluster is cluster for watched in self._watched):
                return
            self._count += 1
            watched = (SharedClusterView if isinstance(cluster, SharedJobCluster) else ClusterView)(
                self._count, cluster)
            watched.page = self.page
            cluster.driver.ask(watched.attach)
            self._watched.append(watched)
            if cluster.driver not in self._drivers:
                self._drivers.append(cluster.driver)

    def publish(self, page: str) -> None:
        """The clusters may name this link as that of their page."""
        with self._lock:
            self.page = page
            for watched in self._watched:
                watched.page = page

    def remove(self, cluster: Any) -> None:
        """Watch it no more. Nothing happens if it was not watched."""
        with self._lock:
            for watched in [watched for watched in self._watched if watched.cluster is cluster]:
                self._watched.remove(watched)
                if cluster.cargo is not None:
                    with contextlib.suppress(RuntimeError):   # its driver has ended
                        cluster.driver.ask(functools.partial(cluster.remove_monitor, watched))

    def close(self) -> None:
        """Let go of all clusters."""
        for watched in self.watched():
            self.remove(watched.cluster)

    def watched(self) -> List[ClusterView]:
        """A copy of the list. Any thread."""
        with self._lock:
            return list(self._watched)

    def snapshot(self, asking: bool) -> Tuple[List[dict], List[dict], float]:
        """Rows of clusters and of nodes, and the seconds that it took of the drivers' threads.
        `asking`: nodes are asked what is free there. The snapshot thread."""
        clusters: List[dict] = []
        nodes: Dict[str, dict] = {}
        cost: float = 0.0
        for watched in self.watched():
            rows: List[dict] = []
            counts: Dict[str, int] = {}
            closed = watched.cluster.closed
            if not closed:
                try:
                    watched.refresh()
                    rows, counts, took = watched.cluster.driver.ask(
                        functools.partial(self._turn, watched, asking))
                    cost += took
                except RuntimeError:   # closed meanwhile, or its driver has failed
                    closed = True
            if watched.cluster.cargo is not None:
                clusters.append(self._cluster_row(watched, rows, counts, closed))
            self._merge(watched, rows, nodes)
        return clusters, list(nodes.values()), cost

    @staticmethod
    def _turn(watched: ClusterView, asking: bool) -> Tuple[List[dict], Dict[str, int], float]:
        """What only the driver knows, O(nodes). The driver's thread."""
        began = time.perf_counter()
        cluster = watched.cluster
        cluster.driver.jobs.take_submitted()
        rows = watched.look([REPORTS_A_TURN if asking else 0])
        # With the driver at rest: what is on nodes and what has ended add up
        counts = counts_of(cluster)
        return rows, counts, time.perf_counter() - began

    @staticmethod
    def _cluster_row(watched: ClusterView, rows: List[dict], counts: Dict[str, int],
                     closed: bool) -> dict:
        cluster = watched.cluster
        now = time.time()
        if closed:
            watched.ended, counts = watched.ended or now, counts_of(cluster)
        ready = [row for row in rows if row['state'] == 'ready']
        seconds = sum(count[2] for count in cluster.jobs_at_nodes().values())
        return cluster_row(
            dict(counts,
                 number=watched.number,
                 name=cluster.name,
                 program='',
                 running=sum(row['running'] for row in rows),
                 used=sum(row['used'] for row in rows),
                 cpus=sum(row['cpus'] for row in ready),
                 nodes=len(ready),
                 elapsed=(watched.ended or now) - cluster._started,
                 job_seconds=seconds), watched.history, closed)

    def _merge(self, watched: ClusterView, rows: List[dict], nodes: Dict[str, dict]) -> None:
        """Rows of one cluster's nodes into those of all."""
        cluster = watched.cluster
        prefix = '%d.' % (self._drivers.index(cluster.driver) + 1)
        counts = cluster.jobs_at_nodes()
        for row in rows:
            key = row.pop('key')
            name = prefix + key_text(key)
            _, jobs, seconds = counts.pop('%s:%s' % (row['address'], row['name']), (None, 0, 0.0))
            self._put(nodes, dict(row, id=name), watched, jobs, seconds)
        for peer, jobs, seconds in counts.values():   # not used any more
            self._put(
                nodes, {
                    'id': '%sgone:%s:%s' % (prefix, peer.ip_addr, peer.name), 'name': peer.name,
                    'address': peer.ip_addr, 'port': peer.port, 'state': 'closed',
                    'reason': 'no cluster uses it any more', 'cpus': 0, 'offered': 0, 'used': 0,
                    'running': 0, 'memory': None, 'disk': None, 'load': None, 'heard': None,
                    'holder': '', 'platform': str(peer.facts.get('platform', ''))
                }, watched, jobs, seconds)

    @staticmethod
    def _put(nodes: Dict[str, dict], row: dict, watched: ClusterView, jobs: int,
             seconds: float) -> None:
        use = {
            'number': watched.number, 'name': watched.cluster.name, 'state': row['state'],
            'reason': row['reason'], 'cpus': row['cpus'], 'used': row['used'], 'jobs': jobs,
            'job_seconds': round(seconds, 3)
        }
        there = nodes.get(row['id'])
        if there is None:
            nodes[row['id']] = dict(row,
                                    jobs=jobs,
                                    job_seconds=round(seconds, 3),
                                    clusters=[use] if watched.cluster.cargo is not None else [])
            return
        there['clusters'].append(use)
        there['jobs'] += jobs
        there['job_seconds'] = round(there['job_seconds'] + seconds, 3)
        there['used'] = min(there['used'] + row['used'],
                            max(there['offered'], row['cpus'], there['cpus']))
        there['cpus'] = max(there['cpus'], row['cpus'])
        if _STATE_ORDER.index(row['state']) < _STATE_ORDER.index(there['state']):
            there['state'], there['reason'] = row['state'], row['reason']

    # -- one node ----------------------------------------------------------------------------------

    def _uses(self, node: str, number: Optional[int] = None) -> List[Tuple[ClusterView, Any]]:
        """(cluster, key of its node) of a node's id. Raises Refusal if there is none."""
        found = []
        for watched in self.watched():
            cluster = watched.cluster
            prefix = '%d.' % (self._drivers.index(cluster.driver) + 1)
            if number not in (None,
                              watched.number) or not node.startswith(prefix) or cluster.closed:
                continue
            for peer in cluster.driver.ask(watched.nodes):
                if prefix + key_text(peer.key) == node:
                    found.append((watched, peer.key))
        if not found:
            raise Refusal(
                404, 'there is no node %.80s%s' %
                (node, '' if number is None else ' in cluster %d' % number))
        return found

    def jobs(self, node: str) -> List[dict]:
        """Rows of a node's jobs. Any thread but a driver's."""
        rows: List[dict] = []
        for watched, key in self._uses(node):
            try:
                rows += watched.cluster.driver.ask(functools.partial(self._jobs_turn, watched, key))
            except RuntimeError:   # closed meanwhile
                continue
        return rows

    @staticmethod
    def _jobs_turn(watched: ClusterView, key: Any) -> List[dict]:
        """The driver's thread. What takes time, opening arguments, is left to the caller."""
        flight = watched.in_flight(key)
        if not flight:
            return []
        runs, there, live = watched.times(key)
        now = time.time()
        nothing = [b'', b'']
        rows = []
        for serial, job in flight.items():
            out, err = watched.output.get(job, nothing)
            if job.start_time:
                sent = now - job.start_time
            else:
                sent = 0.0
            rows.append({
                'cluster': watched.number, 'job': serial >> 16, 'id': job.id,
                'arguments': job.payload,
                'state': 'running' if serial in runs or serial in there else 'waits there',
                'seconds': round(max(0.0, runs.get(serial, sent)),
                                 1), 'stdout': out, 'stderr': err, 'live': live
            })
        return rows

    def complete(self, rows: List[dict]) -> None:
        """Rows of jobs that are shown get what takes time. Any thread."""
        for row in rows:
            row['arguments'] = arguments_text(row['arguments'] if self.shows_arguments else None)

    def failures(self) -> List[dict]:
        """Failed jobs grouped by the last line of their tracebacks. Any thread."""
        groups = grouped((watched.number, failed) for watched in self.watched()
                         for failed in list(watched.failures))
        if not self.shows_arguments:
            for job in itertools.chain.from_iterable(group['jobs'] for group in groups):
                job['arguments'] = ''
        return groups

    # -- changes -----------------------------------------------------------------------------------

    def _cluster(self, number: int) -> ClusterView:
        for watched in self.watched():
            if watched.number == number:
                return watched
        raise Refusal(404, 'there is no cluster %d' % number)

    def cancel(self, cluster: int, node: str, jobs: Any) -> int:
        """End jobs on a node. Returns how many."""
        chosen_jobs(jobs)
        (watched, key), = self._uses(node, cluster)
        driver = watched.cluster.driver

        def end() -> int:
            chosen = [
                job for serial, job in watched.in_flight(key).items()
                if jobs == 'all' or serial >> 16 in jobs
            ]
            for job in chosen:
                driver.cancels.cancel(job)
            return len(chosen)
        return driver.ask(end)  # type: ignore[no-any-return]

    def cancel_waiting(self, cluster: int) -> int:
        """End jobs that have not begun, also those that wait on nodes. Returns how many."""
        watched = self._cluster(cluster).cluster
        return watched.driver.ask(lambda: watched.driver.cancels.cancel_waiting(watched.comp))  # type: ignore[no-any-return]

    def add_node(self,
                 cluster: int,
                 host: str,
                 port: Optional[int] = None,
                 cpus: Optional[int] = None) -> int:
        """Look for a node."""
        self._cluster(cluster).cluster.discover_nodes([(host, port, cpus)])
        return 1

    def _each(self, node: str, cluster: Optional[int], call: Callable[[JobCluster, Any],
                                                                      Any]) -> int:
        uses = self._uses(node, cluster)
        for watched, key in uses:
            call(watched.cluster, key)
        return len(uses)

    def use(self, node: str, cluster: Optional[int] = None) -> int:
        """Use a node again that was drained or released."""
        return self._each(node, cluster, JobCluster.allocate_node)

    def drain(self, node: str, cluster: Optional[int] = None) -> int:
        """Send nothing new to a node."""
        return self._each(node, cluster, JobCluster.deallocate_node)

    def release(self, node: str, cluster: Optional[int] = None) -> int:
        """Let a node go when its jobs have ended."""
        return self._each(node, cluster, JobCluster.close_node)

    def cpus(self, node: str, cpus: int, cluster: Optional[int] = None) -> int:
        """Use at most so many CPUs of a node."""
        return self._each(node, cluster, lambda which, key: which.set_node_cpus(key, cpus))


def grouped(failures: Iterable[Tuple[int, Tuple[float, Any, Any, int, str, str]]]) -> List[dict]:
    """Rows of failures, of pairs of a cluster's number and what Watched.failures holds."""
    groups: Dict[Tuple[int, str], dict] = {}
    for number, (when, job, payload, status, node, text) in failures:
        line = last_line(text)
        group = groups.setdefault((number, line),
                                  {'text': line, 'count': 0, 'cluster': number, 'jobs': []})
        group.update(count=group['count'] + 1, last=when, trace=text)
        group['jobs'].append((job, payload, node, status, when))
    for group in groups.values():
        group['jobs'] = [{
            'id': id_text(job), 'arguments': arguments_text(payload), 'node': node, 'time': when,
            'status': dispy.JobState(status).name.lower()
        } for job, payload, node, status, when in reversed(group['jobs'][-10:])]
    return list(groups.values())


def key_text(key: Any) -> str:
    """What a driver calls a node, for an id: HOST:PORT, or one word."""
    if isinstance(key, tuple):
        return ':'.join(map(str, key))
    return str(key)


def chosen_jobs(jobs: Any) -> Optional[List[int]]:
    """`jobs` of a request: their numbers, None for all. Raises Refusal."""
    if jobs != 'all' and (not isinstance(jobs, list) or not all(type(job) is int for job in jobs)):
        raise Refusal(400, "jobs is neither a list of numbers nor 'all'")
    if jobs == 'all':
        return None
    return jobs


def counts_of(cluster: Any) -> Dict[str, int]:
    """Jobs of a cluster, but for those that have not ended. Any thread."""
    submitted, done, failed, cancelled = cluster.jobs_counted()
    return {'submitted': submitted, 'done': done, 'cancelled': cancelled, 'failed': failed}


_STATE_ORDER = [
    'ready', 'draining', 'drained', 'setting up', 'asking', 'connected', 'dialling', 'waiting',
    'found', 'refused', 'down', 'unreachable', 'no such name', 'no name service', 'lost', 'closed'
]


class NodeMonitor(dispy.NodeScan):
    """A look at nodes that goes on, for a source. Their lease stays whose it is."""
    name = 'nodes'

    def close(self) -> None:
        """Let the nodes go. May be called twice."""
        if not self.closed:
            self.closed = True
            with contextlib.suppress(RuntimeError):   # the driver has failed
                super().close()


class NodesSource(ClusterSource):
    """Nodes beside any program: they are shown, and left as they are."""
    text = 'nodes, whoever uses them'
    nothing = 'Nodes are watched here, not clusters: see Nodes.'
    manages = False

    def __init__(self, survey: NodeMonitor) -> None:
        super().__init__()
        self.add(survey)

    def close(self) -> None:
        """Let the nodes go."""
        for watched in self.watched():
            watched.cluster.close()
        super().close()


class SchedulerLink(dispy.NodeScan):
    """A link to a dispyscheduler, as of a program; to the driver a cluster that only looks."""
    name = 'a web monitor'

    def __init__(self, host: str, port: int, access: ConnectionSettings) -> None:
        self.specs, self.port, self.comp = [NodeSpec(host, port,
                                                     scheduler=True)], port, uuid.uuid4().hex
        self.driver = Driver.acquire(access)
        self.driver.ask(lambda: self.driver.open(self, False))

    def why_not(self) -> str:
        """Why the scheduler cannot be asked, when that is known; empty when it can."""
        until = time.monotonic() + HANDSHAKE_TIME
        while True:
            peer, = self.driver.ask(lambda: self.driver.nodes.of(self.comp))
            if peer.link is not None and peer.name:
                return ''
            if peer.failures or time.monotonic() >= until:
                return str(peer.reason).strip() or 'it does not answer'
            time.sleep(0.02)

    def ask(self, *question: Any) -> Any:
        """What `Overview.answer` of the scheduler returns. Raises what it raises, RuntimeError if
        it is not connected. Any thread."""
        try:
            future = self.driver.ask(
                lambda: self.driver.calls.call(self.comp, 'overview', *question))
            return dispy.answer_of(future, dispy.CALL_TIME)
        except ConnectionError:
            row, = self.driver.ask(lambda: self.driver.queries.rows_of(self.comp))
            raise RuntimeError(
                'the scheduler %s is not connected: %s' %
                (dispy.format_address(row.key[1], row.key[2]), row.reason or row.state)) from None


class SchedulerSource:
    """A dispyscheduler: all clusters of all programs. `ask` takes a question of its `Overview` and
    returns (seconds, answer)."""
    nothing = 'No program uses the scheduler now.'
    manages = True
    shared = True

    def __init__(self, ask: Callable[..., Tuple[float, Any]], text: str,
                 close: Callable[[], None]) -> None:
        self._ask = ask
        self._text = text
        self.text = text
        self.close = close
        self._histories: Dict[str, History] = {}
        self._failures: Deque[Tuple[int, tuple]] = collections.deque(maxlen=FAILURES_KEPT)
        self._failed = 0                              # number of the last failure that was told
        self._lock = threading.Lock()                 # guards the three below: requests
        self._keys: Dict[str, Any] = {}               # id of a node -> its key there
        # Id -> when, what was told of its jobs
        self._jobs: Dict[str, Tuple[float, List[tuple]]] = {}
        # (cluster, job) -> arguments
        self._texts: 'collections.OrderedDict[Tuple[int, int], str]' = collections.OrderedDict()

    # -- snapshots; their thread -------------------------------------------------------------------

    def _pages(self, name: str, *args: Any) -> Tuple[List[dict], float]:
        rows: List[dict] = []
        cost = 0.0
        while True:
            took, page = self._ask(name, len(rows), SCHEDULER_PAGE, *args)
            rows = rows + page
            cost = cost + took
            if len(page) < SCHEDULER_PAGE:
                return rows, cost

    def snapshot(self, asking: bool) -> Tuple[List[dict], List[dict], float]:
        """As ClusterSource's. While the scheduler is away there is nothing but the reason."""
        try:
            clusters, cost = self._pages('clusters')
            nodes, more = self._pages('nodes', asking)
            self._take_failures()
        except (RuntimeError, concurrent.futures.TimeoutError) as exc:
            self.text = str(exc) or 'the scheduler does not answer'
            with self._lock:   # numbers may mean others when it is there again
                self._texts.clear()
                self._jobs.clear()
            return [], [], 0.0
        self.text = self._text
        rows = {row['number']: dict(row, running=0, used=0, cpus=0, nodes=0) for row in clusters}
        found = {row['id']: row for row in (self._node_row(node, rows) for node in nodes)}
        with self._lock:
            self._keys = {node['id']: node.pop('key') for node in found.values()}
        self._histories = {
            row['comp']: self._histories.get(row['comp']) or History()
            for row in clusters
        }
        return [self._cluster_row(row) for row in rows.values()], list(found.values()), cost + more

    def _cluster_row(self, row: dict) -> dict:
        connected = row.pop('connected')
        history = self._histories[row.pop('comp')]
        if not connected:
            row['program'] = (row['program'] + ' (not connected)').strip()
        return cluster_row(row, history)

    @staticmethod
    def _node_row(node: dict, clusters: Dict[int, dict]) -> dict:
        """A row of /api/nodes; what there is of clusters is added to theirs."""
        uses, (memory, disk, idle) = [], node.pop('free')
        for number, state, reason, cpus, running, used, jobs, seconds in node.pop('uses'):
            cluster = clusters.get(number)
            if cluster is None:
                continue   # it began meanwhile
            uses.append({
                'number': number, 'name': cluster['name'], 'state': state, 'reason': reason,
                'cpus': cpus, 'used': used, 'jobs': jobs, 'job_seconds': round(seconds, 3)
            })
            cluster['running'] += running
            cluster['used'] += used
            if state == 'ready':
                cluster['cpus'] += cpus
                cluster['nodes'] += 1
        used = sum(use['used'] for use in uses)
        if node['state'] == 'connected' and any(use['state'] == 'ready' for use in uses):
            state = 'ready'
        else:
            state = node['state']
        if state == 'connected':
            refused = [use for use in uses if use['reason']]
        else:
            refused = []
        return dict(node,
                    id='1.' + key_text(node['key']),
                    state=state,
                    used=used,
                    reason=node['reason'].strip() or
                    (refused[0]['name'] + ': ' + refused[0]['reason'].strip() if refused else ''),
                    running=0,
                    memory=memory,
                    disk=disk,
                    load=None if idle is None else round(100.0 - idle, 1),
                    holder='',
                    clusters=uses,
                    heard=None if node['heard'] is None else round(node['heard'], 1),
                    job_seconds=round(node['job_seconds'], 3))

    def _take_failures(self) -> None:
        while True:
            rows = self._ask('failures', self._failed)[1]
            for number, when, cluster, job, payload, status, node, text in rows:
                self._failed = number
                self._failures.append((cluster, (when, job, payload, status, node, text)))
            if not rows:
                return

    # -- requests ----------------------------------------------------------------------------------

    def _key(self, node: str) -> Any:
        with self._lock:
            if node not in self._keys:
                raise Refusal(404, 'there is no node %.80s' % node)
            return self._keys[node]

    def jobs(self, node: str) -> List[dict]:
        """As ClusterSource's; asked of the scheduler four times a second at most. Their arguments
        come later, with `complete`."""
        key = self._key(node)
        with self._lock:
            at, jobs = self._jobs.get(node, (-math.inf, []))
            if time.monotonic() - at >= SNAPSHOTS_APART:
                jobs = self._ask('jobs', key)[1]
                self._jobs = {
                    name: known
                    for name, known in self._jobs.items()
                    if time.monotonic() - known[0] < LOOKED_FOR
                }
                self._jobs[node] = time.monotonic(), jobs
        return [{
            'cluster': cluster, 'job': job, 'id': job >> 16, 'arguments': None,
            'state': 'running' if runs else 'waits there',
            'seconds': None if seconds is None else round(seconds, 1), 'stdout': b'', 'stderr': b'',
            'live': None
        } for cluster, job, runs, seconds in jobs]

    def complete(self, rows: List[dict]) -> None:
        """Arguments of the jobs that are shown, each asked for once."""
        with self._lock:
            missing = [(row['cluster'], row['job']) for row in rows
                       if (row['cluster'], row['job']) not in self._texts]
            for where, payload in zip(missing,
                                      self._ask('arguments', missing)[1] if missing else ()):
                if payload is not None:
                    self._texts[where] = arguments_text(payload)
                else:
                    self._texts[where] = 'it has ended meanwhile'
            for row in rows:
                row['arguments'] = self._texts[row['cluster'], row['job']]
            while len(self._texts) > TEXTS_KEPT:
                self._texts.popitem(last=False)

    def failures(self) -> List[dict]:
        """As ClusterSource's."""
        return grouped(list(self._failures))  # type: ignore[arg-type]

    # -- changes -----------------------------------------------------------------------------------

    def _order(self, *order: Any) -> int:
        return self._ask(*order)[1]  # type: ignore[no-any-return]

    def _for_all(self, name: str, node: str, cluster: Optional[int], *args: Any) -> int:
        if cluster is not None:
            raise ValueError('cluster: nodes of a scheduler are managed for all clusters at once')
        return self._order(name, self._key(node), *args)

    def cancel(self, cluster: int, node: str, jobs: Any) -> int:
        """End jobs on a node. Returns how many."""
        return self._order('cancel', cluster, self._key(node), chosen_jobs(jobs))

    def cancel_waiting(self, cluster: int) -> int:
        """End jobs that do not run, also those that wait on nodes. Returns how many."""
        return self._order('cancel_waiting', cluster)

    def add_node(self,
                 cluster: int,
                 host: str,
                 port: Optional[int] = None,
                 cpus: Optional[int] = None) -> int:
        """Look for a node, for all clusters whose `nodes` mean it."""
        if cpus is not None:
            raise ValueError('cpus: set them when the node is there')
        return self._order('add', host, port)

    def use(self, node: str, cluster: Optional[int] = None) -> int:
        """Use a node again that was drained or released."""
        return self._for_all('use', node, cluster)

    def drain(self, node: str, cluster: Optional[int] = None) -> int:
        """Send nothing new to a node."""
        return self._for_all('cpus', node, cluster, 0)

    def release(self, node: str, cluster: Optional[int] = None) -> int:
        """Let a node go when its jobs have ended."""
        return self._for_all('release', node, cluster)

    def cpus(self, node: str, cpus: int, cluster: Optional[int] = None) -> int:
        """Each cluster uses at most so many CPUs of a node."""
        return self._for_all('cpus', node, cluster, cpus)


# --------------------------------------------------------------------------------------------------
# Views: a snapshot and the words of a query in, plain values for JSON out.
# --------------------------------------------------------------------------------------------------

class Snapshot(NamedTuple):
    """All there is to show but jobs and failures; not changed once it is made."""
    version: int
    time: float
    cost: float
    clusters: List[dict]
    nodes: List[dict]
    final: bool


def id_text(number: Any) -> str:
    """A job's id, which may be any object of the user's: shown if it is a plain value, else its
    type."""
    plain = (int, float, str, bool, type(None), bytes)
    if type(number) is str:
        return number[:200]
    if type(number) in plain or type(number) is tuple and all(
            type(part) in plain for part in number):
        return SHORT.repr(number)
    return '<%s>' % type(number).__name__


def _number(query: Dict[str, str], name: str, default: int, low: int, high: int) -> int:
    text = query.pop(name, str(default))
    if not re.fullmatch('[0-9]{1,9}', text) or not low <= int(text) <= high:
        raise Refusal(400, '%s=%.40s is not a number between %d and %d' % (name, text, low, high))
    return int(text)


def _order(value: Any) -> Any:
    """What to sort by: numbers in texts count as such, so that node10 comes after node9."""
    if isinstance(value, str):
        return [int(part) if n % 2 else part for n, part in enumerate(re.split('([0-9]+)', value))]
    return value


def table(rows: List[dict],
          query: Dict[str, str],
          columns: Sequence[str],
          descending: Sequence[str] = ()) -> dict:
    """The page of a table that a query asks for; takes its words out of it. Raises Refusal."""
    sort = query.pop('sort', columns[0])
    if sort not in columns:
        raise Refusal(400, 'sort=%.40s: it is one of %s' % (sort, ', '.join(columns)))
    desc = _number(query, 'desc', int(sort in descending), 0, 1)
    per = _number(query, 'per', PER_PAGE, 1, PER_PAGE_MOST)
    pages = max(1, -(-len(rows) // per))
    page = min(_number(query, 'page', 1, 1, 10 ** 9), pages)
    known = sorted((row for row in rows if row[sort] is not None and row[sort] != ''),
                   key=lambda row: _order(row[sort]),
                   reverse=bool(desc))
    rows = known + [row for row in rows if row[sort] is None or row[sort] == '']
    return {
        'rows': rows[(page - 1) * per:page * per], 'total': len(rows), 'page': page, 'pages': pages,
        'sort': sort, 'desc': desc, 'per': per
    }


def clusters_view(source: Any, snapshot: Snapshot, query: Dict[str, str]) -> dict:
    """/api/clusters"""
    return table(
        snapshot.clusters, query,
        ('number', 'name', 'state', 'waiting', 'running', 'done', 'failed', 'rate', 'left'))


def nodes_view(source: Any, snapshot: Snapshot, query: Dict[str, str]) -> dict:
    """/api/nodes"""
    return table(snapshot.nodes, query, ('name', 'address', 'state', 'cpus', 'used', 'jobs',
                                         'job_seconds', 'memory', 'disk', 'load', 'heard'),
                 ('cpus', 'used', 'jobs', 'job_seconds', 'load'))


def node_view(source: Any, snapshot: Snapshot, query: Dict[str, str]) -> dict:
    """/api/node"""
    name = query.pop('id', '')
    node = next((row for row in snapshot.nodes if row['id'] == name), None)
    if node is None:
        raise Refusal(404, 'there is no node %.80s' % name)
    if 'gone:' not in name:
        rows = source.jobs(name)
    else:
        rows = []
    found = table(rows, query, ('seconds', 'job', 'cluster', 'state'), ('seconds',))
    source.complete(found['rows'])
    for row in found['rows']:
        row.update(id=id_text(row['id']), stdout=row['stdout'].decode('utf-8', 'replace'),
                   stderr=row['stderr'].decode('utf-8', 'replace'))
    return dict(found, node=node)


def failures_view(source: Any, snapshot: Snapshot, query: Dict[str, str]) -> dict:
    """/api/failures"""
    return table(source.failures(), query, ('count', 'last', 'text', 'cluster'), ('count', 'last'))


VIEWS: Dict[str, Callable[[Any, Snapshot, Dict[str, str]], dict]] = {
    '/api/clusters': clusters_view, '/api/nodes': nodes_view, '/api/node': node_view,
    '/api/failures': failures_view
}

# path -> (method of the source, {field: (type, whether it must be there)})
CHANGES: Dict[str, Tuple[str, Dict[str, Tuple[Any, bool]]]] = {
    '/api/cancel': ('cancel',
                    {'cluster': (int, True), 'node': (str, True), 'jobs': ((list, str), True)}),
    '/api/cancel_waiting': ('cancel_waiting', {'cluster': (int, True)}),
    '/api/add': ('add_node', {
        'cluster': (int, True), 'host': (str, True), 'port': (int, False), 'cpus': (int, False)
    }),
    '/api/use': ('use', {'node': (str, True), 'cluster': (int, False)}),
    '/api/drain': ('drain', {'node': (str, True), 'cluster': (int, False)}),
    '/api/release': ('release', {'node': (str, True), 'cluster': (int, False)}),
    '/api/cpus': ('cpus', {'node': (str, True), 'cpus': (int, True), 'cluster': (int, False)}),
}


def _label(value: Any) -> str:
    return str(value).replace('\\', '\\\\').replace('"', '\\"').replace('\n', '\\n')


def metrics(snapshot: Snapshot) -> str:
    """/metrics: Prometheus' text format, version 0.0.4."""
    lines: List[str] = []

    def family(name: str, kind: str, text: str, samples: List[Tuple[dict, Any]]) -> None:
        lines.extend(['# HELP %s %s' % (name, text), '# TYPE %s %s' % (name, kind)])
        for labels, value in samples:
            if value is not None:
                inside = ','.join('%s="%s"' % (label, _label(words))
                                  for label, words in labels.items())
                lines.append('%s%s %s' % (name, '{%s}' % inside if inside else '', value))

    clusters = [({'cluster': row['name'], 'number': row['number']}, row)
                for row in snapshot.clusters]
    nodes = [({'node': row['name'] or row['address'], 'id': row['id']}, row)
             for row in snapshot.nodes]
    family('dispy_jobs', 'gauge', 'Jobs that have not ended.',
           [(dict(labels, state=state), row[state]) for labels, row in clusters
            for state in ('waiting', 'running')])
    family('dispy_jobs_ended_total', 'counter', 'Jobs that have ended.',
           [(dict(labels, state=state), row[state]) for labels, row in clusters
            for state in ('done', 'failed', 'cancelled')])
    family('dispy_jobs_submitted_total', 'counter', 'Jobs submitted.',
           [(labels, row['submitted']) for labels, row in clusters])
    family('dispy_job_seconds_total', 'counter', 'Seconds that jobs have run.',
           [(labels, row['job_seconds']) for labels, row in clusters])
    family('dispy_cluster_cpus', 'gauge', 'CPUs of ready nodes.',
           [(labels, row['cpus']) for labels, row in clusters])
    family('dispy_cluster_cpus_used', 'gauge', 'CPUs used.',
           [(labels, row['used']) for labels, row in clusters])
    family('dispy_node_state', 'gauge', '1 for the state that a node is in.',
           [(dict(labels, state=row['state']), 1) for labels, row in nodes])
    for field, name, kind, text in (('cpus', 'dispy_node_cpus', 'gauge', 'CPUs that may be used.'),
                                    ('used', 'dispy_node_cpus_used', 'gauge',
                                     'CPUs used.'), ('jobs', 'dispy_node_jobs_ended_total',
                                                     'counter', 'Jobs ended there.'),
                                    ('job_seconds', 'dispy_node_job_seconds_total', 'counter',
                                     'Seconds that jobs have run there.'),
                                    ('memory', 'dispy_node_memory_free_bytes', 'gauge',
                                     'Memory free.'), ('disk', 'dispy_node_disk_free_bytes',
                                                       'gauge', 'Disk free.'),
                                    ('load', 'dispy_node_load_percent', 'gauge',
                                     'CPU load of the host.'),
                                    ('heard', 'dispy_node_heard_seconds', 'gauge',
                                     'Seconds since its last sign of life.')):
        family(name, kind, text, [(labels, row[field]) for labels, row in nodes])
    family('dispy_snapshot_seconds', 'gauge',
           "Seconds of the driver's thread that the last snapshot took.", [({}, snapshot.cost)])
    return '\n'.join(lines) + '\n'


class SnapshotThread:
    """The snapshot thread. Everybody looks at what it took last."""

    def __init__(self, source: Any, every: float) -> None:
        self._source = source
        self.every = every
        self._changed = threading.Condition()
        self._wanted_until = 0.0
        self._ending = False
        self.last: Optional[Snapshot] = None
        self._thread = threading.Thread(target=self._run, name='dispy-httpd-snapshots', daemon=True)

    def start(self) -> None:
        """Begin to take snapshots."""
        self._thread.start()

    def _run(self) -> None:
        version = 0
        cost = 0.0
        while True:
            began = time.monotonic()
            ending = self._ending
            try:
                clusters, nodes, cost = self._source.snapshot(began < self._wanted_until)
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
                while not self._ending:
                    now = time.monotonic()
                    left = began + max(
                        self.every if now < self._wanted_until else max(self.every, SAMPLES_APART),
                        SNAPSHOT_SHARE * cost) - now
                    if left <= 0:
                        break
                    self._changed.wait(left)

    def newer(self, version: int, timeout: float) -> Optional[Snapshot]:
        """Wait for a snapshot after this version; the last one there is when the time runs out. Any
        thread."""
        until = time.monotonic() + timeout
        with self._changed:
            if time.monotonic() >= self._wanted_until:
                self._changed.notify_all()
            self._wanted_until = time.monotonic() + LOOKED_FOR
            while self.last is None or self.last.version <= version and not self.last.final:
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return self.last

    def current(self) -> Snapshot:
        """One that is not older than the time between two. Raises Refusal."""
        last = self.last
        if last is None or time.time() - last.time > self.every and not last.final:
            last = self.newer(last.version if last is not None else 0, IO_TIME / 2)
        if last is None:
            raise Refusal(503, 'there is no snapshot yet')
        return last

    def close(self) -> None:
        """Take the last one, and end."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join()


# --------------------------------------------------------------------------------------------------
# HTTP. A thread a connection, one request a connection.
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


class LimitedReader:
    """The first bytes of a connection: no more than MAX_HEAD of them are read as lines."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._left = MAX_HEAD

    def readline(self, size: int) -> bytes:
        """As a file's; raises LineTooLong when there is too much of all lines."""
        line = self._file.readline(min(size, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise http.client.LineTooLong('head')
        return bytes(line)

    def read(self, size: int) -> bytes:
        """Of the body."""
        return bytes(self._file.read(size))

    def close(self) -> None:
        """As a file's."""
        self._file.close()

    @property
    def closed(self) -> bool:
        """As a file's."""
        return bool(self._file.closed)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request, in a thread of its own."""
    protocol_version = 'HTTP/1.1'
    server_version = 'dispy'
    sys_version = ''
    server: 'Server'
    timeout = IO_TIME

    def setup(self) -> None:
        """TLS, and a limit on what is read."""
        if self.server.tls is not None:
            self.request.settimeout(IO_TIME)
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().setup()
        self.rfile: Any = LimitedReader(self.rfile)
        self.server.serving[self] = time.monotonic() + IO_TIME

    def finish(self) -> None:
        """Close, also what socketserver does not know under TLS."""
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
        """Read, check, answer; then the connection ends."""
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
        """Nothing that is served is large enough for it."""
        raise Refusal(417, 'Expect is not served')

    def send_error(self,
                   code: int,
                   message: Optional[str] = None,
                   explain: Optional[str] = None) -> None:
        """What parse_request says of bad requests."""
        self._error(code, message or http.client.responses.get(code, ''), {})

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are no news."""
        logger.debug('the web monitor: %s: ' + format, self.client_address[0], *args)

    # -- answers -----------------------------------------------------------------------------------

    def _error(self, status: int, text: str, headers: Dict[str, str]) -> None:
        self.request_version = 'HTTP/1.1'
        self._reply(status, JSON, json.dumps({'error': text}).encode(), **headers)

    def _begin(self, status: int, kind: str, **headers: Any) -> None:
        self.send_response(status)
        for name, value in {
                **HEADERS, 'Content-Type': kind,
                **{name.replace('_', '-'): value
                   for name, value in headers.items()}
        }.items():
            self.send_header(name, str(value))
        self.end_headers()

    def _reply(self, status: int, kind: str, body: bytes, **headers: Any) -> None:
        self.server.serving[self] = time.monotonic() + IO_TIME
        self._begin(status, kind, Content_Length=len(body), **headers)
        if self.command != 'HEAD':
            self.wfile.write(body)

    # -- checks ------------------------------------------------------------------------------------

    def _check(self) -> None:
        """What holds for every request."""
        if self.request_version not in ('HTTP/1.0', 'HTTP/1.1'):
            raise Refusal(505, '%s is not spoken here' % self.request_version)
        if self.headers.defects:
            raise Refusal(400, 'the headers are malformed')
        for name, value in self.headers.items():
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or re.search(
                    r'[\x00-\x08\x0a-\x1f\x7f]', value):
                raise Refusal(400, 'a header is malformed')
        for name in ONCE:
            if len(self.headers.get_all(name, ())) > 1:
                raise Refusal(400, 'there are two headers %s' % name)
        host = self.headers.get('Host')
        if host is None:
            raise Refusal(400, 'there is no header Host')
        if not self.server.is_own(host):
            raise Refusal(421,
                          'this server is not %.80s; with another name, give it as host=' % host)
        site = self.headers.get('Sec-Fetch-Site', 'none')
        opened = self.command == 'GET' and (self.headers.get('Sec-Fetch-Mode'),
                                            self.headers.get('Sec-Fetch-Dest')) == ('navigate',
                                                                                    'document')
        if site not in ('none',
                        'same-origin') and not (opened and self.path.partition('?')[0] == '/'):
            raise Refusal(403, 'a page of another site may not ask')
        origin = self.headers.get('Origin')
        if origin is not None and origin != '%s://%s' % (self.server.scheme, host):
            raise Refusal(403, 'a page of another site may not ask')
        if self.headers.get('Transfer-Encoding') is not None:
            raise Refusal(501, 'Transfer-Encoding is not served')

    def _check_token(self) -> None:
        kind, _, token = self.headers.get('Authorization', '').partition(' ')
        if kind.lower() != 'bearer' or not hmac.compare_digest(
                token.strip().encode('latin-1', 'replace'), self.server.token.encode()):
            raise Refusal(
                401,
                'the token is missing or is not the one of this server: use the link that it '
                'printed',
                WWW_Authenticate='Bearer')

    def _length(self) -> int:
        text = self.headers.get('Content-Length')
        if text is not None and not re.fullmatch(r'[0-9]{1,18}', text):
            raise Refusal(400, 'Content-Length is no number')
        if text is None and self.command == 'POST':
            raise Refusal(411, 'there is no header Content-Length')
        return int(text or 0)

    def _answer(self) -> None:
        self._check()
        path, _, words = self.path.partition('?')
        known = path in STATIC or path in VIEWS or path == '/metrics' or path in CHANGES
        if self.command not in ('GET', 'HEAD', 'POST'):
            if self.command in ('PUT', 'DELETE', 'PATCH', 'OPTIONS', 'TRACE', 'CONNECT'):
                raise Refusal(405,
                              '%s is not served' % self.command,
                              Allow='POST' if path in CHANGES else 'GET, HEAD')
            raise Refusal(501, 'the method is unknown')
        if not path.startswith('/'):
            raise Refusal(400, 'the request names no path')
        if not known:
            raise Refusal(404, 'there is nothing at %.80s' % path)
        if (self.command == 'POST') != (path in CHANGES):
            raise Refusal(405,
                          '%s is not served at %s' % (self.command, path),
                          Allow='POST' if path in CHANGES else 'GET, HEAD')
        length = self._length()
        if path not in STATIC:
            self._check_token()
        if self.command != 'POST' and length:
            raise Refusal(400, 'a GET has no body')
        if path in CHANGES:
            self._change(path, words, length)
        elif path in STATIC:
            kind, body = STATIC[path]
            self._reply(200, kind, body.encode())
        else:
            self._show(path, self._query(words))

    @staticmethod
    def _query(words: str) -> Dict[str, str]:
        try:
            if words:
                pairs = urllib.parse.parse_qsl(words,
                                               True,
                                               True,
                                               errors='strict',
                                               max_num_fields=10)
            else:
                pairs = []
        except ValueError as exc:
            raise Refusal(400, 'the query is malformed') from exc
        if len(dict(pairs)) != len(pairs):
            raise Refusal(400, 'the query says something twice')
        return dict(pairs)

    # -- reads -------------------------------------------------------------------------------------

    def _show(self, path: str, query: Dict[str, str]) -> None:
        snapshot = self.server.watch.current()
        if path == '/metrics':
            self._reply(200, 'text/plain; version=0.0.4; charset=utf-8', metrics(snapshot).encode())
        elif self.headers.get('Accept',
                              '').startswith('text/event-stream') and self.command == 'GET':
            self._stream(path, query, snapshot)
        else:
            self._reply(200, JSON, json.dumps(self._view(path, query, snapshot)).encode())

    def _view(self, path: str, query: Dict[str, str], snapshot: Snapshot) -> dict:
        source = self.server.source
        words = dict(query)
        try:
            view = VIEWS[path](source, snapshot, words)
        except (RuntimeError, TimeoutError, concurrent.futures.TimeoutError) as exc:
            # Of a driver that has ended, or is very busy
            raise Refusal(409, str(exc) or 'it does not answer') from exc
        if words:
            raise Refusal(400, 'the query has unknown words: %.80s' % ', '.join(words))
        view.update(time=round(snapshot.time, 3),
                    snapshot_seconds=round(snapshot.cost, 6),
                    manages=source.manages,
                    shared=source.shared,
                    source=source.text,
                    nothing=source.nothing,
                    clusters=[{'number': row['number'], 'name': row['name']}
                              for row in snapshot.clusters[:PER_PAGE_MOST]])
        return view

    def _stream(self, path: str, query: Dict[str, str], snapshot: Snapshot) -> None:
        """Server-sent events until the browser goes, or the server does."""
        watch: SnapshotThread = self.server.watch
        plots: Dict[int, Any] = {}
        spoke: float = time.monotonic()
        view: Any = self._view(path, query, snapshot)
        sent: Any = None
        self.server.serving[self] = None
        self._begin(200, 'text/event-stream')
        while True:
            same = {
                name: value
                for name, value in view.items() if name not in ('time', 'snapshot_seconds')
            }
            if same != sent:
                sent = same
                slim = [
                    row if row.get('plot') is None or plots.get(row['number']) is not row['plot']
                    else {name: value
                          for name, value in row.items() if name != 'plot'} for row in view['rows']
                ]
                plots.update((row['number'], row['plot']) for row in view['rows'] if 'plot' in row)
                self._event(json.dumps(dict(view, rows=slim)))
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
                self._event(json.dumps({'error': str(exc), 'status': exc.status}))
                return

    def _event(self, data: str) -> None:
        self.wfile.write(b'data: %s\n\n' % data.encode())

    # -- changes -----------------------------------------------------------------------------------

    def _change(self, path: str, words: str, length: int) -> None:
        if words:
            raise Refusal(400, 'a POST has no query')
        if self.headers.get_content_type() != JSON or self.headers.get_content_charset(
                'utf-8') != 'utf-8' or 'Content-Type' not in self.headers:
            raise Refusal(415, 'the body must be application/json')
        if length > MAX_BODY:
            raise Refusal(413, 'the body is over %d bytes' % MAX_BODY)
        data = self.rfile.read(length)
        if len(data) < length:
            raise Refusal(400, 'the body is shorter than its Content-Length')
        try:
            body = json.loads(data.decode('utf-8'))
        except (ValueError, RecursionError) as exc:
            raise Refusal(400, 'the body is no JSON: %.80s' % exc) from exc
        name, fields = CHANGES[path]
        if not isinstance(body, dict) or set(body) - set(fields):
            raise Refusal(400, 'the body is no object of %s' % ', '.join(fields))
        body = {field: value for field, value in body.items() if value is not None}
        for field, (kind, needed) in fields.items():
            if field in body and (not isinstance(body[field], kind)
                                  or isinstance(body[field], bool)):
                raise Refusal(400,
                              '%s is no %s' % (field, getattr(kind, '__name__', 'list or text')))
            if field not in body and needed:
                raise Refusal(400, '%s is missing' % field)
        if not self.server.source.manages:
            raise Refusal(
                409,
                'nodes are only looked at here; what they do is decided by the program that uses '
                'them'
            )
        try:
            done = getattr(self.server.source, name)(**body)
        except (ValueError, TypeError) as exc:
            raise Refusal(400, str(exc)) from exc
        except (RuntimeError, TimeoutError, concurrent.futures.TimeoutError) as exc:
            raise Refusal(409, str(exc) or 'it does not answer') from exc
        logger.info('the web monitor: %s %s by %s', name, body, self.client_address[0])
        self._reply(200, JSON, json.dumps({'done': done}).encode())


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections, so many at once, and ends those that take too long."""
    daemon_threads = True
    allow_reuse_address = os.name != 'nt'
    request_queue_size = 64

    def __init__(self, address: Tuple[str, int], source: Any, watch: SnapshotThread, tls: Any) -> None:
        self.source = source
        self.watch = watch
        self.tls = tls
        if tls is not None:
            self.scheme = 'https'
        else:
            self.scheme = 'http'
        self.token = secrets.token_urlsafe(24)
        # -> until when, monotonic; None: a stream
        self.serving: Dict[Handler, Optional[float]] = {}
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.threads: Dict[int, threading.Thread] = {}
        if ':' in address[0]:
            self.address_family = socket.AF_INET6
        else:
            self.address_family = socket.AF_INET
        self._names = {
            name.lower()
            for name in (address[0], 'localhost', '127.0.0.1', '::1', socket.gethostname()) if name
        }
        self._any_address = address[0] in ('', '0.0.0.0', '::')
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """As HTTPServer's, without its look-up of the host's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name = str(self.server_address[0])
        self.server_port = self.server_address[1]

    def is_own(self, host: str) -> bool:
        """Whether a header Host names this server. Ports may differ: ssh forwards others. A name of
        somebody else's that leads here (DNS rebinding) is none of ours; an address is no name."""
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
        """A thread, if there is a place."""
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
        """A connection's thread."""
        thread = threading.current_thread()
        thread.name = 'dispy-httpd-request'
        self.threads[id(thread)] = thread
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()
            del self.threads[id(thread)]

    def service_actions(self) -> None:
        """Twice a second: who is too slow is cut off. The accept thread."""
        now = time.monotonic()
        for handler, until in list(self.serving.items()):
            if until is not None and now > until:
                handler.cut()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A request's thread failed: TLS that did not come about is no news, the rest is our own
        fault."""
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
    """A web server that shows clusters and lets them be managed; the link to open is printed once,
    to stderr.

    cluster - a JobCluster or SharedJobCluster; None: none yet (see add_cluster)
    host - address to listen at; another than 127.0.0.1 lets other hosts in, who need the token too:
        use certfile then
    port - TCP port; 0: one that is free
    poll_sec - seconds between two updates of a page (0.25 to 3600)
    keyfile, certfile - paths of files in PEM format, for TLS
    show_job_args - False: arguments of jobs are not shown
    DocumentRoot - accepted for old scripts; it has no meaning any more

    url - the link, with the token in its fragment
    Raises TypeError, ValueError, SecretError, OSError (the port is in use), RuntimeError (the
    cluster was closed). A context manager.
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
        source.shows_arguments = dispy._flag('show_job_args', show_job_args)
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
               certfile: Optional[str]) -> None:
        if not isinstance(host, str):
            raise TypeError('host=%.80r must be an address of this host, not %s' %
                            (host, type(host).__name__))
        port = dispy._in_range('port', port, HTTPD_PORT, 0, 65535, True)
        every = float(dispy._in_range('poll_sec', poll_sec, 0.5, SNAPSHOTS_APART, 3600))
        certfile, keyfile, _ = tls_files(certfile, keyfile)
        if certfile:
            tls = _web_tls(certfile, keyfile)
        else:
            tls = None
        self._source, self._watch = source, SnapshotThread(source, every)
        try:
            self._server = Server((host, port), source, self._watch, tls)
        except OSError as exc:
            raise OSError(
                exc.errno,
                'the web monitor cannot listen at %s port %d: %s; choose another port (0: any that '
                'is free)'
                % (host or '*', port, exc.strerror or exc)) from exc
        if host in ('', '0.0.0.0', '::'):
            shown = 'localhost'
        elif ':' in host:
            shown = '[%s]' % host
        else:
            shown = host
        self.url = '%s://%s:%d/#token=%s' % (self._server.scheme, shown, self._server.server_port,
                                             self._server.token)
        self._accepts = threading.Thread(target=self._server.serve_forever,
                                         name='dispy-httpd',
                                         daemon=True)
        self._closed = False
        self._watch.start()
        self._accepts.start()
        if host not in ('127.0.0.1', '::1', 'localhost') and tls is None:
            logger.warning(
                'the web monitor listens at %s without TLS: who can read the network can read its '
                'token; give certfile=',
                host or 'all addresses')
        self._tell('dispy monitor: %s' % self.url)

    @staticmethod
    def _tell(text: str) -> None:
        print(text, file=sys.stderr)

    def cluster_status(self, *told: Any) -> None:
        """To be given as cluster_status of a cluster, or called by the program's own, as dispy 4
        wanted it: (status, node, job), or these behind an element of `_clusters`. The server sees
        all by itself and needs not be told; without it the cluster has less to do."""
        if len(told) not in (3, 4):
            raise TypeError(
                'cluster_status takes (status, node, job), and %d arguments were given' % len(told))

    @property
    def _clusters(self) -> Dict[str, Any]:
        """The clusters that are shown, by name, which scripts for dispy 4 hand to
        cluster_status."""
        return {watched.cluster.name: watched.cluster for watched in list(self._source.watched())}

    def add_cluster(self, cluster: JobCluster) -> None:
        """Show this cluster too. Nothing happens if it is shown. Raises TypeError, RuntimeError if
        it was closed. Any thread."""
        self._source.add(cluster)

    def del_cluster(self, cluster: JobCluster) -> None:
        """Show this cluster no more. Any thread."""
        self._source.remove(cluster)

    def shutdown(self, wait: bool = True) -> None:
        """End. With `wait`, browsers first get how it all ended. May be called twice. Any
        thread."""
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
    """The same for what is no cluster of this program; it closes the source. `tell` is given the
    line with the link."""

    def __init__(self,
                 source: Any,
                 host: str = '127.0.0.1',
                 port: int = HTTPD_PORT,
                 poll_sec: float = 0.5,
                 keyfile: Optional[str] = None,
                 certfile: Optional[str] = None,
                 tell: Optional[Callable[[str], None]] = None) -> None:
        self._tell = tell or self._tell  # type: ignore[assignment]
        try:
            self._start(source, host, port, poll_sec, keyfile, certfile)
        except BaseException:
            source.close()
            raise


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='dispy-httpd',
        description=
        'Show a dispyscheduler in a browser, or nodes, whoever uses them: these are not taken '
        'from their client. The link to open is printed; Ctrl-C ends it.')
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        '-n',
        '--node',
        '--nodes',
        action=Each,
        nargs='+',
        default=[],
        dest='nodes',
        metavar='HOST[:PORT]',
        help='nodes to watch; may be repeated; HOST may have * '
        'for any characters (default: the dispyscheduler of this machine, or, if there '
        'is none, all nodes that answer)')
    which.add_argument('--scheduler',
                       '--scheduler-host',
                       metavar='HOST[:PORT]',
                       help='a dispyscheduler to watch')
    add('-i',
        '--host',
        default='127.0.0.1',
        metavar='ADDR',
        help='address to listen at (default: %(default)s); with another give --certfile too')
    add('-p',
        '--port',
        type=int,
        default=HTTPD_PORT,
        metavar='N',
        help='port to listen at (default: %(default)s; 0: any that is free)')
    add('--poll-sec',
        type=float,
        default=0.5,
        metavar='S',
        help='seconds between two updates of a page (default: %(default)s, at least 0.25)')
    add('--certfile', metavar='FILE', help='certificate of this web server, for TLS')
    add('--keyfile', metavar='FILE', help="the certificate's key, if not in the same file")
    add('--token-file',
        metavar='FILE',
        help='write the token there, readable by this user alone; for Prometheus and scripts')
    add('--secret-file',
        metavar='FILE',
        help=
        'file with the secret of the nodes, or of the programs of the scheduler (default: the one '
        'of this user)'
        )
    add('--node-certfile',
        metavar='FILE',
        help='certificate for TLS with the nodes or the scheduler')
    add('--node-keyfile', metavar='FILE', help="that certificate's key, if not in the same file")
    add('--version', action='version', version='%(prog)s ' + __version__)
    return parser


def _source_of(args: argparse.Namespace) -> Any:
    secret = find_secret(None, args.secret_file)
    nodes: Any = [host_and_port(text, NODE_PORT) for text in args.nodes]
    if args.scheduler is None:
        where = '127.0.0.1'
    else:
        where = args.scheduler
    host, port = host_and_port(where, SCHEDULER_PORT)
    if not nodes:
        files = tls_files(args.node_certfile, args.node_keyfile, None, '--node-%s')
        link = SchedulerLink(host, port, ConnectionSettings(secret, *files, PULSE, dispy.REDIAL_MOST))
        if args.scheduler is None:
            level = logger.level
            logger.setLevel("ERROR")   # that there is none is said below
            why = link.why_not()
            logger.setLevel(level)
            there = dispy.format_address(host, port)
            text = 'the dispyscheduler at %s is shown' % there
            if why:
                link.close()
                nodes = '*'
                text = 'no dispyscheduler at %s can be shown (%s): the nodes that answer are shown' % (
                    there, why)
            print('dispy-httpd: ' + text, file=sys.stderr)
    if nodes:
        return NodesSource(NodeMonitor(nodes, secret=secret, certfile=args.node_certfile,
                                      keyfile=args.node_keyfile))
    return SchedulerSource(link.ask,
                           'all programs of the dispyscheduler at %s' % dispy.format_address(host, port),
                           link.close)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line. Returns 0 when it was ended by a signal, 1 when it could not start."""
    parser = _parser()
    args = parser.parse_args(argv)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        tls_files(args.certfile, args.keyfile, None, '--%s')
        server = SourceHTTPServer(_source_of(args), args.host, args.port, args.poll_sec,
                                  args.keyfile, args.certfile)
    except (ValueError, TypeError, OSError, DispyError) as exc:
        print('dispy-httpd: %s' % exc, file=sys.stderr)
        return 1
    with server:
        try:
            if args.token_file is not None:
                _write_private(os.path.abspath(args.token_file), server._server.token.encode())
        except OSError as exc:
            print('dispy-httpd: --token-file %s cannot be written: %s' %
                  (args.token_file, exc.strerror or exc),
                  file=sys.stderr)
            return 1
        # A signal that comes just before the wait begins does not end it: its handler has not
        # run yet.
        while not stop.wait(SIGNAL_CHECK):
            continue
    return 0


# --------------------------------------------------------------------------------------------------
# The page: what browsers get. It holds no data and needs no token.
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
<a class="skip" href="#main">To the content</a>
<header>
  <span class="brand"><img src="icon.svg" alt="" width="22" height="22">dispy</span>
  <nav id="nav" aria-label="Pages"></nav>
  <span id="link" class="link" role="status"></span>
</header>
<main id="main" tabindex="-1"><p class="empty">Loading.</p></main>
<p id="note" class="note" role="status" aria-live="polite" hidden></p>
<noscript><p class="empty">This page needs JavaScript, its own alone.</p></noscript>
</body>
</html>
'''

ICON = r'''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#1f6f66"/><g fill="none" stroke="#fff" stroke-width="2.4" stroke-linecap="round"><path d="M8 23V9M8 16h8M16 16l8-7M16 16h8M16 16l8 7"/></g><g fill="#fff"><circle cx="24" cy="9" r="2.6"/><circle cx="24" cy="16" r="2.6"/><circle cx="24" cy="23" r="2.6"/></g></svg>
'''

CSS = r'''
:root {
  --paper: #f4f3ef; --panel: #fffefb; --sunk: #eceae4; --ink: #1b2225; --soft: #59656a; --line: #d9d6cd; --faint: #e7e4dc;
  --done: #1f7a6c; --run: #2c69b0; --wait: #a9b0b1; --fail: #b0342a; --stop: #8a6a16; --accent: #1f6f66;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #121618; --panel: #191f22; --sunk: #0e1214; --ink: #e4e8e8; --soft: #98a5a9; --line: #2e373b; --faint: #242c30;
  --done: #4fb8a6; --run: #6ea6e6; --wait: #66737a; --fail: #ee7b6e; --stop: #d3ab4e; --accent: #5cc2b2;
} }
* { box-sizing: border-box; }
html { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
body { margin: 0; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 3px; }
main:focus { outline: none; }
.skip { position: absolute; left: -99em; }
.skip:focus { left: 1em; top: .6em; background: var(--panel); padding: .3em .8em; z-index: 3; }
header { display: flex; align-items: center; gap: 1.6rem; padding: 0 1.5rem; height: 3.4rem; background: var(--panel);
  border-bottom: 1px solid var(--line); }
.brand { display: flex; align-items: center; gap: .55rem; font-weight: 650; letter-spacing: .01em; }
nav { display: flex; gap: .2rem; height: 100%; }
nav a { display: flex; align-items: center; padding: 0 .8rem; color: var(--soft); border-bottom: 2px solid transparent; border-top: 2px solid transparent; }
nav a:hover { color: var(--ink); text-decoration: none; }
nav a[aria-current] { color: var(--ink); border-bottom-color: var(--accent); font-weight: 550; }
.link { margin-left: auto; color: var(--soft); font-size: .87rem; white-space: nowrap; }
main { max-width: 74rem; margin: 0 auto; padding: 1.6rem 1.5rem 4rem; }
h1 { font-size: 1.3rem; font-weight: 620; margin: 0; letter-spacing: -.005em; }
h2 { font-size: 1rem; font-weight: 620; margin: 0; }
.top { display: flex; align-items: baseline; gap: .5rem 1rem; margin-bottom: 1.1rem; flex-wrap: wrap; }
.soft, .top p { color: var(--soft); margin: 0; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 1.15rem 1.3rem 1.2rem; margin-bottom: 1.1rem; }
.card > .top { margin-bottom: .9rem; align-items: center; }
.card > .top .actions { margin-left: auto; }
.wrap + .soft, .pager + .soft { margin-top: .9rem; }
.empty { color: var(--soft); padding: 2.5rem 1rem; text-align: center; }
.note { position: fixed; left: 50%; bottom: 1.4rem; transform: translateX(-50%); margin: 0; max-width: min(40rem, 92vw); background: var(--ink);
  color: var(--paper); padding: .6rem 1.1rem; border-radius: 6px; z-index: 3; box-shadow: 0 4px 18px rgba(0,0,0,.22); overflow-wrap: anywhere; }
.note[hidden] { display: none; }

.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(6rem, 1fr)); gap: .9rem 1rem; margin: 0; }
.figures div { min-width: 0; }
.figures dt { color: var(--soft); font-size: .84rem; white-space: nowrap; }
.figures dd { margin: 0; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; letter-spacing: -.015em; white-space: nowrap; }
.figures dd small { font-size: .9rem; color: var(--soft); letter-spacing: 0; }
.mark { display: inline-block; width: .7em; height: .7em; margin-right: .45em; vertical-align: baseline; }
.mark.done { background: var(--done); border-radius: 1px; }
.mark.run { background: var(--run); border-radius: 50%; }
.mark.wait { border: 2px solid var(--wait); border-radius: 50%; }
.mark.fail { background: var(--fail); clip-path: polygon(50% 0, 100% 100%, 0 100%); }
.mark.stop { background: var(--stop); clip-path: polygon(50% 0, 100% 50%, 50% 100%, 0 50%); }
.bar { display: block; width: 100%; height: 12px; margin: 0 0 1rem; border-radius: 3px; overflow: hidden; background: var(--faint); }
.s-done { fill: var(--done); } .s-fail { fill: var(--fail); } .s-stop { fill: var(--stop); } .s-run { fill: var(--run); } .s-hatch { stroke: var(--panel); stroke-width: 1.6; opacity: .55; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 1.6rem; margin-top: 1.2rem; }
.plot { margin: 0; min-width: 0; }
.plot figcaption { display: flex; justify-content: space-between; color: var(--soft); font-size: .84rem; margin-bottom: .25rem; font-variant-numeric: tabular-nums; }
.plot svg { display: block; width: 100%; height: 8.2rem; background: var(--sunk); border-radius: 4px; }
.plot path { fill: none; stroke-width: 1.8; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.p-done { stroke: var(--done); } .p-area-done { fill: var(--done) !important; opacity: .13; stroke: none; }
.p-used { stroke: var(--run); } .p-area-used { fill: var(--run) !important; opacity: .15; stroke: none; }
.plot .p-cpus { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 4 4; }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.axis { display: flex; justify-content: space-between; color: var(--soft); font-size: .8rem; font-variant-numeric: tabular-nums; margin-top: .2rem; }

.wrap { overflow-x: auto; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .55rem .8rem; vertical-align: top; }
th { font-weight: 500; font-size: .84rem; color: var(--soft); border-bottom: 1px solid var(--line); white-space: nowrap; }
th a { color: inherit; }
th[aria-sort] a { color: var(--ink); font-weight: 600; }
tr + tr td { border-top: 1px solid var(--faint); }
.n { text-align: right; white-space: nowrap; }
td .sub { color: var(--soft); font-size: .84rem; display: block; overflow-wrap: anywhere; }
td .reason { max-width: 26rem; white-space: pre-line; }
.nowrap { white-space: nowrap; }
.state::before { content: attr(data-shape); display: inline-block; width: 1.25em; font-size: .92em; }
.state { white-space: nowrap; }
.state.good { color: var(--done); } .state.busy { color: var(--run); } .state.bad { color: var(--fail); } .state.warn { color: var(--stop); } .state.off { color: var(--soft); }
.meter { display: block; width: 6.5rem; height: 6px; margin-top: .35rem; margin-left: auto; border-radius: 2px; background: var(--faint); }
.meter rect { fill: var(--run); }
code, pre, .mono { font-family: var(--mono); font-size: .86rem; }
.args { overflow-wrap: anywhere; white-space: pre-wrap; }
pre { background: var(--sunk); border-radius: 4px; padding: .6rem .8rem; margin: .5rem 0 0; overflow: auto; max-height: 22rem; white-space: pre-wrap; overflow-wrap: anywhere; }
pre.err { border-left: 3px solid var(--stop); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(11rem, 42%), 1fr)); gap: .7rem 1.4rem; margin: 0; }
.facts dt { color: var(--soft); font-size: .84rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.pager { display: flex; gap: 1rem; align-items: center; margin-top: .9rem; color: var(--soft); flex-wrap: wrap; }
.tools { display: flex; gap: .6rem; align-items: center; flex-wrap: wrap; margin: 0 0 .9rem; }
button, input, select { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line); border-radius: 5px; padding: .28rem .75rem; min-height: 2.15rem; }
button { cursor: pointer; white-space: nowrap; }
button:hover:not(:disabled) { border-color: var(--soft); }
button:disabled { opacity: .45; cursor: default; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--panel); }
button.sure { background: var(--fail); border-color: var(--fail); color: var(--panel); }
input[type=number] { width: 5rem; } input[type=checkbox] { width: 1.15rem; height: 1.15rem; min-height: 0; accent-color: var(--accent); margin: .15rem 0 0; }
form { display: flex; flex-wrap: wrap; gap: .8rem 1rem; align-items: flex-end; }
label { display: grid; gap: .2rem; color: var(--soft); font-size: .84rem; }
label input, label select { color: var(--ink); font-size: .95rem; }
.actions { display: flex; flex-wrap: wrap; gap: .45rem; justify-content: flex-end; }
.actions form { gap: .4rem; flex-wrap: nowrap; }
details { border-top: 1px solid var(--faint); } details:first-child { border-top: 0; }
summary { display: flex; gap: 1rem; align-items: baseline; padding: .7rem 1rem; cursor: pointer; list-style: none; }
summary::-webkit-details-marker { display: none; }
summary::before { content: "\25B8"; color: var(--soft); } details[open] > summary::before { content: "\25BE"; }
summary .line { flex: 1; min-width: 0; overflow-wrap: anywhere; }
details > div { padding: 0 1rem 1.1rem 2.6rem; }
details table { margin-top: .9rem; } details th, details td { padding: .35rem .8rem .35rem 0; }
.count { font-variant-numeric: tabular-nums; font-weight: 620; white-space: nowrap; color: var(--fail); }

@media (max-width: 44rem) {
  header { gap: .3rem .8rem; padding: .5rem 1rem 0; height: auto; flex-wrap: wrap; }
  nav { order: 3; width: 100%; height: 2.6rem; gap: 0; margin: 0 -.5rem; }
  nav a { padding: 0 .6rem; }
  main { padding: 1.1rem 1rem 3.5rem; }
  .plots { grid-template-columns: 1fr; gap: 1.1rem; }
  .figures { grid-template-columns: repeat(3, 1fr); gap: .8rem; } .figures dd { font-size: 1.2rem; }
  .stack thead { position: absolute; left: -99em; }
  .stack, .stack tbody { display: block; } .stack tr { display: grid; grid-template-columns: 1fr 1fr; gap: .15rem 1rem; padding: .8rem 1rem; }
  .stack tr + tr { border-top: 1px solid var(--line); }
  .stack td { display: block; border: 0 !important; padding: .1rem 0; text-align: left; }
  .stack td[data-label]::before { content: attr(data-label); display: block; color: var(--soft); font-size: .78rem; }
  .stack td.wide { grid-column: 1 / -1; } .stack .meter { margin-left: 0; } .actions { justify-content: flex-start; }
  details > div { padding-left: 1rem; } .card { padding: 1rem; } .card > .top .actions { margin-left: 0; }
  details .stack tr { padding: .6rem 0; }
  .sorts { display: flex !important; }
}
.sorts { display: none; gap: .35rem .9rem; flex-wrap: wrap; margin-bottom: .8rem; font-size: .87rem; color: var(--soft); }
@media (prefers-reduced-motion: no-preference) { .s-done, .s-fail, .s-stop, .s-run, .meter rect { transition: all .3s linear; } }
'''

SCRIPT = r'''"use strict";
// The page: `draw` makes plain descriptions of elements of what the server tells, `patch` brings the document up to them.
// What comes from the server becomes text nodes and attributes, never markup.

const NS = "http://www.w3.org/2000/svg";
const DRAWN = new Set(["svg", "path", "rect", "line", "g", "title"]);
const KEPT = new Set(["value", "checked", "open"]);           // the reader's, once they are there
const h = (tag, attrs, ...kids) => ({tag, attrs: attrs || {}, kids: kids.flat(Infinity).filter(kid => kid !== null && kid !== undefined && kid !== false)});

function make(item) {
  if (typeof item !== "object") return document.createTextNode(String(item));
  const element = DRAWN.has(item.tag) ? document.createElementNS(NS, item.tag) : document.createElement(item.tag);
  for (const [name, value] of Object.entries(item.attrs)) if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  for (const kid of item.kids) element.appendChild(make(kid));
  return element;
}

function fits(node, item) {
  if (typeof item !== "object") return node.nodeType === 3;
  return node.nodeType === 1 && node.tagName.toLowerCase() === item.tag && (node.getAttribute("data-key") || "") === String(item.attrs["data-key"] || "");
}

function update(node, item) {
  if (typeof item !== "object") { if (node.data !== String(item)) node.data = String(item); return; }
  for (const {name} of [...node.attributes]) if (!KEPT.has(name) && (item.attrs[name] === undefined || item.attrs[name] === false || item.attrs[name] === null)) node.removeAttribute(name);
  for (const [name, value] of Object.entries(item.attrs)) {
    if (KEPT.has(name) || value === false || value === null || value === undefined) continue;
    const text = value === true ? "" : String(value);
    if (node.getAttribute(name) !== text) node.setAttribute(name, text);
  }
  patch(node, item.kids);
}

function patch(parent, items) {
  const keyed = new Map();
  for (const child of parent.children) if (child.hasAttribute("data-key")) keyed.set(child.getAttribute("data-key"), child);
  let at = parent.firstChild;
  for (const item of items) {
    const key = typeof item === "object" && item.attrs["data-key"] !== undefined ? keyed.get(String(item.attrs["data-key"])) : undefined;
    const now = key !== undefined && fits(key, item) ? key : at && key === undefined && fits(at, item) ? at : null;
    if (now === null) { parent.insertBefore(make(item), at); continue; }
    if (now === at) at = at.nextSibling; else parent.insertBefore(now, at);
    update(now, item);
  }
  while (at) { const gone = at; at = at.nextSibling; gone.remove(); }
}

// -- words and numbers -----------------------------------------------------------------------------------

const count = n => Math.round(n).toLocaleString("en").replace(/,/g, "\u2009");
const few = n => n === 0 ? "0" : n >= 100 ? count(n) : n >= 10 ? n.toFixed(1) : n.toFixed(2);
function span(s) {
  if (s === null || s === undefined) return "\u2013";
  if (s < 10) return s.toFixed(1) + " s";
  if (s < 90) return Math.round(s) + " s";
  const m = Math.round(s / 60);
  if (m < 90) return m + " min";
  const hours = Math.floor(m / 60);
  return hours < 48 ? hours + " h " + String(m % 60).padStart(2, "0") + " min" : Math.floor(hours / 24) + " d " + hours % 24 + " h";
}
function size(b) {
  if (b === null || b === undefined) return "\u2013";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (b >= 1024 && i < 4) { b /= 1024; i++; }
  return (i < 2 || b >= 100 ? Math.round(b) : b.toFixed(1)) + " " + units[i];
}
const clock = t => new Date(t * 1000).toLocaleTimeString([], {hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false});
const many = (n, word) => count(n) + " " + word + (n === 1 ? "" : "s");
const last = text => { const lines = (text || "").trim().split("\n"); return lines[lines.length - 1]; };

const STATES = {            // word -> shape, kind; the colour only repeats them
  "ready": ["\u25cf", "good"], "connected": ["\u25cf", "good"], "working": ["\u25b6", "busy"], "running": ["\u25b6", "busy"], "idle": ["\u25cb", "off"],
  "setting up": ["\u25d4", "busy"], "asking": ["\u25d4", "busy"], "dialling": ["\u25cc", "off"], "found": ["\u25cc", "off"], "waiting": ["\u25cc", "off"],
  "waits there": ["\u25cc", "off"], "waiting for a node": ["\u25cc", "warn"], "draining": ["\u25d1", "warn"], "drained": ["\u25d1", "warn"],
  "refused": ["\u25b2", "bad"], "down": ["\u25b2", "bad"], "unreachable": ["\u25b2", "bad"], "no such name": ["\u25b2", "bad"], "no name service": ["\u25b2", "bad"],
  "lost": ["\u2715", "bad"], "closed": ["\u25a1", "off"]};
const state = word => { const [shape, kind] = STATES[word] || ["\u25cb", "off"]; return h("span", {class: "state " + kind, "data-shape": shape}, word); };
const mark = kind => h("span", {class: "mark " + kind, "aria-hidden": "true"});

// -- where we are ------------------------------------------------------------------------------------------

const PAGES = {clusters: "Clusters", nodes: "Nodes", failures: "Failures", manage: "Manage"};
const VIEWS = {clusters: "clusters", nodes: "nodes", node: "node", failures: "failures", manage: "nodes"};
let token = sessionStorage.getItem("dispy-token") || "";
let place = null, view = null, plots = new Map(), chosen = new Set(), sure = "", reading = null;

function go() {
  const found = location.hash.match(/^#token=(.+)$/);
  if (found) {
    token = found[1];
    sessionStorage.setItem("dispy-token", token);    // this tab's; the address bar does not keep it
    history.replaceState(null, "", "#/clusters");
  }
  const [path, words] = location.hash.replace(/^#\/?/, "").split("?");
  const before = place && place.page + (place.query.get("id") || "");
  place = {page: VIEWS[path] ? path : "clusters", query: new URLSearchParams(words || "")};
  if (before !== place.page + (place.query.get("id") || "")) { view = null; chosen.clear(); sure = ""; document.getElementById("main").scrollTop = 0; }
  plots.clear();
  listen();
  draw();
}

const href = (page, changes) => {
  const words = new URLSearchParams(page === place.page ? place.query : "");
  for (const [name, value] of Object.entries(changes || {})) words.set(name, value);
  const text = words.toString();
  return "#/" + page + (text ? "?" + text : "");
};

// -- talking to the server -----------------------------------------------------------------------------------

const ask = (path, more) => fetch(path, {cache: "no-store", credentials: "omit", ...more, headers: {Authorization: "Bearer " + token, ...(more && more.headers)}});

async function listen() {
  if (reading) reading.abort();
  const mine = reading = new AbortController(), url = "api/" + VIEWS[place.page] + (place.query.toString() ? "?" + place.query : "");
  let wait = 500;
  while (!mine.signal.aborted) {
    try {                                                          // a stream
      const answer = await ask(url, {signal: mine.signal, headers: {Accept: "text/event-stream"}});
      if (!await taken(answer)) return;
      tell("live");
      wait = 500;
      if (await events(answer.body.getReader(), mine.signal)) return tell("ended");
    } catch (error) { if (mine.signal.aborted) return; }
    try {                                                          // or, where none comes through, a poll
      const answer = await ask(url, {signal: mine.signal});
      if (!await taken(answer)) return;
      show(await answer.json());
      tell("polled");
      wait = 1000;
    } catch (error) {
      if (mine.signal.aborted) return;
      tell("lost");
      wait = Math.min(2 * wait, 10000);
    }
    await new Promise(done => setTimeout(done, wait));
  }
}

async function taken(answer) {
  if (answer.ok) return true;
  const text = (await answer.json().catch(() => ({}))).error || answer.statusText;
  if (answer.status >= 500) throw new Error(text);
  view = {error: text, status: answer.status};
  tell(answer.status === 401 ? "locked" : "live");
  draw();
  return false;
}

async function events(reader, signal) {
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done || signal.aborted) return false;
    text += decoder.decode(value, {stream: true});
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      if (part.startsWith("event: end")) return true;
      if (part.startsWith("data: ")) show(JSON.parse(part.slice(6)));
    }
  }
}

function show(data) {
  if (place.page === "clusters" && data.rows) for (const row of data.rows) {
    if (row.plot) plots.set(row.number, row.plot); else row.plot = plots.get(row.number) || [];
  }
  view = data;
  draw();
}

async function post(path, body, text) {
  try {
    const answer = await ask("api/" + path, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});
    const said = await answer.json();
    note(answer.ok ? text(said.done) : said.error);
  } catch (error) { note("The server does not answer: " + error.message); }
}

let hiding = 0;
function note(text) {
  const box = document.getElementById("note");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => { box.hidden = true; }, 6000);
}

function tell(how) {
  const words = {live: ["\u25cf", "good", "live"], polled: ["\u25d0", "warn", "polled"], lost: ["\u2715", "bad", "no connection"], ended: ["\u25a1", "off", "the program has ended"], locked: ["\u25b2", "bad", "no token"]}[how];
  patch(document.getElementById("link"), [h("span", {class: "state " + words[1], "data-shape": words[0]}, words[2])]);
}

// -- pages ---------------------------------------------------------------------------------------------------

const figure = (word, value, unit, kind) => h("div", {}, h("dt", {}, kind ? mark(kind) : null, word), h("dd", {"data-figure": word}, value, unit ? h("small", {}, " " + unit) : null));

function bar(row) {
  const all = Math.max(1, row.submitted), parts = [["done", row.done], ["fail", row.failed], ["stop", row.cancelled], ["run", row.running]];
  let x = 0;
  const rects = parts.map(([kind, n]) => { const w = 100 * n / all; const rect = h("rect", {class: "s-" + kind, x: x.toFixed(3), y: 0, width: w.toFixed(3), height: 12}); x += w; return rect; });
  return h("svg", {class: "bar", viewBox: "0 0 100 12", preserveAspectRatio: "none", role: "img",
    "aria-label": "of " + many(row.submitted, "job") + " " + row.done + " done, " + row.failed + " failed, " + row.cancelled + " cancelled, " + row.running + " running, " + row.waiting + " waiting"}, rects);
}

function plot(points, word, unit, series, from, to) {
  const top = Math.max(1, ...points.map(point => Math.max(...series.map(s => point[s.at]))));
  const x = t => (600 * (t - from) / Math.max(1, to - from)).toFixed(1), y = v => (118 - 110 * v / top).toFixed(1);
  const lines = series.map(s => {
    let path = "";
    points.forEach((point, i) => { path += (i === 0 ? "M" : s.step ? "H" + x(point[0]) + "V" + y(point[s.at]) + "M" : "L") + x(point[0]) + " " + y(point[s.at]); });
    if (points.length && s.step) path += "H" + x(to);
    let area = "";
    if (s.area && points.length) {
      area = "M" + x(points[0][0]) + " 118";
      points.forEach(point => { area += (s.step ? "H" + x(point[0]) + "V" + y(point[s.at]) : "L" + x(point[0]) + " " + y(point[s.at])); });
      area += (s.step ? "H" + x(to) : "") + "V118Z";
    }
    return [area ? h("path", {class: s.area, d: area}) : null, h("path", {class: s.kind, d: path})];
  });
  const now = points.length ? points[points.length - 1] : null;
  return h("figure", {class: "plot"}, h("figcaption", {}, h("span", {}, word), h("span", {}, "0 to " + count(top) + unit)),
    h("svg", {viewBox: "0 0 600 120", preserveAspectRatio: "none", role: "img", "aria-label": word + (now ? ", now " + series.map(s => now[s.at]).join(" of ") : "")},
      [0.5, 1].map(part => h("path", {class: "grid", d: "M0 " + y(top * part) + "H600"})), lines),
    h("div", {class: "axis"}, h("span", {}, clock(from)), h("span", {}, span(to - from)), h("span", {}, clock(to))));
}

function clusterCard(row) {
  const from = row.plot.length ? row.plot[0][0] : 0, to = row.plot.length ? row.plot[row.plot.length - 1][0] : 0;
  return h("section", {class: "card", "data-key": "c" + row.number, "aria-label": "cluster " + row.name},
    h("div", {class: "top"}, h("h2", {class: "mono"}, row.name), state(row.state), h("p", {}, (row.program ? "of " + row.program + ", " : "") + "cluster " + row.number + ", " + many(row.nodes, "node") + " ready, open for " + span(row.elapsed)),
      view.manages && row.waiting && row.state !== "closed" ? h("span", {class: "actions"}, doubt("waiting" + row.number, "Cancel " + count(row.waiting) + " waiting", {"data-act": "cancel_waiting", "data-cluster": row.number})) : null),
    bar(row),
    h("dl", {class: "figures"}, figure("Done", count(row.done), "", "done"), figure("Failed", count(row.failed), "", "fail"), figure("Cancelled", count(row.cancelled), "", "stop"),
      figure("Running", count(row.running), "", "run"), figure("Waiting", count(row.waiting), "", "wait"),
      figure("Rate", few(row.rate), "/ s"), figure("Time left", row.left === null ? "\u2013" : span(row.left)), figure("CPUs used", row.used, "of " + row.cpus), figure("Job time", span(row.job_seconds))),
    h("div", {class: "plots"},
      plot(row.plot, "Jobs ended", "", [{at: 1, kind: "p-done", area: "p-area-done"}], from, to),
      plot(row.plot, "CPUs used; dashed: offered", "", [{at: 2, kind: "p-used", area: "p-area-used", step: true}, {at: 3, kind: "p-cpus", step: true}], from, to)));
}

function clustersPage() {
  return [heading("Clusters", view.source + (view.total > 1 ? ", " + view.total + " in all" : "")),
    view.rows.length ? view.rows.map(clusterCard) : h("p", {class: "empty"}, view.nothing), pager()];
}

const heading = (text, ...more) => h("div", {class: "top"}, h("h1", {}, text), h("p", {}, ...more));

// columns: [words, field to sort by or "", class, cell]
function tableOf(columns, key, caption) {
  const link = (words, field) => h("a", {href: href(place.page, {sort: field, desc: view.sort === field ? 1 - view.desc : 0, page: 1})}, words + (view.sort === field ? (view.desc ? " \u25be" : " \u25b4") : ""));
  return [h("div", {class: "sorts"}, "Sort by", columns.filter(column => column[1]).map(column => link(column[0], column[1]))),
    h("div", {class: "wrap"}, h("table", {class: "stack"}, h("caption", {hidden: true}, caption),
    h("thead", {}, h("tr", {}, columns.map(([words, field, kind]) => h("th", {scope: "col", class: kind || false, "aria-sort": field && view.sort === field ? (view.desc ? "descending" : "ascending") : false}, field ? link(words, field) : words)))),
    h("tbody", {}, view.rows.map(row => h("tr", {"data-key": key(row)}, columns.map(([words, , kind, cell]) => h("td", {class: kind || false, "data-label": words || false}, cell(row)))))))), pager()];
}

function pager() {
  if (view.pages < 2) return null;
  const from = (view.page - 1) * view.per + 1;
  return h("nav", {class: "pager", "aria-label": "Pages of the table"},
    view.page > 1 ? h("a", {href: href(place.page, {page: view.page - 1})}, "\u2190 Previous") : h("span", {}, "\u2190 Previous"),
    h("span", {}, count(from) + " to " + count(from + view.rows.length - 1) + " of " + count(view.total)),
    view.page < view.pages ? h("a", {href: href(place.page, {page: view.page + 1})}, "Next \u2192") : h("span", {}, "Next \u2192"));
}

const nodeName = row => [h("a", {href: "#/node?id=" + encodeURIComponent(row.id)}, row.name || row.address), h("span", {class: "sub"}, row.address + (row.port ? ":" + row.port : ""))];
const meter = row => h("svg", {class: "meter", viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true"}, h("rect", {x: 0, y: 0, height: 6, width: Math.min(100, 100 * row.used / Math.max(1, row.cpus)).toFixed(1)}));
const cpus = row => [row.used + " of " + row.cpus, meter(row)];
const stateCell = row => [state(row.state), row.holder ? h("span", {class: "sub reason"}, "held by " + row.holder) : null, row.reason && row.reason !== "deallocated" ? h("span", {class: "sub reason"}, last(row.reason)) : null];

function nodesPage() {
  const used = view.rows.reduce((sum, row) => sum + row.used, 0), all = view.rows.reduce((sum, row) => sum + (row.state === "ready" || row.state === "connected" ? row.cpus : 0), 0);
  return [heading("Nodes", many(view.total, "node") + (view.pages < 2 ? ", " + used + " of " + many(all, "CPU") + " used" : "")),
    view.rows.length ? tableOf([["Node", "name", "wide", nodeName], ["State", "state", "wide", stateCell], ["CPUs used", "used", "n", cpus], ["Jobs done", "jobs", "n", row => count(row.jobs)],
      ["Job time", "job_seconds", "n", row => span(row.job_seconds)], ["Memory free", "memory", "n", row => size(row.memory)], ["Disk free", "disk", "n", row => size(row.disk)],
      ["Load", "load", "n", row => row.load === null ? "\u2013" : Math.round(row.load) + " %"], ["Heard", "heard", "n", row => row.heard === null ? "\u2013" : span(row.heard) + " ago"]], row => "n" + row.id, "Nodes")
      : h("p", {class: "empty"}, "No node is known yet.")];
}

// A button that asks once more before it does what cannot be undone.
function doubt(name, words, attrs, disabled) {
  return sure === name ? [h("button", {type: "button", class: "sure", "data-key": "sure" + name, ...attrs}, "Yes: " + words.charAt(0).toLowerCase() + words.slice(1)), h("button", {type: "button", "data-key": "no" + name, "data-act": "unsure"}, "No")]
    : h("button", {type: "button", "data-key": "ask" + name, "data-act": "sure", "data-name": name, disabled: !!disabled}, words);
}

const jobKey = row => row.cluster + "." + row.job;
function nodePage() {
  const node = view.node, facts = [["State", stateCell(node)], ["CPUs used", node.used + " of " + node.cpus], ["Jobs done", count(node.jobs)], ["Job time", span(node.job_seconds)],
    ["Memory free", size(node.memory)], ["Disk free", size(node.disk)], ["Load", node.load === null ? "\u2013" : Math.round(node.load) + " %"], ["Heard", node.heard === null ? "\u2013" : span(node.heard) + " ago"], ["Platform", node.platform || "\u2013"],
    ["Clusters", node.clusters.length ? node.clusters.map(use => use.name + ": " + use.jobs + " done").join(", ") : "\u2013"]];
  const there = new Set(view.rows.map(jobKey));
  for (const key of chosen) if (!there.has(key)) chosen.delete(key);
  const off = view.rows.find(row => row.live === false);
  return [h("p", {class: "soft"}, h("a", {href: "#/nodes"}, "\u2190 Nodes")), heading(node.name || node.address, node.address + (node.port ? ":" + node.port : "")),
    h("section", {class: "card"}, h("dl", {class: "facts"}, facts.map(([word, value]) => h("div", {}, h("dt", {}, word), h("dd", {}, value)))),
      node.reason.includes("\n") ? h("pre", {}, node.reason) : null),
    h("div", {class: "top"}, h("h2", {}, "Jobs there"), h("p", {}, count(view.total))),
    view.manages && view.total ? h("div", {class: "tools"}, doubt("some", chosen.size ? "Cancel " + many(chosen.size, "chosen job") : "Cancel chosen jobs", {"data-act": "cancel_some"}, !chosen.size),
      doubt("all", "Cancel all " + count(view.total), {"data-act": "cancel_all"})) : null,
    view.rows.length ? tableOf([["", "", "", row => view.manages ? h("input", {type: "checkbox", "data-act": "choose", "data-job": jobKey(row), "aria-label": "choose job " + row.id}) : ""],
      ["Job", "job", "", row => [h("span", {class: "mono"}, row.id), view.clusters.length > 1 ? h("span", {class: "sub"}, "cluster " + row.cluster) : null]], ["State", "state", "", row => state(row.state)], ["Time", "seconds", "n", row => row.seconds === null ? "\u2013" : span(row.seconds)],
      ["Arguments and output", "", "wide", row => [h("div", {class: "mono args"}, row.arguments || "none"),
        row.stdout ? h("pre", {"aria-label": "stdout"}, row.stdout) : null, row.stderr ? h("pre", {class: "err", "aria-label": "stderr"}, row.stderr) : null]],
      ["", "", "n", row => view.manages ? h("button", {type: "button", "data-act": "cancel", "data-job": jobKey(row), "aria-label": "cancel job " + row.id}, "Cancel") : null]], row => "j" + jobKey(row), "Jobs on this node")
      : h("p", {class: "empty"}, view.manages ? "No job is on this node." : "Which jobs these are is known to the program that uses the node."),
    off ? h("p", {class: "soft"}, "Output is shown while it is printed by nodes that were set up after the monitor was made, or if the cluster has on_output. This node was set up before.") : null];
}

function failuresPage() {
  const words = field => h("a", {href: href("failures", {sort: field, desc: view.sort === field ? 1 - view.desc : 1, page: 1})}, {count: "number", last: "time"}[field] + (view.sort === field ? (view.desc ? " \u25be" : " \u25b4") : ""));
  return [heading("Failures", "the last 500 failed jobs of a cluster, grouped by the last line of their tracebacks; by ", words("count"), ", ", words("last")),
    view.rows.length ? h("div", {class: "wrap"}, view.rows.map(group => h("details", {"data-key": "f" + group.cluster + group.text},
      h("summary", {}, h("span", {class: "count"}, mark("fail"), count(group.count)), h("span", {class: "line mono"}, group.text || "no text"), h("span", {class: "soft nowrap"}, clock(group.last))),
      h("div", {}, h("pre", {}, group.trace.trim()), h("table", {class: "stack"}, h("thead", {}, h("tr", {}, ["Job", "Arguments", "Status", "Node", "Time"].map(word => h("th", {scope: "col"}, word)))),
        h("tbody", {}, group.jobs.map(job => h("tr", {}, [["Job", "mono", job.id], ["Arguments", "mono args wide", job.arguments || "none"], ["Status", "", job.status], ["Node", "", job.node || "\u2013"], ["Time", "nowrap", clock(job.time)]].map(
          ([word, kind, value]) => h("td", {class: kind || false, "data-label": word}, value))))))))))
      : h("p", {class: "empty"}, "No job has failed."), pager()];
}

function managePage() {
  if (!view.manages) return [heading("Manage"), h("p", {class: "empty"}, "Nodes are only looked at here; what they do is decided by the program that uses them.")];
  const open = view.clusters;
  return [heading("Manage"), h("section", {class: "card"}, h("div", {class: "top"}, h("h2", {}, "Add a node"), h("p", {}, "a host where dispynode runs, or a word with * for all that answer")),
    h("form", {"data-act": "add"}, open.length > 1 && !view.shared ? h("label", {}, "Cluster", h("select", {name: "cluster"}, open.map(one => h("option", {value: one.number, "data-key": one.number}, one.number + " " + one.name)))) : null,
      h("label", {}, "Host", h("input", {name: "host", required: true, autocomplete: "off", autocapitalize: "none", spellcheck: "false", size: 22})), h("label", {}, "Port", h("input", {name: "port", type: "number", min: 1, max: 65535, placeholder: "9701"})),
      view.shared ? null : h("label", {}, "CPUs at most", h("input", {name: "cpus", type: "number", placeholder: "all"})), h("button", {class: "main"}, "Add"))),
    view.rows.length ? tableOf([["Node", "name", "", nodeName], ["State", "state", "", stateCell], ["CPUs used", "used", "n", cpus],
      ["CPUs to use", "", "wide", row => row.state === "closed" ? "\u2013" : h("form", {"data-act": "cpus", "data-node": row.id}, h("input", {name: "cpus", type: "number", value: row.cpus, max: row.offered || false, "aria-label": "CPUs of " + (row.name || row.address)}), " ", h("button", {}, "Set"))],
      ["", "", "wide", row => h("div", {class: "actions"}, row.id.includes("gone:") ? null : row.state === "closed" || row.state === "drained" ? button("use", row, "Use again") : button("drain", row, "Drain"),
        row.state === "closed" ? null : doubt("release" + row.id, "Release", {"data-act": "release", "data-node": row.id}))]], row => "m" + row.id, "Nodes")
      : h("p", {class: "empty"}, "No node is known yet."),
    h("p", {class: "soft"}, "Drain: nothing new is sent there. Release: it is let go, for other programs to use, when its jobs have ended." + (view.shared ? " All this holds for all clusters, those that come too; CPUs are those that each may use at most." : ""))];
}
const button = (act, row, words) => h("button", {type: "button", "data-key": act, "data-act": act, "data-node": row.id}, words);

const DRAW = {clusters: clustersPage, nodes: nodesPage, node: nodePage, failures: failuresPage, manage: managePage};

function draw() {
  patch(document.getElementById("nav"), Object.entries(PAGES).map(([name, words]) => h("a", {href: "#/" + name, "aria-current": name === place.page || name === "nodes" && place.page === "node" ? "page" : false}, words)));
  document.title = (PAGES[place.page] || "Node") + " \u00b7 dispy";
  const main = document.getElementById("main"), held = document.activeElement;
  if (view === null) { patch(main, [h("p", {class: "empty", "data-key": "loading"}, "Loading.")]); return; }
  if (view.error) {
    patch(main, [h("p", {class: "empty", "data-key": "error"}, view.status === 401 ? "Open this page by the link that the program printed: it carries the token." : view.error)]);
    return;
  }
  patch(main, [h("div", {"data-key": place.page + (place.query.get("id") || "")}, DRAW[place.page]())]);
  if (held && held !== document.activeElement && held.isConnected) held.focus({preventScroll: true});
}

// -- what the reader does ----------------------------------------------------------------------------------

const splitKey = key => key.split(".").map(Number);
async function cancel(keys) {
  const by = new Map();
  for (const [cluster, job] of keys.map(splitKey)) by.set(cluster, [...(by.get(cluster) || []), job]);
  for (const [cluster, jobs] of by) await post("cancel", {cluster, node: view.node.id, jobs}, n => many(n, "job") + (n === 1 ? " is" : " are") + " being ended.");
}
const DO = {
  sure: data => { sure = data.name; draw(); const yes = document.querySelector("button.sure"); if (yes) yes.focus(); },
  unsure: () => { sure = ""; draw(); },
  choose: (data, element) => { if (element.checked) chosen.add(data.job); else chosen.delete(data.job); draw(); },
  cancel: data => cancel([data.job]),
  cancel_some: () => { sure = ""; cancel([...chosen]); },
  cancel_all: async () => { sure = ""; for (const use of view.node.clusters) await post("cancel", {cluster: use.number, node: view.node.id, jobs: "all"}, n => many(n, "job") + (n === 1 ? " is" : " are") + " being ended."); },
  cancel_waiting: data => { sure = ""; post("cancel_waiting", {cluster: Number(data.cluster)}, n => many(n, "job") + (n === 1 ? " is" : " are") + " cancelled."); },
  use: data => post("use", {node: data.node}, () => "The node is used again."),
  drain: data => post("drain", {node: data.node}, () => "Nothing new is sent to the node."),
  release: data => { sure = ""; post("release", {node: data.node}, () => "The node is let go when its jobs have ended."); }};
const SEND = {
  add: (data, words) => post("add", {cluster: Number(words.get("cluster") || (view.clusters[0] || {number: 0}).number), host: words.get("host").trim(), port: words.get("port") ? Number(words.get("port")) : null, cpus: words.get("cpus") ? Number(words.get("cpus")) : null},
    () => "The node is looked for; it appears below."),
  cpus: (data, words) => post("cpus", {node: data.node, cpus: Number(words.get("cpus"))}, () => "The CPUs are set.")};

document.addEventListener("click", event => {
  const element = event.target.closest("[data-act]");
  if (element && element.tagName !== "FORM" && DO[element.dataset.act]) DO[element.dataset.act](element.dataset, element);
});
document.addEventListener("submit", event => {
  event.preventDefault();
  const form = event.target;
  if (SEND[form.dataset.act]) SEND[form.dataset.act](form.dataset, new FormData(form));
});
document.addEventListener("keydown", event => { if (event.key === "Escape" && sure) DO.unsure(); });
document.addEventListener("visibilitychange", () => { if (document.hidden) { if (reading) reading.abort(); } else if (place) { plots.clear(); listen(); } });
window.addEventListener("hashchange", go);
document.querySelector(".skip").addEventListener("click", event => { event.preventDefault(); document.getElementById("main").focus(); });
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
