"""Messages and records that nobody honest sends, by a small client of the protocol of its own: no
process ends, memory stays small, and an honest client's jobs go on beside it.

The client here shares nothing with dispynode.py but the numbers of the protocol: handshake, frames
and pickles are written out, so that a fault of that module does not hide here as well.
"""

import functools
import hashlib
import hmac
import logging
import os
import pickle
import random
import socket
import struct
import threading
import time

import psutil
import pytest

import dispy
from conftest import eventually
from nodes import NodeProcess, SchedulerProcess

SECRET = 'a secret of the fuzzer'
CLIENT, NODE, SCHEDULER = 1, 2, 3
# op -> fields of the right types; what stands for them is drawn anew each time
OPS = {1: 'nf', 2: 'cd', 3: 'cnib', 4: 'cj', 5: 'cl', 6: 'ci', 7: 'cl', 8: 'c', 9: 'cin',
       10: 'crib', 11: 'c', 12: 'c', 13: 'cb', 14: 'ci', 33: 'nid', 34: 'cnn', 35: 'cl', 36: 'cl',
       37: 'ce', 38: 'cl', 39: 'i', 40: 'cirib', 41: 'ciiib', 42: 'cnn', 43: 'clld', 44: 'cl',
       48: 'ctl', 49: 'cit', 50: 'cn', 65: '', 66: 'n', 67: 'cint', 68: 'citx', 69: 'ni', 99: 'x'}


class Peer:
    """Dials, proves that it knows the secret, sends frames."""

    def __init__(self, port, secret=SECRET, role=CLIENT, wanted=NODE, instance=None):
        psk = hashlib.scrypt(secret.encode(), salt=b'dispy 5 secret', n=1 << 14, r=8, p=1,
                             dklen=32) if secret not in _psks else _psks[secret]
        _psks[secret] = psk
        self.sock = socket.create_connection(('127.0.0.1', port), 10)
        hello = struct.pack('>8sHHBBH16s32s16x', b'dispy5\0\1', 1, 1, role, wanted, 0, instance
                            or os.urandom(16), os.urandom(32))
        self.sock.sendall(hello)
        challenge = self._exactly(80)
        transcript = hashlib.sha256(b'dispy 5 handshake' + hello + challenge + bytes(32)).digest()

        def key(label):
            return hmac.new(psk, label + b'\0' + transcript + b'\1', 'sha256').digest()
        tag = hmac.new(key(b'c finished'), transcript, 'sha256').digest()
        self.sock.sendall(b'dispy5\0\1' + tag)
        self._exactly(40)
        self._key, self._count = key(b'c2s'), 0

    def _exactly(self, size):
        data = b''
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def send(self, op, payload, encoding=0):
        header = struct.pack('>IBBHQ', len(payload), op, encoding, 0, 0)
        mac = [hmac.new(self._key, struct.pack('>QB', self._count, part) + header
                        + (payload if part else b''), 'sha256').digest() for part in (0, 1)]
        self._count += 1
        self.sock.sendall(header + mac[0][:16] + payload + mac[1])

    def drain(self):
        """What was answered is not looked at, but read."""
        self.sock.setblocking(False)
        try:
            while True:
                if not self.sock.recv(1 << 20):
                    raise EOFError
        except BlockingIOError:
            pass
        finally:
            self.sock.setblocking(True)
            self.sock.settimeout(10)

    def close(self):
        self.sock.close()


_psks = {}
BOMBS = [b'\x80\x05Nr\xff\xff\xff\x0f.', b'\x80\x05(' + b']' * 400000 + b't.',
         b'\x80\x05(' + b'}' * 400000 + b't.', b'\x80\x05' + b')\x85' * 100000 + b'.',
         b'\x80\x05}(' + b''.join(b'\x8a\x0a' + (n * (2 ** 61 - 1)).to_bytes(10, 'little') + b'N'
                                  for n in range(1, 20000)) + b'u.',
         b'\x80\x05\x8e\xff\xff\xff\xff\x00\x00\x00\x00.',
         b'\x80\x05(' + b'\x8c\x02ab' * 100000 + b't.']


class Drawer:
    """Draws messages: mostly right in kind, wrong in value."""

    def __init__(self, seed, comps):
        self.rng, self.comps = random.Random(seed), comps

    def number(self):
        return self.rng.choice([0, 1, -1, 2, 65536, 65537, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63,
                                1 << 64, -(1 << 70), self.rng.randrange(1 << 20) << 16])

    def name(self):
        return self.rng.choice(['', 'a', 'x' * 300, '../../etc/passwd', '\ud800', 'a\nb\x1b[2J',
                                'overview', 'place', 'allocate', 'nodes', 'jobs', '*' * 30 + 'a',
                                'ä' * 100])

    def real(self):
        return self.rng.choice([0.0, 1.0, -1.0, 1e308, -1e308, float('inf'), float('nan'), 2.0,
                                1e-9])

    def data(self):
        return self.rng.choice([b'', b'x', bytes(100), os.urandom(50), b'\x80\x05N.', bytes(40000)])

    def any(self, depth=0):
        kinds = [self.number, self.name, self.real, self.data, lambda: None, lambda: True]
        if depth < 3:
            kinds += [lambda: tuple(self.any(depth + 1) for _ in range(self.rng.randrange(5))),
                      lambda: [self.any(depth + 1) for _ in range(self.rng.randrange(5))],
                      lambda: {str(n): self.any(depth + 1) for n in range(self.rng.randrange(4))}]
        return self.rng.choice(kinds)()

    def row(self):
        return (self.name(), self.number(), self.data(), self.number())

    def spec(self):
        spec = {
            'name': self.name(), 'kind': self.rng.choice(['function', 'source', 'program', 'x']),
            'code': self.data(), 'files': [self.row() for _ in range(self.rng.randrange(3))],
            'cleanup': True, 'dest_path': self.rng.choice(['', '', self.name()]),
            'max_jobs': self.number(), 'python': (3, 11, 0), 'support': {}, 'program': self.name(),
            'live': False, 'logs': -1, 'cpus': self.number(), 'setup_args': b'', 'modules': [],
            'portable': True, 'sys_path': [], 'argv': [], 'bundles': [],
            'shared': {'nodes': self.rng.choice([None, [], [(self.name(), self.number(), 0, 0)]]),
                       'reentrant': False, 'exclusive': False, 'cloudpickle': '', 'recovers': False,
                       'collected': False, 'process': ('', 0, '')}}
        for _ in range(self.rng.randrange(3)):
            spec[self.rng.choice(list(spec))] = self.any()
        return spec

    def field(self, kind):
        if self.rng.random() < 0.03:
            return self.any()
        return {'n': self.name, 'f': self.real, 'i': self.number, 'b': self.data, 'x': self.any,
                'r': self.row, 'd': self.spec,
                'c': lambda: self.rng.choice(self.comps + ['', 'z' * 64, 'a b', self.name()]),
                'l': lambda: [self.number() for _ in range(self.rng.randrange(5))],
                't': lambda: tuple(self.any(1) for _ in range(self.rng.choice([0, 2, 3, 10]))),
                'j': lambda: [(self.number(), self.data(), self.rng.choice(
                    [None, {'cpus': self.number()}, {'timeout': self.real()}]))
                              for _ in range(self.rng.randrange(4))],
                'e': lambda: [(self.number(), self.number(), self.real(), self.real(), self.data(),
                               b'', b'') for _ in range(self.rng.randrange(4))]}[kind]()

    def message(self, ops, bombs):
        op = self.rng.choice(ops)
        chance = self.rng.random()
        if bombs and chance < 0.002:
            return op, self.rng.choice(BOMBS), 0
        if chance < 0.01:
            return op, os.urandom(self.rng.randrange(60)), self.rng.randrange(3)
        return op, pickle.dumps(tuple(self.field(kind) for kind in OPS[op]), 5), 0


def throw(port, total, seed, bombs, role=CLIENT, wanted=NODE, ops=tuple(OPS), comps=()):
    """Send so many messages, on a new link whenever one has been ended. Returns how many links that
    took."""
    drawer, sent, links, peer = Drawer(seed, list(comps)
                                       or ['f%d' % n for n in range(3)]), 0, 0, None
    while sent < total:
        try:
            if peer is None:
                peer = Peer(port, role=role, wanted=wanted)
                links += 1
                peer.send(1 if role == CLIENT else 33,
                          pickle.dumps(('fuzzer', 600.0) if role == CLIENT
                                       else ('fuzzer', 1, {'python': (3, 11, 0)}), 5))
            for _ in range(4):
                sent += 1
                peer.send(*drawer.message(ops, bombs))
            peer.drain()
        except (OSError, EOFError):
            if peer is not None:
                peer.close()
            peer = None
    if peer is not None:
        peer.close()
    return links


class Honest:
    """A client that runs short jobs, and notes how long the longest took."""

    def __init__(self, make):
        self.worst, self.count, self._over = 0.0, 0, threading.Event()
        self._cluster = make()
        assert self._cluster.submit(3)(60) == 9
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        while not self._over.wait(0.02):   # not at once: this is about others' CPU time
            began = time.monotonic()
            assert self._cluster.submit(3)(60) == 9
            self.worst, self.count = max(self.worst, time.monotonic() - began), self.count + 1

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._over.set()
        self._thread.join(90)
        self._cluster.close(terminate=True)


def square(n):
    return n * n


def largest(process, over):
    """Watches the resident memory of a process until `over` is set; the most is the last
    element."""
    seen = [0]

    def watch():
        while not over.wait(0.02):
            seen.append(max(seen[-1], psutil.Process(process.pid).memory_info().rss))
    thread = threading.Thread(target=watch)
    thread.start()
    return seen, thread


@pytest.fixture
def total(request):
    return 100000 if request.config.getoption('--long') else 3000


@pytest.mark.long
@pytest.mark.parametrize('bombs', [False, True], ids=['odd', 'bombs'])
@pytest.mark.parametrize('target', ['node', 'scheduler', 'overview', 'scheduler as a node'])
def test_messages(tmp_path, total, target, bombs):
    env = {'DISPY_SECRET': SECRET}
    with NodeProcess(tmp_path / 'n', env=env) as node, SchedulerProcess(
            tmp_path / 's', '-n', '127.0.0.1:%d' % node.port, env=env) as scheduler:
        if target == 'node':
            process, port, wanted, ops, role = node, node.port, NODE, tuple(OPS), CLIENT
            make = functools.partial(dispy.JobCluster, square, nodes=[node.address],
                                     secret=SECRET, loglevel=logging.CRITICAL)
        else:
            process, port, wanted, role = (scheduler, scheduler.port, SCHEDULER,
                                           NODE if target.endswith('node') else CLIENT)
            ops = (67, 67, 67, 2) if target == 'overview' else tuple(OPS)
            make = functools.partial(dispy.SharedJobCluster, square, scheduler_port=port,
                                     secret=SECRET, loglevel=logging.CRITICAL)
        over = threading.Event()
        with Honest(make) as honest:
            seen, thread = largest(process.process, over)
            try:
                links = throw(port, total, 11, bombs, role, wanted, ops)
            finally:
                over.set()
                thread.join()
            eventually(lambda: honest.count > 3, 60)
        print('%s%s: %d messages on %d links; honest jobs %d, the longest %.3f s; memory %d MB'
              % (target, ' with bombs' * bombs, total, links, honest.count, honest.worst,
                 seen[-1] >> 20))
        assert (node.process.poll() is None
                and scheduler.process.poll() is None), (node.log()[-2000:], scheduler.log()[-2000:])
        assert seen[-1] < 150 << 20
        with make() as cluster:
            assert cluster.submit(4)(60) == 16


# -- workers and runners ---------------------------------------------------------------------------

def nonsense(seed, count):
    """In a job: so many odd records into the worker's pipe; the daemon ends the worker at the first
    that cannot be true."""
    import gc
    import os
    import random
    import struct
    import dispynode
    worker, = [each for each in gc.get_objects() if isinstance(each, dispynode.Worker)]
    rng, serial = random.Random(seed), worker._slots[0]
    reals = [0.0, 1.0, -1.0, float('nan'), float('inf'), 1e308, 2e9]
    for _ in range(count):
        bodies = [rng.choice([b'', b'x', os.urandom(30), b'\x80\x05N.',
                              b'\x80\x05Nr\xff\xff\xff\x0f.']) for _ in range(3)]
        sizes = [len(body) for body in bodies]
        if rng.random() < 0.02:
            sizes[rng.randrange(3)] = 0xffffffff
        head = struct.pack('>BBIQddIII', rng.choice([48, 49, 50, 51, 52, 53, 16, 18, 19, 77]), 0,
                           rng.choice([0, 1, 2, 3, 8, 99, 1 << 31]),
                           rng.choice([serial, 0, serial + 65536, (1 << 64) - 1]),
                           rng.choice(reals), rng.choice(reals), *sizes)
        worker._pipe._sock.sendall(head + b''.join(bodies))
    return 'lived'


@pytest.mark.long
def test_records(tmp_path, total):
    """Odd records of workers: each ends its worker at most, and the others' jobs run."""
    with NodeProcess(tmp_path, cpus=3) as node:
        over, made = threading.Event(), 0
        with Honest(lambda: dispy.JobCluster(square, nodes=[node.address],
                                             loglevel=logging.CRITICAL)) as honest, \
                dispy.JobCluster(nonsense, nodes=[node.address],
                                 loglevel=logging.CRITICAL) as cluster:
            seen, thread = largest(node.process, over)
            try:
                while made < total:
                    jobs = [cluster.submit(made + n, 100) for n in range(10)]
                    assert all(job.wait(60) for job in jobs)
                    made += 1000
            finally:
                over.set()
                thread.join()
        print('%d records; honest jobs %d, the longest %.3f s; memory %d MB'
              % (made, honest.count, honest.worst, seen[-1] >> 20))
        assert node.process.poll() is None and seen[-1] < 150 << 20
