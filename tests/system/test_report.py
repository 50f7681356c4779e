"""`python -m dispy report`: a file for a report of a fault, with nothing secret in it."""

import os
import re
import signal
import stat
import subprocess
import sys
import time

import pytest

import dispy
from dispy import BugReport, told_words
from conftest import eventually
from nodes import NodeProcess, SchedulerProcess


@pytest.mark.parametrize('line, wanted', [
    ('the page is http://host:8181/#token=abc-DEF_1', 'the page is http://host:8181/<left out>'),
    ('token=abc', 'token=<left out>'), ('Secret: abc def', 'Secret: <left out> def'),
    ('it said hush!', 'it said <left out>!'),
    ("job 3 with the arguments 'my data', 5 failed", 'job 3 with arguments'),
    ("job 3 with the argument 'x': y", 'job 3 with arguments'),
    ('key 0123456789abcdef0123456789abcdef', 'key <left out>'),
    ('port 9701, PID 123456789', 'port 9701, PID 123456789')])
def test_what_is_left_out_of_a_line(line, wanted):
    assert BugReport(['hush', '']).plain(line) == wanted


def test_values_of_options_are_left_out_unless_they_are_known_to_be_plain():
    words = ['python', 'dispynode.py', '-p', '9701', '-s', 'hush', '--secret=hush', '--port=1',
             '--keyfile', 'k', '-d']
    assert list(told_words(words)) == ['python', 'dispynode.py', '-p', '9701', '-s', '<left out>',
                                       '--secret=<left out>', '--port=1', '--keyfile',
                                       '<left out>', '-d']


def test_a_section_that_fails_does_not_hide_the_others():
    def fails():
        yield 'a line'
        raise OSError('no such thing: hush')
    report = BugReport(['hush'])
    report.add('first', fails)
    report.add('second', lambda: ['more'])
    assert ('OSError: no such thing: <left out>' in report.text()
            and report.text().endswith('\n== second\nmore\n'))


def work(path, what):
    while not os.path.exists(path):
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, 'memfd_create'), reason='stacks are written on Linux only')
def test_a_report_has_the_stacks_of_daemons_and_no_values(tmp_path, monkeypatch):
    """Of a loop that stands still as well. One that has no handler is not ended by the question."""
    secret, token = 'a secret that nobody may see', 'the-token-of-the-page-of-it'
    (tmp_path / 'token').write_text(token)
    (tmp_path / 'token').chmod(0o600)
    monkeypatch.setenv('DISPY_SECRET', secret)
    fake = tmp_path / 'dispynode.py'
    fake.write_text('import time\nprint("up", flush=True)\ntime.sleep(600)\n')
    other = subprocess.Popen([sys.executable, str(fake)], stdout=subprocess.PIPE)
    with NodeProcess(tmp_path / 'node', '--name', 'lab2') as node, \
            SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:%d' % node.port, '--httpd',
                             '0', '--httpd-token-file', str(tmp_path / 'token')) as scheduler:
        assert other.stdout.readline() == b'up\n'
        with dispy.SharedJobCluster(work, scheduler_port=scheduler.port) as cluster:
            job = cluster.submit(str(tmp_path / 'flag'), 'the argument of a job')
            eventually(lambda: job.status == job.Running)
            node.process.send_signal(signal.SIGSTOP)
            found = []
            for stops in (True, False):
                done = subprocess.run([sys.executable, '-m', 'dispy', 'report', '-o', '-', '-n',
                                       '127.0.0.1:9'], stdout=subprocess.PIPE, timeout=60)
                found.append(done.stdout.decode())
                if stops:
                    node.process.send_signal(signal.SIGCONT)
            (tmp_path / 'flag').write_text('')
        with open(str(tmp_path / 'scheduler' / 'state' / 'monitor')) as file:
            assert token in file.read()
    assert other.poll() is None
    other.kill()
    other.communicate()
    for text in found:
        stacks = text.partition('\n== stacks\n')[2].partition('\n== ')[0]
        lines = r'-- PID %d\n((?:(?!--).*\n)*)'
        scheduler_part, = re.findall(lines % scheduler.process.pid, stacks)
        assert 'in run_until_ended' in scheduler_part
        assert 'PID %d: not known' % other.pid in stacks
        for hidden in (secret, token, 'the argument of a job', secret.encode().hex()):
            assert hidden not in text
    assert 'in run_until_ended' in re.findall(lines % node.process.pid, found[1])[0]


def test_a_report_has_what_is_needed_and_nothing_secret(tmp_path):
    secret = 'a secret that nobody may see'
    log = tmp_path / 'node' / 'log'
    with NodeProcess(tmp_path / 'node', '--name', 'lab2', '--secret', secret, '--log-file',
                     str(log)) as node:
        with open(str(log), 'a') as file:
            file.write('a line of the log\nhttp://host/#token=t0ken\nthe secret is %s\n' % secret)
        command = [sys.executable, '-m', 'dispy', 'report', '-n', '127.0.0.1:%d' % node.port, '-o',
                   'report.txt']
        environment = dict(os.environ, DISPY_SECRET=secret)
        done = subprocess.run(command, cwd=str(tmp_path), env=environment, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=60)
        assert done.returncode == 0
        assert done.stderr == b''
        assert done.stdout == b'report.txt is written. Read it before you send it.\n'
        again = subprocess.run(command, cwd=str(tmp_path), env=environment, stderr=subprocess.PIPE,
                               timeout=60)
        assert again.returncode == 255 and b'report.txt' in again.stderr   # no file is overwritten
    text = (tmp_path / 'report.txt').read_text()
    for part in ('dispy ' + dispy.__version__, 'Python ' + sys.version.split()[0],
                 'DISPY_SECRET is set', 'lab2', 'PID %d since' % node.process.pid,
                 'a line of the log', '-- ' + str(log), 'STATE'):
        assert part in text, text
    assert secret not in text and 't0ken' not in text
    if os.name != 'nt':
        assert stat.S_IMODE(os.stat(str(tmp_path / 'report.txt')).st_mode) == 0o600
