#!/usr/bin/env python3
"""Run a Python function or a program over many inputs on all CPUs of one machine or of many.

    import dispy
    cluster = dispy.JobCluster(compute)          # any function; or the path of a program
    jobs = [cluster.submit(n) for n in range(100)]
    for job in jobs:
        print(job(), job.ip_addr)                # waits; if it failed, None: see job.exception
    cluster.close()

Without nodes on the network this program is a node itself. For others, copy `dispynode.py` and
the secret (~/.config/dispy/secret) to them and run `python dispynode.py` there; `python -m dispy
deploy HOST...` does it by ssh.

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

One driver serves all clusters of a program that have the same secret and certificate. It owns every
link and the Schedule; other threads post to it. A link carries everything between this program and
a node. The embedded node (EmbeddedNode) has its turns in the driver's thread, and its link is in
memory; all else is as with other nodes.

The program has a JobCluster. Its driver knows a ProgramCluster, which has a part for each
responsibility: options, book of jobs, submitter, callbacks, output, delivery of results, commands
to nodes, takeover of jobs.

The life of a job here:
  1. `submit` pickles the arguments, makes a DispyJob, counts it as pending and posts it.
  2. The driver gives all that was posted since its last turn to the Schedule, which queues it.
  3. The Schedule sends attempts to nodes with free CPUs, and a little more than that: as much as
     the node will have done in 100 ms. What a node does not come to is called back when another is
     idle, or when jobs turn out to be longer. A node tells which have begun (`Started`); until then
     they are Created to the user.
  4. `Results` of a node are acknowledged, also if they are known already. Plain values are opened
     at once; what may run the user's code when it is unpickled goes through an opener thread.
  5. The job gets result, output, times and, last, its status; whoever waits is woken; the callback
     is called.
  6. When a node is lost, its jobs are queued again if the computation is reentrant; otherwise they
     are Abandoned.

Files this program needs: this one, dispynode.py, cloudpickle.
"""

if __name__ == '__main__':
    # The module is run once more under its own name, so that classes have one identity. Here, and
    # not at the end: all that follows would be made for nothing. The code is compiled already;
    # where no byte code can be kept, to compile it again takes longer than all imports.
    import importlib.util
    import os
    import sys
    if __spec__ is None:   # not run by -m
        spec = importlib.util.spec_from_file_location('dispy', os.path.abspath(__file__))
    else:
        spec = importlib.util.find_spec('dispy')
    program = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules['dispy'] = program
    try:
        exec(sys._getframe().f_code, vars(program))
    except ImportError as exc:   # a file or a package that it needs is not there
        sys.exit(str(exc))
    sys.exit(program.main())

import argparse
import ast
import atexit
import base64
import bisect
import builtins
import collections
import collections.abc
import concurrent.futures
import contextlib
import copy
import copyreg
import dataclasses
import dis
import enum
import errno
import functools
import glob
import hashlib
import heapq
import importlib.machinery
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import linecache
import logging
import math
import multiprocessing
import os
import numbers
import operator
import pickle
import pkgutil
import platform
import queue
import re
import reprlib
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import types
import uuid
import warnings
import weakref
import zlib
from typing import (
    AbstractSet, Any, Callable, Collection, Container, Deque, Dict, FrozenSet, Iterable, Iterator,
    List, Mapping, NamedTuple, NoReturn, Optional, Sequence, Set, Tuple, Type, Union)

try:
    import cloudpickle
    import dispynode
    from dispynode import Loop
except ImportError as exc:   # this file was copied alone, or beside one of another release
    missing = {
        'dispynode': 'dispy.py needs the file dispynode.py of the same release beside it, in %s' %
        os.path.dirname(os.path.abspath(__file__)),
        'cloudpickle': 'dispy.py needs the package cloudpickle: run %s -m pip install cloudpickle' %
        sys.executable,
    }.get(exc.name or '', '')
    if missing:
        text = '%s (%s)' % (missing, exc)
    else:
        text = str(exc)
    raise ImportError(text, name=exc.name, path=exc.path) from exc

try:
    from concurrent.futures.process import BrokenProcessPool
except ImportError:   # a system without semaphores
    from concurrent.futures import BrokenExecutor as BrokenProcessPool  # type: ignore[assignment]

from dispynode import ASKED_FOR, ATOMS, BRING_BACK, BUNDLE, BUNDLES, FILES_LEFT
from dispynode import FORK, GRACE, HANDSHAKE_TIME, KEEPING_FILES, LAZY, MAX_LIST, MESSAGES, MODULES
from dispynode import NAMES_MOST, NODE_PORT, OUT_OF_BAND, OUTCOMES, PAYLOAD, PROVISIONAL, PULSE
from dispynode import PULSES_LOST, PULSES_SILENT, REASONS, RESOURCE_NAME, RETURNED, ROW_FIRST
from dispynode import RUN_BY_PYTHON, RUN_IN, SCHEDULER_PORT, SEGMENT, SHARED_FROM, SPAWN, STACKS
from dispynode import STALLS, TEXTS, UNITS_MOST, VALUE_MOST, WHOLE_MOST, WRITES
from dispynode import Acceptor, Ack, Allowance, AttemptHistory, Authenticated, Bye, Call, Calls
from dispynode import Cancel, ClientHello, CommandLines, Compute, Connected, ConnectFailed
from dispynode import ConnectionAttempt
from dispynode import CpusChanged, Datagram, DatagramType, DirectoryRemains, Discovery
from dispynode import DiscoverySockets, DispyError, Done, DurationEstimate, Each, FilePiece
from dispynode import FileReceiver, FileStored, HandshakeError, Holder, Jobs, JobsReturned
from dispynode import KnownAttempts
from dispynode import Limit, Link, LinkBroken, Listed, MemoryLink, Need, NodeHello, NodeHost, Notice
from dispynode import Offer, OldModules, Options, Outcome, Output, PeerError, Pulse, Purpose, Query
from dispynode import Ready, Reclaim, Reconnector, RecordLog, Refused, Report, Request, Results
from dispynode import Return, ReturnJobs
from dispynode import Role, Sealed, SecondConnection, SecretError, Shutdown, SpoolSender, Started
from dispynode import StartError, StateRow, Stop, Unreached, Wrong
from dispynode import __version__, add_messages, available_cpus, batches, build_tag, call_chunk
from dispynode import check_name, check_not_importing, contents_of, default_directory
from dispynode import default_start_method, derive_key, describe_exception, dial
from dispynode import digest_of, discovery_reach, dumps, exit_text, file_digest, find_named
from dispynode import Failing, failure_to_connect, find_offer, find_secret, format_address
from dispynode import globals_of, has_place, host_and_port, in_one_piece, in_parts, is_comp
from dispynode import is_named, is_outcome, is_own_address, is_request, is_serial, job_number
from dispynode import keep_private, keeps_identity, loads, lock_file, log_record_of, machine
from dispynode import module_dict, move_below, offer_to_joblib, open_pieces, open_plain
from dispynode import open_regular, others_who, out_of_band, private_again
from dispynode import pack_error, package_version, path_option, plain_form, plain_text
from dispynode import process_start_lock, python_of, pythons_text, read_secret
from dispynode import remove_abandoned_directory
from dispynode import run_batch, same_secret, seconds_option, secret_path, set_numerical_threads
from dispynode import shared_payload, size_of, size_option, start_of, take_lock, tls_context
from dispynode import attempt_number, tls_files, unpack_error, value_pickler, with_needs
from dispynode import serial_of, write_private

__all__ = [
    'JobCluster', 'SharedJobCluster', 'recover_jobs', 'fault_recover_jobs', 'NothingToRecover',
    'recoverable', 'Recoverable', 'NodeAllocate', 'DispyExecutor', 'register_joblib', 'DispyJob',
    'ValueRef', 'JobFailed', 'WorkerLost', 'RemoteTraceback', 'DispyNode', 'DispyNodeAvailInfo',
    'ClusterStatus', 'NoNodes', 'DispyError', 'SecretError', 'logger'
]

# --------------------------------------------------------------------------------------------------
# Constants and errors
# --------------------------------------------------------------------------------------------------

QUEUED_TIME = 0.1             # s of work that a node may hold beyond what runs
# Jobs a CPU that a node may hold beyond what it runs, however short they are
AHEAD_MOST = 512
# Further rounds of jobs that end unheard, for each QUEUED_TIME of a round trip
ROUNDS_FAR = 1
TURN_TIME = 0.005            # s that a node and a schedule take beyond the round trip between them
JOURNAL_MOST = 900 << 20      # bytes of arguments, or of a result, that a recovery file holds
AHEAD_BYTES = 8 << 20        # bytes of arguments that a node may hold beyond what it runs
SHARED_ARGS_MOST = 15 << 20   # bytes of setup_args that go by way of a scheduler
DIALS_MOST = 64               # nodes that are dialled at the same time
NODES_PAGE = 500              # nodes of a scheduler in one answer
# Times a job is called back for reasons of the schedule; then it is sent to idle CPUs only
RECALLS_MOST = 2
# Jobs that must have ended before one that runs is started a second time, and how many times their
# median it must have run by then
SPECULATE_AFTER = 10
SPECULATE_TIMES = 2
DURATIONS_KEPT = 1000         # of jobs that have ended last, for this median
NO_INITIALIZER = 'no node can run the initializer of the executor'
END_WITHOUT_NODES = 30.0      # s for which a program's end waits for calls while no node is ready
WITHDRAW_TIME = 1.0           # s for which the cancel of a future waits for the answer of a node
AHEAD_A_TURN = 4000                # jobs that are sent to queues on nodes in one turn of the loop
RETURN_APART = 2.0                 # s between two nodes that come back one after the other
RETURN_EACH = 0.1                  # s that the last may take longer for each node that there is
MAX_LOST_NODES = 3                 # nodes a job may be lost with before it is given up
# Times it may be lost, with however few of them: a node that is started again is the same node
MAX_ATTEMPTS = 16
# CPUs in the mean of the past below which the use of a user is forgotten
PAST_LEAST = 0.001
# Seconds after which half of what a user has had counts beside what he has now. Without it parts of
# CPUs would be lost: of 6 CPUs, shares of 3 and 1 would be 4 and 2 for ever
RECENT_TIME = 60.0
RECENT_APART = 0.1            # s between two looks at what users have had
# Seconds for which a node that was found by IPv6 may answer by IPv4, which people expect to see
IPV6_LATER = 0.1
SURVEY_TIME = 2.0             # s for which answers to a question to all are waited for
PROBE_TIME = 1.0              # s that nodes=None waits for a dispynode before it starts one
PROGRESS_EVERY = 1.0          # s between lines of progress
LEAVE_TIME = 3.0              # s that a program that has failed waits for jobs on their way
SHOWN_MOST = 50               # arguments of a job that are shown, and rows of a table in a notebook
REASON_MOST = 300             # characters of the line that says why a job failed
# Seconds without a usable node
WARN_AFTER = 5.0
WARN_EVERY = 60.0
# Seconds between attempts to reach a node, doubling
REDIAL_FIRST = 0.5
REDIAL_MOST = 30.0
LAST_TRY = 0.1                # s before the jobs on a node are lost, when it is tried once more
# An attempt to reach a node takes at most so many times its patience: for its name, the connection
# and the handshake
TRY_TIMES = 3
FOUND_FAILURES = 5            # attempts after which a node that was found, not named, is forgotten
# Seconds between the first two questions by UDP, doubling up to ping_interval
ASK_FIRST = 0.2
# Seconds until a computation is offered again to a node that could not take it, doubling
RETRY_FIRST = 0.1
RETRY_MOST = 30.0
# Seconds that nodes are tried which keep results that need not be kept any more
FORGET_TIME = 3.0
# Seconds that a question to the driver may take; its turns take milliseconds
CALL_TIME = 30.0
# Results that wait for their acknowledgement, and s that they do
ACKS_MOST = 256
ACK_AFTER = 0.05
CANCELS_MOST = 1000           # jobs that are cancelled in one turn of the driver
CALLBACK_THREADS = 16         # callbacks that may block at the same time
CALLBACK_TIME = 0.1           # s that callbacks take one after the other before they do so
HTTPD_PORT = 8181             # of the web monitor
REPORTS_APART = 5.0           # s between two questions to a node for what is free there
FAILURES_KEPT = 500           # failed jobs that monitors are told of; older ones are forgotten
FAILURES_PAGE = 100           # of these in one answer
FAILURE_TEXT = 8000           # characters that are kept of the end of a traceback
# Jobs that have ended and that monitors can still show, the bytes of these, and those of the end
# of what a job has printed
ENDED_KEPT = 10000
ENDED_BYTES = 64 << 20
OUTPUT_SHOWN = 4096
ENDED_PAGE = 500              # of these jobs in one answer
ARGUMENTS_MOST = 16384        # bytes of packed arguments that monitors get to show
DEALLOCATED = 'deallocated'   # why a node that is ready is given no jobs, to those who ask
# Seconds of one slice of a wait: Ctrl-C does not end a wait on Windows
FOREVER = 0.5 if os.name == 'nt' else 3600.0

logger = logging.getLogger('dispy')
for _name in ('DEBUG', 'INFO', 'WARN', 'WARNING', 'ERROR', 'CRITICAL', 'FATAL'):
    setattr(logger, _name, getattr(logging, _name))   # scripts for dispy 4 say dispy.logger.DEBUG


class LazyPattern:
    """A regular expression that is compiled when it is used first: most programs need none of
    those here, and `import dispy` would have to compile all. The attributes are those of a compiled
    one."""

    def __init__(self, text: Any, flags: int = 0) -> None:
        self._text = text
        self._flags = flags

    def __getattr__(self, name: str) -> Any:
        value = getattr(re.compile(self._text, self._flags), name)
        setattr(self, name, value)
        return value


class LogToStderr(logging.Handler):
    """Shows messages of dispy.logger from its level up, also those of the program itself, while
    nobody has configured logging, as dispy 4 did. `logging` alone would show only warnings. What
    happens in each program that goes well is shown at levels below INFO."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(
            logging.Formatter('%(asctime)s %(name)s - %(message)s', '%Y-%m-%d %H:%M:%S'))

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        if sys.stderr is None:
            return
        if logger.handlers != [self]:
            return
        if logging.getLogger().handlers:
            return
        is_routine = getattr(record, 'is_routine', False)
        if is_routine and logger.level >= logging.INFO:
            return
        try:
            sys.stderr.write(self.format(record) + '\n')
            sys.stderr.flush()
        except Exception:   # a closed stream, or arguments that do not fit: as logging itself does
            self.handleError(record)


if not any(type(_handler).__name__ == LogToStderr.__name__ for _handler in logger.handlers):
    logger.addHandler(LogToStderr())
_own_level = -1                 # that this module has set; another one is the program's
if logger.level == logging.NOTSET:
    _own_level = logging.INFO   # as in dispy 4
    logger.setLevel(_own_level)
ROUTINE = {'is_routine': True}  # `extra` of messages of what happens in each program


def level_of(loglevel: Any) -> int:
    """Return the parameter `loglevel` as a number. Raises TypeError or ValueError, as logging
    does."""
    number = plain_number(loglevel, True)
    if number is not None:
        return int(number)
    handler = logging.NullHandler()
    handler.setLevel(loglevel)
    return handler.level


def set_log_level(level: int) -> None:
    """Set the level of the logger, as a cluster with this `loglevel` is made. INFO, the default,
    leaves a level that the program itself has set, by `dispy.logger.setLevel()` or by its
    configuration of `logging`."""
    global _own_level
    if level != logging.INFO or logger.level == _own_level:
        _own_level = level
        logger.setLevel(level)


class NothingToRecover(DispyError, FileNotFoundError):
    """`recover_jobs()` without a file has found nothing that this script has left."""


class NoNodes(DispyError):
    """No node can be used; the text names every address tried and every refusal with its reason."""


# --------------------------------------------------------------------------------------------------
# Messages that only a scheduler sends, to programs
# --------------------------------------------------------------------------------------------------

class JobsAssigned(NamedTuple):
    """Scheduler: these jobs are on a node now (address, port, name), begun or not, or wait again
    (empty)."""
    comp: str
    node: tuple
    serials: list


class NodeChanged(NamedTuple):
    """Scheduler: a node has become ready (status 2) or is not any more (3); `node` is a row of
    `NodeQueries.rows_of`."""
    comp: str
    status: int
    node: tuple


SCHEDULER_MESSAGES: Dict[int, Tuple[type, int]] = {
    48: (JobsAssigned, MAX_LIST),
    49: (NodeChanged, MAX_LIST),
}
SCHEDULER_CHECKS: Dict[type, Callable[[tuple], bool]] = {
    JobsAssigned: lambda fields: len(fields[1]) in (0, 3) and all(map(is_serial, fields[2])),
    NodeChanged: lambda fields: len(fields[2]) == 10,
}
add_messages(SCHEDULER_MESSAGES, SCHEDULER_CHECKS)
# What a program takes from the other side of a link
OF_NODES = frozenset(op for op in MESSAGES if op >= 32)


# --------------------------------------------------------------------------------------------------
# Public values
# --------------------------------------------------------------------------------------------------

class JobFailed(DispyError):
    """A job did not finish; the text is its `exception`. Raised by `map` and the executor where the
    job's own exception object is not to be had."""


class WorkerLost(JobFailed, BrokenProcessPool):
    """What ran a job is lost: its worker process was killed or ended itself, its node is lost, or
    what was sent or came back could not be opened. The others go on, and so does an executor,
    unlike one of the standard library, whose exception this is as well."""


class RemoteTraceback(DispyError):
    """The cause of an exception that a job raised: where it did, on the node."""

    @property
    def tb(self) -> str:
        """The traceback, by the name that it has in the standard library."""
        return str(self.args[0])

    def __str__(self) -> str:
        return '\n"""\n%s"""' % self.args[0]


def error_of(job: 'DispyJob') -> BaseException:
    """The exception to raise for a job that failed, with the node's traceback as its cause."""
    if job.error is None:
        told = job.status == JobState.CANCELLED or job.outcome in _OUTCOMES_TOLD
        return (JobFailed if told else WorkerLost)(job.exception)
    job.error.__cause__ = RemoteTraceback(job.exception)
    return job.error


def exit_error(job: 'DispyJob') -> subprocess.CalledProcessError:
    """The exception for a program that has ended with an exit status other than 0."""
    names = []
    for cluster in list(_clusters):
        if core_of(cluster).comp == job.comp:
            names.append(cluster.name)
    if job.failure is not None:
        found = job.failure.values()
    else:
        found = None
    command = [*names, *(['job %s' % (job.id,)] if found is None else map(str, found[0]))]
    return subprocess.CalledProcessError(job.result, command, job.stdout, job.stderr)


# The job's own exception could not travel, or it ended as its options say
_OUTCOMES_TOLD = frozenset((Outcome.RAISED, Outcome.TIMED_OUT))


def result_of(job: 'DispyJob') -> Any:
    """Wait; return the job's result or raise for it."""
    result = job()
    if job.status != JobState.FINISHED:
        raise error_of(job)
    return result


def in_slices(wait: Callable[[float], Any],
              timeout: Optional[float],
              clock: Callable[[], float] = time.monotonic) -> Any:
    """Call `wait(seconds)` again and again until what it returns is true or `timeout` seconds
    of `clock` have passed (None: without limit), and return what it returned last. No call waits
    longer than FOREVER, since on Windows Ctrl-C does not end a wait. All waits of the user's
    threads go through here. Any thread."""
    if timeout is None:
        until = None
    else:
        until = clock() + timeout
    while True:
        if until is None:
            left = FOREVER
        else:
            left = min(FOREVER, until - clock())
        found = wait(max(0.0, left))
        if found:
            return found
        if until is None:
            continue
        if clock() >= until:
            return found


def next_of(ended: 'queue.SimpleQueue[Any]', timeout: Optional[float] = None) -> Any:
    """The next item of a queue. Raises queue.Empty after `timeout` seconds (None: waits without
    limit)."""
    def get(seconds: float) -> Tuple[Any, ...]:
        with contextlib.suppress(queue.Empty):
            return (ended.get(timeout=seconds),)
        return ()
    found = in_slices(get, timeout)
    if not found:
        raise queue.Empty
    return found[0]


def answer_of(future: 'concurrent.futures.Future[Any]', timeout: Optional[float]) -> Any:
    """The future's result, or what it raises; concurrent.futures.TimeoutError after `timeout`
    seconds (None: waits without limit)."""
    in_slices(lambda seconds: concurrent.futures.wait([future], seconds).done, timeout)
    return future.result(0)


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
    SENT = 14         # on a node, not known to have begun; shown as Created


JOB_TABLE: Dict[Tuple[JobState, str], JobState] = {
    (JobState.CREATED, 'send'): JobState.SENT,
    (JobState.REQUEUED, 'send'): JobState.SENT,
    (JobState.SENT, 'start'): JobState.RUNNING,
    (JobState.SENT, 'cancel'): JobState.CANCELLING,
    (JobState.SENT, 'provisional'): JobState.PROVISIONAL,
    (JobState.CREATED, 'cancel'): JobState.CANCELLED,
    (JobState.REQUEUED, 'cancel'): JobState.CANCELLED,
    (JobState.RUNNING, 'cancel'): JobState.CANCELLING,
    (JobState.PROVISIONAL, 'cancel'): JobState.CANCELLING,
    (JobState.RUNNING, 'provisional'): JobState.PROVISIONAL,
    (JobState.PROVISIONAL, 'provisional'): JobState.PROVISIONAL,
    (JobState.CANCELLING, 'provisional'): JobState.CANCELLING,
    (JobState.CREATED, 'give up'): JobState.ABANDONED,
    (JobState.REQUEUED, 'give up'): JobState.ABANDONED,
    (JobState.CREATED, 'fail'): JobState.TERMINATED,
    (JobState.REQUEUED, 'fail'): JobState.TERMINATED,
    (JobState.REQUEUED, 'finish'): JobState.FINISHED,   # it might have been repeated, and is not
}
for _running in (JobState.SENT, JobState.RUNNING, JobState.PROVISIONAL):
    JOB_TABLE[_running, 'finish'] = JobState.FINISHED
    JOB_TABLE[_running, 'fail'] = JobState.TERMINATED
    JOB_TABLE[_running, 'cancelled'] = JobState.CANCELLED
    JOB_TABLE[_running, 'back'] = JobState.REQUEUED
    JOB_TABLE[_running, 'give up'] = JobState.ABANDONED
JOB_TABLE[JobState.CANCELLING, 'finish'] = JobState.FINISHED
JOB_TABLE[JobState.CANCELLING, 'fail'] = JobState.TERMINATED
JOB_TABLE[JobState.CANCELLING, 'cancelled'] = JobState.CANCELLED
JOB_TABLE[JobState.CANCELLING, 'back'] = JobState.CANCELLED
JOB_TABLE[JobState.CANCELLING, 'give up'] = JobState.CANCELLED

ENDED = frozenset((JobState.CANCELLED, JobState.TERMINATED, JobState.ABANDONED, JobState.FINISHED))
FAILED = frozenset((JobState.TERMINATED, JobState.ABANDONED))


class ScheduledJob:
    """What the Schedule knows of a job. These attributes are for this package: who uses a job reads
    those that DispyJob names."""
    __slots__ = ('state', 'comp', 'payload', 'options', 'serial', 'lost_with')

    def __init__(self, comp: str, payload: Any, options: Optional[dict] = None) -> None:
        self.state = JobState.CREATED
        self.comp = comp
        self.payload = payload
        self.options = options
        self.serial = 0          # job number << 16 | number of the attempt; 0 before the first
        self.lost_with: Tuple[str, ...] = ()   # nodes that were lost while it was there


_OF_PROGRAM: Any = object()       # in place of the number of a job
_own_numbers = itertools.count(1)


def of_kind(cls: Any, item: Any, /) -> Any:
    """`DispyJob[int]`, as annotations have it: here it is the class, and type checkers, which read
    dispy.pyi, tell its kinds apart. A types.GenericAlias would be none in Python 3.8, and
    JobCluster[[int], str] could not stand in Optional[...] before Python 3.11."""
    return cls


def packed_plain(args: tuple, kwargs: dict) -> bytes:
    """Arguments of a job that belongs to no cluster. Raises what pickling raises."""
    return in_one_piece(dumps((args, kwargs)).payload)


class ProgramJob(ScheduledJob):
    """What this package knows of a job of the program, beside what its user reads: see DispyJob.

    failure - why it has failed, with what is needed to explain it; else None
    outcome - of the attempt that was its last, if that did not return; else 0
    future - of the call of an executor, until that is settled; else there is none
    """
    __slots__ = ('failure', 'outcome', 'future', 'event', 'when_ended')
    status: int
    failure: 'Optional[Failure]'
    outcome: int
    future: 'DispyFuture'
    event: Optional[threading.Event]
    when_ended: Optional[List[Callable[['DispyJob'], None]]]

    def call_when_ended(self, call: Callable[['DispyJob'], None]) -> None:
        """Call it with the job when that has ended, at once if it has; perhaps twice. Any thread;
        must be quick."""
        with _lock:
            self.when_ended = [*(self.when_ended or ()), call]
        if self.status in ENDED:
            call(self)  # type: ignore[arg-type]

    def wake(self) -> None:
        """The job has ended: whoever waits for it is told."""
        if self.event is not None:
            self.event.set()
        for call in self.when_ended or ():
            call(self)  # type: ignore[arg-type]


class DispyJob(ProgramJob):
    """A job; `submit` makes it. Attributes:

    id - the user's to set; a running number by default
    status - one of the constants below; result, stdout, stderr - when it has ended (output is `str`
        for functions,
        `bytes` for programs); exception - text of the traceback or of what went wrong, else None;
        error - the exception
        itself if it could be pickled, else None
    ip_addr - where it ran, else None; submit_time, start_time, end_time - seconds since the epoch,
        None before that
    arguments - of a cluster with a recover_file, and of what `recover_jobs` returns from one: the
        arguments as text of at
        most 300 characters, also when they are not there any more; else empty
    """
    arguments = ''
    __slots__ = ('id', 'status', 'result', 'stdout', 'stderr', '_exception', '_error', 'ip_addr',
                 'submit_time', 'start_time', 'end_time')

    Created = int(JobState.CREATED)
    Running = int(JobState.RUNNING)
    ProvisionalResult = int(JobState.PROVISIONAL)
    Cancelled = int(JobState.CANCELLED)
    Terminated = int(JobState.TERMINATED)
    Abandoned = int(JobState.ABANDONED)
    Finished = int(JobState.FINISHED)
    __class_getitem__ = classmethod(of_kind)

    def __init__(self, comp: Any, payload: Any, options: Any, number: Any = _OF_PROGRAM) -> None:
        """Of a cluster. A program may make one that belongs to no cluster, as with dispy 4, by
        DispyJob(id, args, kwargs)."""
        if number is _OF_PROGRAM:
            if comp is None:
                number = next(_own_numbers)
            else:
                number = comp
            comp = ''
            payload = packed_plain(tuple(payload), dict(options))
            options = None
        self.state = JobState.CREATED
        self.comp = comp
        self.payload = payload
        self.options = options
        self.serial = 0
        self.lost_with = ()
        self.id = number
        self.status = 5
        self.result: Any = None
        self.stdout: Union[str, bytes, None] = None
        self.stderr: Union[str, bytes, None] = None
        self._exception: Optional[str] = None
        self._error: Optional[BaseException] = None
        self.ip_addr: Optional[str] = None
        self.submit_time = time.time()
        self.start_time: Optional[float] = None
        self.end_time: Optional[float] = None
        self.event = None
        self.when_ended = None
        self.outcome = 0
        self.failure = None

    @property
    def exception(self) -> Optional[str]:
        """Text of the traceback or of what went wrong, else None."""
        failure = self.failure
        if failure is not None:
            failure.seen()
            if failure.payload is not None:
                if self._exception is not None:
                    self._exception = failure.with_arguments(self)
        return self._exception

    @exception.setter
    def exception(self, text: Optional[str]) -> None:
        self._exception = text

    @property
    def error(self) -> Optional[BaseException]:
        """The exception itself if it could be pickled, else None."""
        if self.failure is not None:
            self.failure.seen()
        return self._error

    @error.setter
    def error(self, error: Optional[BaseException]) -> None:
        self._error = error

    @property
    def finish(self) -> threading.Event:
        """An event that is set when the job has ended. Made when first asked for: most jobs never
        need it."""
        event = self.event
        if event is None:
            with _lock:
                event = self.event
                if event is None:
                    event = self.event = threading.Event()
            if self.status in ENDED:
                event.set()
        return event

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Wait up to `timeout` seconds (None: without limit); whether the job has ended. Any
        thread."""
        seconds = None if timeout is None else _seconds('timeout', timeout)
        if self.status in ENDED:
            return True
        if timeout is None and self.event is None:
            # What the driver does for it is one call, where an event takes a dozen
            ended: 'queue.SimpleQueue[DispyJob]' = queue.SimpleQueue()
            self.call_when_ended(ended.put)
            next_of(ended)
            return True
        return in_slices(self.finish.wait, seconds)  # type: ignore[no-any-return]

    def __call__(self, timeout: Union[None, bool, float] = None, clear: bool = False) -> Any:
        """Wait and return the result; None for a job that failed. Raises TimeoutError after
        `timeout` seconds. `clear`, in dispy 4 the first parameter, is accepted and has no meaning
        any more. Any thread."""
        if isinstance(timeout, bool):
            clear = timeout
            timeout = None
        if clear:
            old_names.tell('clear')
        if not self.wait(timeout):
            raise TimeoutError(unended_text(self, timeout))
        return self.result

    def get(self, timeout: Optional[float] = None) -> Any:
        """Wait and return the result, or raise what the job raised, with the node's traceback as
        its cause: JobFailed where that exception could not travel or the job was cancelled or ran
        past its time, WorkerLost where its process or node was lost,
        subprocess.CalledProcessError for a program with an exit status other than 0. Raises
        TimeoutError after `timeout` seconds. Any thread."""
        if not self.wait(timeout):
            raise TimeoutError(unended_text(self, timeout))
        if self.status != JobState.FINISHED:
            raise error_of(self)
        if has_exit_status(self):
            raise exit_error(self)
        return self.result

    def __await__(self) -> Iterator[Any]:
        """`await job` is `get` in a coroutine of asyncio. A task that is cancelled meanwhile
        leaves the job as it is."""
        import asyncio
        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def tell() -> None:
            if not ended.done():
                ended.set_result(None)

        def wake(job: 'DispyJob') -> None:
            with contextlib.suppress(RuntimeError):   # the loop has been closed
                loop.call_soon_threadsafe(tell)
        self.call_when_ended(wake)
        yield from ended.__await__()
        return self.get(0)

    @property
    def args(self) -> Any:
        """Arguments, until it has ended; then None."""
        if self.payload is None:
            return None
        return loads(in_one_piece(self.payload))[0]

    @property
    def kwargs(self) -> Any:
        """Keyword arguments, until it has ended; then None."""
        if self.payload is None:
            return None
        return loads(in_one_piece(self.payload))[1]

    def status_text(self) -> str:
        """The status as a word."""
        return JobState(self.status).name.lower()

    _args = args       # their names in dispy 4
    _kwargs = kwargs

    def __lt__(self, other: Any) -> bool:
        """In the order of submission, so that (priority, job) can be put into a queue."""
        if not isinstance(other, DispyJob):
            return NotImplemented
        return (self.submit_time, id(self)) < (other.submit_time, id(other))

    def __repr__(self) -> str:
        words, where, reason = state_of(self)
        return '<DispyJob %r %s%s%s>' % (
            self.id, words, where and ' on ' + where, reason and ': ' + reason)

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        return html_of_jobs([self])


def unended_text(job: DispyJob, timeout: Optional[float]) -> str:
    """Return a text which says that a job has not ended in time, and why. The user's threads."""
    values = values_of(job.payload, hasattr(job, 'future'))
    words = job_in_words(job.id, values)
    seconds = round(timeout or 0.0, 3)
    return '%s has not ended within %g s: %s' % (words, seconds, _why_unended(job))


def _why_unended(job: DispyJob) -> str:
    if job.status in (DispyJob.Running, DispyJob.ProvisionalResult):
        if job.ip_addr:
            where = ' on ' + job.ip_addr
        else:
            where = ''
        if job.start_time:
            since = ' for %.1f s' % (time.time() - job.start_time)
        else:
            since = ''
        return 'it has been running%s%s' % (where, since)
    cluster = next((cluster for cluster in list(_clusters)
                    if core_of(cluster).comp == job.comp), None)
    if cluster is None:
        return 'it waits'
    return core_of(cluster).report.why_jobs_wait()  # type: ignore[no-any-return]


def has_exit_status(job: DispyJob) -> bool:
    """Whether it was a program that failed, as far as its exit status says."""
    if not isinstance(job.stdout, bytes):
        return False
    return job.result != 0


SHORT = reprlib.Repr()
SHORT.maxlevel = 4
SHORT.maxstring = 80
SHORT.maxother = 80
SHORT.maxlist = SHORT.maxtuple = SHORT.maxdict = SHORT.maxset = 8


ARGUMENTS_SHOWN = 16384       # bytes of packed arguments that are opened to be shown


def values_of(payload: Any, is_call: bool) -> Optional[Tuple[tuple, Dict[str, Any]]]:
    """Arguments, positional and by name, that were packed so, to show them; None if they are large,
    or not of plain builtins only: opening others would run the user's code once more, in the
    program. Those of a call of an executor have the packed function before them."""
    if payload is None:
        return None
    if size_of(payload) > ARGUMENTS_SHOWN:
        return None
    try:
        plain = open_plain(in_one_piece(payload))
        args, kwargs = plain[:2]
    except PeerError:
        return None
    if is_call and len(args) == 3:
        _, args, kwargs = args
    if type(args) is tuple:
        if type(kwargs) is dict:
            return (args, kwargs)
    return None


def job_in_words(number: Any, values: Optional[Tuple[tuple, Dict[str, Any]]]) -> str:
    """A job by its id and its arguments, as far as they are known."""
    if values is None or not any(values):
        return 'job %.80r' % (number,)
    several = len(values[0]) + len(values[1]) > 1
    return 'job %.80r with the argument%s %s' % (number, 's' * several, words_of(*values))


def words_of(args: tuple, kwargs: Dict[str, Any]) -> str:
    """The arguments of a job as people read them, in at most 300 characters. Runs the user's
    `__repr__`."""
    words = []
    for arg in args[:SHOWN_MOST]:
        words.append(_word_of(arg))
    for name, value in itertools.islice(kwargs.items(), SHOWN_MOST):
        if type(name) is str:
            word = '%.80s=%s' % (name, _word_of(value))
            words.append(word)
    text = ', '.join(words)
    if len(text) <= 300:
        return text
    return text[:297] + '...'


def _word_of(value: Any) -> str:
    try:
        return SHORT.repr(value)
    except Exception:  # of the user's object
        return '<%s>' % type(value).__name__


class KeptJob(DispyJob):
    """A job that is written down in a recover_file; an `id` that is set later is written down
    too."""
    __slots__ = ('arguments', 'journal')

    def __init__(self, comp: str, payload: Any, options: Optional[dict], number: Any,
                 arguments: str = '') -> None:
        self.journal: Optional['Journal'] = None
        self.arguments = arguments
        super().__init__(comp, payload, options, number)

    @property
    def id(self) -> Any:
        """The id of the job, as a DispyJob has it."""
        return _plain_id.__get__(self, KeptJob)

    @id.setter
    def id(self, value: Any) -> None:
        _plain_id.__set__(self, value)
        if self.journal is not None:
            self.journal.renamed(self)


_plain_id: Any = vars(DispyJob)['id']


class NodeState(enum.Enum):
    """What a node is to this program."""
    FOUND = 'found'
    DIALLING = 'dialling'
    UNREACHED = 'unreachable'   # shown as the word for what came of the attempt: see Unreached
    CONNECTED = 'connected'
    CLOSED = 'closed'
    LOST = 'lost'


NODE_TABLE: Dict[Tuple[NodeState, str], NodeState] = {
    (NodeState.FOUND, 'dial'): NodeState.DIALLING,
    (NodeState.LOST, 'dial'): NodeState.DIALLING,
    (NodeState.UNREACHED, 'dial'): NodeState.DIALLING,
    (NodeState.DIALLING, 'connect'): NodeState.CONNECTED,
    (NodeState.FOUND, 'connect'): NodeState.CONNECTED,
    (NodeState.LOST, 'connect'): NodeState.CONNECTED,
    (NodeState.UNREACHED, 'connect'): NodeState.CONNECTED,
    (NodeState.DIALLING, 'fail'): NodeState.UNREACHED,
    (NodeState.CONNECTED, 'fail'): NodeState.LOST,
    (NodeState.FOUND, 'close'): NodeState.CLOSED,
    (NodeState.DIALLING, 'close'): NodeState.CLOSED,
    (NodeState.UNREACHED, 'close'): NodeState.CLOSED,
    (NodeState.CONNECTED, 'close'): NodeState.CLOSED,
    (NodeState.LOST, 'close'): NodeState.CLOSED,
}


def fill_in(job: DispyJob, row: tuple, is_program: bool, failures: Optional['Failures'] = None,
            node: str = '') -> None:
    """Give a job what its row of Results, which comes from this node, says."""
    _, outcome, start, end, payload, stdout, stderr = row
    status = int(job.state)
    if outcome == 1 or outcome == 2:   # RETURNED, RETURNED_CODE
        try:
            job.result = loads(payload, True)
        except BaseException as exc:  # unpickling runs the user's code
            status = DispyJob.Terminated
            job.exception = 'the result could not be opened here: %s' % describe_exception(exc, 1)
    elif outcome == Outcome.RAISED:
        job.outcome = outcome
        _fill_in_error(job, payload)
    else:
        job.outcome = outcome
        decoded = bytes(payload).decode('utf-8', 'replace')
        job.result, job.exception = None, decoded
    if start:
        job.start_time = start
    job.end_time = end or time.time()
    if is_program:
        job.stdout = bytes(stdout)
        job.stderr = bytes(stderr)
        if failures is not None and status == DispyJob.Finished:
            if job.result != 0:
                failures.exited(job, node)
    else:
        if stdout:
            job.stdout = str(stdout, 'utf-8', 'replace')
        else:
            job.stdout = ''
        if stderr:
            job.stderr = str(stderr, 'utf-8', 'replace')
        else:
            job.stderr = ''
    if failures is not None:
        if status in FAILED:
            failures.add(job, node)
    job.payload = None
    job.status = status   # last: whoever sees it sees all of the above


def _fill_in_error(job: DispyJob, payload: Any) -> None:
    """Give a job the exception that its function raised."""
    job.result = None   # a provisional one may stand there
    job.exception, body = unpack_error(payload)
    if not len(body):
        return
    try:
        job.error = loads(body)
    except BaseException as exc:  # unpickling runs the user's code; the text is there
        logger.debug('an exception of job %r could not be opened: %s', job.id, type(exc).__name__)


def end_without(job: DispyJob, text: str, failures: Optional['Failures'] = None) -> None:
    """A job has ended without a result."""
    job.result = None
    job.exception = text
    job.end_time = time.time()
    if failures is not None:
        if job.state in FAILED:
            failures.add(job)
    job.payload = None
    job.status = int(job.state)


class AssignmentState(enum.Enum):
    """What a node is to one cluster."""
    WAITING = 'waiting'         # not connected, or not offered the computation yet
    ASKING = 'asking'           # the user's NodeAllocate is asked
    SETTING_UP = 'setting up'
    READY = 'ready'
    REFUSED = 'refused'
    CLOSED = 'closed'           # by the user


ASSIGNMENT_TABLE: Dict[Tuple[AssignmentState, str], AssignmentState] = {
    (AssignmentState.WAITING, 'ask'): AssignmentState.ASKING,
    (AssignmentState.REFUSED, 'ask'): AssignmentState.ASKING,
    (AssignmentState.ASKING, 'ask'): AssignmentState.ASKING,   # for its source after its allocation
    (AssignmentState.WAITING, 'offer'): AssignmentState.SETTING_UP,
    (AssignmentState.REFUSED, 'offer'): AssignmentState.SETTING_UP,
    (AssignmentState.ASKING, 'offer'): AssignmentState.SETTING_UP,
    (AssignmentState.SETTING_UP, 'ready'): AssignmentState.READY,
    (AssignmentState.CLOSED, 'lost'): AssignmentState.CLOSED,
    (AssignmentState.CLOSED, 'open'): AssignmentState.WAITING,
    (AssignmentState.READY, 'open'): AssignmentState.WAITING,   # to be set up anew
}
for _state in AssignmentState:
    ASSIGNMENT_TABLE[_state, 'close'] = AssignmentState.CLOSED
    if _state is not AssignmentState.CLOSED:
        ASSIGNMENT_TABLE[_state, 'lost'] = AssignmentState.WAITING
        ASSIGNMENT_TABLE[_state, 'refuse'] = AssignmentState.REFUSED


class _AvailInfo(NamedTuple):
    cpu: Optional[float] = None
    memory: Optional[int] = None
    disk: Optional[int] = None
    swap: Optional[int] = None


class DispyNodeAvailInfo(_AvailInfo, metaclass=Listed):
    """What is free on a node: cpu in percent, memory, disk and swap in bytes; None where it is not
    known."""
    __slots__ = ()


def resources_of(facts: dict) -> Dict[str, int]:
    """How many units of resources a node offers, by what it has told."""
    found = facts.get('resources')
    if type(found) is not dict:
        return {}
    rows = sorted(found.items())
    if not is_request(tuple(rows)):
        return {}
    return found


def resource_use(facts: dict) -> Dict[str, Tuple[int, int]]:
    """Of each resource of a node how many units jobs have, and how many there are."""
    used = facts.get('resources_used', {})
    return {name: (used.get(name, 0), count) for name, count in resources_of(facts).items()}


def resource_words(node: 'DispyNode') -> List[str]:
    """'gpu 1 of 2': what jobs have of the resources of a node."""
    return ['%s %d of %d' % (name, node.resources_used[name], count)
            for name, count in node.resources.items()]


class DispyNode:
    """A node as `status()` and cluster_status show it; a copy that does not change. Attributes:

    ip_addr, port, name - where it is and what it calls itself
    state - what it is to this cluster: 'ready', 'setting up', 'refused', 'found', 'dialling',
        'connected', 'lost',
        'closed', or why it was never reached: 'down' (nothing listens there), 'unreachable' (no
        answer, or no route),
        'no such name', 'no name service' or 'refused' (another secret, for example); reason - why
        it is not used, else ''
    cpus - how many of it this cluster uses; avail_cpus - how many it offers; busy - jobs of this
        cluster that run there now, without those that wait there
    jobs_done, cpu_time - jobs of this cluster that ended there, and the seconds that they ran
    tx, rx - bytes that this program has sent there and has received from there, all clusters
        together
    resources - how many units it offers of what jobs ask for by name, as {'gpu': 2};
        resources_used - how many of these jobs of this program have there, or of a scheduler
    update_time - when it was heard last, in seconds since the epoch; 0 for never
    platform - its operating system and processor; avail_info - DispyNodeAvailInfo of when it was
        connected; what is not known, as without psutil, is None
    """
    # What cluster_status says of a node; no job's status has these numbers.
    Initialized = 4
    Closed = 16
    AvailInfo = 17

    def __init__(self,
                 ip_addr: str,
                 name: str = '',
                 cpus: int = 0,
                 port: int = NODE_PORT,
                 state: str = '',
                 reason: str = '',
                 avail_cpus: Optional[int] = None,
                 busy: int = 0,
                 jobs_done: int = 0,
                 cpu_time: float = 0.0,
                 facts: Optional[dict] = None) -> None:
        is_of_program = facts is None
        facts = facts or {}
        self.ip_addr = ip_addr
        self.port = port
        self.name = name
        self.state = state
        self.reason = reason
        self.cpus = cpus
        if avail_cpus is None:
            self.avail_cpus = cpus
        else:
            self.avail_cpus = avail_cpus
        self.busy = busy
        self.jobs_done = jobs_done
        self.cpu_time = cpu_time
        fact = facts.get('tx', 0)
        self.tx, self.rx = fact, facts.get('rx', 0)
        self.update_time = facts.get('heard', 0.0)
        self.platform = facts.get('platform', '')
        self.resources = dict(resources_of(facts))
        self.resources_used = {name: used for name, (used, _) in resource_use(facts).items()}
        available = facts.get('available', {})
        if is_of_program:
            self.avail_info = None
        else:
            self.avail_info = DispyNodeAvailInfo(*map(available.get, DispyNodeAvailInfo._fields))
        self.facts = facts

    def __repr__(self) -> str:
        if self.port:
            where = format_address(self.ip_addr, self.port)
        else:
            where = self.ip_addr
        words = []
        if self.state and self.reason:
            word = '%s (%s)' % (self.state, reason_of(self.reason))
            words.append(word)
        elif self.state:
            words.append(self.state)
        if self.cpus:
            words.append(many(self.cpus, 'CPU'))
        words += resource_words(self)
        if self.busy:
            words.append('%d running' % self.busy)
        if self.jobs_done:
            message = many(self.jobs_done, 'job') + ' done'
            words.append(message)
        text = where
        if self.name:
            text += ' ' + self.name
        if words:
            text += ': ' + ', '.join(words)
        return '<DispyNode %s>' % text

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        return html_of_nodes([self])


# States of nodes
NOT_CONNECTED = frozenset(('found', 'dialling', 'lost', *map(str, Unreached)))
NOT_TRIED = frozenset(('found', 'dialling'))   # to the end: nothing is known yet
SILENT = frozenset(map(str, Unreached)) - {str(Unreached.REFUSED)}


class _NodesAndJobs(NamedTuple):
    nodes: List[DispyNode]
    jobs_pending: int


class ClusterStatus(_NodesAndJobs, metaclass=Listed):
    """What `status()` returns, a pair: the nodes that have answered, also those that do not take
    this computation, and the number of jobs that have not ended. `refused` are the nodes that no
    connection was ever made with; the `reason` of each says why. `all_nodes` are both."""
    refused: List[DispyNode] = []

    def __new__(cls, nodes: Sequence[DispyNode], jobs_pending: int) -> 'ClusterStatus':
        answered: List[DispyNode] = []
        refused: List[DispyNode] = []
        for node in nodes:
            # One that has answered has told its CPUs.
            has_answered = node.avail_cpus or node.state not in NOT_CONNECTED
            (answered if has_answered else refused).append(node)
        status = super().__new__(cls, answered, jobs_pending)
        status.refused = refused
        return status

    @property
    def all_nodes(self) -> List[DispyNode]:
        """Nodes that are used, and those that are not."""
        return [*self.nodes, *self.refused]


# --------------------------------------------------------------------------------------------------
# What people see: why jobs failed, lines of source code, representations. Values in, text out:
# nothing here
# asks a node. SourceHere and Failures look at files of this host, and keep what they have been
# told.
# --------------------------------------------------------------------------------------------------

def many(count: int, word: str) -> str:
    """Return a number with its noun: '1 node', '2 nodes'."""
    return '%d %s%s' % (count, word, '' if count == 1 else 's')


_OF_FRAME = LazyPattern(r'^  File ".*", line \d+', re.M)
_OF_GROUP = LazyPattern(r'^  \| (\w[\w.]*: .*)$', re.M)


def reason_of(text: str) -> str:
    """The line of a traceback that names the exception; of another text the first line."""
    at = 0
    for frame in _OF_FRAME.finditer(text):
        at = frame.end()
    if at:
        lines = [line for line in text[at:].splitlines()[1:] if line[:1].strip()]
    else:
        group = _OF_GROUP.search(text)
        if group:
            lines = [group.group(1)]
        else:
            lines = [line for line in text.splitlines() if line.strip()]
    if lines:
        return lines[0].strip()[:REASON_MOST]
    return ''


def kind_of_reason(reason: str) -> str:
    """What reasons that differ in numbers have in common: the class of an exception."""
    name, colon, _ = reason.partition(': ')
    if colon and re.fullmatch(r'[\w.]+', name):
        return name
    return re.sub(r'\d+', '#', reason)


_NOT_FOUND = LazyPattern(r'^(?:[\w.]+\.)?FileNotFoundError: (.*)$', re.M)
_QUOTED = LazyPattern(r"""(['"])(.+?)\1""")


def missing_file(text: str, is_here: Callable[[str], bool]) -> Tuple[str, int]:
    """The relative path that a job has not found and that is here, and where in the text the line
    ends that says so; ('', 0) if there is none. Also a path that is not quoted, as with numpy, if
    it looks like the name of a file."""
    for line in reversed(list(_NOT_FOUND.finditer(text))):
        message = line.group(1)
        words = []
        for word in message.split():
            words.append(word.rstrip('.,:;'))
        found = []
        for _, quoted in _QUOTED.findall(message):
            found.append(quoted)
        chosen_words = []
        for word in words:
            if re.search(r'\w[./]\w', word):
                chosen_words.append(word)
        for path in found + chosen_words:
            if os.path.isabs(path):
                continue
            if is_here(path):
                return path, line.end()
    return '', 0


def hint_for_missing(path: str, directory: str, is_sent: bool) -> str:
    """What to do about a relative path that a job has not found, and that is in this directory."""
    name = os.path.basename(os.path.normpath(path))
    if is_sent:
        return '%r was sent by depends, and is called %r in the directory of the job' % (path, name)
    if path == name:
        opened = ''
    else:
        opened = ', and open it in the job as %r' % name
    return '%r is in the directory of the program, %s, but a job runs in a directory of its own, ' \
        'on the node: send it along by depends=[%r]%s' % (path, directory, path, opened)


class Failure:
    """Why a job has failed, in a line, and where. Until somebody has looked at it, it counts in a
    row of its cluster's Failures."""
    __slots__ = ('reason', 'node', 'row', 'payload', 'is_call')

    def __init__(self, reason: str, node: str, row: Optional[List[Any]]) -> None:
        self.reason = reason
        self.node = node
        self.row = row
        # Arguments, until they are shown; None: they are large, or the text has a traceback
        self.payload: Any = None
        self.is_call = False       # of an executor

    def keep(self, job: 'DispyJob') -> None:
        """Keep the arguments of the job, which has ended, unless they are large."""
        if job.payload is None:
            return
        if size_of(job.payload) <= ARGUMENTS_SHOWN:
            self.payload = job.payload
            self.is_call = hasattr(job, 'future')

    def values(self) -> Optional[Tuple[tuple, Dict[str, Any]]]:
        """The arguments, if they are here."""
        return values_of(self.payload, self.is_call)

    def with_arguments(self, job: 'DispyJob') -> Optional[str]:
        """The text of the job's `exception`, from now on with its arguments. The user's threads."""
        with _lock:
            payload = self.payload
            self.payload = None
            text = job._exception
        values = values_of(payload, self.is_call)
        if values is None:
            return text
        if text is None:
            return text
        return '%s (%s)' % (text, job_in_words(job.id, values))

    def seen(self) -> None:
        """Somebody has looked. Any thread."""
        if self.row is None:
            return
        with _lock:
            row = self.row
            self.row = None
            if row is not None:
                row[0] -= 1


class Failures:
    """The failed jobs of a cluster at which nobody has looked. `directory` is where its program
    began, `sent` the names of files that travel. Any thread.

    Jobs are counted and not kept: a job that the program has dropped stays counted.
    """
    KINDS_MOST = 100   # of reasons; others count as one

    def __init__(self, directory: str, sent: Iterable[str], counts: bool) -> None:
        self._directory = directory
        self._sent = sent
        self._counts = counts                  # no callback of the program is told
        # Kind of reason -> [jobs, reason of the first, its id]
        self._rows: Dict[str, List[Any]] = {}

    def add(self, job: 'DispyJob', node: str = '') -> None:
        """A job has failed; nobody sees yet that it has ended. Adds to its exception what is known
        here and not at the node."""
        text = source_here.added_to(job.exception or '')
        if 'ModuleNotFoundError' in text:
            text = with_hint_for_module(text, node)
            error = job.error
            if isinstance(error, ImportError) and type(error.msg) is str:
                error.msg = with_hint_for_module(error.msg, node)
                error.args = (error.msg,)
        reason = told = reason_of(text)
        if 'FileNotFoundError' in text:
            path, at = missing_file(text, self._is_here)
            if path:
                file_name = os.path.basename(path)
                is_sent = file_name in self._sent
                hint = ' (%s)' % hint_for_missing(path, self._directory, is_sent)
                text = text[:at] + hint + text[at:]
                told += hint
        job.exception = text
        if self._counts:
            row = self._count(told, reason, job.id)
        else:
            row = None
        job.failure = Failure(reason, node, row)
        if '\n' not in text:
            job.failure.keep(job)

    @staticmethod
    def exited(job: 'DispyJob', node: str = '') -> None:
        """A program has ended with an exit status other than 0."""
        reason = status_words(job.result)
        job.failure = Failure(reason, node, None)
        job.failure.keep(job)

    def _is_here(self, path: str) -> bool:
        return os.path.exists(os.path.join(self._directory, path))

    def _count(self, told: str, reason: str, number: Any) -> List[Any]:
        kind = kind_of_reason(reason)
        with _lock:
            if kind not in self._rows:
                if len(self._rows) >= self.KINDS_MOST:
                    kind = ''
                    told = 'various'
            row = self._rows.setdefault(kind, [0, told, number])
            row[0] += 1
        return row

    def take(self, submitted: int) -> str:
        """What is to be said of them, of so many jobs; empty if there are none. Whoever asks again
        is told of later ones."""
        with _lock:
            rows = []
            for row in self._rows.values():
                if row[0] > 0:
                    rows.append(tuple(row))
            self._rows = {}
        return failures_text(rows, submitted)


def status_words(status: Any) -> str:
    """The exit status of a program, with the name of the signal if one has ended it."""
    name = ''
    if type(status) is int and status < 0:
        with contextlib.suppress(ValueError):
            name = ' (killed by signal %d, %s)' % (-status, signal.Signals(-status).name)
    return 'exit status %s%s' % (status, name)


_NO_MODULE = LazyPattern(r"ModuleNotFoundError: No module named '(\w+)[\w.]*'$", re.M)
# What a node says (explain_import), which does not know what the module is here
_INSTALL = LazyPattern(
    r'install (\S+) on this node \((.+) -m pip install \S+\), or list its file in depends '
    r'if it is a module of your own'
)


def hint_for_module(name: str, node: str, python: str) -> str:
    """What to do about a module that a node does not have, by what it is here; empty for one that
    is not here either. `python`: the node's interpreter."""
    if node:
        where = 'node %s' % node
    else:
        where = 'the node'
    kind = own_modules.kind(name)
    if kind is ModuleKind.INSTALLED:
        package = own_modules.distribution_of(name)
        return 'install %s on %s (%s -m pip install %s)' % (package, where, python, package)
    if kind is ModuleKind.STANDARD:
        return ('start dispynode on %s with Python %d.%d, as here: %s is in its standard '
                'library, and not in that of the Python there' %
                (where.replace('the node', 'it'), *sys.version_info[:2], name))
    if kind is ModuleKind.OWN:
        return 'list its file in depends'
    return ''


def with_hint_for_module(text: str, node: str) -> str:
    """What a node, or a job there, says of an import that failed, with a hint that fits."""
    told = _INSTALL.search(text)
    if told is not None:
        name = told.group(1)
        python = told.group(2)
        hint = hint_for_module(name, node, python) or told.group()
        short_text = text[:told.start()]
        return short_text + hint + text[told.end():]
    missing = list(_NO_MODULE.finditer(text))
    if not missing:
        return text
    last = missing[-1]
    hint = hint_for_module(last.group(1), node, 'python')
    if not hint:
        return text
    return '%s. To fix this, %s%s' % (text[:last.end()], hint, text[last.end():])


def failures_text(rows: List[Tuple[int, str, Any]], submitted: int) -> str:
    """Of rows of (jobs, the reason of the first of them, its id) the sum and the commonest."""
    if not rows:
        return ''
    failed = sum(row[0] for row in rows)
    count, reason, number = max(rows, key=lambda row: row[0])
    which = 'The reason (job %.80r)' % (number,)
    if failed > 1:
        which = 'The most common reason (%s; here of job %.80r)' % (many(count, 'job'), number)
    return ('%d of %s failed, and the program has not read the reasons. %s: %s. job.exception has '
            'the traceback of a job, and job.get() raises what it raised') % (
            failed, many(submitted, 'job'), which, reason.rstrip('.'))


class SourceHere:
    """Adds to the tracebacks of nodes the lines of source code that these do not have: those of a
    notebook's cells, of prompts, and of files that are on this host alone."""
    _FRAME = LazyPattern(r'^(?P<lead>[ |]*)  File "(?P<file>.*)", line (?P<line>\d+)(?:, in .*)?$')

    def added_to(self, text: str) -> str:
        """The text with them. Any thread."""
        if '  File "' not in text:
            return text
        lines = text.split('\n')
        out: List[str] = []
        at = 0
        while at < len(lines):
            frame = self._FRAME.match(lines[at])
            out.append(lines[at])
            at += 1
            if frame is None:
                continue
            indent = frame.group('lead') + '    '
            end = at
            while end < len(lines) and lines[end].startswith(indent):
                end += 1
            out += self._of_frame(frame, indent, lines[at:end])
            at = end
        return '\n'.join(out)

    def _of_frame(self, frame: Any, indent: str, shown: List[str]) -> List[str]:
        """The lines below that of a frame; `shown` are those that the node has given."""
        file = frame.group('file')
        is_own = self.is_own(file)
        if shown and not is_own:
            return shown
        number = int(frame.group('line'))
        line = self.line(file, number, is_own).strip()
        if not line:
            return shown
        if shown and shown[0].strip() == line:
            return shown
        return [indent + line]   # the node has another file by this name, or none

    @staticmethod
    def is_own(file: str) -> bool:
        """Whether this program has the text and no other place can: that of its main script, or of
        what was typed into it."""
        module = sys.modules.get('__main__')
        if file == getattr(module, '__file__', None):
            return True
        return is_cell(file)

    @staticmethod
    def line(file: str, number: int, is_own: bool) -> str:
        """A line of a file as it is here, else ''."""
        if not is_own and not file.endswith('.py'):
            return ''
        try:
            return linecache.getline(file, number)
        except Exception:  # of a loader that linecache asks
            return ''


source_here = SourceHere()


def is_cell(file: str) -> bool:
    """Whether this is no file, but what was typed into a notebook or at a prompt, of which
    linecache keeps the text."""
    entry: Any = linecache.cache.get(file)
    if entry is None:
        return False
    if len(entry) != 4:
        return False
    return entry[1] is None


class Counts(NamedTuple):
    """How many jobs of a cluster are in which state."""
    done: int
    failed: int
    cancelled: int
    running: int
    waiting: int

    def __str__(self) -> str:
        words = []
        for name, count in zip(self._fields, self):
            if count:
                words.append('%d %s' % (count, name))
        return ', '.join(words) or 'no jobs'


_STATE_WORDS = {JobState.CREATED: 'waiting', JobState.PROVISIONAL: 'running',
                JobState.TERMINATED: 'failed', JobState.ABANDONED: 'failed'}


def state_of(job: 'DispyJob') -> Tuple[str, str, str]:
    """What a job does, in a word; where, unless it has gone well; why it has failed."""
    state = JobState(job.status)
    words = _STATE_WORDS.get(state, state.name.lower())
    if state == JobState.FINISHED and has_exit_status(job):
        return 'failed', job.ip_addr or '', status_words(job.result)
    if state not in FAILED:
        return words, (job.ip_addr or '') if words == 'running' else '', ''
    text = job.exception or ''   # to show why is to look at it
    if job.failure is None:
        return words, job.ip_addr or '', reason_of(text)
    return words, job.failure.node or job.ip_addr or '', job.failure.reason


class JobList(List['DispyJob']):
    """Jobs, in a list that shows itself as a line, and as a table in a notebook."""

    def __repr__(self) -> str:
        words = collections.Counter(state_of(job)[0] for job in self)
        told = ', '.join('%d %s' % (count, word) for word, count in words.items())
        return '<%s%s>' % (many(len(self), 'job'), told and ': ' + told)

    def _repr_html_(self) -> str:
        return html_of_jobs(self)


def html_table(head: Sequence[str], rows: Sequence[Sequence[Any]], others: int = 0) -> str:
    """A table of texts, which are escaped; `others`: rows that are left out."""
    import html   # here and below, as few programs need it

    def row(cells: Sequence[Any], tag: str) -> str:
        form = '<%s style="text-align:left">%%s</%s>' % (tag, tag)
        return '<tr>%s</tr>' % ''.join(form % html.escape(str(cell)) for cell in cells)
    if others:
        more = '<tr><td colspan="%d">and %d more</td></tr>' % (len(head), others)
    else:
        more = ''
    chosen_rows = [row(cells, 'td') for cells in rows]
    body = ''.join(chosen_rows)
    return '<table>%s%s%s</table>' % (row(head, 'th'), body, more)


def html_of_jobs(jobs: Sequence['DispyJob']) -> str:
    """A table of jobs, of the first ones if they are many."""
    rows = []
    for job in jobs[:SHOWN_MOST]:
        words, where, reason = state_of(job)
        took = ''
        if job.start_time and job.end_time:
            took = '%.3f' % (job.end_time - job.start_time)
        word = _word_of(job.id)
        row = (word, words, where or job.ip_addr or '', took, reason)
        rows.append(row)
    others = max(0, len(jobs) - SHOWN_MOST)
    return html_table(('Job', 'State', 'Node', 's', 'Reason'), rows, others)


def html_of_nodes(nodes: Sequence['DispyNode']) -> str:
    """A table of nodes, of the first ones if they are many."""
    rows = []
    for node in nodes[:SHOWN_MOST]:
        if node.port:
            where = format_address(node.ip_addr, node.port)
        else:
            where = node.ip_addr
        seconds = '%.3f' % node.cpu_time
        row = (node.name or where, where, node.state, node.cpus, node.busy, node.jobs_done, seconds,
               reason_of(node.reason))
        rows.append(row)
    head = ('Node', 'Address', 'State', 'CPUs', 'Running', 'Jobs done', 'Job time s', 'Reason')
    others = max(0, len(nodes) - SHOWN_MOST)
    return html_table(head, rows, others)


def html_bar(counts: Counts) -> str:
    """How far the jobs are: a bar with a part for each state."""
    whole = max(1, sum(counts))
    colours = {'done': '#2e7d32', 'failed': '#c62828', 'cancelled': '#9e9e9e', 'running': '#1565c0'}
    parts = []
    for name, colour in colours.items():
        width = 100.0 * getattr(counts, name) / whole
        part = '<div title="%s" style="width:%.2f%%;background:%s"></div>' % (name, width, colour)
        parts.append(part)
    style = 'display:flex;height:10px;max-width:40em;background:#e0e0e0'
    return '<div style="%s">%s</div>' % (style, ''.join(parts))


def html_of_cluster(title: str, state: str, counts: Counts, nodes: Optional[Sequence['DispyNode']],
                    page: str) -> str:
    """State, progress, counts, nodes, and a link to the web page, if there is one."""
    import html
    ended = counts.done + counts.failed + counts.cancelled
    lines = ['<b>%s</b>: %s' % (html.escape(title), html.escape(state))]
    lines.append(html_bar(counts))
    message = '%d of %s: %s' % (ended, many(sum(counts), 'job'), counts)
    lines.append(message)
    if page:
        lines.append('<a href="%s" target="_blank">web page</a>' % html.escape(page))
    if nodes:
        lines.append(html_of_nodes(nodes))
    return '<div>%s</div>' % ''.join('<div>%s</div>' % line for line in lines)


def nodes_text(nodes: Sequence['DispyNode']) -> str:
    """'3 nodes, 9 CPUs': those that can be used."""
    ready = []
    for node in nodes:
        if node.state == 'ready':
            ready.append(node)
    total_cpus = sum(node.cpus for node in ready)
    return '%s, %s' % (many(len(ready), 'node'), many(total_cpus, 'CPU'))


# --------------------------------------------------------------------------------------------------
# Schedule: which job goes where. Pure: nothing here opens a socket, reads a clock, takes a lock or
# calls the
# user's code. The same class serves all clusters of one program here and all clients of a
# scheduler.
# --------------------------------------------------------------------------------------------------

# Events.
class Known(enum.Enum):
    """What is known of an attempt that was sent to a node or a scheduler, or noted as sent."""
    UNSENT = 'it never left: that it was sent could not be noted, or the link ended before'
    HELD = 'it is there: it waits, runs, or its result is kept'
    UNBEGUN = 'it was there and did not begin: given back, or written down when the node ended'
    ABSENT = 'it is not there, and all is known that ever came: it never arrived, or never began'
    LOST = 'it began, and ended with the process of the node'
    GIVEN_UP = 'it began, and what came of it was given up'
    FORGOTTEN = 'it is not there, and not all is known that ever came'
    SILENT = 'nobody can be asked'


class Occasion(enum.Enum):
    """When that is asked."""
    CONNECTED = 'a program is connected again'
    RECOVERED = 'another program collects the jobs of one that has crashed'
    ENDED = 'the node was away too long, or its process has ended'


class Verdict(enum.Enum):
    """What becomes of the job."""
    STAYS = 'it is waited for'
    WAITS = 'it waits again'
    LOST = 'Abandoned, or run again if the computation is reentrant'


KNOWN_TABLE: Dict[Tuple[Known, Occasion], Verdict] = {
    (Known.UNSENT, Occasion.CONNECTED): Verdict.WAITS,
    (Known.UNSENT, Occasion.RECOVERED): Verdict.WAITS,
    (Known.UNSENT, Occasion.ENDED): Verdict.WAITS,
    (Known.HELD, Occasion.CONNECTED): Verdict.STAYS,
    (Known.HELD, Occasion.RECOVERED): Verdict.STAYS,
    (Known.HELD, Occasion.ENDED): Verdict.STAYS,      # its result is on the disk there
    (Known.UNBEGUN, Occasion.CONNECTED): Verdict.WAITS,
    (Known.UNBEGUN, Occasion.RECOVERED): Verdict.WAITS,
    (Known.UNBEGUN, Occasion.ENDED): Verdict.WAITS,
    (Known.ABSENT, Occasion.CONNECTED): Verdict.WAITS,
    (Known.ABSENT, Occasion.RECOVERED): Verdict.WAITS,
    (Known.ABSENT, Occasion.ENDED): Verdict.WAITS,
    (Known.LOST, Occasion.CONNECTED): Verdict.LOST,
    (Known.LOST, Occasion.RECOVERED): Verdict.LOST,
    (Known.LOST, Occasion.ENDED): Verdict.LOST,
    (Known.GIVEN_UP, Occasion.CONNECTED): Verdict.LOST,
    (Known.GIVEN_UP, Occasion.RECOVERED): Verdict.LOST,
    (Known.GIVEN_UP, Occasion.ENDED): Verdict.LOST,
    (Known.FORGOTTEN, Occasion.CONNECTED): Verdict.LOST,
    (Known.FORGOTTEN, Occasion.RECOVERED): Verdict.LOST,
    (Known.FORGOTTEN, Occasion.ENDED): Verdict.LOST,
    (Known.SILENT, Occasion.CONNECTED): Verdict.STAYS,   # until it was away too long
    (Known.SILENT, Occasion.RECOVERED): Verdict.STAYS,   # told as Running
    (Known.SILENT, Occasion.ENDED): Verdict.LOST,        # as one that has begun
}
KNOWN_TEXTS = {
    Known.LOST: 'it had begun when the node ended',
    Known.FORGOTTEN: 'the node does not know it any more',
}


class Account(NamedTuple):
    """What a node or a scheduler says of attempts of a computation."""
    held: FrozenSet[int] = frozenset()
    past: AttemptHistory = AttemptHistory()
    whole: bool = True   # its memory is the one that was there when they were sent

    def known(self, serial: int) -> Known:
        """What that means for one that was sent there."""
        if serial in self.held:
            return Known.HELD
        if serial in self.past.given_up:
            return Known.GIVEN_UP
        if serial in self.past.lost:
            return Known.LOST
        if serial in self.past.unbegun:
            return Known.UNBEGUN
        if self.whole and self.past.whole:
            return Known.ABSENT
        return Known.FORGOTTEN

    def verdict(self, serial: int, occasion: Occasion) -> Tuple[Verdict, str]:
        """What becomes of it, and why, for people."""
        known = self.known(serial)
        return KNOWN_TABLE[
            known,
            occasion], self.past.text if known is Known.GIVEN_UP else KNOWN_TEXTS.get(known, '')


def known_table() -> str:
    """The table for people: `python -m dispy states`."""
    name_lengths = [len(known.name) for known in Known]
    width = max(name_lengths)
    message = '%-*s  %s' % (width, '', '  '.join('%-9s' % occasion.name for occasion in Occasion))
    lines = [message]
    for known in Known:
        cells = '  '.join('%-9s' % KNOWN_TABLE[known, occasion].name for occasion in Occasion)
        line = '%-*s  %s' % (width, known.name, cells.rstrip())
        lines.append(line)
    for kind in (Known, Occasion, Verdict):
        lines += ['', *('%-*s  %s' % (width, one.name, one.value) for one in kind)]
    return '\n'.join(lines)


class Evidence(enum.Enum):
    """What speaks for the loss of a node."""
    BYE = 'it has ended the connection on purpose, and has answered for all that had begun'
    REFUSAL = 'it has ended a computation, and has answered for all of it that had begun'
    CUT = 'the connection has ended; it was heard of a short time ago, or is being dialled'
    SILENCE = 'the connection has ended; it was not heard of for too long, and cannot be dialled'
    UNREACHED = 'it was away and dialled in vain'
    PROCESS_ENDED = 'the same; no program listens there, and by its lock file its process has ended'
    OTHER_INSTANCE = 'another process is there, which does not have its memory'
    OVERDUE = 'it was away for longer than it is waited for'


class Standing(enum.Enum):
    """What a node is to this program then."""
    IDLE = 'it has no jobs'
    BUSY = 'it has jobs'
    EMBEDDED = 'it is a part of this program, and ends with its connection'
    IDLE_SCHEDULER = 'it is a scheduler and has no jobs'
    BUSY_SCHEDULER = 'it is a scheduler, which keeps jobs and results on its disk'


# By the kind of the node, as of NodeDoubted, and whether it has jobs
STANDINGS: Dict[Tuple[str, bool], Standing] = {
    ('', False): Standing.IDLE,
    ('', True): Standing.BUSY,
    ('embedded', False): Standing.EMBEDDED,
    ('embedded', True): Standing.EMBEDDED,
    ('scheduler', False): Standing.IDLE_SCHEDULER,
    ('scheduler', True): Standing.BUSY_SCHEDULER,
}


class Loss(enum.Enum):
    """What follows from it."""
    STAYS = 'nothing'
    RETURNS = 'what it has not answered for never began there, and waits again'
    AWAY = 'its jobs are lost if it does not come back in time'
    LOST = 'its jobs are lost, but for those of which it is known that they are not'


LOSS_TABLE: Dict[Tuple[Evidence, Standing], Loss] = {
    (Evidence.BYE, Standing.IDLE): Loss.RETURNS,
    (Evidence.BYE, Standing.BUSY): Loss.RETURNS,
    (Evidence.BYE, Standing.EMBEDDED): Loss.RETURNS,
    (Evidence.BYE, Standing.IDLE_SCHEDULER): Loss.STAYS,
    (Evidence.BYE, Standing.BUSY_SCHEDULER): Loss.STAYS,
    (Evidence.REFUSAL, Standing.IDLE): Loss.RETURNS,
    (Evidence.REFUSAL, Standing.BUSY): Loss.RETURNS,
    (Evidence.REFUSAL, Standing.EMBEDDED): Loss.RETURNS,
    (Evidence.REFUSAL, Standing.IDLE_SCHEDULER): Loss.STAYS,
    (Evidence.REFUSAL, Standing.BUSY_SCHEDULER): Loss.STAYS,
    (Evidence.CUT, Standing.IDLE): Loss.LOST,
    (Evidence.CUT, Standing.BUSY): Loss.AWAY,
    (Evidence.CUT, Standing.EMBEDDED): Loss.LOST,
    (Evidence.CUT, Standing.IDLE_SCHEDULER): Loss.LOST,
    (Evidence.CUT, Standing.BUSY_SCHEDULER): Loss.AWAY,     # for ever
    (Evidence.SILENCE, Standing.IDLE): Loss.LOST,
    (Evidence.SILENCE, Standing.BUSY): Loss.LOST,
    (Evidence.SILENCE, Standing.EMBEDDED): Loss.LOST,
    (Evidence.SILENCE, Standing.IDLE_SCHEDULER): Loss.LOST,
    (Evidence.SILENCE, Standing.BUSY_SCHEDULER): Loss.AWAY,
    (Evidence.UNREACHED, Standing.IDLE): Loss.STAYS,
    (Evidence.UNREACHED, Standing.BUSY): Loss.STAYS,        # until it is overdue
    (Evidence.UNREACHED, Standing.EMBEDDED): Loss.STAYS,
    (Evidence.UNREACHED, Standing.IDLE_SCHEDULER): Loss.STAYS,
    (Evidence.UNREACHED, Standing.BUSY_SCHEDULER): Loss.STAYS,
    (Evidence.PROCESS_ENDED, Standing.IDLE): Loss.LOST,
    (Evidence.PROCESS_ENDED, Standing.BUSY): Loss.LOST,
    (Evidence.PROCESS_ENDED, Standing.EMBEDDED): Loss.LOST,
    (Evidence.PROCESS_ENDED, Standing.IDLE_SCHEDULER): Loss.STAYS,
    (Evidence.PROCESS_ENDED, Standing.BUSY_SCHEDULER): Loss.STAYS,   # the next reads its disk
    (Evidence.OTHER_INSTANCE, Standing.IDLE): Loss.LOST,
    (Evidence.OTHER_INSTANCE, Standing.BUSY): Loss.LOST,
    (Evidence.OTHER_INSTANCE, Standing.EMBEDDED): Loss.LOST,
    (Evidence.OTHER_INSTANCE, Standing.IDLE_SCHEDULER): Loss.LOST,
    (Evidence.OTHER_INSTANCE, Standing.BUSY_SCHEDULER): Loss.LOST,   # its disk is another, too
    (Evidence.OVERDUE, Standing.IDLE): Loss.LOST,
    (Evidence.OVERDUE, Standing.BUSY): Loss.LOST,
    (Evidence.OVERDUE, Standing.EMBEDDED): Loss.LOST,
    (Evidence.OVERDUE, Standing.IDLE_SCHEDULER): Loss.LOST,
    (Evidence.OVERDUE, Standing.BUSY_SCHEDULER): Loss.LOST,
}


class Opened(NamedTuple):
    """A computation of a client. CPUs are shared evenly between clients. If it is `remote`, its one
    node is a scheduler, which sees to attempts that fail."""
    comp: str
    client: str
    reentrant: bool
    remote: bool = False
    most: Optional[int] = None   # CPUs that it may use at once over all nodes
    speculate: bool = False      # its last jobs are started a second time, see `Speculation`
    user: str = ''               # whose it is, where users have limits or shares


class Submitted(NamedTuple):
    """New jobs, in order."""
    works: list


class CancelAsked(NamedTuple):
    """The user wants it ended."""
    work: ScheduledJob


class WithdrawAsked(NamedTuple):
    """The user wants these cancelled as far as they have not begun. For each of them it is answered
    by Withdrawn or, if it waited, by JobEnded."""
    works: list


class NodeReady(NamedTuple):
    """A node is set up for a computation; `held` are the serials it still knows of it; `name` is
    for people."""
    node: Any
    comp: str
    cpus: int
    held: list
    name: str = ''
    offers: int = 0   # CPUs that it has, also for others
    trip: float = 0.0   # s that a message to it and its answer take, 0 if that is not known
    past: AttemptHistory = AttemptHistory()
    whole: bool = True   # as in Account
    stock: Dict[str, int] = {}   # what it has of resources, and of memory


class NodeTold(NamedTuple):
    """A node has told what it knows of attempts of a computation, which may not be set up there."""
    node: Any
    comp: str
    account: Account


class NodeOffers(NamedTuple):
    """The CPUs of a node that a computation may use have changed; 0: nothing new is to be sent.
    `offers` as in NodeReady."""
    node: Any
    comp: str
    cpus: int
    offers: int = 0


class NodeDrains(NamedTuple):
    """Nothing new of a computation goes there, what has not started is called back; NodeDrained
    tells the end."""
    node: Any
    comp: str


class NodeResults(NamedTuple):
    """Rows of Results."""
    node: Any
    comp: str
    rows: list


class NodeStarted(NamedTuple):
    """Attempts that have begun there: rows of (serial, s that it has run)."""
    node: Any
    comp: str
    rows: list


class Repeat(NamedTuple):
    """A job that has failed, and was to be asked for, waits again: after so many seconds."""
    work: ScheduledJob
    delay: float


class RepeatNot(NamedTuple):
    """It does not: it has ended with this outcome."""
    work: ScheduledJob
    outcome: int


class NodeReturned(NamedTuple):
    """Attempts that were never started there."""
    node: Any
    comp: str
    serials: list


class NodeAway(NamedTuple):
    """The connection broke. What is there goes on, and is lost if there is no other connection
    until then."""
    node: Any
    name: str
    text: str
    until: float


class NodeTried(NamedTuple):
    """There is an attempt to reach a node that is away, or a connection on which it has not told
    what it holds: what is there is not lost before then. An `until` that has passed says that the
    attempt has failed."""
    node: Any
    until: float


class NodeHad(NamedTuple):
    """When a scheduler starts: jobs that were on a node when it ended; lost if the node does not
    come until then."""
    node: Any
    comp: str
    works: list
    name: str
    until: float


class SecondHad(NamedTuple):
    """When a scheduler starts, after NodeHad of the same node: a job that ran elsewhere was started
    there a second time, by an attempt with this serial."""
    node: Any
    comp: str
    work: Any
    serial: int


class SecondWins(NamedTuple):
    """A second attempt has finished; its result comes later."""
    node: Any
    comp: str
    serial: int


class NodeLost(NamedTuple):
    """The node is gone; `name` and `text` for people. `known`: computation -> what is known of it
    none the less."""
    node: Any
    name: str
    text: str
    known: Dict[str, Account] = {}


class NodeDoubted(NamedTuple):
    """There is evidence that a node is lost; LOSS_TABLE tells what follows. `name` and `text` are
    for people."""
    node: Any
    name: str
    evidence: Evidence
    text: str = ''
    kind: str = ''              # 'embedded', 'scheduler' or '', which is any other node
    comps: Sequence[str] = ()   # of BYE and REFUSAL: the computations that it speaks of
    until: float = -math.inf    # of CUT: as of NodeAway
    known: Dict[str, Account] = {}   # as of NodeLost


class NodeLeft(NamedTuple):
    """The node is not used for a computation any more; it was told before to end it."""
    node: Any
    comp: str
    name: str
    text: str


class Unloadable(NamedTuple):
    """No node can load the code of a computation, for this reason; an empty text: perhaps one
    can."""
    comp: str
    text: str


class Closed(NamedTuple):
    """The computation is over; what has not ended is cancelled."""
    comp: str


class RulesChanged(NamedTuple):
    """Users have other limits and shares from now on."""
    rules: 'UserRules'


# Actions.
class SendJobs(NamedTuple):
    """Send attempts, rows of works."""
    node: Any
    comp: str
    works: list


class SendSecond(NamedTuple):
    """Send second attempts of jobs that run elsewhere, rows of SecondAttempt."""
    node: Any
    comp: str
    works: list


class SecondOver(NamedTuple):
    """A second attempt counts no more; what it has sent is dropped."""
    node: Any
    comp: str
    second: 'SecondAttempt'


class SecondCounts(NamedTuple):
    """A second attempt is that of its job from now on: it has finished, or the first has failed.
    What it has sent takes the place of what the first has sent. `ran` as in NodeStarted, None if it
    is not known to have begun."""
    node: Any
    comp: str
    second: 'SecondAttempt'
    ran: Optional[float]


class SendCancel(NamedTuple):
    """Ask a node to end an attempt."""
    node: Any
    comp: str
    serials: list


class SendRecall(NamedTuple):
    """Ask a node for those of these attempts that have not begun."""
    node: Any
    comp: str
    serials: list


class LimitNode(NamedTuple):
    """A computation that may use so many CPUs over all nodes has this many of a node now."""
    node: Any
    comp: str
    cpus: int


class SendAck(NamedTuple):
    """Results are here; the node may forget them. No haste: they are kept and dropped if they come
    again."""
    node: Any
    comp: str
    serials: list


class JobsEnded(NamedTuple):
    """Results came: pairs of (work, row). Works are in their final states, or provisional."""
    node: Any
    comp: str
    pairs: list


class JobFailedOnce(NamedTuple):
    """An attempt of a job has failed that may be repeated: the program is to say whether it is, by
    Repeat or RepeatNot."""
    node: Any
    comp: str
    work: ScheduledJob
    row: tuple


class JobStays(NamedTuple):
    """Answers RepeatNot for a job that still waited for it."""
    work: ScheduledJob


class JobsStarted(NamedTuple):
    """Jobs have begun: pairs of (work, s that it has run)."""
    node: Any
    comp: str
    pairs: list


class Withdrawn(NamedTuple):
    """The answer to WithdrawAsked: whether the job will never begin."""
    work: Any
    gone: bool


class NodeDrained(NamedTuple):
    """A node that drains has no job of this computation any more."""
    node: Any
    comp: str


class NodeGone(NamedTuple):
    """A node was away too long."""
    node: Any


class JobWaits(NamedTuple):
    """A job that was on a node waits again."""
    work: Any


class JobParked(NamedTuple):
    """A job wants more CPUs than any node has; it waits beside the queue until there is one."""
    work: Any
    text: str


class JobsHeld(NamedTuple):
    """Jobs of a computation wait because of a limit of its user, which is said once."""
    comp: str
    text: str


class JobEnded(NamedTuple):
    """A job has ended without a result; `text` says why."""
    work: Any
    text: str


class Repeats:
    """When a job that has failed by itself is repeated: `dispy_retry_on`, `dispy_retry_delay`."""
    __slots__ = ('on', 'delay', 'most', 'is_program', 'failures')

    def __init__(self, on: Any, delay: float, most: int) -> None:
        self.on = on
        self.delay = delay
        self.most = most
        self.is_program = False
        self.failures = 0     # so far

    def may_be(self, outcome: int, lost: int) -> bool:
        """Whether a job with this outcome may be repeated, which was lost so many times."""
        failed = outcome in _OUTCOMES_FAILED or (self.is_program and outcome in RETURNED)
        return failed and self.failures + lost < self.most

    def next_delay(self, error: Optional[BaseException]) -> Optional[float]:
        """Seconds until it is tried again after this failure; None if it is not."""
        if error is None:
            return None
        if not (self.on is True or isinstance(error, self.on)):
            return None
        self.failures += 1
        return self.delay * 2 ** min(self.failures - 1, 60)  # type: ignore[no-any-return]


_OUTCOMES_FAILED = frozenset((
    Outcome.RAISED, Outcome.DIED, Outcome.TIMED_OUT, Outcome.OUT_OF_MEMORY))


class _Queue:
    """Jobs of one computation that wait: by priority, then in order."""

    def __init__(self) -> None:
        self._levels: Dict[int, Deque[ScheduledJob]] = {}
        self._order: List[int] = []     # priorities in use, highest last
        self.length = 0

    def _level(self, work: ScheduledJob) -> Deque[ScheduledJob]:
        if work.options:
            priority = work.options.get('priority', 0)
        else:
            priority = 0
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = collections.deque()
            self._order = sorted(self._levels)
        return level

    def push(self, work: ScheduledJob) -> None:
        """Behind those of its priority."""
        self.length += 1
        if work.options or 0 not in self._levels:
            self._level(work).append(work)
        else:
            self._levels[0].append(work)

    def push_front(self, work: ScheduledJob) -> None:
        """Before those of its priority: it has waited already."""
        self._level(work).appendleft(work)
        self.length += 1

    def head(self) -> Optional[ScheduledJob]:
        """The next one, left where it is."""
        while self._order:
            level = self._levels[self._order[-1]]
            while level and level[0].state not in _WAITING:
                level.popleft()
            if level:
                return level[0]
            del self._levels[self._order.pop()]
        return None

    def pop(self) -> ScheduledJob:
        """Take what `head` returned."""
        self.length -= 1
        level = self._levels[self._order[-1]]
        return level.popleft()

    def forget(self) -> None:
        """One that is in here was cancelled; it is dropped when it comes to the front."""
        self.length -= 1

    def take_out(self, is_meant: Callable[[ScheduledJob], bool]) -> List[ScheduledJob]:
        """Take out all jobs for which this is true."""
        taken: List[ScheduledJob] = []
        for level in self._levels.values():
            works = list(level)
            level.clear()
            for work in works:
                if work.state in _WAITING and is_meant(work):
                    taken.append(work)
                else:
                    level.append(work)
        self.length -= len(taken)
        return taken

    def __iter__(self) -> Iterator[ScheduledJob]:
        levels = self._levels.values()
        return (work for level in levels for work in level if work.state in _WAITING)


_WAITING = frozenset((JobState.CREATED, JobState.REQUEUED))
MEMORY = 'memory'   # of what a job needs, beside the resources that nodes name
ALL_KINDS = '*'     # what a scheduler has, which counts the resources of its nodes itself


def needs_of(work: ScheduledJob) -> Request:
    """What a job needs of its node beside CPUs: memory, and what it has asked for by name."""
    options = work.options
    if not options:
        return ()
    needs: Request = options.get('resources', ())
    memory = options.get('memory')
    if memory:
        needs += ((MEMORY, memory),)
    return needs


class Stock:
    """What a node has of resources beside CPUs, and what its jobs take of it."""
    __slots__ = ('counts', 'used')

    def __init__(self) -> None:
        self.counts: Dict[str, int] = {}      # without memory, if that is not known
        self.used: Dict[str, int] = collections.Counter()

    def has(self, needs: Request) -> bool:
        """Whether the node has this when nothing runs there."""
        return all(count <= self.most(name) for name, count in needs)

    def has_free(self, needs: Request) -> bool:
        """Whether it has this beside what its jobs take."""
        return all(count + self.used[name] <= self.most(name) for name, count in needs)

    def most(self, name: str) -> float:
        """How much of this it has: any number where that is not known."""
        if ALL_KINDS in self.counts:
            return math.inf
        return self.counts.get(name, math.inf if name == MEMORY else 0)

    def take(self, work: ScheduledJob, sign: int = 1) -> None:
        """A job comes; with -1 it goes."""
        for name, count in needs_of(work):
            self.used[name] += sign * count


def lack_at(nodes: Sequence['NodeLoad'], comp: 'ComputationLoad', cpus: int,
            needs: Request) -> str:
    """Why none of these nodes can give a job of a computation what it needs, for people; empty if
    one can."""
    for node in nodes:
        if cpus <= node.limits[comp.comp] and node.stock.has(needs):
            return ''
    widest = max(node.limits[comp.comp] for node in nodes)
    if cpus > widest:
        return 'it needs %d CPUs (dispy_cpus), and no node has more than %d' % (cpus, widest)
    if comp.remote:
        return 'it needs resources (dispy_resources), and the scheduler is of an earlier release ' \
            'of dispy, which does not know of them: update the scheduler and its nodes'
    for name, count in needs:
        most = max(node.stock.most(name) for node in nodes)
        if count > most and name == MEMORY:
            return 'it needs %d bytes of memory (dispy_memory), and no node has more than %d' % (
                count, most)
        if count > most:
            return 'it needs %d %s (dispy_resources), and no node has %s' % (
                count, name, 'more than %d' % most if most else 'any')
    words = [many(cpus, 'CPU')]
    words += ['%d %s' % (count, 'bytes of memory' if name == MEMORY else name)
              for name, count in needs]
    return 'it needs %s, and no node has all of that' % ', '.join(words)


class ScarceJobs:
    """Jobs of one computation that wait for resources which nodes name: a queue for each set of
    names, so that who waits for a device keeps nobody else waiting."""

    def __init__(self) -> None:
        self.queues: Dict[Tuple[str, ...], _Queue] = {}
        # The heads of queues for which no idle node has what they need
        self._blocked: Dict[Tuple[str, ...], ScheduledJob] = {}

    def queue_of(self, request: Request) -> _Queue:
        """Where jobs that ask for these wait."""
        key = tuple(name for name, _ in request)
        line = self.queues.get(key)
        if line is None:
            line = self.queues[key] = _Queue()
        return line

    def look_everywhere(self) -> None:
        """Look at all idle nodes the next time, not only at those that something has happened
        to."""
        self._blocked.clear()

    def length(self) -> int:
        """Return how many jobs wait here."""
        return sum(line.length for line in self.queues.values())

    def next(self, before: Optional[ScheduledJob], idle: Dict[Any, 'NodeLoad'],
             changed: Dict[Any, 'NodeLoad'],
             comp: str) -> Optional[Tuple['NodeLoad', _Queue, ScheduledJob]]:
        """An idle node for the head of a queue, that queue, and its head; None if there is none.
        `before` is the first of the jobs that wait for a CPU alone: those that come after it are
        left out."""
        for key, line in self.queues.items():
            work = line.head()
            if work is None or (before is not None and not _comes_before(work, before)):
                continue
            nodes: Iterable[NodeLoad] = idle.values()
            if self._blocked.get(key) is work:
                nodes = [node for node in changed.values() if node.key in idle]
            for node in nodes:
                if node.fits(comp, work):
                    self._blocked.pop(key, None)
                    return node, line, work
            self._blocked[key] = work   # until something happens to a node
        return None


def _comes_before(work: ScheduledJob, other: ScheduledJob) -> bool:
    """Whether a job has a CPU before another: by priority, then in order."""
    rank = (-priority_of(work), work.serial >> 16)
    return rank < (-priority_of(other), other.serial >> 16)


class SecondAttempt(ScheduledJob):
    """An attempt to run a job that runs elsewhere already, see `Speculation`.

    first - the job
    node - the key of the node where the attempt is
    begun - since when it runs, None if it is not known to
    rows - its provisional results, which are held back
    said - what it has printed and logged, which the driver holds back
    """
    __slots__ = ('first', 'node', 'begun', 'rows', 'said')

    def __init__(self, first: ScheduledJob, node: Any, serial: int) -> None:
        super().__init__(first.comp, first.payload, first.options)
        self.serial = serial
        self.first = first
        self.node = node
        self.begun: Optional[float] = None
        self.rows: List[tuple] = []
        self.said: List[Output] = []


class MedianDuration:
    """The median of how long the jobs of a computation took that have ended last."""

    def __init__(self) -> None:
        self._last: Deque[float] = collections.deque()
        self._sorted: List[float] = []

    def add(self, durations: Sequence[float]) -> None:
        """Jobs have ended; how long they took."""
        for seconds in durations:
            self._last.append(seconds)
            bisect.insort(self._sorted, seconds)
            if len(self._last) > DURATIONS_KEPT:
                oldest = self._last.popleft()
                del self._sorted[bisect.bisect_left(self._sorted, oldest)]

    @property
    def seconds(self) -> Optional[float]:
        """The median; None before enough have ended."""
        count = len(self._sorted)
        if count < SPECULATE_AFTER:
            return None
        lower = self._sorted[(count - 1) // 2]
        upper = self._sorted[count // 2]
        return (lower + upper) / 2


class SecondAttempts:
    """The second attempts of one computation."""

    def __init__(self) -> None:
        self.median = MedianDuration()
        self.by_serial: Dict[int, SecondAttempt] = {}
        self.of_job: Dict[ScheduledJob, SecondAttempt] = {}
        # Serials of attempts beside or before which another has failed: there is no third
        self.tried: Set[int] = set()
        # Number of a job -> the last of the serials that second attempts of it have had
        self._serials: Dict[int, int] = {}

    def new(self, work: ScheduledJob, node: Any, serial: int = 0) -> SecondAttempt:
        """A second attempt of a job at a node; its serial is new, or given."""
        number = job_number(work.serial)
        last = self._serials.get(number, 0)
        serial = serial or max(last, work.serial) + 1
        second = SecondAttempt(work, node, serial)
        self._serials[number] = serial
        self.by_serial[serial] = second
        self.of_job[work] = second
        return second

    def remove(self, second: SecondAttempt) -> None:
        """It counts no more, or it is that of its job."""
        del self.by_serial[second.serial]
        del self.of_job[second.first]

    def pass_over(self, work: ScheduledJob) -> None:
        """The next attempt of a job has a serial that none before had."""
        last = self._serials.pop(job_number(work.serial), 0)
        work.serial = max(work.serial, last)

    def forget(self, work: ScheduledJob) -> None:
        """A job has ended."""
        self._serials.pop(job_number(work.serial), None)
        self.tried.discard(work.serial)

    def at(self, key: Any) -> List[SecondAttempt]:
        """Those that are at a node."""
        return [second for second in self.by_serial.values() if second.node == key]


class UserRule(NamedTuple):
    """What a user, or a group of users, may have at once, and the part of what there is."""
    share: float = 1.0          # in proportion to the shares of others
    priority: int = 0           # the jobs of who has a higher one go first
    cpus: float = math.inf      # CPUs that the jobs on nodes may have
    jobs: float = math.inf      # jobs that may be on nodes


class UserRules(NamedTuple):
    """The rules by which a schedule limits users, and shares CPUs among them."""
    users: Mapping[str, UserRule] = types.MappingProxyType({})
    groups: Mapping[str, UserRule] = types.MappingProxyType({})
    members: Mapping[str, str] = types.MappingProxyType({})   # user -> group
    others: UserRule = UserRule()     # of users that are not named
    by_user: bool = False             # CPUs are shared among users; if not, among clients
    half_life: float = 0.0            # s after which half of the past use counts; 0: none counts

    @property
    def are_empty(self) -> bool:
        """Whether nobody is limited and users are not looked at."""
        return self == UserRules()


class UserLoad:
    """A user, or a group of users, in the schedule."""
    __slots__ = ('name', 'rule', 'group', 'cpus', 'jobs', 'running', 'recent', 'past', 'at')

    def __init__(self, name: str, rule: UserRule, group: Optional['UserLoad'] = None) -> None:
        self.name = name           # for people
        self.rule = rule
        self.group = group
        self.cpus = 0              # CPUs of the jobs on nodes, run or not
        self.jobs = 0              # these jobs
        self.running = 0           # CPUs of those that are known to run
        # CPUs that were used in the mean of the last minutes, and in that of the past by the
        # half-life of the rules, as these were at this time
        self.recent = 0.0
        self.past = 0.0
        self.at = 0.0

    @property
    def claim(self) -> float:
        """What it has of the CPUs and has had, in proportion to its share: who has least is
        next. With half a CPU more neither large nor small shares gain by the rounding to whole
        CPUs."""
        present = (self.recent + self.cpus + 0.5) / 2
        return (self.past + present) / self.rule.share

    def rank(self) -> Tuple[float, ...]:
        """Who has the least of this is next: by priority, then by the claims of the group and of
        the user."""
        if self.group is None:
            return -self.rule.priority, self.claim, 0.0
        return -self.rule.priority, self.group.claim, self.claim

    def admits(self, cpus: int, jobs: int = 1) -> bool:
        """Whether a job with so many CPUs, or several, may go to nodes now."""
        rule = self.rule
        if self.cpus + cpus > rule.cpus:
            return False
        if self.jobs + jobs > rule.jobs:
            return False
        return self.group is None or self.group.admits(cpus, jobs)

    def why_not(self, cpus: int) -> str:
        """Why a job with so many CPUs may not go to a node now, for people; empty if it may."""
        rule = self.rule
        if self.jobs >= rule.jobs:
            have = many(self.jobs, 'job')
            text = '%s has %s on nodes, and the limit is %d (--limit)'
            return text % (self.name, have, rule.jobs)
        if self.cpus + cpus > rule.cpus:
            text = '%s has %s, the next job needs %d, and the limit is %d (--limit)'
            have = many(self.cpus, 'CPU')
            return text % (self.name, have, cpus, rule.cpus)
        if self.group is not None:
            return self.group.why_not(cpus)
        return ''

    def never(self, cpus: int) -> str:
        """Why no job with so many CPUs may ever go to a node, for people; empty if one may."""
        if cpus > 1 and cpus > self.rule.cpus:
            return 'it needs %d CPUs (dispy_cpus), and the limit of %s is %d (--limit)' % (
                cpus, self.name, self.rule.cpus)
        if self.group is not None:
            return self.group.never(cpus)
        return ''

    def take(self, cpus: int, jobs: int) -> None:
        """Jobs go to nodes; with negative numbers they are back or have ended."""
        self.cpus += cpus
        self.jobs += jobs
        if self.group is not None:
            self.group.take(cpus, jobs)


def _mean(before: float, since: float, half_lives: float) -> float:
    """A mean of the past, after so many half-lives in which the value was `since`."""
    kept = 0.5 ** half_lives
    return before * kept + since * (1.0 - kept)


class UserLoads:
    """The users whose jobs a schedule has, their limits, and what they have used. No user has a
    load while there are no rules."""

    def __init__(self, rules: UserRules) -> None:
        self.rules = rules
        self._users: Dict[str, UserLoad] = {}
        self._groups: Dict[str, UserLoad] = {}
        self._advanced_at = -math.inf

    @property
    def by_user(self) -> bool:
        """Whether CPUs are shared among users."""
        return self.rules.by_user

    def load_of(self, name: str) -> Optional[UserLoad]:
        """The load of a user, who may be new; None without a name or without rules."""
        if not name or self.rules.are_empty:
            return None
        user = self._users.get(name)
        if user is None:
            group = self._group_of(name)
            rule = self.rules.users.get(name, self.rules.others)
            user = UserLoad('user ' + name, rule, group)
            self._users[name] = user
        return user

    def _group_of(self, name: str) -> Optional[UserLoad]:
        """The load of the group of a user, if he is in one."""
        group_name = self.rules.members.get(name)
        if group_name is None:
            return None
        group = self._groups.get(group_name)
        if group is None:
            rule = self.rules.groups.get(group_name, UserRule())
            group = self._groups[group_name] = UserLoad('group ' + group_name, rule)
        return group

    def loads(self) -> Dict[str, UserLoad]:
        """The loads of users by their names, and those of groups as @NAME."""
        found = dict(self._users)
        for name, load in self._groups.items():
            found['@' + name] = load
        return found

    # -- use over the past -------------------------------------------------------------------------

    def ran(self, user: UserLoad, cpus: int, now: float) -> None:
        """Jobs of a user run on so many CPUs more, or less."""
        self._advance(user, now)
        user.running += cpus
        if user.group is not None:
            self.ran(user.group, cpus, now)

    def charge(self, user: UserLoad, seconds: float, now: float) -> None:
        """A user has used CPUs for so many seconds, and it was not known that he did."""
        self._advance(user, now)
        used = seconds * math.log(2)
        user.recent += used / RECENT_TIME
        if self.rules.half_life:
            user.past += used / self.rules.half_life
        if user.group is not None:
            self.charge(user.group, seconds, now)

    def advance(self, now: float) -> None:
        """Time goes by: what was used counts less, and what is used counts more."""
        if now - self._advanced_at < RECENT_APART:
            return
        self._advanced_at = now
        for table in (self._users, self._groups):
            for load in table.values():
                self._advance(load, now)

    def _advance(self, load: UserLoad, now: float) -> None:
        """Means, with the weight 2 ** -(age / half-life) for each moment of the past."""
        age = now - load.at
        load.at = now
        if age <= 0:
            return
        load.recent = _mean(load.recent, load.running, age / RECENT_TIME)
        if self.rules.half_life:
            load.past = _mean(load.past, load.running, age / self.rules.half_life)

    def used(self, now: float) -> Dict[str, float]:
        """The CPUs that users have used in the mean of the past, by their names."""
        self._advanced_at = -math.inf
        self.advance(now)
        used = {}
        for name, user in self._users.items():
            if user.past >= PAST_LEAST:
                used[name] = user.past
        return used

    def keep(self, names: AbstractSet[str]) -> None:
        """Forget the users who have used nearly nothing, but these."""
        for name, user in list(self._users.items()):
            if name in names:
                continue
            if user.past < PAST_LEAST:
                del self._users[name]

    def restore(self, used: Dict[str, float], now: float) -> None:
        """Take over what users had used when the process before this one has ended."""
        for name, past in used.items():
            user = self.load_of(name)
            if user is None:
                continue
            for load in (user, user.group):
                if load is not None:
                    self._advance(load, now)
                    load.past += past

    def change(self, rules: UserRules, comps: Iterable['ComputationLoad'], now: float) -> None:
        """Let other rules hold, for these computations too."""
        used = self.used(now)
        self.rules = rules
        self._users = {}
        self._groups = {}
        if rules.half_life:
            self.restore(used, now)
        for comp in comps:
            comp.user = user = self.load_of(comp.user_name)
            if user is None:
                continue
            user.take(comp.cpus_in_flight, len(comp.running))
            for node in comp.nodes.values():
                flight = node.in_flight[comp.comp]
                begun = node.begun[comp.comp]
                running = sum(cpus_of(flight[serial]) for serial in begun)
                self.ran(user, running, now)


class ComputationLoad:
    """A computation in the schedule."""

    def __init__(self, opened: Opened, order: int) -> None:
        self.comp, self.client, self.reentrant, self.remote, self.most, speculates, user = opened
        self.seconds = SecondAttempts() if speculates and not self.remote else None
        self.user_name = user
        # Its user, if he has limits or a share
        self.user: Optional[UserLoad] = None
        # Whether jobs wait because of a limit of the user, and of which of them that was told
        self.held = False
        self.told: Set[str] = set()
        # Node -> CPUs that it may use there, if `most` were more
        self.offers: Dict[Any, int] = {}
        self.order = order
        self.queue = _Queue()
        self.pinned: Dict[Any, _Queue] = {}   # by node: jobs for that one alone
        self.scarce = ScarceJobs()
        self.too_wide: List[ScheduledJob] = []          # wanting more than any node has
        # CPUs and needs of jobs, to why no node has them, as far as `largest_node` is known
        self.lacks: Dict[Tuple[int, Request], str] = {}
        # Those of jobs that came when no node was there
        self.unchecked: Set[Tuple[int, Request]] = set()
        self.estimate = DurationEstimate()    # of a job
        # Number of a job -> times that it was called back by the schedule
        self.called: Dict[int, int] = {}
        # Jobs that have failed and may be repeated -> when; infinite until the program has said
        self.resting: Dict[ScheduledJob, float] = {}
        self.withdrawn: Set[ScheduledJob] = set()   # on nodes, and cancelled if they have not begun
        self.ranked = False                   # some jobs have a priority
        # When a job of it was sent last, in numbers of the schedule
        self.served = 0
        self.cpus_in_flight = 0                       # CPUs of jobs on nodes
        self.running: Dict[int, 'NodeLoad'] = {}   # serial -> where
        self.nodes: Dict[Any, 'NodeLoad'] = {}     # where it is set up; of these:
        self.idle: Dict[Any, 'NodeLoad'] = {}      # those with a CPU for it
        # Those that hold more of its jobs than they have CPUs
        self.overloaded: Dict[Any, 'NodeLoad'] = {}
        # Head of the queue that no idle node has room for
        self.blocked_head: Optional[ScheduledJob] = None
        self.unloadable = ''                    # why no node can load its code
        # Most CPUs that a node has for it, None if that is not known now
        self.largest_node: Optional[int] = None

    def rank(self) -> None:
        """One of its jobs has a priority; those before it have none."""
        self.ranked = True
        for node in self.nodes.values():
            part = node.parts[self.comp]
            node.ranks[self.comp] = collections.Counter({0: part})

    def queue_of(self, work: ScheduledJob) -> _Queue:
        """Where this job waits; which node it is for, a scheduler sees to."""
        if work.options and not self.remote:
            key = work.options.get('node')
            if key is None and 'resources' in work.options:
                return self.scarce.queue_of(work.options['resources'])
        else:
            key = None
        if key is None:
            return self.queue
        return self.pinned.setdefault(key, _Queue())

    def shared_queues(self) -> List[_Queue]:
        """Where jobs wait that are not for one node alone."""
        if self.scarce.queues:
            return [self.queue, *self.scarce.queues.values()]
        return [self.queue]

    def source(self, key: Any) -> _Queue:
        """Where a node's next job comes from: those for it alone go first."""
        if self.pinned:
            pinned = self.pinned.get(key)
        else:
            pinned = None
        if pinned is not None and pinned.length:
            return pinned
        return self.queue

    def length(self) -> int:
        """Jobs that wait, parked ones not counted."""
        length = self.queue.length
        if self.pinned:
            length += sum(queue.length for queue in self.pinned.values())
        if self.scarce.queues:
            length += self.scarce.length()
        return length

    def waiting(self) -> List[ScheduledJob]:
        """Return all jobs that wait."""
        queues = self.shared_queues() + list(self.pinned.values())
        queued = [work for queue in queues for work in queue]
        restings = list(self.resting)
        return queued + self.too_wide + restings

    def take_out(self, work: ScheduledJob) -> None:
        """One of these waits no more."""
        if work in self.resting:
            del self.resting[work]
        elif work in self.too_wide:
            self.too_wide.remove(work)
        else:
            self.queue_of(work).forget()

    def held_up(self) -> Tuple[int, str]:
        """How many jobs wait because of a limit of the user, and why, for people."""
        user = self.user
        count = 0
        text = ''
        if user is None:
            return count, text
        if self.held and self.length():
            count = self.length()
            work = self.queue.head()
            text = user.why_not(1 if work is None else cpus_of(work))
        for work in self.too_wide:
            reason = user.never(cpus_of(work))
            if reason:
                count += 1
                text = text or reason
        return count, text

    def not_begun(self) -> List[ScheduledJob]:
        """All that wait, and those on nodes that are not known to have begun."""
        found = self.waiting()
        for node in self.nodes.values():
            flight = node.in_flight[self.comp].values()
            for work in flight:
                if work.state is JobState.SENT:
                    found.append(work)
        return found

    def may_wait_there(self, work: ScheduledJob, times: int = RECALLS_MOST) -> bool:
        """Whether a job may be sent to a node that has no idle CPU for it: if it was called back
        less than so many times."""
        if not self.called:
            return True
        return self.called.get(work.serial >> 16, 0) < times


class NodeLoad:
    """A node in the schedule."""
    __slots__ = ('key', 'name', 'cpus', 'used', 'bytes', 'in_flight', 'comps', 'recalled', 'limits',
                 'parts', 'draining', 'away', 'offers', 'cpus_reserved', 'begun', 'ahead', 'ranks',
                 'trip', 'probe', 'tried_until', 'stock', 'seconds')

    def __init__(self, key: Any) -> None:
        self.key = key
        self.name = str(key)
        self.offers = 0     # CPUs that it has
        self.cpus = 0       # the same, or what a computation may use if that is more
        self.used = 0       # CPUs of jobs there, run or not
        self.cpus_reserved = 0      # of these, no more of a computation than it may use
        self.bytes = 0      # of their arguments
        self.trip = 0.0     # s that a message to it and its answer take
        # A job that was sent to an idle CPU, and when: what is over is the trip
        self.probe: Optional[Tuple[int, float]] = None
        self.draining: Set[str] = set()
        self.away: Optional[NodeAway] = None
        self.tried_until = -math.inf   # as in NodeTried
        self.stock = Stock()
        # Second attempts that are here; none is counted among the jobs
        self.seconds: List[SecondAttempt] = []
        self.comps: Dict[str, ComputationLoad] = {}              # set up there; of each of them:
        self.in_flight: Dict[str, Dict[int, ScheduledJob]] = {}   # serial -> work
        self.limits: Dict[str, int] = {}               # CPUs it may use there
        self.parts: Dict[str, int] = {}                # its part of `used`
        # Serial -> since when, of those that are known to run
        self.begun: Dict[str, Dict[int, float]] = {}
        # Serial -> whether for reasons of the schedule, of those called back
        self.recalled: Dict[str, Dict[int, bool]] = {}
        self.ahead: Dict[str, Allowance] = {}          # jobs a CPU that may wait there
        # Priority -> CPUs, if the computation has priorities
        self.ranks: Dict[str, Dict[int, int]] = {}

    def lost_at(self) -> float:
        """When what is on a node that is away is lost, unless it is reached before."""
        if self.away is None:
            return math.inf
        return max(self.away.until, self.tried_until)

    def begin(self, comp: ComputationLoad) -> None:
        """A computation is set up here, perhaps not for the first time."""
        if comp.comp not in self.comps:
            name = comp.comp
            self.comps[name] = comp
            self.in_flight[name], self.begun[name], self.recalled[name] = {}, {}, {}
            self.limits[name] = self.parts[name] = 0
            self.ahead[name] = Allowance(comp.estimate, 1, AHEAD_MOST)
            self.ranks[name] = collections.Counter()

    @property
    def horizon(self) -> float:
        """Seconds of work that may wait here: enough for the next to arrive before it is done."""
        return max(QUEUED_TIME, 2 * self.trip)

    @property
    def rounds(self) -> int:
        """How many rounds of jobs may end here until it is heard of."""
        return 1 + int(ROUNDS_FAR * self.trip / QUEUED_TIME)

    def reserve(self, comp: str, now: float, rivals: int = 1) -> int:
        """CPUs of jobs of a computation that may wait here, where so many share the node. A CPU
        whose job has run for as long as that work was to last is not counted: nobody knows when it
        will be free."""
        jobs = self.ahead[comp].jobs(self.horizon)
        ahead = jobs // rivals
        if ahead:
            return ahead * self._prompt(comp, now)
        return 0

    def bearable(self, comp: str, now: float) -> int:
        """CPUs of jobs that may go on waiting here by the mean of their lengths: what lasts twice
        as long as what would be sent. The quantile of short jobs goes up and down much on a machine
        that has other work."""
        mean = self.comps[comp].estimate.mean
        if mean is None:
            return 0
        return min(AHEAD_MOST, int(2 * self.horizon / mean)) * self._prompt(comp, now)

    def _prompt(self, comp: str, now: float) -> int:
        """CPUs of a computation that will be free before the next job can arrive."""
        begun = self.begun[comp]
        if not begun:
            return self.limits[comp]
        # A sum, as the timer's: a difference is rounded
        horizon = self.horizon
        flight = self.in_flight[comp]
        cpus = []
        for serial, since in begun.items():
            if since + horizon <= now:
                cpus.append(cpus_of(flight[serial]))
        stuck = sum(cpus)
        return max(0, self.limits[comp] - stuck)

    def choice(self, comp: ComputationLoad, sharers: Sequence[ComputationLoad]) -> int:
        """Jobs of a computation that shall wait here, where these share the node, so that each has
        some whenever a CPU becomes free: until others can come, however quick those are. When none
        of any has ended, its client's part of the CPUs and one behind these if all run."""
        # In whole milliseconds, so that a node finds what was computed for others
        row = comp.estimate.row(math.ceil(self.trip * 1000) / 1000 + TURN_TIME)
        limit = self.limits[comp.comp]
        if row or any(other.estimate.seconds is not None for other in sharers):
            return (row or ROW_FIRST) * max(1, limit // len(sharers))
        there = []
        for other in sharers:
            if other.client == comp.client:
                there.append(other)
        if not self.parts[comp.comp]:
            return 1
        parts = [self.parts[other.comp] for other in there]
        part = sum(parts)
        clients = {other.client for other in sharers}
        even = max(1, limit // len(clients))
        if part < even:
            return even - part + self.waits(comp.comp)
        return int(part <= limit and not any(self.waits(other.comp) for other in there))

    def is_shared(self, comp: ComputationLoad) -> bool:
        """Whether others have jobs here, or jobs that may come here."""
        if len(self.comps) < 2:
            return False
        for name, other in self.comps.items():
            if other is comp:
                continue
            if self.parts[name] or other.length():
                return True
        return False

    def runs(self) -> Dict[str, List[int]]:
        """Computation -> serials of its jobs that run here: those that have said so, then the first
        of those sent, as far as there are CPUs. Where there is more than the CPUs can take, the
        node shares them out evenly."""
        found: Dict[str, List[int]] = {}
        if not self.used:
            return found
        wants = sorted((min(part, self.limits[comp] or self.offers or part), comp)
                       for comp, part in self.parts.items() if part)
        left = self.cpus or self.offers or sum(want for want, _ in wants)
        for index, (want, comp) in enumerate(wants):
            flight = self.in_flight[comp]
            begun = self.begun[comp]
            serials = list(begun)
            cpus = [cpus_of(flight[serial]) for serial in begun]
            used = sum(cpus)
            most = max(min(want, -(-left // (len(wants) - index))), used)
            for serial, work in flight.items() if used < most else ():
                if serial not in begun:
                    used += cpus_of(work)
                    if used > most:
                        break
                    serials.append(serial)
            found[comp] = serials
            left = max(0, left - min(used, most))
        return found

    def learn(self, comp: ComputationLoad, ended: List[tuple], now: float) -> None:
        """Jobs have ended here: how long they took, and how long what they were sent with and told
        by. Rows of Results, of jobs that were taken off."""
        comp.estimate.add([row[3] - row[2] for row in ended if row[3] > row[2]])
        if comp.seconds is not None:
            durations = []
            for _, outcome, began, over, *_ in ended:
                if outcome in RETURNED and over > began:
                    durations.append(over - began)
            comp.seconds.median.add(durations)
        rounds = self.rounds
        if rounds > 1:
            if self.is_shared(comp):
                rounds = 1
        name = comp.comp
        self.ahead[name].ended(len(ended), len(self.in_flight[name]), self.limits[name], rounds)
        if self.probe is not None:
            serial, sent = self.probe
            for row in ended:
                if row[0] == serial:
                    self.trip = min(self.trip, max(0.0, now - sent - (row[3] - row[2])))
                    self.probe = None

    def waits(self, comp: str) -> int:
        """Jobs of a computation here that are not known to have begun."""
        return len(self.in_flight[comp]) - len(self.begun[comp])

    def standing_before(self, comp: ComputationLoad, work: ScheduledJob) -> int:
        """CPUs of jobs here that come before one that would be sent now; they differ in
        priority."""
        rank = priority_of(work)
        comp_rank = self.ranks[comp.comp]
        chosen_cpus = []
        for other, cpus in comp_rank.items():
            if other < rank:
                chosen_cpus.append(cpus)
        lower = sum(chosen_cpus)
        part = self.parts[comp.comp]
        limit = self.limits[comp.comp]
        return part - max(0, lower - limit)

    def limit(self, comp: str, cpus: int) -> None:
        """Set how many CPUs a computation may use."""
        self.limits[comp] = cpus
        self._count()

    def _count(self) -> None:
        self.cpus = max(self.offers, *self.limits.values(), 0)
        self.cpus_reserved = sum(min(part, self.limits[name]) for name, part in self.parts.items())

    def take(self, comp: str, cpus: int) -> None:
        """CPUs of one more job of a computation, negative of one less."""
        limit = self.limits[comp]
        before = self.parts[comp]
        after = self.parts[comp] = before + cpus
        self.used += cpus
        if after <= limit and before <= limit:
            self.cpus_reserved += cpus
        else:
            self.cpus_reserved += min(after, limit) - min(before, limit)

    def forget(self, comp: str) -> None:
        """It is over here; nothing of it is in flight."""
        for table in (self.in_flight, self.comps, self.limits, self.parts, self.begun,
                      self.recalled, self.ahead, self.ranks):
            table.pop(comp, None)  # type: ignore[attr-defined]
        self.draining.discard(comp)
        self._count()

    def room(self, comp: str) -> int:
        """CPUs that a computation would find idle here."""
        return min(self.cpus - self.cpus_reserved, self.limits[comp] - self.parts[comp])

    def fits(self, comp: str, work: ScheduledJob) -> bool:
        """Whether a job of a computation would find idle CPUs here, and what else it needs."""
        if cpus_of(work) > self.room(comp):
            return False
        return not work.options or self.may_get(work)

    def may_get(self, work: ScheduledJob) -> bool:
        """Whether a job finds here what it needs beside CPUs."""
        needs = needs_of(work)
        return not needs or self.stock.has_free(needs)


def cpus_of(work: ScheduledJob) -> int:
    """CPUs that a job uses."""
    return work.options.get('cpus', 1) if work.options else 1  # type: ignore[no-any-return]


def priority_of(work: ScheduledJob) -> int:
    """Jobs of higher ones go first."""
    return work.options.get('priority', 0) if work.options else 0  # type: ignore[no-any-return]


def move_job(work: ScheduledJob, event: str) -> JobState:
    """The one place where a job's state changes."""
    state = work.state = JOB_TABLE[work.state, event]
    return state


class Books:
    """What the schedule knows: the computations, the nodes, and which jobs are on which node. What
    is counted over these, such as the CPUs of a client's jobs, is changed here alone, so that the
    counts stay equal to what they count."""

    def __init__(self, users: UserLoads) -> None:
        self.comps: Dict[str, ComputationLoad] = {}
        self.users = users
        self.nodes: Dict[Any, NodeLoad] = {}
        self.away: Dict[Any, NodeLoad] = {}          # nodes that cannot be reached now
        self.returned_at = -math.inf                 # when one of them was reached again
        self.unfilled: Dict[Any, NodeLoad] = {}      # nodes to which more is sent in the next turn
        # With jobs that wait, and perhaps some that had
        self.waiting: Dict[str, ComputationLoad] = {}
        # Client -> CPUs of its jobs on nodes
        self.client_cpus: Dict[str, int] = collections.Counter()
        # Nodes that something has happened to since the last flush
        self.changed: Dict[Any, NodeLoad] = {}
        # (node, computation) -> jobs that were put there in this turn
        self._to_send: Dict[Tuple[Any, str], List[ScheduledJob]] = {}
        self.numbers = itertools.count()          # they tell what came earlier
        self.now = 0.0
        self._actions: List[Any] = []

    def begin(self, now: float) -> List[Any]:
        """An event or the end of a turn is looked at: the list of what is to be done about it."""
        self.now = now
        self._actions = []
        return self._actions

    def do(self, action: Any) -> None:
        """An action for whoever has called the schedule."""
        self._actions.append(action)

    def node(self, key: Any) -> NodeLoad:
        """The node with this key, which may be new."""
        node = self.nodes.get(key)
        if node is None:
            node = self.nodes[key] = NodeLoad(key)
        return node

    def pair(self, key: Any, name: str) -> Optional[Tuple[NodeLoad, ComputationLoad]]:
        """The node and the computation of an event, if the one is set up for the other."""
        node = self.nodes.get(key)
        comp = self.comps.get(name)
        if node is None:
            return None
        if comp is None:
            return None
        if name not in node.comps:
            return None
        return node, comp

    def put_on(self, node: NodeLoad, comp: ComputationLoad, work: ScheduledJob) -> None:
        """A job goes to a node."""
        move_job(work, 'send')
        if comp.blocked_head is work:
            comp.blocked_head = None
        if comp.seconds is not None:
            comp.seconds.pass_over(work)
        work.serial += 1
        cpus = cpus_of(work)
        node.take(comp.comp, cpus)
        if work.options:
            node.stock.take(work)
        node.bytes += _bytes_of(work)
        comp.cpus_in_flight += cpus
        comp.served = next(self.numbers)
        self.client_cpus[comp.client] += cpus
        if comp.user is not None:
            comp.user.take(cpus, 1)
        node.in_flight[comp.comp][work.serial] = work
        comp.running[work.serial] = node
        if comp.ranked:
            node.ranks[comp.comp][priority_of(work)] += cpus
        # It will not wait there
        if node.probe is None:
            if node.cpus_reserved == node.used:
                node.probe = (work.serial, self.now)
        if node.key in comp.idle:
            if node.room(comp.comp) < 1:
                self.look_at(node)
        works = self._to_send.get((node.key, comp.comp))
        if works is None:
            self._to_send[node.key, comp.comp] = [work]
            self.changed[node.key] = node
        else:
            works.append(work)

    def send(self) -> None:
        """Have those jobs sent that were put on nodes in this turn."""
        to_send = self._to_send
        self._to_send = {}   # or the last jobs, and their results, would be kept
        for (key, name), works in to_send.items():
            self.do(SendJobs(key, name, works))
            self.look_at(self.nodes[key])

    def were_on(self, node: NodeLoad, comp: ComputationLoad, works: Sequence[ScheduledJob]) -> None:
        """Jobs were sent to a node by the process before this one."""
        for work in works:
            move_job(work, 'send')
            self._is_there(node, comp, work)
            if work.options and 'priority' in work.options:
                comp.ranked = True
        for there in comp.nodes.values() if comp.ranked else ():
            there.ranks[comp.comp] = collections.Counter()
            for work in there.in_flight[comp.comp].values():
                there.ranks[comp.comp][priority_of(work)] += cpus_of(work)

    def goes_on_at(self, node: NodeLoad, comp: ComputationLoad, work: ScheduledJob) -> None:
        """An attempt that is at a node counts as that of its job from now on."""
        self._is_there(node, comp, work)
        node.bytes += _bytes_of(work)
        if comp.ranked:
            node.ranks[comp.comp][priority_of(work)] += cpus_of(work)
        self.changed[node.key] = node

    def _is_there(self, node: NodeLoad, comp: ComputationLoad, work: ScheduledJob) -> None:
        """Count an attempt that is at a node already. `put_on` counts the same for those that go
        there, without a call for each job."""
        cpus = cpus_of(work)
        node.take(comp.comp, cpus)
        node.stock.take(work)
        comp.cpus_in_flight += cpus
        self.client_cpus[comp.client] += cpus
        if comp.user is not None:
            comp.user.take(cpus, 1)
        node.in_flight[comp.comp][work.serial] = work
        comp.running[work.serial] = node

    def take_off(self, node: NodeLoad, comp: ComputationLoad,
                 serials: Sequence[int]) -> Dict[int, ScheduledJob]:
        """Take attempts off a node. Those are left out that are not there: results that come twice
        or too late."""
        landed: Dict[int, ScheduledJob] = {}
        flight = node.in_flight[comp.comp]
        cpus = 0
        size = 0
        if comp.user is not None:
            self._stop(node, comp, serials)
        known = [table for table in (node.begun[comp.comp], node.recalled[comp.comp]) if table]
        for serial in serials:
            work = flight.pop(serial, None)
            if work is not None:
                landed[serial] = work
                cpus += cpus_of(work)
                size += _bytes_of(work)
                if work.options:
                    node.stock.take(work, -1)
                del comp.running[serial]
                for table in known:
                    table.pop(serial, None)  # type: ignore[attr-defined]
                if comp.ranked:
                    node.ranks[comp.comp][priority_of(work)] -= cpus_of(work)
        if landed:
            node.take(comp.comp, -cpus)
            node.bytes -= size
            comp.cpus_in_flight -= cpus
            self.client_cpus[comp.client] -= cpus
            if comp.user is not None:
                comp.user.take(-cpus, -len(landed))
            self.changed[node.key] = node
            if node.draining:
                self.tell_drained(node, comp.comp)
        return landed

    def _stop(self, node: NodeLoad, comp: ComputationLoad, serials: Sequence[int]) -> None:
        """Attempts are taken off a node: their user does not use the CPUs of those that run any
        more."""
        begun = node.begun[comp.comp]
        flight = node.in_flight[comp.comp]
        user: Any = comp.user
        for serial in set(serials):
            if serial in begun:
                cpus = cpus_of(flight[serial])
                self.users.ran(user, -cpus, self.now)

    def tell_drained(self, node: NodeLoad, comp: str) -> None:
        """Nothing of a computation is on a node any more that was to become free of it."""
        if comp not in node.draining:
            return
        if not node.in_flight[comp]:
            self.do(NodeDrained(node.key, comp))

    def look_at(self, node: NodeLoad) -> None:
        """Note for which computations a node has an idle CPU, and of which it holds more than it
        runs."""
        surplus = (node.used > node.cpus or node.used > node.cpus_reserved) and node.away is None
        for name, comp in node.comps.items():
            if node.away is None and node.room(name) > 0:
                comp.idle[node.key] = node
            else:
                comp.idle.pop(node.key, None)
            known = len(node.begun[name]) + len(node.recalled[name])
            if surplus and len(node.in_flight[name]) > known:
                comp.overloaded[node.key] = node
            else:
                comp.overloaded.pop(node.key, None)

    def wait_again(self, comp: ComputationLoad, work: ScheduledJob) -> None:
        """A job waits before the others of its priority."""
        comp.queue_of(work).push_front(work)
        self.waiting[comp.comp] = comp
        self.do(JobWaits(work))

    def answer(self, comp: ComputationLoad, work: ScheduledJob) -> None:
        """What was to be withdrawn has begun, ended or cannot be asked for."""
        if work in comp.withdrawn:
            comp.withdrawn.discard(work)
            gone = work.state is JobState.CANCELLED
            self.do(Withdrawn(work, gone))

    def go_on_filling(self) -> None:
        """More is sent ahead to nodes for which the turn before had no time: these come first."""
        first = {}
        for key, node in self.unfilled.items():
            if self.nodes.get(key) is node:
                first[key] = node
        first.update(self.changed)
        self.changed = first
        self.unfilled = {}

    def may_return(self, node: NodeLoad) -> bool:
        """Whether a node that has not come back in its time is waited for a little longer. Many
        that were lost together, as when this process stood still, are admitted one after the
        other: while they come, or this process has no time to see whether they do, the last of
        them have more time."""
        away: Any = node.away
        last = away.until + RETURN_EACH * len(self.nodes)
        if self.now >= last or self.now - self.returned_at >= RETURN_APART:
            return False
        node.tried_until = min(last, self.now + RETURN_APART)
        return True

    def reached(self, node: NodeLoad) -> None:
        """A node can be reached, perhaps again."""
        if node.away is not None:
            self.returned_at = self.now
        node.away = None
        self.away.pop(node.key, None)
        self.changed[node.key] = node


# Options of jobs that do not move to another node which has an idle CPU
_FOR_ONE_NODE = frozenset(('node', 'resources'))


class Placement:
    """Which job goes to which node, and which is called back from there."""

    def __init__(self, books: Books, fifo: bool) -> None:
        self._books = books
        self._fifo = fifo
        self._left = 0     # jobs that may still be sent ahead in this turn

    def distribute(self) -> None:
        """First to CPUs that are idle; then to queues on the nodes that something has happened to.
        What this costs depends on how many nodes that are, not on how many there are. No more is
        sent ahead in one turn than what takes a fraction of a second."""
        self._left = AHEAD_A_TURN
        waiting = self._still_waiting()
        while waiting:
            for comp in waiting:
                self._park(comp)
            self._use_idle(waiting)
            waiting = self._still_waiting()
            if not waiting or not self._fill_queues(waiting):
                break
            waiting = self._still_waiting()   # another head may find an idle CPU
        self._books.send()

    def _use_idle(self, rivals: List[ComputationLoad]) -> None:
        """Jobs of these computations go to idle CPUs, as long as there are both."""
        for comp in rivals:
            comp.held = False
        while rivals:
            if len(rivals) > 1:
                comp = min(rivals, key=self._rank)
            else:
                comp = rivals[0]
            is_held = comp.user is not None and not self._admits(comp, 1)
            if is_held or not comp.length() or not self._start_one(comp):
                rivals.remove(comp)

    def _fill_queues(self, waiting: List[ComputationLoad]) -> bool:
        """Jobs of these computations go to queues on nodes. Returns whether any did. While a job
        waits that may go to idle CPUs only, none is sent, or there would never be an idle one."""
        changed = self._books.changed
        cpus = [node.cpus for node in changed.values()]
        total_cpus = sum(cpus)
        total = max(1, total_cpus)
        shares = {comp.comp: math.ceil(comp.length() / total) for comp in waiting}
        picky = [comp for comp in waiting if comp.called and not self._may_be_ahead(comp)]
        is_filled = False
        for node in list(changed.values()):
            if node.away is not None:
                continue
            if self._left <= 0:
                self._books.unfilled[node.key] = node
                continue
            alone = [comp for comp in picky if comp.comp in node.comps and not node.is_shared(comp)]
            if not alone and not self._is_contended(node):
                before = node.used
                is_filled = self._fill(node, shares) or is_filled
                self._left -= node.used - before
        return is_filled

    def _still_waiting(self) -> List[ComputationLoad]:
        books = self._books
        waiting = [comp for comp in books.waiting.values()
                   if comp.queue.length or (comp.pinned or comp.scarce.queues)
                   and comp.length()]
        if not waiting:
            books.waiting.clear()
        elif len(waiting) < len(books.waiting):
            books.waiting = {comp.comp: comp for comp in waiting}
        return waiting

    def _park(self, comp: ComputationLoad) -> None:
        """What no node can take shall not stop those behind it."""
        if comp.unchecked:
            self._park_all(comp)
        for line in (*comp.shared_queues(), *comp.pinned.values()):
            work = line.head()
            while work is not None and work.options and self.is_parked(comp, work):
                line.pop()
                work = line.head()

    def _park_all(self, comp: ComputationLoad) -> None:
        """The first node has come: what it cannot give is told, also to jobs that stand behind
        others."""
        self._look_for_largest(comp)
        if not comp.largest_node:
            return
        hopeless = {needs for needs in comp.unchecked if self._lack_of(comp, *needs)}
        comp.unchecked.clear()
        for line in comp.shared_queues() if hopeless else ():
            for work in line.take_out(lambda work: (cpus_of(work), needs_of(work)) in hopeless):
                self.is_parked(comp, work)

    def is_parked(self, comp: ComputationLoad, work: ScheduledJob) -> bool:
        """Whether a job needs more than any node has, for which it waits beside its queue. That is
        told."""
        pinned = None
        if not comp.remote:
            pinned = work.options.get('node')  # type: ignore[union-attr]
        if pinned is None:
            text = self._lack(comp, work)
        else:
            text = self._lack_there(comp, work, pinned)
        if text:
            comp.too_wide.append(work)
            self._books.do(JobParked(work, text))
        elif comp.user is not None:
            text = comp.user.never(cpus_of(work))
            if text:
                comp.too_wide.append(work)
                self._tell_limit(comp, text, text)
        return bool(text)

    def _tell_limit(self, comp: ComputationLoad, what: str, text: str) -> None:
        """Jobs of a computation wait because of a limit of its user, which is told once of each
        kind of jobs."""
        if what not in comp.told:
            comp.told.add(what)
            jobs_held = JobsHeld(comp.comp, text)
            self._books.do(jobs_held)

    def _admits(self, comp: ComputationLoad, cpus: int) -> bool:
        """Whether the user of a computation may have a job with so many CPUs on a node now."""
        user = comp.user
        if user is None or user.admits(cpus):
            return True
        comp.held = True
        # Nodes may change meanwhile that are not looked at for these jobs now
        comp.blocked_head = None
        comp.scarce.look_everywhere()
        self._tell_limit(comp, 'held', user.why_not(cpus))
        return False

    @staticmethod
    def _lack_there(comp: ComputationLoad, work: ScheduledJob, key: Any) -> str:
        """Why this node alone can never run a job; empty if it can, or cannot be used now."""
        node = comp.nodes.get(key)
        if node is None:
            return ''
        if node.away is not None:
            return ''
        if node.limits[comp.comp] <= 0:
            return ''
        text = lack_at([node], comp, cpus_of(work), needs_of(work))
        return text and '%s; it is for node %s alone' % (text, node.name)

    def _lack(self, comp: ComputationLoad, work: ScheduledJob) -> str:
        """Why no node can ever run a job; empty if one can, or if there is no node now."""
        cpus = cpus_of(work)
        needs = needs_of(work)
        if cpus == 1 and not needs:
            return ''
        self._look_for_largest(comp)
        if not comp.largest_node:
            comp.unchecked.add((cpus, needs))
            return ''
        return self._lack_of(comp, cpus, needs)

    @staticmethod
    def _lack_of(comp: ComputationLoad, cpus: int, needs: Request) -> str:
        """The same for what a job needs, where there are nodes."""
        text = comp.lacks.get((cpus, needs))
        if text is None:
            nodes = [node for node in comp.nodes.values()
                     if node.away is None and node.limits[comp.comp] > 0]
            text = comp.lacks[cpus, needs] = lack_at(nodes, comp, cpus, needs)
        return text

    @staticmethod
    def _look_for_largest(comp: ComputationLoad) -> None:
        if comp.largest_node is None:
            comp.lacks.clear()
            comp.largest_node = max((node.limits[comp.comp] for node in comp.nodes.values()
                                     if node.away is None), default=0)

    @staticmethod
    def _may_be_ahead(comp: ComputationLoad) -> bool:
        """Whether the next job of a computation may wait on a node."""
        work = comp.queue.head()
        if work is None:
            return True
        return comp.may_wait_there(work)

    def _rank(self, comp: ComputationLoad) -> Tuple[float, ...]:
        """Who has least of this is next: the claim of its user where users share, the CPUs of its
        client, of these its own, and the time when it was served last; or its place in the order
        of coming."""
        if self._fifo:
            return (comp.order,)
        own = (self._books.client_cpus[comp.client], comp.cpus_in_flight, comp.served)
        if comp.user is not None and self._books.users.by_user:
            return comp.user.rank() + own
        return own

    def _start_one(self, comp: ComputationLoad) -> bool:
        """Send the next job to an idle CPU."""
        books = self._books
        if comp.pinned and self._start_pinned(comp):
            return True
        work = comp.queue.head()
        if comp.scarce.queues:
            found = comp.scarce.next(work, comp.idle, books.changed, comp.comp)
            if found is not None:
                there, queue, first = found
                if self._admits(comp, cpus_of(first)):
                    books.put_on(there, comp, queue.pop())
                    return True
        if work is None:
            return False
        if comp.user is not None and not self._admits(comp, cpus_of(work)):
            return False
        nodes: Iterable[NodeLoad] = comp.idle.values()
        if comp.blocked_head is work:
            changed = books.changed.values()
            nodes = [node for node in changed if node.key in comp.idle]
        for node in nodes:
            if node.fits(comp.comp, work):
                books.put_on(node, comp, comp.queue.pop())
                return True
        comp.blocked_head = work   # until something happens to a node
        return False

    def _start_pinned(self, comp: ComputationLoad) -> bool:
        """Send a job that is for one node alone to an idle CPU there."""
        for key, pinned in comp.pinned.items():
            if not pinned.length or key not in comp.idle:
                continue
            node = comp.idle[key]
            work = pinned.head()
            if work is None:
                continue
            if node.fits(comp.comp, work) and self._admits(comp, cpus_of(work)):
                self._books.put_on(node, comp, pinned.pop())
                return True
        return False

    def _fill(self, node: NodeLoad, shares: Dict[str, int]) -> bool:
        """Send ahead what a node will soon come to: by how long jobs take; of long ones no more
        than a client's even part, so that the node, which gives a CPU to who has fewest, has
        someone to choose from. Returns whether anything is sent."""
        books = self._books
        comps = node.comps.values()
        rivals = [comp for comp in comps if comp.comp in shares and comp.source(node.key).length]
        if not rivals:
            return False
        if len(rivals) > 1:
            rivals.sort(key=self._rank)
        if self._fifo:   # the node shares its CPUs, and shall not have others to share them with
            del rivals[1:]
        sharers = [comp for comp in node.comps.values() if node.parts[comp.comp] or comp in rivals]
        before = node.used
        for comp in rivals:
            reserve = min(node.reserve(comp.comp, books.now, len(rivals)),
                          node.limits[comp.comp] * shares[comp.comp])
            if len(sharers) > 1 and not self._fifo:
                choice = node.choice(comp, sharers)
            else:
                choice = 0
            limit = node.limits[comp.comp]
            choice = min(choice, limit * shares[comp.comp])
            source = comp.source(node.key)
            while True:
                work = source.head()
                if work is None or not self._may_send(node, comp, work, reserve, choice):
                    break
                books.put_on(node, comp, source.pop())
                if comp.pinned:
                    source = comp.source(node.key)
        return node.used > before

    def _is_contended(self, node: NodeLoad) -> bool:
        """Whether users share CPUs and jobs of several are on a node, or may come there. None is
        sent ahead then: the node, which shares its CPUs evenly, does not know the users' shares."""
        if not self._books.users.by_user:
            return False
        users = set()
        for name, comp in node.comps.items():
            may_come = comp.length() and not comp.held
            if node.parts[name] or may_come:
                users.add(comp.user)
        return len(users) > 1

    def _may_send(self, node: NodeLoad, comp: ComputationLoad, work: ScheduledJob, reserve: int,
                  choice: int) -> bool:
        """Whether a job may go to a node that has no idle CPU for it, where jobs for so many CPUs
        may wait."""
        limit = node.limits[comp.comp]
        if node.bytes <= AHEAD_BYTES:
            fits = limit
        else:
            fits = node.room(comp.comp)
        if cpus_of(work) > fits:
            return False
        if comp.user is not None and not self._admits(comp, cpus_of(work)):
            return False
        if work.options and not comp.remote and self._takes_at_once(node, work):
            return False
        if comp.called and not comp.may_wait_there(work):
            return choice > 0 and not node.waits(comp.comp)   # no CPU is ever idle there
        if reserve or node.cpus_reserved < node.cpus:
            if comp.ranked:
                before = node.standing_before(comp, work)
            else:
                before = node.parts[comp.comp]
            if before < limit + reserve:
                return True
        return node.waits(comp.comp) < choice

    @staticmethod
    def _takes_at_once(node: NodeLoad, work: ScheduledJob) -> bool:
        """Whether a job has to find what it needs beside CPUs: what has units of a resource shall
        use them, and not wait for a CPU."""
        return 'resources' in (work.options or ()) or not node.may_get(work)

    def reduce(self, node: NodeLoad) -> None:
        """Call back what waits on a node far beyond the bound that holds now: jobs turn out to be
        longer than those before them, or some run that will not end soon."""
        books = self._books
        for name, comp in node.comps.items() if node.away is None else ():
            spare = node.parts[name] - node.limits[name]
            if spare <= 0 or comp.remote:
                continue
            if name in node.draining:
                continue
            reserve = node.reserve(name, books.now)
            if spare <= 2 * reserve:   # estimates go up and down a little
                continue
            shared = node.is_shared(comp)
            if not shared and spare <= node.bearable(name, books.now):
                continue
            sharers = list(node.comps.values())
            if not shared or spare > 2 * len(sharers) * node.choice(comp, sharers):
                cpus = [cpus_of(node.in_flight[name][serial]) for serial in node.recalled[name]]
                asked = sum(cpus)
                most = spare - reserve - asked
                # The last time is for an idle CPU elsewhere
                if shared:
                    times = 1
                else:
                    times = RECALLS_MOST
                serials = self.movable(node, comp, most, math.inf, times)
                self.call_back(node, comp, serials, True)

    def balance(self) -> None:
        """Call back what waits on one node while CPUs of another are idle."""
        for comp in self._books.comps.values():
            if not comp.overloaded:
                continue
            if not comp.idle:
                continue
            if comp.queue.length and not comp.held:
                continue
            # More than 64 are seen to in later turns
            idle = comp.idle.values()
            rooms = [node.room(comp.comp) for node in itertools.islice(idle, 64)]
            free = sum(rooms)
            called = 0
            for donor in list(comp.overloaded.values()):
                surplus = donor.used - min(donor.cpus, donor.cpus_reserved)
                # Of short jobs the idle CPUs get their part of all at once
                most = max(free, surplus * free // (free + donor.cpus))
                serials = self.movable(donor, comp, min(surplus, most), max(rooms), RECALLS_MOST)
                del comp.overloaded[donor.key]   # until it is looked at again
                self.call_back(donor, comp, serials, True)
                called += len(serials)
                if called >= free:
                    break

    def movable(self, node: NodeLoad, comp: ComputationLoad, most: int, room: float,
                times: int) -> List[int]:
        """Serials of the last attempts on a node that may not have begun, of up to so many CPUs:
        those of low priority first; none that was called back so many times already (0: however
        often). Less `room` than all: for another node."""
        begun = node.begun[comp.comp]
        recalled = node.recalled[comp.comp]
        serials: List[int] = []
        if most > 0:
            last = list(node.in_flight[comp.comp].items())[::-1]
        else:
            last = []
        if comp.ranked:
            last.sort(key=lambda item: priority_of(item[1]))
        for serial, work in last:
            if most <= 0:
                break
            if serial in begun:
                continue
            if serial in recalled:
                continue
            if work.state is not JobState.SENT:
                continue
            if times and not comp.may_wait_there(work, times):
                if room < math.inf:
                    continue
                break   # those before it would be overtaken
            for_this_node = bool(work.options) and not _FOR_ONE_NODE.isdisjoint(
                work.options)  # type: ignore[arg-type]
            if room < math.inf:
                if cpus_of(work) > room or for_this_node:
                    break
            serials.append(serial)
            most -= cpus_of(work)
        return serials

    def call_back(self, node: NodeLoad, comp: ComputationLoad, serials: List[int],
                  own: bool) -> None:
        """Ask a node for attempts; `own`: for reasons of the schedule, not because the user wants
        it."""
        if serials:
            node.recalled[comp.comp].update((serial, own) for serial in serials)
            action = SendRecall(node.key, comp.comp, serials)
            self._books.do(action)


class Limits:
    """How many CPUs of each node a computation may use."""

    def __init__(self, books: Books, placement: Placement) -> None:
        self._books = books
        self._placement = placement

    def limit(self, node: NodeLoad, comp: ComputationLoad, cpus: int) -> None:
        """A node offers a computation so many CPUs."""
        if comp.most is None:
            self._set_limit(node, comp, cpus)
        else:
            comp.offers[node.key] = cpus
            self._set_limit(node, comp, min(cpus, node.limits[comp.comp]))
            comp_limit = node.limits[comp.comp]
            action = LimitNode(node.key, comp.comp, comp_limit)
            self._books.do(action)
            self._share_limits(comp)

    def _share_limits(self, comp: ComputationLoad) -> None:
        """Give a computation that may use so many CPUs over all nodes those that it has not got:
        of the node that came first, as far as that has more."""
        left = (comp.most or 0) - sum(node.limits[comp.comp] for node in comp.nodes.values())
        for key, node in comp.nodes.items():
            limit = node.limits[comp.comp]
            offer = comp.offers.get(key, 0)
            more = min(left, offer - limit)
            if not more > 0:
                continue
            if node.away is not None:
                continue
            left -= more
            self._set_limit(node, comp, limit + more)
            cpus = limit + more
            action = LimitNode(key, comp.comp, cpus)
            self._books.do(action)

    def _set_limit(self, node: NodeLoad, comp: ComputationLoad, cpus: int) -> None:
        placement = self._placement
        books = self._books
        node.draining.discard(comp.comp)
        lowered = cpus < node.limits[comp.comp]
        node.limit(comp.comp, cpus)
        if lowered and node.away is None and not comp.remote:
            part = node.parts[comp.comp]
            most = part - cpus - node.reserve(comp.comp, books.now)
            movable = placement.movable(node, comp, most, math.inf, 0)
            placement.call_back(node, comp, movable, False)
        comp.largest_node = None
        books.changed[node.key] = node

    def forget(self, node: NodeLoad, comp: ComputationLoad) -> None:
        """A computation is over on a node; nothing of it is in flight there."""
        node.forget(comp.comp)
        for table in (comp.nodes, comp.idle, comp.overloaded, comp.offers):
            table.pop(node.key, None)  # type: ignore[attr-defined]
        comp.largest_node = None
        self._books.changed[node.key] = node
        if comp.most is not None:
            self._share_limits(comp)

    def unpark_all(self, comp: ComputationLoad) -> None:
        """Other limits hold: what waits beside the queue is looked at again."""
        for work in reversed(comp.too_wide):
            comp.queue_of(work).push_front(work)
            self._books.waiting[comp.comp] = comp
        comp.too_wide = []

    def unpark(self, comp: ComputationLoad, node: NodeLoad) -> None:
        """A node with more CPUs has come."""
        stay = []
        for work in reversed(comp.too_wide):
            if lack_at([node], comp, cpus_of(work), needs_of(work)):
                stay.append(work)
            else:
                comp.queue_of(work).push_front(work)
                self._books.waiting[comp.comp] = comp
        comp.too_wide = stay[::-1]


class Repetitions:
    """Jobs that have failed, and are tried again if their program says so.

    rests - a heap of jobs that rest, each with the time when it waits again and a number
    """

    def __init__(self, books: Books) -> None:
        self._books = books
        self.rests: List[Tuple[float, int, ScheduledJob]] = []

    def is_asked_for(self, comp: ComputationLoad, work: ScheduledJob, row: tuple) -> bool:
        """Whether the program is to say if a job is repeated that has ended so. It waits until
        then."""
        if work.options:
            repeats: Optional[Repeats] = work.options.get('repeats')
        else:
            repeats = None
        if repeats is None:
            return False
        if not repeats.may_be(row[1], len(work.lost_with)):
            return False
        if work.state is JobState.CANCELLING:
            return False
        move_job(work, 'back')
        self._books.answer(comp, work)
        comp.resting[work] = math.inf
        return True

    def _where_it_rests(self, work: ScheduledJob) -> Optional[ComputationLoad]:
        """The computation of a job that rests; None if it was cancelled meanwhile."""
        comp = self._books.comps.get(work.comp)
        if comp is None or work not in comp.resting:
            return None
        return comp

    def repeat(self, event: Repeat) -> None:
        """A job is to be tried again, after a delay."""
        work = event.work
        books = self._books
        comp = self._where_it_rests(work)
        if comp is None:
            return
        until = comp.resting[work] = books.now + event.delay
        next_number = next(books.numbers)
        heapq.heappush(self.rests, (until, next_number, work))
        books.do(JobWaits(work))

    def stay(self, event: RepeatNot) -> None:
        """The last failure of a job was its end."""
        work = event.work
        books = self._books
        comp = self._where_it_rests(work)
        if comp is None:
            return
        del comp.resting[work]
        move_job(work, _EVENT_OF[Outcome(event.outcome)])
        books.do(JobStays(work))

    def wake(self) -> None:
        """Jobs that have rested wait for a CPU."""
        while self.rests and self.rests[0][0] <= self._books.now:
            self._rested(*heapq.heappop(self.rests))

    def _rested(self, until: float, number: int, work: ScheduledJob) -> None:
        books = self._books
        comp = books.comps.get(work.comp)
        if comp is None:
            return
        if comp.resting.get(work) != until:
            return
        del comp.resting[work]
        comp.queue_of(work).push(work)
        books.waiting[comp.comp] = comp
        for node in itertools.islice(comp.nodes.values(), 64):
            books.changed[node.key] = node


class Speculation:
    """Starts the last running jobs of computations that want it a second time, on idle CPUs of
    other nodes, when nothing waits and they have run for much longer than others took. What
    finishes first counts. A failure of one attempt counts for nothing while the other goes on.

    A second attempt is not counted among the jobs of its node: to all else its CPUs are idle. What
    needs them is sent there, and the second attempt is ended for it.

    due - when the first job will have run for so long that it may be started a second time
    """

    def __init__(self, books: Books) -> None:
        self._books = books
        self._comps: Dict[str, ComputationLoad] = {}   # that want it
        self.due = math.inf

    def begin(self, comp: ComputationLoad) -> None:
        """A computation is opened."""
        if comp.seconds is not None:
            self._comps[comp.comp] = comp

    def closed(self, comp: ComputationLoad) -> None:
        """A computation is over."""
        self._comps.pop(comp.comp, None)
        if comp.seconds is not None:
            for second in list(comp.seconds.by_serial.values()):
                self._drop(comp, second)

    # -- the end of a turn -------------------------------------------------------------------------

    def look(self) -> None:
        """End second attempts that are in the way of jobs, and start others."""
        self.due = math.inf
        for comp in self._comps.values():
            self._make_way(comp)
            self._start_late(comp)

    def _make_way(self, comp: ComputationLoad) -> None:
        """End those of a computation whose CPUs, or what else they use, a job needs."""
        seconds: Any = comp.seconds
        for second in list(seconds.by_serial.values()):
            node = self._books.nodes[second.node]
            if node.away is not None:
                continue
            place = node.seconds.index(second)
            before = node.seconds[:place]
            fits = self._fits(node, second, before)
            if not fits or not self._is_within_limits(comp):
                self._cancel(comp, second)

    @staticmethod
    def _is_within_limits(comp: ComputationLoad, work: Optional[ScheduledJob] = None) -> bool:
        """Whether the limits of the user leave room for all second attempts of a computation, and
        for one of this job besides."""
        if comp.user is None:
            return True
        seconds: Any = comp.seconds
        works = list(seconds.by_serial.values())
        if work is not None:
            works.append(work)
        cpus = sum(map(cpus_of, works))
        return comp.user.admits(cpus, len(works))

    @staticmethod
    def _fits(node: NodeLoad, second: ScheduledJob, others: Sequence[ScheduledJob]) -> bool:
        """Whether a second attempt finds at a node what it needs, beside the jobs there and these
        second attempts."""
        needs: Dict[str, int] = collections.Counter()
        cpus = 0
        own = 0     # CPUs of the same computation
        for work in (second, *others):
            count = cpus_of(work)
            cpus += count
            if work.comp == second.comp:
                own += count
            for name, units in needs_of(work):
                needs[name] += units
        limit = node.limits[second.comp]
        own += node.parts[second.comp]
        if node.used + cpus > node.cpus:
            return False
        if own > limit:
            return False
        request = tuple(needs.items())
        return node.stock.has_free(request)

    def _start_late(self, comp: ComputationLoad) -> None:
        """Start those jobs of a computation a second time that have run for long enough."""
        median = comp.seconds.median.seconds  # type: ignore[union-attr]
        if median is None or not comp.idle or comp.length():
            return
        late = []
        for node in comp.nodes.values():
            flight = node.in_flight[comp.comp]
            for serial, since in node.begun[comp.comp].items():
                work = flight[serial]
                if not self._may_be_started(comp, work):
                    continue
                due = since + SPECULATE_TIMES * median
                if due <= self._books.now:
                    late.append((since, serial))
                else:
                    self.due = min(self.due, due)
        late.sort()
        for _, serial in late:
            node = comp.running[serial]
            self._start(comp, node, serial)

    @staticmethod
    def _may_be_started(comp: ComputationLoad, work: ScheduledJob) -> bool:
        """Whether there may be a second attempt of a job that runs."""
        seconds: Any = comp.seconds
        if work.state not in _GOING_ON or work in seconds.of_job:
            return False
        if work.options and work.options.get('node') is not None:
            return False
        return work.serial not in seconds.tried

    def _start(self, comp: ComputationLoad, first: NodeLoad, serial: int) -> None:
        """Start a job a second time, if a CPU of another node is idle that no job may want."""
        work = first.in_flight[comp.comp][serial]
        if not self._is_within_limits(comp, work):
            return
        for node in comp.idle.values():
            if node is first or self._is_wanted(node):
                continue
            if self._fits(node, work, node.seconds):
                seconds: Any = comp.seconds
                second = seconds.new(work, node.key)
                node.seconds.append(second)
                send_second = SendSecond(node.key, comp.comp, [second])
                self._books.do(send_second)
                return

    @staticmethod
    def _is_wanted(node: NodeLoad) -> bool:
        """Whether jobs wait that might come to a node."""
        for comp in node.comps.values():
            if comp.length() or comp.overloaded:
                return True
        return False

    # -- what nodes tell ---------------------------------------------------------------------------

    def at(self, key: Any, comp: ComputationLoad, serial: int) -> Optional[SecondAttempt]:
        """The second attempt with this serial, if it is at this node."""
        if comp.seconds is None:
            return None
        second = comp.seconds.by_serial.get(serial)
        if second is None or second.node != key:
            return None
        return second

    def find(self, key: Any, name: str, serial: int) -> Optional[SecondAttempt]:
        """The same by the name of a computation, which may be over or have none."""
        comp = self._comps.get(name)
        if comp is None:
            return None
        return self.at(key, comp, serial)

    def had(self, event: SecondHad) -> None:
        """One that was started by the process before this one."""
        comp = self._books.comps[event.comp]
        if comp.seconds is None:
            return
        second = comp.seconds.new(event.work, event.node, event.serial)
        self._books.nodes[event.node].seconds.append(second)

    def started(self, node: NodeLoad, comp: ComputationLoad, serial: int, ran: float) -> None:
        """An attempt that is none of the jobs there has begun."""
        second = self.at(node.key, comp, serial)
        if second is not None:
            second.begun = self._books.now - max(0.0, ran)

    def held(self, node: NodeLoad, comp: ComputationLoad, account: Account) -> Set[int]:
        """What a node knows is compared with what was sent there. Returns the serials that are
        there."""
        there = set()
        for second in comp.seconds.at(node.key) if comp.seconds is not None else ():
            verdict, _ = account.verdict(second.serial, Occasion.CONNECTED)
            if verdict is Verdict.STAYS:
                there.add(second.serial)
            else:
                self._drop(comp, second)
        return there

    def returned(self, node: NodeLoad, comp: ComputationLoad, serial: int) -> None:
        """A node gives one back that has not begun."""
        second = self.at(node.key, comp, serial)
        if second is not None:
            self._fail(comp, second)

    def lost(self, node: NodeLoad, comp: ComputationLoad) -> None:
        """A node is gone."""
        for second in comp.seconds.at(node.key) if comp.seconds is not None else ():
            self._drop(comp, second)

    def results(self, node: NodeLoad, comp: ComputationLoad, rows: List[tuple]) -> List[tuple]:
        """Rows of Results without those that do not count: failures of second attempts, and what
        these send before it is known whether they count. One that has finished is that of its job
        from now on."""
        if comp.seconds is None:
            return rows
        counting = []
        for row in rows:
            second = self.at(node.key, comp, row[0])
            if second is not None and row[1] in PROVISIONAL:
                second.rows.append(row)
            elif second is not None and row[1] not in RETURNED:
                self._fail(comp, second)
            else:
                if second is not None:
                    self._let_count(comp, second)
                counting.append(row)
        return counting

    def came(self, comp: ComputationLoad, pairs: Sequence[Tuple[ScheduledJob, tuple]]) -> None:
        """Jobs have ended, or have a provisional result."""
        for work, _ in pairs if comp.seconds is not None else ():
            if work.state in ENDED:
                self.ended(comp, work)

    def wins(self, event: SecondWins) -> None:
        """One has finished; its result comes later."""
        pair = self._books.pair(event.node, event.comp)
        if pair is None:
            return
        node, comp = pair
        second = self.at(node.key, comp, event.serial)
        if second is not None:
            self._let_count(comp, second)

    # -- what becomes of the job -------------------------------------------------------------------

    def ended(self, comp: ComputationLoad, work: ScheduledJob) -> None:
        """A job has ended, or is not wanted any more: so is its second attempt."""
        seconds = comp.seconds
        if seconds is None:
            return
        second = seconds.of_job.get(work)
        if second is not None:
            self._cancel(comp, second)
        if work.state in ENDED:
            seconds.forget(work)

    def goes_on(self, comp: ComputationLoad, work: ScheduledJob) -> bool:
        """Whether a job goes on whose first attempt has ended and is on no node any more: its
        second is that of the job then."""
        if comp.seconds is None or work.state is JobState.CANCELLING:
            return False
        second = comp.seconds.of_job.get(work)
        if second is None:
            return False
        self._let_count(comp, second)
        return True

    def _let_count(self, comp: ComputationLoad, second: SecondAttempt) -> None:
        """A second attempt takes the place of the first, which is ended if it goes on."""
        books = self._books
        work = second.first
        before = comp.running.get(work.serial)
        if before is not None:
            books.take_off(before, comp, [work.serial])
            send_cancel = SendCancel(before.key, comp.comp, [work.serial])
            books.do(send_cancel)
        else:
            seconds: Any = comp.seconds
            seconds.tried.add(second.serial)
        self._remove(comp, second)
        work.serial = second.serial
        node = books.nodes[second.node]
        books.goes_on_at(node, comp, work)
        ran = None
        if second.begun is not None:
            ran = books.now - second.begun
            node.begun[comp.comp][work.serial] = second.begun
            if comp.user is not None:
                books.users.ran(comp.user, cpus_of(work), books.now)
        elif before is None:   # otherwise it has finished
            move_job(work, 'back')
            books.do(JobWaits(work))
            move_job(work, 'send')
        second_counts = SecondCounts(node.key, comp.comp, second, ran)
        books.do(second_counts)
        pairs = []
        for row in second.rows:
            move_job(work, 'provisional')
            pairs.append((work, row))
        if pairs:
            jobs_ended = JobsEnded(node.key, comp.comp, pairs)
            books.do(jobs_ended)

    def _fail(self, comp: ComputationLoad, second: SecondAttempt) -> None:
        """A second attempt has failed: the first goes on, and has no other."""
        seconds: Any = comp.seconds
        seconds.tried.add(second.first.serial)
        self._drop(comp, second)

    def _cancel(self, comp: ComputationLoad, second: SecondAttempt) -> None:
        self._drop(comp, second)
        send_cancel = SendCancel(second.node, comp.comp, [second.serial])
        self._books.do(send_cancel)

    def _drop(self, comp: ComputationLoad, second: SecondAttempt) -> None:
        self._remove(comp, second)
        second_over = SecondOver(second.node, comp.comp, second)
        self._books.do(second_over)

    def _remove(self, comp: ComputationLoad, second: SecondAttempt) -> None:
        seconds: Any = comp.seconds
        seconds.remove(second)
        node = self._books.nodes[second.node]
        node.seconds.remove(second)


_GOING_ON = frozenset((JobState.RUNNING, JobState.PROVISIONAL))


class Losses:
    """What becomes of jobs whose node is away, is lost, or has told what it knows of them."""

    def __init__(self, books: Books, limits: Limits, speculation: Speculation) -> None:
        self._books = books
        self._limits = limits
        self._speculation = speculation

    def away(self, event: NodeAway) -> None:
        """What is there goes on for a while."""
        books = self._books
        node = books.nodes.get(event.node)
        if node is not None:
            node.away = event
            node.tried_until = -math.inf
            books.away[node.key] = node
            books.changed[node.key] = node
            for comp in node.comps.values():
                comp.largest_node = None
                there = [work for work in comp.withdrawn if comp.running.get(work.serial) is node]
                for work in there:
                    books.answer(comp, work)

    def tried(self, event: NodeTried) -> None:
        """It is not lost before that attempt has failed."""
        node = self._books.nodes.get(event.node)
        if node is None:
            return
        if node.away is not None:
            node.tried_until = event.until

    def lost(self, event: NodeLost) -> None:
        """A node is gone for all computations."""
        books = self._books
        node = books.nodes.get(event.node)
        if node is None:
            return
        for name in list(node.comps):
            account = event.known.get(name)
            self._leave(node, name, event.name, event.text, account)
        if not node.comps:
            del books.nodes[event.node]
            books.away.pop(node.key, None)
            books.changed.pop(node.key, None)

    def left(self, event: NodeLeft) -> None:
        """A computation does not use a node any more."""
        node = self._books.nodes.get(event.node)
        if node is None:
            return
        if event.comp in node.comps:
            self._leave(node, event.comp, event.name, event.text)

    def _leave(self,
               node: NodeLoad,
               name: str,
               node_name: str,
               text: str,
               account: Optional[Account] = None) -> None:
        comp = node.comps[name]
        node.draining.discard(name)
        self._speculation.lost(node, comp)
        for serial in sorted(node.in_flight[name], reverse=True):   # each goes to the front
            verdict = KNOWN_TABLE[Known.SILENT if account is None else account.known(serial),
                                  Occasion.ENDED]
            if verdict is Verdict.WAITS:
                self.give_back(node, comp, serial)
            elif verdict is Verdict.LOST:
                off = self._books.take_off(node, comp, [serial])
                for work in off.values():
                    self.lose(comp, work, node_name, text)
        if not node.in_flight[name]:
            self._limits.forget(node, comp)

    def lose(self, comp: ComputationLoad, work: ScheduledJob, node_name: str, text: str) -> None:
        """An attempt whose node, or worker if it may be retried, is lost: nobody knows how far it
        came, and whether it had begun, whatever was known last. One that is known not to have begun
        comes by `give_back`."""
        books = self._books
        if self._speculation.goes_on(comp, work):
            return
        books.answer(comp, work)
        work.lost_with += (node_name,)
        if work.options:
            retries = work.options.get('retries')
        else:
            retries = None
        if retries:
            times = retries + 1
        elif comp.reentrant:
            times = MAX_ATTEMPTS
        else:
            times = 1
        nodes = list(dict.fromkeys(work.lost_with))
        tried = len(work.lost_with)
        if retries and 'repeats' in work.options:  # type: ignore[operator]
            tried += work.options['repeats'].failures  # type: ignore[index]
        may_go_on = tried < times and (retries or len(nodes) < MAX_LOST_NODES)
        if may_go_on and work.state is not JobState.CANCELLING:
            move_job(work, 'back')
            books.wait_again(comp, work)
        elif move_job(work, 'give up') is JobState.CANCELLED:
            books.do(JobEnded(work, 'cancelled; its node was lost meanwhile'))
        else:
            action = JobEnded(work, _abandoned(work, nodes, text, times, bool(retries)))
            books.do(action)

    def settle(self, node: NodeLoad, comp: ComputationLoad, account: Account,
               occasion: Occasion) -> None:
        """What becomes of attempts that were sent to a node, by what is known there."""
        for serial in sorted(node.in_flight[comp.comp], reverse=True):   # each goes to the front
            verdict, text = account.verdict(serial, occasion)
            if verdict is Verdict.WAITS:
                self.give_back(node, comp, serial)
            elif verdict is Verdict.LOST:
                off = self._books.take_off(node, comp, [serial])
                for work in off.values():
                    self.lose(comp, work, node.name, text)

    def give_back(self, node: NodeLoad, comp: ComputationLoad, serial: int) -> None:
        """An attempt that was never started: the job waits again."""
        books = self._books
        own = node.recalled[comp.comp].get(serial, False)
        off = books.take_off(node, comp, [serial])
        for work in off.values():
            if self._speculation.goes_on(comp, work):
                continue
            if own:
                comp.called[job_number(serial)] = comp.called.get(job_number(serial), 0) + 1
            if work in comp.withdrawn:
                if work.state is not JobState.CANCELLING:
                    move_job(work, 'cancel')
            if move_job(work, 'back') is JobState.REQUEUED:
                books.wait_again(comp, work)
            else:
                books.do(JobEnded(work, 'cancelled before it was started'))
                books.answer(comp, work)


def _check_outcomes(rows: Sequence[tuple]) -> None:
    """Raises PeerError for a result whose outcome this version does not know."""
    for row in rows:
        if row[1] not in OUTCOMES:
            raise PeerError('a result with an unknown outcome')


class ScheduleRequests:
    """What clusters ask of a Schedule about jobs: to run them, to cancel them, to withdraw them."""

    def __init__(self, books: Books, placement: Placement, speculation: Speculation) -> None:
        self._books = books
        self._placement = placement
        self._speculation = speculation
        self._numbers = itertools.count(1)

    def submit(self, event: Submitted) -> None:
        """Jobs wait for a node."""
        books = self._books
        comps = books.comps
        for work in event.works:
            # One with a journal has its number
            work.serial = work.serial or next(self._numbers) << 16
            comp = comps.get(work.comp)
            if comp is None:
                move_job(work, 'cancel')
                books.do(JobEnded(work, 'the cluster was closed'))
                continue
            if comp.unloadable:
                move_job(work, 'fail')
                books.do(JobEnded(work, comp.unloadable))
                continue
            if work.options and 'priority' in work.options:
                if not comp.ranked:
                    comp.rank()
            if work.options and self._placement.is_parked(comp, work):
                continue
            comp.queue_of(work).push(work)
            books.waiting[comp.comp] = comp
            if comp.idle:
                continue
            if not comp.cpus_in_flight or comp.ranked:
                # All CPUs are taken, and it is new or may be urgent: some nodes get it into their
                # queues. They give the next CPU to the computation that has fewest, and of its jobs
                # to that of the highest priority.
                for node in itertools.islice(comp.nodes.values(), 64):
                    books.changed[node.key] = node

    def unloadable(self, event: Unloadable) -> None:
        """No node can load the code of a computation: its jobs fail."""
        comp = self._books.comps.get(event.comp)
        if comp is None:
            return
        comp.unloadable = event.text
        for work in comp.waiting() if event.text else ():
            move_job(work, 'fail')
            comp.take_out(work)
            self._books.do(JobEnded(work, event.text))

    def cancel(self, event: CancelAsked) -> None:
        """A job is not wanted any more."""
        work = event.work
        comp = self._books.comps.get(event.work.comp)
        if work.state in ENDED:
            return
        if work.state is JobState.CANCELLING:
            return
        if comp is None:
            return
        if work.state in _WAITING:
            self._cancel_waiting(work, comp)
        else:
            move_job(work, 'cancel')
            node = comp.running[work.serial]
            action = SendCancel(node.key, comp.comp, [work.serial])
            self._books.do(action)
            self._speculation.ended(comp, work)

    def _cancel_waiting(self, work: ScheduledJob, comp: ComputationLoad) -> None:
        move_job(work, 'cancel')
        comp.take_out(work)
        self._books.do(JobEnded(work, 'cancelled before it was started'))

    def withdraw(self, event: WithdrawAsked) -> None:
        """Jobs are not wanted any more, unless they have begun."""
        books = self._books
        recalls: Dict[Tuple[Any, str], List[int]] = {}
        for work in event.works:
            comp = books.comps.get(work.comp)
            if comp is not None:
                node = comp.running.get(work.serial)
            else:
                node = None
            if comp is not None and work.state in _WAITING:
                self._cancel_waiting(work, comp)
            elif comp is None or node is None or node.away is not None \
                    or work.state is not JobState.SENT:
                gone = work.state is JobState.CANCELLED
                books.do(Withdrawn(work, gone))
            else:
                comp.withdrawn.add(work)
                if work.serial not in node.recalled[comp.comp]:
                    node.recalled[comp.comp][work.serial] = False
                    recall = recalls.setdefault((node.key, comp.comp), [])
                    recall.append(work.serial)
        for (key, name), serials in recalls.items():
            books.do(SendRecall(key, name, serials))

    def keep(self, work: ScheduledJob) -> None:
        """The inverse of WithdrawAsked, if it has not been answered."""
        if work.comp in self._books.comps:
            self._books.comps[work.comp].withdrawn.discard(work)


class Schedule:
    """Jobs to nodes. Events in, actions out; `flush` once a turn, after all events of the turn."""

    def __init__(self, fifo: bool = False, rules: UserRules = UserRules()) -> None:
        """Clients share CPUs evenly, or users by `rules`; with `fifo` those who came first are
        served first."""
        self.users = UserLoads(rules)
        self._books = Books(self.users)
        self.comps = self._books.comps
        self.nodes = self._books.nodes
        self.away = self._books.away          # nodes that cannot be reached now
        self._placement = Placement(self._books, fifo)
        self._limits = Limits(self._books, self._placement)
        self.speculation = Speculation(self._books)
        self._losses = Losses(self._books, self._limits, self.speculation)
        self.requests = ScheduleRequests(self._books, self._placement, self.speculation)
        # When a running job will be late, a number, its node
        self._late: List[Tuple[float, int, Any]] = []
        self._repetitions = Repetitions(self._books)
        self._handlers: Dict[type, Callable[[Any], None]] = {
            Unloadable: self.requests.unloadable,
            Opened: self._opened,
            Submitted: self.requests.submit,
            CancelAsked: self.requests.cancel,
            Repeat: self._repetitions.repeat,
            RepeatNot: self._repetitions.stay,
            WithdrawAsked: self.requests.withdraw,
            NodeStarted: self._node_started,
            NodeReady: self._node_ready,
            NodeTold: self._node_told,
            NodeOffers: self._node_offers,
            NodeDrains: self._node_drains,
            NodeResults: self._node_results,
            NodeReturned: self._node_returned,
            NodeHad: self._node_had,
            NodeAway: self._losses.away,
            NodeLost: self._losses.lost,
            NodeLeft: self._losses.left,
            Closed: self._closed,
            RulesChanged: self._rules_changed,
            NodeTried: self._losses.tried,
            NodeDoubted: self._node_doubted,
            SecondHad: self.speculation.had,
            SecondWins: self.speculation.wins,
        }

    def handle(self, event: Any, now: float) -> List[Any]:
        """Take one event; returns what must be done at once."""
        actions = self._books.begin(now)
        self._handlers[type(event)](event)
        return actions

    def flush(self, now: float) -> List[Any]:
        """The end of a turn: what waits goes to nodes that have room."""
        books = self._books
        placement = self._placement
        actions = books.begin(now)
        while self._late and self._late[0][0] <= now:
            node = self.nodes.get(heapq.heappop(self._late)[2])
            if node is not None:
                books.changed[node.key] = node
        if self._repetitions.rests:
            self._repetitions.wake()
        if books.away:
            self._give_up_overdue(now)
        if books.unfilled:
            books.go_on_filling()
        for node in books.changed.values():
            books.look_at(node)
        for node in books.changed.values():
            placement.reduce(node)
        if books.waiting:
            self.users.advance(now)
            placement.distribute()
        if len(self.nodes) > 1 and books.changed:
            placement.balance()
        self.speculation.look()
        books.changed.clear()
        return actions

    def _give_up_overdue(self, now: float) -> None:
        """Nodes that have not come back in their time."""
        for node in [node for node in self.away.values() if node.lost_at() <= now]:
            away: Any = node.away
            if self._books.may_return(node):
                continue
            event = NodeDoubted(node.key, away.name, Evidence.OVERDUE, away.text)
            self._node_doubted(event)
            self._books.do(NodeGone(node.key))

    def is_behind(self, now: float) -> None:
        """Events come faster than they are handled: nodes that are away may have connected again.
        """
        self._books.returned_at = now

    def lost_at(self, key: Any) -> float:
        """As of the node; never if it is not known."""
        node = self.nodes.get(key)
        if node is None:
            return math.inf
        return node.lost_at()

    def next_timer(self) -> Optional[float]:
        """When `flush` has something to do at the latest."""
        times = []
        if self.away:
            times = [node.lost_at() for node in self.away.values() if node.away is not None]
        if self._late:
            times.append(self._late[0][0])
        if self._books.unfilled:
            times.append(self._books.now)
        if self._repetitions.rests:
            times.append(self._repetitions.rests[0][0])
        if self.speculation.due < math.inf:
            times.append(self.speculation.due)
        if times:
            return min(times)
        return None

    def runs(self, key: Any) -> Dict[str, List[int]]:
        """As of the node; nothing if it is not known."""
        node = self.nodes.get(key)
        if node is None:
            return {}
        return node.runs()

    def ran(self, work: ScheduledJob) -> float:
        """Seconds that a job has run, 0 if that is not known."""
        books = self._books
        comp = self.comps.get(work.comp)
        if comp is not None:
            node = comp.running.get(work.serial)
        else:
            node = None
        if node is None:
            return 0.0
        return books.now - node.begun[work.comp].get(work.serial, books.now)

    # -- computations ------------------------------------------------------------------------------

    def _opened(self, event: Opened) -> None:
        order = next(self._books.numbers)
        comp = self.comps[event.comp] = ComputationLoad(event, order)
        self.speculation.begin(comp)
        comp.user = self.users.load_of(event.user)

    def _rules_changed(self, event: RulesChanged) -> None:
        books = self._books
        self.users.change(event.rules, self.comps.values(), books.now)
        for comp in self.comps.values():
            comp.told.clear()
            comp.held = False
            self._limits.unpark_all(comp)
        books.changed.update(self.nodes)

    def _closed(self, event: Closed) -> None:
        books = self._books
        comp = self.comps.pop(event.comp, None)
        if comp is None:
            return
        books.waiting.pop(comp.comp, None)
        self.speculation.closed(comp)
        for node in list(comp.nodes.values()):
            node.draining.discard(comp.comp)
            serials = list(node.in_flight[comp.comp])
            for work in books.take_off(node, comp, serials).values():
                if work.state is not JobState.CANCELLING:
                    move_job(work, 'cancel')
                move_job(work, 'cancelled')
                books.do(JobEnded(work, 'cancelled: the cluster was closed'))
            self._limits.forget(node, comp)
        comps = self.comps.values()
        if not any(other.client == comp.client for other in comps):
            books.client_cpus.pop(comp.client, None)
        if comp.user is not None:
            self.users.advance(books.now)
            self.users.keep({other.user_name for other in comps})
        for work in comp.waiting():
            move_job(work, 'cancel')
            books.do(JobEnded(work, 'cancelled: the cluster was closed'))

    # -- nodes -------------------------------------------------------------------------------------

    def _node_ready(self, event: NodeReady) -> None:
        limits = self._limits
        books = self._books
        comp = self.comps.get(event.comp)
        if comp is None:
            return
        node = books.node(event.node)
        node.name = event.name or node.name
        node.offers = event.offers
        node.stock.counts = event.stock
        node.trip = event.trip or node.trip
        node.probe = None
        books.reached(node)
        node.begin(comp)
        comp.nodes[event.node] = node
        node.recalled[event.comp].clear()   # what was asked of it may not have arrived
        node.draining.discard(event.comp)
        held = set(event.held)
        flight = node.in_flight[event.comp]
        account = Account(frozenset(held), event.past, event.whole)
        self._losses.settle(node, comp, account, Occasion.CONNECTED)
        limits.limit(node, comp, event.cpus)
        limits.unpark(comp, node)
        held -= self.speculation.held(node, comp, account)
        unwanted = [serial for serial, work in flight.items() if work.state is JobState.CANCELLING]
        unwanted += sorted(held - set(flight))   # given up while the node was away
        if unwanted:
            action = SendCancel(node.key, comp.comp, unwanted)
            books.do(action)

    def _node_told(self, event: NodeTold) -> None:
        pair = self._books.pair(event.node, event.comp)
        if pair is None:
            return
        node, comp = pair
        self._losses.settle(node, comp, event.account, Occasion.CONNECTED)
        self.speculation.held(node, comp, event.account)
        # It is there, and what it holds will come; nothing is sent there before it is ready
        if node.away is not None:
            node.away = node.away._replace(until=math.inf)
            self._books.returned_at = self._books.now

    def _node_offers(self, event: NodeOffers) -> None:
        limits = self._limits
        comp = event.comp
        node = self.nodes.get(event.node)
        if node is None:
            return
        if comp not in node.comps:
            return
        node.offers = event.offers or node.offers
        limits.limit(node, node.comps[comp], event.cpus)
        limits.unpark(node.comps[comp], node)

    def _node_drains(self, event: NodeDrains) -> None:
        books = self._books
        comp = event.comp
        node = self.nodes.get(event.node)
        if node is None or comp not in node.comps:
            books.do(NodeDrained(event.node, comp))
            return
        self._limits.limit(node, node.comps[comp], 0)
        node.draining.add(comp)
        books.tell_drained(node, comp)

    def _node_returned(self, event: NodeReturned) -> None:
        pair = self._books.pair(event.node, event.comp)
        if pair is not None:
            for serial in sorted(event.serials, reverse=True):   # each goes to the front
                self.speculation.returned(*pair, serial)
                self._losses.give_back(*pair, serial)

    def _node_started(self, event: NodeStarted) -> None:
        books = self._books
        pair = books.pair(event.node, event.comp)
        if pair is None:
            return
        node, comp = pair
        flight = node.in_flight[event.comp]
        begun = node.begun[event.comp]
        pairs = []
        for serial, ran in event.rows:
            work = flight.get(serial)
            if work is None:
                self.speculation.started(node, comp, serial, ran)
                continue
            if comp.user is not None and serial not in begun:
                self.users.ran(comp.user, cpus_of(work), books.now)
            begun[serial] = books.now - max(0.0, ran)
            node.recalled[event.comp].pop(serial, None)
            if work.state is JobState.SENT:
                move_job(work, 'start')
            books.answer(comp, work)
            pairs.append((work, ran))
            if not comp.remote:
                late = begun[serial] + node.horizon
                next_number = next(books.numbers)
                heapq.heappush(self._late, (late, next_number, node.key))
        if pairs:
            books.changed[node.key] = node
            action = JobsStarted(node.key, comp.comp, pairs)
            books.do(action)

    def _node_results(self, event: NodeResults) -> None:
        rows = event.rows
        books = self._books
        pair = books.pair(event.node, event.comp)
        serials = [row[0] for row in rows if row[1] not in PROVISIONAL]
        if pair is None:
            if event.comp in self.comps:   # of jobs that were given up: it need not keep them
                send_ack = SendAck(event.node, event.comp, serials)
                books.do(send_ack)
            return
        node, comp = pair
        _check_outcomes(rows)
        rows = self.speculation.results(node, comp, rows)
        self._charge(node, comp, rows)
        landed = books.take_off(node, comp, serials)
        ended = [row for row in rows if row[0] in landed and row[1] not in PROVISIONAL]
        node.learn(comp, ended, books.now)
        pairs = []
        for row in rows:
            outcome = row[1]
            if outcome in PROVISIONAL:
                pairs += self._provisional(node, comp, landed, row)
                continue
            work = landed.pop(row[0], None)
            if work is None:
                continue
            if work.options or outcome not in RETURNED:
                if self._is_tried_again(node, comp, work, row):
                    continue
            move_job(work, _EVENT_OF[outcome])
            if comp.withdrawn:
                books.answer(comp, work)
            if comp.called:
                comp.called.pop(row[0] >> 16, None)
            pairs.append((work, row))
        action = SendAck(node.key, comp.comp, serials)
        books.do(action)
        self.speculation.came(comp, pairs)
        if pairs:
            jobs_ended = JobsEnded(node.key, comp.comp, pairs)
            books.do(jobs_ended)

    def _charge(self, node: NodeLoad, comp: ComputationLoad, rows: Sequence[tuple]) -> None:
        """Jobs of a user have ended before it was known that they had begun."""
        if comp.user is None:
            return
        flight = node.in_flight[comp.comp]
        begun = node.begun[comp.comp]
        seconds = 0.0
        for row in rows:
            serial = row[0]
            if serial not in flight or serial in begun:
                continue
            if row[1] not in PROVISIONAL:
                took = max(0.0, row[3] - row[2])
                seconds += took * cpus_of(flight[serial])
        if seconds:
            self.users.charge(comp.user, seconds, self._books.now)

    def _provisional(self, node: NodeLoad, comp: ComputationLoad, landed: Dict[int, ScheduledJob],
                     row: tuple) -> List[Tuple[ScheduledJob, tuple]]:
        """The job that a provisional result is of, with its row; none if the job is not known."""
        # Its end may be in the same message
        work = landed.get(row[0]) or node.in_flight[comp.comp].get(row[0])
        if work is None:
            return []
        self._goes_on(node, comp, work)
        return [(work, row)]

    def _goes_on(self, node: NodeLoad, comp: ComputationLoad, work: ScheduledJob) -> None:
        """A job has a provisional result."""
        if work.state is JobState.SENT:
            action = JobsStarted(node.key, comp.comp, [(work, 0.0)])
            self._books.do(action)
        move_job(work, 'provisional')

    def _is_tried_again(self, node: NodeLoad, comp: ComputationLoad, work: ScheduledJob,
                        row: tuple) -> bool:
        """Whether the end of an attempt is not that of its job, or not yet."""
        options = work.options or {}
        if row[1] == Outcome.STOPPED:
            for other in node.comps.values():   # nothing more goes there, until it is Ready again
                self._limits.limit(node, other, 0)
            self._losses.lose(comp, work, node.name, 'it was stopped, or released from this client')
            return True
        if row[1] not in RETURNED and self.speculation.goes_on(comp, work):
            return True
        if row[1] == Outcome.DIED:
            retries = options.get('retries')
            if retries and not comp.remote:
                self._losses.lose(comp, work, node.name, bytes(row[4]).decode('utf-8', 'replace'))
                return True
        if 'repeats' in options and self._repetitions.is_asked_for(comp, work, row):
            action = JobFailedOnce(node.key, comp.comp, work, row)
            self._books.do(action)
            return True
        return False

    def _node_had(self, event: NodeHad) -> None:
        books = self._books
        comp = self.comps[event.comp]
        node = books.node(event.node)
        node.name = event.name
        node.begin(comp)
        comp.nodes[event.node] = node
        self._limits.limit(node, comp, 0)
        books.were_on(node, comp, event.works)
        text = 'the node did not come back'
        node_away = NodeAway(event.node, event.name, text, event.until)
        self._losses.away(node_away)

    # -- loss --------------------------------------------------------------------------------------

    def judge(self, event: NodeDoubted) -> Loss:
        """What follows from evidence that a node is lost."""
        node = self.nodes.get(event.node)
        is_busy = node is not None and any(node.in_flight.values())
        return LOSS_TABLE[event.evidence, STANDINGS[event.kind, is_busy]]

    def _node_doubted(self, event: NodeDoubted) -> None:
        node = event.node
        loss = self.judge(event)
        if loss is Loss.RETURNS:
            for comp in event.comps:
                self._node_ready(NodeReady(node, comp, 0, []))
        elif loss is Loss.AWAY:
            node_away = NodeAway(node, event.name, event.text, event.until)
            self._losses.away(node_away)
        elif loss is Loss.LOST:
            node_lost = NodeLost(node, event.name, event.text, event.known)
            self._losses.lost(node_lost)


def _abandoned(work: ScheduledJob, nodes: List[str], text: str, times: int,
               has_retries: bool) -> str:
    """Why a job is not tried again that was lost with these nodes. It might be tried so many
    times."""
    if times == 1:
        reason = 'the computation is not reentrant'
    elif len(nodes) == MAX_LOST_NODES and not has_retries:
        reason = 'given up after %d nodes' % len(nodes)
    else:
        reason = 'given up after %d attempts' % len(work.lost_with)
    return 'abandoned: lost with node%s %s (%s); %s' % (
        's' * (len(nodes) > 1), ', '.join(nodes), text, reason)


def _bytes_of(work: ScheduledJob) -> int:
    """Bytes of its arguments that are in memory."""
    payload = work.payload
    if type(payload) is bytes:   # nearly always
        return len(payload)
    if payload is not None:
        return size_of(payload)
    return 0


_EVENT_OF = {
    Outcome.RETURNED: 'finish', Outcome.RETURNED_CODE: 'finish', Outcome.RAISED: 'fail',
    Outcome.DIED: 'fail', Outcome.TIMED_OUT: 'fail', Outcome.OUT_OF_MEMORY: 'fail',
    Outcome.CANCELLED: 'cancelled', Outcome.ABANDONED: 'give up'
}

# --------------------------------------------------------------------------------------------------
# Modules of the user's: which travel, and their files. Nothing here imports a module or takes a
# lock: finders and loaders that are asked may be the user's code. What is remembered is in
# dictionaries, of which one entry is replaced at a time.
# --------------------------------------------------------------------------------------------------

PACKAGE_DATA = 20 << 20    # bytes of data files that travel with one package
PACKAGE_FILES = 20000      # entries of its directories that are looked at to find them
NAME_PARTS = 4             # of a dotted name that is followed from module to module, at most
UNLOADED_TIME = 1.0        # s for which it is believed where a module is that is not loaded
STABLE_READS = 3           # attempts to read a file that is written at the same time
NOT_OWN = frozenset((      # top-level modules that are never the user's own, wherever they lie
    'dispy', 'dispynode', 'dispyscheduler', 'dispy_httpd', 'cloudpickle', 'psutil'))
_MAIN_NAMES = frozenset(('__main__', '__mp_main__'))
SITE_DIRECTORIES = frozenset(('site-packages', 'dist-packages'))


class ModuleKind(enum.Enum):
    """Where a module comes from, which decides how a node gets it."""
    STANDARD = 'built in, frozen, or of the standard library'
    INSTALLED = 'of an installed distribution, or of dispy'
    OWN = "the user's own: its file travels"
    BY_VALUE = 'has no name by which a node could import it: what is in it is pickled by value'
    MISSING = 'neither loaded nor found'


class NameKind(enum.Enum):
    """How the source of a module, or the body of a class, gives a name its value."""
    CONSTANT = 'by literals of immutable values, nothing else'
    COMPUTED = 'by anything else than a literal, a definition or an import'
    DEFINED = 'by def or class'
    IMPORTED = 'by an import; elsewhere perhaps by a definition or a constant, for where that fails'


class NameBinding:
    """A name that a source text binds. `value` is there only for what is bound once, to a
    constant."""
    __slots__ = ('kind', 'value', 'origin', 'origins', 'from_file')
    value: Any

    def __init__(self, kind: NameKind, origins: Tuple[str, ...] = ()) -> None:
        self.kind = kind
        self.origins = origins      # modules that it is imported from, in the order of the text
        if origins:
            self.origin = origins[0]
        else:
            self.origin = ''
        self.from_file = False      # whether the value depends on where the module's file lies

    def __repr__(self) -> str:
        if hasattr(self, 'value'):
            value = ' %.80r' % (self.value,)
        else:
            value = ''
        if self.origins:
            origin = ' from %s' % ', '.join(self.origins)
        else:
            origin = ''
        if self.from_file:
            file = ' from_file'
        else:
            file = ''
        return '<%s%s%s%s>' % (self.kind.name, value, origin, file)


class ImportedModule(NamedTuple):
    """An import in a source text."""
    module: str               # absolute name
    names: Tuple[str, ...]    # what is imported from it; ('*',) for all
    certain: bool             # whether it is done whenever the text is run

    def members(self) -> List[str]:
        """What is imported from it, by the names that these have if they are modules."""
        return ['%s.%s' % (self.module, name) for name in self.names if name != '*']


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = ('body', 'handlers', 'orelse', 'finalbody', 'cases')   # as they stand in a text
_PLAIN_STATEMENTS = frozenset((
    ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return, ast.Import, ast.ImportFrom,
    ast.Pass, ast.Raise, ast.Delete, ast.Assert, ast.Global, ast.Nonlocal, ast.Break, ast.Continue))
_CONSTANT_TYPES = frozenset((
    type(None), bool, int, float, complex, str, bytes, type(Ellipsis)))
_ODD_ESCAPE = LazyPattern(rb'\\[^\\\'"abfnrtvxNuU0-7\r\n]')


def _statements(body: Sequence[Any], inward: bool,
                certain: bool = True) -> Iterator[Tuple[Any, bool]]:
    """Statements of a block and of the blocks in it, each with whether it is run whenever the
    block is. Those of functions and classes only with `inward`. Handlers of exceptions and cases
    of `match` are among them."""
    for node in body:
        yield node, certain
        kind = type(node)
        if kind in _PLAIN_STATEMENTS:
            continue
        if isinstance(node, _FUNCTIONS):
            if inward:
                yield from _statements(node.body, True, False)
        elif kind is ast.ClassDef:
            if inward:
                yield from _statements(node.body, True, certain)
        else:
            for field in _BLOCKS:
                yield from _statements(getattr(node, field, ()), inward, False)


def _names_in(target: Any) -> Iterator[str]:
    """Names that an assignment to this target binds."""
    if isinstance(target, ast.Name):
        yield target.id
    elif isinstance(target, (ast.Tuple, ast.List)):
        for element in target.elts:
            yield from _names_in(element)
    elif isinstance(target, ast.Starred):
        yield from _names_in(target.value)


def _fits(target: Any, value: Any) -> bool:
    """Whether the targets of `a, b = 1, 2` get one value each."""
    displays = (ast.Tuple, ast.List)
    if not isinstance(target, displays):
        return False
    if not isinstance(value, displays):
        return False
    starred = any(isinstance(part, ast.Starred) for part in target.elts + value.elts)
    if len(target.elts) != len(value.elts):
        return False
    return not starred


def _expressions_of(node: Any) -> Iterator[Any]:
    """Expressions in one statement, without those of the blocks and of the lambdas in it."""
    waiting: List[Any] = [part for part in ast.iter_child_nodes(node)
                          if isinstance(part, (ast.expr, ast.withitem))]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, ast.Lambda):
            yield part
            waiting.extend(ast.iter_child_nodes(part))


def _is_constant(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_constant, value))
    return type(value) in _CONSTANT_TYPES


def _constant(node: Any) -> Tuple[Any, ...]:
    """The value of a literal that cannot change, in a tuple of one; () if this is none."""
    if isinstance(node, ast.Constant):
        return (node.value,)
    if not isinstance(node, (ast.Tuple, ast.UnaryOp, ast.BinOp)):
        return ()
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):   # no literal
        return ()
    if _is_constant(value):
        return (value,)
    return ()


# Python counts the depth of syntax trees for a whole process: two threads that make trees disturb
# each other's count
# (SystemError, "AST constructor recursion depth mismatch"). Nothing of the user's runs while it is
# held.
_tree_lock = threading.Lock()


def _parse(text: Union[str, bytes]) -> ast.Module:
    """Raises SyntaxError, ValueError, RecursionError or MemoryError."""
    with _tree_lock:
        return _parse_alone(text)


def _parse_alone(text: Union[str, bytes]) -> ast.Module:
    if isinstance(text, bytes):
        raw = text
    else:
        raw = text.encode('utf-8', 'surrogatepass')
    if not _ODD_ESCAPE.search(raw):
        return ast.parse(text)
    # Only the import of the module should warn of '\d', and `-W error` must not make an error of it
    # here. What is done to the filters makes Python forget which warnings it has given, so other
    # texts do without.
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return ast.parse(text)


class _ScopeNames:
    """Collects the names that the statements of a module or of a class body bind."""

    def __init__(self, resolve: Callable[[Any], str]) -> None:
        self._resolve = resolve
        # name -> how it is bound, in the order of the text: rows of (kind, constant in a tuple of
        # one, origin)
        self.rows: Dict[str, List[Tuple[NameKind, Tuple[Any, ...], str]]] = {}
        self.globals: Set[str] = set()
        self.classes: List[ast.ClassDef] = []

    def read(self, body: Sequence[Any], walrus: bool) -> None:
        for node, _ in _statements(body, False):
            reader = self._READERS.get(type(node).__name__)
            if reader is not None:
                reader(self, node)
            if walrus:
                self._read_expressions(node)

    def add(self, name: str, kind: NameKind, constant: Tuple[Any, ...] = (),
            origin: str = '') -> None:
        row = self.rows.setdefault(name, [])
        row.append((kind, constant, origin))

    def table(self) -> Dict[str, NameBinding]:
        return {name: self._binding(rows) for name, rows in self.rows.items()}

    @staticmethod
    def _binding(rows: List[Tuple[NameKind, Tuple[Any, ...], str]]) -> NameBinding:
        kinds = {kind for kind, _, _ in rows}
        if len(kinds) == 1:
            kind = rows[0][0]
        elif NameKind.IMPORTED in kinds and NameKind.COMPUTED not in kinds:
            kind = NameKind.IMPORTED
        else:
            kind = NameKind.COMPUTED
        origins = tuple(dict.fromkeys(origin for _, _, origin in rows if origin))
        binding = NameBinding(kind, origins)
        if kind is NameKind.CONSTANT:
            if len(rows) == 1:
                binding.value = rows[0][1][0]
        return binding

    def _assign(self, target: Any, value: Any) -> None:
        if isinstance(target, ast.Name):
            constant = _constant(value)
            self.add(target.id, NameKind.CONSTANT if constant else NameKind.COMPUTED, constant)
        elif _fits(target, value):
            for part, its_value in zip(target.elts, value.elts):
                self._assign(part, its_value)
        else:
            self._compute(target)

    def _compute(self, target: Any) -> None:
        for name in _names_in(target):
            self.add(name, NameKind.COMPUTED)

    def _read_assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._assign(target, node.value)

    def _read_annotated(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._assign(node.target, node.value)

    def _read_target(self, node: Any) -> None:
        self._compute(node.target)

    def _read_with(self, node: Any) -> None:
        for item in node.items:
            self._compute(item.optional_vars)

    def _read_delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            self._compute(target)

    def _read_definition(self, node: Any) -> None:
        self.add(node.name, NameKind.DEFINED)
        if isinstance(node, ast.ClassDef):
            self.classes.append(node)

    def _read_handler(self, node: ast.ExceptHandler) -> None:
        if node.name:
            self.add(node.name, NameKind.COMPUTED)

    def _read_import(self, node: ast.Import) -> None:
        for alias in node.names:
            first = alias.name.partition('.')[0]
            if alias.asname:
                origin = alias.name
            else:
                origin = first
            self.add(alias.asname or first, NameKind.IMPORTED, (), origin)

    def _read_import_from(self, node: ast.ImportFrom) -> None:
        origin = self._resolve(node)
        for alias in node.names:
            if alias.name != '*':
                name = alias.asname or alias.name
                self.add(name, NameKind.IMPORTED, (), origin)

    def _read_globals(self, node: ast.Global) -> None:
        self.globals.update(node.names)

    def _read_type_alias(self, node: Any) -> None:
        self._compute(node.name)

    def _read_case(self, node: Any) -> None:
        for part in ast.walk(node.pattern):
            name = getattr(part, 'name', None) or getattr(part, 'rest', None)
            if isinstance(name, str):
                self.add(name, NameKind.COMPUTED)

    def _read_expressions(self, node: Any) -> None:
        """Names bound by := in the expressions of one statement; blocks in it are read as
        statements."""
        for part in _expressions_of(node):
            if isinstance(part, ast.NamedExpr):
                self._compute(part.target)

    # Some of these classes are not in every version of Python.
    _READERS: Dict[str, Callable[[Any, Any], None]] = {
        'Assign': _read_assign, 'AnnAssign': _read_annotated, 'AugAssign': _read_target,
        'For': _read_target, 'AsyncFor': _read_target, 'With': _read_with, 'AsyncWith': _read_with,
        'Delete': _read_delete, 'FunctionDef': _read_definition,
        'AsyncFunctionDef': _read_definition, 'ClassDef': _read_definition,
        'ExceptHandler': _read_handler, 'Import': _read_import, 'ImportFrom': _read_import_from,
        'Global': _read_globals, 'TypeAlias': _read_type_alias, 'match_case': _read_case}


_FILE_NAMES = frozenset(('__file__', '__spec__', '__path__', '__cached__', '__loader__'))
_FILE_MODULES = frozenset((   # give paths beside a module
    'importlib.resources', 'importlib_resources', 'pkg_resources'))
_FILE_WORDS = (
    *_FILE_NAMES, 'import resources', 'importlib.resources', 'importlib_resources', 'pkg_resources')
_MUTATORS = frozenset((
    'append', 'appendleft', 'add', 'extend', 'insert', 'setdefault', 'update'))
_CALLERS = frozenset(('map', 'filter'))


def _dotted(node: Any) -> str:
    """'a.b.c' of an expression that is written so, otherwise ''."""
    parts: List[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        return '.'.join([node.id] + parts[::-1])
    return ''


def _locals_of(function: Any) -> FrozenSet[str]:
    """Names of parameters and of variables of a function or lambda. What it imports is not among
    them: that is followed as if the module had imported it."""
    rows = function.args
    parameters = rows.args + rows.kwonlyargs + rows.posonlyargs + [rows.vararg, rows.kwarg]
    found = set()
    for parameter in parameters:
        if parameter is not None:
            found.add(parameter.arg)
    kept_global: Set[str] = set()
    if isinstance(function, _FUNCTIONS):
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Global):
                kept_global.update(node.names)
    return frozenset(found - kept_global)


def _uses(node: Any, local: FrozenSet[str] = frozenset()) -> Set[str]:
    """What the value of an expression, or what a call of a function, depends on: names, with their
    attributes ('config', 'config.ROOT'), and what is called ('load()')."""
    found: Set[str] = set()
    waiting: List[Tuple[Any, FrozenSet[str]]] = [(node, local)]
    while waiting:
        part, local = waiting.pop()
        if type(part) in (ast.Name, ast.Attribute):
            name = _dotted(part)
            if isinstance(part, ast.Attribute):
                if part.attr in _FILE_NAMES:
                    found.add('__file__')
            if name and name.partition('.')[0] not in local:
                name_parts = name.split('.')
                found.update(itertools.accumulate(name_parts, '{}.{}'.format))
            elif not name:
                waiting.append((part.value, local))
            continue
        if isinstance(part, ast.Call):
            found.update(_called(part, local))
        elif isinstance(part, (ast.Lambda, *_FUNCTIONS)):
            local = local | _locals_of(part)
        elif isinstance(part, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            local = local.union(*(_names_in(row.target) for row in part.generators))
        for child in ast.iter_child_nodes(part):
            waiting.append((child, local))
    return found


def _called(call: ast.Call, local: FrozenSet[str]) -> Iterator[str]:
    functions: List[Any] = [call.func]
    if _dotted(call.func) in _CALLERS:
        functions += call.args[:1]
    for function in functions:
        name = _dotted(function)
        if not name:
            continue
        if name.partition('.')[0] not in local:
            yield name + '()'


class _FileUse:
    """Which names of a module depend on where files lie. `C.x` is attribute x of class C, `f()`
    and `C.f()` are what calls of functions depend on, `C()` what an instance does."""

    def __init__(self, tree: ast.Module, source: 'ModuleSource',
                 resolve: Callable[[Any], str]) -> None:
        self._classes = source.classes
        self._walrus = source.has(':=')
        self._resolve = resolve
        self._users: Dict[str, Set[str]] = {}   # what is used -> what uses it
        # Imports: rows of (name here, module, name there or '').
        self.links: List[Tuple[str, str, str]] = []
        self._read_body(tree.body, '')
        for node, _ in _statements(tree.body, True):
            self._read_link(node)

    def dependents(self, seeds: Sequence[str]) -> FrozenSet[str]:
        """All names that depend on these, these included."""
        found = set(seeds)
        waiting = list(found)
        while waiting:
            for user in self._users.get(waiting.pop(), ()):
                if user not in found:
                    found.add(user)
                    waiting.append(user)
        return frozenset(found)

    def roots(self) -> List[str]:
        """What gives paths of files, by the names that it has in this module."""
        found = [*_FILE_NAMES, *_FILE_MODULES]
        for here, module, there in self.links:
            if module in _FILE_MODULES or '%s.%s' % (module, there) in _FILE_MODULES:
                found.append(here)
                found.append(here + '()')
        return found

    def _read_link(self, node: Any) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    self.links.append((alias.asname, alias.name, ''))
                else:
                    self.links.append((alias.name, alias.name, ''))
        elif isinstance(node, ast.ImportFrom):
            origin = self._resolve(node)
            for alias in node.names:
                link = (alias.asname or alias.name, origin, alias.name)
                self.links.append(link)

    def _note(self, key: str, used: Set[str], scope: str) -> None:
        names: Any = self._classes.get(scope, ())
        for name in used:
            if name.partition('.')[0].rstrip('()') in names:
                name = '%s.%s' % (scope, name)
            user = self._users.setdefault(name, set())
            user.add(key)

    def _read_body(self, body: Sequence[Any], scope: str) -> None:
        """The statements of a module, or of the class that `scope` names."""
        for node, _ in _statements(body, False):
            if isinstance(node, _FUNCTIONS):
                self._read_function(node, scope)
            elif isinstance(node, ast.ClassDef):
                self._read_class(node, scope)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, node.value, scope)
            elif isinstance(node, (ast.AnnAssign, ast.AugAssign)) and node.value is not None:
                self._assign(node.target, node.value, scope)
            elif isinstance(node, (ast.For, ast.AsyncFor)):
                self._assign(node.target, node.iter, scope)
            elif isinstance(node, (ast.With, ast.AsyncWith)):
                for item in node.items:
                    self._assign(item.optional_vars, item.context_expr, scope)
            elif isinstance(node, ast.Expr):
                self._read_call(node.value, scope)
            if not self._walrus:
                continue
            if not isinstance(node, ast.ClassDef):
                self._read_walrus(node, scope)

    def _assign(self, target: Any, value: Any, scope: str) -> None:
        if _fits(target, value):
            for part, its_value in zip(target.elts, value.elts):
                self._assign(part, its_value, scope)
            return
        used = _uses(value)
        while isinstance(target, ast.Subscript):   # a value in a container changes the container
            target = target.value
        all_names = list(_names_in(target))
        names = all_names or list(filter(None, [_dotted(target)]))
        for name in names:
            if scope:
                key = '%s.%s' % (scope, name)
            else:
                key = name
            self._note(key, used, scope)

    def _read_walrus(self, node: Any, scope: str) -> None:
        for part in _expressions_of(node):
            if isinstance(part, ast.NamedExpr):
                self._assign(part.target, part.value, scope)

    def _read_call(self, call: Any, scope: str) -> None:
        """`paths.append(ROOT)` makes `paths` depend on ROOT."""
        method = getattr(call, 'func', None)
        if not isinstance(method, ast.Attribute):
            return
        if method.attr in _MUTATORS:
            for value in call.args + [keyword.value for keyword in call.keywords]:
                self._assign(method.value, value, scope)

    def _read_function(self, node: Any, scope: str) -> None:
        if scope:
            key = '%s.%s()' % (scope, node.name)
        else:
            key = node.name + '()'
        # The names of a class are no variables of its methods.
        self._note(key, _uses(node), '')
        if scope:
            user = self._users.setdefault(key, set())
            user.add(scope + '()')
        for part in ast.walk(node):
            if isinstance(part, ast.Global):
                for name in part.names:
                    self._users.setdefault(key, set()).add(name)

    def _read_class(self, node: ast.ClassDef, scope: str) -> None:
        if scope:
            qualified = '%s.%s' % (scope, node.name)
        else:
            qualified = node.name
        instance = qualified + '()'
        for base in node.bases:
            used = {name + '()' for name in _uses(base)}
            self._note(instance, used, scope)
        for name in self._classes.get(qualified, ()):
            user = self._users.setdefault('%s.%s' % (qualified, name), set())
            user.add(instance)
        self._read_body(node.body, qualified)


def _renamed(names: FrozenSet[str], there: str, here: str) -> Iterator[str]:
    """'N', 'N.x' and 'N()' for what a module has imported as N."""
    for name in names:
        if name == there or name.startswith((there + '.', there + '()')):
            yield here + name[len(there):]


class ModuleSource:
    """What one source text says of its module: what it imports, and what gives its names their
    values.

    imports: what is imported anywhere in the text, in its order.
    names: what the top level of the module binds.
    classes: the same for the bodies of its classes, by qualified name, without those inside of
        functions.
    exports: `__all__`, if that is written as a literal.
    stars: modules from which all is imported at the top level.
    file_names: what depends on where the file of the module lies: names, those that only functions
        assign included, 'C.x' for attribute x of class C, 'f()' for what a call of f depends on.
    error: why the text could not be parsed; then there is nothing else.
    """

    def __init__(self, text: Union[str, bytes], name: str, is_package: bool = False) -> None:
        self.name = name
        self._text = text
        if is_package:
            self._package = name
        else:
            self._package = name.rpartition('.')[0]
        self.imports: List[ImportedModule] = []
        self.names: Dict[str, NameBinding] = {}
        self.classes: Dict[str, Dict[str, NameBinding]] = {}
        self.exports: Optional[Tuple[str, ...]] = None
        self.stars: Tuple[str, ...] = ()
        self.file_names: FrozenSet[str] = frozenset()
        self._file_use: Optional[_FileUse] = None
        self.error = ''
        try:
            tree = _parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
            self.error = '%s: %s' % (type(exc).__name__, exc)
            return
        self._read_imports(tree)
        self._read_names(tree)
        if self.has(*_FILE_WORDS):
            self._read_file_use(tree)

    def file_names_with(self, others: Callable[[str], FrozenSet[str]]) -> FrozenSet[str]:
        """`file_names` if other modules have names that depend on files as well, which `others`
        says of each."""
        if self.error:
            return self.file_names
        if self._file_use is None:
            tree = _parse(self._text)
            self._file_use = _FileUse(tree, self, self._resolve)
        seeds = list(self.file_names)
        for here, module, there in self._file_use.links:
            if there == '*':
                seeds += others(module)
            elif there:
                seeds += _renamed(others(module), there, here)
                for name in others('%s.%s' % (module, there)):
                    seed = here + '.' + name
                    seeds.append(seed)
            else:
                seeds += [here + '.' + name for name in others(module)]
        # Modules that import each other have a.X, b.a.X, a.b.a.X and so on without end.
        return self._file_use.dependents([name for name in seeds if name.count('.') < NAME_PARTS])

    def _read_file_use(self, tree: ast.Module) -> None:
        use = _FileUse(tree, self, self._resolve)
        self._file_use = use
        self.file_names = use.dependents(use.roots())
        for name, binding in self.names.items():
            binding.from_file = name in self.file_names
        for qualified, table in self.classes.items():
            for name, binding in table.items():
                binding.from_file = '%s.%s' % (qualified, name) in self.file_names

    def has(self, *words: str) -> bool:
        """Whether any of these stands in the text."""
        if isinstance(self._text, bytes):
            for word in words:
                if word.encode() in self._text:
                    return True
            return False
        return any(word in self._text for word in words)

    def _read_imports(self, tree: ast.Module) -> None:
        for node, certain in _statements(tree.body, True):
            if type(node) is ast.Import:
                self.imports.extend(ImportedModule(alias.name, (), certain) for alias in node.names)
            elif type(node) is ast.ImportFrom:
                origin = self._resolve(node)
                if origin:
                    names = tuple(alias.name for alias in node.names)
                    self.imports.append(ImportedModule(origin, names, certain))
        if self.has('import_module', '__import__'):
            self._read_calls(tree)

    def _resolve(self, node: ast.ImportFrom) -> str:
        return self._absolute(node.level, node.module or '')

    def _absolute(self, level: int, module: str) -> str:
        """'' for what leads out of the package."""
        if not level:
            return module
        if self._package:
            parts = self._package.split('.')
        else:
            parts = []
        if level > len(parts):
            return ''
        parts = parts[:len(parts) - level + 1]
        return '.'.join(parts + [module] if module else parts)

    def _read_calls(self, tree: ast.Module) -> None:
        direct = set()
        for node, certain in _statements(tree.body, True):
            if certain:
                value = getattr(node, 'value', None)
            else:
                value = None
            while isinstance(value, ast.Attribute):
                value = value.value
            direct.add(value)
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call):
                continue
            if not call.args:
                continue
            if not isinstance(call.args[0], ast.Constant):
                continue
            attr = getattr(call.func, 'attr', None)
            function = attr or getattr(call.func, 'id', None)
            name = call.args[0].value
            if function not in ('import_module', '__import__'):
                continue
            if not isinstance(name, str):
                continue
            if not name:
                continue
            stripped = name.lstrip('.')
            level = len(name) - len(stripped)
            absolute = self._absolute(level, stripped)
            if absolute:
                imported_module = ImportedModule(absolute, (), call in direct)
                self.imports.append(imported_module)

    def _read_names(self, tree: ast.Module) -> None:
        walrus = self.has(':=')
        scope = _ScopeNames(self._resolve)
        scope.read(tree.body, walrus)
        waiting = [(node.name, node) for node in reversed(scope.classes)]
        while waiting:
            qualified, node = waiting.pop()
            body = _ScopeNames(self._resolve)
            body.read(node.body, walrus)
            for name in body.globals & body.rows.keys():
                row = scope.rows.setdefault(name, [])
                row.extend(body.rows.pop(name))
            self.classes[qualified] = body.table()
            for inner in reversed(body.classes):
                waiting.append(('%s.%s' % (qualified, inner.name), inner))
        self.names = scope.table()
        self._read_exports(tree)

    def _read_exports(self, tree: ast.Module) -> None:
        stars = []
        node: Any
        for node, _ in _statements(tree.body, False):
            if type(node) is ast.ImportFrom and node.names[0].name == '*':
                stars.append(self._resolve(node))
            elif '__all__' not in self.names:
                continue
            elif isinstance(node, (ast.Assign, ast.AugAssign)):
                if isinstance(node, ast.Assign):
                    targets = node.targets
                else:
                    targets = [node.target]
                if any(getattr(target, 'id', '') == '__all__' for target in targets):
                    self.exports = (self.exports or ()) + self._texts(node.value)
        self.stars = tuple(filter(None, stars))

    @staticmethod
    def _texts(node: Any) -> Tuple[str, ...]:
        if not isinstance(node, (ast.List, ast.Tuple)):
            return ()
        values = []
        for part in node.elts:
            if isinstance(part, ast.Constant):
                values.append(part.value)
        chosen_values = []
        for value in values:
            if isinstance(value, str):
                chosen_values.append(value)
        return tuple(chosen_values)


class Whereabouts(NamedTuple):
    """What is known of a module without importing it."""
    kind: ModuleKind
    path: str = ''                                # of its file, which may be in an archive
    locations: Optional[Tuple[str, ...]] = None   # of a package: directories of its submodules
    loader: Any = None


def _is_below(path: str, roots: Sequence[str]) -> bool:
    for root in roots:
        if path.startswith(root):
            return True
    return False


def _as_roots(paths: Sequence[Optional[str]]) -> Tuple[str, ...]:
    return tuple({os.path.normcase(os.path.realpath(path)) + os.sep for path in paths if path})


@functools.lru_cache(maxsize=None)
def _standard_roots() -> Tuple[str, ...]:
    """Where the standard library is, that of the base installation of a venv included."""
    paths: List[Optional[str]] = []
    for base in {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}:
        there = {'base': base, 'platbase': base, 'installed_base': base, 'installed_platbase': base}
        for name in ('stdlib', 'platstdlib'):
            if base in (sys.base_prefix, sys.base_exec_prefix):
                paths.append(sysconfig.get_path(name, vars=there))
        if os.name == 'nt':
            paths.append(os.path.join(base, 'DLLs'))
    paths += [sysconfig.get_path('stdlib'), sysconfig.get_path('platstdlib')]
    paths.append(sysconfig.get_config_var('DESTSHARED'))
    archive = 'python%d%d.zip' % sys.version_info[:2]
    for path in sys.path:
        if os.path.basename(path) == archive:
            paths.append(path)
    return _as_roots(paths)


@functools.lru_cache(maxsize=None)
def _site_roots() -> Tuple[str, ...]:
    """Where distributions are installed, whatever these directories are called."""
    site = sys.modules.get('site')
    user = module_dict(site).get('USER_SITE')
    path = sysconfig.get_path('purelib')
    return _as_roots([path, sysconfig.get_path('platlib'), user])


def archive_of(path: str) -> Tuple[str, str]:
    """(archive, name in it with '/') of the path of a file in an archive; ('', '') if it is in
    none."""
    archive = path
    while archive and not os.path.lexists(archive):
        shorter = os.path.dirname(archive)
        if shorter == archive:
            break
        archive = shorter
    if archive == path or not os.path.isfile(archive):
        return '', ''
    short_path = path[len(archive) + 1:]
    return archive, short_path.replace(os.sep, '/')


class Installations:
    """What distributions say that they have put into a directory, or into an archive. Each is read
    once, and again when it has changed."""

    def __init__(self) -> None:
        # directory -> (time of its last change, file below it -> metadata directory)
        self._tables: Dict[str, Tuple[int, Dict[str, str]]] = {}

    def owner(self, holder: str, path: str) -> str:
        """The metadata directory, such as 'numpy-1.26.4.dist-info', of the distribution that has
        put a file, by its name below the directory and with '/', or the package that it is in,
        into a directory; '' if none says so."""
        table = self._table(holder)
        found = table.get(path)
        if found is None:
            if '/' in path:
                found = table.get(path.partition('/')[0] + '/__init__.py')
        return found or ''

    def owner_of_name(self, holder: str, name: str) -> str:
        """The same for a top-level module or package."""
        table = self._table(holder)
        for path in (name + '/__init__.py', name + '.py'):
            if path in table:
                return table[path]
        starts = (name + '/', name + '.')
        return next((owner for path, owner in table.items() if path.startswith(starts)), '')

    def _table(self, holder: str) -> Dict[str, str]:
        if not os.path.isdir(holder):
            archive, prefix = archive_of(holder)
        else:
            archive, prefix = ('', '')
        if not archive and os.path.isfile(holder):
            archive = holder
        try:
            changed = os.stat(archive or holder).st_mtime_ns
        except OSError:
            return {}
        kept = self._tables.get(holder)
        if kept is None or kept[0] != changed:
            if archive:
                read = _archive_metadata(archive, prefix)
            else:
                read = _directory_metadata(holder)
            kept = changed, self._read(read)
            self._tables[holder] = kept
        return kept[1]

    @staticmethod
    def _read(metadata: Iterator[Tuple[str, str, str]]) -> Dict[str, str]:
        import csv
        import posixpath
        table: Dict[str, str] = {}
        for owner, file, text in metadata:
            if file == 'RECORD':
                paths = [row[0] for row in csv.reader(text.splitlines()) if row]
            else:
                paths = [posixpath.join(owner, line) for line in text.splitlines()]
            for path in paths:
                table[posixpath.normpath(path.replace('\\', '/'))] = owner
        return table


_METADATA_FILES = {'.dist-info': 'RECORD', '.egg-info': 'installed-files.txt'}


def _directory_metadata(directory: str) -> Iterator[Tuple[str, str, str]]:
    """(metadata directory, name of the list of files, its text) of each distribution."""
    for name in sorted(os.listdir(directory)):
        _, suffix = os.path.splitext(name)
        file = _METADATA_FILES.get(suffix)
        path = os.path.join(directory, name, file or '')
        if file and os.path.isfile(path):
            with open(path, encoding='utf-8', errors='replace') as record:
                yield name, file, record.read()


def _archive_metadata(archive: str, prefix: str) -> Iterator[Tuple[str, str, str]]:
    import zipfile
    try:
        with zipfile.ZipFile(archive) as members:
            for member in members.namelist():
                if prefix:
                    below = member[len(prefix) + 1:]
                else:
                    below = member
                name, _, file = below.partition('/')
                _, suffix = os.path.splitext(name)
                expected = _METADATA_FILES.get(suffix)
                if not member.endswith(below):
                    continue
                if expected == file:
                    decoded = members.read(member).decode('utf-8', 'replace')
                    yield name, file, decoded
    except (OSError, zipfile.BadZipFile) as exc:
        logger.debug('%s cannot be read as an archive: %s', archive, exc)


class ModuleFinder:
    """Says where a module is and of which kind it is. Loaded modules are asked first, then
    finders; nothing is imported."""

    def __init__(self) -> None:
        self.installations = Installations()
        # name -> (what sys.modules had, time until which this is believed if that was nothing,
        # what was found)
        self._kept: Dict[str, Tuple[Any, float, Whereabouts]] = {}

    def look(self, name: str) -> Whereabouts:
        """Find out where a module is. Any thread."""
        module = sys.modules.get(name, self)
        kept = self._kept.get(name)
        if kept is not None and kept[0] is module and self._is_valid(kept):
            found = kept[2]
        else:
            found = self._look(name, module)
            self._kept[name] = module, time.monotonic() + UNLOADED_TIME, found
        if found.kind is not ModuleKind.BY_VALUE:
            if self._is_by_value(name, module):
                return found._replace(kind=ModuleKind.BY_VALUE)
        return found

    def _is_valid(self, kept: Tuple[Any, float, Whereabouts]) -> bool:
        if kept[0] is not self:
            return True
        return time.monotonic() < kept[1]

    @staticmethod
    def _is_by_value(name: str, module: Any) -> bool:
        """What may change at any time: what the main module is, and what the user has
        registered."""
        if module is sys.modules.get('__main__') or name in _MAIN_NAMES:
            return name.partition('.')[0] not in NOT_OWN
        registered = cloudpickle.list_registry_pickle_by_value()
        if not registered:
            return False
        if name.partition('.')[0] in NOT_OWN:
            return False
        for other in registered:
            if name == other:
                return True
            if name.startswith(other + '.'):
                return True
        return False

    def _look(self, name: str, module: Any) -> Whereabouts:
        if module is None or not name:   # `sys.modules[name] = None` forbids an import
            return Whereabouts(ModuleKind.MISSING)
        if issubclass(type(module), types.ModuleType):
            found = self._look_at(name, module)
        else:
            found = self._look_for(name)
            # A package has put it there.
            if found.kind is ModuleKind.MISSING:
                if module is not self:
                    found = Whereabouts(self._kind_without_file(name, None, None))
        if name.partition('.')[0] in NOT_OWN:
            return found._replace(kind=ModuleKind.INSTALLED)
        return found

    def _look_at(self, name: str, module: Any) -> Whereabouts:
        """A module that is loaded."""
        spec = module_dict(module).get('__spec__')
        if not issubclass(type(spec), importlib.machinery.ModuleSpec):
            spec = None
        path = module_dict(module).get('__file__')
        if spec is not None:
            loader = spec.loader
        else:
            loader = module_dict(module).get('__loader__')
        locations = self._as_locations(module_dict(module).get('__path__'))
        if self._is_frozen(spec, loader):
            return Whereabouts(ModuleKind.STANDARD, '', locations, loader)
        if not isinstance(path, str) or not path:
            kind = self._kind_without_file(name, spec, locations)
            return Whereabouts(kind, '', locations, loader)
        path = os.path.abspath(path)
        kind = self._kind_of_file(name, path)
        if kind is ModuleKind.OWN:
            if not self._leads_to(name, path):
                kind = ModuleKind.BY_VALUE
        return Whereabouts(kind, path, locations, loader)

    def _look_for(self, name: str) -> Whereabouts:
        """A module that is not loaded, or something else under its name."""
        spec = self._search(name)
        if spec is None:
            return Whereabouts(ModuleKind.MISSING)
        locations = self._as_locations(spec.submodule_search_locations)
        if self._is_frozen(spec, spec.loader):
            return Whereabouts(ModuleKind.STANDARD, '', locations, spec.loader)
        if spec.has_location and isinstance(spec.origin, str):
            path = os.path.abspath(spec.origin)
            kind = self._kind_of_file(name, path)
            return Whereabouts(kind, path, locations, spec.loader)
        if locations is not None:
            return Whereabouts(self._kind_of_namespace(name, locations), '', locations, spec.loader)
        kind_without_file = self._kind_without_file(name, spec, None)
        return Whereabouts(kind_without_file, '', None, spec.loader)

    @staticmethod
    def _is_frozen(spec: Any, loader: Any) -> bool:
        machinery: Any = importlib.machinery
        if loader is machinery.BuiltinImporter:
            return True
        if loader is machinery.FrozenImporter:
            return True
        if spec is not None:
            origin = spec.origin
        else:
            origin = None
        if not isinstance(origin, str):
            return False
        return origin in ('built-in', 'frozen')

    @staticmethod
    def _as_locations(path: Any) -> Optional[Tuple[str, ...]]:
        if path is None:
            return None
        try:   # of a namespace package: it asks finders if sys.path is another one now
            entries = tuple(path)
        except Exception as exc:   # the user's own; no submodules of this can be found
            logger.debug('the __path__ of a package cannot be read: %s', describe_exception(exc))
            return ()
        chosen_entries = []
        for entry in entries:
            if isinstance(entry, str):
                chosen_entries.append(entry)
        return tuple(chosen_entries)

    def _kind_without_file(self, name: str, spec: Any,
                           locations: Optional[Tuple[str, ...]]) -> ModuleKind:
        """Of a module that a package made while it was imported the kind is that of the package,
        if every node that has the package makes it too."""
        if spec is not None and locations:
            kind = self._kind_of_namespace(name, locations)
            if kind is not ModuleKind.OWN:
                return kind
            found = self._search(name)
            submodule_search_locations = getattr(found, 'submodule_search_locations', None)
            there = self._as_locations(submodule_search_locations) or ()
            if set(map(os.path.realpath, there)) & set(map(os.path.realpath, locations)):
                return self._below_parent(name)
            return ModuleKind.BY_VALUE
        parent = name.rpartition('.')[0]
        if parent:
            kind = self.look(parent).kind
        else:
            kind = ModuleKind.BY_VALUE
        if kind in (ModuleKind.STANDARD, ModuleKind.INSTALLED):
            return kind
        return ModuleKind.BY_VALUE

    def _kind_of_namespace(self, name: str, locations: Tuple[str, ...]) -> ModuleKind:
        """A part of it that is the user's own travels."""
        files = []
        for path in locations:
            absolute_path = os.path.abspath(path)
            files.append(os.path.join(absolute_path, '__init__.py'))
        kinds = set()
        for file in files:
            kinds.add(self._kind_of_file(name, file))
        if len(kinds) == 1:
            return kinds.pop()
        if ModuleKind.OWN in kinds:
            return ModuleKind.OWN
        return ModuleKind.INSTALLED

    def _below_parent(self, name: str) -> ModuleKind:
        parent = name.rpartition('.')[0]
        if parent and self.look(parent).kind in (ModuleKind.BY_VALUE, ModuleKind.MISSING):
            return ModuleKind.BY_VALUE
        return ModuleKind.OWN

    def _kind_of_file(self, name: str, path: str) -> ModuleKind:
        """By its path, and where that leaves it open by the metadata beside its top-level
        module."""
        real_path = os.path.realpath(path)
        real = os.path.normcase(real_path)
        if _is_below(real, _site_roots()):
            return ModuleKind.INSTALLED
        real_parts = real.split(os.sep)
        if SITE_DIRECTORIES & set(real_parts):
            return ModuleKind.INSTALLED
        if _is_below(real, _standard_roots()):
            return ModuleKind.STANDARD
        levels = name.count('.') + 1 + os.path.basename(path).startswith('__init__.')
        holder = path
        for _ in range(levels):
            holder = os.path.dirname(holder)
        short_path = path[len(holder):]
        below = short_path.replace(os.sep, '/').lstrip('/')
        if holder.endswith('.egg'):
            if os.path.isdir(os.path.join(holder, 'EGG-INFO')):
                return ModuleKind.INSTALLED
        if self.installations.owner(holder, below):
            return ModuleKind.INSTALLED
        if not path.endswith(tuple(importlib.machinery.all_suffixes())):
            return ModuleKind.BY_VALUE   # a hook of the user's has loaded it; a node has none
        return ModuleKind.OWN

    def _leads_to(self, name: str, path: str) -> bool:
        """Whether an import of this name, elsewhere and by the same rules, would load this file."""
        if self._below_parent(name) is ModuleKind.BY_VALUE:
            return False
        spec = self._search(name)
        if spec is None:
            return False
        if not isinstance(spec.origin, str):
            return False
        if spec.origin == path:
            return True
        real_path = os.path.realpath(spec.origin)
        return real_path == os.path.realpath(path)

    def _search(self, name: str) -> Any:
        """The spec of a module, by the finders. `importlib.util.find_spec` would import the
        packages that it is in."""
        parent = name.rpartition('.')[0]
        if not parent:
            return self._ask(sys.meta_path, name, None)
        locations = self.look(parent).locations
        if locations is None:
            return None
        if parent in sys.modules:
            below = self._ask([importlib.machinery.PathFinder], name, list(locations))
        else:   # PathFinder would look for a loaded package that a namespace package is in
            below = self._ask_entries(name, locations)
        # Finders of editable installs may know of submodules that lie elsewhere.
        return below or self._ask(sys.meta_path, name, list(locations))

    @staticmethod
    def _ask_entries(name: str, locations: Sequence[str]) -> Any:
        """Ask the entries of a path, as PathFinder does."""
        portions: List[str] = []
        for location in locations:
            try:
                spec = pkgutil.get_importer(location).find_spec(name)   # type: ignore[union-attr]
            except Exception as exc:   # the user's own finder, or none for this directory
                text = describe_exception(exc)
                logger.debug('%s was asked for module %s: %s', location, name, text)
                continue
            if spec is not None:
                if spec.loader is not None:
                    return spec
            if spec is not None:
                portions += spec.submodule_search_locations or []
        if not portions:
            return None
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = portions
        return spec

    @staticmethod
    def _ask(finders: Sequence[Any], name: str, path: Optional[List[str]]) -> Any:
        for finder in tuple(finders):
            if type(finder).__module__ == '_distutils_hack':   # imports setuptools
                continue
            try:
                spec = finder.find_spec(name, path)
            except Exception as exc:   # the user's own finder; the others are asked still
                text = describe_exception(exc)
                logger.debug('%s was asked for module %s: %s', type(finder), name, text)
                continue
            if issubclass(type(spec), importlib.machinery.ModuleSpec):
                return spec
        return None


class FileStamp(NamedTuple):
    """What tells a file from what it was before, without reading it."""
    mtime_ns: int
    size: int
    inode: int = 0


class FileOfModule(NamedTuple):
    """A file that travels: of a module, or of the data of a package."""
    target: str        # its name on the node, with '/'
    path: str          # where it is read from; inside of an archive `loader` reads it
    loader: Any = None

    def read(self) -> bytes:
        """Its content as it is now. Raises OSError."""
        return _read_at_once(self.path, self.loader)[0]

    def stamp(self) -> FileStamp:
        """Raises OSError."""
        return _stamp_of(self.path)


class ModuleFile(NamedTuple):
    """A module that travels, and its file."""
    name: str
    path: str                        # where it is read from; inside of an archive `loader` reads it
    target: str                      # its name on the node, with '/'
    is_package: bool
    is_extension: bool
    source: Optional[ModuleSource]   # none of an extension module, and of one without source
    loader: Any = None
    chain: Tuple[str, ...] = ()      # by whose imports it was reached, itself the last

    def file(self) -> FileOfModule:
        return FileOfModule(self.target, self.path, self.loader)

    def read(self) -> bytes:
        """Its content as it is now. Raises OSError."""
        return self.file().read()

    def stamp(self) -> FileStamp:
        """Raises OSError."""
        return self.file().stamp()


def _stamp_of(path: str) -> FileStamp:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        archive = archive_of(path)[0]
        if not archive:
            raise
        found = os.stat(archive)
    return FileStamp(found.st_mtime_ns, found.st_size, found.st_ino)


def _read_at_once(path: str, loader: Any) -> Tuple[bytes, Optional[FileStamp], int]:
    """Content, stamp and mode of a file, all of one moment; no stamp if the file never kept still.
    Raises OSError."""
    archive, member = archive_of(path)
    if archive:
        stamp = _stamp_of(path)
        return _read_member(archive, member, path, loader), stamp, 0o644
    with open(path, 'rb') as file:
        for _ in range(STABLE_READS):
            before = os.fstat(file.fileno())
            content = file.read()
            after = os.fstat(file.fileno())
            stamp = FileStamp(after.st_mtime_ns, after.st_size, after.st_ino)
            file_stamp = FileStamp(before.st_mtime_ns, len(content), before.st_ino)
            if stamp == file_stamp:
                return content, stamp, stat.S_IMODE(after.st_mode)
            file.seek(0)
    return content, None, stat.S_IMODE(after.st_mode)


def _read_member(archive: str, member: str, path: str, loader: Any) -> bytes:
    """A file in an archive, by the loader of its module if that can read it."""
    import zipfile
    try:
        if not zipfile.is_zipfile(archive):
            return bytes(loader.get_data(path))
        root = getattr(loader, 'archive', None)
        # It knows where in the archive its files are, by the path that it has itself.
        if isinstance(root, str):
            if os.path.abspath(root) == archive:
                data = loader.get_data(os.path.join(root, *member.split('/')))
                return bytes(data)
        with zipfile.ZipFile(archive) as members:
            return members.read(member)
    except Exception as exc:   # loaders may be the user's own
        text = describe_exception(exc)
        message = '%s in %s cannot be read: %s' % (member, archive, text)
        raise OSError(message) from exc


def _is_settled(stamp: FileStamp) -> bool:
    """Whether a later change of the file would change its stamp too: file systems count time in
    steps."""
    if stamp.mtime_ns % 1_000_000_000:
        step = 50_000_000
    else:
        step = 2_000_000_000
    return abs(time.time_ns() - stamp.mtime_ns) > step


class ModuleDigests:
    """Digests of the files of modules; none is read twice while it is the same."""

    def __init__(self) -> None:
        # path -> stamp, (size, digest, mode)
        self._kept: Dict[str, Tuple[FileStamp, Tuple[int, bytes, int]]] = {}

    def note(self, path: str, content: bytes, stamp: Optional[FileStamp], mode: int) -> None:
        """What was read for another purpose."""
        self._keep(path, stamp, (len(content), hashlib.sha256(content).digest(), mode))

    def of(self, file: FileOfModule) -> Tuple[FileStamp, Tuple[int, bytes, int]]:
        """Stamp of a file, and its size, digest and mode, all of one read. Raises OSError."""
        path = file.path
        stamp = _stamp_of(path)
        kept = self._kept.get(path)
        if kept is not None:
            if kept[0] == stamp:
                return kept
        if archive_of(path)[0]:
            content, _, mode = _read_at_once(path, file.loader)
            found = len(content), hashlib.sha256(content).digest(), mode
            return self._keep(path, stamp, found)
        for _ in range(STABLE_READS):
            size, digest = file_digest(path)
            status = os.stat(path)
            before = stamp
            stamp = FileStamp(status.st_mtime_ns, status.st_size, status.st_ino)
            found = size, digest, stat.S_IMODE(status.st_mode)
            if stamp != before:
                continue
            if size == stamp.size:
                return self._keep(path, stamp, found)
        return stamp, found

    def _keep(self, path: str, stamp: Optional[FileStamp], found: Tuple[int, bytes, int]) -> Any:
        if stamp is not None and _is_settled(stamp):
            self._kept[path] = stamp, found
        return stamp, found


class _ModuleWalk:
    """Follows imports from module to module, breadth first, so that the chains are short."""

    def __init__(self, finder: ModuleFinder, file_of: Callable[[str, Whereabouts], ModuleFile],
                 shipped: Sequence[str]) -> None:
        self._finder = finder
        self._file_of = file_of
        self._shipped = frozenset(shipped)
        self._seen: Set[str] = set()
        self._waiting: Deque[ModuleFile] = collections.deque()
        self.found: List[ModuleFile] = []

    def run(self, names: Iterator[str]) -> None:
        for name in names:
            self._reach(name, ())
        while self._waiting:
            file = self._waiting.popleft()
            if file.source is not None:
                for imported in file.source.imports:
                    self._reach(imported.module, file.chain)
                    if imported.names:
                        self._reach_members(imported, file.chain)

    def _reach(self, name: str, chain: Tuple[str, ...]) -> None:
        if name in self._seen:
            return
        self._seen.add(name)
        where = self._finder.look(name)
        if where.kind is ModuleKind.OWN or where.kind is ModuleKind.MISSING:
            parent = name.rpartition('.')[0]
            if parent:   # it is imported first
                self._reach(parent, chain)
        if where.kind is not ModuleKind.OWN:
            return
        if not where.path:
            return
        file = self._file_of(name, where)._replace(chain=chain + (name,))
        self._waiting.append(file)
        if not self._travels_otherwise(name):
            self.found.append(file)

    def _travels_otherwise(self, name: str) -> bool:
        while name:
            if name in self._shipped:
                return True
            name = name.rpartition('.')[0]
        return False

    def _reach_members(self, imported: ImportedModule, chain: Tuple[str, ...]) -> None:
        """What is imported from a package may be a module in it."""
        module = imported.module
        where = self._finder.look(module)
        if where.kind is not ModuleKind.OWN:
            return
        if where.locations is None:
            return
        names: Sequence[str] = imported.names
        if names == ('*',):
            names = self._starred(module, where)
        attributes = module_dict(sys.modules.get(module))
        for name in names:
            full = '%s.%s' % (module, name)
            if full in sys.modules or name not in attributes:
                self._reach(full, chain)

    def _starred(self, package: str, where: Whereabouts) -> Sequence[str]:
        """Names of submodules that `from package import *` may reach."""
        if where.path:
            source = self._file_of(package, where).source
        else:
            source = None
        if source is not None:
            if source.exports is not None:
                return source.exports
        attributes = module_dict(sys.modules.get(package))
        return [name for name, value in list(attributes.items())
                if value is not None and value is sys.modules.get('%s.%s' % (package, name))]


class DataFiles:
    """Finds the data files of packages: what lies beside the modules and is no code."""

    def __init__(self) -> None:
        self._warned: Set[str] = set()
        # path -> stamp, whether it is an extension module
        self._extensions: Dict[str, Tuple[Tuple[int, int], bool]] = {}

    def of(self, package: ModuleFile) -> List[FileOfModule]:
        """In the order of their names, as far as they are not too large together."""
        name = package.name
        archive, member = archive_of(package.path)
        if archive:
            directory = member.rpartition('/')[0]
            rows = self._in_archive(archive, directory)
        else:
            root = os.path.dirname(package.path)
            rows = self._in_directory(root)
        prefix = package.target.rpartition('/')[0]
        room = PACKAGE_DATA
        found: List[FileOfModule] = []
        left: List[Tuple[str, int]] = []
        for below, path, size in rows:
            target = '%s/%s' % (prefix, below)
            if size > room:
                left.append((target, size))
            else:
                room -= size
                found.append(FileOfModule(target, path, package.loader))
        if left and name not in self._warned:
            self._warned.add(name)
            count = len(left) + len(found)
            self._warn(name, left, count)
        return found

    @staticmethod
    def _warn(package: str, left: List[Tuple[str, int]], count: int) -> None:
        total_size = sum(size for _, size in left)
        size = total_size / 2**20
        logger.warning(
            'package %s has more data files than the %d MB that travel with a package; not sent '
            'are %d of %d files (%.1f MB), the first of them %s: list those that jobs need in '
            'depends=',
            package, PACKAGE_DATA >> 20, len(left), count, size, left[0][0])

    def _in_directory(self, root: str) -> Iterator[Tuple[str, str, int]]:
        """(name below the package with '/', path, size)."""
        waiting = [('', root)]
        looked_at = 0
        while waiting:
            prefix, directory = waiting.pop()
            entries = self._entries(directory)
            if prefix and any(_is_package_file(entry.name) for entry in entries):
                continue   # a package itself
            looked_at += len(entries)
            if looked_at > PACKAGE_FILES:
                self._warn_of_many(root)
                return
            directories = []
            for entry in entries:
                name = prefix + entry.name
                is_dir = entry.is_dir(follow_symlinks=False)
                if is_dir and _may_travel(entry.name):
                    directories.append((name + '/', entry.path))
                elif self._is_data(entry):
                    yield name, entry.path, entry.stat().st_size
            waiting += reversed(directories)

    def _warn_of_many(self, root: str) -> None:
        if root not in self._warned:
            self._warned.add(root)
            logger.warning(
                'package directory %s has more than %d files: the data files beyond these are not '
                'sent; list those that jobs need in depends=', root, PACKAGE_FILES)

    @staticmethod
    def _entries(directory: str) -> List[Any]:
        try:
            with os.scandir(directory) as entries:
                shown = [entry for entry in entries if _is_shown(entry.name)]
        except OSError as exc:
            logger.warning('directory %s cannot be read, so its data files are not sent: %s',
                           directory, exc)
            return []
        return sorted(shown, key=lambda entry: entry.name)

    def _is_data(self, entry: Any) -> bool:
        """Of links it counts where they lead."""
        if entry.name.endswith(_CODE_SUFFIXES):
            return False
        if not _may_travel(entry.name):
            return False
        try:
            if not entry.is_file():
                return False
            return not self._is_extension(entry)
        except OSError as exc:
            logger.debug('%s is no data file: %s', entry.path, exc)
            return False

    def _is_extension(self, entry: Any) -> bool:
        """Whether this is an extension module, and no other shared library."""
        suffix = next(filter(entry.name.endswith, importlib.machinery.EXTENSION_SUFFIXES), '')
        if suffix:
            stem = entry.name[:-len(suffix)]
        else:
            stem = ''
        if not stem.isidentifier():
            return False
        if suffix not in ('.so', '.pyd'):   # has the name of this implementation in it
            return True
        status = entry.stat()
        if status.st_size > PACKAGE_DATA:
            return False
        stamp = status.st_mtime_ns, status.st_size
        kept = self._extensions.get(entry.path)
        if kept is None or kept[0] != stamp:
            with open(entry.path, 'rb') as file:
                kept = stamp, b'PyInit_' + stem.encode() in file.read()
            self._extensions[entry.path] = kept
        return kept[1]

    @staticmethod
    def _in_archive(archive: str, directory: str) -> Iterator[Tuple[str, str, int]]:
        import zipfile
        try:
            with zipfile.ZipFile(archive) as members:
                infos = sorted(members.infolist(), key=lambda info: info.filename)
        except (OSError, zipfile.BadZipFile) as exc:
            logger.warning('archive %s cannot be read, so its data files are not sent: %s',
                           archive, exc)
            return
        prefix = directory + '/'
        names = {info.filename for info in infos}
        packages = set()
        for name in names:
            holder, _, base = name.rpartition('/')
            if _is_package_file(base):
                packages.add(holder)
        for info in infos:
            below = info.filename[len(prefix):]
            if not info.filename.startswith(prefix):
                continue
            if not below:
                continue
            if info.is_dir():
                continue
            parts = below.split('/')
            inner = set()
            for end in range(1, len(parts)):
                inner.add(prefix + '/'.join(parts[:end]))
            if inner & packages:
                continue
            if below.endswith(_CODE_SUFFIXES):
                continue
            if not all(map(_is_shown, parts)):
                continue
            if all(map(_may_travel, parts)):
                path = os.path.join(archive, *info.filename.split('/'))
                yield below, path, info.file_size


_CODE_SUFFIXES = ('.py', '.pyc', '.pyo')


def _is_package_file(name: str) -> bool:
    if not name.startswith('__init__.'):
        return False
    return name[8:] in importlib.machinery.all_suffixes()


def _is_shown(name: str) -> bool:
    if name.startswith('.'):
        return False
    return name != '__pycache__'


def _may_travel(name: str) -> bool:
    """Whether a node would take a file or directory of this name."""
    try:
        check_name(name)
    except ValueError as exc:   # a name that a node would refuse
        logger.debug('%r is not sent: %s', name, exc)
        return False
    return True


def _of_files(names: FrozenSet[str]) -> FrozenSet[str]:
    """Without what every module has."""
    return names - _FILE_NAMES - _FILE_MODULES


class OwnModules:
    """Which modules are the user's own, and what travels for them. One is enough for a process,
    for it remembers what it has read. Any thread."""

    def __init__(self) -> None:
        self._finder = ModuleFinder()
        self._digests = ModuleDigests()
        self._data = DataFiles()
        # name -> (module, its __spec__, stamp of the file if it was not loaded, what was found)
        self._files: Dict[str, Tuple[Any, Any, Optional[FileStamp], ModuleFile]] = {}
        # path -> stamp and digest of the last row
        self._versions: Dict[str, str] = {}

    def distribution_of(self, module: str) -> str:
        """The name by which pip knows what holds a module, with the module's where they differ:
        'PyYAML (yaml)'."""
        for directory in filter(os.path.isdir, sys.path):
            owner = self._finder.installations.owner_of_name(directory, module)
            name = owner.partition('-')[0]
            if name:
                if name.lower() == module.lower():
                    return module
                return '%s (%s)' % (name, module)
        return module

    def kind(self, name: Any) -> ModuleKind:
        """What decides how an object of this module goes to a node."""
        if isinstance(name, str):
            return self._finder.look(name).kind
        return ModuleKind.MISSING

    def closure(self, names: Sequence[str], shipped: Sequence[str] = ()) -> List[ModuleFile]:
        """The user's own modules among these, with all that they import and the packages that they
        are in, in the order in which they are reached. `shipped` are modules that travel
        otherwise, with all below them."""
        walk = _ModuleWalk(self._finder, self._file_of, shipped)
        sorted_names = sorted(set(names))
        walk.run(iter(sorted_names))
        return walk.found

    def files(self, closure: Sequence[ModuleFile]) -> Dict[str, FileOfModule]:
        """What travels, by the names that it has on the node: code, and the data files of
        packages."""
        found = {module.target: module.file() for module in closure}
        for module in closure:
            if module.is_package:
                for file in self._data.of(module):
                    found.setdefault(file.target, file)
        return found

    def rows(self, files: Dict[str, FileOfModule]) -> List[Tuple[str, int, bytes, int]]:
        """(name, size, digest, mode) of each file. Raises OSError."""
        rows = []
        for target, file in files.items():
            _, (size, digest, mode) = self._digests.of(file)
            rows.append((target, size, digest, mode))
        return rows

    def digests(self, closure: Sequence[ModuleFile]) -> Dict[str, bytes]:
        """The digest of each module's file as it is now, by its path. A file that cannot be read is
        left out: there is no other text that could be sent."""
        found = {}
        for module in closure:
            try:
                found[module.path] = self._digests.of(module.file())[1][1]
            except OSError as exc:
                logger.debug('the file of module %s cannot be read: %s', module.name, exc)
        return found

    def changed(self, closure: Sequence[ModuleFile], before: Dict[str, bytes]) -> List[ModuleFile]:
        """Modules whose files are not as they were when `before` was taken, as `digests`."""
        now = self.digests(closure)
        modules: List[ModuleFile] = []
        for module in closure:
            if module.path not in now:
                continue
            if now[module.path] != before.get(module.path, now[module.path]):
                modules.append(module)
        return modules

    def _file_of(self, name: str, where: Whereabouts) -> ModuleFile:
        """The file of a module of the user's. The text of a loaded module is read once."""
        module = sys.modules.get(name)
        spec = module_dict(module).get('__spec__')
        kept = self._files.get(name)
        if kept is None or kept[3].path != where.path:
            same = False
        else:
            same = kept[0] is module and kept[1] is spec
        if kept is not None and same:
            if module is not None or self._is_as_it_was(kept[2], where.path):
                return kept[3]
        file, stamp = self._read_file(name, where)
        self._files[name] = module, spec, stamp, file
        return file

    @staticmethod
    def _is_as_it_was(stamp: Optional[FileStamp], path: str) -> bool:
        try:
            if stamp is None:
                return False
            return stamp == _stamp_of(path)
        except OSError:   # whoever reads it says so
            return False

    def _read_file(self, name: str, where: Whereabouts) -> Tuple[ModuleFile, Optional[FileStamp]]:
        path = where.path
        base = os.path.basename(path)
        is_package = _is_package_file(base)
        is_extension = base.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))
        is_source = base.endswith(tuple(importlib.machinery.SOURCE_SUFFIXES))
        parts = name.split('.')
        if is_source:
            target = '/'.join(parts) + ('/__init__.py' if is_package else '.py')
        else:
            target = '/'.join((parts if is_package else parts[:-1]) + [base])
        source = None
        stamp = None
        if is_source:
            try:
                content, stamp, mode = _read_at_once(path, where.loader)
            except OSError as exc:
                source = ModuleSource('', name, is_package)
                source.error = str(exc)
            else:
                self._digests.note(path, content, stamp, mode)
                source = ModuleSource(content, name, is_package)
        if stamp is not None:
            if not _is_settled(stamp):
                stamp = None
        file = ModuleFile(name, path, target, is_package, is_extension, source, where.loader)
        return file, stamp

    def file_names(self, closure: Sequence[ModuleFile]) -> Dict[str, FrozenSet[str]]:
        """`ModuleSource.file_names` of each, with what they import from each other."""
        sources = {}
        for module in closure:
            if module.source is not None:
                sources[module.name] = module.source
        found = {name: source.file_names for name, source in sources.items()}
        users: Dict[str, Set[str]] = {}
        for name, source in sources.items():
            for imported in source.imports:
                for origin in [imported.module, *imported.members()]:
                    if origin in sources:
                        users.setdefault(origin, set()).add(name)
        waiting: Deque[str] = collections.deque()
        for name in sources:
            if _of_files(found[name]):
                waiting += sorted(users.get(name, ()))
        while waiting:
            name = waiting.popleft()
            names = sources[name].file_names_with(
                lambda other: _of_files(found.get(other, frozenset())))
            if names != found[name]:
                found[name] = names
                waiting += sorted(users.get(name, ()))
        return found

    def uses_dispy(self, closure: Sequence[ModuleFile]) -> bool:
        """Whether one of these imports a module of dispy."""
        ours = NOT_OWN - {'cloudpickle', 'psutil'}
        for _, imported in self._imports(closure):
            if imported.module.partition('.')[0] in ours:
                return True
        return False

    @staticmethod
    def _imports(closure: Sequence[ModuleFile]) -> Iterator[Tuple[ModuleFile, ImportedModule]]:
        for module in closure:
            if module.source is not None:
                for imported in module.source.imports:
                    yield module, imported

    def packages(self,
                 closure: Sequence[ModuleFile]) -> Dict[str, Tuple[str, bool, Tuple[str, ...]]]:
        """The installed packages that these import: version here ('' if that is unknown), whether
        an import of it is certain, and the chain of imports that leads to it."""
        found: Dict[str, Tuple[str, bool, Tuple[str, ...]]] = {}
        for module, imported in self._imports(closure):
            for name in self._installed(imported):
                known = found.get(name)
                if known is None or (imported.certain and not known[1]):
                    chain = module.chain + (name,)
                    version = self._version(name)
                    found[name] = version, imported.certain, chain
        return found

    def _installed(self, imported: ImportedModule) -> List[str]:
        """Top-level packages. Below a namespace package these are what is in it, of which each may
        be installed or not."""
        parts = imported.module.split('.')
        if parts[0] in NOT_OWN:
            return []
        for end in range(1, len(parts) + 1):
            name = '.'.join(parts[:end])
            where = self._finder.look(name)
            if where.path or where.locations is None:
                if where.kind is ModuleKind.INSTALLED:
                    return [name]
                return []
        return [name for name in imported.members()
                if self._finder.look(name).kind is ModuleKind.INSTALLED]

    def _version(self, name: str) -> str:
        version = self._versions.get(name)
        if version is None:
            version = self._find_version(name)
            self._versions[name] = version
        return version

    def _find_version(self, name: str) -> str:
        version = package_version(name)
        if version:
            return version
        path = self._finder.look(name).path
        if not path:
            return ''
        holder = os.path.dirname(path)
        if _is_package_file(os.path.basename(path)):
            holder = os.path.dirname(holder)
        owner = self._finder.installations.owner_of_name(holder, name.replace('.', '/'))
        stem, _ = os.path.splitext(owner)
        return stem.partition('-')[2]


own_modules = OwnModules()


# --------------------------------------------------------------------------------------------------
# What the program has set in its modules, and bundles: the modules that a pickle needs, with their
# state
# --------------------------------------------------------------------------------------------------

# Bytes of a pickled variable that a module's source computes, after which it stays at home
STATE_LIMIT = 1 << 20
LOOK_EVERY = 1.0              # s between looks at whether files of modules have changed
# This file, for modules that import it on a node that has only dispynode.py
BEHIND = 'behind/dispy.py'


class _CannotTravel(Exception):
    """A variable that the program has set cannot be pickled: (name, type)."""


def _state_pickler(numbers: Dict[int, int]) -> Any:
    class StatePickler(client_pickler()):  # type: ignore[misc]
        """Objects that keep their identity on the node go as numbers."""

        def persistent_id(self, obj: Any) -> Optional[int]:
            """Called by the pickler for every object."""
            return numbers.get(id(obj))
    return StatePickler


class StateCapture:
    """Collects what the variables of modules hold. A module whose state cannot be carried whole is
    left out whole, since what is left of it would not fit together."""

    def __init__(self) -> None:
        self.rows: List[StateRow] = []
        self.warnings: List[str] = []
        self._objects: List[Any] = []              # those that keep their identity, by number
        self._numbers: Dict[int, int] = {}         # id -> number
        self._values: Dict[Tuple[str, str, str], Any] = {}

    def add(self, file: ModuleFile, placed: Iterable[str] = ()) -> None:
        """A module that the client has loaded, if its source is known. `placed` are the names whose
        values depend on where files lie: on the node these lie elsewhere."""
        source = file.source
        module = sys.modules.get(file.name)
        if module is None:
            return
        if source is None or source.error:
            return
        found: List[Tuple[StateRow, Any]] = []
        try:
            for name, value in list(module_dict(module).items()):
                if name in placed:
                    continue
                binding = source.names.get(name)
                self._consider(source, (file.name, '', name), value, binding, found)
            for owner, table in source.classes.items():
                self._add_class(source, owner, table, found)
        except _CannotTravel as exc:
            warning = ('module %s: what its variable %s holds (a %s) cannot be pickled, so '
                       'nothing that the program has set in this module reaches the jobs. '
                       'Set it in setup, or call cloudpickle.register_pickle_by_value(%s)' %
                       (file.name, *exc.args, file.name.partition('.')[0]))
            self.warnings.append(warning)
            return
        for row, value in found:
            if keeps_identity(value):
                number = self._number(value)
            else:
                number = -1
            self.rows.append(row._replace(number=number))
            if number < 0:
                self._values[row[:3]] = value

    def _add_class(self, source: ModuleSource, owner: str, table: Dict[str, NameBinding],
                   found: List[Tuple[StateRow, Any]]) -> None:
        try:
            cls = find_named(source.name, owner)
        except Exception:  # it is not there any more, or a __getattr__ of the user's raises
            return
        if not isinstance(cls, type):
            return
        if issubclass(cls, enum.Enum):
            return
        if not is_named(cls, source.name, owner):
            return
        for name, value in list(vars(cls).items()):
            self._consider(source, (source.name, owner, name), value, table.get(name), found)

    def _consider(self, source: ModuleSource, key: Tuple[str, str, str], value: Any,
                  binding: Optional[NameBinding], found: List[Tuple[StateRow, Any]]) -> None:
        """A variable, if the node's own import would not give it the same value."""
        module, owner, name = key
        if name.startswith('__'):
            return
        if isinstance(value, types.ModuleType):
            return
        if self._is_as_imported(key, value, binding, source):
            return
        given = binding is None or binding.kind is NameKind.CONSTANT   # then the program has set it
        form = plain_form(value, sys.maxsize if given else STATE_LIMIT)
        if form is not None:
            state_row = StateRow(module, owner, name, form, -1, not given)
            found.append((state_row, value))
        elif given and (not owner or binding is not None):
            if not self._is_made_by_module(module, value):
                raise _CannotTravel(name,
                                    '%s.%s' % (type(value).__module__, type(value).__qualname__))

    @staticmethod
    def _is_as_imported(key: Tuple[str, str, str], value: Any, binding: Optional[NameBinding],
                        source: ModuleSource) -> bool:
        module, owner, name = key
        if binding is None:
            for star in source.stars:
                if module_dict(sys.modules.get(star)).get(name, key) is value:
                    return True
            return False
        if binding.from_file:
            return True
        if binding.kind is NameKind.CONSTANT and hasattr(binding, 'value'):
            if type(binding.value) is not type(value):
                return False
            return bool(binding.value == value)
        if binding.kind is NameKind.IMPORTED:
            for origin in binding.origins:
                if own_modules.kind(origin) in (ModuleKind.STANDARD, ModuleKind.INSTALLED):
                    return True
            return False
        if binding.kind is NameKind.DEFINED:
            if is_named(value, module, '%s.%s' % (owner, name) if owner else name):
                return True
            return not hasattr(value, '__qualname__')
        return False

    @staticmethod
    def _is_made_by_module(module: str, value: Any) -> bool:
        """Whether a function or class, which the source does not name, came of running the module
        all the same."""
        if not isinstance(value, (type, types.FunctionType)):
            return False
        return value.__module__ == module

    def _number(self, value: Any) -> int:
        number = self._numbers.setdefault(id(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)
        return number

    def pickled(self) -> Tuple[List[Tuple[str, str]], bytes, AbstractSet[str]]:
        """Classes of the numbered objects, the state, and the modules that opening it imports.
        Raises what pickling raises."""
        if not self.rows:
            return [], b'', set()
        # All there at once: their ids must differ
        contents = [contents_of(value) for value in self._objects]
        pickler = _state_pickler(self._numbers)
        sealed = dumps((contents, self._values), pickler)
        kinds = []
        for value in self._objects:
            kinds.append((type(value).__module__, type(value).__qualname__))
        body = in_one_piece(sealed.payload)
        return kinds, body, sealed.modules | {kind[0] for kind in kinds}


class Bundle(NamedTuple):
    """Modules that travel together: their files, and how they were set when they first
    travelled."""
    number: int
    closure: Tuple[ModuleFile, ...]
    files: Dict[str, FileOfModule]    # those that no earlier bundle has, by their names on the node
    content: bytes                    # an envelope, for ModuleLoader
    texts: bytes                      # the same of KeptTexts

    @property
    def texts_name(self) -> str:
        """The name of the file with the texts of its modules on the embedded node."""
        return BUNDLES + TEXTS % self.number

    @property
    def name(self) -> str:
        """The name of its own file on the node."""
        return BUNDLES + BUNDLE % self.number


class SentFiles:
    """Files of modules as they were when a computation first sent them: a node that comes later
    gets the same. The text of modules is kept in memory. Of the other files of packages the digest
    is kept, and a node refuses one that has changed since. Any thread."""

    def __init__(self) -> None:
        # By the name on the node
        self._files: Dict[str, FileOfModule] = {}
        self._rows: Dict[str, Tuple[str, int, bytes, int]] = {}
        self._texts: Dict[str, bytes] = {}

    def keep_texts(self, closure: Sequence[ModuleFile]) -> None:
        """Read the texts of these modules. One that cannot be read is left out: whoever sends it
        says so."""
        for module in closure:
            if module.source is None or module.target in self._rows:
                continue
            try:
                text, _, mode = _read_at_once(module.path, module.loader)
            except OSError as exc:
                logger.debug('the file of module %s cannot be read: %s', module.name, exc)
                continue
            digest = hashlib.sha256(text).digest()
            row = (module.target, len(text), digest, mode)
            if self._rows.setdefault(module.target, row) is row:   # no other thread was faster
                self._texts[module.target] = text

    def texts_of(self, closure: Sequence[ModuleFile]) -> bytes:
        """Return the texts of modules that have files of their own, as KeptTexts reads them;
        nothing if there are none."""
        found = {}
        for module in closure:
            if module.target in self._texts and not archive_of(module.path)[0]:
                found[module.name] = (module.path, self._texts[module.target])
        if not found:
            return b''
        return pickle.dumps(found, 5)

    def rows(self, files: Dict[str, FileOfModule]) -> List[Tuple[str, int, bytes, int]]:
        """Return (name, size, digest, mode) of each. Raises OSError."""
        new = {}
        for target, file in files.items():
            self._files.setdefault(target, file)
            if target not in self._rows:
                new[target] = file
        for row in own_modules.rows(new):
            self._rows.setdefault(row[0], row)
        return [self._rows[target] for target in files]

    def source_of(self, target: str) -> Any:
        """Return what a file is read from: its text or a FileOfModule; None if it was not
        offered."""
        if target in self._texts:
            return self._texts[target]
        return self._files.get(target)


class ModuleBundles:
    """The modules of one computation that have travelled, or will. Number 0 is what its code needs.
    Any thread; no lock is held while objects of the user's are pickled."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.shipped: List[str] = []               # modules that depends brings along as files
        self.known_globals: List[Dict[str, Any]] = []   # of the computation, setup and cleanup
        # Whether the code holds no functions and classes by value
        self.portable = False
        self._lock = threading.Lock()              # guards those below
        self._bundles: List[Bundle] = []
        self._number_of: Dict[str, int] = {}       # module -> bundle
        self._plain: Set[str] = set()              # names of modules that need none
        self._sent = SentFiles()
        # Path of a module's file -> its digest when it travelled
        self._as_sent: Dict[str, bytes] = {}
        self._looked_at = time.monotonic()
        self._has_changed: List[str] = []

    def pack_code(self, computation: Any, setup: Any, cleanup: Any, objects: Dict[str,
                                                                                  Any]) -> bytes:
        """The code of the computation, with bundle 0. One pickle for all, so that they share their
        variables on the node."""
        labels = [('the computation', computation), ('setup', setup), ('cleanup', cleanup)]
        for name, value in objects.items():
            labels.append(('depends, %s' % name, value))
        sealed = pack((computation, setup, cleanup, objects), labels, True)
        self.portable = sealed.portable
        self._make(0, sealed.modules)
        return in_one_piece(sealed.payload)

    def packed(self, value: Any, labels: Iterable[Tuple[str, Any]], exact: bool = False,
               share: Optional[Callable[[list, list], Any]] = None) -> Any:
        """A payload that says which bundles have to be there before it is opened; `share` as in
        `dumps`. Raises what pickling raises."""
        sealed = pack(value, labels, exact, share)
        numbers = self.numbers(sealed.modules)
        if not numbers:
            return sealed.payload
        payload = with_needs(sealed.payload, numbers)
        if isinstance(sealed.payload, SharedPayload):
            return SharedValues.with_values(in_one_piece(payload), sealed.payload.values)
        return payload

    def numbers(self, modules: AbstractSet[str]) -> Set[int]:
        """The bundles that have these modules, but for number 0. New modules make a new one."""
        if modules <= self._plain:
            return set()
        new = set()
        for name in modules - self._plain:
            if name in self._number_of:
                continue
            if self._is_own(name):
                new.add(name)
        if new:
            number = max(1, len(self._bundles))
            self._make(number, new)
        found = {self._number_of.get(name, 0) for name in modules} - {0}
        if not found:
            self._plain |= modules
        return found

    def _is_own(self, name: str) -> bool:
        if own_modules.kind(name) is not ModuleKind.OWN:
            return False
        for shipped in self.shipped:
            if name == shipped:
                return False
            if name.startswith(shipped + '.'):
                return False
        return True

    def _make(self, number: int, modules: AbstractSet[str]) -> None:
        """A bundle with these modules, unless another thread has just made one."""
        new, capture, kinds, state = self._capture(modules)
        closure = [file for file in new if self._is_own(file.name)]
        for text in capture.warnings:
            logger.warning('%s', text)
        with self._lock:
            if number == 0 and not closure and not capture.rows:
                self._bundles.append(Bundle(0, (), {}, b'', b''))
                return
            if not self._bundles and number:
                self._bundles.append(Bundle(0, (), {}, b'', b''))
            if modules and all(name in self._number_of for name in modules):
                return
            number = len(self._bundles)
            before = set()
            for bundle in self._bundles:
                for target in bundle.files:
                    before.add(target)
            files = {
                target: file
                for target, file in own_modules.files(closure).items() if target not in before
            }
            content = self._content(closure, capture, kinds, state)
            self._sent.keep_texts(closure)
            self._as_sent.update(own_modules.digests(closure))
            texts = self._sent.texts_of(closure)
            self._bundles.append(Bundle(number, tuple(closure), files, content, texts))
            for file in new:
                self._number_of.setdefault(file.name, number)
            for name in modules:
                self._number_of.setdefault(name, number)
            self._plain -= modules

    def _capture(
        self, modules: AbstractSet[str]
    ) -> Tuple[List[ModuleFile], StateCapture, List[Tuple[str, str]], bytes]:
        """The modules with all that they import, and their state. The state may refer to more
        modules, which may have state."""
        wanted = set(modules)
        while True:
            # Modules that travel as files of depends have state like the others.
            closure = own_modules.closure(sorted(wanted))
            new = [file for file in closure if file.name not in self._number_of]
            capture = StateCapture()
            placed = own_modules.file_names(closure)
            for file in new:
                capture.add(file, placed.get(file.name, ()))
            kinds, state, met = capture.pickled()
            names = set()
            for name in met:
                if own_modules.kind(name) is ModuleKind.OWN:
                    names.add(name)
            more = names - wanted - {file.name for file in closure}
            if not more:
                return new, capture, kinds, state
            wanted |= more

    @staticmethod
    def _content(closure: List[ModuleFile], capture: StateCapture, kinds: List[Tuple[str, str]],
                 state: bytes) -> bytes:
        names = {file.name for file in closure}
        chosen_modules = {row.module for row in capture.rows}
        travelling = names | chosen_modules
        compiled = [file.name for file in closure if file.is_extension]
        packages = {
            name: version
            for name, (version, _, _) in own_modules.packages(closure).items() if version
        }
        modules = list(sys.modules)
        order = []
        for name in modules:
            if name in travelling:
                order.append(name)
        rows = [tuple(row) for row in capture.rows]
        return pickle.dumps(
            {
                'order': order, 'platform': sys.platform, 'rows': rows, 'kinds': kinds,
                'state': state, 'packages': packages, 'compiled': compiled, 'build': build_tag()
            }, 5)

    # -- what nodes get ----------------------------------------------------------------------------

    def rows(self, embedded: bool) -> List[Tuple[str, int, bytes, int]]:
        """Rows of all files that a node gets: those of all bundles and, if it is not a part of this
        program, of the modules. Raises OSError."""
        with self._lock:
            bundles = list(self._bundles)
        rows = []
        for bundle in bundles:
            if bundle.content:
                rows += self._rows_of(bundle, embedded)
        if not embedded:
            if any(own_modules.uses_dispy(bundle.closure) for bundle in bundles):
                rows += own_modules.rows({BEHIND: _THIS_FILE})
        return rows

    def _rows_of(self, bundle: Bundle, embedded: bool) -> List[Tuple[str, int, bytes, int]]:
        rows = [self._row_of(bundle.name, bundle.content)]
        if not embedded:
            rows += self._file_rows(bundle.files)
        elif bundle.texts:
            row = self._row_of(bundle.texts_name, bundle.texts)
            rows.append(row)
        return rows

    @staticmethod
    def _row_of(name: str, content: bytes) -> Tuple[str, int, bytes, int]:
        return name, len(content), hashlib.sha256(content).digest(), 0o600

    def _file_rows(self,
                   files: Dict[str, FileOfModule]) -> List[Tuple[str, int, bytes, int]]:
        rows = self._sent.rows(files)
        return [(MODULES + name, size, digest, mode) for name, size, digest, mode in rows]

    def more(self, request: Any, embedded: bool) -> List[Tuple[str, int, bytes, int]]:
        """Rows for what a job has asked for: a bundle by number, or a module by name. Raises
        ModuleNotFoundError."""
        if isinstance(request, int):
            with self._lock:
                if 0 < request < len(self._bundles):
                    bundle = self._bundles[request]
                else:
                    bundle = None
            if bundle is None:
                raise ModuleNotFoundError('the program knows no bundle of modules with number %d' %
                                          request)
            return self._rows_of(bundle, embedded)
        if embedded or own_modules.kind(request) is not ModuleKind.OWN:
            raise ModuleNotFoundError('the program has no module of its own called %s' % request)
        closure = own_modules.closure([request], self.shipped)
        self._sent.keep_texts(closure)
        files = own_modules.files(closure)
        return self._file_rows(files)

    def source_of(self, name: str) -> Any:
        """Where a file that a node asks for is read from: its content, or a FileOfModule. None for
        a name not offered."""
        with self._lock:
            if name == BEHIND:
                return _THIS_FILE
            for bundle in self._bundles:
                if name == bundle.name:
                    return bundle.content
                if name == bundle.texts_name:
                    return bundle.texts
        if name.startswith(MODULES):
            return self._sent.source_of(name[len(MODULES):])
        return None

    # -- files that change -------------------------------------------------------------------------

    def changed(self, every: float = LOOK_EVERY) -> List[str]:
        """Names of modules whose files have changed since they travelled. Looks at most once in so
        many seconds."""
        now = time.monotonic()
        if now - self._looked_at >= every and not self._has_changed:
            self._looked_at = now
            with self._lock:
                closure = []
                for bundle in self._bundles:
                    for file in bundle.closure:
                        closure.append(file)
            self._has_changed = [file.name for file in own_modules.changed(closure, self._as_sent)]
        return self._has_changed


_THIS_FILE = FileOfModule(BEHIND, os.path.abspath(__file__))


# --------------------------------------------------------------------------------------------------
# What travels: computations, their files, arguments
# --------------------------------------------------------------------------------------------------

_NOT_BY_NAME = frozenset((ModuleKind.BY_VALUE, ModuleKind.MISSING))
_CANNOT = (TypeError, AttributeError, ValueError, RuntimeError, NotImplementedError,
           pickle.PicklingError)


def client_pickler() -> Any:
    """The pickler of a program, a class: modules that a node can import go by their names."""
    return _client_pickler(value_pickler())


@functools.lru_cache(maxsize=2)
def _client_pickler(base: Any) -> Any:
    class ClientPickler(base):  # type: ignore[misc, valid-type]
        """Pickles arguments."""

        def importable(self, module: str) -> bool:
            """Whether nodes have the module, or get its file."""
            return own_modules.kind(module) not in _NOT_BY_NAME

        def _special(self, kind: type) -> Any:
            if kind is ValueRef:
                return self._reduce_ref
            return super()._special(kind)

        def _reduce_ref(self, ref: 'ValueRef') -> tuple:
            self.modules.update(ref._modules)
            if not ref._portable:
                self.portable = False
            return ref._reduced()
    return ClientPickler


@functools.lru_cache(maxsize=2)
def _code_pickler(base: Any) -> Any:
    class CodePickler(base):  # type: ignore[misc, valid-type]
        """Of code, whose variables are to be as they are in the program."""
        exact = True
    return CodePickler


def pack(value: Any, labels: Iterable[Tuple[str, Any]], exact: bool = False,
         share: Optional[Callable[[list, list], Any]] = None) -> Sealed:
    """Pickle what goes to a node. Where that fails the error names the path to the culprit;
    `labels` are the parts of the value, with what they are called; `share` as in `dumps`. Raises
    what pickling raises."""
    try:
        if exact:
            pickler = _code_pickler(client_pickler())
        else:
            pickler = client_pickler()
        return dumps(value, pickler, share)
    except _CANNOT as exc:
        text = explain_unpicklable(labels, exc)
        if not text or type(exc) not in _CANNOT:
            raise
        raise type(exc)(text) from exc


def explain_unpicklable(labels: Iterable[Tuple[str, Any]], exc: BaseException) -> str:
    """Which part of a value cannot be pickled, and what can be done. Empty if no single part is to
    blame."""
    for label, value in labels:
        if not _can_be_packed(value):
            path, culprit, module = _find_culprit(label, value)
            kind = type(culprit)
            if module:
                owner = ', met in module %s,' % module
            else:
                owner = ''
            return (
                '%s (a %s.%s)%s cannot be pickled: %s. Make it in setup or in the job, leave it '
                'out in a __getstate__ of what holds it, or put its function or class into a '
                'module of its own'
                % (path, kind.__module__, kind.__qualname__, owner, exc))
    return ''


def _can_be_packed(value: Any) -> bool:
    try:
        dumps(value, client_pickler())
    except Exception:
        # The user's __reduce__ may raise anything; what it is comes with the error that is told
        return False
    return True


def _find_culprit(path: str, value: Any) -> Tuple[str, Any, str]:
    """Follow the parts that cannot be pickled: (path, the last of them, module of the function or
    class it was met in)."""
    module = ''
    seen = {id(value)}
    for _ in range(30):
        met = getattr(value, '__module__', None)
        if isinstance(met, str):
            if own_modules.kind(met) in (ModuleKind.OWN, ModuleKind.BY_VALUE):
                module = met
        found = None
        for step, part in _parts_of(value):
            if id(part) in seen:
                continue
            if not _can_be_packed(part):
                found = (step, part)
                break
        if found is None:
            break
        path = '%s -> %s' % (path, found[0])
        value = found[1]
        seen.add(id(value))
    return path, value, module if isinstance(module, str) else ''


def _parts_of(value: Any) -> Iterator[Tuple[str, Any]]:
    """What a pickle of a value would hold next, with names for it."""
    if isinstance(value, functools.partial):
        yield 'function', value.func
        yield from (('argument %d' % number, part) for number, part in enumerate(value.args, 1))
        yield from (('argument %s' % name, part) for name, part in value.keywords.items())
    elif isinstance(value, types.MethodType):
        yield 'self', value.__self__
        yield 'function', value.__func__
    elif isinstance(value, types.FunctionType):
        yield from _parts_of_function(value)
    elif isinstance(value, collections.abc.Mapping):
        yield from (('[%.40r]' % (key,), part) for key, part in list(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        yield from (('[%d]' % number, part) for number, part in enumerate(list(value)))
    if isinstance(value, type):
        yield from (('.' + name, part) for name, part in list(vars(value).items())
                    if not name.startswith('__'))
    elif not isinstance(value, types.FunctionType):
        for name, part in list(getattr(value, '__dict__', {}).items()):
            yield ('.' + name, part)
        slots = copyreg._slotnames(type(value))  # type: ignore[attr-defined]
        for name in filter(functools.partial(hasattr, value), slots):
            yield ('.' + name, getattr(value, name))


def _parts_of_function(function: types.FunctionType) -> Iterator[Tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):   # it is empty
            yield 'variable %s' % name, cell.cell_contents
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    for name in sorted(names):
        if name in function.__globals__:
            yield 'global %s' % name, function.__globals__[name]
    for part in function.__defaults__ or ():
        yield ('default of %s' % function.__name__, part)
    yield from (('.' + name, part) for name, part in vars(function).items())


class Value:
    """A part of arguments that nodes know by its digest. `data` is the program's own copy, which
    nobody changes."""
    __slots__ = ('digest', 'data', '__weakref__')

    def __init__(self, digest: bytes, data: Union[bytes, bytearray]) -> None:
        self.digest = digest
        self.data = data

    @property
    def row(self) -> Tuple[int, bytes]:
        """Return size and digest."""
        return len(self.data), self.digest


class SharedPayload(bytes):
    """Packed arguments, some parts of which are values. These stay in the program as long as it
    does."""
    values: Tuple[Value, ...] = ()

    def rows(self) -> tuple:
        """Size and digest of each value."""
        return tuple(value.row for value in self.values)

    def total(self) -> int:
        """Return how many bytes it has, with the values."""
        return len(self) + sum(len(value.data) for value in self.values)


class SharedValues:
    """The values of this program that nodes know by their digests, each once, as long as a job or a
    ref needs it. A buffer that the program may change is compared with the copy that was made of
    it; only another content is copied and digested. Any thread."""
    # Places of a buffer, and bytes at each, by which the copy is found
    SAMPLES = 16
    SAMPLE = 64

    def __init__(self) -> None:
        self._lock = threading.Lock()    # guards those below
        self._by_digest: 'weakref.WeakValueDictionary[bytes, Value]' = weakref.WeakValueDictionary()
        self._by_object: 'weakref.WeakValueDictionary[int, Value]' = weakref.WeakValueDictionary()
        self._by_sample: 'weakref.WeakValueDictionary[tuple, Value]' = weakref.WeakValueDictionary()
        # In a job that uses clusters: what opens the job's own values
        self._others = dispynode.known_values

    def payload(self, pieces: Sequence[Any], buffers: Sequence[Any]) -> Optional[SharedPayload]:
        """A payload of these; None if there are no values among them."""
        values: List[Value] = []

        def known(part: Any) -> Any:
            if len(part) > SHARED_FROM:
                value: Optional[Value] = self.of(part)
            else:
                value = self._kept(part)
            if value is None:
                return part
            values.append(value)
            return value.row
        parts = [known(piece) for piece in pieces], [known(buffer) for buffer in buffers]
        if values:
            return self.with_values(shared_payload(*parts), values)
        return None

    @staticmethod
    def with_values(payload: bytes, values: Iterable[Value]) -> SharedPayload:
        """A payload that keeps these values."""
        found = SharedPayload(payload)
        found.values = tuple(dict.fromkeys(values))
        return found

    def _kept(self, part: Any) -> Optional[Value]:
        """The value whose own memory this is, all of it."""
        if type(part) is memoryview:
            whole = part.obj
        else:
            whole = part
        value = self._by_object.get(id(whole))
        if value is not None and value.data is whole:
            if len(part) == len(whole):
                return value
        return None

    def of(self, part: Any) -> Value:
        """The value with this content."""
        value = self._kept(part)
        if value is not None:
            return value
        sample = None
        if type(part) is bytes:   # nobody can change it: no copy is needed
            data: Union[bytes, bytearray] = part
        else:
            sample = self._sample(part)
            value = self._by_sample.get(sample)
            # Of a bytearray, and not of a view, this is a comparison of memory.
            if value is not None and type(value.data) is bytearray:
                if value.data == part:
                    return value
            data = bytearray(part)
        digest = hashlib.sha256(data).digest()
        return self.adopt(digest, data, sample)

    def _sample(self, part: memoryview) -> tuple:
        step = max(1, len(part) // self.SAMPLES)
        return (len(part), *(bytes(part[at:at + self.SAMPLE]) for at in range(0, len(part), step)))

    def adopt(self,
              digest: bytes,
              data: Union[bytes, bytearray],
              sample: Optional[tuple] = None) -> Value:
        """The value with this digest; `data` is its content if it is new."""
        with self._lock:
            value = self._by_digest.get(digest)
            if value is None:
                value = self._by_digest[digest] = Value(digest, data)
                self._by_object[id(data)] = value
            if sample is not None:
                self._by_sample[sample] = value
            return value

    def find(self, digest: bytes) -> Optional[Value]:
        """A value, while it is needed."""
        with self._lock:
            return self._by_digest.get(digest)

    def open(self, size: int, digest: bytes) -> Any:
        """A copy of a value. Raises LookupError."""
        value = self.find(digest)
        if value is not None:
            return bytearray(value.data)
        if self._others is None:
            raise LookupError('a value of %d bytes is not needed any more and has gone' % size)
        return self._others.open(size, digest)

    def after_fork(self) -> None:
        """In a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()


shared_values = SharedValues()
dispynode.known_values = shared_values


class ValueRef:
    """A value that `JobCluster.put` has taken. Where it stands in the arguments of a job, the job
    gets the value, opened anew. It stays in the program as long as this object, or a job that has
    it, is there."""

    def __init__(self, value: Any, labels: Iterable[Tuple[str, Any]]) -> None:
        """Raises what pickling raises."""
        parts: List[Any] = []

        def take(pieces: list, buffers: list) -> bytes:
            parts[:] = [b''.join(pieces), *buffers]
            return b''
        sealed = pack(value, labels, share=take)
        parts = parts or [in_one_piece(sealed.payload)]
        # Values are known by their own memory; what is small goes along with each job.
        self._values = [
            shared_values.of(part) if len(part) >= OUT_OF_BAND else None for part in parts
        ]
        self._parts = [
            part if value is None else value.data for part, value in zip(parts, self._values)
        ]
        self._modules = sealed.modules
        self._portable = sealed.portable

    @property
    def size(self) -> int:
        """Bytes of the value, packed."""
        return sum(map(len, self._parts))

    def get(self) -> Any:
        """The value, opened anew here. Raises what opening it raises."""
        return open_pieces(*self._parts[:1], *map(bytearray, self._parts[1:]))

    def _reduced(self) -> tuple:
        return open_pieces, tuple(map(pickle.PickleBuffer, self._parts))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            'a ref of JobCluster.put can be passed to jobs of this program, and nowhere else')

    def __repr__(self) -> str:
        return '<ValueRef of %d bytes>' % self.size


def pack_arguments(args: tuple, kwargs: dict, bundles: 'ModuleBundles',
                   depends: Sequence[Any] = (), returns: tuple = ()) -> Any:
    """Arguments as they are now: what the caller changes later does not reach the job. Raises what
    pickling raises. `depends` are files and objects for this job alone; files are read now.
    `returns` as of WantedOutput.of."""
    if not depends and not kwargs:
        if ATOMS.issuperset(map(type, args)):
            return pickle.dumps((args, kwargs), 5)
    objects: Dict[str, Any] = {}
    value: tuple = (args, kwargs)
    if depends:
        files, objects = _job_depends(depends, bundles.known_globals)
        value = (args, kwargs, files, objects)
        if returns:
            value += (returns,)
    # Made only if pickling fails.
    labels = itertools.chain(
        (('argument %d' % number, value) for number, value in enumerate(args, 1)),
        (('argument %s' % name, value) for name, value in kwargs.items()),
        (('dispy_job_depends, %s' % name, thing) for name, thing in objects.items()))
    payload = bundles.packed(value, labels, share=shared_values.payload)
    return own_memory(payload)


def own_memory(payload: Any) -> Any:
    """A payload no part of which is the caller's own memory."""
    if type(payload) is tuple:
        return tuple(piece if type(piece) is bytes else bytes(piece) for piece in payload)
    return payload


class JobFile(NamedTuple):
    """A file of a job, and what the job knows it by: a path below its directory."""
    path: str
    name: str


class OwnDirectory(List[JobFile]):
    """The files of a job that has a directory of its own, also if it has no files."""

    def __bool__(self) -> bool:
        return True


class WantedOutput:
    """Which files of a program's jobs come back, and where to: `returns` and `dest`."""
    ID = '{id}'

    def __init__(self, patterns: Sequence[str], dest: Optional[str], directory: str) -> None:
        """`directory` is the program's. What `dest` names is made. Raises OSError."""
        self._patterns = patterns
        start, mark, end = (dest or '').partition(self.ID)
        root, _, begin = start.rpartition('/') if mark else (start, '', '')
        if mark and start[:1] == '/':
            root = root or '/'
        self.root = os.path.join(directory, root) if root else directory
        if dest:
            os.makedirs(self.root, exist_ok=True)
        self._before = begin + mark + end
        # Names of files that have come, and of which jobs, where two jobs may have the same
        self._came: Dict[str, Any] = {}
        self._may_clash = not mark and any(self.ID not in pattern for pattern in patterns)
        self._has_told = False

    @staticmethod
    def checked(returns: Any, dest: Any) -> Tuple[str, ...]:
        """The patterns. Raises TypeError or ValueError."""
        if isinstance(returns, str):
            raise TypeError("returns=%.80r must be a list of names, such as ['out_*.dat']"
                            % returns)
        patterns = tuple(returns or ())
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError('returns: %.80r is not a text' % (pattern,))
            try:
                check_name(pattern)
            except ValueError as exc:
                raise ValueError('returns: %s: it is a name below the directory of the job'
                                 % exc) from None
        if dest is not None and not isinstance(dest, str):
            raise TypeError('dest=%.80r must be a text, such as results/{id}' % (dest,))
        if dest is not None and not patterns:
            raise ValueError('dest=%.80r needs returns=[...], which files come there' % dest)
        return patterns

    def of(self, number: Any) -> tuple:
        """What the node is told of the job with this id: what stands before the names that its
        files have here, and patterns of them. Nothing if none come back."""
        if not self._patterns:
            return ()
        # Signs that no name of a file has, on whatever system
        name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', '_', str(number))[:200]
        if name in ('', '.', '..'):
            name = '_' + name
        before = self._before.replace(self.ID, name)
        if before and not before.endswith('/'):
            before += '/'
        return before, [pattern.replace(self.ID, glob.escape(name)) for pattern in self._patterns]

    def note(self, job: DispyJob, name: str) -> None:
        """A file of a job comes. Warn, once, if one of another job is replaced."""
        if not self._may_clash or self._has_told:
            return
        other = self._came.setdefault(name, job.id)
        if other != job.id:
            self._has_told = True
            logger.warning("the file %s of job %r replaces that of job %r: with "
                           "dest='results/{id}' each job has a directory", name, job.id, other)


def _job_depends(
        depends: Sequence[Any],
        globals_: Sequence[Dict[str, Any]]) -> Tuple[List[Tuple[str, int, bytes]], Dict[str, Any]]:
    """(name, mode, content) of files, and objects by their names."""
    if not isinstance(depends, (list, tuple)):
        raise TypeError('dispy_job_depends must be a list, not %s' % type(depends).__name__)
    paths: Dict[str, str] = {}
    objects: Dict[str, Any] = {}
    for item in depends:
        if isinstance(item, JobFile):
            paths[item.name] = item.path
        elif isinstance(item, (str, os.PathLike)):
            _add_path(os.fspath(item), paths)
        else:
            objects.update(_names_of(item, globals_, 'dispy_job_depends'))
    files = []
    for name, path in paths.items():
        check_name(name)
        with open_regular(path) as file:
            st_mode = os.stat(path).st_mode
            files.append((name, stat.S_IMODE(st_mode) & 0o755 | 0o600, file.read()))
    return files, objects


def _names_of(item: Any, globals_: Sequence[Dict[str, Any]], where: str) -> Dict[str, Any]:
    """An object of depends with the names by which jobs find it: its own, or those that it has in
    the global variables of the computation and of the main module. An instance brings its class
    along, as in dispy 4. Raises TypeError."""
    if isinstance(item, types.ModuleType):
        return {item.__name__.rpartition('.')[2]: item}
    if isinstance(item, (type, types.FunctionType, types.BuiltinFunctionType)) or (
            callable(item) and isinstance(getattr(item, '__name__', None), str)):
        return {item.__name__: item}
    if type(item).__module__ == 'builtins':
        raise TypeError(
            '%s: %.80r is neither a file, a directory, a module, a function, a class nor an '
            'instance of one'
            % (where, item))
    found = {}
    for variables in (*globals_, vars(sys.modules['__main__'])):
        for name, value in list(variables.items()):
            if value is item:
                found[name] = item
    if isinstance(item, functools.partial):
        return found or {getattr(item.func, '__name__', 'partial'): item}
    return {type(item).__name__: type(item), **found}


class PackedComputation(NamedTuple):
    """A computation, packed: the spec of `Compute` but for what depends on the node, and where its
    files lie."""
    spec: dict
    paths: Dict[str, str]
    is_program: bool
    # See pack_source; called when a node of another version of Python is met
    source: Callable[[], Tuple[bytes, str]]


def _sort_depends(depends: Sequence[Any], paths: Dict[str, str],
                  globals_: Sequence[Dict[str, Any]]) -> Tuple[Dict[str, Any], List[str]]:
    """Objects by name, and names of modules that travel as files; files go into `paths`."""
    objects: Dict[str, Any] = {}
    shipped: List[str] = []
    for item in depends:
        if isinstance(item, types.ModuleType):
            shipped += _module_files(item, paths)
        if isinstance(item, (str, os.PathLike)):
            _add_path(os.fspath(item), paths)
        else:
            objects.update(_names_of(item, globals_, 'depends'))
    return objects, shipped


def pack_computation(computation: Any, depends: Sequence[Any], setup: Any, cleanup: Any,
                     dest_path: Optional[str], max_jobs: Optional[int], name: str,
                     bundles: 'ModuleBundles') -> PackedComputation:
    """Raises TypeError, ValueError, FileNotFoundError or what pickling raises, naming what was
    wrong."""
    paths: Dict[str, str] = {}
    program, code, objects, cleaner = '', b'', {}, cleanup if callable(
        cleanup) else None   # type: Tuple[str, bytes, Dict[str, Any], Any]
    is_program = isinstance(computation, (str, os.PathLike, CommandLines))
    runnable = ''
    if isinstance(computation, CommandLines):
        _sort_depends(depends, paths, ())
        runnable = computation.program
    elif isinstance(computation, (str, os.PathLike)):
        _sort_depends(depends, paths, ())
        path = _program_path(os.fspath(computation))
        program = runnable = os.path.basename(path)
        paths[program] = path
    elif callable(computation):
        for label, function in (('setup', setup), ('cleanup', cleaner)):
            if function is None:
                continue
            if not callable(function):
                message = '%s must be a function, not %s' % (label, type(function).__name__)
                raise TypeError(message)
        bundles.known_globals = globals_of(computation, setup, cleaner)
        objects, bundles.shipped = _sort_depends(depends, paths, bundles.known_globals)
        code = bundles.pack_code(computation, setup, cleaner, objects)
    else:
        raise TypeError('computation must be a function or the path of a program, not %s' %
                        type(computation).__name__)
    files = _file_rows(paths, runnable)
    python = tuple(sys.version_info[:3])
    spec: Dict[str, Any] = {
        'name': name, 'kind': 'program' if is_program else 'function', 'code': code, 'files': files,
        'cleanup': bool(cleanup), 'dest_path': dest_path or '', 'max_jobs': max_jobs or 0,
        'python': python, 'support': {}, 'program': program, 'cpus': 0, 'setup_args': b'',
        'portable': bundles.portable, 'sys_path': [], 'argv': []
    }
    shippeds = tuple(bundles.shipped)
    source = functools.partial(pack_source, computation, setup, cleaner, objects, shippeds)
    return PackedComputation(spec, paths, is_program, source)


def check_cargo(spec: dict) -> None:
    """Raise ValueError for a computation that is too large for a message."""
    size = len(spec['code'])
    if size > WHOLE_MOST:
        raise ValueError(
            'the computation, with the data that it refers to, has %d bytes, and the limit is %d: '
            'read large data from a file in setup() (depends)' % (size, WHOLE_MOST))
    names = sum(len(row[0].encode('utf-8', 'replace')) + 80 for row in spec['files'])
    if names > NAMES_MOST:
        raise ValueError('depends: the list of %d files takes %d bytes, and the limit is %d: pack '
                         'them into an archive' % (len(spec['files']), names, NAMES_MOST))


def _file_rows(paths: Dict[str, str], program: str = '') -> List[Tuple[str, int, bytes, int]]:
    rows = []
    for name, path in paths.items():
        check_name(name)
        size, digest = file_digest(path)
        st_mode = os.stat(path).st_mode
        row = (name, size, digest, stat.S_IMODE(st_mode) | (0o500 if name == program else 0))
        rows.append(row)
    return rows


def is_executable(path: str, start: bytes) -> bool:
    """Whether the system runs a file that begins so. Windows tells by its name and beginning: all
    files are executable there."""
    if os.name != 'nt':
        return os.access(path, os.X_OK)
    pathext = os.environ.get('PATHEXT', '.COM;.EXE;.BAT;.CMD')
    suffixes = pathext.lower().split(';')
    _, suffix = os.path.splitext(path)
    end = suffix.lower()
    if start == b'MZ':
        return True
    if end in ('.py', '.pyw'):
        return True
    return bool(end) and end in suffixes


def _program_path(program: str) -> str:
    if os.path.exists(program) or os.sep in program or (os.altsep or os.sep) in program:
        path = program
    else:
        path = shutil.which(program) or program
    if not os.path.isfile(path):
        if os.path.isabs(program):
            where = ''
        else:
            where = ' (in %s)' % os.getcwd()
        raise FileNotFoundError('computation: there is no program %s%s' % (program, where))
    with open(path, 'rb') as file:
        start = file.read(2)
    if start != b'#!':
        if not is_executable(path, start):
            raise ValueError('computation: %s is not executable and does not begin with #!' %
                             program)
    return path


def _module_files(module: types.ModuleType, paths: Dict[str, str]) -> List[str]:
    """A module's file, or a package's files below the name that it is imported by. Returns the
    modules' names."""
    origin = module_dict(module).get('__file__')
    if not isinstance(origin, str) or not origin.endswith('.py') or not os.path.isfile(origin):
        if own_modules.kind(module.__name__) in (ModuleKind.OWN, ModuleKind.BY_VALUE):
            return []   # in an archive, compiled or made at run time: it travels by itself
        raise TypeError('depends: module %s has no Python file that could be sent' %
                        module.__name__)
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
    return [
        name for name in sys.modules
        if name == module.__name__ or name.startswith(module.__name__ + '.')
    ]


def _add_path(path: str, paths: Dict[str, str]) -> None:
    if os.path.isfile(path):
        paths[os.path.basename(path)] = path
    elif os.path.isdir(path):
        root = os.path.abspath(path)
        for directory, _, names in os.walk(root):
            for name in names:
                full = os.path.join(directory, name)
                # As locks of editors are
                if os.path.islink(full):
                    if not os.path.exists(full):
                        logger.debug('depends: %s is a link to nothing and is left out', full)
                        continue
                if not os.path.isfile(full):   # opening a FIFO would wait, and a device has no end
                    raise ValueError('depends: %s is not a regular file' % full)
                paths['/'.join([os.path.basename(root)] +
                               os.path.relpath(full, root).split(os.sep))] = full
    elif os.path.exists(path):
        raise ValueError('depends: %s is not a regular file' % path)
    else:
        message = 'depends: there is no file %s (in %s)' % (path, os.getcwd())
        raise FileNotFoundError(message)


@functools.lru_cache(maxsize=None)
def _support_files() -> Dict[str, bytes]:
    """cloudpickle itself, for nodes that have none or another version. It may lie in an archive."""
    import importlib.resources
    found = {}
    if hasattr(importlib.resources, 'files'):
        files = [(entry.name, entry.read_bytes)
                 for entry in importlib.resources.files(cloudpickle).iterdir()
                 if entry.name.endswith('.py')]
    else:   # Python 3.8
        files = [(name, functools.partial(importlib.resources.read_binary, cloudpickle, name))
                 for name in importlib.resources.contents(cloudpickle) if name.endswith('.py')]
    for name, read in files:
        found['cloudpickle/' + name] = read()
    return found


# --------------------------------------------------------------------------------------------------
# Source, for nodes with another version of Python: the statements that a computation needs, and no
# others
# --------------------------------------------------------------------------------------------------

def _refer_depend(picker: 'SourcePicker', name: str, obj: Any) -> Tuple[str, str]:
    """(module, name) of an object of depends."""
    if isinstance(obj, types.ModuleType):
        return obj.__name__, ''
    return picker.refer(obj, name + ' in depends')


def _is_named(obj: Any, module: str, name: str) -> bool:
    """Whether an object is what its module has under a qualified name. A bound method is made anew
    by each look."""
    if isinstance(obj, types.MethodType):
        try:
            name_parts = name.split('.')
            return bool(functools.reduce(getattr, name_parts, sys.modules[module]) == obj)
        except (AttributeError, KeyError):
            return False
    return is_named(obj, module, name)


class NoSource(Exception):
    """What stands in the way, in words."""


class SourcePicker:
    """Finds functions and classes in their files, and all that they use there. `shipped` are
    modules that travel as files."""

    def __init__(self, shipped: Sequence[str] = ()) -> None:
        self._shipped = frozenset(shipped)
        # module -> name there -> lines of its statement (a range), value (in a tuple of one), or
        # links: rows of (name,
        # module, name there) that stand for imports
        self._taken: Dict[str, Dict[str, Any]] = {}
        self._read = functools.lru_cache(maxsize=None)(self._read_file)   # of (module, cell)
        self._cell_of = functools.lru_cache(maxsize=None)(cell_of)        # of (module, name)

    def refer(self, obj: Any, what: str) -> Tuple[str, str]:
        """(module, name) by which a node will find a function or class. `what` it is begins the
        text of NoSource."""
        module = getattr(obj, '__module__', None)
        name = getattr(obj, '__qualname__', None)
        if not isinstance(module, str) or not isinstance(name, str):
            reason = '%s is a %s, no function at the top level of a file' % (what,
                                                                             type(obj).__name__)
            raise NoSource(reason)
        if name.endswith('<lambda>'):
            raise NoSource('%s is a lambda' % what)
        if '<locals>' in name:
            code = getattr(obj, '__code__', None)
            free = getattr(code, 'co_freevars', ())
            raise NoSource('%s is a closure over variable %s' % (what, ', '.join(free)) if free else
                           '%s is defined inside of %s' % (what, name.partition('.')[0]))
        if not _is_named(obj, module, name):
            message = '%s, of type %s, is not what is called %s in module %s' % (
                what, type(obj).__name__, name, module)
            raise NoSource(message)
        if not self._is_there(module):
            self._take(module, name.partition('.')[0], what)
        return module, name

    def classes(self) -> List[Tuple[str, str, list]]:
        """The other classes of the files, for arguments of jobs: rows of (module, class, rows as of
        `rows`)."""
        found = []
        for module in list(self._taken):
            for node in self._statements(module):
                before = {}
                for name, taken in self._taken.items():
                    before[name] = dict(taken)
                obj = vars(sys.modules[module]).get(getattr(node, 'name', ''))
                if not isinstance(node, ast.ClassDef):
                    continue
                if not isinstance(obj, type):
                    continue
                if node.name in before[module]:
                    continue
                try:
                    self.refer(obj, node.name)
                except NoSource:   # a job that has one as argument is told
                    self._taken = before
                else:
                    found.append((module, node.name, self.rows(before)))
        return found

    def _statements(self, module: str) -> List[Any]:
        """Those at the top level of a module's file, and of the cells that define its classes."""
        classes = []
        for name, obj in vars(sys.modules[module]).items():
            if not isinstance(obj, type):
                continue
            if obj.__module__ == module:
                classes.append(name)
        found: List[Any] = []
        cells = {self._cell_of(module, name) for name in classes}
        for cell in ['', *sorted(cells - {''})]:
            with contextlib.suppress(NoSource):   # a job that has one as argument is told
                contents = self._read(module, cell)
                found += contents[1].body
        return found

    def rows(
            self,
            without: Dict[str, Dict[str, Any]]) -> List[Tuple[str, str, str, Dict[str, Any], list]]:
        """What was taken, but for what is in `without`: rows of (module, file, text, values,
        links), in the order in which they can be run."""
        order: List[str] = []

        def visit(module: str) -> None:
            if module not in self._taken:
                return
            if module in order:
                return
            if module in visiting:
                return
            visiting.add(module)
            for name in self._taken[module].values():
                for link in name if isinstance(name, list) else ():
                    visit(link[1])
            order.append(module)
        visiting: Set[str] = set()
        for module in self._taken:
            visit(module)
        found: List[Tuple[str, str, str, Dict[str, Any], list]] = []
        for module in order:
            before = without.get(module, {})
            taken = {name: what for name, what in self._taken[module].items() if name not in before}
            if taken:
                found += self._rows_of(module, taken)
        return found

    def _rows_of(self, module: str, taken: Dict[str, Any]
                 ) -> List[Tuple[str, str, str, Dict[str, Any], list]]:
        """One row for the file, if there is one; one for each cell, in the order in which they were
        run. Values come first."""
        parts: Dict[str, Dict[str, Any]] = {'': {}}
        for name, what in taken.items():
            if isinstance(what, range):
                cell = self._cell_of(module, name)
            else:
                cell = ''
            parts.setdefault(cell, {})[name] = what
        caches = list(linecache.cache)
        cells = [cell for cell in caches if cell and cell in parts]
        if not cells or any(isinstance(what, range) for what in parts[''].values()):
            first = self._row(module, '', parts[''])
        else:
            first = (module, cells[0], '', *_values_and_links(parts['']))
        return [first, *(self._row(module, cell, parts[cell]) for cell in cells)]

    def _row(self, module: str, cell: str, taken: Dict[str, Any]
             ) -> Tuple[str, str, str, Dict[str, Any], list]:
        lines, _, future = self._read(module, cell)
        wanted = {line for node in future for line in range(node.lineno, node.end_lineno + 1)}
        wanted.update(*(statement for statement in taken.values() if isinstance(statement, range)))
        # What is not taken is left empty, so that the others keep their numbers
        kept = []
        highest_wanted = max(wanted, default=0)
        for number, line in enumerate(lines[:highest_wanted], 1):
            if number in wanted:
                kept.append(line)
            else:
                kept.append('\n')
        file = cell or sys.modules[module].__file__ or ''
        return (module, file, ''.join(kept), *_values_and_links(taken))

    def _is_there(self, module: str) -> bool:
        if module in self._shipped:
            return True
        return own_modules.kind(module) not in _NOT_BY_NAME

    @staticmethod
    def _read_file(module: str, cell: str) -> Tuple[List[str], ast.Module, List[Any]]:
        """Lines, tree and imports from __future__ of a module's file, or of one of its cells."""
        try:
            if cell:
                lines = linecache.getlines(cell)
            else:
                lines = inspect.findsource(sys.modules[module])[0]
            tree = _parse(''.join(lines))
        except (OSError, TypeError):
            raise NoSource('the source of module %s is not available' % module) from None
        except SyntaxError as exc:
            raise NoSource('the file of module %s was changed: %s' % (module, exc)) from exc
        nodes = []
        for node in tree.body:
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.module == '__future__':
                nodes.append(node)
        return lines, tree, nodes

    def _take(self, module: str, name: str, what: str) -> None:
        """A function or class, with all that it uses."""
        cell = self._cell_of(module, name)
        _, tree, future = self._read(module, cell)
        taken = self._taken.setdefault(module, {})
        if name in taken:
            return
        found = []
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            if node.name == name:
                found.append(node)
        if not found:
            raise NoSource('%s: no statement at the top level of the file of module %s defines %s' %
                           (what, module, name))
        with _tree_lock:
            compiled = compile(ast.Module([*future, found[-1]], []), '', 'exec', dont_inherit=True)
        codes = list(_codes(compiled))
        if hasattr(vars(sys.modules[module])[name], 'registry'):
            if hasattr(vars(sys.modules[module])[name], 'dispatch'):
                raise NoSource('%s: the implementations of %s (functools.singledispatch) are '
                               'statements of their own' % (what, name))
        file = cell or sys.modules[module].__file__
        is_as_written = _is_as_written(vars(sys.modules[module])[name], file, codes)
        if not is_as_written:
            raise NoSource(
                '%s: %s in the file of module %s is not what runs: was the file changed?' %
                (what, name, module))
        decorator_list = found[-1].decorator_list
        linenos = [node.lineno for node in (found[-1], *decorator_list)]
        first = min(linenos)
        taken[name] = range(first, found[-1].end_lineno + 1)  # type: ignore[operator]
        useds = {used for code in codes for used in _names_used(code)}
        for used in sorted(useds):
            if used in vars(
                    sys.modules[module]) and used not in taken and used not in _OF_EVERY_MODULE:
                self._take_global(module, used, name)

    def _take_global(self, module: str, name: str, user: str) -> None:
        value = vars(sys.modules[module])[name]
        taken = self._taken[module]
        what = 'global `%s` of %s' % (name, user)
        links = list(self._imports(module, name, value))
        if links:
            taken[name] = links
        elif isinstance(value, types.ModuleType):
            if not self._is_there(value.__name__):
                raise NoSource('%s is a module of your own: put it into depends' % what)
            taken[name] = [(name, value.__name__, '')]
        elif hasattr(value, '__qualname__'):
            where = self.refer(value, what)
            if where != (module, name):
                taken[name] = [(name, *where)]
        elif _is_plain(value):
            taken[name] = (value,)
        else:
            message = '%s, of type %s, is not a plain constant' % (what, type(value).__name__)
            raise NoSource(message)

    def _imports(self, module: str, name: str, value: Any) -> Iterator[Tuple[str, str, str]]:
        """Links for the import statements of a file, also of those within `if` and `try`, that have
        given a name its value."""
        try:
            content = self._read(module, '')[1]
            nodes: List[Any] = [content]
        except NoSource:   # cells: what they import is known by its own module and name
            return
        while nodes:
            node = nodes.pop()
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
                continue
            nodes.extend(ast.iter_child_nodes(node))
            if isinstance(node, ast.Import):
                yield from self._links_of_import(node, name, value)
            elif isinstance(node, ast.ImportFrom):
                yield from self._links_of_import_from(module, node, name, value)

    def _links_of_import(self, node: ast.Import, name: str,
                         value: Any) -> Iterator[Tuple[str, str, str]]:
        """Links for `import a`, `import a.b` and `import a.b as c`."""
        for alias in node.names:
            first = alias.name.partition('.')[0]
            if name != (alias.asname or first):
                continue
            if not self._is_there(alias.name):
                continue
            if alias.asname:
                bound = alias.name
            else:
                bound = first
            if sys.modules.get(bound) is not value:
                continue
            yield name, alias.name, ''
            if bound != alias.name:   # import a.b: loads b, binds a
                yield name, first, ''

    def _links_of_import_from(self, module: str, node: ast.ImportFrom, name: str,
                              value: Any) -> Iterator[Tuple[str, str, str]]:
        """Links for `from a import b`, `from a import b as c` and `from a import *`."""
        origin = self._origin_of(module, node)
        for alias in node.names:
            if alias.name == '*':
                bound = name
            elif name == (alias.asname or alias.name):
                bound = alias.name
            else:
                continue
            submodule = '%s.%s' % (origin, bound)
            if sys.modules.get(submodule) is value and self._is_there(submodule):
                yield name, submodule, ''
            elif self._is_there(origin):
                if _attribute_of(origin, bound) is value:
                    yield name, origin, bound

    @staticmethod
    def _origin_of(module: str, node: ast.ImportFrom) -> str:
        """The module that `from ... import` names; relative ones are resolved."""
        if not node.level:
            return node.module or ''
        package = sys.modules[module].__package__ or ''
        return importlib.util.resolve_name('.' * node.level + (node.module or ''), package)


def _attribute_of(module: str, name: str) -> Any:
    """An attribute of a module that has been imported; an object that nothing else is if there is
    none."""
    missing = object()
    return getattr(sys.modules.get(module), name, missing)


def _values_and_links(taken: Dict[str, Any]) -> Tuple[Dict[str, Any], list]:
    """Of what a SourcePicker has taken of a module."""
    values = {}
    links = []
    for name, found in taken.items():
        if isinstance(found, tuple):
            values[name] = found[0]
        elif isinstance(found, list):
            links += found
    return values, links


def cell_of(module: str, name: str) -> str:
    """The name by which linecache has the cell of a notebook, or what was typed at a prompt, that
    defines a function or class; '' for one of a file. A class without methods is looked for in
    all of them, the latest first."""
    obj = vars(sys.modules[module]).get(name)
    functions = [obj, *(vars(obj).values() if isinstance(obj, type) else ())]
    files = []
    for function in functions:
        if isinstance(function, types.FunctionType):
            files.append(inspect.unwrap(function).__code__.co_filename)
    for file in files:
        if is_cell(file):
            return file
    has_file = getattr(sys.modules[module], '__file__', None) is not None
    if not isinstance(obj, type):
        return ''
    if has_file and module not in _MAIN_NAMES:
        return ''
    message = r'^class %s\b' % re.escape(name)
    start = re.compile(message, re.M)
    for file in reversed(list(linecache.cache)):
        if not is_cell(file):
            continue
        if start.search(''.join(linecache.getlines(file))):
            return file
    return ''


_OF_EVERY_MODULE = frozenset(('__builtins__', '__file__', *vars(types.ModuleType(''))))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


def _names_used(code: types.CodeType) -> Iterator[str]:
    instructions = dis.get_instructions(code)
    return (step.argval for step in instructions
            if step.opname in ('LOAD_NAME', 'LOAD_GLOBAL', 'LOAD_FROM_DICT_OR_GLOBALS'))


def _is_plain(value: Any) -> bool:
    try:
        open_plain(pickle.dumps(value, 5))   # as the node will
    except Exception:  # whatever pickle cannot do, __reduce__ of the user's among it
        return False
    return True


def _is_as_written(obj: Any, file: Optional[str], codes: List[types.CodeType]) -> bool:
    """Whether a function, or the methods of a class, can have come of these code objects. They need
    not be equal: test and coverage tools write more into what runs."""
    functions = [inspect.unwrap(obj), *(vars(obj).values() if isinstance(obj, type) else ())]
    for function in functions:
        if not isinstance(function, types.FunctionType):
            continue
        running = function.__code__
        if running.co_filename != file:
            continue
        if not any(_may_have_become(code, running) for code in codes):
            return False
    return True


def _may_have_become(code: types.CodeType, running: types.CodeType) -> bool:
    """Whether the code object of a function that runs can have come of another."""
    if code.co_name != running.co_name:
        return False
    if code.co_firstlineno != running.co_firstlineno:
        return False
    co_names = set(code.co_names)
    if not co_names <= set(running.co_names):
        return False
    constants = set()
    for const in code.co_consts:
        if not isinstance(const, types.CodeType):
            constants.add(const)
    return constants <= set(running.co_consts)


def pack_source(computation: Any, setup: Any, cleanup: Any, objects: Dict[str, Any],
                shipped: Sequence[str]) -> Tuple[bytes, str]:
    """A computation of functions as arguments of `load_source`, or what stands in the way of
    that."""
    if isinstance(computation, Calls):
        return b'', 'the functions of an executor travel pickled'
    picker = SourcePicker(shipped)
    try:
        refer = picker.refer(computation, 'the computation')
        functions = (refer, setup and picker.refer(setup, 'setup'), cleanup
                     and picker.refer(cleanup, 'cleanup'))
        depends = {}
        for name, obj in objects.items():
            depends[name] = _refer_depend(picker, name, obj)
        rows = picker.rows({})
        source = (sys.version_info[:2], rows, picker.classes(), (*functions, depends))
        return pickle.dumps(source, 5), ''
    except NoSource as exc:
        return b'', str(exc)


# --------------------------------------------------------------------------------------------------
# Which nodes: what the user wrote, parsed
# --------------------------------------------------------------------------------------------------

LOCAL = 'local'


class NodeAllocate:
    """An element of `nodes` with a say of its own: subclass it and override `allocate`.

    host, port - as in `nodes`; cpus - as there; depends - more files, modules, functions and
        classes for that node;
    setup_args - arguments of `setup` and `cleanup` there.
    """

    def __init__(
        self,
        host: str,
        port: Optional[int] = None,
        cpus: int = 0,
        depends: Sequence[Any] = (),
        setup_args: Sequence[Any] = ()
    ) -> None:
        self.host = host
        self.setup_args = setup_args
        # A list of its own, to which `allocate` may add. What is no list is refused later.
        if isinstance(depends, (list, tuple, set)):
            self.depends: Any = list(depends)
        else:
            self.depends = depends
        if isinstance(port, str) and number_in(port, True):
            self.port: Any = number_in(port, True)
        else:
            self.port = port
        if isinstance(cpus, str) and number_in(cpus, True) is not None:
            self.cpus: Any = number_in(cpus, True)
        else:
            self.cpus = cpus

    @property
    def ip_addr(self) -> Optional[str]:
        """The address of `host`; None if the name is not known. A pattern is returned as it is."""
        if not hasattr(self, '_ip_addr'):
            self._ip_addr = address_of(self.host)
        return self._ip_addr

    @ip_addr.setter
    def ip_addr(self, address: Optional[str]) -> None:
        self._ip_addr = address

    def allocate(self,
                 cluster: 'JobCluster',
                 ip_addr: str,
                 name: str,
                 cpus: int,
                 avail_info: Any = None,
                 platform: str = '') -> int:
        """How many jobs to run there at once: 0 refuses the node, more than `cpus`, the number it
        offers, is allowed, a negative number leaves so many free. May set self.depends and
        self.setup_args. Called once a connection of the node, in a thread of the cluster's. If it
        is not overridden, `cpus` of the constructor counts as in `nodes`."""
        return limited(cpus, self.cpus)


def address_of(host: str) -> Optional[str]:
    """An address of a host, IPv4 before IPv6; None for a name that is not known. Waits for the
    resolver."""
    if '*' in host:
        return host
    try:
        found = socket.getaddrinfo(host, None, 0, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    found.sort(key=lambda row: row[0] != socket.AF_INET)
    word = str(found[0][4][0])
    return _plain_host(word)


def limited(offered: int, cpus: int) -> int:
    """CPUs to use of those that a node offers: at most so many; if that is negative, all but so
    many; if it is 0, all."""
    if cpus > 0:
        return min(offered, cpus)
    return max(0, offered + cpus)


def matches(pattern: str, word: str) -> bool:
    """Whether a word fits a pattern in which `*` stands for any characters. Each part is looked for
    once, where it comes first: a regular expression could try for hours."""
    if '\n' in word:   # no name has one
        return False
    first, *parts = pattern.split('*')
    if not parts:
        return word == pattern
    last = parts.pop()
    if len(word) < len(first) + len(last):
        return False
    if not word.startswith(first):
        return False
    if not word.endswith(last):
        return False
    at = len(first)
    end = len(word) - len(last)
    for part in parts:
        at = word.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True


class NodeSpec(NamedTuple):
    """One element of `nodes`."""
    host: str       # a name, an address, or either with wildcards
    port: int       # TCP; with wildcards UDP
    cpus: int = 0   # > 0: at most; < 0: leave so many free
    allocator: Optional[NodeAllocate] = None
    scheduler: bool = False   # no node, but a scheduler, which has some

    @property
    def wild(self) -> bool:
        """Whether this means all nodes that answer and fit."""
        return '*' in self.host

    def fits(self, *words: str) -> bool:
        """Whether one of these is what is meant: `*` stands for any characters, all else for
        itself."""
        wanted = _plain_host(self.host)
        if not self.wild:
            return wanted in map(_plain_host, words)
        for word in words:
            if word:
                if matches(wanted, _plain_host(word)):
                    return True
        return False

    def may_fit(self, address: str) -> bool:
        """Whether a node at this address may be meant; it may also be meant by its name, which is
        not known yet."""
        if self.fits(address):
            return True
        characters = set(self.host)
        return not (characters <= set('0123456789.*') or ':' in self.host)


def _plain_host(word: str) -> str:
    """Names and addresses in the one form in which they are compared."""
    try:
        address = ipaddress.ip_address(word.partition('%')[0])
        return str(address)
    except ValueError:
        return word.lower().rstrip('.')


class Allocation(NamedTuple):
    """What a NodeAllocate has said, packed."""
    cpus: int
    setup_args: bytes
    files: List[Tuple[str, int, bytes, int]]
    paths: Dict[str, str]


def ask_allocator(allocator: NodeAllocate, cluster: Any, peer: Union['NodeConnection',
                                                                     'NodeInfo']) -> Allocation:
    """Ask the user's allocator for a JobCluster. Raises what it raises, and TypeError if what it
    returns is no number."""
    fact = peer.facts.get('available', {})
    available = DispyNodeAvailInfo(*map(fact.get, DispyNodeAvailInfo._fields))
    cpus = allocator.allocate(cluster,
                              peer.ip_addr,
                              peer.name,
                              peer.offered,
                              avail_info=available,
                              platform=peer.facts.get('platform', ''))
    number = plain_number(cpus, True)
    if number is None:
        raise TypeError('allocate() returned %.80r, which is not a number of CPUs' % (cpus,))
    if number < 0:
        cpus = max(0, peer.offered + number)
    else:
        cpus = number
    paths: Dict[str, str] = {}
    core = core_of(cluster)
    bundles = core.bundles
    objects, _ = _sort_depends(allocator.depends, paths, bundles.known_globals)
    labels = []
    for place, value in enumerate(allocator.setup_args, 1):
        labels.append(('setup argument %d' % place, value))
    setup_args = tuple(allocator.setup_args)
    payload = bundles.packed((setup_args, objects), labels)
    blob = in_one_piece(payload)
    check_setup_args(len(blob), core.remote)
    return Allocation(cpus, blob, _file_rows(paths), paths)


def check_setup_args(size: int, remote: bool) -> None:
    """Raise ValueError for setup_args that are too large; a scheduler takes less of them."""
    if remote:
        most = SHARED_ARGS_MOST
    else:
        most = WHOLE_MOST
    if size > most:
        message = 'setup_args of %d bytes are over the limit of %d%s: send a file (depends)' % (
            size, most, ' of a SharedJobCluster' if remote else '')
        raise ValueError(message)


def parse_nodes(nodes: Any, port: int, elsewhere: bool = False) -> List[NodeSpec]:
    """What was written as `nodes`, not None; `elsewhere`: wildcards are not for this process to
    look for. Raises TypeError or ValueError naming the element."""
    if _is_one_node(nodes):
        nodes = [nodes]
    if not isinstance(nodes, collections.abc.Iterable):
        raise TypeError('nodes: %.80r is not a list of hosts' % (nodes,))
    found = []
    for node in nodes:
        found.append(_parse_node(node, port, elsewhere))
    if not found:
        raise ValueError("nodes is an empty list: give host names, 'local', or None for any node")
    return found


def any_node(nodes: Any) -> bool:
    """Whether no nodes are named: None, or, as in dispy 4, an empty list."""
    if nodes is None:
        return True
    if not isinstance(nodes, (list, tuple, set)):
        return False
    return not nodes


def _is_one_node(nodes: Any) -> bool:
    """Whether this is an element of `nodes` and no list of them. A tuple may be either: ('host',
    port) or ('host1', 'host2')."""
    if not isinstance(nodes, tuple):
        return isinstance(nodes, (str, dict, DispyNode, NodeAllocate))
    if not nodes:
        return False
    if not isinstance(nodes[0], str):
        return False
    if len(nodes) == 1:
        return True
    if not isinstance(nodes[1], str):
        return True
    return number_in(nodes[1], True) is not None


def _allocator_of(node: Any) -> Optional[NodeAllocate]:
    """Of an element with `depends` or `setup_args`, as dispy 4 took it; None for another."""
    if isinstance(node, (tuple, list)):
        if 4 <= len(node) <= 5:
            return NodeAllocate(*node)
    if not isinstance(node, dict):
        return None
    if not node:
        return None
    if set(node) - {'host', 'port', 'cpus', 'depends', 'setup_args'}:
        return None
    if 'host' not in node or set(node) & {'depends', 'setup_args'}:
        return NodeAllocate(**{'host': '*', **node})
    return None


def _parse_node(node: Any, port: int, elsewhere: bool) -> NodeSpec:
    if isinstance(node, DispyNode):
        return NodeSpec(node.ip_addr, node.port)
    node = _allocator_of(node) or node
    if isinstance(node, NodeAllocate):
        allocator = node
    else:
        allocator = None
    parts = _parts_of_node(node, port)
    host, its_port, cpus = (*parts, None, None)[:3]
    host = _check_host(host, elsewhere)
    number = number_in(port if its_port is None else its_port, True)
    if number is None or not 1 <= number <= 65535:
        raise ValueError('nodes: port %.40r of %s is not a whole number between 1 and 65535' %
                         (its_port, host))
    if cpus is not None:
        if number_in(cpus, True) is None:
            raise TypeError('nodes: cpus %.40r of %s is not a whole number' % (cpus, host))
    return NodeSpec(host, number, number_in(cpus, True) or 0, allocator)


def _parts_of_node(node: Any, port: int) -> Sequence[Any]:
    """Host and, where they are given, port and CPUs of an element of `nodes`."""
    if isinstance(node, NodeAllocate):
        return node.host, node.port, node.cpus
    if isinstance(node, str):
        if node.startswith('[') or node.count(':') == 1:
            return host_and_port(node, port)
        return (node,)
    if isinstance(node, dict) and 'host' in node:
        if not set(node) - {'host', 'port', 'cpus'}:
            return node['host'], node.get('port'), node.get('cpus')
    if isinstance(node, (tuple, list)):
        if 1 <= len(node) <= 3:
            return node
    raise TypeError(
        "nodes: %.80r is not a host name, ('host', port), ('host', port, cpus) or {'host':, "
        "'port':, 'cpus':}"
        % (node, ))


def _is_one_word(text: Any) -> bool:
    if not isinstance(text, str):
        return False
    if not text:
        return False
    for character in text:
        if character.isspace() or character in ',\0':
            return False
    return True


def _check_host(host: Any, elsewhere: bool) -> str:
    """The host of an element of `nodes`. Raises ValueError."""
    if not _is_one_word(host):
        raise ValueError('nodes: %.80r is not a host; give several hosts as a list' % (host,))
    host = plain_text(host)
    if host == LOCAL:
        raise ValueError(
            'nodes: %r stands alone, not in a list: this machine is %r there, if a dispynode runs '
            'here'
            % (LOCAL, '127.0.0.1'))
    if '*' in host:
        if discovery_reach() == 'off' and not elsewhere:
            raise ValueError("nodes: %r: wildcards need discovery, which the environment's "
                             "DISPY_DISCOVERY "
                             "forbids; name the hosts, or let nodes connect by themselves (host=, "
                             "and "
                             "dispynode --scheduler-host there)" % host)
    return host


# --------------------------------------------------------------------------------------------------
# Journal: what a cluster with a recover_file has submitted, sent and got back
# --------------------------------------------------------------------------------------------------

def check_own_file(path: str, what: str) -> None:
    """Raise DispyError for a file that is there and that others can have written: what is in it may
    be code."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    _check_status(status, path, what)


def _check_status(status: os.stat_result, path: str, what: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise DispyError('%s: %s is not a regular file' % (what, path))
    if hasattr(os, 'geteuid'):
        if status.st_uid != os.geteuid():
            raise DispyError('%s: %s belongs to another user (number %d), who may have put '
                             'anything into it' % (what, path, status.st_uid))
    if os.name == 'nt':
        others = others_who(WRITES, path)
        if others:
            message = ('%s: %s can be written by others (%s): if you know that what is in it is '
                       'yours, run %s' % (what, path, ', '.join(others), private_again(path)))
            raise DispyError(message)
        return
    if not status.st_mode & 0o022:
        return
    message = ('%s: %s can be written by others (mode %03o): if you know that what is in '
               'it is yours, chmod 600 %s' % (what, path, stat.S_IMODE(status.st_mode), path))
    raise DispyError(message)


def open_own_file(path: str, what: str, flags: int = 0, make: bool = True) -> int:
    """Open a file of this user's for reading and writing, or `make` it; no link of anybody's is
    followed. Returns the descriptor. Raises DispyError, OSError."""
    flags |= os.O_RDWR
    if make:
        flags |= os.O_CREAT
    for name in ('O_NOFOLLOW', 'O_NONBLOCK', 'O_BINARY'):   # as far as this system has them
        flags |= getattr(os, name, 0)
    check_own_file(path, what)
    is_new = make and not os.path.exists(path)
    handle = os.open(path, flags, 0o600)
    try:
        if is_new:
            keep_private(path)
        _check_status(os.fstat(handle), path, what)
    except BaseException:
        os.close(handle)
        raise
    return handle


def own_process() -> Tuple[str, int, str]:
    """This process for others on the same machine, who may ask whether it has ended: machine, PID,
    when it began."""
    return _machine(), os.getpid(), start_of(os.getpid())


def has_ended(process: Tuple[str, int, str]) -> Optional[bool]:
    """Whether a process of this machine, as of `own_process`, has ended. None if that cannot be
    known: it is of another machine or another container."""
    machine, pid, start = process
    if not start:
        return None
    if machine != _machine():
        return None
    return start_of(pid, zombie=False) != start


@functools.lru_cache(maxsize=None)
def _machine() -> str:
    """This machine, since it was started; of containers each is one of its own."""
    try:
        return '%s %s' % (machine(), os.readlink('/proc/self/ns/pid'))
    except OSError:   # no Linux
        return '%x %s' % (uuid.getnode(), socket.gethostname())


class Database:
    """A SQLite file in WAL mode, held by one process at a time. What happens is noted, and written
    in one transaction a turn, statement after statement in the order of STATEMENTS."""
    MARK = VERSION = 0         # SQLite's application_id and user_version
    TABLES = ''
    STATEMENTS: Sequence[str] = ()
    # What a transaction wrote outlives the process; a power cut may cost the last of them
    SYNC = 'NORMAL'

    def __init__(self, path: str, what: str) -> None:
        """Raises DispyError for a file that is in use, or none of ours; OSError. `what` is its name
        for people."""
        self.path = os.path.abspath(path)
        self._what = what
        if os.path.islink(self.path) and hasattr(os, 'geteuid'):
            owner = os.lstat(self.path).st_uid
            if owner in (0, os.geteuid()):
                self.path = os.path.realpath(self.path)   # the user's own link, or the system's
        self._notes: List[List[tuple]] = [[] for _ in self.STATEMENTS]
        self.broken = False    # the last transaction failed; its notes are still here
        import sqlite3   # 10 ms that only those pay who need it
        self._error = sqlite3.Error
        try:
            for end in ('-wal', '-shm', '-journal'):
                check_own_file(self.path + end, what)
            os.close(open_own_file(self.path, what))
        except OSError as exc:
            message = '%s cannot be opened: %s' % (what, exc.strerror)
            raise OSError(exc.errno, message, self.path) from None
        self._db = sqlite3.connect(self.path,
                                   timeout=0,
                                   isolation_level=None,
                                   check_same_thread=False)
        try:
            self._open()
        except sqlite3.Error as exc:
            self._db.close()
            if 'locked' in str(exc):
                raise DispyError('%s %s is in use by another program' % (what, path)) from exc
            raise DispyError(
                '%s %s cannot be used: %s; if it is not a file of dispy or is damaged, move it '
                'away' %
                (what, path, exc)) from exc
        except UnicodeError as exc:   # an error text of SQLite with bytes of a file that is damaged
            self._db.close()
            raise DispyError('%s %s is damaged: move it away' % (what, path)) from exc
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> None:
        run = self._db.execute
        run('PRAGMA locking_mode=EXCLUSIVE')
        run('PRAGMA journal_mode=WAL')
        run('PRAGMA synchronous=%s' % self.SYNC)
        mark = run('PRAGMA application_id').fetchone()[0]
        version = run('PRAGMA user_version').fetchone()[0]
        run('BEGIN EXCLUSIVE')
        if not run('SELECT count(*) FROM sqlite_master').fetchone()[0]:
            for statement in self.TABLES.split(';'):
                run(statement)
            run('PRAGMA application_id=%d' % self.MARK)
            run('PRAGMA user_version=%d' % self.VERSION)
        elif mark != self.MARK or version != self.VERSION:
            run('ROLLBACK')
            message = '%s %s is %s: give another, or move it away' % (
                self._what, self.path, 'of version %d and this dispy knows %d' %
                (version, self.VERSION) if mark == self.MARK else 'no file of dispy')
            raise DispyError(message)
        run('COMMIT')

    @contextlib.contextmanager
    def damages(self) -> Iterator[None]:
        """What is read within this may be damaged: whatever is raised then becomes a DispyError,
        and the file is left alone."""
        try:
            yield
        except OSError:
            raise
        except Exception as exc:  # of SQLite, pickle, struct, enums: by the bytes that are wrong
            if isinstance(exc, DispyError):
                if not isinstance(exc, PeerError):
                    raise
            message = '%s %s is damaged (%s: %s); nothing in it was changed: move it away' % (
                self._what, self.path, type(exc).__name__, exc)
            raise DispyError(message) from exc

    def note(self, statement: int, *row: Any) -> None:
        """A row for a statement of the next transaction."""
        self._notes[statement].append(row)

    def commit(self) -> bool:
        """Write all that was noted; whether that went well. A failure is told once, and tried again
        with the next."""
        if not any(self._notes):
            return True
        try:
            self._write(range(len(self.STATEMENTS)))
        except self._error as exc:
            return self._failed(exc)
        except Exception as exc:  # a row that can never be written; without it the others can
            self._drop_unfit(exc)
            return self.commit()
        if self.broken:
            logger.info('%s %s can be written again', self._what, self.path)
        self.broken = False
        for rows in self._notes:
            rows.clear()
        return True

    def _write(self, statements: Sequence[int]) -> None:
        """The rows of some statements in one transaction, all or none of them."""
        try:
            self._db.execute('BEGIN')
            for number in statements:
                if self._notes[number]:
                    self._db.executemany(self.STATEMENTS[number], self._notes[number])
            self._db.execute('COMMIT')
        except BaseException:
            if self._db.in_transaction:
                self._db.execute('ROLLBACK')
            raise

    def _drop_unfit(self, exc: Exception) -> None:
        """Forget the rows that SQLite does not take, such as of texts that are not Unicode. At
        least one goes."""
        logger.error('%s %s: a row cannot be written and is left out: %s', self._what, self.path,
                     exc)
        for number, rows in enumerate(self._notes):
            fit = []
            for row in rows:
                try:
                    message = 'SELECT %s' % ', '.join('?' * len(row))
                    self._db.execute(message, row)
                except self._error:
                    fit.append(row)   # of the file, not of the row
                except Exception:  # of this row: UnicodeEncodeError, OverflowError
                    continue
                else:
                    fit.append(row)
            is_last = number == len(self._notes) - 1
            # Nothing was found: better without them than never again
            if rows and len(fit) == len(rows):
                if is_last and not any(self._notes[:number]):
                    fit = []
            self._notes[number] = fit

    def _failed(self, exc: Exception) -> bool:
        if not self.broken:
            logger.error('%s %s cannot be written: %s', self._what, self.path, exc)
        self.broken = True
        return False


def _is_end(found: Any) -> bool:
    """Whether an object is what a Journal says of a job that has ended: a text, or most of a row of
    Results."""
    if isinstance(found, str):
        return True
    if found is None:
        return False
    if len(found) != 6:
        return False
    return is_outcome(*found)


class Journal(Database):
    """A row a job; and beside the file, in FILE-new, the jobs whose rows are not in a transaction
    yet: `submit` itself writes them there, so that a job is not lost that it has returned. The loop
    commits what happened in a turn before anything of the turn is sent. No secret is in it.

    A job is known by its number, which is its serial without the attempt. What it holds is pickled:
    arguments and results as they travel, and the user's ids; it is opened only by the user's
    program.
    """
    MARK = 0x64735035
    VERSION = 3
    WAITING, SENT, ENDED = range(3)
    TRIM = 1 << 20             # bytes after which FILE-new is emptied when it may be
    TABLES = """
        CREATE TABLE comps (comp TEXT PRIMARY KEY, name TEXT, reentrant INTEGER, program INTEGER,
            host TEXT, key BLOB);
        CREATE TABLE jobs (number INTEGER PRIMARY KEY, comp TEXT, id BLOB, payload BLOB,
            options BLOB, submitted REAL, arguments TEXT, state INTEGER, serial INTEGER,
            node TEXT, status INTEGER, result BLOB, delivered INTEGER DEFAULT 0);
        """
    # Values that jobs which have not ended have in their arguments; each is here once.
    VALUES = 'CREATE TABLE IF NOT EXISTS vals (digest BLOB PRIMARY KEY, data BLOB)'
    # Second attempts of jobs that run, and the directories of their files
    SECONDS = ('CREATE TABLE IF NOT EXISTS seconds (number INTEGER PRIMARY KEY, serial INTEGER, '
               'node TEXT, files TEXT)')
    INSERT, RENAME, MOVE, END, FREE, VALUE, SECOND, SECOND_OVER = range(8)
    STATEMENTS = (
        'INSERT OR IGNORE INTO jobs (number, comp, id, payload, options, submitted, arguments, '
        'state) VALUES (?, ?, ?, ?, ?, ?, ?, ?)',
        'UPDATE jobs SET id = ? WHERE number = ?',
        'UPDATE jobs SET comp = ?, state = ?, serial = ?, node = ? WHERE number = ?',
        'UPDATE jobs SET state = ?, status = ?, result = ?, payload = NULL WHERE number = ?',
        'DELETE FROM vals WHERE digest = ?', 'INSERT OR IGNORE INTO vals VALUES (?, ?)',
        'INSERT OR REPLACE INTO seconds VALUES (?, ?, ?, ?)',
        'DELETE FROM seconds WHERE number = ? AND serial = ?')
    NEW_MARK = b'dispy5n\2'     # begins FILE-new
    # INSERT or RENAME, number, submitted, lengths of id, payload, options and arguments
    _HEAD = struct.Struct('>BQdIIII')
    _LOG = RecordLog(_HEAD, 4)

    def __init__(self, path: str, must_exist: bool = False) -> None:
        """As Database; FileNotFoundError if it must be there."""
        if must_exist and not os.path.exists(path):
            message = 'recover_file: there is no file %s (in %s)' % (path, os.getcwd())
            raise FileNotFoundError(message)
        # What is in FILE-new and not noted, by any thread: pairs of a statement and its row
        self._rows: Deque[Tuple[int, tuple]] = collections.deque()
        self._guard = threading.Lock()           # guards FILE-new, and what it is behind
        self.last = 0                            # number of a job
        # Rows that came into FILE-new, that were noted, that are in the database
        self._added = self._noted = self._committed = 0
        # Digest of a value -> how many jobs that have not ended need it; and those that are written
        self._needed: 'collections.Counter[bytes]' = collections.Counter()
        self._written: Set[bytes] = set()
        super().__init__(path, 'recover_file')
        self._new = -1
        try:
            self._new = open_own_file(self.path + '-new', 'recover_file', os.O_APPEND)
            self._check_new()
            with self.damages():
                self._db.execute(self.VALUES)
                self._db.execute(self.SECONDS)
                self._take_new()
        except BaseException:
            self._db.close()
            if self._new >= 0:
                os.close(self._new)
            raise

    def _check_new(self) -> None:
        """FILE-new is ours if it begins so, or was made now. Raises DispyError for a file of the
        user's, which is left alone."""
        os.lseek(self._new, 0, os.SEEK_SET)   # what is written is added at the end all the same
        head = os.read(self._new, len(self.NEW_MARK))
        # Made now, or torn when it was made
        if len(head) < len(self.NEW_MARK) and self.NEW_MARK.startswith(head):
            os.ftruncate(self._new, 0)
            os.write(self._new, self.NEW_MARK)
        elif head != self.NEW_MARK:
            raise DispyError(
                'recover_file: %s-new is not a file of dispy: give another name'
                % self.path)

    def _take_new(self) -> None:
        """Jobs that had been submitted and were in no transaction when the program ended; a torn
        one was never returned."""
        with open(self.path + '-new', 'rb') as file:
            file.seek(len(self.NEW_MARK))
            contents = self._LOG.read(file)
            for (kind, number, submitted), parts, _ in contents:
                ident, payload, options, arguments = parts
                if kind == self.VALUE:
                    self._add(kind, (ident, payload))
                    continue
                row = (number, '', ident, payload, options, submitted, arguments.decode(),
                       self.WAITING)
                self._add(kind, row if kind == self.INSERT else (ident, number))
        if self.commit():
            os.ftruncate(self._new, len(self.NEW_MARK))
        cursor = self._db.execute('SELECT coalesce(max(number), 0) FROM jobs')
        self.last = cursor.fetchone()[0]

    def _add(self, statement: int, row: tuple) -> None:
        self._rows.append((statement, row))
        self._added += 1

    # -- while a cluster runs ----------------------------------------------------------------------

    def begin(self,
              comp: str,
              name: str,
              reentrant: bool,
              program: bool,
              host: Optional[Tuple[str, int]],
              key: bytes = b'') -> None:
        """A computation whose jobs come now."""
        with self.damages():
            self._db.execute(
                'INSERT OR REPLACE INTO comps VALUES (?, ?, ?, ?, ?, ?)',
                (comp, name, reentrant, program, '%s:%d' % host if host else None, key))

    def submitted(self, job: KeptJob) -> None:
        """A job, before `submit` returns; gives it its number. The user's thread, with the
        cluster's lock held. Raises OSError, and what pickling its id raises; the job is not
        submitted then."""
        number = self.last + 1
        ident = pickle.dumps(job.id)
        payload = in_one_piece(job.payload)
        plain = {}
        for name, value in (job.options or {}).items():
            if name != 'repeats':
                plain[name] = value
        if plain:
            options = pickle.dumps(plain)
        else:
            options = b''
        arguments = job.arguments.encode('utf-8', 'replace')
        with self._guard:
            if type(job.payload) is SharedPayload:
                self._keep_values(job.payload.values)
            self._append(self.INSERT, number, job.submit_time, ident, payload, options, arguments)
            row = (number, job.comp, ident, payload, options, job.submit_time, arguments.decode(),
                   self.WAITING)
            self._add(self.INSERT, row)
        self.last = number
        job.serial = serial_of(number)
        job.journal = self

    def _keep_values(self, values: Sequence[Value]) -> None:
        """Values come before the first job that needs them. With `_guard` held. Raises OSError."""
        for value in values:
            if value.digest not in self._written:
                self._append(self.VALUE, 0, 0.0, value.digest, value.data)
                self._add(self.VALUE, (value.digest, value.data))
                self._written.add(value.digest)
        self._needed.update(value.digest for value in values)

    def _free_values(self) -> None:
        """Note that those go that no job needs."""
        with self._guard:
            free = {digest for digest in self._written if not self._needed.get(digest)}
            self._written -= free
        for digest in free:
            self.note(self.FREE, digest)

    def renamed(self, job: KeptJob) -> None:
        """A job has got another id. What cannot be pickled is told, and then the one before
        counts. Any thread."""
        try:
            ident = pickle.dumps(job.id)
        except Exception as exc:  # of the user's object
            logger.warning('the id %.80r of a job cannot be written into the recover_file: %s',
                           job.id, exc)
            return
        with self._guard:
            if self._new >= 0:   # otherwise it is closed
                try:
                    number = job_number(job.serial)
                    self._append(self.RENAME, number, 0.0, ident)
                except OSError as exc:   # no room; `commit` tells that
                    logger.debug('the id of a job will be written later: %s', exc)
                row = (ident, job_number(job.serial))
                self._add(self.RENAME, row)

    def _append(self, kind: int, number: int, submitted: float, *parts: Any) -> None:
        """A record into FILE-new, whole or not at all. With `_guard` held. Raises OSError."""
        part_lengths = [len(part) for part in parts]
        sizes = part_lengths + [0] * (4 - len(parts))
        head = self._HEAD.pack(kind, number, submitted, *sizes)
        record = self._LOG.record(head, parts)
        data = memoryview(b''.join(record))
        start = os.fstat(self._new).st_size
        try:
            while data:
                data = data[os.write(self._new, data):]
        except OSError:
            os.ftruncate(self._new, start)   # what comes behind a torn one is not found
            raise

    def sent(self, works: Sequence[ScheduledJob], node: str, memory: str = '') -> None:
        """Jobs on their way to a node, and what its memory is known by."""
        where = '%s#%s' % (node, memory[:8])
        for work in works:
            self.note(self.MOVE, work.comp, self.SENT, work.serial, where, job_number(work.serial))

    def second_sent(self, second: SecondAttempt, node: str, memory: str, files: str) -> None:
        """A second attempt is on its way to a node; the directory is where its files are kept."""
        where = '%s#%s' % (node, memory[:8])
        self.note(self.SECOND, job_number(second.serial), second.serial, where, files)

    def second_over(self, second: SecondAttempt) -> None:
        """A second attempt counts no more, or is that of its job."""
        self.note(self.SECOND_OVER, job_number(second.serial), second.serial)

    def seconds(self) -> Dict[int, Tuple[int, str, str]]:
        """Number of a job that was sent -> serial, node and directory of its second attempt. Raises
        DispyError for a file that is damaged."""
        with self.damages():
            rows = self._db.execute(
                'SELECT number, serial, node, files FROM seconds WHERE number IN '
                '(SELECT number FROM jobs WHERE state = ?)', (self.SENT, )).fetchall()
        return {number: (serial, node, files) for number, serial, node, files in rows}

    def waits(self, work: ScheduledJob) -> None:
        """It came back without having been started, or may be run again."""
        self.note(self.MOVE, work.comp, self.WAITING, work.serial, None, job_number(work.serial))

    def ended(self, work: ScheduledJob, result: Any) -> None:
        """A row of Results, or the text of one that ended without. A result that is too large for
        the file is known until this program ends, and not to the next."""
        state = work.state
        if not isinstance(result, str) and size_of(result[4]) > JOURNAL_MOST:
            size = size_of(result[4])
            text = ('its result of %d bytes was not kept in the recovery file, whose '
                    'limit is %d' % (size, JOURNAL_MOST))
            state = JobState.TERMINATED
            result = (result[0], int(Outcome.RAISED), *result[2:4], pack_error(text,
                                                                               None), *result[5:])
        self._needs_no_more(work)
        if isinstance(result, str):
            plain: Any = result
        else:
            plain = (*result[1:4], *map(in_one_piece, result[4:]))
        self.note(self.END, self.ENDED, int(state), pickle.dumps(plain, 5), job_number(work.serial))

    def _needs_no_more(self, work: ScheduledJob) -> None:
        """Forget what a job needs, which has ended."""
        if work.options:
            rows = work.options.get('values', ())
        else:
            rows = ()
        with self._guard:
            for _, digest in rows:
                self._needed[digest] -= 1
                if self._needed[digest] <= 0:
                    del self._needed[digest]

    def commit(self) -> bool:
        """As Database, with what was submitted."""
        if len(self._written) > len(self._needed):
            self._free_values()
        while self._rows:
            statement, row = self._rows.popleft()
            self.note(statement, *row)
            self._noted += 1
        done = super().commit()
        if done:
            self._committed = self._noted
        return done

    def trim(self) -> None:
        """Empty FILE-new if all in it is in the database. Any thread."""
        with self._guard:
            if self._committed == self._added:
                status = os.fstat(self._new)
                if status.st_size > self.TRIM:
                    os.ftruncate(self._new, len(self.NEW_MARK))

    # -- after a crash -----------------------------------------------------------------------------

    def comps(self) -> List[tuple]:
        """Rows (comp, name, reentrant, program, host, key) of computations of which nodes may have
        something."""
        return self._db.execute(
            'SELECT * FROM comps WHERE comp IN (SELECT comp FROM jobs WHERE node IS NOT NULL)'
        ).fetchall()

    def holders(self) -> Set[str]:
        """Nodes that may keep results which have been noted: that they need not was perhaps not
        said any more."""
        rows = self._db.execute(
            'SELECT DISTINCT node FROM jobs WHERE state = ? AND node IS NOT NULL AND NOT delivered',
            (self.ENDED, ))
        return {node.rpartition('#')[0] for node, in rows}

    def is_program(self) -> bool:
        """Whether the jobs are runs of a program."""
        cursor = self._db.execute('SELECT max(program) FROM comps')
        return bool(cursor.fetchone()[0])

    def known(self) -> List[Tuple[KeptJob, int, str, Any]]:
        """All of `jobs`. Raises DispyError for a file that is damaged."""
        with self.damages():
            found = list(self.jobs())
            self._written.update(digest for digest, in self._db.execute('SELECT digest FROM vals'))
        return found

    def jobs(self) -> Iterator[Tuple[KeptJob, int, str, Any]]:
        """(job, state, node, result) of all jobs that have not been handed to the user since a
        crash."""
        cursor = self._db.execute(
            'SELECT number, comp, id, payload, options, submitted, arguments, state, '
            'serial, node, status, result FROM jobs WHERE NOT delivered')
        # All at once: a cursor in the frames of an error would keep the file locked
        for (number, comp, ident, payload, options, submitted, arguments, state, serial, node,
             status, result) in cursor.fetchall():
            if options:
                known = pickle.loads(options)
            else:
                known = None
            if known and payload is not None:
                if 'values' in known:
                    payload = self._with_values(payload, known['values'])
            job = KeptJob(comp, payload, known, pickle.loads(ident), arguments)
            job.serial = serial or serial_of(number)
            job.submit_time = submitted
            if result:
                found = pickle.loads(result)
            else:
                found = None
            if state == self.ENDED:
                job.state = JobState(status)
                if not _is_end(found):
                    raise ValueError('job %d has no result' % number)
            elif state not in (self.WAITING, self.SENT) or not isinstance(payload, bytes):
                raise ValueError('job %d is in no state' % number)
            yield job, state, node or '', found

    def _with_values(self, payload: bytes, rows: Sequence[Tuple[int, bytes]]) -> SharedPayload:
        """Arguments of a job that has not ended, with their values. Raises ValueError if one is not
        here."""
        values = []
        for size, digest in rows:
            value = shared_values.find(digest)
            if value is None:
                cursor = self._db.execute('SELECT data FROM vals WHERE digest = ?', (digest, ))
                found = cursor.fetchone()
                if found is None or len(found[0]) != size:
                    raise ValueError('a value of %d bytes is not there' % size)
                value = shared_values.adopt(digest, found[0])
            values.append(value)
        with self._guard:
            self._needed.update(value.digest for value in values)
        return SharedValues.with_values(payload, values)

    def delivered(self, jobs: Sequence[DispyJob]) -> None:
        """These were handed to the user; not again."""
        with self.damages():
            self._db.execute('BEGIN')
            self._db.executemany('UPDATE jobs SET delivered = 1, result = NULL WHERE number = ?',
                                 [(job_number(job.serial), ) for job in jobs])
            self._db.execute('COMMIT')

    def close(self, remove: bool = False) -> None:
        """Let go of the file; with `remove`, or if no job is left in it, remove it. One that is
        damaged is left alone."""
        left = 1
        try:
            self.commit()
            cursor = self._db.execute('SELECT count(*) FROM jobs WHERE NOT delivered')
            left = cursor.fetchone()[0]
        except self._error as exc:
            logger.error('recover_file %s cannot be read any more: %s', self.path, exc)
        self._db.close()
        with self._guard:
            os.close(self._new)
            self._new = -1
        if remove or not left:
            # Alone, FILE-new would be taken for new jobs
            paths = [self.path + end for end in ('-new', '', '-wal', '-shm')]
            for path in paths + BegunNotes.all_of(self):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)


class BegunNotes:
    """Which attempts of a computation had begun in the node that was a part of a program, when that
    was killed: in FILE-begun-COMPUTATION beside the recover_file. While the program runs, the
    computation's directory stands there. When it is killed the runner, which has seen what began,
    replaces that by the attempts, before it removes the directory.

    A runner that is killed as well leaves no notes, and then all that was sent may have begun.
    """
    PATIENCE = 5.0      # s that a runner may take to end workers, and to write
    EVERY = 0.02        # s between two looks

    @staticmethod
    def path_of(journal: Journal, comp: str) -> str:
        """Where they are."""
        return '%s-begun-%s' % (journal.path, comp)

    @classmethod
    def all_of(cls, journal: Journal) -> List[str]:
        """Those of all computations of a recover_file."""
        start = cls.path_of(journal, '')
        directory = os.path.dirname(start)
        paths = [os.path.join(directory, name) for name in os.listdir(directory)]
        return [path for path in paths if path.startswith(start) and is_comp(path[len(start):])]

    @classmethod
    def begin(cls, journal: Journal, comp: str, directory: str) -> str:
        """Jobs of a computation are sent from now on. Returns the path. Raises OSError."""
        path = cls.path_of(journal, comp)
        with open(open_own_file(path, 'recover_file', os.O_TRUNC), 'w') as file:
            json.dump({'directory': directory}, file)
        return path

    @classmethod
    def wait(cls, journal: Journal, comp: str) -> AttemptHistory:
        """What is known of a computation when its runner has ended. An opener."""
        path = cls.path_of(journal, comp)
        until = time.monotonic() + cls.PATIENCE
        found: Any = {}
        is_last = False
        try:
            while True:
                with open_regular(path) as file:
                    found = json.load(file)
                if 'directory' not in found or is_last:
                    break
                # What it has written before its directory went may be newer than what was read
                is_there = os.path.isdir(found['directory'])
                is_last = not is_there or time.monotonic() > until
                if not is_last:
                    time.sleep(cls.EVERY)
        except (OSError, ValueError, TypeError) as exc:   # as a rule there is no such file
            logger.debug('nobody knows what had begun: %s', exc)
        unknown = AttemptHistory(whole=False)
        if not isinstance(found, dict):
            return unknown
        begun = found.get('begun')
        if type(begun) is not list:
            return unknown
        if not all(type(serial) is int for serial in begun):
            return unknown
        return AttemptHistory(lost=frozenset(begun))


# --------------------------------------------------------------------------------------------------
# Trail: the small file by which what a program leaves on nodes is found when it ends before its
# jobs
# --------------------------------------------------------------------------------------------------

TRAIL_END = '.recover'        # ends the names of these files
TRAIL_MARK = b'{"dispy": '    # begins what is in them
TRAIL_KEPT = 30 * 86400.0     # s after which one is removed, whatever it says
TRAIL_MOST = 1 << 20          # bytes of one that are read: 20,000 nodes
REACH_TIME = 10.0             # s for which nodes are tried that a dead program had
CANCEL_LOST = '`python -m dispy --cancel-lost`'


def state_directory() -> str:
    """Where files of this user lie that outlive a program."""
    if os.name == 'nt':
        localappdata = os.environ.get('LOCALAPPDATA')
        base = localappdata or os.path.expanduser('~')
    elif os.environ.get('XDG_STATE_HOME'):
        base = os.environ['XDG_STATE_HOME']
    elif sys.platform == 'darwin':
        expanded_path = os.path.expanduser('~')
        base = os.path.join(expanded_path, 'Library', 'Application Support')
    else:
        base = os.path.join(os.path.expanduser('~'), '.local', 'state')
    return os.path.join(base, 'dispy')


def _make_state_directory() -> str:
    """The same, made if need be. Raises DispyError, OSError."""
    path = state_directory()
    if not has_place(path):
        raise DispyError('this user has no home')
    os.makedirs(path, mode=0o700, exist_ok=True)
    status = os.stat(path)
    if hasattr(os, 'geteuid'):
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise DispyError(
                'the directory %s belongs to another user, or others can write into it' % path)
    return path


def own_script() -> str:
    """The path of the program that runs here; empty at a prompt and with `python -c`. It is not
    known any more when the program has come to its end."""
    module = sys.modules.get('__main__')
    path = getattr(module, '__file__', None)
    if isinstance(path, str):
        return path
    return ''


class ComputationNotes:
    """The file of one cluster: whose jobs they are, the key by which nodes give their results, and
    after that a line for each node that may have some. Made with the first such node, so that a
    cluster without one has none; locked while the program lives; removed when the cluster is
    closed. Nothing is written for a job. The driver's thread."""

    def __init__(self, head: 'weakref.WeakMethod[Any]', name: str, comp: str) -> None:
        self._head = head
        self._name = name
        self._comp = comp
        self.script = own_script()
        self._file: Any = None
        self._places: Set[str] = set()
        self._told = False
        self.path = ''         # while there is one

    def add(self, place: str) -> bool:
        """A node is about to get jobs. Whether the file was made now."""
        if place in self._places:
            return False
        self._places.add(place)
        is_new = self._file is None
        try:
            data = (self._make() if is_new else b'') + b'\n' + json.dumps(place).encode()
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, 'no room for it on the disk')
        except (OSError, DispyError) as exc:
            if not self._told:
                logger.info(
                    '%s: its results could not be collected if this program ended before its jobs, '
                    'because no file can be kept for that: %s', self._name, exc)
            self._told = True
            if is_new:
                self.close()
            return False
        return is_new

    def _make(self) -> bytes:
        """Raises OSError, DispyError."""
        path = os.path.join(_make_state_directory(), '%s-%s%s' % (
            time.strftime('%Y%m%d-%H%M%S'), self._comp[:12], TRAIL_END))
        own_file = open_own_file(path, 'recovery file', os.O_APPEND)
        self._file = os.fdopen(own_file, 'ab', 0)
        self.path = path
        lock_file(self._file)
        if self.script:
            script = os.path.realpath(self.script)
        else:
            script = ''
        describe = self._head()   # a method of the cluster, which must not be kept alive by that
        if describe is not None:
            head = describe()
        else:
            head = {}
        dumped = json.dumps(dict(head, script=script))
        return dumped.encode()

    def end(self, untold: Set[str]) -> None:
        """The cluster is closed. If some nodes could not be told so, the file stays, so that they
        are told when somebody looks for what programs have left."""
        is_needed = self._file is not None and not self._places.isdisjoint(untold)
        if is_needed:
            try:
                self._file.write(OVER_LINE)
            except OSError as exc:
                logger.info('%s cannot be written: %s', self.path, exc)
        self.close(remove=not is_needed)

    def leave(self, untold: Set[str]) -> None:
        """A cluster that had a recovery file, and no other one, is closed: the same."""
        for place in sorted(untold):
            self.add(place)
        self.end(untold)

    def close(self, remove: bool = True) -> None:
        """Let go of the file. Without `remove` it says that nodes may have something."""
        file = self._file
        path = self.path
        self._file = None
        self.path = ''
        if file is not None:
            _close_trail(file, path, remove)

    def after_fork(self) -> None:
        """In a forked child: the lock is the parent's, and ends with that."""
        self.close(remove=False)


# In a trail: nobody wants what the nodes have, which could not be told so
_OVER = {'over': True}
OVER_LINE = b'\n' + json.dumps(_OVER).encode()


def _close_trail(file: Any, path: str, remove: bool) -> None:
    if remove and os.name == 'nt':   # what is open cannot be removed there
        file.close()
    if remove:
        try:
            os.unlink(path)
        except OSError as exc:
            if exc.errno != errno.ENOENT:   # otherwise somebody else has removed it
                logger.info('%s cannot be removed: %s', path, exc)
    file.close()


class _RecoverableFields(NamedTuple):
    path: str
    name: str
    script: str
    host: str
    pid: int
    began: float
    code: str
    nodes: Tuple[str, ...]
    jobs: Optional[int] = None
    unreached: Tuple[str, ...] = ()


class Recoverable(_RecoverableFields, metaclass=Listed):
    """A cluster without `recover_file` whose program has ended before its jobs. `recover_jobs`
    takes it, or its `path`.

    path - of the file that says so; name - of the computation; script - path of the program, empty
        for a prompt; host, pid - where and with which number it ran; began - when the cluster was
        made, seconds since the epoch
    code - the digest of its code; nodes - that may have something of it, as HOST:PORT, with @
        before a scheduler
    jobs - how many jobs and results of it they say they have; None if none of them has answered
    unreached - those that have not answered
    """
    __slots__ = ()

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        if self.jobs is None:
            count = ''
        else:
            count = ', %d jobs' % self.jobs
        file_name = os.path.basename(self.script)
        moment = _moment(self.began)
        return '%s (%s) of %s%s: %s' % (file_name
                                        or 'a prompt', self.name, moment, count, self.path)


def _moment(seconds: float) -> str:
    return time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))


_HEAD_KINDS: Dict[str, Any] = {
    'dispy': int, 'comp': str, 'key': str, 'code': str, 'name': str, 'script': str, 'host': str,
    'pid': int, 'process': list, 'began': float, 'program': bool, 'listen': str}


class RecoverableFiles:
    """A trail of a program that has ended, with its lock, which keeps others off until `close`."""

    def __init__(self, file: Any, path: str, head: Dict[str, Any], places: Sequence[str],
                 over: bool) -> None:
        self._file = file
        self.path = path
        self.over = over        # its results are told, or nobody wants them
        self.places = tuple(places)
        self.comp, self.key = head['comp'], bytes.fromhex(head['key'])
        self.is_program = head['program']
        self.listen = head['listen']
        self.files = str(head.get('files', ''))    # below which the files of jobs come
        self.process = tuple(head['process'])
        nodes = tuple(where.strip() for where in self.places)
        self.row = Recoverable(path, head['name'], head['script'], head['host'], head['pid'],
                               head['began'], head['code'], nodes)

    def note_over(self) -> None:
        """Its results are told; nodes that could not be told so may have them still."""
        try:
            file = open_own_file(self.path, 'recovery file', os.O_APPEND, make=False)
            with os.fdopen(file, 'ab', 0) as end:
                end.write(OVER_LINE)
        except (OSError, DispyError) as exc:
            logger.info('%s cannot be written: %s', self.path, exc)

    def close(self, remove: bool = False) -> None:
        """Let go of it; with `remove` nothing is left of it on the nodes."""
        file = self._file
        self._file = None
        if file is not None:
            _close_trail(file, self.path, remove)

    @classmethod
    def find(cls, path: str) -> Optional['RecoverableFiles']:
        """What such a file says; None if its program lives, or another collects it. What is old,
        or says nothing of any node, is removed. Raises DispyError for a file that others can have
        written, or that is damaged; OSError."""
        own_file = open_own_file(path, 'recovery file', make=False)
        file = os.fdopen(own_file, 'rb', 0)
        try:
            lock_file(file)
        except OSError:   # it lives, here or on another host with the same home
            file.close()
            return None
        try:
            file.seek(0)
            lines = file.read(TRAIL_MOST).split(b'\n')
            is_old = time.time() - os.fstat(file.fileno()).st_mtime > TRAIL_KEPT
            head = _json(lines[0])
            if not _is_head(head):
                if not is_old:   # it may be in the making
                    raise DispyError('recovery file %s is damaged, or of another version of dispy'
                                     % path)
                _close_trail(file, path, True)
                return None
            rows = []
            for line in lines[1:]:
                rows.append(_json(line))
            places = []
            for row in rows:
                if isinstance(row, str):
                    places.append(row)
            if _OVER not in rows:
                if has_ended(tuple(head['process'])) is False:
                    file.close()
                    return None
            if is_old or not places:
                _close_trail(file, path, True)
                return None
            sorted_places = sorted(set(places))
            return cls(file, path, head, sorted_places, _OVER in rows)
        except BaseException:
            file.close()
            raise


def _json(line: bytes) -> Any:
    """A line of a trail; None for one that is torn."""
    try:
        return json.loads(line.decode())
    except ValueError:
        return None


def _is_head(head: Any) -> bool:
    if not isinstance(head, dict):
        return False
    if not all(type(head.get(name)) is kind for name, kind in _HEAD_KINDS.items()):
        return False
    if head['dispy'] != 1:
        return False
    if re.fullmatch('[0-9a-f]{64}', head['key']) is None:
        return False
    kinds = []
    for part in head['process']:
        kinds.append(type(part))
    return kinds == [str, int, str]


def _paths_of_trails() -> List[str]:
    try:
        with os.scandir(state_directory()) as entries:
            paths = []
            for entry in entries:
                if entry.name.endswith(TRAIL_END):
                    paths.append(entry.path)
            return sorted(paths)
    except OSError:   # none was ever written
        return []


def programs_left() -> List[RecoverableFiles]:
    """All that dead programs of this user have left, newest first; each is to be closed."""
    found = []
    for path in _paths_of_trails():
        try:
            left = RecoverableFiles.find(path)
        except (OSError, DispyError) as exc:
            logger.debug('passed over: %s', exc)
        else:
            if left is not None:
                found += [left]
    return sorted(found, key=lambda left: left.row.began, reverse=True)


def remove_old_trails() -> None:
    """Done once by a program that makes such a file."""
    for path in _paths_of_trails():
        with contextlib.suppress(OSError, DispyError):
            if time.time() - os.lstat(path).st_mtime > TRAIL_KEPT:
                left = RecoverableFiles.find(path)
                if left is not None:
                    left.close()


def remedy_for_source(spec: dict) -> str:
    """What to do about a computation that does not go to nodes as source."""
    same = 'un dispynode there with %s' % python_of(spec['python'])
    if 'most' in spec:   # of an executor
        return 'R' + same
    return ('Put the function into a file, at its top level, with def, and give it all '
            'that it needs as arguments; or r' + same)


def how_to_share(holder: Holder) -> str:
    """Return what a program can do that wants a node which another process has, to be appended to
    what the node says."""
    if holder.port:
        if holder.port == SCHEDULER_PORT:
            port = ''
        else:
            port = ', scheduler_port=%d' % holder.port
        return ('. That scheduler shares its nodes: use SharedJobCluster(..., '
                'scheduler_host=%r%s)' % (holder.host, port))
    if holder.is_away:
        return ''
    return ('. A node serves one client at a time. For several programs at once '
            'start a dispyscheduler, and use SharedJobCluster')


def who_holds(holder: Holder, place: str) -> str:
    """Return which program of this user it was that has a node and has ended, and what to do about
    it; empty if it is another's, or has not ended. `place` is that of the node."""
    if not holder.is_away:
        return ''
    for left in programs_left():
        left.close()
        row = left.row
        if (row.host, row.pid) != (holder.host, holder.pid):
            continue
        if place in left.places:
            return (': these are jobs of %s (%s), a program of yours that began %s and '
                    'has ended; they run to their end. dispy.recover_jobs() collects '
                    'their results, %s ends them' %
                    (row.script or 'a prompt', row.name, _moment(row.began), CANCEL_LOST))
    return ''


# --------------------------------------------------------------------------------------------------
# Driver: one thread that owns links and Schedule. Its helpers: dial threads, openers, callback
# threads.
# --------------------------------------------------------------------------------------------------

class ConnectionSettings(NamedTuple):
    """How a driver speaks to nodes; clusters with the same share a driver."""
    secret: bytes
    certfile: Optional[str]
    keyfile: Optional[str]
    cafile: Optional[str]
    pulse: float
    redial: float


class Pool:
    """A few daemon threads for what may block. Unlike concurrent.futures' they do not hold up the
    interpreter's exit.

    With `patience`, one thread does all as long as nothing takes longer than so many seconds, and
    others begin, for what waits now, only then: short callbacks are called one after the other, as
    dispy 4 called all of them, and programs whose callbacks share variables without a lock, or
    hold one of its thread, rely on that.
    """

    def __init__(self, name: str, most: int, patience: float = 0.0) -> None:
        self.name = name
        self._most = most
        self._patience = patience
        # Functions with their arguments; None ends a thread
        self._tasks: 'queue.SimpleQueue[Any]' = queue.SimpleQueue()
        self._given = 0             # tasks
        self._guard = threading.Lock()   # guards those below
        self._done = 0              # tasks
        self._count = 0             # threads
        self._looks = False         # a thread looks whether another is needed
        self._closed = False

    def run(self, call: Callable[..., Any], *args: Any) -> None:
        """Call it in one of the threads. One thread only (the driver's)."""
        self._tasks.put((call, args))   # before the look at who is there, see `_help`
        with self._guard:
            self._given += 1
            if self._given - self._done <= self._count:
                return
            if self._count >= self._most:
                return
            if self._looks:
                return
            self._looks = waits = bool(self._patience and self._count)
        if not waits:
            self._begin()
        elif not self._start(self._look, 'look'):
            self._looks = False   # the next task tries again

    def _start(self, target: Callable[[], None], name: str) -> bool:
        """Whether there is a thread to be had."""
        try:
            thread = threading.Thread(target=target, name='%s-%s' % (self.name, name), daemon=True)
            thread.start()
        except RuntimeError:
            return False
        return True

    def _begin(self) -> None:
        """Another thread. If there is none to be had, those that there are do it; raises
        RuntimeError if there are none."""
        with self._guard:   # it may end at once
            self._count += 1
            number = self._count
        if self._patience and number > 1:
            work = self._help
        else:
            work = self._work
        if not self._start(work, str(number)):
            with self._guard:
                self._count -= 1
            if number == 1:
                raise RuntimeError('no thread can be started')

    def _look(self) -> None:
        """While tasks wait: begin another thread when those that there are have got on with
        none."""
        while True:
            done = self._done
            time.sleep(self._patience)
            with self._guard:
                if self._closed or self._tasks.empty() or self._count >= self._most:
                    self._looks = False
                    return
                is_stuck = self._done == done
            if is_stuck:
                self._begin()

    def _work(self) -> None:
        while True:
            task = self._tasks.get()
            if task is None:
                return
            self._do(*task)
            del task

    def _help(self) -> None:
        """As `_work`, until nothing waits."""
        while True:
            with self._guard:   # what `run` puts from here on has somebody else
                if self._closed or self._tasks.empty():
                    self._count -= 1
                    return
            with contextlib.suppress(queue.Empty):
                task = self._tasks.get_nowait()
                if task is None:   # for another thread
                    self._tasks.put(None)
                else:
                    self._do(*task)
                del task

    def _do(self, call: Callable[..., Any], args: tuple) -> None:
        try:
            call(*args)
        except BaseException as exc:
            # The user's callback, sys.exit in it too; the next one is served all the same
            about = ''
            for arg in args:
                if isinstance(arg, DispyJob):
                    about = 'job %.80r' % (arg.id,)
                    break
            report_callback(call, about, exc)
        with self._guard:
            self._done += 1

    def close(self) -> None:
        """Let threads end when they have done what is queued."""
        with self._guard:
            self._closed = True
            if not self._patience:
                count = self._count
            else:
                count = min(self._count, 1)
        for _ in range(count):
            self._tasks.put(None)


_OUR_FILES = frozenset((__file__, dispynode.__file__))


def report_callback(call: Any, about: str, exc: BaseException) -> None:
    """A function of the user's that was called by a thread of ours has raised: log it without
    frames of ours."""
    trace = exc.__traceback__
    func = getattr(call, '__func__', call)
    code = getattr(func, '__code__', None)
    is_ours = getattr(code, 'co_filename', '') in _OUR_FILES
    module = getattr(call, '__module__', None)
    qualname = getattr(call, '__qualname__', None)
    name = qualname or type(call).__qualname__
    if module not in (None, '__main__', 'builtins'):
        name = '%s.%s' % (module, name)
    while not is_ours and trace is not None and trace.tb_frame.f_code.co_filename in _OUR_FILES:
        trace = trace.tb_next
    logger.error('%s %s%s raised %s',
                 'a fault of dispy:' if is_ours else 'the callback',
                 name,
                 about and ' of ' + about,
                 type(exc).__name__,
                 exc_info=(type(exc), exc, trace))


class RunInDriver(NamedTuple):
    """Call this in the driver's thread; posted by `Driver.ask`, who waits for `future`, or by a
    helper, without one."""
    call: Callable[[], Any]
    future: Optional['concurrent.futures.Future[Any]']


class StatusCallback(NamedTuple):
    """Posted for cluster_status: a node or a job has changed."""
    callbacks: 'UserCallbacks'
    status: int
    peer: 'Union[NodeConnection, NodeInfo, None]'
    job: Optional[DispyJob]


class JobCallback(NamedTuple):
    """Posted when a job with a callback has ended."""
    callbacks: 'UserCallbacks'
    job: DispyJob


class NodeInfo(NamedTuple):
    """A node and a cluster as they are told to others."""
    key: Any
    ip_addr: str
    port: int
    name: str
    state: str
    reason: str
    cpus: int      # that the cluster may use
    busy: int      # jobs of the cluster
    offered: int   # CPUs by the node
    facts: dict

    def facts_now(self) -> dict:
        """Return what is known of the node, as a NodeConnection does."""
        return self.facts


def describe_node(peer: 'Union[NodeConnection, NodeInfo]',
                  state: str,
                  reason: str,
                  cpus: int,
                  busy: int,
                  done: int = 0,
                  seconds: float = 0.0) -> DispyNode:
    """A node as users get it."""
    return DispyNode(peer.ip_addr, peer.name, cpus, peer.port, state, reason, peer.offered, busy,
                     done, seconds, peer.facts_now())


class Monitor:
    """Who watches a cluster, see `LiveOutput.add_monitor`. Called by the driver's thread and its
    openers: must be quick."""
    page = ''   # the link to where it shows the cluster

    def failed(self, job: DispyJob, payload: Any) -> None:
        """A job has ended without a result; `payload` are its arguments, packed."""

    def ended(self, jobs: List[Tuple[DispyJob, Any]], peer: Any) -> None:
        """Jobs have ended, each with its packed arguments; `peer` is the node that they were at,
        None if they were at none."""

    def printed(self, job: DispyJob, stream: int, offset: int, data: bytes) -> None:
        """A running job has printed, to stdout (1) or stderr (2), from byte `offset` of it."""


class Outgoing:
    """Jobs of clusters with a journal on their way to nodes: they leave when it has been noted that
    they do. While that cannot be noted they wait again, no more are sent, and results are not
    acknowledged. The driver's thread."""
    AGAIN = 1.0   # s between attempts to write to a disk that was full

    def __init__(self) -> None:
        self.journals: Dict[str, Journal] = {}   # by computation
        self._frames: Dict[str, List[Tuple['NodeConnection', Jobs, List[int]]]] = {}
        self.held_up: Set[str] = set()           # computations whose journals cannot be written

    def has(self, comp: str) -> bool:
        """Whether a computation has a journal."""
        return comp in self.journals

    def add(self, comp: str, peer: 'NodeConnection', frames_: Iterable[Any]) -> None:
        """Frames of jobs for a node."""
        waiting = self._frames.setdefault(comp, [])
        waiting.extend((peer, frame, [row[0] for row in frame.rows]) for frame in frames_)

    def drop(self, peer: 'NodeConnection') -> List[Tuple[str, List[int]]]:
        """The link to a node has ended: computations and serials of what has not left."""
        dropped = []
        for comp, frames_ in self._frames.items():
            dropped += [(comp, serials) for other, _, serials in frames_ if other is peer]
            self._frames[comp] = [row for row in frames_ if row[0] is not peer]
        return dropped

    def forget(self, comp: str) -> None:
        """A computation is over."""
        self.journals.pop(comp, None)
        self._frames.pop(comp, None)
        self.held_up.discard(comp)

    def commit(
        self
    ) -> Tuple[List[Tuple['NodeConnection', Any]], List[Tuple['NodeConnection', str, List[int]]]]:
        """The end of a turn: what may leave now, and what may not, as (node, computation, serials).
        Sets `held_up`."""
        leaving: List[Tuple['NodeConnection', Any]] = []
        staying: List[Tuple['NodeConnection', str, List[int]]] = []
        for comp, journal in self.journals.items():
            written = journal.commit()
            frames_ = self._frames.pop(comp, [])
            if written:
                leaving += [(peer, frame) for peer, frame, _ in frames_]
                self.held_up.discard(comp)
            else:
                staying += [(peer, comp, serials) for peer, _, serials in frames_]
                self.held_up.add(comp)
        return leaving, staying


class NodeAssignment:
    """A node and a cluster. Driver thread only."""
    __slots__ = ('state', 'spec', 'reason', 'allocation', 'wanted', 'acks', 'then', 'told',
                 'passes', 'unloadable', 'seat_told', 'holder_hint')

    def __init__(self, spec: NodeSpec) -> None:
        self.state = AssignmentState.WAITING
        self.spec = spec
        self.reason = ''                             # why it was refused
        self.seat_told = False                       # to who submitted jobs to it
        self.passes = False                          # the reason may pass: it is tried again
        self.allocation: Optional[Allocation] = None   # what the user's NodeAllocate said
        self.wanted: Optional[int] = None            # CPUs by set_node_cpus; 0: deallocated
        self.acks: List[int] = []                    # serials to be acknowledged
        self.then = ''                               # when it has drained: 'close' or 'open'
        self.told: Set[str] = set()                  # reasons that were logged
        # A row of Holder, and what to do about that
        self.holder_hint: Tuple[tuple, str] = ((), '')
        self.unloadable = False                      # the node cannot load the code, and said why

    def move(self, event: str) -> None:
        """The one place where its state changes."""
        self.state = ASSIGNMENT_TABLE[self.state, event]

    @property
    def offered(self) -> bool:
        """Whether the node has been told of the computation."""
        return self.state in (AssignmentState.SETTING_UP, AssignmentState.READY)


class NodeConnection:
    """A node as the driver sees it. Driver thread only."""

    def __init__(self,
                 host: str,
                 port: int,
                 redial: float = REDIAL_MOST,
                 listed: bool = False,
                 embedded: bool = False,
                 scheduler: bool = False) -> None:
        self.host = host
        self.port = port
        self.embedded = embedded
        self.scheduler = scheduler
        # Named by the user, not found; kept while it cannot be reached
        self.listed = listed
        # Looked for on this machine, where nobody has said that it is
        self.probed = False
        if embedded:
            self.key: Any = LOCAL
        elif scheduler:
            self.key = ('scheduler', host, port)
        else:
            self.key = (host, port)
        self.state = NodeState.FOUND
        self.link: Optional[Link] = None
        self.linked_at = 0.0
        self.trip = 0.0                            # s from ClientHello to NodeHello
        self.instance = b''
        # It could not use what was sent: it is not reached again at once
        self.wrong = False
        # Another process than before; told when it says NodeHello
        self.restarted = False
        # What its memory is known by, see dispynode.Memory
        self.memory = ''
        self.aliases: Set[str] = set()             # places of other names that it was dialled by
        # Its memory is the one that was there when jobs were sent
        self.whole = True
        self.second = SecondConnection(self)                 # connection, while the first is silent
        self.replacing = False                     # the first is being replaced by it
        self.lost_at: Optional[float] = None   # when its link ended, until it is connected again
        self.name = ''
        self.ip_addr = host
        self.facts: Dict[str, Any] = {}
        # What the schedule's jobs have of its resources there
        self.taken: Dict[str, int] = {}
        self.offered = 0
        self.reason = 'not reached yet'
        self.unreached = Unreached.UNREACHABLE     # what came of the last attempt that failed
        # Bytes that packets may carry; 0: as many as the system says
        self.segment = 0
        self.dialling = Reconnector(REDIAL_FIRST, redial)
        self.failures = 0                          # in a row
        self.heard = 0.0                           # when it was last found by UDP
        # Of links before this one
        self.tx = 0
        self.rx = 0
        self.heard_last = 0.0
        self.retry_at: Optional[float] = None
        self.retry_wait = RETRY_FIRST
        self.told: Set[Any] = set()                # reasons that were logged: Failing, or texts
        self.uses: Dict[str, NodeAssignment] = {}             # computation -> use
        # Computations that wait here for another that wants the node alone
        self.blocked: Set[str] = set()
        # CPUs of it that each computation may use at most: who runs a scheduler decides
        self.most = sys.maxsize
        # (computation, file or '') -> who asked
        self.answers: Dict[Tuple[str, str], 'concurrent.futures.Future[Any]'] = {}
        # The embedded node; where it is a process of its own, that and its directory
        self.local: Optional[EmbeddedNode] = None
        self.process: Optional['subprocess.Popen[bytes]'] = None
        self.directory = ''

    def move(self, event: str) -> None:
        """The one place where a node's state changes."""
        self.state = NODE_TABLE[self.state, event]

    def is_better_called(self, host: str) -> bool:
        """Whether a node that was found by its IPv6 address, and not dialled yet, is dialled at
        this IPv4 address instead."""
        if self.state is not NodeState.FOUND:
            return False
        if self.listed:
            return False
        if ':' not in self.host:
            return False
        if ':' in host:
            return False
        for use in self.uses.values():
            if not use.spec.may_fit(host):
                return False
        return True

    @property
    def state_word(self) -> str:
        """Its state for people: for one that was not reached, why, also while it is tried again."""
        if self.state is NodeState.UNREACHED or (self.state is NodeState.DIALLING
                                                 and self.failures):
            # Lost: it has been connected before
            if self.offered:
                return NodeState.LOST.value
            return str(self.unreached)
        return self.state.value

    def end_process(self) -> None:
        """End the embedded node, if this is one, and remove what it may have left."""
        if self.local is not None:
            self.local.close()
            self.local = None
        if self.process is not None:
            _end_embedded(self.process)
            self.process = None
        if self.directory:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory = ''

    def facts_now(self) -> dict:
        """What is known of it, with the bytes that went over its links and when it was heard
        last."""
        link = self.link
        used = {name: self.taken.get(name, 0) for name in resources_of(self.facts)}
        if link is None:
            return dict(self.facts, tx=self.tx, rx=self.rx, heard=self.heard_last,
                        resources_used=used)
        heard = time.time() - max(0.0, time.monotonic() - link.heard)
        return dict(self.facts,
                    tx=self.tx + link.bytes_out,
                    rx=self.rx + link.bytes_in,
                    heard=heard,
                    resources_used=used)

    def count_link(self) -> None:
        """Its link has ended, or ends now."""
        facts = self.facts_now()
        self.tx = facts['tx']
        self.rx = facts['rx']
        self.heard_last = facts['heard']

    def is_meant(self, node: Any) -> bool:
        """Whether a user's word for a node means this one."""
        if node == self.key:
            return True
        if isinstance(node, DispyNode):
            node = (node.ip_addr, node.port)
        names = (self.name, self.ip_addr, self.host)
        if isinstance(node, (tuple, list)):
            if len(node) != 2:
                return False
            if node[0] not in names:
                return False
            return node[1] == self.port
        if not node:
            return False
        places = (format_address(self.ip_addr, self.port), format_address(self.host, self.port))
        if node in names:
            return True
        return node in places

    @property
    def kind(self) -> str:
        """Return what kind of node it is, as NodeDoubted has it."""
        if self.scheduler:
            return 'scheduler'
        if self.embedded:
            return 'embedded'
        return ''

    def limit(self, comp: str) -> int:
        """CPUs that a computation may use here."""
        if comp in self.blocked:
            return 0
        return min(self.allowed(comp), self.most)

    def allowed(self, comp: str) -> int:
        """The same, were no other computation alone here."""
        use = self.uses[comp]
        if use.wanted is not None:
            # The program's own may have more processes than CPUs
            if self.embedded:
                most = use.wanted
            else:
                most = self.offered
            if use.wanted >= 0:
                return min(use.wanted, most)
            return max(0, self.offered + use.wanted)
        if use.allocation is not None:
            if self.offered:
                return use.allocation.cpus
            return 0
        return limited(self.offered, use.spec.cpus)

    @property
    def place(self) -> str:
        """Where it is reached, for a journal; one that dials us is known by its name."""
        if self.port:
            return '@' * self.scheduler + format_address(self.host, self.port)
        return ' %s' % self.name

    def __str__(self) -> str:
        if self.port:
            where = 'dispyscheduler ' * self.scheduler + format_address(self.host, self.port)
        else:
            where = self.host
        if self.name and self.name != self.host:
            return '%s (%s)' % (self.name, where)
        return where


# Whether the embedded node runs in the program. Its runners are given descriptors, which takes
# POSIX (see RunnerProcess); elsewhere it is a process of its own.
IN_PROGRAM = hasattr(os, 'fork')
LOCAL_PREFIX = 'dispy-local-'    # of the names of directories of such nodes


def offer_here() -> Offer:
    """What the embedded node offers beside CPUs: what DISPY_RESOURCES in the environment says, such
    as 'gpu=2 licence=1', and otherwise the devices of this machine. Raises StartError."""
    words = os.environ.get('DISPY_RESOURCES')
    if words is None:
        return find_offer(['gpu=auto'], quick=True)
    try:
        return find_offer(words.split())
    except ValueError as exc:
        raise StartError('DISPY_RESOURCES in the environment: %s' % exc) from None


class EmbeddedNode:
    """The node of this program: it runs in the driver's loop, behind a link in memory, and has its
    turns between those of the driver. The driver's thread."""

    def __init__(self, driver: 'Driver') -> None:
        """Raises StartError, OSError."""
        import tempfile
        python = own_python()
        root = tempfile.mkdtemp(prefix=LOCAL_PREFIX)
        self._driver = driver
        self._is_whole = True      # the last turn did not fail
        if dispynode.logger.level == logging.NOTSET:
            # What a node tells its operator is nothing to the user of a program
            dispynode.logger.setLevel(logging.ERROR)
        options = Options(available_cpus(),
                          prefix=root,
                          embedded=True,
                          python=python,
                          start_method=default_start_method(),
                          offer=offer_here())
        self._host = NodeHost(driver, options)
        try:
            self._host.start(0)
        except BaseException:
            self._host.close()
            shutil.rmtree(root, ignore_errors=True)
            raise
        self._end, self.link = MemoryLink.pair(self._host.instance, driver.instance, driver.now)

    def connect(self) -> None:
        """The driver has attached its end of the link."""
        self._end.owner = self._host
        self._driver.attach(self._end)
        self._host.link_up(self._end)

    def keep_notes(self, comp: str, journal: 'Journal') -> None:
        """Have it noted beside a recover_file which jobs have begun when this program is killed."""
        directory = self._host.directory
        try:
            notes = BegunNotes.begin(journal, comp, directory.private_of(comp))
            directory.ask_for_notes(comp, notes)
        except OSError as exc:
            logger.warning('if this program is killed, it will not be known which jobs had begun: '
                           '%s',
                           exc)

    @property
    def has_messages(self) -> bool:
        """Whether the driver has sent something."""
        return self._end.has_messages

    @property
    def is_due(self) -> bool:
        """Whether a turn of the node has something to do."""
        return self._host.is_due or self._end.has_messages or not self._is_whole

    def turn(self) -> None:
        """Take what the driver has sent, and what processes have, and decide."""
        self._is_whole = False
        if self._end.has_messages:
            self._driver.receive(self._end)
        self._host.turn()
        self._is_whole = True

    def next_timer(self) -> Optional[float]:
        """When there is something to do for either side."""
        if self._end.has_messages or self.link.has_messages:
            return self._host.now
        return self._host.next_timer()

    def after_fork(self) -> None:
        """In a forked child: nothing of it is ours."""
        self._host.after_fork()

    def close(self) -> None:
        """End its processes and remove its directory."""
        self._driver.detach(self._end)
        for _ in range(2):   # the second says: at once
            self._host.guard(None, self._host.tell, Stop())
        self._host.close()


def remove_abandoned_directories() -> None:
    """Remove directories of nodes whose programs were killed together with all their runners, which
    would have removed them."""
    import tempfile
    above = tempfile.gettempdir()
    with contextlib.suppress(OSError):   # somebody else has removed one of them
        for entry in os.scandir(above):
            if not entry.name.startswith(LOCAL_PREFIX):
                continue
            if not entry.is_dir(follow_symlinks=False):
                continue
            status = entry.stat(follow_symlinks=False)
            if status.st_uid == os.getuid():
                remove_abandoned_directory(entry.path)


class SecondsOfUser:
    """What a NodeUser does about second attempts of its jobs; see NodeUser for the methods."""

    def send(self, peer: 'NodeConnection', seconds: Sequence[SecondAttempt]) -> None:
        """Send these to a node."""

    def counts(self, peer: 'NodeConnection', second: SecondAttempt, ran: float) -> None:
        """One that is at a node and has run for so many seconds is that of its job from now on."""

    def over(self, second: SecondAttempt) -> None:
        """One counts no more."""

    def files_of(self, second: SecondAttempt) -> 'HeldFiles':
        """Return where the files are kept that one sends."""
        raise PeerError('a file that was not asked for')


class NodeUser:
    """What a driver uses nodes for: a cluster, or something that only looks at nodes. The driver
    reads these attributes, and calls these methods when something has happened. They are called in
    the driver's thread, must be quick, and do nothing here unless the docstring says what."""
    comp = ''                                   # the name of its computation, to nodes
    name = ''                                   # for people
    client = ''                                 # whose claims on CPUs it shares
    user_name = ''                              # whose limits and share it has, at a scheduler
    program = ''                                # whose it is, for people, if a scheduler knows that
    key = b''                                   # who has it may take the results
    cargo: Optional[PackedComputation] = None               # the computation; None: it only looks
    source: Optional[Tuple[bytes, str]] = None  # what pack_source gave
    specs: List[NodeSpec] = []                  # the nodes that are meant, replaced as a whole
    port = NODE_PORT                            # of nodes for which none is given
    hosts: Sequence[Tuple[str, int]] = ()       # where nodes may connect to this program
    hosts_may_fail = False                      # a port of those that is taken is no error
    callers: Collection[str] = ()               # names of nodes that will connect to this program
    multicast = False                           # nodes are looked for by IPv4 multicast, too
    searches = True                             # nodes that a wildcard means are looked for by UDP
    warns = True                                # when no node is ready for a while
    reentrant = False                           # jobs of a lost node are run again elsewhere
    speculate = False                           # its last jobs are started a second time
    seconds = SecondsOfUser()
    remote = False                              # jobs go to a scheduler
    journal: Optional[Journal] = None           # where its jobs are written down
    closed = False                              # nothing can be submitted any more

    def cpus_in_all(self) -> Optional[int]:
        """CPUs that it may use over all nodes; a scheduler sees to that itself."""
        if self.remote or self.cargo is None:
            return None
        return self.cargo.spec.get('most') or None

    def spec_of(self, peer: 'NodeConnection') -> Optional[NodeSpec]:
        """What of `specs` means a node. One that has dialled us has no port."""
        if not peer.port:
            if peer.name in self.callers:
                return NodeSpec(peer.host, 0)
        for spec in self.specs:
            if not spec.fits(peer.ip_addr, peer.host, peer.name):
                continue
            if spec.wild:
                return spec
            if peer.port in (0, spec.port):
                return spec
        return None

    # -- whether the program still needs it --------------------------------------------------------

    def is_idle(self) -> bool:
        """Whether it is a cluster that has no jobs."""
        return False

    def is_replaced(self, others: Iterable['NodeUser']) -> bool:
        """Whether a cluster of the same function was made later."""
        return False

    # -- for monitors; any thread ------------------------------------------------------------------

    def jobs_counted(self) -> Tuple[int, int, int, int]:
        """How many jobs were submitted, have ended as they should, have failed, were cancelled."""
        return 0, 0, 0, 0

    def jobs_at_nodes(self) -> Dict[str, Tuple[Any, int, float]]:
        """ADDRESS:NAME -> the node, the jobs that have ended there, the seconds that they ran."""
        return {}

    # -- nodes -------------------------------------------------------------------------------------

    def node_connected(self, peer: 'NodeConnection') -> None:
        """A node is connected, and has told what it is. Called if this only looks."""

    def node_ready(self, peer: 'NodeConnection') -> None:
        """The computation is set up at a node."""

    def node_changed(self, status: int, peer: 'NodeConnection') -> None:
        """A node is ready, has told what is free there, or is used no more, by the status, which is
        one of DispyNode."""

    def node_unreachable(self, peer: 'NodeConnection', text: str) -> None:
        """A node cannot be reached, for this reason."""

    def node_told(self, status: int, row: 'NodeInfo') -> None:
        """As `node_changed`, of a node of the scheduler."""

    def warn(self, text: str) -> None:
        """Something that the user should know. It is logged here."""
        logger.warning('%s', text)

    # -- setting up a node -------------------------------------------------------------------------

    def ask_source(self, peer: 'NodeConnection', link: Link) -> None:
        """Find out what the source of the computation is, and call `ComputationSetup.source_found`
        or `source_missing`."""

    def ask_allocator(self, allocator: Any, peer: 'NodeConnection', link: Link) -> None:
        """Ask the user's allocator, and call `ComputationSetup.allocated`."""

    def support_for(self, peer: 'NodeConnection') -> Dict[str, bytes]:
        """cloudpickle, if the node does not have the same."""
        return {}

    def modules_for(self, peer: 'NodeConnection') -> Dict[str, Any]:
        """What a node gets of the program's modules."""
        return {}

    def module_source(self, name: str) -> Any:
        """Where a file of a module is read from: a path, a FileOfModule, its content, or None."""

    def value_source(self, digest: bytes) -> Any:
        """Where a value is read from: its content, or a path."""

    def asked(self, peer: 'NodeConnection', message: Call) -> None:
        """A node or scheduler asks what only the program can tell; it gets a Return."""

    # -- jobs --------------------------------------------------------------------------------------

    def send_jobs(self, peer: 'NodeConnection', works: Sequence[Any]) -> None:
        """Send these to a node."""

    def jobs_started(self, peer: 'NodeConnection', pairs: Sequence[Tuple[Any, float]]) -> None:
        """Jobs run at a node, each since so many seconds."""

    def jobs_ended(self, peer: 'NodeConnection', pairs: List[Tuple[Any, tuple]]) -> None:
        """Jobs and their rows of Results; also those that are provisional."""

    def job_ended(self, work: Any, text: str) -> None:
        """A job has ended without a row of Results."""

    def job_waits(self, work: Any) -> None:
        """A job that was sent waits again."""

    def jobs_held(self, text: str) -> None:
        """Jobs wait because of a limit of their user, for this reason."""

    def job_parked(self, work: Any, text: str) -> None:
        """A job waits for a node that is large enough."""

    def job_moved(self, work: Any, node: tuple) -> None:
        """A scheduler says where a job is."""
        raise PeerError('a node is no scheduler')

    def job_goes_on(self, work: Any) -> None:
        """A job that was to be cancelled if it has not begun has begun, or has ended."""

    def output(self, peer: 'NodeConnection', work: Any, message: Output) -> None:
        """What a running job prints or logs."""

    def file_piece(self, peer: 'NodeConnection', work: Any, message: FilePiece) -> None:
        """A piece of a file that a running job sends."""

    # -- faults ------------------------------------------------------------------------------------

    def jobs_owed(self) -> List[Any]:
        """Jobs for whose end the driver answers."""
        return []

    def fail_job(self, work: Any, text: str) -> None:
        """End a job that is nowhere any more."""

    def call_back(self, job: Any) -> None:
        """Call the user's function for a job that has ended. In a thread of the driver's pool."""

    def driver_failed(self, text: str) -> None:
        """The driver's thread is ending for a fault of ours."""


START_NODE = ('Run `python dispynode.py` on a host that has the same secret, and list that host in '
              'nodes= (at the shell: -n HOST)')


class NodePolicy:
    """What whoever runs a driver says to the use of nodes, and is told of it. This one, that of a
    program, lets everything happen. The driver's thread."""
    start_node = START_NODE   # what to do where no node answers

    def introduction(self) -> str:
        """Who this is, for those who run the node and for others who want it."""
        return '%s@%s PID %d' % (_user_name(), socket.gethostname(), os.getpid())

    def process(self) -> tuple:
        """Return the same for programs: a row of ClientHello."""
        return socket.gethostname(), os.getpid(), 0

    def about_holder(self, holder: Holder, place: str) -> str:
        """Return what to do about a node that serves another, to be appended to what it says.
        `place` is that of the node."""
        return who_holds(holder, place) or how_to_share(holder)

    def addresses_of(self, peer: 'NodeConnection') -> Optional[Callable[[str], bool]]:
        """Which addresses of a node may be connected to; None: all. A dial thread."""
        return None

    def may_set_up(self, peer: 'NodeConnection', comp: str) -> bool:
        """Whether a computation may be offered to a node."""
        return True

    def node_met(self, peer: 'NodeConnection') -> None:
        """A node is connected, and has told what it is."""

    def becomes_ready(self, peer: 'NodeConnection', comp: str) -> None:
        """A computation is about to be ready at a node."""

    def node_drained(self, peer: 'NodeConnection') -> None:
        """The last job of a computation that sends no more has ended there."""

    def node_freed(self, peer: 'NodeConnection') -> None:
        """A computation has left a node, or was refused there."""


def new_comp() -> str:
    """Return a name for a computation, which no other has."""
    return uuid.uuid4().hex


def _specs_of_places(places: Iterable[str]) -> List[NodeSpec]:
    """Nodes to dial, of places as `NodeConnection.place` has them; not those that will dial us."""
    specs = []
    for where in sorted(places):
        if where.startswith(' '):
            continue
        host, port = host_and_port(where.lstrip('@'), NODE_PORT)
        scheduler = where.startswith('@')
        specs.append(NodeSpec(host, port, scheduler=scheduler))
    return specs


class Collector(NodeUser):
    """Asks nodes for what they have of computations whose program has ended. To the driver it is a
    cluster that only looks. The driver's thread.

    met - the nodes that have been connected
    """
    client = 'recovery'
    acknowledges = True    # results, when they come

    def __init__(self,
                 places: Iterable[str],
                 calling: Iterable[str],
                 listens: Sequence[str],
                 new_name: Callable[[], str] = new_comp) -> None:
        """`places` are those of the nodes, as `NodeConnection.place` has them. Among `calling` are
        the nodes that will dial us, where a program has listened: one of `listens`, HOST:PORT.
        `new_name` names what is a cluster to the driver."""
        self.comp = new_name()
        self.port = NODE_PORT
        self.specs = _specs_of_places(places)
        self.callers = {where[1:] for where in calling if where.startswith(' ')}
        if self.callers and listens:
            host, _, port = listens[0].rpartition(':')
            self.hosts = [(host, int(port))]
        self.met: List[NodeConnection] = []
        self.driver: Any = None

    def begin(self, driver: 'Driver') -> None:
        """Dial the nodes. Raises OSError."""
        self.driver = driver
        driver.open(self, False)

    def node_connected(self, peer: NodeConnection) -> None:
        """Note a node, to be asked for what it has."""
        if peer not in self.met:
            self.met.append(peer)

    def held(self, peer: NodeConnection, comp: str, serials: Sequence[int],
             past: AttemptHistory) -> None:
        """A node has told what it knows."""
        raise NotImplementedError

    def where(self, comp: str, serials: Sequence[int], node: tuple) -> None:
        """A scheduler says which jobs are on a node, or wait."""
        raise NotImplementedError

    def returned(self, peer: NodeConnection, comp: str, serials: Sequence[int]) -> None:
        """A node gives back what has not begun."""
        raise NotImplementedError

    def results(self, peer: NodeConnection, comp: str, rows: Sequence[tuple]) -> None:
        """Results came; some perhaps for the second time."""
        raise NotImplementedError

    def refused(self, peer: NodeConnection, comp: str, text: str) -> None:
        """The program is connected to a node still, or again."""
        raise NotImplementedError

    def cancel(self, job: DispyJob) -> None:
        """End a job that runs."""
        raise NotImplementedError


class Recovery(Collector):
    """Collects what nodes have of jobs that are written down in a journal. `done(job, row, peer)`
    is told a result, `lost(job, text)` a job that has begun and is lost, `again(job)` one that has
    not begun and waits again, `over()` that none is left. The driver's thread."""

    def __init__(self,
                 journal: Journal,
                 sent: Sequence[Tuple[DispyJob, str]],
                 holders: Set[str],
                 done: Callable[[DispyJob, tuple, NodeConnection], None],
                 lost: Callable[[DispyJob, str], None],
                 again: Callable[[DispyJob], None],
                 over: Callable[[], None],
                 cancel: bool = False,
                 parts: Optional['DriverParts'] = None) -> None:
        """`parts` are those of the driver that it will have, where they are not the usual ones."""
        parts = parts or DriverParts()
        rows = journal.comps()
        self._journal = journal
        # Computations and their keys
        self.old: Dict[str, bytes] = {row[0]: row[5] for row in rows}
        places = {node.rpartition('#')[0] for _, node in sent}
        for _, other, _ in journal.seconds().values():
            place, _, _ = other.rpartition('#')
            places.add(place)
        self._unmet = holders - places   # they may keep results that are noted
        listens = [row[4] for row in rows if row[4]]
        super().__init__(places | self._unmet, places, listens, parts.new_comp)
        self.name = 'the recovery of %s' % ', '.join(sorted({row[1] for row in rows}))
        self.collected = parts.event()
        self._jobs = {job_number(job.serial): (job, node) for job, node in sent}
        # Number -> serial, node and directory of the files of the second attempt
        self._seconds = journal.seconds()
        self._done = done
        self._lost = lost
        self._again = again
        self._over = over
        self._cancel = cancel

    def node_connected(self, peer: NodeConnection) -> None:
        """It is asked for what it has."""
        super().node_connected(peer)
        self._unmet.discard(peer.place)
        self.driver.recoveries.reclaim(peer, self, self.old)
        self._check()

    def held(self, peer: NodeConnection, comp: str, serials: Sequence[int],
             past: AttemptHistory) -> None:
        """A node has told what it knows. That of this program knows nothing: what its predecessor
        had begun is in a file, which may still be written."""
        if peer.embedded:
            self.driver.openers.run(self._read_notes, peer, comp)
            return
        self._settle(peer, comp, serials, past)

    def _read_notes(self, peer: NodeConnection, comp: str) -> None:
        """An opener."""
        past = BegunNotes.wait(self._journal, comp)
        self.driver.call_soon(self._settle, peer, comp, [], past)

    def _settle(self, peer: NodeConnection, comp: str, serials: Sequence[int],
                past: AttemptHistory) -> None:
        for job, serial, node in self._attempts():
            where, _, memory = node.rpartition('#')
            if where != peer.place:
                continue
            if job.comp != comp:
                continue
            whole = peer.embedded or memory != '' and peer.memory.startswith(memory)
            account = Account(frozenset(serials), past, whole)
            verdict, text = account.verdict(serial, Occasion.RECOVERED)
            if verdict is Verdict.STAYS or self._other_goes_on(serial):
                continue
            del self._jobs[job_number(serial)]
            if verdict is Verdict.WAITS:
                self._again(job)
            else:
                self._lost(job, 'abandoned: node %s: %s' % (peer, text))
        if self._cancel and serials:
            message = Cancel(comp, list(serials))
            self.driver.send(peer.link, message)
        self._check()

    def _attempts(self) -> List[Tuple[DispyJob, int, str]]:
        """Jobs, and serial and node of an attempt of theirs that has not ended."""
        found = []
        for number, (job, node) in self._jobs.items():
            found.append((job, job.serial, node))
            if number in self._seconds:
                serial, other, _ = self._seconds[number]
                found.append((job, serial, other))
        return found

    def _other_goes_on(self, serial: int) -> bool:
        """An attempt counts no more. Returns whether its job has another, which counts then."""
        number = job_number(serial)
        if number not in self._seconds:
            return False
        second, node, files = self._seconds[number]
        del self._seconds[number]
        job, _ = self._jobs[number]
        if serial == second:
            settle_files(files, False)
        else:
            job.serial = second
            self._jobs[number] = (job, node)
            settle_files(files, True)
        return True

    def _end_other(self, serial: int) -> None:
        """An attempt has finished: that beside it is ended."""
        number = job_number(serial)
        if number not in self._seconds:
            return
        job, node = self._jobs[number]
        second, other, files = self._seconds.pop(number)
        settle_files(files, serial == second)
        if serial == second:
            self._cancel_at(node, job.comp, job.serial)
        else:
            self._cancel_at(other, job.comp, second)

    def _cancel_at(self, node: str, comp: str, serial: int) -> None:
        place = node.rpartition('#')[0]
        for peer in self.met:
            if peer.place == place and peer.link is not None:
                cancel = Cancel(comp, [serial])
                self.driver.send(peer.link, cancel)
        if not any(peer.place == place for peer in self.met):
            self._unmet.add(place)   # it is told that the computation is over

    def where(self, comp: str, serials: Sequence[int], node: tuple) -> None:
        """A scheduler says which jobs are on a node, or wait."""
        for serial in serials:
            job, _ = self._jobs.get(job_number(serial), (None, ''))
            if job is not None:
                if node:
                    job.status = DispyJob.Running
                else:
                    job.status = DispyJob.Created

    def returned(self, peer: NodeConnection, comp: str, serials: Sequence[int]) -> None:
        """A node gives back what has not begun."""
        for job, serial, node in self._attempts():
            if serial not in serials:
                continue
            place, _, _ = node.rpartition('#')
            if place == peer.place and not self._other_goes_on(serial):
                del self._jobs[job_number(serial)]
                self._again(job)
        self._check()

    def results(self, peer: NodeConnection, comp: str, rows: Sequence[tuple]) -> None:
        """Results came; some perhaps for the second time."""
        for row in rows:
            job, _ = self._jobs.get(job_number(row[0]), (None, ''))
            if job is None:
                continue
            if row[1] in PROVISIONAL:
                continue
            if row[1] not in RETURNED and self._other_goes_on(row[0]):
                continue
            self._end_other(row[0])
            del self._jobs[job_number(row[0])]
            job.serial = row[0]
            if row[1] == Outcome.STOPPED:
                self._lost(job, 'abandoned: node %s was stopped while it ran' % peer)
            else:
                job.state = JOB_TABLE[JobState.RUNNING, _EVENT_OF[row[1]]]
                self._journal.ended(job, row)
                self._done(job, row, peer)
        self._check()

    def cancel(self, job: DispyJob) -> None:
        """End a job that runs."""
        for other, serial, node in self._attempts():
            if other is job:
                self._cancel_at(node, job.comp, serial)

    def left(self) -> List[DispyJob]:
        """Those of which nothing has been heard."""
        jobs: List[DispyJob] = []
        for job, _ in self._jobs.values():
            jobs.append(job)
        return jobs

    def refused(self, peer: NodeConnection, comp: str, text: str) -> None:
        """The program is connected to the node still, or again."""
        logger.warning('node %s: nothing can be recovered: %s', peer, text)

    def _check(self) -> None:
        if not self._jobs:
            self.collected.set()
            if not self._unmet:
                self._over()

    def wait(self, over: threading.Event, timeout: Optional[float]) -> None:
        """Until all has been collected, and a little longer for nodes that may forget what they
        keep."""
        clock = self.driver.clock
        if timeout is None:
            until = math.inf
        else:
            until = clock() + timeout
        in_slices(self.collected.wait, timeout, clock)
        over.wait(min(max(0.0, until - clock()), FORGET_TIME))


class Collecting(enum.Enum):
    """What has been done about a computation at a node."""
    ASKED = 'it was asked what it has, and has not told'
    TOLD = 'it has told what it has'
    WANTED = 'it is to give what it has'
    TAKING = 'it was asked to give what it has'
    COMING = 'it gives what it has: results come'
    IN_USE = 'nothing is to be had, as the program is connected'
    ENDING = 'it is told that the computation is over'
    OVER = 'it has heard that the computation is over'


class ResultCollection(Collector):
    """Asks nodes what they have of computations of which no jobs were written down, and collects
    it. Nodes are asked first; what is to be had is then taken, unless their program is connected to
    any of them. The driver's thread, but for `wait`."""
    warns = False
    acknowledges = False    # at the end, when the user has them
    name = 'the recovery of programs that have ended'
    # What is asked once more on a new link
    _ASKED_ANEW = frozenset((Collecting.ASKED, Collecting.TAKING, Collecting.COMING))

    def __init__(self, lefts: Sequence[RecoverableFiles], cancel: bool = False) -> None:
        places = {where for left in lefts for where in left.places}
        listens = []
        for left in lefts:
            if left.listen and any(where.startswith(' ') for where in left.places):
                listens.append(left.listen)
        super().__init__(places, places, listens)
        self.lefts = {left.comp: left for left in lefts}
        self._cancel = cancel
        # By place and computation
        self._stages: Dict[Tuple[str, str], Collecting] = {
            (where, left.comp): Collecting.ASKED for left in lefts for where in left.places}
        self.taken: Set[Tuple[str, str]] = set()
        self.alive: Set[str] = set()        # computations whose programs are connected to a node
        self.there: Dict[Tuple[str, str], Set[int]] = {}   # serials that are not in `rows`
        # (computation, number) -> its result and where from; what became of it if none will come
        self.rows: Dict[Tuple[str, int], Tuple[tuple, str]] = {}
        self.gone: Dict[Tuple[str, int], Tuple[JobState, str]] = {}
        self.placed: Dict[Tuple[str, int], bool] = {}   # a scheduler has them on a node
        self._changed = threading.Condition()           # guards all of these
        self._is_over = False                           # what comes now is left to the next one

    def take(self, comps: Iterable[str]) -> None:
        """Collect these from the nodes that have answered, and from others when they do."""
        wanted = set(comps)
        for key, stage in list(self._stages.items()):
            if key[1] in wanted:
                self.taken.add(key)
                if stage is Collecting.TOLD:
                    self._stages[key] = Collecting.WANTED
        for peer in self.met:
            self._ask(peer)

    def _ask(self, peer: NodeConnection, anew: bool = False) -> None:
        """Ask a node; `anew` on a new link, along which no answers come to what was asked
        before."""
        for key, stage in list(self._stages.items()):
            if key[0] not in (peer.place, *peer.aliases):
                continue
            if peer.link is None:
                continue
            if stage is Collecting.ENDING and anew:
                self.driver.recoveries.dismiss(peer, key[1], self.lefts[key[1]].key)
            elif stage is Collecting.WANTED or (anew and stage in self._ASKED_ANEW):
                taking = stage is not Collecting.ASKED
                if taking:
                    self._stages[key] = Collecting.TAKING
                keys = {key[1]: self.lefts[key[1]].key}
                self.driver.recoveries.reclaim(peer, self, keys, taking)

    def node_connected(self, peer: NodeConnection) -> None:
        """It is asked for what it has."""
        super().node_connected(peer)
        self._ask(peer, anew=True)

    def driver_failed(self, text: str) -> None:
        """Nothing more will come."""
        with self._changed:
            self._stages.clear()
            self.there.clear()
            self._changed.notify_all()

    def _places_of(self, peer: NodeConnection, comp: str) -> List[Tuple[str, str]]:
        keys: List[Tuple[str, str]] = []
        for key in self._stages:
            if key[1] != comp:
                continue
            if key[0] in (peer.place, *peer.aliases):
                keys.append(key)
        return keys

    def held(self, peer: NodeConnection, comp: str, serials: Sequence[int],
             past: AttemptHistory) -> None:
        """A node has told what it knows."""
        with self._changed:
            for key in self._places_of(peer, comp):
                if self._stages[key] is not Collecting.ENDING:
                    continue
                if not serials:
                    self._stages[key] = Collecting.OVER
            for key in self._places_of(peer, comp) if not self._is_over else ():
                known = self.there.get(key, set())
                now = set(serials)
                taking = self._stages[key] is Collecting.TAKING
                if taking:
                    self._stages[key] = Collecting.COMING
                elif self._stages[key] is Collecting.ASKED:
                    if key in self.taken:
                        self._stages[key] = Collecting.WANTED
                    else:
                        self._stages[key] = Collecting.TOLD
                self.there[key] = {one for one in now if not self._is_known(comp, one)}
                if taking:
                    for serial in known - now:
                        account = Account(frozenset(now), past)
                        self._went(comp, serial, account, peer)
                    if self._cancel and serials:
                        message = Cancel(comp, list(serials))
                        self.driver.send(peer.link, message)
            self._changed.notify_all()
        self._ask(peer)

    def _is_known(self, comp: str, serial: int) -> bool:
        """Whether what becomes of an attempt changes nothing: a result of its job is here."""
        row, _ = self.rows.get((comp, job_number(serial)), (None, ''))
        if row is None:
            return False
        if row[1] in RETURNED:
            return True
        return bool(row[0] >= serial)

    def _end_others(self, comp: str, serial: int) -> None:
        """An attempt has finished: others of its job are ended. The driver's thread."""
        for peer in self.met:
            for key in self._places_of(peer, comp):
                there = self.there.get(key, set())
                number = job_number(serial)
                others = [one for one in there if job_number(one) == number]
                there.difference_update(others)
                if others and peer.link is not None:
                    self.driver.send(peer.link, Cancel(comp, others))

    def _settle_files(self, comp: str, serial: int) -> None:
        """An attempt has finished: if it was a second one, its files come where they belong; those
        of another are removed."""
        root = self.lefts[comp].files
        begin = '.dispy-%s-' % comp
        names: List[str] = []
        if os.path.isdir(root):
            names = os.listdir(root)
        for name in names:
            digits = name[len(begin):]
            if not name.startswith(begin) or not digits.isdigit():
                continue
            other = int(digits)
            if job_number(other) == job_number(serial):
                directory = os.path.join(root, name)
                settle_files(directory, other == serial)

    def _went(self, comp: str, serial: int, account: Account, peer: NodeConnection) -> None:
        """A job is not at its node any more, and no result of it came."""
        if (comp, job_number(serial)) in self.rows:
            return
        verdict, text = account.verdict(serial, Occasion.RECOVERED)
        if verdict is Verdict.LOST:
            state = JobState.ABANDONED
            text = 'abandoned: node %s: %s' % (peer, text)
        else:
            state = JobState.CANCELLED
            text = ('cancelled: it had not begun when node %s ended or gave it back, and '
                    'its program was gone' % peer)
        self.gone[comp, job_number(serial)] = state, text

    def returned(self, peer: NodeConnection, comp: str, serials: Sequence[int]) -> None:
        """A node gives back what has not begun: there is nobody who could send it again."""
        with self._changed:
            for key in self._places_of(peer, comp) if not self._is_over else ():
                gone = self.there.get(key, set()) & set(serials)
                self.there.get(key, set()).difference_update(gone)
                for serial in gone:
                    attempt_history = AttemptHistory(unbegun=frozenset(gone))
                    account = Account(past=attempt_history)
                    self._went(comp, serial, account, peer)
            self._changed.notify_all()

    def refused(self, peer: NodeConnection, comp: str, text: str) -> None:
        """Its program is connected there: it lives."""
        with self._changed:
            self.alive.add(comp)
            for key in self._stages:
                if key[1] == comp:
                    self._stages[key] = Collecting.IN_USE
            self._changed.notify_all()

    def where(self, comp: str, serials: Sequence[int], node: tuple) -> None:
        """A scheduler says which jobs are on a node, or wait."""
        with self._changed:
            self.placed.update({(comp, job_number(serial)): bool(node) for serial in serials})

    def results(self, peer: NodeConnection, comp: str, rows: Sequence[tuple]) -> None:
        """Results came; some perhaps for the second time."""
        with self._changed:
            for row in rows if not self._is_over else ():
                number = job_number(row[0])
                if row[1] in PROVISIONAL:
                    continue
                before, _ = self.rows.get((comp, number), (None, ''))
                if before is None or (before[1] not in RETURNED and row[0] >= before[0]):
                    self.rows[comp, number] = (row, peer.ip_addr)
                    self.gone.pop((comp, number), None)
                for key in self._places_of(peer, comp):
                    self.there.get(key, set()).discard(row[0])
                if row[1] in RETURNED:
                    self._end_others(comp, row[0])
                    self._settle_files(comp, row[0])
            self._changed.notify_all()

    def cancel(self, job: DispyJob) -> None:
        """Nobody has these jobs in hand while they are collected."""

    # -- any thread --------------------------------------------------------------------------------

    def wait(self, done: Callable[[], bool], timeout: Optional[float]) -> bool:
        """Wait until that is so, at most `timeout` seconds; whether it is."""
        def once(seconds: float) -> bool:
            with self._changed:
                return self._changed.wait_for(done, seconds)
        return in_slices(once, timeout)  # type: ignore[no-any-return]

    def finish(self) -> None:
        """Nothing changes any more."""
        with self._changed:
            self._is_over = True

    def unreached(self, comp: Optional[str] = None) -> List[str]:
        """Nodes that have not answered, of one computation or of all."""
        with self._changed:
            return sorted({where for (where, name), stage in self._stages.items()
                           if stage is Collecting.ASKED and comp in (None, name)})

    def is_through(self) -> bool:
        """All that was to be taken has come, from nodes that have answered."""
        for key in self.taken:
            stage = self._stages.get(key)
            if stage in (Collecting.WANTED, Collecting.TAKING):
                return False
            if stage is not Collecting.COMING:
                continue
            if self.there.get(key):
                return False
        return True

    def is_whole(self, comp: str) -> bool:
        """Nobody wants anything of a computation that is anywhere; nodes are to be told that it is
        over."""
        wants_none = self.lefts[comp].over
        with self._changed:
            stages = {key: stage for key, stage in self._stages.items() if key[1] == comp}
            for key, stage in stages.items():
                if stage not in (Collecting.TOLD, Collecting.COMING):
                    return False
                if not self.there.get(key):
                    continue
                if not wants_none:
                    return False
            return bool(stages)

    def dismiss(self, comps: Set[str]) -> None:
        """Tell nodes that these are over, now or when they are connected again. The driver's
        thread."""
        with self._changed:
            for key in self._stages:
                if key[1] in comps:
                    self._stages[key] = Collecting.ENDING
        for peer in self.met:
            self._ask(peer, anew=True)

    def is_forgotten(self, comps: Iterable[str]) -> bool:
        """All nodes have heard that these are over."""
        wanted = set(comps)
        stages = []
        for key, stage in self._stages.items():
            if key[1] in wanted:
                stages.append(stage)
        if not bool(stages or not wanted):
            return False
        return all(stage is Collecting.OVER for stage in stages)

    def count(self, comp: str) -> int:
        """Jobs and results of it that are on nodes."""
        with self._changed:
            return len(self.numbers_there(comp))

    def numbers_there(self, comp: str) -> Set[int]:
        """Numbers of its jobs of which attempts and results are on nodes."""
        numbers: Set[int] = set()
        for key, serials in self.there.items():
            if key[1] == comp:
                numbers.update(map(job_number, serials))
        return numbers


def recover_jobs(recover_file: Any = None, timeout: Optional[float] = None,
                 terminate_pending: bool = False, secret: Union[str, bytes, None] = None,
                 certfile: Optional[str] = None, keyfile: Optional[str] = None,
                 cafile: Optional[str] = None) -> List[DispyJob]:
    """The jobs of a program that has crashed, or was ended by an exception.

    recover_file - the file of a cluster (`JobCluster(..., recover_file=...)`); None: the newest
        file
        of `fault_recover=True` in the current directory, else what this script has left on nodes
        when it ran last and ended before its jobs, without such a file; or one of what
        `recoverable()` lists
    timeout - seconds for which what runs is waited for; None: without limit

    Jobs that have ended are returned with their results, in one call only; those that run on nodes
    are waited for, and returned as Running if the time was too short; those that were never
    started are returned as Created, with `job.args` and `job.kwargs`, and are run by
    `JobCluster(..., recover_file=recover_file)`. With `terminate_pending` what runs is cancelled.
    When nothing is left to be recovered, the file is removed. Without a `recover_file` only what
    was on nodes is known: results, by `job.id`, the running number; what waited in the program is
    lost with it.

    Raises FileNotFoundError, also (NothingToRecover) if this script has left nothing, naming what
    others have; DispyError if the file is in use, damaged or none of dispy's; OSError. Any thread.
    """
    path = path_option('recover_file', recover_file)
    seconds = _seconds('timeout', timeout)
    access = ConnectionSettings(find_secret(secret), *tls_files(certfile, keyfile, cafile), PULSE,
                                REDIAL_MOST)
    if path is None:
        journal = _journal_here()
    else:
        journal = None
    if path is None:
        if journal is None:
            return _recover_newest(seconds, terminate_pending, access)
    if path is not None and is_trail(path):
        left = RecoverableFiles.find(path)
        if left is None:
            raise DispyError('recover_file %s: its program is still running, or another program '
                             'collects its jobs'
                             % path)
        return _collect([left], seconds, terminate_pending, access)[0]
    if journal is None:
        journal = Journal(path, must_exist=True)  # type: ignore[arg-type]
    try:
        return JournalRecovery(journal, terminate_pending, drivers).run(seconds, access)
    finally:
        journal.close()


fault_recover_jobs = recover_jobs   # its name in dispy 4


def _journal_here() -> Optional[Journal]:
    """The newest file in the current directory that `fault_recover=True` has made, if its program
    has ended. Files of dispy 4 have such names too and are left alone."""
    names = [name for name in os.listdir() if re.fullmatch(r'_dispy_\d{14}', name)]
    for name in sorted(names, reverse=True):
        try:
            return Journal(name, must_exist=True)
        except (DispyError, OSError) as exc:
            logger.info('recover_jobs: %s', exc)
    return None


def is_trail(path: str) -> bool:
    """Whether a file is one that a cluster without `recover_file` has left."""
    if not path.endswith(TRAIL_END):
        return False
    try:
        with open_regular(path) as file:
            return file.read(len(TRAIL_MARK)) == TRAIL_MARK  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return False


def _left_nothing(script: str, lefts: Sequence[RecoverableFiles]) -> str:
    """Says that a script has left no jobs, and which programs have left some."""
    others = '; '.join(str(left.row) for left in lefts[:20])
    if others:
        hint = ('Other programs have left some, each of which may be given as recover_file (see '
                'dispy.recoverable()): ') + others
    else:
        hint = 'No other program of this user has left any'
    whose = script or 'this program, which is no script,'
    return 'recover_jobs: %s has left no jobs on nodes. %s' % (whose, hint)


def _recover_newest(timeout: Optional[float], cancel: bool,
                    access: ConnectionSettings) -> List[DispyJob]:
    """What the newest program of this script has left that has left anything."""
    script = own_script()
    lefts = programs_left()
    if script:
        script = os.path.realpath(script)
    else:
        script = ''
    mine = [left for left in lefts if script and left.row.script == script and not left.over]
    for left in lefts:
        if left not in mine:
            left.close()
    if not mine:
        raise NothingToRecover(_left_nothing(script, lefts))
    try:
        while mine:
            run = [left for left in mine if left.process == mine[0].process]   # its clusters
            mine = [left for left in mine if left not in run]
            jobs, unreached = _collect(run, timeout, cancel, access)
            if jobs or unreached:
                return jobs
        return []
    finally:
        for left in mine:
            left.close()


def _collect(lefts: Sequence[RecoverableFiles], timeout: Optional[float], cancel: bool,
             access: ConnectionSettings) -> Tuple[List[DispyJob], List[str]]:
    """The jobs of dead programs, and the nodes that have not answered. Lets go of `lefts`."""
    jobs: List[DispyJob] = []
    with gathering(lefts, access, cancel) as found:
        comps = _take(found, timeout)
        found.finish()
        for comp in comps:
            if not found.lefts[comp].over:
                jobs += _jobs_of(found, comp)
        for left in lefts:
            if left.comp in found.alive:
                logger.warning('%s: its program is still running, so that it is left '
                               'alone', left.row)
        unreached = found.unreached()
        if unreached:
            logger.warning('%s: these nodes could not be reached: %s. Their jobs and results can '
                           'be collected later',
                           lefts[0].row, ', '.join(unreached))
    return jobs, unreached


def _take(found: ResultCollection, timeout: Optional[float]) -> List[str]:
    """Collect what belongs to no program that lives; returns whose it is."""
    if timeout is None:
        until = math.inf
    else:
        until = time.monotonic() + timeout
    found.wait(lambda: not found.unreached(), min(REACH_TIME, until - time.monotonic()))
    comps = []
    for comp in found.lefts:
        if comp not in found.alive:
            comps.append(comp)
    found.driver.ask(lambda: found.take(comps))
    found.wait(found.is_through, None if timeout is None else max(0.0, until - time.monotonic()))
    return [comp for comp in comps if comp not in found.alive]


@contextlib.contextmanager
def gathering(lefts: Sequence[RecoverableFiles],
              access: ConnectionSettings,
              cancel: bool = False) -> Iterator[ResultCollection]:
    """Ask the nodes of dead programs. At the end those that have been emptied forget them, and so
    do we; others keep what they have."""
    found: ResultCollection = ResultCollection(lefts, cancel)
    whole: Set[str] = set()
    forgotten: Set[str] = set()
    try:
        driver = drivers.alone(access)
        try:
            driver.ask(lambda: found.begin(driver))
            yield found
            found.finish()
            whole = {comp for comp in found.lefts if found.is_whole(comp)}
            driver.ask(lambda: driver.recoveries.acknowledge(found, whole))
            found.wait(lambda: found.is_forgotten(whole), REACH_TIME)
            forgotten = {comp for comp in whole if found.is_forgotten([comp])}
        finally:
            with contextlib.suppress(RuntimeError):   # it has failed
                driver.ask(lambda: driver.recoveries.let_go(found, whole))
            drivers.release(driver)
    finally:
        for left in lefts:
            if left.comp in whole:
                if left.comp not in forgotten:
                    left.note_over()
            left.close(remove=left.comp in forgotten)


def _jobs_of(found: ResultCollection, comp: str) -> List[DispyJob]:
    """The jobs of a computation by what nodes have told of it, in order. Opens results, which may
    run the user's code."""
    left: RecoverableFiles = found.lefts[comp]
    jobs: Dict[int, DispyJob] = {}

    def job_of(number: int, serial: int = 0) -> DispyJob:
        job = jobs[number] = DispyJob(comp, None, None, number)
        job.serial = serial
        job.submit_time = left.row.began
        return job
    for (name, number), (row, address) in found.rows.items():
        if name == comp:
            job = job_of(number, row[0])
            job.ip_addr = address
            if row[1] == Outcome.STOPPED:
                job.state = JobState.ABANDONED
                end_without(job, 'abandoned: its node %s was stopped while it ran' % address)
            else:
                job.state = JOB_TABLE[JobState.RUNNING, _EVENT_OF[row[1]]]
                fill_in(job, row, left.is_program)
    going_on = found.numbers_there(comp)
    for (name, number), (state, text) in found.gone.items():
        if name == comp and number not in going_on:   # by another attempt
            job = job_of(number)
            job.state = state
            end_without(job, text)
    for (where, name), serials in found.there.items():
        for serial in serials if name == comp else ():
            if job_number(serial) not in jobs:
                waits = where.startswith('@') and not found.placed.get((comp, job_number(serial)))
                if waits:
                    job_of(job_number(serial), serial).status = DispyJob.Created
                else:
                    job_of(job_number(serial), serial).status = DispyJob.Running
    return [jobs[number] for number in sorted(jobs)]


def recoverable(timeout: float = REACH_TIME,
                secret: Union[str, bytes, None] = None,
                certfile: Optional[str] = None,
                keyfile: Optional[str] = None,
                cafile: Optional[str] = None) -> List[Recoverable]:
    """What programs of this user without a `recover_file` have left on nodes, when they were
    killed or ended by an exception before their jobs; newest first. Their nodes are asked, for at
    most `timeout` seconds; files of which no node knows anything any more are removed. Raises
    SecretError, TypeError, ValueError. Any thread."""
    seconds = _seconds('timeout', timeout)
    access = ConnectionSettings(find_secret(secret), *tls_files(certfile, keyfile, cafile), PULSE,
                                REDIAL_MOST)
    lefts = programs_left()
    rows = []
    if not lefts:
        return []
    with gathering(lefts, access) as found:
        found.wait(lambda: not found.unreached(), seconds)
        for left in lefts:
            if left.comp in found.alive:
                continue
            if left.over:
                continue
            if found.is_whole(left.comp):
                continue
            unreached = tuple(found.unreached(left.comp))
            if len(unreached) == len(left.places):
                jobs = None
            else:
                jobs = found.count(left.comp)
            row = left.row._replace(jobs=jobs, unreached=unreached)
            rows.append(row)
    return rows


def cancel_lost(access: ConnectionSettings) -> int:
    """End what programs of this user that have ended have left on nodes, and say so. Returns of
    how many of them something may be left. What belongs to a program that lives is left alone."""
    lefts = programs_left()
    if not lefts:
        print('none of your programs that have ended has left jobs on nodes')
        return 0
    with gathering(lefts, access, cancel=True) as found:
        before = {left.comp: 0 for left in lefts}
        found.wait(lambda: not found.unreached(), REACH_TIME)
        before.update((comp, found.count(comp)) for comp in before)
        _take(found, 3 * GRACE)
        rest = 0
        for left in lefts:
            if left.over:   # its program wanted nothing any more
                continue
            ended = ('%d jobs and results were found, and all of them are '
                     'removed') % before[left.comp]
            if left.comp in found.alive:
                ended = 'left alone, as its program is still running'
            elif not found.is_whole(left.comp):
                rest += 1
                unreached = found.unreached(left.comp)
                if unreached:
                    ended = 'not reached: %s' % ', '.join(unreached)
                else:
                    ended = '%d jobs have not ended yet' % found.count(left.comp)
            row = left.row
            message = '%s (%s) of %s, PID %d on %s: %s' % (
                row.script or 'a prompt', row.name, _moment(row.began), row.pid, row.host, ended)
            print(message)
    return min(rest, 100)


class RestoredJobs:
    """The jobs of a program that has crashed, as its journal knows them. Those that have ended are
    completed.

    jobs - all of them
    ended - those that have ended
    sent - those that were sent, and to which nodes
    unsent - the others
    holders - nodes that may keep results which are in the journal
    """

    def __init__(self, journal: Journal, rows: Sequence[tuple], is_program: bool) -> None:
        """`rows` are as of `Journal.known`. Raises DispyError."""
        self.jobs: List[DispyJob] = []
        self.ended: List[DispyJob] = []
        self.sent: List[Tuple[DispyJob, str]] = []
        self.unsent: List[DispyJob] = []
        with journal.damages():
            self.holders = journal.holders()
        for job, state, node, result in rows:
            self.jobs.append(job)
            if state == Journal.ENDED:
                self.ended.append(job)
                if isinstance(result, str):   # why it has no result
                    end_without(job, result)
                else:
                    fill_in(job, (job.serial, *result), is_program)
            elif state == Journal.SENT:
                job.state = JobState.RUNNING
                self.sent.append((job, node))
            else:
                self.unsent.append(job)

    @property
    def are_at_nodes(self) -> bool:
        """Whether nodes are to be asked."""
        return bool(self.sent or self.holders)


class JournalRecovery:
    """Collects the jobs of a program that has crashed for `recover_jobs`. The methods that begin
    with an underscore are called by the driver's thread."""

    def __init__(self, journal: Journal, cancel: bool, source: 'Drivers') -> None:
        """`source` is where its driver comes from."""
        self._journal = journal
        self._cancel = cancel
        self._drivers = source
        self._lock = threading.Lock()   # guards the jobs, and the list of those that have ended
        with journal.damages():
            self._is_program = journal.is_program()
            # Computations whose jobs may run again
            self._reentrant = {row[0] for row in journal.comps() if row[2]}
        self._restored = RestoredJobs(journal, journal.known(), self._is_program)

    def run(self, timeout: Optional[float], access: ConnectionSettings) -> List[DispyJob]:
        """Return the jobs when all has been collected, at the latest after `timeout` seconds."""
        restored = self._restored
        for job, node in restored.sent:
            job.status = DispyJob.Running
            if node.startswith('@'):   # a scheduler tells which of them are on a node
                job.status = DispyJob.Created
        if restored.are_at_nodes:
            self._collect(timeout, access)
        with self._lock:
            self._journal.delivered(restored.ended)
            return restored.jobs

    def _collect(self, timeout: Optional[float], access: ConnectionSettings) -> None:
        restored = self._restored
        driver = self._drivers.alone(access)
        try:
            over = driver.parts.event()
            recovery = Recovery(self._journal, restored.sent, restored.holders, self._done,
                                self._lost, self._wait_again, over.set, self._cancel, driver.parts)
            driver.ask(lambda: recovery.begin(driver))
            recovery.wait(over, timeout)
            is_whole = recovery.collected.is_set()
            driver.ask(lambda: driver.recoveries.give_up(recovery, is_whole))
        finally:
            self._drivers.release(driver)

    def _done(self, job: DispyJob, row: tuple, peer: NodeConnection) -> None:
        with self._lock:
            job.ip_addr = peer.ip_addr
            fill_in(job, row, self._is_program)
            self._restored.ended.append(job)

    def _lost(self, job: DispyJob, text: str) -> None:
        if job.comp in self._reentrant:
            if not self._cancel:
                self._wait_again(job)
                return
        with self._lock:
            job.state = JobState.ABANDONED
            end_without(job, text)
            self._restored.ended.append(job)

    def _wait_again(self, job: DispyJob) -> None:
        with self._lock:
            job.status = DispyJob.Created
            self._journal.waits(job)


class DiscoveryProbe:
    """Asks for nodes at one UDP port."""

    def __init__(self, ears: DiscoverySockets) -> None:
        self.ears = ears
        self.due = 0.0
        self.wait = ASK_FIRST
        self.last = 0.0


class _Owner:
    """Has a thing to which nobody else refers, to count the references that there are then."""

    def __init__(self) -> None:
        self.cluster = object()


class Unused:
    """Finds clusters to which no variable of the program refers any more, as in a notebook whose
    cell is run again. The driver's thread.

    The driver refers to each of its clusters, so that none ends by itself; it counts whether it is
    the only one. A cluster that has jobs, or one to which its own callback refers, is in use. When
    there is a later cluster of the same function, then that a notebook or prompt has shown the
    cluster (`Out[3]`, `_`) is no use of it.
    """
    EVERY = 2.0   # s

    def __init__(self) -> None:
        self._at = 0.0
        self._found: Set[str] = set()

    def look(self, clusters: Dict[str, Any], now: float) -> float:
        """Close those of them that are not used. Returns when to look again."""
        if now < self._at:
            return self._at
        self._at = now + self.EVERY
        self._found.intersection_update(clusters)
        for comp, core in list(clusters.items()):
            if comp in self._found:
                continue
            if not core.is_idle():
                continue
            if self._is_unused(core, clusters):
                self._found.add(comp)
                self._close(core.cluster)
        if clusters:
            return self._at
        return math.inf

    def _is_unused(self, core: 'ProgramCluster', clusters: Dict[str, Any]) -> bool:
        """Whether nobody but the driver refers to a JobCluster, through what it knows of it."""
        if core.cluster is None:   # it is being closed
            return False
        shown = 0
        if core.is_replaced(clusters.values()):
            shown = references_of_history(core.cluster)
        unused = self._references(core) <= self._references(_Owner()) + shown
        if unused and shown:   # it may have been shown anew meanwhile
            unused = shown == references_of_history(core.cluster)
        return unused

    @staticmethod
    def _close(cluster: 'JobCluster') -> None:
        logger.info('%s: nothing in the program refers to this cluster any more, and it has no '
                    'jobs: it is closed', cluster.name)
        thread = threading.Thread(target=cluster.close, name='dispy-close', daemon=True)
        thread.start()

    @staticmethod
    def _references(owner: Any) -> int:
        value = owner.cluster
        return sys.getrefcount(value)


class Misfits:
    """Nodes that have answered when all were asked, and that are not meant by the wildcards of a
    cluster. Driver thread only."""
    KEPT = 1000   # nodes of a cluster
    SHOWN = 10

    def __init__(self) -> None:
        # Computation -> instance -> address, or name and address
        self._found: Dict[str, Dict[bytes, str]] = {}

    def add(self, comp: str, instance: bytes, node: str) -> None:
        """One that answers. By its name, if that is known, and else by the first of its
        addresses."""
        found = self._found.setdefault(comp, {})
        if len(found) >= self.KEPT:
            return
        if instance not in found or '(' in node:
            found[instance] = node

    def forget(self, comp: str) -> None:
        """The cluster is closed."""
        self._found.pop(comp, None)

    def text(self, comp: str, used: Container[bytes]) -> str:
        """These nodes, without the instances that are used by another of their addresses."""
        chosen_nodes = []
        for instance, node in self._found.get(comp, {}).items():
            if instance not in used:
                chosen_nodes.append(node)
        nodes = sorted(chosen_nodes)
        more = len(nodes) - self.SHOWN
        return ', '.join(nodes[:self.SHOWN]) + (' and %d more' % more if more > 0 else '')


def remedy(attempts: Sequence[Tuple[str, int, bool]], others: bool, start: str = START_NODE) -> str:
    """What to do where a cluster has no node that can be used, of (state, port, whether it is a
    scheduler) of each that was tried; `others`: nodes have answered that were not meant; `start`:
    where none has answered. The reason of a node that has answered says it itself."""
    if others:
        return 'Name one of these, or correct the wildcard (nodes=, at the shell -n)'
    if any(scheduler and state not in NOT_CONNECTED for state, _, scheduler in attempts):
        return ('The scheduler is connected and has no node for it: run `python dispynode.py` on a '
                'host that has the same secret, and list that host at the scheduler (-n)')
    silent = []
    for state, port, scheduler in attempts:
        if state in SILENT:
            silent.append((Unreached(state), port, scheduler))
    states = [state for state, _, _ in attempts if state not in NOT_TRIED]
    if len(silent) < len(states):
        return ''   # somebody has answered
    return _remedy_for_silence(silent, start)


def _remedy_for_silence(silent: Sequence[Tuple[Unreached, int, bool]], start: str) -> str:
    """What to do where nobody has answered, of (why, port, whether it is a scheduler) of each."""
    words = []
    down = {scheduler for why, _, scheduler in silent if why is Unreached.DOWN}
    if True in down:
        words.append('Run `python dispyscheduler.py` there, with the same secret')
    if False in down or not silent:
        words.append(start)
    chosen_ports = set()
    for why, port, _ in silent:
        if why is Unreached.UNREACHABLE and port:
            chosen_ports.add(port)
    ports = sorted(chosen_ports)
    if ports:
        word = ('If a host does not answer, check that it is running and that its firewall accepts '
                'TCP port %s' % ' and '.join(map(str, ports)))
        words.append(word)
    if any(why in (Unreached.NO_SUCH_NAME, Unreached.NAME_SERVICE) for why, _, _ in silent):
        words.append('Correct a name that does not resolve, or give the address instead')
    return '. '.join(words)


class NodeTable:
    """The nodes that a driver knows. The driver's thread."""

    def __init__(self) -> None:
        self.by_key: Dict[Any, NodeConnection] = {}
        self.by_link: Dict[int, NodeConnection] = {}       # those that are connected
        # Instance or address -> one that cannot be used, and is no node that was named
        self.unusable: Dict[Any, NodeConnection] = {}
        self.misfits = Misfits()

    def of(self, comp: str) -> List[NodeConnection]:
        """Return the nodes of a cluster."""
        peers: List[NodeConnection] = []
        for peer in self.by_key.values():
            if comp in peer.uses:
                peers.append(peer)
        return peers

    def find(self, comp: str, node: Any) -> NodeConnection:
        """The node that a user's word means. Raises ValueError naming those there are."""
        if node is None:
            if len(self.of(comp)) == 1:
                return self.of(comp)[0]
        found = []
        for peer in self.of(comp):
            if peer.is_meant(node):
                found.append(peer)
        if len(found) != 1:
            message = '%s %.80r; this cluster knows %s' % (
                'no node is' if not found else 'several nodes are', node,
                ', '.join(sorted(map(str, self.of(comp)))) or 'none')
            raise ValueError(message)
        return found[0]

    def has(self, peer: NodeConnection) -> bool:
        """Whether a node is still one of these, under its key."""
        return self.by_key.get(peer.key) is peer

    def heard_before(self, instance: bytes, address: Tuple[str, int]) -> Optional[NodeConnection]:
        """The node that an answer to a broadcast comes from, if it is known."""
        for peer in self.by_key.values():
            if peer.instance == instance:
                return peer
            if peer.key == address:
                return peer
        return None

    def linked_to(self, instance: bytes) -> List[NodeConnection]:
        """Nodes that are connected to this instance."""
        peers: List[NodeConnection] = []
        for peer in self.by_key.values():
            if peer.link is None:
                continue
            if peer.link.instance == instance:
                peers.append(peer)
        return peers

    def twin_of(self, peer: NodeConnection, instance: bytes) -> Optional[NodeConnection]:
        """Another node that is connected, and is the same instance."""
        for other in self.linked_to(instance):
            if other is not peer:
                return other
        return None

    def away_with(self, instance: bytes) -> List[NodeConnection]:
        """Nodes that are not connected and were this instance, without the embedded one."""
        peers: List[NodeConnection] = []
        for peer in self.by_key.values():
            if peer.instance != instance:
                continue
            if peer.link is not None:
                continue
            if not peer.embedded:
                peers.append(peer)
        return peers

    def dialling_from(self, address: str) -> List[NodeConnection]:
        """Nodes that connect by themselves, from this address."""
        peers: List[NodeConnection] = []
        for peer in self.by_key.values():
            if peer.port:
                continue
            if peer.ip_addr == address:
                peers.append(peer)
        return peers

    def move(self, peer: NodeConnection, host: str, port: int) -> None:
        """A node is known by another address from now on."""
        del self.by_key[peer.key]
        peer.host = host
        peer.ip_addr = host
        peer.key = (host, port)
        self.by_key[peer.key] = peer

    def words_of(self, comp: str) -> Dict[str, List[NodeConnection]]:
        """Nodes of a cluster by their names and addresses, so that a list of thousands is not
        compared with itself."""
        found: Dict[str, List[NodeConnection]] = {}
        for peer in self.of(comp):
            for word in {
                    _plain_host(word)
                    for word in (peer.ip_addr, peer.host, peer.name) if word
            }:
                found.setdefault(word, []).append(peer)
        return found

    def add_unusable(self, key: Any, address: str, text: str) -> None:
        """One that cannot be used, and is no node that was named: said once."""
        if key in self.unusable:
            return
        if len(self.unusable) >= 1000:
            return
        unusable = self.unusable.values()
        known = {(peer.host, peer.reason) for peer in unusable}
        peer = self.unusable[key] = NodeConnection(address, 0)
        peer.reason = text
        if (address, text) not in known:   # a host may have many of them
            # Another user's node on this machine is no reason to worry.
            if is_own_address(address):
                level = logging.INFO
            else:
                level = logging.WARNING
            logger.log(level, '%s cannot be used: %s', address, text)


class NodeSearch:
    """Asks for nodes by UDP, and has those used that answer. The driver's thread."""

    def __init__(self, driver: 'Driver', psk: bytes) -> None:
        self._driver = driver
        self._nodes = driver.nodes
        self._clusters = driver.clusters
        self._psk = psk
        self.reach = discovery_reach()               # how far nodes are asked for
        self._discovery = Discovery(psk, Role.CLIENT, driver.instance)
        # (UDP port, multicast) -> who asks there
        self._ears: Dict[Tuple[int, bool], DiscoveryProbe] = {}

    def begin(self, port: int, multicast: bool) -> None:
        """Ask for nodes at a UDP port, often at first, then every ping_interval."""
        asker = self._ears.get((port, multicast))
        if asker is None:
            # Answers come to a port of our own; at the nodes' port those are heard that start
            # later.
            discovery_sockets = DiscoverySockets(self._driver, self.reach, (port, ), (0, port),
                                                 self._hear, multicast)
            asker = self._ears[port, multicast] = DiscoveryProbe(discovery_sockets)
        asker.due = self._driver.now
        asker.wait = ASK_FIRST

    def is_at(self, port: int) -> bool:
        """Whether nodes are asked for at a UDP port."""
        for asked, _ in self._ears:
            if asked == port:
                return True
        return False

    def end_unwanted(self) -> None:
        """Do not ask any more where no cluster needs it."""
        clusters = self._clusters.values()
        wanted = set()
        for other in clusters:
            for spec in other.specs:
                if spec.wild:
                    wanted.add((spec.port, other.multicast))
        for key in set(self._ears) - wanted:
            self._ears.pop(key).ears.close()

    def ask_when_due(self, due: List[float]) -> None:
        """Ask for nodes; appends when to do so next."""
        for asker in self._ears.values():
            if self._driver.now >= asker.due:
                asker.ears.broadcast(lambda: self._discovery.build(DatagramType.QUESTION))
                asker.last = self._driver.now
                asker.due = self._driver.now + asker.wait
                asker.wait = min(2 * asker.wait, self._driver.access.redial)
            due.append(asker.due)

    def _hear(self, data: bytes, source: str, reply: Callable[[bytes], None]) -> None:
        """A datagram. What it says is a hint: the node is dialled, and the handshake decides."""
        heard, _ = self._discovery.parse(data, source, self._driver.now)
        if heard is None:
            return
        if heard.kind == DatagramType.NOT_MINE:
            self._nodes.add_unusable(
                heard.instance, source,
                'its node has another secret (port %d): %s' % (heard.port, same_secret(self._psk)))
            return
        if heard.kind == DatagramType.HELLO:
            self._ask_soon()
            return
        host = heard.address or source
        for comp, cluster in list(self._clusters.items()):
            spec = next((spec for spec in cluster.specs if spec.wild and spec.may_fit(host)), None)
            if spec is not None:
                self._use_found(comp, spec, heard, host)
            elif any(spec.wild for spec in cluster.specs):
                self._nodes.misfits.add(comp, heard.instance, format_address(host, heard.port))
        self._driver.soon()

    def _ask_soon(self) -> None:
        """A node has started. Which of its addresses is best depends on who asks."""
        for asker in self._ears.values():
            asker.due = min(asker.due, max(self._driver.now, asker.last + ASK_FIRST))
        self._driver.soon()

    def _use_found(self, comp: str, spec: NodeSpec, heard: Datagram, host: str) -> None:
        """A node that a computation may use says that it is there."""
        port = heard.port
        instance = heard.instance
        now = self._driver.now
        known = self._nodes.heard_before(instance, (host, port))
        if known is None:
            known = self._driver.selection.use_address(comp, host, port, spec, False)
            if ':' in host:
                known.dialling.due = now + IPV6_LATER
            else:
                known.dialling.due = now
        elif known.link is not None:
            self._driver.selection.consider(known, comp)
        else:
            if known.is_better_called(host):
                self._nodes.move(known, host, port)
                known.dialling.due = now
            is_back = known.instance != instance or known.state is NodeState.LOST
            if is_back and not known.dialling.busy:
                known.dialling.due = now
            self._driver.selection.take(known, comp, spec)
        known.instance = instance
        known.heard = now

    def close(self) -> None:
        """Stop asking everywhere."""
        for asker in self._ears.values():
            asker.ears.close()

    def sockets(self) -> List[Any]:
        """Those by which nodes are asked for."""
        ears = self._ears.values()
        sockets: List[Any] = []
        for asker in ears:
            for ear in asker.ears.ears:
                sockets.append(ear.socket)
        return sockets


class Connector:
    """Connects to nodes: dials, lets nodes dial, and starts one here. The driver's thread."""

    def __init__(self, driver: 'Driver', psk: bytes, tls: Any) -> None:
        self._driver = driver
        self._nodes = driver.nodes
        self._clusters = driver.clusters
        self._psk = psk
        self._tls = tls
        self.searches = NodeSearch(driver, psk)
        self._acceptors: Dict[Tuple[str, int], Acceptor] = {}        # where nodes may dial
        self._dials: Set[NodeConnection] = set()               # with a dial thread at work

    def _on_rejected(self, address: str, text: str) -> None:
        """A gate's thread: a node that dialled us was refused."""
        message = 'its connection was rejected: ' + text
        self._driver.call_soon(self._nodes.add_unusable, address, address, message)

    def listen(self, host: str, port: int, may_fail: bool) -> None:
        """Let nodes connect to us (--scheduler-host). Raises OSError; if it may fail, a port that
        is taken is no error."""
        if (host, port) not in self._acceptors:
            access = self._driver.access
            try:
                gate = Acceptor((host, port), self._psk, Role.SCHEDULER, (Role.NODE, ),
                                self._driver.instance, self._driver.post,
                                access.certfile, access.keyfile, access.cafile,
                                refused=self._on_rejected)
            except OSError as exc:
                taken = exc.errno == errno.EADDRINUSE
                if not taken or not may_fail:
                    raise OSError(
                        exc.errno,
                        'nodes cannot connect to %s: %s (host=%r: an address of this host, or '
                        'ADDRESS:PORT)'
                        %
                        (format_address(host, port),
                         'another program has that port' if taken else exc.strerror, host)) from exc
                logger.warning(
                    'port %d is taken by another program, so that nodes cannot connect to this '
                    'one, which still connects to nodes (host=%r; ADDRESS:PORT gives '
                    'another port)', port, host)
                return
            self._acceptors[host, port] = gate
            self._driver.add_reader(gate.socket, gate.on_readable)

    def listens_at(self, host: str, port: int) -> bool:
        """Whether nodes can connect there."""
        return (host, port) in self._acceptors

    def end_listening(self, cluster: NodeUser) -> None:
        """A cluster is closed: where no other lets nodes connect, they cannot any more."""
        for where in cluster.hosts:
            clusters = self._clusters.values()
            if any(where in other.hosts for other in clusters):
                continue
            gate = self._acceptors.pop(where, None)
            if gate is not None:   # else its port was taken
                self._driver.remove_reader(gate.socket)
                gate.server_close()

    def dial_when_due(self, due: List[float]) -> None:
        """Dial nodes; appends when to do so next."""
        for peer in self._nodes.by_key.values():
            when = peer.dialling.due
            if when is not None and when <= self._driver.now and peer.state in _MAY_DIAL:
                # Each takes a thread and a descriptor; those that end make place for others
                if len(self._dials) < DIALS_MOST:
                    self._dial(peer)
            elif when is not None:
                if peer.state in _MAY_DIAL:
                    due.append(when)

    def _dial(self, peer: NodeConnection) -> None:
        peer.move('dial')
        if peer.embedded and IN_PROGRAM:
            self._start_local(peer)
            return
        self._dials.add(peer)
        patience = peer.dialling.patience(self._driver.now, self._driver.access.pulse, peer.trip)
        self._tried(peer, TRY_TIMES * patience)
        reach = functools.partial(self._reach_peer, peer, patience=patience)
        peer.dialling.start(self._driver.post, peer, reach, self._driver.parts.attempt)

    def _start_local(self, peer: NodeConnection) -> None:
        """Start the node of this program. There is no thread, as nothing is waited for."""
        peer.dialling.due = None
        try:
            peer.end_process()
            peer.local = EmbeddedNode(self._driver)
        except (DispyError, OSError) as exc:
            self.dial_failed(failure_to_connect(peer, exc))
            return
        self._connected(peer, peer.local.link)
        peer.local.connect()
        self._driver.openers.run(remove_abandoned_directories)

    @property
    def local(self) -> Optional[EmbeddedNode]:
        """The node of this program, if it has been started."""
        peer = self._nodes.by_key.get(LOCAL)
        if peer is not None:
            return peer.local
        return None

    def _tried(self, peer: NodeConnection, lasts: float) -> None:
        """What is on a node that is away is not lost for so many s: it is tried to reach it."""
        until = self._driver.now + lasts
        self._driver.decide(NodeTried(peer.key, until))

    def _reach_peer(self,
                    peer: NodeConnection,
                    note: Callable[[Any], None],
                    patience: float = HANDSHAKE_TIME) -> Authenticated:
        """Connect to a node, in the thread that dials."""
        if not peer.embedded:
            if peer.scheduler:
                wanted = Role.SCHEDULER
            else:
                wanted = Role.NODE
            return dial(peer.host, peer.port, self._psk, Role.CLIENT, wanted,
                        self._driver.instance, self._tls, note, patience,
                        self._driver.policy.addresses_of(peer), peer.segment)
        peer.end_process()
        peer.process, port, psk = _start_embedded(peer)
        return dial(peer.host, port, psk, Role.CLIENT, Role.NODE, self._driver.instance, None, note)

    def dialled(self, event: Connected) -> None:
        peer = event.peer
        if isinstance(peer, SecondConnection):
            self._second_reached(event)
            return
        self._dials.discard(peer)
        self._driver.soon()   # others may wait to be dialled
        peer.dialling.ended()
        self._tried(peer, 0.0)
        if peer.state is not NodeState.DIALLING:
            event.sock.close()
            return
        instance = event.session.peer_instance
        twin = self._nodes.twin_of(peer, instance)
        if twin is not None:   # one node by two names or addresses: one link is enough
            event.sock.close()
            self._keep_twin(peer, twin)
            return
        elder = self._elder_of(peer, instance)
        if elder is not None:   # one node by two names: its jobs are known by the other
            self._merge_into_elder(peer, elder)
            peer = elder
        self._connected(peer, self._link_of(event))

    def _link_of(self, event: Any) -> Link:
        """The link that a connection becomes."""
        make = self._driver.parts.link
        return make(event.sock, event.session, event.address, self._driver.now,
                    self._driver.access.pulse, OF_NODES)

    def _keep_twin(self, peer: NodeConnection, twin: NodeConnection) -> None:
        """A node was dialled that is connected by another name: what was to use it uses that."""
        twin.aliases.add(peer.place)
        for comp, use in peer.uses.items():
            known = comp in twin.uses
            self._driver.selection.take(twin, comp, use.spec)
            if not known or not twin.name:
                continue
            if self._clusters[comp].cargo is None:
                # It may look for something by this name.
                self._clusters[comp].node_connected(twin)
        # It has dialled us; when that ends, we dial it
        if peer.listed and not twin.port and not twin.embedded:
            peer.move('fail')
            peer.reason = 'it has connected by itself'
            peer.dialling.again(self._driver.now)
            self._driver.soon()
            return
        twin.listed = twin.listed or peer.listed
        peer.uses.clear()
        self._driver.selection.drop_unused(peer)

    def _elder_of(self, peer: NodeConnection, instance: bytes) -> Optional[NodeConnection]:
        """A node that is not connected, has jobs, and is the same as one that was just reached."""
        for other in self._nodes.away_with(instance):
            if other is peer:
                continue
            if other.key in self._driver.schedule.nodes:
                return other
        return None

    def _merge_into_elder(self, peer: NodeConnection, elder: NodeConnection) -> None:
        for comp, use in peer.uses.items():
            self._driver.selection.take(elder, comp, use.spec)
        elder.listed = elder.listed or peer.listed
        if not elder.port:
            elder.host = peer.host
            elder.port = peer.port
        peer.uses.clear()
        self._driver.selection.drop_unused(peer)

    def _connected(self, peer: NodeConnection, link: Link) -> None:
        peer.move('connect')
        peer.failures = 0
        peer.probed = False
        peer.restarted = bool(peer.instance) and peer.instance != link.instance
        peer.instance = link.instance
        peer.ip_addr = link.address
        peer.reason = ''
        peer.link = link
        peer.linked_at = self._driver.now
        self._driver.attach(peer.link)
        self._nodes.by_link[peer.link.number] = peer
        # It is about to tell what it holds
        lasts = PULSES_LOST * self._driver.access.pulse
        self._tried(peer, lasts)
        policy = self._driver.policy
        hello = ClientHello(policy.introduction(), self._driver.access.pulse, policy.process())
        self._driver.send(peer.link, hello)

    def arrived(self, event: Authenticated) -> None:
        """A node has dialled."""
        instance = event.session.peer_instance
        for other in self._nodes.linked_to(instance):
            if other.port or other.embedded:   # we have dialled it
                self._send_away(event)
                return
            text = 'the node has connected again'
            self._driver.break_link(other.link, text)  # type: ignore[arg-type]
        peer = self._known_arrival(instance, event.address)
        if peer is None:
            peer = NodeConnection(event.address, 0)
            peer.key = instance.hex()
            peer.dialling.due = None
            self._nodes.by_key[peer.key] = peer
        self._connected(peer, self._link_of(event))

    def _send_away(self, event: Authenticated) -> None:
        """A node has dialled that is connected."""
        link = self._link_of(event)
        self._driver.attach(link)
        self._driver.disconnect(link, 'this program has connected to it already')

    def _known_arrival(self, instance: bytes, address: str) -> Optional[NodeConnection]:
        """The node that has dialled, if it was here before."""
        for other in self._nodes.away_with(instance):
            if not other.port:
                return other
            if other.key in self._driver.schedule.nodes:
                return other
        there = self._nodes.dialling_from(address)
        # Of several behind one address it may be another
        if len(there) == 1:
            if there[0].link is None:
                if not there[0].embedded:
                    return there[0]
        return None

    def try_second(self, link: Link) -> None:
        """Dial a node that is silent once more. What dials us does so itself."""
        peer = self._nodes.by_link.get(link.number)
        if peer is not None and peer.port:
            patience = max(1.0, link.pulse)
            reach = functools.partial(self._reach_peer, peer, patience=patience)
            peer.second.start(self._driver.now, self._driver.post, reach,
                              self._driver.parts.attempt)

    def _second_reached(self, event: Connected) -> None:
        """It takes the place of a link that is silent still, or has come to its end for that."""
        peer = event.peer.peer
        event.peer.ended()
        old = peer.link
        if old is None:
            is_wanted = peer.state in _MAY_DIAL
        else:
            is_wanted = self._driver.is_silent(old)
        if not is_wanted or not self._nodes.has(peer):
            event.sock.close()
            return
        if old is not None:
            logger.info('%s: nothing was received for %.1f s, and a new connection was made', peer,
                        self._driver.now - old.heard)
            peer.replacing = True
            self._driver.break_link(old, 'a new connection was made')
            peer.replacing = False
        if not self._nodes.has(peer):   # nobody wants it any more
            event.sock.close()
            return
        peer.move('dial')
        peer.dialling.due = None
        self._connected(peer, self._link_of(event))

    def dial_failed(self, event: ConnectFailed) -> None:
        peer = event.peer
        if isinstance(peer, SecondConnection):
            self._driver.second_failed(peer, peer.peer.link)
            return
        self._dials.discard(peer)
        self._driver.soon()   # as above
        peer.dialling.ended()
        self._tried(peer, 0.0)
        if peer.state is not NodeState.DIALLING:
            return
        peer.move('fail')
        peer.failures += 1
        peer.unreached = event.why
        self.not_reached(peer, event.text, failing=event.failing)
        if peer.key in self._driver.schedule.nodes:
            evidence = self._evidence_of(peer, event)
            self._driver.lost_nodes.doubt(evidence)
        if self.is_forgotten(peer):
            self.forget(peer)

    def is_forgotten(self, peer: NodeConnection) -> bool:
        """Whether a node that cannot be reached is not tried any more: one that was found and not
        named, and does not answer by UDP either. Not while jobs are there that may come back."""
        if peer.listed:
            return False
        lost = self._driver.schedule.lost_at(peer.key)
        if lost < math.inf:
            return False
        silent = self._driver.now - peer.heard > 2 * self._driver.access.redial
        return peer.failures >= FOUND_FAILURES and silent or self._only_probed(peer)

    def _evidence_of(self, peer: NodeConnection, event: ConnectFailed) -> NodeDoubted:
        """A node cannot be reached. Where nothing listens and it was on this machine, its lock file
        tells whether its process has ended."""
        unreached = NodeDoubted(peer.key, str(peer), Evidence.UNREACHED, event.text, peer.kind)
        if event.why is not Unreached.DOWN:
            return unreached
        if peer.scheduler:
            return unreached
        lock = peer.facts.get('lock')
        remains = DirectoryRemains(lock, peer.instance)
        if not remains.has_ended():
            return unreached
        known = {}
        for comp in self._driver.schedule.nodes[peer.key].comps:
            kept = frozenset(remains.kept(comp))
            past = remains.past(comp, peer.memory)
            known[comp] = Account(kept, past)
        return NodeDoubted(peer.key,
                           str(peer),
                           Evidence.PROCESS_ENDED,
                           'its process has ended',
                           peer.kind,
                           known=known)

    def forget(self, peer: NodeConnection) -> None:
        """One that was found and not named cannot be reached: it is found again when it is there
        again."""
        peer.uses.clear()
        self._driver.selection.drop_unused(peer)

    def not_reached(self, peer: NodeConnection, text: str, lived: float = 0.0,
                    line: str = '', failing: Failing = Failing.OTHERWISE) -> None:
        """Say why, once for each reason, in this line if there is one, and try again later."""
        # One that closes at once refuses this address for a while, for the reason that was told
        if failing is not Failing.CLOSED or not peer.told:
            self._tell_not_reached(peer, text, line, failing)
        peer.dialling.again(self._driver.now, lived, self._driver.access.pulse)
        lost = self._driver.schedule.lost_at(peer.key)
        last = lost - LAST_TRY
        due = peer.dialling.due
        if due is not None:
            if self._driver.now < last < due:
                peer.dialling.due = last
        self._driver.soon()

    def _tell_not_reached(self, peer: NodeConnection, text: str, line: str,
                          failing: Failing) -> None:
        if peer.scheduler:
            text = text.replace('a dispynode 5',
                                'a dispyscheduler 5 (its port is 9702, that of a dispynode 9701)')
        peer.reason = text
        about = text if failing is Failing.OTHERWISE else failing
        if about in peer.told:
            return
        if peer.replacing:
            return
        if self._only_probed(peer):
            return
        peer.told.add(about)
        if not line:
            line = '%s%s cannot be used: %s' % ('' if peer.scheduler else 'node ', peer, text)
        logger.warning('%s', line)
        for cluster in [self._clusters[comp] for comp in peer.uses if comp in self._clusters]:
            cluster.node_unreachable(peer, text)

    @staticmethod
    def _only_probed(peer: NodeConnection) -> bool:
        return peer.probed and not peer.listed

    def close(self) -> None:
        """End all searches, attempts and processes of nodes."""
        for gate in self._acceptors.values():
            gate.server_close()
        self.searches.close()
        # Also those that no cluster uses any more
        for peer in {*self._dials, *self._nodes.by_key.values()}:
            peer.dialling.abort(peer.embedded)
            peer.second.abort()
            peer.end_process()

    def sockets(self) -> List[Any]:
        """Return all sockets that listen."""
        sockets = []
        for gate in self._acceptors.values():
            sockets.append(gate.socket)
        return sockets + self.searches.sockets()


def _is_named_by(spec: NodeSpec, peer: NodeConnection, port: int) -> bool:
    """Whether a node is one of those that were named; `port` is the cluster's, which stands for
    that of a node which was named without one."""
    if spec.wild and spec.fits(peer.ip_addr, peer.host, peer.name):
        return True
    if not peer.is_meant(spec.host):
        return False
    if peer.port in (0, spec.port):
        return True
    return (peer.name, port) == (spec.host, spec.port)


class NodeSelection:
    """Which nodes each cluster uses, with how many CPUs. The driver's thread."""

    def __init__(self, driver: 'Driver') -> None:
        self._driver = driver
        self._nodes = driver.nodes
        self._clusters = driver.clusters
        self.probes: Dict[str, float] = {}           # computation -> when to start an embedded node

    def use(self, comp: str, specs: Sequence[NodeSpec]) -> None:
        """Look for nodes: dial those named, ask for those meant by wildcards."""
        for spec in specs:
            if spec.wild:
                for peer in list(self._nodes.by_key.values()):
                    if peer.link is not None:
                        self.consider(peer, comp)
                if self._clusters[comp].searches:
                    self._driver.connector.searches.begin(spec.port, self._clusters[comp].multicast)
            else:
                self.use_address(comp, spec.host, spec.port, spec, True)
        self._driver.soon()

    def use_address(self, comp: str, host: str, port: int, spec: NodeSpec,
                    listed: bool) -> NodeConnection:
        """A cluster may use the node at an address; `listed`: because it names it."""
        peer = self._nodes.by_key.get(('scheduler', host, port) if spec.scheduler else (host, port))
        if peer is None:
            peer = NodeConnection(host, port, self._driver.access.redial, scheduler=spec.scheduler)
            self._nodes.by_key[peer.key] = peer
        peer.listed = peer.listed or listed
        self.take(peer, comp, spec)
        return peer

    def take(self, peer: NodeConnection, comp: str, spec: NodeSpec) -> None:
        """A cluster may use a node."""
        if comp not in peer.uses:
            peer.uses[comp] = NodeAssignment(spec)
            self._driver.setup.set_up(peer, comp)
        self._driver.soon()

    def consider(self, peer: NodeConnection, comp: str) -> None:
        """Use a connected node if this cluster's specs mean it."""
        spec = self._clusters[comp].spec_of(peer)
        if spec is None:
            return
        if not peer.embedded:
            self.take(peer, comp, spec)

    def use_embedded(self, comp: str) -> None:
        """A node of this program's own, for all its clusters of this driver."""
        if self.probes.pop(comp, None) is not None:
            if any(peer.uses[comp].offered for peer in self._nodes.of(comp)):
                return   # a dispynode has answered meanwhile
            logger.info(
                'no dispynode answers, so that one is started on this machine for this program '
                '(nodes=%r does that without a search)',
                LOCAL)
        node_connection = NodeConnection('127.0.0.1', 0, self._driver.access.redial, True, True)
        peer = self._nodes.by_key.setdefault(LOCAL, node_connection)
        most = self._clusters[comp].cpus_in_all()
        if comp not in peer.uses and most is not None:   # also if the machine has fewer CPUs
            node_spec = NodeSpec('127.0.0.1', 0)
            peer.uses[comp] = NodeAssignment(node_spec)
            peer.uses[comp].allocation = Allocation(most, b'', [], {})
            self._driver.setup.set_up(peer, comp)
        self.take(peer, comp, NodeSpec('127.0.0.1', 0))

    def start_embedded_when_due(self, due: List[float]) -> None:
        """Start a node here where none has answered; appends when to do so next."""
        for comp, when in list(self.probes.items()):
            if self._driver.now >= when:
                self.use_embedded(comp)
            else:
                due.append(when)

    def done(self, peer: NodeConnection, comp: str, shutdown: bool = False) -> None:
        """Tell a node that a computation is over there, and that it may end."""
        if peer.uses[comp].offered and peer.link is not None:
            peer.link.abandon(comp)
            if shutdown:
                self._driver.send(peer.link, Shutdown(comp))
            self._driver.send(peer.link, Done(comp))
        for key in [key for key in peer.answers if key[0] == comp]:
            answer = peer.answers.pop(key)
            answer.set_exception(RuntimeError('the computation is not at node %s any more' % peer))

    def drop_unused(self, peer: NodeConnection) -> None:
        """When no cluster uses a node any more, the next client may have it."""
        if peer.uses or peer.embedded:
            return
        self._nodes.by_key.pop(peer.key, None)
        peer.move('close')
        if peer.link is not None:
            link = peer.link
            self._driver.disconnect(link, 'no cluster uses this node any more')
            self.unlink(peer, link)

    def unlink(self, peer: NodeConnection, link: Link) -> None:
        """A link is over: forget all that went along it."""
        del self._nodes.by_link[link.number]
        peer.count_link()
        peer.link = None
        for comp, serials in self._driver.jobs.outgoing.drop(peer):   # it never left
            event = NodeReturned(peer.key, comp, serials)
            self._driver.decide(event)
        for use in peer.uses.values():
            use.move('lost')
            use.allocation = None
            use.then = ''
            use.acks.clear()
        for (_, what), future in peer.answers.items():
            # A scheduler is asked once more
            if what.startswith('call '):
                kind: Type[Exception] = ConnectionError
            else:
                kind = RuntimeError
            future.set_exception(kind('the connection to %s has ended' % peer))
        peer.answers.clear()
        self._driver.files.abort(lambda number, comp: number == link.number)

    def set_cpus(self, comp: str, peer: NodeConnection, cpus: Optional[int]) -> int:
        """Limit a cluster's CPUs of a node; None: as at first. Returns how many these are now."""
        use = peer.uses[comp]
        if cpus is not None:
            if cpus > peer.offered > 0:
                if not peer.embedded:
                    message = 'cpus=%d: node %s offers %d' % (cpus, peer, peer.offered)
                    raise ValueError(message)
        use.wanted = cpus
        if use.state is AssignmentState.READY and not use.then:
            limit = self.tell_limit(peer, comp)
            self._driver.decide(
                NodeOffers(peer.key, comp, limit) if limit else NodeDrains(peer.key, comp))
        elif use.state is AssignmentState.REFUSED:
            if cpus != 0:
                self._driver.setup.set_up(peer, comp)
        return peer.limit(comp)

    def tell_limit(self, peer: NodeConnection, comp: str) -> int:
        """The CPUs of a node that a computation may use; the node, which has more jobs than it
        runs, is told as well."""
        limit = peer.limit(comp)
        if limit and peer.link is not None:
            self._driver.send(peer.link, Limit(comp, limit))
        return limit

    def limit_node(self, action: LimitNode) -> None:
        """The Schedule has limited what a computation may use of a node."""
        peer = self._nodes.by_key.get(action.node)
        if not action.cpus:
            return
        if peer is None:
            return
        if peer.link is not None:
            message = Limit(action.comp, action.cpus)
            self._driver.send(peer.link, message)

    def leave(self, comp: str, node: Any, then: str, at_once: bool) -> None:
        """Stop using a node ('close') or set it up anew ('open'), when its jobs have ended or at
        once."""
        peer = self._nodes.find(comp, node)
        use = peer.uses[comp]
        if use.state is AssignmentState.READY and not at_once:
            use.then = then
            self._driver.decide(NodeDrains(peer.key, comp))
        else:
            self._left(peer, comp, then)

    def drained(self, action: NodeDrained) -> None:
        """The last job of a computation has ended at a node that it leaves."""
        comp = action.comp
        peer = self._nodes.by_key.get(action.node)
        if peer is None:
            return
        if comp in peer.uses:
            if peer.uses[comp].then:
                use_then = peer.uses[comp].then
                self._left(peer, comp, use_then)
        self._driver.policy.node_drained(peer)

    def _left(self, peer: NodeConnection, comp: str, then: str) -> None:
        use = peer.uses[comp]
        use.then = ''
        if use.state is AssignmentState.READY:
            self._driver.tell_all(DispyNode.Closed, peer, [comp])
        self.done(peer, comp)
        event = NodeLeft(peer.key, comp, str(peer), 'it was closed by the program')
        self._driver.decide(event)
        if then == 'close':
            use.move('close')
            use.reason = 'closed by the program'
        elif use.state is not AssignmentState.CLOSED:
            # To be set up anew; the node says 'closing' until its cleanup has run, and is asked
            # again
            use.move('lost')
            self._driver.setup.set_up(peer, comp)
        self._driver.policy.node_freed(peer)

    def allocate(self, comp: str, specs: Sequence[NodeSpec]) -> None:
        """Use these nodes, new ones and those deallocated or closed before."""
        cluster = self._clusters[comp]
        words = self._nodes.words_of(comp)
        for spec in specs:
            if spec.wild:
                candidates: Sequence[NodeConnection] = self._nodes.of(comp)
            else:
                candidates = words.get(_plain_host(spec.host), ())
            known = [peer for peer in candidates if _is_named_by(spec, peer, cluster.port)]
            for peer in known:
                use = peer.uses[comp]
                if not spec.wild:
                    use.spec = spec
                if use.state is AssignmentState.CLOSED:
                    use.move('open')
                    use.wanted = None
                    use.reason = ''
                    use.allocation = None
                    self._driver.setup.set_up(peer, comp)
                else:
                    self.set_cpus(comp, peer, None)
            if not known or spec.wild:
                cluster.specs = [*cluster.specs, spec]
                self.use(comp, [spec])
                peer = self._nodes.by_key.get((spec.host, spec.port))  # type: ignore[assignment]
                if peer is not None:
                    word = words.setdefault(_plain_host(spec.host), [])
                    word.append(peer)


class PythonThere(NamedTuple):
    """The Python of a node that runs a computation."""
    name: str                  # '' for that of the node itself
    version: Tuple[int, ...]
    cloudpickle: str


def python_at(facts: dict, wanted: str) -> Optional[PythonThere]:
    """The Python of a node that has this name, or the first that has this version, by what the node
    has told; its own if none is wanted. None if there is none."""
    own = PythonThere('', facts.get('python', ()), facts.get('cloudpickle', ''))
    if not wanted:
        return own
    others = {name: PythonThere(name, tuple(fact['python']), fact['cloudpickle'])
              for name, fact in facts.get('pythons', {}).items()}
    if wanted in others:
        return others[wanted]
    for python in (own, *others.values()):
        words = [str(number) for number in python.version]
        parts = wanted.split('.')
        if words[:len(parts)] == parts:
            return python
    return None


def _needs_source(spec: dict, peer: NodeConnection) -> bool:
    """Whether a computation goes to a node as source: its Python is another than here."""
    if spec['kind'] != 'function':
        return False
    if spec['portable']:
        return False
    if peer.scheduler:
        return False
    python = python_at(peer.facts, spec.get('interpreter', ''))
    if python is None:
        return False
    version = spec['python'][:2]
    return bool(python.version[:2] != version)


def stock_of(facts: dict) -> Dict[str, int]:
    """The same with its memory in bytes, if that is known."""
    memory = facts.get('memory_total')
    if facts.get('role') == 'scheduler' and 'resources' in facts:
        return {ALL_KINDS: 1}
    if type(memory) is int:
        return dict(resources_of(facts), memory=memory)
    return resources_of(facts)


class ComputationSetup:
    """Sets computations up at nodes: what is offered to them, and what they answer. The driver's
    thread."""

    def __init__(self, driver: 'Driver') -> None:
        self._driver = driver
        self._nodes = driver.nodes
        self._clusters = driver.clusters

    def on_welcome(self, peer: NodeConnection, message: NodeHello) -> None:
        """A node is connected, and tells what it is."""
        facts = message.facts
        peer.name = message.name
        peer.facts = facts
        peer.offered = message.cpus
        peer.trip = self._driver.now - peer.linked_at
        self._driver.lost_nodes.back(peer)
        kept = facts.get('kept', {})
        memory = str(facts.get('memory', ''))
        peer.whole = not peer.restarted or (memory != '' and memory == peer.memory)
        peer.memory = memory
        node = self._driver.schedule.nodes.get(peer.key)
        if node is not None:
            sent = [comp for comp, flight in node.in_flight.items() if flight]
        else:
            sent = []
        if peer.restarted and not peer.whole:
            self._doubt(peer, kept)
        peer.restarted = False
        # What it has from before comes first, also if it is busy now
        for comp in {**dict.fromkeys(kept), **dict.fromkeys(sent)}:
            if comp in self._clusters and (kept.get(comp) or comp in sent):
                self._driver.say_to(peer, Reclaim(comp, self._clusters[comp].key))
            elif self._driver.is_over(comp):
                # It ended while the node could not be told
                self._driver.say_to(peer, Done(comp))
        # Recoveries first
        for comp, cluster in sorted(self._clusters.items(),
                                    key=lambda item: item[1].cargo is not None):
            self._set_up_named(peer, comp, cluster)
        self._driver.selection.drop_unused(peer)
        if peer.key in self._nodes.by_key:
            self._driver.policy.node_met(peer)

    def _set_up_named(self, peer: NodeConnection, comp: str, cluster: NodeUser) -> None:
        """A computation may use a node, whose name is known now, if its wildcard means it."""
        use = peer.uses.get(comp)
        if use is None:
            self._driver.selection.consider(peer, comp)
            return
        if use.spec.wild:
            spec = cluster.spec_of(peer)
            if spec is None:
                self._nodes.misfits.add(comp, peer.instance, str(peer))
                # At its address might have been one that is meant, but it has another name
                del peer.uses[comp]
                return
            use.spec = spec
        self.set_up(peer, comp)

    def _doubt(self, peer: NodeConnection, kept: Dict[str, Any]) -> None:
        """A node was started anew and has lost its memory. `kept` has the serials of results that
        it has on its disk, by computations."""
        known = {}
        for comp, serials in kept.items():
            attempt_history = AttemptHistory(whole=False)
            known[comp] = Account(frozenset(serials), attempt_history)
        doubted = NodeDoubted(peer.key, str(peer), Evidence.OTHER_INSTANCE, 'it was restarted',
                              peer.kind, known=known)
        self._driver.lost_nodes.doubt(doubted)

    def on_offer(self, peer: NodeConnection, message: CpusChanged) -> None:
        """Its CPUs have changed, or it has become free."""
        peer.offered = message.cpus
        for comp, use in list(peer.uses.items()):
            if use.state is AssignmentState.READY and not use.then:
                cpus = self._driver.selection.tell_limit(peer, comp)
                event = NodeOffers(peer.key, comp, cpus, peer.offered)
                self._driver.decide(event)
            elif use.state is AssignmentState.REFUSED and peer.offered:
                self.set_up(peer, comp)

    def set_up(self, peer: NodeConnection, comp: str) -> None:
        """Offer a computation to a node."""
        cluster = self._clusters[comp]
        use = peer.uses[comp]
        if not self._driver.policy.may_set_up(peer, comp):
            return
        if peer.link is None:
            return
        if not peer.name:
            return
        if use.state not in _MAY_OFFER:
            return
        if cluster.cargo is None:   # it only looks
            cluster.node_connected(peer)
            return
        if use.spec.allocator is not None and use.allocation is None:
            if use.state is not AssignmentState.ASKING:
                use.move('ask')
                cluster.ask_allocator(use.spec.allocator, peer, peer.link)
            return
        spec = self._code_for(peer, comp, cluster)
        if spec is None:
            return
        if not self._has_cpu(peer, comp):
            return
        allocation = use.allocation
        if allocation is not None:
            files = spec['files'] + allocation.files
            spec = dict(spec, cpus=allocation.cpus, setup_args=allocation.setup_args, files=files)
        try:
            support = cluster.support_for(peer)
            modules = cluster.modules_for(peer)
            managers = self._managers(peer)
            spec = dict(spec, support=support, **modules, **managers)
        except OSError as exc:
            self._refusal(peer, comp, 'a file of a module cannot be read: %s' % exc, 'module')
            return
        use.move('offer')
        use.reason = ''
        use.unloadable = False
        self._check_unloadable(comp)
        self._driver.selection.probes.pop(comp, None)
        # Whose claims on the node's CPUs it shares
        out = out_of_band(spec['code'])
        setup_args = out_of_band(spec['setup_args'])
        spec.update(code=out, setup_args=setup_args, client=cluster.client,
                    whose=cluster.program)
        message = Compute(comp, spec)
        self._driver.send(peer.link, message)

    def _code_for(self, peer: NodeConnection, comp: str, cluster: NodeUser) -> Optional[dict]:
        """What a computation is, in a form that this node can load; None if there is none, or if it
        is being found out."""
        spec = cluster.cargo.spec  # type: ignore[union-attr]
        wanted = spec.get('interpreter', '')
        if wanted and not peer.scheduler:
            python = python_at(peer.facts, wanted)
            if python is None:
                text = 'it has no Python %s (python=); it has %s' % (
                    wanted, pythons_text(peer.facts))
                self._refusal(peer, comp, text, 'python')
                return None
            spec = dict(spec, interpreter=python.name)
        elif wanted and 'pythons' not in peer.facts:
            text = 'it is of an earlier release of dispy, which does not know of python=%s: ' \
                'update the scheduler and its nodes' % wanted
            self._refusal(peer, comp, text, 'python')
            return None
        if peer.scheduler and spec.get('speculate') and 'speculates' not in peer.facts:
            cluster.warn('%s is of an earlier release of dispy, which does not know of speculate='
                         'True: no job is started a second time. Update the scheduler' % peer)
        if not _needs_source(cluster.cargo.spec, peer):  # type: ignore[union-attr]
            return spec
        use = peer.uses[comp]
        if cluster.source is None:
            if use.state is not AssignmentState.ASKING or use.allocation is not None:
                use.move('ask')
                cluster.ask_source(peer, peer.link)  # type: ignore[arg-type]
            return None
        code, obstacle = cluster.source
        if obstacle:
            there = python_of(
                python_at(peer.facts, wanted).version)  # type: ignore[union-attr]
            here = python_of(spec['python'])
            text = 'it runs %s, this program %s, where functions go as source only: %s. %s' % (
                there, here, obstacle, remedy_for_source(spec))
            self._refusal(peer, comp, text, 'version')
            return None
        return dict(spec, kind='source', code=code)

    def _has_cpu(self, peer: NodeConnection, comp: str) -> bool:
        """Whether a computation may use a CPU of a node, or has to set it up none the less."""
        use = peer.uses[comp]
        if peer.allowed(comp) >= 1:
            return True
        if use.wanted is not None:
            return True
        # The node has said why it offers none, and offers them when it does again
        if not peer.offered:
            if use.state is AssignmentState.REFUSED and use.reason:
                return False
        if use.allocation is None:
            text = 'it has no CPU to use: %d offered, limit %d' % (peer.offered, use.spec.cpus)
            self._refusal(peer, comp, text, 'cpus')
        else:
            text = 'allocate() returned %d' % use.allocation.cpus
            self._refusal(peer, comp, text, 'allocate')
        return False

    def _managers(self, peer: NodeConnection) -> Dict[str, Any]:
        """What lets jobs on this machine use proxies of managers (multiprocessing.Manager) that the
        program has made. Other machines do not reach the program's managers and get no key."""
        if peer.scheduler or peer.link is None:
            return {}
        sock = peer.link.sock
        try:
            here = peer.embedded or sock.getsockname()[0] == sock.getpeername()[0]
        except OSError:   # the link is breaking, and nothing will go along it
            here = False
        if not here:
            return {}
        return {'authkey': bytes(multiprocessing.current_process().authkey)}

    def source_found(self, cluster: NodeUser, peer: NodeConnection, link: Link,
                     source: Tuple[bytes, str]) -> None:
        """What the source of a computation is, or why there is none."""
        cluster.source = source
        if cluster.comp not in self._clusters:
            return
        if peer.link is not link:
            return
        if cluster.comp in peer.uses:
            self.set_up(peer, cluster.comp)

    def source_missing(self, cluster: NodeUser, peer: NodeConnection, link: Link,
                       text: str) -> None:
        """It could not be found out."""
        if cluster.comp not in self._clusters:
            return
        if peer.link is not link:
            return
        if cluster.comp in peer.uses:
            message = 'its source is not available: ' + text
            self._refusal(peer, cluster.comp, message, 'source')

    def allocated(self, comp: str, peer: NodeConnection, link: Link, allocation: Allocation,
                  error: str) -> None:
        """What the user's allocator has said."""
        # Closed or lost meanwhile
        if comp not in self._clusters:
            return
        if peer.link is not link:
            return
        if comp not in peer.uses:
            return
        if error:
            self._refusal(peer, comp, 'allocate() failed: ' + error, 'allocate')
        elif peer.uses[comp].state is AssignmentState.ASKING:
            peer.uses[comp].allocation = allocation
            self.set_up(peer, comp)

    def _refusal(self, peer: NodeConnection, comp: str, text: str, code: str) -> None:
        """Not used, for a reason of REASONS. One that passes is said once, whatever its numbers,
        and tried again."""
        use = peer.uses[comp]
        reason = REASONS.get(code)
        use.move('refuse')
        use.reason = text
        use.then = ''
        use.passes = reason is not None and reason.passes
        if use.passes:
            about = code
        else:
            about = text
        if about not in use.told:
            use.told.add(about)
            self._clusters[comp].warn('node %s does not take %s: %s%s' %
                                      (peer, self._clusters[comp].name, text,
                                       '; it will be tried again' if use.passes else ''))
        if use.passes:
            peer.retry_at = self._driver.now + peer.retry_wait
            peer.retry_wait = min(peer.retry_wait * 2, RETRY_MOST)
            self._driver.soon()

    def on_refused(self, peer: NodeConnection, message: Refused) -> None:
        """A node does not take a computation, or cannot go on with it."""
        code = message.code
        comp = message.comp
        use = peer.uses.get(comp)
        if comp in self._driver.recoveries.by_comp:
            self._driver.recoveries.by_comp[comp].refused(peer, comp, message.text)
            return
        if comp not in self._clusters:
            return
        if use is None:
            return
        if not use.offered:
            return
        # Its runner has died later: a new one may live
        was_ready = use.state is AssignmentState.READY
        if peer.link is not None:
            peer.link.abandon(comp)   # nobody takes it there
        if was_ready:
            self._driver.tell_all(DispyNode.Closed, peer, [comp])
            doubt = NodeDoubted(peer.key, str(peer), Evidence.REFUSAL, message.text, peer.kind,
                                [comp])
            self._driver.lost_nodes.doubt(doubt)
            event = NodeLeft(peer.key, comp, str(peer), message.text)
            self._driver.decide(event)
        text = source_here.added_to(message.text)
        if 'ModuleNotFoundError' in text:
            text = with_hint_for_module(text, peer.name)
        if message.holder:
            text += self._about_holder(peer, use, message.holder)
        self._refusal(peer, comp, text, 'process' if was_ready and code == 'setup' else code)
        use.unloadable = code in ('code', 'initializer')
        self._check_unloadable(comp)
        self._driver.policy.node_freed(peer)

    def _about_holder(self, peer: NodeConnection, use: NodeAssignment, row: tuple) -> str:
        """What to do about a node that serves another. It is found out once for each holder, as
        many files may have to be read."""
        holder, hint = use.holder_hint
        if holder != row:
            hint = self._driver.policy.about_holder(Holder(*row), peer.place)
            use.holder_hint = (row, hint)
        return hint

    def _check_unloadable(self, comp: str) -> None:
        """Where every node that can come has said that it cannot load the code, jobs would wait for
        ever: they end."""
        text = self.why_unloadable(comp)
        known = self._driver.schedule.comps.get(comp)
        if known is None:
            return
        if known.unloadable != text:
            self._driver.decide(Unloadable(comp, text))

    def why_unloadable(self, comp: str) -> str:
        """Why no node can load the code of a computation; empty if one may."""
        cluster = self._clusters[comp]
        uses = []
        for peer in self._nodes.of(comp):
            uses.append(peer.uses[comp])
        others = bool(cluster.hosts) or any(spec.wild or spec.scheduler for spec in cluster.specs)
        if not uses:
            return ''
        if not all(use.unloadable for use in uses):
            return ''
        if cluster.cargo is not None:
            if cluster.cargo.spec.get('initializer'):
                return '%s: %s' % (NO_INITIALIZER, uses[0].reason)
        if others:
            return ''
        return 'no node can load the code of %s: %s' % (cluster.name, uses[0].reason)

    def retry(self, peer: NodeConnection) -> None:
        """Offer again what the node could not take, for a reason that passes."""
        peer.retry_at = None
        for comp, use in list(peer.uses.items()):
            if comp not in self._clusters:
                continue
            if use.state is not AssignmentState.REFUSED:
                continue
            if use.passes:
                self.set_up(peer, comp)

    def on_ready(self, peer: NodeConnection, message: Ready) -> None:
        """A computation is set up at a node."""
        comp = message.comp
        self._driver.policy.becomes_ready(peer, comp)
        use = peer.uses.get(comp)
        if comp not in self._clusters:
            return
        if use is None:
            return
        if use.state is not AssignmentState.SETTING_UP:
            return
        use.move('ready')
        use.seat_told = False
        peer.retry_wait = RETRY_FIRST
        self._clusters[comp].node_ready(peer)
        self._driver.tell_all(DispyNode.Initialized, peer, [comp])
        available = peer.facts.get('available', {})
        if any(value is not None for value in available.values()):
            self._driver.tell_all(DispyNode.AvailInfo, peer, [comp])
        limit = self._driver.selection.tell_limit(peer, comp)   # before the first job
        ready = NodeReady(peer.key, comp, limit, message.held, str(peer), peer.offered,
                          peer.trip, AttemptHistory.of(message.past), peer.whole,
                          stock_of(peer.facts))
        self._driver.decide(ready)
        node = self._driver.schedule.nodes.get(peer.key)
        if node is not None:
            peer.taken = node.stock.used


class FileTransfers:
    """Files that go to nodes and that come from jobs. The driver's thread."""

    def __init__(self, driver: 'Driver') -> None:
        self._driver = driver
        self._nodes = driver.nodes
        self._clusters = driver.clusters
        self.incoming: Dict[Tuple[int, str], FileReceiver] = {}   # (link, computation) -> receiver
        self.backlog = SpoolSender(driver.links)         # what goes to nodes

    def on_need(self, peer: NodeConnection, message: Need) -> None:
        """A node asks for files."""
        comp = message.comp
        cluster = self._clusters.get(comp)
        if cluster is None:
            return
        if cluster.cargo is None:
            return
        if peer.link is None:
            return
        if comp in peer.uses:
            allocation = peer.uses[comp].allocation
        else:
            allocation = None
        if allocation is not None:
            paths = dict(cluster.cargo.paths, **allocation.paths)
        else:
            paths = cluster.cargo.paths
        for purpose, key, row in message.files:
            name = row[0]
            depends = purpose == Purpose.DEPENDS
            if purpose == Purpose.VALUES:
                self._send_value(peer, cluster, key, row)
                continue
            if depends:
                source = paths.get(name)
            else:
                source = cluster.module_source(name)
            if source is None:
                raise PeerError('it asked for a file that was not offered: %.60r' % (name,))
            self.backlog.add_file(peer.link.number, (cluster.comp, purpose, key), row, source)

    def _send_value(self, peer: NodeConnection, cluster: NodeUser, key: int, row: tuple) -> None:
        """A node lacks a value that jobs need."""
        source = cluster.value_source(row[2])
        if source is None:   # and its jobs have ended
            text = 'the program does not have it any more'
            purpose = int(Purpose.VALUES)
            message = FileStored(cluster.comp, purpose, key, row[0], text)
            self._driver.say_to(peer, message)
        else:
            transfer = (cluster.comp, int(Purpose.VALUES), key)
            number = peer.link.number  # type: ignore[union-attr]
            self.backlog.add_file(number, transfer, row, source)

    def send(self) -> None:
        """A few pieces of files into links that have room."""
        for link, (comp, purpose, key, name), text in self.backlog.send(self._driver.send):
            if purpose == Purpose.VALUES:
                error = 'it cannot be read: %s' % text
                file_stored = FileStored(comp, purpose, key, name, error)
                self._driver.send(link, file_stored)
            elif purpose == Purpose.PLACED and link.number in self._nodes.by_link:
                peer = self._nodes.by_link[link.number]
                message = 'it cannot be read: %s' % text
                self._driver.queries.answer(peer, (comp, name), message)
            elif purpose in ASKED_FOR:   # the node waits for it in vain
                self._driver.break_link(link, 'a file of the computation cannot be read: %s' % text)

    def on_file_piece(self, peer: NodeConnection, message: FilePiece) -> None:
        """A piece of a file that a job sends."""
        cluster = self._clusters.get(message.comp)
        job = self._driver.jobs.job_of(peer, message.comp, message.key)
        if message.purpose != Purpose.FROM_JOB:
            raise PeerError('a file that was not asked for')
        if message.comp in self._driver.recoveries.by_comp and message.offset == 0:
            text = ('on the client: its program has ended, and the program that collects its '
                    'results stores no files')
            stored = FileStored(*message[:3], message.row[0], text)
            self._driver.say_to(peer, stored)
        if cluster is None:
            return
        if self._driver.held_back.takes(peer, cluster, message):
            return
        if job is not None:
            cluster.file_piece(peer, job, message)

    def store(self, peer: NodeConnection, directory: str, message: FilePiece) -> None:
        """A piece of a file that a job sends. After a failure the rest of the file is passed
        over."""
        if peer.link is None:
            return
        place = (peer.link.number, message.comp)
        if place not in self.incoming:
            roots = {Purpose.FROM_JOB: directory}
            self.incoming[place] = FileReceiver(roots, where='on the client: ')
        stored = self.incoming[place].take(message)
        if stored is not None:
            self._driver.send(peer.link, stored)

    def on_file_stored(self, peer: NodeConnection, message: FileStored) -> None:
        """A file that the program has sent is at a node, or cannot be."""
        self._driver.queries.answer(peer, (message.comp, message.name), message.error)

    def abort(self, over: Callable[[int, str], bool]) -> None:
        """Remove what has come of files whose link or computation is over."""
        for key in [key for key in self.incoming if over(key[0], key[1])]:
            self.incoming.pop(key).abort()

    def abort_attempt(self, attempt: Tuple[str, int]) -> None:
        """The same of an attempt (computation, serial) that is over: its worker or node has died
        while it sent a file."""
        for (_, comp), receiver in self.incoming.items():
            if comp == attempt[0]:
                receiver.abort(Purpose.FROM_JOB, attempt[1])


class HeldFiles:
    """The files that a second attempt of a job sends. They are in a directory of their own until it
    counts, and where they belong after that. The driver's thread.

    directory - their own; it is made when the first comes
    counts - the attempt is that of its job
    names - of those that are whole and are not where they belong, in their order
    """
    forwards = False    # to where they belong, which takes its time

    def __init__(self, directory: str, root: str, where: str = 'on the client: ') -> None:
        """They belong below `root`; `where` as of FileReceiver."""
        self.directory = directory
        self.root = root
        self.counts = False
        self.names: List[str] = []
        self._where = where
        roots = {Purpose.FROM_JOB: directory}
        self._receiver = FileReceiver(roots, where=where)

    def take(self, message: FilePiece) -> Optional[FileStored]:
        """Take a piece; returns the answer when its file is whole or cannot be stored."""
        with contextlib.suppress(OSError):   # the receiver tells why it has no place
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
        stored = self._receiver.take(message)
        if stored is None or stored.error:
            return stored
        self.names.append(stored.name)
        if self.counts:
            return stored._replace(error=self.place())
        return stored

    def place(self) -> str:
        """Move those that are whole where they belong. Returns why one could not be moved."""
        self.counts = True
        names = self.names
        self.names = []
        for name in names:
            path = os.path.join(self.directory, *name.split('/'))
            try:
                move_below(path, self.root, name)
            except (OSError, ValueError) as exc:
                return '%sfile %.100r cannot be stored: %s' % (self._where, name, exc)
        return ''

    def keep_until_there(self, row: tuple) -> bool:
        """Whether the row of Results of the attempt is kept until the files are where they
        belong."""
        return False

    def find(self) -> None:
        """Those that another process had received."""
        for directory, _, names in os.walk(self.directory):
            below = os.path.relpath(directory, self.directory)
            for name in sorted(names):
                if not name.endswith('.part'):
                    path = os.path.normpath(os.path.join(below, name))
                    self.names.append(path.replace(os.sep, '/'))

    def drop(self) -> None:
        """Remove those that are not where they belong."""
        self._receiver.abort()
        shutil.rmtree(self.directory, ignore_errors=True)


def held_directory(root: str, comp: str, serial: int) -> str:
    """Where the files of a second attempt are kept that belong below `root`."""
    return os.path.join(root, '.dispy-%s-%d' % (comp, serial))


def settle_files(directory: str, counts: bool) -> None:
    """What a second attempt has sent to a program that has ended comes to its place if the attempt
    counts, and is removed otherwise. `directory` is that of HeldFiles."""
    if not directory or not os.path.isdir(directory):
        return
    root = os.path.dirname(directory)
    held = HeldFiles(directory, root)
    if counts:
        held.find()
        error = held.place()
        if error:
            logger.error('%s', error)
    held.drop()


class HeldBack:
    """Second attempts of jobs on their way to nodes, and what they send, which is held back until
    it is known whether they count. The driver's thread.

    files - (computation, serial) -> the files of an attempt that is a second one, or was
    """

    def __init__(self, driver: 'Driver') -> None:
        self._driver = driver
        self._nodes = driver.nodes
        self._clusters = driver.clusters
        self.files: Dict[Tuple[str, int], HeldFiles] = {}

    def send(self, action: SendSecond) -> None:
        """The Schedule has chosen a node for second attempts."""
        cluster = self._clusters[action.comp]
        cluster.seconds.send(self._nodes.by_key[action.node], action.works)

    def find(self, peer: NodeConnection, comp: str, serial: int) -> Optional[SecondAttempt]:
        """The second attempt that a message of a node speaks of."""
        speculation = self._driver.schedule.speculation
        return speculation.find(peer.key, comp, serial)

    def output(self, peer: NodeConnection, message: Output) -> None:
        """What an attempt prints or logs that is none of the jobs at its node."""
        second = self.find(peer, message.comp, message.serial)
        if second is not None:
            second.said.append(message)

    def takes(self, peer: NodeConnection, cluster: NodeUser, message: FilePiece) -> bool:
        """A piece of a file that a job sends. Returns whether it is of an attempt that is a second
        one, or was when it began to send files."""
        place = (message.comp, message.key)
        held = self.files.get(place)
        if held is None:
            second = self.find(peer, *place)
            if second is None:
                return False
            held = self.files[place] = cluster.seconds.files_of(second)
        stored = held.take(message)
        if stored is not None:
            self._driver.say_to(peer, stored)
        return True

    def admit(self, peer: NodeConnection, comp: str, rows: List[tuple]) -> List[tuple]:
        """Rows of Results without those that have to wait for the files of their attempts."""
        admitted = []
        for row in rows:
            held = self.files.get((comp, row[0]))
            waits = False
            if held is not None and held.forwards and row[1] not in PROVISIONAL:
                if row[1] in RETURNED:
                    second_wins = SecondWins(peer.key, comp, row[0])
                    self._driver.decide(second_wins)
                waits = held.keep_until_there(row)
            if not waits:
                admitted.append(row)
        return admitted

    def counts(self, action: SecondCounts) -> None:
        """A second attempt is that of its job from now on: what was held back is shown."""
        second = action.second
        cluster = self._clusters[action.comp]
        peer = self._nodes.by_key[action.node]
        cluster.seconds.counts(peer, second, action.ran or 0.0)
        held = self.files.get((action.comp, second.serial))
        if held is not None:
            error = held.place()
            if error:
                cluster.warn('%s: a job was started a second time: %s' % (cluster.name, error))
        for message in second.said:
            cluster.output(peer, second.first, message)

    def over(self, action: SecondOver) -> None:
        """A second attempt counts no more."""
        self.forget(action.comp, action.second.serial)
        self._clusters[action.comp].seconds.over(action.second)

    def forget(self, comp: str, serial: int) -> None:
        """An attempt has ended: what is left of its files is removed."""
        held = self.files.pop((comp, serial), None)
        if held is not None:
            held.drop()

    def forget_all(self, comp: str) -> None:
        """A computation is over."""
        for name, serial in list(self.files):
            if name == comp:
                self.forget(name, serial)


class JobExchange:
    """Jobs to nodes, and what comes of them: what the Schedule decides is sent, and what nodes tell
    of jobs is handed to it. The driver's thread."""

    def __init__(self, driver: 'Driver') -> None:
        self._driver = driver
        self._nodes = driver.nodes
        self._clusters = driver.clusters
        self.submitted: List[Any] = []               # in this turn
        self.outgoing = Outgoing()                   # of clusters with a journal
        self._lost_text = ''     # of a fault after which jobs may be nowhere
        self._lost_at = 0.0      # when they are looked for

    def take(self, job: DispyJob) -> None:
        """A job that waits again from now on."""
        self.submitted.append(job)
        self._driver.soon()

    def take_submitted(self) -> None:
        """Hand what was submitted in this turn to the Schedule."""
        if self.submitted:
            works = list(self.submitted)
            self.submitted.clear()
            self._driver.decide(Submitted(works))

    def send_jobs(self, action: SendJobs) -> None:
        """The Schedule has chosen a node for them."""
        cluster = self._clusters[action.comp]
        cluster.send_jobs(self._nodes.by_key[action.node], action.works)

    def send_to_node(self, action: Any) -> None:
        """The Schedule wants jobs to be cancelled or given back."""
        peer = self._nodes.by_key.get(action.node)
        if peer is None:
            return
        if peer.link is None:
            return
        if isinstance(action, SendCancel):
            kind: Any = Cancel
        else:
            kind = ReturnJobs
        serials = action.serials
        stay = self._unsend(peer, action.comp, serials)
        if stay:   # they have not come there, nor will they
            event = NodeReturned(peer.key, action.comp, stay)
            self._driver.decide(event)
            serials = [serial for serial in serials if serial not in stay]
        for message in in_parts(kind, action.comp, serials):
            self._driver.send(peer.link, message)

    def send_ack(self, action: SendAck) -> None:
        """Collected, so that a round trip of one job is not two."""
        comp = action.comp
        peer = self._nodes.by_key.get(action.node)
        if peer is None:
            return
        if comp not in peer.uses:
            return
        acks = peer.uses[comp].acks
        acks.extend(action.serials)
        if len(acks) >= ACKS_MOST and not self.outgoing.has(comp):
            self.acknowledge(peer)
        else:
            self._driver.chores.within(ACK_AFTER)

    def acknowledge(self, peer: NodeConnection) -> None:
        """Tell a node which results are here."""
        if peer.link is not None:
            for comp, use in peer.uses.items():
                if not use.acks:
                    continue
                if comp in self.outgoing.held_up:
                    continue
                for message in in_parts(Ack, comp, use.acks):
                    self._driver.send(peer.link, message)
                use.acks = []

    @staticmethod
    def _unsend(peer: NodeConnection, comp: str, serials: Iterable[int]) -> List[int]:
        """Large arguments of these need not go on to a node. Returns serials of those that have not
        come there."""
        if peer.link is not None and peer.link.later:
            return peer.link.abandon(comp, serials)
        return []

    def note_down(self) -> None:
        """Commit the journals; what was noted leaves."""
        before = set(self.outgoing.held_up)
        leaving, staying = self.outgoing.commit()
        for peer, frame in leaving:
            self._driver.say_to(peer, frame)
        for comp in self.outgoing.held_up | before:
            self._hold_up(comp, comp not in before)
        for peer, comp, serials in staying:   # it never left
            event = NodeReturned(peer.key, comp, serials)
            self._driver.decide(event)
        if self.outgoing.held_up:
            self._driver.chores.within(Outgoing.AGAIN)

    def _hold_up(self, comp: str, is_new: bool) -> None:
        """The journal of a cluster cannot be written, or can be again."""
        stuck = comp in self.outgoing.held_up
        if stuck and is_new:
            logger.error(
                '%s: its recovery file cannot be written: no jobs are sent and no results '
                'acknowledged until there is room',
                self._clusters[comp].name)
        for peer in self._nodes.of(comp):
            if (comp in peer.blocked) == stuck:
                continue
            if stuck:
                peer.blocked.add(comp)
            else:
                peer.blocked.discard(comp)
            if peer.uses[comp].state is not AssignmentState.READY:
                continue
            if not peer.uses[comp].then:
                event = NodeOffers(peer.key, comp, peer.limit(comp), peer.offered)
                self._driver.decide(event)

    def on_results(self, peer: NodeConnection, message: Results) -> None:
        """Jobs have ended at a node, or go on and have a provisional result."""
        rows = message.rows
        comp = message.comp
        if peer.link is not None and peer.link.later:
            self._unsend(peer, comp, [row[0] for row in rows])
        if comp in self._driver.recoveries.by_comp:
            recovery = self._driver.recoveries.by_comp[comp]
            recovery.results(peer, comp, rows)
            serials = [
                row[0] for row in rows if row[1] not in PROVISIONAL and recovery.acknowledges
            ]
            for ack in in_parts(Ack, comp, serials):
                self._driver.send(peer.link, ack)  # type: ignore[arg-type]
            return
        if self._driver.held_back.files:
            rows = self._driver.held_back.admit(peer, comp, rows)
        event = NodeResults(peer.key, comp, rows)
        self._driver.decide(event)

    def on_returned(self, peer: NodeConnection, message: JobsReturned) -> None:
        """A node gives back jobs that have not begun."""
        serials = message.serials
        comp = message.comp
        if comp in self._driver.recoveries.by_comp:
            self._driver.recoveries.by_comp[comp].returned(peer, comp, serials)
            return
        self._unsend(peer, comp, serials)
        event = NodeReturned(peer.key, comp, serials)
        self._driver.decide(event)

    def on_started(self, peer: NodeConnection, message: Started) -> None:
        """Jobs have begun."""
        event = NodeStarted(peer.key, message.comp, message.rows)
        self._driver.decide(event)

    def job_of(self, peer: NodeConnection, comp: str, serial: int) -> Any:
        """The job that a message of a node speaks of, while it is there."""
        node = self._driver.schedule.nodes.get(peer.key)
        if node is not None:
            return node.in_flight.get(comp, {}).get(serial)
        return None

    def on_output(self, peer: NodeConnection, message: Output) -> None:
        """What a running job prints or logs."""
        cluster = self._clusters.get(message.comp)
        job = self.job_of(peer, message.comp, message.serial)
        if cluster is None:
            return
        if job is not None:
            cluster.output(peer, job, message)
        else:
            self._driver.held_back.output(peer, message)

    def job_started(self, peer: NodeConnection, job: Any) -> None:
        """A job has begun, and what says so may come later."""
        event = NodeStarted(peer.key, job.comp, [(job.serial, 0.0)])
        self._driver.decide(event)

    def jobs_started(self, action: JobsStarted) -> None:
        """As the Schedule knows, jobs have begun."""
        cluster = self._clusters[action.comp]
        cluster.jobs_started(self._nodes.by_key[action.node], action.pairs)

    def failed_once(self, action: JobFailedOnce) -> None:
        """Whether a job is repeated is found out by an opener: its exception may be the user's."""
        if self._driver.files.incoming:
            attempt = (action.comp, action.row[0])
            self._driver.files.abort_attempt(attempt)
        cluster = self._clusters[action.comp]
        peer = self._nodes.by_key[action.node]
        self._driver.overview.attempts.add(action.comp, action.row, peer.name)
        self._driver.openers.run(self._think_over, cluster, peer, action.work, action.row)

    def _think_over(self, cluster: NodeUser, peer: NodeConnection, job: DispyJob,
                    row: tuple) -> None:
        """Decide whether a job is repeated. A thread that opens results."""
        delay: Optional[float] = None
        try:
            failure = failure_of(row, cluster.cargo.is_program)  # type: ignore[union-attr]
            delay = job.options['repeats'].next_delay(failure)  # type: ignore[index]
        except Exception as exc:  # of the user's code
            logger.warning('job %r is not repeated: dispy_retry_on: %s',
                           job.id, describe_exception(exc, 1))
        self._driver.call_soon(self._thought_over, cluster, peer, job, row, delay)

    def _thought_over(self, cluster: NodeUser, peer: NodeConnection, job: DispyJob, row: tuple,
                      delay: Optional[float]) -> None:
        if delay is not None:
            self._driver.decide(Repeat(job, delay))
        elif self._driver.decide(RepeatNot(job, row[1])):
            cluster.jobs_ended(peer, [(job, row)])

    def job_stays(self, action: JobStays) -> None:
        """A job is not repeated: who has asked, by RepeatNot, ends it."""

    def jobs_ended(self, action: JobsEnded) -> None:
        """As the Schedule knows, jobs have ended, or have a provisional result."""
        if self._driver.files.incoming:
            for _, row in action.pairs:
                if row[1] not in PROVISIONAL:
                    attempt = (action.comp, row[0])
                    self._driver.files.abort_attempt(attempt)
        for _, row in action.pairs if self._driver.held_back.files else ():
            if row[1] not in PROVISIONAL:
                self._driver.held_back.forget(action.comp, row[0])
        cluster = self._clusters[action.comp]
        cluster.jobs_ended(self._nodes.by_key[action.node], action.pairs)

    def job_waits(self, action: JobWaits) -> None:
        """A job that was sent waits again."""
        self._driver.lost_nodes.requeued += 1
        if action.work.state in _WAITING:   # otherwise its second attempt goes on
            self._driver.held_back.forget(action.work.comp, action.work.serial)
        cluster = self._clusters[action.work.comp]
        cluster.job_waits(action.work)

    def job_parked(self, action: JobParked) -> None:
        """A job waits for a node that is large enough."""
        cluster = self._clusters[action.work.comp]
        cluster.job_parked(action.work, action.text)

    def jobs_held(self, action: JobsHeld) -> None:
        """Jobs wait because of a limit of their user."""
        self._clusters[action.comp].jobs_held(action.text)

    def job_ended(self, action: JobEnded) -> None:
        """A job has ended without a result."""
        work = action.work
        self._driver.lost_nodes.ended += 1
        self._driver.held_back.forget(work.comp, work.serial)
        if self._driver.cancels.withdrawals:
            self._driver.cancels.answer(work, work.state is JobState.CANCELLED)
        cluster = self._clusters[work.comp]
        cluster.job_ended(work, action.text)

    def refused_frame(self, peer: NodeConnection, link: Link, message: Wrong) -> None:
        """The other side cannot use what was sent: the jobs that were in it end after a few times,
        and it is reached again later."""
        text = 'it cannot use what was sent: %s' % message.text
        for comp, serial in self._driver.refusals.refused(link, message.frame):
            row = (serial, int(Outcome.DIED), 0.0, 0.0,
                   ('%s: %s' % (peer, text)).encode('utf-8', 'replace'), b'', b'')
            event = NodeResults(peer.key, comp, [row])
            self._driver.decide(event)
        peer.wrong = True
        raise LinkBroken(text)

    def end_unsent(self, action: Union[SendJobs, SendSecond], text: str) -> None:
        """None of these jobs can be sent, for a fault of ours."""
        payload = text.encode('utf-8', 'replace')
        rows = [(work.serial, int(Outcome.DIED), 0.0, 0.0, payload, b'', b'')
                for work in action.works]
        event = NodeResults(action.node, action.comp, rows)
        self._driver.decide(event)

    def note_fault(self, text: str) -> None:
        """Jobs that were in hand are looked for soon, once for many faults."""
        self._lost_text = text
        self._driver.soon()

    def end_lost_when_due(self, due: List[float]) -> None:
        """End jobs that a fault of ours has lost, when it is time to."""
        if self._lost_text and self._driver.now >= self._lost_at:
            text = self._lost_text
            self._lost_text = ''
            self._lost_at = self._driver.now + 1.0
            self._end_lost(text)
        elif self._lost_text:
            due.append(self._lost_at)

    def _end_lost(self, text: str) -> None:
        """End the jobs that neither wait nor are on a node after a fault."""
        for comp, cluster in list(self._clusters.items()):
            lost = cluster.jobs_owed()
            if not lost:
                continue
            known = {id(work) for work in self.submitted}
            known.update(id(event) for event in self._driver.posted())
            if comp in self._driver.schedule.comps:
                schedule_comp = self._driver.schedule.comps[comp]
                known.update(map(id, schedule_comp.waiting()))
            for node in self._driver.schedule.nodes.values():
                known.update(map(id, node.in_flight.get(comp, {}).values()))
            for work in lost:
                if id(work) not in known:
                    self._driver.cancels.answer(work, False)
                    cluster.fail_job(work, text)


class Cancellations:
    """Jobs that are not wanted any more. The driver's thread."""

    def __init__(self, driver: 'Driver') -> None:
        self._driver = driver
        self._clusters = driver.clusters
        # Jobs to be cancelled if they have not begun
        self.withdrawals: Dict[Any, 'concurrent.futures.Future[bool]'] = {}

    def cancel(self, job: DispyJob) -> None:
        """Begin to end a job."""
        self._driver.jobs.take_submitted()
        self._driver.decide(CancelAsked(job))
        for recovery in set(self._driver.recoveries.by_comp.values()):
            recovery.cancel(job)

    def cancel_some(self, jobs: Sequence[DispyJob]) -> None:
        """Begin to end these."""
        for job in jobs:
            self.cancel(job)

    def cancel_waiting(self, comp: str, but_first: bool = False) -> int:
        """End all jobs of a cluster that have not begun; `but_first`: that no CPU is about to take
        (at a scheduler, nobody here knows which these are). Returns of how many this is tried."""
        self._driver.jobs.take_submitted()
        known = self._driver.schedule.comps.get(comp)
        if known is not None:
            but_first = but_first and not known.remote
            if but_first:   # also if they have come in this turn
                self._driver.flush()
            works = known.not_begun()
            if but_first:
                taken = set()
                for key in known.nodes:
                    runs = self._driver.schedule.runs(key)
                    for serial in runs.get(comp, ()):
                        taken.add(serial)
                works = [work for work in works if work.serial not in taken]
            self._driver.decide(WithdrawAsked(works))
            return len(works)
        return 0

    def withdraw_all(self, jobs: Sequence[DispyJob]) -> None:
        """Cancel those that have not begun."""
        self._driver.jobs.take_submitted()
        left = []
        for job in jobs:
            if job.state not in ENDED:
                left.append(job)
        self._driver.decide(WithdrawAsked(left))

    def withdraw(self, job: DispyJob) -> 'concurrent.futures.Future[bool]':
        """Cancel a job if it has not begun. The future tells whether it will never begin."""
        self._driver.jobs.take_submitted()
        future = self.withdrawals.get(job)
        if future is None:
            future = self.withdrawals[job] = concurrent.futures.Future()
            self._driver.decide(WithdrawAsked([job]))
        return future

    def keep(self, job: DispyJob) -> bool:
        """The answer to `withdraw` is not waited for any longer: the job goes on if it has not
        ended. Whether it has been cancelled."""
        future = self.withdrawals.pop(job, None)
        if future is not None:
            self._driver.schedule.requests.keep(job)
        return job.state is JobState.CANCELLED

    def withdrawn(self, action: Withdrawn) -> None:
        work = action.work
        self.answer(work, action.gone)
        self._clusters[work.comp].job_goes_on(work)

    def answer(self, work: Any, is_gone: bool) -> None:
        future = self.withdrawals.pop(work, None)
        if future is not None:
            future.set_result(is_gone)


class Recoveries:
    """What nodes have of computations of programs that have crashed. The driver's thread."""

    def __init__(self, driver: 'Driver') -> None:
        self._driver = driver
        self.by_comp: Dict[str, Collector] = {}

    def reclaim(self,
                peer: NodeConnection,
                recovery: Collector,
                keys: Dict[str, bytes],
                take: bool = True) -> None:
        """Ask a node for what it has of computations of a program that has crashed."""
        for comp, key in keys.items():
            self.by_comp[comp] = recovery
            self._driver.send(peer.link, Reclaim(comp, key, take))  # type: ignore[arg-type]

    def acknowledge(self, found: 'ResultCollection', whole: Set[str]) -> None:
        """What was collected is the user's; nodes that have no more of a computation forget it."""
        found.dismiss(whole)
        for peer in found.met:
            for where, comp in found.taken if peer.link is not None else ():
                if comp in whole:
                    continue
                if where not in (peer.place, *peer.aliases):
                    continue
                serials = [row[0] for (name, _), (row, _) in found.rows.items() if name == comp]
                for ack in in_parts(Ack, comp, serials):
                    self._driver.say_to(peer, ack)

    def dismiss(self, peer: NodeConnection, comp: str, key: bytes) -> None:
        """Tell a node that a computation is over. Its answer to the question after that shows
        that it has heard it."""
        reclaim = Reclaim(comp, key, False)
        self._driver.say_to(peer, reclaim)   # which shows the key
        self._driver.say_to(peer, Done(comp))
        message = Reclaim(comp, key, False)
        self._driver.say_to(peer, message)

    def let_go(self, found: 'ResultCollection', whole: Set[str]) -> None:
        """A gathering is over. Nodes that have more keep it: their links end without Bye."""
        for comp in found.lefts:
            self.by_comp.pop(comp, None)
        for peer in found.met:
            places = (peer.place, *peer.aliases)
            left = [comp for where, comp in found.taken if where in places and comp not in whole]
            if peer.link is not None and left:
                peer.replacing = True   # not to be told
                self._driver.break_link(peer.link, 'the recovery has ended')
        self._driver.forget(found.comp)

    def give_up(self, recovery: 'Recovery', whole: bool) -> None:
        """A recovery is over: if it is whole, nodes forget what is left of its computations."""
        for comp in recovery.old:
            self.by_comp.pop(comp, None)
            for peer in recovery.met:
                if peer.link is not None and whole:
                    self._driver.send(peer.link, Done(comp))
                # Without Bye: they keep what they have
                elif peer.link is not None:
                    if not any(comp != recovery.comp for comp in peer.uses):
                        self._driver.break_link(peer.link, 'the recovery has ended')
        self._driver.forget(recovery.comp)

    def on_held(self, peer: NodeConnection, message: KnownAttempts) -> None:
        """The results come by themselves."""
        comp = message.comp
        past = AttemptHistory.of(message.past)
        if comp in self.by_comp:
            self.by_comp[comp].held(peer, comp, message.serials, past)
        else:
            serials = frozenset(message.serials)
            account = Account(serials, past, peer.whole)
            event = NodeTold(peer.key, comp, account)
            self._driver.decide(event)


class SchedulerCalls:
    """Questions to a scheduler, and what it asks and tells. The driver's thread."""

    def __init__(self, driver: 'Driver') -> None:
        self._driver = driver
        self._nodes = driver.nodes
        self._clusters = driver.clusters
        self._numbers = itertools.count(1)

    def call(self, comp: str, name: str, *args: Any) -> 'concurrent.futures.Future[Any]':
        """Ask a cluster's scheduler. Raises ConnectionError while that cannot answer."""
        peer = next((peer for peer in self._nodes.of(comp) if peer.link is not None), None)
        if peer is None:
            raise ConnectionError('the scheduler is not connected')
        if name != 'overview' and peer.uses[comp].state is AssignmentState.WAITING:
            raise ConnectionError('the scheduler has not been told of this cluster yet')
        return self.call_peer(peer, comp, name, *args)

    def call_peer(self, peer: NodeConnection, comp: str, name: str,
                  *args: Any) -> 'concurrent.futures.Future[Any]':
        """Ask a scheduler, or a node of a cluster, that is connected."""
        future: 'concurrent.futures.Future[Any]' = concurrent.futures.Future()
        number = next(self._numbers)
        peer.answers[comp, 'call %d' % number] = future
        self._driver.send(peer.link, Call(comp, number, name, args))  # type: ignore[arg-type]
        return future

    def on_return(self, peer: NodeConnection, message: Return) -> None:
        error = message.error
        future = peer.answers.pop((message.comp, 'call %d' % message.number), None)
        if future is not None and error:
            future.set_exception(_ERRORS.get(error[0], DispyError)(error[1]))
        elif future is not None:
            future.set_result(message.value)

    def on_call(self, peer: NodeConnection, message: Call) -> None:
        """A node or scheduler asks what only the program can tell."""
        cluster = self._clusters.get(message.comp)
        if cluster is not None:
            cluster.asked(peer, message)

    def on_where(self, peer: NodeConnection, message: JobsAssigned) -> None:
        """Jobs of ours have gone to a node, or are back in a scheduler's queue."""
        comp = message.comp
        if comp in self._driver.recoveries.by_comp:
            self._driver.recoveries.by_comp[comp].where(comp, message.serials, message.node)
            return
        cluster = self._clusters.get(comp)
        node = self._driver.schedule.nodes.get(peer.key)
        if node is not None:
            flight = node.in_flight.get(comp, {})
        else:
            flight = {}
        for job in [flight[serial] for serial in message.serials
                    if serial in flight] if cluster is not None else ():
            if self._driver.files.incoming:
                self._driver.files.abort_attempt((comp, job.serial))
            cluster.job_moved(job, message.node)  # type: ignore[union-attr]

    def on_news(self, peer: NodeConnection, message: NodeChanged) -> None:
        cluster = self._clusters.get(message.comp)
        if cluster is not None:
            node_info = NodeInfo(*message.node)
            cluster.node_told(message.status, node_info)

    def on_said(self, peer: NodeConnection, message: Notice) -> None:
        cluster = self._clusters.get(message.comp)
        if cluster is not None:
            cluster.warn(message.text)
        else:   # it was closed meanwhile
            logger.warning('%s', message.text)


class NodeQueries:
    """What clusters and monitors ask about nodes. The driver's thread."""

    def __init__(self, driver: 'Driver') -> None:
        self._driver = driver
        self._nodes = driver.nodes
        self._clusters = driver.clusters
        nodes = driver.nodes
        selection = driver.selection
        self._commands: Dict[str, Callable[..., Any]] = {
            'nodes': self.rows_of,
            'complaint': self.explain_no_nodes,
            'why_unloadable': driver.setup.why_unloadable,
            'find': lambda comp, node: nodes.find(comp, node).key,
            'seat': self.seat,
            'set_cpus': lambda comp, node, cpus: selection.set_cpus(
                comp, nodes.find(comp, node), cpus),
            'leave': selection.leave,
            'allocate': selection.allocate,
            'jobs': lambda comp, node: list(self.jobs_at(comp, node)),
            'question': self.question,
        }

    def command(self, comp: str, name: str, *args: Any) -> Any:
        """What a cluster's methods ask of its nodes; a SharedJobCluster's ask it of the scheduler's
        driver."""
        return self._commands[name](comp, *args)

    def node_of(self, comp: str, peer: NodeConnection) -> Tuple[NodeConnection, str, str, int, int]:
        """A node of a cluster: (peer, state, reason, CPUs it may use, jobs that run there)."""
        use = peer.uses[comp]
        if not peer.scheduler:
            runs = self._driver.schedule.runs(peer.key)
            busy = len(runs.get(comp, ()))
        else:
            busy = 0
        state = use.state.value
        reason = use.reason
        if use.state is AssignmentState.WAITING:
            state = peer.state_word
            reason = peer.reason
        elif use.then:
            state = 'draining'
        elif use.wanted == 0 or peer.most == 0:
            if use.state is AssignmentState.READY:
                reason = DEALLOCATED
        return peer, state, reason, peer.limit(comp), busy

    def nodes_of(self, comp: str) -> List[Tuple[NodeConnection, str, str, int, int]]:
        """All of them, and those that it cannot have. Raises RuntimeError if it was closed."""
        if comp not in self._clusters:
            raise RuntimeError('the cluster was closed')
        found = [self.node_of(comp, peer) for peer in self._nodes.of(comp)]
        cluster = self._clusters[comp]
        linked = {peer.ip_addr for peer in self._nodes.by_key.values() if peer.link is not None}
        wild = [spec for spec in cluster.specs if spec.wild]
        for peer in self._nodes.unusable.values():
            if peer.host in linked:
                continue
            if cluster.hosts or any(spec.may_fit(peer.host) for spec in wild):
                found.append((peer, 'refused', peer.reason, 0, 0))
        return found

    def rows_of(self, comp: str) -> List[NodeInfo]:
        """Nodes of a cluster, to be told to others."""
        nodes = self.nodes_of(comp)
        return [self.row_of(*found) for found in nodes]

    @staticmethod
    def row_of(peer: NodeConnection, state: str, reason: str, cpus: int, busy: int) -> NodeInfo:
        """Return the row of one node."""
        return NodeInfo(peer.key, peer.ip_addr, peer.port, peer.name, state, reason, cpus, busy,
                        peer.offered, peer.facts_now())

    def explain_no_nodes(self, comp: str) -> str:
        """What was tried, what came of it, what to do."""
        rows = self.nodes_of(comp)
        lines = []
        for peer, state, reason, _, _ in rows:
            line = '%s: %s' % (peer, state)
            if reason:
                line += ': ' + reason.strip().splitlines()[-1]
            lines.append(line)
        cluster = self._clusters[comp]
        if self._driver.connector.searches.reach == 'off':
            wild = []
        else:
            wild = [spec for spec in cluster.specs if spec.wild]
        for port in sorted({spec.port for spec in wild}):
            lines.append(self._search_at(port))
        if cluster.hosts:
            listening = self._listening_at(*cluster.hosts[0])
            lines.append(listening)
        peers = self._nodes.of(comp)
        instances = {peer.instance for peer in peers}
        others = self._nodes.misfits.text(comp, instances)
        if any(peer.uses[comp].spec.wild for peer in peers):   # some are meant
            others = ''
        if others:
            message = 'of the nodes that answer, none fits %s. These do answer: %s' % (' or '.join(
                repr(spec.host) for spec in wild), others)
            lines.append(message)
        attempts = [(state, peer.port, peer.scheduler) for peer, state, _, _, _ in rows]
        todo = remedy(attempts, bool(others), self._driver.policy.start_node)
        return 'Tried: %s%s' % ('; '.join(lines), todo and '. ' + todo)

    def _search_at(self, port: int) -> str:
        """Which nodes are asked for at a UDP port, for `complaint`."""
        if not self._driver.connector.searches.is_at(port):
            return 'those of the scheduler, whose nodes are all named (-n)'
        if self._driver.connector.searches.reach == 'loopback':
            whose = 'of this machine'
        else:
            whose = 'of the local network'
        return 'all that answer at UDP port %d %s' % (port, whose)

    def _listening_at(self, host: str, port: int) -> str:
        """Whether nodes can connect to this process, for `complaint`."""
        if self._driver.connector.listens_at(host, port):
            return 'waited for nodes to connect to ' + format_address(host, port)
        return 'no node can connect, port %d was taken' % port

    def seat(self, comp: str, node: Any) -> Tuple[Any, str]:
        """For a job that is submitted to a node: the key of the node and, once until it is ready,
        why it cannot be used. A node that has not been tried yet has no reason. Raises
        ValueError."""
        peer = self._nodes.find(comp, node)
        use = peer.uses[comp]
        _, state, reason, _, _ = self.node_of(comp, peer)
        if state not in NOT_CONNECTED and use.state is not AssignmentState.CLOSED or not (
                use.reason or peer.failures):
            return peer.key, ''
        if use.seat_told:
            return peer.key, ''
        use.seat_told = True
        return peer.key, reason.strip().rpartition('\n')[2] or state

    def question(self,
                 comp: str,
                 node: Any,
                 row: Optional[tuple] = None,
                 path: str = '') -> 'concurrent.futures.Future[Any]':
        """Send a file (name, size, digest, mode, from `path`) or, without one, ask what is there.
        The future has the node's answer."""
        if row:
            name = row[0]
        else:
            name = ''
        peer, future = self._nodes.find(comp, node), concurrent.futures.Future(
        )   # type: Tuple[NodeConnection, concurrent.futures.Future[Any]]
        if peer.link is None or peer.uses[comp].state is not AssignmentState.READY:
            reason = peer.uses[comp].reason
            message = 'node %s is not ready: %s' % (peer, reason or peer.reason
                                                    or peer.uses[comp].state.value)
            raise RuntimeError(message)
        if (comp, name) in peer.answers and not name:
            return peer.answers[comp, name]   # one answer for all who ask
        if (comp, name) in peer.answers:
            raise RuntimeError('node %s is already being sent %s' % (peer, name))
        peer.answers[comp, name] = future
        if row:
            transfer = (comp, int(Purpose.PLACED), 0)
            self._driver.files.backlog.add_file(peer.link.number, transfer, row, path)
        else:
            self._driver.send(peer.link, Query(comp))
        return future

    @staticmethod
    def answer(peer: NodeConnection, key: Tuple[str, str], value: Any) -> None:
        future = peer.answers.pop(key, None)
        if future is not None:
            future.set_result(value)

    def on_report(self, peer: NodeConnection, message: Report) -> None:
        """A node tells what is there."""
        if message.running:
            event = NodeStarted(peer.key, message.comp, message.running)
            self._driver.decide(event)
        self.answer(peer, (message.comp, ''), message)

    def jobs_of(self, comp: str, serials: Sequence[int]) -> List[Any]:
        """Jobs by their serials, those that have not ended."""
        known = self._driver.schedule.comps.get(comp)
        if known is not None:
            nodes = list(known.nodes.values())
        else:
            nodes = []
        return [
            node.in_flight[comp][serial] for serial in serials for node in nodes
            if serial in node.in_flight[comp]
        ]

    def jobs_at(self, comp: str, node: Any) -> Dict[int, Any]:
        """Serial -> job of what has been sent to a node."""
        known = self._driver.schedule.nodes.get(self._nodes.find(comp, node).key)
        if known is not None:
            return dict(known.in_flight.get(comp, {}))
        return {}

    def left_behind(self, comp: str) -> Dict[Any, int]:
        """Nodes that outlive this program, and how many jobs of a computation they have."""
        found = {}
        for key, node in self._driver.schedule.nodes.items():
            peer = self._nodes.by_key.get(key)
            count = len(node.in_flight.get(comp, ()))
            if peer is None:
                continue
            if not peer.embedded and count:
                found[key] = count
        return found

    def stop_if_settled(self) -> bool:
        """End the driver if all that was said has left, and if of all jobs that were called back it
        is known whether they have begun, where there is a link. Returns whether it ends."""
        self._driver.flush()   # the end of this turn shall call nothing back
        for key, node in self._driver.schedule.nodes.items():
            peer = self._nodes.by_key.get(key)
            if peer is None or peer.link is None:
                continue
            if any(node.recalled.values()):
                return False
        if not self._driver.has_sent():
            return False
        self._driver.stop()
        return True


class FailedJob(NamedTuple):
    """A job that has failed, as monitors are told of it."""
    number: int    # of the failure, from 1
    time: float    # when the job ended, in s since the epoch
    cluster: int
    job: Any       # its id
    payload: Any   # its packed arguments, or the number of their bytes if these are many
    status: int
    node: str
    text: str      # the end of its traceback
    key: int = 0   # the job's number for monitors


class FailedJobs:
    """The last FAILURES_KEPT jobs that have failed. One thread adds to them, any may read."""

    def __init__(self) -> None:
        self._count = 0
        self._rows: Deque[FailedJob] = collections.deque(maxlen=FAILURES_KEPT)

    def add(self, time_ended: float, cluster: int, job: Any, payload: Any, status: int, node: str,
            text: str, key: int) -> None:
        """Note a job that has failed. A `time_ended` of 0 means that it has just done so."""
        self._count += 1
        short_text = text[-FAILURE_TEXT:]
        failed_job = FailedJob(self._count, time_ended or time.time(), cluster, job,
                               shown_arguments(payload), status, node, short_text, key)
        self._rows.append(failed_job)

    def all(self) -> List[FailedJob]:
        """All of them, the oldest first."""
        return list(self._rows)

    def since(self, known: int,
              clusters: Optional[AbstractSet[int]] = None) -> List[FailedJob]:
        """The oldest of those with a larger number than `known`, of some clusters or of all, at
        most FAILURES_PAGE. A number that was not given yet comes from an earlier process, and then
        all of them are new."""
        rows = self.all()
        if known <= self._count:
            rows = [row for row in rows if row.number > known]
        if clusters is not None:
            rows = [row for row in rows if row.cluster in clusters]
        return rows[:FAILURES_PAGE]


class EndedJob(NamedTuple):
    """A job that has ended, as monitors are told of it."""
    number: int                  # of the end, from 1
    cluster: int
    key: int                     # the job's number for monitors
    job: Any                     # its id
    payload: Any                 # as of FailedJob
    status: int
    attempts: int                # the number of the last one
    node: Any                    # the key of the node where it was, or None
    where: str                   # the name of that node
    cpus: int
    submitted: Optional[float]   # these three in s since the epoch
    began: Optional[float]
    ended: float
    stdout: Any                  # the end of what it has printed: bytes or text
    stderr: Any
    text: str                    # why it failed
    lost_with: Tuple[str, ...] = ()   # nodes that were lost while it was there


class EndedJobs:
    """The last jobs that have ended: ENDED_KEPT of them, with at most ENDED_BYTES of arguments and
    output. One thread at a time adds to them, any may read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._bytes = 0
        self._rows: Deque[EndedJob] = collections.deque()
        self._sizes: Deque[int] = collections.deque()   # the bytes of each

    def add(self, row: tuple, stdout: Any, stderr: Any, text: str, lost_with: tuple) -> None:
        """Note a job: `row` has the fields of EndedJob from `cluster` to `ended`; the others may be
        longer than there."""
        payload = row[3]
        if type(payload) is not bytes or len(payload) > ARGUMENTS_MOST:
            payload = shown_arguments(payload)
            if payload is not None and type(payload) is not int:
                payload = bytes(in_one_piece(payload))
            row = (*row[:3], payload, *row[4:])
        size = len(stdout) + len(stderr) + len(text)
        if size > OUTPUT_SHOWN:
            stdout = stdout[-OUTPUT_SHOWN:]
            stderr = stderr[-OUTPUT_SHOWN:]
            text = text[-FAILURE_TEXT:]
            size = len(stdout) + len(stderr) + len(text)
        if type(payload) is bytes:
            size += len(payload)
        with self._lock:
            self._count += 1
            fields = (self._count, *row, stdout, stderr, text, lost_with)
            ended_job = EndedJob._make(fields)
            self._rows.append(ended_job)
            self._sizes.append(size)
            self._bytes += size
            while len(self._rows) > ENDED_KEPT or self._bytes > ENDED_BYTES:
                self._rows.popleft()
                self._bytes -= self._sizes.popleft()

    def since(self, known: int, most: int = ENDED_PAGE,
              clusters: Optional[AbstractSet[int]] = None) -> List[EndedJob]:
        """Return the oldest `most` of those with a larger number than `known`, of some clusters or
        of all. A number that was not given yet comes from an earlier process, and then all of them
        are new."""
        with self._lock:
            new = len(self._rows)
            if known <= self._count:
                new = min(new, self._count - known)
            first = len(self._rows) - new
            rows: Iterable[EndedJob] = itertools.islice(self._rows, first, None)
            if clusters is not None:
                rows = (row for row in rows if row.cluster in clusters)
            return list(itertools.islice(rows, most))


def shown_arguments(payload: Any) -> Any:
    """Packed arguments as monitors get them: of large ones only the number of their bytes."""
    if payload is None:
        return None
    size = size_of(payload)
    if size > ARGUMENTS_MOST:
        return size
    return payload


def shown_state(state: str, reason: str) -> str:
    """The state of a node for monitors, which show one that is given no jobs as drained."""
    if reason == DEALLOCATED:
        return 'drained'
    return state


class NodeUse(NamedTuple):
    """How a cluster uses a node, as monitors are told of it."""
    number: int      # of the cluster
    state: str
    reason: str
    cpus: int        # that it may use there
    running: int     # jobs that run there
    used: int        # CPUs of these
    jobs: int        # that have ended there
    seconds: float   # that they have run


def row_of_node(node: 'Union[NodeConnection, NodeInfo]', free: Dict[str, Any],
                heard: Optional[float]) -> Dict[str, Any]:
    """What monitors are told of a node, whoever uses it. `free` is by the node, `heard` in seconds
    since its last sign of life, if it is connected."""
    return {
        'key': node.key,
        'name': node.name,
        'address': node.ip_addr,
        'port': node.port,
        'offered': node.offered,
        'free': [free.get(name) for name in ('memory', 'disk', 'cpu')],
        'totals': [free.get(name) for name in ('memory_total', 'disk_total')],
        'platform': str(node.facts.get('platform', ''))[:200],
        'resources': resource_use(node.facts_now()),
        'heard': heard,
    }


class JobAtNode(NamedTuple):
    """A job that was sent to a node."""
    serial: int
    work: Any
    is_running: bool
    seconds: Optional[float]   # that it has run; None: not known


class JobSight(NamedTuple):
    """What a node has told of a running job."""
    age: float       # s since it was told
    stacks: str      # of its process; empty if they were not asked for
    stdout: bytes    # the ends of these
    stderr: bytes
    error: str       # why nothing is known


class FailedAttempt(NamedTuple):
    """An attempt of a job that has failed and was perhaps not the last."""
    number: int
    node: str
    began: float     # these two in s since the epoch
    ended: float
    text: str        # the last line of what says why


class FailedAttempts:
    """Attempts of the last jobs that have asked to be tried again, for monitors. The driver's
    thread."""
    KEPT = 1000      # jobs
    OF_A_JOB = 20    # attempts of each

    def __init__(self) -> None:
        # (computation, number of the job) -> its attempts
        self._found: 'collections.OrderedDict[Tuple[str, int], List[FailedAttempt]]' = \
            collections.OrderedDict()

    def add(self, comp: str, row: tuple, node: str) -> None:
        """An attempt has failed at a node with this row of Results."""
        serial, outcome, began, ended, payload = row[:5]
        if outcome == Outcome.RAISED:
            text = unpack_error(payload)[0]
        elif outcome in RETURNED:
            text = 'the program has ended with an exit status other than 0'
        else:
            data = in_one_piece(payload)
            text = bytes(data).decode('utf-8', 'replace')
        last = text.strip().rpartition('\n')[2]
        number = attempt_number(serial)
        attempt = FailedAttempt(number, node, began, ended, last[:300])
        key = (comp, job_number(serial))
        attempts = self._found.setdefault(key, [])
        attempts.append(attempt)
        del attempts[:-self.OF_A_JOB]
        if len(self._found) > self.KEPT:
            self._found.popitem(last=False)

    def of(self, comp: str, number: int) -> List[FailedAttempt]:
        """Return those of a job, which is named by its number."""
        return list(self._found.get((comp, number), ()))


class JobLooks:
    """Asks nodes what jobs do that run there: what they have printed last, and the stacks of their
    processes. The driver's thread."""
    APART = 0.5      # s between two questions for a job
    KEPT = 200       # answers
    CANNOT = 'its node is not connected, or is of an older release'

    def __init__(self, driver: 'Driver') -> None:
        self._driver = driver
        # (computation, serial) -> when its node was asked, and when and what it has told
        self._asked: 'collections.OrderedDict[Tuple[str, int], float]' = collections.OrderedDict()
        self._told: 'collections.OrderedDict[Tuple[str, int], Tuple[float, tuple]]' = \
            collections.OrderedDict()

    def look(self, peer: NodeConnection, comp: str, serial: int,
             wants_stacks: bool) -> Optional[JobSight]:
        """Ask the node where a job runs, unless it was asked a moment ago, and return what it has
        told before, None if it has not told anything. What it answers is known the next time."""
        key = (comp, serial)
        now = self._driver.now
        if peer.link is None or not peer.facts.get('looks'):
            return JobSight(0.0, '', b'', b'', self.CANNOT)
        if now - self._asked.get(key, -math.inf) >= self.APART:
            self._keep(self._asked, key, now)
            future = self._driver.calls.call_peer(peer, comp, 'look', serial, wants_stacks)
            future.add_done_callback(functools.partial(self._answered, key))
        told = self._told.get(key)
        if told is None:
            return None
        when, values = told
        return JobSight(now - when, *values)

    def _answered(self, key: Tuple[str, int], future: Any) -> None:
        exc = future.exception()
        if exc is not None:
            values = ('', b'', b'', str(exc))
        else:
            stacks, stdout, stderr = future.result()
            values = (str(stacks), bytes(stdout), bytes(stderr), '')
        self._keep(self._told, key, (self._driver.now, values))

    def _keep(self, table: Any, key: Tuple[str, int], value: Any) -> None:
        table.pop(key, None)
        table[key] = value
        if len(table) > self.KEPT:
            table.popitem(last=False)


class Overview:
    """What monitors ask about the nodes of a driver and the jobs that were sent to them. The
    answers are plain values. Their cost grows with the rows and with the CPUs of a node, never
    with the number of jobs. The driver's thread."""
    JOBS_APART = 1.0   # s between two questions to a node for the jobs that run there

    def __init__(self, driver: 'Driver') -> None:
        self._driver = driver
        # (node, computation) -> when the node was asked
        self._asked: Dict[Tuple[Any, str], float] = {}
        # -> when it answered, and what
        self._reports: Dict[Tuple[Any, str], Tuple[float, Report]] = {}
        self.looks = JobLooks(driver)
        self.attempts = FailedAttempts()

    def forget(self, comp: str) -> None:
        """A computation is over. What is known of nodes that are gone is forgotten as well."""
        peers = self._driver.nodes.by_key
        self._asked = {where: at for where, at in self._asked.items()
                       if where[1] != comp and where[0] in peers}
        self._reports = {where: report for where, report in self._reports.items()
                         if where in self._asked}

    def ask_node(self, peer: NodeConnection, comp: str, apart: float) -> bool:
        """Ask a node what is free there and which jobs of a computation run, unless it was asked
        less than `apart` seconds ago. Returns whether it was asked."""
        where = (peer.key, comp)
        now = self._driver.now
        if peer.link is None:
            return False
        if not peer.name:
            return False
        if now - self._asked.get(where, -math.inf) < apart:
            return False
        self._asked[where] = now
        future = peer.answers.get((comp, ''))
        if future is None:
            future = concurrent.futures.Future()
            peer.answers[comp, ''] = future
            self._driver.send(peer.link, Query(comp))
        future.add_done_callback(functools.partial(self._answered, where))
        return True

    def _answered(self, where: Tuple[Any, str], future: Any) -> None:
        if future.exception() is None:
            self._reports[where] = (self._driver.now, future.result())

    def free_at(self, peer: NodeConnection, comp: str) -> Dict[str, Any]:
        """What is free at a node, by its last answer."""
        free = dict(peer.facts.get('available', {}))
        report = self._reports.get((peer.key, comp))
        if report is not None:
            free.update(report[1].available)
        return free

    def sights(self, comp: str, numbers: Sequence[int],
               wants_stacks: bool) -> List[Optional[JobSight]]:
        """What jobs of a computation do, which are named by their numbers; None where it is not
        known, or not yet."""
        wanted = frozenset(numbers)
        found: Dict[int, Optional[JobSight]] = {}
        for key, node in self._driver.schedule.nodes.items():
            for serial in node.in_flight.get(comp, ()):
                number = job_number(serial)
                if number in wanted:
                    peer = self._driver.nodes.by_key[key]
                    found[number] = self.looks.look(peer, comp, serial, wants_stacks)
        return [found.get(number) for number in numbers]

    def node_row(self, peer: NodeConnection, free: Dict[str, Any]) -> Dict[str, Any]:
        """What is known of a node, whoever uses it."""
        heard = None
        if peer.link is not None:
            heard = max(0.0, self._driver.clock() - peer.link.heard)
        return row_of_node(peer, free, heard)

    def running_at(self, key: Any) -> Dict[str, Tuple[int, int]]:
        """Computation -> how many of its jobs run at a node, and their CPUs."""
        schedule = self._driver.schedule
        found = {}
        for comp, serials in schedule.runs(key).items():
            sent = schedule.nodes[key].in_flight[comp]
            found[comp] = (len(serials), sum(cpus_of(sent[serial]) for serial in serials))
        return found

    def sent_to(self, key: Any, comp: str) -> Dict[int, Any]:
        """Serial -> job of a computation's jobs that were sent to a node and have not ended."""
        node = self._driver.schedule.nodes.get(key)
        if node is None:
            return {}
        return node.in_flight.get(comp, {})

    def jobs_at(self, key: Any, comp: str, most: int = sys.maxsize) -> List[JobAtNode]:
        """The same, with what is known of how long they have run; the first `most` of them. The
        node is asked, and what it answers is known the next time."""
        if not self.sent_to(key, comp):
            return []
        peer = self._driver.nodes.by_key[key]
        self.ask_node(peer, comp, self.JOBS_APART)
        return self.known_jobs_at(key, comp, most)

    def known_jobs_at(self, key: Any, comp: str, most: int = sys.maxsize) -> List[JobAtNode]:
        """The same as `jobs_at`, by what is known already: the node is not asked."""
        sent = self.sent_to(key, comp)
        if not sent:
            return []
        seconds = self._seconds_run(key, comp)
        runs = self._driver.schedule.runs(key)
        run = runs.get(comp, ())
        running = set(run)
        running.update(seconds)
        job_at_nodes: List[JobAtNode] = []
        for serial, work in itertools.islice(sent.items(), most):
            job_at_node = JobAtNode(serial, work, serial in running, seconds.get(serial))
            job_at_nodes.append(job_at_node)
        return job_at_nodes

    def _seconds_run(self, key: Any, comp: str) -> Dict[int, float]:
        """Serial -> seconds, of jobs at a node that are known to have begun."""
        now = self._driver.now
        seconds = {}
        if (key, comp) in self._reports:
            at, report = self._reports[key, comp]
            for serial, ran in report.running:
                seconds[serial] = ran + now - at
        node = self._driver.schedule.nodes[key]
        begun = node.begun[comp]
        for serial, since in begun.items():
            seconds[serial] = now - since
        return seconds


class LostNodes:
    """What follows when the link to a node ends, and what the log tells of nodes that are lost and
    come back. The driver's thread.

    requeued, ended - jobs that waited again, and that ended without a result, since `mark`
    """

    def __init__(self, driver: 'Driver') -> None:
        self._driver = driver
        self.requeued = 0
        self.ended = 0

    def mark(self) -> None:
        """Begin to count jobs."""
        self.requeued = 0
        self.ended = 0

    def doubt(self, event: NodeDoubted) -> None:
        """Hand evidence that a node is lost to the Schedule, and tell what became of its jobs."""
        self.mark()
        self._driver.decide(event)
        self._tell_jobs(event.name)

    def _tell_jobs(self, name: str) -> None:
        """What became of the jobs that were at a node."""
        counts = ((self.requeued, 'waits again', 'wait again'),
                  (self.ended, 'was abandoned', 'were abandoned'))
        texts = []
        for count, one, several in counts:
            if count == 1:
                texts.append('1 job %s' % one)
            elif count:
                texts.append('%d jobs %s' % (count, several))
        if texts:
            logger.info('node %s is lost: %s', name, ', '.join(texts))

    def gone(self, action: NodeGone) -> None:
        """A node was away too long."""
        peer = self._driver.nodes.by_key.get(action.node)
        if peer is None:
            return
        self._tell_jobs(str(peer))
        if peer.link is not None or peer.port:
            return
        if not peer.embedded:
            self._driver.connector.forget(peer)

    def link_ended(self, channel: Link, text: str) -> None:
        """A link came to its end: the node is lost until it is reached again."""
        driver = self._driver
        peer = driver.nodes.by_link[channel.number]
        peer.move('fail')
        used = []
        for comp, use in peer.uses.items():
            if use.state is AssignmentState.READY:
                used.append(comp)
        driver.tell_all(DispyNode.Closed, peer, used)
        driver.selection.unlink(peer, channel)
        if channel.stall:
            text = self._tell_stall(peer, channel.stall, text)
        until = self._away_until(peer, channel)
        if until <= driver.now:
            evidence = Evidence.SILENCE
        else:
            evidence = Evidence.CUT
        doubted = NodeDoubted(peer.key, str(peer), evidence, text, peer.kind, until=until)
        lost = driver.schedule.judge(doubted) is Loss.LOST
        line = self._line_of(peer, text, lost, until)
        if not peer.replacing:
            peer.lost_at = driver.now
        self.doubt(doubted)
        peer.told.clear()
        driver.chores.warn_soon(used)
        reason = 'the connection ended: %s' % text
        if peer.port or peer.embedded:
            lived = driver.now - peer.linked_at
            driver.connector.not_reached(peer, reason, lived, line)
            if not lost and not peer.wrong:
                peer.dialling.due = driver.now
            peer.wrong = False
        else:   # it dials us
            peer.reason = reason
            logger.warning('%s', line)
            if lost:
                driver.connector.forget(peer)

    def _line_of(self, peer: NodeConnection, text: str, lost: bool, until: float) -> str:
        """What the log says when a link has ended, and what becomes of the jobs that are there."""
        if peer.scheduler:
            kind = ''
        else:
            kind = 'node '
        line = 'lost the connection to %s%s: %s' % (kind, peer, text)
        node = self._driver.schedule.nodes.get(peer.key)
        if node is not None:
            count = sum(map(len, node.in_flight.values()))
        else:
            count = 0
        if lost or not count:
            return line
        if until == math.inf:
            return '%s; it keeps the %s that it has' % (line, many(count, 'job'))
        return '%s; the %s that it has %s lost if it is not back within %.1f s' % (
            line, many(count, 'job'), 'is' if count == 1 else 'are', until - self._driver.now)

    @staticmethod
    def _tell_stall(peer: NodeConnection, stall: str, text: str) -> str:
        """Why a link ended on which full packets have not arrived, while short ones did."""
        text += ': ' + STALLS[stall]
        # One that connects by itself says how long packets may be
        if peer.port and not peer.segment:
            peer.segment = SEGMENT
            text += '. From now on packets to and from there carry at most %d bytes' % SEGMENT
            if peer.replacing:   # nothing else is said
                logger.warning('node %s: %s', peer, text)
        return text

    def _away_until(self, peer: NodeConnection, link: Link) -> float:
        """Until when what is on a node is not lost. Not before a new connection has been tried in
        vain."""
        if peer.scheduler:
            return math.inf   # it keeps what it has on disk
        until = link.heard + PULSES_LOST * link.pulse
        if peer.port and (peer.second.busy or not peer.second.has_failed(link.heard)):
            until = max(until, self._driver.now + PULSES_SILENT * link.pulse)
        return until

    def back(self, peer: NodeConnection) -> None:
        """A node is connected, perhaps again."""
        if peer.lost_at is not None:
            logger.info('node %s is connected again after %.1f s', peer,
                        self._driver.now - peer.lost_at)
            peer.lost_at = None


LOGGED_ITEMS = 8     # of a list, in a line of the log at DEBUG


def logged(value: Any) -> str:
    """A value of an event or an action, as the log at DEBUG shows it. Runs none of the user's
    code."""
    kind = type(value)
    if kind is float:
        return '%.9g' % value
    if value is None or kind in (bool, int, str):
        return '%.120r' % (value,)
    if isinstance(value, ScheduledJob):
        return _logged_job(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (bytes, bytearray, memoryview)):
        return '<%d bytes>' % len(value)
    if hasattr(kind, '_fields'):
        fields = zip(kind._fields, value)
        return '%s(%s)' % (kind.__name__, ', '.join('%s=%s' % (name, logged(field))
                                                    for name, field in fields))
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        items = list(map(logged, itertools.islice(value, LOGGED_ITEMS)))
        if len(value) > LOGGED_ITEMS:
            message = '%d more' % (len(value) - LOGGED_ITEMS)
            items.append(message)
        return '[%s]' % ', '.join(items)
    return '<%s>' % kind.__name__


def _logged_job(work: ScheduledJob) -> str:
    number = getattr(work, 'id', None)
    if type(number) not in (int, str):   # an object of the user's
        number = ''
    if not work.serial:
        return 'job %.80s' % (number,)
    return 'job %.80s (serial %d)' % (number, work.serial)


class DecisionLog:
    """The log at DEBUG of what a Schedule is told and of what it decides.

    is_on - whether the log is shown; looked at again when a cluster begins, and now and then
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self.is_on = False

    def look(self) -> None:
        """Find out whether the log is shown."""
        self.is_on = self._log.isEnabledFor(logging.DEBUG)

    def add(self, event: Any, actions: Sequence[Any]) -> None:
        """An event and the actions that it leads to; without an event, what is sent at the end of
        a turn."""
        if event is not None:
            self._log.debug('event %s: %s', logged(event),
                            ', '.join(map(logged, actions)) or 'nothing is to be done')
        elif actions:
            self._log.debug('end of a turn: %s', ', '.join(map(logged, actions)))


class Chores:
    """What a driver does now and then: dial, ask, give up probing, warn, and look for clusters that
    nobody uses any more. The driver's thread.

    at - when something is due
    """
    MOST = 60.0     # s between two looks

    def __init__(self, driver: 'Driver') -> None:
        self._driver = driver
        self._unused = Unused()
        self._warn_at: Dict[str, float] = {}   # by computations
        self.at = 0.0

    def begin(self, comp: str, warns: bool) -> None:
        """A cluster is opened; `warns`: its user hears of it when no node can be used."""
        self._warn_at[comp] = self._driver.now + WARN_AFTER if warns else math.inf

    def forget(self, comp: str) -> None:
        """A cluster is closed."""
        del self._warn_at[comp]

    def soon(self) -> None:
        """Look in this turn for what is due."""
        self.at = self._driver.now

    def within(self, seconds: float) -> None:
        """Look after so many seconds at the latest."""
        self.at = min(self.at, self._driver.now + seconds)

    def warn_soon(self, comps: Iterable[str]) -> None:
        """Look soon whether these computations have no node any more."""
        for comp in comps:
            self._warn_at[comp] = min(self._warn_at[comp], self._driver.now + WARN_AFTER)

    def do(self) -> None:
        """Do what is due, and find out when to do so next."""
        driver = self._driver
        now = driver.now
        driver.decisions.look()
        due = [now + self.MOST, self._unused.look(driver.clusters, now)]
        driver.jobs.end_lost_when_due(due)
        driver.connector.searches.ask_when_due(due)
        driver.connector.dial_when_due(due)
        driver.selection.start_embedded_when_due(due)
        for comp, when in list(self._warn_at.items()):
            if now >= when:
                self._warn(comp)
            due.append(self._warn_at[comp])
        for peer in list(driver.nodes.by_key.values()):
            uses = peer.uses.values()
            if any(use.acks for use in uses):
                driver.jobs.acknowledge(peer)
            if peer.retry_at is not None:
                if now >= peer.retry_at:
                    driver.setup.retry(peer)
                else:
                    due.append(peer.retry_at)
        self.at = min(due)

    def _warn(self, comp: str) -> None:
        """Warn that no node is ready for a computation, so that nobody waits in silence."""
        driver = self._driver
        self._warn_at[comp] = driver.now + WARN_EVERY
        nodes = driver.queries.nodes_of(comp)
        if not any(state == 'ready' for _, state, _, _, _ in nodes):
            cluster = driver.clusters[comp]
            cluster.warn('%s waits for a node. %s'
                         % (cluster.name, driver.queries.explain_no_nodes(comp)))


class DriverParts(NamedTuple):
    """What a driver has to do with sockets, threads and chance. A simulation of the system gives
    its driver others.

    link - the class of a connection that nodes and clients have authenticated
    attempt - the class of an attempt to connect
    pool - the class of a group of threads
    event - makes what threads of the user wait for
    new_comp - makes the name of a computation
    """
    link: Type[Link] = Link
    attempt: Type[ConnectionAttempt] = ConnectionAttempt
    pool: Type[Pool] = Pool
    event: Callable[[], threading.Event] = threading.Event
    new_comp: Callable[[], str] = new_comp


class Driver(Loop):
    """See the module's docstring. Made and ended by `Drivers`.

    It is the loop: it has the Schedule, the clusters and the timers, and hands what comes to its
    parts, of which each owns its state.

    nodes - the nodes that are known
    connector - finds nodes and connects to them
    selection - which nodes each cluster uses
    setup - sets computations up at nodes
    files - files that go to nodes and come from jobs
    jobs - jobs to nodes, and what comes of them
    cancels - jobs that are not wanted any more
    lost_nodes - what follows when a link to a node ends
    decisions - the log of what the Schedule decides
    recoveries - what nodes have of programs that have crashed
    calls - questions to a scheduler and from it
    queries - what clusters ask about nodes
    overview - what monitors ask about nodes and jobs
    chores - what is to be done now and then
    """
    log = logger
    PARTING = 2.0    # parts of large values may fill a link, and the other side would wait for us

    def __init__(self,
                 access: ConnectionSettings,
                 instance: bytes = b'',
                 policy: Optional[NodePolicy] = None,
                 parts: DriverParts = DriverParts()) -> None:
        self.instance = instance or _instance
        self.parts = parts
        self.policy = policy or NodePolicy()
        psk = derive_key(access.secret)   # these may fail, and there are no sockets yet
        tls = None
        if access.certfile:
            tls = tls_context(False, access.certfile, access.keyfile, access.cafile)
        super().__init__()
        self.access = access
        self.values.where = 'in the program'
        self.schedule = Schedule()
        self.broken = ''                    # why the driver's thread has ended before its time
        self.clusters: Dict[str, NodeUser] = {}      # by their computations
        self.openers = parts.pool('dispy-opener', 2)
        self.callbacks = parts.pool('dispy-callback', CALLBACK_THREADS, CALLBACK_TIME)
        self.tellers = parts.pool('dispy-status', 1)   # one: changes are told in their order
        self.nodes = NodeTable()
        self.connector = Connector(self, psk, tls)
        self.selection = NodeSelection(self)
        self.setup = ComputationSetup(self)
        self.files = FileTransfers(self)
        self.jobs = JobExchange(self)
        self.held_back = HeldBack(self)
        self.cancels = Cancellations(self)
        self.lost_nodes = LostNodes(self)
        self.decisions = DecisionLog(self.log)
        self.recoveries = Recoveries(self)
        self.calls = SchedulerCalls(self)
        self.queries = NodeQueries(self)
        self.overview = Overview(self)
        self.chores = Chores(self)
        self.soon = self.chores.soon      # for the parts
        self.thread = threading.Thread(target=self._main, name='dispy-driver', daemon=True)
        self._acts = {
            SendJobs: self.jobs.send_jobs,
            SendSecond: self.held_back.send,
            SecondOver: self.held_back.over,
            SecondCounts: self.held_back.counts,
            SendCancel: self.jobs.send_to_node,
            SendRecall: self.jobs.send_to_node,
            SendAck: self.jobs.send_ack,
            JobsStarted: self.jobs.jobs_started,
            JobsEnded: self.jobs.jobs_ended,
            JobEnded: self.jobs.job_ended,
            JobWaits: self.jobs.job_waits,
            JobParked: self.jobs.job_parked,
            JobsHeld: self.jobs.jobs_held,
            JobFailedOnce: self.jobs.failed_once,
            JobStays: self.jobs.job_stays,
            Withdrawn: self.cancels.withdrawn,
            LimitNode: self.selection.limit_node,
            NodeDrained: self.selection.drained,
            NodeGone: self.lost_nodes.gone,
        }
        self._messages: Dict[type, Callable[[NodeConnection, Any], None]] = {
            NodeHello: self.setup.on_welcome,
            Ready: self.setup.on_ready,
            Refused: self.setup.on_refused,
            CpusChanged: self.setup.on_offer,
            Need: self.files.on_need,
            FilePiece: self.files.on_file_piece,
            FileStored: self.files.on_file_stored,
            Results: self.jobs.on_results,
            JobsReturned: self.jobs.on_returned,
            Started: self.jobs.on_started,
            Output: self.jobs.on_output,
            KnownAttempts: self.recoveries.on_held,
            Report: self.queries.on_report,
            JobsAssigned: self.calls.on_where,
            NodeChanged: self.calls.on_news,
            Notice: self.calls.on_said,
            Call: self.calls.on_call,
            Return: self.calls.on_return,
        }
        self._events: Dict[type, Callable[[Any], None]] = {
            DispyJob: self.jobs.submitted.append,
            KeptJob: self.jobs.submitted.append,
            Connected: self.connector.dialled,
            ConnectFailed: self.connector.dial_failed,
            Authenticated: self.connector.arrived,
            RunInDriver: self._asked,
            StatusCallback: lambda event: event.callbacks.tell(event.status, event.peer, event.job),
            JobCallback: lambda event: self.callbacks.run(event.callbacks.call_back, event.job),
        }

    # -- life; user threads ------------------------------------------------------------------------

    def finish(self) -> None:
        """Leave all nodes and end the thread. Any thread but the driver's."""
        with contextlib.suppress(RuntimeError, TimeoutError):   # it has broken before
            self.ask(self._leave)

        def join(seconds: float) -> bool:
            self.thread.join(seconds)
            return not self.thread.is_alive()
        in_slices(join, CALL_TIME)

    def ask(self, call: Callable[[], Any]) -> Any:
        """Call it in the driver's thread and return what it returns. Any thread but the
        driver's."""
        future: 'concurrent.futures.Future[Any]' = concurrent.futures.Future()
        if self.broken:
            raise RuntimeError(self.broken)
        self.post(RunInDriver(call, future))
        if self.broken:   # set before the inbox is emptied for the last time
            raise RuntimeError(self.broken)
        return answer_of(future, CALL_TIME)

    def call_soon(self, call: Callable[..., Any], *args: Any) -> None:
        """Call it in the driver's thread. Any thread."""
        event = RunInDriver(functools.partial(call, *args), None)
        self.post(event)

    def _main(self) -> None:
        try:
            self.run()
        except BaseException as exc:  # our own fault; nobody may wait for ever because of it
            self.broken = "dispy's driver thread has failed: %s" % describe_exception(exc).strip()
            logger.exception('the driver thread has failed; all jobs end as Abandoned')
            for cluster in list(self.clusters.values()):
                cluster.driver_failed(self.broken)
        finally:
            self.broken = self.broken or 'the cluster was closed'
            self._hang_up()
            self.close()

    def _leave(self) -> None:
        for peer in self.nodes.by_key.values():
            if peer.link is not None:
                self.disconnect(peer.link, 'the program has closed its clusters')
        self.stop()

    def _hang_up(self) -> None:
        for pool in (self.openers, self.callbacks, self.tellers):
            pool.close()
        self.connector.close()
        for event in list(self._inbox):
            if not isinstance(event, RunInDriver):
                continue
            if event.future is not None:
                event.future.set_exception(RuntimeError(self.broken))

    def after_fork(self) -> None:
        """In a forked child the driver's thread does not exist. Let go of its sockets without a
        word, so that nodes do not take the child for the client."""
        self.broken = ('this process was forked from the one that made the cluster: make a new '
                       'one here')
        links = self.links.values()
        socks = []
        for link in links:
            if link.sock is not None:
                socks.append(link.sock)
        handles = socks + self.connector.sockets()
        self._selector.close()
        for sock in (*handles, self._waker, self._wakened):
            sock.close()
        for peer in self.nodes.by_key.values():
            if peer.local is not None:
                peer.local.after_fork()
            if peer.process is None:
                continue
            if peer.process.stdin is not None:
                os.close(peer.process.stdin.fileno())

    # -- clusters ----------------------------------------------------------------------------------

    def open(self, cluster: NodeUser, probe: bool) -> None:
        """Begin to use nodes for a cluster; with `probe` start one here if none answers soon.
        Raises OSError if it is to listen and cannot."""
        self.decisions.look()
        comp = cluster.comp
        for where in cluster.hosts:
            self.connector.listen(*where, may_fail=cluster.hosts_may_fail)
        if cluster.journal is not None:
            self.jobs.outgoing.journals[comp] = cluster.journal
        self.clusters[comp] = cluster
        event = Opened(comp, cluster.client, cluster.reentrant, cluster.remote,
                       cluster.cpus_in_all(), cluster.speculate, cluster.user_name)
        self.decide(event)
        self.chores.begin(comp, cluster.warns)
        self.selection.use(comp, cluster.specs)
        if probe:
            self.selection.probes[comp] = self.now + PROBE_TIME
            self.selection.use_address(comp, '127.0.0.1', cluster.port, cluster.specs[0],
                                       False).probed = True
        elif not cluster.specs:
            self.selection.use_embedded(comp)

    def forget(self, comp: str, shutdown: bool = False) -> Set[str]:
        """A cluster is closed: end its jobs, tell its nodes, which may end when this client lets
        them go. Returns the places of nodes that could not be told, as they are not connected."""
        connector = self.connector
        untold: Set[str] = set()
        if self.clusters.get(comp) is None:
            return untold
        self.jobs.take_submitted()
        self.decide(Closed(comp))
        self.held_back.forget_all(comp)
        cluster = self.clusters.pop(comp)
        self.jobs.outgoing.forget(comp)
        self.chores.forget(comp)
        self.nodes.misfits.forget(comp)
        self.overview.forget(comp)
        self.selection.probes.pop(comp, None)
        self.files.abort(lambda number, name: name == comp)
        self.files.backlog.drop(comp)
        for peer in [peer for peer in self.nodes.by_key.values() if comp in peer.uses]:
            if peer.link is None:
                untold.add(peer.place)
            self.selection.done(peer, comp, shutdown)
            del peer.uses[comp]
            self.selection.drop_unused(peer)
        connector.searches.end_unwanted()
        connector.end_listening(cluster)
        return untold

    def is_over(self, comp: str) -> bool:
        """Whether nobody here wants anything of a computation any more that a node still has for
        this process."""
        if comp in self.clusters:
            return False
        return comp not in self.recoveries.by_comp

    # -- loop --------------------------------------------------------------------------------------

    def posted(self) -> List[Any]:
        """What was posted and has not been handled."""
        return list(self._inbox)

    def decide(self, event: Any) -> List[Any]:
        """Hand an event to the Schedule, and carry out what it decides, which is returned. This and
        `flush` are the only places where the Schedule is called."""
        actions = self.schedule.handle(event, self.now)
        if self.decisions.is_on:
            self.decisions.add(event, actions)
        self.act(actions)
        return actions

    def on_event(self, event: Any) -> None:
        """Jobs, answers of dial threads, questions of user threads."""
        self._events[type(event)](event)

    def _asked(self, event: RunInDriver) -> None:
        future = event.future
        try:
            answer = event.call()
        except Exception as exc:  # the asker gets it
            if future is None:
                raise
            future.set_exception(exc)
        else:
            if future is not None:
                future.set_result(answer)

    # -- faults of ours ----------------------------------------------------------------------------

    def on_fault(self, subject: Any, text: str) -> bool:
        """End what the fault concerns: a link, or jobs that are nowhere any more."""
        self.jobs.note_fault(text)
        if isinstance(subject, (SendJobs, SendSecond)):
            # Some of them cannot be sent, and nobody knows which
            self.jobs.end_unsent(subject, text)
            return True
        if isinstance(subject, (RunInDriver, StatusCallback, JobsEnded, JobEnded)):
            return True
        node = getattr(subject, 'node', None)
        peer = self.nodes.by_key.get(node)
        if peer is not None:
            if peer.link is not None:
                self.break_link(peer.link, text)
                return True
        return super().on_fault(subject, text)

    def send(self, link: Link, message: Any) -> None:
        """As a Loop's; it is noted which jobs are in which frame."""
        super().send(link, message)
        if type(message) is Jobs and link.sock is not None:   # in memory there are no frames
            self.refusals.sent(link, message)

    def unsaid(self, link: Link, message: Any, text: str) -> None:
        """As a Loop's; who asks a scheduler for something gets the error."""
        peer = self.nodes.by_link.get(link.number)
        future = None
        if peer is not None:
            if type(message) is Call:
                future = peer.answers.pop((message.comp, 'call %d' % message.number), None)
        if future is not None:
            future.set_exception(ValueError(text))
        else:
            super().unsaid(link, message, text)

    def tell_later(self, call: Callable[..., Any], *args: Any) -> None:
        """Call it after all that cluster_status functions have been told until now. The driver's
        thread."""
        self.tellers.run(call, *args)

    def is_teller(self) -> bool:
        """Whether this is the thread that calls cluster_status functions. Any thread."""
        return threading.current_thread().name.startswith(self.tellers.name + '-')

    def tell_all(self, status: int, peer: NodeConnection, comps: Iterable[str]) -> None:
        """A node has changed for these computations."""
        for comp in comps:
            if comp in self.clusters:
                self.clusters[comp].node_changed(status, peer)

    def end_of_turn(self) -> None:
        """New jobs, jobs to nodes, and now and then what is due. The embedded node has a turn
        before that, when results have come, and one after it, when jobs go there: so neither waits
        for another turn of the loop."""
        peers = self.nodes.by_key
        peer = peers.get(LOCAL)
        if peer is not None and peer.local is not None:
            local = peer.local
            if local.is_due:
                self.guard(None, local.turn)
            if local.link.has_messages:
                self.receive(local.link)
        self._own_turn()
        peer = peers.get(LOCAL)   # it may be another
        if peer is not None and peer.local is not None:
            if peer.local.has_messages:
                self.guard(None, peer.local.turn)

    def _own_turn(self) -> None:
        if self.jobs.submitted:
            self.guard(None, self.jobs.take_submitted)
        self.guard(None, self.flush)
        if self.files.backlog.waiting:
            self.guard(None, self.files.send)
        # Before anything of this turn is sent, and before results are acknowledged
        if self.jobs.outgoing.journals:
            self.guard(None, self.jobs.note_down)
        if self.now >= self.chores.at:
            self.guard(None, self.chores.do)

    def next_timer(self) -> Optional[float]:
        """When chores are due, at once while files wait for room in a link."""
        if self.files.backlog.waiting and self.files.backlog.has_room():
            return 0.0
        first = self.chores.at
        parts: List[Any] = [self.schedule]
        peer = self.nodes.by_key.get(LOCAL)
        if peer is not None and peer.local is not None:
            parts.append(peer.local)
        for part in parts:
            when = part.next_timer()
            if when is not None and when < first:
                first = when
        return first

    def flush(self) -> None:
        """Let the Schedule send what waits to nodes that have room."""
        schedule = self.schedule
        if schedule.away:
            self.lost_nodes.mark()
            if self.now - self.busy_since >= RETURN_APART:
                schedule.is_behind(self.now)
        actions = schedule.flush(self.now)
        if self.decisions.is_on:
            self.decisions.add(None, actions)
        self.act(actions)

    # -- links -------------------------------------------------------------------------------------

    def on_channel(self, channel: Link) -> None:
        """A link has something."""
        peer = self.nodes.by_link[channel.number]
        for message in channel.messages(self.now):
            kind = type(message)
            if kind is Pulse:
                continue
            if kind is Wrong:
                self.jobs.refused_frame(peer, channel, message)
            if kind is Bye:   # what a node has not answered for was never started
                ready = []
                for comp, use in peer.uses.items():
                    if use.state is AssignmentState.READY:
                        ready.append(comp)
                doubt = NodeDoubted(peer.key, str(peer), Evidence.BYE, message.text[:200],
                                    peer.kind, ready)
                self.lost_nodes.doubt(doubt)
                raise LinkBroken(message.text[:200])
            if kind not in self._messages:
                raise PeerError('%s may not come here' % kind.__name__)
            self._messages[kind](peer, message)

    def on_silent(self, link: Link) -> None:
        """Another connection is tried while this one still counts."""
        self.connector.try_second(link)

    def on_broken(self, channel: Link, text: str) -> None:
        """A link came to its end: the node is lost until it is reached again."""
        self.lost_nodes.link_ended(channel, text)

    def remove_old_trails(self) -> None:
        """Have old trails removed, once in a program."""
        global _trails_looked_at
        if not _trails_looked_at:
            _trails_looked_at = True
            self.openers.run(remove_old_trails)

    def has_sent(self) -> bool:
        """Whether all that was said has left, where there is a link."""
        for link in self.links.values():
            if link.wants_write:
                return False
        return True

    def say_to(self, peer: NodeConnection, message: Any) -> None:
        """Send a message to a node or scheduler, if it is connected."""
        if peer.link is not None:
            self.send(peer.link, message)


class Drivers:
    """The drivers of this process. Clusters that have the same settings share one. Any thread."""

    def __init__(self) -> None:
        self._shared: Dict[ConnectionSettings, Driver] = {}
        self._users: 'collections.Counter[Driver]' = collections.Counter()   # clusters

    def acquire(self, access: ConnectionSettings) -> Driver:
        """Return the running driver for these settings, which is made if need be. Raises
        SecretError."""
        with _lock:
            driver = self._shared.get(access)
            if driver is None or driver.broken or driver.has_ended:
                driver = Driver(access)
                driver.thread.start()
                self._shared[access] = driver
            self._users[driver] += 1
            return driver

    def alone(self, access: ConnectionSettings) -> Driver:
        """Return a driver that no cluster shares: to nodes it is another program. Raises
        SecretError."""
        driver = Driver(access, os.urandom(16))
        driver.thread.start()
        with _lock:
            self._users[driver] = 1
        return driver

    def release(self, driver: Driver) -> None:
        """A cluster is done with a driver; the last one ends it. Any thread but the driver's."""
        with _lock:
            if driver not in self._users:   # this process is a fork of its own
                return
            self._users[driver] -= 1
            if self._users[driver]:
                return
            del self._users[driver]
            if self._shared.get(driver.access) is driver:
                del self._shared[driver.access]
        driver.finish()

    def after_fork(self) -> None:
        """In a forked child: all of them are the parent's."""
        for driver in self._users:
            driver.after_fork()
        self._shared.clear()
        self._users.clear()


def failure_of(row: tuple, is_program: bool) -> Optional[BaseException]:
    """What `get` would raise for a row of Results; None for one that is no failure. Runs the user's
    code."""
    job = DispyJob('', None, None, 0)
    if row[1] in RETURNED:
        job.state = JobState.FINISHED
    else:
        job.state = JobState.TERMINATED
    fill_in(job, row, is_program)
    if job.status != JobState.FINISHED:
        return error_of(job)
    if has_exit_status(job):
        return exit_error(job)
    return None


def job_row(work: Any, payload: Any, names: Sequence[str]) -> Tuple[tuple, int]:
    """A row of Jobs, with these of its options, and its bytes."""
    if type(payload) is bytes and not work.options and len(payload) < OUT_OF_BAND:
        return (work.serial, payload, None), len(payload)   # nearly always
    options = work.options and {name: work.options[name] for name in names if name in work.options}
    return (work.serial, out_of_band(payload), options or None), size_of(payload)


_ERRORS: Dict[str, Type[Exception]] = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, RuntimeError, KeyError, OSError, NoNodes)
}
_MAY_DIAL = frozenset((NodeState.FOUND, NodeState.UNREACHED, NodeState.LOST))
_MAY_OFFER = frozenset((AssignmentState.WAITING, AssignmentState.ASKING, AssignmentState.REFUSED))
# Options of a job that its node has to know
OF_JOBS = ('cpus', 'timeout', 'memory', 'priority', 'values', 'resources')
_OF_JOBS_THERE = (*OF_JOBS, 'retries', 'node')   # and a scheduler
# Guards the table of drivers, the making of jobs' events, cloudpickle's registry
_lock = threading.Lock()
drivers = Drivers()
_clusters: 'weakref.WeakSet[JobCluster]' = weakref.WeakSet()   # those that are open
_told_of_many: Set[Tuple[str, str]] = set()   # functions of which several clusters were open
_instance = os.urandom(16)    # this process to nodes
_trails_looked_at = False     # for old ones


def _forked() -> None:
    """In the child of a fork: nothing of the parent's is ours."""
    global _lock, _instance
    _lock = threading.Lock()
    _instance = os.urandom(16)
    drivers.after_fork()
    shared_values.after_fork()
    joblib_clusters.after_fork()
    for cluster in list(_clusters):
        core_of(cluster).after_fork()
    _clusters.clear()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_forked)


def _user_name() -> str:
    import getpass
    try:
        return getpass.getuser()
    except (KeyError, OSError):   # no entry for this number, as in some containers
        return 'unknown'


def own_python() -> str:
    """The program that runs Python code for this one. Raises StartError in a frozen program, whose
    `sys.executable` is itself: it would start itself again, and each of these once more."""
    spawn: Any = sys.modules.get('multiprocessing.spawn')   # where set_executable() keeps it
    if spawn is not None:
        python = os.fsdecode(spawn.get_executable() or '')
    else:
        python = ''
    frozen = getattr(sys, 'frozen', False)
    if frozen and python in ('', sys.executable):
        message = ("no node can be started on this machine: this program is frozen into one "
                   "executable "
                   "(%s), so that sys.executable is no Python, and would only start the "
                   "program again. "
                   "Start `python dispynode.py` on this machine and name it "
                   "(nodes=['127.0.0.1']), or "
                   "call multiprocessing.set_executable() with the path of a Python %d.%d "
                   "before a "
                   "cluster is made" % (sys.executable, *sys.version_info[:2]))
        raise StartError(message)
    return python or sys.executable


def _start_embedded(peer: NodeConnection) -> Tuple['subprocess.Popen[bytes]', int, bytes]:
    """A dispynode for this program alone: loopback, a random secret, and stdin as the line it lives
    by. Not run as a script, which would be compiled anew each time, and not by multiprocessing,
    which would run the user's main program again."""
    import tempfile
    import dispynode
    python = own_python()
    secret = os.urandom(32).hex().encode()
    # What is imported stays. The garbage collector would look through it again and again meanwhile.
    code = ('import gc, sys; gc.disable(); sys.path.insert(0, %r); import dispynode; gc.freeze(); '
            'gc.enable(); sys.exit(dispynode.main())')
    prefix = peer.directory = tempfile.mkdtemp(prefix='dispy-')
    absolute_path = os.path.abspath(dispynode.__file__)
    directory = os.path.dirname(absolute_path)
    command = [
        python, '-c', code % directory, '--embedded', '-i', '127.0.0.1', '-p', '0',
        '--dest-path-prefix', prefix
    ]
    variables = dict(os.environ)
    variables.pop('DISPY_SECRET', None)   # it has a secret of its own
    with process_start_lock:
        # Ctrl-C is ours
        create_new_process_group = getattr(subprocess, 'CREATE_NEW_PROCESS_GROUP', 0)
        process = peer.process = subprocess.Popen(command,
                                                  stdin=subprocess.PIPE,
                                                  stdout=subprocess.PIPE,
                                                  start_new_session=True,
                                                  creationflags=create_new_process_group,
                                                  env=variables)
    assert process.stdin is not None and process.stdout is not None   # ours: both are pipes
    try:
        process.stdin.write(secret + b'\n')
        process.stdin.flush()
        line = process.stdout.readline()
        return process, int(line), derive_key(secret)
    except (OSError, ValueError) as exc:
        _end_embedded(process)
        raise HandshakeError('a node for this program could not be started (exit code %s)' %
                             process.returncode) from exc


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


# --------------------------------------------------------------------------------------------------
# Clusters. A JobCluster is what the program has in hand; behind it stands a ProgramCluster, which
# its driver knows, with parts that each have one responsibility. No part refers to the JobCluster
# but ProgramCluster.cluster, so that it can be told when the program has dropped its own.
# --------------------------------------------------------------------------------------------------

def _python(python: Any) -> str:
    """Which Python of a node runs jobs; '' for its own. Raises TypeError or ValueError."""
    if python is not None and not isinstance(python, str):
        raise TypeError("python=%.80r must be a name that nodes know (dispynode --python), or a "
                        "version such as '3.12'" % (python,))
    if python and not re.fullmatch('%s|[0-9]+([.][0-9]+){0,2}' % RESOURCE_NAME.pattern, python):
        raise ValueError("python=%.80r is neither a name of letters, digits, _, . and - nor a "
                         "version such as '3.12'" % python)
    return python or ''


def _start_method(method: Any) -> str:
    """How nodes shall start workers; '': as they do by default. Raises ValueError."""
    if method not in (None, FORK, SPAWN):
        raise ValueError("start_method=%.80r must be 'fork', 'spawn' or None" % (method,))
    return method or ''


INTERVALS = {'pulse_interval': (0.1, 1000), 'ping_interval': (0.1, 3600),
             'poll_interval': (0.1, 3600)}   # the range of each, in seconds
# Parameters that are checked where they are used
TAKEN_AS_GIVEN = (
    'cluster_status', 'on_output', 'depends', 'setup', 'secret', 'certfile', 'keyfile', 'cafile')


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """The parameters of a cluster after they were checked. Attributes that are not named here are
    the parameters of these names, see JobCluster.

    specs - the nodes that `nodes` means
    probes - a node is started on this machine if none answers
    hosts - the addresses and ports of `host`; hosts_may_fail: that one is taken is no error
    jobs_per_worker - `max_jobs_per_worker`
    loglevel - the level as a number
    recover_file - its path, or None
    keeps_trail - without a recover_file, another process can find what is left on nodes
    """
    port: int
    specs: List[NodeSpec]
    probes: bool
    hosts: List[Tuple[str, int]]
    hosts_may_fail: bool
    multicast: bool
    pulse_interval: Optional[float]
    ping_interval: Optional[float]
    poll_interval: Optional[float]
    job_status: Any
    cluster_status: Any
    on_output: Any
    depends: Any
    dest_path: Optional[str]
    setup: Any
    cleanup: Any
    jobs_per_worker: Optional[int]
    reentrant: bool
    speculate: bool
    forward_logs: bool
    start_method: str
    resources: Request
    python: str
    job_dir: bool
    returns: Tuple[str, ...]
    dest: Optional[str]
    loglevel: int
    recover_file: Optional[str]
    keeps_trail: bool
    secret: Union[str, bytes, None]
    certfile: Optional[str]
    keyfile: Optional[str]
    cafile: Optional[str]

    @classmethod
    def from_arguments(cls, given: Dict[str, Any], remote: bool) -> 'ClusterOptions':
        """Check the parameters of JobCluster, `given` by their names. `remote` says that the nodes
        are a scheduler's. Raises TypeError or ValueError, which names the parameter, its value and
        what is allowed."""
        options = {name: given[name] for name in TAKEN_AS_GIVEN}
        port = options['port'] = node_port_of(given['dispy_port'], given['node_port'])
        for name, (low, high) in INTERVALS.items():
            options[name] = in_range(name, given[name], None, low, high)
        options['jobs_per_worker'] = in_range(
            'max_jobs_per_worker', given['max_jobs_per_worker'], None, 1, 1 << 31, True)
        host = given['host']
        if host is None:
            host = given['ip_addr']
        elsewhere = remote or host is not None
        probes, specs = nodes_meant(given['nodes'], port, elsewhere)
        if not specs and not remote:
            own_python()
        options['probes'] = probes
        options['specs'] = specs
        names = _own_hosts(host)
        hosts = list(map(_own_host, names))
        options['hosts'] = [where for where in hosts if where is not None]
        options['hosts_may_fail'] = hosts_may_fail(names[0], hosts[0])
        options['multicast'] = bool(given['ipv4_udp_multicast'])
        for name in ('job_status', 'callback', 'cluster_status', 'on_output'):
            check_function(name, given[name])
        options['job_status'] = given['job_status']
        if given['job_status'] is None:
            options['job_status'] = given['callback']
        options['dest_path'] = plain_dest_path(given['dest_path'])
        check_depends(given['depends'])
        options['loglevel'] = level_of(given['loglevel'])
        options['reentrant'] = flag_of('reentrant', given['reentrant'])
        options['speculate'] = speculation(given['speculate'], options['reentrant'])
        options['cleanup'] = function_or_flag('cleanup', given['cleanup'])
        options['forward_logs'] = flag_of('forward_logs', given['forward_logs'])
        options['start_method'] = _start_method(given['start_method'])
        options['resources'] = request_of('resources', given['resources'] or {})
        options['python'] = _python(given['python'])
        options['job_dir'] = flag_of('job_dir', given['job_dir'])
        options['returns'] = WantedOutput.checked(given['returns'], given['dest'])
        options['dest'] = given['dest']
        path = recover_path(given['recover_file'], given['fault_recover'])
        options['recover_file'] = path
        options['keeps_trail'] = path is None and given['recover_file'] is not False
        return cls(**options)

    @property
    def counts_failures(self) -> bool:
        """True if the program has no function that is told that a job has failed."""
        if self.job_status is not None:
            return False
        return self.cluster_status is None

    @property
    def pulse(self) -> float:
        """Seconds between the signs of life of a connection."""
        return self.pulse_interval or PULSE

    @property
    def longest_redial(self) -> float:
        """The longest time in seconds between two attempts to reach a node."""
        return self.ping_interval or REDIAL_MOST

    def access(self) -> ConnectionSettings:
        """Return how nodes are reached. Raises SecretError or OSError."""
        files = tls_files(self.certfile, self.keyfile, self.cafile)
        secret = find_secret(self.secret)
        return ConnectionSettings(secret, *files, self.pulse, self.longest_redial)


def nodes_meant(nodes: Any, port: int, elsewhere: bool) -> Tuple[bool, List[NodeSpec]]:
    """The parameter `nodes`: whether a node is started on this machine if none answers, and the
    nodes that are meant; none of them is the node of this program. `elsewhere` as of parse_nodes.
    Raises TypeError or ValueError."""
    searches = discovery_reach() != 'off'
    if nodes is None or any_node(nodes):
        if searches:
            return True, [NodeSpec('*', port)]
        return False, []
    if nodes == LOCAL:
        return False, []
    return False, parse_nodes(nodes, port, elsewhere)


def hosts_may_fail(host: Any, first: Optional[Tuple[str, int]]) -> bool:
    """Whether it is no error that the port of the first `host` is taken. Old scripts always give
    ip_addr, and two of them on one machine must not be in each other's way."""
    if first is None:
        return True
    if not isinstance(host, str):
        return False
    return first[0] == host.strip('[]')


def check_function(name: str, function: Any) -> None:
    """Raise TypeError for a parameter that is neither a function nor None."""
    if function is None:
        return
    if not callable(function):
        message = '%s must be a function, not %s' % (name, type(function).__name__)
        raise TypeError(message)


def check_depends(depends: Any) -> None:
    """Raise TypeError if the parameter `depends` is no list."""
    if isinstance(depends, (str, bytes)) or not isinstance(depends, (list, tuple, set)):
        raise TypeError('depends must be a list, not %s' % type(depends).__name__)


def speculation(value: Any, reentrant: bool) -> bool:
    """The parameter `speculate`. Raises TypeError or ValueError."""
    speculate = flag_of('speculate', value)
    if speculate and not reentrant:
        text = 'speculate=True needs reentrant=True: jobs may run twice, even at the same time'
        raise ValueError(text)
    return speculate


def function_or_flag(name: str, value: Any) -> Any:
    """Return a parameter that is a function, True or False. Raises TypeError for anything else."""
    if callable(value):
        return value
    return flag_of(name, value)


def recover_path(recover_file: Any, fault_recover: Any) -> Optional[str]:
    """The path of the recover_file by its two names, None for none. Raises TypeError or
    ValueError."""
    if recover_file is not False:
        path = path_option('recover_file', recover_file)
        if path:
            return path
    if fault_recover is True:
        return '_dispy_%s' % time.strftime('%Y%m%d%H%M%S')
    return path_option('fault_recover', fault_recover or None)


class JobBook:
    """The jobs of a cluster in numbers, which of them have not ended, and who waits for them. Any
    thread."""

    def __init__(self) -> None:
        self.began = time.time()         # seconds since the epoch
        self.lock = threading.Lock()     # guards all that follows
        self.changed = threading.Condition(self.lock)
        self.closed = False              # no job can be submitted any more
        self.owed: Set[DispyJob] = set()   # jobs for whose end the driver answers
        self.pending = 0                 # have not ended, or their callback has not returned
        self.submitted = 0
        self.finished = 0                # have ended as they should
        # Status -> jobs that have ended otherwise; Finished: programs, by their exit status
        self.unfinished: Dict[int, int] = {}
        self.at_nodes: Dict[str, List[Any]] = {}   # ADDRESS:NAME -> [node, jobs ended, seconds]
        self.all_ended: Optional[float] = None     # when no job was pending, since the epoch
        self._waiters = 0                # callbacks that are in `wait`
        self._watchers = 0               # threads that wait for `changed`

    def enter(self, job: DispyJob) -> None:
        """Count a job that is submitted. Called with the lock held."""
        self.pending += 1
        self.submitted += 1
        self.owed.add(job)

    def take_over(self, count: int) -> None:
        """Count jobs of a program that has crashed, with which this cluster carries on."""
        with self.lock:
            self.pending += count
            self.submitted += count

    def answer_for(self, job: DispyJob) -> None:
        """Note that the driver answers for the end of a job that was taken over."""
        with self.lock:
            self.owed.add(job)

    def answered(self, jobs: Sequence[DispyJob]) -> None:
        """The driver does not answer for these jobs any more: they have ended, or an opener ends
        them."""
        with self.lock:
            self.owed.difference_update(jobs)

    def jobs_owed(self) -> List[DispyJob]:
        """Return the jobs for whose end the driver answers."""
        with self.lock:   # a job is added and posted with it held
            return list(self.owed)

    def add_results(self, jobs: Sequence[DispyJob], finished: int, peer: Any,
                    seconds: float) -> None:
        """Jobs have come back from a node, where they ran for so many seconds in all; `finished` of
        them have ended as they should."""
        with self.lock:
            self.owed.difference_update(jobs)
            self.finished += finished
            row = self.at_nodes.setdefault('%s:%s' % (peer.ip_addr, peer.name), [peer, 0, 0.0])
            row[1] += len(jobs)
            row[2] += seconds

    def add_failure(self, status: int) -> None:
        """Count a job that has ended with this status, and not as it should."""
        with self.lock:
            self.unfinished[status] = self.unfinished.get(status, 0) + 1

    def settle(self, count: int) -> None:
        """Note that so many jobs have ended and that their callbacks have returned."""
        with self.lock:
            self.pending -= count
            # Callbacks that wait for the others do not count themselves
            if self.pending <= self._waiters:
                self.all_ended = time.time()
                if self._watchers:
                    self.changed.notify_all()

    def wait(self, timeout: Optional[float]) -> bool:
        """Wait until no job is pending, at most so many seconds; whether none is. In a callback the
        job that it was called for is not waited for, nor are those whose callbacks wait too."""
        own = getattr(_calling, 'book', None) is self
        if timeout is None:
            until = None
        else:
            until = time.monotonic() + timeout
        with self.changed:
            self._watchers += 1
            self._waiters += own
            if own:
                self.changed.notify_all()
            try:
                # Callbacks that wait do not wait for each other
                while self.pending > (self._waiters if own else 0):
                    if until is None:
                        left = None
                    else:
                        left = until - time.monotonic()
                    if left is not None:
                        if left <= 0:
                            return False
                    in_slices(self.changed.wait, left)
            finally:
                self._waiters -= own
                self._watchers -= 1
        return True

    def wait_for_change(self, seconds: float) -> None:
        """Wait until a node or a job has changed, at most so many seconds."""
        with self.changed:
            self._watchers += 1
            try:
                self.changed.wait(seconds)
            finally:
                self._watchers -= 1

    def notify(self) -> None:
        """Wake the threads that wait for a node, because a node has changed."""
        with self.changed:
            self.changed.notify_all()

    def progress(self) -> Tuple[int, int]:
        """Return how many jobs have ended, and how many were submitted."""
        with self.lock:
            return self.submitted - self.pending, self.submitted

    def totals(self) -> Tuple[int, int, int, int]:
        """Return how many jobs were submitted, have ended as they should, have failed and were
        cancelled."""
        with self.lock:
            return self._totals()

    def _totals(self) -> Tuple[int, int, int, int]:
        """Return the same as `totals`. Called with the lock held."""
        ends = self.unfinished
        chosen_ends = []
        for state in (*FAILED, JobState.FINISHED):
            end = ends.get(int(state), 0)
            chosen_ends.append(end)
        failed = sum(chosen_ends)   # programs
        return self.submitted, self.finished, failed, ends.get(DispyJob.Cancelled, 0)

    def by_state(self) -> Counts:
        """Return how many jobs are in which state."""
        with self.lock:
            owed = list(self.owed)
            submitted, done, failed, cancelled = self._totals()
        waiting = sum(job.status == DispyJob.Created for job in owed)
        running = max(0, submitted - done - failed - cancelled - waiting)
        return Counts(done, failed, cancelled, running, waiting)

    def nodes(self) -> Dict[str, Tuple[Any, int, float]]:
        """Return for each node, as ADDRESS:NAME, the node itself, the jobs that have ended there,
        and the seconds that they ran."""
        with self.lock:
            return {
                name: (peer, done, seconds)
                for name, (peer, done, seconds) in self.at_nodes.items()
            }

    def seconds(self) -> float:
        """Return the sum of the seconds that jobs ran."""
        at_nodes = list(self.at_nodes.values())
        return float(sum(row[2] for row in at_nodes))

    def close(self) -> bool:
        """Take no more jobs. Returns whether jobs were taken until now."""
        with self.lock:
            was_open = not self.closed
            self.closed = True
        return was_open

    def after_fork(self) -> None:
        """Forget the jobs in a forked child: they are the parent's, and nobody here may wait for
        them."""
        self.lock = threading.Lock()   # a thread that is not here may hold the old one
        self.changed = threading.Condition(self.lock)
        self.closed = True
        self.pending = 0


class UserCallbacks:
    """The functions of the program that a cluster calls, each in a thread of the driver's pools.

    job_status, cluster_status - as of JobCluster; they may be set at any time
    driver - set before the cluster uses nodes
    """
    driver: 'Driver'

    def __init__(self, options: ClusterOptions, comp: str, name: str, book: JobBook) -> None:
        self.job_status = options.job_status
        self.cluster_status = options.cluster_status
        self._comp = comp
        self._name = name
        self._book = book

    def tell(self, status: int, peer: Union[NodeConnection, NodeInfo, None],
             job: Optional[DispyJob]) -> None:
        """Call cluster_status, because a node or a job has changed. The driver's thread."""
        if self.cluster_status is None:
            return
        node = None
        if isinstance(peer, NodeInfo):
            node = describe_node(peer, peer.state, peer.reason, peer.cpus, peer.busy)
        elif peer is not None:
            if status == DispyNode.Closed:
                state = 'closed'
            else:
                state = 'ready'
            if self._comp in peer.uses:
                cpus = peer.limit(self._comp)
            else:
                cpus = 0
            node = describe_node(peer, state, peer.reason, cpus, 0)
        self.driver.tellers.run(self.cluster_status, status, node, job)

    def tell_row(self, status: int, row: NodeInfo) -> None:
        """Call cluster_status, because a node of the scheduler has changed. The driver's thread."""
        if self.cluster_status is not None:
            node = describe_node(row, row.state, row.reason, row.cpus, row.busy)
            self.driver.tell_later(self.cluster_status, status, node, None)

    def tell_closed(self, nodes: Sequence[DispyNode]) -> None:
        """The cluster is closed: call cluster_status with Closed for each of these nodes, and wait
        until it has returned, since a program often ends then. Any thread."""
        call = self.cluster_status
        if call is None or not nodes:
            return
        told = self.driver.parts.event()
        is_teller = self.driver.is_teller() or threading.current_thread() is self.driver.thread

        def tell() -> None:
            for node in nodes:
                node.state = 'closed'
                self.driver.tell_later(call, DispyNode.Closed, node, None)
            self.driver.tell_later(told.set)
        self.driver.ask(tell)
        if not is_teller:   # otherwise it would wait for itself
            in_slices(told.wait, GRACE)

    def call_back(self, job: Any) -> None:
        """Call job_status for a job that has ended. In a thread of the driver's pool."""
        try:
            self._call_job_status(job)
        except BaseException as exc:
            # The user's callback, sys.exit in it too; others are called all the same
            self._report(job, exc)
        finally:
            self._book.settle(1)

    def provisional(self, job: DispyJob) -> None:
        """Call job_status for a provisional result. In a thread of the driver's pool."""
        try:
            self._call_job_status(job)
        except Exception as exc:
            # The user's callback; later results are shown all the same
            self._report(job, exc)

    def _call_job_status(self, job: DispyJob) -> None:
        _calling.book = self._book
        try:
            self.job_status(job)
        finally:
            _calling.book = None

    def _report(self, job: DispyJob, exc: BaseException) -> None:
        if job.failure is not None:
            values = job.failure.values()
        else:
            values = None
        about = '%s of %s' % (job_in_words(job.id, values), self._name)
        report_callback(self.job_status, about, exc)


_calling = threading.local()  # .book: that of the cluster whose callback this thread is in


class LiveOutput:
    """What running jobs print and log, for `on_output`, `forward_logs` and monitors. The driver's
    thread.

    on_output - as of JobCluster
    monitors - who watches the jobs; replaced as a whole
    driver - set before the cluster uses nodes
    """
    driver: 'Driver'

    def __init__(self, on_output: Any, name: str, cargo: PackedComputation) -> None:
        self.on_output = on_output
        self.monitors: Tuple[Monitor, ...] = ()
        self._name = name
        self._cargo = cargo
        self._shown: Dict[DispyJob, List[int]] = {}   # bytes of stdout and stderr that were shown
        self._told_of_files = False                   # that jobs leave behind

    def add_monitor(self, monitor: Monitor) -> None:
        """Tell a monitor of jobs from now on. What jobs print it is told by nodes that are set up
        later."""
        self.monitors += (monitor,)
        self._cargo.spec['live'] = True

    def remove_monitor(self, monitor: Monitor) -> None:
        """Do not tell a monitor of jobs any more."""
        monitors = []
        for other in self.monitors:
            if other is not monitor:
                monitors.append(other)
        self.monitors = tuple(monitors)
        self._cargo.spec['live'] = bool(self.monitors) or self.on_output is not None

    def watched(self, pairs: List[Tuple[DispyJob, tuple]]) -> List[Tuple[DispyJob, Any]]:
        """Return the jobs that are about to get results, with their packed arguments, which they
        lose by that; none if no monitor watches."""
        if not self.monitors:
            return []
        return [(job, job.payload) for job, _ in pairs]

    def tell_ended(self, jobs: List[Tuple[DispyJob, Any]], peer: Any) -> None:
        """Tell the monitors of jobs that have ended, as `Monitor.ended`. The driver's thread or an
        opener."""
        for monitor in self.monitors:
            monitor.ended(jobs, peer)

    def page(self) -> str:
        """Return the link to the web page that shows the cluster, or an empty text."""
        for monitor in self.monitors:
            if monitor.page:
                return monitor.page
        return ''

    def came(self, job: DispyJob, message: Output) -> None:
        """Show what a running job has printed or logged."""
        data = message.data
        stream = message.stream
        if stream == 0:
            self._show_record(job, *log_record_of(data))
            return
        if self.on_output is not None:
            shown = self._shown.setdefault(job, [0, 0])
            shown[stream - 1] = message.offset + len(data)
            self._show(job, stream, data)
        for monitor in self.monitors:
            monitor.printed(job, stream, message.offset, bytes(data))

    def begin_again(self, job: DispyJob) -> None:
        """What a job has printed until now does not count: it was started a second time."""
        self._shown.pop(job, None)

    def show_rest(self, job: DispyJob, row: tuple) -> None:
        """Show the output of a job that came with its result and was not shown before."""
        for stream, at in enumerate(self._shown.pop(job, (0, 0)), 1):
            data = row[PAYLOAD + stream][at:]
            self._show(job, stream, data)

    def _show(self, job: DispyJob, stream: int, data: Any) -> None:
        if not len(data):
            return
        if self.on_output is None:
            return
        if self._cargo.is_program:
            text: Union[bytes, str] = bytes(data)
        else:
            text = str(data, 'utf-8', 'replace')
        self.driver.tell_later(self.on_output, job, STREAM_NAMES[stream], text)

    def _show_record(self, job: DispyJob, level: int, name: str, text: str) -> None:
        """Log what a job has logged, or, once, that a job has left files behind."""
        try:
            if name != FILES_LEFT:
                logger.log(level, 'job %s: %s: %s', job.id, name, text,
                           extra={'job_id': job.id, 'job_logger': name})
            elif not self._told_of_files:
                self._told_of_files = True
                if self._cargo.spec['program']:
                    remedy = ('Call the program in a function, by subprocess, which then calls '
                              'dispy_send_file(name)')
                else:
                    remedy = 'Name the file with --return, or run the commands in --workdir'
                logger.warning(
                    '%s: job %r has left a file in its directory: %s. What a program leaves '
                    'there does not come back, and is removed when the cluster is closed. %s',
                    self._name, job.id, text, remedy)
        except Exception:  # a handler of the user's; the link is not to blame
            logger.exception('a handler of logging has failed')


STREAM_NAMES = {1: 'stdout', 2: 'stderr'}


class ResultDelivery:
    """Gives jobs their results: opens and counts them, and tells who waits for them or watches.

    ordered - job -> its provisional results and what comes after them, in order, with their nodes;
        guarded by the lock of the book
    driver - set before the cluster uses nodes
    """
    driver: 'Driver'

    def __init__(self, book: JobBook, callbacks: UserCallbacks, output: LiveOutput,
                 failures: Failures, is_program: bool) -> None:
        self._book = book
        self._callbacks = callbacks
        self._output = output
        self._failures = failures
        self._is_program = is_program
        self.ordered: Dict[DispyJob, Deque[Tuple[tuple, NodeConnection]]] = {}

    def began(self, job: DispyJob, start: float, peer: Union[NodeConnection, NodeInfo]) -> None:
        """Note that a job has begun at a node, at this time in seconds since the epoch. The
        driver's thread."""
        with self._book.lock:   # beside a provisional result, and the end
            if job.status in ENDED:
                return
            is_news = job.status == DispyJob.Created
            job.ip_addr = peer.ip_addr
            job.start_time = start
            if is_news:
                job.status = DispyJob.Running
        if is_news and self._callbacks.cluster_status is not None:
            self._callbacks.tell(DispyJob.Running, peer, job)

    def goes_on_at(self, job: DispyJob, start: float,
                   peer: Union[NodeConnection, NodeInfo]) -> None:
        """Note that another attempt of a job counts from now on, which has begun at a node at this
        time. The driver's thread."""
        with self._book.lock:
            if job.status == DispyJob.ProvisionalResult:
                job.status = DispyJob.Running
                job.result = None
        self.began(job, start, peer)

    def apply_results(self, pairs: List[Tuple[DispyJob, tuple]],
                      peer: Union[NodeConnection, NodeInfo]) -> None:
        """Give jobs their results, which are rows of Results of a node. The driver's thread or an
        opener."""
        seconds = 0.0
        finished = 0
        is_program = self._is_program
        watched = self._output.watched(pairs)
        for job, row in pairs:
            payload = job.payload
            # Nobody had told that it has begun
            if job.status == 5 and (row[2] or row[1] != Outcome.CANCELLED):
                job.ip_addr = peer.ip_addr
                if self._callbacks.cluster_status is not None:
                    event = StatusCallback(self._callbacks, DispyJob.Running, peer, job)
                    self.driver.post(event)
            fill_in(job, row, is_program, self._failures, peer.name)
            if job.status == 11 and not (is_program and job.result):
                finished += 1
            else:
                self._count_failure(job, payload)
            seconds += row[3] - row[2]
        jobs = [job for job, _ in pairs]
        self._book.add_results(jobs, finished, peer, seconds)
        if watched:
            self._output.tell_ended(watched, peer)
        self._publish_ended(jobs, peer)

    def queue_ordered(self, job: DispyJob, row: tuple, peer: NodeConnection) -> None:
        """Queue a result that must be seen after earlier ones of its job. The driver's thread."""
        with self._book.lock:
            if job in self.ordered:
                self.ordered[job].append((row, peer))
                return
            self.ordered[job] = collections.deque([(row, peer)])
        if self._callbacks.job_status is not None:
            pool = self.driver.callbacks
        else:
            pool = self.driver.openers
        pool.run(self._drain_ordered, job)

    def _drain_ordered(self, job: DispyJob) -> None:
        """Show the queued results of a job, each of which the callback sees before the next. A
        callback thread or an opener."""
        while True:
            with self._book.lock:
                if not self.ordered[job]:
                    del self.ordered[job]
                    return
                row, peer = self.ordered[job].popleft()
            if row[1] not in PROVISIONAL:
                self.apply_results([(job, row)], peer)
            elif self._show_provisional(job, row):
                if self._callbacks.job_status is not None:
                    self._callbacks.provisional(job)

    def _show_provisional(self, job: DispyJob, row: tuple) -> bool:
        """Give a job a provisional result. Returns False if the job has ended meanwhile or the
        result cannot be opened."""
        try:
            value = loads(row[4], True)
        except BaseException as exc:  # unpickling runs the user's code
            logger.error('a provisional result of job %r could not be opened: %s', job.id,
                         describe_exception(exc, 1))
            return False
        with self._book.lock:
            if job.status in ENDED:
                return False
            job.result = value
            job.status = DispyJob.ProvisionalResult
        return True

    def end_without_result(self, job: DispyJob, text: str) -> None:
        """End a job that has no result; its state says how it ended, and the text says why. The
        driver's thread."""
        payload = job.payload
        with self._book.lock:   # beside a provisional result
            end_without(job, text, self._failures)
        self._count_failure(job, payload)
        self._output.tell_ended([(job, payload)], None)
        self._publish_ended([job])

    def end_with_driver(self, job: DispyJob, text: str) -> None:
        """Abandon a job that has not ended, because the driver's thread ends for a fault of dispy.
        Its arguments are left as they are: another thread may be sending them."""
        job.state = JobState.ABANDONED
        job.exception = text
        job.end_time = time.time()
        self._failures.add(job)
        job.status = DispyJob.Abandoned
        self._count_failure(job, job.payload)
        self._publish_ended([job])

    def _count_failure(self, job: DispyJob, payload: Any) -> None:
        """Count a job that has ended without a result or with the exit status of a program that
        failed, and tell the monitors."""
        self._book.add_failure(job.status)
        for monitor in self._output.monitors:
            monitor.failed(job, payload)

    def _publish_ended(self, jobs: List[DispyJob],
                       peer: Union[NodeConnection, NodeInfo, None] = None) -> None:
        """Tell the threads that wait for these jobs, and the program's functions, that the jobs
        have ended."""
        callbacks = self._callbacks
        driver = self.driver
        if callbacks.cluster_status is not None:
            for job in jobs:
                event = StatusCallback(callbacks, job.status, peer, job)
                driver.post(event)
        for job in jobs:
            if job.event is not None or job.when_ended is not None:
                job.wake()
        if callbacks.job_status is None:
            self._book.settle(len(jobs))
        elif driver.broken:   # the pool has ended with the driver
            for job in jobs:
                callbacks.call_back(job)
        else:
            for job in jobs:
                driver.post(JobCallback(callbacks, job))


class Submitter:
    """Takes jobs: checks their options, packs their arguments, writes them down and hands them to
    the driver. Any thread.

    numbers - ids of jobs for which the program gives none
    driver, journal - set before the cluster uses nodes
    """
    driver: 'Driver'
    journal: Optional[Journal] = None
    resources: Request = ()   # that jobs ask for which do not say
    own_directory = False     # each job has a directory of its own
    wanted: WantedOutput      # which files of jobs come back

    def __init__(self, comp: str, name: str, cargo: PackedComputation, bundles: ModuleBundles,
                 book: JobBook, callbacks: UserCallbacks, is_executor: bool) -> None:
        self.numbers = itertools.count(1)
        self._comp = comp
        self._name = name
        self._is_program = cargo.is_program
        self._bundles = bundles
        self._book = book
        self._callbacks = callbacks
        # That files of modules have changed; an executor runs the new text
        self._told_of_change = is_executor

    def submit(self, number: Any, args: tuple, kwargs: dict, node: Any = None) -> DispyJob:
        """Return a new job with this id, for the node with this key or for any node. Raises what
        `JobCluster.submit` raises."""
        depends = kwargs.pop('dispy_job_depends', ())
        if kwargs:
            options = _take_options(kwargs)
        else:
            options = None
        options = self.with_defaults(options)
        if node is not None:
            options = dict(options or {}, node=node)
        if options is not None:
            if 'repeats' in options:
                options['repeats'].is_program = self._is_program
        if self._is_program and kwargs:
            message = 'a program takes no keyword arguments: %s' % ', '.join(map(str, kwargs))
            raise TypeError(message)
        payload = self.pack(args, kwargs, depends, self.wanted.of(number))
        return self.enter(number, args, kwargs, options, payload)

    def with_defaults(self, options: Optional[dict]) -> Optional[dict]:
        """The options of a job, with those of the cluster where it has none of its own."""
        if self.resources or (options is not None and 'resources' in options):
            options = dict({'resources': self.resources}, **options or {})
            if not options['resources']:
                del options['resources']
        return options or None

    def pack(self, args: tuple, kwargs: dict, depends: Sequence[Any] = (),
             returns: tuple = ()) -> Any:
        """Return the arguments, packed as they are now. Raises ValueError if they are too large,
        and what pickling them raises."""
        changed = self._bundles.changed()
        if changed:
            self._warn_of_change(changed)
        if self.own_directory and not depends:
            depends = OwnDirectory()
        payload = pack_arguments(args, kwargs, self._bundles, depends, returns)
        if type(payload) is SharedPayload:
            size = payload.total()
        else:
            size = size_of(payload)
        if self.journal is None:
            most = VALUE_MOST
        else:
            most = JOURNAL_MOST
        if size > most:
            message = (
                'arguments of %d bytes are over the limit of %d%s: send a file '
                '(depends)' %
                (size, most, '' if self.journal is None else ' of a cluster with a recover_file'))
            raise ValueError(message)
        return payload

    def enter(self, number: Any, args: tuple, kwargs: dict, options: Optional[dict], payload: Any,
              future: Optional['DispyFuture'] = None) -> DispyJob:
        """Return a new job with packed arguments, which is handed to the driver; `future` is that
        of a call of an executor. Raises RuntimeError if the cluster was closed."""
        if type(payload) is SharedPayload:
            options = dict(options or {}, values=payload.rows())
        if self.journal is None:
            job = DispyJob(self._comp, payload, options, number)
        else:
            arguments = words_of(args, kwargs)
            job = KeptJob(self._comp, payload, options, number, arguments)
        book = self._book
        driver = self.driver
        with book.lock:
            if book.closed or driver.broken:
                message = 'submit: %s' % (driver.broken or 'the cluster was closed')
                raise RuntimeError(message)
            if self.journal is not None:
                if isinstance(job, KeptJob):
                    self.journal.submitted(job)
                    self.journal.trim()
            if future is not None:
                job.future = future
                future.job = job
            book.enter(job)
            if self._callbacks.cluster_status is not None:
                event = StatusCallback(self._callbacks, DispyJob.Created, None, job)
                driver.post(event)
            # With the lock held: `close` comes after it or before the test above
            driver.post(job)
        return job

    def look_at_modules(self, every: float = LOOK_EVERY) -> None:
        """Warn if files of modules have changed since they travelled. They are looked at once in so
        many seconds at most."""
        changed = self._bundles.changed(every)
        if changed:
            self._warn_of_change(changed)

    def _warn_of_change(self, changed: Sequence[str]) -> None:
        """Tell the user, once, that jobs go on with the text of these modules that was sent."""
        if not self._told_of_change:
            self._told_of_change = True
            logger.warning(
                '%s: the file of module %s has changed; this cluster keeps the text that it began '
                'with. Make a new cluster to run the new one', self._name, ', '.join(changed))


class NodeCommands:
    """What the methods of a cluster ask about its nodes and tell them. Any thread but the driver's.

    driver - set before the cluster uses nodes
    """
    driver: 'Driver'

    def __init__(self, comp: str, book: JobBook) -> None:
        self.comp = comp
        self.book = book

    def ask(self, name: str, *args: Any) -> Any:
        """Have a command carried out, see NodeQueries. Raises RuntimeError if the cluster was
        closed, and what the command raises."""
        if self.book.closed:
            raise RuntimeError('the cluster was closed')
        return self.driver.ask(lambda: self.driver.queries.command(self.comp, name, *args))

    def key_of(self, node: Any) -> Tuple[Any, str]:
        """Return the key of the node that the program names and, once, why it cannot be used.
        Raises ValueError."""
        return self.ask('seat', node)  # type: ignore[no-any-return]

    def rows(self) -> List[NodeInfo]:
        """Return the nodes."""
        return self.ask('nodes')  # type: ignore[no-any-return]

    def rows_at_end(self) -> List[NodeInfo]:
        """Return the nodes, also when the cluster counts as closed."""
        rows: List[NodeInfo] = self.driver.ask(lambda: self.driver.queries.rows_of(self.comp))
        return rows

    def explain_no_nodes(self) -> str:
        """Return a text which says what was tried to reach nodes, what came of it, and what to do.
        """
        return self.ask('complaint')  # type: ignore[no-any-return]

    def why_unloadable(self) -> str:
        """Return why no node can load the code of the computation; the text is empty if one may."""
        return self.ask('why_unloadable')  # type: ignore[no-any-return]

    def in_words(self, status: Callable[[], ClusterStatus]) -> str:
        """Return the nodes in words, as far as that can be told at once."""
        return nodes_text(status().nodes)


class StatusReport:
    """What people are shown of a cluster. Any thread but the driver's, unless it is said.

    driver - set before the cluster uses nodes
    """
    driver: 'Driver'

    def __init__(self, name: str, book: JobBook, nodes: NodeCommands) -> None:
        self._name = name
        self._book = book
        self._nodes = nodes

    def status(self) -> ClusterStatus:
        """Return what JobCluster.status returns."""
        counts = self._book.nodes()
        pending = self._book.pending
        found: List[NodeInfo] = []
        if not self._book.closed:
            try:
                found = self._nodes.rows()
            except RuntimeError:
                if not self._book.closed:   # otherwise it was closed meanwhile
                    raise
        nodes: List[DispyNode] = []
        seen = set()
        for row in found:
            key = '%s:%s' % (row.ip_addr, row.name)
            seen.add(key)
            _, done, seconds = counts.get(key, (row, 0, 0.0))
            node_description = describe_node(row, row.state, row.reason, row.cpus, row.busy, done,
                                             seconds)
            nodes.append(node_description)
        for key, (peer, done, seconds) in counts.items():
            if key not in seen:
                description = describe_node(peer, 'closed', '', peer.offered, 0, done, seconds)
                nodes.append(description)
        return ClusterStatus(nodes, pending)

    def count_ready(self) -> int:
        """Return how many nodes are ready for jobs."""
        return sum(node.state == 'ready' for node in self.status().nodes)

    def nodes_in_words(self) -> str:
        """Return the nodes in words, as far as that can be told at once. Any thread."""
        if self._book.closed:
            return 'closed'
        if threading.current_thread() is self.driver.thread:
            return 'open'
        try:
            return self._nodes.in_words(self.status)
        except RuntimeError:   # it has been closed meanwhile, or the driver has failed
            return 'closed'
        except concurrent.futures.TimeoutError:   # the driver does not answer
            return 'open'

    def why_jobs_wait(self) -> str:
        """Return why a job that has not begun waits."""
        try:
            if self.count_ready():
                return 'it waits for its turn; of the jobs of %s there are %s' % (
                    self._name, self._book.by_state())
            return 'it waits for a node. ' + self._nodes.explain_no_nodes()
        except (RuntimeError, concurrent.futures.TimeoutError):
            # The cluster is closed meanwhile, or nobody answers
            return 'it waits'


class JobTakeover:
    """Carries on with the jobs of a program that has crashed, which are in the journal.

    recovered - those jobs
    recovery - collects what nodes have of them; None if nothing is to be collected
    driver - set before the cluster uses nodes
    """
    driver: 'Driver'

    def __init__(self, comp: str, reentrant: bool, is_program: bool, book: JobBook,
                 delivery: ResultDelivery) -> None:
        self.recovered: List[DispyJob] = []
        self.recovery: Optional[Recovery] = None
        self._comp = comp
        self._reentrant = reentrant
        self._is_program = is_program
        self._book = book
        self._delivery = delivery

    def begin(self, journal: Journal, rows: List[tuple]) -> None:
        """Take over the jobs of the journal, which are rows of `Journal.known`. The user's thread.
        """
        for row in rows:
            row[0].journal = journal
        restored = RestoredJobs(journal, rows, self._is_program)
        self.recovered += restored.jobs
        journal.delivered(restored.ended)
        for job, _ in restored.sent:
            job.status = DispyJob.Running
        at_nodes = len(restored.sent)
        count = at_nodes + len(restored.unsent)
        self._book.take_over(count)
        for job in restored.unsent:
            self._renew(job)
            self.driver.post(job)
        if restored.are_at_nodes:
            logger.info('%d jobs of an earlier run are on nodes: their results are collected',
                        at_nodes)
            lost = functools.partial(self._lost, journal)
            recovery = Recovery(journal, restored.sent, restored.holders, self._done, lost,
                                self._submit_again, self._over, parts=self.driver.parts)
            self.recovery = recovery
            self.driver.ask(lambda: recovery.begin(self.driver))

    def _renew(self, job: DispyJob) -> None:
        """Make a job that has not begun one of this cluster."""
        job.comp = self._comp
        job.state = JobState.CREATED
        job.status = DispyJob.Created
        options = dict(job.options or {})
        options.pop('node', None)   # it may be gone
        job.options = options or None
        self._book.answer_for(job)

    def _submit_again(self, job: DispyJob) -> None:
        """Submit a job again. The driver's thread; if the job were posted, it might come after the
        end of the cluster."""
        self._renew(job)
        self.driver.jobs.take(job)

    def _lost(self, journal: Journal, job: DispyJob, text: str) -> None:
        """Handle the loss of a job that had begun. The driver's thread."""
        if self._reentrant:
            self._submit_again(job)
        else:
            job.state = JobState.ABANDONED
            journal.ended(job, text)
            self._delivery.end_without_result(job, text)

    def _done(self, job: DispyJob, row: tuple, peer: NodeConnection) -> None:
        """Give a job the result that has come. The driver's thread."""
        job.ip_addr = peer.ip_addr
        self._delivery.apply_results([(job, row)], peer)

    def _over(self) -> None:
        """Note that nothing is left to be collected. The driver's thread."""
        self.driver.call_soon(self.end)

    def left(self) -> List[DispyJob]:
        """Return the jobs of the earlier run that have not ended."""
        if self.recovery is None:
            return []
        return self.recovery.left()

    def end(self) -> None:
        """End the recovery: what an earlier run had on nodes has been collected, or the cluster is
        closed. The driver's thread."""
        recovery = self.recovery
        self.recovery = None
        if recovery is not None:
            self.driver.recoveries.give_up(recovery, True)
            for job in recovery.left():
                job.state = JobState.CANCELLED
                self._delivery.end_without_result(job, 'cancelled: the cluster was closed')


class ComputationUser(NodeUser):
    """A NodeUser with a computation: how nodes are set up for it, and what else they may ask.

    cluster - the JobCluster, until it is closed; None after that
    directory - in which the program made the cluster
    wanted - which files of jobs come back, and where to
    bundles - the program's modules
    """
    wanted: WantedOutput
    driver: 'Driver'
    cargo: PackedComputation
    cluster: Any
    directory: str
    bundles: ModuleBundles

    def ask_allocator(self, allocator: NodeAllocate, peer: NodeConnection, link: Link) -> None:
        """Have an opener ask the user's allocator, which is code of the user."""
        self.driver.openers.run(self._allocate, allocator, peer, link, self.cluster)

    def _allocate(self, allocator: NodeAllocate, peer: NodeConnection, link: Link,
                  cluster: Any) -> None:
        """Ask the user's allocator. An opener."""
        try:
            allocation = ask_allocator(allocator, cluster, peer)
            error = ''
        except Exception as exc:  # the user's allocate()
            allocation = Allocation(0, b'', [], {})
            error = describe_exception(exc, 1)
        self.driver.call_soon(self.driver.setup.allocated, self.comp, peer, link, allocation, error)

    def ask_source(self, peer: NodeConnection, link: Link) -> None:
        """Have an opener find out what the source of the computation is."""
        self.driver.openers.run(self._pack_source, peer, link)

    def _pack_source(self, peer: NodeConnection, link: Link) -> None:
        """Collect the source for a node with another version of Python. An opener: files are read,
        and objects of the user are examined."""
        try:
            source = self.cargo.source()
        except Exception as exc:  # of those objects
            exception_description = describe_exception(exc, 1)
            source = b'', 'its source could not be collected: ' + exception_description
        self.driver.call_soon(self.driver.setup.source_found, self, peer, link, source)

    def support_for(self, peer: NodeConnection) -> Dict[str, bytes]:
        """Return the files of cloudpickle, if the node does not have the same version; a scheduler
        does not know which of its nodes needs them."""
        cargo_kind = self.cargo.spec['kind']
        python = python_at(peer.facts, self.cargo.spec.get('interpreter', ''))
        needs = cargo_kind != 'program' and (
            peer.scheduler or python is None or python.cloudpickle != cloudpickle.__version__)
        if needs:
            return _support_files()
        return {}

    def modules_for(self, peer: NodeConnection) -> Dict[str, Any]:
        """Return what a node gets of the program's modules. A node that is a part of the program
        reads them where they are."""
        modules = self.bundles.rows(peer.embedded)
        found: Dict[str, Any] = {'modules': modules}
        if peer.embedded:
            entries = []
            for entry in sys.path:
                if isinstance(entry, str):
                    entries.append(entry)
            found['sys_path'] = list(map(os.path.abspath, entries))
            found['argv'] = [word for word in sys.argv if isinstance(word, str)]
        return found

    def module_source(self, name: str) -> Any:
        """Return where a file of a module is read from: a path, a FileOfModule or its content."""
        return self.bundles.source_of(name)

    def value_source(self, digest: bytes) -> Any:
        """Return the content of a value."""
        value = shared_values.find(digest)
        if value is not None:
            return memoryview(value.data)
        return None

    def asked(self, peer: NodeConnection, message: Call) -> None:
        """Have an opener find the answer, which may need code of the user."""
        self.driver.openers.run(self._find_out, peer, message)

    def _find_out(self, peer: NodeConnection, message: Call) -> None:
        error: tuple = ()
        value = None
        try:
            value = self.answer_to(message.name, message.args)
        except Exception as exc:  # of the user's code
            error = (type(exc).__name__, describe_exception(exc, 1))
        self.driver.call_soon(self.driver.say_to, peer,
                              Return(message.comp, message.number, error, value))

    def answer_to(self, name: str, args: tuple) -> Any:
        """Return what a node or scheduler asks that only the client can tell. An opener."""
        if name != 'modules':
            raise PeerError('%.40r is asked of a program' % (name,))
        embedded = not self.remote and all(peer.embedded
                                           for peer in self.driver.nodes.of(self.comp))
        return self.bundles.more(args[0], embedded)

    def file_piece(self, peer: NodeConnection, work: DispyJob, message: FilePiece) -> None:
        """Store a piece of a file where files of jobs come: below the directory in which the
        program made the cluster, or below `dest`."""
        if message.offset == 0:
            self.wanted.note(work, message.row[0])
        self.driver.files.store(peer, self.wanted.root, message)


class ProgramSeconds(SecondsOfUser):
    """Second attempts of the jobs of a cluster of this program. The driver's thread."""

    def __init__(self, cluster: 'ProgramCluster') -> None:
        # The cluster has this, and is to be freed without the garbage collector
        self._cluster: 'ProgramCluster' = weakref.proxy(cluster)

    def send(self, peer: NodeConnection, seconds: Sequence[SecondAttempt]) -> None:
        """Send these to a node. They are noted beside the first attempts."""
        cluster = self._cluster
        for second in seconds:
            logger.debug('%s: a job is started a second time, at node %s', cluster.name, peer)
            if cluster.journal is not None:
                directory = self.files_of(second).directory
                cluster.journal.second_sent(second, peer.place, peer.memory, directory)
        cluster.send_rows(peer, seconds)

    def counts(self, peer: NodeConnection, second: SecondAttempt, ran: float) -> None:
        """Show the user that a job runs where its second attempt is. The provisional result of the
        first is forgotten, and what it has printed."""
        cluster = self._cluster
        job: Any = second.first
        if cluster.journal is not None:
            cluster.journal.second_over(second)
            cluster.journal.sent([job], peer.place, peer.memory)
        cluster.live_output.begin_again(job)
        if job.state is not JobState.SENT:
            cluster.delivery.goes_on_at(job, time.time() - ran, peer)

    def over(self, second: SecondAttempt) -> None:
        """Note that one counts no more."""
        if self._cluster.journal is not None:
            self._cluster.journal.second_over(second)

    def files_of(self, second: SecondAttempt) -> HeldFiles:
        """Return where the files of one are kept: beside the place where they belong."""
        root = self._cluster.wanted.root
        directory = held_directory(root, self._cluster.comp, second.serial)
        return HeldFiles(directory, root)


class ProgramParts(NamedTuple):
    """What a cluster needs to have a driver, jobs and files. A simulation of the system gives its
    clusters others.

    drivers - has the drivers
    journal - the class of what writes the recover_file
    book - the class of what counts the jobs
    new_comp - makes the name of a computation
    """
    drivers: Drivers = drivers
    journal: Type[Journal] = Journal
    book: Type[JobBook] = JobBook
    new_comp: Callable[[], str] = new_comp


def _whereabouts_of(computation: Any) -> Tuple[str, str]:
    """The module and the name of what a cluster computes; both are empty for an executor, which has
    functions of all sorts."""
    if isinstance(computation, Calls):
        return '', ''
    qualname = getattr(computation, '__qualname__', str(computation))
    return getattr(computation, '__module__', ''), qualname


class ProgramCluster(ComputationUser):
    """A cluster of this program as its driver knows it, and what the methods of JobCluster need.
    What it does itself is to begin, to end, and to hand jobs and nodes to its parts.

    options - the parameters of the cluster
    function - the module and the name of the function that is computed, empty for an executor's
    trail - where another process finds what is needed to collect the results
    unusable - why an executor can run nothing any more
    book - the jobs in numbers, and who waits for them
    callbacks - the program's functions that are called
    live_output - what running jobs print
    delivery - gives jobs their results
    submitter - takes jobs
    nodes - what is asked of nodes
    report - what people are shown
    takeover - carries on with jobs of a program that has crashed
    """
    def __init__(self, computation: Any, options: ClusterOptions,
                 parts: ProgramParts = ProgramParts()) -> None:
        """Pack the computation. Nothing is started. Raises TypeError, ValueError,
        FileNotFoundError, or what pickling raises."""
        self.options = options
        self._parts = parts
        self.book = parts.book()
        self.name = name_of(computation)
        self.comp = self.client = parts.new_comp()
        # Who has it may take the results; it is sent when that is wanted
        self.key = os.urandom(32)
        self.port = options.port
        self.specs = options.specs
        self.hosts = options.hosts
        self.hosts_may_fail = options.hosts_may_fail
        self.multicast = options.multicast
        self.reentrant = options.reentrant
        self.speculate = options.speculate
        self.seconds = ProgramSeconds(self)
        self.probes = options.probes
        self.cluster = None
        self.unusable = ''
        self._waits_told: Set[str] = set()   # why jobs wait
        self.directory = os.getcwd()
        self.function = _whereabouts_of(computation)
        self.bundles = ModuleBundles(self.name)
        self.cargo = pack_computation(computation, options.depends, options.setup, options.cleanup,
                                      options.dest_path, options.jobs_per_worker, self.name,
                                      self.bundles)
        self._complete_cargo(computation)
        if options.returns and not self.cargo.is_program:
            raise ValueError('returns=%r is for programs; a function sends its files by '
                             'dispy_send_file' % (list(options.returns),))
        self.wanted = WantedOutput(options.returns, options.dest, self.directory)
        if options.keeps_trail:
            self.trail: Optional[ComputationNotes] = self._new_trail()
        else:
            self.trail = None
        self._make_parts(isinstance(computation, Calls))

    def _new_trail(self) -> ComputationNotes:
        head = weakref.WeakMethod(self._describe_for_trail)
        return ComputationNotes(head, self.name, self.comp)

    def _complete_cargo(self, computation: Any) -> None:
        """Add to the computation what nodes are told beside it. Raises ValueError."""
        options = self.options
        check_cargo(self.cargo.spec)
        for spec in self.specs:
            # It may choose others later, which are checked then
            if spec.allocator is None:
                continue
            if not spec.allocator.setup_args:
                continue
            setup_args = tuple(spec.allocator.setup_args)
            packed = self.bundles.packed((setup_args, []), [])
            check_setup_args(size_of(packed), self.remote)
        self.cargo.spec['key'] = digest_of(self.key)
        if isinstance(computation, (Calls, CommandLines)):
            self.cargo.spec.update(computation.spec)
        if options.forward_logs:
            logs = logger.getEffectiveLevel()
        else:
            logs = -1
        self.cargo.spec.update(live=options.on_output is not None, logs=logs,
                               start_method=options.start_method)
        if options.python:
            self.cargo.spec['interpreter'] = options.python

    def _make_parts(self, is_executor: bool) -> None:
        options = self.options
        is_program = self.cargo.is_program
        self.failures = Failures(self.directory, self.cargo.paths, options.counts_failures)
        self.callbacks = UserCallbacks(options, self.comp, self.name, self.book)
        self.live_output = LiveOutput(options.on_output, self.name, self.cargo)
        self.delivery = self._make_delivery(self.book, self.callbacks, self.live_output,
                                            self.failures, is_program)
        self.submitter = Submitter(self.comp, self.name, self.cargo, self.bundles, self.book,
                                   self.callbacks, is_executor)
        self.submitter.resources = options.resources
        self.submitter.own_directory = options.job_dir or bool(options.returns)
        self.submitter.wanted = self.wanted
        self.nodes = self._make_commands()
        self.report = StatusReport(self.name, self.book, self.nodes)
        self.takeover = JobTakeover(self.comp, self.reentrant, is_program, self.book,
                                    self.delivery)

    def _make_delivery(self, *parts: Any) -> ResultDelivery:
        return ResultDelivery(*parts)

    def _make_commands(self) -> NodeCommands:
        return NodeCommands(self.comp, self.book)

    # -- life; user threads ------------------------------------------------------------------------

    def start(self, cluster: Any) -> None:
        """Begin to use nodes for a JobCluster, and carry on with what is in its recover_file.
        Raises SecretError, DispyError or OSError; nothing is left then."""
        access = self.options.access()
        if self.options.recover_file is None:
            self._use_nodes(cluster, access)
            return
        self.journal = journal = self._parts.journal(self.options.recover_file)
        try:
            known = journal.known()
            self._use_nodes(cluster, access)
        except BaseException:
            journal.close()
            raise
        self.takeover.begin(journal, known)

    def _use_nodes(self, cluster: Any, access: ConnectionSettings) -> None:
        driver = self.driver = self._parts.drivers.acquire(access)
        self.submitter.journal = self.journal
        parts = (self.callbacks, self.live_output, self.delivery, self.submitter, self.nodes,
                 self.report, self.takeover)
        for part in parts:
            part.driver = driver  # type: ignore[attr-defined]
        self.cluster = cluster
        try:
            if self.journal is not None:
                self.journal.begin(self.comp, self.name, self.reentrant, self.cargo.is_program,
                                   self._first_host(), self.key)
            driver.ask(lambda: driver.open(self, self.probes))
        except BaseException:
            self.cluster = None
            self._parts.drivers.release(driver)
            raise
        _clusters.add(cluster)
        logger.info('%s: the computation begins', self.name, extra=ROUTINE)
        self._warn_of_others()

    def _warn_of_others(self) -> None:
        """Warn at the third cluster of one function that is open: a cell or a loop makes one each
        time."""
        same = []
        for core in map(core_of, list(_clusters)):
            if core.function != self.function:
                continue
            if not core.closed:
                same.append(core)
        if len(same) < 3:
            return
        if not any(self.function):
            return
        if self.function in _told_of_many:
            return
        _told_of_many.add(self.function)
        logger.warning('%s: %d clusters of this function are open, and each has processes of '
                       'its own on the nodes. Call close() when a cluster is not needed any '
                       'more, or use "with JobCluster(...) as cluster:"', self.name, len(same))

    def _describe_for_trail(self) -> Dict[str, Any]:
        """Return what another process needs to collect the results. The driver's thread."""
        code = in_one_piece(self.cargo.spec['code'])
        row: Dict[str, Any] = {'dispy': 1, 'comp': self.comp, 'name': self.name}
        row.update(key=self.key.hex(), files=self.wanted.root)
        row['program'] = self.cargo.is_program
        row['code'] = hashlib.sha256(code).hexdigest()
        row['host'] = socket.gethostname()
        row['pid'] = os.getpid()
        row['process'] = list(own_process())
        row['began'] = self.book.began
        row['listen'] = ''
        if self.hosts:
            row['listen'] = '%s:%d' % self._first_host()
        return row

    def _first_host(self) -> Any:
        """Return where nodes may connect to a program that recovers the jobs."""
        if self.hosts:
            return self.hosts[0]
        return None

    @property
    def closed(self) -> bool:  # type: ignore[override]
        """True if nothing can be submitted any more. Any thread."""
        return self.book.closed

    def close(self, timeout: Optional[float], terminate: bool, shutdown: bool = False) -> bool:
        """Close the cluster, see JobCluster.close; with `shutdown`, nodes may end when this program
        lets them go."""
        if not terminate and not self.closed:
            self.submitter.look_at_modules(0.0)
            if not self.book.wait(_seconds('timeout', timeout)):
                return False
        if not self.book.close():
            return True
        _clusters.discard(self.cluster)
        try:
            self._leave(shutdown)
        finally:
            self.cluster = None   # otherwise the two would keep each other
        self.tell_failures()
        return True

    def _leave(self, shutdown: bool) -> None:
        driver = self.driver
        nodes = self._nodes_in_use()
        if driver.broken:   # nodes could not be told, and what runs there can be collected
            if self.trail is not None:
                self.trail.close(remove=False)
            return
        untold: Set[str] = set()
        try:
            driver.ask(self.takeover.end)
            untold = driver.ask(lambda: driver.forget(self.comp, shutdown))
        except RuntimeError as exc:
            # The driver has failed meanwhile, and has ended the jobs itself
            logger.debug('%s: %s', self.name, exc)
        except Exception as exc:  # a fault of ours; the cluster is closed all the same
            logger.error('%s: the nodes could not be released in good order: %s: %s', self.name,
                         type(exc).__name__, exc)
        self.book.wait(CALL_TIME)   # for callbacks of what was cancelled
        with contextlib.suppress(RuntimeError):   # the driver has failed
            self.callbacks.tell_closed(nodes)
        if self.trail is not None:
            self.trail.end(untold)
        elif self.journal is not None:
            self._new_trail().leave(untold)
        if self.journal is not None:
            self.journal.close(remove=True)
        self._log_end()
        if threading.current_thread() is not driver.thread:
            self._parts.drivers.release(driver)

    def _log_end(self) -> None:
        """Log what came of the computation, in numbers."""
        book = self.book
        nodes = many(len(book.at_nodes), 'node')
        logger.info('%s: the computation has ended after %.1f s: %s; they ran for %.1f s on %s',
                    self.name, time.time() - book.began, book.by_state(), book.seconds(), nodes,
                    extra=ROUTINE)

    def _nodes_in_use(self) -> List[DispyNode]:
        """Return the nodes for which cluster_status is to be called with Closed; none if there is
        no such function."""
        if self.callbacks.cluster_status is None:
            return []
        try:
            rows = self.nodes.rows_at_end()
        except (RuntimeError, concurrent.futures.TimeoutError):
            # The driver or the scheduler is gone
            return []
        node_descriptions: List[DispyNode] = []
        for row in rows:
            if row.state in ('ready', 'draining'):
                node_description = describe_node(row, 'closed', '', row.cpus, 0)
                node_descriptions.append(node_description)
        return node_descriptions

    def tell_failures(self) -> None:
        """Warn, once, if jobs have failed and the program has not looked at any reason."""
        text = self.failures.take(self.book.submitted)
        if text:
            logger.warning('%s: %s', self.name, text)

    def left_behind(self) -> Dict[Any, int]:
        """Return the nodes that outlive this program, with the number of jobs that run on there.
        The driver's thread, or after its end."""
        return self.driver.queries.left_behind(self.comp)

    def cancel_waiting(self, but_first: bool) -> None:
        """End all jobs that have not begun; `but_first` is that of Cancellations."""
        self.driver.ask(lambda: self.driver.cancels.cancel_waiting(self.comp, but_first))

    def after_fork(self) -> None:
        """Let go, in a forked child, of the jobs and the journal, which are the parent's."""
        self.book.after_fork()
        self.journal = None
        self.submitter.journal = None
        if self.trail is not None:
            self.trail.after_fork()

    # -- whether the program still needs it; the driver's thread -----------------------------------

    def is_idle(self) -> bool:
        """Return whether the cluster has no jobs and is not closed."""
        if self.book.pending or self.closed:
            return False
        return self.takeover.recovery is None

    def is_replaced(self, others: Iterable[NodeUser]) -> bool:
        """Return whether a cluster of the same function was made later."""
        if not any(self.function):
            return False
        clusters = [other for other in others if isinstance(other, ProgramCluster)]
        same = [other for other in clusters if other.function == self.function]
        for other in same:
            if other.book.began > self.book.began:
                return True
        return False

    # -- for monitors; any thread ------------------------------------------------------------------

    def jobs_counted(self) -> Tuple[int, int, int, int]:
        """Return how many jobs were submitted, have ended as they should, have failed and were
        cancelled."""
        return self.book.totals()

    def jobs_at_nodes(self) -> Dict[str, Tuple[Any, int, float]]:
        """Return for each node, as ADDRESS:NAME, the node itself, the jobs that have ended there,
        and the seconds that they ran."""
        return self.book.nodes()

    # -- nodes; the driver's thread ----------------------------------------------------------------

    def node_ready(self, peer: NodeConnection) -> None:
        """Log that a node is used, note it for recover_jobs(), and wake the threads that wait for
        nodes."""
        if peer.scheduler:
            logger.info('%s: its nodes are those of the scheduler %s', self.name, peer,
                        extra=ROUTINE)
        else:
            logger.info('%s: node %s is used, with %s', self.name, peer,
                        many(peer.limit(self.comp), 'CPU'), extra=ROUTINE)
        if self.journal is not None and peer.local is not None:
            peer.local.keep_notes(self.comp, self.journal)
        if self.trail is not None and not peer.embedded:
            if self.trail.add(peer.place):
                self.driver.remove_old_trails()
        self.book.notify()

    def node_changed(self, status: int, peer: NodeConnection) -> None:
        """Tell cluster_status of a node; a scheduler tells of its nodes itself."""
        if not peer.scheduler:
            self.callbacks.tell(status, peer, None)

    def node_told(self, status: int, row: NodeInfo) -> None:
        """Tell cluster_status of a node of the scheduler."""
        self.book.notify()
        self.callbacks.tell_row(status, row)

    # -- jobs; the driver's thread -----------------------------------------------------------------

    def send_jobs(self, peer: NodeConnection, works: Sequence[DispyJob]) -> None:
        """Send jobs to a node. With a journal they leave when it has been noted that they do."""
        if self.journal is not None:
            self.journal.sent(works, peer.place, peer.memory)
        self.send_rows(peer, works)

    def send_rows(self, peer: NodeConnection, works: Sequence[ScheduledJob]) -> None:
        """Send what a node has to know of attempts, when it is noted that they are sent."""
        names = _OF_JOBS_THERE if peer.scheduler else OF_JOBS
        messages = batches(Jobs, self.comp, (job_row(work, work.payload, names) for work in works))
        if self.journal is not None:
            self.driver.jobs.outgoing.add(self.comp, peer, messages)
        else:
            for frame in messages:
                self.driver.send(peer.link, frame)  # type: ignore[arg-type]

    def jobs_started(self, peer: NodeConnection, pairs: Sequence[Tuple[DispyJob, float]]) -> None:
        """Show the user that jobs run."""
        for job, ran in pairs:
            self.delivery.began(job, time.time() - ran, peer)

    def output(self, peer: NodeConnection, work: DispyJob, message: Output) -> None:
        """Show what a running job prints or logs."""
        if work.state is JobState.SENT:
            self.driver.jobs.job_started(peer, work)
        self.live_output.came(work, message)

    def jobs_ended(self, peer: NodeConnection, pairs: List[Tuple[DispyJob, tuple]]) -> None:
        """Give jobs their results. What may run the user's code when it is opened is left to an
        opener."""
        plain: List[Tuple[DispyJob, tuple]] = []
        code: List[Tuple[DispyJob, tuple]] = []
        # Such come alone, and take time to open
        large = len(pairs) == 1 and len(pairs[0][1][4]) > LAZY
        journal = self.journal
        is_shown = self.live_output.on_output is not None
        ordered = self.delivery.ordered
        for pair in pairs:
            outcome = pair[1][1]
            goes_on = outcome in PROVISIONAL
            if not goes_on and is_shown:
                self.live_output.show_rest(*pair)
            if not goes_on and journal is not None:
                journal.ended(*pair)
            if goes_on or (ordered and pair[0] in ordered):
                self._queue_ordered(pair, peer, goes_on)
            elif large or outcome == Outcome.RETURNED_CODE or (
                    outcome == Outcome.RAISED and has_exception(pair[1])):
                code.append(pair)
            else:
                plain.append(pair)
        if plain:
            self.delivery.apply_results(plain, peer)
        if code:
            self._open_elsewhere(code, peer)

    def _open_elsewhere(self, pairs: List[Tuple[DispyJob, tuple]], peer: NodeConnection) -> None:
        self.driver.openers.run(self.delivery.apply_results, pairs, peer)
        jobs = [job for job, _ in pairs]
        self.book.answered(jobs)

    def _queue_ordered(self, pair: Tuple[DispyJob, tuple], peer: NodeConnection,
                       goes_on: bool) -> None:
        self.delivery.queue_ordered(*pair, peer)
        if not goes_on:
            self.book.answered([pair[0]])

    def job_waits(self, work: DispyJob) -> None:
        """Make a job as it was before it was sent."""
        if self.journal is not None:
            self.journal.waits(work)
        work.status = DispyJob.Created
        work.ip_addr = None
        work.start_time = None

    def job_parked(self, work: DispyJob, text: str) -> None:
        """Warn that a job waits for a larger node."""
        if text not in self._waits_told:
            self._waits_told.add(text)
            logger.warning('job %r waits: %s. It starts when a node that has this is connected. '
                           'This is logged once for all jobs like it', work.id, text)

    def job_ended(self, work: DispyJob, text: str) -> None:
        """End a job that has no result."""
        if self.journal is not None:
            self.journal.ended(work, text)
        self.delivery.end_without_result(work, text)
        self.book.answered([work])

    def fail_job(self, work: DispyJob, text: str) -> None:
        """Abandon a job that is nowhere any more."""
        if work.status not in ENDED:
            work.state = JobState.ABANDONED
            self.job_ended(work, text)

    def jobs_owed(self) -> List[DispyJob]:
        """Return the jobs for whose end the driver answers. Any thread."""
        return self.book.jobs_owed()

    def driver_failed(self, text: str) -> None:
        """Abandon all jobs: the driver's thread ends for a fault of dispy."""
        jobs_owed = self.book.jobs_owed()
        for job in jobs_owed + self.takeover.left():
            if job.status not in ENDED:
                self.delivery.end_with_driver(job, text)


def core_of(cluster: Any) -> Any:
    """What the driver knows of a JobCluster: a ProgramCluster. What is no JobCluster is itself what
    a driver knows."""
    return getattr(cluster, '_core', cluster)


def name_of(computation: Any) -> str:
    """Return the name of a computation as people are shown it."""
    name = getattr(computation, '__name__', None)
    return name or os.path.basename(str(computation))[:60]


def has_exception(row: tuple) -> bool:
    """Whether a row of Results of a job that raised has the exception itself, and not only its
    text."""
    return len(unpack_error(row[4])[1]) > 0


# --------------------------------------------------------------------------------------------------
# Scripts for dispy 4: what they give, read and call that nothing else here needs
# --------------------------------------------------------------------------------------------------

class OldNames:
    """Names of dispy 4 that are accepted and have no effect any more. Each is named in the log once
    in a process, at INFO."""
    INSTEAD = {   # what takes its place
        'port': 'this program needs no port of its own',
        'client_port': 'this program needs no port of its own',
        'poll_interval': 'nodes send results at once',
        'ext_host': 'nodes answer by the connection that this program has made',
        'relay': 'files and results go by the connections that there are',
        'clear': 'a job ends once',
        'DocumentRoot': 'the page is a part of dispy_httpd',
        'MsgTimeout': 'connections are kept while pulses come (pulse_interval=)',
        'MaxFileSize': 'nodes limit the size of files (dispynode --max-file-size)',
        'DispyPort': 'give dispy_port= to the cluster, and -p to dispynode',
        'NodePort': 'give dispy_port= to the cluster, and -p to dispynode',
        'ClientPort': 'this program needs no port of its own',
        'SharedSchedulerPort': 'give scheduler_port= to the cluster, and -p to dispyscheduler',
        'HTTPServerPort': 'give port= to DispyHTTPServer',
        'IPv4MulticastGroup': 'the group is fixed',
        'IPv6MulticastGroup': 'the group is fixed',
    }

    def __init__(self) -> None:
        self._told: Set[str] = set()

    def tell(self, name: str) -> None:
        """Log that a name was given. Any thread."""
        if name not in self._told:
            self._told.add(name)
            logger.info('%s has no meaning any more: %s', name,
                        self.INSTEAD.get(name, 'nothing takes its place'))

    def tell_given(self, **given: Any) -> None:
        """Log which of these were given: those that are not None. Any thread."""
        for name, value in given.items():
            if value is not None:
                self.tell(name)


old_names = OldNames()


class OldConfig(types.ModuleType):
    """The module dispy.config of dispy 4. It can be read and set, and has no effect."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if not name.startswith('__'):
            old_names.tell(name)


config = OldConfig('dispy.config', OldConfig.__doc__)
vars(config).update(DispyPort=NODE_PORT - 1,
                    NodePort=NODE_PORT,
                    ClientPort=NODE_PORT - 1,
                    SharedSchedulerPort=SCHEDULER_PORT,
                    HTTPServerPort=8181,
                    MsgTimeout=10,
                    MaxFileSize=0)
_dispy_version = __version__
# Old scripts start dispynode.py from there
__path__ = [os.path.dirname(os.path.abspath(__file__))]
OldModules.install()


def __getattr__(name: str) -> Any:
    """Return dispy.httpd and other modules that were parts of the package in dispy 4."""
    if name in OldModules.NAMES:
        return importlib.import_module('dispy.' + name)
    raise AttributeError('module %r has no attribute %r' % (__name__, name))


# Parameters of the constructors after the seventh, in dispy 4.15's order.
POSITIONS_LEFT = ('ext_host', 'ip_addr', 'ext_ip_addr', 'ipv4_udp_multicast', 'dest_path',
                  'loglevel', 'callback', 'setup', 'cleanup', 'ping_interval', 'pulse_interval',
                  'poll_interval', 'reentrant', 'secret', 'keyfile', 'certfile', 'recover_file')
SHARED_POSITIONS_LEFT = ('client_port', 'scheduler_host', 'ext_host', 'ip_addr', 'ext_ip_addr',
                         'loglevel', 'callback', 'setup', 'cleanup', 'dest_path', 'poll_interval',
                         'reentrant', 'exclusive', 'secret', 'keyfile', 'certfile', 'recover_file')


def refuse_positions(remote: bool, more: tuple) -> None:
    """Raise TypeError for parameters by position after the seventh, naming them."""
    if not more:
        return
    if remote:
        kind = 'SharedJobCluster'
        left = SHARED_POSITIONS_LEFT
    else:
        kind = 'JobCluster'
        left = POSITIONS_LEFT
    names = ', '.join('%s=' % name for name in left[:len(more)])
    message = ('%s takes 7 arguments by position, as far as dispy_port, and %d were given: '
               'give the others by name, as %s' % (kind, 7 + len(more), names or 'name='))
    raise TypeError(message)


def node_port_of(dispy_port: Any, node_port: Any) -> int:
    """Return the port of nodes for which none is given, from its two names. Raises ValueError."""
    if dispy_port is not None or not node_port:
        port = dispy_port
    else:
        port = node_port
    return in_range('dispy_port', port, NODE_PORT, 1, 65535, True)  # type: ignore[no-any-return]


def plain_dest_path(path: Any) -> Optional[str]:
    """The parameter `dest_path`; it is below the node's own directory. Raises TypeError,
    ValueError."""
    if path is not None:
        if not isinstance(path, str):
            message = 'dest_path=%.80r must be the name of a directory, not %s' % (
                path, type(path).__name__)
            raise TypeError(message)
    if not path:
        return path
    if path.startswith(os.sep):
        if path.strip(os.sep):
            logger.warning('dest_path=%r is taken as %r: it is below the directory of the node',
                           path, path.lstrip(os.sep))
            path = path.lstrip(os.sep)
    check_name(path)
    return plain_text(path)


class OldCluster:
    """The attributes that a cluster has in dispy 4 and that are no parameters of today."""
    _core: ProgramCluster

    @property
    def start_time(self) -> float:
        """The time when the cluster was made, in seconds since the epoch."""
        return self._core.book.began

    @property
    def end_time(self) -> Optional[float]:
        """The time when all jobs that were submitted had ended, in seconds since the epoch; None
        before."""
        return self._core.book.all_ended

    @property
    def cpu_time(self) -> float:
        """The sum of the seconds that jobs ran."""
        return self._core.book.seconds()

    @property
    def pulse_interval(self) -> Optional[float]:
        """The parameter of this name, in seconds; None if it was not given."""
        return self._core.options.pulse_interval

    @property
    def ping_interval(self) -> Optional[float]:
        """The parameter of this name, in seconds; None if it was not given."""
        return self._core.options.ping_interval

    @property
    def poll_interval(self) -> Optional[float]:
        """The parameter of this name, in seconds; None if it was not given. It has no effect."""
        return self._core.options.poll_interval

    @property
    def job_status(self) -> Any:
        """The function that is called with jobs that have ended. It may be set."""
        return self._core.callbacks.job_status

    @job_status.setter
    def job_status(self, function: Any) -> None:
        self._core.callbacks.job_status = function

    @property
    def cluster_status(self) -> Any:
        """The function that is called at every change. It may be set."""
        return self._core.callbacks.cluster_status

    @cluster_status.setter
    def cluster_status(self, function: Any) -> None:
        self._core.callbacks.cluster_status = function


# --------------------------------------------------------------------------------------------------
# Public class
# --------------------------------------------------------------------------------------------------

class JobCluster(OldCluster):
    """Nodes that run one computation for this program.

    Parameters; times are in seconds:
    computation - a function (any callable), or the path of a program; the program is copied to the
        nodes and run with
        the job's arguments as its command line, its exit status is the job's result
    nodes - None: all that answer on the local network, and, if none does within 1 s, one started
        here for this program;
        'local': that at once; or a list of 'host', ('host', port), ('host', port, cpus), {'host':,
        'port':, 'cpus':}, DispyNode,
        NodeAllocate; an empty list is None; host: a name, an address, or either with * for any
        characters; cpus > 0 is an upper limit, cpus < 0 leaves
        so many free
    depends - list of what cannot be found through the computation: paths of files and directories
        (they land in the
        jobs' working directory), modules and packages, functions and classes
    job_status - function, called with a job for each provisional result and when it has ended, in a
        thread of its
        own, for one job after the other; while it takes longer than 0.1 s for one, it is also
        called for others, in
        other threads (old name: callback)
    cluster_status - function, called as (status, node, job) at every change, in order:
        DispyNode.Initialized,
        AvailInfo or Closed with a node, also Closed at the end of the cluster; a job's status with
        the job,
        beginning with Created (and the node, when it is sent there and when its result comes)
    host - also listen for nodes that connect by themselves (`dispynode --scheduler-host`), at this
        address of this host ('': all)
        or 'address:port' (default port: 9702), or a list of those; None: this program needs no open
        port (old name: ip_addr)
    dispy_port - port of nodes for which none is given, TCP and UDP (default 9701)
    node_port - an old name of dispy_port
    ext_host, ext_ip_addr, poll_interval, port, client_port - accepted for old scripts; they have no
        meaning any more
    ipv4_udp_multicast - True: look for nodes by IPv4 multicast too
    dest_path - a fixed directory on the nodes for the files, below the node's own; what is there
        already and has not
        changed is not sent again. None: a new one
    loglevel - level of dispy.logger, as in `logging`: messages are shown from this level up. INFO
        leaves a level that the program itself has set; DEBUG shows each event and decision
    setup, cleanup - functions run once a node, before the first and after the last job, in the
        directory of the files;
        they share the computation's global variables. A setup that raises or returns other than
        None or 0 refuses the
        node. cleanup=True removes the files afterwards, False leaves them, a function runs first
        and then they are removed
    ping_interval - the longest time between attempts to reach a node (0.1 to 3600, default 30)
    pulse_interval - time between signs of life (0.1 to 1000, default 2); a node that is silent for
        five is lost
    reentrant - True: jobs on a lost node are run again elsewhere; False: they end as Abandoned
    secret, certfile, keyfile, cafile - the secret as str or bytes, paths of files in PEM format;
        see "Security" in the README
    recover_file - path of a file, made if there is none, in which jobs are written down so that
        they outlive this program; see
        `recover_jobs`. With the file of a program that has crashed its jobs are carried on with:
        they are in `recovered`, those
        that had ended with their results. A clean end removes it (old name: fault_recover). None: a
        small file in the user's state
        directory, with which what runs on nodes can be collected or ended if this program is killed
        or ends by an
        exception; False: not even that
    max_jobs_per_worker - a worker process is replaced after so many jobs; None: kept
    on_output - function, called as (job, 'stdout' or 'stderr', text) within a second of its being
        printed; by the job's
        end it has had all that is kept. `text` is str for functions, bytes for programs
    forward_logs - True: `logging` records of jobs, from `loglevel` up, reach dispy.logger with the
        job's id
    start_method - how a node starts worker processes. 'fork': after it has loaded the computation
        and run `setup` once; 'spawn': anew, and each loads the computation by itself, runs `setup`
        and, when it ends in good order, `cleanup`. None: as the node does by default, which is
        fork on Linux and spawn elsewhere. A node that cannot is refused
    resources - what each job needs of its node beside CPUs, as {'gpu': 1}: whole numbers of what
        nodes offer by these names (`dispynode --resource`). A job that asks for 'gpu' sees its own
        devices in CUDA_VISIBLE_DEVICES
    python - which Python of a node runs the computation: a name that it knows by `dispynode
        --python NAME=PATH`, or a version as '3.12'. A node that has none is refused. None: that
        which runs the node
    job_dir - True: each job has a directory of its own, with the files of `depends` linked in,
        which is removed when it has ended
    returns - of programs: names of files that a job makes in its directory, with * and ? for any
        characters, ** for any directories and {id} for the job's id. They are below the program's
        directory, or below `dest`, when the job has ended. Implies job_dir
    dest - where these come, as 'results/{id}'; a relative path is below the program's directory
    speculate - True, with reentrant=True: at the end of a run, when no job waits, jobs that have
        run for twice the median of at least ten that have ended are started a second time, on an
        idle CPU of another node. What finishes first counts, and the other is cancelled

    A node with another minor version of Python gets functions as source: what they use in their
    files may be imports, other functions and classes at the top level, and plain constants. Where
    that is not enough it is refused, and the reason says why.

    Raises TypeError, ValueError (naming parameter, value and what is allowed), SecretError,
    FileNotFoundError, or what pickling the computation raises. It starts nothing then. A context
    manager: see `close`, which it calls at the end.
    """

    _is_shared = False    # its nodes are a scheduler's
    _core: ProgramCluster
    __class_getitem__ = classmethod(of_kind)

    def __init__(self,
                 computation: Any,
                 nodes: Any = None,
                 depends: Sequence[Any] = (),
                 job_status: Optional[Callable[[DispyJob], Any]] = None,
                 cluster_status: Optional[Callable[[int, Optional[DispyNode], Optional[DispyJob]],
                                                   Any]] = None,
                 host: Union[None, str, List[str], Tuple[str, int]] = None,
                 dispy_port: Optional[int] = None,
                 *more: Any,
                 ext_host: Optional[str] = None,
                 dest_path: Optional[str] = None,
                 loglevel: int = logging.INFO,
                 setup: Optional[Callable[..., Any]] = None,
                 cleanup: Union[bool, Callable[..., Any]] = True,
                 ping_interval: Optional[float] = None,
                 pulse_interval: Optional[float] = None,
                 reentrant: bool = False,
                 secret: Union[str, bytes, None] = None,
                 keyfile: Optional[str] = None,
                 certfile: Optional[str] = None,
                 cafile: Optional[str] = None,
                 recover_file: Union[None, bool, str] = None,
                 max_jobs_per_worker: Optional[int] = None,
                 on_output: Optional[Callable[[DispyJob, str, Any], Any]] = None,
                 forward_logs: bool = False,
                 start_method: Optional[str] = None,
                 resources: Optional[Mapping[str, int]] = None,
                 python: Optional[str] = None,
                 job_dir: bool = False,
                 returns: Sequence[str] = (),
                 dest: Optional[str] = None,
                 speculate: bool = False,
                 callback: Optional[Callable[[DispyJob], Any]] = None,
                 ip_addr: Optional[str] = None,
                 ext_ip_addr: Optional[str] = None,
                 fault_recover: Union[None, bool, str] = None,
                 poll_interval: Optional[float] = None,
                 ipv4_udp_multicast: bool = False,
                 node_port: Optional[int] = None,
                 port: Optional[int] = None,
                 client_port: Optional[int] = None) -> None:
        arguments = dict(locals())
        check_not_importing()
        refuse_positions(self._is_shared, more)
        options = ClusterOptions.from_arguments(arguments, self._is_shared)
        set_log_level(options.loglevel)
        old_names.tell_given(port=port, client_port=client_port, poll_interval=poll_interval,
                             ext_host=ext_host or ext_ip_addr)
        self._core = self._make_core(computation, options)
        self.recovered = self._core.takeover.recovered
        self._core.start(self)

    def _make_core(self, computation: Any, options: ClusterOptions) -> ProgramCluster:
        return ProgramCluster(computation, options)

    @property
    def name(self) -> str:
        """The name of the computation, which people are shown. It may be set."""
        return self._core.name

    @name.setter
    def name(self, name: str) -> None:
        self._core.name = name

    # -- jobs --------------------------------------------------------------------------------------

    def submit(self, /, *args: Any, **kwargs: Any) -> DispyJob:
        """Run the computation once, with these arguments. Returns the job. Any thread.

        Keywords that are not passed on:
        dispy_timeout - seconds of running after which it is ended
        dispy_priority - int, higher goes first (default 0); then the order of submission
        dispy_cpus - CPUs that it takes on its node (default 1)
        dispy_memory - bytes that its process and those it starts may use together; with more they
            are killed (default: no limit). So much of the node's memory is kept for it
        dispy_resources - what it needs beside CPUs, as {'gpu': 1}, instead of the cluster's
            `resources`; {}: nothing
        dispy_retries - so often it is tried again if its worker or node is lost, also if the
            cluster is not reentrant;
            then it is Abandoned
        dispy_retry_on - classes of exceptions, or True for any failure, exit statuses of programs
            included: it is tried again, so often in all, after such a failure of its own too
        dispy_retry_delay - seconds before that, doubled each time (default 0)
        dispy_job_depends - list of paths of files, functions and classes for this job alone

        Raises RuntimeError on a closed cluster; TypeError, ValueError or FileNotFoundError for bad
        keywords; ValueError for arguments of more than 4 GiB (with a recover_file: 900 MiB); and
        what pickling them raises.
        """
        submitter = self._core.submitter
        return submitter.submit(next(submitter.numbers), args, kwargs)

    def submit_job_id(self, id: Any, /, *args: Any, **kwargs: Any) -> DispyJob:
        """As `submit`; the job's `id` is the one given, any object. Any thread."""
        return self._core.submitter.submit(id, args, kwargs)

    def submit_node(self, node: Any, /, *args: Any, **kwargs: Any) -> DispyJob:
        """As `submit`, on this node and no other: a DispyNode, its name, address or (address,
        port). The job waits while the node cannot be used. Raises ValueError for a node that this
        cluster does not know, naming those it does. Any thread."""
        submitter = self._core.submitter
        next_number = next(submitter.numbers)
        key = self._key_of_node(node)
        return submitter.submit(next_number, args, kwargs, key)

    def submit_job_id_node(self, id: Any, node: Any, /, *args: Any, **kwargs: Any) -> DispyJob:
        """As `submit_node`, with the job's `id`. Any thread."""
        return self._core.submitter.submit(id, args, kwargs, self._key_of_node(node))

    def _key_of_node(self, node: Any) -> Any:
        key, reason = self._core.nodes.key_of(node)
        if reason:
            if isinstance(node, DispyNode):
                node = node.ip_addr
            logger.warning(
                '%s: node %s cannot be used now: %s. Jobs that were submitted to it wait until it '
                'can', self.name, node, reason)
        return key

    def put(self, value: Any) -> ValueRef:
        """Take a value for many jobs. The ref that this returns may stand anywhere in the arguments
        of jobs of this program, and there the job gets the value: opened anew for each job, so that
        what one job changes no other sees. A node is sent it once (below 32 KiB: with each job).
        What the program changes in the value later does not reach jobs. Arrays and other buffers
        over 1 MiB in arguments are treated so without `put`, which saves packing and comparing them
        for each job. Raises what pickling the value raises. Any thread."""
        self._core.submitter.look_at_modules()
        return ValueRef(value, [('the value', value)])

    def map(self, *iterables: Any, in_flight: Optional[int] = None,
            progress: bool = False) -> Iterator[Any]:
        """Yield the results of computing over the inputs, in their order, like the builtin `map`.
        Inputs are taken as results are: at most `in_flight` jobs (default: 1000) are under way, so
        a generator may be endless. For a job that failed its exception is raised (JobFailed if
        there is none); leaving the loop cancels the rest. Raises ValueError for an `in_flight`
        below 1. `progress` as in `wait`, of results that have been taken."""
        high = 1 << 31
        most = in_range('in_flight', in_flight, 1000, 1, high, True)
        results = self._map(zip(*iterables), most)
        if progress:
            return in_sight(results, shortest(iterables))
        return results

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
            if jobs:
                driver = self._core.driver

                def cancel() -> None:
                    for job in jobs:
                        driver.cancels.cancel(job)
                with contextlib.suppress(RuntimeError):   # it has ended, and its jobs with it
                    driver.ask(cancel)

    def as_completed(self, jobs: Iterable[DispyJob], timeout: Optional[float] = None,
                     progress: bool = False) -> Iterator[DispyJob]:
        """Yield the jobs, any iterable of them, which is read at once, as they end, whatever their
        end. Raises TimeoutError when some have not after `timeout` seconds. `progress` as in
        `wait`."""
        timeout = _seconds('timeout', timeout)
        jobs = list(jobs)
        for job in jobs:
            if not isinstance(job, DispyJob):
                raise TypeError('as_completed: %.80r is not a job' % (job,))
        ended = ended_jobs(jobs, timeout)
        if progress:
            return in_sight(ended, len(set(jobs)))
        return ended

    def gather(self, jobs: Iterable[DispyJob], timeout: Optional[float] = None) -> List[Any]:
        """Wait for jobs, any iterable of them, and return their results in this order. Raises what
        `get` raises for the first of them that failed; the others go on. Raises TimeoutError after
        `timeout` seconds. Any thread."""
        timeout = _seconds('timeout', timeout)
        if timeout is None:
            until = math.inf
        else:
            until = time.monotonic() + timeout
        return [job.get(max(0.0, until - time.monotonic())) for job in list(jobs)]

    def cancel(self, job: DispyJob) -> int:
        """End a job: a waiting one at once, a running one by KeyboardInterrupt and, 5 s later, by
        killing it. Returns 0, or -1 for a job that has ended. Any thread."""
        if not isinstance(job, DispyJob):
            raise TypeError('cancel: %.80r is not a job' % (job,))
        if job.status in ENDED:
            return -1
        driver = self._core.driver
        driver.ask(lambda: driver.cancels.cancel(job))
        return 0

    def jobs(self) -> JobList:
        """The jobs that have not ended, in the order of submission: a list, which a notebook shows
        as a table. Any thread."""
        jobs_owed = self._core.book.jobs_owed()
        jobs = [job for job in jobs_owed if job.status not in ENDED]
        sorted_jobs = sorted(jobs, key=lambda job: (job.submit_time, job_number(job.serial)))
        return JobList(sorted_jobs)

    def cancel_all(self) -> int:
        """End all jobs that have not ended: those that wait at once, those that run as `cancel`
        does. The cluster takes others afterwards. Returns how many they were. Any thread."""
        driver = self._core.driver
        jobs = self.jobs()
        jobs.reverse()   # none begins instead of one that was cancelled before it
        for at in range(0, len(jobs), CANCELS_MOST):
            some = jobs[at:at + CANCELS_MOST]
            driver.ask(functools.partial(driver.cancels.cancel_some, some))
        return len(jobs)

    def cancel_waiting(self) -> None:
        """End all jobs that have not begun, those that wait on nodes included. Any thread."""
        self._core.cancel_waiting(False)

    def wait(self, timeout: Optional[float] = None, progress: bool = False) -> bool:
        """Wait until every job has ended and its callback has returned, at most `timeout` seconds;
        whether they have. `progress` shows how many on stderr if that is a terminal, and in a
        notebook (with tqdm if that is installed). Any thread; in a callback, the job it was called
        for is not waited for."""
        timeout = _seconds('timeout', timeout)
        if not progress:
            return self._core.book.wait(timeout)
        return wait_in_sight(self._core.book, timeout)

    __call__ = wait

    # -- nodes -------------------------------------------------------------------------------------

    def wait_nodes(self, n: int = 1, timeout: Optional[float] = None) -> None:
        """Wait until `n` nodes are ready for jobs. Raises NoNodes, which names every address tried
        and every refusal with its reason, after `timeout` seconds (None: waits without limit),
        RuntimeError when the cluster is or gets closed. Any thread."""
        timeout = _seconds('timeout', timeout)
        high = 1 << 31
        n = in_range('n', n, 1, 0, high, True)
        core = self._core
        if timeout is None:
            until = None
        else:
            until = time.monotonic() + timeout
        while True:
            if core.closed:
                raise RuntimeError('wait_nodes: the cluster was closed')
            if core.report.count_ready() >= n:
                return
            reason = core.nodes.why_unloadable()
            if reason:
                raise NoNodes(reason)
            if until is None:
                left = FOREVER
            else:
                left = until - time.monotonic()
            if left <= 0:
                raise NoNodes(too_few_nodes(n, timeout or 0.0, core.report.count_ready(),
                                            core.nodes.explain_no_nodes()))
            core.book.wait_for_change(min(left, 0.1))

    def status(self) -> ClusterStatus:
        """The nodes that have answered and the number of jobs that have not ended; the other nodes,
        with the reason, are in `refused`. Any thread."""
        return self._core.report.status()

    def discover_nodes(self, nodes: Any) -> int:
        """Look for more nodes now, given as in the constructor; '*' asks the whole network. Returns
        0. Raises TypeError or ValueError for what is no node. Any thread."""
        core = self._core
        elsewhere = bool(core.hosts)
        core.nodes.ask('allocate', parse_nodes(nodes, core.port, elsewhere))
        return 0

    def allocate_node(self, node: Any) -> int:
        """Use a node (or a list of them): a new one, or one that was deallocated or closed. As
        `discover_nodes`."""
        return self.discover_nodes(node)

    def deallocate_node(self, node: Any) -> int:
        """Send no more jobs to a node, given as in `submit_node`; what runs there goes on. Returns
        0. Any thread."""
        self._core.nodes.ask('set_cpus', node, 0)
        return 0

    def close_node(self, node: Any, terminate_pending: bool = False) -> int:
        """Use a node no more: when its running jobs have ended, or, with `terminate_pending`, at
        once (its jobs are run elsewhere if the cluster is reentrant and are Abandoned otherwise),
        cleanup runs there. Returns 0. Any thread."""
        self._core.nodes.ask('leave', node, 'close', bool(terminate_pending))
        return 0

    def resetup_node(self, node: Any, terminate_pending: bool = False) -> int:
        """Set a node up anew, with files as they are now: cleanup, what has changed of `depends`,
        setup. When and with what effect on its jobs as in `close_node`. Returns 0 at once. Any
        thread."""
        cargo = self._core.cargo
        cargo.spec['files'] = _file_rows(cargo.paths, cargo.spec['program'])
        self._core.nodes.ask('leave', node, 'open', bool(terminate_pending))
        return 0

    def set_node_cpus(self, node: Any, cpus: int) -> int:
        """Use at most so many CPUs of a node (negative: leave so many free; 0: none). Returns how
        many that are. Raises ValueError when it has fewer. Any thread."""
        number = plain_number(cpus, True)
        if number is None:
            raise TypeError('cpus=%.80r is not a whole number' % (cpus,))
        return self._core.nodes.ask('set_cpus', node, number)  # type: ignore[no-any-return]

    def node_jobs(self, node: Any, from_node: bool = False) -> List[DispyJob]:
        """Jobs of this cluster that have been sent to a node and have not ended: those that wait
        there are Created. With `from_node` it is asked which of them run; only these are returned,
        as Running. Raises ValueError for an unknown node, RuntimeError if it is not connected."""
        core = self._core
        serials = core.nodes.ask('jobs', node)
        if from_node:
            future = core.nodes.ask('question', node)
            report = answer_of(future, CALL_TIME)
            running = {serial for serial, _ in report.running}
            serials = [serial for serial in serials if serial in running]
        queries = core.driver.queries
        jobs: List[DispyJob] = core.driver.ask(lambda: queries.jobs_of(core.comp, serials))
        return jobs

    def send_file(self, path: str, node: Any, timeout: Union[None, bool, float] = None,
                  relay: Optional[bool] = None) -> int:
        """Put a file, as it is now, into the jobs' directory on a node that is ready; one of this
        name is replaced as a whole. Returns 0 when it is there. Raises OSError if it cannot be read
        here or stored there, ValueError for an unknown node, RuntimeError if that is not ready,
        TimeoutError after `timeout` seconds. `relay`, in dispy 4 the third parameter, is accepted
        and has no meaning any more. Any thread."""
        if isinstance(timeout, bool):
            relay = timeout
            timeout = None
        old_names.tell_given(relay=relay or None)
        name = os.path.basename(os.fspath(path))
        row, = _file_rows({name: os.fspath(path)})
        timeout = _seconds('timeout', timeout)
        future = self._core.nodes.ask('question', node, row, os.fspath(path))
        try:
            error = answer_of(future, timeout)
        except concurrent.futures.TimeoutError:
            raise TimeoutError('send_file: %s is not on the node within %s s' %
                               (name, timeout)) from None
        if error:
            raise OSError('send_file: %s could not be stored on the node: %s' % (name, error))
        return 0

    # -- what people see ---------------------------------------------------------------------------

    def print_status(self, wall_time: Any = None, file: Any = None) -> None:
        """Print a table by node, and jobs and CPUs in sum, to `file` (default: stdout). `wall_time`
        are the seconds that passed, if it is not the time since the cluster was made; the first
        parameter may also be `file`. Any thread."""
        if hasattr(wall_time, 'write'):
            file = wall_time
            wall_time = None
        wall_time = number_in(wall_time)
        self._core.tell_failures()
        status = self.status()
        elapsed = wall_time or time.time() - self.start_time
        print(table_of_status(status, elapsed), file=file)

    stats = print_status

    def __repr__(self) -> str:
        core = self._core
        return '<%s %s: %s; %s>' % (type(self).__name__, self.name, core.report.nodes_in_words(),
                                    core.book.by_state())

    def _repr_html_(self) -> str:
        """For notebooks: state, progress, counts, nodes, and a link to the web page, if any."""
        core = self._core
        nodes = core.report.status().nodes
        if core.closed:
            state = 'closed'
            page = ''
        else:
            state = nodes_text(nodes)
            page = core.live_output.page()
        title = '%s %s' % (type(self).__name__, self.name)
        counts = core.book.by_state()
        return html_of_cluster(title, state, counts, nodes, page)

    # -- end ---------------------------------------------------------------------------------------

    def close(self, timeout: Optional[float] = None, terminate: bool = False) -> bool:
        """Wait for the jobs (at most `timeout` seconds; with terminate=True not at all: they are
        cancelled) and let the nodes go. Returns True; False, and nothing is changed, when jobs were
        left after `timeout`. May be called twice. Any thread."""
        return self._core.close(timeout, terminate)

    def shutdown(self, timeout: Optional[float] = None, terminate: bool = False) -> bool:
        """As `close`; nodes that were started with --client-shutdown end as soon as this program
        lets them go. Any thread."""
        return self._core.close(timeout, terminate, shutdown=True)

    def __enter__(self) -> 'JobCluster':
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        """Waits for the jobs; leaving by an exception cancels them."""
        self.close(terminate=kind is not None)


def ended_jobs(jobs: List[DispyJob], timeout: Optional[float]) -> Iterator[DispyJob]:
    """Yield each job once, as the jobs end. Raises TimeoutError after `timeout` seconds."""
    if timeout is None:
        until = None
    else:
        until = time.monotonic() + timeout
    ended: 'queue.SimpleQueue[DispyJob]' = queue.SimpleQueue()
    for job in jobs:
        job.call_when_ended(ended.put)
    left = set(jobs)
    while left:
        try:
            if until is None:
                job = next_of(ended, None)
            else:
                job = next_of(ended, until - time.monotonic())
        except queue.Empty:
            raise TimeoutError(text_of_unended(jobs, left, timeout)) from None
        if job in left:
            left.discard(job)
            yield job


def text_of_unended(jobs: List[DispyJob], left: Set[DispyJob], timeout: Optional[float]) -> str:
    """Return a text which says that jobs have not ended in time, and why the first of them has not.
    """
    text = '%d of %d jobs have not ended within %s s' % (len(left), len(jobs), timeout)
    for job in jobs:
        if job not in left:
            continue
        if job.status not in ENDED:
            return '%s. The first of them: %s' % (text, unended_text(job, timeout))
    return text


def wait_in_sight(book: JobBook, timeout: Optional[float]) -> bool:
    """Wait as `JobBook.wait` does, and show meanwhile how many jobs have ended."""
    if timeout is None:
        until = math.inf
    else:
        until = time.monotonic() + timeout
    with Progress() as shown:
        while True:
            shown.show(*book.progress())
            if book.wait(max(0.0, min(PROGRESS_EVERY, until - time.monotonic()))):
                shown.show(book.submitted, book.submitted)
                return True
            if time.monotonic() >= until:
                return False


def too_few_nodes(wanted: int, timeout: float, ready: int, tried: str) -> str:
    """Why a wait for nodes has ended: how many were wanted within so many seconds, and what was
    tried."""
    if wanted == 1:
        were = '1 node was'
    else:
        were = '%d nodes were' % wanted
    if ready:
        found = 'are only %d' % ready
    else:
        found = 'is none'
    return '%s waited for, and after %g s there %s. %s' % (were, timeout, found, tried)


TABLE_ROW = '%-32s %5s %8s %10s %12s  %s'


def table_of_status(status: ClusterStatus, elapsed: float) -> str:
    """Return the table that print_status prints; `elapsed` is the number of seconds that have
    passed."""
    lines = [TABLE_ROW % ('Node', 'CPUs', 'Jobs', 's / Job', 'Job time s', 'State'), '-' * 84]
    lines += map(row_of_status, status.all_nodes)
    lines.append('-' * 84)
    busy = sum(node.cpu_time for node in status.all_nodes)
    if elapsed:
        used = busy / elapsed
    else:
        used = 0.0
    line = ('Jobs pending: %d   Job time: %.3f s   Elapsed: %.3f s   CPUs used on '
            'average: %.2f' % (status.jobs_pending, busy, elapsed, used))
    lines.append(line)
    return '\n'.join(lines)


def row_of_status(node: DispyNode) -> str:
    """Return the row of a node in the table of print_status."""
    name = node.ip_addr
    if node.port not in (0, NODE_PORT):
        name = format_address(node.ip_addr, node.port)
    if node.name:
        name = '%s (%s)' % (name, node.name)
    each = '-'
    if node.jobs_done:
        each = '%.3f' % (node.cpu_time / node.jobs_done)
    state = node.state
    if node.reason:
        lines = node.reason.strip().splitlines()
        line = lines[-1]
        state = '%s: %s' % (state, line)
    return TABLE_ROW % (name[:32], node.cpus, node.jobs_done, each, '%.3f' % node.cpu_time, state)


def pages_of_nodes(ask: Callable[[int, int], List[tuple]]) -> List[NodeInfo]:
    """All that a scheduler tells of its nodes; ask(first, most) gets that many rows. Raises what
    that raises."""
    rows: List[NodeInfo] = []
    while True:
        page = ask(len(rows), NODES_PAGE)
        for row in page:
            rows.append(NodeInfo(*row))
        if len(page) < NODES_PAGE:
            return rows


class SharedOptions(NamedTuple):
    """The checked parameters that only a SharedJobCluster has."""
    scheduler: NodeSpec
    exclusive: bool
    any_node: bool      # of the scheduler's nodes all may be used


class SchedulerCommands(NodeCommands):
    """What the methods of a cluster ask about nodes that a scheduler has: its driver is asked.

    allocators - the program's; a scheduler knows them by their numbers, which begin with 1
    """

    def __init__(self, comp: str, book: JobBook, scheduler: NodeSpec,
                 cargo: PackedComputation) -> None:
        super().__init__(comp, book)
        self.allocators: List[NodeAllocate] = []
        self._scheduler = scheduler
        self._cargo = cargo

    def plain(self, specs: Sequence[NodeSpec]) -> List[tuple]:
        """Return specs as they are sent to the scheduler; allocators stay here."""
        rows = []
        for spec in specs:
            number = 0
            if spec.allocator is not None:
                self.allocators.append(spec.allocator)
                number = len(self.allocators)
            row = (spec.host, spec.port, spec.cpus, number)
            rows.append(row)
        return rows

    def ask(self, name: str, *args: Any) -> Any:
        """Have a command carried out by the scheduler. Raises what `NodeCommands.ask` raises."""
        if self.book.closed:
            raise RuntimeError('the cluster was closed')
        if name == 'question':
            return self._question(*args)
        if name == 'allocate':
            args = (self.plain(args[0]),)
        elif name == 'leave':
            if args[1] == 'open':
                args = (*args, self._cargo.spec['files'])
        args = tuple((arg.ip_addr, arg.port) if isinstance(arg, DispyNode) else arg for arg in args)
        return self._call(name, *args)

    def _ask_here(self, name: str) -> Any:
        """Ask the driver of this program, whose only node is the scheduler."""
        return super().ask(name)

    def _call(self, name: str, *args: Any) -> Any:
        until = time.monotonic() + CALL_TIME
        while True:
            try:
                future = self.driver.ask(lambda: self.driver.calls.call(self.comp, name, *args))
                return answer_of(future, CALL_TIME)
            except ConnectionError:
                if self.book.closed or time.monotonic() >= until:
                    raise RuntimeError('the scheduler %s is not connected' %
                                       self._scheduler.host) from None
                time.sleep(0.05)

    def _question(self,
                  node: Any,
                  row: Optional[tuple] = None,
                  path: str = '') -> 'concurrent.futures.Future[Any]':
        future: 'concurrent.futures.Future[Any]' = concurrent.futures.Future()
        if isinstance(node, DispyNode):
            node = (node.ip_addr, node.port)
        if row is None:
            running = []
            for serial in self._call('running', node):
                running.append((serial, 0.0))
            report = Report(self.comp, running, [], {})
            future.set_result(report)
            return future
        to_scheduler = self.driver.ask(
            lambda: self.driver.queries.question(self.comp, None, row, path))
        error = answer_of(to_scheduler, CALL_TIME)
        future.set_result(error or self._call('place', node, row))
        return future

    def _pages(self) -> List[NodeInfo]:
        """Return what the scheduler tells of its nodes. These may be thousands, so they come in
        pages."""
        return pages_of_nodes(lambda first, most: self._call('nodes', first, most))

    def rows(self) -> List[NodeInfo]:
        """Return the nodes, or the scheduler while there is none. The row of the scheduler never
        has CPUs, which would stand for all that it takes."""
        if not self._is_connected():
            return [row._replace(cpus=0) for row in self._ask_here('nodes')]
        rows = self._pages()
        if rows:
            return rows
        reason = 'has no node for this cluster yet'
        changed_rows: List[NodeInfo] = []
        for row in self._ask_here('nodes'):
            changed_row = row._replace(state='connected', reason=reason, cpus=0)
            changed_rows.append(changed_row)
        return changed_rows

    def rows_at_end(self) -> List[NodeInfo]:
        """Return the nodes, also when the cluster counts as closed."""
        if self._is_connected():
            return self._pages()
        return []

    def why_unloadable(self) -> str:
        """Return why no node can load the code of the computation; the text is empty if one may."""
        if self._is_connected():
            # It has gone meanwhile
            with contextlib.suppress(RuntimeError, concurrent.futures.TimeoutError):
                return self._call('why_unloadable')  # type: ignore[no-any-return]
        return ''

    def explain_no_nodes(self) -> str:
        """Return a text which says what was tried to reach nodes, what came of it, and what to do.
        """
        if self._is_connected():
            # It has gone meanwhile
            with contextlib.suppress(RuntimeError, concurrent.futures.TimeoutError):
                return self._call('complaint')  # type: ignore[no-any-return]
        return self._ask_here('complaint')  # type: ignore[no-any-return]

    def _is_connected(self) -> bool:
        peers = self.driver.ask(lambda: self.driver.nodes.of(self.comp))
        for peer in peers:
            if peer.link is not None and peer.name:
                return True
        return False

    def in_words(self, status: Callable[[], ClusterStatus]) -> str:
        """Return the address of the scheduler, which is not asked: that may take as long as it
        likes."""
        return 'scheduler %s' % format_address(*self._scheduler[:2])


class SharedDelivery(ResultDelivery):
    """As ResultDelivery, for jobs that the scheduler has sent to a node.

    places - job -> the node where it is, as the scheduler has told. The driver's thread and
        openers, each job in one at a time
    """

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.places: Dict[DispyJob, NodeInfo] = {}

    def began(self, job: DispyJob, start: float, peer: Union[NodeConnection, NodeInfo]) -> None:
        """Note that a job has begun, at the node where the scheduler has sent it."""
        super().began(job, start, self.places.get(job, peer))

    def apply_results(self, pairs: List[Tuple[DispyJob, tuple]], peer: Any) -> None:
        """Give jobs their results, each from the node where the scheduler had sent it."""
        for job, row in pairs:
            super().apply_results([(job, row)], self.places.pop(job, peer))

    def end_without_result(self, job: DispyJob, text: str) -> None:
        """End a job that has no result."""
        self.places.pop(job, None)
        super().end_without_result(job, text)


class SharedProgramCluster(ProgramCluster):
    """A SharedJobCluster as its driver knows it: the only node is the scheduler."""
    remote = True
    delivery: SharedDelivery
    nodes: SchedulerCommands

    def __init__(self, computation: Any, options: ClusterOptions, shared: SharedOptions) -> None:
        self._shared = shared
        super().__init__(computation, options)
        self.probes = False
        if shared.any_node:
            nodes = None
        else:
            nodes = self.nodes.plain(self.specs)
        self.specs = [shared.scheduler]
        # Whether another process may carry on with the jobs
        self.tell_scheduler(nodes, options.recover_file is not None)

    def tell_scheduler(self, nodes: Optional[List[tuple]], recovers: bool) -> None:
        """Add to the computation what the scheduler has to know of it: the nodes that are meant,
        None for all, and whether another process may carry on with the jobs."""
        shared: Dict[str, Any] = {'recovers': recovers, 'process': own_process(), 'nodes': nodes}
        shared['collected'] = recovers or self.trail is not None
        shared['reentrant'] = self.reentrant
        shared['exclusive'] = self._shared.exclusive
        shared['cloudpickle'] = cloudpickle.__version__
        self.cargo.spec['shared'] = shared
        if self.speculate:
            self.cargo.spec['speculate'] = True

    def _make_delivery(self, *parts: Any) -> ResultDelivery:
        return SharedDelivery(*parts)

    def _make_commands(self) -> NodeCommands:
        return SchedulerCommands(self.comp, self.book, self._shared.scheduler, self.cargo)

    def left_behind(self) -> Dict[Any, int]:
        """Return the nodes that outlive this program, with the number of jobs that run on there.
        The scheduler cancels what waits."""
        counts: Dict[Any, int] = collections.Counter()
        for job, row in list(self.delivery.places.items()):
            if job.status in (DispyJob.Running, DispyJob.ProvisionalResult):
                counts[row.key] += 1
        return counts

    def node_told(self, status: int, row: NodeInfo) -> None:
        """Tell cluster_status of a node, and log that the scheduler uses it or does not use it any
        more."""
        if status == DispyNode.Initialized:
            logger.info('%s: the scheduler uses node %s', self.name,
                        row.name or format_address(row.ip_addr, row.port), extra=ROUTINE)
        elif status == DispyNode.Closed:
            logger.info('%s: the scheduler does not use node %s any more', self.name,
                        row.name or format_address(row.ip_addr, row.port), extra=ROUTINE)
        super().node_told(status, row)

    def job_moved(self, work: DispyJob, node: tuple) -> None:
        """Note that a job is on a node now, or that it waits again."""
        if not node:
            self.delivery.places.pop(work, None)
            work.status = DispyJob.Created
            work.ip_addr = None
            work.start_time = None
            return
        host, port, name = node
        before = self.delivery.places.get(work)
        if before is not None and before.key != (host, port):
            self.live_output.begin_again(work)   # its second attempt counts
        self.delivery.places[work] = NodeInfo((host, port), host, port, name, 'ready', '', 0, 0, 0,
                                              {})

    def answer_to(self, name: str, args: tuple) -> Any:
        """Return what a scheduler asks; it also asks for the source and for the program's
        allocators."""
        if name == 'source':
            return self.cargo.source()
        if name == 'allocate':
            number = args[0]
            row = NodeInfo(*args[1])
            allocator = self.nodes.allocators[number - 1]
            found = ask_allocator(allocator, self.cluster, row)
            self.cargo.paths.update(found.paths)
            return (found.cpus, found.setup_args, found.files, self.bundles.rows(False))
        return super().answer_to(name, args)


class SharedJobCluster(JobCluster):
    """As JobCluster, with nodes that a dispyscheduler shares between several programs.

    Parameters, in addition to those of JobCluster:
    nodes - which of the scheduler's nodes may be used; None: all; those named here that it does not
        know yet it looks for
    scheduler_host - host name or address where dispyscheduler runs, as HOST or HOST:PORT; None:
        this machine (old name: scheduler_node)
    scheduler_port - its TCP port (default 9702)
    exclusive - True: no other cluster uses these nodes at the same time

    When the scheduler ends and is started again, jobs go on. Raises what JobCluster raises.
    """
    _is_shared = True

    def __init__(self,
                 computation: Any,
                 nodes: Any = None,
                 *args: Any,
                 scheduler_host: Optional[str] = None,
                 scheduler_port: Optional[int] = None,
                 exclusive: bool = False,
                 scheduler_node: Optional[str] = None,
                 **options: Any) -> None:
        if nodes == LOCAL:
            raise ValueError(
                'nodes=%r: a node of this program alone is not shared; use JobCluster' % LOCAL)
        where = scheduler_host or scheduler_node or '127.0.0.1'
        if not isinstance(where, str):
            raise TypeError("scheduler_host=%.80r: it must be 'host' or 'host:port'" % (where,))
        host, port = host_and_port(
            where, in_range('scheduler_port', scheduler_port, SCHEDULER_PORT, 1, 65535, True))
        node_spec = NodeSpec(host, port, scheduler=True)
        flag = flag_of('exclusive', exclusive)
        self._shared = SharedOptions(node_spec, flag, any_node(nodes))
        super().__init__(computation, nodes, *args, **options)

    def _make_core(self, computation: Any, options: ClusterOptions) -> ProgramCluster:
        return SharedProgramCluster(computation, options, self._shared)


class NodeScan(NodeUser):
    """What nodes there are and whether they can be used, without using them: a cluster for the
    driver, but without a computation.

    nodes, port, secret, certfile, keyfile, cafile - as of JobCluster; nodes=None: all that answer
        on the local network. Raises TypeError, ValueError, SecretError. A context manager.
    """
    client = 'survey'
    warns = False
    name = 'a look at nodes'

    def __init__(self,
                 nodes: Any = None,
                 port: int = NODE_PORT,
                 secret: Union[str, bytes, None] = None,
                 certfile: Optional[str] = None,
                 keyfile: Optional[str] = None,
                 cafile: Optional[str] = None) -> None:
        if nodes is None:
            nodes = '*'
        self.specs = parse_nodes(nodes, port)
        self.port = port
        self.comp = new_comp()
        files = tls_files(certfile, keyfile, cafile)
        access = ConnectionSettings(find_secret(secret), *files, PULSE, REDIAL_MOST)
        self.driver = drivers.acquire(access)
        self.driver.ask(lambda: self.driver.open(self, False))

    def look(self,
             timeout: float = HANDSHAKE_TIME + 1.0,
             listen: float = SURVEY_TIME) -> List[DispyNode]:
        """The nodes, when each that was named has answered or failed, at the latest after `timeout`
        seconds; answers to a question to all are waited for `listen` seconds. `state` is
        'connected', and `reason` then who uses it, or why it cannot be used."""
        began = time.monotonic()
        wild = any(spec.wild for spec in self.specs)
        while True:
            # What is not known yet is looked for in the same turn: otherwise an answer could come
            # between the two.
            found = self.driver.ask(self._found)
            passed = time.monotonic() - began
            listens = wild and passed < listen
            is_open = any(is_open for _, is_open in found)
            if passed >= timeout or not (listens or is_open):
                return [node for node, _ in found]
            time.sleep(0.05)

    def _found(self) -> List[Tuple[DispyNode, bool]]:
        """Return the nodes, with whether each may still answer. The driver's thread."""
        nodes = self.driver.queries.nodes_of(self.comp)
        return [(self._seen(peer, state, reason), self._is_open(peer))
                for peer, state, reason, _, _ in nodes]

    @staticmethod
    def _is_open(peer: NodeConnection) -> bool:
        """Return whether a node has neither answered nor failed yet. The driver's thread."""
        if peer.link is not None:
            return not peer.name
        if peer.state not in (NodeState.FOUND, NodeState.DIALLING):
            return False
        if peer.failures:
            return False
        return bool(peer.port)

    @staticmethod
    def _seen(peer: NodeConnection, state: str, reason: str) -> DispyNode:
        if state == 'connected':
            holder = peer.facts.get('holder')
            if holder:
                reason = 'serves %s' % holder
            elif peer.offered:
                reason = ''
            else:
                reason = 'takes no new jobs'
        return describe_node(peer, state, reason, peer.offered, 0)

    def close(self) -> None:
        """Let the nodes go."""
        self.driver.ask(lambda: self.driver.forget(self.comp))
        drivers.release(self.driver)

    def __enter__(self) -> 'NodeScan':
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


class Progress:
    """How many jobs have ended, on stderr: tqdm's bar if it is installed, otherwise a line a
    second, rewritten. In a notebook tqdm shows its bar there. Nothing is shown if stderr is neither
    that nor a terminal."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._next = 0.0
        self._bar: Any = None
        self._begun = False
        self._in_notebook = in_notebook()
        self._quiet = not self._in_notebook and (sys.stderr is None or not sys.stderr.isatty())

    def __enter__(self) -> 'Progress':
        return self

    def _make_bar(self, total: Optional[int]) -> Any:
        """Return a bar of tqdm, or None if tqdm is not installed."""
        with contextlib.suppress(ImportError):   # it is not asked for, only used
            if not self._in_notebook:
                import tqdm
                return tqdm.tqdm(total=total, unit='job', file=sys.stderr)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')   # without ipywidgets it warns, and shows text
                import tqdm.auto
                return tqdm.auto.tqdm(total=total, unit='job')
        return None

    def show(self, done: int, total: Optional[int]) -> None:
        """Bring the display up to date; `total` is None if it is not known how many there are."""
        if self._quiet:
            return
        if not self._begun:
            self._begun = True
            self._bar = self._make_bar(total)
        if self._bar is not None:
            if self._bar.total != total:
                self._set_total(total)
            self._bar.update(done - self._bar.n)
        elif self._clock() >= self._next or done == total:
            self._next = self._clock() + PROGRESS_EVERY
            message = '\r%s   ' % self._line(done, total)
            print(message, end='', file=sys.stderr, flush=True)

    def _set_total(self, total: Optional[int]) -> None:
        """Change the total of the bar; the bar of a notebook has a widget that must be told."""
        if self._in_notebook:
            done = self._bar.n
            self._bar.reset(total)
            self._bar.update(done)
        else:
            self._bar.total = total

    def _line(self, done: int, total: Optional[int]) -> str:
        rate = done / max(1e-9, self._clock() - self._started)
        if total is None:
            return '%d jobs, %.1f a second' % (done, rate)
        if done and done < total:
            left = ', about %.0f s left' % ((total - done) / rate)
        else:
            left = ''
        return '%d of %d jobs, %.1f a second%s' % (done, total, rate, left)

    def __exit__(self, *exc: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._begun:
            print(file=sys.stderr)


def in_notebook() -> bool:
    """Whether what is printed is shown in a notebook: this is a kernel of Jupyter."""
    shell = getattr(sys.modules.get('IPython'), 'get_ipython', lambda: None)()
    if shell is None:
        return False
    return hasattr(shell, 'kernel')


_OF_HISTORY = LazyPattern(r'_+|_\d+')


def references_of_history(value: Any) -> int:
    """How many references to a value there are because a notebook or prompt has shown it. Any
    thread."""
    spaces: List[Any] = [vars(builtins)]   # `_` of Python's own prompt
    shell = getattr(sys.modules.get('IPython'), 'get_ipython', lambda: None)()
    if shell is not None:
        user = getattr(shell, 'user_ns', {})
        spaces += [user, user.get('_oh', {}), getattr(shell, 'user_ns_hidden', {}),
                   vars(getattr(shell, 'displayhook', shell))]
    count = 0
    for space in spaces:
        for name, one in list(space.items()):
            if one is not value:
                continue
            if isinstance(name, int) or _OF_HISTORY.fullmatch(name):
                count += 1
    return count


def shortest(iterables: Sequence[Any]) -> Optional[int]:
    """Return how many items `zip` makes of the iterables, or None if none of them knows its length.
    """
    hints = []
    for iterable in iterables:
        hints.append(operator.length_hint(iterable, -1))
    return min((hint for hint in hints if hint >= 0), default=None)


def in_sight(results: Any, total: Optional[int]) -> Iterator[Any]:
    """Yield results, and show how many of this total have been taken."""
    with contextlib.closing(results), Progress() as shown:
        for done, result in enumerate(results, 1):
            shown.show(done, total)
            yield result


def _own_hosts(host: Any) -> List[Any]:
    """Return the parameter `host`, which is one host or a list of them, as a list."""
    if isinstance(host, list) and host:
        if all(isinstance(each, str) for each in host):
            return host
    return [host]


def _own_host(host: Any) -> Optional[Tuple[str, int]]:
    """One of the parameter `host`: an address, ADDRESS:PORT or (address, port). Raises TypeError or
    ValueError."""
    if host is None:
        return None
    if isinstance(host, str):
        try:
            if host == '':
                return (host, SCHEDULER_PORT)
            return host_and_port(plain_text(host), SCHEDULER_PORT)
        except ValueError as exc:
            raise ValueError(
                "host: %s: it must be an address of this host, 'address:port' or (address, port)" %
                exc) from None
    if not isinstance(host, (tuple, list)) or len(host) != 2 or not isinstance(host[0], str):
        raise TypeError(
            "host=%.80r: it must be an address of this host, 'address:port' or (address, port)" %
            (host, ))
    return plain_text(host[0]), in_range('host: port', host[1], None, 1, 65535, True)


def plain_number(value: Any, whole: bool = False) -> Any:
    """An int or float for any number: of numpy, of an enum, a Fraction. None for what is no number,
    also for bool; for NaN; and if it must be `whole` for others."""
    # Numpy's
    if isinstance(value, bool):
        return None
    if type(value).__name__ in ('bool_', 'bool'):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    if whole:
        return None
    if not isinstance(value, numbers.Real):
        return None
    if value != value:
        return None
    try:
        return float(value)
    except OverflowError:   # a fraction
        return None


def number_in(value: Any, whole: bool = False) -> Any:
    """Return what plain_number returns; the number may also be given as text, as dispy 4 took it.
    """
    if isinstance(value, str):
        try:
            if whole:
                value = int(value)
            else:
                value = float(value)
        except ValueError:
            return None
    return plain_number(value, whole)


def in_range(name: str, value: Any, default: Any, low: float, high: float,
             whole: bool = False) -> Any:
    """Return a parameter as a plain number. Raises ValueError if it is none or is out of range."""
    if value is None:
        return default
    number = number_in(value, whole)
    if number is None or not low <= number <= high:
        message = '%s=%.80r is not a %snumber between %s and %s' % (name, value, 'whole '
                                                                    if whole else '', low, high)
        raise ValueError(message)
    return number


def _seconds(name: str, value: Any) -> Optional[float]:
    """Return a time to wait in seconds, or None for one without limit. Raises TypeError or
    ValueError."""
    if value is None:
        return None
    number = plain_number(value)
    if number is None:
        message = '%s=%.80r is not a number of seconds, nor None' % (name, value)
        raise (ValueError if isinstance(value, numbers.Real) else TypeError)(message)
    if number > threading.TIMEOUT_MAX:
        return None
    return float(number)


def flag_of(name: str, value: Any) -> bool:
    """Return a parameter that is True or False. Raises TypeError for anything else."""
    if isinstance(value, (bool, numbers.Number)) or type(value).__name__ in ('bool_', 'bool'):
        if value == 0 or value == 1:
            return bool(value)
    raise TypeError('%s=%.80r is neither True nor False' % (name, value))


# What a resource may not be called, and how that is asked for instead
_OTHER_NAMES = {'cpu': 'dispy_cpus', 'cpus': 'dispy_cpus', MEMORY: 'dispy_memory'}


def request_of(name: str, value: Any) -> Request:
    """Return what a parameter says of resources: {'gpu': 1}. Those of which it wants 0 are left
    out. Raises TypeError or ValueError, which name the parameter."""
    if not isinstance(value, collections.abc.Mapping):
        message = "%s=%.80r must be a dict of names and numbers, such as {'gpu': 1}" % (name, value)
        raise TypeError(message)
    found = {}
    for word, count in value.items():
        if not isinstance(word, str) or not RESOURCE_NAME.fullmatch(word):
            message = ('%s: %.80r is not the name of a resource, which has letters, digits, _, . '
                       'and -') % (
                name, word)
            raise ValueError(message)
        if word in _OTHER_NAMES:
            raise ValueError('%s: %s is asked for by %s' % (name, word, _OTHER_NAMES[word]))
        found[word] = in_range('%s: %s' % (name, word), count, 0, 0, UNITS_MOST, True)
    return tuple(sorted((word, count) for word, count in found.items() if count))


def _take_options(kwargs: dict) -> Optional[dict]:
    """Take the keywords that are the cluster's out of those of the job."""
    repeats = _take_repeats(kwargs)
    options: Dict[str, Any] = {}
    resources = kwargs.pop('dispy_resources', None)
    if resources is not None:
        options['resources'] = request_of('submit: dispy_resources', resources)
    for name in [name for name in kwargs if name.startswith('dispy_')]:
        if name not in _OPTIONS:
            reason = ('submit: unknown keyword %s; there are %s, dispy_resources, dispy_retry_on, '
                      'dispy_retry_delay and dispy_job_depends' % (name, ', '.join(_OPTIONS)))
            raise TypeError(reason)
        value = kwargs.pop(name)
        if value is not None:
            message = 'submit: ' + name
            options[name[len('dispy_'):]] = in_range(message, value, None, *_OPTIONS[name])
    if repeats is not None:
        if not options.get('retries'):
            raise ValueError('submit: dispy_retry_on needs dispy_retries, how often it is tried '
                             'again')
        repeats.most = options['retries']
        options['repeats'] = repeats
    return options or None


def _take_repeats(kwargs: dict) -> Optional[Repeats]:
    """Take the keywords that say which failures are repeated. Raises TypeError or ValueError."""
    on = kwargs.pop('dispy_retry_on', None)
    delay = kwargs.pop('dispy_retry_delay', None)
    if on is None or on is False:
        if delay is not None:
            raise ValueError('submit: dispy_retry_delay needs dispy_retry_on, which failures are '
                             'repeated')
        return None
    if isinstance(on, (tuple, list)):
        kinds = on
    else:
        kinds = (on,)
    if on is not True:
        if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
            raise TypeError('submit: dispy_retry_on=%.80r: it must be True, a class of exceptions '
                            'or several of these' % (on, ))
    seconds = in_range('submit: dispy_retry_delay', delay, 0.0, 0, 1e6)
    return Repeats(on if on is True else tuple(kinds), seconds, 0)


# Lowest and highest value, and whether it is a whole number
_OPTIONS: Dict[str, Tuple[float, float, bool]] = {
    'dispy_timeout': (0.001, 1e9, False), 'dispy_priority': (-(1 << 31), 1 << 31, True),
    'dispy_cpus': (1, 1 << 16, True), 'dispy_memory': (1, 1 << 60, True),
    'dispy_retries': (0, 1000, True)
}


# --------------------------------------------------------------------------------------------------
# Standard interfaces: concurrent.futures and joblib
# --------------------------------------------------------------------------------------------------

class DispyFuture(concurrent.futures.Future):  # type: ignore[type-arg]
    """A future of a DispyExecutor; `job` is the job behind it, None if the call could not be
    pickled."""
    __class_getitem__ = classmethod(of_kind)

    def __init__(self, cluster: JobCluster) -> None:
        self.job: Optional[DispyJob] = None
        self._cluster = cluster
        super().__init__()

    @property
    def _state(self) -> str:
        """The state by the names of the standard library, which shows it and decides by it."""
        state = self._set_state
        job = self.job
        if state == 'PENDING' and job is not None:
            if job.status in (6, 7):
                return 'RUNNING'
        return state

    @_state.setter
    def _state(self, state: str) -> None:
        self._set_state = state

    def cancel(self) -> bool:
        """Cancel the call if it has not begun: its node is asked, and the answer is waited for, 1 s
        at most. Returns whether it will never begin. As with other executors, what runs goes on
        (`cluster.cancel` ends that too). In a thread with a running event loop the answer is not
        waited for: the call is cancelled as soon as it has come. Any thread."""
        if self.done():
            return self.cancelled()
        if self.job is None:
            return False
        if _in_event_loop():
            withdraw_all(self._driver(), [self.job])
            if self.job.status != JobState.CANCELLED:
                return False
            return super().cancel()
        return withdraw(self._driver(), self.job) and super().cancel()

    def result(self, timeout: Optional[float] = None) -> Any:
        """Return the result as concurrent.futures does; the text of a TimeoutError says what the
        call waits for."""
        try:
            return super().result(timeout)
        except concurrent.futures.TimeoutError as exc:
            raise self._explained(exc, timeout)

    def exception(self, timeout: Optional[float] = None) -> Optional[BaseException]:
        """Return the exception as concurrent.futures does; the text of a TimeoutError says what the
        call waits for."""
        try:
            return super().exception(timeout)
        except concurrent.futures.TimeoutError as exc:
            raise self._explained(exc, timeout)

    def _explained(self, exc: BaseException, timeout: Optional[float]) -> BaseException:
        """Return the exception of a wait with a text, and an exception that the call has raised as
        it is."""
        if self.done():
            return exc
        if self.job is None or exc.args:
            return exc
        return concurrent.futures.TimeoutError(unended_text(self.job, timeout))

    def _driver(self) -> Driver:
        """The driver of the cluster that runs the call."""
        return core_of(self._cluster).driver  # type: ignore[no-any-return]

    def settle(self, job: DispyJob) -> None:
        """The job has ended. What it printed is shown here, unless the program takes that itself
        (`on_output`). A callback thread."""
        core = core_of(self._cluster)
        if core.live_output.on_output is None:
            _show_printed(job)
        if self.cancelled() or job.status == JobState.CANCELLED:
            super().cancel()
            self.set_running_or_notify_cancel()
        elif job.status == JobState.FINISHED:
            self.set_result(job.result)
        else:
            error = error_of(job)
            dispy_unopened = getattr(error, 'dispy_unopened', False)
            if dispy_unopened and not isinstance(error, ImportError):
                lost = WorkerLost('the call could not be opened by its worker:\n%s' % job.exception)
                lost.__cause__ = error
                error = lost
            elif isinstance(error, WorkerLost):
                if NO_INITIALIZER in str(error):
                    core.unusable = str(error)
            self.set_exception(error)


def withdraw_all(driver: Driver, jobs: Sequence[Any]) -> None:
    """Cancel those of the jobs that have not begun; the answers are not waited for. Any thread but
    the driver's."""
    with contextlib.suppress(RuntimeError):   # the driver has ended, and its jobs with it
        driver.ask(lambda: driver.cancels.withdraw_all(jobs))


def withdraw(driver: Driver, job: DispyJob) -> bool:
    """Cancel a job if it has not begun; whether it never will. Waits for the answer of its node
    for WITHDRAW_TIME; then the job goes on. Any thread; without answer in the driver's."""
    if job.status in ENDED or driver.broken or threading.current_thread() is driver.thread:
        return job.status == DispyJob.Cancelled
    try:
        future = driver.ask(lambda: driver.cancels.withdraw(job))
        try:
            return future.result(WITHDRAW_TIME)  # type: ignore[no-any-return]
        except concurrent.futures.TimeoutError:
            return driver.ask(lambda: driver.cancels.keep(job))  # type: ignore[no-any-return]
    except RuntimeError:   # the driver has ended meanwhile, and its jobs with it
        return job.status == DispyJob.Cancelled


def _show_printed(job: DispyJob) -> None:
    """Show what a call has printed, whole, when it has ended, as if a process of this machine had
    printed it."""
    for text, stream in ((job.stdout, sys.stdout), (job.stderr, sys.stderr)):
        if text and stream is not None:
            with contextlib.suppress(OSError, ValueError):   # closed, or it lacks these characters
                stream.write(str(text))
                stream.flush()


def _in_event_loop() -> bool:
    """Whether this thread runs an event loop of asyncio, which must not be kept waiting."""
    asyncio = sys.modules.get('asyncio')
    if asyncio is None:
        return False
    return asyncio._get_running_loop() is not None


def _settle_future(job: DispyJob) -> None:
    """The callback of an executor's cluster. Afterwards the job refers to the future no more:
    both are freed, with the result, when the last reference to them is gone."""
    future = job.future
    del job.future
    future.settle(job)


class _ExecutorClusters:
    """The clusters of an executor: one, and while the file of a module has changed those before
    it, whose calls go on. Nothing that lasts refers to this, so that it is freed with the last
    executor that uses it; its clusters are closed then."""

    def __init__(self, make_cluster: Callable[[], JobCluster]) -> None:
        self._make_cluster = make_cluster
        self._lock = threading.Lock()      # guards those below
        self.cluster = make_cluster()
        self._clusters = [self.cluster]    # that are open
        self._closed = False
        self._end = weakref.finalize(self, _close_later, self._clusters)
        self._end.atexit = False           # the end of the program sees to clusters itself

    def current(self) -> JobCluster:
        """Return the cluster for a new call. Raises RuntimeError or BrokenProcessPool."""
        cluster = self.cluster
        core = core_of(cluster)
        if _ending:
            raise RuntimeError('cannot schedule new futures after interpreter shutdown: '
                               'the program ends')
        if self._closed or core.closed:
            raise RuntimeError('cannot schedule new futures after shutdown: '
                               'the executor was closed')
        if core.unusable:
            raise BrokenProcessPool(core.unusable)
        if core.bundles.changed():
            return self._renewed(cluster)
        return cluster

    def _renewed(self, old: JobCluster) -> JobCluster:
        """Replace the cluster because the file of a module has changed: later calls run its new
        text, in new workers."""
        with self._lock:
            if self.cluster is old and not core_of(old).closed and not self._closed:
                self.cluster = self._make_cluster()
                open_ones = []
                for cluster in self._clusters:
                    if not core_of(cluster).closed:
                        open_ones.append(cluster)
                self._clusters[:] = [*open_ones, self.cluster]
                _close_later([old])
            return self.cluster

    def close(self, wait: bool, cancel: bool) -> None:
        """Take no more calls."""
        with self._lock:
            self._closed = True
            clusters = list(self._clusters)
        self._end.detach()
        for core in map(core_of, clusters) if cancel else ():
            if not core.closed:
                core.cancel_waiting(True)
        if not wait:
            _close_later(clusters)
        for cluster in clusters if wait else ():
            cluster.close()

    def terminate(self) -> None:
        """Take no more calls, and end those that run."""
        with self._lock:
            self._closed = True
        for cluster in self._clusters:
            cluster.close(terminate=True)


def _close_later(clusters: Sequence[JobCluster]) -> None:
    """Close clusters when their jobs have ended. Any thread, also one that collects garbage."""
    def close() -> None:
        for cluster in clusters:
            cluster.close()
    with contextlib.suppress(RuntimeError):   # the interpreter ends, and its clusters with it
        thread = threading.Thread(target=close, name='dispy-shutdown', daemon=True)
        thread.start()


class DispyExecutor(concurrent.futures.Executor):
    """A concurrent.futures.Executor whose calls run on the nodes of a cluster: any function a call,
    exceptions as they were raised with the node's traceback as their cause. `cluster` is the
    cluster.

    Parameters:
    max_workers - CPUs that calls use at once, over all nodes (default: all that these have). A node
        that this program has started itself runs so many calls at once even if the machine has
        fewer CPUs
    nodes - as of JobCluster, whose other parameters but `computation` and `job_status` may be given
        as well
    initializer, initargs - a function and its arguments: each worker process calls it before its
        first call. A node where it fails is not used; if there is no other, all futures and
        `submit` raise BrokenExecutor
    max_tasks_per_child - a worker process is replaced after so many calls (default: never)
    mp_context - a context of `multiprocessing`, or the name of a start method: see `start_method`
        of JobCluster. Any but fork and spawn is taken for spawn, and is named in the log, once

    A worker process that is killed ends its call with WorkerLost, which is a BrokenExecutor; the
    executor itself goes on. When the program ends, it waits for calls that have not ended; Ctrl-C
    ends that wait. Raises what JobCluster raises.
    """
    _cluster_class: Callable[..., JobCluster] = JobCluster

    def __init__(self, max_workers: Optional[int] = None, mp_context: Any = None,
                 initializer: Optional[Callable[..., Any]] = None, initargs: Sequence[Any] = (), *,
                 max_tasks_per_child: Optional[int] = None, nodes: Any = None,
                 **options: Any) -> None:
        if max_tasks_per_child is not None:
            options['max_jobs_per_worker'] = _positive('max_tasks_per_child', max_tasks_per_child)
        if max_workers is None:
            most = 0
        else:
            most = _positive('max_workers', max_workers)
        if initializer is not None:
            if not callable(initializer):
                raise TypeError('initializer must be a callable, not %.80r' % (initializer,))
        if mp_context is not None:
            options['start_method'] = _method_of(mp_context)
        calls = Calls(initializer, tuple(initargs), most)
        make_cluster = functools.partial(self._cluster_class,
                                         calls,
                                         nodes,
                                         job_status=_settle_future,
                                         **options)
        self._pool = _ExecutorClusters(make_cluster)
        self._options: Optional[dict] = None

    @property
    def cluster(self) -> JobCluster:
        """The cluster that runs the calls."""
        return self._pool.cluster

    def with_options(self, *, timeout: Optional[float] = None, priority: Optional[int] = None,
                     memory: Optional[int] = None, cpus: Optional[int] = None,
                     retries: Optional[int] = None,
                     resources: Optional[Mapping[str, int]] = None) -> 'DispyExecutor':
        """An executor with the same workers, whose calls have these options: see `dispy_timeout`
        and so on of JobCluster.submit. What is not given stays as it is. To shut down one of them
        is to shut down all. Raises ValueError for an option out of range."""
        given = _take_options({
            'dispy_timeout': timeout, 'dispy_priority': priority, 'dispy_memory': memory,
            'dispy_cpus': cpus, 'dispy_retries': retries, 'dispy_resources': resources})
        other = DispyExecutor.__new__(type(self))
        other._pool = self._pool
        other._options = dict(self._options or {}, **given or {}) or None
        return other

    def submit(self, fn: Callable[..., Any], /,  # type: ignore[override]
               *args: Any, **kwargs: Any) -> DispyFuture:
        """Call fn(*args, **kwargs) on a node. What pickling raises is the future's exception.
        Raises RuntimeError after shutdown, BrokenExecutor if the initializer has failed on all
        nodes, TypeError for what cannot be called. Any thread."""
        if not callable(fn):
            raise TypeError('%.80r cannot be called' % (fn,))
        cluster = self._pool.current()
        core = core_of(cluster)
        submitter = core.submitter
        future = DispyFuture(cluster)
        try:
            function = in_one_piece(core.bundles.packed(fn, [('the function', fn)], True))
            payload = submitter.pack((function, args, kwargs), {})
        except (Exception, SystemExit) as exc:  # pickling runs the user's code
            future.set_exception(_pickling_error(exc))
            return future
        try:
            next_number = next(submitter.numbers)
            options = submitter.with_defaults(self._options)
            submitter.enter(next_number, args, kwargs, options, payload, future)
        except RuntimeError as exc:
            if cluster is not self._pool.cluster:   # it has been replaced meanwhile
                return self.submit(fn, *args, **kwargs)
            raise RuntimeError('cannot schedule new futures after shutdown: %s' % exc) from None
        return future

    def map(self,
            fn: Callable[..., Any],
            *iterables: Any,
            timeout: Optional[float] = None,
            chunksize: int = 1,
            buffersize: Optional[int] = None,
            progress: bool = False) -> Iterator[Any]:
        """As in concurrent.futures: results come in order, `chunksize` inputs a job. All inputs are
        taken at once; with `buffersize`, so many jobs are under way at most, and others are taken
        as results are. Raises TimeoutError when the next result is not there `timeout` seconds
        after the call, and what a call raised. `progress` as in JobCluster.map."""
        if progress:
            results = self.map(fn, *iterables, timeout=timeout, chunksize=chunksize,
                               buffersize=buffersize)
            return in_sight(results, shortest(iterables))
        if chunksize < 1:
            raise ValueError('chunksize=%r must be at least 1' % (chunksize,))
        if buffersize is not None:
            buffersize = _positive('buffersize', buffersize)
        if timeout is None:
            until = None
        else:
            until = time.monotonic() + timeout
        inputs: Iterator[tuple] = zip(*iterables)
        call = fn
        if chunksize > 1:
            call = functools.partial(call_chunk, fn)
            rows = inputs
            chunks = iter(lambda: list(itertools.islice(rows, chunksize)), [])
            inputs = ((chunk,) for chunk in chunks)
        first = itertools.islice(inputs, buffersize)
        futures = collections.deque(self.submit(call, *args) for args in first)
        more = None
        if buffersize is not None:   # what is not asked for shall not keep the executor
            more = functools.partial(_submit_next, weakref.ref(self), call, inputs)
        results = _results_of(futures, until, more)
        if chunksize == 1:
            return results
        return _flat(results)

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        """As in concurrent.futures, waits for all calls; Ctrl-C and sys.exit end them."""
        if kind is not None and not issubclass(kind, Exception):
            self._pool.terminate()
        else:
            self.shutdown()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; wait for those there are (`cancel_futures`: for those that have
        begun or that a CPU is about to take) and let the nodes go. Without `wait` that is done
        later. Any thread."""
        self._pool.close(wait, cancel_futures)

    def __repr__(self) -> str:
        return '<DispyExecutor of %r>' % self.cluster


def _positive(name: str, value: Any) -> int:
    """Return a parameter of an executor that is a number of things. Raises TypeError or ValueError.
    """
    number = plain_number(value, True)
    if number is None:
        if name == 'max_workers':
            hint = '; nodes are given as nodes='
        else:
            hint = ''
        raise TypeError('%s must be an integer, not %.80r%s' % (name, value, hint))
    if number < 1:
        raise ValueError('%s must be greater than 0' % name)
    return number  # type: ignore[no-any-return]


def _method_of(context: Any) -> str:
    """The start method of workers that a context of `multiprocessing` stands for. One that there is
    not is noted: forkserver, for one, also gives processes in which nothing of the program is."""
    if isinstance(context, str):
        method = context
    else:
        method = context.get_start_method()
    if method in (FORK, SPAWN):
        return method  # type: ignore[no-any-return]
    if method not in _methods_noted:
        _methods_noted.add(method)
        logger.info('mp_context: workers are started by spawn, as there is no %s', method)
    return SPAWN


_methods_noted: Set[str] = set()


def _pickling_error(exc: BaseException) -> BaseException:
    """The exception of a call that could not be pickled. One by which a program ends does not end
    it."""
    if isinstance(exc, SystemExit):
        error = pickle.PicklingError('the call could not be pickled: %r' % exc)
        error.__cause__ = exc
        return error
    return exc


def _submit_next(executor: 'weakref.ref[DispyExecutor]', call: Callable[..., Any],
                 inputs: Iterator[tuple]) -> List[DispyFuture]:
    """Submit the next input of `map`, if there is one."""
    there = executor()
    if there is None:
        return []
    return [there.submit(call, *args) for args in itertools.islice(inputs, 1)]


def _results_of(futures: Deque[DispyFuture], until: Optional[float],
                more: Optional[Callable[[], List[DispyFuture]]]) -> Iterator[Any]:
    """Results in order; when they are not wanted any more, the calls that have not begun are
    cancelled. No result is referred to from here once it has been yielded."""
    try:
        while futures:
            if more is not None:
                futures.extend(more())
            yield _result_or_cancel(futures, until)
    finally:
        if futures:
            jobs = []
            for future in futures:
                if future.job is not None:
                    jobs.append(future.job)
            core = core_of(futures[0]._cluster)
            withdraw_all(core.driver, jobs)


def _result_or_cancel(futures: Deque[DispyFuture], until: Optional[float]) -> Any:
    """Return the result of the first future, which is removed if it has ended."""
    if until is None:
        left = None
    else:
        left = max(0.0, until - time.monotonic())
    try:
        result = futures[0].result(left)
    except concurrent.futures.TimeoutError:
        if futures[0].done():   # the call has raised it
            futures.popleft()
        raise
    except BaseException:
        futures.popleft()
        raise
    futures.popleft()
    return result


def _flat(results: Any) -> Iterator[Any]:
    """Yield the results of jobs of several calls one after the other."""
    with contextlib.closing(results):
        for chunk in results:
            chunk.reverse()
            while chunk:
                yield chunk.pop()


_ending = False    # the interpreter ends, and executors take no more calls


def _wait_for_executors() -> None:
    """The program ends: what was submitted to executors is waited for, as the standard library
    does. Ctrl-C ends that, and so does it that no node is to be had."""
    global _ending
    if _ending:   # it has been done
        return
    _ending = True
    left = END_WITHOUT_NODES
    calling = [core for core in map(core_of, _clusters)
               if core.callbacks.job_status is _settle_future]
    for core in calling:
        try:
            while left > 0 and not core.closed and not core.book.wait(0.5):
                if not core.report.count_ready():
                    left -= 0.5
        except KeyboardInterrupt:
            logger.warning('%s: the program is ending and does not wait for its calls any more',
                           core.name)
            return
        except RuntimeError as exc:   # it was closed, or its driver has failed
            logger.debug('%s: %s', core.name, exc)


# Before other exit handlers, which may not submit calls any more
if hasattr(threading, '_register_atexit'):
    with contextlib.suppress(RuntimeError):   # it ends already
        threading._register_atexit(_wait_for_executors)


class JoblibCall:
    """A batch of joblib's calls on its way. joblib calls `result` or `get`."""
    __slots__ = ('parallel', 'job', '_callback', '_error', '_backend')

    def __init__(self, backend: Any, callback: Optional[Callable[[Any], Any]]) -> None:
        self.parallel = getattr(callback, 'parallel', None)   # the Parallel that it belongs to
        self.job: Optional[DispyJob] = None
        self._backend = backend
        self._callback = callback
        self._error: Optional[BaseException] = None

    def settle(self, job: DispyJob) -> None:
        """Note that the job has ended. A callback thread."""
        self.job = job
        _show_printed(job)
        self._tell()

    def fail(self, error: BaseException) -> None:
        """Note that the call could not be submitted. Any thread."""
        self._error = error
        # joblib holds locks of its own while it submits
        thread = threading.Thread(target=self._tell, name='dispy-joblib', daemon=True)
        thread.start()

    def _tell(self) -> None:
        self._backend.ended(self)
        if self._callback is not None:
            self._callback(self)

    def result(self) -> Any:
        """Return what the batch returned. Raises what it raised."""
        if self._error is not None:
            raise self._error
        return result_of(self.job)  # type: ignore[arg-type]

    def get(self, timeout: Optional[float] = None) -> Any:
        """Return the result, for joblib before 1.3. Raises TimeoutError after `timeout` seconds."""
        if self._error is None and not self.job.wait(timeout):  # type: ignore[union-attr]
            raise TimeoutError('a batch of calls has not ended within %s s' % timeout)
        return self.result()


class _KeptCluster:
    """A cluster of joblib's calls: with which options it was made, who uses it, and since when
    nobody does."""

    def __init__(self, options: dict, cluster: JobCluster) -> None:
        self.options = options
        self.cluster = cluster
        self.users: 'weakref.WeakSet[Any]' = weakref.WeakSet()
        self.idle_since = 0.0

    @property
    def is_open(self) -> bool:
        """Whether it can be used: it may have been closed, or be of the parent of a forked
        process."""
        core = core_of(self.cluster)
        if core.closed:
            return False
        return not core.driver.broken


class JoblibClusters:
    """Clusters that joblib's calls run on, by the options of their backends. One that no call uses
    is kept for a while, since the next call wants the same as a rule. Any thread."""
    KEPT = 300.0       # s, as joblib's own backend keeps its workers

    def __init__(self) -> None:
        self._lock = threading.RLock()   # guards those below; held while a cluster is made
        self._kept: List[_KeptCluster] = []
        self._asked: List[Tuple[Any, float, int]] = []   # nodes, when they were asked, CPUs
        self._timer: Optional[threading.Timer] = None

    def take(self, user: Any, options: dict, make: Callable[[], JobCluster]) -> JobCluster:
        """Return the cluster with these options, which is made if there is none. Raises what making
        it raises."""
        with self._lock:
            found = self._find(options)
            if found is not None and core_of(found.cluster).bundles.changed():
                # The file of a module has changed: later calls run its new text.
                self._kept.remove(found)
                thread = threading.Thread(target=found.cluster.close,
                                          name='dispy-renew',
                                          daemon=True)
                thread.start()
                found = None
            if found is None:
                found = _KeptCluster(options, make())
                self._kept.append(found)
            found.users.add(user)
            return found.cluster

    def _find(self, options: dict) -> Optional[_KeptCluster]:
        self._kept = [kept for kept in self._kept if kept.is_open]
        for kept in self._kept:
            if kept.options == options:
                return kept
        return None

    def release(self, user: Any) -> None:
        """Note that a user needs no cluster any more."""
        with self._lock:
            for kept in self._kept:
                if user in kept.users:
                    kept.users.discard(user)
                    kept.idle_since = time.monotonic()
            if self._timer is None and self._kept:
                self._start_timer()

    def _start_timer(self) -> None:
        self._timer = threading.Timer(self.KEPT, self._look)
        self._timer.daemon = True
        self._timer.start()

    def _look(self) -> None:
        """End clusters that were not used for a while."""
        with self._lock:
            self._timer = None
            self._end(lambda kept: time.monotonic() - kept.idle_since > self.KEPT / 2)
            if self._kept:
                self._start_timer()

    def close(self) -> None:
        """End clusters that nobody uses now."""
        with self._lock:
            timer = self._timer
            self._timer = None
            self._end(lambda kept: True)
        if timer is not None:
            timer.cancel()
            timer.join()

    def _end(self, which: Callable[[_KeptCluster], bool]) -> None:
        idle = [kept for kept in self._kept if not kept.users and which(kept)]
        self._kept = [kept for kept in self._kept if kept not in idle]
        for kept in idle:
            kept.cluster.close(terminate=True)

    def cpus_of(self, options: dict) -> int:
        """CPUs that calls with these options would have. Nodes are asked for that and not used; the
        answer is remembered."""
        nodes = options.get('nodes')
        if nodes == LOCAL:
            return available_cpus()
        if nodes is None:
            if discovery_reach() == 'off':
                return available_cpus()
        with self._lock:
            found = self._find(options)
        if found is not None:
            rows = core_of(found.cluster).nodes.rows()
            ready = sum(min(row.cpus, row.offered) for row in rows if row.state == 'ready')
            if ready:
                return ready
        now = time.monotonic()
        with self._lock:
            known = [cpus for asked, when, cpus in self._asked
                     if asked == nodes and now - when < self.KEPT]
        if known:
            return known[0]
        cpus = self._ask(nodes, options) or available_cpus()
        with self._lock:
            chosen_rows = []
            for row in self._asked:
                if row[0] != nodes:
                    chosen_rows.append(row)
            self._asked = chosen_rows + [(nodes, now, cpus)]
        return cpus

    @staticmethod
    def _ask(nodes: Any, options: dict) -> int:
        """Return the number of CPUs of nodes that answer, without the program's own node."""
        access = {}
        for name in ('secret', 'certfile', 'keyfile', 'cafile'):
            if name in options:
                access[name] = options[name]
        port = options.get('dispy_port') or NODE_PORT
        with NodeScan(nodes, port, **access) as survey:
            found = survey.look(listen=PROBE_TIME)
        cpus = []
        for node in found:
            if node.state == 'connected':
                cpus.append(node.cpus)
        return sum(cpus)

    def after_fork(self) -> None:
        """Forget the clusters and the timer in a forked child: they are the parent's."""
        self.__init__()  # type: ignore[misc]


joblib_clusters = JoblibClusters()
# What Parallel gives to all backends, and what is of joblib's own
_OF_JOBLIB = frozenset(('max_nbytes', 'temp_folder', 'mmap_mode', 'prefer', 'require', 'verbose',
                        'context', 'idle_worker_timeout'))
JOBLIB_START = 30.0    # s that a call of joblib waits for its first node
# Variables that say how many threads numerical libraries use
THREAD_VARIABLES = (
    'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS', 'BLIS_NUM_THREADS',
    'VECLIB_MAXIMUM_THREADS', 'NUMBA_NUM_THREADS', 'NUMEXPR_NUM_THREADS')


class JoblibRun:
    """What a backend of joblib does with its batches: each is a job, and no more of them are under
    way than there shall be. Any thread."""

    def __init__(self, options: dict) -> None:
        """Keep the options of the backend."""
        self.options = options
        self._lock = threading.Lock()    # guards those below
        self._cluster: Optional[JobCluster] = None
        self._most = sys.maxsize         # jobs under way
        self._calls: Set[JoblibCall] = set()
        self._waiting: Deque[Tuple[JoblibCall, Callable[..., Any]]] = collections.deque()

    def _make(self) -> JobCluster:
        options = dict(self.options)
        initializer = options.pop('initializer')
        initargs = options.pop('initargs')
        threads = options.pop('inner_max_num_threads', None)
        if threads is not None:
            variables = dict.fromkeys(THREAD_VARIABLES, str(threads))
            options['setup'] = functools.partial(set_numerical_threads, variables)
        digits = os.urandom(8).hex()
        start = functools.partial(run_batch, digits, initializer, tuple(initargs))
        # What people are told of it
        start.__name__ = 'calls of joblib'  # type: ignore[attr-defined]
        if 'scheduler_host' in options:
            kind: Any = SharedJobCluster
        else:
            kind = JobCluster
        cluster = kind(start, job_status=lambda job: job.id.settle(job), **options)
        try:
            cluster.wait_nodes(1, timeout=JOBLIB_START)
        except BaseException:
            cluster.close(terminate=True)
            raise
        return cluster

    def cpus(self) -> int:
        """Return the number of CPUs that calls would have."""
        return joblib_clusters.cpus_of(self.options)

    def begin(self, n_jobs: int) -> None:
        """Prepare for calls, `n_jobs` of which may be under way. Raises what making a cluster
        raises."""
        cluster = joblib_clusters.take(self, self.options, self._make)
        nodes = core_of(cluster).nodes
        cpus = 0
        for row in nodes.rows():
            # As many processes as are asked for
            if row.key == LOCAL:
                if n_jobs > row.offered:
                    nodes.ask('set_cpus', row.key, n_jobs)
            cpus += row.cpus
        with self._lock:
            self._cluster = cluster
            if n_jobs < cpus:
                self._most = n_jobs
            else:
                self._most = sys.maxsize

    def end(self) -> None:
        """Note that no more calls come for now."""
        joblib_clusters.release(self)

    def submit(self, call: JoblibCall, function: Callable[..., Any]) -> JoblibCall:
        """Submit a batch, or queue it while as many as allowed are under way."""
        with self._lock:
            wait = len(self._calls) >= self._most
            if wait:
                self._waiting.append((call, function))
            else:
                self._calls.add(call)
        if not wait:
            self._send(call, function)
        return call

    def _send(self, call: JoblibCall, function: Callable[..., Any]) -> None:
        try:
            call.job = self._cluster.submit_job_id(call, function)  # type: ignore[union-attr]
        except Exception as exc:
            # Of the user's objects, which cannot be pickled; or the cluster has been closed
            error: Exception = exc
            core = core_of(self._cluster)
            if not core.closed:
                if not core.driver.broken:
                    error = pickle.PicklingError('a call cannot be pickled: %s' % exc)
                    error.__cause__ = exc
            call.fail(error)

    def ended(self, call: JoblibCall) -> None:
        """Note that a batch has ended, and submit the next one that waits."""
        following = None
        with self._lock:
            self._calls.discard(call)
            if self._waiting and len(self._calls) < self._most:
                following = self._waiting.popleft()
                self._calls.add(following[0])
        if following is not None:
            self._send(*following)

    def abort(self) -> None:
        """End the batches of calls that joblib has given up."""
        with self._lock:
            self._waiting = collections.deque(
                row for row in self._waiting if not getattr(row[0].parallel, '_aborting', True))
            unwanted = []
            for call in self._calls:
                if getattr(call.parallel, '_aborting', True):
                    unwanted.append(call.job)
        for job in unwanted:
            if job is None:
                continue
            if job.status not in ENDED:
                # The cluster has ended, and its jobs with it
                with contextlib.suppress(RuntimeError):
                    self._cluster.cancel(job)  # type: ignore[union-attr]


def _above_joblib(backend: Any) -> str:
    """Below what a call stands that is to use this backend, if that has taken the CPUs already: as
    with joblib's own backends."""
    process = sys.modules.get('multiprocessing.process')
    if process is not None:
        if process.current_process().daemon:
            return 'multiprocessing'
    if backend.in_main_thread():
        return ''
    if backend.nesting_level == 0:
        return ''
    return 'threads'


def joblib_backend(parallel: Any) -> Any:
    """Return the class of the backend, made from what the module joblib.parallel has."""
    class DispyBackend(  # type: ignore[misc, name-defined]
            parallel.AutoBatchingMixin, parallel.ParallelBackendBase):
        """joblib's calls as jobs; see joblib's documentation of ParallelBackendBase."""
        supports_retrieve_callback = supports_timeout = supports_inner_max_num_threads = True
        default_n_jobs = -1

        def __init__(self,
                     nesting_level: Optional[int] = None,
                     inner_max_num_threads: Optional[int] = None,
                     initializer: Optional[Callable[..., Any]] = None,
                     initargs: tuple = (),
                     **options: Any) -> None:
            super().__init__(nesting_level=nesting_level,
                             inner_max_num_threads=inner_max_num_threads)
            self._options = dict(options, initializer=initializer, initargs=tuple(initargs))
            self._run: Optional[JoblibRun] = None

        def _get_run(self) -> JoblibRun:
            if self.inner_max_num_threads is not None:   # joblib may set it after the constructor
                self._options['inner_max_num_threads'] = self.inner_max_num_threads
            if self._run is None or self._run.options != self._options:
                self._run = JoblibRun(dict(self._options))
            return self._run

        def effective_n_jobs(self, n_jobs: Optional[int]) -> int:
            """How many calls at once n_jobs stands for: negative numbers count from the CPUs of all
            nodes downwards, -1 is all."""
            if n_jobs == 0:
                raise ValueError('n_jobs == 0 in Parallel has no meaning')
            # A job has one CPU
            if n_jobs is None:
                return 1
            if dispynode.modules is not None:
                return 1
            above = _above_joblib(self)
            if above:
                if n_jobs != 1:
                    warnings.warn(
                        'dispy-backed parallel loops cannot be nested below %s: they run with '
                        'n_jobs=1'
                        % above,
                        stacklevel=3)
                return 1
            if n_jobs < 0:
                cpus = self._get_run().cpus()
                return max(1, cpus + 1 + n_jobs)
            return n_jobs

        def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
            """Begin, and wait for a node. Keywords of Parallel come here, too."""
            self._options.update(
                (name, value) for name, value in options.items() if name not in _OF_JOBLIB)
            count = self.effective_n_jobs(n_jobs)
            if count == 1:
                raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
            self.parallel = parallel
            self._get_run().begin(count)
            return count

        def submit(self,
                   func: Callable[..., Any],
                   callback: Optional[Callable[..., Any]] = None) -> JoblibCall:
            """Submit one batch of calls."""
            run = self._get_run()
            return run.submit(JoblibCall(run, callback), func)

        apply_async = submit   # its name before joblib 1.4

        def retrieve_result_callback(self, out: JoblibCall) -> Any:
            """Return what a batch returned. Raises what it raised."""
            return out.result()

        def terminate(self) -> None:
            """The end of a call. The cluster is kept for the next one."""
            if self._run is not None:
                self._run.end()
            self.reset_batch_stats()

        def abort_everything(self, ensure_ready: bool = True) -> None:
            """End the calls that are left: one has raised, and they are not wanted any more."""
            if self._run is not None:
                self._run.abort()
    SequentialBackend = parallel.SequentialBackend
    FallbackToBackend = parallel.FallbackToBackend
    return DispyBackend


def register_joblib() -> None:
    """Make `with joblib.parallel_config(backend='dispy', nodes=...)` work; keywords are those of
    JobCluster, with scheduler_host those of SharedJobCluster, and initializer, initargs and
    inner_max_num_threads. Done by itself where joblib is imported, before dispy or after it.
    Raises ImportError without joblib."""
    import joblib
    offer_to_joblib(joblib_backend)
    assert 'dispy' in joblib.parallel.BACKENDS   # ours


class _WhenJoblibComes:
    """Registers the backend when joblib is imported: the first finder in sys.meta_path, until
    then."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the spec of joblib.parallel, found by the other finders; nothing else is found
        here."""
        if name != 'joblib.parallel':
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None:
            loader: Any = spec.loader
        else:
            loader = None
        if loader is not None:
            load = loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                offer_to_joblib(joblib_backend)
            loader.exec_module = exec_module
        return spec


if 'joblib.parallel' in sys.modules:
    offer_to_joblib(joblib_backend)
else:
    sys.meta_path.insert(0, _WhenJoblibComes())  # type: ignore[arg-type]


@atexit.register
def _at_exit() -> None:
    """The program ends with clusters open: end what is left, and say so. After an exception that
    nobody caught, what runs on nodes goes on to its end."""
    _wait_for_executors()
    clusters = list(_clusters)
    staying: List[ProgramCluster] = []
    if _ended_by_error():
        staying = [core for core in map(core_of, clusters) if _may_stay(core)]
    for cluster in clusters:
        core = core_of(cluster)
        pending = core.book.pending
        if core in staying:
            continue
        if pending and core.journal is not None:
            logger.warning(
                '%s: the program ends with %d jobs that have not ended; dispy.recover_jobs(%r) '
                'collects them',
                core.name, pending, core.journal.path)
            continue
        if pending:
            logger.warning(
                '%s: the program ends with %s that %s not ended; %s cancelled (cluster.wait() '
                'waits for all jobs)',
                core.name, many(pending, 'job'),
                *(('has', 'it is') if pending == 1 else ('have', 'they are')))
        cluster.close(terminate=True)
    if staying:
        _stay_behind(staying)


def _may_stay(core: ProgramCluster) -> bool:
    """Whether a cluster has something on nodes that can be collected after the end of this
    program."""
    if core.trail is None:
        return False
    if not core.trail.path:
        return False
    if core.closed:
        return False
    try:
        return bool(core.driver.ask(core.left_behind))
    except Exception as exc:  # of the driver, which has failed or does not answer
        logger.debug('%s: %s', core.name, exc)
        return False


def _stay_behind(cores: List[ProgramCluster]) -> None:
    """Let go of nodes without a message, so that they go on, and log what becomes of the jobs."""
    until = time.monotonic() + LEAVE_TIME
    owed_lengths = [len(core.book.owed) for core in cores]
    owed = sum(owed_lengths)
    for core in cores:
        # Its driver has failed
        with contextlib.suppress(RuntimeError, concurrent.futures.TimeoutError):
            if core.remote:
                _cancel_at_scheduler(core, until)
    for driver in {core.driver for core in cores}:
        with contextlib.suppress(RuntimeError, concurrent.futures.TimeoutError):   # as above
            while not driver.ask(driver.queries.stop_if_settled):
                if time.monotonic() >= until:
                    driver.ask(driver.stop)
                    break
                time.sleep(0.01)
            driver.thread.join(CALL_TIME)
    nodes: Dict[Any, int] = collections.Counter()
    for core in cores:
        nodes.update(core.left_behind())
    trails = [core.trail for core in cores if core.trail is not None]
    jobs_left = _jobs_left(nodes, owed)
    logger.warning('the program ends by an error, and %s; %s', jobs_left, _how_to_collect(trails))


def _cancel_at_scheduler(core: ProgramCluster, until: float) -> None:
    """Cancel what waits at the scheduler, which might begin before it is known that nobody waits
    for it."""
    core.cancel_waiting(False)
    while time.monotonic() < until:
        jobs = core.driver.ask(core.jobs_owed)
        if not any(job.status == DispyJob.Created for job in jobs):
            return
        time.sleep(0.01)


def _jobs_left(nodes: Dict[Any, int], owed: int) -> str:
    """Return a text which says what becomes of `owed` jobs, some of which run on these nodes."""
    running = sum(nodes.values())
    if running == 1:
        text = '1 job runs on to its end'
    else:
        text = '%d jobs run on to their end' % running
    message = ' on %s' % many(len(nodes), 'node')
    text += message
    if owed > running:
        text += '; %d others had not begun and are lost' % (owed - running)
    return text


def _how_to_collect(trails: List[ComputationNotes]) -> str:
    """Return a text which says what collects the results of jobs that run on, and what ends these
    jobs."""
    if all(trail.script for trail in trails):
        calls = ['dispy.recover_jobs()']
    else:
        calls = ['dispy.recover_jobs(%r)' % trail.path for trail in trails]
    return '%s collects the results, %s ends them' % (' and '.join(calls), CANCEL_LOST)


def _ended_by_error() -> bool:
    """Whether an exception that nobody caught ends this program: not Ctrl-C, nor sys.exit. The
    interpreter notes it in sys.last_value, as prompts, notebooks and test runners do with each
    that they have caught and shown: that is an older one, and decides nothing."""
    last_exc = getattr(sys, 'last_exc', None)
    error = last_exc or getattr(sys, 'last_value', None)
    if error is None:
        return False
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return False
    if hasattr(sys, 'ps1'):
        return False
    if sys.flags.interactive or sys.flags.inspect:
        return False
    if os.environ.get('PYTHONINSPECT'):
        return False
    if '__IPYTHON__' in vars(builtins):
        return False
    trace = error.__traceback__ or getattr(sys, 'last_traceback', None)
    if trace is None:
        return False
    # It begins with the frame that has caught the exception; if nobody has, with the first of all.
    code = trace.tb_frame.f_code
    globals_ = trace.tb_frame.f_globals
    if globals_.get('__name__') == 'runpy':   # python -m
        return code.co_name == '_run_module_as_main'
    if code.co_name != '<module>':
        return False
    module = sys.modules.get('__main__')
    return globals_ is vars(module)


# --------------------------------------------------------------------------------------------------
# The shell: commands, their arguments and what is written of them. Nothing here runs a command;
# what reads or writes a file says so
# --------------------------------------------------------------------------------------------------

EXTENSION = LazyPattern(r'\.[^/.]+\Z')


def without_extension(path: str) -> str:
    """What {.} stands for: a path without the extension of its last part."""
    return EXTENSION.sub('', path)


def last_part(path: str) -> str:
    """Return what {/} stands for."""
    return path.rpartition('/')[2]


def directory_of(path: str) -> str:
    """Return what {//} stands for."""
    return os.path.dirname(path) or '.'


def last_part_without_extension(path: str) -> str:
    """Return what {/.} stands for."""
    return without_extension(last_part(path))


# What follows the number in a replacement string -> what is made of the value
FORMS: Dict[str, Callable[[str], str]] = {
    '': str,
    '.': without_extension,
    '/': last_part,
    '//': directory_of,
    '/.': last_part_without_extension,
}
REPLACEMENT = LazyPattern(r'\{(?:(#)|(-?[1-9][0-9]*)?(\.|//|/\.|/)?)\}')


class Replacement(NamedTuple):
    """A replacement string of a template."""
    is_number: bool                 # {#}: the number of the job
    which: int                      # of the value, from 1 or from the end; 0: all values
    form: Callable[[str], str]

    @classmethod
    def parse(cls, match: Any) -> 'Replacement':
        """Of a match of REPLACEMENT."""
        number, which, form = match.groups()
        is_number = number is not None
        index = int(which or 0)
        return cls(is_number, index, FORMS[form or ''])

    def texts(self, values: Sequence[str], number: int) -> List[str]:
        """What it stands for. A value that is not there is empty."""
        if self.is_number:
            return [str(number)]
        if self.which == 0:
            return [self.form(value) for value in values]
        index = self.which
        if index > 0:
            index -= 1
        if -len(values) <= index < len(values):
            return [self.form(values[index])]
        return ['']


class Template:
    """A text with replacement strings, such as {} or {1.}. `quotes`: what they stand for is quoted
    for a shell, except at the beginning of the text, where it is the name of a program or a whole
    command line, as with GNU parallel."""

    def __init__(self, text: str, quotes: bool = False) -> None:
        self.text = text
        self._quotes = quotes
        self._pieces: List[Union[str, Replacement]] = []
        end = 0
        for match in REPLACEMENT.finditer(text):
            if match.start() > end:
                short_text = text[end:match.start()]
                self._pieces.append(short_text)
            self._pieces.append(Replacement.parse(match))
            end = match.end()
        if end < len(text):
            self._pieces.append(text[end:])
        self.replaces = any(isinstance(piece, Replacement) for piece in self._pieces)

    def expand(self, values: Sequence[str], number: int) -> str:
        """The text for a job."""
        if not self.replaces:
            return self.text
        return ''.join(self._texts(values, number))

    def _texts(self, values: Sequence[str], number: int) -> Iterator[str]:
        for index, piece in enumerate(self._pieces):
            if isinstance(piece, str):
                yield piece
                continue
            texts = piece.texts(values, number)
            if self._quotes and index:
                texts = list(map(shlex.quote, texts))
            yield ' '.join(texts)

    def words(self, values: Sequence[str], number: int) -> List[str]:
        """The words of a command for which this stands: one, or, where it is a lone {}, as many as
        there are values."""
        first, *others = self._pieces or ['']
        if isinstance(first, Replacement) and not others:
            return first.texts(values, number)
        return [self.expand(values, number)]


def _in_path(name: str) -> Optional[str]:
    """What PATH has by this name. Windows looks into the working directory before, which nodes do
    not have."""
    found = shutil.which(name)
    if found is None or os.name != 'nt':
        return found
    if os.path.samefile(os.path.dirname(found) or os.curdir, os.curdir):
        return None
    return found


class ProgramFile(NamedTuple):
    """Where the program of a command comes from."""
    word: str                   # what a node runs
    path: Optional[str] = None  # the file that travels; None: the nodes have the program
    by_python: bool = False     # a node's Python runs the file

    @classmethod
    def find(cls, word: str) -> 'ProgramFile':
        """Of the first word of a command. Looks at files. Raises FileNotFoundError, and ValueError
        for a file that cannot be run.

        A path travels, unless it is what PATH finds for its name; so does a file in the working
        directory that PATH does not find.
        """
        name = os.path.basename(word)
        installed = _in_path(name)
        if not os.path.dirname(word):
            if installed is not None or not os.path.isfile(word):
                return cls(word)
        elif not os.path.isfile(word):
            raise FileNotFoundError(
                'there is no program %s here. If the nodes have it, write `env %s`' % (word, word))
        if installed is not None:
            if os.path.samefile(installed, word):
                return cls(name)
        if is_python_script(word):
            return cls('./' + name, word, True)
        return cls('./' + name, _program_path(word))


def is_python_script(path: str) -> bool:
    """Whether a file is one that Python runs, by its name or its first line."""
    if path.endswith('.py'):
        return True
    with open(path, 'rb') as file:
        line = file.readline(200)
    if not line.startswith(b'#!'):
        return False
    return b'python' in line


# What makes one word a line for a shell
SHELL_SIGNS = LazyPattern(r'[\s|&;<>()$`\\"\'*?\[~]')
FIRST_WORD = LazyPattern(r'\s*([\w./+@%:,-]+)(?=\s|\Z)')


class Command:
    """What is run for each input: words, of which the first is a program, or one line for `sh`.
    `travels`: a program that is not installed goes to the nodes."""

    def __init__(self, words: Sequence[str], travels: bool = True) -> None:
        self.is_given = bool(words)
        self.is_line = not words
        if len(words) == 1:
            self.is_line = self._is_line(words[0])
        self.program = ProgramFile('')
        texts = list(words) or ['{}']
        if travels and self.is_line:
            self._find_program_of_line(texts)
        elif travels:
            self._find_program(texts)
        if not any(REPLACEMENT.search(text) for text in texts):
            if self.is_line:
                texts[0] += ' {}'
            else:
                texts.append('{}')
        self._templates = [Template(text, self.is_line) for text in texts]

    @staticmethod
    def _is_line(word: str) -> bool:
        if os.path.isfile(word):
            return False
        if REPLACEMENT.match(word):
            return True
        return SHELL_SIGNS.search(word) is not None

    def _find_program(self, texts: List[str]) -> None:
        if re.search(r'\s', texts[0]):
            if not os.path.isfile(texts[0]):
                raise ValueError('there is no program %r. A line for sh stands alone in one quoted '
                                 'word, and options stand before the command' % texts[0])
        if REPLACEMENT.search(texts[0]):
            return
        self.program = ProgramFile.find(texts[0])
        texts[0] = self.program.word

    def _find_program_of_line(self, texts: List[str]) -> None:
        """A line may begin with anything; what is no program here is left to the shell there."""
        match = FIRST_WORD.match(texts[0])
        if match is None:
            return
        with contextlib.suppress(FileNotFoundError, ValueError):
            program = ProgramFile.find(match.group(1))
            if program.path is not None:
                self.program = program
                rest = texts[0][match.end():]
                texts[0] = self._word_of_line() + rest

    def _word_of_line(self) -> str:
        if self.program.by_python:
            return '"$DISPY_PYTHON" ' + self.program.word
        return self.program.word

    def words(self, values: Sequence[str], number: int) -> List[str]:
        """What a node runs, as CommandLines takes it."""
        if self.is_line:
            expand = self._templates[0].expand(values, number)
            return ['sh', '-c', expand]
        words = self._words(values, number)
        if self.program.by_python:
            words.insert(0, RUN_BY_PYTHON)
        return words

    def _words(self, values: Sequence[str], number: int) -> List[str]:
        words: List[str] = []
        for template in self._templates:
            words += template.words(values, number)
        return words

    def text(self, values: Sequence[str], number: int) -> str:
        """The command of a job as people read it, and as a shell would take it."""
        if self.is_line:
            return self._templates[0].expand(values, number)
        return ' '.join(map(shlex.quote, self._words(values, number)))

    @property
    def name(self) -> str:
        """Of the computation, for people."""
        words = self._templates[0].text.split(None, 1)
        if not words:
            return 'commands'
        name = os.path.basename(words[0])
        return name[:60] or 'commands'


# -- arguments -------------------------------------------------------------------------------------

Values = Tuple[str, ...]    # what the replacement strings of one job stand for
RECORDS_READ = 1 << 16      # bytes read at once


def records(read: Callable[[int], bytes], delimiter: bytes) -> Iterator[str]:
    """Records that are ended by a delimiter, each as soon as it has come, and as it is."""
    rest = b''
    while True:
        data = read(RECORDS_READ)
        if not data:
            break
        *whole, rest = (rest + data).split(delimiter)
        yield from map(os.fsdecode, whole)
    if rest:
        yield os.fsdecode(rest)


def records_of(path: str, delimiter: bytes) -> Iterator[str]:
    """Records of a file, or of standard input ('-'), which is read without Python's buffer: a
    thread that waits in it holds a lock without which the interpreter cannot end."""
    if path == '-':
        yield from records(functools.partial(os.read, 0), delimiter)
        return
    with open(path, 'rb', buffering=0) as file:
        yield from records(file.read, delimiter)  # type: ignore[arg-type]


def split_as_shell(line: str) -> Union[Values, ValueError]:
    """The words of a line of --args-file; what is wrong with one that cannot be split."""
    try:
        return tuple(shlex.split(line))
    except ValueError as exc:
        return ValueError('the line %.80r cannot be split as a shell does: %s' % (line, exc))


def linked(sources: Sequence[Iterable[str]]) -> Iterator[Values]:
    """One value of each source, as long as all have one."""
    return zip(*sources)


def combinations(groups: Sequence[Sequence[Iterable[str]]]) -> Iterator[Values]:
    """Each combination of the values of groups; the sources of a group are linked. The first group
    is read as it comes."""
    first, *others = groups
    rest = []
    for group in others:
        rest.append(list(linked(group)))
    for head in linked(first):
        for tails in itertools.product(*rest):
            yield tuple(itertools.chain(head, *tails))


def in_columns(values: Values, separator: Any) -> Values:
    """The columns of all values, without the space around them."""
    columns: List[str] = []
    for value in values:
        columns += separator.split(value)
    return tuple(column.strip() for column in columns)


SOURCE_MARKS = (':::', '::::', ':::+', '::::+')


def split_sources(words: Sequence[str]) -> Tuple[List[str], List[Tuple[str, List[str]]]]:
    """The words of a command, and what follows each of the marks behind it."""
    command: List[str] = []
    groups: List[Tuple[str, List[str]]] = []
    here = command
    for word in words:
        if word in SOURCE_MARKS:
            here = []
            groups.append((word, here))
        else:
            here.append(word)
    return command, groups


class Inputs:
    """The arguments of the jobs, read as they are wanted. Iterating yields, for each job, its
    values, or a ValueError for a line that has none."""

    def __init__(self, args: argparse.Namespace, marked: Sequence[Tuple[str, List[str]]]) -> None:
        self._own = list(map(split_as_shell, args.args))
        self._file = args.args_file
        if self._file:
            self._check(self._file)
        self._delimiter = b'\0' if args.null else args.delimiter
        self._skips_empty = args.no_run_if_empty
        self._columns = args.colsep
        self._groups: List[List[Any]] = [[self._records(path)] for path in args.arg_file]
        for mark, words in marked:
            self._add(mark, words)
        if self.is_old and self._groups:
            message = ('-a and --args-file have the arguments of whole jobs: they do not go '
                       'together with %s' % ', '.join((*SOURCE_MARKS, '--arg-file')))
            raise ValueError(message)
        # Whether standard input is where the arguments come from, for want of anything else
        self.is_stdin = not self.is_old and not self._groups
        if self.is_stdin:
            self._groups.append([self._records('-')])

    @property
    def is_old(self) -> bool:
        """Whether whole argument lists are given, each split as a shell does."""
        return bool(self._own or self._file)

    def _records(self, path: str) -> Iterator[str]:
        self._check(path)
        return records_of(path, self._delimiter)

    @staticmethod
    def _check(path: str) -> None:
        """One that cannot be read is told before anything runs. A pipe can be opened only once."""
        is_pipe = os.path.exists(path) and not os.path.isfile(path)
        if path != '-' and not is_pipe:
            open(path, 'rb').close()

    def _add(self, mark: str, words: List[str]) -> None:
        """What follows a mark: values, or files of values."""
        if mark.startswith('::::'):
            sources = list(map(self._records, words))
        else:
            sources = [iter(words)]
        if not mark.endswith('+'):
            self._groups += ([source] for source in sources)
        elif self._groups:
            self._groups[-1] += sources
        else:
            raise ValueError('%s is linked to the source before it, and there is none' % mark)

    def __iter__(self) -> Iterator[Union[Values, ValueError]]:
        if not self.is_old:
            yield from self._combined()
            return
        yield from self._own
        if self._file:
            for line in records_of(self._file, b'\n'):
                if line.strip():
                    yield split_as_shell(line)

    def _combined(self) -> Iterator[Values]:
        for values in combinations(self._groups):
            if self._skips_empty and not any(map(str.strip, values)):
                continue
            if self._columns is None:
                yield values
            else:
                yield in_columns(values, self._columns)


# -- when to stop ----------------------------------------------------------------------------------

HALT_TEXT = LazyPattern(r'(now|soon),(fail|success|done)=([0-9]+)(%?)\Z')
OLD_HALTS = {'0': 'never', '1': 'soon,fail=1', '2': 'now,fail=1', '-1': 'soon,success=1',
             '-2': 'now,success=1'}


class HaltRule(NamedTuple):
    """When no more jobs are started."""
    is_now: bool        # those that run are cancelled
    why: str            # what is counted: 'fail', 'success' or 'done'
    limit: int
    is_percent: bool    # of all jobs

    @classmethod
    def parse(cls, text: str) -> Optional['HaltRule']:
        """A rule as GNU parallel has it; None for 'never'. Raises ArgumentTypeError."""
        text = OLD_HALTS.get(text, text)
        if text == 'never':
            return None
        if re.match(r'[0-9]+%\Z', text):
            text = 'soon,fail=' + text
        match = HALT_TEXT.match(text)
        if match is None or int(match.group(3)) < 1:
            raise argparse.ArgumentTypeError(
                '%r is not a rule such as never, soon,fail=1, now,fail=10%% or '
                'now,success=1' % text)
        when, why, limit, percent = match.groups()
        return cls(when == 'now', why, int(limit), bool(percent))

    def __str__(self) -> str:
        when = 'now' if self.is_now else 'soon'
        return '%s,%s=%d%s' % (when, self.why, self.limit, '%' * self.is_percent)

    def is_reached(self, done: int, failed: int, total: int) -> bool:
        """Whether to stop, after so many jobs of all."""
        success = done - failed
        counts = {'fail': failed, 'success': success, 'done': done}
        counted = counts[self.why]
        if self.is_percent:
            return counted * 100 >= self.limit * total
        return counted >= self.limit

    def exit_status(self, last: int, failed: int, total: int) -> int:
        """When it has been reached; `last`: exit status of the job that did that."""
        if self.why == 'success':
            return 0
        if self.is_percent:
            return -(-100 * failed // total)
        if self.limit == 1:
            return last
        return min(failed, FAILED_MOST)


# -- what is written of jobs -----------------------------------------------------------------------

FAILED_MOST = 101        # the exit status for more failed jobs than 100
EXIT_USAGE = 255         # wrong usage, or no node
NO_STATUS = -1           # in the log: the job has no exit status


class Ended(NamedTuple):
    """A job that has ended, as the shell speaks of it."""
    number: int
    values: Values
    command: str
    node: str = ''           # the name of the node, if that is known
    address: str = ''
    start: float = 0.0       # s since the epoch
    seconds: float = 0.0     # how long it ran
    sent: int = 0            # bytes of its files
    status: int = 0          # exit status, or NO_STATUS
    signal: int = 0          # that has ended it
    reason: str = ''         # why it has failed; empty if it has not
    stdout: bytes = b''
    stderr: bytes = b''

    @property
    def shell_status(self) -> int:
        """What a shell would call its exit status."""
        if self.signal:
            return 128 + self.signal
        return self.status & 255

    @property
    def tag(self) -> str:
        """Its arguments in one text."""
        return ' '.join(self.values)

    def message(self) -> str:
        """A line on its failure."""
        if self.values:
            about = ' (%s)' % shown(self.tag)
        else:
            about = ''
        if self.node:
            where = ' on ' + self.node
        else:
            where = ''
        return 'job %d%s failed%s: %s' % (self.number, about, where, self.reason)


def shown(text: str) -> str:
    """Arguments in a message: one line, not too long for it."""
    text = ' '.join(text.split())
    if len(text) > 100:
        return text[:97] + '...'
    return text


def open_table(path: str, appends: bool, columns: Sequence[str]) -> Any:
    """A file of lines with columns, of which each is written as soon as it is there; new, or one
    that is added to."""
    if appends:
        mode = 'a'
    else:
        mode = 'w'
    file = open(path, mode, 1, encoding='utf-8', errors='surrogateescape')
    if file.tell() == 0:
        write_row(file, columns)
    return file


def write_row(file: Any, columns: Iterable[Any]) -> None:
    """Add a line to a table. What is empty is a dash."""
    words = []
    for column in columns:
        word = JobLog.one_line(str(column)) or '-'
        words.append(word)
    file.write('\t'.join(words) + '\n')


class JobLog:
    """--joblog: a line for each job that has ended, in GNU parallel's columns, and the node's name
    behind them. Appends to a file, or writes a new one."""
    COLUMNS = ('Seq', 'Host', 'Starttime', 'JobRuntime', 'Send', 'Receive', 'Exitval', 'Signal',
               'Command', 'Node')
    ROW = LazyPattern(r'(\d+)\t(?:[^\t]*\t){5}(-?\d+)\t(\d+)\t([^\t\n]*)')

    def __init__(self, path: str, appends: bool) -> None:
        self._file = open_table(path, appends, self.COLUMNS)

    def write(self, ended: Ended) -> None:
        """Add a job."""
        printed = len(ended.stdout) + len(ended.stderr)
        begin = '%.3f' % ended.start
        seconds = '%10.3f' % ended.seconds
        command = self.one_line(ended.command)
        columns = [ended.number, ended.address, begin, seconds, ended.sent, printed, ended.status,
                   ended.signal, command, ended.node]
        write_row(self._file, columns)

    def close(self) -> None:
        """All is in the file."""
        self._file.close()

    @staticmethod
    def one_line(command: str) -> str:
        """A command without what separates columns and lines."""
        return re.sub(r'[\t\r\n]', ' ', command)

    @classmethod
    def read(cls, path: str) -> Dict[int, Tuple[bool, str]]:
        """Number -> whether the job has gone well, and its command; of the last line on each job.
        Reads the file; one that is not there is empty."""
        found: Dict[int, Tuple[bool, str]] = {}
        with contextlib.suppress(FileNotFoundError):
            with open(path, encoding='utf-8', errors='surrogateescape') as file:
                for row in filter(None, map(cls.ROW.match, file)):
                    number, status, by_signal, command = row.groups()
                    is_well = not int(status) and not int(by_signal)
                    found[int(number)] = is_well, command
        return found


class Resume:
    """Which jobs an earlier run has done, by its log."""

    def __init__(self, path: str, again: bool) -> None:
        self._path = path
        self._again = again                # those that failed
        self._known = JobLog.read(path)
        self.changed = ''                  # what is to be said of a log that does not fit

    def skips(self, number: int, command: str) -> bool:
        """Whether a job is not run. Notes the first whose command is another now."""
        if number not in self._known:
            return False
        is_well, known = self._known[number]
        one_line = JobLog.one_line(command)
        if known != one_line:
            if not self.changed:
                self.changed = ('job %d is now `%s`, and was `%s` when %s was written. Jobs are '
                                'known by their numbers alone: --resume needs the same command '
                                'and the same arguments in the same order' %
                                (number, shown(command), shown(known), self._path))
        return is_well or not self._again


def write_file(path: str, data: bytes) -> None:
    """A file with this content."""
    with open(path, 'wb') as file:
        file.write(data)


ESCAPES = {'\\': '\\\\', '/': '\\_', '\t': '\\t', '\n': '\\n', '\0': '\\0'}
NAME_LONGEST = 200        # bytes of a file's name; file systems take 255


def as_file_name(value: str) -> str:
    """An argument as the name of a directory, as GNU parallel writes it."""
    signs = []
    for sign in value:
        signs.append(ESCAPES.get(sign, sign))
    name = ''.join(signs)
    if name in ('', '.', '..'):
        name = '\\' + name   # no argument gives this otherwise
    data = os.fsencode(name)
    if len(data) > NAME_LONGEST:
        digest_text = hashlib.sha256(data).hexdigest()
        digest = digest_text[:16]
        begin = os.fsdecode(data[:NAME_LONGEST - 20])
        name = '%s~%s' % (begin, digest)
    return name


def results_path(values: Values) -> str:
    """Below --results, the directory for a job with these arguments."""
    parts: List[str] = []
    for number, value in enumerate(values, 1):
        parts += [str(number), as_file_name(value)]
    return os.path.join('', *parts)


class ResultFiles:
    """--results: the output of each job in a directory by its arguments, and a table."""
    TABLE = 'jobs.tsv'
    COLUMNS = ('Seq', 'Arguments', 'Node', 'Status', 'Directory')

    def __init__(self, root: str, appends: bool) -> None:
        self._root = root
        self._used: Set[str] = set()
        os.makedirs(root, exist_ok=True)
        path = os.path.join(root, self.TABLE)
        self._table = open_table(path, appends, self.COLUMNS)

    def write(self, ended: Ended) -> None:
        """Write the files of a job. Raises OSError."""
        name = self._free_name(ended)
        directory = os.path.join(self._root, name)
        os.makedirs(directory, exist_ok=True)
        stdout_path = os.path.join(directory, 'stdout')
        write_file(stdout_path, ended.stdout)
        stderr_path = os.path.join(directory, 'stderr')
        write_file(stderr_path, ended.stderr)
        path = os.path.join(directory, 'seq')
        write_file(path, b'%d' % ended.number)
        reason = ended.reason or 'ok'
        columns = [ended.number, ended.tag, ended.node, reason, name]
        write_row(self._table, columns)

    def _free_name(self, ended: Ended) -> str:
        """Jobs with the same arguments have a directory each."""
        name = results_path(ended.values)
        if not name or name in self._used:
            name = '%s~%d' % (name, ended.number)
        self._used.add(name)
        return name

    def close(self) -> None:
        """All is in the files."""
        self._table.close()


class NumberedFiles:
    """--output: the output of each job in two files by its number."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, exist_ok=True)

    def write(self, ended: Ended) -> None:
        """Write the files of a job. Raises OSError."""
        name = '%d' % ended.number
        path = os.path.join(self._directory, name)
        write_file(path + '.out', ended.stdout)
        write_file(path + '.err', ended.stderr)

    def close(self) -> None:
        """Each file has been closed."""


LINES = LazyPattern(rb'[^\n]*\n|[^\n]+')


def tagged(data: bytes, tag: str) -> bytes:
    """Lines with the arguments of their job before each."""
    prefix = os.fsencode(tag) + b'\t'
    lines = LINES.findall(data)
    return b''.join(prefix + line for line in lines)


class ShownOutput:
    """--line-buffer: how much of the output of jobs that run has been shown."""

    def __init__(self) -> None:
        self._held: Dict[Tuple[int, str], bytearray] = {}   # not shown yet
        self._shown: Dict[Tuple[int, str], int] = {}        # bytes

    def add(self, number: int, stream: str, data: bytes) -> None:
        """A job has printed this."""
        self._held.setdefault((number, stream), bytearray()).extend(data)

    def take(self, number: int, stream: str) -> bytes:
        """The whole lines that are to be shown now."""
        held = self._held.get((number, stream), bytearray())
        end = held.rfind(b'\n') + 1
        data = bytes(held[:end])
        del held[:end]
        before = self._shown.get((number, stream), 0)
        self._shown[number, stream] = before + end
        return data

    def rest(self, number: int, stream: str, whole: bytes) -> bytes:
        """What has not been shown of the output of a job that has ended."""
        self._held.pop((number, stream), None)
        return whole[self._shown.pop((number, stream), 0):]


# -- hosts -----------------------------------------------------------------------------------------

HOST_WITH_CPUS = LazyPattern(r'(?:([0-9]+)/)?((?:ssh://)?[^/]+)\Z')


def cpus_and_host(word: str) -> Tuple[int, str]:
    """'4/host': at most 4 CPUs of a host; without a number 0, which means all."""
    match = HOST_WITH_CPUS.match(word)
    if match is None:
        raise ValueError('%r is not HOST, HOST:PORT or either with CPUS/ before it' % word)
    cpus, host = match.groups()
    return int(cpus or 0), host


def hosts_in(path: str) -> List[str]:
    """The hosts of a file for --hosts, as written there. Reads the file."""
    words: List[str] = []
    with open(path) as file:
        for line in file:
            parts = line.partition('#')[0].split()
            words += parts
    return words


def as_node(word: str) -> Any:
    """An element of `nodes` for a host as -n and --hosts have it. What is for ssh alone, a user and
    ssh's port, is left out."""
    cpus, host = cpus_and_host(word)
    if host.startswith('ssh://'):
        host = host[len('ssh://'):]
        host = host.rpartition(':')[0] or host
    host = host.rpartition('@')[2]
    name, port = host_and_port(host, NODE_PORT)
    if cpus:
        return name, port, cpus
    return name, port


# --------------------------------------------------------------------------------------------------
# The shell: options
# --------------------------------------------------------------------------------------------------

UNITS = {'s': 1.0, 'm': 60.0, 'h': 3600.0, 'd': 86400.0}
DURATION = LazyPattern(r'(?:\d+(?:\.\d+)?[smhd])*(?:\d*\.?\d+)?\Z')
DURATION_PART = LazyPattern(r'(\d*\.?\d+)([smhd]?)')


def duration_option(text: str) -> float:
    """Seconds, or such as 1m30s or 2h."""
    if not text or DURATION.match(text) is None:
        raise argparse.ArgumentTypeError('%r is not a time such as 10, 1.5, 90s or 1h30m' % text)
    seconds = 0.0
    for number, unit in DURATION_PART.findall(text):
        factor = UNITS[unit or 's']
        seconds += float(number) * factor
    return seconds


def count_option(text: str) -> int:
    """Read a whole number that is at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError('%r is not a whole number above 0' % text)
    return int(text)


def resource_option(text: str) -> Tuple[str, int]:
    """Read NAME=N."""
    name, _, count = text.partition('=')
    try:
        request = request_of('--resource', {name: int(count)})
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError('%r is not NAME=N, such as gpu=1' % text) from None
    return request[0] if request else (name, 0)


def slots_option(text: str) -> int:
    """How many jobs at once; 0: as many as the nodes have CPUs."""
    if text in ('0', '100%'):
        return 0
    return count_option(text)


def delimiter_option(text: str) -> bytes:
    """What ends a record, with escapes such as \\n, \\0 and \\x1f."""
    try:
        decoded = os.fsencode(text).decode('unicode_escape')
        data = decoded.encode('latin-1')
    except UnicodeError:
        data = os.fsencode(text)   # no escapes, but signs beyond Latin-1
    if not data:
        raise argparse.ArgumentTypeError('it is empty; -0 has records that end with NUL')
    return data


def pattern_option(text: str) -> Any:
    """Read a regular expression."""
    try:
        return re.compile(text)
    except re.error as exc:
        message = '%r is not a regular expression: %s' % (text, exc)
        raise argparse.ArgumentTypeError(message) from None


class OptionParser(argparse.ArgumentParser):
    """Options that end where a command begins, as of `env` and GNU parallel: what follows the first
    word that is no option is not looked at. Values may begin with a dash. Wrong usage ends the
    program with the exit status 255."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end."""
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, '%s: error: %s\n' % (self.prog, message))

    def split(self, argv: Sequence[str]) -> Tuple[List[str], List[str]]:
        """Options, each in one word, and what follows them."""
        left = collections.deque(argv)
        options: List[str] = []
        while left and left[0][:1] == '-' and left[0] != '-':
            word = left.popleft()
            if word == '--':
                break
            if word.startswith('--'):
                options.append(self._long(word, left))
            else:
                options += self._short(word, left)
        return options, list(left)

    def _long(self, word: str, left: Deque[str]) -> str:
        """An option with its value behind a sign, which may be the next word."""
        name, sign, value = word.partition('=')
        name = self._whole_name(name)
        if self._option_string_actions[name].nargs == 0:
            return name + sign + value
        if not sign:
            value = self._next(name, left)
        return '%s=%s' % (name, value)

    def _whole_name(self, name: str) -> str:
        """An option from its beginning, or in dispy 4's spelling with underscores."""
        known = self._option_string_actions
        name = name.replace('_', '-')
        if name in known:
            return name
        found = []
        for other in known:
            if other.startswith(name):
                found.append(other)
        actions = set()
        for other in found:
            actions.add(id(known[other]))
        if len(actions) == 1:
            return found[0]
        if found:
            self.error('%s may be any of %s' % (name, ', '.join(found)))
        self.error('there is no option %s' % name)

    def _next(self, name: str, left: Deque[str]) -> str:
        if not left:
            self.error('%s needs a value' % name)
        return left.popleft()

    def _short(self, word: str, left: Deque[str]) -> Iterator[str]:
        """Options of one letter, several of which may stand in one word."""
        for index, letter in enumerate(word[1:], 2):
            action = self._option_string_actions.get('-' + letter)
            if action is None:
                self.error('there is no option -%s' % letter)
            value = word[index:]
            if letter == 'd' and not value and not self._is_delimiter(left):
                yield '--debug'   # dispy 4's meaning
            elif action.nargs == 0:
                yield '-' + letter
            else:
                value = value or self._next('-' + letter, left)
                yield '%s=%s' % (self._long_name(action), value)
                return

    @staticmethod
    def _is_delimiter(left: Deque[str]) -> bool:
        if not left:
            return False
        word = left[0]
        if len(word) == 1:
            return True
        return word.startswith('\\')

    @staticmethod
    def _long_name(action: argparse.Action) -> str:
        return next(name for name in action.option_strings if name.startswith('--'))


SHELL_HELP = '''Run a command once for each argument, on all CPUs of the nodes. The arguments follow
the command (::: a b, :::: FILE) or come from standard input, one per line. {} in the command stands
for the argument, {.} for it without extension, {/} for its last part, {//} for its directory, {/.}
for both, {1} for the first of several, {#} for the number of the job; without any of these the
argument is appended. A command in one quoted word is a line for `sh`; separate words are run
without a shell.'''
SHELL_EPILOG = '''Commands run in a directory on the node. A program whose path is given, or that is
a file in the working directory and not in PATH, travels there; any other is taken from the node's
PATH. A Python script that travels is run by the Python of the node. Other files travel by -f,
--transferfile and --return, or are reached by --workdir. The exit status is the number of jobs
that failed, 101 for more than 100, and 255 if the command line is wrong or no node can be used.
`dispy deploy HOST...` starts nodes on other hosts by ssh, `dispy stop HOST...` ends them, and
`dispy report` writes a file for a report of a fault: each has a --help of its own. A program of
such a name is run as ./deploy.'''


# Title of a group -> its options: how they are written, and what argparse is told of them
OPTIONS: Dict[str, List[Tuple[Tuple[str, ...], Dict[str, Any]]]] = {
    'instead of running a command': [
        (('--list-nodes',), {
            'action': 'store_true',
            'help': 'show the nodes (-n, --hosts; default: all that answer) and whether they can '
                    'be used; the exit status is 0 if any can'}),
        (('--cancel-lost',), {
            'action': 'store_true',
            'help': 'end what programs of yours that were killed or ended by an exception have '
                    'left on nodes; the exit status is the number of those of which something '
                    'may be left'}),
        (('--dry-run',), {
            'action': 'store_true',
            'help': 'print the command of each job'}),
        (('--version',), {
            'action': 'version', 'version': '%(prog)s ' + __version__}),
    ],
    'nodes': [
        (('-n', '--node', '--nodes'), {
            'action': Each, 'default': [], 'dest': 'nodes', 'metavar': '[CPUS/]HOST[:PORT]',
            'help': "a node, or several in quotes; may be repeated; 'local': this machine "
                    '(default: a dispynode on this machine, or one started for this run)'}),
        (('--hosts',), {
            'action': 'append', 'default': [], 'metavar': 'FILE',
            'help': 'file with a node on each line; # begins a comment; may be repeated'}),
        (('--scheduler-host', '--scheduler-node'), {
            'metavar': 'HOST[:PORT]',
            'help': 'the jobs go to this dispyscheduler; -n then says which of its nodes they '
                    'may use'}),
        (('--host', '--ip-addr'), {
            'metavar': 'ADDR',
            'help': 'also wait at this address for nodes that connect by themselves'}),
        (('--wait-nodes',), {
            'type': seconds_option, 'metavar': 'S',
            'help': 'give up if no node can be used within this many seconds (default: wait for '
                    'one)'}),
        (('--secret',), {
            'metavar': 'SECRET',
            'help': 'the secret; it can be seen in the list of processes, so better:'}),
        (('--secret-file',), {
            'metavar': 'FILE',
            'help': 'file with the secret (default: that of this user)'}),
        (('--certfile',), {
            'metavar': 'FILE',
            'help': 'certificate for TLS'}),
        (('--keyfile',), {
            'metavar': 'FILE',
            'help': "the certificate's key, if not in the same file"}),
        (('--debug',), {
            'action': 'store_true',
            'help': 'log what is done in detail'}),
    ],
    'arguments': [
        (('--arg-file',), {
            'action': 'append', 'default': [], 'metavar': 'FILE',
            'help': 'as ":::: FILE": an argument on each line; -: standard input'}),
        (('-0', '--null'), {
            'action': 'store_true',
            'help': 'arguments in files end with NUL'}),
        (('-d', '--delimiter'), {
            'type': delimiter_option, 'default': b'\n', 'metavar': 'CHARACTERS',
            'help': 'arguments in files end with these; escapes such as \\t are known. A bare -d '
                    'is --debug'}),
        (('-C', '--colsep'), {
            'type': pattern_option, 'metavar': 'REGEX',
            'help': 'split each argument into columns, which are {1}, {2} and so on'}),
        (('-r', '--no-run-if-empty'), {
            'action': 'store_true',
            'help': 'leave out empty arguments'}),
        (('-a', '--args'), {
            'action': 'append', 'default': [], 'metavar': '"ARGS"',
            'help': 'all arguments of one job, split as a shell does; may be repeated'}),
        (('--args-file',), {
            'metavar': 'FILE',
            'help': 'all arguments of a job on each line, split as a shell does; -: standard '
                    'input'}),
    ],
    'how jobs run': [
        (('-j', '--jobs', '-P', '--max-procs'), {
            'type': slots_option, 'default': 0, 'metavar': 'N',
            'help': 'run at most this many jobs at once, on all nodes together (default: one per '
                    'CPU)'}),
        (('--delay',), {
            'type': duration_option, 'default': 0.0, 'metavar': 'TIME',
            'help': 'wait this long between the starts of two jobs, such as 1m30s'}),
        (('--timeout',), {
            'type': duration_option, 'metavar': 'TIME',
            'help': 'end a job that runs for longer'}),
        (('--retries',), {
            'type': count_option, 'default': 1, 'metavar': 'N',
            'help': 'try a job that fails, or whose node is lost, this many times in all'}),
        (('--halt', '--halt-on-error'), {
            'type': HaltRule.parse, 'metavar': 'WHEN',
            'help': 'soon,fail=N: start no more jobs when N have failed; now: also cancel those '
                    'that run; N%%: of all; success and done are counted, too'}),
        (('--memory',), {
            'type': size_option, 'metavar': 'N[kmgt]',
            'help': 'memory that a job may use; it is killed when it takes more'}),
        (('--cpus',), {
            'type': count_option, 'metavar': 'N',
            'help': 'CPUs that a job takes (default: 1)'}),
        (('--resource',), {
            'action': 'append', 'default': [], 'type': resource_option, 'metavar': 'NAME=N',
            'help': 'what a job needs of its node beside CPUs, such as gpu=1 (nodes offer it by '
                    'dispynode --resource); may be repeated'}),
        (('--priority',), {
            'type': int, 'metavar': 'N',
            'help': 'jobs with a higher one go first (default: 0)'}),
        (('--resume',), {
            'action': 'store_true',
            'help': 'leave out the jobs that are in --joblog, of an earlier run of the same '
                    'command'}),
        (('--resume-failed',), {
            'action': 'store_true',
            'help': 'the same, but run those again that failed'}),
    ],
    'files': [
        (('-f', '--depends', '--basefile', '--bf'), {
            'action': 'append', 'default': [], 'metavar': 'FILE',
            'help': 'file or directory that the jobs find in their directory; may be repeated'}),
        (('--transferfile', '--tf'), {
            'action': 'append', 'default': [], 'metavar': 'FILE',
            'help': 'a file of one job, such as {}; the job gets a directory of its own, and the '
                    'file has the same relative path there; may be repeated'}),
        (('--transfer',), {
            'dest': 'transferfile', 'action': 'append_const', 'const': '{}',
            'help': 'as --transferfile {}'}),
        (('--return',), {
            'dest': 'returns', 'action': 'append', 'default': [], 'metavar': 'FILE',
            'help': 'a file that a job makes in its directory, such as {.}.out; it comes to the '
                    'same relative path here; may be repeated'}),
        (('--cleanup',), {
            'action': 'store_true',
            'help': 'accepted and ignored: files of jobs are always removed'}),
        (('--workdir', '--wd'), {
            'metavar': 'DIR',
            'help': 'run the commands in this directory of the nodes; .: the one where you are'}),
        (('-c', '--keep-files'), {
            'action': 'store_true',
            'help': 'leave the files on the nodes'}),
    ],
    'output': [
        (('-k', '--keep-order'), {
            'action': 'store_true',
            'help': 'output in the order of the arguments'}),
        (('--tag',), {
            'action': 'store_true',
            'help': 'begin each line of output with the argument and a tab'}),
        (('--line-buffer', '--lb'), {
            'action': 'store_true',
            'help': 'print lines while the job runs; those of several jobs mix'}),
        (('-o', '--output'), {
            'metavar': 'DIR',
            'help': 'write the output of job N to DIR/N.out and DIR/N.err instead of printing it'}),
        (('--results', '--res'), {
            'metavar': 'DIR',
            'help': 'also write it to DIR/1/ARGUMENT/stdout and stderr, with a table in '
                    'DIR/jobs.tsv'}),
        (('--joblog', '--jl'), {
            'metavar': 'FILE',
            'help': 'write a line on each job that has ended; +FILE: append'}),
        (('--eta',), {
            'action': 'store_true',
            'help': 'at a terminal: how much time is left'}),
        (('--bar',), {
            'action': 'store_true',
            'help': 'at a terminal: a bar'}),
        (('--progress',), {
            'action': 'store_true',
            'help': 'at a terminal: how many jobs have ended (the default)'}),
    ],
}


def make_parser() -> OptionParser:
    parser = OptionParser(
        prog='dispy',
        usage='%(prog)s [options] COMMAND [WORD...] [::: ARGUMENT... | :::: FILE...]...',
        description=SHELL_HELP,
        epilog=SHELL_EPILOG)
    for title, rows in OPTIONS.items():
        group = parser.add_argument_group(title)
        for names, kinds in rows:
            group.add_argument(*names, **kinds)
    return parser


class Plan:
    """What a command line asks for. It does not change."""

    def __init__(self, args: argparse.Namespace, words: Sequence[str]) -> None:
        """Looks at files. Raises ValueError, OSError."""
        command, marked = split_sources(words)
        self.args = args
        self.command = Command(command, args.workdir is None)
        inputs = Inputs(args, marked)
        self.inputs: Iterable[Any] = inputs
        self.reads_stdin = inputs.is_stdin
        self.transfers = tuple(map(Template, args.transferfile))
        self.returns = tuple(map(Template, args.returns))
        self.has_directory = bool(self.transfers or self.returns)
        self.directory = self._directory()
        self.options = self._options()
        self._check()
        if not self.command.is_given:
            self._check_commands(inputs)

    def _check_commands(self, inputs: Inputs) -> None:
        """The arguments are the commands: wait for the first."""
        first = list(itertools.islice(inputs, 1))
        if not first or inputs.is_old:
            raise ValueError('PROGRAM is missing, and there are no command lines as arguments')
        self.inputs = itertools.chain(first, inputs)

    def _check(self) -> None:
        if self.is_resumed and not self.args.joblog:
            raise ValueError('--resume and --resume-failed need --joblog FILE, of an earlier run')
        if self.has_directory and self.directory is not None:
            raise ValueError('--workdir is a directory that jobs share; with --transferfile and '
                             '--return each has one of its own')

    def _directory(self) -> Optional[str]:
        """Where commands run, on the nodes; None: in the directory of the job's files."""
        if self.args.workdir is None:
            return None
        return os.path.abspath(os.path.expanduser(self.args.workdir))

    def _options(self) -> Dict[str, Any]:
        """What `submit` is told of each job."""
        args = self.args
        found = {'dispy_timeout': args.timeout, 'dispy_memory': args.memory,
                 'dispy_cpus': args.cpus, 'dispy_priority': args.priority,
                 'dispy_resources': dict(args.resource) or None}
        if args.retries > 1:
            dispy_retries = args.retries - 1
            found.update(dispy_retries=dispy_retries, dispy_retry_on=True)
        return {name: value for name, value in found.items() if value is not None}

    @property
    def paces(self) -> bool:
        """Whether no job may wait behind others at a node."""
        return bool(self.args.delay or self.args.halt)

    @property
    def counts_first(self) -> bool:
        """Whether all arguments are read before the first job, to know how many there are."""
        rule = self.args.halt
        if rule is not None and rule.is_percent:
            return True
        return bool(self.args.eta or self.args.bar)

    @property
    def is_resumed(self) -> bool:
        """Whether what an earlier run has written is added to."""
        return bool(self.args.resume or self.args.resume_failed)

    def words(self, values: Values, number: int) -> List[str]:
        """The arguments of a job."""
        words = self.command.words(values, number)
        if self.directory is not None:
            words.append(RUN_IN + self.directory)
        for template in self.returns:
            path = template.expand(values, number)
            name = self._below(path, '--return')
            words.append(BRING_BACK + name)
        return words

    def files(self, values: Values, number: int) -> OwnDirectory:
        """The files of a job alone."""
        files = OwnDirectory()
        for template in self.transfers:
            path = template.expand(values, number)
            name = self._below(path, '--transferfile')
            files.append(JobFile(path, name))
        return files

    @staticmethod
    def _below(path: str, option: str) -> str:
        """A path as the job has it: below its directory, as it is below ours."""
        name = os.path.normpath(path)
        if os.path.isabs(name):
            name = os.path.relpath(name)
        if name.startswith(os.pardir):
            message = '%s %s: the path is not below the working directory, %s' % (option, path,
                                                                                  os.getcwd())
            raise ValueError(message)
        return name.replace(os.sep, '/')


# --------------------------------------------------------------------------------------------------
# The shell: jobs and the terminal
# --------------------------------------------------------------------------------------------------

JOBS_AHEAD = 1000          # jobs that have been read and have not ended
BYTES_AHEAD = 256 << 20    # the same of the files of jobs, which are in memory
CPUS_ASKED = 0.5           # s between two looks at how many CPUs there are
LINE_EVERY = 0.1           # s between two lines with the progress
OUTPUT_HELD = 1 << 16      # bytes of output that are written at once
LATE = 1.0                 # s without a job that has ended, after which the line is written anew


class Window:
    """How many jobs are under way, and whether another may start. Any thread."""

    def __init__(self, most: Callable[[], int], changes: bool) -> None:
        self._most = most
        self._changes = changes         # what `most` returns
        self._is_full = False           # jobs are let in again when a part of them has ended
        self._changed = threading.Condition()
        self.count = 0
        self._bytes = 0
        self.is_closed = False

    def enter(self, size: int) -> bool:
        """Wait until a job with so many bytes of files may start; False: none may any more."""
        with self._changed:
            while not self.is_closed and not self._has_room(size):
                self._changed.wait(CPUS_ASKED if self._changes else None)
            if self.is_closed:
                return False
            self.count += 1
            self._bytes += size
            return True

    def _has_room(self, size: int) -> bool:
        most = self._most()
        if self._is_full and not self._changes:
            most -= most // 4   # several at once take less time than one by one
        self._is_full = self.count >= most
        if self._is_full:
            return False
        if self.count == 0:
            return True
        return self._bytes + size <= BYTES_AHEAD

    def leave(self, size: int) -> None:
        """A job has ended."""
        with self._changed:
            self.count -= 1
            self._bytes -= size
            if self._has_room(0):
                self._changed.notify()

    def pause(self, seconds: float) -> None:
        """Wait so long, or until no job may start any more."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_closed, seconds)

    def close(self) -> None:
        """Start no more jobs."""
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()


class Terminal:
    """Standard output and error: what jobs print, messages, and at a terminal a line with the
    progress, which never stands between them. The main thread. Raises BrokenPipeError when nobody
    reads any more."""

    def __init__(self) -> None:
        self._shows = sys.stderr.isatty()
        self._line = ''                # that stands there
        self._next = 0.0               # when another may, by the monotonic clock
        self._held: List[bytes] = []   # of standard output, not written yet
        self._size = 0

    def out(self, data: bytes) -> None:
        """Of a job's standard output."""
        if data:
            self._held.append(data)
            self._size += len(data)
            if self._size > OUTPUT_HELD:
                self.flush()

    def err(self, data: bytes) -> None:
        """Of a job's standard error, behind all that has been printed before."""
        if data:
            self.flush()
            self._erase()
            self._write(sys.stderr.buffer, data)

    def message(self, text: str) -> None:
        """Print a line of our own."""
        data = (text + '\n').encode(errors='backslashreplace')
        self.err(data)

    def flush(self) -> None:
        """All that has been printed is written."""
        if self._held:
            self._erase()
            data = b''.join(self._held)
            self._held = []
            self._size = 0
            self._write(sys.stdout.buffer, data)

    @staticmethod
    def _write(stream: Any, data: bytes) -> None:
        stream.write(data)
        stream.flush()

    def _erase(self) -> None:
        if self._line:
            self._line = ''
            self._write(sys.stderr.buffer, b'\r\033[K')

    def progress(self, line: Callable[[], str], at_once: bool = False) -> None:
        """Show how far it is, if it is time for that."""
        if not self._shows:
            return
        now = time.monotonic()
        if now < self._next and not at_once:
            return
        self._next = now + LINE_EVERY
        self.flush()
        width = shutil.get_terminal_size().columns
        self._line = line()[:width - 1]
        data = self._line.encode(errors='replace')
        self._write(sys.stderr.buffer, b'\r%s\033[K' % data)

    def close(self) -> None:
        """What is shown stays there, in a line of its own."""
        self.flush()
        if self._line:
            self._line = ''
            self._write(sys.stderr.buffer, b'\n')


class Tally:
    """How many jobs there are, and how many have ended. The main thread."""

    def __init__(self, display: str) -> None:
        self._display = display        # 'eta', 'bar' or ''
        self._began = time.monotonic()
        self.total: Optional[int] = None   # if that is known
        self.read = 0
        self.skipped = 0                   # that an earlier run has done
        self.done = 0
        self.failed = 0
        self.last_status = 0           # exit status of the job that ended last

    def count(self, ended: Ended) -> None:
        """Count a job that has ended."""
        self.done += 1
        self.last_status = ended.shell_status
        if ended.reason:
            self.failed += 1

    @property
    def all(self) -> int:
        """How many jobs there are, as far as that is known."""
        if self.total is None:
            return self.read
        return self.total - self.skipped

    def line(self) -> str:
        """Return a line for people."""
        text = '%d of %d done, %d failed' % (self.done, self.all, self.failed)
        if self._display == 'bar':
            return '%s %s' % (self._bar(), text)
        return text + self._time_left()

    def _time_left(self) -> str:
        left = self.all - self.done
        if self._display != 'eta':
            return ''
        if not left:
            return ''
        if not self.done:
            return ''
        rate = self.done / (time.monotonic() - self._began)
        return ', about %.0f s left' % (left / rate)

    def _bar(self) -> str:
        part = self.done / max(1, self.all)
        marks = '#' * int(40 * part)
        return '%3.0f %% [%-40s]' % (100 * part, marks)


class Names:
    """The names of nodes by their addresses. The main thread."""

    def __init__(self, cluster: JobCluster) -> None:
        self._cluster = cluster
        self._known: Dict[str, str] = {}

    def of(self, address: str) -> str:
        """The name of the node at an address; the address if there are several."""
        if address and address not in self._known:
            self._look(address)
        return self._known.get(address, '')

    def _look(self, address: str) -> None:
        nodes = self._cluster.status().nodes
        names = {node.name for node in nodes if node.ip_addr == address}
        names.discard('')
        if len(names) != 1:
            names = {address}
        self._known[address] = names.pop()


class PendingJob(NamedTuple):
    """A job on its way."""
    values: Values
    command: str
    size: int = 0            # bytes of its files


class NotSubmitted(NamedTuple):
    """A job that could not be started."""
    number: int
    values: Values
    reason: str


class InputEnd(NamedTuple):
    """There are no more arguments, or they cannot be read."""
    error: str


class TotalKnown(NamedTuple):
    """All arguments have been read."""
    jobs: int


class Printed(NamedTuple):
    """A job that runs has printed this."""
    number: int
    stream: str
    data: bytes


class Feeder:
    """Reads arguments and submits jobs, in a thread of its own: they may come slowly. The main
    thread is told by `events`."""

    def __init__(self, plan: Plan, cluster: JobCluster, window: Window,
                 events: 'queue.SimpleQueue[Any]', resume: Optional[Resume]) -> None:
        self._plan = plan
        self._cluster = cluster
        self._window = window
        self._events = events
        self._resume = resume
        self._last = -math.inf                     # when a job was started
        self.skipped = 0                           # jobs that an earlier run has done
        self.jobs: Dict[int, PendingJob] = {}       # under way
        self.order: Deque[int] = collections.deque()   # numbers of jobs, as they were submitted

    def start(self) -> None:
        """Begin. The thread does not keep the interpreter from ending."""
        thread = threading.Thread(target=self._run, name='dispy-arguments', daemon=True)
        thread.start()

    def _run(self) -> None:
        error = ''
        try:
            inputs: Iterable[Any] = self._plan.inputs
            if self._plan.counts_first:
                inputs = list(inputs)
                self._events.put(TotalKnown(len(inputs)))
            self._submit_all(inputs)
        except (OSError, ValueError, RuntimeError) as exc:   # files, and a cluster that has ended
            error = str(exc)
        self._events.put(InputEnd(error))

    def _submit_all(self, inputs: Iterable[Any]) -> None:
        for number, values in enumerate(inputs, 1):
            if isinstance(values, ValueError):
                self._refuse(number, (), values)
            elif self._is_done(number, values):
                self.skipped += 1
            else:
                self._submit(number, values)
            if self._window.is_closed:
                return

    def _is_done(self, number: int, values: Values) -> bool:
        if self._resume is None:
            return False
        command = self._plan.command.text(values, number)
        return self._resume.skips(number, command)

    def _refuse(self, number: int, values: Values, exc: Exception) -> None:
        if self._window.enter(0):
            self.jobs[number] = PendingJob(values, '')
            self.order.append(number)
            not_submitted = NotSubmitted(number, values, str(exc))
            self._events.put(not_submitted)

    def _submit(self, number: int, values: Values) -> None:
        try:
            words = self._plan.words(values, number)
            options = self._plan.options
            size = 0
            if self._plan.has_directory:
                files = self._plan.files(values, number)
                file_sizes = []
                for file in files:
                    file_sizes.append(os.path.getsize(file.path))
                size = sum(file_sizes)
                options = dict(options, dispy_job_depends=files)
        except (OSError, ValueError) as exc:
            self._refuse(number, values, exc)
            return
        if not self._window.enter(size):
            return
        self._wait_for_turn()
        command = self._plan.command.text(values, number)
        self.jobs[number] = PendingJob(values, command, size)
        self.order.append(number)
        try:
            job = self._cluster.submit_job_id(number, *words, **options)
        except (OSError, ValueError) as exc:
            not_submitted = NotSubmitted(number, values, str(exc))
            self._events.put(not_submitted)
        else:
            job.call_when_ended(self._events.put)   # by way of the callbacks it takes longer

    def _wait_for_turn(self) -> None:
        delay = self._plan.args.delay
        if delay:
            now = time.monotonic()
            seconds = self._last + delay - now
            self._window.pause(seconds)
            self._last = time.monotonic()


class Halted(Exception):
    """No more jobs are wanted, and those that run neither."""


class Shell:
    """Runs what a plan says: owns the cluster, the terminal and the files that are written. The
    main thread; only `_cpus` is called by another."""

    def __init__(self, plan: Plan) -> None:
        """Opens the files. Raises OSError."""
        self._plan = plan
        self._args = plan.args
        self._events: 'queue.SimpleQueue[Any]' = queue.SimpleQueue()
        self._terminal = Terminal()
        self._tally = Tally(self._display())
        self._window = Window(self._most, plan.paces)
        self._live = ShownOutput()
        self._waiting: Dict[int, Ended] = {}   # have ended before an earlier one (--keep-order)
        self._input_ended = False
        self._input_failed = False
        self._halted = False
        self._cpus_known = (0, -math.inf)      # how many, and when that was asked
        self._resume = self._open_resume()
        self._log: Optional[JobLog] = None
        self._files: List[Any] = []
        self._open_files()

    def _display(self) -> str:
        if self._args.bar:
            return 'bar'
        return 'eta' if self._args.eta else ''

    def _open_resume(self) -> Optional[Resume]:
        if not self._plan.is_resumed:
            return None
        path = self._args.joblog.lstrip('+')
        return Resume(path, self._args.resume_failed)

    def _open_files(self) -> None:
        is_resumed = self._plan.is_resumed
        if self._args.joblog:
            path = self._args.joblog
            appends = is_resumed or path.startswith('+')
            self._log = JobLog(path.lstrip('+'), appends)
        if self._args.output:
            self._files.append(NumberedFiles(self._args.output))
        if self._args.results:
            self._files.append(ResultFiles(self._args.results, is_resumed))

    # -- the cluster -------------------------------------------------------------------------------

    def open(self, nodes: Any, access: Dict[str, Any]) -> None:
        """Make the cluster that runs the jobs. Raises what making one raises."""
        args = self._args
        path = self._plan.command.program.path
        depends = list(args.depends)
        options: Dict[str, Any] = dict(access,
                                       depends=depends,
                                       host=args.host,
                                       cleanup=not args.keep_files)
        if args.debug:
            options['loglevel'] = logging.DEBUG
        else:
            options['loglevel'] = logging.WARNING
        if path is not None:
            options['depends'].append(path)
        if args.line_buffer:
            options['on_output'] = self._printed
        program = os.path.basename(path or '')
        commands = CommandLines(self._plan.command.name, program, args.jobs)
        self._cluster = self._make(commands, nodes, options)
        self._names = Names(self._cluster)
        self._feeder = Feeder(self._plan, self._cluster, self._window, self._events, self._resume)

    def _make(self, commands: CommandLines, nodes: Any, options: Dict[str, Any]) -> JobCluster:
        if self._args.scheduler_host is None:
            return JobCluster(commands, nodes, **options)
        if nodes == LOCAL:
            raise ValueError(
                "-n local is a node of this program alone, and --scheduler-host a scheduler's: "
                'give one of them')
        host, port = host_and_port(self._args.scheduler_host, SCHEDULER_PORT)
        options.update(scheduler_host=host, scheduler_port=port)
        return SharedJobCluster(commands, nodes, **options)

    def _printed(self, job: DispyJob, stream: str, data: bytes) -> None:
        """Note what a job has printed. A callback thread."""
        self._events.put(Printed(job.id, stream, data))

    def _most(self) -> int:
        """How many jobs may be under way. The thread that submits."""
        if not self._plan.paces:
            return JOBS_AHEAD
        cpus, when = self._cpus_known
        now = time.monotonic()
        if now >= when + CPUS_ASKED:
            nodes = self._cluster.status().nodes
            ready = []
            for node in nodes:
                if node.state == 'ready':
                    ready.append(node.cpus)
            cpus = sum(ready)
            if self._args.jobs:
                cpus = min(cpus, self._args.jobs)
            self._cpus_known = (cpus, now)
        return max(1, cpus // (self._args.cpus or 1))

    # -- the run -----------------------------------------------------------------------------------

    def run(self) -> int:
        """Run all; it has been opened. Returns the exit status. Raises OSError for what cannot be
        written."""
        try:
            with self._cluster:
                self._run()
        except Halted:
            pass    # by --halt; what it has told decides about the exit status below
        except NoNodes as exc:
            self._terminal.message('dispy: %s' % exc)
            return EXIT_USAGE
        except KeyboardInterrupt:
            done = self._tally.done
            message = 'dispy: interrupted: %d of %d jobs had ended, the others were cancelled' % (
                done, done + len(self._feeder.jobs))
            self._terminal.message(message)
            return 130   # as a shell has it: 128 and the signal's number
        finally:
            self._close_files()
        self._show_progress(True)
        self._terminal.close()
        return self._exit_status()

    def _exit_status(self) -> int:
        tally = self._tally
        if self._input_failed:
            return EXIT_USAGE
        if self._halted:
            return self._args.halt.exit_status(tally.last_status, tally.failed, tally.all)
        return min(tally.failed, FAILED_MOST)

    def _close_files(self) -> None:
        for file in (*self._files, self._log):
            if file is not None:
                file.close()

    def _run(self) -> None:
        if self._args.wait_nodes is not None:
            self._cluster.wait_nodes(1, self._args.wait_nodes)
        self._feeder.start()
        while not self._is_over():
            self._on_event(self._next_event())
        if self._resume is not None and self._resume.changed:
            self._terminal.message('dispy: ' + self._resume.changed)

    def _is_over(self) -> bool:
        if self._window.count:
            return False
        return self._input_ended or self._window.is_closed

    def _next_event(self) -> Any:
        """What comes next. While nothing does, all that has been printed can be seen."""
        with contextlib.suppress(queue.Empty):
            return self._events.get_nowait()
        self._terminal.flush()
        self._show_progress()
        while True:
            with contextlib.suppress(queue.Empty):
                return next_of(self._events, LATE)
            self._show_progress(True)

    def _show_progress(self, at_once: bool = False) -> None:
        self._tally.read = len(self._feeder.jobs) + self._tally.done
        self._tally.skipped = self._feeder.skipped
        if self._tally.read:
            self._terminal.progress(self._tally.line, at_once)

    def _on_event(self, event: Any) -> None:
        if isinstance(event, DispyJob):
            if event.id in self._feeder.jobs:   # an end may be told twice
                self._on_ended(self._ended_of(event))
        elif isinstance(event, Printed):
            self._on_printed(event)
        elif isinstance(event, NotSubmitted):
            ended = Ended(event.number, event.values, '', status=NO_STATUS, reason=event.reason)
            self._on_ended(ended)
        elif isinstance(event, TotalKnown):
            self._tally.total = event.jobs
        else:
            self._on_input_end(event)

    def _on_input_end(self, event: InputEnd) -> None:
        self._input_ended = True
        if event.error and not self._window.is_closed:
            self._input_failed = True
            self._terminal.message('dispy: the arguments cannot be read: %s; no more jobs are '
                                   'started' % event.error)

    def _ended_of(self, job: DispyJob) -> Ended:
        """What is said of a job that has ended."""
        submitted = self._feeder.jobs[job.id]
        address = job.ip_addr or ''
        status = NO_STATUS
        by_signal = 0
        reason = ''
        node = self._names.of(address)
        if job.status == JobState.FINISHED:
            if job.result is not None:
                status = max(job.result, 0)
                by_signal = max(-job.result, 0)
        if job.status != JobState.FINISHED or job.result:
            word, where, reason = state_of(job)
            reason = reason or job.exception or word   # also of one that somebody has cancelled
            node = node or where
        seconds = 0.0
        if job.start_time and job.end_time:
            seconds = job.end_time - job.start_time
        begin = job.start_time or job.end_time or 0.0
        stdout: Any = job.stdout or b''   # of a program they are bytes
        stderr: Any = job.stderr or b''
        return Ended(job.id, submitted.values, submitted.command, node, address, begin, seconds,
                     submitted.size, status, by_signal, reason, stdout, stderr)

    def _on_ended(self, ended: Ended) -> None:
        self._tally.count(ended)
        if self._log is not None:
            self._log.write(ended)
        for files in self._files:
            files.write(ended)
        if self._args.keep_order:
            self._waiting[ended.number] = ended
            self._show_in_order()
        else:
            self._show(ended)
        job = self._feeder.jobs.pop(ended.number)
        self._window.leave(job.size)
        self._show_progress()
        self._halt_if_due()

    def _halt_if_due(self) -> None:
        rule = self._args.halt
        tally = self._tally
        if rule is None or self._halted:
            return
        if rule.is_reached(tally.done, tally.failed, tally.all):
            self._halted = True
            self._window.close()
            self._terminal.message('dispy: no more jobs are started (--halt %s)' % (rule,))
            if rule.is_now:
                raise Halted

    # -- output ------------------------------------------------------------------------------------

    def _show_in_order(self) -> None:
        order = self._feeder.order
        while order and order[0] in self._waiting:
            self._show(self._waiting.pop(order.popleft()))
        if order:
            self._show_lines(order[0])

    def _show(self, ended: Ended) -> None:
        """The output and the fate of a job."""
        for stream, data in (('stdout', ended.stdout), ('stderr', ended.stderr)):
            if self._args.line_buffer:
                data = self._live.rest(ended.number, stream, data)
            self._print(stream, data, ended.tag)
        if ended.reason:
            self._terminal.message(ended.message())

    def _print(self, stream: str, data: bytes, tag: str) -> None:
        if self._args.output:
            return
        if self._args.tag:
            data = tagged(data, tag)
        if stream == 'stdout':
            self._terminal.out(data)
        else:
            self._terminal.err(data)

    def _on_printed(self, event: Printed) -> None:
        """Of a job that runs; if it has ended meanwhile, it has been shown."""
        number = event.number
        if number in self._feeder.jobs:
            self._live.add(number, event.stream, event.data)
            first = self._feeder.order[0]
            if first == number or not self._args.keep_order:
                self._show_lines(number)

    def _show_lines(self, number: int) -> None:
        """The whole lines that a job has printed."""
        submitted = self._feeder.jobs.get(number)
        if submitted is None:
            return
        if not self._args.line_buffer:
            return
        for stream in ('stdout', 'stderr'):
            data = self._live.take(number, stream)
            self._print(stream, data, ' '.join(submitted.values))


# --------------------------------------------------------------------------------------------------
# Command line: a file for a report of a fault
# --------------------------------------------------------------------------------------------------

STACKS_TIME = 1.0         # s that a daemon may take to write its stacks
LOG_LINES = 200           # of each log, from its end
LOG_BYTES = 1 << 16       # that are looked at for these
DAEMONS = ('dispynode', 'dispyscheduler', 'dispy_httpd', 'dispy-httpd')
# Options of daemons whose values are told; of the others only their names are
PLAIN_OPTIONS = frozenset((
    '-c', '--cpus', '-i', '--host', '--ip-addr', '--ext-host', '-p', '--port', '--name',
    '--dest-path-prefix', '--scheduler-host', '-n', '--node', '--node-port', '--log-file',
    '--state-dir', '--max-file-size', '--zombie-interval', '--ping-interval', '--pulse-interval',
    '--httpd', '--msg-timeout', '--serve'))
# What is left out of texts -> what stands there instead
LEFT_OUT = [
    (re.compile(r'(https?://[^/\s]+)/\S*'), r'\1/<left out>'),
    (re.compile(r'(token|secret|password)([=:]\s*)\S+', re.I), r'\1\2<left out>'),
    (re.compile(r'\b[0-9A-Fa-f]{24,}\b'), '<left out>'),
    (re.compile(r'with the arguments? .*'), 'with arguments'),
]


class BugReport:
    """The text of a report: sections, without secrets, tokens and arguments of jobs."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = [secret for secret in secrets if secret]
        self._lines: List[str] = []

    def add(self, title: str, find: Callable[[], Iterable[str]]) -> None:
        """A section with the lines that are found."""
        self._lines += ['', '== %s' % title]
        try:
            self._lines += map(self.plain, find())
        except Exception as exc:
            # Whatever is wrong here, the other sections are wanted all the more
            line = 'it cannot be found: %s: %s' % (type(exc).__name__, exc)
            self._lines.append(self.plain(line))

    def plain(self, line: str) -> str:
        """A line without what nobody else may see."""
        for secret in self._secrets:
            line = line.replace(secret, '<left out>')
        for pattern, words in LEFT_OUT:
            line = pattern.sub(words, line)
        return line

    def text(self) -> str:
        """Return the whole text."""
        return '\n'.join(self._lines[1:]) + '\n'


def versions() -> Iterator[str]:
    """Return the versions of what runs here."""
    directory = os.path.dirname(os.path.abspath(__file__))
    yield 'dispy %s, %s' % (__version__, directory)
    yield 'Python %s' % sys.version.replace('\n', ' ')
    yield 'system %s' % ' '.join(platform.uname()[:5])
    yield 'CPUs %d' % available_cpus()
    for name in ('cloudpickle', 'psutil', 'joblib', 'numpy'):
        yield '%s %s' % (name, package_version(name) or 'is not installed')


def surroundings() -> Iterator[str]:
    """Variables and files that dispy reads."""
    for name in sorted(os.environ):
        if name.startswith('DISPY_') and name != 'DISPY_SECRET':
            yield '%s=%s' % (name, os.environ[name])
    yield 'DISPY_SECRET is %s' % ('set' if 'DISPY_SECRET' in os.environ else 'not set')
    path = dispynode.secret_path()
    if os.path.exists(path):
        st_mode = os.stat(path).st_mode
        yield 'the secret file %s has mode %o' % (path, stat.S_IMODE(st_mode))
    else:
        yield 'there is no secret file %s' % path


def told_words(words: Sequence[str]) -> Iterator[str]:
    """A daemon's command line, without the values of options that may be secret."""
    tells = True
    for word in words:
        name, sign, _ = word.partition('=')
        if not word.startswith('-'):
            yield word if tells else '<left out>'
            continue
        tells = name in PLAIN_OPTIONS
        yield name + sign + '<left out>' if sign and not tells else word


def daemons() -> List[Any]:
    """The processes of dispy's daemons that belong to this user."""
    import psutil
    found = []
    for process in psutil.process_iter(['cmdline', 'username', 'pid']):
        words = process.info['cmdline'] or []
        names = []
        for word in words[:4]:
            file_name = os.path.basename(word)
            names.append(file_name.partition('.')[0])
        if not any(name in DAEMONS for name in names):
            continue
        if process.info['username'] == _own_name():
            found.append(process)
    return found


def _own_name() -> str:
    import psutil
    return str(psutil.Process().username())


def processes() -> Iterator[str]:
    """The daemons on this machine: what they are, and what each thread of them waits in."""
    import psutil
    for process in daemons():
        with contextlib.suppress(psutil.Error):
            began = time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(process.create_time()))
            memory = process.memory_info().rss >> 20
            yield 'PID %d since %s, %d MiB, %d threads, %s: %s' % (
                process.pid, began, memory, process.num_threads(), process.status(),
                ' '.join(told_words(process.info['cmdline'])))
            yield from waits_of(process.pid)


def waits_of(process: int) -> Iterator[str]:
    """For each thread of a process, its name and the function of the kernel that it is in."""
    root = '/proc/%d/task' % process
    if not os.path.isdir(root):   # another system
        return
    for thread in sorted(os.listdir(root), key=int):
        with contextlib.suppress(OSError):   # it has ended meanwhile, or belongs to root
            words = []
            for name in ('comm', 'wchan'):
                path = os.path.join(root, thread, name)
                with open(path) as file:
                    word = file.read().strip() or '-'
                    words.append(word)
            yield '  thread %s %s in %s' % (thread, *words)


def stacks() -> Iterator[str]:
    """The stacks of the daemons on this machine: where each thread of them is in the program, and
    no values."""
    for process in daemons():
        path = _stacks_path(process.pid)
        if path is None:
            yield 'PID %d: not known' % process.pid
            continue
        yield '-- PID %d' % process.pid
        with contextlib.suppress(OSError):   # it has ended meanwhile
            os.truncate(path, 0)
            os.kill(process.pid, signal.SIGUSR2)
            yield from _read_stacks(path)


def _stacks_path(process: int) -> Optional[str]:
    """Where a daemon writes its stacks at SIGUSR2; None if it does not."""
    root = '/proc/%d/fd' % process
    with contextlib.suppress(OSError):   # another system, or the process of another user
        status = _since('/proc/%d/status' % process)
        caught = re.search(rb'SigCgt:\s*([0-9a-f]+)', status)
        if caught is None:
            return None
        signals = int(caught.group(1), 16)
        if not signals >> (signal.SIGUSR2 - 1) & 1:
            return None   # the signal would end it
        for name in os.listdir(root):
            path = os.path.join(root, name)
            if os.readlink(path).startswith('/memfd:' + STACKS):
                return path
    return None


def _read_stacks(path: str) -> List[str]:
    """What a daemon has written, when no more comes."""
    until = time.monotonic() + STACKS_TIME
    data = b''
    while time.monotonic() < until:
        time.sleep(STACKS_TIME / 20)
        before = data
        data = _since(path)
        if data and data == before:
            break
    return data.decode(errors='replace').splitlines()


def logs() -> Iterator[str]:
    """The last lines of the logs of daemons on this machine."""
    expanded_path = os.path.expanduser('~/.dispy/*/log')
    found = set(glob.glob(expanded_path))
    for process in daemons():
        words = process.info['cmdline']
        for word, value in zip(words, words[1:]):
            if word == '--log-file':
                found.add(value)
    for path in sorted(found):
        yield '-- %s' % path
        with contextlib.suppress(OSError):
            with open(path, 'rb') as file:
                file_size = os.path.getsize(path)
                file.seek(max(0, file_size - LOG_BYTES))
                lines = file.read().decode(errors='replace').splitlines()
            yield from lines[-LOG_LINES:]


def nodes_seen(args: argparse.Namespace) -> Iterator[str]:
    """The table of nodes, as of --list-nodes."""
    table = io.StringIO()
    with contextlib.redirect_stdout(table), contextlib.redirect_stderr(table):
        _look_at_nodes(args)
    yield from table.getvalue().splitlines()


def _known_secrets(args: argparse.Namespace) -> Iterator[str]:
    yield os.environ.get('DISPY_SECRET', '')
    with contextlib.suppress(DispyError, OSError):
        secret = find_secret(args.secret, args.secret_file)
        yield secret.decode(errors='replace').strip()


def _report(argv: Sequence[str]) -> int:
    """`dispy report`. Returns the exit status."""
    parser = OptionParser(prog='dispy report', description=(
        'Write a file for a report of a fault: versions, settings, daemons of this machine with '
        'the last lines of their logs, and the nodes. Secrets, tokens and arguments of jobs are '
        'left out.'))
    moment = time.strftime('dispy-report-%Y%m%d-%H%M%S.txt')
    parser.add_argument('-o',
                        '--output',
                        metavar='FILE',
                        default=moment,
                        help='-: standard output (default: %(default)s)')
    for names, kinds in OPTIONS['nodes']:
        parser.add_argument(*names, **kinds)
    args = parser.parse_args(argv)
    report = BugReport(_known_secrets(args))
    report.add('versions', versions)
    report.add('settings', surroundings)
    report.add('daemons on this machine', processes)
    report.add('stacks', stacks)
    report.add('nodes', functools.partial(nodes_seen, args))
    report.add('logs', logs)
    if args.output == '-':
        sys.stdout.write(report.text())
        return 0
    try:
        handle = os.open(args.output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as exc:
        parser.error(str(exc))
    with open(handle, 'w', encoding='utf-8') as file:
        file.write(report.text())
    print('%s is written. Read it before you send it.' % args.output)
    return 0


# --------------------------------------------------------------------------------------------------
# Command line: nodes that an engine such as Slurm places
# --------------------------------------------------------------------------------------------------

ENGINE_TIME = 60.0            # s that a command of an engine may take
ADAPT_EVERY = 5.0             # s between two looks at what waits
END_IDLE = 60.0               # s without jobs after which a node ends that is not one of MIN
POD_IMAGE = 'python:3.12-slim'
POD_GRACE = 60                # s that a node in a pod has to end
POD_LABEL = 'app=dispy-node'
# How a pod writes dispynode.py and the secret where only it can read them, and runs it
POD_START = ('umask 077; python3 -c "import zlib; open(\'/tmp/dispynode.py\', \'wb\').write('
             'zlib.decompress(open(\'/dispy/dispynode\', \'rb\').read()))" && '
             'cp /dispy-secret/secret /tmp/secret && exec ')


# The Job of a node, without what differs, and what all nodes have: dispynode.py and the secret
POD_JOB: Dict[str, Any] = {
    'apiVersion': 'batch/v1', 'kind': 'Job',
    'metadata': {'labels': {'app': 'dispy-node'}, 'generateName': 'dispy-node-'},
    'spec': {
        'backoffLimit': 0, 'ttlSecondsAfterFinished': 600, 'template': {
            'metadata': {'labels': {'app': 'dispy-node'}},
            'spec': {
                'restartPolicy': 'Never', 'terminationGracePeriodSeconds': POD_GRACE,
                'containers': [{
                    'name': 'node', 'resources': {'requests': {}, 'limits': {}},
                    'volumeMounts': [{'name': 'dispy', 'mountPath': '/dispy'},
                                     {'name': 'dispy-secret', 'mountPath': '/dispy-secret'}]}],
                'volumes': [{'name': 'dispy', 'configMap': {'name': 'dispy-node'}},
                            {'name': 'dispy-secret', 'secret': {'secretName': 'dispy-node'}}]}}}
}
POD_FILES: List[Dict[str, Any]] = [
    {'apiVersion': 'v1', 'kind': 'ConfigMap', 'metadata': {'name': 'dispy-node'},
     'binaryData': {}},
    {'apiVersion': 'v1', 'kind': 'Secret', 'metadata': {'name': 'dispy-node'}, 'data': {}},
]


class NodeRequest(NamedTuple):
    """What an engine is asked for: a part of a host, for some time, for one node."""
    cpus: int
    seconds: int                  # its time limit
    memory: int = 0               # bytes; 0: what the engine gives if nothing is said
    gpus: int = 0
    queue: str = ''               # or partition, or namespace
    log: str = ''                 # the directory for what nodes print
    more: Tuple[str, ...] = ()    # options for the engine, as they stand in its scripts
    image: str = ''               # of containers

    @property
    def megabytes(self) -> int:
        """The memory, rounded up."""
        return -(-self.memory >> 20)

    def fields(self) -> Dict[str, Any]:
        """What stands in options of engines."""
        found: Dict[str, Any] = self._asdict()
        minutes, seconds = divmod(self.seconds, 60)
        hours, minutes = divmod(minutes, 60)
        found['clock'] = '%d:%02d:%02d' % (hours, minutes, seconds)
        whole_minutes = -(-self.seconds // 60)
        hours, minutes = divmod(whole_minutes, 60)
        found['minutes'] = '%d:%02d' % (hours, minutes)
        found['megabytes'] = self.megabytes
        found['slot_megabytes'] = -(-self.megabytes // self.cpus)
        found['several'] = self.cpus > 1
        return found


class Engine:
    """A system that gives a part of a host for some time, to whoever submits a script with options
    in comments. The subclasses have what each of them understands."""
    name = ''
    title = ''
    number = ''                   # what a shell there puts in place for the number of its job
    mark = ''                     # begins a comment with an option
    submits: Sequence[str] = ()   # the command that reads a script
    cancels: Sequence[str] = ()   # the command that ends jobs, whose numbers follow
    lists: Sequence[str] = ()     # the command that prints the jobs of this user
    answer = re.compile(r'\s*(\S+)\s*\Z')   # what `submits` prints, with the number of the job
    # Field of a request, or '' for always -> the options that it takes, with fields
    table: Dict[str, Sequence[str]] = {}

    def options(self, request: NodeRequest) -> List[str]:
        """What is asked for, in options."""
        fields = request.fields()
        found: List[str] = []
        for field, options in self.table.items():
            if not field or fields[field]:
                found += [option.format(**fields) for option in options]
        return found

    def script(self, request: NodeRequest, command: str) -> str:
        """The script that runs the command of a node."""
        lines = ['#!/bin/sh']
        for option in (*self.options(request), *request.more):
            lines.append('%s %s' % (self.mark, option))
        lines.append('exec %s' % command)
        return '\n'.join(lines) + '\n'

    def submit(self, request: NodeRequest, command: str) -> str:
        """Ask for a node. Returns the number of the job. Raises DispyError."""
        said = self._run(self.submits, self.script(request, command))
        found = self.answer.search(said)
        if found is None:
            raise DispyError('%s said no number of a job but %.200r' % (self.submits[0], said))
        return found.group(1)

    def cancel(self, jobs: Sequence[str]) -> None:
        """End jobs. Raises DispyError."""
        self._run([*self.cancels, *jobs])

    def alive(self, jobs: Iterable[str]) -> Set[str]:
        """Those of these jobs that wait or run. Raises DispyError."""
        said = self._run(self.lists)
        known = self.listed(said)
        found = set()
        for job in jobs:
            number, _, _ = job.partition('.')
            if number in known:
                found.add(job)
        return found

    def listed(self, said: str) -> Set[str]:
        """The numbers of the jobs in what `lists` has printed."""
        found = set()
        for line in said.splitlines():
            words = line.split()
            if words:
                found.add(words[0].partition('.')[0])
        return found

    def _run(self, command: Sequence[str], given: str = '') -> str:
        pipe = subprocess.PIPE
        data = given.encode()
        try:
            done = subprocess.run(command, input=data, stdout=pipe, stderr=pipe,
                                  timeout=ENGINE_TIME)
        except FileNotFoundError as exc:
            text = '%s: there is no such program here: run this where jobs are submitted to %s'
            raise DispyError(text % (command[0], self.title)) from exc
        except subprocess.TimeoutExpired as exc:
            message = '%s has not answered in %d s' % (command[0], ENGINE_TIME)
            raise DispyError(message) from exc
        said = done.stdout.decode(errors='replace')
        if done.returncode and not self.is_nothing(done):
            why = done.stderr.decode(errors='replace')
            ending = exit_text(done.returncode)
            why = why.strip() or ending
            raise DispyError('%s: %s' % (command[0], why))
        return said

    def is_nothing(self, done: 'subprocess.CompletedProcess[bytes]') -> bool:
        """Whether a command that has failed says that there are no jobs."""
        return False


class SlurmEngine(Engine):
    """Slurm, as sbatch, scancel and squeue have it."""
    name = 'slurm'
    title = 'Slurm'
    number = '$SLURM_JOB_ID'
    mark = '#SBATCH'
    submits = ('sbatch', '--parsable')
    cancels = ('scancel',)
    lists = ('squeue', '--me', '--noheader', '--format=%i')
    answer = re.compile(r'(\d+)(?:;\S+)?\s*\Z')
    table = {
        '': ('--job-name=dispy-node', '--nodes=1', '--ntasks=1', '--cpus-per-task={cpus}',
             '--time={clock}', '--output={log}/slurm-%j.log', '--no-requeue'),
        'memory': ('--mem={megabytes}M',),
        'gpus': ('--gres=gpu:{gpus}',),
        'queue': ('--partition={queue}',),
    }


class PbsEngine(Engine):
    """PBS Professional and OpenPBS."""
    name = 'pbs'
    title = 'PBS'
    number = '$PBS_JOBID'
    mark = '#PBS'
    submits = ('qsub',)
    cancels = ('qdel',)
    answer = re.compile(r'(\d+\S*)\s*\Z')
    table = {
        '': ('-N dispy-node', '-l walltime={clock}', '-j oe', '-o {log}/', '-r n'),
        'queue': ('-q {queue}',),
    }

    @property
    def lists(self) -> Sequence[str]:  # type: ignore[override]
        """The command that prints the jobs of this user."""
        return ('qselect', '-u', _user_name())

    def options(self, request: NodeRequest) -> List[str]:
        """The others stand in the table; CPUs, memory and GPUs in one chunk."""
        chunk = '-l select=1:ncpus=%d' % request.cpus
        if request.memory:
            chunk += ':mem=%dmb' % request.megabytes
        if request.gpus:
            chunk += ':ngpus=%d' % request.gpus
        return [chunk, *super().options(request)]


class LsfEngine(Engine):
    """IBM Spectrum LSF."""
    name = 'lsf'
    title = 'LSF'
    number = '$LSB_JOBID'
    mark = '#BSUB'
    submits = ('bsub',)
    cancels = ('bkill',)
    lists = ('bjobs', '-noheader', '-o', 'jobid')
    answer = re.compile(r'Job <(\d+)>')
    table = {
        '': ('-J dispy-node', '-n {cpus}', '-R "span[hosts=1]"', '-W {minutes}',
             '-o {log}/lsf-%J.log', '-rn'),
        'memory': ('-M {megabytes}MB', '-R "rusage[mem={megabytes}MB]"'),
        'gpus': ('-gpu "num={gpus}"',),
        'queue': ('-q {queue}',),
    }

    def is_nothing(self, done: 'subprocess.CompletedProcess[bytes]') -> bool:
        """bjobs fails if there are none."""
        return b'No unfinished job' in done.stderr


class SgeEngine(Engine):
    """Grid Engine. Its parallel environment and its name of GPUs are the site's: 'smp' and 'gpu',
    unless options for the engine say others."""
    name = 'sge'
    title = 'Grid Engine'
    number = '$JOB_ID'
    mark = '#$'
    submits = ('qsub', '-terse')
    cancels = ('qdel',)
    answer = re.compile(r'(\d+)\s*\Z')
    table = {
        '': ('-N dispy-node', '-S /bin/sh', '-l h_rt={clock}', '-j y', '-o {log}/', '-r n'),
        'several': ('-pe smp {cpus}',),
        'memory': ('-l h_vmem={slot_megabytes}M',),
        'gpus': ('-l gpu={gpus}',),
        'queue': ('-q {queue}',),
    }

    @property
    def lists(self) -> Sequence[str]:  # type: ignore[override]
        """The command that prints the jobs of this user."""
        return ('qstat', '-u', _user_name())


class KubernetesEngine(Engine):
    """Kubernetes: a Job with one pod for each node; dispynode.py and the secret are mounted
    there."""
    name = 'k8s'
    title = 'Kubernetes'
    number = '$HOSTNAME'
    submits = ('kubectl', 'create', '-o', 'name', '-f', '-')
    cancels = ('kubectl', 'delete', '--ignore-not-found', '--wait=false')
    lists = ('kubectl', 'get', 'jobs', '-l', POD_LABEL, '-o', 'json')
    answer = re.compile(r'(job\S*/\S+)\s*\Z')

    @staticmethod
    def manifest(request: NodeRequest, command: str) -> Dict[str, Any]:
        """The Job of a node."""
        job = copy.deepcopy(POD_JOB)
        spec = job['spec']
        spec['activeDeadlineSeconds'] = request.seconds
        container = spec['template']['spec']['containers'][0]
        container['image'] = request.image or POD_IMAGE
        container['command'] = ['sh', '-c', POD_START + command]
        requests = container['resources']['requests']
        limits = container['resources']['limits']
        for resources in (requests, limits):
            resources['cpu'] = str(request.cpus)
            if request.memory:
                resources['memory'] = '%dMi' % request.megabytes
        if request.gpus:
            limits['nvidia.com/gpu'] = str(request.gpus)
        return job

    def script(self, request: NodeRequest, command: str) -> str:
        return json.dumps(self.manifest(request, command))

    @staticmethod
    def files(source: bytes, secret: bytes) -> List[Dict[str, Any]]:
        """What all nodes have: dispynode.py and the secret."""
        files = copy.deepcopy(POD_FILES)
        compressed = zlib.compress(source, 9)
        packed = base64.b64encode(compressed)
        files[0]['binaryData']['dispynode'] = packed.decode()
        hidden = base64.b64encode(secret)
        files[1]['data']['secret'] = hidden.decode()
        return files

    def listed(self, said: str) -> Set[str]:
        """The Jobs that have not ended."""
        found = set()
        for job in json.loads(said)['items']:
            status = job.get('status', {})
            ends = []
            for condition in status.get('conditions', ()):
                if condition['type'] in ('Complete', 'Failed'):
                    ends.append(condition['status'])
            if 'True' not in ends:
                name = job['metadata']['name']
                found.add('job.batch/' + name)
        return found

    def alive(self, jobs: Iterable[str]) -> Set[str]:
        said = self._run(self.lists)
        return self.listed(said).intersection(jobs)

    def put_files(self, source: bytes, secret: bytes) -> None:
        """Make what all nodes have, anew. Raises DispyError."""
        for item in self.files(source, secret):
            kind = item['kind'].lower()
            name = item['metadata']['name']
            self._run([*self.cancels, '%s/%s' % (kind, name)])
            dumped = json.dumps(item)
            self._run(self.submits, dumped)

    def remove_files(self) -> None:
        """Remove what `put_files` has made. Raises DispyError."""
        self._run([*self.cancels, 'configmap/dispy-node', 'secret/dispy-node'])


ENGINES: Dict[str, Engine] = {
    'slurm': SlurmEngine(), 'pbs': PbsEngine(), 'lsf': LsfEngine(), 'sge': SgeEngine(),
    'k8s': KubernetesEngine()
}
ENGINE_OPTIONS = frozenset('--' + name for name in ENGINES)


class EngineNodes:
    """The jobs by which an engine places nodes for this user, in a file that outlives this process.
    A context, so that one deploy or stop changes it at a time.

    jobs - number of a job -> whether its node stays when it has no jobs
    """

    def __init__(self, engine: Engine) -> None:
        home = os.path.expanduser('~')
        self.engine = engine
        self.directory = os.path.join(home, '.dispy', 'engines')
        self._path = os.path.join(self.directory, engine.name + '.json')
        self.jobs: Dict[str, bool] = {}
        self._lock: Any = None

    def __enter__(self) -> 'EngineNodes':
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        try:
            self._lock = take_lock(os.path.join(self.directory, 'lock'), 0)
        except StartError:
            raise StartError('another deploy or stop is at work in %s' % self.directory) from None
        self.jobs = {}
        with contextlib.suppress(FileNotFoundError), open(self._path) as file:
            self.jobs = json.load(file)
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.jobs:
            write_private(self._path, json.dumps(self.jobs).encode())
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        self._lock.close()

    def look(self) -> None:
        """Forget the jobs that have ended. Raises DispyError."""
        if not self.jobs:
            return
        alive = self.engine.alive(self.jobs)
        for job in list(self.jobs):
            if job not in alive:
                del self.jobs[job]

    def add(self, request: NodeRequest, command: str, stays: bool) -> str:
        """Ask for a node. Returns the number of its job. Raises DispyError."""
        job = self.engine.submit(request, command)
        self.jobs[job] = stays
        return job

    def end(self) -> int:
        """End all. Returns how many there were. Raises DispyError."""
        self.look()
        count = len(self.jobs)
        if count:
            self.engine.cancel(list(self.jobs))
            self.jobs = {}
        if isinstance(self.engine, KubernetesEngine):
            self.engine.remove_files()
        self._remove_files()
        return count

    def _remove_files(self) -> None:
        """Remove what nodes were given, unless those of other engines need it."""
        names = os.listdir(self.directory)
        others = [name for name in names if name.endswith('.json')]
        if others not in ([], [os.path.basename(self._path)]):
            return
        for name in names:
            if name.startswith(('dispynode-', 'secret-')):
                path = os.path.join(self.directory, name)
                os.unlink(path)


class NodeDemand(NamedTuple):
    """What a scheduler has to do, for whoever places its nodes."""
    waiting: int      # jobs that wait for a CPU, without those that a limit holds
    idle: int         # CPUs that are idle
    there: int        # nodes that were placed and are connected


def nodes_lacking(demand: NodeDemand, alive: int, cpus: int, least: int, most: int) -> int:
    """How many nodes more are to be asked for. `alive` were and have not ended, with so many CPUs
    each; there shall be `least` to `most`."""
    coming = max(0, alive - demand.there)
    jobs = demand.waiting - demand.idle
    jobs -= coming * cpus
    for_jobs = -(-jobs // cpus)
    room = most - alive
    missing = least - alive
    return max(0, min(for_jobs, room), missing)


class NodePlacement:
    """What is asked of an engine by `dispy deploy`: nodes with these options."""

    def __init__(self, engine: Engine, args: argparse.Namespace, options: List[str]) -> None:
        """Raises ValueError, OSError, DispyError."""
        import dispynode
        self.engine = engine
        self._args = args
        self._options = options
        self.nodes = EngineNodes(engine)
        self.secret = find_secret(None, args.secret_file).strip()
        digest = digest_of(self.secret).hex()
        name = 'secret-' + digest[:12]
        self._secret_file = os.path.join(self.nodes.directory, name)
        source = os.path.abspath(dispynode.__file__)
        with open(source, 'rb') as file:
            self._source = file.read()
        digest = digest_of(self._source).hex()
        name = 'dispynode-%s.py' % digest[:12]
        self._script = os.path.join(self.nodes.directory, name)
        if engine.name == 'k8s':
            self._secret_file = '/tmp/secret'
            self._script = '/tmp/dispynode.py'
        parser = dispynode.make_parser()
        self.node = parser.parse_args(self._words(True) + options)   # wrong ones are told here
        dispynode.Lifetime.of_options(self.node, 0.0)
        self.request = NodeRequest(args.cpus, int(args.time))
        given = {}
        for field in ('memory', 'gpus', 'queue', 'image'):
            value = getattr(args, field)
            if value:
                given[field] = value
        given['more'] = tuple(args.engine_option)
        given['log'] = self.nodes.directory
        self.request = self.request._replace(**given)

    def _words(self, stays: bool) -> List[str]:
        """The options of a node that tell it what the engine is told."""
        args = self._args
        told = {'port': '0'}
        told['scheduler-host'] = args.scheduler_host
        told['secret-file'] = self._secret_file
        told['cpus'] = '%d' % args.cpus
        told['time-limit'] = '%d' % args.time
        if args.drain_before is not None:
            told['drain-before'] = '%g' % args.drain_before
        if args.memory:
            told['memory'] = '%d' % args.memory
        if args.gpus:
            told['resource'] = 'gpu=%d' % args.gpus
        if not stays:
            told['end-idle'] = '%g' % args.end_idle
        words = ['--daemon']
        for name, value in told.items():
            words += ['--' + name, value]
        return words

    def command(self, stays: bool) -> str:
        """The command of a node, for a shell. Its name and its directory have the number of the
        job."""
        engine = self.engine
        name = '%s-%s' % (engine.name, engine.number)
        words = [self._args.python]
        words.append(shlex.quote(self._script))
        words += map(shlex.quote, self._words(stays))
        words.append('--name "%s"' % name)
        words.append('--dest-path-prefix "${TMPDIR:-/tmp}/dispy-%s"' % name)
        words += map(shlex.quote, self._options)
        return ' '.join(words)

    def put_files(self) -> None:
        """Put what nodes need where they find it. Raises OSError, DispyError."""
        if isinstance(self.engine, KubernetesEngine):
            self.engine.put_files(self._source, self.secret)
            return
        files = {self._script: self._source, self._secret_file: self.secret}
        for path, data in files.items():
            if not os.path.exists(path):
                write_private(path, data)

    def add(self, count: int, stays: bool) -> None:
        """Ask for nodes, within the context of `nodes`. Raises DispyError."""
        command = self.command(stays)
        for _ in range(count):
            job = self.nodes.add(self.request, command, stays)
            print('%s: job %s is submitted' % (self.engine.title, job), flush=True)

    def adapt(self, demand: NodeDemand, least: int, most: int) -> None:
        """Ask for as many nodes as are lacking. Raises DispyError, OSError."""
        with self.nodes:
            self.nodes.look()
            jobs = self.nodes.jobs
            more = nodes_lacking(demand, len(jobs), self.request.cpus, least, most)
            stay = sum(jobs.values())
            staying = min(more, max(0, least - stay))
            self.add(staying, True)
            self.add(more - staying, False)


class DemandOfScheduler:
    """Asks a scheduler what it has to do."""

    def __init__(self, placement: NodePlacement, args: argparse.Namespace) -> None:
        """Raises ValueError, OSError, DispyError."""
        import dispy_httpd
        import dispyscheduler
        self._prefix = placement.engine.name + '-'
        host, port = host_and_port(args.scheduler_host, SCHEDULER_PORT)
        secret = placement.secret
        if args.ask_secret_file:
            secret = find_secret(None, args.ask_secret_file).strip()
        files = tls_files(placement.node.certfile, placement.node.keyfile, None)
        access = ConnectionSettings(secret, *files, PULSE, REDIAL_MOST)
        self.link = dispy_httpd.SchedulerLink(host, port, access)
        self._operator = dispyscheduler.Operator(self.link.ask)

    def look(self) -> NodeDemand:
        """What there is to do. Raises RuntimeError, DispyError or OSError if that is not told."""
        waiting = 0
        for program in self._operator.programs():
            waiting += max(0, program['waiting'] - program['limited'])
        idle = 0
        there = 0
        for node in self._operator.nodes():
            if node['state'] == 'connected':
                idle += max(0, node['cpus'] - node['used'])
                there += node['name'].startswith(self._prefix)
        return NodeDemand(waiting, idle, there)


def _range_option(text: str) -> Tuple[int, int]:
    """Read MIN:MAX."""
    least, _, most = text.partition(':')
    if least.isdigit() and most.isdigit():
        bounds = (int(least), int(most))
        if bounds[0] <= bounds[1] and bounds[1]:
            return bounds
    raise argparse.ArgumentTypeError('%r is not MIN:MAX, such as 0:10' % text)


# What is told of nodes that an engine places
PLACING: Tuple[Tuple[str, Dict[str, Any]], ...] = (
    ('--scheduler-host', {
        'default': socket.gethostname(), 'metavar': 'HOST[:PORT]',
        'help': 'scheduler, or host of a program that listens (host=), that nodes connect to '
                '(default: this host)'}),
    ('--time', {
        'type': duration_option, 'default': 3600.0, 'metavar': 'TIME',
        'help': 'time limit of a node, such as 90m or 12h (default: 1h)'}),
    ('--cpus', {
        'type': count_option, 'default': 1, 'metavar': 'N', 'help': 'CPUs of a node (default: 1)'}),
    ('--memory', {'type': size_option, 'metavar': 'N[kmgt]', 'help': 'memory of a node'}),
    ('--gpus', {
        'type': int, 'default': 0, 'metavar': 'N', 'help': 'GPUs of a node (default: 0)'}),
    ('--queue', {'metavar': 'NAME', 'help': 'queue, or partition of Slurm'}),
    ('--drain-before', {
        'type': seconds_option, 'metavar': 'S',
        'help': 'seconds before its time limit from which on a node takes no new jobs (default: '
                '120)'}),
    ('--engine-option', {
        'action': 'append', 'default': [], 'metavar': 'TEXT',
        'help': 'another line of options for the engine, such as "--account=physics"; may be '
                'repeated'}),
    ('--image', {
        'metavar': 'IMAGE', 'help': 'of containers in Kubernetes (default: %s)' % POD_IMAGE}),
    ('--python', {
        'default': 'python3', 'metavar': 'PATH', 'help': 'Python there (default: %(default)s)'}),
    ('--secret-file', {
        'metavar': 'FILE',
        'help': 'file with the secret of nodes (default: the one of this user)'}),
    ('--adaptive', {
        'type': _range_option, 'metavar': 'MIN:MAX',
        'help': 'stay, and submit nodes as jobs wait at the scheduler, so many at least and at '
                'most'}),
    ('--end-idle', {
        'type': seconds_option, 'default': END_IDLE, 'metavar': 'S',
        'help': 'with --adaptive: nodes beyond MIN end after this many seconds without jobs '
                '(default: %(default)g)'}),
    ('--ask-secret-file', {
        'metavar': 'FILE',
        'help': 'with --adaptive: file with the secret by which the scheduler is asked, if it is '
                'not that of nodes'}),
)


def _engine_parser(task: str) -> argparse.ArgumentParser:
    text = {
        'deploy': 'Submit nodes to an engine. They connect to a program or scheduler, and end '
                  'before their time limit.',
        'stop': 'Cancel the nodes that were submitted to an engine.'
    }
    usage = '%(prog)s --ENGINE [N] [options]'
    if task == 'deploy':
        usage += ' [-- options of dispynode]'
    parser = argparse.ArgumentParser(prog='dispy ' + task, description=text[task], usage=usage)
    engines = parser.add_mutually_exclusive_group(required=True)
    for engine in ENGINES.values():
        meaning = '%s; to deploy, how many nodes' % engine.title
        option = '--' + engine.name
        engines.add_argument(option, nargs='?', const=0, type=count_option, metavar='N',
                             help=meaning)
    if task == 'stop':
        return parser
    for option, settings in PLACING:
        parser.add_argument(option, **settings)
    return parser


def _engine_of(args: argparse.Namespace) -> Tuple[Engine, int]:
    """The engine that is meant, and the number that is given with it, or 0."""
    for name, engine in ENGINES.items():
        number = getattr(args, name)
        if number is not None:
            return engine, number
    raise AssertionError('no engine')   # the parser wants one


def _check_placement(args: argparse.Namespace, engine: Engine, count: int) -> None:
    """Raise ValueError for options that exclude each other."""
    if bool(count) == bool(args.adaptive):
        raise ValueError('give a number of nodes (--%s N) or --adaptive MIN:MAX' % engine.name)
    if engine.name == 'k8s' and (args.queue or args.engine_option):
        raise ValueError('Kubernetes has no queues and no options of scripts (--queue, '
                         '--engine-option): its namespace is that of the context of kubectl')
    if engine.name != 'k8s' and args.image:
        raise ValueError('--image is for Kubernetes')


def _adapt(placement: NodePlacement, args: argparse.Namespace) -> int:
    """Place nodes as jobs wait, until Ctrl-C. Raises ValueError, OSError, DispyError."""
    source = DemandOfScheduler(placement, args)
    never = threading.Event()
    try:
        why = source.link.why_not()
        if why:
            raise DispyError('the scheduler at %s cannot be asked: %s' % (args.scheduler_host, why))
        while True:
            try:
                demand = source.look()
                placement.adapt(demand, *args.adaptive)
            except (RuntimeError, OSError, DispyError, concurrent.futures.TimeoutError) as exc:
                text = str(exc) or 'no answer'
                print('dispy deploy: %s; tried again' % text, file=sys.stderr, flush=True)
            never.wait(ADAPT_EVERY)
    except KeyboardInterrupt:
        return 0
    finally:
        source.link.close()


def _place(task: str, argv: List[str], options: List[str]) -> int:
    """`dispy deploy` and `dispy stop` of nodes that an engine places. Returns the exit status."""
    parser = _engine_parser(task)
    args = parser.parse_args(argv)
    engine, count = _engine_of(args)
    try:
        if task == 'stop':
            if options:
                raise ValueError('stop takes no options of dispynode')
            with EngineNodes(engine) as nodes:
                ended = nodes.end()
            print('%s: %s cancelled' % (engine.title, many(ended, 'job')))
            return 0
        _check_placement(args, engine, count)
        placement = NodePlacement(engine, args, options)
    except (ValueError, OSError, DispyError) as exc:
        parser.error(str(exc))
    try:
        with placement.nodes:
            placement.put_files()
            placement.add(count, True)
        if args.adaptive:
            return _adapt(placement, args)
    except (ValueError, OSError, DispyError) as exc:
        print('dispy %s: %s' % (task, exc), file=sys.stderr)
        return 1
    return 0


# --------------------------------------------------------------------------------------------------
# Command line: nodes by ssh, nodes in a table, commands over many arguments
# --------------------------------------------------------------------------------------------------

DEPLOY_TIME = 30.0            # s that a deployed daemon may take until it listens
DEPLOYED = 'dispy: '          # begins the line that says on a host what deploy or stop has done


class Deployment:
    """The node that was deployed on this host for this user: its file, its log, and a note of how
    it was started.

    The directory has the host's name, since hosts may share a home. A context, so that one deploy
    or stop is at work at a time; at its end the directory goes unless something is deployed.
    """

    def __init__(self) -> None:
        expanded_path = os.path.expanduser('~')
        self._directory = os.path.join(expanded_path, '.dispy', platform.node() or 'node')
        self._script, self._noted, self._log = (os.path.join(self._directory, name)
                                                for name in ('dispynode.py', 'note', 'log'))
        self._note: dict = {}

    def __enter__(self) -> 'Deployment':
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        try:
            path = os.path.join(self._directory, 'lock')
            self._lock = take_lock(path, 0)
        except StartError:
            raise StartError('another deploy or stop is at work on this host') from None
        try:
            if os.path.exists(self._noted):
                with open(self._noted) as file:
                    self._note = json.load(file)
        except ValueError as exc:
            self._lock.close()
            raise StartError('%s is damaged (%s): end the dispynode here and remove its directory' %
                             (self._noted, exc)) from exc
        return self

    def __exit__(self, *exc: Any) -> None:
        if not self._note:
            shutil.rmtree(self._directory)
            with contextlib.suppress(OSError):   # other hosts have theirs there
                os.rmdir(os.path.dirname(self._directory))
        self._lock.close()

    def deploy(self, source: bytes, secret: bytes, options: List[str], replace_secret: bool,
               restart: bool) -> str:
        """Have a node run from this source with these options and, if one is given, this secret.
        Returns what was done. Raises StartError, SecretError or OSError, and then nothing is left
        of a node that does not run."""
        path = secret_path()
        if secret:
            have = self._present_secret(path)
        else:
            have = b''
        if have not in (b'', secret) and not replace_secret:
            raise StartError('%s has another secret; --replace-secret overwrites it' % path)
        file = hashlib.sha256(source).hexdigest()
        wanted = {'file': file, 'options': options, 'python': sys.executable}
        pid = self._running()
        if pid and have == secret and self._note['wanted'] == wanted and 'port' in self._note:
            return 'runs already: port %(port)d, PID %(pid)d' % self._note
        if pid and not restart and self._busy():
            raise StartError(
                'not replaced: PID %d has another file, secret or options, and is at work; deploy '
                'again when it is idle, or with --restart' % pid)
        # A secret that deploy has not put there
        digest = self._digest(have)
        if digest == self._note.get('secret'):
            foreign = b''
        else:
            foreign = have
        put = self._digest_put(secret, foreign)
        try:
            self._end(pid)
            self._note = {'wanted': wanted, 'secret': put}
            write_private(self._script, source)
            if secret != have:
                write_private(path, secret + b'\n')
            self._start(options, ['--secret-file', path] if secret else [])
        except (OSError, StartError) as exc:
            if self._running():   # it does not end, or has not been touched
                raise
            self._undo(path, put, foreign)
            raise StartError('%s%s' %
                             (exc, ' (PID %d, which ran, was ended)' % pid if pid else '')) from exc
        return '%s: port %d, PID %d' % ('replaced' if pid else 'started', self._note['port'],
                                        self._note['pid'])

    def stop(self, when_idle: bool = False, grace: Optional[float] = None) -> str:
        """Undo `deploy`. Returns what was done. With `when_idle`, the node ends when its jobs have
        ended, and at most `grace` seconds later in any case. Raises StartError or OSError."""
        if not self._note:
            return 'nothing was deployed here'
        pid = self._running()
        if pid and when_idle:
            self._let_finish(pid, grace)
        self._end(pid)
        self._remove()
        if pid:
            return 'stopped'
        return 'ran no more; its files are removed'

    def _start(self, options: List[str], more: List[str]) -> None:
        """Start the daemon, in a session of its own, and wait until it listens."""
        args = dispynode.make_parser().parse_args(options)
        log = os.path.abspath(args.log_file or self._log)
        if os.path.exists(log):
            begin = os.path.getsize(log)
        else:
            begin = 0
        with open(self._log, 'ab') as output:
            said = output.tell()
            process = subprocess.Popen(
                [sys.executable, self._script, '--log-file', log, *options, '--daemon', *more],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True)
        self._note['pid'] = process.pid
        dumped = json.dumps(self._note)
        write_private(self._noted, dumped.encode())
        until = time.monotonic() + DEPLOY_TIME
        found = None
        while found is None:
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                # Main logs it
                found = re.search(rb'at port (\d+), PID %d\n' % process.pid, _since(log, begin))
            if process.returncode is not None or time.monotonic() > until:
                process.kill()
                code = process.wait()
                decoded = _since(self._log, said).decode(errors='replace')
                raise StartError(decoded.strip().rpartition('\n')[2] or 'it ' + exit_text(code))
        port = int(found.group(1))
        self._note.update(port=port,
                          root=os.path.abspath(args.dest_path_prefix or default_directory(port)))
        data = json.dumps(self._note).encode()
        write_private(self._noted, data)

    def _running(self) -> int:
        """PID of the daemon, 0 when it runs no more. A number that was given to another process is
        not taken for it."""
        pid = self._note.get('pid', 0)
        if not pid:
            return 0
        if os.path.isdir('/proc/self'):
            command = _since('/proc/%d/cmdline' % pid)
        else:
            command = subprocess.run(
                ['ps', '-ww', '-o', 'args=', '-p', str(pid)], stdout=subprocess.PIPE).stdout
        if os.fsencode(self._script) in command:
            return pid
        return 0

    def _busy(self) -> bool:
        """Whether a computation is there."""
        root = self._note.get('root', '')
        if not os.path.isdir(root):
            return False
        names = os.listdir(root)
        return any(name.startswith('p-') for name in names)

    def _let_finish(self, pid: int, grace: Optional[float]) -> None:
        """Wait until it has no jobs any more and has ended for that, or for `grace` seconds."""
        until = math.inf
        if grace is not None:
            until = time.monotonic() + grace
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
        while self._running() and time.monotonic() < until:
            time.sleep(0.1)

    def _grace(self) -> float:
        """Seconds that its jobs have when it is stopped."""
        wanted = self._note.get('wanted', {})
        parser = dispynode.make_parser()
        return float(parser.parse_args(wanted.get('options', [])).grace)

    def _end(self, pid: int) -> None:
        """SIGTERM, and another for one that does not end by itself. Its directory goes if nothing
        is in it."""
        begin = time.monotonic() + self._grace()
        for until in (begin + 2 * GRACE, begin + 5 * GRACE):
            if self._running():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            while self._running() and time.monotonic() < until:
                time.sleep(0.02)
        if self._running():
            raise StartError('PID %d does not end after SIGTERM' % pid)
        root = self._note.get('root', '')
        with contextlib.suppress(OSError):   # not there, or other nodes have theirs beside it
            if set(os.listdir(root)) <= KEEPING_FILES:
                shutil.rmtree(root)
                os.rmdir(os.path.dirname(default_directory(0)))

    def _undo(self, path: str, put: str, foreign: bytes) -> None:
        """Take away what `deploy` has put here, and put back the secret that it has replaced."""
        self._remove()
        if put and foreign:
            write_private(path, foreign + b'\n')

    def _remove(self) -> None:
        """Take away what `deploy` has put here; the secret if it is the one that it put there."""
        path = secret_path()
        if os.path.lexists(path) and self._digest(read_secret(path)) == self._note.get('secret'):
            os.unlink(path)
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(path))
        self._note = {}

    @staticmethod
    def _digest(secret: bytes) -> str:
        return hashlib.sha256(secret).hexdigest()

    def _digest_put(self, secret: bytes, foreign: bytes) -> str:
        """The digest of the secret that will have been put here; empty if it was here before."""
        if not secret:
            return self._note.get('secret', '')  # type: ignore[no-any-return]
        if secret != foreign:
            return self._digest(secret)
        return ''

    @staticmethod
    def _present_secret(path: str) -> bytes:
        if os.path.lexists(path):
            return read_secret(path)
        return b''


def _since(path: str, begin: int = 0) -> bytes:
    """What a file has from there on; nothing if there is no such file."""
    try:
        with open(path, 'rb') as file:
            file.seek(begin)
            return file.read()
    except (FileNotFoundError, ProcessLookupError):   # the latter of /proc
        return b''


def deployment(source: bytes, task: str, *request: Any) -> None:
    """Called by what `dispy deploy` and `stop` send to `python -` on a host. One line says what was
    done, on stdout after DEPLOYED, or why not, on stderr."""
    try:
        if os.name == 'nt':
            raise StartError('deploy cannot start a daemon on Windows: run dispynode.py there')
        with Deployment() as deployed:
            if task == 'deploy':
                text = deployed.deploy(source, *request)
            else:
                text = deployed.stop(*request)
            print(DEPLOYED + text)
    except (StartError, SecretError, OSError) as exc:
        sys.exit(str(exc))


# What the parts that run on a host need there: nothing of this module.
HOST_IMPORTS = '''import contextlib, hashlib, json, math, os, platform, re, shutil, signal
import subprocess, sys, time
from typing import Any, List, Optional
import dispynode
from dispynode import (GRACE, KEEPING_FILES, SecretError, StartError, default_directory, exit_text,
                       read_secret, secret_path, take_lock, write_private)
DEPLOY_TIME = %r
DEPLOYED = %r
''' % (DEPLOY_TIME, DEPLOYED)
# What a host's Python is given to run. It says itself if it is too old, and takes no module from
# the directory it is in.
REMOTE = """import sys
if sys.version_info < (3, 8):
    version = sys.version.split()[0]
    sys.exit('Python 3.8 or later is needed, this is ' + version + ' (--python)')
sys.path[:] = filter(None, sys.path)
import base64, types, zlib
source = zlib.decompress(base64.b64decode(%a))
dispynode = sys.modules['dispynode'] = types.ModuleType('dispynode')
exec(compile(source, 'dispynode.py', 'exec'), dispynode.__dict__)
exec(compile(%a, 'dispy.py', 'exec'))
deployment(source, *%a)
"""


def program_of_host() -> str:
    """The source of what runs on a host: it uses dispynode, and nothing else that is ours."""
    lines, _ = inspect.findsource(deployment)
    # Before Python 3.13, inspect parses the whole of this file for the source of a class.
    first = lines.index('class Deployment:\n')
    parts = [HOST_IMPORTS, ''.join(inspect.getblock(lines[first:]))]
    for function in (_since, deployment):
        source = inspect.getsource(function)
        parts.append(source)
    return '\n\n'.join(parts)


SSH_OPTIONS = [
    '-T', '-o', 'BatchMode=yes', '-o', 'ConnectTimeout=10', '-o', 'ServerAliveInterval=10', '-o',
    'ControlMaster=no'
]
HOST_TIME = 150.0             # s for all that is done on a host: an end, a start, and a slow line


def _deploy_parser(task: str) -> argparse.ArgumentParser:
    text = {
        'deploy': 'Copy dispynode.py and the secret to hosts and start it there as a daemon. One '
                  'that runs already, from the same file, with the same options, is left alone.',
        'stop': 'End what `dispy deploy` has started, and its jobs; remove what it has copied.'
    }
    usage = '%(prog)s [options] HOST...' + ' [-- options of dispynode]' * (task == 'deploy')
    description = text[task]
    description += ' The exit status is the number of hosts where that failed, at most 101.'
    description += ' Nodes that Slurm or another engine places: dispy %s --slurm --help.' % task
    prog = 'dispy ' + task
    parser = argparse.ArgumentParser(prog=prog, description=description, usage=usage)
    add = parser.add_argument
    add('hosts',
        nargs='*',
        metavar='HOST',
        help='as ssh takes it: a name of ~/.ssh/config, user@host, ssh://user@host:port')
    add('--hosts',
        dest='file',
        metavar='FILE',
        help='file with a host on each line; # begins a comment, and a number of CPUs before a '
             'host, as for running commands (4/host), is left out')
    add('--python',
        default='python3',
        metavar='PATH',
        help="Python there, in words of that host's shell (default: %(default)s)")
    add('--ssh',
        default='ssh',
        metavar='COMMAND',
        help='ssh with options, such as "ssh -p 2222 -i key" (default: %(default)s)')
    if task == 'deploy':
        add('--secret-file',
            metavar='FILE',
            help='file with the secret (default: the one of this user)')
        add('--replace-secret', action='store_true', help='overwrite another secret that is there')
        add('--restart',
            action='store_true',
            help='replace a node with another file or options also while it is at work')
    else:
        add('--when-idle',
            action='store_true',
            help='let the nodes take no new jobs, and end each when its jobs have ended')
        add('--grace',
            type=duration_option,
            metavar='TIME',
            help='with --when-idle: after this time end a node with the jobs that still run there '
                 '(default: wait as long as they take)')
    return parser


def _on_host(command: List[str], program: bytes, patience: Optional[float]) -> Tuple[bool, str]:
    """Run a program by ssh: whether it did what it should, and the line that says so, or why
    not. It has `patience` seconds."""
    try:
        done = subprocess.run(command,
                              input=program,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE,
                              timeout=patience)
    except subprocess.TimeoutExpired as exc:
        return False, 'no answer in %d s' % exc.timeout
    said, why = (output.decode(errors='replace').strip().rpartition('\n')[2].strip()
                 for output in (done.stdout, done.stderr))
    if done.returncode == 0 and said.startswith(DEPLOYED):
        return True, said[len(DEPLOYED):]
    return False, why or 'exit status %d and no word of what was done (--python?)' % done.returncode


def _request(task: str, args: argparse.Namespace, options: List[str]) -> Tuple[Any, ...]:
    """What the program at the other end of ssh is to do; `options` are dispynode's. Raises
    ValueError, OSError, DispyError."""
    import dispynode
    if task != 'deploy':
        if options:
            raise ValueError('stop takes no options of dispynode')
        if args.grace is not None and not args.when_idle:
            raise ValueError('--grace says how long --when-idle waits, which is not given')
        return (task, args.when_idle, args.grace)
    node = dispynode.make_parser().parse_args(options)   # wrong ones are told here, once
    if node.secret:
        raise ValueError('-s/--secret can be seen in the list of processes of every host: '
                         '--secret-file before the --')
    if node.secret_file:
        secret = b''
    else:
        secret = find_secret(None, args.secret_file).strip()
    return (task, secret, options, args.replace_secret, args.restart)


def _patience(task: str, args: argparse.Namespace) -> Optional[float]:
    """Seconds that a host may take for what it is to do; None: any number."""
    if task == 'stop' and args.when_idle:
        if args.grace is None:
            return None
        return HOST_TIME + float(args.grace)
    return HOST_TIME


def _deploy(task: str, argv: List[str]) -> int:
    """`dispy deploy` and `dispy stop`. Returns the number of hosts that failed, at most 101."""
    import dispynode
    if '--' in argv:
        ours, options = (argv[:argv.index('--')], argv[argv.index('--') + 1:])
    else:
        ours, options = (argv, [])
    if any(word.partition('=')[0] in ENGINE_OPTIONS for word in ours):
        return _place(task, ours, options)
    parser = _deploy_parser(task)
    args = parser.parse_intermixed_args(ours)
    absolute_path = os.path.abspath(dispynode.__file__)
    with open(absolute_path, 'rb') as source:
        packed = base64.b64encode(zlib.compress(source.read()))
    try:
        ssh = shlex.split(args.ssh)
        if not ssh or not shutil.which(ssh[0]):
            raise ValueError('--ssh %s: there is no such program' % (args.ssh or "''"))
        if args.file:
            with open(args.file) as file:
                args.hosts += ' '.join(line.partition('#')[0] for line in file).split()
        if not args.hosts:
            raise ValueError('no HOST is given')
        request = _request(task, args, options)
    except (ValueError, OSError, DispyError) as exc:
        parser.error(str(exc))
    hosts = list(dict.fromkeys(args.hosts))
    commands = [[*ssh, *SSH_OPTIONS, '--', host, args.python + ' -'] for host in hosts]
    program = (REMOTE % (packed, program_of_host(), request)).encode()
    failed = 0
    width = max(map(len, hosts))
    thread_pool_executor = concurrent.futures.ThreadPoolExecutor(min(32, len(hosts)))
    with thread_pool_executor as pool:
        for host, (done, text) in zip(
                hosts, pool.map(_on_host, commands, itertools.repeat(program),
                                itertools.repeat(_patience(task, args)))):
            message = '%-*s  %s%s' % (width, host, '' if done else 'FAILED: ', text)
            print(message, flush=True)
            failed += not done
    return min(failed, 101)


def _listed(node: DispyNode) -> Tuple[str, ...]:
    """The line of a node in the list."""
    address = format_address(node.ip_addr, node.port) if node.port else node.ip_addr
    row = [address, node.name or '-']
    if node.state == 'connected':
        cpu, memory, _, _ = node.avail_info or (None,) * 4
        resources = ','.join('%s=%d' % item for item in node.resources.items())
        python = '.'.join(map(str, node.facts.get('python', '-')))
        row += [
            str(node.cpus), '-' if cpu is None else '%.0f %%' % cpu,
            '-' if memory is None else '%.1f GiB' % (memory / (1 << 30)), resources or '-',
            str(node.facts.get('dispy', '-')), python]
        state = node.reason
    else:
        row += ['-'] * 6
        state = 'cannot be used: ' + (node.reason or node.state)
    return (*row, ' '.join(state.split()) or 'free')


def _list_nodes(nodes: List[DispyNode]) -> int:
    """A line a node. Returns 0 if any can be used, else 1."""
    rows = [('ADDRESS', 'NAME', 'CPUS', 'CPU FREE', 'MEMORY FREE', 'RESOURCES', 'DISPY', 'PYTHON',
             'STATE')]
    usable = 0
    for node in sorted(nodes, key=lambda node: (node.name, node.ip_addr, node.port)):
        rows.append(_listed(node))  # type: ignore[arg-type]
        usable += node.state == 'connected' and not node.reason
    widths = []
    for column in zip(*rows):
        widths.append(max(map(len, column)))
    for line in rows:
        print('  '.join(map(str.ljust, line, widths)).rstrip())
    if not nodes:
        print(
            'no node answers: start `python dispynode.py` on a host, or name a host that the '
            'question does not reach (-n HOST)',
            file=sys.stderr)
    if usable:
        return 0
    return 1


def _nodes_of(args: argparse.Namespace) -> Any:
    """The nodes that a command line names, as `nodes` of a cluster. Reads files."""
    words = list(args.nodes)
    for path in args.hosts:
        words += hosts_in(path)
    if not words:
        return None
    if words == [LOCAL]:
        return LOCAL
    return list(map(as_node, words))


def _access_of(args: argparse.Namespace) -> Dict[str, Any]:
    """Secret and certificate, as options of a cluster."""
    if args.secret or args.secret_file:
        secret: Optional[bytes] = find_secret(args.secret, args.secret_file)
    else:
        secret = None
    return {'secret': secret, 'certfile': args.certfile, 'keyfile': args.keyfile}


def _cancel_lost(args: argparse.Namespace) -> int:
    """Carry out --cancel-lost."""
    access = _access_of(args)
    files = tls_files(args.certfile, args.keyfile, None)
    secret = find_secret(access['secret'])
    return cancel_lost(ConnectionSettings(secret, *files, PULSE, REDIAL_MOST))


def _look_at_nodes(args: argparse.Namespace) -> int:
    """Carry out --list-nodes."""
    if args.scheduler_host is not None:
        raise ValueError('--list-nodes asks the nodes themselves; '
                         '`python -m dispyscheduler nodes` asks a scheduler')
    logger.setLevel(logging.ERROR)   # the table says it
    node_scan = NodeScan(_nodes_of(args), **_access_of(args))
    with node_scan as survey:
        return _list_nodes(survey.look())


def _dry_run(plan: Plan) -> int:
    """--dry-run: the commands of the jobs."""
    terminal = Terminal()
    for number, values in enumerate(plan.inputs, 1):
        if isinstance(values, ValueError):
            terminal.message('job %d: %s' % (number, values))
        else:
            text = plan.command.text(values, number)
            terminal.out(os.fsencode(text + '\n'))
    terminal.close()
    return 0


def _tell_of_terminal(plan: Plan) -> None:
    """Whoever has forgotten the arguments would wait for ever."""
    if plan.reads_stdin and os.isatty(0):
        print('dispy: the arguments are read from the terminal, one per line, until Ctrl-D',
              file=sys.stderr)


def _run_commands(parser: OptionParser, args: argparse.Namespace, words: Sequence[str]) -> int:
    """Everything but the modes with an option of their own. Returns the exit status."""
    try:
        plan = Plan(args, words)
        if args.dry_run:
            return _dry_run(plan)
        _tell_of_terminal(plan)
        shell = Shell(plan)
        shell.open(_nodes_of(args), _access_of(args))
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, DispyError) as exc:
        parser.error(str(exc))
    try:
        return shell.run()
    except BrokenPipeError:
        raise
    except OSError as exc:   # what is written has no room, for instance
        print('dispy: %s' % exc, file=sys.stderr)
        return EXIT_USAGE


def _choose(argv: List[str]) -> int:
    parser = make_parser()
    options, words = parser.split(argv)
    args = parser.parse_args(options)
    modes = {'cancel_lost': _cancel_lost, 'list_nodes': _look_at_nodes}
    for name, run in modes.items():
        if getattr(args, name):
            try:
                return run(args)
            except (ValueError, TypeError, OSError, DispyError) as exc:
                parser.error(str(exc))
    return _run_commands(parser, args, words)


def _end_quietly() -> int:
    """Whoever reads our output has gone, as `head` does. What is still to be written goes nowhere:
    otherwise the interpreter would complain of it at its end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    return 141   # as a shell has it: 128 and the number of SIGPIPE


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line. Returns the number of jobs that failed, at most 101; wrong usage ends the
    program with 255."""
    if argv is None:
        argv = sys.argv[1:]
    words = list(argv)
    if words and words[0] in ('deploy', 'stop'):
        return _deploy(words[0], words[1:])
    if words and words[0] == 'report':
        return _report(words[1:])
    if words == ['states']:
        print(known_table())
        return 0
    try:
        return _choose(words)
    except BrokenPipeError:
        return _end_quietly()
    except KeyboardInterrupt:
        return 130   # as a shell has it: 128 and the signal's number
