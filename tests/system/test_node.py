"""The dispynode daemon as its users meet it: real processes on loopback."""

import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

import dispy
from conftest import ROOT, eventually
from dispy import DispyJob
from nodes import NodeProcess, run_node
from scenes import Gate, hold, square, where

SECRET = os.environ['DISPY_SECRET']


@pytest.fixture
def node(tmp_path):
    with NodeProcess(tmp_path / 'one', '--name', 'one') as node:
        yield node


# -- start and end ---------------------------------------------------------------------------------

def test_it_serves_and_sigterm_ends_it(node):
    with dispy.JobCluster(square, nodes=[node.address]) as cluster:
        assert [job() for job in [cluster.submit(n) for n in range(100)]] == [n * n
                                                                              for n in range(100)]
    assert node.stop() == 0
    assert sorted(os.listdir(node.prefix)) == ['dispy-node', 'lock', 'memory']


def test_idle_it_sleeps(node):
    """No busy loop while a client is connected and nothing happens."""
    with dispy.JobCluster(square, nodes=[node.address]) as cluster:
        assert cluster.submit(2)() == 4
        process = psutil.Process(node.process.pid)
        before, switches = process.cpu_times(), process.num_ctx_switches().voluntary
        time.sleep(1.0)   # a span to look at, not something to wait for
        after = process.cpu_times()
        assert after.user + after.system - before.user - before.system < 0.1
        assert process.num_ctx_switches().voluntary - switches < 50


def test_port_in_use(node):
    code, err = run_node('-p', str(node.port))
    assert code == 1 and str(node.port) in err and '-p/--port' in err and 'Traceback' not in err


def test_directory_in_use(node):
    code, err = run_node('-p', '0', '--dest-path-prefix', node.prefix)
    assert code == 1 and 'PID %d' % node.process.pid in err and '--dest-path-prefix' in err


@pytest.mark.parametrize('options, code, text', [
    (['-c', '-1000'], 2, '--cpus'), (['-p', '70000'], 1, '70000'), (['--colour'], 2, 'colour'),
    (['-i', '203.0.113.77'], 1, '203.0.113.77'), (['--secret-file', '/no/such'], 1, '/no/such'),
    (['--certfile', '/no/such.pem'], 1, '/no/such.pem'),
    (['--log-file', '/no/such/dir/log'], 1, '/no/such/dir')])
def test_bad_options(options, code, text):
    found, err = run_node('-p', '0', *options)
    assert found == code and text in err and 'Traceback' not in err


def test_a_secret_that_others_can_read(tmp_path):
    path = tmp_path / 'secret'
    path.write_text('0' * 64)
    path.chmod(0o644)
    code, err = run_node('-p', '0', '--secret-file', str(path))
    assert code == 1 and 'chmod 600' in err
    with pytest.raises(dispy.SecretError, match='chmod 600'):
        env = dict(XDG_CONFIG_HOME=str(tmp_path / 'home'))
        (tmp_path / 'home' / 'dispy').mkdir(parents=True)
        shutil.copy(str(path), str(tmp_path / 'home' / 'dispy' / 'secret'))
        os.chmod(str(tmp_path / 'home' / 'dispy' / 'secret'), 0o640)
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv('DISPY_SECRET')
            patch.setenv('XDG_CONFIG_HOME', env['XDG_CONFIG_HOME'])
            dispy.JobCluster(square, nodes='local')


def test_it_starts_again_after_kill_9(tmp_path):
    node = NodeProcess(tmp_path)
    with dispy.JobCluster(hold, nodes=[node.address], loglevel=logging.CRITICAL) as cluster:
        flag = Gate(tmp_path / 'flag')
        job = cluster.submit(flag.path)
        eventually(flag.started)
        family = psutil.Process(node.process.pid).children(recursive=True)
        node.kill()
        assert job.wait(5) and job.status == DispyJob.Abandoned and '127.0.0.1' in job.exception
        eventually(lambda: not any(child.is_running() for child in family),
                   what='end of runner and worker')
        with NodeProcess(tmp_path, port=node.port) as again:
            again_held = Gate(tmp_path / 'later')
            later = cluster.submit(again_held.path)
            eventually(again_held.started, what='the node to be used again')
            cluster.cancel(later)
            assert later.wait(20) and again.port == node.port


def test_sigterm_interrupts_what_runs_and_gives_back_what_waits(tmp_path):
    """The running job of a stopped node is Abandoned, the waiting one runs on the other node."""
    one = NodeProcess(tmp_path / 'one', '--name', 'one', cpus=1)
    with NodeProcess(tmp_path / 'two', '--name', 'two', cpus=1) as two:
        with dispy.JobCluster(hold, nodes=[one.address], loglevel=logging.CRITICAL) as cluster:
            flag = Gate(tmp_path / 'flag')
            jobs = [cluster.submit(flag.path) for _ in range(2)]
            eventually(flag.started)
            assert one.stop() == 0
            assert (jobs[0].wait(5) and jobs[0].status == DispyJob.Abandoned
                    and 'stopped' in jobs[0].exception)
            assert jobs[1].status == DispyJob.Created
            cluster.close(terminate=True)
        assert two.stop() == 0


def test_reentrant_jobs_of_a_lost_node_run_elsewhere(make_cluster, tmp_path):
    one = NodeProcess(tmp_path / 'one', '--name', 'one')
    with NodeProcess(tmp_path / 'two', '--name', 'two') as two:
        with make_cluster(where, nodes=[one.address, two.address], reentrant=True,
                          loglevel=logging.CRITICAL) as cluster:
            cluster.wait_nodes(2, 20)
            jobs = [cluster.submit(0.05) for _ in range(60)]
            eventually(lambda: sum(job.status == DispyJob.Finished for job in jobs) > 5)
            one.kill()
            assert cluster.wait(30)
            assert {job.status for job in jobs} == {DispyJob.Finished}
            assert {job.result for job in jobs} == {'one', 'two'}


def test_two_nodes_share_the_work(make_cluster, tmp_path, node):
    with NodeProcess(tmp_path / 'two', '--name', 'two') as two:
        with make_cluster(where, nodes=[node.address, {'host': '127.0.0.1', 'port': two.port,
                                                       'cpus': 1}]) as cluster:
            cluster.wait_nodes(2, 20)
            names = [job() for job in [cluster.submit(0.03) for _ in range(60)]]
            assert 25 <= names.count('one') <= 50
            assert {node.name: node.cpus for node in cluster.status().nodes} == {'one': 2, 'two': 1}


def test_what_waits_on_one_node_is_called_back_for_another(make_cluster, tmp_path, node):
    """Jobs thought short turn out long: those that stand behind them on one node go to the idle
    one."""
    flag = str(tmp_path / 'go')

    def compute(flag):
        while flag and not os.path.exists(flag):
            time.sleep(0.01)
        return dispy_node_name   # noqa: F821
    with NodeProcess(tmp_path / 'two', '--name', 'two') as two:
        with make_cluster(compute, nodes=[node.address, two.address],
                          loglevel=logging.CRITICAL) as cluster:
            cluster.wait_nodes(2, 20)
            for job in [cluster.submit('') for _ in range(500)]:
                job()
            long = [cluster.submit(flag) for _ in range(2)]
            short = [cluster.submit('') for _ in range(300)]
            assert all(job.wait(20) for job in short)
            with open(flag, 'w'):
                pass
            assert all(job.wait(20) for job in long)


def test_submit_node(make_cluster, tmp_path, node):
    with NodeProcess(tmp_path / 'two', '--name', 'two') as two:
        with make_cluster(where, nodes=[node.address, two.address],
                          loglevel=logging.CRITICAL) as cluster:
            cluster.wait_nodes(2, 20)
            objects = {n.name: n for n in cluster.status().nodes}
            for which in ('two', objects['two'], ('127.0.0.1', two.port)):
                assert {job() for job in [cluster.submit_node(which) for _ in range(10)]} == {'two'}
            assert cluster.submit_job_id_node('mine', 'one').id == 'mine'
            with pytest.raises(ValueError, match="'three'.*one.*two"):
                cluster.submit_node('three')
            with pytest.raises(ValueError, match='several'):
                cluster.submit_node('127.0.0.1')
            waiting = cluster.submit_node('two', 0.01)
            assert waiting() == 'two'


def test_retries_of_a_job_that_kills_its_worker(make_cluster, node, tmp_path):
    """Tried so often as wanted, and then given up with the names; its own exception is not
    retried."""
    def compute(path, succeed_at):
        with open(path, 'a') as file:
            file.write('x')
        if os.path.getsize(path) < succeed_at:
            os._exit(9)
        if succeed_at == 0:
            raise ValueError('mine')
        return 'done'
    with make_cluster(compute, nodes=[node.address]) as cluster:
        paths = [str(tmp_path / name) for name in 'abc']
        jobs = [cluster.submit(path, at, dispy_retries=3) for path, at in zip(paths, (3, 10, 0))]
        assert cluster.wait(30)
    assert [os.path.getsize(path) for path in paths] == [3, 4, 1]
    assert [job.status for job in jobs] == [DispyJob.Finished, DispyJob.Abandoned,
                                            DispyJob.Terminated]
    assert ('after 4 attempts' in jobs[1].exception and 'one' in jobs[1].exception
            and 'exit code 9' in jobs[1].exception)


class Allocate(dispy.NodeAllocate):
    """Asks for a number of CPUs, and gives the node a file and arguments of its own."""
    want = 3

    def allocate(self, cluster, ip_addr, name, cpus, avail_info=None, platform=''):
        self.seen = (cluster.name, ip_addr, name, cpus, avail_info.disk > 0, bool(platform))
        if self.want == 'fail':
            raise ValueError('not this one')
        self.setup_args = (name, len)
        return self.want


def test_node_allocate(make_cluster, tmp_path, node):
    """More jobs at once than the node has CPUs; arguments, files and functions of its own."""
    data = tmp_path / 'own.txt'
    data.write_text('own')

    def setup(name, function):
        global made
        made = (name, function('abc'))

    def compute(directory, n):
        import glob
        with open(os.path.join(directory, 'mark.%d' % n), 'w'):
            pass
        until = time.time() + 20
        while len(glob.glob(os.path.join(directory, 'mark.*'))) < 3 and time.time() < until:
            time.sleep(0.01)
        with open('own.txt') as file:
            # Noqa: F821
            return (len(glob.glob(os.path.join(directory, 'mark.*'))), made, file.read(),
                    own_function())

    def own_function():
        return 'known'
    allocator = Allocate('127.0.0.1', node.port, depends=[str(data), own_function])
    (tmp_path / 'marks').mkdir()
    with make_cluster(compute, nodes=[allocator], setup=setup) as cluster:
        jobs = [cluster.submit(str(tmp_path / 'marks'), n) for n in range(3)]
        for job in jobs:
            assert job(30) == (3, ('one', 3), 'own', 'known'), job.exception
    assert allocator.seen == ('compute', '127.0.0.1', 'one', 2, True, True)
    # The node offers what it did before
    with make_cluster(square, nodes=[node.address]) as cluster:
        cluster.wait_nodes(1, 20)
        assert cluster.status().nodes[0].cpus == 2


@pytest.mark.parametrize('want, text',
                         [(0, 'returned 0'), ('fail', 'not this one'), ('3', 'is not a number')])
def test_node_allocate_refuses(make_cluster, node, want, text):
    allocator = Allocate('127.0.0.1', node.port)
    allocator.want = want
    with make_cluster(square, nodes=allocator, loglevel=logging.CRITICAL) as cluster:
        found = eventually(lambda: [n.reason
                                    for n in cluster.status().all_nodes if n.state == 'refused'])[0]
        assert text in found


# -- clients ---------------------------------------------------------------------------------------

CLIENT = '''
    import dispy, sys, time
    cluster = dispy.JobCluster(time.sleep, nodes=[('127.0.0.1', int(sys.argv[1]))])
    print(cluster.submit(0)(), flush=True)
    job = cluster.submit(float(sys.argv[2]))
    while job.status != job.Running: time.sleep(0.01)
    print('running', flush=True)
    time.sleep(1000)
'''


def other_client(port, seconds):
    process = subprocess.Popen([sys.executable, '-c', textwrap.dedent(CLIENT), str(port),
                                str(seconds)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b'None\n' and process.stdout.readline() == b'running\n'
    return process


def test_another_client_is_told_who_has_the_node_and_gets_it_when_that_one_is_killed(node, caplog):
    other = other_client(node.port, 1.0)
    with dispy.JobCluster(square, nodes=[node.address]) as cluster:
        job = cluster.submit(5)
        found = eventually(lambda: [node for node in cluster.status().all_nodes
                                    if node.state == 'refused'])[0]
        assert 'PID %d' % other.pid in found.reason
        other.kill()
        other.wait()
        other.stdout.close()
        assert job(20) == 25
    assert len([r for r in caplog.records if 'does not take' in r.getMessage()]) == 1


def test_a_job_of_a_vanished_client_ends_before_the_next_is_served(node, tmp_path):
    other = other_client(node.port, 2.5)
    started = time.time()
    other.kill()
    other.wait()
    other.stdout.close()
    with dispy.JobCluster(square, nodes=[node.address], loglevel=logging.CRITICAL) as cluster:
        assert cluster.submit(5)(30) == 25
        assert time.time() - started > 1.5   # what it ran was not killed


def test_wrong_secret(node, caplog):
    with dispy.JobCluster(square, nodes=[node.address],
                          secret='another secret than the node has') as cluster:
        text = eventually(lambda: [n.reason
                                   for n in cluster.status().all_nodes if n.state == 'refused'])[0]
        assert 'wrong secret' in text and '--secret-file' in text
        with pytest.raises(dispy.NoNodes, match='wrong secret'):
            cluster.wait_nodes(1, 0.1)
    eventually(lambda: 'wrong secret' in node.log())
    assert len([r for r in caplog.records if 'cannot be used' in r.getMessage()]) == 1


def test_strangers_do_no_harm(node):
    """Garbage and silence beside a client at work."""
    silent = [socket.create_connection(node.address) for _ in range(40)]
    with socket.create_connection(node.address) as rude:
        rude.sendall(b'GET / HTTP/1.1\r\n\r\n' * 10)
        for sock in silent:
            sock.close()
        with dispy.JobCluster(square, nodes=[node.address]) as cluster:
            assert cluster.submit(3)(30) == 9
    assert 'Traceback' not in node.log()


# -- files -----------------------------------------------------------------------------------------

def test_files_travel_once_and_are_removed(node, tmp_path):
    data = tmp_path / 'data.bin'
    data.write_bytes(os.urandom(5 << 20))
    empty = tmp_path / 'empty'
    empty.write_bytes(b'')

    def compute():
        import hashlib
        with open('data.bin', 'rb') as file:
            return hashlib.sha256(file.read()).hexdigest(), os.path.getsize('empty'), os.getcwd()
    for _ in range(2):
        with dispy.JobCluster(compute, nodes=[node.address],
                              depends=[str(data), str(empty)]) as cluster:
            digest, size, directory = cluster.submit()()
        assert (digest, size) == (dispy.file_digest(str(data))[1].hex(), 0)
        eventually(lambda: not os.path.exists(directory))
    eventually(lambda: sorted(os.listdir(node.prefix)) == ['dispy-node', 'lock', 'memory'])


def test_files_are_kept_and_not_sent_again(node, tmp_path):
    data = tmp_path / 'data.bin'
    data.write_bytes(b'x' * 100)

    def compute():
        return os.stat('data.bin').st_ino, stat.S_IMODE(os.stat('data.bin').st_mode)
    seen = []
    for _ in range(2):
        with dispy.JobCluster(compute, nodes=[node.address], depends=[str(data)],
                              dest_path='mine/here', cleanup=False) as cluster:
            seen.append(cluster.submit()())
    assert seen[0] == seen[1] and not seen[0][1] & 0o022
    assert os.path.exists(os.path.join(node.prefix, 'mine', 'here', 'data.bin'))


# -- TLS -------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def certificates(tmp_path_factory):
    """A shared self-signed certificate, and another one."""
    if shutil.which('openssl') is None:
        pytest.skip('no openssl command to make certificates')
    directory = tmp_path_factory.mktemp('certificates')
    for name in ('shared', 'foreign'):
        subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt',
                        'ec_paramgen_curve:P-256', '-nodes', '-days', '2',
                        '-subj', '/CN=dispy test', '-keyout', str(directory / (name + '.key')),
                        '-out', str(directory / (name + '.crt'))],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return lambda name: dict(certfile=str(directory / (name + '.crt')),
                             keyfile=str(directory / (name + '.key')))


def test_tls(certificates, tmp_path):
    shared = certificates('shared')
    with NodeProcess(tmp_path, '--certfile', shared['certfile'], '--keyfile',
                     shared['keyfile']) as node:
        with dispy.JobCluster(len, nodes=[node.address], **shared) as cluster:
            blob = os.urandom(3 << 20)
            assert [job() for job in [cluster.submit(blob), cluster.submit('abc')]] == [len(blob),
                                                                                        3]
            assert ([job() for job in [cluster.submit('x' * n) for n in range(2000)]]
                    == list(range(2000)))
        for bad in (certificates('foreign'), {}):
            with dispy.JobCluster(len, nodes=[node.address], loglevel=logging.CRITICAL,
                                  **bad) as cluster:
                text = eventually(lambda: [n.reason for n in cluster.status().all_nodes
                                           if n.state == 'refused'])[0]
                assert 'certfile' in text, text


def test_tls_client_and_plain_node(certificates, node):
    with dispy.JobCluster(len, nodes=[node.address], loglevel=logging.CRITICAL,
                          **certificates('shared')) as cluster:
        text = eventually(lambda: [n.reason
                                   for n in cluster.status().all_nodes if n.state == 'refused'])[0]
        assert 'TLS' in text and 'certfile' in text


# -- one file alone --------------------------------------------------------------------------------

def test_the_file_alone_with_a_bare_interpreter(tmp_path):
    """dispynode.py in an empty directory, a Python with no package installed: it serves a closure,
    and cloudpickle comes with the computation."""
    import venv
    venv.create(str(tmp_path / 'bare'), with_pip=False, symlinks=os.name != 'nt')
    python = str(tmp_path / 'bare' / 'bin' / 'python')
    alone = tmp_path / 'alone'
    alone.mkdir()
    shutil.copy(os.path.join(ROOT, 'dispynode.py'), str(alone))
    env = {'PYTHONPATH': '', 'PYTHONDONTWRITEBYTECODE': '1'}
    for package in ('cloudpickle', 'psutil', 'dispy'):
        assert subprocess.run([python, '-c', 'import ' + package], stderr=subprocess.DEVNULL,
                              cwd=str(alone),
                              env=dict(os.environ, **env)).returncode, package + ' is there'
    factor = 7

    def closure(n):
        return lambda: n * factor   # a result that only cloudpickle can send back

    with NodeProcess(tmp_path / 'node', python=python, script=str(alone / 'dispynode.py'),
                     env=env) as node:
        with dispy.JobCluster(closure, nodes=[node.address]) as cluster:
            job = cluster.submit(6)
            assert job(30)() == 42, job.exception
            info = cluster.status().nodes[0].avail_info
            assert info.memory is None and info.disk > 0
        assert node.stop() == 0
    assert os.listdir(str(alone)) == ['dispynode.py']


def test_a_second_signal_ends_it_at_once(tmp_path):
    flag = str(tmp_path / 'flag')

    def stubborn(flag):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with open(flag, 'w'):
            pass
        time.sleep(1000)
    node = NodeProcess(tmp_path)
    with dispy.JobCluster(stubborn, nodes=[node.address], loglevel=logging.CRITICAL) as cluster:
        job = cluster.submit(flag)
        eventually(lambda: os.path.exists(flag))
        family = psutil.Process(node.process.pid).children(recursive=True)
        node.process.send_signal(signal.SIGINT)
        eventually(lambda: 'stopping' in node.log())
        node.process.send_signal(signal.SIGINT)
        assert node.process.wait(4) == 0
        assert job.wait(5) and job.status == DispyJob.Abandoned
        eventually(lambda: not any(child.is_running() for child in family))
