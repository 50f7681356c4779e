"""Results are given to those who have their computation's key: the program, and who has its
recovery file."""

import os

import pytest

from dispynode import (
    Compute, SpoolFound, KnownAttempts, LinkUp, Node, PeerError, Received, Reclaim, Send,
    ResultSpool, digest_of, may_reclaim)


def test_keys():
    key = os.urandom(32)
    assert (may_reclaim(digest_of(key), key) and not may_reclaim(digest_of(key), b'')
            and not may_reclaim(digest_of(key), os.urandom(32)))
    assert may_reclaim(bytes(32), b'') and may_reclaim(bytes(32), b'any')


def node_with_kept(digest):
    node = Node('n', 1, {})
    node.handle(SpoolFound('c', b'a' * 16, [1, 2], 1e9, digest), 0.0)
    node.handle(LinkUp(5, b'b' * 16, 'there'), 0.0)
    return node


@pytest.mark.parametrize('key, given', [(b'k', b''), (b'k', b'x'), (b'k', b'k'), (b'', b'')])
def test_a_node_gives_kept_results_for_the_key(key, given):
    node = node_with_kept(digest_of(key))
    actions = node.handle(Received(5, Reclaim('c', given)), 0.0)
    right = key == given
    # Who is refused must not take it for told that nothing began
    answer = KnownAttempts('c', [1, 2]) if right else KnownAttempts('c', [],
                                                                    (False, [], [], [], ''))
    assert [action.message for action in actions if isinstance(action, Send)][0] == answer
    assert (node.results.spooled['c'].owner == b'b' * 16) is right


def test_the_same_instance_without_the_key_gets_nothing():
    """Who has listened knows the instance; the computation's digest has to fit as well."""
    from talk_node import spec
    node = node_with_kept(digest_of(b'k'))
    actions = node.handle(Received(5, Compute('c', dict(spec(), key=digest_of(b'other')))), 0.0)
    assert node.results.spooled['c'].owner == b'a' * 16
    assert not any(type(action).__name__ == 'SendSpooled' for action in actions)
    with pytest.raises(PeerError, match='another key'):
        node.handle(Received(5, Compute('c', dict(spec(), key=digest_of(b'k')))), 0.0)


def test_the_key_outlives_the_node(tmp_path):
    shelf = ResultSpool(str(tmp_path / 'r-c'))
    shelf.append(b'a' * 16, [(1, 1, 0.0, 0.0, b'x', b'', b'')], digest_of(b'k'))
    assert ResultSpool(str(tmp_path / 'r-c')).scan() == (b'a' * 16, digest_of(b'k'), [1])
    assert [row[0] for row in shelf.rows()] == [1]
