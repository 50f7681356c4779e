"""The whole system on a virtual clock, seed after seed. With --long more seeds, and a day of 50
nodes and 200,000 jobs."""

import time

import pytest

from simulation import FULL, simulate

SEEDS = 20        # with --long; half of them without


def run(seed, **options):
    """A run whose failure says how to repeat it."""
    try:
        return simulate(seed, **options)
    except Exception as exc:
        raise AssertionError('python tests/faults/simulation.py --seed %d%s: %s: %s' % (
            seed, ' --full' if options else '', type(exc).__name__, exc)) from exc


@pytest.mark.long
@pytest.mark.parametrize('seed', range(1, SEEDS + 1))
def test_whatever_fails_each_job_ends_once(seed, request):
    if seed > SEEDS // 2 and not request.config.getoption('--long'):
        pytest.skip('with --long')
    world = run(seed)
    assert world.submitted >= 1000 and world.faults == 300 and sum(world.statuses.values()) > 500


def test_a_seed_repeats_itself_however_slow_the_machine_is(monkeypatch):
    first = run(7).summary()
    for name in ('monotonic', 'time'):
        clock = getattr(time, name)
        monkeypatch.setattr(time, name, lambda clock=clock, began=clock():
                            began + 300 * (clock() - began))
    assert run(7).summary() == first


def test_all_faults_occur_and_their_outcomes_too():
    world = run(3)
    assert len(world.told) == 12 and min(world.told.values()) > 0
    assert {name for name, count in world.statuses.items() if count} == {'FINISHED', 'TERMINATED',
                                                                         'CANCELLED', 'ABANDONED'}
    assert world.shelved


def test_more_seeds(request):
    if not request.config.getoption('--long'):
        pytest.skip('takes minutes: --long')
    for seed in range(1001, 1201):
        run(seed)


def test_a_day_of_fifty_nodes(request):
    if not request.config.getoption('--long'):
        pytest.skip('takes minutes: --long')
    assert run(1, **FULL).submitted == FULL['jobs']
