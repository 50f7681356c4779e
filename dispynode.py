#!/usr/bin/env python3
"""The daemon that runs jobs on a host; the only file such a host needs.

Copy this file to a host, copy the secret (~/.config/dispy/secret) with it, and run `python
dispynode.py`. It needs Python 3.8 or later and nothing else; `psutil` is used when it is there.

What a node shares with its clients (messages, frames, handshake, link, loop) is here too, because
this file must be able to travel alone; dispy.py imports it by name.

  client                    this process                               its children
  +--------+  TCP (+TLS)  +------------------------------------+      +--------------------------+
  | driver | <==========> | accept threads  TLS and handshake  |      | runner, one for each     |
  +--------+   frames     |      | post()                      |      | computation: loads code, |
                          | node thread     Loop: links,       | <==> | runs setup() once        |
                          |      |          pipes, timers      | pipes|      | fork              |
                          | Node            pure state:        | <==> | worker, one for each     |
                          |                 decides            |      | CPU: job after job       |
                          +------------------------------------+      +--------------------------+

Only the node thread owns the state. An accept thread exists for one handshake and hands over a
socket. `Node` is pure: `handle(event, now)` and `flush(now)` return actions, and `NodeHost` carries
them out and feeds back their results. A NodeHost runs in any loop: in that of a `Daemon`, whose
clients connect by links, or in that of a client, which is its only one (EmbeddedNode in dispy.py).
Each worker has a pipe to the node thread; the runner, which forks and reaps the workers, reports
their starts and ends. The daemon never unpickles what a user sent: it forwards bytes.

Each of these has parts, which own their state and use one another through their methods:
  Node    NodeTables (what all parts look up), NodeLease (which client), Computations (stages),
          Attempts (what waits), CpuScheduler (what runs), WorkerPool, FairShare (who is next),
          Interruptions (what is ended), JobRequests (requests of jobs to clients), NodeService
          (pauses and the end), UndeliveredResults, PastAttempts, Inquiries (questions to the
          node), Timers
  NodeHost  NodeDirectory, ComputationFiles, ResultStore, ProcessHost (runners), WorkerPipes
  Daemon  NodeHost, Uplinks, NodeDiscovery
  Runner  ComputationCode (what was loaded), WorkerProcesses, RunningLimits
  Worker  WorkerPipe, JobOutput, JobInterrupts, JobServices, JobDirectory, Surroundings

The life of a job here:
  1. `Compute` names a computation and its files; missing ones are requested (`Need`) and arrive in
     pieces (`FilePiece`).
  2. A runner is started, loads the code and runs setup; `Ready` tells the client.
  3. `Jobs` brings attempts; each waits until a CPU is free and is then written to a worker's pipe.
  4. The worker marks the attempt as running (a shared slot), runs it, and writes the result before
     it begins the next one. Output is captured at descriptor level in a file of the worker. After
     about 20 ms the client is told that the job has begun (`Started`), and the worker returns the
     attempts that wait behind it.
  5. Results of one turn leave in one `Results`, and are kept until the client's `Ack`.
  6. The runner reports a worker that has died, with the attempt that it was running; this attempt
     has failed, those behind it go back to the queue, and a new worker is forked.
  7. `Done` ends the computation: cleanup runs, processes end, the directory is removed.

This file is read from the top down: everything is defined before it is used.
  Part I: what nodes share with clients and schedulers
    Constants and errors
    Values and messages
    Payloads
    Code that travels
    Secret, handshake and frames
    Files, links, and the loop that owns them
  Part II: the node
    What a node decides
    The job side
    The daemon
"""

import sys

# This comes first, since older versions lack some of the modules below. They must be able to
# compile this file.
if sys.version_info < (3, 8):
    sys.exit('dispynode.py needs Python 3.8 or later; this is Python %d.%d (%s)' %
             (sys.version_info[:2] + (sys.executable, )))

if __name__ == '__main__':
    # Run this file once more under its own name, so that classes have one identity here and in the
    # runners. This happens here and not at the end, where everything below would have been executed
    # for nothing. The code is compiled already.
    import importlib.util
    import os
    if __spec__ is None:   # not run by -m
        spec = importlib.util.spec_from_file_location('dispynode', os.path.abspath(__file__))
    else:
        spec = importlib.util.find_spec('dispynode')
    program = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules['dispynode'] = program
    # Without __file__, `spawn` does not run this file a third time as the runner's __main__.
    del __file__
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    exec(sys._getframe().f_code, vars(program))
    sys.exit(program.main())

# Some modules are imported where they are used, as few programs need them: most of the time that
# `import dispy` takes is that of the standard library.
import argparse
import array
import bisect
import builtins
import collections
import contextlib
import contextvars
import copyreg
import enum
import errno
import functools
import gc
import glob
import hashlib
import heapq
import hmac
import importlib.machinery
import importlib.util
import io
import itertools
import json
import linecache
import locale
import logging
import logging.handlers
import math
import mmap
import multiprocessing
import operator
import os
import pickle
import platform
import queue
import re
import reprlib
import select
import selectors
import shutil
import signal
import socket
import socketserver
import stat
import struct
import subprocess
import tempfile
import threading
import time
import traceback
import types
import typing
import unicodedata
import warnings
import weakref
import zlib
import __future__
import _thread
from typing import (
    AbstractSet, Any, Callable, Container, Deque, Dict, FrozenSet, Iterable, Iterator, List,
    NoReturn, Optional, Sequence, Set, TextIO, Tuple, Type, Union)

__all__ = ['DispyError', 'SecretError', 'main']   # the other names are for dispy's own modules

__version__ = '5.0.0.dev0'


# ==================================================================================================
# Part I: what nodes share with clients and schedulers
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# Constants and errors
# --------------------------------------------------------------------------------------------------

# Glossary
#   program      what a user runs: its clusters submit jobs
#   client       a process that uses nodes: a program, or a scheduler on behalf of programs
#   node         what runs jobs on a host: a dispynode, or a part of a program ("embedded")
#   computation  (comp) what a cluster has on nodes: its code, files and jobs
#   job          one call that a user has submitted; it has a number
#   attempt      one try to run a job on a node. The upper bits of its serial number are the number
#                of the job, the lower 16 bits count the attempts: see job_number, attempt_number
#   outcome      how an attempt ended; with times, value and output it is a row of Results
#   acknowledge  (Ack) to say that a result was received, so that no other process keeps it
#   recall       (ReturnJobs) to ask for attempts that have not begun, to run them elsewhere
#   spool        results on a node's disk, while their client is away
#   lease        a client's hold on a node, which serves one client at a time
#   orphaned     without a connection to its client
#   runner       the process that loads the code of a computation and starts its workers
#   worker       the process that runs the jobs of a computation, one after the other
#   slot         shared memory in which a worker notes which attempts it has begun, so that they
#                are known when it has died
#   link         an authenticated connection between two processes, with heartbeats
#   uplink       a link that a node itself makes, to a scheduler or to a client that listens
#   frame        a message on a link, with its length, number and authentication code
#   part         a piece of a message that is too large for a frame
#   record       a message on a pipe between a daemon, its runners and its workers
#   envelope     the plain values of a message; large payloads are out of band
#   payload      the bytes of a user's arguments, code or result, which daemons never open
#   bundle       the files of a group of modules, with the variables that the program has set there
#   event        what the loop tells the pure state; an action is what the state then decides
#   turn         one round of a loop: it handles what has come, then sends what follows
#   heartbeat    (Pulse) a sign of life on an idle link; instance: 16 bytes that identify a process
NODE_PORT = 9701              # TCP and UDP
SCHEDULER_PORT = 9702         # TCP: the scheduler's, and of clients that nodes dial
PULSE = 2.0                   # s between heartbeats on a link
PULSES_LOST = 5               # silent heartbeat intervals after which a link is broken
# Silent heartbeat intervals after which a second connection is tried while the first still counts,
# and the minimum time in seconds between the beginnings of such attempts
PULSES_SILENT = 2
SECOND_APART = 0.5
GRACE = 5.0                   # s from KeyboardInterrupt in a job to the kill of its process group
END_TIME = 2.0                # s that killed workers may take to end
# The number of seconds before its time limit at which a node has certainly ended after its jobs got
# their grace: it covers the messages that are still to be sent, and the start of the node, which
# the limit includes
LIMIT_MARGIN = 10.0
DRAIN_BEFORE = 120.0          # s before its time limit at which a node takes no new jobs
CLEANUP_TIME = 4.0            # s that workers have for cleanup: less than their runner has to end
RESULT_SENT = 0.5             # s that a worker may take to note that it has sent a result
HANDSHAKE_TIME = 10.0         # s for TLS and handshake together
TRIPS = 10                    # round trips to a peer that these need at most
SETUP_TIME = 600.0            # s that loading code and setup() may take
# Seconds that a computation without jobs waits for a client whose link broke
ORPHAN_TIME = 3.0
PAST_TIME = 30 * 86400.0      # s for which it is remembered that results were discarded
ZOMBIE_TIME = 86400.0         # s that results wait on the disk for their client
CAUGHT_UP = 0.01              # s for which a loop waits when there is nothing to do
OVERSLEPT = 1.0               # s by which it wakes too late when its process has stood still
# Seconds after which the end of a link does not count as one that follows its beginning at once
FLAP_TIME = 10.0
# Number of consecutive links that ended at once after which the waits between attempts grow
FLAPS = 4
# Seconds for which a client is not served after the node was taken from it, so that others have
# their turn
RELEASE_COOLDOWN = 10.0
# What a worker may hold beyond the job that it runs, in seconds of work and in jobs. With some jobs
# at hand it does not wait for the daemon after each short job; but another worker can run these
# jobs only after they were taken back, so that the limits are low.
AHEAD_TIME = 0.02
AHEAD_MOST = 64
# If each worker may hold so many jobs, and more wait, no worker needs the next turn of the loop
# soon: it has half of them at least, for which it needs about as long as Pace.PAUSE even if they
# are empty.
AHEAD_WELL = 16
# The compensation in CPU seconds, for each CPU of the node, that a client which has had less than
# others gets at most; without a limit, a client that was idle for an hour would then have the node
# alone for as long.
CREDIT_TIME = 2.0
ABSENT_TIME = 1.0             # s without jobs here after which a client gets no compensation
ROW_FIRST = 64                # jobs, the first guess of how many fill a round trip
UNKNOWN_TIME = 0.5            # s that a job is assumed to take before any has ended
# Seconds after which a job counts as long: its client is told that it runs, and its worker returns
# the jobs behind it. For shorter jobs the client gets their results only.
BEGUN_TIME = 0.025
OUTPUT_KEPT = 256 * 1024      # bytes that are kept of each end of a job's stdout and stderr
# Bytes of one stream of a job, including the mark that replaces its middle
OUTPUT_MOST = 2 * OUTPUT_KEPT + 1024
LATEST = 1e11                 # s since the epoch, the latest time that a job can have ended
OUTPUT_CHECKED = 0.25         # s between checks of the size of running jobs' output
WORKER_IDLE = 300.0           # s without a job after which a worker ends
WORKER_RETRY_DELAY = 1.0            # s between attempts to start a worker
REMOVAL_DELAY_MOST = 60.0     # s between attempts to remove a directory
WORKER_TOLD = 60.0            # s of success after which a failure to start one is reported again
BEGUN_KEPT = 2045             # the number of begun attempts that a worker notes in a file
UNDEAD_TIME = 0.5             # s to wait for a killed stray process before other work goes on
RUNNER_ASKED = 2.0            # s between requests to a runner with jobs to show that it lives
RUNNER_SILENT = 10.0          # s without an answer after which a runner is killed
# Seconds between checks of the memory of jobs that have a limit
MEMORY_CHECK_INTERVAL = 0.05
# Size in bytes from which a payload is sent out of band, and is not copied into its envelope
OUT_OF_BAND = 32 * 1024
FILE_PIECE = 1 << 20          # bytes of a file in one message
# Size in bytes from which a value with buffers passes between a node and its workers in a memory
# segment. Below this a pipe is as fast: its memory has been used before.
SEGMENT_FROM = 2 << 20
SEGMENTS_MOST = 128           # segments that are mapped in this process; others are read
# Bytes on a pipe that the other side has not read, including the overhead of the system for each
# record, beyond which values are written to the pipe itself, which makes their sender wait: about
# five records
SEGMENTS_UNREAD = 4096
# Bytes after which a batch becomes a frame, so that the other side can begin with it
BATCH_BYTES = 1 << 20
WHOLE_MOST = 960 << 20        # bytes of a computation: it is sent in one frame, of 1 GiB at most
# Size limit in bytes of one value, the arguments or the result of a job: 4 GiB, and what packing
# adds. Values that are larger than a frame are sent in parts.
VALUE_MOST = (4 << 30) + (1 << 20)
# Characters of a text for people, such as a traceback; the middle of longer ones is left out
TEXT_MOST = 64 * 1024
# Bytes that are shown of a running job: of the stacks of its process, and of the ends of its output
STACKS_MOST = 64 * 1024
OUTPUT_SEEN = 4096
NAMES_MOST = 60 << 20         # bytes that the list of a computation's files may take
MAX_FRAME = 1 << 30           # bytes of payload in one frame, the largest of the limits by message
# Bytes that wait on a link after which files of jobs are not read: a job that sends faster than its
# client receives must not fill the memory of the node
BACKPRESSURE_BYTES = 16 << 20
# The number of sockets that a loop may have if it must use select()
SELECT_MOST = 500
WRITE_MOST = 32 << 20         # bytes that are written to one channel in one turn
LAZY = 64 << 20   # bytes from which memory is mapped, so that it is used only as it is filled
# How many copies of arguments a node has in memory: one in the daemon, and one in the worker, which
# opens them in place. A program has as many copies of a result, which is opened in place, too.
ARGUMENTS_COPIED = 2
RESULTS_COPIED = 1
# Limits for options that are intervals, in seconds
SHORTEST = 1e-3
LONGEST = 10 * 365.25 * 86400
LONGEST_SLEEP = 86400.0       # s that a loop sleeps at most before it checks again
NO_MEMORY = 'there is no memory for what was sent'
SERIALS_MOST = 50000          # serials in one message
ROWS_MOST = 20000             # rows of jobs or results in one message
NAME_MOST = 1000              # characters that are kept of a name from outside
MODULES_KEPT = 256 << 20      # bytes of modules' files that a node keeps for other computations
SHARED_FROM = 1 << 20         # bytes from which a part of arguments is identified by its digest
# Bytes of such parts that a node keeps in addition to those that its jobs need
VALUES_KEPT = 4 << 30
# Bytes of waiting jobs after which links are not read, so that clients are slowed down
RECEIVE_BUDGET = 256 << 20

UNITS_MOST = 1 << 16          # units of one resource
NOT_RESOURCES = frozenset(('cpu', 'cpus', 'memory'))
GPU = 'gpu'                   # the resource whose units are devices that jobs are told of
AUTO = 'auto'                 # as many as there are

# How worker processes are started
FORK = 'fork'
SPAWN = 'spawn'

logger = logging.getLogger('dispynode')


class LazyPattern:
    """A regular expression that is compiled when it is first used: most programs need none of the
    expressions here, and `import dispy` would have to compile all of them. Its attributes are those
    of a compiled expression."""

    def __init__(self, text: Any, flags: int = 0) -> None:
        self._text = text
        self._flags = flags

    def __getattr__(self, name: str) -> Any:
        value = getattr(re.compile(self._text, self._flags), name)
        setattr(self, name, value)
        return value


RESOURCE_NAME = LazyPattern('[A-Za-z][A-Za-z0-9_.-]{0,63}')


class Listed(type):
    """This is the type of public tuples and exceptions: dir() of such a class, and with it help()
    and pydoc, lists what this project says of it, and not what every tuple or exception has. The
    standard library's `enum` does the same."""

    def __dir__(cls) -> List[str]:
        ours = []
        for base in cls.__mro__:
            if base.__module__.startswith('dispy'):
                ours.append(vars(base))
        return [
            name for name in super().__dir__()
            if name[:1] != '_' and any(name in names for names in ours)
        ]


if typing.TYPE_CHECKING or sys.version_info >= (3, 14):   # where annotations are not there yet
    from typing import NamedTuple
else:
    # `typing` compiles a function for each class, which was a fifth of the time of `import dispy`.
    # What is made for each job is of that kind all the same: it is made a little faster.
    class _TupleMaker(type):
        """Makes from the body of a class what `typing.NamedTuple` makes of it."""

        def __new__(mcs, name, bases, body):
            if not bases:   # NamedTuple itself
                return super().__new__(mcs, name, bases, body)
            names = tuple(body.setdefault('__annotations__', {}))
            defaults = {field: body[field] for field in names if field in body}
            for place, field in enumerate(names):
                body[field] = _field_at(place, '')
            body.update(__slots__=(), _fields=names, _field_defaults=defaults,
                        __match_args__=names)
            return type(name, (_NamedFields, ), body)

    class NamedTuple(metaclass=_TupleMaker):
        """The base of tuples whose items have names, with types and possibly defaults."""

    class _NamedFields(tuple):
        """The methods that all of these tuples have."""
        __slots__ = ()
        _fields = ()
        _field_defaults = {}

        def __new__(cls, *args, **kwargs):
            if kwargs or len(args) != len(cls._fields):
                args = cls._complete(args, kwargs)
            return _new_tuple(cls, args)

        @classmethod
        def _complete(cls, args, kwargs):
            """Return the items in order, from those that are given by position, by name or by
            default."""
            given = dict(zip(cls._fields, args))
            items = {**cls._field_defaults, **given, **kwargs}
            if len(args) > len(cls._fields) or set(items) != set(cls._fields) or \
                    not given.keys().isdisjoint(kwargs):
                names = ', '.join(cls._fields)
                raise TypeError('%s takes %s, and was given %d values and the names %s' % (
                    cls.__name__, names, len(args), list(kwargs)))
            return [items[field] for field in cls._fields]

        @classmethod
        def _make(cls, items):
            return cls(*items)

        def _replace(self, **kwargs):
            return type(self)(**{**self._asdict(), **kwargs})

        def _asdict(self):
            return dict(zip(self._fields, self))

        def __repr__(self):
            items = ['%s=%r' % pair for pair in zip(self._fields, self)]
            return '%s(%s)' % (type(self).__name__, ', '.join(items))

        def __getnewargs__(self):
            return tuple(self)

    _new_tuple = tuple.__new__
    _field_at = getattr(collections, '_tuplegetter', None) or (
        lambda place, text: property(operator.itemgetter(place)))


class DispyError(Exception, metaclass=Listed):
    """The base class of the errors that this project defines."""


class PeerError(DispyError):
    """The peer violated the protocol, and its link is closed."""


class LinkBroken(DispyError):
    """The connection was closed without a Bye message."""


class HandshakeError(DispyError):
    """The handshake failed; the text says why and how to fix it."""


class Silence(HandshakeError):
    """The peer did not send within the time limit what the handshake requires."""


class ClosedAtOnce(HandshakeError):
    """The peer closed the connection before it had sent anything."""


class WrongDigest(ValueError):
    """The content of a file is not the announced one."""


class TooLarge(ValueError):
    """A message is larger than a frame may be."""


class SecretError(DispyError, ValueError):
    """The secret, its file or the certificate cannot be used."""


class StartError(DispyError):
    """The daemon cannot start; the text says what is wrong and which option changes it."""


class LoopFailed(DispyError):
    """The loop has failed many times within a second, and nothing that it serves was to blame."""


# --------------------------------------------------------------------------------------------------
# Values and messages: what is sent between processes. Nothing here opens a socket, reads a clock or
# takes a lock.
# --------------------------------------------------------------------------------------------------

class Role(enum.IntEnum):
    """The role of a process on a link. A process to which nodes connect (--scheduler-host) has the
    role SCHEDULER on these links, even if it is a client that listens."""
    CLIENT = 1
    NODE = 2
    SCHEDULER = 3


class Outcome(enum.IntEnum):
    """How an attempt ended. The outcome determines what the payload of the result is."""
    RETURNED = 1       # pickled value, of plain builtins only: opening it runs no code
    RETURNED_CODE = 2  # pickled value of other types: opening it runs the user's code
    RAISED = 3         # u32 length, traceback text, pickled exception or nothing
    DIED = 4           # text: the worker process ended
    CANCELLED = 5      # text
    TIMED_OUT = 6      # text
    STOPPED = 7        # text: the node is being stopped; the job may have done a part of its work
    PROVISIONAL = 8    # as RETURNED, of a job that goes on
    PROVISIONAL_CODE = 9   # as RETURNED_CODE, of a job that goes on
    OUT_OF_MEMORY = 10     # text
    ABANDONED = 11         # text; of a scheduler only


class AttemptHistory(NamedTuple):
    """What a node or a scheduler still knows of attempts of a computation that it does not hold any
    more: serial numbers and no data.
    An attempt that is in none of the lists never arrived or never began, provided that `whole` is
    true."""
    whole: bool = True                     # everything that ever came is known
    unbegun: FrozenSet[int] = frozenset()  # returned while no client was connected
    lost: FrozenSet[int] = frozenset()     # had begun, and ended with the process of the node
    given_up: FrozenSet[int] = frozenset()   # had begun, and their results were discarded
    text: str = ''                         # why they were discarded

    def row(self) -> tuple:
        """Return the history in the form that messages carry; the row is empty if there is nothing
        to report."""
        if self == AttemptHistory():
            return ()
        return (self.whole, *(sorted(serials) for serials in self[1:4]), self.text)

    @classmethod
    def of(cls, row: Sequence[Any]) -> 'AttemptHistory':
        """Return the history that `row` has converted."""
        if not row:
            return cls()
        return cls(row[0], frozenset(row[1]), frozenset(row[2]), frozenset(row[3]), row[4])

    def and_also(self, other: 'AttemptHistory') -> 'AttemptHistory':
        """Return the union of both histories."""
        whole = self.whole and other.whole
        unbegun = self.unbegun | other.unbegun
        lost = self.lost | other.lost
        given_up = self.given_up | other.given_up
        text = other.text or self.text
        return AttemptHistory(whole, unbegun, lost, given_up, text)


class Holder(NamedTuple):
    """The process that holds a node which others want to use.

    host, pid - the name of its host, and its process ID there
    port - the port at which it serves programs if it is a scheduler, else 0
    is_away - whether its connection to the node is lost
    """
    host: str
    pid: int
    port: int
    is_away: bool


class Reason(NamedTuple):
    """A reason for which a node does not take a computation, and whether this reason can pass by
    itself. If it can, the client tries again after waits that grow; otherwise the refusal is final
    until the node or the computation is replaced."""
    about: str
    passes: bool


# The codes of Refused, and those that a client itself determines (the last five)
REASONS: Dict[str, Reason] = {
    'busy': Reason('another client holds the node', True),
    'fault': Reason('a fault of the node itself while it served the computation', True),
    'closing': Reason('the same computation is still being closed there', True),
    'stopping': Reason('the node is being stopped', True),
    'paused': Reason('it takes no new jobs: hours of service, or its operator', True),
    'released': Reason('its operator has released it from this client', True),
    'room': Reason('no room for files, or no more files, descriptors or memory', True),
    'process': Reason('the process that runs setup could not be started, or was killed', True),
    'worker': Reason('workers die before they run anything', True),
    'transfer': Reason(
        'a file is not as it was announced, too large, or has a name that is refused', False),
    'code': Reason('the code of the computation cannot even be loaded there', False),
    'setup': Reason(
        'the code could not be loaded, or setup raised, returned something or did not end', False),
    'initializer': Reason('the initializer of an executor has failed in a worker', False),
    'python': Reason('it does not have the Python that was asked for', False),
    'start_method': Reason('it cannot start workers in the way that was asked for', False),
    'version': Reason('functions cannot go there as source', False),
    'allocate': Reason("the program's allocate() has failed or wants none", False),
    'cpus': Reason('it has no CPU to use for this computation', False),
    'module': Reason('a file of a module of the program cannot be read', False),
    'source': Reason('the program that could give the source is not connected', True),
}
SHORTAGES = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN))


def reason_of(exc: BaseException) -> str:
    """Return the code of a failure to store files or to start a process."""
    if getattr(exc, 'errno', None) in SHORTAGES:
        return 'room'
    if isinstance(exc, MemoryError):
        return 'room'
    return 'transfer'


class ClientHello(NamedTuple):
    """A client introduces itself with the first message on a link: its name, which other users may
    see, and its heartbeat interval in seconds. NodeHello answers it. `process` has the same
    information for programs: a row (host, PID, port at which it serves programs if it is a
    scheduler, else 0). Minor version 1 does not have this field."""
    name: str
    pulse: float
    process: tuple = ()


class Compute(NamedTuple):
    """A client sends a computation. The message may be repeated after a link broke. Need, Ready or
    Refused answers it."""
    comp: str
    spec: dict


class Jobs(typing.NamedTuple):
    """A client sends attempts to run, as rows of (serial, payload, options or None). Results answer
    them. The option `values` has rows (size, digest) of those parts of the payload that are sent
    apart from it; a node that lacks one asks for it with Need."""
    comp: str
    rows: list


class Cancel(NamedTuple):
    """A client wants these attempts to end. The result of each attempt is the answer, whatever the
    outcome is."""
    comp: str
    serials: list


class ReturnJobs(NamedTuple):
    """A client wants those of these attempts returned that have not begun. JobsReturned, Started or
    Results answers for each of them. A scheduler that receives this message cancels those of these
    jobs that have not begun; Started or Results answers for each."""
    comp: str
    serials: list


class Ack(typing.NamedTuple):
    """A client has received these results, and the node forgets them."""
    comp: str
    serials: list


class Done(NamedTuple):
    """A client does not need a computation any more; the node kills those of its jobs that still
    run."""
    comp: str


class Limit(NamedTuple):
    """A client says how many CPUs a computation that is set up may use at once from now on."""
    comp: str
    cpus: int


class Shutdown(NamedTuple):
    """A client wants the node to end together with its lease; the node complies if it was started
    with --client-shutdown."""
    comp: str


class Query(NamedTuple):
    """A client asks which jobs of this computation the node has. Report answers it."""
    comp: str


class Reclaim(NamedTuple):
    """A client, which may be another process than the one that began the computation, takes over
    all jobs and results of it. `key` authorizes this: only the program and its recovery file have
    the key, and `spec['key']` is the digest of it. KnownAttempts and Results answer it. If `take`
    is false, the client only asks: nothing changes its owner, and no results are sent."""
    comp: str
    key: bytes = b''
    take: bool = True


class NodeHello(NamedTuple):
    """A node answers ClientHello with its name, the number of CPUs that it offers, and facts
    (python, platform, cloudpickle, ...)."""
    name: str
    cpus: int
    facts: dict


class Refused(NamedTuple):
    """A node does not serve this computation or, if the name is empty, this client; the code is for
    programs, the text for people. `holder` is a row of Holder if another client holds the node,
    else it is empty. Minor version 1 does not have this field."""
    comp: str
    code: str
    text: str
    holder: tuple = ()


class Need(NamedTuple):
    """A node asks for files, each identified by the fields `purpose`, `key` and `row` of FilePiece.
    This message answers Compute, and is also sent when a job needs modules."""
    comp: str
    files: list


class Ready(NamedTuple):
    """A node has set up the computation. `held` are the serials of the attempts that the node
    knows: those that run, wait, or have ended and are not acknowledged. `past` is a row of
    AttemptHistory."""
    comp: str
    held: list
    past: tuple = ()


class Results(typing.NamedTuple):
    """A node sends results, as rows of (serial, outcome, start, end, payload, stdout, stderr). The
    times are in seconds since the epoch. Ack answers them."""
    comp: str
    rows: list


# Indexes of a row of Results, which is a plain tuple on the wire and stays one: each job has one
SERIAL, OUTCOME, START, END, PAYLOAD, STDOUT, STDERR = range(7)


class JobsReturned(NamedTuple):
    """A node returns attempts that it has never started. This message answers ReturnJobs, and is
    also sent when a node stops."""
    comp: str
    serials: list


class Started(NamedTuple):
    """A node or scheduler says that these attempts have begun, as rows of (serial, seconds since
    its start). The message is sent for attempts that have run for about 20 ms and for those that
    ReturnJobs named too late. For all others, the result shows that they have begun."""
    comp: str
    rows: list


class Output(NamedTuple):
    """A node sends what a running job has printed to stream 1 or 2, from byte `offset` on, if the
    client has asked for live output; or it sends a record of the job's logging (stream 0; `data` is
    a plain pickle of level, logger and text)."""
    comp: str
    serial: int
    stream: int
    offset: int
    data: Any


class CpusChanged(NamedTuple):
    """A node says how many CPUs it offers from now on; 0 means that it takes no new jobs. The
    message also goes to clients that were refused because another client held the node, when the
    node becomes free."""
    cpus: int


class KnownAttempts(NamedTuple):
    """A node answers Reclaim with the serials of the attempts that it knows: those that run, wait,
    or have ended and are not acknowledged. `past` is a row of AttemptHistory."""
    comp: str
    serials: list
    past: tuple = ()


class Report(NamedTuple):
    """A node answers Query with pairs of (serial, seconds since its start) of jobs that run, the
    serials that wait, the free resources of the host (as `availability` returns them), with `busy`,
    the number of running jobs of all computations, and with `holder`, a text for people, which is
    empty if the node is free."""
    comp: str
    running: list
    waiting: list
    available: dict


class Notice(NamedTuple):
    """A node or scheduler has a warning for the client's log."""
    comp: str
    text: str


class Call(NamedTuple):
    """Either side sends a request to the other; `name` is the name of the procedure. Return answers
    it."""
    comp: str
    number: int
    name: str
    args: tuple


class Return(NamedTuple):
    """This answers Call with a value, or with the type and the text of an error."""
    comp: str
    number: int
    error: tuple
    value: Any


class Purpose(enum.IntEnum):
    """What a file that is transferred is for. A purpose, a computation and a key identify a
    transfer."""
    DEPENDS = 1    # a file of the computation, asked for by Need
    MODULES = 2    # a file of the user's modules, asked for by Need
    PLACED = 3     # a file that the client sends to a computation that is set up; the key is 0
    FROM_JOB = 4   # a file that a running job sends to the client; the key is its serial
    VALUES = 5     # a part of arguments, known by its digest, asked for by Need


FOR_CODE = frozenset((Purpose.DEPENDS, Purpose.MODULES))   # each is useless without the other
ASKED_FOR = FOR_CODE | {Purpose.VALUES}   # the key is the one in Need


class FilePiece(NamedTuple):
    """Either side sends a piece of a file, in order of offset; an empty file is one empty piece.
    `row` has the file's name, size, digest and mode. FileStored answers the last piece, or the
    first one that cannot be stored, unless the file was requested with Need: in that case Ready or
    Refused follows."""
    comp: str
    purpose: int
    key: int
    row: tuple
    offset: int
    data: Any


class FileStored(NamedTuple):
    """This answers FilePiece: the file is stored, or the text says why it is not. A client also
    sends this message for a value that a node has requested and that the client does not have."""
    comp: str
    purpose: int
    key: int
    name: str
    error: str


class Part(NamedTuple):
    """Either side sends a part of one row of Jobs or Results that is too large for a frame, in
    order of offset. The first part contains the row, with `HOLLOW` in the place of its payload, and
    all parts contain the total size. When the payload is complete, it is treated as if the message
    had come with this row alone. Other messages may come between parts, but no parts of another row
    of the same computation. A first part discards what has been received of another row of its
    computation; one with a total of 0 begins no row and says that the rest of the previous one will
    not come. `data` is a buffer, or a tuple of buffers."""
    comp: str
    row: tuple
    total: int
    offset: int
    data: Any


class Unfit(NamedTuple):
    """This is never sent. It takes the place of Jobs when the receiver has no memory for the
    arguments in this row."""
    comp: str
    row: tuple
    text: str


class Pulse(NamedTuple):
    """Either side shows that it is alive."""


class Bye(NamedTuple):
    """Either side ends this link on purpose. A link that ends without this message is broken and
    not closed. After a node's Bye, every attempt without a result counts as never started."""
    text: str


class Wrong(NamedTuple):
    """Either side says, as its last message on a link, that it cannot use the frame of this number,
    counted from 0. The other side must not send the same message again immediately. This message
    says nothing about earlier frames."""
    text: str
    frame: int


MAX_CONTROL = 64 * 1024
MAX_LIST = 16 << 20
MAX_BULK = MAX_FRAME
LIST = NAMES_MOST + (4 << 20)
BUFFERS_MOST = 1 << 16        # out-of-band buffers of an envelope
# Op on the wire -> (message, limit of its payload in bytes)
MESSAGES: Dict[int, Tuple[type, int]] = {
    1: (ClientHello, MAX_CONTROL),
    2: (Compute, MAX_BULK),
    4: (Jobs, MAX_BULK),
    5: (Cancel, MAX_LIST),
    6: (ReturnJobs, MAX_LIST),
    7: (Ack, MAX_LIST),
    8: (Done, MAX_CONTROL),
    11: (Query, MAX_CONTROL),
    12: (Shutdown, MAX_CONTROL),
    13: (Reclaim, MAX_CONTROL),
    14: (Limit, MAX_CONTROL),
    33: (NodeHello, MAX_LIST),
    34: (Refused, MAX_LIST),
    35: (Need, MAX_LIST),
    36: (Ready, LIST),
    37: (Results, MAX_BULK),
    38: (JobsReturned, MAX_LIST),
    39: (CpusChanged, MAX_CONTROL),
    41: (Output, 2 * FILE_PIECE),
    43: (Report, MAX_LIST),
    44: (KnownAttempts, LIST),
    45: (Started, MAX_LIST),
    50: (Notice, MAX_LIST),
    65: (Pulse, MAX_CONTROL),
    66: (Bye, MAX_CONTROL),
    67: (Call, MAX_LIST),
    68: (Return, MAX_LIST),
    69: (Wrong, MAX_CONTROL),
    70: (FilePiece, 2 * FILE_PIECE),
    71: (FileStored, MAX_CONTROL),
    72: (Part, 4 * FILE_PIECE),
}
OPS = {message: op for op, (message, _) in MESSAGES.items()}
# Messages to which a minor version has added fields at the end: that version, and the values of the
# fields for a peer that does not speak it
LATER_FIELDS: Dict[type, Tuple[int, tuple]] = {ClientHello: (2, ((), )), Refused: (2, ((), ))}
# What a node, or a scheduler, takes from the other side of a link
OF_CLIENTS = frozenset(op for op in MESSAGES if op < 32 or op >= 64)
SPEAK_OF_COMPS = {
    message for message in OPS
    if message._fields[:1] == ('comp',)}  # type: ignore[attr-defined]
# Nothing else checks the structure of some of their fields.
LOOSE = {Compute, NodeHello, Call, Return, Report}
KEY_SIZE = 32    # bytes of the digest of a computation's key
DIGEST_SIZE = 32


def digest_of(key: bytes) -> bytes:
    """Return the digest of a computation's key, which is all that others than its program know of
    the key."""
    if key:
        digester = hashlib.sha256(b'dispy 5 key' + key)
        return digester.digest()
    return bytes(KEY_SIZE)


def may_reclaim(digest: bytes, key: bytes) -> bool:
    """Return whether this key is that of a computation; any key is valid for a computation that was
    begun without one."""
    if not digest.strip(b'\0'):
        return True
    return hmac.compare_digest(digest, digest_of(key))


_TYPES_OF_ANNOTATIONS = {float: (float, int), Any: object}


def _field_types(message: type) -> Tuple[Any, ...]:
    """Return the types that the fields of a message have after it was received."""
    found: List[Any] = []
    for kind in message.__annotations__.values():
        # A text where annotations are not evaluated; typing.NamedTuple wraps it
        text = getattr(kind, '__forward_arg__', kind)
        if isinstance(text, str):
            kind = Any if text == 'Any' else getattr(builtins, text)
        found.append(_TYPES_OF_ANNOTATIONS.get(kind, kind))
    return tuple(found)


FIELD_TYPES = {message: _field_types(message) for message in OPS}


def serial_of(job: int, attempt: int = 0) -> int:
    """Return the serial number of an attempt of the job with this number."""
    return job << 16 | attempt


def job_number(serial: int) -> int:
    """Return the number of a job, by the serial number of one of its attempts."""
    return serial >> 16


def attempt_number(serial: int) -> int:
    """Return which attempt of its job has this serial number. The first is 1; 0 stands for none."""
    return serial & 0xffff


Request = Tuple[Tuple[str, int], ...]   # names of resources and how many units of each
Buffer = Union[bytes, bytearray, memoryview]
Payload = Union[Buffer, Tuple[Buffer, ...]]


def pieces_of(payload: Payload) -> Tuple[Buffer, ...]:
    """Return the pieces of a payload, in the order in which they are written."""
    return payload if type(payload) is tuple else (payload,)  # type: ignore[return-value]


def in_one_piece(payload: Payload) -> bytes:
    """Return a payload as one bytes object."""
    return b''.join(pieces_of(payload))


def size_of(payload: Payload) -> int:
    """Return the number of bytes of a payload."""
    if type(payload) is tuple:
        return sum(len(piece) for piece in payload)
    return len(payload)  # type: ignore[arg-type]


def shorten(text: str, most: int = TEXT_MOST) -> str:
    """Return a text in at most `most` characters: the middle of a longer text is left out."""
    if len(text) <= most:
        return text
    half = most // 2
    tail = text[-half:]
    return '%s\n[dispy: %d characters left out here]\n%s' % (text[:half], len(text) - 2 * half,
                                                             tail)


def over_limit(what: str, size: int) -> str:
    """Return the error text for a value of a job that is too large."""
    if size <= VALUE_MOST:
        limit = '%d bytes of memory are free on the node' % (free_memory() or 0)
    else:
        limit = 'the limit for one value is %d' % VALUE_MOST
    return '%s has %d bytes, and %s: return less of it, or write it to a file and send ' \
        'that with dispy_send_file' % (what, size, limit)


def is_over_limit(size: int) -> bool:
    """Return whether a value of a job is too large to be returned, either because of the limit or
    because of the free memory."""
    if size > VALUE_MOST:
        return True
    if not size > LAZY:
        return False
    return size > (free_memory() or size)


def limit_values(most: int) -> None:
    """Set the largest size in bytes of values that this process accepts and makes (--max-value).
    Raises StartError."""
    global VALUE_MOST
    if most < BATCH_BYTES:   # fewer bytes are not examined one by one
        text = '--max-value %d: the least is %d' % (most, BATCH_BYTES)
        raise StartError(text)
    VALUE_MOST = min(most, VALUE_MOST)
    FROM_WORKER[RecordType.RESULT] = (VALUE_MOST, OUTPUT_MOST, OUTPUT_MOST)


def out_of_band(payload: Payload) -> Any:
    """Return the payload in the form that an envelope carries: small payloads are inside of the
    envelope, large ones are out of band and are not copied."""
    if type(payload) is tuple:
        return tuple(out_of_band(piece) for piece in payload)
    if type(payload) is bytes:
        if len(payload) < OUT_OF_BAND:
            return payload
    # Of a subclass
    if isinstance(payload, bytes):
        if len(payload) < OUT_OF_BAND:
            return b''.join((payload,))
    return pickle.PickleBuffer(payload)  # type: ignore[arg-type]


def with_size(row: tuple) -> Tuple[tuple, int]:
    """Return a row of Results in the form that an envelope carries, and the size of the row in
    bytes."""
    payload, stdout, stderr = row[PAYLOAD:]
    if type(payload) is type(stdout) is type(stderr) is bytes:   # nearly always
        size = len(payload) + len(stdout) + len(stderr)
    else:
        size = size_of(payload) + size_of(stdout) + size_of(stderr)
    if size < OUT_OF_BAND:
        if type(payload) is bytes:
            return row, size
    return (*row[:PAYLOAD], *map(out_of_band, row[PAYLOAD:])), size


def are_small(rows: Sequence[tuple]) -> bool:
    """Return whether these rows of Results can travel in one message as they are; nearly always."""
    size = 0
    for row in rows:
        payload = row[PAYLOAD]
        if type(payload) is not bytes or row[STDOUT] or row[STDERR]:
            return False
        size += len(payload)
    return size < OUT_OF_BAND and len(rows) <= ROWS_MOST


def batches(kind: Callable[[str, list], Any], comp: str,
            rows: Iterable[Tuple[tuple, int]]) -> Iterator[Any]:
    """Yield messages `kind(comp, rows)` of about BATCH_BYTES bytes each. `rows` has pairs of a row
    and its size in bytes."""
    some = []
    filled = 0
    for row, size in rows:
        some.append(row)
        filled += size
        if filled >= BATCH_BYTES or len(some) >= ROWS_MOST:
            # Alone, because it may have to be sent in parts
            if size >= BATCH_BYTES:
                if len(some) > 1:
                    yield kind(comp, some[:-1])
                    some = some[-1:]
            yield kind(comp, some)
            some = []
            filled = 0
    if some:
        yield kind(comp, some)


HOLLOW = bytes(4)    # replaces a payload; valid for every outcome


class InParts:
    """A message with one row that is too large for a frame. It is sent in parts, as the link has
    room for them."""

    def __init__(self, message: Any) -> None:
        self.message = message
        self.comp, (self.row,) = message
        if len(self.row) == 7:
            place = 4
        else:
            place = 1
        pieces = pieces_of(self.row[place])
        self._buffers = [memoryview(piece).cast('B') for piece in pieces]
        self.total = self.left = sum(map(len, self._buffers))
        self.row = (*self.row[:place], HOLLOW, *self.row[place + 1:])
        self._parts = self._made()

    def next(self) -> Optional[Part]:
        """Return the next part; None after the last one."""
        return next(self._parts, None)

    def _made(self) -> Iterator[Part]:
        row = self.row
        offset = 0
        some: List[pickle.PickleBuffer] = []
        filled: int = 0
        for buffer in self._buffers:
            start = 0
            while start < len(buffer):
                piece = buffer[start:start + FILE_PIECE - filled]
                out_of_band = pickle.PickleBuffer(piece)
                some.append(out_of_band)
                start = start + len(piece)
                filled = filled + len(piece)
                if filled < FILE_PIECE:
                    if offset + filled < self.total:
                        continue
                self.left -= filled
                yield Part(self.comp, row, self.total, offset, tuple(some))
                row = ()
                offset = offset + filled
                some = []
                filled = 0


def needs(comp: str, files: Iterable[tuple]) -> Iterator[Need]:
    """Yield Need messages that ask for these files, each (purpose, key, row) as in FilePiece."""
    sizes = ((file, 4 * len(file[2][0]) + 128) for file in files)  # type: ignore[misc]
    return batches(Need, comp, sizes)  # type: ignore[arg-type]


def in_parts(kind: Callable[[str, list], Any], comp: str, serials: Sequence[int]) -> Iterator[Any]:
    """Yield messages `kind(comp, serials)` of bounded length."""
    for start in range(0, len(serials), SERIALS_MOST):
        yield kind(comp, list(serials[start:start + SERIALS_MOST]))


def plain_text(value: str) -> str:
    """Return a new `str` with the same characters, even for an instance of a subclass."""
    if type(value) is str:
        return value
    return ''.join((value, ''))


class Bounds(NamedTuple):
    """What an envelope may cost the process that opens it."""
    size: int        # bytes
    operations: int  # of the pickle; each makes at most one object of less than 100 bytes
    dicts: int


ITEMS_MOST = 256     # of one dict: the time for colliding keys grows with the square of it


class PlainReader:
    """Reads the operations of a pickle without executing them, before the pickle is opened. It
    bounds the cost of a pickle by its size: it accepts plain values only, no memo index but the
    next one (a larger index would allocate memory up to that index), no dictionary that is filled
    again and again, and no number of more than 255 bytes. It tracks the height of the unpickler's
    stack.
    Messages of thousands of rows are read here: hence one loop, and a table for what most
    operations do.
    """
    # Operation -> (bytes that it occupies, its change of the height of the stack); operations of
    # variable length and those that use the stack are below
    FIXED = {
        pickle.PROTO: (2, 0), pickle.FRAME: (9, 0), pickle.NONE: (1, 1), pickle.NEWTRUE: (1, 1),
        pickle.NEWFALSE: (1, 1), pickle.BININT: (5, 1), pickle.BININT1: (2, 1),
        pickle.BININT2: (3, 1), pickle.BINFLOAT: (9, 1), pickle.EMPTY_TUPLE: (1, 1),
        pickle.EMPTY_LIST: (1, 1), pickle.TUPLE1: (1, 0), pickle.TUPLE2: (1, -1),
        pickle.TUPLE3: (1, -2), pickle.APPEND: (1, -1), pickle.MEMOIZE: (1, 0),
        pickle.NEXT_BUFFER: (1, 1), pickle.READONLY_BUFFER: (1, 0)
    }
    # Operation -> size of the length field that follows it; then as many bytes follow, which are
    # one object
    COUNTED = {
        pickle.LONG1: 1, pickle.SHORT_BINUNICODE: 1, pickle.BINUNICODE: 4, pickle.BINUNICODE8: 8,
        pickle.SHORT_BINBYTES: 1, pickle.BINBYTES: 4, pickle.BINBYTES8: 8, pickle.BYTEARRAY8: 8
    }
    STEPS = [0] * 256
    GROWTH = [0] * 256
    LENGTHS = [0] * 256
    for _name, (_step, _growth) in FIXED.items():
        STEPS[_name[0]], GROWTH[_name[0]] = _step, _growth
    for _name, _length in COUNTED.items():
        LENGTHS[_name[0]] = _length

    def __init__(self, data: Buffer, bounds: Bounds) -> None:
        if len(data) > bounds.size:
            text = 'an envelope of %d bytes is over the limit of %d' % (len(data), bounds.size)
            raise PeerError(text)
        self._data = data
        self._bounds = bounds
        self._height = 0
        self._marks: List[int] = []
        self._items: Dict[int, int] = {}   # height of a dict on the stack -> its number of items
        self._dicts = 0

    # A sequence of operations without dicts, which a regular expression matches in a tenth of the
    # time; of numbers, bytes and strings it has the short ones.
    _RUN = LazyPattern(
        rb'(?:[N\x88\x89)\]\x85\x86\x87ae(t\x94\x97\x98]|[Kh\x80].|M..|[Jj].{4}|[G\x95].{8}'
        rb'|\x8a(?:\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8})|[C\x8c](?:' +
        b'|'.join(re.escape(bytes((size, ))) + b'.{%d}' % size for size in range(41)) + rb'))*',
        re.DOTALL)

    def check(self) -> None:
        """Read the whole pickle. Raises PeerError for one that is not allowed, and IndexError for
        one that is truncated."""
        if len(self._data) > self._bounds.operations or not self._is_without_dicts():
            self._follow()

    def _is_without_dicts(self) -> bool:
        """Return whether the pickle can be read to its end without tracking the stack, since no
        operation makes a dictionary."""
        data = self._data
        lengths = self.LENGTHS
        run = self._RUN.match
        at = 0
        while True:
            at = run(data, at).end()  # type: ignore[union-attr]
            operation = data[at]
            length = lengths[operation]
            if length == 1:
                at += 2 + data[at + 1]
            elif length:
                at += 1 + length + int.from_bytes(data[at + 1:at + 1 + length], 'little')
            else:
                if operation != 0x2e:
                    return False
                return at + 1 == len(data)   # STOP

    def _follow(self) -> None:
        data = self._data
        steps = self.STEPS
        growth = self.GROWTH
        lengths = self.LENGTHS
        at = height = 0
        for _ in range(self._bounds.operations):
            operation = data[at]
            step = steps[operation]
            if step:
                at += step
                height += growth[operation]
                continue
            length = lengths[operation]
            if length:
                if length == 1:
                    at += 2 + data[at + 1]
                else:
                    begin = at + 1
                    at = begin + length
                    at += int.from_bytes(data[begin:at], 'little')
                height += 1
            elif operation == 0x2e:   # STOP
                if at + 1 != len(data):
                    raise PeerError('an envelope goes on behind its end')
                return
            else:
                self._height = height
                at += self._special(operation)
                height = self._height
        text = 'an envelope has more than %d operations' % self._bounds.operations
        raise PeerError(text)

    def _special(self, operation: int) -> int:
        """Check an operation that uses the stack. Returns the number of bytes that it occupies."""
        name = b'%c' % operation
        if name == pickle.MARK:
            self._marks.append(self._height)
        elif name == pickle.TUPLE:
            self._height = self._marks.pop() + 1
        elif name == pickle.APPENDS:
            self._height = self._marks.pop()
        elif name == pickle.SETITEMS:
            mark = self._marks.pop()
            count = (self._height - mark) // 2
            self._fill(mark, count)
            self._height = mark
        elif name == pickle.SETITEM:
            self._height -= 2
            self._fill(self._height, 1)
        elif name == pickle.EMPTY_DICT:
            self._height += 1
            self._items[self._height] = 0
            self._dicts += 1
            if self._dicts > self._bounds.dicts:
                text = 'an envelope has more than %d dicts' % self._bounds.dicts
                raise PeerError(text)
        elif name in (pickle.BINGET, pickle.LONG_BINGET):
            self._height += 1
            self._items.pop(self._height, None)   # perhaps a dict that is full
            if name == pickle.BINGET:
                return 2
            return 5
        elif name in (pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.INST):
            raise PeerError(
                'an envelope names a class or function; envelopes hold plain values only')
        else:
            raise PeerError('an envelope has operation %d; envelopes hold plain values only' %
                            operation)
        return 1

    def _fill(self, height: int, count: int) -> None:
        items = self._items.get(height)
        if items is None or items + count > ITEMS_MOST:
            raise PeerError('an envelope has a dict of more than %d items' % ITEMS_MOST)
        self._items[height] = items + count


class _Plain(pickle.Unpickler):
    """An unpickler for builtin values that refuses every name, so that bytes from outside cannot
    execute code."""

    def find_class(self, module: str, name: str) -> Any:
        text = 'an envelope names %s.%s; envelopes hold plain values only' % (module[:60],
                                                                              name[:60])
        raise PeerError(text)


def open_envelope(data: Buffer,
                  buffers: Sequence[Buffer] = (),
                  bounds: Optional[Bounds] = None) -> Any:
    """Unpickle plain builtin values. Raises PeerError for anything else, and for a pickle that
    would cost more than `bounds` allow."""
    try:
        operations = PlainReader(data, bounds or BOUNDS)
        operations.check()
        file = io.BytesIO(data)
        unpickler = _Plain(file, buffers=buffers)
        return unpickler.load()
    except PeerError:
        raise
    except Exception as exc:  # the unpickler may raise any exception on damaged input
        text = 'an envelope does not open: %s' % (exc,)
        raise PeerError(text) from exc


def open_plain(data: Buffer) -> Any:
    """Unpickle plain builtin values as `open_envelope` does, but without bounds. It is for
    processes that have the rights of the user who sent the pickle. Raises PeerError."""
    try:
        file = io.BytesIO(data)
        return _Plain(file).load()
    except Exception as exc:  # as above
        text = 'what should be plain values does not open: %s' % (exc,)
        raise PeerError(text) from exc


def is_shallow(value: Any, most: int = 20) -> bool:
    """Return whether plain containers are nested at most `most` levels deep: a deeper value cannot
    be sent on or shown."""
    level = [value]
    for _ in range(most):
        level = [part for each in level if type(each) in (tuple, list, dict)
                 for part in (each.values() if type(each) is dict else each)]
        if not level:
            return True
    for each in level:
        if type(each) in (tuple, list, dict):
            return False
    return True


_INDEX = struct.Struct('>II')


def encode(message: Any) -> Tuple[int, int, List[Buffer]]:
    """Return (op, encoding, pieces of payload) of a message. Encoding 0 is the envelope alone;
    encoding 1 is u32 number of buffers, u32 length of envelope, u64 length of each buffer,
    envelope, buffers."""
    buffers: List[pickle.PickleBuffer] = []
    body = pickle.dumps(tuple(message), 5, buffer_callback=buffers.append)
    if not buffers:
        return OPS[type(message)], 0, [body]
    raw = []
    for buffer in buffers:
        raw.append(buffer.raw())
    count = len(raw)
    head = _INDEX.pack(count, len(body)) + struct.pack('>%dQ' % count, *map(len, raw))
    return OPS[type(message)], 1, [head + body, *raw]


def _with_later_fields(message: type, fields: tuple) -> tuple:
    """Return the fields of a message, with default values for those that an older sender does not
    know."""
    _, later = LATER_FIELDS[message]
    whole = len(FIELD_TYPES[message])
    if len(fields) + len(later) == whole:
        return fields + later
    return fields


def encode_for(version: int, message: Any) -> Tuple[int, int, List[Buffer]]:
    """Return what `encode` returns, for a peer of this minor version of the protocol."""
    kind = type(message)
    since, later = LATER_FIELDS.get(kind, (0, ()))
    if version < since:
        fields = message[:-len(later)]
        message = tuple.__new__(kind, fields)
    return encode(message)


def decode(op: int, encoding: int, payload: Buffer) -> Any:
    """Return the message that `encode` has converted. The MAC of its payload must have been
    verified. Raises PeerError."""
    if op not in MESSAGES:
        raise PeerError('message %d is unknown here' % op)
    message = MESSAGES[op][0]
    bounds = BOUNDS_OF.get(message, BOUNDS)
    if encoding == 0:
        fields = open_envelope(payload, (), bounds)
    elif encoding == 1:
        fields = open_envelope(*_split(memoryview(payload)), bounds)
    else:
        raise PeerError('encoding %d is unknown here' % encoding)
    kinds = FIELD_TYPES[message]
    if message in LATER_FIELDS and type(fields) is tuple:
        fields = _with_later_fields(message, fields)
    if type(fields) is not tuple or len(fields) != len(kinds) or not all(
            map(isinstance, fields, kinds)):
        text = '%s with wrong fields' % message.__name__
        raise PeerError(text)
    check = CHECKS.get(message)
    try:
        if message in SPEAK_OF_COMPS:
            right = is_comp(fields[0])
        else:
            right = True
        right = right and (check is None or check(fields))
        right = right and (message not in LOOSE or is_shallow(fields))
    except Exception:  # for example for an int that is too large for a float
        right = False
    if not right:
        raise PeerError('%s with wrong values' % message.__name__)
    return message._make(fields)  # type: ignore[attr-defined]


def is_comp(name: str) -> bool:
    """Return whether a computation may have this name; the empty name stands for no computation."""
    if len(name) > 64:
        return False
    if not (name.isalnum() or not name):
        return False
    return name.isascii()


_NUMBERS = frozenset((int, float))
_BUFFER_TYPES = frozenset((bytes, memoryview))


def _is_buffer(value: Any) -> bool:
    return type(value) in _BUFFER_TYPES


def _is_payload(value: Any) -> bool:
    if _is_buffer(value):
        return True
    if type(value) is not tuple:
        return False
    return all(map(_is_buffer, value))


def is_serial(value: Any) -> bool:
    if type(value) is not int:
        return False
    return 0 <= value < 1 << 63


def _is_number(value: Any) -> bool:
    if type(value) not in _NUMBERS:
        return False
    return math.isfinite(value)


# Options of a job, and those that are not numbers
_NAMES_OF_OPTIONS = frozenset(('cpus', 'timeout', 'memory', 'priority', 'retries', 'node',
                               'values', 'resources'))
_OTHER_OPTIONS = frozenset(('node', 'values', 'resources'))


def _is_options(value: Any) -> bool:
    if type(value) is not dict:
        return False
    if set(value) - _NAMES_OF_OPTIONS:
        return False
    if not all(_is_number(option) for name, option in value.items() if name not in _OTHER_OPTIONS):
        return False
    if not is_request(value.get('resources', ())):
        return False
    cpus = value.get('cpus', 1)
    if type(cpus) is not int:
        return False
    if not value.get('cpus', 1) >= 1:
        return False
    node = value.get('node', '')
    if not _is_key(node):
        return False
    rows = value.get('values', ())
    return _are_values(rows)


def is_request(rows: Any) -> bool:
    """Return whether these are pairs (name, units) of resources, in the order of the names."""
    if type(rows) is not tuple:
        return False
    for row in rows:
        if type(row) is not tuple:
            return False
        if len(row) != 2:
            return False
        if type(row[0]) is not str:
            return False
        if not RESOURCE_NAME.fullmatch(row[0]):
            return False
        if type(row[1]) is not int:
            return False
        if not 1 <= row[1] <= UNITS_MOST:
            return False
    names = [name for name, _ in rows]
    return names == sorted(set(names))


def _are_values(rows: Any) -> bool:
    """Return whether these are sizes and digests of values."""
    if not (type(rows) is tuple and len(rows) <= BUFFERS_MOST):
        return False
    return all(map(_is_value, rows))


def _is_value(row: Any) -> bool:
    if type(row) is not tuple:
        return False
    if len(row) != 2:
        return False
    if type(row[0]) is not int:
        return False
    if not (0 < row[0] < 1 << 62):
        return False
    if type(row[1]) is not bytes:
        return False
    return len(row[1]) == DIGEST_SIZE


def _is_key(value: Any) -> bool:
    """Return whether this can be the key by which a scheduler identifies a node."""
    if type(value) is str:
        return True
    if type(value) is not tuple:
        return False
    for part in value:
        if type(part) not in (str, int):
            return False
    return True


def _is_job(row: Any) -> bool:
    if type(row) is not tuple:
        return False
    if len(row) != 3:
        return False
    if not is_serial(row[0]):
        return False
    if not (type(row[1]) is bytes or _is_payload(row[1])):
        return False
    if row[2] is None:
        return True
    return _is_options(row[2])


def _is_result(row: Any) -> bool:
    if type(row) is not tuple:
        return False
    if len(row) != 7:
        return False
    serial, outcome, start, end, *buffers = row
    # Each result is checked here, so that calls are avoided. `is_outcome` excludes values that are
    # not finite numbers.
    if type(serial) is not int:
        return False
    if not 0 <= serial < 1 << 63:
        return False
    if type(outcome) is not int:
        return False
    if outcome not in OUTCOMES:
        return False
    if type(start) not in _NUMBERS:
        return False
    if type(end) not in _NUMBERS:
        return False
    if not _BUFFER_TYPES.issuperset(map(type, buffers)):
        return False
    return is_outcome(outcome, start, end, *buffers)


def refused_row(row: tuple, text: str) -> tuple:
    """Return the row that replaces a result which the other side could not use; it contains the
    output of the job."""
    size = sum(map(size_of, row[4:]))
    text = '%s (%d bytes): let the job return less, or send a file (dispy_send_file)' % (text, size)
    return (row[SERIAL], int(Outcome.DIED), row[START], row[END], text.encode('utf-8', 'replace'),
            b'', b'')


def is_outcome(outcome: int, start: float, end: float, payload: Buffer, stdout: Buffer,
               stderr: Buffer) -> bool:
    """Return whether times, sizes and the payload of a result are plausible."""
    if outcome == 1 and payload and not stdout and not stderr:   # it has returned: nearly always
        return 0.0 <= start <= end <= LATEST
    size = len(payload)   # its limit is that of frames, parts and records
    if not 0.0 <= start <= end <= LATEST:
        return False
    if len(stdout) > OUTPUT_MOST:
        return False
    if len(stderr) > OUTPUT_MOST:
        return False
    if outcome == _RAISED:   # the length of its text, the text, the exception
        if not size >= 4:
            return False
        return int.from_bytes(payload[:4], 'big') <= size - 4
    if size > 0:
        return True
    return outcome not in VALUES


def log_record_of(data: Buffer) -> Tuple[int, str, str]:
    """Return level, logger and text of a record of a job's logging. Raises PeerError."""
    record = open_envelope(data)
    if type(record) is not tuple or [type(field) for field in record] != [int, str, str] or abs(
            record[0]) >= 1 << 31:
        raise PeerError('a malformed log record')
    return record


def _is_part(fields: tuple) -> bool:
    _, row, total, offset, data = fields
    if not 0 <= offset <= total < 1 << 62:
        return False
    if not _is_payload(data):
        return False
    if bool(row) != (total > 0 == offset):
        return False
    if not row:
        return True
    if len(row) == 3:
        return _is_job(row)
    return _is_result(row)


def _is_file(row: Any) -> bool:
    """Return whether this is a row of a computation's files: name, size, digest, mode."""
    if type(row) is not tuple:
        return False
    kinds = []
    for field in row:
        kinds.append(type(field))
    if kinds != [str, int, bytes, int]:
        return False
    return row[1] >= 0


def _is_file_wanted(fields: Any) -> bool:
    """Return whether these are purpose, key and row of a file."""
    if type(fields) is not tuple:
        return False
    if len(fields) != 3:
        return False
    if type(fields[0]) is not int:
        return False
    if not (fields[0] in PURPOSES and is_serial(fields[1])):
        return False
    return _is_file(fields[2])


def _is_kept(kept: Any) -> bool:
    if type(kept) is not dict:
        return False
    for serials in kept.values():
        if not (type(serials) is list and all(map(is_serial, serials))):
            return False
    return True


def _is_past(row: tuple) -> bool:
    """Return whether this is a row of AttemptHistory, or nothing."""
    if not row:
        return True
    if len(row) != 5:
        return False
    if type(row[0]) is not bool:
        return False
    if type(row[4]) is not str:
        return False
    for serials in row[1:4]:
        if not (type(serials) is list and all(map(is_serial, serials))):
            return False
    return True


def _is_running(pair: Any) -> bool:
    if type(pair) is not tuple:
        return False
    if len(pair) != 2:
        return False
    if not is_serial(pair[0]):
        return False
    return _is_number(pair[1])


OUTCOMES = frozenset(map(int, Outcome))
RETURNED = frozenset((Outcome.RETURNED, Outcome.RETURNED_CODE))
VALUES = RETURNED | {Outcome.PROVISIONAL, Outcome.PROVISIONAL_CODE}
PURPOSES = frozenset(map(int, Purpose))
# Compared for each result; comparing a member of an enum takes longer
_RAISED = int(Outcome.RAISED)
# The outcomes that are not the end of an attempt
PROVISIONAL = frozenset((Outcome.PROVISIONAL, Outcome.PROVISIONAL_CODE))
# `kind` says what `code` contains: 'function': a pickle by value, for one minor version of Python;
# 'source': arguments of load_source in an envelope, for any version; 'program': nothing. `program`
# is the name of its file; if it is empty, the arguments of each job are a command line
# (CommandLines).
SPEC_FIELDS: Dict[str, Any] = {
    'name': str, 'kind': str, 'code': (bytes, memoryview), 'files': list, 'cleanup': bool,
    'dest_path': str, 'max_jobs': int, 'python': tuple, 'support': dict, 'program': str,
    'live': bool, 'logs': int, 'cpus': int, 'setup_args': (bytes, memoryview), 'modules': list,
    'portable': bool, 'sys_path': list, 'argv': list
}


def result_key(spec: dict) -> bytes:
    """Return the digest with which a program proves that results are its own; it consists of zeros
    for a program that has no key."""
    return spec.get('key', bytes(KEY_SIZE))  # type: ignore[no-any-return]


def _is_spec(spec: dict) -> bool:
    key = result_key(spec)
    if type(key) is not bytes:
        return False
    if len(key) != KEY_SIZE:
        return False
    for name, kind in SPEC_FIELDS.items():
        if not isinstance(spec.get(name), kind):
            return False
    if spec['kind'] not in ('function', 'source', 'program'):
        return False
    if spec['max_jobs'] < 0:
        return False
    return _has_right_parts(spec) and _has_right_options(spec)


def _has_right_parts(spec: dict) -> bool:
    """Return whether the lists and dictionaries of a spec have the right contents."""
    files = (*spec['files'], *spec['modules'])
    words = (*spec['sys_path'], *spec['argv'])
    support = spec['support']
    if not all(map(_is_file, files)):
        return False
    if not all(type(word) is str for word in (*words, *support)):
        return False
    return all(map(_is_buffer, support.values()))


def _has_right_options(spec: dict) -> bool:
    """Return whether the optional fields of a spec are right if they are present."""
    if not _is_buffer(spec.get('authkey', b'')):
        return False
    if spec.get('start_method', '') not in ('', FORK, SPAWN):
        return False
    if type(spec.get('initializer', False)) is not bool:
        return False
    if type(spec.get('speculate', False)) is not bool:
        return False
    if type(spec.get('interpreter', '')) is not str:
        return False
    return is_serial(spec.get('most', 0))


def _all_serials(fields: tuple) -> bool:
    return all(map(is_serial, fields[1]))


def _is_process(row: tuple) -> bool:
    """Return whether a row identifies the process of a client: see ClientHello."""
    if not row:
        return True
    if len(row) != 3:
        return False
    host, pid, port = row
    if type(host) is not str:
        return False
    return is_serial(pid) and is_serial(port)


def _is_client_hello(fields: tuple) -> bool:
    _, pulse, process = fields
    if not math.isfinite(pulse):
        return False
    return _is_process(process)


def _is_node_hello(fields: tuple) -> bool:
    _, cpus, facts = fields
    if cpus < 0:
        return False
    if type(facts.get('python', ())) is not tuple:
        return False
    if type(facts.get('available', {})) is not dict:
        return False
    return _is_kept(facts.get('kept', {}))


def _is_report(fields: tuple) -> bool:
    _, running, waiting, _ = fields
    if not all(map(_is_running, running)):
        return False
    return all(map(is_serial, waiting))


def _is_output(fields: tuple) -> bool:
    _, serial, stream, offset, data = fields
    if not is_serial(serial):
        return False
    if not is_serial(offset):
        return False
    if stream not in (0, 1, 2):
        return False
    return _is_buffer(data)


def _is_refused(fields: tuple) -> bool:
    holder = fields[3]
    if not holder:
        return True
    is_away = holder[-1]
    if type(is_away) is not bool:
        return False
    process = holder[:-1]
    return process != () and _is_process(process)


# Message -> a function that checks the contents of its fields, which have the right types: handlers
# rely on it
CHECKS: Dict[type, Callable[[tuple], bool]] = {
    ClientHello: _is_client_hello,
    Refused: _is_refused,
    NodeHello: _is_node_hello,
    Compute: lambda fields: _is_spec(fields[1]),
    FilePiece: lambda fields: _is_file_wanted(fields[1:4]) and _is_buffer(fields[5]),
    FileStored: lambda fields: fields[1] in PURPOSES and is_serial(fields[2]),
    Part: _is_part,
    Limit: lambda fields: fields[1] >= 1,
    Wrong: lambda fields: is_serial(fields[1]),
    Return: lambda fields: len(fields[2]) in (0, 2),
    Started: lambda fields: all(map(_is_running, fields[1])),
    Report: _is_report,
    Output: _is_output,
    Jobs: lambda fields: all(map(_is_job, fields[1])),
    Results: lambda fields: all(map(_is_result, fields[1])),
    Need: lambda fields: all(map(_is_file_wanted, fields[1])),
    Cancel: _all_serials,
    ReturnJobs: _all_serials,
    Ack: _all_serials,
    JobsReturned: _all_serials,
    Ready: lambda fields: _all_serials(fields) and _is_past(fields[2]),
    KnownAttempts: lambda fields: _all_serials(fields) and _is_past(fields[2]),
}


def add_messages(messages: Dict[int, Tuple[type, int]],
                 checks: Dict[type, Callable[[tuple], bool]]) -> None:
    """Let links carry messages that nodes do not know; the arguments are as MESSAGES and CHECKS."""
    MESSAGES.update(messages)
    CHECKS.update(checks)
    for op, (message, _) in messages.items():
        OPS[message] = op
        FIELD_TYPES[message] = _field_types(message)
        LOOSE.add(message)
        if message._fields[:1] == ('comp',):  # type: ignore[attr-defined]
            SPEAK_OF_COMPS.add(message)


BOUNDS = Bounds(MAX_LIST, 500_000, 50_000)
BOUNDS_OF: Dict[type, Bounds] = {
    Compute: Bounds(LIST, 2_000_000, 1000),                                # a row for each file
    # A number for each job; only nodes and schedulers send this
    Ready: Bounds(LIST, 8_000_000, 10), KnownAttempts: Bounds(LIST, 8_000_000, 10),
    Jobs: Bounds(4 << 20, 500_000, 50_000), Results: Bounds(4 << 20, 500_000, 10)}


def _split(payload: memoryview) -> Tuple[memoryview, List[memoryview]]:
    if len(payload) < _INDEX.size:
        raise PeerError('a payload is shorter than its index')
    count, body = _INDEX.unpack_from(payload)
    at = _INDEX.size + 8 * count
    if count > BUFFERS_MOST or at + body > len(payload):
        raise PeerError('a payload is shorter than its index says')
    layout = '>%dQ' % count
    lengths = struct.unpack_from(layout, payload, _INDEX.size)
    beside = sum(lengths)
    if at + body + beside != len(payload):
        raise PeerError('the parts of a payload do not add up')
    envelope = payload[at:at + body]
    at = at + body
    buffers = []
    for length in lengths:
        buffer = payload[at:at + length]
        buffers.append(buffer)
        at += length
    return envelope, buffers


# -- what nodes and schedulers reckon alike --------------------------------------------------------

class FetchValue(NamedTuple):
    """Find out whether a value is present. The answer is ValueSought."""
    comp: str
    size: int
    digest: bytes


class DropValue(NamedTuple):
    """Remove a value."""
    comp: str
    digest: bytes


class DurationEstimate:
    """Estimates how long the next jobs of a computation will take, from those that ended last. The
    estimate is the larger one of their mean and their 0.9 quantile: so it reflects a few very long
    jobs as well as one long job in ten. Durations are in seconds."""
    LAST = 32
    KEPT = 512      # for `row` and `remaining`
    __slots__ = ('_last', '_seconds', '_mean', '_sorted', '_sums', '_new', '_rows')

    def __init__(self) -> None:
        self._last: Deque[float] = collections.deque(maxlen=self.KEPT)
        # What `seconds` returns, until it is to be computed anew
        self._seconds: Optional[float] = None
        self._mean = 0.0
        self._sorted: List[float] = []      # for `remaining`, and the sums of the first of these
        self._sums: List[float] = [0.0]
        self._new = 0                       # durations since this was computed:
        self._rows: Dict[float, int] = {}   # what `row` has returned

    def add(self, durations: Sequence[float]) -> None:
        """Note the durations of jobs that have ended."""
        if durations:
            self._last.extend(durations)
            self._seconds = None
            self._new += len(durations)
            if self._sorted:
                self._sorted = []

    @property
    def seconds(self) -> Optional[float]:
        """The estimate; None before the first job has ended."""
        if self._seconds is None and self._last:
            known = sorted(itertools.islice(reversed(self._last), self.LAST))
            sum_of_known = sum(known)
            self._mean = max(sum_of_known / len(known), 1e-6)
            self._seconds = max(self._mean, known[int(0.9 * len(known))])
        return self._seconds

    @property
    def mean(self) -> Optional[float]:
        """The mean duration of the jobs that ended last; None before the first one has ended."""
        if self.seconds is None:
            return None
        return self._mean

    def remaining(self, age: float) -> float:
        """Return for how many seconds a job that has run for `age` seconds will go on, from the
        jobs that took longer; if there are none, it is expected to go on for as long again."""
        if not self._sorted:
            self._sorted = sorted(self._last)
            self._sums = [0.0, *itertools.accumulate(self._sorted)]
        place = bisect.bisect_right(self._sorted, age)
        longer = len(self._sorted) - place
        if not longer:
            return max(age, UNKNOWN_TIME)
        return (self._sums[-1] - self._sums[place]) / longer - age

    def row(self, seconds: float) -> int:
        """Return how many jobs one after the other fill this many seconds of a CPU, whatever their
        order is: one more than the longest series of known jobs that did not fill them. If all
        known jobs together did not, the result is twice their number, but at least ROW_FIRST; it is
        0 before the first job has ended. The result is computed again when an eighth of the
        durations are new."""
        if not self._last:
            return 0
        if self._new > len(self._last) >> 3:
            self._new = 0
            self._rows = {}
        found = self._rows.get(seconds)
        if found is None:
            most = self._longest_row(seconds)
            if most < len(self._last):
                found = most + 1
            else:
                found = min(self.KEPT, max(ROW_FIRST, 2 * most))
            self._rows[seconds] = found
        return found

    def _longest_row(self, seconds: float) -> int:
        """Return the largest number of consecutive jobs, among the last ones, that did not fill
        this many seconds."""
        # This is the case for short jobs, whose cost matters
        all_seconds = sum(self._last)
        if all_seconds < seconds:
            return len(self._last)
        last = list(self._last)
        most = begin = 0
        total = 0.0
        for end, took in enumerate(last):
            total += took
            while total >= seconds and begin <= end:
                total -= last[begin]
                begin += 1
            most = max(most, end + 1 - begin)
        return most


class Allowance:
    """How many jobs for each CPU one place may hold in reserve, beyond those that run there. The
    estimate of their duration bounds this number at any time, but the number at most doubles with
    each round until it reaches the bound. A round is as many ended jobs as were there when the
    number grew last, or could have been there: later jobs of a computation must confirm what the
    first ones promise."""
    __slots__ = ('_estimate', '_unknown', '_most', '_step', '_left')

    def __init__(self, estimate: DurationEstimate, unknown: int, most: int) -> None:
        """`unknown` is the allowance before any job has ended; `most` is the largest allowance."""
        self._estimate = estimate
        self._unknown = unknown
        self._most = most
        self._step = 1
        self._left = 0     # jobs to end until the next doubling; 0: a round begins

    def ended(self, count: int, there: int, cpus: int, rounds: int = 1) -> None:
        """Note that `count` jobs have ended at this place, which has `cpus` CPUs and still holds
        `there` jobs. The jobs there count as `rounds` rounds, which are several where messages take
        long, since the ends of all jobs there become known at once, and the CPUs are idle until
        more jobs have come."""
        if self._left == 0:
            self._left = max(count + there, cpus * self._step) // rounds or 1
        self._left -= count
        for _ in range(rounds):
            if self._left > 0:
                break
            self._step = min(2 * self._step, self._most)
            self._left += max(there, cpus * self._step) // rounds or 1

    def jobs(self, horizon: float) -> int:
        """Return how many jobs fill `horizon` seconds of a CPU, within the bound."""
        seconds = self._estimate.seconds
        if seconds is None:
            fits = self._unknown
        else:
            fits = int(horizon / seconds)
        if fits < self._step:
            self._step = max(1, fits)
        return min(fits, self._step)


class ValueRequests:
    """Values that one place knows by their digests: which of them are present, which are needed,
    and the requests that wait for some. Each computation has its own values. Requests are served in
    the order of their arrival, and one value of a computation at a time is fetched. Values that
    nobody needs make room for others, those first that were not needed for longest; a needed value
    is fetched when there is room, or when no other value is needed. This class is pure. A request
    is any object with an attribute `values` that has rows (size, digest).
    """

    def __init__(self, most: int) -> None:
        self._most = most       # bytes
        # (computation, digest) -> size, in the order in which they were last needed
        self._here: 'collections.OrderedDict[Tuple[str, bytes], int]' = collections.OrderedDict()
        self._needs: Dict[Tuple[str, bytes], int] = collections.Counter()
        self.waiting_for: Dict[str, Deque[Any]] = {}
        self._coming: Dict[str, Tuple[int, bytes]] = {}
        self._holders: Set[Any] = set()  # the requests that were served and still need their values
        self.total = 0          # bytes that are present

    def __bool__(self) -> bool:
        """Return whether any request waits."""
        return bool(self.waiting_for)

    def admit(self, comp: str, one: Any) -> bool:
        """Return whether all values that this request needs are present. If not, the request
        waits."""
        if comp not in self.waiting_for:
            if self._has_all(comp, one):
                self.hold(comp, one)
                return True
        self.waiting_for.setdefault(comp, collections.deque()).append(one)
        return False

    def _has_all(self, comp: str, one: Any) -> bool:
        return all((comp, digest) in self._here for _, digest in one.values)

    def hold(self, comp: str, one: Any) -> None:
        """Note that a request needs its values until they are released."""
        self._holders.add(one)
        for _, digest in one.values:
            self._needs[comp, digest] += 1
            if (comp, digest) in self._here:
                self._here.move_to_end((comp, digest))

    def release(self, comp: str, one: Any) -> None:
        """Note that a request does not need its values any more, if it was served."""
        for _, digest in one.values if one in self._holders else ():
            self._needs[comp, digest] -= 1
            if not self._needs[comp, digest]:
                del self._needs[comp, digest]
        self._holders.discard(one)

    def waiting(self, comp: str) -> Sequence[Any]:
        """Return the requests that wait."""
        return self.waiting_for.get(comp, ())

    def leave(self, comp: str, some: Container[Any]) -> List[Any]:
        """Let these requests wait no longer. Returns those of them that did wait."""
        waiting = self.waiting_for.get(comp, ())
        gone = []
        for one in waiting:
            if one in some:
                gone.append(one)
        if gone:
            kept = collections.deque(one for one in waiting if one not in some)
            self._set_waiting(comp, kept)
        return gone

    def _set_waiting(self, comp: str, kept: Deque[Any]) -> None:
        if kept:
            self.waiting_for[comp] = kept
        else:
            del self.waiting_for[comp]

    def come(self, comp: str, size: int, digest: bytes) -> None:
        """Note that a value is present."""
        if (comp, digest) not in self._here:
            self.total += size
        self._here[comp, digest] = size

    def came(self, comp: str) -> None:
        """Note that the value which was being fetched is present."""
        self.come(comp, *self._coming.pop(comp))

    def coming(self, comp: str) -> bytes:
        """Return the digest of the value that is being fetched; it is empty if there is none."""
        return self._coming.get(comp, (0, b''))[1]

    def failed(self, comp: str) -> List[Any]:
        """Note that the value which was being fetched is not available. Returns the requests that
        waited for it."""
        _, digest = self._coming.pop(comp)
        return self.leave(comp, {one for one in self.waiting(comp)
                                 if any(digest == other for _, other in one.values)})

    def postpone(self, comp: str) -> None:
        """Note that there is no room now for the value which was to be fetched; the next `serve`
        tries again."""
        self._coming.pop(comp, None)

    def interrupt(self, comp: str) -> List[Any]:
        """Note that the connection to the owner of the values has ended. Returns the requests that
        waited."""
        self._coming.pop(comp, None)
        return list(self.waiting_for.pop(comp, ()))

    def forget(self, comp: str) -> None:
        """Note that a computation has ended and its values are gone; all of its requests were
        released before."""
        self.interrupt(comp)
        for key in [key for key in self._here if key[0] == comp]:
            self.total -= self._here.pop(key)
            self._needs.pop(key, None)

    def serve(self) -> Tuple[List[Tuple[str, Any]], List[Any]]:
        """Return the requests that wait no longer, with their computations, and actions: which
        values are to be fetched, and which are to be removed to make room for these."""
        served: List[Tuple[str, Any]] = []
        actions: List[Any] = []
        for comp in list(self.waiting_for):
            waiting = self.waiting_for[comp]
            while waiting and self._has_all(comp, waiting[0]):
                self.hold(comp, waiting[0])
                served.append((comp, waiting.popleft()))
            self._set_waiting(comp, waiting)
            if not waiting:
                continue
            if comp not in self._coming:
                self._fetch(comp, waiting[0], actions)
        return served, actions

    def _fetch(self, comp: str, one: Any, actions: List[Any]) -> None:
        own = {(name, digest) for name, waiting in self.waiting_for.items()
               for _, digest in waiting[0].values}
        size, digest = next(row for row in one.values if (comp, row[1]) not in self._here)
        spare = [key for key in self._here if key not in own and key not in self._needs]
        for key in spare:
            if self.total + size <= self._most:
                break
            self.total -= self._here.pop(key)
            removal = DropValue(*key)
            actions.append(removal)
        if self.total + size <= self._most or not any(key not in own for key in self._needs):
            self._coming[comp] = (size, digest)
            request = FetchValue(comp, size, digest)
            actions.append(request)


# --------------------------------------------------------------------------------------------------
# Payloads: the values of users. A client or a worker writes them, and the other one opens them.
# --------------------------------------------------------------------------------------------------

ATOMS = frozenset((int, float, str, bool, type(None), complex))
_BARE = 0x80   # the first byte of a pickle that has nothing before it
_BUFFERS = struct.Struct('>B3xI')  # 1, number of buffers; a bare pickle begins with 0x80
# 2, size of a pickled tuple of the bundles' numbers; the payload itself follows
_NEEDS = struct.Struct('>B3xI')
# 3, size of a pickled pair: pieces of the pickle, and buffers. For each it contains the length, or
# size and digest if it is a value that is identified by these. The other ones follow one after the
# other.
_SHARED = struct.Struct('>B3xI')


class _Pieces(list):
    """The file into which a pickler writes: it passes large bytes objects on without copying
    them."""

    def write(self, piece: Any) -> None:
        """Do as the method of a file. This is not a method of `list` on purpose: other threads of
        the process, which communicate with nodes, can run between pieces."""
        self.append(piece)


_NO_MODULES: AbstractSet[str] = frozenset()


class Sealed(typing.NamedTuple):
    """A value that was pickled."""
    payload: Payload
    plain: bool           # it contains builtin values only: opening it runs no code
    modules: AbstractSet[str]   # names of the modules that opening it imports
    # Whether it contains no functions and classes by value, which only one minor version of Python
    # can run
    portable: bool


def dumps(value: Any, pickler: Optional[Callable[..., Any]] = None,
          share: Optional[Callable[[list, list], Any]] = None) -> Sealed:
    """Pickle `value` for the other side. Large buffers (of numpy and the like) are kept out of band
    and are not copied.
    `pickler(file, protocol, buffer_callback)` is the class that pickles; the default is
    `value_pickler`. `share(pieces, buffers)` may make the payload from pieces of the pickle and the
    out-of-band buffers; it is called if one of these is large, and returns None for a value that is
    to be packed as usual. Raises what pickling raises.
    """
    if type(value) in ATOMS:
        pickled = pickle.dumps(value, 5)
        return Sealed(pickled, True, _NO_MODULES, True)
    pieces, buffers = _Pieces(), []  # type: Tuple[_Pieces, List[memoryview]]

    def beside(buffer: pickle.PickleBuffer) -> bool:
        if buffer.raw().nbytes < OUT_OF_BAND:
            return True  # in band
        buffers.append(buffer.raw())
        return False

    writer = (pickler or value_pickler())(pieces, 5, beside)
    writer.dump(value)
    shared = None
    if share is not None:
        if buffers or len(pieces) > 1 or len(pieces[0]) >= OUT_OF_BAND:
            shared = share(pieces, buffers)
    if shared is not None:
        payload: Payload = shared
    elif buffers:
        body = b''.join(pieces)
        payload = _with_buffers(body, buffers)
    else:
        if len(pieces) == 1:
            payload = pieces[0]
        else:
            payload = tuple(pieces)
    return Sealed(payload, writer.plain, writer.modules, writer.portable)


ALIGNED = 64    # bytes; the alignment that arrays require is less, 16 at most


def _with_buffers(body: bytes, buffers: List[memoryview]) -> Payload:
    buffer_count = len(buffers)
    size = _BUFFERS.size + 8 * (buffer_count + 1) + len(body)
    body += bytes(-size % ALIGNED)   # which the unpickler does not read
    lengths = struct.pack('>Q%dQ' % buffer_count, len(body), *map(len, buffers))
    head = _BUFFERS.pack(1, buffer_count) + lengths
    return (head + body, *buffers)


def shared_payload(pieces: Sequence[Any], buffers: Sequence[Any]) -> bytes:
    """Return a payload of these pieces and buffers; those that are rows (size, digest) are not
    contained in it."""
    there = []
    for part in (*pieces, *buffers):
        if type(part) is not tuple:
            there.append(part)
    spec = pickle.dumps(tuple([part if type(part) is tuple else len(part) for part in parts]
                              for parts in (pieces, buffers)), 5)
    return b''.join((_SHARED.pack(3, len(spec)), spec, *there))


class _Segments:
    """The pieces of a pickle as a file from which an unpickler reads."""

    def __init__(self, pieces: Iterable[Any]) -> None:
        self._pieces = collections.deque(memoryview(piece).cast('B') for piece in pieces)

    def readinto(self, target: Any) -> int:
        """Do as the method of a file."""
        view = memoryview(target).cast('B')
        filled = 0
        while filled < len(view) and self._pieces:
            first = self._pieces[0]
            some = first[:len(view) - filled]
            view[filled:filled + len(some)] = some
            filled += len(some)
            self._pieces[0] = first[len(some):]
            if not len(self._pieces[0]):
                self._pieces.popleft()
        return filled

    def read(self, size: int) -> bytes:
        """Do as the method of a file."""
        left = sum(map(len, self._pieces))
        data = bytearray(left if size < 0 else min(size, left))
        self.readinto(data)
        return bytes(data)

    def readline(self) -> bytes:
        """Do as the method of a file. Only pickles of old protocols contain lines."""
        raise pickle.UnpicklingError('a pickle of protocol 5 has no lines')


def _unseal_shared(payload: Buffer) -> Any:
    """Open a payload of which some parts are values that are known by digest."""
    view = memoryview(payload)
    at = _SHARED.size + _SHARED.unpack_from(view)[1]
    data = view[_SHARED.size:at]
    spec = open_envelope(data)
    if known_values is None:
        raise RuntimeError('this process has no values that are known by digest')
    opened: Tuple[List[Any], List[Any]] = ([], [])
    for parts, found in zip(spec, opened):
        for part in parts:
            if type(part) is tuple:
                found.append(known_values.open(*part))
                continue
            piece = view[at:at + part]
            at += part
            # A bytearray for each, as in `loads`
            found.append(bytearray(piece) if found is opened[1] else piece)
    pieces, buffers = opened
    if len(pieces) == 1:
        return pickle.loads(pieces[0], buffers=buffers)
    return pickle.Unpickler(_Segments(pieces), buffers=buffers).load()  # type: ignore[arg-type]


def open_pieces(body: Buffer, *buffers: Buffer) -> Any:
    """Open the pickle of a value that is sent apart from the arguments that refer to it."""
    return pickle.loads(body, buffers=buffers)


# The object that opens values by digest in this process: its method open(size, digest) returns a
# new buffer for each call
known_values: Any = None


def with_needs(payload: Payload, numbers: Iterable[int]) -> Payload:
    """Return a payload that says which bundles of modules must be present before it is opened."""
    in_order = sorted(numbers)
    body = pickle.dumps(tuple(in_order), 5)
    pieces = pieces_of(payload)
    return (_NEEDS.pack(2, len(body)) + body + bytes(pieces[0]), *pieces[1:])


def split_needs(payload: Buffer) -> Tuple[Sequence[int], Buffer]:
    """Return the numbers of the bundles and the payload that `with_needs` has combined."""
    if payload[0] != 2:
        return (), payload
    _, length = _NEEDS.unpack_from(payload)
    data = payload[_NEEDS.size:_NEEDS.size + length]
    numbers = open_envelope(data)
    return numbers, memoryview(payload)[_NEEDS.size + length:]


COPIED_AT_ONCE = 16 << 20   # bytes that are copied while no other thread of the process can run


class _Source:
    """A large payload, or a part of one, as a file from which an unpickler reads. Other threads can
    run between the pieces that it copies. If `once` is true, the memory of what was read is
    returned to the system, so that the payload is never in memory twice."""

    def __init__(self, view: memoryview, once: bool) -> None:
        memory = view.obj
        self._memory: Any = None
        if once and isinstance(memory, mmap.mmap) and len(memory) == len(view):   # all of it
            if hasattr(mmap, 'MADV_DONTNEED'):
                self._memory = memory
            else:
                self._memory = None
        self._view = view
        self._at = 0
        self._end = len(view)

    def goto(self, at: int, size: int) -> None:
        """Read this many bytes from this offset on."""
        self._at = at
        self._end = at + size

    def readinto(self, target: Any) -> int:
        """Do as the method of a file."""
        view = memoryview(target)
        size = min(len(view), self._end - self._at)
        for start in range(0, size, COPIED_AT_ONCE):
            end = min(start + COPIED_AT_ONCE, size)
            view[start:end] = self._view[self._at:self._at + end - start]
            self._went(end - start)
        return size

    def read(self, size: int) -> bytes:
        """Do as the method of a file."""
        data = bytes(self._view[self._at:min(self._at + size, self._end)])
        self._went(len(data))
        return data

    def readline(self) -> bytes:
        """Do as the method of a file. Only pickles of old protocols contain lines."""
        start = io.BytesIO(self._view[self._at:min(self._at + NAME_MOST, self._end)])
        line = start.readline()
        self._went(len(line))
        return line

    def copy(self) -> bytearray:
        """Return a copy of all that remains to be read."""
        data = bytearray()
        while self._at < self._end:
            data += self.read(COPIED_AT_ONCE)
        return data

    def _went(self, size: int) -> None:
        first = -(-self._at // mmap.PAGESIZE)
        self._at = self._at + size
        last = self._at // mmap.PAGESIZE
        if self._memory is None:
            return
        if not size > FILE_PIECE:
            return
        if last > first:
            advice = mmap.MADV_DONTNEED  # type: ignore[attr-defined]
            size = (last - first) * mmap.PAGESIZE
            self._memory.madvise(  # type: ignore[attr-defined]
                advice, first * mmap.PAGESIZE, size)


def _is_segment(payload: Any) -> bool:
    """Return whether a payload occupies a whole memory segment that is mapped for it alone."""
    while type(payload) is memoryview:
        payload = payload.obj
    return type(payload) is MappedSegment


def loads(payload: Buffer, once: bool = False) -> Any:
    """Open a payload. This runs the user's code and raises whatever that code raises. If `once` is
    true, nobody will read the payload again."""
    size = len(payload)
    if size <= LAZY and payload[0] == _BARE:   # nearly always
        return _open(payload, [])
    segment = once and size >= SEGMENT_FROM and _is_segment(payload)
    if size > LAZY and not segment:   # which is used in place
        source = _Source(memoryview(payload), once)
    else:
        source = None
    if payload[0] == 2:
        needs, payload = split_needs(payload)
        if modules is not None:   # the program itself has its modules
            modules.need(needs)
    if payload[0] == 3:
        return _unseal_shared(payload)
    if source is not None:
        return _unseal_large(source, memoryview(payload), size - len(payload))
    if payload[0] != 1:
        return _open(payload, [])
    view = memoryview(payload)
    ends = _ends_of(view)
    # A bytearray for each: the job could not write to an array that numpy makes of a read-only
    # view. A segment is mapped copy-on-write for this value alone.
    buffers = []
    for begin, end in zip(ends[1:], ends[2:]):
        buffer: Any = view[begin:end]
        if not segment or begin % ALIGNED:
            buffer = bytearray(buffer)
        buffers.append(buffer)
    return _open(view[ends[0]:ends[1]], buffers)


def _open(pickled: Any, buffers: List[Any]) -> Any:
    """Open a pickle. If opening one of another version of Python fails, try a second time,
    leniently."""
    try:
        return pickle.loads(pickled, buffers=buffers)
    except Exception:
        if not found_by_name:
            raise
        return ForeignUnpickler(io.BytesIO(pickled), buffers=buffers).load()


def _ends_of(view: memoryview) -> List[int]:
    """Return where the pickle of a payload begins, where it ends, and where the buffers after it
    end."""
    _, count = _BUFFERS.unpack_from(view)
    layout = '>%dQ' % (count + 1)
    lengths = struct.unpack_from(layout, view, _BUFFERS.size)
    initial = _BUFFERS.size + 8 * (count + 1)
    return list(itertools.accumulate(lengths, initial=initial))


def _unseal_large(source: _Source, view: memoryview, at: int) -> Any:
    """Open what the source contains from `at` on, which is `view`."""
    if view[0] != 1:
        source.goto(at, len(view))
        return pickle.Unpickler(source).load()
    ends = _ends_of(view)
    buffers = []
    for begin, end in zip(ends[1:], ends[2:]):
        source.goto(at + begin, end - begin)
        buffers.append(source.copy())
    size = ends[1] - ends[0]
    source.goto(at + ends[0], size)
    unpickler = pickle.Unpickler(source, buffers=buffers)
    return unpickler.load()


# --------------------------------------------------------------------------------------------------
# Code that travels: objects by value, modules, and what payloads name. Clients and workers use it
# alike.
# --------------------------------------------------------------------------------------------------

def find_named(module: str, name: str) -> Any:
    """Return the object that has this qualified name in a module; the module itself for an empty
    name."""
    return functools.reduce(getattr,
                            name.split('.') if name else (), importlib.import_module(module))


# Classes that cannot be loaded here, and that the computation does not need
_left_out: Dict[Tuple[str, str], str] = {}

# Functions and classes of importable modules are pickled by name. Those of a program's __main__,
# and those that only a running function has, are pickled by value with cloudpickle's reducers.
# Three additions preserve what they are in the program:
# - A class has one identity in each process, by the number that cloudpickle's class tracker gives
# it.
# - Functions of one __main__ share one dictionary of global variables in each process, a `Space`.
# - A variable or class attribute is sent with a version. A process applies a version once, so that
#   what setup() or a job has changed remains until the program itself changes the same variable.
MAIN_NAMES = ('__main__', '__mp_main__')   # the second one in children of multiprocessing's spawn


class Versions:
    """Distinguishes versions of named values: a name keeps its version until its value changes."""
    __slots__ = ('_known',)

    def __init__(self) -> None:
        self._known: Dict[str, Tuple[Any, bytes, bytes]] = {}   # name -> value, its form, version

    def of(self, name: str, value: Any) -> bytes:
        """Return the version of this value. The pickled form of a mutable value identifies its
        version."""
        known = self._known.get(name)
        if type(value) in ATOMS:
            form = b''
        else:
            form = _form_of(value)
        if known is not None and known[1] == form:
            if self._is_same(known[0], value, form):
                return known[2]
        version = os.urandom(8)
        self._known[name] = (value, form, version)
        return version

    @staticmethod
    def _is_same(before: Any, now: Any, form: bytes) -> bool:
        if before is now:
            return True
        if form:
            return True
        if type(now) not in ATOMS:
            return False
        if type(before) is not type(now):
            return False
        return before == now


class _Form:
    """A file that computes a digest of what a pickler writes, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._digest = hashlib.blake2b(digest_size=16)
        self._left = limit

    def write(self, piece: Any) -> None:
        """Do as the method of a file. Raises OverflowError beyond the limit, so that pickling
        stops."""
        self._left -= len(piece)
        if self._left < 0:
            raise OverflowError('a value is larger than it may be')
        self._digest.update(piece)

    def digest(self) -> bytes:
        """Return the digest of all that was written."""
        return self._digest.digest()


def _digest_of_pickle(pickler: Callable[..., Any],
                      value: Any,
                      limit: int = sys.maxsize) -> Optional[bytes]:
    """Return a digest of what this class of picklers makes of a value; None if the value cannot be
    pickled or its pickle is larger than `limit` bytes."""
    form = _Form(limit)
    try:
        pickler(form, 5, buffer_callback=lambda buffer: form.write(buffer.raw())).dump(value)
    except (Exception, SystemExit):  # whatever pickle or a __reduce__ of the user's raises
        return None
    return form.digest()


class _FormPickler(pickle.Pickler):
    """Finds out whether a value has changed. Functions, classes and the like count by their
    identity."""

    def reducer_override(self, obj: Any) -> Any:
        """Return how an object is reduced. The pickler calls this for everything that is not a
        builtin value."""
        if obj is id:   # it stands for all others, and would stand for itself without end
            return NotImplemented
        if isinstance(obj, _IDENTICAL) or type(obj) in _REDUCERS:
            return id, (id(obj),)
        return NotImplemented


def _form_of(value: Any) -> bytes:
    """Return a digest of the contents of a value; it is empty for a value that counts by its
    identity, or that cannot be pickled."""
    if isinstance(value, _IDENTICAL):
        return b''
    digest = _digest_of_pickle(_FormPickler, value)
    return digest or b''


class Space:
    """The global variables that the functions of one `__main__` module share in this process."""
    __slots__ = ('token', 'variables', 'native', 'versions', 'applied', 'functions')

    def __init__(self, token: tuple, variables: Dict[str, Any], native: bool) -> None:
        self.token = token                       # its identifier in every process
        self.variables = variables
        # It was made here, and no other process changes it
        self.native = native
        self.versions = Versions()               # of variables that are sent from here
        self.applied: Dict[str, bytes] = {}      # name -> version that was applied here
        # Name -> version and function without state
        self.functions: Dict[str, Tuple[bytes, Any]] = {}

    def apply(self, variables: Dict[str, Tuple[bytes, Any]]) -> None:
        """Set those variables whose version differs from the one that was set before."""
        for name, (version, value) in variables.items():
            if self.native:
                continue
            if self.applied.get(name) == version:
                continue
            if name not in self.variables:
                spaces.added.append((self.variables, name))
            self.applied[name] = version
            self.variables[name] = value


class Spaces:
    """All instances of Space in this process."""

    def __init__(self) -> None:
        self.instance = os.urandom(8)     # of the process that makes tokens
        self._by_token: Dict[tuple, Space] = {}
        self._by_id: Dict[int, Space] = {}
        # In a runner: it becomes the main module of its program
        self._main: Optional[types.ModuleType] = None
        self._adopted: Optional[Dict[str, Any]] = None  # its variables
        # Variables that were added since the present job began
        self.added: List[Tuple[Dict[str, Any], str]] = []

    def adopt_main(self, module: types.ModuleType) -> None:
        """Let the main module of the first program that is seen here become this module."""
        self._main = module
        self._adopted = vars(module)

    def name_class(self, cls: type) -> None:
        """Let a class of the program's main module be found by its name here, so that jobs can
        pickle the class by name."""
        if self._adopted is None:
            return
        if cls.__module__ not in MAIN_NAMES:
            return
        if cls.__qualname__ != cls.__name__:
            return
        if cls.__name__ not in self._adopted:
            self._adopted[cls.__name__] = cls
            self.added.append((self._adopted, cls.__name__))

    def forget_added(self, names: Iterable[str]) -> None:
        """Remove those of these variables that were added for the present job alone."""
        for variables, name in self.added:
            if name in names:
                variables.pop(name, None)
                space = self.known(variables)
                if space is not None:
                    space.applied.pop(name, None)
                    space.functions.pop(name, None)

    def of_variables(self, variables: Dict[str, Any]) -> Optional[Space]:
        """Return the space of a function's global variables; None for variables that belong to no
        `__main__` module."""
        space = self._by_id.get(id(variables))
        if space is None:
            variable = variables.get('__name__')
            if variable in MAIN_NAMES:
                token = (self.instance, len(self._by_id))
                space = self._add(Space(token, variables, True))
        return space

    def of_token(self, token: tuple, basics: Dict[str, Any]) -> Space:
        """Return the space that came with a payload; it is made if it is new."""
        space = self._by_token.get(token)
        if space is None:
            module = self._main
            self._main = None
            if module is None:
                variables = {}
            else:
                variables = vars(module)
            variables.update(basics)
            variables['__builtins__'] = builtins
            space = self._add(Space(token, variables, False))
        return space

    def known(self, variables: Dict[str, Any]) -> Optional[Space]:
        """Return the space that has these variables; None if there is none yet."""
        return self._by_id.get(id(variables))

    def _add(self, space: Space) -> Space:
        self._by_token[space.token] = space
        self._by_id[id(space.variables)] = space
        return space


spaces = Spaces()
_class_versions: 'weakref.WeakKeyDictionary[type, Versions]' = weakref.WeakKeyDictionary()
# Classes by cloudpickle's number
_classes: 'weakref.WeakValueDictionary[str, type]' = weakref.WeakValueDictionary()
# Classes of other processes -> number, and name -> version of the attributes that were set
_ReceivedClasses = weakref.WeakKeyDictionary
_received: '_ReceivedClasses[type, Tuple[str, Dict[str, bytes]]]' = _ReceivedClasses()
# Functions that were made and have no state yet
_unfinished: 'weakref.WeakSet[Any]' = weakref.WeakSet()


class _SpaceRef:
    """Represents a function's global variables in a pickle. There is one object for each
    dictionary, so that the pickler's memo works."""
    __slots__ = ('variables', 'reduced')

    def __init__(self, variables: Dict[str, Any], module: str) -> None:
        self.variables = variables   # kept, so that no other dictionary gets its id
        if module:
            self.reduced: tuple = (variables_of_module, (module,))
            return
        basics = {name: variables[name] for name in _SPACE_BASICS if name in variables}
        space = spaces.of_variables(variables)
        if space is None:
            self.reduced = (new_variables, (basics,))
        else:
            self.reduced = (variables_of_space, (space.token, basics))

    def __reduce__(self) -> tuple:
        return self.reduced


class _CellRef:
    """Represents a cell of a closure in a pickle, so that functions which share a variable still
    share it after they were opened."""
    __slots__ = ('cell',)

    def __init__(self, cell: Any) -> None:
        self.cell = cell

    def __reduce__(self) -> tuple:
        return empty_cell, ()


_SPACE_BASICS = ('__name__', '__package__', '__file__', '__path__', '__doc__')
_CachedType = type(functools.lru_cache(maxsize=1)(lambda: None))
# Types whose objects keep their value as long as they exist
_IDENTICAL = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType,
              property, classmethod, staticmethod, _CachedType, contextvars.ContextVar,
              type(threading.Lock()), type(threading.RLock()))
_LOCKS = {type(threading.Lock()): threading.Lock, type(threading.RLock()): threading.RLock}
if hasattr(_thread, '_ThreadHandle'):   # what a Thread waits by, since 3.13; not started when made
    _LOCKS[_thread._ThreadHandle] = _thread._ThreadHandle


def empty_cell() -> Any:
    """Return a new cell of a closure, without contents."""
    return types.CellType()


def new_variables(basics: Dict[str, Any]) -> Dict[str, Any]:
    """Return new global variables for the functions of one payload alone."""
    return dict(basics, __builtins__=builtins)


def variables_of_space(token: tuple, basics: Dict[str, Any]) -> Dict[str, Any]:
    """Return the global variables that functions of a program's main module have in this
    process."""
    return spaces.of_token(token, basics).variables


def variables_of_module(name: str) -> Dict[str, Any]:
    """Return the global variables of an importable module."""
    return vars(importlib.import_module(name))


class _Absent:
    """Represents a class or function of a library that does not exist here, and what was made of
    it."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Accept all arguments that the missing class would accept."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""


# Functions and classes that came by value from another minor version of Python, and are here by
# their names
found_by_name: 'weakref.WeakSet[Any]' = weakref.WeakSet()
_FOUND_KINDS = (type, types.FunctionType)
_PythonUnpickler: Any = getattr(pickle, '_Unpickler')   # pickle's own, written in Python


def _sets_state(function: Any) -> bool:
    return function is fill_class or function is fill_function


class ForeignUnpickler(_PythonUnpickler):  # type: ignore[misc]
    """Opens pickles of another minor version of Python. A function or class that is found here by
    its name is not changed by the state that comes with it: the state is skipped, and need not be
    possible here. For example, a dataclass comes with objects of private classes of its Python's
    `dataclasses`. If an object that cannot be opened is used elsewhere as well, the reason is
    raised."""
    dispatch = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: Any, buffers: Any) -> None:
        super().__init__(file, buffers=buffers)
        self._states: List[List[Exception]] = []   # for each state that is being read: what failed
        self._failed: Dict[int, Tuple[Any, Exception]] = {}   # id -> object, why it is not whole
        self._of_states: Dict[int, Any] = {}       # id -> an object that was made for a state

    def find_class(self, module: str, name: str) -> Any:
        """Return what a module has under a name; if there is nothing, a class that represents
        it."""
        try:
            found = super().find_class(module, name)
        except (ImportError, AttributeError) as exc:
            if not self._states:
                raise
            return self._note(type(name, (_Absent,), {}), exc)
        self._begin(found)
        return found

    def _begin(self, found: Any) -> None:
        if _sets_state(found):   # its arguments follow: an object and its state
            self._states.append([])

    def _note(self, obj: Any, exc: Exception) -> Any:
        self._failed[id(obj)] = (obj, exc)
        self._states[-1].append(exc)
        return obj

    def reduce(self) -> None:
        """Call a function, which may be one that sets a state."""
        function = self.stack[-2]
        args = self.stack[-1]
        if _sets_state(function):
            failures = self._states.pop()
            is_here = isinstance(args[0], _FOUND_KINDS) and args[0] in found_by_name
            if failures and not is_here:
                if not self._states:
                    raise failures[0]
                self._note(args[0], failures[0])
            if failures or is_here:
                self.stack[-2:] = [None]
                return
        try:
            self.stack[-2:] = [function(*args)]
        except Exception as exc:
            if not self._states:
                raise
            self.stack[-2:] = [self._note(_Absent(), exc)]

    def again(self, load: Callable[[Any], None]) -> None:
        """Take an object from the memo."""
        load(self)
        found = self.stack[-1]
        if type(found) is types.FunctionType:
            self._begin(found)
        if not self._states:
            self._check(found)

    def _check(self, found: Any) -> None:
        """Raise the reason why an object that was made for a state is not complete."""
        waiting = [found] if id(found) in self._of_states or id(found) in self._failed else []
        seen: Set[int] = set()
        while waiting and self._failed:
            obj = waiting.pop()
            if id(obj) in self._failed:
                raise self._failed[id(obj)][1]
            if id(obj) not in seen:
                seen.add(id(obj))
                waiting += _held_by(obj)

    def remember(self, load: Callable[[Any], None]) -> None:
        """Keep the last object for later."""
        load(self)
        if self._states:
            self._of_states[id(self.stack[-1])] = self.stack[-1]

    def attempt(self, load: Callable[[Any], None]) -> None:
        """Make an object, or put something into the last one."""
        try:
            load(self)
        except Exception as exc:
            if not self._states:
                raise
            makes = load in (self.dispatch_before[code] for code in _MAKING)
            self.stack += [_Absent()] if makes else []
            self._note(self.stack[-1], exc)

    dispatch_before = dict(dispatch)


_MAKING = (pickle.NEWOBJ[0], pickle.NEWOBJ_EX[0])   # they have taken what they need by then


def _done_by(method: Callable[..., None], code: bytes) -> None:
    load = ForeignUnpickler.dispatch[code[0]]
    ForeignUnpickler.dispatch[code[0]] = lambda unpickler: method(unpickler, load)


ForeignUnpickler.dispatch[pickle.REDUCE[0]] = ForeignUnpickler.reduce
for _code in (pickle.GET, pickle.BINGET, pickle.LONG_BINGET):
    _done_by(ForeignUnpickler.again, _code)
for _code in (pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE):
    _done_by(ForeignUnpickler.remember, _code)
for _code in (pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.BUILD, pickle.APPEND, pickle.APPENDS,
              pickle.SETITEM, pickle.SETITEMS, pickle.ADDITEMS):
    _done_by(ForeignUnpickler.attempt, _code)


class ForeignCode:
    """Represents a code object of another minor version of Python, which cannot run here."""

    def __init__(self, version: tuple, name: str, line: int) -> None:
        self.version = version
        self.name = name
        self.line = line


def code_from_source(module: Any, foreign: ForeignCode) -> Optional[types.CodeType]:
    """Return the code, for this version of Python, of a function that is nested in another one: it
    is found by its name and line in the source of the module, which was sent as well. Returns None
    if there is no such source or the function is not in it."""
    if isinstance(module, str):
        imported = sys.modules.get(module)
    else:
        imported = None
    spec = getattr(imported, '__spec__', None)
    loader = getattr(spec, 'loader', None)
    if not hasattr(loader, 'get_code'):
        return None
    waiting = [loader.get_code(module)]  # type: ignore[union-attr]
    while waiting:
        code = waiting.pop()
        if code is None:
            continue
        if (code.co_name, code.co_firstlineno) == (foreign.name, foreign.line):
            return code  # type: ignore[no-any-return]
        for const in code.co_consts:
            if isinstance(const, types.CodeType):
                waiting.append(const)
    return None


def python_of(version: tuple) -> str:
    """Return a version of Python as people write it, such as '3.8'."""
    return 'Python ' + '.'.join(map(str, version[:2]))


def make_code(version: tuple, args: tuple, file: str, name: str, line: int) -> Any:
    """Return a code object that came pickled. A code object of another version could be created,
    but calling it would crash the process. The file name is for tracebacks; cloudpickle leaves it
    out since 3.1.3."""
    if version != sys.version_info[:2]:
        return ForeignCode(version, name, line)
    code = types.CodeType(*args)
    return code.replace(co_filename=file)


def _by_name_here(version: tuple, module: str, name: str, kind: str) -> Any:
    """Return a function or class that was sent by value to another version of Python, from the
    source that was sent along with it."""
    try:
        found = find_named(module, name)
        if isinstance(found, _FOUND_KINDS):
            found_by_name.add(found)
        return found
    except (ImportError, AttributeError):
        why = _left_out.get((
            module, name
        ), 'it is not in the source sent. Put it into a file of its own, which the program imports '
           'or lists in depends, or run dispynode there with %s' % python_of(version))
        python = python_of(version)
        text = '%s %s.%s of the client, which runs %s, is not available to %s: %s' % (
            kind, module, name, python, python_of(sys.version_info), why)
        raise TypeError(text) from None


def function_of(variables: Dict[str, Any], code: Any, module: str, name: str, version: bytes,
                cells: tuple) -> Any:
    """Return a function that was sent by value, without its state, which `fill_function` sets. With
    a version, the function has no state of its own and its main module has it under this name: the
    same version always yields the same function."""
    if isinstance(code, ForeignCode):
        foreign = code
        code = code_from_source(module, code)
        if code is None or len(code.co_freevars) != len(cells):
            return _by_name_here(foreign.version, module, name, 'function')
    space = spaces.known(variables)
    if space is not None and version:
        if space.native and isinstance(variables.get(name), types.FunctionType):
            return variables[name]
        known = space.functions.get(name)
        if known is not None:
            if known[0] == version:
                return known[1]
    function = types.FunctionType(code, variables, name.rpartition('.')[2], None, cells or None)
    _unfinished.add(function)
    return function


def fill_function(function: Any, state: tuple) -> None:
    """Set the state of a function: its attributes, slots, the contents of its cells, the global
    variables that it uses, and its version."""
    attributes, slots, contents, variables, name, version, _ = state
    if not isinstance(function, types.FunctionType):
        return
    space = spaces.known(function.__globals__)
    if function in _unfinished:
        _unfinished.discard(function)
        vars(function).update(attributes)
        for slot, value in slots.items():
            setattr(function, slot, value)
        for cell, value in contents:
            cell.cell_contents = value
        if space is None and variables:
            function.__globals__.update({key: value for key, (_, value) in variables.items()})
        if space is not None:
            if version and not space.native:
                space.functions[name] = (version, function)
                space.apply({name: (version, function)})
    if space is not None:
        space.apply(variables)


def variable_of(variables: Dict[str, Any], name: str, version: bytes, make: Callable[..., Any],
                args: tuple) -> Any:
    """Return an object that has one identity in each process, by the name and version that its main
    module gives it."""
    space = spaces.known(variables)
    if space is None:
        return make(*args)
    if space.native and name in variables:
        return variables[name]
    if space.applied.get(name) != version or name not in variables:
        space.apply({name: (version, make(*args))})
    return variables[name]


def class_of(tracker: str, version: tuple, module: str, name: str,
             make: Optional[Callable[..., Any]], args: tuple) -> Any:
    """Return a class of a program, by the number that its program gives it. Without `make`, the
    class must be known here already, by this number or by its name."""
    known = _classes.get(tracker)
    if known is not None:
        return known
    if make is None or (version != sys.version_info[:2] and '<locals>' not in name):
        return _by_name_here(version, module, name, 'class')
    made = _classes.setdefault(tracker, make(*args))
    _received.setdefault(made, (tracker, {}))
    spaces.name_class(made)
    return made


def fill_class(cls: type, state: tuple) -> None:
    """Set those attributes of a class sent by value whose version differs from the one that was set
    before. A class that was defined in this process remains unchanged."""
    versions, attributes, set_state, reducer = state
    if cls not in _received:
        return
    if reducer is not None:   # of copyreg
        copyreg.pickle(cls, reducer)  # type: ignore[arg-type]
    applied = _received[cls][1]
    changed = {
        name: value
        for name, value in attributes.items() if applied.get(name) != versions[name]
    }
    for name in [name for name in applied if name not in attributes]:
        del applied[name]
        if name in vars(cls):
            delattr(cls, name)
    applied.update((name, versions[name]) for name in changed)
    set_state(cls, (changed, {}))


class Referent(weakref.ref):
    """A weak reference that keeps its object alive: the object that held it in the program has not
    been sent."""
    __slots__ = ('kept',)


def make_reference(obj: Any) -> Any:
    """Return a weak reference for a job."""
    reference = Referent(obj)
    reference.kept = obj  # type: ignore[attr-defined]   # its slot
    return reference


def make_weak(kind: type, contents: Any) -> Any:
    """Return a weak container for a job; it keeps its contents alive, as Referent does."""
    made = kind(contents)
    made._dispy_kept = contents
    return made


def make_local(kind: type, attributes: Dict[str, Any]) -> Any:
    """Return a `threading.local` with the values that it has in the thread which pickled it."""
    made = kind.__new__(kind)  # type: ignore[call-overload]
    vars(made).update(attributes)
    return made


def make_context_variable(name: str, default: tuple, value: tuple) -> Any:
    """Return a ContextVar; default and value are tuples of one element, or empty."""
    if default:
        made = contextvars.ContextVar(name, default=default[0])
    else:
        made = contextvars.ContextVar(name)
    if value:
        made.set(value[0])
    return made


def make_cached(function: Callable[..., Any], most: Optional[int], typed: bool) -> Any:
    """Return a function with functools.lru_cache; its cache is empty at first."""
    return functools.lru_cache(most, typed)(function)


def make_dispatcher(rows: List[Tuple[type, Callable[..., Any]]]) -> Any:
    """Return a function of functools.singledispatch that has these implementations."""
    implementations = dict(rows)
    made = functools.singledispatch(implementations.pop(object))
    for kind, implementation in implementations.items():
        made.register(kind, implementation)
    return made


def make_view(data: Any, form: str, shape: tuple) -> memoryview:
    """Return a memoryview with memory of its own."""
    return memoryview(data).cast('B').cast(form, shape)  # type: ignore[call-overload]


def make_object(kind: type, attributes: Dict[str, Any]) -> Any:
    """Return an object whose class reduces it to a name that only its program has."""
    made: Any = object.__new__(kind)
    vars(made).update(attributes)
    return made


def make_typed(kind: type, args: tuple, options: dict) -> Any:
    """Return a type variable or the like."""
    return kind(*args, **options)


def _reduce_method(method: types.MethodType) -> tuple:
    """Reduce a method as pickle does if its name leads back to it, which is not the case for names
    that begin with two underscores."""
    name = getattr(method.__func__, '__name__', '')
    try:
        found = getattr(method.__self__, name, None) == method
    except Exception:  # __getattr__ or __eq__ of the user's
        found = False
    if found:
        return getattr, (method.__self__, name)
    return types.MethodType, (method.__func__, method.__self__)


def _reduce_file(file: Any) -> tuple:
    for name in ('stdin', 'stdout', 'stderr'):
        if file is getattr(sys, name):
            return getattr, (sys, name)
    raise TypeError('an open file cannot be pickled: open it in the job, or send it (depends)')


def _reduce_view(view: memoryview) -> tuple:
    if view.readonly:
        data: Union[bytes, bytearray] = bytes(view)
    else:
        data = bytearray(view)
    return make_view, (data, view.format, view.shape)


def _reduce_context_variable(variable: Any) -> tuple:
    context = contextvars.copy_context()
    try:
        default: tuple = (contextvars.Context().run(variable.get),)
    except LookupError:
        default = ()
    return make_context_variable, (variable.name, default,
                                   (context[variable], ) if variable in context else ())


def _reduce_match(match: Any) -> tuple:
    """Reduce a match object to a search at the same position. Raises TypeError if the search would
    not yield the same match."""
    again = match.re.match(match.string, match.start(), match.endpos)
    if again is None or (again.regs, again.pos) != (match.regs, match.start()):
        raise TypeError("cannot pickle 're.Match' object: take its groups")
    return make_match, (match.re, match.string, match.start(), match.endpos)


def make_match(pattern: Any, text: Any, start: int, end: int) -> Any:
    """Return a match object."""
    return pattern.match(text, start, end)


def make_context(items: List[Tuple[Any, Any]]) -> contextvars.Context:
    """Return a context with these values of its variables."""
    made = contextvars.Context()
    for variable, value in items:
        made.run(variable.set, value)
    return made


def _reduce_queue(waiting: Any) -> tuple:
    """Reduce a queue to the items that wait in it now. They can only be listed by taking them out
    and putting them back."""
    items = []
    with contextlib.suppress(queue.Empty):
        while True:
            items.append(waiting.get_nowait())
    for item in items:
        waiting.put(item)
    return make_queue, (items,)


def make_queue(items: List[Any]) -> Any:
    """Return a queue.SimpleQueue."""
    made: Any = queue.SimpleQueue()
    for item in items:
        made.put(item)
    return made


def make_exception(kind: Type[BaseException], args: tuple,
                   attributes: Optional[dict]) -> BaseException:
    """Return an exception in its original state, without calling its constructor, which may want
    other arguments than those that the exception has kept."""
    made = kind.__new__(kind, *args)
    made.args = args
    vars(made).update(attributes or {})
    return made


def _reduce_cached(function: Any) -> tuple:
    if hasattr(function, 'cache_parameters'):
        parameters = function.cache_parameters()
    else:
        parameters = {}
    return make_cached, (function.__wrapped__, function.cache_info().maxsize,
                         parameters.get('typed', False))


def _reduce_dispatcher(function: Any) -> tuple:
    return make_dispatcher, (list(function.registry.items()),)


def _reduce_typed(variable: Any) -> tuple:
    """Reduce TypeVar, ParamSpec, TypeVarTuple and NewType to what their constructors take."""
    if hasattr(variable, '__supertype__'):
        return make_typed, (type(variable), (variable.__name__, variable.__supertype__), {})
    names = (('bound', '__bound__'), ('covariant', '__covariant__'), ('contravariant',
                                                                      '__contravariant__'))
    options = {
        option: getattr(variable, name)
        for option, name in names if getattr(variable, name, None)
    }
    constraints = getattr(variable, '__constraints__', ())
    return make_typed, (type(variable), (variable.__name__, *constraints), options)


def _reduce_partialmethod(method: Any) -> tuple:
    """Reduce a partialmethod by its constructor, which cannot be called without arguments since
    Python 3.14."""
    again: Any = functools.partial(functools.partialmethod, method.func, *method.args,
                                   **method.keywords)
    return again, ()


def _reduce_forward_reference(reference: Any) -> tuple:
    """Reduce a forward reference without the global variables in which it would be evaluated, which
    are those of its module."""
    owner = getattr(reference, '__owner__', None)
    module = reference.__forward_module__ or getattr(owner, '__module__', None)
    is_class = reference.__forward_is_class__
    again = functools.partial(typing.ForwardRef, reference.__forward_arg__, module=module,
                              is_class=is_class)
    return again, ()


def annotations_of(obj: Any) -> Dict[str, Any]:
    """Return the annotations that a function or class has of its own. Since Python 3.14 they are
    evaluated when they are requested: if that fails, as for names that only a type checker imports,
    all of them are text, as with `from __future__ import annotations`."""
    try:
        return dict(obj.__annotations__)
    except Exception:  # whatever the user's expressions raise
        annotationlib = importlib.import_module('annotationlib')
        text = annotationlib.Format.STRING
        return annotationlib.get_annotations(obj, format=text)  # type: ignore[no-any-return]


def _with_annotations(function: types.FunctionType) -> types.FunctionType:
    """Return a function whose annotations can be read as an attribute: this one or a copy."""
    with contextlib.suppress(Exception):  # as above
        dict(function.__annotations__)
        return function
    copied = types.FunctionType(function.__code__, function.__globals__, function.__name__,
                                function.__defaults__, function.__closure__)
    for name in ('__kwdefaults__', '__qualname__', '__module__', '__doc__'):
        setattr(copied, name, getattr(function, name))
    vars(copied).update(vars(function))
    copied.__annotations__ = annotations_of(function)
    return copied


def _keep_annotations(cls: type, attributes: Dict[str, Any]) -> None:
    """Put the annotations of a class among the attributes that travel, if the class has a function
    that computes them: cloudpickle leaves this function out, since it refers to the class."""
    own = vars(cls)
    if own.get('__annotate_func__') is None and '__annotations_cache__' not in own:
        return
    for name in ('__annotate_func__', '__annotations_cache__'):
        attributes.pop(name, None)
    attributes['__annotations__'] = annotations_of(cls)


def _reduce_library(library: Any) -> tuple:
    return type(library), (library._name,)


def _is_stateless(function: types.FunctionType) -> bool:
    """Return whether a function has no default values that calls could change."""
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return ATOMS.issuperset(map(type, defaults))


def _is_dispatcher(function: types.FunctionType) -> bool:
    return all(
        hasattr(function, name) for name in ('dispatch', 'register', 'registry', '__wrapped__'))


_REDUCERS: Dict[type, Callable[[Any], tuple]] = {
    weakref.ref: lambda reference: (make_reference, (reference(), ))
    if reference() is not None else (_dead_reference, ()),
    weakref.WeakSet: lambda weak: (make_weak, (weakref.WeakSet, list(weak))),
    weakref.WeakValueDictionary: lambda weak: (make_weak,
                                               (weakref.WeakValueDictionary, dict(weak))),
    weakref.WeakKeyDictionary: lambda weak: (make_weak,
                                             (weakref.WeakKeyDictionary, list(weak.items()))),
    types.MethodType: _reduce_method,
    io.TextIOWrapper: _reduce_file,
    memoryview: _reduce_view,
    struct.Struct: lambda layout: (struct.Struct, (layout.format, )),
    re.Match: _reduce_match,
    contextvars.Context: lambda context: (make_context, (list(context.items()), )),
    queue.SimpleQueue: _reduce_queue,
    functools.partialmethod: _reduce_partialmethod,
}
if sys.version_info >= (3, 14):   # before, it held a name only
    _REDUCERS[typing.ForwardRef] = _reduce_forward_reference


def _dead_reference() -> Any:
    space = Space((), {}, False)
    return weakref.ref(space)


class ValueReducer:
    """The mix-in class that extends cloudpickle's pickler for clients and workers. `modules` are
    the names of the modules that the pickle refers to by name or imports; `plain` says whether it
    contains builtin values only, so that opening it runs none of the user's code.
    """

    modules: Set[str]
    plain: bool
    portable: bool
    exact = False      # objects are variables of a program and are reproduced exactly
    complete = False   # classes of other processes are pickled completely, too

    def __init__(self, file: Any, protocol: int = 5, buffer_callback: Any = None) -> None:
        super().__init__(file, protocol, buffer_callback)  # type: ignore[call-arg]
        self.modules = set()
        self.plain = self.portable = True
        self._spaces: Dict[int, _SpaceRef] = {}
        self._cells: Dict[int, _CellRef] = {}
        self._locks_of_code: Dict[int, Any] = {}   # by id
        self._registered = cloudpickle_part('list_registry_pickle_by_value')()

    def importable(self, module: str) -> bool:
        """Return whether the other side finds this module by its name."""
        if module not in sys.modules:
            return False
        return module not in MAIN_NAMES

    def reducer_override(self, obj: Any) -> Any:
        """Return how an object is reduced. The pickler calls this for everything that is not a
        builtin value."""
        self.plain = False
        kind = type(obj)
        if kind in _ordinary:
            return NotImplemented
        if issubclass(kind, type):
            return self._reduce_class(obj)
        if kind is types.FunctionType:
            return self._reduce_function(obj)
        if kind is types.ModuleType or isinstance(obj, types.ModuleType):
            return self._reduce_module(obj)
        if isinstance(obj, types.BuiltinFunctionType) or 'function_or_method' in kind.__name__:
            module = getattr(obj, '__module__', None)
            self._note(module)
            return NotImplemented
        special = self._special(kind)
        if special is not None:
            return special(obj)
        if len(_ordinary) >= 4096:   # a program may make classes without end
            _ordinary.clear()
        _ordinary.add(kind)
        return NotImplemented

    def _special(self, kind: type) -> Optional[Callable[[Any], Any]]:
        """Return how objects of this class are reduced, if it is not pickle's own way."""
        if kind is _CachedType:
            return self._reduce_cached
        if kind is object:
            return self._reduce_sentinel
        if kind in _LOCKS:
            return self._reduce_lock
        if kind is contextvars.ContextVar:
            return self._reduce_context_variable
        if kind in _TYPED:
            return self._reduce_typed
        if issubclass(kind, threading.local):
            return self._reduce_local
        if 'ctypes' in sys.modules:
            if issubclass(kind, sys.modules['ctypes'].CDLL):
                return _reduce_library
        if kind in copyreg.dispatch_table:
            return None
        if kind in _REDUCERS:
            return None
        if issubclass(kind, BaseException):
            if isinstance(kind.__init__, types.FunctionType):
                return self._reduce_exception
            return None
        if isinstance(kind.__reduce__, types.FunctionType):
            return self._reduce_named
        if isinstance(kind.__reduce_ex__, types.FunctionType):
            return self._reduce_named
        return None

    def _note(self, module: Any) -> None:
        if isinstance(module, str):
            self.modules.add(module)

    def _is_by_name(self, obj: Any, name: Any) -> bool:
        """Return whether an importable module has this object under its qualified name."""
        module = getattr(obj, '__module__', None)
        if not isinstance(module, str):
            return False
        if not isinstance(name, str):
            return False
        if not is_named(obj, module, name):
            return False
        if not self.importable(module):
            return False
        if self._is_registered(module):
            return False
        self.modules.add(module)
        return True

    def _is_registered(self, module: str) -> bool:
        """Return whether the module, or a package that contains it, is registered with
        cloudpickle.register_pickle_by_value."""
        if not bool(self._registered):
            return False
        return any(module == name or module.startswith(name + '.') for name in self._registered)

    def _reduce_class(self, cls: Any) -> Any:
        if cls.__module__ == 'builtins':
            hidden = _hidden_types().get(cls)
            if hidden:
                return find_named, hidden
            return super().reducer_override(cls)  # type: ignore[misc]
        if self._is_by_name(cls, cls.__qualname__):
            return NotImplemented
        if cls.__module__ == '_ctypes':
            return type, (_ctypes_bases()[cls],)
        if type(cls).__module__ == '_ctypes' and hasattr(
                cls, '_length_') and '_length_' in vars(cls) and cls.__name__.startswith(
                    cls._type_.__name__):
            return operator.mul, (cls._type_, cls._length_)
        received = _received.get(cls)
        # Its program has the object
        if received is not None and not self.complete and '<locals>' not in cls.__qualname__:
            return class_of, (received[0], sys.version_info[:2], cls.__module__, cls.__qualname__,
                              None, ())
        if '<locals>' not in cls.__qualname__ or not self.importable(cls.__module__):
            self.portable = False
        make, args, (attributes,
                     _), _, _, set_state = cloudpickle_part('_dynamic_class_reduce')(cls)
        attributes.pop('__slotnames__', None)   # which copyreg has determined
        _keep_annotations(cls, attributes)
        if not self.exact:
            self._allow_locks(attributes.values())
        args = _class_arguments(cls, args, attributes)
        tracker = args[-2]
        if issubclass(cls, enum.Enum) and _has_own_members(cls):
            make = make_enum
            args = (type(cls), cls.__name__, cls.__qualname__, cls.__module__, cls.__bases__,
                    _members_of(cls))
        _classes.setdefault(tracker, cls)
        versions = _class_versions.setdefault(cls, Versions())
        return (class_of, (tracker, sys.version_info[:2], cls.__module__, cls.__qualname__, make,
                           args),
                ({name: versions.of(name, value)
                  for name, value in attributes.items()}, attributes, set_state,
                 copyreg.dispatch_table.get(cls)), None, None, fill_class)

    def _space(self, variables: Dict[str, Any], module: Any) -> _SpaceRef:
        found = self._spaces.get(id(variables))
        if found is None:
            if isinstance(module, str):
                imported = sys.modules.get(module)
            else:
                imported = None
            by_name = imported is not None and vars(imported) is variables and self.importable(
                module) and not self._is_registered(module)
            found = self._spaces[id(variables)] = _SpaceRef(variables, module if by_name else '')
            if by_name:
                self.modules.add(module)
        return found

    def _reduce_function(self, function: types.FunctionType) -> Any:
        if self._is_by_name(function, function.__qualname__):
            return NotImplemented
        variable = self._variable_of_module(function)
        if variable is not None:
            return variable
        if _is_dispatcher(function):
            made = _reduce_dispatcher(function)
            return self._of_main(function, made)
        readable = _with_annotations(function)
        attributes, slots = super()._dynamic_function_reduce(readable)[2]  # type: ignore[misc]
        variables = slots.pop('__globals__')
        slot = slots.pop('__closure__')
        closure = slot or ()
        submodules = slots.pop('_cloudpickle_submodules')
        package = function.__globals__.get('__package__')
        imported = imports_of(function.__code__, package)
        cells = []
        self.modules.update(imported)
        contents = []
        for cell in closure:
            reference = self._cells.setdefault(id(cell), _CellRef(cell))
            cells.append(reference)
            with contextlib.suppress(ValueError):   # it is empty
                contents.append((reference, cell.cell_contents))
        module = function.__globals__.get('__name__')
        place = self._space(function.__globals__, module)
        space = spaces.known(function.__globals__)
        # Another version of Python finds it in the source of its module
        if place.reduced[0] is not variables_of_module:
            self.portable = False
        if place.reduced[0] is variables_of_module or (space is not None and not space.native):
            rows: Dict[str, Tuple[bytes, Any]] = {}
        else:
            rows = {name: (space.versions.of(name, value) if space is not None else b'', value)
                    for name, value in variables.items()}
        if not self.exact:
            self._allow_locks([
                *attributes.values(), *slots.values(), *(value for _, value in contents),
                *variables.values()
            ])
        name = function.__qualname__
        is_plain = not attributes and not closure
        version = self._version_of(function, space, is_plain)
        return (function_of, (place, function.__code__, function.__module__, name, version,
                              tuple(cells)), (attributes, slots, contents, rows, name, version,
                                              submodules), None, None, fill_function)

    @staticmethod
    def _version_of(function: types.FunctionType, space: Any, is_plain: bool) -> bytes:
        """Return the version by which a function is known in the space of its variables; it is
        empty if there is none. `is_plain` says that the function has neither attributes nor
        cells."""
        name = function.__qualname__
        if space is None:
            return b''
        variable = space.variables.get(name)
        if variable is not function:
            return b''
        if not space.native:
            # Its program finds it by its name; other processes get what is pickled here
            return b'received'
        if is_plain and _is_stateless(function):
            return space.versions.of(name, function)  # type: ignore[no-any-return]
        return b''

    def _variable_of_module(self, function: types.FunctionType) -> Optional[tuple]:
        """Reduce a function that an importable module has under another name than the function's
        own, such as a lambda in a variable."""
        module = function.__module__
        if isinstance(module, str) and module not in MAIN_NAMES:
            imported = sys.modules.get(module)
        else:
            imported = None
        variables = getattr(imported, '__dict__', None)
        if type(variables) is not dict:
            return None
        if not self.importable(module):
            return None
        if self._is_registered(module):
            return None
        name = next((name for name, value in list(variables.items()) if value is function), None)
        if name is None:
            return None
        self.modules.add(module)
        return find_named, (module, name)

    def _reduce_module(self, module: types.ModuleType) -> Any:
        name = module.__name__
        if sys.modules.get(name) is module:
            importable = self.importable(name)
            if importable and not self._is_registered(name):
                self.modules.add(name)
                return importlib.import_module, (name,)
        return super().dispatch_table[types.ModuleType](module)  # type: ignore[misc]

    def _of_main(self, obj: Any, made: tuple) -> tuple:
        """Reduce an object so that it is not created again for each payload, if the main module has
        it under its name."""
        module = sys.modules.get('__main__')
        if module is not None:
            variables = vars(module)
        else:
            variables = {}
        qualname = getattr(obj, '__qualname__', None)
        name = qualname or getattr(obj, '__name__', None)
        if not isinstance(name, str) or variables.get(name) is not obj:
            name = next((key for key, value in list(variables.items()) if value is obj), '')
        if name:
            space = spaces.of_variables(variables)
        else:
            space = None
        if space is None:
            return made
        if space.native:
            version = space.versions.of(name, obj)
        else:
            version = space.applied.get(name, b'')
        return variable_of, (self._space(variables, '__main__'), name, version, *made[:2])

    def _reduce_lock(self, lock: Any) -> Any:
        """Reduce a lock. One that belongs to code is a free lock in each process. One inside a
        value is refused, as pickle does: in another process it would protect nothing."""
        if self.exact or id(lock) in self._locks_of_code:
            return _LOCKS[type(lock)], ()
        text = "cannot pickle '_thread.%s' object" % type(lock).__name__
        raise TypeError(text)

    def _allow_locks(self, values: Iterable[Any]) -> None:
        """Find the locks that belong to a class or function: its own ones, and those in objects
        that it refers to."""
        waiting = [(value, 0) for value in values]
        while waiting and len(waiting) < 4096:
            value, depth = waiting.pop()
            if type(value) in _LOCKS:
                self._locks_of_code[id(value)] = value
            elif depth < 4 and not isinstance(value, _IDENTICAL):
                if type(value) not in ATOMS:
                    for part in _held_by(value):
                        waiting.append((part, depth + 1))

    def _reduce_sentinel(self, obj: Any) -> Any:
        """Reduce a bare object(), which programs compare by identity."""
        made: tuple = (object, ())
        if self.exact:
            return self._of_main(obj, made)
        return made

    def _reduce_cached(self, function: Any) -> Any:
        qualname = getattr(function, '__qualname__', None)
        if self._is_by_name(function, qualname):
            return NotImplemented
        made = _reduce_cached(function)
        return self._of_main(function, made)

    def _reduce_typed(self, variable: Any) -> Any:
        if self._is_by_name(variable, variable.__name__):
            return NotImplemented
        made = _reduce_typed(variable)
        return self._of_main(variable, made)

    def _reduce_context_variable(self, variable: Any) -> Any:
        made = _reduce_context_variable(variable)
        return self._of_module(variable, made)

    def _reduce_local(self, local: Any) -> Any:
        made = (make_local, (type(local), dict(vars(local))))
        return self._of_module(local, made)

    def _of_module(self, obj: Any, made: tuple) -> tuple:
        """Reduce an object that has no name of its own and is the value of a variable in an
        importable module."""
        for module, imported in list(sys.modules.items()):
            variables = getattr(imported, '__dict__', None)
            if module in MAIN_NAMES:
                continue
            if type(variables) is not dict:
                continue
            if not self.importable(module):
                continue
            if self._is_registered(module):
                continue
            name = next((name for name, value in list(variables.items()) if value is obj), None)
            if name is not None:
                self.modules.add(module)
                return find_named, (module, name)
        return self._of_main(obj, made)

    def _reduce_exception(self, exc: BaseException) -> Any:
        """Reduce an exception whose constructor the user has defined: pickle would call the
        constructor with the arguments that the exception has kept, which may not be those that it
        expects."""
        reduced = exc.__reduce_ex__(5)
        if isinstance(reduced, str):
            return reduced
        if reduced[:2] != (type(exc), exc.args):
            return reduced
        if not self.exact:
            with contextlib.suppress(Exception):  # opening it would fail in the same way
                type(exc)(*exc.args)
                return reduced
        return make_exception, (type(exc), exc.args, dict(vars(exc)))

    def _reduce_named(self, obj: Any) -> Any:
        """Reduce an object whose class may reduce it to the name of a variable."""
        reduced = obj.__reduce_ex__(5)
        if not isinstance(reduced, str):
            return reduced
        if self._is_by_name(obj, reduced):
            return reduced
        made = (make_object, (type(obj), dict(vars(obj))))
        return self._of_main(obj, made)


def _held_by(value: Any) -> List[Any]:
    """Return the objects that a container or an instance contains; nothing for other kinds of
    objects."""
    if type(value) is dict:
        return list(value.values())
    if type(value) in (list, tuple, collections.deque):
        return list(value)
    attributes = getattr(value, '__dict__', None)
    if type(attributes) is dict:
        return list(attributes.values())
    return []


@functools.lru_cache(maxsize=None)
def _hidden_types() -> Dict[type, Tuple[str, str]]:
    """Return the builtin types that `builtins` does not name, such as that of a dictionary's keys,
    with module and name."""
    import _collections_abc
    return {
        value: ('_collections_abc', name)
        for name, value in vars(_collections_abc).items() if isinstance(value, type)
        and value.__module__ == 'builtins' and not hasattr(builtins, name)
    }


_ordinary: Set[type] = set()   # classes whose objects pickle handles
_TYPED = frozenset(
    getattr(typing, name) for name in ('TypeVar', 'ParamSpec', 'TypeVarTuple', 'NewType')
    if isinstance(getattr(typing, name, None), type))


def is_named(obj: Any, module: str, name: str) -> bool:
    """Return whether a module has this object under its qualified name."""
    if '<locals>' in name:
        return False
    if module not in sys.modules:
        return False
    try:
        path = name.split('.')
        return functools.reduce(getattr, path, sys.modules[module]) is obj
    except Exception:  # AttributeError, or what a __getattr__ of the user's raises
        return False


@functools.lru_cache(maxsize=None)
def _ctypes_bases() -> Dict[type, type]:
    """Return the metaclasses of ctypes, which have no names there, each with an example of its
    classes."""
    import ctypes
    c_func_ptr = getattr(ctypes, '_CFuncPtr')
    return {
        type(base): base
        for base in (ctypes.Structure, ctypes.Union, ctypes.Array, ctypes.c_int, ctypes._Pointer,
                     c_func_ptr)
    }


def _has_own_members(cls: Any) -> bool:
    """Return whether a constructor of the user's made the members of an enum, which may have more
    state than their values."""
    made_by = [
        vars(base).get(name) for base in cls.__mro__
        if base not in enum.Enum.__mro__ and base.__module__ != 'enum'
        for name in ('__new_member__', '__init__')
    ]
    for function in made_by:
        if isinstance(function, types.FunctionType):
            return True
    return False


def _members_of(cls: Any) -> List[Tuple[str, Any, dict]]:
    """Return the name, the data of the mixed-in type, and the attributes of each member of an
    enum."""
    kind = cls._member_type_
    return [(member.name, () if kind is object else (kind(member), ),
             {name: value
              for name, value in vars(member).items() if name != '__objclass__'}) for member in cls]


def make_enum(meta: Any, name: str, qualname: str, module: str, bases: tuple,
              members: List[Tuple[str, tuple, dict]]) -> Any:
    """Return an enum class with its members, without running their constructor again."""
    space = meta.__prepare__(name, bases)
    space['__module__'], space['__qualname__'] = module, qualname
    made = meta.__new__(meta, name, bases, space)
    kind = made._member_type_
    for member_name, data, attributes in members:
        member = kind.__new__(made, *data)
        vars(member).update(attributes, __objclass__=made)
        type.__setattr__(made, member_name, member)
        made._member_names_.append(member_name)
        made._member_map_[member_name] = member
        with contextlib.suppress(TypeError):   # an unhashable value must be searched
            made._value2member_map_[member._value_] = member
    return made


def _class_arguments(cls: type, args: tuple, attributes: Dict[str, Any]) -> tuple:
    """Return the arguments for cloudpickle's function that makes classes, with what a class must
    have from its creation on: its qualified name, its slots, the fields of a ctypes structure.
    Attributes that these create by themselves are left out of the attributes, whose order is that
    of the class."""
    ordered = {name: attributes.pop(name) for name in list(vars(cls)) if name in attributes}
    attributes.update(ordered)
    if len(args) != 6:   # of an enum
        return args
    bases = args[2]
    options = dict(args[3], __qualname__=cls.__qualname__)
    # It makes a tuple; if it were called again, the tuple would have no fields
    if typing.NamedTuple in bases:
        bases = cls.__bases__
    if '__slots__' in vars(cls):
        slots = [
            name for name, value in vars(cls).items()
            if isinstance(value, types.MemberDescriptorType)
        ]
        for name in slots:
            attributes.pop(name, None)
        extra = [name for name in ('__dict__', '__weakref__') if name in vars(cls)]
        options['__slots__'] = tuple(slots + extra)
    if '_fields_' in vars(cls) and type(cls).__module__ == '_ctypes':
        options.update((name, attributes.pop(name))
                       for name in ('_anonymous_', '_pack_', '_fields_') if name in attributes)
        for name, value in list(attributes.items()):
            if type(value).__name__ == 'CField':
                del attributes[name]
    return (*args[:2], bases, options, *args[4:])


_ImportsOfCode = weakref.WeakKeyDictionary
_imports: '_ImportsOfCode[types.CodeType, List[Tuple[int, str, tuple]]]' = _ImportsOfCode()


def imports_of(code: types.CodeType, package: Any) -> Set[str]:
    """Return the absolute names that the import statements of a function may refer to, including
    those of functions nested in it."""
    found = _imports.get(code)
    if found is None:
        found = _imports[code] = list(_import_statements(code))
    names = set()
    for level, module, wanted in found:
        if level and not (isinstance(package, str) and package):
            continue
        try:
            if level:
                origin = importlib.util.resolve_name('.' * level + module, package)
            else:
                origin = module
        except (ImportError, ValueError):   # beyond the top-level package: the job is told
            continue
        names.add(origin)
        names.update('%s.%s' % (origin, name) for name in wanted if name != '*')
    packages = {name.partition('.')[0] for name in names}
    return names | _submodules_used(code, packages)


def _submodules_used(code: types.CodeType, packages: Set[str]) -> Set[str]:
    """Return the loaded submodules that a function can reach as attributes of packages that it
    imports itself. cloudpickle finds those of packages in global variables."""
    used = set(code.co_names)
    loaded = list(sys.modules)
    return {
        name
        for name in loaded if isinstance(name, str) and '.' in name
        and name.partition('.')[0] in packages and set(name.split('.')[1:]) <= used
    }


def _import_statements(code: types.CodeType) -> Iterator[Tuple[int, str, tuple]]:
    """Yield level, module and names of each import statement."""
    import dis
    if dis.opmap['IMPORT_NAME'] in code.co_code[::2]:
        instructions = dis.get_instructions(code)
        steps = [step for step in instructions if step.opname not in ('EXTENDED_ARG', 'CACHE')]
        for at, step in enumerate(steps):
            if step.opname == 'IMPORT_NAME':
                level, wanted = (steps[at - back].argval for back in (2, 1))
                yield level if isinstance(level, int) else 0, step.argval, wanted if isinstance(
                    wanted, tuple) else ()
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _import_statements(const)


@functools.lru_cache(maxsize=None)
def cloudpickle_part(name: str) -> Any:
    """Return a function of cloudpickle, from whichever of its modules contains it in this
    version."""
    import cloudpickle
    cloudpickle_fast = getattr(cloudpickle, 'cloudpickle_fast', None)
    modules = (cloudpickle, cloudpickle.cloudpickle, cloudpickle_fast)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def value_pickler() -> Any:
    """Return the class of the pickler for everything that leaves this process. It uses the reducers
    that are registered with copyreg at the time of the call."""
    return _value_pickler(len(copyreg.dispatch_table))


@functools.lru_cache(maxsize=2)
def _value_pickler(known: int) -> Any:
    import cloudpickle
    reduce_code = cloudpickle.Pickler.dispatch_table[types.CodeType]

    class ValuePickler(ValueReducer, cloudpickle.Pickler):  # type: ignore[misc, name-defined]
        dispatch_table = {
            **cloudpickle.Pickler.dispatch_table, **_REDUCERS, types.CodeType: lambda code:
            (make_code, (sys.version_info[:2], reduce_code(code)[1], code.co_filename, code.co_name,
                         code.co_firstlineno))
        }
    return ValuePickler


# -- modules of the user ---------------------------------------------------------------------------

# Modules are imported by their names from the directory of the client's files, and then get the
# values that the program has set in them. A `bundle` is what is sent for a group of modules; a
# computation begins with bundle 0, and arguments of jobs may bring more. Runners and workers use
# this.
class StateRow(NamedTuple):
    """A variable of a module, or an attribute of a class in it, as the program had it."""
    module: str
    owner: str        # qualified name of the class; empty: the module itself
    name: str
    form: bytes       # digest of what plain pickle makes of the value
    # The number of the object in the state's pickle that is updated in place; -1: the value is set
    number: int
    computed: bool    # the module computes it: another platform keeps its own value


class _StateUnpickler(pickle.Unpickler):
    """Opens the state of modules. Numbers in it represent objects that keep their identity."""

    def __init__(self, data: bytes, targets: List[Any], same_python: bool) -> None:
        super().__init__(io.BytesIO(data))
        self._targets = targets
        self._same_python = same_python
        self.absent: List[str] = []

    def find_class(self, module: str, name: str) -> Any:
        """Return what a module has under a name."""
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            if self._same_python:
                raise
            self.absent.append('%s.%s' % (module, name))
            # Pickle does not find it by its name, and so cannot write what holds it
            return type(name, (_Absent,), {'__module__': module})

    def persistent_load(self, number: Any) -> Any:
        """Return the object on this node that has this number."""
        return self._targets[number]


def _pickler_of_whole(targets: List[Any]) -> Any:
    """Return a pickler that can write a state that was opened as a whole. It does not descend into
    the targets."""
    numbers = {id(target): number for number, target in enumerate(targets)}

    class WholePickler(pickle.Pickler):
        """Writes an object that is opened as the contents of a target, or as a value."""

        def persistent_id(self, obj: Any) -> Optional[int]:
            """Return the identifier of a target, or None. The pickler calls this for every
            object."""
            return numbers.get(id(obj))
    return WholePickler


def plain_form(value: Any, limit: int = sys.maxsize) -> Optional[bytes]:
    """Return a digest of the plain pickle of a value, with functions and classes by name; None if
    the value cannot be pickled or its pickle is larger than `limit` bytes."""
    return _digest_of_pickle(pickle.Pickler, value, limit)


_CONTAINERS = (list, dict, set, collections.OrderedDict, collections.defaultdict,
               collections.Counter, collections.deque)


def keeps_identity(value: Any) -> bool:
    """Return whether a value is updated in place on a node: a container, or an instance whose only
    state is its attributes."""
    kind = type(value)
    if kind in _CONTAINERS:
        return True
    if kind is types.SimpleNamespace:
        return True
    if isinstance(value, (*_IDENTICAL, int, str, bytes, float, tuple, list, dict, set, frozenset,
                          BaseException)):
        return False
    own = ('__reduce__', '__reduce_ex__', '__getstate__', '__setstate__', '__getnewargs__',
           '__getnewargs_ex__')
    if not isinstance(getattr(value, '__dict__', None), dict):
        return False
    if kind in copyreg.dispatch_table:
        return False
    for name in own:
        if getattr(kind, name, None) is not getattr(object, name, None):
            return False
    return not copyreg._slotnames(kind)  # type: ignore[attr-defined]


def contents_of(value: Any) -> Any:
    """Return the contents of an object as `fill_in_place` takes them."""
    if isinstance(value, collections.defaultdict):
        return value.default_factory, dict(value)
    if isinstance(value, (list, collections.deque)):
        return list(value)
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, set):
        return set(value)
    return dict(vars(value))


def fill_in_place(target: Any, contents: Any) -> None:
    """Give an object that keeps its identity the contents that it has in the program."""
    if isinstance(target, collections.defaultdict):
        target.default_factory, contents = contents
    if isinstance(target, (list, dict, set, collections.deque)):
        target.clear()
        (target.extend if isinstance(target,
                                     (list, collections.deque)) else target.update)(contents)
    else:
        vars(target).clear()
        vars(target).update(contents)


class ModuleState:
    """Sets on a node the variables that a program has set in its modules."""

    def __init__(self, platform_: str, rows: List[StateRow], kinds: List[Tuple[str, str]],
                 pickled: bytes, build: str) -> None:
        same = platform_ == sys.platform
        self._same_python = build == build_tag()
        self._rows = [row for row in rows if same or not row.computed]
        self._kinds = kinds        # number -> module and name of the object's class
        self._pickled = pickled

    def apply(self) -> None:
        """Import the modules and set the state. Raises what importing the modules and opening the
        state raise."""
        changed = [row for row in self._rows if plain_form(self._value(row)) != row.form]
        if not changed:
            return
        targets = self._targets()
        unpickler = _StateUnpickler(self._pickled, targets, self._same_python)
        contents, values = unpickler.load()
        if unpickler.absent:
            whole = _pickler_of_whole(targets)
            changed = [row for row in changed if self._can_be_set(
                row, contents[row.number] if row.number >= 0 else values[row[:3]], whole,
                unpickler.absent)]
        for number in {row.number for row in changed if row.number >= 0}:
            fill_in_place(targets[number], contents[number])
        for row in changed:
            if row.number >= 0:
                value = targets[row.number]
            else:
                value = values[row.module, row.owner, row.name]
            if self._value(row) is not value:
                named = find_named(row.module, row.owner)
                setattr(named, row.name, value)

    @staticmethod
    def _can_be_set(row: StateRow, value: Any, whole: Any, absent: List[str]) -> bool:
        """Return whether this version of Python has everything of which a value is made. If not,
        the value that the module has computed here remains; raises ImportError if it has computed
        none."""
        if _digest_of_pickle(whole, value, sys.maxsize) is not None:
            return True
        if row.computed:
            return False
        text = ('variable %s of module %s needs %s, which %s does not have'
                % (row.name, row.module, ' or '.join(sorted(set(absent))),
                   python_of(sys.version_info)))
        raise ImportError(text)

    @staticmethod
    def _value(row: StateRow) -> Any:
        named = find_named(row.module, row.owner)
        return vars(named).get(row.name, _MISSING)

    def _targets(self) -> List[Any]:
        """Return, by number, the object here that gets the state of the program's object: the one
        with the same name if it has the same class and no other number stands for it, else a new
        one."""
        targets: List[Any] = [_MISSING] * len(self._kinds)
        taken: Set[int] = set()
        for row in self._rows:
            if row.number < 0:
                continue
            if targets[row.number] is not _MISSING:
                continue
            value = self._value(row)
            if type(value) is not find_named(*self._kinds[row.number]):
                continue
            if id(value) not in taken:
                targets[row.number] = value
                taken.add(id(value))
        for number, target in enumerate(targets):
            if target is _MISSING:
                kind = find_named(*self._kinds[number])
                targets[number] = kind.__new__(kind)
        return targets


_MISSING = object()
# Names below the private directory of a computation on a node
MODULES = 'modules/'      # files of the user's modules: the import root
BUNDLES = 'bundles/'      # the state of groups of them
BEHIND_ROOT = 'behind'    # modules that are found after the node's own
BUNDLE = 'bundle-%d'      # name of a bundle's file
TEXTS = 'texts-%d'        # name of the file with the texts of its modules, for the embedded node


def values_in(private: str) -> str:
    """Return the directory for values that are known by digest; each is a file with the digest as
    its name."""
    return os.path.join(private, 'values')


class ValueFiles:
    """Opens values by digest in a runner and its workers. Each time the file is mapped anew,
    copy-on-write: many jobs share the memory, and no job sees what another has changed. The mapping
    remains valid when the file is removed. A mapping holds a descriptor (before Python 3.13): if
    very many mappings exist, as in jobs that keep all values that they get, the file is read
    instead."""
    MAPPED_MOST = 128

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._mapped: 'weakref.WeakSet[mmap.mmap]' = weakref.WeakSet()

    def open(self, size: int, digest: bytes) -> Any:
        """Return a value as a writable buffer. Raises OSError."""
        digits = digest.hex()
        path = os.path.join(self._directory, digits)
        with open(path, 'rb', buffering=0) as file:
            if len(self._mapped) < self.MAPPED_MOST:
                # No descriptor is left, or the system has no mappings
                with contextlib.suppress(OSError, ValueError):
                    handle = file.fileno()
                    value = mmap.mmap(handle, size, access=mmap.ACCESS_COPY, **_NO_HANDLE)
                    self._mapped.add(value)
                    return value
            data = bytearray(size)
            view = memoryview(data)
            at = 0
            while at < size:
                count = file.readinto(view[at:at + ReceiveBuffer.AT_ONCE])  # type: ignore[arg-type]
                if not count:
                    text = 'a value of %d bytes ends after %d' % (size, at)
                    raise OSError(text)
                at += count
            return data


class KeptSource(importlib.machinery.SourceFileLoader):
    """Loads a module from a text that its file does not contain any more."""

    def __init__(self, name: str, path: str, text: bytes) -> None:
        super().__init__(name, path)
        self._text = text

    def get_data(self, path: str) -> bytes:  # type: ignore[override]
        """Return the text for the file of the module."""
        if path == self.path:
            return self._text
        return super().get_data(path)

    def path_stats(self, path: str) -> Any:  # type: ignore[override]
        """Raise OSError, because compiled code that may exist belongs to the file."""
        raise OSError('the file has changed')


class KeptTexts:
    """A finder that precedes all others on an embedded node. A module whose file has changed or was
    removed since the computation began gets the text of that time, as on other nodes."""

    def __init__(self) -> None:
        self._texts: Dict[str, Tuple[str, bytes]] = {}    # module -> path, text

    def add(self, texts: Dict[str, Tuple[str, bytes]]) -> None:
        """Serve these modules, too."""
        self._texts.update(texts)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find a module, unless its file is unchanged: other finders find that."""
        if name not in self._texts:
            return None
        file_path, text = self._texts[name]
        with contextlib.suppress(OSError):   # then it has gone
            with open(file_path, 'rb') as file:
                if file.read() == text:
                    return None
        loader = KeptSource(name, file_path, text)
        return importlib.util.spec_from_file_location(name, file_path, loader=loader)


class ModuleLoader:
    """Loads the user's modules in a runner and its workers, and finds those that are not on this
    host. `private` is the private directory of the computation, `directory` that of its jobs;
    `path` is the program's own sys.path if the node is embedded in the program (the files are then
    read where they are). `ask(request)` requests the number of a bundle or the name of a module
    from the client, and returns '' or why it is not available. `loading` is true while a runner
    loads its computation.
    """

    def __init__(self, private: str, path: List[str], directory: str) -> None:
        self.root = os.path.join(private, MODULES.rstrip('/'))
        self.directory = directory
        self._private = private
        self._path = path
        self._loaded: Set[int] = set()
        self._denied: Set[str] = set()     # names that the client does not have
        self.ask: Optional[Callable[[Any], str]] = None
        self.loading = True
        self._left: List[str] = []         # entries that jobs had in sys.path
        self._first: FrozenSet[str] = frozenset()   # modules that were there before any job
        self.notes: List[str] = []         # for the client's log
        self._texts = KeptTexts()

    def install(self) -> None:
        """Make the user's modules take precedence over the node's own."""
        if self._path:
            sys.path[:] = [
                *self._path, self.directory,
                *(entry for entry in sys.path if entry not in self._path)
            ]
        else:
            sys.path[:0] = [self.root, self.directory]
        sys.path.append(os.path.join(self._private, BEHIND_ROOT))
        OldModules.install()
        sys.meta_path.append(self)

    def here(self) -> Tuple[tuple, List[int]]:
        """Return the arguments for a loader in a child process of a job, and the bundles that it is
        to load."""
        bundles = sorted(self._loaded)
        return (self._private, self._path, self.directory), bundles

    def need(self, numbers: Iterable[int]) -> None:
        """Import the modules of these bundles, once. Raises what the import raises, or
        ModuleNotFoundError."""
        for number in numbers:
            if number not in self._loaded:
                before = self.loading
                self.loading = True
                try:
                    self._load(number)
                finally:
                    self.loading = before

    def _load(self, number: int) -> None:
        path = os.path.join(self._private, BUNDLES, BUNDLE % number)
        if not os.path.exists(path):
            if self.ask is None:
                error = 'this process cannot ask for them'
            else:
                error = self.ask(number)
            if error:
                raise ModuleNotFoundError('modules of the program are not on this node: %s' % error)
        with open(path, 'rb') as file:
            bundle = open_plain(file.read())
        importlib.invalidate_caches()
        texts = os.path.join(self._private, BUNDLES, TEXTS % number)
        if os.path.exists(texts):
            with open(texts, 'rb') as file:
                self._texts.add(open_plain(file.read()))
        if bundle['compiled'] and bundle['build'] != build_tag():
            text = 'module %s is compiled for %s; this node is %s' % (bundle['compiled'][0],
                                                                      bundle['build'], build_tag())
            raise ImportError(text)
        for name in bundle['order']:
            importlib.import_module(name)
        rows = []
        for row in bundle['rows']:
            variable = StateRow(*row)
            rows.append(variable)
        state = ModuleState(bundle['platform'], rows, bundle['kinds'], bundle['state'],
                            bundle['build'])
        state.apply()
        self._loaded.add(number)
        self.notes += compare_packages(bundle['packages'])

    # -- a finder: the last one in sys.meta_path ---------------------------------------------------

    def loaded(self) -> None:
        """Note that the runner has loaded its computation."""
        self.loading = False
        self._first = frozenset(sys.modules)

    def keep_reachable(self, path: Any, before: Sequence[str]) -> None:
        """Note that a job has changed sys.path, which is restored afterwards. If a module that the
        job imported has changed it, the module stays loaded: what it imports later must be found
        where it expects it."""
        entries = []
        for entry in path:
            if not isinstance(entry, str):
                continue
            if entry not in [*before, *self._left]:
                entries.append(entry)
        self._left += entries

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find a module that a job imports and that is not on this host: the client may have it.
        See importlib.abc.MetaPathFinder."""
        if self._left and path is None and self._is_for_module():
            spec = importlib.machinery.PathFinder.find_spec(name, self._left)
            if spec is not None:
                return spec
        if self.ask is None:
            return None
        if self._path:
            return None
        if name in self._denied:
            return None
        is_of_user = self._is_of_user(name, path)
        if not is_of_user:
            return None
        if self.ask(name):
            self._denied.add(name)
            return None
        importlib.invalidate_caches()
        return importlib.machinery.PathFinder.find_spec(name, path)

    def _is_of_user(self, name: str, path: Any) -> bool:
        """Return whether the user's code imports the module: imports that libraries attempt do not
        concern the client."""
        if path is not None:
            for entry in path:
                if str(entry).startswith(self.root):
                    return True
            return False
        frame = self._importing_frame()
        if frame is None:
            return False
        importer = frame.f_globals.get('__name__')
        if importer in MAIN_NAMES:
            return True
        return frame.f_code.co_filename.startswith((self.root, self.directory))

    def _is_for_module(self) -> bool:
        """Return whether a module that a job has imported, and not the computation, imports another
        one."""
        frame = self._importing_frame()
        if frame is None:
            return False
        importer = frame.f_globals.get('__name__')
        # A function that has come by value may have the name of a module that is not here.
        return importer in sys.modules and importer not in self._first

    @staticmethod
    def _importing_frame() -> Any:
        frame: Any = sys._getframe(0)
        here = frame.f_code.co_filename
        while frame is not None and frame.f_code.co_filename == here:
            frame = frame.f_back
        while frame is not None and frame.f_globals.get('__name__', '').partition('.')[0] in (
                'importlib', '_frozen_importlib'):
            frame = frame.f_back
        return frame


modules: Optional[ModuleLoader] = None   # of a runner and its workers


def check_not_importing() -> None:
    """Raise RuntimeError while a node imports the user's modules: a cluster that was created during
    the import would be created again on each node, and so on without end."""
    if modules is None:
        return
    if modules.loading:
        raise RuntimeError(
            'a module that a node imports makes a cluster: put that under "if __name__ == '
            '\'__main__\':" or into a function that jobs do not call')


def explain_import(exc: BaseException, name: str) -> str:
    """Return what led to a failed import and how to fix it; the text is empty for another error.
    `name` is the name of the computation."""
    chain = [name]
    trace = exc.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == '<module>':
            importer = trace.tb_frame.f_globals.get('__name__')
            chain.append(str(importer))
        trace = trace.tb_next
    if not isinstance(exc, ImportError):
        if len(chain) == 1:
            return ''
        return 'the import failed: %s' % ' -> '.join(chain)
    missing = exc.name or ''
    if missing and missing != chain[-1]:
        chain.append(missing)
    if len(chain) > 2:
        own = chain[1]
    else:
        own = missing
    missing = missing.partition('.')[0]
    own = own.partition('.')[0]
    if not missing:
        return 'the import failed: %s' % ' -> '.join(chain)
    way = ' -> '.join(chain)
    text = ('the import failed: %s. To fix this, install %s on this node (%s -m pip install %s), '
            'or list its file in depends if it is a module of your own' %
            (way, missing, sys.executable, missing))
    if own in ('', missing):
        return text
    return ('%s; if the jobs do not need it, call '
            'cloudpickle.register_pickle_by_value(%s) in the program' % (text, own))


class OldModules:
    """A finder for modules by the names that they had in dispy 4, where `dispy` was a package: the
    module `dispy.httpd` is now `dispy_httpd`, and so on. It must be first in sys.meta_path:
    `dispy.__path__`, which old scripts read, is a directory that contains other modules too, none
    of which is a part of dispy.
    On a host that has dispynode.py alone it also makes a module `dispy`, since a job may write to
    `dispy.dispynode.dispynode_logger`.
    """
    NAMES = {'dispynode': 'dispynode', 'dispyscheduler': 'dispyscheduler', 'httpd': 'dispy_httpd',
             'dispy_httpd': 'dispy_httpd'}

    @classmethod
    def install(cls) -> None:
        """Add a finder to sys.meta_path. It may be called twice."""
        if not any(isinstance(finder, cls) for finder in sys.meta_path):
            sys.meta_path.insert(0, cls())

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """See importlib.abc.MetaPathFinder."""
        package, _, rest = name.partition('.')
        if package != 'dispy':
            return None
        if not rest:
            return self._stand_in(name)
        if rest == 'config' and hasattr(sys.modules['dispy'], rest):
            return importlib.machinery.ModuleSpec(name, self)  # type: ignore[arg-type]
        if rest not in self.NAMES:
            text = 'No module named %r: dispy has no such part' % name
            raise ModuleNotFoundError(text, name=name)
        return importlib.machinery.ModuleSpec(name, self)  # type: ignore[arg-type]

    def _stand_in(self, name: str) -> Any:
        """Return a module `dispy` for a host that has none."""
        for finder in sys.meta_path:
            if finder is self:
                continue
            if finder is modules:
                continue
            spec = finder.find_spec(name, None)
            if spec is not None:
                return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: Any) -> Any:
        """See importlib.abc.Loader."""
        return None

    def exec_module(self, module: Any) -> None:
        """Put the module that the old name means into sys.modules; the import statement takes it
        from there."""
        package, _, rest = module.__name__.partition('.')
        if not rest:
            module.__version__ = __version__
            module.logger = logger
            module.__getattr__ = _missing_in_dispy
            return
        if rest == 'config':
            found = sys.modules[package].config
        else:
            found = importlib.import_module(self.NAMES[rest])
        sys.modules[module.__name__] = found


def _missing_in_dispy(name: str) -> Any:
    """Raise AttributeError for a name that a job wants of a `dispy` which is not on its host."""
    raise AttributeError('module dispy has no attribute %r here: this host has dispynode.py alone. '
                         'Install dispy on it' % name)


dispynode_logger = logger   # its name in dispy 4


def build_tag() -> str:
    """Return the tag that compiled modules must match: the platform and this version of Python."""
    import sysconfig
    return '%s %s' % (sysconfig.get_platform(), sys.implementation.cache_tag)


_dict_of_module: Any = vars(types.ModuleType)['__dict__']


def module_dict(module: Any) -> Dict[str, Any]:
    """Return the globals of a module without running the user's code: the class of a module may
    have a `__getattr__` that imports. The result is empty for an object in `sys.modules` that is
    not a module."""
    if not issubclass(type(module), types.ModuleType):
        return {}
    found = _dict_of_module.__get__(module)
    if found is not None:
        return found
    return {}


def package_version(name: str) -> str:
    """Return the version of an installed package by its import name; empty if it cannot be
    determined."""
    import importlib.metadata
    try:
        version: Any = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:   # the distribution has another name
        version = None
    except Exception as exc:   # damaged metadata, or a finder of the user's
        reason = describe_exception(exc)
        logger.debug('the version of %s cannot be read: %s', name, reason)
        version = None
    if not isinstance(version, str):
        module = sys.modules.get(name)
        version = module_dict(module).get('__version__')
    if isinstance(version, str):
        return version
    return ''


def compare_packages(packages: Dict[str, str]) -> List[str]:
    """Say what differs between the program and this node in major or minor versions."""
    notes = []
    for name, there in sorted(packages.items()):
        if there:
            here = package_version(name)
        else:
            here = ''
        if not here:
            continue
        major_and_minor = here.split('.')
        if major_and_minor[:2] != there.split('.')[:2]:
            note = 'it has %s %s; the program has %s' % (name, here, there)
            notes.append(note)
    return notes


# -- what payloads name: errors, sources, programs, calls ------------------------------------------

def pack_error(text: str, exc: Optional[BaseException]) -> Payload:
    """Return the payload of a job that raised an exception: the text, and the exception if it can
    be pickled and opened again."""
    body: bytes = b''
    if exc is not None:
        try:
            pickled = dumps(exc)
            pieces = pieces_of(pickled.payload)
            body = b''.join(pieces)
            loads(body)
        except Exception:  # the user's exception may raise anything; the text is sufficient
            body = b''
    raw = text.encode('utf-8', 'replace')
    return struct.pack('>I', len(raw)) + raw + body


def cut_error(exc: BaseException, skip: int = 0) -> Payload:
    """Return the payload that `pack_error` makes with the traceback; an exception that exceeds the
    limit is left out."""
    text = describe_exception(exc, skip)
    payload = pack_error(text, exc)
    size = size_of(payload)
    if not is_over_limit(size):
        return payload
    return pack_error('%s\n(%s)' % (text, over_limit('the exception', size)), None)


def unpack_error(payload: Buffer) -> Tuple[str, Buffer]:
    """Return the text and the pickled exception that `pack_error` has combined, without opening the
    exception."""
    length, = struct.unpack_from('>I', payload)
    text = bytes(payload[4:4 + length]).decode('utf-8', 'replace')
    return text, payload[4 + length:]


def describe_exception(exc: BaseException, skip: int = 0) -> str:
    """Return the traceback text, even of an exception whose __str__ raises."""
    trace = exc.__traceback__
    for _ in range(skip):
        if trace is not None:
            trace = trace.tb_next
        else:
            trace = None
    try:
        lines = traceback.format_exception(type(exc), exc, trace)
        text = ''.join(lines)
    except Exception:  # the exception cannot be formatted
        text = ''.join(
            traceback.format_tb(trace)) + '%s (it cannot be shown)\n' % type(exc).__name__
    return shorten(text)


def frames_of_ours(exc: BaseException) -> int:
    """Return how many frames of a traceback precede the user's: those of this file and of the
    import of a module."""
    count = 0
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        file = trace.tb_frame.f_code.co_filename
        if file != __file__:
            if 'importlib' not in file:
                break
        count = count + 1
        trace = trace.tb_next
    return max(count, 1)


def load_source(version: tuple, modules: list, classes: list, wanted: tuple) -> Any:
    """Return (computation, setup, cleanup, objects by name) of a computation that was sent as
    source. `modules` has rows of (name, file, text, values, links), `classes` rows of (module,
    class, such rows), and `wanted` (module, name) of what is returned."""
    for name, file in {
            row[:2]
            for rows in (modules, *(extra[2] for extra in classes))
            for row in rows
    }:
        # Jobs have the same variables
        if name in MAIN_NAMES:
            module = sys.modules['__main__']
        else:
            module = types.ModuleType(name)
        sys.modules[name] = module
        module.__file__, module.__package__ = file, name.rpartition('.')[0]
    try:
        for row in modules:
            _run_source(version, *row)
    except Exception as exc:  # the user's statements, written for another version
        python = python_of(version)
        text = 'the source, written for %s, cannot be loaded by %s here: %s: %s' % (
            python, python_of(sys.version_info), type(exc).__name__, exc)
        error = RuntimeError(text)
        # The frames of an import are of no interest
        raise error from (None if isinstance(exc, ModuleNotFoundError) else exc)
    for name, class_name, rows in classes:
        try:
            for row in rows:
                _run_source(version, *row)
        except Exception as exc:  # as above; told to the job that has such an argument
            _left_out[name, class_name] = '%s: %s' % (type(exc).__name__, exc)
    *functions, objects = wanted
    return (*(where and find_named(*where) for where in functions),
            {name: find_named(*where)
             for name, where in objects.items()})


def _run_source(version: tuple, name: str, file: str, text: str, values: Dict[str, Any],
                links: list) -> None:
    space = vars(sys.modules[name])
    space.update(values)
    for bound, module, attribute in links:
        space[bound] = find_named(module, attribute)
    # This is for the lines in tracebacks; a file may come in several parts
    entry: Any = linecache.cache.get(file)
    if entry:
        known = entry[2]
    else:
        known = ()
    lines = []
    for line, old in itertools.zip_longest(text.splitlines(True), known, fillvalue='\n'):
        lines.append(line if line.strip() else old)
    linecache.cache[file] = (len(text), None, lines, file)
    try:
        exec(compile(text, file, 'exec', dont_inherit=True), space)
    except NameError:
        if sys.version_info >= (3, 14) or tuple(version) < (3, 14):
            raise
        # Where it was written, annotations need no name to be defined: here they remain text
        flags = __future__.annotations.compiler_flag
        exec(compile(text, file, 'exec', flags, dont_inherit=True), space)


# This replaces the name of a logger: a program has left files behind
FILES_LEFT = 'dispy.files_left'


def interpreter_of(path: str) -> List[str]:
    """Return the command that runs a script on Windows, which does not read the first line of
    scripts: Python if the first line names Python, or if there is no such line and the name ends in
    .py; else the program that the first line names. On other systems the kernel does this."""
    if not IS_WINDOWS:
        return []
    try:
        with open(path, 'rb') as file:
            first = file.readline(1000)
    except OSError:   # starting it will report why
        return []
    if not first.startswith(b'#!'):
        return [sys.executable] * path.lower().endswith(('.py', '.pyw'))
    command = first[2:].decode('utf-8', 'replace')
    words = command.split()
    if words and words[0].endswith('/env'):
        del words[0]
        while words and words[0].startswith('-'):
            del words[0]
    if not words:
        return []
    program = words[0].rpartition('/')[2]
    if program.startswith('python'):
        return [sys.executable, *words[1:]]
    return [shutil.which(program) or program, *words[1:]]


# Signals that Python ignores, and programs do not
_IGNORED_BY_PYTHON = [
    getattr(signal, name) for name in ('SIGPIPE', 'SIGXFSZ') if hasattr(signal, name)]


BREAK_STATUS = 0xC000013A   # of a program that Ctrl-Break has ended: STATUS_CONTROL_C_EXIT


def send_break(pid: int) -> None:
    """Send Ctrl-Break to the process group of a process on Windows. If this fails, the process is
    killed later. os.kill is not used, since it would kill the process at once in that case."""
    import ctypes
    library = ctypes.WinDLL('kernel32', use_last_error=True)  # type: ignore[attr-defined]
    if not library.GenerateConsoleCtrlEvent(1, pid):
        error = ctypes.get_last_error()  # type: ignore[attr-defined]
        logger.debug('process %d cannot be sent a Ctrl-Break (error %d)', pid, error)


class Program:
    """A computation that is a program: a call with arguments returns the exit status."""

    def __init__(self, path: str) -> None:
        self.path = path
        # An interrupt goes to the whole process group, which includes the program. Here it is noted
        # and not raised: if it were raised at the moment when waitpid returns, the status would be
        # lost.
        self.interrupted = False
        # Is called once with the names of the files that the program leaves in its directory; then
        # None
        self.tell: Optional[Callable[[List[str]], None]] = None

    def __call__(self, *args: Any) -> int:
        if self.tell is None:
            return self.run([self.path, *map(str, args)])
        before = self._names_here()
        status = self.run([self.path, *map(str, args)])
        self._tell_left(before)
        return status

    def run(self, words: List[str], directory: Optional[str] = None) -> int:
        """Run a command in a directory. Returns its exit status. Raises OSError if it cannot be
        started, KeyboardInterrupt if an interrupt has ended it."""
        self.interrupted = False
        if IS_WINDOWS:
            interpreter = interpreter_of(words[0])
            status = self._run_on_windows([*interpreter, *words], directory)
        elif directory is None and hasattr(os, 'posix_spawnp'):
            status = self._spawn(words)
        else:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, cwd=directory)
            status = process.wait()
        if self.interrupted and status < 0:
            raise KeyboardInterrupt   # a program that ends by itself has returned
        return status

    def _run_on_windows(self, words: List[str], directory: Optional[str]) -> int:
        """Run the command on Windows: a signal does not end a wait there, and Ctrl-Break goes to
        process groups."""
        create_new_process_group = getattr(subprocess, 'CREATE_NEW_PROCESS_GROUP', 0)
        process = subprocess.Popen(words,
                                   stdin=subprocess.DEVNULL,
                                   stdout=1,
                                   stderr=2,
                                   cwd=directory,
                                   creationflags=create_new_process_group)
        told = False
        while True:
            try:
                status = process.wait(0.1)
                if told and status == BREAK_STATUS:
                    return -int(signal.SIGINT)
                return status
            except subprocess.TimeoutExpired:
                if self.interrupted and not told:
                    told = True
                    send_break(process.pid)

    @staticmethod
    def _spawn(words: List[str]) -> int:
        """Start the process as subprocess.Popen does, in half of the time. Standard input reads
        nothing in a worker, and the other descriptors are not inherited."""
        process = os.posix_spawnp(words[0], words, _ENVIRON, setsigdef=_IGNORED_BY_PYTHON)
        status = os.waitpid(process, 0)[1]
        if os.WIFSIGNALED(status):
            return -os.WTERMSIG(status)
        return os.WEXITSTATUS(status)

    def _tell_left(self, before: Set[str]) -> None:
        left = sorted(self._names_here() - before)
        if not left:
            return
        if self.tell is not None:
            self.tell(left)
            self.tell = None

    @staticmethod
    def _names_here() -> Set[str]:
        """Return the files in the directory of the job, without those that no program leaves on
        purpose."""
        try:
            return {name for name in os.listdir('.') if not name.startswith(('.', '__'))}
        except OSError:   # a job has removed the directory
            return set()


# A word that begins with NUL, which no argument of a program contains, is not a word of a job's
# command line, but says how the node is to run it.
RUN_BY_PYTHON = '\0python'   # as the first word: the Python that runs the node
RUN_IN = '\0in '             # followed by a directory: the command runs there
BRING_BACK = '\0back '       # followed by the name of a file that the job's client gets


class CommandLines(Program):
    """A computation that runs a different command line for each job: the arguments of a job are the
    words of the command line. The first word is a path, or the name of a program that is found on
    the PATH of the node.

    name - the name of the computation, for people
    program - the file among those of the computation that the jobs run, if they run one
    most - the number of CPUs that the jobs may use at once over all nodes, 0 for no limit
    """

    def __init__(self, name: str, program: str = '', most: int = 0) -> None:
        super().__init__('')
        self.__name__ = name
        self.program = program
        self.most = most
        # Sends a file to the client; the worker sets it
        self.send: Callable[[str], Any] = _not_here

    @property
    def spec(self) -> Dict[str, Any]:
        """Return the information on this computation for nodes and schedulers."""
        if self.most:
            return {'most': self.most}
        return {}

    def __call__(self, *args: Any) -> int:
        words = []
        for word in args:
            if word[:1] != '\0' or word == RUN_BY_PYTHON:
                words.append(word)
        if words[0] == RUN_BY_PYTHON:
            words[0] = sys.executable
        if len(words) < len(args):
            orders = args[len(words):]
            return self._run_as_told(words, orders)
        if self.tell is None:
            return self._run_here(words)
        before = self._names_here()
        status = self._run_here(words)
        self._tell_left(before)
        return status

    def _run_as_told(self, words: List[str], orders: Sequence[str]) -> int:
        """Run a command in another directory, or send files that it made to the client."""
        directory = None
        names = []
        for order in orders:
            if order.startswith(RUN_IN):
                directory = order[len(RUN_IN):]
            else:
                names.append(order[len(BRING_BACK):])
        status = self._run_here(words, directory)
        for name in names:
            if status == 0 or os.path.exists(name):   # a failed program may not have made it
                self.send(name)
        return status

    def _run_here(self, words: List[str], directory: Optional[str] = None) -> int:
        try:
            return self.run(words, directory)
        except FileNotFoundError:
            if directory is not None:
                if not os.path.isdir(directory):
                    raise FileNotFoundError('this node has no directory %s' % directory) from None
            if os.path.dirname(words[0]):
                raise
            text = 'this node has no program %s in its PATH, which is %s' % (
                words[0], os.environ.get('PATH', 'empty'))
            raise FileNotFoundError(text) from None


def _name_of(path: str, directory: str) -> str:
    """Return the name that a job's file has for the client: relative to the job's directory, or the
    last part of a path elsewhere."""
    if os.path.isabs(path):
        inside = os.path.relpath(path, directory)
        if inside.startswith(os.pardir):
            path = os.path.basename(path)
        else:
            path = inside
    name = os.path.normpath(path).replace(os.sep, '/')
    check_name(name)   # raises ValueError, also for '..'
    return name


class Calls:
    """The computation of an executor, in which each call names its function. Each worker process
    calls the initializer first, if there is one. `most` is the number of CPUs that the calls may
    use at once over all nodes."""
    __name__ = 'executor'

    def __init__(self, initializer: Optional[Callable[..., Any]] = None, initargs: tuple = (),
                 most: int = 0) -> None:
        self.initializer = initializer
        self.initargs = initargs
        self.most = most

    @property
    def spec(self) -> Dict[str, Any]:
        """Return the information on this computation for nodes and schedulers."""
        return {'initializer': self.initializer is not None, 'most': self.most}

    def __call__(self, function: bytes, args: tuple, kwargs: dict) -> Any:
        """Run one call. The function is opened anew for each call, so that no call sees what
        another has changed in it."""
        try:
            call = loads(function)
        except BaseException as exc:  # unpickling runs the user's code
            mark_unopened(exc)
            raise
        return call(*args, **kwargs)


def mark_unopened(exc: BaseException) -> None:
    """Mark an exception so that the client learns that a call, or its arguments, could not be
    opened."""
    with contextlib.suppress(Exception):  # its class may refuse attributes
        exc.dispy_unopened = True  # type: ignore[attr-defined]


def call_chunk(function: Callable[..., Any], chunk: List[tuple]) -> List[Any]:
    """Run several calls in one job."""
    return [function(*args) for args in chunk]


def run_batch(token: str, initializer: Optional[Callable[..., Any]], initargs: tuple,
              batch: Callable[[], Any]) -> Any:
    """Run several calls in one job: this is the computation of the backend for joblib.
    `initializer` is called once in each worker process; `token` identifies the initializer."""
    offer_to_joblib(joblib_backend_in_job)
    if initializer is not None:
        if token not in _initialized:
            initializer(*initargs)
            _initialized.add(token)
    return batch()


_initialized: Set[str] = set()


def offer_to_joblib(make: Callable[[Any], Any], name: str = 'dispy') -> None:
    """Register a backend with joblib, if joblib was imported and has no backend of this name;
    make(joblib.parallel) returns the class of the backend."""
    parallel = sys.modules.get('joblib.parallel')
    if parallel is None:
        return
    if name not in parallel.BACKENDS:
        parallel.register_parallel_backend(name, make(parallel))


def joblib_backend_in_job(parallel: Any) -> Any:
    """Return the class of the backend for calls of joblib inside of a job: the job has one CPU, so
    these calls run one after the other."""
    class BackendInJob(parallel.SequentialBackend):  # type: ignore[misc, name-defined]
        """This does what the sequential backend of joblib does, whatever n_jobs is."""

        def __init__(self, nesting_level: Optional[int] = None, **options: Any) -> None:
            super().__init__(nesting_level=nesting_level)
    return BackendInJob


def set_numerical_threads(variables: Dict[str, str]) -> None:
    """Limit the threads of numerical libraries that are not loaded yet. This is the setup of the
    backend for joblib."""
    os.environ.update(variables)


def globals_of(*functions: Any) -> List[Dict[str, Any]]:
    """Return the dictionaries of global variables of these functions, each once, without that of
    this module, whose functions an executor calls."""
    found: List[Dict[str, Any]] = []
    for function in functions:
        while hasattr(function, 'func') and not hasattr(function, '__globals__'):   # a partial
            function = function.func
        if not isinstance(function, (types.FunctionType, types.MethodType)):
            wrapped = getattr(function, '__wrapped__', None)
            function = wrapped or getattr(type(function), '__call__', None)
        func = getattr(function, '__func__', function)
        variables = getattr(func, '__globals__', None)
        if variables is globals():
            variables = vars(sys.modules['__main__'])
        if variables is None:
            continue
        if not any(variables is other for other in found):
            found.append(variables)
    return found


# --------------------------------------------------------------------------------------------------
# Secret, handshake and frames: what protects the bytes on the wire
# --------------------------------------------------------------------------------------------------

def secret_path() -> str:
    """Return the path of this user's secret file, which is the default."""
    if os.name == 'nt':
        appdata = os.environ.get('APPDATA')
        base = appdata or os.path.expanduser('~')
    else:
        xdg_config_home = os.environ.get('XDG_CONFIG_HOME')
        base = xdg_config_home or os.path.join(os.path.expanduser('~'), '.config')
    return os.path.join(base, 'dispy', 'secret')


# Rights in the access lists of Windows, in the notation of these lists (SDDL); see winnt.h
_RIGHTS = {'GA': 1 << 28, 'GX': 1 << 29, 'GW': 1 << 30, 'GR': 1 << 31, 'FA': 0x1f01ff,
           'FR': 0x120089, 'FW': 0x120116, 'FX': 0x1200a0, 'CC': 1, 'DC': 2, 'LC': 4,
           'SD': 0x10000, 'WD': 0x40000, 'WO': 0x80000}
READS = 0x90000001     # its contents, by any of these rights
WRITES = 0x500d0006    # its contents, its name or the list
# The system and administrators, who may take any right; the owner of the file
_TRUSTED = frozenset(('SY', 'BA', 'LA', 'OW', 'CO'))
_STRANGERS = {'WD': 'everybody', 'BU': 'all users', 'AU': 'all users', 'BG': 'guests'}


def _rights_in(text: str) -> int:
    """Return the rights of an entry as bits."""
    if text[:2].lower() == '0x':
        return int(text, 16)
    rights = 0
    for pair in re.findall('..', text):
        rights |= _RIGHTS.get(pair, 0)
    return rights


def others_with(rights: int, access: str, user: str) -> List[str]:
    """Return the holders of any of these rights to a file of Windows, other than its user,
    administrators and the system. `access` is the access list in SDDL; `user` is the security
    identifier of the user."""
    head = access.partition('(')[0]
    if 'D:' not in head or 'NO_ACCESS_CONTROL' in head:
        return ['everybody']   # no list
    found = []
    entries = re.findall(r'\(([^()]*)\)', access)
    for entry in entries:
        kind, flags, given, _, _, who = entry.split(';')[:6]
        pairs = re.findall('..', flags)
        if kind != 'A' or 'IO' in pairs:   # IO: for files in this directory alone
            continue
        if who == user or who in _TRUSTED:
            continue
        if _rights_in(given) & rights:
            found.append(_STRANGERS.get(who, who))
    return found


class AccessLists:
    """Access lists of files on Windows. Each method raises OSError. See GetNamedSecurityInfo and
    "Security Descriptor String Format" in Microsoft's documentation."""
    LIST = 4                    # DACL_SECURITY_INFORMATION
    PROTECTED = 0x80000000      # PROTECTED_DACL_SECURITY_INFORMATION: nothing is inherited
    OF_FILE = 1                 # SE_FILE_OBJECT
    TOKEN_QUERY = 8
    TOKEN_USER = 1

    def __init__(self) -> None:
        import ctypes
        self._ctypes: Any = ctypes
        self._library = self._ctypes.WinDLL('advapi32', use_last_error=True)
        self._kernel = self._ctypes.WinDLL('kernel32', use_last_error=True)
        self._kernel.GetCurrentProcess.restype = ctypes.c_void_p

    def _check(self, is_done: int) -> None:
        if not is_done:
            error = self._ctypes.get_last_error()
            raise self._ctypes.WinError(error)

    def _text(self, pointer: Any) -> str:
        """Return the text at an address, and free its memory."""
        text: str = pointer.value
        self._kernel.LocalFree(pointer)
        return text

    def user(self) -> str:
        """Return the security identifier of the user of this process."""
        ctypes = self._ctypes
        token = ctypes.c_void_p()
        process = ctypes.c_void_p(self._kernel.GetCurrentProcess())
        done = self._library.OpenProcessToken(process, self.TOKEN_QUERY, ctypes.byref(token))
        self._check(done)
        room = ctypes.create_string_buffer(512)
        size = ctypes.c_uint32()
        done = self._library.GetTokenInformation(token, self.TOKEN_USER, room, len(room),
                                                 ctypes.byref(size))
        self._kernel.CloseHandle(token)
        self._check(done)
        identifier = ctypes.c_void_p.from_buffer(room)   # the first member of TOKEN_USER
        text = ctypes.c_wchar_p()
        done = self._library.ConvertSidToStringSidW(identifier, ctypes.byref(text))
        self._check(done)
        return self._text(text)

    def of(self, path: str) -> str:
        """Return the access list of a file, in SDDL."""
        ctypes = self._ctypes
        found = ctypes.c_void_p()
        name = ctypes.c_wchar_p(path)
        error = self._library.GetNamedSecurityInfoW(name, self.OF_FILE, self.LIST, None, None, None,
                                                    None, ctypes.byref(found))
        if error:
            raise ctypes.WinError(error)
        convert = self._library.ConvertSecurityDescriptorToStringSecurityDescriptorW
        text = ctypes.c_wchar_p()
        done = convert(found, 1, self.LIST, ctypes.byref(text), None)
        self._kernel.LocalFree(found)
        self._check(done)
        return self._text(text)

    def keep(self, path: str) -> None:
        """Restrict a file, or a directory and everything that will be created in it, to the user,
        administrators and the system."""
        ctypes = self._ctypes
        flags = 'OICI' * os.path.isdir(path)
        entries = ['(A;%s;FA;;;%s)' % (flags, who) for who in ('SY', 'BA', self.user())]
        access = 'D:P' + ''.join(entries)
        convert = self._library.ConvertStringSecurityDescriptorToSecurityDescriptorW
        made = ctypes.c_void_p()
        done = convert(ctypes.c_wchar_p(access), 1, ctypes.byref(made), None)
        self._check(done)
        name = ctypes.c_wchar_p(path)
        which = ctypes.c_uint32(self.LIST | self.PROTECTED)
        done = self._library.SetFileSecurityW(name, which, made)
        self._kernel.LocalFree(made)
        self._check(done)


def others_who(rights: int, path: str) -> List[str]:
    """Return, on Windows, the holders of any of these rights to a file other than the user of this
    process. Raises OSError."""
    lists = AccessLists()
    user = lists.user()
    try:
        access = lists.of(path)
    except OSError as exc:   # such as on a file system without lists
        return ['perhaps everybody, as its list of access cannot be read: %s' % exc]
    return others_with(rights, access, user)


def private_again(path: str) -> str:
    """Return the command that restricts a file on Windows to the user of this process. Raises
    OSError."""
    lists = AccessLists()
    return 'icacls "%s" /reset, then icacls "%s" /inheritance:r /grant:r *%s:F' % (
        path, path, lists.user())


def keep_private(path: str) -> None:
    """Restrict a file, or a directory and everything that will be created in it, to this user on
    Windows, where file modes do not do so."""
    if not IS_WINDOWS:
        return
    try:
        lists = AccessLists()
        lists.keep(path)
    except OSError as exc:   # such as on a file system without lists
        logger.warning('%s may be open to others, as its list of access cannot be set: %s', path,
                       exc)


def has_place(path: str) -> bool:
    """Return whether a path in the user's home directory is usable: without HOME and an entry in
    the password file it still begins with '~'."""
    return not path.startswith('~')


# Secret -> the file that it was read from, or the environment
_secrets_from: Dict[bytes, str] = {}
_keys_from: Dict[bytes, bytes] = {}    # key -> the secret that it was derived from


def same_secret(key: Any) -> str:
    """Return advice on what to do when both sides have different secrets; this side has `key`, or
    several keys by the role of the other side."""
    if isinstance(key, bytes):
        first = key
    else:
        first = next(iter(key.values()))[0]
    whence = _secrets_from.get(_keys_from.get(first, b''), '')
    if os.path.isabs(whence):
        todo = ('This side has its own from the file %s: copy that to the other side, or '
                'give both the same' % whence)
    else:
        todo = 'This side has its own from %s. Give both the same' % (whence or 'secret= or -s')
    return ('the two sides have different ones. %s (--secret-file; in programs secret=; '
            'DISPY_SECRET)' % todo)


def find_secret(secret: Union[str, bytes, None] = None, path: Optional[str] = None) -> bytes:
    """Return the secret as bytes, from the first of these sources: `secret`, the file `path`, the
    environment variable DISPY_SECRET, and the user's secret file, which is created (256 random
    bits, mode 0600) if it does not exist.
    Raises SecretError for a file that others can read, that is empty or that cannot be read, and
    TypeError for a value of another type.
    """
    if secret is not None:
        if not isinstance(secret, (str, bytes, bytearray)):
            text = 'secret must be str or bytes, not %s' % type(secret).__name__
            raise TypeError(text)
    if not secret and path:
        return read_secret(path)
    given = secret or os.environ.get('DISPY_SECRET')
    if given:
        if isinstance(given, str):
            data = given.encode('utf-8')
        else:
            data = bytes(given)
        if not data.strip():
            raise SecretError('the secret is blank (%s)' %
                              ('secret=' if secret else 'DISPY_SECRET'))
        if not secret:
            _secrets_from.setdefault(data.strip(), 'DISPY_SECRET')
        return data
    path = secret_path()
    if not has_place(path):
        raise SecretError(
            'no secret was given, and this user has no home to keep one in (neither HOME nor an '
            'entry in the password file): set DISPY_SECRET or XDG_CONFIG_HOME, or give a file')
    if not os.path.exists(path):
        make_secret(path)
    return read_secret(path)


def read_secret(path: str) -> bytes:
    try:
        with open(path, 'rb') as file:
            handle = file.fileno()
            mode = os.fstat(handle).st_mode
            contents = file.read(64 * 1024)
            data = contents.strip()
        if IS_WINDOWS:
            _check_secret_on_windows(path)
    except OSError as exc:
        raise SecretError('the secret file %s cannot be read: %s' % (path, exc.strerror)) from exc
    if not IS_WINDOWS and mode & 0o077:
        text = ('the secret file %s can be read or written by others (mode %03o): run '
                'chmod 600 %s' % (path, stat.S_IMODE(mode), path))
        raise SecretError(text)
    if not data:
        raise SecretError('the secret file %s is empty: remove it and a new one is made' % path)
    _secrets_from[data] = os.path.abspath(path)
    return data


def _check_secret_on_windows(path: str) -> None:
    others = others_who(READS | WRITES, path)
    if others:
        text = 'the secret file %s can be read or written by others (%s): run %s' % (
            path, ', '.join(others), private_again(path))
        raise SecretError(text)


def _name_first(temporary: str, path: str) -> None:
    """Give a file its name. Raises FileExistsError if there is a file of this name."""
    if IS_WINDOWS:   # where a file system may have no hard links, and a new name takes no other's
        os.rename(temporary, path)
    else:
        os.link(temporary, path)


def make_secret(path: str) -> None:
    """Create the secret file atomically. If two processes do so at the same time, one of them
    succeeds and both use its file."""
    try:
        directory = os.path.dirname(path)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        folder = os.path.dirname(path)
        handle, temporary = tempfile.mkstemp(dir=folder)   # mode 0600
        try:
            keep_private(temporary)
            with os.fdopen(handle, 'w') as file:
                secret = os.urandom(32)
                digits = secret.hex()
                file.write(digits + '\n')
            _name_first(temporary, path)
        except FileExistsError:
            logger.debug('another process made %s first', path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as exc:
        text = ('no secret was given and %s cannot be made: %s; set DISPY_SECRET or give '
                'a file' % (path, exc.strerror))
        raise SecretError(text) from exc


@functools.lru_cache(maxsize=16)
def derive_key(secret: bytes) -> bytes:
    """Return the pre-shared key of the handshake. A made secret (64 hexadecimal digits) is random
    enough for an HMAC; anything else may be a person's phrase and is stretched with scrypt (N=2^14,
    r=8, p=1; about 50 ms)."""
    secret = secret.strip()
    key = _derived_key(secret)
    _keys_from[key] = secret
    return key


def _derived_key(secret: bytes) -> bytes:
    if len(secret) == 64:
        if not secret.strip(b'0123456789abcdef'):
            return hmac.digest(b'dispy 5 secret', secret, 'sha256')
    if len(secret) < 12:
        logger.warning(
            'the secret is short (%d characters): it can be guessed by anybody on the '
            'network', len(secret))
    if not hasattr(hashlib, 'scrypt'):
        raise SecretError(
            'this Python cannot use a phrase as secret: its hashlib has no scrypt (as where it was '
            'built with LibreSSL). Use a secret of 64 hexadecimal digits, such as dispy makes by '
            'itself, or another Python')
    return hashlib.scrypt(secret, salt=b'dispy 5 secret', n=1 << 14, r=8, p=1, dklen=32)


def tls_context(server: bool,
                certfile: str,
                keyfile: Optional[str] = None,
                cafile: Optional[str] = None) -> Any:
    """Return an ssl.SSLContext that presents `certfile` and requires from the peer a certificate
    that `cafile` (or `certfile` itself) verifies. Raises SecretError if a file cannot be used."""
    import ssl  # takes 15 ms, which only users of TLS need to spend
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A private CA verifies; the handshake binds the channel to the certificate
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(certfile, keyfile, _no_password)
    except (OSError, ssl.SSLError) as exc:
        text = 'the certificate %s with key %s cannot be used: %s' % (certfile, keyfile
                                                                      or 'in the same file', exc)
        raise SecretError(text) from exc
    try:
        context.load_verify_locations(cafile or certfile)
    except (OSError, ssl.SSLError) as exc:
        reason = 'the CA file %s cannot be used: %s' % (cafile or certfile, exc)
        raise SecretError(reason) from exc
    return context


def path_option(name: str, value: Any) -> Optional[str]:
    """Return a parameter that is the path of a file, or None. Raises TypeError or ValueError,
    naming the parameter."""
    if value is None:
        return None
    try:
        path = os.fspath(value)
    except TypeError:
        path = None
    if not isinstance(path, str):
        text = '%s=%.80r must be the path of a file, not %s' % (name, value, type(value).__name__)
        raise TypeError(text)
    if not path or '\0' in path:
        raise ValueError('%s=%.80r is not the path of a file' % (name, path))
    return plain_text(path)


def tls_files(certfile: Any,
              keyfile: Any,
              cafile: Any = None,
              words: str = '%s') -> Tuple[Optional[str], Optional[str], Optional[str]]:
    """Return the files for TLS as they were given, if they are consistent: a key or a CA without a
    certificate is an error, since nothing would be encrypted. `words` maps 'certfile' and so on to
    the names that the user knows. Raises SecretError, TypeError or ValueError."""
    paths = {
        name: path_option(words % name, value)
        for name, value in (('certfile', certfile), ('keyfile', keyfile), ('cafile', cafile))
    }
    for name in ('keyfile', 'cafile'):
        if paths[name] is None:
            continue
        if paths['certfile'] is not None:
            continue
        text = ('%s=%s was given without %s: nothing would be encrypted; give both, '
                'or neither' % (words % name, paths[name], words % 'certfile'))
        raise SecretError(text)
    return paths['certfile'], paths['keyfile'], paths['cafile']


def _no_password() -> str:
    raise SecretError(
        'the key of the certificate is encrypted; a daemon cannot ask for its password')


def certificate_digest(certfile: str) -> bytes:
    """Return the SHA-256 of the first certificate in a PEM file, in DER, to which the handshake
    binds the channel."""
    import ssl
    with open(certfile) as file:
        text = file.read()
    start = text.index(ssl.PEM_HEADER)
    end = text.index(ssl.PEM_FOOTER) + len(ssl.PEM_FOOTER)
    certificate = ssl.PEM_cert_to_DER_cert(text[start:end])
    return hashlib.sha256(certificate).digest()


# -- handshake -------------------------------------------------------------------------------------

#   C, who dialled                                   S, who accepted
#   1. HELLO   magic, versions, roles, nonce ->      checks magic, version, wanted role
#   2. checks                                <-      CHALLENGE magic, version, nonce: no secret
#   3. PROOF   HMAC("c finished")            ->      compares in constant time; closes if wrong
#   4. compares; connected                   <-      FINISHED HMAC("s finished")
#
# Everything that was negotiated, and the certificate under TLS, is in the transcript hash TH. After
# TLS 1.3's construction (RFC 8446, section 4.4), finished keys and one frame key for each direction
# are derived from psk and TH.
#
# Which releases talk to which. All releases that begin with the same number (5.x) do: each speaks
# every minor version of the wire from 1 to its own, and the two sides use the highest that both
# have, which is Session.version.
#   - What a minor version has is fixed when it is released: its messages, their numbers, fields and
#     meanings. tests/releases has them, as `python tests/recorded_peer.py RELEASE` has written them
#     before the first release that has this minor version.
#   - A new message, field, kind of value or order of messages takes a new minor version, and is
#     sent only where Session.version has it.
#   - A dictionary that travels (spec of a computation, options of a job, facts of a node) may get
#     new keys at any time, as a release takes no notice of those that it does not know: so only for
#     what may be left undone.
#   - What is known by the secret (handshake, keys, tags of frames) changes with the major version,
#     the last byte of MAGIC, and with the first number of the release. What a frame can do without
#     is agreed on by the last bytes of HELLO and CHALLENGE, which 5.0 leaves 0.
MAGIC = b'dispy5\x00\x01'      # the last byte is the major version of the wire
ALERT = b'dispy5!\x01'         # unauthenticated: shown to people, never acted on
# Minor versions spoken, lowest and highest. 2: with the fields of LATER_FIELDS
VERSIONS = (1, 2)
# At the end of ALERT, for people only
_RELEASE = __version__.encode('ascii')[:16].ljust(16, b'\0')
_HELLO = struct.Struct('>8sHHBBH16s32s16x')
_CHALLENGE = struct.Struct('>8sHBBI16s32s16x')
_PROOF = struct.Struct('>8s32s')
_SEES_TLS = 1
NO_TLS = bytes(32)
# A flag in the last byte of HELLO and CHALLENGE: payloads have no tag. It is offered under TLS
# only, where the record layer has authenticated every byte and its position before this program
# sees it, and the certificate in TH ties this handshake to that channel: a peer that could change a
# payload there could as well have made the handshake. TH includes this byte, so that nobody in
# between can set it. The header's tag remains: it is short, and the length of a frame is trusted
# because of it.
_NO_PAYLOAD_TAGS = 1


class Session(NamedTuple):
    """The result of a handshake; `secret` is the index of the peer's secret if this side accepts
    several."""
    send_key: bytes
    receive_key: bytes
    peer_instance: bytes
    peer_role: int
    secret: int = 0
    version: int = VERSIONS[1]   # minor, of the wire
    tags_payloads: bool = True


def _other_version(name: str, low: int, high: int) -> str:
    """Return the text for people that says that the peer speaks other versions of the protocol.
    `name` is the release of the peer, or empty if the peer does not send it."""
    if name and name.isprintable():
        who = 'it is dispy %s and speaks' % name
    else:
        who = 'it speaks'
    return ('it speaks another version of the protocol: %s minor versions %d to %d, and dispy %s '
            'here speaks %d to %d. Update the older one' %
            (who, low, high, __version__, *VERSIONS))


def _derive(psk: bytes, transcript: bytes, label: bytes) -> bytes:
    return hmac.digest(psk, label + b'\0' + transcript + b'\x01', 'sha256')


class _Keys:
    def __init__(self, psk: bytes, hello: bytes, challenge: bytes, binding: bytes) -> None:
        digester = hashlib.sha256(b'dispy 5 handshake' + hello + challenge + binding)
        self.transcript = digester.digest()
        self._psk = psk
        self.client = hmac.digest(self.key(b'c finished'), self.transcript, 'sha256')
        key = self.key(b's finished')
        self.server = hmac.digest(key, self.transcript + self.client, 'sha256')

    def key(self, label: bytes) -> bytes:
        return _derive(self._psk, self.transcript, label)


def _receive_exactly(sock: Any, size: int, deadline: float, clock: Callable[[], float]) -> bytes:
    data = b''
    while len(data) < size:
        left = deadline - clock()
        if left <= 0:
            raise Silence('%s %d s' % (NO_ANSWER, HANDSHAKE_TIME))
        sock.settimeout(left)
        try:
            piece = sock.recv(size - len(data))
        except socket.timeout as exc:
            text = '%s %d s' % (NO_ANSWER, HANDSHAKE_TIME)
            raise Silence(text) from exc
        if not piece:
            raise EOFError
        data += piece
    return data


NO_ANSWER = 'no answer within'
CLOSED_AT_ONCE = (
    'it closed the connection at once: it is not a dispynode 5, or only one side uses TLS '
    '(--certfile, in programs certfile=), or it refuses this address for a while after failures')


def is_of_tls(exc: BaseException) -> bool:
    """Return whether an exception is an error of TLS. If `ssl` was not imported, no exception is
    one."""
    ssl = sys.modules.get('ssl')
    if ssl is None:
        return False
    return isinstance(exc, ssl.SSLError)


def is_closing(exc: BaseException) -> bool:
    """Return whether a failure of TLS means that the peer has closed the connection."""
    if isinstance(exc, ConnectionError):
        return True
    return 'EOF' in str(getattr(exc, 'reason', None) or exc)


def tls_text(exc: BaseException) -> str:
    """Return the meaning of a failure of TLS and how to fix it."""
    if is_closing(exc):
        return CLOSED_AT_ONCE
    reason = str(getattr(exc, 'reason', None) or exc)
    if is_of_tls(exc) and hasattr(exc, 'verify_code'):   # ssl.SSLCertVerificationError
        text = ('its certificate is not trusted here (--certfile, in programs certfile= or '
                'cafile=)')
    elif 'NOT_RETURN_A_CERTIFICATE' in reason or reason.upper().endswith(
            'WRONG_VERSION_NUMBER') or 'HTTP_REQUEST' in reason:
        text = ('it uses none or has no certificate, this side has one: both need one, or '
                'neither (--certfile, in programs certfile=)')
    elif 'ALERT' in reason.upper():
        text = ('it does not trust the certificate of this side (--certfile, in programs certfile= '
                'or cafile=)')
    else:
        text = 'both sides need a certificate, or neither (--certfile, in programs certfile=)'
    return 'TLS failed: %s: %s' % (text, exc)


def _begin_handshake(sock: Any, binding: bytes, deadline: Optional[float],
                     clock: Callable[[], float]) -> Tuple[int, Callable[[int], bytes]]:
    """Begin the handshake as both sides do. Returns the flags to send, and a function that receives
    a number of bytes before the deadline."""
    if deadline is None:
        deadline = clock() + HANDSHAKE_TIME
    flags = 0
    if binding != NO_TLS:
        flags |= _SEES_TLS
    return flags, lambda size: _receive_exactly(sock, size, deadline, clock)


def handshake_dial(sock: Any,
                   psk: bytes,
                   role: Role,
                   wanted: Role,
                   instance: bytes,
                   binding: bytes = NO_TLS,
                   deadline: Optional[float] = None,
                   clock: Callable[[], float] = time.monotonic) -> Session:
    """Carry out the client's side (C). Raises HandshakeError, whose text says why the handshake
    failed and how to fix it, and OSError when the connection breaks."""
    tls, receive = _begin_handshake(sock, binding, deadline, clock)
    hello = _HELLO.pack(MAGIC, *VERSIONS, role, wanted, tls, instance, os.urandom(32))
    if tls:
        hello = hello[:-1] + bytes((_NO_PAYLOAD_TAGS,))
    sock.sendall(hello)
    try:
        challenge = receive(_CHALLENGE.size)
    except (EOFError, ConnectionError):
        raise ClosedAtOnce(CLOSED_AT_ONCE) from None
    magic, version, peer_role, flags, _, peer_instance, _ = _CHALLENGE.unpack(challenge)
    if magic[:7] == ALERT[:7] or (magic[:6] == MAGIC[:6] and magic != MAGIC):
        name = challenge[-len(_RELEASE):].rstrip(b'\0').decode('ascii', 'replace')
        raise HandshakeError(_other_version(name, 1, version))
    if magic != MAGIC:
        raise HandshakeError('it is not a dispynode 5')
    if not VERSIONS[0] <= version <= VERSIONS[1] or peer_role != wanted or flags != tls:
        text = 'it is a %s, speaks version %d and %s TLS, which does not fit' % (
            _role_name(peer_role), version, 'sees' if flags else 'sees no')
        raise HandshakeError(text)
    if peer_instance == instance:
        raise HandshakeError('it is this very process')
    keys = _Keys(psk, hello, challenge, binding)
    sock.sendall(_PROOF.pack(MAGIC, keys.client))
    try:
        finished = receive(_PROOF.size)
    except (EOFError, ConnectionError):
        raise HandshakeError('wrong secret: ' + same_secret(psk)) from None
    if not hmac.compare_digest(finished, _PROOF.pack(MAGIC, keys.server)):
        raise HandshakeError('it does not know the secret')
    send_key = keys.key(b'c2s')
    receive_key = keys.key(b's2c')
    tags = not hello[-1] & challenge[-1] & _NO_PAYLOAD_TAGS
    return Session(send_key, receive_key, peer_instance, peer_role, 0, version, tags)


def handshake_accept(sock: Any,
                     psk: Union[bytes, Dict[int, Tuple[bytes, ...]]],
                     role: Role,
                     allowed: Iterable[Role],
                     instance: bytes,
                     binding: bytes = NO_TLS,
                     deadline: Optional[float] = None,
                     clock: Callable[[], float] = time.monotonic) -> Session:
    """Carry out the server's side (S). At most 120 bytes are read before the proof is checked.
    Raises HandshakeError, EOFError or OSError."""
    tls, receive = _begin_handshake(sock, binding, deadline, clock)
    hello = receive(_HELLO.size)
    magic, low, high, peer_role, wanted, flags, peer_instance, _ = _HELLO.unpack(hello)
    if hello[:2] == b'\x16\x03':   # the first bytes of TLS
        raise HandshakeError(
            'it uses TLS and this side does not: both sides need a certificate (--certfile, in '
            'programs certfile=), or neither'
        )
    if magic[:6] != MAGIC[:6]:
        raise HandshakeError('the peer does not speak this protocol')
    version = min(high, VERSIONS[1])
    if magic != MAGIC or version < max(low, VERSIONS[0]):
        alert = _CHALLENGE.pack(ALERT, VERSIONS[1], role, tls, 0, instance, bytes(32))
        sock.sendall(alert[:-len(_RELEASE)] + _RELEASE)
        raise HandshakeError(_other_version('', low, high))
    if wanted != role or peer_role not in tuple(
            allowed) or flags != tls or peer_instance == instance:
        text = 'the peer is a %s that wants a %s' % (_role_name(peer_role), _role_name(wanted))
        raise HandshakeError(text)
    nonce = os.urandom(32)
    challenge = _CHALLENGE.pack(MAGIC, version, role, tls, MAX_FRAME, instance, nonce)
    untagged = hello[-1] & _NO_PAYLOAD_TAGS
    if not tls:
        untagged = 0
    challenge = challenge[:-1] + bytes((untagged,))
    sock.sendall(challenge)
    proof = receive(_PROOF.size)
    for number, one in enumerate((psk,) if isinstance(psk, bytes) else psk[peer_role]):
        keys = _Keys(one, hello, challenge, binding)
        if not hmac.compare_digest(proof, _PROOF.pack(MAGIC, keys.client)):
            continue
        sock.sendall(_PROOF.pack(MAGIC, keys.server))
        send_key = keys.key(b's2c')
        receive_key = keys.key(b'c2s')
        return Session(send_key, receive_key, peer_instance, peer_role, number, version,
                       not untagged)
    raise HandshakeError('wrong secret: ' +
                         same_secret(psk if isinstance(psk, bytes) else {0: psk[peer_role]}))


def _role_name(role: int) -> str:
    if role in tuple(Role):
        return Role(role).name.lower()
    return 'unknown role %d' % role


# -- frames and records: bytes to units and back, without a socket ---------------------------------

def mapped(size: int) -> memoryview:
    """Return anonymous memory of this size in bytes, which the system provides as it is filled.
    Raises MemoryError."""
    try:
        if hasattr(mmap, 'MAP_PRIVATE'):
            return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        return memoryview(mmap.mmap(-1, size))
    except (OSError, OverflowError, ValueError) as exc:
        text = 'no memory for %d bytes: %s' % (size, exc)
        raise MemoryError(text) from exc


def free_memory() -> Optional[int]:
    """Return the bytes of memory that are free on this host and in the cgroup of this process; None
    if they cannot be determined."""
    free = None
    with contextlib.suppress(OSError, ValueError, AttributeError):   # another system
        with open('/proc/meminfo', 'rb') as file:
            contents = file.read()
            found = re.search(rb'^MemAvailable: *(\d+) kB', contents, re.MULTILINE)
        free = int(found.group(1)) << 10  # type: ignore[union-attr]
    if free is None:
        free = ask_psutil(lambda psutil: psutil.virtual_memory().available)
    within = _free_of_cgroup()
    return min((size for size in (free, within) if size is not None), default=None)


def own_cgroup() -> str:
    """Return the directory of this process's cgroup (version 2), with a trailing slash; it may not
    exist."""
    path = ''
    with contextlib.suppress(OSError):   # another system
        with open('/proc/self/cgroup') as file:
            path = next(line[3:].strip() for line in [*file, '0::/'] if line.startswith('0::'))
    return '/sys/fs/cgroup/' + (path.strip('/') + '/').lstrip('/')


def _free_of_cgroup() -> Optional[int]:
    """Return how many bytes the limit of this process's cgroup (version 2) leaves."""
    with contextlib.suppress(OSError, ValueError):   # none, or another system
        group = own_cgroup()
        sizes = []
        for name in ('memory.max', 'memory.current'):
            with open(group + name) as file:
                size = int(file.read())
                sizes.append(size)   # 'max' is none
        with open(group + 'memory.stat') as file:
            cache = sum(int(line.split()[1]) for line in file if line.startswith('inactive_file '))
        return max(0, sizes[0] - sizes[1] + cache)
    return None


# A mapping keeps no descriptor, if Python can do without
_NO_HANDLE: Dict[str, Any] = {'trackfd': False} if sys.version_info >= (3, 13) else {}
# Whether the system has memory with a descriptor that can be sealed and sent
HAS_SEGMENTS = False
if hasattr(os, 'memfd_create') and hasattr(socket, 'SCM_RIGHTS'):
    import fcntl
    HAS_SEGMENTS = hasattr(fcntl, 'F_ADD_SEALS')
if HAS_SEGMENTS:
    import termios
    _MSG_CTRUNC = int(socket.MSG_CTRUNC)   # a plain number is compared 20 times as fast
    SEALED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK
    SEALED |= fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def is_unused(memory: bytearray) -> bool:
    """Return whether no memoryview refers to this buffer any more: only then its length can be
    changed."""
    try:
        memory.append(memory.pop())
    except BufferError:
        return False
    return True


class ReceiveBuffer:
    """Splits a stream of bytes into units. A unit is a head of fixed size and a body whose length
    the head contains.
    The reader receives into `get_buffer()` and reports the number of bytes to `buffer_updated()`.
    Small units are cut out of a staging buffer, so that one system call may bring many of them. A
    large unit gets a buffer of its own, into which it is received directly and which grows with the
    bytes that have arrived, not with the length that the head announces.
    """
    STAGING = 256 * 1024
    # Twice the size of most frames; newly mapped memory would cost 40 times as much as reused
    # memory
    FIRST = 2 << 20
    AT_ONCE = 1 << 30    # bytes of one system call; some systems refuse 2 GiB
    _used: Deque[bytearray] = collections.deque(maxlen=4)   # memory of units, of all streams

    def __init__(self, head_size: int) -> None:
        self._head_size = head_size
        self._staging = bytearray(self.STAGING)
        self._view = memoryview(self._staging)
        self._start = self._end = 0
        self._body_size = -1       # of the unit at _start, once its head is there
        self._head: Any = b''
        self._large: Optional[memoryview] = None
        self._filled = 0

    @property
    def coming(self) -> int:
        """The length in bytes of the unit that is incomplete; -1 if its head has not arrived."""
        return self._body_size

    def measure(self, head: bytes) -> int:
        """Return the length of the body that follows `head`. The method may raise to refuse the
        unit, and may set `_head` to what it has decoded."""
        raise NotImplementedError

    def large_came(self) -> None:
        """Note that more of a large unit has come."""

    def get_buffer(self) -> memoryview:
        """Return the buffer for the next bytes; it is never empty."""
        if self._large is None:
            return self._view[self._end:]
        if self._filled == len(self._large):
            size = 2 * self._filled
            self._grow(size)
        return self._large[self._filled:self._filled + self.AT_ONCE]

    def _grow(self, size: int) -> None:
        old = self._large
        # In one step: it is used only as it is filled, and nothing is copied any more
        if size >= LAZY:
            self._large = mapped(self._body_size)
        else:
            self._large = self._memory(min(size, self._body_size))
        if old is not None:
            self._large[:self._filled] = old

    @classmethod
    def _memory(cls, size: int) -> memoryview:
        """Return memory of this size: a used buffer to which nothing refers any more, or new
        memory."""
        with contextlib.suppress(IndexError):   # there is none, or another thread was faster
            used = cls._used.popleft()
            if len(used) >= size and is_unused(used):
                cls._used.append(used)
                return memoryview(used)[:size]
        new = bytearray(size)
        if size <= cls.FIRST:
            cls._used.append(new)
        return memoryview(new)

    def buffer_updated(self, count: int) -> List[Tuple[Any, memoryview]]:
        """Note that `count` bytes were received. Returns the units (head, body) that are complete
        now."""
        if self._large is not None:
            return self._fill_large(count)
        units = []
        start = self._start
        end = self._end = self._end + count
        # One copy for all units of this call: the staging buffer is used again
        copy = bytes(self._view[:end])
        snapshot = memoryview(copy)
        size = self._body_size
        while True:
            if size < 0:
                body = start + self._head_size
                if body > end:
                    break
                self._head = copy[start:body]
                size = self.measure(self._head)
                start = body
            after = start + size
            if after > end:
                break
            unit = (self._head, snapshot[start:after])
            units.append(unit)
            start = after
            size = -1
        self._body_size = size
        if start == end and size < 0:   # nearly always
            self._start = 0
            self._end = 0
        else:
            self._start = start
            self._make_room()
        return units

    def _fill_large(self, count: int) -> List[Tuple[Any, memoryview]]:
        assert self._large is not None   # asked by the caller
        self._filled += count
        self.large_came()
        if self._filled < self._body_size:
            return []
        unit = (self._head, self._large)
        self._large = None
        self._body_size = -1
        return [unit]

    def _make_room(self) -> None:
        left = self._end - self._start
        if self._body_size > self.STAGING // 4:
            size = max(self.FIRST, left)
            self._grow(size)
            assert self._large is not None
            self._large[:left] = self._view[self._start:self._end]
            self._filled = left
            self._start = 0
            self._end = 0
        elif left == 0:
            self._start = self._end = 0
        elif self._start > self.STAGING // 2:
            self._staging[:left] = bytes(self._view[self._start:self._end])
            self._start = 0
            self._end = left


_FRAME = struct.Struct('>IBBHQ')   # payload length, op, encoding, flags, request
_SEQ = struct.Struct('>QB')
HEAD_TAG = 16
TAIL_TAG = 32
HASHED_LATE = 512 << 10   # bytes of a payload from which on it is hashed while it is sent
HASHED_AT_ONCE = 256 << 10


class PayloadTag:
    """The tag of a large payload, which is computed while the payload is sent: the other side
    hashes one piece while this side hashes the next."""
    __slots__ = ('_mac', '_place')

    def __init__(self, mac: 'hmac.HMAC') -> None:
        """`mac` has processed what precedes the payload."""
        self._mac = mac
        self._place = memoryview(bytearray(TAIL_TAG))

    def follows(self, pieces: List[Buffer]) -> Iterator[Tuple[memoryview, 'PayloadTag']]:
        """Return what is to be sent, in order: `reached` is called for each before it is sent."""
        for piece in pieces:
            view = memoryview(piece).cast('B')
            for start in range(0, len(view), HASHED_AT_ONCE):
                yield view[start:start + HASHED_AT_ONCE], self
        yield self._place, self

    def reached(self, view: memoryview) -> None:
        """Hash what is sent next; after the payload this is the tag itself."""
        if view is self._place:
            view[:] = self._mac.digest()
        else:
            self._mac.update(view)

    def close(self) -> None:
        """Note that the channel was closed before everything was sent."""


class FrameMac:
    """HMAC-SHA256 (RFC 2104) with one key, for many short messages: the blocks that contain the key
    are hashed once. `hmac.digest` hashes them for each message and looks up the algorithm each
    time, which takes four times as long as the rest."""
    BLOCK = 64    # bytes of a block of SHA-256; keys have less

    def __init__(self, key: bytes) -> None:
        if len(key) > self.BLOCK:
            raise ValueError('a key of %d bytes' % len(key))
        padded = key.ljust(self.BLOCK, b'\0')
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5c for byte in padded))

    def of(self, *parts: Buffer) -> bytes:
        """Return the code of the concatenation of these parts."""
        inner = self._inner.copy()
        inner.update(b''.join(parts))
        outer = self._outer.copy()
        outer.update(inner.digest())
        return outer.digest()


class FrameEncoder:
    """Encodes messages as frames of one direction: header 16 bytes, its tag 16, payload, tag 32.
    Frames are numbered, and the number is not sent. Under TLS, payloads have no tag if both sides
    have agreed on that."""

    @property
    def sealed(self) -> int:
        """Return how many frames were made."""
        return self._seq

    def __init__(self, key: bytes, tags_payloads: bool = True,
                 version: int = VERSIONS[1]) -> None:
        """`version` is the minor version of the protocol that the other side speaks."""
        self._short = FrameMac(key)
        self._mac = hmac.new(key, digestmod='sha256')
        self._seq = 0
        self._tags_payloads = tags_payloads
        if version == VERSIONS[1]:
            self._encode: Callable[..., Tuple[int, int, List[Buffer]]] = encode
        else:
            self._encode = functools.partial(encode_for, version)

    def seal(self, message: Any) -> List[Buffer]:
        """Return a frame as buffers that are to be sent one after the other. Raises ValueError if
        the frame would be too large."""
        buffers, tag = self.begin(message)
        if tag is None:
            return buffers
        views: List[Buffer] = []
        for view, _ in tag.follows(buffers[1:]):
            tag.reached(view)
            views.append(view)
        return [buffers[0], *views]

    def begin(self, message: Any) -> Tuple[List[Buffer], Optional[PayloadTag]]:
        """Do as `seal`, except that a large payload is not hashed yet: the buffers of its frame are
        the head and the payload, and the tag yields what follows the head."""
        op, encoding, pieces = self._encode(message)
        size = sum(map(len, pieces))
        bounds = BOUNDS_OF.get(type(message), BOUNDS)
        if len(pieces[0]) > bounds.size + MAX_CONTROL:   # and the index of the out-of-band buffers
            reason = '%s with an envelope of %d bytes is over the limit of %d' % (
                type(message).__name__, len(pieces[0]), bounds.size)
            raise ValueError(reason)
        if size > MESSAGES[op][1]:
            text = '%s of %d bytes is over the limit of %d' % (type(message).__name__, size,
                                                               MESSAGES[op][1])
            raise TooLarge(text)
        header = _FRAME.pack(size, op, encoding, 0, 0)
        digest = self._short.of(_SEQ.pack(self._seq, 0), header)
        head = header + digest[:HEAD_TAG]
        tail = b''
        if self._tags_payloads and size < OUT_OF_BAND:
            tail = self._short.of(_SEQ.pack(self._seq, 1), header, *pieces)
        elif self._tags_payloads:
            mac = self._mac.copy()
            mac.update(_SEQ.pack(self._seq, 1) + header)
            if size >= HASHED_LATE:
                self._seq += 1
                return [head, *pieces], PayloadTag(mac)
            for piece in pieces:
                mac.update(piece)
            tail = mac.digest()
        self._seq += 1
        if size < OUT_OF_BAND:
            return [b''.join((head, *pieces, tail))], None
        if tail:
            return [head, *pieces, tail], None
        return [head, *pieces], None


class FrameDecoder(ReceiveBuffer):
    """Decodes frames of one direction. The length is used only after the tag of the header was
    verified, and the payload is decoded only after its own tag was verified. Raises PeerError,
    after which the link is unusable."""

    def __init__(self, key: bytes, takes: Iterable[int] = MESSAGES,
                 tags_payloads: bool = True) -> None:
        super().__init__(_FRAME.size + HEAD_TAG)
        if tags_payloads:
            self._tail = TAIL_TAG
        else:
            self._tail = 0
        self._takes = takes      # ops that may come
        self.opened = 0
        self._short = FrameMac(key)
        self._mac = hmac.new(key, digestmod='sha256')
        self._seq = 0
        self._measured = 0
        # Numbers of large frames -> the bytes of the payload that are hashed, and their hash: one
        # piece is hashed while the other side sends the next
        self._hashed: Dict[int, Tuple[int, 'hmac.HMAC']] = {}

    def measure(self, head: bytes) -> int:
        header = head[:_FRAME.size]
        # Heads are measured in order, at most one ahead of bodies, so that they can be counted by
        # themselves.
        digest = self._short.of(_SEQ.pack(self._measured, 0), header)
        tag = digest[:HEAD_TAG]
        if not hmac.compare_digest(tag, head[_FRAME.size:]):
            raise PeerError('a frame header is not authentic')
        self._measured += 1
        size, op = _FRAME.unpack(header)[:2]
        if op in MESSAGES:
            if op not in self._takes:
                text = '%s may not come here' % MESSAGES[op][0].__name__
                raise PeerError(text)
        if op in MESSAGES:
            limit = MESSAGES[op][1]
        else:
            limit = MAX_CONTROL
        if size > limit:
            raise PeerError('a frame of %d bytes is over the limit of %d' % (size, limit))
        return size + self._tail  # type: ignore[no-any-return]

    def large_came(self) -> None:
        if not self._tail:
            return
        assert self._large is not None
        seq = self._measured - 1
        if seq in self._hashed:
            start, mac = self._hashed[seq]
        else:
            start = 0
            mac = self._begin_hash(seq, self._head[:_FRAME.size])
        end = min(self._filled, self._body_size - TAIL_TAG)
        if end - start >= self.STAGING or end == self._body_size - TAIL_TAG:
            mac.update(self._large[start:end])
            self._hashed[seq] = (end, mac)

    def _begin_hash(self, seq: int, header: bytes) -> 'hmac.HMAC':
        mac = self._mac.copy()
        mac.update(_SEQ.pack(seq, 1) + header)
        return mac

    def _hash_of(self, header: bytes, payload: memoryview) -> bytes:
        if self._seq in self._hashed:
            _, mac = self._hashed.pop(self._seq)
        else:
            mac = self._begin_hash(self._seq, header)
            mac.update(payload)
        return mac.digest()

    def open(self, head: bytes, body: memoryview) -> Any:
        """Return the message in a complete frame."""
        header = head[:_FRAME.size]
        payload = body
        if self._tail:
            payload = body[:-TAIL_TAG]
            if len(payload) < OUT_OF_BAND:   # it has come at once
                digest = self._short.of(_SEQ.pack(self._seq, 1), header, payload)
            else:
                digest = self._hash_of(header, payload)
            if not hmac.compare_digest(digest, body[-TAIL_TAG:]):
                raise PeerError('a frame is not authentic')
        self._seq += 1
        _, op, encoding, _, _ = _FRAME.unpack(header)
        message = decode(op, encoding, payload)
        self.opened += 1
        return message


# Records between the daemon, a runner and its workers on one host: a head and three bodies. The
# head has: kind, 1 if the first body is in a memory segment whose descriptor is sent along, number
# (worker, or exit code + 2^31), serial, start, end, lengths of the three bodies
_RECORD = struct.Struct('>BBIQddQII')
_IN_SEGMENT = 1    # the value of that byte


class RecordType(enum.IntEnum):
    """Kinds of record."""
    # daemon to runner; FORK and CLOSE also from a runner to a worker that it has not forked
    INIT = 1        # bodies: pickled spec, code, -
    FORK = 2        # number: worker to be made; its socket is sent along
    INTERRUPT = 3   # number: worker, serial: only if it runs this one
    KILL = 4        # number: worker
    RECALL = 5      # number: worker
    CLOSE = 6       # run cleanup, end
    # Number: worker, serial, start: memory limit of the job in bytes, end: time limit in seconds;
    # 0: none
    WATCH = 7
    ASK = 8         # asks whether the runner is alive
    EQUIP = 9       # number: worker to be made; body: JSON of its environment variables
    # Number: worker, serial: the job, start: 1.0 if its stacks are wanted; answered by SEEN
    LOOK = 10
    # runner to daemon; UP, FAILED and END_NODE also to a runner from a worker that it has not
    # forked
    READY = 16
    FAILED = 17     # body: text
    WORKER_STARTED = 18       # number: worker, serial: its pid
    # Number: worker, serial: what it was running or 0, start: exit code, bodies: -, stdout, stderr
    WORKER_EXITED = 19
    MEMORY_EXCEEDED = 21    # number: worker, serial: it is being killed
    OVERDUE = 25    # number: worker, serial: exceeded its time limit, is being ended
    START_FAILED = 22     # number: worker, body: text that says why it cannot be made
    ALIVE = 23      # answers ASK
    END_NODE = 24   # the cleanup of the computation asks for the end of the node
    # Number: worker, serial: the job, bodies: text of its stacks, ends of its stdout and stderr
    SEEN = 26
    PRINTED = 20    # number: worker, serial: the job, start: stream, end: offset, body: bytes
    # daemon to worker
    JOB = 32        # number: CPUs, serial, body: payload
    # Body: text, empty if the file that it sent is stored, or what it requested is there
    FILE_STORED = 33
    # worker to daemon
    RESULT = 48     # number: outcome, serial, times, bodies: payload, stdout, stderr
    JOBS_RETURNED = 49  # serial: given back
    LOGGED = 51     # serial, body: plain pickle of level, logger and text
    FILE = 50       # serial, number: offset in pieces, bodies: row (a plain pickle), data
    # Serial, body: plain pickle of a bundle's number or a module's name; answered by KEPT
    WANT = 52
    HERE = 53       # the first one: with it the kernel tells which process has this pipe
    # Body: text, empty if the worker is ready for work: the initializer of an executor has
    # returned, and one that is not forked has loaded the computation
    INITIALIZED = 54


# Kind of record -> size limits of its three bodies in bytes. The writers run a user's code, so that
# records are checked like data from outside: a record that is not in the table, or is larger, ends
# its worker or runner.
FROM_WORKER = {
    RecordType.RESULT: (VALUE_MOST, OUTPUT_MOST, OUTPUT_MOST),
    RecordType.JOBS_RETURNED: (8 * SERIALS_MOST, 0, 0), RecordType.LOGGED: (8 * TEXT_MOST, 0, 0),
    RecordType.FILE: (MAX_CONTROL, FILE_PIECE, 0), RecordType.WANT: (MAX_CONTROL, 0, 0),
    RecordType.HERE: (0, 0, 0), RecordType.INITIALIZED: (8 * TEXT_MOST, 0, 0)
}
FROM_RUNNER = {
    RecordType.READY: (8 * TEXT_MOST, 0, 0), RecordType.FAILED: (8 * TEXT_MOST, 0, 0),
    RecordType.WORKER_STARTED: (0, 0, 0), RecordType.WORKER_EXITED: (0, OUTPUT_MOST, OUTPUT_MOST),
    RecordType.MEMORY_EXCEEDED: (0, 0, 0), RecordType.OVERDUE: (0, 0, 0),
    RecordType.PRINTED: (OUTPUT_KEPT, 0, 0), RecordType.START_FAILED: (8 * TEXT_MOST, 0, 0),
    RecordType.ALIVE: (0, 0, 0), RecordType.END_NODE: (0, 0, 0),
    RecordType.SEEN: (STACKS_MOST, OUTPUT_SEEN, OUTPUT_SEEN)
}
# From a worker that loads the computation itself, in addition to what it sends to the daemon
FROM_LOADING = {
    kind: FROM_RUNNER[kind]
    for kind in (RecordType.READY, RecordType.FAILED, RecordType.END_NODE, RecordType.ALIVE)
}
OF_WORKERS = frozenset((Outcome.RETURNED, Outcome.RETURNED_CODE, Outcome.RAISED, *PROVISIONAL))


_JOB = int(RecordType.JOB)        # a global variable is faster than the member
_RESULT = int(RecordType.RESULT)
_FILE_STORED = int(RecordType.FILE_STORED)


class MemorySegment:
    """Memory in which a value is passed to another process, by its descriptor. The value is written
    to the segment once, with write(); stores into a mapping would kill this process if the memory
    is exhausted. Then the segment is sealed: nobody can change it, which a private mapping would
    show, or truncate it, which would kill a reader. A segment is not reused, and the system frees
    it with its last descriptor and mapping, whichever process was killed before."""
    NAME = 'dispy-value'

    def __init__(self, payload: Payload) -> None:
        """`value` is the value that the segment will contain. The memory is allocated when it is
        filled."""
        self.payload = payload
        self.is_whole = False
        self.is_begun = False
        self._handle = -1
        self._left: Deque[memoryview] = collections.deque()
        for piece in pieces_of(payload):
            view = memoryview(piece)
            self._left.append(view.cast('B'))

    def fill(self, most: int) -> int:
        """Write at most this many bytes of the value. Returns how many were written. Raises OSError
        if there is no memory or no descriptor."""
        if not self.is_begun:
            self._handle = os.memfd_create(self.NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self.is_begun = True
        written = 0
        while self._left and written < most:
            view = self._left[0]
            room = min(most - written, WRITE_MOST)
            count = os.write(self._handle, view[:room])
            written += count
            self._left[0] = view[count:]
            if count == len(view):
                self._left.popleft()
        if not self._left:
            fcntl.fcntl(self._handle, fcntl.F_ADD_SEALS, SEALED)
            self.is_whole = True
        return written

    def fileno(self) -> int:
        """Return its descriptor."""
        return self._handle

    def close(self) -> None:
        """Close the descriptor."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class MappedSegment(mmap.mmap):
    """A memory segment in the process that has received it, mapped copy-on-write."""


class _NotReceived:
    """Represents a value that arrived without its segment. Opening it raises an error."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __reduce__(self) -> tuple:
        text = 'no descriptor was left for a value of %d bytes: raise the limit of open files ' \
            '(ulimit -n)' % self._size
        return _raise_shortage, (text,)


def _raise_shortage(text: str) -> NoReturn:
    raise OSError(errno.EMFILE, text)


class SegmentIntake:
    """The descriptors of memory segments that have arrived on a pipe, in the order of the records
    to which they belong. Segments are mapped; if many are in use, as in a program that keeps its
    results, further ones are read instead, since a mapping holds a descriptor (before Python
    3.13)."""
    WAITING_MOST = 64     # descriptors whose records have not arrived
    ROOM = socket.CMSG_SPACE(4 * 4) if hasattr(socket, 'CMSG_SPACE') else 0
    _mapped: 'weakref.WeakSet[mmap.mmap]' = weakref.WeakSet()   # in this process

    def __init__(self) -> None:
        self._handles: Deque[int] = collections.deque()

    def came(self, ancillary: Sequence[Tuple[int, int, bytes]], flags: int) -> None:
        """Take the descriptors that came with some bytes. Raises PeerError."""
        handles = array.array('i')
        for level, kind, body in ancillary:
            if level != socket.SOL_SOCKET:
                continue
            if kind == socket.SCM_RIGHTS:
                rest = len(body) % handles.itemsize
                handles.frombytes(body[:len(body) - rest])
        if flags & _MSG_CTRUNC:
            if not handles:   # the kernel has dropped it, as no descriptor was left
                handles.append(-1)
        self._handles.extend(handles)
        if len(self._handles) > self.WAITING_MOST:
            raise PeerError('descriptors that belong to nothing')

    def take(self, size: int) -> memoryview:
        """Return the value of this size in the next segment. Raises PeerError or MemoryError."""
        if not self._handles:
            raise PeerError('a value that has not come')
        handle = self._handles.popleft()
        if handle < 0:
            missing = pickle.dumps(_NotReceived(size))
            return memoryview(missing)
        try:
            return self._open(handle, size)
        except (OSError, ValueError) as exc:
            text = 'a descriptor that is not a usable memory segment: %s' % exc
            raise PeerError(text) from exc
        finally:
            os.close(handle)

    def _open(self, handle: int, size: int) -> memoryview:
        seals = fcntl.fcntl(handle, fcntl.F_GET_SEALS)
        if seals & SEALED != SEALED:
            raise ValueError('it is not sealed')
        length = os.fstat(handle).st_size
        if length != size:
            text = 'it has %d bytes and not %d' % (length, size)
            raise ValueError(text)
        if len(self._mapped) < SEGMENTS_MOST:
            # No descriptor is left, or the system has no mappings
            with contextlib.suppress(OSError):
                private = mmap.ACCESS_COPY
                segment = MappedSegment(handle, size, access=private, **_NO_HANDLE)
                self._mapped.add(segment)
                return memoryview(segment)
        view = mapped(size)
        at = 0
        while at < size:
            room = view[at:at + ReceiveBuffer.AT_ONCE]
            at += os.preadv(handle, [room], at)
        return view

    def close(self) -> None:
        """Close the descriptors that were not used."""
        while self._handles:
            handle = self._handles.popleft()
            if handle >= 0:
                os.close(handle)


def goes_in_segment(payload: Payload) -> bool:
    """Return whether a value passes to or from a worker in a memory segment: it does if it has
    out-of-band buffers, which are used in place. The contents of the pickle itself are copied when
    it is opened, and a pipe transfers these as fast."""
    if type(payload) is not tuple or not HAS_SEGMENTS or size_of(payload) < SEGMENT_FROM:
        return False
    return payload[0][0] == 1


def is_read(sock: socket.socket) -> bool:
    """Return whether the other side has read nearly all that was sent. Otherwise memory segments
    would accumulate without bound."""
    answer = fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(answer, sys.byteorder) < SEGMENTS_UNREAD


def segment_record(kind: int, number: int, serial: int, start: float, end: float, first: Payload,
                   second: Buffer = b'', third: Buffer = b'') -> bytes:
    """Return a record whose first body is in a memory segment, which must be sent with it."""
    size = size_of(first)
    head = _RECORD.pack(kind, 1, number, serial, start, end, size, len(second), len(third))
    return b''.join((head, second, third))


class Record(typing.NamedTuple):
    """A decoded record."""
    kind: int
    number: int
    serial: int
    start: float
    end: float
    bodies: Tuple[memoryview, memoryview, memoryview]


def pack_record(kind: int, number: int = 0, serial: int = 0, start: float = 0.0, end: float = 0.0,
                first: Payload = b'', second: Buffer = b'', third: Buffer = b'') -> List[Buffer]:
    """Return a record as buffers that are to be written one after the other."""
    if type(first) is tuple:
        size = size_of(first)
    else:
        size = len(first)
    head = _RECORD.pack(kind, 0, number, serial, start, end, size, len(second), len(third))
    pieces = first if type(first) is tuple else (first,)   # pieces_of, without the call
    if size + len(second) + len(third) < OUT_OF_BAND:
        return [b''.join((head, *pieces, second, third))]
    return [piece for piece in (head, *pieces, second, third) if len(piece)]


class RecordBuffer(ReceiveBuffer):
    """Splits bytes into records. With `limits` (FROM_WORKER or FROM_RUNNER), it raises PeerError
    for other kinds of records."""

    def __init__(self, limits: Optional[Dict[RecordType, Tuple[int, int, int]]] = None) -> None:
        super().__init__(_RECORD.size)
        self._limits = limits
        self.segments = SegmentIntake()

    def measure(self, head: bytes) -> int:
        self._head = _RECORD.unpack(head)   # the unit has the decoded head instead of the bytes
        kind, in_segment, _, _, _, _, one, two, three = self._head
        if self._limits is not None:
            most = self._limits.get(kind, (-1, -1, -1))  # type: ignore[call-overload]
            if one > most[0] or two > most[1] or three > most[2]:
                text = 'record %d with bodies of %d, %d and %d bytes' % (kind, one, two, three)
                raise PeerError(text)
        if in_segment:
            return two + three
        return one + two + three

    def records(self, count: int) -> List[Record]:
        """Note that `count` bytes were received. Returns the records that are complete now. Raises
        PeerError."""
        units = self.buffer_updated(count)
        records: List[Record] = []
        for head, body in units:
            records.append(self.record_of(head, body))
        return records

    def record_of(self, head: Tuple[Any, ...], body: memoryview) -> Record:
        """Return the record with this head and these bodies. Raises PeerError if a segment is
        missing."""
        kind, in_segment, number, serial, start, end, one, two, three = head
        if in_segment:
            segment = self.segments.take(one)
            rest = (body[:two], body[two:two + three])
            return Record(kind, number, serial, start, end, (segment, *rest))
        both = one + two
        bodies = (body[:one], body[one:both], body[both:both + three])
        return Record(kind, number, serial, start, end, bodies)


# Names of devices on Windows, in each directory and with any extension
_DEVICES = frozenset(('CON', 'PRN', 'AUX', 'NUL', *(name + str(number) for name in ('COM', 'LPT')
                                                    for number in range(1, 10))))
IS_WINDOWS = os.name == 'nt'
# Whether names that differ only in case, or in how letters with accents are composed, are one file
NAMES_ARE_FOLDED = IS_WINDOWS or sys.platform == 'darwin'


def is_link(path: str) -> bool:
    """Return whether a path is a symbolic link or, on Windows, a junction, which also leads
    elsewhere."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    if stat.S_ISLNK(status.st_mode):
        return True
    return getattr(status, 'st_reparse_tag', 0) == _JUNCTION


_JUNCTION = 0xa0000003   # IO_REPARSE_TAG_MOUNT_POINT of winnt.h


def _means_something_else(part: str) -> bool:
    """Return whether Windows takes a part of a name for a device, or cannot have a file of that
    name."""
    if set(part) & set('<>"|?*'):
        return True
    if part[-1] in ' .':
        return True
    stem = part.partition('.')[0]
    return stem.rstrip().upper() in _DEVICES


def check_apart(names: Iterable[str]) -> None:
    """Raise ValueError if two names would be the same file here."""
    seen: Dict[str, str] = {}
    for name in names:
        folded = unicodedata.normalize('NFC', name).casefold()
        other = seen.setdefault(folded, name)
        if other != name:
            text = ('files %.60r and %.60r would be one file on this system, which takes '
                    'no notice of case: rename one of them' % (other, name))
            raise ValueError(text)


# --------------------------------------------------------------------------------------------------
# Files, links, and the loop that owns them: accepting, connecting, discovery
# --------------------------------------------------------------------------------------------------

def check_name(name: str) -> Tuple[str, ...]:
    """Return the parts of a file name from outside. Raises ValueError for a name that leaves the
    directory or has a special meaning."""
    words = name.split('/')
    parts = tuple(words)
    if len(parts) > 32:
        raise ValueError('file name %.60r has more than 32 parts' % name)
    for part in parts:
        categories = {unicodedata.category(c) for c in part}
        if part in ('', '.', '..') or '\\' in part or ':' in part \
                or categories & {'Cc', 'Zl', 'Zp'}:
            text = 'file name %.60r is refused: part %.60r' % (name, part)
            raise ValueError(text)
        if IS_WINDOWS and _means_something_else(part):
            raise ValueError('file name %.60r is refused: part %.60r means something else on '
                             'Windows, or cannot be there' % (name, part))
        try:
            as_bytes = part.encode('utf-8')
            if len(as_bytes) > 255:
                raise ValueError('file name %.60r has a part of more than 255 bytes' % name)
        except UnicodeEncodeError as exc:
            raise ValueError('file name %.60r is not UTF-8' % name) from exc
    return parts


_WALKS = os.open in os.supports_dir_fd and hasattr(os, 'O_NOFOLLOW')


@contextlib.contextmanager
def _parent_of(root: str, parts: Sequence[str]) -> Any:
    """Return (prefix, dir_fd) for access to the directory of a file below root. Missing directories
    are created, and links are not followed."""
    if not _WALKS:
        path = root
        for part in parts[:-1]:
            path = os.path.join(path, part)
            if is_link(path):
                raise ValueError('%s is a link' % path)
            os.makedirs(path, mode=0o700, exist_ok=True)
        yield path + os.sep, None
        return
    flags = os.O_RDONLY | os.O_DIRECTORY
    handle = os.open(root, flags)
    try:
        for part in parts[:-1]:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o700, dir_fd=handle)
            below = os.open(part, flags | os.O_NOFOLLOW, dir_fd=handle)
            os.close(handle)
            handle = below
        yield '', handle
    finally:
        os.close(handle)


def move_below(path: str, root: str, name: str) -> None:
    """Move a file to the path `name` below a directory; links are not followed. Raises OSError, or
    ValueError for a name that leaves the directory."""
    parts = check_name(name)
    parent = _parent_of(root, parts)
    with parent as (prefix, handle):
        target = prefix + parts[-1]
        os.replace(path, target, dst_dir_fd=handle)


def open_regular(path: str) -> Any:
    """Open a file for reading. Raises ValueError at once if it is not a regular file, because
    opening a FIFO waits for its other end and a device may be endless. Raises OSError."""
    o_nonblock = getattr(os, 'O_NONBLOCK', 0)
    o_binary = getattr(os, 'O_BINARY', 0)
    o_cloexec = getattr(os, 'O_CLOEXEC', 0)
    handle = os.open(path, os.O_RDONLY | o_nonblock | o_binary | o_cloexec)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError('%s is not a regular file' % path)
        return os.fdopen(handle, 'rb')
    except BaseException:
        os.close(handle)
        raise


def file_digest(path: str) -> Tuple[int, bytes]:
    """Return size in bytes and SHA-256 of a file. Raises what `open_regular` raises."""
    digest = hashlib.sha256()
    size = 0
    with open_regular(path) as file:
        for piece in iter(lambda: file.read(FILE_PIECE), b''):
            digest.update(piece)
            size += len(piece)
    return size, digest.digest()


class Digests:
    """Caches the digests of large files that already exist, by the metadata of each file: computing
    them takes minutes, during which no loop may block. Any thread may use it: each entry is
    replaced as a whole."""
    INLINE = 16 << 20    # bytes that are digested at once
    MOST = 4096          # digests that are remembered
    _known: Dict[str, Tuple[tuple, bytes]] = {}

    @staticmethod
    def _state(path: str) -> tuple:
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino

    @classmethod
    def of(cls, path: str) -> bytes:
        """Return the digest of a file. Raises OSError."""
        state = cls._state(path)
        known = cls._known.get(path)
        if known is not None:
            if known[0] == state:
                return known[1]
        digest = file_digest(path)[1]
        if state[0] > FILE_PIECE and cls._state(path) == state:
            if len(cls._known) >= cls.MOST:
                cls._known = {}
            cls._known[path] = state, digest
        return digest

    @classmethod
    def unknown(cls, root: str, rows: Sequence[tuple]) -> List[str]:
        """Return the paths of files that exist, have the announced size, and would have to be
        digested; the result is empty if that takes little time."""
        paths = []
        total = 0
        for name, size, _, _ in rows:
            path = os.path.join(root, *name.split('/'))
            # It does not exist, or has a name that will be refused
            with contextlib.suppress(OSError, ValueError):
                state = cls._state(path)
                if state[0] == size and cls._known.get(path, ((), b''))[0] != state:
                    if not is_link(path):
                        paths.append(path)
                        total += size
        if total > cls.INLINE:
            return paths
        return []

    @classmethod
    def learn(cls, paths: Sequence[str]) -> None:
        """Compute the digests of these files. This runs in a thread of its own."""
        for path in paths:
            with contextlib.suppress(OSError):   # the comparison will report it
                cls.of(path)


class IncomingFile:
    """A file that is being received: it has a temporary name until size and digest are verified.
    `scratch` is a directory for it during this time, which is removed with its computation; without
    one, the file is next to its destination. If `sync` is true, the file is flushed to the disk
    before it is moved to its destination; files of a computation need not be, because they are
    compared before they are used again."""

    def __init__(self,
                 root: str,
                 name: str,
                 size: int,
                 digest: bytes,
                 mode: int,
                 scratch: Optional[str] = None,
                 sync: bool = True) -> None:
        self._scratch = scratch
        self._sync = sync
        self._root, self._parts = root, check_name(name)
        self._size = size
        self._digest = digest
        self._mode = mode & 0o755 | 0o600
        digester = hashlib.sha256()
        self._seen = 0
        self._hash = digester
        suffix = os.urandom(6)
        digits = suffix.hex()
        self._temporary = '.%s.part' % digits
        parent = _parent_of(root, self._parts)
        with parent as (prefix, handle):
            binary = getattr(os, 'O_BINARY', 0)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | binary
            if scratch is not None:
                is_near = self._is_near(scratch, handle)
                if not is_near:
                    self._scratch = None
            if self._scratch is not None:
                path = os.path.join(self._scratch, self._temporary)
                self._file = os.open(path, flags, 0o600)
            else:
                self._file = os.open(prefix + self._temporary, flags, 0o600, dir_fd=handle)

    @staticmethod
    def _is_near(scratch: str, handle: Optional[int]) -> bool:
        """Return whether a file can be renamed from there, which requires the same file system."""
        if handle is None:
            return False
        device = os.stat(scratch).st_dev
        status = os.fstat(handle)
        return device == status.st_dev

    def piece(self, offset: int, data: Buffer) -> bool:
        """Write the next piece. Returns true when the file is complete and at its destination."""
        if offset != self._seen or offset + len(data) > self._size:
            text = ('a piece at %d of %d bytes does not fit a file of %d of which %d are '
                    'here' % (offset, len(data), self._size, self._seen))
            raise ValueError(text)
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view):]
        self._hash.update(data)
        self._seen += len(data)
        if self._seen < self._size:
            return False
        digest = self._hash.digest()
        if digest != self._digest:
            text = 'the digest is wrong: the file was changed after it had been announced'
            raise WrongDigest(text)
        if self._sync:
            os.fsync(self._file)
        handle = self._file
        self._file = -1
        os.close(handle)
        # Handle: of the directory now
        parent = _parent_of(self._root, self._parts)
        with parent as (prefix, handle):
            part = self._parts[-1]
            target = prefix + part
            if self._scratch is not None:
                temporary = os.path.join(self._scratch, self._temporary)
                os.chmod(temporary, self._mode)
                os.replace(temporary, target, dst_dir_fd=handle)
                return True
            os.chmod(prefix + self._temporary, self._mode,
                     **({'dir_fd': handle} if handle is not None else {}))
            os.replace(prefix + self._temporary, target, src_dir_fd=handle, dst_dir_fd=handle)
        return True

    def abort(self) -> None:
        """Remove the part that was received."""
        if self._file >= 0:
            handle = self._file
            self._file = -1
            os.close(handle)
        if self._scratch is not None:
            with contextlib.suppress(OSError):   # as below
                path = os.path.join(self._scratch, self._temporary)
                os.unlink(path)
            return
        with contextlib.suppress(OSError, ValueError), _parent_of(self._root,
                                                                  self._parts) as (prefix, handle):
            # It was never made, or is at its destination already
            os.unlink(prefix + self._temporary, dir_fd=handle)


TOO_LARGE = '%s has %d bytes and the node takes %d at most (its --max-file-size)'


def check_size(name: str, size: int, most: int, text: str = TOO_LARGE) -> None:
    """Raise ValueError for a file that is larger than the limit."""
    if size > most:
        raise ValueError(text % (name, size, most))


def read_pieces(source: Any, size: int) -> Iterator[Tuple[int, Buffer]]:
    """Yield offset and content of each piece of a file; `source` is a path, the content, or an
    object whose method `read` returns the content. The content of a memoryview is not copied.
    Raises OSError if the file cannot be read or has become shorter than `size`."""
    if isinstance(source, memoryview):
        for offset in range(0, size, FILE_PIECE):
            yield offset, source[offset:offset + FILE_PIECE]
        return
    if not isinstance(source, (str, bytes)):
        source = source.read()
    with open_regular(source) if isinstance(source, str) else io.BytesIO(source) as file:
        for offset in range(0, max(size, 1), FILE_PIECE):
            length = min(FILE_PIECE, size - offset)
            data = file.read(length)
            if len(data) < length:
                text = 'it has %d bytes now and had %d' % (offset + len(data), size)
                raise OSError(text)
            yield offset, data


class NoRoom(OSError):
    """There is not enough room for the files that were announced."""
    errno = errno.ENOSPC


class FileReceiver:
    """Receives the files of one computation, each into the directory of its purpose. Files that
    exist already with the right size and digest are not requested. `too_large` is the error text
    for files of more than `most` bytes; `where` is the beginning of all error texts. Files for the
    purposes in `sync` are flushed to the disk before they are moved to their destination."""

    def __init__(self, roots: Dict[Purpose, str], most: int = sys.maxsize,
                 too_large: str = TOO_LARGE, where: str = '', scratch: Optional[str] = None,
                 sync: Container[int] = frozenset((Purpose.PLACED, Purpose.FROM_JOB))) -> None:
        self._roots = roots
        self._most = most
        self._too_large = too_large
        self._where = where
        self._scratch = scratch
        self._sync = sync
        # The code, of REASONS, why a file could not be stored
        self.code = ''
        self._keys: Dict[int, int] = {}                    # purpose -> key of what is wanted
        self._wanted: Dict[Tuple[int, str], tuple] = {}    # (purpose, name) -> row
        # The number for each purpose: iterating over a dictionary from which many entries were
        # removed visits their former places.
        self._left: Dict[int, int] = collections.Counter()
        # (purpose, key, name) -> the file, of which a part has come
        self._partial: Dict[Tuple[int, int, str], IncomingFile] = {}

    def want(self, purpose: Purpose, rows: Sequence[tuple]) -> List[Tuple[int, int, tuple]]:
        """Return the Need rows that request those of these files which are missing. They replace
        earlier requests for this purpose. Raises ValueError or OSError."""
        root = self._roots[purpose]
        if NAMES_ARE_FOLDED and isinstance(rows, (list, tuple)):
            check_apart(row[0] for row in rows if _is_file(row))
        wanted = {}
        for row in rows if isinstance(rows, (list, tuple)) else (rows,):
            if not _is_file(row):
                raise ValueError('%.80r describes no file' % (row,))
            name, size, digest, _ = row
            # Files that a computation or a job needs are not the user's choice, so that the limit
            # does not apply.
            if purpose not in (Purpose.MODULES, Purpose.VALUES):
                check_size(name, size, self._most, self._too_large)
            if not self._known(root, check_name(name), size, digest):
                wanted[int(purpose), name] = row
        sizes = [size for _, size, _, _ in wanted.values()]
        needed = sum(sizes)
        free = shutil.disk_usage(root).free
        if needed > free:
            text = '%d bytes are needed for files and %d are free in %s' % (needed, free, root)
            raise NoRoom(text)
        self.abort(purpose)
        key = self._keys[purpose] = self._keys.get(purpose, -1) + 1
        self._wanted.update(wanted)
        self._left[int(purpose)] += len(wanted)
        return [(int(purpose), key, row) for _, row in sorted(wanted.items())]

    @staticmethod
    def _known(root: str, parts: Sequence[str], size: int, digest: bytes) -> bool:
        """Return whether this very file exists, and not through a link."""
        path = root
        for part in parts:
            path = os.path.join(path, part)
            if is_link(path):
                return False
        if not os.path.isfile(path):
            return False
        if os.path.getsize(path) != size:
            return False
        return Digests.of(path) == digest

    def piece(self, piece: FilePiece) -> bool:
        """Take a piece. Returns true when its file is complete and at its destination. Raises
        ValueError or OSError."""
        purpose = piece.purpose
        row = piece.row
        name = row[0]
        file = (purpose, piece.key, name)
        if purpose in ASKED_FOR:
            key = self._keys.get(purpose)
            if piece.key != key:
                return False   # of a file that is not wanted any more
            if self._wanted.get((purpose, name)) != row:
                raise ValueError('%.60r was not asked for' % name)
            begins = file not in self._partial
        else:
            begins = piece.offset == 0
            if begins:
                check_size(name, row[1], self._most, self._too_large)
            elif file not in self._partial:
                return False   # it has failed, and the other side does not know yet
        if begins:
            if file in self._partial:
                self._partial.pop(file).abort()
            _, size, digest, mode = row
            root = self._roots[Purpose(purpose)]
            self._partial[file] = IncomingFile(root,
                                               name,
                                               size,
                                               digest,
                                               mode,
                                               self._scratch,
                                               sync=purpose in self._sync)
        if not self._partial[file].piece(piece.offset, piece.data):
            return False
        del self._partial[file]
        if self._wanted.pop((purpose, name), None) is not None:
            self._left[purpose] -= 1
        return True

    def take(self, piece: FilePiece) -> Optional[FileStored]:
        """Take a piece. Returns the answer when its file is complete or cannot be stored, else
        None."""
        row = piece.row
        error = ''
        try:
            if not self.piece(piece):
                return None
        except (OSError, ValueError) as exc:
            error = self._where + (str(exc) or type(exc).__name__)
            self.code = reason_of(exc)
            if piece.purpose in FOR_CODE:   # useless without the others
                error = 'file %.100r cannot be stored: %s' % (row[0], error)
                if isinstance(exc, WrongDigest):
                    error += ' with the cluster. Make a new cluster'
                for purpose in FOR_CODE:
                    self.abort(purpose)
            else:
                self.abort(piece.purpose, piece.key, row[0])
        return FileStored(*piece[:3], row[0], error)

    def again(self) -> List[Tuple[int, int, tuple]]:
        """Drop incomplete files, because the connection on which they came has ended. Returns the
        Need rows that request them again; pieces that are still in transit are ignored."""
        for file in list(self._partial):
            self._partial.pop(file).abort()
        for purpose in {purpose for purpose, _ in self._wanted}:
            self._keys[purpose] += 1
        return [(purpose, self._keys[purpose], row)
                for (purpose, _), row in sorted(self._wanted.items())]

    def wants(self, *purposes: int) -> bool:
        """Return whether a file for one of these purposes was requested and is missing."""
        for purpose in purposes:
            if self._left[purpose]:
                return True
        return False

    def abort(self, purpose: Optional[int] = None, key: Optional[int] = None,
              name: Optional[str] = None) -> None:
        """Remove incomplete files and forget the requests: all of them, or those of a purpose, a
        key, a name."""
        for file in list(self._partial):
            if all(given in (None, own) for given, own in zip((purpose, key, name), file)):
                self._partial.pop(file).abort()
        kept = [file for file in self._wanted if purpose not in (None, file[0])]
        self._wanted = {file: self._wanted[file] for file in kept}
        self._left = collections.Counter(file[0] for file in kept)


def replace_file(path: str, place: str) -> None:
    """Move a file to its destination. On Windows this is repeated while another process, such as a
    virus scanner, has the existing file open. Raises OSError."""
    for _ in range(10 * IS_WINDOWS):
        try:
            return os.replace(path, place)
        except PermissionError as exc:
            logger.debug('%s cannot be replaced yet: %s', place, exc)
            time.sleep(0.02)
    os.replace(path, place)


@contextlib.contextmanager
def replaced(path: str, end: str = '.part') -> Iterator[str]:
    """Provide the name of a temporary file that atomically replaces another one at the end of the
    `with` block. It is removed if this fails. Raises OSError."""
    temporary = path + end
    try:
        yield temporary
        replace_file(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):   # it was not even made
            os.unlink(temporary)
        raise


def printable(text: str) -> str:
    """Return a text in which control characters, and characters that cannot be encoded, are
    escaped."""
    if text.isprintable():
        return text
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode('ascii')
                   for c in text)


def take_own_directory(path: str,
                       mark: str,
                       known: Sequence[str],
                       option: str,
                       mode: int = 0o700) -> None:
    """Create or take a directory for the exclusive use of this process, with a file `mark` in it:
    everything in a directory with the mark may be removed. A directory with other contents is
    refused, unless it is that of an earlier version, which is recognized by the files `known`.
    Raises StartError or OSError."""
    with contextlib.suppress(FileExistsError):
        os.makedirs(path, mode=0o700)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or (hasattr(os, 'getuid') and status.st_uid != os.getuid()):
        raise StartError('%s is not a directory of this user (%s)' % (path, option))
    names = os.listdir(path)
    if mark not in names:
        if names and not any(name in names for name in known):
            text = sorted(names)[0]
            reason = ('%s holds other things, such as %s, and nothing of dispy: files in it would '
                      'be removed; give a directory that is empty or does not exist '
                      '(%s)' % (path, printable(text), option))
            raise StartError(reason)
        os.close(
            os.open(os.path.join(path, mark),
                    os.O_WRONLY | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0), 0o600))
    os.chmod(path, mode)
    keep_private(path)


def default_directory(port: int) -> str:
    """Return the default directory for the files of the node at this port."""
    if hasattr(os, 'getuid'):
        user: Union[int, str] = os.getuid()
    else:
        user = os.environ.get('USERNAME', 'user')
    return os.path.join(tempfile.gettempdir(), 'dispy-%s' % user, 'node-%d' % port)


def machine() -> str:
    """Return an identifier of this machine since its boot; it is empty if there is none. Containers
    on one machine have the same identifier."""
    try:
        with open('/proc/sys/kernel/random/boot_id') as file:
            return file.read().strip()
    except OSError:
        return ''


def _try_lock(file: Any, shared: bool = False) -> None:
    if os.name == 'nt':
        import msvcrt
        # One byte is locked, at the file's position, which must be the same for all processes. It
        # is beyond the text because no other process can read a locked byte.
        file.seek(1 << 30)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def lock_file(file: Any) -> None:
    """Lock a file until it is closed or the process ends. A process that tests the lock holds it
    for a moment; therefore this tries several times. Raises OSError."""
    for left in reversed(range(5)):
        try:
            return _try_lock(file)
        except OSError:
            if not left:
                raise
            time.sleep(0.02)


def take_lock(path: str, port: int, instance: bytes = b'') -> Any:
    """Take the lock file, or raise StartError that names the process which holds it. The system
    releases the lock when the process ends."""
    file = open(path, 'a+')
    try:
        lock_file(file)
    except OSError as exc:
        file.seek(0)
        contents = file.read(200)
        holder = contents.strip()
        file.close()
        directory = os.path.dirname(path)
        reason = ('the directory %s is in use by a dispynode (%s): choose another with '
                  '--dest-path-prefix' % (directory, holder or 'no PID is noted'))
        raise StartError(reason) from exc
    file.truncate(0)
    pid = os.getpid()
    text = 'PID %d, port %d\n%s' % (pid, port, 'instance %s\n' % instance.hex() if instance else '')
    file.write(text)
    file.flush()
    return file


def write_private(path: str, data: bytes) -> None:
    """Write a file that only this user may read, atomically."""
    directory = os.path.dirname(path)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    folder = os.path.dirname(path)
    handle, temporary = tempfile.mkstemp(dir=folder)   # mode 0600
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(data)
        replace_file(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def ask_psutil(question: Callable[[Any], Any]) -> Any:
    """Return the result of `question(psutil)`; None if psutil is not installed or cannot tell.
    psutil may raise anything, such as RuntimeError if the performance counters of Windows are
    disabled."""
    try:
        import psutil
        return question(psutil)
    except ImportError:
        return None
    except Exception as exc:  # the figures are useful, but not necessary
        logger.debug('psutil cannot tell: %s: %s', type(exc).__name__, exc)
        return None


def memory_of(pid: int) -> int:
    """Return the resident bytes of a process and its descendants; 0 if they cannot be determined
    (there is neither /proc nor psutil)."""
    try:
        with open('/proc/%d/statm' % pid) as file:
            contents = file.read()
            content_part = contents.split()[1]
            own = int(content_part) * mmap.PAGESIZE
        with open('/proc/%d/task/%d/children' % (pid, pid)) as file:
            children = file.read().split()
            return own + sum(map(memory_of, map(int, children)))
    except OSError:   # it has ended, or there is no /proc
        if sys.platform == 'linux':
            return 0

    def sum_up(psutil: Any) -> int:
        process = psutil.Process(pid)
        rsses = []
        for one in [process, *process.children(recursive=True)]:
            rsses.append(one.memory_info().rss)
        return sum(rsses)
    return ask_psutil(sum_up) or 0   # the process may have ended


def start_of(pid: int, zombie: bool = True) -> str:
    """Return the start time of a process, in a unit that only serves to distinguish it from another
    process with the same PID. The result is '' if there is no such process or the time cannot be
    determined. With `zombie`, a process that has ended and was not reaped counts as well. See
    proc(5)."""
    try:
        with open('/proc/%d/stat' % pid, 'rb') as file:
            # The name before it may contain anything
            contents = file.read()
            state, *fields = contents.rpartition(b')')[2].split()
        if zombie or state not in b'ZX':
            return fields[18].decode()
        return ''
    except (OSError, IndexError, ValueError):
        if os.path.isdir('/proc/self'):
            return ''
    return ask_psutil(lambda psutil: _start_told(psutil.Process(pid), zombie)) or ''


def _start_told(process: Any, zombie: bool) -> str:
    if zombie or process.status() != 'zombie':
        return str(process.create_time())
    return ''


def is_child(pid: int, parent: int) -> bool:
    """Return whether a process is a child of another one; false if this cannot be determined."""
    return bool(ask_psutil(lambda psutil: psutil.Process(pid).ppid() == parent))


RUNNER_USER = '_DISPY_RUNNER_USER'    # the variable that tells a new process its `User`


def runner_start(handle: int) -> None:
    """Run a runner process, which `subprocess` has started; `handle` is the descriptor of its
    socket, -1 if the socket comes through stdin. Signal settings that were inherited are reset: a
    program may block or ignore signals."""
    user = os.environ.pop(RUNNER_USER, None)
    program = os.path.abspath(__file__)
    sys.argv[:] = [program]
    if _sigmask is not None:
        _sigmask(signal.SIG_SETMASK, ())
    if hasattr(signal, 'SIGCHLD'):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if handle >= 0:
        control = socket.socket(fileno=handle)
    else:
        shared = sys.stdin.buffer.read()
        control = socket.fromshare(shared)  # type: ignore[attr-defined]
    runner_main(control, User(*json.loads(user)) if user else None)


# -- addresses -------------------------------------------------------------------------------------

def plain_address(address: str) -> str:
    """Return an address as people write it; an IPv4 address mapped to IPv6 is returned as IPv4."""
    if address.startswith('::ffff:'):
        if '.' in address:
            return address[7:]
    return address


def address_in(where: Tuple[Any, ...]) -> str:
    """Return the address in a socket address, for people and for connecting. A link-local address
    (fe80::1) is meaningful with its interface only: fe80::1%eth0. Raises OSError while no
    descriptor is free."""
    address = plain_address(where[0])
    if len(where) == 4:
        if where[3] and '%' not in address:
            return '%s%%%s' % (address, socket.if_indextoname(where[3]))
    return address


def is_own_address(address: str) -> bool:
    """Return whether this machine has the address."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(address, 0, 0, socket.SOCK_DGRAM, 0,
                                                       socket.AI_NUMERICHOST)[0]
        with socket.socket(family, kind) as sock:
            sock.bind(where)   # sends nothing
    except OSError:
        return False
    return True


def format_address(host: str, port: int) -> str:
    """Return a host and a port as people write them, with IPv6 addresses in brackets."""
    return ('[%s]:%d' if ':' in host else '%s:%d') % (host or '*', port)


def nearest_address(addresses: Sequence[str], to: str) -> str:
    """Return the one of several addresses of a host that is to be told to the host `to`: of the
    same family, with the longest common prefix; the result is empty if there is none. An address of
    this machine is told to this machine only."""
    import ipaddress
    if not addresses:
        return ''
    try:
        if to:
            target: Any = ipaddress.ip_address(to.partition('%')[0])
        else:
            target = None
        known = [ipaddress.ip_address(address) for address in addresses]
    except ValueError:   # a source address of an unknown family; others were checked before
        return ''
    if target is None:
        return str(known[0])
    fit = [
        address for address in known
        if address.version == target.version and address.is_loopback <= target.is_loopback
    ]
    if fit:
        lowest_fit = min(fit, key=lambda address: int(address) ^ int(target))
        return str(lowest_fit)
    return ''


# -- channels and the loop -------------------------------------------------------------------------

_WOULD_BLOCK: Tuple[Type[OSError], ...] = (BlockingIOError, InterruptedError)
_PASSING_BLOCKED = frozenset((errno.EMSGSIZE, errno.ENOBUFS, errno.ETOOMANYREFS))
# On macOS the receiver may get a dead socket if it is closed here before it has arrived
LATE_PASSING = sys.platform == 'darwin'


def socket_pair() -> Tuple[socket.socket, socket.socket]:
    """Return two connected sockets. On Windows they are TCP sockets. Raises OSError."""
    pair = socket.socketpair()
    for sock in pair:
        set_option(sock, socket.IPPROTO_TCP, 'TCP_NODELAY', 1)
    return pair


def pack_socket(sock: socket.socket, pid: int, kind: RecordType, number: int = 0) -> Tuple[
        bytes, Optional[socket.socket]]:
    """Return the record with which a socket is passed to a process, and the socket if it is to be
    sent with it; on Windows the record contains the socket. `take_socket` is the counterpart.
    Raises OSError."""
    if hasattr(socket, 'SCM_RIGHTS'):
        return pack_record(kind, number)[0], sock  # type: ignore[return-value]
    shared = sock.share(pid)  # type: ignore[attr-defined]
    return pack_record(kind, number, first=shared)[0], None  # type: ignore[return-value]


def send_with(sock: socket.socket, buffers: Sequence[Buffer],
              passing: Union[socket.socket, MemorySegment]) -> int:
    """Send bytes, and a descriptor with the first of them. Raises OSError; BlockingIOError means
    that it is to be tried again: macOS has an error of its own for a receiver that is full, and
    Linux has one for too many sockets in flight."""
    handle = passing.fileno()
    handles = array.array('i', [handle])
    try:
        return sock.sendmsg(buffers, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, handles)])
    except OSError as exc:
        if exc.errno in _PASSING_BLOCKED:
            raise BlockingIOError(exc.errno, exc.strerror) from exc
        raise


def take_socket(record: Record, handles: Deque[int]) -> socket.socket:
    """Return the socket that came in a record, or as a descriptor with it. Raises OSError."""
    if not hasattr(socket, 'SCM_RIGHTS'):
        return socket.fromshare(bytes(record.bodies[0]))  # type: ignore[attr-defined]
    handle = handles.popleft()
    if handle < 0:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    out = _out_of_reach(handle)
    return socket.socket(fileno=out)


def set_option(sock: socket.socket, level: int, name: str, value: int) -> None:
    """Set a socket option that is not essential. Python may lack the constant, or the system may
    not support the option."""
    if hasattr(socket, name):
        with contextlib.suppress(OSError):   # it works without
            sock.setsockopt(level, getattr(socket, name), value)


def claim_port(sock: socket.socket) -> None:
    """Reserve the port of a listening socket for this process. On Windows another process could
    bind the same port and get the connections. See "Using SO_REUSEADDR and SO_EXCLUSIVEADDRUSE" in
    Microsoft's documentation."""
    set_option(sock, socket.SOL_SOCKET, 'SO_EXCLUSIVEADDRUSE', 1)


def set_tcp_options(sock: socket.socket) -> None:
    """Set the options of every TCP link: no delay of small frames, and keep-alive of 15/5/3 s if
    the system supports that."""
    set_option(sock, socket.IPPROTO_TCP, 'TCP_NODELAY', 1)
    set_option(sock, socket.SOL_SOCKET, 'SO_KEEPALIVE', 1)
    # TCP_KEEPALIVE is what macOS calls TCP_KEEPIDLE
    for name, value in (('TCP_KEEPIDLE', 15), ('TCP_KEEPALIVE', 15), ('TCP_KEEPINTVL', 5),
                        ('TCP_KEEPCNT', 3), ('TCP_USER_TIMEOUT', 30000)):
        set_option(sock, socket.IPPROTO_TCP, name, value)


# Size of packets if longer ones do not arrive: it fits the smallest MTU of IPv6
SEGMENT = 1200
_TCP_INFO = struct.Struct('8B24I')   # the beginning of struct tcp_info of Linux
_OUT_OF_ORDER = 224                  # where its rcv_ooopack is
_SMALL_MTU = ('. Either the network passes nothing in one direction, or it loses packets of '
              'full size: then a link on the way has a smaller MTU than this host, and the ICMP '
              'messages that say so are dropped. Lower the MTU of this host (ip link set DEVICE '
              'mtu 1280), or let ICMP through')
STALLS = {   # what `stall_of` returns -> the text for people
    'sent': 'packets that were sent there have not arrived, although short packets came from there '
            'until the end' + _SMALL_MTU,
    'received': 'packets from there have not arrived, although shorter ones did' + _SMALL_MTU,
}


def stall_of(sock: Any, silence: float, pulse: float) -> str:
    """Return whether the network loses packets of a connection on which nothing was received for
    `silence` s, although the route works: 'sent', 'received' or ''. Linux alone can tell; elsewhere
    the result is ''."""
    if not sys.platform.startswith('linux'):
        return ''
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:   # no TCP, or no socket any more
        return ''
    if len(info) < _OUT_OF_ORDER + 4:
        return ''
    fields = _TCP_INFO.unpack_from(info)
    retransmits = fields[2]
    unacknowledged = fields[8 + 4]
    field = fields[8 + 12]
    last_ack = field / 1000
    if unacknowledged and retransmits > 1:
        if silence < PULSES_SILENT * pulse:
            return 'sent'
    out_of_order, = struct.unpack_from('I', info, _OUT_OF_ORDER)
    if out_of_order and silence > PULSES_SILENT * pulse > last_ack:
        return 'received'
    return ''


class Channel:
    """A non-blocking socket, the bytes that wait to be sent on it, and the units that arrive. Loop
    thread only."""
    # Limit of system calls in one turn, so that a busy channel does not starve the others
    READS = 16

    def __init__(self, sock: socket.socket, intake: ReceiveBuffer) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.queued = 0      # bytes that wait
        self.bytes_out = self.bytes_in = 0   # since it was made
        self.heard = 0.0     # when bytes last came, monotonic
        self.paused = False  # not read from until there is room
        self.owner: Any = None   # the part of the loop that handles this channel
        self.is_attached = False      # to a loop
        self.to_write: Set['Channel'] = set()   # those of the loop that have something to write
        self.interest = 0
        self._intake = intake
        self.later: Any = ()   # units that are made when there is room for them
        self._may_fill = 0     # bytes of memory segments in this turn
        self._out: Deque[Tuple[memoryview, Any]] = collections.deque()
        self._gathers = hasattr(sock, 'sendmsg') and not hasattr(sock, 'do_handshake')
        self._again: Tuple[Type[OSError], ...] = _WOULD_BLOCK
        if hasattr(sock, 'do_handshake'):
            import ssl
            self._again = _WOULD_BLOCK + (ssl.SSLWantReadError, ssl.SSLWantWriteError)

    def push(self, buffers: Iterable[Buffer],
             passing: Union[socket.socket, MemorySegment, None] = None) -> None:
        """Queue these buffers after what waits already; with the first of them a descriptor is
        sent, which is closed here after that."""
        for buffer in buffers:
            view = memoryview(buffer)
            if type(buffer) is not bytes:
                view = view.cast('B')
            self._out.append((view, passing))
            self.queued += len(view)
            passing = None
        if self.is_attached:
            self.to_write.add(self)

    def write(self) -> None:
        """Send as much as the socket accepts now, up to WRITE_MOST bytes. Raises OSError if the
        connection is broken."""
        enough = self.queued - WRITE_MOST
        self._may_fill = WRITE_MOST
        while self._out and self.queued > enough:
            try:
                if self._out[0][1] is None:
                    sent = self._send_some()
                else:
                    sent = self._pass_on()
            except self._again:
                return
            self.queued -= sent
            self.bytes_out += sent
            while sent:
                view, _ = self._out[0]
                if sent < len(view):
                    self._out[0] = (view[sent:], None)
                    break
                sent -= len(view)
                self._out.popleft()

    def drain(self, seconds: float) -> None:
        """Send what was queued, waiting at most this many seconds for room. Raises OSError."""
        now = time.monotonic()
        until = now + seconds
        self.write()
        if not self._out:
            return
        if seconds <= 0:
            return
        with selectors.DefaultSelector() as selector:
            selector.register(self.sock, selectors.EVENT_WRITE)
            while self._out and selector.select(until - time.monotonic()):
                self.write()
                if time.monotonic() > until:
                    return

    def _pass_on(self) -> int:
        """Send the first buffer with its descriptor; if it belongs to a tag, it is hashed."""
        view, passing = self._out[0]
        if type(passing) is PayloadTag:
            passing.reached(view)
            self._out[0] = (view, None)
            return self._send_some()
        sent = send_with(self.sock, [view], passing)
        passing.close()
        self._out[0] = (view, None)
        return sent

    def _send_some(self) -> int:
        view, _ = self._out[0]
        if not self._gathers or len(self._out) == 1 or len(view) > 1 << 18:
            return self.sock.send(view[:1 << 20])
        plain = itertools.takewhile(lambda item: item[1] is None, itertools.islice(self._out, 64))
        views = [view for view, _ in plain]
        return self.sock.sendmsg(views)

    def receive(self, room: memoryview) -> int:
        """Do as a socket's recv_into does."""
        return self.sock.recv_into(room)

    def read(self, now: float) -> List[Any]:
        """Receive what has arrived, and return the complete units of it. Raises LinkBroken at the
        end of the stream."""
        units: List[Any] = []
        for _ in range(self.READS):
            room = self._intake.get_buffer()
            try:
                count = self.receive(room)
            except self._again:
                break
            if count == 0:
                if units:
                    break    # the data is handled first; the end will be read again
                raise LinkBroken('the connection was closed')
            self.heard = now
            self.bytes_in += count
            units.extend(self._intake.buffer_updated(count))
            if count >= len(room):
                continue
            if self._gathers:
                break
        return units

    @property
    def wants_write(self) -> bool:
        """Return whether anything waits to be sent."""
        return bool(self._out or self.later)

    def go_on(self) -> None:
        """Make more units from `later`, and send them."""
        raise NotImplementedError

    def breaks(self, now: float) -> None:
        """Prepare for the end of the channel, which has broken and is about to be closed."""

    def close(self) -> None:
        """Close the socket and the descriptors that were to be passed."""
        for _, passing in self._out:
            if passing is not None:
                passing.close()
        self._out.clear()
        self.sock.close()


def unfit_text(size: int, text: str) -> str:
    """Return the error text for arguments for which there is no memory."""
    return 'arguments of %d bytes cannot be taken: %s: send a file (depends)' % (size, text)


def limit_text(where: str) -> str:
    """Return the error text for a value that exceeds the limit of this process."""
    return 'the limit for one value is %d (%s, --max-value)' % (VALUE_MOST, where)


def over_limit_here(message: Jobs, where: str) -> Optional[Unfit]:
    """Return the replacement for a message with one job, which came in one frame, if its arguments
    exceed the limit all the same: this happens if the limit is lower than the default. Larger
    arguments come in a message of their own."""
    payload = message.rows[0][1]
    size = size_of(payload)
    if size > VALUE_MOST:
        text = unfit_text(size, limit_text(where))
        return Unfit(message.comp, message.rows[0], text)
    return None


def unfit_row(message: Unfit) -> tuple:
    """Return the row of Results of a job for whose arguments there is no memory."""
    return (message.row[0], int(Outcome.RAISED), 0.0, 0.0, pack_error(message.text, None), b'', b'')


class IncomingValue:
    """A row of Jobs or Results that comes in parts. `place` receives its payload; without one, the
    payload is skipped."""
    __slots__ = ('kind', 'row', 'total', 'seen', 'place')

    def __init__(self, row: tuple, total: int) -> None:
        self.kind = Jobs if len(row) == 3 else Results   # type: Any
        self.row = row
        self.total = total
        self.seen = 0
        self.place: Any = None

    @property
    def copies(self) -> int:
        """How many copies of the payload are in memory until it can be used."""
        if self.kind is Jobs:
            return ARGUMENTS_COPIED
        return RESULTS_COPIED

    def message(self, comp: str) -> Any:
        """Return the message that has come, when it is complete. Raises PeerError."""
        if self.kind is Jobs:
            at = 1
        else:
            at = 4
        message = self.kind(comp, [(*self.row[:at], self.place.whole(), *self.row[at + 1:])])
        if not CHECKS[self.kind](message):
            text = '%s with wrong values' % self.kind.__name__
            raise PeerError(text)
        return message


class InMemory:
    """Memory for a value, which is allocated as the value comes."""

    def __init__(self, size: int) -> None:
        """`size` is the number of bytes to reserve. Raises MemoryError."""
        self._view = mapped(size)

    def add(self, offset: int, data: Buffer) -> None:
        """Append these bytes. Raises OSError if there is no room for them."""
        self._view[offset:offset + len(data)] = data

    def whole(self) -> memoryview:
        """Return all that has come."""
        return self._view

    def drop(self) -> None:
        """Free the memory, because the value is not wanted any more."""


class Values:
    """The values that come in parts on the links of a loop, one value at a time of each
    computation. A value for which there is no room is refused when it begins, with a text for its
    job, and its parts are skipped. The loop's thread uses this class."""

    def __init__(self, where: str, log: logging.Logger) -> None:
        """`where` is the text that tells people whose memory it is."""
        self.where = where
        self._log = log
        # (link, computation) -> the value that comes
        self._coming: Dict[Tuple[int, str], IncomingValue] = {}

    def take(self, link: int, part: Part, takes: Container[int]) -> Any:
        """Take a part. Returns the message that is complete with this part, or the replacement for
        one for which there is no room, or None. Raises PeerError."""
        key = (link, part.comp)
        buffers = pieces_of(part.data)
        refused = None
        if not part.offset:
            self.drop(link, part.comp)
            if not part.total:
                return None
            value = self._coming[key] = IncomingValue(part.row, part.total)
            if OPS[value.kind] not in takes:
                raise PeerError('%s may not come here' % value.kind.__name__)
            refused = self._begin(part.comp, value)
        else:
            value = self._coming.get(key)  # type: ignore[assignment]
        size = sum(map(len, buffers))
        if value is None or (part.offset, part.total) != (value.seen, value.total) \
                or not 0 < size <= part.total - part.offset:
            raise PeerError('a part at %d of %d bytes does not follow what came before'
                            % (part.offset, part.total))
        for data in buffers:
            if value.place is not None:
                try:
                    value.place.add(value.seen, data)
                except OSError as exc:
                    text = '%s (%s)' % (exc, self.where)
                    refused = self._refuse(part.comp, value, text)
            value.seen += len(data)
        if value.seen < value.total:
            return refused
        del self._coming[key]
        if value.place is not None:
            return value.message(part.comp)
        return refused

    def _begin(self, comp: str, value: IncomingValue) -> Any:
        if value.total > VALUE_MOST:
            return self._refuse(comp, value, limit_text(self.where))
        try:
            value.place = self.find_place(value)
        except (OSError, MemoryError) as exc:
            text = '%s (%s)' % (exc, self.where)
            return self._refuse(comp, value, text)
        return None

    def find_place(self, value: IncomingValue) -> Any:
        """Return the place that will receive a value. Raises MemoryError or OSError if there is no
        room."""
        free = free_memory()
        needed = value.copies * value.total + LAZY
        if free is not None:
            coming = self._coming.values()
            free -= sum(other.copies * other.total - other.seen for other in coming
                        if other.place is not None)
            if needed > free:
                text = '%d bytes of memory are free, and %d are needed' % (max(0, free), needed)
                raise MemoryError(text)
        return InMemory(value.total)

    def _refuse(self, comp: str, value: IncomingValue, text: str) -> Any:
        """Return the replacement for a value for which there is no room. The rest of the value is
        skipped."""
        if value.place is not None:
            value.place.drop()
            value.place = None
        row = value.row
        if value.kind is Jobs:
            return Unfit(comp, row, unfit_text(value.total, text))
        text = 'a result of %d bytes cannot be taken: %s: return less of it, or send a file ' \
            '(dispy_send_file)' % (value.total, text)
        if row[OUTCOME] in PROVISIONAL:
            self._log.error('provisional: %s', text)
            return None
        refused = (row[SERIAL], int(Outcome.RAISED), *row[START:PAYLOAD], pack_error(text, None),
                   *row[STDOUT:])
        return Results(comp, [refused])

    def drop(self, link: int, comp: Optional[str] = None) -> None:
        """Discard what has come of a computation, because it is not wanted any more; with None,
        discard everything, because the link has ended."""
        for key in [key for key in self._coming if key[0] == link and comp in (None, key[1])]:
            value = self._coming.pop(key)
            if value.place is not None:
                value.place.drop()


class Link(Channel):
    """An authenticated connection that carries messages."""
    AT_ONCE = 16     # parts that are made in one turn
    numbers = itertools.count(1)

    def __init__(self,
                 sock: socket.socket,
                 session: Session,
                 address: str,
                 now: float,
                 pulse: float = PULSE,
                 takes: Iterable[int] = MESSAGES) -> None:
        self._opener = FrameDecoder(session.receive_key, takes, session.tags_payloads)
        super().__init__(sock, self._opener)
        self._sealer = FrameEncoder(session.send_key, session.tags_payloads, session.version)
        self.number = next(Link.numbers)
        self.instance = session.peer_instance
        self.role = session.peer_role
        self.address = address
        self.pulse = pulse
        self.heard = self.said = now
        self.on_purpose = False
        self.stall = ''        # when it has broken: see stall_of
        self._takes = takes
        self.values: Optional[Values] = None   # the loop's, while attached
        # Computation -> messages that are sent in parts, and those that must stay behind them
        self.later: Dict[str, Deque[Union[InParts, Results, Refused]]] = {}
        self.unmade = 0    # bytes of `queued` from which parts will be made

    def send(self, message: Any) -> None:
        """Queue a message. A message that is too large for a frame is sent in parts, and others
        overtake it: all but those that report more about the same job, or that say that nothing
        more follows for the computation. Raises ValueError for a message that is too large for
        that, before anything of it is queued."""
        if self.later and type(message) in (Results, Refused, Done):
            if self._stays_behind(message):
                return
        try:
            buffers, tag = self._sealer.begin(message)
        except TooLarge as exc:
            self._in_parts(message, exc)
            return
        if tag is None:
            self.push(buffers)
        else:
            self._push_late(buffers, tag)

    def _push_late(self, buffers: List[Buffer], tag: PayloadTag) -> None:
        head, *payload = buffers
        self.push([head])
        for item in tag.follows(payload):
            self._out.append(item)
            self.queued += len(item[0])

    def _push_frame(self, message: Any) -> None:
        buffers, tag = self._sealer.begin(message)
        if tag is None:
            self.push(buffers)
        else:
            self._push_late(buffers, tag)

    def _stays_behind(self, message: Any) -> bool:
        if type(message) is Done:
            self.abandon(message.comp)
            return False
        waiting = self.later.get(message.comp)
        if not waiting:
            return False
        if type(message) is Results:
            serials = {row[0] for row in message.rows}
            rows = []
            for each in waiting:
                if not isinstance(each, Refused):
                    for row in [each.row] if isinstance(each, InParts) else each.rows:
                        rows.append(row)
            if not any(row[0] in serials for row in rows):
                return False
        waiting.append(message)
        return True

    def goes_in_parts(self, message: Any) -> bool:
        """Return whether this message, of one row, was the last that was sent and is sent in
        parts."""
        if message.comp in self.later:
            last = self.later[message.comp][-1]
        else:
            last = None
        if not isinstance(last, InParts):
            return False
        return last.message is message

    def _in_parts(self, message: Any, exc: TooLarge) -> None:
        """Return the message in parts. Raises `exc` for a message that cannot be sent in parts."""
        if type(message) not in (Jobs, Results) or len(message.rows) != 1:
            raise exc
        whole = InParts(message)
        if whole.total > VALUE_MOST:
            text = '%s with a value of %d bytes is over the limit of %d' % (type(message).__name__,
                                                                            whole.total, VALUE_MOST)
            raise TooLarge(text)
        self.later.setdefault(message.comp, collections.deque()).append(whole)
        self._count(whole.total)
        if self.is_attached:
            self.to_write.add(self)

    def _count(self, size: int) -> None:
        self.queued += size
        self.unmade += size

    def go_on(self) -> None:
        """Make parts as long as the socket accepts them."""
        for _ in range(self.AT_ONCE):
            for comp in list(self.later) if not self._out else ():
                self._part(comp)
            if self._out:
                self.write()

    def _part(self, comp: str) -> None:
        """Return the next part for a computation, or what follows the last part."""
        waiting = self.later[comp]
        first = waiting[0]
        if isinstance(first, InParts):
            left = first.left
            part = first.next()
            if part is not None:
                self._push_frame(part)
                size = first.left - left
                self._count(size)
                return
        else:
            try:
                self._push_frame(first)
            except TooLarge as exc:
                self._in_parts(first, exc)   # at the end, from where it is moved to its place
                waiting.rotate(1)
                del waiting[1]
                return
        waiting.popleft()
        if not waiting:
            del self.later[comp]

    def abandon(self, comp: str, serials: Optional[Iterable[int]] = None) -> List[int]:
        """Do not send what is queued in parts for these serials and has not been sent; None means
        everything that waits for a computation. Returns the serials of what is not sent."""
        waiting = self.later.get(comp, ())
        if serials is None:
            wanted = None
        else:
            wanted = set(serials)
        unwanted = [each for each in waiting if isinstance(each, InParts)
                    and (wanted is None or each.row[0] in wanted)]
        for each in unwanted:
            if each.left < each.total:
                part = Part(comp, (), 0, 0, b'')
                self._push_frame(part)
            self._count(-each.left)
        kept = collections.deque(each for each in waiting if each not in unwanted)
        if kept and serials is not None:
            self.later[comp] = kept
        else:
            self.later.pop(comp, None)
        return [each.row[0] for each in unwanted]

    @property
    def owes(self) -> bool:
        """Return whether results are being sent in parts: a Bye would say that their jobs had never
        begun."""
        for waiting in self.later.values():
            for each in waiting:
                if not isinstance(each, InParts):
                    continue
                if len(each.row) == 7:
                    return True
        return False

    def own_address(self) -> str:
        """Return the address of this end."""
        address = self.sock.getsockname()[0]
        return plain_address(address)

    def breaks(self, now: float) -> None:
        silence = now - self.heard
        self.stall = stall_of(self.sock, silence, self.pulse)

    def close(self) -> None:
        """Close the link as a channel, and discard values that have come in part."""
        super().close()
        self.later.clear()
        if self.values is not None:
            self.values.drop(self.number)

    @property
    def opened(self) -> int:
        """The number of frames that have been opened, or the number of the one that could not be
        used."""
        return self._opener.opened

    @property
    def sent(self) -> int:
        """Return how many frames were sent."""
        return self._sealer.sealed

    def messages(self, now: float) -> List[Any]:
        """Return the messages that have come. Raises PeerError or LinkBroken; the link is unusable
        then."""
        messages = []
        contents = self.read(now)
        for head, body in contents:
            message = self._opener.open(head, body)
            if type(message) is Part and self.values is not None:
                takes: Any = self._takes
                message = self.values.take(self.number, message, takes)
                if message is None:
                    continue
            messages.append(message)
        return messages


def _payload_as_received(payload: Any) -> Any:
    """Return a payload in the form that it has after it was received, from the form that an
    envelope carries."""
    if type(payload) is bytes:
        return payload
    if type(payload) is tuple:
        return tuple(map(_payload_as_received, payload))
    if type(payload) is pickle.PickleBuffer:
        return payload.raw()
    return payload


def _jobs_as_received(message: Jobs) -> Tuple[Any, int]:
    rows = message.rows
    size = 0
    for place, row in enumerate(rows):
        payload = row[1]
        if type(payload) is bytes:   # nearly always
            size += len(payload)
            continue
        if rows is message.rows:   # which is the sender's
            rows = list(rows)
        payload = _payload_as_received(payload)
        rows[place] = (row[0], payload, *row[2:])
        size += size_of(payload)
    if rows is not message.rows:
        message = Jobs(message.comp, rows)
    return message, size


def _results_as_received(message: Results) -> Tuple[Any, int]:
    rows = message.rows
    size = 0
    for place, row in enumerate(rows):
        if type(row[PAYLOAD]) is type(row[STDOUT]) is type(row[STDERR]) is bytes:
            size += len(row[PAYLOAD])
            continue
        if rows is message.rows:   # as above
            rows = list(rows)
        payloads = tuple(map(_payload_as_received, row[PAYLOAD:]))
        rows[place] = (*row[:PAYLOAD], *payloads)
        size += sum(map(size_of, payloads))
    if rows is not message.rows:
        message = Results(message.comp, rows)
    return message, size


def _compute_as_received(message: Compute) -> Tuple[Any, int]:
    code = _payload_as_received(message.spec['code'])
    setup_args = _payload_as_received(message.spec['setup_args'])
    spec = dict(message.spec, code=code, setup_args=setup_args)
    size = sum(map(size_of, (spec['code'], spec['setup_args'], *spec['support'].values())))
    compute = Compute(message.comp, spec)
    return compute, size


def _data_as_received(message: Any) -> Tuple[Any, int]:
    data = _payload_as_received(message.data)
    return message._replace(data=data), size_of(data)


class MemoryLink(Link):
    """One end of a link whose other end is in the same loop: messages are passed as objects, and
    payloads as the same buffers. Nothing is encoded or authenticated.

    A message waits until the other side takes it, so that it is never handled in its sender's turn,
    and neither side changes it from then on. A message that is too large for any link is refused
    here, too. There are no heartbeats: neither side can be away.
    """
    # Message -> function that returns it in the form that a socket would deliver, and its size
    _MADE: Dict[type, Callable[[Any], Tuple[Any, int]]] = {
        Jobs: _jobs_as_received,
        Results: _results_as_received,
        Compute: _compute_as_received,
        FilePiece: _data_as_received,
        Output: _data_as_received,
    }
    SMALL_SIZE = 64    # bytes counted for a message whose size is not examined

    def __init__(self, instance: bytes, role: int, now: float) -> None:
        """The parameters describe the other side. There is no socket, so that nothing of `Link` is
        set up."""
        self.sock: Any = None
        self.number = next(Link.numbers)
        self.instance = instance
        self.role = Role(role)
        self.address = '127.0.0.1'
        self.pulse = math.inf
        self.heard = self.said = now
        self.queued = 0
        self.unmade = 0
        self.bytes_out = 0
        self.bytes_in = 0
        self.interest = 0
        self.paused = self.on_purpose = False
        self.stall = ''
        self.owner = None
        self.is_attached = False
        self.values = None
        self.later = {}
        self.other: 'MemoryLink' = self
        self.incoming: Deque[Any] = collections.deque()
        self._taken = self._handed = 0
        self.is_over = False      # the other end was closed

    @classmethod
    def pair(cls, node: bytes, client: bytes, now: float) -> Tuple['MemoryLink', 'MemoryLink']:
        """Return the node's end and the client's end; `node` and `client` are their instances."""
        of_node = cls(client, Role.CLIENT, now)
        of_client = cls(node, Role.NODE, now)
        of_node.other = of_client
        of_client.other = of_node
        return of_node, of_client

    def send(self, message: Any) -> None:
        """Pass a message to the other end. Raises TooLarge."""
        made = self._MADE.get(type(message))
        if made is None:
            size = self.SMALL_SIZE
        else:
            message, size = made(message)
            if size > OUT_OF_BAND or size > VALUE_MOST:
                self._check_size(message, size)
        self.other.incoming.append(message)
        self.queued += size
        self.bytes_out += size
        self._handed += 1

    @staticmethod
    def _check_size(message: Any, size: int) -> None:
        """Raise TooLarge for a message of so many bytes that no link would carry it."""
        kind = type(message)
        if kind in (Jobs, Results) and len(message.rows) == 1:
            most = VALUE_MOST
        else:
            most = MESSAGES[OPS[kind]][1]
        if size > most:
            text = '%s of %d bytes is over the limit of %d' % (kind.__name__, size, most)
            raise TooLarge(text)

    @property
    def has_messages(self) -> bool:
        """Return whether a message or the end of the link is to be handled."""
        if not self.incoming and not self.is_over:
            return False
        return self.is_attached and not self.paused

    def messages(self, now: float) -> List[Any]:
        if not self.incoming and self.is_over:
            raise LinkBroken('the connection was closed')
        size = self.other.queued   # the size of everything that was sent and not taken
        self.other.queued = 0
        self.bytes_in += size
        self.heard = now
        taken = list(self.incoming)
        self.incoming.clear()
        self._taken += len(taken)
        return taken

    @property
    def opened(self) -> int:
        return self._taken

    @property
    def sent(self) -> int:
        return self._handed

    @property
    def wants_write(self) -> bool:
        return False

    def own_address(self) -> str:
        return self.address

    def goes_in_parts(self, message: Any) -> bool:
        return False

    def write(self) -> None:
        """Do nothing: the other end already has what was sent."""

    def drain(self, seconds: float) -> None:
        """Do nothing: the other end already has what was sent."""

    def breaks(self, now: float) -> None:
        """Do nothing: there is no network that could have failed."""

    def close(self) -> None:
        """Close this end. The other end takes the messages that were sent to it, and then the end
        of the link."""
        self.incoming.clear()
        self.other.is_over = True


_CREDENTIALS = struct.Struct('3i')   # pid, uid, gid


class Pipe(Channel):
    """A channel to a process on this host that carries records."""

    def __init__(self, sock: socket.socket, comp: str, worker: int = 0) -> None:
        if worker:
            limits = FROM_WORKER
        else:
            limits = FROM_RUNNER
        self._records = RecordBuffer(limits)
        super().__init__(sock, self._records)
        self.record_of = self._records.record_of
        self.comp = comp
        self.worker = worker
        self.pid = 0     # of the process that wrote first, according to the kernel
        self._asks = bool(worker) and hasattr(socket, 'SCM_CREDENTIALS')
        if self._asks:   # for a socketpair, SO_PEERCRED names the process that made it
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def push_value(self, head: bytes, payload: Payload) -> None:
        """Queue a record whose only body goes in a memory segment, after what waits already."""
        segment = MemorySegment(payload)
        self.push([head], segment)

    def _pass_on(self) -> int:
        head, segment = self._out[0]
        if type(segment) is not MemorySegment:
            return super()._pass_on()
        if not segment.is_begun and not is_read(self.sock):
            self._without_segment(head, segment)
            return self._send_some()
        try:
            if not segment.is_whole:
                self._may_fill -= segment.fill(self._may_fill)
            if segment.is_whole:
                return super()._pass_on()
        except _WOULD_BLOCK:
            raise
        except OSError as exc:   # no room or no descriptor
            logger.debug('a value goes through the pipe: %s', exc)
            self._without_segment(head, segment)
            return self._send_some()
        raise BlockingIOError   # the rest is filled in the next turn

    def _without_segment(self, head: memoryview, segment: MemorySegment) -> None:
        """Queue a record with its body in the record itself."""
        segment.close()
        self._out.popleft()
        whole_head = bytearray(head)
        whole_head[_IN_SEGMENT] = 0
        views = [memoryview(whole_head)]
        for piece in pieces_of(segment.payload):
            view = memoryview(piece)
            views.append(view.cast('B'))
            self.queued += view.nbytes
        for view in reversed(views):
            self._out.appendleft((view, None))

    def receive(self, room: memoryview) -> int:
        if not self._asks:
            if not self.worker or not HAS_SEGMENTS:
                return super().receive(room)
            count, ancillary, flags, _ = self.sock.recvmsg_into([room], SegmentIntake.ROOM)
            if ancillary or flags & _MSG_CTRUNC:
                self._records.segments.came(ancillary, flags)
            return count
        size = SegmentIntake.ROOM + socket.CMSG_SPACE(_CREDENTIALS.size)
        count, ancillary, flags, _ = self.sock.recvmsg_into([room], size)
        if HAS_SEGMENTS:
            self._records.segments.came(ancillary, flags)
        for level, kind, body in ancillary:
            if level != socket.SOL_SOCKET:
                continue
            if kind != socket.SCM_CREDENTIALS:
                continue
            if len(body) < _CREDENTIALS.size:
                continue
            self.pid = _CREDENTIALS.unpack(body[:_CREDENTIALS.size])[0]
            self._asks = False
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        return count

    @property
    def is_large(self) -> bool:
        """Return whether the record that arrives now is large."""
        return self._records.coming > LAZY

    def records(self, now: float) -> List[Record]:
        """Return the records that have come. Raises LinkBroken."""
        return [self.record_of(head, body) for head, body in self.read(now)]

    def close(self) -> None:
        super().close()
        self._records.segments.close()


class Faults:
    """Counts the faults of a loop that nothing which the loop serves has caused."""
    # Faults, s
    MOST = 50
    WITHIN = 1.0

    def __init__(self) -> None:
        self._times: Deque[float] = collections.deque(maxlen=self.MOST)

    def are_many(self, now: float) -> bool:
        """Count one more fault. Returns whether MOST of them occurred within the last WITHIN
        seconds."""
        self._times.append(now)
        if len(self._times) != self.MOST:
            return False
        return now - self._times[0] < self.WITHIN


# Number of unusable frames with a job or result after which it is ended
REFUSED_MOST = 3
FRAMES_NOTED = 64             # frames of jobs or results that were last sent on a link
NOTED = 1 << 20               # bytes of a frame of results from which its contents are noted


class Refusals:
    """Remembers the frames of jobs or results that went into links, so that it is known what was in
    a frame that the other side could not use. After REFUSED_MOST such frames a job is ended, or its
    result is reported as lost: the frame would not arrive the next time either."""

    def __init__(self) -> None:
        # link -> (numbers of the first and the last frame, computation, serials), the last of them
        self._sent: Dict[int, Deque[Tuple[int, int, str, List[int]]]] = {}
        # (computation, job number) -> frames
        self._counts: Dict[Tuple[str, int], int] = collections.Counter()

    def sent(self, link: Link, frame: Any) -> None:
        """Note that a frame of jobs or results was sent."""
        frames_of = self._sent.setdefault(link.number, collections.deque(maxlen=FRAMES_NOTED))
        first = last = link.sent - 1
        if link.later and link.goes_in_parts(frame):   # later, between other frames
            first = link.sent
            last = link.sent + 2 * (link.queued // FILE_PIECE) + FRAMES_NOTED
        frames_of.append((first, last, frame.comp, [row[0] for row in frame.rows]))

    def refused(self, link: Link, number: int) -> List[Tuple[str, int]]:
        """Note that the other side cannot use this frame. Returns the pairs (computation, serial)
        that are to be ended because of it."""
        over = []
        for first, last, comp, serials in self._sent.get(link.number, ()):
            for serial in serials if first <= number <= last else ():
                self._counts[comp, job_number(serial)] += 1
                if self._counts[comp, job_number(serial)] >= REFUSED_MOST:
                    del self._counts[comp, job_number(serial)]
                    over.append((comp, serial))
        return over

    def forget(self, link: Link) -> None:
        """Note that a link has ended."""
        self._sent.pop(link.number, None)


class Pace:
    """When a loop has waited for something to do, and whether it pauses before it waits again.

    woke_at - when the present turn had something to do
    busy_since - since when turn has followed turn, or this process has stood still: what has come
        in the meantime may not have been looked at
    may_pause - the next turn can come later, because nobody waits for it; set during a turn
    """
    # Seconds. Windows wakes a process only after up to 16 ms.
    PAUSE = 0.0 if IS_WINDOWS else 0.0003

    def __init__(self, now: float) -> None:
        self.woke_at = 0.0
        self.busy_since = now
        self.may_pause = False
        self._waited = 0.0     # s, before the present turn

    def woke(self, before: float, now: float, longest: Optional[float]) -> None:
        """Note that the loop has waited since `before`; it was to wait `longest` seconds at most.
        """
        self.woke_at = now
        waited = self._waited = now - before
        if waited > CAUGHT_UP:
            if longest is None or waited < longest + OVERSLEPT:
                self.busy_since = now

    def pause(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Pause, unless the loop has waited as long before this turn. A turn takes as much CPU time
        as ten short jobs, so that fewer turns, each with more results, leave more to the jobs.
        While other threads compute, this one waits for the interpreter lock after each wait, and
        would do so after a pause as well; the wait was long in that case, and there is no pause."""
        self.may_pause = False
        if self._waited < self.PAUSE:
            sleep(self.PAUSE)


class Loop:
    """One thread, a selector, and everything that this thread owns. Other threads only call `post`.
    A subclass defines what happens: `on_event`, `on_channel`, `on_broken`, `end_of_turn`,
    `next_timer`. `turn()` does one round, `run()` repeats it until `stop()`.

    An unexpected exception ends what it concerns, which the subclass determines in `on_fault`, and
    the loop goes on. If the loop fails many times within a second and nothing is found that could
    be ended, the loop itself is at fault: `run` raises LoopFailed.
    """
    log = logger
    PARTING = 0.0    # s that a link which is ended on purpose waits for room

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.now = clock()
        self.links: Dict[int, Link] = {}
        self._selector = selectors.DefaultSelector()
        self._inbox: Deque[Any] = collections.deque()
        self._to_write: Set[Channel] = set()
        # What is to be done at the end of this turn
        self._later_broken: Deque[Tuple[Channel, str]] = collections.deque()
        self._signalled = False
        self.pace = Pace(clock())
        self._waits = True         # or is about to wait: a thread that posts must wake it
        self._wakes_on_signals = False
        self.has_ended = False
        self._faults = Faults()
        self.values = Values('here', self.log)   # the values that come in parts
        self._again = False        # a turn failed, so that its work may not be complete
        self._failed = ''          # why this loop cannot go on
        self.refusals = Refusals()
        # How each action of the state is carried out
        self._acts: Dict[type, Callable[[Any], None]] = {}
        self._pulse_at = 0.0
        self._waker, self._wakened = socket.socketpair()
        for sock in (self._waker, self._wakened):
            sock.setblocking(False)
        self._selector.register(self._wakened, selectors.EVENT_READ, self._drain_wakeups)

    # -- to be said by the subclass ----------------------------------------------------------------

    def on_event(self, event: Any) -> None:
        """Handle something that was posted."""
        raise NotImplementedError

    def on_channel(self, channel: Any) -> None:
        """Handle a channel that can be read. May raise LinkBroken, PeerError or OSError, which are
        passed to `on_broken`."""
        raise NotImplementedError

    def on_broken(self, channel: Any, text: str) -> None:
        """Handle the end of a channel; it is detached and closed already."""
        raise NotImplementedError

    def on_silent(self, link: 'Link') -> None:
        """Handle a link on which nothing was received for PULSES_SILENT heartbeat intervals. This
        is called again and again as long as the silence lasts."""

    def second_failed(self, second: 'SecondConnection', link: Optional['Link']) -> None:
        """Note that another connection beside this link could not be made. If the link is still
        silent, the next attempt begins."""
        if not second.ended(self.now):
            return
        if link is None:
            return
        if self.is_silent(link):
            self.on_silent(link)

    def end_of_turn(self) -> None:
        """Decide and send, after everything that was read and posted."""

    def next_timer(self) -> Optional[float]:
        """Return the monotonic time when something is to be done at the latest."""
        return None

    def on_fault(self, subject: Any, text: str) -> bool:
        """End what an unexpected exception concerns that was raised while `subject`, a channel, an
        event or an action, was handled. Returns whether anything was found."""
        if isinstance(subject, Channel):
            self._break(subject, text)
            return True
        sock = getattr(subject, 'sock', None)
        if sock is not None:   # of a connection that was just made
            sock.close()
        return sock is not None

    # -- any thread --------------------------------------------------------------------------------

    def post(self, event: Any) -> None:
        """Hand an event to the loop's thread. Any thread, also from a signal handler."""
        self._inbox.append(event)
        self.wake_up()

    def wake_up(self) -> None:
        """End the wait of a turn, after something was put where the loop looks before it waits. A
        loop that does not wait looks there anyway. Any thread."""
        if not self._waits:
            return
        if self._signalled:
            return
        self._signalled = True
        try:
            self._waker.send(b'\0')
        except (BlockingIOError, OSError):
            # If it is full, the loop wakes anyway; if it is closed, nobody waits
            self._signalled = not self.has_ended
            if self.has_ended:
                self._close_late()

    def _close_late(self) -> None:
        """Close the connections that were posted and that nobody handles any more. Any thread."""
        for event in list(self._inbox):
            if hasattr(event, 'sock'):
                event.sock.close()

    # -- the loop's thread -------------------------------------------------------------------------

    def wake_on_signals(self) -> None:
        """Let every signal end the wait of a turn, so that its handler runs at once. Without this,
        a signal that comes just before the wait begins is not handled until something else ends the
        wait; on Windows no signal ends it. This is for a process whose main thread runs this
        loop."""
        handle = self._waker.fileno()
        signal.set_wakeup_fd(handle, warn_on_full_buffer=False)
        self._wakes_on_signals = True

    def attach(self, channel: Channel) -> None:
        """Own a channel from now on."""
        channel.is_attached = True
        channel.to_write = self._to_write
        if channel.sock is not None:
            channel.interest = selectors.EVENT_READ
            self._selector.register(channel.sock, channel.interest, channel)
        if isinstance(channel, Link) and channel.owner is None:
            self.links[channel.number] = channel
            channel.values = self.values
            self.set_pulse(channel, channel.pulse)
            self._bound(channel)
        if channel.wants_write:
            self._to_write.add(channel)

    def _bound(self, link: 'Link') -> None:
        """End a link if there are too many: if only select() can wait for sockets, as on Windows,
        it accepts at most 512, and the loop would fail. Both sides are told the reason."""
        if not isinstance(self._selector, selectors.SelectSelector):
            return
        if len(self._selector.get_map()) <= SELECT_MOST:
            return
        text = 'there are more than %d connections, which this system cannot wait for' \
            % SELECT_MOST
        message = Bye(text)
        self.send(link, message)
        self._later_broken.append((link, text))

    def set_pulse(self, link: 'Link', pulse: float) -> None:
        """Set the heartbeat interval: the other side gives a link up when it hears nothing for
        several intervals."""
        link.pulse = pulse
        if self._pulse_at:
            self._pulse_at = min(self._pulse_at, self.now + pulse / 2)
        else:
            self._pulse_at = 0.0

    def detach(self, channel: Channel) -> None:
        """Release a channel and close it. Does nothing the second time."""
        if channel.is_attached:
            channel.is_attached = False
            if channel.interest:
                self._selector.unregister(channel.sock)
            self._to_write.discard(channel)
            channel.close()
            if isinstance(channel, Link):
                self.links.pop(channel.number, None)
                self.refusals.forget(channel)

    def add_reader(self, sock: Any, call: Callable[[], None]) -> None:
        """Call a function when a listening socket can be read."""
        self._selector.register(sock, selectors.EVENT_READ, call)

    def remove_reader(self, sock: Any) -> None:
        """Stop watching a socket."""
        self._selector.unregister(sock)

    def send(self, link: Link, message: Any) -> None:
        """Send a message on a link, if the link still exists. This never raises: a message that
        cannot be sent breaks its link, and messages that may become too large are split where they
        are created."""
        if link.is_attached:
            link.said = self.now
            before = link.queued
            try:
                link.send(message)
                if link.queued - before >= NOTED:
                    if type(message) is Results:
                        self.refusals.sent(link, message)
            except Exception as exc:  # it is too large, or contains what cannot be packed
                self.log.error('%s for %s cannot be sent: %s',
                               type(message).__name__, link.address, exc)
                text = '%s cannot be sent: %s' % (type(message).__name__, exc)
                self.unsaid(link, message, text)

    def unsaid(self, link: Link, message: Any, text: str) -> None:
        """Handle a message that could not be sent; nothing of it was sent. If it is an answer, the
        other side gets an error instead; otherwise the other side would wait in vain, so that the
        link is broken."""
        if type(message) is Return and not message.error:
            error = ('ValueError', text[:NAME_MOST])
            self.send(link, message._replace(error=error, value=None))
        else:
            self._later_broken.append((link, text))

    def disconnect(self, link: Link, text: str) -> None:
        """End a link on purpose: what waits is sent as far as the socket accepts it, then the link
        is closed."""
        if not link.owes:
            message = Bye(text[:1000])
            self.send(link, message)
        with contextlib.suppress(OSError):   # it is closed in any case
            link.drain(self.PARTING)
        self.detach(link)

    def run(self) -> None:
        """Do one turn after the other until `stop`."""
        while not self.has_ended:
            self.turn()
        if self._failed:
            raise LoopFailed(self._failed)

    def stop(self) -> None:
        """Make `run` return after this turn."""
        self.has_ended = True

    def turn(self, timeout: Optional[float] = None) -> None:
        """Do one round: wait, read, handle events, decide, write."""
        if self.pace.may_pause:
            self.pace.pause()
        # Set before `_select_timeout` checks what was posted, so that later posts wake this loop
        self._waits = True
        before = self.clock()
        longest = self._select_timeout(timeout)
        ready = self._selector.select(longest)
        self._waits = False
        self.pace.woke(before, self.clock(), longest)
        for key, mask in ready:
            self.now = self.clock()
            subject = key.data
            if callable(subject):
                self.guard(None, subject)
            elif subject.is_attached:   # it was not detached in the meantime
                self._handle_io(subject, mask)
        self.now = self.clock()
        if self._inbox:
            self.take_events(len(self._inbox))
        if self.links and self.now >= self._pulse_at:
            self.guard(None, self._send_heartbeats)
        try:
            self.end_of_turn()
        except Exception as exc:  # as in `guard`; this is done for each job that comes alone
            self.fault(None, exc)
        while self._later_broken:
            self._break(*self._later_broken.popleft())
        for channel in list(self._to_write) if self._to_write else ():
            self._write(channel)

    def take_events(self, count: int) -> None:
        """Handle this many of the events that were posted."""
        for _ in range(count):
            event = self._inbox.popleft()
            try:
                self.on_event(event)
            except Exception as exc:  # as in `guard`, whose call every event would pay
                self.fault(event, exc)

    def guard(self, subject: Any, call: Callable[..., Any], *args: Any) -> None:
        """Call a function for `subject`; an unexpected exception ends what the subject concerns,
        not the loop."""
        try:
            call(*args)
        except Exception as exc:  # whatever it is, others must be served
            self.fault(subject, exc)

    def act(self, actions: List[Any]) -> None:
        """Carry out what the state has decided, according to the table of the loop."""
        for action in actions:
            try:
                self._acts[type(action)](action)
            except Exception as exc:  # the other actions must be carried out
                self.fault(action, exc)

    def fault(self, subject: Any, exc: BaseException, owner: Any = None) -> None:
        """Log an unexpected exception and end what it concerns: `owner` determines that; it is a
        part of this loop, or the owner of the channel which is the subject."""
        if subject is not None:
            name = type(subject).__name__
        else:
            name = 'a turn'
        self.log.error('a fault of dispy while it handled %s', name, exc_info=exc)
        concerned = False
        judge = owner or getattr(subject, 'owner', None) or self
        try:
            text = 'a fault of dispy has ended it: %s: %.500s' % (type(exc).__name__, exc)
            concerned = judge.on_fault(subject, text)
        except Exception:  # a second exception; the first is in the log already
            self.log.exception('a fault of dispy while it ended what the last one concerned')
        self._again = self._again or not concerned
        if concerned:
            return
        now = self.clock()
        if not self._faults.are_many(now):
            return
        self._failed = '%d faults within %g s, the last of them %s: %.500s' % (
            Faults.MOST, Faults.WITHIN, type(exc).__name__, exc)
        self.stop()

    def _select_timeout(self, timeout: Optional[float]) -> Optional[float]:
        """Return the seconds until something is to be done, at most a day: a selector accepts no
        more than 24.8 days."""
        if self._inbox or self._again:
            self._again = False
            return 0
        try:
            when = self.next_timer()
        except Exception as exc:
            self.fault(None, exc)
            return 0
        if self.links and (when is None or self._pulse_at < when):
            when = self._pulse_at
        wait = LONGEST_SLEEP
        if when is not None:
            wait = min(wait, when - self.clock())
        if timeout is not None:
            wait = min(wait, timeout)
        return max(0.0, wait)

    def receive(self, channel: Channel) -> None:
        """Handle what has come on a channel that the selector does not know."""
        self._handle_io(channel, selectors.EVENT_READ)

    def _drain_wakeups(self) -> None:
        try:
            self._wakened.recv(4096)
        except BlockingIOError:
            pass    # drained before; suppress() would cost as much as the call
        self._signalled = False

    def _handle_io(self, channel: Channel, mask: int) -> None:
        try:
            if mask & selectors.EVENT_READ:
                (channel.owner or self).on_channel(channel)
            if mask & selectors.EVENT_WRITE:
                self._to_write.add(channel)
        except (LinkBroken, OSError) as exc:
            text = str(exc) or type(exc).__name__
            self._break(channel, text)
        except PeerError as exc:
            self._refuse_link(channel, str(exc))
        except MemoryError:
            self._refuse_link(channel, NO_MEMORY)
        except Exception as exc:  # the fault is that of the channel, which is ended
            self.fault(channel, exc)

    def _refuse_link(self, channel: Channel, text: str) -> None:
        """End a link on which something unusable has come. The other side is told, so that it does
        not connect and send the same immediately."""
        if isinstance(channel, Link) and channel.is_attached:
            self.log.error('what %s has sent cannot be used: %s', channel.address, text)
            Loop.send(self, channel, Wrong(text[:NAME_MOST], channel.opened))
            with contextlib.suppress(OSError):   # it is broken in any case
                channel.write()
        self._break(channel, text)

    def _write(self, channel: Channel) -> None:
        try:
            channel.write()
            if channel.later:
                channel.go_on()
        except OSError as exc:
            # The other side may have sent the reason
            self._handle_io(channel, selectors.EVENT_READ)
            text = str(exc)
            self._break(channel, text)
            return
        except Exception as exc:  # as above
            self.fault(channel, exc)
            return
        self._to_write.discard(channel)
        if channel.queued or channel.later or channel.interest != selectors.EVENT_READ:
            self.interest(channel)

    def interest(self, channel: Channel) -> None:
        """Register with the selector what the channel waits for."""
        wanted = 0
        if not channel.paused:
            wanted = selectors.EVENT_READ
        if channel.wants_write:
            wanted |= selectors.EVENT_WRITE
        if wanted == channel.interest or not channel.is_attached or channel.sock is None:
            return
        if not channel.interest:
            self._selector.register(channel.sock, wanted, channel)
        elif not wanted:
            self._selector.unregister(channel.sock)
        else:
            self._selector.modify(channel.sock, wanted, channel)
        channel.interest = wanted

    def _break(self, channel: Channel, text: str) -> None:
        if channel.is_attached:
            channel.breaks(self.now)
            self.detach(channel)
            self.guard(None, (channel.owner or self).on_broken, channel, text)

    break_link = _break    # for the parts

    def _send_heartbeats(self) -> None:
        """Send heartbeats on idle links, and end silent links."""
        # This process was stopped, or the machine slept: the peers were not silent
        late = self.now - self._pulse_at
        if self._pulse_at and late > min(link.pulse for link in self.links.values()):
            for link in self.links.values():
                link.heard = min(self.now, link.heard + late)
        for link in list(self.links.values()):
            if self.now - link.heard > PULSES_LOST * link.pulse and not link.paused:
                text = 'nothing was received for %.0f s' % (self.now - link.heard)
                self._break(link, text)
                continue
            if self.is_silent(link):
                self.on_silent(link)
            if not self.now - link.said >= link.pulse * 0.9:
                continue
            if not link.wants_write:
                self.send(link, Pulse())
        self._pulse_at = self.now + min([PULSE, *(link.pulse for link in self.links.values())]) / 2

    def is_silent(self, link: 'Link') -> bool:
        """Return whether a second connection is to be tried while this one still counts."""
        if not self.now - link.heard > PULSES_SILENT * link.pulse:
            return False
        return not link.paused

    def close(self) -> None:
        """Close everything that the loop owns."""
        self.has_ended = True
        self._waits = True        # a thread that posts from now on finds the waker closed
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, Channel):
                self.detach(key.data)
        self._selector.close()
        if self._wakes_on_signals:
            self._wakes_on_signals = False
            signal.set_wakeup_fd(-1)
        self._waker.close()
        self._wakened.close()
        self._signalled = False   # a thread that posts from now on sees that this has ended
        self._close_late()


class SpoolSender:
    """Messages that are created only when links have room for them: pieces of files, and results
    that are on the disk. The loop's thread uses this class.

    waiting - link -> owners and their messages
    """

    def __init__(self, links: Dict[int, 'Link']) -> None:
        self._links = links
        self.waiting: Dict[int, Deque[Tuple[tuple, Iterator[Any]]]] = {}

    def add(self, link: int, owner: tuple, messages: Iterator[Any]) -> None:
        """Send these messages after those that were added before. `owner` is a tuple that begins
        with a computation."""
        self.waiting.setdefault(link, collections.deque()).append((owner, messages))

    def add_file(self, link: int, transfer: Tuple[str, int, int], row: tuple, source: Any) -> None:
        """Send a file; `transfer` is its computation, purpose and key, and `source` is as in
        `read_pieces`."""
        pieces = read_pieces(source, row[1])
        owner = (*transfer, row[0])
        self.add(link, owner,
                 (FilePiece(*transfer, row, offset, out_of_band(data)) for offset, data in pieces))

    def add_results(self, link: int, comp: str, rows: Iterable[tuple]) -> None:
        """Send results."""
        messages = batches(Results, comp, map(with_size, rows))
        self.add(link, (comp,), messages)

    def drop(self, comp: str) -> None:
        """Discard everything that waits for a computation."""
        for waiting in self.waiting.values():
            for entry in [entry for entry in waiting if entry[0][0] == comp]:
                entry[1].close()  # type: ignore[attr-defined]
                waiting.remove(entry)

    def has_room(self) -> bool:
        """Return whether a message can be sent now."""
        for link in map(self._links.get, self.waiting):
            if link:
                if link.queued < 4 * BATCH_BYTES:
                    return True
        return False

    def send(self, say: Callable[['Link', Any], None]) -> List[Tuple['Link', tuple, str]]:
        """Send as many messages as there is room for. Returns (link, owner, text) of each file or
        result that could not be read and is not sent any further."""
        failed = []
        for number, waiting in list(self.waiting.items()):
            link = self._links.get(number)
            while waiting and link is not None and link.queued < 4 * BATCH_BYTES:
                try:
                    say(link, next(waiting[0][1]))
                except StopIteration:
                    waiting.popleft()
                except (OSError, ValueError) as exc:   # ValueError: it is no longer a regular file
                    failed.append((link, waiting.popleft()[0], str(exc)))
            if not waiting or link is None:
                del self.waiting[number]
        return failed


_Key = typing.TypeVar('_Key')
_Value = typing.TypeVar('_Value')


class Recent(typing.OrderedDict[_Key, _Value]):
    """A dict with a bounded number of entries: when it is full, the entry that was set longest ago
    is dropped, so that others cannot exhaust the memory."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, key: _Key, value: _Value) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > self._most:
            self.popitem(last=False)


# -- accepting -------------------------------------------------------------------------------------

class HandshakeLimiter:
    """Bounds on connections that are not authenticated yet: 64 handshakes at once, 32 from one
    address. When there are more, one of them is ended: one of the same address, or else the oldest
    of the network that has most of them, so that silent connections keep nobody out. After five
    failures an address is refused for 15 s, doubling up to 10 min. An address from which a peer has
    authenticated within the last hour is never refused for failures, but is limited to few
    handshakes at once. Established links are not affected."""
    AT_ONCE = 64
    FROM_ONE = 32
    FAILURES = 5
    SHUT = 15.0
    SHUT_MOST = 600.0
    REMEMBERED = 4096
    RECENT = 3600.0
    FROM_MIXED = 8

    def __init__(self) -> None:
        self._open: Dict[str, int] = collections.Counter()
        # Address -> failures, and until when it is refused
        self._failed: Recent[str, Tuple[int, float]] = Recent(self.REMEMBERED)
        # Address -> when a line was logged
        self._logged: Recent[str, float] = Recent(self.REMEMBERED)
        # Address -> when a peer has authenticated from there
        self._proved: Recent[str, float] = Recent(self.REMEMBERED)

    def is_shut(self, address: str, now: float) -> bool:
        """Return whether connections from this address are refused at present."""
        if now >= self._failed.get(address, (0, 0.0))[1]:
            return False
        proved = self._proved.get(address)
        if proved is None:
            return True
        if now - proved > self.RECENT:
            return True
        return self._open[address] >= self.FROM_MIXED

    def admit(self, address: str, now: float) -> bool:
        """Return whether a connection from this address may begin its handshake; `done` must be
        called for each one that is admitted."""
        handshakes = sum(self._open.values())
        if handshakes >= self.AT_ONCE:
            return False
        if self._open[address] >= self.FROM_ONE:
            return False
        if self.is_shut(address, now):
            return False
        self._open[address] += 1
        return True

    def make_way(self, address: str, under_way: Iterable[Tuple[int, str]]) -> Optional[int]:
        """Return which of the handshakes in progress, (number, address) in the order in which they
        began, is to be ended in favour of one from this address, which then counts as admitted."""
        rows = list(under_way)
        if self._open[address] >= self.FROM_ONE:
            crowd = [number for number, other in rows if other == address]
        else:
            counts = collections.Counter(network_of(other) for _, other in rows)
            most = max(counts.values(), default=0)
            crowd = [number for number, other in rows if counts[network_of(other)] == most]
        if not crowd:
            return None
        self._open[address] += 1
        return crowd[0]

    def done(self, address: str, proved: Optional[bool], now: float) -> None:
        """Note that the handshake has ended. `proved` says whether the peer knew the secret; it is
        None if the peer did not try: silent peers guess nothing, and the number of handshakes
        bounds them."""
        self.leave(address)
        if proved:
            self._proved[address] = now
        # This one began before the others failed
        if proved is None:
            return
        if now < self._failed.get(address, (0, 0.0))[1]:
            return
        if proved:
            self._failed.pop(address, None)
            return
        count = self._failed.get(address, (0, 0.0))[0] + 1
        if count >= self.FAILURES:
            shut = min(self.SHUT * 2 ** min(count - self.FAILURES, 10), self.SHUT_MOST)
        else:
            shut = 0.0
        self._failed[address] = count, now + shut

    def leave(self, address: str) -> None:
        """Release the place of an admitted connection."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]

    def may_log(self, address: str, now: float) -> bool:
        """Return whether a line may be logged: one for each address in 10 s."""
        if now - self._logged.get(address, -10.0) < 10.0:
            return False
        self._logged[address] = now
        return True


def network_of(address: str) -> str:
    """Return the network of an address: 24 bits of IPv4, 64 of IPv6, since one host may have all
    addresses of its network."""
    import ipaddress
    try:
        found = ipaddress.ip_address(address.partition('%')[0])
    except ValueError:
        return address
    return str(ipaddress.ip_network('%s/%d' % (found, 24 if found.version == 4 else 64), False))


class Authenticated(NamedTuple):
    """A peer has authenticated itself. An Acceptor posts this event."""
    sock: socket.socket
    session: Session
    address: str


class Acceptor(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Accepts connections on one address. Each connection does its TLS and protocol handshake in a
    thread of its own, bounded by a HandshakeLimiter. A loop watches the listening socket and calls
    `on_readable`."""
    daemon_threads = True
    allow_reuse_address = os.name != 'nt'
    request_queue_size = 128
    timeout = 0      # handle_request returns when no connection waits

    def __init__(self,
                 address: Tuple[str, int],
                 psk: Union[bytes, Dict[int, Tuple[bytes, ...]]],
                 role: Role,
                 allowed: Sequence[Role],
                 instance: bytes,
                 deliver: Callable[[Authenticated], None],
                 certfile: Optional[str] = None,
                 keyfile: Optional[str] = None,
                 cafile: Optional[str] = None,
                 patience: float = HANDSHAKE_TIME,
                 refused: Callable[[str, str], None] = lambda address, text: None) -> None:
        self._patience = patience   # s for TLS and handshake
        # Is called when it is logged that a peer was rejected; in the connection's thread
        self._refused = refused
        self._psk = psk
        self._role = role
        self._allowed = tuple(allowed)
        self._instance = instance
        self._deliver = deliver
        if certfile:
            self._tls = tls_context(True, certfile, keyfile, cafile)
        else:
            self._tls = None
        if certfile:
            self._binding = certificate_digest(certfile)
        else:
            self._binding = NO_TLS
        # The lock guards the limiter
        self._keeper = HandshakeLimiter()
        self._lock = threading.Lock()
        # Handshakes by the ids of their sockets, in order
        self._under_way: Dict[int, Tuple[str, socket.socket]] = {}
        self._kept: Set[int] = set()    # ids of sockets that were delivered, not to be closed
        self._spare = os.open(os.devnull, os.O_RDONLY)
        # All addresses of this host, IPv4 and IPv6
        self._both = not address[0] and socket.has_dualstack_ipv6()
        if ':' in address[0] or self._both:
            self.address_family = socket.AF_INET6
        else:
            self.address_family = socket.AF_INET
        super().__init__(address, None)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Do as the method of socketserver does, without looking up the name of the host."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not self._both)
        claim_port(self.socket)
        super().server_bind()

    def on_readable(self) -> None:
        """Accept a connection. The loop's thread calls this."""
        self.handle_request()

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Accept a connection. If no descriptor is left, the spare one is used to accept and close
        the connection, which would otherwise stay in the queue and keep the loop busy."""
        try:
            sock, where = super().get_request()
            address = address_in(where)
            return sock, (address, *where[1:])
        except OSError as exc:
            if exc.errno in (errno.ENFILE, errno.EMFILE):
                if self._spare >= 0:
                    os.close(self._spare)
                self._spare = -1
                with contextlib.suppress(OSError):
                    request = super().get_request()
                    request[0].close()
                self._spare = os.open(os.devnull, os.O_RDONLY)
                logger.error('no file descriptor is left for a new connection')
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether this address may begin a handshake."""
        address = client_address[0]
        victim = None
        with self._lock:
            now = time.monotonic()
            if self._keeper.is_shut(address, now):
                return False
            if not self._keeper.admit(address, now):
                under_way = [(number, other) for number, (other, _) in self._under_way.items()]
                number = self._keeper.make_way(address, under_way)
                if number is None:
                    return False
                _, victim = self._under_way.pop(number)
            # An own descriptor for the connection: TLS takes over that of the socket.
            if self._tls:
                descriptor = request.fileno()
                fileno = os.dup(descriptor)
                handle = socket.socket(fileno=fileno)
            else:
                handle = request
            self._under_way[id(request)] = (address, handle)
        if victim is not None:
            with contextlib.suppress(OSError):   # it has ended in the meantime
                victim.shutdown(socket.SHUT_RDWR)
            if self._tls:
                victim.close()
        return True

    def _is_over(self, request: Any) -> None:
        """Note that a handshake has ended. The lock must be held."""
        _, handle = self._under_way.pop(id(request), ('', None))
        if handle is None:
            return
        if handle is not request:
            handle.close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread."""
        try:
            super().process_request(request, client_address)
        except BaseException:   # no thread could be started: its place is free again
            with self._lock:
                self._is_over(request)
                self._keeper.leave(client_address[0])
            raise

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Carry out TLS and handshake. Runs in the connection's own thread."""
        address, proved = client_address[0], None  # type: Tuple[str, Optional[bool]]
        deadline = time.monotonic() + self._patience
        sock = request
        try:
            set_tcp_options(request)
            request.settimeout(self._patience)
            if self._tls:
                sock = self._tls.wrap_socket(request, server_side=True)
            else:
                sock = request
            session = handshake_accept(sock, self._psk, self._role, self._allowed, self._instance,
                                       self._binding, deadline)
            proved = True
            self._kept.add(id(request))
            arrival = Authenticated(sock, session, address)
            self._deliver(arrival)
        except HandshakeError as exc:
            if isinstance(exc, Silence):
                proved = None
            else:
                proved = False
            self._log(address, str(exc))
        except (EOFError, OSError) as exc:   # ssl.SSLError is an OSError
            if is_of_tls(exc):
                text = tls_text(exc)
            else:
                text = str(exc) or 'it hung up'
            self._log(address, text)
        finally:
            if not proved:
                sock.close()   # under TLS it is not the one that socketserver knows
            with self._lock:
                self._is_over(request)
                now = time.monotonic()
                self._keeper.done(address, proved, now)

    def _log(self, address: str, text: str) -> None:
        with self._lock:
            now = time.monotonic()
            may = self._keeper.may_log(address, now)
        if may:
            text = '%s (port %d)' % (text, self.server_address[1])
            logger.warning('the connection from %s was rejected: %s', address, text)
            self._refused(address, text)

    def shutdown_request(self, request: Any) -> None:
        """Close the socket if the handshake has not handed it over. socketserver calls this when
        the handshake has ended, with success or not."""
        if id(request) in self._kept:
            self._kept.discard(id(request))
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an exception in a thread of a connection: this is a fault of this program."""
        logger.exception('accepting %s failed', client_address[0])

    def server_close(self) -> None:
        """Stop listening."""
        super().server_close()
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1


# -- connecting ------------------------------------------------------------------------------------

def dial(host: str,
         port: int,
         psk: bytes,
         role: Role,
         wanted: Role,
         instance: bytes,
         tls: Any = None,
         note: Callable[[Any], None] = lambda sock: None,
         patience: float = HANDSHAKE_TIME,
         allowed: Optional[Callable[[str], bool]] = None,
         segment: int = 0) -> Authenticated:
    """Connect, to addresses that `allowed` accepts only, and carry out TLS and the handshake. This
    blocks and is for a thread.

    `tls` is a context of `tls_context`. `note` is called with each socket that is created, so that
    another thread can shut it down. `patience` is the time in seconds for the connection, and again
    for the handshake. `segment`, if given, is the largest number of bytes that a packet carries in
    either direction.

    Raises HandshakeError or OSError; `dial_text` explains them."""
    failure: OSError = OSError('it has no address')
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM):
        if allowed is not None:
            if not allowed(str(address[0])):
                failure = OSError('its address may not be connected to from here (--allow-nodes of '
                                  'the dispyscheduler)')
                continue
        sock: Any = socket.socket(family, kind, protocol)
        note(sock)
        try:
            sock.settimeout(patience)
            if segment:
                set_option(sock, socket.IPPROTO_TCP, 'TCP_MAXSEG', segment)
            sock.connect(address)
            break
        except OSError as exc:
            failure = exc
            sock.close()
    else:
        if isinstance(failure, socket.timeout):
            text = '%s %g s' % (NO_ANSWER, patience)
            raise Silence(text) from failure
        raise failure
    try:
        set_tcp_options(sock)
        binding = NO_TLS
        now = time.monotonic()
        deadline = now + patience
        if tls is not None:
            sock = _dial_tls(sock, tls)
            note(sock)
            digester = hashlib.sha256(sock.getpeercert(True))
            binding = digester.digest()
        session = handshake_dial(sock, psk, role, wanted, instance, binding, deadline)
        peer_address = sock.getpeername()
        return Authenticated(sock, session, address_in(peer_address))
    except Silence as exc:
        sock.close()
        raise Silence('%s %g s' % (NO_ANSWER, patience)) from exc
    except BaseException:
        sock.close()
        raise


def _dial_tls(sock: socket.socket, tls: Any) -> Any:
    try:
        return tls.wrap_socket(sock)
    except OSError as exc:   # ssl.SSLError is one
        kind = ClosedAtOnce if is_closing(exc) else HandshakeError
        raise kind(tls_text(exc)) from exc


class Unreached(enum.Enum):
    """The reason why an attempt to reach a peer has failed."""
    DOWN = 'down'                    # its host answers, and nothing listens at the port
    UNREACHABLE = 'unreachable'      # nobody answers, or there is no route
    NO_SUCH_NAME = 'no such name'
    NAME_SERVICE = 'no name service'   # no name service answers
    # The peer rejects this program, or fails authentication
    REFUSED = 'refused'

    def __str__(self) -> str:
        return self.value  # type: ignore[no-any-return]


NAME_SERVICE_FAILS = frozenset((socket.EAI_AGAIN, socket.EAI_FAIL))
NO_WAY = frozenset((errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN))


def dial_text(exc: BaseException) -> str:
    """Return the text that says why a connection was not made."""
    if isinstance(exc, ConnectionRefusedError):
        return 'no program listens there'
    if isinstance(exc, socket.gaierror):
        if exc.errno in NAME_SERVICE_FAILS:
            return ('its name does not resolve, because the name service does not answer '
                    '(%s)' % exc.strerror)
        return 'its name does not resolve'
    if isinstance(exc, UnicodeError):
        return 'its name is not valid for a host: %s' % exc
    if isinstance(exc, socket.timeout):
        return '%s %d s' % (NO_ANSWER, HANDSHAKE_TIME)
    # With TLS 1.3, a rejected certificate is noticed only in the handshake
    if is_of_tls(exc):
        return tls_text(exc)
    if isinstance(exc, OSError):
        if exc.errno in NO_WAY:
            return 'it cannot be reached: %s' % exc.strerror
    return str(exc)


class Failing(enum.Enum):
    """What several failures to connect may have in common although their texts differ."""
    SILENT = 'there was no answer in time'
    CLOSED = 'the peer closed the connection at once'
    OTHERWISE = 'it is for other reasons'


def how_it_fails(exc: BaseException) -> Failing:
    """Return what a failure to connect has in common with others."""
    if isinstance(exc, (Silence, socket.timeout)):
        return Failing.SILENT
    if isinstance(exc, ClosedAtOnce):
        return Failing.CLOSED
    if is_of_tls(exc) and is_closing(exc):
        return Failing.CLOSED
    return Failing.OTHERWISE


def why_unreached(exc: BaseException) -> Unreached:
    """Return why no connection came about, as one of few cases."""
    if isinstance(exc, ConnectionRefusedError):
        return Unreached.DOWN
    if isinstance(exc, UnicodeError):
        return Unreached.NO_SUCH_NAME
    if isinstance(exc, socket.gaierror):
        if exc.errno in NAME_SERVICE_FAILS:
            return Unreached.NAME_SERVICE
        return Unreached.NO_SUCH_NAME
    if isinstance(exc, HandshakeError):
        if not isinstance(exc, Silence):
            return Unreached.REFUSED
    if is_of_tls(exc):
        return Unreached.REFUSED
    return Unreached.UNREACHABLE


class Connected(NamedTuple):
    """`peer` was reached. The thread of a Reconnector posts this event."""
    peer: Any
    sock: Any
    session: Session
    address: str


class ConnectFailed(NamedTuple):
    """`peer` was not reached. The thread of a Reconnector posts this event."""
    peer: Any
    text: str
    why: Unreached = Unreached.UNREACHABLE
    failing: Failing = Failing.OTHERWISE


def failure_to_connect(peer: Any, exc: BaseException) -> ConnectFailed:
    """Return the event which says why a peer was not reached."""
    return ConnectFailed(peer, dial_text(exc), why_unreached(exc), how_it_fails(exc))


class Reconnector:
    """Attempts to reach one peer: one at a time, each in a thread. After each failure the wait
    doubles. The loop's thread uses this class.

    When a connection has ended, the jobs of the peer are lost unless another connection is made
    within PULSES_LOST heartbeat intervals. During this time, attempts have a short time limit, and
    the waits between them are at most one interval: an attempt that began while the network was
    interrupted may never be answered, even after the interruption, whereas a later one succeeds at
    once.
    """

    def __init__(self, first: float, most: float) -> None:
        self._first = first
        self._most = most
        self._wait = first
        self.due: Optional[float] = 0.0    # when to begin, None: not to begin
        self._flaps = 0                    # links in a row that ended at once
        self._hurry_until = -math.inf      # attempts are short and frequent
        self._attempt: Optional[ConnectionAttempt] = None

    @property
    def busy(self) -> bool:
        """Return whether an attempt is in progress."""
        return self._attempt is not None

    def start(self,
              post: Callable[[Any], None],
              peer: Any,
              reach: Callable[[Callable[[Any], None]], Authenticated],
              attempt: 'Optional[Type[ConnectionAttempt]]' = None) -> None:
        """Begin an attempt. `reach(note)` is `dial` with all of its arguments except `note`.
        Connected or ConnectFailed is posted with `peer`. `attempt` is the class of the attempt, if
        it is not ConnectionAttempt."""
        make = attempt or ConnectionAttempt
        self.due = None
        self._attempt = make(post, peer, reach)
        try:
            self._attempt.start()
        except RuntimeError as exc:   # no more threads, or the interpreter is about to exit
            self._attempt = None
            text = 'no thread could be started: %s' % exc
            post(ConnectFailed(peer, text))

    def ended(self) -> None:
        """Note that the attempt has ended: its event has come."""
        self._attempt = None

    def again(self, now: float, lived: float = 0.0, pulse: float = PULSE) -> None:
        """Try again later, because the attempt failed, or because its link ended after it had
        `lived` for so many seconds. Each connection that was made resets the wait, unless several
        links in a row have ended at once."""
        if lived:
            if lived > FLAP_TIME:
                self._flaps = 0
            else:
                self._flaps = self._flaps + 1
            self._hurry_until = -math.inf
            if self._flaps < FLAPS:
                self._wait = self._first
                self._hurry_until = now + PULSES_LOST * pulse
        self.due = now + (min(self._wait, pulse) if now < self._hurry_until else self._wait)
        self._wait = min(2 * self._wait, self._most)

    def patience(self, now: float, pulse: float, trip: float = 0.0) -> float:
        """Return the time limit of an attempt in seconds. While jobs may be lost, it is one
        heartbeat interval, or the time that connection and handshake take with a peer whose round
        trip takes `trip` s."""
        if now >= self._hurry_until:
            return HANDSHAKE_TIME
        return min(HANDSHAKE_TIME, max(1.0, pulse, TRIPS * trip))

    def abort(self, waits: bool = False) -> None:
        """End the attempt. An attempt that waits for a name server cannot be interrupted: it is
        abandoned, and its result is discarded. With `waits`, this method waits for the end of the
        attempt even in that case, because the attempt starts a process and must handle it."""
        if self._attempt is not None:
            self._attempt.abort(waits)


class ConnectionAttempt:
    """One attempt of a Reconnector, with a thread of its own."""

    def __init__(self, post: Callable[[Any], None], peer: Any,
                 reach: Callable[[Callable[[Any], None]], Authenticated]) -> None:
        self._post = post
        self._peer = peer
        self._reach = reach
        self._lock = threading.Lock()   # guards the two below
        self._sock: Any = None
        self._aborted = False
        self._thread = threading.Thread(target=self._work, name='dispy-dial', daemon=True)

    def start(self) -> None:
        """Begin. Raises RuntimeError if no thread can be started."""
        self._thread.start()

    def _work(self) -> None:
        try:
            found = self._reach(self._note)
        except (DispyError, OSError, ValueError, RuntimeError) as exc:
            # RuntimeError: no process can be started while the interpreter exits
            self._post(failure_to_connect(self._peer, exc))
        else:
            event = Connected(self._peer, *found)
            self._post(event)

    def _note(self, sock: Any) -> None:
        with self._lock:
            self._sock = sock
            if not self._aborted:
                return
        sock.close()
        raise OSError('given up')

    def abort(self, waits: bool) -> None:
        """End the attempt, and wait for its end if it has reached a point from which it can be
        interrupted."""
        with self._lock:
            self._aborted = True
            sock = self._sock
        if sock is not None:
            with contextlib.suppress(OSError):   # not connected yet, or not any more
                sock.shutdown(socket.SHUT_RDWR)
        if sock is not None or waits:
            self._thread.join(HANDSHAKE_TIME)


class SecondConnection:
    """Attempts to make a second connection to a peer whose link is silent: the one on which
    something is received first is used. The loop's thread uses this class.

    Attempts are short, and one follows the other: TCP retransmits a lost packet after 1, 3, 7 s
    only, whereas a new attempt finds out at once that an interruption is over.
    """

    def __init__(self, peer: Any) -> None:
        self.peer = peer
        self._dialling = Reconnector(0.0, 0.0)
        self._failed_at: Optional[float] = None    # when an attempt has failed last
        self._began = 0.0

    @property
    def busy(self) -> bool:
        """Return whether an attempt is in progress."""
        return self._dialling.busy

    def has_failed(self, since: float) -> bool:
        """Return whether an attempt has failed since this time."""
        if self._failed_at is None:
            return False
        return self._failed_at >= since

    def start(self,
              now: float,
              post: Callable[[Any], None],
              reach: Callable[[Callable[[Any], None]], Authenticated],
              attempt: Optional[Type[ConnectionAttempt]] = None) -> None:
        """Begin an attempt, unless one is in progress."""
        if not self.busy:
            self._began = now
            self._dialling.start(post, self, reach, attempt)

    def ended(self, failed_at: Optional[float] = None) -> bool:
        """Note that the attempt has ended: its event has come. Returns whether the next attempt may
        begin at once; one that was refused immediately has to wait."""
        self._dialling.ended()
        self._failed_at = failed_at
        if failed_at is None:
            return False
        return failed_at - self._began > SECOND_APART

    def abort(self) -> None:
        """End the attempt."""
        self._dialling.abort()


# -- discovery -------------------------------------------------------------------------------------

class DatagramType(enum.IntEnum):
    """The meaning of a datagram."""
    QUESTION = 1   # client or scheduler, to all: which nodes exist?
    ANSWER = 2     # node, to the asker
    HELLO = 3      # node, to all, at its start and every --ping-interval: it exists
    NOT_MINE = 4   # node, to an asker with another secret; signed with a key that nobody shares


class Datagram(NamedTuple):
    """The contents of a UDP datagram.

    port - the TCP port of the sender
    address - the address at which the sender can be reached, if it is not the source of the
    datagram; only in answers, since it depends on the receiver
    instance - the process of the sender
    nonce - 16 bytes that are new in each datagram
    echo - the nonce of the question that is answered"""
    kind: int
    role: int
    port: int
    address: str
    instance: bytes
    nonce: bytes
    echo: bytes


# magic, kind, role, port, family (0: no address), -, address, instance, counter, nonce, echo, -,
# tag
_DATAGRAM = struct.Struct('>8sBBHB3x16s16sQ16s16s8x32s')
# 128 bytes for questions and answers alike: nobody can be made to send more than was received
DATAGRAM = _DATAGRAM.size


class Discovery:
    """The datagrams of one process: it builds its own, and accepts those of others that are signed
    and new. Processes that are found by datagrams are dialled, and only the handshake authenticates
    them; therefore a forged or repeated datagram costs at most one connection.

    At most LIMIT signed questions and STRANGERS others are answered in a second, so that nobody can
    flood a third party through this process, and peers without the secret do not displace those
    that have it. One address of such strangers gets at most TOLD_MOST answers in OTHERS seconds.
    """
    REMEMBERED = 4096
    LIMIT = 100
    STRANGERS = 20
    TOLD_MOST = 5
    OTHERS = 60.0
    WINDOW = 64
    # One counter for the process, since its instance is the same in all datagrams
    _counts = itertools.count(1)

    def __init__(self,
                 psk: bytes,
                 role: Role,
                 instance: bytes,
                 port: int = 0,
                 addresses: Sequence[str] = ()) -> None:
        self._key = hmac.digest(psk, b'dispy 5 discovery', 'sha256')
        self._role = role
        self._instance = instance
        self._port = port
        self._addresses = tuple(addresses)
        # Instance -> highest counter, and a bit mask of the WINDOW counters before it that have
        # come: datagrams may overtake one another
        self._seen: Recent[bytes, Tuple[int, int]] = Recent(self.REMEMBERED)
        # (address, instance) -> when it got NOT_MINE; a program that is started again gets it again
        self._told: Recent[Tuple[str, bytes], float] = Recent(self.REMEMBERED)
        self._asked: Deque[bytes] = collections.deque(maxlen=16)
        # Address -> times of answers
        self._told_there: Recent[str, Deque[float]] = Recent(self.REMEMBERED)
        self._second = 0
        self._answered = 0
        self._unknown_answers = 0

    def build(self, kind: DatagramType, to: str = '', echo: bytes = bytes(16)) -> bytes:
        """Return a datagram of this process, which is new each time; `to` is the address of the
        receiver if it is an answer."""
        import ipaddress
        nonce = os.urandom(16)
        if kind is DatagramType.QUESTION:
            self._asked.append(nonce)
        family = 0
        address = bytes(16)
        if kind is DatagramType.ANSWER:
            best = nearest_address(self._addresses, to)
        else:
            best = ''
        if best:
            packed = ipaddress.ip_address(best).packed
            if len(packed) == 4:
                family = 4
            else:
                family = 6
            address = packed.ljust(16, b'\0')
        count = next(self._counts)
        body = _DATAGRAM.pack(MAGIC, kind, self._role, self._port, family, address, self._instance,
                              count, nonce, echo, bytes(32))[:-32]
        digest = hmac.digest(
            os.urandom(32) if kind is DatagramType.NOT_MINE else self._key, body, 'sha256')
        return body + digest

    def parse(self, data: bytes, source: str,
              now: float) -> Tuple[Optional[Datagram], Optional[bytes]]:
        """Return the datagram, if it concerns this process, and the answer that is to be sent to
        its source; each may be None. This never raises."""
        import ipaddress
        if len(data) != DATAGRAM:
            return None, None
        if data[:8] != MAGIC:
            return None, None
        _, kind, role, port, family, address, instance, count, nonce, echo, tag = _DATAGRAM.unpack(
            data)
        if instance == self._instance:
            return None, None
        if family == 4:
            address = address[:4]
        shown = ''
        if family:
            shown = str(ipaddress.ip_address(address))
        heard = Datagram(kind, role, port, shown, instance, nonce, echo)
        digest = hmac.digest(self._key, data[:-32], 'sha256')
        if not hmac.compare_digest(tag, digest):
            return self._of_stranger(heard, source, now)
        is_new = self._is_new(instance, count)
        if not is_new:
            return None, None   # a repeated datagram
        return self._judge(heard, source, now)

    def _judge(self, heard: Datagram, source: str,
               now: float) -> Tuple[Optional[Datagram], Optional[bytes]]:
        """Return the datagram of a process that has the secret, if it concerns this process, and
        the answer to it."""
        if heard.kind == DatagramType.QUESTION:
            if self._role is not Role.NODE:
                return None, None
            if self._addresses and not nearest_address(self._addresses, source):
                return None, None
            if not self._may_answer(now):
                return None, None
            return heard, self.build(DatagramType.ANSWER, source, heard.nonce)
        if self._role is Role.NODE:
            return None, None
        if heard.kind not in (DatagramType.ANSWER, DatagramType.HELLO):
            return None, None
        if heard.kind == DatagramType.ANSWER and heard.echo not in self._asked:
            return None, None
        return heard, None

    def _is_new(self, instance: bytes, count: int) -> bool:
        highest, bits = self._seen.get(instance, (0, 0))
        ahead = count - highest
        if ahead > 0:
            highest = count
            bits = (bits << min(ahead, self.WINDOW) | 1) & ((1 << self.WINDOW) - 1)
        elif ahead <= -self.WINDOW or bits >> -ahead & 1:
            return False
        else:
            bits |= 1 << -ahead
        self._seen[instance] = highest, bits
        return True

    def _of_stranger(self, heard: Datagram, source: str,
                     now: float) -> Tuple[Optional[Datagram], Optional[bytes]]:
        if heard.kind == DatagramType.NOT_MINE:
            if heard.echo in self._asked:
                return heard, None
        asker = source, heard.instance
        if heard.kind != DatagramType.QUESTION:
            return None, None
        if self._role is not Role.NODE:
            return None, None
        told_at = self._told.get(asker, -self.OTHERS)
        if now - told_at < self.OTHERS:
            return None, None
        if not self._may_tell(source, now):
            return None, None
        self._told[asker] = now
        return None, self.build(DatagramType.NOT_MINE, source, heard.nonce)

    def _next_second(self, now: float) -> None:
        if int(now) == self._second:
            return
        self._second = int(now)
        self._answered = 0
        self._unknown_answers = 0

    def _may_answer(self, now: float) -> bool:
        self._next_second(now)
        self._answered += 1
        return self._answered <= self.LIMIT

    def _may_tell(self, source: str, now: float) -> bool:
        """Return whether a stranger gets an answer."""
        self._next_second(now)
        times = self._told_there.get(source)
        if self._unknown_answers >= self.STRANGERS:
            return False
        if times is not None and len(times) == self.TOLD_MOST:
            if now - times[0] < self.OTHERS:
                return False
        self._unknown_answers += 1
        if times is None:
            times = self._told_there[source] = collections.deque(maxlen=self.TOLD_MOST)
        times.append(now)
        return True


# Site-local multicast groups; packets are not routed, since they have one hop to go. With
# link-local groups of IPv6, requests would come from link-local addresses, and no node could be
# listed by the address that people know.
GROUP6 = 'ff15::d159:5'
GROUP4 = '239.255.97.1'
REACHES = ('lan', 'loopback', 'off')


def discovery_reach() -> str:
    """Return how far datagrams go, by the environment: 'lan', 'loopback' (this machine) or 'off'.
    Raises ValueError."""
    dispy_discovery = os.environ.get('DISPY_DISCOVERY')
    reach = dispy_discovery or 'lan'
    if reach not in REACHES:
        raise ValueError(
            "the environment's DISPY_DISCOVERY is %r; it must be 'lan', 'loopback' or 'off'" %
            reach)
    return reach


class UdpListener(socketserver.UDPServer):
    """A UDP socket. A loop watches it and calls `on_readable`; each datagram is passed to
    `hear(data, source, reply)`."""
    allow_reuse_address = True   # several nodes and clients of one host receive the same broadcasts
    timeout = 0
    max_packet_size = DATAGRAM + 1

    def __init__(self, family: int, host: str, port: int,
                 on_datagram: Callable[[bytes, str, Callable[[bytes], None]], None],
                 multicast: bool) -> None:
        self.address_family = family
        self._on_datagram = on_datagram
        self._multicast = multicast
        self.speaks = True
        super().__init__((host, port), None)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Set options, bind the address, and join the multicast groups."""
        sock = self.socket
        if sys.platform != 'linux':   # on Linux it would exclude other users' nodes
            set_option(sock, socket.SOL_SOCKET, 'SO_REUSEPORT', 1)
        if self.address_family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        super().server_bind()
        sock.setblocking(False)
        if self.server_address[0] not in ('', '0.0.0.0', '::'):
            return
        if not self.server_address[1]:
            return
        if self.address_family == socket.AF_INET6:
            for index in interfaces():
                # An interface without multicast, or with too many groups
                with contextlib.suppress(OSError):
                    sock.setsockopt(
                        socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP,
                        socket.inet_pton(socket.AF_INET6, GROUP6) + struct.pack('@I', index))
        elif self._multicast:
            for address in own_addresses() or ('0.0.0.0',):
                with contextlib.suppress(OSError):   # as above
                    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
                                    socket.inet_aton(GROUP4) + socket.inet_aton(address))

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Take one datagram."""
        data, sock = request

        def reply(answer: bytes) -> None:
            # There is no route, or the buffer is full: the peer will ask again
            with contextlib.suppress(OSError):
                sock.sendto(answer, client_address)
        try:
            source = address_in(client_address)
        except OSError:   # no descriptor is left: the peer will ask again
            return
        self._on_datagram(data, source, reply)

    def on_readable(self) -> None:
        """Receive a datagram. The loop's thread calls this."""
        self.handle_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an exception: this is a fault of this program."""
        logger.exception('a datagram from %s failed', client_address[0])


def own_addresses() -> Dict[str, str]:
    """Return the IPv4 addresses of this host, each with the broadcast address of its network; this
    needs psutil, without which there are none. If they cannot be determined now, as when no
    descriptor is left, the previous result is returned."""
    global _own_addresses
    found = ask_psutil(lambda psutil: psutil.net_if_addrs())
    if found is not None:
        _own_addresses = {
            item.address: item.broadcast or ''
            for items in found.values()
            for item in items if item.family == socket.AF_INET
        }
    return _own_addresses


_own_addresses = {}   # type: Dict[str, str]   # Python 3.7 compiles no annotation of a global name


def interfaces() -> List[int]:
    """Return the numbers of the network interfaces of this host; none while no descriptor is
    left."""
    try:
        return [index for index, _ in socket.if_nameindex()]
    except OSError as exc:
        logger.debug('interfaces of this host: %s', exc)
        return []


# The address at which all processes of this host listen. On Linux all of 127.0.0.0/8 exists;
# elsewhere there is only one address, which has no broadcast: one of the listeners gets a datagram.
LOOPBACK = '127.255.255.255' if sys.platform.startswith('linux') else '127.0.0.1'


class DiscoverySockets:
    """The UDP sockets of one process. They receive what is sent to `ports`, and send to the port
    `there` from the first of their own ports, at which the answers arrive. The loop's thread uses
    this class."""

    def __init__(self,
                 loop: Loop,
                 reach: str,
                 there: Iterable[int],
                 ports: Iterable[int],
                 on_datagram: Callable[[bytes, str, Callable[[bytes], None]], None],
                 multicast: bool = False) -> None:
        self._loop: Loop = loop
        self._reach: str = reach
        self._there: List[int] = sorted(set(there))
        self._multicast: bool = multicast
        self.listeners: List[UdpListener] = []
        self.error = ''
        self._first = min(ports)
        for number in self._heard(reach, ports) if reach != 'off' else ():
            # A socket that is bound to its broadcast address receives what is sent to this machine
            # as a whole, and nothing else.
            if reach == 'lan':
                host = ''
            elif number:
                host = LOOPBACK
            else:
                host = '127.0.0.1'
            hosts = [(socket.AF_INET, host)]
            if reach == 'lan' and socket.has_ipv6:
                hosts.append((socket.AF_INET6, '::'))
            for family, host in hosts:
                try:
                    listener = UdpListener(family, host, number, on_datagram, multicast)
                except OSError as exc:
                    # The port is used by a program that does not share it, or there is no such
                    # family here
                    if family == socket.AF_INET:
                        self.error = 'UDP port %d cannot be used: %s' % (number, exc.strerror)
                    continue
                listener.speaks = number == self._first
                self.listeners.append(listener)
                loop.add_reader(listener.socket, listener.on_readable)

    @staticmethod
    def _heard(reach: str, ports: Iterable[int]) -> List[int]:
        """Return the ports at which to listen. If only one of several listeners at a port of the
        loopback interface receives a datagram, the listener must be a node: a process that asks
        from another port does not listen there."""
        numbers = sorted(set(ports))
        if reach == 'loopback' and LOOPBACK == '127.0.0.1' and not numbers[0]:
            return [0]
        return numbers

    def broadcast(self, build: Callable[[], bytes]) -> None:
        """Send the datagram that `say` returns to all hosts within reach, by IPv4 and IPv6. Each
        family gets a new datagram, so that a host with both answers by both."""
        for listener in self.listeners:
            if listener.speaks:
                data = build()
                for port in self._there:
                    self._send_everywhere(listener, data, port)

    def _send_everywhere(self, listener: UdpListener, data: bytes, port: int) -> None:
        if listener.address_family == socket.AF_INET6:
            targets: List[tuple] = [(GROUP6, port, 0, index) for index in interfaces()]
        else:
            hosts = {LOOPBACK}
            if self._reach == 'lan':
                broadcasts = set()
                for broadcast in own_addresses().values():
                    if broadcast:
                        broadcasts.add(broadcast)
                hosts |= broadcasts or {'255.255.255.255'}
            in_order = sorted(hosts)
            targets = [(host, port) for host in in_order]
        for target in targets:
            with contextlib.suppress(OSError):   # the interface is down, or does not support it
                listener.socket.sendto(data, target)
        if not self._multicast:
            return
        if listener.address_family != socket.AF_INET:
            return
        for address in own_addresses() or ('0.0.0.0',):
            with contextlib.suppress(OSError):   # as above
                listener.socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF,
                                           socket.inet_aton(address))
                listener.socket.sendto(data, (GROUP4, port))

    def close(self) -> None:
        """Stop listening. Does nothing the second time."""
        for listener in self.listeners:
            self._loop.remove_reader(listener.socket)
            listener.server_close()
        self.listeners = []


# ==================================================================================================
# Part II: the node
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# What a node decides: events in, actions out. Nothing here opens a socket, reads a clock, takes a
# lock or touches a file.
# --------------------------------------------------------------------------------------------------

class Lease(enum.Enum):
    """A client's hold on this node."""
    FREE = 'free'
    HELD = 'held'
    ORPHANED = 'orphaned'


LEASE_TABLE = {
    (Lease.FREE, 'taken'): Lease.HELD,
    (Lease.HELD, 'taken'): Lease.HELD,
    (Lease.ORPHANED, 'taken'): Lease.HELD,
    (Lease.HELD, 'broken'): Lease.ORPHANED,
    (Lease.ORPHANED, 'broken'): Lease.ORPHANED,
    (Lease.HELD, 'ended'): Lease.FREE,
    (Lease.ORPHANED, 'ended'): Lease.FREE,
}
# (before, after) -> the text for the log
LEASE_TEXT = {
    (Lease.FREE, Lease.HELD): 'this node is held by {}',
    (Lease.HELD, Lease.ORPHANED): 'the connection of {} has ended; it holds this node still',
    (Lease.ORPHANED, Lease.HELD): 'this node is held by {}, which is back',
    (Lease.HELD, Lease.FREE): 'this node is free: {} has no computation here any more',
    (Lease.ORPHANED, Lease.FREE): 'this node is free: {} has no computation here any more',
}


class Stage(enum.Enum):
    """The progress of a computation on this node."""
    PREPARING = 'preparing'    # its directory is being made, files are being compared
    RECEIVING = 'receiving'    # files are coming
    STARTING = 'starting'      # the runner loads code and runs setup
    READY = 'ready'
    ENDING = 'ending'          # running jobs are killed, to know which attempts had begun
    CLOSING = 'closing'        # workers end, cleanup runs


STAGE_TABLE = {
    (Stage.PREPARING, 'missing'): Stage.RECEIVING, (Stage.PREPARING, 'complete'): Stage.STARTING,
    (Stage.RECEIVING, 'complete'): Stage.STARTING, (Stage.STARTING, 'up'): Stage.READY,
    (Stage.PREPARING, 'close'): Stage.CLOSING, (Stage.RECEIVING, 'close'): Stage.CLOSING,
    (Stage.STARTING, 'close'): Stage.CLOSING, (Stage.READY, 'close'): Stage.CLOSING,
    (Stage.READY, 'end'): Stage.ENDING, (Stage.ENDING, 'close'): Stage.CLOSING,
}


class ForcedEnd(NamedTuple):
    """Why a computation ends while its jobs run: a reason (see REASONS) and a text for its client,
    and the outcome and text for the jobs that had begun."""
    code: str
    text: str
    outcome: Outcome
    job_text: str


# Events: what the node host tells the state
class LinkUp(NamedTuple):
    """An authenticated link was made; `instance` identifies the client's process."""
    link: int
    instance: bytes
    address: str


class LinkDown(NamedTuple):
    """A link has ended; `on_purpose` is true after a Bye."""
    link: int
    on_purpose: bool


class Received(typing.NamedTuple):
    """A message was received."""
    link: int
    message: Any


class DirectoryReady(NamedTuple):
    """The directory exists, and these files are missing, as in Need; or it cannot be used, and
    `error` says why."""
    comp: str
    missing: list
    error: str = ''
    code: str = 'transfer'   # of REASONS


class Wanted(NamedTuple):
    """This answers WantAgain: these files are still missing, as in Need."""
    comp: str
    missing: list


class ValueSought(NamedTuple):
    """This answers FetchValue: the value is missing, as in Need, or it is present, or the text says
    why it is not available."""
    comp: str
    digest: bytes
    missing: list
    error: str = ''


class FileWritten(NamedTuple):
    """A file is complete, or could not be stored. `complete`: all files that were requested with
    the code are present."""
    file: FileStored
    complete: bool
    code: str = 'transfer'   # of REASONS


class SpoolFound(NamedTuple):
    """A daemon that starts has found results of a computation on the disk, and knows when they
    expire."""
    comp: str
    owner: bytes
    serials: list
    until: float
    digest: bytes = bytes(KEY_SIZE)


class Remembered(NamedTuple):
    """A daemon that starts has read what is known of earlier attempts of a computation."""
    comp: str
    past: AttemptHistory


class ResultsSpooled(NamedTuple):
    """Results were written to the disk or, if there is a text, could not be written."""
    comp: str
    serials: list
    error: str = ''


class RunnerUp(NamedTuple):
    """A runner has loaded the code, and setup has returned; `notes` are for the client's log."""
    comp: str
    notes: Sequence[str] = ()


class EndWanted(NamedTuple):
    """The cleanup of a computation has called dispynode_shutdown()."""
    comp: str


class RunnerGone(NamedTuple):
    """The runner has ended or never became ready; `text` says why, and is empty if it was told to
    end. `unloadable`: the code of the computation cannot even be loaded here. `begun`: the serials
    that its workers are known to have begun; None means that the first attempt in the queue of a
    worker may have begun. `code`: see REASONS."""
    comp: str
    text: str
    unloadable: bool = False
    begun: Optional[FrozenSet[int]] = None
    code: str = 'setup'


class WorkerResults(typing.NamedTuple):
    """One worker sends results: rows as in Results."""
    worker: int
    rows: list


class WorkerFile(NamedTuple):
    """A job sends a piece of a file."""
    worker: int
    piece: FilePiece


class WorkerWants(NamedTuple):
    """A job needs modules that are not on this host: a bundle by its number, or a module by its
    name."""
    worker: int
    serial: int
    request: Any


class Fetched(NamedTuple):
    """This answers Fetch: these files are missing, or all are present, or the text says why they
    are not available."""
    comp: str
    missing: list
    error: str = ''


class WorkerPrinted(NamedTuple):
    """A job has printed something, or has made a log record (stream 0)."""
    worker: int
    serial: int
    stream: int
    offset: int
    data: Any


class WorkerReturnedJobs(NamedTuple):
    """A worker has returned the attempts that it had not started."""
    worker: int
    serials: list


class WorkerGone(NamedTuple):
    """The process of a worker has ended while it ran the attempt `running` (0: none)."""
    worker: int
    text: str
    running: int = 0
    stdout: Buffer = b''
    stderr: Buffer = b''


class WorkerLeft(NamedTuple):
    """The process of a worker that had resources, and that was told to end, has ended."""
    worker: int


class WorkerStartFailed(NamedTuple):
    """A worker could not be started, for example because no descriptors were left."""
    worker: int
    text: str


class WorkerInitialized(NamedTuple):
    """A worker is ready, because the initializer has returned in it; or the initializer has failed
    with this text."""
    worker: int
    error: str


class Faulted(NamedTuple):
    """A fault of this program concerns this computation, which cannot continue here."""
    comp: str
    text: str


class MemoryExceeded(NamedTuple):
    """A job has used more memory than its limit; its worker is being killed."""
    worker: int
    serial: int


class WorkerOverdue(NamedTuple):
    """The job of a worker has exceeded its time limit, and the runner ends it, because this loop
    had no turn in the meantime."""
    worker: int
    serial: int


class JobSeen(NamedTuple):
    """A runner has inspected the job of a worker, as Look requests. All fields are empty if the
    worker does not run this job any more."""
    worker: int
    serial: int
    stacks: str
    stdout: bytes
    stderr: bytes


class Stop(NamedTuple):
    """The daemon shall end."""


class Finish(NamedTuple):
    """The daemon shall take no new jobs, and end when its jobs have ended."""


class CallSoon(NamedTuple):
    """A function is to be called in the thread of the loop."""
    call: Callable[[], None]


class Pause(NamedTuple):
    """This authority ('operator', 'hours') wants no new jobs to begin until it says Resume. Running
    jobs go on, or are ended too."""
    by: str
    text: str
    end: bool = False


class Resume(NamedTuple):
    """An authority withdraws its Pause; the node takes jobs again when no authority has paused
    it."""
    by: str


class SetCpus(NamedTuple):
    """The node shall offer this many CPUs from now on; running jobs that exceed the number go
    on."""
    cpus: int


class Release(NamedTuple):
    """The node shall be taken from the client that holds it."""


class Status(NamedTuple):
    """The status of the node is requested. PrintStatus answers it."""


# Actions: what the state tells the node host to do
class Send(typing.NamedTuple):
    """Send a message on a link."""
    link: int
    message: Any


class Broken(NamedTuple):
    """The state has raised an exception because of a computation. The answer is Faulted."""
    comp: str
    error: BaseException


class SpoolResults(NamedTuple):
    """Write results, as rows of Results of a client, to the disk. The answer is ResultsSpooled."""
    comp: str
    owner: bytes
    rows: list
    digest: bytes = bytes(KEY_SIZE)


class SendSpooled(NamedTuple):
    """Send results from the disk, as the link has room for them."""
    link: int
    comp: str


class Forget(NamedTuple):
    """Remove results from the disk."""
    comp: str


class Remember(NamedTuple):
    """Write down what is known of attempts that are not held any more; if the history is empty,
    nothing is to be remembered."""
    comp: str
    past: AttemptHistory


class NoteOverrun(NamedTuple):
    """So many results are not acknowledged that the notes of which attempts have begun do not reach
    back to the first of them."""
    comp: str


class Drop(NamedTuple):
    """Close a link after everything was sent on it."""
    link: int
    text: str


class PrepareDirectory(NamedTuple):
    """Make the directory of a computation and compare its files. The answer is DirectoryReady."""
    comp: str
    spec: dict


class WantAgain(NamedTuple):
    """Drop incomplete files, because the connection on which they came has ended. The answer is
    Wanted."""
    comp: str


class WriteFile(NamedTuple):
    """Write a piece of a file. The answer is FileWritten when the file is complete or cannot be
    stored."""
    piece: FilePiece


class Fetch(NamedTuple):
    """Find out which of these files of modules are missing. The answer is Fetched."""
    comp: str
    rows: list


class StartRunner(NamedTuple):
    """Start the process that loads the code. The answer is RunnerUp or RunnerGone."""
    comp: str
    spec: dict
    link: int


class StopRunner(NamedTuple):
    """End a runner and its workers, with cleanup unless `at_once`; remove the directory. The answer
    is RunnerGone."""
    comp: str
    at_once: bool


class StartWorker(NamedTuple):
    """Start a worker. Attempts may be sent to it immediately. WorkerGone reports its end."""
    worker: int
    comp: str


class Equip(NamedTuple):
    """Give the worker that will be started the resource units with these numbers, by the name of
    the resource."""
    worker: int
    comp: str
    units: Dict[str, List[int]]


class SendToWorker(typing.NamedTuple):
    """Send attempts to a worker."""
    worker: int
    attempts: list


class Interrupt(NamedTuple):
    """Raise KeyboardInterrupt in the job, if the worker still runs it."""
    worker: int
    serial: int


class Look(NamedTuple):
    """Inspect what a job has printed last and, if requested, the stacks of its process. The answer
    is JobSeen."""
    worker: int
    serial: int
    stacks: bool


class LimitMemory(NamedTuple):
    """Kill the worker if this job uses more than so many bytes of memory, and end the job if it
    runs for more than so many seconds; 0 means no limit. The answers are MemoryExceeded and
    WorkerOverdue."""
    worker: int
    serial: int
    most: int
    seconds: float = 0.0


class Kill(NamedTuple):
    """Kill the process group and the descendants of a worker. The answer is WorkerGone."""
    worker: int


class TakeFromWorker(NamedTuple):
    """Ask a worker to return the attempts that it has not started. The answer is
    WorkerReturnedJobs."""
    worker: int


class AnswerJobFile(NamedTuple):
    """Tell a worker whether the client has stored the file that its job has sent."""
    worker: int
    error: str


class Retire(NamedTuple):
    """Let an idle worker end."""
    worker: int


class PrintStatus(NamedTuple):
    """Show a text at the terminal."""
    text: str


class Exit(NamedTuple):
    """End the loop, because nothing is left to do."""


RELEASED_TEXT = 'its operator has released it from this client'
NO_FORK = 'worker processes cannot be started with fork here: this system does not have it. Use ' \
    "start_method='spawn', or no start_method"


def can_fork() -> bool:
    """Return whether worker processes can be forked here."""
    return hasattr(os, 'fork')


def default_start_method() -> str:
    """Return how workers are started if nothing else is requested. On macOS a process that has used
    system frameworks must not be forked, since its child would be killed. Raises StartError."""
    given = os.environ.get('DISPY_START_METHOD', '')
    if given not in ('', FORK, SPAWN):
        raise StartError('DISPY_START_METHOD=%.40s in the environment must be fork or spawn'
                         % given)
    if given:
        return given
    if can_fork() and sys.platform != 'darwin':
        return FORK
    return SPAWN


ENDING_TEXT = {   # with what the job's options say
    Outcome.CANCELLED: 'cancelled while it ran',
    Outcome.TIMED_OUT: 'it exceeded its time limit (dispy_timeout) of %(timeout)s s and was ended',
    Outcome.OUT_OF_MEMORY: 'it used more memory than its limit (dispy_memory) of %(memory)s bytes, '
                           'and was killed',
    Outcome.STOPPED: 'the node was stopped, or released from this client, while the job was '
                     'running',
}


class Attempt:
    """One attempt to run a job on this node."""
    __slots__ = ('serial', 'payload', 'cpus', 'timeout', 'memory', 'priority', 'ending', 'comp',
                 'counted', 'values', 'resources')

    def __init__(self, serial: int, payload: Payload, options: Optional[dict],
                 comp: '_Computation') -> None:
        self.serial = serial
        self.payload = payload
        self.comp = comp
        self.cpus = 1
        self.timeout: Optional[float] = None
        self.memory: Optional[float] = None
        self.priority: float = 0
        self.values: Sequence[Tuple[int, bytes]] = ()   # sizes and digests
        self.resources: Request = ()
        if options:
            self._take(options)
        self.ending: Optional[Outcome] = None   # why it is being ended, if it is
        self.counted = 0        # bytes of its arguments that are counted while it waits

    def _take(self, options: dict) -> None:
        self.cpus = options.get('cpus', 1)
        self.timeout = options.get('timeout')
        self.memory = options.get('memory')
        self.priority = options.get('priority', 0)
        self.values = options.get('values', ())
        self.resources = options.get('resources', ())

    def ending_text(self, ending: Outcome) -> str:
        """Return why the attempt was ended, with the number that it has exceeded."""
        return ENDING_TEXT.get(ending,
                               'it was to end') % {'timeout': self.timeout, 'memory': self.memory}


class _Worker:
    """A worker process as the pure state knows it; it runs the first attempt of its queue."""
    __slots__ = ('key', 'comp', 'queue', 'since', 'told', 'jobs_given', 'recalled',
                 'sending_file_on', 'stuck', 'pardoned', 'resources')

    def __init__(self, key: int, comp: '_Computation', resources: Request = ()) -> None:
        self.key = key
        self.comp = comp
        self.resources = resources   # which it keeps until it ends
        self.queue: Deque[Attempt] = collections.deque()
        self.since = 0.0        # when its job became the head, or when it became idle
        self.told = False       # the client was told that the head has begun
        self.pardoned = False   # the head began before another client came and is not charged
        self.jobs_given = 0            # jobs given to it
        self.recalled = False   # it was asked to return jobs, and has not answered
        # The link on which its job sends a file, or waits for the answer
        self.sending_file_on = 0
        # CPUs of a killed job that was reported as ended, until its process has ended
        self.stuck = 0

    def note_begun(self) -> None:
        """Note that its attempt has begun, which is to be reported to the client."""
        self.told = True
        serial = self.queue[0].serial
        self.comp.begun.append((serial, self.since))


class Spooled(NamedTuple):
    """Results on the disk: their owner, their serials, and when they expire if their computation
    has ended here."""
    owner: bytes
    serials: Set[int]
    until: float
    digest: bytes = bytes(KEY_SIZE)


class _Claim:
    """What a computation, or a client with all of its computations, has used of a shared node."""
    __slots__ = ('used', 'reckoned', 'seen', 'fresh')

    def __init__(self) -> None:
        self.used = 0.0          # CPU seconds of attempts that have ended
        self.reckoned = 0.0      # the same with running jobs, in a turn
        self.seen = -math.inf    # when it last had attempts while others had some
        self.fresh = True        # no attempt has begun since it came

    def rank(self) -> Tuple[bool, float]:
        """Return the sort key: the lowest is served next."""
        return not self.fresh, self.reckoned


class _Computation:
    """A computation that a client has on this node."""

    def __init__(self, comp: str, instance: bytes, link: int, spec: dict,
                 now: float = 0.0,
                 start_method: str = FORK) -> None:
        self.comp = comp
        self.instance = instance
        self.link = link
        self.spec = spec
        self.since = now        # when it came here
        client = spec.get('client', comp)
        self.client_name = str(client)[:NAME_MOST]
        # The name of its owner, for people
        self.user = str(spec.get('whose') or self.client_name)[:NAME_MOST]
        self.stage = Stage.PREPARING
        self.forced_end: Optional[ForcedEnd] = None
        self.waiting: Deque[Attempt] = collections.deque()   # by priority, then in order
        self.attempts: Dict[int, Attempt] = {}
        self.unacknowledged: Dict[int, tuple] = {}
        self.outbox: List[tuple] = []
        self.workers: Dict[int, _Worker] = {}
        self.idle: List[_Worker] = []
        self.has_idle_timer = False
        # Busy workers that may get more attempts
        self.refillable: Dict[int, _Worker] = {}
        self.estimate = DurationEstimate()
        # Jobs that a worker may hold behind the one that it runs
        self.handed = Allowance(self.estimate, 0, AHEAD_MOST)
        # Attempts behind running ones that the client has recalled
        self.steal_debt: Set[int] = set()
        # Attempts that have begun, with the times, to be reported to the client
        self.begun: List[Tuple[int, float]] = []
        # Consecutive workers that ended before their first job
        self.startup_failures = 0
        # Keys of workers that are not ready yet, because the initializer runs in them or they load
        # the computation; and whether there are such workers
        self.starting: Set[int] = set()
        initializer = spec.get('initializer')
        self.initializer = bool(initializer) or start_method == SPAWN
        self.digest = result_key(spec)
        jobs = spec.get('max_jobs')
        self.most = jobs or 0
        self.limit = spec['cpus']              # how many CPUs it may use at once; 0: all
        self.orphan_at = 0.0                   # when its results expire, if its link has ended
        # Questions to the client -> worker that waits for the answer
        self.calls: Dict[int, int] = {}
        self.asked = False                     # whether it has ever requested files
        # Workers, and the files that they wait for
        self.fetches: Deque[Tuple[int, list]] = collections.deque()
        # When it last got a CPU, as a counter of the node
        self.served = 0
        self.own = self.client = _Claim()      # see `FairShare`, which sets the second
        self.done = 0                          # attempts that have ended
        self.failed = 0                        # attempts that have ended without a result
        self.cpu_seconds = 0.0                 # for which its jobs have occupied CPUs
        # The notes of which attempts have begun do not reach back far enough
        self.overrun = False

    def __str__(self) -> str:
        """Return the name of the computation in the log."""
        return 'computation %s (%s)' % (self.spec['name'], self.comp)

    def move(self, event: str) -> None:
        """Enter the next stage."""
        self.stage = STAGE_TABLE[self.stage, event]

    def cpus_used(self) -> int:
        """Return how many CPUs it uses."""
        workers = self.workers.values()
        cpus = []
        for worker in workers:
            if worker.queue:
                cpus.append(worker.queue[0].cpus)
        return sum(cpus)

    def enqueue(self, attempt: Attempt, again: bool = False) -> None:
        """Let an attempt wait: after the others of its priority, or before them if it has waited
        already."""
        waiting = self.waiting
        if again and (not waiting or waiting[0].priority <= attempt.priority):
            waiting.appendleft(attempt)
        elif not again and (not waiting or waiting[-1].priority >= attempt.priority):
            waiting.append(attempt)
        else:
            if again:
                least = attempt.priority
            else:
                least = attempt.priority - 1
            waiting.insert(sum(other.priority > least for other in waiting), attempt)


class NodeTables:
    """The links, computations and workers of a node, which all of its parts look up, and the
    actions that the parts have decided in this call."""

    def __init__(self, name: str, start_method: str = FORK) -> None:
        self.name = name        # the name of the node, for texts
        self.start_method = start_method   # of workers, for computations that do not specify it
        self.now = 0.0          # the time of this call
        self.actions: List[Any] = []
        self.links: Dict[int, LinkUp] = {}
        self.comps: Dict[str, _Computation] = {}
        self.workers: Dict[int, _Worker] = {}
        self._client_names: Dict[int, str] = {}   # by link
        self._processes: Dict[int, tuple] = {}    # by link, see ClientHello

    def do(self, action: Any) -> None:
        """Add an action to those of this call."""
        self.actions.append(action)

    def reply(self, comp: _Computation, message: Any) -> None:
        """Send a message to the client of a computation, if it is connected."""
        if comp.link in self.links:
            self.do(Send(comp.link, message))

    def send(self, link: int, message: Any) -> None:
        """Send a message on a link."""
        self.do(Send(link, message))

    def ask_for_files(self, comp: _Computation, files: list) -> None:
        """Ask the client of a computation for files, rows as in Need."""
        comp.asked = True
        for need in needs(comp.comp, files):
            self.reply(comp, need)

    def comp_of(self, link: int, name: str) -> Optional[_Computation]:
        """Return the computation that a message names; None for one that has ended here, so that
        the message came too late."""
        comp = self.comps.get(name)
        if comp is not None:
            if comp.instance != self.links[link].instance:
                raise PeerError('computation %.40r is of another client' % name)
        if comp is not None:
            if comp.stage is not Stage.CLOSING:
                return comp
        return None

    def worker_at_work(self, key: int) -> Optional[_Worker]:
        """Return a worker; None if there is no such worker, or if its computation is being
        closed."""
        worker = self.workers.get(key)
        if worker is None:
            return None
        if worker.comp.stage is Stage.CLOSING:
            return None
        return worker

    def name_client(self, link: int, name: str, process: tuple) -> None:
        """Note the name that the client on a link has given, and its process: a row as in
        ClientHello."""
        self._client_names[link] = name
        self._processes[link] = process

    def process_at(self, link: int) -> tuple:
        """Return the row that identifies the process of the client on a link; empty if the client
        has not sent it."""
        return self._processes.get(link, ())

    def client_at(self, link: int) -> str:
        """Return the name of the client on a link, or its address."""
        address = self.links[link].address
        return self._client_names.get(link, address)

    def remove_link(self, link: int) -> Optional[LinkUp]:
        """Forget a link. Returns the entry that it had."""
        self._client_names.pop(link, None)
        self._processes.pop(link, None)
        return self.links.pop(link, None)

    def guarded(self, comp: str, call: Callable[..., None], *args: Any) -> None:
        """Call a function for a computation, which alone ends if the function raises."""
        try:
            call(*args)
        except Exception as exc:  # a fault of dispy; the node host logs it and sends Faulted
            action = Broken(comp, exc)
            self.do(action)


class Timer(NamedTuple):
    """A call that is due at some time, `call(*args, now)`; the computation to which it belongs, and
    whether `is_wanted(*args)` is still true."""
    when: float
    number: int     # timers of the same time are due in the order in which they were set
    comp: str
    call: Callable[..., None]
    args: tuple
    is_wanted: Callable[..., bool]


class Timers:
    """The calls that are due at some time."""

    def __init__(self) -> None:
        self.next_at = math.inf     # when the first is due
        self._heap: List[Timer] = []
        self._numbers = itertools.count()
        self._most = 64             # the number after which they are searched

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Timer]:
        return iter(self._heap)

    def at(self, when: float, comp: str, call: Callable[..., None], *args: Any,
           is_wanted: Callable[..., bool]) -> None:
        """Have `call(*args, now)` called at this time."""
        if len(self._heap) >= self._most:   # removes those of attempts that have ended
            self._heap = [timer for timer in self._heap if timer.is_wanted(*timer.args)]
            heapq.heapify(self._heap)
            self._most = 2 * len(self._heap) + 64
        number = next(self._numbers)
        timer = Timer(when, number, comp, call, args, is_wanted)
        heapq.heappush(self._heap, timer)
        self.next_at = self._heap[0].when

    def pop(self) -> Timer:
        """Remove the first timer and return it."""
        timer = heapq.heappop(self._heap)
        if self._heap:
            self.next_at = self._heap[0].when
        else:
            self.next_at = math.inf
        return timer


class Cpus:
    """The number of CPUs that a node offers, of those that it may use, and of those that are
    free."""

    def __init__(self, count: int) -> None:
        self.offered = count
        # It exceeds the offer while a computation wants more processes than there are CPUs
        self.total = count
        self.most = count       # the maximum of `total`
        self.free = count

    def resize(self, limits: Iterable[int]) -> None:
        """Set the number of CPUs that may be used: those offered, or as many as the client has
        allocated to a computation."""
        total = max([self.offered, *limits])
        self.free += total - self.total
        self.total = total
        self.most = max(total, self.most)


class Units:
    """Units of the node's resources, and which worker has which of them. A worker is started with
    the units that its first job needs, and keeps them until its process has ended: libraries that
    use a device determine only once which devices they may use, and do not free what they have
    allocated there."""

    def __init__(self, offer: Dict[str, int]) -> None:
        """`offer`: how many units of each resource there are. They are numbered from 0."""
        self._offer = offer
        self._free = {name: list(range(count)) for name, count in offer.items()}
        # Worker -> its computation and its units
        self._taken: Dict[int, Tuple[str, Dict[str, List[int]]]] = {}

    def lack(self, request: Request, where: str) -> str:
        """Return why these units are never available here; empty if they can be."""
        for name, count in request:
            there = self._offer.get(name, 0)
            if count > there:
                return 'the job wants %d %s (dispy_resources) and %s has %d' % (
                    count, name, where, there)
        return ''

    def are_free(self, request: Request) -> bool:
        """Return whether a worker can be started with these units now."""
        return all(len(self._free.get(name, ())) >= count for name, count in request)

    def take(self, worker: int, comp: str, request: Request) -> Dict[str, List[int]]:
        """Give free units to a worker. Returns their numbers by the name of the resource."""
        units: Dict[str, List[int]] = {}
        for name, count in request:
            free = self._free[name]
            units[name] = free[:count]
            del free[:count]
        self._taken[worker] = comp, units
        return units

    def release(self, worker: int) -> None:
        """Free the units of a worker, because its process has ended or was never made."""
        _, units = self._taken.pop(worker, ('', {}))
        for name, taken in units.items():
            # The first units are used first, so that few jobs use few devices
            self._free[name] = sorted(self._free[name] + taken)

    def release_all(self, comp: str) -> None:
        """Free the units of a computation, because all of its processes have ended."""
        for worker in [worker for worker, (other, _) in self._taken.items() if other == comp]:
            self.release(worker)


class ResourceWorkers:
    """Workers that have resources. They run the jobs that ask for the same resources."""

    def __init__(self, tables: NodeTables, units: Units,
                 make: Callable[['_Computation', Request], _Worker],
                 remove: Callable[[_Worker], None]) -> None:
        """`make` makes a worker; `remove` forgets one."""
        self._tables = tables
        self._units = units
        self._make = make
        self._remove = remove
        self._idle: List[_Worker] = []

    def worker_for(self, comp: _Computation, request: Request, may_make: bool) -> Optional[_Worker]:
        """Return a worker with these resources for a job of a computation; None if there is none
        now: one is being started, or idle workers that have the units are being ended first."""
        for worker in self._idle:
            if worker.comp is comp and worker.resources == request:
                self._idle.remove(worker)
                return worker
        for key in comp.starting:
            if comp.workers[key].resources == request:
                return None
        if not self._units.are_free(request):
            self._end_idle(request)
            return None
        if not may_make:
            return None
        worker = self._make(comp, request)
        if comp.initializer:   # it gets attempts when it is ready
            comp.starting.add(worker.key)
            return None
        return worker

    def equip(self, worker: _Worker) -> None:
        """Give units to a worker that is about to be started."""
        name = worker.comp.comp
        units = self._units.take(worker.key, name, worker.resources)
        self._tables.do(Equip(worker.key, name, units))

    def _end_idle(self, request: Request) -> None:
        """End idle workers that have units of these resources."""
        names = {name for name, _ in request}
        for worker in list(self._idle):
            if names.intersection(name for name, _ in worker.resources):
                self.retire(worker)

    def retire(self, worker: _Worker) -> None:
        """Let an idle worker end."""
        self._remove(worker)
        action = Retire(worker.key)
        self._tables.do(action)

    def idle(self, worker: _Worker) -> None:
        """Note that a worker is idle."""
        self._idle.append(worker)

    def idle_of(self, comp: _Computation) -> List[_Worker]:
        """Return the idle workers of a computation."""
        return [worker for worker in self._idle if worker.comp is comp]

    def removed(self, worker: _Worker) -> None:
        """Note that a worker was forgotten. Its units are free when its process has ended."""
        if worker in self._idle:
            self._idle.remove(worker)

    def drop(self, comp: _Computation) -> None:
        """Forget the workers of a computation that is being closed: they get no more work."""
        self._idle = [worker for worker in self._idle if worker.comp is not comp]

    def on_worker_left(self, event: 'WorkerLeft', now: float) -> None:
        """Free the units of a worker that was told to end, because its process has ended."""
        self._units.release(event.worker)


class NodeLease:
    """Which client holds the node, since when, and which others wait for the node."""

    def __init__(self, serve: int, client_shutdown: bool) -> None:
        """`serve`: the node ends after this many leases; 0 means that it does not.
        `client_shutdown`: a client may request that the node ends with its lease."""
        self.state = Lease.FREE
        self.holder: Optional[bytes] = None
        self.holder_text = ''
        self._process: tuple = ()   # the holder's, see ClientHello
        self.served = 0             # leases that have ended
        self._serve = serve
        self._client_shutdown = client_shutdown
        self._is_last = False       # the present lease is the last
        self._held_since = 0.0
        self._refused: Set[int] = set()     # links that were refused because another holds the node
        # Client from which the node was taken; when it may use the node again
        self._cooldown: Tuple[Optional[bytes], float] = (None, 0.0)

    def _move(self, event: str, holder: Optional[bytes], text: str) -> None:
        before = self.state
        self.state = LEASE_TABLE[self.state, event]
        if before is not self.state:
            text_of_move = LEASE_TEXT[before, self.state]
            logger.info('%s', text_of_move.format(text or self.holder_text or 'a client'))
        self.holder = holder
        self.holder_text = text

    def take(self, holder: bytes, text: str, now: float, process: tuple = ()) -> None:
        """Note that a client holds the node from now on, or that the holder is connected again."""
        self._process = process
        if self.state is Lease.FREE:
            self._cooldown = (None, 0.0)
            self._held_since = now
        self._move('taken', holder, text)

    def orphan(self) -> None:
        """Note that no link of the holder is left."""
        self._move('broken', self.holder, self.holder_text)

    def end(self) -> None:
        """Note that the holder has no computation here any more."""
        self._move('ended', None, '')
        self.served += 1

    def is_of_another(self, instance: bytes) -> bool:
        """Return whether another client than this one holds the node."""
        if self.state is Lease.FREE:
            return False
        return self.holder != instance

    def held_by(self, now: float) -> str:
        """Return who holds the node and for how long, for people; empty if it is free."""
        if self.state is Lease.FREE:
            return ''
        return '%s for %.0f s%s' % (self.holder_text or 'another client', now - self._held_since,
                                    '; its connection is lost'
                                    if self.state is Lease.ORPHANED else '')

    def holder_row(self) -> tuple:
        """Return the holder as a row of Holder; empty if it has not identified its process."""
        if not self._process:
            return ()
        return (*self._process, self.state is Lease.ORPHANED)

    def refuse(self, link: int) -> None:
        """Note that a client was refused because another holds the node."""
        self._refused.add(link)

    def take_refused(self) -> Set[int]:
        """Return the links of clients that were refused for this reason, each once, and forget
        them."""
        refused = self._refused
        self._refused = set()
        return refused

    def forget_link(self, link: int) -> None:
        """Note that a link has ended."""
        self._refused.discard(link)

    def cool_down(self, until: float) -> None:
        """Take the node from its holder, which may not get it again before this time."""
        self._cooldown = (self.holder, until)

    def is_cooling_down(self, instance: bytes, now: float) -> bool:
        """Return whether the node was taken from this client, which may not get it yet."""
        holder, until = self._cooldown
        if holder != instance:
            return False
        return now < until

    def make_last(self) -> bool:
        """Note that the client wants the node to end with its lease. Returns whether the node will
        do so."""
        self._is_last = self._client_shutdown
        return self._is_last

    def was_last(self) -> bool:
        """Return whether the node ends with the lease that has ended."""
        return self._is_last or self.served == self._serve


class PastAttempts:
    """What is known, for each computation, of attempts that are not held any more."""

    def __init__(self, tables: NodeTables, timers: Timers) -> None:
        self._tables = tables
        self._timers = timers
        self._known: Dict[str, AttemptHistory] = {}

    def row(self, name: str) -> tuple:
        """Return what is known in the form that messages carry."""
        if name in self._known:
            return self._known[name].row()
        return ()

    def on_remembered(self, event: Remembered, now: float) -> None:
        """Take over what an earlier daemon has written down."""
        self._known[event.comp] = event.past
        self._set_timer(event.comp, now)

    def add(self, name: str, past: AttemptHistory) -> None:
        """Add to what is known of attempts that are not held any more."""
        tables = self._tables
        if name not in self._known:
            self._set_timer(name, tables.now)
        self._known[name] = self._known.get(name, AttemptHistory()).and_also(past)
        action = Remember(name, self._known[name])
        tables.do(action)

    def forget(self, name: str) -> None:
        """Forget a computation, because its client needs it no longer."""
        if self._known.pop(name, None) is not None:
            action = Remember(name, AttemptHistory())
            self._tables.do(action)

    def _set_timer(self, name: str, now: float) -> None:
        when = now + PAST_TIME
        self._timers.at(when, name, self._expired, name, is_wanted=self._is_known)

    def _is_known(self, name: str) -> bool:
        return name in self._known

    def _expired(self, name: str, now: float) -> None:
        self.forget(name)


class UndeliveredResults:
    """Results that their clients have not acknowledged. While the client of a computation is
    connected, they are in memory, with the computation; while the client is away, they are on the
    disk, until the client comes back or --zombie-interval has passed."""

    def __init__(self, tables: NodeTables, timers: Timers, past: PastAttempts,
                 zombie: float) -> None:
        self._tables = tables
        self._timers = timers
        self._past = past
        self._zombie = zombie
        # Computation -> results on the disk, including those of computations that have ended here
        self.spooled: Dict[str, Spooled] = {}
        # Computation -> attempts whose results are being written to the disk
        self._on_their_way: Dict[str, AbstractSet[int]] = {}
        self._disk_full = False                 # this was reported
        # Links on which results of a computation were sent again
        self._resent: Set[Tuple[int, str]] = set()
        # Links on which the key of a computation was shown
        self._key_shown: Set[Tuple[int, str]] = set()

    def deliver(self, comp: _Computation) -> None:
        """Send the results that were not sent; if the client is away, write them to the disk."""
        tables = self._tables
        if comp.outbox and comp.link in tables.links:
            tables.do(Send(comp.link, Results(comp.comp, comp.outbox)))
            comp.outbox = []
        elif comp.outbox:
            self.spool(comp)

    def spool(self, comp: _Computation) -> None:
        """Write the results that nobody has acknowledged to the disk."""
        comp.outbox = []
        on_their_way = self._on_their_way.get(comp.comp, frozenset())
        rows = [row for serial, row in comp.unacknowledged.items() if serial not in on_their_way]
        if rows:
            self._on_their_way[comp.comp] = set(comp.unacknowledged)
            self._tables.do(SpoolResults(comp.comp, comp.instance, rows, comp.digest))

    def spooling_failed(self, event: ResultsSpooled) -> None:
        """Note that there is no room on the disk: results stay in memory, and writing them is tried
        again. Those of a computation that has ended are lost, and it is noted that their jobs had
        begun."""
        comp = self._tables.comps.get(event.comp)
        serials = self._on_their_way.pop(event.comp, set())
        if serials and (comp is None or comp.stage is Stage.CLOSING):
            text = 'node %s could not keep its result: %s' % (self._tables.name, event.error)
            lost = frozenset(serials)
            self._past.add(event.comp, AttemptHistory(given_up=lost, text=text))
        if not self._disk_full:
            logger.error(
                'results cannot be kept on the disk: %s; they stay in memory until they can',
                event.error)
        self._disk_full = True

    def on_spooled(self, event: ResultsSpooled, now: float) -> None:
        """Note that results are on the disk, or could not be written."""
        comp = self._tables.comps.get(event.comp)
        self._on_their_way.pop(event.comp, None)
        self._disk_full = False
        if comp is not None:
            for serial in event.serials:
                comp.unacknowledged.pop(serial, None)
        spooled = self.spooled.get(event.comp)
        if spooled is None:
            if comp is not None:
                spooled = Spooled(comp.instance, set(), 0.0, comp.digest)
            else:
                spooled = Spooled(b'', set(), 0.0)
            when = now + self._zombie
            self._expire_at(when, event.comp)
        spooled.serials.update(event.serials)
        until = now + self._zombie
        self.spooled[event.comp] = spooled._replace(until=until)

    def on_found(self, event: SpoolFound, now: float) -> None:
        """Note that an earlier daemon has left results on the disk."""
        serials = set(event.serials)
        self.spooled[event.comp] = Spooled(event.owner, serials, event.until, event.digest)
        self._expire_at(event.until, event.comp)

    def forget(self, name: str) -> None:
        """Remove results of a computation from the disk."""
        if self.spooled.pop(name, None) is not None:
            action = Forget(name)
            self._tables.do(action)

    def note_key(self, link: int, name: str) -> None:
        """Note that the client on a link has shown the key of a computation."""
        self._key_shown.add((link, name))

    def may_forget(self, link: int, name: str) -> bool:
        """Return whether the client on a link may have results of a computation removed: they are
        its own, or it has shown their key."""
        spooled = self.spooled.get(name)
        if spooled is None:
            return True
        if (link, name) in self._key_shown:
            return True
        instance = self._tables.links[link].instance
        return spooled.owner == instance

    def spooled_serials(self, name: str) -> AbstractSet[int]:
        """Return the serials of those attempts of a computation whose results are on the disk."""
        spooled = self.spooled.get(name)
        if spooled is not None:
            return spooled.serials
        return frozenset()

    def spooled_of(self, instance: bytes) -> List[str]:
        """Return the computations of a client that have results on the disk."""
        return [name for name, spooled in self.spooled.items() if spooled.owner == instance]

    def known_attempts(self, name: str) -> List[int]:
        """Return the serials of all attempts of a computation that are known here."""
        comp = self._tables.comps.get(name)
        spooled = self.spooled.get(name)
        if comp is not None and comp.stage is not Stage.CLOSING:
            known = [*comp.attempts, *comp.unacknowledged]
        else:
            known = []
        if spooled is not None:
            serials = sorted(spooled.serials)
        else:
            serials = []
        return known + serials

    def give_to(self, name: str, instance: bytes) -> None:
        """Make this client the owner of results on the disk."""
        if name in self.spooled:
            self.spooled[name] = self.spooled[name]._replace(owner=instance)

    def has_key(self, name: str, key: bytes) -> bool:
        """Return whether this is the key of the results that are on the disk."""
        spooled = self.spooled.get(name)
        if spooled is None:
            return False
        return hmac.compare_digest(spooled.digest, key)

    def resend(self, name: str, link: int) -> None:
        """Send all results that the client has not acknowledged, once on each link; the client may
        have some of them already."""
        tables = self._tables
        if (link, name) in self._resent:
            return
        self._resent.add((link, name))
        comp = tables.comps.get(name)
        if comp is not None and comp.unacknowledged:
            rows = list(comp.unacknowledged.values())
            tables.send(link, Results(name, rows))
        if comp is not None:
            comp.outbox = []
        if name in self.spooled:
            action = SendSpooled(link, name)
            tables.do(action)

    def forget_link(self, link: int) -> None:
        """Note that a link has ended."""
        self._resent = {(other, name) for other, name in self._resent if other != link}
        self._key_shown = {row for row in self._key_shown if row[0] != link}

    def on_ack(self, link: int, message: Ack, now: float) -> None:
        """Forget these results, because the client has them."""
        tables = self._tables
        comp = tables.comp_of(link, message.comp)
        spooled = self.spooled.get(message.comp)
        if comp is not None:
            for serial in message.serials:
                comp.unacknowledged.pop(serial, None)
        if spooled is None:
            return
        if spooled.owner != tables.links[link].instance:
            return
        spooled.serials.difference_update(message.serials)
        if not spooled.serials:
            self.forget(message.comp)

    def _expire_at(self, when: float, name: str) -> None:
        self._timers.at(when, name, self._expire, name, is_wanted=self._is_spooled)

    def _is_spooled(self, name: str) -> bool:
        return name in self.spooled

    def _expire(self, name: str, now: float) -> None:
        tables = self._tables
        if name not in self.spooled:
            return
        if name not in tables.comps:
            until = self.spooled[name].until
        else:
            until = now + max(self._zombie, 1.0)
        if now < until:
            self._expire_at(until, name)
            return
        serials = self.spooled[name].serials
        logger.warning(
            '%d results of a computation are discarded, because its client has not reconnected in '
            'time (--zombie-interval)', len(serials))
        distinct_serials = frozenset(serials)
        text = 'node %s gave up its result after %g s (--zombie-interval)' % (tables.name,
                                                                              self._zombie)
        expired = AttemptHistory(given_up=distinct_serials, text=text)
        self._past.add(name, expired)
        self.forget(name)


class Attempts:
    """Attempts from their arrival until their results exist or they are returned, and what they
    need while they wait: memory for their arguments, and values."""

    def __init__(self, tables: NodeTables, cpus: Cpus, past: PastAttempts,
                 results: UndeliveredResults, share: 'FairShare', units: Units) -> None:
        self._units = units
        self._tables = tables
        self._cpus = cpus
        self._past = past
        self._results = results
        self._share = share
        self.refuses_new = False    # new attempts are returned
        self.held_bytes = 0         # bytes of arguments of waiting attempts
        self._in_parts: List[Attempt] = []      # attempts whose arguments came in parts
        self.values = ValueRequests(VALUES_KEPT)

    # -- coming ------------------------------------------------------------------------------------

    def on_jobs(self, link: int, message: Jobs, now: float) -> None:
        """Take attempts that have come; those that are known here have come before."""
        rows = message.rows
        tables = self._tables
        comp = tables.comp_of(link, message.comp)
        # Another connection has replaced this one, and has reported what had come
        if comp is None:
            return
        if comp.link != link:
            return
        if self._refuses_jobs(comp):
            self._return_all(comp, message)
            return
        is_large = len(rows) == 1 and size_of(rows[0][1]) > BATCH_BYTES
        if is_large:
            text = 'on node %s' % tables.name
            unfit = over_limit_here(message, text)
            if unfit is not None:
                self.on_unfit(link, unfit, now)
                return
        if not comp.attempts:
            self._share.returns(comp, now)
        self._take(comp, rows)
        if is_large:
            self._note_parts(comp, rows[0])

    def _take(self, comp: _Computation, rows: Sequence[tuple]) -> None:
        """Accept attempts that are not known here."""
        spooled = self._results.spooled_serials(comp.comp)
        for serial, payload, options in rows:
            if serial in comp.attempts:
                continue
            if serial in comp.unacknowledged:
                continue
            if serial in spooled:
                continue
            attempt = Attempt(serial, payload, options, comp)
            if attempt.cpus > self._cpus.most or attempt.resources:
                text = self._lack(attempt)
                if text:
                    row = (serial, int(Outcome.DIED), 0.0, 0.0, text.encode(), b'', b'')
                    self.finish(comp, row)
                    continue
            comp.attempts[serial] = attempt
            if not attempt.values or self.values.admit(comp.comp, attempt):
                comp.enqueue(attempt)
            attempt.counted = size_of(payload)
            self.held_bytes += attempt.counted

    def _lack(self, attempt: Attempt) -> str:
        """Return why an attempt can never run here; empty if it can."""
        if attempt.cpus > self._cpus.most:
            return 'the job wants %d CPUs and the node has %d' % (attempt.cpus, self._cpus.most)
        return self._units.lack(attempt.resources, 'node %s' % self._tables.name)

    def _refuses_jobs(self, comp: _Computation) -> bool:
        return self.refuses_new or comp.stage is Stage.ENDING

    def _return_all(self, comp: _Computation, message: Jobs) -> None:
        serials = [row[0] for row in message.rows]
        answer = JobsReturned(comp.comp, serials)
        self._tables.reply(comp, answer)

    def _note_parts(self, comp: _Computation, row: tuple) -> None:
        """Note an attempt whose arguments came in parts."""
        serial, payload = row[:2]
        size = size_of(payload)
        if not size > MAX_FRAME:
            return
        if serial not in comp.attempts:
            return
        attempt = comp.attempts[serial]
        if attempt not in self._in_parts:
            self._in_parts.append(attempt)

    def on_unfit(self, link: int, message: Unfit, now: float) -> None:
        """Refuse an attempt because there is no memory for its arguments."""
        comp = self._tables.comp_of(link, message.comp)
        if comp is None:
            return
        if comp.link != link:
            return
        if self._is_known(comp, message.row[0]):
            return
        self.finish(comp, unfit_row(message))

    def _is_known(self, comp: _Computation, serial: int) -> bool:
        spooled = self._results.spooled_serials(comp.comp)
        if serial in comp.attempts:
            return True
        if serial in comp.unacknowledged:
            return True
        return serial in spooled

    # -- memory ------------------------------------------------------------------------------------

    def count(self, attempt: Attempt, waits: bool) -> None:
        """Add an attempt to the totals of what waits, or subtract it."""
        if waits:
            counted = size_of(attempt.payload)
        else:
            counted = 0
        self.held_bytes += counted - attempt.counted
        attempt.counted = counted

    def is_full(self) -> bool:
        """Return whether so much waits that links are not to be read. Arguments that came in parts
        do not count, because memory was reserved for them before."""
        held = self.held_bytes
        if held > RECEIVE_BUDGET and self._in_parts:
            self._in_parts = [attempt for attempt in self._in_parts
                              if attempt.serial in attempt.comp.attempts]
            in_parts = sum(attempt.counted for attempt in self._in_parts)
            held -= in_parts
        return held > RECEIVE_BUDGET

    # -- ending and going back ---------------------------------------------------------------------

    def finish(self, comp: _Computation, row: tuple) -> None:
        """Note that an attempt has ended, with this row of Results."""
        attempt = comp.attempts.pop(row[SERIAL], None)
        comp.done += 1
        if row[OUTCOME] not in VALUES:
            comp.failed += 1
        if attempt is not None:
            if attempt.counted:
                self.count(attempt, False)
            if attempt.values:
                self._done_with_values(comp, attempt)
        comp.unacknowledged[row[SERIAL]] = row
        comp.outbox.append(row)

    def finish_unstarted(self, comp: _Computation, attempt: Attempt) -> None:
        """Note that an attempt was cancelled before it started."""
        self.finish(comp, (attempt.serial, int(
            Outcome.CANCELLED), 0.0, 0.0, b'cancelled before it started', b'', b''))

    def requeue(self, comp: _Computation, attempts: Iterable[Attempt]) -> None:
        """Put attempts that never started back to the front of the queue; or return them to the
        client if it has recalled them; or end them if they were to be cancelled."""
        back: List[int] = []
        for attempt in reversed(list(attempts)):
            if attempt.ending is Outcome.CANCELLED:
                self.finish_unstarted(comp, attempt)
            elif attempt.serial in comp.steal_debt:
                back.append(self._dismiss(comp, attempt))
            else:
                attempt.ending = None
                comp.enqueue(attempt, again=True)
                self.count(attempt, True)
        if back:
            serials = back[::-1]
            self._hand_back(comp, serials)

    def return_waiting(self, comp: _Computation, wanted: Optional[Set[int]] = None) -> None:
        """Return attempts that wait here to the client: these, or all."""
        lacking = [attempt for attempt in self.values.waiting(comp.comp)
                   if wanted is None or attempt.serial in wanted]
        if lacking:
            self.return_lacking(comp, lacking)
        back = [attempt for attempt in comp.waiting if wanted is None or attempt.serial in wanted]
        if not back:
            return
        if len(back) == len(comp.waiting):
            comp.waiting.clear()
        else:
            rest = [attempt for attempt in comp.waiting
                    if attempt.serial not in wanted]  # type: ignore[operator]
            comp.waiting = collections.deque(rest)
        serials = self._leave(comp, back)
        self._hand_back(comp, serials)

    def return_lacking(self, comp: _Computation, attempts: Sequence[Attempt]) -> None:
        """Return attempts that waited for values, because the values are not coming."""
        serials = self._leave(comp, attempts)
        if serials:
            self._hand_back(comp, serials)

    def _leave(self, comp: _Computation, attempts: Sequence[Attempt]) -> List[int]:
        """Remove attempts that never started. Those that were to end are ended; the others are
        returned."""
        serials: List[int] = []
        for attempt in attempts:
            if attempt.ending is not None:
                self.finish_unstarted(comp, attempt)
            else:
                serial = self._dismiss(comp, attempt)
                serials.append(serial)
        return serials

    def _dismiss(self, comp: _Computation, attempt: Attempt) -> int:
        """Forget an attempt that never started, because it belongs to the client again."""
        del comp.attempts[attempt.serial]
        comp.steal_debt.discard(attempt.serial)
        self.count(attempt, False)
        if attempt.values:
            self._done_with_values(comp, attempt)
        return attempt.serial

    def _hand_back(self, comp: _Computation, serials: List[int]) -> None:
        """Tell the client that attempts were never started; if it is away, it is told when it is
        back."""
        tables = self._tables
        if comp.link in tables.links:
            for message in in_parts(JobsReturned, comp.comp,
                                    serials) if serials else [JobsReturned(comp.comp, [])]:
                tables.reply(comp, message)
        elif serials:
            distinct_serials = frozenset(serials)
            returned = AttemptHistory(unbegun=distinct_serials)
            self._past.add(comp.comp, returned)

    def on_recall(self, link: int, message: ReturnJobs, now: float) -> None:
        """Return attempts that have not started, because the client wants them back."""
        comp = self._tables.comp_of(link, message.comp)
        if comp is None:
            return
        wanted = set(message.serials)
        self.return_waiting(comp, wanted)
        for worker in comp.workers.values():
            if worker.queue and worker.queue[0].serial in wanted:
                worker.note_begun()
            behind = [attempt.serial for attempt in itertools.islice(worker.queue, 1, None)
                      if attempt.serial in wanted]
            if behind:
                comp.steal_debt.update(behind)
                self.take_back(worker)

    def take_back(self, worker: _Worker) -> None:
        """Ask a worker to return what it has not started."""
        if not worker.recalled:
            worker.recalled = True
            action = TakeFromWorker(worker.key)
            self._tables.do(action)

    def take_back_all(self) -> None:
        """Ask workers to return what waits behind running jobs."""
        for worker in self._tables.workers.values():
            behind = len(worker.queue) - 1
            if behind > 0:
                self.take_back(worker)

    def drop(self, comp: _Computation) -> None:
        """Forget the attempts of a computation that is being closed."""
        self.held_bytes -= sum(attempt.counted for attempt in comp.attempts.values())
        attempts = [attempt for attempt in comp.attempts.values() if attempt.values]
        comp.waiting.clear()
        comp.attempts.clear()
        for attempt in attempts:
            self.values.release(comp.comp, attempt)
        self.values.forget(comp.comp)

    # -- values by digest --------------------------------------------------------------------------

    def serve_values(self) -> None:
        """Let attempts wait for a CPU whose values are present; fetch what the others need."""
        served, actions = self.values.serve()
        for _, attempt in served:
            attempt.comp.enqueue(attempt)
        for action in actions:
            self._tables.do(action)

    def on_value_sought(self, event: ValueSought, now: float) -> None:
        """Note that a value is missing, is present, or is not available."""
        tables = self._tables
        comp = tables.comps.get(event.comp)
        if comp is None:
            return
        if not event.digest:
            return
        if self.values.coming(event.comp) != event.digest:
            return
        if event.missing:
            tables.ask_for_files(comp, event.missing)
        elif event.error:
            for attempt in self.values.failed(event.comp):
                size = sum(size for size, _ in attempt.values)
                text = unfit_text(size, '%s (on node %s)' % (event.error, tables.name))
                refused = Unfit(comp.comp, (attempt.serial, ), text)
                self.finish(comp, unfit_row(refused))
        else:
            self.values.came(event.comp)

    def value_stored(self, file: FileStored, now: float) -> None:
        """Note that the value that is being fetched is present, or is not available."""
        digest = self.values.coming(file.comp)
        digits = digest.hex()
        if digits == file.name:
            event = ValueSought(file.comp, digest, [], file.error)
            self.on_value_sought(event, now)

    def _done_with_values(self, comp: _Computation, attempt: Attempt) -> None:
        self.values.leave(comp.comp, (attempt,))
        self.values.release(comp.comp, attempt)


class Interruptions:
    """Ends running attempts: those that are cancelled, exceed their time limit, use too much
    memory, or run on a node that is to end. The job is interrupted; after GRACE its worker is
    killed, and after GRACE more its result says that nothing could end it. If the node is to end,
    `grace` replaces the first of these times."""

    def __init__(self, tables: NodeTables, timers: Timers, attempts: Attempts,
                 grace: float) -> None:
        self._tables = tables
        self._timers = timers
        self._attempts = attempts
        self.grace = grace         # s
        self.ends_all = False       # jobs that start now are ended

    def on_cancel(self, link: int, message: Cancel, now: float) -> None:
        """End attempts that the client has cancelled, whether they run or wait."""
        comp = self._tables.comp_of(link, message.comp)
        if comp is None:
            return
        for serial in message.serials:
            attempt = comp.attempts.get(serial)
            if attempt is None:
                continue
            if attempt.ending is None:
                attempt.ending = Outcome.CANCELLED
                self._end(comp, attempt, now)

    def _end(self, comp: _Computation, attempt: Attempt, now: float) -> None:
        attempts = self._attempts
        if attempt in comp.waiting:
            comp.waiting.remove(attempt)
            attempts.finish_unstarted(comp, attempt)
            return
        if attempt.values and attempt in attempts.values.waiting(comp.comp):
            attempts.finish_unstarted(comp, attempt)
            return
        for worker in comp.workers.values():
            if worker.queue and worker.queue[0] is attempt:
                self.interrupt(worker, attempt, now)
            elif attempt in worker.queue:
                attempts.take_back(worker)

    def end_all(self, now: float) -> None:
        """Return attempts that wait, and end those that run after their grace time."""
        attempts = self._attempts
        tables = self._tables
        self.ends_all = True
        for comp in tables.comps.values():
            attempts.return_waiting(comp)
        for worker in tables.workers.values():
            if worker.queue and worker.queue[0].ending is None:
                worker.queue[0].ending = Outcome.STOPPED
                self.interrupt(worker, worker.queue[0], now)
            if len(worker.queue) > 1:
                attempts.take_back(worker)

    def interrupt(self, worker: _Worker, attempt: Attempt, now: float) -> None:
        """Interrupt the job that a worker runs."""
        action = Interrupt(worker.key, attempt.serial)
        self._tables.do(action)
        if attempt.ending is Outcome.STOPPED:
            when = now + self.grace
        else:
            when = now + GRACE
        self._set_timer(when, self._kill, worker, attempt.serial)

    def set_timeout(self, worker: _Worker, when: float) -> None:
        """Set the time limit of the job that a worker runs."""
        serial = worker.queue[0].serial
        self._set_timer(when, self._time_out, worker, serial)

    def _set_timer(self, when: float, call: Callable[..., None], worker: _Worker,
                   serial: int) -> None:
        self._timers.at(when, worker.comp.comp, call, worker, serial, is_wanted=self._is_running)

    def _is_running(self, worker: _Worker, serial: int) -> bool:
        """Return whether the worker exists and runs this attempt."""
        if not (worker.key in self._tables.workers and bool(worker.queue)):
            return False
        return worker.queue[0].serial == serial

    def _time_out(self, worker: _Worker, serial: int, now: float) -> None:
        is_running = self._is_running(worker, serial)
        if not is_running:
            return
        if worker.queue[0].ending is None:
            worker.queue[0].ending = Outcome.TIMED_OUT
            self.interrupt(worker, worker.queue[0], now)

    def _kill(self, worker: _Worker, serial: int, now: float) -> None:
        if self._is_running(worker, serial):
            action = Kill(worker.key)
            self._tables.do(action)
            when = now + GRACE
            self._set_timer(when, self._stuck, worker, serial)

    def _stuck(self, worker: _Worker, serial: int, now: float) -> None:
        """Handle a worker that was killed and has not ended: its process sleeps in the kernel and
        cannot be interrupted, for example on a disk that has failed. Its job is reported as ended,
        the attempts behind it wait for another worker, and its CPUs become free when it has
        ended."""
        attempts = self._attempts
        is_running = self._is_running(worker, serial)
        if not is_running:
            return
        comp = worker.comp
        head = worker.queue.popleft()
        ending = head.ending or Outcome.DIED
        reason = head.ending_text(ending)
        text = ('%s; it was killed, and its process has not ended within %d s '
                '(uninterruptible): its CPU is lost to node %s' %
                (reason, GRACE, self._tables.name))
        logger.error('%s: %s', comp.spec['name'], text)
        worker.stuck = head.cpus
        attempts.finish(comp, (head.serial, int(ending), 0.0, 0.0, text.encode(), b'', b''))
        behind = list(worker.queue)
        worker.queue.clear()
        attempts.requeue(comp, behind)

    def on_too_big(self, event: MemoryExceeded, now: float) -> None:
        """Note that a job uses too much memory, and that its worker is being killed for that."""
        self._note_ending(event.worker, event.serial, Outcome.OUT_OF_MEMORY)

    def on_overdue(self, event: WorkerOverdue, now: float) -> None:
        """Note that the runner ends a job whose time limit has passed."""
        self._note_ending(event.worker, event.serial, Outcome.TIMED_OUT)

    def _note_ending(self, key: int, serial: int, ending: Outcome) -> None:
        """Note why an attempt is being ended. It need not be the first in the queue of its worker:
        results of jobs before it may not have been read yet."""
        worker = self._tables.workers.get(key)
        for attempt in worker.queue if worker is not None else ():
            if attempt.serial != serial:
                continue
            if attempt.ending is None or ending is Outcome.OUT_OF_MEMORY:
                attempt.ending = ending


class FairShare:
    """Decides which computation gets the next CPU when several wait: it goes to the client, and to
    that of its computations, which will have used least when the running jobs have ended; if they
    are equal, to the one that was served longest ago. So a client that has had less, because it had
    nothing here at some moment, is compensated. A computation that has just come is next, and has
    no claim to what others used before."""

    def __init__(self, tables: NodeTables, cpus: Cpus) -> None:
        self._tables = tables
        self._cpus = cpus

    def joins(self, comp: _Computation) -> None:
        """Note that a computation has come; its client may have others here."""
        comps = self._tables.comps.values()
        comp.client = next(
            (other.client for other in comps if other.client_name == comp.client_name), _Claim())

    @staticmethod
    def returns(comp: _Computation, now: float) -> None:
        """Note that a computation that had no attempts has some now."""
        for claim in (comp.own, comp.client):
            claim.fresh = claim.fresh or claim.seen + ABSENT_TIME < now

    @staticmethod
    def see(ready: List[_Computation], now: float) -> None:
        """Note which computations have attempts while others are here."""
        for comp in ready:
            if comp.attempts:
                fresh = not comp.cpus_used()
                for claim in (comp.own, comp.client):
                    claim.seen = now
                    claim.fresh = claim.fresh and fresh

    @staticmethod
    def first(rivals: List[_Computation]) -> _Computation:
        """Return the computation that is to have the next CPU."""
        return min(rivals, key=lambda comp: (*comp.client.rank(), *comp.own.rank(), comp.served))

    def began(self, comp: _Computation, cpus: int, now: float) -> None:
        """Note that a job of a computation begins on so many CPUs."""
        self._level(comp, now)
        for claim in (comp.own, comp.client):
            claim.reckoned += cpus * comp.estimate.remaining(0.0)

    @staticmethod
    def charge(comp: _Computation, seconds: float) -> None:
        """Note that a computation has used so many CPU seconds."""
        comp.own.used += seconds
        comp.client.used += seconds

    def reckon(self, now: float) -> None:
        """Return the CPU seconds that each computation will have used when the running jobs have
        ended; the compensation for one that has had much less than others is limited."""
        here = [comp for comp in self._tables.comps.values() if comp.attempts]
        ages = {comp: [(now - worker.since, worker.queue[0].cpus)
                       for worker in comp.workers.values()
                       if worker.queue and not worker.pardoned] for comp in here}
        used = {comp: sum(age * cpus for age, cpus in ages[comp]) for comp in here}
        groups: Dict[_Claim, List[_Computation]] = {}
        for comp in here:
            group = groups.setdefault(comp.client, [])
            group.append(comp)
        self._forgive({client: sum(map(used.__getitem__, comps))
                       for client, comps in groups.items()})
        for client, comps in groups.items():
            self._forgive({comp.own: used[comp] for comp in comps})
            for comp in comps:
                left = sum(comp.estimate.remaining(age) * cpus for age, cpus in ages[comp])
                comp.own.reckoned += left
                client.reckoned += left

    def _forgive(self, used: Dict[_Claim, float]) -> None:
        """Limit the claims, and what each uses by running jobs: what exceeds CREDIT_TIME is
        forgotten."""
        floor = max(claim.used + more
                    for claim, more in used.items()) - CREDIT_TIME * self._cpus.total
        for claim, more in used.items():
            claim.used = max(claim.used, floor - more)
            claim.reckoned = claim.used + more

    def _level(self, comp: _Computation, now: float) -> None:
        """Begin the first job of a computation that has come: from now on it claims as much as the
        others, and what running jobs of other clients will use is not held against them."""
        client = comp.client
        own = comp.own
        comps = self._tables.comps.values()
        if client.fresh:
            for other in comps:
                if other.client is not client:
                    self._pardon(other, now)
        here = [other for other in comps if other.attempts]
        owns = {other.own for other in here if other.client is client}
        clients = {other.client for other in here}
        for claim, others in ((client, clients), (own, owns)):
            if claim.fresh:
                claim.fresh = False
                least = min((other.reckoned for other in others - {claim} if not other.fresh),
                            default=0.0)
                claim.used = claim.reckoned = max(claim.used, least)

    @staticmethod
    def _pardon(comp: _Computation, now: float) -> None:
        for worker in comp.workers.values():
            if not worker.queue:
                continue
            if worker.pardoned:
                continue
            worker.pardoned = True
            age = now - worker.since
            cpus = worker.queue[0].cpus
            for claim in (comp.own, comp.client):
                claim.used += age * cpus
                claim.reckoned -= comp.estimate.remaining(age) * cpus


class WorkerPool:
    """The workers of all computations: which exist, when the next one may be started, and when idle
    ones end.

    start_at - when the next worker may be started
    special - those that have resources
    """

    def __init__(self, tables: NodeTables, timers: Timers, units: Units) -> None:
        self._units = units
        self.special = ResourceWorkers(tables, units, self.start, self.remove)
        self._tables = tables
        self._timers = timers
        self.start_at = 0.0
        self._start_failure = ''    # the reported reason why none could be started
        self._keys = itertools.count(1)

    def start(self, comp: _Computation, resources: Request = ()) -> _Worker:
        """Start a worker for a computation, with these resources."""
        tables = self._tables
        key = next(self._keys)
        worker = _Worker(key, comp, resources)
        tables.workers[worker.key] = worker
        comp.workers[worker.key] = worker
        if resources:
            self.special.equip(worker)
        action = StartWorker(worker.key, comp.comp)
        tables.do(action)
        return worker

    def start_failed(self, worker: _Worker, text: str, now: float) -> None:
        """Note that a worker could not be started. Its client is told, but not again and again."""
        tables = self._tables
        comp = worker.comp
        self.gone(worker)
        if self._start_failure != text or now > self.start_at + WORKER_TOLD:
            self._start_failure = text
            message = ('node %s cannot start a worker process: %s; it continues with the workers '
                       'that it has, and keeps trying' % (tables.name, text))
            logger.error('%s', message)
            warning = Notice(comp.comp, message)
            tables.reply(comp, warning)
        self.start_at = now + WORKER_RETRY_DELAY
        self._timers.at(self.start_at, comp.comp, self._may_start_again, is_wanted=lambda: True)

    def _may_start_again(self, now: float) -> None:
        """Do nothing: the timer makes the node check whether a worker is to be started."""

    def put_idle(self, worker: _Worker) -> None:
        """Note that a worker is idle; it ends if it has run as many jobs as it may."""
        tables = self._tables
        comp = worker.comp
        comp.refillable.pop(worker.key, None)
        if comp.most and worker.jobs_given >= comp.most:
            self.remove(worker)
            action = Retire(worker.key)
            tables.do(action)
        else:
            worker.since = tables.now
            if worker.resources:
                self.special.idle(worker)
            else:
                comp.idle.append(worker)
            if not comp.has_idle_timer:
                comp.has_idle_timer = True
                when = tables.now + WORKER_IDLE
                self._retire_at(when, comp)

    def _retire_at(self, when: float, comp: _Computation) -> None:
        self._timers.at(when, comp.comp, self._retire_idle, comp, is_wanted=self._is_here)

    def _is_here(self, comp: _Computation) -> bool:
        return self._tables.comps.get(comp.comp) is comp

    def _retire_idle(self, comp: _Computation, now: float) -> None:
        """End workers that have been idle for long, so that their memory is freed. What setup has
        made is in the runner, which forks other workers when there are jobs again."""
        if not self._is_here(comp):
            return
        for worker in comp.idle + self.special.idle_of(comp):
            if worker.since + WORKER_IDLE <= now:
                self.special.retire(worker)
        idle = comp.idle + self.special.idle_of(comp)
        comp.has_idle_timer = bool(idle)
        if idle:
            first = min(worker.since for worker in idle)
            when = first + WORKER_IDLE
            self._retire_at(when, comp)

    def has_place(self, comp: _Computation, cpus: int) -> bool:
        """Return whether a computation may have one more worker without resources, on so many
        CPUs."""
        count = len(comp.workers)
        if count < cpus:
            return True
        return count - len(self.special.idle_of(comp)) < cpus

    def gone(self, worker: _Worker) -> None:
        """Note that the process of a worker has ended, or could not be made."""
        self.remove(worker)
        self._units.release(worker.key)

    def all_gone(self, comp: _Computation) -> None:
        """Note that all processes of a computation have ended."""
        for worker in list(comp.workers.values()):
            self.remove(worker)
        self._units.release_all(comp.comp)

    def remove(self, worker: _Worker) -> None:
        """Forget a worker that has ended, or has been told to."""
        self._tables.workers.pop(worker.key, None)
        comp = worker.comp
        comp.workers.pop(worker.key, None)
        comp.starting.discard(worker.key)
        comp.refillable.pop(worker.key, None)
        if worker in comp.idle:
            comp.idle.remove(worker)
        elif worker.resources:
            self.special.removed(worker)


class CpuScheduler:
    """Gives CPUs to waiting attempts, sends attempts to workers, and takes their results."""

    def __init__(self, tables: NodeTables, timers: Timers, cpus: Cpus, attempts: Attempts,
                 interruptions: Interruptions, share: FairShare, units: Units) -> None:
        self._tables = tables
        self._timers = timers
        self._cpus = cpus
        self._attempts = attempts
        self._interruptions = interruptions
        self._share = share
        self.look_at = math.inf     # when a job will have run for BEGUN_TIME
        # Workers have reported results in this turn, and each has enough to do for a while
        self.is_supplied = False
        self.pool = WorkerPool(tables, timers, units)
        self._served = itertools.count()

    # -- CPUs to attempts that wait ----------------------------------------------------------------

    def assign_cpus(self, now: float) -> None:
        """Give CPUs to computations."""
        tables = self._tables
        self.is_supplied = False
        ready = []
        for comp in tables.comps.values():
            if comp.stage is Stage.READY:
                ready.append(comp)
        crowded = len(ready) > 1 and self._share_between(ready, now)
        for comp in ready:
            if comp.waiting:
                tables.guarded(comp.comp, self._dispatch, comp, now, crowded)
            elif comp.refillable:
                comp.refillable.clear()

    def _share_between(self, ready: List[_Computation], now: float) -> bool:
        """Give each CPU to the computation that FairShare selects, when several wait. Returns
        whether several wait."""
        rivals = [comp for comp in ready if comp.waiting]
        self._share.see(ready, now)
        if len(rivals) < 2 or self._cpus.free <= 0:
            return len(rivals) > 1
        self._share.reckon(now)
        while len(rivals) > 1 and self._cpus.free > 0:
            comp = self._share.first(rivals)
            before = self._cpus.free
            if not self._start_on_worker(comp, 0, now) or not comp.waiting:
                rivals.remove(comp)
            if before > self._cpus.free:
                self._share.began(comp, before - self._cpus.free, now)
        return True

    def _is_limited(self, comp: _Computation, cpus: int) -> bool:
        """Return whether a computation may not use so many more CPUs."""
        if not (0 < comp.limit < self._cpus.total):
            return False
        return comp.limit < cpus + comp.cpus_used()

    def _start_on_worker(self, comp: _Computation, ahead: int, now: float) -> bool:
        """Give work to one more worker, if a CPU is free."""
        if not comp.waiting:
            return False
        head = comp.waiting[0]
        if head.cpus > self._cpus.free:
            return False
        if comp.limit and self._is_limited(comp, head.cpus):
            return False
        worker: Optional[_Worker] = None
        if head.resources:
            may_make = now >= self.pool.start_at
            worker = self.pool.special.worker_for(comp, head.resources, may_make)
        elif comp.idle:
            worker = comp.idle.pop()
        elif comp.initializer:
            self._initialize(comp, now)
        elif self.pool.has_place(comp, self._cpus.total) and now >= self.pool.start_at:
            worker = self.pool.start(comp)
        if worker is None:
            return False
        worker.since = now
        comp.served = next(self._served)
        self._cpus.free -= head.cpus
        count = 1
        if ahead:
            count += min(ahead, len(comp.waiting) // max(1, self._cpus.total))
        self._feed(comp, worker, count, now)
        return True

    def _dispatch(self, comp: _Computation, now: float, crowded: bool) -> None:
        ahead = 0
        if len(comp.waiting) > 1 or comp.refillable:   # otherwise no attempt is behind another one
            ahead = comp.handed.jobs(AHEAD_TIME)
        while comp.waiting and self._start_on_worker(comp, ahead, now):
            continue
        # It came when there were more CPUs
        if comp.waiting:
            most = min(self._cpus.total, comp.limit or self._cpus.total)
            if comp.waiting[0].cpus > most:
                self._attempts.return_waiting(comp)
        if ahead and comp.waiting and not crowded:
            self._refill(comp, ahead, now)
        comp.refillable.clear()

    def _refill(self, comp: _Computation, ahead: int, now: float) -> None:
        """Send more jobs to the workers that have reported results, up to `ahead` each behind the
        one that it runs."""
        for worker in list(comp.refillable.values()):
            room = ahead + 1 - len(worker.queue)
            if not comp.waiting:
                return
            if not 2 * room > ahead:
                continue
            if not worker.recalled:
                self._feed(comp, worker, room, now)
        if ahead >= AHEAD_WELL and comp.refillable and comp.waiting:
            self.is_supplied = True

    def _feed(self, comp: _Computation, worker: _Worker, count: int, now: float) -> None:
        attempts: List[Attempt] = []
        if worker.queue and size_of(worker.queue[-1].payload) > LAZY:
            return   # attempts behind it could not be taken back
        if comp.most:
            count = min(count, comp.most - worker.jobs_given)
        while count > 0 and comp.waiting:
            attempt = comp.waiting[0]
            if worker.queue and attempt.cpus != worker.queue[0].cpus:
                break
            if attempt.resources != worker.resources:
                break
            if attempts and (attempt.timeout or attempt.memory):
                break
            attempts.append(comp.waiting.popleft())
            if attempt.counted > LAZY:   # alone, as above
                count = 0
            # Running attempts do not keep links from being read: orders come on the links
            self._attempts.held_bytes -= attempt.counted
            attempt.counted = 0
            worker.queue.append(attempt)
            count -= 1
        if attempts:
            if attempts[0] is worker.queue[0]:
                self._on_job_started(worker, now)
            else:   # it may begin before this is reported
                self._watch(worker, attempts[0])
            worker.jobs_given += len(attempts)
            action = SendToWorker(worker.key, attempts)
            self._tables.do(action)

    def _watch(self, worker: _Worker, attempt: Attempt) -> None:
        """Have the runner enforce the limits of a job, so that they hold even while this loop has
        no turn, as in a program that is busy."""
        if attempt.memory or attempt.timeout:
            memory = int(attempt.memory or 0)
            seconds = attempt.timeout or 0.0
            action = LimitMemory(worker.key, attempt.serial, memory, seconds)
            self._tables.do(action)

    def _on_job_started(self, worker: _Worker, now: float) -> None:
        worker.since = now
        worker.told = False
        head = worker.queue[0]
        if self.look_at == math.inf:
            self.look_at = now + BEGUN_TIME
        if head.serial in worker.comp.steal_debt:
            worker.comp.steal_debt.discard(head.serial)
            worker.note_begun()
        if self._interruptions.ends_all:   # it started before it could be taken back
            head.ending = head.ending or Outcome.STOPPED
        if head.timeout:
            when = now + head.timeout
            self._interruptions.set_timeout(worker, when)
        if head.memory or head.timeout:
            self._watch(worker, head)
        if head.ending is not None:   # it was cancelled while it was behind another one
            self._interruptions.interrupt(worker, head, now)

    def look(self, now: float) -> None:
        """Report jobs that have run for a while, and take back what their workers hold behind them,
        because the estimate by which it was sent to them was wrong."""
        self.look_at = math.inf
        for worker in self._tables.workers.values():
            ahead = len(worker.queue) > 1 and not worker.recalled
            if not worker.queue:
                continue
            if worker.told and not ahead:
                continue
            when = worker.since + BEGUN_TIME
            if when > now:
                self.look_at = min(when, self.look_at)
                continue
            if not worker.told:
                worker.note_begun()
            if ahead:
                self._attempts.take_back(worker)

    # -- what workers did --------------------------------------------------------------------------

    def on_results(self, event: WorkerResults, now: float) -> None:
        """Take results of jobs that have ended in a worker, and provisional results."""
        worker = self._tables.workers.get(event.worker)
        if worker is None:
            return
        if worker.comp.stage is Stage.CLOSING:
            return
        comp = worker.comp
        durations = []
        place = 0
        ended = None
        queue = worker.queue
        for row in event.rows:
            if place >= len(queue) or queue[place].serial != row[SERIAL]:
                text = 'a worker answered for %d, which it did not run' % row[SERIAL]
                raise PeerError(text)
            place += row[OUTCOME] not in PROVISIONAL
        comp.startup_failures = 0
        for row in event.rows:
            if row[OUTCOME] in PROVISIONAL:
                comp.outbox.append(row)
                continue
            attempt = ended = queue.popleft()
            durations.append(row[END] - row[START])
            if attempt.timeout:
                self._note_overdue(attempt, row)
            if attempt.ending is not None:
                row = self._ended(attempt, row)
            self._attempts.finish(comp, row)
        if ended is None:   # nothing but provisional results
            return
        comp.estimate.add(durations)
        seconds = sum(durations) * ended.cpus
        comp.cpu_seconds += seconds
        if worker.pardoned:
            seconds -= durations[0] * ended.cpus
        self._share.charge(comp, seconds)
        worker.pardoned = False
        comp.handed.ended(len(durations), len(comp.attempts) - len(comp.waiting), len(comp.workers))
        if queue:
            comp.refillable[worker.key] = worker
            self._on_job_started(worker, now)
        else:
            self._cpus.free += ended.cpus
            self.pool.put_idle(worker)

    @staticmethod
    def _note_overdue(attempt: Attempt, row: tuple) -> None:
        """Note that a job has exceeded its time limit: its runner may have ended it before this
        loop has checked the time."""
        if attempt.ending is not None:
            return
        if row[OUTCOME] != Outcome.RAISED:
            return
        if row[END] - row[START] >= attempt.timeout:
            attempt.ending = Outcome.TIMED_OUT

    @staticmethod
    def _ended(attempt: Attempt, row: tuple) -> tuple:
        """Return the result of an attempt that was interrupted. The result of one that was
        cancelled and nevertheless returned counts."""
        assert attempt.ending is not None   # ours
        if attempt.ending is Outcome.CANCELLED:
            if row[OUTCOME] in RETURNED:
                return row
        return (row[SERIAL], int(attempt.ending), row[START], row[END],
                attempt.ending_text(attempt.ending).encode(), *row[STDOUT:])

    def on_returned(self, event: WorkerReturnedJobs, now: float) -> None:
        """Take attempts that a worker has returned because it had not started them."""
        worker = self._tables.worker_at_work(event.worker)
        if worker is None:
            return
        worker.recalled = False
        comp = worker.comp
        serials = set(event.serials)
        if worker.queue:
            head = worker.queue[0]
        else:
            head = None
        back = [attempt for attempt in worker.queue if attempt.serial in serials]
        worker.queue = collections.deque(attempt for attempt in worker.queue
                                         if attempt.serial not in serials)
        worker.jobs_given -= len(back)
        self._attempts.requeue(comp, back)
        if back and not worker.queue:
            self._cpus.free += back[0].cpus
            self.pool.put_idle(worker)
        elif worker.queue and worker.queue[0] is not head:
            self._on_job_started(worker, now)

    def kill_running(self, comp: _Computation) -> None:
        """Kill the workers of a computation that have jobs: when they have ended, it is known which
        attempts they had begun."""
        for worker in comp.workers.values():
            if worker.queue:
                action = Kill(worker.key)
                self._tables.do(action)

    def fail_running(self, comp: _Computation, outcome: Outcome, text: str) -> None:
        """End the attempts of workers of which nobody knows what they had begun: the first in the
        queue of a worker has failed, and the rest was never started."""
        attempts = self._attempts
        for worker in comp.workers.values():
            if not worker.queue:
                continue
            head = worker.queue.popleft()
            self._cpus.free += head.cpus
            data = text.encode('utf-8', 'replace')
            attempts.finish(comp, (head.serial, int(outcome), 0.0, 0.0, data, b'', b''))
            comp.waiting.extend(worker.queue)
            worker.queue.clear()
        attempts.return_waiting(comp)

    # -- workers -----------------------------------------------------------------------------------

    def _initialize(self, comp: _Computation, now: float) -> None:
        """Start workers for the attempts that wait. They get attempts when their initializer has
        returned."""
        most = min(self._cpus.free, len(comp.waiting))
        while self.pool.has_place(comp, self._cpus.total) and len(comp.starting) < most \
                and now >= self.pool.start_at:
            comp.starting.add(self.pool.start(comp).key)

    def initialized(self, worker: _Worker) -> None:
        """Note that a worker is ready, because the initializer has returned in it."""
        self.pool.put_idle(worker)

    def worker_gone(self, worker: _Worker, event: WorkerGone, now: float) -> None:
        """Handle the end of a worker's process: the attempt that it ran has failed, and the others
        wait again."""
        attempts = self._attempts
        comp = worker.comp
        self.pool.gone(worker)
        self._cpus.free += worker.stuck
        if comp.stage is Stage.CLOSING:
            return
        if worker.queue:
            self._cpus.free += worker.queue[0].cpus
            used = (now - worker.since) * worker.queue[0].cpus
            comp.cpu_seconds += used
            if not worker.pardoned:
                self._share.charge(comp, used)
        if worker.queue and worker.queue[0].serial == event.running:
            attempt = worker.queue.popleft()
            ending, text = self._how_it_ended(attempt, comp, event.text)
            data = text.encode('utf-8', 'replace')
            printed = (bytes(event.stdout), bytes(event.stderr))
            attempts.finish(comp, (attempt.serial, int(ending), 0.0, 0.0, data, *printed))
        elif not worker.jobs_given:
            comp.startup_failures += 1
        attempts.requeue(comp, worker.queue)
        if not worker.queue:
            return
        if worker.jobs_given == len(worker.queue):
            comp.startup_failures += 1

    @staticmethod
    def _how_it_ended(attempt: Attempt, comp: _Computation, text: str) -> Tuple[Outcome, str]:
        """Return the outcome of an attempt whose worker has ended, and the text of its error;
        `text` describes the end of the worker."""
        if attempt.ending is not None:
            return attempt.ending, attempt.ending_text(attempt.ending)
        if comp.forced_end is not None:
            return comp.forced_end.outcome, comp.forced_end.job_text
        return Outcome.DIED, text

    def on_start_failed(self, event: WorkerStartFailed, now: float) -> None:
        """Let the attempts of a worker that could not be started wait for another one, and start no
        worker for a while."""
        worker = self._tables.workers.get(event.worker)
        if worker is None:
            return
        self.pool.start_failed(worker, event.text, now)
        if worker.queue:
            self._cpus.free += worker.queue[0].cpus
            self._attempts.requeue(worker.comp, worker.queue)

    def drop(self, comp: _Computation) -> None:
        """Forget the workers of a computation that is being closed: they get no more attempts."""
        comp.idle.clear()
        self.pool.special.drop(comp)
        comp.refillable.clear()
        for worker in comp.workers.values():
            if worker.queue:
                self._cpus.free += worker.queue[0].cpus
                worker.queue.clear()

    def remove_workers(self, comp: _Computation) -> None:
        """Forget the workers of a computation, because its processes have ended."""
        for worker in list(comp.workers.values()):
            self._cpus.free += worker.stuck
        self.pool.all_gone(comp)


class JobRequests:
    """What jobs request of their clients while they run: to store a file, to send modules, to show
    what they have printed."""

    def __init__(self, tables: NodeTables, attempts: Attempts) -> None:
        self._tables = tables
        self._attempts = attempts
        self._numbers = itertools.count(1)   # of calls to clients

    def on_file(self, event: WorkerFile, now: float) -> None:
        """Pass on a piece of a file that a job sends."""
        piece = event.piece
        tables = self._tables
        worker = tables.worker_at_work(event.worker)
        if worker is None:
            return
        # The job does not run there
        if not worker.queue:
            return
        if worker.queue[0].serial != piece.key:
            return
        if piece.offset == 0:
            worker.sending_file_on = worker.comp.link or -1
        if not worker.sending_file_on:
            return   # it was answered already: the rest is ignored
        if worker.sending_file_on == worker.comp.link and worker.sending_file_on in tables.links:
            tables.send(worker.comp.link, piece)
        else:
            self._answer(worker, 'the client is not connected')

    def on_wants(self, event: WorkerWants, now: float) -> None:
        """Ask the client for what a job needs. The job waits until the client has sent it, or
        cannot."""
        tables = self._tables
        worker = tables.worker_at_work(event.worker)
        if worker is None:
            return
        comp = worker.comp
        worker.sending_file_on = worker.comp.link or -1
        if comp.link not in tables.links:
            self._answer(worker, 'the client is not connected')
            return
        number = next(self._numbers)
        comp.calls[number] = worker.key
        tables.send(comp.link, Call(comp.comp, number, 'modules', (event.request,)))

    def on_return(self, link: int, message: Return, now: float) -> None:
        """Take the answer of the client, which knows which files a job needs, or why there are
        none."""
        tables = self._tables
        comp = tables.comp_of(link, message.comp)
        if comp is not None:
            last_call = comp.calls.pop(message.number, 0)
            worker = tables.workers.get(last_call)
        else:
            worker = None
        if comp is None:
            return
        if worker is None:
            return
        if message.error:
            error = str(message.error[1])[:1000]
            self._answer(worker, error)
            return
        if type(message.value) is not list or not all(map(_is_file, message.value)):
            raise PeerError('malformed descriptions of files of modules')
        comp.fetches.append((worker.key, message.value))
        if len(comp.fetches) == 1:
            action = Fetch(comp.comp, message.value)
            tables.do(action)

    def on_fetched(self, event: Fetched, now: float) -> None:
        """Request the files that a job needs and that are missing, or tell the job that all are
        present."""
        tables = self._tables
        comp = tables.comps.get(event.comp)
        if comp is None:
            return
        if not comp.fetches:
            return
        if event.missing:
            tables.ask_for_files(comp, event.missing)
            return
        fetch = comp.fetches.popleft()
        worker = tables.workers.get(fetch[0])
        if worker is not None:
            self._answer(worker, event.error)
        if comp.fetches:
            rows = comp.fetches[0][1]
            action = Fetch(comp.comp, rows)
            tables.do(action)

    def on_printed(self, event: WorkerPrinted, now: float) -> None:
        """Pass on what a job has printed."""
        tables = self._tables
        worker = tables.workers.get(event.worker)
        if worker is None:
            return
        if not worker.queue:
            return
        if worker.queue[0].serial == event.serial:
            message = Output(worker.comp.comp, event.serial, event.stream, event.offset, event.data)
            tables.reply(worker.comp, message)

    def on_file_stored(self, link: int, message: FileStored, now: float) -> None:
        """Tell the job whether the client has stored its file; or note that the client cannot send
        a value."""
        comp = self._tables.comp_of(link, message.comp)
        if message.purpose == Purpose.VALUES:
            if comp is not None:
                if comp.link == link and message.error:
                    self._attempts.value_stored(message, now)
            return
        for worker in comp.workers.values() if comp is not None else ():
            if not worker.sending_file_on:
                continue
            if not worker.queue:
                continue
            if worker.queue[0].serial == message.key:
                self._answer(worker, message.error)

    def client_gone(self, comp: _Computation) -> None:
        """Tell jobs that their requests failed, because the connection to the client has ended."""
        comp.calls.clear()
        comp.fetches.clear()
        for worker in comp.workers.values():
            self._answer(worker, 'the connection to the client has ended')

    def _answer(self, worker: _Worker, error: str) -> None:
        if worker.sending_file_on:
            worker.sending_file_on = 0
            action = AnswerJobFile(worker.key, error)
            self._tables.do(action)


class Computations:
    """The stages of computations, from their directory to their end: files arrive, the runner loads
    the code and runs setup, jobs run, workers end."""

    def __init__(self, tables: NodeTables, timers: Timers, cpus: Cpus, past: PastAttempts,
                 results: UndeliveredResults, attempts: Attempts, scheduler: CpuScheduler,
                 share: FairShare, requests: JobRequests) -> None:
        self._tables = tables
        self._timers = timers
        self._cpus = cpus
        self._past = past
        self._results = results
        self._attempts = attempts
        self._scheduler = scheduler
        self._share = share
        self._requests = requests
        self.ending: List[_Computation] = []   # whose running jobs were killed

    # -- files and code ----------------------------------------------------------------------------

    def begin(self, link: int, message: Compute) -> None:
        """Begin a computation that was not here."""
        spec = message.spec
        tables = self._tables
        up = tables.links[link]
        start_method = spec.get('start_method') or tables.start_method
        comp = _Computation(message.comp, up.instance, link, spec, tables.now, start_method)
        if comp.client_name == comp.comp:   # no scheduler has named the program
            comp.user = tables.client_at(link)
        logger.info('%s of %s begins; files that its jobs need: %d', comp, comp.user,
                    len(spec['files']))
        self._share.joins(comp)
        tables.comps[message.comp] = comp
        self.resize()
        key = result_key(spec)
        if self._results.has_key(message.comp, key):
            self._results.give_to(message.comp, up.instance)
            self._results.resend(message.comp, link)
        action = PrepareDirectory(message.comp, spec)
        tables.do(action)

    def client_back(self, comp: _Computation, link: int) -> None:
        """Note that the client of a computation is back after a broken link."""
        tables = self._tables
        if comp.link != link:
            logger.info('%s: its client is back; %d jobs are here', comp, len(comp.attempts))
        comp.link = link
        if comp.stage is Stage.RECEIVING:
            action = WantAgain(comp.comp)
            tables.do(action)
        if comp.stage is Stage.READY:
            tables.send(link, self._ready(comp))
        self._results.resend(comp.comp, link)
        workers = comp.workers.values()
        comp.begun = [(worker.queue[0].serial, worker.since) for worker in workers
                      if worker.queue and worker.told]

    def _ready(self, comp: _Computation) -> Ready:
        return Ready(comp.comp, self._results.known_attempts(comp.comp), self._past.row(comp.comp))

    def on_prepared(self, event: DirectoryReady, now: float) -> None:
        """Note that the directory exists, or that it cannot be used."""
        tables = self._tables
        comp = tables.comps[event.comp]
        if comp.stage is not Stage.PREPARING:
            return
        if event.error:
            self.refuse(comp, event.code, event.error)
        elif event.missing:
            comp.move('missing')
            tables.ask_for_files(comp, event.missing)
        else:
            self._start(comp, now)

    def on_wanted(self, event: Wanted, now: float) -> None:
        """Request the files that are still missing on another link."""
        tables = self._tables
        comp = tables.comps.get(event.comp)
        if comp is None:
            return
        if comp.stage is not Stage.RECEIVING:
            return
        if event.missing:
            tables.ask_for_files(comp, event.missing)

    def on_file_piece(self, link: int, message: FilePiece, now: float) -> None:
        """Take a piece of a file that has come from a client."""
        tables = self._tables
        comp = tables.comp_of(link, message.comp)
        asked = message.purpose in ASKED_FOR
        if message.purpose == Purpose.FROM_JOB or (asked and comp is not None and not comp.asked):
            raise PeerError('a file that was not asked for')
        # What was sent on another connection is sent again on this one
        if asked and comp is not None:
            if comp.link != link:
                return
        if comp is not None and (asked or comp.stage is Stage.READY):
            tables.do(WriteFile(message))
        elif not asked and message.offset + len(message.data) >= message.row[1]:
            text = 'the computation is not set up there'
            tables.send(link, FileStored(*message[:3], message.row[0], text))

    def on_stored(self, event: FileWritten, now: float) -> None:
        """Note that a file is complete, or cannot be stored."""
        file = event.file
        tables = self._tables
        comp = tables.comps.get(file.comp)
        error = file.error
        if file.purpose == Purpose.VALUES:
            self._attempts.value_stored(file, now)
        elif comp is not None and file.purpose not in ASKED_FOR:
            tables.reply(comp, file)
        elif comp is not None and (error or event.complete):
            if comp.fetches:
                answer = Fetched(comp.comp, [], error)
                self._requests.on_fetched(answer, now)
            if comp.stage is Stage.RECEIVING and error:
                self.refuse(comp, event.code, error)
            elif comp.stage is Stage.RECEIVING:
                self._start(comp, now)

    def _start(self, comp: _Computation, now: float) -> None:
        comp.move('complete')
        logger.info('%s: its files are here, its runner is started', comp)
        action = StartRunner(comp.comp, comp.spec, comp.link)
        self._tables.do(action)
        when = now + SETUP_TIME
        self._set_timer(when, comp, self._setup_late)

    def _set_timer(self, when: float, comp: _Computation, call: Callable[..., None]) -> None:
        self._timers.at(when, comp.comp, call, comp.comp, is_wanted=self._is_here)

    def _is_here(self, name: str) -> bool:
        return name in self._tables.comps

    def _setup_late(self, name: str, now: float) -> None:
        late = self._tables.comps.get(name)
        if late is None:
            return
        if late.stage is Stage.STARTING:
            text = 'setup did not end within %d s' % SETUP_TIME
            self.refuse(late, 'setup', text)

    def on_runner_up(self, event: RunnerUp, now: float) -> None:
        """Note that the code is loaded and setup has returned."""
        tables = self._tables
        comp = tables.comps[event.comp]
        if comp.stage is Stage.STARTING:
            comp.move('up')
            logger.info('%s: its runner is ready for jobs, %.1f s after the computation came',
                        comp, now - comp.since)
            tables.reply(comp, self._ready(comp))
            for note in event.notes:
                message = Notice(comp.comp, 'node %s: %s' % (tables.name, note))
                tables.reply(comp, message)

    def resize(self) -> None:
        """Recompute the number of CPUs, because computations have come or gone, or may use other
        numbers of CPUs."""
        comps = self._tables.comps.values()
        self._cpus.resize(comp.limit for comp in comps)

    # -- what cannot go on -------------------------------------------------------------------------

    def refuse(self, comp: _Computation, code: str, text: str) -> None:
        """Tell the client that a computation cannot be used here, or not any more, and why."""
        text = shorten(text)
        logger.warning('%s is refused (%s): %s', comp, code, text)
        self._attempts.return_waiting(comp)   # attempts that have not begun wait again elsewhere
        # Attempts that have ended are reported before the refusal; afterwards the client would
        # ignore them
        self._results.deliver(comp)
        self._results.spool(comp)
        message = Refused(comp.comp, code, text)
        self._tables.reply(comp, message)
        self.close(comp, at_once=True)

    def end(self, comp: _Computation, forced_end: ForcedEnd, now: float) -> None:
        """Refuse a computation while its jobs run. These are killed first: only when their workers
        have ended is it known which jobs had begun and have failed, and which are to run
        elsewhere."""
        if comp.stage in (Stage.ENDING, Stage.CLOSING):
            return
        comp.forced_end = forced_end
        if comp.stage is not Stage.READY:
            self.refuse(comp, forced_end.code, forced_end.text)
            return
        comp.move('end')
        self.ending.append(comp)
        self._attempts.return_waiting(comp)
        self._scheduler.kill_running(comp)
        when = now + END_TIME
        self._set_timer(when, comp, self._end_late)

    def _end_late(self, name: str, now: float) -> None:
        """Go on although workers that were killed have not ended."""
        comp = self._tables.comps.get(name)
        if comp is None:
            return
        if comp.stage is not Stage.ENDING:
            return
        forced_end = comp.forced_end
        assert forced_end is not None   # it is set before the stage
        self._scheduler.fail_running(comp, forced_end.outcome, forced_end.job_text)

    def refuse_ended(self) -> None:
        """Refuse the computations that are to end and of which nothing runs any more."""
        for comp in list(self.ending):
            if comp.stage is not Stage.ENDING or comp.forced_end is None:
                self.ending.remove(comp)   # it was refused for another reason
            elif not any(worker.queue for worker in comp.workers.values()):
                self.ending.remove(comp)
                self.refuse(comp, comp.forced_end.code, comp.forced_end.text)

    def on_faulted(self, event: Faulted, now: float) -> None:
        """End a computation that a fault of this program concerns."""
        comp = self._tables.comps.get(event.comp)
        if comp is None:
            return
        end = ForcedEnd('fault', event.text, Outcome.DIED, event.text)
        self.end(comp, end, now)

    def on_worker_initialized(self, event: WorkerInitialized, now: float) -> None:
        """Note that the initializer has returned in a worker, or has failed there, as it would in
        all others."""
        scheduler = self._scheduler
        error = event.error
        worker = self._tables.workers.get(event.worker)
        if worker is None:
            return
        if event.worker not in worker.comp.starting:
            return
        comp = worker.comp
        comp.starting.discard(event.worker)
        comp.startup_failures = 0
        if comp.stage is Stage.CLOSING:
            return
        if error:
            end = ForcedEnd('initializer', error, Outcome.DIED, error)
            self.end(comp, end, now)
        else:
            scheduler.initialized(worker)

    def on_worker_gone(self, event: WorkerGone, now: float) -> None:
        """Note that a worker has ended. If workers end again and again before they run a job, no
        other one is started."""
        worker = self._tables.workers.get(event.worker)
        if worker is None:
            return
        comp = worker.comp
        initializing = worker.key in comp.starting
        self._scheduler.worker_gone(worker, event, now)
        if comp.stage is Stage.CLOSING:
            return
        if not comp.startup_failures > 3:
            return
        code, when = 'worker', 'before they run anything'
        if initializing and comp.spec.get('initializer'):
            code, when = 'initializer', 'in the initializer'
        elif initializing:
            code, when = 'setup', 'while they load the computation or run setup'
        text = 'workers die %s: %s' % (when, event.text)
        self.refuse(comp, code, text)

    def on_runner_gone(self, event: RunnerGone, now: float) -> None:
        """Note that the runner has ended, because it was told to or by itself."""
        text = event.text
        tables = self._tables
        comp = tables.comps.get(event.comp)
        if comp is None:
            return
        if comp.stage is not Stage.CLOSING:
            # Its workers are killed with it; their running jobs have failed, and all later jobs
            # would fail.
            for worker in list(comp.workers.values()):
                comp.startup_failures = 0
                if worker.queue:
                    head = worker.queue[0].serial
                else:
                    head = 0
                if event.begun is None or head in event.begun:
                    ran = head
                else:
                    ran = 0
                end = WorkerGone(worker.key, 'the runner process ended: %s' % text, ran)
                self.on_worker_gone(end, now)
            if event.unloadable:
                code = 'code'
            else:
                code = event.code
            if comp.forced_end is not None:
                code, text = comp.forced_end[:2]
            self.refuse(comp, code, text)
            return
        logger.info('%s: its runner has ended%s', comp, text and ' (%s)' % text)
        self._scheduler.remove_workers(comp)
        del tables.comps[event.comp]
        self.resize()

    # -- the end -----------------------------------------------------------------------------------

    def wait_for_client(self, comp: _Computation, now: float) -> None:
        """Note that the client of a computation is away: attempts that have not begun are returned,
        and results go to the disk."""
        attempts = self._attempts
        attempts.return_lacking(comp, attempts.values.interrupt(comp.comp))
        self._results.spool(comp)
        when = now + ORPHAN_TIME
        self._look_again(comp, when)

    def _look_again(self, comp: _Computation, when: float) -> None:
        comp.orphan_at = when
        self._set_timer(when, comp, self._client_stayed_away)

    def _client_stayed_away(self, name: str, now: float) -> None:
        tables = self._tables
        comp = tables.comps.get(name)
        # Its client is back, or was back and has left again, with a timer of its own
        if comp is None:
            return
        if comp.link in tables.links:
            return
        if now < comp.orphan_at:
            return
        self._results.spool(comp)
        if not comp.attempts and not comp.unacknowledged:
            self.close(comp, at_once=False)
        else:
            when = now + 1.0
            self._look_again(comp, when)

    def on_kept(self, event: ResultsSpooled, now: float) -> None:
        """Note that results of a computation whose client is away are on the disk, or cannot be
        written there."""
        tables = self._tables
        if not event.error:
            self._results.on_spooled(event, now)
            return
        self._results.spooling_failed(event)
        comp = tables.comps.get(event.comp)
        if comp is None:
            return
        if comp.link not in tables.links:
            when = now + ORPHAN_TIME
            self._look_again(comp, when)

    def evict_orphans(self) -> None:
        """End computations that have lost their client and have no jobs, because another client
        wants this node."""
        tables = self._tables
        for comp in list(tables.comps.values()):
            if comp.link in tables.links:
                continue
            if comp.attempts:
                continue
            if not comp.unacknowledged:
                self.close(comp, at_once=True)

    def on_done(self, link: int, message: Done, now: float) -> None:
        """End a computation, because its client needs it no longer."""
        comp = self._tables.comp_of(link, message.comp)
        if comp is not None:
            self.close(comp, at_once=False)
        # This includes a computation that is being closed because it was orphaned
        if self._results.may_forget(link, message.comp):
            self._results.forget(message.comp)
            self._past.forget(message.comp)

    def give_up(self, comp: _Computation) -> None:
        """End the computations of a client that has left on purpose."""
        self.close(comp, at_once=True)
        self._results.forget(comp.comp)
        self._past.forget(comp.comp)

    def close(self, comp: _Computation, at_once: bool) -> None:
        """End a computation; `at_once` means without cleanup."""
        tables = self._tables
        if comp.stage is Stage.CLOSING:
            return
        comp.move('close')
        logger.info(
            '%s of %s is over after %.1f s: %d attempts of jobs ended, %d of them '
            'without a value, and %d had not; they used %.1f CPU seconds', comp, comp.user,
            tables.now - comp.since, comp.done, comp.failed, len(comp.attempts), comp.cpu_seconds)
        self._attempts.drop(comp)
        comp.unacknowledged.clear()
        self._scheduler.drop(comp)
        action = StopRunner(comp.comp, at_once)
        tables.do(action)


class Inquiries:
    """Answers questions to a node: those of clients about a computation here, and those of its
    operator about the node."""

    def __init__(self, tables: NodeTables, lease: NodeLease, cpus: Cpus, facts: dict,
                 now: float) -> None:
        self._tables = tables
        self._lease = lease
        self._cpus = cpus
        self._facts = facts
        self._born = now
        self.queries: List[Tuple[int, str]] = []  # links, and the computations about which they ask

    def on_query(self, link: int, message: Query, now: float) -> None:
        """Note the question of a client. It is answered at the end of the turn, when the attempts
        that came in this turn have been started."""
        self._tables.comp_of(link, message.comp)
        self.queries.append((link, message.comp))

    def answer(self, now: float) -> None:
        """Answer all questions of this turn."""
        tables = self._tables
        while self.queries:
            link, name = self.queries.pop()
            if link in tables.links:
                tables.send(link, self._report(link, name, now))

    def _report(self, link: int, name: str, now: float) -> Report:
        tables = self._tables
        running = []
        waiting = []
        comp = tables.comps.get(name)
        is_its_own = comp is not None and comp.instance == tables.links[link].instance
        if comp is not None and is_its_own and comp.stage is not Stage.CLOSING:
            workers = comp.workers.values()
            running = [(worker.queue[0].serial, now - worker.since) for worker in workers
                       if worker.queue]
            attempts = set(comp.attempts)
            serials = {serial for serial, _ in running}
            waiting = sorted(attempts - serials)
        busy = sum(bool(worker.queue) for worker in tables.workers.values())
        fact = self._facts.get('available', {})
        holder = self._lease.held_by(now)
        available = dict(fact, busy=busy, holder=holder)
        return Report(name, running, waiting, available)

    def status(self, state: str, now: float) -> str:
        """Return what the node does, for people; `state` says whether it takes jobs."""
        tables = self._tables
        text = '%s: %d of %d CPUs used, %s, up %s' % (tables.name, self._cpus.total -
                                                      self._cpus.free, self._cpus.offered, state,
                                                      _duration(now - self._born))
        lines = [text]
        if self._lease.state is Lease.FREE:
            lines.append('held by no client, %d served' % self._lease.served)
        else:
            holder = self._lease.held_by(now)
            lines.append('held by %s' % holder)
        for comp in tables.comps.values():
            workers = comp.workers.values()
            running = sum(1 for worker in workers if worker.queue)
            waiting = len(comp.attempts) - running
            line = '  %s (%s): %d jobs running, %d waiting, %d done' % (
                comp.spec['name'], comp.stage.value, running, waiting, comp.done)
            lines.append(line)
        return '\n'.join(lines)


class JobLookouts:
    """Questions of clients about what their running jobs do."""
    WAITING = 100   # limit of answers that are awaited

    def __init__(self, tables: NodeTables) -> None:
        self._tables = tables
        # (worker, serial) -> the requests: links, computations, numbers of their calls
        self._asked: 'collections.OrderedDict[Tuple[int, int], List[tuple]]' = \
            collections.OrderedDict()

    def on_call(self, link: int, message: Call, now: float) -> None:
        """Take a question. The runner inspects the job, unless it already does."""
        serial, stacks = self._what(message)
        comp = self._tables.comp_of(link, message.comp)
        worker = None
        if comp is not None:
            worker = self._worker_with(comp, serial)
        if worker is None:
            error = ('LookupError', 'the job does not run at this node')
            answer = Return(message.comp, message.number, error, None)
            action = Send(link, answer)
            self._tables.do(action)
            return
        key = (worker.key, serial)
        who = (link, message.comp, message.number)
        asked = self._asked.setdefault(key, [])
        asked.append(who)
        if len(self._asked) > self.WAITING:   # a runner may not have answered some
            self._asked.popitem(last=False)
        request = Look(worker.key, serial, stacks)
        self._tables.do(request)

    @staticmethod
    def _what(message: Call) -> Tuple[int, bool]:
        """Return the serial of the job, and whether its stacks are wanted. Raises PeerError."""
        kinds = list(map(type, message.args))
        if message.name != 'look' or kinds != [int, bool]:
            raise PeerError('a malformed question')
        serial, stacks = message.args
        return serial, stacks

    @staticmethod
    def _worker_with(comp: _Computation, serial: int) -> Optional[_Worker]:
        for worker in comp.workers.values():
            if not worker.queue:
                continue
            if worker.queue[0].serial == serial:
                return worker
        return None

    def on_seen(self, event: JobSeen, now: float) -> None:
        """Answer with what a runner has seen."""
        key = (event.worker, event.serial)
        value = (event.stacks, event.stdout, event.stderr)
        for link, comp, number in self._asked.pop(key, ()):
            if link in self._tables.links:
                answer = Return(comp, number, (), value)
                action = Send(link, answer)
                self._tables.do(action)


class NodeService:
    """Whether a node takes new jobs, and how it ends. The hours of service, the user of its machine
    and its operator can pause it and let it go on; the operator or the end of its last lease stops
    it.

    paused - for each authority, why no new jobs are taken
    stopping - the node is about to end
    """

    def __init__(self, tables: NodeTables, timers: Timers, cpus: Cpus,
                 results: UndeliveredResults, attempts: Attempts, interruptions: Interruptions,
                 scheduler: CpuScheduler, computations: Computations,
                 inquiries: Inquiries) -> None:
        self._tables = tables
        self._timers = timers
        self._cpus = cpus
        self._results = results
        self._attempts = attempts
        self._interruptions = interruptions
        self._scheduler = scheduler
        self._computations = computations
        self._inquiries = inquiries
        self.paused: Dict[str, str] = {}
        self.stopping = False
        self.is_ending = False
        self._leaving = False     # running jobs were killed and have not ended yet

    def refusal(self, comp: str) -> Optional[Refused]:
        """Return why no client can have the node for a computation now; None if there is no
        reason."""
        if self.stopping:
            return Refused(comp, 'stopping', 'the node is being stopped')
        if self.paused:
            text = 'it takes no new jobs: %s' % self._why_paused()
            return Refused(comp, 'paused', text)
        return None

    def _why_paused(self) -> str:
        return ', '.join(self.paused.values())

    # -- the end -----------------------------------------------------------------------------------

    def stop(self, event: Stop, now: float) -> None:
        """Return attempts that have not started, and interrupt those that run; a second call ends
        the node at once."""
        if self.stopping:
            self._leave(now)
            return
        self.stopping = True
        self.is_ending = True
        self._attempts.refuses_new = True
        grace = self._interruptions.grace
        logger.info('stopping: jobs that wait are returned to their clients, and running jobs have '
                    '%g s to end',
                    grace)
        when = now + grace + 0.5
        self._timers.at(when, '', self._leave, is_wanted=lambda: True)
        self._offer(0)
        self._interruptions.end_all(now)

    def finish(self, event: Finish, now: float) -> None:
        """Take no new jobs, and end when the jobs that are here have ended."""
        self.is_ending = True
        pause = Pause('finish', 'the node ends when its jobs have ended')
        self.pause(pause, now)
        self._attempts.take_back_all()

    def leave_when_done(self, now: float) -> None:
        """End a stopping node when nothing is left to do. This is called at the end of a turn."""
        if not self._has_work():
            self._leave(now)

    @property
    def has_jobs(self) -> bool:
        """Return whether there are jobs here, whether they run or wait."""
        comps = self._tables.comps.values()
        return any(comp.attempts for comp in comps)

    def _leave(self, now: float) -> None:
        """Kill what runs, wait until it is known which attempts had begun, and end."""
        tables = self._tables
        if not self._leaving and self._runs_jobs():
            self._leaving = True
            for comp in tables.comps.values():
                self._scheduler.kill_running(comp)
            when = now + END_TIME
            self._timers.at(when, '', self._leave, is_wanted=lambda: True)
            return
        text = ENDING_TEXT[Outcome.STOPPED]
        for comp in tables.comps.values():
            if comp.stage is not Stage.CLOSING:
                self._scheduler.fail_running(comp, Outcome.STOPPED, text)
            self._results.deliver(comp)
            self._results.spool(comp)
        for link in tables.links:
            action = Drop(link, 'node stopped')
            tables.do(action)
        for comp in tables.comps.values():
            self._computations.close(comp, at_once=True)
        tables.do(Exit())

    def _runs_jobs(self) -> bool:
        """Return whether workers have jobs."""
        workers = self._tables.workers.values()
        return any(worker.queue for worker in workers)

    def _has_work(self) -> bool:
        """Return whether workers have jobs, or connected clients have not acknowledged results;
        after running jobs were killed, acknowledgements are not waited for."""
        tables = self._tables
        if self._runs_jobs():
            return True
        if self._leaving:
            return False
        for comp in tables.comps.values():
            if not comp.unacknowledged:
                continue
            if comp.link in tables.links:
                return True
        return False

    def _offer(self, cpus: int) -> None:
        tables = self._tables
        for link in tables.links:
            tables.send(link, CpusChanged(cpus))

    # -- pauses ------------------------------------------------------------------------------------

    def pause(self, event: Pause, now: float) -> None:
        """Take no new jobs, and end those that run if this is requested."""
        self.paused[event.by] = event.text
        self._attempts.refuses_new = True
        logger.info('this node takes no new jobs: %s', event.text)
        self._offer(0)
        if event.end:
            self._interruptions.end_all(now)

    def resume(self, event: Resume, now: float) -> None:
        """Take jobs again, if no other authority has paused the node."""
        if self.paused.pop(event.by, None) is None:
            return
        if self.paused:
            return
        if self.stopping:
            return
        logger.info('this node takes jobs again')
        self._attempts.refuses_new = False
        self._interruptions.ends_all = False
        self._offer(self._cpus.offered)

    def set_cpus(self, event: SetCpus, now: float) -> None:
        """Offer another number of CPUs."""
        self._cpus.offered = event.cpus
        self._computations.resize()
        logger.info('this node now offers %d CPUs', self._cpus.offered)
        if not self._attempts.refuses_new:
            self._offer(self._cpus.offered)

    def status(self, event: Status, now: float) -> None:
        """Print what the node does."""
        if self.stopping:
            state = 'no new jobs: being stopped'
        elif self.paused:
            state = 'no new jobs: %s' % self._why_paused()
        else:
            state = 'takes jobs'
        text = self._inquiries.status(state, now)
        action = PrintStatus(text)
        self._tables.do(action)


class Node:
    """What a node decides. Events in, actions out; `flush` is called once in each turn, after all
    events of the turn. Its parts decide about their own state: see their classes."""

    def __init__(self,
                 name: str,
                 cpus: int,
                 facts: dict,
                 zombie: float = ZOMBIE_TIME,
                 serve: int = 0,
                 client_shutdown: bool = False,
                 now: float = 0.0,
                 grace: float = GRACE) -> None:
        self.name = name
        self.facts = facts
        start_method = facts.get('start_method', FORK)
        self.tables = NodeTables(name, start_method)
        self.timers = Timers()
        self.cpus = Cpus(cpus)
        self.lease = NodeLease(serve, client_shutdown)
        self.inquiries = Inquiries(self.tables, self.lease, self.cpus, facts, now)
        self.lookouts = JobLookouts(self.tables)
        self.past = PastAttempts(self.tables, self.timers)
        self.results = UndeliveredResults(self.tables, self.timers, self.past, zombie)
        share = FairShare(self.tables, self.cpus)
        units = Units(facts.get('resources', {}))
        self.attempts = Attempts(self.tables, self.cpus, self.past, self.results, share, units)
        self.interruptions = Interruptions(self.tables, self.timers, self.attempts, grace)
        self.scheduler = CpuScheduler(self.tables, self.timers, self.cpus, self.attempts,
                                      self.interruptions, share, units)
        self.requests = JobRequests(self.tables, self.attempts)
        self.computations = Computations(self.tables, self.timers, self.cpus, self.past,
                                         self.results, self.attempts, self.scheduler, share,
                                         self.requests)
        self.service = NodeService(self.tables, self.timers, self.cpus, self.results,
                                   self.attempts, self.interruptions, self.scheduler,
                                   self.computations, self.inquiries)
        self._handlers: Dict[type, Callable[..., None]] = {
            LinkUp: self._link_up,
            LinkDown: self._link_down,
            Received: self._received,
            SpoolFound: self.results.on_found,
            Remembered: self.past.on_remembered,
            ResultsSpooled: self.computations.on_kept,
            DirectoryReady: self.computations.on_prepared,
            Wanted: self.computations.on_wanted,
            FileWritten: self.computations.on_stored,
            RunnerUp: self.computations.on_runner_up,
            RunnerGone: self._runner_gone,
            Faulted: self.computations.on_faulted,
            ValueSought: self.attempts.on_value_sought,
            WorkerResults: self.scheduler.on_results,
            WorkerReturnedJobs: self.scheduler.on_returned,
            WorkerStartFailed: self.scheduler.on_start_failed,
            WorkerInitialized: self.computations.on_worker_initialized,
            WorkerGone: self.computations.on_worker_gone,
            WorkerLeft: self.scheduler.pool.special.on_worker_left,
            MemoryExceeded: self.interruptions.on_too_big,
            WorkerOverdue: self.interruptions.on_overdue,
            JobSeen: self.lookouts.on_seen,
            WorkerFile: self.requests.on_file,
            WorkerWants: self.requests.on_wants,
            WorkerPrinted: self.requests.on_printed,
            Fetched: self.requests.on_fetched,
            EndWanted: self._end_wanted,
            Stop: self.service.stop,
            Finish: self.service.finish,
            Pause: self.service.pause,
            Resume: self.service.resume,
            SetCpus: self.service.set_cpus,
            Release: self._take_from_holder,
            Status: self.service.status,
        }
        self._messages: Dict[type, Callable[..., None]] = {
            ClientHello: self._on_introduce,
            Compute: self._on_compute,
            FilePiece: self.computations.on_file_piece,
            FileStored: self.requests.on_file_stored,
            Jobs: self.attempts.on_jobs,
            Unfit: self.attempts.on_unfit,
            ReturnJobs: self.attempts.on_recall,
            Cancel: self.interruptions.on_cancel,
            Ack: self.results.on_ack,
            Done: self.computations.on_done,
            Query: self.inquiries.on_query,
            Call: self.lookouts.on_call,
            Shutdown: self._on_shutdown,
            Limit: self._on_limit,
            Reclaim: self._on_reclaim,
            Return: self.requests.on_return,
        }

    # -- called by the shell -----------------------------------------------------------------------

    def handle(self, event: Any, now: float) -> List[Any]:
        """Handle one event. Returns what must be done at once. Raises PeerError for a message that
        is not permitted."""
        tables = self.tables
        tables.actions = []
        tables.now = now
        self._handlers[type(event)](event, now)
        return tables.actions

    def flush(self, now: float) -> List[Any]:
        """End a turn: handle due timers, give work to idle workers, send results to clients.
        Returns what must be done."""
        tables = self.tables
        tables.actions = []
        tables.now = now
        while self.timers.next_at <= now:
            timer = self.timers.pop()
            tables.guarded(timer.comp, timer.call, *timer.args, now)
        if self.scheduler.look_at <= now:
            self.scheduler.look(now)
        if self.attempts.values.waiting_for:
            self.attempts.serve_values()
        refuses_new = self.attempts.refuses_new
        if not refuses_new:
            self.scheduler.assign_cpus(now)
        for comp in list(tables.comps.values()):
            if comp.outbox or comp.begun or refuses_new:
                tables.guarded(comp.comp, self._tell, comp, now)
            if len(comp.unacknowledged) > BEGUN_KEPT // 2 and not comp.overrun:
                comp.overrun = True
                tables.do(NoteOverrun(comp.comp))
        if self.inquiries.queries:
            self.inquiries.answer(now)
        if self.computations.ending:
            self.computations.refuse_ended()
        if self.service.is_ending:
            self.service.leave_when_done(now)
        return tables.actions

    def decided(self) -> List[Any]:
        """Return the actions of the last `handle` or `flush`, which raised an exception."""
        tables = self.tables
        actions = tables.actions
        tables.actions = []
        return actions

    def comp_of_worker(self, key: int) -> str:
        """Return the computation of a worker; empty if there is no such worker."""
        worker = self.tables.workers.get(key)
        if worker is not None:
            return worker.comp.comp
        return ''

    def next_timer(self) -> Optional[float]:
        """Return when `flush` has something to do at the latest."""
        when = min(self.timers.next_at, self.scheduler.look_at)
        if when < math.inf:
            return when
        return None

    def serves(self, link: int) -> bool:
        """Return whether a computation of this link's client is here."""
        for comp in self.tables.comps.values():
            if comp.link == link:
                return True
        return False

    def is_preparing(self, name: str) -> bool:
        """Return whether files of a computation are still to be compared."""
        comp = self.tables.comps.get(name)
        if comp is None:
            return False
        return comp.stage is Stage.PREPARING

    def has_jobs(self, name: str) -> bool:
        """Return whether a computation has jobs that run or wait."""
        comp = self.tables.comps.get(name)
        if comp is None:
            return False
        return bool(comp.attempts)

    def _tell(self, comp: _Computation, now: float) -> None:
        """Tell the client what has become of its jobs."""
        if self.attempts.refuses_new:
            self.attempts.return_waiting(comp)
        if comp.begun:
            rows = []
            for serial, since in comp.begun:
                row = (serial, now - since)
                rows.append(row)
            message = Started(comp.comp, rows)
            self.tables.reply(comp, message)
            comp.begun = []
        self.results.deliver(comp)

    # -- links and lease ---------------------------------------------------------------------------

    def _link_up(self, event: LinkUp, now: float) -> None:
        self.tables.links[event.link] = event

    def _link_down(self, event: LinkDown, now: float) -> None:
        tables = self.tables
        if event.link in tables.links:
            client = tables.client_at(event.link)
            logger.info('%s has %s', client,
                        'disconnected' if event.on_purpose else 'lost its connection')
        gone = tables.remove_link(event.link)
        self.lease.forget_link(event.link)
        self.results.forget_link(event.link)
        if gone is None:
            return
        if gone.instance != self.lease.holder:
            return
        comps = tables.comps.values()
        for comp in [comp for comp in comps if comp.link == event.link]:
            self.requests.client_gone(comp)
            if event.on_purpose:
                self.computations.give_up(comp)
            else:
                self.computations.wait_for_client(comp, now)
        links = tables.links.values()
        if not any(link.instance == self.lease.holder for link in links):
            self.lease.orphan()
        self._free_lease(now)

    def _take_lease(self, link: int, now: float) -> None:
        tables = self.tables
        instance = tables.links[link].instance
        client = tables.client_at(link)
        self.lease.take(instance, client, now, tables.process_at(link))

    def _free_lease(self, now: float) -> None:
        """Free the lease if its holder has no computation here."""
        tables = self.tables
        if self.lease.state is Lease.FREE:
            return
        if tables.comps:
            return
        self.lease.end()
        if not self.attempts.refuses_new:
            for link in self.lease.take_refused():
                tables.send(link, CpusChanged(self.cpus.offered))
        if self.lease.was_last() and not self.service.stopping:
            self.service.stop(Stop(), now)

    def _runner_gone(self, event: RunnerGone, now: float) -> None:
        self.computations.on_runner_gone(event, now)
        self._free_lease(now)

    # -- messages of clients -----------------------------------------------------------------------

    def _received(self, event: Received, now: float) -> None:
        handler = self._messages.get(type(event.message))
        if handler is None or event.link not in self.tables.links:
            type_name = type(event.message).__name__
            raise PeerError('%s may not come here' % type_name)
        handler(event.link, event.message, now)

    def _on_introduce(self, link: int, message: ClientHello, now: float) -> None:
        tables = self.tables
        tables.name_client(link, message.name[:200], message.process)
        client = tables.client_at(link)
        address = tables.links[link].address
        logger.info('%s has connected from %s', client, address)
        instance = tables.links[link].instance
        # This includes computations without results on the disk: the client may be done with them
        comps = tables.comps.values()
        kept: Dict[str, List[int]] = {}
        for comp in comps:
            if comp.instance != instance:
                continue
            if comp.stage is not Stage.CLOSING:
                kept[comp.comp] = []
        for name in self.results.spooled_of(instance):
            kept[name] = self.results.known_attempts(name)
        answer = NodeHello(self.name, self.cpus.offered,
                           dict(self.facts, holder=self.lease.held_by(now), kept=kept))
        tables.send(link, answer)
        if self.service.paused:
            tables.send(link, CpusChanged(0))

    def _on_compute(self, link: int, message: Compute, now: float) -> None:
        tables = self.tables
        comp = tables.comp_of(link, message.comp)
        if comp is not None:
            if not hmac.compare_digest(comp.digest, result_key(message.spec)):
                raise PeerError('computation %.40r has another key' % message.comp)
        if comp is not None:   # its client is back after a broken link
            self._take_lease(link, now)
            self.computations.client_back(comp, link)
            return
        refusal = self._refusal(link, message.comp, now, message.spec)
        if refusal is not None:
            tables.send(link, refusal)
        elif self.lease.is_of_another(tables.links[link].instance):
            self.lease.refuse(link)
            holder = self.lease.held_by(now)
            text = 'it serves %s' % holder
            tables.send(link, Refused(message.comp, 'busy', text, self.lease.holder_row()))
            self.computations.evict_orphans()
        else:
            self._take_lease(link, now)
            self.computations.begin(link, message)

    def _refusal(self, link: int, name: str, now: float, spec: dict) -> Optional[Refused]:
        """Return why no client, or not this one, can have the node for a computation now; None if
        the node is free for it."""
        tables = self.tables
        refused = self.service.refusal(name)
        if refused is not None:
            return refused
        if self.lease.is_cooling_down(tables.links[link].instance, now):
            return Refused(name, 'busy', RELEASED_TEXT)
        if name in tables.comps:
            return Refused(name, 'closing', 'the same computation is still being closed')
        if spec.get('start_method') == FORK and not can_fork():
            return Refused(name, 'start_method', NO_FORK)
        wanted = spec.get('interpreter', '')
        if wanted and wanted not in self.facts.get('pythons', {}):
            return Refused(name, 'python', 'it has no Python %s; it has %s' % (
                wanted, pythons_text(self.facts)))
        return None

    def _on_reclaim(self, link: int, message: Reclaim, now: float) -> None:
        take = message.take
        tables = self.tables
        comp = tables.comps.get(message.comp)
        up = tables.links[link]
        spooled = self.results.spooled.get(message.comp)
        digests = []
        for known in (comp, spooled):
            if known is not None:
                digests.append(known.digest)
        if not all(may_reclaim(digest, message.key) for digest in digests):
            client = tables.client_at(link)
            logger.warning('%s has asked for results of a computation and does not have its '
                           'key', client)
            unknown = AttemptHistory(whole=False)
            past = unknown.row()
            tables.send(link, KnownAttempts(message.comp, [], past))
            return
        self.results.note_key(link, message.comp)
        if comp is not None and comp.stage is not Stage.CLOSING:
            if comp.link in tables.links and comp.link != link:
                holder = self.lease.held_by(now)
                text = 'its client is connected: %s' % holder
                tables.send(link, Refused(message.comp, 'busy', text))
                return
            if take:
                comp.link = link
                comp.instance = up.instance
                self._take_lease(link, now)
        if take:
            self.results.give_to(message.comp, up.instance)
        serials = self.results.known_attempts(message.comp)
        row = self.past.row(message.comp)
        answer = KnownAttempts(message.comp, serials, row)
        tables.do(Send(link, answer))
        if take:
            self.results.resend(message.comp, link)

    def _on_limit(self, link: int, message: Limit, now: float) -> None:
        comp = self.tables.comp_of(link, message.comp)
        if comp is not None:
            comp.limit = message.cpus
            self.computations.resize()

    def _on_shutdown(self, link: int, message: Shutdown, now: float) -> None:
        comp = self.tables.comp_of(link, message.comp)
        if comp is not None:
            event = EndWanted(message.comp)
            self._end_wanted(event, now)

    def _end_wanted(self, event: EndWanted, now: float) -> None:
        """End when the lease ends, if the operator permits that."""
        if event.comp not in self.tables.comps:
            return
        is_last = self.lease.make_last()
        logger.info('%s asks for the end of this node%s', self.lease.holder_text,
                    '' if is_last else ', which was started without --client-shutdown')

    # -- the operator ------------------------------------------------------------------------------

    def _take_from_holder(self, event: Release, now: float) -> None:
        if self.lease.state is Lease.FREE:
            logger.info('no client holds this node')
            return
        logger.info('taken from %s by the operator', self.lease.holder_text)
        until = now + RELEASE_COOLDOWN
        self.lease.cool_down(until)
        text = ENDING_TEXT[Outcome.STOPPED]
        end = ForcedEnd('released', RELEASED_TEXT, Outcome.STOPPED, text)
        for comp in list(self.tables.comps.values()):
            self.computations.end(comp, end, now)
        self.computations.refuse_ended()
        self._free_lease(now)


class EventText(reprlib.Repr):
    """Formats an event, an action or a message for the log as one short line. Empty fields are left
    out, long lists are truncated, and data of users is replaced by its size in bytes, so that the
    log contains neither their data nor a key."""
    # Names of fields that hold the serial number of an attempt, or a list of them
    SERIALS = frozenset(('serial', 'serials', 'held', 'begun'))
    # Messages and events whose rows begin with the serial number of an attempt; in results, the
    # outcome follows
    ROWS = frozenset((Jobs, Results, Started, WorkerResults))
    RESULTS = frozenset((Results, WorkerResults))

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = 5
        self.maxlist = 5
        self.maxtuple = 5
        self.maxstring = self.maxother = 120

    def repr_instance(self, x: Any, level: int) -> str:
        """Format an object for which there is no method."""
        if isinstance(x, Attempt):
            return self._attempt(x.serial)
        if isinstance(x, enum.Enum):
            return x.name
        if isinstance(x, (bytes, bytearray, memoryview)):
            return '<%d bytes>' % len(x)
        if isinstance(x, pickle.PickleBuffer):
            return '<%d bytes>' % x.raw().nbytes
        if isinstance(x, tuple):
            if hasattr(x, '_fields'):
                return self._fields(x, level)
        return str(super().repr_instance(x, level))

    repr_bytes = repr_bytearray = repr_memoryview = repr_instance

    def _fields(self, x: Any, level: int) -> str:
        shown = ['%s=%s' % (name, self._field(type(x), name, value, level))
                 for name, value in zip(x._fields, x) if value or type(value) in (int, float)]
        return '%s(%s)' % (type(x).__name__, ', '.join(shown))

    def _field(self, kind: type, name: str, value: Any, level: int) -> str:
        if name == 'spec':
            return '<%s %s>' % (value.get('kind'), value.get('name'))
        if name in self.SERIALS:
            if isinstance(value, int):
                return self._attempt(value)
        if name in self.SERIALS:
            in_order = sorted(value)
            return self._list(in_order, self._attempt)
        if kind in self.ROWS:
            if name == 'rows':
                return self._list(value, lambda row: self._row(kind, row, level))
        return self.repr1(value, level - 1)

    def _row(self, kind: type, row: tuple, level: int) -> str:
        words = []
        for value in row[1:]:
            if value or type(value) in (int, float):
                word = self.repr1(value, level - 2)
                words.append(word)
        if kind in self.RESULTS:
            outcome = Outcome(row[OUTCOME])
            words[0] = outcome.name
        attempt = self._attempt(row[0])
        return '%s: %s' % (attempt, ' '.join(words))

    def _list(self, values: Sequence[Any], text_of: Callable[[Any], str]) -> str:
        texts = list(map(text_of, values[:self.maxlist]))
        if len(values) > self.maxlist:
            text = 'and %d more' % (len(values) - self.maxlist)
            texts.append(text)
        return '[%s]' % ', '.join(texts)

    @staticmethod
    def _attempt(serial: int) -> str:
        if attempt_number(serial) > 1:
            return 'job %d, attempt %d' % (job_number(serial), attempt_number(serial))
        return 'job %d' % job_number(serial)


class LoggedNode(Node):
    """A Node that logs each event that it handles and each action that it decides, at level DEBUG.
    If that level is off, a Node is used instead, which spends no time on this."""
    _text = EventText()

    def handle(self, event: Any, now: float) -> List[Any]:
        """Take one event, as Node does, and log it."""
        logger.debug('event: %s', self._text.repr(event))
        actions = super().handle(event, now)
        return self._log_actions(actions)

    def flush(self, now: float) -> List[Any]:
        """End a turn, as Node does, and log what is decided then."""
        actions = super().flush(now)
        return self._log_actions(actions)

    def decided(self) -> List[Any]:
        """Return the actions that were decided before an exception, as Node does, and log them."""
        actions = super().decided()
        return self._log_actions(actions)

    def _log_actions(self, actions: List[Any]) -> List[Any]:
        for action in actions:
            logger.debug('  decision: %s', self._text.repr(action))
        return actions


def node_type() -> Type[Node]:
    """Return the class of a node by the level of the log."""
    if logger.isEnabledFor(logging.DEBUG):
        return LoggedNode
    return Node


def _duration(seconds: float) -> str:
    """Return a number of seconds as hours, minutes and seconds."""
    return '%d:%02d:%02d' % (seconds // 3600, seconds // 60 % 60, seconds % 60)


class Phase(enum.Enum):
    """What the hours of service permit."""
    SERVING = 'serving'
    DRAINING = 'draining'   # no new jobs
    CLOSED = 'closed'       # and running jobs are ended


class Hours(NamedTuple):
    """Hours of service in minutes after midnight; `stop` or `end` may be None, but not both. They
    may extend over midnight."""
    start: int
    stop: Optional[int]
    end: Optional[int]

    def phase(self, minute: int) -> Phase:
        """Return what is permitted at this minute of the day: jobs are taken from `start` on, no
        new ones from `stop` on, and those that still run at `end` are ended."""
        gone, stop, end = ((when - self.start) % 1440 if when is not None else 1440
                           for when in (minute, self.stop, self.end))
        if gone < min(stop, end):
            return Phase.SERVING
        if gone < end:
            return Phase.DRAINING
        return Phase.CLOSED


# --------------------------------------------------------------------------------------------------
# The job side: runner and worker processes. Each has one thread; only these processes run the code
# of users.
# --------------------------------------------------------------------------------------------------

# It is compared after every job: this takes 1 us, and 30 us through os.environ
_ENVIRON = getattr(os.environ, '_data', os.environ)
# Without the conversion to an enum, it takes 0.1 us
_getsignal = getattr(sys.modules.get('_signal'), 'getsignal', signal.getsignal)


def _not_here(*args: Any) -> None:
    """Do nothing. This replaces a function that this system or version of Python does not have."""


# This is called after each job. PRIO_PROCESS is 0, and 0 means this process.
_affinity: Any = getattr(os, 'sched_getaffinity', _not_here)
_policy: Any = getattr(os, 'sched_getscheduler', _not_here)
_priority: Any = getattr(os, 'getpriority', _not_here)
_digits: Any = getattr(sys, 'get_int_max_str_digits', _not_here)
_locale_now: Any = getattr(sys.modules.get('_locale'), 'setlocale', locale.setlocale)
_sigmask: Any = getattr(sys.modules.get('_signal'), 'pthread_sigmask', None) \
    or getattr(signal, 'pthread_sigmask', None)   # the same
# A signal that is ignored by default and hardly used. Windows has no such signal: there a thread of
# the worker raises the given one.
TAKE_BACK_SIGNAL = getattr(signal, 'SIGURG', signal.SIGTERM)
# The signal that makes a worker write its stacks: it is hardly used, or does nothing by default
if hasattr(signal, 'SIGRTMIN'):
    STACKS_SIGNAL = int(signal.SIGRTMIN) + 9
else:
    STACKS_SIGNAL = int(getattr(signal, 'SIGINFO', 0))
# Windows has no SIGKILL; sending SIGTERM there kills a process in the same way
SIGKILL = getattr(signal, 'SIGKILL', signal.SIGTERM)
# Windows translates line ends in files that are not opened with it
_O_BINARY = getattr(os, 'O_BINARY', 0)
# Linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
# Linux/falloc.h
_KEEP_SIZE = 1
_PUNCH_HOLE = 2


def _libc() -> Any:
    """Return the C library of this process, or None if it is not accessible."""
    try:
        import ctypes
        return ctypes.CDLL(None)
    except (ImportError, OSError, TypeError):
        return None


def _prctl(libc: Any, option: int, value: int) -> None:
    """Set an attribute of a process under Linux: to die with its parent, to adopt orphans.
    Elsewhere nothing is done."""
    if libc is None:
        return
    if sys.platform.startswith('linux'):
        libc.prctl(option, value, 0, 0, 0)


def end_with_parent(libc: Any, parent: int) -> None:
    """Have the kernel kill this process when its parent ends. If the parent has ended already, end
    this process now: the kernel does not report an end that was before the request."""
    _prctl(libc, _PR_SET_PDEATHSIG, SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _own_resource() -> Any:
    """Return the module `resource` without leaving it in `sys.modules`: its presence there shows
    that the user's code or a library has imported it. Returns None if there is no such module."""
    if 'resource' in sys.modules:
        return sys.modules['resource']
    try:
        import resource
    except ImportError:
        return None
    return sys.modules.pop('resource', resource)


def _out_of_reach(handle: int) -> int:
    """Return a duplicate of a descriptor from 1024 up, so that a job that closes all descriptors it
    can think of spares it."""
    resource = _own_resource()
    if resource is None:
        return handle
    import fcntl
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        wanted = 4096
    else:
        wanted = min(4096, hard)
    try:
        if soft != resource.RLIM_INFINITY:
            if soft < wanted:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        high = fcntl.fcntl(handle, fcntl.F_DUPFD_CLOEXEC, min(1024, wanted - 64))
    except (OSError, ValueError):
        return handle
    finally:
        # Descriptors above it remain open
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    os.close(handle)
    return high


def output_stream(number: int, buffering: int) -> TextIO:
    """Return a text stream on descriptor 1 or 2 of a runner or worker. Line ends remain as the job
    writes them, also on Windows, since the output may be shown on another system."""
    return open(number, 'w', buffering, encoding='utf-8', errors='backslashreplace',
                newline='\n', closefd=False)


def buffer_lines(libc: Any) -> None:
    """Make C code, too, write each line of its standard output when the line is complete."""
    if not hasattr(libc, 'setvbuf'):
        return
    import ctypes
    for name in ('stdout', '__stdoutp'):   # Linux, macOS
        with contextlib.suppress(ValueError):   # the library has no such variable
            stream = ctypes.c_void_p.in_dll(libc, name)
            libc.setvbuf(stream, None, ctypes.c_int(1), ctypes.c_size_t(0))
            return


def keep_descriptors() -> None:
    """Make all descriptors but the first three non-inheritable: the program that started the node
    may have left some open."""
    for directory in ('/proc/self/fd', '/dev/fd'):
        with contextlib.suppress(OSError):
            for name in os.listdir(directory):
                if int(name) > 2:
                    with contextlib.suppress(OSError):   # the descriptor of the listing itself
                        os.set_inheritable(int(name), False)
            return


def _no_stdin() -> None:
    """Replace descriptor 0 by one that reads nothing."""
    handle = os.open(os.devnull, os.O_RDONLY)
    if handle:   # it is 0 if 0 was closed
        os.dup2(handle, 0)
        os.close(handle)
    os.set_inheritable(0, True)


def leave_terminal() -> None:
    """Never read from the terminal again. On Windows a process ends together with its console;
    therefore the console is left, and output to it is lost."""
    _no_stdin()
    if not IS_WINDOWS:
        return
    handle = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        if os.isatty(number):
            os.dup2(handle, number)
    os.close(handle)
    import ctypes
    library = ctypes.WinDLL('kernel32')  # type: ignore[attr-defined]
    library.FreeConsole()


def was_importing(exc: BaseException) -> bool:
    """Return whether an exception came out of the code of a module, as while the module is
    imported. An interrupt leaves a package half imported: some of its modules remain in
    sys.modules, and the next import of the package fails. The interpreter removes the frames of the
    import itself from a traceback."""
    trace = exc.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == '<module>':
            return True
        trace = trace.tb_next
    return False


def write_whole(handle: int, data: bytes) -> None:
    """Write all bytes to a descriptor. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view):]


@contextlib.contextmanager
def with_variables(variables: Dict[str, str]) -> Iterator[None]:
    """Set these variables in the environment for processes that are started in the `with` block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Slots:
    """What a worker shares with the runner and, after the end of both, with the daemon: numbers
    (u64) in a file that is mapped into memory. [0] is the serial that runs now, [1] is the serial
    that is to be interrupted, [2] is the number of attempts that were begun, and the last
    BEGUN_KEPT of these follow.
    The file outlives all processes, so that the attempts that were begun are known whichever way
    the processes end. Several workers share a file, since each file costs a descriptor; a worker
    that is started later continues the numbers of one that has ended.
    """
    SIZE = 3 + BEGUN_KEPT
    FIRST = 3
    TOGETHER = 8
    NAME = 'begun-'

    @classmethod
    def make(cls, directory: str, number: int, by_name: bool = False) -> List[Any]:
        """Make slots for TOGETHER workers. If there is no room on the disk, the file remains empty,
        which means that nobody knows which attempts were begun; processes that map the file
        `by_name` cannot do without the room. Raises OSError if no file can be made."""
        size = 8 * cls.SIZE * cls.TOGETHER
        path = os.path.join(directory, '%s%d' % (cls.NAME, number))
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | _O_BINARY, 0o600)
        try:
            # Writing to a page for which the disk has no room would kill the process
            if hasattr(os, 'posix_fallocate'):
                os.posix_fallocate(handle, 0, size)
            else:
                write_whole(handle, bytes(size))
            shared = mmap.mmap(handle, size)
        except OSError:   # no room
            os.ftruncate(handle, 0)
            if by_name:
                raise
            shared = mmap.mmap(-1, size)
        finally:
            os.close(handle)
        return cls._parts(shared)

    @classmethod
    def _parts(cls, shared: mmap.mmap) -> List[Any]:
        view = memoryview(shared).cast('Q')
        return [view[at:at + cls.SIZE] for at in range(0, len(view), cls.SIZE)]

    @classmethod
    def open(cls, directory: str, number: int, index: int) -> Any:
        """Return the slots with this index in a file that the runner has made. A worker calls this.
        Raises OSError."""
        path = os.path.join(directory, '%s%d' % (cls.NAME, number))
        handle = os.open(path, os.O_RDWR | _O_BINARY)
        try:
            parts = cls._parts(mmap.mmap(handle, 8 * cls.SIZE * cls.TOGETHER))
            return parts[index]
        finally:
            os.close(handle)

    @classmethod
    def begin(cls, slots: Any, serial: int) -> None:
        """Note that this attempt begins. A worker calls this."""
        slots[cls.FIRST + slots[2] % BEGUN_KEPT] = serial
        slots[2] += 1
        slots[0] = serial

    @staticmethod
    def take_back(slots: Any) -> None:
        """Note that the attempt which was noted last has not begun after all. A worker calls
        this."""
        slots[0] = 0
        slots[1] = 0
        slots[2] -= 1

    @classmethod
    def read(cls, directory: str) -> Optional[FrozenSet[int]]:
        """Return the attempts that were begun by the workers of a directory; None if they are not
        known. The daemon calls this. Raises OSError."""
        begun: Set[int] = set()
        for name in os.listdir(directory):
            if not name.startswith(cls.NAME):
                continue
            path = os.path.join(directory, name)
            with open(path, 'rb') as file:
                data = file.read()
            if len(data) != 8 * cls.SIZE * cls.TOGETHER:
                return None
            numbers = memoryview(data).cast('Q')
            for at in range(0, len(numbers), cls.SIZE):
                count = min(numbers[at + 2], BEGUN_KEPT)
                begun.update(numbers[at + cls.FIRST:at + cls.FIRST + count])
        return frozenset(begun)

    @classmethod
    def mark_unknown(cls, directory: str) -> None:
        """Note that from now on nobody knows which attempts were begun. The daemon calls this.
        Raises OSError."""
        path = os.path.join(directory, cls.NAME + 'unknown')
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))


NOTES_ASKED = 'notes'    # a file with the path of another one, see `write_notes`


def write_notes(private: str) -> None:
    """Write which attempts have begun to the place that the program has named, so that the next
    program knows them. The runner of a node that is embedded in a program calls this if the program
    has ended without telling it to, when no worker is left."""
    try:
        with open(os.path.join(private, NOTES_ASKED)) as file:
            path = file.read()
        begun = Slots.read(private)
        with replaced(path) as temporary, open(temporary, 'w') as file:
            json.dump({'begun': None if begun is None else sorted(begun)}, file)
    except FileNotFoundError:
        logger.debug('nobody has asked what has begun')
    except OSError as exc:   # no room: then the attempts are unknown
        logger.debug('what has begun cannot be written down: %s', exc)


def clip(head: bytes, tail: bytes, total: int) -> bytes:
    """Return output of which the middle is left out if it is long: the first and last OUTPUT_KEPT
    bytes with a mark between them."""
    left_out = total - len(head) - len(tail)
    if left_out <= 0:
        return head + tail
    return b'%s\n[dispy: %d bytes left out here]\n%s' % (head, left_out, tail)


class CapturedOutput:
    """What a worker's job writes to one descriptor: an unlinked file, which is read when the job
    has ended. If the worker is not forked, the file has a name, and runner and worker open it
    separately.
    It is a file and not a pipe: the reader of a pipe must run while the job writes, which a thread
    of the worker cannot do while C code prints with the interpreter lock held. The runner frees the
    middle of files that grow.
    """

    def __init__(self, directory: str, name: str = '') -> None:
        if name:
            self._path = os.path.join(directory, name)
        else:
            self._path = ''
        if name:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _O_BINARY, 0o600)
            self.handle = _out_of_reach(handle)
        else:
            unnamed = tempfile.TemporaryFile(dir=directory)
            with unnamed as file:
                descriptor = file.fileno()
                self.handle = _out_of_reach(os.dup(descriptor))
            if os.name != 'nt':
                import fcntl
                fcntl.fcntl(self.handle, fcntl.F_SETFL, os.O_RDWR | os.O_APPEND)
        self.shown = (0, 0)   # runner: the job whose output was last shown live, and its length
        self._hole = OUTPUT_KEPT   # runner: the end of the part that has been freed

    def take(self, size: int) -> bytes:
        """Return all that was written, clipped, and empty the file for the next job. Called by a
        worker."""
        if size < OUTPUT_KEPT:
            return self._empty(size)
        with self._alone():   # the runner may be freeing its middle
            status = os.fstat(self.handle)
            return self._empty(status.st_size)

    def _empty(self, size: int) -> bytes:
        data = self.peek(size)
        self.empty()
        return data

    @contextlib.contextmanager
    def _alone(self) -> Any:
        """Let runner and worker use the file one at a time. This is a lock of the process (lockf):
        flock's would be the same lock in both. On Windows no file is shortened."""
        if IS_WINDOWS:
            yield
            return
        import fcntl
        fcntl.lockf(self.handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self.handle, fcntl.LOCK_UN)

    def peek(self, size: int) -> bytes:
        """Return all that was written, clipped."""
        if size <= 2 * OUTPUT_KEPT:
            return self._read(0, size)
        contents = self._read(0, OUTPUT_KEPT)
        data = self._read(size - OUTPUT_KEPT, OUTPUT_KEPT)
        return clip(contents, data, size)

    def since(self, at: int) -> bytes:
        """Return what was written from byte `at` on, up to OUTPUT_KEPT bytes. Called by the
        runner."""
        return self._read(at, OUTPUT_KEPT)

    def shorten(self, libc: Any) -> None:
        """Free the disk blocks in the middle of a file that has grown large; what a job prints in
        the meantime is not touched. This is for Linux; elsewhere the file keeps its blocks until
        the job has ended."""
        status = os.fstat(self.handle)
        if status.st_size <= 16 * OUTPUT_KEPT:
            self._hole = OUTPUT_KEPT
        elif hasattr(libc, 'fallocate') and struct.calcsize('l') == 8:
            from ctypes import c_long
            with self._alone():
                size = os.fstat(self.handle).st_size
                end = size - 2 * OUTPUT_KEPT
                # It is smaller than before, so that it is another job's
                if self._hole < end:
                    start = self._hole
                else:
                    start = OUTPUT_KEPT
                if end - start > OUTPUT_KEPT:
                    libc.fallocate(self.handle, _PUNCH_HOLE | _KEEP_SIZE, c_long(start),
                                   c_long(end - start))
                    self._hole = end - end % 4096

    def _read(self, at: int, size: int) -> bytes:
        """Read without moving the descriptor's position, which forked workers share with the
        runner."""
        parts = []
        while size > 0:
            if hasattr(os, 'pread'):
                part = os.pread(self.handle, size, at)
            else:
                os.lseek(self.handle, at, os.SEEK_SET)
                part = os.read(self.handle, size)
            if not part:
                break
            parts.append(part)
            at = at + len(part)
            size = size - len(part)
        return b''.join(parts)

    def empty(self) -> None:
        """Empty the file before the next job. A worker calls this."""
        os.ftruncate(self.handle, 0)
        if IS_WINDOWS:   # children of jobs write at the position that they share with this process
            os.lseek(self.handle, 0, os.SEEK_SET)

    def close(self) -> None:
        """Forget the file."""
        os.close(self.handle)
        if self._path:
            with contextlib.suppress(OSError):   # the directory may be gone
                os.unlink(self._path)


class _CallTurn:
    """Lets processes write into one pipe one at a time. It is a lock of the process (lockf), which
    ends with the process."""

    def __init__(self, directory: str) -> None:
        unnamed = tempfile.TemporaryFile(dir=directory)
        with unnamed as file:
            descriptor = file.fileno()
            handle = os.dup(descriptor)
            self._handle = _out_of_reach(handle)

    def __enter__(self) -> None:
        import fcntl
        fcntl.lockf(self._handle, fcntl.LOCK_EX)

    def __exit__(self, *exc: Any) -> None:
        import fcntl
        fcntl.lockf(self._handle, fcntl.LOCK_UN)


class NumericThreads:
    """Sets the number of threads that numerical libraries use: as many as the job has CPUs.
    Libraries that are loaded later read the environment; libraries that are loaded already are told
    by calling the functions that they export for this purpose, as `threadpoolctl` does. A variable
    that the user or the operator has set is left alone, and so are the libraries that read it.
    """

    # Part of a library's file name -> the variables that it reads, and the functions that set the
    # number
    LIBRARIES = {
        'openblas': (('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS'),
                     [prefix + 'openblas_set_num_threads' + suffix
                      for prefix in ('', 'scipy_') for suffix in ('', '64_', '_64')]),
        'mkl_rt': (('MKL_NUM_THREADS', 'OMP_NUM_THREADS'), ['MKL_Set_Num_Threads']),
        'blis': (('BLIS_NUM_THREADS', 'OMP_NUM_THREADS'), ['bli_thread_set_num_threads']),
        'gomp': (('OMP_NUM_THREADS',), ['omp_set_num_threads']),
        'iomp': (('OMP_NUM_THREADS',), ['omp_set_num_threads']),
        'libomp': (('OMP_NUM_THREADS',), ['omp_set_num_threads']),
    }
    VARIABLES = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS',
                 'NUMEXPR_NUM_THREADS')

    def __init__(self) -> None:
        self.cpus = 1   # the number for one worker on each CPU
        names = {name for variables, _ in self.LIBRARIES.values() for name in variables}
        given = [name for name in names.union(self.VARIABLES) if name in os.environ]
        self._of_user = frozenset(given)
        for name in self.VARIABLES:
            os.environ.setdefault(name, '1')

    def use(self, cpus: int, surroundings: 'Surroundings') -> None:
        """Let numerical libraries use this number of threads, which is the number of CPUs of the
        next job. A worker calls this."""
        self.cpus = cpus
        for name in self.VARIABLES:
            if name not in self._of_user:
                surroundings.set_environ(name, str(cpus))
        for path in self._loaded():
            for part, (variables, functions) in self.LIBRARIES.items():
                file_name = os.path.basename(path)
                if part not in file_name:
                    continue
                if not self._of_user.intersection(variables):
                    self._tell(path, functions, cpus)
        numexpr = sys.modules.get('numexpr')
        if 'NUMEXPR_NUM_THREADS' in self._of_user:
            return
        if hasattr(numexpr, 'set_num_threads'):
            numexpr.set_num_threads(cpus)   # type: ignore[union-attr]

    @staticmethod
    def _loaded() -> Set[str]:
        """Return the files of the libraries in this process; none if the system does not list
        them."""
        try:
            with open('/proc/self/maps', errors='surrogateescape') as file:
                return {line[line.index('/'):].rstrip('\n') for line in file if '/' in line}
        except OSError:
            found = ask_psutil(lambda psutil: {row.path for row in psutil.Process().memory_maps()})
            return found or set()

    @staticmethod
    def _tell(path: str, functions: Sequence[str], cpus: int) -> None:
        import ctypes
        try:
            library = ctypes.CDLL(path)   # it is loaded already
        except OSError as exc:   # for example because its file was replaced
            logger.debug('%s cannot be told to use %d threads: %s', path, cpus, exc)
            return
        for name in functions:
            function = getattr(library, name, None)
            if function is not None:
                function.argtypes = [ctypes.c_int]
                function.restype = None
                function(cpus)


class TrackerProcess:
    """The resource tracker of multiprocessing, which removes shared memory and semaphores that jobs
    have left behind. It is a child of the runner, so that its workers share it: a tracker that a
    worker started would count as a process that its job has left running. Most jobs never need the
    tracker, and it is a whole Python process: therefore, if workers are forked, only its pipe
    exists until a process writes to the pipe. Removing such remains is a convenience, so that jobs
    run without the tracker, too."""

    def __init__(self) -> None:
        from multiprocessing import resource_tracker
        self._tracker: Any = getattr(resource_tracker, '_resource_tracker', None)
        self._process: Any = None    # if it was started by this process
        self.pid = 0
        self.reader = -1    # the end of the pipe that it will read, until it is started

    def start(self) -> None:
        """Start the tracker now."""
        try:
            self._tracker.ensure_running()
        except (OSError, AttributeError) as exc:   # no process starts, or Python has other names
            self._warn(exc)
        self.find()

    @staticmethod
    def _warn(exc: Exception) -> None:
        logger.warning('the resource tracker of multiprocessing cannot be started: %s', exc)

    def find(self) -> None:
        """Adopt the tracker if the user's code here has started it already."""
        self.pid = getattr(self._tracker, '_pid', None) or self.pid

    def make_pipe(self) -> None:
        """Make the pipe of the tracker if the tracker does not run. This is called after the
        computation was loaded, and before workers are forked."""
        self.find()
        if getattr(self._tracker, '_fd', 0) is not None:
            return
        try:
            self.reader, self._tracker._fd = os.pipe()
        except OSError as exc:
            self._warn(exc)

    def start_at_pipe(self) -> None:
        """Start the tracker, because something was written to its pipe."""
        handle = self.reader
        self.reader = -1
        code = 'from multiprocessing.resource_tracker import main; main(%d)' % handle
        flags: List[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        words = [sys.executable, *flags, '-c', code]
        # The tracker ignores these signals, but not from its very beginning
        ignored = (signal.SIGINT, signal.SIGTERM)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ignored)
        try:
            self._process = subprocess.Popen(words, pass_fds=[handle], cwd=os.sep)
            self.pid = self._tracker._pid = self._process.pid
        except OSError as exc:
            self._warn(exc)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(handle)

    def end_pipe(self) -> None:
        """Remove the pipe after the workers have ended, if the tracker was not needed, so that the
        user's code that still runs here starts the tracker in the usual way. Nobody would read the
        pipe."""
        if self.reader < 0:
            return
        with selectors.DefaultSelector() as selector:
            selector.register(self.reader, selectors.EVENT_READ)
            is_written = bool(selector.select(0))
        if is_written:
            self.start_at_pipe()
            return
        os.close(self.reader)
        os.close(self._tracker._fd)
        self.reader = -1
        self._tracker._fd = None

    def stop(self) -> None:
        """Let the tracker remove what is left and end. The workers have ended before."""
        handle = getattr(self._tracker, '_fd', None)
        if not self.pid:
            return
        if handle is None:
            return
        os.close(handle)
        self._tracker._fd = None
        self._tracker._pid = None
        now = time.monotonic()
        until = now + GRACE
        with contextlib.suppress(ChildProcessError):   # it was reaped elsewhere
            while os.waitpid(self.pid, os.WNOHANG)[0] == 0 and time.monotonic() < until:
                time.sleep(0.002)


class SharedMemoryTracker:
    """Keeps the resource tracker of a node away from shared memory to which a job only attaches.
    Python registers this memory as if the job had created it, and the tracker would destroy it at
    the end of the node, while the program that created it still uses it. Memory that a job creates
    remains registered.
    """

    def __init__(self) -> None:
        from multiprocessing import resource_tracker
        self._tracker: Any = resource_tracker
        self._register = resource_tracker.register
        self._unregister = resource_tracker.unregister

    def install(self) -> None:
        """Track shared memory in this way from now on, and in all forked children."""
        if os.name != 'nt':   # there the memory is freed with the last process that uses it
            self._tracker.register = self._register_own
            self._tracker.unregister = self._unregister_any

    def _register_own(self, name: str, kind: str) -> None:
        if kind == 'shared_memory':
            caller = sys._getframe(1)   # SharedMemory.__init__(name, create, size)
            create = caller.f_locals.get('create', True)
            if not create:
                return
        self._register(name, kind)

    def _unregister_any(self, name: str, kind: str) -> None:
        """Unregister memory that a process destroys, even if it has only attached to it: the
        tracker fails for a name that it does not know, and accepts the registration of a known name
        twice."""
        if kind == 'shared_memory':
            self._register(name, kind)
        self._unregister(name, kind)


class Surroundings:
    """The state of its process that a job finds, besides the computation's globals.
    The state is saved when the worker begins and restored after each job. Nearly always nothing has
    changed: therefore it is read and compared in the quickest way, with one comparison for many
    things. Reading limits of resources takes long, and happens only if the module `resource`,
    through which they are changed, was imported.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        handle = os.open(os.devnull, os.O_RDONLY)
        self._nothing = _out_of_reach(handle)
        self._environ = dict(_ENVIRON)
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        self._signals = [number for number in range(1, signal.NSIG) if self._is_signal(number)]
        self._handlers = list(map(_getsignal, self._signals))
        if hasattr(signal, 'setitimer'):
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._zone = time.tzname   # each call of time.tzset() makes a new tuple
        self._path = list(sys.path)
        self._filters = list(warnings.filters)
        self._lists: List[Tuple[Any, List[Any]]] = [
            (itself, list(itself)) for itself in (sys.argv, gc.callbacks)]
        self._hooks = self._hooks_now()
        self._numbers = self._numbers_now()
        self._system = self._system_now()
        if self._system[1] is not None:
            self._parameters: Any = os.sched_getparam(0)
        else:
            self._parameters = None
        self._limits = self._limits_now(_own_resource())
        if hasattr(os, 'geteuid') and os.geteuid() == 0:
            self._ids: Optional[tuple] = self._ids_now()
        else:
            self._ids = None
        decimal = sys.modules.get('decimal')
        if decimal is not None:
            self._decimal = decimal.getcontext().copy()
        else:
            self._decimal = None

    @staticmethod
    def _is_signal(number: int) -> bool:
        try:
            _getsignal(number)
        except ValueError:   # this signal cannot be handled on this system
            return False
        return True

    @staticmethod
    def _system_now() -> tuple:
        return (_affinity(0), _policy(0), _priority(0, 0), _digits(), _locale_now(locale.LC_ALL))

    def _set_system(self) -> None:
        """Set the state that the system has. Raises OSError if the job has given up the right to do
        so."""
        affinity, policy, priority, digits, name = self._system
        if affinity is not None:
            os.sched_setaffinity(0, affinity)
        if policy is not None:
            if self._parameters is not None:
                os.sched_setscheduler(0, policy, self._parameters)
        if priority is not None:
            os.setpriority(os.PRIO_PROCESS, 0, priority)
        if digits is not None:
            sys.set_int_max_str_digits(digits)
        locale.setlocale(locale.LC_ALL, name)

    @staticmethod
    def _hooks_now() -> tuple:
        return (sys.excepthook, sys.unraisablehook, sys.displayhook, sys.breakpointhook,
                threading.excepthook, warnings.showwarning, warnings.formatwarning,
                sys.argv, sys.path, warnings.filters, gc.callbacks)

    def _set_hooks(self) -> None:
        logging.captureWarnings(False)   # otherwise it would count as switched on
        (sys.excepthook, sys.unraisablehook, sys.displayhook, sys.breakpointhook,
         threading.excepthook, warnings.showwarning, warnings.formatwarning,
         sys.argv, sys.path, warnings.filters, gc.callbacks) = self._hooks

    @staticmethod
    def _numbers_now() -> tuple:
        return (gc.isenabled(), gc.get_threshold(), gc.get_debug(), sys.getrecursionlimit(),
                sys.getswitchinterval(), socket.getdefaulttimeout(), logging.root.manager.disable,
                sys.dont_write_bytecode)

    def _set_numbers(self) -> None:
        (enabled, threshold, debug, recursion, interval, timeout, disabled,
         sys.dont_write_bytecode) = self._numbers
        if enabled:
            gc.enable()
        else:
            gc.disable()
        gc.set_threshold(*threshold)
        gc.set_debug(debug)
        sys.setrecursionlimit(recursion)
        sys.setswitchinterval(interval)
        socket.setdefaulttimeout(timeout)
        logging.disable(disabled)

    @staticmethod
    def _limits_now(resource: Any) -> Dict[int, Tuple[int, int]]:
        names = [name for name in dir(resource) if name.startswith('RLIMIT_')]
        numbers = {getattr(resource, name) for name in names}
        return {number: resource.getrlimit(number) for number in numbers}

    @staticmethod
    def _ids_now() -> tuple:
        return os.geteuid(), os.getegid()

    def set_environ(self, name: str, value: str) -> None:
        """Set an environment variable that the next jobs are to find."""
        os.environ[name] = value
        self._environ = dict(_ENVIRON)

    def restore(self) -> bool:
        """Restore what the job has changed. Returns false if only a new process is free of the
        change: the job has given up a right, such as that to a higher limit, or has left behind an
        object that raises when it is inspected."""
        try:
            # Only root can change them
            if self._ids is not None:
                if self._ids_now() != self._ids:
                    return False
            self._restore_files()
            self._restore_environ()
            self._restore_signals()
            self._restore_interpreter()
            if self._system_now() != self._system:
                self._set_system()
            if 'resource' in sys.modules:
                self._restore_limits(sys.modules['resource'])
        except Exception as exc:  # by the system, or by objects that the job has left there
            logger.debug('this process is replaced: %s: %s', type(exc).__name__, exc)
            return False
        return True

    def _restore_files(self) -> None:
        try:
            os.dup2(self._nothing, 0)   # this takes less time than checking whether it is open
            if os.getcwd() != self._directory:
                os.chdir(self._directory)
        except OSError:   # its directory is gone, or a descriptor
            os.chdir(self._directory)
            _no_stdin()
        os.umask(self._umask)

    def _restore_environ(self) -> None:
        if _ENVIRON != self._environ:
            for name in list(os.environ):
                del os.environ[name]
            for key, value in self._environ.items():
                os.environ[os.fsdecode(key)] = os.fsdecode(value)
        elif time.tzname is self._zone:
            return
        if hasattr(time, 'tzset'):   # the C library may have read TZ unknown to Python
            time.tzset()
            self._zone = time.tzname

    def _restore_signals(self) -> None:
        handlers = list(map(_getsignal, self._signals))
        if handlers != self._handlers:
            for number, now, was in zip(self._signals, handlers, self._handlers):
                if now != was:
                    signal.signal(number, was)   # raises for a handler that C code had installed
            if hasattr(signal, 'siginterrupt'):
                signal.siginterrupt(TAKE_BACK_SIGNAL, False)
        signal.set_wakeup_fd(-1)
        if hasattr(signal, 'setitimer'):
            signal.alarm(0)   # ITIMER_REAL
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _sigmask(signal.SIG_SETMASK, self._mask)

    def _restore_interpreter(self) -> None:
        if sys.gettrace() is not None or sys.getprofile() is not None:
            sys.settrace(None)
            sys.setprofile(None)
        if self._numbers_now() != self._numbers:
            self._set_numbers()
        if sys.path != self._path:
            if modules is not None:
                modules.keep_reachable(sys.path, self._path)
        if self._hooks_now() != self._hooks:
            self._set_hooks()
        if sys.path != self._path:
            sys.path[:] = self._path
        if warnings.filters != self._filters:
            warnings.resetwarnings()   # it also clears the cache of the filters
            filters: Any = warnings.filters
            filters[:] = self._filters
        for itself, held in self._lists:
            if itself != held:
                itself[:] = held
        if self._decimal is not None:
            sys.modules['decimal'].setcontext(self._decimal.copy())

    def _restore_limits(self, resource: Any) -> None:
        for number, was in self._limits.items():
            if resource.getrlimit(number) != was:
                resource.setrlimit(number, was)


def main_for_children(directory: str) -> None:
    """Let multiprocessing's start methods spawn and forkserver work in jobs: their children import
    the computation's main module, in its state when they are started, from a file. The user's
    script is never run."""
    from multiprocessing import spawn
    original = spawn.get_preparation_data
    main = MainFile(directory)

    def get_preparation_data(name: str) -> dict:
        data = original(name)
        data.pop('init_main_from_path', None)
        data['init_main_from_name'] = main.module()
        here = os.path.abspath(__file__)
        folder = os.path.dirname(here)
        data['sys_path'] = [*data['sys_path'], directory, folder]
        return data
    spawn.get_preparation_data = get_preparation_data


_MAIN_TEXT = '''"""The main module of a computation, for children of its jobs."""
import dispynode
dispynode.load_main(globals(), %r)
'''


class MainFile:
    """Writes what the main module of a computation defines into files, for the children of its
    jobs. Each file is written once, since other children may be about to read it."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._numbers = itertools.count(1)
        self._last = ('', 0, b'')   # module, the process that wrote it, its contents

    def module(self) -> str:
        """Return the name of a module that defines what the main module contains now."""
        class Pickler(value_pickler()):  # type: ignore[misc]
            complete = True
        found: Dict[str, bytes] = {}
        for name, value in list(vars(sys.modules['__main__']).items()):
            if not name.startswith('__'):
                # The child does not get what cannot be pickled
                with contextlib.suppress(Exception):
                    pickled = dumps(value, Pickler)
                    found[name] = in_one_piece(pickled.payload)
        content = pickle.dumps((modules.here() if modules is not None else (), found))
        module, pid, before = self._last
        if (pid, before) != (os.getpid(), content):
            number = next(self._numbers)
            module = 'dispy_main_%d_%d' % (os.getpid(), number)
            path = os.path.join(self._directory, module)
            with open(path + '.pickle', 'wb') as file:
                file.write(content)
            with open(path + '.py', 'w', encoding='utf-8') as source:
                source.write(_MAIN_TEXT % (path + '.pickle'))
            self._last = (module, os.getpid(), content)
        return module


def load_main(variables: Dict[str, Any], path: str) -> None:
    """Define what the main module of the job defines. This is called in a child of a job."""
    with open(path, 'rb') as file:
        loader, found = pickle.load(file)   # written by the job's own worker
    SharedMemoryTracker().install()
    if loader:
        modules_of_job = ModuleLoader(*loader[0])
        modules_of_job.need(loader[1])   # the search path came from the job
    main = sys.modules.get('__mp_main__')
    if main is not None:
        if vars(main) is variables:
            spaces.adopt_main(main)
    for name, payload in found.items():
        with contextlib.suppress(Exception):  # using it will raise
            variables[name] = loads(payload)


class WorkerPipe:
    """The pipe of a worker to its daemon: jobs and answers that have come, and what is sent.
    Processes that a job has forked may send as well."""

    def __init__(self, sock: socket.socket, private: str) -> None:
        sock.setblocking(True)   # setup may have set a default timeout for sockets
        self._sock = sock
        self._intake = RecordBuffer()
        self.jobs: Deque[Record] = collections.deque()
        self.answers: Deque[str] = collections.deque()   # answers to files and requests
        # Guards the writing end of the pipe: a job may have threads
        self._sending = threading.Lock()
        self._shared = False               # with processes that a job has forked
        self._turn = _CallTurn(private)
        self.at_end: Callable[[], Any] = _not_here   # called before this process ends

    def receive(self, flags: int) -> None:
        """Receive what has come, or wait for something. Ends this process when the daemon has
        closed the pipe."""
        buffer = self._intake.get_buffer()
        if HAS_SEGMENTS:
            told = self._sock.recvmsg_into([buffer], SegmentIntake.ROOM, flags)
            count = told[0]
            if told[1] or told[2] & _MSG_CTRUNC:
                self._intake.segments.came(*told[1:3])
        else:
            count = self._sock.recv_into(buffer, 0, flags)
        if count == 0:
            self.at_end()
            os._exit(0)
        for head, body in self._intake.buffer_updated(count):
            record = self._intake.record_of(head, body)
            if record.kind == _FILE_STORED:
                answer = bytes(record.bodies[0]).decode('utf-8', 'replace')
                self.answers.append(answer)
            else:
                self.jobs.append(record)

    def give_back(self) -> None:
        """Return all attempts that have not started, from this process and from the pipe."""
        if hasattr(socket, 'MSG_DONTWAIT'):
            with contextlib.suppress(BlockingIOError):
                while True:
                    self.receive(socket.MSG_DONTWAIT)
        else:   # Windows; there a descriptor may have any number for select()
            while select.select([self._sock], (), (), 0)[0]:
                self.receive(0)
        serials = []
        for record in self.jobs:
            serials.append(record.serial)
        self.jobs.clear()
        self.give_back_serials(serials)

    def give_back_serials(self, serials: List[int]) -> None:
        """Return these attempts, which have not started."""
        layout = '>%dQ' % len(serials)
        self.send(RecordType.JOBS_RETURNED, 0, 0, 0.0, 0.0, struct.pack(layout, *serials))

    def send(self, *args: Any) -> None:
        """Send a record; the parameters are those of pack_record."""
        self._in_turn(pack_record(*args))

    def send_result(self, *args: Any) -> None:
        """Send a RESULT record; the parameters are those of pack_record after its kind. A large
        value is sent in a memory segment, if there is room."""
        payload = args[4]
        if type(payload) is bytes or not goes_in_segment(payload):   # nearly always
            self._in_turn(pack_record(_RESULT, *args))
            return
        if not is_read(self._sock):
            self.send(_RESULT, *args)
            return
        with contextlib.closing(MemorySegment(payload)) as segment:
            try:
                segment.fill(sys.maxsize)
            except OSError as exc:   # no room or no descriptor
                logger.debug('a value goes through the pipe: %s', exc)
                self.send(_RESULT, *args)
            else:
                self._in_turn([segment_record(_RESULT, *args)], segment)

    def _in_turn(self, buffers: List[Buffer], segment: Optional[MemorySegment] = None) -> None:
        with self._sending:
            if self._shared:
                with self._turn:
                    self._write(buffers, segment)
            elif segment is None and len(buffers) == 1 and len(buffers[0]) <= WRITE_MOST:
                self._sock.sendall(buffers[0])   # nearly always
            else:
                self._write(buffers, segment)

    def _write(self, buffers: List[Buffer], segment: Optional[MemorySegment]) -> None:
        if segment is not None:
            sent = send_with(self._sock, buffers, segment)
            buffers = [memoryview(buffers[0])[sent:]]
        for buffer in buffers:
            if len(buffer) <= WRITE_MOST:
                self._sock.sendall(buffer)
                continue
            view = memoryview(buffer).cast('B')
            # Some systems refuse 2 GiB at once
            for start in range(0, len(view), WRITE_MOST):
                self._sock.sendall(view[start:start + WRITE_MOST])

    def share(self) -> None:
        """Prepare for a job that forks: from now on its children may write records of any length
        into the pipe as well."""
        self._shared = True

    def after_fork(self) -> None:
        """Replace the lock in the child: another thread of the parent may have held it."""
        self._sending = threading.Lock()


class JobOutput:
    """What the jobs of a worker print, and the streams and descriptors that they find."""

    def __init__(self, out: CapturedOutput, err: CapturedOutput, libc: Any) -> None:
        self._out = out
        self._err = err
        self._libc = libc

    def install(self) -> None:
        """Redirect what is printed from now on into the files."""
        os.dup2(self._out.handle, 1)
        os.dup2(self._err.handle, 2)
        _no_stdin()
        # Output is line-buffered, as for C code: children of a job write in between.
        self._streams = [open(0, closefd=False), output_stream(1, 1), output_stream(2, 1)]
        buffer_lines(self._libc)
        sys.stdin, sys.stdout, sys.stderr = self._streams

    def before_fork(self) -> None:
        """Flush what a job has printed of a line, so that its children do not print it again."""
        for stream in self._streams[1:]:
            # Reported when the job ends; or the stream is closed
            with contextlib.suppress(OSError, ValueError):
                stream.flush()

    def _has_own_streams(self) -> bool:
        """Return whether the job has left the streams unchanged."""
        stdin, stdout, stderr = self._streams
        if sys.stdin is not stdin:
            return False
        if sys.stdout is not stdout:
            return False
        if sys.stderr is not stderr:
            return False
        return not (stdout.closed or stderr.closed)

    def collect(self) -> Tuple[bytes, bytes]:
        """Return what the job printed. Descriptors and streams are restored in the same step."""
        lost = b''
        for index in (1, 2):
            try:
                self._streams[index].flush()
            except ValueError:   # the job closed it; it is restored below
                continue
            except OSError as exc:
                lost += self._not_written(index, exc)
        if not self._has_own_streams():
            self._flush_strangers()
        if self._libc is not None:
            self._libc.fflush(None)   # C code buffers output into files until then
        printed = []
        for index, output in ((1, self._out), (2, self._err)):
            handle = output.handle
            os.dup2(handle, index)   # this takes less time than checking its target
            size = os.lseek(handle, 0, os.SEEK_END)
            if size:
                printed.append(output.take(size))
            else:
                printed.append(b'')
        return printed[0], printed[1] + lost

    def _not_written(self, index: int, exc: OSError) -> bytes:
        """Discard output for which there is no room on the disk: it would remain in the stream and
        be taken for that of the next job. Returns a line for the job's stderr that says so."""
        if exc.errno == errno.EBADF:   # the job closed the descriptor
            return b''
        self._throw_away(self._streams[index], index)
        text = 'dispy: a part of what the job wrote to %s is lost: %s\n' % (
            'stdout' if index == 1 else 'stderr', exc)
        return text.encode()

    def _throw_away(self, stream: Any, index: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nothing, index)
                stream.flush()
            finally:
                os.close(nothing)
                os.dup2((self._out if index == 1 else self._err).handle, index)

    def _flush_strangers(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # it is None, or an object of the job
                stream.flush()
        for index in (1, 2):
            if self._streams[index].closed:
                self._streams[index] = output_stream(index, 1)
        sys.stdin, sys.stdout, sys.stderr = self._streams


class JobInterrupts:
    """Interrupts of the running job, and orders to return what has not started. Both come as
    signals, whose handlers Python runs between two instructions of the main thread."""

    def __init__(self, pipe: WorkerPipe, slots: Any, function: Callable[..., Any]) -> None:
        self._pipe = pipe
        self._slots = slots
        self._function = function
        self.in_job = False       # the user's code runs in the main thread
        self.is_late = False      # an interrupt has come where it could not be raised
        self.recalled = False     # attempts that have not started are to be returned

    def install(self) -> None:
        """Handle the signals from now on."""
        signal.signal(signal.SIGINT, self._on_interrupt)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(TAKE_BACK_SIGNAL, self._on_take_back)
        if hasattr(signal, 'siginterrupt'):
            signal.siginterrupt(TAKE_BACK_SIGNAL, False)

    @contextlib.contextmanager
    def beside_job(self) -> Any:
        """Delay interrupts while dispy does work that a job has requested. Interrupts are raised in
        the main thread only, so that the other threads of a job need no such protection."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        inside = self.in_job
        self.in_job = False
        try:
            yield
        finally:
            self.in_job = inside
        self._catch_up()

    def give_back(self) -> None:
        """Return all attempts that have not started."""
        self.recalled = False
        self._pipe.give_back()

    def _catch_up(self) -> None:
        if self.recalled:
            self.in_job = False
            self.give_back()
            self.in_job = True
        if self.is_late:
            self.is_late = False
            raise KeyboardInterrupt

    def _on_take_back(self, number: int, frame: Any) -> None:
        if not self.in_job:
            self.recalled = True
            return
        self.recalled = True
        self._catch_up()

    def _on_interrupt(self, number: int, frame: Any) -> None:
        # It was meant for a job that has ended in the meantime
        if not self._slots[0]:
            return
        if self._slots[1] != self._slots[0]:
            return
        self._slots[1] = 0
        if isinstance(self._function, Program):
            self._function.interrupted = True
        elif self.in_job:
            raise KeyboardInterrupt
        else:
            self.is_late = True


class JobServices:
    """What a job can request while it runs: to give the client a value before the end, to send a
    file there, to forward log records, to fetch modules."""

    def __init__(self, pipe: WorkerPipe, slots: Any, spec: dict, interrupts: JobInterrupts) -> None:
        self._pipe = pipe
        self._slots = slots
        self._spec = spec
        self._interrupts = interrupts
        self._filing = threading.Lock()    # one file at a time; guards the pipe's answers

    def install(self, globals_: Sequence[Dict[str, Any]]) -> None:
        """Provide them for jobs, in the global variables of the computation too."""
        names = {'dispy_provisional_result': self._provisional, 'dispy_send_file': self.send_file}
        offer_names(names, globals_)
        if modules is not None:
            modules.ask = self._ask_client
        if not self._spec['logs'] >= 0:
            return
        self._log_handler = logging.Handler()
        self._log_handler.emit = self._forward  # type: ignore[method-assign]
        logging.getLogger().addHandler(self._log_handler)
        logging.getLogger().setLevel(self._spec['logs'])

    def after_fork(self) -> None:
        """Replace the lock in a child of a job: another thread of the parent may have held it."""
        self._filing = threading.Lock()

    def _provisional(self, result: Any, relay: Any = None, timeout: Any = None) -> int:
        """Do what `dispy_provisional_result` documents: send the client a value while the job goes
        on. `relay` and `timeout` are accepted, as in dispy 4, and have no effect any more. Raises
        what pickling raises, and ValueError for a value over the limit."""
        payload, plain, _, _ = dumps(result)
        if is_over_limit(size_of(payload)):
            size = size_of(payload)
            raise ValueError(over_limit('dispy_provisional_result: the value', size))
        with self._interrupts.beside_job():
            now = time.time()
            outcome = Outcome.PROVISIONAL if plain else Outcome.PROVISIONAL_CODE
            self._pipe.send_result(outcome, self._slots[0], now, now, payload)
        return 0

    def _forward(self, record: logging.LogRecord) -> None:
        """Send a log record of the job to the client's logging."""
        try:
            text = record.getMessage()
            if record.exc_info and record.exc_info[0] is not None:
                lines = traceback.format_exception(*record.exc_info)
                text += '\n' + ''.join(lines).rstrip()
            # A level may be an IntEnum and a name a subclass of str: the other side opens plain
            # values only.
            data = pickle.dumps((int(record.levelno), plain_text(
                record.name)[:NAME_MOST], shorten(plain_text(text))), 5)
        except Exception:
            # Arguments that do not match the format, and the like, are reported as logging itself
            # does
            self._log_handler.handleError(record)
            return
        with self._interrupts.beside_job():
            self._pipe.send(RecordType.LOGGED, 0, self._slots[0], 0.0, 0.0, data)

    def tell_left(self, names: List[str]) -> None:
        """Report that a program has left these files behind, in the form of a log record."""
        if len(names) > 1:
            others = ' and %d others' % (len(names) - 1)
        else:
            others = ''
        dispy_node_name = self._spec['names']['dispy_node_name']
        text = '%r%s on node %s' % (names[0], others, dispy_node_name)
        data = pickle.dumps((logging.WARNING, FILES_LEFT, shorten(text)), 5)
        with self._interrupts.beside_job():
            self._pipe.send(RecordType.LOGGED, 0, self._slots[0], 0.0, 0.0, data)

    def send_file(self, path: str, relay: Any = None, timeout: Any = None) -> int:
        """Do what `dispy_send_file` documents: when this returns 0, the file is below the client's
        directory, under the same relative name. `relay` and `timeout` are accepted, as in dispy 4,
        and have no effect any more. Raises ValueError for a path that leaves the directory, OSError
        if the file cannot be read here or stored there."""
        return self.send_as(path, _name_of(path, self._spec['directory']))

    def send_as(self, path: str, name: str) -> int:
        """Send a file under a name that may differ from its own."""
        file_size = os.path.getsize(path)
        check_size(name, file_size, self._spec['max_file'])
        size, digest = file_digest(path)
        mode = os.stat(path).st_mode
        row = pickle.dumps((name, size, digest, stat.S_IMODE(mode)))
        with self._filing:
            pieces = read_pieces(path, size)
            for offset, data in pieces:
                with self._interrupts.beside_job():
                    self._pipe.send(RecordType.FILE, offset // FILE_PIECE, self._slots[0], 0.0, 0.0,
                                    row, data)
            with self._interrupts.beside_job():
                error = self._answer()
        if error:
            text = '%s could not be sent: %s' % (path, error)
            raise OSError(text)
        return 0

    def _ask_client(self, request: Any) -> str:
        """Fetch a bundle of modules, by its number, or a module, by its name, from the client.
        Returns '' or why that failed."""
        with self._filing, self._interrupts.beside_job():
            self._pipe.send(RecordType.WANT, 0, self._slots[0], 0.0, 0.0, pickle.dumps(request))
            return self._answer()

    def _answer(self) -> str:
        """Return the client's answer to the last request; '' if it succeeded."""
        while not self._pipe.answers:
            self._pipe.receive(0)
        return self._pipe.answers.popleft()


def link_to(path: str, link: str) -> None:
    """Make a file or directory accessible under another name. Symbolic links require a privilege on
    Windows: there, files get a hard link, and directories are copied. Raises OSError."""
    if not IS_WINDOWS:
        os.symlink(path, link)
    elif os.path.isdir(path):
        shutil.copytree(path, link, copy_function=_hard_link)
    else:
        _hard_link(path, link)


def _hard_link(path: str, link: str) -> None:
    try:
        os.link(path, link)
    except OSError:   # the file system has no links
        shutil.copy2(path, link)


class ReturnedFiles:
    """Files in the directory of a job that are sent to its client when a program has ended. Files
    that were there before and have not changed since are not results of the program."""

    def __init__(self, before: str, patterns: Sequence[str]) -> None:
        """`before`: the prefix of the names that they have for the client."""
        self._before = before
        self._patterns = patterns
        self._known = {path: self._state(path) for pattern in patterns
                       for path in self._matching(pattern)}

    def send(self, has_failed: bool, send: Callable[[str, str], Any]) -> None:
        """Send a file to the client, as JobDirectory.bring_back does."""
        sent = set()
        missing = []
        for pattern in self._patterns:
            found = [path for path in self._matching(pattern)
                     if self._known.get(path) != self._state(path)]
            if not found:
                missing.append(pattern)
            for path in found:
                if path not in sent:
                    sent.add(path)
                    send(path, self._before + path.replace(os.sep, '/'))
        if missing and not has_failed:
            there = sorted(name for name in os.listdir('.') if not name.startswith('.'))
            shown = ', '.join(there[:20]) or 'nothing'
            text = 'the program has made no file that is called %s (returns); in its directory ' \
                'there is %s%s' % (' or '.join(missing), shown, ', ...' * (len(there) > 20))
            raise RuntimeError(text)

    @staticmethod
    def _matching(pattern: str) -> List[str]:
        """Return the files whose names match this pattern, and those in directories whose names
        match it."""
        found = []
        for path in sorted(glob.glob(pattern, recursive=True)):
            if os.path.isfile(path):
                found.append(os.path.normpath(path))
            for directory, _, names in os.walk(path):
                found += [os.path.normpath(os.path.join(directory, name)) for name in sorted(names)]
        return found

    @staticmethod
    def _state(path: str) -> Tuple[int, int]:
        status = os.stat(path)
        return status.st_mtime_ns, status.st_size


class JobDirectory:
    """The directory of a job that has one of its own (job_dir), or files or names of its own
    (dispy_job_depends)."""

    def __init__(self, spec: dict, globals_: Sequence[Dict[str, Any]]) -> None:
        self._spec = spec
        self._globals = globals_
        self._directory = spec['directory']      # of the computation
        self.is_entered = False         # the running job has one
        self._private = ''
        self._returns: Optional[ReturnedFiles] = None
        self._remove_names: Callable[[], None] = _not_here   # removes the job's names

    def enter(self, files: List[Tuple[str, int, bytes]], objects: Dict[str, Any],
              returns: Tuple[str, Sequence[str]] = ('', ())) -> None:
        """Make the directory, with the job's files and links to those of the computation, and make
        its names known. `returns`: the prefix of the names that files have for the client, and
        patterns for the files that it gets."""
        private = tempfile.mkdtemp(prefix='job-', dir=self._spec['private'])
        self._private = private
        self.is_entered = True
        self._remove_names = lend_names(objects, self._globals)
        for name in os.listdir(self._directory):
            link_to(os.path.join(self._directory, name), os.path.join(private, name))
        for name, mode, data in files:
            check_size(name, len(data), self._spec['max_file'])
            path = os.path.join(private, *check_name(name))
            if os.path.islink(path) or (IS_WINDOWS and os.path.isfile(path)):
                os.unlink(path)   # this removes the link only
            directory = os.path.dirname(path)
            os.makedirs(directory, exist_ok=True)
            with open(path, 'wb') as file:
                file.write(data)
            os.chmod(path, mode)
        os.chdir(private)
        if returns[1]:
            self._returns = ReturnedFiles(*returns)

    def bring_back(self, has_failed: bool, send: Callable[[str, str], Any]) -> None:
        """Send the client the files that it wants. Raises what `send(path, name)` raises, and
        RuntimeError for missing files, unless the job itself has failed."""
        if self._returns is not None:
            self._returns.send(has_failed, send)

    def leave(self) -> None:
        """Remove the directory and the names."""
        self.is_entered = False
        self._returns = None
        self._remove_names()
        os.chdir(self._directory)
        shutil.rmtree(self._private, ignore_errors=True)


class Worker:
    """Runs job after job in a process of its own."""

    def __init__(self,
                 sock: socket.socket,
                 slots: Any,
                 function: Callable[..., Any],
                 out: CapturedOutput,
                 err: CapturedOutput,
                 spec: dict,
                 libc: Any,
                 threads: NumericThreads,
                 globals_: Sequence[Dict[str, Any]] = ()) -> None:
        self._globals = globals_   # of the computation, setup and cleanup
        self._numeric = threads
        self._slots = slots
        self._function = function
        self._spec = spec
        self._libc = libc
        self._pipe = WorkerPipe(sock, spec['private'])
        self._output = JobOutput(out, err, libc)
        self._interrupts = JobInterrupts(self._pipe, slots, function)
        self._services = JobServices(self._pipe, slots, spec, self._interrupts)
        self._job_directory = JobDirectory(spec, globals_)
        self._half_imported = False        # a job was interrupted while it imported a module
        self._pid = 0   # PID of the process that serves, not that of a job's children
        if hasattr(os, 'register_at_fork'):
            os.register_at_fork(before=self._before_fork, after_in_child=self._after_fork)

    def _before_fork(self) -> None:
        self._pipe.share()
        self._output.before_fork()

    def _after_fork(self) -> None:
        self._pipe.after_fork()
        self._services.after_fork()

    def serve(self, clean_up: Optional[Callable[[], None]] = None) -> None:
        """Run jobs until the daemon closes the pipe, or this process is not fit for another job. If
        `clean_up` is given, it is called before this process ends in good order."""
        if clean_up is not None:
            self._pipe.at_end = functools.partial(self._end_well, clean_up)
        self._pipe.send(RecordType.HERE)
        self._prepare()
        # Otherwise they are to remain
        if isinstance(self._function, Program):
            if self._spec['cleanup']:
                self._function.tell = self._services.tell_left
        if isinstance(self._function, Program):
            keep_descriptors()
        if isinstance(self._function, CommandLines):
            self._function.send = self._services.send_file
        fit = True
        while fit:
            if self._interrupts.recalled:
                self._interrupts.give_back()
            if not self._pipe.jobs:
                self._pipe.receive(0)
            else:
                # Without a reference to it, so that its arguments are freed
                self._run(self._pipe.jobs.popleft())
                self._slots[0] = 0
                fit = self._tidy()
        if clean_up is not None:
            self._end_well(clean_up)

    def _end_well(self, clean_up: Callable[[], None]) -> None:
        """Clean up if no job runs and this is not a child that a job has forked."""
        if self._slots[0]:
            return
        pid = os.getpid()
        if pid == self._pid:
            clean_up()

    def _prepare(self) -> None:
        self._pid = os.getpid()
        self._output.install()
        self._interrupts.install()
        stacks = StackFile(self._spec['private'], self._pid)
        stacks.begin()
        self._services.install(self._globals)
        # Forked workers would draw the same "random" numbers; the module `random` handles this
        # itself
        if 'numpy' in sys.modules:
            random = sys.modules['numpy'].random
            random.seed()
        if isinstance(self._function, Calls) and self._function.initializer is not None:
            self._initialize(self._function)
        elif self._spec['start_method'] == SPAWN:
            self._pipe.send(RecordType.INITIALIZED)
        self._threads = threading.active_count()
        self._own_children = frozenset(children_here())   # those that setup has started
        if IS_WINDOWS:
            self._own_processes = processes_in_tree()
        self._surroundings = Surroundings(self._spec['directory'])

    def _initialize(self, calls: Calls) -> None:
        """Call the initializer of an executor. What it changes remains so for all jobs here."""
        assert calls.initializer is not None   # asked by the caller
        try:
            calls.initializer(*calls.initargs)
        except BaseException as exc:  # the user's code
            # This is what the standard library does
            log = logging.getLogger('concurrent.futures')
            log.critical('Exception in initializer:', exc_info=True)
            reason = describe_exception(exc, 1)
            text = 'the initializer has failed: %s' % reason
            self._pipe.send(RecordType.INITIALIZED, 0, 0, 0.0, 0.0,
                            shorten(text).encode('utf-8', 'replace'))
            os._exit(1)
        self._pipe.send(RecordType.INITIALIZED)

    # -- one job -----------------------------------------------------------------------------------

    def _run(self, record: Record) -> None:
        serial = record.serial
        self._interrupts.is_late = False
        Slots.begin(self._slots, serial)
        if self._slots[1] == serial:   # it was interrupted before it came
            Slots.take_back(self._slots)
            self._pipe.give_back_serials([serial])
            return
        if record.number != self._numeric.cpus:
            self._numeric.use(record.number, self._surroundings)
        start = time.time()
        ticks = time.perf_counter()
        failure: Optional[BaseException] = None
        value = None
        opened = False
        try:
            try:
                self._interrupts.in_job = True
                if self._slots[1] == serial:
                    raise KeyboardInterrupt   # it was cancelled at the moment when it starts
                spaces.added.clear()
                args, kwargs, *extras = loads(record.bodies[0], True)
                opened = True
                # The job has opened the arguments: their memory can be freed
                if len(record.bodies[0]) > LAZY:
                    self._free(record)
                if extras:
                    self._enter_directory(*extras)
                value = contextvars.copy_context().run(self._function, *args, **kwargs)
                if extras:
                    self._job_directory.bring_back(bool(value), self._services.send_as)
                self._interrupts.in_job = False
            except BaseException as exc:
                # Whatever a job raises is its result; SystemExit and the like too
                self._interrupts.in_job = False
                failure = exc
                if not opened:
                    mark_unopened(exc)
        except KeyboardInterrupt as exc:  # it came while the handler above began
            self._interrupts.in_job = False
            failure = exc
        # A child that the job has forked and that has returned here: the pipe does not belong to it
        pid = os.getpid()
        if pid != self._pid:
            os._exit(0 if failure is None else 1)
        end = start + time.perf_counter() - ticks
        if isinstance(failure, KeyboardInterrupt):
            self._half_imported = was_importing(failure)
        outcome, payload = self._outcome(value, failure)
        out, err = self._output.collect()
        if self._job_directory.is_entered:
            self._job_directory.leave()
        try:
            self._pipe.send_result(outcome, serial, start, end, payload, out, err)
        except ValueError as exc:
            text = 'the result could not be sent: %s' % exc
            self._pipe.send(RecordType.RESULT, Outcome.RAISED, serial, start, end,
                            pack_error(text, None), out, err)

    def _enter_directory(self, files: List[Tuple[str, int, bytes]], objects: Dict[str, Any],
                         returns: Tuple[str, Sequence[str]] = ('', ())) -> None:
        """Enter the job's own directory. If files are returned from it, no other files are meant to
        be."""
        self._job_directory.enter(files, objects, returns)
        if returns[1] and isinstance(self._function, Program):
            self._function.tell = None

    @staticmethod
    def _free(record: Record) -> None:
        """Free the memory of arguments that have been opened, even if something still refers to the
        record."""
        for body in record.bodies:
            with contextlib.suppress(BufferError):   # a part of it is still in use
                body.release()

    def _outcome(self, value: Any, failure: Optional[BaseException]) -> Tuple[int, Payload]:
        if failure is not None:
            if isinstance(failure, ImportError):
                import_explanation = explain_import(failure, self._spec['name'])
                failure.msg = '%s. %s' % (failure, import_explanation)
                failure.args = (failure.msg,)
            return Outcome.RAISED, cut_error(failure, 1)
        try:
            payload, plain, _, _ = dumps(value)
            size = len(payload) if type(payload) is bytes else size_of(payload)
            if (size > LAZY or size > VALUE_MOST) and is_over_limit(size):
                return Outcome.RAISED, pack_error(over_limit('the result', size), None)
            return (Outcome.RETURNED if plain else Outcome.RETURNED_CODE), payload
        except BaseException as exc:  # __reduce__ and its kin are the user's code
            text = 'the result, of type %s, could not be pickled: %s' % (type(value).__name__,
                                                                         describe_exception(exc, 1))
            return Outcome.RAISED, pack_error(text, exc)

    def _tidy(self) -> bool:
        """Restore what the job changed. Returns false if something is left that only a new process
        is free of."""
        if threading.active_count() != self._threads:
            if not self._are_idle_threads():
                return False
        if self._half_imported:
            return False
        if self._has_children():
            return False
        return self._surroundings.restore()

    @staticmethod
    def _are_idle_threads() -> bool:
        """Return whether everything that a job has left running are threads of installed libraries
        which do not keep a process alive, such as that of tqdm. They do not belong to the job, and
        the next job finds them as it would in the user's own program."""
        frames = sys._current_frames()
        return all(thread.daemon and _is_of_library(frames.get(thread.ident or 0))
                   for thread in threading.enumerate()
                   if thread is not threading.main_thread())

    def _has_children(self) -> bool:
        if IS_WINDOWS:
            return processes_in_tree() > self._own_processes
        if self._own_children:   # whose exit statuses belong to the user's code
            others = set(children_here()) - self._own_children
            return any(not has_ended(pid) for pid in others)
        if self._libc is not None:   # without an exception, which takes longer than the call
            pid = 1
            while pid > 0:
                pid = self._libc.waitpid(-1, None, os.WNOHANG)
            return pid == 0
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            return True
        except ChildProcessError:
            return False


def children_here() -> List[int]:
    """Return the PIDs of the children of this process from /proc; none if there is no /proc."""
    try:
        with open('/proc/self/task/%d/children' % os.getpid()) as file:
            pids = file.read().split()
            return [int(pid) for pid in pids]
    except OSError:
        return []


def has_ended(pid: int) -> bool:
    """Return whether a child of this process has ended; if so, it is reaped."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except ChildProcessError:   # it was reaped elsewhere
        return True


_SITE = tuple(os.sep + name + os.sep for name in ('site-packages', 'dist-packages'))


def _is_of_library(frame: Any) -> bool:
    """Return whether a thread began in an installed library and runs code of that and of the
    standard library only. A thread that began in the standard library runs the code that it was
    given."""
    files = []
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    own = [file for file in files if file != threading.__file__]
    directory = os.path.dirname(os.__file__)
    standard = directory + os.sep
    if not bool(own):
        return False
    if not any(part in own[-1] for part in _SITE):
        return False
    for file in own:
        if not (file.startswith(standard) or any(part in file for part in _SITE)):
            return False
    return True


# Names of files of joblib and loky, which contain the PID of the process that has made them
_JOBLIB_NAME = LazyPattern(r'(?:joblib_memmapping_folder_|sem\.loky-|loky-)(\d+)[_-]')


def remove_joblib_remains(pids: Set[int], since: float) -> None:
    """Remove what killed processes of a job have left in shared memory: arrays that joblib has
    mapped, and semaphores of loky. For each of them there is a process that removes it, which was
    killed together with the others. Entries older than `since` (in seconds since the epoch) belong
    to another process that had the same PID."""
    for directory in ('/dev/shm', tempfile.gettempdir()):
        try:
            names = os.listdir(directory)
        except OSError:   # this system has no such directory
            continue
        for name in names:
            match = _JOBLIB_NAME.match(name)
            if match is None:
                continue
            if int(match.group(1)) not in pids:
                continue
            path = os.path.join(directory, name)
            try:
                status = os.lstat(path)
                if status.st_uid != os.geteuid():
                    continue
                if status.st_mtime < since:
                    continue
                if stat.S_ISDIR(status.st_mode):
                    shutil.rmtree(path)
                else:
                    os.unlink(path)
            except OSError as exc:   # another user's, or it is gone already
                logger.debug('%s of a job that has ended cannot be removed: %s', path, exc)


def lend_names(names: Dict[str, Any], globals_: Sequence[Dict[str, Any]]) -> Callable[[], None]:
    """Make names known to one job: in the computation's global variables, where they are free.
    Returns a function that removes them again, together with the names that opening them has added
    there."""
    spaces.forget_added(names)
    lent = [(variables, name) for variables in globals_ for name in names if name not in variables]
    for variables, name in lent:
        variables[name] = names[name]

    def give_back() -> None:
        for variables, name in lent:
            variables.pop(name, None)
    return give_back


class SlotPlace(NamedTuple):
    """The slots of one worker, and where they are."""
    slots: Any
    file: int      # its number
    number: int    # of the slots in the file


class _Child(NamedTuple):
    process: Any
    where: SlotPlace
    out: CapturedOutput
    err: CapturedOutput
    line: Any = None   # a LoadingLine, to a worker that loads the computation itself
    tree: Optional['ProcessTree'] = None

    @property
    def slots(self) -> Any:
        """Return the slots of the workers: see Slots."""
        return self.where.slots


def offer_names(names: Dict[str, Any], spaces_: Iterable[Dict[str, Any]]) -> None:
    """Make names available in jobs without an import: in the global variables of the computation
    where they are free, and in builtins for the other modules."""
    for name, value in names.items():
        setattr(builtins, name, value)
    for variables in spaces_:
        for name, value in names.items():
            variables.setdefault(name, value)


def support_of(spec: dict) -> str:
    """Return the directory for the client's cloudpickle, which is used if this host has no
    cloudpickle or another version."""
    return os.path.join(spec['private'], 'support')


def unpack_support(spec: dict) -> None:
    """Put the client's cloudpickle into its directory."""
    for name, source in spec['support'].items():
        path = os.path.join(support_of(spec), *check_name(name))
        directory = os.path.dirname(path)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with open(path, 'wb') as file:
            file.write(source)


class ComputationCode:
    """The user's code in a process that loads it: the computation, its setup and its cleanup."""

    def __init__(self, spec: dict) -> None:
        self._spec = spec
        self._directory = spec['directory']
        self._cleanup: Any = None
        self._setup_args: tuple = ()
        self.globals: List[Dict[str, Any]] = []   # of the computation, setup and cleanup
        self.is_loaded = False      # later failures are not caused by the code

    def load(self, code: memoryview) -> None:
        """Load the code and run setup. Raises whatever the user's modules and setup do."""
        os.chdir(self._directory)
        self.threads = NumericThreads()
        SharedMemoryTracker().install()
        if self._spec['authkey']:
            multiprocessing.current_process().authkey = self._spec['authkey']
        if self._spec['support']:
            sys.path.insert(0, support_of(self._spec))
        loader = self._loader()
        names = dict(self._spec['names'], os=os, sys=sys, time=time)
        offer_names(names, ())
        if self._spec['kind'] == 'program':
            self.function: Callable[..., Any] = self._program()
            self.is_loaded = True
        else:
            setup = self._load_functions(code, loader)
            self.is_loaded = True
            if setup is not None:
                answer = setup(*self._setup_args)
                if answer is not None:
                    if answer != 0:
                        text = 'setup returned %.200r, which refuses this node' % (answer, )
                        raise RuntimeError(text)
                if self._spec['start_method'] == FORK:
                    self._warn_of_threads(loader)
        loader.loaded()

    def _program(self) -> Program:
        os.environ['DISPY_PYTHON'] = sys.executable
        if self._spec['program']:
            path = os.path.join(self._directory, self._spec['program'])
            return Program(path)
        return CommandLines(self._spec['name'])

    @staticmethod
    def _warn_of_threads(loader: ModuleLoader) -> None:
        left = []
        for thread in threading.enumerate():
            if thread is not threading.main_thread():
                left.append(thread.name)
        if left:
            loader.notes.append(
                'setup() has left %d thread%s running (%s). Jobs run in other processes, in which '
                'these threads do not exist: a job that waits for one of them waits for ever. '
                'Start threads and pools of threads in the job that uses them'
                % (len(left), 's' * (len(left) != 1), ', '.join(left[:5])))

    def _loader(self) -> ModuleLoader:
        """Make the modules and the main module of the program importable here. Returns the
        loader."""
        global modules, known_values
        main = types.ModuleType('__main__')
        sys.modules['__main__'] = main
        sys.modules['__mp_main__'] = main
        spaces.adopt_main(main)
        modules = ModuleLoader(self._spec['private'], self._spec['sys_path'], self._directory)
        modules.install()
        directory = values_in(self._spec['private'])
        known_values = ValueFiles(directory)
        if self._spec['argv']:
            sys.argv = list(self._spec['argv'])
        main_for_children(self._spec['private'])
        return modules

    def _load_functions(self, code: memoryview, loader: ModuleLoader) -> Any:
        """Load the computation, its cleanup and the objects that are found by name beside them.
        Returns setup."""
        if self._spec['bundles']:
            loader.need((0,))
        if self._spec['kind'] == 'source':
            plain = open_plain(code)
            self.function, setup, self._cleanup, objects = load_source(*plain)
        else:
            self.function, setup, self._cleanup, objects = loads(code)
        if self._spec['setup_args']:
            self._setup_args, own_objects = loads(self._spec['setup_args'])
        else:
            self._setup_args = ()
            own_objects = {}
        self.globals = globals_of(self.function, setup, self._cleanup)
        offer_names(self._spec['names'], self.globals)
        for variables in self.globals:
            for name, value in dict(objects, **own_objects).items():
                variables.setdefault(name, value)
        return setup

    def clean_up(self, end_node: Callable[[], None]) -> str:
        """Run cleanup. Returns the text of the exception that it has raised, or ''."""
        if self._cleanup is None:
            return ''
        if self._spec['client_shutdown']:
            offer_names({'dispynode_shutdown': end_node}, self.globals)
        try:
            self._cleanup(*self._setup_args)
        except BaseException as exc:  # the user's cleanup may raise anything; the daemon logs it
            reason = describe_exception(exc, 1)
            return 'cleanup failed: ' + reason
        return ''


_NO_BODIES = (memoryview(b''),) * 3


class RunningLimit:
    """The limits of one job. `ended_at` is the time when the job was ended because of them, if it
    was."""
    __slots__ = ('most', 'seconds', 'began', 'ended_at')

    def __init__(self, most: int, seconds: float) -> None:
        self.most = most
        self.seconds = seconds
        self.began: Optional[float] = None     # when it was seen to run
        self.ended_at: Optional[float] = None

    def is_over(self, now: float) -> bool:
        """Return whether the time limit has passed, and nothing was done about it yet."""
        if not (bool(self.seconds) and self.began is not None):
            return False
        if self.ended_at is not None:
            return False
        return now - self.began >= self.seconds

    def is_to_be_killed(self, now: float) -> bool:
        """Return whether the job was interrupted and still runs."""
        if self.ended_at is None:
            return False
        return now - self.ended_at >= GRACE


class RunningLimits:
    """The limits of jobs, by worker and job. The node itself ends jobs in time. If it has not, the
    runner does so some tenths of a second later: a node that is embedded in a program has no turn
    while the program holds the GIL."""

    def __init__(self) -> None:
        self._known: Dict[int, Dict[int, RunningLimit]] = {}
        self.of_memory = False     # there may be limits of memory

    def __bool__(self) -> bool:
        return bool(self._known)

    def add(self, record: Record) -> None:
        """Add the limits of a job that will run in a worker, or runs already."""
        jobs = self._known.setdefault(record.number, {})
        if record.serial not in jobs:
            jobs[record.serial] = RunningLimit(int(record.start), record.end)
            self.of_memory = self.of_memory or bool(record.start)

    def find(self, worker: int, serial: int, now: float) -> Optional[RunningLimit]:
        """Return the limit of the job that a worker runs now."""
        jobs = self._known.get(worker, {})
        for other in [other for other, before in jobs.items()
                      if before.began is not None and other != serial]:   # it has ended
            del jobs[other]
        limit = jobs.get(serial)
        if limit is not None:
            if limit.began is None:
                limit.began = now
        return limit

    def keep(self, worker: int, serial: int) -> None:
        """Forget all limits of a worker but those of these jobs."""
        jobs = self._known.get(worker, {})
        for other in [other for other in jobs if other != serial]:
            del jobs[other]

    def forget_all_but(self, workers: Container[int]) -> None:
        """Forget all workers but these, because the others have ended."""
        for worker in [worker for worker, jobs in self._known.items()
                       if worker not in workers or not jobs]:
            del self._known[worker]
        self.of_memory = any(limit.most for jobs in self._known.values()
                             for limit in jobs.values())


def _job_objects() -> Any:
    """Return the Windows library that has the functions for job objects, with their types set."""
    import ctypes
    library = ctypes.WinDLL('kernel32', use_last_error=True)  # type: ignore[attr-defined]
    handle = ctypes.c_void_p
    number = ctypes.c_uint32
    library.CreateJobObjectW.restype = handle
    library.CreateJobObjectW.argtypes = (handle, handle)
    library.SetInformationJobObject.argtypes = (handle, ctypes.c_int, handle, number)
    library.QueryInformationJobObject.argtypes = (handle, ctypes.c_int, handle, number, handle)
    library.OpenProcess.restype = handle
    library.OpenProcess.argtypes = (number, ctypes.c_int, number)
    library.AssignProcessToJobObject.argtypes = (handle, handle)
    library.TerminateJobObject.argtypes = (handle, number)
    library.CloseHandle.argtypes = (handle, )
    return library


# JOBOBJECT_EXTENDED_LIMIT_INFORMATION and JOBOBJECT_BASIC_ACCOUNTING_INFORMATION of winnt.h
_JOB_LIMITS = struct.Struct('@qqIPPIPII6QPPPP')
_JOB_LIMITS_CLASS = 9
_JOB_KILL_ON_CLOSE = 0x2000
_JOB_ACCOUNTING = struct.Struct('@qqqqIIII')
_JOB_ACCOUNTING_CLASS = 1
_PROCESS_ASSIGN = 0x0101   # PROCESS_TERMINATE | PROCESS_SET_QUOTA
_ENDED_BY_US = 0x10000   # multiprocessing uses this exit code for processes that it has ended


class ProcessTree:
    """A process and all processes that it starts from now on, as a job object of Windows. All of
    them end when the process that has made the job object ends, for whatever reason."""

    def __init__(self, pid: int) -> None:
        """`pid`: the PID of a child of this process. Raises OSError."""
        self._library = _job_objects()
        self._handle: Any = self._library.CreateJobObjectW(None, None)
        limits = _JOB_LIMITS.pack(0, 0, _JOB_KILL_ON_CLOSE, *[0] * 16)
        if self._handle and self._library.SetInformationJobObject(self._handle, _JOB_LIMITS_CLASS,
                                                                  limits, len(limits)):
            process = self._library.OpenProcess(_PROCESS_ASSIGN, 0, pid)
            assigned = self._library.AssignProcessToJobObject(self._handle, process)
            if process:
                self._library.CloseHandle(process)
            if assigned:
                return
        import ctypes
        error = ctypes.WinError(ctypes.get_last_error())  # type: ignore[attr-defined]
        self.close()
        raise error

    def kill(self) -> None:
        """Kill all of them."""
        if self._handle:
            self._library.TerminateJobObject(self._handle, _ENDED_BY_US)

    def close(self) -> None:
        """Kill all of them, and close the job object."""
        if self._handle:
            self.kill()
            self._library.CloseHandle(self._handle)
            self._handle = None


def tree_of(pid: int) -> Optional[ProcessTree]:
    """Return, on Windows, the object that ends a process with all processes that it starts.
    Elsewhere process groups serve this purpose. Raises OSError."""
    if IS_WINDOWS:
        return ProcessTree(pid)
    return None


def processes_in_tree() -> int:
    """Return how many processes are in the job object of this process, on Windows."""
    import ctypes
    told = ctypes.create_string_buffer(_JOB_ACCOUNTING.size)
    if _job_objects().QueryInformationJobObject(None, _JOB_ACCOUNTING_CLASS, told,
                                                _JOB_ACCOUNTING.size, None):
        return int(_JOB_ACCOUNTING.unpack(told.raw)[6])
    children = ask_psutil(lambda psutil: psutil.Process().children(recursive=True))   # in Wine
    return 1 + len(children or ())


class StackFile:
    """A file into which a process writes the stacks of its threads when it gets STACKS_SIGNAL, even
    while C code runs. It is in the private directory of its computation, and its PID is its
    name."""
    TIME = 0.3      # s that this may take: the runner is blocked in the meantime
    STEP = 0.002
    # The frames that have called the job, which follow its own lines
    OURS = LazyPattern(r'  File "[^"\n]*dispynode\.py", line \d+ in _run\n(?:  File .*\n)*')
    SILENT = 'the process has not written its stacks: it is stopped, or waits for its disk'

    def __init__(self, private: str, pid: int) -> None:
        self._path = os.path.join(private, 'stacks-%d' % pid)
        self._pid = pid

    def begin(self) -> None:
        """Write into the file from now on. The process itself calls this. If the file cannot be
        made, there are no stacks."""
        if not STACKS_SIGNAL:
            return
        import faulthandler
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        with contextlib.suppress(OSError, RuntimeError):
            descriptor = os.open(self._path, flags, 0o600)
            handle = _out_of_reach(descriptor)
            faulthandler.register(STACKS_SIGNAL, handle, all_threads=True)

    def read(self) -> str:
        """Have the process write its stacks. Returns them, or the text that says why there are
        none."""
        if not STACKS_SIGNAL:
            return 'this system has no signal for it'
        try:
            before = os.path.getsize(self._path)
            if not self._is_ready():
                return 'the job has changed how its process takes signals'
            os.kill(self._pid, STACKS_SIGNAL)
            return self._written(before)
        except OSError as exc:
            return 'the stacks cannot be read: %s' % exc

    def _written(self, before: int) -> str:
        """Wait until the process has written its stacks, and return them."""
        until = time.monotonic() + self.TIME
        data = b''
        while time.monotonic() < until:
            time.sleep(self.STEP)
            known = len(data)
            with open(self._path, 'rb') as file:
                file.seek(before)
                data = file.read(STACKS_MOST)
            # Each line is written in several parts, between which the process may lose its CPU
            if len(data) == STACKS_MOST or (len(data) == known and data.endswith(b'\n')):
                break
        if not data:
            return self.SILENT
        text = data.decode('utf-8', 'replace')
        return self.OURS.sub('', text)

    def _is_ready(self) -> bool:
        """Return whether the process handles the signal, which would kill it otherwise, as far as
        the system shows that."""
        path = '/proc/%d/status' % self._pid
        if not os.path.exists(path):
            return True
        with open(path) as file:
            status = file.read()
        found = re.search(r'^SigCgt:\s*([0-9a-f]+)$', status, re.M)
        if found is None:
            return False
        caught = int(found.group(1), 16)
        place = 1 << (STACKS_SIGNAL - 1)
        return bool(caught & place)

    def remove(self) -> None:
        """Remove the file of a process that has ended."""
        with contextlib.suppress(OSError):   # there is none
            os.unlink(self._path)


def look_at_job(child: _Child, private: str, wants_stacks: bool) -> Tuple[bytes, bytes, bytes]:
    """Return the stacks of a worker, if they are wanted, and the ends of what its job has printed
    to stdout and stderr."""
    stacks = ''
    if wants_stacks:
        file = StackFile(private, child.process.pid)
        stacks = file.read()
    ends = []
    for output in (child.out, child.err):
        status = os.fstat(output.handle)
        at = max(0, status.st_size - OUTPUT_SEEN)
        data = output.since(at)
        ends.append(data[:OUTPUT_SEEN])
    stdout, stderr = ends
    shown = stacks.encode('utf-8', 'replace')
    return shown[:STACKS_MOST], stdout, stderr


class WorkerProcesses:
    """The worker processes of a runner: it forks and signals them, reaps them with everything that
    they have left running, limits their memory and shows what they print. `send`, with the
    parameters of pack_record, reports what becomes of them."""
    failed = False   # no workers can be started; this was reported

    def __init__(self, spec: dict, code: Optional[ComputationCode], libc: Any,
                 send: Callable[..., None]) -> None:
        self._spec = spec
        self._code = code
        self._libc = libc
        self._send = send
        self._children: Dict[int, _Child] = {}
        now = time.time()
        self._born = now - 1.0   # clocks of file systems are slightly late
        self._own: Set[int] = set()   # children that setup left on purpose
        self.kept_alive: Set[int] = set()   # children of this process that are not workers
        # Killed processes that have not ended: they sleep in the kernel and cannot be interrupted
        self._undead: Set[int] = set()
        self._slots: List[SlotPlace] = []      # free ones
        self._slot_files = itertools.count(1)
        self._limits = RunningLimits()
        self.closed_in_workers: List[int] = []   # descriptors that workers must not inherit
        # Number of a worker to be made -> environment variables that say which devices it may use
        self._variables: Dict[int, Dict[str, str]] = {}

    def begin(self) -> None:
        """Begin; this is called once, before the runner serves. Sets `failed` if there can be no
        workers."""

    def keep_children(self) -> None:
        """Note that setup has left the present children running on purpose."""
        self._own = set(children_here())

    def drop_children(self) -> None:
        """End what setup has started, because its computation ends."""
        self._own.clear()
        self.kill_strays()

    def patience(self) -> Optional[float]:
        """Return the seconds after which workers are to be examined."""
        if self._limits.of_memory:
            return MEMORY_CHECK_INTERVAL
        if self._children:
            return OUTPUT_CHECKED
        return None

    def look(self) -> None:
        """Examine the workers: which have ended, what they have printed, and the memory that they
        use."""
        self.reap()
        if self._spec['live']:
            self._show_output()
        self._shorten()
        if self._limits:
            self._check_limits()

    def start(self, record: Record, take: Callable[[Record], socket.socket]) -> None:
        """Start a worker. If it cannot be made, this is reported with the reason, and the existing
        workers go on. `take` returns its pipe."""
        try:
            with take(record) as sock:
                process = self._start(record.number, sock)
        except (OSError, MemoryError) as exc:
            reason = shortage(exc).encode('utf-8', 'replace')
            self._send(RecordType.START_FAILED, record.number, 0, 0.0, 0.0, reason)
        else:
            self._send(RecordType.WORKER_STARTED, record.number, process.pid)

    def equip(self, record: Record) -> None:
        """Set these variables in the environment of a worker that will be started."""
        self._variables[record.number] = json.loads(bytes(record.bodies[0]))

    def _start(self, number: int, sock: socket.socket) -> Any:
        """Start the process of a worker with this pipe. Raises OSError or MemoryError."""
        variables = self._variables.pop(number, {})
        with contextlib.ExitStack() as made:
            child = self._make_child(made)
            context = multiprocessing.get_context('fork')
            process = context.Process(target=self._work,
                                      args=(sock, child, variables, os.getpid()),
                                      name='dispy-worker-%d' % number)
            process.start()
            made.pop_all()
        self._children[number] = child._replace(process=process)
        return process

    def _make_child(self, made: contextlib.ExitStack, *names: str) -> _Child:
        """Return what a worker shares with the runner; `made` frees it if there will be no worker.
        `names`: the names of the files for its output, which it opens itself."""
        outputs = []
        for name in names or ('', ''):
            output = CapturedOutput(self._spec['private'], name)
            outputs.append(output)
            made.callback(output.close)
        if not self._slots:
            number = next(self._slot_files)
            slots = Slots.make(self._spec['private'], number, bool(names))
            slot_places = []
            for at, one in enumerate(slots):
                assigned = SlotPlace(one, number, at)
                slot_places.append(assigned)
            self._slots += slot_places
        place = self._slots.pop()
        made.callback(self._slots.append, place)
        out, err = outputs
        return _Child(None, place, out, err)

    def _work(self, sock: socket.socket, child: _Child, variables: Dict[str, str],
              runner: int) -> None:
        """Run the worker in the forked process; `runner` is its parent. It leaves by os._exit
        alone: exit handlers here belong to the runner."""
        try:
            os.environ.update(variables)   # before the user's code has looked up the devices here
            os.setsid()   # a group of its own, for signals to the job and its children
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            end_with_parent(self._libc, runner)
            _prctl(self._libc, _PR_SET_CHILD_SUBREAPER, 1)
            for handle in self.closed_in_workers:
                os.close(handle)
            for other in self._children.values():
                other.out.close()
                other.err.close()
            code = self._code
            assert code is not None   # ours
            worker = Worker(sock, child.slots, code.function, child.out, child.err, self._spec,
                            self._libc, code.threads, code.globals)
            worker.serve()
        except (ConnectionError, EOFError):
            os._exit(1)   # the pipe is closed, so that this cannot be reported
        except BaseException:
            # No descriptors are left, or a fault of dispy: the runner reads this in the file and
            # reports it
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(70)
        os._exit(0)

    def interrupt(self, record: Record) -> None:
        """Interrupt a job if its worker still runs it."""
        serial = record.serial
        child = self._children.get(record.number)
        # Not twice: the node may have interrupted it as well
        if child is None:
            return
        if child.slots[1] == serial:
            return
        child.slots[1] = serial
        if child.slots[0] == serial:
            self._interrupt(child)

    def show(self, record: Record) -> None:
        """Report what a job does, if its worker still runs it."""
        serial = record.serial
        child = self._children.get(record.number)
        nothing = (b'', b'', b'')
        seen = nothing
        if child is not None and child.slots[0] == serial:
            wants_stacks = bool(record.start)
            seen = look_at_job(child, self._spec['private'], wants_stacks)
            if child.slots[0] != serial:   # it may belong to the next job
                seen = nothing
        self._send(RecordType.SEEN, record.number, serial, 0.0, 0.0, *seen)

    def kill(self, record: Record) -> None:
        """Kill a worker."""
        child = self._children.get(record.number)
        if child is not None:
            self._kill(child)

    def recall(self, record: Record) -> None:
        """Have a worker return what it has not started."""
        child = self._children.get(record.number)
        if child is not None:
            self._limits.keep(record.number, child.slots[0])
            self._take_back(child)

    def _interrupt(self, child: _Child) -> None:
        self._signal(child, signal.SIGINT)

    def _take_back(self, child: _Child) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.process.pid, TAKE_BACK_SIGNAL)

    def _kill(self, child: _Child) -> None:
        if child.tree is not None:
            child.tree.kill()
        else:
            self._signal(child, SIGKILL)

    def watch(self, record: Record) -> None:
        """Limit the memory and the time of a job."""
        self._limits.add(record)

    @staticmethod
    def _signal(child: _Child, number: int) -> None:
        """Send a signal to the whole group of a worker. Its leader is a child of this process and
        not yet reaped, so that the number is still its own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.process.pid, number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.process.pid, number)   # it may not have called setsid yet

    def reap(self) -> None:
        """Report which workers have ended, and end what they have left running."""
        for key, child in list(self._children.items()):
            if child.process.exitcode is not None:
                del self._children[key]
                if child.tree is not None:
                    child.tree.close()
                else:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(child.process.pid, SIGKILL)
                remove_joblib_remains({child.process.pid, *self.kill_strays()}, self._born)
                out, err = (output.peek(os.fstat(output.handle).st_size)
                            for output in (child.out, child.err))
                self._tell_end(key, child, out, err)
                stacks = StackFile(self._spec['private'], child.process.pid)
                stacks.remove()
                child.out.close()
                child.err.close()
                child.process.close()
                child.slots[0] = 0
                child.slots[1] = 0
                self._slots.append(child.where)
        self._undead = {pid for pid in self._undead if not has_ended(pid)}

    def _tell_end(self, key: int, child: _Child, out: bytes, err: bytes) -> None:
        self._send(RecordType.WORKER_EXITED, key, child.slots[0], float(child.process.exitcode),
                   0.0, b'', out, err)

    def kill_strays(self) -> Set[int]:
        """Kill descendants of dead workers that left their group; they have become children of this
        process, which adopts orphans (Linux). One that sleeps and cannot be interrupted, for
        example on a disk that has failed, is not waited for: it is examined again from time to
        time. Returns all that were found, including those of the group."""
        now = time.monotonic()
        until = now + UNDEAD_TIME
        found: Set[int] = set()
        while True:
            children = self._children.values()
            known = {child.process.pid for child in children}
            known |= self._own | self.kept_alive | self._undead
            strays = {pid for pid in children_here() if pid not in known}
            found |= strays
            for pid in strays:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, SIGKILL)
            strays = {pid for pid in strays if not has_ended(pid)}
            if not strays and not any(pid not in known for pid in children_here()):
                return found
            if time.monotonic() > until:
                self._undead |= strays
                return found
            time.sleep(0.002)

    def _show_output(self) -> None:
        """Report what running jobs have printed since the last look. What they print between this
        and their end comes with the result."""
        for key, child in self._children.items():
            serial = child.slots[0]
            for stream, output in ((1, child.out), (2, child.err)):
                if output.shown[0] != serial:
                    output.shown = (serial, 0)
                status = os.fstat(output.handle)
                size = status.st_size
                # The middle of very long output is not shown
                at = max(output.shown[1], size - 2 * OUTPUT_KEPT)
                if serial and size > at:
                    data = output.since(at)
                else:
                    data = b''
                # Or it belonged to the next job
                if not data:
                    continue
                if child.slots[0] != serial:
                    continue
                output.shown = (serial, at + len(data))
                self._send(RecordType.PRINTED, key, serial, float(stream), float(at), data)

    def _check_limits(self) -> None:
        """End jobs that have exceeded their time limit, and kill workers whose jobs use more memory
        than they may."""
        limits = self._limits
        now = time.monotonic()
        for key, child in self._children.items():
            serial = child.slots[0]
            limit = limits.find(key, serial, now)
            if limit is None:
                continue
            if limit.most and memory_of(child.process.pid) > limit.most \
                    and child.slots[0] == serial:
                limits.keep(key, 0)
                self._send(RecordType.MEMORY_EXCEEDED, key, serial)
                self._kill(child)
            elif limit.is_to_be_killed(now):
                limit.ended_at = math.inf
                self._kill(child)
            elif limit.is_over(now):
                limit.ended_at = now
                self._send(RecordType.OVERDUE, key, serial)
                record = Record(RecordType.INTERRUPT, key, serial, 0.0, 0.0, _NO_BODIES)
                self.interrupt(record)
        limits.forget_all_but(self._children)

    def _shorten(self) -> None:
        for child in self._children.values():
            child.out.shorten(self._libc)
            child.err.shorten(self._libc)

    def end(self) -> None:
        """End all workers. A signal to end that comes in the meantime, as when the daemon ends,
        waits: if this were interrupted, nobody else would remove what is left."""
        if _sigmask is not None:
            mask = _sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        else:
            mask = ()
        try:
            self._end_in_order()
            for child in self._children.values():
                self._kill(child)
            until = time.monotonic() + GRACE
            for child in self._children.values():
                now = time.monotonic()
                child.process.join(max(0.0, until - now))
            children = self._children.values()
            workers = {child.process.pid for child in children}
            self._children.clear()
            pids = workers | self.kill_strays()
            remove_joblib_remains(pids, self._born)
        finally:
            if _sigmask is not None:
                _sigmask(signal.SIG_SETMASK, mask)

    def _end_in_order(self) -> None:
        """Let workers end that have something to do at their end: forked ones have not."""


def stderr_tail(printed: bytes) -> str:
    """Return the end of what was printed, to be appended to a text for people."""
    text = printed.decode('utf-8', 'replace')
    tail = text[-2000:]
    if tail:
        return '\nstderr:\n' + tail
    return ''


def check_not_shared(spaces_: Iterable[Dict[str, Any]]) -> None:
    """Raise RuntimeError for objects that setup has made for all jobs of a node to share: only
    forked processes share them, and each worker would have one of its own."""
    for variables in spaces_:
        for name, value in list(variables.items()):
            kind = shared_kind(value)
            if kind:
                text = ('the global variable %s is %s, which only forked processes share: '
                        'workers '
                        "that are started with start_method='spawn' run setup each and "
                        "would have one "
                        "each. Use start_method='fork', or multiprocessing.Manager in the "
                        "program, "
                        'whose proxies can be arguments' % (name, kind))
                raise RuntimeError(text)


_SHARED_KINDS = (
    ('multiprocessing.synchronize', ('SemLock', 'Condition', 'Event', 'Barrier')),
    ('multiprocessing.sharedctypes', ('SynchronizedBase', )),
    ('multiprocessing.queues', ('Queue', 'SimpleQueue')),
    ('multiprocessing.connection', ('_ConnectionBase', 'Listener')),
    ('multiprocessing.pool', ('Pool', )))


def shared_kind(value: Any) -> str:
    """Return the kind of a value that only forked processes share, or ''. Contents of containers
    and attributes of instances are examined too."""
    kind = _shared_itself(value)
    if kind:
        return kind
    parts = _parts_of(value)
    for one in itertools.islice(parts, 1000):
        kind = _shared_itself(one)
        if kind:
            return 'or has in it ' + kind
    return ''


def _shared_itself(value: Any) -> str:
    for module, names in _SHARED_KINDS:
        kinds = [getattr(sys.modules.get(module), name, None) for name in names]
        classes = [kind for kind in kinds if isinstance(kind, type)]
        if isinstance(value, tuple(classes)):
            return 'a %s of multiprocessing' % type(value).__name__
    wrapper = getattr(value, '_wrapper', None)
    if type(wrapper).__module__ == 'multiprocessing.heap':
        return 'a shared array or value of multiprocessing'
    managers = sys.modules.get('multiprocessing.managers')
    if managers is not None and isinstance(value, (managers.BaseProxy, managers.BaseManager)):
        manager = getattr(value, '_manager', None) or value
        if hasattr(manager, '_process'):   # started here, and not only connected
            return 'of a manager of multiprocessing that was started here'
    return ''


def _parts_of(value: Any) -> Iterable[Any]:
    if type(value) in (list, tuple, set, frozenset):
        return value  # type: ignore[no-any-return]
    if type(value) is dict:
        return list(value.values())
    if isinstance(value, (type, types.ModuleType, types.FunctionType)):
        return ()
    return list(getattr(value, '__dict__', {}).values())


class LoadingLine:
    """A runner's end of the connection to a worker that is not forked and loads the computation
    itself."""

    def __init__(self, sock: socket.socket, call: Callable[[], None]) -> None:
        self.sock = sock
        self.call = call          # when there is something to read
        self.is_up = False        # the worker has loaded the computation
        self.text = ''            # why it could not
        now = time.monotonic()
        self.until = now + SETUP_TIME
        self.passed: Optional[socket.socket] = None   # until it has arrived
        self._intake = RecordBuffer(FROM_LOADING)

    def receive(self) -> Optional[List[Record]]:
        """Return the records that have come; an empty list if there are no more yet, None at the
        end. Raises PeerError."""
        records: List[Record] = []
        while not records:
            try:
                buffer = self._intake.get_buffer()
                count = self.sock.recv_into(buffer)
            except _WOULD_BLOCK:
                break
            except OSError:
                return None
            if not count:
                return None
            records = self._intake.records(count)
        return records

    def forget_passed(self) -> None:
        """Close what was passed, which has arrived or never will."""
        if self.passed is not None:
            self.passed.close()
            self.passed = None

    def tell(self, kind: RecordType) -> None:
        """Send an order, if the worker is still alive."""
        with contextlib.suppress(OSError):
            self.sock.sendall(pack_record(kind)[0])

    def give(self, sock: socket.socket, pid: int) -> None:
        """Pass the worker its pipe. Raises OSError."""
        data, passing = pack_socket(sock, pid, RecordType.FORK)
        if passing is None:
            self.sock.sendall(data)
        else:
            send_with(self.sock, [data], passing)
            if LATE_PASSING:
                self.passed = sock.dup()


class SpawnedWorkers(WorkerProcesses):
    """Worker processes that are started as new processes and load the computation themselves; the
    runner loads nothing of the user's. One is started immediately, so that a computation that
    cannot be used here is refused before there is a job. It waits, like any that is not needed yet,
    under a number below 0 until it gets a pipe."""
    FILE = 'computation'   # the file that workers load

    def __init__(self, spec: dict, code: Buffer, libc: Any, send: Callable[..., None],
                 selector: selectors.BaseSelector) -> None:
        super().__init__(spec, None, libc, send)
        self._selector = selector
        self._numbers = itertools.count(1)
        self._is_up = False
        path = os.path.join(spec['private'], self.FILE)
        data = pickle.dumps((spec, bytes(code)))
        write_private(path, data)

    def begin(self) -> None:
        from multiprocessing import resource_tracker
        try:
            if os.name != 'nt':
                resource_tracker.ensure_running()   # otherwise each worker would start one
            self.keep_children()
            self._spawn()
        except (OSError, MemoryError) as exc:
            text = 'the first worker cannot be started: %s' % shortage(exc)
            reason = text.encode('utf-8', 'replace')
            self._fail(0, reason)

    def _start(self, number: int, sock: socket.socket) -> Any:
        variables = self._variables.pop(number, {})
        for key, child in list(self._children.items()):
            if key < 0 and not variables:   # it has loaded the computation without the variables
                with contextlib.suppress(OSError):   # it has just ended
                    return self._give_pipe(key, child, number, sock)
        key = self._spawn(variables)
        return self._give_pipe(key, self._children[key], number, sock)

    def _interrupt(self, child: _Child) -> None:
        if IS_WINDOWS:
            child.line.tell(RecordType.INTERRUPT)
        else:
            super()._interrupt(child)

    def _take_back(self, child: _Child) -> None:
        if IS_WINDOWS:
            child.line.tell(RecordType.RECALL)
        else:
            super()._take_back(child)

    def _give_pipe(self, key: int, child: _Child, number: int, sock: socket.socket) -> Any:
        child.line.give(sock, child.process.pid)
        self._children[number] = self._children.pop(key)
        return child.process

    def _spawn(self, variables: Optional[Dict[str, str]] = None) -> int:
        """Start a process that loads the computation, with these variables in its environment.
        Returns its temporary number. Raises OSError or MemoryError."""
        number = next(self._numbers)
        names = ('out-%d' % number, 'err-%d' % number)
        with contextlib.ExitStack() as made:
            child = self._make_child(made, *names)
            ours, theirs = socket_pair()
            made.callback(ours.close)
            with theirs:
                context = multiprocessing.get_context('spawn')
                pid = os.getpid()
                process: Any = context.Process(target=worker_main,
                                               name='dispy-worker',
                                               args=(theirs, self._spec['private'], names,
                                                     child.where[1:], pid))
                with with_variables(variables or {}):
                    process.start()
            made.callback(process.kill)
            tree = tree_of(process.pid)
            line = LoadingLine(ours, functools.partial(self._hear, process))
            child = child._replace(process=process, tree=tree, line=line)
            made.pop_all()
        ours.setblocking(False)
        self._selector.register(ours, selectors.EVENT_READ, child.line.call)
        self._children[-number] = child
        child.line.tell(RecordType.INIT)   # from now on, all that it starts ends with it
        return -number

    def _hear(self, process: Any) -> None:
        """Handle a message of a worker, or the end of its connection."""
        for key, child in self._children.items():
            if child.process is process:
                self._listen(key, child)
                return

    def _listen(self, key: int, child: _Child) -> None:
        line = child.line
        try:
            records = line.receive()
            while records:
                for record in records:
                    self._on_record(key, line, record)
                records = line.receive()
        except PeerError as exc:   # a job has written into it
            logger.error('a worker is killed: it sent nonsense to its runner: %s', exc)
            self._kill(child)
            records = None
        if records is None:
            self._forget(line)
            if IS_WINDOWS:   # nothing else shows that it has ended, which takes a little longer
                child.process.join(0.1)

    def _forget(self, line: LoadingLine) -> None:
        with contextlib.suppress(KeyError):   # it was read to its end before
            self._selector.unregister(line.sock)

    def _on_record(self, key: int, line: LoadingLine, record: Record) -> None:
        bodies = record.bodies
        if record.kind == RecordType.ALIVE:
            line.forget_passed()
        elif record.kind == RecordType.READY:
            line.is_up = True
            if not self._is_up:
                self._is_up = True
                self._send(RecordType.READY, 0, 0, 0.0, 0.0, bodies[0])
        elif record.kind == RecordType.END_NODE:
            if self._spec['client_shutdown']:
                self._send(RecordType.END_NODE)
        elif not self._is_up:
            text = bytes(bodies[0])
            self._fail(record.number, text)
        elif line.is_up:   # the cleanup of this worker has failed
            self._send(RecordType.FAILED, 0, 0, 0.0, 0.0, bodies[0])
        else:
            line.text = bytes(bodies[0]).decode('utf-8', 'replace')

    def _fail(self, unloadable: int, text: bytes) -> None:
        """Report that the computation cannot be used here."""
        if not self.failed:
            self.failed = True
            self._send(RecordType.FAILED, unloadable, 0, 0.0, 0.0, text)

    def _tell_end(self, key: int, child: _Child, out: bytes, err: bytes) -> None:
        line = child.line
        self._listen(key, child)   # what it sent before
        self._forget(line)
        line.forget_passed()
        line.sock.close()
        if not self._is_up:
            code = int(child.process.exitcode)
            text = 'the worker process %s while it loaded the computation or ran setup%s' % (
                exit_text(code), stderr_tail(err))
            reason = text.encode('utf-8', 'replace')
            self._fail(0, reason)
        elif key > 0:
            err += line.text.encode('utf-8', 'replace')
            super()._tell_end(key, child, out, err)

    def look(self) -> None:
        super().look()
        now = time.monotonic()
        for child in self._children.values():
            if not self._is_up:
                continue
            if child.line.is_up:
                continue
            if now > child.line.until:
                child.line.text = 'setup did not end within %d s' % SETUP_TIME
                self._kill(child)

    def _end_in_order(self) -> None:
        """Let workers run cleanup that have loaded the computation and run no job."""
        now = time.monotonic()
        until = now + CLEANUP_TIME
        idle_until = now + RESULT_SENT
        ending = []
        for child in self._children.values():
            if child.line.is_up and self._is_idle(child, idle_until):
                ending.append(child)
                child.line.tell(RecordType.CLOSE)
            else:
                self._kill(child)
        for child in ending:
            now = time.monotonic()
            child.process.join(max(0.0, until - now))
        self.reap()

    @staticmethod
    def _is_idle(child: _Child, until: float) -> bool:
        """Return whether a worker runs no job. A worker whose result has been received already may
        not yet have noted in its slots that the job has ended: this is waited for."""
        while child.slots[0] and time.monotonic() < until:
            time.sleep(0.002)
        return not child.slots[0]


class LoadingProcess:
    """A process that may load a computation, and its connection to the process that has started it:
    a runner, or a worker that is not forked."""
    _spec: dict
    _code: ComputationCode

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._intake = RecordBuffer()
        self._records: Deque[Record] = collections.deque()
        self._handles: Deque[int] = collections.deque()

    def _catch_output(self, out: CapturedOutput, err: CapturedOutput) -> None:
        """Redirect what is printed during loading into files."""
        self._out = out
        self._err = err
        os.dup2(out.handle, 1)
        os.dup2(err.handle, 2)
        sys.stdout, sys.stderr = output_stream(1, 1), output_stream(2, 1)
        # Processes that setup forks must not hold the connection that shows the end of this process
        if hasattr(os, 'register_at_fork'):
            os.register_at_fork(after_in_child=self._control.close)

    def _load(self, code: Buffer) -> bool:
        """Load the computation and run its setup. Returns whether this succeeded. If not, the other
        side is told why."""
        try:
            self._code.load(memoryview(code))
            self._loaded()
        except BaseException as exc:  # the user's modules and setup may raise anything
            self._not_loaded()
            if self._code.is_loaded:
                hint = ''
            else:
                hint = explain_import(exc, self._spec['name'])
            frames = frames_of_ours(exc)
            text = hint + '\n' * bool(hint) + describe_exception(exc, frames)
            self._tell_failure(text)
            return False
        return True

    def _loaded(self) -> None:
        """Go on after the computation was loaded. May raise what setup may."""

    def _not_loaded(self) -> None:
        """Prepare for the report that the computation cannot be used here."""

    def _tell_up(self) -> None:
        if modules is not None:
            notes = modules.notes
        else:
            notes = []
        body = pickle.dumps(notes)
        self._send(RecordType.READY, 0, 0, 0.0, 0.0, body)

    def _tell_failure(self, text: str) -> None:
        """Report that the computation cannot be used here; the record's number is 1 if its code
        cannot even be loaded."""
        sys.stdout.flush()
        sys.stderr.flush()
        printed = self._err.peek(os.fstat(2).st_size)
        text = shorten(text) + stderr_tail(printed)
        self._send(RecordType.FAILED, int(not self._code.is_loaded), 0, 0.0, 0.0,
                   text.encode('utf-8', 'replace'))

    def _clean_up(self) -> None:
        """Run the computation's cleanup, and report if it fails."""
        failure = self._code.clean_up(self._end_node)
        if failure:
            self._tell_failure(failure)

    @staticmethod
    def _finalize() -> None:
        """Do what exit handlers would do: this process ends without those of the user's modules,
        and shared variables that setup has made leave named semaphores behind unless they are
        finalized."""
        module = sys.modules.get('multiprocessing.util')
        finalize = getattr(module, '_run_finalizers', None)
        if finalize is not None:
            finalize(0)

    def _end_node(self) -> None:
        """Request the end of the node: this is dispynode_shutdown, which a cleanup finds if the
        node was started with --client-shutdown. The node ends when its client releases it."""
        self._send(RecordType.END_NODE)

    def _receive(self) -> None:
        while True:
            if hasattr(socket, 'CMSG_LEN'):
                handles = array.array('i')
                buffer = self._intake.get_buffer()
                data, ancillary, flags, _ = self._control.recvmsg_into([buffer],
                                                                       socket.CMSG_SPACE(
                                                                           64 * handles.itemsize))
                for level, kind, body in ancillary:
                    if level != socket.SOL_SOCKET:
                        continue
                    if kind == socket.SCM_RIGHTS:
                        handles.frombytes(body[:len(body) - len(body) % handles.itemsize])
                if flags & socket.MSG_CTRUNC and not handles:
                    # No descriptor was left for the pipe: its worker cannot be made
                    handles.append(-1)
                self._handles.extend(handles)
            else:
                data = self._control.recv_into(self._intake.get_buffer())
            if not data:
                sys.exit(0)   # the other side is gone
            self._records.extend(self._intake.records(data))
            if self._records:
                return

    def _take_socket(self, record: Record) -> socket.socket:
        return take_socket(record, self._handles)

    def _send(self, *args: Any) -> None:
        for buffer in pack_record(*args):
            self._control.sendall(buffer)


class Runner(LoadingProcess):
    """Makes workers, reaps them and reports to the daemon. If workers are forked, it has loaded the
    computation before and has run its setup once."""

    def __init__(self, control: socket.socket) -> None:
        super().__init__(control)
        self._shall_end = False
        self._is_ending = False
        self._is_closed = False
        self._tracker = TrackerProcess()

    def run(self) -> None:
        """Serve until told to close, or until the daemon is gone."""
        libc = _libc()
        _prctl(libc, _PR_SET_PDEATHSIG, signal.SIGTERM)
        _prctl(libc, _PR_SET_CHILD_SUBREAPER, 1)
        self._receive()
        init = self._records.popleft()
        self._spec = pickle.loads(init.bodies[0])   # from the daemon that started this process
        limit_values(self._spec['max_value'])
        self._code = ComputationCode(self._spec)
        private = self._spec['private']
        selector = selectors.DefaultSelector()
        forks = self._spec['start_method'] == FORK
        if forks:
            self._workers = WorkerProcesses(self._spec, self._code, libc, self._send)
        else:
            self._workers = SpawnedWorkers(self._spec, init.bodies[1], libc, self._send, selector)
        out = CapturedOutput(private)
        err = CapturedOutput(private)
        self._catch_output(out, err)
        if os.name == 'posix' and not forks:
            self._tracker.start()
            self._keep_tracker()
        # Ends a setup that hangs, and closes the runner
        signal.signal(signal.SIGTERM, self._told_to_end)
        unpack_support(self._spec)
        if forks:
            if not self._load(init.bodies[1]):
                return
            self._make_tracker_pipe(selector)
            self._tell_up()
        self._serve(selector)

    def _make_tracker_pipe(self, selector: selectors.BaseSelector) -> None:
        self._tracker.make_pipe()
        self._keep_tracker()
        if self._tracker.reader >= 0:
            selector.register(self._tracker.reader, selectors.EVENT_READ,
                              functools.partial(self._start_tracker, selector))

    def _start_tracker(self, selector: selectors.BaseSelector) -> None:
        selector.unregister(self._tracker.reader)
        self._workers.closed_in_workers.remove(self._tracker.reader)
        self._tracker.start_at_pipe()
        self._keep_tracker()

    def _keep_tracker(self) -> None:
        """Note that the resource tracker is not a process that a job has left running, whoever has
        started it."""
        self._tracker.find()
        self._workers.kept_alive.add(self._tracker.pid)

    def _loaded(self) -> None:
        self._workers.keep_children()
        gc.collect()
        gc.freeze()   # loaded objects stay shared with the workers, copy-on-write

    def _not_loaded(self) -> None:
        self._keep_tracker()
        self._workers.kill_strays()
        self._tracker.stop()
        # The computation is not wanted any more, so that the interrupt is not a fault
        if self._shall_end:
            self._remove_abandoned()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            pid = os.getpid()
            os.kill(pid, signal.SIGTERM)

    def _told_to_end(self, number: int, frame: Any) -> None:
        self._shall_end = True
        # Not twice: the signal comes with the end of each thread of a program that may be the
        # parent, and the runner must still remove what is left
        if not self._is_ending:
            self._is_ending = True
            sys.exit(0)

    def _serve(self, selector: selectors.BaseSelector) -> None:
        reader, writer = socket_pair()
        reader.setblocking(False)
        writer.setblocking(False)
        workers = self._workers
        handle = reader.fileno()
        workers.closed_in_workers = [handle, writer.fileno()]
        if self._tracker.reader >= 0:
            workers.closed_in_workers.append(self._tracker.reader)
        if hasattr(signal, 'SIGCHLD'):
            signal.signal(signal.SIGCHLD, lambda number, frame: None)
        descriptor = writer.fileno()
        signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
        selector.register(self._control, selectors.EVENT_READ, self._receive)
        selector.register(reader, selectors.EVENT_READ, functools.partial(reader.recv, 4096))
        handlers = {RecordType.FORK: lambda record: workers.start(record, self._take_socket),
                    RecordType.INTERRUPT: workers.interrupt, RecordType.KILL: workers.kill,
                    RecordType.RECALL: workers.recall, RecordType.WATCH: workers.watch,
                    RecordType.EQUIP: workers.equip, RecordType.LOOK: workers.show,
                    RecordType.ASK: lambda record: self._send(RecordType.ALIVE)}
        try:
            workers.begin()
            while not workers.failed:
                for key, _ in selector.select(workers.patience()):
                    key.data()
                while self._records:
                    record = self._records.popleft()
                    if record.kind == RecordType.CLOSE:
                        self._is_closed = True
                        return
                    handlers[RecordType(record.kind)](record)
                workers.look()
        finally:
            self._end()

    def _end(self) -> None:
        self._is_ending = True
        self._workers.end()
        self._tracker.end_pipe()
        if not self._is_closed:   # this comes first, as the next program may wait for it
            write_notes(self._spec['private'])
        self._clean_up()
        self._keep_tracker()
        self._workers.drop_children()
        self._finalize()
        self._tracker.stop()
        if not self._is_closed:
            self._remove_abandoned()

    def _remove_abandoned(self) -> None:
        """Remove the directory of a node that was embedded in a program, if the program has ended
        without doing so. A signal that reports its end may come before its descriptors are
        closed."""
        if not self._spec['root']:
            return
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.select(GRACE)
        try:
            has_ended = not self._control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError as exc:
            has_ended = not isinstance(exc, BlockingIOError)
        if has_ended:
            directory = os.path.dirname(self._spec['root'])
            os.chdir(directory)
            remove_abandoned_directory(self._spec['root'], self._spec['private'], 50)


class SpawnedWorker(LoadingProcess):
    """A worker that is not forked: it loads the computation by itself and waits for its pipe."""

    def run(self, private: str, names: Tuple[str, str], place: Tuple[int, int],
            runner: int) -> None:
        """Run until its pipe is closed, or until it is not fit for another job. `names` are those
        of the files for its output, `place` is that of its slots, `runner` the PID of its
        parent."""
        libc = _libc()
        end_with_parent(libc, runner)   # no other process could end this one
        _prctl(libc, _PR_SET_CHILD_SUBREAPER, 1)
        self._next_order()   # INIT: the runner can end what this process starts
        self._catch_output(*(CapturedOutput(private, name) for name in names))
        slots = Slots.open(private, *place)
        path = os.path.join(private, SpawnedWorkers.FILE)
        with open(path, 'rb') as file:
            self._spec, code = pickle.load(file)   # from the runner that started this process
        limit_values(self._spec['max_value'])
        self._code = ComputationCode(self._spec)
        if not self._load(code):
            os._exit(1)
        self._tell_up()
        record = self._next_order()
        if record.kind == RecordType.FORK:
            sock = self._take_socket(record)
            self._send(RecordType.ALIVE)   # it has arrived
            for output in (self._out, self._err):
                output.empty()
            if IS_WINDOWS:
                _thread.start_new_thread(self._hear_orders, ())
            worker = Worker(sock, slots, self._code.function, self._out, self._err, self._spec,
                            libc, self._code.threads, self._code.globals)
            worker.serve(self._leave)
        else:
            self._leave()

    def tell_fault(self, text: str) -> None:
        """Report a failure that the computation has not caused and that keeps this worker from
        running jobs."""
        with contextlib.suppress(OSError):   # the runner is gone
            body = shorten(text).encode('utf-8', 'replace')
            self._send(RecordType.FAILED, 0, 0, 0.0, 0.0, body)

    def _next_order(self) -> Record:
        if not self._records:
            self._receive()
        return self._records.popleft()

    def _loaded(self) -> None:
        check_not_shared(self._code.globals)

    def _leave(self) -> None:
        self._clean_up()
        self._finalize()

    def _hear_orders(self) -> None:
        """Receive orders that are signals on other systems; this is a thread on Windows. The
        handlers run in the main thread. The thread is not one of `threading`, which would show it
        to jobs."""
        signals = {RecordType.INTERRUPT: signal.SIGINT, RecordType.RECALL: TAKE_BACK_SIGNAL}
        while True:
            try:
                self._receive()
            except (OSError, SystemExit):   # the runner has ended, and this process will end
                return
            while self._records:
                record = self._records.popleft()
                order = RecordType(record.kind)
                number = signals.get(order)
                if number is not None:
                    signal.raise_signal(number)


class User(NamedTuple):
    """The user whose rights jobs have, if the daemon was started as root with --user."""
    name: str
    uid: int
    gid: int
    home: str


def become(user: User) -> None:
    """Give up root for good, and also the tracker that multiprocessing inherited from root: it
    removes whatever it is told to."""
    from multiprocessing import resource_tracker
    tracker: Any = getattr(resource_tracker, '_resource_tracker', None)
    if getattr(tracker, '_fd', None) is not None:
        os.close(tracker._fd)
        tracker._fd = None
    os.initgroups(user.name, user.gid)
    os.setgid(user.gid)
    os.setuid(user.uid)
    os.environ.update(HOME=user.home, USER=user.name, LOGNAME=user.name)


def runner_main(control: socket.socket, user: Optional[User] = None) -> None:
    """Run the runner process, with a session of its own: Ctrl-C at the terminal does not concern
    it."""
    if hasattr(os, 'setsid'):
        if os.getsid(0) != os.getpid():
            os.setsid()
    _no_stdin()       # setup() must not read lines that are typed there
    del sys.argv[1:]  # they may contain the secret
    if user is not None:
        become(user)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = 0
    try:
        out = _out_of_reach(control.detach())
        runner = Runner(socket.socket(fileno=out))
        runner.run()
    except SystemExit as exc:
        if isinstance(exc.code, int):
            code = exc.code
        else:
            code = 1
    os._exit(code)   # the user's threads and exit handlers are not waited for


def worker_main(control: socket.socket, private: str, names: Tuple[str, str],
                place: Tuple[int, int], runner: int) -> None:
    """Run a worker process that is not forked; the runner has started it with `spawn`."""
    if hasattr(os, 'setsid'):
        os.setsid()   # a group of its own, for signals to the job and its children
    _no_stdin()
    out = _out_of_reach(control.detach())
    worker = SpawnedWorker(socket.socket(fileno=out))
    try:
        worker.run(private, names, place, runner)
    except (ConnectionError, EOFError, SystemExit):
        os._exit(1)   # the other side is gone, so that this cannot be reported
    except BaseException:   # no descriptors are left, or a fault of dispy
        worker.tell_fault(traceback.format_exc())
        os._exit(70)
    os._exit(0)   # as a runner does


# --------------------------------------------------------------------------------------------------
# The daemon: it carries out what Node decides. Its directory, its processes, its command line.
# --------------------------------------------------------------------------------------------------

NODE_MARK = 'dispy-node'    # the file that marks a directory as a node's
# Everything that an idle node has in its directory
KEEPING_FILES = frozenset(('lock', 'memory', NODE_MARK))


def _was_ours(root: str) -> bool:
    """Return whether a node of an earlier version, which made no mark, has used this directory: its
    lock file tells."""
    try:
        path = os.path.join(root, 'lock')
        with open_regular(path) as file:
            return file.read(4) == b'PID '  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return False


def _is_ours(name: str, *beginnings: str) -> bool:
    """Return whether a name in the node's directory is one that the node gives: a prefix, and the
    name of a computation."""
    if not (name.startswith(beginnings) and bool(name[2:])):
        return False
    return is_comp(name[2:])


def _notes_of(data: Buffer) -> List[str]:
    """Return what a runner reports when it is ready. Raises PeerError."""
    notes = open_envelope(data)
    if type(notes) is not list or not all(type(note) is str for note in notes):
        raise PeerError('malformed notes')
    return [shorten(note, NAME_MOST) for note in notes[:100]]


def _keep(body: memoryview) -> Buffer:
    """Return a body of a record that can be kept: small ones are copied, so that they do not hold a
    whole batch in memory."""
    if len(body) < OUT_OF_BAND:
        return bytes(body)
    return body


def _row_of(pipe: Pipe, head: Tuple[Any, ...], body: memoryview) -> tuple:
    """Return a row of Results from the record of a worker. Raises PeerError if it is not
    plausible."""
    _, in_segment, outcome, serial, start, end, size, _, _ = head
    if size == len(body) < OUT_OF_BAND and not in_segment:   # small, and nothing was printed
        row: tuple = (serial, outcome, start, end, bytes(body), b'', b'')
    else:
        record = pipe.record_of(head, body)
        payload, stdout, stderr = map(_keep, record.bodies)
        row = (serial, outcome, start, end, payload, stdout, stderr)
    if outcome not in OF_WORKERS or not is_outcome(*row[OUTCOME:]):
        text = 'a result with outcome %d, from %g to %g, of %d bytes' % (
            outcome, start, end, size_of(row[PAYLOAD]))
        raise PeerError(text)
    return row


def shortage(exc: BaseException) -> str:
    """Return why a process could not be started, with the limit that was reached and how to raise
    it."""
    number = getattr(exc, 'errno', None)
    limits = {
        errno.EMFILE: ('RLIMIT_NOFILE', 'no more descriptors: limit %s; raise it with ulimit -n'),
        errno.EAGAIN: (
            'RLIMIT_NPROC',
            'no more processes: limit %s; raise it with ulimit -u, or pids.max of the cgroup')
    }
    if number in limits:
        name, text = limits[number]
        return text % _limit_of(name)
    if number == errno.ENOSPC:
        return 'no more room or no more files on the disk: %s' % exc
    if number == errno.ENOMEM:
        return 'no more memory'
    if isinstance(exc, MemoryError):
        return 'no more memory'
    return str(exc)


def _limit_of(name: str) -> str:
    """Return a limit of this process for people; for processes also that of its cgroup, which may
    be lower."""
    found = []
    try:
        import resource
        soft = resource.getrlimit(getattr(resource, name))[0]
        if soft != resource.RLIM_INFINITY:
            found.append(soft)
    except (ImportError, AttributeError):
        logger.debug('there is no %s here', name)
    if name == 'RLIMIT_NPROC':
        found += _cgroup_pids()
    if found:
        return str(min(found))
    return 'of the system'


def _cgroup_pids() -> List[int]:
    """Return the limits of processes in the cgroups that this process is in (Linux)."""
    found = []
    with contextlib.suppress(OSError, ValueError), open('/proc/self/cgroup') as file:
        for line in file:
            _, controllers, path = line.rstrip('\n').split(':', 2)
            if controllers not in ('', 'pids'):
                continue
            below = os.path.join('/sys/fs/cgroup', controllers, path.lstrip('/'))
            with contextlib.suppress(OSError, ValueError), open(os.path.join(below,
                                                                             'pids.max')) as limit:
                contents = limit.read()
                found.append(int(contents))   # 'max' is not a number
    return found


# Exit codes of Windows that people may see
NT_STATUS = {
    0xC0000005: 'access violation', 0xC0000017: 'no memory', 0xC00000FD: 'stack overflow',
    0xC0000135: 'a DLL was not found', 0xC000013A: 'ended by Ctrl-C', 0xC0000374: 'heap corruption',
    0xC0000409: 'abort, or a stack buffer overrun'}


def exit_text(code: Optional[int]) -> str:
    """Return the meaning of an exit code in words."""
    # Windows: an exception that nothing has handled
    if code is not None:
        if code >= 1 << 31:
            name = NT_STATUS.get(code, 'see "NTSTATUS values"')
            return 'ended with exit code %d (0x%X, %s)' % (code, code, name)
    if code is None or code >= 0:
        return 'ended with exit code %s' % code
    try:
        ended_by = signal.Signals(-code)
        name = ended_by.name
    except ValueError:
        name = 'unknown'
    return 'was killed by signal %d (%s%s)' % (
        -code, name, '; the kernel does this when memory runs out' if code == -9 else '')


def platform_text() -> str:
    """Return what `platform.platform()` returns, except that on Linux no process `uname -p` is
    started: the first result of a program would have to wait for it, and as a rule it adds
    nothing."""
    if sys.platform != 'linux':
        with process_start_lock:
            return platform.platform()
    parts = [*map(os.uname().__getitem__, (0, 2, 4)), 'with', ''.join(platform.libc_ver())]
    return '-'.join(part.replace(' ', '_') for part in parts if part)


def node_facts() -> dict:
    """Return the facts on this host that are of interest to a client."""
    system = platform_text()
    python = tuple(sys.version_info[:3])
    cloudpickle = installed_version('cloudpickle')
    pid = os.getpid()
    return {
        'python': python, 'dispy': __version__, 'platform': system, 'cloudpickle': cloudpickle,
        'pid': pid, 'looks': True
    }


class ProcFiles:
    """Reads from /proc on Linux what psutil would return. The first result of a program would have
    to wait until psutil is imported, which takes longer than everything else that its node does
    before it."""
    _idle = 0     # values of the previous call, in ticks since the system was started
    _all = 0

    @classmethod
    def free(cls) -> Dict[str, float]:
        """Return `cpu`, in percent since the previous call, `memory`, `memory_total` and `swap`, in
        bytes. Raises OSError, ValueError or KeyError."""
        with open('/proc/stat') as file:
            words = file.readline().split()
        ticks = [int(word) for word in words[1:9]]   # the time of guests is a part of these
        idle = ticks[3] + ticks[4]                   # idle, or waiting for a disk
        passed = sum(ticks) - cls._all
        share = (idle - cls._idle) / max(1, passed)
        cls._idle = idle
        cls._all += passed
        found = {'cpu': 100.0 * min(1.0, max(0.0, share))}
        sizes = {}
        with open('/proc/meminfo') as file:
            for line in file:
                name, _, rest = line.partition(':')
                sizes[name] = int(rest.split()[0]) << 10
        found['memory'] = sizes['MemAvailable']
        found['memory_total'] = sizes['MemTotal']
        found['swap'] = sizes['SwapFree']
        return found


def availability(directory: str, soon: bool = False) -> dict:
    """Return the resources that are free now: `cpu` in percent, `memory`, `disk` and `swap` in
    bytes, and the totals `memory_total` and `disk_total`. A figure is None if it cannot be
    determined, such as all but those of the disk without psutil. Each is determined by itself, so
    that a failure does not hide the others. `soon` says that the caller waits: if possible, psutil
    is not imported then."""
    found: Dict[str, Optional[float]] = {}
    if soon and sys.platform == 'linux' and 'psutil' not in sys.modules:
        with contextlib.suppress(OSError, ValueError, KeyError):   # psutil may succeed
            if importlib.util.find_spec('psutil') is not None:
                found = ProcFiles.free()  # type: ignore[assignment]
    if not found:
        found['cpu'] = ask_psutil(lambda psutil: 100.0 - psutil.cpu_percent())
        found['memory'] = ask_psutil(lambda psutil: psutil.virtual_memory().available)
        found['memory_total'] = ask_psutil(lambda psutil: psutil.virtual_memory().total)
        found['swap'] = ask_psutil(lambda psutil: psutil.swap_memory().free)
    found['disk'] = None
    found['disk_total'] = None
    with contextlib.suppress(OSError):   # the directory was removed
        usage = shutil.disk_usage(directory)
        found['disk'] = usage.free
        found['disk_total'] = usage.total
    return found


def installed_version(package: str) -> str:
    """Return the version of a package without importing it; empty if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return ''
    if not spec.origin:
        return ''
    if not hasattr(spec.loader, 'get_data'):
        return ''
    # It may be in an archive
    source = spec.loader.get_data(spec.origin)  # type: ignore[union-attr]
    found = re.search(rb'^__version__ = ["\']([^"\']+)', source, re.MULTILINE)
    if found:
        return found.group(1).decode()
    return ''


# -- what is kept on the disk ----------------------------------------------------------------------

class ModuleStore:
    """Files of modules by their digests, so that each is sent only once to a node. The total size
    is kept below a limit."""

    def __init__(self, root: str) -> None:
        self._root = root

    def _path(self, digest: bytes) -> str:
        digits = digest.hex()
        return os.path.join(self._root, digits)

    def bring(self, root: str, rows: Sequence[Tuple[str, int, bytes, int]]) -> None:
        """Copy those of these files that are present below a computation's own directory. A damaged
        file is sent again."""
        for name, size, digest, mode in rows:
            target = os.path.join(root, *check_name(name))
            path = self._path(digest)
            try:
                if not os.path.lexists(target) and file_digest(path) == (size, digest):
                    directory = os.path.dirname(target)
                    os.makedirs(directory, mode=0o700, exist_ok=True)
                    shutil.copyfile(path, target)
                    os.chmod(target, mode & 0o755 | 0o600)
                    os.utime(path)
            except OSError:   # it is not here
                continue

    def keep(self, root: str, rows: Sequence[Tuple[str, int, bytes, int]]) -> None:
        """Keep copies of files that have come."""
        try:
            os.makedirs(self._root, mode=0o700, exist_ok=True)
            for name, size, digest, _ in rows:
                path = self._path(digest)
                if not size <= MODULES_KEPT // 4:
                    continue
                if not os.path.exists(path):
                    with replaced(path, '.new') as temporary:
                        shutil.copyfile(os.path.join(root, *check_name(name)), temporary)
            self._shorten()
        except OSError as exc:   # no room: they are sent again for the next computation
            logger.debug('files of modules are not kept: %s', exc)

    def _shorten(self) -> None:
        """Remove the files that have not been used for longest."""
        files = sorted(((entry.stat().st_mtime, entry.stat().st_size, entry.path)
                        for entry in os.scandir(self._root)),
                       reverse=True)
        total = 0
        for _, size, path in files:
            total += size
            if total > MODULES_KEPT:
                os.unlink(path)


class RecordLog:
    """The format of an append-only file: records, each preceded by the CRC-32 of its contents. A
    record has a header and pieces; the last numbers of the header are the sizes of the pieces. A
    truncated record at the end of the file was never reported as written and is ignored."""
    _CRC = struct.Struct('>I')

    def __init__(self, head: struct.Struct, pieces: int) -> None:
        self._head = head
        self._pieces = pieces

    def record(self, head: Buffer, pieces: Iterable[Buffer]) -> List[Buffer]:
        """Return a record in the format of the file; it must be written in one go, or not at
        all."""
        pieces = (head, *pieces)
        crc = self._crc_of(pieces)
        return [self._CRC.pack(crc), *pieces]

    def read(self, file: Any) -> Iterator[Tuple[tuple, List[bytes], int]]:
        """Yield records from the current position of a file on: (header without the sizes, pieces,
        size of the record in bytes). Stops before a truncated record."""
        first = self._CRC.size
        while True:
            head = file.read(first + self._head.size)
            if len(head) < first + self._head.size:
                return
            numbers = self._head.unpack_from(head, first)
            sizes = numbers[-self._pieces:]
            pieces = []
            for size in sizes:
                contents = file.read(size)
                pieces.append(contents)
            is_whole = all(len(piece) == size for piece, size in zip(pieces, sizes))
            crc = self._crc_of((memoryview(head)[first:], *pieces))
            if not is_whole:
                return
            if self._CRC.pack(crc) != head[:first]:
                return
            yield numbers[:-self._pieces], pieces, len(head) + sum(sizes)

    @staticmethod
    def _crc_of(pieces: Iterable[Buffer]) -> int:
        crc = 0
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
        return crc


class ResultSpool:
    """Results of one computation on the disk, while its client is away: a file with a header
    (magic, instance of the client) and with records as workers write them (see RecordLog)."""
    MAGIC = b'dispy5r\3'
    HEAD = len(MAGIC) + 16 + KEY_SIZE
    _LOG = RecordLog(_RECORD, 3)

    def __init__(self, path: str) -> None:
        self.path = path

    def append(self, owner: bytes, rows: Sequence[tuple], digest: bytes = bytes(KEY_SIZE)) -> None:
        """Append rows of Results; they are on the disk when this returns. Raises OSError or
        ValueError, and then nothing was appended: a file that was created for them is removed
        again, since nobody would remove it later."""
        with open(self.path, 'ab') as file:
            start = file.tell()
            try:
                if not start:
                    file.write(self.MAGIC + owner + digest)
                for row in rows:
                    head, *bodies = pack_record(RecordType.RESULT, row[OUTCOME], row[SERIAL],
                                                row[START], row[END], *row[PAYLOAD:])
                    file.writelines(self._LOG.record(head, bodies))
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):   # there is no room for buffered data either
                    file.close()
                if start:
                    os.truncate(self.path, start)
                else:
                    os.unlink(self.path)
                raise

    def age(self) -> float:
        """Return the seconds since the last results were added. Raises OSError."""
        status = os.stat(self.path)
        return time.time() - status.st_mtime

    def rows(self) -> Iterator[tuple]:
        """Yield the rows, up to the first truncated record."""
        return (row for row, _ in self._rows())

    def _rows(self) -> Iterator[Tuple[tuple, int]]:
        """Yield the rows, and the number of bytes of each in the file."""
        with open(self.path, 'rb') as file:
            file.seek(self.HEAD)
            contents = self._LOG.read(file)
            for (_, _, number, serial, start, end), bodies, size in contents:
                yield (serial, number, start, end, *bodies), size

    def scan(self) -> Tuple[bytes, bytes, List[int]]:
        """Return owner, digest of the key and serials, and remove a truncated end. Raises
        ValueError if the file has another format."""
        with open(self.path, 'rb') as file:
            head = file.read(self.HEAD)
        if len(head) < self.HEAD or not head.startswith(self.MAGIC):
            text = '%s holds no results' % self.path
            raise ValueError(text)
        size = len(head)
        serials = []
        for row, more in self._rows():
            size += more
            serials.append(row[SERIAL])
        os.truncate(self.path, size)
        return head[len(self.MAGIC):len(self.MAGIC) + 16], head[-KEY_SIZE:], serials

    def remove(self) -> None:
        """Remove the file: its results are not needed any more."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


class Memory:
    """What a node remembers of attempts that it does not hold any more: a file `g-NAME` for each
    computation in its directory, and a file `memory` that identifies this memory. A client that
    finds another identifier than before knows that attempts which this memory does not list may
    have begun. The identifier changes if the machine has stopped without the node (data that was
    not flushed to the disk is lost), or if something could not be written.
    """

    def __init__(self, directory: str, lasting: bool = True) -> None:
        """`lasting`: the memory is to outlive the machine. Raises OSError."""
        path = os.path.join(directory, 'memory')
        self._directory = directory
        self._path = path
        self._lasting = lasting
        self._known: Dict[str, AttemptHistory] = {}
        self.ident = ''
        try:
            with open(self._path) as file:
                contents = file.read()
                ident, boot, clean = contents.split(' ')
            if clean == 'clean' or boot == machine():
                self.ident = ident
        except (OSError, ValueError):
            logger.debug('this node begins to remember')
        self._torn = False
        self.ident = self.ident or os.urandom(16).hex()
        text = '%s %s open' % (self.ident, machine())
        self._write(self._path, text)

    def _write(self, path: str, text: str) -> None:
        with replaced(path) as temporary, open(temporary, 'w') as file:
            file.write(text)
            file.flush()
            if self._lasting:
                os.fsync(file.fileno())

    def _file(self, comp: str) -> str:
        return os.path.join(self._directory, 'g-' + comp)

    def begin(self, wrecks: Dict[str, Optional[FrozenSet[int]]]) -> Dict[str, AttemptHistory]:
        """Return what is known, by computation. The daemon calls this when it starts. `wrecks` are
        the computations of an earlier process that was killed, with their attempts that had begun,
        or None if nobody knows these. Raises OSError."""
        for name in os.listdir(self._directory):
            path = os.path.join(self._directory, name)
            is_part = name.endswith('.part')
            is_ours = _is_ours(name[:-len('.part')] if is_part else name, 'g-')
            if not is_ours:
                continue
            if is_part or time.time() - os.stat(path).st_mtime > PAST_TIME:
                os.unlink(path)
            else:
                self._known[name[2:]] = self.read(self._directory, name[2:])
        for comp, begun in wrecks.items():
            if begun is None:
                past = AttemptHistory(whole=False)
            else:
                past = AttemptHistory(lost=begun)
            merged = self._known.get(comp, AttemptHistory()).and_also(past)
            self.write(comp, merged)
        return self._known

    @staticmethod
    def read(directory: str, comp: str) -> AttemptHistory:
        """Return what was written of a computation. Raises OSError."""
        path = os.path.join(directory, 'g-' + comp)
        try:
            with open(path) as file:
                row = json.load(file)
            is_past = _is_past(tuple(row))
            if not is_past:
                raise ValueError('it has other contents')
            return AttemptHistory.of(row)
        except FileNotFoundError:
            return AttemptHistory()
        except (TypeError, ValueError) as exc:
            logger.warning('%s cannot be used: %s', path, exc)
            return AttemptHistory(whole=False)

    def write(self, comp: str, past: AttemptHistory) -> None:
        """Write what is known of a computation now."""
        try:
            if past == AttemptHistory():
                self._known.pop(comp, None)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._file(comp))
            else:
                self._known[comp] = past
                path = self._file(comp)
                text = json.dumps(past.row())
                self._write(path, text)
        except OSError as exc:
            logger.error('it cannot be recorded which results were discarded: %s', exc)
            self.tear()

    def tear(self) -> None:
        """Note that something is missing here: the next process begins another memory."""
        self._torn = True
        with contextlib.suppress(OSError):   # it is gone already
            os.unlink(self._path)

    def close(self) -> None:
        """Note that the node ends in good order."""
        if not self._torn:
            # A full disk has the same effect as the end of the machine
            with contextlib.suppress(OSError):
                text = '%s %s clean' % (self.ident, machine())
                self._write(self._path, text)


# -- resources beside CPUs -------------------------------------------------------------------------

class Offer(NamedTuple):
    """What a node offers besides CPUs: the number of units of each resource, the identifiers of its
    devices, and the environment variables in which libraries look up which devices they may use."""
    counts: Dict[str, int] = {}
    devices: Tuple[str, ...] = ()
    variables: Tuple[str, ...] = ()

    def variables_for(self, units: Dict[str, List[int]]) -> Dict[str, str]:
        """Return the environment variables of a worker that has these units."""
        if GPU not in units:
            return {}
        words = ','.join(self.devices[unit] for unit in units[GPU])
        return dict.fromkeys(self.variables, words)


class GpuSearch:
    """Finds the GPUs of this host. `environ` is the environment of this process; `output_of` runs a
    command and returns what it prints, or '' if there is no such command; `names_in` lists a
    directory."""
    CUDA = 'CUDA_VISIBLE_DEVICES'
    HIP = 'HIP_VISIBLE_DEVICES'   # for ROCm, whose libraries read the first one too
    KFD = '/sys/class/kfd/kfd/topology/nodes'

    def __init__(self, environ: Any = os.environ,
                 output_of: Optional[Callable[[List[str]], str]] = None,
                 names_in: Optional[Callable[[str], List[str]]] = None,
                 read: Optional[Callable[[str], str]] = None) -> None:
        self._environ = environ
        self._output_of = output_of or _output_of
        self._names_in = names_in or _names_in
        self._read = read or _text_of

    def visible(self) -> Optional[List[str]]:
        """Return the devices that this process may use according to its environment; None if the
        environment does not restrict them. As in CUDA, everything after the first word that is not
        a device is ignored."""
        for name in (self.CUDA, self.HIP):
            text = self._environ.get(name)
            if text is None:
                continue
            words = [word.strip() for word in text.split(',')]
            wrong = (word for word in words if not word or word.startswith('-'))
            end = next((words.index(word) for word in wrong), len(words))
            return words[:end]
        return None

    def variables(self) -> Tuple[str, ...]:
        """Return the variables that say which devices a job has."""
        if self.HIP in self._environ or self._of_rocm():
            return self.CUDA, self.HIP
        return (self.CUDA,)

    def all(self, quick: bool = False) -> List[str]:
        """Return the devices that `gpu=auto` finds; `quick` means without starting a process."""
        found = [] if quick else self._of_nvidia()
        if not found:
            names = [name for name in self._names_in('/dev') if re.fullmatch(r'nvidia\d+', name)]
            found = [str(number) for number in range(len(names))]
        found = found or self._of_rocm()
        visible = self.visible()
        if visible is None:
            return found
        # A word may be a number, or the beginning of an identifier that is not known here
        return visible[:len(found)]

    def _of_nvidia(self) -> List[str]:
        """Return the devices that nvidia-smi lists. A partitioned device is used by the identifiers
        of its partitions."""
        found: List[str] = []
        parts: Dict[str, List[str]] = {}
        for line in self._output_of(['nvidia-smi', '-L']).splitlines():
            device = re.match(r'GPU (\d+):', line)
            part = re.match(r'\s+MIG .*UUID: (MIG-[^)\s]+)\)', line)
            if device:
                found.append(device.group(1))
            elif part and found:
                parts.setdefault(found[-1], []).append(part.group(1))
        return [word for device in found for word in parts.get(device, [device])]

    def _of_rocm(self) -> List[str]:
        """Return the devices of AMD that the kernel lists; nodes with the number 0 are
        processors."""
        count = 0
        for name in self._names_in(self.KFD):
            number = self._read('%s/%s/gpu_id' % (self.KFD, name)).strip()
            count += number not in ('', '0')
        visible = self._environ.get('ROCR_VISIBLE_DEVICES')
        if visible is not None:   # devices are numbered among the visible ones
            words = [word for word in visible.split(',') if word.strip()]
            count = min(count, len(words))
        return [str(number) for number in range(count)]


def _output_of(command: List[str]) -> str:
    path = shutil.which(command[0])
    if path is None:
        return ''
    try:
        with process_start_lock:
            done = subprocess.run([path, *command[1:]], stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.SubprocessError) as exc:
        logger.warning('%s cannot be asked for devices: %s', path, exc)
        return ''
    return done.stdout.decode('utf-8', 'replace')


def _names_in(directory: str) -> List[str]:
    try:
        return os.listdir(directory)
    except OSError:   # there is none
        return []


def _text_of(path: str) -> str:
    try:
        with open(path, encoding='utf-8', errors='replace') as file:
            return file.read()
    except OSError:   # there is none
        return ''


def find_offer(words: Sequence[str], search: Optional[GpuSearch] = None,
               quick: bool = False) -> Offer:
    """Return the offer that NAME=N and gpu=auto describe; `quick` is as in GpuSearch.all. Raises
    ValueError."""
    search = search or GpuSearch()
    counts: Dict[str, int] = {}
    devices: List[str] = []
    for word in words:
        name, _, text = word.partition('=')
        is_auto = text == AUTO and name == GPU
        if not RESOURCE_NAME.fullmatch(name) or not (is_auto or re.fullmatch('[0-9]{1,6}', text)):
            message = ('--resource %.200s: it must be NAME=N, with a name of letters, digits, _, . '
                       'and - and a whole number, or gpu=auto' % word)
            raise ValueError(message)
        if name in NOT_RESOURCES:
            raise ValueError('--resource %.200s: CPUs are offered by --cpus, and memory is that of '
                             'the host' % word)
        if name in counts:
            raise ValueError('--resource %.200s: %s is given twice' % (word, name))
        if is_auto:
            devices = search.all(quick)
            counts[name] = len(devices)
            continue
        counts[name] = int(text)
        if counts[name] > UNITS_MOST:
            raise ValueError('--resource %s: there may be %d at most' % (word, UNITS_MOST))
        if name == GPU:
            devices = _numbered_devices(counts[name], search)
    counts = {name: count for name, count in counts.items() if count}
    return Offer(counts, tuple(devices), search.variables() if devices else ())


def _numbered_devices(count: int, search: GpuSearch) -> List[str]:
    """Return this many devices of this host. Raises ValueError if the environment leaves fewer."""
    visible = search.visible()
    if visible is None:
        return [str(number) for number in range(count)]
    if len(visible) < count:
        message = '--resource gpu=%d: CUDA_VISIBLE_DEVICES leaves %d of them: %s' % (
            count, len(visible), ','.join(visible) or 'none')
        raise ValueError(message)
    return visible[:count]


class Interpreter(NamedTuple):
    """Another Python interpreter on which jobs may run."""
    path: str
    version: Tuple[int, int, int]
    cloudpickle: str    # its version; '' if it is not installed there
    has_psutil: bool

    @property
    def fact(self) -> Dict[str, Any]:
        """Return what clients are told about the interpreter."""
        return {'python': self.version, 'cloudpickle': self.cloudpickle}


# The program that every version of Python can run, and that prints these facts
PROBE = '''
import importlib.util, json, sys
def version(name):
    try:
        return getattr(__import__(name), '__version__', '')
    except ImportError:
        return ''
print(json.dumps([sys.version_info[:3], version('cloudpickle'),
                  importlib.util.find_spec('psutil') is not None]))
'''


def find_interpreters(words: Sequence[str]) -> Dict[str, Interpreter]:
    """Return the interpreters that NAME=PATH options name, by their names. Each is started once.
    Raises ValueError."""
    found: Dict[str, Interpreter] = {}
    for word in words:
        name, _, path = word.partition('=')
        if not RESOURCE_NAME.fullmatch(name) or not path:
            raise ValueError('--python %.200s: it must be NAME=PATH, with a name of letters, '
                             'digits, _, . and - that begins with a letter' % word)
        if name in found:
            raise ValueError('--python %.200s: %s is given twice' % (word, name))
        if os.name != 'posix':
            raise ValueError('--python %.200s: nodes on this system run jobs on their own Python '
                             'alone' % word)
        found[name] = _probe(name, os.path.abspath(os.path.expanduser(path)))
    return found


def _probe(name: str, path: str) -> Interpreter:
    try:
        with process_start_lock:
            done = subprocess.run([path, '-c', PROBE], env=environment_for(path), timeout=60,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE)
        version, cloudpickle_version, has_psutil = json.loads(done.stdout.decode())
    except ValueError:   # something else was printed
        raise ValueError('--python %s=%s: it is not a Python, as it does not run programs in that '
                         'language' % (name, path)) from None
    except (OSError, subprocess.SubprocessError) as exc:
        text = '--python %s=%s: it cannot be started: %s' % (name, path, exc)
        raise ValueError(text) from None
    if tuple(version) < (3, 8):
        raise ValueError('--python %s=%s: it is Python %s, and dispy needs 3.8 or later' % (
            name, path, '.'.join(map(str, version))))
    interpreter = Interpreter(path, tuple(version), cloudpickle_version, has_psutil)
    if not has_psutil:
        _tell_without_psutil('--python %s=%s' % (name, path))
    return interpreter


def _tell_without_psutil(python: str) -> None:
    if sys.platform != 'linux':   # there /proc has it
        logger.warning('%s has no psutil, which limits the memory of jobs here (dispy_memory): '
                       'they are not limited', python)


def environment_for(python: str) -> Dict[str, str]:
    """Return the environment for starting another Python than this one, without the variables that
    would make it use the library of this one."""
    variables = dict(os.environ)
    for name in ('DISPY_SECRET', 'PYTHONHOME', '__PYVENV_LAUNCHER__'):
        variables.pop(name, None)
    return variables


def pythons_text(facts: Dict[str, Any]) -> str:
    """Return a text such as '3.11.2, lab (3.12.1)': the interpreters of a node, from its facts."""
    texts = ['.'.join(map(str, facts.get('python', ()))) or 'one']
    for name, fact in facts.get('pythons', {}).items():
        texts.append('%s (%s)' % (name, '.'.join(map(str, fact['python']))))
    return ', '.join(texts)


def whole_memory(given: Optional[int] = None) -> Optional[int]:
    """Return the bytes of memory that all jobs on this host can have together: those of the host,
    or the limit of the cgroup of this process, and at most the given number. Returns None if they
    cannot be determined."""
    sizes = []
    if given is not None:
        sizes.append(given)
    found = re.search(r'^MemTotal: *(\d+) kB', _text_of('/proc/meminfo'), re.MULTILINE)
    if found:
        sizes.append(int(found.group(1)) << 10)
    else:
        size = ask_psutil(lambda psutil: psutil.virtual_memory().total)
        if size is not None:
            sizes.append(size)
    most = re.fullmatch(r'(\d+)\s*', _text_of(own_cgroup() + 'memory.max'))   # or 'max'
    if most:
        sizes.append(int(most.group(1)))
    return min(sizes, default=None)


# -- the loop and its parts ------------------------------------------------------------------------

class Options(NamedTuple):
    """The settings of a node; there is one field for each option of the command line."""
    cpus: int
    hosts: Tuple[str, ...] = ('',)
    port: int = NODE_PORT
    name: str = ''
    prefix: str = ''
    secret: bytes = b''
    certfile: Optional[str] = None
    keyfile: Optional[str] = None
    clean: bool = False
    embedded: bool = False
    ext_hosts: Tuple[str, ...] = ()
    schedulers: Tuple[Tuple[str, int], ...] = ()    # to be dialled
    multicast: bool = False                         # IPv4 too
    reach: str = 'off'                              # of discovery
    ping_interval: Optional[float] = None           # s between announcements
    user: Optional[User] = None
    hours: Optional[Hours] = None
    serve: int = 0                         # leases after which the node ends; 0: no such number
    client_shutdown: bool = False
    max_file: int = sys.maxsize            # bytes
    zombie: float = ZOMBIE_TIME            # s
    msg_timeout: float = HANDSHAKE_TIME    # s
    force_cleanup: bool = False            # files of computations are removed, whatever clients say
    start_method: str = FORK               # of workers, for clients that do not specify it
    python: str = ''                       # the interpreter of the runners, if not sys.executable
    grace: float = GRACE                   # s that jobs have to end when the node is stopped
    offer: Offer = Offer()
    interpreters: Dict[str, Interpreter] = {}   # others that jobs may run on
    memory: Optional[int] = None           # bytes of memory for all jobs together


class ChildEnded(NamedTuple):
    """A child process has ended. This is posted if this process is PID 1, as in a container, where
    orphans of other processes become its children."""


class Digested(NamedTuple):
    """The digests of files that existed before are known. A thread posts this."""
    action: PrepareDirectory


class NodeDirectory:
    """The directory that a node has for itself: its mode is 0700, and its file `lock` is locked and
    names the process and its port. It contains what is known of past attempts, results whose
    clients are away, and the directories of computations."""

    def __init__(self, options: Options, instance: bytes,
                 taken: Callable[[Memory, Dict[str, AttemptHistory]], None]) -> None:
        """`taken` is called when the node has the directory, with what is known of attempts of
        computations of earlier nodes."""
        self._options = options
        self._instance = instance
        self._taken = taken
        self._port = 0
        self._lock_file: Any = None
        self.memory: Optional[Memory] = None
        # The directory of computations, and the one above it: they differ with --user
        self.root = self.base = ''

    def available(self) -> Dict[str, Any]:
        """Return the free resources of the machine, with the disk of the directory."""
        return availability(self.root, self._options.embedded)

    def take(self, port: int) -> None:
        """Create or take over the directory, and lock it. Raises StartError."""
        self._port = port
        user = self._options.user
        root = self._options.prefix or default_directory(port)
        try:
            self._take_base(root)
            self.memory = Memory(self.base, not self._options.embedded)
            if user is not None:
                self._check_reach(user)
                root = self._user_directory(root, user)
            self._taken(self.memory, self.memory.begin(self._wrecks(root)))
            self._remove_leftovers(root)
        except OSError as exc:
            text = 'the directory %s cannot be used%s: %s (--dest-path-prefix)' % (
                root, ' by ' + user.name if user else '', exc.strerror)
            raise StartError(text) from exc
        self.root = os.path.realpath(root)

    def _take_base(self, root: str) -> None:
        if self._options.user:
            mode = 0o711
        else:
            mode = 0o700
        if not self._options.prefix:
            above = os.path.dirname(root)
            self._take_above(above, mode)
        take_own_directory(root, NODE_MARK, ('lock', ) if _was_ours(root) else (),
                           '--dest-path-prefix', mode)
        lock_path = os.path.join(root, 'lock')
        self._lock_file = take_lock(lock_path, self._port, self._instance)
        self.base = os.path.realpath(root)
        if self._options.clean:
            for name in os.listdir(root):
                path = os.path.join(root, name)
                is_ours = _is_ours(name, 'r-', 'g-')
                if not (is_ours or name == 'memory'):
                    continue
                if os.path.isfile(path):
                    os.unlink(path)

    @staticmethod
    def _take_above(above: str, mode: int) -> None:
        os.makedirs(above, mode=0o700, exist_ok=True)
        status = os.lstat(above)
        if not stat.S_ISDIR(status.st_mode) or (hasattr(os, 'getuid')
                                                and status.st_uid != os.getuid()):
            raise StartError('%s is not a directory of this user (--dest-path-prefix)' % above)
        os.chmod(above, mode)

    @staticmethod
    def _wrecks(root: str) -> Dict[str, Optional[FrozenSet[int]]]:
        """Return the computations of a node that did not end in good order, and which of their
        attempts had begun; None for these if nobody knows."""
        wrecks: Dict[str, Optional[FrozenSet[int]]] = {}
        for name in os.listdir(root):
            is_ours = _is_ours(name, 'p-')
            if not is_ours:
                continue
            if not os.path.isdir(os.path.join(root, name)):
                continue
            try:
                wrecks[name[2:]] = Slots.read(os.path.join(root, name))
            except OSError as exc:
                logger.warning('what had begun cannot be read: %s', exc)
                wrecks[name[2:]] = None
        return wrecks

    def _remove_leftovers(self, root: str) -> None:
        with self.as_user():
            for name in os.listdir(root):
                path = os.path.join(root, name)
                if not (self._options.clean or _is_ours(name, 'c-', 'p-')):
                    continue
                if os.path.isdir(path):
                    shutil.rmtree(path, ignore_errors=True)

    def _check_reach(self, user: User) -> None:
        """Check that --user can read the installed files that run here; one file of each
        installation is tested. Raises StartError."""
        for path in (os.__file__, __file__):
            try:
                with self.as_user(), open(path, 'rb'):
                    pass
            except OSError as exc:
                text = ('--user %s cannot read %s: use a Python and a dispynode.py that '
                        'all can read' % (user.name, path))
                raise StartError(text) from exc

    @staticmethod
    def _user_directory(root: str, user: User) -> str:
        """Make the directory of --user inside the node's directory. The latter remains that of
        root, so that nothing that a job creates can obstruct the lock."""
        root = os.path.join(root, 'user-' + user.name)
        with contextlib.suppress(FileExistsError):
            os.mkdir(root, 0o700)
        os.chown(root, user.uid, user.gid, follow_symlinks=False)
        return root

    @contextlib.contextmanager
    def as_user(self) -> Any:
        """Handle files with the rights of --user alone, because jobs may have created links
        there."""
        user = self._options.user
        if user is None:
            yield
            return
        os.setegid(user.gid)
        os.seteuid(user.uid)
        try:
            yield
        finally:
            os.seteuid(os.getuid())
            os.setegid(os.getgid())

    def ensure(self) -> None:
        """Create the node's directory again if it has disappeared, as when a program has cleaned
        /tmp. Raises StartError or OSError."""
        if os.path.isdir(self.root):
            return
        logger.error('the directory %s has disappeared and is created again', self.root)
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None
        self.take(self._port)

    # -- what stands in it -------------------------------------------------------------------------

    def path_of_modules(self) -> str:
        """The directory in which files of modules are kept for other computations."""
        return os.path.join(self.root, 'p-.modules')

    def ask_for_notes(self, comp: str, path: str) -> None:
        """Have the runner of a computation write to this path which attempts have begun, if this
        process ends without telling the runner to end. Raises OSError."""
        with open(os.path.join(self.private_of(comp), NOTES_ASKED), 'w') as file:
            file.write(path)

    def private_of(self, comp: str) -> str:
        """Return the directory for those files of a computation that its jobs do not use."""
        return os.path.join(self.root, 'p-' + comp)

    def working_directory(self, comp: str, dest_path: str, keep: bool) -> str:
        """Return the directory in which jobs of a computation run. Raises ValueError."""
        if not dest_path:
            return os.path.join(self.root, ('k-' if keep else 'c-') + comp)
        parts = check_name(dest_path)
        is_ours = _is_ours(parts[0], 'c-', 'p-', 'k-', 'r-', 'g-')
        if is_ours or parts[0] in KEEPING_FILES or parts[0].startswith('user-'):
            raise ValueError(
                'dest_path %.100r begins as names of the node itself do; choose another' %
                dest_path)
        return os.path.join(self.root, *parts)

    def spool(self, comp: str) -> ResultSpool:
        """Return the file for results of a computation whose client is away."""
        path = os.path.join(self.base, 'r-' + comp)
        return ResultSpool(path)

    def spooled(self) -> List[str]:
        """Return the computations that have such a file."""
        return [
            name[2:] for name in sorted(os.listdir(self.base))
            if _is_ours(name, 'r-') and os.path.isfile(os.path.join(self.base, name))
        ]

    def remember(self, action: Remember) -> None:
        """Write what is known of attempts that are not held any more."""
        if self.memory is not None:
            self.memory.write(action.comp, action.past)

    def tear_memory(self) -> None:
        """Note that not all is known of earlier attempts here."""
        if self.memory is not None:
            self.memory.tear()

    def after_fork(self) -> None:
        """Forget the directory in a forked child: it belongs to the parent."""
        if self._lock_file is not None:
            self._lock_file.close()

    def close(self) -> None:
        """Remove temporary files and release the lock. Does nothing the second time."""
        if self.memory is not None:
            self.memory.close()
            self.memory = None
        if self._lock_file is None:
            return
        self._lock_file.close()
        self._lock_file = None
        with self.as_user():
            path = self.path_of_modules()
            shutil.rmtree(path, ignore_errors=True)
        if self._options.embedded:
            shutil.rmtree(self.root, ignore_errors=True)
        elif self._options.user is not None:
            with contextlib.suppress(OSError):   # not empty: a cluster wanted its files kept
                os.rmdir(self.root)


def is_abandoned(root: str, tries: int = 1) -> bool:
    """Return whether this is the directory of a node that was embedded in a program which has
    ended. The program holds the lock of the directory as long as it lives."""
    for left in reversed(range(tries)):
        try:
            path = os.path.join(root, 'lock')
            with open_regular(path) as file:
                _try_lock(file, True)
                contents = file.read(100)
                return bool(re.match(br'PID \d+, port 0\n', contents))
        except OSError:
            if not left:
                return False
            time.sleep(0.02)   # the program is about to end
    return False


def remove_abandoned_directory(root: str, private: str = '', tries: int = 1) -> None:
    """Remove files from the directory of a node that was embedded in a program, if the program has
    ended: `private`, which was a computation's, and the whole directory if that was the last
    one."""
    if not is_abandoned(root, tries):
        return
    if private:
        shutil.rmtree(private, ignore_errors=True)
    with contextlib.suppress(OSError):   # another runner was faster
        if not any(_is_ours(name, 'p-') for name in os.listdir(root)) or not private:
            shutil.rmtree(root, ignore_errors=True)


class ComputationDirectory:
    """The directories of one computation, and the files that arrive for it."""

    def __init__(self, comp: str, directory: str, private: str, keep: bool, max_file: int) -> None:
        self.comp = comp
        self.directory = directory
        self.private = private
        self.keep = keep
        roots = {
            Purpose.DEPENDS: directory, Purpose.PLACED: directory, Purpose.MODULES: private,
            Purpose.VALUES: values_in(private)
        }
        self.receiver = FileReceiver(roots, max_file, scratch=private)
        self.fetched: list = []                      # rows of files that are being transferred


class ComputationFiles:
    """The files of computations: this class makes their directories, determines which files are
    missing, and stores those that arrive. The loop's thread uses it."""

    def __init__(self, host: 'NodeHost', directory: NodeDirectory, options: Options) -> None:
        self._host = host
        self._directory = directory
        self._options = options
        self._known: Dict[str, ComputationDirectory] = {}
        self._digesting: Set[str] = set()   # computations whose files are being compared
        self._modules: Optional[ModuleStore] = None
        # Directories that could not be removed: when that is tried again, and the delay after it
        self.remains: Dict[str, Tuple[float, float]] = {}

    def start(self) -> None:
        """Begin, because the node's directory exists."""
        root = self._directory.path_of_modules()
        self._modules = ModuleStore(root)

    def of(self, comp: str) -> ComputationDirectory:
        """Return the directories of a computation that was prepared."""
        return self._known[comp]

    def prepare(self, action: PrepareDirectory) -> None:
        """Make the directories of a computation and post which of its files are missing."""
        spec = action.spec
        comp = action.comp
        keep = not spec['cleanup'] and not self._options.force_cleanup
        try:
            if not comp or not is_comp(comp):
                raise ValueError('a computation may not be called %.70r' % comp)
            self._directory.ensure()
            private = self._directory.private_of(comp)
            directory = self._directory.working_directory(comp, spec['dest_path'], keep)
            # A thread cannot have rights of its own
            if self._options.user is None:
                unknown = Digests.unknown(directory, spec['files'])
            else:
                unknown = []
            if unknown and comp not in self._digesting:
                self._digest(action, unknown)
                return
            self._digesting.discard(comp)
            with self._directory.as_user():
                # It is noted before it is made, so that it is removed if something fails
                files = self._known[comp] = ComputationDirectory(comp, directory, private, keep,
                                                                 self._options.max_file)
                for path in (directory, private):
                    self.remains.pop(path, None)
                    os.makedirs(path, mode=0o700, exist_ok=True)
                missing = files.receiver.want(Purpose.DEPENDS, spec['files'])
                missing += self._want_modules(files, spec['modules'])
        except (OSError, ValueError, StartError) as exc:
            error = 'files cannot be stored: %s' % exc
            reason = reason_of(exc)
            answer = DirectoryReady(comp, [], error, reason)
            self._host.post(answer)
        else:
            event = DirectoryReady(comp, missing)
            self._host.post(event)

    def _digest(self, action: PrepareDirectory, paths: Sequence[str]) -> None:
        """Compute the digests of large files that existed before in a thread, to find out whether
        they are the same."""
        def work() -> None:
            Digests.learn(paths)
            event = Digested(action)
            self._host.post(event)
        self._digesting.add(action.comp)
        thread = threading.Thread(target=work, name='dispy-digest', daemon=True)
        thread.start()

    def on_digested(self, event: Digested) -> None:
        """Go on, because the digests of files that existed before are known."""
        action = event.action
        if self._host.node.is_preparing(action.comp):
            self.prepare(action)
        else:
            self._digesting.discard(action.comp)

    def _want_modules(self, files: ComputationDirectory, rows: list) -> list:
        """Return the Need rows for the files of modules that are missing; those that came for other
        computations are copied."""
        assert self._modules is not None   # ours
        files.fetched = rows
        self._modules.bring(files.private, rows)
        return files.receiver.want(Purpose.MODULES, rows)

    def fetch(self, action: Fetch) -> None:
        """Post which of these files of modules are missing."""
        comp = action.comp
        try:
            with self._directory.as_user():
                missing = self._want_modules(self._known[comp], action.rows)
        except (OSError, ValueError) as exc:
            error = 'files cannot be stored: %s' % exc
            answer = Fetched(comp, [], error)
            self._host.post(answer)
        else:
            event = Fetched(comp, missing)
            self._host.post(event)

    def fetch_value(self, action: FetchValue) -> None:
        """Post whether a value is missing."""
        digest = action.digest
        files = self._known.get(action.comp)
        if files is None:   # the computation has ended
            return
        missing: list = []
        if action.size > VALUE_MOST:
            error = limit_text('on this node')
        else:
            error = ''
        try:
            with self._directory.as_user():
                os.makedirs(values_in(files.private), mode=0o700, exist_ok=True)
                if not error:
                    digits = digest.hex()
                    row = (digits, action.size, digest, 0o400)
                    missing = files.receiver.want(Purpose.VALUES, [row])
        except (OSError, ValueError) as exc:
            error = str(exc)
        event = ValueSought(action.comp, digest, missing, error)
        self._host.post(event)

    def drop_value(self, action: DropValue) -> None:
        """Remove a value that nobody needs."""
        files = self._known.get(action.comp)
        if files is not None:
            # It does not exist any more
            with self._directory.as_user(), contextlib.suppress(OSError):
                path = os.path.join(values_in(files.private), action.digest.hex())
                os.unlink(path)

    def want_again(self, action: WantAgain) -> None:
        """Post which files are still missing, because the link on which they came has ended."""
        files = self._known.get(action.comp)
        if files is not None:
            with self._directory.as_user():
                missing = files.receiver.again()
                event = Wanted(action.comp, missing)
                self._host.post(event)

    def store(self, action: WriteFile) -> None:
        """Write a piece of a file."""
        assert self._modules is not None   # ours
        files = self._known[action.piece.comp]
        with self._directory.as_user():
            file = files.receiver.take(action.piece)
            if file is None:
                return
            whole = not file.error and not files.receiver.wants(Purpose.MODULES)
            if file.purpose == Purpose.MODULES and whole:
                self._modules.keep(files.private, files.fetched)
        event = FileWritten(file, not files.receiver.wants(*FOR_CODE), files.receiver.code)
        self._host.post(event)

    def note_overrun(self, action: NoteOverrun) -> None:
        """Note that the notes of which attempts have begun do not reach back far enough."""
        files = self._known.get(action.comp)
        if files is not None:
            try:
                with self._directory.as_user():
                    Slots.mark_unknown(files.private)
            except OSError as exc:
                logger.error('it cannot be recorded that it is not fully known what has begun: '
                             '%s', exc)
                self._directory.tear_memory()

    def discard(self, comp: str) -> None:
        """Remove the directories of a computation, except one that is to be kept."""
        files = self._known.pop(comp, None)
        if files is None:
            return
        with self._directory.as_user():
            files.receiver.abort()
        self._remove(files.private, WORKER_RETRY_DELAY)
        if not files.keep:
            self._remove(files.directory, WORKER_RETRY_DELAY)

    def _remove(self, path: str, delay: float) -> None:
        """Remove a directory. What cannot be removed now, for example because no descriptor is
        left, is removed later."""
        with self._directory.as_user():
            shutil.rmtree(path, ignore_errors=True)
        if os.path.lexists(path):
            self.remains[path] = (self._host.now + delay, min(2 * delay, REMOVAL_DELAY_MOST))

    def remove_again(self) -> None:
        """Remove what could not be removed earlier."""
        for path, (when, delay) in list(self.remains.items()):
            if self._host.now >= when:
                del self.remains[path]
                self._remove(path, delay)

    def close(self) -> None:
        """Remove the directories of all computations."""
        for comp in list(self._known):
            self.discard(comp)


class ResultStore:
    """Results on the disk, whose clients are away or have come back, and results that their clients
    could not use. The loop's thread uses this class."""

    def __init__(self, host: 'NodeHost', directory: NodeDirectory, zombie: float) -> None:
        self._host = host
        self._directory = directory
        self._zombie = zombie
        self._unkept: Set[str] = set()    # computations with results that could not be kept
        # Results that their clients could not use, and why
        self.refused: Dict[Tuple[str, int], str] = {}
        self.sender = SpoolSender(host.links)
        # Links and computations of kept results that could not be read, and when to read them again
        self.read_later: Dict[Tuple[int, str], float] = {}

    def find_kept(self) -> None:
        """Find the results that earlier daemons have kept. The daemon calls this when it starts."""
        for comp in self._directory.spooled():
            spool = self._directory.spool(comp)
            try:
                owner, digest, serials = spool.scan()
                if not serials:
                    text = '%s is empty' % spool.path
                    raise ValueError(text)
                left = self._zombie - spool.age()
                until = self._host.now + max(0.0, left)
                event = SpoolFound(comp, owner, serials, until, digest)
                self._host.tell(event)
                logger.info('%d results of an earlier computation wait for their client',
                            len(serials))
            except (OSError, ValueError) as exc:
                logger.warning('results of an earlier computation cannot be used: %s', exc)
                spool.remove()

    def keep(self, action: SpoolResults) -> None:
        """Write results to the disk."""
        comp = action.comp
        try:
            self._directory.ensure()
            self._directory.spool(comp).append(action.owner, action.rows, action.digest)
        except (OSError, ValueError, StartError) as exc:
            self._unkept.add(comp)
            error = str(exc)
            event = ResultsSpooled(comp, [], error)
            self._host.post(event)
        else:
            self._unkept.discard(comp)
            serials = []
            for row in action.rows:
                serials.append(row[SERIAL])
            self._host.tell(ResultsSpooled(comp, serials))

    def forget(self, action: Forget) -> None:
        """Remove the results of a computation."""
        comp = action.comp
        self._unkept.discard(comp)
        self.sender.drop(comp)
        self.refused = {key: text for key, text in self.refused.items() if key[0] != comp}
        self._directory.spool(comp).remove()

    def usable(self, comp: str, row: tuple) -> tuple:
        """Return a row of Results, or the replacement for a result that its client could not
        use."""
        text = self.refused.get((comp, row[SERIAL]))
        if text is None:
            return row
        return refused_row(row, text)

    def send_kept(self, action: SendSpooled) -> None:
        """Send results from the disk, as the link has room for them."""
        kept_rows = self._kept_rows(action.link, action.comp)
        self.sender.add_results(action.link, action.comp, kept_rows)

    def _kept_rows(self, link: int, comp: str) -> Iterator[tuple]:
        """Yield results from the disk. Those that are missing are lost, which is reported to their
        client; if no descriptor is left to read them, they are read later."""
        missing = set(self._host.node.results.spooled_serials(comp))
        text = 'the file ends before it'
        try:
            for row in self._directory.spool(comp).rows():
                missing.discard(row[SERIAL])
                yield self.usable(comp, row)
        except FileNotFoundError as exc:
            text = str(exc)
        except OSError as exc:
            logger.error('results that were kept on the disk cannot be read now: %s', exc)
            self.read_later[link, comp] = self._host.now + WORKER_RETRY_DELAY
            return
        for serial in sorted(missing):
            yield (serial, int(Outcome.DIED), 0.0, 0.0,
                   ('its result was kept on the node and cannot be read: %s' % text).encode(
                       'utf-8', 'replace'), b'', b'')

    def read_again(self) -> None:
        """Read the results that could not be read earlier."""
        for (link, comp), when in list(self.read_later.items()):
            if self._host.now >= when:
                del self.read_later[link, comp]
                if link in self._host.links:
                    kept_rows = self._kept_rows(link, comp)
                    self.sender.add_results(link, comp, kept_rows)

    def close(self) -> None:
        """Note that results which could not be written are lost, so that this is known later."""
        if self._unkept:
            self._directory.tear_memory()


# The lock is held while a thread starts a process. Popen reads a pipe to its end, which a child
# that is forked in the meantime, such as one of a multiprocessing.Pool, would hold open as long as
# it lives.
process_start_lock = threading.Lock()
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(before=process_start_lock.acquire,
                        after_in_parent=process_start_lock.release,
                        after_in_child=process_start_lock.release)


# Code for `python -c` that imports this module from a place in sys.path. What is imported stays:
# the garbage collector need not look through it meanwhile (3 ms), nor later.
IMPORT_NODE = ('import gc, sys; gc.disable(); sys.path%s = %r; import dispynode; gc.freeze(); '
               'gc.enable(); ')


class RunnerProcess:
    """The process of a runner. The loop's thread uses this class.

    The process is started with `subprocess`: `multiprocessing` would run a program's main module
    again, and share its resource tracker. The process inherits no descriptor but its own, and has a
    session of its own. On Windows it has a console of its own, without a window, which workers and
    programs share: a Ctrl-C that is typed for the node does not reach them, and the node can ask
    programs to end.
    """
    CODE = IMPORT_NODE + 'dispynode.runner_start(%d)'

    def __init__(self, control: socket.socket, user: Optional[User], python: str,
                 home: str = '') -> None:
        """`control`: the runner's end of the socket; `python`: the interpreter, if it is not this
        one; `home`: a directory with this module, for an interpreter that has its own library and
        packages. Raises OSError."""
        self._home = home
        self._popen: Any = self._start(control, user, python or sys.executable)
        self.pid: int = self._popen.pid

    def _start(self, control: socket.socket, user: Optional[User], python: str) -> Any:
        places = []
        for entry in sys.path:
            if isinstance(entry, str):
                places.append(entry)
        here = os.path.abspath(__file__)
        home = os.path.dirname(here)
        if home not in places:
            places.append(home)
        where = '[:]'
        variables = dict(os.environ)
        variables.pop('DISPY_SECRET', None)
        if self._home:   # after the paths that it finds by itself
            where = '[len(sys.path):]'
            places = [self._home]
            variables = environment_for(python)
        if user is not None:
            variables[RUNNER_USER] = json.dumps(user)
        flags: List[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        if IS_WINDOWS:
            words = [*flags, '-c', self.CODE % (where, places, -1)]
            return self._start_on_windows(control, python, words, variables)
        with contextlib.ExitStack() as opened:
            error = None
            try:
                os.fstat(2)
            except OSError:   # closed: its number must not be used for another descriptor
                error = opened.enter_context(open(os.devnull, 'w'))
            with process_start_lock:
                return subprocess.Popen(
                    [python, *flags, '-c', self.CODE % (where, places, control.fileno())],
                    env=variables,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=error,
                    pass_fds=(control.fileno(),), start_new_session=True)

    @staticmethod
    def _start_on_windows(control: socket.socket, python: str, words: Sequence[str],
                          variables: Dict[str, str]) -> Any:
        """Start the process on Windows. A socket is prepared for one process there, whose PID must
        be known: therefore the socket is sent through stdin. The Python of a virtual environment
        starts another one, which would have a PID of its own: that one is started directly, as
        multiprocessing does it."""
        base = getattr(sys, '_base_executable', python)
        if python == sys.executable and python != base:
            variables['__PYVENV_LAUNCHER__'] = python
            python = base
        no_window = getattr(subprocess, 'CREATE_NO_WINDOW', 0)
        error = None
        try:
            os.fstat(2)
        except OSError:   # it is closed, as in a program without a console
            error = subprocess.DEVNULL
        with process_start_lock:
            process = subprocess.Popen([python, *words], env=variables, stdin=subprocess.PIPE,
                                       stdout=subprocess.DEVNULL, stderr=error,
                                       creationflags=no_window)
        assert process.stdin is not None   # ours: it is a pipe
        with process.stdin as pipe:
            shared = control.share(process.pid)  # type: ignore[attr-defined]
            pipe.write(shared)
        return process

    @property
    def exitcode(self) -> Optional[int]:
        """The exit status, or None while the process runs. It is 0 if the program has others wait
        for its children, so that the status cannot be determined."""
        return self._popen.poll()  # type: ignore[no-any-return]

    def terminate(self) -> None:
        """Send the process a request to end."""
        self._popen.terminate()

    def kill(self) -> None:
        """Kill the process."""
        self._popen.kill()

    def join(self, seconds: float) -> None:
        """Wait for the end of the process."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)

    def forget(self) -> None:
        """Forget the process in a forked child, which is not its parent."""
        self._popen.returncode = 0


class RunnerWatch:
    """Finds out whether a runner lives and answers. Its process is watched, because other processes
    may hold its socket: a child that setup has forked in C, for example. While the runner has jobs,
    it is asked for a sign of life. The loop's thread uses this class."""
    # Seconds between checks of a runner that is about to end; of one that can only be polled
    SOON = 0.02
    OFTEN = 1.0

    def __init__(self, host: 'NodeHost', pid: int, ended: Callable[[], None]) -> None:
        self._host = host
        self._handle = -1
        self.look_at: Optional[float] = None     # when to check the process
        self.killed_at: Optional[float] = None
        self.shall_ask = False
        self._ask_at: Optional[float] = None     # when to ask next
        self._asked_at: Optional[float] = None   # time of the question that was not answered
        try:
            self._handle = os.pidfd_open(pid)  # type: ignore[attr-defined]
            host.add_reader(self._handle, ended)
        except (AttributeError, OSError):   # Python 3.8, another system, or no descriptors
            self.look_at = host.now + self.OFTEN

    def next_look(self, now: float) -> Optional[float]:
        """Return when to look again."""
        if self._handle < 0:
            return now + self.OFTEN
        return None

    def answered(self) -> None:
        """Note that the runner has sent something."""
        self._asked_at = None

    def is_silent(self, now: float, busy: bool) -> bool:
        """Return whether the runner has not answered for too long. Sets `shall_ask`. If this
        process itself was stopped in the meantime, the runner has as much time as before."""
        self.shall_ask = False
        if not busy or self.killed_at is not None:
            self._ask_at = self._asked_at = None
            return False
        if self._ask_at is None:
            self._ask_at = now + RUNNER_ASKED
        if now < self._ask_at:
            return False
        if self._asked_at is not None:
            if now - self._ask_at > RUNNER_ASKED:
                self._asked_at += now - self._ask_at
        self._ask_at = now + RUNNER_ASKED
        if self._asked_at is None:
            self._asked_at = now
            self.shall_ask = True
        return now - self._asked_at >= RUNNER_SILENT

    def is_undead(self, now: float) -> bool:
        """Return whether the runner was killed and will not end soon."""
        if self.killed_at is None:
            return False
        return now >= self.killed_at + GRACE

    def times(self) -> Tuple[Optional[float], ...]:
        """Return the times at which something is to be done."""
        undead_at = None
        if self.killed_at is not None:
            undead_at = self.killed_at + GRACE
        return self._ask_at, self.look_at, undead_at

    def after_fork(self) -> None:
        """Forget the watch in a forked child: it belongs to the parent."""
        if self._handle >= 0:
            os.close(self._handle)

    def close(self) -> None:
        """Stop watching."""
        if self._handle >= 0:
            self._host.remove_reader(self._handle)
            os.close(self._handle)
            self._handle = -1


class ComputationProcesses:
    """The runner and the workers of one computation, and the pipes to them."""

    def __init__(self, files: ComputationDirectory) -> None:
        self.files = files
        self.comp = files.comp
        self.process: Any = None
        self.tree: Optional[ProcessTree] = None
        self.passed: Dict[int, socket.socket] = {}     # worker -> its pipe, until the runner has it
        self.start_method = FORK
        self.control: Optional[Pipe] = None
        self.up = False
        self.closing = False
        self.unloadable = False
        self.text = ''
        self.pipes: Dict[int, Pipe] = {}
        self.pids: Dict[int, Tuple[int, str]] = {}   # worker -> number and start of its process
        self.nonsense: Dict[int, str] = {}             # worker -> the error in what it sent
        self.equipped: Set[int] = set()                # workers that have resources
        # Another Python that runs it, and a directory in which that finds this module
        self.python = ''
        self.home = ''
        self.kill_at: Optional[float] = None
        self.watch: Optional[RunnerWatch] = None

    def use_python(self, interpreter: Interpreter) -> None:
        """Have another Python run it, which imports nothing of this one's except this module.
        Raises OSError."""
        self.python = interpreter.path
        self.home = os.path.join(self.files.private, 'node')
        os.makedirs(self.home, exist_ok=True)
        place = os.path.join(self.home, 'dispynode.py')
        if not os.path.lexists(place):
            link_to(os.path.abspath(__file__), place)

    def start(self, host: 'NodeHost') -> None:
        """Start the runner. Raises OSError."""
        ours, theirs = socket_pair()
        try:
            self.process = RunnerProcess(theirs, host.options.user,
                                         self.python or host.options.python, self.home)
            self.tree = tree_of(self.process.pid)
        except OSError:
            ours.close()
            if self.process is not None:
                self.process.kill()
            raise
        finally:
            theirs.close()
        self.control = Pipe(ours, self.comp)
        host.attach(self.control)

    def initialize(self, spec: dict, host: 'NodeHost', address: str) -> None:
        """Tell the runner what to load."""
        names = {
            'dispy_node_name': host.node.name, 'dispy_node_ip_addr': address,
            'dispy_job_path': self.files.directory}
        root = ''
        if host.options.embedded:
            root = host.directory.root
        init = dict(self.spec_for_runner(spec, host.options, names), root=root)
        self.control.push(  # type: ignore[union-attr]
            pack_record(RecordType.INIT, 0, 0, 0.0, 0.0, pickle.dumps(init), spec['code']))

    def after_fork(self) -> None:
        """Release the processes in a forked child: they belong to the parent."""
        for pipe in (self.control, *self.pipes.values()):
            if pipe is not None:
                pipe.close()
        if self.watch is not None:
            self.watch.after_fork()
        if self.process is not None:
            self.process.forget()

    def spec_for_runner(self, spec: dict, options: 'Options', names: Dict[str, str]) -> dict:
        """Return what the runner, and a worker that loads the computation itself, must know.
        `names` need no import in jobs."""
        given = ('name', 'sys_path', 'argv', 'kind', 'program', 'live', 'logs', 'cleanup')
        found = {name: spec[name] for name in given}
        authkey = bytes(spec.get('authkey', b''))
        bundles = any(row[0] == BUNDLES + BUNDLE % 0 for row in spec['modules'])
        support = {name: bytes(source) for name, source in spec['support'].items()}
        setup_args = bytes(spec['setup_args'])
        found.update(authkey=authkey,
                     setup_args=setup_args,
                     bundles=bundles,
                     support=support,
                     directory=self.files.directory,
                     private=self.files.private,
                     names=names,
                     max_file=options.max_file,
                     max_value=VALUE_MOST,
                     start_method=self.start_method,
                     client_shutdown=options.client_shutdown)
        return found

    def equip(self, worker: int, variables: Dict[str, str]) -> None:
        """Give the worker that will be started next resources, and these variables in its
        environment."""
        self.equipped.add(worker)
        if self.control is not None:
            data = json.dumps(variables).encode()
            self.control.push(pack_record(RecordType.EQUIP, worker, first=data))

    def pass_pipe(self, worker: int, theirs: socket.socket) -> None:
        """Pass the runner the pipe of a worker that it is to start. Raises OSError."""
        assert self.control is not None   # ours: the state starts workers of runners that are up
        data, passing = pack_socket(theirs, self.process.pid, RecordType.FORK, worker)
        if LATE_PASSING:
            self.passed[worker] = theirs.dup()
        self.control.push([data], passing)
        if passing is None:
            theirs.close()

    def arrived(self, worker: int) -> None:
        """Note that the runner has taken the pipe of a worker, or never will."""
        if worker in self.passed:
            self.passed.pop(worker).close()

    def known(self, worker: int, pid: int) -> None:
        """Return a worker's process. Its PID comes from the kernel and is never what the worker
        says."""
        if pid > 1:
            self.pids[worker] = (pid, start_of(pid))

    def kill(self, worker: int) -> None:
        """Kill a worker's process and its group, unless the PID belongs to another process by
        now."""
        pid, start = self.pids.get(worker, (0, ''))
        if not pid:
            return
        if start_of(pid) != start:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, 'killpg'):
                os.killpg(pid, SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, SIGKILL)

    def kill_workers(self) -> None:
        """Kill workers whose runner has died. On Linux the kernel has killed them; this is for the
        rest of their groups, and for that of a runner that was killed in a setup that hung."""
        if self.tree is not None:
            self.tree.close()
        elif hasattr(os, 'killpg'):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, SIGKILL)
            for worker in list(self.pids):
                self.kill(worker)

    def times(self) -> Tuple[Optional[float], ...]:
        """Return the times at which something is to be done."""
        return (self.kill_at, *(self.watch.times() if self.watch is not None else ()))


class HeldPipes:
    """Pipes of workers that are not read for a while, because files or results come faster than the
    client takes them. The loop's thread uses this class.
    """

    def __init__(self, host: 'NodeHost') -> None:
        self._host = host
        self.pipes: Set[Pipe] = set()

    def hold_back(self, pipe: Pipe) -> None:
        """Stop reading a worker's pipe for a while, because files or results come faster than the
        client takes them."""
        if not pipe.is_attached:
            return
        for link in self._host.links.values():
            if link.queued > BACKPRESSURE_BYTES:
                break
        else:
            return
        if not self._must_wait(pipe, BACKPRESSURE_BYTES):
            return
        pipe.paused = True
        self.pipes.add(pipe)
        self._host.interest(pipe)

    def _must_wait(self, pipe: Pipe, most: int) -> bool:
        """Return whether more than so much waits on a link. A large result that is being sent holds
        back other large ones, of which memory should hold no two, and does not hold back small
        ones."""
        for link in self._host.links.values():
            if link.queued - link.unmade > most:
                return True
            if link.unmade and pipe.is_large:
                return True
        return False

    def let_go(self) -> None:
        """Read those pipes again for which links have room."""
        for pipe in [
                pipe for pipe in self.pipes if not self._must_wait(pipe, BACKPRESSURE_BYTES // 2)
        ]:
            pipe.paused = False
            self._host.interest(pipe)
            self.pipes.remove(pipe)

    def may_let_go(self) -> bool:
        """Return whether any pipe is held back."""
        for pipe in self.pipes:
            if not self._must_wait(pipe, BACKPRESSURE_BYTES // 2):
                return True
        return False


class WorkerReader:
    """Reads what workers send, and reports it to the node. The loop's thread uses this class."""

    def __init__(self, host: 'NodeHost') -> None:
        self._host = host
        self.held = HeldPipes(host)

    def read(self, run: ComputationProcesses, pipe: Pipe) -> int:
        """Report to the node what has come. Returns the number of records. Raises LinkBroken,
        PeerError or OSError."""
        rows = []
        units = pipe.read(self._host.loop.now)
        if pipe.pid and pipe.worker not in run.pids:
            run.known(pipe.worker, pipe.pid)
        for head, body in units:
            if head[0] == _RESULT:
                row = _row_of(pipe, head, body)
                rows.append(row)
                continue
            if rows:   # what the next job sends comes after earlier results
                event = WorkerResults(pipe.worker, rows)
                self._host.tell(event)
                rows = []
            record = pipe.record_of(head, body)
            self._from_job(pipe, record)
        if rows:
            self._host.tell(WorkerResults(pipe.worker, rows))
            self.held.hold_back(pipe)
        elif pipe.is_large:
            self.held.hold_back(pipe)
        return len(units)

    def _from_job(self, pipe: Pipe, record: Record) -> None:
        """Handle what a worker sends that is not a result."""
        serial = record.serial
        bodies = record.bodies
        if record.kind == RecordType.LOGGED:
            log_record_of(bodies[0])
            data = bytes(bodies[0])
            self._host.tell(WorkerPrinted(pipe.worker, serial, 0, 0, data))
        elif record.kind == RecordType.FILE:
            row = open_envelope(bodies[0])
            if not _is_file(row):
                raise PeerError('a malformed description of a file')
            if not is_serial(serial):
                raise PeerError('a file of an unknown job')
            offset = record.number * FILE_PIECE
            purpose = int(Purpose.FROM_JOB)
            piece = FilePiece(pipe.comp, purpose, serial, row, offset, out_of_band(bodies[1]))
            self._host.tell(WorkerFile(pipe.worker, piece))
            self.held.hold_back(pipe)
        elif record.kind == RecordType.WANT:
            request = open_envelope(bodies[0])
            is_number = type(request) is int and is_serial(request)
            if not is_number and type(request) is not str:
                raise PeerError('malformed names of modules')
            self._host.tell(WorkerWants(pipe.worker, serial, request))
        elif record.kind == RecordType.INITIALIZED:
            text = bytes(bodies[0]).decode('utf-8', 'replace')
            error = text and 'on node %s %s' % (self._host.node.name, text)
            self._host.tell(WorkerInitialized(pipe.worker, error))
        elif record.kind == RecordType.JOBS_RETURNED:
            body = bodies[0]
            if len(body) % 8:
                raise PeerError('a list of returned jobs with a wrong size of %d bytes' % len(body))
            layout = '>%dQ' % (len(body) // 8)
            self._host.tell(WorkerReturnedJobs(pipe.worker, list(struct.unpack(layout, body))))


class WorkerPipes:
    """The pipes to workers: has workers forked, and carries out actions on the existing ones. The
    loop's thread uses this class."""

    def __init__(self, host: 'NodeHost', run_of: Callable[[str], ComputationProcesses],
                 look_soon: Callable[[], None]) -> None:
        """`run_of` returns the processes of a computation by its name; `look_soon` is called when a
        runner that may have been idle has work."""
        self._host = host
        self._run_of = run_of
        self._look_soon = look_soon
        self._of_worker: Dict[int, ComputationProcesses] = {}

    def equip(self, action: Equip) -> None:
        """Tell the runner which resources the next worker has."""
        run = self._run_of(action.comp)
        run.equip(action.worker, self._host.options.offer.variables_for(action.units))

    def start_worker(self, action: StartWorker) -> None:
        """Have a worker started."""
        worker = action.worker
        run = self._run_of(action.comp)
        try:
            ours, theirs = socket_pair()
        except OSError as exc:   # no descriptors
            self._host.tell(WorkerStartFailed(worker, shortage(exc)))
            return
        for sock in (ours, theirs):
            set_option(sock, socket.SOL_SOCKET, 'SO_SNDBUF', 1 << 20)
        pipe = run.pipes[worker] = Pipe(ours, action.comp, worker)
        self._of_worker[worker] = run
        self._host.attach(pipe)
        run.pass_pipe(worker, theirs)
        self._look_soon()

    def feed(self, action: SendToWorker) -> None:
        """Send attempts to a worker."""
        run = self._of_worker.get(action.worker)
        if run is not None:
            buffers: List[Buffer] = []
            pipe = run.pipes[action.worker]
            for attempt in action.attempts:
                payload = attempt.payload
                size = len(payload)
                if type(payload) is bytes and size < OUT_OF_BAND:   # nearly always
                    head = _RECORD.pack(_JOB, 0, attempt.cpus, attempt.serial, 0.0, 0.0, size, 0, 0)
                    buffers.append(head + payload)
                elif goes_in_segment(payload):
                    head = segment_record(_JOB, attempt.cpus, attempt.serial, 0.0, 0.0, payload)
                    pipe.push(buffers)
                    buffers = []
                    pipe.push_value(head, payload)
                else:
                    buffers += pack_record(_JOB, attempt.cpus, attempt.serial, 0.0, 0.0, payload)
            if len(buffers) > 1 and sum(map(len, buffers)) < OUT_OF_BAND:
                buffers = [b''.join(buffers)]
            pipe.push(buffers)
            self._look_soon()

    def _order(self, kind: RecordType, worker: int, serial: int = 0, first: float = 0.0,
               second: float = 0.0) -> None:
        run = self._of_worker.get(worker)
        if run is None:
            return
        if run.control is None:
            return
        if run.control.is_attached:
            run.control.push(pack_record(kind, worker, serial, first, second))

    def watch(self, action: LimitMemory) -> None:
        """Limit the memory and the time of the job that a worker runs."""
        self._order(RecordType.WATCH, action.worker, action.serial, float(action.most),
                    action.seconds)

    def interrupt(self, action: Interrupt) -> None:
        """Interrupt the job that a worker runs."""
        self._order(RecordType.INTERRUPT, action.worker, action.serial)

    def look(self, action: Look) -> None:
        """Inspect the job of a worker."""
        self._order(RecordType.LOOK, action.worker, action.serial, float(action.stacks))

    def kill(self, action: Kill) -> None:
        """Kill a worker."""
        self._order(RecordType.KILL, action.worker)

    def take_back(self, action: TakeFromWorker) -> None:
        """Ask a worker to return what it has not started."""
        self._order(RecordType.RECALL, action.worker)

    def tell_kept(self, action: AnswerJobFile) -> None:
        """Tell a worker the result of what its job has sent or requested."""
        run = self._of_worker.get(action.worker)
        if run is not None:
            pipe = run.pipes[action.worker]
            body = action.error.encode('utf-8', 'replace')
            pipe.push(pack_record(RecordType.FILE_STORED, 0, 0, 0.0, 0.0, body))

    def retire(self, action: Retire) -> None:
        """Let an idle worker end."""
        run = self._of_worker.get(action.worker)
        if run is not None:
            self.let_go(run, action.worker)   # the worker sees the end of the pipe and exits

    def let_go(self, run: ComputationProcesses, worker: int) -> None:
        """Close the pipe of a worker: nothing more comes from it, and nothing is sent there."""
        channel = run.pipes.pop(worker)
        self._host.detach(channel)
        del self._of_worker[worker]


class ProcessHost:
    """Runners and workers of all computations: it starts and ends runners, reads what they and
    workers send, and reports to the state what becomes of them. The loop's thread uses this class.

    workers - the pipes to workers
    """

    def __init__(self, host: 'NodeHost', files: ComputationFiles, options: Options) -> None:
        self._host = host
        self._files = files
        self._options = options
        self._runs: Dict[str, ComputationProcesses] = {}
        self.workers = WorkerPipes(host, self._runs.__getitem__, self._look_soon)
        self._reader = WorkerReader(host)
        self.held = self._reader.held
        self.look_at = math.inf    # when to look after runners
        # What runners send about themselves, and about existing workers
        self._of_runner: Dict[int, Callable[[ComputationProcesses, Record], None]] = {
            RecordType.ALIVE: self._on_alive,
            RecordType.END_NODE: self._on_end_node,
            RecordType.READY: self._on_up,
            RecordType.FAILED: self._on_failed,
        }
        self._of_workers: Dict[int, Callable[[ComputationProcesses, Record], None]] = {
            RecordType.WORKER_STARTED: self._on_worker_started,
            RecordType.WORKER_EXITED: self._on_worker_exited,
            RecordType.START_FAILED: self._on_worker_start_failed,
            RecordType.MEMORY_EXCEEDED: self._on_memory_exceeded,
            RecordType.OVERDUE: self._on_overdue,
            RecordType.SEEN: self._on_seen,
            RecordType.PRINTED: self._on_printed,
        }

    # -- runners -----------------------------------------------------------------------------------

    def start_runner(self, action: StartRunner) -> None:
        """Start the process that loads the code of a computation."""
        comp = action.comp
        files = self._files.of(comp)
        run = ComputationProcesses(files)
        start_method = action.spec.get('start_method')
        run.start_method = start_method or self._options.start_method
        interpreter = self._options.interpreters.get(action.spec.get('interpreter', ''))
        try:
            if interpreter is not None:
                run.use_python(interpreter)
            run.start(self._host)
        except OSError as exc:   # no descriptors, no processes
            text = 'its process cannot be started: %s' % shortage(exc)
            event = RunnerGone(comp, text, code='process')
            self._host.post(event)
            return
        self._runs[comp] = run
        run.watch = RunnerWatch(self._host, run.process.pid,
                                functools.partial(self._look_at_runner, run))
        self.look_at = self._host.now
        link = self._host.links.get(action.link)
        addresses = self._options.ext_hosts[:1] or (
            link.own_address() if link is not None else '127.0.0.1',)
        run.initialize(action.spec, self._host, addresses[0])

    def stop_runner(self, action: StopRunner) -> None:
        """End the runner of a computation, and with it its workers."""
        comp = action.comp
        run = self._runs.get(comp)
        if run is None or run.process is None:
            self._runs.pop(comp, None)
            self._files.discard(comp)
            event = RunnerGone(comp, '')
            self._host.post(event)
            return
        run.closing = True
        run.kill_at = self._host.now + GRACE
        self.look_at = self._host.now
        if run.up and run.start_method == SPAWN:   # then workers run cleanup and need time for it
            for worker in list(run.pipes):
                self.workers.let_go(run, worker)
        if run.control is not None:
            run.control.push(pack_record(RecordType.CLOSE))
        if not run.up:
            run.process.terminate()

    def runner_silent(self, pipe: Pipe) -> None:
        """Note that the pipe of a runner has ended."""
        run = self._runs[pipe.comp]
        self._look_at_runner(run)

    def _look_at_runner(self, run: ComputationProcesses) -> None:
        """Find out whether the process of a runner has ended, or only its socket: it is about to
        end, or a job or setup has closed the socket."""
        if run.process is None:
            return
        if run.process.exitcode is not None:
            self._runner_ended(run)
            return
        if run.control is not None:
            if not run.control.is_attached:
                if run.kill_at is None:
                    run.kill_at = self._host.now + GRACE
        if run.watch is not None:
            run.watch.look_at = self._host.now + RunnerWatch.SOON
        self.look_at = self._host.now

    def see_to_runners(self) -> None:
        """Look after all runners. This is called when `look_at` has come, which is set here, and
        earlier when something is done to a runner."""
        for run in list(self._runs.values()):
            self._host.guard(run, self._see_to_runner, run)
        times = itertools.chain.from_iterable(run.times() for run in self._runs.values())
        self.look_at = min((when for when in times if when is not None), default=math.inf)

    def _look_soon(self) -> None:
        """Expect answers from now on from a runner that may have been idle and has work."""
        soon = self._host.loop.now + min(RUNNER_ASKED, RunnerWatch.OFTEN)
        if soon < self.look_at:
            self.look_at = soon

    def _see_to_runner(self, run: ComputationProcesses) -> None:
        """Kill a runner if it is to be killed or does not answer; examine it if it cannot be
        watched otherwise."""
        if run.process is None:
            return
        if run.watch is None:
            return
        if run.kill_at is not None and self._host.now >= run.kill_at:
            run.kill_at = None
            run.process.kill()
            run.watch.killed_at = self._host.now
        if run.watch.is_silent(self._host.now, run.up and not run.closing
                               and self._host.node.has_jobs(run.comp)):
            run.text = 'the runner process did not answer for %d s and was killed' % RUNNER_SILENT
            run.process.kill()
            run.watch.killed_at = self._host.now
        elif run.watch.shall_ask and run.control is not None:
            if run.control.is_attached:
                run.control.push(pack_record(RecordType.ASK))
        if run.watch.is_undead(self._host.now):
            logger.error('runner process %d was killed and has not ended (uninterruptible)',
                         run.process.pid)
            self._runner_ended(run)
        elif run.watch.look_at is not None:
            if self._host.now >= run.watch.look_at:
                run.watch.look_at = run.watch.next_look(self._host.now)
                self._look_at_runner(run)

    def _runner_ended(self, run: ComputationProcesses) -> None:
        """Handle the end of a runner. What it and its workers wrote before is read first: the rest
        of their attempts had never begun, except for those that they noted."""
        code = run.process.exitcode
        run.kill_workers()
        self._read_out(run)
        begun = None
        with contextlib.suppress(OSError):   # no descriptors: then the attempts are unknown
            begun = Slots.read(run.files.private)
        for worker in list(run.passed):
            run.arrived(worker)
        self._let_go_of_all(run)
        if run.watch is not None:
            run.watch.close()
        run.process = None
        # In a program, orphans belong to the program
        if os.getpid() == 1:
            if not self._options.embedded:
                self.reap()
        del self._runs[run.comp]
        self._files.discard(run.comp)
        # 0: it had lost its connection to this process
        passes = not run.text and code in (None, 0, -signal.SIGTERM, -SIGKILL)
        self._host.tell(
            RunnerGone(run.comp, run.text or exit_text(code), run.unloadable, begun,
                       'process' if passes else 'setup'))

    def _read_out(self, run: ComputationProcesses) -> None:
        try:
            while run.control is not None and run.control.is_attached:
                records = run.control.records(self._host.now)
                for record in records:
                    self._from_runner(run, record)
                if not records:
                    break
        except (LinkBroken, PeerError, OSError) as exc:
            logger.debug('the socket of a runner: %s', exc)   # its end, which is being handled
        for pipe in list(run.pipes.values()):
            try:
                while pipe.is_attached and self._from_worker(pipe):
                    continue
            except (LinkBroken, PeerError, OSError) as exc:
                logger.debug('the pipe of a worker: %s', exc)   # as above

    def reap(self) -> None:
        """Reap orphans: in a container they become children of PID 1 and remain zombies until it
        waits for them. A child of this program hides those behind it until it has been waited for
        in its own place, which calls this method again."""
        runs = self._runs.values()
        ours = set()
        for run in runs:
            if run.process is not None:
                ours.add(run.process.pid)
        with contextlib.suppress(ChildProcessError):
            while True:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is None:
                    return
                if ended.si_pid in ours:
                    return
                os.waitpid(ended.si_pid, 0)

    # -- what runners send -------------------------------------------------------------------------

    def on_readable(self, pipe: Pipe) -> None:
        """Handle a pipe that can be read. Raises LinkBroken or OSError."""
        try:
            if pipe.worker:
                self._from_worker(pipe)
            else:
                for record in pipe.records(self._host.now):
                    run = self._runs[pipe.comp]
                    self._from_runner(run, record)
        except PeerError as exc:   # the user's code wrote to the wrong descriptor
            text = str(exc)
            self._nonsense(pipe, text)
        except MemoryError:
            self.end_writer(pipe, NO_MEMORY)

    def _from_worker(self, pipe: Pipe) -> int:
        run = self._runs[pipe.comp]
        return self._reader.read(run, pipe)

    def _from_runner(self, run: ComputationProcesses, record: Record) -> None:
        if run.watch is not None:
            run.watch.answered()
        if record.kind in self._of_runner:
            self._of_runner[record.kind](run, record)
        elif record.number in run.pipes:
            if record.kind in self._of_workers:
                self._of_workers[record.kind](run, record)
        elif record.kind == RecordType.WORKER_EXITED:   # of a worker that was told to end
            run.pids.pop(record.number, None)
            if record.number in run.equipped:
                run.equipped.discard(record.number)
                event = WorkerLeft(record.number)
                self._host.tell(event)

    def _on_alive(self, run: ComputationProcesses, record: Record) -> None:
        """Do nothing: that the runner answers is noted already."""

    def _on_end_node(self, run: ComputationProcesses, record: Record) -> None:
        event = EndWanted(run.comp)
        self._host.tell(event)

    def _on_up(self, run: ComputationProcesses, record: Record) -> None:
        run.up = True
        self._host.tell(RunnerUp(run.comp, _notes_of(record.bodies[0])))

    def _on_failed(self, run: ComputationProcesses, record: Record) -> None:
        run.text = bytes(record.bodies[0]).decode('utf-8', 'replace')
        run.unloadable = record.number == 1
        if run.closing:
            logger.warning('%s', run.text)

    def _on_worker_started(self, run: ComputationProcesses, record: Record) -> None:
        run.arrived(record.number)
        if hasattr(socket, 'SCM_CREDENTIALS'):
            return
        if is_child(record.serial, run.process.pid):
            run.known(record.number, record.serial)

    def _on_worker_start_failed(self, run: ComputationProcesses, record: Record) -> None:
        run.arrived(record.number)
        self.workers.let_go(run, record.number)
        text = bytes(record.bodies[0]).decode('utf-8', 'replace')
        self._host.tell(WorkerStartFailed(record.number, text))

    def _on_memory_exceeded(self, run: ComputationProcesses, record: Record) -> None:
        event = MemoryExceeded(record.number, record.serial)
        self._host.tell(event)

    def _on_overdue(self, run: ComputationProcesses, record: Record) -> None:
        event = WorkerOverdue(record.number, record.serial)
        self._host.tell(event)

    def _on_seen(self, run: ComputationProcesses, record: Record) -> None:
        stacks, stdout, stderr = map(bytes, record.bodies)
        text = stacks.decode('utf-8', 'replace')
        event = JobSeen(record.number, record.serial, text, stdout, stderr)
        self._host.tell(event)

    def _on_printed(self, run: ComputationProcesses, record: Record) -> None:
        if record.start not in (1.0, 2.0) or not 0.0 <= record.end < 1 << 62:
            raise PeerError('output of an unknown stream')
        stream = int(record.start)
        offset = int(record.end)
        self._host.tell(
            WorkerPrinted(record.number, record.serial, stream, offset,
                          out_of_band(_keep(record.bodies[0]))))

    def _on_worker_exited(self, run: ComputationProcesses, record: Record) -> None:
        if not -256.0 <= record.start <= 1 << 32:   # Windows has exit codes of 32 bits
            raise PeerError('a malformed exit code')
        pipe = run.pipes[record.number]
        if pipe.is_attached:
            try:
                while self._from_worker(pipe):   # results that it wrote before it ended
                    continue
            except PeerError as exc:
                self._nonsense(pipe, str(exc))
            except MemoryError:
                self.end_writer(pipe, NO_MEMORY)
            except (LinkBroken, OSError):
                logger.debug('worker %d has written all it had to', record.number)
        self.workers.let_go(run, record.number)
        run.pids.pop(record.number, None)
        said = run.nonsense.pop(record.number, '') or exit_text(int(record.start))
        stderr = bytes(record.bodies[2])
        printed = stderr[-1000:].decode('utf-8', 'replace')
        tail = printed.strip()
        text = 'the worker process on %s %s%s' % (self._host.node.name, said,
                                                  '\nstderr ends:\n' + tail if tail else '')
        event = WorkerGone(record.number, text, record.serial, record.bodies[1], stderr)
        self._host.tell(event)

    def _let_go_of_all(self, run: ComputationProcesses) -> None:
        for worker in list(run.pipes):
            self.workers.let_go(run, worker)
        if run.control is not None:
            self._host.detach(run.control)

    def _nonsense(self, pipe: Pipe, text: str) -> None:
        """Kill the writer of a pipe, because what came is not a record, or cannot be true."""
        why = 'it sent nonsense: %s' % text
        self.end_writer(pipe, why)

    def end_writer(self, pipe: Pipe, why: str) -> None:
        """Kill the writer of a pipe, because what comes cannot be handled."""
        run = self._runs[pipe.comp]
        text = 'killed: %s' % why
        logger.error('a %s of %s was %s', 'worker' if pipe.worker else 'runner', run.comp, text)
        if not pipe.worker:
            run.text = text
            run.process.kill()
            if pipe.is_attached:
                self._host.detach(pipe)
                self._host.guard(None, self._look_at_runner, run)
            return
        run.nonsense[pipe.worker] = text
        action = Kill(pipe.worker)
        self.workers.kill(action)
        run.kill(pipe.worker)
        self._host.detach(pipe)

    # -- the end -----------------------------------------------------------------------------------

    def after_fork(self) -> None:
        """Release all processes in a forked child: they belong to the parent."""
        for run in self._runs.values():
            run.after_fork()

    def close(self) -> None:
        """End all processes."""
        for run in self._runs.values():
            if run.watch is not None:
                run.watch.close()
            if run.control is not None and run.control.is_attached:
                with contextlib.suppress(OSError):   # it has ended already
                    run.control.drain(GRACE)
            if run.process is not None:
                run.process.join(3.0)
                run.process.kill()
                run.process.join(3.0)
                run.kill_workers()
            self._let_go_of_all(run)
        self._runs.clear()


class Uplink:
    """A scheduler, or a client that listens, to which this node connects."""

    def __init__(self, host: str, port: int, most: float) -> None:
        self.host = host
        self.port = port
        self.reconnector = Reconnector(min(1.0, most), most)
        self.link = 0
        self.since = 0.0
        self.told: Any = None     # the last failure that was logged
        self.second = SecondConnection(self)


class Uplinks:
    """Connections that this node makes itself, to schedulers (--scheduler-host), and that it makes
    again after they have ended. The loop's thread uses this class."""

    def __init__(self, daemon: 'Daemon', options: Options, instance: bytes,
                 break_link: Callable[[Link, str], None]) -> None:
        self._daemon = daemon
        self._options = options
        self._instance = instance
        self._break_link = break_link
        self._uplinks = [
            Uplink(host, port, options.ping_interval or 30.0) for host, port in options.schedulers
        ]
        self._tls: Any = None

    def start(self) -> None:
        """Permit connections from now on. Raises StartError."""
        if not self._uplinks:
            return
        if self._options.certfile:
            self._tls = tls_context(False, self._options.certfile, self._options.keyfile)

    def _reach(self, uplink: Uplink, patience: float) -> Callable[..., Authenticated]:
        return functools.partial(dial,
                                 uplink.host,
                                 uplink.port,
                                 derive_key(self._options.secret),
                                 Role.NODE,
                                 Role.SCHEDULER,
                                 self._instance,
                                 self._tls,
                                 patience=patience)

    def connect(self) -> None:
        """Begin the attempts that are due."""
        daemon = self._daemon
        for uplink in self._uplinks:
            if uplink.reconnector.due is None:
                continue
            if not uplink.reconnector.due <= daemon.now:
                continue
            if not daemon.node.service.stopping:
                patience = uplink.reconnector.patience(daemon.now, PULSE)
                reach = self._reach(uplink, patience)
                uplink.reconnector.start(daemon.post, uplink, reach)

    def connected(self, uplink: Uplink, link: Link) -> None:
        """Note that an attempt has led to a link."""
        uplink.reconnector.ended()
        uplink.link = link.number
        uplink.since = self._daemon.now
        uplink.told = None
        logger.info('connected to %s', format_address(uplink.host, uplink.port))

    def failed(self, event: ConnectFailed) -> None:
        """Note that an attempt has failed."""
        daemon = self._daemon
        uplink = event.peer
        text = event.text
        if isinstance(uplink, SecondConnection):
            link = daemon.links.get(uplink.peer.link)
            daemon.second_failed(uplink, link)
            return
        uplink.reconnector.ended()
        uplink.reconnector.again(daemon.now)
        about: Any = event.failing
        # A peer that closes at once refuses this node for a while, for the reason that was logged.
        if about is Failing.CLOSED and uplink.told is not None:
            return
        if about is Failing.OTHERWISE:
            about = text
        if uplink.told == about:
            return
        uplink.told = about
        logger.warning('%s (--scheduler-host) cannot be reached: %s; this node keeps trying',
                       format_address(uplink.host, uplink.port), text)

    def link_ended(self, link: Link) -> None:
        """Note that a link has ended; if it is one of these, it is made again."""
        daemon = self._daemon
        for uplink in self._uplinks:
            if uplink.link == link.number:
                uplink.link = 0
                uplink.reconnector.again(daemon.now, daemon.now - uplink.since)

    def link_silent(self, link: Link) -> None:
        """Try a second connection to a scheduler that this node has dialled and that is silent. For
        other links, the peer does this."""
        daemon = self._daemon
        for uplink in self._uplinks:
            if uplink.link != link.number:
                continue
            if not daemon.node.service.stopping:
                patience = max(1.0, link.pulse)
                uplink.second.start(daemon.now, daemon.post, self._reach(uplink, patience))

    def second_reached(self, event: Connected) -> Optional[Connected]:
        """Break a link that is still silent, and return the event with which the second connection
        replaces it. Returns None if the link is not silent any more, or if another one has replaced
        it."""
        daemon = self._daemon
        uplink = event.peer.peer
        event.peer.ended()
        old = daemon.links.get(uplink.link)
        if old is None or not daemon.is_silent(old):
            event.sock.close()
            return None
        text = ('nothing was received for %.0f s, and a new connection was '
                'made') % (daemon.now - old.heard)
        self._break_link(old, text)
        uplink.reconnector.due = None
        return event._replace(peer=uplink)

    def times(self) -> Iterator[Optional[float]]:
        """Return the times at which something is to be done."""
        for uplink in self._uplinks:
            yield uplink.reconnector.due

    def close(self) -> None:
        """End all attempts."""
        for uplink in self._uplinks:
            uplink.reconnector.abort()
            uplink.second.abort()


class NodeDiscovery:
    """Answers processes that look for nodes, and announces this node. The loop's thread uses this
    class."""

    def __init__(self, daemon: 'Daemon', options: Options, instance: bytes) -> None:
        self._daemon = daemon
        self._options = options
        self._instance = instance
        self._sockets: Optional[DiscoverySockets] = None
        self.hello_at: Optional[float] = None
        self._port = 0
        self._stranger_at = -60.0         # when a client with another secret was last logged

    def start(self, port: int) -> None:
        """Announce once that the node serves at this port, and answer from now on."""
        import ipaddress
        options = self._options
        addresses = options.ext_hosts or tuple(host for host in options.hosts if host)
        reach = options.reach
        if reach == 'lan' and addresses:
            if all(ipaddress.ip_address(address).is_loopback for address in addresses):
                reach = 'loopback'
        self._port = port
        key = derive_key(options.secret)
        self._discovery = Discovery(key, Role.NODE, self._instance, port, addresses)
        # It listens at its own port for clients that list it, and at the usual one so that it is
        # found whatever its own port is.
        ports = {options.port or NODE_PORT, NODE_PORT}
        self._sockets = DiscoverySockets(self._daemon, reach, ports, ports, self._on_datagram,
                                         options.multicast)
        if self._sockets.error:
            logger.warning('%s: clients cannot discover this node, and have to list its address',
                           self._sockets.error)
        self.hello()

    def hello(self) -> None:
        """Announce this node."""
        assert self._sockets is not None   # ours
        self._sockets.broadcast(lambda: self._discovery.build(DatagramType.HELLO))
        if self._options.ping_interval:
            self.hello_at = self._daemon.now + self._options.ping_interval
        else:
            self.hello_at = None

    def _on_datagram(self, data: bytes, source: str, reply: Callable[[bytes], None]) -> None:
        daemon = self._daemon
        heard, answer = self._discovery.parse(data, source, daemon.now)
        if answer is not None:
            reply(answer)
            if heard is not None:
                return
            if not daemon.now - self._stranger_at > 10.0:
                return
            self._stranger_at = daemon.now
            # Clients of other users of this machine are normal.
            if is_own_address(source):
                level = logging.INFO
            else:
                level = logging.WARNING
            logger.log(
                level, '%s is looking for nodes and has another secret than this node (port %d): '
                       '%s',
                source, self._port, same_secret(derive_key(self._options.secret)))

    def close(self) -> None:
        """Stop answering."""
        if self._sockets is not None:
            self._sockets.close()


class NodeHost:
    """A node without its connections to clients: the Node that decides, and the parts that carry
    out what it decides, which concern files and processes. It runs in any loop; see `Daemon`.

    The loop reports its links to clients and the messages on them (`link_up`, `link_down`, `take`),
    and gives the node host a turn in each of its own turns (`turn`). Pipes to runners and workers
    are channels of the loop whose owner is the node host. The loop's thread uses this class, except
    for `post`.
    """

    def __init__(self,
                 loop: Loop,
                 options: Options,
                 directory: Type[NodeDirectory] = NodeDirectory,
                 files: Type[ComputationFiles] = ComputationFiles,
                 processes: Type[ProcessHost] = ProcessHost,
                 facts: Optional[Dict[str, Any]] = None) -> None:
        """The classes are those of the parts that concern files and processes. `facts` are those of
        the machine, see `node_facts`."""
        self.loop = loop
        self.options = options
        self.instance = os.urandom(16)
        self.links: Dict[int, Link] = {}     # to clients
        self.has_ended = False      # the state has decided so
        name = options.name or platform.node() or 'node'
        facts = dict(facts or node_facts(), start_method=options.start_method,
                     resources=options.offer.counts, memory_total=whole_memory(options.memory),
                     pythons={name: interpreter.fact
                              for name, interpreter in options.interpreters.items()})
        self.node = node_type()(name, options.cpus, facts, options.zombie, options.serve,
                                options.client_shutdown, loop.now, options.grace)
        self._posted: Deque[Any] = collections.deque()
        self._stirred = True        # the state has handled events since its last turn
        self._next_at = 0.0         # what `next_timer` has returned
        self.directory = directory(options, self.instance, self._directory_taken)
        self.files = files(self, self.directory, options)
        self.results = ResultStore(self, self.directory, options.zombie)
        self.processes = processes(self, self.files, options)
        # These are for the parts
        self.detach = loop.detach
        self.interest = loop.interest
        self.add_reader = loop.add_reader
        self.remove_reader = loop.remove_reader
        self._events: Dict[type, Callable[[Any], Any]] = {
            ChildEnded: lambda event: self.processes.reap(),
            Digested: self.files.on_digested,
        }
        self._acts: Dict[type, Callable[[Any], Any]] = {
            Send: self._send,
            Drop: self._drop,
            PrepareDirectory: self.files.prepare,
            WantAgain: self.files.want_again,
            WriteFile: self.files.store,
            Fetch: self.files.fetch,
            FetchValue: self.files.fetch_value,
            DropValue: self.files.drop_value,
            NoteOverrun: self.files.note_overrun,
            SpoolResults: self.results.keep,
            SendSpooled: self.results.send_kept,
            Forget: self.results.forget,
            Remember: self.directory.remember,
            StartRunner: self.processes.start_runner,
            StopRunner: self.processes.stop_runner,
            Equip: self.processes.workers.equip,
            StartWorker: self.processes.workers.start_worker,
            SendToWorker: self.processes.workers.feed,
            Interrupt: self.processes.workers.interrupt,
            Look: self.processes.workers.look,
            Kill: self.processes.workers.kill,
            LimitMemory: self.processes.workers.watch,
            TakeFromWorker: self.processes.workers.take_back,
            AnswerJobFile: self.processes.workers.tell_kept,
            Retire: self.processes.workers.retire,
            Broken: lambda action: loop.fault(action, action.error, self),
            PrintStatus: self._show,
            Exit: self._exit,
        }

    # -- start and end -----------------------------------------------------------------------------

    def start(self, port: int) -> None:
        """Take over the directory. Raises StartError."""
        self.directory.take(port)
        self.node.facts['lock'] = machine(), os.path.join(self.directory.base, 'lock')
        self.files.start()
        self.results.find_kept()

    def _directory_taken(self, memory: Memory, past: Dict[str, AttemptHistory]) -> None:
        self.node.facts['memory'] = memory.ident
        for comp, known in past.items():
            event = Remembered(comp, known)
            self.tell(event)

    def _exit(self, action: Exit) -> None:
        self.has_ended = True

    def close(self) -> None:
        """End all processes, and remove files that are not needed any more. Does nothing the second
        time."""
        self.processes.close()
        self.files.close()
        self.results.close()
        self.directory.close()

    def after_fork(self) -> None:
        """Close the descriptors in a forked child, which would keep the processes of its parent
        alive and the directory locked."""
        self.processes.after_fork()
        self.directory.after_fork()

    # -- for the parts -----------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """The time of this turn."""
        return self.loop.now

    def attach(self, pipe: 'Pipe') -> None:
        """Read a pipe from now on."""
        pipe.owner = self
        self.loop.attach(pipe)

    def guard(self, subject: Any, call: Callable[..., Any], *args: Any) -> None:
        """Call a function for `subject`; an unexpected exception ends what the subject concerns,
        not the loop."""
        try:
            call(*args)
        except Exception as exc:  # whatever it is, others must be served
            self.loop.fault(subject, exc, self)

    def post(self, event: Any) -> None:
        """Queue an event, which is handled before this turn ends or in the next one. Any thread."""
        self._posted.append(event)
        self.loop.wake_up()

    # -- events ------------------------------------------------------------------------------------

    def on_event(self, event: Any) -> None:
        """Handle the results of actions, and what others have posted for the state."""
        self._events.get(type(event), self.tell)(event)

    def link_up(self, link: Link) -> None:
        """Note that a client has authenticated itself."""
        self.links[link.number] = link
        self.node.facts['available'] = self.directory.available()
        event = LinkUp(link.number, link.instance, link.address)
        self.tell(event)

    def link_down(self, link: Link) -> None:
        """Note that a link has ended."""
        self.links.pop(link.number, None)
        event = LinkDown(link.number, link.on_purpose)
        self.tell(event)

    def take(self, link: Link, message: Any) -> None:
        """Handle a message of a client. Raises LinkBroken or PeerError if the link ends because of
        it."""
        if type(message) is Jobs or type(message) is Ack:   # nearly always
            self.tell(Received(link.number, message))
            return
        if isinstance(message, Bye):
            link.on_purpose = True
            raise LinkBroken('bye: %s' % message.text[:200])
        if isinstance(message, Wrong):
            text = 'it cannot use what was sent: %s' % message.text[:NAME_MOST]
            for comp, serial in self.loop.refusals.refused(link, message.frame):
                reason = message.text[:NAME_MOST]
                self.results.refused[comp, serial] = 'the result could not be taken: ' + reason
            raise LinkBroken(text)
        if not isinstance(message, Pulse):
            if type(message) is Query:
                self.node.facts['available'] = self.directory.available()
            event = Received(link.number, message)
            self.tell(event)

    def tell(self, event: Any) -> None:
        """Tell the state what has happened, and do what it decides."""
        self._stirred = True
        try:
            actions = self.node.handle(event, self.loop.now)
        except BaseException:
            self._act(self.node.decided())   # what was decided before the error
            raise
        self._act(actions)

    def _flush(self) -> None:
        """Let the state have its turn, and do what it decides."""
        try:
            actions = self.node.flush(self.loop.now)
        except BaseException:
            self._act(self.node.decided())   # as above
            raise
        self._act(actions)

    def _act(self, actions: List[Any]) -> None:
        for action in actions:
            try:
                self._acts[type(action)](action)
            except Exception as exc:  # the other actions must be carried out
                self.loop.fault(action, exc, self)

    def on_channel(self, channel: Any) -> None:
        """Handle a pipe of a runner or worker, or a link of this node's own, that can be read."""
        if isinstance(channel, Pipe):
            self.processes.on_readable(channel)
        else:
            for message in channel.messages(self.now):
                self.take(channel, message)

    def on_broken(self, channel: Any, text: str) -> None:
        """Handle the end of the pipe of a runner or worker, or of a link of this node's own. The
        end of a worker's pipe means nothing yet: the runner reports what became of the process."""
        if not isinstance(channel, Pipe):
            self.link_down(channel)
        elif not channel.worker:
            logger.debug('the line to the runner of %s has ended: %s', channel.comp, text)
            self.processes.runner_silent(channel)

    def on_fault(self, subject: Any, text: str) -> bool:
        """End what the fault concerns: a link, a worker, a computation. Returns whether anything
        was found."""
        self._stirred = True   # the work of the turn may not be complete
        if isinstance(subject, Pipe):
            self.processes.end_writer(subject, text)
            return True
        comp = getattr(subject, 'comp', None) or self.node.comp_of_worker(
            getattr(subject, 'worker', 0))
        if isinstance(subject, Link):
            link: Optional[Link] = subject
        else:
            link = self.links.get(getattr(subject, 'link', 0))
        if comp and not isinstance(subject, Link):
            event = Faulted(comp, text)
            self.tell(event)
        elif link is not None:
            self.loop.break_link(link, text)
        if bool(comp):
            return True
        return link is not None

    # -- turns -------------------------------------------------------------------------------------

    def next_timer(self) -> Optional[float]:
        """Return the time of the state's next timer, or of the end of a runner that does not end;
        it is now if something was posted or held pipes can be read again."""
        results = self.results
        when = min(self.node.timers.next_at, self.node.scheduler.look_at, self.processes.look_at)
        if results.read_later:
            when = min(when, *results.read_later.values())
        if self.files.remains:
            when = min(when, min(self.files.remains.values())[0])
        if self._posted or self.processes.held.may_let_go() or (
                results.sender.waiting and results.sender.has_room()):
            when = self.loop.now
        self._next_at = when   # even if it is now, so that the following turn is due
        if when < math.inf:
            return when
        return None

    @property
    def is_due(self) -> bool:
        """Return whether a turn has something to do, in a loop that has asked for `next_timer`
        before it waited."""
        return self._stirred or bool(self._posted) or self._next_at <= self.loop.now

    def take_posted(self) -> None:
        """Handle what was posted, and what follows from that."""
        while self._posted:
            event = self._posted.popleft()
            try:
                self.on_event(event)
            except Exception as exc:  # as in `guard`
                self.loop.fault(event, exc, self)

    def turn(self) -> None:
        """Handle the results of this turn's actions, then give the state its own turn."""
        self._stirred = False
        if self._posted:
            self.take_posted()
        processes = self.processes
        if self.loop.now >= processes.look_at:
            processes.see_to_runners()
        try:
            self._flush()
        except Exception as exc:  # as in `guard`
            self.loop.fault(None, exc, self)
        if self.node.scheduler.is_supplied:
            self.loop.pace.may_pause = True
        if self.results.read_later:
            self.results.read_again()
        if self.files.remains:
            self.guard(None, self.files.remove_again)
        if self.results.sender.waiting:
            self.guard(None, self._send_waiting)
        if processes.held.pipes:
            processes.held.let_go()
        attempts = self.node.attempts
        full = attempts.held_bytes > RECEIVE_BUDGET and attempts.is_full()
        for link in self.links.values():
            if link.paused != full:
                link.paused = full
                link.heard = self.now
                self.interest(link)

    # -- actions on links --------------------------------------------------------------------------

    def _send(self, action: Send) -> None:
        link = self.links.get(action.link)
        if link is None:
            return
        message = action.message
        if type(message) is not Results:
            self.loop.send(link, message)
            return
        if not self.results.refused and are_small(message.rows):
            self.loop.send(link, message)
            return
        rows: Iterable[tuple] = message.rows
        if self.results.refused:
            rows = map(functools.partial(self.results.usable, message.comp), rows)
        for frame in batches(Results, message.comp, map(with_size, rows)):
            self.loop.send(link, frame)

    def _drop(self, action: Drop) -> None:
        link = self.links.pop(action.link, None)
        if link is not None:
            self.loop.disconnect(link, action.text)

    def _show(self, action: PrintStatus) -> None:
        with contextlib.suppress(OSError):   # the terminal may have gone
            lines = action.text.split('\n')
            print('\n'.join(map(printable, lines)), flush=True)

    def _send_waiting(self) -> None:
        """Send files and kept results on links that have room."""
        for link, _, text in self.results.sender.send(self.loop.send):
            # Its client gets them when it comes back.
            self.loop.break_link(link, 'results cannot be read: %s' % text)


class Daemon(Loop):
    """The loop of a dispynode: a NodeHost, and the links of clients, which its acceptors have
    accepted or which it has made itself."""

    def __init__(self,
                 options: Options,
                 host: Callable[[Loop, Options], NodeHost] = NodeHost,
                 link: Type[Link] = Link) -> None:
        """`host` makes the part that is the node, and `link` is the class of links to clients."""
        super().__init__()
        self._options = options
        self._link = link
        self.node_host = host(self, options)
        self.node = self.node_host.node
        self.tell = self.node_host.tell
        self.values.where = 'on node %s' % self.node.name
        self._phase = Phase.SERVING
        # When to look at the clock on the wall
        if options.hours:
            self._clock_at: Optional[float] = self.now
        else:
            self._clock_at = None
        self._acceptors: List[Acceptor] = []
        self.uplinks = Uplinks(self, options, self.node_host.instance, self._break)
        self.discovery = NodeDiscovery(self, options, self.node_host.instance)
        self._events: Dict[type, Callable[[Any], Any]] = {
            ConnectFailed: self.uplinks.failed,
            Connected: self._dialled,
            Authenticated: self._arrived,
            CallSoon: lambda event: event.call(),
        }

    # -- start and end -----------------------------------------------------------------------------

    def start(self) -> int:
        """Listen, and take over the directory. Returns the port. Raises StartError or
        SecretError."""
        options = self._options
        port = self._options.port
        try:
            for host in options.hosts:
                self._acceptors.append(self._listen(host, port))
                server_address = self._acceptors[0].server_address
                port = server_address[1]
            self.node_host.start(port)
            self.uplinks.start()
        except BaseException:
            self.close()
            raise
        for acceptor in self._acceptors:
            self.add_reader(acceptor.socket, acceptor.on_readable)
        self.discovery.start(port)
        return port

    def _listen(self, host: str, port: int) -> Acceptor:
        options = self._options
        try:
            key = derive_key(options.secret)
            return Acceptor((host, port),
                            key,
                            Role.NODE, (Role.CLIENT, Role.SCHEDULER),
                            self.node_host.instance,
                            self.post,
                            options.certfile,
                            options.keyfile,
                            patience=options.msg_timeout)
        except OverflowError as exc:
            raise StartError('port %d is not between 0 and 65535 (-p/--port)' % port) from exc
        except OSError as exc:
            where = format_address(host, port)
            if exc.errno == errno.EADDRINUSE:
                text = ('port %d is in use (%s), perhaps by another dispynode; choose '
                        'another port with -p/--port' % (port, where))
                raise StartError(text) from exc
            raise StartError('cannot listen at %s: %s (-i/--host, -p/--port)' %
                             (where, exc)) from exc

    def close(self) -> None:
        """End all processes, and remove files that are not needed any more. Does nothing the second
        time."""
        for acceptor in self._acceptors:
            with contextlib.suppress(KeyError, ValueError):   # not watched yet
                self.remove_reader(acceptor.socket)
            acceptor.server_close()
        self._acceptors = []
        self.discovery.close()
        self.uplinks.close()
        self.node_host.close()
        super().close()

    def next_timer(self) -> Optional[float]:
        """Return the time of the node's next timer, or of other things that are to be done."""
        times = [self.node_host.next_timer(), self.discovery.hello_at, self._clock_at,
                 *self.uplinks.times()]
        return min((when for when in times if when is not None), default=None)

    # -- events ------------------------------------------------------------------------------------

    def call_soon(self, call: Callable[[], None]) -> None:
        """Call a function in the thread of the loop. Any thread."""
        event = CallSoon(call)
        self.post(event)

    def on_event(self, event: Any) -> None:
        """Handle peers that have authenticated themselves, and events for the node."""
        handler = self._events.get(type(event), self.node_host.on_event)
        handler(event)

    def _arrived(self, event: Union[Authenticated, Connected]) -> Link:
        """Take a peer that has authenticated itself."""
        link = self._link(event.sock, event.session, event.address, self.now, takes=OF_CLIENTS)
        self.attach(link)
        self.node_host.link_up(link)
        return link

    def _dialled(self, event: Connected) -> None:
        """Take the connection to a scheduler that was reached."""
        if isinstance(event.peer, SecondConnection):
            reached = self.uplinks.second_reached(event)
            if reached is None:
                return
            event = reached
        link = self._arrived(event)
        self.uplinks.connected(event.peer, link)

    def on_silent(self, link: Link) -> None:
        """Try another connection to a scheduler that this node has dialled and that is silent. For
        other links, the peer does this."""
        self.uplinks.link_silent(link)

    def on_fault(self, subject: Any, text: str) -> bool:
        """End what the fault concerns: a link, or something of the node."""
        if self.node_host.on_fault(subject, text):
            return True
        return super().on_fault(subject, text)

    def on_channel(self, channel: Any) -> None:
        """Handle what has come on a link."""
        for message in channel.messages(self.now):
            self._message(channel, message)

    def _message(self, link: Link, message: Any) -> None:
        if isinstance(message, ClientHello):
            pulse = min(max(message.pulse, 0.1), 3600.0)
            self.set_pulse(link, pulse)
        self.node_host.take(link, message)

    def on_broken(self, channel: Any, text: str) -> None:
        """Handle the end of a link."""
        is_missed = not channel.on_purpose and self.node.serves(channel.number)
        if is_missed:
            log = logger.warning
        else:
            log = logger.info
        log('link to %s ended: %s%s', channel.address, text, channel.stall
            and ': ' + STALLS[channel.stall])
        self.node_host.link_down(channel)
        self.uplinks.link_ended(channel)

    def end_of_turn(self) -> None:
        """Handle the results of this turn's actions, then give the node its own turn."""
        while self._inbox:
            self.take_events(len(self._inbox))
        self.node_host.take_posted()
        if self._clock_at is not None:
            if self.now >= self._clock_at:
                self._look_at_clock(time.localtime())
        self.node_host.turn()
        self.uplinks.connect()
        if self.discovery.hello_at is not None:
            if self.now >= self.discovery.hello_at:
                self.discovery.hello()
        if self.node_host.has_ended:
            self.stop()

    def _look_at_clock(self, local: time.struct_time) -> None:
        """Apply the hours of service. This happens once a minute, so that a clock that is set does
        no harm."""
        assert self._options.hours is not None   # ours
        self._clock_at = self.now + 60 - min(local.tm_sec, 59)
        minute = local.tm_hour * 60 + local.tm_min
        phase = self._options.hours.phase(minute)
        if phase is not self._phase:
            self._phase = phase
            self.tell(
                Resume('hours') if phase is Phase.SERVING else Pause(
                    'hours', 'its hours of service begin at %02d:%02d' %
                    divmod(self._options.hours.start, 60), phase is Phase.CLOSED))


class DirectoryRemains:
    """The files that a node whose process has ended has left on this machine. A client that was
    connected to the node reads them.

    That nothing listens at an address proves nothing, since it may have been a forwarder. The
    node's lock file is proof, if it names the process that was connected and is not locked.
    """

    def __init__(self, lock: Any, instance: bytes) -> None:
        """`lock`: machine and path of the lock file, as the node has sent them."""
        self._machine = self._path = ''
        if type(lock) is tuple:
            kinds = []
            for part in lock:
                kinds.append(type(part))
            if kinds == [str, str]:
                self._machine, self._path = lock
        self._instance = instance

    def has_ended(self) -> bool:
        """Return whether it is certain that the process has ended."""
        if not self._machine:
            return False
        if self._machine != machine():
            return False
        if os.name == 'nt':
            return False
        try:
            with open(self._path, 'r+') as file:
                digits = self._instance.hex()
                text = 'instance %s' % digits
                contents = file.read(400)
                named = text in contents
                _try_lock(file, shared=True)
                return named
        except OSError:   # it cannot be read, or is locked
            return False

    def past(self, comp: str, memory: str) -> AttemptHistory:
        """Return what can be known of attempts of a computation; `memory` is the identifier of the
        node's memory."""
        root = os.path.dirname(self._path)
        try:
            path = os.path.join(root, 'memory')
            with open(path) as file:
                whole = memory != '' and file.read().startswith(memory + ' ')
            past = Memory.read(root, comp)
            private = os.path.join(root, 'p-' + comp)
            if not os.path.isdir(private):   # it, or the computation, has ended in good order
                return past.and_also(AttemptHistory(whole=whole))
            begun = Slots.read(private)
        except OSError:
            return AttemptHistory(whole=False)
        lost = AttemptHistory(whole=whole and begun is not None, lost=begun or frozenset())
        return past.and_also(lost)

    def kept(self, comp: str) -> List[int]:
        """Return the serials of the attempts whose results the node has kept."""
        try:
            directory = os.path.dirname(self._path)
            path = os.path.join(directory, 'r-' + comp)
            rows = ResultSpool(path).rows()
            return [row[0] for row in rows]
        except OSError:   # usually there is none
            return []


# -- command line ----------------------------------------------------------------------------------

def available_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def serve_option(text: str) -> Optional[int]:
    """Parse a number of clients. Returns None for 0 and negative numbers, which mean no limit, as
    in dispy 4."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError('%r is not a whole number' % text) from None
    if number > 0:
        return number
    return None


def count_cpus(wanted: Optional[int]) -> int:
    """Return the number of CPUs to offer. Raises ValueError if it is 0 or none would be left."""
    have = available_cpus()
    if wanted is None:
        return have
    if wanted > 0:
        cpus = wanted
    else:
        cpus = have + wanted
    if wanted == 0 or cpus < 1:
        text = '-c/--cpus %d leaves nothing to offer: this host has %d' % (wanted, have)
        raise ValueError(text)
    return cpus


def size_option(text: str) -> int:
    """Parse a number of bytes, which may have the suffix k, m, g or t for powers of 1024."""
    if text[-1:].lower() in tuple('kmgt'):
        digits = text[:-1]
        number, factor = (digits, 1 << 10 * ('kmgt'.index(text[-1].lower()) + 1))
    else:
        number, factor = (text, 1)
    if not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError('%r is not a size such as 300k, 20m, 1g' % text)
    return int(number) * factor


def _time_of_day(text: str) -> str:
    """Parse a time of day, HH:MM."""
    hour, _, minute = text.partition(':')
    if not (hour.isdigit() and minute.isdigit() and int(hour) < 24 and int(minute) < 60):
        raise argparse.ArgumentTypeError('%r is not a time of day such as 08:30' % text)
    return '%02d:%02d' % (int(hour), int(minute))


def positive_number(text: str) -> float:
    """Parse a number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError('%r is not a number above 0' % text)


def seconds_option(text: str) -> float:
    """Parse a time in seconds."""
    with contextlib.suppress(ValueError):
        if SHORTEST <= float(text) <= LONGEST:
            return float(text)
    raise argparse.ArgumentTypeError('%r is not a number of seconds between %g and %d (10 years)' %
                                     (text, SHORTEST, LONGEST))


def minutes_option(text: str) -> float:
    """Parse a time in minutes."""
    with contextlib.suppress(ValueError):
        if SHORTEST <= 60 * float(text) <= LONGEST:
            return float(text)
    reason = '%r is not a number of minutes between %g and %d (10 years)' % (
        text, SHORTEST / 60, LONGEST // 60)
    raise argparse.ArgumentTypeError(reason)


def days_option(text: str) -> float:
    """Parse a number of days; 0 means none."""
    with contextlib.suppress(ValueError):
        if 0 <= 86400 * float(text) <= LONGEST:
            return float(text)
    most = LONGEST // 86400
    raise argparse.ArgumentTypeError('%r is not a number of days between 0 and %d' % (text, most))


def find_hours(start: Optional[str], stop: Optional[str], end: Optional[str]) -> Optional[Hours]:
    """Return the hours of service that options describe. Raises ValueError if they are
    inconsistent."""
    if start is None and stop is None and end is None:
        return None
    if start is None or (stop is None and end is None):
        raise ValueError(
            '--service-start needs --service-stop, --service-end or both, and they need it')
    minutes = []
    for text in (start, stop, end):
        if text is not None:
            minute = int(text[:2]) * 60 + int(text[3:])
        else:
            minute = None
        minutes.append(minute)
    hours = Hours(minutes[0] or 0, minutes[1], minutes[2])
    if hours.start in (hours.stop, hours.end):
        raise ValueError('the service would stop when it starts, at %s (--service-start)' % start)
    if stop is not None and end is not None:
        phase = hours.phase(minutes[1] or 0)
        if phase is Phase.CLOSED:
            if stop != end:
                raise ValueError('--service-stop %s comes after --service-end %s' % (stop, end))
    return hours


def find_user(name: str) -> User:
    """Return the user that jobs run as. Raises StartError."""
    if not name:
        raise StartError(
            "--user '' names nobody, and jobs would run as root: give a user, or leave --user out")
    if not hasattr(os, 'geteuid') or os.geteuid() != 0:
        raise StartError('--user %s needs a dispynode that is started as root' % name)
    import pwd
    try:
        entry = pwd.getpwnam(name)
    except KeyError as exc:
        text = '--user %s: this host knows no such user' % name
        raise StartError(text) from exc
    if entry.pw_uid == 0:
        raise StartError(
            '--user %s is root, who can read the secret: leave --user out if jobs shall run as root'
            % name)
    return User(name, entry.pw_uid, entry.pw_gid, entry.pw_dir)


FAULT_STATUS = 3
EXIT_STATUSES = '''Exit statuses: 0, it was told to end; 1, it cannot start, and the text says why;
    2, the options are wrong; 3, it was ended by a fault of its own and should be started again.'''


STACKS = 'dispy-stacks'       # the name of the memory into which SIGUSR2 writes stacks


def write_stacks_on_signal() -> None:
    """Let SIGUSR2 write the stacks of all threads, even of a loop that is blocked, to the place
    where `dispy report` finds them: in memory that other processes of this user can open below
    /proc. The main thread must call this. Linux alone supports it."""
    if not hasattr(os, 'memfd_create'):
        return
    import faulthandler
    import fcntl
    try:
        handle = os.memfd_create(STACKS)
        fcntl.fcntl(handle, fcntl.F_SETFL, os.O_APPEND)
        faulthandler.register(signal.SIGUSR2, handle, all_threads=True)
    except OSError as exc:   # no descriptors, or a sandbox without this call
        logger.debug('stacks cannot be written: %s', exc)


class Lifetime:
    """Decides when a node ends by itself: before a time limit, as under Slurm, or after some time
    without jobs. Times are in seconds."""
    APART = 1.0     # s between two looks

    def __init__(self, born: float, limit: float, ahead: float, idle: float, grace: float) -> None:
        """The node was started at `born` and has `limit` seconds. It takes no new jobs for the last
        `ahead` of them, and ends when it has had no jobs for `idle` seconds; jobs have `grace`
        seconds to end. Raises ValueError for inconsistent times."""
        last = max(ahead, grace + LIMIT_MARGIN)
        if limit <= last:
            raise ValueError('--time-limit %g: it has to be more than %g s: --drain-before, or '
                             '--grace and %g s' % (limit, last, LIMIT_MARGIN))
        self._drains_at = born + limit - last
        self._stops_at = born + limit - grace - LIMIT_MARGIN
        self._idle = idle
        self._busy_at = born
        self._is_finishing = False

    @classmethod
    def of_options(cls, args: argparse.Namespace, now: float) -> Optional['Lifetime']:
        """Return the lifetime that the command line describes, or None if there is none. Raises
        ValueError."""
        if args.time_limit is None and args.end_idle is None:
            return None
        limit = args.time_limit or math.inf
        idle = args.end_idle or math.inf
        ahead = args.drain_before
        if ahead is None:
            ahead = min(DRAIN_BEFORE, limit / 2)
        return cls(now, limit, ahead, idle, args.grace)

    def look(self, has_jobs: bool, now: float) -> Any:
        """Return the event that is to be told to the node now, or None."""
        if has_jobs:
            self._busy_at = now
        if now >= self._stops_at:
            self._stops_at = math.inf
            logger.info('its time limit (--time-limit) is near')
            return Stop()
        if self._is_finishing:
            return None
        if now >= self._drains_at:
            logger.info('its time limit (--time-limit) comes nearer')
        elif now - self._busy_at >= self._idle:
            logger.info('it has had no jobs for %g s (--end-idle)', self._idle)
        else:
            return None
        self._is_finishing = True
        return Finish()

    def watch(self, daemon: Daemon) -> None:
        """Call `look` again and again, in the thread of the loop."""
        def look() -> None:
            event = self.look(daemon.node.service.has_jobs, daemon.now)
            if event is not None:
                daemon.tell(event)

        def wake() -> None:
            while True:
                time.sleep(self.APART)
                daemon.call_soon(look)
        threading.Thread(target=wake, daemon=True, name='dispy-lifetime').start()


class ServiceManager:
    """The connection to systemd, if systemd has started this process as a service of Type=notify.
    It reports when the service is ready and, if its unit has WatchdogSec=, again and again that the
    loop of the daemon has its turns. Without systemd nothing is reported."""

    def __init__(self, environment: Any = os.environ) -> None:
        """Removes the variables of systemd from the environment, so that processes which jobs start
        do not report on behalf of this one."""
        self._socket = environment.pop('NOTIFY_SOCKET', '')
        interval = environment.pop('WATCHDOG_USEC', '')
        process = environment.pop('WATCHDOG_PID', str(os.getpid()))
        self._turn = threading.Event()
        self._is_over = threading.Event()
        self.interval: Optional[float] = None   # s within which systemd expects a message
        if interval.isdigit() and process == str(os.getpid()):
            self.interval = int(interval) / 1e6

    def tell(self, text: str) -> None:
        """Send assignments, each on a line, as described in `man sd_notify`."""
        if not self._socket:
            return
        address = self._socket
        if address.startswith('@'):   # an abstract name, not a file
            address = '\0' + address[1:]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(text.encode(), address)
        except OSError as exc:
            logger.warning('systemd cannot be told %r by %s: %s', text, self._socket, exc)

    def ready(self, status: str, call_soon: Callable[[Callable[[], None]], None]) -> None:
        """Report that the service is ready, and begin the watchdog. `call_soon` has the loop call a
        function and may be called from any thread."""
        self.tell('READY=1\nSTATUS=%s' % status)
        if self._socket and self.interval is not None:
            thread = threading.Thread(target=self._watch, args=(call_soon,), daemon=True,
                                      name='dispy-watchdog')
            thread.start()

    def _watch(self, call_soon: Callable[[Callable[[], None]], None]) -> None:
        """Report that the loop has its turns. This runs in a thread of its own, which waits while
        the loop is blocked, so that systemd ends the service."""
        apart = self.interval / 3  # type: ignore[operator]
        while not self._is_over.wait(apart):
            self._turn.clear()
            call_soon(self._turn.set)
            self._turn.wait()
            self.tell('WATCHDOG=1')

    def close(self) -> None:
        """Report that the service ends."""
        self.tell('STOPPING=1')
        self._is_over.set()
        self._turn.set()


def run_until_ended(loop: Loop) -> int:
    """Run the loop of a daemon and close it. Returns the exit status."""
    try:
        loop.run()
    except Exception as exc:  # LoopFailed, or an exception outside of the guarded calls
        loop.log.critical('this daemon has ended because of a fault and has to be started again: '
                          '%s',
                          exc,
                          exc_info=not isinstance(exc, LoopFailed))
        return FAULT_STATUS
    finally:
        loop.close()
    loop.log.info('ended')
    return 0


class Each(argparse.Action):
    """An argparse action like `append`, except that the first use on the command line replaces the
    values of the configuration."""

    def __call__(self,
                 parser: Any,
                 namespace: Any,
                 values: Any,
                 option_string: Optional[str] = None) -> None:
        before = getattr(namespace, self.dest)
        if isinstance(values, str):
            given = [values]
        else:
            given = values
        # `-i "$(hostname -I)"` gives all addresses in one argument
        words = []
        for text in given:
            split = text.split()
            for word in split or [text]:
                words.append(word)
        setattr(namespace, self.dest, words if before is self.default else before + words)


class Obsolete(argparse.Action):
    """An argparse action for an option of dispy 4 that is accepted and has no effect any more; see
    tell_obsolete."""

    def __call__(self,
                 parser: Any,
                 namespace: Any,
                 values: Any,
                 option_string: Optional[str] = None) -> None:
        namespace.obsolete = [*namespace.obsolete, self.option_strings[0]]


# Options of dispy 4 that have no effect, whether they take a value, and what replaces them
OBSOLETE_NODE = {
    '--init': (True, 'give setup= to the cluster'),
    '--unsafe-setup': (False, 'setup() runs in a process of its computation'),
    '--admin-secret': (True, 'there is no dispyadmin'),
}


def accept_obsolete(parser: argparse.ArgumentParser, options: Dict[str, Tuple[bool, str]]) -> None:
    """Let a parser accept options that have no effect."""
    for option, (takes_value, _) in options.items():
        if takes_value:
            nargs = None
        else:
            nargs = 0
        parser.add_argument(option,
                            action=Obsolete,
                            nargs=nargs,
                            dest='obsolete',
                            default=[],
                            help=argparse.SUPPRESS)


def tell_obsolete(args: argparse.Namespace, options: Dict[str, Tuple[bool, str]]) -> None:
    """Log once which of the given options have no effect."""
    for option in dict.fromkeys(args.obsolete):
        logger.info('%s has no meaning any more: %s', option, options[option][1])


class OldConfig:
    """A configuration that dispy 4 has saved: it has one section, [DEFAULT], in which every option
    has a value, including those that were not given."""
    NAMES = {'hosts': '--host', 'ext_hosts': '--ext-host', 'nodes': '--node', 'loglevel': '--debug',
             'dispy_port': '--port', 'node_init': '--init', 'http_server': '--httpd'}
    # (key, value) -> equivalent option, or none
    WORDS = {
        ('safe_setup', 'False'): ['--unsafe-setup'],
        ('safe_setup', 'True'): [],
        ('scheduler_alg', 'fair_cluster'): ['--fair'],
        ('scheduler_alg', 'fcfs_cluster'): ['--fifo'],
        # The default of dispy 4; nodes used the next port, as they do now
        ('dispy_port', '9700'): []
    }
    NOT_GIVEN = frozenset(('', 'None', 'False', '[]', '0', '0.0'))

    @classmethod
    def words(cls, text: str, parser: argparse.ArgumentParser) -> List[str]:
        """Return the equivalent command line. Raises ValueError."""
        import configparser
        found = configparser.RawConfigParser()
        try:
            found.read_string(text)
        except configparser.Error as exc:
            lines = str(exc).splitlines()
            line = lines[0]
            raise ValueError('it is neither JSON nor a file that dispy 4 has saved: %s' %
                             line) from exc
        words: List[str] = []
        for key, value in found.defaults().items():
            words += cls._words_of(key, value.strip(), parser)
        return words

    @classmethod
    def _words_of(cls, key: str, value: str, parser: argparse.ArgumentParser) -> List[str]:
        if (key, value) in cls.WORDS:
            return cls.WORDS[key, value]
        option = cls.NAMES.get(key, '--' + key.replace('_', '-'))
        if value in cls.NOT_GIVEN:
            return []
        if option not in parser._option_string_actions:
            raise ValueError('%r is not an option that can stand there' % key)
        if value == 'True':
            return [option]
        if not value.startswith('['):
            return ['%s=%s' % (option, value)]
        import ast
        try:
            items = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            text = '%s = %.80s is not a list' % (key, value)
            raise ValueError(text) from None
        return ['%s=%s' % (option, item) for item in items]


class OptionParser(argparse.ArgumentParser):
    """The parser of a daemon's command line. The same options may be in a file (--config), which is
    converted into a command line, so that both are checked in the same way."""
    # Type of an option -> types of its values in a JSON file; where none is given here, text.
    JSON_TYPES: Dict[Any, Tuple[type, ...]] = {
        int: (int,), serve_option: (int,), size_option: (int, str), positive_number: (int, float),
        seconds_option: (int, float), minutes_option: (int, float),
        days_option: (int, float)}
    # Options that cannot stand in a file, with those that end in "secret"
    NOT_IN_FILES = frozenset(('help', 'version', 'config', 'save_config', 'embedded', 'obsolete'))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._file = ''    # the file that is being read

    def error(self, message: str) -> NoReturn:
        """End the program because of a wrong option; for one in a file, raise StartError, which
        names the file."""
        if self._file:
            text = '--config %s: %s' % (self._file, message)
            raise StartError(text)
        super().error(message)

    def options_of_files(self) -> Dict[str, argparse.Action]:
        """Return the options that are permitted in a configuration file, by long name."""
        return {
            action.dest.replace('_', '-'): action
            for action in self._actions
            if action.dest not in self.NOT_IN_FILES and not action.dest.endswith('secret')
        }

    def take_defaults(self, path: str) -> None:
        """Use the values in a JSON file, or in a file that dispy 4 has saved, as defaults. Raises
        StartError, naming file and key."""
        try:
            with open(path, encoding='utf-8') as file:
                text = file.read()
            if text.lstrip().startswith('[DEFAULT]'):
                words = OldConfig.words(text, self)
            else:
                words = self._words_of_json(path, json.loads(text))
        except (OSError, ValueError, RecursionError) as exc:
            raise StartError('--config %s cannot be read: %s' % (path, exc)) from exc
        self._file = path
        try:
            given = self.parse_args(words)
        finally:
            self._file = ''
        self.set_defaults(**{name: value for name, value in vars(given).items()
                             if value != self.get_default(name)})

    def _words_of_json(self, path: str, found: Any) -> List[str]:
        """Return the command line that is equivalent to a JSON file."""
        if not isinstance(found, dict):
            raise StartError('--config %s: it holds no {"option": value, ...}' % path)
        known = self.options_of_files()
        words: List[str] = []
        for key, value in found.items():
            action = known.get(key.replace('_', '-'))
            if action is None:
                raise StartError('--config %s: %r is not an option that can stand '
                                 'there' % (path, key))
            text = self._wrong_type(action, value)
            if text:
                raise StartError('--config %s: %s %s' % (path, key, text))
            words += self._words_of_value(action, value)
        return words

    def _wrong_type(self, action: argparse.Action, value: Any) -> str:
        """Return why a value of a JSON file has the wrong type for an option; empty if the type is
        right."""
        if isinstance(action, Each):
            kinds: Tuple[type, ...] = (list,)
            right = all(isinstance(item, str)
                        for item in (value if isinstance(value, list) else [value]))
        elif action.nargs == 0:
            kinds = (bool,)
            right = isinstance(value, bool)
        else:
            kinds = self.JSON_TYPES.get(action.type, (str,))
            right = isinstance(value, kinds) and not isinstance(value, bool)
        if right:
            return ''
        names = ' or '.join(kind.__name__ for kind in kinds)
        return 'may not be %.100r: %s is wanted' % (value, names)

    @staticmethod
    def _words_of_value(action: argparse.Action, value: Any) -> List[str]:
        """Return the words of the command line that give an option this value."""
        option = next(option for option in action.option_strings if option.startswith('--'))
        if isinstance(value, bool):
            return [option] * value
        if isinstance(value, list):
            return ['%s=%s' % (option, item) for item in value]
        return ['%s=%s' % (option, value)]


def save_config(parser: OptionParser, args: argparse.Namespace, path: str) -> None:
    options = {name: getattr(args, action.dest)
               for name, action in parser.options_of_files().items()}
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(
            {
                name: value
                for name, value in options.items()
                if value not in (None, '', []) and value is not False
            },
            file,
            indent=2)
        file.write('\n')


def parse_arguments(parser: OptionParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of a daemon together with the file that it may name. Raises StartError
    for the file."""
    argv = [
        arg.partition('=')[0].replace('_', '-') +
        ''.join(arg.partition('=')[1:]) if arg.startswith('--') else arg for arg in argv
    ]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument('--config')
    known_args = first.parse_known_args(argv)
    path = known_args[0].config
    if path is not None:
        parser.take_defaults(path)
    return parser.parse_args(argv)


def daemon_parser(prog: str, description: str, epilog: str) -> OptionParser:
    """Return a parser with the first of the options that a node and a scheduler have in common;
    `add_daemon_options` adds the others after their own options."""
    parser = OptionParser(prog=prog, description=description, epilog=epilog)
    parser.add_argument('-d', '--debug', action='store_true', help='log what is done in detail')
    parser.add_argument('-i', '--host', '--ip-addr', action=Each, metavar='ADDR',
                        help='address to listen at; may be repeated (default: all)')
    return parser


def add_daemon_options(parser: OptionParser, obsolete: Dict[str, Tuple[bool, str]]) -> None:
    """Add the last of the options that a node and a scheduler have in common. `obsolete` are those
    of dispy 4 that are accepted and have no effect any more."""
    add = parser.add_argument
    add('--max-file-size', type=size_option, metavar='N[kmgt]',
        help='larger files, of programs and of jobs, are refused (default: no limit)')
    text = ('larger arguments and results of jobs are refused, as are those for which '
            'there is no room (default and most: %d GiB)' % (VALUE_MOST >> 30))
    add('--max-value', type=size_option, default=VALUE_MOST, metavar='N[kmgt]', help=text)
    add('--log-file', metavar='FILE', help='write the log to this file instead of to stderr')
    add('--daemon', action='store_true', help='never use the terminal, and outlive it')
    add('--clean', action='store_true',
        help='remove what earlier runs have left in the directory')
    add('--config', metavar='FILE',
        help='read options from this JSON file; the command line overrides it')
    add('--save-config', metavar='FILE',
        help='write these options, without secrets, to a JSON file, and end')
    version = '%(prog)s ' + __version__
    add('--version', action='version', version=version)
    accept_obsolete(parser, obsolete)


NODE_EPILOG = '''dispy 4's spellings with underscores are understood. --config knows every long
    option but the secret, as {"cpus": 4, "host": ["::1"]}. ''' + EXIT_STATUSES


def make_parser() -> OptionParser:
    parser = daemon_parser('dispynode', 'Run jobs of dispy clients on this host.', NODE_EPILOG)
    add = parser.add_argument
    add('-c',
        '--cpus',
        type=int,
        metavar='N',
        help='CPUs to offer; negative: leave this many free (default, and 0: all)')
    add('--ext-host',
        '--ext-ip-addr',
        action=Each,
        metavar='ADDR',
        help='address by which others reach this host, if it is a different one (NAT); may be '
             'repeated')
    add('-p',
        '--port',
        '--node-port',
        '--dispy-port',
        type=int,
        default=NODE_PORT,
        metavar='N',
        help='TCP and UDP port; 0: any (default: %(default)s)')
    add('--scheduler-host',
        '--scheduler-node',
        action=Each,
        default=[],
        metavar='HOST[:PORT]',
        help='connect to this scheduler, or client that listens (host=), and keep trying: for '
        'nodes that cannot be reached; may be repeated (port: %d)' % SCHEDULER_PORT)
    add('--scheduler-port', type=int, default=SCHEDULER_PORT, metavar='N',
        help='port of a --scheduler-host for which none is given (default: %(default)s)')
    add('--ipv4-udp-multicast',
        action='store_true',
        help='answer at the multicast group %s too' % GROUP4)
    add('--name', default='', help='name to show (default: host name)')
    add('--dest-path-prefix', default='', metavar='DIR', help='directory for files of computations')
    add('-s', '--secret', help='the secret; it can be seen in the list of processes, so better:')
    add('--secret-file',
        metavar='FILE',
        help='file with the secret (default: %s)' % secret_path().replace('%', '%%'))
    add('--certfile',
        metavar='FILE',
        help='certificate for TLS; clients need one that this file verifies')
    add('--keyfile', metavar='FILE', help="the certificate's key, if not in the same file")
    text = ('started as root: run jobs as this user, who cannot read the secret; of the '
            'environment they get %s and what begins with %s' %
            (', '.join(KEPT_VARIABLES), ', '.join(KEPT_BEGINNINGS)))
    add('--user', metavar='NAME', help=text)
    add('--service-start',
        type=_time_of_day,
        metavar='HH:MM',
        help='take jobs from this time of day on')
    add('--service-stop',
        type=_time_of_day,
        metavar='HH:MM',
        help='take no new jobs from this time of day on')
    add('--service-end',
        type=_time_of_day,
        metavar='HH:MM',
        help='end what still runs at this time of day')
    add('--grace',
        type=seconds_option,
        default=GRACE,
        metavar='S',
        help='seconds that jobs have to end after they were interrupted because the node is '
        'stopped; then they are killed (default: %(default)g)')
    add('--serve', type=serve_option, metavar='N',
        help='end after this many clients (default, and 0 or less: never)')
    add('--client-shutdown',
        action='store_true',
        help="end after a client that calls its cluster's shutdown()")
    add('--force-cleanup',
        action='store_true',
        help='remove the files of a client also if it gives cleanup=False')
    add('--zombie-interval',
        type=minutes_option,
        metavar='MIN',
        help='minutes that results wait here for a client that is gone (default: %g)' %
        (ZOMBIE_TIME / 60))
    add('--msg-timeout',
        type=seconds_option,
        default=HANDSHAKE_TIME,
        metavar='S',
        help='seconds for a handshake (default: %(default)g)')
    add('--ping-interval',
        type=seconds_option,
        metavar='S',
        help='seconds between searches for clients')
    add('--start-method',
        choices=(FORK, SPAWN),
        help='how worker processes are started for clients that do not say: fork, after '
        'the computation was loaded and its setup has run once, or spawn: anew, and '
        'each loads the computation and runs its setup (default: what '
        'DISPY_START_METHOD in the environment says, otherwise fork on Linux and '
        'spawn elsewhere)')
    add('--resource',
        action=Each,
        default=[],
        metavar='NAME=N',
        help='offer N units of what jobs ask for by this name (dispy_resources), such as '
             'licence=2; gpu=N or gpu=auto: devices, of which each job sees its own in '
             'CUDA_VISIBLE_DEVICES; may be repeated')
    add('--python',
        action=Each,
        default=[],
        metavar='NAME=PATH',
        help='another Python that jobs may run on (JobCluster: python=), such as bin/python of a '
        'virtual environment; may be repeated')
    add('--memory', type=size_option, metavar='N[kmgt]',
        help='bytes of memory that jobs may reserve together (default: what the host or its '
        'cgroup has)')
    add('--time-limit', type=seconds_option, metavar='S',
        help='seconds after which the host is taken away, as by Slurm: the node ends before that '
        'by itself')
    add('--drain-before', type=seconds_option, metavar='S',
        help='with --time-limit: take no new jobs during this many seconds before it, and end when '
             'none is left (default: %g)' % DRAIN_BEFORE)
    add('--end-idle', type=seconds_option, metavar='S',
        help='end after this many seconds without jobs')
    # Started by a client: see _embedded
    add('--embedded', action='store_true', help=argparse.SUPPRESS)
    add_daemon_options(parser, OBSOLETE_NODE)
    return parser


class LogFormatter(logging.Formatter):
    """Formats lines of the log, which contain names and texts that others have sent: control
    characters in these are escaped, so that they can neither begin a line of their own nor control
    the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).splitlines()
        return '\n  '.join(map(printable, lines))


class PrivateFileHandler(logging.handlers.WatchedFileHandler):
    """A handler whose log file is readable for nobody else if it is created here."""

    def _open(self) -> Any:
        is_new = not os.path.exists(self.baseFilename)
        os.close(os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT, 0o600))
        if is_new:
            keep_private(self.baseFilename)
        return super()._open()


def set_up_log(name: str, debug: bool, log_file: Optional[str]) -> None:
    """Set up the log of a daemon: one line for each event, to stderr or a file."""
    if log_file:
        handler: logging.Handler = PrivateFileHandler(log_file, encoding='utf-8')
    else:
        handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter('%(asctime)s %(name)s %(levelname)s: %(message)s'))
    log = logging.getLogger(name)
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    log.propagate = False


def host_and_port(text: str, port: int) -> Tuple[str, int]:
    """Parse HOST, HOST:PORT or [IPv6]:PORT. Raises ValueError, naming what is wrong."""
    import ipaddress
    host, colon, given = text.rpartition(':')
    if not colon or (':' in host and not host.endswith(']')):   # no port, or bare IPv6
        host = text
        given = str(port)
        if colon and '*' not in text:
            try:
                ipaddress.IPv6Address(text.partition('%')[0].strip('[]'))
            except ValueError:
                raise ValueError('%r is not HOST or HOST:PORT' % text) from None
    if not host.strip('[]') or any(map(
            str.isspace, host)) or not given.isdigit() or not 1 <= int(given) <= 65535:
        raise ValueError('%r is not HOST or HOST:PORT' % text)
    return host.strip('[]'), int(given)


def own_host(word: str) -> str:
    """Return the address that a word for an address of this host means: itself, or the address of
    the interface that it names. Raises StartError."""
    # There are no names without psutil
    interfaces = ask_psutil(lambda psutil: psutil.net_if_addrs()) or {}
    families = (socket.AF_INET, socket.AF_INET6)
    interface = interfaces.get(word, ())
    items = [item for item in interface if item.family in families]
    for item in sorted(items, key=lambda item: (families.index(item.family), '%' in item.address)):
        return str(item.address).partition('%')[0]
    try:
        return str(socket.getaddrinfo(word, None, 0, socket.SOCK_STREAM)[0][4][0]).partition('%')[0]
    except OSError as exc:
        text = ('%s is not an address, name or interface of this host: %s (-i/--host, '
                '--ext-host)' % (word, exc))
        raise StartError(text) from exc


def own_hosts(words: Sequence[str]) -> Tuple[str, ...]:
    """Return the addresses to listen at, each once. A wildcard address means all addresses of both
    families, as does an empty list; it is not advertised, because a peer that dials it reaches
    itself. Raises StartError."""
    import ipaddress
    addresses = dict.fromkeys(own_host(word) if word else '' for word in words)
    if any(not address or ipaddress.ip_address(address).is_unspecified for address in addresses):
        return ('',)
    return tuple(addresses)


def forget_secret() -> None:
    """Remove the secret from the environment after it was read, so that jobs find it neither in
    their environment nor in that of this process."""
    if os.environ.pop('DISPY_SECRET', None) is not None:
        # /proc/PID/environ shows the environment of the start, and belongs to root from now on
        _prctl(_libc(), _PR_SET_DUMPABLE, 0)


# With --user, jobs get only these of the variables of root, who has started the daemon, and those
# with these prefixes.
KEPT_VARIABLES = ('PATH', 'LANG', 'LANGUAGE', 'TZ', 'LD_LIBRARY_PATH', 'VIRTUAL_ENV',
                  'DISPY_DISCOVERY')
KEPT_BEGINNINGS = ('LC_', 'PYTHON', 'CUDA_', 'OMP_', 'MKL_', 'OPENBLAS_', 'NUMEXPR_')


def clear_environment() -> None:
    """Remove variables from the environment that are not for jobs of another user."""
    for name in list(os.environ):
        if name in KEPT_VARIABLES:
            continue
        if not name.startswith(KEPT_BEGINNINGS):
            del os.environ[name]


def _embedded(daemon: Daemon) -> None:
    """End the node when its stdin ends: the client that started it has ended, in whatever way.
    Stdin is read as in `read_commands`."""
    while os.read(0, 4096):
        continue
    daemon.post(Stop())
    daemon.post(Stop())


def parse_command(line: str) -> Any:
    """Return the event that a line at the prompt requests. Raises ValueError for an invalid number
    of CPUs."""
    words = line.split()
    if words[:1] == ['cpus']:
        if len(words) != 2 or not words[1].lstrip('-').isdigit():
            raise ValueError('N in the command "cpus N" must be a number')
        wanted = int(words[1])
        return SetCpus(count_cpus(wanted))
    pause = Pause('operator', 'its operator has stopped it')
    resume = Resume('operator')
    return {'quit': Stop(), 'stop': pause, 'start': resume, 'release': Release(),
            'finish': Finish()}.get(line.strip(), Status())


PROMPT = 'commands: quit, stop, start, cpus N, release, finish; anything else shows the status'


def read_commands(told: str, take: Callable[[str], None]) -> None:
    """Pass the lines from the terminal to `take`, until the terminal is closed; this runs in a
    thread of its own. `told` lists the commands that are permitted, and so does the ValueError for
    a line that is not. Lines are read with os.read: a thread that waits in sys.stdin holds a lock
    that the interpreter needs when it ends."""
    rest = b''
    print(told, flush=True)
    while True:
        try:
            data = os.read(0, 4096)
        except OSError:   # the terminal is closed, or belongs to another process
            return
        if not data:
            return
        *lines, rest = (rest + data).split(b'\n')
        for line in lines:
            try:
                take(line.decode('utf-8', 'replace'))
            except ValueError as exc:
                print(exc, flush=True)


def _standard_files() -> None:
    """Open the null device for each of the descriptors 0, 1 and 2 that is closed, so that no socket
    gets such a number."""
    handle = os.open(os.devnull, os.O_RDWR)
    while handle <= 2:
        os.set_inheritable(handle, True)
        handle = os.open(os.devnull, os.O_RDWR)
    os.close(handle)
    for name, number in (('stdout', 1), ('stderr', 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, 'w', closefd=False))


# SIGBREAK is for Windows; it also comes when the window is closed
ENDING_SIGNALS = ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGBREAK')


def _on_signals(daemon: Daemon, stay: bool) -> None:
    """Install handlers: SIGTERM, SIGINT and the end of the terminal end the node, unless it is to
    outlive the terminal; SIGUSR1 ends it when it has no jobs any more. Handlers are installed and
    no signal is ignored, because programs that jobs start would inherit that."""
    for name in ENDING_SIGNALS:
        number = getattr(signal, name, None)
        # As with nohup
        if number is None:
            continue
        if name != 'SIGHUP' or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, (lambda number, frame: None) if name == 'SIGHUP' and stay else
                          lambda number, frame: daemon.post(Stop()))
    if hasattr(signal, 'SIGUSR1'):
        def finish(number: int, frame: Any) -> None:
            daemon.post(Finish())

        signal.signal(signal.SIGUSR1, finish)
    if os.getpid() != 1:
        return
    if hasattr(os, 'waitid'):
        signal.signal(signal.SIGCHLD, lambda number, frame: daemon.post(ChildEnded()))
        daemon.post(ChildEnded())


def _find_secret_of(args: argparse.Namespace) -> bytes:
    """Return the secret, which jobs must not find. A client that has started this node writes the
    secret to stdin."""
    if args.embedded:
        logger.setLevel(logging.DEBUG if args.debug else logging.ERROR)
        secret = sys.stdin.buffer.readline().strip()
    else:
        secret = find_secret(args.secret, args.secret_file)
    if args.secret and not args.embedded:
        logger.warning(
            '-s/--secret can be read by every user of this host (ps): --secret-file is better')
    forget_secret()
    return secret


def _make_ready_for(user: Optional[User]) -> None:
    """Prepare the environment and groups of this process for jobs that run as this user. With None,
    jobs run as the user who started the node, and a warning is logged if that is root."""
    if user is not None:
        clear_environment()   # jobs, which inherit the environment, must not get root's
        os.initgroups(user.name, user.gid)
    elif hasattr(os, 'geteuid'):
        if os.geteuid() == 0:
            logger.warning('jobs run as root and can read the secret: --user NAME lets them run '
                           'as another user')


def _options_of(args: argparse.Namespace, cpus: int, hours: Optional[Hours],
                schedulers: Tuple[Tuple[str, int], ...]) -> Options:
    """Return the options of the command line, part of which has been parsed already, and set up the
    log."""
    set_up_log('dispynode', args.debug, args.log_file)
    tell_obsolete(args, OBSOLETE_NODE)
    limit_values(args.max_value)
    tls_files(args.certfile, args.keyfile, None, '--%s')
    if args.user is not None:
        user = find_user(args.user)
    else:
        user = None
    if importlib.util.find_spec('psutil') is None:
        _tell_without_psutil('this Python')
    secret = _find_secret_of(args)
    _make_ready_for(user)
    port = own_hosts(args.host or ('', ))
    return Options(cpus, port, args.port, args.name, args.dest_path_prefix, secret,
                   args.certfile, args.keyfile, args.clean, args.embedded,
                   tuple(map(own_host, args.ext_host or ())), schedulers, args.ipv4_udp_multicast,
                   'off' if args.embedded else discovery_reach(), args.ping_interval, user, hours,
                   args.serve or 0, args.client_shutdown, args.max_file_size or sys.maxsize,
                   60 * args.zombie_interval if args.zombie_interval else ZOMBIE_TIME,
                   args.msg_timeout, args.force_cleanup, args.start_method
                   or default_start_method(), grace=args.grace,
                   offer=find_offer(args.resource), interpreters=find_interpreters(args.python),
                   memory=args.memory)


def listen_at_terminal(told: str, take: Callable[[str], None]) -> None:
    """Start the thread that reads what the operator of a daemon types at its terminal; see
    `read_commands`. The main thread must call this."""
    if hasattr(signal, 'SIGTTIN'):
        # In the background, reading fails instead of stopping the daemon
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    threading.Thread(target=read_commands, args=(told, take), daemon=True).start()


def _listen_to_stdin(daemon: Daemon, args: argparse.Namespace, port: int,
                     has_terminal: bool) -> None:
    """Start a thread that reads stdin, which the client that has started this node writes, or its
    operator."""
    if args.embedded:
        print(port, flush=True)
        threading.Thread(target=_embedded, args=(daemon,), daemon=True).start()
    elif has_terminal and not args.daemon:
        listen_at_terminal(PROMPT, lambda line: daemon.post(parse_command(line)))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the daemon. Returns its exit status: see EXIT_STATUSES."""
    has_terminal = sys.stdin is not None and sys.stdin.isatty()
    manager = ServiceManager()
    _standard_files()
    try:
        parser = make_parser()
        args = parse_arguments(parser, sys.argv[1:] if argv is None else argv)
        try:
            cpus = count_cpus(args.cpus or None)
            hours = find_hours(args.service_start, args.service_stop, args.service_end)
            host_and_ports = []
            for text in args.scheduler_host:
                host_and_ports.append(host_and_port(text, args.scheduler_port))
            schedulers = tuple(host_and_ports)
            lifetime = Lifetime.of_options(args, time.monotonic())
        except ValueError as exc:
            parser.error(str(exc))
        if args.save_config:
            save_config(parser, args, args.save_config)
            return 0
        options = _options_of(args, cpus, hours, schedulers)
        daemon = Daemon(options)
        port = daemon.start()
    except (StartError, SecretError, OSError, ValueError) as exc:
        print('dispynode: %s' % exc, file=sys.stderr)
        return 1
    _on_signals(daemon, args.daemon)
    write_stacks_on_signal()
    daemon.wake_on_signals()
    if args.daemon and not args.embedded:
        leave_terminal()
    logger.info('%s serves %d CPU%s at port %d, PID %d', daemon.node.name, cpus, 's' * (cpus != 1),
                port, os.getpid())
    _listen_to_stdin(daemon, args, port, has_terminal)
    if lifetime is not None:
        lifetime.watch(daemon)
    manager.ready('%d CPUs at port %d' % (cpus, port), daemon.call_soon)
    try:
        return run_until_ended(daemon)
    finally:
        manager.close()
