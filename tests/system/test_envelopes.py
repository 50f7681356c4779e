"""What opening a message costs is bounded by its bytes, before it is opened."""

import os
import pickle
import random
import subprocess
import sys
import time

import pytest

import dispynode
from conftest import ROOT
from dispy import OF_NODES, NodeSpec, JobsAssigned, matches
from dispynode import (
    BOUNDS, FrameDecoder, FrameEncoder, ITEMS_MOST, MESSAGES, OF_CLIENTS, PeerError, Ready,
    NodeHello, decode, encode, is_shallow, open_envelope, open_regular)


def colliding(count):
    return b''.join(b'\x8a\x0a' + ((n + 1) * (2 ** 61 - 1)).to_bytes(10, 'little') + b'N'
                    for n in range(count))


REFUSED = {
    'an index of the memo': b'\x80\x05Nr\xff\xff\xff\x0f.', 'the same, short': b'\x80\x05Nq\xff.',
    'as text': b'\x80\x05Np9999\n.',
    'a name': pickle.dumps(len), 'a global': b'cos\nsystem\n.',
    'a very long number': b'\x80\x05\x8b\x00\x10\x00\x00' + bytes(4096) + b'.',
    'a number as text': b'I' + b'9' * 5000 + b'\n.',
    'a large dict': pickle.dumps({str(n): n for n in range(ITEMS_MOST + 1)}),
    'a dict filled twice': b'\x80\x05}\x94(' + colliding(200) + b'u(' + colliding(200) + b'u.',
    'a dict filled by way of the memo': b'\x80\x05(}\x94(' + colliding(200) + b'uh\x00('
    + colliding(200) + b'ut.',
    'a set': pickle.dumps({1, 2}), 'a copy of the top': b'\x80\x05N2t.',
    'behind its end': pickle.dumps(5) + b'N', 'nothing': b'', 'half': pickle.dumps('abcdef')[:-4],
    'a promise': b'\x80\x05\x8e' + b'\xff' * 8 + b'.',
    'many dicts': b'\x80\x05(' + b'}' * (BOUNDS.dicts + 1) + b't.',
    'many operations': b'\x80\x05(' + b'N' * BOUNDS.operations + b't.'}


@pytest.mark.parametrize('data', REFUSED.values(), ids=list(REFUSED))
def test_refused(data):
    with pytest.raises(PeerError):
        open_envelope(data)


def values(rng, depth=0):
    kinds = [lambda: rng.choice([None, True, False, 0, 255, 256, 65536, -1, 1 << 40, 1 << 900, 2.5,
                                 '', 'x', 'y' * 300, b'', b'z' * 300, 'ä' * 70000, b'w' * 70000])]
    if depth < 4:
        kinds += [lambda: tuple(values(rng, depth + 1) for _ in range(rng.randrange(6))),
                  lambda: [values(rng, depth + 1) for _ in range(rng.randrange(6))],
                  lambda: {str(n): values(rng, depth + 1) for n in range(rng.randrange(6))}]
    return rng.choice(kinds)()


def test_all_that_pickle_makes_of_plain_values_is_accepted():
    rng = random.Random(1)
    shared = {'cpus': 1, 'timeout': 2.5}
    for _ in range(3000):
        value = (values(rng), [shared, shared], shared)
        assert open_envelope(pickle.dumps(value, 5)) == value
    for value in (list(range(100000)), [(n, b'x' * 20, shared) for n in range(20000)],
                  {str(n): n for n in range(ITEMS_MOST)}, bytearray(b'x' * 50)):
        assert open_envelope(pickle.dumps(value, 5)) == value


def test_the_limits_hold_what_is_sent():
    row = (1 << 40, b'x' * 20, {'cpus': 1, 'timeout': 2.5, 'memory': 5, 'priority': 3, 'retries': 1,
                                'node': ('127.0.0.1', 9701)})
    for message in (dispynode.Jobs('c', [row] * dispynode.ROWS_MOST),
                    dispynode.Ready('c', list(range(1 << 40, (1 << 40) + 1000000))),
                    dispynode.Results('c', [(1 << 40, 1, 1.5, 2.5, b'x' * 20, b'', b'')]
                                      * dispynode.ROWS_MOST)):
        op, encoding, pieces = encode(message)
        assert decode(op, encoding, b''.join(map(bytes, pieces))) == message


def test_random_operations_neither_crash_nor_cost(tmp_path):
    """100,000 random sequences of operations, in a process that may have 200 MB more: whatever is
    let through opens cheaply."""
    script = tmp_path / 'fuzz.py'
    script.write_text('''
import random, resource, sys, time
sys.path.insert(0, %r)
import dispynode
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
rng = random.Random(5)
operations = [bytes([op]) for op in range(256)]
plain = [bytes([op]) for op in range(256) if dispynode.PlainReader.STEPS[op]
         or dispynode.PlainReader.LENGTHS[op]] + list(b'(teus}hj.' [n:n+1] for n in range(9))
worst, opened = 0.0, 0
for _ in range(100000):
    data = b'\\x80\\x05' + b''.join(rng.choice(plain if rng.random() < 0.97 else operations)
                                    + (bytes(rng.randrange(4)) if rng.random() < 0.5 else b'')
                                    for _ in range(rng.randrange(40))) + b'.'
    began = time.perf_counter()
    try:
        dispynode.open_envelope(data)
        opened += 1
    except dispynode.PeerError:
        pass
    worst = max(worst, time.perf_counter() - began)
print(opened)
''' % ROOT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def memory_of_opening(data):
    """Address space, in MB, that a process needs to open this beyond what it has, found by giving
    it that much."""
    code = ('import resource, sys; sys.path.insert(0, %r); import dispynode; '
            'data = sys.stdin.buffer.read(); '
            'used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize(); '
            'resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20),) * 2)\n'
            'try: dispynode.open_envelope(data)\n'
            'except dispynode.PeerError as exc: print("refused", exc)\n'
            'else: print("opened")' % ROOT)
    return subprocess.run([sys.executable, '-c', code], input=data, capture_output=True, timeout=60)


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='there is no /proc')
@pytest.mark.parametrize('part', [b']', b'}', b')\x85', b'\x8c\x02ab', b'C\x02ab', b'M\xff\xff',
                                  b']\x94', b'(', b'\x96' + bytes(8)])
def test_dense_envelopes_cost_little(part):
    size = BOUNDS.size - 10
    done = memory_of_opening(b'\x80\x05(' + part * (size // len(part)) + b't.')
    assert (done.returncode == 0
            and b'MemoryError' not in done.stdout + done.stderr), done.stdout + done.stderr


def test_what_is_deep_is_not_loosely_passed_on():
    deep = ()
    for _ in range(700):   # Python itself allows 1000 less those of the callers
        deep = (deep,)
    assert not is_shallow(deep) and is_shallow((1, [2, {'a': (3, [])}]))
    for message in (NodeHello('n', 1, {'platform': deep}), JobsAssigned('c', (deep, 1, 2), [])):
        op, _, pieces = encode(message)
        with pytest.raises(PeerError):
            decode(op, 0, pieces[0])


@pytest.mark.parametrize('name', ['x' * 65, '../a', 'a b', 'a/b', '\ud800', 'é'])
def test_names_of_computations(name):
    op, _, pieces = encode(dispynode.Done(name))
    with pytest.raises(PeerError):
        decode(op, 0, pieces[0])


def test_a_side_takes_what_is_for_it_before_it_has_read_it():
    """A node is not sent the lists that nodes send; the frame is refused by its header."""
    assert MESSAGES.keys() == OF_CLIENTS | OF_NODES
    frame = b''.join(map(bytes, FrameEncoder(b'k' * 32).seal(Ready('c', list(range(1000))))))
    opener = FrameDecoder(b'k' * 32, OF_CLIENTS)
    with pytest.raises(PeerError, match='Ready may not come here'):
        opener.measure(frame[:32])
    assert FrameDecoder(b'k' * 32, OF_NODES).measure(frame[:32]) == len(frame) - 32


# -- patterns and files ----------------------------------------------------------------------------

@pytest.mark.parametrize('pattern, word, fits', [
    ('*', '', True), ('*', 'abc', True), ('a*', 'abc', True), ('a*', 'ba', False),
    ('*c', 'abc', True), ('a*c', 'ac', True), ('a*c', 'a', False),
    ('a*a', 'a', False), ('a*b*c', 'axxbyyc', True), ('a*b*c', 'axxcyyc', False),
    ('ab*ab', 'aba', False), ('*ab*ab*', 'abab', True),
    ('*ab*ab*', 'aba', False), ('10.0.*', '10.0.3.4', True), ('abc', 'abc', True),
    ('abc', 'abcd', False)])
def test_patterns(pattern, word, fits):
    assert matches(pattern, word) is fits


def test_a_pattern_that_a_regular_expression_would_try_for_hours():
    began = time.perf_counter()
    assert not NodeSpec('*' * 30 + 'a' + '*a' * 5000, 9701).fits('a' * 4000 + 'b')
    assert time.perf_counter() - began < 5   # hours, otherwise


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / 'fifo')
    for path in (tmp_path / 'fifo', tmp_path, '/dev/null'):
        with pytest.raises((ValueError, OSError)):
            open_regular(str(path))
    (tmp_path / 'file').write_text('x')
    with open_regular(str(tmp_path / 'file')) as file:
        assert file.read() == b'x'
