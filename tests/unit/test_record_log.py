"""The form of files that only grow: results that a node keeps, jobs of a recovery file that are in
no transaction yet."""

import io
import struct

import pytest

from dispynode import RecordLog

LOG = RecordLog(struct.Struct('>BQII'), 2)


def record(kind, number, first=b'', second=b''):
    head = struct.pack('>BQII', kind, number, len(first), len(second))
    return b''.join(LOG.record(head, [piece for piece in (first, second) if piece]))


WHOLE = [record(1, 7, b'first', b'second'), record(2, 8), record(3, 9, b'', bytes(1000))]


def test_what_was_written_is_read():
    found = list(LOG.read(io.BytesIO(b''.join(WHOLE))))
    assert [numbers for numbers, _, _ in found] == [(1, 7), (2, 8), (3, 9)]
    assert [pieces for _, pieces, _ in found] == [
        [b'first', b'second'], [b'', b''], [b'', bytes(1000)]]
    assert [size for _, _, size in found] == list(map(len, WHOLE))


@pytest.mark.parametrize('cut', [1, 3, 4, 20, 21, 25, len(WHOLE[0]) - 1])
def test_it_ends_before_a_torn_record(cut):
    assert len(list(LOG.read(io.BytesIO(WHOLE[1] + WHOLE[0][:cut])))) == 1


@pytest.mark.parametrize('place', range(len(WHOLE[0])))
def test_a_record_with_a_changed_byte_is_not_read(place):
    data = bytearray(WHOLE[0] + WHOLE[1])
    data[place] ^= 1
    assert list(LOG.read(io.BytesIO(bytes(data)))) == []
