"""A conversation with a Node: what it is told, and what it does about that. One method is one
turn."""

import collections

from dispynode import (
    Ack, Compute, SendToWorker, ClientHello, Jobs, LinkUp, Node, Outcome, DirectoryReady, Received,
    Results, RunnerUp, Send, WorkerResults)


def spec(**changes):
    fields = {'name': 'compute', 'kind': 'function', 'code': b'code', 'files': [], 'cleanup': True,
              'dest_path': '', 'max_jobs': 0, 'python': (3, 8), 'support': {}, 'program': '',
              'live': False, 'logs': -1, 'cpus': 0, 'setup_args': b'',
              'modules': [], 'portable': False, 'sys_path': [], 'argv': []}
    return dict(fields, **changes)


def result(serial, outcome=Outcome.RETURNED, took=1.0):
    return (serial, int(outcome), 0.0, took, b'value', b'out', b'err')


def bounded(node):
    """A turn in which timers become due without end fails instead of going on for ever."""
    pop, turns = node.timers.pop, collections.Counter()

    def counted():
        timer = pop()
        turns[node.tables.now, timer.call] += 1
        assert turns[node.tables.now, timer.call] < 20000, 'timer %s is due again and again' % (
            timer,)
        return timer
    node.timers.pop = counted


def row_of(name):
    return (name, 5, b'd' * 32, 0o600)


class Talk:
    """A node and what it said; each method is one turn."""

    def __init__(self, cpus=2, **rules):
        self.node, self.now = Node('host', cpus, {'fact': 1}, **rules), 0.0
        bounded(self.node)

    def tell(self, *events):
        actions = []
        for event in events:
            actions += self.node.handle(event, self.now)
        return actions + self.node.flush(self.now)

    def after(self, seconds):
        self.now += seconds
        return self.tell()

    def link(self, link=1, instance=b'me', name='me@here', process=('here', 7, 0)):
        self.tell(LinkUp(link, instance, 'address'))
        return self.say(ClientHello(name, 2.0, process), link)

    def say(self, message, link=1):
        return self.tell(Received(link, message))

    def compute(self, comp='c', link=1, **changes):
        return self.say(Compute(comp, spec(**changes)), link)

    def ready(self, comp='c', link=1, **changes):
        """A computation that is set up."""
        if link not in self.node.tables.links:
            self.link(link)
        self.compute(comp, link, **changes)
        self.tell(DirectoryReady(comp, []))
        return self.tell(RunnerUp(comp))

    def jobs(self, *serials, comp='c', link=1, payload=b'12', **options):
        return self.say(Jobs(comp, [(serial, payload, options or None) for serial in serials]),
                        link)

    def results(self, worker, *rows):
        return self.tell(
            WorkerResults(worker, [row if type(row) is tuple else result(row) for row in rows]))

    def learn_short(self, serial=900, comp='c'):
        """Jobs take 0.1 ms: workers are fed ahead."""
        self.results(fed(self.jobs(serial, comp=comp))[0][0], result(serial, took=0.0001))
        self.say(Ack(comp, [serial]))


def only(actions, kind):
    return [action for action in actions if type(action) is kind]


def fed(actions):
    return [(action.worker, [attempt.serial for attempt in action.attempts])
            for action in only(actions, SendToWorker)]


def said(actions, kind):
    return [action.message for action in only(actions, Send) if type(action.message) is kind]


def rows(actions):
    """(serial, outcome) of all results sent."""
    return [(row[0], Outcome(row[1])) for message in said(actions, Results) for row in message.rows]


def texts(actions):
    return {row[0]: bytes(row[4]).decode() for message in said(actions, Results)
            for row in message.rows}
