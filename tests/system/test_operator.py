"""`python -m dispyscheduler status | jobs | nodes | cancel | drain | resume`: a scheduler that runs
is asked, and gets orders."""

import json
import os
import subprocess
import sys

import dispy
from conftest import eventually
from nodes import NodeProcess, SchedulerProcess


def wait_for(path):
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


def test_what_cannot_be_asked(scheduler_and_node):
    class Scheduler:
        port = scheduler_and_node[0]

    class Nobody:
        port = 9   # nothing listens there
    code, out, err = operate(Nobody, 'status')
    assert code == 1 and out == '' and 'cannot be asked' in err
    code, out, err = operate(Scheduler, 'status',
                             environment={'DISPY_SECRET': 'another secret of these tests'})
    assert code == 1 and 'cannot be asked' in err
    code, out, err = operate(Scheduler, 'drain', 'no-such-node')
    assert code == 1 and 'no node no-such-node' in err
    code, out, err = operate(Scheduler, 'cancel', '987654')
    assert code == 1 and '987654' in err
