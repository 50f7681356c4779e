"""Nodes that a real Slurm places: four of its nodes on loopback, each with a daemon of its own. The
packages slurmctld, slurmd, slurm-client and munge of Debian have what is needed."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

import dispy
from conftest import ROOT, eventually
from nodes import SchedulerProcess
from scenes import Gate, hold

PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'squeue', 'scancel', 'sinfo')
SBIN = os.pathsep.join([os.environ['PATH'], '/usr/sbin', '/usr/local/sbin'])
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=SBIN)]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason='needs %s (Debian: slurmctld, slurmd, slurm-client, '
                                             'munge)' % ', '.join(MISSING)),
    pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0,
                       reason='slurmd has to be started by root')]
CONFIGURATION = """
ClusterName=dispytest
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def free_ports(count):
    """Ports that nobody has now."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(('127.0.0.1', 0))
        return [sock.getsockname()[1] for sock in socks]


OTHER = '127.255.0.1'


def has_address():
    """Whether the C library takes this host for one with IPv4, of which 127.0.0.1 is no sign."""
    try:
        socket.getaddrinfo(None, 1, socket.AF_INET, socket.SOCK_STREAM, 0,
                           socket.AI_ADDRCONFIG | socket.AI_PASSIVE)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def another_address():
    """Slurm starts also in a network of its own, which has nothing but loopback."""
    words = [OTHER + '/32', 'dev', 'lo']
    is_missing = not has_address()
    if is_missing:
        subprocess.run(['ip', 'address', 'add', *words], check=True)
    yield
    if is_missing:
        subprocess.run(['ip', 'address', 'delete', *words], check=True)


class Slurm:
    """Slurm with nodes n1 to n4 of one CPU each, and a home directory in which it is used."""

    def __init__(self, root):
        self.root = root
        self.home = root / 'home'
        for name in ('home', 'munge', 'state'):
            (root / name).mkdir(mode=0o755)
        self._processes = []
        ports = free_ports(5)
        nodes = '\n'.join('NodeName=n%d NodeHostname=localhost NodeAddr=127.0.0.1 Port=%d CPUs=1 '
                          'RealMemory=1000' % (n, port) for n, port in enumerate(ports[1:], 1))
        config = root / 'slurm.conf'
        config.write_text(CONFIGURATION.format(root=root, ports=ports, nodes=nodes))
        self.environment = {'HOME': str(self.home), 'SLURM_CONF': str(config), 'PATH': SBIN}
        key = root / 'munge' / 'key'
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge = root / 'munge'
        self._start('munged', '--foreground', '--force', '--key-file=%s' % key,
                    '--socket=%s' % (munge / 'socket'), '--pid-file=%s' % (munge / 'pid'),
                    '--log-file=%s' % (munge / 'log'), '--seed-file=%s' % (munge / 'seed'))
        eventually((munge / 'socket').exists, what='munged')
        self._start('slurmctld', '-D', '-f', str(config))
        for n in range(1, 5):
            self._start('slurmd', '-D', '-N', 'n%d' % n, '-f', str(config))
        try:
            eventually(lambda: self.run('sinfo', '--noheader', '--format=%D %t') == '4 idle\n', 90,
                       what='four nodes of Slurm')
        except BaseException:
            self.close()
            raise

    def _start(self, *words):
        log = open(str(self.root / ('%s.%d.log' % (words[0], len(self._processes)))), 'wb')
        with log:
            self._processes.append(subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=dict(os.environ, **self.environment)))

    def run(self, *words):
        """What a command prints."""
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=dict(os.environ, **self.environment), timeout=60)
        return done.stdout.decode()

    def dispy(self, *words):
        """A command of dispy's, and what it says."""
        return self.run(sys.executable, os.path.join(ROOT, 'dispy.py'), *words)

    def jobs(self):
        """The jobs that wait, run or are being ended."""
        return self.run('squeue', '--noheader', '--format=%i').split()

    def close(self):
        self.run('scancel', '--user=root')
        with contextlib.suppress(AssertionError):
            eventually(lambda: not self.jobs(), 20)
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def slurm(tmp_path):
    with another_address():
        try:
            system = Slurm(tmp_path)
        except AssertionError as exc:   # a matter of this machine: nothing of dispy has begun
            logs = [path.read_text(errors='replace')[-300:] for path in tmp_path.glob('*.log')]
            pytest.skip('Slurm does not start here: %s; %s' % (exc, logs))
        yield system
        system.close()


def quick(n):
    import time
    time.sleep(0.2)
    return n, dispy_node_name   # noqa: F821


def test_slurm_places_nodes(slurm, tmp_path):
    """Jobs run, a time limit ends one node and nothing is lost, all are stopped; then nodes come
    and go as jobs wait."""
    gate = Gate(tmp_path / 'gate')
    with SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:9') as scheduler:
        common = ('--scheduler-host', '127.0.0.1:%d' % scheduler.port, '--python', sys.executable)
        more = ('--', '-i', '127.0.0.1', '--grace', '1')
        with dispy.SharedJobCluster(hold, scheduler_port=scheduler.port,
                                    reentrant=True) as cluster:
            said = slurm.dispy('deploy', '--slurm', '3', '--time', '10m', *common, *more)
            assert said.count('is submitted') == 3, said
            said = slurm.dispy('deploy', '--slurm', '1', '--time', '40s', '--drain-before', '15',
                               *common, *more)
            assert said.count('is submitted') == 1, said
            placed = slurm.jobs()
            last = said.split()[2]
            assert len(placed) == 4 and last in placed
            jobs = [cluster.submit(gate.path) for _ in range(4)]
            eventually(lambda: all(job.status == job.Running for job in jobs), 60)
            # The host of one is taken away after 40 s: its job waits for another
            eventually(lambda: last not in slurm.jobs(), 60, what='the end of one node')
            moved, = [job for job in jobs if job.status != job.Running]
            assert moved.status == moved.Created
            assert 'its time limit' in (slurm.home / '.dispy' / 'engines' / (
                'slurm-%s.log' % last)).read_text()
            gate.open()
            assert all(job.wait(60) and job.status == job.Finished for job in jobs)
            names = {'slurm-' + number for number in placed if number != last}
            assert {job.result for job in jobs} == names     # where they have ended
        assert slurm.dispy('stop', '--slurm') == 'Slurm: 3 jobs cancelled\n'
        eventually(lambda: not slurm.jobs(), 60)
        assert slurm.dispy('stop', '--slurm') == 'Slurm: 0 jobs cancelled\n'

        adaptive = subprocess.Popen(
            [sys.executable, os.path.join(ROOT, 'dispy.py'), 'deploy', '--slurm', '--adaptive',
             '1:3', '--end-idle', '3', *common, *more], stdout=subprocess.PIPE,
            env=dict(os.environ, **slurm.environment))
        try:
            eventually(lambda: len(slurm.jobs()) == 1, 60, what='the one that is always there')
            with dispy.SharedJobCluster(quick, scheduler_port=scheduler.port) as cluster:
                jobs = [cluster.submit(n) for n in range(150)]
                eventually(lambda: len(slurm.jobs()) == 3, 60, what='three for what waits')
                results = [job() for job in jobs]
                assert [n for n, _ in results] == list(range(150))
                assert len({name for _, name in results}) == 3
            eventually(lambda: len(slurm.jobs()) == 1, 60, what='the end of those that are idle')
        finally:
            adaptive.send_signal(signal.SIGINT)
            out = adaptive.communicate(timeout=30)[0].decode()
        assert out.count('is submitted') == 3, out
        assert slurm.dispy('stop', '--slurm') == 'Slurm: 1 job cancelled\n'


def test_slurm_ends_a_node_that_knows_no_limit(slurm, tmp_path, request):
    """A node that somebody else's script starts is not told when Slurm will end it. Slurm sends
    SIGTERM at the time limit, and SIGKILL after KillWait: its job runs elsewhere."""
    if not request.config.getoption('--long'):
        pytest.skip('Slurm counts time limits in minutes: --long')
    gate = Gate(tmp_path / 'gate')
    script = tmp_path / 'script'
    with SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:9') as scheduler:
        script.write_text('#!/bin/sh\nexec %s %s --daemon -c 1 -i 127.0.0.1 -p 0 --grace 600 '
                          '--name slurm-$SLURM_JOB_ID --dest-path-prefix %s/$SLURM_JOB_ID '
                          '--scheduler-host 127.0.0.1:%d\n' % (
                              sys.executable, os.path.join(ROOT, 'dispynode.py'), tmp_path,
                              scheduler.port))
        submit = ('sbatch', '--parsable', '--output=/dev/null')
        limited = slurm.run(*submit, '--time=1', str(script)).strip()
        with dispy.SharedJobCluster(hold, scheduler_port=scheduler.port,
                                    reentrant=True) as cluster:
            job = cluster.submit(gate.path)
            eventually(lambda: job.status == job.Running, 60)
            other = slurm.run(*submit, '--time=10', str(script)).strip()
            eventually(lambda: limited not in slurm.jobs(), 150, what='the end of the node')
            gate.open()
            assert job.wait(60) and job.status == job.Finished
            assert job.result == 'slurm-' + other
        state = slurm.run('scontrol', '--oneliner', 'show', 'job', limited)
        assert 'JobState=TIMEOUT' in state, state
