"""`python -m dispy PROGRAM`: a program over many arguments."""

import os
import signal
import subprocess
import sys

import pytest

from conftest import ROOT, eventually

PRIMES = os.path.join(ROOT, 'examples', 'primes.sh')


def dispy(*args, stdin='', cwd=None):
    done = subprocess.run([sys.executable, '-m', 'dispy', *args], input=stdin.encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=60, cwd=cwd)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_arguments_of_the_command_line():
    code, out, err = dispy('-n', 'local', '-a', '10 20', '-a', '20 30', PRIMES)
    assert (code, err) == (0, '') and sorted(map(int, out.split())) == [11, 13, 17, 19, 23, 29]


def test_arguments_from_a_file_and_from_standard_input(tmp_path):
    path = tmp_path / 'args'
    path.write_text('2 4\n\n4 6\n')
    for args, stdin in (((str(path),), ''), (('-',), path.read_text())):
        code, out, err = dispy('-n', 'local', '--args-file', *args, PRIMES, stdin=stdin)
        assert (code, sorted(out.split()), err) == (0, ['2', '3', '5'], '')


def test_the_exit_status_counts_failures(tmp_path):
    program = tmp_path / 'program'
    program.write_text('#!/bin/sh\ncat data.txt\necho "oops $1" >&2\n[ "$1" != kill ] || kill -9 $$\nexit "$1"\n')
    (tmp_path / 'data.txt').write_text('data\n')
    args = [part for arg in ('0', '1', '"2"', 'kill') for part in ('-a', arg)]
    code, out, err = dispy('-n', 'local', '-f', str(tmp_path / 'data.txt'), *args, str(program))
    assert code == 3 and out == 'data\n' * 4
    assert 'exit status 1' in err and 'exit status 2' in err and 'exit status -9' in err and 'oops 0' in err


def test_output_to_files(tmp_path):
    code, out, err = dispy('-n', 'local', '-a', '2 4', '-a', '4 6', '-o', str(tmp_path / 'out'), PRIMES)
    assert (code, out, err) == (0, '', '')
    assert (tmp_path / 'out' / '1.out').read_text() == '2\n3\n' and (tmp_path / 'out' / '2.out').read_text() == '5\n'
    assert sorted(os.listdir(str(tmp_path / 'out'))) == ['1.err', '1.out', '2.err', '2.out']


@pytest.mark.parametrize('args, text', [
    (['/no/such/program'], '/no/such/program'), (['-n', 'host:x', PRIMES], 'HOST:PORT'), ([], 'PROGRAM'),
    (['-f', '/no/such', PRIMES], '/no/such'), (['--secret-file', '/no/such', PRIMES], '/no/such'),
    (['-o', '/dev/null/x', PRIMES], '/dev/null')])
def test_wrong_usage(args, text):
    code, out, err = dispy(*args)
    assert code == 2 and text in err and 'Traceback' not in err


def test_no_node_in_time():
    code, out, err = dispy('-n', '127.0.0.1:9', '--wait-nodes', '0.5', '-a', '1 2', PRIMES)
    assert code == 2 and '1 node was waited for' in err and 'nothing listens' in err and 'Traceback' not in err


@pytest.mark.skipif(os.name == 'nt', reason='no SIGINT for one process')
def test_interrupted(tmp_path):
    program = tmp_path / 'program'
    program.write_text('#!/bin/sh\ntouch "$1"\nexec sleep 60\n')
    program.chmod(0o755)
    process = subprocess.Popen([sys.executable, '-m', 'dispy', '-n', 'local', '-a', str(tmp_path / 'runs'), str(program)], stderr=subprocess.PIPE)
    eventually((tmp_path / 'runs').exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and b'0 of 1 jobs had ended' in err and b'Traceback' not in err


def test_a_line_that_cannot_be_split():
    code, out, err = dispy('-n', 'local', '--args-file', '-', PRIMES, stdin='2 4\n"2 4\n')
    assert code == 1 and out == '2\n3\n' and 'job 2' in err and 'Traceback' not in err
