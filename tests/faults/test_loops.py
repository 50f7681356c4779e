"""No loop stands still: digests beside it, no wait for the disk with each small file, no look-up
that ends it."""

import hashlib
import os
import threading

import pytest

import dispynode
from conftest import eventually
from dispynode import (Digested, Digests, FilePiece, FileReceiver, IncomingFile, Options,
                       PrepareDirectory, DirectoryReady, Purpose)
from talk_node import spec

LARGE = Digests.INLINE + 1


def row(path, name):
    data = path.read_bytes()
    return (name, len(data), hashlib.sha256(data).digest(), 0o600)


@pytest.fixture
def large(tmp_path):
    path = tmp_path / 'large'
    path.write_bytes(b'x' * LARGE)
    return path


def test_digests_of_large_files_are_remembered_until_they_change(large, monkeypatch):
    rows, count = [row(large, 'large')], []
    digest = dispynode.file_digest
    monkeypatch.setattr(dispynode, 'file_digest', lambda path: count.append(path) or digest(path))
    assert Digests.unknown(str(large.parent), rows) == [str(large)]
    Digests.learn([str(large)])
    assert Digests.unknown(str(large.parent), rows) == [] and len(count) == 1
    assert wanted(large.parent, rows) == [] and len(count) == 1
    large.write_bytes(b'y' * LARGE)
    assert wanted(large.parent, rows) == ['large'] and len(count) == 2


def wanted(directory, rows):
    """Names of the files of `depends` that a node would ask for."""
    found = FileReceiver({Purpose.DEPENDS: str(directory)}).want(Purpose.DEPENDS, rows)
    return [row[0] for _, _, row in found]


def test_a_node_compares_large_files_beside_its_loop(tmp_path, monkeypatch):
    """They are there from before: `prepare` returns at once, and what came of it is posted."""
    daemon = dispynode.Daemon(Options(1, ('127.0.0.1',), 0, prefix=str(tmp_path / 'node'),
                                      secret=b'a secret of tests'))
    daemon.start()
    go_on, digest = threading.Event(), dispynode.file_digest
    monkeypatch.setattr(dispynode, 'file_digest', lambda path: go_on.wait(60) and digest(path))
    try:
        (tmp_path / 'node' / 'files').mkdir()
        path = tmp_path / 'node' / 'files' / 'large'
        path.write_bytes(b'x' * LARGE)
        action = PrepareDirectory('c', dict(spec(files=[row(path, 'large')], dest_path='files',
                                                 cleanup=False), modules=[], sys_path=[], argv=[]))
        host = daemon.node_host
        host.files.prepare(action)
        assert not host._posted
        go_on.set()
        eventually(lambda: host._posted)
        event = host._posted.popleft()
        assert type(event) is Digested
        monkeypatch.setattr(daemon.node, 'is_preparing', lambda name: True)
        daemon.on_event(event)
        assert host._posted.popleft() == DirectoryReady('c', [])
    finally:
        go_on.set()
        daemon.close()


def test_small_files_of_a_computation_are_not_waited_for_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, 'fsync', synced.append)
    receiver, data = FileReceiver({Purpose.DEPENDS: str(tmp_path)}), b'data'
    rows = [('file-%d' % number, 4, hashlib.sha256(data).digest(), 0o600) for number in range(100)]
    for purpose, key, one in receiver.want(Purpose.DEPENDS, rows):
        receiver.piece(FilePiece('c', purpose, key, one, 0, data))
    assert len(list(tmp_path.iterdir())) == 100 and not synced


def test_half_a_file_lies_where_it_is_cleaned(tmp_path):
    """In the computation's own directory, and not among the files that are kept and that jobs
    see."""
    kept, scratch = tmp_path / 'kept', tmp_path / 'scratch'
    kept.mkdir(), scratch.mkdir()
    data = b'0123456789'
    receiver = FileReceiver({Purpose.DEPENDS: str(kept)}, scratch=str(scratch))
    [need] = receiver.want(Purpose.DEPENDS, [('a/file', 10, hashlib.sha256(data).digest(), 0o640)])
    receiver.piece(FilePiece('c', *need, 0, data[:5]))
    assert (not [name for _, _, names in os.walk(kept) for name in names]
            and len(list(scratch.iterdir())) == 1)
    receiver.piece(FilePiece('c', *need, 5, data[5:]))
    assert (kept / 'a' / 'file').read_bytes() == data and not list(scratch.iterdir())
    other = IncomingFile(str(kept), 'b', 10, b'', 0o600, str(scratch))
    other.piece(0, data[:5])
    other.abort()
    assert not list(scratch.iterdir()) and not (kept / 'b').exists()


def test_addresses_are_those_of_before_while_no_descriptor_is_left(monkeypatch):
    psutil = pytest.importorskip('psutil')
    known = dispynode.own_addresses()

    def none_left(*args):
        raise OSError(24, 'Too many open files')
    monkeypatch.setattr(psutil, 'net_if_addrs', none_left)
    monkeypatch.setattr(dispynode.socket, 'if_nameindex', none_left)
    assert dispynode.own_addresses() == known and dispynode.interfaces() == []
