"""A loop and its links by themselves: signs of life, silence, room for what is sent, and faults.
The clock is set by the tests, and nothing is connected: a link reads and writes what they put
there."""

import os
import pickle
import threading
import time

import pytest

from dispynode import (
    HASHED_LATE, PULSES_LOST, PULSES_SILENT, WRITE_MOST, Ack, FrameDecoder, FrameEncoder, Jobs,
    Link, Loop, Pace, Pulse, Role, Session)

pytestmark = pytest.mark.skipif(os.name == 'nt', reason='Windows cannot wait for pipes')
KEY = b'k' * 32
SESSION = Session(KEY, KEY, bytes(16), Role.CLIENT)
PULSE = 2.0


class FakeSocket:
    """What a link uses of a socket. `room`: bytes that it takes, and any number if None. A pipe
    tells the selector that there is something to read; or, where it `writes`, that there is
    room."""

    def __init__(self, writes=False):
        self._ends = os.pipe()
        self._writes = writes
        self.room, self.sent, self.waiting, self.closed = None, bytearray(), b'', False
        self.other = FrameEncoder(KEY)   # of the other side

    def setblocking(self, flag):
        assert flag is False

    def fileno(self):
        return self._ends[self._writes]

    def send(self, view):
        size = len(view) if self.room is None else min(self.room, len(view))
        if not size:
            raise BlockingIOError
        self.sent += bytes(view[:size])
        if self.room is not None:
            self.room -= size
        return size

    def recv_into(self, room):
        if not self.waiting:
            raise BlockingIOError
        size = min(len(room), len(self.waiting))
        room[:size] = self.waiting[:size]
        self.waiting = self.waiting[size:]
        if not self.waiting:
            os.read(self._ends[0], 1)
        return size

    def says(self, message):
        """The other side sends a message."""
        self.arrives(b''.join(map(bytes, self.other.seal(message))))

    def arrives(self, data):
        """It can be read from now on."""
        if not self.waiting:
            os.write(self._ends[1], b'.')
        self.waiting += data

    def getsockopt(self, *args):
        raise OSError('it has none')

    def close(self):
        if not self.closed:
            self.closed = True
            for end in self._ends:
                os.close(end)


class Told(Loop):
    """A loop that notes what it is told; its clock stands still."""

    def __init__(self):
        self.at = 1000.0
        super().__init__(lambda: self.at)
        self.silent, self.broken, self.messages = [], [], []
        self.fault_for = None

    def on_channel(self, link):
        if link is self.fault_for:
            raise ZeroDivisionError('on purpose')
        self.messages += [(link, message) for message in link.messages(self.now)]

    def on_silent(self, link):
        self.silent.append(link)

    def on_broken(self, link, text):
        self.broken.append((link, text))

    def after(self, seconds):
        """A turn so much later."""
        self.at += seconds
        self.turn(0)


@pytest.fixture
def loop():
    loop = Told()
    yield loop
    loop.close()


def attached(loop, writes=False, pulse=PULSE):
    link = Link(FakeSocket(writes), SESSION, 'there', loop.at, pulse)
    loop.attach(link)
    loop.turn(0)
    return link


def messages_in(data):
    """What was sent, as the other side reads it."""
    decoder = FrameDecoder(KEY)
    found = []
    while data:
        room = decoder.get_buffer()
        size = min(len(room), len(data))
        room[:size] = data[:size]
        data = data[size:]
        found += [decoder.open(*unit) for unit in decoder.buffer_updated(size)]
    return found


# -- signs of life ---------------------------------------------------------------------------------

def test_an_idle_link_gives_a_sign_of_life_once_a_pulse(loop):
    link = attached(loop)
    loop.after(0.4 * PULSE)
    assert link.sock.sent == b''
    for count in range(1, 4):
        loop.after(0.6 * PULSE)
        loop.after(0.5 * PULSE)
        link.heard = loop.at
        assert len(messages_in(link.sock.sent)) == count
    assert {type(message) for message in messages_in(link.sock.sent)} == {Pulse}


def test_what_is_said_is_a_sign_of_life_too(loop):
    link = attached(loop)
    for _ in range(8):
        loop.after(0.5 * PULSE)
        link.heard = loop.at
        loop.send(link, Ack('c', [1]))
        loop.turn(0)
    assert {type(message) for message in messages_in(link.sock.sent)} == {Ack}


def test_where_something_waits_for_room_no_sign_of_life_is_added(loop):
    link = attached(loop)
    link.sock.room = 10
    loop.send(link, Ack('c', list(range(100))))
    for _ in range(4):
        loop.after(PULSE)
        link.heard = loop.at
    link.sock.room = None
    loop.send(link, Ack('d', []))
    loop.turn(0)
    assert [type(message) for message in messages_in(link.sock.sent)] == [Ack, Ack]


def test_links_have_pulses_of_their_own(loop):
    slow, quick = attached(loop, pulse=10.0), attached(loop, pulse=1.0)
    for _ in range(8):
        loop.after(0.5)
        slow.heard = quick.heard = loop.at
    assert len(messages_in(quick.sock.sent)) >= 3 and not slow.sock.sent


# -- silence ---------------------------------------------------------------------------------------

def test_silence_is_noticed_and_then_ends_the_link(loop):
    link = attached(loop)
    for _ in range(2 * PULSES_SILENT):
        loop.after(0.5 * PULSE)
    assert not loop.silent
    loop.after(0.5 * PULSE)
    assert loop.silent == [link] and not loop.broken
    while loop.at - link.heard <= PULSES_LOST * PULSE:
        assert not loop.broken
        loop.after(0.5 * PULSE)
    assert loop.broken == [(link, 'nothing was received for %.0f s' % (loop.at - link.heard))]
    assert link.sock.closed and not loop.links


def test_a_link_that_is_heard_lives(loop):
    link = attached(loop)
    for _ in range(4 * PULSES_LOST):
        link.sock.says(Pulse())
        loop.after(0.5 * PULSE)
    assert link.heard == loop.at and not loop.silent and not loop.broken
    assert loop.messages == [(link, Pulse())] * 4 * PULSES_LOST


def test_a_link_that_is_not_read_from_is_not_silent(loop):
    link = attached(loop)
    link.paused = True
    for _ in range(4 * PULSES_LOST):
        loop.after(0.5 * PULSE)
    assert not loop.silent and not loop.broken and not link.sock.closed


def test_nobody_else_was_silent_while_this_process_was_stopped(loop):
    link = attached(loop)
    loop.after(0.5 * PULSE)
    loop.after(100 * PULSE)
    assert not loop.broken and not loop.silent
    for _ in range(2 * PULSES_LOST):
        loop.after(0.5 * PULSE)
    assert [broken for broken, _ in loop.broken] == [link]


# -- room ------------------------------------------------------------------------------------------

def test_what_has_no_room_waits_and_goes_in_order(loop):
    link = attached(loop, writes=True)
    link.sock.room = 25
    said = [Ack('c', list(range(number))) for number in range(40)]
    for message in said:
        loop.send(link, message)
    whole = link.queued
    loop.turn(0)
    assert (link.queued, link.bytes_out, link.wants_write) == (whole - 25, 25, True)
    loop.turn(0)
    assert link.queued == whole - 25
    turns = 0
    while link.queued:   # the selector says that there is room
        link.sock.room = 100
        loop.turn(0)
        turns += 1
    assert turns == -(-(whole - 25) // 100)
    assert messages_in(link.sock.sent) == said and not link.wants_write


def test_one_that_takes_all_does_not_keep_the_others_waiting(loop):
    much, little = attached(loop, writes=True), attached(loop, writes=True)
    for _ in range(3):
        much.push([bytes(WRITE_MOST)])
    loop.send(little, Ack('c', [1]))
    loop.turn(0)
    assert len(messages_in(little.sock.sent)) == 1
    assert WRITE_MOST <= much.bytes_out < 3 * WRITE_MOST and much.queued
    while much.queued:
        loop.turn(0)
    assert much.bytes_out == 3 * WRITE_MOST


def test_a_large_payload_is_hashed_while_it_is_sent(loop):
    """What is not yet sent is not yet hashed: it may still change, and is authentic."""
    link = attached(loop, writes=True)
    link.sock.room = 1 << 20
    payload = bytearray(b'a' * (12 * HASHED_LATE))
    loop.send(link, Jobs('c', [(1, pickle.PickleBuffer(payload), None)]))
    loop.send(link, Ack('c', [2]))
    loop.turn(0)
    assert 0 < link.bytes_out < link.queued
    payload[-1] = ord('b')
    link.sock.room = None
    while link.queued:
        loop.turn(0)
    large, small = messages_in(link.sock.sent)
    assert bytes(large.rows[0][1]) == bytes(payload) and small == Ack('c', [2])


def test_a_link_is_closed_that_has_sent_half_of_a_large_payload(loop):
    link = attached(loop, writes=True)
    link.sock.room = 1 << 20
    loop.send(link, Jobs('c', [(1, pickle.PickleBuffer(bytes(8 * HASHED_LATE)), None)]))
    loop.turn(0)
    loop.disconnect(link, 'over')
    assert link.sock.closed and not link.wants_write


# -- a loop that has no time -----------------------------------------------------------------------

class Sleeper(Told):
    """A loop with a real clock. `jump`: seconds for which its process stands still while it waits
    next."""
    jump = 0.0

    def __init__(self):
        super().__init__()
        self.clock = lambda: time.monotonic() + self.at

    def next_timer(self):
        self.at += self.jump
        return super().next_timer()


@pytest.mark.parametrize('waited, is_short', [(0.0, True), (0.0002, True), (0.005, False)])
def test_a_loop_pauses_only_if_it_has_hardly_waited(waited, is_short):
    slept, pace = [], Pace(0.0)
    pace.PAUSE = 0.0003
    pace.may_pause = True
    pace.woke(1.0, 1.0 + waited, None)
    pace.pause(slept.append)
    assert slept == [0.0003] * is_short and not pace.may_pause


def test_a_pause_is_over_before_the_next_turn_and_loses_nothing(loop):
    events = []
    loop.on_event = events.append
    loop.turn(0)
    loop.pace.may_pause = True
    loop.post('before')
    loop.turn()
    assert events == ['before'] and not loop.pace.may_pause
    thread = threading.Timer(0.05, loop.post, ['later'])
    thread.start()
    loop.pace.may_pause = True
    loop.turn()
    thread.join()
    assert events == ['before', 'later']


def test_a_loop_knows_since_when_it_has_had_no_time():
    loop = Sleeper()
    try:
        loop.turn(0.05)
        idle = loop.pace.busy_since
        assert idle == loop.pace.woke_at
        for _ in range(3):
            loop.at += 5.0    # the turn before has taken so long
            loop.post('something')
            loop.turn()
            assert loop.pace.busy_since == idle < loop.pace.woke_at - 4.0
        loop.jump = 30.0
        loop.turn(0.05)
        assert loop.pace.busy_since == idle
        loop.jump = 0.0
        loop.turn(0.05)
        assert loop.pace.busy_since == loop.pace.woke_at
    finally:
        loop.close()


# -- faults ----------------------------------------------------------------------------------------

def test_a_fault_ends_the_link_that_it_concerns_and_no_other(loop, caplog):
    loop.fault_for, other = attached(loop), attached(loop)
    for link in (loop.fault_for, other):
        link.sock.says(Ack('c', [7]))
    loop.turn(0)
    assert [link for link, _ in loop.broken] == [loop.fault_for]
    assert loop.messages == [(other, Ack('c', [7]))]
    assert 'a fault of dispy while it handled Link' in caplog.text


def test_what_cannot_be_read_is_answered_before_the_link_ends(loop, caplog):
    link = attached(loop)
    link.sock.arrives(bytes(64))
    loop.turn(0)
    assert [broken for broken, _ in loop.broken] == [link] and link.sock.closed
    answer, = messages_in(link.sock.sent)
    assert type(answer).__name__ == 'Wrong'


def test_a_link_that_was_closed_says_so(loop):
    link = attached(loop)
    link.sock.recv_into = lambda room: 0
    link.sock.arrives(b'.')
    loop.turn(0)
    assert loop.broken == [(link, 'the connection was closed')]
