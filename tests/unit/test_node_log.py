"""What the log of a node tells: with -d every event and every decision, otherwise who was here,
what began and how it ended."""

import logging
import pickle

import pytest

import dispynode
from dispynode import (
    Compute, EventText, SendToWorker, FilePiece, ClientHello, Jobs, LinkDown, LinkUp, LoggedNode,
    Node, Outcome, DirectoryReady, Received, Results, RunnerGone, RunnerUp, Send, StartWorker,
    Status, WorkerResults, attempt_number, job_number, node_type, serial_of)
from talk_node import Talk, result, spec

FIRST, SECOND = 1 << 16 | 1, 2 << 16 | 3    # the first attempt of job 1, the third of job 2


class LoggedTalk(Talk):
    """The same conversation with a node whose level is DEBUG."""

    def __init__(self, cpus=1):
        super().__init__(cpus)
        self.node = LoggedNode('host', cpus, {'fact': 1})


def one_job(talk, last=LinkDown(1, True)):
    """A computation with two jobs, one of which fails; then its client leaves. Returns all that the
    node decided."""
    said = [*talk.tell(LinkUp(1, b'me', '10.0.0.9')), *talk.say(ClientHello('me@here PID 7', 2.0)),
            *talk.say(Compute('c', spec(name='square'))),
            *talk.tell(DirectoryReady('c', [])), *talk.tell(RunnerUp('c')),
            *talk.say(Jobs('c', [(FIRST, b'arguments of the user', None),
                                 (SECOND, b'others', {'cpus': 1})]))]
    said += talk.tell(WorkerResults(1, [result(FIRST, took=2.0)]))
    said += talk.tell(WorkerResults(1, [result(SECOND, Outcome.RAISED, took=3.5)]))
    said += [*talk.tell(last), *talk.tell(RunnerGone('c', 'ended with exit code 0'))]
    return said


def lines(caplog, level):
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_numbers_of_a_serial():
    assert (job_number(SECOND), attempt_number(SECOND)) == (2, 3)
    assert serial_of(2, 3) == SECOND and serial_of(2) == 2 << 16


def test_every_event_and_every_decision(caplog):
    """In their order, each on a line of its own, with the fields that say something."""
    caplog.set_level(logging.DEBUG, 'dispynode')
    talk = LoggedTalk()
    said = one_job(talk)
    shown = lines(caplog, logging.DEBUG)
    decisions = [line for line in shown if line.startswith('  decision: ')]
    assert [line.partition('(')[0].rpartition(' ')[2] for line in decisions] \
        == [type(action).__name__ for action in said]
    story = iter(shown)
    for expected in ("event: LinkUp(link=1, instance=<2 bytes>, address='10.0.0.9')",
                     "event: Received(link=1, message=Compute(comp='c', spec=<function square>))",
                     "event: Received(link=1, message=Jobs(comp='c', rows=[job 1: <21 bytes>, "
                     "job 2, attempt 3: <6 bytes> {'cpus': 1}]))",
                     "  decision: StartWorker(worker=1, comp='c')",
                     '  decision: SendToWorker(worker=1, attempts=[job 1])',
                     'event: WorkerResults(worker=1, rows=[job 1: RETURNED 0.0 2.0 <5 bytes> '
                     '<3 bytes> <3 bytes>])',
                     'event: LinkDown(link=1, on_purpose=True)',
                     "event: RunnerGone(comp='c', text='ended with exit code 0', code='setup')"):
        assert expected in story, (expected, shown)


def test_what_users_sent_is_not_in_the_log(caplog):
    caplog.set_level(logging.DEBUG, 'dispynode')
    one_job(LoggedTalk())
    text = caplog.text
    assert 'arguments of the user' not in text and "b'" not in text


def test_the_log_changes_nothing():
    shown = EventText().repr
    assert list(map(shown, one_job(LoggedTalk()))) == list(map(shown, one_job(Talk(1))))


def test_no_cost_when_it_is_off(caplog):
    """The node is of another class then, in which nothing asks for the level of the log."""
    caplog.set_level(logging.INFO, 'dispynode')
    assert node_type() is Node
    caplog.set_level(logging.DEBUG, 'dispynode')
    assert node_type() is LoggedNode


def test_what_raises_is_logged_with_what_was_decided_before(caplog):
    caplog.set_level(logging.DEBUG, 'dispynode')
    talk = LoggedTalk()
    talk.tell(LinkUp(1, b'me', 'address'))
    with pytest.raises(dispynode.PeerError):
        talk.node.handle(Received(1, Results('c', [])), 0.0)
    assert lines(caplog, logging.DEBUG)[-1] == "event: Received(link=1, message=Results(comp='c'))"
    assert talk.node.decided() == []


def test_who_was_here_and_how_it_ended(caplog):
    """Without -d: the client, its computation from begin to end with counts and CPU seconds, and
    its runner."""
    caplog.set_level(logging.INFO, 'dispynode')
    one_job(Talk(1))
    assert not lines(caplog, logging.DEBUG)
    assert lines(caplog, logging.INFO) == [
        'me@here PID 7 has connected from 10.0.0.9', 'this node is held by me@here PID 7',
        'computation square (c) of me@here PID 7 begins; files that its jobs need: 0',
        'computation square (c): its files are here, its runner is started',
        'computation square (c): its runner is ready for jobs, 0.0 s after the computation came',
        'me@here PID 7 has disconnected',
        'computation square (c) of me@here PID 7 is over after 0.0 s: 2 attempts of jobs ended, '
        '1 of them without a value, and 0 had not; '
        'they used 5.5 CPU seconds',
        'the connection of me@here PID 7 has ended; it holds this node still',
        'computation square (c): its runner has ended (ended with exit code 0)',
        'this node is free: me@here PID 7 has no computation here any more']


def test_a_client_that_is_lost_and_comes_back(caplog):
    caplog.set_level(logging.INFO, 'dispynode')
    talk = Talk(1)
    talk.tell(LinkUp(1, b'me', 'address'))
    talk.say(ClientHello('me', 2.0))
    talk.say(Compute('c', spec()))
    talk.tell(DirectoryReady('c', []))
    talk.tell(RunnerUp('c'))
    talk.say(Jobs('c', [(FIRST, b'1', None)]))
    caplog.clear()
    talk.tell(LinkDown(1, False))
    talk.tell(LinkUp(2, b'me', 'address'))
    talk.say(ClientHello('me', 2.0), 2)
    talk.say(Compute('c', spec()), 2)
    assert lines(caplog, logging.INFO) == [
        'me has lost its connection', 'the connection of me has ended; it holds this node still',
        'me has connected from address',
        'this node is held by me, which is back',
        'computation compute (c): its client is back; 1 jobs are here']


@pytest.mark.parametrize('value, text', [
    (StartWorker(0, 'c'), "StartWorker(worker=0, comp='c')"),
    (Status(), 'Status()'),
    (Jobs('c', [(FIRST, (b'12', memoryview(b'345')), None)] * 9),
     "Jobs(comp='c', rows=[%s, and 4 more])" % ', '.join(
        ['job 1: (<2 bytes>, <3 bytes>)'] * 5)),
    (FilePiece('c', 1, 0, ('name', 3, b'd' * 32, 0o600), 0, pickle.PickleBuffer(b'abc')),
     "FilePiece(comp='c', purpose=1, key=0, row=('name', 3, <32 bytes>, 384), "
     'offset=0, data=<3 bytes>)'),
    (Send(1, Results('c', [result(FIRST, Outcome.DIED)])),
     "Send(link=1, message=Results(comp='c', rows=[job 1: DIED 0.0 1.0 <5 bytes> "
     '<3 bytes> <3 bytes>]))'),
    (SendToWorker(1, [dispynode.Attempt(SECOND, b'', None, None)]),
     'SendToWorker(worker=1, attempts=[job 2, attempt 3])')])
def test_texts_of_events(value, text):
    assert EventText().repr(value) == text
