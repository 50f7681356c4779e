"""What never began is never given up: links that swallow, nodes that end while their clients are
away, limits that pass."""

import collections
import os
import re
import signal
import time

import pytest

import dispy
from clients import Client, There, program
from conftest import eventually
from dispy import DispyJob
from ledger import Ledger, enter
from nodes import NodeProcess, SchedulerProcess
from proxy import UP, Proxy
from scenes import fill

pytestmark = pytest.mark.skipif(not hasattr(signal, 'SIGSTOP'), reason='no SIGSTOP here')


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / 'ledger')


def begun(ledger):
    return collections.Counter(attempt.job for attempt in ledger.attempts())


@pytest.fixture(params=['JobCluster', 'SharedJobCluster'])
def place(request, tmp_path):
    """(kind, address that programs connect to, node) - the scheduler has the node."""
    zombie = getattr(request.module, 'ZOMBIE', {}).get(request.function.__name__, 1440)   # minutes
    with NodeProcess(tmp_path / 'node', '--zombie-interval', str(zombie), cpus=2) as node:
        if request.param == 'JobCluster':
            yield request.param, node.address, node
        else:
            with SchedulerProcess(tmp_path / 's', '-n', '127.0.0.1:%d' % node.port,
                                  '--zombie-interval', str(zombie)) as scheduler:
                eventually(lambda: 'connected' in scheduler.log()
                           or scheduler.process.poll() is None)
                yield request.param, scheduler.address, node


ZOMBIE = {'test_results_that_were_given_up_while_a_program_slept_are_told': 1 / 60}


def test_jobs_that_the_link_swallowed_wait_again(place, ledger, tmp_path):
    """They were sent and noted as sent, and never arrived; the node and the scheduler live."""
    kind, address, _ = place
    with Proxy(address) as proxy:
        with Client(program(kind, '''
with make(KIND, recover_file=directory + '/file') as cluster_:
    cluster_.submit(path, 'first')()
    print('ready', flush=True)
    sys.stdin.readline()
    for number in range(20):
        cluster_.submit_job_id(number, path, number)
    print('submitted', flush=True)
    time.sleep(600)
'''), ledger.path, There(proxy.address)) as client:
            proxy.swallow(UP)
            client.process.stdin.write('\n')
            client.process.stdin.flush()
            assert client.process.stdout.readline() == 'submitted\n'
            if kind == 'JobCluster':   # one more than its two CPUs at most
                time.sleep(0.5)
            client.kill()
        proxy.swallow()
        with Client(program(kind, '''
for job in dispy.recover_jobs(directory + '/file', timeout=20):
    print(job.status_text())
'''), ledger.path, There(proxy.address), wait=False) as client:
            told = collections.Counter(client.rest().split())
        assert told['created'] == 20 and 'abandoned' not in told, told
        with Client(program(kind, '''
with make(KIND, recover_file=directory + '/file') as cluster_:
    jobs = cluster_.recovered
    cluster_.wait(60)
print(len(jobs), {job.status_text() for job in jobs})
'''), ledger.path, There(proxy.address), wait=False) as client:
            assert "20 {'finished'}" in client.rest()
    assert set(begun(ledger).values()) == {1} and len(begun(ledger)) == 21


def test_a_node_that_ends_in_good_order_while_its_client_is_away_loses_nothing_that_waits(tmp_path,
                                                                                          ledger):
    """Its connection is cut, and cannot be made anew before the node has ended. Many jobs are
    there, two of which run: these are lost, the others have not begun."""
    node = NodeProcess(tmp_path / 'node', cpus=2)
    with Proxy(node.address) as proxy:
        with dispy.JobCluster(compute, depends=[enter], nodes=[proxy.address],
                              ping_interval=0.5) as cluster:
            for number in range(400):
                cluster.submit(ledger.path, number, 0.001)
            assert cluster.wait(30)
            jobs = [cluster.submit(ledger.path, number, 30 if number < 1002 else 0.001)
                    for number in range(1000, 1060)]
            eventually(lambda: {'1000', '1001'} <= set(begun(ledger)))
            proxy.refuse()
            proxy.cut()
            eventually(lambda: cluster.status().all_nodes[0].state != 'ready')
            node.stop()
            with NodeProcess(tmp_path / 'node', cpus=2, port=node.port):
                proxy.accept()
                assert cluster.wait(30)
    assert [job.status for job in jobs[:2]] == 2 * [DispyJob.Abandoned]
    assert ({job.status for job in jobs[2:]}
            == {DispyJob.Finished}), [job.exception for job in jobs[2:] if job.exception][:1]
    assert max(begun(ledger).values()) == 1


def test_results_that_were_given_up_while_a_program_slept_are_told(place, ledger):
    """Nothing runs twice: the program is told what was given up, and why."""
    kind, address, node = place
    with Client(program(kind, '''
with make(KIND, pulse_interval=0.2, ping_interval=0.5) as cluster_:
    jobs = [cluster_.submit_job_id(number, path, number, 4.0) for number in range(2)]
    while len(Ledger(path).attempts()) < 2:
        time.sleep(0.01)
    print('ready', flush=True)
    cluster_.wait()
    for job in jobs:
        print(job.status_text(), job.exception)
'''), ledger.path, There(address)) as client:
        client.process.send_signal(signal.SIGSTOP)
        prefix = node.prefix if kind == 'JobCluster' else None
        if prefix:   # the node has kept the results, and has given them up
            eventually(lambda: any(name.startswith('g-') for name in os.listdir(prefix)), 30)
        else:
            time.sleep(12.0)
        client.process.send_signal(signal.SIGCONT)
        lines = client.rest().splitlines()
    assert max(begun(ledger).values()) == 1
    told = [line for line in lines if line.startswith('abandoned')]
    assert len(told) == 2 and all('gave up its result after 1 s' in line for line in told), lines


@pytest.mark.parametrize('reentrant', [False, True])
def test_a_node_that_was_killed_and_is_back_says_what_had_begun(tmp_path, ledger, reentrant):
    """Through a proxy, so that its client cannot look at what it has left. Those that waited there
    run, and none twice."""
    node = NodeProcess(tmp_path / 'node', cpus=1)
    with Proxy(node.address) as proxy:
        with dispy.JobCluster(compute, depends=[enter], nodes=[proxy.address], ping_interval=0.5,
                              reentrant=reentrant) as cluster:
            for number in range(300):
                cluster.submit(ledger.path, number, 0.001)
            cluster.wait(30)
            long = cluster.submit(ledger.path, 'long', 0 if ledger.attempts() and reentrant else 30)
            jobs = [cluster.submit(ledger.path, number, 0.001) for number in range(1000, 1100)]
            eventually(lambda: 'long' in begun(ledger))
            node.kill()
            node = NodeProcess(tmp_path / 'node', cpus=1, port=node.port)
            assert cluster.wait(60)
    node.stop()
    assert ({job.status for job in jobs}
            == {DispyJob.Finished}), [job.exception for job in jobs if job.exception][:1]
    assert long.status == (DispyJob.Finished if reentrant else DispyJob.Abandoned)
    if not reentrant:
        assert max(begun(ledger).values()) == 1


def compute(path, number, seconds):
    enter(path, number)
    time.sleep(seconds)
    return number


def test_what_cannot_be_noted_is_not_sent(tmp_path, small_disk, ledger):
    """The recovery file is on a full disk: nothing that is sent is told as never started, nothing
    is delivered twice, and the cluster goes on when there is room."""
    with NodeProcess(tmp_path / 'node', cpus=2) as node:
        code = '''
with cluster(recover_file=directory + '/small/file') as cluster_:
    cluster_.wait_nodes(1, 20)
    print('ready', flush=True)
    sys.stdin.readline()
    jobs = []
    for number in range(40):
        try:
            jobs.append(cluster_.submit_job_id(number, path, number, 0.02))
        except OSError:
            break
    sys.stdout.write('%d jobs\\n' % len(jobs))   # at once: what is logged comes along the same pipe
    sys.stdout.flush()
    sys.stdin.readline()
    cluster_.wait()
    print(len(jobs), {job.status_text() for job in jobs}, flush=True)
    sys.stdin.readline()
'''
        with Client(code, ledger.path, node) as client:
            filler = fill(small_disk)
            # So that submit itself can write a little
            os.truncate(filler, os.path.getsize(filler) - 8192)
            fill_again = os.path.join(small_disk, 'filler')
            client.process.stdin.write('\n')
            client.process.stdin.flush()
            lines = iter(client.process.stdout.readline, '')
            submitted = int(next(line for line in lines if re.match(r'\d+ jobs$', line)).split()[0])
            assert submitted > 5
            time.sleep(1.0)
            noted = sum(begun(ledger).values())
            client.kill()
        os.unlink(fill_again)
        found = run(node, ledger, '''
for job in dispy.recover_jobs(directory + '/small/file', timeout=20):
    print(job.id, job.status_text())
''')
        told = dict(re.findall(r'^(\d+) (\w+)$', found, re.MULTILINE))
        created = {number for number, text in told.items() if text == 'created'}
        assert not created & set(begun(ledger)), (noted, created & set(begun(ledger)))
        assert len(told) == submitted


def test_a_full_recovery_file_is_told_and_goes_on_when_there_is_room(tmp_path, small_disk, ledger,
                                                                     caplog):
    with NodeProcess(tmp_path / 'node', cpus=2) as node:
        with dispy.JobCluster(compute, depends=[enter], nodes=[node.address],
                              recover_file=os.path.join(small_disk, 'file')) as cluster:
            cluster.wait_nodes(1, 20)
            filler = fill(small_disk)
            os.truncate(filler, os.path.getsize(filler) - 8192)
            jobs = []
            with pytest.raises(OSError):
                while True:
                    jobs.append(cluster.submit(ledger.path, len(jobs), 0.0))
            eventually(lambda: any('recovery file cannot be written' in record.getMessage()
                                   for record in caplog.records))
            os.unlink(filler)
            assert cluster.wait(30)
            assert {job.status for job in jobs} == {DispyJob.Finished}
        assert set(begun(ledger).values()) == {1} and len(begun(ledger)) == len(jobs)


def run(node, ledger, code):
    with Client(code, ledger.path, node, wait=False) as client:
        return client.rest()


def test_jobs_that_wait_at_a_scheduler_without_nodes_are_told_as_waiting(tmp_path, ledger):
    with SchedulerProcess(tmp_path / 's', '-n', '127.0.0.1:9') as scheduler:
        with Client(program('SharedJobCluster', '''
cluster_ = make(KIND, recover_file=directory + '/file')
for number in range(5):
    cluster_.submit(path, number)
time.sleep(1.0)
print('ready', flush=True)
time.sleep(600)
'''), ledger.path, There(scheduler.address)) as client:
            while 'ready' not in client.first:
                client.first = client.process.stdout.readline()
            client.kill()
        with Client(program('SharedJobCluster', '''
jobs = dispy.recover_jobs(directory + '/file', timeout=7)
print(sorted(job.status_text() for job in jobs))
'''), ledger.path, There(scheduler.address), wait=False) as client:
            shown = client.rest()
        assert str(5 * ['created']) in shown
        assert 'Run `python dispyscheduler.py`' not in shown
