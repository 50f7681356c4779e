"""What is known of an attempt, and what becomes of its job: the whole table, cell by cell, and who
fills it in."""

import itertools
import json
import math
import os
import types

import pytest

import dispy
from dispy import Account, Known, NodeLost, NodeReady, NodeTold, Occasion, Submitted, Verdict
from dispynode import (BEGUN_KEPT, KnownAttempts, Memory, AttemptHistory, PeerError, Ready, Slots,
                       decode, encode)
from talk_schedule import Talk, jobs, only

STAYS, WAITS, LOST = Verdict.STAYS, Verdict.WAITS, Verdict.LOST
CELLS = {   # connected again, recovered, ended
    Known.UNSENT: (WAITS, WAITS, WAITS),
    Known.HELD: (STAYS, STAYS, STAYS),
    Known.UNBEGUN: (WAITS, WAITS, WAITS),
    Known.ABSENT: (WAITS, WAITS, WAITS),
    Known.LOST: (LOST, LOST, LOST),
    Known.GIVEN_UP: (LOST, LOST, LOST),
    Known.FORGOTTEN: (LOST, LOST, LOST),
    Known.SILENT: (STAYS, STAYS, LOST),
}


@pytest.mark.parametrize('known, occasion', list(itertools.product(Known, Occasion)))
def test_each_cell(known, occasion):
    assert dispy.KNOWN_TABLE[known, occasion] is CELLS[known][list(Occasion).index(occasion)]


def test_what_never_began_is_never_lost_and_what_began_never_waits_again():
    began = {Known.LOST, Known.GIVEN_UP, Known.FORGOTTEN}
    for (known, occasion), verdict in dispy.KNOWN_TABLE.items():
        assert verdict is not LOST or known in began or (known, occasion) == (Known.SILENT,
                                                                              Occasion.ENDED)
        assert verdict is not WAITS or known not in began
    assert len(dispy.KNOWN_TABLE) == len(Known) * len(Occasion)


PAST = AttemptHistory(True, frozenset([2]), frozenset([3, 7]), frozenset([4, 7]),
                      'given up after 3 s')


@pytest.mark.parametrize('serial, account, known', [
    (1, Account(frozenset([1]), PAST), Known.HELD),
    (2, Account(frozenset([1]), PAST), Known.UNBEGUN),
    (3, Account(frozenset([1]), PAST), Known.LOST), (4, Account(frozenset(), PAST), Known.GIVEN_UP),
    # Sent again since
    (4, Account(frozenset([4]), PAST), Known.HELD),
    (5, Account(frozenset([1]), PAST), Known.ABSENT),
    (7, Account(frozenset(), PAST), Known.GIVEN_UP),
    # Another memory than before
    (5, Account(frozenset(), PAST, False), Known.FORGOTTEN),
    # Said for certain all the same
    (2, Account(frozenset(), PAST, False), Known.UNBEGUN),
    (5, Account(frozenset(), PAST._replace(whole=False)), Known.FORGOTTEN),
    (5, Account(), Known.ABSENT)])
def test_what_an_answer_means(serial, account, known):
    assert account.known(serial) is known


def test_the_table_is_printed_by_a_command(capsys):
    assert not dispy.main(['states'])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for known, cells in CELLS.items():
        assert [known.name, *(cell.name for cell in cells)] in rows


# -- the messages that carry it --------------------------------------------------------------------

def test_past_goes_there_and_back():
    assert (AttemptHistory.of(PAST.row()) == PAST and AttemptHistory().row() == ()
            and AttemptHistory.of(()) == AttemptHistory())
    assert PAST.and_also(AttemptHistory(False)).row() == (False, [2], [3, 7], [4, 7],
                                                          'given up after 3 s')


@pytest.mark.parametrize('kind', [Ready, KnownAttempts])
@pytest.mark.parametrize('past', [(1,), (1, [], [], [], ''), (True, [], [], 'x', ''),
                                  (True, [-1], [], [], ''), (True, [], [], [], b'')])
def test_nonsense_is_no_past(kind, past):
    op, encoding, pieces = encode(kind('c', [1], past))
    with pytest.raises(PeerError):
        decode(op, encoding, memoryview(b''.join(pieces)))


# -- the schedule ----------------------------------------------------------------------------------

def busy(reentrant=False):
    """A talk with four jobs on a node."""
    talk = Talk(reentrant=reentrant)
    talk.ready('n', 4)
    works = jobs(4)
    talk.submit(works)
    return talk, works


def account_of(works, held=(), unbegun=(), lost=(), given_up=(), whole=True):
    pick = [frozenset(works[number].serial for number in numbers)
            for numbers in (held, unbegun, lost, given_up)]
    return Account(pick[0], AttemptHistory(whole, *pick[1:], text='given up'))


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('how', ['told', 'ready', 'lost'])
def test_the_schedule_follows_the_table(reentrant, how):
    talk, works = busy(reentrant)
    account = account_of(works, held=[0], unbegun=[1], lost=[2], given_up=[3])
    if how == 'told':
        actions = talk.tell(NodeTold('n', 'c', account))
    elif how == 'ready':
        actions = talk.tell(NodeReady('n', 'c', 4, sorted(account.held), past=account.past))
    else:
        actions = talk.tell(NodeLost('n', 'host', 'gone', {'c': account}))
    ended = {action.work: action.text for action in only(actions, dispy.JobEnded)}
    waits = [action.work for action in only(actions, dispy.JobWaits)]
    assert set(ended) == (set() if reentrant else {works[2], works[3]})
    assert set(waits) == ({works[1], works[2], works[3]} if reentrant else {works[1]})
    if not reentrant and how != 'lost':
        assert 'given up' in ended[works[3]] and 'had begun when the node ended' in ended[works[2]]
    if how == 'told':   # what it holds stays there, and is not lost while it is connected
        assert talk.schedule.nodes['n'].in_flight['c'].get(works[0].serial) is works[0]


def test_what_is_not_there_has_not_begun_only_if_all_is_known():
    for whole, status in ((True, dispy.JobState.REQUEUED), (False, dispy.JobState.ABANDONED)):
        talk, works = busy()
        talk.schedule.handle(NodeTold('n', 'c', Account(whole=whole)), 0.0)
        assert {work.state for work in works} == {status}


def test_a_node_that_has_told_what_it_holds_is_not_lost_while_it_sets_up():
    talk, works = busy()
    talk.tell(dispy.NodeAway('n', 'host', 'broken', 10.0))
    talk.tell(NodeTold('n', 'c', account_of(works, held=[0, 1, 2, 3])))
    assert talk.schedule.flush(1000.0) == []
    talk.tell(Submitted(jobs(8)))
    assert len(talk.schedule.nodes['n'].in_flight['c']) == 4   # nothing is sent before it is ready
    talk.tell(dispy.NodeAway('n', 'host', 'broken', 2000.0))
    assert len(only(talk.schedule.flush(2000.0), dispy.JobEnded)) == 4


@pytest.mark.parametrize('tried, lost_at', [
    ([], 10.0), ([16.0], 16.0), ([16.0, 9.5], 10.0), ([8.0], 10.0), ([16.0, 'away'], 12.0),
    ([16.0, 'told'], None)])
def test_a_node_is_not_lost_while_there_is_an_attempt_to_reach_it(tried, lost_at):
    """One that failed before the limit changes nothing, one that is under way then is waited for;
    with another connection that breaks there is another limit."""
    talk, works = busy()
    talk.tell(dispy.NodeAway('n', 'host', 'broken', 10.0))
    for event in tried:
        if event == 'away':
            talk.tell(dispy.NodeAway('n', 'host', 'broken', 12.0))
        elif event == 'told':
            talk.tell(NodeTold('n', 'c', account_of(works, held=[0, 1, 2, 3])))
        else:
            talk.tell(dispy.NodeTried('n', event))
    assert talk.schedule.lost_at('n') == (math.inf if lost_at is None else lost_at)
    if lost_at is None:
        assert only(talk.schedule.flush(1000.0), dispy.JobEnded) == []
    else:
        assert only(talk.schedule.flush(lost_at - 0.1), dispy.JobEnded) == []
        assert len(only(talk.schedule.flush(lost_at), dispy.JobEnded)) == 4


def test_an_attempt_to_reach_a_node_that_is_not_away_changes_nothing():
    talk, _ = busy()
    talk.tell(dispy.NodeTried('n', 5.0), dispy.NodeTried('unknown', 5.0))
    assert talk.schedule.lost_at('n') == talk.schedule.lost_at('unknown') == math.inf


def test_a_node_that_was_found_is_not_forgotten_while_its_jobs_may_come_back():
    """It is tried often then, so that several attempts fail in a short time."""
    talk, _ = busy()
    peer = dispy.NodeConnection('n', 1)
    peer.key, peer.failures = 'n', 100
    driver = types.SimpleNamespace(schedule=talk.schedule, now=1000.0,
                                   access=types.SimpleNamespace(redial=0.5),
                                   nodes=dispy.NodeTable(), clusters={}, instance=b'')
    connector = dispy.Connector(driver, bytes(32), None)
    talk.tell(dispy.NodeAway('n', 'host', 'broken', 1010.0))
    assert not connector.is_forgotten(peer)
    talk.schedule.flush(1010.0)
    assert connector.is_forgotten(peer)
    peer.heard = 999.9
    assert not connector.is_forgotten(peer), 'it answers by UDP'


# -- what outlives processes -----------------------------------------------------------------------

def test_what_has_begun_is_noted_in_a_file(tmp_path):
    slots = Slots.make(str(tmp_path), 1)
    assert Slots.read(str(tmp_path)) == frozenset()
    for serial in range(1, 2 * BEGUN_KEPT):
        Slots.begin(slots[0], serial)
    Slots.begin(slots[7], 10 ** 9)
    assert slots[0][0] == 2 * BEGUN_KEPT - 1
    assert Slots.read(str(tmp_path)) == frozenset([*range(BEGUN_KEPT, 2 * BEGUN_KEPT), 10 ** 9])
    Slots.mark_unknown(str(tmp_path))
    assert Slots.read(str(tmp_path)) is None


def test_without_room_for_the_notes_nobody_knows_what_began(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'posix_fallocate', full)
    slots = Slots.make(str(tmp_path), 1)
    Slots.begin(slots[0], 5)
    assert slots[0][0] == 5 and Slots.read(str(tmp_path)) is None


def test_a_memory_goes_on_after_a_good_end_and_after_a_kill(tmp_path):
    first = Memory(str(tmp_path))
    first.write('c', PAST)
    first.close()
    second = Memory(str(tmp_path))
    assert second.ident == first.ident and second.begin({}) == {'c': PAST}
    third = Memory(str(tmp_path))   # the second was killed
    known = third.begin({'c': frozenset([9]), 'd': None})
    assert third.ident == first.ident and known['c'].lost == {3, 7, 9} and not known['d'].whole
    third.write('c', AttemptHistory())
    assert set(Memory(str(tmp_path)).begin({})) == {'d'}


@pytest.mark.parametrize('what', ['machine', 'torn', 'damaged'])
def test_a_memory_that_has_lost_something_is_another_one(tmp_path, monkeypatch, what):
    first = Memory(str(tmp_path))
    if what == 'machine':   # it ended without the node: what was not on the disk yet is gone
        monkeypatch.setattr('dispynode.machine', lambda: 'another start of the machine')
    elif what == 'torn':
        first.tear()
        first.close()
    else:
        (tmp_path / 'memory').write_text('nonsense')
    assert Memory(str(tmp_path)).ident != first.ident


def test_a_memory_that_ended_in_good_order_outlives_the_machine(tmp_path, monkeypatch):
    first = Memory(str(tmp_path))
    first.close()
    monkeypatch.setattr('dispynode.machine', lambda: 'another start of the machine')
    assert Memory(str(tmp_path)).ident == first.ident


def test_what_cannot_be_written_down_makes_another_memory(tmp_path, monkeypatch):
    first = Memory(str(tmp_path))

    def full(path, text):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(first, '_write', full)
    first.write('c', PAST)
    first.close()
    assert Memory(str(tmp_path)).ident != first.ident


def test_what_was_given_up_is_forgotten_after_a_month(tmp_path):
    first = Memory(str(tmp_path))
    first.write('c', PAST)
    old = os.stat(tmp_path / 'g-c').st_mtime - 31 * 86400
    os.utime(tmp_path / 'g-c', (old, old))
    assert Memory(str(tmp_path)).begin({}) == {} and not os.path.exists(tmp_path / 'g-c')


@pytest.mark.parametrize('begun, known', [([1, 5], AttemptHistory(lost=frozenset((1, 5)))),
                                          (None, AttemptHistory(whole=False))])
def test_notes_of_what_had_begun_that_are_written_just_before_their_directory_goes(
        tmp_path, monkeypatch, begun, known):
    """A runner does both while the notes are looked at."""
    journal = types.SimpleNamespace(path=str(tmp_path / 'jobs'))
    comp = 'c' * 32
    directory = tmp_path / 'private'
    directory.mkdir()
    path = dispy.BegunNotes.begin(journal, comp, str(directory))

    def end_runner(looked_at):
        if looked_at == str(directory):
            with open(path, 'w') as file:
                json.dump({'begun': begun}, file)
            directory.rmdir()
        return False
    monkeypatch.setattr(os.path, 'isdir', end_runner)
    assert dispy.BegunNotes.wait(journal, comp) == known
