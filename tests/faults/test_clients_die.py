"""Clients that are killed, stopped or interrupted, and what becomes of their jobs."""

import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

import dispy
from clients import HEAD, PATHS, Client
from conftest import eventually
from dispy import DispyJob
from hosts import Hosts
from ledger import Ledger, enter, nothing_left
from nodes import NodeProcess


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / 'ledger')


@pytest.fixture
def node(tmp_path):
    with NodeProcess(tmp_path / 'node') as node:
        yield node


# Each submission is entered in a second ledger when `submit` has returned.
SUBMITTING = '''
jobs = cluster(recover_file=directory + '/jobs', pulse_interval=0.5)
print('ready', flush=True)
for number in range(1000000):
    jobs.submit_job_id(number, path, number, 0.005 if number % 3 else 0.0)
    enter(path + '-submitted', number)
    if number % 50 == 49:
        time.sleep(0.02)
'''


def collect(path, calls=3, **options):
    """Recover until nothing comes any more: (ended, unsent, files left)."""
    ended, unsent = [], []
    for _ in range(calls):
        if not os.path.exists(path):
            break
        found = dispy.recover_jobs(path, **options)
        ended += [job for job in found if job.status not in (DispyJob.Created, DispyJob.Running)]
        unsent = [job for job in found if job.status == DispyJob.Created]
        assert not [job for job in found if job.status == DispyJob.Running], found
    return ended, unsent


@pytest.mark.parametrize('seed', range(6))
def test_a_client_is_killed_at_a_random_moment_and_its_jobs_are_recovered(tmp_path, ledger, node,
                                                                          seed):
    """Finished, running and unsent are what was submitted; a result is delivered once in any number
    of calls."""
    with Client(SUBMITTING, ledger.path, node) as client:
        assert client.first == 'ready\n'
        time.sleep(random.Random(seed).uniform(0.0, 1.2))
        client.kill()
    submitted = {int(attempt.job) for attempt in Ledger(ledger.path + '-submitted').attempts()}
    ended, unsent = collect(str(tmp_path / 'jobs'), timeout=60)
    ids = [job.id for job in ended + unsent]
    assert len(ids) == len(set(ids))
    # One may have been submitted and not been entered
    assert submitted <= set(ids) and len(set(ids) - submitted) <= 1
    assert all(job.status == DispyJob.Finished and job.result == job.id
               for job in ended), [job.exception for job in ended if job.exception]
    assert all(job.args[1] == job.id and job.kwargs == {} for job in unsent)
    started = [int(attempt.job) for attempt in ledger.attempts()]
    assert len(started) == len(set(started)) and not set(started) & {job.id for job in unsent}
    with dispy.JobCluster(abs, nodes=[node.address]) as cluster:   # the node is free
        assert cluster.submit(-1)(30) == 1


def test_a_file_whose_jobs_have_all_been_delivered_is_removed(tmp_path, ledger, node):
    with Client('''
        jobs = cluster(recover_file=directory + '/jobs')
        for number in range(20):
            jobs.submit_job_id(number, path, number, 0.05)
        print('ready', flush=True)
        jobs.wait()
        os.kill(os.getpid(), signal.SIGKILL)
            ''', ledger.path, node) as client:
        client.process.wait(60)
    found = dispy.recover_jobs(str(tmp_path / 'jobs'), timeout=60)
    assert sorted(job.result for job in found) == list(range(20))
    assert [name for name in os.listdir(str(tmp_path)) if name.startswith('jobs')] == []
    with pytest.raises(FileNotFoundError, match='recover_file: there is no file'):
        dispy.recover_jobs(str(tmp_path / 'jobs'))


def test_a_clean_end_removes_the_file_and_an_unclean_one_leaves_it_private_and_without_the_secret(
        tmp_path, node):
    path = tmp_path / 'jobs'
    with dispy.JobCluster(abs, nodes=[node.address], recover_file=str(path)) as cluster:
        assert list(cluster.map(range(-100, 0))) == list(range(100, 0, -1))
        for name in os.listdir(str(tmp_path)):
            if name.startswith('jobs'):
                file = tmp_path / name
                assert stat.S_IMODE(file.stat().st_mode) == 0o600, name
                assert os.environ['DISPY_SECRET'].encode() not in file.read_bytes()
    assert not path.exists() and not (tmp_path / 'jobs-new').exists()


RUNNING = '''
jobs = cluster(recover_file=directory + '/jobs', pulse_interval=0.5)
for number in range(4):
    jobs.submit_job_id(number, path, number, 1.5)
print('ready', flush=True)
time.sleep(600)
'''


def killed_while_running(ledger, node, code=RUNNING, started=2):
    with Client(code, ledger.path, node):
        eventually(lambda: len(ledger.attempts()) >= started)


def test_two_recoveries_at_once(tmp_path, ledger, node):
    """One of them gets the file, the other is told."""
    killed_while_running(ledger, node)
    path = str(tmp_path / 'jobs')
    code = (
        'import sys; sys.path[:0] = %r; import dispy; print(len(dispy.recover_jobs(sys.argv[1], '
        'timeout=60)))' % PATHS)
    both = [subprocess.Popen([sys.executable, '-c', code, path], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, universal_newlines=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=90)[0].splitlines()[-1] for process in both)
    assert (said[0] == '4' and said[1].startswith('dispynode.DispyError: recover_file')
            and said[1].endswith('is in use by another program'))


def test_a_recovery_while_the_program_lives_is_refused(tmp_path, ledger, node):
    with Client(RUNNING, ledger.path, node):
        with pytest.raises(dispy.DispyError, match='in use by another program'):
            dispy.recover_jobs(str(tmp_path / 'jobs'))


def test_a_recovery_that_runs_out_of_time_returns_what_runs_as_running(tmp_path, ledger, node):
    killed_while_running(ledger, node, RUNNING.replace('1.5', '3'))
    found = dispy.recover_jobs(str(tmp_path / 'jobs'), timeout=0.5)
    assert [job.status for job in found if job.id < 2] == [DispyJob.Running] * 2
    ended, unsent = collect(str(tmp_path / 'jobs'), timeout=60)
    assert (sorted(job.id for job in ended + unsent) == [0, 1, 2, 3]
            and {0, 1} <= {job.result for job in ended})


def test_a_recovery_that_cancels_what_runs(tmp_path, ledger, node):
    killed_while_running(ledger, node, RUNNING.replace('1.5', '600'))
    found = dispy.recover_jobs(str(tmp_path / 'jobs'), timeout=60, terminate_pending=True)
    assert sorted(job.id for job in found) == [0, 1, 2, 3]
    assert {job.status for job in found if job.id < 2} == {DispyJob.Cancelled}


def test_recovery_from_another_address(tmp_path):
    ledger, own = Ledger(tmp_path / 'ledger'), {'DISPY_SECRET': os.environ['DISPY_SECRET']}
    with Hosts() as hosts:
        first, second, far = [hosts.host(name) for name in ('first', 'second', 'far')]
        with far.node(env=own) as node:
            program = first.popen(
                [sys.executable, first.script(HEAD.format(paths=PATHS) + textwrap.dedent(RUNNING)),
                 ledger.path, node.port, node.host, str(tmp_path)], env=own)
            eventually(lambda: len(ledger.attempts()) >= 2)
            program.kill()
            program.wait()
            shown = second.python('''
                import sys
                sys.path[:0] = sys.argv[2:]
                import dispy
                for job in sorted(dispy.recover_jobs(sys.argv[1], timeout=60),
                                  key=lambda job: job.id):
                    print(job.id, job.status_text(), job.result)
                ''', str(tmp_path / 'jobs'), *PATHS, env=own).splitlines()
    assert (shown[:2] == ['0 finished 0', '1 finished 1']
            and [line.split()[0] for line in shown] == list('0123'))


def test_another_program_carries_on(tmp_path, ledger, node):
    killed_while_running(ledger, node, '''
        jobs = cluster(recover_file=directory + '/jobs', pulse_interval=0.5)
        for number in range(100):
            jobs.submit_job_id(number, path, number, 0.05)
        print('ready', flush=True)
        time.sleep(600)
        ''', 20)
    ended = []

    def compute(path, number, seconds=0.0):
        enter(path, number)
        time.sleep(seconds)
        return number
    with dispy.JobCluster(compute, depends=[enter], nodes=[node.address],
                          recover_file=str(tmp_path / 'jobs'),
                          job_status=lambda job: ended.append(job.id)) as cluster:
        jobs = list(cluster.recovered)
        assert sorted(job.id for job in jobs) == list(range(100))
        assert cluster.wait(60)
        assert ([job.result for job in jobs]
                == [job.id for job in jobs]), [job.exception for job in jobs if job.exception]
        more = cluster.submit(ledger.path, 'more')
        assert more() == 'more'
    tally = ledger.check([*range(100), 'more'], [job.id for job in jobs] + ['more'])
    assert tally.clean and not tally.again and len(set(ended)) == len(ended)
    assert not (tmp_path / 'jobs').exists()


def test_carrying_on_is_killed_and_carried_on_with_again(tmp_path, ledger, node):
    begin = '''
        jobs = cluster(recover_file=directory + '/jobs', pulse_interval=0.5)
        for number in range(len(jobs.recovered), 200):
            jobs.submit_job_id(number, path, number, 0.02)
        print(len(jobs.recovered), flush=True)
        jobs.wait()
        '''
    for round in range(4):
        before = len(ledger.attempts())
        with Client(begin, ledger.path, node) as client:
            assert 0 <= int(client.first) <= 200
            eventually(lambda: len(ledger.attempts()) > before + 20
                       or client.process.poll() is not None, 60)
        # What had ended was handed over as `recovered`, and stays so.
    ended, unsent = collect(str(tmp_path / 'jobs'), timeout=60)
    started = [attempt.job for attempt in ledger.attempts()]
    assert len(started) == len(set(started))
    assert all(job.status == DispyJob.Finished for job in ended), [job.exception for job in ended]
    assert not {str(job.id) for job in unsent} & set(started)


@pytest.mark.parametrize('reentrant', (True, False))
def test_client_and_node_are_killed(tmp_path, ledger, reentrant):
    """What ran is lost: to be run again if it is reentrant. What had ended is there."""
    with NodeProcess(tmp_path / 'node') as node:
        with Client('''
            jobs = cluster(recover_file=directory + '/jobs', pulse_interval=0.5, reentrant=%r)
            for number in range(10):
                jobs.submit_job_id(number, path, number, 0 if number < 6 else 600)
            print('ready', flush=True)
            time.sleep(600)
                ''' % reentrant, ledger.path, node) as client:
            eventually(lambda: len(ledger.attempts()) == 8)
            client.kill()
        eventually(lambda: 'has ended' in node.log())
        node.kill()
        with NodeProcess(node.directory, port=node.port):
            found = sorted(dispy.recover_jobs(str(tmp_path / 'jobs'), timeout=60),
                           key=lambda job: job.id)
    assert [job.result for job in found[:6]] == list(range(6))
    begun = {attempt.job for attempt in ledger.attempts()}
    assert len(begun) == 8
    for job in found[6:]:   # two of these four ran
        ran = str(job.id) in begun and not reentrant
        assert job.status == (DispyJob.Abandoned if ran else DispyJob.Created), (job, begun)
    assert [job.id for job in found] == list(range(10))


def damage(name, change):
    def apply(directory):
        path = os.path.join(directory, name)
        with open(path, 'rb') as file:
            data = file.read()
        with open(path, 'wb') as file:
            file.write(change(data))
    return apply


@pytest.mark.parametrize('spoil, text', (
    (damage('jobs', lambda data: b'not a database at all ' * 500), 'not a database'),
    (damage('jobs', lambda data: data[:100] + b'\xff' * 4000 + data[4100:]),
     'cannot be used|damaged'),
))
def test_a_damaged_recovery_file_is_refused_and_left_alone(tmp_path, ledger, node, spoil, text):
    killed_while_running(ledger, node)
    sqlite3.connect(str(tmp_path / 'jobs')).execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchall()
    spoil(str(tmp_path))
    with open(str(tmp_path / 'jobs'), 'rb') as file:
        before = file.read()
    with pytest.raises(dispy.DispyError, match=text):
        dispy.recover_jobs(str(tmp_path / 'jobs'), timeout=5)
    with pytest.raises(dispy.DispyError, match=text):
        dispy.JobCluster(abs, nodes=[node.address], recover_file=str(tmp_path / 'jobs'))
    with open(str(tmp_path / 'jobs'), 'rb') as file:
        assert file.read() == before


def test_a_foreign_file_and_one_of_another_version_are_refused(tmp_path):
    path = str(tmp_path / 'jobs')
    with sqlite3.connect(path) as database:
        database.execute('CREATE TABLE mine (value)')
    database.close()
    with pytest.raises(dispy.DispyError,
                       match='is no file of dispy: give another, or move it away'):
        dispy.recover_jobs(path)
    with sqlite3.connect(path) as database:
        database.execute('PRAGMA application_id=%d' % dispy.Journal.MARK)
        database.execute('PRAGMA user_version=99')
    database.close()
    with pytest.raises(dispy.DispyError, match='of version 99 and this dispy knows 3'):
        dispy.JobCluster(abs, nodes='local', recover_file=path)
    with pytest.raises(OSError):
        dispy.JobCluster(abs, nodes='local',
                         recover_file=str(tmp_path / 'no' / 'such' / 'directory'))


def test_a_torn_end_of_what_was_submitted_costs_what_was_torn(tmp_path):
    """A node that is not there: nothing is sent. FILE-new is cut at every length."""
    path = str(tmp_path / 'jobs')
    journal = dispy.Journal(path)
    for number in range(3):
        job = dispy.KeptJob('comp', dispy.dumps(((number,), {}))[0], None, number)
        job.submit_time = 1.0
        journal.submitted(job)
    with open(path + '-new', 'rb') as file:
        whole = file.read()
    journal._db.close()
    os.close(journal._new)
    os.unlink(path)
    mark = len(dispy.Journal.NEW_MARK)
    size = (len(whole) - mark) // 3
    for length in range(len(whole) + 1):
        with open(path + '-new', 'wb') as file:
            file.write(whole[:length])
        open(path, 'wb').close()
        found = dispy.recover_jobs(path)
        assert [job.args for job in found] == [(number,)
                                               for number in range(max(0, length - mark) // size)]
        for end in ('', '-new'):
            if os.path.exists(path + end):
                os.unlink(path + end)


# -- a client that is gone for good ----------------------------------------------------------------

def test_a_client_is_gone_for_good_and_the_node_is_free_for_the_next_at_once(ledger, node):
    """It had no jobs there."""
    with Client('with cluster() as jobs:\n    jobs.submit(path, 0)()\n'
                '    print("ready", flush=True)\n    time.sleep(600)', ledger.path, node):
        pass
    with dispy.JobCluster(abs, nodes=[node.address]) as cluster:
        assert cluster.submit(-1)(20) == 1


def test_a_client_is_gone_for_good_and_the_node_is_free_after_its_last_job(ledger, node):
    killed_while_running(
        ledger, node, RUNNING.replace('1.5', '2').replace("recover_file=directory + '/jobs', ", ''))
    with nothing_left(node.process.pid), dispy.JobCluster(abs, nodes=[node.address]) as cluster:
        assert cluster.submit(-1)(30) == 1
    assert len(ledger.attempts()) == 4   # those that waited there as well


@pytest.mark.skipif(not hasattr(signal, 'SIGSTOP'), reason='no SIGSTOP here')
@pytest.mark.parametrize('seconds', (0.8, 3.0))
def test_a_client_that_is_stopped_and_wakes_up(ledger, node, seconds):
    """Less than five pulses, and more: nothing is lost, nothing runs twice, though its jobs are not
    reentrant."""
    with Client('''
        with cluster(pulse_interval=0.3, ping_interval=0.5) as cluster:
            jobs = [cluster.submit_job_id(number, path, number, 0.02) for number in range(200)]
            print('ready', flush=True)
            cluster.wait()
            print([job.result for job in jobs if job.exception is None] == list(range(200)),
                  {job.exception for job in jobs})
            ''', ledger.path, node) as client:
        eventually(lambda: len(ledger.attempts()) > 20)
        client.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        client.process.send_signal(signal.SIGCONT)
        assert 'True {None}\n' in client.rest()
    tally = ledger.check(range(200), range(200))
    assert tally.clean and not tally.again


# -- ends that are not clean -----------------------------------------------------------------------

INTERRUPTED = '''
print('ready', flush=True)
with cluster(pulse_interval=0.5) as jobs:
    all = [jobs.submit(path, number, 0.01) for number in range(300)]
    jobs.wait()
    for job in all:
        job()
print('done')
'''


@pytest.mark.parametrize('seed', range(8))
def test_control_c_at_any_moment(ledger, node, seed):
    with Client(INTERRUPTED, ledger.path, node) as client:
        children = psutil.Process(client.process.pid).children(recursive=True)
        time.sleep(random.Random(seed).uniform(0, 1.5))
        client.process.send_signal(signal.SIGINT)
        out, _ = client.process.communicate(timeout=15)   # 5 s in quiet
        assert 'KeyboardInterrupt' in out or 'done' in out, out
    eventually(lambda: not any(child.is_running() for child in children))
    with dispy.JobCluster(abs, nodes=[node.address]) as cluster:
        assert cluster.submit(-1)(20) == 1


def test_an_exception_inside_with_frees_the_node(ledger, node):
    with pytest.raises(ZeroDivisionError):
        with dispy.JobCluster(time.sleep, nodes=[node.address]) as cluster:
            jobs = [cluster.submit(600) for _ in range(5)]
            eventually(lambda: [job for job in jobs if job.status == DispyJob.Running])
            raise ZeroDivisionError
    assert {job.status for job in jobs} == {DispyJob.Cancelled}
    with dispy.JobCluster(abs, nodes=[node.address]) as cluster:
        assert cluster.submit(-1)(20) == 1


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_fork_after_creating_a_cluster_on_a_node(ledger, node):
    """The child ends in whatever way: its parent's jobs and its recovery file are not touched.
    Python 3.12 and later warn of every fork of a process with threads."""
    with Client('''
        import subprocess
        with cluster(recover_file=directory + '/jobs') as jobs:
            first = [jobs.submit(path, number, 0.1) for number in range(10)]
            for way in range(3):
                pid = os.fork()
                if not pid:
                    if way == 0:
                        os._exit(0)
                    if way == 1:
                        sys.exit(0)
                    jobs.close()
                    os._exit(0)
                assert os.waitpid(pid, 0)[1] == 0, way
            print('ready', flush=True)
            jobs.wait()
            second = [jobs.submit(path, number) for number in range(10, 20)]
            print([job() for job in first + second] == list(range(20)))
        print(os.path.exists(directory + '/jobs'))
            ''', ledger.path, node, options=['-W', 'ignore']) as client:
        assert client.first == 'ready\n' and client.rest() == 'True\nFalse\n'


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_a_forked_child_that_ends_takes_nothing_out_of_the_recovery_file(tmp_path, ledger, node):
    with Client('''
        jobs = cluster(recover_file=directory + '/jobs')
        for number in range(100):
            jobs.submit_job_id(number, path, number)
        jobs.wait()
        for number in range(100, 200):
            jobs.submit_job_id(number, path, number, 0.1)
            if number % 10 == 0 and not os.fork():
                import gc
                del jobs
                gc.collect()
                sys.exit(0)
        print('ready', flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
            ''', ledger.path, node) as client:
        client.process.wait(20)
    ended, unsent = collect(str(tmp_path / 'jobs'), timeout=60)
    assert sorted(job.id for job in ended + unsent) == list(range(200))
    assert [job.exception for job in ended if job.exception] == []
