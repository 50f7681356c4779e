"""The parts of a node's state by themselves: timers, CPUs, the lease, fair shares, and what is
known of past attempts."""

import math
import threading

import pytest

from dispynode import (
    CREDIT_TIME, PAST_TIME, STACKS_SIGNAL, Attempt, Cpus, FairShare, SpoolFound, StackFile, Forget,
    Lease, NodeLease, NodeTables, AttemptHistory, PastAttempts, Remember, Remembered, Timers,
    UndeliveredResults)
from dispynode import _Computation as Computation, _Worker as Worker
from talk_node import spec


def due(timers, now):
    """Carry out the timers that are due."""
    while timers.next_at <= now:
        timer = timers.pop()
        timer.call(*timer.args, now)


# -- timers ----------------------------------------------------------------------------------------

def test_timers_are_due_in_order_of_time_and_then_as_they_were_set():
    timers, calls = Timers(), []

    def call(name, now):
        calls.append((name, now))
    for when, name in ((2.0, 'late'), (1.0, 'first'), (1.0, 'second')):
        timers.at(when, 'c', call, name, is_wanted=bool)
    assert timers.next_at == 1.0
    due(timers, 1.5)
    assert calls == [('first', 1.5), ('second', 1.5)] and timers.next_at == 2.0
    due(timers, 2.0)
    assert calls[2:] == [('late', 2.0)] and timers.next_at == math.inf and not len(timers)


def test_a_timer_may_set_another_that_is_due_in_the_same_turn():
    timers, calls = Timers(), []

    def again(left, now):
        calls.append(left)
        if left:
            timers.at(now, 'c', again, left - 1, is_wanted=lambda left: True)
    timers.at(1.0, 'c', again, 3, is_wanted=lambda left: True)
    due(timers, 1.0)
    assert calls == [3, 2, 1, 0]


# -- CPUs ------------------------------------------------------------------------------------------

def test_cpus_that_are_in_use_are_counted_when_their_number_changes():
    cpus = Cpus(4)
    cpus.free -= 3
    cpus.resize([6, 2])
    assert (cpus.total, cpus.free, cpus.most) == (6, 3, 6)
    cpus.offered = 1
    cpus.resize([])
    assert (cpus.total, cpus.free, cpus.most) == (1, -2, 6), 'jobs that run go on'


# -- the lease -------------------------------------------------------------------------------------

def test_a_lease_from_its_beginning_to_its_end():
    lease = NodeLease(0, False)
    assert lease.held_by(5.0) == '' and not lease.is_of_another(b'you')
    lease.take(b'me', 'me@here', 5.0)
    assert (lease.state, lease.held_by(7.0)) == (Lease.HELD, 'me@here for 2 s')
    assert lease.is_of_another(b'you') and not lease.is_of_another(b'me')
    lease.orphan()
    assert lease.held_by(8.0) == 'me@here for 3 s; its connection is lost'
    lease.take(b'me', 'me@back', 9.0)
    assert lease.held_by(9.0) == 'me@back for 4 s', 'it began when it was free last'
    lease.end()
    assert (lease.state, lease.holder, lease.served) == (Lease.FREE, None, 1)


def test_links_that_were_refused_are_told_once():
    lease = NodeLease(0, False)
    for link in (1, 2, 3):
        lease.refuse(link)
    lease.forget_link(2)
    assert lease.take_refused() == {1, 3} and lease.take_refused() == set()


def test_one_from_which_the_node_was_taken_waits_unless_another_has_had_it():
    lease = NodeLease(0, False)
    lease.take(b'me', 'me', 0.0)
    lease.cool_down(10.0)
    lease.end()
    assert lease.is_cooling_down(b'me', 9.0) and not lease.is_cooling_down(b'you', 9.0)
    assert not lease.is_cooling_down(b'me', 10.0)
    lease.take(b'you', 'you', 1.0)
    assert not lease.is_cooling_down(b'me', 2.0)


@pytest.mark.parametrize('serve, client_shutdown, asked, last', [
    (0, False, False, [False, False]), (2, False, False, [False, True]),
    (0, True, True, [True, True]), (0, False, True, [False, False])])
def test_after_which_lease_a_node_ends(serve, client_shutdown, asked, last):
    lease, found = NodeLease(serve, client_shutdown), []
    for _ in range(2):
        lease.take(b'me', 'me', 0.0)
        if asked:
            assert lease.make_last() is client_shutdown
        lease.end()
        found.append(lease.was_last())
    assert found == last


# -- who is next -----------------------------------------------------------------------------------

def computation(tables, name, client, running=(), now=0.0):
    """One that has a waiting attempt, and workers that run jobs of these CPUs since the
    beginning."""
    comp = Computation(name, b'me', 1, spec(client=client))
    tables.comps[name] = comp
    waiting = Attempt(999, b'', None, comp)
    comp.attempts[999] = waiting
    comp.enqueue(waiting)
    for key, cpus in enumerate(running, 1):
        worker = comp.workers[key] = Worker(key, comp)
        worker.queue.append(Attempt(key, b'', {'cpus': cpus}, comp))
        worker.since = now
        comp.attempts[key] = worker.queue[0]
    return comp


def shared(*rows):
    """Computations that share a node of four CPUs; none is new."""
    tables = NodeTables('n')
    share, comps = FairShare(tables, Cpus(4)), []
    for name, client, running in rows:
        comp = computation(tables, name, client, running)
        del tables.comps[name]
        share.joins(comp)
        tables.comps[name] = comp
        comp.own.fresh = comp.client.fresh = False
        comps.append(comp)
    return share, comps


def test_the_next_cpu_is_for_who_will_have_used_less():
    share, (much, little) = shared(('a', 'one', (1, 2)), ('b', 'two', (1,)))
    share.reckon(10.0)
    behind = 30.0 - 4 * CREDIT_TIME   # who has had much less gets so much back at most
    assert ((much.client.reckoned, little.client.reckoned)
            == (60.0, behind + 10.0)), 'a job runs for as long again as it has run'
    assert share.first([much, little]) is little
    share, (first, second) = shared(('a', 'one', (1,)), ('b', 'two', (1,)))
    share.charge(first, 5.0)
    share.reckon(10.0)
    assert share.first([first, second]) is second


def test_computations_of_one_client_share_its_part():
    share, (first, second, other) = shared(('a', 'one', (1,)), ('b', 'one', ()), ('c', 'two', ()))
    assert first.client is second.client is not other.client
    share.reckon(10.0)
    assert share.first([first, second]) is second
    assert share.first([first, second, other]) is other


def test_one_that_has_come_is_next_and_claims_nothing_of_what_others_used():
    share, (old, new) = shared(('a', 'one', (1,)), ('b', 'two', ()))
    new.own.fresh = new.client.fresh = True
    share.charge(old, 100.0)
    share.reckon(10.0)
    assert share.first([old, new]) is new
    share.began(new, 1, 10.0)
    assert new.client.used >= 100.0 and not new.client.fresh


# -- what is known of past attempts, and results on the disk ---------------------------------------

def test_what_is_known_of_past_attempts_is_written_down_and_ends_with_its_time():
    tables, timers = NodeTables('n'), Timers()
    past = PastAttempts(tables, timers)
    past.on_remembered(Remembered('c', AttemptHistory(lost=frozenset([1]))), 0.0)
    past.add('c', AttemptHistory(unbegun=frozenset([2])))
    both = AttemptHistory(lost=frozenset([1]), unbegun=frozenset([2]))
    assert (tables.actions == [Remember('c', both)] and past.row('c') == both.row()
            and past.row('d') == ())
    tables.actions.clear()
    due(timers, PAST_TIME)
    assert tables.actions == [Remember('c', AttemptHistory())] and past.row('c') == ()
    past.forget('c')
    assert len(tables.actions) == 1, 'there is nothing to forget'


def test_results_on_the_disk_are_given_up_after_their_time_and_that_is_known():
    tables, timers = NodeTables('n'), Timers()
    past = PastAttempts(tables, timers)
    results = UndeliveredResults(tables, timers, past, 100.0)
    results.on_found(SpoolFound('c', b'me', [1, 2], 50.0), 0.0)
    assert results.spooled_of(b'me') == ['c'] and results.spooled_of(b'you') == []
    assert results.spooled_serials('c') == {1, 2} and results.known_attempts('c') == [1, 2]
    results.give_to('c', b'you')
    assert results.spooled_of(b'you') == ['c']
    due(timers, 49.0)
    assert not tables.actions
    due(timers, 50.0)
    assert Forget('c') in tables.actions and results.known_attempts('c') == []
    assert AttemptHistory.of(past.row('c')).given_up == {1, 2}


@pytest.mark.skipif(not STACKS_SIGNAL, reason='this system has no signal for it')
def test_stacks_are_read_to_the_end_of_a_line(tmp_path):
    """The process that writes them loses its CPU within a line of ours."""
    stacks = StackFile(str(tmp_path), 7)
    path = tmp_path / 'stacks-7'
    path.write_text('Thread 1:\n  File "job.py", line 3 in work\n  File "/x/dispynode.py", line ')

    def go_on():
        with open(path, 'a') as file:
            file.write('9 in _run\n  File "/x/dispynode.py", line 8 in serve\n')
    timer = threading.Timer(0.05, go_on)
    timer.start()
    text = stacks._written(0)
    timer.join()
    assert text == 'Thread 1:\n  File "job.py", line 3 in work\n'
