"""Those without the secret keep nobody out: silent connections make way, failures are their own,
datagrams have a budget of their own."""

import contextlib
import os
import socket
import subprocess
import time

import pytest

from conftest import eventually
from dispynode import DatagramType, Discovery, HandshakeLimiter, Role, derive_key, dial, network_of
from nodes import NodeProcess


def test_the_network_with_most_makes_way_the_oldest_first():
    keeper = HandshakeLimiter()
    rows = []
    for n in range(HandshakeLimiter.AT_ONCE):
        address = '10.0.%d.%d' % (n % 2, n)
        assert keeper.admit(address, 0.0)
        rows.append((n, address))
    rows.append((99, '192.168.0.1'))
    assert not keeper.admit('10.9.9.9', 0.0)
    assert keeper.make_way('10.9.9.9', rows) == 0
    rows = [row for row in rows if row[1].startswith('10.0.1.')] + [(98, '10.0.0.5')]
    assert keeper.make_way('10.9.9.9', rows) == 1


def test_one_address_makes_way_for_itself():
    keeper = HandshakeLimiter()
    rows = [(1, '10.0.0.2'), (2, '10.0.0.2')]
    for n in range(HandshakeLimiter.FROM_ONE):
        assert keeper.admit('10.0.0.1', 0.0)
        rows.append((10 + n, '10.0.0.1'))
    assert not keeper.admit('10.0.0.1', 0.0) and keeper.make_way('10.0.0.1', rows) == 10


def test_networks():
    assert network_of('10.1.2.3') == network_of('10.1.2.200') != network_of('10.1.3.3')
    assert network_of('fe80::1%eth0') == network_of('fe80::2') != network_of('fe80:0:0:1::1')
    assert network_of('nonsense') == 'nonsense'


def test_failures_lock_out_those_who_have_not_proved_themselves():
    keeper = HandshakeLimiter()

    def fail(times):
        for _ in range(times):
            keeper.admit('10.0.0.1', 10.0)
            keeper.done('10.0.0.1', False, 10.0)
    fail(HandshakeLimiter.FAILURES)
    assert not keeper.admit('10.0.0.1', 11.0) and keeper.admit('10.0.0.2', 11.0)
    keeper = HandshakeLimiter()
    keeper.admit('10.0.0.1', 1.0)
    keeper.done('10.0.0.1', True, 1.0)
    fail(20)
    assert keeper.admit('10.0.0.1', 11.0), 'somebody there has the secret'
    for _ in range(HandshakeLimiter.FROM_MIXED):
        keeper.admit('10.0.0.1', 12.0)
    assert not keeper.admit('10.0.0.1', 12.0)
    keeper = HandshakeLimiter()
    keeper.admit('10.0.0.1', 1.0)
    keeper.done('10.0.0.1', True, 1.0)
    fail(20)
    assert (keeper.is_shut('10.0.0.1', 10.0 + 0.1) is False
            and keeper.is_shut('10.0.0.1', 1.0 + HandshakeLimiter.RECENT + 1) is False)
    keeper._failed['10.0.0.1'] = (20, 1e9)
    assert keeper.is_shut('10.0.0.1', 1.0 + HandshakeLimiter.RECENT + 1)


@pytest.mark.parametrize('tls', [False, True])
def test_a_thousand_silent_connections_delay_an_honest_one_little(tmp_path, tls):
    """From two addresses, renewed as they are ended; the honest one is of a third."""
    options, context = [], None
    if tls:
        from dispynode import tls_context
        path = str(tmp_path / 'certificate')
        subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt',
                        'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2',
                        '-subj', '/CN=x', '-keyout', path, '-out', path + '.crt'], check=True,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        with open(path, 'a') as file, open(path + '.crt') as made:
            file.write(made.read())
        options, context = ['--certfile', path], tls_context(False, path)
    with NodeProcess(tmp_path / 'n', *options) as node:
        silent = []
        try:
            def connect(n):
                sock = socket.socket()
                sock.settimeout(5)
                with contextlib.suppress(OSError):
                    sock.bind(('127.0.0.%d' % (2 + n % 2), 0))
                    sock.connect(node.address)
                silent.append(sock)
            for n in range(1000):
                connect(n)
            times = []
            for n in range(10):
                connect(n)
                began = time.monotonic()
                dial('127.0.0.1', node.port, derive_key(os.environ['DISPY_SECRET'].encode()),
                     Role.CLIENT, Role.NODE, os.urandom(16), context).sock.close()
                times.append(time.monotonic() - began)
            print('worst %.3f s' % max(times))
            assert max(times) < 5   # 0.0x s; without making way none came through for 10 s
        finally:
            for sock in silent:
                sock.close()
        eventually(lambda: node.process.poll() is None)


def test_strangers_take_nothing_from_those_with_the_secret():
    node = Discovery(b'k' * 32, Role.NODE, b'n' * 16, 9701)
    mine, told, answered = Discovery(b'k' * 32, Role.CLIENT, b'c' * 16), 0, 0
    for n in range(1000):
        stranger = Discovery(b's' * 32, Role.CLIENT, os.urandom(16))
        told += node.parse(stranger.build(DatagramType.QUESTION),
                           '10.0.%d.%d' % (n // 250, n % 250), 100.5)[1] is not None
        if n % 25 == 0:
            answered += node.parse(mine.build(DatagramType.QUESTION), '10.9.0.1',
                                   100.5)[1] is not None
    assert answered == 40 and told == Discovery.STRANGERS


def test_one_address_of_strangers_is_told_a_few_times_whatever_it_calls_itself():
    node, told = Discovery(b'k' * 32, Role.NODE, b'n' * 16, 9701), 0
    for second in range(50):
        told += node.parse(Discovery(b's' * 32, Role.CLIENT, os.urandom(16)).build(
            DatagramType.QUESTION), '10.0.0.1', 100.0 + second)[1] is not None
    assert told == Discovery.TOLD_MOST
