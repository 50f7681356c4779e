"""Both sides of the handshake, joined by a socketpair: one in the test's thread, one in another."""

import contextlib
import itertools
import os
import socket

import pytest

import dispynode
from dispynode import (
    FrameDecoder, FrameEncoder, HandshakeError, MAGIC, NO_TLS, Pulse, Role, handshake_accept,
    handshake_dial)
from sides import CLIENT, NODE, OTHER_PSK, PSK, Side, dial

HELLO, CHALLENGE, PROOF = 80, 80, 40


def accept(sock, psk=PSK, **named):
    return Side(handshake_accept, sock, psk, Role.NODE, (Role.CLIENT, Role.SCHEDULER), NODE,
                **named)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.settimeout(10)
    with ours, theirs:
        yield ours, theirs


def receive(sock, size):
    data = b''
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            break
        data += piece
    return data


def relay(dialler, acceptor, change=lambda number, message: message):
    """A man in the middle: passes the four messages on, changed; ends when a side hangs up."""
    passed = []
    with contextlib.suppress(OSError):
        for number, (source, target, size) in enumerate(
                ((dialler, acceptor, HELLO), (acceptor, dialler, CHALLENGE),
                 (dialler, acceptor, PROOF), (acceptor, dialler, PROOF))):
            message = receive(source, size)
            if len(message) < size:
                break
            passed.append(message)
            target.sendall(change(number, message))
    dialler.close()
    acceptor.close()
    return passed


def through(change=lambda number, message: message, dialled=None, accepted=None):
    """A handshake through a man in the middle: (dialling side, accepting side, messages as they
    were sent)."""
    (ours, his_left), (his_right, theirs) = socket.socketpair(), socket.socketpair()
    with ours, his_left, his_right, theirs:
        for sock in (ours, his_left, his_right, theirs):
            sock.settimeout(10)
        two = accept(theirs, **(accepted or {}))
        one = Side(dial, ours, **(dialled or {}))
        passed = relay(his_left, his_right, change)
        return one.ended(), two.ended(), passed


# -- what is agreed on -----------------------------------------------------------------------------

def test_both_sides_agree(pair):
    side = accept(pair[1])
    mine = dial(pair[0])
    its = side.ended().result
    assert (mine.send_key, mine.receive_key) == (its.receive_key, its.send_key)
    assert mine.send_key != mine.receive_key and len(mine.send_key) == 32
    assert (mine.peer_instance, mine.peer_role) == (NODE, Role.NODE)
    assert (its.peer_instance, its.peer_role) == (CLIENT, Role.CLIENT)


def test_frames_pass_with_the_keys(pair):
    side = accept(pair[1])
    mine, its = dial(pair[0]), side.ended().result
    for sender, receiver in ((mine, its), (its, mine)):
        data = b''.join(FrameEncoder(sender.send_key).seal(Pulse()))
        opener = FrameDecoder(receiver.receive_key)
        opener.get_buffer()[:len(data)] = data
        assert [opener.open(*unit) for unit in opener.buffer_updated(len(data))] == [Pulse()]


def test_every_session_has_its_own_keys():
    keys = set()
    for _ in range(3):
        one, _, _ = through()
        keys |= {one.result.send_key, one.result.receive_key}
    assert len(keys) == 6


def test_sizes_on_the_wire():
    _, _, passed = through()
    assert [len(message) for message in passed] == [80, 80, 40, 40]
    assert [dispynode._HELLO.size, dispynode._CHALLENGE.size, dispynode._PROOF.size] == [80, 80, 40]


def test_messages_and_keys_are_these(monkeypatch):
    """Versions of this program must agree on them. These are of one that speaks minor version 1."""
    numbers = itertools.count()
    monkeypatch.setattr(dispynode, 'VERSIONS', (1, 1))
    monkeypatch.setattr(os, 'urandom', lambda size: bytes([next(numbers)]) * size)
    one, two, passed = through()
    assert [message.hex() for message in passed] == [
        '64697370793500010001000101020000636c69656e7420696e7374616e63652e0000000000000000'
        '00000000000000000000000000000000000000000000000000000000000000000000000000000000',
        '64697370793500010001020040000000696e7374616e6365206f66206e6f64650101010101010101'
        '01010101010101010101010101010101010101010101010100000000000000000000000000000000',
        '6469737079350001d0264b72c39422421809bafab0d4347a1ae750ed6739575f311bcb59d3bc86fb',
        '64697370793500017401e9285e8fb36991d0b1d86df3ee92297968f0819f2dc990ccc4ae6828fbb6']
    assert one.result.send_key.hex() == two.result.receive_key.hex() == (
        '599402474a47add399cc0beaec4f4062004d0669a652b1fba396a6fa9b8e45dc')
    assert one.result.receive_key.hex() == two.result.send_key.hex() == (
        '4d5f875e392694270b061d5b0478d44ade39aba0de63dd3d3ed568e27860882b')


# -- a secret that differs -------------------------------------------------------------------------

def test_a_wrong_secret_is_told_to_both():
    one, two, passed = through(dialled={'psk': OTHER_PSK})
    assert isinstance(one.error, HandshakeError) and 'wrong secret' in str(one.error)
    # No file is named from which it does not come
    assert 'DISPY_SECRET' in str(one.error) and '--secret-file' in str(one.error)
    assert isinstance(two.error, HandshakeError) and 'wrong secret' in str(two.error)
    assert len(passed) == 3    # no FINISHED to guess against


def test_an_acceptor_without_the_secret_is_found_out(pair):
    """It takes any proof and answers something."""
    def impostor(sock):
        hello = receive(sock, HELLO)
        sock.sendall(dispynode._CHALLENGE.pack(MAGIC, 1, Role.NODE, 0, 0, NODE, bytes(32)))
        proof = receive(sock, PROOF)
        sock.sendall(proof)
        return hello
    side = Side(impostor, pair[1])
    with pytest.raises(HandshakeError, match='does not know the secret'):
        dial(pair[0])
    side.ended()


def test_before_the_proof_nothing_depends_on_the_secret(monkeypatch):
    monkeypatch.setattr(os, 'urandom', lambda size: bytes(size))
    _, _, one = through()
    _, _, other = through(accepted={'psk': OTHER_PSK}, dialled={'psk': OTHER_PSK})
    assert one[:2] == other[:2]
    assert one[2] != other[2] and one[3] != other[3]


def test_a_stranger_costs_120_bytes_at_most(pair):
    ours, theirs = pair
    side = accept(theirs)
    _, _, passed = through()
    ours.sendall(passed[0] + bytes(40 + 1000))
    side.join(10)
    assert 'wrong secret' in str(side.error)


def test_the_acceptor_reads_no_further_than_the_proof(pair):
    class Counting:
        """A socket that counts what is read from it."""
        def __init__(self, sock):
            self.sock, self.count = sock, 0

        def recv(self, size):
            data = self.sock.recv(size)
            self.count += len(data)
            return data

        def __getattr__(self, name):
            return getattr(self.sock, name)
    ours, theirs = pair
    _, _, passed = through()
    counting = Counting(theirs)
    ours.sendall(passed[0] + bytes(1000))
    with pytest.raises(HandshakeError, match='wrong secret'):
        handshake_accept(counting, PSK, Role.NODE, (Role.CLIENT,), NODE)
    assert counting.count == 120
    assert len(ours.recv(1000)) == CHALLENGE    # and nothing came after it


# -- a man in the middle ---------------------------------------------------------------------------

@pytest.mark.parametrize('number', range(4), ids=['HELLO', 'CHALLENGE', 'PROOF', 'FINISHED'])
def test_every_changed_byte_is_noticed(number):
    for at in range((HELLO, CHALLENGE, PROOF, PROOF)[number]):
        for bit in (1, 128):
            def flip(which, message):
                if which != number:
                    return message
                return message[:at] + bytes([message[at] ^ bit]) + message[at + 1:]
            one, two, _ = through(flip)
            assert isinstance(one.error, HandshakeError), 'byte %d' % at
            if number < 3:
                assert isinstance(two.error, (HandshakeError, EOFError, OSError)), 'byte %d' % at


def test_a_reflected_handshake_is_refused():
    """The dialler gets its own HELLO back, made to look like a CHALLENGE, and its own PROOF."""
    def reflect(sock):
        receive(sock, HELLO)
        sock.sendall(dispynode._CHALLENGE.pack(MAGIC, 1, Role.NODE, 0, 0, CLIENT, bytes(32)))
        return receive(sock, PROOF)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        side = Side(reflect, theirs)
        with pytest.raises(HandshakeError, match='this very process'):
            dial(ours)
        ours.close()
        assert side.ended().result == b''    # no proof was sent


def test_the_acceptor_refuses_its_own_instance(pair):
    side = accept(pair[1])
    with pytest.raises(HandshakeError):
        handshake_dial(pair[0], PSK, Role.CLIENT, Role.NODE, NODE)
    assert isinstance(side.ended().error, HandshakeError)


def test_a_hello_sent_back_is_no_challenge(pair):
    def echo(sock):
        sock.sendall(receive(sock, HELLO))
    side = Side(echo, pair[1])
    with pytest.raises(HandshakeError):
        dial(pair[0])
    side.ended()


def test_a_replayed_proof_is_refused(pair):
    _, _, passed = through()
    ours, theirs = pair
    side = accept(theirs)
    ours.sendall(passed[0])
    assert receive(ours, CHALLENGE) != passed[1]
    ours.sendall(passed[2])
    assert 'wrong secret' in str(side.ended().error)
    assert ours.recv(1) == b''


def test_replayed_answers_are_refused(pair):
    _, _, passed = through()

    def replay(sock):
        receive(sock, HELLO)
        sock.sendall(passed[1])
        receive(sock, PROOF)
        sock.sendall(passed[3])
    side = Side(replay, pair[1])
    with pytest.raises(HandshakeError, match='does not know the secret'):
        dial(pair[0])
    side.ended()


@pytest.mark.parametrize('mine, its',
                         [(b'a' * 32, b'b' * 32), (NO_TLS, b'b' * 32), (b'a' * 32, NO_TLS)])
def test_a_relay_between_different_channels_is_refused(mine, its):
    one, two, _ = through(dialled={'binding': mine}, accepted={'binding': its})
    assert isinstance(one.error, HandshakeError) and two.result is None


def test_the_same_channel_is_accepted():
    one, two, _ = through(dialled={'binding': b'a' * 32}, accepted={'binding': b'a' * 32})
    assert one.result and two.result


# -- tags of payloads ------------------------------------------------------------------------------

def test_payloads_have_tags_unless_tls_protects_them():
    for binding, tagged in ((NO_TLS, True), (b'a' * 32, False)):
        one, two, passed = through(dialled={'binding': binding}, accepted={'binding': binding})
        assert (one.result.tags_payloads, two.result.tags_payloads) == (tagged, tagged)
        assert [message[-1] for message in passed[:2]] == [not tagged, not tagged]


@pytest.mark.parametrize('number', [0, 1])
@pytest.mark.parametrize('binding', [NO_TLS, b'a' * 32])
def test_nobody_between_can_have_them_left_out_or_put_in(number, binding):
    def change(at, message):
        return message[:-1] + bytes((message[-1] ^ 1,)) if at == number else message
    one, two, _ = through(change, dialled={'binding': binding}, accepted={'binding': binding})
    assert one.result is None and isinstance(one.error, HandshakeError) and two.result is None


def test_a_client_that_knows_nothing_of_it_gets_tags(pair):
    side = accept(pair[1], binding=b'a' * 32)
    hello = dispynode._HELLO.pack(MAGIC, 1, 1, Role.CLIENT, Role.NODE, 1, CLIENT, bytes(32))
    pair[0].sendall(hello)
    challenge = receive(pair[0], CHALLENGE)
    keys = dispynode._Keys(PSK, hello, challenge, b'a' * 32)
    pair[0].sendall(dispynode._PROOF.pack(MAGIC, keys.client))
    assert challenge[-1] == 0 and side.ended().result.tags_payloads


def test_a_node_that_knows_nothing_of_it_gets_tags(pair):
    def old(sock):
        hello = receive(sock, HELLO)
        challenge = dispynode._CHALLENGE.pack(MAGIC, 1, Role.NODE, 1, 0, NODE, bytes(32))
        sock.sendall(challenge)
        keys = dispynode._Keys(PSK, hello, challenge, b'a' * 32)
        receive(sock, PROOF)
        sock.sendall(dispynode._PROOF.pack(MAGIC, keys.server))
    side = Side(old, pair[1])
    assert dial(pair[0], binding=b'a' * 32).tags_payloads
    side.ended()


# -- roles and versions ----------------------------------------------------------------------------

@pytest.mark.parametrize('role, wanted', [(Role.NODE, Role.NODE), (Role.CLIENT, Role.SCHEDULER),
                                          (Role.CLIENT, Role.CLIENT)])
def test_roles_that_do_not_fit_are_refused(pair, role, wanted):
    side = accept(pair[1])
    with pytest.raises(HandshakeError):
        handshake_dial(pair[0], PSK, role, wanted, CLIENT)
    assert isinstance(side.ended().error, HandshakeError)


def test_another_major_version_gets_the_alert(pair, monkeypatch):
    side = accept(pair[1])
    hello = dispynode._HELLO.pack(MAGIC[:7] + b'\x02', 1, 1, Role.CLIENT, Role.NODE, 0, CLIENT,
                                  bytes(32))
    pair[0].sendall(hello)
    assert receive(pair[0], CHALLENGE).startswith(dispynode.ALERT)
    assert 'version' in str(side.ended().error)


@pytest.mark.parametrize('magic', [dispynode.ALERT, b'dispy5!\x07', MAGIC[:7] + b'\x02',
                                   MAGIC[:6] + b'\x01\x01'], ids=repr)
def test_the_dialler_tells_of_another_version(pair, magic):
    def newer(sock):
        receive(sock, HELLO)
        sock.sendall(dispynode._CHALLENGE.pack(magic, 1, Role.NODE, 0, 0, NODE, bytes(32)))
    side = Side(newer, pair[1])
    with pytest.raises(HandshakeError, match='another version'):
        dial(pair[0])
    side.ended()


@pytest.mark.parametrize('versions, agreed',
                         [((1, 1), 1), ((0, 1), 1), ((1, 9), 2), ((1, 65535), 2), ((2, 9), 2),
                          ((3, 9), None), ((0, 0), None)])
def test_the_highest_common_minor_version_is_chosen(pair, versions, agreed):
    side = accept(pair[1])
    pair[0].sendall(dispynode._HELLO.pack(MAGIC, *versions, Role.CLIENT, Role.NODE, 0, CLIENT,
                                          bytes(32)))
    magic, version = dispynode._CHALLENGE.unpack(receive(pair[0], CHALLENGE))[:2]
    assert (version if magic == MAGIC else None) == agreed
    pair[0].close()
    assert side.ended().error is not None


@pytest.mark.parametrize('version', [0, 3, 65535])
def test_a_version_that_was_not_offered_is_refused(pair, version):
    def other(sock):
        receive(sock, HELLO)
        sock.sendall(dispynode._CHALLENGE.pack(MAGIC, version, Role.NODE, 0, 0, NODE, bytes(32)))
    side = Side(other, pair[1])
    with pytest.raises(HandshakeError, match='version %d' % version):
        dial(pair[0])
    side.ended()


# -- peers that do nothing, or something else ------------------------------------------------------

@pytest.mark.parametrize('said', [b'GET / HTTP/1.1\r\n' * 10, bytes(200), b'\x16\x03\x01' * 40,
                                  b'SSH-2.0-x\r\n' * 20], ids=repr)
def test_garbage_is_refused_by_both(pair, said):
    ours, theirs = pair
    ours.sendall(said)
    with pytest.raises(HandshakeError, match='does not speak|uses TLS'):
        handshake_accept(theirs, PSK, Role.NODE, (Role.CLIENT,), NODE)
    theirs.sendall(said)
    with pytest.raises(HandshakeError, match='not a dispynode'):
        dial(ours)


def test_a_peer_that_closes_at_once(pair):
    ours, theirs = pair
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(HandshakeError, match='closed the connection at once'):
        dial(ours)


def test_a_dialler_that_closes_at_once(pair):
    pair[0].close()
    with pytest.raises(EOFError):
        handshake_accept(pair[1], PSK, Role.NODE, (Role.CLIENT,), NODE)


class SlowClock:
    """Every look at it costs a second."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


def test_a_slow_dialler_hits_the_deadline(pair):
    """A byte at a time, each in time by itself."""
    ours, theirs = pair
    ours.sendall(dispynode._HELLO.pack(MAGIC, 1, 1, Role.CLIENT, Role.NODE, 0, CLIENT, bytes(32)))

    class Dripping:
        reads = 0

        def settimeout(self, left):
            assert 0 < left <= 10

        def recv(self, size):
            self.reads += 1
            return theirs.recv(1)
    slow = Dripping()
    with pytest.raises(HandshakeError, match='no answer within'):
        handshake_accept(slow, PSK, Role.NODE, (Role.CLIENT,), NODE, deadline=10.0,
                         clock=SlowClock())
    assert slow.reads < 10


@pytest.mark.parametrize('said', [b'', MAGIC], ids=['silent', 'stops'])
def test_silence_hits_the_deadline_of_both(pair, said):
    ours, theirs = pair
    ours.sendall(said)
    clock = SlowClock()
    with pytest.raises(HandshakeError, match='no answer within'):
        handshake_accept(theirs, PSK, Role.NODE, (Role.CLIENT,), NODE, deadline=clock.now + 1.02,
                         clock=clock)
    theirs.sendall(said)
    clock = SlowClock()
    with pytest.raises(HandshakeError, match='no answer within'):
        dial(ours, deadline=clock.now + 1.02, clock=clock)


def test_a_deadline_that_has_passed_reads_nothing(pair):
    with pytest.raises(HandshakeError, match='no answer within'):
        handshake_accept(pair[1], PSK, Role.NODE, (Role.CLIENT,), NODE, deadline=0.0,
                         clock=SlowClock())
