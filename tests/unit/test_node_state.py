"""Node: what a dispynode decides. Tables of events and actions, then a random walk with
invariants."""

import collections
import math
import random

import pytest

from conftest import walk_seeds
from dispynode import (
    BEGUN_TIME, END_TIME, GRACE, LEASE_TABLE, OPS, ORPHAN_TIME, RELEASE_COOLDOWN, SETUP_TIME,
    STAGE_TABLE, Ack, Allowance, AttemptHistory, Cancel, Compute, Done, Drop, DurationEstimate,
    Exit, SendToWorker, FilePiece, FileStored, Faulted, Finish, Forget, SpoolFound, KnownAttempts,
    Interrupt, ClientHello, Jobs, SpoolResults, ResultsSpooled, Kill, Lease, Limit, LinkDown,
    LinkUp, Need, Node, CpusChanged, Outcome, Pause, PeerError, ROW_FIRST, UNKNOWN_TIME,
    PrepareDirectory, DirectoryReady, Purpose, Query, Ready, ReturnJobs, Received, Reclaim, Refused,
    Release, Report, Results, Resume, Retire, JobsReturned, RunnerGone, RunnerUp, WorkerInitialized,
    Send, SendSpooled, SetCpus, PrintStatus, Shutdown, Stage, Started, StartRunner, StartWorker,
    Status, Stop, StopRunner, WriteFile, FileWritten, TakeFromWorker, LimitMemory, NodeHello,
    WorkerGone, WorkerResults, WorkerReturnedJobs, MemoryExceeded, WorkerStartFailed, decode,
    encode, size_of)
from talk_node import (
    Talk, bounded, fed, only, result, row_of, rows, said, spec, texts)


def file_piece(name, offset=0, data=b'', purpose=Purpose.DEPENDS, comp='c'):
    return FilePiece(comp, int(purpose), 0, row_of(name), offset, data)


def stored(name='a', error='', purpose=Purpose.DEPENDS, complete=True):
    return FileWritten(FileStored('c', int(purpose), 0, name, error), complete)


NEEDED = [(1, 0, row_of('a'))]   # as in Need


# -- links and the lease ---------------------------------------------------------------------------

def test_welcome():
    assert Talk().link() == [Send(1, NodeHello('host', 2, {'fact': 1, 'holder': '', 'kept': {}}))]


def test_a_computation_takes_the_lease_and_a_refusal_names_the_holder():
    talk = Talk()
    talk.ready()
    assert talk.node.lease.state is Lease.HELD
    talk.link(2, b'other', 'you@there')
    refused, = said(talk.compute('d', 2), Refused)
    assert refused == Refused('d', 'busy', 'it serves me@here for 0 s', ('here', 7, 0, False))
    assert (talk.node.lease.state, talk.node.lease.holder_text) == (Lease.HELD, 'me@here')


def test_a_refusal_says_that_the_connection_to_the_holder_is_lost():
    talk = Talk()
    talk.ready()
    talk.jobs(1)
    talk.tell(LinkDown(1, False))
    talk.link(2, b'other', 'you@there')
    refused, = said(talk.compute('d', 2), Refused)
    assert refused.holder == ('here', 7, 0, True)


def test_a_client_that_does_not_tell_its_process_holds_the_node_without_one():
    talk = Talk()
    talk.link(1, process=())
    talk.ready()
    talk.link(2, b'other', 'you@there')
    refused, = said(talk.compute('d', 2), Refused)
    assert refused == Refused('d', 'busy', 'it serves me@here for 0 s')


def test_who_was_refused_is_told_when_the_node_is_free():
    talk = Talk()
    talk.ready()
    talk.link(2, b'other', 'you@there'), talk.link(3, b'third', 'somebody@there')
    assert said(talk.compute('d', 2), Refused)
    talk.say(Done('c'))
    actions = talk.tell(RunnerGone('c', ''))
    assert [action for action in actions if type(action) is Send] == [Send(2, CpusChanged(2))]
    assert only(talk.compute('d', 2), PrepareDirectory)
    refused, = said(talk.compute('e', 3), Refused)
    assert refused.text == 'it serves you@there for 0 s'


def test_a_file_for_a_computation_that_is_set_up():
    talk = Talk()
    talk.ready()
    for offset, data in (0, b'he'), (2, b'llo'):
        piece = file_piece('name', offset, data, Purpose.PLACED)
        assert talk.say(piece) == [WriteFile(piece)]
    answers = talk.tell(stored('name', '', Purpose.PLACED))
    assert answers == [Send(1, FileStored('c', 3, 0, 'name', ''))]
    assert talk.say(file_piece('name', 0, b'he', Purpose.PLACED, 'unknown')) == []
    answer, = said(talk.say(file_piece('name', 2, b'llo', Purpose.PLACED, 'unknown')), FileStored)
    assert 'not set up' in answer.error and answer[:4] == ('unknown', 3, 0, 'name')


def test_a_file_of_a_job_comes_from_a_node_only():
    talk = Talk()
    talk.ready()
    with pytest.raises(PeerError, match='not asked for'):
        talk.say(file_piece('name', 0, b'he', Purpose.FROM_JOB))


def test_a_query_tells_what_runs_and_what_waits():
    talk = Talk(cpus=1)
    talk.ready()
    talk.jobs(1, 2)
    talk.now += 3.0
    report, = said(talk.say(Query('c')), Report)
    assert report == Report('c', [(1, 3.0)], [2], {'busy': 1, 'holder': report.available['holder']})
    assert report.available['holder'].endswith(' for 3 s')
    report, = said(talk.say(Query('unknown')), Report)
    assert (report.running, report.waiting) == ([], [])


def test_a_client_may_open_several_computations_on_several_links():
    talk = Talk()
    talk.link(1), talk.link(2)
    assert only(talk.compute('c', 1), PrepareDirectory) and only(talk.compute('d', 2),
                                                                 PrepareDirectory)


def test_the_lease_is_free_after_done():
    talk = Talk()
    talk.ready()
    assert talk.say(Done('c')) == [StopRunner('c', False)]
    assert talk.node.lease.state is Lease.HELD
    talk.tell(RunnerGone('c', ''))
    assert talk.node.lease.state is Lease.FREE, 'a link alone holds nothing'
    talk.link(2, b'other')
    assert only(talk.compute('d', 2), PrepareDirectory)


@pytest.mark.parametrize('on_purpose, busy, at_once',
                         [(True, True, True), (True, False, True), (False, False, False),
                          (False, True, False)])
def test_a_link_ends(on_purpose, busy, at_once):
    talk = Talk()
    talk.ready()
    if busy:
        talk.jobs(1)
    actions = talk.tell(LinkDown(1, on_purpose))
    assert talk.node.lease.state is Lease.ORPHANED
    assert bool(only(actions, StopRunner)) == at_once
    if at_once:
        talk.tell(RunnerGone('c', ''))
        assert talk.node.lease.state is Lease.FREE


def test_an_orphan_ends_its_jobs_and_then_frees_the_node():
    talk = Talk()
    talk.ready()
    talk.jobs(1)
    talk.tell(LinkDown(1, False))
    assert talk.after(ORPHAN_TIME / 2) == []
    assert talk.results(1, 1) == [SpoolResults('c', b'me', [result(1)])]
    talk.tell(ResultsSpooled('c', [1]))
    assert talk.after(ORPHAN_TIME / 2) == [StopRunner('c', False)]
    talk.tell(RunnerGone('c', ''))
    assert talk.node.lease.state is Lease.FREE and talk.node.cpus.free == 2
    assert talk.node.results.spooled['c'].serials == {1}


def test_an_idle_orphan_makes_way_for_another_client():
    talk = Talk()
    talk.ready()
    talk.tell(LinkDown(1, False))
    talk.link(2, b'other')
    actions = talk.compute('d', 2)
    assert said(actions, Refused)[0].code == 'busy' and only(actions, StopRunner)
    assert Send(2, CpusChanged(2)) in talk.tell(RunnerGone('c', ''))


def orphaned(*serials):
    """A node that has finished these for a client that is gone, and has let it go."""
    talk = Talk(cpus=len(serials))
    talk.ready()
    for serial in serials:
        (worker, _), = fed(talk.jobs(serial))
        talk.results(worker, serial)
    assert (talk.tell(LinkDown(1, False))
            == [SpoolResults('c', b'me', [result(serial) for serial in serials])])
    talk.tell(ResultsSpooled('c', list(serials)))
    assert only(talk.after(ORPHAN_TIME), StopRunner)
    talk.tell(RunnerGone('c', ''))
    return talk


def test_results_of_an_orphan_that_is_being_closed_go_when_its_client_is_done():
    talk = Talk()
    talk.link()
    talk.ready()
    talk.jobs(1)
    talk.tell(LinkDown(1, False))
    talk.results(1, result(1))
    talk.tell(ResultsSpooled('c', [1]))
    assert only(talk.after(ORPHAN_TIME), StopRunner)
    assert said(talk.link(2, b'me'), NodeHello)[0].facts['kept'] == {'c': [1]}
    assert only(talk.say(Done('c'), 2), Forget) == [Forget('c')]


def test_results_are_not_removed_for_a_stranger_who_has_no_key():
    talk = orphaned(1)
    talk.link(2, b'you')
    assert not only(talk.say(Done('c'), 2), Forget)
    talk.say(Reclaim('c', b'', False), 2)
    assert only(talk.say(Done('c'), 2), Forget) == [Forget('c')]


def test_a_client_that_is_back_is_told_what_is_here_of_it():
    """It may be done with that, while the node could not be told."""
    talk = Talk()
    talk.link()
    talk.ready()
    talk.jobs(1)
    talk.tell(LinkDown(1, False))
    hello = said(talk.link(2, b'me'), NodeHello)[0]
    assert hello.facts['kept'] == {'c': []}
    assert said(talk.link(3, b'you'), NodeHello)[0].facts['kept'] == {}
    assert only(talk.say(Done('c'), 2), StopRunner)


def test_a_client_that_comes_late_gets_what_is_on_the_disk():
    talk = orphaned(1, 2)
    assert (talk.link(2, b'me')
            == [Send(2, NodeHello('host', 2, {'fact': 1, 'holder': '', 'kept': {'c': [1, 2]}}))])
    assert talk.compute('c', 2)[0] == SendSpooled(2, 'c')
    talk.tell(DirectoryReady('c', []))
    assert said(talk.tell(RunnerUp('c')), Ready) == [Ready('c', [1, 2])]
    assert (fed(talk.jobs(1, 2, 3, link=2)) and list(talk.node.tables.comps['c'].attempts)
            == [3]), 'what has ended is not run again'
    assert talk.say(Ack('c', [1]), 2) == [] and talk.say(Ack('c', [2]), 2) == [Forget('c')]
    assert not talk.node.results.spooled


def test_another_process_reclaims_results():
    talk = orphaned(1, 2)
    talk.link(2, b'other')
    assert talk.say(Reclaim('unknown'), 2) == [Send(2, KnownAttempts('unknown', []))]
    assert talk.say(Reclaim('c'), 2) == [Send(2, KnownAttempts('c', [1, 2])), SendSpooled(2, 'c')]
    assert talk.say(Ack('c', [1, 2]), 2) == [Forget('c')]


def test_another_process_reclaims_what_runs():
    talk = Talk(cpus=2)
    talk.ready()
    talk.jobs(1, 2, 3)
    talk.results(1, 1)
    talk.link(2, b'other', 'you@there')
    assert said(talk.say(Reclaim('c'), 2), Refused)[0].code == 'busy'
    talk.tell(LinkDown(1, False), ResultsSpooled('c', [1]))
    assert talk.say(Reclaim('c'), 2) == [Send(2, KnownAttempts('c', [2, 3, 1])),
                                         SendSpooled(2, 'c')]
    assert (talk.node.lease.holder, talk.node.lease.state) == (b'other', Lease.HELD)
    assert said(talk.results(2, 2), Results) == [Results('c', [result(2)])]
    talk.say(Ack('c', [1, 2]), 2)
    assert only(talk.say(Done('c'), 2), StopRunner)


def test_results_that_find_no_room_on_the_disk_stay():
    talk = Talk()
    talk.ready()
    talk.jobs(1)
    talk.results(1, 1)
    assert only(talk.tell(LinkDown(1, False)), SpoolResults)
    talk.tell(ResultsSpooled('c', [], 'no space'))
    keep, = talk.after(ORPHAN_TIME)
    assert keep == SpoolResults('c', b'me', [result(1)])
    talk.tell(ResultsSpooled('c', [], 'no space'))
    assert (not only(talk.after(ORPHAN_TIME - 1), StopRunner)
            and talk.node.lease.state is Lease.ORPHANED)
    assert only(talk.after(1), SpoolResults)
    talk.tell(ResultsSpooled('c', [1]))
    assert only(talk.after(ORPHAN_TIME), StopRunner)


def test_results_that_nobody_fetches_are_given_up_at_last():
    talk = Talk(zombie=60.0)
    talk.tell(SpoolFound('c', b'me', [1, 2], talk.now + 60.0))
    assert talk.after(59.0) == []
    remembered, forgotten = talk.after(1.0)
    assert (forgotten == Forget('c') and remembered.past.given_up == {1, 2}
            and '60 s' in remembered.past.text)


def test_results_of_a_client_that_made_way_for_another_are_given_up_at_last():
    talk = Talk(zombie=60.0)
    talk.ready()
    talk.jobs(1)
    talk.results(1, 1)
    talk.tell(LinkDown(1, False), ResultsSpooled('c', [1]))
    talk.link(2, b'other')
    assert only(talk.compute('d', 2), StopRunner)
    talk.tell(RunnerGone('c', ''))
    assert not only(talk.after(59.0), Forget) and only(talk.after(1.0), Forget) == [Forget('c')]


def test_results_are_not_given_up_while_other_jobs_of_their_computation_run():
    talk = Talk(cpus=2, zombie=60.0)
    talk.ready()
    talk.jobs(1, 2)
    talk.results(1, 1)
    talk.tell(LinkDown(1, False), ResultsSpooled('c', [1]))
    assert not only(talk.after(100.0), Forget)
    talk.results(2, 2)
    talk.tell(ResultsSpooled('c', [2]))
    assert only(talk.after(1.0), StopRunner)
    talk.tell(RunnerGone('c', ''))
    assert not only(talk.after(58.0), Forget) and only(talk.after(62.0), Forget) == [Forget('c')]


def test_a_client_that_is_back_gets_what_it_has_not_acknowledged():
    talk = Talk()
    talk.ready()
    talk.jobs(1, 2)
    talk.results(1, 1)
    talk.tell(LinkDown(1, False))
    talk.results(2, 2)
    talk.link(2, b'me', 'me@back')
    actions = talk.compute('c', 2)
    assert actions == [Send(2, Ready('c', [1, 2])), Send(2, Results('c', [result(1), result(2)]))]
    assert talk.node.lease.state is Lease.HELD and talk.node.lease.holder_text == 'me@back'
    talk.say(Ack('c', [1, 2]), 2)
    assert said(talk.compute('c', 2), Ready) == [Ready('c', [])]
    assert talk.after(ORPHAN_TIME * 2) == []


def test_another_client_is_refused_while_the_holder_is_away():
    talk = Talk()
    talk.ready()
    talk.jobs(1)
    talk.tell(LinkDown(1, False))
    talk.link(2, b'other')
    assert said(talk.compute('d', 2), Refused)[0].code == 'busy'


def test_orphans_do_not_multiply_timers():
    # Each orphan's timer used to set one for every orphan: two, four, eight, ... a second.
    talk = Talk()
    talk.ready('c'), talk.ready('d')
    talk.jobs(1, comp='c'), talk.jobs(2, comp='d')
    talk.tell(LinkDown(1, False))
    talk.after(ORPHAN_TIME)
    for _ in range(8):
        talk.after(1.01)
    assert len(talk.node.timers) <= 4


def test_a_second_break_has_its_own_time():
    # The timer of the first break must not end an orphan whose client was back meanwhile.
    talk = Talk()
    talk.ready()
    talk.jobs(1)
    talk.tell(LinkDown(1, False))
    talk.after(ORPHAN_TIME - 1)
    talk.link(2)
    talk.compute('c', 2)
    talk.tell(LinkDown(2, False))
    talk.results(1, 1)
    assert talk.after(2) == []


def test_messages_of_links_that_are_not_there():
    for event in (Received(7, Done('c')), Received(7, ClientHello('x', 1.0))):
        with pytest.raises(PeerError):
            Talk().tell(event)
    assert Talk().tell(LinkDown(7, True)) == []


# -- stages ----------------------------------------------------------------------------------------

def test_a_computation_without_files():
    talk = Talk()
    talk.link()
    assert talk.compute() == [PrepareDirectory('c', spec())]
    assert talk.tell(DirectoryReady('c', [])) == [StartRunner('c', spec(), 1)]
    assert talk.tell(RunnerUp('c')) == [Send(1, Ready('c', []))]


def test_a_computation_with_files():
    talk = Talk()
    talk.link()
    talk.compute(files=[('a', 3, b'digest', 0o600)])
    assert talk.tell(DirectoryReady('c', NEEDED)) == [Send(1, Need('c', NEEDED))]
    assert talk.say(file_piece('a', 0, b'abc')) == [WriteFile(file_piece('a', 0, b'abc'))]
    assert talk.tell(stored('another', complete=False)) == []
    assert only(talk.tell(stored()), StartRunner)


@pytest.mark.parametrize('before, event, code', [
    ([], DirectoryReady('c', [], 'no room'), 'transfer'),
    ([DirectoryReady('c', NEEDED)], stored('a', 'wrong digest'), 'transfer'),
    ([DirectoryReady('c', [])], RunnerGone('c', 'setup raised'), 'setup'),
    ([DirectoryReady('c', []), RunnerUp('c')], RunnerGone('c', 'killed'), 'setup')])
def test_failures_are_told_and_end_it(before, event, code):
    talk = Talk()
    talk.link()
    talk.compute()
    talk.tell(*before)
    actions = talk.tell(event)
    refused, = said(actions, Refused)
    assert refused.code == code and refused.text in str(event)
    assert only(actions, StopRunner) == [StopRunner('c', True)]
    assert said(talk.compute(), Refused)[0].code == 'closing'
    talk.tell(RunnerGone('c', ''))
    assert only(talk.compute(), PrepareDirectory)


def test_setup_may_not_take_for_ever():
    talk = Talk()
    talk.link()
    talk.compute()
    talk.tell(DirectoryReady('c', []))
    assert said(talk.after(SETUP_TIME), Refused)[0].code == 'setup'


def test_late_news_of_a_computation_that_is_closing_is_dropped():
    talk = Talk()
    talk.link()
    talk.compute()
    talk.say(Done('c'))
    assert talk.tell(DirectoryReady('c', []), stored(), RunnerUp('c')) == []
    assert (talk.say(Jobs('c', [(1, b'', None)])) == talk.say(ReturnJobs('c', 1))
            == talk.say(Done('c')) == [])
    assert talk.tell(RunnerGone('c', ''), RunnerGone('c', '')) == []


def test_what_is_left_of_files_that_were_asked_for_does_no_harm():
    talk = Talk()
    talk.link()
    talk.compute()
    talk.tell(DirectoryReady('c', NEEDED), stored(), RunnerUp('c'))
    assert only(talk.say(file_piece('a')), WriteFile)
    assert talk.tell(stored('a', 'it was not asked for')) == []


def test_a_file_that_was_not_asked_for():
    talk = Talk()
    talk.ready()
    with pytest.raises(PeerError):
        talk.say(file_piece('a'))


@pytest.mark.parametrize('message', [Compute('c', {}), file_piece('a'), Jobs('c', []),
                                     Cancel('c', []), ReturnJobs('c', 1), Ack('c', []), Done('c')])
def test_a_computation_of_another_client(message):
    talk = Talk()
    talk.ready()
    talk.link(2, b'other')
    with pytest.raises(PeerError, match='of another client'):
        talk.say(message, 2)


@pytest.mark.parametrize('message',
                         [NodeHello('', 1, {}), Ready('c', []), Results('c', []), 'nonsense'])
def test_messages_that_may_not_come(message):
    talk = Talk()
    talk.link()
    with pytest.raises(PeerError):
        talk.say(message)


@pytest.mark.parametrize('changes', [
    {'name': None}, {'kind': 5}, {'kind': 'pickle'}, {'code': 'text'}, {'files': ()},
    {'cleanup': 1}, {'dest_path': None}, {'max_jobs': 'x'},
    {'max_jobs': -1},
    {'python': []}, {'support': []}, {'program': b''}, {'files': [('a', 1, b'')]},
    {'files': [['a', 1, b'', 0]]},
    {'files': [('a', '1', b'', 0)]}])
def test_a_spec_that_is_wrong(changes):
    """Refused where messages are opened: the state relies on it."""
    _, _, [good] = encode(Compute('c', spec()))
    assert decode(OPS[Compute], 0, good) == Compute('c', spec())
    _, _, [bad] = encode(Compute('c', spec(**changes)))
    with pytest.raises(PeerError):
        decode(OPS[Compute], 0, bad)


@pytest.mark.parametrize('options',
                         [{'cpus': 0}, {'cpus': -1}, {'cpus': 'x'}, {'timeout': 'x'}, 'nonsense'])
def test_options_that_are_wrong(options):
    """cpus=-1 would make CPUs out of nothing, the others would end the daemon."""
    _, _, [bad] = encode(Jobs('c', [(1, b'', options)]))
    with pytest.raises(PeerError):
        decode(OPS[Jobs], 0, bad)


@pytest.mark.parametrize('table, states, events', [
    (LEASE_TABLE, Lease, ('taken', 'broken', 'ended')),
    (STAGE_TABLE, Stage, ('missing', 'complete', 'up', 'close'))])
def test_absent_pairs_raise_and_change_nothing(table, states, events):
    talk = Talk()
    talk.ready()
    comp, lease = talk.node.tables.comps['c'], talk.node.lease
    calls = {'taken': lambda: lease.take(b'', '', 0.0), 'broken': lease.orphan, 'ended': lease.end}
    for state in states:
        for event in events:
            lease.state = state
            comp.stage = state
            if (state, event) not in table:
                with pytest.raises(KeyError):
                    calls[event]() if states is Lease else comp.move(event)
                assert lease.state is comp.stage is state


# -- dispatch --------------------------------------------------------------------------------------

def test_workers_that_have_nothing_to_do_for_long_end():
    """The one that was used is spared, and another is started when there is work again."""
    talk = Talk()
    talk.ready()
    first, second = (worker for worker, _ in fed(talk.jobs(1, 2)))
    talk.results(first, 1)
    talk.after(60.0)
    talk.results(second, 2)
    assert not only(talk.after(239.0), Retire)
    assert only(talk.after(1.0), Retire) == [Retire(first)]
    (again, _), = fed(talk.jobs(3))
    assert again == second
    talk.results(second, 3)
    assert not only(talk.after(299.0), Retire)
    assert only(talk.after(1.0), Retire) == [Retire(second)]
    talk.after(1000.0)
    assert len(only(talk.jobs(4), StartWorker)) == 1
    assert talk.node.cpus.free == 1


def test_workers_are_started_when_there_is_work_and_used_again():
    talk = Talk()
    assert not only(talk.ready(), StartWorker)
    actions = talk.jobs(1, 2, 3)
    assert only(actions, StartWorker) == [StartWorker(1, 'c'), StartWorker(2, 'c')]
    assert fed(actions) == [(1, [1]), (2, [2])]
    actions = talk.results(2, 2)
    assert fed(actions) == [(2, [3])] and rows(actions) == [(2, Outcome.RETURNED)]
    talk.results(1, 1), talk.results(2, 3)
    assert talk.node.cpus.free == 2
    assert not only(talk.jobs(4, 5), StartWorker)


def test_jobs_wait_until_the_computation_is_ready():
    talk = Talk()
    talk.link()
    talk.compute()
    assert talk.jobs(1) == []
    talk.tell(DirectoryReady('c', []))
    actions = talk.tell(RunnerUp('c'))
    assert said(actions, Ready) == [Ready('c', [1])] and fed(actions) == [(1, [1])]


def test_jobs_of_several_cpus_keep_their_turn():
    talk = Talk(4)
    talk.ready()
    talk.jobs(1)
    assert fed(talk.jobs(2, cpus=4)) == [] and fed(talk.jobs(3)) == []
    assert fed(talk.results(1, 1)) == [(1, [2])] and talk.node.cpus.free == 0
    assert fed(talk.results(1, 2)) == [(1, [3])] and talk.node.cpus.free == 3


def test_a_computation_uses_no_more_cpus_than_its_client_says():
    talk = Talk(4)
    talk.ready()
    talk.say(Limit('c', 2))
    assert len(fed(talk.jobs(1, 2, 3, 4, 5))) == 2 and talk.node.cpus.free == 2
    assert len(fed(talk.say(Limit('c', 3)))) == 1 and talk.node.cpus.free == 1
    talk.say(Limit('c', 1))
    assert fed(talk.results(1, 1)) == fed(talk.results(2, 2)) == [] and talk.node.cpus.free == 3
    assert len(fed(talk.results(3, 3))) == 1 and talk.node.cpus.free == 3
    assert talk.say(Limit('unknown', 1)) == []


def test_another_computation_has_what_one_may_not_use():
    talk = Talk(4)
    talk.ready()
    talk.ready('d', 1)
    talk.say(Limit('c', 1))
    assert len(fed(talk.jobs(1, 2, 3))) == 1 and len(fed(talk.jobs(1, 2, 3, 4, comp='d'))) == 3


def test_a_job_wider_than_the_limit_goes_back():
    talk = Talk(4)
    talk.ready()
    talk.jobs(1, 2, 3, 4)
    talk.jobs(5, cpus=3)
    assert said(talk.say(Limit('c', 2)), JobsReturned) == [JobsReturned('c', [5])]


def test_a_job_that_wants_more_cpus_than_there_are():
    talk = Talk()
    talk.ready()
    actions = talk.jobs(1, cpus=3)
    assert (rows(actions) == [(1, Outcome.DIED)]
            and 'wants 3 CPUs and the node has 2' in texts(actions)[1])
    assert talk.node.attempts.held_bytes == 0


def test_long_jobs_are_not_fed_ahead():
    talk = Talk(1)
    talk.ready()
    talk.jobs(*range(1, 50))
    for serial in range(1, 10):
        assert fed(talk.results(1, result(serial, took=0.1))) == [(1, [serial + 1])]


def short_jobs(talk):
    """Send 199 short jobs to a node of one CPU; return the serials of those that its worker got."""
    talk.ready()
    for serial in range(800, 900):
        talk.learn_short(serial)
    (_, serials), = fed(talk.jobs(*range(1, 200)))
    return serials


def test_short_jobs_are_fed_ahead():
    talk = Talk(1)
    serials = short_jobs(talk)
    assert 10 < len(serials) <= 65 and serials == list(range(1, len(serials) + 1))
    (_, more), = fed(talk.results(1, *[result(serial, took=0.0001) for serial in serials[:-1]]))
    assert more[0] == len(serials) + 1


def test_nobody_waits_for_the_next_turn_while_workers_have_enough_short_jobs():
    talk = Talk(1)
    short_jobs(talk)
    supplied = talk.node.scheduler
    assert not supplied.is_supplied, 'there was no result, and the next one may come soon'
    rows = [result(serial, took=0.0001) for serial in range(1, 200)]
    talk.results(1, *rows[:40])
    assert supplied.is_supplied
    talk.after(0.001)
    assert not supplied.is_supplied, 'nothing has come in this turn'
    talk.results(1, *rows[40:100])
    assert supplied.is_supplied
    talk.results(1, *rows[100:160])
    assert not supplied.is_supplied, 'no more jobs wait here: the client is to send some'


def test_long_jobs_end_when_the_next_turn_is_waited_for():
    talk = Talk(1)
    talk.ready()
    talk.jobs(*range(1, 100))
    for serial in range(1, 50):
        talk.results(1, result(serial, took=0.002))
        assert not talk.node.scheduler.is_supplied


def test_duplicates_of_jobs_are_ignored():
    talk = Talk(1)
    talk.ready()
    talk.jobs(1, 2, 2)
    assert talk.jobs(1, 2) == [] and talk.node.attempts.held_bytes == 2   # what waits
    assert fed(talk.results(1, 1)) == [(1, [2])]
    assert talk.jobs(1) == [], 'it has ended and is not acknowledged'


def test_ack_forgets():
    talk = Talk()
    talk.ready()
    talk.jobs(1)
    talk.results(1, 1)
    talk.say(Ack('c', [1, 5])), talk.say(Ack('unknown', [1]))
    assert said(talk.compute(), Ready) == [Ready('c', [])]


def test_results_of_unknown_workers_and_wrong_serials():
    talk = Talk()
    talk.ready()
    talk.jobs(1)
    assert (talk.results(99, 1) == []
            and talk.tell(WorkerReturnedJobs(99, [1]), WorkerGone(99, '')) == [])
    with pytest.raises(PeerError):
        talk.results(1, 2)


def test_a_worker_that_answers_wrongly_keeps_no_cpu():
    # A right row before the wrong one emptied its queue, and its CPU was never given back.
    talk = Talk()
    talk.ready()
    talk.jobs(1)
    with pytest.raises(PeerError):
        talk.results(1, 1, 77)
    talk.tell(WorkerGone(1, 'killed', 1))
    assert talk.node.cpus.free == 2


def test_two_computations_share_the_cpus():
    talk = Talk(2)
    talk.ready('c'), talk.ready('d')
    talk.jobs(1, comp='c')
    assert len(fed(talk.jobs(2, 3, comp='d'))) == 1 and talk.node.cpus.free == 0
    assert fed(talk.results(1, 1)) == [(3, [3])]
    talk.results(2, 2), talk.results(3, 3)
    assert talk.node.cpus.free == 2


def test_a_computation_that_always_has_jobs_does_not_keep_out_another():
    # The first in the dictionary takes each CPU that becomes free.
    talk = Talk(1)
    talk.ready('c'), talk.ready('d')
    talk.jobs(1, 2, comp='c'), talk.jobs(1001, comp='d')
    for serial in range(1, 50):
        if 2 in talk.node.tables.workers:   # d's
            return
        talk.jobs(serial + 2, comp='c')
        talk.results(1, result(serial))
    pytest.fail('d was never served')


def test_max_jobs_retires_workers():
    talk = Talk(1)
    talk.ready(max_jobs=2)
    talk.jobs(1, 2, 3)
    talk.results(1, 1)
    actions = talk.results(1, 2)
    assert (only(actions, Retire) == [Retire(1)]
            and only(actions, StartWorker) == [StartWorker(2, 'c')])
    assert fed(actions) == [(2, [3])] and talk.tell(WorkerGone(1, 'ended')) == []


def test_what_stands_behind_a_long_job_is_taken_back_for_an_idle_worker():
    talk = Talk(2)
    talk.ready()
    talk.learn_short()
    feeds = dict(fed(talk.jobs(1, 2, 3, 4)))
    first, second = sorted(feeds)
    talk.results(second, *[result(serial, took=0.0001) for serial in feeds[second]])
    actions = talk.after(0.03) + talk.after(0.03)
    if len(feeds[first]) > 1:
        assert only(actions, TakeFromWorker) == [TakeFromWorker(first)]
        assert fed(talk.tell(WorkerReturnedJobs(first, feeds[first][1:])))[0][0] == second


def test_a_look_at_idle_workers_ends_when_time_is_rounded():
    # since + BEGUN_TIME may have come while now - since is a little less: the timer was set for
    # now, again and again.
    talk = Talk(2)
    talk.ready()
    talk.learn_short()
    talk.now = next(when / 10
                    for when in range(1000) if when / 10 + BEGUN_TIME - when / 10 < BEGUN_TIME)
    feeds = dict(fed(talk.jobs(1, 2, 3, 4)))
    first, second = sorted(feeds, key=lambda worker: -len(feeds[worker]))
    talk.results(second, *[result(serial, took=0.0001) for serial in feeds[second]])
    assert only(talk.after(BEGUN_TIME), TakeFromWorker) == [TakeFromWorker(first)]


# -- workers die -----------------------------------------------------------------------------------

def ahead(talk):
    """Worker 1 of a node of one CPU runs attempt 1; 2 and 3 stand behind it, 4 waits with the
    node."""
    talk.ready()
    talk.learn_short()
    (worker, serials), = fed(talk.jobs(1, 2, 3))
    assert worker == 1 and serials == [1, 2, 3]
    return talk


def test_a_worker_dies_while_it_runs():
    talk = ahead(Talk(1))
    talk.jobs(4)
    actions = talk.tell(WorkerGone(1, 'it was killed by signal 11', 1, b'out', b'err'))
    assert (rows(actions) == [(1, Outcome.DIED)]
            and texts(actions)[1] == 'it was killed by signal 11')
    assert said(actions, Results)[0].rows[0][5:] == (b'out', b'err')
    assert only(actions, StartWorker) == [StartWorker(2, 'c')] and fed(actions)[0][1][0] == 2
    waiting = [attempt.serial for attempt in talk.node.tables.comps['c'].waiting]
    assert fed(actions)[0][1] + waiting == [2, 3, 4]


def test_a_worker_dies_idle():
    talk = Talk(1)
    talk.ready()
    talk.jobs(1)
    talk.results(1, 1)
    assert talk.tell(WorkerGone(1, 'gone')) == []
    assert fed(talk.jobs(2)) == [(2, [2])] and talk.node.cpus.free == 0


def test_a_worker_that_cannot_be_started_is_tried_again():
    talk = Talk(2)
    talk.ready()
    assert fed(talk.jobs(1)) == [(1, [1])]
    assert fed(talk.tell(WorkerStartFailed(1, 'no descriptors'))) == [] and talk.node.cpus.free == 2
    assert fed(talk.after(1.0)) == [(2, [1])] and talk.node.cpus.free == 1


def test_stillborn_workers_end_in_a_refusal():
    talk = Talk(2)
    talk.ready()
    actions = talk.jobs(1, 2)
    for turn in range(20):
        worker = only(actions, StartWorker)[0].worker
        actions = talk.tell(WorkerGone(worker, 'no memory'))
        if said(actions, Refused):
            break
    refused, = said(actions, Refused)
    assert refused.code == 'worker' and 'no memory' in refused.text and turn < 10
    assert talk.node.cpus.free == 2 and talk.node.attempts.held_bytes == 0


def test_results_reach_the_client_before_the_refusal_that_ends_it():
    # After the refusal the client believes the job lost: a finished one is abandoned or run again.
    talk = Talk()
    talk.ready()
    talk.jobs(1, 2)
    actions = talk.tell(WorkerResults(1, [result(1)]), RunnerGone('c', 'killed'))
    kinds = [type(action.message) for action in only(actions, Send)]
    assert kinds == [Results, Refused]
    assert rows(actions) == [(1, Outcome.RETURNED), (2, Outcome.DIED)]


# -- cancel, timeout, recall -----------------------------------------------------------------------

def test_cancel_of_one_that_waits():
    talk = Talk(1)
    talk.ready()
    talk.jobs(1, 2)
    actions = talk.say(Cancel('c', [2, 99]))
    assert rows(actions) == [(2, Outcome.CANCELLED)] and not only(actions, Interrupt)


def test_cancel_of_one_that_runs_is_a_request_and_then_a_kill():
    talk = Talk(1)
    talk.ready()
    talk.jobs(1)
    assert talk.say(Cancel('c', [1])) == [Interrupt(1, 1)]
    assert talk.say(Cancel('c', [1])) == []
    assert not only(talk.after(GRACE - 0.1), Kill)
    assert talk.after(0.2) == [Kill(1)]
    actions = talk.tell(WorkerGone(1, 'killed', 1))
    assert rows(actions) == [(1, Outcome.CANCELLED)] and talk.node.cpus.free == 1


@pytest.mark.parametrize('came, counts', [
    (Outcome.RETURNED, Outcome.RETURNED), (Outcome.RETURNED_CODE, Outcome.RETURNED_CODE),
    (Outcome.RAISED, Outcome.CANCELLED)])
def test_a_cancelled_job_that_returns_within_the_grace_has_returned(came, counts):
    talk = Talk(1)
    talk.ready()
    talk.jobs(1)
    talk.say(Cancel('c', [1]))
    assert rows(talk.results(1, result(1, came))) == [(1, counts)]
    assert talk.after(GRACE + 1) == [], 'no kill of the next job'


def test_cancel_of_one_that_stands_behind_another():
    talk = ahead(Talk(1))
    assert talk.say(Cancel('c', [2])) == [TakeFromWorker(1)]
    actions = talk.tell(WorkerReturnedJobs(1, [2, 3]))
    assert rows(actions) == [(2, Outcome.CANCELLED)]
    assert [attempt.serial for attempt in talk.node.tables.comps['c'].waiting] == [3]


def test_cancel_of_one_that_starts_before_it_is_taken_back():
    talk = ahead(Talk(1))
    talk.say(Cancel('c', [2]))
    actions = talk.results(1, result(1, took=0.0001))
    assert only(actions, Interrupt) == [Interrupt(1, 2)]
    talk.tell(WorkerReturnedJobs(1, [3]))
    assert rows(talk.results(1, result(2, Outcome.RAISED))) == [(2, Outcome.CANCELLED)]


def test_a_worker_that_gives_back_is_not_fed_meanwhile():
    # What it is fed arrives behind what it gave back: 2 and 3 are taken for its own still, and the
    # next result for a lie.
    talk = ahead(Talk(1))
    talk.say(Cancel('c', [3]))
    talk.jobs(*range(4, 200))
    actions = talk.results(1, result(1, took=0.0001))
    later = [serial for _, serials in fed(actions) for serial in serials]
    talk.tell(WorkerReturnedJobs(1, [2, 3] if not later else [3]))
    queue = [attempt.serial for attempt in talk.node.tables.workers[1].queue]
    assert 3 not in queue


def test_a_timeout():
    talk = Talk(1)
    talk.ready()
    talk.jobs(1, 2, timeout=3.0)
    assert not only(talk.after(2.9), Interrupt)
    assert talk.after(0.2) == [Interrupt(1, 1)]
    actions = talk.results(1, result(1, Outcome.RETURNED))
    assert rows(actions) == [(1, Outcome.TIMED_OUT)] and 'dispy_timeout' in texts(actions)[1]
    assert not only(talk.after(2.9), Interrupt) and talk.after(0.2) == [Interrupt(1, 2)]
    assert talk.after(GRACE) == [Kill(1)]
    assert rows(talk.tell(WorkerGone(1, 'killed', 2))) == [(2, Outcome.TIMED_OUT)]


def test_timers_of_jobs_that_have_ended_do_not_pile_up():
    # One of each job with a timeout is kept until it is due, an hour later.
    talk = Talk(1)
    talk.ready()
    for serial in range(1, 2001):
        talk.jobs(serial, timeout=3600.0)
        talk.results(1, serial)
        talk.say(Ack('c', [serial]))
    assert len(talk.node.timers) < 500


def test_recall_gives_back_what_waits():
    talk = Talk(1)
    talk.ready()
    talk.jobs(1, 2, 3, 4)
    returned, = said(talk.say(ReturnJobs('c', [3, 4])), JobsReturned)
    assert returned.serials == [3, 4] and talk.node.attempts.held_bytes == 2   # what waits
    actions = talk.say(ReturnJobs('c', [1, 2]))
    assert (said(actions, JobsReturned) == [JobsReturned('c', [2])]
            and said(actions, Started) == [Started('c', [(1, 0.0)])])
    assert not said(talk.say(ReturnJobs('c', [2, 9])),
                    JobsReturned), 'what is not here was answered'


def test_recall_of_what_stands_behind_another_in_a_worker():
    # Whether it has begun is known to the worker alone; the client gets one of three answers.
    talk = ahead(Talk(1))
    assert only(talk.say(ReturnJobs('c', [2, 3])), TakeFromWorker) == [TakeFromWorker(1)]
    actions = talk.results(1, result(1, took=0.0001))
    assert said(actions, Started) == [Started('c', [(2, 0.0)])], 'it was recalled too late'
    assert said(talk.tell(WorkerReturnedJobs(1, [3])), JobsReturned) == [JobsReturned('c', [3])]
    assert set(talk.node.tables.comps['c'].attempts) == {2}


def test_what_was_recalled_goes_back_when_its_worker_dies():
    talk = ahead(Talk(1))
    talk.say(ReturnJobs('c', [3]))
    actions = talk.tell(WorkerGone(1, 'killed', 1))
    assert said(actions, JobsReturned) == [JobsReturned('c', [3])] and fed(actions) == [(2, [2])]


def test_what_has_begun_is_told_when_it_has_run_for_a_while():
    talk = Talk(2)
    talk.ready()
    talk.jobs(1)
    talk.after(BEGUN_TIME / 2)
    talk.jobs(2)
    told = said(talk.after(BEGUN_TIME / 2), Started)
    assert [serial for message in told for serial, _ in message.rows] == [1]
    told = said(talk.after(BEGUN_TIME / 2), Started)
    assert [serial for message in told for serial, _ in message.rows] == [2]
    assert (talk.after(10.0) == [] and talk.node.scheduler.look_at
            == math.inf), 'told once, and nothing more is looked for'


def test_short_jobs_are_not_told_of():
    talk = Talk(1)
    talk.ready()
    for serial in range(1, 1000):
        actions = talk.jobs(serial) + talk.after(0.001) + talk.results(1,
                                                                       result(serial, took=0.001))
        assert not said(actions, Started)


def test_what_runs_is_told_again_on_a_new_connection():
    talk = Talk(1)
    talk.ready()
    talk.jobs(1)
    talk.after(1.0)
    talk.tell(LinkDown(1, False))
    talk.link(2)
    assert said(talk.compute(link=2), Started) == [Started('c', [(1, 1.0)])]


def test_a_question_is_answered_when_what_came_before_it_was_handed_out():
    # Jobs and the question are in one turn: the job runs when the answer leaves.
    talk = Talk(1)
    talk.ready()
    jobs, query = Jobs('c', [(1, b'', None), (2, b'', None)]), Query('c')
    report, = said(talk.tell(Received(1, jobs), Received(1, query)), Report)
    assert (report.running, report.waiting) == ([(1, 0.0)], [2])


def test_priorities_among_what_waits():
    talk = Talk(1)
    talk.ready()
    talk.jobs(1, 2, 3)
    talk.jobs(4, 5, priority=7)
    talk.jobs(6, priority=-1), talk.jobs(7), talk.jobs(8, priority=9)
    order = []
    for serial in (1, 8, 4, 5, 2, 3, 7, 6):
        order += [serial for _, serials in fed(talk.results(1, serial)) for serial in serials]
    assert order == [8, 4, 5, 2, 3, 7, 6]


def test_a_worker_that_runs_a_long_job_holds_nothing_behind_it():
    talk = ahead(Talk(1))
    assert only(talk.after(BEGUN_TIME), TakeFromWorker) == [TakeFromWorker(1)]
    talk.tell(WorkerReturnedJobs(1, [2, 3]))
    talk.jobs(4, priority=1)
    assert [attempt.serial for attempt in talk.node.tables.comps['c'].waiting] == [4, 2, 3]


# -- how long jobs take ----------------------------------------------------------------------------

@pytest.mark.parametrize('durations, least, most, why', [
    ([0.001] * 40, 0.0009, 0.0011, 'all the same'),
    ([0.001] * 31 + [1.0], 0.03, 0.04, 'the mean sees one that is very long'),
    ([0.001] * 27 + [0.05] * 5, 0.05, 0.05, 'the quantile sees one in ten'),
    ([0.001, 1.0] * 20, 1.0, 1.0, 'alternating'),
    ([1.0] * 40 + [0.001] * 32, 0.0009, 0.0011, 'what was long ago is forgotten'),
])
def test_the_estimate_of_durations(durations, least, most, why):
    estimate = DurationEstimate()
    assert estimate.seconds is None
    for took in durations:
        estimate.add([took])
    assert least <= estimate.seconds <= most, why


def test_an_allowance_grows_by_doubling_and_falls_at_once():
    estimate = DurationEstimate()
    allowance = Allowance(estimate, 1, 512)
    assert allowance.jobs(0.1) == 1, 'unknown'
    seen = []
    for _ in range(60):
        estimate.add([0.001])
        allowance.ended(1, 2, 2)
        seen.append(allowance.jobs(0.1))
    assert all(after <= 2 * before for before, after in zip(seen, seen[1:])) and seen[-1] == 16
    assert seen[1] == 1, 'two quick jobs on two CPUs promise nothing'
    estimate.add([1.0] * 4)
    assert allowance.jobs(0.1) == 0
    estimate.add([0.001] * 32)
    assert allowance.jobs(0.1) == 1, 'and it grows anew'


def test_an_allowance_of_several_rounds_doubles_as_often():
    """All 32 that were there have ended unheard: the CPUs have ended many rounds of them."""
    seen = {}
    for rounds in (1, 2, 4):
        estimate = DurationEstimate()
        allowance = Allowance(estimate, 1, 512)
        for _ in range(4):
            estimate.add([0.001] * 32)
            allowance.ended(32, 0, 16, rounds)
        seen[rounds] = allowance.jobs(1.0)
    assert seen[1] < seen[2] < seen[4] <= 512


def test_an_allowance_without_limit_ends_at_the_most():
    estimate = DurationEstimate()
    allowance = Allowance(estimate, 0, 64)
    assert allowance.jobs(0.005) == 0
    for _ in range(20):
        estimate.add([1e-7] * 1000)
        allowance.ended(1000, 0, 1)
    assert allowance.jobs(0.005) == 64


def test_how_long_a_running_job_goes_on():
    estimate = DurationEstimate()
    assert (estimate.remaining(0.0) == estimate.remaining(0.1) == UNKNOWN_TIME
            and estimate.remaining(7.0) == 7.0)
    estimate.add([0.001] * 8 + [1.0] * 2)
    assert estimate.remaining(0.0) == pytest.approx(0.2008)
    assert estimate.remaining(0.25) == pytest.approx(0.75), 'the short ones would have ended'
    assert estimate.remaining(2.0) == 2.0, 'as long again'


@pytest.mark.parametrize('durations, seconds, count, why', [
    ([], 0.1, 0, 'nothing is known'),
    ([1.0], 0.1, 1, 'a long one'),
    ([0.001], 0.1, ROW_FIRST, 'all that is known is short'),
    ([0.001] * 50, 0.1, 100, 'twice what is known'),
    ([0.001] * 5 + [1.0] + [0.001] * 8 + [1.0], 0.1, 9,
     'the longest row of short ones, and the one behind it'),
    ([0.02] * 40, 0.1, 5, 'none of them needs more'),
])
def test_how_many_jobs_fill_a_time(durations, seconds, count, why):
    estimate = DurationEstimate()
    estimate.add(durations)
    assert estimate.row(seconds) == count, why


def test_who_had_nothing_here_for_a_moment_gets_it_back():
    """By count each has one of two CPUs at most, whatever was before."""
    talk = Talk(2)
    talk.ready('c'), talk.ready('d')
    talk.jobs(*range(1, 20))
    talk.jobs(101, comp='d')
    talk.now = 1.0
    assert fed(talk.results(1, 1)) == [(3, [101])], 'it has come, and is next'
    talk.now = 1.001
    assert fed(talk.results(3, result(101, took=0.001))) == [(1, [3])], 'it has nothing here'
    talk.now = 1.9
    talk.jobs(*range(102, 110), comp='d')
    talk.now = 2.0
    assert [serials for worker, serial in ((1, 3), (2, 2))
            for _, serials in fed(talk.results(worker, serial))] == [[102], [103]]


def test_computations_of_one_client_have_one_claim():
    talk = Talk(4)
    for comp, client in (('c1', 'c'), ('c2', 'c'), ('d', 'd')):
        talk.ready(comp, client=client)
    talk.jobs(1, 2, 3, 4, comp='c1')
    talk.jobs(*range(11, 20), comp='c2'), talk.jobs(*range(21, 30), comp='d')
    talk.now = 1.0
    actions = talk.tell(*(WorkerResults(worker, [result(worker)]) for worker in (1, 2, 3, 4)))
    assert sorted(serials for _, serials in fed(actions)) == [[11], [12], [21], [22]]


# -- stop ------------------------------------------------------------------------------------------

def test_stop_gives_back_what_waits_and_interrupts_what_runs():
    talk = Talk(1)
    talk.ready()
    talk.jobs(1, 2, 3)
    assert talk.tell(Stop()) == [Send(1, CpusChanged(0)), Send(1, JobsReturned('c', [2, 3])),
                                 Interrupt(1, 1)]
    assert said(talk.jobs(4), JobsReturned) == [JobsReturned('c', [4])]
    assert said(talk.compute('d'), Refused)[0].code == 'stopping'
    actions = talk.results(1, result(1, Outcome.RAISED))
    assert rows(actions) == [(1, Outcome.STOPPED)] and not only(actions,
                                                                Drop), 'it waits for the Ack'
    actions = talk.say(Ack('c', [1]))
    assert (only(actions, Drop) and only(actions, StopRunner) == [StopRunner('c', True)]
            and actions[-1] == Exit())


def test_stop_of_an_idle_node():
    assert Talk().tell(Stop()) == [Exit()]


def test_a_second_stop_leaves_at_once():
    talk = Talk(1)
    talk.ready()
    talk.jobs(1)
    assert not only(talk.tell(Stop()), Exit)
    assert talk.tell(Stop()) == [Kill(1)], 'only then it is known what had begun'
    actions = talk.tell(WorkerGone(1, 'killed', 1))
    assert rows(actions) == [(1, Outcome.STOPPED)] and actions[-1] == Exit(), 'it waits for no Ack'


def test_a_third_stop_waits_for_nothing():
    talk = Talk(1)
    talk.ready()
    talk.jobs(1)
    talk.tell(Stop())
    talk.tell(Stop())
    actions = talk.tell(Stop())
    assert rows(actions) == [(1, Outcome.STOPPED)] and actions[-1] == Exit()


def test_stop_kills_after_the_grace_and_leaves_in_any_case():
    talk = Talk(1)
    talk.ready()
    talk.jobs(1)
    talk.tell(Stop())
    assert only(talk.after(GRACE), Kill) == [Kill(1)]
    assert not only(talk.after(0.5), Exit)
    actions = talk.after(END_TIME)
    assert rows(actions) == [(1, Outcome.STOPPED)] and actions[-1] == Exit()


ENDS = {
    'a second stop': lambda talk: talk.tell(Stop()) and talk.tell(Stop()),
    'release': lambda talk: talk.tell(Release()),
    'a fault': lambda talk: talk.tell(Faulted('c', 'a fault')),
    'the initializer': lambda talk: talk.tell(WorkerInitialized(2, 'ValueError')),
}


@pytest.mark.parametrize('how', ENDS)
@pytest.mark.parametrize('begun', (True, False))
def test_what_had_not_begun_when_all_ended_waits_elsewhere(how, begun):
    talk = Talk(2)
    talk.ready(initializer=True)
    talk.jobs(1)
    talk.tell(WorkerInitialized(1, ''))
    talk.jobs(2)
    actions = ENDS[how](talk)
    assert only(actions, Kill) == [Kill(1)] and not rows(actions)
    assert not said(actions, Refused)
    assert said(talk.jobs(3), JobsReturned) == [JobsReturned('c', [3])]
    actions = talk.tell(WorkerGone(1, 'killed', 1 if begun else 0))
    back = [serial for message in said(actions, JobsReturned) for serial in message.serials]
    ended = [serial for serial, _ in rows(actions)]
    assert (ended, back) == (([1], []) if begun else ([], [1]))


def test_results_of_a_computation_that_is_over_are_known_to_be_lost_when_the_disk_is_full():
    talk = Talk(1)
    talk.ready()
    talk.jobs(1)
    talk.tell(LinkDown(1, False))
    actions = talk.tell(RunnerGone('c', 'killed', begun=frozenset([1])))
    spooled, = only(actions, SpoolResults)
    assert [row[0] for row in spooled.rows] == [1]
    talk.tell(ResultsSpooled('c', [], 'no room'), RunnerGone('c', ''))
    talk.link(2)
    ready = said(talk.say(Reclaim('c'), 2), KnownAttempts)[0]
    assert ready.serials == [] and 1 in AttemptHistory.of(ready.past).given_up


def test_workers_that_do_not_end_are_not_waited_for():
    talk = Talk(1)
    talk.ready()
    fed(talk.jobs(1, 2))
    talk.tell(Release())
    actions = talk.after(END_TIME)
    assert rows(actions) == [(1, Outcome.STOPPED)]
    assert said(actions, Refused)[0].code == 'released'


def test_jobs_have_the_grace_of_the_operator_when_the_node_stops():
    talk = Talk(2, grace=60.0)
    talk.ready()
    (first, _), (second, _) = fed(talk.jobs(1, 2))
    talk.say(Cancel('c', [1]))
    talk.tell(Stop())
    assert only(talk.after(GRACE), Kill) == [Kill(first)]
    assert not only(talk.after(54), Kill) and only(talk.after(1), Kill) == [Kill(second)]


def test_a_node_that_is_to_finish_ends_when_its_jobs_have():
    talk = Talk(1)
    talk.ready()
    talk.jobs(1, 2)
    actions = talk.tell(Finish())
    assert said(actions, JobsReturned) == [JobsReturned('c', [2])] and not only(actions, Interrupt)
    assert said(actions, CpusChanged) == [CpusChanged(0)]
    assert said(talk.compute('d'), Refused)[0].code == 'paused'
    assert not talk.tell(Resume('operator')) and not only(talk.after(10 * GRACE), Exit)
    actions = talk.results(1, 1)
    assert rows(actions) == [(1, Outcome.RETURNED)]
    assert not only(actions, Exit), 'it waits for the Ack'
    assert talk.say(Ack('c', [1]))[-1] == Exit()


def test_an_idle_node_that_is_to_finish_ends_at_once_and_one_that_is_stopped_does_not_wait():
    assert Talk().tell(Finish())[-1] == Exit()
    talk = ahead(Talk(1))
    assert only(talk.tell(Finish()), TakeFromWorker), 'they shall run elsewhere'
    actions = talk.tell(WorkerReturnedJobs(1, [2, 3]))
    back = [serial for message in said(actions, JobsReturned) for serial in message.serials]
    assert back == [2, 3]
    talk = Talk(1)
    talk.ready()
    talk.jobs(1)
    talk.tell(Finish())
    assert only(talk.tell(Stop()), Interrupt)


def test_stop_does_not_cancel_what_stands_behind_another():
    # The user has cancelled nothing: these never started and belong back to the client.
    talk = ahead(Talk(1))
    actions = talk.tell(Stop())
    actions += talk.tell(WorkerGone(1, 'killed', 1))
    back = [serial for message in said(actions, JobsReturned) for serial in message.serials]
    assert dict(rows(actions)) == {1: Outcome.STOPPED}
    assert sorted(back) == [2, 3]


def test_what_a_worker_gives_back_while_stopping_is_returned():
    talk = ahead(Talk(1))
    talk.say(Cancel('c', [3]))   # a TakeBack is on its way
    actions = talk.tell(Stop()) + talk.tell(WorkerReturnedJobs(1, [2, 3]))
    assert [serial for message in said(actions, JobsReturned) for serial in message.serials] == [2]
    assert rows(actions) == [(3, Outcome.CANCELLED)]


# -- random walk -----------------------------------------------------------------------------------


# -- hours, operator, the last client --------------------------------------------------------------

def test_paused_no_new_jobs_are_taken_and_running_ones_go_on():
    talk = Talk()
    talk.ready()
    (worker, _), _ = fed(talk.jobs(1, 2, 3))
    actions = talk.tell(Pause('operator', 'lunch'))
    assert (said(actions, CpusChanged) == [CpusChanged(0)] and said(actions, JobsReturned)
            == [JobsReturned('c', [3])] and not only(actions, Interrupt))
    assert said(talk.jobs(4), JobsReturned) == [JobsReturned('c', [4])]
    assert rows(talk.results(worker, 1)) == [(1, Outcome.RETURNED)]
    assert (said(talk.compute('d'), Refused)
            == [Refused('d', 'paused', 'it takes no new jobs: lunch')])
    assert said(talk.tell(Resume('operator')), CpusChanged) == [CpusChanged(2)]
    assert fed(talk.jobs(4)) == [(worker, [4])]


def test_a_client_that_comes_while_the_node_is_paused_is_told_at_once():
    talk = Talk()
    talk.tell(Pause('hours', 'night'))
    welcome, offer = talk.link()
    assert type(welcome.message) is NodeHello and offer == Send(1, CpusChanged(0))


def test_two_authorities_must_both_say_resume():
    talk = Talk()
    talk.link()
    for by in ('operator', 'hours'):
        talk.tell(Pause(by, by))
    assert said(talk.compute(), Refused)[0].text == 'it takes no new jobs: operator, hours'
    assert not talk.tell(Resume('hours')) and not talk.tell(Resume('hours'))
    assert said(talk.tell(Resume('operator')), CpusChanged) == [CpusChanged(2)]


def test_at_the_end_of_the_hours_running_jobs_have_their_grace_and_the_next_day_it_serves_again():
    talk = Talk(1)
    talk.ready()
    (worker, _), = fed(talk.jobs(1, 2))
    actions = talk.tell(Pause('hours', 'night', True))
    assert (only(actions, Interrupt) == [Interrupt(worker, 1)]
            and said(actions, JobsReturned) == [JobsReturned('c', [2])])
    assert only(talk.after(GRACE), Kill) == [Kill(worker)]
    assert rows(talk.tell(WorkerGone(worker, 'killed', 1))) == [(1, Outcome.STOPPED)]
    assert said(talk.tell(Resume('hours')), CpusChanged) == [CpusChanged(1)]
    assert len(fed(talk.jobs(2))) == 1


def test_cpus_are_changed_while_jobs_run():
    talk = Talk(2)
    talk.ready()
    workers = [worker for worker, _ in fed(talk.jobs(1, 2))]
    assert said(talk.tell(SetCpus(1)), CpusChanged) == [CpusChanged(1)]
    assert not fed(talk.jobs(3))
    assert not fed(talk.results(workers[0], 1))       # one still runs, on the CPU that is left
    assert len(fed(talk.results(workers[1], 2))) == 1
    assert said(talk.tell(SetCpus(3)), CpusChanged) == [CpusChanged(3)]
    assert len(fed(talk.jobs(4, 5))) == 2


def test_a_job_that_is_too_wide_since_cpus_were_taken_away_is_given_back():
    talk = Talk(2)
    talk.ready()
    talk.tell(SetCpus(1))
    assert said(talk.jobs(1, cpus=2), JobsReturned) == [JobsReturned('c', [1])]
    assert rows(talk.jobs(2, cpus=3)) == [(2, Outcome.DIED)]


def test_release_takes_the_node_from_its_client():
    talk = Talk(1)
    talk.ready()
    fed(talk.jobs(1, 2))
    talk.link(2, b'other', 'you@there')
    actions = talk.tell(Release())
    assert said(actions, JobsReturned) == [JobsReturned('c', [2])]
    actions = talk.tell(WorkerGone(1, 'killed', 1))
    assert rows(actions) == [(1, Outcome.STOPPED)]
    assert ([(refused.comp, refused.code) for refused in said(actions, Refused)]
            == [('c', 'released')])
    assert only(actions, StopRunner) == [StopRunner('c', True)]
    talk.tell(RunnerGone('c', ''))
    assert talk.node.lease.state is Lease.FREE
    assert (said(talk.compute('c2'), Refused)
            == [Refused('c2', 'busy', 'its operator has released it from this client')])
    assert only(talk.compute('d', 2), PrepareDirectory)
    assert (said(talk.compute('c2'), Refused)
            == [Refused('c2', 'busy', 'it serves you@there for 0 s', ('here', 7, 0, False))])


def test_after_a_while_the_client_from_which_the_node_was_taken_may_have_it_again():
    talk = Talk()
    assert not talk.tell(Release())   # there is nobody
    talk.ready()
    talk.tell(Release()), talk.tell(RunnerGone('c', ''))
    talk.after(RELEASE_COOLDOWN)
    assert only(talk.compute('c2'), PrepareDirectory) and talk.node.lease.state is Lease.HELD


def finish(talk, comp='c', link=1):
    talk.say(Done(comp), link)
    return talk.tell(RunnerGone(comp, '')) + talk.tell(LinkDown(link, True))


def test_it_ends_after_so_many_clients():
    talk = Talk(serve=2)
    for link in (1, 2):
        talk.link(10 + link, b'passer-by')   # who has no lease does not count
        talk.ready('c', link)
        talk.tell(LinkDown(10 + link, True))
        assert bool(only(finish(talk, 'c', link), Exit)) == (link == 2)


@pytest.mark.parametrize('allowed', [True, False])
def test_a_client_may_end_the_node_after_its_lease_if_that_was_allowed(allowed):
    talk = Talk(client_shutdown=allowed)
    talk.ready()
    assert talk.say(Shutdown('c')) == [] and talk.say(Shutdown('unknown')) == []
    assert bool(only(finish(talk), Exit)) == allowed


def test_another_client_may_not_end_the_node():
    talk = Talk(client_shutdown=True)
    talk.ready()
    talk.link(2, b'other')
    with pytest.raises(PeerError):
        talk.say(Shutdown('c'), 2)


def test_a_job_that_uses_too_much_memory():
    talk = Talk(cpus=1)
    talk.ready()
    assert only(talk.jobs(1, 2, memory=1000), LimitMemory) == [LimitMemory(1, 1, 1000)]
    talk.tell(MemoryExceeded(1, 2))   # too late: it was of another job
    talk.tell(MemoryExceeded(1, 1))
    (row,), = [message.rows for message in said(talk.tell(WorkerGone(1, 'killed', 1)), Results)]
    assert row[1] == Outcome.OUT_OF_MEMORY and b'dispy_memory' in row[4]


def test_status():
    talk = Talk(2, now=0.0)
    assert talk.tell(Status()) == [PrintStatus('host: 0 of 2 CPUs used, takes '
                                               'jobs, up 0:00:00\nheld by no client, 0 served')]
    talk.now = 60.0
    talk.ready()
    (worker, _), _ = fed(talk.jobs(1, 2, 3, 4))
    talk.results(worker, 1)
    talk.tell(Pause('operator', 'lunch'))
    talk.now = 3725.0
    shown, = only(talk.tell(Status()), PrintStatus)
    assert shown.text.splitlines() == [
        'host: 2 of 2 CPUs used, no new jobs: lunch, up 1:02:05', 'held by me@here for 3665 s',
        '  compute (ready): 2 jobs running, 0 waiting, 1 done']


class ModelWorker:
    """A worker process: runs its queue in order; what it says takes its time to arrive."""

    def __init__(self, key, comp):
        self.key, self.comp = key, comp
        self.queue, self.pipe = collections.deque(), collections.deque()
        self.alive = True


class Walk:
    """A node, model workers and clients of one process, and books of what must be true."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.node, self.now = Node('host', self.rng.choice((1, 2, 4)), {}), 0.0
        bounded(self.node)
        self.workers, self.linked, self.link = {}, False, 0
        self.answers = {}                          # (comp, serial) -> how it was answered
        # (comp, serial) -> payload size; computations that are over
        self.given, self.closed = {}, set()
        self.serials, self.comps, self.exited = 0, [], False
        self.posted = collections.deque()

    def event(self, event):
        self.act(self.node.handle(event, self.now))
        self.act(self.node.flush(self.now))
        self.check()

    def say(self, message):
        self.event(Received(self.link, message))

    def act(self, actions):
        for action in actions:
            kind = type(action)
            if kind is Send:
                self.sent(action.message)
            elif kind is StartWorker:
                self.workers[action.worker] = ModelWorker(action.worker, action.comp)
            elif kind is SendToWorker:
                worker = self.workers.get(action.worker)
                assert action.attempts
                if worker is not None:   # it may have died and nobody has told the node yet
                    worker.queue.extend(attempt.serial for attempt in action.attempts)
            elif kind is TakeFromWorker and action.worker in self.workers:
                self.workers[action.worker].pipe.append('take back')
            elif kind is Interrupt and action.worker in self.workers:
                self.workers[action.worker].pipe.append(action.serial)
            elif kind is Kill and action.worker in self.workers:
                self.die(self.workers[action.worker])
            elif kind is PrepareDirectory:
                self.posted.append(DirectoryReady(action.comp, []))
            elif kind is StartRunner:
                self.posted.append(RunnerUp(action.comp))
            elif kind is StopRunner:
                self.closed.add(action.comp)
                self.posted.append(RunnerGone(action.comp, ''))

    def sent(self, message):
        if type(message) is Results:
            for row in message.rows:
                key = (message.comp, row[0])
                assert key in self.given and self.answers.get(key) in (None,
                                                                       row), 'two different answers'
                self.answers[key] = row
        elif type(message) is Refused:
            self.closed.add(message.comp)
        elif type(message) is Ready:
            # What was given back while there was no link is not among what it holds
            for comp, serial in self.given:
                if comp == message.comp and serial not in message.held:
                    self.answers.setdefault((comp, serial), 'returned')
        elif type(message) is JobsReturned:
            for serial in message.serials:
                assert (message.comp, serial) not in self.answers, 'answered and returned'
                self.answers[message.comp, serial] = 'returned'
                self.given[message.comp, serial] = 0

    def step(self):
        rng = self.rng
        self.now += rng.choice((0.0, 0.001, 0.01, 0.3))
        what = rng.random()
        if self.posted and what < 0.3:
            event = self.posted.popleft()
            if type(event) is RunnerGone:
                self.workers = {key: worker for key, worker in self.workers.items()
                                if worker.comp != event.comp}
            self.event(event)
        elif not self.linked:
            self.dial()
        elif what < 0.33 and len(self.comps) < 5:
            self.comps.append('c%d' % len(self.comps))
            self.say(Compute(self.comps[-1], spec(max_jobs=rng.choice((0, 0, 3)))))
        elif what < 0.6 and self.comps:
            self.client(rng.choice(self.comps))
        elif what < 0.61:
            self.operator()
        elif what < 0.63:
            self.linked = False
            self.event(LinkDown(self.link, False))
        elif self.workers:
            self.work(rng.choice(list(self.workers.values())))
        else:
            self.event_time()

    def operator(self):
        """Whoever sits at the terminal, and the hours of service."""
        by = self.rng.choice(('operator', 'hours'))
        self.event(self.rng.choice((Pause(by, 'why', self.rng.random() < 0.3), Resume(by),
                                    Resume(by), SetCpus(self.rng.randint(1, 5)), Status(),
                                    Release() if self.rng.random() < 0.2 else Resume(by))))

    def event_time(self):
        self.act(self.node.flush(self.now))
        self.check()

    def dial(self):
        self.link += 1
        self.linked = True
        self.event(LinkUp(self.link, b'me', 'address'))
        for comp in self.comps:
            if comp not in self.closed:
                self.say(Compute(comp, spec()))

    def client(self, comp):
        rng = self.rng
        what = rng.random()
        mine = [serial for name, serial in self.given if name == comp]
        if what < 0.4:
            rows = []
            for _ in range(rng.choice((1, 3, 12))):
                self.serials += 1
                options = {}
                if rng.random() < 0.15:
                    options['cpus'] = rng.randint(1, 5)
                if rng.random() < 0.1:
                    options['timeout'] = rng.choice((0.05, 2.0))
                if comp not in self.closed:
                    self.given[comp, self.serials] = 4
                rows.append((self.serials, b'load', options or None))
            self.say(Jobs(comp, rows))
        elif what < 0.6:
            self.say(Cancel(comp, rng.sample(mine, min(len(mine), 2))))
        elif what < 0.7:
            self.say(ReturnJobs(comp, rng.sample(mine, min(len(mine), 5))))
        elif what < 0.98:
            self.say(Ack(comp, [serial for serial in mine
                                if type(self.answers.get((comp, serial))) is tuple]))
        elif len(self.closed) < 3:
            self.say(Done(comp))

    def work(self, worker):
        """A worker does something, or what it said arrives."""
        rng = self.rng
        if rng.random() < 0.02:
            self.die(worker)
        elif worker.pipe:
            order = worker.pipe.popleft()
            if order == 'take back':
                back = list(worker.queue)[1:] if rng.random() < 0.8 else list(worker.queue)
                for serial in back:
                    worker.queue.remove(serial)
                self.event(WorkerReturnedJobs(worker.key, back))
            elif worker.queue and worker.queue[0] == order:
                self.finish(worker, rng.choice((Outcome.RAISED, Outcome.RETURNED)))
        elif worker.queue:
            self.finish(worker, rng.choice((Outcome.RETURNED, Outcome.RETURNED, Outcome.RAISED)))

    def finish(self, worker, outcome):
        took = self.rng.choice((0.0001, 0.0001, 0.0001, 0.2))
        count = self.rng.randint(1, len(worker.queue))
        self.event(WorkerResults(worker.key, [result(worker.queue.popleft(), outcome, took)
                                              for _ in range(count)]))

    def die(self, worker):
        del self.workers[worker.key]
        running = worker.queue[0] if worker.queue and self.rng.random() < 0.8 else 0
        self.posted.append(WorkerGone(worker.key, 'died', running))

    def check(self):
        node = self.node
        busy = [worker for worker in node.tables.workers.values() if worker.queue]
        assert node.cpus.free <= node.cpus.total
        assert node.cpus.free >= 0 or node.cpus.total < node.cpus.most
        assert node.cpus.free == node.cpus.total - sum(worker.queue[0].cpus for worker in busy)
        size = 0
        for name, comp in node.tables.comps.items():
            places = collections.Counter(attempt.serial for attempt in comp.waiting)
            for worker in comp.workers.values():
                assert node.tables.workers[worker.key] is worker
                places.update(attempt.serial for attempt in worker.queue)
                assert not (worker in comp.idle and worker.queue)
            assert set(places) == set(comp.attempts) and set(places.values()) <= {1}
            assert not set(places) & set(comp.unacknowledged)
            size += sum(size_of(attempt.payload) for attempt in comp.waiting)
            for (given, serial), answer in self.answers.items():
                assert given != name or serial not in comp.attempts, 'answered and still here'
            if comp.stage is not Stage.CLOSING and comp.link == self.link and self.linked:
                for given, serial in self.given:
                    assert (given != name or (given, serial) in self.answers
                            or serial in comp.attempts
                            or serial in comp.unacknowledged), 'forgotten'
        assert node.attempts.held_bytes == size
        for timer in node.timers:
            assert (timer.call.__name__ != '_client_stayed_away'
                    or timer.when <= self.now + ORPHAN_TIME)
        assert len(node.timers) < 50 + 3 * self.serials, 'timers grow'

    def drain(self):
        """Everything works from now on: everything is answered, and every CPU is free."""
        for by in ('operator', 'hours'):
            self.event(Resume(by))
        for _ in range(5000):
            self.now += 0.05
            if not self.linked:
                self.dial()
            while self.posted:
                event = self.posted.popleft()
                if type(event) is RunnerGone:
                    self.workers = {key: worker for key, worker in self.workers.items()
                                    if worker.comp != event.comp}
                self.event(event)
            for worker in list(self.workers.values()):
                if worker.key in self.workers:
                    self.work(worker)
            self.event_time()
            if not self.posted and not any(comp.attempts
                                           for comp in self.node.tables.comps.values()):
                break
        left = [key for key in self.given if key not in self.answers and key[0] not in self.closed]
        assert not left, 'never answered: %s' % left
        assert self.node.cpus.free == self.node.cpus.total


@pytest.mark.parametrize('first', range(0, 240, 20))
def test_random_walk(first, request):
    step = 1 if request.config.getoption('--long') else 2
    walk_seeds(Walk, range(first, first + 20, step))


def test_arguments_of_what_runs_do_not_keep_links_from_being_read():
    """Only what waits is in the books, also when it comes back from a worker."""
    talk = Talk(2)
    talk.ready()
    talk.jobs(1, 2, 3)
    assert talk.node.attempts.held_bytes == 2 * 1
    talk.tell(WorkerGone(1, 'killed', 0))   # it had not begun
    assert talk.node.attempts.held_bytes == sum(size_of(attempt.payload)
                                                for attempt in talk.node.tables.comps['c'].waiting)
    talk.say(Done('c'))
    assert talk.node.attempts.held_bytes == 0
