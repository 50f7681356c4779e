"""The daemon among other programs: options, files of options, hours, the prompt, containers, jobs
of another user."""

import argparse
import json
import logging
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import psutil
import pytest

import dispy
import dispy_httpd
import dispyscheduler
from conftest import ROOT, eventually
from dispy import DispyJob
from dispynode import own_hosts
from dispynode import (
    Finish, Hours, Pause, Phase, Release, Resume, ServiceManager, SetCpus, StartError, Status, Stop,
    make_parser, parse_arguments, size_option, available_cpus, parse_command, find_hours)
from nodes import NodeProcess, run_node, script_of
from scenes import Gate, hold, square

root_only = pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0,
                               reason='only root may become another user')
DAEMON = [sys.executable, script_of('dispynode', None), '-i', '127.0.0.1', '-p', '0', '-c', '1']


def parsed(*argv):
    return parse_arguments(make_parser(), argv)


# -- hours of service ------------------------------------------------------------------------------

S, D, C = Phase.SERVING, Phase.DRAINING, Phase.CLOSED


@pytest.mark.parametrize('start, stop, end, expected', [
    ('08:00', '17:00', '18:00',
     {'07:59': C, '08:00': S, '16:59': S, '17:00': D, '17:59': D, '18:00': C, '00:00': C}),
    ('22:00', '05:30', '06:00', {'21:59': C, '22:00': S, '23:59': S, '00:00': S, '05:29': S,
                                 '05:30': D, '06:00': C, '12:00': C}),
    ('20:00', '23:00', '01:00', {'20:00': S, '23:00': D, '00:30': D, '01:00': C, '19:59': C}),
    ('08:00', None, '18:00', {'17:59': S, '18:00': C, '07:59': C}),
    ('08:00', '17:00', None, {'16:59': S, '17:00': D, '23:59': D, '07:59': D, '08:00': S}),
    ('08:00', '17:00', '17:00', {'16:59': S, '17:00': C}),
    ('00:00', '12:00', None, {'00:00': S, '11:59': S, '12:00': D})])
def test_hours(start, stop, end, expected):
    hours = find_hours(start, stop, end)
    assert {at: hours.phase(int(at[:2]) * 60 + int(at[3:])) for at in expected} == expected


def test_hours_that_make_no_sense():
    assert (find_hours(None, None, None) is None
            and find_hours('01:02', '03:04', None) == Hours(62, 184, None))
    for hours, text in ((('08:00', None, None), '--service-stop'),
                        ((None, '08:00', None), '--service-start'),
                        (('08:00', '08:00', None), '08:00'),
                        (('08:00', '18:00', '17:00'), '--service-end 17:00')):
        with pytest.raises(ValueError, match=text):
            find_hours(*hours)


def test_outside_its_hours_a_node_tells_when_they_begin(tmp_path):
    in_hours = [time.strftime('%H:%M', time.localtime(time.time() + 3600 * hours))
                for hours in (2, 3)]
    with NodeProcess(tmp_path, '--service-start', in_hours[0], '--service_end',
                     in_hours[1]) as node:
        with dispy.JobCluster(square, nodes=[node.address], loglevel=logging.CRITICAL) as cluster:
            with pytest.raises(dispy.NoNodes, match='hours of service begin at %s' % in_hours[0]):
                cluster.wait_nodes(1, 1)
            cluster.close(terminate=True)


# -- options ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('text, size', [('1', 1), ('300k', 300 << 10), ('20M', 20 << 20),
                                        ('1g', 1 << 30), ('2t', 2 << 40)])
def test_sizes(text, size):
    assert size_option(text) == size


@pytest.mark.parametrize('text', ['', '0', '-1', 'k', '1x', '1.5g', '1kk', 'kmgt'])
def test_no_sizes(text):
    with pytest.raises(argparse.ArgumentTypeError):
        size_option(text)


@pytest.mark.parametrize('options, text', [
    (['--service-start', '8'], '--service-start'),
    (['--service_start', '24:00', '--service-stop', '01:00'], '24:00'),
    (['--service-stop', '08:00'], '--service-start'), (['--serve', 'few'], '--serve'),
    (['--max-file-size', '1x'], '1x'),
    (['--zombie-interval', '-1'], '--zombie-interval'), (['--msg-timeout', 'nan'], 'nan'),
    (['--ping-interval', 'x'], '--ping-interval')])
def test_wrong_usage(options, text):
    code, err = run_node('-p', '0', *options)
    assert code == 2 and text in err and 'Traceback' not in err


def test_spellings_of_dispy_4():
    args = parsed('--ip_addr', '::1', '--node_port=9', '--dest_path_prefix', '/a_b', '--keyfile',
                  'k_k', '--certfile', 'c', '--zombie_interval=5',
                  '--ping_interval', '2', '--service_start', '08:00', '--service_stop', '9:05',
                  '--service_end', '10:00', '--max_file_size=1m', '--msg_timeout', '3',
                  '--client_shutdown', '--save_config=s_s', '--daemon', '--serve', '2')
    assert ((args.host, args.port, args.dest_path_prefix, args.keyfile, args.zombie_interval)
            == (['::1'], 9, '/a_b', 'k_k', 5.0))
    assert ((args.ping_interval, args.service_stop, args.max_file_size, args.msg_timeout)
            == (2.0, '09:05', 1 << 20, 3.0))
    assert args.client_shutdown and args.daemon and args.save_config == 's_s' and args.serve == 2


def test_what_was_saved_is_loaded_and_the_command_line_wins(tmp_path):
    path = str(tmp_path / 'config')
    options = ['-c', '-1', '-i', '127.0.0.1', '-i', '::1', '-p', '0', '--name', 'n',
               '--max-file-size', '2k', '--serve', '3', '--daemon', '--service-start', '8:00',
               '--service-end', '9:00', '--msg-timeout', '2.5', '--secret-file', 'f']
    code, err = run_node(*options, '-s', 'top secret', '--save_config', path)
    assert (code, err) == (0, '')
    saved = json.loads((tmp_path / 'config').read_text())
    assert ('top secret' not in (tmp_path / 'config').read_text()
            and saved['service-start'] == '08:00')
    loaded = parsed('--config', path)
    for name, value in vars(parsed(*options)).items():
        if name not in ('config', 'host'):
            assert getattr(loaded, name) == value, name
    assert loaded.host == ['127.0.0.1', '127.0.0.1', '::1']   # run_node has one of its own
    loaded = parsed('--config', path, '-i', '10.0.0.1', '-c', '1', '--serve', '4')
    assert (loaded.host, loaded.cpus, loaded.serve, loaded.name) == (['10.0.0.1'], 1, 4, 'n')


@pytest.mark.parametrize('text, expected', [
    ('{"colour": 1}', 'colour'), ('{"secret": "x"}', 'secret'), ('{"config": "x"}', 'config'),
    ('{"cpus": "2"}', 'cpus.*int is wanted'),
    ('{"cpus": true}', 'cpus'), ('{"daemon": 1}', 'daemon.*bool'), ('{"host": [1]}', 'host'),
    ('{"name": 1}', 'name.*str'),
    ('{"msg-timeout": "1"}', 'msg-timeout.*int or float'), ('{"serve": 1.5}', 'serve'),
    ('{"service-start": "25:00"}', '25:00'),
    ('{"max-file-size": null}', 'max-file-size'), ('{"msg-timeout": 0}', '--msg-timeout.*0'),
    ('[1]', 'option'), ('{', 'cannot be read')])
def test_a_wrong_configuration_is_refused_by_file_and_key(tmp_path, text, expected):
    path = tmp_path / 'config'
    path.write_text(text)
    with pytest.raises(StartError, match=expected) as caught:
        parsed('--config', str(path))
    assert str(path) in str(caught.value)


def test_a_configuration_that_is_not_there():
    code, err = run_node('--config', '/no/such/file')
    assert code == 1 and '/no/such/file' in err and 'Traceback' not in err


def test_underscores_and_single_values_in_a_configuration(tmp_path):
    path = tmp_path / 'config'
    path.write_text('{"dest_path_prefix": "/d", "host": "::1", "max-file-size": '
                    '"1k", "ping-interval": 1}')
    args = parsed('--config=%s' % path)
    assert ((args.dest_path_prefix, args.host, args.max_file_size, args.ping_interval)
            == ('/d', ['::1'], 1024, 1.0))


# -- clients ---------------------------------------------------------------------------------------

def test_it_ends_after_so_many_clients(tmp_path):
    with NodeProcess(tmp_path, '--serve', '2') as node:
        for _ in range(2):
            assert node.process.poll() is None
            with dispy.JobCluster(square, nodes=[node.address],
                                  loglevel=logging.CRITICAL) as cluster:
                assert cluster.submit(3)() == 9
            eventually(lambda: 'free' in node.log())
        assert node.process.wait(20) == 0


@pytest.mark.parametrize('options, ends', [(['--client_shutdown'], True), ([], False)])
def test_a_client_may_end_the_node(tmp_path, options, ends):
    with NodeProcess(tmp_path, *options) as node:
        cluster = dispy.JobCluster(square, nodes=[node.address], loglevel=logging.CRITICAL)
        job = cluster.submit(3)
        assert cluster.shutdown() and job() == 9
        if ends:
            assert node.process.wait(20) == 0
        else:
            eventually(lambda: 'without --client-shutdown' in node.log() and 'free' in node.log())
            with dispy.JobCluster(square, nodes=[node.address]) as cluster:
                assert cluster.submit(4)() == 16


def send(size):
    with open('large-%d' % size, 'wb') as file:
        file.write(b'x' * size)
    return dispy_send_file('large-%d' % size)   # noqa: F821


def test_files_that_are_too_large(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').write_bytes(b'x' * 2000)
    with NodeProcess(tmp_path / 'node', '--max-file-size', '1k') as node:
        with dispy.JobCluster(square, nodes=[node.address], depends=[str(tmp_path / 'data')],
                              loglevel=logging.CRITICAL) as cluster:
            with pytest.raises(dispy.NoNodes, match='data has 2000 bytes '
                               'and the node takes 1024 at most .its --max-file-size'):
                cluster.wait_nodes(1, 1)
            cluster.close(terminate=True)
        with dispy.JobCluster(send, nodes=[node.address]) as cluster:
            jobs = [cluster.submit(1024), cluster.submit(1025),
                    cluster.submit(1, dispy_job_depends=[str(tmp_path / 'data')])]
            assert jobs[0]() == 0
            for job in jobs[1:]:
                assert job() is None and '--max-file-size' in job.exception


def test_a_stranger_has_as_long_as_msg_timeout_says(tmp_path):
    with NodeProcess(tmp_path, '--msg-timeout', '0.2') as node:
        import socket
        with socket.create_connection(node.address) as sock:
            sock.settimeout(8)   # less than the default would take
            assert sock.recv(100) == b''


# -- the prompt ------------------------------------------------------------------------------------

@pytest.mark.parametrize('line, event', [
    ('quit', Stop()), ('stop', Pause('operator', 'its operator has stopped it')),
    ('start', Resume('operator')), ('release', Release()),
    ('cpus 1', SetCpus(1)), (' quit ', Stop()), ('finish', Finish()),
    ('', Status()), ('status', Status()),
    ('help me', Status())])
def test_commands(line, event):
    assert parse_command(line) == event


@pytest.mark.parametrize('line',
                         ['cpus', 'cpus x', 'cpus 1 2', 'cpus 0', 'cpus -%d' % available_cpus()])
def test_wrong_commands(line):
    with pytest.raises(ValueError, match='cpus'):
        parse_command(line)


class Terminal:
    """A dispynode at a terminal of its own."""

    def __init__(self, directory, *options, cpus=2):
        pty = pytest.importorskip('pty', reason='no pseudo terminals here')
        self.ours, theirs = pty.openpty()
        self.log, self.text = str(directory / 'log'), b''
        with open(self.log, 'wb') as log:
            self.process = subprocess.Popen(
                [*DAEMON[:-1], str(cpus), '--dest-path-prefix', str(directory / 'node'), *options],
                stdin=theirs, stdout=theirs, stderr=log, start_new_session=True)
        os.close(theirs)
        os.set_blocking(self.ours, False)

    def type(self, line):
        os.write(self.ours, line)

    def shows(self, text):
        try:
            self.text += os.read(self.ours, 65536)
        except OSError:
            pass
        return text in self.text.decode()

    def said(self, text):
        with open(self.log) as file:
            return text in file.read()

    @property
    def address(self):
        eventually(lambda: self.said('at port '))
        with open(self.log) as file:
            return ('127.0.0.1', int(file.read().split('at port ')[1].split(',')[0]))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.ours)


def test_the_prompt(tmp_path):
    with Terminal(tmp_path) as terminal:
        eventually(lambda: terminal.shows('commands: quit, stop, start'))
        terminal.type(b'\n')
        eventually(lambda: terminal.shows('0 of 2 CPUs used, takes jobs')
                   and terminal.shows('held by no client'))
        with dispy.JobCluster(hold, nodes=[terminal.address], loglevel=logging.CRITICAL) as cluster:
            flag = Gate(tmp_path / 'flag')
            job = cluster.submit(flag.path)
            eventually(flag.started)
            terminal.type(b'what?\n')
            eventually(lambda: terminal.shows('1 of 2 CPUs used') and terminal.shows('held by ')
                       and terminal.shows('PID %d' % os.getpid())
                       and terminal.shows('1 jobs running, 0 waiting, 0 done'))
            terminal.type(b'cpus 1\n')
            eventually(lambda: [node.cpus for node in cluster.status().nodes] == [1])
            terminal.type(b'cpus 1000x\n')
            eventually(lambda: terminal.shows('must be a number'))
            terminal.type(b'release\n')
            assert (job.wait(20) and job.status == DispyJob.Abandoned
                    and 'released from this client' in job.exception)
            eventually(lambda: [node for node in cluster.status().all_nodes
                                if 'operator has released it' in node.reason])
            eventually(lambda: terminal.said('free'))
        terminal.type(b'quit\n')
        assert terminal.process.wait(20) == 0


@pytest.mark.skipif(not hasattr(signal, 'SIGUSR1'), reason='this system has no SIGUSR1')
def test_a_node_that_gets_sigusr1_ends_when_it_is_idle(tmp_path):
    with NodeProcess(tmp_path, cpus=1) as node:
        with dispy.JobCluster(hold, nodes=[node.address], loglevel=logging.CRITICAL) as cluster:
            flag = Gate(tmp_path / 'flag')
            jobs = [cluster.submit(flag.path) for _ in range(2)]
            eventually(flag.started)
            node.process.send_signal(signal.SIGUSR1)
            eventually(lambda: [each.cpus for each in cluster.status().nodes] == [0])
            eventually(lambda: jobs[0].status == DispyJob.Running)
            assert node.process.poll() is None
            flag.open()
            assert jobs[0].wait(20) and jobs[0].status == DispyJob.Finished
            assert node.process.wait(20) == 0
            with NodeProcess(tmp_path, cpus=1, port=node.port):   # as after an upgrade
                assert jobs[1].wait(30) and jobs[1].status == DispyJob.Finished


@pytest.mark.skipif(not hasattr(socket, 'AF_UNIX'), reason='no sockets of this kind here')
@pytest.mark.parametrize('argv', [
    ['-m', 'dispynode', '-i', '127.0.0.1', '-p', '0', '--daemon', '--dest-path-prefix', 'node'],
    ['-m', 'dispyscheduler', '-i', '127.0.0.1', '-p', '0', '--state-dir', 'state'],
    ['-m', 'dispy_httpd', '-p', '0', '-n', '127.0.0.1:9', '--token-file', 'token']])
def test_systemd_is_told_that_a_daemon_is_ready_and_has_its_turns(argv, tmp_path):
    path = tempfile.mkdtemp()   # names of sockets have few bytes
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(os.path.join(path, 's'))
        sock.settimeout(60)
        environment = dict(os.environ, NOTIFY_SOCKET=os.path.join(path, 's'),
                           WATCHDOG_USEC='300000', PYTHONPATH=ROOT)
        process = subprocess.Popen([sys.executable, *argv], cwd=str(tmp_path), env=environment,
                                   stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert sock.recv(1000).startswith(b'READY=1\nSTATUS=')
            assert [sock.recv(1000) for _ in range(3)] == 3 * [b'WATCHDOG=1']
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(path)


def test_the_watchdog_hears_nothing_of_a_loop_that_stands_still(tmp_path):
    path = tempfile.mkdtemp()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(os.path.join(path, 's'))
        environment = {'NOTIFY_SOCKET': os.path.join(path, 's'), 'WATCHDOG_USEC': '1000'}
        manager = ServiceManager(environment)
        assert environment == {}, 'jobs do not speak for us'
        calls = queue.Queue()
        manager.ready('well', calls.put)
        assert sock.recv(1000) == b'READY=1\nSTATUS=well'
        first = calls.get(timeout=20)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1000)
        sock.settimeout(20)
        first()
        assert sock.recv(1000) == b'WATCHDOG=1'
        manager.close()
        shutil.rmtree(path)
    other = ServiceManager({'NOTIFY_SOCKET': '', 'WATCHDOG_USEC': '1000', 'WATCHDOG_PID': '1'})
    assert other.interval is None, 'another process is meant'


@pytest.mark.parametrize('name', ['dispy', 'dispynode'])
def test_a_module_that_is_run_is_compiled_once(name, tmp_path):
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE='1', PYTHONPYCACHEPREFIX=str(tmp_path))
    done = subprocess.run([sys.executable, '-v', '-m', name, '--version'], cwd=ROOT,
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout.startswith(name.encode() + b' ')
    path = os.path.join(ROOT, name + '.py')
    # The interpreter says so of each file that it has loaded from its source
    assert done.stderr.decode(errors='replace').count('code object from %s\n' % path) == 1


def test_stop_and_start_at_the_prompt(tmp_path):
    with Terminal(tmp_path) as terminal:
        address = terminal.address
        with dispy.JobCluster(square, nodes=[address], loglevel=logging.CRITICAL) as cluster:
            assert cluster.submit(2)() == 4
            terminal.type(b'stop\n')
            eventually(lambda: [node.cpus for node in cluster.status().nodes] == [0])
            jobs = [cluster.submit(n) for n in range(5)]
            with dispy.JobCluster(square, nodes=[address], loglevel=logging.CRITICAL) as second:
                eventually(lambda: [node for node in second.status().all_nodes if node.reason])
                jobs.append(second.submit(5))
                assert not any(job.wait(0.05) for job in jobs)
                terminal.type(b'start\n')
                assert [job() for job in jobs] == [0, 1, 4, 9, 16, 25]
        terminal.type(b'\x04')   # the end of the prompt, not of the node
        with dispy.JobCluster(square, nodes=[address]) as cluster:
            assert cluster.submit(6)() == 36
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.process.wait(20) == 0


def test_a_daemon_leaves_the_terminal_alone_and_outlives_it(tmp_path):
    with Terminal(tmp_path, '--daemon') as terminal:
        address = terminal.address
        terminal.type(b'quit\n')
        terminal.process.send_signal(signal.SIGHUP)
        with dispy.JobCluster(square, nodes=[address]) as cluster:
            assert cluster.submit(2)() == 4
        assert not terminal.shows('commands')
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.process.wait(20) == 0


# -- no terminal, containers -----------------------------------------------------------------------

@pytest.mark.skipif(os.name == 'nt', reason='needs a POSIX shell')
@pytest.mark.parametrize('closed', ['<&-', '<&- >&- 2>&-', '>&-', '</dev/null'])
def test_closed_standard_files(tmp_path, closed):
    """And none of them is mistaken for a socket: jobs print, and programs run."""
    log = tmp_path / 'log'
    process = subprocess.Popen(['sh', '-c', 'exec "$@" ' + closed, 'sh', *DAEMON,
                                '--dest-path-prefix', str(tmp_path / 'node'),
                                '--log-file', str(log)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        eventually(lambda: log.exists() and 'at port' in log.read_text())
        port = int(log.read_text().split('at port ')[1].split(',')[0])

        def loud(n):
            print('out', flush=True)
            print('err', file=sys.stderr)
            return os.system('echo child') + sys.stdin.read().count('x') + n
        with dispy.JobCluster(loud, nodes=[('127.0.0.1', port)]) as cluster:
            job = cluster.submit(1)
            assert (job(), job.stdout, job.stderr) == (1, 'out\nchild\n', 'err\n')
    finally:
        process.terminate()
        _, err = process.communicate(timeout=20)
    assert process.returncode == 0 and not err


def in_container(command):
    """`command` of a shell as PID 1 of a namespace of its own; the process on this side that is its
    PID 1."""
    outside = subprocess.Popen(['unshare', '--kill-child', '--pid', '--fork', '--mount-proc', 'sh',
                                '-c', command])
    return outside, eventually(lambda: psutil.Process(outside.pid).children()
                               or outside.poll() is not None)


@root_only
@pytest.mark.skipif(not shutil.which('unshare')
                    or subprocess.call(['unshare', '--kill-child', '--pid', '--fork',
                                        '--mount-proc', 'true'], stderr=subprocess.DEVNULL),
                    reason='no PID namespaces (unshare) here')
def test_as_pid_1_it_reaps_orphans_and_sigterm_ends_it(tmp_path):
    log = tmp_path / 'log'
    outside, (inside,) = in_container('sh -c "sleep 0.01 & sleep 1 & '
                                      'sleep 1 &"; exec %s --dest-path-prefix %s --log-file %s'
                                      % (' '.join(DAEMON), tmp_path / 'node', log))
    try:
        eventually(lambda: log.exists() and 'PID 1\n' in log.read_text())
        port = int(log.read_text().split('at port ')[1].split(',')[0])
        with dispy.JobCluster(square, nodes=[('127.0.0.1', port)]) as cluster:
            assert [cluster.submit(n)() for n in range(3)] == [0, 1, 4]
            runner, = [child for child in inside.children()
                       if 'runner_start' in ' '.join(child.cmdline())]
            orphans = [child for child in inside.children() if 'sleep' in child.name()]
            eventually(lambda: not [child for child in orphans if child.is_running()])
            runner.kill()   # is not mistaken for one
            eventually(lambda: cluster.submit(5)() == 25)   # the first may have come too early
        eventually(lambda: not [child for child in inside.children()
                                if child.status() == psutil.STATUS_ZOMBIE])
        inside.terminate()
        assert outside.wait(20) == 0
        assert log.read_text().rstrip().endswith('ended')
    finally:
        outside.kill()
        outside.wait()


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='needs /proc')
def test_no_descriptor_is_lost_from_client_to_client(tmp_path):
    with NodeProcess(tmp_path) as node:
        counts = []
        for _ in range(4):
            with dispy.JobCluster(square, nodes=[node.address]) as cluster:
                assert cluster.submit(3)() == 9
            # The tracker of multiprocessing stays
            eventually(lambda: not psutil.Process(node.process.pid).children(recursive=True)[1:])
            counts.append(len(os.listdir('/proc/%d/fd' % node.process.pid)))
        # What belonged to the last one may be closed a moment later.
        eventually(lambda: len(os.listdir('/proc/%d/fd' % node.process.pid)) <= counts[1])


# -- jobs of another user --------------------------------------------------------------------------

def who(secret):
    """Who a job is, what it may do, and a file of it."""
    try:
        with open(secret):
            opened = True
    except PermissionError:
        opened = False
    with open('mine', 'w') as file:
        file.write('from uid %d' % os.getuid())
    try:
        os.setuid(0)
        back = True
    except PermissionError:
        back = False
    with open('given') as file:
        given = file.read()
    return (os.getresuid(), os.getresgid(), 0 in os.getgroups(), opened, back,
            'DISPY_SECRET' in os.environ, os.environ['USER'], given,
            dispy_send_file('mine'),   # noqa: F821
            os.access('..', os.W_OK), os.access('../..', os.W_OK))


@pytest.fixture
def open_directory():
    """One that all users can reach, as those of pytest cannot be."""
    path = tempfile.mkdtemp(prefix='dispy-user-')
    os.chmod(path, 0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope='module')
def python_for_all():
    """A Python of this minor version that the user nobody can run with our files."""
    nobody = pytest.importorskip('pwd').getpwnam('nobody').pw_uid
    probe = ('import sys, dataclasses; open(%r); print(sys.version_info[:2])'
             % os.path.join(ROOT, 'dispynode.py'))
    for python in filter(None, [sys.executable, *map(
            shutil.which, ('python%d.%d' % sys.version_info[:2], 'python3')), '/usr/bin/python3']):
        try:
            found = subprocess.run([python, '-c', probe], stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, cwd='/',
                                   preexec_fn=lambda: os.setuid(nobody))
        except OSError:
            continue
        if found.stdout.decode().strip() == str(tuple(sys.version_info[:2])):
            return python
    pytest.skip('no Python %d.%d that the user nobody can run' % sys.version_info[:2])


@root_only
def test_jobs_of_another_user(tmp_path, open_directory, python_for_all, monkeypatch):
    pwd = pytest.importorskip('pwd')
    nobody = pwd.getpwnam('nobody')
    monkeypatch.chdir(tmp_path)
    secret, given = os.path.join(open_directory, 'secret'), tmp_path / 'given'
    with open(secret, 'w') as file:
        file.write(os.environ['DISPY_SECRET'])
    os.chmod(secret, 0o600)
    given.write_text('a gift')
    with NodeProcess(open_directory, '--user', 'nobody', '--secret-file', secret,
                     python=python_for_all) as node:
        assert 'jobs run as root' not in node.log()
        with dispy.JobCluster(who, nodes=[node.address], depends=[str(given)]) as cluster:
            job = cluster.submit(secret)
            found = job()
            assert job.exception is None, job.exception
            assert found == ((nobody.pw_uid,) * 3, (nobody.pw_gid,) * 3, False, False, False, False,
                             'nobody', 'a gift', 0, True, False)
        assert (tmp_path / 'mine').read_text() == 'from uid %d' % nobody.pw_uid
        with dispy.JobCluster(square, nodes=[node.address], dest_path='a/b') as cluster:
            assert cluster.submit(3)() == 9
        # It is that user's while it removes files
        eventually(lambda: psutil.Process(node.process.pid).uids().effective == 0)
        assert node.stop() == 0
        assert (sorted(name for _, _, names in os.walk(node.prefix) for name in names)
                == ['dispy-node', 'lock', 'memory'])


@root_only
def test_what_a_job_has_planted_leads_nowhere(tmp_path, open_directory, python_for_all):
    """A link in the place of a directory of the next computation is followed with the user's rights
    alone."""
    target = os.path.join(open_directory, 'private')
    os.mkdir(target, 0o700)

    def plant(target):
        os.chdir('..')
        os.symlink(target, 'a')
        return os.getcwd()
    given = tmp_path / 'given'
    given.write_text('x')
    with NodeProcess(open_directory, '--user', 'nobody', python=python_for_all) as node:
        with dispy.JobCluster(plant, nodes=[node.address]) as cluster:
            assert cluster.submit(target)().endswith('user-nobody')
        with dispy.JobCluster(square, nodes=[node.address], dest_path='a/b', depends=[str(given)],
                              loglevel=logging.CRITICAL) as cluster:
            with pytest.raises(dispy.NoNodes, match='cannot be stored'):
                cluster.wait_nodes(1, 1)
            cluster.close(terminate=True)
    assert os.listdir(target) == []


@root_only
def test_started_as_root_without_user_it_warns_once(tmp_path):
    with NodeProcess(tmp_path) as node:
        assert node.log().count('--user NAME') == 1


@root_only
def test_a_user_that_is_not_there():
    code, err = run_node('-p', '0', '--user', 'no-such-user')
    assert code == 1 and '--user no-such-user' in err and len(err.splitlines()) == 1


@root_only
def test_a_directory_that_the_user_cannot_reach(open_directory, python_for_all):
    closed = os.path.join(open_directory, 'closed')
    os.mkdir(closed, 0o700)
    code, err = run_node('-p', '0', '--user', 'nobody', '--dest-path-prefix',
                         os.path.join(closed, 'node'), python=python_for_all)
    assert code == 1 and 'nobody' in err and '--dest-path-prefix' in err and 'Traceback' not in err


def test_only_root_may_name_a_user(monkeypatch):
    from dispynode import find_user
    monkeypatch.setattr(os, 'geteuid', lambda: 1000, raising=False)
    with pytest.raises(StartError, match='--user nobody needs a dispynode that is started as root'):
        find_user('nobody')


# -- examples/deploy -------------------------------------------------------------------------------

DEPLOY = os.path.join(ROOT, 'examples', 'deploy')


@pytest.mark.skipif(not shutil.which('systemd-analyze'), reason='no systemd-analyze here')
@pytest.mark.skipif(not os.path.exists('/usr/bin/python3'),
                    reason='no /usr/bin/python3 here, which the unit file names')
def test_the_unit_files():
    units = ['dispynode.service', 'dispyscheduler.service', 'dispy-httpd.service']
    paths = [os.path.join(DEPLOY, unit) for unit in units]
    done = subprocess.run(['systemd-analyze', 'verify', *paths], stderr=subprocess.PIPE)
    said = done.stderr.decode()
    assert done.returncode == 0 and not any(unit in said for unit in units), said
    for path in paths[1:]:   # the node's jobs need more than a service may have for such a level
        done = subprocess.run(['systemd-analyze', 'security', '--offline=true', '--threshold=30',
                               path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = done.stdout.decode()
        if 'unrecognized option' in said:
            pytest.skip('this systemd-analyze does not look at files')
        assert done.returncode == 0, said


def test_the_compose_file():
    yaml = pytest.importorskip('yaml', reason='no parser of YAML here')
    with open(os.path.join(DEPLOY, 'compose.yaml')) as file:
        services = yaml.safe_load(file)['services']
    assert (services['node']['deploy']['replicas'] == 3
            and services['client']['depends_on'] == ['node'])


def test_options_of_the_examples_exist():
    """Those of the unit file and of the image; `parsed` would end the test."""
    for name, begin in (('dispynode.service', 'ExecStart='), ('Dockerfile', 'ENTRYPOINT ')):
        with open(os.path.join(DEPLOY, name)) as file:
            line, = [line[len(begin):] for line in file if line.startswith(begin)]
        words = json.loads(line) if line.startswith('[') else line.split()
        assert parsed(*words[2:]).user == 'nobody'
    for name, parser in (('dispyscheduler', dispyscheduler.make_parser()),
                         ('dispy-httpd', dispy_httpd.make_parser())):
        with open(os.path.join(DEPLOY, name + '.service')) as file:
            line, = [line for line in file if line.startswith('ExecStart=')]
        found = vars(parser.parse_args(line.split()[2:]))
        kept = found.get('state_dir') or found['token_file']   # systemd makes its directory
        assert kept.startswith('/var/lib/%s' % name)


@pytest.mark.parametrize('words, hosts', [
    (('',), ('',)), (('0.0.0.0',), ('',)), (('::',), ('',)), (('127.0.0.1', '0.0.0.0'), ('',)),
    (('127.0.0.1', 'localhost', '127.0.0.1'), ('127.0.0.1',)),
    (('127.0.0.1', '127.0.0.2'), ('127.0.0.1', '127.0.0.2'))])
def test_addresses_to_listen_at(monkeypatch, words, hosts):
    """A wildcard is all addresses and is told to nobody; one that is named twice is one."""
    resolve = socket.getaddrinfo   # some hosts file has ::1 first
    monkeypatch.setattr(socket, 'getaddrinfo', lambda host, *rest: resolve(
        '127.0.0.1' if host == 'localhost' else host, *rest))
    assert own_hosts(words) == hosts
