"""Schedule: which job goes where. Tables of events and actions, then a random walk with
invariants."""

import collections

import pytest

from conftest import walk_seeds
from dispy import (
    AHEAD_A_TURN, AHEAD_BYTES, ENDED, JOB_TABLE, MAX_ATTEMPTS, RETURN_APART, Account, CancelAsked,
    Closed, JobEnded, JobFailedOnce, JobParked, JobState, JobStays, JobWaits, JobsEnded, JobsHeld,
    LimitNode, NodeAway, NodeGone, NodeLeft, NodeLost, NodeOffers, NodeReady, NodeResults,
    NodeReturned, NodeStarted, NodeTold, Opened, Repeat, RepeatNot, Repeats, RulesChanged, Schedule,
    SendAck, SendCancel, SendJobs, SendRecall, Submitted, UserRule, UserRules, WithdrawAsked,
    Withdrawn, cpus_of, move_job)
from dispynode import Outcome
from talk_schedule import Talk, counts, job, jobs, only, row, sent
from walk_schedule import Walk


# -- order -----------------------------------------------------------------------------------------

def test_jobs_go_in_the_order_of_submission():
    talk, works = Talk(), jobs(3)
    talk.ready('n')
    talk.learn(1.0)
    assert sent(talk.submit(works)) == works[:1]
    assert sent(talk.results('n', works[:1])) == works[1:2]
    assert sent(talk.results('n', works[1:2])) == works[2:]


def test_jobs_wait_for_a_node_and_leave_in_one_batch():
    talk, works = Talk(), jobs(4)
    assert talk.submit(works[:3]) == [] and talk.submit(works[3:]) == []
    assert talk.ready('n', 4) == [SendJobs('n', 'c', works)]


def test_higher_priorities_go_first_then_the_order_of_submission():
    talk = Talk()
    low, plain, high, higher, same = (job(priority=-1), job(), job(priority=2), job(priority=3),
                                      job(priority=2))
    talk.submit([low, plain, high, higher, same])
    assert sent(talk.ready('n', 5)) == [higher, high, same, plain, low]


def test_a_late_job_of_high_priority_overtakes_what_waits():
    talk, works, urgent = Talk(), jobs(5), job(priority=9)
    talk.ready('n')
    talk.learn(1.0)
    talk.submit(works)
    talk.submit([urgent])
    assert sent(talk.results('n', works[:1])) == [urgent]


# -- spreading -------------------------------------------------------------------------------------

def test_idle_cpus_of_all_nodes_come_before_queues():
    talk = Talk()
    talk.ready('a', 2)
    talk.ready('b', 3)
    assert counts(talk.submit(jobs(5))) == {'a': 2, 'b': 3}


def test_one_frame_a_node_and_turn():
    talk = Talk()
    talk.ready('a', 2)
    talk.ready('b', 2)
    actions = talk.submit(jobs(8))
    assert len(only(actions, SendJobs)) == 2
    assert counts(actions) == {'a': 4, 'b': 4}


def test_queues_on_nodes_are_filled_evenly():
    # The share of a node is taken from what is left, so that the first node gets more than the
    # last.
    talk = Talk()
    for name in 'abcd':
        talk.ready(name, 2)
        talk.learn(0.001, node=name, times=100)
    assert counts(talk.submit(jobs(40))) == {'a': 10, 'b': 10, 'c': 10, 'd': 10}


@pytest.mark.parametrize('took, most, why', [
    (None, 8, 'unknown: one more a CPU'), (1.0, 4, 'long: nothing beyond the CPUs'),
    (0.11, 4, 'long enough'),   # 0.1 is at the edge: sum() rounds more exactly since Python 3.12
    (0.05, 12, 'two of 50 ms a CPU are 100 ms'), (0.01, 44, 'ten of 10 ms'),
    (0.001, 404, 'a hundred of 1 ms'),
    (1e-5, 4 * 513, 'never more than AHEAD_MOST'),
])
def test_depth_by_length_of_jobs(took, most, why):
    talk = Talk()
    talk.ready('n', 4)
    if took is not None:
        talk.learn(took, times=5000)
    got = len(sent(talk.submit(jobs(20000))))
    assert most - 4 <= got <= most, why   # a float may round one less a CPU
    assert got >= 4


def test_short_jobs_become_long():
    """The estimate is quick to rise: a few long ones, and the queue is shallow again."""
    talk, works = Talk(), jobs(2000)
    talk.ready('n')
    talk.learn(0.001, times=500)
    first = sent(talk.submit(works))
    assert len(first) > 90
    talk.results('n', first[:1], took=2.0)
    assert sent(talk.results('n', first[1:-1], took=2.0)) == []
    assert len(sent(talk.results('n', first[-1:], took=2.0))) <= 1


def test_a_node_is_not_given_more_bytes_ahead_than_the_bound():
    talk = Talk()
    talk.ready('n')
    talk.learn(0.001, times=500)
    size = AHEAD_BYTES // 4
    # A range has a length and takes no memory
    works = [job(payload=range(size)) for _ in range(50)]
    assert len(sent(talk.submit(works))) == 5
    assert talk.schedule.nodes['n'].bytes == 5 * size


def test_jobs_that_are_sent_ahead_together_keep_their_order():
    talk = Talk()
    talk.ready('n')
    talk.learn(0.001, times=500)
    works = [job(**({'timeout': 5.0} if number in (3, 4, 30) else {})) for number in range(300)]
    talk.tell(Submitted(works), CancelAsked(works[1]), CancelAsked(works[7]))
    node, comp = talk.schedule.nodes['n'], talk.schedule.comps['c']
    there = list(node.in_flight['c'].values())
    left = [work for work in works if work not in (works[1], works[7])]
    assert 90 < len(there) < 200 and there == left[:len(there)]
    assert comp.queue.length == len(left) - len(there) and list(comp.queue) == left[len(there):]
    assert len({work.serial for work in there}) == len(there) == node.used == comp.cpus_in_flight
    assert {work.serial for work in there} == set(comp.running)
    assert node.bytes == sum(len(work.payload) for work in there)
    assert {work.state for work in there} == {JobState.SENT}


def test_jobs_that_are_larger_than_the_bound_run_one_a_cpu():
    talk = Talk()
    talk.ready('n', 2)
    works = [job(payload=range(AHEAD_BYTES + 1)) for _ in range(5)]
    assert sent(talk.submit(works)) == works[:2]
    assert sent(talk.results('n', works[:1])) == works[2:3]


def test_the_bound_on_bytes_leaves_no_cpu_idle():
    # Node a is passed over while the wide job is first in line; when b has taken that, a's CPU must
    # be filled.
    talk, large = Talk(), job(payload=range(AHEAD_BYTES + 1))
    talk.ready('a', 2)
    talk.submit([large])
    wide, narrow = job(cpus=2), job()
    actions = talk.tell(Submitted([wide, narrow]), NodeReady('b', 'c', 2, []))
    assert sent(actions, 'b') == [wide] and sent(actions, 'a') == [narrow]


# -- jobs of several CPUs --------------------------------------------------------------------------

def test_jobs_of_several_cpus_count_as_such():
    talk = Talk()
    talk.ready('n', 4)
    talk.learn(1.0)
    works = jobs(4, cpus=2)
    assert sent(talk.submit(works)) == works[:2]
    assert talk.schedule.nodes['n'].used == talk.schedule.comps['c'].cpus_in_flight == 4
    assert sent(talk.results('n', works[:1])) == works[2:3]


def test_a_job_wider_than_a_node_goes_to_a_larger_one():
    talk, wide = Talk(), job(cpus=4)
    talk.ready('small', 2)
    talk.learn(1.0, node='small')
    talk.ready('large', 4)
    assert sent(talk.submit([wide]), 'large') == [wide]


def test_a_job_wider_than_every_node_is_told_of_and_does_not_stop_those_behind_it():
    talk = Talk()
    talk.ready('n', 2)
    wide, narrow = job(cpus=3), job()
    actions = talk.submit([wide, narrow])
    assert narrow in sent(actions)
    parked, = only(actions, JobParked)
    assert parked.work is wide and '3 CPUs' in parked.text and 'more than 2' in parked.text
    assert sent(talk.ready('large', 4), 'large') == [wide]


def test_a_parked_job_can_be_cancelled():
    talk, wide = Talk(), job(cpus=3)
    talk.ready('n', 2)
    talk.submit([wide])
    ended, = only(talk.tell(CancelAsked(wide)), JobEnded)
    assert ended.work is wide and talk.ready('large', 4) == []


def test_jobs_for_one_node_wait_for_it_and_go_first():
    talk = Talk()
    talk.ready('a', 1)
    pinned, other = job(node='b'), job()
    assert sent(talk.submit([pinned, other])) == [other]
    talk.ready('b', 1)
    assert (pinned.state is JobState.SENT
            and talk.schedule.nodes['b'].in_flight['c'] == {pinned.serial: pinned})
    more = [job(node='b'), job(node='b')]
    talk.submit(more)
    assert all(work in talk.schedule.comps['c'].waiting() or work.state is JobState.SENT
               for work in more)
    assert not only(talk.ready('d', 4),
                    SendRecall), 'what is for one node is not called back for another'
    ended = only(talk.tell(Closed('c')), JobEnded)
    assert {action.work for action in ended} == {pinned, other, *more}


def test_a_cancelled_job_for_one_node():
    talk, pinned = Talk(), job(node='b')
    talk.submit([pinned])
    assert [action.work for action in only(talk.tell(CancelAsked(pinned)), JobEnded)] == [pinned]
    assert talk.ready('b', 1) == []


# -- results ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('outcome, state', [
    (Outcome.RETURNED, JobState.FINISHED), (Outcome.RETURNED_CODE, JobState.FINISHED),
    (Outcome.RAISED, JobState.TERMINATED), (Outcome.DIED, JobState.TERMINATED),
    (Outcome.TIMED_OUT, JobState.TERMINATED), (Outcome.CANCELLED, JobState.CANCELLED)])
def test_what_becomes_of_a_job(outcome, state):
    talk, work = Talk(), job()
    talk.ready('n')
    talk.submit([work])
    result = row(work, outcome)
    assert talk.tell(NodeResults('n', 'c', [result])) == [
        SendAck('n', 'c', [work.serial]), JobsEnded('n', 'c', [(work, result)])]
    assert work.state is state


def test_a_result_that_comes_twice_is_acknowledged_and_dropped():
    talk, work = Talk(), job()
    talk.ready('n')
    talk.submit([work])
    talk.results('n', [work])
    assert talk.results('n', [work], outcome=Outcome.RAISED) == [SendAck('n', 'c', [work.serial])]
    assert work.state is JobState.FINISHED


def test_provisional_results_and_the_end_in_one_message_keep_their_order():
    talk, work = Talk(), job()
    talk.ready('n')
    talk.submit([work])
    rows = [row(work, Outcome.PROVISIONAL), row(work, Outcome.PROVISIONAL), row(work), row(work),
            row(work, Outcome.PROVISIONAL)]
    told, = only(talk.tell(NodeResults('n', 'c', rows)), JobsEnded)
    assert told.pairs == [(work, row) for row in rows[:3]]   # what comes after the end is dropped
    assert work.state is JobState.FINISHED and not talk.schedule.nodes['n'].used


def test_a_result_that_comes_after_the_job_went_elsewhere_is_acknowledged_and_dropped():
    talk, work = Talk(), job()
    talk.ready('a')
    talk.submit([work])
    late = row(work)
    talk.ready('b')
    talk.tell(NodeLost('a', 'host-a', 'broken'))
    talk.ready('a', held=[late[0]])
    assert talk.tell(NodeResults('a', 'c', [late])) == [SendAck('a', 'c', [late[0]])]
    assert work.state is JobState.SENT
    assert only(talk.results('b', [work]), JobsEnded)


@pytest.mark.parametrize('node, comp, actions',
                         [('n', 'closed', []), ('unknown', 'c', [SendAck('unknown', 'c', [1])])])
def test_results_of_what_is_not_known_change_nothing(node, comp, actions):
    talk = Talk()
    talk.ready('n')
    assert talk.tell(NodeResults(node, comp, [(1, 1, 0.0, 1.0, b'', b'', b'')])) == actions
    assert talk.tell(NodeReturned(node, comp, [1])) == []


def test_a_result_with_an_unknown_outcome_leaves_the_books_in_order():
    # The row comes off the wire; whatever is raised, the job may not be lost from all places.
    talk, work = Talk(), job()
    talk.ready('n')
    talk.submit([work])
    with pytest.raises(Exception):
        talk.tell(NodeResults('n', 'c', [(work.serial, 99, 0.0, 1.0, b'', b'', b'')]))
    assert work.serial in talk.schedule.nodes['n'].in_flight['c']


# -- cancel ----------------------------------------------------------------------------------------

def test_cancel_before_it_was_sent():
    talk, works = Talk(), jobs(2)
    talk.submit(works)
    assert (talk.tell(CancelAsked(works[0]))
            == [JobEnded(works[0], 'cancelled before it was started')])
    assert talk.schedule.comps['c'].queue.length == 1
    assert sent(talk.ready('n')) == works[1:]


def test_cancel_while_it_is_on_a_node():
    talk, work = Talk(), job()
    talk.ready('n')
    talk.submit([work])
    assert talk.tell(CancelAsked(work)) == [SendCancel('n', 'c', [work.serial])]
    assert work.state is JobState.CANCELLING
    assert talk.tell(CancelAsked(work)) == [], 'asked twice'
    talk.results('n', [work], outcome=Outcome.CANCELLED)
    assert work.state is JobState.CANCELLED
    assert talk.tell(CancelAsked(work)) == [], 'it has ended'


@pytest.mark.parametrize('outcome, state', [
    (Outcome.RETURNED, JobState.FINISHED), (Outcome.RAISED, JobState.TERMINATED),
    (Outcome.CANCELLED, JobState.CANCELLED),
    (Outcome.STOPPED, JobState.CANCELLED)])
def test_a_job_may_end_otherwise_before_the_cancel_arrives(outcome, state):
    talk, work = Talk(), job()
    talk.ready('n')
    talk.submit([work])
    talk.tell(CancelAsked(work))
    actions = talk.results('n', [work], outcome=outcome)
    assert work.state is state
    assert len(only(actions, JobsEnded) + only(actions, JobEnded)) == 1


@pytest.mark.parametrize('event', [NodeReturned('n', 'c', [(1 << 16) + 1]),
                                   NodeReady('n', 'c', 1, []), NodeLost('n', 'host', 'broken'),
                                   NodeLeft('n', 'c', 'host', 'left')])
def test_a_job_that_is_being_cancelled_is_not_sent_again(event):
    talk, work = Talk(), job()
    talk.ready('n')
    talk.submit([work])
    talk.tell(CancelAsked(work))
    actions = talk.tell(event)
    assert [action.work for action in only(actions, JobEnded)] == [work] and not sent(actions)
    assert work.state is JobState.CANCELLED


def test_cancel_of_one_that_waits_again():
    talk, work = Talk(), job()
    talk.ready('n')
    talk.submit([work])
    talk.tell(NodeLost('n', 'host', 'broken'))
    assert work.state is JobState.REQUEUED
    assert talk.tell(CancelAsked(work)) == [JobEnded(work, 'cancelled before it was started')]
    assert talk.ready('n') == []


def test_a_cancel_that_was_lost_with_the_link_is_sent_again():
    # The node holds the attempt and never heard of the cancel: it would run to its end.
    talk, work = Talk(), job()
    talk.ready('n')
    talk.submit([work])
    talk.tell(CancelAsked(work))
    assert talk.ready('n', held=[work.serial]) == [SendCancel('n', 'c', [work.serial])]


# -- nodes come and go -----------------------------------------------------------------------------

def test_reentrant_jobs_of_a_lost_node_go_first_elsewhere_and_in_order():
    # They are put back one before the other, which turns their order round.
    talk, works = Talk(), jobs(6)
    talk.ready('a', 3)
    talk.learn(1.0, node='a')
    talk.submit(works)
    assert ({action.work for action in talk.tell(NodeLost('a', 'host-a', 'broken'))}
            == set(works[:3]))
    assert sent(talk.ready('b', 6)) == works


def test_jobs_that_are_not_reentrant_are_abandoned_with_the_name_of_the_node():
    talk, work = Talk(reentrant=False), job()
    talk.ready('n')
    talk.submit([work])
    ended, = talk.tell(NodeLost('n', 'host:9701', 'no sign of life'))
    assert ended.work is work and work.state is JobState.ABANDONED
    for part in ('abandoned', 'lost with node host:9701', 'no sign of life', 'not reentrant'):
        assert part in ended.text


def test_a_job_is_given_up_after_three_nodes():
    talk, work = Talk(), job()
    talk.submit([work])
    for name in 'ab':
        assert sent(talk.ready(name)) == [work]
        assert talk.tell(NodeLost(name, 'host-' + name, 'broken')) == [JobWaits(work)]
    talk.ready('c')
    ended, = talk.tell(NodeLost('c', 'host-c', 'broken'))
    assert work.state is JobState.ABANDONED
    assert 'host-a, host-b, host-c' in ended.text and 'given up after 3 nodes' in ended.text


def test_a_node_that_is_started_again_and_again_is_one_node_until_it_is_too_often():
    talk, work = Talk(), job()
    talk.submit([work])
    for _ in range(MAX_ATTEMPTS - 1):
        assert sent(talk.ready('a')) == [work]
        assert talk.tell(NodeLost('a', 'host-a', 'broken')) == [JobWaits(work)]
    talk.ready('a')
    ended, = talk.tell(NodeLost('a', 'host-a', 'broken'))
    assert 'lost with node host-a (broken); given up after 16 attempts' in ended.text


def test_a_stopped_attempt_of_a_reentrant_computation_goes_elsewhere():
    talk, work = Talk(), job()
    talk.ready('a')
    talk.submit([work])
    serial = work.serial
    talk.ready('b')
    actions = talk.results('a', [work], outcome=Outcome.STOPPED)
    assert only(actions, SendAck) == [SendAck('a', 'c', [serial])] and not only(actions, JobsEnded)
    assert sent(actions) == [work] and work.serial > serial


def test_nothing_is_sent_to_a_node_that_is_being_stopped():
    # It would come back as Returned, be sent again, and so on until the link ends.
    talk, work = Talk(), job()
    talk.ready('a')
    talk.submit([work])
    assert not sent(talk.results('a', [work], outcome=Outcome.STOPPED), 'a')


def test_a_stopped_attempt_that_is_not_reentrant_is_abandoned():
    talk, work = Talk(reentrant=False), job()
    talk.ready('n')
    talk.submit([work])
    ended, = only(talk.results('n', [work], outcome=Outcome.STOPPED), JobEnded)
    assert (work.state is JobState.ABANDONED and 'lost with node n' in ended.text
            and 'stopped' in ended.text)


def test_a_node_that_leaves_a_computation_keeps_the_others():
    talk, mine, other = Talk('c', 'd'), job('c'), job('d')
    talk.ready('n', 2)
    talk.ready('n', 2, 'd')
    talk.submit([mine, other])
    talk.tell(NodeLeft('n', 'c', 'host', 'setup failed'))
    assert mine.state is JobState.REQUEUED and other.state is JobState.SENT
    assert talk.tell(NodeLeft('n', 'c', 'host', 'again'), NodeLeft('unknown', 'c', 'x', 'y')) == []
    assert talk.schedule.nodes['n'].used == 1


def test_a_node_that_is_lost_twice_or_was_never_known():
    talk = Talk()
    talk.ready('n')
    assert talk.tell(NodeLost('n', 'host', 'broken'), NodeLost('n', 'host', 'broken'),
                     NodeLost('x', 'x', 'x')) == []
    assert not talk.schedule.nodes


def test_attempts_that_never_arrived_are_sent_again_and_in_order():
    talk, works = Talk(reentrant=False), jobs(5)
    talk.ready('n', 5)
    talk.submit(works)
    old = [work.serial for work in works]
    assert sent(talk.ready('n', 5, held=old[:2])) == works[2:]
    assert [work.serial for work in works] == old[:2] + [serial + 1 for serial in old[2:]]


def test_cpus_of_a_node_may_change():
    talk, works = Talk(), jobs(9)
    talk.ready('n', 1)
    talk.learn(1.0)
    talk.submit(works)
    assert sent(talk.ready('n', 3, held=[works[0].serial])) == works[1:3]


def test_serials_tell_the_job_and_the_attempt():
    talk, works = Talk(), jobs(2)
    talk.ready('n', 2)
    talk.submit(works)
    assert [(work.serial >> 16, work.serial & 0xffff) for work in works] == [(1, 1), (2, 1)]
    talk.tell(NodeLost('n', 'host', 'broken'))
    talk.ready('n', 2)
    assert sorted((work.serial >> 16, work.serial & 0xffff) for work in works) == [(1, 2), (2, 2)]


# -- recall ----------------------------------------------------------------------------------------

def recall_scene(**options):
    """Node a runs one and holds one more; b comes and is idle."""
    talk, works = Talk(), jobs(2, **options)
    talk.ready('a', options.get('cpus', 1))
    assert sent(talk.submit(works)) == works
    return talk, works


def test_what_waits_on_one_node_is_called_back_for_an_idle_other():
    talk, works = recall_scene()
    assert talk.ready('b') == [SendRecall('a', 'c', [works[1].serial])]
    assert talk.tell() == [], 'asked once'
    assert talk.tell(NodeReturned('a', 'c', [works[1].serial])) == [JobWaits(works[1]),
                                                                    SendJobs('b', 'c', works[1:])]


def test_no_endless_recall_when_nothing_comes_back():
    talk, works = recall_scene()
    talk.ready('b')
    for _ in range(5):
        assert talk.tell(NodeReturned('a', 'c', [])) == []


def test_no_endless_recall_of_what_does_not_fit_the_idle_node():
    # The wide job comes back, fits on a only, goes there, is called back again ...; at the speed of
    # the wire.
    talk, works = recall_scene(cpus=2)
    actions = talk.ready('b', 1)
    for turn in range(10):
        if not actions:
            return
        assert turn < 4, 'recalled again and again'
        serials = [works[1].serial] if only(actions, SendRecall) else []
        actions = talk.tell(NodeReturned('a', 'c', serials)) if serials else talk.tell()


def test_a_recall_that_was_lost_with_the_link_is_sent_again():
    # The computation stays marked as recalled, though nobody will answer.
    talk, works = recall_scene()
    talk.ready('b')
    held = [work.serial for work in works]
    assert talk.ready('a', held=held) == [SendRecall('a', 'c', held[1:])]


def test_recalled_jobs_keep_their_order():
    # A node gives back its last ones, last first.
    talk, works = Talk(), jobs(8)
    talk.ready('a', 4)
    talk.submit(works)
    talk.ready('b', 4)
    assert (sent(talk.tell(NodeReturned('a', 'c', [work.serial for work in works[:3:-1]])))
            == works[4:])


def test_idle_cpus_are_used_although_another_client_waits_for_a_node():
    # Jobs of d wait for a node of their own; that must not keep c's jobs where they are.
    talk = Talk('c', 'd')
    talk.submit([job('d')])
    works = jobs(2)
    talk.ready('a')
    talk.submit(works)
    assert talk.ready('b') == [SendRecall('a', 'c', [works[1].serial])]


def test_what_waits_behind_jobs_that_do_not_end_soon_is_called_back():
    """The estimate by which it was sent does not hold; until then the node holds it."""
    talk = Talk()
    talk.ready('n', 2)
    talk.learn(0.001, times=50)
    works = sent(talk.submit(jobs(100)))
    assert len(works) > 10
    started = NodeStarted('n', 'c', [(work.serial, 0.025) for work in works[:2]])
    assert not only(talk.tell(started), SendRecall)
    assert talk.schedule.next_timer() == pytest.approx(0.075)
    recall, = only(talk.schedule.flush(0.076), SendRecall)
    assert sorted(recall.serials) == [work.serial for work in works[2:]]
    assert [work.state for work in works[:3]] == [JobState.RUNNING, JobState.RUNNING, JobState.SENT]
    assert not only(talk.schedule.flush(0.5), SendRecall), 'each is asked for once'


def test_a_job_that_was_called_back_twice_goes_to_idle_cpus_only():
    talk, (first, second) = Talk(), jobs(2)
    talk.ready('a')
    talk.submit([first, second])
    others = []
    for name in 'bd':
        recall, = only(talk.ready(name), SendRecall)
        assert recall.serials == [second.serial]
        others += sent(talk.submit(jobs(1)), name)   # it takes the idle CPU before the answer comes
        talk.tell(NodeReturned(recall.node, 'c', recall.serials))
    assert second.state is JobState.REQUEUED
    assert sent(talk.submit(jobs(1))) == [], 'those behind it wait too, or no CPU would be idle'
    assert sent(talk.results('d', others[1:])) == [second]


def test_work_ahead_covers_two_round_trips():
    counts_by_trip = {}
    for trip in (0.0, 0.4):
        talk = Talk()
        talk.tell(NodeReady('n', 'c', 4, [], trip=trip))
        assert talk.schedule.nodes['n'].trip == trip
        talk.schedule.nodes['n'].probe = (0, 0.0)   # no other is measured: here, time stands still
        talk.learn(0.02, times=3000)
        counts_by_trip[trip] = len(sent(talk.submit(jobs(2000))))
    assert 20 <= counts_by_trip[0.0] <= 24 and 160 <= counts_by_trip[0.4] <= 164


def test_the_round_trip_is_corrected_by_jobs_that_did_not_wait():
    talk, work = Talk(), job()
    # This program was busy when the node connected
    talk.tell(NodeReady('n', 'c', 1, [], trip=3.0))
    talk.submit([work])
    talk.schedule.handle(NodeResults('n', 'c', [row(work, took=1.0)]), 1.25)
    assert talk.schedule.nodes['n'].trip == pytest.approx(0.25)


def test_lowered_cpus_call_back_what_is_too_much():
    talk = Talk()
    talk.ready('n', 4)
    talk.learn(1.0, times=4)
    works = sent(talk.submit(jobs(4)))
    recall, = only(talk.tell(NodeOffers('n', 'c', 2)), SendRecall)
    assert set(recall.serials) == {work.serial for work in works[2:]}
    talk.tell(NodeReturned('n', 'c', recall.serials))
    assert not talk.schedule.comps['c'].called, 'the user wanted it'


def test_a_job_of_higher_priority_is_sent_although_the_node_is_full():
    talk = Talk()
    talk.ready('n', 2)
    talk.learn(0.01, times=500)
    low = sent(talk.submit(jobs(100)))
    assert len(low) > 10
    urgent = jobs(3, priority=5)
    assert sent(talk.submit(urgent)) == urgent
    assert not sent(talk.submit(jobs(1, priority=-1)))


def test_the_first_jobs_of_one_do_not_keep_the_only_job_of_another():
    """Three long ones on two nodes of two CPUs; the fourth CPU is on a node that is set up for the
    short job later."""
    talk, long, short = Talk('c', 'd'), jobs(3), job('d')
    for name in 'ab':
        talk.tell(NodeReady(name, 'c', 2, [], '', 2))
    talk.submit(long)
    talk.tell(NodeReady('a', 'd', 2, [], '', 2))
    assert sent(talk.submit([short]), 'a') == [short]
    assert (only(talk.tell(NodeReady('b', 'd', 2, [], '', 2)), SendRecall)
            == [SendRecall('a', 'd', [short.serial])])


# -- withdraw --------------------------------------------------------------------------------------

def test_withdraw_of_what_waits():
    talk, work = Talk(), job()
    talk.submit([work])
    assert talk.tell(WithdrawAsked([work])) == [JobEnded(work, 'cancelled before it was started')]
    assert talk.tell(WithdrawAsked([work])) == [Withdrawn(work, True)], 'it is gone already'


@pytest.mark.parametrize('answer, gone', [
    (lambda work: NodeReturned('n', 'c', [work.serial]), True),
    (lambda work: NodeStarted('n', 'c', [(work.serial, 0.0)]), False),
    (lambda work: NodeResults('n', 'c', [row(work)]), False),
    (lambda work: NodeResults('n', 'c', [row(work, Outcome.CANCELLED)]), True),
    (lambda work: NodeAway('n', 'host', 'broken', 9.0), False),
    (lambda work: NodeReady('n', 'c', 1, []), True)])
def test_withdraw_of_what_is_on_a_node(answer, gone):
    talk, work = Talk(), job()
    talk.ready('n')
    talk.submit([work])
    assert talk.tell(WithdrawAsked([work])) == [SendRecall('n', 'c', [work.serial])]
    assert talk.tell(WithdrawAsked([work])) == [], 'asked once'
    answers = only(talk.tell(answer(work)), Withdrawn)
    assert answers == [Withdrawn(work, gone)] and (work.state is JobState.CANCELLED) == gone


@pytest.mark.parametrize('cancel_first', (True, False))
def test_what_is_withdrawn_and_cancelled_comes_back_once(cancel_first):
    talk, work = Talk(), job()
    talk.ready('n')
    talk.submit([work])
    events = [CancelAsked(work), WithdrawAsked([work])]
    for event in events if cancel_first else events[::-1]:
        talk.tell(event)
    actions = talk.tell(NodeReturned('n', 'c', [work.serial]))
    assert len(only(actions, JobEnded)) == 1 and work.state is JobState.CANCELLED


def test_withdraw_of_what_runs_is_refused_and_does_not_disturb_it():
    talk, work = Talk(), job()
    talk.ready('n')
    talk.submit([work])
    talk.tell(NodeStarted('n', 'c', [(work.serial, 0.03)]))
    assert (talk.tell(WithdrawAsked([work])) == [Withdrawn(work, False)]
            and work.state is JobState.RUNNING)


def test_a_job_whose_answer_is_not_waited_for_goes_on():
    talk, work = Talk(), job()
    talk.ready('n')
    talk.submit([work])
    talk.tell(WithdrawAsked([work]))
    talk.schedule.requests.keep(work)
    actions = talk.tell(NodeReturned('n', 'c', [work.serial]))
    assert sent(actions) == [work] and not only(actions, Withdrawn)


def test_what_is_lost_with_its_node_counts_as_begun_whatever_was_known():
    talk, (runs, waits, returned) = Talk(reentrant=False), jobs(3)
    talk.ready('n', 3)
    talk.submit([runs, waits, returned])
    talk.tell(NodeStarted('n', 'c', [(runs.serial, 0.03)]), NodeOffers('n', 'c', 0))
    talk.tell(NodeReturned('n', 'c', [returned.serial]))
    talk.tell(NodeLost('n', 'host', 'broken'))
    assert ([work.state for work in (runs, waits, returned)]
            == [JobState.ABANDONED, JobState.ABANDONED, JobState.REQUEUED])


# -- several clients -------------------------------------------------------------------------------

def test_two_computations_of_one_client_take_turns_on_one_cpu():
    schedule = Schedule()
    works = {comp: jobs(5, comp) for comp in 'cd'}
    for comp in 'cd':
        schedule.handle(Opened(comp, 'client', True), 0.0)
        schedule.handle(Submitted(works[comp]), 0.0)
    schedule.handle(NodeReady('n', 'c', 1, [], '', 1), 0.0)
    schedule.handle(NodeReady('n', 'd', 1, [], '', 1), 0.0)
    order = []
    while len(order) < 10:
        batch = sent(schedule.flush(0.0))
        assert batch
        for work in batch:
            order.append(work.comp)
            schedule.handle(NodeResults('n', work.comp, [row(work)]), 0.0)
    assert order[:6] in (list('cdcdcd'), list('dcdcdc'))


def test_what_runs_on_a_node_that_is_shared_is_no_more_than_its_cpus():
    talk = Talk('c', 'd')
    for comp in 'cd':
        talk.tell(NodeReady('n', comp, 3, [], '', 3))
        talk.submit(jobs(10, comp))
    runs = talk.schedule.runs('n')
    assert sum(map(len, runs.values())) == 3 and min(map(len, runs.values())) == 1
    flight = talk.schedule.nodes['n'].in_flight['c']
    last = list(flight)[-1]
    talk.tell(NodeStarted('n', 'c', [(last, 0.03)]))
    assert last in talk.schedule.runs('n')['c'], 'it has said so'
    assert talk.schedule.runs('unknown') == {}


def busy(long=True, cpus=4):
    """Client c has 10,000 jobs on a node that d may use too."""
    talk, works = Talk('c', 'd'), jobs(10000)
    talk.ready('n', cpus)
    talk.ready('n', cpus, 'd')
    talk.learn(1.0 if long else 0.001, times=1 if long else 1000)
    if long:
        talk.learn(1.0, 'd')
    return talk, works, sent(talk.submit(works))


def test_limits_of_two_computations_fill_a_node_in_either_order():
    # What the first has ahead on the node must not keep the second from CPUs that the first may not
    # use.
    for order in (('c', 'd'), ('d', 'c')):
        talk = Talk('c', 'd')
        limits = {'c': 1, 'd': 3}
        for comp in order:
            talk.tell(NodeReady('n', comp, limits[comp], [], '', 4))
            talk.submit(jobs(50, comp))
        node = talk.schedule.nodes['n']
        assert {comp: min(node.parts[comp], limits[comp]) for comp in limits} == limits


def test_two_clients_share_cpus_evenly():
    talk = Talk('c', 'd')
    talk.submit(jobs(100))
    talk.submit(jobs(100, 'd'))
    talk.tell(NodeReady('n', 'c', 8, []), NodeReady('n', 'd', 8, []))
    comps = talk.schedule.comps
    assert comps['c'].cpus_in_flight == comps['d'].cpus_in_flight == 4


def test_cpus_are_shared_between_clients_and_not_computations():
    schedule = Schedule()
    for comp, client in (('c1', 'c'), ('c2', 'c'), ('d', 'd')):
        schedule.handle(Opened(comp, client, True), 0.0)
        schedule.handle(Submitted(jobs(100, comp)), 0.0)
        schedule.handle(NodeReady('n', comp, 8, []), 0.0)
    schedule.flush(0.0)
    flying = {comp.comp: comp.cpus_in_flight for comp in schedule.comps.values()}
    assert flying['d'] == flying['c1'] + flying['c2'] == 4


def test_a_newcomer_gets_the_next_free_cpu():
    talk, works, there = busy()
    few = jobs(4, 'd')
    assert sent(talk.submit(few)) == few[:2], ('its part into the queue of the '
                                               'node, which gives the next CPU to who has fewest')
    assert sent(talk.results('n', there[:1])) == []
    assert sent(talk.results('n', there[1:2])) == []
    assert sent(talk.results('n', few[:1], 'd')) == few[2:3], 'an even share is two of four CPUs'
    assert sent(talk.results('n', few[1:2], 'd')) == few[3:]


def test_a_newcomer_is_served_although_the_other_clients_jobs_are_short():
    # The deep queue of the short ones is filled up every turn, and the newcomer's limit is lower.
    talk, works, there = busy(long=False)
    few, queue = jobs(4, 'd'), collections.deque(there)
    talk.submit(few)
    for _ in range(200):
        queue.extend(sent(talk.results('n', [queue.popleft() for _ in range(10)], took=0.001),
                          comp='c'))
        running = [work for work in few if work.state is JobState.SENT]
        if running:
            talk.results('n', running[:1], 'd')
        if few[-1].state is JobState.FINISHED:
            return
    pytest.fail('after 2000 jobs of the other client the newcomer still waits')


# -- closed ----------------------------------------------------------------------------------------

def test_closed_ends_jobs_in_every_state():
    talk = Talk('c', 'd')
    talk.ready('n', 3)
    talk.learn(1.0)
    done, running, cancelling, waiting, other = jobs(4) + [job('d')]
    talk.submit([done, running, cancelling])
    talk.results('n', [done])
    talk.tell(CancelAsked(cancelling))
    talk.submit(jobs(1) + [waiting, other])
    requeued = job(priority=1)
    actions = talk.tell(Closed('c'))
    assert {action.work for action in only(actions, JobEnded)} >= {running, cancelling, waiting}
    assert done not in {action.work for action in only(actions, JobEnded)}
    assert [work.state for work in (done, running, cancelling, waiting, other)] == [
        JobState.FINISHED, JobState.CANCELLED, JobState.CANCELLED, JobState.CANCELLED,
        JobState.CREATED]
    assert talk.schedule.nodes['n'].used == 0 and not talk.schedule.nodes['n'].in_flight
    assert talk.tell(Closed('c')) == []
    assert talk.submit([requeued]) == [JobEnded(requeued, 'the cluster was closed')]
    assert talk.tell(CancelAsked(running), CancelAsked(requeued)) == []
    assert talk.ready('n') == [] and talk.results('n', [running]) == []


def test_closed_forgets_a_recall():
    talk, works = recall_scene()
    talk.ready('b')
    talk.tell(Closed('c'))
    assert not talk.schedule.nodes['a'].recalled


# -- the table of states ---------------------------------------------------------------------------

@pytest.mark.parametrize('state', list(JobState))
@pytest.mark.parametrize('event', sorted({event for _, event in JOB_TABLE} | {'nonsense'}))
def test_an_absent_pair_raises_and_changes_nothing(state, event):
    work = job()
    work.state = state
    if (state, event) in JOB_TABLE:
        assert move_job(work, event) is JOB_TABLE[state, event] is work.state
        assert state not in ENDED
    else:
        with pytest.raises(KeyError):
            move_job(work, event)
        assert work.state is state


def test_an_unknown_event_raises():
    with pytest.raises(KeyError):
        Schedule().handle('nonsense', 0.0)


# -- random walk -----------------------------------------------------------------------------------

@pytest.mark.parametrize('first', range(0, 240, 20))
def test_random_walk(first, request):
    step = 1 if request.config.getoption('--long') else 2
    walk_seeds(Walk, range(first, first + 20, step))


class LimitedWalk(Walk):
    """The same walk with users, whose rules change."""

    def __init__(self, seed):
        super().__init__(seed)
        self.schedule = Schedule(rules=self.some_rules())
        self.lowered = False      # some may have more than they may have now

    def some_rules(self):
        rng = self.rng

        def rule():
            return UserRule(rng.choice((1.0, 3.0)), rng.choice((0, 0, 1)),
                            rng.choice((2, 4, float('inf'))), rng.choice((1, 3, float('inf'))))
        return UserRules(users={'ada': rule()}, groups={'lab': rule()}, members={'bob': 'lab'},
                         others=rule(), by_user=rng.random() < 0.7,
                         half_life=rng.choice((0.0, 3600.0)))

    def open_one(self):
        comp = 'c%d' % self.opened
        self.opened += 1
        self.reentrant[comp] = self.rng.random() < 0.6
        self.open.append(comp)
        user = self.rng.choice(('ada', 'bob', 'cy'))
        self.event(Opened(comp, self.rng.choice('xyz'), self.reentrant[comp], user=user))
        for node in self.nodes.values():
            if node.linked and not node.away:
                self.set_up(node, comp)

    def step(self):
        if self.rng.random() < 0.01:
            self.lowered = True
            self.event(RulesChanged(self.some_rules()))
        self.now += 0.01
        super().step()

    def drain(self):
        self.lowered = True
        self.event(RulesChanged(UserRules(others=UserRule(cpus=4, jobs=2))))
        super().drain()
        for load in self.schedule.users.loads().values():
            assert load.cpus == load.jobs == load.running == 0

    def act(self, actions):
        super().act([action for action in actions if type(action) is not JobsHeld])

    def check(self):
        super().check()
        cpus, running, count = (collections.Counter() for _ in range(3))
        for comp in self.schedule.comps.values():
            user = comp.user
            for load in (user, user.group):
                if load is None:
                    continue
                cpus[load] += comp.cpus_in_flight
                count[load] += len(comp.running)
                for node in comp.nodes.values():
                    running[load] += sum(cpus_of(node.in_flight[comp.comp][serial])
                                         for serial in node.begun[comp.comp])
        for load in self.schedule.users.loads().values():
            assert load.cpus == cpus[load] and load.jobs == count[load]
            assert load.running == running[load]
            if not self.lowered:
                assert load.cpus <= load.rule.cpus and load.jobs <= load.rule.jobs

    def check_no_idle_cpu(self):
        for node in self.schedule.nodes.values():
            for comp in node.comps.values() if node.away is None else ():
                head = comp.queue.head()
                if head is not None and comp.user.admits(cpus_of(head)):
                    assert cpus_of(head) > node.room(comp.comp), 'a CPU is idle and a job waits'


@pytest.mark.parametrize('first', range(0, 120, 30))
def test_random_walk_with_users(first, request):
    step = 1 if request.config.getoption('--long') else 3
    walk_seeds(LimitedWalk, range(first, first + 30, step))


def test_a_computation_that_may_use_so_many_cpus_over_all_nodes():
    talk = Talk('other')
    talk.tell(Opened('c', 'c', True, False, 3))
    for node in 'abc':
        talk.ready(node, 2)
    limits = lambda: [talk.schedule.nodes[node].limits['c'] for node in 'abc']   # noqa: E731
    assert limits() == [2, 1, 0]
    works = jobs(10)
    sent = {action.node for action in talk.submit(works) if isinstance(action, SendJobs)}
    assert sent == {'a', 'b'}
    told = [action
            for action in talk.tell(NodeOffers('a', 'c', 5)) if isinstance(action, LimitNode)]
    # What others have stays theirs
    assert limits() == [2, 1, 0] and told == [LimitNode('a', 'c', 2)]
    actions = talk.tell(NodeLost('a', 'a', 'gone'))
    assert LimitNode('b', 'c', 2) in actions and LimitNode('c', 'c', 1) in actions
    assert talk.schedule.nodes['b'].limits['c'] + talk.schedule.nodes['c'].limits['c'] == 3
    talk.tell(NodeOffers('b', 'c', 0))
    assert talk.schedule.nodes['c'].limits['c'] == 2


def test_a_job_that_failed_rests_until_it_is_tried_again():
    talk = Talk()
    talk.ready('n', 1)
    work = job('c', repeats=Repeats(True, 5.0, 2), retries=2)
    talk.submit([work])
    asked, = [action for action in talk.results('n', [work], outcome=Outcome.RAISED)
              if isinstance(action, JobFailedOnce)]
    assert work.state is JobState.REQUEUED and talk.schedule.comps['c'].waiting() == [work]
    assert talk.schedule.handle(Repeat(work, 5.0), 0.0) == [JobWaits(work)]
    assert talk.schedule.next_timer() == 5.0
    assert (not talk.schedule.flush(4.9)
            and [type(action) for action in talk.schedule.flush(5.0)] == [SendJobs])
    talk.results('n', [work], outcome=Outcome.RAISED)
    assert (talk.tell(RepeatNot(work, Outcome.RAISED)) == [JobStays(work)]
            and work.state is JobState.TERMINATED)
    assert talk.tell(RepeatNot(work, Outcome.RAISED)) == []


# -- many nodes are lost at once -------------------------------------------------------------------

class Away:
    """A schedule at a virtual time with so many nodes, each with a job that runs. The connection to
    all of them breaks at once, and each has until 10 s to come back."""

    def __init__(self, count):
        self.schedule = Schedule()
        self.tell(0.0, Opened('c', 'c', False))
        for number in range(count):
            self.tell(0.0, NodeReady(number, 'c', 1, []))
        self.tell(0.0, Submitted(jobs(count)))
        self.tell(0.0, *[NodeAway(number, 'host', 'cut', 10.0) for number in range(count)])

    def tell(self, now, *events):
        """One turn; the nodes that are given up."""
        actions = []
        for event in events:
            actions += self.schedule.handle(event, now)
        actions += self.schedule.flush(now)
        return [action.node for action in only(actions, NodeGone)]

    def back(self, now, number):
        """A node is connected again and has its job."""
        there = self.schedule.nodes[number].in_flight['c']
        assert len(there) == 1
        return self.tell(now, NodeReady(number, 'c', 1, list(there)))


def test_nodes_that_come_back_one_after_the_other_are_waited_for():
    scene = Away(200)
    for number in range(199):
        assert scene.back(0.1 * (number + 1), number) == []   # the last of them after 19.9 s
    assert scene.tell(29.9) == []
    assert scene.schedule.next_timer() <= 30.0
    assert scene.tell(30.0) == [199]


def test_nodes_are_waited_for_that_were_not_admitted_and_try_again_later():
    scene = Away(1000)
    for number in range(500):
        assert scene.back(0.01 * (number + 1), number) == []
    now = 5.0
    while now < 5.0 + RETURN_APART - 2.0:   # nothing happens
        now += 1.0
        assert scene.tell(now) == []
    for number in range(500, 1000):
        now += 0.05
        assert scene.back(now, number) == []


def test_nodes_are_given_up_when_no_other_comes_back():
    scene = Away(1000)
    assert scene.back(7.9, 0) == []
    assert scene.tell(10.0) == []
    assert scene.tell(7.8 + RETURN_APART) == []
    assert scene.schedule.next_timer() <= 10.0 + RETURN_APART
    assert scene.tell(9.9 + RETURN_APART) == list(range(1, 1000))


def test_nodes_are_not_given_up_by_who_has_no_time_to_see_them():
    """All may be connected already. There is a limit to that."""
    scene = Away(200)
    now = 0.0
    while now < 27.0:
        now += 3.0     # a turn takes so long
        scene.schedule.is_behind(now)
        assert scene.tell(now) == []
    assert scene.back(now, 0) == []
    scene.schedule.is_behind(31.0)
    assert scene.tell(31.0) == list(range(1, 200))


def test_a_node_that_only_tells_what_it_has_is_back():
    scene = Away(200)
    there = frozenset(scene.schedule.nodes[0].in_flight['c'])
    assert scene.tell(9.9, NodeTold(0, 'c', Account(there, None, True))) == []
    assert scene.tell(10.0) == []


def test_few_nodes_are_not_waited_for_longer():
    scene = Away(3)
    assert scene.back(9.9, 0) == []
    assert scene.tell(10.0) == []
    assert scene.back(10.2, 1) == []
    assert scene.tell(10.31) == [2]


def test_one_turn_sends_no_more_ahead_than_the_loop_bears():
    """Ten computations with many jobs on many nodes: what is sent to queues there comes in turns,
    and other events come between them."""
    comps = [str(number) for number in range(10)]
    talk = Talk(*comps)
    for comp in comps:
        talk.tell(*[NodeReady(node, comp, 1, []) for node in range(60)])
    works = {comp: jobs(1500, comp) for comp in comps}
    for comp in comps:
        talk.submit(works[comp])
    first = [list(node.in_flight.items()) for node in talk.schedule.nodes.values()]
    ended = []
    for node, flights in enumerate(first):
        comp, flight = next((comp, flight) for comp, flight in flights if flight)
        ended.append(NodeResults(node, comp, [row(next(iter(flight.values())))]))
    turns = [len(sent(talk.tell(*ended)))]
    while talk.schedule.next_timer() is not None and len(turns) < 50:
        turns.append(len(sent(talk.tell())))
    assert max(turns) <= AHEAD_A_TURN + 1500 and len(turns) > 2, turns
    assert turns[-1] == 0 or turns[-1] < AHEAD_A_TURN, turns
    there = [node.used for node in talk.schedule.nodes.values()]
    assert min(there) > 50, 'those that had to wait have got theirs'
