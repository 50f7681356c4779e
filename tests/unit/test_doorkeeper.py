"""Who may connect, as the doorkeeper decides it: a table without any connection."""

import pytest

from dispynode import HandshakeLimiter


def admitted(keeper, address, count, now=0.0):
    """How many of so many are let in."""
    return sum(keeper.admit(address, now) for _ in range(count))


def fail(keeper, address, count, now=0.0):
    for _ in range(count):
        assert keeper.admit(address, now)
        keeper.done(address, False, now)


def test_32_from_one_address_and_64_at_once():
    keeper = HandshakeLimiter()
    assert admitted(keeper, 'a', 40) == 32
    assert admitted(keeper, 'b', 20) == 20
    assert admitted(keeper, 'c', 20) == 12
    assert not keeper.admit('d', 0.0)


def test_who_is_done_makes_room():
    keeper = HandshakeLimiter()
    assert admitted(keeper, 'a', 33) == 32
    keeper.done('a', True, 0.0)
    assert admitted(keeper, 'a', 2) == 1
    assert admitted(keeper, 'b', 40) == 32
    keeper.done('a', True, 0.0)
    assert keeper.admit('c', 0.0) and not keeper.admit('c', 0.0)


def test_who_was_refused_holds_no_place():
    keeper = HandshakeLimiter()
    admitted(keeper, 'a', 1000)
    for _ in range(32):
        keeper.done('a', True, 0.0)
    assert admitted(keeper, 'a', 33) == 32


def test_four_failures_are_free():
    keeper = HandshakeLimiter()
    fail(keeper, 'a', 4)
    assert keeper.admit('a', 0.0)


@pytest.mark.parametrize('failures, shut', [
    (5, 15), (6, 30), (7, 60), (8, 120), (9, 240), (10, 480), (11, 600), (12, 600), (30, 600)])
def test_the_time_for_which_an_address_is_refused(failures, shut):
    keeper, now = HandshakeLimiter(), 0.0
    fail(keeper, 'a', 4)
    for _ in range(failures - 4):
        now += 1000
        fail(keeper, 'a', 1, now)
    assert not keeper.admit('a', now) and not keeper.admit('a', now + shut - 0.01)
    assert keeper.admit('a', now + shut)


# Guards against: 2 ** count does not fit a float any more, done() raises, and the address is never
# refused again.
def test_failures_beyond_a_thousand():
    keeper, now = HandshakeLimiter(), 0.0
    for _ in range(40):    # 32 at once come in whenever the time is over
        now += 1000
        assert admitted(keeper, 'a', 32, now) == 32
        for _ in range(32):
            keeper.done('a', False, now)
    assert not keeper.admit('a', now + 599)


def test_other_addresses_are_not_affected():
    keeper = HandshakeLimiter()
    fail(keeper, 'a', 5)
    assert not keeper.admit('a', 1.0) and keeper.admit('b', 1.0)


def test_success_is_forgiveness():
    keeper = HandshakeLimiter()
    fail(keeper, 'a', 4)
    assert keeper.admit('a', 0.0)
    keeper.done('a', True, 0.0)
    fail(keeper, 'a', 4)
    assert keeper.admit('a', 0.0)


def test_one_line_an_address_and_10_seconds():
    keeper = HandshakeLimiter()
    assert ([keeper.may_log('a', now) for now in (0.0, 0.1, 9.9, 10.0, 10.1, 19.9, 20.0)]
            == [True, False, False, True, False, False, True])
    assert keeper.may_log('b', 0.1)


def test_memory_is_bounded():
    keeper = HandshakeLimiter()
    for number in range(3 * HandshakeLimiter.REMEMBERED):
        fail(keeper, '10.%d' % number, 1)
        keeper.may_log('10.%d' % number, 0.0)
    assert (len(keeper._failed) <= HandshakeLimiter.REMEMBERED
            and len(keeper._logged) <= HandshakeLimiter.REMEMBERED)
    assert not keeper._open


def test_asking_leaves_nothing_behind():
    keeper = HandshakeLimiter()
    admitted(keeper, 'a', 64)
    for number in range(1000):
        keeper.admit('10.%d' % number, 0.0)
        keeper.may_log('a', 0.0)
    assert len(keeper._open) <= 33 and not keeper._failed
