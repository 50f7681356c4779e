"""The scheduler, its nodes and its programs die, and nothing is lost or comes twice."""

import glob
import os
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

import dispy
from conftest import eventually
from dispy import DispyJob
from ledger import Ledger, enter
from nodes import NodeProcess, SchedulerProcess, start_here
from proxy import Proxy


class Shared:
    """A scheduler that can be killed and started again at the same port, with some nodes of its own."""

    def __init__(self, root, nodes=2, cpus=2, options=()):
        self.root, self._options = root, options
        self.nodes = [NodeProcess(root / ('node%d' % n), cpus=cpus) for n in range(nodes)]
        self.port = 0
        self.start()

    def start(self):
        names = [word for node in self.nodes for word in ('-n', '127.0.0.1:%d' % node.port)]
        self.scheduler = SchedulerProcess(self.root / 'scheduler', '--pulse-interval', '1', *names, *self._options, port=self.port)
        self.port = self.scheduler.port

    def kill(self):
        self.scheduler.kill()

    def cluster(self, compute, **options):
        return dispy.SharedJobCluster(compute, scheduler_port=options.pop('port', self.port), loglevel=60, pulse_interval=1, ping_interval=1, **options)

    def left(self):
        """Rows of jobs and computations, and large files, that are in the state directory."""
        state = self.scheduler.state
        db = sqlite3.connect(os.path.join(state, 'state.db'))
        try:
            return [db.execute('SELECT count(*) FROM ' + table).fetchone()[0] for table in ('jobs', 'comps')] + os.listdir(os.path.join(state, 'large')) \
                + glob.glob(os.path.join(state, 'c-*'))
        finally:
            db.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.scheduler.stop()
        for node in self.nodes:
            node.stop()


@pytest.fixture
def shared(tmp_path):
    with Shared(tmp_path) as shared:
        yield shared


def counted(ended):
    """A job_status callback that notes the ends."""
    return lambda job: ended.append(job.id) if job.status in (DispyJob.Finished, DispyJob.Terminated, DispyJob.Cancelled, DispyJob.Abandoned) else None


def test_ten_kills_of_the_scheduler_under_ten_thousand_jobs_of_ten_clients(shared, tmp_path):
    ledger, ended, jobs = Ledger(tmp_path / 'ledger'), [], []
    path = ledger.path

    def compute(name):
        import time
        enter(path, name)
        time.sleep(0.004)
        return name
    clusters = [shared.cluster(compute, job_status=counted(ended)) for _ in range(10)]

    def submit(number, cluster):
        for n in range(1000):
            name = '%d-%d' % (number, n)
            jobs.append(cluster.submit_job_id(name, name))
            if n % 20 == 0:
                time.sleep(0.01)   # so that some are submitted while the scheduler is down
    threads = [threading.Thread(target=submit, args=each) for each in enumerate(clusters)]
    for thread in threads:
        thread.start()
    for kills in range(10):
        goal = 900 * (kills + 1)
        eventually(lambda: len(ended) >= goal, 60, 'end of %d jobs' % goal)
        shared.kill()
        shared.start()
    for thread in threads:
        thread.join()
    for cluster in clusters:
        assert cluster.wait(60)
    tally = ledger.check([job.id for job in jobs], ended)
    assert tally.clean and tally.submitted == 10000 and tally.executions == 10000 and not tally.again, tally
    assert [job for job in jobs if job.status != DispyJob.Finished or job.result != job.id] == []
    for cluster in clusters:
        cluster.close()
    shared.scheduler.stop()
    assert shared.left() == [0, 0]


def test_large_arguments_and_results_over_restarts(shared):
    def compute(data, seconds):
        import time
        time.sleep(seconds)
        return data[::-1]
    with shared.cluster(compute) as cluster:
        data = [os.urandom(300 * 1024 + n) for n in range(24)]
        jobs = [cluster.submit(each, 0.1) for each in data]
        for count in (2, 8, 14):
            eventually(lambda: sum(job.status == DispyJob.Finished for job in jobs) >= count)
            shared.kill()
            shared.start()
        assert cluster.wait(60)
        assert [job.result for job in jobs] == [each[::-1] for each in data]
        eventually(lambda: os.listdir(os.path.join(shared.scheduler.state, 'large')) == [], what='large files to be removed')
    shared.scheduler.stop()
    assert shared.left() == [0, 0]


@pytest.mark.parametrize('reentrant', (False, True))
def test_a_node_dies_while_the_scheduler_is_down(shared, tmp_path, reentrant):
    ledger = Ledger(tmp_path / 'ledger')
    path, gate = ledger.path, str(tmp_path / 'gate')

    def compute(name):
        import os
        import time
        enter(path, name)
        while not os.path.exists(gate):
            time.sleep(0.01)
        return os.getppid()
    cluster = shared.cluster(compute, reentrant=reentrant)
    jobs = [cluster.submit_job_id(n, n) for n in range(4)]   # one a CPU: of one handed ahead nobody could tell whether it began
    eventually(lambda: len(ledger.attempts()) == 4)
    shared.kill()
    shared.nodes[0].kill()
    jobs += [cluster.submit_job_id(n, n) for n in (4, 5)]
    shared.start()
    open(gate, 'w').close()
    assert cluster.wait(60)
    statuses = sorted(job.status for job in jobs)
    assert statuses == ([DispyJob.Finished] * 6 if reentrant else [DispyJob.Abandoned] * 2 + [DispyJob.Finished] * 4), \
        [(job.id, job.status, job.exception) for job in jobs]
    again = ledger.check(range(6), [job.id for job in jobs]).again
    assert len(again) == (2 if reentrant else 0)
    cluster.close()


def test_a_link_of_a_program_is_cut(shared, tmp_path):
    ledger, ended = Ledger(tmp_path / 'ledger'), []
    path = ledger.path

    def compute(name):
        import time
        enter(path, name)
        time.sleep(0.01)
        return name
    with Proxy(('127.0.0.1', shared.port)) as proxy:
        with shared.cluster(compute, port=proxy.address[1], job_status=counted(ended)) as cluster:
            jobs = [cluster.submit_job_id(n, n) for n in range(600)]
            for count in (20, 150, 300):
                eventually(lambda: len(ended) >= count)
                proxy.cut()
            assert cluster.wait(60)
    tally = ledger.check(range(600), ended)
    assert tally.clean and not tally.again, tally
    assert [job.result for job in jobs] == list(range(600))


def test_a_silent_link_of_a_program_gives_way_to_its_next(shared):
    """The scheduler does not know yet that the old link is dead."""
    with Proxy(('127.0.0.1', shared.port)) as proxy:
        with shared.cluster(lambda n: n, port=proxy.address[1]) as cluster:
            assert cluster.submit(1)(20) == 1
            proxy.hold()
            job = cluster.submit(2)
            eventually(lambda: not any(link.is_open for link in proxy.connections) or len(proxy.connections) > 1, 30)
            proxy.resume()
            assert job(30) == 2


PROGRAM = '''
    import sys, time, dispy
    def compute(n):
        time.sleep(0.2)
        return n * n
    cluster = dispy.SharedJobCluster(compute, scheduler_port=int(sys.argv[1]), recover_file=sys.argv[2] if len(sys.argv) > 2 else None,
                                     pulse_interval=1, loglevel=60)
    jobs = [cluster.submit_job_id(n, n) for n in range(20)]
    jobs[0]()
    print('ready', flush=True)
    time.sleep(600)
'''


def start_program(*args):
    import textwrap
    process = start_here([sys.executable, '-c', textwrap.dedent(PROGRAM), *map(str, args)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b'ready\n'
    process.stdout.close()
    return process


def test_a_program_is_killed_and_its_results_are_given_up(tmp_path):
    with Shared(tmp_path, options=('--zombie-interval', '0.02')) as shared:
        process = start_program(shared.port)
        with shared.cluster(lambda n: n) as other:
            process.kill()
            process.wait()
            assert other.submit(1)(20) == 1
            eventually(lambda: 'are given up' in shared.scheduler.log(), 30)
            assert other.submit(2)(20) == 2
        shared.scheduler.stop()
        assert shared.left() == [0, 0]


def test_jobs_of_a_killed_program_are_recovered(shared, tmp_path):
    path = str(tmp_path / 'recover')
    process = start_program(shared.port, path)
    process.kill()
    process.wait()
    shared.kill()
    shared.start()
    jobs = dispy.recover_jobs(path, 60)
    assert {job.id: job.result for job in jobs} == {n: n * n for n in range(20)}
    assert all(job.status == DispyJob.Finished for job in jobs)
    assert not os.path.exists(path)
    eventually(lambda: shared_is_empty(shared))


def shared_is_empty(shared):
    return glob.glob(os.path.join(shared.scheduler.state, 'c-*')) == []


def test_sigterm_of_the_scheduler_keeps_what_runs(shared, tmp_path):
    ledger = Ledger(tmp_path / 'ledger')
    path, gate = ledger.path, str(tmp_path / 'gate')

    def compute(name):
        import os
        import time
        enter(path, name)
        while not os.path.exists(gate):
            time.sleep(0.01)
        return name
    with shared.cluster(compute) as cluster:
        jobs = [cluster.submit_job_id(n, n) for n in range(8)]
        eventually(lambda: len(ledger.attempts()) == 4)
        assert shared.scheduler.stop() == 0
        open(gate, 'w').close()
        late = cluster.submit_job_id(8, 8)
        shared.start()
        assert cluster.wait(60) and [job.result for job in jobs + [late]] == list(range(9))
        assert ledger.check(range(9), [job.id for job in jobs + [late]]).again == []
