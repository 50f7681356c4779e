"""What makes no sense is refused with a text that names it; what others send neither writes lines
of its own nor speaks to a terminal."""

import logging
import os
import pickle
import shutil
import subprocess
import sys
import time

import pytest

import dispy
import dispy_httpd
from conftest import ROOT, eventually
from dispynode import LogFormatter, PrivateFileHandler, printable
from nodes import NodeProcess


def square(n):
    return n * n


@pytest.mark.parametrize('argv, text', [
    (['dispynode.py', '--ping-interval', '1e300'], '10 years'),
    (['dispynode.py', '--ping-interval', '1e-9'], '0.001'),
    (['dispynode.py', '--zombie-interval', '1e9'], '10 years'),
    (['dispynode.py', '--msg-timeout', 'nan'], '--msg-timeout'),
    (['dispyscheduler.py', '--node-port', '0'], '--node-port'),
    (['dispyscheduler.py', '--node-port', '70000'], '--node-port'),
    (['dispyscheduler.py', '--zombie-interval', 'inf'], '--zombie-interval'),
    (['dispy.py', '--wait-nodes', 'nan', 'true'], '--wait-nodes'),
    (['dispynode.py', '--keyfile', 'x'], '--certfile'),
    (['dispynode.py', '--certfile', ''], '--certfile'),
    (['dispynode.py', '--user', ''], "--user ''"),
    (['dispyscheduler.py', '--node-keyfile', 'x'], '--node-certfile'),
    (['dispyscheduler.py', '--cluster-certfile', ''], '--cluster-certfile'),
    (['dispyscheduler.py', '--allow-nodes', '10.0.0.0/99'], '--allow-nodes'),
    (['dispyscheduler.py', '--max-queued-bytes', '0'], '--max-queued-bytes'),
    (['dispy_httpd.py', '--scheduler', ''], "''"),
    (['dispy_httpd.py', '--nodes', 'x', '--keyfile', 'y'], '--certfile'),
    (['dispy_httpd.py', '--nodes', '127.0.0.1:1', '-p', '0', '--token-file', ROOT], '--token-file'),
    (['dispynode.py', '--config', 'DEEP'], '--config'),
    (['dispy.py', '-n', 'local', '--scheduler-host', 'x', 'true'], '--scheduler-host')])
def test_options_that_make_no_sense(tmp_path, argv, text):
    """No traceback, no start, and the option in the text."""
    (tmp_path / 'deep').write_text('[' * 100000)
    argv = [str(tmp_path / 'deep') if word == 'DEEP' else word for word in argv]
    done = subprocess.run([sys.executable, '-m', argv[0][:-len('.py')], *argv[1:]],
                          capture_output=True, text=True, timeout=60,
                          env=dict(os.environ, XDG_STATE_HOME=str(tmp_path)))
    assert (done.returncode in (1, 2, 255) and text in done.stderr
            and 'Traceback' not in done.stderr), done.stderr


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0,
                    reason='only root may become another user')
def test_root_is_no_user_of_jobs():
    done = subprocess.run([sys.executable, '-m', 'dispynode', '--user', 'root'],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and '--user root' in done.stderr


def test_timers_of_any_length(tmp_path):
    """An idle node with timers and intervals of years lives, and starts again."""
    for _ in range(2):
        with NodeProcess(tmp_path, '--zombie-interval', '5000000', '--ping-interval',
                         '2200000') as node:
            with dispy.JobCluster(square, nodes=[node.address]) as cluster:
                assert cluster.submit(3, dispy_timeout=30 * 86400)(30) == 9
            with dispy.JobCluster(square, nodes=[node.address]) as cluster:
                assert cluster.submit(4)(30) == 16


def test_a_loop_sleeps_a_day_at_most():
    from dispynode import LONGEST_SLEEP, Loop

    class Patient(Loop):
        def next_timer(self):
            return self.clock() + 1e12
    loop = Patient()
    try:
        assert loop._select_timeout(None) == LONGEST_SLEEP
    finally:
        loop.close()


def test_timers_that_are_for_nothing_any_more_are_removed():
    from dispynode import Timers
    timers = Timers()
    for n in range(1000):
        timers.at(1e9 + n, 'c', print, n, is_wanted=lambda n: n == 5)
    assert (len(timers) < 200
            and [timer.args for timer in timers if timer.is_wanted(*timer.args)] == [(5,)])


def test_a_closed_cluster_says_so_while_others_are_open():
    with dispy.JobCluster(square, nodes=[('127.0.0.1', 1)], loglevel=logging.CRITICAL) as other:
        cluster = dispy.JobCluster(square, nodes=[('127.0.0.1', 1)], loglevel=logging.CRITICAL)
        cluster.close(terminate=True)
        for call in (lambda: cluster.discover_nodes('127.0.0.1'), lambda: cluster.close_node('x'),
                     lambda: cluster.set_node_cpus('x', 1)):
            with pytest.raises(RuntimeError, match='closed'):
                call()
        assert other.status().jobs_pending == 0


@pytest.mark.parametrize('options', [{'host': None}, {'host': 5}, {'port': 1.5}, {'keyfile': 'x'},
                                     {'certfile': ''}])
def test_parameters_of_the_monitor(options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        dispy_httpd.DispyHTTPServer(**options)


def test_files_to_depend_on(tmp_path):
    """A FIFO is refused at once; a link to nothing, as editors make for locks, is left out."""
    directory = tmp_path / 'directory'
    directory.mkdir()
    (directory / 'file').write_text('x')
    os.symlink('nobody@host.1234', directory / '.#file')
    with dispy.JobCluster(square, nodes=[('127.0.0.1', 1)], depends=[str(directory)],
                          loglevel=logging.CRITICAL) as cluster:
        assert [row[0] for row in dispy.core_of(cluster).packed.spec['files']] == ['directory/file']
    os.mkfifo(directory / 'fifo')
    for path in (directory, directory / 'fifo', '/dev/null'):
        with pytest.raises(ValueError, match='depends: .* is not a regular file'):
            dispy.JobCluster(square, nodes=[('127.0.0.1', 1)], depends=[str(path)])


@pytest.mark.skipif(not shutil.which('setpriv') or os.geteuid() != 0,
                    reason='a user without an entry in the password file')
def test_without_a_home_the_secret_has_no_place():
    env = {name: value for name, value in os.environ.items()
           if name not in ('HOME', 'DISPY_SECRET', 'XDG_CONFIG_HOME', 'XDG_STATE_HOME')}
    python = '/usr/bin/python3'
    if not os.path.exists(python):
        pytest.skip('no Python that all can read')
    code = ('import sys, types; sys.argv[1:] = ["-p", "0"]; made = sys.modules["dispynode"] '
            '= types.ModuleType("dispynode"); '
            'exec(compile(sys.stdin.read(), "dispynode.py", "exec"), made.__dict__); '
            'sys.exit(made.main())')
    # Which that user may not be able to read
    with open(os.path.join(ROOT, 'dispynode.py')) as file:
        done = subprocess.run(['setpriv', '--reuid=12345', '--clear-groups', python, '-c', code],
                              input=file.read(), capture_output=True, text=True,
                              env=env, cwd='/tmp', timeout=60)
    assert (done.returncode == 1 and 'has no home' in done.stderr
            and not os.path.exists('/tmp/~')), done.stderr


# -- logs and terminals ----------------------------------------------------------------------------

def test_control_characters_are_written_out():
    assert (printable('plain ä') == 'plain ä'
            and printable('a\nb\x1b[2J\ud800') == 'a\\nb\\x1b[2J\\ud800')
    record = logging.LogRecord('dispynode', logging.INFO, 'x', 1, 'name %s',
                               ('evil\n2026-01-01 dispynode INFO: forged\x1b[2J',), None)
    lines = LogFormatter('%(levelname)s: %(message)s').format(record).splitlines()
    assert (lines[0] == 'INFO: name evil' and lines[1].startswith('  2026')
            and '\x1b' not in ''.join(lines))


def test_names_of_clients_do_not_speak_to_the_operator(tmp_path):
    """A name with an escape sequence, a line of its own and what is no Unicode."""
    from dispynode import ClientHello
    from talk_link import Talk, spec
    from dispynode import Compute, Role
    with NodeProcess(tmp_path) as node:
        with Talk(node.port, wanted=Role.NODE) as talk:
            talk.say(ClientHello('evil\x1b[2J\nforged line\ud800', 600.0), Compute('a', spec()))
            eventually(lambda: 'held by evil' in node.log())
        assert '\x1b' not in node.log() and not any(line.startswith('forged')
                                                    for line in node.log().splitlines())
        assert node.process.poll() is None


def test_log_files_are_for_their_user_alone(tmp_path):
    path = tmp_path / 'log'
    handler = PrivateFileHandler(str(path))
    handler.close()
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_the_token_of_the_monitor_is_in_no_log_that_others_can_read(tmp_path):
    log = tmp_path / 'scheduler.log'
    for mode in (None, 0o644):
        if mode:
            log.write_text('')
            os.chmod(log, mode)
        process = subprocess.Popen([sys.executable, '-m', 'dispyscheduler', '-i', '127.0.0.1',
                                    '-p', '0', '--state-dir', str(tmp_path / 's'),
                                    '-n', '127.0.0.1:1', '--httpd', '0', '--log-file', str(log)],
                                   stderr=subprocess.DEVNULL)
        try:
            eventually(lambda: log.exists() and 'serves at port' in log.read_text())
            assert ('#token=' in log.read_text()) is (mode is None)
            if mode:
                link = tmp_path / 's' / 'monitor'
                assert '#token=' in link.read_text() and os.stat(link).st_mode & 0o777 == 0o600
            else:
                assert os.stat(log).st_mode & 0o777 == 0o600
        finally:
            process.terminate()
            process.wait(20)


# -- the page --------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    'payload',
    [pickle.dumps((range(10 ** 15), {})), pickle.dumps(([1], {})), b'\x80\x05Nr\xff\xff\xff\x0f.',
     pickle.dumps((tuple(range(10000)), {})),
     pickle.dumps(((range(10 ** 15),), {'a': 'x' * 10000})),
     b'\x80\x05\x8e\xff\xff\xff\xff\x00\x00\x00\x00.', pickle.dumps(((1 << 50000,), {}))],
    ids=['no end', 'a list', 'a memo bomb', 'many', 'a long range', 'a promise', 'a long number'])
def test_arguments_are_shown_from_a_bounded_reading(payload):
    began = time.process_time()
    text = dispy_httpd.arguments_text(payload)
    assert len(text) < 400 and time.process_time() - began < 2


@pytest.mark.skipif(not shutil.which('systemd-analyze'), reason='no systemd here')
def test_the_unit_is_right(tmp_path):
    unit = tmp_path / 'dispynode.service'
    with open(os.path.join(ROOT, 'examples', 'deploy', 'dispynode.service')) as file:
        unit.write_text(
            file.read().replace('/usr/bin/python3 /opt/dispy/dispynode.py',
                                sys.executable + ' ' + os.path.join(ROOT, 'dispynode.py')))
    done = subprocess.run(['systemd-analyze', 'verify', str(unit)], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0 and not [line for line in done.stderr.splitlines()
                                         if 'dispynode.service' in line], done.stderr
