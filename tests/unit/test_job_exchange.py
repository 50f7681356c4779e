"""The part of a driver that has jobs sent and takes what comes of them, by itself: which messages
go to nodes, and which events to the Schedule."""

import types

import pytest

from dispy import (
    ACK_AFTER, ACKS_MOST, JobExchange, NodeOffers, NodeResults, NodeReturned, NodeSpec, NodeStarted,
    Outgoing, ScheduledJob, SendAck, SendCancel, SendJobs, SendRecall, Submitted)
from dispynode import (
    Ack, Cancel, Jobs, JobsReturned, LinkBroken, Outcome, Ready, Results, ReturnJobs, Started,
    Wrong)
from talk_driver import Cluster, FakeDriver, FakeLink


class Link(FakeLink):
    """One with arguments that go in parts: `unsent` are the serials of which none has gone."""

    def __init__(self, number):
        super().__init__(number)
        self.unsent = set()

    @property
    def later(self):
        return self.unsent

    def abandon(self, comp, serials=()):
        found = [serial for serial in serials if serial in self.unsent]
        self.unsent -= set(found)
        return found


class Journal:
    """One whose disk may be full."""

    def __init__(self):
        self.fits = True

    def commit(self):
        return self.fits


class Program(Cluster):
    """A cluster with jobs, that notes what it is told of them."""

    def __init__(self):
        super().__init__(specs=[NodeSpec('10.0.0.1', 9701)])
        self.sent, self.owed, self.failed = [], [], []

    def send_jobs(self, peer, works):
        self.sent.append((peer, works))

    def jobs_owed(self):
        return list(self.owed)

    def fail_job(self, work, text):
        self.owed.remove(work)
        self.failed.append((work, text))


class Driver(FakeDriver):
    """One with the real part, and a node that is ready."""

    def __init__(self):
        super().__init__()
        self.wakes, self.delays = 0, []
        self.chores = types.SimpleNamespace(within=self.delays.append)
        self.files.incoming.clear()
        self.withdrawn = []
        self.cancels = types.SimpleNamespace(answer=lambda *told: self.withdrawn.append(told))
        self.jobs = JobExchange(self)
        self.program = Program()
        self.peer = self.connected(self.program)[1]
        self.peer.link = Link(self.peer.link.number)
        self.setup.on_ready(self.peer, Ready('c', []))
        self.said()
        self.decided()
        self.wakes = 0

    def soon(self):
        self.wakes += 1

    def posted(self):
        return []


class Recovery:
    """One that notes the rows that it gets."""

    def __init__(self, acknowledges=True):
        self.acknowledges = acknowledges
        self.rows, self.serials = [], []

    def results(self, peer, comp, rows):
        self.rows += rows

    def returned(self, peer, comp, serials):
        self.serials += serials


@pytest.fixture
def driver():
    return Driver()


def job():
    return ScheduledJob('c', b'', None)


def row(serial, outcome=Outcome.RETURNED):
    return (serial, int(outcome), 1.0, 2.0, b'', b'', b'')


# -- to nodes --------------------------------------------------------------------------------------

def test_jobs_of_one_turn_are_submitted_together_and_in_order(driver):
    jobs = [job() for _ in range(3)]
    for each in jobs:
        driver.jobs.take(each)
    assert driver.wakes == 3 and driver.decided() == []
    driver.jobs.take_submitted()
    driver.jobs.take_submitted()
    assert driver.decided() == [Submitted(jobs)]


def test_the_cluster_packs_the_jobs_that_a_node_gets(driver):
    works = [job()]
    driver.jobs.send_jobs(SendJobs(driver.peer.key, 'c', works))
    assert driver.program.sent == [(driver.peer, works)]


@pytest.mark.parametrize('action, kind', [(SendCancel, Cancel), (SendRecall, ReturnJobs)])
def test_what_has_not_left_is_not_asked_for(driver, action, kind):
    driver.peer.link.unsent = {2, 3}
    driver.jobs.send_to_node(action(driver.peer.key, 'c', [1, 2]))
    assert driver.said() == [kind('c', [1])]
    assert driver.decided() == [NodeReturned(driver.peer.key, 'c', [2])]
    driver.jobs.send_to_node(action(driver.peer.key, 'c', [3]))
    assert driver.said() == [] and driver.decided() == [NodeReturned(driver.peer.key, 'c', [3])]
    driver.jobs.send_to_node(action(driver.peer.key, 'c', [4]))
    assert driver.said() == [kind('c', [4])] and driver.decided() == []


def test_a_node_that_is_away_or_gone_is_asked_nothing(driver):
    driver.jobs.send_to_node(SendCancel(('10.0.0.9', 9701), 'c', [1]))
    driver.peer.link = None
    driver.jobs.send_to_node(SendCancel(driver.peer.key, 'c', [1]))
    assert driver.said() == [] and driver.decided() == []


# -- acknowledgements ------------------------------------------------------------------------------

def test_results_are_acknowledged_together_and_soon(driver):
    driver.jobs.send_ack(SendAck(driver.peer.key, 'c', [1, 2]))
    driver.jobs.send_ack(SendAck(driver.peer.key, 'c', [3]))
    assert driver.said() == [] and driver.delays == [ACK_AFTER] * 2
    driver.jobs.acknowledge(driver.peer)
    driver.jobs.acknowledge(driver.peer)
    assert driver.said() == [Ack('c', [1, 2, 3])]


def test_so_many_are_acknowledged_at_once(driver):
    driver.jobs.send_ack(SendAck(driver.peer.key, 'c', list(range(ACKS_MOST - 1))))
    assert driver.said() == []
    driver.jobs.send_ack(SendAck(driver.peer.key, 'c', [ACKS_MOST - 1]))
    assert driver.said() == [Ack('c', list(range(ACKS_MOST)))]


def test_nothing_is_acknowledged_that_has_not_been_noted(driver):
    journal = driver.jobs.outgoing.journals['c'] = Journal()
    journal.fits = False
    driver.jobs.send_ack(SendAck(driver.peer.key, 'c', list(range(2 * ACKS_MOST))))
    driver.jobs.note_down()
    driver.jobs.acknowledge(driver.peer)
    assert driver.said() == []
    journal.fits = True
    driver.jobs.note_down()
    driver.jobs.acknowledge(driver.peer)
    assert driver.said() == [Ack('c', list(range(2 * ACKS_MOST)))]


# -- the journal -----------------------------------------------------------------------------------

def test_jobs_leave_when_it_is_noted_that_they_do(driver, caplog):
    """While the disk is full they wait again, and no more are sent."""
    journal = driver.jobs.outgoing.journals['c'] = Journal()
    key, first, second = driver.peer.key, Jobs('c', [(1, b'', None)]), Jobs('c', [(2, b'', None)])
    driver.jobs.outgoing.add('c', driver.peer, [first])
    assert driver.said() == []
    driver.jobs.note_down()
    assert driver.said() == [first] and driver.decided() == []
    journal.fits = False
    driver.jobs.outgoing.add('c', driver.peer, [second])
    driver.jobs.note_down()
    driver.jobs.note_down()
    assert driver.said() == [] and driver.delays == [Outgoing.AGAIN] * 2
    assert driver.decided() == [NodeOffers(key, 'c', 0, 4), NodeReturned(key, 'c', [2])]
    assert caplog.text.count('its recovery file cannot be written') == 1
    journal.fits = True
    driver.jobs.note_down()
    assert driver.decided() == [NodeOffers(key, 'c', 4, 4)] and driver.said() == []


# -- from nodes ------------------------------------------------------------------------------------

def test_what_nodes_tell_of_jobs_is_decided_by_the_schedule(driver):
    key = driver.peer.key
    driver.jobs.on_results(driver.peer, Results('c', [row(1)]))
    driver.jobs.on_returned(driver.peer, JobsReturned('c', [2]))
    driver.jobs.on_started(driver.peer, Started('c', [(3, 0.5)]))
    assert driver.decided() == [NodeResults(key, 'c', [row(1)]), NodeReturned(key, 'c', [2]),
                                NodeStarted(key, 'c', [(3, 0.5)])]
    assert driver.said() == []


def test_arguments_of_what_has_ended_do_not_go_on(driver):
    driver.peer.link.unsent = {1, 2, 3}
    driver.jobs.on_results(driver.peer, Results('c', [row(1)]))
    driver.jobs.on_returned(driver.peer, JobsReturned('c', [2]))
    assert driver.peer.link.unsent == {3}


@pytest.mark.parametrize('acknowledges', [True, False])
def test_a_recovery_gets_what_comes_and_acknowledges_what_has_ended(driver, acknowledges):
    recovery = driver.recoveries.by_comp['c'] = Recovery(acknowledges)
    rows = [row(1), row(2, Outcome.PROVISIONAL), row(3, Outcome.RAISED)]
    driver.jobs.on_results(driver.peer, Results('c', rows))
    driver.jobs.on_returned(driver.peer, JobsReturned('c', [4]))
    assert (recovery.rows, recovery.serials) == (rows, [4])
    assert driver.said() == [Ack('c', [1, 3])] * acknowledges and driver.decided() == []


# -- faults ----------------------------------------------------------------------------------------

def test_jobs_that_cannot_be_sent_end_with_the_reason(driver):
    work = job()
    work.serial = 7
    driver.jobs.end_unsent(SendJobs(driver.peer.key, 'c', [work]), 'for this reason')
    told, = driver.decided()
    assert told.rows == [(7, int(Outcome.DIED), 0.0, 0.0, b'for this reason', b'', b'')]


def test_a_frame_that_the_other_side_cannot_use_ends_its_jobs_and_the_link(driver):
    driver.refusals = types.SimpleNamespace(refused=lambda link, frame: [('c', 5), ('c', 6)])
    with pytest.raises(LinkBroken, match='cannot use what was sent: it is odd'):
        driver.jobs.refused_frame(driver.peer, driver.peer.link, Wrong('it is odd', 3))
    rows = [each for event in driver.decided(NodeResults) for each in event.rows]
    assert [each[:2] for each in rows] == [(5, Outcome.DIED), (6, Outcome.DIED)]
    assert driver.peer.wrong


def test_after_a_fault_jobs_that_are_nowhere_are_ended_and_no_others(driver):
    submitted, waiting, lost = job(), job(), job()
    driver.program.owed = [submitted, waiting, lost]
    driver.jobs.take(submitted)
    driver.schedule.handle(Submitted([waiting]), driver.now)
    due = []
    driver.jobs.end_lost_when_due(due)
    assert driver.program.failed == [] and due == []
    driver.jobs.note_fault('a fault of dispy')
    driver.jobs.end_lost_when_due(due)
    assert driver.program.failed == [(lost, 'a fault of dispy')]
    assert driver.withdrawn == [(lost, False)]


def test_after_many_faults_jobs_are_looked_for_once_a_second(driver):
    driver.jobs.note_fault('the first')
    driver.jobs.end_lost_when_due([])
    driver.program.owed = [job()]
    due = []
    for _ in range(3):
        driver.jobs.note_fault('the second')
        driver.jobs.end_lost_when_due(due)
    assert driver.program.failed == [] and set(due) == {driver.now + 1.0}
    driver.now += 1.0
    driver.jobs.end_lost_when_due(due)
    assert [text for _, text in driver.program.failed] == ['the second']
