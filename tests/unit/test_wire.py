"""Messages, sealed payloads, frames and records: what stands on the wire, and what is refused."""

import collections
import hashlib
import hmac
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc

import pytest

import dispynode
from dispy import NodeChanged, JobsAssigned
from dispynode import (
    Ack, out_of_band, Bye, Call, Cancel, Compute, decode, Done, encode, FilePiece, FileStored,
    FrameDecoder, FrameEncoder, HASHED_LATE, HEAD_TAG, KnownAttempts, ReceiveBuffer, ClientHello,
    Jobs,
    RecordType, Limit, MESSAGES, Need, CpusChanged, open_envelope, OPS, OUT_OF_BAND, Output,
    pack_record, PeerError, Pulse, Query, Ready, ReturnJobs, Reclaim, RecordBuffer, Refused, Report,
    Results, Return, Part, JobsReturned, Notice, dumps, Shutdown, Started, TAIL_TAG, loads,
    NodeHello, Wrong)

KEY = bytes(range(32))
LARGE = random.Random(1).getrandbits(8 * (OUT_OF_BAND + 7)).to_bytes(OUT_OF_BAND + 7, 'big')
ROW = ('a/b', 1, b'd', 0o600)
EXAMPLES = [
    ClientHello('me', 2.0), ClientHello('me', 2), ClientHello('me', 2.0, ('host', 7, 9702)),
    Compute('c1', {'name': 'f', 'kind': 'function', 'code': b'code',
                   'files': [('a', 1, b'd', 0o600)], 'cleanup': True,
                   'dest_path': '', 'max_jobs': 0, 'python': (3, 8, 1), 'support': {'m.py': b''},
                   'program': '', 'live': False, 'logs': -1, 'cpus': 0, 'setup_args': b'',
                   'modules': [('modules/a.py', 1, b'd', 0o600)], 'portable': True,
                   'sys_path': ['/a'], 'argv': ['a']}),
    FilePiece('c1', 1, 0, ROW, 0, out_of_band(b'small')),
    FilePiece('c1', 2, 3, ROW, 1 << 20, out_of_band(LARGE)), FilePiece('c1', 1, 0, ROW, 0, b''),
    Jobs('c1', [(1, out_of_band(b'x'), None), (2, out_of_band(LARGE), {'timeout': 3.5}),
                (3, out_of_band((b'head', LARGE, b'tail')), None)]),
    Jobs('c1', []), Cancel('c1', [1, 2, 1 << 40]), ReturnJobs('c1', [5]), Ack('c1', []), Done('c1'),
    NodeHello('node', 4, {'python': (3, 8)}), Refused('', 'full', 'caf\u00e9'),
    Refused('c1', 'busy', 'it serves me', ('host', 7, 0, True)),
    Need('c1', [(1, 0, ROW), (2, 7, ROW)]), Ready('c1', [7]),
    Results('c1', [(1, 1, 0.5, 1.5, out_of_band(LARGE), b'out', b'err'),
                   (2, 3, 0.0, 0.0, b'\0\0\0\0', b'', b'')]),
    JobsReturned('c1', [9]), CpusChanged(3), FilePiece('c1', 4, 5, ROW, 0, out_of_band(LARGE)),
    FileStored('c1', 4, 5, 'a', 'no'), Shutdown('c1'), Limit('c1', 2),
    FilePiece('c1', 3, 0, ROW, 0, out_of_band(LARGE)), FileStored('c1', 3, 0, 'a', ''), Query('c1'),
    Reclaim('c1'), KnownAttempts('c1', [1]), Report('c1', [(1, 0.5)], [2], {'cpu': 1.0}),
    Started('c1', [(5, 0.02)]), Output('c1', 5, 1, 0, b'text'),
    JobsAssigned('c1', ('10.0.0.1', 9701, 'host'), [1]), JobsAssigned('c1', (), [1]),
    NodeChanged('c1', 2, tuple('0123456789')),
    Part('c1', (5, dispynode.HOLLOW, None), 8 << 30, 0, out_of_band((LARGE, b'small'))),
    Part('c1', (), 8 << 30, 1 << 32, (out_of_band(LARGE),)),
    Part('c1', (5, 1, 0.5, 1.5, dispynode.HOLLOW, b'out', b''), 5, 0, b'small'),
    Part('c1', (), 0, 0, b''),
    Notice('c1', 'text'), Call('c1', 7, 'nodes', (1, 'x')),
    Return('c1', 7, ('ValueError', 'text'), None), Pulse(), Bye('enough'), Wrong('text', 7),
]


def flat(value):
    """The same value with bytes for everything that holds bytes, to be compared."""
    if isinstance(value, (bytearray, memoryview, pickle.PickleBuffer)):
        return bytes(value)
    if isinstance(value, (list, tuple)):
        return [flat(item) for item in value]
    return value


def frame(message, sealer=None):
    return b''.join((sealer or FrameEncoder(KEY)).seal(message))


def feed(opener, data, size=1 << 16):
    """Give bytes to an opener as a socket would; the messages that come out."""
    messages = []
    view = memoryview(data)
    while view:
        room = opener.get_buffer()
        count = min(len(room), len(view), size)
        room[:count] = view[:count]
        view = view[count:]
        messages += [opener.open(head, body) for head, body in opener.buffer_updated(count)]
    return messages


@pytest.fixture
def nothing_is_decoded(monkeypatch):
    """Makes any decoding an error that is no PeerError."""
    def never(*_args, **_named):
        raise AssertionError('something was decoded')
    monkeypatch.setattr(dispynode, 'decode', never)
    monkeypatch.setattr(dispynode, 'open_envelope', never)
    monkeypatch.setattr(pickle, 'loads', never)


# -- messages --------------------------------------------------------------------------------------

def test_every_message_has_an_example():
    assert {type(message) for message in EXAMPLES} == {message for message, _ in MESSAGES.values()}


@pytest.mark.parametrize('message', EXAMPLES, ids=lambda message: type(message).__name__)
def test_messages_come_back_as_they_were(message):
    op, encoding, pieces = encode(message)
    back = decode(op, encoding, b''.join(pieces))
    assert type(back) is type(message)
    assert flat(back) == flat(message)


@pytest.mark.parametrize('message', EXAMPLES, ids=lambda message: type(message).__name__)
def test_messages_pass_in_frames(message):
    [back] = feed(FrameDecoder(KEY), frame(message))
    assert flat(back) == flat(message)


def test_large_bytes_are_not_copied_into_the_envelope():
    _, encoding, pieces = encode(FilePiece('c', 1, 0, ROW, 0, out_of_band(LARGE)))
    assert encoding == 1
    assert len(pieces[0]) < 200
    assert pieces[1].obj is LARGE


def test_a_payload_in_pieces_stays_a_tuple():
    op, encoding, pieces = encode(Jobs('c', [(1, out_of_band((LARGE, b'small')), None)]))
    payload = decode(op, encoding, b''.join(pieces)).rows[0][1]
    assert type(payload) is tuple and [len(piece) for piece in payload] == [len(LARGE), 5]


def test_decoded_bytes_are_no_copy():
    op, encoding, pieces = encode(FilePiece('c', 1, 0, ROW, 0, out_of_band(LARGE)))
    received = b''.join(pieces)
    assert decode(op, encoding, received).data.obj is received


@pytest.mark.parametrize('op', [0, 3, 9, 10, 15, 32, 40, 42, 46, 64, 73, 255])
def test_unknown_messages_are_refused(op):
    with pytest.raises(PeerError, match='unknown'):
        decode(op, 0, pickle.dumps((), 5))


@pytest.mark.parametrize('encoding', [2, 255])
def test_unknown_encodings_are_refused(encoding):
    with pytest.raises(PeerError, match='encoding'):
        decode(OPS[Pulse], encoding, pickle.dumps((), 5))


class Named:
    """A class that an envelope has no business to name."""


@pytest.mark.parametrize('value', [Named(), Named, subprocess.Popen, os.system, range(3),
                                   {1, 2}.union, Exception('x'), 1j],
                         ids=lambda value: repr(value)[:20])
def test_an_envelope_that_names_something_is_refused(value):
    with pytest.raises(PeerError, match='names'):
        open_envelope(pickle.dumps((value,), 5))


@pytest.mark.parametrize('protocol', range(6))
def test_a_named_module_is_never_imported(protocol):
    data = pickle.dumps(Named, protocol).replace(
        __name__.encode(), b'antigravity'.ljust(len(__name__), b'_')[:len(__name__)])
    with pytest.raises(PeerError):
        open_envelope(data)
    with pytest.raises(PeerError):
        open_envelope(b'cantigravity\nfly\n.')
    assert 'antigravity' not in sys.modules


@pytest.mark.parametrize('data', [
    b'', b'.', b'\x80', b'\x80\x05', b'\x80\xff.', b'(lp0\n', b'}R.', b'Pmodule\n.', b'\x80\x05Q.',
    b'\x82\x01.', b'\x97.', b'\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.', b'h\x05.', b'\x80\x05)b.',
    b'\x80\x05(io\x8c\x02os.', b'\x80\x05))R.',
], ids=repr)
def test_damaged_envelopes_are_refused(data):
    with pytest.raises(PeerError):
        open_envelope(data)


def wrong(message, *fields):
    return pytest.param(message, fields, id='%s-%.40r' % (message.__name__, fields))


@pytest.mark.parametrize('message, fields', [
    wrong(ClientHello), wrong(ClientHello, 'me'), wrong(ClientHello, 'me', '2'),
    wrong(ClientHello, b'me', 2.0),
    wrong(ClientHello, 'me', 2.0, 3), wrong(ClientHello, 'me', 2.0, (), ()),
    wrong(Refused, 'c', ''), wrong(Compute, 'c', []), wrong(Compute, 'c', None),
    wrong(FilePiece, 'c', 1, 0, ROW, '0', b''),
    wrong(Jobs, 'c', ()), wrong(Jobs, 'c', {}), wrong(Jobs, 'c', [1]), wrong(Jobs, 'c', [()]),
    wrong(Jobs, 'c', [(1, b'')]),
    wrong(Jobs, 'c', [[1, b'', None]]), wrong(Jobs, 'c', [('1', b'', None)]),
    wrong(Jobs, 'c', [(True, b'', None)]),
    wrong(Results, 'c', [(1, 1, 0.0, 0.0, b'', b'')]),
    wrong(Results, 'c', [(1.0, 1, 0.0, 0.0, b'', b'', b'')]),
    wrong(Cancel, 'c', (1,)), wrong(ReturnJobs, 'c', 1.0), wrong(ReturnJobs, 'c', [-1]),
    wrong(Started, 'c', [(1,)]), wrong(Started, 'c', [(1, float('nan'))]), wrong(Ack, 1, []),
    wrong(Done, None), wrong(Done, 'c', 'd'),
    wrong(NodeHello, 'n', '4', {}), wrong(Ready, 'c', {}), wrong(Bye, None), wrong(Pulse, 1),
])
def test_wrong_fields_and_rows_are_refused(message, fields):
    with pytest.raises(PeerError):
        decode(OPS[message], 0, pickle.dumps(tuple(fields), 5))


# Guards against: what is inside rows and lists is believed; a TypeError then ends the node's thread
# instead of one link.
@pytest.mark.parametrize('message, fields', [
    wrong(Jobs, 'c', [(1, 5, None)]), wrong(Jobs, 'c', [(1, 'text', None)]),
    wrong(Jobs, 'c', [(1, None, None)]),
    wrong(Jobs, 'c', [(1, (b'', 5), None)]), wrong(Jobs, 'c', [(1, b'', 5)]),
    wrong(Jobs, 'c', [(-1, b'', None)]),
    wrong(Jobs, 'c', [(1 << 64, b'', None)]),
    wrong(Results, 'c', [(1, 'x', 0.0, 0.0, b'', b'', b'')]),
    wrong(Results, 'c', [(1, 1, None, 0.0, b'', b'', b'')]),
    wrong(Results, 'c', [(1, 1, 0.0, 0.0, b'', 'out', b'')]),
    wrong(FilePiece, 'c', 1, 0, ROW, 0, 5), wrong(FilePiece, 'c', 1, 0, ROW, 0, 'text'),
    wrong(FilePiece, 'c', 9, 0, ROW, 0, b''),
    wrong(FilePiece, 'c', 1, -1, ROW, 0, b''), wrong(FilePiece, 'c', 1, 0, ('f',), 0, b''),
    wrong(FileStored, 'c', 0, 0, 'f', ''), wrong(Cancel, 'c', [[]]), wrong(Ack, 'c', [{}]),
    wrong(Need, 'c', [1]), wrong(Need, 'c', [(1, 0)]), wrong(Need, 'c', [(9, 0, ROW)]),
    wrong(Need, 'c', [([], 0, ROW)]), wrong(Ready, 'c', [[]]), wrong(JobsReturned, 'c', [None]),
    wrong(ClientHello, 'me', float('nan')), wrong(ClientHello, 'me', 2.0, ('h', 7)),
    wrong(ClientHello, 'me', 2.0, (b'h', 7, 0)), wrong(ClientHello, 'me', 2.0, ('h', '7', 0)),
    wrong(Refused, 'c', 'busy', '', (True,)), wrong(Refused, 'c', 'busy', '', ('h', 7, 0)),
    wrong(Refused, 'c', 'busy', '', ('h', 7, 0, 1)),
    wrong(Refused, 'c', 'busy', '', (1, 7, 0, True)),
])
def test_wrong_values_inside_rows_and_lists_are_refused(message, fields):
    with pytest.raises(PeerError):
        decode(OPS[message], 0, pickle.dumps(tuple(fields), 5))


@pytest.mark.parametrize('fields', [None, [], 'me', {'name': 1}, ['me', 2.0]], ids=repr)
def test_an_envelope_that_is_no_tuple_is_refused(fields):
    with pytest.raises(PeerError):
        decode(OPS[ClientHello], 0, pickle.dumps(fields, 5))


@pytest.mark.parametrize('payload', [
    b'', b'\0' * 7, struct.pack('>II', 1, 0), struct.pack('>II', 0xffffffff, 0),
    struct.pack('>II', 1 << 20, 5), struct.pack('>IIQ', 1, 0, 1 << 63),
    struct.pack('>IIQ', 1, 0, 5) + b'1234', struct.pack('>IIQ', 1, 0, 4) + b'12345',
    struct.pack('>II', 0, 5) + b'1234', struct.pack('>IIQQ', 2, 0, (1 << 64) - 1, 1),
], ids=lambda payload: payload.hex())
def test_an_index_that_does_not_add_up_is_refused(payload):
    with pytest.raises(PeerError):
        decode(OPS[FilePiece], 1, payload)


# -- frames ----------------------------------------------------------------------------------------

GOLDEN = [
    (Pulse(),
     '0000000441000000000000000000000090b995235736c9d505c242bc9786943d8005292ecf5187257c0c1bd1198b'
     'ff900991e78946d49601f730b66758e49fc1d14827fd'),
    (Bye('enough'),
     '00000017420000000000000000000000a037116891c3f570c77a3e1f37cbe2ab8005950c000000000000008c0665'
     '6e6f7567689485942e0fea6d3ee20dc72fe0affb75db203427933aae3daa2717c0581622d1bdc02490'),
    (Cancel('c1', [1, 2]),
     '0000001b050000000000000000000000b81eef5491b3753f31fc71ed8fe39b9b80059510000000000000008c0263'
     '31945d94284b014b026586942e9f41268122ca1a7a5e16142fbb2cba2509d980bcd1c13e77b39a14a56a98b4a2'),
    (FilePiece('c1', 1, 0, ROW, 0, pickle.PickleBuffer(b'0123')),
     '000000424601000000000000000000000156894dc733a4eadbadb3efecc6cdb1000000010000002e000000000000'
     '00048005952300000000000000288c026331944b014b00288c03612f62944b01430164944d800174944b00979874'
     '942e303132338556203c9cfa5f19bfd5f6d17aab4b50192ff2e78bfd08fbda184ba043f45aca'),
]


def test_frames_are_these_bytes():
    sealer = FrameEncoder(KEY)
    assert [frame(message, sealer).hex() for message, _ in GOLDEN] == [golden
                                                                       for _, golden in GOLDEN]


def test_the_recorded_bytes_are_these_messages():
    messages = feed(FrameDecoder(KEY), b''.join(bytes.fromhex(golden) for _, golden in GOLDEN))
    assert flat(messages) == flat([message for message, _ in GOLDEN])


@pytest.mark.parametrize('size', [0, 1, 32, 64])
def test_codes_of_frames_are_hmac(size):
    key = bytes(range(size))
    for parts in ((), (b'one', ), (b'one', memoryview(b'two'), bytes(1000))):
        code = hmac.new(key, b''.join(parts), 'sha256').digest()
        assert dispynode.FrameMac(key).of(*parts) == code
    with pytest.raises(ValueError):
        dispynode.FrameMac(bytes(65))


def test_a_frame_is_header_tag_payload_tag():
    data = frame(Bye('x'))
    payload = pickle.dumps(('x',), 5)
    header = struct.pack('>IBBHQ', len(payload), OPS[Bye], 0, 0, 0)
    assert data == (
        header
        + hmac.new(KEY, struct.pack('>QB', 0, 0) + header, hashlib.sha256).digest()[:HEAD_TAG]
        + payload
        + hmac.new(KEY, struct.pack('>QB', 0, 1) + header + payload, hashlib.sha256).digest())


def test_every_flipped_bit_is_refused(nothing_is_decoded):
    data = frame(Bye('x'))
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PeerError):
            feed(FrameDecoder(KEY), changed)


def test_frames_without_tags_of_payloads():
    """Under TLS. Their headers have them, with their numbers."""
    messages = [Bye('x'), Pulse(), Jobs('c', [(5, pickle.PickleBuffer(LARGE), None)]), Bye('y')]
    sealer = FrameEncoder(KEY, False)
    frames = [b''.join(bytes(piece) for piece in sealer.seal(message)) for message in messages]
    found = feed(FrameDecoder(KEY, tags_payloads=False), b''.join(frames))
    assert [flat(message) for message in found] == [flat(message) for message in messages]
    assert len(frames[0]) == len(frame(Bye('x'))) - TAIL_TAG
    for bit in range(8 * 32):
        changed = bytearray(frames[0])
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PeerError, match='header'):
            feed(FrameDecoder(KEY, tags_payloads=False), changed)
    with pytest.raises(PeerError, match='header'):
        feed(FrameDecoder(KEY, tags_payloads=False), frames[1])


def test_a_truncated_frame_gives_nothing(nothing_is_decoded):
    data = frame(Bye('x'))
    for length in range(len(data)):
        assert feed(FrameDecoder(KEY), data[:length]) == []


def test_a_frame_without_its_middle_is_refused(nothing_is_decoded):
    first, second = frame(Bye('x')), frame(Bye('yy'))
    for length in range(33, len(first)):
        with pytest.raises(PeerError):
            feed(FrameDecoder(KEY), first[:length] + second)


def authentic_head(size, op, key=KEY):
    """A header with the tag of somebody who knows the key."""
    header = struct.pack('>IBBHQ', size, op, 0, 0, 0)
    return header + hmac.new(key, struct.pack('>QB', 0, 0) + header, 'sha256').digest()[:HEAD_TAG]


@pytest.mark.parametrize('op', sorted(MESSAGES) + [99])
def test_a_length_over_the_limit_is_refused_at_its_header(op, nothing_is_decoded):
    limit = MESSAGES[op][1] if op in MESSAGES else dispynode.MAX_CONTROL
    assert feed(FrameDecoder(KEY), authentic_head(limit, op)) == []
    with pytest.raises(PeerError, match='over the limit'):
        feed(FrameDecoder(KEY), authentic_head(limit + 1, op))


def test_a_length_is_not_believed_without_its_tag(nothing_is_decoded):
    with pytest.raises(PeerError, match='not authentic'):
        feed(FrameDecoder(KEY), authentic_head(1 << 31, OPS[Jobs], bytes(32)))


def test_too_large_a_message_is_not_sent_and_not_counted():
    sealer = FrameEncoder(KEY)
    with pytest.raises(ValueError, match='over the limit'):
        sealer.seal(Done('c' * dispynode.MAX_CONTROL))
    assert feed(FrameDecoder(KEY), frame(Pulse(), sealer)) == [Pulse()]


def test_an_unknown_message_with_good_tags_is_refused():
    payload = pickle.dumps((), 5)
    head = authentic_head(len(payload), 99)
    tag = hmac.new(KEY, struct.pack('>QB', 0, 1) + head[:16] + payload, 'sha256').digest()
    with pytest.raises(PeerError, match='unknown'):
        feed(FrameDecoder(KEY), head + payload + tag)


def test_a_replayed_frame_is_refused():
    data = frame(Bye('x'))
    opener = FrameDecoder(KEY)
    assert feed(opener, data) == [Bye('x')]
    with pytest.raises(PeerError):
        feed(opener, data)


def test_frames_in_another_order_are_refused(nothing_is_decoded):
    sealer = FrameEncoder(KEY)
    first, second = frame(Bye('1'), sealer), frame(Bye('2'), sealer)
    with pytest.raises(PeerError):
        feed(FrameDecoder(KEY), second + first)


def test_a_dropped_frame_is_noticed():
    sealer = FrameEncoder(KEY)
    first, _, third = [frame(Bye(text), sealer) for text in '123']
    opener = FrameDecoder(KEY)
    assert feed(opener, first) == [Bye('1')]
    with pytest.raises(PeerError):
        feed(opener, third)


def test_a_reflected_frame_is_refused(nothing_is_decoded):
    own, others = KEY, KEY[::-1]
    with pytest.raises(PeerError):
        feed(FrameDecoder(others), frame(Bye('x'), FrameEncoder(own)))


def test_payloads_of_equal_headers_cannot_be_exchanged(nothing_is_decoded):
    one, two = frame(Bye('1')), frame(Bye('2'))
    with pytest.raises(PeerError):
        feed(FrameDecoder(KEY), one[:-TAIL_TAG] + two[-TAIL_TAG:])


def mutate(rng, data, ends):
    """A changed copy: flips, inserts, deletes, truncation, or frames of the recording at another
    place."""
    data = bytearray(data)
    kind = rng.choice(('flip', 'flips', 'insert', 'delete', 'truncate', 'splice', 'swap', 'append'))
    at = rng.randrange(len(data))
    starts = [0, *ends[:-1]]
    if kind == 'flip':
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 'flips':
        for _ in range(rng.randrange(2, 9)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 'insert':
        data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40)))
    elif kind == 'delete':
        del data[at:at + rng.randrange(1, 40)]
    elif kind == 'truncate':
        del data[at:]
    elif kind == 'splice':
        source = rng.randrange(len(ends))
        data[at:at + rng.choice((0, 33, 64, 90))] = data[starts[source]:ends[source]]
    elif kind == 'swap':
        place, source = rng.randrange(len(ends)), rng.randrange(len(ends))
        data[starts[place]:ends[place]] = data[starts[source]:ends[source]]
    else:
        source = rng.randrange(len(ends))
        data += data[starts[source]:ends[source]]
    return bytes(data)


def test_large_frames_are_hashed_as_they_come():
    """However they are cut, they are decoded in order with small ones between them; and not when a
    byte was changed, wherever that is."""
    sealer = FrameEncoder(KEY)
    sizes = (HASHED_LATE - 1, HASHED_LATE, 100, 5 * HASHED_LATE // 2, 0, HASHED_LATE + 1)
    messages = [Jobs('c', [(1, pickle.PickleBuffer(bytes([number]) * size), None)])
                for number, size in enumerate(sizes)]
    frames = [frame(message, sealer) for message in messages]
    stream = b''.join(frames)
    for cut in (1 << 30, 1 << 18, 100003):
        found = feed(FrameDecoder(KEY), stream, cut)
        assert flat(found) == flat(messages)
    for number in (1, 3):
        before = sum(map(len, frames[:number]))
        for place in (40, len(frames[number]) // 2, len(frames[number]) - TAIL_TAG - 1,
                      len(frames[number]) - 1):
            changed = bytearray(stream)
            changed[before + place] ^= 1
            opener = FrameDecoder(KEY)
            assert len(feed(opener, changed[:before])) == number
            with pytest.raises(PeerError, match='not authentic'):
                feed(opener, changed[before:])


def test_of_20000_changed_streams_only_whole_frames_in_order_are_decoded(monkeypatch):
    sealer = FrameEncoder(KEY)
    originals = [ClientHello('me', 2.0), Pulse(), Jobs('c', [(1, b'payload', None)]),
                 Ack('c', [1, 2]), Bye('over')]
    frames = [frame(message, sealer) for message in originals]
    stream, ends = b''.join(frames), [sum(map(len, frames[:n + 1])) for n in range(len(frames))]
    decoded, opened, loaded = [], [], []

    def counted_decode(*args):
        decoded.append(decode(*args))
        return decoded[-1]

    def counted_open(*args):
        opened.append(args)
        return open_envelope(*args)
    monkeypatch.setattr(dispynode, 'decode', counted_decode)
    monkeypatch.setattr(dispynode, 'open_envelope', counted_open)
    monkeypatch.setattr(pickle, 'loads', loaded.append)
    rng = random.Random(20000)
    refused = 0
    for _ in range(20000):
        changed = mutate(rng, stream, ends)
        whole = 0
        while whole < len(ends) and changed[:ends[whole]] == stream[:ends[whole]]:
            whole += 1
        del decoded[:], opened[:]
        opener, pieces = FrameDecoder(KEY), [changed[a:b]
                                             for a, b in zip([0, *ends], [*ends, None])]
        try:
            # Cut where the frames ended, so that what is whole comes out before what is not
            for piece in pieces:
                feed(opener, piece)
        except PeerError:
            refused += 1
        assert decoded == originals[:whole]
        assert len(opened) == whole
    assert not loaded
    # The others ended before the change could be seen, or were not changed at all
    assert refused > 15000


# -- intake ----------------------------------------------------------------------------------------

class Lengths(ReceiveBuffer):
    """Units of a u32 and that many bytes."""

    def __init__(self):
        super().__init__(4)

    def measure(self, head):
        return int.from_bytes(head, 'big')


def units_of(intake, data, sizes):
    """What comes out when `data` comes in pieces of these sizes."""
    units, at = [], 0
    while at < len(data):
        room = intake.get_buffer()
        assert len(room) > 0
        count = min(len(room), sizes(), len(data) - at)
        room[:count] = data[at:at + count]
        at += count
        units += intake.buffer_updated(count)
    return units


@pytest.mark.parametrize('seed', range(12))
def test_units_do_not_depend_on_how_the_bytes_come(seed):
    rng = random.Random(seed)
    edges = [0, 1, 3, 65535, 65536, 65537, 262139, 262140, 262144, (2 << 20) - 1, 2 << 20,
             (2 << 20) + 1, 5 << 20]
    lengths = [rng.choice((rng.randrange(50), rng.randrange(70000), rng.choice(edges)))
               for _ in range(40)]
    block = rng.getrandbits(8 * 4096).to_bytes(4096, 'big')
    bodies = [(block[n:] + block * (length // 4096 + 1))[:length]
              for n, length in enumerate(lengths)]
    stream = b''.join(len(body).to_bytes(4, 'big') + body for body in bodies)
    most = rng.choice((700, 5000, 100000, 1 << 20))
    units = units_of(Lengths(), stream, lambda: rng.randrange(1, most))
    assert ([bytes(body) == expected for (_, body), expected in zip(units, bodies)]
            == [True] * len(bodies))
    assert [int.from_bytes(head, 'big') for head, _ in units] == lengths


def test_byte_by_byte():
    stream = b''.join(len(body).to_bytes(4, 'big') + body
                      for body in (b'', b'a', b'', b'bcd' * 100))
    assert [bytes(body) for _, body in units_of(Lengths(), stream, lambda: 1)] == [b'', b'a', b'',
                                                                                   b'bcd' * 100]


def test_units_stay_as_they_are_when_more_comes():
    intake = Lengths()
    [(_, first)] = units_of(intake, b'\0\0\0\5first', lambda: 99)
    [(_, second)] = units_of(intake, b'\0\0\0\5other', lambda: 99)
    assert (bytes(first), bytes(second)) == (b'first', b'other')


def test_memory_grows_with_what_came_and_not_with_what_was_promised():
    intake = Lengths()
    tracemalloc.start()
    try:
        base = tracemalloc.get_traced_memory()[0]
        units_of(intake, (1 << 30).to_bytes(4, 'big'), lambda: 4)   # promises a GiB
        assert tracemalloc.get_traced_memory()[1] - base <= ReceiveBuffer.FIRST + 4096
        for arrived in range(1 << 20, 9 << 20, 1 << 20):
            units_of(intake, bytes(1 << 20), lambda: 1 << 18)
            assert (tracemalloc.get_traced_memory()[0] - base <= 2 * arrived + ReceiveBuffer.FIRST
                    + (2 << 20))
    finally:
        tracemalloc.stop()


def test_a_large_unit_is_received_into_its_own_place():
    intake = Lengths()
    units_of(intake, (1 << 20).to_bytes(4, 'big') + b'x', lambda: 5)
    place = intake.get_buffer().obj
    [(_, body)] = units_of(intake, bytes((1 << 20) - 1), lambda: 1 << 20)
    assert body.obj is place


# -- records ---------------------------------------------------------------------------------------

RECORDS = [
    dict(kind=RecordType.READY),
    dict(kind=RecordType.JOB, number=3, serial=1 << 63, first=b'payload'),
    dict(kind=RecordType.RESULT, number=7, serial=5, start=1.5, end=-2.25, first=b'one',
         second=b'two', third=b'three'),
    dict(kind=RecordType.JOB, number=(1 << 32) - 1, first=LARGE),
    dict(kind=RecordType.RESULT, first=b'', second=b'', third=LARGE),
    dict(kind=RecordType.WORKER_EXITED, second=bytearray(b'out'), third=memoryview(b'err')),
    dict(kind=RecordType.INIT, first=(b'a', LARGE, b'', b'b')),
]


@pytest.mark.parametrize('size', [1, 61, 40000, 1 << 20])
def test_records_come_back_as_they_were(size):
    stream = b''.join(bytes(piece) for record in RECORDS for piece in pack_record(**record))
    intake, records = RecordBuffer(), []
    view = memoryview(stream)
    while view:
        room = intake.get_buffer()
        count = min(size, len(room), len(view))
        room[:count] = view[:count]
        view = view[count:]
        records += intake.records(count)
    assert len(records) == len(RECORDS)
    for got, sent in zip(records, RECORDS):
        first = sent.get('first', b'')
        bodies = (b''.join(first) if type(first) is tuple else first, sent.get('second', b''),
                  sent.get('third', b''))
        assert [bytes(body) for body in got.bodies] == [bytes(body) for body in bodies]
        assert got[:5] == (sent['kind'], sent.get('number', 0), sent.get('serial', 0),
                           sent.get('start', 0.0), sent.get('end', 0.0))


def test_a_large_record_is_not_copied():
    assert any(piece is LARGE for piece in pack_record(RecordType.JOB, first=LARGE))


def test_a_record_has_room_for_the_largest_value():
    class Huge(bytes):
        def __len__(self):
            return dispynode.VALUE_MOST
    head = pack_record(RecordType.JOB, first=Huge(b'x'))[0]
    assert RecordBuffer().measure(bytes(head)) == dispynode.VALUE_MOST > 1 << 32


# -- sealed payloads -------------------------------------------------------------------------------

def joined(payload):
    return b''.join(bytes(piece) for piece in dispynode.pieces_of(payload))


class Matrix:
    """Like an array: it gives its memory to pickle 5 beside the pickle."""

    def __init__(self, memory):
        self.memory = memory

    def __reduce_ex__(self, protocol):
        return Matrix, (pickle.PickleBuffer(self.memory),)


class Stubborn:
    """Plain pickle cannot do it."""

    def __reduce_ex__(self, protocol):
        raise TypeError('plain pickle fails')


@pytest.mark.parametrize(
    'value', [None, True, 5, -1.5, 1j, 'caf\u00e9', '\udc80', b'', b'x', [], [1, (2, {'a': b'b'})],
              {1, 2}, frozenset((3,)), 1 << 4000, bytearray(b'z'), LARGE, [LARGE, LARGE]],
    ids=lambda value: repr(value)[:20])
def test_builtin_values_are_plain(value):
    payload, plain = dumps(value)[:2]
    assert plain
    assert loads(joined(payload)) == value


@pytest.mark.parametrize('value', [Matrix(b'1'), Matrix, range(3), ValueError('x'),
                                   [1, {'a': range(3)}], len, slice(1)],
                         ids=lambda value: repr(value)[:20])
def test_other_values_are_not_plain(value):
    try:
        payload, plain = dumps(value)[:2]
    except TypeError:    # slices cannot be pickled by the oldest Pythons
        return
    assert not plain
    assert type(loads(joined(payload))) is type(value)


def test_large_bytes_are_passed_on_and_not_copied():
    large = bytes(1 << 20)
    payload, plain = dumps({'a': large})[:2]
    assert plain and any(piece is large for piece in payload)
    assert loads(joined(payload)) == {'a': large}


def test_large_buffers_travel_beside():
    memory = bytearray(1 << 20)
    payload, plain = dumps([Matrix(memory), Matrix(b'small')])[:2]
    assert not plain
    assert [piece.obj is memory for piece in payload[1:]] == [True]   # the small one is inside
    first, second = loads(joined(payload))
    assert (first.memory, second.memory) == (memory, b'small')


def test_a_buffer_from_beside_can_be_written_to():
    [matrix] = loads(joined(dumps([Matrix(bytearray(LARGE))])[0]))
    matrix.memory[0] ^= 1
    assert bytes(matrix.memory) != LARGE


def test_arrays_come_back_writable():
    numpy = pytest.importorskip('numpy')
    array = numpy.arange(100000.0).reshape(100, 1000)
    payload, *_ = dumps((array, array[:, ::2], array.T))
    for got, sent in zip(loads(joined(payload)), (array, array[:, ::2], array.T)):
        assert (got == sent).all()
        got += 1


def test_a_payload_opens_from_a_view():
    assert loads(memoryview(joined(dumps(Matrix(LARGE))[0]))).memory == LARGE
    assert loads(memoryview(joined(dumps('x')[0]))) == 'x'


def test_the_pickler_may_be_another():
    class Pickler(dispynode.value_pickler()):
        def reducer_override(self, obj):
            return (str, ('a matrix',)) if type(obj) is Matrix else super().reducer_override(obj)
    payload, plain = dumps([Matrix(bytes(LARGE)), 5], Pickler)[:2]
    assert (loads(joined(payload)), plain) == (['a matrix', 5], False)


def test_what_cannot_be_pickled_raises():
    with pytest.raises(TypeError, match='plain pickle fails'):
        dumps([Stubborn()])


def test_a_sealed_value_tells_the_modules_that_opening_it_imports():
    found = dumps([collections.OrderedDict(), Matrix, os.path])
    assert {'collections', __name__,
            'posixpath' if os.name == 'posix' else 'ntpath'} <= found.modules and found.portable
    # Another Python finds it in the source of this module
    assert dumps([lambda: 1]).portable
    assert not dumps([eval('lambda: 1', {})]).portable


def test_a_payload_may_say_what_it_needs():
    payload = dispynode.with_needs(dumps([Matrix(LARGE)]).payload, {3, 1})
    # Where there are no modules of a client's, nothing is needed
    assert loads(joined(payload))[0].memory == LARGE
    numbers, body = dispynode.split_needs(joined(payload))
    assert numbers == (1, 3) and loads(body)[0].memory == LARGE
