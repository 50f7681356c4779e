"""The whole system in one process, on a virtual clock and a seeded network, with faults.

    python tests/faults/simulation.py --seed 7   # that seed, once more, event by event the same
    python tests/faults/simulation.py --full     # 24 h, 50 nodes, 200,000 jobs, 5,000 faults

Real are the parts that decide: `Driver` with its `Schedule`, `JobCluster`, `Journal` and `Recovery`
of a client; `Daemon` with its `Node` and `Shelf` of a node. Modelled is what is below them: clock,
sockets, dialling, runners and workers. A process is a `Loop` whose turns `World` calls; what it
says in a turn leaves at the end of the turn; a sample passes `encode` and `decode`.

    Session (a user's program,               World:            Host (its disk outlives
      also its later lives)            delay, block, cut          its daemon)
      SimClient -- SimLink -- Plug  ~~~~~~~~~~~~~~~~~~~~~~~  Plug -- SimLink -- SimDaemon -- Worker

The network keeps the order within a link and none between links. Blocked is a direction between two
hosts: what is on its way arrives later, or never if the link is broken meanwhile. Pulses are not
sent: a link end that hears nothing, because the way is blocked or the other process is stopped or
its host without power, is broken after PULSES_LOST of them.

What must be true is checked in `check_*` after every turn, or every `SWEEP` seconds where it needs
a look at everything.
"""

import argparse
import collections
import contextlib
import errno
import heapq
import itertools
import logging
import os
import random
import selectors
import shutil
import sys
import tempfile
import time
import types
import zlib

if __name__ == '__main__':
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import dispy
import dispynode
from dispy import (
    ENDED, DispyJob, Driver, DriverParts, JobBook, JobCluster, JobState, Journal, JournalRecovery,
    ProgramCluster, ProgramParts)
from dispynode import (
    PULSE, PULSES_LOST, Ack, Authenticated, Bye, ComputationFiles, ConnectFailed, Connected, Daemon,
    ResultsSpooled, Lease, LinkBroken, Loop, Memory, NodeDirectory, NodeHost, Options, Outcome,
    Pace, Pause, DirectoryReady, ProcessHost, Release, Results, Resume, RunnerGone, Refusals,
    RunnerUp, Session as Handshake, SetCpus, ResultSpool, Stage, Stop, Unreached, Values,
    WorkerGone, WorkerPipes, WorkerResults, WorkerReturnedJobs, decode, encode, pieces_of, dumps)

SILENCE = PULSE * PULSES_LOST
PIPE = 0.0003            # s on the way between a daemon and its workers
SWEEP = 30.0             # s between looks at everything
# s that an attempt may run that nobody wants, while its client and its node are connected
UNWANTED = 30.0
ZOMBIE = 1800.0          # s that results wait on a disk here
SAMPLE = 16              # one message in so many is encoded and decoded
SECRET = '0' * 64        # one that need not be stretched
VALUE = b''.join(pieces_of(dumps(42)[0]))
RAISED = dispynode.pack_error('raised', None)
END = object()           # of a stream


class Killed(BaseException):
    """This process is no more."""


# -- network ---------------------------------------------------------------------------------------

class Plug:
    """One end of a connection, as the operating system has it."""

    def __init__(self, world, owner):
        self.world, self.owner = world, owner
        self.other, self.link = None, None
        self.inbox, self.held = [], []         # arrived and not read; sent and blocked
        self.last = 0.0                        # when what was sent last arrives
        self.closed = self.cut = False
        # Messages that are still carried before the connection is cut
        self.fuse = None
        self.quiet = None                      # since when nothing can be heard

    def getsockname(self):
        """As of a socket."""
        return self.owner.host, 0

    def getpeername(self):
        """As of a socket."""
        return self.other.owner.host, 0

    def transmit(self, items):
        """Into the network."""
        world = self.world
        if self.fuse is not None and items != [END]:
            items, self.fuse = items[:self.fuse], max(0, self.fuse - len(items))
            if not self.fuse:
                world.at(max(self.last, world.now) + 0.05, self.break_off)
        if self.held or world.is_blocked(self.owner.host, self.other.owner.host):
            self.held.extend(items)
            return
        self.last = max(self.last, world.now + world.delay())
        world.at(self.last, self.other.arrive, items)

    def arrive(self, items):
        """Out of the network."""
        if self.cut and items != [END]:
            return
        if self.closed or not self.owner.alive:   # nobody is there: the other end is told
            if items != [END] and not self.other.closed:
                self.transmit([END])
            return
        self.inbox.extend(items)
        self.owner.wake()

    def break_off(self):
        """The connection is cut; each end learns of it in its time."""
        for end in (self, self.other):
            end.cut = True
            self.world.at(self.world.now + self.world.delay(), end.arrive, [END])

    def flow(self):
        """The way from here is free again."""
        items, self.held = self.held, []
        if items:
            self.transmit(items)
        elif self.closed or not self.owner.alive:
            self.transmit([END])
        self.other.heed()

    def heed(self):
        """Whether anything can be heard here may have changed."""
        world, other = self.world, self.other
        deaf = not self.closed and (other.owner.stopped or not other.owner.alive
                                    or world.is_blocked(other.owner.host, self.owner.host))
        if deaf and self.quiet is None:
            self.quiet = world.now
            world.at(self.quiet + SILENCE + world.rng.random() * PULSE / 2, self.despair)
        elif not deaf:
            self.quiet = None

    def despair(self):
        """Has it been silent for too long?"""
        if self.closed or self.quiet is None or not self.owner.alive or self.owner.stopped:
            return
        left = self.quiet + SILENCE - self.world.now
        if left > 0:
            self.world.at(self.world.now + left + 0.01, self.despair)
        else:
            self.owner.run_turn(self.link, 'nothing was heard')

    def close(self):
        """As a socket's."""
        if not self.closed:
            self.closed = True
            self.world.plugs.pop(self, None)
            self.transmit([END])


class SimLink:
    """Stands in for dispynode.Link."""
    bytes_in = bytes_out = 0
    stall = ''
    owner = None

    def __init__(self, sock, session, address, now, pulse=PULSE, takes=()):
        self.sock, self.address, self.pulse = sock, address, pulse
        self.number = next(sock.world.link_numbers)
        self.instance, self.role = session.peer_instance, session.peer_role
        self.said, self.sent, self.opened = now, 0, 0
        self.on_purpose = self.paused = self.owes = False
        self.later = {}   # nothing here is so large that it goes in parts
        self.is_attached, self.to_write = False, None
        self.queued, self.wants_write, self.out = 0, False, []
        sock.link = self
        sock.heed()

    def abandon(self, comp, serials=None):
        return []

    def breaks(self, now):
        """Nothing is short or long here."""

    @property
    def heard(self):
        return self.sock.world.now if self.sock.quiet is None else self.sock.quiet

    @heard.setter
    def heard(self, when):
        """`heed` knows better."""

    def send(self, message):
        world = self.sock.world
        world.messages += 1
        world.note(type(message).__name__, self.sock.owner.host, self.sock.other.owner.host)
        if type(message) is Results:
            world.outcomes.update(((message.comp, row[0]), row[1]) for row in message.rows)
        if world.messages % SAMPLE == 0:
            op, encoding, pieces = encode(message)
            message = decode(op, encoding, memoryview(b''.join(pieces)))
        self.out.append(message)
        self.sent += 1
        self.to_write[self] = None

    def write(self):
        if self.out:
            self.sock.transmit(self.out)
            self.out = []

    def messages(self, now):
        inbox = self.sock.inbox
        if inbox and inbox[0] is END:
            raise LinkBroken('the connection was closed')
        if END in inbox:
            self.sock.inbox = [END]
            return inbox[:inbox.index(END)]
        self.sock.inbox = []
        return inbox


# -- processes -------------------------------------------------------------------------------------

class SimLoop(Loop):
    """A process: a loop without sockets, whose turns the world calls. Its world is set before."""
    world: 'World'

    def __init__(self):
        self.clock = lambda: self.world.now
        self.now, self.links, self.unsent = self.world.now, {}, {}
        self._inbox, self.has_ended, self._pulse_at = collections.deque(), False, 0.0
        self._later_broken, self._again, self.refusals = collections.deque(), False, Refusals()
        self.values = Values('here', self.log)
        self.alive, self.stopped = True, False
        self.doomed = None         # where in a turn it is killed
        self.due = None            # when it is woken by its own timer

    @property
    def pace(self):
        """A turn of this loop comes when there is something to do, and takes no time."""
        return Pace(self.now)

    def post(self, event):
        self._inbox.append(event)
        if self.alive:
            self.world.at(self.world.now, self.wake)

    def attach(self, channel):
        channel.is_attached, channel.to_write = True, self.unsent
        self.links[channel.number] = channel
        self.world.plugs[channel.sock] = None

    def detach(self, channel):
        if channel.is_attached:
            channel.is_attached, channel.to_write = False, None
            self.unsent.pop(channel, None)
            self.links.pop(channel.number, None)
            channel.sock.close()

    def interest(self, channel):
        """There is no selector."""

    def wake_up(self):
        """A turn ends with what was posted in it."""

    def fault(self, subject, exc, owner=None):
        """What would end a link or a computation is a fault here."""
        raise exc

    def wake(self):
        """A turn, if there is something to do and it may run."""
        if self.alive and not self.stopped:
            self.run_turn()

    def run_turn(self, broken=None, text=''):
        """One round. With `broken` it begins with the end of that link."""
        self.now = self.world.now
        self.world.turns += 1
        try:
            if broken is not None and broken.is_attached:
                self._break(broken, text)
            for link in list(self.links.values()):
                while link.sock.inbox and link.is_attached:
                    self._handle_io(link, selectors.EVENT_READ)
            for _ in range(len(self._inbox)):
                self.on_event(self._inbox.popleft())
            self.end_of_turn()
            self.may_die('before it sends')
            for link in list(self.unsent):
                self.unsent.pop(link, None)
                link.write()
                self.may_die('while it sends')
        except Killed:
            self.world.kill(self)
            return
        if self.has_ended:
            self.end()
            return
        when = self.next_timer()
        if self._inbox:
            self.world.at(self.now, self.wake)
        elif when is not None and (self.due is None or when < self.due):
            self.due = max(when, self.now)
            self.world.at(self.due, self.ring, self.due)
        self.check_turn()

    def ring(self, due):
        """Its timer."""
        if self.due == due:
            self.due = None
            self.wake()

    def may_die(self, where):
        """A place at which a process may be killed."""
        if self.doomed == where and self.world.rng.random() < 0.5:
            raise Killed

    def disconnect(self, link, text):
        self.send(link, Bye(text))
        link.write()
        self.detach(link)

    def end(self):
        """It has ended by itself."""
        self.world.kill(self)


class SimPolicy(dispy.NodePolicy):
    """Of a program that leaves no files but its recover_file."""

    def about_holder(self, holder, place):
        return ''


class SimClient(Driver, SimLoop):
    """A client's driver."""

    def __init__(self, access, session):
        self.world, self.session, self.host = session.world, session, session.user
        parts = DriverParts(SimLink, self.attempt, SimPool, self.event, self.world.new_comp)
        super().__init__(access, self.world.random_bytes(), SimPolicy(), parts)

    def attempt(self, post, peer, reach):
        """What begins an attempt to connect."""
        return SimAttempt(self, peer, reach.keywords['patience'])

    def event(self):
        """What its user waits for."""
        return SimEvent(self.world)

    def ask(self, call):
        self.now = self.world.now
        for _ in range(len(self._inbox)):   # what was posted before comes first
            self.on_event(self._inbox.popleft())
        answer = call()
        self.world.at(self.now, self.wake)
        return answer

    def finish(self):
        for _ in range(len(self._inbox)):
            self.on_event(self._inbox.popleft())
        self._leave()
        self.end()

    def check_turn(self):
        self.session.recent.clear()
        self.world.check_client(self)


class SimDrivers:
    """What the clusters of a session ask for a driver: each has its own."""

    def __init__(self, session):
        self.session = session

    def acquire(self, access):
        return SimClient(access, self.session)

    alone = acquire

    def release(self, driver):
        driver.finish()


class SimCluster(JobCluster):
    """A cluster of a session."""

    def __init__(self, session, *args, **options):
        self.session = session
        super().__init__(*args, **options)

    def _make_core(self, computation, options):
        world = self.session.world
        return ProgramCluster(computation, options, ProgramParts(
            self.session.drivers, SimJournal, SimBook, world.new_comp))


class SimBook(JobBook):
    """What a program would wait for is done when its driver is released."""

    def wait(self, timeout):
        return True


class SimAttempt:
    """An attempt to connect, without a thread."""

    def __init__(self, driver, peer, patience):
        self.driver, self.peer, self.patience = driver, peer, patience

    def start(self):
        self.driver.world.dial(self.driver, self.peer, self.patience)

    def abort(self, waits):
        """The process has ended."""


class SimEvent:
    """Waiting is letting the world go on."""

    def __init__(self, world):
        self.world, self.flag = world, False

    def set(self):
        self.flag = True

    def is_set(self):
        return self.flag

    def wait(self, timeout=None):
        world = self.world
        until = world.now + timeout
        while not self.flag and world.now < until:
            world.step()
        return self.flag


class SimPool:
    """Runs at once what is left to threads."""

    def __init__(self, name, most, patience=0.0):
        self.run = lambda call, *args: call(*args)

    def close(self):
        """Nothing is left."""


class SimJournal(Journal):
    """The real one; its program may be killed at each commit."""
    driver = None

    def commit(self):
        if self.driver is not None:
            self.driver.may_die('before it commits')
        return super().commit()


class SimShelf(ResultSpool):
    """The real one, on a disk that may be full or slow, of a daemon that may be killed while it
    writes."""
    daemon = None

    def append(self, owner, rows, digest):
        daemon = self.daemon
        if daemon.home.full_until > daemon.now:
            raise OSError(errno.ENOSPC, 'No space left on device')
        before = os.path.getsize(self.path) if os.path.exists(self.path) else 0
        super().append(owner, rows, digest)
        daemon.world.written[self.path] = daemon.now
        if daemon.doomed == 'while it writes':
            os.truncate(self.path, daemon.world.rng.randint(before, os.path.getsize(self.path)))
            raise Killed
        if daemon.home.slow_until > daemon.now:
            daemon.world.stop(daemon, daemon.world.rng.uniform(0.1, 3.0))

    def age(self):
        return self.daemon.now - self.daemon.world.written[self.path]


class SimDirectory(NodeDirectory):
    """The directory of a host, without a lock; files in it are those of the model."""
    daemon = None

    def available(self):
        """Nobody asks for it here."""
        return {}

    def have(self, home):
        """What `take` does."""
        self.base = self.root = home.directory
        self.memory = Memory(self.base)
        self._taken(self.memory, self.memory.begin({comp: frozenset(begun)
                                                    for comp, begun in home.begun.items()}))
        home.begun.clear()

    def spool(self, comp):
        spool = SimShelf(super().spool(comp).path)
        spool.daemon = self.daemon
        return spool


class SimFiles(ComputationFiles):
    """Files of computations are there at once."""

    def prepare(self, action):
        self._host.post(DirectoryReady(action.comp, []))


class SimPipes(WorkerPipes):
    """What is done with workers is done with those of the model."""

    def __init__(self, host, daemon):
        super().__init__(host, {}.__getitem__, lambda: None)
        self.daemon, self.by_key = daemon, {}

    def start_worker(self, action):
        self.by_key[action.worker] = Worker(self.daemon, action.worker, action.comp)

    def _order(self, kind, key, *args):
        worker = self.by_key.get(key)
        if worker is not None:
            self.daemon.later(PIPE, getattr(worker, kind.name.lower()), *args)

    def feed(self, action):
        self.daemon.may_die('before it sends')
        worker = self.by_key.get(action.worker)
        if worker is not None:
            self.daemon.later(PIPE, worker.feed,
                              [(attempt.serial, attempt.payload) for attempt in action.attempts])

    def retire(self, action):
        worker = self.by_key.get(action.worker)
        if worker is not None:
            worker.die(told=False)


class SimProcesses(ProcessHost):
    """What is done to processes is done to those of the model."""

    def __init__(self, host, files, options):
        super().__init__(host, files, options)
        self.daemon = host.loop
        self.workers = SimPipes(host, self.daemon)
        self.runners = {}          # computation -> its runner

    def start_runner(self, action):
        self.runners[action.comp] = runner = object()
        self.daemon.later(self.daemon.world.rng.uniform(0.05, 2.0),
                          lambda: self.runners.get(action.comp) is runner
                          and self.daemon.post(RunnerUp(action.comp)))

    def stop_runner(self, action, text=''):
        self.runners.pop(action.comp, None)

        def gone():
            for worker in list(self.workers.by_key.values()):
                if worker.comp == action.comp:
                    worker.die(told=False)
            self.daemon.post(RunnerGone(action.comp, text))
        self.daemon.later(self.daemon.world.rng.uniform(0.001, 0.5), gone)


class SimNodeHost(NodeHost):
    """The real one, over the parts above."""

    def __init__(self, loop, options):
        super().__init__(loop, options, SimDirectory, SimFiles, SimProcesses, FACTS)

    def take(self, link, message):
        if type(message) is Ack:
            self.loop.world.check_ack(message)
        super().take(link, message)

    def tell(self, event):
        super().tell(event)
        if type(event) is ResultsSpooled and not event.error:
            self.loop.world.shelved += len(event.serials)


class SimDaemon(Daemon, SimLoop):
    """A node's daemon; what it does to processes is done to those of the model."""

    def __init__(self, home):
        self.world, self.home, self.host = home.world, home, home.name
        super().__init__(Options(home.cpus, name=home.name, secret=SECRET.encode(), zombie=ZOMBIE),
                         SimNodeHost, SimLink)
        self.instance = self.world.random_bytes()
        self.workers = self.processes.workers.by_key
        self.directory.daemon = self
        self.directory.have(home)
        self.node_host.results.find_kept()

    @property
    def processes(self):
        return self.node_host.processes

    @property
    def directory(self):
        return self.node_host.directory

    def later(self, seconds, call, *args):
        """Something in a process of this node, unless that is dead by then."""
        self.world.at(self.world.now + seconds, lambda: self.alive and call(*args))

    def end(self):
        assert not any(comp.attempts for comp
                       in self.node.tables.comps.values()), 'it ends and has not answered for all'
        self.home.begun.clear()   # as its directories go
        self.world.kill(self)
        self.world.at(self.world.now + self.world.rng.expovariate(1 / 10), self.home.start)

    def check_turn(self):
        self.world.check_node(self.node)


class Worker:
    """A worker process: job after job."""

    def __init__(self, daemon, key, comp):
        self.daemon, self.key, self.comp, self.world = daemon, key, comp, daemon.world
        self.queue, self.running, self.job, self.began = collections.deque(), 0, None, 0.0
        self.interrupted, self.alive, self.ticket = 0, True, 0

    def feed(self, attempts):
        self.queue.extend(attempts)
        if not self.running:
            self.next()

    def next(self):
        if not self.alive or not self.queue:
            self.running = 0
            return
        self.running, payload = self.queue.popleft()
        self.daemon.home.begun.setdefault(self.comp, set()).add(self.running)
        self.job = self.world.started(self, payload)
        self.began, self.ticket = self.world.now, self.ticket + 1
        self.daemon.later(self.job.took, self.finish, self.ticket)
        if self.interrupted == self.running:
            self.interrupt(self.running)

    def finish(self, ticket, interrupted=False):
        if not self.alive or ticket != self.ticket or not self.running:
            return
        if self.job.fate == 'dies' and not interrupted:
            self.die()
            return
        raises = interrupted or self.job.fate == 'raises'
        row = (self.running, int(Outcome.RAISED if raises else Outcome.RETURNED), 1e9 + self.began,
               1e9 + self.world.now, RAISED if raises else VALUE, b'', b'')
        if not raises:
            self.world.returned[self.comp, self.running] = self.job
        self.daemon.later(PIPE, self.daemon.post, WorkerResults(self.key, [row]))
        self.next()

    def interrupt(self, serial):
        self.interrupted = serial
        if self.running == serial and self.job.fate != 'stubborn':
            self.daemon.later(0.01, self.finish, self.ticket, True)

    def kill(self):
        self.die()

    def recall(self):
        back = [serial for serial, _ in self.queue]
        self.queue.clear()
        self.daemon.later(PIPE, self.daemon.post, WorkerReturnedJobs(self.key, back))

    def watch(self, serial, most, seconds):
        """It uses less, and its node keeps the time too."""

    def die(self, told=True):
        if self.alive:
            self.alive = False
            self.daemon.workers.pop(self.key, None)
            if told:
                self.daemon.later(PIPE, self.daemon.post,
                                  WorkerGone(self.key, 'killed', self.running))


class Host:
    """A machine with a disk, and a daemon most of the time."""

    def __init__(self, world, name, cpus):
        self.world, self.name, self.cpus = world, name, cpus
        self.directory = os.path.join(world.directory, name)
        self.full_until = self.slow_until = 0.0
        # Computation -> serials that its workers have noted, until the next daemon reads it
        self.begun = {}
        self.daemon = None
        os.mkdir(self.directory)
        self.start()

    def start(self):
        if self.daemon is None or not self.daemon.alive:
            self.daemon = SimDaemon(self)
            self.world.at(self.world.now, self.daemon.wake)


# -- users -----------------------------------------------------------------------------------------

class Job:
    """What is known of a job outside the system."""
    __slots__ = ('number', 'took', 'fate', 'options', 'starts', 'status', 'handle', 'acked')

    def __init__(self, number, took, fate, options):
        self.number, self.took, self.fate, self.options = number, took, fate, options
        self.starts, self.status, self.handle, self.acked = 0, None, None, False


class Session:
    """A program of a user: submits jobs in bursts, cancels some, submits more in callbacks, closes
    when all have ended. If it is killed it is begun anew with its recover_file, or never."""

    def __init__(self, world, user, jobs):
        self.world, self.user, self.left = world, user, jobs
        rng = world.rng
        self.reentrant = rng.random() < 0.5
        self.nodes = sorted(rng.sample(sorted(world.hosts),
                                       rng.randint((len(world.hosts) + 1) // 2, len(world.hosts))))
        self.speculates = len(self.nodes) % 2 == 1
        self.path = (os.path.join(world.directory, 'journal-%d' % next(world.numbers))
                     if rng.random() < world.journals else None)
        self.scale = rng.choice((0.02, 1.0, 10.0, 60.0)) * world.scale
        self.lengths = getattr(self,
                               rng.choice(('exponential', 'exponential', 'quick_first', 'one_slow',
                                           'alternating', 'growing', 'bimodal')))()
        self.drivers = SimDrivers(self)
        self.jobs = {}             # of which the end has not been seen
        self.cluster = self.driver = None
        # Of which the end was seen in this turn, and may not be committed
        self.recent = []
        self.begin()

    def begin(self):
        world = self.world
        if self.driver is not None and self.driver.alive:
            return
        world.note('begin', self.user, '')
        if self.cluster is not None and world.rng.random() < 0.3:
            self.recover(self.recover_jobs(world.rng.choice((0.0, 5.0, 60.0)),
                                           world.rng.random() < 0.3))
            if not self.jobs:
                self.over()
                return
        self.cluster = cluster = SimCluster(self, compute, nodes=self.nodes,
                                            reentrant=self.reentrant, recover_file=self.path,
                                            speculate=self.reentrant and self.speculates,
                                            secret=SECRET, job_status=self.ended,
                                            loglevel=logging.CRITICAL)
        self.driver = dispy.core_of(cluster).driver
        if dispy.core_of(cluster).journal is not None:
            dispy.core_of(cluster).journal.driver = self.driver
        self.recover(cluster.recovered)
        self.submit()

    def recover_jobs(self, timeout, cancel):
        """What dispy.recover_jobs does."""
        access = dispy.core_of(self.cluster).options.access()
        journal = Journal(self.path, must_exist=True)
        try:
            return JournalRecovery(journal, cancel, self.drivers).run(timeout, access)
        finally:
            journal.close()

    def recover(self, jobs):
        found = set()
        for handle in jobs:
            job = self.world.jobs[handle.id]
            assert handle.id not in found, 'recovered twice'
            found.add(handle.id)
            job.handle = handle
            if handle.status in ENDED:
                if job.status is None:
                    self.world.ended(job, handle.status)
                    self.jobs.pop(job.number)
                assert job.status == handle.status, 'it ended in two ways'
            else:
                assert job.status is None, 'it had ended, and is not known to have'
        missing = set(self.jobs) - found
        assert not missing, 'lost with the program: %s' % missing

    def submit(self):
        rng, world = self.world.rng, self.world
        if not self.driver.alive or self.driver.stopped:
            world.at(world.now + 5.0, self.submit) if self.driver.alive else None
            return
        if self.left and not world.over:
            for _ in range(min(self.left, rng.choice((1, 5, 50, 300)))):
                self.submit_one()
            for job in rng.sample(sorted(self.jobs), min(len(self.jobs), rng.choice((0, 0, 1, 3)))):
                self.cluster.cancel(self.jobs[job].handle)
            world.at(world.now + rng.expovariate(1 / (5.0 * world.scale)), self.submit)
        elif not self.jobs:
            self.close()
        elif world.rng.random() < 0.0005 and not world.over:
            self.close()
        else:
            world.at(world.now + 5.0 * world.scale, self.submit)

    def submit_one(self):
        world, rng = self.world, self.world.rng
        self.left -= 1
        rare = {'dispy_cpus': rng.randint(1, 2), 'dispy_priority': rng.randint(-1, 1),
                'dispy_timeout': self.scale, 'dispy_retries': 2}
        options = {name: value for name, value in rare.items() if rng.random() < 0.04}
        job = Job(next(world.numbers), next(self.lengths),
                  rng.choices(('returns', 'raises', 'dies', 'stubborn'), (90, 5, 3, 2))[0], options)
        self.jobs[job.number] = world.jobs[job.number] = job
        job.handle = self.cluster.submit_job_id(job.number, job.number, **options)
        world.by_payload[bytes(job.handle.payload)] = self, job
        world.submitted += 1

    # lengths of jobs, most of them chosen to fool whoever believes that the next job is like the
    # last

    def exponential(self):
        while True:
            yield self.world.rng.expovariate(1 / self.scale)

    def quick_first(self):
        yield from [0.0001] * self.world.rng.choice((1, 3, 20, 100))
        while True:
            yield self.scale

    def one_slow(self):
        while True:
            yield 20 * self.scale if self.world.rng.random() < 0.03 else 0.01 * self.scale

    def alternating(self):
        for length in itertools.cycle((0.0005, self.scale)):
            yield length

    def growing(self):
        length = 0.001
        while True:
            yield length
            length = min(3 * self.scale, length * self.world.rng.uniform(1.0, 1.2))

    def bimodal(self):
        while True:
            yield 0.001 if self.world.rng.random() < 0.8 else self.scale

    def ended(self, handle):
        """The user's callback."""
        job = self.jobs.pop(handle.id, None)
        assert job is not None, 'a job has ended twice, or is nobody\'s'
        assert handle is job.handle
        self.world.ended(job, handle.status)
        self.recent.append(job)
        if self.left and self.world.rng.random() < 0.1 and not dispy.core_of(self.cluster).closed:
            self.submit_one()

    def close(self):
        cluster, self.left = self.cluster, 0
        cluster.close(terminate=True)
        assert not self.jobs, ('jobs that have not ended when their cluster is closed: %s'
                               % self.jobs)
        self.over()

    def over(self):
        for job in self.jobs.values():
            job.status = 'forgotten'
        self.jobs = {}
        self.driver.alive = False
        self.world.session_over(self)

    def killed(self):
        """The process is no more."""
        dispy._clusters.discard(self.cluster)
        world, journal = self.world, dispy.core_of(self.cluster).journal
        for job in self.recent:
            world.statuses[JobState(job.status).name] -= 1
            self.jobs[job.number], job.status = job, None
        self.recent.clear()
        if journal is None:
            self.over()
            return
        if world.rng.random() < 0.3:
            # Torn: that job was never returned
            os.write(journal._new, bytes(range(world.rng.randint(1, 60))))
        journal._db.close()
        os.close(journal._new)
        if world.rng.random() < 0.1:
            self.over()   # for good
        else:
            world.at(world.now + world.rng.expovariate(1 / 30.0), self.begin)


def compute(number):
    """Never run."""


# -- world -----------------------------------------------------------------------------------------

class World:
    """The clock, the network, the faults, and the books of what must be true."""

    def __init__(self, seed, hosts=8, users=3, jobs=2000, faults=300, hours=1.0, scale=1.0,
                 journals=0.6, directory=None):
        self.rng, self.now, self.heap, self.order = random.Random(seed), 0.0, [], itertools.count()
        self.directory, self.until = directory, hours * 3600.0
        self.budget, self.scale, self.journals = jobs, scale, journals
        self.trace = self.messages = self.turns = self.submitted = 0
        self.starts = self.shelved = self.faults = 0
        self.numbers, self.jobs, self.by_payload, self.returned = itertools.count(1), {}, {}, {}
        # (computation, serial) -> outcome that its node has told last, until that is acknowledged
        self.outcomes = {}
        self.written = {}          # path of results on a disk -> when some were added last
        self.statuses, self.told = collections.Counter(), collections.Counter()
        self.plugs, self.blocked, self.slow_network, self.over = ({}, collections.Counter(), 0.0,
                                                                  False)
        self.victim = 'n0'
        self.strange = {}          # (daemon, worker, serial) that nobody wants -> since when
        self.link_numbers, self.ids = itertools.count(1), random.Random(seed)
        self.hosts = {'n%d' % number: None for number in range(hosts)}
        for name in self.hosts:
            self.hosts[name] = Host(self, name, self.rng.choice((2, 2, 4, 8)))
        self.sessions = {}
        self.session_jobs = max(1, jobs // (users * max(2, int(4 * hours))))
        for number in range(users):
            self.at(self.rng.uniform(0, 10), self.new_session, 'u%d' % number)
        for _ in range(faults):
            self.at(self.rng.uniform(5.0, self.until), self.fault)
        self.at(SWEEP, self.sweep)

    def new_comp(self):
        """The name of a computation."""
        return '%032x' % self.ids.getrandbits(128)

    def random_bytes(self):
        """What one process is told from all others by."""
        return bytes(self.rng.getrandbits(8) for _ in range(16))

    def at(self, when, call, *args):
        heapq.heappush(self.heap, (when, next(self.order), call, args))

    def note(self, what, where, to):
        """Into the trace, of which only a checksum is kept."""
        self.trace = zlib.crc32(('%.6f %s %s %s' % (self.now, what, where, to)).encode(),
                                self.trace)

    def run(self):
        """Until nothing is to be done; the last faults end, then everything must end."""
        while self.heap and self.now < self.until:
            self.step()
        self.over = True
        patience = self.now + 1800.0 + 100 * self.scale * 60
        while any(self.sessions.values()):
            assert self.now < patience, 'it does not end: %s' % self.complaint()
            self.step()
        rest = self.now + ZOMBIE + 120.0
        while self.heap and self.now < rest:
            self.step()
        self.check_end()

    def step(self):
        when, _, call, args = heapq.heappop(self.heap)
        self.now = max(self.now, when)
        call(*args)

    def complaint(self):
        return ['%s: %d jobs, %s; %s'
                % (session.user, len(session.jobs),
                   [(job.number, job.handle.state.name, job.handle.status, job.handle.lost_with)
                    for job in list(session.jobs.values())[:3]],
                   [(str(peer), peer.state.value, peer.reason,
                     [(use.state.value, use.reason) for use in peer.uses.values()])
                    for peer in session.driver.nodes.by_key.values()][:8])
                for session in self.sessions.values() if session]

    # network

    def delay(self):
        return self.rng.expovariate(1 / (0.5 if self.now < self.slow_network else 0.001))

    def is_blocked(self, source, target):
        return self.blocked[source, target] > 0

    def dial(self, driver, peer, patience):
        home, delay = self.hosts[peer.host], self.delay() + 0.001
        if self.is_blocked(driver.host, home.name) or self.is_blocked(home.name, driver.host) \
                or (home.daemon.alive and home.daemon.stopped):
            self.at(self.now + patience, driver.post,
                    ConnectFailed(peer, 'no answer within %g s' % patience))
        elif not home.daemon.alive:
            self.at(self.now + delay, driver.post,
                    ConnectFailed(peer, 'connection refused', Unreached.DOWN))
        else:
            self.at(self.now + delay, self.connect, driver, peer, home)

    def connect(self, driver, peer, home):
        if not driver.alive or not home.daemon.alive:
            self.at(self.now, driver.post, ConnectFailed(peer, 'connection reset'))
            return
        mine, its = Plug(self, driver), Plug(self, home.daemon)
        mine.other, its.other = its, mine
        self.note('connect', driver.host, home.name)
        driver.post(Connected(peer, mine, Handshake(b'', b'', home.daemon.instance, 2), home.name))
        home.daemon.post(Authenticated(its, Handshake(b'', b'', driver.instance, 1), driver.host))

    def heed(self, *hosts):
        for plug in list(self.plugs):
            if plug.owner.host in hosts or plug.other.owner.host in hosts:
                if plug.link is not None:
                    plug.heed()

    def block(self, pairs, seconds):
        for pair in pairs:
            self.blocked[pair] += 1
        self.heed(*{host for pair in pairs for host in pair})
        self.at(self.now + seconds, self.unblock, pairs)

    def unblock(self, pairs):
        for pair in pairs:
            self.blocked[pair] -= 1
        free = {pair for pair in pairs if not self.blocked[pair]}
        for plug in list(self.plugs):
            for end in (plug, plug.other):
                if (end.owner.host, end.other.owner.host) in free:
                    end.flow()

    # processes

    def kill(self, process, silent=False):
        """The process is no more; its kernel says so, unless the power has failed."""
        if not process.alive:
            return
        self.note('killed', process.host, '')
        process.alive = False
        for link in list(process.links.values()):
            plug = link.sock
            if silent:
                plug.closed = True
                self.plugs.pop(plug, None)
                plug.other.heed()
            else:
                plug.close()
        for worker in list(getattr(process, 'workers', {}).values()):
            worker.alive = False
        if isinstance(process, SimClient) and not process.has_ended:
            process.session.killed()

    def stop(self, process, seconds):
        """SIGSTOP, and SIGCONT some time later."""
        if not process.alive or process.stopped:
            return
        process.stopped = True
        self.heed(process.host)
        self.at(self.now + seconds, self.carry_on, process, self.now)

    def carry_on(self, process, since):
        process.stopped = False
        for link in process.links.values():
            # It could not listen: nobody is to blame for that (Loop._beat)
            if link.sock.quiet is not None:
                link.sock.quiet += self.now - max(since, link.sock.quiet)
                self.at(link.sock.quiet + SILENCE, link.sock.despair)
        self.heed(process.host)
        process.wake()

    # faults

    def fault(self):
        rng = self.rng
        self.faults += 1
        if rng.random() < 0.6:   # otherwise the same as before: faults meet
            self.victim = rng.choice(sorted(self.hosts))
        home = self.hosts[self.victim]
        session = self.sessions.get(rng.choice(sorted(self.sessions))) if self.sessions else None
        driver = session.driver if session is not None and session.driver.alive else None
        names = sorted([*self.hosts, *self.sessions])
        kind = rng.choices(*zip(*FAULTS.items()))[0]
        self.told[kind.__name__] += 1
        self.note(kind.__name__, home.name, '')
        kind(self, rng, home, driver, names)

    def node_killed(self, rng, home, driver, names):
        daemon = home.daemon
        if rng.random() < 0.5:   # somewhere in one of its next turns
            daemon.doomed = rng.choice(('before it sends', 'while it sends', 'while it writes',
                                        'while it writes'))
            if daemon.doomed == 'while it writes':
                self.block([pair for user in self.sessions
                            for pair in ((user, home.name), (home.name, user))], 20.0)
            self.at(self.now + 60.0, self.kill, daemon)
        else:
            self.kill(daemon, silent=rng.random() < 0.3)
        if rng.random() < 0.2:
            self.at(self.now + 0.5, lambda: home.daemon.alive
                    or [os.unlink(entry.path) for entry in os.scandir(home.directory)])
        for after in (1.0, 60.0, 61.0):
            self.at(self.now + after + rng.expovariate(1 / 5), home.start)

    def node_stopped(self, rng, home, driver, names):
        self.stop(home.daemon, rng.choice((1.0, 8.0, 12.0, 40.0)))

    def operator(self, rng, home, driver, names):
        event = rng.choice((Stop(), Release(), Pause('operator', 'why'),
                            Pause('hours', 'why', True), SetCpus(rng.randint(1, home.cpus))))
        home.daemon.post(event)
        for undo in (Resume('operator'), Resume('hours'), SetCpus(home.cpus)):
            self.at(self.now + rng.uniform(1, 120), lambda undo=undo,
                    daemon=home.daemon: daemon.post(undo))

    def worker_killed(self, rng, home, driver, names):
        for worker in list(home.daemon.workers.values())[:rng.choice((1, 1, 8))]:
            worker.die()

    def runner_killed(self, rng, home, driver, names):
        for comp in home.daemon.node.tables.comps.values():
            if comp.stage is Stage.READY:
                home.daemon.processes.stop_runner(types.SimpleNamespace(comp=comp.comp), 'killed')
                return

    def disk(self, rng, home, driver, names):
        if rng.random() < 0.5:
            home.full_until = self.now + rng.uniform(1, 120)
        else:
            home.slow_until = self.now + rng.uniform(1, 120)

    def link_cut(self, rng, home, driver, names):
        plugs = list(self.plugs)
        for plug in rng.sample(plugs, min(len(plugs), rng.choice((1, 1, 3)))):
            if rng.random() < 0.5:   # at one of its next messages
                plug.fuse = rng.randint(0, 5)
            else:
                plug.break_off()

    def blocked_way(self, rng, home, driver, names):
        one, two = rng.sample(names, 2)
        pairs = [(one, two)] if rng.random() < 0.5 else [(one, two), (two, one)]
        self.block(pairs, rng.choice((0.5, 5.0, 11.0, 20.0, 60.0)))

    def partition(self, rng, home, driver, names):
        side = set(rng.sample(names, rng.randint(1, len(names) - 1)))
        pairs = [(a, b) for a in names for b in names if (a in side) != (b in side)]
        self.block(pairs, rng.choice((2.0, 11.0, 30.0)))

    def slow(self, rng, home, driver, names):
        self.slow_network = self.now + rng.uniform(1, 20)

    def client_killed(self, rng, home, driver, names):
        if driver is not None and rng.random() < 0.5:
            driver.doomed = rng.choice(('before it sends', 'while it sends', 'before it commits'))
        elif driver is not None:
            self.kill(driver, silent=rng.random() < 0.3)

    def client_stopped(self, rng, home, driver, names):
        if driver is not None:
            self.stop(driver, rng.choice((1.0, 8.0, 12.0, 40.0)))

    # what must be true

    def started(self, worker, payload):
        session, job = self.by_payload[bytes(payload)]
        job.starts += 1
        self.starts += 1
        assert (session.reentrant or 'dispy_retries' in job.options
                or job.starts == 1), 'job %d, not reentrant, is started again' % job.number
        return job

    def ended(self, job, status):
        assert job.status is None, 'job %d ends twice' % job.number
        assert status in ENDED
        assert job.handle.result in (None, 42) and 'could not be opened' not in (
            job.handle.exception or ''), 'its result is damaged'
        assert not job.acked or status == JobState.FINISHED, (
            'the result of job %d was acknowledged, and it ends as %s' % (job.number, status))
        job.status = status
        self.statuses[JobState(status).name] += 1
        self.note('ended', job.number, int(status))

    def check_ack(self, message):
        for serial in message.serials:
            job, outcome = self.returned.pop((message.comp, serial),
                                             None), self.outcomes.pop((message.comp, serial), None)
            if (
                    job is not None and outcome == Outcome.RETURNED and job.status is None
                    and job.handle.serial == serial and not job.handle.lost_with):
                job.acked = True

    def check_client(self, driver):
        """What has been submitted and has not ended is in one place."""
        schedule = driver.schedule
        for comp in schedule.comps.values():
            flying = len(comp.running)
            session = driver.session
            if comp.comp != dispy.core_of(session.cluster).comp or dispy.core_of(
                    session.cluster).closed:
                continue
            recovering = len(dispy.core_of(session.cluster).takeover.left())
            known = comp.length() + len(comp.too_wide) + flying + recovering + len(
                driver.jobs.submitted) + sum(1 for event in driver._inbox
                                             if isinstance(event, (DispyJob, dispy.JobCallback)))
            assert known == len(session.jobs), '%d jobs have not ended, %d are known' % (
                len(session.jobs), known)

    def check_node(self, node):
        """CPUs are conserved."""
        used = 0
        for worker in node.tables.workers.values():
            if worker.queue:
                used += worker.queue[0].cpus
        cpus = node.cpus
        assert cpus.free == cpus.total - used, 'CPUs of %s: %d, %d used, %d free' % (
            node.name, cpus.total, used, cpus.free)
        assert cpus.free >= 0 or cpus.total < cpus.most, 'oversubscribed'
        assert node.attempts.held_bytes >= 0

    def check_everywhere(self, driver):
        """Each job once, and all sums right."""
        places, schedule = collections.Counter(), driver.schedule
        for node in schedule.nodes.values():
            works = [work for flight in node.in_flight.values() for work in flight.values()]
            assert node.used == sum(map(dispy.cpus_of, works)) == sum(node.parts.values())
            places.update(work.serial for work in works)
        for comp in schedule.comps.values():
            places.update(work.serial for work in comp.waiting())
            assert max(comp.called.values(),
                       default=0) <= dispy.RECALLS_MOST, 'a job was called back too often'
        assert not places or max(places.values()) == 1, 'a job is in two places'
        for node in schedule.nodes.values():
            for second in node.seconds:
                first = schedule.comps[second.comp].running[second.first.serial]
                assert first is not node, 'a job runs twice on one node'

    def sweep(self):
        """Now and then: what runs is wanted, and what is wanted is there."""
        strange = {}
        for session in filter(None, self.sessions.values()):
            self.check_everywhere(session.driver)
            recovered = set(session.cluster.recovered)   # of which nobody knows yet
            for job in session.jobs.values():
                assert (job.handle.status != DispyJob.Running or job.starts
                        or job.handle in recovered), \
                    'job %d is Running and has never begun' % job.number
            for node in session.driver.schedule.nodes.values():
                strange.update((('is nowhere', *key), self.now)
                               for key in self.missing(session.driver, node))
        for home in self.hosts.values():
            for worker in home.daemon.workers.values():
                if worker.running and not self.is_wanted(home.daemon, worker):
                    strange['runs and nobody wants it', home.name, worker,
                            worker.running] = self.now
        for key in strange:
            strange[key] = self.strange.get(key, self.now)
            assert self.now - strange[key] <= UNWANTED, 'an attempt %s: %s' % (key[0], key[1:])
        self.strange = strange
        self.at(self.now + SWEEP, self.sweep)

    def are_linked(self, link):
        """Whether both ends hear each other and work."""
        if link is None or link.sock.other.link is None or self.slow_network > self.now - 10:
            return False
        return all(plug.quiet is None and plug.owner.alive and not plug.owner.stopped
                   and not plug.closed for plug in (link.sock, link.sock.other))

    def is_wanted(self, daemon, worker):
        comp = daemon.node.tables.comps.get(worker.comp)
        link = daemon.links.get(comp.link) if comp is not None else None
        if not self.are_linked(link):
            return True   # nobody can say
        driver = link.sock.other.owner
        known = driver.schedule.comps.get(worker.comp)
        if known is None:
            return worker.comp in driver.recoveries.by_comp
        seconds = known.seconds.by_serial if known.seconds is not None else ()
        return worker.running in known.running or worker.running in seconds

    def missing(self, driver, node):
        """Attempts that a client believes on a node which does not know them."""
        peer = driver.nodes.by_key.get(node.key)
        if peer is not None and self.are_linked(peer.link):
            there = peer.link.sock.other.owner
            for comp, flight in node.in_flight.items():
                held = set(there.node.results.known_attempts(comp)) if flight else ()
                yield from ((there.host, comp, serial) for serial in flight if serial not in held)
            for second in node.seconds:
                if second.serial not in there.node.results.known_attempts(second.comp):
                    yield there.host, second.comp, second.serial

    def check_end(self):
        for home in self.hosts.values():
            node = home.daemon.node
            assert home.daemon.alive, '%s is not alive at the end' % home.name
            assert (node.cpus.free == node.cpus.total and not node.tables.workers
                    and not node.tables.comps), '%s is not free at the end: %s' % (
                        home.name, [(comp.stage, len(comp.attempts), len(comp.unacknowledged))
                                    for comp in node.tables.comps.values()])
            assert node.lease.state is Lease.FREE and node.attempts.held_bytes == 0
            # Numbers, for a month
            left = [name for name in os.listdir(home.directory) if name != 'memory'
                    and not name.startswith('g-')]
            assert (not node.results.spooled
                    and not left), 'results are left on the disk of %s: %s' % (home.name, left)
        left = [job.number for job in self.jobs.values() if job.status is None]
        assert not left, 'never ended: %s' % left[:20]

    # sessions

    def close(self):
        """Let go of what a failed run has left open."""
        for session in filter(None, self.sessions.values()):
            dispy._clusters.discard(session.cluster)
            if dispy.core_of(session.cluster).journal is not None:
                with contextlib.suppress(OSError):
                    os.close(dispy.core_of(session.cluster).journal._new)
                dispy.core_of(session.cluster).journal._db.close()

    def new_session(self, user):
        if self.over or self.budget <= 0:
            self.sessions[user] = None
            return
        jobs = min(self.budget, int(self.session_jobs * self.rng.uniform(0.5, 1.5)) + 1)
        self.budget -= jobs
        self.sessions[user] = Session(self, user, jobs)

    def session_over(self, session):
        self.budget += session.left
        self.sessions[session.user] = None
        self.at(self.now + self.rng.uniform(0.1, 20.0), self.new_session, session.user)

    def summary(self):
        return ('%d jobs (%s), %d starts, %d kept on disks, %d faults, '
                '%d messages, %d turns in %.1f h, trace %08x'
                % (self.submitted, ', '.join('%d %s' % (count, name.lower()) for name, count
                                             in sorted(self.statuses.items())), self.starts,
                   self.shelved, self.faults, self.messages, self.turns, self.now / 3600,
                   self.trace))


FAULTS = {World.node_killed: 6, World.node_stopped: 4, World.operator: 4, World.worker_killed: 4,
          World.runner_killed: 2, World.disk: 4, World.link_cut: 8, World.blocked_way: 6,
          World.partition: 3, World.slow: 2, World.client_killed: 3, World.client_stopped: 2}
FULL = dict(hosts=50, users=4, jobs=200000, faults=5000, hours=24.0, journals=0.3)


def simulate(seed, **options):
    """One run; returns its World. Raises AssertionError, or what the product raises."""
    # What is synchronised to a disk takes its time
    where = '/dev/shm' if os.path.isdir('/dev/shm') else None
    directory = tempfile.mkdtemp(prefix='dispy-sim-', dir=where)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, True)
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, logging.NOTSET)
        world = World(seed, directory=directory, **options)
        stack.callback(world.close)
        try:
            world.run()
        except BaseException:
            print('seed %d fails at %.6f s' % (seed, world.now), flush=True)
            raise
        return world


FACTS = dispynode.node_facts()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--seeds', type=int, default=1, help='so many, from --seed on')
    parser.add_argument('--full', action='store_true',
                        help='24 h, 50 nodes, 200,000 jobs, 5,000 faults')
    parser.add_argument('--profile', action='store_true')
    args = parser.parse_args(argv)
    for seed in range(args.seed, args.seed + args.seeds):
        began = time.monotonic()
        if args.profile:
            import cProfile
            profile = cProfile.Profile()
            world = profile.runcall(simulate, seed, **FULL if args.full else {})
            profile.print_stats('tottime')
        else:
            world = simulate(seed, **FULL if args.full else {})
        print('seed %d: %s; %.1f s' % (seed, world.summary(), time.monotonic() - began), flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
