"""Programs beside each other at a scheduler: what one does costs the others nothing."""

import hashlib
import logging
import os
import socket
import subprocess
import sys
import time

import pytest

import dispy
from conftest import ROOT, eventually
from dispy import DispyJob
from dispynode import (
    Call, Compute, Done, FilePiece, HandshakeError, KnownAttempts, ClientHello, Jobs, Need, Purpose,
    Ready, Reclaim, Refused, Return, Role, NodeHello)
from dispyscheduler import _check_allowed, may_dial
from nodes import NodeProcess, SchedulerProcess
from talk_link import Talk, answer, spec


@pytest.fixture
def node(tmp_path):
    with NodeProcess(tmp_path / 'node') as process:
        yield process


@pytest.fixture
def scheduler(tmp_path, node):
    with SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:%d' % node.port) as process:
        yield process


def shared(scheduler, compute=answer, **options):
    return dispy.SharedJobCluster(compute, scheduler_port=scheduler.port, loglevel=logging.CRITICAL,
                                  **options)


# -- one message -----------------------------------------------------------------------------------

ODD = {'a pattern': [Compute('a', {'nodes': '*' * 30 + 'a'})],
       'a very long name in a question': [Call('', 1, 'x' * 1000000, ())],
       'a place of a long name': [FilePiece('a', int(Purpose.PLACED), 0,
                                            ('x' * 100000, 1, bytes(32), 0), 0, b'x')],
       'many computations': [Done('a')] * 100,
       'an overview of nonsense': [Call('', 1, 'overview', (('deep',) * 3, []))],
       'a very large overview': [Call('', 1, 'overview', ('clusters', 0, 10 ** 30))]}


@pytest.mark.parametrize('odd', ODD.values(), ids=list(ODD))
def test_one_odd_message_ends_nobody_else(scheduler, odd):
    with shared(scheduler) as cluster:
        assert cluster.submit()(30) == 42
        with Talk(scheduler.port) as talk:
            for message in odd:
                if isinstance(message, Compute):
                    made = spec()
                    made['shared']['nodes'] = [(message.spec['nodes'], 9701, 0, 0)]
                    message = Compute(message.comp, made)
                talk.say(message)
            assert cluster.submit()(30) == 42
    assert scheduler.process.poll() is None


def test_files_of_the_host_are_not_read(scheduler, node):
    """`place` takes names of files that the program has sent, and regular ones."""
    with Talk(scheduler.port) as talk:
        talk.say(ClientHello('x', 2.0), Compute('a', spec()))
        talk.hear(Ready)
        directory = os.path.join(scheduler.state, 'c-a')
        os.mkfifo(os.path.join(directory, 'fifo'))
        for number, name in enumerate(('../../../../../../../../etc/passwd', '/etc/passwd',
                                       '../state.db', 'fifo', 'none')):
            talk.say(Call('a', number, 'place',
                          (('127.0.0.1', node.port), (name, 10, bytes(32), 0o600))))
            answer_of = talk.hear(Return)
            assert answer_of.number == number and answer_of.error, answer_of
    with shared(scheduler) as cluster:
        assert cluster.submit()(30) == 42


def test_a_computation_of_exactly_the_limit_fits_a_message():
    """960 MiB are the limit of a computation: a frame has room for its envelope then, and the
    scheduler for its own."""
    from dispynode import CHECKS, MESSAGES, WHOLE_MOST
    assert WHOLE_MOST + (4 << 20) < MESSAGES[4][1]
    assert not CHECKS[Jobs](('a', [(1, memoryview(bytes(1)).cast('B'), {'cpus': 0})]))


# -- much of everything ----------------------------------------------------------------------------

def test_a_program_that_does_not_read_is_not_read_from(scheduler):
    import psutil
    with Talk(scheduler.port) as talk:
        talk.say(ClientHello('x', 600.0), Compute('a', spec()))
        talk.hear(Ready)
        talk.say(Jobs('a', [(n << 16, b'\x80\x05)}\x86.', None) for n in range(1, 5001)]))
        before = psutil.Process(scheduler.process.pid).memory_info().rss
        talk.sock.settimeout(1)
        again = Compute('a', spec())
        try:
            for _ in range(3000):
                talk.say(again)
        except OSError:   # it is not read from any more
            pass
        with shared(scheduler) as cluster:
            assert cluster.submit()(60) == 42
        assert psutil.Process(scheduler.process.pid).memory_info().rss - before < 100 << 20


class Changed(SchedulerProcess):
    """A scheduler whose module is changed by a statement before it starts."""

    def __init__(self, directory, statement, *options):
        self.directory, self.state = str(directory), os.path.join(str(directory), 'state')
        os.makedirs(self.directory)
        self._log, self._from = os.path.join(self.directory, 'log'), 0
        code = ('import resource, sys; sys.path.insert(0, %r); import '
                'dispyscheduler; %s; sys.exit(dispyscheduler.main())' % (ROOT, statement))
        with open(self._log, 'wb') as log:
            self.process = subprocess.Popen([sys.executable, '-c', code, '-i', '127.0.0.1', '-p',
                                             '0', '--state-dir', self.state, *options],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.port = int(eventually(self._listening, what='start of a scheduler'))


def test_computations_of_one_program_are_bounded(tmp_path, node):
    made = spec()
    with Changed(tmp_path / 's', 'dispyscheduler.COMPS_MOST = 3', '-n',
                 '127.0.0.1:%d' % node.port) as scheduler, Talk(scheduler.port) as talk:
        talk.say(ClientHello('x', 600.0), *[Compute('c%d' % n, made) for n in range(4)])
        refused = talk.hear(Refused)
        assert refused.comp == 'c3' and 'limit is 3' in refused.text
        with shared(scheduler) as cluster:
            assert cluster.submit()(60) == 42


def test_connections_from_one_address_are_bounded(tmp_path, node):
    """A scheduler with few descriptors: the rest is for nodes, and for programs elsewhere."""
    talks = []
    with Changed(tmp_path / 's', 'resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))', '-n',
                 '127.0.0.1:%d' % node.port) as scheduler:
        for _ in range(60):
            talks.append(Talk(scheduler.port))
        ended = 0
        for talk in talks:
            talk.say(ClientHello('x', 600.0))
            try:
                talk.hear(NodeHello)
            except (EOFError, OSError):
                ended += 1
        assert ended == 60 - (200 - 64) // 4
        for talk in talks:
            talk.sock.close()
        with shared(scheduler) as cluster:
            assert cluster.submit()(30) == 42


def test_a_quota_is_told_and_jobs_wait_for_it(tmp_path, node, caplog):
    caplog.set_level(logging.WARNING, 'dispy')
    with SchedulerProcess(tmp_path / 's', '-n', '127.0.0.1:%d' % node.port, '--max-queued-bytes',
                          '300k') as scheduler:
        with shared(scheduler) as other, \
                dispy.SharedJobCluster(len, scheduler_port=scheduler.port) as cluster:
            jobs = [cluster.submit(os.urandom(50000)) for _ in range(40)]
            assert other.submit()(30) == 42
            assert [job(60) for job in jobs] == [50000] * 40
            assert '--max-queued-bytes' in caplog.text
            assert cluster.submit(bytes(500000))(60) == 500000   # one is taken, however large


# -- a full disk -----------------------------------------------------------------------------------

@pytest.mark.parametrize('small_disk', ('12m',), indirect=True)
@pytest.mark.parametrize('size', (20000, 300000))
def test_a_full_disk_heals_when_its_program_ends(small_disk, tmp_path, node, size):
    """One program fills it and is closed: the others go on, and nobody has to remove anything."""
    def hold(data, path):
        while not os.path.exists(path):
            time.sleep(0.01)
        return len(data)
    flag = tmp_path / 'flag'
    with SchedulerProcess(os.path.join(small_disk, 'scheduler'), '-n',
                          '127.0.0.1:%d' % node.port) as scheduler:
        with shared(scheduler) as other:
            assert other.submit()(20) == 42
            culprit = shared(scheduler, hold)
            for _ in range((24 << 20) // size):
                culprit.submit(os.urandom(size), str(flag))
            eventually(lambda: 'cannot be written' in scheduler.log(), 60)
            jobs = [other.submit() for _ in range(20)]
            culprit.close(terminate=True)
            flag.write_text('')
            assert [job(60) for job in jobs] == [42] * 20
            assert scheduler.process.poll() is None


# -- secrets ---------------------------------------------------------------------------------------

def start(*args):
    return subprocess.run([sys.executable, '-m', 'dispyscheduler', '-i', '127.0.0.1', '-p', '0',
                           *args],
                          capture_output=True, text=True, timeout=30)


def secret_file(tmp_path, name, secret):
    path = tmp_path / name
    path.write_text(secret)
    os.chmod(path, 0o600)
    return str(path)


def test_programs_and_nodes_may_not_share_a_secret_of_programs(tmp_path):
    one = secret_file(tmp_path, 'one', 'a secret of programs alone')
    done = start('--cluster-secret-file', one, '--node-secret-file', one, '--state-dir',
                 str(tmp_path / 's'))
    assert (done.returncode == 1 and '--nodes-share-secret' in done.stderr
            and '--node-secret-file' in done.stderr)
    with SchedulerProcess(tmp_path / 's', '--cluster-secret-file', one, '--node-secret-file', one,
                          '--nodes-share-secret') as scheduler:
        assert scheduler.process.poll() is None


def test_programs_with_a_secret_of_their_own(tmp_path):
    """Such a program is no node, whoever dials, and sees names and counts of the others; the
    operator sees and ends all."""
    programs = secret_file(tmp_path, 'programs', 'the secret of programs')
    nodes = secret_file(tmp_path, 'nodes', 'the secret of nodes')
    with NodeProcess(tmp_path / 'n', '--secret-file', nodes) as node, SchedulerProcess(
            tmp_path / 's', '--cluster-secret-file', programs, '--node-secret-file', nodes, '-n',
            '127.0.0.1:%d' % node.port) as scheduler:
        with pytest.raises(HandshakeError):
            Talk(scheduler.port, 'the secret of programs', Role.NODE)
        with pytest.raises(HandshakeError):
            Talk(scheduler.port, 'the secret of nodes')
        with Talk(scheduler.port, 'the secret of nodes', Role.NODE):
            pass
        operator = open(os.path.join(scheduler.state, 'operator-secret')).read().strip()
        assert os.stat(os.path.join(scheduler.state, 'operator-secret')).st_mode & 0o077 == 0
        hold = tmp_path / 'flag'

        def compute(path, word):
            while not os.path.exists(path):
                time.sleep(0.01)
            return word
        with dispy.SharedJobCluster(compute, scheduler_port=scheduler.port, secret='the secret '
                                    'of programs', loglevel=logging.CRITICAL) as cluster:
            job = cluster.submit(str(hold), 'PASSWORD-1')
            eventually(lambda: job.status == DispyJob.Running)
            serial = job.serial
            for secret, sees in (('the secret of programs', False), (operator, True)):
                with Talk(scheduler.port, secret) as talk:
                    def ask(*question):
                        talk.say(Call('', 1, 'overview', question))
                        return talk.hear(Return)
                    row, = ask('clusters', 0, 10).value[1]
                    assert row['name'] == 'compute' and row['submitted'] == 1
                    assert bool(row['comp']) is sees and bool(row['program']) is sees
                    found = ask('arguments', [(row['number'], serial)])
                    assert (('PASSWORD' in str(found.value)) is sees
                            and bool(found.error) is not sees)
                    key = ask('nodes', 0, 10, False).value[1][0]['key']
                    for order in (('cancel_waiting', row['number']), ('cpus', key, 1),
                                  ('use', key)):
                        assert bool(ask(*order).error) is not sees
                    comp = dispy.core_of(cluster).comp
                    talk.say(Reclaim(comp, b'guess'))
                    assert talk.hear(KnownAttempts, Refused)[:2] == (comp, [])
            hold.write_text('')
            assert job(30) == 'PASSWORD-1'


def test_one_users_secret_is_the_operators_too(scheduler):
    with Talk(scheduler.port) as talk:
        talk.say(Call('', 1, 'overview', ('clusters', 0, 10)))
        assert not talk.hear(Return).error
    assert not os.path.exists(os.path.join(scheduler.state, 'operator-secret'))


def test_a_computation_is_its_programs_alone_while_its_files_come(scheduler):
    with Talk(scheduler.port) as owner, Talk(scheduler.port) as other:
        row = ('file', 3, hashlib.sha256(b'abc').digest(), 0o600)
        made = spec(files=[row])
        owner.say(ClientHello('x', 600.0), Compute('a', made))
        owner.hear(Need)
        other.say(Done('a'), FilePiece('a', int(Purpose.DEPENDS), 0, row, 0, b'xyz'),
                  Call('', 1, 'overview', ('nodes', 0, 1, False)))
        other.hear(Return)
        owner.say(FilePiece('a', int(Purpose.DEPENDS), 0, row, 0, b'abc'))
        assert owner.hear(Ready, Refused) == Ready('a', [])


# -- which addresses -------------------------------------------------------------------------------

@pytest.mark.parametrize('host, address, allowed, may', [
    ('', '10.1.2.3', (), True), ('', '127.0.0.1', (), True), ('', '192.168.5.5', (), True),
    ('', 'fe80::1%eth0', (), True), ('', '::ffff:10.0.0.1', (), True),
    ('', '8.8.8.8', (), False), ('', '2001:4860::8888', (), False), ('example.org', '', (), False),
    ('', '8.8.8.8', ('8.8.0.0/16',), True),
    ('', '10.1.2.3', ('8.8.0.0/16',), False), ('a.example.org', '', ('*.example.org',), True),
    ('b.example.com', '', ('*.example.org',), False)])
def test_addresses_that_may_be_dialled(host, address, allowed, may):
    assert may_dial(host, address, allowed) is may


def test_no_networks():
    for word in ('', '10.0.0.0/99', 'a b', 'a,b'):
        with pytest.raises(Exception, match='--allow-nodes'):
            _check_allowed(word)


def test_a_scheduler_dials_only_what_it_may(tmp_path, node):
    """A program cannot have any host tried out; that a port is open there is not told."""
    listener = socket.socket()
    listener.bind(('127.0.0.1', 0))
    listener.listen(5)
    listener.settimeout(0.2)
    port = listener.getsockname()[1]
    with SchedulerProcess(tmp_path / 's', '-n', '127.0.0.1:%d' % node.port, '--allow-nodes',
                          '10.99.0.0/16') as scheduler:
        with shared(scheduler, nodes=[('127.0.0.2', port), ('127.0.0.1', node.port)]) as cluster:
            assert cluster.submit()(30) == 42   # one that was named with -n
            reason = eventually(lambda: [each.reason for each in cluster.status().all_nodes
                                         if each.ip_addr == '127.0.0.2'
                                         and each.reason != 'not reached yet'])[0]
            assert '--allow-nodes' in reason
            with pytest.raises(socket.timeout):
                listener.accept()
    listener.close()
