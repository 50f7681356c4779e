"""Who may connect: the gate, with real connections on loopback. The doorkeeper that decides it has
tests of its own in test_doorkeeper.py."""

import contextlib
import logging
import os
import socket
import socketserver
import ssl
import subprocess
import shutil
import threading
import warnings

import pytest
from conftest import eventually

import dispynode
from dispynode import (Authenticated, Acceptor, HandshakeError, Loop, Role, handshake_dial,
                       tls_context)

PSK, OTHER_PSK = b'k' * 32, b'K' * 32
CLIENT, NODE = b'client instance.', b'instance of node'


# -- the gate --------------------------------------------------------------------------------------

class House(Loop):
    """A loop that does nothing but keep a gate and those who came in."""

    def __init__(self, **options):
        super().__init__()
        self.arrivals = []
        self.gate = Acceptor(('127.0.0.1', 0), PSK, Role.NODE, (Role.CLIENT,), NODE, self.post,
                             **options)
        self.add_reader(self.gate.socket, self.gate.on_readable)
        self._thread = threading.Thread(target=self.run)

    def start(self):
        self._thread.start()
        return self

    def on_event(self, event):
        if isinstance(event, Authenticated):
            self.arrivals.append(event)

    def close(self):
        self.stop()
        self.post(None)
        self._thread.join(10)
        self.remove_reader(self.gate.socket)
        self.gate.server_close()
        for arrival in self.arrivals:
            arrival.sock.close()
        super().close()


@pytest.fixture
def house(request):
    """Its parameter, if a test has one, is what the gate is given."""
    with contextlib.closing(House(**getattr(request, 'param', {})).start()) as house:
        yield house


@pytest.fixture
def come(house):
    """Connects to the gate from a loopback address; all are closed in the end, and the gate has
    noticed."""
    with contextlib.ExitStack() as stack:
        def connect(address='127.0.0.1'):
            try:
                sock = socket.create_connection(house.gate.server_address, 10, (address, 0))
            except OSError:
                pytest.skip('%s is not an address of this host' % address)
            return stack.enter_context(sock)
        yield connect
    eventually(lambda: not house.gate._keeper._open, what='end of all handshakes')


def shake(sock, psk=PSK):
    return handshake_dial(sock, psk, Role.CLIENT, Role.NODE, CLIENT)


def closed(sock):
    """Whether the other side has closed; does not wait."""
    sock.setblocking(False)
    try:
        return sock.recv(1000) == b''
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def turned_away(sock, psk=OTHER_PSK):
    """Try to come in; whether that failed, and the connection was closed."""
    try:
        shake(sock, psk)
    except (HandshakeError, ConnectionError):
        return eventually(lambda: closed(sock), what='end of the connection')
    return False


def test_an_honest_peer_comes_in(house, come):
    session = shake(come())
    eventually(lambda: house.arrivals)
    [arrival] = house.arrivals
    assert arrival.address == '127.0.0.1'
    assert (arrival.session.send_key, arrival.session.peer_instance) == (session.receive_key,
                                                                         CLIENT)


def test_the_socket_that_came_in_stays_open_and_is_tuned(house, come):
    sock = come()
    shake(sock)
    theirs = eventually(lambda: house.arrivals)[0].sock
    eventually(lambda: not house.gate._kept, what='end of the thread')
    sock.sendall(b'ping')
    theirs.settimeout(10)
    assert theirs.recv(4) == b'ping'
    assert theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert theirs.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_many_come_in_at_once(house, come):
    socks = [come() for _ in range(20)]
    threads = [threading.Thread(target=shake, args=(sock,)) for sock in socks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    eventually(lambda: len(house.arrivals) == 20)


def test_silent_ones_do_not_keep_others_out(house, come):
    silent = [come() for _ in range(40)]
    eventually(lambda: sum(map(closed, silent)) == 8,
               what='end of those over the bound of an address')
    assert shake(come('127.0.0.2'))
    assert shake(come())    # of that address the oldest makes way
    eventually(lambda: sum(map(closed, silent)) == 9, what='end of the one that made way')


def test_silent_ones_leave_a_place_within_the_bound(house, come):
    silent = [come() for _ in range(31)]
    assert shake(come())
    assert not any(map(closed, silent))


def test_garbage_is_closed(house, come):
    for said in (b'GET / HTTP/1.1\r\n\r\n' + bytes(100), bytes(80), b'\xff' * 1000):
        sock = come()
        sock.sendall(said)
        eventually(lambda: closed(sock), what='end of the connection')
    assert not house.arrivals


def test_a_wrong_secret_is_logged_once(house, come, caplog):
    caplog.set_level(logging.WARNING, 'dispynode')
    for _ in range(4):
        assert turned_away(come())
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith('the connection from 127.0.0.1 was rejected: wrong secret: ')
    assert not house.arrivals


def test_five_failures_shut_the_door_for_that_address_only(house, come):
    for _ in range(5):
        assert turned_away(come())
    eventually(lambda: house.gate._keeper._failed.get('127.0.0.1', (0, 0))[0] == 5,
               what='all failures are noted')
    assert turned_away(come(), PSK)
    assert shake(come('127.0.0.2'))
    eventually(lambda: len(house.arrivals) == 1)


def test_one_who_is_in_is_not_affected_by_failures_of_its_address(house, come):
    sock = come()
    shake(sock)
    eventually(lambda: house.arrivals)
    for _ in range(6):
        assert turned_away(come())
    assert not closed(sock)


def test_a_wrong_role_is_refused(house, come):
    sock = come()
    with pytest.raises((HandshakeError, ConnectionError)):
        handshake_dial(sock, PSK, Role.NODE, Role.NODE, CLIENT)
    eventually(lambda: closed(sock))


@pytest.mark.parametrize('house', [{'patience': 2.0}], indirect=True)
def test_a_silent_one_is_closed_when_its_time_is_over(house, come):
    sock = come()
    eventually(lambda: closed(sock), what='end of the connection')
    assert shake(come())


def test_an_error_of_ours_is_seen_and_frees_the_place(house, come, monkeypatch, caplog):
    def broken(*_args, **_named):
        raise ZeroDivisionError('our own fault')
    monkeypatch.setattr(dispynode, 'handshake_accept', broken)
    sock = come()
    eventually(lambda: closed(sock))
    eventually(lambda: 'our own fault' in caplog.text)
    monkeypatch.undo()
    assert shake(come())


def test_closing_the_gate_stops_listening_and_may_come_twice():
    gate = Acceptor(('127.0.0.1', 0), PSK, Role.NODE, (Role.CLIENT,), NODE, print)
    address = gate.server_address
    gate.server_close()
    gate.server_close()
    with pytest.raises(ConnectionError):
        socket.create_connection(address, 10)


def test_a_taken_port_is_an_os_error_and_leaves_nothing(house):
    with pytest.raises(OSError):
        Acceptor(house.gate.server_address, PSK, Role.NODE, (Role.CLIENT,), NODE, print)


def test_ipv6():
    try:
        gate = Acceptor(('::1', 0), PSK, Role.NODE, (Role.CLIENT,), NODE, print)
    except OSError:
        pytest.skip('no IPv6 on this host')
    with contextlib.closing(socket.create_connection(gate.server_address[:2], 10)):
        gate.server_close()


# -- nothing left: descriptors, threads ------------------------------------------------------------

@pytest.fixture
def gate():
    gate = Acceptor(('127.0.0.1', 0), PSK, Role.NODE, (Role.CLIENT,), NODE, print)
    yield gate
    gate.server_close()


def no_descriptors(monkeypatch, times):
    """Accepting fails so often for want of descriptors."""
    accept, left = socketserver.TCPServer.get_request, [None] * times

    def get_request(self):
        if left:
            left.pop()
            raise OSError(24, 'Too many open files')
        return accept(self)
    monkeypatch.setattr(socketserver.TCPServer, 'get_request', get_request)


@pytest.mark.parametrize('rounds', [1, 3])
def test_without_descriptors_the_caller_is_turned_away(gate, monkeypatch, caplog, rounds):
    for _ in range(rounds):
        no_descriptors(monkeypatch, 1)
        with socket.create_connection(gate.server_address, 10) as sock:
            gate.handle_request()
            eventually(lambda: closed(sock), what='end of the connection')
        monkeypatch.undo()
    assert caplog.text.count('no file descriptor is left') == rounds
    os.fstat(gate._spare)    # there again for the next time


# Guards against: the spare descriptor's number is kept when it could not be opened again, and
# closed once more later, when it may belong to another file.
def test_a_lost_spare_descriptor_is_not_closed_again(gate, monkeypatch):
    def no_more(*_args, **_named):
        raise OSError(24, 'Too many open files')
    no_descriptors(monkeypatch, 2)
    monkeypatch.setattr(os, 'open', no_more)
    with pytest.raises(OSError):
        gate.get_request()
    monkeypatch.undo()
    reader, writer = os.pipe()     # gets the number that was just freed
    try:
        gate.server_close()
        os.write(writer, b'x')
        assert os.read(reader, 1) == b'x'
    finally:
        for handle in (reader, writer):
            # Closed by somebody else, which the test has shown above
            with contextlib.suppress(OSError):
                os.close(handle)


# Guards against: a connection for which no thread can be started holds its place for ever.
def test_a_place_is_free_again_when_no_thread_starts(gate, monkeypatch, caplog):
    def no_thread(*_args):
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(socketserver.ThreadingMixIn, 'process_request', no_thread)
    with socket.create_connection(gate.server_address, 10) as sock:
        gate.handle_request()
        eventually(lambda: closed(sock), what='end of the connection')
    assert "can't start new thread" in caplog.text
    assert not gate._keeper._open


# -- TLS -------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def certificate(tmp_path_factory):
    """A self-signed certificate with its key in one file."""
    if not shutil.which('openssl'):
        pytest.skip('certificates are made with the openssl command')
    path = str(tmp_path_factory.mktemp('certificate') / 'both.pem')
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt',
                    'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2',
                    '-subj', '/CN=test', '-keyout', path, '-out', path + '.crt'],
                   check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with open(path, 'a') as both, open(path + '.crt') as file:
        both.write(file.read())
    return path


@pytest.fixture
def tls_house(certificate):
    with contextlib.closing(House(certfile=certificate).start()) as house:
        yield house
        eventually(lambda: not house.gate._keeper._open, what='end of all handshakes')


def tls_shake(house, certificate, psk=PSK):
    """Come in over TLS; the socket is closed when that fails."""
    sock = tls_context(False, certificate).wrap_socket(
        socket.create_connection(house.gate.server_address, 10))
    try:
        handshake_dial(sock, psk, Role.CLIENT, Role.NODE, CLIENT,
                       dispynode.certificate_digest(certificate))
    except BaseException:
        sock.close()
        raise
    return sock


def test_tls_comes_in_and_stays(tls_house, certificate):
    with tls_shake(tls_house, certificate) as sock:
        theirs = eventually(lambda: tls_house.arrivals)[0].sock
        assert isinstance(theirs, ssl.SSLSocket)
        eventually(lambda: not tls_house.gate._kept, what='end of the thread')
        sock.sendall(b'ping')
        theirs.settimeout(10)
        assert theirs.recv(4) == b'ping'


def test_plain_does_not_come_in_to_tls(tls_house):
    with socket.create_connection(tls_house.gate.server_address, 10) as sock:
        assert turned_away(sock, PSK)
    assert not tls_house.arrivals


def test_tls_does_not_come_in_to_plain(house, certificate):
    with pytest.raises(OSError):
        tls_shake(house, certificate)
    eventually(lambda: not house.gate._keeper._open)


def test_a_silent_one_before_tls_does_not_keep_others_out(tls_house, certificate):
    with socket.create_connection(tls_house.gate.server_address, 10):
        tls_shake(tls_house, certificate).close()


# Guards against: the TLS socket of a refused peer is not closed but left to the garbage collector
# (wrap_socket took the descriptor of the one that is closed).
def test_the_tls_socket_of_a_refused_peer_is_closed(tls_house, certificate):
    before = set(threading.enumerate())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        with pytest.raises(HandshakeError, match='wrong secret'):
            tls_shake(tls_house, certificate, OTHER_PSK)
        eventually(lambda: not tls_house.gate._keeper._open, what='end of the handshake')
        eventually(lambda: set(threading.enumerate()) <= before, what='end of its thread')
    assert [str(one.message) for one in said if issubclass(one.category, ResourceWarning)] == []
