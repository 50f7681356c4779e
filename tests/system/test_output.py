"""Output and log records of jobs while they run."""

import logging
import os
import sys
import threading
import time

from conftest import eventually


class Heard:
    """An on_output callback that keeps what it is told."""

    def __init__(self):
        self.texts = {}
        self._lock = threading.Lock()

    def __call__(self, job, stream, text):
        with self._lock:
            key = (job.id, stream)
            self.texts[key] = self.texts.get(key, type(text)()) + text


def talk(flag, n=1):
    for k in range(n):
        print('line', k)
    print('to stderr', file=sys.stderr)
    while not os.path.exists(flag):
        time.sleep(0.01)
    print('last')
    return n


def test_output_is_heard_while_the_job_runs_and_whole_by_its_end(make_cluster, tmp_path):
    heard, flag = Heard(), str(tmp_path / 'flag')
    with make_cluster(talk, nodes='local', on_output=heard) as cluster:
        job = cluster.submit(flag)
        eventually(lambda: heard.texts.get((1, 'stdout')) == 'line 0\n'
                   and heard.texts.get((1, 'stderr')) == 'to stderr\n')
        assert not job.wait(0)
        with open(flag, 'w'):
            pass
        assert job(20) == 1
        more = [cluster.submit(flag, n) for n in range(2, 40)]
        assert cluster.wait(20)
        eventually(lambda: all(heard.texts.get((job.id, 'stdout'), '').endswith('last\n')
                               for job in [job, *more]))
    for job in [job, *more]:
        assert (heard.texts[job.id, 'stdout'] == job.stdout
                and heard.texts[job.id, 'stderr'] == job.stderr)
        assert job.stdout.count('line') == job.result


def test_output_of_a_program_is_bytes(make_cluster, tmp_path):
    program = tmp_path / 'program'
    program.write_text('#!/bin/sh\n'
                       'printf "a\\377"; while [ ! -e "$1" ]; do sleep 0.01; done; echo b\n')
    program.chmod(0o755)
    heard, flag = Heard(), tmp_path / 'flag'
    with make_cluster(str(program), nodes='local', on_output=heard) as cluster:
        job = cluster.submit(str(flag))
        eventually(lambda: heard.texts == {(1, 'stdout'): b'a\xff'})
        flag.write_text('')
        assert job(20) == 0
        eventually(lambda: heard.texts == {(1, 'stdout'): b'a\xffb\n'})


def test_a_callback_that_raises_does_no_harm(make_cluster, tmp_path, caplog):
    def hear(job, stream, text):
        raise ValueError('no matter')
    (tmp_path / 'flag').write_text('')
    with make_cluster(talk, nodes='local', on_output=hear) as cluster:
        assert ([job(20) for job in [cluster.submit(str(tmp_path / 'flag'), n) for n in range(5)]]
                == list(range(5)))


def test_log_records_reach_the_clients_logger(make_cluster, caplog):
    def compute(n):
        log = logging.getLogger('my.code')
        log.debug('too fine %d', n)
        log.info('looking at %d', n)
        try:
            1 / 0
        except ZeroDivisionError:
            log.exception('odd')
        return n
    caplog.set_level(logging.INFO, 'dispy')
    with make_cluster(compute, nodes='local', forward_logs=True) as cluster:
        jobs = [cluster.submit_job_id('job-%d' % n, n) for n in range(3)]
        assert [job(20) for job in jobs] == [0, 1, 2]
        records = [record for record in caplog.records if hasattr(record, 'job_id')]
    assert sorted((record.job_id, record.levelname) for record in records) == sorted(
        ('job-%d' % n, level) for n in range(3) for level in ('INFO', 'ERROR'))
    assert any('looking at 2' in record.getMessage() and 'my.code' in record.getMessage()
               for record in records)
    assert sum('ZeroDivisionError' in record.getMessage() for record in records) == 3


def test_without_forwarding_nothing_is_sent(make_cluster, caplog):
    def compute():
        logging.getLogger('my.code').error('only there')
    with make_cluster(compute, nodes='local') as cluster:
        job = cluster.submit()
        job(20)
        assert 'only there' in job.stderr
    assert not [record for record in caplog.records if 'only there' in record.getMessage()]
