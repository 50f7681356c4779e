"""The other side of a link as release 5.0 has it, written down once and not changed any more:
handshake and frames by `struct` and `hmac` alone, and nothing of dispynode.py, so that a change
there is noticed. What the messages of a release are stands in releases/RELEASE.json;
releases/before-5.0.json has those of minor version 1 of the protocol, which no release has as its
newest.

    python tests/recorded_peer.py RELEASE

writes releases/RELEASE.json (RELEASE is 5.1, say) from the messages and the minor version of this
tree. A release manager does that once, before a release whose minor version is a new one, and
commits the file. Once that release is out, its file is not changed any more: what would change it
takes the next minor version. test_releases.py fails when the messages of the release that is being
prepared have changed since its file was written: then it is to be written anew."""

import hashlib
import hmac
import json
import os
import pickle
import struct
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
MAGIC = b'dispy5\x00\x01'
CLIENT, NODE, SCHEDULER = 1, 2, 3
HELLO = struct.Struct('>8sHHBBH16s32s16s')
CHALLENGE = struct.Struct('>8sHBBI16s32s16s')
PROOF = struct.Struct('>8s32s')
FRAME = struct.Struct('>IBBHQ')


def recorded(release='5.0'):
    with open(os.path.join(HERE, 'releases', release + '.json')) as file:
        return json.load(file)


class RecordedPeer:
    """One end of a connection. `secret` is that of a file: 64 hexadecimal digits."""

    def __init__(self, sock, secret, release='5.0'):
        self._sock = sock
        self._psk = hmac.digest(b'dispy 5 secret', secret, 'sha256')
        found = recorded(release)
        self.minor = found['minor']
        self.ops = {row['name']: row['op'] for row in found['messages']}
        self.fields = {row['name']: row['fields'] for row in found['messages']}
        self._names = {op: name for name, op in self.ops.items()}
        self._sent = self._received = 0
        self.close = sock.close

    def _read(self, size):
        data = b''
        while len(data) < size:
            piece = self._sock.recv(size - len(data))
            if not piece:
                raise EOFError('closed after %d of %d bytes' % (len(data), size))
            data += piece
        return data

    def _agree(self, hello, challenge):
        transcript = hashlib.sha256(b'dispy 5 handshake' + hello + challenge + bytes(32)).digest()

        def key(label):
            return hmac.digest(self._psk, label + b'\0' + transcript + b'\x01', 'sha256')
        self._key = key
        client = hmac.digest(key(b'c finished'), transcript, 'sha256')
        return (PROOF.pack(MAGIC, client),
                PROOF.pack(MAGIC, hmac.digest(key(b's finished'), transcript + client, 'sha256')))

    def dial(self, versions, wanted=NODE):
        """As a client; the minor version that was chosen."""
        hello = HELLO.pack(MAGIC, *versions, CLIENT, wanted, 0, os.urandom(16), os.urandom(32), b'')
        self._sock.sendall(hello)
        challenge = self._read(CHALLENGE.size)
        magic, version = CHALLENGE.unpack(challenge)[:2]
        assert magic == MAGIC, challenge
        proof, finished = self._agree(hello, challenge)
        self._sock.sendall(proof)
        assert self._read(PROOF.size) == finished
        self._send_key, self._receive_key = self._key(b'c2s'), self._key(b's2c')
        return version

    def accept(self, role=NODE):
        """As a node or a scheduler; the minor versions that were offered."""
        hello = self._read(HELLO.size)
        magic, low, high = HELLO.unpack(hello)[:3]
        assert magic == MAGIC and low <= self.minor <= high, hello
        challenge = CHALLENGE.pack(MAGIC, self.minor, role, 0, 1 << 30, os.urandom(16),
                                   os.urandom(32), b'')
        self._sock.sendall(challenge)
        proof, finished = self._agree(hello, challenge)
        assert self._read(PROOF.size) == proof
        self._sock.sendall(finished)
        self._send_key, self._receive_key = self._key(b's2c'), self._key(b'c2s')
        return low, high

    def send(self, name, *fields):
        """A message, all in its envelope."""
        payload = pickle.dumps(fields, 5)
        header = FRAME.pack(len(payload), self.ops[name], 0, 0, 0)
        head = hmac.digest(self._send_key, struct.pack('>QB', self._sent, 0) + header,
                           'sha256')[:16]
        tail = hmac.digest(self._send_key, struct.pack('>QB', self._sent, 1) + header + payload,
                           'sha256')
        self._sent += 1
        self._sock.sendall(header + head + payload + tail)

    def receive(self):
        """(name, fields) of the next message but Pulse."""
        header, tag = self._read(FRAME.size), self._read(16)
        size, op, encoding, _, _ = FRAME.unpack(header)
        payload, tail = self._read(size), self._read(32)
        seq = self._received
        self._received += 1
        assert tag == hmac.digest(self._receive_key, struct.pack('>QB', seq, 0) + header,
                                  'sha256')[:16]
        assert tail == hmac.digest(self._receive_key, struct.pack('>QB', seq, 1) + header + payload,
                                   'sha256')
        buffers = []
        if encoding == 1:
            count, length = struct.unpack_from('>II', payload)
            sizes = struct.unpack_from('>%dQ' % count, payload, 8)
            at = 8 + 8 * count
            payload, rest = payload[at:at + length], payload[at + length:]
            for one in sizes:
                buffers.append(rest[:one])
                rest = rest[one:]
        if self._names[op] == 'Pulse':
            return self.receive()
        return self._names[op], pickle.loads(payload, buffers=buffers)

    def receive_until(self, name):
        """The fields of the next message of this name."""
        while True:
            got, fields = self.receive()
            if got == name:
                return fields


def rows():
    """What is recorded of this release, from the examples of test_wire.py."""
    import dispynode
    import test_wire
    found = []
    result = (1, 1, 0.5, 1.5, dispynode.out_of_band(b'value'), b'out', b'err')
    for message in [*test_wire.EXAMPLES, dispynode.Results('c1', [result])]:
        op, encoding, pieces = dispynode.encode(message)
        payload = b''.join(map(bytes, pieces))
        if len(payload) < 4096:
            found.append({'op': op, 'name': type(message).__name__, 'fields': list(message._fields),
                          'encoding': encoding, 'payload': payload.hex()})
    return found


if __name__ == '__main__':
    sys.path[:0] = [HERE, os.path.dirname(HERE), os.path.join(HERE, 'unit')]
    from dispynode import VERSIONS
    with open(os.path.join(HERE, 'releases', sys.argv[1] + '.json'), 'w') as output:
        json.dump({'release': sys.argv[1], 'minor': VERSIONS[1], 'messages': rows()}, output,
                  indent=1)
        output.write('\n')
