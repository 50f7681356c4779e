"""A conversation with the parts of a driver, without sockets and threads: what they are told, what
they say to nodes, and which events they hand to the Schedule."""

import types

from dispy import (
    PackedComputation, ComputationSetup, DriverParts, FileTransfers, HeldBack, NodePolicy,
    NodeSelection, NodeSpec, NodeTable, NodeUser, Opened, Schedule)
from dispynode import NodeHello

SPEC = {'kind': 'function', 'portable': False, 'python': (3, 8, 0), 'code': b'code',
        'setup_args': b'', 'files': []}


class FakeLink:
    """The link to a node: `abandoned` are the computations whose parts are not wanted any more."""
    bytes_out = bytes_in = 0
    heard = 0.0
    queued = 0

    def __init__(self, number):
        self.number = number
        self.abandoned = []
        self.sock = self

    def abandon(self, comp):
        self.abandoned.append(comp)

    def getsockname(self):
        return ('127.0.0.1', 1)

    def getpeername(self):
        return ('127.0.0.2', 2)


class FakeSearch:
    """Notes where nodes are asked for."""

    def __init__(self):
        self.begun = []

    def begin(self, port, multicast):
        self.begun.append((port, multicast))


class FakeConnector:
    """Has searches, and connects to nothing."""

    def __init__(self):
        self.searches = FakeSearch()


class Cluster(NodeUser):
    """A cluster that notes what it is told."""

    def __init__(self, comp='c', specs=(), **spec):
        self.comp = self.name = comp
        self.specs = list(specs)
        self.packed = PackedComputation(dict(SPEC, **spec), {}, False, lambda: (b'', ''))
        self.warnings, self.asked_source, self.asked_allocators, self.ready = [], [], [], []
        self.values, self.modules, self.pieces = {}, {}, []

    def warn(self, text):
        self.warnings.append(text)

    def ask_source(self, peer, link):
        self.asked_source.append((peer, link))

    def ask_allocator(self, allocator, peer, link):
        self.asked_allocators.append(allocator)

    def node_ready(self, peer):
        self.ready.append(peer)

    def value_source(self, digest):
        return self.values.get(digest)

    def module_source(self, name):
        return self.modules.get(name)

    def file_piece(self, peer, job, message):
        self.pieces.append((peer, job, message))


class FakeJobs:
    """The part that has the jobs, of which none left."""

    def __init__(self):
        self.outgoing = self
        self.at_nodes = {}

    def drop(self, peer):
        return []

    def job_of(self, peer, comp, serial):
        return self.at_nodes.get((comp, serial))


class FakeDriver:
    """What the parts use of a driver; the parts themselves are real. `said` are the messages to
    nodes and `decided` the events for the Schedule, since they were asked for last."""

    def __init__(self):
        self.now = 100.0
        self.nodes = NodeTable()
        self.clusters, self.links = {}, {}
        self.schedule = Schedule()
        self.policy = NodePolicy()
        self.parts = DriverParts()
        self.access = types.SimpleNamespace(redial=30.0)
        self.connector = FakeConnector()
        self.recoveries = types.SimpleNamespace(by_comp={})
        self.queries = self.lost_nodes = self
        self.jobs = FakeJobs()
        self.answers, self.told, self.parted, self.broken = [], [], [], []
        self._said, self._decided = [], []
        self.selection = NodeSelection(self)
        self.setup = ComputationSetup(self)
        self.files = FileTransfers(self)
        self.held_back = HeldBack(self)

    # What the parts call.

    def send(self, link, message):
        self._said.append((link.number, message))

    def say_to(self, peer, message):
        self.send(peer.link, message)

    def decide(self, event):
        self._decided.append(event)

    def is_over(self, comp):
        return comp not in self.clusters and comp not in self.recoveries.by_comp

    def doubt(self, event):
        self.decide(event)

    def back(self, peer):
        pass

    def soon(self):
        pass

    def tell_all(self, status, peer, comps):
        self.told.append((status, peer, comps))

    def disconnect(self, link, text):
        self.parted.append((link.number, text))

    def break_link(self, link, text):
        self.broken.append((link.number, text))

    def answer(self, peer, what, value):
        self.answers.append((what, value))

    # What tests call.

    def said(self, kind=object):
        said, self._said = self._said, []
        return [message for _, message in said if isinstance(message, kind)]

    def decided(self, kind=object):
        decided, self._decided = self._decided, []
        return [event for event in decided if isinstance(event, kind)]

    def open(self, cluster):
        """As Driver.open does it."""
        self.clusters[cluster.comp] = cluster
        self.schedule.handle(Opened(cluster.comp, cluster.client, False), self.now)
        self.selection.use(cluster.comp, cluster.specs)
        return cluster

    def welcome(self, peer, cpus=4, python=(3, 8, 0), **facts):
        """The node is connected, and tells what it is."""
        peer.link = FakeLink(len(self.links) + 1)
        peer.move('dial')
        peer.move('connect')
        self.links[peer.link.number] = peer.link
        self.nodes.by_link[peer.link.number] = peer
        self.setup.on_welcome(peer, NodeHello('node', cpus, dict(facts, python=python)))
        return peer

    def one(self, comp='c'):
        """The only node of a computation."""
        peer, = self.nodes.of(comp)
        return peer

    def connected(self, cluster=None, **facts):
        """A cluster that names one node, which is connected: (cluster, node)."""
        cluster = cluster or Cluster(specs=[NodeSpec('10.0.0.1', 9701)])
        self.open(cluster)
        return cluster, self.welcome(self.one(cluster.comp), **facts)
