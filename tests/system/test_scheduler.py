"""dispyscheduler: several programs share nodes."""

import json
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys

import pytest

import dispy
from conftest import eventually
from dispy import DispyJob, DispyNode
from dispynode import Compute, Done, ClientHello, Jobs, Link, Role, derive_key, dial
from nodes import NodeProcess, SchedulerProcess, start_here
from proxy import Proxy
from scenes import Gate, hold


@pytest.fixture
def node(tmp_path):
    with NodeProcess(tmp_path / 'one', '--name', 'one') as node:
        yield node


@pytest.fixture
def scheduler(tmp_path, node):
    with SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:%d' % node.port,
                          '--pulse-interval', '1', '--ping-interval', '1') as scheduler:
        yield scheduler


def shared(compute, scheduler, **options):
    return dispy.SharedJobCluster(compute, scheduler_port=scheduler.port, **options)


def whole(seconds=0.0):
    """When it ran, and where."""
    import time
    began = time.time()
    time.sleep(seconds)
    return began, time.time(), dispy_node_name   # noqa: F821


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path / 'gate')
    yield gate
    gate.open()


PROGRAM = '''
import sys, dispy
def compute(n):
    return n * 10
with dispy.SharedJobCluster(compute, scheduler_port=int(sys.argv[1])) as cluster:
    print([job() for job in [cluster.submit(n) for n in range(50)]] == [n * 10 for n in range(50)])
'''


# -- several programs ------------------------------------------------------------------------------

def test_programs_on_one_host_at_once(scheduler):
    programs = [start_here([sys.executable, '-c', PROGRAM, str(scheduler.port)],
                           stdout=subprocess.PIPE) for _ in range(4)]
    assert [program.communicate(timeout=60)[0].strip() for program in programs] == [b'True'] * 4


def test_clusters_side_by_side_on_one_node(scheduler, gate):
    """Each in its own processes and directory."""
    def compute(path, name):
        import os
        hold(path, name)
        return os.getppid(), os.getcwd()
    first, second = shared(compute, scheduler), shared(compute, scheduler)
    jobs = [first.submit(gate.path, 'a'), second.submit(gate.path, 'b')]
    eventually(lambda: gate.started() == ['a', 'b'])
    gate.open()
    runners, directories = zip(*[job(20) for job in jobs])
    assert len(set(runners)) == len(set(directories)) == 2
    first.close()
    assert second.submit(gate.path, 'c')(20)
    second.close()


def test_a_newcomer_is_served_within_the_length_of_a_job(scheduler, request):
    """However many jobs of another wait."""
    with shared(whole, scheduler) as first, shared(whole, scheduler) as second:
        second.wait_nodes(1, 20)
        many = [first.submit(0.05)
                for _ in range(1000000 if request.config.getoption('--long') else 50000)]
        first.node_jobs('one')   # the answer comes behind them: the scheduler has all of them now
        eventually(lambda: sum(job.status == DispyJob.Finished for job in many[:100]) > 40)
        before = sum(job.status == DispyJob.Finished for job in many)
        few = [second.submit(0.05) for _ in range(4)]
        assert second.wait(20)
        ended = sum(job.status == DispyJob.Finished for job in many) - before
        came = few[0].submit_time
        between = [job for job in many if job.status == DispyJob.Finished
                   and came < job.result[0] < few[0].result[0]]
        assert ended < 400 and len(between) <= 8, (ended, len(between))
        first.close(terminate=True)


def test_fifo_serves_in_the_order_of_coming(tmp_path, node, gate):
    with SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:%d' % node.port,
                          '--fifo') as scheduler:
        with shared(hold, scheduler) as holding, shared(whole, scheduler) as first, \
                shared(whole, scheduler) as second:
            held = [holding.submit(gate.path, n) for n in range(2)]
            eventually(lambda: len(gate.started()) == 2)
            for cluster in (first, second):
                cluster.wait_nodes(1, 20)
            early = [first.submit(0.02) for _ in range(20)]
            late = [second.submit(0.02) for _ in range(5)]
            gate.open()
            assert all(job.wait(20) for job in held + late + early)
            order = sorted(late + early, key=lambda job: job.result[0])
            # A node may have had one of each ahead
            assert sum(job in early for job in order[:15]) >= 13


def test_priorities_within_a_program(scheduler, gate):
    with shared(hold, scheduler) as holding, shared(whole, scheduler) as cluster:
        for n in range(2):
            holding.submit(gate.path, n)
        eventually(lambda: len(gate.started()) == 2)
        cluster.wait_nodes(1, 20)
        jobs = [cluster.submit(0.05, dispy_priority=n % 5, dispy_cpus=2) for n in range(20)]
        cluster.print_status()
        gate.open()
        assert cluster.wait(20)
        order = [n for _, n in sorted((job.result[0], n % 5) for n, job in enumerate(jobs))][2:]
        assert order == sorted(order, reverse=True)


def test_exclusive(scheduler, gate):
    """What others run ends; they wait, and go on afterwards; two that want the nodes alone take
    turns."""
    with shared(hold, scheduler) as holding, shared(whole, scheduler) as other:
        other.wait_nodes(1, 20)
        holding.submit(gate.path)
        eventually(lambda: gate.started())
        alone, next_alone = shared(whole, scheduler,
                                   exclusive=True), shared(whole, scheduler, exclusive=True)
        alone.wait_nodes(1, 20), next_alone.wait_nodes(1, 20)
        jobs = ([alone.submit(0.02) for _ in range(6)] + [next_alone.submit(0.02) for _ in range(3)]
                + [other.submit(0.02) for _ in range(3)])
        assert not jobs[0].wait(1)
        gate.open()
        assert alone.wait(20) and [job.status for job in jobs[6:]] == [DispyJob.Created] * 6
        alone.close()
        assert next_alone.wait(20) and [job.status for job in jobs[9:]] == [DispyJob.Created] * 3
        next_alone.close()
        assert other.wait(20)
    spans = [[job.result[:2] for job in part] for part in (jobs[:6], jobs[6:9], jobs[9:])]
    for before, after in zip(spans, spans[1:]):
        assert max(end for _, end in before) <= min(begin for begin, _ in after)


@pytest.mark.parametrize('end', ('close', 'close_node'))
def test_exclusive_begins_when_the_jobs_of_another_are_ended(scheduler, gate, end):
    """Not by themselves: their program leaves the node, or ends."""
    with shared(hold, scheduler, loglevel=60) as other:
        job = other.submit(gate.path)
        eventually(lambda: gate.started())
        with shared(whole, scheduler, exclusive=True) as alone:
            alone.wait_nodes(1, 20)
            waits = alone.submit()
            if end == 'close':
                other.close(terminate=True)
            else:
                other.close_node('one', terminate_pending=True)
            assert waits(20)[2] == 'one'
        assert job.wait(20) and job.status in (DispyJob.Cancelled, DispyJob.Terminated,
                                               DispyJob.Abandoned)


ALONE = '''
import sys, time, dispy
cluster = dispy.SharedJobCluster(lambda n: n, scheduler_port=int(sys.argv[1]), exclusive=True)
print(cluster.submit(1)(), flush=True)
time.sleep(600)
'''


def test_an_exclusive_program_that_was_killed_lets_others_on(scheduler):
    """Long before its results are given up."""
    program = start_here([sys.executable, '-c', ALONE, str(scheduler.port)], stdout=subprocess.PIPE)
    try:
        with program.stdout:
            assert program.stdout.readline() == b'1\n'
        with shared(whole, scheduler) as cluster:
            job = cluster.submit()
            cluster.wait_nodes(1, 20)
            assert job.status == DispyJob.Created
            program.kill()
            assert job(20)[2] == 'one'
    finally:
        program.kill()
        program.wait()


def test_a_program_with_a_broken_setup_fails_alone(scheduler):
    def setup():
        raise OSError('no data here')
    bad = shared(whole, scheduler, setup=setup, loglevel=60)
    with shared(whole, scheduler) as good:
        with pytest.raises(dispy.NoNodes, match='no data here'):
            bad.wait_nodes(1, 5)
        job = bad.submit()
        assert good.submit()(20)[2] == 'one'
        assert job.status == DispyJob.Created and 'no data here' in bad.status().all_nodes[0].reason
    bad.close(terminate=True)
    assert job.status == DispyJob.Cancelled


# -- addresses, secrets ----------------------------------------------------------------------------

def test_a_node_that_connects_to_the_scheduler(tmp_path):
    with SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:1', '--ping-interval',
                          '1') as scheduler:
        with NodeProcess(tmp_path / 'node', '--name', 'caller', '--scheduler-host',
                         '127.0.0.1:%d' % scheduler.port):
            with shared(whole, scheduler, loglevel=60) as cluster:
                assert cluster.submit()(30)[2] == 'caller'
                assert cluster.submit_node('caller')(30)[2] == 'caller'


@pytest.mark.parametrize('host', ('127.0.0.1', 'localhost', '127.0.0.1:PORT'))
def test_names_of_the_scheduler(scheduler, host):
    with dispy.SharedJobCluster(whole, scheduler_host=host.replace('PORT', str(scheduler.port)),
                                scheduler_port=scheduler.port) as cluster:
        assert cluster.submit()(20)


def test_two_secrets(tmp_path):
    files = {}
    for name in ('nodes', 'programs'):
        files[name] = str(tmp_path / name)
        with open(os.open(files[name], os.O_WRONLY | os.O_CREAT, 0o600), 'w') as file:
            file.write('the secret of all %s here' % name)
    with NodeProcess(tmp_path / 'node', '--secret-file', files['nodes']) as node, \
            SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:%d' % node.port,
                             '--node-secret-file', files['nodes'],
                             '--cluster-secret-file', files['programs']) as scheduler:
        with shared(whole, scheduler, secret='the secret of all programs here') as cluster:
            assert cluster.submit()(20)
        with shared(whole, scheduler, secret='the secret of all nodes here',
                    loglevel=60) as cluster:
            with pytest.raises(dispy.NoNodes, match='secret'):
                cluster.wait_nodes(1, 2)


def certificate(path):
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt',
                    'ec_paramgen_curve:prime256v1', '-nodes', '-days', '3', '-subj', '/CN=dispy',
                    '-keyout', path, '-out', path + '.crt'], check=True, stderr=subprocess.DEVNULL)
    with open(path + '.crt') as source, open(path, 'a') as target:
        target.write(source.read())
    os.chmod(path, 0o600)
    return path


@pytest.mark.skipif(not shutil.which('openssl'), reason='certificates are made with openssl')
def test_two_certificates(tmp_path):
    nodes, programs = (certificate(str(tmp_path / 'nodes.pem')),
                       certificate(str(tmp_path / 'programs.pem')))
    with NodeProcess(tmp_path / 'node', '--certfile', nodes) as node, \
            SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:%d' % node.port,
                             '--node-certfile', nodes, '--cluster-certfile', programs) as scheduler:
        with shared(whole, scheduler, certfile=programs) as cluster:
            assert cluster.submit()(20)
        for certfile in (nodes, None):
            with shared(whole, scheduler, certfile=certfile, loglevel=60) as cluster:
                with pytest.raises(dispy.NoNodes, match='127.0.0.1'):
                    cluster.wait_nodes(1, 1)


FORGED = '''
import sys, time
import dispy
from dispynode import Ack, Call, Cancel, Done, Jobs, Reclaim
cluster = dispy.SharedJobCluster(lambda: 1, scheduler_port=int(sys.argv[1]), loglevel=60)
assert cluster.submit()(20) == 1
driver, comp = dispy.core_of(cluster).driver, sys.argv[2]
number = 1 << 16 | 1
def forge():
    peer = driver.nodes.of(dispy.core_of(cluster).comp)[0]
    messages = {'cancel': Cancel(comp, [number]), 'done': Done(comp), 'ack': Ack(comp, [number]),
                'jobs': Jobs(comp, [(9 << 16, b'', None)]), 'reclaim': Reclaim(comp),
                'call': Call(comp, 1, 'leave', (('127.0.0.1', 1), 'close', True))}
    driver.send(peer.link, messages[sys.argv[3]])
driver.ask(forge)
time.sleep(0.5)
assert cluster.submit()(30) == 1     # it has connected again
cluster.close()
'''


@pytest.mark.parametrize('message', ('cancel', 'done', 'ack', 'jobs', 'reclaim', 'call'))
def test_a_program_cannot_touch_what_another_has(scheduler, gate, message):
    with shared(hold, scheduler) as cluster:
        jobs = [cluster.submit(gate.path, n) for n in range(3)]
        eventually(lambda: len(gate.started()) == 2)
        program = start_here([sys.executable, '-c', FORGED, str(scheduler.port),
                              dispy.core_of(cluster).comp, message], stderr=subprocess.PIPE)
        gate.open()
        assert [job(20) for job in jobs] == [0, 1, 2]
        assert program.wait(60) == 0, program.stderr.read().decode()
        program.stderr.close()
        assert cluster.submit(gate.path, 'again')(20) == 'again'
    assert message == 'reclaim' or 'is of another program' in scheduler.log()


SPEC = {'name': 'x', 'kind': 'function', 'code': b'', 'files': [], 'cleanup': True, 'dest_path': '',
        'max_jobs': 0, 'python': (3, 11, 0), 'support': {}, 'program': '', 'live': False, 'logs': 0,
        'cpus': 0, 'setup_args': b'', 'modules': [], 'portable': False, 'sys_path': [], 'argv': [],
        'shared': {'nodes': None, 'reentrant': False, 'exclusive': False, 'cloudpickle': '1'}}
WRONG = {
    'pulse': [ClientHello('a', 10 ** 400)],
    'timeout': [Compute('c0', SPEC), Jobs('c0', [(1, b'x', {'timeout': 10 ** 400})])],
    'serial': [Compute('c0', SPEC), Jobs('c0', [(1 << 63, b'x', None)])],
    'unpicklable': [Compute('c0', dict(SPEC, extra=pickle.PickleBuffer(b'x')))],
    'own': [Compute('keepconnected', SPEC), Done('keepconnected')],
}


@pytest.mark.parametrize('wrong', sorted(WRONG))
def test_wrong_messages_of_a_program_end_its_link_alone(scheduler, wrong):
    """It knows the secret, and is no program of dispy's."""
    with shared(lambda: 1, scheduler) as cluster:
        assert cluster.submit()(20) == 1
        arrival = dial('127.0.0.1', scheduler.port, derive_key(os.environ['DISPY_SECRET'].encode()),
                       Role.CLIENT, Role.SCHEDULER, os.urandom(16))
        with arrival.sock:
            link = Link(arrival.sock, arrival.session, arrival.address, 0.0)
            for message in [ClientHello('a', 1.0)] * (wrong != 'pulse') + WRONG[wrong]:
                link.send(message)
            link.write()
            eventually(lambda: 'the connection to' in scheduler.log()
                       or scheduler.process.poll() is not None)
        assert cluster.submit()(20) == 1
    with shared(lambda: 2, scheduler) as other:
        assert other.submit()(20) == 2
    assert scheduler.process.poll() is None and 'nothing was received' not in scheduler.log()


# -- methods of a cluster --------------------------------------------------------------------------

def test_methods_reach_the_scheduler(tmp_path, scheduler, node):
    told = []
    with NodeProcess(tmp_path / 'two', '--name', 'two') as two:
        (tmp_path / 'data.txt').write_text('data')
        with shared(whole, scheduler, nodes=[node.address, two.address],
                    cluster_status=lambda status, node,
                    job: told.append((status, node and node.name))) as cluster:
            cluster.wait_nodes(2, 20)
            assert cluster.submit_node('two')(20)[2] == 'two'
            assert cluster.set_node_cpus('one', 1) == 1
            assert {(each.name, each.cpus) for each in cluster.status().nodes} == {('one', 1),
                                                                                   ('two', 2)}
            assert cluster.node_jobs('two', from_node=True) == []
            assert cluster.send_file(str(tmp_path / 'data.txt'), 'two') == 0
            cluster.close_node('one')
            assert {cluster.submit()(20)[2] for _ in range(5)} == {'two'}
            cluster.resetup_node('two')
            assert cluster.submit()(20)[2] == 'two'
            cluster.allocate_node('one')
            assert cluster.submit_node('one')(20)[2] == 'one'
        assert ((DispyNode.Initialized, 'one') in told and (DispyNode.Closed, 'one') in told
                and (DispyJob.Finished, 'two') in told)


def test_files_that_are_too_large_for_the_scheduler(tmp_path, node):
    (tmp_path / 'data').write_bytes(b'x' * 2000)
    with SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:%d' % node.port,
                          '--max-file-size', '1k') as scheduler:
        with shared(whole, scheduler) as cluster:
            cluster.wait_nodes(1, 20)
            with pytest.raises(OSError, match='data has 2000 bytes, and --max-file-size is 1024'):
                cluster.send_file(str(tmp_path / 'data'), 'one')
            assert cluster.submit()(20)[2] == 'one'


def test_an_allocator_of_the_program(scheduler, tmp_path):
    class Some(dispy.NodeAllocate):
        def allocate(self, cluster, ip_addr, name, cpus, avail_info=None, platform=''):
            self.setup_args = (name, cpus)
            return 1

    def setup(name, cpus):
        global seen
        seen = (name, cpus)

    def compute():
        return seen   # noqa: F821
    with shared(compute, scheduler, nodes=[Some('*')], setup=setup) as cluster:
        assert cluster.submit()(20) == ('one', 2)
        assert cluster.status().nodes[0].cpus == 1
        scheduler.kill()
        with SchedulerProcess(scheduler.directory, port=scheduler.port):
            job = cluster.submit()
            assert job(30) == ('one', 2)
            cluster.close()


def test_status_names_the_nodes_of_the_scheduler(scheduler, node, capsys):
    with shared(whole, scheduler) as cluster:
        cluster.wait_nodes(1, 20)
        assert ([(each.name, each.port, each.cpus, each.state) for each in cluster.status().nodes]
                == [('one', node.port, 2, 'ready')])
        cluster.print_status()
        assert 'one' in capsys.readouterr().out
    with shared(whole, scheduler, nodes=[('127.0.0.1', 9)], loglevel=60) as cluster:
        with pytest.raises(dispy.NoNodes, match='127.0.0.1:9.*no program listens'):
            cluster.wait_nodes(1, 5)


def test_without_a_scheduler_a_program_says_so_and_waits(tmp_path, node, scheduler, caplog):
    port = scheduler.port
    scheduler.stop()
    cluster = dispy.SharedJobCluster(whole, scheduler_port=port, ping_interval=1)
    job = cluster.submit()
    eventually(lambda: 'dispyscheduler 127.0.0.1:%d cannot be used: no program listens'
               % port in caplog.text)
    with pytest.raises(dispy.NoNodes,
                       match=r'dispyscheduler 127.*Run `python dispyscheduler\.py` there'):
        cluster.wait_nodes(1, 0.5)
    with SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:%d' % node.port, port=port):
        assert job(30)[2] == 'one'
        cluster.close()


# -- the daemon ------------------------------------------------------------------------------------

def run(*args):
    done = subprocess.run([sys.executable, '-m', 'dispyscheduler', '-i', '127.0.0.1',
                           *map(str, args)],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
    return done.returncode, done.stderr.decode()


def test_what_stops_the_start(tmp_path, scheduler):
    """One line, which says what to do."""
    def told(*args):
        code, text = run(*args)
        assert code == 1 and text.count('\n') == 1, text
        return text
    assert 'in use by another' in told('-p', 0, '--state-dir', scheduler.state)
    assert 'port %d is in use' % scheduler.port in told('-p', scheduler.port, '--state-dir',
                                                        tmp_path / 'other')
    assert '-p/--port' in told('-p', 70000, '--state-dir', tmp_path / 'other')
    assert 'in use by another' in told('-p', 0, '--state-dir', scheduler.state, '--clean')
    assert run('--fair', '--fifo')[0] == 2
    scheduler.stop()
    db = sqlite3.connect(os.path.join(scheduler.state, 'state.db'))
    db.execute('PRAGMA user_version=77')
    db.close()
    text = told('-p', 0, '--state-dir', scheduler.state)
    assert 'version 77' in text and 'move it away' in text


def test_clean_forgets_what_was_left(tmp_path, node, gate):
    scheduler = SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:1')
    cluster = shared(whole, scheduler, loglevel=60)
    cluster.submit(), cluster.submit(os.urandom(100000))
    eventually(lambda: os.listdir(os.path.join(scheduler.state, 'large')))
    scheduler.kill()
    scheduler = SchedulerProcess(tmp_path / 'scheduler', '--clean', '-n', '127.0.0.1:1')
    scheduler.stop()
    db = sqlite3.connect(os.path.join(scheduler.state, 'state.db'))
    assert db.execute('SELECT count(*) FROM jobs').fetchone() == (0,)
    db.close()
    assert (os.listdir(os.path.join(scheduler.state, 'large')) == []
            and not [name for name in os.listdir(scheduler.state) if name.startswith('c-')])
    cluster.close(terminate=True)


def test_config(tmp_path):
    path = str(tmp_path / 'config')
    assert run('--fifo', '-n', 'host1', '-n', 'host2:9', '--node-secret', 'secret of the nodes',
               '--save-config', path) == (0, '')
    with open(path) as file:
        saved = json.load(file)
    assert (saved['fifo'] is True and saved['node'] == ['host1', 'host2:9']
            and 'secret of the nodes' not in str(saved))
    with SchedulerProcess(tmp_path / 'scheduler', '--config', path) as scheduler:
        assert scheduler.process.poll() is None


# -- recovery --------------------------------------------------------------------------------------

RECOVERED = '''
import sys, time, dispy
def compute(n):
    time.sleep(0.1)
    return n * n
cluster = dispy.SharedJobCluster(compute, scheduler_port=int(sys.argv[1]), recover_file=sys.argv[2])
jobs = [cluster.submit_job_id(n, n) for n in range(12)]
jobs[2]()
print('ready', flush=True)
time.sleep(600)
'''


@pytest.mark.parametrize('carry_on', (False, True))
def test_recovery(scheduler, tmp_path, carry_on):
    path = str(tmp_path / 'recover')
    program = start_here([sys.executable, '-c', RECOVERED, str(scheduler.port), path],
                         stdout=subprocess.PIPE)
    with program.stdout:
        assert program.stdout.readline() == b'ready\n'
    program.kill()
    program.wait()
    if carry_on:
        def compute(n):
            return n * n
        with shared(compute, scheduler, recover_file=path) as cluster:
            assert cluster.submit(100)(30) == 10000
            assert cluster.wait(30)
    else:
        jobs = dispy.recover_jobs(path, 30)
        assert {job.id: job.result for job in jobs} == {n: n * n for n in range(12)}
    eventually(lambda: not [name for name in os.listdir(scheduler.state) if name.startswith('c-')])


def test_questions_that_come_before_the_files(scheduler, node, tmp_path):
    data = tmp_path / 'data'
    data.write_bytes(bytes(100 << 20))
    with shared(whole, scheduler, depends=[str(data)]) as cluster:
        job = cluster.submit()
        assert cluster.node_jobs(node.address) in ([], [job])
        assert cluster.set_node_cpus(node.address, 1) == 1
        assert job(60) and cluster.node_jobs(node.address) == []


def test_questions_that_come_before_the_cluster(scheduler, node):
    """Over a link on which a message takes 0.2 s: the scheduler is told of the cluster when it has
    said who it is, and asked after that."""
    with Proxy(('127.0.0.1', scheduler.port), delay=0.2) as proxy:
        with dispy.SharedJobCluster(abs, scheduler_port=proxy.address[1]) as cluster:
            assert cluster.node_jobs(node.address) == []
            assert cluster.submit(-1)(30) == 1


# -- a full disk -----------------------------------------------------------------------------------

@pytest.mark.parametrize('small_disk', ('8m',), indirect=True)
@pytest.mark.parametrize('size', (10000, 300000))
def test_a_full_disk(small_disk, tmp_path, node, size):
    """What is not kept is not acknowledged; it is told, and goes on when there is room."""
    with SchedulerProcess(os.path.join(small_disk, 'scheduler'), '-n',
                          '127.0.0.1:%d' % node.port) as scheduler:
        with shared(lambda data: data[::-1], scheduler) as cluster:
            assert cluster.submit(b'ab')(20) == b'ba'
            filling = os.path.join(small_disk, 'filling')
            # close() shall have nothing left to write
            with open(filling, 'wb', buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(65536))
                except OSError:
                    pass
            data = [os.urandom(size) for _ in range(9)]
            jobs = [cluster.submit(each) for each in data]
            eventually(lambda: 'cannot be written' in scheduler.log())
            assert [job.status for job in jobs if job.status == DispyJob.Finished] == []
            os.unlink(filling)
            assert cluster.wait(30) and [job.result for job in jobs] == [each[::-1]
                                                                         for each in data]
            assert 'can be written again' in scheduler.log()
