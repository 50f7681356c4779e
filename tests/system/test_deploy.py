"""`dispy deploy` and `dispy stop`, and a forwarded port, by ssh to a real sshd on loopback; homes
are the tests' own."""

import concurrent.futures
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys

import psutil
import pytest

import dispy
from conftest import ROOT, eventually, lives
from nodes import SSHD, NodeProcess, needs_sshd

pytestmark = needs_sshd
SECRET = os.environ['DISPY_SECRET']
OLD = sys.executable + (
    """ -c 'import sys; sys.version_info, sys.version = (3, 7, 0), "3.7.0 (of old)"; """
    """exec(sys.stdin.read())'""")
NODE = ('-i', '127.0.0.1', '-p', '0', '-c', '1')


class Host:
    """An sshd at a port of its own, whose sessions have HOME, and all else that a node writes to,
    in a directory."""

    def __init__(self, directory):
        self.home, self.temporary = str(directory / 'home'), str(directory / 'temporary')
        key, log = str(directory / 'key'), directory / 'log'
        for path in (self.home, self.temporary):
            os.makedirs(path)
        if not os.getuid():
            os.makedirs('/run/sshd', 0o755, exist_ok=True)   # sshd of root insists
        subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', key], check=True)
        with socket.socket() as sock:
            sock.bind(('127.0.0.1', 0))
            self.port = sock.getsockname()[1]
        lines = ['ListenAddress 127.0.0.1', 'Port %d' % self.port, 'HostKey ' + key,
                 'AuthorizedKeysFile %s.pub' % key, 'StrictModes no', 'UsePAM no',
                 'PasswordAuthentication no', 'PidFile none', 'MaxStartups 100',
                 'SetEnv HOME=%s XDG_CONFIG_HOME=%s/.config TMPDIR=%s'
                 % (self.home, self.home, self.temporary)]
        (directory / 'config').write_text('\n'.join(lines) + '\n')
        with open(str(log), 'wb') as output:
            self._sshd = subprocess.Popen([SSHD, '-D', '-e', '-f', str(directory / 'config')],
                                          stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self.name = 'ssh://127.0.0.1:%d' % self.port
        self.ssh = ['ssh', '-F', 'none', '-i', key, '-o', 'IdentitiesOnly=yes', '-o',
                    'UserKnownHostsFile=/dev/null',
                    '-o', 'StrictHostKeyChecking=no', '-o', 'LogLevel=ERROR']
        self.directory = os.path.join(self.home, '.dispy', platform.node() or 'node')
        self.secret = os.path.join(self.home, '.config', 'dispy', 'secret')
        try:
            eventually(lambda: self._sshd.poll() is not None
                       or 'Server listening' in log.read_text(), what='start of sshd')
            session = subprocess.run([*self.ssh, self.name, 'echo $HOME'], stdin=subprocess.DEVNULL,
                                     stdout=subprocess.PIPE,
                                     stderr=subprocess.STDOUT, timeout=30).stdout.decode().strip()
            if session != self.home:
                pytest.skip('this user cannot have an sshd here: %s; %s'
                            % (session, log.read_text()[-300:]))
        except BaseException:
            self.close()
            raise

    def dispy(self, task, *args, python=sys.executable, host=None):
        """(exit status, rows as {host: text}, stderr) of `dispy deploy` or `stop` of this host."""
        done = subprocess.run(
            [sys.executable, '-m', 'dispy', task, '--ssh', shlex.join(self.ssh), '--python', python,
             *([host or self.name] if host != '' else []), *args], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
        rows = [line.split(None, 1) for line in done.stdout.decode().splitlines()]
        return done.returncode, dict(rows), done.stderr.decode()

    def one(self, task, *args, **kwargs):
        """Exit status and text of this host alone."""
        code, rows, err = self.dispy(task, *args, **kwargs)
        assert list(rows) == [self.name] and not err, (rows, err)
        return code, rows[self.name]

    def deploy(self, *args, options=NODE):
        """A deployment that must succeed: (what was done, port, PID)."""
        code, text = self.one('deploy', *args, '--', *options)
        found = re.match(r'(.*): port (\d+), PID (\d+)$', text)
        assert code == 0 and found, text
        return found.group(1), int(found.group(2)), int(found.group(3))

    def nothing_is_left(self):
        """Whether the home and the directory for temporary files are as they were."""
        return (not os.listdir(self.temporary)
                and not [name for _, _, names in os.walk(self.home) for name in names]
                and not os.path.exists(os.path.dirname(self.directory)))

    def close(self):
        """End a daemon that a failed test has left, and sshd."""
        try:
            with open(os.path.join(self.directory, 'note')) as file:
                os.kill(json.load(file)['pid'], signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            pass   # as it should be
        self._sshd.terminate()
        self._sshd.wait()


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path / 'host')
    yield host
    host.close()


@pytest.fixture
def other(tmp_path):
    host = Host(tmp_path / 'other')
    yield host
    host.close()


def where(flag=None):
    """The node's PID; waits while there is a flag."""
    while flag and os.path.exists(flag):
        time.sleep(0.02)   # noqa: F821
    return os.getppid()


def ended(pid):
    return not lives(pid)


@pytest.mark.long
def test_deploy_and_stop(host):
    """It outlives the ssh session, is left alone the second time, and goes without a trace."""
    done, port, pid = host.deploy()
    assert done == 'started' and os.getsid(pid) == pid
    assert SECRET not in ' '.join(psutil.Process(pid).cmdline())
    assert os.stat(host.secret).st_mode & 0o777 == 0o600
    with dispy.JobCluster(where, nodes=[('127.0.0.1', port)]) as cluster:
        assert cluster.submit()()
    assert host.deploy() == ('runs already', port, pid)
    assert host.one('stop') == (0, 'stopped')
    assert ended(pid) and host.nothing_is_left()
    assert host.one('stop') == (0, 'nothing was deployed here') and host.nothing_is_left()


@pytest.mark.long
def test_stop_when_idle(host, tmp_path):
    """What runs goes on; with --grace as long as that."""
    flag = tmp_path / 'flag'
    flag.write_text('')
    for ends, words in ((True, ()), (False, ('--grace', '0.2'))):
        _, port, pid = host.deploy()
        with dispy.JobCluster(where, nodes=[('127.0.0.1', port)], loglevel=50) as cluster:
            job = cluster.submit(str(flag))
            eventually(lambda: job.status == job.Running)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                stopped = pool.submit(host.one, 'stop', '--when-idle', *words)
                if ends:
                    eventually(lambda: [each.cpus for each in cluster.status().nodes] == [0])
                    assert not stopped.done() and job.status == job.Running
                    flag.unlink()
                    assert job.wait(20) and job.status == job.Finished
                assert stopped.result() == (0, 'stopped')
            assert ended(pid) and host.nothing_is_left()
            flag.write_text('')
            assert ends or job.wait(20) and job.status != job.Finished
    code, rows, err = host.dispy('stop', '--grace', '3')
    assert code == 2 and '--when-idle' in err and not rows


def test_several_hosts_from_a_file(host, other, tmp_path):
    hosts = tmp_path / 'hosts'
    localhost = other.name.replace('127.0.0.1', 'localhost')
    hosts.write_text('# all\n%s   # the first\n\n%s\n%s\n' % (host.name, localhost, host.name))
    host.ssh = host.ssh + ['-i', other.ssh[other.ssh.index('-i') + 1]]
    code, rows, err = host.dispy('deploy', '--hosts', str(hosts), '--', *NODE, host='')
    assert (code, err) == (0, '') and list(rows) == [host.name, localhost]
    assert all(text.startswith('started: port ') for text in rows.values())
    ports = [int(re.search(r'port (\d+)', text).group(1)) for text in rows.values()]
    with dispy.JobCluster(where, nodes=[('127.0.0.1', port) for port in ports]) as cluster:
        cluster.wait_nodes(2, timeout=20)
    assert (host.dispy('stop', '--hosts', str(hosts), host='')
            == (0, {host.name: 'stopped', localhost: 'stopped'}, ''))
    assert host.nothing_is_left() and other.nothing_is_left()


def test_hosts_that_cannot_be_reached(host):
    """Each is told with ssh's own last line and counted; the others are served."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))   # nobody listens
        closed = 'ssh://127.0.0.1:%d' % sock.getsockname()[1]
        code, rows, err = host.dispy('deploy', closed, 'no-such-host.invalid', '--', *NODE)
    assert (code, err) == (2, '') and rows[host.name].startswith('started')
    assert rows[closed].startswith('FAILED: ') and rows[closed].endswith('Connection refused')
    assert rows['no-such-host.invalid'].startswith('FAILED: ssh: Could not resolve hostname')
    assert host.one('stop') == (0, 'stopped')


def test_a_host_that_says_nothing(host):
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        sock.listen(5)
        host.ssh = [*host.ssh, '-o', 'ConnectTimeout=1']
        host.name = 'ssh://127.0.0.1:%d' % sock.getsockname()[1]
        code, text = host.one('deploy', '--', *NODE)
    assert code == 1 and text.startswith('FAILED: Conn') and 'timed out' in text


def test_a_host_that_does_not_know_the_key(host, other):
    host.ssh = other.ssh
    code, text = host.one('deploy', '--', *NODE)
    assert code == 1 and 'Permission denied (publickey' in text


@pytest.mark.parametrize('python, text', [
    ('/no/such/python', '/no/such/python'), ('true', 'no word of what was done'),
    ("sh -c 'echo Here I am; echo Not today >&2'", 'Not today'), (OLD, 'this is 3.7.0 (--python)')])
def test_a_python_that_is_none(host, python, text):
    code, found = host.one('deploy', '--', *NODE, python=python)
    assert code == 1 and found.startswith('FAILED: ') and text in found and host.nothing_is_left()


def test_the_port_is_in_use(host, tmp_path):
    """What the node itself says is shown, and nothing stays there, the secret neither."""
    with NodeProcess(tmp_path / 'node') as node:
        code, text = host.one('deploy', '--', '-i', '127.0.0.1', '-p', str(node.port))
    assert (code == 1 and text.startswith('FAILED: dispynode: port %d is in use' % node.port)
            and host.nothing_is_left())


@pytest.mark.long
def test_other_options(host):
    """A node is replaced when it is idle or when that is told; until then it stays as it is."""
    _, port, pid = host.deploy()
    done, port, newer = host.deploy(options=(*NODE, '--name', 'newer'))
    assert done == 'replaced' and newer != pid and ended(pid)
    flag = os.path.join(host.home, 'flag')
    with open(flag, 'w'):
        pass
    with dispy.JobCluster(where, nodes=[('127.0.0.1', port)]) as cluster:
        job = cluster.submit(flag)
        eventually(lambda: job.status == dispy.DispyJob.Running, what='job on the node')
        code, text = host.one('deploy', '--', *NODE)
        assert code == 1 and 'PID %d' % newer in text and '--restart' in text
        assert host.deploy(options=(*NODE, '--name', 'newer')) == ('runs already', port, newer)
        os.unlink(flag)
        assert job() is not None
        with open(flag, 'w'):
            pass
        job = cluster.submit(flag)
        eventually(lambda: job.status == dispy.DispyJob.Running, what='job on the node')
        done, _, newest = host.deploy('--restart')
        assert done == 'replaced' and ended(newer) and not ended(newest)
        os.unlink(flag)
        assert job() is None
        cluster.close(terminate=True)
    assert host.one('stop') == (0, 'stopped') and host.nothing_is_left()


def test_a_replacement_that_does_not_start(host, tmp_path):
    """The one before has ended, and that is said; nothing is left half done."""
    _, _, pid = host.deploy()
    with NodeProcess(tmp_path / 'node') as node:
        code, text = host.one('deploy', '--', '-i', '127.0.0.1', '-p', str(node.port))
    assert (code == 1 and 'is in use' in text
            and text.endswith('(PID %d, which ran, was ended)' % pid))
    assert ended(pid) and host.nothing_is_left()


def test_one_host_by_two_names(host):
    """Two deployments at once do not get in each other's way: one starts the node, the other says
    what it found."""
    code, rows, err = host.dispy('deploy', host.name.replace('127.0.0.1', 'localhost'), '--', *NODE)
    texts = sorted(rows.values(), reverse=True)
    assert texts[0].startswith('started') and not err
    assert (texts[1].startswith('runs already') if code == 0
            else texts[1].endswith('is at work on this host'))
    assert host.one('stop') == (0, 'stopped') and host.nothing_is_left()


def test_a_daemon_that_was_killed(host):
    _, _, pid = host.deploy()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: ended(pid), what='end')
    done, _, newer = host.deploy()
    assert done == 'started' and newer != pid
    os.kill(newer, signal.SIGKILL)
    eventually(lambda: ended(newer), what='end')
    assert host.one('stop') == (0, 'ran no more; its files are removed')
    assert not os.path.exists(host.directory) and not os.path.exists(host.secret)


def test_a_pid_of_another_process(host):
    """The number that was noted may have been given anew: nobody else is ended."""
    _, _, pid = host.deploy()
    path = os.path.join(host.directory, 'note')
    with open(path) as file:
        note = json.load(file)
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: ended(pid), what='end')
    with subprocess.Popen(['sleep', '1000']) as stranger:
        with open(path, 'w') as file:
            json.dump(dict(note, pid=stranger.pid), file)
        assert host.one('stop') == (0, 'ran no more; its files are removed')
        assert stranger.poll() is None
        stranger.kill()


@pytest.mark.skipif(not shutil.which('ps'), reason='needs ps')
def test_a_pid_where_there_is_no_proc(monkeypatch):
    """macOS: the same by ps."""
    isdir = os.path.isdir
    monkeypatch.setattr(os.path, 'isdir', lambda path: path != '/proc/self' and isdir(path))
    deployed = dispy.Deployment()
    with subprocess.Popen([sys.executable, '-c', 'input()', deployed._script],
                          stdin=subprocess.PIPE) as process:
        for pid, expected in ((process.pid, process.pid), (os.getpid(), 0), (0, 0)):
            deployed._note = {'pid': pid}
            assert deployed._running() == expected
        process.communicate(b'\n')
    deployed._note = {'pid': process.pid}
    assert deployed._running() == 0


@pytest.mark.long
def test_a_secret_that_is_there(host):
    """Another one is not overwritten, unless that is told; one that deploy has not put there
    stays."""
    os.makedirs(os.path.dirname(host.secret))
    for text in ('another secret, of somebody', SECRET):
        with open(host.secret, 'w') as file:
            file.write(text)
        os.chmod(host.secret, 0o600)
        if text != SECRET:
            code, found = host.one('deploy', '--', *NODE)
            assert code == 1 and '%s has another secret; --replace-secret' % host.secret in found
            assert not os.path.exists(os.path.dirname(host.directory))
            host.deploy('--replace-secret')
            assert open(host.secret).read() == SECRET + '\n'
            assert host.one('stop') == (0, 'stopped') and not os.path.exists(host.secret)
            os.makedirs(os.path.dirname(host.secret))
        else:
            host.deploy()
            assert host.one('stop') == (0, 'stopped') and open(host.secret).read() == SECRET
    os.chmod(host.secret, 0o644)
    code, found = host.one('deploy', '--', *NODE)
    assert code == 1 and 'chmod 600' in found


def test_the_secret_of_before_comes_back(host, tmp_path):
    """A deployment that replaces a secret and then fails leaves the one that was there."""
    os.makedirs(os.path.dirname(host.secret))
    with open(host.secret, 'w') as file:
        file.write('another secret, of somebody\n')
    os.chmod(host.secret, 0o600)
    with NodeProcess(tmp_path / 'node') as node:
        code, text = host.one('deploy', '--replace-secret', '--', '-i', '127.0.0.1', '-p',
                              str(node.port))
    assert (code == 1 and 'is in use' in text
            and open(host.secret).read() == 'another secret, of somebody\n')


@pytest.mark.parametrize('args, text', [
    ((), 'no HOST'), (('--hosts', '/no/such/file'), '/no/such/file'),
    (('--ssh', '/no/such/ssh', 'x'), '/no/such/ssh'),
    (('x', '--', '--colour'), '--colour'), (('x', '--', '-s', 'secret'), 'list of processes'),
    (('--secret-file', '/no/such/secret', 'x'), '/no/such/secret')])
def test_wrong_usage(args, text):
    done = subprocess.run([sys.executable, '-m', 'dispy', 'deploy', *args],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode == 2 and text in done.stderr.decode()
            and b'Traceback' not in done.stderr and not done.stdout)


def test_a_program_called_deploy(tmp_path):
    program = tmp_path / 'deploy'
    program.write_text('#!/bin/sh\necho "it ran with $1"\n')
    program.chmod(0o755)
    done = subprocess.run([sys.executable, '-m', 'dispy', '-n', 'local', '-a', 'this', './deploy'],
                          cwd=str(tmp_path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          timeout=60, env=dict(os.environ, PYTHONPATH=ROOT))
    assert (done.returncode, done.stdout) == (0, b'it ran with this\n')


def test_a_forwarded_port(host, tmp_path):
    """A node that only sshd's host can reach, through `ssh -N -L`."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = sock.getsockname()[1]
    with NodeProcess(tmp_path / 'node') as node:
        tunnel = subprocess.Popen(
            [*host.ssh, '-N', '-L', '127.0.0.1:%d:127.0.0.1:%d' % (port, node.port),
             '-o', 'ExitOnForwardFailure=yes', host.name], stdin=subprocess.DEVNULL)
        try:
            with dispy.JobCluster(where, nodes=[('127.0.0.1', port)]) as cluster:
                cluster.wait_nodes(1, timeout=20)
                jobs = [cluster.submit() for _ in range(50)]
                assert all(job() for job in jobs) and len({job.ip_addr for job in jobs}) == 1
        finally:
            tunnel.terminate()
            tunnel.wait()
