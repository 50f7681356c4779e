"""Several users at one scheduler: what each is limited to, sees, cancels and is billed, and what
they have used over the past."""

import contextlib
import json
import signal
import sys

import pytest

import dispy
from conftest import eventually
from nodes import Clock, NodeProcess, SchedulerProcess
from scenes import Gate, hold
from test_operator import operate, rows, two_secrets


def of_alice(path, name):
    return hold(path, name)


def of_bob(path, name):
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
        return [(row['user'], row['running'], row['waiting'], row['limited'])
                for row in of(name, 'status')]

    with NodeProcess(tmp_path / 'node', '--name', 'lab', cpus=8) as node, \
            contextlib.ExitStack() as stack:
        words = ('-n', '127.0.0.1:%d' % node.port, '--cluster-secret-file', str(users), '--config',
                 str(config), '--daemon', '--history', '7')
        with SchedulerProcess(directory, *words, env=clock.environment) as scheduler:
            jobs = {}
            for name, job_of, count in (('alice', of_alice, 5), ('bob', of_bob, 4)):
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
            assert 'alice=cpu:9: cpus:N, jobs:N or cpus:N,jobs:N is wanted' in scheduler.log()
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
