"""A random walk of a Schedule: model nodes, what happens to them, and what must be true at any
time."""

import collections
import random

from dispy import (
    AHEAD_BYTES, ENDED, CancelAsked, Closed, JobEnded, JobParked, JobsEnded, JobsStarted, JobState,
    JobWaits, NodeAway, NodeDrained, NodeDrains, NodeGone, NodeLeft, NodeLost, NodeOffers,
    NodeReady, NodeResults, NodeReturned, NodeStarted, Opened, Schedule, ScheduledJob, SendAck,
    SendCancel, SendJobs, SendRecall, Submitted, Withdrawn, cpus_of)
from dispynode import Outcome, size_of
from talk_schedule import only

WAITING = (JobState.CREATED, JobState.REQUEUED)


class ModelNode:
    """What a node does, as far as a schedule sees it; messages to and from it take their time."""

    def __init__(self, key, cpus):
        self.key, self.cpus = key, cpus
        self.linked = self.stopping = self.away = False
        self.comps = set()
        self.forget()

    def forget(self):
        """A new process: nothing is known of what was."""
        self.waiting = collections.OrderedDict()    # (comp, serial) -> CPUs
        self.running = {}
        self.results = {}      # (comp, serial) -> row, not acknowledged
        self.cut()

    def cut(self):
        """The link breaks; what is on it is gone."""
        self.inbox, self.outbox = collections.deque(), collections.deque()

    def held(self, comp):
        return [serial for place in (self.waiting, self.running, self.results)
                for name, serial in place if name == comp]

    def take(self, rng):
        """Read a message."""
        kind, comp, what = self.inbox.popleft()
        if kind is SendJobs:
            for serial, cpus in what:
                if not any((comp, serial) in place
                           for place in (self.waiting, self.running, self.results)):
                    self.waiting[comp, serial] = cpus
        elif kind is SendAck:
            for serial in what:
                self.results.pop((comp, serial), None)
        elif kind is SendCancel:
            for serial in what:
                if (comp, serial) in self.waiting or ((comp, serial) in self.running
                                                      and rng.random() < 0.8):
                    self.end((comp, serial), Outcome.CANCELLED, 0.0)
        elif kind is SendRecall:
            keys = [(comp, serial) for serial in what if (comp, serial) in self.waiting]
            for key in keys:
                del self.waiting[key]
            self.outbox.append(NodeReturned(self.key, comp, [serial for _, serial in keys]))
            begun = [(serial, 0.0) for serial in what if (comp, serial) in self.running]
            if begun:
                self.outbox.append(NodeStarted(self.key, comp, begun))
        else:
            for place in (self.waiting, self.running, self.results):
                for key in [key for key in place if key[0] == comp]:
                    del place[key]
        self.start()

    def start(self):
        while self.waiting:
            key, cpus = next(iter(self.waiting.items()))
            if cpus > self.cpus - sum(self.running.values()):
                return
            self.running[key] = self.waiting.pop(key)

    def end(self, key, outcome, took):
        self.waiting.pop(key, None)
        self.running.pop(key, None)
        self.results[key] = (key[1], int(outcome), 10.0, 10.0 + took, b'', b'', b'')
        self.outbox.append(NodeResults(self.key, key[0], [self.results[key]]))
        self.start()


class Walk:
    """A schedule, model nodes, and books of what must be true."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.schedule = Schedule()
        self.nodes = {key: ModelNode(key, self.rng.choice((1, 2, 2, 4)))
                      for key in range(self.rng.randint(1, 4))}
        self.works, self.ended = [], {}
        # Work -> its last attempt; attempts that were never started
        self.sent, self.free_again = {}, set()
        self.serials, self.open, self.reentrant, self.opened = set(), [], {}, 0
        self.recalls = 0
        self.drains, self.drained = set(), []     # (node, comp) that drain, and that have
        self.now, self.gone = 0.0, set()

    # what happens

    def open_one(self):
        comp = 'c%d' % self.opened
        self.opened += 1
        self.reentrant[comp] = self.rng.random() < 0.6
        self.open.append(comp)
        self.event(Opened(comp, self.rng.choice('xyz'), self.reentrant[comp]))
        for node in self.nodes.values():
            if node.linked and not node.away:
                self.set_up(node, comp)

    def set_up(self, node, comp):
        node.comps.add(comp)
        self.drains.discard((node.key, comp))
        held = node.held(comp)
        flight = (self.schedule.nodes[node.key].in_flight.get(comp, {})
                  if node.key in self.schedule.nodes else {})
        self.free_again.update(set(flight) - set(held))
        for (name, _), result in node.results.items():
            if name == comp:
                node.outbox.append(NodeResults(node.key, comp, [result]))
        self.event(NodeReady(node.key, comp, node.cpus, held))

    def submit(self):
        rng, works = self.rng, []
        for _ in range(rng.choice((1, 2, 5, 20))):
            options = {}
            if rng.random() < 0.2:
                options['cpus'] = rng.randint(1, 4)
            if rng.random() < 0.2:
                options['priority'] = rng.randint(-1, 2)
            size = AHEAD_BYTES // 3 if rng.random() < 0.1 else 10
            works.append(ScheduledJob(rng.choice(self.open), range(size), options or None))
        self.works += works
        self.event(Submitted(works))

    def step(self):
        rng = self.rng
        node = rng.choice(list(self.nodes.values()))
        what = rng.random()
        if not self.open or (what < 0.01 and self.opened < 6):
            self.open_one()
        elif what < 0.12:
            self.submit()
        elif what < 0.18 and self.works:
            self.event(CancelAsked(rng.choice(self.works[-60:])))
        elif what < 0.19:
            self.close(rng.choice(self.open))
        elif what < 0.22:
            self.trouble(node)
        elif not node.linked:
            node.linked = True
            for comp in self.open:
                self.set_up(node, comp)
        elif node.away and rng.random() < 0.2:
            self.back(node) if rng.random() < 0.7 else self.wait(node)
        else:
            self.go_on(node)

    def trouble(self, node):
        what = self.rng.random()
        if not node.linked or node.away:
            return
        if node.comps and self.rng.random() < 0.4:
            comp = self.rng.choice(sorted(node.comps))
            if what < 0.7:
                self.event(NodeOffers(node.key, comp, self.rng.randint(0, node.cpus)))
            else:
                self.drains.add((node.key, comp))
                self.event(NodeDrains(node.key, comp))
            return
        # A break: the client comes back before the node is given up, or does not
        if what < 0.3:
            node.cut()
            node.away = True
            self.event(NodeAway(node.key, 'host', 'broken', self.now + 5.0))
            if self.rng.random() < 0.5:
                self.back(node)
            return
        if what < 0.5 and node.comps:
            comp = self.rng.choice(sorted(node.comps))
            node.comps.discard(comp)
            node.inbox.append((None, comp, None))
            self.event(NodeLeft(node.key, comp, 'host', 'left'))
            return
        self.lose(node, what < 0.8)

    def back(self, node):
        node.away = False
        # Of computations that were closed meanwhile
        for place in (node.waiting, node.running, node.results):
            for key in [key for key in place if key[0] not in self.open]:
                del place[key]
        for comp in self.open:
            self.set_up(node, comp)

    def wait(self, node):
        """Until the node is given up; it goes on all the same."""
        self.now += 6.0
        for other in self.nodes.values():
            if other.away and other.key in self.schedule.nodes:
                self.gone.add(other.key)
            if other.away:
                other.linked = other.away = other.stopping = False
                other.comps.clear()
                other.cut()
        self.act(self.schedule.flush(self.now))
        assert not self.gone
        self.check()

    def lose(self, node, restarted):
        node.linked = node.stopping = node.away = False
        node.comps.clear()
        node.cut()
        if restarted:
            node.forget()
        self.event(NodeLost(node.key, 'host', 'broken'))

    def go_on(self, node):
        """Something on a node, or on the way to or from it."""
        rng = self.rng
        what = rng.random()
        if node.inbox and what < 0.4:
            node.take(rng)
        elif node.running and what < 0.7:
            outcome = rng.choice([Outcome.RETURNED] * 6
                                 + [Outcome.RAISED, Outcome.DIED, Outcome.TIMED_OUT])
            if rng.random() < 0.02:
                outcome, node.stopping = Outcome.STOPPED, True
            node.end(rng.choice(sorted(node.running)), outcome,
                     rng.choice((0.001, 0.001, 0.03, 0.5)))
        elif node.outbox and not node.away:
            event = node.outbox.popleft()
            if type(event) is NodeReturned:
                self.free_again.update(event.serials)
            self.event(event)
        elif node.stopping:
            self.lose(node, True)

    def close(self, comp):
        self.open.remove(comp)
        self.event(Closed(comp))
        for node in self.nodes.values():
            node.comps.discard(comp)
            if node.linked:
                node.inbox.append((None, comp, None))

    def drain(self):
        """Everything works from now on: everything ends."""
        for turn in range(100000):
            if all(work.state in ENDED for work in self.works):
                return
            if turn == 0:
                self.nodes['large'] = ModelNode('large', 4)
                for node in list(self.nodes.values()):
                    for comp in sorted(node.comps) if node.linked else ():
                        self.event(NodeOffers(node.key, comp, node.cpus))
            for node in self.nodes.values():
                if node.away:
                    self.back(node)
                if not node.linked:
                    node.linked = True
                for comp in self.open:
                    if comp not in node.comps:
                        self.set_up(node, comp)
                self.go_on(node)
        raise AssertionError('these do not end: %s'
                             % [work for work in self.works if work.state not in ENDED])

    # what is said and must be true

    def event(self, event):
        self.act(self.schedule.handle(event, self.now))
        self.check()
        self.act(self.schedule.flush(self.now))
        self.check()
        self.check_no_idle_cpu()
        while self.drained:
            key, comp = self.drained.pop()
            if (key, comp) in self.drains and comp in self.nodes[key].comps:
                self.nodes[key].comps.discard(comp)
                self.nodes[key].inbox.append((None, comp, None))
                self.event(NodeLeft(key, comp, 'host', 'left'))
            self.drains.discard((key, comp))

    def act(self, actions):
        batches = collections.Counter((action.node, action.comp)
                                      for action in only(actions, SendJobs))
        assert not batches or max(batches.values()) == 1
        for action in actions:
            kind = type(action)
            if kind is JobEnded:
                self.end(action.work)
            elif kind is JobWaits or kind is JobParked:
                # Again, in the same turn
                assert action.work.state in WAITING or action.work.state is JobState.SENT
            elif kind is JobsStarted or kind is Withdrawn:
                continue
            elif kind is JobsEnded:
                for work, _ in action.pairs:
                    self.end(work)
            elif kind is NodeGone:
                self.gone.discard(action.node)
            elif kind is NodeDrained:
                assert not self.schedule.nodes[action.node].in_flight[action.comp]
                self.drained.append((action.node, action.comp))
            else:
                node = self.nodes[action.node]
                assert node.linked
                if node.away:   # nothing can be sent, and nothing new is
                    assert kind is not SendJobs
                    continue
                what = self.rows(action) if kind is SendJobs else action.serials
                node.inbox.append((kind, action.comp, what))

    def rows(self, action):
        for work in action.works:
            assert work.serial not in self.serials, 'a serial is used again'
            self.serials.add(work.serial)
            before = self.sent.get(work)
            if before is not None and not self.reentrant[work.comp]:
                assert before in self.free_again, 'a job that is not reentrant was sent twice'
            self.sent[work] = work.serial
        return [(work.serial, cpus_of(work)) for work in action.works]

    def end(self, work):
        assert work not in self.ended and work.state in ENDED, 'ended twice'
        self.ended[work] = work.state

    def check(self):
        places = collections.Counter()
        flying = collections.Counter()
        for node in self.schedule.nodes.values():
            works = [(name, serial, work) for name, flight in node.in_flight.items()
                     for serial, work in flight.items()]
            assert (node.used == sum(cpus_of(work) for _, _, work in works)
                    == sum(node.parts.values()))
            assert set(node.parts) == set(node.limits) == set(node.in_flight) == set(node.comps)
            assert node.cpus == max(node.limits.values(), default=0)
            assert node.cpus_reserved == sum(min(node.parts[name], node.limits[name])
                                             for name in node.parts)
            assert node.bytes == sum(size_of(work.payload) for _, _, work in works)
            for name, serial, work in works:
                assert work.serial == serial and work.comp == name
                assert self.schedule.comps[name].running[serial] is node
                flying[name] += cpus_of(work)
                places[work] += 1
        for comp in self.schedule.comps.values():
            queue = list(comp.queue)
            assert comp.queue.length == len(queue)
            assert comp.cpus_in_flight == flying[comp.comp]
            assert len(comp.running) == sum(len(node.in_flight.get(comp.comp, ()))
                                            for node in self.schedule.nodes.values())
            for work in queue + comp.too_wide:
                assert work.state in WAITING
                places[work] += 1
        for work in self.works:
            assert places[work] == (0 if work in self.ended else 1), 'not in exactly one place'
            assert (work.state in ENDED) == (work in self.ended)
            if work in self.ended:
                assert work.state is self.ended[work]

    def check_no_idle_cpu(self):
        for node in self.schedule.nodes.values():
            for comp in node.comps.values() if node.away is None else ():
                head = comp.queue.head()
                if node.room(comp.comp) > 0 and head is not None:
                    assert cpus_of(head) > node.room(comp.comp), 'a CPU is idle and a job waits'
