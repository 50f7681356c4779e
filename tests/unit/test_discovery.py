"""Discovery as a pure class, and what elements of `nodes` mean. No socket."""

import ipaddress
import struct

import pytest

import dispy
from dispynode import (DATAGRAM, DatagramType, Discovery, Role, derive_key, nearest_address,
                       format_address)

KEY, OTHER = derive_key(b'the secret of these tests'), derive_key(b'another secret')
CLIENT, NODE = '10.97.0.1', '10.97.0.2'


def client(key=KEY, instance=b'c' * 16):
    return Discovery(key, Role.CLIENT, instance)


def node(key=KEY, instance=b'n' * 16, port=9701, addresses=()):
    return Discovery(key, Role.NODE, instance, port, addresses)


def test_a_question_and_its_answer():
    asker, there = client(), node(port=40001)
    heard, answer = there.parse(asker.build(DatagramType.QUESTION), CLIENT, 0.0)
    assert heard.kind == DatagramType.QUESTION and len(answer) == DATAGRAM == 128
    found, reply = asker.parse(answer, NODE, 0.0)
    assert (reply is None and found.kind == DatagramType.ANSWER and found.port == 40001
            and found.address == '' and found.instance == b'n' * 16)


@pytest.mark.parametrize('kind', DatagramType)
def test_no_datagram_is_longer_than_a_question(kind):
    assert len(node().build(kind, CLIENT)) == len(client().build(DatagramType.QUESTION)) == DATAGRAM


def test_a_repeated_datagram_is_heard_once():
    asker, there = client(), node()
    question = asker.build(DatagramType.QUESTION)
    answer = there.parse(question, CLIENT, 0.0)[1]
    assert there.parse(question, CLIENT, 0.0) == (None, None)
    assert asker.parse(answer, NODE, 0.0)[0] is not None
    assert asker.parse(answer, NODE, 0.0) == (None, None)


def test_datagrams_may_overtake_one_another_and_none_is_heard_twice():
    asker, there = client(), node()
    said = [asker.build(DatagramType.QUESTION) for _ in range(20)]
    for number in (3, 1, 0, 19, 2, 18):
        assert there.parse(said[number], CLIENT, 0.0)[1] is not None
        assert there.parse(said[number], CLIENT, 0.0) == (None, None)


def test_what_is_very_old_is_not_believed():
    asker, there = client(), node()
    old = asker.build(DatagramType.QUESTION)
    for _ in range(Discovery.WINDOW):
        new = asker.build(DatagramType.QUESTION)
    assert there.parse(new, CLIENT, 0.0)[1] and there.parse(old, CLIENT, 0.0) == (None, None)


def test_several_drivers_of_one_process_are_heard():
    there = node()
    for _ in range(3):   # each cluster may have a driver of its own: same instance, same secret
        asker = client()
        for _ in range(3):
            assert there.parse(asker.build(DatagramType.QUESTION), CLIENT, 0.0)[1] is not None


def test_memory_is_bounded():
    there = node()
    for number in range(5000):
        there.parse(client(instance=struct.pack('>QQ', 1, number)).build(DatagramType.QUESTION),
                    CLIENT, float(number))
        there.parse(client(OTHER).build(DatagramType.QUESTION), str(ipaddress.ip_address(number)),
                    100.0 * number)
    assert len(there._seen) == len(there._told) == Discovery.REMEMBERED


@pytest.mark.parametrize('change', range(0, 128, 7))
def test_a_changed_byte_is_noticed(change):
    asker, there = client(), node()
    question = bytearray(asker.build(DatagramType.QUESTION))
    question[change] ^= 1
    heard, answer = there.parse(bytes(question), CLIENT, 0.0)
    assert heard is None and (answer is None or answer[8] == DatagramType.NOT_MINE)


@pytest.mark.parametrize('data', [b'', b'x', bytes(128), b'y' * 128, b'z' * 129, b'\xff' * 128])
def test_garbage_is_neither_heard_nor_answered(data):
    assert node().parse(data, CLIENT, 0.0) == client().parse(data, NODE, 0.0) == (None, None)


def test_an_answer_that_was_not_asked_for_is_nothing():
    asker, there = client(), node()
    answer = there.parse(client(instance=b'd' * 16).build(DatagramType.QUESTION), CLIENT, 0.0)[1]
    assert asker.parse(answer, NODE, 0.0) == (None, None)


def test_a_forged_answer_is_nothing():
    asker, liar = client(), node(OTHER)
    asker.build(DatagramType.QUESTION)
    for kind in (DatagramType.ANSWER, DatagramType.HELLO):
        assert asker.parse(liar.build(kind, CLIENT, asker._asked[-1]), NODE, 0.0) == (None, None)


def test_a_greeting_is_heard_by_clients_and_tells_no_address():
    hello = node(addresses=('127.0.0.1', '10.97.0.2')).build(DatagramType.HELLO)
    assert client().parse(hello, NODE, 0.0)[0].address == ''
    assert node(instance=b'm' * 16).parse(hello, NODE, 0.0) == (None, None)


def test_nobody_hears_itself_and_clients_do_not_answer():
    one = node()
    assert one.parse(one.build(DatagramType.QUESTION), NODE, 0.0) == (None, None)
    assert (client().parse(client(instance=b'd' * 16).build(DatagramType.QUESTION), CLIENT, 0.0)
            == (None, None))


def test_another_secret_is_answered_not_mine_once_a_minute():
    asker, there = client(OTHER), node()
    heard, answer = there.parse(asker.build(DatagramType.QUESTION), CLIENT, 1000.0)
    assert heard is None and len(answer) == DATAGRAM
    assert asker.parse(answer, NODE, 1000.0)[0].kind == DatagramType.NOT_MINE
    assert there.parse(asker.build(DatagramType.QUESTION), CLIENT, 1059.0) == (None, None)
    assert there.parse(asker.build(DatagramType.QUESTION), '10.97.0.9', 1059.0)[1] is not None
    assert there.parse(asker.build(DatagramType.QUESTION), CLIENT, 1060.0)[1] is not None


def test_not_mine_that_was_not_asked_for_is_nothing():
    asker, there = client(OTHER), node()
    answer = there.parse(client(OTHER, b'd' * 16).build(DatagramType.QUESTION), CLIENT, 0.0)[1]
    assert asker.parse(answer, NODE, 0.0) == (None, None)


def test_not_mine_tells_nothing_that_could_be_guessed_from():
    """Two of them to the same question have different signatures: no key of ours is in them."""
    question = client(OTHER).build(DatagramType.QUESTION)
    one, two = (node().parse(question, CLIENT, 0.0)[1] for _ in range(2))
    assert one[-32:] != two[-32:]


def test_so_many_answers_a_second_and_no_more():
    there = node()
    answers = sum(there.parse(client().build(DatagramType.QUESTION), CLIENT, 7.5)[1] is not None
                  for _ in range(1000))
    assert answers == Discovery.LIMIT
    assert there.parse(client().build(DatagramType.QUESTION), CLIENT, 8.0)[1] is not None


def test_strangers_do_not_get_more_answers():
    there = node()
    said = [there.parse(client(OTHER).build(DatagramType.QUESTION),
                        str(ipaddress.ip_address(number)), 7.5)[1] for number in range(1000)]
    assert sum(answer is not None for answer in said) == Discovery.STRANGERS


@pytest.mark.parametrize('addresses, asker, told', [
    (('10.97.0.2',), '10.97.0.1', '10.97.0.2'),
    (('192.0.2.7',), '10.97.0.1', '192.0.2.7'),                        # --ext-host
    (('10.97.0.2', '10.98.0.2'), '10.98.0.1', '10.98.0.2'),
    (('127.0.0.1', '10.97.0.2'), '10.97.0.1', '10.97.0.2'),
    (('127.0.0.1', '10.97.0.2'), '127.0.0.1', '127.0.0.1'),
    (('10.97.0.2', 'fd97::2'), 'fd97::1', 'fd97::2'),
    (('fd97::2',), 'fe80::1%eth0', 'fd97::2'),
])
def test_the_address_that_is_told_fits_who_asks(addresses, asker, told):
    assert nearest_address(addresses, asker) == told
    ours, there = client(), node(addresses=addresses)
    assert ours.parse(there.parse(ours.build(DatagramType.QUESTION), asker, 0.0)[1], NODE,
                      0.0)[0].address == told


@pytest.mark.parametrize('addresses, asker', [
    (('127.0.0.1',), '10.97.0.1'), (('127.0.1.1', '::1'), '10.97.0.1'), (('::1',), 'fd97::1'),
    (('fd97::2',), '10.97.0.1'), (('10.97.0.2',), 'fd97::1')])
def test_who_could_not_reach_the_node_gets_no_answer(addresses, asker):
    assert (node(addresses=addresses).parse(client().build(DatagramType.QUESTION), asker, 0.0)
            == (None, None))


# What is meant by an element of `nodes`; dispy 4 took .246 for 192.168.2.24
@pytest.mark.parametrize('meant, words, fits', [
    ('192.168.2.24', ['192.168.2.24'], True), ('192.168.2.24', ['192.168.2.246'], False),
    ('192.168.2.24', ['192.168.2.2'], False),
    ('192.168.2.24', ['192a168.2.24'], False), ('192.168.2.*', ['192.168.2.246'], True),
    ('192.168.2.*', ['192.168.20.4'], False),
    ('192.168.2.2*', ['192.168.2.24'], True), ('192.168.2.2*', ['192.168.2.124'], False),
    ('192.168.*.1', ['192.168.7.1'], True),
    ('192.168.*.1', ['192.168.7.11'], False), ('*.2.24', ['192.168.2.24'], True),
    ('*', ['10.0.0.1'], True), ('*', ['fd97::1'], True), ('*', [''], False),
    ('fd97::2', ['fd97:0:0:0:0:0:0:2'], True), ('FD97::2', ['fd97::2'], True),
    ('fd97::2', ['fd97::24'], False), ('fd97::*', ['fd97::24'], True),
    ('fd97::*', ['fd98::24'], False), ('fe80::2%eth0', ['fe80::2'], True),
    ('fd97::2', ['10.97.0.2'], False),
    ('lab1', ['LAB1'], True), ('lab1', ['lab1.'], True), ('lab1', ['lab12'], False),
    ('lab1', ['lab1.example'], False), ('lab*', ['lab12'], True),
    ('lab*', ['slab1'], False), ('*.example', ['lab1.example'], True),
    ('*.example', ['lab1-example'], False), ('l[a]b', ['lab'], False),
    ('lab?', ['lab1'], False), ('lab1', ['10.0.0.1', '', 'lab1'], True),
    ('lab1', ['10.0.0.1', ''], False), ('a*c', ['a\nc'], False),
])
def test_what_is_meant(meant, words, fits):
    assert dispy.NodeSpec(meant, 9701).fits(*words) is fits


@pytest.mark.parametrize('meant, address, may', [
    ('192.168.2.*', '192.168.2.4', True), ('192.168.2.*', '192.168.20.4', False),
    ('fd97::*', '10.0.0.1', False), ('*', '10.0.0.1', True),
    ('lab*', '10.0.0.1', True), ('ace*', '10.0.0.1', True), ('b*', 'fd97::1', True),
    ('1*', '21.0.0.1', False)])
def test_where_a_node_may_be_that_is_meant(meant, address, may):
    assert dispy.NodeSpec(meant, 9701).may_fit(address) is may


def test_places():
    assert [format_address(*pair)
            for pair in (('fd97::2', 9701), ('10.97.0.2', 9701), ('lab1', 1), ('', 9702))] == [
                '[fd97::2]:9701', '10.97.0.2:9701', 'lab1:1', '*:9702']
