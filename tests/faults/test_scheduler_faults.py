"""The scheduler, its nodes and its programs die, and nothing is lost or comes twice."""

import contextlib
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
    """A scheduler that can be killed and started again at the same port, with some nodes of its
    own."""

    def __init__(self, root, nodes=2, cpus=2, options=()):
        self.root, self._options = root, options
        self.nodes = [NodeProcess(root / ('node%d' % n), cpus=cpus) for n in range(nodes)]
        self.port = 0
        self.start()

    def start(self):
        names = [word for node in self.nodes for word in ('-n', '127.0.0.1:%d' % node.port)]
        self.scheduler = SchedulerProcess(self.root / 'scheduler', '--pulse-interval', '1', *names,
                                          *self._options, port=self.port)
        self.port = self.scheduler.port

    def kill(self):
        self.scheduler.kill()

    def cluster(self, compute, **options):
        return dispy.SharedJobCluster(compute, scheduler_port=options.pop('port', self.port),
                                      loglevel=60, pulse_interval=1, ping_interval=1, **options)

    def left(self):
        """Rows of jobs and computations, and large files, that are in the state directory."""
        state = self.scheduler.state
        db = sqlite3.connect(os.path.join(state, 'state.db'))
        try:
            return [db.execute('SELECT count(*) FROM ' + table).fetchone()[0]
                    for table in ('jobs', 'comps')] + os.listdir(os.path.join(state, 'large')) \
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
    return lambda job: ended.append(job.id) if job.status in (
        DispyJob.Finished, DispyJob.Terminated, DispyJob.Cancelled, DispyJob.Abandoned) else None


@pytest.mark.long
def test_kills_of_the_scheduler_under_thousands_of_jobs_of_ten_clients(shared, tmp_path, request):
    """Ten under ten thousand with --long, or four under four thousand."""
    kills = 10 if request.config.getoption('--long') else 4
    ledger, ended, jobs = Ledger(tmp_path / 'ledger'), [], []
    path = ledger.path

    def compute(name):
        import time
        enter(path, name)
        time.sleep(0.004)
        return name
    clusters = [shared.cluster(compute, job_status=counted(ended)) for _ in range(10)]

    def submit(number, cluster):
        for n in range(100 * kills):
            name = '%d-%d' % (number, n)
            jobs.append(cluster.submit_job_id(name, name))
            if n % (2 * kills) == 0:
                time.sleep(0.01)   # so that some are submitted while the scheduler is down
    threads = [threading.Thread(target=submit, args=each) for each in enumerate(clusters)]
    for thread in threads:
        thread.start()
    for number in range(kills):
        goal = 900 * (number + 1)
        eventually(lambda: len(ended) >= goal, 60, 'end of %d jobs' % goal)
        shared.kill()
        shared.start()
    for thread in threads:
        thread.join()
    for cluster in clusters:
        assert cluster.wait(60)
    tally = ledger.check([job.id for job in jobs], ended)
    assert (tally.clean and tally.submitted == tally.executions == 1000 * kills
            and not tally.again), tally
    assert [job for job in jobs if job.status != DispyJob.Finished or job.result != job.id] == []
    for cluster in clusters:
        cluster.close()
    eventually(lambda: shared.scheduler.log().count('compute: is over') == 10)
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
        eventually(lambda: os.listdir(os.path.join(shared.scheduler.state, 'large')) == [],
                   what='large files to be removed')
    eventually(lambda: 'compute: is over' in shared.scheduler.log())
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
    # One a CPU: of one handed ahead nobody could tell whether it began
    jobs = [cluster.submit_job_id(n, n) for n in range(4)]
    eventually(lambda: len(ledger.attempts()) == 4)
    shared.kill()
    shared.nodes[0].kill()
    jobs += [cluster.submit_job_id(n, n) for n in (4, 5)]
    shared.start()
    open(gate, 'w').close()
    # A scheduler that was started anew waits a minute for nodes to come back
    assert cluster.wait(100)
    statuses = sorted(job.status for job in jobs)
    assert statuses == ([DispyJob.Finished] * 6 if reentrant
                        else [DispyJob.Abandoned] * 2 + [DispyJob.Finished] * 4), \
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
            eventually(lambda: not any(link.is_open for link in proxy.connections)
                       or len(proxy.connections) > 1, 30)
            proxy.resume()
            assert job(30) == 2


PROGRAM = '''
    import sys, time, dispy
    def compute(n):
        time.sleep(0.2)
        return n * n
    cluster = dispy.SharedJobCluster(compute, scheduler_port=int(sys.argv[1]),
                                     recover_file=sys.argv[2] if len(sys.argv) > 2 else None,
                                     pulse_interval=1, loglevel=60)
    jobs = [cluster.submit_job_id(n, n) for n in range(20)]
    jobs[0]()
    print('ready', flush=True)
    time.sleep(600)
'''


def start_program(*args):
    import textwrap
    process = start_here([sys.executable, '-c', textwrap.dedent(PROGRAM), *map(str, args)],
                         stdout=subprocess.PIPE)
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
            eventually(lambda: 'are discarded' in shared.scheduler.log(), 30)
            assert other.submit(2)(20) == 2
        eventually(lambda: 'is over' in shared.scheduler.log())
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


# -- nodes that are known again --------------------------------------------------------------------

def gated(path, gate, name):
    """Notes that it began, and waits for a file."""
    enter(path, name)
    while not os.path.exists(gate):
        time.sleep(0.01)
    return dispy_node_name   # noqa: F821


class Gated:
    """A cluster of `gated`; what a test of it needs."""

    def __init__(self, root, port, **options):
        self.ledger, self.gate = Ledger(root / 'ledger'), str(root / 'gate')
        self.cluster = dispy.SharedJobCluster(gated, depends=[enter], scheduler_port=port,
                                              loglevel=60, pulse_interval=1, ping_interval=1,
                                              **options)
        self.jobs = []

    def submit(self, count):
        """So many, all of which have begun when it returns."""
        self.jobs += [self.cluster.submit_job_id(n, self.ledger.path, self.gate, n)
                      for n in range(len(self.jobs), len(self.jobs) + count)]
        eventually(lambda: len(self.ledger.attempts()) == len(self.jobs))

    def open(self):
        with open(self.gate, 'w'):
            pass

    def results(self):
        """Of all, each of which ran once."""
        assert self.cluster.wait(20), [job.status for job in self.jobs]
        assert self.ledger.check(range(len(self.jobs)), [job.id for job in self.jobs]).again == []
        return [job.result for job in self.jobs]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.open()
        self.cluster.close(terminate=exc[0] is not None)


QUICK = ('--pulse-interval', '1', '--ping-interval', '1')


def test_a_node_that_dialled_in_is_known_again_after_a_restart(tmp_path):
    options = ('-n', '127.0.0.1:1', *QUICK)
    with SchedulerProcess(tmp_path / 'scheduler', *options) as old, \
            NodeProcess(tmp_path / 'node', '--name', 'caller', '--scheduler-host', '127.0.0.1:%d'
                        % old.port, '--ping-interval', '1'), Gated(tmp_path, old.port) as run:
        run.submit(2)
        old.kill()
        with SchedulerProcess(tmp_path / 'scheduler', *options, port=old.port) as new:
            run.open()
            assert run.results() == ['caller'] * 2
            assert new.process.poll() is None
            run.cluster.close()


def test_a_job_that_may_run_once_does_not_run_again_when_scheduler_and_node_die(tmp_path):
    node = NodeProcess(tmp_path / 'node', cpus=1)
    options = ('-n', '127.0.0.1:%d' % node.port, *QUICK)
    with SchedulerProcess(tmp_path / 'scheduler',
                          *options) as old, Gated(tmp_path, old.port) as run:
        run.submit(1)
        old.kill()
        node.kill()
        with NodeProcess(node.directory, cpus=1, port=node.port), \
                SchedulerProcess(tmp_path / 'scheduler', *options, port=old.port):
            assert run.results() == [None] and run.jobs[0].status == DispyJob.Abandoned
            run.cluster.close()


@pytest.mark.parametrize('names', (('localhost', '127.0.0.1', 'localhost'),
                                   ('localhost', None, '127.0.0.1')))
def test_a_node_by_two_names_is_one_after_a_restart(tmp_path, names):
    """The scheduler's name of it, the program's, and the scheduler's after its restart."""
    with NodeProcess(tmp_path / 'node', '--name', 'one') as node:
        first, own, then = [name and '%s:%d' % (name, node.port) for name in names]
        with SchedulerProcess(tmp_path / 'scheduler', '-n', first,
                              *QUICK) as old, Gated(tmp_path, old.port, nodes=own and [own]) as run:
            run.submit(2)
            old.kill()
            with SchedulerProcess(tmp_path / 'scheduler', '-n', then, *QUICK, port=old.port) as new:
                eventually(lambda: [node.state for node in run.cluster.status().all_nodes]
                           == ['ready'])
                run.open()
                assert run.results() == ['one'] * 2
                assert new.process.poll() is None
                run.cluster.close()


def test_nodes_behind_one_address_come_back_in_another_order(tmp_path):
    """They have dialled in; each is taken for itself, and no job is taken for lost."""
    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(SchedulerProcess(tmp_path / 'scheduler', '-n',
                                                         '127.0.0.1:1', *QUICK))
        proxies = [stack.enter_context(Proxy(('127.0.0.1', scheduler.port))) for _ in range(3)]
        run = stack.enter_context(Gated(tmp_path, scheduler.port))
        for number, proxy in enumerate(proxies):
            stack.enter_context(NodeProcess(
                tmp_path / ('node%d' % number), '--name', 'node%d' % number, '--ping-interval', '1',
                '--scheduler-host', '127.0.0.1:%d' % proxy.address[1], cpus=1))
            run.cluster.wait_nodes(number + 1, 20)
        run.submit(3)
        for proxy in proxies[:2]:
            proxy.refuse()
        for proxy in proxies:
            proxy.cut()
        for number in (2, 1, 0):
            if number < 2:
                proxies[number].accept()
            eventually(lambda: proxies[number].count == 2)
            eventually(lambda: proxies[number].connections[1].sent['down'] > 200,
                       what='an answer of the scheduler')
        run.open()
        assert sorted(run.results()) == ['node0', 'node1', 'node2']
        run.cluster.close()


# -- what runs out ---------------------------------------------------------------------------------

@pytest.mark.parametrize('small_disk', ['2m'], indirect=True)
@pytest.mark.parametrize('large', ('arguments', 'result'))
def test_the_scheduler_is_stopped_while_its_disk_has_no_room(tmp_path, small_disk, large,
                                                             whole_arguments):
    """What it could not keep the other side has, and gives again when there is room."""
    size = 3 << 20
    with NodeProcess(tmp_path / 'node') as node:
        options = ('--state-dir', os.path.join(small_disk, 'state'), '-n',
                   '127.0.0.1:%d' % node.port, *QUICK)
        with SchedulerProcess(tmp_path / 'scheduler', *options) as old:
            cluster = dispy.SharedJobCluster(lambda data, size: bytes(size + len(data)),
                                             scheduler_port=old.port, loglevel=60, pulse_interval=1,
                                             ping_interval=1)
            assert len(cluster.submit(b'', 5)(20)) == 5
            job = (cluster.submit(bytes(size), 1) if large == 'arguments'
                   else cluster.submit(b'', size + 1))
            eventually(lambda: 'cannot be written' in old.log())
            assert old.stop() == 0
        subprocess.run(['mount', '-o', 'remount,size=32m', small_disk], check=True)
        with SchedulerProcess(tmp_path / 'scheduler', *options, port=old.port):
            assert len(job(20)) == size + 1
            cluster.close()


def large_files_of(pid):
    """The large arguments and results that a scheduler has open."""
    found = []
    for name in os.listdir('/proc/%d/fd' % pid):
        with contextlib.suppress(FileNotFoundError):   # closed meanwhile
            found.append(os.readlink('/proc/%d/fd/%s' % (pid, name)))
    return [path for path in found if 'large' in path.split(os.sep)]


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='needs /proc')
def test_descriptors_run_out_and_the_scheduler_goes_on(tmp_path):
    """Arguments that wait on its disk cannot be read: that is told of their jobs, and of them
    alone."""
    import resource
    with Shared(tmp_path, nodes=1, cpus=1) as shared, Gated(tmp_path, shared.port) as run, \
            shared.cluster(len) as cluster:
        cluster.wait_nodes(1, 20)
        run.submit(1)
        jobs = [cluster.submit(bytes(100000)) for _ in range(6)]
        eventually(lambda: len(os.listdir(os.path.join(shared.scheduler.state, 'large'))) == 6)
        pid = shared.scheduler.process.pid
        limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        eventually(lambda: not large_files_of(pid), what='end of the last write')
        resource.prlimit(pid, resource.RLIMIT_NOFILE,
                         (len(os.listdir('/proc/%d/fd' % pid)), limit[1]))
        try:
            run.open()
            assert run.results() and cluster.wait(20)
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
        lost = [job for job in jobs if job.status == DispyJob.Terminated]
        assert lost and all('arguments cannot be read at the scheduler' in job.exception
                            for job in lost)
        assert all(job.result == 100000 for job in jobs if job not in lost)
        assert cluster.submit(bytes(100001))(20) == 100001
        assert shared.scheduler.process.poll() is None


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='needs /proc')
def test_descriptors_run_out_while_results_wait_on_the_disk(tmp_path):
    """They come when there are some again."""
    import resource
    with Shared(tmp_path, nodes=1) as shared, Proxy(('127.0.0.1', shared.port)) as proxy, \
            shared.cluster(bytes, port=proxy.address[1]) as cluster:
        assert len(cluster.submit(5)(20)) == 5
        proxy.rate = 400000
        jobs = [cluster.submit(1000000) for _ in range(60)]
        seen = set()   # all have to be on the disk: without descriptors it takes no more

        def all_came():
            seen.update(name for name in os.listdir(os.path.join(shared.scheduler.state, 'large'))
                        if name.endswith('.r'))
            return len(seen) == 60
        eventually(all_came)
        pid = shared.scheduler.process.pid
        limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (4, limit[1]))
        try:
            proxy.rate = None
            eventually(lambda: 'cannot be read' in shared.scheduler.log())
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
        assert cluster.wait(20), [job.status for job in jobs]
        assert all(len(job.result) == 1000000 for job in jobs)


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs /proc')
def test_results_for_a_slow_program_wait_on_the_disk(tmp_path):
    """And not in the memory of the scheduler."""
    with Shared(tmp_path, nodes=1) as shared, Proxy(('127.0.0.1', shared.port)) as proxy, \
            shared.cluster(bytes, port=proxy.address[1]) as cluster:
        assert len(cluster.submit(5)(20)) == 5

        def most():
            with open('/proc/%d/status' % shared.scheduler.process.pid) as file:
                return int(next(line.split()[1] for line in file if line.startswith('VmHWM'))) >> 10
        before = most()
        proxy.rate = 400000
        jobs = [cluster.submit(1000000) for _ in range(200)]
        eventually(lambda: len(os.listdir(os.path.join(shared.scheduler.state, 'large'))) >= 190,
                   60, 'results on the disk')
        grown = most() - before
        proxy.rate = None
        assert cluster.wait(60) and all(len(job.result) == 1000000 for job in jobs)
        assert grown < 90, '%d MiB more' % grown
