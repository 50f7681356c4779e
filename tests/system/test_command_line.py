"""`python -m dispy COMMAND`: a command over many arguments. What of it runs nothing is in
tests/unit/test_shell.py."""

import os
import re
import signal
import subprocess
import sys

import psutil
import pytest

from conftest import ROOT, _of_session, eventually, on_a_terminal
from nodes import NodeProcess, SchedulerProcess

PRIMES = os.path.join(ROOT, 'examples', 'primes.sh')


def dispy(*args, stdin='', cwd=None):
    done = subprocess.run([sys.executable, '-m', 'dispy', *args], input=stdin.encode(),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60, cwd=cwd)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope='module')
def node(tmp_path_factory):
    """A node with two CPUs, for all tests of this file."""
    with NodeProcess(tmp_path_factory.mktemp('shell'), '--name', 'lab2') as process:
        # What it keeps running between two computations is not left over
        _of_session.add(process.process.pid)
        yield '127.0.0.1:%d' % process.port
        _of_session.discard(process.process.pid)


def start(*args, **options):
    return subprocess.Popen([sys.executable, '-m', 'dispy', *args], **options)


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
    program.write_text('#!/bin/sh\ncat data.txt\necho "oops $1" >&2\n'
                       '[ "$1" != kill ] || kill -9 $$\nexit "$1"\n')
    (tmp_path / 'data.txt').write_text('data\n')
    args = [part for arg in ('0', '1', '"2"', 'kill') for part in ('-a', arg)]
    code, out, err = dispy('-n', 'local', '-f', str(tmp_path / 'data.txt'), *args, str(program))
    assert code == 3 and out == 'data\n' * 4
    assert ('exit status 1' in err and 'exit status 2' in err and 'exit status -9' in err
            and 'oops 0' in err)


def test_output_to_files(tmp_path):
    code, out, err = dispy('-n', 'local', '-a', '2 4', '-a', '4 6', '-o', str(tmp_path / 'out'),
                           PRIMES)
    assert (code, out, err) == (0, '', '')
    assert ((tmp_path / 'out' / '1.out').read_text() == '2\n3\n'
            and (tmp_path / 'out' / '2.out').read_text() == '5\n')
    assert sorted(os.listdir(str(tmp_path / 'out'))) == ['1.err', '1.out', '2.err', '2.out']


@pytest.mark.parametrize('args, text', [
    (['/no/such/program'], '/no/such/program'), (['-n', 'host:x', PRIMES], 'HOST:PORT'),
    ([], 'PROGRAM'),
    (['-f', '/no/such', PRIMES], '/no/such'), (['--secret-file', '/no/such', PRIMES], '/no/such'),
    (['-o', '/dev/null/x', PRIMES], '/dev/null')])
def test_wrong_usage(args, text):
    code, out, err = dispy(*args)
    assert code == 255 and text in err and 'Traceback' not in err


def test_no_node_in_time():
    code, out, err = dispy('-n', '127.0.0.1:9', '--wait-nodes', '0.5', '-a', '1 2', PRIMES)
    assert (code == 255 and '1 node was waited for' in err and 'no program listens' in err
            and 'Traceback' not in err)


@pytest.mark.skipif(os.name == 'nt', reason='no SIGINT for one process')
def test_interrupted(tmp_path):
    program = tmp_path / 'program'
    program.write_text('#!/bin/sh\ntouch "$1"\nexec sleep 60\n')
    program.chmod(0o755)
    process = subprocess.Popen([sys.executable, '-m', 'dispy', '-n', 'local', '-a',
                                str(tmp_path / 'runs'), str(program)], stderr=subprocess.PIPE)
    eventually((tmp_path / 'runs').exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and b'0 of 1 jobs had ended' in err and b'Traceback' not in err


def test_a_line_that_cannot_be_split():
    code, out, err = dispy('-n', 'local', '-k', '--args-file', '-', PRIMES,
                           stdin='2 4\n"2 4\n4 6\n')
    assert code == 1 and out == '2\n3\n5\n' and 'job 2' in err and 'Traceback' not in err


NASTY = ["it's", ' a  b ', '$HOME', '`id`', '-x', '"', '\\', '*', '', '~;&', '#x!']


def test_lines_are_taken_literally(node, tmp_path):
    wanted = ''.join('[%s]\n' % line for line in NASTY)
    stdin = ''.join(line + '\n' for line in NASTY)
    assert dispy('-n', node, '-k', 'printf', '[%s]\\n', stdin=stdin) == (0, wanted, '')
    assert dispy('-n', node, '-k', 'printf "[%s]\\n" {}; true', stdin=stdin) == (0, wanted, '')
    assert (dispy('-n', node, '-k0', 'printf', '[%s]\\n', stdin=stdin.replace('\n', '\0'))
            == (0, wanted, ''))
    (tmp_path / 'list').write_text('a,1\nb,2\n')
    code, out, err = dispy('-n', node, '-k', '--tag', '-C', ',', 'echo', '{2}{1}', 'of', '{#}',
                           '::::', str(tmp_path / 'list'))
    assert (code, out, err) == (0, 'a 1\t1a of 1\nb 2\t2b of 2\n', '')
    assert dispy('-n', node, ':::', 'echo a | tr a b') == (0, 'b\n', '')


def test_programs_travel_and_scripts_run_with_the_python_of_the_node(node, tmp_path):
    (tmp_path / 'mine').write_text('#!/bin/sh\necho "mine $1" $(cat data)\n')
    (tmp_path / 'data').write_text('data\n')
    (tmp_path / 'script.py').write_text('import sys\nprint(sys.executable, sys.argv[1:])\n')
    for command in ('mine', './mine', './mine {} | cat'):
        assert (dispy('-n', node, '-f', 'data', command, ':::', 'a b', cwd=str(tmp_path))
                == (0, 'mine a b data\n', ''))
    for command in ('script.py', './script.py {} | cat'):
        assert dispy('-n', node, command, ':::', 'a b', cwd=str(tmp_path)) == (0, "%s ['a b']\n"
                                                                               % sys.executable, '')
    code, out, err = dispy('-n', node, 'no-such-program', ':::', 'a')
    assert (code == 1 and 'job 1 (a) failed on lab2: ' in err
            and 'no program no-such-program in its PATH' in err)
    assert (dispy('-n', node, '--workdir', '.', 'ls', ':::', 'data', cwd=str(tmp_path))
            == (0, 'data\n', ''))
    code, out, err = dispy('-n', node, '--workdir', '/no/such', 'ls', ':::', 'data')
    assert code == 1 and 'no directory /no/such' in err


def test_files_of_jobs(node, tmp_path):
    (tmp_path / 'sub').mkdir()
    for name in ('a', 'b'):
        (tmp_path / 'sub' / (name + '.txt')).write_text(name)
    args = ('--transferfile', '{}', '--return', '{.}.out', '--cleanup',
            'cat {} {} > {.}.out; ls | wc -l; [ {/.} != b ]', ':::',
            'sub/a.txt', 'sub/b.txt', 'sub/none.txt')
    code, out, err = dispy('-n', node, '-k', *args, cwd=str(tmp_path))
    assert (code, out) == (2, '1\n1\n')
    assert 'job 2 (sub/b.txt) failed on lab2: exit status 1' in err
    assert 'job 3 (sub/none.txt) failed' in err
    assert ((tmp_path / 'sub' / 'a.out').read_text() == 'aa'
            and (tmp_path / 'sub' / 'b.out').read_text() == 'bb')
    assert sorted(os.listdir(str(tmp_path / 'sub'))) == ['a.out', 'a.txt', 'b.out', 'b.txt']
    # One that is not made
    code, out, err = dispy('-n', node, '--return', 'x', 'true', ':::', 'a', cwd=str(tmp_path))
    assert code == 1 and 'job 1 (a) failed' in err and "'x'" in err


def test_log_results_and_resuming(node, tmp_path):
    def run(*options):
        return dispy('-n', node, '-k', '--joblog', 'log', '--results', 'out', *options,
                     'echo {}; echo e >&2; [ -e good ] || exit {}', ':::',
                     '0', '7', '3', cwd=str(tmp_path))
    code, out, err = run('--workdir', str(tmp_path))
    assert code == 2 and out == '0\n7\n3\n' and 'job 2 (7) failed on lab2: exit status 7\n' in err
    rows = [line.split('\t') for line in (tmp_path / 'log').read_text().splitlines()]
    assert sorted(row[0] for row in rows[1:]) == ['1', '2', '3']
    assert {row[0]: row[6] for row in rows[1:]} == {'1': '0', '2': '7', '3': '3'}
    assert ({row[1] for row in rows[1:]} == {'127.0.0.1'}
            and {row[-1] for row in rows} == {'Node', 'lab2'})
    assert (tmp_path / 'out' / '1' / '7' / 'stdout').read_text() == '7\n'
    assert (tmp_path / 'out' / '1' / '7' / 'stderr').read_text() == 'e\n'
    table = (tmp_path / 'out' / 'jobs.tsv').read_text().splitlines()
    assert (table[0].startswith('Seq\tArguments\tNode\tStatus')
            and '2\t7\tlab2\texit status 7\t1/7' in table)
    assert run('--workdir', str(tmp_path), '--resume') == (0, '', '')
    (tmp_path / 'good').write_text('')
    code, out, err = run('--workdir', str(tmp_path), '--resume-failed')
    assert code == 0 and out == '7\n3\n' and len((tmp_path / 'log').read_text().splitlines()) == 6
    assert run('--workdir', str(tmp_path), '--resume-failed') == (0, '', '')


def test_exit_status_and_halting(node, tmp_path):
    code, out, err = dispy('-n', node, 'false', ':::', *map(str, range(102)))
    assert code == 101 and len(err.splitlines()) == 102
    code, out, err = dispy('-n', node, '--halt', 'now,fail=1',
                           'if [ {} = 0 ]; then exit 3; else exec sleep 600; fi', ':::',
                           '1', '0', '2', '3')
    assert code == 3
    assert 'job 2 (0) failed on lab2: exit status 3' in err
    assert 'no more jobs are started (--halt now,fail=1)' in err
    code, out, err = dispy('-n', node, '-j1', '--workdir', str(tmp_path), '--halt', 'soon,fail=2',
                           'echo {} >> begun; exit 3', ':::', *'12345')
    assert code == 2 and (tmp_path / 'begun').read_text() == '1\n2\n'
    code, out, err = dispy('-n', node, '--retries', '3', '--workdir', str(tmp_path),
                           'echo try >> tries; [ $(wc -l < tries) = 3 ]; exit $?', ':::', 'a')
    assert (code, err) == (0, '') and (tmp_path / 'tries').read_text() == 'try\n' * 3
    code, out, err = dispy('-n', node, '--timeout', '0.5', 'sleep 600; true', ':::', 'a')
    assert code == 1 and 'job 1 (a) failed on lab2: ' in err and '0.5 s' in err


def test_one_job_at_a_time(node, tmp_path):
    command = 'mkdir busy && echo {} >> done && sleep 0.05 && rmdir busy'
    for options in (('-j1',), ('-j1', '--delay', '0.01'), ('--cpus', '2')):
        code, out, err = dispy('-n', node, *options, '--workdir', str(tmp_path), command, ':::',
                               *'123456')
        assert (code, err) == (0, '') and not (tmp_path / 'busy').exists()
    assert len((tmp_path / 'done').read_text()) == 36


def test_output_appears_while_more_arguments_are_waited_for(node):
    process = start('-n', node, 'echo', 'x', stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for line in (b'1\n', b'2\n'):
        process.stdin.write(line)
        process.stdin.flush()
        assert process.stdout.readline() == b'x ' + line
    process.stdin.close()
    assert process.stdout.read() == b'' and process.wait(30) == 0
    process.stdout.close()


def test_lines_appear_while_the_job_runs(node, tmp_path):
    command = 'echo a; printf b >&2; until [ -e go ]; do sleep 0.02; done; printf b; echo c # {}'
    process = start('-n', node, '--lb', '--tag', '--workdir', str(tmp_path), command, ':::', '1',
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b'1\ta\n'
    (tmp_path / 'go').write_text('')
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == (b'1\tbc\n', b'1\tb', 0)


def test_a_reader_that_goes_ends_the_run_quietly():
    endless = subprocess.Popen(['sh', '-c', 'while echo y; do :; done'], stdout=subprocess.PIPE)
    process = start('-n', 'local', 'echo', stdin=endless.stdout, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE)
    endless.stdout.close()
    assert process.stdout.readline() == b'y\n'
    ours = psutil.Process(process.pid).children(recursive=True)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(30) == 141 and err == b''
    process.stderr.close()
    endless.wait(30)
    eventually(lambda: not any(child.is_running() for child in ours))


def test_progress_never_mixes_with_output(node):
    command = [sys.executable, '-m', 'dispy', '-n', node, '--bar', 'echo "line {}" >&2', ':::',
               *map(str, range(20))]
    code, shown = on_a_terminal(*command)
    assert code == 0 and b'20 of 20 done, 0 failed' in shown and shown.endswith(b'\n')
    kept = re.sub(rb'\r[^\r\n]*\033\[K', b'', shown).decode()
    assert sorted(re.findall('line \\d+', kept)) == sorted('line %d' % number
                                                           for number in range(20))
    lines = kept.replace('\r\n', '\n').splitlines()
    assert all(re.match('line \\d+$', line) for line in lines if line), lines
    assert dispy('-n', node, '--eta', 'echo', ':::', 'a') == (0, 'a\n', '')   # no terminal


def test_hosts_from_a_file_and_a_scheduler(node, tmp_path):
    hosts = tmp_path / 'hosts'
    hosts.write_text('1/%s  # half of it\n' % node)
    command = 'mkdir busy && sleep 0.05 && rmdir busy # {}'
    code, out, err = dispy('--hosts', str(hosts), '--workdir', str(tmp_path), command, ':::',
                           *'1234')
    assert (code, err) == (0, '')
    code, out, err = dispy('--list-nodes', '--hosts', str(hosts))
    assert code == 0 and 'lab2' in out
    code, out, err = dispy('--hosts', str(tmp_path / 'none'), 'echo', ':::', 'a')
    assert code == 255 and 'none' in err
    with SchedulerProcess(tmp_path / 'scheduler', '-n', node) as scheduler:
        address = '127.0.0.1:%d' % scheduler.port
        code, out, err = dispy('--scheduler-host', address, '-k', '-j1', 'echo', ':::', 'a', 'b')
        assert (code, out, err) == (0, 'a\nb\n', '')


def test_a_dry_run_prints_the_commands():
    assert (dispy('--dry-run', 'cat {} > {.}.o', ':::', "it's.txt")
            == (0, "cat 'it'\"'\"'s.txt' > 'it'\"'\"'s'.o\n", ''))
