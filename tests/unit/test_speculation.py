"""Second attempts of the last jobs: when they begin, where, what ends them, and what counts. The
time is virtual."""

import pytest

from conftest import walk_seeds
from dispy import (
    SPECULATE_AFTER, CancelAsked, Closed, JobEnded, JobState, JobWaits, JobsEnded, MedianDuration,
    NodeAway, NodeHad, NodeLeft, NodeLost, NodeOffers, NodeReady, NodeResults, NodeReturned,
    NodeStarted, Opened, RulesChanged, Schedule, SecondCounts, SecondHad, SecondOver, SecondWins,
    SendAck, SendCancel, SendJobs, SendSecond, Submitted, UserRule, UserRules, cpus_of)
from dispynode import AttemptHistory, Outcome
from talk_schedule import job, jobs, only, row, sent
from walk_schedule import ModelNode, Walk

FAILURES = [outcome for outcome in Outcome if outcome not in (
    Outcome.RETURNED, Outcome.RETURNED_CODE, Outcome.PROVISIONAL, Outcome.PROVISIONAL_CODE,
    Outcome.CANCELLED)]


class Scene:
    """A schedule at a virtual time, with nodes `a` and `b` of one CPU and jobs that took 1 s."""

    def __init__(self, speculate=True, ended=SPECULATE_AFTER, cpus=1, remote=False):
        self.now = 0.0
        self.schedule = Schedule()
        self.tell(Opened('c', 'c', True, remote, None, speculate, 'ada'))
        self.tell(NodeReady('a', 'c', cpus, []))
        for _ in range(ended):
            work = job()
            self.tell(Submitted([work]))
            self.tell(NodeResults('a', 'c', [row(work)]))
        self.tell(NodeReady('b', 'c', cpus, []))

    def tell(self, *events, after=0.0):
        self.now += after
        actions = []
        for event in events:
            actions += self.schedule.handle(event, self.now)
        return actions + self.schedule.flush(self.now)

    def run(self, work=None):
        """A job that runs on node `a`."""
        work = work or job()
        self.tell(Submitted([work]))
        if self.schedule.comps['c'].running[work.serial].key == 'b':
            raise AssertionError('the first node comes first')
        self.tell(NodeStarted('a', 'c', [(work.serial, 0.0)]))
        return work

    def late(self, work=None):
        """A job that runs on `a`, and its second attempt on `b`."""
        work = self.run(work)
        [action] = only(self.tell(after=2.0), SendSecond)
        assert action.node == 'b'
        [second] = action.works
        return work, second


def rows(second, outcome=Outcome.RETURNED):
    return [row(second, outcome)]


# -- when and where --------------------------------------------------------------------------------

def test_a_job_is_started_a_second_time_after_twice_the_median():
    scene = Scene()
    work = scene.run()
    assert scene.tell(after=1.9) == []
    assert scene.schedule.next_timer() == pytest.approx(2.0)
    [action] = scene.tell(after=0.1)
    second = action.works[0]
    assert type(action) is SendSecond and action.node == 'b'
    assert second.first is work and second.serial == work.serial + 1
    assert (second.payload, second.options) == (work.payload, work.options)
    assert scene.tell(after=5.0) == [], 'there is no third'
    assert scene.schedule.next_timer() is None or scene.schedule.next_timer() > scene.now


@pytest.mark.parametrize('options, ended', [
    ({'speculate': False}, SPECULATE_AFTER), ({'remote': True}, SPECULATE_AFTER),
    ({}, SPECULATE_AFTER - 1)])
def test_without_the_option_by_a_scheduler_or_too_early_there_is_none(options, ended):
    scene = Scene(ended=ended, **options)
    scene.run()
    assert only(scene.tell(after=100.0), SendSecond) == []


def test_second_attempts_keep_within_the_limits_of_their_user():
    scene = Scene()
    scene.tell(RulesChanged(UserRules(users={'ada': UserRule(cpus=1)})))
    scene.run()
    assert only(scene.tell(after=100.0), SendSecond) == []
    for rule in (UserRule(cpus=2), UserRule(jobs=2)):
        scene.tell(RulesChanged(UserRules(users={'ada': UserRule(jobs=1)})))
        seconds = scene.schedule.comps['c'].seconds
        assert not seconds.by_serial
        [action] = only(scene.tell(RulesChanged(UserRules(users={'ada': rule}))), SendSecond)
        other = Opened('d %s' % rule.cpus, 'd', False, False, None, False, 'ada')
        scene.tell(other, NodeReady('b', other.comp, 1, []))
        work = job(comp=other.comp)
        actions = scene.tell(Submitted([work]))
        assert only(actions, SendCancel) == [SendCancel('b', 'c', [action.works[0].serial])]
        assert [sent_job for each in only(actions, SendJobs) for sent_job in each.works] == [work]
        scene.tell(NodeResults('b', other.comp, [row(work)]))


def test_a_second_attempt_that_counts_is_one_job_of_its_user():
    scene = Scene()
    scene.tell(RulesChanged(UserRules(users={'ada': UserRule(cpus=2)}, half_life=3600.0)))
    work, second = scene.late()
    load = scene.schedule.comps['c'].user
    scene.tell(NodeStarted('b', 'c', [(second.serial, 0.0)]))
    assert (load.cpus, load.jobs, load.running) == (1, 1, 1)
    scene.tell(NodeLost('a', 'host', 'it is gone'))
    assert scene.schedule.comps['c'].running[work.serial].key == 'b'
    assert (load.cpus, load.jobs, load.running) == (1, 1, 1)
    scene.tell(NodeResults('b', 'c', [row(work)]))
    assert (load.cpus, load.jobs, load.running) == (0, 0, 0)


def test_one_node_has_none():
    scene = Scene(cpus=2)
    scene.tell(NodeLeft('b', 'c', 'host', 'left'))
    scene.run()
    assert only(scene.tell(after=100.0), SendSecond) == []


def test_what_was_due_is_not_waited_for_when_the_other_node_is_gone():
    """The driver would turn without end."""
    scene = Scene()
    scene.run()
    assert scene.schedule.next_timer() < scene.now + 2.5
    scene.tell(NodeLost('b', 'host', 'broken'))
    scene.tell(after=10.0)
    assert (scene.schedule.next_timer() or scene.now + 1.0) > scene.now


def test_nor_has_a_job_that_is_for_one_node():
    scene = Scene()
    scene.run(job(node='a'))
    assert only(scene.tell(after=100.0), SendSecond) == []


@pytest.mark.parametrize('why', ['no CPU', 'away', 'too wide', 'resource', 'memory'])
def test_the_other_node_must_have_what_the_job_needs(why):
    work = job(**{'too wide': {'cpus': 2}, 'resource': {'resources': (('gpu', 1),)},
                  'memory': {'memory': 1000}}.get(why, {}))
    scene = Scene(cpus=2)
    scene.tell(NodeReady('a', 'c', 2, [], stock={'gpu': 1, 'memory': 2000}))
    scene.tell(NodeReady('b', 'c', 1, [], stock={'gpu': 1, 'memory': 2000}))
    scene.run(work)
    if why == 'no CPU':
        scene.tell(NodeOffers('b', 'c', 0))
    elif why == 'away':
        scene.tell(NodeAway('b', 'host', 'cut', 1000.0))
    elif why != 'too wide':
        stock = {'memory': 500} if why == 'memory' else {}
        scene.tell(NodeReady('b', 'c', 1, [], stock=stock))
    assert only(scene.tell(after=2.0), SendSecond) == []
    scene.tell(NodeReady('b', 'c', 2, [], stock={'gpu': 1, 'memory': 2000}))
    assert (only(scene.tell(), SendSecond) or scene.schedule.comps['c'].seconds.by_serial)


def test_the_job_that_has_run_longest_comes_first():
    scene = Scene(cpus=2)
    scene.tell(NodeReady('b', 'c', 1, []))
    first = scene.run()
    scene.now += 1.0
    scene.run()
    [action] = only(scene.tell(after=5.0), SendSecond)
    assert action.works[0].first is first


def test_there_is_none_while_jobs_wait():
    scene = Scene()
    scene.tell(Submitted([job(cpus=2)]), NodeReady('wide', 'c', 2, []))
    scene.run()
    scene.tell(Submitted([job(cpus=2)]))    # the wide node alone can run it
    assert only(scene.tell(after=10.0), SendSecond) == []


def test_nor_where_another_program_waits():
    scene = Scene()
    scene.run()
    scene.tell(Opened('d', 'd', False), NodeReady('b', 'd', 1, []))
    scene.tell(Submitted([job('d', cpus=1, resources=(('gpu', 1),))]))
    scene.schedule.comps['d'].queue.push(job('d', node='x'))   # which cannot be sent now
    assert only(scene.tell(after=10.0), SendSecond) == []


def test_the_median_is_of_the_jobs_that_ended_last():
    median = MedianDuration()
    median.add([9.0] * (SPECULATE_AFTER - 1))
    assert median.seconds is None
    median.add([1.0])
    assert median.seconds == 9.0
    median.add([1.0] * 999)
    assert median.seconds == 1.0
    other = MedianDuration()
    other.add([float(number) for number in range(10)])
    assert other.seconds == 4.5


# -- what ends it ----------------------------------------------------------------------------------

def test_a_job_that_waits_takes_its_cpu():
    scene = Scene()
    work, second = scene.late()
    urgent = job()
    actions = scene.tell(Submitted([urgent]))
    assert sent(actions, 'b') == [urgent]
    assert only(actions, SecondOver) == [SecondOver('b', 'c', second)]
    assert SendCancel('b', 'c', [second.serial]) in actions
    # What it answers is not heard; when the CPU is idle again, there is another
    assert only(scene.tell(NodeResults('b', 'c', rows(second, Outcome.CANCELLED))), JobsEnded) == []
    [again] = only(scene.tell(NodeResults('b', 'c', [row(urgent)])), SendSecond)
    assert again.works[0].serial == second.serial + 1 and again.works[0].first is work


def test_so_does_a_job_of_another_program():
    scene = Scene()
    _, second = scene.late()
    scene.tell(Opened('d', 'd', False), NodeReady('b', 'd', 1, []))
    other = job('d')
    actions = scene.tell(Submitted([other]))
    assert sent(actions, 'b') == [other]
    assert only(actions, SendCancel) == [SendCancel('b', 'c', [second.serial])]


@pytest.mark.parametrize('cpus, gpus, ends', [(2, 2, False), (2, 1, True), (1, 2, True)])
def test_it_is_ended_for_what_is_lacking_alone(cpus, gpus, ends):
    scene = Scene()
    for key in 'ab':
        scene.tell(NodeReady(key, 'c', cpus, [], stock={'gpu': gpus}))
    _, second = scene.late(job(resources=(('gpu', 1),)))
    other = job(resources=(('gpu', 1),))
    scene.tell(NodeOffers('a', 'c', 1))
    actions = scene.tell(Submitted([other]))
    assert sent(actions, 'b') == [other]
    assert only(actions, SendCancel) == [SendCancel('b', 'c', [second.serial])] * ends


@pytest.mark.parametrize('event', [NodeOffers('b', 'c', 0), NodeOffers('b', 'c', 0, 4)])
def test_fewer_cpus_end_it(event):
    scene = Scene()
    _, second = scene.late()
    assert SendCancel('b', 'c', [second.serial]) in scene.tell(event)


def test_the_end_of_the_first_ends_it():
    scene = Scene()
    work, second = scene.late()
    actions = scene.tell(NodeResults('a', 'c', [row(work)]))
    assert only(actions, JobsEnded) == [JobsEnded('a', 'c', [(work, row(work))])]
    assert SendCancel('b', 'c', [second.serial]) in actions
    assert SecondOver('b', 'c', second) in actions
    late = scene.tell(NodeResults('b', 'c', rows(second)))
    assert only(late, JobsEnded) == [] and only(late, SendAck) == [
        SendAck('b', 'c', [second.serial])]
    assert work.state is JobState.FINISHED


def test_cancel_ends_both_and_is_heard_once():
    scene = Scene()
    work, second = scene.late()
    actions = scene.tell(CancelAsked(work))
    assert only(actions, SendCancel) == [SendCancel('a', 'c', [work.serial]),
                                         SendCancel('b', 'c', [second.serial])]
    assert only(scene.tell(NodeResults('b', 'c', rows(second))), JobsEnded) == []
    actions = scene.tell(NodeResults('a', 'c', [row(work, Outcome.CANCELLED)]))
    assert [pair[0] for pair in only(actions, JobsEnded)[0].pairs] == [work]
    assert work.state is JobState.CANCELLED


def test_the_end_of_the_computation_ends_both():
    scene = Scene()
    work, second = scene.late()
    actions = scene.tell(Closed('c'))
    assert [action.work for action in only(actions, JobEnded)] == [work]
    assert only(actions, SecondOver) == [SecondOver('b', 'c', second)]
    assert scene.schedule.nodes['b'].seconds == []


# -- what counts -----------------------------------------------------------------------------------

def test_the_second_wins():
    scene = Scene()
    work, second = scene.late()
    before = work.serial
    scene.tell(NodeStarted('b', 'c', [(second.serial, 0.0)]))
    actions = scene.tell(NodeResults('b', 'c', rows(second)), after=1.0)
    assert [type(action) for action in actions] == [SendCancel, SecondCounts, SendAck, JobsEnded]
    assert actions[0] == SendCancel('a', 'c', [before])
    assert actions[1] == SecondCounts('b', 'c', second, 1.0)
    assert actions[3].node == 'b' and actions[3].pairs[0][0] is work
    assert work.state is JobState.FINISHED and work.serial == second.serial
    late = scene.tell(NodeResults('a', 'c', [(before, *row(work, Outcome.CANCELLED)[1:])]))
    assert [type(action) for action in late] == [SendAck]
    assert scene.schedule.nodes['a'].used == scene.schedule.nodes['b'].used == 0


def test_one_that_is_not_known_to_have_begun_may_win():
    scene = Scene()
    work, second = scene.late()
    actions = scene.tell(NodeResults('b', 'c', rows(second)))
    assert only(actions, SecondCounts) == [SecondCounts('b', 'c', second, None)]
    assert work.state is JobState.FINISHED and only(actions, JobWaits) == []


@pytest.mark.parametrize('outcome', FAILURES)
def test_a_failure_of_the_second_counts_for_nothing(outcome):
    scene = Scene()
    work, second = scene.late()
    actions = scene.tell(NodeResults('b', 'c', rows(second, outcome)), after=1.0)
    assert only(actions, JobsEnded) == [] and work.state is JobState.RUNNING
    assert only(actions, SecondOver) == [SecondOver('b', 'c', second)]
    assert only(scene.tell(after=9.0), SendSecond) == [], 'it has failed once'
    scene.tell(NodeResults('a', 'c', [row(work)]))
    assert work.state is JobState.FINISHED and work.lost_with == ()


@pytest.mark.parametrize('begun', [True, False])
@pytest.mark.parametrize('outcome', FAILURES)
def test_a_failure_of_the_first_counts_for_nothing_while_the_second_goes_on(outcome, begun):
    scene = Scene()
    work, second = scene.late()
    if begun:
        scene.tell(NodeStarted('b', 'c', [(second.serial, 0.0)]))
    actions = scene.tell(NodeResults('a', 'c', [row(work, outcome)]))
    assert only(actions, JobsEnded) == only(actions, JobEnded) == only(actions, SendJobs) == []
    assert only(actions, SecondCounts) == [SecondCounts('b', 'c', second, 0.0 if begun else None)]
    assert len(only(actions, JobWaits)) == (not begun)
    assert work.state is (JobState.RUNNING if begun else JobState.SENT)
    assert work.lost_with == () and scene.schedule.nodes['b'].used == 1
    scene.tell(NodeReady('d', 'c', 1, []))
    assert only(scene.tell(after=9.0), SendSecond) == [], 'it is no retry'
    scene.tell(NodeResults('b', 'c', [row(work)]))
    assert work.state is JobState.FINISHED


def test_both_fail():
    scene = Scene()
    work, second = scene.late()
    scene.tell(NodeResults('a', 'c', [row(work, Outcome.RAISED)]))
    actions = scene.tell(NodeResults('b', 'c', rows(second, Outcome.RAISED)))
    assert [pair[0] for pair in only(actions, JobsEnded)[0].pairs] == [work]
    assert work.state is JobState.TERMINATED


def test_both_fail_the_second_first():
    scene = Scene()
    work, second = scene.late()
    scene.tell(NodeResults('b', 'c', rows(second, Outcome.RAISED)))
    scene.tell(NodeResults('a', 'c', [row(work, Outcome.RAISED)]))
    assert work.state is JobState.TERMINATED


@pytest.mark.parametrize('options, attempts', [({}, None), ({'retries': 2}, None)])
def test_the_node_of_the_first_is_lost(options, attempts):
    """It is no loss of the job: that is counted when both have ended so, and once."""
    scene = Scene()
    work, second = scene.late(job(**options))
    actions = scene.tell(NodeLost('a', 'host', 'broken'))
    assert only(actions, SecondCounts) and work.lost_with == ()
    assert scene.schedule.comps['c'].running == {second.serial: scene.schedule.nodes['b']}
    actions = scene.tell(NodeLost('b', 'host b', 'broken'))
    assert [action.work for action in only(actions, JobWaits)] == [work]
    assert work.lost_with == ('host b',)
    [again] = sent(scene.tell(NodeReady('d', 'c', 1, [])))
    assert again is work and work.serial > second.serial


def test_the_node_of_the_second_is_lost():
    scene = Scene()
    work, second = scene.late()
    actions = scene.tell(NodeLost('b', 'host', 'broken'))
    assert only(actions, SecondOver) == [SecondOver('b', 'c', second)]
    assert work.state is JobState.RUNNING and 'b' not in scene.schedule.nodes
    [action] = only(scene.tell(NodeReady('d', 'c', 1, [])), SendSecond)
    assert action.works[0].serial == second.serial + 1


def test_a_second_that_comes_back_unbegun_is_dropped():
    scene = Scene()
    work, second = scene.late()
    actions = scene.tell(NodeReturned('b', 'c', [second.serial]))
    assert only(actions, SecondOver) == [SecondOver('b', 'c', second)]
    assert work.state is JobState.RUNNING


@pytest.mark.parametrize('held', [True, False])
def test_a_link_that_breaks_and_comes_back(held):
    scene = Scene()
    work, second = scene.late()
    scene.tell(NodeAway('b', 'host', 'cut', scene.now + 60))
    actions = scene.tell(NodeReady('b', 'c', 1, [second.serial] if held else []))
    assert bool(only(actions, SecondOver)) != held and only(actions, SendCancel) == []
    assert scene.schedule.speculation.at('b', scene.schedule.comps['c'], second.serial) is (
        second if held else None)
    assert work.state is JobState.RUNNING


def test_what_was_given_up_while_the_node_was_away_is_ended_when_it_is_back():
    scene = Scene()
    work, second = scene.late()
    scene.tell(NodeAway('b', 'host', 'cut', scene.now + 60))
    scene.tell(NodeResults('a', 'c', [row(work)]))
    actions = scene.tell(NodeReady('b', 'c', 1, [second.serial]))
    assert SendCancel('b', 'c', [second.serial]) in actions


def test_the_link_of_the_first_may_be_away_when_the_second_wins():
    scene = Scene()
    work, second = scene.late()
    before = work.serial
    scene.tell(NodeAway('a', 'host', 'cut', scene.now + 60))
    scene.tell(NodeResults('b', 'c', rows(second)))
    assert work.state is JobState.FINISHED
    assert SendCancel('a', 'c', [before]) in scene.tell(NodeReady('a', 'c', 1, [before]))


# -- provisional results ---------------------------------------------------------------------------

def test_provisional_results_of_the_second_are_held_back_until_it_counts():
    scene = Scene()
    work, second = scene.late()
    provisional = row(second, Outcome.PROVISIONAL)
    assert only(scene.tell(NodeResults('b', 'c', [provisional])), JobsEnded) == []
    mine = row(work, Outcome.PROVISIONAL)
    assert only(scene.tell(NodeResults('a', 'c', [mine])), JobsEnded) == [
        JobsEnded('a', 'c', [(work, mine)])]
    actions = scene.tell(NodeResults('b', 'c', [provisional, row(second)]))
    kinds = [type(action) for action in actions]
    assert kinds.index(SecondCounts) < kinds.index(JobsEnded)
    shown = [pair[1] for action in only(actions, JobsEnded) for pair in action.pairs]
    assert shown == [provisional, provisional, row(second)]


def test_they_are_dropped_with_it():
    scene = Scene()
    work, second = scene.late()
    scene.tell(NodeResults('b', 'c', [row(second, Outcome.PROVISIONAL)]))
    shown = only(scene.tell(NodeResults('a', 'c', [row(work)])), JobsEnded)
    assert [pair[1] for action in shown for pair in action.pairs] == [row(work)]


# -- a scheduler -----------------------------------------------------------------------------------

def test_one_that_has_finished_counts_before_its_result_is_there():
    scene = Scene()
    work, second = scene.late()
    actions = scene.tell(SecondWins('b', 'c', second.serial))
    assert only(actions, SecondCounts) and work.state is JobState.RUNNING
    assert only(actions, SendCancel)[0].node == 'a'
    scene.tell(NodeResults('b', 'c', [row(work)]))
    assert work.state is JobState.FINISHED


@pytest.mark.parametrize('there', [True, False])
def test_two_attempts_after_a_new_start(there):
    """A scheduler that is started again knows of both."""
    schedule = Schedule()
    scene = Scene.__new__(Scene)
    scene.schedule, scene.now = schedule, 0.0
    scene.tell(Opened('c', 'c', True, False, None, True))
    work = job()
    work.serial = 7 << 16 | 1
    scene.tell(NodeHad('a', 'c', [work], 'a', 60.0), NodeHad('b', 'c', [], 'b', 60.0))
    scene.tell(SecondHad('b', 'c', work, 7 << 16 | 2))
    scene.tell(NodeReady('a', 'c', 1, [work.serial], past=AttemptHistory()))
    actions = scene.tell(NodeReady('b', 'c', 1, [7 << 16 | 2] if there else []))
    assert only(actions, SendCancel) == [] and bool(only(actions, SecondOver)) != there
    scene.tell(NodeResults('b', 'c', [(7 << 16 | 2, *row(work)[1:])]))
    assert (work.state is JobState.FINISHED) == there


def test_many_late_jobs_use_all_idle_cpus():
    scene = Scene(cpus=4)
    works = jobs(4)
    for work in works:
        scene.run(work)
    [*actions] = only(scene.tell(after=3.0), SendSecond)
    assert len(actions) == 4 and {action.node for action in actions} == {'b'}
    assert len(scene.schedule.nodes['b'].seconds) == 4


# -- a random walk ---------------------------------------------------------------------------------

class TellingNode(ModelNode):
    """It tells what has begun."""

    def start(self):
        before = set(self.running)
        super().start()
        for comp, serial in self.running:
            if (comp, serial) not in before:
                self.outbox.append(NodeStarted(self.key, comp, [(serial, 0.0)]))


class SpeculatingWalk(Walk):
    """As the walk of the other tests; the time goes on, and jobs are started a second time."""

    def __init__(self, seed):
        super().__init__(seed)
        self.nodes = {key: TellingNode(key, node.cpus) for key, node in self.nodes.items()}
        self.seconds = self.counted = 0

    def open_one(self):
        super().open_one()
        comp = self.open[-1]
        if self.reentrant[comp] and self.rng.random() < 0.9:
            self.event(Closed(comp))
            self.event(Opened(comp, self.rng.choice('xyz'), True, False, None, True))
            self.schedule.comps[comp].seconds.median.add([0.1] * SPECULATE_AFTER)
            for node in self.nodes.values():
                if node.linked and not node.away:
                    self.set_up(node, comp)

    def submit(self):
        """Now and then, so that often nothing waits."""
        if self.rng.random() < 0.3:
            super().submit()

    def step(self):
        if not any(node.away for node in self.nodes.values()):
            self.now += self.rng.choice((0.0, 0.0, 0.01, 0.5))
        super().step()

    def act(self, actions):
        super().act([action for action in actions
                     if type(action) not in (SendSecond, SecondOver, SecondCounts)])
        for action in only(actions, SendSecond):
            self.seconds += 1
            assert self.nodes[action.node].linked and not self.nodes[action.node].away
            self.nodes[action.node].inbox.append((SendJobs, action.comp, self.rows(action)))
        self.counted += len(only(actions, SecondCounts))

    def check(self):
        super().check()
        for comp in self.schedule.comps.values():
            if comp.seconds is None:
                continue
            there = sorted(second.serial for node in comp.nodes.values()
                           for second in node.seconds if second.comp == comp.comp)
            assert there == sorted(comp.seconds.by_serial) == sorted(
                second.serial for second in comp.seconds.of_job.values())
            for work, second in comp.seconds.of_job.items():
                assert comp.running[work.serial].key != second.node
                assert work not in self.ended and work.state is not JobState.CANCELLING

    def check_no_idle_cpu(self):
        super().check_no_idle_cpu()
        for node in self.schedule.nodes.values():
            if node.away is None and node.seconds:
                taken = sum(map(cpus_of, node.seconds))
                assert node.used + taken <= node.cpus, 'a second attempt is in the way'


@pytest.mark.parametrize('first', range(0, 120, 20))
def test_random_walk(first, request):
    step = 1 if request.config.getoption('--long') else 2
    walk_seeds(SpeculatingWalk, range(first, first + 20, step))
