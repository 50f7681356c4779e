#!/usr/bin/env python3
"""The scheduler that lets several programs share nodes; it outlives them, and its own death.

Run `python dispyscheduler.py` on a host that programs and nodes can reach; programs use
`dispy.SharedJobCluster(compute, scheduler_host=HOST)`. It finds nodes itself (`-n HOST`, or by
asking the network); nodes that cannot be reached connect to it (`dispynode.py --scheduler-host
HOST`).

    programs                     this process                                              nodes
    +---------------+  frames   +------------------------------------------+   frames   +-----------+
    | driver        | <=======> | accept threads   TLS and handshake       | <========> | dispynode |
    +---------------+           |      | post()                            |            +-----------+
                                | main thread      Loop: links, timers     |
                                |      |           Schedule: decides       |
                                | State            SQLite, a transaction   |
                                |                  a turn                  |
                                +------------------------------------------+

To a program this is a node that has CPUs without end, which keeps what it was given; to nodes it is
a program with many computations. So nearly all is dispy's `Driver` and `Schedule`, and here stands
what is between: `ClientComputation`, a program's computation, in the place of a JobCluster.

The life of a job here:
  1. `Jobs` of a program is noted, and handed to the Schedule.
  2. At the end of the turn the transaction is written; only then is anything sent of what the turn
     has brought about.
  3. The Schedule sends it to a node; the program is told where it is (`JobsAssigned`), and when it has
     begun (`Started`).
  4. The node's result is noted, sent to the program, and acknowledged to the node when it is on the
     disk.
  5. The program's Ack removes it.
After `kill -9` and a new start nodes and programs connect again, and say what they hold; what is on
the disk is the rest.

Payloads stay sealed: nothing that a user has sent is unpickled here, nor anything that is found on
the disk, but by `open_plain`, which opens builtins only.

Files this host needs: this one, dispy.py, dispynode.py, cloudpickle.
"""

import argparse
import bisect
import collections
import concurrent.futures
import contextlib
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
import shutil
import signal
import struct
import sys
import time
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

try:
    from dispy import Driver
except ImportError as exc:   # this file was copied alone, or beside one of another release
    text = str(exc)
    if exc.name == 'dispy':
        text = 'dispyscheduler.py needs the files dispy.py and dispynode.py of the same release beside it, in %s (%s)' % (
            os.path.dirname(os.path.abspath(__file__)), exc)
    if __name__ == '__main__':
        sys.exit(text)
    raise ImportError(text, name=exc.name, path=exc.path) from exc

from dispy import (
    NODES_PAGE, OF_JOBS, REDIAL_MOST, ConnectionSettings, Allocation, CancelAsked,
    PackedComputation, Database, DispyNode, JobState, NodeDrains, NodeHad, NodeLeft, NodeOffers,
    NodePolicy, NodeResults, NodeSpec, NodeUser, NodeConnection, Schedule, AssignmentState,
    WithdrawAsked, ScheduledJob, cpus_of, has_ended, job_row, parse_nodes)
from dispynode import (
    ASKED_FOR, BUNDLE, BUNDLES, DIGEST_SIZE, FOR_CODE, LAZY, DropValue, ValueRequests, pack_error,
    VALUE_MOST, IncomingValue, EXIT_STATUSES, BATCH_BYTES, PROVISIONAL, BACKPRESSURE_BYTES,
    NAME_MOST, NODE_PORT, OF_CLIENTS, ORPHAN_TIME, PAST_TIME, Digests, AttemptHistory, reason_of,
    OBSOLETE_SCHEDULER, accept_obsolete, tell_obsolete, PULSE, RETURNED, SCHEDULER_PORT,
    ZOMBIE_TIME, Ack, Authenticated, SpoolSender, Bye, Call, Cancel, Compute, DispyError, Done,
    Each, FilePiece, FileReceiver, FileStored, Acceptor, KnownAttempts, ClientHello, Jobs, Limit,
    Link, LinkBroken, Need, NodeChanged, CpusChanged, Outcome, Output, PeerError, Pulse, Purpose,
    Query, Ready, ReturnJobs, Reclaim, Refused, Results, Return, JobsReturned, Role, Notice,
    Shutdown, StartError, Started, Unfit, Values, NodeHello, JobsAssigned, Wrong, __version__,
    _write_private, out_of_band, check_name, derive_key, digest_of, discovery_reach, find_secret,
    batches, has_place, host_and_port, in_parts, is_comp, limit_values, log_record_of,
    over_limit_here, refused_row, unfit_row, make_secret, may_reclaim, minutes_option, needs,
    open_envelope, open_plain, open_regular, parse_arguments, pieces_of, replaced, result_key,
    plain_address, run_until_ended, save_config, seconds_option, set_up_log, shorten, size_of,
    size_option, with_size, take_own_directory, tls_files, unpack_error)

__all__ = ['main']   # the others are dispy's own

# --------------------------------------------------------------------------------------------------
# Constants and errors
# --------------------------------------------------------------------------------------------------

UNLIMITED_CPUS = 1 << 20             # CPUs that programs are told of: all they submit comes here at once
# Bytes of waiting jobs' arguments that are kept in memory besides the disk
IN_MEMORY = 8 << 20
BYTES_OVERHEAD = 48                   # bytes of memory that a bytes object takes besides its contents
FILE_BYTES = 64 * 1024             # bytes from which arguments and results are files of their own
RETURN_TIME = 60.0            # s that jobs on nodes wait for these to come back after a new start
REMOVED_MOST = 1000           # acknowledged results that may wait to be removed from the disk
HTTPD_PORT = 8181             # of the web monitor
# S after which what waits is cancelled for a program whose connection has ended
GONE_TIME = 60.0
GONE_LOOKS = 1.0              # s between looks whether the process of such a program has ended
RETRY_TIME = 1.0              # s between attempts to write to a disk that was full
PAGE = 500                    # rows of an answer to a monitor at most
# Failed jobs, those told at once, characters of a traceback
FAILURES_KEPT = 500
FAILURES_PAGE = 100
FAILURE_TEXT = 8000
ARGUMENTS_MOST = 16384        # bytes of arguments that monitors are told
# Bytes that are free, below which SQLite's log is emptied before each transaction
LOW_DISK = 64 << 20
PAGE_SIZE = 4096              # bytes of a page of SQLite's
REMOVED_AT_ONCE = 20          # results that are removed in one transaction while the disk is full
# Bytes of the disk that are kept for the removal of what is over when it is full
RESERVE = 2 << 20
QUEUED_MOST = 16 << 30        # bytes of arguments of jobs that a program may have here
LOCK_MOST = 4096              # characters of the path of a node's lock file
QUESTIONS_MOST = 64           # of a computation whose files are on their way
COMPS_MOST = 256              # computations of one connection
SPECS_MOST = 10000            # nodes that a program may name
# Characters of the reason why a node is not used, where many nodes are told of
REASON_MOST = 2000
REPORTS_APART = 5.0           # s between two questions to a node for what is free there

logger = logging.getLogger('dispyscheduler')


# --------------------------------------------------------------------------------------------------
# What is kept on disk
# --------------------------------------------------------------------------------------------------

STATE_MARK = 'dispy-scheduler'   # the file that says that a directory is a scheduler's


class StoredValue(mmap.mmap):
    """Arguments or a result in a file, of which the system reads what is looked at. Its file goes
    with it unless it has been given a place, which clears `path`."""
    path = ''

    def __del__(self) -> None:
        if self.path:
            with contextlib.suppress(OSError):   # it has gone
                os.unlink(self.path)


def stored(path: str, is_own: bool = False) -> Any:
    """The contents of a file; large ones are not read yet. Raises OSError."""
    with open(path, 'rb') as file:
        # On Windows files cannot be moved or removed that are mapped
        if os.name == 'nt' or os.fstat(file.fileno()).st_size <= LAZY:
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
    """The file in which a payload lies already, if there is one."""
    if len(pieces) == 1 and type(pieces[0]) is memoryview:
        value = pieces[0].obj
    else:
        value = None
    if isinstance(value, StoredValue) and value.path:
        return value
    return None


class OnDisk:
    """A place for a value that comes in parts: a file, written as the parts come, and on the disk
    when it is whole."""
    SYNC = 64 << 20    # bytes after which is waited for the disk, so that nobody waits long

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self._path = path
        self._unsynced = 0
        self._file: Any = open(path, 'wb', buffering=0)

    def add(self, offset: int, data: Any) -> None:
        """As of InMemory."""
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
        """As of InMemory. Raises OSError."""
        self._sync()
        self._file.close()
        return memoryview(stored(self._path, True))

    def drop(self) -> None:
        """As of InMemory."""
        self._file.close()
        with contextlib.suppress(OSError):   # it has gone
            os.unlink(self._path)


class StoredValues(Values):
    """As Values, on the disk."""

    def __init__(self, state: 'State') -> None:
        super().__init__('at the scheduler', logger)
        self._state = state

    def find_place(self, value: IncomingValue) -> Any:
        """A file if there is room on the disk. Raises OSError."""
        promised = sum(other.total - other.seen for other in self._coming.values()
                       if other.place is not None)
        return self._state.find_place(value.total, promised)


class State(Database):
    """ProgramComputations, jobs and results of all programs, and nodes: <state-dir>/state.db, files
    of computations in <state-dir>/c-NAME, large arguments and results in <state-dir>/large."""
    MARK = 0x64735335
    VERSION = 1
    SYNC = 'FULL'
    WAITING, SENT, ENDED, DROPPED = range(4)
    NEW = 'new-'               # begins names of large files that come
    TABLES = """
        CREATE TABLE own (name TEXT PRIMARY KEY, value BLOB);
        CREATE TABLE comps (place INTEGER PRIMARY KEY, comp TEXT UNIQUE, client BLOB, spec BLOB);
        CREATE TABLE jobs (number INTEGER PRIMARY KEY, comp INTEGER, client INTEGER, payload BLOB, options BLOB, state INTEGER,
            attempt INTEGER, node INTEGER, result BLOB);
        CREATE TABLE nodes (place INTEGER PRIMARY KEY, key TEXT UNIQUE, host TEXT, port INTEGER, name TEXT, instance BLOB)
        """   # rows of jobs name others by their places, and hardly grow when they are sent: pages need not be split then
    COMP, OVER, INSERT, MOVE, END, DROP, REMOVE, NODE, MEMORY, LOCK, PAST, PAST_OVER = range(12)
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
        'DELETE FROM past WHERE comp = ?')

    def __init__(self, root: str) -> None:
        """Raises DispyError, OSError."""
        self.root, self.large = root, os.path.join(root, 'large')
        take_state_directory(root)
        os.makedirs(self.large, mode=0o700, exist_ok=True)
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
        # given twice.
        self.number: int = max(*run(
            "SELECT value << 30, (SELECT coalesce(max(number), 0) FROM jobs) FROM own WHERE name = "
            "'starts'"
        ).fetchone())
        # Of what was given up
        run('CREATE TABLE IF NOT EXISTS past (comp TEXT PRIMARY KEY, at REAL, serials BLOB, text '
            'TEXT)'
            )
        # Of nodes
        run('CREATE TABLE IF NOT EXISTS memories (place INTEGER PRIMARY KEY, memory TEXT)')
        # Of nodes too
        run('CREATE TABLE IF NOT EXISTS locks (place INTEGER PRIMARY KEY, machine TEXT, path TEXT)')
        run('DELETE FROM past WHERE at < ?', (time.time() - PAST_TIME,))
        self._comps: Dict[str, int] = dict(run('SELECT comp, place FROM comps'))
        self._places: Dict[str, int] = dict(run('SELECT key, place FROM nodes'))
        self._newest = itertools.count(1 + max([0, *self._comps.values(), *self._places.values()]))
        self._files = self._find_files()   # numbers of jobs with large files
        # Large files to be written before the next transaction
        self._large: Dict[Tuple[int, str], Sequence[Any]] = {}
        self._short = 0                    # bytes of the disk that are missing
        self._reserved = os.path.exists(os.path.join(self.root, 'reserve'))
        self._new_values = itertools.count(1)
        # Those whose files are not needed after the next transaction
        self._gone: List[int] = []

    def key_of(self, comp: str) -> bytes:
        """The key by which this scheduler takes results of a computation from nodes, also when it
        has been started again."""
        return hmac.digest(self._seed, comp.encode(), 'sha256')

    def _find_files(self) -> Set[int]:
        """Removes those that the last run did not come to use, or to remove."""
        found: Set[int] = set()
        for name in os.listdir(self.large):
            number, _, end = name.partition('.')
            if number.startswith(self.NEW) and end == 'part':   # it came when the last run ended
                os.unlink(os.path.join(self.large, name))
            if not number.isdigit() or end not in ('p', 'r', 'p.part', 'r.part'):
                continue   # none of ours
            if end in ('p', 'r') and self._db.execute('SELECT 1 FROM jobs WHERE number = ?',
                                                      (int(number), )).fetchone():
                found.add(int(number))
            else:
                os.unlink(os.path.join(self.large, name))
        return found

    # -- computations and nodes --------------------------------------------------------------------

    def began(self, remote: 'ClientComputation') -> None:
        """A computation is new, or its spec has changed."""
        place = self._comps.get(remote.comp)
        if place is None:
            place = self._comps[remote.comp] = next(self._newest)
        self.note(self.COMP, place, remote.comp, remote.instance,
                  pickle.dumps(dict(remote.cargo.spec, key=remote.digest), 5))

    def over(self, comp: str) -> None:
        """A computation, whose jobs are removed."""
        if self._comps.pop(comp, None) is not None:
            self.note(self.OVER, comp)

    def met(self, peer: NodeConnection) -> None:
        """A node is connected."""
        key = _key_text(peer.key)
        if key not in self._places:
            self._places[key] = next(self._newest)
        self.note(self.NODE, self._places[key], key, peer.host, peer.port, peer.name, peer.instance)
        self.note(self.MEMORY, self._places[key], peer.memory)
        lock = peer.facts.get('lock')
        if type(lock) is tuple and [type(part) for part in lock] == [str, str]:
            self.note(self.LOCK, self._places[key], *(part[:LOCK_MOST] for part in lock))

    def gave_up(self, comp: str, serials: Sequence[int], text: str) -> None:
        """What a program did not come back for; the numbers are its own."""
        self.note(self.PAST, comp, time.time(), struct.pack('>%dQ' % len(serials), *serials), text)

    def past(self, comp: str) -> AttemptHistory:
        """What is known of the jobs of a computation that is not here any more."""
        row = self._db.execute('SELECT serials, text FROM past WHERE comp = ?', (comp,)).fetchone()
        if row is None:
            return AttemptHistory()
        return AttemptHistory(given_up=frozenset(struct.unpack('>%dQ' % (len(row[0]) // 8), row[0])),
                    text=row[1])

    # -- jobs --------------------------------------------------------------------------------------

    def _file(self, number: int, end: str) -> str:
        return os.path.join(self.large, '%d.%s' % (number, end))

    def _keep(self, number: int, end: str, pieces: Sequence[Any]) -> None:
        path = self._file(number, end)
        value = _place_of(pieces)
        if value is not None:   # it is on the disk
            os.replace(value.path, path)
            value.path = ''
            self._files.add(number)
            return
        with replaced(path) as temporary, open(temporary, 'wb') as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        self._files.add(number)

    def find_place(self, size: int, promised: int) -> OnDisk:
        """A place for a value of so many bytes that comes in parts, while others bring so many
        more. Raises OSError."""
        free = shutil.disk_usage(self.large).free - promised - self._reserve
        if size > free:
            raise OSError(errno.ENOSPC, '%d bytes are free on its disk' % max(0, free))
        return OnDisk(os.path.join(self.large, '%s%d.part' % (self.NEW, next(self._new_values))))

    def submitted(self, work: 'ClientJob', payload: Any) -> None:
        """A new job."""
        number = work.serial >> 16
        large = size_of(payload) >= FILE_BYTES
        if large:
            self._large[number, 'p'] = pieces_of(payload)
        self.note(self.INSERT, number, self._comps[work.comp], work.client_serial,
                  None if large else b''.join(pieces_of(payload)),
                  pickle.dumps(work.options) if work.options else None)

    def payload(self, number: int) -> Any:
        """The arguments of a job that has not ended."""
        # Submitted in this very turn, in the order of their numbers
        new = self._notes[self.INSERT]
        at = bisect.bisect_left(new, (number,))
        if at < len(new) and new[at][0] == number and new[at][3] is not None:
            return new[at][3]
        if (number, 'p') in self._large:
            pieces = self._large[number, 'p']
            if len(pieces) == 1:
                return pieces[0]
            return b''.join(pieces)
        row = self._db.execute('SELECT payload FROM jobs WHERE number = ?', (number,)).fetchone()
        if row is not None and row[0] is not None:
            return row[0]
        return stored(self._file(number, 'p'))

    def sent(self, works: Sequence[ScheduledJob], key: Any) -> None:
        """Jobs go to a node, when this is on the disk."""
        place = self._places[_key_text(key)]
        self._notes[self.MOVE] += [(self.SENT, work.serial & 0xffff, place, work.serial >> 16)
                                   for work in works]

    def waits(self, work: ScheduledJob) -> None:
        """A job is back from a node."""
        self.note(self.MOVE, self.WAITING, work.serial & 0xffff, 0, work.serial >> 16)

    def payload_size(self, number: int) -> int:
        """Bytes of the arguments of a job, if they are a file; otherwise 0. Raises OSError."""
        if (number, 'p') in self._large:
            return size_of(tuple(self._large[number, 'p']))
        if number in self._files:
            return os.path.getsize(self._file(number, 'p'))
        return 0

    def size_of_payload(self, number: int) -> int:
        """Bytes of the arguments of a job that has not ended, at the start."""
        if number in self._files:
            with contextlib.suppress(OSError):   # told when they are needed
                return os.path.getsize(self._file(number, 'p'))
        row = self._db.execute('SELECT length(payload) FROM jobs WHERE number = ?',
                               (number, )).fetchone()
        if row is not None:
            return row[0] or 0
        return 0

    def ended(self, number: int, row: tuple) -> None:
        """A row of Results, with the serial that the program knows. The payload of a very large one
        is a file alone."""
        if size_of(row[4]) > LAZY:
            self._large[number, 'r'] = pieces_of(row[4])
            row = (*row[:4], None, *row[5:])
        data: Optional[bytes] = pickle.dumps(row[:4] + tuple(map(_plain, row[4:])), 5)
        if len(data) >= FILE_BYTES:  # type: ignore[arg-type]
            self._large[number, 'r'] = [data]
            data = None
        self.note(self.END, data, number)

    def dropped(self, number: int) -> None:
        """A job is cancelled because its program is gone, which may still ask for it."""
        self._large.pop((number, 'p'), None)
        self.note(self.DROP, number)
        if number in self._files:
            self._gone.append(number)

    def removed(self, numbers: Sequence[int]) -> None:
        """A program has these results, or wants none."""
        self._notes[self.REMOVE] += [(number,) for number in numbers]
        # What was not written because there is no room need not be written any more
        if self.broken:
            gone = set(numbers)
            for statement, place in ((self.INSERT, 0), (self.MOVE, 3), (self.END, 1)):
                self._notes[statement] = [
                    row for row in self._notes[statement] if row[place] not in gone
                ]
        if self._large:   # not written yet, and need not be
            gone = set(numbers)
            for key in [key for key in self._large if key[0] in gone]:
                del self._large[key]
        if self._files:
            self._gone += self._files.intersection(numbers)

    def commit(self) -> bool:
        """As Database, with the large files before it; then those go that are not needed any more.
        That results were acknowledged can wait for more to write: if it is lost, they come once
        more, and are acknowledged as known."""
        if not self._gone and len(self._notes[self.REMOVE]) < REMOVED_MOST and not any(
                rows for rows in self._notes if rows is not self._notes[self.REMOVE]):
            return True
        if not self._has_room():
            self._make_room()
            return self._failed(
                OSError(errno.ENOSPC,
                        '%s: %d bytes more are needed' % (os.strerror(errno.ENOSPC), self._short)))
        try:
            for (number, end), pieces in list(self._large.items()):
                self._keep(number, end, pieces)
                del self._large[number, end]
        except OSError as exc:
            self._make_room()
            return self._failed(exc)
        done = super().commit()
        if done:
            self._unlink_gone()
            self._have_reserve()
        else:
            self._make_room()
        return done

    def _has_room(self) -> bool:
        """Whether what waits to be written leaves some of the disk free: SQLite needs room to
        remove things, too, and a transaction that fails has filled the disk. It is written twice,
        into the log and from there into the file."""
        wanted = sum(len(row[3]) for row in self._notes[self.INSERT] if row[3] is not None)
        wanted += sum(len(row[0]) for row in self._notes[self.END] if row[0] is not None)
        files = sum(size_of(tuple(pieces)) for pieces in self._large.values()
                    if _place_of(pieces) is None)
        if not wanted and not files:
            return True
        # What is in the log only would make the file grow later
        if shutil.disk_usage(self.root).free < LOW_DISK + 4 * (wanted + files):
            with contextlib.suppress(self._error):
                self._db.execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchall()
        # Of what was removed
        inside = PAGE_SIZE * self._db.execute('PRAGMA freelist_count').fetchone()[0]
        if inside < self._reserve:
            margin = self._reserve
        else:
            margin = self._reserve // 8
        self._short = files + wanted + max(0, wanted - inside) + margin - shutil.disk_usage(
            self.root).free
        return self._short <= 0

    def _unlink_gone(self) -> None:
        for number, end in itertools.product(self._gone, 'pr'):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._file(number, end))
        self._files.difference_update(self._gone)
        self._gone = []

    @property
    def _reserve(self) -> int:
        """RESERVE, or less on a small disk."""
        return min(RESERVE, shutil.disk_usage(self.root).total // 16)

    def _have_reserve(self) -> None:
        """Bytes of the disk that are given back when it is full, so that what is over can be
        removed: SQLite needs room for that too."""
        if self._reserved:
            return
        path = os.path.join(self.root, 'reserve')
        try:
            if shutil.disk_usage(self.root).free > 4 * self._reserve:
                with open(path, 'wb') as file:
                    file.write(bytes(self._reserve))
                self._reserved = True
        except OSError as exc:
            logger.debug('%s: %s', path, exc)

    def _make_room(self) -> None:
        """The disk is full: remove what is over, and nothing else."""
        self._unlink_gone()
        if shutil.disk_usage(self.root).free < self._reserve:   # others have filled it
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.root, 'reserve'))
            self._reserved = False
        over = self._notes[self.OVER]
        gone = self._notes[self.REMOVE]
        try:
            # Few at a time, and the room that they take in the log is used again for the next
            while over or gone:
                self._notes[self.OVER], self._notes[
                    self.REMOVE] = over[:REMOVED_AT_ONCE], gone[:REMOVED_AT_ONCE]
                self._write((self.OVER, self.REMOVE))
                over = over[REMOVED_AT_ONCE:]
                gone = gone[REMOVED_AT_ONCE:]
                self._db.execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchall()
        except self._error as exc:
            logger.debug('%s', exc)   # it is tried again
        finally:
            self._notes[self.OVER], self._notes[self.REMOVE] = over, gone

    def results(self, numbers: Sequence[int], unread: List[int]) -> Iterator[tuple]:
        """Rows of Results that are on the disk, one after the other; `unread` gets those that
        cannot be read now."""
        for number in numbers:
            row = self._db.execute('SELECT result, client FROM jobs WHERE number = ? AND state = 2',
                                   (number, )).fetchone()
            if row is None:
                continue
            try:
                found = self._result(number, row[0])
            except FileNotFoundError as exc:
                yield row[1], int(
                    Outcome.DIED
                ), 0.0, 0.0, b'its result cannot be read at the scheduler: %s' % str(
                    exc).encode(), b'', b''
            except OSError as exc:   # no descriptor is left
                if not unread:
                    logger.error('a result cannot be read now: %s', exc)
                unread.append(number)
            else:
                yield found

    def _result(self, number: int, data: Optional[bytes]) -> tuple:
        """A row of Results. Raises OSError."""
        if data is None:
            with open(self._file(number, 'r'), 'rb') as file:
                data = file.read()
        found: tuple = open_plain(data)
        if found[4] is None:
            found = (*found[:4], stored(self._file(number, 'r')), *found[5:])
        return found

    # -- at the start ------------------------------------------------------------------------------

    def comps(self) -> List[Tuple[str, bytes, dict]]:
        """ProgramComputations in the order in which they came: name, instance of the program,
        spec."""
        return [(comp, client, open_plain(spec)) for comp, client, spec in
                self._db.execute('SELECT comp, client, spec FROM comps ORDER BY place')]

    def jobs(self, comp: str) -> Iterator[Tuple[int, int, Any, int, int, Any]]:
        """Rows (number, serial of the program, options, state, serial, key of its node) of a
        computation, in order."""
        keys = {place: _key_of(key) for key, place in self._places.items()}
        for number, client, options, state, attempt, node in self._db.execute(
                'SELECT number, client, options, state, attempt, node FROM jobs WHERE comp = ? '
                'ORDER BY number',
            (self._comps[comp], )):
            yield number, client, open_plain(
                options) if options else None, state, number << 16 | attempt, keys.get(node)

    def nodes(self) -> List[tuple]:
        """Rows (key, host, port, name, instance)."""
        return [
            (_key_of(key), *rest)
            for key, *rest in self._db.execute('SELECT key, host, port, name, instance FROM nodes')
        ]

    def memories(self) -> Dict[Any, str]:
        """What the memories of nodes were known by, by keys of nodes."""
        return {
            _key_of(key): memory
            for key, memory in self._db.execute(
                'SELECT key, memory FROM nodes JOIN memories USING (place)')
        }

    def locks(self) -> Dict[Any, Tuple[str, str]]:
        """Machine and path of the lock files of nodes, by keys of nodes."""
        rows = self._db.execute('SELECT key, machine, path FROM nodes JOIN locks USING (place)')
        return {_key_of(key): (machine, path) for key, machine, path in rows}

    def close(self) -> None:
        """Let go of it. A row whose large file could not be written is not written either: the
        other side has it still."""
        if self.commit() or not self._large:
            super().commit()
        self._db.close()


_SUCCESS = pickle.dumps(0, 5)   # as `dumps` packs the exit status of a program that has not failed


def _exit_status(row: tuple) -> int:
    """Of a program, by its row of Results; 0 if a node has sent something else."""
    if row[4] == _SUCCESS:
        return 0
    with contextlib.suppress(PeerError):
        value = open_envelope(_plain(row[4]))
        if type(value) is int:
            return value
        return 0
    return 0


# Of jobs that have failed
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
# ProgramComputations of programs
# --------------------------------------------------------------------------------------------------

# How a job has ended that has no result; others were cancelled.
_OUTCOMES = {JobState.ABANDONED: Outcome.ABANDONED, JobState.TERMINATED: Outcome.DIED}


class ClientJob(ScheduledJob):
    """A job of a program."""
    # The serial that the program knows it by; bytes of its arguments
    __slots__ = ('client_serial', 'size')

    def __init__(self, comp: str, payload: Any, options: Optional[dict], serial: int,
                 client: int) -> None:
        super().__init__(comp, payload, options)
        self.serial = serial
        self.client_serial = client
        self.size = 0

    @property
    def values(self) -> tuple:
        """Sizes and digests of values that it needs."""
        if self.options:
            return self.options.get('values', ())
        return ()


MODULES_OF = '.modules'   # ends the name of the directory that has the files of a program's modules
# The same of the values that its jobs need, each a file called by its digest
VALUES_OF = '.values'


TOO_LARGE = '%s has %d bytes, and --max-file-size is %d'


class ClientAllocator(NamedTuple):
    """A NodeAllocate of a program, which is asked by its number."""
    number: int


class Absence:
    """What becomes of a computation whose program is away. One that has a recover_file is waited
    for. Of another, what has not begun is cancelled after a while, or at once when its process is
    known to have ended; should the program come back none the less, it is told and sends these jobs
    again."""

    def __init__(self, recovers: bool, process: Any) -> None:
        """`process` is as of `own_process`. Raises PeerError."""
        if type(process) is not tuple or [type(part) for part in process] != [str, int, str]:
            raise PeerError('a process is not described as it should be')
        self._recovers = recovers
        self._process = process
        # When it is gone, when its process is looked for next
        self._until = self.look_at = math.inf
        self.gone = False
        self.for_good = False    # nobody can come back: its process has ended
        # Jobs on nodes that are cancelled if they have not begun
        self.dropping: Set[Any] = set()
        # Serials of jobs that were cancelled so, to their numbers
        self.dropped: Dict[int, int] = {}

    def begin(self, now: float, patience: float) -> None:
        """The connection of the program has ended, or it has not come yet."""
        if not self._recovers and not self.gone:
            self._until = now + patience
            if has_ended(self._process) is not None:
                self.look_at = now
            else:
                self.look_at = self._until

    def end(self) -> None:
        """The program is connected."""
        self._until = self.look_at = math.inf
        self.gone = self.for_good = False

    def is_over(self, now: float) -> bool:
        """Look for it, when `look_at` has come: whether it is gone now."""
        self.look_at = min(self._until, now + GONE_LOOKS)
        self.for_good = bool(has_ended(self._process))
        if now >= self._until or self.for_good:
            self.gone = True
            self.look_at = math.inf
        return self.gone


class EarlyJob:
    """A job that has come and is not taken yet, because it needs values that are not here."""
    __slots__ = ('row', 'values')

    def __init__(self, row: tuple) -> None:
        self.row = row    # of Jobs
        self.values = row[2]['values']


class ClientValues:
    """The values, known by their digests, that the jobs of one computation need. A job is taken
    when all that it needs is on the disk; the program is asked for what is not. The loop's
    thread."""

    def __init__(self, remote: 'ClientComputation', most: int) -> None:
        """`most`: bytes that are kept, see ValueDesk."""
        self._remote, self._desk = remote, ValueRequests(most)
        self._directory = remote.directory + VALUES_OF
        self.retry_at = math.inf    # when room is looked for again
        self.told = False           # that there is none

    def path(self, digest: bytes) -> str:
        """Where a value is."""
        return os.path.join(self._directory, digest.hex())

    def restore(self) -> None:
        """What an earlier run has left."""
        for name in os.listdir(self._directory):
            path = os.path.join(self._directory, name)
            if len(name) == 2 * DIGEST_SIZE:
                self._desk.come(self._remote.comp, os.path.getsize(path), bytes.fromhex(name))
            else:   # it came when that ended
                os.unlink(path)

    def took(self, work: 'ClientJob') -> None:
        """A job that was taken needs its values."""
        self._desk.hold(self._remote.comp, work)

    def admit(self, row: tuple) -> bool:
        """Whether a job can be taken now. Otherwise it waits for what it needs."""
        waiting = self._desk.waiting(self._remote.comp)
        if any(early.row[0] == row[0] for early in waiting):
            return False   # it came twice
        early = EarlyJob(row)
        ready = self._desk.admit(self._remote.comp, early)
        if ready:
            self._let_go(early)
        return ready

    def release(self, work: 'ClientJob') -> None:
        """A job has ended."""
        self._desk.release(self._remote.comp, work)

    def leave(self, serials: Iterable[int]) -> List[int]:
        """These jobs are not wanted any more. Returns those that waited for values."""
        wanted = set(serials)
        waiting = self._desk.waiting(self._remote.comp)
        gone = {early for early in waiting if early.row[0] in wanted}
        self._desk.leave(self._remote.comp, gone)
        return [early.row[0] for early in gone]

    def interrupt(self) -> None:
        """The program is not connected any more; it sends its jobs again."""
        self._desk.interrupt(self._remote.comp)

    def serve(self) -> Tuple[List[tuple], List[tuple], str]:
        """Jobs that can be taken now, what Need has to say, and why a value finds no room."""
        if not self._desk:
            return [], [], ''
        served, actions = self._desk.serve()
        missing: List[tuple] = []
        error = ''
        for action in actions:
            if isinstance(action, DropValue):
                with contextlib.suppress(OSError):   # it has gone
                    os.unlink(self.path(action.digest))
                continue
            row = (action.digest.hex(), action.size, action.digest, 0o400)
            try:
                missing = self._remote.receiver.want(Purpose.VALUES, [row])
            except (OSError, ValueError) as exc:
                error = str(exc)
            else:
                if not missing:   # it is there from before
                    self._desk.came(action.comp)
        return [self._let_go(early) for _, early in served], missing, error

    def _let_go(self, early: EarlyJob) -> tuple:
        """The job itself needs the values when it has been taken."""
        self._desk.release(self._remote.comp, early)
        return early.row

    def postpone(self, until: float) -> None:
        """The value that was to come finds no room."""
        self._desk.postpone(self._remote.comp)
        self.retry_at = until

    def came(self, name: str) -> None:
        """The value that was asked for is there."""
        if self._desk.coming(self._remote.comp).hex() == name:
            self._desk.came(self._remote.comp)

    def failed(self) -> List[int]:
        """It cannot be had, or finds no room. Returns the jobs that waited for it."""
        if not self._desk.coming(self._remote.comp):
            return []
        return [early.row[0] for early in self._desk.failed(self._remote.comp)]


class ClientComputation(NodeUser):
    """A program's computation. The loop's thread."""
    cargo: PackedComputation

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
        # Otherwise nodes are named, and nothing is broadcast
        self.searches = not scheduler.options.nodes
        self.multicast = scheduler.options.multicast
        self.key = key    # the scheduler's own, to nodes
        shared = spec['shared']
        self.comp, self.client, self.name = comp, client.hex(), spec['name']
        self.instance = client
        self.link = 0
        self.digest = result_key(spec)   # of what shows that results are its
        self.directory = directory
        self.reentrant = shared['reentrant']
        self.exclusive = shared['exclusive']
        self.cloudpickle = shared['cloudpickle']
        self.absence = Absence(bool(shared['recovers']), shared['process'])
        # Whether another process may come for the results, see `dispy.Trail`
        self.collected = bool(shared['recovers'] or shared.get('collected'))
        self.specs = specs_of(shared['nodes'])
        self.take_spec(spec)
        roots = {Purpose.DEPENDS: directory, Purpose.PLACED: directory,
                 Purpose.MODULES: directory + MODULES_OF, Purpose.VALUES: directory + VALUES_OF}
        # Jobs that need a value are acknowledged when it is on the disk
        self.receiver = FileReceiver(roots, most, TOO_LARGE, 'at the scheduler: ',
                                     sync=(Purpose.PLACED, Purpose.VALUES))
        os.makedirs(directory + MODULES_OF, mode=0o700, exist_ok=True)
        os.makedirs(directory + VALUES_OF, mode=0o700, exist_ok=True)
        self.values = ClientValues(self, max_values)
        # Rows of files and of modules to be had, and who waits for them.
        self.wanted: Deque[Tuple[list, list, Callable[..., None]]] = collections.deque()
        self.compared: Optional[list] = None      # rows of files that were compared beside the loop
        self.ready = False
        self.questions: List[Tuple[Link, Call]] = []   # that came before its files were there
        self.works: Dict[int, ClientJob] = {}    # by the program's serials
        # The same of jobs that have ended and are not acknowledged, to their numbers
        self.ended: Dict[int, int] = {}
        self.outbox: List[tuple] = []
        self.unread: List[int] = []    # numbers of results that could not be read from the disk
        self.calls: Dict[int, Callable[[tuple, Any], None]] = {}
        # By which link and when it was asked last what is here
        self.told_at = (0, 0.0)
        # Serial of a job that sends a file -> the link that it goes along, and its name.
        self.files: Dict[int, Tuple[int, str]] = {}
        self.given_up_at = math.inf               # when, if its program does not come back
        # When it lets its nodes go, if its program is not back and it has no jobs
        self.rests_at = math.inf
        self.rests = False                        # it has none: only results are kept, as files
        # For monitors: what it is called, since when it is here, whose it is
        self.number = 0
        self.since = 0.0
        self.program = ''
        self.ends = [0, 0, 0]                     # jobs done, failed, cancelled
        # Node -> jobs ended there, seconds that they ran
        self.ended_at: Dict[Any, List[float]] = {}

    def take_spec(self, spec: dict) -> None:
        """What nodes are sent; it has changed after a setup with other files."""
        paths = {row[0]: os.path.join(self.directory, *row[0].split('/')) for row in spec['files']}
        spec = dict(spec,
                    code=bytes(spec['code']),
                    setup_args=bytes(spec['setup_args']),
                    key=digest_of(self.key),
                    support={name: bytes(source)
                             for name, source in spec['support'].items()})
        self.cargo = PackedComputation(spec, paths, spec['kind'] == 'program', lambda:
                           (b'', 'only its program can tell'))

    def remove(self) -> None:
        """Remove its files."""
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.directory + MODULES_OF, ignore_errors=True)
        shutil.rmtree(self.directory + VALUES_OF, ignore_errors=True)

    def send(self, message: Any) -> None:
        """Send a message to the program, if it is connected."""
        link = self._scheduler.links.get(self.link)
        if link is not None:
            self._scheduler.send(link, message)

    def warn(self, text: str) -> None:
        """It is logged here and there."""
        super().warn(text)
        self.send(Notice(self.comp, text))

    def node_unreachable(self, peer: NodeConnection, text: str) -> None:
        """The program is told."""
        self.send(Notice(self.comp, 'node %s cannot be used: %s' % (peer, text)))

    def node_changed(self, status: int, peer: NodeConnection) -> None:
        """The program is told."""
        if self.link in self._scheduler.links and self.comp in peer.uses:
            row = self._scheduler.queries.row_of(*self._scheduler.queries.node_of(self.comp, peer))
            row = row._replace(state='closed' if status == DispyNode.Closed else 'ready')
            self.send(NodeChanged(self.comp, status, tuple(row)))

    def ask_source(self, peer: NodeConnection, link: Link) -> None:
        """The program is asked."""
        self._scheduler.program_calls.ask_source(self, peer, link)

    def ask_allocator(self, allocator: Any, peer: NodeConnection, link: Link) -> None:
        """The program is asked."""
        self._scheduler.program_calls.ask_allocator(self, allocator, peer, link)

    def asked(self, peer: NodeConnection, message: Call) -> None:
        """The program is asked."""
        self._scheduler.program_calls.ask_for_modules(self, peer, message)

    def support_for(self, peer: NodeConnection) -> Dict[str, bytes]:
        """The program has sent it."""
        if peer.facts.get('cloudpickle') == self.cloudpickle:
            return {}
        return self.cargo.spec['support']  # type: ignore[no-any-return]

    def module_source(self, name: str) -> Any:
        """The path of a file of a module, which is here."""
        return os.path.join(self.directory + MODULES_OF, *check_name(name))

    def value_source(self, digest: bytes) -> Any:
        """The path of a value."""
        return self.values.path(digest)

    def send_jobs(self, peer: NodeConnection, works: Sequence[Any]) -> None:
        """Of those that have waited for long the arguments are on the disk. The program is told
        where they are."""
        scheduler = self._scheduler
        rows: List[Tuple[tuple, int]] = []
        unread: List[tuple] = []
        for work in works:
            try:
                payload = work.payload
                if payload is None:
                    payload = scheduler.state.payload(work.serial >> 16)
            except OSError as exc:   # no descriptor is left, or the file has gone
                text = 'its arguments cannot be read at the scheduler: %s' % exc
                reason = text.encode('utf-8', 'replace')
                unread.append((work.serial, int(Outcome.DIED), 0.0, 0.0, reason, b'', b''))
            else:
                rows.append(job_row(work, payload, OF_JOBS))
        for frame in batches(Jobs, self.comp, rows):
            scheduler.send(peer.link, frame)  # type: ignore[arg-type]
        scheduler.state.sent(works, peer.key)
        link = scheduler.links.get(self.link)
        if link is not None:
            node = (peer.ip_addr, peer.port, peer.name)
            scheduler.send(link, JobsAssigned(self.comp, node, [work.client_serial for work in works]))
        if unread:
            scheduler.decide(NodeResults(peer.key, self.comp, unread))

    def jobs_started(self, peer: NodeConnection, pairs: Sequence[Tuple[Any, float]]) -> None:
        """The program is told."""
        self.send(Started(self.comp, [(work.client_serial, ran) for work, ran in pairs]))

    def jobs_ended(self, peer: NodeConnection, pairs: List[Tuple[Any, tuple]]) -> None:
        """They go to the disk and to the program."""
        for work, row in pairs:
            row = (work.client_serial, *row[1:])
            if row[1] not in PROVISIONAL:
                self._scheduler.program_jobs.end(self, work, row, peer.key)
            else:
                self.outbox.append(row)

    def job_ended(self, work: Any, text: str) -> None:
        """The same, without a row of Results."""
        outcome = _OUTCOMES.get(work.state, Outcome.CANCELLED)
        if work in self.absence.dropping:
            self.absence.dropping.discard(work)
            if outcome == Outcome.CANCELLED:
                self._scheduler.program_jobs.drop(self, work)
                return
        self._end(work, outcome, text)

    def fail_job(self, work: Any, text: str) -> None:
        """It is nowhere any more."""
        self._end(work, Outcome.DIED, text)

    def _end(self, work: Any, outcome: Outcome, text: str) -> None:
        row = (work.client_serial, int(outcome), 0.0, 0.0, text.encode('utf-8',
                                                                       'replace'), b'', b'')
        self._scheduler.program_jobs.end(self, work, row)

    def job_waits(self, work: Any) -> None:
        """The program is told."""
        self.files.pop(work.serial, None)
        self._scheduler.state.waits(work)
        self.send(JobsAssigned(self.comp, (), [work.client_serial]))

    def job_parked(self, work: Any, text: str) -> None:
        """The program is told."""
        self.warn('a job waits: %s' % text)

    def job_goes_on(self, work: Any) -> None:
        """The program, which wanted to know whether it has begun, is told."""
        self.absence.dropping.discard(work)
        if work.state in (JobState.RUNNING, JobState.PROVISIONAL):
            self.send(Started(work.comp, [(work.client_serial, self._scheduler.schedule.ran(work))]))

    def output(self, peer: NodeConnection, work: Any, message: Output) -> None:
        """It is passed on as it came."""
        if message.stream == 0:
            log_record_of(message.data)   # raises PeerError
        self.send(message._replace(serial=work.client_serial, data=out_of_band(message.data)))

    def file_piece(self, peer: NodeConnection, work: Any, message: FilePiece) -> None:
        """It is passed on to the program."""
        if message.offset == 0:
            self.files[message.key] = (self.link, message.row[0])
        if message.key not in self.files:
            return   # it was answered already: what is left of it is passed over
        if self.link in self._scheduler.links and self.files[message.key][0] == self.link:
            self.send(message._replace(key=work.client_serial, data=out_of_band(message.data)))
        else:
            del self.files[message.key]
            text = 'the client is not connected'
            self._scheduler.say_to(peer, FileStored(*message[:3], message.row[0], text))

    def jobs_owed(self) -> List[Any]:
        """Jobs that have not ended."""
        return list(self.works.values())


class KeepConnected(NodeUser):
    """The scheduler's own hold on its nodes: it looks and never computes, and they stay
    connected."""
    client = comp = 'house'
    name = 'the scheduler'
    warns = False

    def __init__(self, specs: List[NodeSpec], port: int, options: 'Options') -> None:
        self.specs = specs
        self.port = port
        self.searches = not options.nodes
        self.multicast = options.multicast

    def spec_of(self, peer: NodeConnection) -> Optional[NodeSpec]:
        """A node that knows the secret and has come by itself is one, too."""
        if peer.port:
            return super().spec_of(peer)
        return NodeSpec('*', 0)


def take_state_directory(root: str) -> None:
    """Make the directory of --state-dir, or make sure that it is ours. Raises DispyError,
    OSError."""
    take_own_directory(root, STATE_MARK, ('state.db',), '--state-dir')


def may_dial(host: str, address: str, allowed: Sequence[str]) -> bool:
    """Whether a node may be dialled by its name, or at an address that its name has. Programs name
    nodes; without a bound they could have any host tried out."""
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
    if allowed or found is None:
        return False
    return found.is_private or found.is_loopback or found.is_link_local


def links_of_one() -> int:
    """How many connections of programs one address may have: a quarter of what this process may
    have open."""
    try:
        import resource
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:
        most = 512
    return max(16, (min(most, 1 << 16) - 64) // 4)


def specs_of(rows: Any) -> List[NodeSpec]:
    """`nodes` of a program as it came over the wire; None: all. Raises PeerError."""
    if rows is None:
        return [NodeSpec('*', NODE_PORT)]
    try:
        return [parse_nodes((host, port, cpus), NODE_PORT, True)[0]._replace(allocator=ClientAllocator(number) if number else None)  # type: ignore[arg-type]
                for host, port, cpus, number in rows]
    except (TypeError, ValueError) as exc:
        raise PeerError('nodes: %s' % exc) from exc


class _Session(NamedTuple):
    """A program's link. `operator`: it has the operator's secret."""
    link: Link
    names: List[str]
    operator: bool = True


# --------------------------------------------------------------------------------------------------
# The scheduler
# --------------------------------------------------------------------------------------------------

class Options(NamedTuple):
    """How a scheduler is to be; one field an option of the command line."""
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
    # Programs have a secret of their own, and so has the operator
    separate: bool = False
    operator_secret: bytes = b''
    # Networks and host names with nodes that may be dialled; none: private networks
    allowed: Tuple[str, ...] = ()
    gone: float = GONE_TIME
    cleanup_nodes: bool = False        # nodes remove files, whatever programs say


class Stop(NamedTuple):
    """Posted by a signal."""


class Overview:
    """What monitors ask and order, by a `Call` named 'overview' that speaks of no computation: who
    knows the cluster secret may see and manage everything. Answers are plain values, never more
    than PAGE rows; they cost O(rows) and, of a node, O(CPUs), never O(jobs). Counts, limits and
    releases are of this process: a scheduler that is started again has forgotten them. The loop's
    thread."""

    def __init__(self, scheduler: 'Scheduler') -> None:
        self._scheduler = scheduler
        self._numbers = itertools.count(1)
        self._ended_at: Dict[Any, List[float]] = {}     # of computations that are over, as Remote's
        self._failed = 0
        self._failures: Deque[tuple] = collections.deque(maxlen=FAILURES_KEPT)
        # (node, computation) -> when it was asked what is there
        self._asked: Dict[Tuple[Any, str], float] = {}
        self._reports: Dict[Tuple[Any, str], Tuple[float, Any]] = {}    # -> when it answered, what
        # Nodes that nobody may use -> computations that were told so
        self._released: Dict[Any, Set[str]] = {}
        self._answers: Dict[str, Callable[..., Any]] = {
            'clusters': self._clusters, 'nodes': self._nodes, 'failures': self._failures_since,
            'jobs': self._jobs, 'arguments': self._arguments, 'cancel': self._cancel,
            'cancel_waiting': self._cancel_waiting, 'add': self._add, 'cpus': self._cpus,
            'release': self._release, 'use': self._use
        }

    def answer(self, name: str = '', *args: Any) -> Tuple[float, Any]:
        """Seconds that it took, and the answer. Raises ValueError, TypeError for what makes no
        sense."""
        began = time.perf_counter()
        if name not in self._answers:
            raise ValueError('%.40r cannot be asked of a scheduler' % (name,))
        value = self._answers[name](*args)
        return time.perf_counter() - began, value

    def answer_anybody(self, name: str = '', *args: Any) -> Tuple[float, Any]:
        """As `answer`, to who has not the operator's secret: names and counts of all programs, no
        order, and nothing of their jobs."""
        if name in ('failures', 'jobs'):
            return 0.0, []
        if name not in ('clusters', 'nodes'):
            raise RuntimeError(
                "%.40r needs the operator's secret (--operator-secret-file of the dispyscheduler)" %
                (name, ))
        took, rows = self.answer(name, *args)
        return took, [
            dict(row, comp='', program='') if name == 'clusters' else dict(
                row, uses=[(*use[:2], '', *use[3:]) for use in row['uses']]) for row in rows
        ]

    # -- told by the scheduler ---------------------------------------------------------------------

    def opened(self, remote: ClientComputation) -> None:
        """A computation begins."""
        remote.number = next(self._numbers)
        remote.since = self._scheduler.now

    def ended(self, remote: ClientComputation, work: ClientJob, row: tuple, node: Any) -> None:
        """A job has ended with this row of Results, `node` is where, if it was on one."""
        outcome = row[1]
        if outcome in RETURNED and remote.cargo.is_program:
            exit_status = _exit_status(row)
        else:
            exit_status = 0
        if outcome == Outcome.CANCELLED:
            kind = 2
        else:
            kind = int(outcome not in RETURNED or exit_status != 0)
        remote.ends[kind] += 1
        if node is not None:
            count = remote.ended_at.setdefault(node, [0, 0.0])
            count[0] += 1
            count[1] += row[3] - row[2]
        if kind == 1:
            if len(row[4]) > LAZY:
                payload = row[4]
            else:
                payload = _plain(row[4])
            peer = self._scheduler.nodes.by_key.get(node)
            if exit_status:
                payload = b'exit status %d' % exit_status
            if outcome == Outcome.RAISED and len(payload) >= 4:
                text = unpack_error(payload)[0]
            else:
                text = payload.decode('utf-8', 'replace')
            self._failed += 1
            self._failures.append(
                (self._failed, row[3] or time.time(), remote.number, work.client_serial >> 16,
                 _shown(work.payload), int(_STATE_OF.get(outcome, JobState.TERMINATED)),
                 str(peer) if peer is not None else '', text[-FAILURE_TEXT:]))

    def over(self, remote: ClientComputation) -> None:
        """A computation is over."""
        peers = self._scheduler.nodes.by_key
        for key, (jobs, seconds) in remote.ended_at.items():
            count = self._ended_at.setdefault(key, [0, 0.0])
            count[0] += jobs
            count[1] += seconds
        self._ended_at = {key: count for key, count in self._ended_at.items() if key in peers}
        self._asked = {
            where: at
            for where, at in self._asked.items() if where[0] in peers and where[1] != remote.comp
        }
        self._reports = {
            where: report
            for where, report in self._reports.items() if where in self._asked
        }

    def keeps(self, peer: NodeConnection, comp: str) -> bool:
        """Whether a computation may not be set up at a node because it was released for all."""
        use = peer.uses[comp]
        if comp == 'house' or peer.key not in self._released or use.state is AssignmentState.CLOSED or use.offered:
            return False
        use.move('close')
        use.reason = 'released at the scheduler'
        self._released[peer.key].add(comp)
        return True

    # -- questions ---------------------------------------------------------------------------------

    def _remotes(self) -> List[ClientComputation]:
        return [
            cluster for cluster in self._scheduler.clusters.values() if isinstance(cluster, ClientComputation)
        ]

    def _remote(self, number: int) -> ClientComputation:
        for remote in self._remotes():
            if remote.number == number:
                return remote
        raise ValueError('there is no cluster %.20r' % (number,))

    def _peer(self, key: Any) -> NodeConnection:
        peer = self._scheduler.nodes.by_key.get(key)
        if peer is None:
            raise ValueError('there is no node %.80r' % (key,))
        return peer

    def _clusters(self, first: int, count: int) -> List[dict]:
        now = self._scheduler.now
        rows = []
        for remote in self._remotes()[first:first + min(count, PAGE)]:
            done, failed, cancelled = remote.ends
            rows.append({
                'number': remote.number, 'comp': remote.comp, 'name': remote.name[:200],
                'program': remote.program, 'connected': remote.link in self._scheduler.links,
                'submitted': len(remote.works) + done + failed + cancelled, 'done': done,
                'failed': failed, 'cancelled': cancelled,
                'job_seconds': sum(seconds for _, seconds in remote.ended_at.values()),
                'elapsed': now - remote.since
            })
        return rows

    def _nodes(self, first: int, count: int, asking: bool) -> List[dict]:
        scheduler = self._scheduler
        remotes = self._remotes()
        return [
            self._node(peer, remotes, asking)
            for peer in itertools.islice(scheduler.nodes.by_key.values(), first, first +
                                         min(count, PAGE))
        ]

    def _node(self, peer: NodeConnection, remotes: List[ClientComputation], asking: bool) -> dict:
        scheduler = self._scheduler
        if asking:
            self._ask(peer, 'house', REPORTS_APART)
        report = self._reports.get((peer.key, 'house'))
        free = dict(peer.facts.get('available', {}),
                    **(report[1].available if report is not None else {}))
        running = self._running(peer)
        jobs, seconds = self._ended_at.get(peer.key, (0, 0.0))
        uses = []
        for remote in remotes:
            use = peer.uses.get(remote.comp)
            mine = remote.ended_at.get(peer.key, (0, 0.0))
            jobs = jobs + mine[0]
            seconds = seconds + mine[1]
            if use is not None:
                _, state, reason, cpus, _ = scheduler.queries.node_of(remote.comp, peer)
                there, used = running.get(remote.comp, (0, 0))
                uses.append((remote.number, 'drained' if reason == 'deallocated' else state,
                             reason[-500:], cpus, there, used, *mine))
        state = peer.state_word
        reason = peer.reason
        if peer.key in self._released:
            state = 'closed'
            reason = 'released at the scheduler'
        elif peer.most == 0:
            state = 'drained'
            reason = 'deallocated'
        return {
            'key': peer.key, 'name': peer.name, 'address': peer.ip_addr, 'port': peer.port,
            'state': state, 'reason': reason[-2000:], 'offered': peer.offered,
            'cpus': min(peer.offered,
                        peer.most), 'free': [free.get(name) for name in ('memory', 'disk', 'cpu')],
            'platform': str(peer.facts.get('platform', ''))[:200], 'jobs': jobs,
            'job_seconds': seconds, 'uses': uses,
            'heard': max(0.0,
                         scheduler.clock() - peer.link.heard) if peer.link is not None else None
        }

    def _running(self, peer: NodeConnection) -> Dict[str, Tuple[int, int]]:
        """Computation -> jobs that run on a node and their CPUs."""
        schedule = self._scheduler.schedule
        found = {}
        for comp, serials in schedule.runs(peer.key).items():
            flight = schedule.nodes[peer.key].in_flight[comp]
            found[comp] = len(serials), sum(cpus_of(flight[serial]) for serial in serials)
        return found

    def _ask(self, peer: NodeConnection, comp: str, apart: float) -> None:
        """Ask a node what is there, `apart` s after the last time."""
        now = self._scheduler.now
        if peer.link is None or not peer.name or now - self._asked.get(
            (peer.key, comp), -apart) < apart:
            return
        self._asked[peer.key, comp] = now
        future = peer.answers.get((comp, ''))
        if future is None:
            future = peer.answers[comp, ''] = concurrent.futures.Future()
            self._scheduler.send(peer.link, Query(comp))
        future.add_done_callback(functools.partial(self._reported, (peer.key, comp)))

    def _reported(self, where: Tuple[Any, str], future: Any) -> None:
        if future.exception() is None:
            self._reports[where] = (self._scheduler.now, future.result())

    def _failures_since(self, known: int) -> List[tuple]:
        """The oldest that come after this one: number, time, cluster, job, its arguments, status,
        node, text."""
        return list(
            itertools.islice(
                (row for row in self._failures if row[0] > known or known > self._failed),
                FAILURES_PAGE))

    def _jobs(self, key: Any) -> List[tuple]:
        """Of a node: cluster, job, whether it runs, seconds that it has run or None."""
        peer = self._peer(key)
        schedule = self._scheduler.schedule
        node: Any = schedule.nodes.get(peer.key)
        running: Any = schedule.runs(peer.key)
        rows: List[tuple] = []
        for remote in self._remotes() if node is not None else ():
            flight = node.in_flight.get(remote.comp)
            if not flight:
                continue
            self._ask(peer, remote.comp, 1.0)
            at, report = self._reports.get((peer.key, remote.comp), (0.0, None))
            if report is not None:
                runs = {
                    serial: seconds + self._scheduler.now - at
                    for serial, seconds in report.running
                }
            else:
                runs = {}
            now = self._scheduler.now
            runs.update((serial, now - since) for serial, since in node.begun[remote.comp].items())
            there = set(running.get(remote.comp, ()))
            for serial, work in itertools.islice(flight.items(), PAGE - len(rows)):
                is_on = serial in there or serial in runs
                rows.append((remote.number, work.client_serial, is_on, runs.get(serial)))  # type: ignore[attr-defined]
        return rows

    def _arguments(self, jobs: list) -> list:
        """Of pairs of cluster and job: the packed arguments, how many bytes they are if that is
        much, or None."""
        state: State = self._scheduler.state
        found: List[Any] = []
        for number, serial in jobs[:PAGE]:
            work = next((remote.works.get(serial)
                         for remote in self._remotes() if remote.number == number), None)
            payload: Any = None
            if work is not None:
                try:
                    payload = work.payload or state.payload_size(
                        work.serial >> 16) or state.payload(work.serial >> 16)
                except OSError as exc:
                    logger.debug('arguments of job %d: %s', serial >> 16, exc)   # shown without
            found.append(payload if isinstance(payload, int) else _shown(payload))
        return found

    # -- orders ------------------------------------------------------------------------------------

    def _cancel_works(self, works: List[Any]) -> int:
        for work in works:
            self._scheduler.decide(CancelAsked(work))
        return len(works)

    def _cancel(self, number: int, key: Any, jobs: Any) -> int:
        """Jobs on a node, a list of them or None: all."""
        comp = self._remote(number).comp
        node = self._scheduler.schedule.nodes.get(self._peer(key).key)
        if node is not None:
            there = list(node.in_flight.get(comp, {}).values())
        else:
            there = []
        return self._cancel_works([work for work in there if jobs is None or work.client_serial in jobs])  # type: ignore[attr-defined]

    def _cancel_waiting(self, number: int) -> int:
        """Jobs that have not begun, also those that wait on nodes."""
        return self._scheduler.cancels.cancel_waiting(self._remote(number).comp)

    def _add(self, host: str, port: Optional[int]) -> int:
        """A node for all whose `nodes` mean it."""
        self._scheduler.selection.allocate(
            'house',
            parse_nodes([host if port is None else (host, port)],
                        self._scheduler.clusters['house'].port))
        return 1

    def _cpus(self, key: Any, cpus: int) -> int:
        """CPUs of a node that each computation may use at most; 0: none, which drains it."""
        peer = self._peer(key)
        if type(cpus) is not int or cpus < 0 or cpus > peer.offered > 0:
            raise ValueError('cpus=%.20r: node %s offers %d' % (cpus, peer, peer.offered))
        peer.most = cpus
        self._scheduler.sharing.limit(peer, list(peer.uses))
        return 1

    def _release(self, key: Any) -> int:
        """A node is let go by all computations, those that come too, when their jobs there have
        ended."""
        peer = self._peer(key)
        told = self._released.setdefault(peer.key, set())
        for comp in [
                comp for comp, use in peer.uses.items()
                if comp != 'house' and use.state is not AssignmentState.CLOSED
        ]:
            told.add(comp)
            self._scheduler.selection.leave(comp, peer.key, 'close', False)
        return 1

    def _use(self, key: Any) -> int:
        """A node that was released or drained is used again, with all its CPUs."""
        peer = self._peer(key)
        peer.most = sys.maxsize
        for comp in self._released.pop(peer.key, set()):
            use = peer.uses.get(comp)
            if use is not None and use.state is AssignmentState.CLOSED:
                use.move('open')
                use.reason = ''
                use.allocation = None
                self._scheduler.setup.set_up(peer, comp)
            elif use is not None:
                use.then = ''
        self._scheduler.sharing.limit(peer, list(peer.uses))
        return 1


def _shown(payload: Any) -> Any:
    """Packed arguments as monitors get them: large ones as the number of their bytes."""
    if payload is not None and len(payload) > ARGUMENTS_MOST:
        return len(payload)
    return payload


class Quota:
    """How much each program may have queued here, and what is said to those who have reached it, or
    come while the disk is full: their jobs go back to them, and they are offered no CPUs until
    there is room. The loop's thread."""

    def __init__(self, scheduler: 'Scheduler', most: int) -> None:
        self._scheduler = scheduler
        self._most = most
        # Instance of a program -> bytes of arguments
        self._queued: Dict[bytes, int] = collections.Counter()
        # Links that are offered no CPUs -> instance
        self._waiting: Dict[int, bytes] = {}

    def add(self, remote: ClientComputation, work: ClientJob, size: int) -> None:
        """A job was taken."""
        work.size = BYTES_OVERHEAD + size
        self._queued[remote.instance] += work.size

    def remove(self, remote: ClientComputation, work: ClientJob) -> None:
        """It has ended, or its computation has."""
        self._queued[remote.instance] -= work.size
        work.size = 0
        if not self._queued[remote.instance]:
            del self._queued[remote.instance]

    def moved(self, remote: ClientComputation, instance: bytes) -> None:
        """Another process of the program has taken over."""
        size = sum(work.size for work in remote.works.values())
        self._queued[remote.instance] -= size
        self._queued[instance] += size

    def has_room(self, remote: ClientComputation, size: int) -> bool:
        """Whether one more job with so many bytes may come. One is always taken, however large."""
        queued = self._queued.get(remote.instance, 0)
        return not queued or queued + BYTES_OVERHEAD + size <= self._most

    def give_back(self, link: Link, remote: ClientComputation, serials: List[int], full: bool) -> None:
        """These jobs were not taken. Said at once: while the disk is full, nothing else is."""
        say = self._scheduler.commit.send
        if link.number not in self._waiting:
            self._waiting[link.number] = link.instance
            say(link, CpusChanged(0))
            if full:
                text = 'the disk of the scheduler is full: new jobs wait here until there is room'
            else:
                text = 'this program has %d bytes of arguments at the scheduler, and may have %d there (--max-queued-bytes): more jobs ' 'are taken as those end' % (
                    self._queued.get(remote.instance, 0), self._most)
            say(link, Notice(remote.comp, text))
        for message in in_parts(JobsReturned, remote.comp, serials):
            say(link, message)

    def take_again(self) -> None:
        """The disk has room: those whose program has less than half of what it may have are offered
        CPUs again."""
        for number, instance in list(self._waiting.items()):
            link = self._scheduler.links.get(number)
            if link is None or self._queued.get(instance, 0) <= self._most // 2:
                del self._waiting[number]
                if link is not None:
                    self._scheduler.send(link, CpusChanged(UNLIMITED_CPUS))


class NodeSharing(NodePolicy):
    """Which nodes may be connected to and used, and whom each serves: all computations, or one that
    wants its nodes alone. The loop's thread."""
    start_node = 'Start `python dispynode.py` on a host, with the secret that the scheduler has for nodes, and name it to the scheduler (-n)'

    def __init__(self, scheduler: 'Scheduler') -> None:
        self._scheduler = scheduler
        # ProgramComputations that want their nodes alone, in the order of coming
        self._wanting: List[str] = []
        self._is_due = False             # whom nodes serve may have changed
        self.named: Set[str] = set()     # nodes that the operator has named
        self.port = 0                    # at which programs reach the scheduler

    def introduction(self) -> str:
        """Who this is, for those who run the node and for others who want it."""
        return 'dispyscheduler of %s at port %d' % (super().introduction(), self.port)

    def how_to_share(self, text: str) -> str:
        """Nothing: this shares what it has."""
        return ''

    def addresses_of(self, peer: NodeConnection) -> Optional[Callable[[str], bool]]:
        """Which addresses of a node may be connected to. A dial thread."""
        allowed = self._scheduler.options.allowed
        if peer.host in self.named or may_dial(peer.host, '', allowed):
            return None
        return lambda address: may_dial('', address, allowed)

    def may_set_up(self, peer: NodeConnection, comp: str) -> bool:
        """Not while all jobs of a program that is gone have ended, nor at a node that is released
        for all."""
        remote = self._scheduler.clusters.get(comp)
        if isinstance(remote, ClientComputation) and remote.rests:
            return False
        return not self._scheduler.overview.keeps(peer, comp)

    def node_met(self, peer: NodeConnection) -> None:
        """It is known again after the end of this process."""
        self._scheduler.state.met(peer)

    def becomes_ready(self, peer: NodeConnection, comp: str) -> None:
        """It is decided before what it may use there."""
        self._assign(peer)

    def node_drained(self, peer: NodeConnection) -> None:
        """Another may have waited for that."""
        self._assign(peer)

    def node_freed(self, peer: NodeConnection) -> None:
        """Others may want it."""
        self._is_due = True

    def begins(self, remote: ClientComputation) -> None:
        """A computation begins."""
        if remote.exclusive:
            self._wanting.append(remote.comp)

    def is_over(self, remote: ClientComputation) -> None:
        """A computation is over."""
        if remote.comp in self._wanting:
            self._wanting.remove(remote.comp)
        self._is_due = True

    def look_again(self) -> None:
        """At the end of this turn: a program has come or gone, or has no jobs any more."""
        self._is_due = True

    def assign_all(self) -> None:
        """The end of a turn."""
        if self._is_due:
            self._is_due = False
            for peer in list(self._scheduler.nodes.by_key.values()):
                self._assign(peer)

    def _holds(self, comp: str) -> bool:
        """Whether a computation that wants its nodes alone still has a program or jobs."""
        remote = self._scheduler.clusters.get(comp)
        if not isinstance(remote, ClientComputation):
            return False
        return remote.link in self._scheduler.links or bool(remote.works)

    def _assign(self, peer: NodeConnection) -> None:
        """Whom a node serves: the first computation that wants it alone, when jobs of the others
        have ended there; or all."""
        owner = next((comp for comp in self._wanting if comp in peer.uses
                      and peer.uses[comp].state is not AssignmentState.CLOSED and self._holds(comp)), '')
        node = self._scheduler.schedule.nodes.get(peer.key)
        others = owner and node is not None and any(
            flight for comp, flight in node.in_flight.items() if comp != owner)
        blocked = {comp for comp in peer.uses if owner and (comp != owner or others)}
        changed = blocked ^ peer.blocked
        peer.blocked = blocked
        self.limit(peer, changed)

    def limit(self, peer: NodeConnection, comps: Iterable[str]) -> None:
        """What computations may use of a node has changed."""
        for comp in comps:
            use = peer.uses.get(comp)
            if use is not None and use.state is AssignmentState.READY and not use.then:
                cpus = self._scheduler.selection.tell_limit(peer, comp)
                if cpus:
                    self._scheduler.decide(NodeOffers(peer.key, comp, cpus))
                else:
                    self._scheduler.decide(NodeDrains(peer.key, comp))


class Commit:
    """Nothing leaves before the transaction of its turn is on the disk. While the disk takes none,
    nodes are not read. The loop's thread."""

    def __init__(self, scheduler: 'Scheduler', send: Callable[[Link, Any], None]) -> None:
        self._scheduler = scheduler
        self.send = send       # a message at once, whatever becomes of the transaction
        # Messages that wait for the transaction of this turn
        self.later: List[Tuple[Link, Any]] = []
        self.stuck_until: Optional[float] = None     # the disk does not take transactions

    def write_down(self) -> bool:
        """What has happened goes to the disk, and then what was said about it."""
        done = self._scheduler.state.commit()
        if done:
            later = self.later
            self.later = []
            for link, message in later:
                self.send(link, message)
        return done

    def stick(self) -> None:
        """The disk does not take the transaction: it is tried again after a while."""
        # Results of nodes wait there; programs are read: what they end makes room
        if self.stuck_until is None:
            for link in self._links_of_nodes():
                link.paused = True
                self._scheduler.interest(link)
        self.stuck_until = self._scheduler.now + RETRY_TIME

    def unstick(self) -> None:
        """It has taken one: nodes are read again."""
        if self.stuck_until is not None:
            self.stuck_until = None
            for link in self._links_of_nodes():
                link.paused = False
                link.heard = self._scheduler.now
                self._scheduler.interest(link)

    def _links_of_nodes(self) -> List[Link]:
        return [
            link for link in self._scheduler.links.values()
            if link.number not in self._scheduler.programs.sessions
        ]


class ProgramLinks:
    """The programs that are connected, and what they say. The loop's thread."""

    def __init__(self, scheduler: 'Scheduler') -> None:
        self._scheduler = scheduler
        self.sessions: Dict[int, _Session] = {}      # by the numbers of their links
        self.messages: Dict[type, Callable[[Link, Any], None]] = {   # and those of the other parts
            ClientHello: self._c_introduce, Limit: lambda link, message: None,
            Query: lambda link, message: None, Shutdown: lambda link, message: None,
            Pulse: lambda link, message: None
        }

    def program_came(self, event: Authenticated) -> None:
        """A program has connected."""
        link = Link(event.sock, event.session, event.address, self._scheduler.now,
                    self._scheduler.options.pulse, OF_CLIENTS)
        self._scheduler.attach(link)
        self.sessions[link.number] = _Session(
            link, [event.address], not self._scheduler.options.separate
            or event.session.secret == 1)
        self._bound_links(link)

    def _bound_links(self, link: Link) -> None:
        """One host's programs may not take all descriptors."""
        there = sum(1 for session in self.sessions.values() if session.link.address == link.address)
        most = links_of_one()
        if there > most:
            logger.error(
                '%s has %d connections, and the limit for one address is %d: the last is ended',
                link.address, there, most)
            self._scheduler.disconnect(
                link,
                'there are %d connections from this address, and the limit is %d' % (there, most))
            self.sessions.pop(link.number, None)

    def bound_answers(self) -> None:
        """Who does not read its answers is not read from until it has."""
        for number, session in self.sessions.items():
            link = session.link
            queued = link.queued - link.unmade   # what is to go in parts lies on the disk
            slow = queued > BACKPRESSURE_BYTES
            if link.dirty is not None and link.paused != slow and (slow
                                                                   or queued <= BACKPRESSURE_BYTES // 2):
                link.paused = slow
                link.heard = self._scheduler.now
                self._scheduler.interest(link)

    def take_messages(self, channel: Link) -> None:
        """A program has said something."""
        for message in channel.messages(self._scheduler.now):
            if type(message) is Bye:
                channel.on_purpose = True
                raise LinkBroken('bye: %s' % message.text[:200])
            if type(message) is Wrong:
                self._refused_results(channel, message)
            handler = self.messages.get(type(message))
            if handler is None:
                raise PeerError('%s may not come here' % type(message).__name__)
            try:
                handler(channel, message)
            except (LinkBroken, PeerError, OSError):
                raise
            except Exception as exc:  # what no honest program says ends its link and nothing else
                logger.exception('%s of %s',
                                 type(message).__name__, self.sessions[channel.number].names[0])
                raise PeerError('%s cannot be understood: %s' %
                                (type(message).__name__, exc)) from exc

    def _refused_results(self, link: Link, message: Wrong) -> None:
        """A program cannot use what was sent: after a few times a text takes the place of a result
        that was in it."""
        for comp, serial in self._scheduler.refusals.refused(link, message.frame):
            remote = self.computation_of(link, comp)
            if remote is not None and serial in remote.ended:
                numbers = [remote.ended[serial]]
            else:
                numbers = []
            for number, row in zip(numbers, self._scheduler.state.results(numbers, [])):
                self._scheduler.state.ended(
                    number,
                    refused_row(
                        row, 'the program could not take the result: ' + message.text[:NAME_MOST]))
        raise LinkBroken('it cannot use what was sent: %s' % message.text[:NAME_MOST])

    def program_gone(self, channel: Link, text: str) -> None:
        """The link of a program came to its end."""
        session = self.sessions.pop(channel.number)
        logger.log(logging.INFO if channel.on_purpose else logging.WARNING,
                   'the link of %s ended: %s', session.names[0], text)
        for remote in [
                remote for remote in (*self._scheduler.clusters.values(),
                                      *self._scheduler.computations.unopened.values())
                if isinstance(remote, ClientComputation) and remote.link == channel.number
        ]:
            self._scheduler.computations.program_gone(remote)
            if channel.on_purpose:
                self._scheduler.computations.end(remote)

    def computation_of(self, link: Link, comp: str) -> Optional[ClientComputation]:
        """The computation a message speaks of, which must be of this link. None for one that has
        ended here."""
        remote = self._scheduler.clusters.get(comp)
        if isinstance(remote, ClientComputation) and remote.link != link.number:
            raise PeerError('computation %.40r is of another program' % comp)
        if isinstance(remote, ClientComputation):
            return remote
        return None

    def _c_introduce(self, link: Link, message: ClientHello) -> None:
        self._scheduler.set_pulse(link, min(max(message.pulse, 0.1), 3600.0))
        self.sessions[link.number].names[0] = message.name[:200]
        facts = {
            'python': tuple(sys.version_info[:3]), 'dispy': __version__, 'role': 'scheduler',
            'memory': self._scheduler.instance.hex()
        }
        self._scheduler.send(link, NodeHello('dispyscheduler', UNLIMITED_CPUS, facts))


class ProgramComputations:
    """ProgramComputations of programs: they begin, lose their programs, get them back, and end. The
    loop's thread."""

    def __init__(self, scheduler: 'Scheduler') -> None:
        self._scheduler = scheduler
        self.unopened: Dict[str, ClientComputation] = {}        # those whose files are on their way

    def make(self, comp: str, client: bytes, spec: dict) -> ClientComputation:
        """A computation that is not open yet. Raises PeerError, OSError."""
        most = self._scheduler.options.max_file_size
        return ClientComputation(self._scheduler, comp, client, spec, self._directory_of(comp), most,
                      self._scheduler.state.key_of(comp), self._scheduler.options.max_queued)

    def _directory_of(self, comp: str) -> str:
        if not comp or not is_comp(comp) or comp == KeepConnected.comp:
            raise PeerError('a computation may not be called %.70r' % comp)
        path = os.path.join(self._scheduler.state.root, 'c-' + comp)
        os.makedirs(path, mode=0o700, exist_ok=True)
        return path

    def on_compute(self, link: Link, message: Compute) -> None:
        """A program begins a computation, or is back and goes on with it."""
        remote = self._scheduler.clusters.get(message.comp)
        if isinstance(remote, ClientComputation):
            if remote.instance != link.instance or not hmac.compare_digest(
                    remote.digest, result_key(message.spec)):
                self._scheduler.send(link, Refused(message.comp, 'busy', 'it is of another program'))
                return
            if remote.link in self._scheduler.links and remote.link != link.number:
                self._scheduler.break_link(self._scheduler.links[remote.link],
                                           'its program has connected anew')
            again = remote.link == link.number   # a Reclaim on this link was answered
            self._came_back(remote, link)
            if remote.ready and remote.told_at == (link.number, self._scheduler.now):
                return   # it asks again and again in one breath; the answer may be long
            if remote.ready:
                remote.told_at = (link.number, self._scheduler.now)
                self._send_again(remote, link)
                self._scheduler.send(link, Ready(message.comp, [*remote.works, *remote.ended]))
                if not again:
                    self._scheduler.program_jobs.resend(remote)
                # Perhaps because its program could not be asked
                for peer in self._scheduler.nodes.of(message.comp):
                    if peer.uses[message.comp].state is AssignmentState.REFUSED:
                        self._scheduler.setup.set_up(peer, message.comp)
                return
        else:
            if type(message.spec.get('shared')) is not dict or set(message.spec['shared']) != {
                    'nodes', 'reentrant', 'exclusive', 'cloudpickle', 'recovers', 'process',
                    'collected'
            }:
                raise PeerError('a computation that is not for a scheduler')
            if len(message.spec['shared']['nodes'] or ()) > SPECS_MOST:
                raise PeerError('%d nodes are named, and the limit is %d' %
                                (len(message.spec['shared']['nodes']), SPECS_MOST))
            own = sum(1 for each in (*self._scheduler.clusters.values(), *self.unopened.values())
                      if isinstance(each, ClientComputation) and each.instance == link.instance)
            if own >= COMPS_MOST or self._scheduler.commit.stuck_until is not None:
                self._scheduler.send(
                    link,
                    Refused(
                        message.comp, 'busy',
                        'the disk of the scheduler is full' if own < COMPS_MOST else
                        'this program has %d computations here, and the limit is %d' %
                        (own, COMPS_MOST)))
                return
            if message.comp in self.unopened:
                raise PeerError('computation %.40r is of another program' % message.comp)
            if self._scheduler.options.cleanup_nodes:
                message.spec['cleanup'] = True
            remote = self.make(message.comp, link.instance, message.spec)
            self._came_back(remote, link)
            self.unopened[message.comp] = remote
        spec = remote.cargo.spec
        then = functools.partial(self._complete, remote)
        self._scheduler.program_files.want(remote, spec['files'], spec['modules'], then)

    def _came_back(self, remote: ClientComputation, link: Link) -> None:
        if remote.instance != link.instance:
            self._scheduler.quota.moved(remote, link.instance)
            remote.instance = link.instance
        # Otherwise what has come since the answer to Reclaim would be lost
        if remote.link != link.number:
            remote.outbox = []
        remote.link = link.number
        remote.given_up_at = math.inf
        remote.program = self._scheduler.programs.sessions[link.number].names[0]
        remote.rests_at = math.inf
        self._scheduler.sharing.look_again()
        if remote.rests:
            remote.rests = False
            self._scheduler.selection.use(remote.comp, remote.specs)
        absence = remote.absence
        absence.end()
        for work in absence.dropping:   # not answered yet: they wait again
            self._scheduler.schedule.keep(work)
        absence.dropping.clear()

    def _complete(self, remote: ClientComputation, error: str, code: str = 'transfer') -> None:
        """All files of a new computation are there, or cannot be."""
        link = self._scheduler.links.get(remote.link)
        if error:
            self.unopened.pop(remote.comp, None)
            remote.remove()
            if link is not None:
                self._scheduler.send(link, Refused(remote.comp, code, error))
            self._scheduler.program_calls.answer_early(remote)
            return
        if self.unopened.pop(remote.comp, None) is None:
            return
        remote.ready = True
        self._scheduler.state.began(remote)
        self.open(remote)
        if link is not None:
            self._scheduler.send(
                link, Ready(remote.comp, [],
                            self._scheduler.state.past(remote.comp).row()))
        self._scheduler.program_calls.answer_early(remote)

    def open(self, remote: ClientComputation) -> None:
        """Begin to use nodes for a computation whose files are here."""
        self._scheduler.overview.opened(remote)
        self._scheduler.sharing.begins(remote)
        self._scheduler.open(remote, False)
        logger.info('%s: begins%s', remote.name,
                    ', and wants its nodes alone' if remote.exclusive else '')

    def on_reclaim(self, link: Link, message: Reclaim) -> None:
        """Another process asks for what is here of a computation."""
        remote = self._scheduler.clusters.get(message.comp)
        if not isinstance(remote, ClientComputation):
            self._scheduler.send(
                link, KnownAttempts(message.comp, [],
                           self._scheduler.state.past(message.comp).row()))
            return
        if not may_reclaim(remote.digest, message.key):
            logger.warning('%s wants results of a computation and does not have its key',
                           self._scheduler.programs.sessions[link.number].names[0])
            self._scheduler.send(link, KnownAttempts(message.comp, [], AttemptHistory(whole=False).row()))
            return
        if remote.link in self._scheduler.links and remote.link != link.number:
            self._scheduler.send(link, Refused(message.comp, 'busy', 'its program is connected'))
            return
        if not message.take:
            self._scheduler.send(
                link, KnownAttempts(message.comp, [*remote.works, *remote.ended, *remote.absence.dropped]))
            return
        # The program itself sends these again
        if remote.instance != link.instance:
            dropped = remote.absence.dropped
        else:
            dropped = {}
        self._came_back(remote, link)
        text = (
            b'cancelled: it had not begun when its program was gone, and the scheduler did not '
            b'wait any longer (--gone-after)')
        for serial, number in dropped.items():
            self._scheduler.state.ended(number,
                                        (serial, int(Outcome.CANCELLED), 0.0, 0.0, text, b'', b''))
        remote.ended.update(dropped)
        dropped.clear()
        self._scheduler.state.commit()   # from where they are sent now
        self._scheduler.send(link, KnownAttempts(message.comp, [*remote.works, *remote.ended]))
        self._scheduler.program_jobs.resend(remote)

    def _send_again(self, remote: ClientComputation, link: Link) -> None:
        """A program is back that was taken for gone."""
        dropped = remote.absence.dropped
        if dropped:
            self._scheduler.state.removed(list(dropped.values()))
            self._scheduler.send(
                link,
                Notice(remote.comp, (
                    'the scheduler has heard nothing of this program for a while and has cancelled '
                    '%d jobs that had not begun (--gone-after); they are sent '
                    'again' % len(dropped))))
            dropped.clear()

    def program_gone(self, remote: ClientComputation) -> None:
        """It goes on for a while without its program."""
        remote.link = 0
        remote.given_up_at = self._scheduler.now + self._scheduler.options.zombie
        remote.rests_at = self._scheduler.now + ORPHAN_TIME
        remote.absence.begin(self._scheduler.now, self._scheduler.options.gone)
        for call in list(remote.calls.values()):
            call(('RuntimeError', 'its program is not connected'), None)
        remote.calls.clear()
        remote.receiver.abort()
        remote.values.interrupt()
        while remote.wanted:
            remote.wanted.popleft()[-1]('its program is not connected')
        self._scheduler.program_files.end_files(remote)
        self._scheduler.sharing.look_again()

    def _drop_waiting(self, remote: ClientComputation) -> None:
        """A program is gone: what has not begun is cancelled, what runs goes on to its end."""
        self._scheduler.jobs.take_submitted()
        absence = remote.absence
        known = self._scheduler.schedule.comps.get(remote.comp)
        if known is None:
            return
        works = known.not_begun()
        absence.dropping.update(works)
        if works:
            logger.warning('%s: its program is gone; its %d jobs that have not begun are cancelled '
                           '(--gone-after)', remote.name, len(works))
        self._scheduler.decide(WithdrawAsked(works))

    def _rest(self, remote: ClientComputation) -> None:
        """All that a program which is gone may still collect has ended: its nodes are let go, their
        processes and files too."""
        if not remote.ended or (remote.absence.for_good and not remote.collected):
            logger.info('%s: its program is gone, and nothing is left for it', remote.name)
            self.end(remote)
            return
        if remote.rests:
            return
        logger.info('%s: its program is gone; %d results wait for it', remote.name,
                    len(remote.ended))
        remote.rests = True
        for peer in self._scheduler.nodes.of(remote.comp):
            self._scheduler.selection.done(peer, remote.comp)
            self._scheduler.decide(NodeLeft(peer.key, remote.comp, str(peer),
                                            'its program is gone'))
            del peer.uses[remote.comp]
            self._scheduler.selection.drop_unused(peer)
        self._scheduler.sharing.look_again()

    def end_turn_of(self, remote: ClientComputation) -> None:
        """Results to its program; what becomes of it while that is away."""
        link = self._scheduler.links.get(remote.link)
        # They wait on the disk until it has room
        if remote.outbox and link is not None and link.queued - link.unmade >= 4 * BATCH_BYTES:
            ended = [remote.ended[row[0]] for row in remote.outbox if row[1] not in PROVISIONAL]
            self._scheduler.program_jobs.send_ended(remote, ended)
            remote.outbox = [row for row in remote.outbox if row[1] in PROVISIONAL]
        if self._scheduler.now >= remote.values.retry_at:
            remote.values.retry_at = math.inf
            if link is not None:
                self._scheduler.program_files.serve_values(link, remote)
        if remote.outbox and link is not None:
            for frame in batches(Results, remote.comp, map(with_size, remote.outbox)):
                self._scheduler.send(link, frame)
        remote.outbox = []
        if self._scheduler.now >= remote.absence.look_at and remote.absence.is_over(
                self._scheduler.now):
            self._drop_waiting(remote)
        if self._scheduler.now >= remote.rests_at and link is None and not remote.works:
            self._rest(remote)
        if self._scheduler.now >= remote.given_up_at and link is None and not remote.works:
            logger.warning('%s: its program has not come back: %d results are given up',
                           remote.name, len(remote.ended))
            if remote.ended:
                self._scheduler.state.gave_up(
                    remote.comp, list(remote.ended),
                    'the scheduler gave up its result after %g s (--zombie-interval)' %
                    self._scheduler.options.zombie)
            self.end(remote)

    def timers(self) -> List[float]:
        """When there is something to do for computations."""
        given_up = [
            remote.given_up_at if remote.rests else min(remote.rests_at, remote.given_up_at)
            for remote in self._scheduler.clusters.values() if isinstance(remote, ClientComputation)
            and remote.link not in self._scheduler.links and not remote.works
        ]
        if self._scheduler.program_jobs.unread_until < math.inf:
            given_up.append(self._scheduler.program_jobs.unread_until)
        looks = [
            min(remote.absence.look_at, remote.values.retry_at)
            for remote in self._scheduler.clusters.values() if isinstance(remote, ClientComputation)
        ]
        return given_up + [when for when in looks if when < math.inf]

    def on_done(self, link: Link, message: Done) -> None:
        """A program has ended a computation."""
        remote = self.unopened.get(message.comp) or self._scheduler.programs.computation_of(
            link, message.comp)
        if remote is not None and remote.link == link.number:
            self.unopened.pop(message.comp, None)
            self.end(remote)
            self._scheduler.program_calls.answer_early(remote)
        self._scheduler.state.note(self._scheduler.state.PAST_OVER, message.comp)

    def end(self, remote: ClientComputation) -> None:
        """A computation ends: jobs of it too, on nodes and on the disk."""
        comp = remote.comp
        if comp in self._scheduler.clusters:
            self._scheduler.forget(comp)
            self._scheduler.overview.over(remote)
            self._scheduler.state.over(comp)
            self._scheduler.state.removed([*remote.ended.values(), *remote.absence.dropped.values(),
                                 *(work.serial >> 16 for work in remote.works.values())])
            logger.info('%s: is over', remote.name)
        self._scheduler.program_jobs.forget(remote)
        remote.receiver.abort()
        remote.remove()
        self._scheduler.sharing.is_over(remote)
        self._scheduler.soon()


class ProgramFiles:
    """Files and values that programs send, and where files of jobs that run are on their way to
    them. The loop's thread."""

    def __init__(self, scheduler: 'Scheduler') -> None:
        self._scheduler = scheduler

    def want(self, remote: ClientComputation, files: list, modules: list,
              then: Callable[..., None]) -> None:
        """Ask the program for files that are not here; `then` is called when all are, or with what
        went wrong and its code (of REASONS)."""
        remote.wanted.append((files, modules, then))
        if len(remote.wanted) == 1:
            self._want_next(remote)

    def _want_next(self, remote: ClientComputation) -> None:
        while remote.wanted:
            files, modules, then = remote.wanted[0]
            unknown = Digests.unknown(remote.directory, files)
            # Large files are there: others do not wait while they are digested
            if unknown and remote.compared is not files:
                remote.compared = files
                self._scheduler.openers.run(self._compare, remote, unknown)
                return
            try:
                missing = remote.receiver.want(Purpose.DEPENDS, files)
                missing += remote.receiver.want(Purpose.MODULES, modules)
            except (OSError, ValueError) as exc:
                remote.wanted.popleft()
                then('files cannot be stored at the scheduler: %s' % exc, reason_of(exc))
                continue
            if missing:
                link = self._scheduler.links.get(remote.link)
                for need in needs(remote.comp, missing) if link is not None else ():
                    self._scheduler.send(link, need)  # type: ignore[arg-type]
                return
            remote.wanted.popleft()
            then('')

    def _compare(self, remote: ClientComputation, paths: Sequence[str]) -> None:
        """An opener."""
        Digests.learn(paths)
        self._scheduler.call_soon(self._want_next, remote)

    def on_file_piece(self, link: Link, message: FilePiece) -> None:
        """Files for nodes come here first."""
        remote = self._scheduler.computations.unopened.get(
            message.comp) or self._scheduler.programs.computation_of(link, message.comp)
        if message.purpose == Purpose.FROM_JOB:
            raise PeerError('a file that was not asked for')
        if remote is None or remote.link != link.number or (message.purpose in FOR_CODE
                                                            and not remote.wanted):
            return
        stored = remote.receiver.take(message)
        if stored is None:
            return
        if message.purpose == Purpose.VALUES:
            self._value_stored(link, remote, stored)
        elif message.purpose not in ASKED_FOR:
            self._scheduler.send(link, stored)
        elif stored.error or not remote.receiver.wants(*FOR_CODE):
            then = remote.wanted.popleft()[-1]
            then(stored.error, remote.receiver.code)
            self._want_next(remote)

    def _value_stored(self, link: Link, remote: ClientComputation, stored: FileStored) -> None:
        """A value that jobs wait for is here, or cannot be."""
        if not stored.error:
            remote.values.came(stored.name)
            remote.values.told = False
        elif remote.receiver.code == 'room':
            self._no_room(link, remote, stored.error)
            return
        else:
            self._without_values(link, remote, stored.error)
        self.serve_values(link, remote)

    def _without_values(self, link: Link, remote: ClientComputation, error: str) -> None:
        """Jobs that need a value which cannot be had."""
        for serial in remote.values.failed():
            text = 'a value in the arguments cannot be taken at the scheduler: %s' % error
            row = (serial, int(Outcome.RAISED), 0.0, 0.0, pack_error(text, None), b'', b'')
            self._scheduler.send(link, Results(remote.comp, [row]))

    def serve_values(self, link: Link, remote: ClientComputation) -> None:
        """Take the jobs whose values are here, and ask for what others need."""
        rows, missing, error = remote.values.serve()
        for need in needs(remote.comp, missing):
            self._scheduler.send(link, need)
        if error:
            self._no_room(link, remote, error)
        self._scheduler.program_jobs.take_jobs(link, remote, rows, admitted=True)

    def _no_room(self, link: Link, remote: ClientComputation, error: str) -> None:
        """The jobs that need a value wait until there is room for it."""
        remote.values.postpone(self._scheduler.now + RETRY_TIME)
        if not remote.values.told:
            remote.values.told = True
            text = 'a value that jobs need finds no room at the scheduler: %s; they wait until it does' % error
            logger.error('%s: %s', remote.name, text)
            self._scheduler.send(link, Notice(remote.comp, text))

    def done_with_values(self, remote: ClientComputation, work: ClientJob) -> None:
        """Jobs that waited for room may have it."""
        remote.values.release(work)
        link = self._scheduler.links.get(remote.link)
        if link is not None:
            self.serve_values(link, remote)

    def on_file_stored(self, link: Link, message: FileStored) -> None:
        """A file of a job is at its program, or cannot be; or a value is not to be had there."""
        remote = self._scheduler.programs.computation_of(link, message.comp)
        if message.purpose == Purpose.VALUES and remote is not None:
            if message.error:
                self._without_values(link, remote, message.error)
            return
        if remote is not None:
            work = remote.works.get(message.key)
        else:
            work = None
        if remote is None or work is None or remote.files.pop(work.serial, None) is None:
            return
        peer = self._peer_of(work)
        if peer is not None:
            self._scheduler.say_to(peer, message._replace(key=work.serial))

    def _peer_of(self, work: ClientJob) -> Optional[NodeConnection]:
        known = self._scheduler.schedule.comps.get(work.comp)
        if known is not None:
            node = known.running.get(work.serial)
        else:
            node = None
        if node is not None:
            return self._scheduler.nodes.by_key.get(node.key)
        return None

    def end_files(self, remote: ClientComputation) -> None:
        """The connection to a program has ended while its jobs sent files."""
        known = self._scheduler.schedule.comps.get(remote.comp)
        for serial, (_, name) in remote.files.items():
            if known is not None:
                node = known.running.get(serial)
            else:
                node = None
            if node is not None:
                peer = self._scheduler.nodes.by_key.get(node.key)
            else:
                peer = None
            if peer is not None:
                self._scheduler.say_to(
                    peer,
                    FileStored(remote.comp, int(Purpose.FROM_JOB), serial, name,
                               'the connection to the client has ended'))
        remote.files.clear()

    def bring_modules(self, remote: ClientComputation, rows: list) -> None:
        """Files of modules that arguments of later jobs need: nodes that are set up from now on get
        them at once."""
        known = {row[0] for row in remote.cargo.spec['modules']}
        more = [row for row in rows if row[0] not in known]
        if more:
            remote.take_spec(dict(remote.cargo.spec, modules=remote.cargo.spec['modules'] + more))
            self._scheduler.state.began(remote)

    def change_files(self, remote: ClientComputation, rows: list, then: Callable[..., None]) -> None:
        def complete(error: str, code: str = '') -> None:
            if not error:
                remote.take_spec(dict(remote.cargo.spec, files=rows))
                self._scheduler.state.began(remote)
            then(error)
        self.want(remote, rows, [], complete)


class ProgramJobs:
    """Jobs that programs submit, and their results, which are on the disk. The loop's thread."""

    def __init__(self, scheduler: 'Scheduler') -> None:
        self._scheduler = scheduler
        # Results that wait for room in the links of programs
        self.backlog = SpoolSender(scheduler.links)
        self._kept = 0                               # bytes of waiting jobs' arguments in memory
        self.unread_until = math.inf                 # when results are read that could not be

    def on_jobs(self, link: Link, message: Jobs) -> None:
        """A program submits jobs."""
        remote = self._scheduler.programs.computation_of(link, message.comp)
        if remote is None:
            return
        if len(message.rows) == 1:
            unfit = over_limit_here(message, self._scheduler.values.where)
            if unfit is not None:
                self.on_unfit(link, unfit)
                return
        self.take_jobs(link, remote, message.rows)

    def take_jobs(self,
                  link: Link,
                  remote: ClientComputation,
                  rows: Sequence[tuple],
                  admitted: bool = False) -> None:
        """Note jobs and hand them to the Schedule; `admitted`: the values that they need are
        here."""
        back: List[int] = []
        lacking = False
        for row in rows:
            serial, payload, options = row
            if serial in remote.works or serial in remote.ended:
                continue   # it came before
            if options and 'values' in options and not admitted and not remote.values.admit(row):
                lacking = True
                continue
            if self._scheduler.commit.stuck_until is not None or not self._scheduler.quota.has_room(
                    remote, size_of(payload)):
                back.append(serial)
                continue
            self._scheduler.state.number += 1
            if len(payload) <= LAZY or type(payload) is tuple:
                payload = _plain(payload)
            work = ClientJob(remote.comp, None, options, self._scheduler.state.number << 16,
                              serial)
            if work.values:
                remote.values.took(work)
            self._scheduler.state.submitted(work, payload)
            if self._kept < IN_MEMORY and len(payload) < FILE_BYTES:
                work.payload = payload
                self._kept += BYTES_OVERHEAD + len(payload)
            remote.works[serial] = work
            self._scheduler.quota.add(remote, work, len(payload))
            self._scheduler.jobs.submitted.append(work)  # type: ignore[arg-type]
        if back:
            self._scheduler.quota.give_back(link, remote, back, self._scheduler.commit.stuck_until
                                            is not None)
        if lacking:
            self._scheduler.program_files.serve_values(link, remote)

    def on_unfit(self, link: Link, message: Unfit) -> None:
        """A job whose arguments find no room here. Its program is told, and it is forgotten."""
        remote = self._scheduler.programs.computation_of(link, message.comp)
        serial = message.row[0]
        if remote is not None and serial not in remote.works and serial not in remote.ended:
            self._scheduler.send(link, Results(message.comp, [unfit_row(message)]))

    def on_cancel(self, link: Link, message: Cancel) -> None:
        """A program wants jobs to end."""
        remote = self._scheduler.programs.computation_of(link, message.comp)
        self._scheduler.jobs.take_submitted()
        self._cancel_early(link, remote, message.serials)
        for work in [remote.works[serial] for serial in message.serials
                     if serial in remote.works] if remote is not None else ():
            self._scheduler.decide(CancelAsked(work))

    def _cancel_early(self, link: Link, remote: Optional[ClientComputation], serials: Sequence[int]) -> None:
        """End those of these jobs that are not taken yet."""
        for serial in remote.values.leave(serials) if remote is not None else ():
            text = b'cancelled before it started'
            row = (serial, int(Outcome.CANCELLED), 0.0, 0.0, text, b'', b'')
            self._scheduler.send(link, Results(remote.comp, [row]))  # type: ignore[union-attr]

    def on_recall(self, link: Link, message: ReturnJobs) -> None:
        """Jobs that shall be cancelled if they have not begun."""
        remote = self._scheduler.programs.computation_of(link, message.comp)
        self._scheduler.jobs.take_submitted()
        self._cancel_early(link, remote, message.serials)
        if remote is not None:
            works = [remote.works[serial] for serial in message.serials if serial in remote.works]
            self._scheduler.decide(WithdrawAsked(works))

    def on_ack(self, link: Link, message: Ack) -> None:
        """A program has results."""
        remote = self._scheduler.programs.computation_of(link, message.comp)
        if remote is not None:
            self._scheduler.state.removed(
                [remote.ended.pop(serial) for serial in message.serials if serial in remote.ended])

    def end(self, remote: ClientComputation, work: ClientJob, row: tuple, node: Any = None) -> None:
        """A job has ended with this row of Results, `node` is where, if it was on one."""
        number = work.serial >> 16
        if remote.works.pop(work.client_serial, None) is None:
            return
        self._scheduler.overview.ended(remote, work, row, node)
        self._scheduler.quota.remove(remote, work)
        if work.values:
            self._scheduler.program_files.done_with_values(remote, work)
        if work.payload is not None:
            self._kept -= BYTES_OVERHEAD + len(work.payload)
        remote.files.pop(work.serial, None)
        if remote.exclusive and not remote.works:
            self._scheduler.sharing.look_again()
        self._scheduler.state.ended(number, row)
        remote.ended[work.client_serial] = number
        remote.outbox.append(row)

    def drop(self, remote: ClientComputation, work: ClientJob) -> None:
        """One of these jobs has been cancelled."""
        number = work.serial >> 16
        if remote.works.pop(work.client_serial, None) is None:
            return
        self._scheduler.quota.remove(remote, work)
        remote.values.release(work)
        remote.absence.dropped[work.client_serial] = number
        remote.ends[2] += 1
        if work.payload is not None:
            self._kept -= BYTES_OVERHEAD + len(work.payload)
        self._scheduler.state.dropped(number)
        if remote.exclusive:
            self._scheduler.sharing.look_again()

    def forget(self, remote: ClientComputation) -> None:
        """A computation is over."""
        self._kept -= sum(BYTES_OVERHEAD + len(work.payload) for work in remote.works.values()
                          if work.payload is not None)
        for work in remote.works.values():
            self._scheduler.quota.remove(remote, work)
        remote.works.clear()

    def resend(self, remote: ClientComputation) -> None:
        """What its program has not acknowledged, and where its jobs are."""
        remote.unread.clear()
        self.send_ended(remote, list(remote.ended.values()))
        known = self._scheduler.schedule.comps.get(remote.comp)
        for node in known.nodes.values() if known is not None else ():
            serials = [work.client_serial for work in node.in_flight[remote.comp].values()]  # type: ignore[attr-defined]
            peer = self._scheduler.nodes.by_key.get(node.key)
            if serials and peer is not None:
                self._scheduler.send(
                    self._scheduler.links[remote.link],
                    JobsAssigned(remote.comp, (peer.ip_addr, peer.port, peer.name), serials))
            rows = [(node.in_flight[remote.comp][serial].client_serial, self._scheduler.now - since)  # type: ignore[attr-defined]
                    for serial, since in node.begun[remote.comp].items()]
            if rows:
                self._scheduler.send(self._scheduler.links[remote.link], Started(remote.comp, rows))

    def send_ended(self, remote: ClientComputation, numbers: List[int]) -> None:
        """Send results that are on the disk."""
        rows = self._scheduler.state.results(numbers, remote.unread)
        self.backlog.add_results(remote.link, remote.comp, rows)

    def read_again(self) -> None:
        """Results that could not be read are tried once more, after a while."""
        again = self._scheduler.now >= self.unread_until
        if again:
            self.unread_until = math.inf
        for remote in self._scheduler.clusters.values():
            if isinstance(remote,
                          ClientComputation) and remote.unread and remote.link in self._scheduler.links:
                if again:
                    numbers = list(remote.unread)
                    remote.unread.clear()
                    self.send_ended(remote, numbers)
                else:
                    self.unread_until = min(self.unread_until, self._scheduler.now + RETRY_TIME)


class ProgramCalls:
    """Questions of programs, and what they are asked. The loop's thread."""

    def __init__(self, scheduler: 'Scheduler') -> None:
        self._scheduler = scheduler
        self._numbers = itertools.count(1)

    def on_call(self, link: Link, message: Call) -> None:
        """A program asks something."""
        remote = self._scheduler.programs.computation_of(link, message.comp)
        watched = message.name == 'overview'   # it speaks of no computation

        def answer(value: Any, error: tuple = ()) -> None:
            if link.dirty is not None:
                self._scheduler.send(link, Return(message.comp, message.number, error, value))
        try:
            if self._is_early(link, message, answer):
                return
            if remote is None and not watched:
                raise RuntimeError('the scheduler does not know this cluster (any more)')
            self._scheduler.jobs.take_submitted()
            if remote is None:
                session = self._scheduler.programs.sessions[link.number]
                answer(
                    self._scheduler.overview.answer(*message.args) if session.operator else self.
                    _scheduler.overview.answer_anybody(*message.args))
                return
            self._answer_call(remote, message.name, message.args, answer)
        except Exception as exc:  # the program gets it
            answer(None, (type(exc).__name__, str(exc)))

    def _is_early(self, link: Link, message: Call, answer: Callable[..., None]) -> bool:
        """Whether the files of the computation are on their way: questions about its jobs wait
        until they are there."""
        remote = self._scheduler.computations.unopened.get(message.comp)
        if remote is None or remote.link != link.number:
            return False
        if message.name == 'nodes':
            answer([])
        elif len(remote.questions) < QUESTIONS_MOST:
            remote.questions.append((link, message))
        else:
            raise RuntimeError(
                '%d questions wait until the files of this cluster are at the scheduler' %
                QUESTIONS_MOST)
        return True

    def answer_early(self, remote: ClientComputation) -> None:
        """The files of a computation are here: answer what was asked meanwhile."""
        questions = remote.questions
        remote.questions = []
        for link, message in questions:
            self.on_call(link, message)

    def _answer_call(self, remote: ClientComputation, name: str, args: tuple, answer: Callable[...,
                                                                                    None]) -> None:
        comp = remote.comp
        if name == 'nodes':
            first, count = args or (0, NODES_PAGE)
            rows = self._scheduler.queries.rows_of(comp)[first:first + min(count, NODES_PAGE)]
            answer([tuple(row._replace(reason=shorten(row.reason, REASON_MOST))) for row in rows])
        elif name == 'jobs':
            answer([
                work.client_serial
                for work in self._scheduler.queries.jobs_at(comp, *args).values()
            ])
        elif name == 'allocate':
            self._scheduler.selection.allocate(comp, specs_of(args[0]))
            answer(None)
        elif name == 'leave' and len(args) == 4:   # with files as they are now
            def complete(error: str, code: str = '') -> None:
                if not error:
                    self._scheduler.selection.leave(comp, *args[:3])
                answer(None, ('OSError', error) if error else ())
            self._scheduler.program_files.change_files(remote, args[3], complete)
        elif name in ('running', 'place'):
            path = ''
            if name == 'place':   # one that its program has sent here before, and nothing else
                path = os.path.join(remote.directory, *check_name(args[1][0]))
                open_regular(path).close()
            future = self._scheduler.queries.question(comp, args[0],
                                                      args[1] if name == 'place' else None, path)

            def answered(done: Any) -> None:
                if done.exception() is not None:
                    answer(None, ('RuntimeError', str(done.exception())))
                elif name == 'place':
                    answer(done.result())
                else:
                    running = {serial for serial, _ in done.result().running}
                    answer([
                        work.client_serial
                        for serial, work in self._scheduler.queries.jobs_at(comp, args[0]).items()
                        if serial in running
                    ])
            future.add_done_callback(answered)
        elif name in ('find', 'seat', 'set_cpus', 'leave', 'complaint', 'why_unloadable'):
            answer(self._scheduler.queries.command(comp, name, *args))
        else:
            raise ValueError('%.40r cannot be asked of a scheduler' % name)

    def _ask(self, remote: Any, name: str, args: tuple, then: Callable[[tuple, Any], None]) -> None:
        """Ask a program; `then(error, value)` gets the answer."""
        link = self._scheduler.links.get(remote.link)
        if link is None:
            then(('RuntimeError', 'its program is not connected'), None)
            return
        number = next(self._numbers)
        remote.calls[number] = then
        self._scheduler.send(link, Call(remote.comp, number, name, args))

    def on_return(self, link: Link, message: Return) -> None:
        """A program answers."""
        remote = self._scheduler.programs.computation_of(link, message.comp)
        if remote is not None:
            then = remote.calls.pop(message.number, None)
        else:
            then = None
        if then is not None:
            then(message.error, message.value)

    def ask_source(self, remote: ClientComputation, peer: NodeConnection, link: Link) -> None:
        """Ask a program for the source of its computation."""
        def told(error: tuple, value: Any) -> None:
            if error:
                self._scheduler.setup.source_missing(remote, peer, link, error[1])
            else:
                self._scheduler.setup.source_found(remote, peer, link, (bytes(value[0]), value[1]))
        self._ask(remote, 'source', (), told)

    def ask_allocator(self, remote: ClientComputation, allocator: Any, peer: NodeConnection, link: Link) -> None:
        """Ask a program's allocator, and for the files that it names."""
        row = tuple(
            self._scheduler.queries.row_of(*self._scheduler.queries.node_of(remote.comp, peer)))

        def told(error: tuple, value: Any) -> None:
            if error:
                self._scheduler.setup.allocated(remote.comp, peer, link, Allocation(0, b'', [], {}),
                                                error[1])
                return
            cpus, setup_args, rows, modules = value
            paths = {row[0]: os.path.join(remote.directory, *row[0].split('/')) for row in rows}
            self._scheduler.program_files.bring_modules(remote, modules)
            self._scheduler.program_files.want(
                remote,
                rows,
                modules,
                lambda failed, code='': self._scheduler.setup.allocated(
                    remote.comp, peer, link, Allocation(cpus, bytes(setup_args), rows, paths),
                    failed))

        self._ask(remote, 'allocate', (allocator.number, row), told)

    def ask_for_modules(self, remote: ClientComputation, peer: NodeConnection, message: Call) -> None:
        """A job on a node needs modules of its program. What was fetched before is here."""
        answer = functools.partial(self._answer_node, peer, message)
        if message.name == 'modules' and len(message.args) == 1:
            request = message.args[0]
        else:
            request = None
        if any(row[0] == BUNDLES + BUNDLE % request
               for row in remote.cargo.spec['modules']) if type(request) is int else False:
            answer((), remote.cargo.spec['modules'])
            return

        def told(error: tuple, rows: Any) -> None:
            if error:
                answer(error, None)
                return

            def complete(failed: str, code: str = '') -> None:
                if not failed and type(request) is int:
                    self._scheduler.program_files.bring_modules(remote, rows)
                answer(('OSError', failed) if failed else (), rows)
            self._scheduler.program_files.want(remote, [], rows, complete)
        self._ask(remote, 'modules', message.args, told)

    def _answer_node(self, peer: NodeConnection, message: Call, error: tuple, value: Any) -> None:
        self._scheduler.say_to(peer, Return(message.comp, message.number, error, value))


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
        self.overview = Overview(self)
        self.quota = Quota(self, options.max_queued)
        self.sharing = NodeSharing(self)
        super().__init__(
            ConnectionSettings(options.node_secret, options.node_certfile, options.node_keyfile, None,
                   options.pulse, options.ping), self.state.instance, self.sharing)
        self.schedule = Schedule(options.fifo)
        self.values = StoredValues(self.state)
        self.commit = Commit(self, super().send)
        self.programs = ProgramLinks(self)
        self.computations = ProgramComputations(self)
        self.program_files = ProgramFiles(self)
        self.program_jobs = ProgramJobs(self)
        self.program_calls = ProgramCalls(self)
        self._program_acceptors: List[Acceptor] = []
        self.programs.messages.update({
            Compute: self.computations.on_compute,
            Reclaim: self.computations.on_reclaim,
            Done: self.computations.on_done,
            Jobs: self.program_jobs.on_jobs,
            Unfit: self.program_jobs.on_unfit,
            Cancel: self.program_jobs.on_cancel,
            ReturnJobs: self.program_jobs.on_recall,
            Ack: self.program_jobs.on_ack,
            FilePiece: self.program_files.on_file_piece,
            FileStored: self.program_files.on_file_stored,
            Call: self.program_calls.on_call,
            Return: self.program_calls.on_return,
        })

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> int:
        """Listen, take up what an earlier run has left. Returns the port. Raises StartError,
        SecretError, OSError."""
        options = self.options
        one = (options.cluster_certfile, options.cluster_keyfile) == (options.node_certfile,
                                                                      options.node_keyfile)
        programs = tuple(
            map(derive_key,
                (options.cluster_secret, options.operator_secret) if options.separate else
                (options.cluster_secret, )))
        keys = {int(Role.CLIENT): programs, int(Role.NODE): (derive_key(options.node_secret),)}
        port = options.port
        for host in options.hosts:
            door = self._door(host, port, keys, (Role.CLIENT, Role.NODE) if one else
                              (Role.CLIENT, ), options.cluster_certfile, options.cluster_keyfile)
            port = door.server_address[1]
            if not one:
                self._door(host, port + 1, keys, (Role.NODE, ), options.node_certfile,
                           options.node_keyfile)
        self.sharing.port = self._program_acceptors[0].server_address[1]
        for door in self._program_acceptors:
            self.add_reader(door.socket, door.on_readable)
        self.now = self.clock()
        named = [NodeSpec(*host_and_port(node, options.node_port)) for node in options.nodes]
        self.sharing.named = {spec.host for spec in named}
        specs = named or [NodeSpec('*', options.node_port)]
        self.open(KeepConnected(specs, options.node_port, options), False)
        with self.state.damages():
            self._restore()
        return port

    def _door(self, host: str, port: int, keys: Dict[int, Tuple[bytes, ...]],
              allowed: Sequence[Role], certfile: Optional[str], keyfile: Optional[str]) -> Acceptor:
        try:
            door = Acceptor((host, port), keys, Role.SCHEDULER, allowed, self.instance, self.post,
                        certfile, keyfile)
        except OverflowError as exc:
            raise StartError('port %d is not between 0 and 65535 (-p/--port)' % port) from exc
        except OSError as exc:
            if exc.errno in (48, 98, 10048):   # EADDRINUSE of macOS, Linux, Windows
                raise StartError(
                    'port %d is in use: another dispyscheduler? Choose another with -p/--port' %
                    port) from exc
            raise StartError('cannot listen at %s:%d: %s (-i/--host, -p/--port)' %
                             (host or '*', port, exc)) from exc
        self._program_acceptors.append(door)
        return door

    def close(self) -> None:
        """Let go of everything; what programs have submitted stays on the disk."""
        for door in self._program_acceptors:
            with contextlib.suppress(KeyError, ValueError):   # not watched yet
                self.remove_reader(door.socket)
            door.server_close()
        self._program_acceptors = []
        self.broken = 'the scheduler has ended'   # said to whoever asks it
        self._hang_up()
        self.state.close()
        super().close()

    def _restore(self) -> None:
        """What an earlier run has left: jobs that waited wait, those on nodes are there until these
        come back or are given up."""
        places = {}
        memories = self.state.memories()
        locks = self.state.locks()
        for key, host, port, name, instance in self.state.nodes():
            places[key] = (host, port, name, instance)
        for comp, client, spec in self.state.comps():
            remote = self.computations.make(comp, client, spec)
            remote.values.restore()
            remote.ready = True
            remote.given_up_at = self.now + self.options.zombie
            remote.rests_at = self.now + ORPHAN_TIME
            remote.absence.begin(self.now, self.options.gone)
            waiting: List[ClientJob] = []
            sent: Dict[Any, List[ClientJob]] = {}
            for number, serial, options, state, own, node in self.state.jobs(comp):
                if state in (State.ENDED, State.DROPPED):
                    if state == State.ENDED:
                        known = remote.ended
                    else:
                        known = remote.absence.dropped
                    known[serial] = number
                    continue
                work = remote.works[serial] = ClientJob(comp, None, options, own, serial)
                if work.values:
                    remote.values.took(work)
                self.quota.add(remote, work, self.state.size_of_payload(number))
                if state == State.SENT and node in places:
                    sent.setdefault(node, []).append(work)
                else:
                    waiting.append(work)
            self.computations.open(remote)
            for key, works in sent.items():
                host, port, name, instance = places[key]
                is_new = key not in self.nodes.by_key
                if is_new:
                    peer = NodeConnection(host, port, self.access.redial)
                else:
                    peer = self.nodes.by_key[key]
                if peer.link is None:
                    # Otherwise nobody would see that its process has ended, or is another.
                    peer.instance, peer.memory = instance, memories.get(key, '')
                    peer.facts['lock'] = locks.get(key)
                if is_new:
                    self.nodes.by_key[key], peer.key, peer.name = peer, key, name
                    if not port:
                        peer.dialling.due = None
                        peer.move('dial')
                        peer.move('fail')
                    self.selection.take(peer, 'house', NodeSpec(host, port))
                self.decide(NodeHad(key, comp, works, name, self.now + RETURN_TIME))
            self.jobs.submitted.extend(waiting)  # type: ignore[arg-type]
            if remote.works or remote.ended:
                logger.info('%s: %d jobs wait, %d were on nodes, %d have ended', remote.name,
                            len(waiting),
                            len(remote.works) - len(waiting), len(remote.ended))
        there = {comp for comp, _, _ in self.state.comps()}
        for name in os.listdir(self.state.root):
            if name.startswith('c-') and name[2:].partition('.')[0] not in there:
                shutil.rmtree(os.path.join(self.state.root, name), ignore_errors=True)

    # -- faults of ours ----------------------------------------------------------------------------

    def on_fault(self, subject: Any, text: str) -> bool:
        """As the driver's; what concerns a computation of a program ends that computation."""
        if isinstance(subject, ClientComputation):
            link = self.links.get(subject.link)
            if link is not None:
                self.send(link, Refused(subject.comp, 'fault', text))
            self.computations.end(subject)
            return True
        return super().on_fault(subject, text)

    # -- turns: nothing leaves before the transaction ----------------------------------------------

    def is_over(self, comp: str) -> bool:
        """Whether no program wants anything of a computation that a node still has."""
        return super().is_over(comp) and comp not in self.computations.unopened

    def send(self, link: Link, message: Any) -> None:
        """Send a message when the transaction of this turn is on the disk; what changes nothing
        goes at once."""
        if type(message) in _AT_ONCE:
            super().send(link, message)
        else:
            self.commit.later.append((link, message))

    def end_of_turn(self) -> None:
        """Decide, write, send."""
        self.programs.bound_answers()
        if self.commit.stuck_until is not None and self.now < self.commit.stuck_until:
            return
        self.sharing.assign_all()
        super().end_of_turn()
        for comp in list(self.clusters.values()):
            if isinstance(comp, ClientComputation):
                self.guard(comp, self.computations.end_turn_of, comp)
        if self.commit.write_down():
            self.commit.unstick()
            self.quota.take_again()
            self.program_jobs.backlog.send(self.commit.send)
            self.program_jobs.read_again()
        else:
            self.commit.stick()

    def disconnect(self, link: Link, text: str) -> None:
        """As a Loop, after all that was said before."""
        self.commit.write_down()
        super().disconnect(link, text)

    def next_timer(self) -> Optional[float]:
        """The driver's, a new try to write, results from the disk."""
        if self.commit.stuck_until is not None:
            return self.commit.stuck_until
        if self.program_jobs.backlog.has_room():
            return self.now
        times = [super().next_timer(), *self.computations.timers()]
        return min((when for when in times if when is not None), default=None)

    # -- links of programs -------------------------------------------------------------------------

    def on_event(self, event: Any) -> None:
        """Programs and nodes that have connected, signals, and the driver's events."""
        if isinstance(event, Authenticated) and event.session.peer_role == Role.CLIENT:
            self.programs.program_came(event)
        elif isinstance(event, Stop):
            # Without Bye: nodes go on and keep results, programs wait, until it is started again
            self.stop()
        else:
            super().on_event(event)

    def on_channel(self, channel: Link) -> None:
        """A link has something."""
        if channel.number in self.programs.sessions:
            self.programs.take_messages(channel)
        else:
            super().on_channel(channel)

    def on_broken(self, channel: Link, text: str) -> None:
        """A link came to its end."""
        if channel.number in self.programs.sessions:
            self.programs.program_gone(channel, text)
        else:
            super().on_broken(channel, text)


_AT_ONCE = frozenset((Bye, FilePiece, FileStored, Need, CpusChanged, Output, Pulse))


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def default_state_dir(port: int) -> str:
    """Where the state of the scheduler at this port is kept when nothing else is said."""
    if os.name == 'nt':
        base = os.environ.get('LOCALAPPDATA')
    else:
        base = os.environ.get('XDG_STATE_HOME')
    return os.path.join(base or os.path.join(os.path.expanduser('~'), '.local', 'state'), 'dispy',
                        'scheduler-%d' % port)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='dispyscheduler',
        description='Share nodes between several programs (dispy.SharedJobCluster).',
        epilog=EXIT_STATUSES)
    add = parser.add_argument
    add('-d', '--debug', action='store_true', help='log what is done in detail')
    add('-i',
        '--host',
        '--ip-addr',
        action=Each,
        metavar='ADDR',
        help='address to listen at; may be repeated (default: all)')
    add('-p',
        '--port',
        '--scheduler-port',
        type=int,
        default=SCHEDULER_PORT,
        metavar='N',
        help='TCP port for programs and nodes; 0: any (default: %(default)s)')
    add('--ext-host',
        '--ext-ip-addr',
        action=Each,
        metavar='ADDR',
        help='accepted for old scripts; nothing needs to be told of it')
    add('-n',
        '--node',
        '--nodes',
        action=Each,
        nargs='+',
        default=[],
        metavar='HOST[:PORT]',
        help='nodes; may be repeated (default: all that answer on the local network)')
    add('--node-port',
        type=int,
        default=NODE_PORT,
        metavar='N',
        help='port of nodes for which none is given (default: %(default)s)')
    add('--node-secret',
        metavar='SECRET',
        help='secret of nodes, if it is another; it can be seen in the list of processes, so '
             'better:'
        )
    add('--node-secret-file', metavar='FILE', help='file with the secret of nodes')
    add('--cluster-secret', metavar='SECRET', help='secret of programs, if it is another; better:')
    add('--cluster-secret-file', metavar='FILE', help='file with the secret of programs')
    add('--node-certfile', metavar='FILE', help='certificate for TLS with nodes')
    add('--node-keyfile', metavar='FILE', help="the certificate's key, if not in the same file")
    add('--cluster-certfile',
        metavar='FILE',
        help=
        'certificate for TLS with programs; if it is not that for nodes, nodes connect to the next '
        'port'
        )
    add('--cluster-keyfile', metavar='FILE', help="the certificate's key, if not in the same file")
    add('--operator-secret-file',
        metavar='FILE',
        help=
        "file with the operator's secret, for the web monitor: who has it sees and ends the jobs of "
        'all programs (default: that of programs if it is the one of this user, otherwise one that is made in the state directory)'
        )
    add('--nodes-share-secret',
        action='store_true',
        help='programs with a secret of their own may have the same as nodes: each of them could '
        'then pass for a node, and be given the jobs of the others')
    add('--allow-nodes',
        action=Each,
        default=[],
        metavar='NET|HOST',
        help='addresses (10.1.0.0/16) or names (*.example.org) at which programs may '
        'name nodes; may be repeated (default: private networks; those given with -n always)')
    add('--max-queued-bytes',
        type=size_option,
        default=QUEUED_MOST,
        metavar='N[kmgt]',
        help='bytes of arguments that the jobs of one program '
        'may have here; further jobs wait in the program (default: %d GiB)' % (QUEUED_MOST >> 30))
    add('--pulse-interval',
        type=seconds_option,
        default=PULSE,
        metavar='S',
        help='seconds between signs of life (default: %(default)g)')
    add('--ping-interval',
        type=seconds_option,
        default=REDIAL_MOST,
        metavar='S',
        help='most seconds between searches for nodes (default: %(default)g)')
    add('--ipv4-udp-multicast', action='store_true', help='look for nodes by IPv4 multicast too')
    add('--max-file-size',
        type=size_option,
        metavar='N[kmgt]',
        help='larger files of programs are refused (default: no limit)')
    add('--max-value',
        type=size_option,
        default=VALUE_MOST,
        metavar='N[kmgt]',
        help='larger arguments and results of jobs are refused, as are those for which the disk '
             'has no room (default and most: %d GiB)' % (VALUE_MOST >> 30))
    add('--zombie-interval',
        type=minutes_option,
        default=ZOMBIE_TIME / 60,
        metavar='MIN',
        help='minutes that results wait for a program that is gone (default: %(default)g)')
    add('--gone-after',
        type=seconds_option,
        default=GONE_TIME,
        metavar='S',
        help='seconds after which, when the connection to a program without recover_file has '
             'ended, its jobs that have not begun are cancelled (default: %(default)g)')
    add('--state-dir',
        metavar='DIR',
        help='where jobs and results are kept (default: %s)' %
        default_state_dir(SCHEDULER_PORT).replace('%', '%%'))
    add('--fair',
        '--fair-cluster-scheduler',
        action='store_true',
        help='programs share CPUs evenly (default)')
    add('--fifo',
        '--early-cluster-scheduler',
        action='store_true',
        help='programs are served in the order of their coming')
    add('--httpd',
        type=int,
        nargs='?',
        const=HTTPD_PORT,
        metavar='PORT',
        help='show all this in a browser (needs dispy_httpd.py), at this port of '
        '127.0.0.1; the link is in the log (default: %d)' % HTTPD_PORT)
    add('--log-file', metavar='FILE', help='log there instead of to stderr')
    add('--daemon', action='store_true', help='outlive the terminal')
    add('--cleanup-nodes',
        action='store_true',
        help='nodes remove the files of a program also if it gives cleanup=False')
    add('--clean', action='store_true', help='forget what earlier runs have left')
    add('--config',
        metavar='FILE',
        help='take options from this JSON file; those given here count more')
    add('--save-config',
        metavar='FILE',
        help='write these options to a JSON file, without secrets, and end')
    add('--version', action='version', version='%(prog)s ' + __version__)
    accept_obsolete(parser, OBSOLETE_SCHEDULER)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The daemon. Returns its exit status: see EXIT_STATUSES."""
    parser = _parser()
    try:
        args = parse_arguments(parser, sys.argv[1:] if argv is None else argv)
        if args.fair and args.fifo:
            parser.error('--fair and --fifo exclude each other')
        if args.save_config:
            save_config(parser, args, args.save_config)
            return 0
        limit_values(args.max_value)
        set_up_log('dispyscheduler', args.debug, args.log_file)
        set_up_log('dispy', args.debug, args.log_file)
        set_up_log('dispynode', args.debug, args.log_file)
        tell_obsolete(args, OBSOLETE_SCHEDULER)
        for side in ('cluster', 'node'):
            tls_files(getattr(args, side + '_certfile'), getattr(args, side + '_keyfile'), None,
                      '--%s-%%s' % side)
        if not 1 <= args.node_port <= 65535:
            raise StartError('port %d is not between 1 and 65535 (--node-port)' % args.node_port)
        for node in args.node:
            host_and_port(node, args.node_port)
        discovery_reach()
        root = args.state_dir or default_state_dir(args.port)
        if not has_place(root):
            raise StartError(
                'this user has no home for the state (neither HOME nor an entry in the password '
                'file): --state-dir'
            )
        if args.clean:
            _clean(root)
        cluster_secret = find_secret(args.cluster_secret, args.cluster_secret_file)
        node_secret = find_secret(args.node_secret, args.node_secret_file)
        separate = bool(args.cluster_secret or args.cluster_secret_file)
        if separate and cluster_secret.strip() == node_secret.strip(
        ) and not args.nodes_share_secret:
            raise StartError(
                'programs have a secret of their own (--cluster-secret-file), and nodes have the '
                'same: each program could pass for a node and be given the jobs of the others; '
                'give nodes another (--node-secret-file), or say --nodes-share-secret'
            )
        if separate:
            operator_secret = _operator_secret(root, args.operator_secret_file)
        else:
            operator_secret = b''
        for word in args.allow_nodes:
            _check_allowed(word)
        scheduler = Scheduler(
            Options(tuple(args.host or ('', )), args.port, tuple(args.node), args.node_port, root,
                    cluster_secret, node_secret, args.cluster_certfile, args.cluster_keyfile,
                    args.node_certfile, args.node_keyfile, args.fifo, args.pulse_interval,
                    args.ping_interval, 60 * args.zombie_interval, args.max_file_size
                    or sys.maxsize, args.ipv4_udp_multicast, args.max_queued_bytes, separate,
                    operator_secret, tuple(args.allow_nodes), args.gone_after, args.cleanup_nodes))
        try:
            port = scheduler.start()
            if args.httpd is not None:
                monitor = _monitor(scheduler, port, args.httpd, args.log_file)
            else:
                monitor = None
        except BaseException:
            scheduler.close()
            raise
    except (DispyError, OSError, ValueError) as exc:
        print('dispyscheduler: %s' % exc, file=sys.stderr)
        return 1
    for name in ('SIGTERM', 'SIGINT', 'SIGHUP'):
        number = getattr(signal, name, None)
        if number is not None and not (name == 'SIGHUP' and args.daemon):
            signal.signal(number, lambda number, frame: scheduler.post(Stop()))
        elif number is not None:
            signal.signal(number, lambda number, frame: None)
    scheduler.wake_on_signals()
    logger.info('serves at port %d, PID %d, state in %s', port, os.getpid(), root)
    try:
        return run_until_ended(scheduler)
    finally:
        if monitor is not None:
            monitor.shutdown()


def _operator_secret(root: str, path: Optional[str]) -> bytes:
    """The operator's secret, made at the first start. Raises SecretError, StartError, OSError."""
    if path is not None:
        return find_secret(None, path)
    take_state_directory(root)
    path = os.path.join(root, 'operator-secret')
    if not os.path.exists(path):
        make_secret(path)
        logger.info("the operator's secret is in %s: dispy-httpd --secret-file takes it", path)
    return find_secret(None, path)


def _check_allowed(word: str) -> None:
    """Raise StartError for what is no network and no name of hosts."""
    if not word or any(c.isspace() or c == ','
                       for c in word) or ('/' in word and not _is_network(word)):
        raise StartError('--allow-nodes %s: neither a network such as 10.0.0.0/8 nor a host name' %
                         (word or "''"))


def _is_network(word: str) -> bool:
    try:
        return bool(ipaddress.ip_network(word, False))
    except ValueError:
        return False


def _monitor(scheduler: Scheduler, port: int, at: int, log_file: Optional[str]) -> Any:
    """A web monitor of this scheduler. Raises StartError."""
    try:
        import dispy_httpd
    except ImportError as exc:
        raise StartError('--httpd needs dispy_httpd.py beside this file: %s' % exc) from exc
    source = dispy_httpd.SchedulerSource(
        lambda *question: scheduler.ask(lambda: scheduler.overview.answer(*question)),
        'all programs of the dispyscheduler at port %d' % port, lambda: None)

    def tell(text: str) -> None:
        # Others would have the token
        if log_file and os.name != 'nt' and os.stat(log_file).st_mode & 0o077:
            path = os.path.abspath(os.path.join(scheduler.state.root, 'monitor'))
            _write_private(path, text.encode() + b'\n')
            text = 'the link of the monitor is in %s, since others can read this log' % path
        logger.info('%s', text)
    try:
        return dispy_httpd.SourceHTTPServer(source, port=at, tell=tell)
    except (ValueError, OSError) as exc:
        raise StartError('--httpd: %s' % exc) from exc


def _clean(root: str) -> None:
    """Remove what an earlier run has left, if no scheduler is running on it."""
    if os.path.isdir(root):
        State(root).close()   # or it says who uses it
        for name in os.listdir(root):
            path = os.path.join(root, name)
            if name.startswith('c-') or name == 'large':
                shutil.rmtree(path, ignore_errors=True)
            elif name.startswith('state.db'):
                os.unlink(path)


if __name__ == '__main__':
    # Once more under its own name, so that classes have one identity.
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    sys.exit(importlib.import_module('dispyscheduler').main())
