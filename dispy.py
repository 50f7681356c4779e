#!/usr/bin/env python3
"""Run a Python function or a program over many inputs on all CPUs of one machine or of many.

    import dispy
    cluster = dispy.JobCluster(compute)          # any function; or the path of a program
    jobs = [cluster.submit(n) for n in range(100)]
    for job in jobs:
        print(job(), job.ip_addr)                # waits; None if it failed, then job.exception says why
    cluster.close()

Without nodes on the network this starts one on this machine. For others, copy `dispynode.py` and the secret
(~/.config/dispy/secret) to them and run `python dispynode.py` there.

    user's program                                        node
    +------------------------------------------+         +--------------------+
    | user threads    submit, cancel, wait     |         |                    |
    |      | post()                            |         |                    |
    | driver thread   Loop: links, timers      | <=====> | dispynode          |
    |      |          Schedule: decides (pure) |  links  |                    |
    | openers         unpickle results         |         +--------------------+
    | callback pool   user's callbacks         |
    | dial threads    connect, TLS, handshake  |
    +------------------------------------------+

One driver serves all clusters of a program that have the same secret and certificate. It owns every link and
the Schedule; other threads post to it. A link carries everything between this program and a node.

The life of a job here:
  1. `submit` pickles the arguments, makes a DispyJob, counts it as pending and posts it.
  2. The driver gives all that was posted since its last turn to the Schedule, which queues it.
  3. The Schedule sends attempts to nodes with free CPUs, and a little more than that: as much as the node will
     have done in 100 ms. What a node does not come to is called back when another is idle.
  4. `Results` of a node are acknowledged, also if they are known already. Plain values are opened at once; what
     may run the user's code when it is unpickled goes through an opener thread.
  5. The job gets result, output, times and, last, its status; whoever waits is woken; the callback is called.
  6. A node that is lost: its jobs are queued again if the computation is reentrant, otherwise they are Abandoned.

Files this program needs: this one, dispynode.py, cloudpickle.
"""

import argparse
import atexit
import collections
import concurrent.futures
import contextlib
import enum
import functools
import hashlib
import importlib
import itertools
import logging
import math
import os
import pickle
import queue
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import threading
import time
import types
import uuid
import weakref
from typing import Any, Callable, Deque, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

import cloudpickle

from dispynode import (
    ATOMS, FILE_PIECE, FRAME_FILL, HANDSHAKE_TIME, NODE_PORT, NO_TLS, PULSE, QUEUED_TIME, Ack, Bye, Cancel, Compute,
    DispyError, Done, File, FileBack, FileKept, GOES_ON, HandshakeError, IncomingFile, Introduce, Jobs, Link, LinkBroken, Loop, Need, OUTCOMES, Offer, Outcome, Output, PeerError, Pulse,
    Ready, Recall, Refused, Results, Returned, Role, SecretError, Session, Welcome, __version__,
    beside, call_chunk, call_packed, check_name, derive_key, describe_exception, file_digest, find_secret, handshake_dial, open_envelope, pieces_of, seal, size_of, tls_context, tune,
    unpack_error, unseal)

__all__ = ['JobCluster', 'NodeAllocate', 'DispyExecutor', 'register_joblib', 'DispyJob', 'JobFailed', 'RemoteTraceback', 'DispyNode', 'DispyNodeAvailInfo', 'ClusterStatus', 'NoNodes', 'DispyError', 'SecretError', 'logger']

# ---------------------------------------------------------------------------------------------------------
# Constants and errors
# ---------------------------------------------------------------------------------------------------------

AHEAD_MOST = 512              # jobs a CPU that a node may hold beyond what it runs, however short they are
AHEAD_BYTES = 8 << 20        # bytes of arguments that a node may hold beyond what it runs
MAX_PAYLOAD = 960 << 20       # bytes of one job's arguments; a frame holds a GiB
LOST_MOST = 3                 # nodes a job may lose before it is given up
PROBE_TIME = 1.0              # s that nodes=None waits for a dispynode before it starts one
PROGRESS_EVERY = 1.0          # s between lines of progress
WARN_AFTER, WARN_EVERY = 5.0, 60.0      # s without a usable node
REDIAL_FIRST, REDIAL_MOST = 0.5, 30.0   # s between attempts to reach a node, doubling
RETRY_FIRST = 0.1             # s until a computation is offered again to a node that was busy, doubling to 2 s
CALL_TIME = 30.0              # s that a question to the driver may take; its turns take milliseconds
ACKS_MOST, ACK_AFTER = 256, 0.05        # results that wait for their acknowledgement, and s that they do
CALLBACK_THREADS = 16         # callbacks that may block at the same time
FOREVER = 0.5 if os.name == 'nt' else 3600.0   # s of one slice of a wait: Ctrl-C does not end a wait on Windows

logger = logging.getLogger('dispy')
for _name in ('DEBUG', 'INFO', 'WARNING', 'ERROR', 'CRITICAL'):
    setattr(logger, _name, getattr(logging, _name))   # scripts for dispy 4 say dispy.logger.DEBUG


class NoNodes(DispyError):
    """No node can be used; the text names every address tried and every refusal with its reason."""


# ---------------------------------------------------------------------------------------------------------
# Public values
# ---------------------------------------------------------------------------------------------------------

class JobFailed(DispyError):
    """A job did not finish; the text is its `exception`. Raised by `map` and the executor where the job's own
    exception object is not to be had."""


class RemoteTraceback(DispyError):
    """The cause of an exception that a job raised: where it did, on the node."""

    def __str__(self) -> str:
        return '\n"""\n%s"""' % self.args[0]


def error_of(job: 'DispyJob') -> BaseException:
    """The exception to raise for a job that failed, with the node's traceback as its cause."""
    if job.error is None:
        return JobFailed(job.exception)
    job.error.__cause__ = RemoteTraceback(job.exception)
    return job.error


def result_of(job: 'DispyJob') -> Any:
    """Wait; return the job's result or raise for it."""
    result = job()
    if job.status != JobState.FINISHED:
        raise error_of(job)
    return result


class JobState(enum.IntEnum):
    """Where a job is. The first seven are what DispyJob.status shows; the numbers are dispy 4's."""
    CREATED = 5
    RUNNING = 6
    PROVISIONAL = 7
    CANCELLED = 8
    TERMINATED = 9
    ABANDONED = 10
    FINISHED = 11
    CANCELLING = 12   # shown as Running
    REQUEUED = 13     # shown as Created


JOB_TABLE: Dict[Tuple[JobState, str], JobState] = {
    (JobState.CREATED, 'send'): JobState.RUNNING, (JobState.REQUEUED, 'send'): JobState.RUNNING,
    (JobState.CREATED, 'cancel'): JobState.CANCELLED, (JobState.REQUEUED, 'cancel'): JobState.CANCELLED,
    (JobState.RUNNING, 'cancel'): JobState.CANCELLING, (JobState.PROVISIONAL, 'cancel'): JobState.CANCELLING,
    (JobState.RUNNING, 'provisional'): JobState.PROVISIONAL,
    (JobState.PROVISIONAL, 'provisional'): JobState.PROVISIONAL,
    (JobState.CANCELLING, 'provisional'): JobState.CANCELLING,
    (JobState.CREATED, 'give up'): JobState.ABANDONED, (JobState.REQUEUED, 'give up'): JobState.ABANDONED,
}
for _running in (JobState.RUNNING, JobState.PROVISIONAL):
    JOB_TABLE.update({
        (_running, 'finish'): JobState.FINISHED, (_running, 'fail'): JobState.TERMINATED,
        (_running, 'cancelled'): JobState.CANCELLED, (_running, 'back'): JobState.REQUEUED,
        (_running, 'give up'): JobState.ABANDONED})
JOB_TABLE.update({
    (JobState.CANCELLING, 'finish'): JobState.FINISHED, (JobState.CANCELLING, 'fail'): JobState.TERMINATED,
    (JobState.CANCELLING, 'cancelled'): JobState.CANCELLED, (JobState.CANCELLING, 'back'): JobState.CANCELLED,
    (JobState.CANCELLING, 'give up'): JobState.CANCELLED})

ENDED = frozenset((JobState.CANCELLED, JobState.TERMINATED, JobState.ABANDONED, JobState.FINISHED))


class Work:
    """What the Schedule knows of a job."""
    __slots__ = ('_state', '_comp', '_payload', '_options', '_serial', '_lost')

    def __init__(self, comp: str, payload: Any, options: Optional[dict] = None) -> None:
        self._state = JobState.CREATED
        self._comp, self._payload, self._options = comp, payload, options
        self._serial = 0          # job number << 16 | number of the attempt; 0 before the first
        self._lost: Tuple[str, ...] = ()   # nodes that were lost while it was there


class DispyJob(Work):
    """A job, as `submit` returns it. Attributes:

    id - the user's to set; a running number by default
    status - one of the constants below; result, stdout, stderr - when it has ended (output is `str` for functions,
        `bytes` for programs); exception - text of the traceback or of what went wrong, else None; error - the exception
        itself if it could be pickled, else None
    ip_addr - where it ran; submit_time, start_time, end_time - seconds since the epoch
    """
    __slots__ = ('id', 'status', 'result', 'stdout', 'stderr', 'exception', 'error', 'ip_addr', 'submit_time',
                 'start_time', 'end_time', '_event', '_when_ended')

    Created, Running, ProvisionalResult = int(JobState.CREATED), int(JobState.RUNNING), int(JobState.PROVISIONAL)
    Cancelled, Terminated = int(JobState.CANCELLED), int(JobState.TERMINATED)
    Abandoned, Finished = int(JobState.ABANDONED), int(JobState.FINISHED)

    def __init__(self, comp: str, payload: Any, options: Optional[dict], number: Any) -> None:
        self._state = JobState.CREATED
        self._comp, self._payload, self._options = comp, payload, options
        self._serial, self._lost = 0, ()
        self.id = number
        self.status = 5
        self.result: Any = None
        self.stdout: Union[str, bytes, None] = None
        self.stderr: Union[str, bytes, None] = None
        self.exception: Optional[str] = None
        self.error: Optional[BaseException] = None
        self.ip_addr: Optional[str] = None
        self.submit_time = time.time()
        self.start_time: Optional[float] = None
        self.end_time: Optional[float] = None
        self._event: Optional[threading.Event] = None
        self._when_ended: Optional[List[Callable[['DispyJob'], None]]] = None

    @property
    def finish(self) -> threading.Event:
        """An event that is set when the job has ended. Made when first asked for: most jobs never need it."""
        event = self._event
        if event is None:
            with _lock:
                event = self._event
                if event is None:
                    event = self._event = threading.Event()
            if self.status in ENDED:
                event.set()
        return event

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Wait up to `timeout` seconds (None: without limit); whether the job has ended. Any thread."""
        if self.status in ENDED:
            return True
        event = self.finish
        if timeout is not None:
            return event.wait(timeout)
        while not event.wait(FOREVER):
            continue
        return True

    def _call_when_ended(self, call: Callable[['DispyJob'], None]) -> None:
        """Call it with the job when that has ended, at once if it has; perhaps twice. Any thread; must be quick."""
        with _lock:
            self._when_ended = [*(self._when_ended or ()), call]
        if self.status in ENDED:
            call(self)

    def _wake(self) -> None:
        """The job has ended: whoever waits for it is told."""
        if self._event is not None:
            self._event.set()
        for call in self._when_ended or ():
            call(self)

    def __call__(self, timeout: Optional[float] = None) -> Any:
        """Wait and return the result; None for a job that failed. Raises TimeoutError after `timeout` seconds.
        Any thread."""
        if not self.wait(timeout):
            raise TimeoutError('job %r has not ended within %s s' % (self.id, timeout))
        return self.result

    def status_text(self) -> str:
        """The status as a word."""
        return JobState(self.status).name.lower()

    def __repr__(self) -> str:
        return '<DispyJob %r %s>' % (self.id, self.status_text())


class NodeState(enum.Enum):
    """What a node is to this program."""
    FOUND = 'found'
    DIALLING = 'dialling'
    REFUSED = 'refused'
    CONNECTED = 'connected'
    CLOSED = 'closed'
    LOST = 'lost'


NODE_TABLE: Dict[Tuple[NodeState, str], NodeState] = {
    (NodeState.FOUND, 'dial'): NodeState.DIALLING, (NodeState.LOST, 'dial'): NodeState.DIALLING,
    (NodeState.REFUSED, 'dial'): NodeState.DIALLING,
    (NodeState.DIALLING, 'connect'): NodeState.CONNECTED,
    (NodeState.DIALLING, 'fail'): NodeState.REFUSED, (NodeState.CONNECTED, 'fail'): NodeState.LOST,
    (NodeState.FOUND, 'close'): NodeState.CLOSED, (NodeState.DIALLING, 'close'): NodeState.CLOSED,
    (NodeState.REFUSED, 'close'): NodeState.CLOSED, (NodeState.CONNECTED, 'close'): NodeState.CLOSED,
    (NodeState.LOST, 'close'): NodeState.CLOSED,
}


class DispyNodeAvailInfo(NamedTuple):
    """What is free on a node: cpu in percent, memory, disk and swap in bytes; None where it is not known."""
    cpu: Optional[float] = None
    memory: Optional[int] = None
    disk: Optional[int] = None
    swap: Optional[int] = None


class DispyNode:
    """A node as `status()` and cluster_status show it; a copy that does not change."""
    Initialized, Closed = 2, 3   # what cluster_status says of a node; numbers that no job's status has

    def __init__(self, ip_addr: str, port: int, name: str, state: str, reason: str, cpus: int, busy: int, jobs_done: int,
                 cpu_time: float, facts: dict) -> None:
        self.ip_addr, self.port, self.name = ip_addr, port, name
        self.state, self.reason = state, reason      # of this cluster; reason: why it is not used
        self.cpus, self.avail_cpus = cpus, cpus
        self.busy = busy                              # jobs of this cluster there
        self.jobs_done, self.cpu_time = jobs_done, cpu_time   # of this cluster; seconds
        self.platform = facts.get('platform', '')
        # When it was connected: free CPU in percent, memory, disk and swap in bytes; None where it has no psutil.
        available = facts.get('available', {})
        self.avail_info = DispyNodeAvailInfo(*map(available.get, DispyNodeAvailInfo._fields))
        self.facts = facts

    def __repr__(self) -> str:
        return '<DispyNode %s:%d %s %s>' % (self.ip_addr, self.port, self.name, self.state)


class ClusterStatus(NamedTuple):
    """What `status()` returns."""
    nodes: List[DispyNode]
    jobs_pending: int


# ---------------------------------------------------------------------------------------------------------
# Schedule: which job goes where. Pure: nothing here opens a socket, reads a clock, takes a lock or calls the
# user's code. The same class serves all clusters of one program here and all clients of a scheduler.
# ---------------------------------------------------------------------------------------------------------

# Events.
class Opened(NamedTuple):
    """A computation of a client. CPUs are shared evenly between clients."""
    comp: str
    client: str
    reentrant: bool


class Submitted(NamedTuple):
    """New jobs, in order."""
    works: list


class CancelAsked(NamedTuple):
    """The user wants it ended."""
    work: Work


class NodeReady(NamedTuple):
    """A node is set up for a computation; `held` are the serials it still knows of it; `name` is for people."""
    node: Any
    comp: str
    cpus: int
    held: list
    name: str = ''


class NodeOffers(NamedTuple):
    """The CPUs a node offers have changed; 0: nothing new is to be sent."""
    node: Any
    cpus: int


class NodeResults(NamedTuple):
    """Rows of Results."""
    node: Any
    comp: str
    rows: list


class NodeReturned(NamedTuple):
    """Attempts that were never started there."""
    node: Any
    comp: str
    serials: list


class NodeLost(NamedTuple):
    """The node is gone; `name` and `text` for people."""
    node: Any
    name: str
    text: str


class NodeLeft(NamedTuple):
    """The node is not used for a computation any more; it was told before to end it."""
    node: Any
    comp: str
    name: str
    text: str


class Closed(NamedTuple):
    """The computation is over; what has not ended is cancelled."""
    comp: str


# Actions.
class SendJobs(NamedTuple):
    """Send attempts, rows of works."""
    node: Any
    comp: str
    works: list


class SendCancel(NamedTuple):
    """Ask a node to end an attempt."""
    node: Any
    comp: str
    serials: list


class SendRecall(NamedTuple):
    """Ask a node for so many attempts it has not started."""
    node: Any
    comp: str
    most: int


class SendAck(NamedTuple):
    """Results are here; the node may forget them. No haste: they are kept and dropped if they come again."""
    node: Any
    comp: str
    serials: list


class JobsEnded(NamedTuple):
    """Results came: pairs of (work, row). Works are in their final states, or provisional."""
    node: Any
    comp: str
    pairs: list


class JobWaits(NamedTuple):
    """A job that was on a node waits again."""
    work: Any


class JobParked(NamedTuple):
    """A job wants more CPUs than any node has; it waits beside the queue until there is one."""
    work: Any
    text: str


class JobEnded(NamedTuple):
    """A job has ended without a result; `text` says why."""
    work: Any
    text: str


class _Queue:
    """Jobs of one computation that wait: by priority, then in order."""

    def __init__(self) -> None:
        self._levels: Dict[int, Deque[Work]] = {}
        self._order: List[int] = []     # priorities in use, highest last
        self.length = 0

    def _level(self, work: Work) -> Deque[Work]:
        priority = work._options.get('priority', 0) if work._options else 0
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = collections.deque()
            self._order = sorted(self._levels)
        return level

    def push(self, work: Work) -> None:
        """Behind those of its priority."""
        self._level(work).append(work)
        self.length += 1

    def push_front(self, work: Work) -> None:
        """Before those of its priority: it has waited already."""
        self._level(work).appendleft(work)
        self.length += 1

    def head(self) -> Optional[Work]:
        """The next one, left where it is."""
        while self._order:
            level = self._levels[self._order[-1]]
            while level and level[0]._state not in _WAITING:
                level.popleft()
            if level:
                return level[0]
            del self._levels[self._order.pop()]
        return None

    def pop(self) -> Work:
        """Take what `head` returned."""
        self.length -= 1
        return self._levels[self._order[-1]].popleft()

    def forget(self) -> None:
        """One that is in here was cancelled; it is dropped when it comes to the front."""
        self.length -= 1

    def __iter__(self) -> Iterator[Work]:
        return (work for level in self._levels.values() for work in level if work._state in _WAITING)


_WAITING = frozenset((JobState.CREATED, JobState.REQUEUED))


class _Comp:
    """A computation in the schedule."""

    def __init__(self, opened: Opened) -> None:
        self.comp, self.client, self.reentrant = opened
        self.queue = _Queue()
        self.pinned: Dict[Any, _Queue] = {}   # by node: jobs for that one alone
        self.parked: List[Work] = []          # wanting more CPUs than any node has
        self.mean: Optional[float] = None     # s a job takes, quick to rise and slow to fall
        self.flying = 0                       # CPUs of jobs on nodes
        self.running: Dict[int, '_Node'] = {}   # serial -> where

    def queue_of(self, work: Work) -> _Queue:
        """Where this job waits."""
        key = work._options.get('node') if work._options else None
        return self.queue if key is None else self.pinned.setdefault(key, _Queue())

    def source(self, key: Any) -> _Queue:
        """Where a node's next job comes from: those for it alone go first."""
        pinned = self.pinned.get(key) if self.pinned else None
        return pinned if pinned is not None and pinned.length else self.queue

    def length(self) -> int:
        """Jobs that wait, parked ones not counted."""
        return self.queue.length + (sum(queue.length for queue in self.pinned.values()) if self.pinned else 0)

    def waiting(self) -> List[Work]:
        """All jobs that wait."""
        return [work for queue in (self.queue, *self.pinned.values()) for work in queue] + self.parked


class _Node:
    """A node in the schedule."""
    __slots__ = ('key', 'name', 'cpus', 'used', 'bytes', 'flight', 'comps', 'recalled')

    def __init__(self, key: Any, cpus: int) -> None:
        self.key, self.name, self.cpus = key, str(key), cpus
        self.used = 0       # CPUs of jobs there, run or not
        self.bytes = 0      # of their arguments
        self.flight: Dict[str, Dict[int, Work]] = {}   # computation -> serial -> work
        self.comps: Dict[str, _Comp] = {}              # set up there
        self.recalled: Set[str] = set()                # computations with a Recall on its way


class Schedule:
    """Jobs to nodes. Events in, actions out; `flush` once a turn, after all events of the turn."""

    def __init__(self) -> None:
        self.comps: Dict[str, _Comp] = {}
        self.nodes: Dict[Any, _Node] = {}
        self._numbers = itertools.count(1)
        self._actions: List[Any] = []
        self._sends: Dict[Tuple[Any, str], List[Work]] = {}
        self._handlers: Dict[type, Callable[[Any], None]] = {
            Opened: self._opened, Submitted: self._submitted, CancelAsked: self._cancel_asked,
            NodeReady: self._node_ready, NodeOffers: self._node_offers, NodeResults: self._node_results, NodeReturned: self._node_returned,
            NodeLost: self._node_lost, NodeLeft: self._node_left, Closed: self._closed,
        }

    def handle(self, event: Any, now: float) -> List[Any]:
        """Take one event; returns what must be done at once."""
        self._actions = []
        self._handlers[type(event)](event)
        return self._actions

    def flush(self, now: float) -> List[Any]:
        """The end of a turn: what waits goes to nodes that have room."""
        self._actions = []
        waiting = [comp for comp in self.comps.values() if comp.length()]
        if waiting:
            self._distribute(waiting)
        if len(self.nodes) > 1:
            self._balance()
        return self._actions

    # -- small parts --------------------------------------------------------------------------------------

    def _do(self, action: Any) -> None:
        self._actions.append(action)

    @staticmethod
    def _move(work: Work, event: str) -> JobState:
        """The one place where a job's state changes."""
        state = work._state = JOB_TABLE[work._state, event]
        return state

    @staticmethod
    def _cpus(work: Work) -> int:
        return work._options.get('cpus', 1) if work._options else 1

    def _land(self, node: _Node, comp: _Comp, serial: int) -> Optional[Work]:
        """Take an attempt off a node's books. None if it is not there: a result that comes twice or too late."""
        work = node.flight[comp.comp].pop(serial, None)
        if work is not None:
            cpus = self._cpus(work)
            node.used -= cpus
            comp.flying -= cpus
            node.bytes -= size_of(work._payload)
            del comp.running[serial]
        return work

    # -- jobs ---------------------------------------------------------------------------------------------

    def _opened(self, event: Opened) -> None:
        self.comps[event.comp] = _Comp(event)

    def _submitted(self, event: Submitted) -> None:
        for work in event.works:
            work._serial = next(self._numbers) << 16
            comp = self.comps.get(work._comp)
            if comp is None:
                self._move(work, 'cancel')
                self._do(JobEnded(work, 'the cluster was closed'))
            else:
                comp.queue_of(work).push(work)

    def _cancel_asked(self, event: CancelAsked) -> None:
        work, comp = event.work, self.comps.get(event.work._comp)
        if work._state in ENDED or work._state is JobState.CANCELLING or comp is None:
            return
        if self._move(work, 'cancel') is JobState.CANCELLED:
            if work in comp.parked:
                comp.parked.remove(work)
            else:
                comp.queue_of(work).forget()
            self._do(JobEnded(work, 'cancelled before it was started'))
        else:
            self._do(SendCancel(comp.running[work._serial].key, comp.comp, [work._serial]))

    def _closed(self, event: Closed) -> None:
        comp = self.comps.pop(event.comp, None)
        if comp is None:
            return
        for node in self.nodes.values():
            for serial, work in list(node.flight.get(comp.comp, {}).items()):
                self._land(node, comp, serial)
                if work._state is not JobState.CANCELLING:
                    self._move(work, 'cancel')
                self._move(work, 'cancelled')
                self._do(JobEnded(work, 'cancelled: the cluster was closed'))
            node.flight.pop(comp.comp, None)
            node.comps.pop(comp.comp, None)
            node.recalled.discard(comp.comp)
        for work in comp.waiting():
            self._move(work, 'cancel')
            self._do(JobEnded(work, 'cancelled: the cluster was closed'))

    # -- nodes --------------------------------------------------------------------------------------------

    def _node_ready(self, event: NodeReady) -> None:
        comp = self.comps.get(event.comp)
        if comp is None:
            return
        node = self.nodes.get(event.node)
        if node is None:
            node = self.nodes[event.node] = _Node(event.node, event.cpus)
        node.cpus, node.name = event.cpus, event.name or node.name
        node.comps[event.comp] = comp
        self._unpark(comp, node)
        node.recalled.discard(event.comp)   # what was asked of it may not have arrived
        held, flight = set(event.held), node.flight.setdefault(event.comp, {})
        for serial in sorted(set(flight) - held, reverse=True):
            self._back(node, comp, serial)   # it never arrived there
        cancelled = [serial for serial, work in flight.items() if work._state is JobState.CANCELLING]
        if cancelled:
            self._do(SendCancel(node.key, comp.comp, cancelled))

    def _node_offers(self, event: NodeOffers) -> None:
        node = self.nodes.get(event.node)
        if node is not None:
            node.cpus = event.cpus
            for comp in node.comps.values():
                self._unpark(comp, node)

    def _unpark(self, comp: _Comp, node: _Node) -> None:
        """A node with more CPUs has come."""
        for work in [work for work in reversed(comp.parked) if self._cpus(work) <= node.cpus]:
            comp.parked.remove(work)
            comp.queue.push_front(work)

    def _park(self, comp: _Comp, nodes: List[_Node]) -> None:
        """What no node can take shall not stop those behind it."""
        widest = max((node.cpus for node in nodes if comp.comp in node.comps), default=0)
        work = comp.queue.head()
        while widest and work is not None and self._cpus(work) > widest:
            comp.parked.append(comp.queue.pop())
            self._do(JobParked(work, 'it wants %d CPUs (dispy_cpus) and no node has more than %d' % (self._cpus(work), widest)))
            work = comp.queue.head()

    def _back(self, node: _Node, comp: _Comp, serial: int) -> None:
        """An attempt that was never started: the job waits again."""
        work = self._land(node, comp, serial)
        if work is None:
            return
        if self._move(work, 'back') is JobState.REQUEUED:
            self._wait_again(comp, work)
        else:
            self._do(JobEnded(work, 'cancelled before it was started'))

    def _wait_again(self, comp: _Comp, work: Work) -> None:
        comp.queue_of(work).push_front(work)
        self._do(JobWaits(work))

    def _node_returned(self, event: NodeReturned) -> None:
        node, comp = self.nodes.get(event.node), self.comps.get(event.comp)
        if node is not None and comp is not None and event.comp in node.comps:
            if event.serials:   # otherwise all has started there: not to be asked again before something ends
                node.recalled.discard(event.comp)
            for serial in sorted(event.serials, reverse=True):   # each goes to the front
                self._back(node, comp, serial)

    def _node_results(self, event: NodeResults) -> None:
        node, comp = self.nodes.get(event.node), self.comps.get(event.comp)
        if node is None or comp is None or event.comp not in node.comps:
            return
        if any(row[1] not in OUTCOMES for row in event.rows):
            raise PeerError('a result with an unknown outcome')
        node.recalled.discard(event.comp)
        pairs, mean = [], comp.mean
        for row in event.rows:
            outcome = row[1]
            if outcome in GOES_ON:
                work = node.flight[comp.comp].get(row[0])
                if work is not None:
                    self._move(work, 'provisional')
                    pairs.append((work, row))
                continue
            work = self._land(node, comp, row[0])
            if work is None:
                continue
            if outcome == Outcome.STOPPED:
                node.cpus = 0   # nothing more goes there, until it is Ready again
                self._lost(comp, work, node.name, 'it was stopped')
                continue
            if outcome == Outcome.DIED and work._options and work._options.get('retries'):
                self._lost(comp, work, node.name, bytes(row[4]).decode('utf-8', 'replace'))
                continue
            self._move(work, _EVENT_OF[outcome])
            took = row[3] - row[2]
            if took:
                mean = took if mean is None else mean + (took - mean) * (0.25 if took > mean else 0.0625)
            pairs.append((work, row))
        comp.mean = mean
        self._do(SendAck(node.key, comp.comp, [row[0] for row in event.rows if row[1] not in GOES_ON]))
        if pairs:
            self._do(JobsEnded(node.key, comp.comp, pairs))

    def _node_lost(self, event: NodeLost) -> None:
        node = self.nodes.pop(event.node, None)
        if node is not None:
            for name in list(node.comps):
                self._leave(node, name, event.name, event.text)

    def _node_left(self, event: NodeLeft) -> None:
        node = self.nodes.get(event.node)
        if node is not None and event.comp in node.comps:
            self._leave(node, event.comp, event.name, event.text)

    def _leave(self, node: _Node, name: str, node_name: str, text: str) -> None:
        comp = node.comps.pop(name)
        for serial, work in sorted(node.flight[name].items(), reverse=True):   # each goes to the front
            self._land(node, comp, serial)
            self._lost(comp, work, node_name, text)
        del node.flight[name]
        node.recalled.discard(name)

    def _lost(self, comp: _Comp, work: Work, node_name: str, text: str) -> None:
        """An attempt whose node, or worker if it may be retried, is lost: nobody knows how far it came."""
        work._lost += (node_name,)
        retries = work._options.get('retries') if work._options else None
        attempts = retries + 1 if retries else LOST_MOST if comp.reentrant else 1
        if len(work._lost) < attempts and work._state is not JobState.CANCELLING:
            self._move(work, 'back')
            self._wait_again(comp, work)
        elif self._move(work, 'give up') is JobState.CANCELLED:
            self._do(JobEnded(work, 'cancelled; its node was lost meanwhile'))
        else:
            self._do(JobEnded(work, 'abandoned: %s (%s); %s' % (
                'lost with node ' + work._lost[0] if len(work._lost) == 1 else 'lost with nodes ' + ', '.join(work._lost), text,
                'the computation is not reentrant' if attempts == 1 else 'given up after %d nodes' % len(work._lost)
                if not retries else 'given up after %d attempts' % len(work._lost))))

    # -- distribution -------------------------------------------------------------------------------------

    def _distribute(self, waiting: List[_Comp]) -> None:
        """First to CPUs that are idle, on all nodes; then to queues on nodes, evenly."""
        self._sends = {}
        nodes = [node for node in self.nodes.values() if node.comps and node.cpus > 0]
        total = max(1, sum(node.cpus for node in nodes))
        count = -1
        while count != sum(map(len, self._sends.values())):   # a head that was too wide for a node may have gone elsewhere
            count = sum(map(len, self._sends.values()))
            for comp in waiting:
                self._park(comp, nodes)
            for node in nodes:
                if node.used < node.cpus:
                    self._fill(node, waiting, None)
            shares = {comp.comp: math.ceil(comp.length() / total) for comp in waiting}
            for node in nodes:
                self._fill(node, waiting, shares)
            if all(node.used >= node.cpus for node in nodes):
                break
        for (key, name), works in self._sends.items():
            self._do(SendJobs(key, name, works))

    def _fill(self, node: _Node, waiting: List[_Comp], shares: Optional[Dict[str, int]]) -> None:
        """Send what fits: up to the node's CPUs, or (with the jobs a CPU that wait) up to its queue's depth."""
        rivals = [comp for comp in waiting if comp.comp in node.comps and comp.source(node.key).length]
        while rivals:
            comp = min(rivals, key=self._share) if len(rivals) > 1 else rivals[0]
            room = node.cpus if shares is None else self._depth(node, comp, shares[comp.comp])
            sent = False
            while node.used < room:
                source = comp.source(node.key)
                work = source.head()
                fits = node.cpus if shares is not None and node.bytes <= AHEAD_BYTES else node.cpus - node.used
                if work is None or self._cpus(work) > fits:
                    break
                self._launch(node, comp, source.pop())
                sent = True
                if len(rivals) > 1:
                    break
            if not sent and node.used >= room:
                return   # who has least is next: the others may not fill up before it
            if not sent or not comp.source(node.key).length:
                rivals.remove(comp)

    def _share(self, comp: _Comp) -> int:
        """CPUs its client has now: who has least is next."""
        return sum(other.flying for other in self.comps.values() if other.client == comp.client)

    @staticmethod
    def _depth(node: _Node, comp: _Comp, share: int) -> int:
        """CPUs' worth of jobs that a node may hold, run or not."""
        if comp.mean is None:
            ahead = 1
        elif comp.mean >= QUEUED_TIME:
            ahead = 0
        else:
            ahead = min(AHEAD_MOST, int(QUEUED_TIME / max(comp.mean, 1e-6)))
        return node.cpus * (1 + min(ahead, share))

    def _launch(self, node: _Node, comp: _Comp, work: Work) -> None:
        self._move(work, 'send')
        work._serial += 1
        cpus = self._cpus(work)
        node.used += cpus
        node.bytes += size_of(work._payload)
        comp.flying += cpus
        node.flight[comp.comp][work._serial] = work
        comp.running[work._serial] = node
        if node.recalled:   # the node forgets what was recalled when new work comes
            node.recalled.discard(comp.comp)
        self._sends.setdefault((node.key, comp.comp), []).append(work)

    def _balance(self) -> None:
        """Call back what waits on one node while CPUs of another are idle."""
        idle = [node for node in self.nodes.values() if node.used < node.cpus and node.comps]
        if not idle:
            return
        for donor in self.nodes.values():
            surplus = donor.used - donor.cpus
            if surplus <= 0:
                continue
            for name, comp in donor.comps.items():
                rooms = [node.cpus - node.used for node in idle if name in node.comps]
                if rooms and name not in donor.recalled and not comp.queue.length:
                    free = sum(rooms)
                    most = max(free, surplus * free // (free + donor.cpus))   # of short jobs its part of all, at once
                    count = self._movable(donor.flight[name], max(rooms), min(surplus, most))
                    if count:
                        donor.recalled.add(name)
                        self._do(SendRecall(donor.key, name, count))

    def _movable(self, flight: Dict[int, Work], room: int, most: int) -> int:
        """How many of the last attempts of a node would find room elsewhere; the first of all runs."""
        count = 0
        for work in itertools.islice(reversed(list(flight.values())), max(0, len(flight) - 1)):
            if count >= most or self._cpus(work) > room or (work._options and 'node' in work._options):
                break
            count += 1
        return count


_EVENT_OF = {Outcome.RETURNED: 'finish', Outcome.RETURNED_CODE: 'finish', Outcome.RAISED: 'fail', Outcome.DIED: 'fail',
             Outcome.TIMED_OUT: 'fail', Outcome.CANCELLED: 'cancelled'}

# ---------------------------------------------------------------------------------------------------------
# What travels: computations, their files, arguments
# ---------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def _installed_roots() -> Tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple({os.path.realpath(paths[name]) + os.sep for name in ('stdlib', 'platstdlib', 'purelib', 'platlib')})


def _on_nodes(name: Optional[str]) -> bool:
    """Whether a module is taken to be on nodes as well: what is built in or installed is, the user's own is not."""
    if name in ('dispynode', 'cloudpickle', 'builtins'):
        return True
    module = sys.modules.get(name or '')
    if name == '__main__' or module is None:
        return False
    path = getattr(module, '__file__', None)
    if not path:
        return getattr(module, '__spec__', None) is not None   # built in; a namespace or typed module has no origin
    path = os.path.realpath(path)
    return path.startswith(_installed_roots()) or 'site-packages' in path or 'dist-packages' in path


@functools.lru_cache(maxsize=4096)
def _travels_by_name(name: Optional[str], loaded: bool) -> bool:
    return _on_nodes(name)


def travels(obj: Any) -> bool:
    """Whether an object met by the pickler can be found on a node by its name, or is no class or function at all."""
    if not isinstance(obj, (type, types.FunctionType)):
        return True
    return _travels_by_name(obj.__module__, obj.__module__ in sys.modules)


@functools.lru_cache(maxsize=4)
def _own_modules(loaded: int, shipped: Tuple[str, ...]) -> Tuple[types.ModuleType, ...]:
    """Modules of the user's: what is in them is pickled by value. `loaded` makes the cache forget."""
    return tuple(module for name, module in list(sys.modules.items())
                 if isinstance(module, types.ModuleType) and module.__name__ == name and name not in shipped
                 and not name.startswith('__') and getattr(module, '__file__', None) and not _on_nodes(name)
                 and name.partition('.')[0] not in ('dispy', 'dispyscheduler', 'dispy_httpd'))


def by_value(value: Any, file: Any, protocol: int, buffer_callback: Any, shipped: Tuple[str, ...] = ()) -> None:
    """cloudpickle, with functions and classes of the user's own modules by value and not by name."""
    with _lock:
        registered = []
        try:
            for module in _own_modules(len(sys.modules), shipped):
                if module.__name__ not in cloudpickle.list_registry_pickle_by_value():
                    cloudpickle.register_pickle_by_value(module)
                    registered.append(module)
            cloudpickle.Pickler(file, protocol, buffer_callback).dump(value)
        finally:
            for module in registered:
                cloudpickle.unregister_pickle_by_value(module)


def pack_arguments(args: tuple, kwargs: dict, depends: Sequence[Any] = ()) -> Any:
    """Arguments as they are now: what the caller changes later does not reach the job. Raises what pickling raises.
    `depends` are files and objects for this job alone; files are read now."""
    if depends:
        payload, _ = seal((args, kwargs, *_job_depends(depends)), by_value, travels)
    elif not kwargs and ATOMS.issuperset(map(type, args)):
        return pickle.dumps((args, kwargs), 5)
    else:
        payload, _ = seal((args, kwargs), by_value, travels)
    if type(payload) is tuple:   # large parts are the caller's own memory still
        return tuple(piece if type(piece) is bytes else bytes(piece) for piece in payload)
    return payload


def _job_depends(depends: Sequence[Any]) -> Tuple[List[Tuple[str, int, bytes]], Dict[str, Any]]:
    """(name, mode, content) of files, and objects by their names."""
    if not isinstance(depends, (list, tuple)):
        raise TypeError('dispy_job_depends is a %s; it must be a list' % type(depends).__name__)
    paths: Dict[str, str] = {}
    objects = {}
    for item in depends:
        if isinstance(item, (str, os.PathLike)):
            _add_path(os.fspath(item), paths)
        elif callable(item) and hasattr(item, '__name__'):
            objects[item.__name__] = item
        else:
            raise TypeError('dispy_job_depends: %.80r is neither a file, a directory, a function nor a class' % (item,))
    files = []
    for name, path in paths.items():
        check_name(name)
        with open(path, 'rb') as file:
            files.append((name, stat.S_IMODE(os.stat(path).st_mode) & 0o755 | 0o600, file.read()))
    return files, objects


class Cargo(NamedTuple):
    """A computation, packed: the spec of `Compute` but for what depends on the node, and where its files lie."""
    spec: dict
    paths: Dict[str, str]
    is_program: bool


def _sort_depends(depends: Sequence[Any], paths: Dict[str, str]) -> Tuple[List[Any], List[str]]:
    """Functions and classes, and names of modules that travel as files; files go into `paths`."""
    objects: List[Any] = []
    shipped: List[str] = []
    for item in depends:
        if isinstance(item, types.ModuleType):
            shipped += _module_files(item, paths)
        elif isinstance(item, (str, os.PathLike)):
            _add_path(os.fspath(item), paths)
        elif callable(item) and hasattr(item, '__name__'):
            objects.append(item)
        else:
            raise TypeError('depends: %.80r is neither a file, a directory, a module, a function nor a class' % (item,))
    return objects, shipped


def pack_computation(computation: Any, depends: Sequence[Any], setup: Any, cleanup: Any, dest_path: Optional[str],
                     max_jobs: Optional[int], name: str) -> Cargo:
    """Raises TypeError, ValueError, FileNotFoundError or what pickling raises, naming what was wrong."""
    paths: Dict[str, str] = {}
    objects, shipped = _sort_depends(depends, paths)
    program = ''
    if isinstance(computation, (str, os.PathLike)):
        path = _program_path(os.fspath(computation))
        program = os.path.basename(path)
        paths[program] = path
        code: Any = b''
    elif callable(computation):
        code = _pack_code(computation, setup, cleanup if callable(cleanup) else None, objects, tuple(shipped))
    else:
        raise TypeError('computation is a %s; it must be a function or the path of a program' % type(computation).__name__)
    files = _file_rows(paths, program)
    spec = {'name': name, 'kind': 'program' if program else 'function', 'code': code, 'files': files,
            'cleanup': bool(cleanup), 'dest_path': dest_path or '', 'max_jobs': max_jobs or 0,
            'python': tuple(sys.version_info[:3]), 'support': {}, 'program': program, 'cpus': 0, 'setup_args': b''}
    return Cargo(spec, paths, bool(program))


def _file_rows(paths: Dict[str, str], program: str = '') -> List[Tuple[str, int, bytes, int]]:
    rows = []
    for name, path in paths.items():
        check_name(name)
        size, digest = file_digest(path)
        rows.append((name, size, digest, stat.S_IMODE(os.stat(path).st_mode) | (0o500 if name == program else 0)))
    return rows


def _pack_code(computation: Any, setup: Any, cleanup: Any, objects: List[Any], shipped: Tuple[str, ...]) -> bytes:
    for name, function in (('setup', setup), ('cleanup', cleanup)):
        if function is not None and not callable(function):
            raise TypeError('%s is a %s; it must be a function' % (name, type(function).__name__))
    # One pickle for all three, so that they share one set of global variables on the node.
    return pack_by_value((computation, setup, cleanup, {obj.__name__: obj for obj in objects}), shipped)


def pack_by_value(value: Any, shipped: Tuple[str, ...] = ()) -> bytes:
    """`by_value`, in one piece."""
    pieces: List[bytes] = []
    by_value(value, types.SimpleNamespace(write=lambda piece: pieces.append(bytes(piece))), 5, None, shipped)
    return b''.join(pieces)


def _program_path(program: str) -> str:
    path = program if os.path.exists(program) or os.sep in program else shutil.which(program) or program
    if not os.path.isfile(path):
        raise FileNotFoundError('computation: there is no program %s (in %s)' % (program, os.getcwd()))
    with open(path, 'rb') as file:
        start = file.read(2)
    if start != b'#!' and not os.access(path, os.X_OK):
        raise ValueError('computation: %s is not executable and does not begin with #!' % program)
    return path


def _module_files(module: types.ModuleType, paths: Dict[str, str]) -> List[str]:
    """A module's file, or a package's files below the name that it is imported by. Returns the modules' names."""
    origin = getattr(module, '__file__', None)
    if not origin or not origin.endswith('.py'):
        raise TypeError('depends: module %s has no Python file that could be sent' % module.__name__)
    parts = module.__name__.split('.')
    if os.path.basename(origin) != '__init__.py':
        paths['/'.join(parts) + '.py'] = origin
        return [module.__name__]
    root = os.path.dirname(origin)
    for directory, _, names in os.walk(root):
        for name in names:
            if not name.endswith(('.pyc', '.pyo')):
                path = os.path.join(directory, name)
                paths['/'.join(parts + os.path.relpath(path, root).split(os.sep))] = path
    return [name for name in sys.modules if name == module.__name__ or name.startswith(module.__name__ + '.')]


def _add_path(path: str, paths: Dict[str, str]) -> None:
    if os.path.isfile(path):
        paths[os.path.basename(path)] = path
    elif os.path.isdir(path):
        root = os.path.abspath(path)
        for directory, _, names in os.walk(root):
            for name in names:
                full = os.path.join(directory, name)
                paths['/'.join([os.path.basename(root)] + os.path.relpath(full, root).split(os.sep))] = full
    else:
        raise FileNotFoundError('depends: there is no file %s (in %s)' % (path, os.getcwd()))


@functools.lru_cache(maxsize=None)
def _support_files() -> Dict[str, bytes]:
    """cloudpickle itself, for nodes that have none or another version."""
    root = os.path.dirname(cloudpickle.__file__)
    found = {}
    for name in os.listdir(root):
        if name.endswith('.py'):
            with open(os.path.join(root, name), 'rb') as file:
                found['cloudpickle/' + name] = file.read()
    return found


# ---------------------------------------------------------------------------------------------------------
# Which nodes: what the user wrote, parsed
# ---------------------------------------------------------------------------------------------------------

class NodeAddress(NamedTuple):
    """One element of `nodes`."""
    host: str
    port: int
    cpus: int = 0   # > 0: at most; < 0: leave so many free


LOCAL = 'local'


class NodeAllocate:
    """An element of `nodes` with a say of its own: subclass it and override `allocate`.

    host, port - as in `nodes`; cpus - as there; depends - more files, modules, functions and classes for that node;
    setup_args - arguments of `setup` and `cleanup` there.
    """

    def __init__(self, host: str, port: Optional[int] = None, cpus: int = 0, depends: Sequence[Any] = (),
                 setup_args: Sequence[Any] = ()) -> None:
        self.host, self.port, self.cpus, self.depends, self.setup_args = host, port, cpus, depends, setup_args

    def allocate(self, cluster: 'JobCluster', ip_addr: str, name: str, cpus: int, avail_info: Any = None, platform: str = '') -> int:
        """How many jobs to run there at once: 0 refuses the node, more than `cpus`, the number it offers, is allowed. May
        set self.depends and self.setup_args. Called once a connection of the node, in a thread of the cluster's."""
        return cpus


class Allocation(NamedTuple):
    """What a NodeAllocate has said, packed."""
    cpus: int
    setup_args: bytes
    files: List[Tuple[str, int, bytes, int]]
    paths: Dict[str, str]


def ask_allocator(allocator: NodeAllocate, cluster: 'JobCluster', peer: 'Peer') -> Allocation:
    """Runs the user's code; raises what that raises, TypeError for what is no number."""
    available = DispyNodeAvailInfo(*map(peer.facts.get('available', {}).get, DispyNodeAvailInfo._fields))
    cpus = allocator.allocate(cluster, peer.ip_addr, peer.name, peer.cpus, avail_info=available, platform=peer.facts.get('platform', ''))
    if isinstance(cpus, bool) or not isinstance(cpus, int):
        raise TypeError('allocate() returned %.80r, which is no number of CPUs' % (cpus,))
    paths: Dict[str, str] = {}
    objects, _ = _sort_depends(allocator.depends, paths)
    blob = pack_by_value((tuple(allocator.setup_args), {obj.__name__: obj for obj in objects}))
    return Allocation(cpus, blob, _file_rows(paths), paths)


def parse_nodes(nodes: Any, port: int) -> Union[None, str, List[NodeAddress]]:
    """None, 'local' or the addresses. Raises TypeError or ValueError naming the element."""
    if nodes is None or nodes == LOCAL:
        return nodes  # type: ignore[no-any-return]
    if isinstance(nodes, (str, tuple, dict, DispyNode, NodeAllocate)):
        nodes = [nodes]
    found = [_parse_node(node, port) for node in nodes]
    if not found:
        raise ValueError("nodes is an empty list: give host names, 'local', or None for any node")
    return found


def _parse_node(node: Any, port: int) -> NodeAddress:
    if isinstance(node, DispyNode):
        return NodeAddress(node.ip_addr, node.port)
    if isinstance(node, NodeAllocate):
        parts: Sequence[Any] = (node.host, node.port, node.cpus)
    elif isinstance(node, str):
        parts = (node,)
    elif isinstance(node, dict) and 'host' in node and not set(node) - {'host', 'port', 'cpus'}:
        parts = (node['host'], node.get('port'), node.get('cpus'))
    elif isinstance(node, (tuple, list)) and 1 <= len(node) <= 3:
        parts = node
    else:
        raise TypeError("nodes: %.80r is no host name, ('host', port), ('host', port, cpus) or {'host':, 'port':, 'cpus':}" % (node,))
    host, its_port, cpus = (*parts, None, None)[:3]
    if not isinstance(host, str) or not host or any(c.isspace() for c in host):
        raise ValueError('nodes: %.80r is no host' % (host,))
    if '*' in host:
        raise ValueError('nodes: %r: wildcards need discovery, which this version does not have; name the hosts' % host)
    its_port = port if its_port is None else its_port
    if not isinstance(its_port, int) or not 1 <= its_port <= 65535:
        raise ValueError('nodes: port %.40r of %s is not between 1 and 65535' % (its_port, host))
    if cpus is not None and not isinstance(cpus, int):
        raise TypeError('nodes: cpus %.40r of %s is no number' % (cpus, host))
    return NodeAddress(host, its_port, cpus or 0)


# ---------------------------------------------------------------------------------------------------------
# Driver: one thread that owns links and Schedule. Its helpers: dial threads, openers, callback threads.
# ---------------------------------------------------------------------------------------------------------

class Access(NamedTuple):
    """How a driver speaks to nodes; clusters with the same share a driver."""
    secret: bytes
    certfile: Optional[str]
    keyfile: Optional[str]
    cafile: Optional[str]
    pulse: float
    redial: float


class Pool:
    """A few daemon threads for what may block. Unlike concurrent.futures' they do not hold up the interpreter's exit."""

    def __init__(self, name: str, most: int) -> None:
        self._name, self._most, self._count = name, most, 0
        self._tasks: 'queue.SimpleQueue[Optional[Tuple[Callable[..., Any], tuple]]]' = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)

    def run(self, call: Callable[..., Any], *args: Any) -> None:
        """Call it in one of the threads. One thread only (the driver's)."""
        if not self._idle.acquire(blocking=False) and self._count < self._most:
            self._count += 1
            threading.Thread(target=self._work, name='%s-%d' % (self._name, self._count), daemon=True).start()
        self._tasks.put((call, args))

    def _work(self) -> None:
        while True:
            task = self._tasks.get()
            if task is None:
                return
            try:
                task[0](*task[1])
            except BaseException:  # the user's callback, sys.exit in it too; the next one is served all the same
                logger.exception('%s raised', getattr(task[0], '__name__', task[0]))
            del task
            self._idle.release()

    def close(self) -> None:
        """Let threads end when they have done what is queued."""
        for _ in range(self._count):
            self._tasks.put(None)


class Dialled(NamedTuple):
    """Posted by a dial thread."""
    peer: 'Peer'
    sock: Any
    session: Session
    address: str


class DialFailed(NamedTuple):
    """Posted by a dial thread."""
    peer: 'Peer'
    text: str
    unreachable: bool


class Asked(NamedTuple):
    """Posted by `Driver.ask`: call this in the driver's thread."""
    call: Callable[[], Any]
    future: 'concurrent.futures.Future[Any]'


class Told(NamedTuple):
    """Posted for cluster_status: a node or a job has changed."""
    cluster: 'JobCluster'
    status: int
    peer: 'Optional[Peer]'
    job: Optional[DispyJob]


class CallBack(NamedTuple):
    """Posted when a job with a callback has ended."""
    cluster: 'JobCluster'
    job: DispyJob


class Peer:
    """A node as the driver sees it. Driver thread only."""

    def __init__(self, address: NodeAddress, embedded: bool = False) -> None:
        self.address, self.embedded = address, embedded
        self.state = NodeState.FOUND
        self.link: Optional[Link] = None
        self.name, self.ip_addr, self.facts, self.cpus = '', address.host, {}, 0  # type: Tuple[str, str, dict, int]
        self.reason = 'not reached yet'
        self.redial_at: Optional[float] = 0.0
        self.redial_wait = REDIAL_FIRST
        self.retry_at: Optional[float] = None
        self.acks: Dict[str, List[int]] = {}       # computation -> serials to be acknowledged
        self.retry_wait = RETRY_FIRST
        self.told: Set[Tuple[str, str]] = set()    # (computation, reason) that was logged
        self.refusals: Dict[str, str] = {}         # computation -> reason
        self.allocations: Dict[str, Allocation] = {}   # computation -> what the user's NodeAllocate said
        self.setting_up: Set[str] = set()          # computations whose Compute was sent
        self.ready: Set[str] = set()
        self.process: Optional['subprocess.Popen[bytes]'] = None   # of an embedded node, and its directory
        self.directory = ''
        self.dialling: Any = None                  # the socket of a dial thread, to be shut down
        self.dial_thread: Optional[threading.Thread] = None

    def move(self, event: str) -> None:
        """The one place where a node's state changes."""
        self.state = NODE_TABLE[self.state, event]

    def end_process(self) -> None:
        """End the embedded node, if this is one, and remove what it may have left."""
        if self.process is not None:
            _end_embedded(self.process)
            self.process = None
        if self.directory:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory = ''

    def is_meant(self, node: Any) -> bool:
        """Whether a user's word for a node means this one."""
        if isinstance(node, DispyNode):
            node = (node.ip_addr, node.port)
        if isinstance(node, (tuple, list)):
            return len(node) == 2 and node[0] in (self.address.host, self.ip_addr) and node[1] == self.address.port
        return bool(node) and node in (self.name, self.ip_addr, self.address.host)

    def __str__(self) -> str:
        host, port = self.address.host, self.address.port
        return '%s (%s:%d)' % (self.name, host, port) if self.name and self.name != host else '%s:%d' % (host, port)


class Driver(Loop):
    """See the module's docstring. Made by `Driver.acquire`, ended when its last cluster is closed."""

    def __init__(self, access: Access) -> None:
        self._psk = derive_key(access.secret)
        self._tls = tls_context(False, access.certfile, access.keyfile, access.cafile) if access.certfile else None
        super().__init__()
        self.access = access
        self.schedule = Schedule()
        self.users = 0                      # clusters
        self.broken = ''                    # why the driver's thread has ended before its time
        self._clusters: Dict[str, 'JobCluster'] = {}
        self._peers: Dict[Any, Peer] = {}
        self._by_link: Dict[int, Peer] = {}
        self._dials: Set[Peer] = set()               # with a dial thread at work
        self._users: Dict[str, Set[Any]] = {}        # computation -> keys of peers it may use
        self._submitted: List[DispyJob] = []
        self._openers = Pool('dispy-opener', 2)
        self.callbacks = Pool('dispy-callback', CALLBACK_THREADS)
        self._tellers = Pool('dispy-status', 1)      # one, so that changes are told in their order
        self._warn_at: Dict[str, float] = {}
        self._probes: Dict[str, float] = {}          # computation -> when to start an embedded node
        self._incoming: Dict[Tuple[int, str, int], IncomingFile] = {}   # (link, computation, serial) -> file from a job
        self._uploads: Dict[int, Deque[Iterator[File]]] = {}   # link -> files on their way
        self._chores_at = 0.0
        self._thread = threading.Thread(target=self._main, name='dispy-driver', daemon=True)
        self._acts: Dict[type, Callable[[Any], None]] = {
            SendJobs: self._send_jobs, SendCancel: self._send_to, SendRecall: self._send_to, SendAck: self._send_ack,
            JobsEnded: self._jobs_ended, JobEnded: self._job_ended, JobWaits: self._job_waits,
            JobParked: self._job_parked,
        }
        self._messages: Dict[type, Callable[[Peer, Any], None]] = {
            Welcome: self._on_welcome, Refused: self._on_refused, Need: self._on_need, Ready: self._on_ready,
            Results: self._on_results, Returned: self._on_returned, Offer: self._on_offer,
            FileBack: self._on_file_back, Output: self._on_output,
        }
        self._events: Dict[type, Callable[[Any], None]] = {
            DispyJob: self._submitted.append, Dialled: self._dialled, DialFailed: self._dial_failed, Asked: self._asked,
            Told: self._told, CallBack: lambda event: self.callbacks.run(event.cluster._call_back, event.job)}

    # -- life; user threads -------------------------------------------------------------------------------

    @staticmethod
    def acquire(access: Access) -> 'Driver':
        """The running driver for this access, made if need be. Any thread. Raises SecretError."""
        with _lock:
            driver = _drivers.get(access)
            if driver is None or driver.broken or driver._ended:
                driver = Driver(access)
                driver._thread.start()
                _drivers[access] = driver
            driver.users += 1
            return driver

    def release(self) -> None:
        """A cluster is done with it; the last one ends it. Any thread but the driver's."""
        with _lock:
            self.users -= 1
            if self.users:
                return
            if _drivers.get(self.access) is self:
                del _drivers[self.access]
        with contextlib.suppress(RuntimeError, TimeoutError):   # it has broken before
            self.ask(self._leave)
        self._thread.join(CALL_TIME)

    def ask(self, call: Callable[[], Any]) -> Any:
        """Call it in the driver's thread and return what it returns. Any thread but the driver's."""
        future: 'concurrent.futures.Future[Any]' = concurrent.futures.Future()
        if self.broken:
            raise RuntimeError(self.broken)
        self.post(Asked(call, future))
        if self.broken:   # set before the inbox is emptied for the last time
            raise RuntimeError(self.broken)
        return future.result(CALL_TIME)

    def _main(self) -> None:
        try:
            self.run()
        except BaseException as exc:  # our own fault; nobody may wait for ever because of it
            self.broken = "dispy's driver thread has failed: %s" % describe_exception(exc).strip()
            logger.exception('the driver thread has failed; all jobs end as Abandoned')
            for cluster in list(self._clusters.values()):
                cluster._driver_broke(self.broken)
        finally:
            self.broken = self.broken or 'the cluster was closed'
            self._hang_up()
            self.close()

    def _leave(self) -> None:
        for peer in self._peers.values():
            if peer.link is not None:
                self.part(peer.link, 'the program has closed its clusters')
        self.stop()

    def _hang_up(self) -> None:
        for pool in (self._openers, self.callbacks, self._tellers):
            pool.close()
        for peer in self._dials:   # also those that no cluster uses any more
            if peer.dialling is not None:
                with contextlib.suppress(OSError):   # not connected yet, or not any more
                    peer.dialling.shutdown(socket.SHUT_RDWR)
        for peer in [*self._dials, *self._peers.values()]:
            if peer.dial_thread is not None:
                peer.dial_thread.join(HANDSHAKE_TIME)
            peer.end_process()
        for event in list(self._inbox):
            if isinstance(event, Asked):
                event.future.set_exception(RuntimeError(self.broken))

    def after_fork(self) -> None:
        """In a forked child the driver's thread does not exist. Let go of its sockets without a word, so that
        nodes do not take the child for the client."""
        self.broken = 'this process was forked from the one that made the cluster: make a new one here'
        handles = [link.sock for link in self.links.values()]
        self._selector.close()
        for sock in (*handles, self._waker, self._wakened):
            sock.close()
        for peer in self._peers.values():
            if peer.process is not None and peer.process.stdin is not None:
                os.close(peer.process.stdin.fileno())

    # -- clusters -----------------------------------------------------------------------------------------

    def open(self, cluster: 'JobCluster', addresses: Union[None, str, List[NodeAddress]], probe: bool) -> None:
        """Begin to use nodes for a cluster."""
        self._clusters[cluster._comp] = cluster
        self._act(self.schedule.handle(Opened(cluster._comp, cluster._comp, cluster._reentrant), self.now))
        self._users[cluster._comp] = set()
        self._warn_at[cluster._comp] = self.now + WARN_AFTER
        if isinstance(addresses, list):
            for address in addresses:
                self._use(cluster._comp, address, Peer(address))
        elif addresses is None and probe:
            address = NodeAddress('127.0.0.1', cluster._port)
            self._use(cluster._comp, address, Peer(address))
            self._probes[cluster._comp] = self.now + PROBE_TIME
        else:
            self._use_embedded(cluster._comp)

    def forget(self, comp: str) -> None:
        """A cluster is closed: end its jobs, tell its nodes."""
        if self._clusters.get(comp) is None:
            return
        self._take_submitted()
        self._act(self.schedule.handle(Closed(comp), self.now))
        del self._clusters[comp], self._warn_at[comp]
        self._probes.pop(comp, None)
        self._abort_incoming(lambda number, name: name == comp)
        for key in self._users.pop(comp):
            peer = self._peers[key]
            if comp in peer.setting_up and peer.link is not None:
                self.say(peer.link, Done(comp))
            for known in (peer.setting_up, peer.ready):
                known.discard(comp)
            for table in (peer.refusals, peer.allocations, peer.acks):
                table.pop(comp, None)  # type: ignore[attr-defined]
            if not any(key in keys for keys in self._users.values()) and not peer.embedded:
                self._drop_peer(key, peer)

    def _drop_peer(self, key: Any, peer: Peer) -> None:
        """No cluster uses this node any more; the next client may have it."""
        del self._peers[key]
        peer.move('close')
        if peer.link is not None:
            self.part(peer.link, 'no cluster uses this node any more')
            self._unlink(peer, peer.link)

    def _unlink(self, peer: Peer, link: Link) -> None:
        """A link is over: forget all that went along it."""
        del self._by_link[link.number]
        peer.link = None
        for known in (peer.ready, peer.setting_up, peer.allocations, peer.acks):
            known.clear()
        self._uploads.pop(link.number, None)
        self._abort_incoming(lambda number, comp: number == link.number)

    def _abort_incoming(self, over: Callable[[int, str], bool]) -> None:
        """Remove what has come of files whose link or computation is over."""
        for key in [key for key in self._incoming if over(key[0], key[1])]:
            self._incoming.pop(key).abort()

    def cancel(self, job: DispyJob) -> None:
        """Begin to end a job."""
        self._take_submitted()
        self._act(self.schedule.handle(CancelAsked(job), self.now))

    def cancel_waiting(self, comp: str) -> None:
        """End all jobs of a cluster that wait here."""
        self._take_submitted()
        known = self.schedule.comps.get(comp)
        for work in known.waiting() if known is not None else []:
            self._act(self.schedule.handle(CancelAsked(work), self.now))

    def nodes_of(self, comp: str) -> List[Tuple[Peer, str, str, int]]:
        """Peers of a cluster: (peer, state, reason, jobs there)."""
        found = []
        for key in self._users.get(comp, ()):
            peer, node = self._peers[key], self.schedule.nodes.get(key)
            busy = len(node.flight.get(comp, ())) if node is not None else 0
            if comp in peer.ready:
                state, reason = 'ready', ''
            elif comp in peer.refusals:
                state, reason = 'refused', peer.refusals[comp]
            elif comp in peer.setting_up:
                state, reason = 'setting up', ''
            else:
                state, reason = peer.state.value, peer.reason
            found.append((peer, state, reason, busy))
        return found

    # -- loop ---------------------------------------------------------------------------------------------

    def on_event(self, event: Any) -> None:
        """Jobs, answers of dial threads, questions of user threads."""
        self._events[type(event)](event)

    def _asked(self, event: Asked) -> None:
        try:
            answer = event.call()
        except Exception as exc:  # the asker gets it
            event.future.set_exception(exc)
        else:
            event.future.set_result(answer)

    def _told(self, event: Told) -> None:
        if event.cluster._cluster_status is not None:
            node = None
            if event.peer is not None:
                state = 'ready' if event.status == DispyNode.Initialized else 'closed'
                node = event.cluster._describe(event.peer, state, event.peer.reason, 0)
            self._tellers.run(event.cluster._cluster_status, event.status, node, event.job)

    def _tell_all(self, status: int, peer: Peer, comps: Any) -> None:
        for comp in comps:
            if comp in self._clusters:
                self._told(Told(self._clusters[comp], status, peer, None))

    def _take_submitted(self) -> None:
        if self._submitted:
            works = list(self._submitted)
            self._submitted.clear()
            self._act(self.schedule.handle(Submitted(works), self.now))

    def end_of_turn(self) -> None:
        """New jobs, jobs to nodes, and now and then what is due."""
        self._take_submitted()
        self._act(self.schedule.flush(self.now))
        if self._uploads:
            self._upload()
        if self.now >= self._chores_at:
            self._chores()

    def next_timer(self) -> Optional[float]:
        """When chores are due, at once while files wait for room in a link."""
        if self._uploads and any(not link.wants_write for link in map(self.links.get, self._uploads) if link):
            return 0.0
        return self._chores_at

    def _act(self, actions: List[Any]) -> None:
        for action in actions:
            self._acts[type(action)](action)

    def _chores(self) -> None:
        """Dial, give up probing, warn; and when to do so next."""
        due = [self.now + 60.0]
        for peer in self._peers.values():
            if peer.redial_at is not None and peer.redial_at <= self.now and peer.state in _MAY_DIAL:
                self._dial(peer)
            if peer.redial_at is not None and peer.state in _MAY_DIAL:
                due.append(peer.redial_at)
        for comp, when in list(self._probes.items()):
            if self.now >= when:
                self._use_embedded(comp)
            else:
                due.append(when)
        for comp, when in list(self._warn_at.items()):
            if self.now >= when:
                self._warn(comp)
            due.append(self._warn_at[comp])
        for peer in self._peers.values():
            if peer.acks:
                self._acknowledge(peer)
            if peer.retry_at is not None:
                if self.now >= peer.retry_at:
                    self._retry(peer)
                else:
                    due.append(peer.retry_at)
        self._chores_at = min(due)

    def _soon(self) -> None:
        self._chores_at = self.now

    def _warn(self, comp: str) -> None:
        """Nobody waits in silence."""
        self._warn_at[comp] = self.now + WARN_EVERY
        if not any(state == 'ready' for _, state, _, _ in self.nodes_of(comp)):
            logger.warning('%s waits for a node. %s', self._clusters[comp].name, self.complaint(comp))

    def complaint(self, comp: str) -> str:
        """What was tried, what came of it, what to do."""
        lines = ['%s: %s%s' % (peer, state, ': ' + reason.strip().splitlines()[-1] if reason else '')
                 for peer, state, reason, _ in self.nodes_of(comp)]
        return 'Tried: %s. Start `python dispynode.py` on a host, with the same secret, and name it in nodes=' % '; '.join(lines)

    # -- reaching nodes -----------------------------------------------------------------------------------

    def _use(self, comp: str, key: Any, peer: Peer) -> None:
        peer = self._peers.setdefault(key, peer)
        self._users[comp].add(key)
        if peer.name:
            self._set_up(peer, comp)
        self._soon()

    def _use_embedded(self, comp: str) -> None:
        """A node of this program's own, for all its clusters of this driver."""
        if self._probes.pop(comp, None) is not None:
            for key in self._users[comp]:
                if comp in self._peers[key].setting_up:
                    return   # a dispynode has answered meanwhile
            logger.info('no dispynode answers on this machine: one is started for this program (nodes=%r says so at once)', LOCAL)
        self._use(comp, LOCAL, Peer(NodeAddress('127.0.0.1', 0), embedded=True))

    def _dial(self, peer: Peer) -> None:
        peer.move('dial')
        peer.redial_at = None
        self._dials.add(peer)
        peer.dial_thread = threading.Thread(target=self._dial_thread, args=(peer,), name='dispy-dial', daemon=True)
        try:
            peer.dial_thread.start()
        except RuntimeError as exc:   # no more threads, or the interpreter is on its way out
            self.post(DialFailed(peer, 'no thread could be started: %s' % exc, False))

    def _dial_thread(self, peer: Peer) -> None:
        """Connect, TLS, handshake. A thread of its own."""
        sock = None
        try:
            psk, (host, port, _) = self._psk, peer.address
            if peer.embedded:
                peer.end_process()
                peer.process, port, psk = _start_embedded(peer)
            sock = _connect(peer, host, port)
            deadline = time.monotonic() + HANDSHAKE_TIME
            binding = NO_TLS
            if self._tls is not None and not peer.embedded:
                sock = peer.dialling = self._wrap(sock)
                binding = hashlib.sha256(sock.getpeercert(True)).digest()
            session = handshake_dial(sock, psk, Role.CLIENT, Role.NODE, _instance, binding, deadline)
            address = sock.getpeername()[0]
        except (HandshakeError, OSError, ValueError, RuntimeError) as exc:   # Runtime: no process at interpreter's exit
            if sock is not None:
                sock.close()
            self.post(DialFailed(peer, _dial_text(exc), isinstance(exc, (ConnectionError, socket.gaierror))))
        else:
            self.post(Dialled(peer, sock, session, address))

    def _wrap(self, sock: socket.socket) -> Any:
        sock.settimeout(HANDSHAKE_TIME)
        try:
            return self._tls.wrap_socket(sock)  # type: ignore[union-attr]
        except OSError as exc:   # ssl.SSLError is one
            raise HandshakeError('TLS failed: %s; both sides need certfile, or neither' % exc) from exc

    def _dialled(self, event: Dialled) -> None:
        peer = event.peer
        self._dials.discard(peer)
        peer.dialling = peer.dial_thread = None
        if peer.state is not NodeState.DIALLING:
            event.sock.close()
            return
        peer.move('connect')
        peer.redial_wait = REDIAL_FIRST
        peer.ip_addr, peer.reason = event.address, ''
        peer.link = Link(event.sock, event.session, event.address, self.now, self.access.pulse)
        self.attach(peer.link)
        self._by_link[peer.link.number] = peer
        self.say(peer.link, Introduce('%s@%s PID %d' % (_user_name(), socket.gethostname(), os.getpid()), self.access.pulse))

    def _dial_failed(self, event: DialFailed) -> None:
        peer = event.peer
        self._dials.discard(peer)
        peer.dialling = peer.dial_thread = None
        if peer.state is not NodeState.DIALLING:
            return
        peer.move('fail')
        self._reached_not(peer, event.text)
        for comp in [comp for comp in self._probes if peer is self._peers.get(NodeAddress('127.0.0.1', self._clusters[comp]._port))]:
            self._use_embedded(comp)

    def _reached_not(self, peer: Peer, text: str) -> None:
        """Say why, once for each reason, and try again later."""
        peer.reason = text
        if ('', text) not in peer.told and not self._only_probed(peer):
            peer.told.add(('', text))
            logger.warning('node %s cannot be used: %s', peer, text)
        peer.redial_at = self.now + peer.redial_wait
        peer.redial_wait = min(peer.redial_wait * 2, self.access.redial)
        self._soon()

    def _only_probed(self, peer: Peer) -> bool:
        return any(self._peers.get(NodeAddress('127.0.0.1', self._clusters[comp]._port)) is peer for comp in self._probes)

    # -- links --------------------------------------------------------------------------------------------

    def on_channel(self, channel: Link) -> None:
        """A link has something."""
        peer = self._by_link[channel.number]
        for message in channel.messages(self.now):
            kind = type(message)
            if kind is Pulse:
                continue
            if kind is Bye:   # what it has not answered for was never started
                for comp in peer.ready:
                    self._act(self.schedule.handle(NodeReady(self._key_of(peer), comp, 0, []), self.now))
                raise LinkBroken(message.text[:200])
            if kind not in self._messages:
                raise PeerError('%s may not come here' % kind.__name__)
            self._messages[kind](peer, message)

    def on_broken(self, channel: Link, text: str) -> None:
        """A link came to its end: the node is lost until it is reached again."""
        peer = self._by_link[channel.number]
        peer.move('fail')
        self._tell_all(DispyNode.Closed, peer, peer.ready)
        self._unlink(peer, channel)
        key = self._key_of(peer)
        self._act(self.schedule.handle(NodeLost(key, str(peer), text), self.now))
        peer.told.clear()
        self._reached_not(peer, 'the connection ended: %s' % text)
        for comp in self._users:
            if key in self._users[comp]:
                self._warn_at[comp] = min(self._warn_at[comp], self.now + WARN_AFTER)

    def _on_welcome(self, peer: Peer, message: Welcome) -> None:
        peer.name, peer.facts = message.name, message.facts
        self._limit(peer, message.cpus)
        key = self._key_of(peer)
        for comp, keys in self._users.items():
            if key in keys:
                self._set_up(peer, comp)

    def _on_offer(self, peer: Peer, message: Offer) -> None:
        self._limit(peer, message.cpus)
        self._act(self.schedule.handle(NodeOffers(self._key_of(peer), peer.cpus), self.now))

    @staticmethod
    def _limit(peer: Peer, offered: int) -> None:
        limit = peer.address.cpus
        peer.cpus = min(offered, limit) if limit > 0 else max(0, offered + limit)

    def _set_up(self, peer: Peer, comp: str) -> None:
        """Offer a computation to a node."""
        cluster = self._clusters[comp]
        if peer.link is None or comp in peer.setting_up:
            return
        allocator, allocation = cluster._allocators.get(peer.address), peer.allocations.get(comp)
        if allocator is not None and allocation is None:
            self._openers.run(self._allocate, allocator, cluster, peer, peer.link)
            return
        spec, there = cluster._cargo.spec, peer.facts.get('python', ())[:2]
        if spec['kind'] == 'function' and tuple(there) != tuple(spec['python'][:2]):
            self._refusal(peer, comp, 'it runs Python %s, this program %s: functions do not travel between versions'
                          % ('.'.join(map(str, there)), '.'.join(map(str, spec['python'][:2]))))
            return
        if peer.cpus < 1 or (allocation is not None and allocation.cpus < 1):
            self._refusal(peer, comp, 'it has no CPU to use: %d offered, limit %d' % (peer.cpus, peer.address.cpus)
                          if allocation is None else 'allocate() returned %d' % allocation.cpus)
            return
        if allocation is not None:
            spec = dict(spec, cpus=allocation.cpus, setup_args=allocation.setup_args, files=spec['files'] + allocation.files)
        if spec['kind'] == 'function' and peer.facts.get('cloudpickle') != cloudpickle.__version__:
            spec = dict(spec, support=_support_files())
        peer.refusals.pop(comp, None)
        peer.setting_up.add(comp)
        self._probes.pop(comp, None)
        self.say(peer.link, Compute(comp, dict(spec, code=beside(spec['code']))))

    def _allocate(self, allocator: NodeAllocate, cluster: 'JobCluster', peer: Peer, link: Link) -> None:
        """Ask the user's allocator. An opener."""
        try:
            allocation, error = ask_allocator(allocator, cluster, peer), ''
        except Exception as exc:  # the user's allocate()
            allocation, error = Allocation(0, b'', [], {}), describe_exception(exc, 1)
        self.post(Asked(functools.partial(self._allocated, cluster._comp, peer, link, allocation, error), concurrent.futures.Future()))

    def _allocated(self, comp: str, peer: Peer, link: Link, allocation: Allocation, error: str) -> None:
        if comp not in self._clusters or peer.link is not link:
            return   # closed or lost meanwhile
        if error:
            self._refusal(peer, comp, 'allocate() failed: ' + error)
        else:
            peer.allocations[comp] = allocation
            self._set_up(peer, comp)

    def _refusal(self, peer: Peer, comp: str, text: str) -> None:
        peer.refusals[comp] = text
        peer.setting_up.discard(comp)
        if (comp, text) not in peer.told:
            peer.told.add((comp, text))
            logger.warning('node %s does not take %s: %s', peer, self._clusters[comp].name, text)

    def _on_refused(self, peer: Peer, message: Refused) -> None:
        if message.comp not in self._clusters:
            return
        was_ready = message.comp in peer.ready   # its runner has died later: a new one may live
        if was_ready:
            peer.ready.discard(message.comp)
            self._tell_all(DispyNode.Closed, peer, [message.comp])
            key = self._key_of(peer)
            self._act(self.schedule.handle(NodeLeft(key, message.comp, str(peer), message.text), self.now))
        self._refusal(peer, message.comp, message.text)
        if was_ready or message.code in ('busy', 'closing', 'stopping'):
            peer.retry_at = self.now + peer.retry_wait
            peer.retry_wait = min(peer.retry_wait * 2, 2.0)
            self._soon()

    def _retry(self, peer: Peer) -> None:
        """Offer again what the node was too busy for."""
        peer.retry_at = None
        for comp in list(peer.refusals):
            if comp in self._clusters:
                self._set_up(peer, comp)

    def _on_need(self, peer: Peer, message: Need) -> None:
        cluster = self._clusters.get(message.comp)
        if cluster is None or peer.link is None:
            return
        allocation = peer.allocations.get(message.comp)
        paths = dict(cluster._cargo.paths, **allocation.paths) if allocation is not None else cluster._cargo.paths
        for name in message.names:
            if name not in paths:
                raise PeerError('it asked for a file that was not offered: %.60r' % (name,))
        waiting = self._uploads.setdefault(peer.link.number, collections.deque())
        waiting.extend(_file_pieces(cluster._comp, name, paths[name]) for name in message.names)

    def _upload(self) -> None:
        """A few pieces of files into links that have room."""
        for number, files in list(self._uploads.items()):
            link = self.links.get(number)
            while files and link is not None and link.queued < 4 * FILE_PIECE:
                try:
                    self.say(link, next(files[0]))
                except StopIteration:
                    files.popleft()
                except OSError as exc:   # the file has gone or cannot be read any more
                    self._break(link, 'a file of the computation cannot be read: %s' % exc)
                    break
            if not files or link is None:
                self._uploads.pop(number, None)

    def _on_ready(self, peer: Peer, message: Ready) -> None:
        if message.comp in self._clusters and message.comp in peer.setting_up:
            peer.ready.add(message.comp)
            peer.retry_wait = RETRY_FIRST
            cpus = peer.allocations[message.comp].cpus if message.comp in peer.allocations else peer.cpus
            self._clusters[message.comp]._node_came()
            self._tell_all(DispyNode.Initialized, peer, [message.comp])
            self._act(self.schedule.handle(NodeReady(self._key_of(peer), message.comp, cpus, message.held, str(peer)), self.now))

    def _on_results(self, peer: Peer, message: Results) -> None:
        self._act(self.schedule.handle(NodeResults(self._key_of(peer), message.comp, message.rows), self.now))

    def _on_returned(self, peer: Peer, message: Returned) -> None:
        self._act(self.schedule.handle(NodeReturned(self._key_of(peer), message.comp, message.serials), self.now))

    def _job_of(self, peer: Peer, message: Any) -> Any:
        """The job that a message of a node speaks of, while it is there."""
        node = self.schedule.nodes.get(self._key_of(peer))
        return node.flight.get(message.comp, {}).get(message.serial) if node is not None else None

    def _on_file_back(self, peer: Peer, message: FileBack) -> None:
        """A piece of a file that a job sends. After a failure the rest of the file is passed over."""
        cluster = self._clusters.get(message.comp)
        if cluster is None or peer.link is None or self._job_of(peer, message) is None:
            return
        name, size, digest, mode = message.row
        key, error, whole = (peer.link.number, message.comp, message.serial), '', False
        try:
            if message.offset == 0:
                self._incoming[key] = IncomingFile(cluster._directory, name, size, digest, mode)
            if key in self._incoming:
                whole = self._incoming[key].piece(message.offset, message.data)
        except (OSError, ValueError) as exc:
            error = 'on the client: %s' % exc
        if whole or error:
            incoming = self._incoming.pop(key, None)
            if incoming is not None and error:
                incoming.abort()
            self.say(peer.link, FileKept(message.comp, message.serial, error))

    def _on_output(self, peer: Peer, message: Output) -> None:
        """What a running job prints or logs."""
        cluster, job = self._clusters.get(message.comp), self._job_of(peer, message)
        if cluster is None or job is None:
            return
        if message.stream == 0:
            level, name, text = open_envelope(message.data)
            logger.log(level, 'job %s: %s: %s', job.id, name, text, extra={'job_id': job.id, 'job_logger': name})
        elif cluster._on_output is not None:
            cluster._shown.setdefault(job, [0, 0])[message.stream - 1] = message.offset + len(message.data)
            self._show_output(cluster, job, message.stream, message.data)

    def _show_output(self, cluster: 'JobCluster', job: DispyJob, stream: int, data: Any) -> None:
        if len(data) and cluster._on_output is not None:
            text = bytes(data) if cluster._cargo.is_program else str(data, 'utf-8', 'replace')
            self._tellers.run(cluster._on_output, job, 'stdout' if stream == 1 else 'stderr', text)

    def _show_rest(self, cluster: 'JobCluster', job: Any, row: tuple) -> None:
        """What of a job's output came with its result and has not been shown."""
        for stream, at in enumerate(cluster._shown.pop(job, (0, 0)), 1):
            self._show_output(cluster, job, stream, row[4 + stream][at:])

    # -- actions ------------------------------------------------------------------------------------------

    def _send_jobs(self, action: SendJobs) -> None:
        peer = self._peers[action.node]
        assert peer.link is not None   # ours: the schedule knows nodes with a link only
        now, rows, size = time.time(), [], 0
        for work in action.works:
            work.status, work.ip_addr, work.start_time = DispyJob.Running, peer.ip_addr, now
            options = work._options and {name: work._options[name] for name in _SENT if name in work._options}
            rows.append((work._serial, beside(work._payload), options or None))
            size += size_of(work._payload)
            if size >= FRAME_FILL:
                self.say(peer.link, Jobs(action.comp, rows))
                rows, size = [], 0
        if rows:
            self.say(peer.link, Jobs(action.comp, rows))
        cluster = self._clusters[action.comp]
        if cluster._cluster_status is not None:
            for work in action.works:
                self._told(Told(cluster, DispyJob.Running, peer, work))

    def _send_to(self, action: Any) -> None:
        peer = self._peers.get(action.node)
        if peer is not None and peer.link is not None:
            self.say(peer.link, _MESSAGE_OF[type(action)](action.comp, action[2]))

    def _send_ack(self, action: SendAck) -> None:
        """Collected, so that a round trip of one job is not two."""
        acks = self._peers[action.node].acks.setdefault(action.comp, [])
        acks.extend(action.serials)
        if len(acks) >= ACKS_MOST:
            self._acknowledge(self._peers[action.node])
        else:
            self._chores_at = min(self._chores_at, self.now + ACK_AFTER)

    def _acknowledge(self, peer: Peer) -> None:
        if peer.link is not None:
            for comp, serials in peer.acks.items():
                self.say(peer.link, Ack(comp, serials))
        peer.acks.clear()

    def _jobs_ended(self, action: JobsEnded) -> None:
        """Results at last. What may run the user's code when it is opened is left to an opener."""
        cluster, peer = self._clusters[action.comp], self._peers[action.node]
        plain: List[Tuple[DispyJob, tuple]] = []
        code: List[Tuple[DispyJob, tuple]] = []
        for pair in action.pairs:
            outcome = pair[1][1]
            if cluster._on_output is not None and outcome not in GOES_ON:
                self._show_rest(cluster, *pair)
            if outcome in GOES_ON or (cluster._chains and pair[0] in cluster._chains):
                cluster._chain(pair, peer)
                continue
            opens = outcome == Outcome.RETURNED_CODE or (outcome == Outcome.RAISED and len(unpack_error(pair[1][4])[1]))
            (code if opens else plain).append(pair)
        if plain:
            cluster._conclude(plain, peer)
        if code:
            self._openers.run(cluster._conclude, code, peer)

    @staticmethod
    def _job_waits(action: JobWaits) -> None:
        job = action.work
        job.status, job.ip_addr, job.start_time = DispyJob.Created, None, None

    @staticmethod
    def _job_parked(action: JobParked) -> None:
        logger.warning('job %r waits: %s', action.work.id, action.text)

    def _job_ended(self, action: JobEnded) -> None:
        job = action.work
        self._clusters[job._comp]._end(job, action.text)

    def _key_of(self, peer: Peer) -> Any:
        return LOCAL if peer.embedded else peer.address


_MAY_DIAL = frozenset((NodeState.FOUND, NodeState.REFUSED, NodeState.LOST))
_SENT = ('cpus', 'timeout')   # options of a job that its node has to know
_MESSAGE_OF = {SendCancel: Cancel, SendRecall: Recall}
_lock = threading.Lock()      # guards _drivers and their user counts, the making of jobs' events, cloudpickle's registry
_drivers: Dict[Access, Driver] = {}
_clusters: 'weakref.WeakSet[JobCluster]' = weakref.WeakSet()
_instance = os.urandom(16)    # this process to nodes


def _forked() -> None:
    """In the child of a fork: nothing of the parent's is ours."""
    global _lock, _instance
    _lock, _instance = threading.Lock(), os.urandom(16)
    for driver in list(_drivers.values()):
        driver.after_fork()
    _drivers.clear()
    _clusters.clear()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_forked)


def _user_name() -> str:
    import getpass
    try:
        return getpass.getuser()
    except (KeyError, OSError):   # no entry for this number, as in some containers
        return 'unknown'


def _connect(peer: Peer, host: str, port: int) -> socket.socket:
    """Like socket.create_connection, with the socket noted while it connects, so that this can be ended."""
    failure: OSError = OSError('it has no address')
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM):
        sock = peer.dialling = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(HANDSHAKE_TIME)
            sock.connect(address)
            tune(sock)
            return sock
        except OSError as exc:
            failure = exc
            sock.close()
    raise failure


def _dial_text(exc: BaseException) -> str:
    if isinstance(exc, ConnectionRefusedError):
        return 'nothing listens there'
    if isinstance(exc, socket.gaierror):
        return 'its name does not resolve'
    if isinstance(exc, socket.timeout):
        return 'no answer within %d s' % HANDSHAKE_TIME
    if type(exc).__name__ in ('SSLError', 'SSLCertVerificationError', 'SSLEOFError', 'SSLZeroReturnError'):
        return 'TLS failed: %s; both sides need certfile, and certificates that the other can verify (cafile)' % exc
    return str(exc)


def _file_pieces(comp: str, name: str, path: str) -> Iterator[File]:
    with open(path, 'rb') as file:
        offset = 0
        while True:
            data = file.read(FILE_PIECE)
            if offset and not data:
                return
            yield File(comp, name, offset, beside(data))
            offset += len(data)
            if not data:   # an empty file is one empty piece
                return


def _start_embedded(peer: Peer) -> Tuple['subprocess.Popen[bytes]', int, bytes]:
    """A dispynode for this program alone: loopback, a random secret, and stdin as the line it lives by. Not run as
    a script, which would be compiled anew each time, and not by multiprocessing, which would run the user's main
    program again."""
    import tempfile
    import dispynode
    secret = os.urandom(32).hex().encode()
    code = 'import sys; sys.path.insert(0, %r); import dispynode; sys.exit(dispynode.main())'
    prefix = peer.directory = tempfile.mkdtemp(prefix='dispy-')
    process = subprocess.Popen(
        [sys.executable, '-c', code % os.path.dirname(os.path.abspath(dispynode.__file__)), '--embedded', '-i', '127.0.0.1',
         '-p', '0', '--dest-path-prefix', prefix], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None and process.stdout is not None   # ours: both are pipes
    try:
        process.stdin.write(secret + b'\n')
        process.stdin.flush()
        line = process.stdout.readline()
        return process, int(line), derive_key(secret)
    except (OSError, ValueError) as exc:
        _end_embedded(process)
        raise HandshakeError('a node for this program could not be started (exit code %s)' % process.returncode) from exc


def _end_embedded(process: 'subprocess.Popen[bytes]') -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):   # it has ended already
                stream.close()
    try:
        process.wait(CALL_TIME / 2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ---------------------------------------------------------------------------------------------------------
# Public class
# ---------------------------------------------------------------------------------------------------------

class JobCluster:
    """Nodes that run one computation for this program.

    Parameters:
    computation - a function (any callable), or the path of a program; the program is copied to the nodes and run with
        the job's arguments as its command line, its exit status is the job's result
    nodes - None: a dispynode on this machine, or, if none answers within 1 s, one started for this program; 'local': that
        at once; or a list of 'host', ('host', port), ('host', port, cpus), {'host':, 'port':, 'cpus':}, NodeAllocate; cpus > 0 is an
        upper limit, cpus < 0 leaves so many free
    depends - what cannot be found through the computation: files and directories (they land in the jobs' working
        directory), modules and packages, functions and classes
    job_status - called with a job when it has ended, in a thread of its own (old name: callback)
    cluster_status - called as (status, node, job) at every change, in order: DispyNode.Initialized or Closed with a node, a
        job's status with the job (and the node, when it is sent there)
    setup, cleanup - functions run once a node, before the first and after the last job; they share the computation's
        global variables. cleanup=True removes the files afterwards, False leaves them
    dest_path - a fixed directory on the nodes for the files
    dispy_port - port of nodes for which none is given
    loglevel - level of dispy.logger
    ping_interval - seconds between attempts to reach a node, at most; pulse_interval - seconds between signs of life; a
        node that is silent for five is lost
    reentrant - jobs on a lost node are run again elsewhere; otherwise they end as Abandoned
    secret, certfile, keyfile, cafile - see "Security" in the README
    on_output - called as (job, 'stdout' or 'stderr', text) within a second of its being printed, all that is kept by the job's end
    forward_logs - `logging` records of jobs, from `loglevel` up, reach dispy.logger with the job's id
    max_jobs_per_worker - a worker process is replaced after so many jobs; None: kept

    Raises TypeError, ValueError (naming parameter, value and what is allowed), SecretError, FileNotFoundError, or what
    pickling the computation raises. It starts nothing then.
    """

    def __init__(self, computation: Any, nodes: Any = None, depends: Sequence[Any] = (),
                 job_status: Optional[Callable[[DispyJob], Any]] = None,
                 cluster_status: Optional[Callable[[int, Optional[DispyNode], Optional[DispyJob]], Any]] = None, dispy_port: Optional[int] = None,
                 dest_path: Optional[str] = None, loglevel: int = logging.INFO,
                 setup: Optional[Callable[..., Any]] = None, cleanup: Union[bool, Callable[..., Any]] = True,
                 ping_interval: Optional[float] = None, pulse_interval: Optional[float] = None, reentrant: bool = False,
                 secret: Union[str, bytes, None] = None, keyfile: Optional[str] = None, certfile: Optional[str] = None,
                 cafile: Optional[str] = None, max_jobs_per_worker: Optional[int] = None,
                 on_output: Optional[Callable[[DispyJob, str, Any], Any]] = None, forward_logs: bool = False,
                 callback: Optional[Callable[[DispyJob], Any]] = None) -> None:
        self._port = _in_range('dispy_port', dispy_port, NODE_PORT, 1, 65535)
        pulse = _in_range('pulse_interval', pulse_interval, PULSE, 0.1, 600)
        redial = _in_range('ping_interval', ping_interval, REDIAL_MOST, 0.1, 3600)
        most = _in_range('max_jobs_per_worker', max_jobs_per_worker, None, 1, 1 << 31)
        addresses = parse_nodes(nodes, self._port)
        for name, function in (('job_status', job_status), ('callback', callback), ('cluster_status', cluster_status),
                               ('on_output', on_output)):
            if function is not None and not callable(function):
                raise TypeError('%s is a %s; it must be a function' % (name, type(function).__name__))
        if dest_path:
            check_name(dest_path)
        if isinstance(depends, (str, bytes)) or not isinstance(depends, (list, tuple, set)):
            raise TypeError('depends is a %s; it must be a list' % type(depends).__name__)
        logger.setLevel(loglevel)
        self.name = getattr(computation, '__name__', None) or os.path.basename(str(computation))[:60]
        self._comp = uuid.uuid4().hex
        self._reentrant = bool(reentrant)
        self._cargo = pack_computation(computation, depends, setup, cleanup, dest_path, most, self.name)
        self._cargo.spec.update(live=on_output is not None, logs=loglevel if forward_logs else -1)
        self._job_status, self._cluster_status, self._on_output = job_status or callback, cluster_status, on_output
        self._shown: Dict[DispyJob, List[int]] = {}          # bytes of stdout and stderr shown live; driver thread only
        self._lock = threading.Lock()                        # guards those below
        self._changed = threading.Condition(self._lock)
        self._pending = 0                                    # jobs that have not ended or whose callback has not returned
        self._count = 0                                      # jobs submitted
        self._waiters = 0                                    # callbacks that are in `wait`
        self._closed = False
        self._counts: Dict[str, List[Any]] = {}              # node -> [peer, jobs done, seconds]
        self._chains: Dict[DispyJob, Deque[Tuple[tuple, Peer]]] = {}   # rows of jobs with provisional results, in order
        self._numbers = itertools.count(1)
        self._started = time.time()
        self._directory = os.getcwd()                        # files that jobs send come below it
        discovery = os.environ.get('DISPY_DISCOVERY', 'lan')
        if discovery not in ('lan', 'loopback', 'off'):
            raise ValueError("DISPY_DISCOVERY is %r; it must be 'lan', 'loopback' or 'off'" % discovery)
        given = nodes if isinstance(nodes, (list, set)) else [nodes]
        self._allocators = {_parse_node(node, self._port): node for node in given if isinstance(node, NodeAllocate)}
        self._driver = Driver.acquire(Access(find_secret(secret), certfile, keyfile, cafile, pulse, redial))
        try:
            self._driver.ask(lambda: self._driver.open(self, addresses, discovery != 'off'))
        except BaseException:
            self._driver.release()
            raise
        _clusters.add(self)

    # -- jobs ---------------------------------------------------------------------------------------------

    def submit(self, *args: Any, **kwargs: Any) -> DispyJob:
        """Run the computation once, with these arguments. Returns the job. Any thread.

        Not passed on: dispy_timeout=s (it is ended after so many seconds of running), dispy_priority=n (higher first),
        dispy_cpus=n, dispy_retries=n (so often it is tried again if its worker or node is lost, also if the cluster is not
        reentrant; then it is Abandoned), dispy_job_depends=[...] (files, functions and classes for this job alone). Raises RuntimeError on a closed cluster, TypeError or ValueError for bad arguments, and what
        pickling raises.
        """
        return self._submit(next(self._numbers), args, kwargs)

    def submit_job_id(self, id: Any, *args: Any, **kwargs: Any) -> DispyJob:
        """The same; the job's `id` is the one given."""
        return self._submit(id, args, kwargs)

    def submit_node(self, node: Any, *args: Any, **kwargs: Any) -> DispyJob:
        """The same, on this node and no other: a DispyNode, its name, address or (address, port). Raises ValueError for a
        node that this cluster does not know, naming those it does. The job waits while the node cannot be used."""
        return self._submit(next(self._numbers), args, kwargs, self._key_of_node(node))

    def submit_job_id_node(self, id: Any, node: Any, *args: Any, **kwargs: Any) -> DispyJob:
        """The same, with the job's `id`."""
        return self._submit(id, args, kwargs, self._key_of_node(node))

    def _key_of_node(self, node: Any) -> Any:
        found = self._driver.ask(lambda: self._driver.nodes_of(self._comp))
        keys = [self._driver._key_of(peer) for peer, _, _, _ in found if peer.is_meant(node)]
        if len(keys) != 1:
            raise ValueError('%s %.80r; this cluster knows %s' % ('no node is' if not keys else 'several nodes are', node,
                                                                  ', '.join(sorted(str(peer) for peer, _, _, _ in found))))
        return keys[0]

    def _submit(self, number: Any, args: tuple, kwargs: dict, node: Any = None) -> DispyJob:
        depends = kwargs.pop('dispy_job_depends', ())
        options = _take_options(kwargs) if kwargs else None
        if node is not None:
            options = dict(options or {}, node=node)
        if self._cargo.is_program and kwargs:
            raise TypeError('a program takes no keyword arguments: %s' % ', '.join(map(str, kwargs)))
        job = DispyJob(self._comp, pack_arguments(args, kwargs, depends), options, number)
        if size_of(job._payload) > MAX_PAYLOAD:
            raise ValueError('arguments of %d bytes are over the limit of %d: send a file (depends)'
                             % (size_of(job._payload), MAX_PAYLOAD))
        with self._lock:
            if self._closed or self._driver.broken:
                raise RuntimeError('submit: %s' % (self._driver.broken or 'the cluster was closed'))
            self._pending += 1
            self._count += 1
            self._driver.post(job)   # with the lock held: `close` comes after it or before the test above
        return job

    def map(self, *iterables: Any, in_flight: Optional[int] = None) -> Iterator[Any]:
        """Yield the results of computing over the inputs, in their order, like the builtin `map`. Inputs are taken as
        results are: at most `in_flight` jobs (default: 1000) are under way, so a generator may be endless. For a job
        that failed its exception is raised (JobFailed if there is none); leaving the loop cancels the rest."""
        most = _in_range('in_flight', in_flight, 1000, 1, 1 << 31)
        return self._map(zip(*iterables), most)

    def _map(self, inputs: Iterator[tuple], most: int) -> Iterator[Any]:
        jobs: Deque[DispyJob] = collections.deque()
        try:
            for args in inputs:
                jobs.append(self.submit(*args))
                if len(jobs) >= most:
                    yield result_of(jobs.popleft())
            while jobs:
                yield result_of(jobs.popleft())
        finally:
            for job in jobs:
                self.cancel(job)

    def as_completed(self, jobs: Sequence[DispyJob], timeout: Optional[float] = None, progress: bool = False) -> Iterator[DispyJob]:
        """Yield the jobs as they end, whatever their end. Raises TimeoutError when some have not after `timeout` seconds.
        `progress` as in `wait`."""
        if not progress:
            yield from self._as_completed(jobs, timeout)
            return
        with Progress() as shown:
            for done, job in enumerate(self._as_completed(jobs, timeout), 1):
                shown.show(done, len(jobs))
                yield job

    def _as_completed(self, jobs: Sequence[DispyJob], timeout: Optional[float]) -> Iterator[DispyJob]:
        until = None if timeout is None else time.monotonic() + timeout
        ended: 'queue.SimpleQueue[DispyJob]' = queue.SimpleQueue()
        for job in jobs:
            job._call_when_ended(ended.put)
        left = set(jobs)
        while left:
            wait = FOREVER if until is None else min(FOREVER, until - time.monotonic())
            try:
                job = ended.get(timeout=max(0.0, wait))
            except queue.Empty:
                if until is not None and time.monotonic() >= until:
                    raise TimeoutError('%d of %d jobs have not ended within %s s' % (len(left), len(jobs), timeout)) from None
                continue
            if job in left:
                left.discard(job)
                yield job

    def cancel(self, job: DispyJob) -> int:
        """End a job: a waiting one at once, a running one by KeyboardInterrupt and, 5 s later, by killing it.
        Returns 0, or -1 for a job that has ended. Any thread."""
        if job.status in ENDED:
            return -1
        self._driver.ask(lambda: self._driver.cancel(job))
        return 0

    def cancel_waiting(self) -> None:
        """End all jobs that have not been sent to a node. Any thread."""
        self._driver.ask(lambda: self._driver.cancel_waiting(self._comp))

    def wait(self, timeout: Optional[float] = None, progress: bool = False) -> bool:
        """Wait until every job has ended and its callback has returned, at most `timeout` seconds; whether they have.
        `progress` shows how many on stderr if that is a terminal (with tqdm if that is installed). Any thread; in a
        callback, the job it was called for is not waited for."""
        if not progress:
            return self._wait(timeout)
        until = None if timeout is None else time.monotonic() + timeout
        with Progress() as shown:
            while True:
                with self._lock:
                    shown.show(self._count - self._pending, self._count)
                left = PROGRESS_EVERY if until is None else min(PROGRESS_EVERY, until - time.monotonic())
                if self._wait(max(0.0, left)):
                    shown.show(self._count, self._count)
                    return True
                if until is not None and time.monotonic() >= until:
                    return False

    def _wait(self, timeout: Optional[float]) -> bool:
        own = getattr(_calling, 'cluster', None) is self
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._waiters += own
            if own:
                self._changed.notify_all()
            try:
                while self._pending > (self._waiters if own else 0):   # callbacks that wait do not wait for each other
                    left = FOREVER if until is None else min(FOREVER, until - time.monotonic())
                    if left <= 0:
                        return False
                    self._changed.wait(left)
            finally:
                self._waiters -= own
        return True

    __call__ = wait

    # -- nodes --------------------------------------------------------------------------------------------

    def wait_nodes(self, n: int = 1, timeout: Optional[float] = None) -> None:
        """Wait until `n` nodes are ready for jobs. Raises NoNodes, which names every address tried and every
        refusal with its reason, after `timeout` seconds. Any thread."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._closed:
                raise RuntimeError('wait_nodes: the cluster was closed')
            if sum(node.state == 'ready' for node in self.status().nodes) >= n:
                return
            left = FOREVER if until is None else until - time.monotonic()
            if left <= 0:
                raise NoNodes('%d nodes were waited for. %s' % (n, self._driver.ask(lambda: self._driver.complaint(self._comp))))
            with self._changed:
                self._changed.wait(min(left, 0.1))

    def status(self) -> ClusterStatus:
        """Nodes (with the reason if one is not used) and the number of jobs that have not ended. Any thread."""
        with self._lock:
            counts = {name: list(count) for name, count in self._counts.items()}
            pending = self._pending
        found: List[Tuple[Peer, str, str, int]] = []
        if not self._closed:
            try:
                found = self._driver.ask(lambda: self._driver.nodes_of(self._comp))
            except RuntimeError:
                if not self._closed:   # otherwise it was closed meanwhile
                    raise
        nodes, seen = [], set()
        for peer, state, reason, busy in found:
            key = '%s:%s' % (peer.ip_addr, peer.name)
            seen.add(key)
            _, done, seconds = counts.get(key, (peer, 0, 0.0))
            nodes.append(self._describe(peer, state, reason, busy, done, seconds))
        for key, (peer, done, seconds) in counts.items():
            if key not in seen:
                nodes.append(self._describe(peer, 'closed', '', 0, done, seconds))
        return ClusterStatus(nodes, pending)

    @staticmethod
    def _describe(peer: Peer, state: str, reason: str, busy: int, done: int = 0, seconds: float = 0.0) -> DispyNode:
        return DispyNode(peer.ip_addr, peer.address.port, peer.name, state, reason, peer.cpus, busy, done, seconds, peer.facts)

    def print_status(self, file: Any = None) -> None:
        """A table by node. Any thread."""
        status, line = self.status(), '%-32s %5s %8s %10s %12s  %s'
        out = [line % ('Node', 'CPUs', 'Jobs', 's / Job', 'Job time s', 'State'), '-' * 84]
        for node in status.nodes:
            name = '%s (%s)' % (node.ip_addr, node.name) if node.name else node.ip_addr
            out.append(line % (name[:32], node.cpus, node.jobs_done,
                               '%.3f' % (node.cpu_time / node.jobs_done) if node.jobs_done else '-',
                               '%.3f' % node.cpu_time, node.state + (': ' + node.reason.strip().splitlines()[-1] if node.reason else '')))
        busy, elapsed = sum(node.cpu_time for node in status.nodes), time.time() - self._started
        out += ['-' * 84, 'Jobs pending: %d   Job time: %.3f s   Elapsed: %.3f s   CPUs used on average: %.2f'
                % (status.jobs_pending, busy, elapsed, busy / elapsed if elapsed else 0.0)]
        print('\n'.join(out), file=file)

    stats = print_status

    # -- end ----------------------------------------------------------------------------------------------

    def close(self, timeout: Optional[float] = None, terminate: bool = False) -> bool:
        """Wait for the jobs (at most `timeout` seconds; with terminate=True not at all: they are cancelled) and let the
        nodes go. False, and nothing is changed, when jobs were left after `timeout`. May be called twice. Any thread."""
        if not terminate and not self._closed and not self.wait(timeout):
            return False
        with self._lock:
            if self._closed:
                return True
            self._closed = True
        _clusters.discard(self)
        self._leave()
        return True

    def _leave(self) -> None:
        driver = self._driver
        if driver.broken:
            return
        with contextlib.suppress(RuntimeError):   # the driver has failed meanwhile, and has ended the jobs itself
            driver.ask(lambda: driver.forget(self._comp))
        self.wait(CALL_TIME)   # for callbacks of what was cancelled
        if threading.current_thread() is not driver._thread:
            driver.release()

    shutdown = close

    def __enter__(self) -> 'JobCluster':
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        """Waits for the jobs; leaving by an exception cancels them."""
        self.close(terminate=kind is not None)

    def __repr__(self) -> str:
        return '<JobCluster %s %s, %d pending>' % (self.name, 'closed' if self._closed else 'open', self._pending)

    # -- called by the driver and its helpers ---------------------------------------------------------------

    def _node_came(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _conclude(self, pairs: List[Tuple[DispyJob, tuple]], peer: Peer) -> None:
        """Give jobs their results. The driver's thread or an opener."""
        seconds = 0.0
        for job, row in pairs:
            self._fill_in(job, row)
            seconds += row[3] - row[2]
        with self._lock:
            count = self._counts.setdefault('%s:%s' % (peer.ip_addr, peer.name), [peer, 0, 0.0])
            count[1] += len(pairs)
            count[2] += seconds
        self._ended([job for job, _ in pairs])

    def _chain(self, pair: Tuple[DispyJob, tuple], peer: Peer) -> None:
        """A result that must be seen after earlier ones of its job. The driver's thread."""
        job, row = pair
        with self._lock:
            if job in self._chains:
                self._chains[job].append((row, peer))
                return
            self._chains[job] = collections.deque([(row, peer)])
        pool = self._driver.callbacks if self._job_status is not None else self._driver._openers
        pool.run(self._run_chain, job)

    def _run_chain(self, job: DispyJob) -> None:
        """Result after result, each seen by the callback before the next. A callback thread or an opener."""
        while True:
            with self._lock:
                if not self._chains[job]:
                    del self._chains[job]
                    return
                row, peer = self._chains[job].popleft()
            if row[1] not in GOES_ON:
                self._conclude([(job, row)], peer)
            elif self._show(job, row) and self._job_status is not None:
                try:
                    self._guarded_call(job)
                except Exception:  # the user's callback; later results are shown all the same
                    logger.exception('the callback of job %r raised', job.id)

    def _show(self, job: DispyJob, row: tuple) -> bool:
        """A provisional result; false if the job has ended meanwhile, or it cannot be opened."""
        try:
            value = unseal(row[4])
        except BaseException as exc:  # unpickling runs the user's code
            logger.error('a provisional result of job %r could not be opened: %s', job.id, describe_exception(exc, 1))
            return False
        with self._lock:
            if job.status in ENDED:
                return False
            job.result, job.status = value, DispyJob.ProvisionalResult
        return True

    def _fill_in(self, job: DispyJob, row: tuple) -> None:
        _, outcome, start, end, payload, stdout, stderr = row
        status = int(job._state)
        if outcome == 1 or outcome == 2:   # RETURNED, RETURNED_CODE
            try:
                job.result = unseal(payload)
            except BaseException as exc:  # unpickling runs the user's code
                status = DispyJob.Terminated
                job.exception = 'the result could not be opened here: %s' % describe_exception(exc, 1)
        elif outcome == Outcome.RAISED:
            job.result = None   # a provisional one may stand there
            job.exception, body = unpack_error(payload)
            if len(body):
                try:
                    job.error = unseal(body)
                except BaseException as exc:  # as above; the text is there
                    logger.debug('an exception of job %r could not be opened: %s', job.id, type(exc).__name__)
        else:
            job.result, job.exception = None, bytes(payload).decode('utf-8', 'replace')
        if start:
            job.start_time = start
        job.end_time = end or time.time()
        if self._cargo.is_program:
            job.stdout, job.stderr = bytes(stdout), bytes(stderr)
        else:
            job.stdout = str(stdout, 'utf-8', 'replace') if stdout else ''
            job.stderr = str(stderr, 'utf-8', 'replace') if stderr else ''
        job._payload = None
        job.status = status   # last: whoever sees it sees all of the above

    def _end(self, job: DispyJob, text: str) -> None:
        """A job that ended without a result. The driver's thread."""
        with self._lock:   # beside a provisional result
            job.result, job.exception, job._payload, job.end_time = None, text, None, time.time()
            job.status = int(job._state)
        self._ended([job])

    def _ended(self, jobs: List[DispyJob]) -> None:
        if self._cluster_status is not None:
            for job in jobs:
                self._driver.post(Told(self, job.status, None, job))
        for job in jobs:
            if job._event is not None or job._when_ended is not None:
                job._wake()
        if self._job_status is None:
            self._settle(len(jobs))
            return
        for job in jobs:
            if self._driver.broken:
                self._call_back(job)   # the pool has ended with the driver
            else:
                self._driver.post(CallBack(self, job))

    def _call_back(self, job: DispyJob) -> None:
        """A callback thread."""
        try:
            self._guarded_call(job)
        finally:
            self._settle(1)

    def _guarded_call(self, job: DispyJob) -> None:
        _calling.cluster = self
        try:
            self._job_status(job)  # type: ignore[misc]
        finally:
            _calling.cluster = None

    def _settle(self, count: int) -> None:
        with self._lock:
            self._pending -= count
            if self._pending <= self._waiters:   # callbacks that wait for the others do not count themselves
                self._changed.notify_all()

    def _driver_broke(self, text: str) -> None:
        """The driver's thread is ending for a fault of ours."""
        schedule = self._driver.schedule
        comp = schedule.comps.get(self._comp)
        works: List[Any] = list(self._driver._submitted) + [event for event in self._driver._inbox if isinstance(event, DispyJob)]
        if comp is not None:
            works += [*comp.waiting()] + [work for node in schedule.nodes.values() for work in node.flight.get(self._comp, {}).values()]
        for job in works:
            if job._comp == self._comp and job.status not in ENDED:
                job._state = JobState.ABANDONED
                job.exception, job.end_time, job.status = text, time.time(), DispyJob.Abandoned
                self._ended([job])


class Progress:
    """How many jobs have ended, on stderr: tqdm's bar if it is installed, otherwise a line a second, rewritten; nothing
    if stderr is no terminal."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started, self._next = clock, clock(), 0.0
        self._bar: Any = None
        self._quiet = not sys.stderr.isatty()

    def __enter__(self) -> 'Progress':
        if not self._quiet:
            with contextlib.suppress(ImportError):   # tqdm is not asked for, only used
                import tqdm
                self._bar = tqdm.tqdm(unit='job', file=sys.stderr)
        return self

    def show(self, done: int, total: int) -> None:
        """Bring the display up to date."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
        elif self._clock() >= self._next or done == total:
            self._next = self._clock() + PROGRESS_EVERY
            rate = done / max(1e-9, self._clock() - self._started)
            left = ', about %.0f s left' % ((total - done) / rate) if done and done < total else ''
            print('\r%d of %d jobs, %.1f a second%s   ' % (done, total, rate, left), end='', file=sys.stderr, flush=True)

    def __exit__(self, *exc: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        elif not self._quiet:
            print(file=sys.stderr)


_calling = threading.local()  # .cluster: whose callback this thread is in


def _in_range(name: str, value: Any, default: Any, low: float, high: float) -> Any:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError('%s=%r is not a number between %s and %s' % (name, value, low, high))
    return value


def _take_options(kwargs: dict) -> Optional[dict]:
    """Take the keywords that are the cluster's out of those of the job."""
    options = {}
    for name in [name for name in kwargs if name.startswith('dispy_')]:
        if name not in _OPTIONS:
            raise TypeError('submit: unknown keyword %s; there are %s' % (name, ', '.join(_OPTIONS)))
        value = kwargs.pop(name)
        if value is not None:
            kind, low, high = _OPTIONS[name]
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                raise ValueError('submit: %s=%r is not a number between %s and %s' % (name, value, low, high))
            options[name[len('dispy_'):]] = value
    return options or None


_OPTIONS: Dict[str, Tuple[Any, float, float]] = {
    'dispy_timeout': ((int, float), 0.001, 1e9), 'dispy_priority': (int, -(1 << 31), 1 << 31), 'dispy_cpus': (int, 1, 1 << 16),
    'dispy_retries': (int, 0, 1000)}


# ---------------------------------------------------------------------------------------------------------
# Standard interfaces: concurrent.futures and joblib
# ---------------------------------------------------------------------------------------------------------

class DispyFuture(concurrent.futures.Future):  # type: ignore[type-arg]
    """A future of a DispyExecutor; `job` is the job behind it."""

    def __init__(self, cluster: JobCluster) -> None:
        super().__init__()
        self._cluster = cluster
        self.job: Optional[DispyJob] = None

    def cancel(self) -> bool:
        """Cancel it if it waits. As with other executors, what runs goes on (`cluster.cancel` ends that too)."""
        job = self.job
        if job is not None and job.status == JobState.CREATED:
            self._cluster.cancel(job)
        return job is not None and job.status == JobState.CANCELLED and super().cancel()

    def running(self) -> bool:
        """Whether it is on a node."""
        return self.job is not None and self.job.status in (JobState.RUNNING, JobState.PROVISIONAL)

    def settle(self, job: DispyJob) -> None:
        """The job has ended. A callback thread."""
        self.job = job
        if self.cancelled() or job.status == JobState.CANCELLED:
            super().cancel()
            self.set_running_or_notify_cancel()
        elif job.status == JobState.FINISHED:
            self.set_result(job.result)
        else:
            self.set_exception(error_of(job))


class DispyExecutor(concurrent.futures.Executor):
    """A concurrent.futures.Executor whose calls run on the nodes of a cluster: any function a call, exceptions as they
    were raised with the node's traceback as their cause.

    Parameters: `nodes` and the other parameters of JobCluster but `computation` and `job_status`.
    """

    def __init__(self, nodes: Any = None, **options: Any) -> None:
        self.cluster = JobCluster(call_packed, nodes, job_status=lambda job: job.id.settle(job), **options)

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> DispyFuture:  # type: ignore[override]
        """Call fn(*args, **kwargs) on a node. Raises RuntimeError after shutdown, and what pickling raises. Any thread."""
        if not callable(fn):
            raise TypeError('%.80r cannot be called' % (fn,))
        future = DispyFuture(self.cluster)
        payload = b''.join(pieces_of(seal(fn, by_value, travels)[0]))
        future.job = self.cluster.submit_job_id(future, payload, args, kwargs)
        return future

    def map(self, fn: Callable[..., Any], *iterables: Any, timeout: Optional[float] = None, chunksize: int = 1) -> Iterator[Any]:
        """As in concurrent.futures: all inputs are taken at once, results come in order, `chunksize` inputs a job."""
        if chunksize < 1:
            raise ValueError('chunksize=%r must be at least 1' % (chunksize,))
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout)
        inputs = zip(*iterables)
        chunks = iter(lambda: list(itertools.islice(inputs, chunksize)), [])
        return itertools.chain.from_iterable(super().map(functools.partial(call_chunk, fn), chunks, timeout=timeout))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; wait for those there are (or cancel those that wait) and let the nodes go."""
        if cancel_futures:
            self.cluster.cancel_waiting()
        if wait:
            self.cluster.close()
        else:
            threading.Thread(target=self.cluster.close, name='dispy-shutdown', daemon=True).start()


def register_joblib() -> None:
    """Make `with joblib.parallel_backend('dispy', nodes=...)` work; keywords are those of DispyExecutor. Done by the
    import of dispy if joblib was imported before. Raises ImportError without joblib."""
    import joblib

    class Backend(joblib.parallel.ParallelBackendBase):  # type: ignore[misc, name-defined]
        """joblib's calls as jobs; see joblib's documentation of ParallelBackendBase."""
        supports_retrieve_callback = supports_timeout = True
        default_n_jobs = -1

        def __init__(self, nesting_level: Optional[int] = None, inner_max_num_threads: Optional[int] = None, **options: Any) -> None:
            super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
            self._options = options
            self._executor: Optional[DispyExecutor] = None

        def effective_n_jobs(self, n_jobs: int) -> int:
            """CPUs of the nodes, or fewer if that is wanted."""
            self.start_call()
            assert self._executor is not None
            cpus = sum(node.cpus for node in self._executor.cluster.status().nodes if node.state == 'ready')
            return cpus if n_jobs is None or n_jobs < 1 else min(cpus, n_jobs)

        def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
            """Begin: nodes are waited for."""
            self.parallel = parallel
            return self.effective_n_jobs(n_jobs)

        def start_call(self) -> None:
            """A cluster, if there is none."""
            if self._executor is None:
                self._executor = DispyExecutor(**self._options)
                self._executor.cluster.wait_nodes(1, timeout=30)

        def submit(self, func: Callable[..., Any], callback: Optional[Callable[..., Any]] = None) -> DispyFuture:
            """One batch of calls."""
            assert self._executor is not None
            future = self._executor.submit(func)
            future.get = future.result  # type: ignore[attr-defined]
            if callback is not None:
                future.add_done_callback(callback)
            return future

        apply_async = submit   # its name before joblib 1.4

        def retrieve_result_callback(self, out: DispyFuture) -> Any:
            """What a batch returned or raised."""
            return out.result()

        def terminate(self) -> None:
            """The end."""
            if self._executor is not None:
                self._executor.cluster.close(terminate=True)
                self._executor = None

        def abort_everything(self, ensure_ready: bool = True) -> None:
            """A call raised: what is left is not wanted."""
            self.terminate()
            if ensure_ready:
                self.start_call()

    joblib.register_parallel_backend('dispy', Backend)


if 'joblib' in sys.modules:
    register_joblib()


@atexit.register
def _at_exit() -> None:
    """The program ends with clusters open: end what is left, and say so."""
    for cluster in list(_clusters):
        if cluster._pending:
            logger.warning('%s: the program ends with %d jobs that have not ended; they are cancelled (cluster.wait() '
                           'waits for them)', cluster.name, cluster._pending)
        cluster.close(terminate=True)


# ---------------------------------------------------------------------------------------------------------
# Command line: a program over many arguments
# ---------------------------------------------------------------------------------------------------------

def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='dispy', description='Run a program once for each line of arguments, on all CPUs of '
                                     'the nodes. The exit status is the number of jobs that failed, at most 101.')
    add = parser.add_argument
    add('program', metavar='PROGRAM', help='path of a program or script; it is copied to the nodes')
    add('-n', '--nodes', action='append', metavar='HOST[:PORT]', help="a node; may be repeated; 'local': this machine "
        '(default: a dispynode on this machine, or one started for this run)')
    add('-f', '--depends', action='append', default=[], metavar='FILE', help='file that the program needs beside it; may be repeated')
    add('-a', '--args', action='append', default=[], metavar='"ARGS"', help='arguments of one job, split as a shell does; may be repeated')
    add('--args-file', metavar='FILE', help='file with the arguments of a job on each line; -: standard input')
    add('-o', '--output', metavar='DIR', help='write the output of job N to DIR/N.out and DIR/N.err instead of printing it')
    add('--secret-file', metavar='FILE', help='file with the secret (default: the one of this user)')
    add('--certfile', metavar='FILE', help='certificate for TLS')
    add('--keyfile', metavar='FILE', help="the certificate's key, if not in the same file")
    add('--version', action='version', version='%(prog)s ' + __version__)
    return parser


def _lines_of(args: argparse.Namespace) -> Iterator[List[str]]:
    """Argument lists of jobs, read as they are wanted. Raises ValueError for a line that a shell could not split."""
    yield from map(shlex.split, args.args)
    if args.args_file == '-':
        yield from (shlex.split(line) for line in sys.stdin if line.strip())
    elif args.args_file:
        with open(args.args_file) as file:
            yield from (shlex.split(line) for line in file if line.strip())
    elif not args.args:
        yield []


def _host_and_port(text: str) -> Any:
    host, colon, port = text.rpartition(':')
    if not colon or ':' in host:   # no port, or IPv6
        return text
    if not port.isdigit():
        raise ValueError('-n %s: the port is no number' % text)
    return host, int(port)


class _Printer:
    """Shows what has ended, as it comes; keeps count."""

    def __init__(self, directory: Optional[str]) -> None:
        self._directory = directory
        self.done = self.failed = 0

    def show(self, job: DispyJob, total: int) -> None:
        """Output and fate of one job. The main thread."""
        self.done += 1
        for data, end, stream in ((job.stdout, 'out', sys.stdout), (job.stderr, 'err', sys.stderr)):
            if self._directory is not None:
                with open(os.path.join(self._directory, '%s.%s' % (job.id, end)), 'wb') as file:
                    file.write(data or b'')  # type: ignore[arg-type]
            elif data:
                stream.buffer.write(data)  # type: ignore[arg-type]
                stream.flush()
        if job.status != JobState.FINISHED or job.result:
            self.failed += 1
            print('job %s %s: %s' % (job.id, job.status_text(), job.exception or 'exit status %s' % job.result), file=sys.stderr)
        if sys.stderr.isatty():
            print('%d of %d done, %d failed' % (self.done, total, self.failed), end='\r', file=sys.stderr, flush=True)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line. Returns the number of jobs that failed, at most 101; 2 for wrong usage comes from argparse."""
    parser = _parser()
    args = parser.parse_args(argv)
    ended: 'queue.SimpleQueue[DispyJob]' = queue.SimpleQueue()
    try:
        nodes = None if not args.nodes else LOCAL if args.nodes == [LOCAL] else list(map(_host_and_port, args.nodes))
        if args.output:
            os.makedirs(args.output, exist_ok=True)
        secret = find_secret(None, args.secret_file) if args.secret_file else None
        cluster = JobCluster(args.program, nodes, depends=args.depends, job_status=ended.put, secret=secret,
                             certfile=args.certfile, keyfile=args.keyfile)
    except (ValueError, TypeError, OSError, DispyError) as exc:
        parser.error(str(exc))
    printer, total = _Printer(args.output), 0
    with cluster:
        try:
            for line in _lines_of(args):
                cluster.submit(*line)
                total += 1
                while total - printer.done >= 1000 or not ended.empty():
                    printer.show(ended.get(), total)
        except (ValueError, OSError) as exc:
            print('dispy: arguments of job %d: %s; no more jobs are started' % (total + 1, exc), file=sys.stderr)
            printer.failed += 1
        while printer.done < total:
            printer.show(ended.get(), total)
    return min(printer.failed, 101)


if __name__ == '__main__':
    # Once more under its own name, so that classes have one identity.
    sys.exit(importlib.import_module('dispy').main())
