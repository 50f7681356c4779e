"""Which releases talk to which, and that each can be built: against what was recorded of a release,
and its archives."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile

import pytest

import dispy
import dispynode
from conftest import ROOT, eventually
from dispynode import HandshakeError, Role, handshake_accept, handshake_dial
from nodes import NodeProcess
from recorded_peer import CHALLENGE, HELLO, MAGIC, NODE, SCHEDULER, RecordedPeer, recorded

SECRET = '5eed' * 16
KEY = dispynode.derive_key(SECRET.encode())
OLDER = 'before-5.0'     # the first minor version
RELEASES = sorted(name[:-5] for name in os.listdir(os.path.join(ROOT, 'tests', 'releases')))


def messages():
    return [pytest.param(dict(row, minor=recorded(release)['minor']),
                         id='%s-%s-%d' % (release, row['name'], number))
            for release in RELEASES for number, row in enumerate(recorded(release)['messages'])]


@pytest.mark.parametrize('row', messages())
def test_messages_of_earlier_releases_are_understood_and_what_is_sent_to_them_is_theirs(row):
    """Number, fields and meaning of a message are fixed by its release."""
    kind = dispynode.MESSAGES[row['op']][0]
    since, later = dispynode.LATER_FIELDS.get(kind, (0, ()))
    if since <= row['minor']:
        later = ()
    assert len(kind._fields) == len(row['fields']) + len(later)
    message = dispynode.decode(row['op'], row['encoding'], bytes.fromhex(row['payload']))
    assert message[len(row['fields']):] == later
    op, encoding, pieces = dispynode.encode_for(row['minor'], message)
    assert (op, encoding, b''.join(map(bytes, pieces)).hex()) == (row['op'], row['encoding'],
                                                                  row['payload'])


def test_all_messages_of_the_minor_versions_of_releases_are_recorded():
    """A message that is not must take a new minor version."""
    if dispynode.VERSIONS[1] <= max(recorded(release)['minor'] for release in RELEASES):
        ops = {row['op'] for release in RELEASES for row in recorded(release)['messages']}
        assert set(dispynode.MESSAGES) == ops


def test_what_is_recorded_of_the_release_to_come_is_what_this_tree_speaks():
    """It may not be recorded yet. If its messages have changed since, it is to be recorded anew:
    see recorded_peer.py."""
    ours = '.'.join(dispynode.__version__.split('.')[:2])
    numbers = [tuple(map(int, name.split('.'))) for name in [ours, *RELEASES] if name != OLDER]
    if ours in RELEASES:
        assert recorded(ours)['minor'] == dispynode.VERSIONS[1]
        fields = {row['name']: tuple(row['fields']) for row in recorded(ours)['messages']}
        assert fields == {kind.__name__: kind._fields for kind in dispynode.OPS}
    else:
        assert numbers[0] == max(numbers)


# -- a client of that release on a node of this one, and the inverse -------------------------------

def spec(code):
    return {'name': 'double', 'kind': 'function', 'code': code, 'files': [], 'cleanup': True,
            'dest_path': '', 'max_jobs': 0, 'python': tuple(sys.version_info[:3]), 'support': {},
            'program': '', 'live': False, 'logs': -1, 'cpus': 0, 'setup_args': b'', 'modules': [],
            'portable': False, 'sys_path': [], 'argv': [], 'key': bytes(32)}


def sealed(value):
    """As release 5.0 seals what has no large parts: a number of them, which is 0, and the
    pickle."""
    return dispynode.in_one_piece(dispynode.dumps(value).payload)


def greet(peer, name):
    """As a client of that release. What it has beside name and pulse is left empty."""
    peer.send('ClientHello', name, 2.0, *((), ) * (len(peer.fields['ClientHello']) - 2))


@pytest.mark.parametrize('release, versions',
                         [(OLDER, (1, 1)), ('5.0', (1, 2)), ('5.0', (1, 7))])
def test_a_client_of_that_release_uses_a_node_of_this_one(tmp_path, release, versions):
    with NodeProcess(tmp_path / 'node', env={'DISPY_SECRET': SECRET}) as node:
        peer = RecordedPeer(socket.create_connection(node.address, 20), SECRET.encode(), release)
        try:
            assert peer.dial(versions) == recorded(release)['minor']
            greet(peer, 'me')
            assert peer.receive_until('NodeHello')[1] == 2
            comp = 'c' * 32
            peer.send('Compute', comp, spec(sealed((hex, None, None, {}))))
            assert peer.receive_until('Ready')[0] == comp
            peer.send('Jobs', comp,
                      [(1, sealed(((10,), {})), None), (2, sealed((('x',), {})), None)])
            got = {}
            while len(got) < 2:
                name, fields = peer.receive()
                if name == 'Results':
                    got.update((row[0], row[1:]) for row in fields[1])
            assert b'0xa' in bytes(got[1][3]) and b'TypeError' in bytes(got[2][3])
            other = RecordedPeer(socket.create_connection(node.address, 20), SECRET.encode(),
                                 release)
            other.dial(versions)
            greet(other, 'you')
            other.send('Compute', 'd' * 32, spec(b''))
            refused = other.receive_until('Refused')
            other.close()
            assert refused[:2] == ('d' * 32, 'busy') and refused[2].startswith('it serves me')
            assert len(refused) == len(other.fields['Refused'])
            assert refused[3:] in ((), ((), ))   # a field that version 1 does not have
            peer.send('Ack', comp, [1, 2])
            peer.send('Done', comp)
            peer.send('Bye', 'enough')
        finally:
            peer.close()


class OldNode:
    """A node, or a scheduler, of that release: it runs what it is given, and knows all results to
    be 'done'. `specs` are those that it was given, `rows` the jobs, `hello` what it was greeted
    with, and `said` the version and the names of the messages that have come."""

    def __init__(self, release=OLDER, **facts):
        self._release = release
        self._facts = dict({'python': tuple(sys.version_info[:3]), 'cloudpickle': '3.0',
                            'holder': '', 'kept': {}, 'pid': 1, 'platform': 'x',
                            'dispy': '5.0.0'}, **facts)
        self.specs, self.rows, self.said, self.hello = [], [], [], ()
        self._listener = socket.socket()
        self._listener.bind(('127.0.0.1', 0))
        self._listener.listen(1)
        self.address = self._listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._serve)

    def _serve(self):
        sock, _ = self._listener.accept()
        sock.settimeout(20)
        peer = RecordedPeer(sock, SECRET.encode(), self._release)
        try:
            is_scheduler = self._facts.get('role') == 'scheduler'
            self.said.append(peer.accept(SCHEDULER if is_scheduler else NODE))
            name, self.hello = peer.receive()
            assert name == 'ClientHello'
            peer.send('NodeHello', 'recorded', 1, self._facts)
            while True:
                name, fields = peer.receive()
                self.said.append(name)
                if name == 'Compute':
                    self.specs.append(fields[1])
                    peer.send('Ready', fields[0], [], dispynode.AttemptHistory().row())
                elif name == 'Jobs':
                    self.rows += fields[1]
                    rows = [(serial, 1, 1.0, 2.0, sealed('done'), b'', b'')
                            for serial, *_ in fields[1]]
                    peer.send('Results', fields[0], rows)
        except (EOFError, OSError):
            pass
        finally:
            peer.close()

    def __enter__(self):
        self._thread.start()
        return self

    def join(self):
        """Wait until the client has gone."""
        self._thread.join(30)

    def __exit__(self, *exc):
        self.join()
        self._listener.close()


@pytest.fixture
def old_node():
    with OldNode() as node:
        yield node


@pytest.mark.parametrize('release', RELEASES)
def test_a_client_of_this_release_uses_a_node_of_that_one(release):
    with OldNode(release) as old_node, \
            dispy.JobCluster(hex, nodes=[old_node.address], secret=SECRET) as cluster:
        assert cluster.submit(10).get(30) == 'done'
    assert len(old_node.hello) == (2 if release == OLDER else 3)   # as that release has it
    assert old_node.said[0] == dispynode.VERSIONS
    assert {'Compute', 'Jobs', 'Done'} <= set(old_node.said)


# -- what was added to messages since, with a peer that does not know it ---------------------------

def reason_at(cluster):
    """Why the only node of a cluster is not used."""
    eventually(lambda: [node.reason for node in cluster.status().nodes if node.reason])
    return cluster.status().nodes[0].reason


def test_an_older_node_offers_no_resources(old_node, caplog):
    with dispy.JobCluster(hex, nodes=[old_node.address], secret=SECRET,
                          resources={'gpu': 1}) as cluster:
        job = cluster.submit(10)
        eventually(lambda: 'it needs 1 gpu (dispy_resources), and no node has any' in caplog.text)
        assert cluster.submit(10, dispy_resources={}).get(30) == 'done'
        cluster.cancel(job)
    assert [row[2] for row in old_node.rows] == [None]


def test_an_older_node_has_no_other_python(old_node):
    with dispy.JobCluster(hex, nodes=[old_node.address], secret=SECRET, python='lab') as cluster:
        assert 'it has no Python lab (python=)' in reason_at(cluster)
    assert old_node.specs == []


def test_an_older_node_needs_nothing_for_second_attempts(old_node):
    with dispy.JobCluster(hex, nodes=[old_node.address], secret=SECRET, reentrant=True,
                          speculate=True) as cluster:
        assert [cluster.submit(10).get(30) for _ in range(12)] == ['done'] * 12
    assert 'speculate' not in old_node.specs[0]


def test_an_older_scheduler_says_what_it_does_not_know(caplog):
    with OldNode(role='scheduler') as scheduler:
        with dispy.SharedJobCluster(hex, scheduler_host='127.0.0.1',
                                    scheduler_port=scheduler.address[1], secret=SECRET,
                                    reentrant=True, speculate=True) as cluster:
            assert cluster.submit(10).get(30) == 'done'
            job = cluster.submit(10, dispy_resources={'gpu': 1})
            eventually(lambda: 'the scheduler is of an earlier release of dispy, which does not '
                       'know of them: update the scheduler and its nodes' in caplog.text)
            cluster.cancel(job)
        assert 'does not know of speculate=True: no job is started a second time. Update the ' \
            'scheduler' in caplog.text
        [spec] = scheduler.specs
        assert set(spec['shared']) == {'nodes', 'reentrant', 'exclusive', 'cloudpickle',
                                       'recovers', 'process', 'collected'}


def test_an_older_scheduler_is_not_given_what_needs_another_python(caplog):
    with OldNode(role='scheduler') as scheduler:
        with dispy.SharedJobCluster(hex, scheduler_host='127.0.0.1',
                                    scheduler_port=scheduler.address[1], secret=SECRET,
                                    python='3.12'):
            eventually(lambda: 'it is of an earlier release of dispy, which does not know of '
                       'python=3.12: update the scheduler and its nodes' in caplog.text)
        assert scheduler.specs == []


# -- those that do not talk to each other say so by both versions ----------------------------------

@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    ours.settimeout(20), theirs.settimeout(20)
    yield ours, theirs
    ours.close(), theirs.close()


def test_who_accepts_tells_both_versions(pair):
    pair[1].sendall(HELLO.pack(MAGIC, 7, 9, Role.CLIENT, Role.NODE, 0, b'c' * 16, bytes(32), b''))
    with pytest.raises(HandshakeError,
                       match='it speaks minor versions 7 to 9, and dispy %s here speaks 1 to 2'
                       % re.escape(dispynode.__version__)):
        handshake_accept(pair[0], KEY, Role.NODE, [Role.CLIENT], b'n' * 16)
    magic, version, *_, release = CHALLENGE.unpack(pair[1].recv(CHALLENGE.size))
    assert magic == dispynode.ALERT and version == dispynode.VERSIONS[1]
    assert release.rstrip(b'\0').decode() == dispynode.__version__[:16]


@pytest.mark.parametrize('name, told',
                         [(b'6.2.1', 'it is dispy 6.2.1 and speaks'), (b'\x1b[2J', ': it speaks'),
                          (b'', ': it speaks')])
def test_who_dials_tells_both_versions(pair, name, told):
    pair[1].sendall(CHALLENGE.pack(dispynode.ALERT, 9, Role.NODE, 0, 0, b'n' * 16, bytes(32), name))
    with pytest.raises(HandshakeError) as caught:
        handshake_dial(pair[0], KEY, Role.CLIENT, Role.NODE, b'c' * 16)
    text = str(caught.value)
    assert (told in text and 'versions 1 to 9' in text and dispynode.__version__ in text
            and 'Update the older one' in text)
    assert text.isprintable()


def test_a_session_knows_the_minor_version(pair):
    found = []
    thread = threading.Thread(target=lambda: found.append(
        handshake_accept(pair[0], KEY, Role.NODE, [Role.CLIENT], b'n' * 16)))
    thread.start()
    session = handshake_dial(pair[1], KEY, Role.CLIENT, Role.NODE, b'c' * 16)
    thread.join(20)
    assert (session.version, found[0].version) == (dispynode.VERSIONS[1],) * 2


# -- what is released ------------------------------------------------------------------------------

def test_the_archives_can_be_built_and_are_right(tmp_path):
    """`python -m build` and `twine check`, without the network. An installed archive has all four
    modules and their types."""
    for module in ('build', 'twine'):
        pytest.importorskip(module, reason='%s is not installed' % module)
    source = tmp_path / 'source'
    others = shutil.ignore_patterns('.git', '.venv', 'build', 'dist', '*.egg-info', '__pycache__',
                                    '.pytest_cache')
    shutil.copytree(ROOT, str(source), ignore=others)
    out = tmp_path / 'dist'
    run = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'universal_newlines': True,
           'cwd': str(source)}
    done = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', str(out)],
                          **run)
    assert done.returncode == 0, done.stdout[-3000:]
    names = sorted(os.listdir(str(out)))
    assert len(names) == 2 and names[0].endswith('.whl') and names[1].endswith('.tar.gz')
    done = subprocess.run([sys.executable, '-m', 'twine', 'check', '--strict',
                           *(str(out / name) for name in names)], **run)
    assert done.returncode == 0 and done.stdout.count('PASSED') == 2, done.stdout
    with zipfile.ZipFile(str(out / names[0])) as wheel:
        inside = wheel.namelist()
    for module in ('dispy', 'dispynode', 'dispyscheduler', 'dispy_httpd'):
        assert module + '.py' in inside and module + '-stubs/__init__.pyi' in inside


def test_the_changes_name_this_release():
    with open(os.path.join(ROOT, 'CHANGELOG.md')) as file:
        first = re.search(r'^## (\S+)', file.read(), re.MULTILINE).group(1)
    assert dispynode.__version__.startswith(first)
