"""When a node ends by itself: before its time limit, or after some time without jobs."""

import pytest

from dispynode import DRAIN_BEFORE, Finish, LIMIT_MARGIN, Lifetime, Stop, make_parser
from dispynode import whole_memory


def lifetime(*words, now=100.0):
    return Lifetime.of_options(make_parser().parse_args(words), now)


def events(life, busy, until, now=100.0):
    """What is told in each second, with the seconds since the node was born."""
    found = []
    while now <= until:
        event = life.look(busy(now - 100.0), now)
        if event is not None:
            found.append((now - 100.0, event))
        now += 1.0
    return found


def test_a_node_takes_no_new_jobs_and_then_ends_before_its_time_limit():
    life = lifetime('--time-limit', '3600', '--drain-before', '300', '--grace', '20')
    assert events(life, lambda now: True, 3800.0) == [
        (3300.0, Finish()), (3600.0 - 20.0 - LIMIT_MARGIN, Stop())]


@pytest.mark.parametrize('words, drains_at', [
    (('--time-limit', '3600'), 3600.0 - DRAIN_BEFORE), (('--time-limit', '100'), 50.0),
    # Time for the grace of what runs counts more
    (('--time-limit', '3600', '--drain-before', '10', '--grace', '50'), 3540.0)])
def test_when_it_takes_no_new_jobs(words, drains_at):
    assert events(lifetime(*words), lambda now: False, 3800.0)[0] == (drains_at, Finish())


def test_a_node_ends_that_has_had_no_jobs_for_a_while():
    life = lifetime('--end-idle', '60')
    assert events(life, lambda now: now % 50 == 0 and now < 200, 1000.0) == [(210.0, Finish())]
    assert events(lifetime('--end-idle', '60', '--time-limit', '600'), lambda now: False,
                  700.0) == [(60.0, Finish()), (585.0, Stop())]


def test_times_that_make_no_sense():
    assert lifetime() is None and lifetime('--drain-before', '9') is None
    for words in (('--time-limit', '15'), ('--time-limit', '60', '--drain-before', '60')):
        with pytest.raises(ValueError, match='has to be more than'):
            lifetime(*words)


def test_memory_that_is_given_is_an_upper_bound():
    assert whole_memory(1 << 20) == 1 << 20
    assert whole_memory(1 << 60) == whole_memory()
