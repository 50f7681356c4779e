"""The part of a driver that connects to nodes, by itself: when it dials which, and what becomes of
a connection. Attempts are noted, and nothing is connected."""

import pytest

from dispy import DIALS_MOST, FOUND_FAILURES, Connector, NodeSpec, NodeState, NodeTried
from dispynode import (
    PULSE, PULSES_LOST, Authenticated, ClientHello, Connected, ConnectFailed, Reconnector, Role,
    Session, Unreached)
from talk_driver import Cluster, FakeDriver

KEY = b'k' * 32


class Socket:
    """One that is only closed."""
    closed = False

    def setblocking(self, flag):
        pass

    def close(self):
        self.closed = True


class Dialling(Reconnector):
    """Attempts without threads: they are noted."""

    def __init__(self):
        super().__init__(0.5, 30.0)
        self.attempts = []

    def start(self, post, peer, reach, attempt=None):
        self.due = None
        self.attempts.append(peer)


class User(Cluster):
    """A cluster that notes which nodes cannot be reached."""

    def __init__(self, *specs):
        super().__init__(specs=specs)
        self.unreachable = []

    def node_unreachable(self, peer, text):
        self.unreachable.append((peer, text))


class Driver(FakeDriver):
    """One with the real part."""
    instance = bytes(16)

    def __init__(self):
        super().__init__()
        self.access.pulse = PULSE
        self.attached = []
        searches = self.connector.searches
        self.connector = Connector(self, KEY, None)
        self.connector.searches = searches

    def attach(self, link):
        self.attached.append(link)

    def post(self, event):
        raise AssertionError('a thread has ended, and there is none')

    def use(self, *names):
        """A cluster that names these nodes."""
        user = self.open(User(*[NodeSpec(name, 9701) for name in names]))
        for peer in self.nodes.by_key.values():
            peer.reconnector = Dialling()
        return user

    def dial(self):
        """When to look again."""
        due = []
        self.connector.dial_when_due(due)
        return due

    def reach(self, peer, instance=b'i' * 16):
        """A node that was dialled answers; its socket."""
        sock = Socket()
        session = Session(KEY, KEY, instance, Role.NODE)
        self.connector.dialled(Connected(peer, sock, session, peer.host))
        return sock

    def arrives(self, address, instance=b'i' * 16):
        """A node has dialled; its socket."""
        sock = Socket()
        session = Session(KEY, KEY, instance, Role.NODE)
        self.connector.arrived(Authenticated(sock, session, address))
        return sock

    def fail(self, peer, text='no way leads there'):
        self.connector.dial_failed(ConnectFailed(peer, text, Unreached.UNREACHABLE))


@pytest.fixture
def driver():
    return Driver()


# -- when nodes are dialled ------------------------------------------------------------------------

def test_a_node_is_dialled_when_it_is_due_and_once(driver):
    driver.use('10.0.0.1', '10.0.0.2')
    first, second = driver.nodes.of('c')
    second.reconnector.due = driver.now + 3.0
    assert driver.dial() == [driver.now + 3.0]
    assert driver.dial() == [driver.now + 3.0]
    assert first.reconnector.attempts == [first] and first.state is NodeState.DIALLING
    assert second.reconnector.attempts == []
    driver.now += 3.0
    assert driver.dial() == [] and second.reconnector.attempts == [second]


def test_so_many_are_dialled_at_a_time_and_each_end_makes_place(driver):
    driver.use(*['10.0.%d.%d' % (n // 200, n % 200) for n in range(DIALS_MOST + 3)])
    peers = driver.nodes.of('c')

    def begun():
        return [peer for peer in peers if peer.reconnector.attempts]
    driver.dial()
    driver.dial()
    assert len(begun()) == DIALS_MOST
    driver.fail(begun()[0])
    driver.reach(begun()[1])
    driver.dial()
    assert len(begun()) == DIALS_MOST + 2


def test_who_cannot_be_reached_is_tried_again_after_longer_and_longer_waits(driver):
    user = driver.use('10.0.0.1')
    peer = driver.one()
    waits = []
    for _ in range(9):
        driver.dial()
        driver.fail(peer)
        waits.append(peer.reconnector.due - driver.now)
        assert peer.state is NodeState.UNREACHED and peer.reason == 'no way leads there'
        driver.now = peer.reconnector.due
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert user.unreachable == [(peer, 'no way leads there')]   # each reason once
    driver.dial()
    driver.fail(peer, 'the secret is another one')
    assert [text for _, text in user.unreachable] == ['no way leads there',
                                                      'the secret is another one']


@pytest.mark.parametrize('named', [True, False])
def test_a_node_that_was_found_and_does_not_answer_is_forgotten(driver, named):
    driver.use('10.0.0.1')
    peer = driver.one()
    peer.listed, peer.heard = named, driver.now
    for _ in range(FOUND_FAILURES + 1):
        driver.dial()
        driver.fail(peer)
        driver.now = peer.reconnector.due
    assert driver.nodes.has(peer)           # it has answered by UDP lately
    driver.now += 3 * driver.access.redial
    driver.dial()
    driver.fail(peer)
    assert driver.nodes.has(peer) is named


# -- what becomes of a connection ------------------------------------------------------------------

def test_a_node_that_is_reached_is_greeted_and_what_is_there_is_not_lost_yet(driver):
    driver.use('10.0.0.1')
    peer = driver.one()
    driver.dial()
    driver.decided()
    sock = driver.reach(peer)
    assert not sock.closed and driver.attached == [peer.link] and peer.link.sock is sock
    assert driver.nodes.by_link[peer.link.number] is peer
    hello, = driver.said()
    assert type(hello) is ClientHello and hello.pulse == PULSE
    assert driver.decided(NodeTried)[-1].until == driver.now + PULSES_LOST * PULSE
    assert not peer.restarted


def test_a_node_that_was_started_anew_is_known_by_its_instance(driver):
    driver.use('10.0.0.1')
    peer = driver.one()
    for instance, restarted in ((b'i' * 16, False), (b'i' * 16, False), (b'j' * 16, True)):
        driver.dial()
        driver.reach(peer, instance)
        assert peer.restarted is restarted
        peer.move('fail')
        peer.link, peer.reconnector.due = None, driver.now


def test_a_connection_that_nobody_wants_any_more_is_closed(driver):
    driver.use('10.0.0.1')
    peer = driver.one()
    sock = driver.reach(peer)     # it was not being dialled
    assert sock.closed and peer.link is None and not driver.attached and driver.said() == []


def test_one_node_by_two_names_has_one_connection(driver):
    driver.use('10.0.0.1', 'alias.example')
    first, second = driver.nodes.of('c')
    driver.dial()
    kept, dropped = driver.reach(first), driver.reach(second)
    assert not kept.closed and dropped.closed
    assert driver.nodes.of('c') == [first] and second.place in first.aliases
    assert not driver.nodes.has(second) and driver.attached == [first.link]


def test_a_node_that_dials_is_known_when_it_dials_again(driver):
    driver.use()
    driver.arrives('10.0.0.7')
    peer, = driver.nodes.by_key.values()
    link = peer.link
    assert (peer.host, peer.port) == ('10.0.0.7', 0) and driver.dial() == []
    assert type(driver.said()[-1]) is ClientHello
    driver.arrives('10.0.0.8', b'j' * 16)
    assert len(driver.nodes.by_key) == 2 and driver.broken == []
    driver.arrives('10.0.0.7')
    assert driver.broken == [(link.number, 'the node has connected again')]


def test_a_node_that_dials_while_we_have_dialled_it_is_sent_away(driver):
    driver.use('10.0.0.1')
    peer = driver.one()
    driver.dial()
    driver.reach(peer)
    driver.arrives('10.0.0.1')
    assert driver.parted == [(driver.attached[-1].number,
                              'this program has connected to it already')]
    assert peer.link is driver.attached[0] and driver.nodes.of('c') == [peer]
