"""When a node is lost: the whole table of evidence, cell by cell, and that the Schedule follows
it."""

import itertools
import math

import pytest

import dispy
from dispy import Account, Evidence, Loss, NodeDoubted, NodeReady, Opened, Standing, Submitted
from talk_schedule import Talk, jobs, only

STAYS, RETURNS, AWAY, LOST = Loss.STAYS, Loss.RETURNS, Loss.AWAY, Loss.LOST
CELLS = {   # idle, busy, embedded, idle scheduler, busy scheduler
    Evidence.BYE: (RETURNS, RETURNS, RETURNS, STAYS, STAYS),
    Evidence.REFUSAL: (RETURNS, RETURNS, RETURNS, STAYS, STAYS),
    Evidence.CUT: (LOST, AWAY, LOST, LOST, AWAY),
    Evidence.SILENCE: (LOST, LOST, LOST, LOST, AWAY),
    Evidence.UNREACHED: (STAYS, STAYS, STAYS, STAYS, STAYS),
    Evidence.PROCESS_ENDED: (LOST, LOST, LOST, STAYS, STAYS),
    Evidence.OTHER_INSTANCE: (LOST, LOST, LOST, LOST, LOST),
    Evidence.OVERDUE: (LOST, LOST, LOST, LOST, LOST),
}
KINDS = {Standing.IDLE: '', Standing.BUSY: '', Standing.EMBEDDED: 'embedded',
         Standing.IDLE_SCHEDULER: 'scheduler', Standing.BUSY_SCHEDULER: 'scheduler'}
PAIRS = list(itertools.product(Evidence, Standing))


def talk_of(standing, count=3):
    """A Schedule with one node of that standing, and the jobs that were sent there."""
    talk = Talk()
    is_scheduler = KINDS[standing] == 'scheduler'
    talk.schedule.handle(Opened('d', 'd', False, is_scheduler), 0.0)
    works = [] if standing in (Standing.IDLE, Standing.IDLE_SCHEDULER) else jobs(count, 'd')
    talk.tell(NodeReady('n', 'd', 8, [], 'host', offers=8), Submitted(works))
    assert len(talk.schedule.nodes['n'].in_flight['d']) == len(works)
    return talk, works


def doubt(evidence, standing, **more):
    more.setdefault('until', 10.0)
    return NodeDoubted('n', 'host', evidence, 'why', KINDS[standing], ['d'], **more)


@pytest.mark.parametrize('evidence, standing', PAIRS)
def test_each_cell(evidence, standing):
    wanted = CELLS[evidence][list(Standing).index(standing)]
    assert dispy.LOSS_TABLE[evidence, standing] is wanted
    talk, _ = talk_of(standing)
    assert talk.schedule.judge(doubt(evidence, standing)) is wanted


def test_the_table_is_whole():
    assert set(dispy.LOSS_TABLE) == set(PAIRS)


@pytest.mark.parametrize('evidence, standing', PAIRS)
def test_the_schedule_follows_the_table(evidence, standing):
    """The computation is not reentrant: what is lost ends, what never began waits again."""
    talk, works = talk_of(standing)
    loss = talk.schedule.judge(doubt(evidence, standing))
    actions = talk.tell(doubt(evidence, standing))
    ended = [action.work for action in only(actions, dispy.JobEnded)]
    waits = [action.work for action in only(actions, dispy.JobWaits)]
    there = talk.schedule.nodes.get('n')
    assert set(ended) == set(works if loss is LOST else ())
    assert set(waits) == set(works if loss is RETURNS else ())
    assert (there is None) == (loss is LOST)
    if there is not None:
        assert (there.away is not None) == (loss is AWAY)
        assert len(there.in_flight['d']) == (len(works) if loss in (STAYS, AWAY) else 0)


def test_a_node_that_was_away_is_lost_when_it_is_overdue():
    talk, works = talk_of(Standing.BUSY)
    talk.tell(doubt(Evidence.CUT, Standing.BUSY))
    assert talk.schedule.lost_at('n') == 10.0
    assert only(talk.schedule.flush(9.9), dispy.JobEnded) == []
    actions = talk.schedule.flush(10.0)
    assert {action.work for action in only(actions, dispy.JobEnded)} == set(works)
    assert [action.node for action in only(actions, dispy.NodeGone)] == ['n']


def test_a_scheduler_that_was_cut_off_is_waited_for_for_ever():
    talk, works = talk_of(Standing.BUSY_SCHEDULER)
    talk.tell(doubt(Evidence.CUT, Standing.BUSY_SCHEDULER, until=math.inf))
    assert only(talk.schedule.flush(1e9), dispy.JobEnded) == []
    assert len(talk.schedule.nodes['n'].in_flight['d']) == len(works)


def test_what_is_known_of_a_process_that_has_ended_is_not_lost():
    talk, (held, unbegun, began) = talk_of(Standing.BUSY)
    past = dispy.AttemptHistory(True, frozenset([unbegun.serial]), frozenset([began.serial]))
    account = Account(frozenset([held.serial]), past)
    actions = talk.tell(doubt(Evidence.PROCESS_ENDED, Standing.BUSY, known={'d': account}))
    assert [action.work for action in only(actions, dispy.JobEnded)] == [began]
    assert [action.work for action in only(actions, dispy.JobWaits)] == [unbegun]
    assert talk.schedule.nodes['n'].in_flight['d'][held.serial] is held


def test_of_several_computations_only_those_are_returned_that_were_spoken_of():
    talk, works = talk_of(Standing.BUSY)
    others = jobs(2)
    talk.tell(NodeReady('n', 'c', 8, [], 'host', offers=8), Submitted(others))
    actions = talk.tell(doubt(Evidence.REFUSAL, Standing.BUSY))
    assert {action.work for action in only(actions, dispy.JobWaits)} == set(works)
    assert set(talk.schedule.nodes['n'].in_flight['c'].values()) == set(others)


def test_evidence_against_an_unknown_node_changes_nothing():
    talk, works = talk_of(Standing.BUSY)
    for evidence in Evidence:
        event = doubt(evidence, Standing.BUSY)._replace(node='unknown', comps=[])
        assert only(talk.tell(event), dispy.JobEnded) == []
    assert len(talk.schedule.nodes['n'].in_flight['d']) == len(works)
