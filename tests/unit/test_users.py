"""Users in a schedule: limits, shares, priorities, and what was used over the past. Time is
virtual."""

import collections
import heapq

import pytest

from dispy import (Closed, JobsHeld, NodeAway, NodeLost, NodeReady, NodeResults,
                   NodeReturned, NodeStarted, Opened, RulesChanged, Schedule, SendRecall, Submitted,
                   UserRule, UserRules, cpus_of)
from dispynode import Outcome, StartError
from dispyscheduler import ProgramUser, make_parser, rules_of
from talk_schedule import job, jobs, only, row, sent

HOUR = 3600.0


def limited(name='ada', **limits):
    return UserRules(users={name: UserRule(**limits)})


class Farm:
    """A schedule and nodes that run what they are sent in the order of its coming."""

    def __init__(self, rules, **nodes):
        self.schedule = Schedule(rules=rules)
        self.now = 0.0
        self.nodes = nodes              # name -> CPUs
        self.actions = []
        self.waiting = collections.defaultdict(collections.deque)     # by node
        self.free = dict(nodes)
        self.ends = []                  # (time, number, node, work)
        self.seconds = collections.Counter()    # computation -> CPU seconds
        self.lengths = {}               # computation -> s of its jobs, where there are always some
        self.number = 0

    def open(self, comp, user, length=None, client=None):
        self.act(self.schedule.handle(Opened(comp, client or comp, True, user=user), self.now))
        if length is not None:
            self.lengths[comp] = length
        for node, cpus in self.nodes.items():
            self.act(self.schedule.handle(NodeReady(node, comp, cpus, []), self.now))

    def load(self, comp):
        return self.schedule.comps[comp]

    def user(self, name):
        return self.schedule.users.loads()[name]

    def tell(self, *events):
        """One turn with these events: what was done in it."""
        for event in events:
            self.act(self.schedule.handle(event, self.now))
        self.act(self.schedule.flush(self.now))
        actions, self.actions = self.actions, []
        return actions

    def act(self, actions):
        self.actions += actions
        for action in actions:
            if hasattr(action, 'works'):
                self.waiting[action.node].extend(action.works)
        for node in self.nodes:
            while self.waiting[node] and self.free[node] > 0:
                work = self.waiting[node].popleft()
                self.free[node] -= cpus_of(work)
                self.number += 1
                end = self.now + self.lengths.get(work.comp, 1.0)
                heapq.heappush(self.ends, (end, self.number, node, work))

    def started(self):
        """The nodes say what runs."""
        for _, _, node, work in list(self.ends):
            self.tell(NodeStarted(node, work.comp, [(work.serial, 0.0)]))

    def run(self, until, told=True):
        """Go on until that time, with jobs of each computation that has a length."""
        while True:
            for comp in self.lengths:
                missing = 40 - self.load(comp).length()
                if missing > 0:
                    self.tell(Submitted(jobs(missing, comp)))
            if told:
                self.started()
            if not self.ends or self.ends[0][0] > until:
                self.now = until
                return
            self.end_next()

    def end_next(self):
        self.now = self.ends[0][0]
        while self.ends and self.ends[0][0] == self.now:
            _, _, node, work = heapq.heappop(self.ends)
            self.free[node] += cpus_of(work)
            took = self.lengths.get(work.comp, 1.0)
            self.seconds[work.comp] += took * cpus_of(work)
            self.act(self.schedule.handle(
                NodeResults(node, work.comp, [row(work, Outcome.RETURNED, took)]), self.now))
        self.tell()


@pytest.mark.parametrize('limits, text', [
    ({'cpus': 3}, 'user ada has 3 CPUs, the next job needs 1, and the limit is 3 (--limit)'),
    ({'jobs': 3}, 'user ada has 3 jobs on nodes, and the limit is 3 (--limit)')])
def test_a_user_has_no_more_than_the_limit_over_all_computations(limits, text):
    farm = Farm(limited(**limits), n=4, m=4)
    farm.open('c', 'ada')
    farm.open('d', 'ada')
    farm.open('b', 'bob')
    actions = farm.tell(Submitted(jobs(5, 'c') + jobs(5, 'd')))
    assert len(sent(actions)) == 3
    told = only(actions, JobsHeld)
    assert {action.comp for action in told} == {'c', 'd'} and told[0].text == text
    # Others are not held, and what waits is told
    assert len(sent(farm.tell(Submitted(jobs(9, 'b'))), comp='b')) >= 5
    counts = [farm.load(comp).held_up() for comp in 'cd']
    assert sum(count for count, _ in counts) == 7 and counts[0][1] == text
    assert farm.load('b').held_up() == (0, '')
    # When one ends, one more begins; it is said once
    farm.end_next()
    assert farm.user('ada').jobs == 3
    assert not only(farm.tell(), JobsHeld)
    # All end in the end
    while farm.ends:
        farm.end_next()
        assert farm.user('ada').jobs <= 3
    assert farm.seconds['c'] + farm.seconds['d'] == 10
    assert farm.user('ada').cpus == farm.user('ada').jobs == farm.user('bob').cpus == 0


def test_a_group_has_a_limit_beside_those_of_its_users_and_each_other_user_has_his():
    rules = UserRules(users={'ada': UserRule(cpus=2), 'bob': UserRule()},
                      groups={'lab': UserRule(cpus=5)}, members={'ada': 'lab', 'bob': 'lab'},
                      others=UserRule(jobs=1))
    farm = Farm(rules, n=20)
    for user in ('ada', 'bob', 'cy', 'di'):
        farm.open(user, user)
    actions = farm.tell(*(Submitted(jobs(6, user)) for user in ('ada', 'bob', 'cy', 'di')))
    assert [len(sent(actions, comp=user)) for user in ('ada', 'bob', 'cy', 'di')] == [2, 3, 1, 1]
    assert 'group lab has 5 CPUs' in farm.load('bob').held_up()[1]
    assert farm.user('@lab').cpus == 5


def test_a_job_that_is_wider_than_the_limit_lets_others_go_first_until_the_limit_is_raised():
    farm = Farm(limited(cpus=2), n=8)
    farm.open('c', 'ada')
    wide, narrow = job(cpus=4), job()
    actions = farm.tell(Submitted([wide, narrow]))
    assert sent(actions) == [narrow]
    text = 'it needs 4 CPUs (dispy_cpus), and the limit of user ada is 2 (--limit)'
    assert [action.text for action in only(actions, JobsHeld)] == [text]
    assert farm.load('c').held_up() == (1, text)
    assert not only(farm.tell(Submitted([job(cpus=4)])), JobsHeld)     # said once
    assert wide in sent(farm.tell(RulesChanged(limited(cpus=9))))
    assert farm.user('ada').cpus == 9 and farm.load('c').held_up() == (0, '')
    # A lower limit lets go on what runs
    farm.tell(Submitted(jobs(3)), RulesChanged(limited(cpus=1)))
    assert farm.user('ada').cpus == 9
    farm.end_next()
    assert farm.user('ada').cpus == 1
    # Without rules nobody has a load
    farm.tell(RulesChanged(UserRules()))
    assert farm.load('c').user is None and not farm.schedule.users.loads()


def test_a_job_that_waits_at_a_full_node_goes_to_an_idle_one_though_others_are_held():
    farm = Farm(limited(jobs=3), n=2)
    farm.open('c', 'ada')
    works = jobs(5)
    for _ in range(40):      # short ones: some are sent ahead
        short = job()
        farm.lengths['c'] = 0.001
        farm.tell(Submitted([short]))
        farm.end_next()
    farm.tell(Submitted(works))
    assert farm.user('ada').jobs == 3 and farm.load('c').length() == 2
    farm.nodes['m'] = farm.free['m'] = 1
    actions = farm.tell(NodeReady('m', 'c', 1, []))
    recall, = only(actions, SendRecall)
    back = works[2]
    assert recall.serials == [back.serial]
    actions = farm.tell(NodeReturned('n', 'c', recall.serials))
    assert sent(actions, 'm') == [back] and farm.user('ada').jobs == 3


@pytest.mark.parametrize('length, cpus', [(0.5, 4), (5.0, 4), (0.5, 3), (5.0, 3), (5.0, 1)])
def test_shares_over_ten_minutes(length, cpus):
    """Also where no whole numbers of CPUs are in proportion."""
    rules = UserRules(users={'ada': UserRule(share=3.0)}, by_user=True)
    farm = Farm(rules, n=cpus, m=cpus)
    farm.open('c', 'ada', length)
    farm.open('d', 'bob', length)
    farm.open('e', 'bob', length, client='another program')      # gets no more by that
    farm.run(600.0)
    ada = farm.seconds['c']
    bob = farm.seconds['d'] + farm.seconds['e']
    assert ada + bob == pytest.approx(2 * cpus * 600.0, rel=0.02)     # no CPU was idle
    assert ada == pytest.approx(3 * bob, rel=0.06)
    assert farm.seconds['d'] == pytest.approx(farm.seconds['e'], rel=0.1)


def test_a_group_shares_what_it_gets():
    rules = UserRules(groups={'lab': UserRule(share=1.0)}, by_user=True,
                      members={'ada': 'lab', 'bob': 'lab'}, users={'bob': UserRule(share=3.0)})
    farm = Farm(rules, n=8)
    for user in ('ada', 'bob', 'cy'):
        farm.open(user, user, 1.0)
    farm.run(600.0)
    parts = [farm.seconds[user] / 4800.0 for user in ('ada', 'bob', 'cy')]
    assert parts == pytest.approx([1 / 8, 3 / 8, 1 / 2], abs=0.02)


def test_who_has_a_higher_priority_goes_first():
    rules = UserRules(users={'ada': UserRule(priority=1)}, by_user=True)
    farm = Farm(rules, n=4)
    farm.open('b', 'bob', 1.0)
    farm.run(10.0)
    farm.open('a', 'ada')
    farm.tell(Submitted(jobs(8, 'a')))
    before = farm.seconds['b']
    farm.run(13.0)
    assert farm.seconds['a'] == 8.0 and farm.seconds['b'] - before <= 8.0


def test_who_has_used_less_over_the_past_gets_more_until_that_is_even():
    """With CPUs c = c_a + c_b, means p of the past and half-life H, p_a + c_a = p_b + c_b holds,
    so that the difference p_a - p_b becomes half of what it was in H / 2."""
    rules = UserRules(by_user=True, half_life=HOUR)
    farm = Farm(rules, n=8)
    farm.open('a', 'ada', 10.0)
    farm.run(2 * HOUR)
    assert farm.user('ada').past == pytest.approx(6.0, abs=0.05)      # 8 (1 - 1/4)
    farm.open('b', 'bob', 10.0)
    farm.run(2 * HOUR + 600.0)
    # CPUs of bob, and what the difference is in the mean of ten minutes
    rest = 0.5 ** (600.0 / (HOUR / 2))
    difference = 6.0 * (1.0 - rest) / (0.693147 * 600.0 / (HOUR / 2))
    assert farm.seconds['b'] / 600.0 == pytest.approx((8.0 + difference) / 2, abs=0.3)
    before = farm.seconds.copy()
    farm.run(6 * HOUR)
    farm.run(7 * HOUR)
    at_six = farm.seconds.copy()
    farm.run(8 * HOUR)
    last = [farm.seconds[comp] - at_six[comp] for comp in 'ab']
    assert last[0] == pytest.approx(last[1], rel=0.02)
    assert farm.seconds['b'] > before['b']
    # By then each has had about 4 CPUs
    assert farm.user('bob').past == pytest.approx(4.0, abs=0.3)


def test_past_use_counts_of_short_jobs_of_those_that_run_and_of_those_that_are_lost():
    rules = UserRules(by_user=True, half_life=HOUR, users={'ada': UserRule()},
                      members={'ada': 'lab'})
    each = 100.0 * 0.693147 / HOUR     # CPUs in the mean, of 100 CPU seconds that were just used
    farm = Farm(rules, n=2)
    farm.open('a', 'ada')
    # It was never heard that it had begun
    farm.lengths['a'] = 100.0
    farm.tell(Submitted([job('a')]))
    farm.end_next()
    assert farm.user('ada').past == pytest.approx(each, rel=0.02)
    # It is known to run; then its node is lost
    farm.tell(Submitted([job('a', cpus=2)]))
    farm.started()
    farm.started()
    assert farm.user('ada').running == 2
    farm.now += 50.0
    farm.tell(NodeAway('n', 'n', 'broken', farm.now + 50.0))
    farm.now += 50.0
    farm.tell(NodeLost('n', 'n', 'broken'))
    used = farm.schedule.users.used(farm.now)
    assert used['ada'] == pytest.approx(3 * each, rel=0.05)
    assert farm.user('ada').running == farm.user('ada').cpus == 0
    assert farm.user('@lab').past == pytest.approx(used['ada'])
    # It holds in another process and under other rules, and is forgotten when it is nothing
    other = Schedule(rules=rules)
    other.users.restore(used, 0.0)
    assert other.users.used(HOUR)['ada'] == pytest.approx(used['ada'] / 2)
    other.handle(RulesChanged(UserRules(by_user=True, half_life=2 * HOUR)), HOUR)
    assert other.users.used(3 * HOUR)['ada'] == pytest.approx(used['ada'] / 4)
    other.handle(Opened('b', 'b', True, user='bob'), 3 * HOUR)
    other.handle(Closed('b'), 90 * HOUR)
    assert not other.users.loads()
    other.users.restore({'ada': 1.0}, 90 * HOUR)
    other.handle(RulesChanged(limited(cpus=1)), 90 * HOUR)
    assert not other.users.used(90 * HOUR)      # past use does not count any more


def test_nothing_is_sent_ahead_while_several_users_want_a_node():
    farm = Farm(UserRules(by_user=True), n=2)
    farm.open('a', 'ada', 0.001)
    farm.run(1.0, told=False)
    assert farm.user('ada').jobs > 2       # one user alone: short jobs wait at the node
    farm.open('b', 'bob', 0.001)
    farm.run(2.0, told=False)
    assert farm.user('ada').jobs + farm.user('bob').jobs == 2
    # One who is held by a limit does not count
    farm.tell(RulesChanged(UserRules(by_user=True, users={'bob': UserRule(cpus=0)})))
    farm.run(3.0, told=False)
    assert farm.user('bob').jobs == 0 and farm.user('ada').jobs > 2


def rules(*words):
    return rules_of(make_parser().parse_args(words))


def test_rules_of_options():
    found = rules('--limit', 'ada=cpus:8,jobs:20', '--limit', '*=cpus:4', '--limit', '@lab=jobs:9',
                  '--share', 'ada=2.5', '--share', '@lab=3', '--priority', '@lab=2',
                  '--priority', 'bob=-1', '--group', 'lab=bob,cy', '--half-life', '24')
    assert found.users == {'ada': UserRule(2.5, 0, 8, 20), 'bob': UserRule(1.0, -1, 4),
                           'cy': UserRule(1.0, 2, 4)}
    assert found.groups == {'lab': UserRule(3.0, 2, float('inf'), 9)}
    assert found.members == {'bob': 'lab', 'cy': 'lab'} and found.others == UserRule(cpus=4)
    assert found.by_user and found.half_life == 86400.0 and not found.are_empty
    # Limits alone leave the order of programs as it was
    assert not rules('--limit', 'ada=cpus:0').by_user
    assert rules().are_empty


@pytest.mark.parametrize('words, text', [
    (['--limit', 'ada'], 'WHO=VALUE'), (['--limit', '=cpus:1'], 'WHO=VALUE'),
    (['--limit', 'ada=cpu:1'], 'cpus:N'), (['--limit', 'ada=cpus:-1'], 'cpus:N'),
    (['--limit', 'ada=cpus:1,cpus:2'], 'cpus:N'), (['--limit', 'ada='], 'cpus:N'),
    (['--limit', 'a=jobs:1', '--limit', 'a=jobs:1'], 'twice'),
    (['--limit', '@lab=jobs:1'], '@lab: there is no such group'),
    (['--share', 'ada=0'], 'number above 0'), (['--share', 'ada=x'], 'number above 0'),
    (['--priority', 'ada=1.5'], 'whole number'), (['--group', 'lab'], 'WHO=VALUE'),
    (['--group', 'lab='], 'NAME=USER'), (['--group', '@lab=ada'], 'NAME=USER'),
    (['--group', 'lab=@x'], 'NAME=USER'),
    (['--group', 'lab=ada', '--group', 'hall=ada'], 'may be in one group'),
    (['--half-life', '0.5'], '1 and 168 hours'), (['--half-life', '169'], '1 and 168 hours')])
def test_rules_that_make_no_sense(words, text):
    with pytest.raises(StartError, match=text):
        rules(*words)


@pytest.mark.parametrize('user, with_secrets, name', [
    (ProgramUser('ada', True), True, 'ada'), (ProgramUser('ada@host', False), False, 'ada'),
    (ProgramUser('ada@host', False), True, 'ada (not proven)'), (ProgramUser(), False, '')])
def test_a_name_that_is_not_proven_is_not_that_of_one_who_has_a_secret(user, with_secrets, name):
    assert user.known_as(with_secrets) == name
