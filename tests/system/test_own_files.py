"""Directories and files are ours before we clean, open or believe them."""

import logging
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys

import pytest

import dispy
import dispynode
from conftest import ROOT, eventually
from dispy import DispyError, Journal
from dispynode import StartError, take_own_directory
from nodes import NodeProcess, SchedulerProcess

root_only = pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0,
                               reason='only root may give files away')


def fill(directory):
    """Things of the user's, some of them called as a node or scheduler might."""
    for name in ('c-code', 'p-papers', 'docs', 'large'):
        (directory / name).mkdir(parents=True)
        (directory / name / 'file').write_text('mine')
    for name in ('r-plot.R', 'r-data.csv', 'large/1.p'):
        (directory / name).write_text('mine')


def files_in(directory):
    return sorted(os.path.join(root, name) for root, _, names in os.walk(directory)
                  for name in names)


DAEMONS = {'node': ('dispynode.py', '--dest-path-prefix'),
           'scheduler': ('dispyscheduler.py', '--state-dir')}


@pytest.mark.parametrize('options', [(), ('--clean',)])
@pytest.mark.parametrize('daemon', DAEMONS)
def test_a_directory_with_other_things_is_refused(tmp_path, daemon, options):
    script, option = DAEMONS[daemon]
    theirs = tmp_path / 'theirs'
    fill(theirs)
    os.chmod(theirs, 0o755)
    before = files_in(theirs)
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), '-i', '127.0.0.1', '-p', '0',
                           option, str(theirs), *options],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and option in done.stderr and 'c-code' in done.stderr, done.stderr
    assert files_in(theirs) == before and os.stat(theirs).st_mode & 0o777 == 0o755


@pytest.mark.parametrize('options', [(), ('--clean',)])
def test_what_lies_in_a_directory_of_ours_is_kept_but_for_ours(tmp_path, options):
    """The user puts something into the directory of a node that runs; it outlives the next start,
    and with --clean files do."""
    with NodeProcess(tmp_path) as node:
        prefix = node.prefix
    for name in ('r-plot.R', 'r-data.csv', 'notes'):
        with open(os.path.join(prefix, name), 'w') as file:
            file.write('mine')
    for name in ('c-my-code', 'docs'):
        os.makedirs(os.path.join(prefix, name))
    os.makedirs(os.path.join(prefix, 'c-0123456789abcdef'))
    with NodeProcess(tmp_path, *options) as node:
        left = set(os.listdir(prefix))
    assert {'r-plot.R', 'r-data.csv', 'notes'} <= left and 'c-0123456789abcdef' not in left
    assert options or {'c-my-code', 'docs'} <= left


def test_marks(tmp_path):
    take_own_directory(str(tmp_path / 'new'), 'mark', (), '--x')
    take_own_directory(str(tmp_path / 'new'), 'mark', (), '--x')
    assert (os.listdir(tmp_path / 'new') == ['mark']
            and os.stat(tmp_path / 'new').st_mode & 0o777 == 0o700)
    (tmp_path / 'old').mkdir()
    (tmp_path / 'old' / 'lock').write_text('PID 5')
    with pytest.raises(StartError, match='--x'):
        take_own_directory(str(tmp_path / 'old'), 'mark', (), '--x')
    take_own_directory(str(tmp_path / 'old'), 'mark', ('lock',), '--x')
    os.symlink(tmp_path / 'new', tmp_path / 'link')
    with pytest.raises(StartError, match='not a directory'):
        take_own_directory(str(tmp_path / 'link'), 'mark', (), '--x')


def answer():
    return 42


@pytest.mark.parametrize('name', ['r-models', 'c-models', 'p-models', 'k-models', 'lock',
                                  'user-nobody', dispynode.NODE_MARK])
def test_names_of_the_user_do_not_meet_ours(tmp_path, name):
    with NodeProcess(tmp_path) as node:
        with dispy.JobCluster(answer, nodes=[node.address], dest_path=name, cleanup=False,
                              loglevel=logging.CRITICAL) as cluster:
            cluster.submit()
            refused = eventually(lambda: [each for each in cluster.status().all_nodes
                                          if each.state == 'refused'])
            assert 'dest_path' in refused[0].reason
            cluster.close(terminate=True)


def test_kept_files_are_there_after_a_new_start(tmp_path):
    (tmp_path / 'data').write_text('kept')
    for _ in range(2):
        with NodeProcess(tmp_path / 'node') as node:
            with dispy.JobCluster(answer, nodes=[node.address], dest_path='c-my-models/v1',
                                  cleanup=False, depends=[str(tmp_path / 'data')]) as cluster:
                assert cluster.submit()(20) == 42
            path = os.path.join(node.prefix, 'c-my-models', 'v1', 'data')
            assert os.path.exists(path)


def test_the_directory_of_a_node_is_removed_while_it_runs(tmp_path):
    """As by what cleans /tmp: the next client is served."""
    with NodeProcess(tmp_path) as node:
        with dispy.JobCluster(answer, nodes=[node.address]) as cluster:
            assert cluster.submit()(20) == 42
        # The node removes what the first one had; both at once would stumble over each other.
        eventually(lambda: not [name for name in os.listdir(node.prefix)
                                if name.startswith('p-') and name != 'p-.modules'])
        shutil.rmtree(node.prefix)
        for _ in range(2):
            with dispy.JobCluster(answer, nodes=[node.address]) as cluster:
                assert cluster.submit()(20) == 42
        assert node.process.poll() is None and os.stat(node.prefix).st_mode & 0o777 == 0o700
        assert os.path.exists(os.path.join(node.prefix, dispynode.NODE_MARK))


CLIENT = '''
import os, sys, time
sys.path.insert(0, %r)
import dispy
def compute(path):
    import os, time
    while not os.path.exists(path):
        time.sleep(0.01)
    return 'kept'
cluster = dispy.JobCluster(compute, nodes=[('127.0.0.1', int(sys.argv[1]))],
                           recover_file=sys.argv[2])
job = cluster.submit(sys.argv[3])
while job.status != job.Running:
    time.sleep(0.01)
print('runs', flush=True)
time.sleep(60)
''' % ROOT


def kept_results(tmp_path, node):
    """A program has crashed, and its result is on the node's disk."""
    process = subprocess.Popen([sys.executable, '-c', CLIENT, str(node.port),
                                str(tmp_path / 'recover'), str(tmp_path / 'flag')],
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == b'runs\n'
    process.kill()
    process.wait()
    process.stdout.close()
    (tmp_path / 'flag').write_text('')
    return eventually(lambda: [os.path.join(node.prefix, name)
                               for name in os.listdir(node.prefix) if name.startswith('r-')])[0]


def test_kept_results_that_are_gone_are_told_as_lost(tmp_path):
    with NodeProcess(tmp_path / 'node') as node:
        os.unlink(kept_results(tmp_path, node))
        job, = dispy.recover_jobs(str(tmp_path / 'recover'), 30)
        assert job.status == job.Terminated and 'cannot be read' in job.exception
        assert node.process.poll() is None


@pytest.mark.skipif(not hasattr(resource, 'prlimit'),
                    reason='limits of another process are of Linux')
def test_kept_results_that_cannot_be_read_now_are_read_later(tmp_path):
    with NodeProcess(tmp_path / 'node') as node:
        kept_results(tmp_path, node)
        import psutil
        used = psutil.Process(node.process.pid).num_fds()
        # For the connection, and nothing else
        resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, (used + 1, 4096))
        import threading
        restored = threading.Timer(
            2.0, lambda: resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, (1024, 4096)))
        restored.start()
        job, = dispy.recover_jobs(str(tmp_path / 'recover'), 60)
        restored.join()
        assert job.result == 'kept' and node.process.poll() is None


# -- recovery files --------------------------------------------------------------------------------

@pytest.fixture
def recover_file(tmp_path):
    """A recovery file with a job of each kind."""
    journal = Journal(str(tmp_path / 'recover'))
    journal.begin('c', 'compute', False, False, None)
    jobs = [dispy.KeptJob('c', pickle.dumps(((n,), {})), {'cpus': 1}, n) for n in range(3)]
    for job in jobs:
        journal.submitted(job)
    journal.commit()
    jobs[1].state = dispy.JobState.FINISHED
    journal.ended(jobs[1], (jobs[1].serial, 1, 1.0, 2.0, pickle.dumps(5), b'out', b''))
    jobs[2].state = dispy.JobState.ABANDONED
    journal.ended(jobs[2], 'lost')
    journal.close()
    return tmp_path / 'recover'


def test_recovery_files_that_are_damaged(recover_file, tmp_path):
    """Mutations of every kind: each is read, or is refused by the documented error, left as it is,
    and not locked."""
    good, rng, refused = recover_file.read_bytes(), random.Random(3), 0
    for turn in range(300):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 3, 30))):
            at = rng.randrange(len(data))
            kind = rng.randrange(3)
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[at:at + 50] = bytes(rng.randrange(256) for _ in range(len(data[at:at + 50])))
            elif turn % 10 == 0:
                del data[at:]
                data += b'\0'
        path = tmp_path / ('mutated-%d' % turn)
        path.write_bytes(data)
        os.chmod(path, 0o600)
        try:
            dispy.recover_jobs(str(path), 0.1)
        except DispyError as exc:
            refused += 1
            assert str(path) in str(exc) and path.exists()
            with pytest.raises(DispyError) as again:
                dispy.recover_jobs(str(path), 0.1)
            assert 'in use' not in str(again.value)
    assert refused > 20


def test_a_file_of_the_users_beside_a_recovery_file_is_left_alone(tmp_path):
    (tmp_path / 'results-new').write_text('my results\n')
    with pytest.raises(DispyError, match='results-new'):
        dispy.JobCluster(answer, nodes='local', recover_file=str(tmp_path / 'results'))
    assert (tmp_path / 'results-new').read_text() == 'my results\n'


@root_only
@pytest.mark.parametrize('end', ['', '-new', '-wal'])
@pytest.mark.parametrize('how', ['owner', 'mode', 'link', 'fifo'])
def test_recovery_files_of_others_are_not_opened(recover_file, how, end):
    path = str(recover_file) + end
    if how == 'fifo':
        if os.path.exists(path):
            os.unlink(path)
        os.mkfifo(path, 0o600)
    elif how == 'link':
        target = str(recover_file) + '-target'
        with open(target, 'wb') as file:
            file.write(b'mine')
        os.chmod(target, 0o600)
        if os.path.exists(path):
            os.unlink(path)
        os.symlink(target, path)
        os.lchown(path, 65534, 65534)
    else:
        if not os.path.exists(path):
            with open(path, 'wb') as file:
                file.write(Journal.NEW_MARK if end == '-new' else b'')
        os.chmod(path, 0o600)
        os.chown(path, 65534 if how == 'owner' else 0, -1)
        if how == 'mode':
            os.chmod(path, 0o666)
    with pytest.raises(DispyError, match='recover_file'):
        dispy.recover_jobs(str(recover_file), 0.1)
    if how == 'link':
        with open(target, 'rb') as file:
            assert file.read() == b'mine'


def test_a_link_of_ones_own_is_followed(recover_file, tmp_path):
    os.symlink(recover_file, tmp_path / 'link')
    assert len(dispy.recover_jobs(str(tmp_path / 'link'), 0.1)) == 3


def test_recover_jobs_of_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / 'fifo')
    for path, error in ((str(tmp_path / 'fifo'), DispyError), (5, TypeError), ('a\0b', ValueError),
                        (str(tmp_path / 'none'), FileNotFoundError)):
        with pytest.raises(error, match='recover_file'):
            dispy.recover_jobs(path)


def test_states_of_a_scheduler_that_are_damaged(tmp_path):
    """Each start either works or ends with status 1 and a text, without a traceback."""
    with NodeProcess(tmp_path / 'n') as node, SchedulerProcess(tmp_path / 's', '-n', '127.0.0.1:%d'
                                                               % node.port) as scheduler:
        process = subprocess.Popen(
            [sys.executable, '-c',
             CLIENT.replace("JobCluster(compute, nodes=[('127.0.0.1', int(sys.argv[1]))],\n"
                            "                           recover_file=sys.argv[2])",
                            "SharedJobCluster(compute, scheduler_port=int(sys.argv[1]))"),
             str(scheduler.port), '', str(tmp_path / 'flag')], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b'runs\n'
        process.kill()
        process.wait()
        process.stdout.close()
        scheduler.kill()
    state = os.path.join(scheduler.state, 'state.db')
    import sqlite3
    db = sqlite3.connect(state)
    db.execute('PRAGMA wal_checkpoint(TRUNCATE)')   # so that the one file holds it all
    db.close()
    with open(state, 'rb') as file:
        good = file.read()
    rng, refused = random.Random(7), 0
    for _ in range(15):
        data = bytearray(good)
        for _ in range(40):
            at = rng.randrange(len(data))
            data[at:at + 20] = bytes(rng.randrange(256) for _ in range(len(data[at:at + 20])))
        for end in ('-wal', '-shm'):
            if os.path.exists(state + end):
                os.unlink(state + end)
        with open(state, 'wb') as file:
            file.write(data)
        process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'dispyscheduler.py'), '-i',
                                    '127.0.0.1', '-p', '0', '--state-dir', scheduler.state,
                                    '-n', '127.0.0.1:1'], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        lines = []
        for line in process.stderr:
            lines.append(line)
            if 'serves at port' in line:
                process.kill()
                break
        code = process.wait()
        process.stderr.close()
        assert 'Traceback' not in ''.join(lines), ''.join(lines)
        assert code == -9 or (code == 1 and state in ''.join(lines))
        refused += code == 1
    assert refused


# -- the secret ---------------------------------------------------------------------------------

def test_processes_that_make_a_secret_at_once_get_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path))
    monkeypatch.delenv('DISPY_SECRET')
    code = 'import dispynode; print(dispynode.find_secret().decode())'
    processes = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
                 for _ in range(3)]
    found = {process.communicate(timeout=30)[0] for process in processes}
    assert len(found) == 1 and len(found.pop().strip()) == 64
