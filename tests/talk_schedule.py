"""A conversation with a Schedule: what it is told, and which jobs it sends where."""

from dispy import (ENDED, JobState, NodeReady, NodeResults, Opened, Schedule, SendJobs, Submitted,
                   ScheduledJob)
from dispynode import Outcome


def job(comp='c', payload=b'x', **options):
    return ScheduledJob(comp, payload, options or None)


def jobs(count, comp='c', **options):
    return [job(comp, **options) for _ in range(count)]


def row(work, outcome=Outcome.RETURNED, took=1.0):
    return (work.serial, int(outcome), 0.0, took, b'value', b'', b'')


class Talk:
    """A schedule and what it said; `tell` is one turn with these events."""

    def __init__(self, *comps, reentrant=True):
        self.schedule = Schedule()
        for comp in comps or ('c',):
            self.schedule.handle(Opened(comp, comp, reentrant), 0.0)

    def tell(self, *events):
        actions = []
        for event in events:
            actions += self.schedule.handle(event, 0.0)
        return actions + self.schedule.flush(0.0)

    def ready(self, node, cpus=1, comp='c', held=()):
        return self.tell(NodeReady(node, comp, cpus, list(held)))

    def submit(self, works):
        return self.tell(Submitted(works))

    def results(self, node, works, comp='c', outcome=Outcome.RETURNED, took=1.0):
        return self.tell(NodeResults(node, comp, [row(work, outcome, took) for work in works]))

    def learn(self, took, comp='c', node='n', times=1):
        """Let it know how long jobs take, by some that ended there."""
        works = jobs(times, comp, node=node)
        self.submit(works)
        while works:
            self.results(node, [work for work in works if work.state is JobState.SENT], comp,
                         took=took)
            works = [work for work in works if work.state not in ENDED]


def only(actions, kind):
    return [action for action in actions if type(action) is kind]


def sent(actions, node=None, comp=None):
    """Works in SendJobs, in order."""
    return [work for action in only(actions, SendJobs) for work in action.works
            if node in (None, action.node) and comp in (None, action.comp)]


def counts(actions):
    return {action.node: len(action.works) for action in only(actions, SendJobs)}
