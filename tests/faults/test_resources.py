"""Disks that are full, descriptors that run out, memory, clocks."""

import ast
import contextlib
import os
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest

import dispy
from clients import Client
from conftest import ROOT, eventually
from dispy import DispyJob
from ledger import Ledger, enter, open_files
from nodes import Clock, NodeProcess, SchedulerProcess
from scenes import fill


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / 'ledger')


@pytest.mark.skipif(not hasattr(signal, 'SIGSTOP'), reason='no SIGSTOP here')
def test_results_stay_in_memory_while_the_disk_of_the_node_is_full(tmp_path, small_disk, ledger):
    """The client is stopped and its jobs end: they cannot be kept, that is told once, and when
    there is room they are. Then the node is killed: what it has kept is delivered after all."""
    with NodeProcess(tmp_path / 'node', '--dest-path-prefix', small_disk) as node:
        with Client('''
            with cluster(pulse_interval=0.2, ping_interval=0.5) as cluster:
                jobs = [cluster.submit(path, number, 1) for number in range(2)]
                print('ready', flush=True)
                cluster.wait()
                print([(job.result, job.exception) for job in jobs])
                ''', ledger.path, node) as client:
            eventually(lambda: len(ledger.attempts()) == 2)
            filler = fill(small_disk)
            client.process.send_signal(signal.SIGSTOP)
            eventually(lambda: 'results cannot be kept on the disk: [Errno 28]' in node.log())
            time.sleep(5)
            assert node.log().count('results cannot be kept') == 1, node.log()
            # Nobody would remove it
            assert not [name for name in os.listdir(small_disk) if name.startswith('r-')]
            os.unlink(filler)

            def kept():
                return sum(os.path.getsize(os.path.join(small_disk, name))
                           for name in os.listdir(small_disk) if name.startswith('r-'))
            eventually(lambda: kept() > 100)
            node.kill()
            with NodeProcess(node.directory, '--dest-path-prefix', small_disk, port=node.port):
                client.process.send_signal(signal.SIGCONT)
                assert '[(0, None), (1, None)]\n' in client.rest()
    assert len(ledger.attempts()) == 2


def test_a_computation_whose_files_find_no_room_is_refused_with_the_reason(tmp_path, small_disk):
    big = tmp_path / 'big'
    big.write_bytes(os.urandom(5 << 20))
    with NodeProcess(tmp_path / 'node', '--dest-path-prefix', small_disk) as node:
        with dispy.JobCluster(abs, nodes=[node.address], depends=[str(big)]) as cluster:
            with pytest.raises(dispy.NoNodes,
                               match='5242880 bytes are needed for files and .* are free'):
                cluster.wait_nodes(1, timeout=5)
        with dispy.JobCluster(abs, nodes=[node.address]) as cluster:
            assert cluster.submit(-1)(30) == 1


def test_jobs_go_on_while_the_disk_of_the_node_is_full(tmp_path, small_disk):
    with NodeProcess(tmp_path / 'node', '--dest-path-prefix', small_disk) as node:
        with dispy.JobCluster(abs, nodes=[node.address]) as cluster:
            assert cluster.submit(-1)(30) == 1
            filler = fill(small_disk)
            assert ([job(30) for job in [cluster.submit(-number) for number in range(100)]]
                    == list(range(100)))
            os.unlink(filler)


def test_a_recovery_file_on_a_full_disk(small_disk):
    """`submit` raises, and the job is not submitted; with room it goes on, and those that were
    submitted are run."""
    path = os.path.join(small_disk, 'jobs')
    with dispy.JobCluster(len, nodes='local', recover_file=path) as cluster:
        before = [cluster.submit(b'x' * number) for number in range(20)]
        filler = fill(small_disk)
        with pytest.raises(OSError, match='No space left'):
            for _ in range(100):
                before.append(cluster.submit(os.urandom(100000)))
        os.unlink(filler)   # nothing is sent whose sending cannot be noted
        after = cluster.submit(b'12345')
        assert cluster.wait(30)
        assert after(30) == 5 and all(job.status == DispyJob.Finished for job in before)


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='needs /proc')
def test_descriptors_run_out_and_the_established_link_goes_on(tmp_path):
    import resource
    import socket
    with NodeProcess(tmp_path / 'node') as node, dispy.JobCluster(abs,
                                                                  nodes=[node.address]) as cluster:
        assert cluster.submit(-1)(30) == 1
        pid = node.process.pid
        limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE,
                         (max(map(int, os.listdir('/proc/%d/fd' % pid))) + 4, limit[1]))
        strangers = []
        try:
            for _ in range(20):
                strangers.append(socket.create_connection(node.address, 5))
            assert ([job(30) for job in [cluster.submit(-number) for number in range(200)]]
                    == list(range(200)))
        finally:
            for sock in strangers:
                sock.close()
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
        before = len(open_files(pid))
        eventually(lambda: len(open_files(pid)) <= before)
        with dispy.JobCluster(abs, nodes=[node.address]) as other:
            assert cluster.submit(-2)(30) == 2
            del other


def hungry(path, number, mib):
    enter(path, number)
    held = []
    for _ in range(mib):
        held.append(bytearray(b'x' * (1 << 20)))
        time.sleep(0.002)
    time.sleep(0.2)
    return number


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'),
                    reason='memory is seen in /proc, or by psutil')
def test_a_job_that_uses_too_much_memory_is_killed_and_its_neighbours_live(tmp_path, ledger):
    with NodeProcess(tmp_path / 'node') as node:
        with dispy.JobCluster(hungry, depends=[enter], nodes=[node.address]) as cluster:
            neighbour = cluster.submit(ledger.path, 'neighbour', 1)
            jobs = [cluster.submit(ledger.path, number, 400 if number % 3 == 0 else 1,
                                   dispy_memory=150 << 20) for number in range(9)]
            cluster.wait(60)
            assert neighbour.result == 'neighbour'
            for number, job in enumerate(jobs):
                if number % 3:
                    assert job.result == number, job.exception
                else:
                    assert (job.status == DispyJob.Terminated
                            and 'used more memory than its limit (dispy_memory)' in job.exception)
            assert node.process.poll() is None


def test_a_job_for_which_the_system_has_no_memory_is_terminated_and_says_so(tmp_path, ledger):
    def greedy():
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
        try:
            return len(bytearray(2 << 30))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    pytest.importorskip('resource')
    with NodeProcess(tmp_path / 'node') as node, dispy.JobCluster(greedy,
                                                                  nodes=[node.address]) as cluster:
        jobs = [cluster.submit() for _ in range(4)]
        assert cluster.wait(30)
        assert all(job.status == DispyJob.Terminated and 'MemoryError' in job.exception
                   for job in jobs)
        assert node.process.poll() is None


def talks(number):
    for _ in range(100):
        os.write(1, b'x' * (1 << 20))
    return number


def test_a_hundred_megabytes_printed_leave_the_memory_of_the_daemon_flat(tmp_path):
    with NodeProcess(tmp_path / 'node') as node, dispy.JobCluster(talks,
                                                                  nodes=[node.address]) as cluster:
        cluster.wait_nodes(1, 20)
        process = psutil.Process(node.process.pid)
        before, most = process.memory_info().rss, 0
        jobs = [cluster.submit(number) for number in range(4)]
        while not cluster.wait(0.02):
            most = max(most, process.memory_info().rss)
        assert [job.result for job in jobs] == [0, 1, 2, 3]
        assert all(len(job.stdout) < 600000 for job in jobs) and most - before < 20 << 20


# -- memory ----------------------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(resource, 'prlimit'),
                    reason='limits of another process are set here')
@pytest.mark.parametrize('what', ['argument', 'result'])
def test_a_value_for_which_a_node_has_no_memory_ends_its_job_alone(tmp_path, what, whole_arguments):
    size, gate = 300 << 20, str(tmp_path / 'gate')

    def wait(path):
        while not os.path.exists(path):
            time.sleep(0.01)
        return 42
    with NodeProcess(tmp_path / 'node', cpus=2) as node:
        with dispy.JobCluster(wait, nodes=[node.address]) as beside, \
                dispy.JobCluster(len if what == 'argument' else bytes,
                                 nodes=[node.address]) as cluster:
            neighbour = beside.submit(gate)
            eventually(lambda: neighbour.status == DispyJob.Running)
            most = psutil.Process(node.process.pid).memory_info().vms + size
            resource.prlimit(node.process.pid, resource.RLIMIT_AS, (most, most))
            job = cluster.submit(bytes(size) if what == 'argument' else size)
            assert (job.wait(60) and job.status == DispyJob.Terminated
                    and 'no memory' in job.exception), job.exception
            assert cluster.submit(b'abc' if what == 'argument' else 3)(30) in (3, bytes(3))
            open(gate, 'w').close()
            assert neighbour(30) == 42
        assert node.process.poll() is None


NO_ROOM = '''
import os, resource, sys, time
import dispy
import psutil

SIZE = 300 << 20


def make(size):
    return bytes(size)


if __name__ == '__main__':
    host, port, scheduler, victim = ('127.0.0.1', int(sys.argv[1]), int(sys.argv[2]),
                                     int(sys.argv[3]) or os.getpid())
    if scheduler:
        cluster = dispy.SharedJobCluster(make, scheduler_port=scheduler)
    else:
        cluster = dispy.JobCluster(make, nodes=[(host, port)])
    with cluster:
        assert cluster.submit(3)(30) == bytes(3)
        most = psutil.Process(victim).memory_info().vms + SIZE
        resource.prlimit(victim, resource.RLIMIT_AS, (most, most))
        job = cluster.submit(SIZE)
        assert job.wait(120)   # its megabytes come three times
        print(job.status_text(), job.exception)
        print(len(cluster.submit(3)(120)))
'''


@pytest.mark.long
@pytest.mark.skipif(not hasattr(resource, 'prlimit'),
                    reason='limits of another process are set here')
@pytest.mark.parametrize('who', ['program', 'scheduler', 'program of a scheduler'])
def test_a_result_for_which_somebody_has_no_memory_ends_its_job_alone(tmp_path, who):
    (tmp_path / 'program.py').write_text(NO_ROOM)
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(NodeProcess(tmp_path / 'node'))
        port = victim = 0
        if who != 'program':
            scheduler = stack.enter_context(SchedulerProcess(tmp_path / 's', '-n',
                                                             '127.0.0.1:%d' % node.port))
            port, victim = scheduler.port, scheduler.process.pid if who == 'scheduler' else 0
        done = subprocess.run(
            [sys.executable, str(tmp_path / 'program.py'), str(node.port), str(port), str(victim)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=280)
        assert done.returncode == 0, done.stderr
        first, last = done.stdout.splitlines()
        assert (first.startswith('terminated') and 'no memory' in first
                and 'dispy_send_file' in first and last == '3'), done.stdout


# -- clocks ----------------------------------------------------------------------------------------

# Where the clock on the wall may be read: for what a user sees, and to compare with times of files
# and hours of service.
WALL_CLOCK = {
    'dispy.py': {'fill_in', 'end_without', '__init__', 'print_status', '_send_jobs',
                 'driver_failed', '_why_unended', '_moved', 'submit', '_submit', 'jobs_started',
                 'remove_old_trails', 'find', '_moment', 'facts_now', 'add', 'processes', 'settle',
                 '_log_end', 'end_with_driver', 'counts'},
    'dispynode.py': {'find_kept', 'end_of_turn', '_run', '_provisional', 'begin', '__init__',
                     'age'},
}


def wall_clock_uses(name):
    """Functions that read the clock on the wall: time.time(), time.localtime(), datetime.now()."""
    with open(os.path.join(ROOT, name)) as file:
        tree = ast.parse(file.read())
    found = set()
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) \
                        and (node.value.id, node.attr) in (('time', 'time'), ('time', 'localtime'),
                                                           ('datetime', 'now')):
                    found.add(function.name)
    return found


@pytest.mark.parametrize('name', sorted(WALL_CLOCK))
def test_the_clock_on_the_wall_decides_nothing(name):
    assert wall_clock_uses(name) <= WALL_CLOCK[name], 'is the clock on the wall only shown there?'


def test_the_clock_on_the_wall_steps_by_hours(tmp_path):
    """In the client, its node, runner and workers: Python's own clock is replaced by one that a
    file sets."""
    code = '''
import os, sys, time
import dispy

def compute(number):
    import time
    time.sleep(0.02)
    return number, time.time()

with dispy.JobCluster(compute, nodes='local', pulse_interval=0.2) as cluster:
    jobs = [cluster.submit(number) for number in range(100)]
    jobs[10]()
    for hours in (5, -4, 0):
        with open(os.environ['TEST_CLOCK'] + '-new', 'w') as file:
            file.write(str(3600 * hours))
        os.replace(file.name, os.environ['TEST_CLOCK'])
        job = cluster.submit(0)
        assert abs(job()[1] - time.time()) < 600
        jobs += [cluster.submit(number) for number in range(100, 110)]
    print([job()[0] for job in jobs] == [*range(100), *3 * [*range(100, 110)]])
'''
    done = subprocess.run(
        [sys.executable, '-c', code], env=dict(os.environ, **Clock(tmp_path).environment),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, timeout=60)
    assert done.stdout == 'True\n', done.stdout


def say(text):
    print(text)
    return text


def test_what_found_no_room_is_not_taken_for_the_output_of_another_job(tmp_path, small_disk):
    """The job's stderr says what is lost of its own; the job that prints when there is room again
    has its own text alone."""
    with NodeProcess(tmp_path / 'node', '--dest-path-prefix', small_disk, cpus=1) as node:
        with dispy.JobCluster(say, nodes=[node.address]) as cluster:
            assert cluster.submit('first')(30) == 'first'
            filler = fill(small_disk)
            jobs = [cluster.submit('text %d' % number) for number in range(3)]
            assert cluster.wait(30)
            os.unlink(filler)
            last = cluster.submit('last')
            assert last(30) == 'last'
    assert last.stdout == 'last\n' and not last.stderr
    for number, job in enumerate(jobs):
        assert (job.stdout == 'text %d\n' % number
                or (job.stdout == '' and 'is lost' in job.stderr)), (job.stdout, job.stderr)
    assert any('is lost' in job.stderr for job in jobs)
