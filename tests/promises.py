"""Schedule and nodes with workers on a virtual clock, and jobs whose lengths are chosen to fool
them.

Real are `Schedule` and `Node`, which decide; modelled are links with a round trip, pipes and
workers. Jobs are `Trial`s, that know when they were submitted, began and ended. What is promised is
checked by whoever runs it; see test_promises.py.
"""

import collections
import heapq
import itertools
import random

from dispy import (
    JobWaits, NodeOffers, NodeReady, NodeResults, NodeReturned, NodeStarted, Opened, Schedule,
    SendAck, SendCancel, SendJobs, SendRecall, Submitted, ScheduledJob)
from dispynode import (
    Ack, Cancel, Compute, SendToWorker, Interrupt, Jobs, Limit, LinkUp, Node, Outcome,
    DirectoryReady, Ready, ReturnJobs, Received, Results, JobsReturned, RunnerUp, Send, Started,
    StartWorker, TakeFromWorker, WorkerResults, WorkerReturnedJobs)

PIPE = 0.0003      # s between a daemon and its workers
BIRTH = 0.005      # s until a worker that is forked is there
SPEC = {'name': 'compute', 'kind': 'function', 'code': b'', 'files': [], 'cleanup': True,
        'dest_path': '', 'max_jobs': 0, 'python': (3, 8),
        'support': {}, 'program': '', 'live': False, 'logs': -1, 'cpus': 0, 'setup_args': b''}


def quick_first(rng):
    """So many that take no time, then long ones."""
    yield from [0.0001] * rng.choice((1, 3, 20, 100))
    while True:
        yield 1.0


def one_slow_among_quick(rng):
    """One in forty is long."""
    for number in itertools.count(rng.randrange(40)):
        yield 2.0 if number % 40 == 39 else 0.002


def alternating(rng):
    """A short one, a long one."""
    for length in itertools.cycle((0.001, 0.5)):
        yield length


def growing(rng):
    """From a millisecond to some seconds."""
    length = 0.001
    while True:
        yield length
        length = min(3.0, length * rng.uniform(1.0, 1.1))


def bimodal(rng):
    """Short or long, in no order."""
    while True:
        yield 0.001 if rng.random() < 0.8 else 1.0


def bursts(rng):
    """Many short ones, then some long ones, and again."""
    while True:
        yield from [0.0005] * rng.randrange(1, 300)
        yield from [1.5] * rng.randrange(1, 12)


SHAPES = (quick_first, one_slow_among_quick, alternating, growing, bimodal, bursts)


class Trial(ScheduledJob):
    """A job, and what became of it."""
    __slots__ = ('length', 'submitted', 'began', 'ended', 'node', 'calls')

    def __init__(self, comp, length, now, **options):
        super().__init__(comp, b'', options or None)
        self.length, self.submitted = length, now
        self.began = self.ended = self.node = None
        self.calls = 0       # times that it came back without having begun


class Place:
    """A node with its workers, at the other end of a link."""

    def __init__(self, world, key, cpus, trip):
        self.world, self.key, self.cpus, self.trip = world, key, cpus, trip
        self.node, self.workers, self.due = Node(key, cpus, {}), {}, None
        # Since when CPUs are idle; who begins takes the one that is so for longest
        self.idle = collections.deque([0.0] * cpus)
        self.tell(LinkUp(1, b'me', 'here'))

    def set_up(self, comp, client):
        for event in (Received(1, Compute(comp, dict(SPEC, client=client))),
                      DirectoryReady(comp, []), RunnerUp(comp)):
            self.tell(event)

    def tell(self, *events):
        """One turn."""
        now = self.world.now
        for event in events:
            self.act(self.node.handle(event, now))
        self.act(self.node.flush(now))
        when = self.node.next_timer()
        if when is not None and (self.due is None or when < self.due):
            self.due = max(when, now)
            self.world.at(self.due, self.ring, self.due)

    def ring(self, due):
        """Its timer."""
        if self.due == due:
            self.due = None
            self.tell()

    def act(self, actions):
        for action in actions:
            kind = type(action)
            if kind is Send:
                self.world.at(self.world.now + self.trip / 2, self.world.hear, self, action.message)
            elif kind is StartWorker:
                self.workers[action.worker] = ModelWorker(self, action.worker)
            elif kind is SendToWorker:
                serials = [attempt.serial for attempt in action.attempts]
                self.workers[action.worker].later(self.workers[action.worker].feed, serials)
            elif kind is TakeFromWorker:
                self.workers[action.worker].later(self.workers[action.worker].take_back)
            elif kind is Interrupt:
                self.workers[action.worker].later(self.workers[action.worker].interrupt,
                                                  action.serial)


class ModelWorker:
    """A worker process: job after job."""

    def __init__(self, place, key):
        self.place, self.key, self.queue, self.job, self.ticket = (place, key, collections.deque(),
                                                                   None, 0)
        self.born_at = place.world.now + BIRTH

    def later(self, call, *args):
        world = self.place.world
        world.at(max(world.now + PIPE, self.born_at), call, *args)

    def feed(self, serials):
        self.queue.extend(serials)
        if self.job is None:
            self.next()

    def next(self):
        world = self.place.world
        if not self.queue:
            self.job = None
            return
        serial = self.queue.popleft()
        self.job = world.trials[serial >> 16]
        assert self.job.began is None, 'a job begins twice'
        self.job.began, self.job.node = world.now, self.place
        world.started(self.job)
        self.ticket += 1
        world.at(world.now + self.job.length, self.finish, serial, self.ticket, Outcome.RETURNED)

    def finish(self, serial, ticket, outcome):
        if ticket != self.ticket or self.job is None:
            return
        world = self.place.world
        self.job.ended = world.now
        row = (serial, int(outcome), 1.0, 1.0 + world.now - self.job.began, b'', b'', b'')
        world.at(world.now + PIPE, self.place.tell, WorkerResults(self.key, [row]))
        world.finished(self.job)
        self.next()

    def interrupt(self, serial):
        if self.job is not None and self.job.serial == serial:
            self.finish(serial, self.ticket, Outcome.RAISED)

    def take_back(self):
        back = list(self.queue)
        self.queue.clear()
        self.place.world.at(self.place.world.now + PIPE, self.place.tell,
                            WorkerReturnedJobs(self.key, back))


class World:
    """A schedule and its nodes. `submit` gives jobs, `run` lets time pass."""

    def __init__(self, nodes, trip, fifo=False):
        self.now, self.heap, self.order = 0.0, [], itertools.count()
        self.schedule, self.due = Schedule(fifo), None
        self.trials, self.comps, self.trip = {}, {}, trip
        self.places = {key: Place(self, key, cpus, trip) for key, cpus in nodes.items()}
        self.begun = []            # in order
        self.submitted = 0
        self.waiting_since = 0.0   # when there was no job last that had not begun
        # (seconds for which a CPU was idle though a job waited, node, until when)
        self.gaps = []

    def at(self, when, call, *args):
        heapq.heappush(self.heap, (when, next(self.order), call, args))

    def run(self, until):
        """Let time pass."""
        while self.heap and self.heap[0][0] <= until:
            when, _, call, args = heapq.heappop(self.heap)
            self.now = max(self.now, when)
            call(*args)
        self.now = until

    def open(self, comp, client=None, nodes=None):
        """A computation, set up on these nodes or all."""
        self.comps[comp] = []
        self.event(Opened(comp, client or comp, True))
        for key in nodes or self.places:
            self.places[key].set_up(comp, client or comp)

    def submit(self, comp, lengths, **options):
        """Jobs of these lengths."""
        works = [Trial(comp, length, self.now, **options) for length in lengths]
        self.comps[comp] += works
        if self.submitted == len(self.begun):
            self.waiting_since = self.now
        self.submitted += len(works)
        self.act(self.schedule.handle(Submitted(works), self.now))
        for work in works:
            self.trials[work.serial >> 16] = work
        self.turn()
        return works

    def event(self, *events):
        for event in events:
            self.act(self.schedule.handle(event, self.now))
        self.turn()

    def turn(self):
        self.act(self.schedule.flush(self.now))
        when = self.schedule.next_timer()
        if when is not None and (self.due is None or when < self.due):
            self.due = max(when, self.now)
            self.at(self.due, self.ring, self.due)

    def ring(self, due):
        """The schedule's timer."""
        if self.due == due:
            self.due = None
            self.turn()

    def act(self, actions):
        for action in actions:
            kind = type(action)
            if kind is SendJobs:
                rows = [(work.serial, b'', work.options) for work in action.works]
                self.say(action.node, Jobs(action.comp, rows))
            elif kind in (SendRecall, SendCancel, SendAck):
                self.say(action.node, {SendRecall: ReturnJobs, SendCancel: Cancel,
                                       SendAck: Ack}[kind](action.comp, action.serials))
            elif kind is JobWaits:
                action.work.calls += 1

    def say(self, key, message):
        place = self.places[key]
        self.at(self.now + place.trip / 2, place.tell, Received(1, message))

    def limit(self, key, comp, cpus):
        """The user changes the CPUs of a node."""
        self.say(key, Limit(comp, cpus))
        self.event(NodeOffers(key, comp, cpus))

    def hear(self, place, message):
        """A node's message arrives."""
        kind = type(message)
        if kind is Ready:
            self.event(NodeReady(place.key, message.comp, place.cpus, message.held, '', place.cpus,
                                 place.trip))
        elif kind in (Results, JobsReturned, Started):
            event = {Results: NodeResults, JobsReturned: NodeReturned, Started: NodeStarted}[kind]
            self.event(event(place.key, message.comp, message[1]))

    def started(self, job):
        self.gaps.append((self.now - max(job.node.idle.popleft(), self.waiting_since), job.node.key,
                          self.now))
        self.begun.append(job)

    def finished(self, job):
        job.node.idle.append(self.now)

    def waiting(self):
        """Jobs that have not begun."""
        return [job for jobs in self.comps.values() for job in jobs if job.began is None]


def lengths(shape, rng, count):
    """Of so many jobs."""
    return list(itertools.islice(shape(rng), count))


def seeded(*parts):
    """A random generator that is the same in each run."""
    return random.Random(repr(parts))
