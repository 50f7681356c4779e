#!/usr/bin/env python3
"""The scheduler that lets several programs share nodes. Jobs survive the end of both.

Run `python dispyscheduler.py` on a host that programs and nodes can reach; programs use
`dispy.SharedJobCluster(compute, scheduler_host=HOST)`. It finds nodes itself (`-n HOST`, or by
asking the network); nodes that it cannot reach connect to it (`dispynode.py --scheduler-host
HOST`).

    programs               this process                                           nodes
    +--------+  frames   +------------------------------------------+   frames   +-----------+
    | driver | <=======> | accept threads   TLS and handshake       | <========> | dispynode |
    +--------+           |      | post()                            |            +-----------+
                         | main thread      Loop: links, timers     |
                         |      |           Schedule: decides       |
                         | State            SQLite, a transaction   |
                         |                  a turn                  |
                         +------------------------------------------+

For a program this is a node with unlimited CPUs, which stores the jobs that it gets; for nodes it
is a program with many computations. So it mostly consists of dispy's `Driver` and `Schedule`, and
this module connects both sides: `ClientComputation`, a program's computation, replaces a
JobCluster.

The life of a job here:
  1. `Jobs` of a program are noted and given to the Schedule.
  2. At the end of the turn the transaction is written; only then are the messages of the turn sent.
  3. The Schedule sends the job to a node; the program is told where the job is (`JobsAssigned`) and
     when it has begun (`Started`).
  4. The node's result is noted, sent to the program, and acknowledged to the node when it is on the
     disk.
  5. The program's Ack removes the result.
After `kill -9` and a restart, nodes and programs connect again and report what they hold; the rest
is on the disk.

Payloads are never opened: nothing that a user has sent, and nothing from the disk, is unpickled
here except with `open_plain`, which opens builtin values only.

Files this host needs: this one, dispy.py, dispynode.py, cloudpickle.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import concurrent.futures
import contextlib
import csv
import errno
import functools
import importlib
import ipaddress
import itertools
import hmac
import json
import logging
import math
import mmap
import os
import pickle
import re
import shutil
import shlex
import signal
import stat
import struct
import sys
import time
from typing import (
    Any, Callable, Deque, Dict, FrozenSet, Iterable, Iterator, List, NamedTuple, Optional, Sequence,
    Set, Tuple)

try:
    from dispy import Driver
except ImportError as exc:   # this file was copied alone, or with one of another release
    text = str(exc)
    if exc.name == 'dispy':
        text = ('dispyscheduler.py needs the files dispy.py and dispynode.py of the same release '
                'beside it, in %s (%s)')
        text %= (os.path.dirname(os.path.abspath(__file__)), exc)
    if __name__ == '__main__':
        sys.exit(text)
    raise ImportError(text, name=exc.name, path=exc.path) from exc

from dispy import ARGUMENTS_MOST, DEALLOCATED, HTTPD_PORT, NODES_PAGE, OF_JOBS, REDIAL_MOST
from dispy import REPORTS_APART
from dispy import Allocation, AssignmentState, CancelAsked, ConnectionSettings, Database, DispyNode
from dispy import EndedJobs, FailedJobs, HeldFiles, JobState, JobsAssigned, NodeChanged
from dispy import NodeConnection, NodeDrains
from dispy import NodeHad, NodeInfo, NodeLeft, NodeOffers, NodePolicy, NodeResults, NodeSpec
from dispy import NodeUse, NodeUser, Overview, PackedComputation, RulesChanged, Schedule
from dispy import ScheduledJob, SecondHad, SecondsOfUser, UserLoad, UserRule, UserRules
from dispy import WithdrawAsked
from dispy import cpus_of, has_ended, job_row, parse_nodes, python_at, shown_arguments
from dispy import shown_state
from dispynode import ASKED_FOR, BACKPRESSURE_BYTES, BATCH_BYTES, BUNDLE, BUNDLES, DIGEST_SIZE
from dispynode import ENDING_SIGNALS, EXIT_STATUSES, FOR_CODE, LAZY, NAME_MOST, NODE_PORT
from dispynode import OF_CLIENTS, ORPHAN_TIME, PAST_TIME, PROVISIONAL, PULSE, READS, RETURNED
from dispynode import SCHEDULER_PORT, ZOMBIE_TIME
from dispynode import Acceptor, Ack, AttemptHistory, Authenticated, Bye, Call, Cancel, ClientHello
from dispynode import Compute, CpusChanged, Digests, DispyError, Done, DropValue, Each, FilePiece
from dispynode import FileReceiver, FileStored, Holder, IncomingValue, Jobs, JobsReturned
from dispynode import KnownAttempts
from dispynode import Limit, Link, LinkBroken, Need, NodeHello, Notice, OptionParser, Outcome
from dispynode import Output, PeerError, Pulse, Purpose, Query, Ready, Reclaim, Refused, Results
from dispynode import Return, ReturnJobs, Role, Shutdown, SpoolSender, Started, StartError, Unfit
from dispynode import ServiceManager, ValueRequests, Values, Wrong
from dispynode import __version__, add_daemon_options, batches, check_name, daemon_parser
from dispynode import days_option
from dispynode import derive_key, digest_of, discovery_reach, file_digest, find_secret, has_place
from dispynode import host_and_port, in_parts, is_comp, leave_terminal, limit_values
from dispynode import listen_at_terminal, log_record_of, others_who
from dispynode import attempt_number, job_number, make_secret, may_reclaim, serial_of
from dispynode import minutes_option, needs, open_envelope, open_plain, open_regular, out_of_band
from dispynode import over_limit_here, pack_error, parse_arguments, pieces_of, plain_address
from dispynode import positive_number
from dispynode import read_secret, reason_of, refused_row, replaced, result_key, run_until_ended
from dispynode import save_config
from dispynode import seconds_option, set_up_log, shorten, size_of, size_option, take_own_directory
from dispynode import tell_obsolete, tls_files, unfit_row, unpack_error, with_size, write_private
from dispynode import write_stacks_on_signal

__all__ = ['main']   # the other names are for dispy's own modules

# --------------------------------------------------------------------------------------------------
# Constants and errors
# --------------------------------------------------------------------------------------------------

# The number of CPUs that programs are offered: so they send all their jobs here at once
UNLIMITED_CPUS = 1 << 20
# Bytes of waiting jobs' arguments that are kept in memory as well as on the disk
IN_MEMORY = 8 << 20
BYTES_OVERHEAD = 48   # bytes of memory that a bytes object needs in addition to its contents
FILE_BYTES = 64 * 1024   # size in bytes from which arguments and results are in files of their own
RETURN_TIME = 60.0            # s that jobs wait for their nodes to come back after a restart
REMOVED_MOST = 1000           # acknowledged results that may wait for their removal from the disk
# Seconds after which the waiting jobs of a program whose connection has ended are cancelled
GONE_TIME = 60.0
GONE_LOOKS = 1.0              # s between checks whether the process of such a program has ended
RETRY_TIME = 1.0              # s between attempts to write to a disk that was full
PAGE = 500                    # rows of an answer to a monitor at most
# Free bytes of the disk below which SQLite's log is emptied before each transaction
LOW_DISK = 64 << 20
PAGE_SIZE = 4096              # bytes of a page of SQLite's
REMOVED_AT_ONCE = 20          # results that one transaction removes while the disk is full
# Bytes of the disk that are reserved for the removal of obsolete data when it is full
RESERVE = 2 << 20
QUEUED_MOST = 16 << 30        # bytes of arguments of jobs that a program may have here
USERS_MOST = 1000             # users with secrets: a handshake tries all of these
USER_NAME = re.compile('[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}')
# Range of the half-life of the past use of a user, in hours: an hour to a week
HALF_LIVES = (1.0, 168.0)
LOCK_MOST = 4096              # characters of the path of a node's lock file
QUESTIONS_MOST = 64           # questions about a computation whose files have not arrived yet
COMPS_MOST = 256              # computations of one connection
SPECS_MOST = 10000            # nodes that a program may name
# Characters of the reason why a node is not used, if many nodes are listed
REASON_MOST = 2000

logger = logging.getLogger('dispyscheduler')


# --------------------------------------------------------------------------------------------------
# What is kept on the disk
# --------------------------------------------------------------------------------------------------

STATE_MARK = 'dispy-scheduler'   # the file that marks a directory as a scheduler's


class StoredValue(mmap.mmap):
    """A payload in a file, of which the system reads only the parts that are accessed. The file is
    deleted together with this object, unless it has been moved to its final place, which clears
    `path`."""
    path = ''

    def __del__(self) -> None:
        if self.path:
            with contextlib.suppress(OSError):   # it does not exist any more
                os.unlink(self.path)


def stored(path: str, is_own: bool = False) -> Any:
    """Return the contents of a file; a large file is mapped and not read yet. Raises OSError."""
    with open(path, 'rb') as file:
        # On Windows files cannot be moved or removed that are mapped
        size = os.fstat(file.fileno()).st_size
        if os.name == 'nt' or size <= LAZY:
            data = file.read()
            if is_own:
                os.unlink(path)
            return data
        value = StoredValue(file.fileno(), 0, access=mmap.ACCESS_READ)
    if is_own:
        value.path = path
    else:
        value.path = ''
    return memoryview(value)


def _place_of(pieces: Sequence[Any]) -> Optional[StoredValue]:
    """Return the file that contains a payload already, if there is one."""
    if len(pieces) != 1:
        return None
    if type(pieces[0]) is not memoryview:
        return None
    value = pieces[0].obj
    if isinstance(value, StoredValue) and value.path:
        return value
    return None


class OnDisk:
    """A destination for a value that comes in parts: a file that is written as the parts come, and
    that is flushed to the disk when the value is complete."""
    SYNC = 64 << 20    # bytes after which data is flushed, so that no flush takes long

    def __init__(self, path: str) -> None:
        """Create the file. Raises OSError."""
        self._path = path
        self._unsynced = 0
        self._file: Any = open(path, 'wb', buffering=0)

    def add(self, offset: int, data: Any) -> None:
        """Write a part, as InMemory does."""
        view = memoryview(data)
        self._unsynced += len(view)
        while view:
            view = view[self._file.write(view):]
        if self._unsynced >= self.SYNC:
            self._sync()

    def _sync(self) -> None:
        getattr(os, 'fdatasync', os.fsync)(self._file.fileno())
        self._unsynced = 0

    def whole(self) -> Any:
        """Return the value, as InMemory does. Raises OSError."""
        self._sync()
        self._file.close()
        return memoryview(stored(self._path, True))

    def drop(self) -> None:
        """Discard the value, as InMemory does."""
        self._file.close()
        with contextlib.suppress(OSError):   # it does not exist any more
            os.unlink(self._path)


class StoredValues(Values):
    """Values that are kept in files while their parts come."""

    def __init__(self, state: 'State') -> None:
        super().__init__('at the scheduler', logger)
        self._state = state

    def find_place(self, value: IncomingValue) -> Any:
        """Create a file for a value if the disk has room for it. Raises OSError."""
        promised = 0
        for other in self._coming.values():
            if other.place is not None:
                promised += other.total - other.seen
        return self._state.find_place(value.total, promised)


LargeFile = Tuple[int, str]   # the number of a job, and 'p' for its arguments or 'r' for its result


class DiskReserve:
    """Space on the disk that a file occupies and that is released when the disk is full, so that
    obsolete data can be removed: SQLite needs space for that too."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._path = os.path.join(root, 'reserve')
        self._is_there = os.path.exists(self._path)

    @property
    def size(self) -> int:
        """The size of the file: RESERVE, or less on a small disk."""
        usage = shutil.disk_usage(self._root)
        return min(RESERVE, usage.total // 16)

    def free(self) -> int:
        """Return how many bytes of the disk are free."""
        return shutil.disk_usage(self._root).free

    def keep(self) -> None:
        """Create the file if there is ample room for it."""
        if self._is_there:
            return
        size = self.size
        try:
            if self.free() > 4 * size:
                with open(self._path, 'wb') as file:
                    file.write(bytes(size))
                self._is_there = True
        except OSError as exc:
            logger.debug('%s: %s', self._path, exc)

    def give_up(self) -> None:
        """Delete the file if others have filled the disk."""
        if self.free() < self.size:
            # It does not exist any more, or a process has it open
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            self._is_there = os.path.exists(self._path)


class LargeFiles:
    """The files of large arguments and results: a directory with NUMBER.p and NUMBER.r.

    directory - where they are
    numbers - of the jobs that have files there
    has_gone - whether there are files that are not needed after the next transaction
    """
    NEW = 'new-'   # the prefix of values that are incomplete

    def __init__(self, directory: str) -> None:
        """Create the directory. Raises OSError."""
        self.directory = directory
        self.numbers: Set[int] = set()
        # To be written before the next transaction
        self._pending: Dict[LargeFile, Sequence[Any]] = {}
        # Jobs whose files are not needed after the next transaction
        self._gone: List[int] = []
        # Paths of such files that cannot be removed yet
        self._stuck: List[str] = []
        self._new_values = itertools.count(1)
        os.makedirs(directory, mode=0o700, exist_ok=True)

    @property
    def has_gone(self) -> bool:
        """Return whether there are files that are not needed after the next transaction."""
        return bool(self._gone)

    @property
    def has_pending(self) -> bool:
        """Return whether there are files that are not written yet."""
        return bool(self._pending)

    def path(self, number: int, end: str) -> str:
        """Return the path of a file. `end` is 'p' for arguments and 'r' for a result."""
        name = '%d.%s' % (number, end)
        return os.path.join(self.directory, name)

    def find(self, knows: Callable[[int], bool]) -> None:
        """Find the files of the jobs for which `knows` is true, and delete what an earlier run has
        left. Raises OSError."""
        for name in os.listdir(self.directory):
            number, _, end = name.partition('.')
            came = number.startswith(self.NEW) and end == 'part'   # when the last run ended
            if not came:
                # It is not one of these files
                if not number.isdigit():
                    continue
                if end not in ('p', 'r', 'p.part', 'r.part'):
                    continue
                if end in ('p', 'r') and knows(int(number)):
                    self.numbers.add(int(number))
                    continue
            os.unlink(os.path.join(self.directory, name))

    def new_place(self) -> OnDisk:
        """Create a file for a value that comes in parts. Raises OSError."""
        number = next(self._new_values)
        name = '%s%d.part' % (self.NEW, number)
        return OnDisk(os.path.join(self.directory, name))

    def add(self, number: int, end: str, pieces: Sequence[Any]) -> None:
        """Note a file that is to be written before the next transaction."""
        self._pending[number, end] = pieces

    def payload(self, number: int) -> Any:
        """Return the arguments of a job. Raises OSError."""
        pieces = self._pending.get((number, 'p'))
        if pieces is None:
            return stored(self.path(number, 'p'))
        if len(pieces) == 1:
            return pieces[0]
        return b''.join(pieces)

    def size(self, number: int) -> Optional[int]:
        """Return the size of the arguments of a job, None if they are not in a file. Raises
        OSError."""
        if (number, 'p') in self._pending:
            return size_of(tuple(self._pending[number, 'p']))
        if number in self.numbers:
            return os.path.getsize(self.path(number, 'p'))
        return None

    def bytes_pending(self) -> int:
        """Return how many bytes are to be written and are not on the disk yet."""
        total = 0
        for pieces in self._pending.values():
            if _place_of(pieces) is None:
                total += size_of(tuple(pieces))
        return total

    def drop(self, number: int) -> None:
        """Note that the arguments of a job are not needed any more."""
        self._pending.pop((number, 'p'), None)
        if number in self.numbers:
            self._gone.append(number)

    def remove(self, numbers: FrozenSet[int]) -> None:
        """Note that the files of these jobs are not needed any more."""
        for key in list(self._pending):
            if key[0] in numbers:
                del self._pending[key]
        if self.numbers:
            self._gone += self.numbers & numbers

    def write(self) -> None:
        """Write what is to be written before the next transaction. Raises OSError."""
        for (number, end), pieces in list(self._pending.items()):
            self._keep(self.path(number, end), pieces)
            self.numbers.add(number)
            del self._pending[number, end]

    @staticmethod
    def _keep(path: str, pieces: Sequence[Any]) -> None:
        value = _place_of(pieces)
        if value is not None:   # it is on the disk
            os.replace(value.path, path)
            value.path = ''
            return
        with replaced(path) as temporary, open(temporary, 'wb') as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())

    def unlink_gone(self) -> None:
        """Delete the files that are not needed any more. A file that cannot be deleted, for example
        because a virus scanner has it open on Windows, is deleted with the next ones."""
        paths = self._stuck
        for number, end in itertools.product(self._gone, 'pr'):
            path = self.path(number, end)
            paths.append(path)
        self._stuck = []
        self.numbers.difference_update(self._gone)
        self._gone = []
        for path in paths:
            try:
                os.unlink(path)
            except FileNotFoundError:
                continue
            except OSError as exc:
                logger.debug('%s cannot be deleted yet: %s', path, exc)
                self._stuck.append(path)


class HistoryDatabase(Database):
    """The part of the state that contains jobs which have ended, for accounting."""
    ACCOUNT: int
    HISTORY: int
    HISTORY_OVER: int
    _newest: Iterator[int]         # yields their numbers
    _accounts: Dict[str, int]      # computation -> its number

    def account(self, computation: 'ClientComputation') -> int:
        """Return the number of a computation in the history, to which it is added if it is new."""
        place = self._accounts.get(computation.comp)
        if place is None:
            place = next(self._newest)
            self._accounts[computation.comp] = place
            self.note(self.ACCOUNT, place, computation.comp, *computation.user,
                      computation.program, computation.name)
        return place

    def remember(self, *row: Any) -> None:
        """Note a job for the history: number of its computation, number of the job, node, begin and
        end in seconds since the epoch, CPUs, and how it ended."""
        self.note(self.HISTORY, *row)

    def forget_before(self, when: float) -> None:
        """Remove some of the jobs that ended before this time from the history."""
        self.note(self.HISTORY_OVER, when)

    def forget_all_before(self, when: float) -> None:
        """Remove all jobs that ended before this time from the history, and the computations that
        have no jobs left. This happens at the start, as it may take a while."""
        run = self._db.execute
        run('DELETE FROM history WHERE ended < ?', (when,))
        run('DELETE FROM accounts WHERE place NOT IN (SELECT account FROM history)')
        self._accounts = dict(run('SELECT comp, place FROM accounts'))

    def history(self, after: int, count: int, since: float) -> Tuple[int, List[tuple]]:
        """Return the jobs of the history after a number, of at most `count` numbers, that have
        ended since this time, and the number after which there are more; -1: there are no more."""
        run = self._db.execute
        if after == 0:
            found = run('SELECT min(number) FROM history WHERE ended >= ?', (since,)).fetchone()[0]
            after = (found or 1) - 1
        newest = run('SELECT coalesce(max(number), 0) FROM history').fetchone()[0]
        to = after + count
        rows = run(
            'SELECT user, proven, program, name, job, node, began, ended, cpus, outcome, comp '
            'FROM history JOIN accounts ON place = account '
            'WHERE history.number > ? AND history.number <= ? AND ended >= ? '
            'ORDER BY history.number', (after, to, since)).fetchall()
        if to >= newest:
            to = -1
        return to, rows


class SecondsDatabase(HistoryDatabase):
    """The part of the state that contains second attempts of running jobs."""
    SECOND: int
    SECOND_OVER: int
    _places: Dict[str, int]        # text of the key of a node -> its number

    def seconds_sent(self, seconds: Sequence[ScheduledJob], key: Any) -> None:
        """Note second attempts that are sent to a node as soon as this is on the disk."""
        place = self._places[_key_text(key)]
        for second in seconds:
            number = job_number(second.serial)
            self.note(self.SECOND, number, attempt_number(second.serial), place)

    def second_over(self, second: ScheduledJob) -> None:
        """Note that a second attempt is discarded, or is that of its job now."""
        number = job_number(second.serial)
        self.note(self.SECOND_OVER, number, attempt_number(second.serial))

    def seconds(self, works: Dict[int, 'ClientJob']) -> List[Tuple['ClientJob', int, Any]]:
        """Return those of these jobs, by their numbers, that were started a second time, with the
        serial of that attempt and the key of its node."""
        keys = self._keys_of_nodes()
        found = []
        rows = self._db.execute('SELECT number, attempt, node FROM seconds')
        for number, attempt, place in rows:
            work = works.get(number)
            if work is not None:
                serial = serial_of(number, attempt)
                found.append((work, serial, keys[place]))
        return found

    def _keys_of_nodes(self) -> Dict[int, Any]:
        """Return a dictionary from the places of nodes to their keys."""
        keys = {}
        for key, place in self._places.items():
            keys[place] = _key_of(key)
        return keys


class State(SecondsDatabase):
    """Computations, jobs and results of all programs, and nodes. The state is in
    <state-dir>/state.db, files of computations in <state-dir>/c-NAME, and large arguments and
    results in <state-dir>/large."""
    MARK = 0x64735335
    VERSION = 1
    SYNC = 'FULL'
    WAITING, SENT, ENDED, DROPPED = range(4)
    # Rows of jobs refer to other rows by number, and hardly grow when jobs are sent, so that pages
    # need not be split
    TABLES = """
        CREATE TABLE own (name TEXT PRIMARY KEY, value BLOB);
        CREATE TABLE comps (place INTEGER PRIMARY KEY, comp TEXT UNIQUE, client BLOB, spec BLOB);
        CREATE TABLE jobs (
            number INTEGER PRIMARY KEY, comp INTEGER, client INTEGER, payload BLOB, options BLOB,
            state INTEGER, attempt INTEGER, node INTEGER, result BLOB);
        CREATE TABLE nodes (
            place INTEGER PRIMARY KEY, key TEXT UNIQUE, host TEXT, port INTEGER, name TEXT,
            instance BLOB)
        """
    # Tables that the first release did not have: given-up jobs, the memories of nodes, their lock
    # files, second attempts of running jobs, nodes that an operator has drained, jobs that have
    # ended, by computations, and what users have used
    LATER_TABLES = (
        'past (comp TEXT PRIMARY KEY, at REAL, serials BLOB, text TEXT)',
        'memories (place INTEGER PRIMARY KEY, memory TEXT)',
        'locks (place INTEGER PRIMARY KEY, machine TEXT, path TEXT)',
        'seconds (number INTEGER PRIMARY KEY, attempt INTEGER, node INTEGER)',
        'drains (node TEXT PRIMARY KEY, reason TEXT, since REAL)',
        'accounts (place INTEGER PRIMARY KEY, comp TEXT UNIQUE, user TEXT, proven INTEGER, '
        'program TEXT, name TEXT)',
        'history (number INTEGER PRIMARY KEY, account INTEGER, job INTEGER, node TEXT, '
        'began REAL, ended REAL, cpus INTEGER, outcome TEXT)',
        'used (user TEXT PRIMARY KEY, cpus REAL, at REAL)')
    COMP, OVER, INSERT, MOVE, END, DROP, REMOVE, NODE, MEMORY, LOCK, PAST, PAST_OVER, DRAIN, \
        ACCOUNT, HISTORY, HISTORY_OVER, SECOND, SECOND_OVER, USED, USED_OVER = range(20)
    STATEMENTS = (
        'INSERT OR REPLACE INTO comps VALUES (?, ?, ?, ?)',
        'DELETE FROM comps WHERE comp = ?',
        'INSERT INTO jobs VALUES (?, ?, ?, ?, ?, 0, 0, 0, NULL)',
        'UPDATE jobs SET state = ?, attempt = ?, node = ? WHERE number = ?',
        'UPDATE jobs SET state = 2, payload = NULL, result = ? WHERE number = ?',
        'UPDATE jobs SET state = 3, payload = NULL WHERE number = ?',
        'DELETE FROM jobs WHERE number = ?',
        'INSERT OR REPLACE INTO nodes VALUES (?, ?, ?, ?, ?, ?)',
        'INSERT OR REPLACE INTO memories VALUES (?, ?)',
        'INSERT OR REPLACE INTO locks VALUES (?, ?, ?)',
        'INSERT OR REPLACE INTO past VALUES (?, ?, ?, ?)',
        'DELETE FROM past WHERE comp = ?',
        'INSERT OR REPLACE INTO drains VALUES (?, ?, ?)',
        'INSERT OR REPLACE INTO accounts VALUES (?, ?, ?, ?, ?, ?)',
        'INSERT INTO history VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)',
        'DELETE FROM history WHERE number IN '
        '(SELECT number FROM history WHERE ended < ? ORDER BY number LIMIT 2000)',
        'INSERT OR REPLACE INTO seconds VALUES (?, ?, ?)',
        'DELETE FROM seconds WHERE number = ? AND attempt = ?',
        'INSERT OR REPLACE INTO used VALUES (?, ?, ?)',
        'DELETE FROM used WHERE at < ?')

    def __init__(self, root: str) -> None:
        """Open the state in this directory. Raises DispyError, OSError."""
        self.root = root
        take_state_directory(root)
        self.files = LargeFiles(os.path.join(root, 'large'))
        self._reserve = DiskReserve(root)
        super().__init__(os.path.join(root, 'state.db'), 'the state')
        try:
            with self.damages():
                self._begin()
        except BaseException:
            self._db.close()
            raise

    def _begin(self) -> None:
        run = self._db.execute
        run('INSERT OR IGNORE INTO own VALUES (?, ?)', ('instance', os.urandom(16)))
        run('INSERT OR IGNORE INTO own VALUES (?, ?)', ('seed', os.urandom(32)))
        self._seed: bytes = run("SELECT value FROM own WHERE name = 'seed'").fetchone()[0]
        self.instance: bytes = run("SELECT value FROM own WHERE name = 'instance'").fetchone()[0]
        run("INSERT OR IGNORE INTO own VALUES ('starts', 0)")
        run("UPDATE own SET value = value + 1 WHERE name = 'starts'")
        # Nodes may still hold results of jobs that are not here any more: their numbers are not
        # assigned again.
        numbers = run(
            "SELECT value << 30, (SELECT coalesce(max(number), 0) FROM jobs) FROM own "
            "WHERE name = 'starts'").fetchone()
        self.number: int = max(*numbers)
        for table in self.LATER_TABLES:
            run('CREATE TABLE IF NOT EXISTS ' + table)
        run('DELETE FROM past WHERE at < ?', (time.time() - PAST_TIME,))
        run('DELETE FROM drains WHERE since = 0')
        run('CREATE INDEX IF NOT EXISTS history_by_time ON history (ended)')
        self._accounts = dict(run('SELECT comp, place FROM accounts'))
        self._comps: Dict[str, int] = dict(run('SELECT comp, place FROM comps'))
        self._places: Dict[str, int] = dict(run('SELECT key, place FROM nodes'))
        comps = self._comps.values()
        given = [0, *comps, *self._places.values(), *self._accounts.values()]
        self._newest = itertools.count(1 + max(given))
        self.files.find(self._knows)
        self._short = 0   # missing bytes on the disk

    def key_of(self, comp: str) -> bytes:
        """Return the key with which this scheduler takes results of a computation from nodes. The
        key remains the same when the scheduler is started again."""
        return hmac.digest(self._seed, comp.encode(), 'sha256')

    def _knows(self, number: int) -> bool:
        found = self._db.execute('SELECT 1 FROM jobs WHERE number = ?', (number,))
        return found.fetchone() is not None

    # -- computations and nodes --------------------------------------------------------------------

    def began(self, computation: 'ClientComputation') -> None:
        """Note a computation that is new, or whose spec has changed."""
        place = self._comps.get(computation.comp)
        if place is None:
            place = next(self._newest)
            self._comps[computation.comp] = place
        spec = dict(computation.packed.spec, key=computation.digest, user=tuple(computation.user))
        self.note(self.COMP, place, computation.comp, computation.instance, pickle.dumps(spec, 5))

    def over(self, comp: str) -> None:
        """Note that a computation has ended, whose jobs `removed` removes."""
        if self._comps.pop(comp, None) is not None:
            self.note(self.OVER, comp)

    def met(self, peer: NodeConnection) -> None:
        """Note a node that is connected."""
        key = _key_text(peer.key)
        if key not in self._places:
            self._places[key] = next(self._newest)
        place = self._places[key]
        self.note(self.NODE, place, key, peer.host, peer.port, peer.name, peer.instance)
        self.note(self.MEMORY, place, peer.memory)
        lock = peer.facts.get('lock')
        # This node has no lock file
        if type(lock) is not tuple:
            return
        if list(map(type, lock)) != [str, str]:
            return
        machine, file = [part[:LOCK_MOST] for part in lock]
        self.note(self.LOCK, place, machine, file)

    def drained(self, node: str, reason: str, since: float) -> None:
        """Note that a node is drained, by its name in `Drains`; `since` is 0 if it is used
        again."""
        self.note(self.DRAIN, node, reason, since)

    def drains(self) -> Dict[str, Tuple[str, float]]:
        """Return a dictionary from drained nodes to the reason and the time, in seconds since the
        epoch."""
        rows = self._db.execute('SELECT node, reason, since FROM drains WHERE since > 0')
        return {node: (reason, since) for node, reason, since in rows}

    def note_used(self, used: Dict[str, float], at: float) -> None:
        """Note the mean CPUs that users have used in the past, at a time in seconds since the
        epoch. Other users have used none."""
        for user, cpus in used.items():
            self.note(self.USED, user, cpus, at)
        self.note(self.USED_OVER, at)

    def used(self) -> List[Tuple[str, float, float]]:
        """Return what `note_used` has noted: users, CPUs and times."""
        return self._db.execute('SELECT user, cpus, at FROM used').fetchall()

    def gave_up(self, comp: str, serials: Sequence[int], text: str) -> None:
        """Note the jobs of a program that has not come back for their results, by the program's own
        numbers."""
        layout = '>%dQ' % len(serials)
        data = struct.pack(layout, *serials)
        self.note(self.PAST, comp, time.time(), data, text)

    def past(self, comp: str) -> AttemptHistory:
        """Return what is known of the jobs of a computation that is not here any more."""
        row = self._db.execute('SELECT serials, text FROM past WHERE comp = ?', (comp,)).fetchone()
        if row is None:
            return AttemptHistory()
        data, text = row
        layout = '>%dQ' % (len(data) // 8)
        given_up = struct.unpack(layout, data)
        return AttemptHistory(given_up=frozenset(given_up), text=text)

    # -- jobs --------------------------------------------------------------------------------------

    def find_place(self, size: int, promised: int) -> OnDisk:
        """Create a file for a value of `size` bytes that comes in parts, while other values will
        need `promised` bytes more. Raises OSError."""
        free = self._reserve.free() - promised - self._reserve.size
        if size > free:
            message = '%d bytes are free on its disk' % max(0, free)
            raise OSError(errno.ENOSPC, message)
        return self.files.new_place()

    def submitted(self, work: 'ClientJob', payload: Any) -> None:
        """Note a new job."""
        number = work.number
        pieces = pieces_of(payload)
        data = None
        if size_of(payload) >= FILE_BYTES:
            self.files.add(number, 'p', pieces)
        else:
            data = b''.join(pieces)
        options = None
        if work.options:
            options = pickle.dumps(work.options)
        comp = self._comps[work.comp]
        self.note(self.INSERT, number, comp, work.client_serial, data, options)

    def payload(self, number: int) -> Any:
        """Return the arguments of a job that has not ended. Raises OSError."""
        # Jobs that were submitted in this turn, in the order of their numbers
        new = self._notes[self.INSERT]
        at = bisect.bisect_left(new, (number,))
        if at < len(new):
            row = new[at]
            if row[0] == number:
                if row[3] is not None:
                    return row[3]
        row = self._db.execute('SELECT payload FROM jobs WHERE number = ?', (number,)).fetchone()
        if row is not None and row[0] is not None:
            return row[0]
        return self.files.payload(number)

    def sent(self, works: Sequence[ScheduledJob], key: Any) -> None:
        """Note jobs that are sent to a node as soon as this is on the disk."""
        place = self._places[_key_text(key)]
        notes = self._notes[self.MOVE]
        for work in works:
            note = (self.SENT, attempt_number(work.serial), place, job_number(work.serial))
            notes.append(note)

    def waits(self, work: 'ClientJob') -> None:
        """Note a job that has come back from a node."""
        self.note(self.MOVE, self.WAITING, attempt_number(work.serial), 0, work.number)

    def size_of_payload(self, number: int) -> int:
        """Return the size in bytes of the arguments of a job that has not ended, 0 for one that was
        submitted in this turn and is small. Raises OSError."""
        size = self.files.size(number)
        if size is not None:
            return size
        query = 'SELECT length(payload) FROM jobs WHERE number = ?'
        row = self._db.execute(query, (number,)).fetchone()
        if row is None:
            return 0
        return row[0] or 0

    def ended(self, number: int, row: tuple) -> None:
        """Note a row of Results, with the serial that the program knows. The payload of a very
        large result is in a file only."""
        if size_of(row[4]) > LAZY:
            pieces = pieces_of(row[4])
            self.files.add(number, 'r', pieces)
            row = (*row[:4], None, *row[5:])
        payloads = tuple(map(_plain, row[4:]))
        data = pickle.dumps(row[:4] + payloads, 5)
        if len(data) < FILE_BYTES:
            self.note(self.END, data, number)
        else:
            self.files.add(number, 'r', [data])
            self.note(self.END, None, number)

    def dropped(self, number: int) -> None:
        """Note a job that is cancelled because its program is gone. The program may still ask for
        the job."""
        self.files.drop(number)
        self.note(self.DROP, number)

    def removed(self, numbers: Sequence[int]) -> None:
        """Note results that a program has received, or does not want."""
        self._notes[self.REMOVE] += [(number,) for number in numbers]
        gone = frozenset(numbers)
        # Rows that were not written for lack of room need not be written any more
        if self.broken:
            self._forget_notes(gone)
        self.files.remove(gone)

    def _forget_notes(self, numbers: FrozenSet[int]) -> None:
        """Drop what was to be written about some jobs."""
        for statement, column in ((self.INSERT, 0), (self.MOVE, 3), (self.END, 1)):
            rows = self._notes[statement]
            self._notes[statement] = [row for row in rows if row[column] not in numbers]

    def commit(self) -> bool:
        """Write what was noted, as Database does, and the large files before it; then delete the
        files that are not needed any more."""
        if not self._has_to_write():
            return True
        if not self._has_room():
            self._make_room()
            text = '%s: %d bytes more are needed' % (os.strerror(errno.ENOSPC), self._short)
            return self._failed(OSError(errno.ENOSPC, text))
        try:
            self.files.write()
        except OSError as exc:
            self._make_room()
            return self._failed(exc)
        done = super().commit()
        if done:
            self.files.unlink_gone()
            self._reserve.keep()
        else:
            self._make_room()
        return done

    def _has_to_write(self) -> bool:
        """Return whether anything is to be written that cannot wait. A note that results were
        acknowledged can wait: if it is lost, the results are sent once more and are acknowledged
        again."""
        removed = self._notes[self.REMOVE]
        if self.files.has_gone:
            return True
        if len(removed) >= REMOVED_MOST:
            return True
        for rows in self._notes:
            if rows is not removed:
                if rows:
                    return True
        return False

    def _empty_log(self) -> None:
        """Make SQLite write the contents of its log into the database file."""
        self._db.execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchall()

    def _has_room(self) -> bool:
        """Return whether what is to be written leaves some of the disk free. SQLite needs space to
        remove things, too, and a transaction that fails has filled the disk. Everything is written
        twice: into the log, and from there into the file."""
        wanted = _bytes_in(self._notes[self.INSERT], 3)
        wanted += _bytes_in(self._notes[self.END], 0)
        files = self.files.bytes_pending()
        if not wanted and not files:
            return True
        # Pages that are only in the log would make the file grow later
        free = self._reserve.free()
        if free < LOW_DISK + 4 * (wanted + files):
            with contextlib.suppress(self._error):
                self._empty_log()
        # Pages that were removed can be used again
        row = self._db.execute('PRAGMA freelist_count').fetchone()
        inside = PAGE_SIZE * row[0]
        margin = self._reserve.size
        if inside >= margin:
            margin //= 8
        needed = files + wanted + max(0, wanted - inside) + margin
        self._short = needed - self._reserve.free()
        return self._short <= 0

    def _make_room(self) -> None:
        """Remove obsolete data and write nothing else, because the disk is full."""
        self.files.unlink_gone()
        self._reserve.give_up()
        over = self._notes[self.OVER]
        gone = self._notes[self.REMOVE]
        try:
            # Only a few at a time, so that the next ones use the same room in the log again
            while over or gone:
                self._notes[self.OVER] = over[:REMOVED_AT_ONCE]
                self._notes[self.REMOVE] = gone[:REMOVED_AT_ONCE]
                self._write((self.OVER, self.REMOVE))
                over = over[REMOVED_AT_ONCE:]
                gone = gone[REMOVED_AT_ONCE:]
                self._empty_log()
        except self._error as exc:
            logger.debug('%s', exc)   # this is tried again
        finally:
            self._notes[self.OVER] = over
            self._notes[self.REMOVE] = gone

    def results(self, numbers: Sequence[int], unread: List[int]) -> Iterator[tuple]:
        """Yield the rows of Results that are on the disk. The numbers of those that cannot be read
        now are appended to `unread`."""
        for number in numbers:
            row = self._db.execute('SELECT result, client FROM jobs WHERE number = ? AND state = 2',
                                   (number, )).fetchone()
            if row is None:
                continue
            try:
                found = self._result(number, row[0])
            except FileNotFoundError as exc:
                text = 'its result cannot be read at the scheduler: %s' % exc
                yield ended_row(row[1], Outcome.DIED, text)
            except OSError as exc:   # no descriptor is left
                if not unread:
                    logger.error('a result cannot be read now: %s', exc)
                unread.append(number)
            else:
                yield found

    def _result(self, number: int, data: Optional[bytes]) -> tuple:
        """Return a row of Results. Raises OSError."""
        if data is None:
            path = self.files.path(number, 'r')
            with open(path, 'rb') as file:
                data = file.read()
        found: tuple = open_plain(data)
        if found[4] is None:
            payload = stored(self.files.path(number, 'r'))
            found = (*found[:4], payload, *found[5:])
        return found

    # -- at the start ------------------------------------------------------------------------------

    def comps(self) -> List[Tuple[str, bytes, dict]]:
        """Return (name, instance of the program, spec) of the computations in the order in which
        they came."""
        rows = self._db.execute('SELECT comp, client, spec FROM comps ORDER BY place')
        return [(comp, client, open_plain(spec)) for comp, client, spec in rows]

    def jobs(self, comp: str) -> Iterator[Tuple[int, int, Any, int, int, Any]]:
        """Yield (number, serial of the program, options, state, serial, key of its node) of the
        jobs of a computation in the order in which they came."""
        keys = self._keys_of_nodes()
        query = ('SELECT number, client, options, state, attempt, node FROM jobs WHERE comp = ? '
                 'ORDER BY number')
        rows = self._db.execute(query, (self._comps[comp],))
        for number, client, packed, state, attempt, node in rows:
            options = None
            if packed:
                options = open_plain(packed)
            serial = serial_of(number, attempt)
            yield number, client, options, state, serial, keys.get(node)

    def nodes(self) -> List[tuple]:
        """Return (key, host, port, name, instance) of each node that was connected."""
        rows = self._db.execute('SELECT key, host, port, name, instance FROM nodes')
        return [(_key_of(key), *rest) for key, *rest in rows]

    def memories(self) -> Dict[Any, str]:
        """Return a dictionary from the keys of nodes to the identifiers of their memories."""
        rows = self._db.execute('SELECT key, memory FROM nodes JOIN memories USING (place)')
        return {_key_of(key): memory for key, memory in rows}

    def locks(self) -> Dict[Any, Tuple[str, str]]:
        """Return a dictionary from the keys of nodes to the machine and the path of their lock
        files."""
        rows = self._db.execute('SELECT key, machine, path FROM nodes JOIN locks USING (place)')
        return {_key_of(key): (machine, path) for key, machine, path in rows}

    def close(self) -> None:
        """Write what was noted and close the files. A row whose large file could not be written is
        not written either: the other side still has it."""
        if self.commit() or not self.files.has_pending:
            super().commit()
        self._db.close()


def _bytes_in(notes: Sequence[tuple], column: int) -> int:
    """Return the number of bytes in one column of rows that wait to be written."""
    sizes = []
    for row in notes:
        if row[column] is not None:
            sizes.append(len(row[column]))
    return sum(sizes)


_SUCCESS = pickle.dumps(0, 5)   # the packed exit status of a program that has succeeded


def _exit_status(row: tuple) -> int:
    """Return the exit status of a program from its row of Results; 0 if a node has sent another
    type."""
    if row[4] == _SUCCESS:
        return 0
    with contextlib.suppress(PeerError):
        value = open_envelope(_plain(row[4]))
        if type(value) is int:
            return value
    return 0


# The outcomes of jobs that have failed
_STATE_OF = {Outcome.ABANDONED: JobState.ABANDONED, Outcome.RETURNED: JobState.FINISHED}


def _plain(value: Any) -> Any:
    if isinstance(value, (memoryview, bytearray)):
        return bytes(value)
    if type(value) is tuple:
        return b''.join(value)
    return value


def _key_text(key: Any) -> str:
    return json.dumps(key)


def _key_of(text: str) -> Any:
    key = json.loads(text)
    if isinstance(key, list):
        return tuple(key)
    return key


# --------------------------------------------------------------------------------------------------
# Computations of programs
# --------------------------------------------------------------------------------------------------

# The outcome of a job without a result, by its state; others were cancelled
_OUTCOMES = {JobState.ABANDONED: Outcome.ABANDONED, JobState.TERMINATED: Outcome.DIED}


class ClientJob(ScheduledJob):
    """A job of a program."""
    # Its number, which all its attempts share; the serial by which the program knows it; the size
    # in bytes of its arguments that the quota counts
    __slots__ = ('number', 'client_serial', 'size')

    def __init__(self, comp: str, payload: Any, options: Optional[dict], serial: int,
                 client: int) -> None:
        super().__init__(comp, payload, options)
        self.serial = serial
        self.number = serial >> 16
        self.client_serial = client
        self.size = 0

    @property
    def values(self) -> tuple:
        """The sizes and digests of the values that the job needs."""
        if self.options:
            return self.options.get('values', ())
        return ()


def ended_row(serial: int, outcome: Outcome, text: str) -> tuple:
    """Return a row of Results for a job that has ended without a result of its own."""
    return serial, int(outcome), 0.0, 0.0, text.encode('utf-8', 'replace'), b'', b''


MODULES_OF = '.modules'   # the suffix of the directory for the files of a program's modules
# The suffix of the directory for values that its jobs need; each is a file with its digest as its
# name
VALUES_OF = '.values'


# The suffix of the directory for files that second attempts of its jobs send, by their serials
SECONDS_OF = '.seconds'


TOO_LARGE = '%s has %d bytes, and --max-file-size is %d'


class ClientAllocator(NamedTuple):
    """The number of a NodeAllocate of a program, by which the program is asked."""
    number: int


class Absence:
    """Decides what becomes of a computation whose program is away. A program that has a
    recover_file is waited for. For other programs, the jobs that have not begun are cancelled after
    a while, or at once if the process of the program is known to have ended. If the program comes
    back nevertheless, it is told so and sends these jobs again."""

    def __init__(self, recovers: bool, process: Any) -> None:
        """Describe the program. `process` is as in `own_process`. Raises PeerError."""
        if type(process) is not tuple or list(map(type, process)) != [str, int, str]:
            raise PeerError('a process is not described as it should be')
        self._recovers = recovers
        self._process = process
        # When it counts as gone, and when its process is checked next
        self._until = self.look_at = math.inf
        self.gone = False
        self.for_good = False    # its process has ended and cannot come back
        # Jobs on nodes that are to be cancelled if they have not begun
        self.dropping: Set[Any] = set()
        # Serials of jobs that were cancelled for this reason -> their numbers
        self.dropped: Dict[int, int] = {}

    def begin(self, now: float, patience: float) -> None:
        """Note that the connection of the program has ended, or that the program has not connected
        yet. Its jobs are cancelled after `patience` seconds."""
        if self._recovers:
            return
        if self.gone:
            return
        self._until = now + patience
        self.look_at = self._until
        if has_ended(self._process) is not None:   # its process is on this machine
            self.look_at = now

    def end(self) -> None:
        """Note that the program is connected."""
        self._until = self.look_at = math.inf
        self.gone = self.for_good = False

    def is_over(self, now: float) -> bool:
        """Look for the program, which is to be done when `look_at` has come. Return whether the
        program is gone."""
        self.look_at = min(self._until, now + GONE_LOOKS)
        self.for_good = bool(has_ended(self._process))
        if now >= self._until or self.for_good:
            self.gone = True
            self.look_at = math.inf
        return self.gone


class EarlyJob:
    """A job that was received and is not accepted yet, because it needs values that are not
    here."""
    __slots__ = ('row', 'values')

    def __init__(self, row: tuple) -> None:
        self.row = row    # a row of Jobs
        self.values = row[2]['values']


class ClientValues:
    """The values, known by their digests, that the jobs of one computation need. A job is accepted
    when everything that it needs is on the disk; the program is asked for what is missing. The
    loop's thread uses this class."""

    def __init__(self, computation: 'ClientComputation', most: int) -> None:
        """Keep at most `most` bytes of values, see ValueDesk."""
        self._computation = computation
        self._desk = ValueRequests(most)
        self._directory = computation.directory + VALUES_OF
        self.retry_at = math.inf    # when to check for room again
        self.told = False           # whether it was reported that there is none

    def path(self, digest: bytes) -> str:
        """Return the path of a value."""
        return os.path.join(self._directory, digest.hex())

    def restore(self) -> None:
        """Take over the values that an earlier run has left."""
        for name in os.listdir(self._directory):
            path = os.path.join(self._directory, name)
            if len(name) == 2 * DIGEST_SIZE:
                size = os.path.getsize(path)
                digest = bytes.fromhex(name)
                self._desk.come(self._computation.comp, size, digest)
            else:   # it came when the transfer ended
                os.unlink(path)

    def took(self, work: 'ClientJob') -> None:
        """Keep the values of a job that was accepted."""
        self._desk.hold(self._computation.comp, work)

    def admit(self, row: tuple) -> bool:
        """Return whether a job can be accepted now. Otherwise the job waits here for its values."""
        waiting = self._desk.waiting(self._computation.comp)
        if any(early.row[0] == row[0] for early in waiting):
            return False   # it came twice
        early = EarlyJob(row)
        ready = self._desk.admit(self._computation.comp, early)
        if ready:
            self._let_go(early)
        return ready

    def release(self, work: 'ClientJob') -> None:
        """Note that a job has ended, so that its values are not kept for it any more."""
        self._desk.release(self._computation.comp, work)

    def leave(self, serials: Iterable[int]) -> List[int]:
        """Forget jobs that are not wanted any more. Return the serials of those that waited for
        values."""
        wanted = set(serials)
        waiting = self._desk.waiting(self._computation.comp)
        gone = set()
        for early in waiting:
            if early.row[0] in wanted:
                gone.add(early)
        self._desk.leave(self._computation.comp, gone)
        return [early.row[0] for early in gone]

    def interrupt(self) -> None:
        """Forget the jobs that wait, because the program is not connected any more and will send
        them again."""
        self._desk.interrupt(self._computation.comp)

    def serve(self) -> Tuple[List[tuple], List[tuple], str]:
        """Return the rows of jobs that can be accepted now, the rows of files that Need is to
        request, and why a value does not fit."""
        if not self._desk:
            return [], [], ''
        served, actions = self._desk.serve()
        missing: List[tuple] = []
        error = ''
        for action in actions:
            if isinstance(action, DropValue):
                with contextlib.suppress(OSError):   # it does not exist any more
                    os.unlink(self.path(action.digest))
                continue
            digits = action.digest.hex()
            row = (digits, action.size, action.digest, 0o400)
            try:
                missing = self._computation.receiver.want(Purpose.VALUES, [row])
            except (OSError, ValueError) as exc:
                error = str(exc)
            else:
                if not missing:   # an earlier process has received it
                    self._desk.came(action.comp)
        return [self._let_go(early) for _, early in served], missing, error

    def _let_go(self, early: EarlyJob) -> tuple:
        """Return the row of a job that is accepted now. From now on the job itself keeps its
        values."""
        self._desk.release(self._computation.comp, early)
        return early.row

    def postpone(self, until: float) -> None:
        """Try the value that was to come again at `until`, because there is no room for it now."""
        self._desk.postpone(self._computation.comp)
        self.retry_at = until

    def came(self, name: str) -> None:
        """Note that the requested value is here."""
        digits = self._desk.coming(self._computation.comp).hex()
        if digits == name:
            self._desk.came(self._computation.comp)

    def failed(self) -> List[int]:
        """Note that the requested value is not available, or does not fit. Return the serials of
        the jobs that waited for it."""
        if not self._desk.coming(self._computation.comp):
            return []
        failed = self._desk.failed(self._computation.comp)
        return [early.row[0] for early in failed]


# Rows of files, rows of modules, and the function that is called when all of them are here
WantedFiles = Tuple[list, list, Callable[..., None]]


def _no_source() -> Tuple[bytes, str]:
    """Raise NoSource: this is the `source` of a PackedComputation of a scheduler, which has no
    source."""
    return b'', 'only its program can tell'


class ForwardedFiles(HeldFiles):
    """The files of a second attempt. They are kept on the disk here until the attempt counts, and
    are sent to the program then. The result of the attempt follows when the program has them. The
    loop's thread uses this class."""
    forwards = True

    def __init__(self, computation: 'ClientComputation', scheduler: 'Scheduler',
                 serial: int) -> None:
        directory = os.path.join(computation.directory + SECONDS_OF, str(serial))
        super().__init__(directory, directory, 'at the scheduler: ')
        self._computation = computation
        self._scheduler = scheduler
        self._serial = serial
        self._result: Optional[tuple] = None    # the row of Results that waits for the files
        self._under_way: Set[str] = set()       # names of files that are being sent to the program
        self._rows: Dict[str, tuple] = {}       # name -> row of FilePiece

    def take(self, message: FilePiece) -> Optional[FileStored]:
        """Take a piece, as HeldFiles does."""
        row = message.row
        self._rows[row[0]] = row
        return super().take(message)

    def place(self) -> str:
        """Send the files that are complete to the program. Returns an empty text: what the program
        cannot store is reported later."""
        self.counts = True
        self.forward()
        return ''

    def forward(self) -> None:
        """Send the files that the program is not known to have."""
        computation = self._computation
        scheduler = self._scheduler
        known = scheduler.schedule.comps[computation.comp]
        node = known.running.get(self._serial)
        if not self.counts or node is None or computation.is_collected:
            return
        if computation.link not in scheduler.links:
            return
        work: Any = node.in_flight[computation.comp][self._serial]
        transfer = (computation.comp, int(Purpose.FROM_JOB), work.client_serial)
        for name in self.names:
            path = os.path.join(self.directory, *name.split('/'))
            if name not in self._rows:   # it came before this process started
                size, digest = file_digest(path)
                mode = stat.S_IMODE(os.stat(path).st_mode)
                self._rows[name] = (name, size, digest, mode)
            row = self._rows[name]
            self._under_way.add(name)
            scheduler.program_jobs.sender.add_file(computation.link, transfer, row, path)

    def came(self, name: str, error: str) -> bool:
        """Note that the program has stored a file, or cannot store it. Returns whether the file was
        one of these."""
        if name not in self._under_way:
            return False
        self._under_way.discard(name)
        if name in self.names:
            self.names.remove(name)
        if error:
            text = '%s could not be sent: %s' % (name, error)
            self._result = ended_row(self._serial, Outcome.DIED, text)
            self.names.clear()
        self._let_go()
        return True

    def _let_go(self) -> None:
        """Pass on the result if it waits for nothing any more."""
        comp = self._computation.comp
        known = self._scheduler.schedule.comps[comp]
        node = known.running.get(self._serial)
        if self._result is not None and not self.names and node is not None:
            results = NodeResults(node.key, comp, [self._result])
            self._scheduler.decide(results)

    def keep_until_there(self, row: tuple) -> bool:
        """Return whether the row of Results of the attempt has to wait."""
        if not self.counts or not self.names:
            return False
        self._result = row
        if self._computation.is_collected:
            self.give_up()
        return True

    def give_up(self) -> None:
        """Give up the files, because the program has ended, and the process that collects its
        results stores no files."""
        if self._result is not None:
            self._computation.warn(
                'the files %s have not come: they are of a job that was started a second time, and '
                'its program has ended' % ', '.join(self.names))
            self.names.clear()
            self._let_go()


class ClientSeconds(SecondsOfUser):
    """Second attempts of the jobs of a program. The program is told of an attempt when that counts.
    The loop's thread uses this class."""

    def __init__(self, computation: 'ClientComputation', scheduler: 'Scheduler') -> None:
        self._computation = computation
        self._scheduler = scheduler

    def send(self, peer: NodeConnection, seconds: Sequence[Any]) -> None:
        """Send second attempts to a node."""
        self._computation.send_rows(peer, seconds)
        self._scheduler.state.seconds_sent(seconds, peer.key)

    def counts(self, peer: NodeConnection, second: Any, ran: float) -> None:
        """Tell the program that a job is now on another node."""
        computation = self._computation
        work = second.first
        self._scheduler.state.second_over(second)
        self._scheduler.state.sent([work], peer.key)
        node = (peer.ip_addr, peer.port, peer.name)
        serials = [work.client_serial]
        report = JobsAssigned(computation.comp, node, serials)
        computation.send(report)
        if work.state is not JobState.SENT:
            computation.jobs_started(peer, [(work, ran)])

    def over(self, second: Any) -> None:
        """Note that a second attempt is discarded."""
        self._scheduler.state.second_over(second)

    def files_of(self, second: Any) -> ForwardedFiles:
        """Return where the files of a second attempt are kept."""
        return ForwardedFiles(self._computation, self._scheduler, second.serial)


class ClientComputation(NodeUser):
    """A computation of a program; the scheduler uses it as a client uses a JobCluster. The loop's
    thread uses this class."""
    packed: PackedComputation

    def __init__(self,
                 scheduler: 'Scheduler',
                 comp: str,
                 client: bytes,
                 spec: dict,
                 directory: str,
                 most: int,
                 key: bytes = b'',
                 max_values: int = QUEUED_MOST) -> None:
        self._scheduler = scheduler
        # Otherwise nodes are listed, and nothing is broadcast
        self.searches = not scheduler.options.nodes
        self.multicast = scheduler.options.multicast
        self.key = key    # the scheduler's own key for nodes
        shared = spec['shared']
        self.comp = comp
        self.name = spec['name']
        self.client = client.hex()
        self.instance = client
        self.link = 0
        self.digest = result_key(spec)   # proves that results are its own
        self.directory = directory
        self.reentrant = shared['reentrant']
        self.speculate = self.reentrant and spec.get('speculate', False)
        self.seconds = ClientSeconds(self, scheduler)
        self.exclusive = shared['exclusive']
        self.cloudpickle = shared['cloudpickle']
        recovers = bool(shared['recovers'])
        self.absence = Absence(recovers, shared['process'])
        self._waits_told: Set[str] = set()   # why jobs wait
        # Whether another process may collect the results, see `dispy.ComputationNotes`
        self.collected = bool(shared['recovers'] or shared.get('collected'))
        self.specs = specs_of(shared['nodes'])
        self.take_spec(spec)
        modules = directory + MODULES_OF
        values = directory + VALUES_OF
        roots = {
            Purpose.DEPENDS: directory,
            Purpose.PLACED: directory,
            Purpose.MODULES: modules,
            Purpose.VALUES: values,
        }
        # Jobs that need a value are acknowledged when it is on the disk
        self.receiver = FileReceiver(roots, most, TOO_LARGE, 'at the scheduler: ',
                                     sync=(Purpose.PLACED, Purpose.VALUES))
        os.makedirs(modules, mode=0o700, exist_ok=True)
        os.makedirs(values, mode=0o700, exist_ok=True)
        self.values = ClientValues(self, max_values)
        # Rows of missing files and modules, and the functions that wait for them
        self.wanted: Deque[WantedFiles] = collections.deque()
        self.compared: Optional[list] = None      # rows of files that were compared in a thread
        self.ready = False
        self.questions: List[Tuple[Link, Call]] = []   # requests that came before its files
        self.works: Dict[int, ClientJob] = {}    # jobs by the program's serials
        # Serials of jobs that have ended and are not acknowledged -> their numbers
        self.ended: Dict[int, int] = {}
        self.outbox: List[tuple] = []
        self.unread: List[int] = []    # numbers of results that could not be read from the disk
        self.calls: Dict[int, Callable[[tuple, Any], None]] = {}
        # On which link and when the last Reclaim came
        self.told_at = (0, 0.0)
        # Serial of a job that sends a file -> the link on which it is sent on, and its name
        self.files: Dict[int, Tuple[int, str]] = {}
        self.is_collected = False   # whether another process than its program has taken it over
        self.given_up_at = math.inf   # when it is given up, if its program does not come back
        # When it releases its nodes, if its program is not back and it has no jobs
        self.rests_at = math.inf
        self.rests = False                        # it has none: only its results are kept
        # For monitors: its name, since when it is here, and its owner
        self.number = 0
        self.since = 0.0
        self.program = ''
        self.user = ProgramUser()
        self.done = 0                             # jobs that have succeeded
        self.failed = 0
        self.cancelled = 0
        self.cpu_seconds = 0.0                    # for which jobs that have ended occupied CPUs
        # Node -> jobs ended there, seconds that they ran
        self.ended_at: Dict[Any, List[float]] = {}

    def take_spec(self, spec: dict) -> None:
        """Store a specification for nodes. It changes after a setup with other files."""
        spec = dict(spec)
        spec['code'] = bytes(spec['code'])
        spec['setup_args'] = bytes(spec['setup_args'])
        spec['key'] = digest_of(self.key)
        support = spec['support'].items()
        spec['support'] = {name: bytes(source) for name, source in support}
        paths = self.paths_of(spec['files'])
        is_program = spec['kind'] == 'program'
        self.packed = PackedComputation(spec, paths, is_program, _no_source)

    def path_of(self, name: str) -> str:
        """Return the path of a file of the program."""
        return os.path.join(self.directory, *name.split('/'))

    def paths_of(self, rows: Iterable[tuple]) -> Dict[str, str]:
        """Return a dictionary from names of files to their paths. The name is the first field of
        each row."""
        return {row[0]: self.path_of(row[0]) for row in rows}

    def jobs_counted(self) -> Tuple[int, int, int, int]:
        """Return the numbers of jobs, as NodeUser does."""
        submitted = len(self.works) + self.done
        submitted += self.failed + self.cancelled
        return submitted, self.done, self.failed, self.cancelled

    def known(self) -> List[int]:
        """Return the serials of the jobs that are here or have ended here."""
        return [*self.works, *self.ended]

    def job_seconds(self) -> float:
        """Return how many seconds its jobs have run."""
        ended_at = self.ended_at.values()
        return sum(seconds for _, seconds in ended_at)

    def remove(self) -> None:
        """Delete its files."""
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.directory + MODULES_OF, ignore_errors=True)
        shutil.rmtree(self.directory + VALUES_OF, ignore_errors=True)
        shutil.rmtree(self.directory + SECONDS_OF, ignore_errors=True)

    def send(self, message: Any) -> None:
        """Send a message to the program, if it is connected."""
        scheduler = self._scheduler
        link = scheduler.links.get(self.link)
        if link is not None:
            scheduler.send(link, message)

    def warn(self, text: str) -> None:
        """Log a warning here and send it to the program."""
        super().warn(text)
        self.send(Notice(self.comp, text))

    def node_ready(self, peer: NodeConnection) -> None:
        """Log that the computation uses a node."""
        cpus = peer.limit(self.comp)
        logger.info('%s: node %s is used, with %d CPUs', self.name, peer, cpus)

    def node_unreachable(self, peer: NodeConnection, text: str) -> None:
        """Tell the program why a node cannot be used."""
        message = 'node %s cannot be used: %s' % (peer, text)
        warning = Notice(self.comp, message)
        self.send(warning)

    def node_changed(self, status: int, peer: NodeConnection) -> None:
        """Tell the program that a node is used or is not used any more."""
        if self.link not in self._scheduler.links:
            return
        if self.comp not in peer.uses:
            return
        state = 'ready'
        if status == DispyNode.Closed:
            state = 'closed'
        row = self.row_of(peer)._replace(state=state)
        message = NodeChanged(self.comp, status, tuple(row))
        self.send(message)

    def row_of(self, peer: NodeConnection) -> NodeInfo:
        """Describe one of its nodes for the program."""
        queries = self._scheduler.queries
        return queries.row_of(*queries.node_of(self.comp, peer))

    def ask_source(self, peer: NodeConnection, link: Link) -> None:
        """Ask the program for the source of the computation."""
        self._scheduler.program_calls.ask_source(self, peer, link)

    def ask_allocator(self, allocator: Any, peer: NodeConnection, link: Link) -> None:
        """Ask the program's NodeAllocate."""
        self._scheduler.program_calls.ask_allocator(self, allocator, peer, link)

    def asked(self, peer: NodeConnection, message: Call) -> None:
        """Ask the program for the modules that a job needs."""
        self._scheduler.program_calls.ask_for_modules(self, peer, message)

    def support_for(self, peer: NodeConnection) -> Dict[str, bytes]:
        """Return cloudpickle, which the program has sent, for a node that has another version."""
        python = python_at(peer.facts, self.packed.spec.get('interpreter', ''))
        if python is not None and python.cloudpickle == self.cloudpickle:
            return {}
        return self.packed.spec['support']  # type: ignore[no-any-return]

    def module_source(self, name: str) -> Any:
        """Return the path of a file of a module, which is here."""
        return os.path.join(self.directory + MODULES_OF, *check_name(name))

    def value_source(self, digest: bytes) -> Any:
        """Return the path of a value."""
        return self.values.path(digest)

    def send_jobs(self, peer: NodeConnection, works: Sequence[Any]) -> None:
        """Send jobs to a node, and tell the program where they are."""
        scheduler = self._scheduler
        scheduler.state.sent(works, peer.key)
        if self.link in scheduler.links:
            node = (peer.ip_addr, peer.port, peer.name)
            serials = [work.client_serial for work in works]
            self.send(JobsAssigned(self.comp, node, serials))
        self.send_rows(peer, works)

    def send_rows(self, peer: NodeConnection, works: Sequence[Any]) -> None:
        """Send attempts to a node. The arguments of jobs that have waited for a long time are on
        the disk."""
        scheduler = self._scheduler
        rows: List[Tuple[tuple, int]] = []
        unread: List[tuple] = []
        for work in works:
            try:
                payload = work.payload
                if payload is None:
                    payload = scheduler.state.payload(job_number(work.serial))
            except OSError as exc:   # no descriptor is left, or the file has gone
                text = 'its arguments cannot be read at the scheduler: %s' % exc
                unread.append(ended_row(work.serial, Outcome.DIED, text))
            else:
                rows.append(job_row(work, payload, OF_JOBS))
        for frame in batches(Jobs, self.comp, rows):
            scheduler.send(peer.link, frame)  # type: ignore[arg-type]
        if unread:
            scheduler.decide(NodeResults(peer.key, self.comp, unread))

    def jobs_started(self, peer: NodeConnection, pairs: Sequence[Tuple[Any, float]]) -> None:
        """Tell the program which jobs have begun."""
        rows = []
        for work, ran in pairs:
            rows.append((work.client_serial, ran))
        self.send(Started(self.comp, rows))

    def jobs_ended(self, peer: NodeConnection, pairs: List[Tuple[Any, tuple]]) -> None:
        """Note results, and send them to the program."""
        for work, row in pairs:
            row = (work.client_serial, *row[1:])
            if row[1] not in PROVISIONAL:
                self._scheduler.program_jobs.end(self, work, row, peer.key)
            else:
                self.outbox.append(row)

    def job_ended(self, work: Any, text: str) -> None:
        """Note the end of a job that has no row of Results, and tell the program."""
        outcome = _OUTCOMES.get(work.state, Outcome.CANCELLED)
        if work in self.absence.dropping:
            self.absence.dropping.discard(work)
            if outcome == Outcome.CANCELLED:
                self._scheduler.program_jobs.drop(self, work)
                return
        self._end(work, outcome, text)

    def fail_job(self, work: Any, text: str) -> None:
        """End a job that is neither in the queue nor on a node any more."""
        self._end(work, Outcome.DIED, text)

    def _end(self, work: Any, outcome: Outcome, text: str) -> None:
        row = ended_row(work.client_serial, outcome, text)
        self._scheduler.program_jobs.end(self, work, row)

    def job_waits(self, work: Any) -> None:
        """Tell the program that a job waits again."""
        self.files.pop(work.serial, None)
        self._scheduler.state.waits(work)
        message = JobsAssigned(self.comp, (), [work.client_serial])
        self.send(message)

    def job_parked(self, work: Any, text: str) -> None:
        """Tell the program why a job waits."""
        if text not in self._waits_told:
            self._waits_told.add(text)
            self.warn('a job waits: %s. It starts when a node that has this is connected. This is '
                      'logged once for all jobs like it' % text)

    def jobs_held(self, text: str) -> None:
        """Tell the program that jobs wait because of a limit of its user."""
        self.warn('jobs wait: %s; the operator of the scheduler sets this limit. This is logged '
                  'once for all jobs like these' % text)

    def job_goes_on(self, work: Any) -> None:
        """Tell the program, which wanted to cancel a job if it had not begun, that it has begun."""
        self.absence.dropping.discard(work)
        if work.state in (JobState.RUNNING, JobState.PROVISIONAL):
            ran = self._scheduler.schedule.ran(work)
            message = Started(work.comp, [(work.client_serial, ran)])
            self.send(message)

    def output(self, peer: NodeConnection, work: Any, message: Output) -> None:
        """Pass on to the program what a job prints."""
        if message.stream == 0:
            log_record_of(message.data)   # raises PeerError
        self.send(message._replace(serial=work.client_serial, data=out_of_band(message.data)))

    def file_piece(self, peer: NodeConnection, work: Any, message: FilePiece) -> None:
        """Pass a piece of a job's file on to the program."""
        scheduler = self._scheduler
        key = message.key
        if message.offset == 0:
            self.files[key] = (self.link, message.row[0])
        if key not in self.files:
            return   # it was answered already: the rest is ignored
        began_by, _ = self.files[key]
        if self.link in scheduler.links and began_by == self.link:
            self.send(message._replace(key=work.client_serial, data=out_of_band(message.data)))
        else:
            del self.files[key]
            text = 'the client is not connected'
            stored = FileStored(*message[:3], message.row[0], text)
            scheduler.say_to(peer, stored)

    def jobs_owed(self) -> List[Any]:
        """Return the jobs that have not ended."""
        return list(self.works.values())


class KeepConnected(NodeUser):
    """The scheduler's own use of its nodes: it keeps them connected and computes nothing there."""
    client = comp = 'keepconnected'
    name = 'the scheduler'
    warns = False

    def __init__(self, specs: List[NodeSpec], port: int, options: 'Options') -> None:
        self.specs = specs
        self.port = port
        self.searches = not options.nodes
        self.multicast = options.multicast

    def node_connected(self, peer: NodeConnection) -> None:
        """Log that a node is connected."""
        logger.info('node %s is connected, and offers %d CPUs', peer, peer.offered)

    def spec_of(self, peer: NodeConnection) -> Optional[NodeSpec]:
        """Return the element of `specs` that matches a node. A node that has connected by itself
        and knows the secret matches, too."""
        if peer.port:
            return super().spec_of(peer)
        return NodeSpec('*', 0)


def take_state_directory(root: str) -> None:
    """Create the directory of --state-dir, or check that it is a scheduler's. Raises DispyError or
    OSError."""
    take_own_directory(root, STATE_MARK, ('state.db',), '--state-dir')


def may_dial(host: str, address: str, allowed: Sequence[str]) -> bool:
    """Return whether a node may be connected to by its name, or at an address that its name
    resolves to. Programs name nodes; without a limit they could make the scheduler try any host."""
    if address:
        found = ipaddress.ip_address(plain_address(address.partition('%')[0]))
    else:
        found = None
    for word in allowed:
        try:
            network = ipaddress.ip_network(word, False)
        except ValueError:
            if host and NodeSpec(word, NODE_PORT).fits(host):
                return True
            continue
        if found is not None and found in network:
            return True
    if allowed:
        return False
    if found is None:
        return False
    return found.is_private or found.is_loopback or found.is_link_local


def raise_descriptors() -> None:
    """Raise the limit of descriptors. Each connection needs one, and the soft limit is low by
    default: 1024 on Linux, 256 on macOS, which permits at most 10240 whatever the hard limit is."""
    try:
        import resource
    except ImportError:   # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if sys.platform == 'darwin':
        most = 10240
    else:
        most = 1 << 16
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    if soft == resource.RLIM_INFINITY:
        return
    if not soft < most:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError) as exc:
        logger.debug('the limit of descriptors stays at %d: %s', soft, exc)


def links_of_one() -> int:
    """Return how many connections of programs one address may have: a quarter of the descriptors
    that this process may have."""
    try:
        import resource
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:
        most = 512
    most = min(most, 1 << 16) - 64
    return max(16, most // 4)


def specs_of(rows: Any) -> List[NodeSpec]:
    """Return the specifications of nodes that a program has sent as `nodes`; None means all nodes.
    Raises PeerError."""
    if rows is None:
        return [NodeSpec('*', NODE_PORT)]
    try:
        return [_spec_of(*row) for row in rows]
    except (TypeError, ValueError) as exc:
        raise PeerError('nodes: %s' % exc) from exc


def _spec_of(host: Any, port: Any, cpus: Any, number: Any) -> NodeSpec:
    """Return one of these specifications. `number` is that of the NodeAllocate about which the
    program is asked, or 0 if there is none."""
    nodes = parse_nodes((host, port, cpus), NODE_PORT, True)
    spec = nodes[0]
    allocator: Any = None
    if number:
        allocator = ClientAllocator(number)
    return spec._replace(allocator=allocator)


class ProgramUser(NamedTuple):
    """The user of a program, who is identified by the secret of the program, or only by what the
    program says."""
    name: str = ''
    is_proven: bool = False

    def __str__(self) -> str:
        if self.is_proven or not self.name:
            return self.name
        return self.name + ' (not proven)'

    def known_as(self, with_secrets: bool) -> str:
        """Return the name by which limits and shares know the user. A name that is not
        authenticated counts without the host, and is never that of a user with a secret, if users
        have secrets."""
        if self.is_proven:
            return self.name
        name = self.name.partition('@')[0]
        if with_secrets:
            name += ' (not proven)'
        return name


class _Session(NamedTuple):
    """The link of a program. `operator` says whether the program has the operator's secret, `user`
    is the user whose secret it has."""
    link: Link
    names: List[str]
    operator: bool = True
    user: str = ''


# --------------------------------------------------------------------------------------------------
# The scheduler
# --------------------------------------------------------------------------------------------------

class Options(NamedTuple):
    """The options of a scheduler; there is one field for each option of the command line."""
    hosts: Tuple[str, ...]
    port: int
    nodes: Tuple[str, ...]
    node_port: int
    state_dir: str
    cluster_secret: bytes
    node_secret: bytes
    cluster_certfile: Optional[str] = None
    cluster_keyfile: Optional[str] = None
    node_certfile: Optional[str] = None
    node_keyfile: Optional[str] = None
    fifo: bool = False
    pulse: float = PULSE
    ping: float = REDIAL_MOST
    zombie: float = ZOMBIE_TIME
    max_file_size: int = sys.maxsize
    multicast: bool = False
    max_queued: int = QUEUED_MOST
    # Whether programs have a secret of their own, and whether the operator has one
    separate: bool = False
    operator_secret: bytes = b''
    # Names of users and their secrets, which replace the secret of programs
    users: Tuple[Tuple[str, bytes], ...] = ()
    # Networks and host names of nodes that may be dialled; if empty, private networks
    allowed: Tuple[str, ...] = ()
    gone: float = GONE_TIME
    history: float = 0.0               # days for which ended jobs are kept for accounting
    cleanup_nodes: bool = False        # nodes remove files, whatever programs request
    rules: UserRules = UserRules()     # limits and shares of users
    # Reads the rules again; raises StartError, OSError, ValueError
    read_rules: Optional[Callable[[], UserRules]] = None


class Stop(NamedTuple):
    """The scheduler is to end. A signal posts this event."""


class Reload(NamedTuple):
    """The rules of users are to be read again. A signal posts this event."""


RELEASED = 'released at the scheduler'


# The name, for the log, of those who give orders at the prompt of a scheduler or on its page
HERE = 'the operator'


class Drains:
    """The nodes that an operator has drained, and why. They remain drained until they are used
    again, even if they or the scheduler are restarted. The loop's thread uses this class."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._known = state.drains()

    @staticmethod
    def _name(peer: NodeConnection) -> str:
        """Return what identifies a node after a restart: its address, or the name of a node that
        connects by itself."""
        if peer.port:
            return '%s port %d' % (peer.host, peer.port)
        return peer.name

    def begin(self, peer: NodeConnection, reason: str) -> None:
        """Let no more jobs begin on a node."""
        peer.most = 0
        drain = (reason, time.time())
        self._known[self._name(peer)] = drain
        self._state.drained(self._name(peer), *drain)

    def end(self, peer: NodeConnection) -> None:
        """Use a node again."""
        peer.most = sys.maxsize
        if self._known.pop(self._name(peer), None) is not None:
            self._state.drained(self._name(peer), '', 0.0)

    def restore(self, peer: NodeConnection) -> None:
        """Drain a node that has connected, if it was drained before."""
        if self._name(peer) in self._known:
            peer.most = 0

    def reason_of(self, peer: NodeConnection) -> Optional[str]:
        """Return why a node is drained, in one text with the time, or None if it is not drained."""
        drain = self._known.get(self._name(peer))
        if drain is None:
            return None
        reason, since = drain
        local = time.localtime(since)
        at = time.strftime('since %Y-%m-%d %H:%M', local)
        if reason:
            return '%s (%s)' % (reason, at)
        return at


class JobHistory:
    """The jobs that have ended within some days, for accounting: they are on the disk, whether
    monitors ask or not. The loop's thread uses this class."""
    DAY = 86400.0
    # Number of added jobs after which old ones are removed, at most twice as many at a time
    APART = 1000

    def __init__(self, scheduler: 'Scheduler', days: float) -> None:
        self._scheduler = scheduler
        self._state = scheduler.state
        self._kept = days * self.DAY
        self._added = 0
        self._state.forget_all_before(time.time() - self._kept)

    def add(self, computation: ClientComputation, work: ClientJob, row: tuple, node: Any,
            outcome: str) -> None:
        """Note a job that has ended with this row of Results, on this node if it was on one."""
        if not self._kept:
            return
        where = ''
        peer = self._scheduler.nodes.by_key.get(node)
        if peer is not None:
            where = peer.name or str(peer)
        now = time.time()
        began = row[2] or now
        ended = row[3] or now
        account = self._state.account(computation)
        job = work.client_serial >> 16
        self._state.remember(account, job, where, began, ended, cpus_of(work), outcome)
        self._added += 1
        if self._added % self.APART == 0:
            self._state.forget_before(now - self._kept)

    def page(self, only: str, after: int, since: float) -> Tuple[int, List[tuple]]:
        """Return rows as `State.history` does: those of an authenticated user or, for an empty
        name, all."""
        if not self._kept:
            raise ValueError('no history is kept: start the dispyscheduler with --history DAYS')
        begin = max(float(since), time.time() - self._kept)
        to, rows = self._state.history(int(after), PAGE, begin)
        if only:
            rows = [row for row in rows if tuple(row[:2]) == (only, 1)]
        return to, rows


def _user_row(name: str, load: UserLoad) -> dict:
    """Return the limits and the present load of a user or a group, for monitors."""
    rule = load.rule
    row: Dict[str, Any] = {}
    row['user'] = name
    row['group'] = ''
    if load.group is not None:
        row['group'] = load.group.name.partition(' ')[2]
    row['share'] = rule.share
    row['priority'] = rule.priority
    row['cpus'] = load.cpus
    row['cpu_limit'] = _limit_of(rule.cpus)
    row['jobs'] = load.jobs
    row['job_limit'] = _limit_of(rule.jobs)
    row['past_cpus'] = load.past
    return row


def _limit_of(most: float) -> Optional[int]:
    """Return a limit, or None if there is none."""
    if most == math.inf:
        return None
    return int(most)


class UserUse:
    """What users have used in the past, which is on the disk, and the rules by which they share,
    which are read again when the operator requests it. The loop's thread uses this class."""
    APART = 10.0     # s between two notes

    def __init__(self, scheduler: 'Scheduler') -> None:
        self._scheduler = scheduler
        self._state = scheduler.state
        self._noted_at = 0.0
        self._is_changing = False

    def restore(self) -> None:
        """Take over what an earlier run has noted."""
        users = self._scheduler.schedule.users
        half_life = users.rules.half_life
        if not half_life:
            return
        now = time.time()
        used = {}
        for name, cpus, at in self._state.used():
            used[name] = cpus * 0.5 ** (max(0.0, now - at) / half_life)
        users.restore(used, self._scheduler.now)

    def look(self) -> None:
        """Note from time to time what was used, while jobs run."""
        now = self._scheduler.now
        users = self._scheduler.schedule.users
        if now < self._noted_at + self.APART or not users.rules.half_life:
            return
        is_busy = any(load.jobs for load in users.loads().values())
        if is_busy or self._is_changing:
            self.note()
        self._is_changing = is_busy
        self._noted_at = now

    def note(self) -> None:
        """Note what was used."""
        users = self._scheduler.schedule.users
        if users.rules.half_life:
            self._state.note_used(users.used(self._scheduler.now), time.time())

    def limited(self, computation: ClientComputation) -> Tuple[int, str]:
        """Return how many jobs of a computation wait because of a limit of its user, and why."""
        load = self._scheduler.schedule.comps.get(computation.comp)
        if load is None:
            return 0, ''
        return load.held_up()

    def rows(self, only: str) -> List[dict]:
        """Return the users and groups that are known, or the one with this name, with their limits
        and their present load. Raises ValueError."""
        users = self._scheduler.schedule.users
        if users.rules.are_empty:
            raise ValueError('users have no limits and no shares: start the dispyscheduler with '
                             '--limit, --share, --priority, --group or --half-life')
        users.advance(self._scheduler.now)
        rows = []
        for name, load in users.loads().items():
            if only in ('', name):
                rows.append(_user_row(name, load))
        return rows[:PAGE]

    def reload(self) -> None:
        """Read the rules again. If the new ones are invalid, the present ones remain in force."""
        scheduler = self._scheduler
        read = scheduler.options.read_rules
        if read is None:
            return
        try:
            rules = read()
        except (DispyError, OSError, ValueError) as exc:
            logger.error('limits and shares of users are not changed, because they cannot be read '
                         'again: %s', exc)
            return
        self.note()
        scheduler.decide(RulesChanged(rules))
        logger.info('limits and shares of users were read again')


class TurnTimes:
    """How long the turns of the scheduler take. The loop's thread uses this class."""
    SPAN = 30.0     # s; the longest turn is that of this span and of the previous one

    def __init__(self) -> None:
        self.turns = 0
        self.seconds = 0.0
        self._longest = 0.0
        self._longest_before = 0.0
        self._since = 0.0

    def add(self, began: float, now: float) -> None:
        """Note how long a turn took."""
        seconds = now - began
        self.turns += 1
        self.seconds += seconds
        if now - self._since >= self.SPAN:
            self._longest_before = self._longest
            self._longest = 0.0
            self._since = now
        self._longest = max(self._longest, seconds)

    @property
    def longest(self) -> float:
        """Return the duration of the longest turn of about the last minute."""
        return max(self._longest, self._longest_before)


class JobsForMonitors:
    """The jobs of all programs, one by one, as monitors show them. Jobs that have ended are noted
    while a monitor asks: their names, arguments and output are in memory then. The loop's thread
    uses this class."""
    PATIENCE = 60.0   # s without a request after which no monitor is considered to watch

    def __init__(self, overview: 'ProgramOverview', scheduler: 'Scheduler') -> None:
        self._overview = overview
        self._scheduler = scheduler
        self._watched_until = 0.0
        self._ended = EndedJobs()

    def watch(self) -> None:
        """Note that a monitor asks."""
        self._watched_until = self._scheduler.now + self.PATIENCE

    def note(self, computation: ClientComputation, work: ClientJob, row: tuple, node: Any,
             status: int, text: str) -> None:
        """Note a job that has ended with this row of Results, on this node if it was on one."""
        if self._scheduler.now > self._watched_until:
            return
        peer = self._scheduler.nodes.by_key.get(node)
        where = ''
        if peer is not None:
            where = peer.name or str(peer)
        stdout = _end_of_output(row[5])
        stderr = _end_of_output(row[6])
        serial = work.client_serial
        name = job_number(serial)
        payload = work.payload or None
        attempt = attempt_number(work.serial)
        cpus = cpus_of(work)
        began = row[2] or None
        ended = row[3] or time.time()
        noted = (computation.number, serial, name, payload, status, attempt, node, where, cpus,
                 None, began, ended)
        self._ended.add(noted, stdout, stderr, text, work.lost_with)

    def ended(self, known: int) -> List[tuple]:
        """Return the jobs that have ended after the one with this number, in the form of EndedJob;
        at most PAGE."""
        rows = self._ended.since(known, PAGE, self._overview.seen_clusters())
        return list(map(tuple, rows))

    def at_nodes(self, first: int, count: int) -> List[tuple]:
        """Return the jobs that are on nodes: cluster, job, number of the attempt, key of the node,
        whether it runs, seconds that it has run or None, CPUs."""
        keys = sorted(self._scheduler.schedule.nodes, key=str)
        rows: List[tuple] = []
        for key in keys:
            for computation in self._overview.opened_computations():
                rows += self._jobs_there(computation, key)
                if len(rows) >= first + count:
                    break
        return rows[first:first + min(count, PAGE)]

    def _jobs_there(self, computation: ClientComputation, key: Any) -> List[tuple]:
        rows = []
        for job in self._overview.known_jobs_at(key, computation.comp, PAGE):
            work = job.work
            attempt = attempt_number(work.serial)
            row = (computation.number, work.client_serial, attempt, key, job.is_running,
                   job.seconds, cpus_of(work))
            rows.append(row)
        return rows

    def waiting(self, number: int, first: int, count: int) -> List[int]:
        """Return the numbers of the jobs of a computation that are on no node, in the order of
        their submission."""
        works = self._overview.computation(number).works
        waiting = (serial for serial, work in works.items() if work.state in _AT_NO_NODE)
        last = first + min(count, PAGE)
        page = itertools.islice(waiting, first, last)
        return list(page)

    def jobs(self, key: Any) -> List[tuple]:
        """Return the jobs on a node: cluster, job, whether it runs, seconds that it has run or
        None."""
        peer = self._overview.peer(key)
        rows: List[tuple] = []
        for computation in self._overview.opened_computations():
            left = PAGE - len(rows)
            jobs = self._overview.jobs_at(peer.key, computation.comp, left)
            for job in jobs:
                number = job.work.client_serial
                row = (computation.number, number, job.is_running, job.seconds)
                rows.append(row)
        return rows

    def arguments(self, jobs: list) -> list:
        """Return the packed arguments of jobs that are identified by pairs of cluster and job:
        their size if they are large, None if the job has ended."""
        computations = {}
        for computation in self._overview.opened_computations():
            computations[computation.number] = computation
        found = []
        for number, serial in jobs[:PAGE]:
            work = None
            if number in computations:
                work = computations[number].works.get(serial)
            found.append(self._arguments_of(work))
        return found

    def _arguments_of(self, work: Optional[ClientJob]) -> Any:
        if work is None:
            return None
        if work.payload:
            return shown_arguments(work.payload)
        state = self._scheduler.state
        number = work.number
        try:
            size = state.size_of_payload(number)
            if size > ARGUMENTS_MOST:
                return size
            return shown_arguments(state.payload(number))
        except OSError as exc:   # the job is shown without them
            logger.debug('arguments of job %d: %s', job_number(work.client_serial), exc)
            return None

    def looks(self, jobs: list, wants_stacks: bool) -> List[Optional[tuple]]:
        """Return what jobs do that are identified by pairs of cluster and job, in the form of
        JobSight; None for those of which it is not known yet."""
        found = []
        for number, serial in jobs[:PAGE]:
            computation = self._overview.computation(number)
            sights = self.looks_of(computation, [serial], wants_stacks)
            found += sights
        return found

    def looks_of(self, computation: ClientComputation, serials: List[int],
                 wants_stacks: bool) -> List[Optional[tuple]]:
        """Return the same for jobs of a computation."""
        numbers = []
        for serial in serials:
            work = computation.works.get(serial)
            number = 0
            if work is not None:
                number = work.number
            numbers.append(number)
        sights = self._overview.sights(computation.comp, numbers, bool(wants_stacks))
        return [None if sight is None else tuple(sight) for sight in sights]

    def cancel(self, number: int, serials: List[int]) -> int:
        """End jobs of a computation, wherever they are. Return the number of jobs."""
        works = self._overview.computation(number).works
        found = [works[serial] for serial in serials if serial in works]
        for work in found:
            self._scheduler.decide(CancelAsked(work))
        return len(found)


_AT_NO_NODE = frozenset((JobState.CREATED, JobState.REQUEUED))


def _end_of_output(data: Any) -> bytes:
    if size_of(data) > LAZY:
        return b''
    plain: bytes = _plain(data)
    return plain


class ProgramOverview(Overview):
    """Answers monitors and carries out their orders, which come by a `Call` named 'overview' that
    names no computation. A peer that knows the secret of the programs may see and manage
    everything; if the operator has a secret of their own, this needs that one. An answer has at
    most PAGE rows. Counts, limits and releases are those of this process: a scheduler that is
    restarted has forgotten them, but not which nodes are drained. The loop's thread uses this
    class."""
    COUNTS = ('submitted', 'done', 'failed', 'cancelled')   # as of NodeUser.jobs_counted

    def __init__(self, scheduler: 'Scheduler') -> None:
        super().__init__(scheduler)
        self._scheduler = scheduler
        self._drains = scheduler.drains
        self._only = ''      # the user who asks and may not see data of others
        self._asker = HERE   # who gives orders, for the log
        self._numbers = itertools.count(1)
        # Node -> jobs that have ended there and seconds that they ran, for computations that have
        # ended
        self._ended_at: Dict[Any, List[float]] = {}
        self._failed_jobs = FailedJobs()
        self.jobs_shown = JobsForMonitors(self, scheduler)
        # Nodes that no computation may use -> computations that were told so
        self._released: Dict[Any, Set[str]] = {}

    def answer(self, name: str = '', *args: Any) -> Tuple[float, Any]:
        """Return the seconds that an answer took, and the answer. Raises ValueError or TypeError
        for an invalid question."""
        began = time.perf_counter()
        if name not in self._ANSWERS:
            raise ValueError('%.40r cannot be asked of a scheduler' % (name,))
        value = self._ANSWERS[name](self, *args)
        return time.perf_counter() - began, value

    def answer_operator(self, asker: str, name: str = '', *args: Any) -> Tuple[float, Any]:
        """Answer a peer that has the operator's secret: as `answer`, and the log names the peer."""
        self._asker = asker
        try:
            return self.answer(name, *args)
        finally:
            self._asker = HERE

    def answer_user(self, user: str, name: str = '', *args: Any) -> Tuple[float, Any]:
        """Answer a user whose name is authenticated: as `answer`, as if there were no programs of
        others. Orders that concern others are refused."""
        if name not in self._OF_USERS:
            raise RuntimeError(
                "%.40r needs the operator's secret (--operator-secret-file of the dispyscheduler)" %
                (name,))
        self._only = user
        try:
            return self.answer_operator('user %s' % user, name, *args)
        finally:
            self._only = ''

    def seen_clusters(self) -> Optional[Set[int]]:
        """Return the numbers of the clusters that the asking user may see; None means all present
        and former ones."""
        if not self._only:
            return None
        return {computation.number for computation in self.opened_computations()}

    def opened_computations(self) -> List[ClientComputation]:
        """Return the computations that the asking user may see."""
        opened = self._scheduler.computations.opened()
        if not self._only:
            return opened
        mine = ProgramUser(self._only, True)
        return [computation for computation in opened if computation.user == mine]

    def answer_anybody(self, name: str = '', *args: Any) -> Tuple[float, Any]:
        """Answer a peer that does not have the operator's secret: with the names and counts of all
        programs and with nothing about their jobs. Orders are refused."""
        if name in ('failures', 'jobs', 'ended', 'at_nodes', 'waiting'):
            return 0.0, []
        if name not in ('clusters', 'nodes'):
            raise RuntimeError(
                "%.40r needs the operator's secret (--operator-secret-file of the dispyscheduler)" %
                (name,))
        took, rows = self.answer(name, *args)
        for row in rows:
            if name == 'clusters':
                row.update(comp='', program='', user='', proven=False)
            else:
                row['uses'] = list(map(_without_reason, row['uses']))
        return took, rows

    # -- called by the parts of the scheduler ------------------------------------------------------

    def opened(self, computation: ClientComputation) -> None:
        """Give a computation that begins its number for monitors."""
        computation.number = next(self._numbers)
        computation.since = self._scheduler.now

    def ended(self, computation: ClientComputation, work: ClientJob, row: tuple, node: Any) -> None:
        """Count a job that has ended with this row of Results, on this node if it was on one."""
        outcome = row[1]
        exit_status = 0
        text = ''
        status = JobState.FINISHED
        if outcome in RETURNED and computation.packed.is_program:
            exit_status = _exit_status(row)
        if node is not None:
            seconds = row[3] - row[2]
            count = computation.ended_at.setdefault(node, [0, 0.0])
            count[0] += 1
            count[1] += seconds
            computation.cpu_seconds += seconds * cpus_of(work)
        if outcome == Outcome.CANCELLED:
            word = 'cancelled'
            status = JobState.CANCELLED
            computation.cancelled += 1
        elif outcome in RETURNED and not exit_status:
            word = 'done'
            computation.done += 1
        else:
            word = 'failed'
            computation.failed += 1
            status, text = self._note_failure(computation, work, row, node, exit_status)
        self.jobs_shown.note(computation, work, row, node, int(status), text)
        self._scheduler.history.add(computation, work, row, node, word)

    def _note_failure(self, computation: ClientComputation, work: ClientJob, row: tuple, node: Any,
                      exit_status: int) -> Tuple[JobState, str]:
        """Note a job that has failed. Return its state and why it has failed."""
        peer = self._scheduler.nodes.by_key.get(node)
        where = ''
        if peer is not None:
            where = str(peer)
        text = 'exit status %d' % exit_status
        if not exit_status:
            text = _failure_text(row)
        status = _STATE_OF.get(row[1], JobState.TERMINATED)
        serial = work.client_serial
        self._failed_jobs.add(row[3], computation.number, job_number(serial), work.payload,
                              int(status), where, text, serial)
        return status, text

    def over(self, computation: ClientComputation) -> None:
        """Keep the counts of a computation that has ended, for each node."""
        peers = self._scheduler.nodes.by_key
        for key, (jobs, seconds) in computation.ended_at.items():
            count = self._ended_at.setdefault(key, [0, 0.0])
            count[0] += jobs
            count[1] += seconds
        for key in [key for key in self._ended_at if key not in peers]:
            del self._ended_at[key]

    def keeps_from(self, peer: NodeConnection, comp: str) -> bool:
        """Return whether a computation may not be set up on a node because the node was released
        for all, and note that the computation was told so."""
        use = peer.uses[comp]
        if comp == KeepConnected.comp:
            return False
        if peer.key not in self._released:
            return False
        if use.state is AssignmentState.CLOSED:
            return False
        if use.offered:
            return False
        use.move('close')
        use.reason = RELEASED
        self._released[peer.key].add(comp)
        return True

    # -- questions ---------------------------------------------------------------------------------

    def computation(self, number: int) -> ClientComputation:
        """Return the computation with this number. Raises ValueError."""
        for computation in self.opened_computations():
            if computation.number == number:
                return computation
        raise ValueError('there is no cluster %.20r' % (number,))

    def peer(self, key: Any) -> NodeConnection:
        """Return a node. Raises ValueError."""
        peer = self._scheduler.nodes.by_key.get(key)
        if peer is None:
            raise ValueError('there is no node %.80r' % (key,))
        return peer

    def _clusters(self, first: int, count: int) -> List[dict]:
        self.jobs_shown.watch()
        computations = self.opened_computations()
        count = min(count, PAGE)
        clusters: List[dict] = []
        for computation in computations[first:first + count]:
            clusters.append(self._cluster(computation))
        return clusters

    def _cluster(self, computation: ClientComputation) -> dict:
        scheduler = self._scheduler
        row: Dict[str, Any] = {}
        row.update(zip(self.COUNTS, computation.jobs_counted()))
        row['number'] = computation.number
        row['comp'] = computation.comp
        row['name'] = computation.name[:200]
        row['program'] = computation.program
        row['user'] = computation.user.name
        row['proven'] = computation.user.is_proven
        row['connected'] = computation.link in scheduler.links
        row['job_seconds'] = computation.job_seconds()
        row['elapsed'] = scheduler.now - computation.since
        row['limited'], row['limit'] = scheduler.user_use.limited(computation)
        return row

    def _users(self) -> List[dict]:
        return self._scheduler.user_use.rows(self._only)

    def _nodes(self, first: int, count: int, asking: bool) -> List[dict]:
        scheduler = self._scheduler
        computations = self.opened_computations()
        peers = scheduler.nodes.by_key.values()
        page = itertools.islice(peers, first, first + min(count, PAGE))
        return [self._node(peer, computations, asking) for peer in page]

    def _node(self, peer: NodeConnection, computations: List[ClientComputation],
              asking: bool) -> dict:
        if asking:
            self.ask_node(peer, KeepConnected.comp, REPORTS_APART)
        running = self.running_at(peer.key)
        jobs, seconds = self._ended_at.get(peer.key, (0, 0.0))
        uses = []
        for computation in computations:
            ended, ran = computation.ended_at.get(peer.key, (0, 0.0))
            jobs += ended
            seconds += ran
            if computation.comp in peer.uses:
                at_work, used = running.get(computation.comp, (0, 0))
                state, reason, cpus = self._use_of(peer, computation.comp)
                number = computation.number
                use = NodeUse(number, state, reason, cpus, at_work, used, int(ended), ran)
                uses.append(tuple(use))
        state, reason = self._state_for_all(peer)
        free = self.free_at(peer, KeepConnected.comp)
        row = self.node_row(peer, free)
        row['state'] = state
        row['reason'] = reason
        row['cpus'] = min(peer.offered, peer.most)
        row['jobs'] = jobs
        row['job_seconds'] = seconds
        row['uses'] = uses
        return row

    def _use_of(self, peer: NodeConnection, comp: str) -> Tuple[str, str, int]:
        """Return the state of a node for a computation, the reason, and the CPUs that it may
        use."""
        _, state, reason, cpus, _ = self._scheduler.queries.node_of(comp, peer)
        short_reason = reason[-500:]
        return shown_state(state, reason), short_reason, cpus

    def _state_for_all(self, peer: NodeConnection) -> Tuple[str, str]:
        """Return the state of a node for all computations, and the reason."""
        if peer.key in self._released:
            return 'closed', RELEASED
        reason = self._drains.reason_of(peer)
        if reason is not None:
            return self._drained_state(peer), reason
        return peer.state_word, peer.reason[-2000:]

    @staticmethod
    def _drained_state(peer: NodeConnection) -> str:
        """Return the state of a drained node; one that is away counts as away."""
        if peer.link is None:
            return peer.state_word
        return shown_state(peer.state_word, DEALLOCATED)

    def _history(self, after: int, since: float) -> Tuple[int, List[tuple]]:
        """Return jobs that have ended, and the number after which there are more."""
        return self._scheduler.history.page(self._only, after, since)

    def _load(self) -> Dict[str, float]:
        """Return the load of the scheduler, for metrics."""
        scheduler = self._scheduler
        times = scheduler.turn_times
        works = 0
        results = 0
        for computation in self.opened_computations():
            works += len(computation.works)
            results += len(computation.ended)
        at_nodes = 0
        for node in scheduler.schedule.nodes.values():
            at_nodes += sum(map(len, node.in_flight.values()))
        links = scheduler.links.values()
        return {
            'turns': times.turns,
            'seconds': times.seconds,
            'longest': times.longest,
            'waiting': works - at_nodes,
            'results': results,
            'bytes': sum(link.queued for link in links),
            'links': len(links),
            'stuck': int(scheduler.commit.stuck_until is not None),
        }

    def _failures(self, known: int) -> List[tuple]:
        """Return the jobs that have failed after the failure with this number, in the form of
        FailedJob."""
        rows = self._failed_jobs.since(known, self.seen_clusters())
        return list(map(tuple, rows))

    # -- orders ------------------------------------------------------------------------------------

    def _cancel(self, number: int, key: Any, jobs: Any) -> int:
        """End jobs on a node: those of a list, or all for None. Without a node, end those of the
        list wherever they are."""
        if key is None:
            count = self.jobs_shown.cancel(number, jobs)
            logger.info('%s has cancelled jobs of computation %d: %d', self._asker, number, count)
            return count
        comp = self.computation(number).comp
        there = self.sent_to(self.peer(key).key, comp)
        works: List[Any] = list(there.values())
        if jobs is not None:
            works = [work for work in works if work.client_serial in jobs]
        for work in works:
            self._scheduler.decide(CancelAsked(work))
        logger.info('%s has cancelled jobs of computation %d at node %s: %d', self._asker, number,
                    self.peer(key), len(works))
        return len(works)

    def _cancel_waiting(self, number: int) -> int:
        """End jobs that have not begun, including those that wait on nodes."""
        comp = self.computation(number).comp
        count = self._scheduler.cancels.cancel_waiting(comp)
        logger.info('%s has cancelled jobs of computation %d that had not begun: %d', self._asker,
                    number, count)
        return count

    def _add(self, host: str, port: Optional[int]) -> int:
        """Look for a node. All computations whose `nodes` match it may use it."""
        scheduler = self._scheduler
        node: Any = host
        if port is not None:
            node = (host, port)
        default_port = scheduler.clusters[KeepConnected.comp].port
        scheduler.selection.allocate(KeepConnected.comp, parse_nodes([node], default_port))
        logger.info('%s has added node %s', self._asker, host)
        return 1

    def _cpus(self, key: Any, cpus: int, reason: str = '') -> int:
        """Limit the CPUs of a node that each computation may use; 0 drains the node, for this
        reason."""
        peer = self.peer(key)
        if type(reason) is not str:
            raise ValueError('reason=%.40r is not a text' % (reason,))
        offered = peer.offered
        if type(cpus) is not int or cpus < 0 or cpus > offered > 0:
            raise ValueError('cpus=%.20r: node %s offers %d' % (cpus, peer, peer.offered))
        if cpus:
            self._drains.end(peer)
            peer.most = cpus
            logger.info('%s has limited node %s to %d CPUs for each computation', self._asker,
                        peer, cpus)
        else:
            self._drains.begin(peer, reason[:REASON_MOST])
            logger.info('%s has drained node %s: %s', self._asker, peer,
                        reason[:REASON_MOST] or 'no reason was given')
        self._scheduler.sharing.limit(peer, list(peer.uses))
        return 1

    def _release(self, key: Any) -> int:
        """Release a node for all computations, including those that come later, when their jobs
        there have ended."""
        peer = self.peer(key)
        logger.info('%s has released node %s', self._asker, peer)
        told = self._released.setdefault(peer.key, set())
        for comp, use in list(peer.uses.items()):
            if comp == KeepConnected.comp:
                continue
            if use.state is not AssignmentState.CLOSED:
                told.add(comp)
                self._scheduler.selection.leave(comp, peer.key, 'close', False)
        return 1

    def _use(self, key: Any) -> int:
        """Use a node again that was released or drained, with all its CPUs."""
        scheduler = self._scheduler
        peer = self.peer(key)
        self._drains.end(peer)
        logger.info('%s has resumed node %s', self._asker, peer)
        for comp in self._released.pop(peer.key, set()):
            use = peer.uses.get(comp)
            if use is None:
                continue
            if use.state is not AssignmentState.CLOSED:
                use.then = ''
                continue
            use.move('open')
            use.reason = ''
            use.allocation = None
            scheduler.setup.set_up(peer, comp)
        scheduler.sharing.limit(peer, list(peer.uses))
        return 1

    _ANSWERS: Dict[str, Callable[..., Any]] = {
        'clusters': _clusters,
        'nodes': _nodes,
        'failures': _failures,
        'load': _load,
        'users': _users,
        'history': _history,
        'jobs': lambda self, *args: self.jobs_shown.jobs(*args),
        'ended': lambda self, *args: self.jobs_shown.ended(*args),
        'at_nodes': lambda self, *args: self.jobs_shown.at_nodes(*args),
        'waiting': lambda self, *args: self.jobs_shown.waiting(*args),
        'looks': lambda self, *args: self.jobs_shown.looks(*args),
        'arguments': lambda self, *args: self.jobs_shown.arguments(*args),
        'cancel': _cancel,
        'cancel_waiting': _cancel_waiting,
        'add': _add,
        'cpus': _cpus,
        'release': _release,
        'use': _use,
    }
    # What users may ask, of their own programs
    _OF_USERS = frozenset(('history', 'clusters', 'nodes', 'failures', 'jobs', 'ended',
                           'at_nodes', 'waiting', 'looks', 'arguments', 'cancel',
                           'cancel_waiting', 'users'))


def _without_reason(use: tuple) -> tuple:
    """Return a NodeUse for those who may not see the reasons of other programs."""
    return tuple(NodeUse(*use)._replace(reason=''))


def _failure_text(row: tuple) -> str:
    """Return why a job has failed, by its row of Results."""
    payload = row[4]
    if len(payload) <= LAZY:
        payload = _plain(payload)
    if row[1] == Outcome.RAISED:
        if len(payload) >= 4:
            return unpack_error(payload)[0]
    return str(payload, 'utf-8', 'replace')


class Part:
    """A part of the scheduler, with what the parts use most. The loop's thread uses it."""

    def __init__(self, scheduler: 'Scheduler') -> None:
        self._scheduler = scheduler
        self._state = scheduler.state
        self._links = scheduler.links
        self._schedule = scheduler.schedule
        self._decide = scheduler.decide
        self._send = scheduler.send   # a message, when the transaction of the turn is on the disk


class Quota:
    """Limits how much each program may have queued here. Jobs of a program that has reached its
    limit, and jobs that come while the disk is full, are returned to the program, and it is offered
    no CPUs until there is room. The loop's thread uses this class."""

    def __init__(self, scheduler: 'Scheduler', most: int) -> None:
        self._scheduler = scheduler
        self._most = most
        # Instance of a program -> bytes of arguments
        self._queued: Dict[bytes, int] = collections.Counter()
        # Links that get no offer of CPUs -> instance
        self._waiting: Dict[int, bytes] = {}

    def add(self, computation: ClientComputation, work: ClientJob, size: int) -> None:
        """Count a job that was accepted."""
        work.size = BYTES_OVERHEAD + size
        self._queued[computation.instance] += work.size

    def remove(self, computation: ClientComputation, work: ClientJob) -> None:
        """Do not count a job any more that has ended, or whose computation has."""
        self._queued[computation.instance] -= work.size
        work.size = 0
        if not self._queued[computation.instance]:
            del self._queued[computation.instance]

    def moved(self, computation: ClientComputation, instance: bytes) -> None:
        """Count a computation for another process of the program, which has taken the computation
        over."""
        works = computation.works.values()
        size = sum(work.size for work in works)
        self._queued[computation.instance] -= size
        self._queued[instance] += size

    def has_room(self, computation: ClientComputation, size: int) -> bool:
        """Return whether one more job with so many bytes of arguments may come. One job is always
        accepted, however large."""
        queued = self._queued.get(computation.instance, 0)
        if not queued:
            return True
        return queued + BYTES_OVERHEAD + size <= self._most

    def give_back(self, link: Link, computation: ClientComputation, serials: List[int],
                  full: bool) -> None:
        """Return jobs that were not accepted. The message is sent at once, because nothing else is
        sent while the disk is full."""
        at_once = self._scheduler.commit.send
        if link.number not in self._waiting:
            self._waiting[link.number] = link.instance
            at_once(link, CpusChanged(0))
            text = 'the disk of the scheduler is full: new jobs wait here until there is room'
            if not full:
                text = ('this program has %d bytes of arguments at the scheduler, and may have %d '
                        'there (--max-queued-bytes): more jobs are taken as those end')
                text %= (self._queued.get(computation.instance, 0), self._most)
            at_once(link, Notice(computation.comp, text))
        for message in in_parts(JobsReturned, computation.comp, serials):
            at_once(link, message)

    def take_again(self) -> None:
        """Offer CPUs again to the programs that have less than half of what they may have, because
        the disk has room."""
        scheduler = self._scheduler
        for number, instance in list(self._waiting.items()):
            link = scheduler.links.get(number)
            if link is None:
                del self._waiting[number]
                continue
            queued = self._queued.get(instance, 0)
            if queued <= self._most // 2:
                del self._waiting[number]
                scheduler.send(link, CpusChanged(UNLIMITED_CPUS))


class NodeSharing(NodePolicy):
    """Decides which nodes may be connected to and used, and whether a node serves all computations
    or one that wants its nodes exclusively. The loop's thread uses this class."""
    start_node = ('Run `python dispynode.py` on a host that has the secret which the scheduler '
                  'uses for nodes, and list that host at the scheduler (-n)')

    def __init__(self, scheduler: 'Scheduler') -> None:
        self._scheduler = scheduler
        # Computations that want their nodes exclusively, in the order of their arrival
        self._wanting: List[str] = []
        self._is_due = False             # whom nodes serve may have changed
        self.named: Set[str] = set()     # nodes that the operator has named
        self.port = 0                    # the port at which programs reach the scheduler

    def introduction(self) -> str:
        """Return who this is, for those who run the node and for others who want to use it."""
        return 'dispyscheduler of %s at port %d' % (super().introduction(), self.port)

    def process(self) -> tuple:
        """Return the same for programs."""
        host, pid, _ = super().process()
        return host, pid, self.port

    def about_holder(self, holder: Holder, place: str) -> str:
        """Return an empty text, because a scheduler shares its nodes."""
        return ''

    def addresses_of(self, peer: NodeConnection) -> Optional[Callable[[str], bool]]:
        """Return a function that says to which addresses of a node connections may be made, or None
        for all. A dial thread calls it."""
        allowed = self._scheduler.options.allowed
        if peer.host in self.named:
            return None
        if may_dial(peer.host, '', allowed):
            return None
        return lambda address: may_dial('', address, allowed)

    def may_set_up(self, peer: NodeConnection, comp: str) -> bool:
        """Return whether a computation may be set up on a node. It may not if all jobs of a program
        that is gone have ended, nor on a node that was released for all."""
        scheduler = self._scheduler
        computation = scheduler.clusters.get(comp)
        if isinstance(computation, ClientComputation) and computation.rests:
            return False
        return not scheduler.overview.keeps_from(peer, comp)

    def node_met(self, peer: NodeConnection) -> None:
        """Note a node, so that it is known after the end of this process."""
        self._scheduler.drains.restore(peer)
        self._scheduler.state.met(peer)

    def becomes_ready(self, peer: NodeConnection, comp: str) -> None:
        """Decide whom a node serves before the number of CPUs is determined that a computation may
        use there."""
        self._assign(peer)

    def node_drained(self, peer: NodeConnection) -> None:
        """Decide again whom a node serves: another computation may have waited for that."""
        self._assign(peer)

    def node_freed(self, peer: NodeConnection) -> None:
        """Decide again at the end of the turn: other computations may want the node."""
        self._is_due = True

    def begins(self, computation: ClientComputation) -> None:
        """Note that a computation begins."""
        if computation.exclusive:
            self._wanting.append(computation.comp)

    def is_over(self, computation: ClientComputation) -> None:
        """Note that a computation has ended."""
        if computation.comp in self._wanting:
            self._wanting.remove(computation.comp)
        self._is_due = True

    def look_again(self) -> None:
        """Decide again at the end of this turn, because a program has come or gone, or has no jobs
        any more."""
        self._is_due = True

    def assign_all(self) -> None:
        """Decide whom all nodes serve if that may have changed. This is called at the end of a
        turn."""
        if self._is_due:
            self._is_due = False
            for peer in list(self._scheduler.nodes.by_key.values()):
                self._assign(peer)

    def _holds(self, comp: str) -> bool:
        """Return whether a computation that wants its nodes exclusively still has a program or
        jobs."""
        scheduler = self._scheduler
        computation = scheduler.clusters.get(comp)
        if not isinstance(computation, ClientComputation):
            return False
        if computation.link in scheduler.links:
            return True
        return bool(computation.works)

    def _assign(self, peer: NodeConnection) -> None:
        """Decide whom a node serves: the first computation that wants it exclusively, when the jobs
        of the others have ended there, or all."""
        owner = self._owner_of(peer)
        blocked: Set[str] = set()
        if owner:
            blocked.update(peer.uses)
            if not self._has_others(peer, owner):
                blocked.discard(owner)
        changed = blocked ^ peer.blocked
        peer.blocked = blocked
        self.limit(peer, changed)

    def _owner_of(self, peer: NodeConnection) -> str:
        """Return the first computation that wants a node exclusively, or an empty text."""
        for comp in self._wanting:
            use = peer.uses.get(comp)
            if use is None:
                continue
            if use.state is AssignmentState.CLOSED:
                continue
            if self._holds(comp):
                return comp
        return ''

    def _has_others(self, peer: NodeConnection, owner: str) -> bool:
        """Return whether jobs of other computations are on a node."""
        node = self._scheduler.schedule.nodes.get(peer.key)
        if node is None:
            return False
        others = []
        for comp, jobs in node.in_flight.items():
            if comp != owner:
                others.append(jobs)
        return any(others)

    def limit(self, peer: NodeConnection, comps: Iterable[str]) -> None:
        """Tell a node and the Schedule what computations may use there now."""
        scheduler = self._scheduler
        for comp in comps:
            use = peer.uses.get(comp)
            if use is None:
                continue
            if use.state is not AssignmentState.READY:
                continue
            if use.then:
                continue
            cpus = scheduler.selection.tell_limit(peer, comp)
            if cpus:
                scheduler.decide(NodeOffers(peer.key, comp, cpus))
            else:
                scheduler.decide(NodeDrains(peer.key, comp))


class Commit:
    """Holds back what is sent until the transaction of its turn is on the disk. While the disk
    accepts no transactions, nodes are not read. The loop's thread uses this class."""

    def __init__(self, scheduler: 'Scheduler', send: Callable[[Link, Any], None]) -> None:
        self._scheduler = scheduler
        self.send = send       # sends a message at once, whatever becomes of the transaction
        # Messages that wait for the transaction of this turn
        self.later: List[Tuple[Link, Any]] = []
        # When to try again, while the disk accepts no transactions
        self.stuck_until: Optional[float] = None

    def write_down(self) -> bool:
        """Write what has happened, then send the messages about it. Return whether the transaction
        succeeded."""
        done = self._scheduler.state.commit()
        if done:
            later = self.later
            self.later = []
            for link, message in later:
                self.send(link, message)
        return done

    def stick(self) -> None:
        """Note that the transaction failed: it is tried again after a while."""
        scheduler = self._scheduler
        # Results wait on their nodes; programs are read, because computations that they end make
        # room
        if self.stuck_until is None:
            for link in self._links_of_nodes():
                link.paused = True
                scheduler.interest(link)
        self.stuck_until = scheduler.now + RETRY_TIME

    def unstick(self) -> None:
        """Note that a transaction has succeeded: nodes are read again."""
        scheduler = self._scheduler
        if self.stuck_until is not None:
            self.stuck_until = None
            for link in self._links_of_nodes():
                link.paused = False
                link.heard = scheduler.now
                scheduler.interest(link)

    def _links_of_nodes(self) -> List[Link]:
        scheduler = self._scheduler
        links = scheduler.links.values()
        chosen_links: List[Link] = []
        for link in links:
            if link.number not in scheduler.programs.sessions:
                chosen_links.append(link)
        return chosen_links


# A part of the scheduler, and its method for a message
Handler = Tuple[Any, Callable[[Any, Link, Any], None]]


class ProgramLinks(Part):
    """The links of the programs that are connected, and their messages. The loop's thread uses this
    class."""

    def __init__(self, scheduler: 'Scheduler') -> None:
        super().__init__(scheduler)
        self.sessions: Dict[int, _Session] = {}      # by the numbers of their links
        # Message -> the part that handles it, and its method
        self._handlers: Dict[type, Handler] = {}
        self.add_handlers(self)

    def add_handlers(self, part: Any) -> None:
        """Add the messages that a part of the scheduler handles; they are in its table MESSAGES."""
        for kind, method in part.MESSAGES.items():
            self._handlers[kind] = (part, method)

    def program_came(self, event: Authenticated) -> None:
        """Note that a program has connected."""
        scheduler = self._scheduler
        options = scheduler.options
        link = Link(event.sock, event.session, event.address, scheduler.now, options.pulse,
                    OF_CLIENTS)
        scheduler.attach(link)
        number = event.session.secret
        operator = not options.separate or number == max(1, len(options.users))
        user = ''
        if number < len(options.users):
            user = options.users[number][0]
        self.sessions[link.number] = _Session(link, [event.address], operator, user)
        self._bound_links(link)

    def _bound_links(self, link: Link) -> None:
        """End a link if its address has more links than its share: the programs of one host must
        not use up all descriptors."""
        sessions = self.sessions.values()
        addresses = [session.link.address for session in sessions]
        there = addresses.count(link.address)
        most = links_of_one()
        if there > most:
            logger.error(
                '%s has %d connections, and the limit for one address is %d: the last is ended',
                link.address, there, most)
            message = 'there are %d connections from this address, and the limit is %d' % (there,
                                                                                           most)
            self._scheduler.disconnect(link, message)
            self.sessions.pop(link.number, None)

    def bound_answers(self) -> None:
        """Stop reading from programs that do not read their answers, until they have."""
        scheduler = self._scheduler
        for session in self.sessions.values():
            link = session.link
            queued = link.queued - link.unmade   # messages in parts are on the disk
            is_slow = queued > BACKPRESSURE_BYTES
            if not link.is_attached:
                continue
            if link.paused == is_slow:
                continue
            if is_slow or queued <= BACKPRESSURE_BYTES // 2:
                link.paused = is_slow
                link.heard = scheduler.now
                scheduler.interest(link)

    def take_messages(self, channel: Link) -> None:
        """Handle the messages of a program."""
        for message in channel.messages(self._scheduler.now):
            if type(message) is Bye:
                channel.on_purpose = True
                raise LinkBroken('bye: %s' % message.text[:200])
            if type(message) is Wrong:
                self._refused_results(channel, message)
            name = type(message).__name__
            if type(message) not in self._handlers:
                raise PeerError('%s may not come here' % name)
            part, method = self._handlers[type(message)]
            try:
                method(part, channel, message)
            except (LinkBroken, PeerError, OSError):
                raise
            except Exception as exc:  # an invalid message ends its link and nothing else
                logger.exception('%s of %s', name, self.name_of(channel))
                raise PeerError('%s cannot be understood: %s' % (name, exc)) from exc

    def name_of(self, link: Link) -> str:
        """Return a text that identifies the owner of a link for people: user, host and PID of the
        program."""
        return self.sessions[link.number].names[0]

    def user_of(self, link: Link) -> ProgramUser:
        """Return the user of a link: by its secret, or by what the program says."""
        session = self.sessions[link.number]
        if session.user:
            return ProgramUser(session.user, True)
        claimed = session.names[0].partition(' PID ')[0]
        return ProgramUser(claimed, False)

    def _refused_results(self, link: Link, message: Wrong) -> None:
        """Note that a program could not use a frame. After a few times, a text replaces a result
        that was in the frame."""
        for comp, serial in self._scheduler.refusals.refused(link, message.frame):
            computation = self.computation_of(link, comp)
            if computation is None:
                continue
            if serial not in computation.ended:
                continue
            number = computation.ended[serial]
            text = 'the program could not take the result: ' + message.text[:NAME_MOST]
            for row in self._state.results([number], []):
                self._state.ended(number, refused_row(row, text))
        raise LinkBroken('it cannot use what was sent: %s' % message.text[:NAME_MOST])

    def program_gone(self, channel: Link, text: str) -> None:
        """Note that the link of a program has ended."""
        name = self.name_of(channel)
        del self.sessions[channel.number]
        computations = self._scheduler.computations
        left = []
        for each in computations.all():
            if each.link == channel.number:
                left.append(each)
        if channel.on_purpose:
            logger.info('%s has disconnected', name)
        else:
            work_counts = [len(computation.works) for computation in left]
            jobs = sum(work_counts)
            logger.warning('lost the connection to %s: %s; %d of its jobs have not ended', name,
                           text, jobs)
        for computation in left:
            computations.program_gone(computation)
            if channel.on_purpose:
                computations.end(computation)

    def computation_of(self, link: Link, comp: str) -> Optional[ClientComputation]:
        """Return the computation that a message names, which must belong to this link, or None for
        one that has ended here. Raises PeerError."""
        computation = self._scheduler.computations.get(comp)
        if computation is not None and computation.link != link.number:
            raise PeerError('computation %.40r is of another program' % comp)
        return computation

    def _on_introduce(self, link: Link, message: ClientHello) -> None:
        scheduler = self._scheduler
        name = message.name[:200]
        pulse = min(max(message.pulse, 0.1), 3600.0)
        scheduler.set_pulse(link, pulse)
        session = self.sessions[link.number]
        if session.user:
            name = '%s (%s)' % (session.user, name)
        session.names[0] = name
        logger.info('%s is connected from %s', name, link.address)
        facts: Dict[str, Any] = {'dispy': __version__, 'role': 'scheduler'}
        facts['python'] = tuple(sys.version_info[:3])
        facts['memory'] = scheduler.instance.hex()
        facts['resources'] = {}   # jobs may request resources, which are counted here
        facts['pythons'] = {}     # computations may request an interpreter, which is checked here
        facts['speculates'] = True
        self._send(link, NodeHello('dispyscheduler', UNLIMITED_CPUS, facts))

    def _ignore(self, link: Link, message: Any) -> None:
        """Ignore a message that is meant for a node."""

    MESSAGES: Dict[type, Callable[..., None]] = {
        ClientHello: _on_introduce,
        Limit: _ignore,
        Query: _ignore,
        Shutdown: _ignore,
        Pulse: _ignore,
    }


class ProgramComputations(Part):
    """Computations of programs: they begin, lose their programs, get them back, and end. The loop's
    thread uses this class."""
    # The keys of a specification that are for the scheduler
    SHARED = frozenset(('nodes', 'reentrant', 'exclusive', 'cloudpickle', 'recovers', 'process',
                        'collected'))

    def __init__(self, scheduler: 'Scheduler') -> None:
        super().__init__(scheduler)
        self._clusters = scheduler.clusters
        self._selection = scheduler.selection
        self._sharing = scheduler.sharing
        self._quota = scheduler.quota
        # Computations whose files have not arrived yet
        self.unopened: Dict[str, ClientComputation] = {}

    def get(self, comp: str) -> Optional[ClientComputation]:
        """Return the computation with this name if it has begun and has not ended; else None."""
        user = self._clusters.get(comp)
        if isinstance(user, ClientComputation):
            return user
        return None

    def opened(self) -> List[ClientComputation]:
        """Return those that have begun and have not ended, in the order in which they have
        begun."""
        users = self._clusters.values()
        return [user for user in users if isinstance(user, ClientComputation)]

    def all(self) -> List[ClientComputation]:
        """Return these and those whose files have not arrived yet."""
        return self.opened() + list(self.unopened.values())

    def _is_connected(self, computation: ClientComputation) -> bool:
        return computation.link in self._links

    # -- beginning ---------------------------------------------------------------------------------

    def make(self, comp: str, client: bytes, spec: dict) -> ClientComputation:
        """Return a computation that is not open yet. Raises PeerError, OSError."""
        options = self._scheduler.options
        directory = self._directory_of(comp)
        key = self._state.key_of(comp)
        return ClientComputation(self._scheduler, comp, client, spec, directory,
                                 options.max_file_size, key, options.max_queued)

    def _directory_of(self, comp: str) -> str:
        if not comp or not is_comp(comp) or comp == KeepConnected.comp:
            raise PeerError('a computation may not be called %.70r' % comp)
        path = os.path.join(self._state.root, 'c-' + comp)
        os.makedirs(path, mode=0o700, exist_ok=True)
        return path

    def on_compute(self, link: Link, message: Compute) -> None:
        """Begin a computation of a program, or continue it because the program is back."""
        computation = self.get(message.comp)
        if computation is None:
            computation = self._begin(link, message)
        elif not self._is_of(computation, link, message.spec):
            self._send(link, Refused(message.comp, 'busy', 'it is of another program'))
            return
        elif self._go_on(computation, link):
            return
        if computation is not None:
            spec = computation.packed.spec
            then = functools.partial(self._complete, computation)
            self._scheduler.program_files.want(computation, spec['files'], spec['modules'], then)

    def _is_of(self, computation: ClientComputation, link: Link, spec: dict) -> bool:
        """Return whether a computation belongs to the program on this link."""
        if computation.instance != link.instance or not self._is_of_user(computation, link):
            return False
        return hmac.compare_digest(computation.digest, result_key(spec))

    def _is_of_user(self, computation: ClientComputation, link: Link) -> bool:
        """Return whether a computation belongs to the user of a link. If secrets do not identify
        users, it belongs to every program that has its key."""
        if not computation.user.is_proven:
            return True
        return computation.user == self._scheduler.programs.user_of(link)

    def _begin(self, link: Link, message: Compute) -> Optional[ClientComputation]:
        """Make a computation that is new here, if there is room for it."""
        comp = message.comp
        scheduler = self._scheduler
        spec = message.spec
        self._check_shared(spec.get('shared'))
        own = [computation for computation in self.all() if computation.instance == link.instance]
        text = ''
        if len(own) >= COMPS_MOST:
            text = 'this program has %d computations here, and the limit is %d' % (
                len(own), COMPS_MOST)
        elif scheduler.commit.stuck_until is not None:
            text = 'the disk of the scheduler is full'
        if text:
            self._send(link, Refused(comp, 'busy', text))
            return None
        if comp in self.unopened:
            raise PeerError('computation %.40r is of another program' % comp)
        if scheduler.options.cleanup_nodes:
            spec['cleanup'] = True
        computation = self.make(comp, link.instance, spec)
        self._came_back(computation, link)
        self.unopened[comp] = computation
        return computation

    def _check_shared(self, shared: Any) -> None:
        """Raise PeerError for a specification that no program sends to a scheduler."""
        if type(shared) is not dict or set(shared) != self.SHARED:
            raise PeerError('a computation that is not for a scheduler')
        count = len(shared['nodes'] or ())
        if count > SPECS_MOST:
            raise PeerError('%d nodes are named, and the limit is %d' % (count, SPECS_MOST))

    def _go_on(self, computation: ClientComputation, link: Link) -> bool:
        """Continue a computation, because its program is back or asks once more. Return False if
        files of it have not arrived yet."""
        scheduler = self._scheduler
        is_connected = self._is_connected(computation)
        if is_connected and computation.link != link.number:
            old = self._links[computation.link]
            scheduler.break_link(old, 'its program has connected again')
        again = computation.link == link.number   # a Reclaim on this link was answered
        self._came_back(computation, link)
        if not computation.ready:
            return False
        told_at = (link.number, scheduler.now)
        if computation.told_at == told_at:
            return True   # it asks repeatedly at one time; the answer may be long
        computation.told_at = told_at
        self._send_again(computation, link)
        message = Ready(computation.comp, computation.known())
        self._send(link, message)
        if not again:
            jobs = len(computation.works)
            results = len(computation.ended)
            logger.info('%s: %s is back; %d jobs have not ended, %d results wait for it',
                        computation.name, computation.program, jobs, results)
            scheduler.program_jobs.resend(computation)
        # The reason may be that its program could not be asked
        for peer in scheduler.nodes.of(computation.comp):
            if peer.uses[computation.comp].state is AssignmentState.REFUSED:
                scheduler.setup.set_up(peer, computation.comp)
        return True

    def _came_back(self, computation: ClientComputation, link: Link) -> None:
        if computation.instance != link.instance:
            self._quota.moved(computation, link.instance)
            computation.instance = link.instance
        # Otherwise results since the answer to Reclaim would be lost
        if computation.link != link.number:
            computation.outbox = []
        computation.link = link.number
        computation.given_up_at = math.inf
        computation.program = self._scheduler.programs.name_of(link)
        if not computation.user.is_proven:
            computation.user = self._scheduler.programs.user_of(link)
        computation.rests_at = math.inf
        self._sharing.look_again()
        if computation.rests:
            computation.rests = False
            self._selection.use(computation.comp, computation.specs)
        absence = computation.absence
        absence.end()
        for work in absence.dropping:   # jobs that are not cancelled yet wait again
            self._schedule.requests.keep(work)
        absence.dropping.clear()

    def _complete(self, computation: ClientComputation, error: str, code: str = 'transfer') -> None:
        """Note that all files of a new computation are here, or that they cannot be, as `error`
        says."""
        scheduler = self._scheduler
        if error:
            self.unopened.pop(computation.comp, None)
            computation.remove()
            computation.send(Refused(computation.comp, code, error))
            scheduler.program_calls.answer_early(computation)
            return
        if self.unopened.pop(computation.comp, None) is None:
            return
        computation.ready = True
        self._state.began(computation)
        self.open(computation)
        past = self._state.past(computation.comp)
        computation.send(Ready(computation.comp, [], past.row()))
        scheduler.program_calls.answer_early(computation)

    def open(self, computation: ClientComputation) -> None:
        """Begin to use nodes for a computation whose files are here."""
        scheduler = self._scheduler
        with_secrets = bool(scheduler.options.users)
        computation.user_name = computation.user.known_as(with_secrets)
        scheduler.overview.opened(computation)
        self._sharing.begins(computation)
        scheduler.open(computation, False)
        whose = computation.program or 'a program that is not connected'
        alone = ''
        if computation.exclusive:
            alone = ', and wants its nodes alone'
        logger.info('%s: begins (computation %d of %s)%s', computation.name, computation.number,
                    whose, alone)

    def on_reclaim(self, link: Link, message: Reclaim) -> None:
        """Answer another process that asks what is here of a computation."""
        comp = message.comp
        computation = self.get(comp)
        if computation is None:
            past = self._state.past(comp)
            answer = KnownAttempts(comp, [], past.row())
            self._send(link, answer)
        elif not (self._is_of_user(computation, link) and
                  may_reclaim(computation.digest, message.key)):
            logger.warning('%s has asked for results of a computation of another user, or does not '
                           'have its key',
                           self._scheduler.programs.name_of(link))
            past = AttemptHistory(whole=False)
            self._send(link, KnownAttempts(comp, [], past.row()))
        elif self._is_connected(computation) and computation.link != link.number:
            self._send(link, Refused(comp, 'busy', 'its program is connected'))
        elif not message.take:
            known = [*computation.known(), *computation.absence.dropped]
            self._send(link, KnownAttempts(comp, known))
        else:
            self._hand_over(computation, link)

    def _hand_over(self, computation: ClientComputation, link: Link) -> None:
        """Give what is here of a computation to the process that asks for it."""
        is_other = computation.instance != link.instance   # the program itself sends these again
        self._came_back(computation, link)
        if is_other:
            computation.is_collected = True
            self._cancel_dropped(computation)
            self._scheduler.program_jobs.give_up_files(computation)
        self._state.commit()   # they are sent from the disk now
        message = KnownAttempts(computation.comp, computation.known())
        self._send(link, message)
        self._scheduler.program_jobs.resend(computation)

    def _cancel_dropped(self, computation: ClientComputation) -> None:
        """Give a result to the jobs that were cancelled because the program was gone."""
        dropped = computation.absence.dropped
        text = ('cancelled: it had not begun when its program was gone, and the scheduler did not '
                'wait any longer (--gone-after)')
        for serial, number in dropped.items():
            self._state.ended(number, ended_row(serial, Outcome.CANCELLED, text))
        computation.ended.update(dropped)
        dropped.clear()

    def _send_again(self, computation: ClientComputation, link: Link) -> None:
        """Tell a program that is back which of its jobs were cancelled because the program was
        believed to be gone."""
        dropped = computation.absence.dropped
        if not dropped:
            return
        self._state.removed(list(dropped.values()))
        text = ('the scheduler has heard nothing of this program for a while and has cancelled %d '
                'jobs that had not begun (--gone-after); they are sent again')
        text %= len(dropped)
        self._send(link, Notice(computation.comp, text))
        dropped.clear()

    # -- without a program -------------------------------------------------------------------------

    def program_gone(self, computation: ClientComputation) -> None:
        """Continue a computation for a while without its program."""
        scheduler = self._scheduler
        now = scheduler.now
        why = 'its program is not connected'
        computation.link = 0
        self.expect_program(computation)
        for call in list(computation.calls.values()):
            call(('RuntimeError', why), None)
        computation.calls.clear()
        computation.receiver.abort()
        computation.values.interrupt()
        while computation.wanted:
            computation.wanted.popleft()[-1](why)
        scheduler.program_files.end_files(computation)
        self._sharing.look_again()
        logger.debug('%s: its program is gone at %.3f; the results are given up at %.3f',
                     computation.name, now, computation.given_up_at)

    def expect_program(self, computation: ClientComputation) -> None:
        """Set for how long a program that is not connected is waited for."""
        scheduler = self._scheduler
        now = scheduler.now
        options = scheduler.options
        computation.given_up_at = now + options.zombie
        computation.rests_at = now + ORPHAN_TIME
        computation.absence.begin(now, options.gone)

    def _drop_waiting(self, computation: ClientComputation) -> None:
        """Cancel those jobs of a program that is gone which have not begun. Running jobs go on to
        their end."""
        self._scheduler.jobs.take_submitted()
        known = self._schedule.comps.get(computation.comp)
        if known is None:
            return
        works = known.not_begun()
        computation.absence.dropping.update(works)
        if works:
            logger.warning('%s: its program is gone; its %d jobs that have not begun are cancelled '
                           '(--gone-after)', computation.name, len(works))
        self._decide(WithdrawAsked(works))

    def _rest(self, computation: ClientComputation) -> None:
        """Release the nodes of a program that is gone and whose jobs have all ended, with its
        processes and files there."""
        if not computation.ended or (computation.absence.for_good and not computation.collected):
            logger.info('%s: its program is gone, and nothing is left for it', computation.name)
            self.end(computation)
            return
        if computation.rests:
            return
        logger.info('%s: its program is gone; %d results wait for it', computation.name,
                    len(computation.ended))
        computation.rests = True
        selection = self._selection
        for peer in self._scheduler.nodes.of(computation.comp):
            selection.done(peer, computation.comp)
            left = NodeLeft(peer.key, computation.comp, str(peer), 'its program is gone')
            self._decide(left)
            del peer.uses[computation.comp]
            selection.drop_unused(peer)
        self._sharing.look_again()

    def _give_up(self, computation: ClientComputation) -> None:
        """Discard the results of a program that has not come back for them."""
        seconds = self._scheduler.options.zombie
        logger.warning('%s: its program has not reconnected for %g s (--zombie-interval): %d '
                       'results are discarded', computation.name, seconds, len(computation.ended))
        if computation.ended:
            text = 'the scheduler gave up its result after %g s (--zombie-interval)' % seconds
            self._state.gave_up(computation.comp, list(computation.ended), text)
        self.end(computation)

    # -- turns -------------------------------------------------------------------------------------

    def end_turn_of(self, computation: ClientComputation) -> None:
        """Send results to the program of a computation, and decide what becomes of the computation
        while its program is away."""
        scheduler = self._scheduler
        now = scheduler.now
        link = self._links.get(computation.link)
        if now >= computation.values.retry_at:
            computation.values.retry_at = math.inf
            if link is not None:
                scheduler.program_files.serve_values(link, computation)
        if computation.outbox:
            if link is not None:
                self._send_results(computation, link)
            computation.outbox = []
        if now >= computation.absence.look_at and computation.absence.is_over(now):
            self._drop_waiting(computation)
        if link is None and not computation.works:
            if now >= computation.rests_at:
                self._rest(computation)
            if now >= computation.given_up_at:
                self._give_up(computation)

    def _send_results(self, computation: ClientComputation, link: Link) -> None:
        """Send what has ended in this turn. While the link is full, results wait on the disk."""
        rows = computation.outbox
        if link.queued - link.unmade >= 4 * BATCH_BYTES:
            ended = []
            for row in rows:
                if row[1] not in PROVISIONAL:
                    ended.append(computation.ended[row[0]])
            self._scheduler.program_jobs.send_ended(computation, ended)
            rows = [row for row in rows if row[1] in PROVISIONAL]
        for frame in batches(Results, computation.comp, map(with_size, rows)):
            self._send(link, frame)

    def timers(self) -> List[float]:
        """Return the times at which something is to be done for computations."""
        times = [self._scheduler.program_jobs.unread_until]
        for computation in self.opened():
            times += [computation.absence.look_at, computation.values.retry_at]
            if computation.works or self._is_connected(computation):
                continue
            times.append(computation.given_up_at)
            if not computation.rests:
                times.append(computation.rests_at)
        return [when for when in times if when < math.inf]

    # -- ending ------------------------------------------------------------------------------------

    def on_done(self, link: Link, message: Done) -> None:
        """End a computation that its program has ended."""
        scheduler = self._scheduler
        comp = message.comp
        computation = self.unopened.get(comp)
        if computation is None:
            computation = scheduler.programs.computation_of(link, comp)
        if computation is not None and computation.link == link.number:
            self.unopened.pop(comp, None)
            self.end(computation)
            scheduler.program_calls.answer_early(computation)
        self._state.note(self._state.PAST_OVER, comp)

    def end(self, computation: ClientComputation) -> None:
        """End a computation and remove its jobs, on nodes and on the disk."""
        scheduler = self._scheduler
        comp = computation.comp
        if comp in self._clusters:
            scheduler.forget(comp)
            scheduler.overview.over(computation)
            self._state.over(comp)
            numbers = [work.number for work in computation.works.values()]
            numbers += computation.ended.values()
            numbers += computation.absence.dropped.values()
            self._state.removed(numbers)
            self._tell_end(computation)
        scheduler.program_jobs.forget(computation)
        computation.receiver.abort()
        computation.remove()
        self._sharing.is_over(computation)
        scheduler.soon()

    @staticmethod
    def _tell_end(computation: ClientComputation) -> None:
        whose = computation.program or 'a program that was not connected'
        submitted, done, failed, cancelled = computation.jobs_counted()
        counts = '%d jobs, %d done, %d failed, %d cancelled, %d not ended' % (
            submitted, done, failed, cancelled, len(computation.works))
        logger.info('%s: is over: %s; %.1f CPU seconds (computation %d of %s)', computation.name,
                    counts, computation.cpu_seconds, computation.number, whose)

    MESSAGES: Dict[type, Callable[..., None]] = {
        Compute: on_compute,
        Reclaim: on_reclaim,
        Done: on_done,
    }


class ProgramFiles(Part):
    """Files and values that programs send, and the links along which files of running jobs go to
    programs. The loop's thread uses this class."""

    def __init__(self, scheduler: 'Scheduler') -> None:
        super().__init__(scheduler)
        self._programs = scheduler.programs
        self._computations = scheduler.computations

    def want(self, computation: ClientComputation, files: list, modules: list,
             then: Callable[..., None]) -> None:
        """Ask the program for files that are missing. `then` is called when all of them are here,
        or with an error text and its code (of REASONS)."""
        computation.wanted.append((files, modules, then))
        if len(computation.wanted) == 1:
            self._want_next(computation)

    def _want_next(self, computation: ClientComputation) -> None:
        while computation.wanted:
            files, modules, then = computation.wanted[0]
            unknown = Digests.unknown(computation.directory, files)
            # Large files are present: others must not wait while these are digested
            if unknown and computation.compared is not files:
                computation.compared = files
                self._scheduler.openers.run(self._compare, computation, unknown)
                return
            try:
                missing = computation.receiver.want(Purpose.DEPENDS, files)
                missing += computation.receiver.want(Purpose.MODULES, modules)
            except (OSError, ValueError) as exc:
                computation.wanted.popleft()
                then('files cannot be stored at the scheduler: %s' % exc, reason_of(exc))
                continue
            if missing:
                for need in needs(computation.comp, missing):
                    computation.send(need)
                return
            computation.wanted.popleft()
            then('')

    def _compare(self, computation: ClientComputation, paths: Sequence[str]) -> None:
        """Compute the digests of large files. An opener calls this."""
        Digests.learn(paths)
        self._scheduler.call_soon(self._want_next, computation)

    def on_file_piece(self, link: Link, message: FilePiece) -> None:
        """Take a piece of a file that a program sends."""
        purpose = message.purpose
        computation = self._computations.unopened.get(message.comp)
        if computation is None:
            computation = self._programs.computation_of(link, message.comp)
        if purpose == Purpose.FROM_JOB:
            raise PeerError('a file that was not asked for')
        if computation is None:
            return
        if computation.link != link.number:
            return
        if purpose in FOR_CODE and not computation.wanted:
            return
        stored = computation.receiver.take(message)
        if stored is None:
            return
        if purpose == Purpose.VALUES:
            self._value_stored(link, computation, stored)
        elif purpose not in ASKED_FOR:
            self._send(link, stored)
        elif stored.error or not computation.receiver.wants(*FOR_CODE):
            then = computation.wanted.popleft()[-1]
            then(stored.error, computation.receiver.code)
            self._want_next(computation)

    def _value_stored(self, link: Link, computation: ClientComputation, stored: FileStored) -> None:
        """Note that a value for which jobs wait is here, or cannot be stored."""
        error = stored.error
        if not error:
            computation.values.came(stored.name)
            computation.values.told = False
        elif computation.receiver.code == 'room':
            self._no_room(link, computation, error)
            return
        else:
            self._without_values(link, computation, error)
        self.serve_values(link, computation)

    def _without_values(self, link: Link, computation: ClientComputation, error: str) -> None:
        """End the jobs that need a value which is not available."""
        for serial in computation.values.failed():
            text = 'a value in the arguments cannot be taken at the scheduler: %s' % error
            row = (serial, int(Outcome.RAISED), 0.0, 0.0, pack_error(text, None), b'', b'')
            self._send(link, Results(computation.comp, [row]))

    def serve_values(self, link: Link, computation: ClientComputation) -> None:
        """Accept the jobs whose values are here, and ask for those that others need."""
        rows, missing, error = computation.values.serve()
        for need in needs(computation.comp, missing):
            self._send(link, need)
        if error:
            self._no_room(link, computation, error)
        self._scheduler.program_jobs.take_jobs(link, computation, rows, admitted=True)

    def _no_room(self, link: Link, computation: ClientComputation, error: str) -> None:
        """Let the jobs that need a value wait until there is room for it."""
        computation.values.postpone(self._scheduler.now + RETRY_TIME)
        if not computation.values.told:
            computation.values.told = True
            text = ('a value that jobs need finds no room at the scheduler: %s; they wait until it '
                    'does') % error
            logger.error('%s: %s', computation.name, text)
            self._send(link, Notice(computation.comp, text))

    def done_with_values(self, computation: ClientComputation, work: ClientJob) -> None:
        """Give the room that the values of a job occupied to jobs that wait for room."""
        computation.values.release(work)
        link = self._links.get(computation.link)
        if link is not None:
            self.serve_values(link, computation)

    def on_file_stored(self, link: Link, message: FileStored) -> None:
        """Note that the program has stored a file of a job, or cannot store it; or that it does not
        have a value."""
        computation = self._programs.computation_of(link, message.comp)
        if message.purpose == Purpose.VALUES and computation is not None:
            if message.error:
                self._without_values(link, computation, message.error)
            return
        if computation is None:
            return
        if message.key not in computation.works:
            return
        work = computation.works[message.key]
        held = self._scheduler.held_back.files.get((computation.comp, work.serial))
        if isinstance(held, ForwardedFiles) and held.came(message.name, message.error):
            return
        if computation.files.pop(work.serial, None) is not None:
            self._say_to_node_of(computation.comp, work.serial, message._replace(key=work.serial))

    def _say_to_node_of(self, comp: str, serial: int, message: FileStored) -> None:
        """Send a message to the node on which a job is, if it is on one that is connected."""
        scheduler = self._scheduler
        known = self._schedule.comps.get(comp)
        if known is None:
            return
        if serial not in known.running:
            return
        peer = scheduler.nodes.by_key.get(known.running[serial].key)
        if peer is not None:
            scheduler.say_to(peer, message)

    def end_files(self, computation: ClientComputation) -> None:
        """End the transfers of jobs that sent files to a program, because the connection to the
        program has ended."""
        error = 'the connection to the client has ended'
        for serial, (_, name) in computation.files.items():
            purpose = int(Purpose.FROM_JOB)
            stored = FileStored(computation.comp, purpose, serial, name, error)
            self._say_to_node_of(computation.comp, serial, stored)
        computation.files.clear()

    def bring_modules(self, computation: ClientComputation, rows: list) -> None:
        """Add files of modules that the arguments of later jobs need: nodes that are set up from
        now on get them immediately."""
        spec = computation.packed.spec
        known = {row[0] for row in spec['modules']}
        more = []
        for row in rows:
            if row[0] not in known:
                more.append(row)
        if more:
            modules = spec['modules'] + more
            computation.take_spec(dict(spec, modules=modules))
            self._state.began(computation)

    def change_files(self, computation: ClientComputation, rows: list,
                     then: Callable[..., None]) -> None:
        """Set a computation up with other files. `then` is called with an error text, or with an
        empty text."""
        def complete(error: str, code: str = '') -> None:
            if not error:
                computation.take_spec(dict(computation.packed.spec, files=rows))
                self._state.began(computation)
            then(error)
        self.want(computation, rows, [], complete)

    MESSAGES: Dict[type, Callable[..., None]] = {
        FilePiece: on_file_piece,
        FileStored: on_file_stored,
    }


class ProgramJobs(Part):
    """The jobs that programs submit, and their results, which are on the disk. The loop's thread
    uses this class."""

    def __init__(self, scheduler: 'Scheduler') -> None:
        super().__init__(scheduler)
        self._programs = scheduler.programs
        self._computations = scheduler.computations
        self._quota = scheduler.quota
        self._files = scheduler.program_files
        self._exchange = scheduler.jobs
        # Results that wait for room on the links of programs
        self.sender = SpoolSender(scheduler.links)
        self._kept = 0                               # bytes of waiting jobs' arguments in memory
        self.unread_until = math.inf   # when to read the results that could not be read

    def on_jobs(self, link: Link, message: Jobs) -> None:
        """Take the jobs that a program submits."""
        computation = self._programs.computation_of(link, message.comp)
        if computation is None:
            return
        if len(message.rows) == 1:
            unfit = over_limit_here(message, self._scheduler.values.where)
            if unfit is not None:
                self.on_unfit(link, unfit)
                return
        self.take_jobs(link, computation, message.rows)

    def take_jobs(self,
                  link: Link,
                  computation: ClientComputation,
                  rows: Sequence[tuple],
                  admitted: bool = False) -> None:
        """Note jobs and give them to the Schedule. `admitted` says that the values which they need
        are here."""
        back: List[int] = []
        lacking = False
        is_full = self._scheduler.commit.stuck_until is not None
        quota = self._quota
        for row in rows:
            serial, payload, options = row
            # It came before
            if serial in computation.works:
                continue
            if serial in computation.ended:
                continue
            needs_values = options and 'values' in options and not admitted
            if needs_values and not computation.values.admit(row):
                lacking = True
            elif is_full or not quota.has_room(computation, size_of(payload)):
                back.append(serial)
            else:
                self._take(computation, serial, payload, options)
        if back:
            quota.give_back(link, computation, back, is_full)
        if lacking:
            self._files.serve_values(link, computation)

    def _take(self, computation: ClientComputation, serial: int, payload: Any,
              options: Optional[dict]) -> None:
        """Accept one job."""
        state = self._state
        state.number += 1
        if len(payload) <= LAZY or type(payload) is tuple:
            payload = _plain(payload)
        size = len(payload)
        work = ClientJob(computation.comp, None, options, state.number << 16, serial)
        if work.values:
            computation.values.took(work)
        state.submitted(work, payload)
        if self._kept < IN_MEMORY and size < FILE_BYTES:
            work.payload = payload
            self._kept += BYTES_OVERHEAD + size
        computation.works[serial] = work
        self._quota.add(computation, work, size)
        self._exchange.submitted.append(work)  # type: ignore[arg-type]

    def on_unfit(self, link: Link, message: Unfit) -> None:
        """Tell the program that there is no room for the arguments of a job, and forget the job."""
        computation = self._programs.computation_of(link, message.comp)
        serial = message.row[0]
        if computation is None:
            return
        if serial not in computation.known():
            results = Results(message.comp, [unfit_row(message)])
            self._send(link, results)

    def on_cancel(self, link: Link, message: Cancel) -> None:
        """Cancel jobs for a program."""
        computation = self._programs.computation_of(link, message.comp)
        self._exchange.take_submitted()
        if computation is not None:
            self._cancel_early(link, computation, message.serials)
            for work in self._known(computation, message.serials):
                self._decide(CancelAsked(work))

    @staticmethod
    def _known(computation: ClientComputation, serials: Sequence[int]) -> List[ScheduledJob]:
        """Return those of these jobs that have not ended."""
        works: List[ScheduledJob] = []
        for serial in serials:
            if serial in computation.works:
                works.append(computation.works[serial])
        return works

    def _cancel_early(self, link: Link, computation: ClientComputation,
                      serials: Sequence[int]) -> None:
        """End those of these jobs that are not accepted yet."""
        for serial in computation.values.leave(serials):
            row = ended_row(serial, Outcome.CANCELLED, 'cancelled before it started')
            self._send(link, Results(computation.comp, [row]))

    def on_recall(self, link: Link, message: ReturnJobs) -> None:
        """Cancel jobs for a program if they have not begun."""
        computation = self._programs.computation_of(link, message.comp)
        self._exchange.take_submitted()
        if computation is not None:
            self._cancel_early(link, computation, message.serials)
            works = self._known(computation, message.serials)
            self._decide(WithdrawAsked(works))

    def on_ack(self, link: Link, message: Ack) -> None:
        """Forget results that a program has received."""
        computation = self._programs.computation_of(link, message.comp)
        if computation is not None:
            ended = computation.ended
            known = []
            for serial in message.serials:
                if serial in ended:
                    known.append(serial)
            self._state.removed([ended.pop(serial) for serial in known])

    def end(self, computation: ClientComputation, work: ClientJob, row: tuple,
            node: Any = None) -> None:
        """End a job with this row of Results. `node` is the node on which it was, if any."""
        scheduler = self._scheduler
        number = work.number
        if computation.works.pop(work.client_serial, None) is None:
            return
        scheduler.overview.ended(computation, work, row, node)
        self._quota.remove(computation, work)
        if work.values:
            self._files.done_with_values(computation, work)
        self._forget_payload(work)
        computation.files.pop(work.serial, None)
        if computation.exclusive and not computation.works:
            scheduler.sharing.look_again()
        self._state.ended(number, row)
        computation.ended[work.client_serial] = number
        computation.outbox.append(row)

    def drop(self, computation: ClientComputation, work: ClientJob) -> None:
        """Forget a job that was cancelled because its program is gone."""
        number = work.number
        if computation.works.pop(work.client_serial, None) is None:
            return
        self._quota.remove(computation, work)
        computation.values.release(work)
        computation.absence.dropped[work.client_serial] = number
        computation.cancelled += 1
        self._forget_payload(work)
        self._state.dropped(number)
        if computation.exclusive:
            self._scheduler.sharing.look_again()

    def forget(self, computation: ClientComputation) -> None:
        """Forget the jobs of a computation that has ended."""
        for work in computation.works.values():
            self._forget_payload(work)
            self._quota.remove(computation, work)
        computation.works.clear()

    def _forget_payload(self, work: ClientJob) -> None:
        """Release the arguments of a job from memory."""
        if work.payload is not None:
            self._kept -= BYTES_OVERHEAD + len(work.payload)

    def resend(self, computation: ClientComputation) -> None:
        """Send a program the results that it has not acknowledged, and where its jobs are."""
        computation.unread.clear()
        self.send_ended(computation, list(computation.ended.values()))
        for held in self._held_files(computation):
            held.forward()
        known = self._schedule.comps.get(computation.comp)
        if known is not None:
            for node in known.nodes.values():
                self._tell_jobs_at(computation, node)

    def _held_files(self, computation: ClientComputation) -> List[ForwardedFiles]:
        """Return the files of its second attempts, and of those that were second ones."""
        found = []
        for (comp, _), held in self._scheduler.held_back.files.items():
            if comp == computation.comp and isinstance(held, ForwardedFiles):
                found.append(held)
        return found

    def give_up_files(self, computation: ClientComputation) -> None:
        """Release the results that wait until files are at the program."""
        for held in self._held_files(computation):
            held.give_up()

    def _tell_jobs_at(self, computation: ClientComputation, node: Any) -> None:
        """Tell a program which of its jobs are on a node, and which of these run. `node` is that of
        the Schedule."""
        scheduler = self._scheduler
        now = scheduler.now
        sent = node.in_flight[computation.comp]
        serials = [work.client_serial for work in sent.values()]
        peer = scheduler.nodes.by_key.get(node.key)
        if serials and peer is not None:
            where = (peer.ip_addr, peer.port, peer.name)
            computation.send(JobsAssigned(computation.comp, where, serials))
        begun = node.begun[computation.comp]
        rows = []
        for serial, since in begun.items():
            row = (sent[serial].client_serial, now - since)
            rows.append(row)
        if rows:
            computation.send(Started(computation.comp, rows))

    def send_ended(self, computation: ClientComputation, numbers: List[int]) -> None:
        """Send results that are on the disk."""
        rows = self._state.results(numbers, computation.unread)
        self.sender.add_results(computation.link, computation.comp, rows)

    def read_again(self) -> None:
        """Try once more, after a while, to read results that could not be read."""
        now = self._scheduler.now
        again = now >= self.unread_until
        if again:
            self.unread_until = math.inf
        for computation in self._computations.opened():
            if not computation.unread:
                continue
            if computation.link not in self._links:
                continue
            if again:
                numbers = list(computation.unread)
                computation.unread.clear()
                self.send_ended(computation, numbers)
            else:
                self.unread_until = min(self.unread_until, now + RETRY_TIME)

    MESSAGES: Dict[type, Callable[..., None]] = {
        Jobs: on_jobs,
        Unfit: on_unfit,
        Cancel: on_cancel,
        ReturnJobs: on_recall,
        Ack: on_ack,
    }


Answer = Callable[..., None]   # answers a request: called with a value, or with None and an error


class ProgramCalls(Part):
    """The requests of programs, and the requests to programs. The loop's thread uses this class."""

    def __init__(self, scheduler: 'Scheduler') -> None:
        super().__init__(scheduler)
        self._programs = scheduler.programs
        self._computations = scheduler.computations
        self._queries = scheduler.queries
        self._selection = scheduler.selection
        self._setup = scheduler.setup
        self._files = scheduler.program_files
        self._numbers = itertools.count(1)

    def on_call(self, link: Link, message: Call) -> None:
        """Handle a request of a program."""
        name = message.name
        computation = self._programs.computation_of(link, message.comp)

        def answer(value: Any, error: tuple = ()) -> None:
            if link.is_attached:
                self._send(link, Return(message.comp, message.number, error, value))
        try:
            if self._is_early(link, message, answer):
                return
            if computation is None and name != 'overview':
                raise RuntimeError('the scheduler does not know this cluster (any more)')
            self._scheduler.jobs.take_submitted()
            if computation is None:
                answer(self._overview(link, message.args))
            else:
                if name in self._CALLS:
                    self._CALLS[name](self, computation, name, message.args, answer)
                else:
                    self._command(computation, name, message.args, answer)
        except Exception as exc:  # the program gets it
            answer(None, (type(exc).__name__, str(exc)))

    def _overview(self, link: Link, args: tuple) -> Tuple[float, Any]:
        """Answer a monitor, which names no computation."""
        overview = self._scheduler.overview
        session = self._programs.sessions[link.number]
        if session.operator:
            return overview.answer_operator(session.names[0], *args)
        if session.user:
            return overview.answer_user(session.user, *args)
        return overview.answer_anybody(*args)

    def _is_early(self, link: Link, message: Call, answer: Callable[..., None]) -> bool:
        """Return whether the files of the computation have not arrived yet. Requests about its jobs
        wait until they have."""
        computation = self._computations.unopened.get(message.comp)
        if computation is None:
            return False
        if computation.link != link.number:
            return False
        if message.name == 'nodes':
            answer([])
        elif len(computation.questions) < QUESTIONS_MOST:
            computation.questions.append((link, message))
        else:
            raise RuntimeError(
                '%d questions wait until the files of this cluster are at the scheduler' %
                QUESTIONS_MOST)
        return True

    def answer_early(self, computation: ClientComputation) -> None:
        """Answer the requests that came before the files of a computation were here."""
        questions = computation.questions
        computation.questions = []
        for link, message in questions:
            self.on_call(link, message)

    def _nodes(self, computation: ClientComputation, name: str, args: tuple,
               answer: Answer) -> None:
        first, count = args or (0, NODES_PAGE)
        last = first + min(count, NODES_PAGE)
        nodes = self._queries.rows_of(computation.comp)
        rows = []
        for row in nodes[first:last]:
            short = row._replace(reason=shorten(row.reason, REASON_MOST))
            rows.append(tuple(short))
        answer(rows)

    def _jobs(self, computation: ClientComputation, name: str, args: tuple, answer: Answer) -> None:
        jobs: Dict[int, Any] = self._queries.jobs_at(computation.comp, *args)
        answer([work.client_serial for work in jobs.values()])

    def _allocate(self, computation: ClientComputation, name: str, args: tuple,
                  answer: Answer) -> None:
        self._selection.allocate(computation.comp, specs_of(args[0]))
        answer(None)

    def _leave(self, computation: ClientComputation, name: str, args: tuple,
               answer: Answer) -> None:
        """Leave nodes. With a fourth argument they are set up again with these files."""
        if len(args) != 4:
            self._command(computation, name, args, answer)
            return

        def complete(error: str, code: str = '') -> None:
            if error:
                answer(None, ('OSError', error))
                return
            self._selection.leave(computation.comp, *args[:3])
            answer(None)
        self._files.change_files(computation, args[3], complete)

    def _looks(self, computation: ClientComputation, name: str, args: tuple,
               answer: Answer) -> None:
        """Tell what the jobs do whose serials the program has sent."""
        serials, wants_stacks = args
        jobs = self._scheduler.overview.jobs_shown
        answer(jobs.looks_of(computation, serials[:PAGE], wants_stacks))

    def _running(self, computation: ClientComputation, name: str, args: tuple,
                 answer: Answer) -> None:
        """Ask a node which jobs run there."""
        queries = self._queries
        node = args[0]

        def answered(done: Any) -> None:
            if done.exception() is not None:
                answer(None, ('RuntimeError', str(done.exception())))
                return
            running = {serial for serial, _ in done.result().running}
            jobs: Dict[int, Any] = queries.jobs_at(computation.comp, node)
            client_serials = []
            for serial, work in jobs.items():
                if serial in running:
                    client_serials.append(work.client_serial)
            answer(client_serials)
        queries.question(computation.comp, node).add_done_callback(answered)

    def _place(self, computation: ClientComputation, name: str, args: tuple,
               answer: Answer) -> None:
        """Send a file to a node: only one that the program has sent here before."""
        node, row = args[:2]
        path = os.path.join(computation.directory, *check_name(row[0]))
        open_regular(path).close()

        def answered(done: Any) -> None:
            if done.exception() is not None:
                answer(None, ('RuntimeError', str(done.exception())))
            else:
                answer(done.result())
        future = self._queries.question(computation.comp, node, row, path)
        future.add_done_callback(answered)

    def _command(self, computation: ClientComputation, name: str, args: tuple,
                 answer: Answer) -> None:
        if name not in ('find', 'seat', 'set_cpus', 'leave', 'complaint', 'why_unloadable'):
            raise ValueError('%.40r cannot be asked of a scheduler' % name)
        answer(self._queries.command(computation.comp, name, *args))

    # Requests of programs; other names are commands
    _CALLS = {
        'nodes': _nodes,
        'jobs': _jobs,
        'allocate': _allocate,
        'leave': _leave,
        'running': _running, 'looks': _looks,
        'place': _place,
    }

    def _ask(self, computation: Any, name: str, args: tuple, then: Callable[[tuple, Any],
             None]) -> None:
        """Ask a program; `then(error, value)` is called with the answer."""
        link = self._links.get(computation.link)
        if link is None:
            then(('RuntimeError', 'its program is not connected'), None)
            return
        number = next(self._numbers)
        computation.calls[number] = then
        self._send(link, Call(computation.comp, number, name, args))

    def on_return(self, link: Link, message: Return) -> None:
        """Take the answer of a program."""
        computation = self._programs.computation_of(link, message.comp)
        if computation is None:
            return
        if message.number in computation.calls:
            then = computation.calls.pop(message.number)
            then(message.error, message.value)

    def ask_source(self, computation: ClientComputation, peer: NodeConnection, link: Link) -> None:
        """Ask a program for the source of its computation."""
        setup = self._setup

        def told(error: tuple, value: Any) -> None:
            if error:
                setup.source_missing(computation, peer, link, error[1])
            else:
                source = (bytes(value[0]), value[1])
                setup.source_found(computation, peer, link, source)
        self._ask(computation, 'source', (), told)

    def ask_allocator(self, computation: ClientComputation, allocator: Any, peer: NodeConnection,
                      link: Link) -> None:
        """Ask a program's allocator, and for the files that it names."""
        files = self._files
        allocated = functools.partial(self._setup.allocated, computation.comp, peer, link)

        def told(error: tuple, value: Any) -> None:
            if error:
                allocated(Allocation(0, b'', [], {}), error[1])
                return
            cpus, setup_args, rows, modules = value
            found = Allocation(cpus, bytes(setup_args), rows, computation.paths_of(rows))
            files.bring_modules(computation, modules)

            def complete(failed: str, code: str = '') -> None:
                allocated(found, failed)
            files.want(computation, rows, modules, complete)
        row = tuple(computation.row_of(peer))
        self._ask(computation, 'allocate', (allocator.number, row), told)

    def ask_for_modules(self, computation: ClientComputation, peer: NodeConnection,
                        message: Call) -> None:
        """Ask a program for the modules that a job on a node needs, unless they were fetched
        before."""
        answer = functools.partial(self._answer_node, peer, message)
        files = self._files
        bundle = self._bundle_of(message)
        modules = computation.packed.spec['modules']
        if any(row[0] == bundle for row in modules):
            answer((), modules)
            return

        def told(error: tuple, rows: Any) -> None:
            if error:
                answer(error, None)
                return

            def complete(failed: str, code: str = '') -> None:
                if failed:
                    answer(('OSError', failed), rows)
                    return
                if bundle:
                    files.bring_modules(computation, rows)
                answer((), rows)
            files.want(computation, [], rows, complete)
        self._ask(computation, 'modules', message.args, told)

    @staticmethod
    def _bundle_of(message: Call) -> str:
        """Return the name of the file of modules that a job needs, or an empty text if it needs
        something else."""
        if message.name != 'modules':
            return ''
        if len(message.args) != 1:
            return ''
        number = message.args[0]
        if type(number) is not int:
            return ''
        return BUNDLES + BUNDLE % number

    def _answer_node(self, peer: NodeConnection, message: Call, error: tuple, value: Any) -> None:
        self._scheduler.say_to(peer, Return(message.comp, message.number, error, value))

    MESSAGES: Dict[type, Callable[..., None]] = {
        Call: on_call,
        Return: on_return,
    }


class Restoration(Part):
    """Restores what an earlier run has left. Jobs that waited wait again. Those that were on nodes
    count as being there until the nodes are connected again or are given up. The loop's thread uses
    this class at the start."""

    def __init__(self, scheduler: 'Scheduler') -> None:
        super().__init__(scheduler)
        # Key of a node -> (host, port, name, instance)
        self._nodes = {}
        for key, *rest in self._state.nodes():
            self._nodes[key] = rest
        self._memories = self._state.memories()
        self._locks = self._state.locks()

    def run(self) -> None:
        """Restore all computations, and remove what belongs to none. Raises DispyError or OSError,
        and any exception if the state is damaged."""
        there = set()
        for comp, client, spec in self._state.comps():
            there.add(comp)
            user = ProgramUser(*spec.pop('user', ()))
            computation = self._scheduler.computations.make(comp, client, spec)
            computation.user = user
            self._restore(computation)
        for name in os.listdir(self._state.root):
            comp = name[2:].partition('.')[0]
            if name.startswith('c-') and comp not in there:
                path = os.path.join(self._state.root, name)
                shutil.rmtree(path, ignore_errors=True)

    def _restore(self, computation: ClientComputation) -> None:
        """Continue a computation."""
        scheduler = self._scheduler
        computation.values.restore()
        computation.ready = True
        scheduler.computations.expect_program(computation)
        waiting: List[ClientJob] = []
        sent: Dict[Any, List[ClientJob]] = {}
        jobs = self._state.jobs(computation.comp)
        for number, serial, options, state, own, node in jobs:
            if state == State.ENDED:
                computation.ended[serial] = number
            elif state == State.DROPPED:
                computation.absence.dropped[serial] = number
            else:
                work = self._work(computation, serial, options, own)
                if state == State.SENT and node in self._nodes:
                    sent.setdefault(node, []).append(work)
                else:
                    waiting.append(work)
        scheduler.computations.open(computation)
        for key, works in sent.items():
            name = self._restore_node(key)
            until = scheduler.now + RETURN_TIME
            had = NodeHad(key, computation.comp, works, name, until)
            scheduler.decide(had)
        self._restore_seconds(computation, sent)
        scheduler.jobs.submitted.extend(waiting)  # type: ignore[arg-type]
        if computation.works or computation.ended:
            at_nodes = sum(map(len, sent.values()))
            logger.info('%s: %d jobs wait, %d were on nodes, %d have ended', computation.name,
                        len(waiting), at_nodes, len(computation.ended))

    def _restore_seconds(self, computation: ClientComputation,
                         sent: Dict[Any, List[ClientJob]]) -> None:
        """Continue jobs that were started a second time, with the files that these attempts have
        sent. `sent` has the jobs by the nodes of their first attempts."""
        scheduler = self._scheduler
        comp = computation.comp
        works = {}
        for there in sent.values():
            for work in there:
                works[work.number] = work
        for work, serial, key in self._state.seconds(works):
            if key not in self._nodes:
                continue
            if key not in sent:
                sent[key] = []
                name = self._restore_node(key)
                until = scheduler.now + RETURN_TIME
                had = NodeHad(key, comp, [], name, until)
                scheduler.decide(had)
            event = SecondHad(key, comp, work, serial)
            scheduler.decide(event)
        known = scheduler.schedule.comps[comp]
        directory = computation.directory + SECONDS_OF
        words: List[str] = []
        if os.path.isdir(directory):
            words = os.listdir(directory)
        for word in words:
            serial = int(word)
            held = ForwardedFiles(computation, scheduler, serial)
            held.find()
            held.counts = serial in known.running
            scheduler.held_back.files[comp, serial] = held

    def _work(self, computation: ClientComputation, serial: int, options: Optional[dict],
              own: int) -> ClientJob:
        """Restore a job that has not ended. `serial` is the program's, `own` is the scheduler's."""
        work = ClientJob(computation.comp, None, options, own, serial)
        computation.works[serial] = work
        if work.values:
            computation.values.took(work)
        size = 0
        with contextlib.suppress(OSError):   # reported when they are needed
            size = self._state.size_of_payload(work.number)
        self._scheduler.quota.add(computation, work, size)
        return work

    def _restore_node(self, key: Any) -> str:
        """Look again for a node that had jobs. Return its name."""
        scheduler = self._scheduler
        host, port, name, instance = self._nodes[key]
        peer = scheduler.nodes.by_key.get(key)
        is_new = peer is None
        if peer is None:
            peer = NodeConnection(host, port, scheduler.access.redial)
        if peer.link is None:
            # Otherwise nobody would notice that its process has ended, or is another one.
            peer.instance = instance
            peer.memory = self._memories.get(key, '')
            peer.facts['lock'] = self._locks.get(key)
        if is_new:
            peer.key = key
            peer.name = name
            scheduler.nodes.by_key[key] = peer
            if not port:   # it dials us
                peer.reconnector.due = None
                peer.move('dial')
                peer.move('fail')
            scheduler.selection.take(peer, KeepConnected.comp, NodeSpec(host, port))
        return name  # type: ignore[no-any-return]


class Scheduler(Driver):
    """See the module's docstring. Driver is its side towards nodes; towards programs it has parts.

    commit - nothing leaves before the transaction of its turn
    programs - links of programs and their messages
    computations - what programs have begun
    program_files, program_jobs, program_calls - what they send and ask
    sharing - whom each node serves
    quota, overview - limits of programs, answers to monitors
    """
    log = logger
    PARTING = 0.0

    def __init__(self, options: Options) -> None:
        self.options = options
        self.state = State(options.state_dir)
        self.quota = Quota(self, options.max_queued)
        self.sharing = NodeSharing(self)
        access = ConnectionSettings(
            options.node_secret, options.node_certfile, options.node_keyfile, None, options.pulse,
            options.ping)
        super().__init__(access, self.state.instance, self.sharing)
        self.drains = Drains(self.state)
        self.history = JobHistory(self, options.history)
        self.overview: ProgramOverview = ProgramOverview(self)
        self.schedule = Schedule(options.fifo, options.rules)
        self.user_use = UserUse(self)
        self.values = StoredValues(self.state)
        self.commit = Commit(self, super().send)
        self.programs = ProgramLinks(self)
        self.computations = ProgramComputations(self)
        self.program_files = ProgramFiles(self)
        self.program_jobs = ProgramJobs(self)
        self.program_calls = ProgramCalls(self)
        self.turn_times = TurnTimes()
        self._program_acceptors: List[Acceptor] = []
        for part in (self.computations, self.program_jobs, self.program_files, self.program_calls):
            self.programs.add_handlers(part)

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> int:
        """Listen, and take over what an earlier run has left. Return the port. Raises StartError,
        SecretError or OSError."""
        options = self.options
        files = (options.cluster_certfile, options.cluster_keyfile)
        files_of_nodes = (options.node_certfile, options.node_keyfile)
        allowed = [Role.CLIENT]
        if files == files_of_nodes:
            allowed.append(Role.NODE)
        keys = self._keys()
        port = options.port
        for host in options.hosts:
            door = self._door(host, port, keys, allowed, *files)
            port = door.server_address[1]
            if Role.NODE not in allowed:
                self._door(host, port + 1, keys, [Role.NODE], *files_of_nodes)
        self.sharing.port = self._program_acceptors[0].server_address[1]
        for door in self._program_acceptors:
            self.add_reader(door.socket, door.on_readable)
        self.now = self.clock()
        named = []
        for node in options.nodes:
            host, at = host_and_port(node, options.node_port)
            named.append(NodeSpec(host, at))
        self.sharing.named = {spec.host for spec in named}
        specs = named or [NodeSpec('*', options.node_port)]
        self.open(KeepConnected(specs, options.node_port, options), False)
        with self.state.damages():
            self.user_use.restore()
            Restoration(self).run()
        return port

    def _keys(self) -> Dict[int, Tuple[bytes, ...]]:
        """Return a dictionary from roles to the keys that authenticate them. The last key of
        programs is the operator's, the others are those of users in their order."""
        options = self.options
        programs = [derive_key(secret) for _, secret in options.users]
        if not programs:
            programs.append(derive_key(options.cluster_secret))
        if options.separate:
            programs.append(derive_key(options.operator_secret))
        nodes = (derive_key(options.node_secret),)
        return {int(Role.CLIENT): tuple(programs), int(Role.NODE): nodes}

    def _door(self, host: str, port: int, keys: Dict[int, Tuple[bytes, ...]],
              allowed: Sequence[Role], certfile: Optional[str], keyfile: Optional[str]) -> Acceptor:
        try:
            door = Acceptor((host, port), keys, Role.SCHEDULER, allowed, self.instance, self.post,
                            certfile, keyfile)
        except OverflowError as exc:
            raise StartError('port %d is not between 0 and 65535 (-p/--port)' % port) from exc
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                raise StartError(
                    'port %d is in use: another dispyscheduler? Choose another with -p/--port' %
                    port) from exc
            message = 'cannot listen at %s:%d: %s (-i/--host, -p/--port)' % (host or '*', port, exc)
            raise StartError(message) from exc
        self._program_acceptors.append(door)
        return door

    def close(self) -> None:
        """Close everything. What programs have submitted stays on the disk. The method does nothing
        the second time."""
        if self._program_acceptors:
            self.user_use.note()
        for door in self._program_acceptors:
            with contextlib.suppress(KeyError, ValueError):   # not watched yet
                self.remove_reader(door.socket)
            door.server_close()
        self._program_acceptors = []
        self.broken = 'the scheduler has ended'   # the error for callers
        self._hang_up()
        self.state.close()
        super().close()

    # -- faults of ours ----------------------------------------------------------------------------

    def on_fault(self, subject: Any, text: str) -> bool:
        """Handle a fault of dispy as the driver does. A fault that concerns a computation of a
        program ends that computation."""
        if isinstance(subject, ClientComputation):
            link = self.links.get(subject.link)
            if link is not None:
                self.send(link, Refused(subject.comp, 'fault', text))
            self.computations.end(subject)
            return True
        return super().on_fault(subject, text)

    # -- turns: nothing leaves before the transaction ----------------------------------------------

    def is_over(self, comp: str) -> bool:
        """Return whether no program wants anything of a computation that a node still has."""
        return super().is_over(comp) and comp not in self.computations.unopened

    def send(self, link: Link, message: Any) -> None:
        """Send a message when the transaction of this turn is on the disk; a message that reports
        no change is sent at once."""
        if type(message) in _AT_ONCE:
            super().send(link, message)
        else:
            self.commit.later.append((link, message))

    def turn(self, timeout: Optional[float] = None) -> None:
        """Do one round. Its duration is measured without the wait for something to do."""
        super().turn(timeout)
        self.turn_times.add(self.pace.woke_at, self.clock())

    def end_of_turn(self) -> None:
        """Decide, write, and send."""
        self.programs.bound_answers()
        until = self.commit.stuck_until
        if until is not None and self.now < until:
            return
        self.sharing.assign_all()
        super().end_of_turn()
        for computation in self.computations.opened():
            self.guard(computation, self.computations.end_turn_of, computation)
        self.user_use.look()
        if self.commit.write_down():
            self.commit.unstick()
            self.quota.take_again()
            self.program_jobs.sender.send(self.commit.send)
            self.program_jobs.read_again()
        else:
            self.commit.stick()

    def disconnect(self, link: Link, text: str) -> None:
        """End a link as a Loop does, after everything that was sent before."""
        self.commit.write_down()
        super().disconnect(link, text)

    def next_timer(self) -> Optional[float]:
        """Return when something is to be done: for the driver, for the disk that was full, or for
        results on the disk."""
        if self.commit.stuck_until is not None:
            return self.commit.stuck_until
        if self.program_jobs.sender.has_room():
            return self.now
        times = [super().next_timer(), *self.computations.timers()]
        return min((when for when in times if when is not None), default=None)

    # -- links of programs -------------------------------------------------------------------------

    def on_event(self, event: Any) -> None:
        """Handle programs and nodes that have connected, signals, and the driver's events."""
        if isinstance(event, Authenticated) and event.session.peer_role == Role.CLIENT:
            self.programs.program_came(event)
        elif isinstance(event, Stop):
            # The links end without Bye: nodes go on and keep results, programs wait, until the
            # scheduler is started again
            self.stop()
        elif isinstance(event, Reload):
            self.user_use.reload()
        else:
            super().on_event(event)

    def on_channel(self, channel: Link) -> None:
        """Handle what has come on a link."""
        if channel.number in self.programs.sessions:
            self.programs.take_messages(channel)
        else:
            super().on_channel(channel)

    def on_broken(self, channel: Link, text: str) -> None:
        """Handle the end of a link."""
        if channel.number in self.programs.sessions:
            self.programs.program_gone(channel, text)
        else:
            super().on_broken(channel, text)


_AT_ONCE = frozenset((Bye, FilePiece, FileStored, Need, CpusChanged, Output, Pulse))


# --------------------------------------------------------------------------------------------------
# Command line of an operator: questions to a scheduler that runs, and orders
# --------------------------------------------------------------------------------------------------

DRAINED_EVERY = 0.5     # s between two checks whether a drained node is idle

TASKS = {
    'status': 'Show the programs that use the scheduler: whose they are, since when, how many jobs '
              'run and wait, and CPUs that they hold.',
    'jobs': 'Show the jobs that are on nodes.',
    'nodes': 'Show the nodes. The exit status is 0 if any can be used, else 1.',
    'cancel': 'Cancel the jobs of programs.',
    'drain': 'Let no more jobs begin on nodes. Those that are there go on.',
    'resume': 'Use nodes again that were drained or released.',
    'users': 'Show users and groups that have limits or shares: what they may have, what they have '
             'and, with --half-life, the CPUs that they have used in the mean of the past.',
    'history': 'Sum up the jobs that have ended, which a scheduler keeps that was started with '
               '--history DAYS.',
}


def _task_parser(task: str) -> argparse.ArgumentParser:
    prog = 'dispyscheduler ' + task
    parser = argparse.ArgumentParser(prog=prog, description=TASKS[task])
    add = parser.add_argument
    if task == 'cancel':
        add('programs', nargs='+', type=int, metavar='NUMBER', help='of a program, as of status')
        add('--waiting', action='store_true', help='only the jobs that have not begun')
    elif task in ('drain', 'resume'):
        add('nodes', nargs='+', metavar='NODE', help='name, address or ADDRESS:PORT of a node')
    elif task == 'history':
        add('--by', action='append', choices=('user', 'day', 'computation', 'node', 'job'),
            help='what is summed up, in this order; may be repeated (default: user); job: nothing')
        add('--days', type=days_option, default=3650.0, metavar='N',
            help='of jobs that have ended in the last N days (default: all)')
        add('--user', metavar='NAME', help='of this user alone')
        add('--csv', action='store_true', help='print CSV')
    elif task == 'jobs':
        add('nodes', nargs='*', metavar='NODE', help='only on these')
    if task == 'drain':
        add('--reason', default='', metavar='TEXT', help='why, as `nodes` shows it to others')
        add('--wait', action='store_true', help='until no job is on them any more')
    add('--scheduler-host', default='127.0.0.1', metavar='HOST[:PORT]',
        help='where the scheduler is (default: this machine)')
    add('--secret-file', metavar='FILE',
        help="file with the secret of programs, or with the operator's if the scheduler has one "
             '(default: that of this user)')
    add('--certfile', metavar='FILE', help='certificate for TLS')
    add('--keyfile', metavar='FILE', help="the certificate's key, if not in the same file")
    add('--json', action='store_true', help='print JSON, for other programs')
    return parser


class Operator:
    """Asks a running scheduler, and gives it orders, by the questions of the web monitor. `ask`
    sends a question and returns (seconds, answer). The methods raise what `ask` raises."""

    def __init__(self, ask: Callable[..., Tuple[float, Any]]) -> None:
        self._ask = ask

    def _answer(self, *question: Any) -> Any:
        return self._ask(*question)[1]

    def _pages(self, name: str, *args: Any) -> List[dict]:
        rows: List[dict] = []
        while True:
            page = self._answer(name, len(rows), PAGE, *args)
            rows += page
            if len(page) < PAGE:
                return rows

    def programs(self) -> List[Dict[str, Any]]:
        """Return a row for each computation of a program."""
        found = {}
        for row in self._pages('clusters'):
            found[row['number']] = self._program(row)
        for node in self._pages('nodes', False):
            for number, _, _, _, jobs, cpus, *_ in node['uses']:
                if number in found:
                    found[number]['running'] += jobs
                    found[number]['waiting'] -= jobs
                    found[number]['cpus'] += cpus
        return list(found.values())

    @staticmethod
    def _program(row: Dict[str, Any]) -> Dict[str, Any]:
        ended = row['done'] + row['failed'] + row['cancelled']
        waiting = row['submitted'] - ended
        return {
            'number': row['number'], 'user': row['user'], 'proven': row['proven'],
            'whose': str(ProgramUser(row['user'], row['proven'])),
            'program': row['program'], 'name': row['name'],
            'connected': row['connected'], 'seconds': row['elapsed'], 'running': 0,
            'waiting': waiting, 'done': row['done'], 'failed': row['failed'],
            'cancelled': row['cancelled'], 'cpus': 0, 'job_seconds': row['job_seconds'],
            'limited': row['limited'], 'limit': row['limit']
        }

    def users(self) -> List[Dict[str, Any]]:
        """Return a row for each user and group that has limits or a share."""
        return list(self._answer('users'))

    def nodes(self) -> List[Dict[str, Any]]:
        """Return a row for each node."""
        return list(map(self._node, self._pages('nodes', True)))

    @staticmethod
    def _node(row: Dict[str, Any]) -> Dict[str, Any]:
        running = sum(use[4] for use in row['uses'])
        used = sum(use[5] for use in row['uses'])
        memory, disk, cpu = row['free']
        return {
            'name': row['name'], 'address': row['address'], 'port': row['port'],
            'state': row['state'], 'reason': row['reason'], 'cpus': row['offered'],
            'used': used, 'running': running, 'jobs': row['jobs'], 'memory': memory, 'disk': disk,
            'cpu': cpu, 'heard': row['heard'], 'key': row['key']
        }

    def keys_of(self, words: Sequence[str]) -> List[Any]:
        """Return the keys of the nodes with these names. Raises ValueError for an unknown name."""
        rows = self._pages('nodes', False)
        keys = []
        for word in words:
            found = []
            for row in rows:
                if word in self._names(row):
                    found.append(row['key'])
            if not found:
                raise ValueError('the scheduler has no node %s' % word)
            keys += found
        return keys

    @staticmethod
    def _names(row: Dict[str, Any]) -> Tuple[str, ...]:
        return row['name'], row['address'], '%s:%d' % (row['address'], row['port'])

    def jobs(self, words: Sequence[str]) -> List[Dict[str, Any]]:
        """Return a row for each job that is on one of these nodes, or on any; if no node is named,
        also one for those jobs of a program that wait because of a limit."""
        programs = {}
        for row in self._pages('clusters'):
            programs[row['number']] = row
        wanted = self.keys_of(words)
        rows: List[Dict[str, Any]] = []
        for node in self._pages('nodes', False):
            if words and node['key'] not in wanted:
                continue
            for number, serial, _, seconds in self._answer('jobs', node['key']):
                program = programs.get(number, {'program': '', 'name': ''})
                job = job_number(serial)
                rows.append({
                    'number': number, 'program': program['program'], 'name': program['name'],
                    'job': job, 'node': node['name'] or node['address'], 'running': seconds
                    is not None, 'seconds': seconds, 'waiting': 0, 'reason': ''
                })
        for number, program in programs.items():
            if program['limited'] and not words:
                rows.append({
                    'number': number, 'program': program['program'], 'name': program['name'],
                    'job': None, 'node': '', 'running': False, 'seconds': None,
                    'waiting': program['limited'], 'reason': program['limit']
                })
        return rows

    def history(self, days: float, user: Optional[str]) -> Iterator[Dict[str, Any]]:
        """Yield a row for each job that has ended in these days."""
        since = time.time() - days * JobHistory.DAY
        after = 0
        while after >= 0:
            after, rows = self._answer('history', after, since)
            for row in rows:
                found = dict(zip(self.HISTORY, row))
                if user in (None, found['user']):
                    found['proven'] = bool(found['proven'])
                    yield found

    # The columns of a job in the history
    HISTORY = ('user', 'proven', 'program', 'computation', 'job', 'node', 'began', 'ended', 'cpus',
               'outcome', 'comp')

    def cancel(self, number: int, only_waiting: bool) -> int:
        """Cancel jobs of a program. Returns how many."""
        count = self._answer('cancel_waiting', number)
        if not only_waiting:
            for node in self._pages('nodes', False):
                count += self._answer('cancel', number, node['key'], None)
        return int(count)

    def drain(self, key: Any, reason: str) -> None:
        """Let no more jobs begin on a node, for this reason."""
        self._answer('cpus', key, 0, reason)

    def resume(self, key: Any) -> None:
        """Use a node again."""
        self._answer('use', key)

    def wait_until_idle(self, keys: Sequence[Any]) -> None:
        """Wait until no job is on these nodes, or they are gone."""
        while any(row['running'] for row in self.nodes() if row['key'] in keys):
            time.sleep(DRAINED_EVERY)


def _ago(seconds: Optional[float]) -> str:
    """Return a time in words that fit into a table."""
    if seconds is None:
        return '-'
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return '%d:%02d:%02d' % (hours, minutes, rest)
    return '%d:%02d' % (minutes, rest)


def _in_gib(size: Optional[int]) -> str:
    if size is None:
        return '-'
    return '%.1f GiB' % (size / (1 << 30))


def _or_dash(value: Any) -> str:
    return '-' if value is None else str(value)


# Task -> columns: the title, the field of a row, and how it is written
TABLES: Dict[str, List[Tuple[str, str, Callable[[Any], str]]]] = {
    'status': [('NUMBER', 'number', str), ('USER', 'whose', str), ('PROGRAM', 'program', str),
               ('NAME', 'name', str),
               ('SINCE', 'seconds', _ago), ('RUNNING', 'running', str), ('CPUS', 'cpus', str),
               ('WAITING', 'waiting', str), ('DONE', 'done', str), ('FAILED', 'failed', str),
               ('CANCELLED', 'cancelled', str), ('LIMITED', 'limited', str)],
    'jobs': [('NUMBER', 'number', str), ('PROGRAM', 'program', str), ('NAME', 'name', str),
             ('JOB', 'job', _or_dash), ('NODE', 'node', str), ('RUNS FOR', 'seconds', _ago),
             ('REASON', 'reason', str)],
    'users': [('USER', 'user', str), ('GROUP', 'group', str), ('SHARE', 'share', '{:g}'.format),
              ('PRIORITY', 'priority', str), ('CPUS', 'cpus', str),
              ('LIMIT', 'cpu_limit', _or_dash), ('JOBS', 'jobs', str),
              ('LIMIT', 'job_limit', _or_dash), ('PAST CPUS', 'past_cpus', '{:.2f}'.format)],
    'nodes': [('NAME', 'name', str), ('ADDRESS', 'address', str), ('PORT', 'port', str),
              ('CPUS', 'cpus', str), ('USED', 'used', str), ('JOBS', 'running', str),
              ('MEMORY FREE', 'memory', _in_gib), ('STATE', 'state', str),
              ('REASON', 'reason', str)],
}


def _print_table(task: str, rows: Sequence[Dict[str, Any]]) -> None:
    columns = TABLES[task]
    lines = [[title for title, _, _ in columns]]
    for row in rows:
        words = []
        for _, field, write in columns:
            words.append(write(row[field]))
        lines.append([' '.join(word.split()) or '-' for word in words])
    _print_lines(lines)


def _print_lines(lines: Sequence[List[str]]) -> None:
    """Print words in columns."""
    widths = []
    for column in zip(*lines):
        widths.append(max(map(len, column)))
    for line in lines:
        print('  '.join(map(str.ljust, line, widths)).rstrip())


def _print_rows(task: str, rows: List[Dict[str, Any]], as_json: bool) -> None:
    if not as_json:
        _print_table(task, rows)
        return
    for row in rows:
        row.pop('key', None)   # it is meaningless to others
    print(json.dumps(rows, indent=1))


def _day(when: float) -> str:
    return time.strftime('%Y-%m-%d', time.localtime(when))


class HistorySums:
    """Sums over jobs that have ended, for each user, day, computation or node, or for several of
    these together."""

    def __init__(self, by: Sequence[str]) -> None:
        self._by = by
        self._sums: Dict[tuple, Dict[str, Any]] = {}

    def add(self, job: Dict[str, Any]) -> None:
        """Add a job, as `Operator.history` yields it."""
        ours = {}
        for name in self._by:
            ours[name] = self._value(name, job)
        key = tuple(ours.values())
        if 'computation' in ours:   # computations of others may have the same name
            key = (*key, job['comp'])
        row = self._sums.get(key)
        if row is None:
            row = self._sums[key] = dict(ours, jobs=0, done=0, failed=0, cancelled=0,
                                         cpu_seconds=0.0)
        row['jobs'] += 1
        row[job['outcome']] += 1
        row['cpu_seconds'] += (job['ended'] - job['began']) * job['cpus']

    @staticmethod
    def _value(name: str, job: Dict[str, Any]) -> str:
        if name == 'user':
            return str(ProgramUser(job['user'], job['proven']))
        if name == 'day':
            return _day(job['ended'])
        return str(job[name])

    def rows(self) -> List[Dict[str, Any]]:
        """Return the sums, in order."""
        rows = []
        for key in sorted(self._sums):
            row = self._sums[key]
            row['cpu_seconds'] = round(row['cpu_seconds'], 3)
            rows.append(row)
        return rows


def _print_history(operator: Operator, args: argparse.Namespace) -> None:
    by = args.by or ['user']
    rows: List[Dict[str, Any]]
    if 'job' in by:
        rows = list(operator.history(args.days, args.user))
        for row in rows:
            row['cpu_seconds'] = round((row['ended'] - row['began']) * row['cpus'], 3)
    else:
        sums = HistorySums(by)
        for job in operator.history(args.days, args.user):
            sums.add(job)
        rows = sums.rows()
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    names = list(rows[0]) if rows else [*by, 'jobs']
    if args.csv:
        writer = csv.DictWriter(sys.stdout, names, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
        return
    table = [[name.replace('_', ' ').upper() for name in names]]
    for row in rows:
        table.append([' '.join(str(row[name]).split()) or '-' for name in names])
    _print_lines(table)


def _print_jobs(rows: List[Dict[str, Any]], as_json: bool) -> None:
    """Print jobs that are on nodes, and how many wait because of a limit."""
    if not as_json:
        for row in rows:
            count = row['waiting']
            if count:
                row['reason'] = '%d wait: %s' % (count, row['reason'])
    _print_rows('jobs', rows, as_json)


# Task that shows everything -> the rows that it shows
_ROWS_OF = {
    'status': Operator.programs,
    'users': Operator.users,
}


def _carry_out(operator: Operator, task: str, args: argparse.Namespace) -> int:
    """Carry out the command. Returns the exit status."""
    if task == 'history':
        _print_history(operator, args)
    elif task in _ROWS_OF:
        rows = _ROWS_OF[task](operator)
        _print_rows(task, rows, args.json)
    elif task == 'jobs':
        _print_jobs(operator.jobs(args.nodes), args.json)
    elif task == 'nodes':
        rows = operator.nodes()
        usable = any(row['state'] == 'connected' for row in rows)
        _print_rows(task, rows, args.json)
        return int(not usable)
    elif task == 'cancel':
        counts = {}
        for number in args.programs:
            counts[number] = operator.cancel(number, args.waiting)
        _print_counts(counts, args.json)
    else:
        keys = operator.keys_of(args.nodes)
        for key in keys:
            if task == 'drain':
                operator.drain(key, args.reason)
            else:
                operator.resume(key)
        if task == 'drain' and args.wait:
            operator.wait_until_idle(keys)
    return 0


def _print_counts(counts: Dict[int, int], as_json: bool) -> None:
    if as_json:
        print(json.dumps(counts))
        return
    for number, count in counts.items():
        if count == 1:
            jobs = '1 job is'
        else:
            jobs = '%d jobs are' % count
        print('program %d: %s cancelled' % (number, jobs))


PROMPT = ('commands: quit; status, jobs, nodes, cancel NUMBER, drain NODE, resume NODE, with the '
          'options of `dispyscheduler COMMAND`')


class OperatorPrompt:
    """The commands that the user who has started a scheduler at a terminal types there."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._operator = Operator(self._ask)

    def _ask(self, *question: Any) -> Tuple[float, Any]:
        overview = self._scheduler.overview
        answer: Tuple[float, Any] = self._scheduler.ask(lambda: overview.answer(*question))
        return answer

    def take(self, line: str) -> None:
        """Carry out a line. The thread that reads the terminal calls this. Raises ValueError with a
        text for an invalid line."""
        task, *words = shlex.split(line) or ['status']
        if task == 'quit':
            self._scheduler.post(Stop())
        elif task not in TASKS:
            raise ValueError(PROMPT)
        else:
            self._carry_out(task, words)

    def _carry_out(self, task: str, words: List[str]) -> None:
        try:
            args = _task_parser(task).parse_args(words)
            _carry_out(self._operator, task, args)
        except SystemExit:   # of argparse, which has printed the reason
            return
        except (RuntimeError, concurrent.futures.TimeoutError) as exc:
            raise ValueError(str(exc) or 'the scheduler does not answer') from exc


def operate(task: str, argv: Sequence[str]) -> int:
    """Send a question or an order to a running scheduler. Returns the exit status: 0, or 1 if the
    scheduler cannot be asked or refuses the order."""
    args = _task_parser(task).parse_args(argv)
    try:
        import dispy_httpd   # it has the link to a scheduler
        host, port = host_and_port(args.scheduler_host, SCHEDULER_PORT)
        files = tls_files(args.certfile, args.keyfile, None)
        secret = find_secret(None, args.secret_file)
        logging.getLogger('dispy').setLevel(logging.ERROR)   # errors are printed below
        access = ConnectionSettings(secret, *files, PULSE, REDIAL_MOST)
        link = dispy_httpd.SchedulerLink(host, port, access)
        try:
            why = link.why_not()
            if why:
                raise DispyError('the scheduler at %s:%d cannot be asked: %s' % (host, port, why))
            return _carry_out(Operator(link.ask), task, args)
        finally:
            link.close()
    except (ValueError, OSError, RuntimeError, ImportError, DispyError) as exc:
        print('dispyscheduler %s: %s' % (task, exc), file=sys.stderr)
        return 1


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def default_state_dir(port: int) -> str:
    """Return the default directory for the state of the scheduler at this port."""
    if os.name == 'nt':
        base = os.environ.get('LOCALAPPDATA')
    else:
        base = os.environ.get('XDG_STATE_HOME')
    if not base:
        home = os.path.expanduser('~')
        base = os.path.join(home, '.local', 'state')
    return os.path.join(base, 'dispy', 'scheduler-%d' % port)


# Options of dispy 4 that have no effect, as OBSOLETE_NODE
OBSOLETE_SCHEDULER = {
    '--msg-timeout': (True, 'connections are kept'),
    '--dest-path-prefix': (True, 'files of programs are in the directory of --state-dir'),
    '--cooperative': (False, 'each program limits its own CPUs of a node'),
}
# Options that a node does not have
OPTIONS: List[Tuple[Tuple[str, ...], Dict[str, Any]]] = [
    (('-p', '--port', '--scheduler-port'), {
        'type': int,
        'default': SCHEDULER_PORT,
        'metavar': 'N',
        'help': 'TCP port for programs and nodes; 0: any (default: %(default)s)'}),
    (('--ext-host', '--ext-ip-addr'), {
        'action': Each,
        'metavar': 'ADDR',
        'help': 'accepted and ignored, for old scripts'}),
    (('-n', '--node', '--nodes'), {
        'action': Each,
        'nargs': '+',
        'default': [],
        'metavar': 'HOST[:PORT]',
        'help': 'nodes; may be repeated (default: all that answer on the local network)'}),
    (('--node-port',), {
        'type': int,
        'default': NODE_PORT,
        'metavar': 'N',
        'help': 'port of nodes for which none is given (default: %(default)s)'}),
    (('--node-secret',), {
        'metavar': 'SECRET',
        'help': 'secret of nodes, if it is another; it can be seen in the list of '
                'processes, so better:'}),
    (('--node-secret-file',), {
        'metavar': 'FILE',
        'help': 'file with the secret of nodes'}),
    (('--cluster-secret',), {
        'metavar': 'SECRET',
        'help': 'secret of programs, if it is another; better:'}),
    (('--cluster-secret-file',), {
        'metavar': 'FILE',
        'help': 'file with the secret of programs, or a directory with a secret for each user, '
                'in a file with his name: a program sees and cancels what is of its user then'}),
    (('--node-certfile',), {
        'metavar': 'FILE',
        'help': 'certificate for TLS with nodes'}),
    (('--node-keyfile',), {
        'metavar': 'FILE',
        'help': "the certificate's key, if not in the same file"}),
    (('--cluster-certfile',), {
        'metavar': 'FILE',
        'help': 'certificate for TLS with programs; if it is not that for nodes, nodes '
                'connect to the next port'}),
    (('--cluster-keyfile',), {
        'metavar': 'FILE',
        'help': "the certificate's key, if not in the same file"}),
    (('--operator-secret-file',), {
        'metavar': 'FILE',
        'help': "file with the operator's secret, for the web monitor: whoever has it can see and "
                'end the jobs of all programs (default: that of programs if it is the one of this '
                'user, otherwise one that is made in the state directory)'}),
    (('--nodes-share-secret',), {
        'action': 'store_true',
        'help': 'programs with a secret of their own may have the same as nodes: each of '
                'them could then pass for a node, and be given the jobs of the others'}),
    (('--allow-nodes',), {
        'action': Each,
        'default': [],
        'metavar': 'NET|HOST',
        'help': 'addresses (10.1.0.0/16) or names (*.example.org) at which programs may '
                'name nodes; may be repeated (default: private networks; those given with '
                '-n always)'}),
    (('--max-queued-bytes',), {
        'type': size_option,
        'default': QUEUED_MOST,
        'metavar': 'N[kmgt]',
        'help': 'bytes of arguments that the jobs of one program may have here; further '
                'jobs wait in the program (default: %d GiB)' % (QUEUED_MOST >> 30)}),
    (('--pulse-interval',), {
        'type': seconds_option,
        'default': PULSE,
        'metavar': 'S',
        'help': 'seconds between signs of life (default: %(default)g)'}),
    (('--ping-interval',), {
        'type': seconds_option,
        'default': REDIAL_MOST,
        'metavar': 'S',
        'help': 'most seconds between searches for nodes (default: %(default)g)'}),
    (('--ipv4-udp-multicast',), {
        'action': 'store_true',
        'help': 'look for nodes by IPv4 multicast too'}),
    (('--zombie-interval',), {
        'type': minutes_option,
        'default': ZOMBIE_TIME / 60,
        'metavar': 'MIN',
        'help': 'minutes that results wait for a program that is gone (default: '
                '%(default)g)'}),
    (('--gone-after',), {
        'type': seconds_option,
        'default': GONE_TIME,
        'metavar': 'S',
        'help': 'seconds after which, when the connection to a program without recover_file'
                ' has ended, its jobs that have not begun are cancelled (default: '
                '%(default)g)'}),
    (('--limit',), {
        'action': Each,
        'default': [],
        'metavar': 'WHO=cpus:N,jobs:N',
        'help': 'most CPUs and jobs on nodes that a user, a group (@NAME) or each user who is not '
                'named (*) may have at once; may be repeated. This and the next three are read '
                'again at SIGHUP, with --daemon'}),
    (('--share',), {
        'action': Each,
        'default': [],
        'metavar': 'WHO=N',
        'help': 'part of the CPUs that a user, a group or each other user gets while others want '
                'them too, in proportion to theirs; may be repeated (default: *=1)'}),
    (('--priority',), {
        'action': Each,
        'default': [],
        'metavar': 'WHO=N',
        'help': 'jobs of users with a higher priority go first; may be repeated (default: *=0)'}),
    (('--group',), {
        'action': Each,
        'default': [],
        'metavar': 'NAME=USER,USER...',
        'help': 'users that share what their group gets; may be repeated'}),
    (('--half-life',), {
        'type': positive_number,
        'metavar': 'HOURS',
        'help': 'users who have used less get more: past use counts half after this many hours, 1 '
                'to 168 (default: only what is used now counts)'}),
    (('--history',), {
        'type': days_option,
        'default': 0.0,
        'metavar': 'DAYS',
        'help': 'days that jobs which have ended are kept, for `dispyscheduler history` (default: '
                'none are)'}),
    (('--state-dir',), {
        'metavar': 'DIR',
        'help': 'where jobs and results are kept (default: %s)'
                % default_state_dir(SCHEDULER_PORT).replace('%', '%%')}),
    (('--fair', '--fair-cluster-scheduler'), {
        'action': 'store_true',
        'help': 'programs share CPUs evenly (default)'}),
    (('--fifo', '--early-cluster-scheduler'), {
        'action': 'store_true',
        'help': 'programs are served in the order of their coming'}),
    (('--httpd',), {
        'type': int,
        'nargs': '?',
        'const': HTTPD_PORT,
        'metavar': 'PORT',
        'help': 'show all this in a browser (needs dispy_httpd.py), at this port; the link '
                'is in the log if nobody else can read that, and in the file monitor of the '
                'state directory (default: %d)' % HTTPD_PORT}),
    (('--httpd-host',), {
        'default': '127.0.0.1',
        'metavar': 'ADDR',
        'help': 'address at which that page is served (default: %(default)s); with another '
                'give --httpd-certfile too'}),
    (('--httpd-certfile',), {
        'metavar': 'FILE',
        'help': 'certificate of that page, for TLS'}),
    (('--httpd-keyfile',), {
        'metavar': 'FILE',
        'help': "the certificate's key, if not in the same file"}),
    (('--httpd-token-file',), {
        'metavar': 'FILE',
        'help': "file with the page's token, which is made if there is no such file "
                '(default: monitor-token in the state directory)'}),
    (('--cleanup-nodes',), {
        'action': 'store_true',
        'help': 'nodes remove the files of a program also if it gives cleanup=False'}),
]


def make_parser() -> OptionParser:
    parser = daemon_parser('dispyscheduler',
                           'Share nodes between several programs (dispy.SharedJobCluster).',
                           EXIT_STATUSES)
    for names, settings in OPTIONS:
        parser.add_argument(*names, **settings)
    add_daemon_options(parser, OBSOLETE_SCHEDULER)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the daemon, or a command of an operator. Return the exit status, see EXIT_STATUSES."""
    if argv is None:
        argv = sys.argv[1:]
    if argv and argv[0] in TASKS:
        return operate(argv[0], argv[1:])
    manager = ServiceManager()
    has_terminal = sys.stdin is not None and sys.stdin.isatty()
    parser = make_parser()
    try:
        args = parse_arguments(parser, argv)
        _check_orders(parser, args)
        if args.save_config:
            save_config(parser, args, args.save_config)
            return 0
        limit_values(args.max_value)
        raise_descriptors()
        for name in ('dispyscheduler', 'dispy', 'dispynode'):
            set_up_log(name, args.debug, args.log_file)
        tell_obsolete(args, OBSOLETE_SCHEDULER)
        _check_options(args)
        scheduler = Scheduler(_options_of(args, functools.partial(_read_rules, argv)))
        monitor = None
        try:
            port = scheduler.start()
            if args.httpd is not None:
                monitor = _monitor(scheduler, port, args)
        except BaseException:
            scheduler.close()
            raise
    except (DispyError, OSError, ValueError) as exc:
        print('dispyscheduler: %s' % exc, file=sys.stderr)
        return 1
    _end_on_signals(scheduler, args.daemon)
    write_stacks_on_signal()
    logger.info('serves at port %d, PID %d, state in %s', port, os.getpid(), scheduler.state.root)
    if args.daemon:
        leave_terminal()
    elif has_terminal:
        listen_at_terminal(PROMPT, OperatorPrompt(scheduler).take)
    manager.ready('at port %d' % port, scheduler.call_soon)
    try:
        return run_until_ended(scheduler)
    finally:
        manager.close()
        if monitor is not None:
            monitor.shutdown()


# Field of Options -> option of the command line whose value it has
OPTION_OF = {
    'port': 'port',
    'node_port': 'node_port',
    'cluster_certfile': 'cluster_certfile',
    'cluster_keyfile': 'cluster_keyfile',
    'node_certfile': 'node_certfile',
    'node_keyfile': 'node_keyfile',
    'fifo': 'fifo',
    'pulse': 'pulse_interval',
    'ping': 'ping_interval',
    'multicast': 'ipv4_udp_multicast',
    'max_queued': 'max_queued_bytes',
    'allowed': 'allow_nodes',
    'gone': 'gone_after',
    'history': 'history',
    'cleanup_nodes': 'cleanup_nodes',
}


def _check_orders(parser: OptionParser, args: argparse.Namespace) -> None:
    """End the program if options contradict each other about the order of jobs."""
    if not args.fifo:
        return
    for other in ('fair', 'share', 'priority', 'group', 'half_life'):
        if getattr(args, other):
            option = other.replace('_', '-')
            parser.error('--fifo serves programs in the order of their coming: it excludes --%s' %
                         option)


def _check_options(args: argparse.Namespace) -> None:
    """Raise StartError, ValueError or OSError for inconsistent options."""
    for side in ('cluster', 'node'):
        certfile = getattr(args, side + '_certfile')
        keyfile = getattr(args, side + '_keyfile')
        tls_files(certfile, keyfile, None, '--%s-%%s' % side)
    if not 1 <= args.node_port <= 65535:
        raise StartError('port %d is not between 1 and 65535 (--node-port)' % args.node_port)
    for node in args.node:
        host_and_port(node, args.node_port)
    discovery_reach()
    for word in args.allow_nodes:
        _check_allowed(word)


def _secrets_of(root: str, args: argparse.Namespace) -> Dict[str, Any]:
    """Return the options of a scheduler that are secrets, or say what they are for. Raises
    SecretError, StartError or OSError."""
    users: Tuple[Tuple[str, bytes], ...] = ()
    if args.cluster_secret_file and os.path.isdir(args.cluster_secret_file):
        users = secrets_of_users(args.cluster_secret_file)
        cluster_secret = b''
    else:
        cluster_secret = find_secret(args.cluster_secret, args.cluster_secret_file).strip()
    node_secret = find_secret(args.node_secret, args.node_secret_file)
    separate = bool(args.cluster_secret or args.cluster_secret_file)
    known = [cluster_secret, *[secret for _, secret in users]]
    is_same = node_secret.strip() in known
    operator_secret = b''
    if separate:
        if is_same and not args.nodes_share_secret:
            raise StartError(
                'programs have a secret of their own (--cluster-secret-file), and nodes have the '
                'same: each program could pass for a node and be given the jobs of the others; '
                'give nodes another (--node-secret-file), or say --nodes-share-secret')
        operator_secret = _operator_secret(root, args.operator_secret_file)
        if users and operator_secret.strip() in known:
            raise StartError("a user has the operator's secret, and would be the operator: give "
                             'another (--operator-secret-file)')
    return {
        'cluster_secret': cluster_secret,
        'node_secret': node_secret,
        'separate': separate,
        'operator_secret': operator_secret,
        'users': users,
    }


def _read_rules(argv: Sequence[str]) -> UserRules:
    """Return the rules of users, from the command line and from the current contents of the file
    that it names. Raises StartError."""
    args = parse_arguments(make_parser(), argv)
    return rules_of(args)


def _options_of(args: argparse.Namespace,
                read_rules: Optional[Callable[[], UserRules]] = None) -> Options:
    """Return the options of a scheduler from its command line. Raises SecretError, StartError or
    OSError."""
    root = args.state_dir or default_state_dir(args.port)
    if not has_place(root):
        raise StartError('this user has no home for the state (neither HOME nor an entry in the '
                         'password file): --state-dir')
    if args.clean:
        _clean(root)
    given: Dict[str, Any] = {}
    for field, name in OPTION_OF.items():
        given[field] = getattr(args, name)
    hosts = tuple(args.host or ('',))
    max_file_size = args.max_file_size or sys.maxsize
    zombie = 60 * args.zombie_interval
    nodes = tuple(args.node)
    return Options(hosts=hosts,
                   nodes=nodes,
                   state_dir=root,
                   zombie=zombie,
                   max_file_size=max_file_size,
                   rules=rules_of(args),
                   read_rules=read_rules,
                   **given,
                   **_secrets_of(root, args))


class RuleWords:
    """What one of the options says of users, groups (@NAME) and all other users (*)."""
    WHO = re.compile('[*]|@?[^@*=,\\s][^@*=,\\s]*')

    def __init__(self, option: str, words: Sequence[str], read: Callable[[str], Any]) -> None:
        """Parse all words of an option. Raises StartError."""
        self.option = option
        self.values: Dict[str, Any] = {}
        for word in words:
            who, sign, value = word.partition('=')
            if not sign or not self.WHO.fullmatch(who):
                raise StartError('%s %s: it must be WHO=VALUE, where WHO is a user, @GROUP or *' %
                                 (option, word))
            if who in self.values:
                raise StartError('%s is given twice for %s' % (option, who))
            try:
                self.values[who] = read(value)
            except ValueError as exc:
                raise StartError('%s %s: %s' % (option, word, exc)) from exc

    def of(self, *who: str) -> Any:
        """Return what the option says of the first of these names that it contains, or None."""
        for name in who:
            if name in self.values:
                return self.values[name]
        return None


def _limit_words(text: str) -> Dict[str, int]:
    """Parse cpus:N,jobs:N. Raises ValueError."""
    found: Dict[str, int] = {}
    for part in text.split(','):
        name, _, number = part.partition(':')
        if name not in ('cpus', 'jobs') or name in found or not re.fullmatch('[0-9]{1,9}', number):
            raise ValueError('it must be cpus:N, jobs:N or cpus:N,jobs:N')
        found[name] = int(number)
    return found


def _share_word(text: str) -> float:
    """Parse a share. Raises ValueError."""
    with contextlib.suppress(argparse.ArgumentTypeError):
        return positive_number(text)
    raise ValueError('it must be a number above 0')


def _priority_word(text: str) -> int:
    """Parse a priority. Raises ValueError."""
    if not re.fullmatch('[+-]?[0-9]{1,9}', text):
        raise ValueError('it must be a whole number')
    return int(text)


def _groups_of(words: Sequence[str]) -> Dict[str, str]:
    """Return a dictionary from users to their groups. Raises StartError."""
    members: Dict[str, str] = {}
    for name, users in RuleWords('--group', words, lambda text: text.split(',')).values.items():
        for user in users:
            if name[0] in '@*' or not RuleWords.WHO.fullmatch(user) or user[0] in '@*':
                raise StartError('--group %s=%s: it must be NAME=USER,USER...' %
                                 (name, ','.join(users)))
            if user in members:
                raise StartError('--group: user %s is in %s and in %s, and may be in one group' %
                                 (user, members[user], name))
            members[user] = name
    return members


class RuleBook:
    """Everything that options say of users. Raises StartError."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._members = _groups_of(args.group)
        self._limits = RuleWords('--limit', args.limit, _limit_words)
        self._shares = RuleWords('--share', args.share, _share_word)
        self._priorities = RuleWords('--priority', args.priority, _priority_word)
        self._groups = set(self._members.values())
        self._half_life = args.half_life or 0.0
        least, most = HALF_LIVES
        if self._half_life and not least <= self._half_life <= most:
            raise StartError('--half-life %g: it must be between %g and %g hours' %
                             (self._half_life, least, most))

    def rules(self) -> UserRules:
        """Return the rules. Raises StartError."""
        users = {}
        for name in self._named():
            group = self._members.get(name, '')
            users[name] = self._rule_of(name, '@' + group)
        groups = {}
        for name in self._groups:
            groups[name] = self._rule_of('@' + name)
        by_user = bool(self._groups or self._half_life)
        if self._shares.values or self._priorities.values:
            by_user = True
        others = self._rule_of('*')
        half_life = 3600.0 * self._half_life
        return UserRules(users, groups, self._members, others, by_user, half_life)

    def _named(self) -> Set[str]:
        """Return the users of whom the options say anything. Raises StartError for a group that has
        no members."""
        named = set(self._members)
        for words in (self._limits, self._shares, self._priorities):
            for who in words.values:
                if not who.startswith('@'):
                    named.add(who)
                elif who[1:] not in self._groups:
                    raise StartError('%s %s: there is no such group (--group)' %
                                     (words.option, who))
        named.discard('*')
        return named

    def _rule_of(self, who: str, group: str = '') -> UserRule:
        """Return the rule of a user, who has the priority of the group unless the options give
        another one; or that of a group, to which * does not apply."""
        others = '*'
        if who.startswith('@'):
            others = who
        share = self._shares.of(who, others)
        priority = self._priorities.of(who, group, others)
        limits = self._limits.of(who, others)
        rule = UserRule()
        if share is not None:
            rule = rule._replace(share=share)
        if priority is not None:
            rule = rule._replace(priority=priority)
        if limits is not None:
            rule = rule._replace(**limits)
        return rule


def rules_of(args: argparse.Namespace) -> UserRules:
    """Return the rules of users that options give. Raises StartError."""
    book = RuleBook(args)
    return book.rules()


def secrets_of_users(directory: str) -> Tuple[Tuple[str, bytes], ...]:
    """Return the names and secrets of users, each of which has a file. Raises SecretError,
    StartError or OSError."""
    found: Dict[bytes, str] = {}
    for name in sorted(os.listdir(directory)):
        if name.startswith('.'):
            continue
        path = os.path.join(directory, name)
        if not USER_NAME.fullmatch(name):
            raise StartError('%s: a user is called by letters, digits and ._- (at most 64)' % path)
        secret = read_secret(path)
        if secret in found:
            raise StartError('%s: the users %s and %s have the same secret' %
                             (directory, found[secret], name))
        found[secret] = name
    if not 1 <= len(found) <= USERS_MOST:
        raise StartError('%s: the directory has the secrets of %d users, and 1 to %d are wanted '
                         '(--cluster-secret-file)' % (directory, len(found), USERS_MOST))
    return tuple((name, secret) for secret, name in found.items())


def _end_on_signals(scheduler: Scheduler, outlives_terminal: bool) -> None:
    """Let signals end the scheduler. SIGHUP, which comes when the terminal ends, makes a scheduler
    that outlives its terminal read the rules of users again."""
    def stop(number: int, frame: Any) -> None:
        scheduler.post(Stop())

    def reload(number: int, frame: Any) -> None:
        scheduler.post(Reload())
    for name in ENDING_SIGNALS:
        number = getattr(signal, name, None)
        if number is None:   # Windows
            continue
        if name == 'SIGHUP' and outlives_terminal:
            signal.signal(number, reload)
        else:
            signal.signal(number, stop)
    scheduler.wake_on_signals()


def _operator_secret(root: str, path: Optional[str]) -> bytes:
    """Return the operator's secret, which is created at the first start. Raises SecretError,
    StartError or OSError."""
    if path is not None:
        return find_secret(None, path)
    take_state_directory(root)
    path = os.path.join(root, 'operator-secret')
    if not os.path.exists(path):
        make_secret(path)
        logger.info("the operator's secret is in %s: dispy-httpd --secret-file takes it", path)
    return find_secret(None, path)


def _check_allowed(word: str) -> None:
    """Raise StartError for a text that is neither a network nor a pattern for names of hosts."""
    if '/' in word:
        is_right = _is_network(word)
    else:
        is_right = bool(re.fullmatch(r'[^\s,]+', word))
    if not is_right:
        raise StartError('--allow-nodes %s: neither a network such as 10.0.0.0/8 nor a host name' %
                         (word or "''"))


def _is_network(word: str) -> bool:
    try:
        return bool(ipaddress.ip_network(word, False))
    except ValueError:
        return False


def is_log_private(path: Optional[str]) -> bool:
    """Return whether nobody else can read the log, which is a file or standard error."""
    if os.name == 'nt':
        return not path or not others_who(READS, path)
    if path:
        return not os.stat(path).st_mode & 0o077
    if sys.stderr.isatty():
        return True
    mode = os.fstat(sys.stderr.fileno()).st_mode
    return stat.S_ISREG(mode) and not mode & 0o077


def _monitor(scheduler: Scheduler, port: int, args: argparse.Namespace) -> Any:
    """Return a web monitor of this scheduler. Raises StartError."""
    try:
        import dispy_httpd
    except ImportError as exc:
        raise StartError('--httpd needs dispy_httpd.py beside this file: %s' % exc) from exc

    def ask(*question: Any) -> Any:
        return scheduler.ask(functools.partial(scheduler.overview.answer, *question))

    def close() -> None:
        """Do nothing, because the scheduler ends by itself."""
    name = 'all programs of the dispyscheduler at port %d' % port
    source = dispy_httpd.SchedulerSource(ask, name, close)

    root = os.path.abspath(scheduler.state.root)
    token_path = args.httpd_token_file or os.path.join(root, 'monitor-token')

    def tell(text: str) -> None:
        path = os.path.join(root, 'monitor')
        write_private(path, text.encode() + b'\n')
        if not is_log_private(args.log_file):   # others could read the token
            text = 'the link of the monitor is in %s, since others may read this log' % path
        logger.info('%s', text)
    try:
        token = dispy_httpd.kept_token(token_path, '--httpd-token-file')
        server = dispy_httpd.SourceHTTPServer(
            source, args.httpd_host, args.httpd, keyfile=args.httpd_keyfile,
            certfile=args.httpd_certfile, tell=tell, token=token)
        if not token:
            server.keep_token(token_path)
    except (ValueError, OSError, DispyError) as exc:
        raise StartError('--httpd: %s' % exc) from exc
    return server


def _clean(root: str) -> None:
    """Delete what an earlier run has left, if no scheduler uses it."""
    if os.path.isdir(root):
        State(root).close()   # otherwise it says who uses the directory
        for name in os.listdir(root):
            path = os.path.join(root, name)
            if name.startswith('c-') or name == 'large':
                shutil.rmtree(path, ignore_errors=True)
            elif name.startswith('state.db'):
                os.unlink(path)


if __name__ == '__main__':
    # Run once more under its own name, so that classes have one identity.
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    sys.exit(importlib.import_module('dispyscheduler').main())
