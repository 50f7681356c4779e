"""The parts of a cluster: its options and their checks, the book of its jobs, and that no part
keeps a cluster which the program has dropped."""

import gc
import inspect
import math
import threading
import weakref

import pytest

import dispy
from conftest import eventually
from dispy import ClusterOptions, Counts, DispyJob, JobBook, JobState

DEFAULTS = {name: parameter.default
            for name, parameter in inspect.signature(dispy.JobCluster).parameters.items()}


def options(remote=False, **given):
    return ClusterOptions.from_arguments(dict(DEFAULTS, nodes='local', **given), remote)


# -- options ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, value, error', [
    ('dispy_port', 0, ValueError), ('dispy_port', 'x', ValueError),
    ('pulse_interval', 0.05, ValueError),
    ('pulse_interval', math.nan, ValueError), ('ping_interval', 3601, ValueError),
    ('poll_interval', 'soon', ValueError),
    ('max_jobs_per_worker', 1.5, ValueError), ('max_jobs_per_worker', 0, ValueError),
    ('job_status', 1, TypeError),
    ('callback', 'print', TypeError), ('cluster_status', 1, TypeError),
    ('on_output', [], TypeError), ('dest_path', 1, TypeError),
    ('depends', 'file', TypeError), ('depends', 5, TypeError), ('cleanup', 'yes', TypeError),
    ('reentrant', None, TypeError),
    ('forward_logs', 2, TypeError), ('recover_file', 5, TypeError),
    ('recover_file', '', ValueError),
    ('fault_recover', 5, TypeError),
    ('host', 5, TypeError), ('host', ('a', 'b', 'c'), TypeError), ('host', ('a', 0), ValueError)])
def test_a_wrong_option_is_named(name, value, error):
    with pytest.raises(error, match=name):
        options(**{name: value})


@pytest.mark.parametrize('nodes, error',
                         [([1], TypeError), ([('h', 70000)], ValueError), ([''], ValueError)])
def test_wrong_nodes_are_named(nodes, error):
    with pytest.raises(error, match='nodes'):
        ClusterOptions.from_arguments(dict(DEFAULTS, nodes=nodes), False)


def test_options_by_both_names_and_by_default():
    plain = options()
    assert ((plain.pulse, plain.longest_redial, plain.loglevel, plain.probes, plain.specs)
            == (2.0, 30.0, 20, False, []))
    assert (plain.keeps_trail and plain.recover_file is None and plain.counts_failures
            and plain.hosts == [])
    seen = options(callback=print, ip_addr='127.0.0.1', fault_recover='file', node_port=9000,
                   pulse_interval='5', loglevel='ERROR')
    assert ((seen.job_status, seen.hosts, seen.recover_file, seen.port)
            == (print, [('127.0.0.1', 9702)], 'file', 9000))
    assert (seen.pulse, seen.pulse_interval, seen.loglevel) == (5.0, 5.0, 40)
    assert not seen.keeps_trail and not seen.counts_failures
    assert options(recover_file=False).keeps_trail is False
    both = options(job_status=len, callback=print, recover_file='one', fault_recover='two')
    assert both.job_status is len and both.recover_file == 'one'


def test_options_do_not_change():
    with pytest.raises(AttributeError):
        options().port = 1


def test_options_are_checked_before_anything_begins():
    threads = set(threading.enumerate())
    level = dispy.logger.level
    with pytest.raises(TypeError, match='forward_logs'):
        dispy.JobCluster(abs, nodes='local', loglevel=level + 1, forward_logs='no')
    assert dispy.logger.level == level and set(threading.enumerate()) == threads


# -- the book of jobs ------------------------------------------------------------------------------

class Node:
    ip_addr, port, name = '10.0.0.1', 9701, 'n'


def jobs_in(book, count):
    jobs = [DispyJob('c', b'', None, number) for number in range(count)]
    with book.lock:
        for job in jobs:
            book.enter(job)
    return jobs


def test_the_book_counts_jobs():
    book = JobBook()
    jobs = jobs_in(book, 6)
    assert (book.by_state() == Counts(0, 0, 0, 0, 6) and book.progress() == (0, 6)
            and set(book.jobs_owed()) == set(jobs))
    jobs[0].status = DispyJob.Running
    assert book.by_state() == Counts(0, 0, 0, 1, 5)
    for job, state in zip(jobs[:4], (JobState.FINISHED, JobState.TERMINATED, JobState.CANCELLED,
                                     JobState.ABANDONED)):
        job.status = int(state)
        if state is not JobState.FINISHED:
            book.add_failure(job.status)
    book.add_results(jobs[:3], 1, Node, 2.5)
    book.answered(jobs[3:4])
    book.settle(4)
    assert (book.totals() == (6, 1, 2, 1) and book.by_state() == Counts(1, 2, 1, 0, 2)
            and book.progress() == (4, 6))
    assert book.nodes() == {('10.0.0.1', 9701, 'n'): (Node, 3, 2.5)} and book.seconds() == 2.5
    assert book.jobs_owed() and book.all_ended is None
    book.settle(2)
    assert book.all_ended is not None


def test_the_book_is_waited_for():
    book = JobBook()
    assert book.wait(None)
    jobs_in(book, 1)
    assert not book.wait(0.0)
    found = []
    waits = threading.Thread(target=lambda: found.append(book.wait(30)))
    waits.start()
    book.settle(1)
    waits.join(30)
    assert found == [True]


def test_a_job_that_ends_with_a_slice_of_the_wait_is_noticed():
    """It notifies nobody: the slice is over, and the next one has not begun."""
    class Late(threading.Condition):
        slices = 0

        def wait(self, timeout=None):
            self.slices += 1
            if self.slices == 1:
                self.release()
                book.settle(1)
                self.acquire()
                return False
            return super().wait(timeout)
    book = JobBook()
    book.changed = Late(book.lock)
    jobs_in(book, 1)
    assert book.wait(30) and book.changed.slices == 1


def test_callbacks_that_wait_do_not_wait_for_each_other():
    book = JobBook()
    jobs_in(book, 3)
    found = []

    def callback():
        dispy._calling.book = book
        found.append(book.wait(60))
        book.settle(1)
    threads = [threading.Thread(target=callback) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert found == [] and not book.wait(0.0)
    book.settle(1)   # the third one has ended
    for thread in threads:
        thread.join(30)
    assert found == [True, True] and book.wait(0.0)


def test_a_book_that_is_closed_stays_so():
    book = JobBook()
    assert book.close() and not book.close() and book.closed


# -- the cluster and its parts ---------------------------------------------------------------------

def test_no_part_keeps_a_cluster():
    """It is freed as soon as the program has dropped it and it is closed, without the garbage
    collector."""
    cluster = dispy.JobCluster(abs, nodes='local', job_status=lambda job: None,
                               cluster_status=lambda *told: None)
    core = dispy.core_of(cluster)
    assert core.cluster is cluster and cluster.submit(-1)(60) == 1
    parts = (core.book, core.callbacks, core.live_output, core.delivery, core.submitter, core.nodes,
             core.report, core.takeover)
    assert [part for part in parts if core in vars(part).values()
            or cluster in vars(part).values()] == []
    refs = weakref.ref(cluster), weakref.ref(core)
    cluster.close()
    gc.disable()
    try:
        del cluster, core, parts
        eventually(lambda: [ref() for ref in refs] == [None, None])
    finally:
        gc.enable()


def test_a_cluster_that_is_dropped_is_closed_when_its_jobs_have_ended(tmp_path):
    release = str(tmp_path / 'release')

    def hold(path):
        import os
        import time
        while not os.path.exists(path):
            time.sleep(0.02)
        return path
    cluster = dispy.JobCluster(hold, nodes='local')
    core = dispy.core_of(cluster)
    job = cluster.submit(release)
    eventually(lambda: job.status == DispyJob.Running)
    del cluster
    assert not core.is_idle() and core.cluster is not None
    open(release, 'w').close()
    assert job(60) == release
    eventually(lambda: core.closed and core.cluster is None)
