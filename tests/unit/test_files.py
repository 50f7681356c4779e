"""Names of files from outside, and files that come in pieces into a tree where jobs may have
planted links."""

import contextlib
import hashlib
import os
import stat
from collections import namedtuple

import pytest

import dispynode
from dispynode import (
    FILE_PIECE, SpoolSender, FilePiece, FileReceiver, FileStored, Purpose, check_name, file_digest,
    read_pieces)

DATA = b'the content of a file'
posix = pytest.mark.skipif(os.name == 'nt', reason='links and modes are POSIX')


class Receiver(FileReceiver):
    """One that asks for all its files at once, by their names."""

    def __init__(self, root):
        super().__init__({Purpose.DEPENDS: root})
        self.rows = {}

    def want(self, files):
        wanted = super().want(Purpose.DEPENDS, files)
        self.rows.update((row[0], row) for _, _, row in wanted)
        return [row[0] for _, _, row in wanted]

    def piece(self, name, offset, data):
        key = self._keys.get(Purpose.DEPENDS, 0)
        asked = self.rows.get(name, row(name))
        super().piece(FilePiece('c', int(Purpose.DEPENDS), key, asked, offset, data))
        return not self.wants(Purpose.DEPENDS)


def row(name, data=DATA, mode=0o644, size=None):
    return name, len(data) if size is None else size, hashlib.sha256(data).digest(), mode


def tree(root):
    """All files and links below a directory."""
    return sorted(os.path.relpath(os.path.join(top, name), str(root))
                  for top, directories, files in os.walk(str(root)) for name in files
                  + [one for one in directories if os.path.islink(os.path.join(top, one))])


@pytest.fixture
def root(tmp_path):
    (tmp_path / 'root').mkdir()
    return tmp_path / 'root'


@pytest.fixture
def outside(tmp_path):
    (tmp_path / 'outside').mkdir()
    return tmp_path / 'outside'


# -- names -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', [
    'a', 'a.txt', 'a/b', 'a/b/c.py', '.hidden', '.a/.b', '...', 'a..b', '..a', 'a..', 'a b',
    'caf\u00e9', '\u65e5\u672c/\U0001f600', '~', '~root', '-rf', '$HOME', '*', '%2e%2e', 'x' * 255,
    '/'.join('a' * 32), '\u00e9' * 127, "it's", '#', 'a,b;c|d&e'], ids=ascii)
def test_good_names_come_apart(name):
    assert '/'.join(check_name(name)) == name


@pytest.mark.parametrize('name', [
    # nothing, and parts of nothing
    '', '/', '//', 'a//b', 'a/', '/a', '//a', '///a', 'a///b', 'a/b/', '/a/b', ' /', '/ ',
    # upwards
    '.', '..', './a', '../a', 'a/..', 'a/.', 'a/../b', 'a/./b', '../../etc/passwd', 'a/b/../../..',
    '/..', '../',
    './', 'a/../../b',
    # absolute
    '/etc/passwd', '/tmp/x', '//host/share/x', '/dev/null', '/proc/self/mem',
    # Windows
    '\\', '\\a', 'a\\b', '..\\a', 'a\\..\\b', '\\\\host\\share', '\\\\?\\C:\\a', 'a/b\\c', '..\\',
    'C:', 'C:a',
    'C:\\a', 'C:/a', 'c:/',
    'a:b', 'a/b:stream', 'a::$DATA', ':', 'file:///etc/passwd', 'http://x/y',
    # control characters
    '\0', 'a\0', '\0a', 'a\0b', 'a/\0', 'a\n', '\n', 'a\rb', 'a\tb', '\x01', '\x1b[2J',
    'a\x1b]0;x\x07', '\x7f',
    'a\x7fb', 'a/\x0bb',
    '..\0', '../\n',
    # not to be encoded, and too much
    '\udc80', 'a/\ud800', 'a\udfff', 'x' * 256, '\u00e9' * 128, 'a/' + 'x' * 256, '\U0001f600' * 64,
    '/'.join('a' * 33), 'a/' * 5000,
], ids=lambda name: ascii(name)[:30])
def test_bad_names_are_refused(name):
    with pytest.raises(ValueError) as info:
        check_name(name)
    str(info.value).encode('utf-8')    # the text can be logged and sent
    assert len(str(info.value)) < 400


# Guards against: the C1 control characters (terminals obey some of them) and the line separators
# pass.
@pytest.mark.parametrize('name', ['\x80', 'a\x85b', '\x9b2J', 'a\x9f', 'a\u2028b', 'a\u2029b'],
                         ids=ascii)
def test_other_control_characters_are_refused(name):
    with pytest.raises(ValueError):
        check_name(name)


@pytest.mark.parametrize('name', ['../x', '/x', 'a\0b', ''], ids=repr)
def test_the_receiver_checks_names(root, name):
    with pytest.raises(ValueError):
        Receiver(str(root)).want([row(name)])
    assert tree(root.parent) == []


# -- pieces ----------------------------------------------------------------------------------------

def test_a_file_comes_in_pieces(root):
    receiver = Receiver(str(root))
    assert receiver.want([row('a/b/file')]) == ['a/b/file']
    assert not receiver.piece('a/b/file', 0, DATA[:5])
    assert not receiver.piece('a/b/file', 5, memoryview(DATA)[5:9])
    assert receiver.piece('a/b/file', 9, bytearray(DATA[9:]))
    assert tree(root) == ['a/b/file']
    assert (root / 'a' / 'b' / 'file').read_bytes() == DATA


def test_several_files_may_be_mixed(root):
    receiver = Receiver(str(root))
    assert receiver.want([row('b'), row('a', b'other')]) == ['a', 'b']
    assert not receiver.piece('b', 0, DATA[:3])
    assert not receiver.piece('a', 0, b'other')
    assert receiver.piece('b', 3, DATA[3:])
    assert tree(root) == ['a', 'b']


def test_an_empty_file_is_one_empty_piece(root):
    receiver = Receiver(str(root))
    assert receiver.want([row('empty', b'')]) == ['empty']
    assert receiver.piece('empty', 0, b'')
    assert (root / 'empty').read_bytes() == b''


def test_an_unfinished_file_is_not_there_under_its_name(root):
    receiver = Receiver(str(root))
    receiver.want([row('file')])
    receiver.piece('file', 0, DATA[:5])
    assert not (root / 'file').exists()
    receiver.abort()


@pytest.mark.parametrize('pieces', [
    [(1, DATA)], [(-1, DATA)], [(0, DATA + b'x')], [(0, DATA[:5]), (4, DATA[4:])],
    [(0, DATA[:5]), (6, DATA[6:])],
    [(0, DATA[:5]), (0, DATA[:5])], [(0, DATA[:5]), (5, DATA[5:] + b'x')], [(0, DATA[:-1] + b'!')],
    [(0, bytes(len(DATA)))],
    [(0, DATA[:5]), (1 << 70, b'x')],
], ids=lambda pieces: '%.50r' % (pieces,))
def test_pieces_that_do_not_fit_are_refused_and_leave_nothing(root, pieces):
    receiver = Receiver(str(root))
    receiver.want([row('file')])
    with pytest.raises(ValueError):
        for offset, data in pieces:
            receiver.piece('file', offset, data)
    receiver.abort()
    assert tree(root) == []


def test_too_much_is_refused_before_it_is_written(root):
    receiver = Receiver(str(root))
    receiver.want([row('file')])
    receiver.piece('file', 0, DATA[:5])
    with pytest.raises(ValueError):
        receiver.piece('file', 5, bytes(1000))
    assert [(root / name).stat().st_size for name in tree(root)] == [5]
    receiver.abort()


def test_a_file_that_was_not_asked_for_is_refused(root):
    receiver = Receiver(str(root))
    receiver.want([row('file')])
    with pytest.raises(ValueError, match='not asked for'):
        receiver.piece('other', 0, DATA)
    assert receiver.piece('file', 0, DATA)
    with pytest.raises(ValueError, match='not asked for'):
        receiver.piece('file', 0, DATA)


def test_abort_leaves_nothing_and_may_come_twice(root):
    receiver = Receiver(str(root))
    receiver.want([row('a/one'), row('two')])
    receiver.piece('a/one', 0, DATA[:5])
    receiver.piece('two', 0, b'')
    assert len(tree(root)) == 2
    receiver.abort()
    receiver.abort()
    assert tree(root) == []
    with pytest.raises(ValueError):
        receiver.piece('two', 0, DATA)


def test_a_wrong_file_does_not_replace_the_one_that_is_there(root):
    (root / 'file').write_bytes(b'before')
    receiver = Receiver(str(root))
    receiver.want([row('file')])
    with pytest.raises(ValueError, match='digest'):
        receiver.piece('file', 0, bytes(len(DATA)))
    receiver.abort()
    assert (root / 'file').read_bytes() == b'before' and tree(root) == ['file']


def open_files():
    return sorted(os.listdir('/proc/self/fd'))


# Guards against: the descriptor is closed before the file is moved and closed again by abort, which
# raises (or closes what got the number meanwhile); the temporary file stays.
@posix
def test_a_directory_in_the_place_of_a_file_is_an_error_and_leaves_nothing(root):
    receiver = Receiver(str(root))
    receiver.want([row('name/below'), row('name', b'x')])
    receiver.piece('name/below', 0, DATA)
    with pytest.raises(OSError):
        receiver.piece('name', 0, b'x')
    receiver.abort()
    assert tree(root) == ['name/below']


# Guards against: the same for every other reason why a file cannot be moved.
@posix
def test_abort_after_a_failed_move_closes_nothing_of_others(root, monkeypatch):
    receiver = Receiver(str(root))
    receiver.want([row('file')])

    def fail(*_args, **_named):
        raise OSError(30, 'Read-only file system')
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='Read-only'):
        receiver.piece('file', 0, DATA)
    reader, writer = os.pipe()     # gets the number that was just freed
    try:
        receiver.abort()
        os.write(writer, b'x')
        assert os.read(reader, 1) == b'x'
        assert tree(root) == []
    finally:
        for handle in (reader, writer):
            # Closed by somebody else, which the test has shown above
            with contextlib.suppress(OSError):
                os.close(handle)


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='counts open files in /proc')
def test_no_descriptor_stays_open(root):
    before = open_files()
    receiver = Receiver(str(root))
    receiver.want([row('a/b/one'), row('two')])
    receiver.piece('a/b/one', 0, DATA)
    receiver.piece('two', 0, DATA[:1])
    receiver.abort()
    assert open_files() == before


# -- modes -----------------------------------------------------------------------------------------

@posix
@pytest.mark.parametrize('mode, expected', [
    (0o644, 0o644), (0o755, 0o755), (0o600, 0o600), (0o700, 0o700), (0o666, 0o644), (0o777, 0o755),
    (0o4755, 0o755),
    (0o2755, 0o755), (0o1777, 0o755), (0o7777, 0o755), (0o000, 0o600), (0o444, 0o644),
    (0o100644, 0o644)], ids=oct)
def test_modes_are_cut_down(root, mode, expected):
    receiver = Receiver(str(root))
    receiver.want([row('file', mode=mode)])
    receiver.piece('file', 0, DATA)
    assert stat.S_IMODE((root / 'file').stat().st_mode) == expected


@posix
def test_a_file_on_its_way_and_new_directories_are_private(root):
    receiver = Receiver(str(root))
    receiver.want([row('a/file', mode=0o755)])
    receiver.piece('a/file', 0, DATA[:1])
    assert {stat.S_IMODE((root / name).stat().st_mode) for name in tree(root)} == {0o600}
    assert stat.S_IMODE((root / 'a').stat().st_mode) == 0o700
    receiver.abort()


# -- what is there already -------------------------------------------------------------------------

def test_a_known_file_is_not_wanted(root):
    (root / 'file').write_bytes(DATA)
    receiver = Receiver(str(root))
    assert receiver.want([row('file')]) == []
    assert receiver.want([row('file'), row('new')]) == ['new']


def test_a_file_of_the_same_size_and_time_but_another_content_is_wanted(root):
    (root / 'file').write_bytes(DATA[::-1])
    assert Receiver(str(root)).want([row('file')]) == ['file']


def test_a_received_file_is_known_to_the_next(root):
    receiver = Receiver(str(root))
    receiver.want([row('a/file')])
    receiver.piece('a/file', 0, DATA)
    assert Receiver(str(root)).want([row('a/file')]) == []


def test_digests(root):
    (root / 'file').write_bytes(DATA * 100000)
    assert file_digest(str(root / 'file')) == (len(DATA) * 100000,
                                               hashlib.sha256(DATA * 100000).digest())


# -- planted links ---------------------------------------------------------------------------------

@posix
def test_a_link_in_the_place_of_a_directory_is_not_followed(root, outside):
    (root / 'a').symlink_to(outside, target_is_directory=True)
    receiver = Receiver(str(root))
    receiver.want([row('a/file')])
    with pytest.raises((OSError, ValueError)):
        receiver.piece('a/file', 0, DATA)
    receiver.abort()
    assert tree(outside) == []


@posix
def test_a_link_further_down_is_not_followed(root, outside):
    (root / 'a' / 'b').mkdir(parents=True)
    (root / 'a' / 'b' / 'c').symlink_to(outside, target_is_directory=True)
    receiver = Receiver(str(root))
    receiver.want([row('a/b/c/d/file')])
    with pytest.raises((OSError, ValueError)):
        receiver.piece('a/b/c/d/file', 0, DATA)
    assert os.listdir(str(outside)) == []


@posix
def test_a_link_in_the_place_of_the_file_is_replaced(root, outside):
    (outside / 'target').write_bytes(b'untouched')
    (root / 'file').symlink_to(outside / 'target')
    receiver = Receiver(str(root))
    receiver.want([row('file')])
    receiver.piece('file', 0, DATA)
    assert (outside / 'target').read_bytes() == b'untouched'
    assert not (root / 'file').is_symlink() and (root / 'file').read_bytes() == DATA


@posix
def test_a_link_planted_while_the_file_comes_is_not_followed(root, outside):
    receiver = Receiver(str(root))
    receiver.want([row('a/file')])
    receiver.piece('a/file', 0, DATA[:5])
    (root / 'a').rename(root / 'b')
    (root / 'a').symlink_to(outside, target_is_directory=True)
    with pytest.raises((OSError, ValueError)):
        receiver.piece('a/file', 5, DATA[5:])
    assert tree(outside) == []


@posix
def test_a_link_to_the_right_content_is_not_a_known_file(root, outside):
    (outside / 'target').write_bytes(DATA)
    (root / 'file').symlink_to(outside / 'target')
    assert Receiver(str(root)).want([row('file')]) == ['file']


# Guards against: on the way to a file that may be known, links in the place of directories are
# followed.
@posix
def test_a_file_behind_a_linked_directory_is_not_a_known_file(root, outside):
    (outside / 'file').write_bytes(DATA)
    (root / 'a').symlink_to(outside, target_is_directory=True)
    assert Receiver(str(root)).want([row('a/file')]) == ['a/file']


@posix
def test_a_pipe_in_the_place_of_a_file_does_not_block(root):
    os.mkfifo(str(root / 'file'))
    receiver = Receiver(str(root))
    assert receiver.want([row('file')]) == ['file']
    receiver.piece('file', 0, DATA)
    assert (root / 'file').read_bytes() == DATA


# Where a directory's descriptor cannot be walked from, the same names lead to the same places.
@posix
def test_without_directory_descriptors(root, outside, monkeypatch):
    monkeypatch.setattr(dispynode, '_WALKS', False)
    receiver = Receiver(str(root))
    receiver.want([row('a/b/file'), row('link/file')])
    receiver.piece('a/b/file', 0, DATA)
    (root / 'link').symlink_to(outside, target_is_directory=True)
    with pytest.raises(ValueError, match='is a link'):
        receiver.piece('link/file', 0, DATA)
    assert tree(root) == ['a/b/file', 'link'] and tree(outside) == []


# -- transfers: files that come unasked, and several at once -------------------------------------

@pytest.fixture
def receiver(root):
    """One that takes files of every purpose, none larger than 100 bytes."""
    roots = dict.fromkeys(Purpose, str(root))
    return FileReceiver(roots, 100, '%s has %d bytes, more than %d', 'here: ')


def unasked(name, offset, data, key=0, content=DATA, purpose=Purpose.FROM_JOB):
    return FilePiece('c', int(purpose), key, row(name, content), offset, data)


def test_a_file_that_comes_unasked_is_answered_when_it_is_whole(root, receiver):
    assert receiver.take(unasked('a/file', 0, DATA[:5], key=7)) is None
    answer = receiver.take(unasked('a/file', 5, DATA[5:], key=7))
    assert answer == FileStored('c', 4, 7, 'a/file', '')
    assert (root / 'a' / 'file').read_bytes() == DATA


def test_files_of_several_transfers_do_not_mix(root, receiver):
    assert receiver.take(unasked('one', 0, DATA[:5], key=1)) is None
    assert receiver.take(unasked('two', 0, b'second', 2, b'second')).error == ''
    assert receiver.take(unasked('one', 0, DATA[:3], purpose=Purpose.PLACED)) is None
    assert receiver.take(unasked('one', 5, DATA[5:], key=1)).error == ''
    assert receiver.take(unasked('one', 3, DATA[3:], purpose=Purpose.PLACED)).error == ''
    assert tree(root) == ['one', 'two']


@pytest.mark.parametrize('name, data, content, text', [
    ('../up', DATA, DATA, 'refused'),
    ('file', b'x' * 60, b'x' * 101, 'file has 101 bytes, more than 100'),
    ('file', bytes(len(DATA)), DATA, 'digest'),
    ('file', DATA + b'x', DATA, 'does not fit')])
def test_a_file_that_fails_is_answered_once(root, receiver, name, data, content, text):
    """What is left of it is passed over."""
    answer = receiver.take(unasked(name, 0, data, 7, content))
    assert answer[:4] == ('c', 4, 7, name)
    assert answer.error.startswith('here: ') and text in answer.error
    assert receiver.take(unasked(name, len(data), b'more', 7, content)) is None
    assert tree(root) == []


def test_a_file_that_begins_anew_takes_the_place_of_its_half(root, receiver):
    receiver.take(unasked('file', 0, DATA[:5]))
    receiver.take(unasked('file', 0, b'an', content=b'another'))
    assert len(tree(root)) == 1
    assert receiver.take(unasked('file', 2, b'other', content=b'another')).error == ''
    assert tree(root) == ['file'] and (root / 'file').read_bytes() == b'another'


def test_what_has_come_of_one_transfer_is_removed_alone(root, receiver):
    receiver.take(unasked('one', 0, DATA[:5], key=1))
    receiver.take(unasked('two', 0, DATA[:5], key=2))
    receiver.abort(Purpose.FROM_JOB, 1)
    assert len(tree(root)) == 1
    assert receiver.take(unasked('one', 5, DATA[5:], key=1)) is None
    assert receiver.take(unasked('two', 5, DATA[5:], key=2)).error == ''
    assert tree(root) == ['two']


def test_pieces_of_what_was_asked_for_before_are_passed_over(root, receiver):
    (_, first, _), = receiver.want(Purpose.DEPENDS, [row('file')])
    receiver.take(FilePiece('c', 1, first, row('file'), 0, DATA[:5]))
    (_, second, _), = receiver.want(Purpose.DEPENDS, [row('file', b'other')])
    assert tree(root) == [] and first != second
    assert receiver.take(FilePiece('c', 1, first, row('file'), 5, DATA[5:])) is None
    answer = receiver.take(FilePiece('c', 1, second, row('file', b'other'), 0, b'other'))
    assert answer == FileStored('c', 1, second, 'file', '')
    assert not receiver.wants(Purpose.DEPENDS)


def test_one_file_that_fails_ends_all_that_was_asked_for_with_it(root, receiver):
    wanted = receiver.want(Purpose.DEPENDS, [row('one'), row('two')])
    key = wanted[0][1]
    receiver.take(unasked('other', 0, DATA[:5]))
    receiver.take(FilePiece('c', 1, key, row('one'), 0, DATA[:5]))
    answer = receiver.take(FilePiece('c', 1, key, row('two'), 0, bytes(len(DATA))))
    assert answer.name == 'two' and "file 'two' cannot be stored: here: " in answer.error
    assert not receiver.wants(Purpose.DEPENDS)
    assert receiver.take(unasked('other', 5, DATA[5:])).error == ''
    assert tree(root) == ['other']


# -- sending -------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [0, 1, FILE_PIECE - 1, FILE_PIECE, FILE_PIECE + 1, 3 * FILE_PIECE])
def test_a_file_is_read_in_pieces(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / 'file').write_bytes(data + b'what was written since')

    class Source:
        def read(self):
            return data
    for source in (str(tmp_path / 'file'), data, Source()):
        pieces = list(read_pieces(source, size))
        assert [offset for offset, _ in pieces] == list(range(0, max(1, size), FILE_PIECE))
        assert b''.join(piece for _, piece in pieces) == data


def test_a_file_that_has_become_shorter_is_an_error(tmp_path):
    (tmp_path / 'file').write_bytes(DATA)
    with pytest.raises(OSError, match='it has 21 bytes now and had 22'):
        list(read_pieces(str(tmp_path / 'file'), 22))


class Room:
    """A link that notes what is sent."""

    def __init__(self):
        self.queued, self.sent = 0, []


def test_files_are_sent_as_there_is_room(tmp_path):
    (tmp_path / 'large').write_bytes(bytes(20 * FILE_PIECE))
    links = {1: Room(), 2: Room()}
    backlog = SpoolSender(links)

    def say(link, message):
        link.sent.append(message)
        link.queued += len(bytes(message.data))
    rows = [row('large', bytes(20 * FILE_PIECE)), row('small', b'small')]
    backlog.add_file(1, ('c', 1, 0), rows[0], str(tmp_path / 'large'))
    backlog.add_file(1, ('c', 3, 0), rows[1], b'small')
    backlog.add_file(2, ('d', 1, 0), rows[1], b'small')
    while backlog.has_room():
        assert backlog.send(say) == []
    assert len(links[1].sent) == 4 and [message.row for message in links[2].sent] == [rows[1]]
    links[1].queued = 0
    backlog.send(say)
    assert len(links[1].sent) == 8
    for _ in range(4):
        links[1].queued = 0
        backlog.send(say)
    offsets = [message.offset for message in links[1].sent]
    assert offsets == [n * FILE_PIECE for n in range(20)] + [0]
    assert not backlog.has_room()


def test_a_file_that_cannot_be_read_is_told_and_others_go_on(tmp_path):
    links = {1: Room()}
    backlog = SpoolSender(links)
    backlog.add_file(1, ('c', 3, 0), row('gone'), str(tmp_path / 'gone'))
    backlog.add_file(1, ('d', 1, 0), row('small', b'small'), b'small')
    backlog.add_file(1, ('e', 1, 0), row('small', b'small'), b'small')
    backlog.drop('e')
    (link, owner, text), = backlog.send(lambda link, message: link.sent.append(message))
    assert link is links[1] and owner == ('c', 3, 0, 'gone') and 'No such file' in text
    assert [message.comp for message in links[1].sent] == ['d'] and not backlog.has_room()


# -- room ------------------------------------------------------------------------------------------

@pytest.fixture
def disk(monkeypatch):
    """A disk with 1000 bytes left."""
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(dispynode.shutil, 'disk_usage', lambda path: usage(2000, 1000, 1000))


def test_files_that_find_no_room_are_refused_before_they_come(root, disk):
    with pytest.raises(OSError, match='1001 bytes are needed'):
        Receiver(str(root)).want([row('a', size=500), row('b', size=501)])
    assert Receiver(str(root)).want([row('a', size=500), row('b', size=500)]) == ['a', 'b']


# Guards against: a negative size makes room for others.
def test_a_negative_size_is_refused(root, disk):
    with pytest.raises(ValueError):
        Receiver(str(root)).want([row('a', size=-5000), row('b', size=5000)])


# Guards against: rows off the wire are believed; what they raise is neither ValueError nor OSError
# and ends the node's thread.
@pytest.mark.parametrize('rows', [[()], [('a', 1)], [(1, 1, b'', 0)], [('a', '1', b'', 0)],
                                  [('a', 1, b'', None)], [None], None], ids=repr)
def test_rows_that_make_no_sense_are_a_value_error(root, rows):
    receiver = Receiver(str(root))
    with pytest.raises((ValueError, OSError)):
        receiver.want(rows)
        receiver.piece('a', 0, b'x')
