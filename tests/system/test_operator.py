"""`python -m dispyscheduler status | jobs | nodes | cancel | drain | resume`: a scheduler that runs
is asked, and gets orders."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest

import dispy
from conftest import eventually
from dispy import ConnectionSettings
from dispy_httpd import SchedulerLink
from dispynode import PULSE, DispyError
from dispyscheduler import State, secrets_of_users
from nodes import Clock, NodeProcess, SchedulerProcess
from scenes import Gate, hold


def wait_for(path):
    import os
    import time
    while not os.path.exists(path):
        time.sleep(0.02)


def of_alice(path):
    import os
    import time
    while not os.path.exists(path):
        time.sleep(0.02)


def of_bob(path):
    import os
    import time
    while not os.path.exists(path):
        time.sleep(0.02)


def operate(scheduler, task, *words, environment=None):
    done = subprocess.run([sys.executable, '-m', 'dispyscheduler', task, *words, '--scheduler-host',
                           '127.0.0.1:%d' % scheduler.port],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
                          env=dict(os.environ, **(environment or {})))
    assert b'Traceback' not in done.stderr
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def rows(scheduler, task, *words):
    code, out, err = operate(scheduler, task, '--json', *words)
    assert err == ''
    return json.loads(out)


@pytest.mark.long
def test_an_operator_sees_and_orders(tmp_path):
    with NodeProcess(tmp_path / 'node', '--name', 'lab2') as node, \
            SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:%d' % node.port) as scheduler:
        with dispy.SharedJobCluster(wait_for, scheduler_port=scheduler.port) as cluster:
            jobs = [cluster.submit(str(tmp_path / 'first')) for _ in range(2)]
            eventually(lambda: all(job.status == job.Running for job in jobs))
            waiting = cluster.submit(str(tmp_path / 'second'))
            eventually(lambda: rows(scheduler, 'status')[0]['waiting'] == 1)
            program, = rows(scheduler, 'status')
            assert program['name'] == 'wait_for' and 'PID %d' % os.getpid() in program['program']
            assert (program['running'], program['cpus'], program['done']) == (2, 2, 0)
            assert 'of %s begins' % program['program'] in node.log()
            code, out, err = operate(scheduler, 'status')
            assert code == 0 and 'WAITING' in out and 'wait_for' in out
            running = eventually(
                lambda: [row for row in rows(scheduler, 'jobs') if row['running']][1:])
            assert {row['node'] for row in running} == {'lab2'}
            assert len(rows(scheduler, 'jobs', 'lab2')) == len(rows(scheduler, 'jobs'))
            found, = rows(scheduler, 'nodes')
            assert (found['name'], found['cpus'], found['running'], found['used']) == ('lab2', 2, 2,
                                                                                       2)
            code, out, err = operate(scheduler, 'nodes')
            assert code == 0 and 'lab2' in out and 'STATE' in out

            drains = subprocess.Popen([sys.executable, '-m', 'dispyscheduler', 'drain', 'lab2',
                                       '--wait', '--scheduler-host',
                                       '127.0.0.1:%d' % scheduler.port])
            eventually(lambda: rows(scheduler, 'nodes')[0]['state'] == 'drained')
            assert drains.poll() is None and operate(scheduler, 'nodes')[0] == 1
            (tmp_path / 'first').write_text('')
            assert drains.wait(30) == 0 and all(job.wait(20) for job in jobs)
            assert waiting.status == waiting.Created
            assert operate(scheduler, 'resume', '127.0.0.1')[0] == 0
            eventually(lambda: waiting.status == waiting.Running)
            number = rows(scheduler, 'status')[0]['number']
            code, out, err = operate(scheduler, 'cancel', str(number))
            assert (code, err) == (0, '') and out == 'program %d: 1 job is cancelled\n' % number
            assert waiting.wait(20) and waiting.status == waiting.Cancelled
            node_name = 'lab2 (127.0.0.1:%d)' % node.port
            for order in ('drained node %s: no reason was given' % node_name,
                          'resumed node %s' % node_name,
                          'cancelled jobs of computation %d at node %s: 1' % (number, node_name)):
                pattern = r'INFO: \S+@\S+ PID \d+ has ' + re.escape(order) + '\n'
                assert re.search(pattern, scheduler.log()), (order, scheduler.log())
        shell = subprocess.Popen([sys.executable, '-m', 'dispy', '--scheduler-host',
                                  '127.0.0.1:%d' % scheduler.port, 'sleep 600; :', ':::', 'a'],
                                 stderr=subprocess.PIPE)

        def shells():
            return [row for row in rows(scheduler, 'status') if row['name'] == 'sleep'
                    and row['running']]
        program, = eventually(shells)
        assert operate(scheduler, 'cancel', str(program['number']))[0] == 0
        err = shell.communicate(timeout=30)[1]
        assert shell.returncode == 1 and b'job 1 (a) failed' in err and b'cancelled' in err


def test_a_node_stays_drained_for_its_reason_until_it_is_resumed(tmp_path):
    """Also over a new start of the node, and of the scheduler; one that connects by itself, too."""
    directory = tmp_path / 'scheduler'
    with SchedulerProcess(directory, '-n', '127.0.0.1:9') as scheduler:
        port = scheduler.port
        words = ('--name', 'lab2', '--scheduler-host', '127.0.0.1:%d' % port)
        with NodeProcess(tmp_path / 'node', *words) as node:
            eventually(lambda: [row for row in rows(scheduler, 'nodes') if row['name'] == 'lab2'])
            assert operate(scheduler, 'drain', 'lab2', '--reason', 'new\n disk') == (0, '', '')
    with SchedulerProcess(directory, '-n', '127.0.0.1:9', port=port) as scheduler, \
            NodeProcess(tmp_path / 'node', *words, port=node.port):

        def known():
            return {row['name']: row for row in rows(scheduler, 'nodes')}

        eventually(lambda: known().get('lab2', {}).get('state') == 'drained')
        assert known()['lab2']['reason'].startswith('new\n disk (since 20')
        out = operate(scheduler, 'nodes')[1]
        assert 'new disk (since' in out
        with dispy.SharedJobCluster(wait_for, scheduler_port=port) as cluster:
            (tmp_path / 'flag').write_text('')
            job = cluster.submit(str(tmp_path / 'flag'))
            eventually(lambda: cluster.status().nodes)
            assert [each.cpus for each in cluster.status().nodes] == [0] and not job.wait(0)
            scheduler.kill()
            with SchedulerProcess(directory, '-n', '127.0.0.1:9', port=port) as scheduler:
                eventually(lambda: known().get('lab2', {}).get('state') == 'drained')
                assert not job.wait(0)
                assert operate(scheduler, 'resume', 'lab2') == (0, '', '')
                assert job.wait(30) and job.status == job.Finished
                scheduler.kill()
            with SchedulerProcess(directory, '-n', '127.0.0.1:9', port=port) as scheduler:
                eventually(lambda: known().get('lab2', {}).get('state') == 'connected')


def two_secrets(tmp_path):
    """A directory with the secrets of two users."""
    users = tmp_path / 'users'
    users.mkdir()
    for name in ('alice', 'bob'):
        (users / name).write_text('the secret of %s, long enough' % name)
        (users / name).chmod(0o600)
    return users


def see_jobs_one_by_one(scheduler, secret, mine, his):
    """Alice's page shows the jobs of her cluster alone, and she cannot look into those of bob's.
    These are the numbers of both."""
    access = ConnectionSettings(secret.read_bytes(), None, None, None, PULSE, 1.0)
    link = SchedulerLink('127.0.0.1', scheduler.port, access)
    try:
        assert eventually(lambda: link.why_not() == '')
        at_nodes = eventually(lambda: link.ask('at_nodes', 0, 100)[1])
        assert {row[0] for row in at_nodes} == {mine} and link.ask('ended', 0)[1] == []
        assert len(link.ask('waiting', mine, 0, 100)[1]) + len(at_nodes) == 3
        job = [mine, at_nodes[0][1]]
        assert eventually(lambda: [row for row in link.ask('looks', [job], False)[1] if row])
        for question in (('waiting', his, 0, 100), ('looks', [[his, job[1]]], True),
                         ('cancel', his, None, [job[1]])):
            with pytest.raises((ValueError, RuntimeError), match='there is no cluster'):
                link.ask(*question)
    finally:
        link.close()


@pytest.mark.long
def test_users_are_known_by_their_secrets(tmp_path):
    """A user sees and cancels what is his, the operator everything, also after a new start."""
    directory, users = tmp_path / 'scheduler', two_secrets(tmp_path)
    with NodeProcess(tmp_path / 'node', '--name', 'lab2') as node:
        words = ('-n', '127.0.0.1:%d' % node.port, '--cluster-secret-file', str(users))
        with SchedulerProcess(directory, *words) as scheduler:
            clusters = {}
            with contextlib.ExitStack() as stack:
                for name, job_of in (('alice', of_alice), ('bob', of_bob)):
                    cluster = dispy.SharedJobCluster(
                        job_of, scheduler_port=scheduler.port, loglevel=50,
                        secret='the secret of %s, long enough' % name)
                    clusters[name] = stack.enter_context(cluster)
                jobs = {}
                for name, cluster in clusters.items():
                    jobs[name] = [cluster.submit(str(tmp_path / 'flag')) for _ in range(3)]
                seen = {}

                def look():
                    """What each sees."""
                    for name, secret in (('alice', users / 'alice'), ('bob', users / 'bob'),
                                         ('operator', directory / 'state' / 'operator-secret')):
                        more = ('--secret-file', str(secret))
                        seen[name] = (rows(scheduler, 'status', *more),
                                      rows(scheduler, 'jobs', *more))
                    return seen

                def names():
                    return [sorted((row['user'], row['proven'], row['name']) for row in found)
                            for found, _ in look().values()]
                mine, his = ('alice', True, 'of_alice'), ('bob', True, 'of_bob')
                eventually(lambda: names() == [[mine], [his], [mine, his]])
                for name in ('alice', 'bob'):
                    assert {row['name'] for row in seen[name][1]} <= {'of_' + name}
                assert {row['name'] for row in seen['operator'][1]} == {'of_alice', 'of_bob'}
                numbers = [seen[name][0][0]['number'] for name in ('alice', 'bob')]
                see_jobs_one_by_one(scheduler, users / 'alice', *numbers)
                scheduler.kill()
                with SchedulerProcess(directory, *words, port=scheduler.port) as scheduler:
                    eventually(lambda: names() == [[mine], [his], [mine, his]])
                    number = seen['bob'][0][0]['number']
                    more = ('--secret-file', str(users / 'alice'))
                    code, out, err = operate(scheduler, 'cancel', str(number), *more)
                    assert code == 1 and 'there is no cluster' in err
                    code, out, err = operate(scheduler, 'drain', 'lab2', *more)
                    assert code == 1 and "operator's secret" in err
                    more = ('--secret-file', str(users / 'bob'))
                    assert operate(scheduler, 'cancel', str(number), *more)[0] == 0
                    for job in jobs['bob']:
                        assert job.wait(30) and job.status == job.Cancelled
                    assert 'alice (' in scheduler.log() and 'bob (' in scheduler.log()
                    (tmp_path / 'flag').write_text('')
                    assert all(job.wait(30) and job.status == job.Finished for job in jobs['alice'])
                    for cluster in clusters.values():
                        cluster.close()


def hold_alice(path, name):
    return hold(path, name)


def hold_bob(path, name):
    return hold(path, name)


@pytest.mark.skipif(sys.platform == 'win32', reason='there is no SIGHUP')
def test_two_users_with_secrets_and_limits(tmp_path, caplog):
    directory, users = tmp_path / 'scheduler', two_secrets(tmp_path)
    config, clock, gate = tmp_path / 'config', Clock(tmp_path), Gate(tmp_path / 'gate')
    config.write_text(json.dumps({'limit': ['alice=cpus:2'], 'share': ['bob=3'], 'half-life': 1}))
    secrets = {name: ('--secret-file', str(users / name)) for name in ('alice', 'bob')}
    secrets['operator'] = ('--secret-file', str(directory / 'state' / 'operator-secret'))

    def reload(text):
        config.write_text(text)
        scheduler.process.send_signal(signal.SIGHUP)

    def of(name, task):
        return rows(scheduler, task, *secrets[name])

    def counts(name):
        return sorted((row['user'], row['running'], row['waiting'], row['limited'])
                      for row in of(name, 'status'))

    with NodeProcess(tmp_path / 'node', '--name', 'lab', cpus=8) as node, \
            contextlib.ExitStack() as stack:
        words = ('-n', '127.0.0.1:%d' % node.port, '--cluster-secret-file', str(users), '--config',
                 str(config), '--daemon', '--history', '7')
        with SchedulerProcess(directory, *words, env=clock.environment) as scheduler:
            jobs = {}
            for name, job_of, count in (('alice', hold_alice, 5), ('bob', hold_bob, 4)):
                cluster = stack.enter_context(dispy.SharedJobCluster(
                    job_of, scheduler_port=scheduler.port,
                    secret='the secret of %s, long enough' % name))
                jobs[name] = [cluster.submit(gate.path, '%s%d' % (name, n)) for n in range(count)]
            # What each is limited to, and sees
            eventually(lambda: counts('operator') == [('alice', 2, 3, 3), ('bob', 4, 0, 0)])
            assert counts('alice') == [('alice', 2, 3, 3)] and counts('bob') == [('bob', 4, 0, 0)]
            held = [row for row in of('alice', 'jobs') if row['waiting']]
            text = 'user alice has 2 CPUs, the next job needs 1, and the limit is 2 (--limit)'
            assert [(row['waiting'], row['reason']) for row in held] == [(3, text)]
            eventually(lambda: text in caplog.text)
            assert not [row for row in of('bob', 'jobs') if row['waiting']]
            out = operate(scheduler, 'jobs', *secrets['alice'])[1]
            assert '3 wait: ' + text in out
            mine, = of('bob', 'users')
            assert (mine['user'], mine['share'], mine['cpus'], mine['cpu_limit']) == ('bob', 3.0, 4,
                                                                                      None)
            out = operate(scheduler, 'users', *secrets['operator'])[1]
            assert 'alice' in out and 'bob' in out and 'PAST CPUS' in out
            # Other limits, and a file that makes no sense
            reload(json.dumps({'limit': ['alice=cpus:4'], 'share': ['bob=3'], 'half-life': 1}))
            eventually(lambda: counts('alice') == [('alice', 4, 1, 1)])
            for wrong in ('{"limit": ["alice=cpu:9"]}', '{"half-life": 1000}', '{', '{"cpus": 1}'):
                before = scheduler.log().count('are not changed')
                reload(wrong)
                eventually(lambda: scheduler.log().count('are not changed') == before + 1)
            assert 'alice=cpu:9: it must be cpus:N, jobs:N or cpus:N,jobs:N' in scheduler.log()
            assert counts('alice') == [('alice', 4, 1, 1)]
            assert caplog.text.count('(--limit)') == 2     # of each limit once
            # What each is billed
            config.write_text(json.dumps({'limit': ['alice=cpus:4'], 'half-life': 1}))
            gate.open()
            for works in jobs.values():
                assert all(job.wait(30) and job.status == job.Finished for job in works)
            billed = {row['user']: row for row in of('operator', 'history')}
            assert billed['alice']['jobs'] == 5 and billed['bob']['jobs'] == 4
            assert [row['jobs'] for row in of('alice', 'history')] == [5]
            assert billed['bob']['cpu_seconds'] > 0
            stack.close()
            past = {row['user']: row['past_cpus'] for row in of('operator', 'users')}
            assert past['alice'] > 0 and past['bob'] > 0
            assert scheduler.stop() == 0
        # Past use is known to the next, an hour later: half of it counts
        clock.set(3600)
        with SchedulerProcess(directory, *words, env=clock.environment) as scheduler:
            again = {row['user']: row['past_cpus'] for row in of('operator', 'users')}
            for name, cpus in past.items():
                assert again[name] == pytest.approx(cpus / 2, rel=0.05)
            scheduler.stop()


CRASHES = """
import os, sys
import dispy


def double(n, flag):
    import os, time
    while not os.path.exists(flag):
        time.sleep(0.02)
    return 2 * n


cluster = dispy.SharedJobCluster(double, scheduler_port=int(sys.argv[1]), recover_file=sys.argv[2],
                                 secret='the secret of alice, long enough')
job = cluster.submit(21, os.path.abspath('flag'))
while job.status != job.Running:
    pass
os._exit(0)
"""


def test_results_are_given_to_their_user_only(tmp_path):
    """Another who has the recovery file, and with it the key, gets nothing."""
    users = tmp_path / 'users'
    users.mkdir()
    for name in ('alice', 'bob'):
        (users / name).write_text('the secret of %s, long enough' % name)
        (users / name).chmod(0o600)
    (tmp_path / 'crashes.py').write_text(CRASHES)
    with NodeProcess(tmp_path / 'node', '--name', 'lab2') as node:
        words = ('-n', '127.0.0.1:%d' % node.port, '--cluster-secret-file', str(users))
        with SchedulerProcess(tmp_path / 'scheduler', *words) as scheduler:
            path = str(tmp_path / 'recover')
            subprocess.run([sys.executable, 'crashes.py', str(scheduler.port), path],
                           cwd=str(tmp_path), timeout=60, check=True)
            theirs = tmp_path / 'of bob'
            theirs.mkdir()
            for each in tmp_path.glob('recover*'):
                shutil.copy(str(each), str(theirs))
            (tmp_path / 'flag').write_text('')
            job, = dispy.recover_jobs(str(theirs / 'recover'), 3,
                                      secret='the secret of bob, long enough')
            assert job.status == job.Abandoned and job.result is None
            job, = dispy.recover_jobs(path, 60, secret='the secret of alice, long enough')
            assert job.result == 42


@pytest.mark.parametrize('files, text', [
    ({}, 'the secrets of 0 users'), ({'.hidden': 'secret'}, 'the secrets of 0 users'),
    ({'a b': 'secret'}, 'called by letters'), ({'a': 'same', 'b': 'same'}, 'a and b have the same'),
    ({'a': ''}, 'is empty')])
def test_secrets_of_users_that_cannot_be(tmp_path, files, text):
    for name, secret in files.items():
        (tmp_path / name).write_text(secret)
        (tmp_path / name).chmod(0o600)
    with pytest.raises(DispyError, match=text):
        secrets_of_users(str(tmp_path))


def odd(n):
    if n % 2:
        raise ValueError(n)


def test_the_history_of_jobs_outlives_a_new_start_and_is_summed_up(tmp_path):
    directory, users = tmp_path / 'scheduler', two_secrets(tmp_path)
    with NodeProcess(tmp_path / 'node', '--name', 'lab2') as node:
        words = ('-n', '127.0.0.1:%d' % node.port, '--cluster-secret-file', str(users))
        with SchedulerProcess(directory, *words, '--history', '7') as scheduler:
            for name, jobs in (('alice', 700), ('bob', 3)):
                with dispy.SharedJobCluster(odd, scheduler_port=scheduler.port, loglevel=50,
                                            secret='the secret of %s, long enough' % name) as it:
                    for n in range(jobs):
                        it.submit(n)
                    assert it.wait(60)
            scheduler.kill()
        operator = ('--secret-file', str(directory / 'state' / 'operator-secret'))
        with SchedulerProcess(directory, *words, '--history', '7',
                              port=scheduler.port) as scheduler:
            sums = rows(scheduler, 'history', *operator)
            found = [(row['user'], row['jobs'], row['done'], row['failed'], row['cancelled'])
                     for row in sums]
            assert found == [('alice', 700, 350, 350, 0), ('bob', 3, 2, 1, 0)]   # many pages
            assert all(row['cpu_seconds'] >= 0 for row in sums)
            mine = ('--secret-file', str(users / 'bob'))
            assert rows(scheduler, 'history', *mine) == sums[1:]
            assert rows(scheduler, 'history', '--user', 'bob', *operator) == sums[1:]
            jobs = rows(scheduler, 'history', '--by', 'job', *mine)
            found = sorted((job['computation'], job['job'], job['outcome']) for job in jobs)
            assert found == [('odd', 1, 'done'), ('odd', 2, 'failed'), ('odd', 3, 'done')]
            assert {job['node'] for job in jobs} == {'lab2'}
            words_of_sums = ('--by', 'computation', '--by', 'node')
            found = rows(scheduler, 'history', *words_of_sums, *operator)
            assert [row['jobs'] for row in sorted(found, key=lambda row: row['jobs'])] == [3, 700]
            code, out, err = operate(scheduler, 'history', '--csv', '--by', 'user', *mine)
            assert code == 0
            assert out.startswith('user,jobs,done,failed,cancelled,cpu_seconds\nbob,3,')
            code, out, err = operate(scheduler, 'history', '--by', 'day', *operator)
            assert code == 0 and out.split()[:2] == ['DAY', 'JOBS'] and ' 703 ' in out
            assert rows(scheduler, 'history', '--days', '0', *operator) == []
    with SchedulerProcess(directory, *words) as scheduler:
        code, out, err = operate(scheduler, 'history', *operator)
        assert code == 1 and '--history DAYS' in err
    state = State(str(directory / 'state'))
    assert state.history(0, 10 ** 6, 0.0) == (-1, []), 'it is not wanted any more'
    state.close()


def test_the_page_of_a_scheduler_keeps_its_token(tmp_path):
    """Standard error goes to a file that others can read: the token is not in it."""
    directory, tokens = tmp_path / 'scheduler', []
    for words in ((), (), ('--httpd-token-file', str(tmp_path / 'token'))):
        with SchedulerProcess(directory, '-n', '127.0.0.1:9', '--httpd', '0', *words) as scheduler:
            link = directory / 'state' / 'monitor'
            eventually(lambda: 'the link of the monitor is in' in scheduler.log())
            assert '#token' not in scheduler.log()
            assert os.name == 'nt' or os.stat(str(link)).st_mode & 0o777 == 0o600
            base, _, token = link.read_text().split()[-1].partition('#token=')
            tokens.append(token)
            request = urllib.request.Request(base + 'metrics',
                                             headers={'Authorization': 'Bearer ' + token})
            with urllib.request.urlopen(request, timeout=20) as answer:
                text = answer.read().decode()
            assert '\ndispy_up 1\n' in text and 'dispy_scheduler_turns_total' in text
            assert 'dispy_scheduler_jobs_waiting 0' in text
            with urllib.request.urlopen(base + 'healthz', timeout=20) as answer:
                assert answer.read() == b'ok\n'
    assert tokens[0] == tokens[1] != tokens[2] and len(tokens[0]) == 32
    assert (tmp_path / 'token').read_text() == tokens[2]
    (tmp_path / 'token').write_text('short')
    (tmp_path / 'token').chmod(0o600)
    state = str(directory / 'state')
    done = subprocess.run([sys.executable, '-m', 'dispyscheduler', '-p', '0', '--httpd', '0',
                           '--state-dir', state, *words],
                          stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1 and b'--httpd-token-file' in done.stderr


@pytest.mark.skipif(os.name == 'nt', reason='no pseudo terminals here')
def test_the_prompt_of_a_scheduler(tmp_path):
    import pty
    ours, theirs = pty.openpty()
    with NodeProcess(tmp_path / 'node', '--name', 'lab2') as node:
        process = subprocess.Popen(
            [sys.executable, '-m', 'dispyscheduler', '-i', '127.0.0.1', '-p', '0', '--state-dir',
             str(tmp_path / 'state'), '-n', '127.0.0.1:%d' % node.port, '--log-file',
             str(tmp_path / 'log')], stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        os.set_blocking(ours, False)
        said = bytearray()

        def shows(text):
            with contextlib.suppress(BlockingIOError):
                said.extend(os.read(ours, 65536))
            return text in said.decode()

        def nodes_show(text):
            """Whether the table of nodes has that; another is asked for when one has come."""
            tables = said.count(b'NAME  ADDRESS')
            os.write(ours, b'nodes\n')
            eventually(lambda: shows('NAME') and said.count(b'NAME  ADDRESS') > tables)
            return shows(text)
        try:
            eventually(lambda: shows('commands: quit; status, jobs'))
            eventually(lambda: nodes_show('connected'))
            os.write(ours, b'drain lab2 --reason "new disk"\nnodes\n')
            eventually(lambda: shows('new disk (since '))
            os.write(ours, b'drain no-such-node\n')
            eventually(lambda: shows('has no node no-such-node'))
            os.write(ours, b'drain\ncancel "\nwhat?\n\n')
            eventually(lambda: shows('arguments are required') and shows('No closing quotation') and
                       shows('NUMBER  USER'))
            os.write(ours, b'quit\n')
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
            os.close(ours)


def test_what_cannot_be_asked(scheduler_and_node):
    class Scheduler:
        port = scheduler_and_node[0]

    class Nobody:
        port = 9   # no program listens there
    code, out, err = operate(Nobody, 'status')
    assert code == 1 and out == '' and 'cannot be asked' in err
    code, out, err = operate(Scheduler, 'status',
                             environment={'DISPY_SECRET': 'another secret of these tests'})
    assert code == 1 and 'cannot be asked' in err
    code, out, err = operate(Scheduler, 'drain', 'no-such-node')
    assert code == 1 and 'no node no-such-node' in err
    code, out, err = operate(Scheduler, 'cancel', '987654')
    assert code == 1 and '987654' in err
