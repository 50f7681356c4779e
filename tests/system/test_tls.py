"""The handshake over TLS, on loopback, with certificates that the openssl command makes."""

import shutil
import socket
import ssl
import subprocess

import pytest

import dispynode
from dispynode import (
    HandshakeError, NO_TLS, Role, SecretError, certificate_digest, handshake_accept, tls_context)
from sides import NODE, PSK, Side, dial

needs_openssl = pytest.mark.skipif(not shutil.which('openssl'),
                                   reason='certificates are made with the openssl command')


@pytest.fixture(scope='module')
def certificates(tmp_path_factory):
    """One self-signed, one that nobody knows, and a CA with a node's and a client's certificate,
    each with its key."""
    directory = tmp_path_factory.mktemp('certificates')

    def make(name, *options):
        base = str(directory / name)
        subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt',
                        'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2', '-subj',
                        '/CN=' + name, '-keyout', base + '.key', '-out', base + '.crt', *options],
                       check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for name in ('shared', 'stranger', 'ca'):
        make(name)
    for name in ('node', 'client'):
        base = str(directory / name)
        run = dict(check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        subprocess.run(['openssl', 'req', '-new', '-newkey', 'ec', '-pkeyopt',
                        'ec_paramgen_curve:prime256v1', '-nodes', '-subj', '/CN=' + name, '-keyout',
                        base + '.key', '-out', base + '.csr'], **run)
        subprocess.run(['openssl', 'x509', '-req', '-days', '2', '-in', base + '.csr', '-CA',
                        str(directory / 'ca.crt'), '-CAkey',
                        str(directory / 'ca.key'), '-CAcreateserial', '-out', base + '.crt'], **run)
    return directory


def context(directory, server, name, ca=None):
    return tls_context(server, str(directory / (name + '.crt')), str(directory / (name + '.key')),
                       ca and str(directory / (ca + '.crt')))


def tls_accept(sock, tls, binding, psk=PSK):
    with tls.wrap_socket(sock, server_side=True) if tls else sock as wrapped:
        return handshake_accept(wrapped, psk, Role.NODE, (Role.CLIENT,), NODE, binding)


def tls_dial(sock, tls, psk=PSK):
    with tls.wrap_socket(sock) if tls else sock as wrapped:
        binding = dispynode.hashlib.sha256(wrapped.getpeercert(True)).digest() if tls else NO_TLS
        return dial(wrapped, psk, binding=binding)


def over_tls(dialler, acceptor, binding=NO_TLS):
    """Both sides over TCP on loopback; each has ended and closed its socket."""
    with socket.create_server(('127.0.0.1', 0)) as listening:
        ours = socket.create_connection(listening.getsockname(), 10)
        theirs, _ = listening.accept()
    theirs.settimeout(10)
    with ours, theirs:
        two = Side(tls_accept, theirs, acceptor, binding)
        one = Side(tls_dial, ours, dialler)
        return one.ended(), two.ended()


@needs_openssl
@pytest.mark.parametrize('mine, its, ca', [('shared', 'shared', None), ('client', 'node', 'ca')])
def test_tls_with_certificates_that_fit(certificates, mine, its, ca):
    one, two = over_tls(context(certificates, False, mine, ca),
                        context(certificates, True, its, ca),
                        certificate_digest(str(certificates / (its + '.crt'))))
    assert (one.error, two.error) == (None, None)
    assert one.result.send_key == two.result.receive_key
    assert not one.result.tags_payloads and not two.result.tags_payloads


@needs_openssl
@pytest.mark.parametrize('mine, my_ca, its, its_ca', [
    ('stranger', 'shared', 'shared', None), ('shared', None, 'stranger', 'shared'),
    ('shared', 'ca', 'node', 'ca')])
def test_a_certificate_from_elsewhere_is_refused(certificates, mine, my_ca, its, its_ca):
    one, two = over_tls(context(certificates, False, mine, my_ca),
                        context(certificates, True, its, its_ca),
                        certificate_digest(str(certificates / (its + '.crt'))))
    assert isinstance(one.error, (HandshakeError, OSError))
    assert isinstance(two.error, (HandshakeError, EOFError, OSError))


@needs_openssl
def test_a_client_without_a_certificate_is_refused(certificates):
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.load_verify_locations(str(certificates / 'shared.crt'))
    one, two = over_tls(bare, context(certificates, True, 'shared'),
                        certificate_digest(str(certificates / 'shared.crt')))
    assert one.error is not None and isinstance(two.error, OSError)


@needs_openssl
def test_another_certificate_than_the_one_bound_is_refused(certificates):
    """A relay that ends TLS on both sides with certificates of the same CA."""
    one, two = over_tls(context(certificates, False, 'client', 'ca'),
                        context(certificates, True, 'node', 'ca'),
                        certificate_digest(str(certificates / 'client.crt')))
    assert isinstance(one.error, HandshakeError) and isinstance(two.error, HandshakeError)


@needs_openssl
def test_plain_to_tls_is_refused(certificates):
    one, two = over_tls(None, context(certificates, True, 'shared'),
                        certificate_digest(str(certificates / 'shared.crt')))
    assert isinstance(one.error, (HandshakeError, OSError)) and isinstance(two.error, OSError)


@needs_openssl
def test_tls_to_plain_is_refused(certificates):
    one, two = over_tls(context(certificates, False, 'shared'), None)
    assert isinstance(one.error, OSError) and isinstance(two.error, HandshakeError)


@needs_openssl
def test_contexts_demand_certificates_and_tls_12(certificates):
    for server in (True, False):
        tls = context(certificates, server, 'shared')
        assert (tls.verify_mode == ssl.CERT_REQUIRED
                and tls.minimum_version == ssl.TLSVersion.TLSv1_2)


@needs_openssl
def test_certificates_that_cannot_be_used_are_named(certificates):
    with pytest.raises(SecretError, match='node.crt.*stranger.key'):
        tls_context(True, str(certificates / 'node.crt'), str(certificates / 'stranger.key'))
    with pytest.raises(SecretError, match='nowhere.crt'):
        context(certificates, True, 'node', 'nowhere')
    with pytest.raises(SecretError, match='node.key'):
        tls_context(True, str(certificates / 'node.crt'), str(certificates / 'node.key'),
                    str(certificates / 'node.key'))
