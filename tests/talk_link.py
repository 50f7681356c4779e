"""A conversation with a daemon in its protocol, message by message."""

import logging
import os

import dispy
from dispynode import FrameDecoder, FrameEncoder, Role, derive_key, dial


class Talk:
    """A small client of the protocol: says messages, hears answers."""

    def __init__(self, port, secret=None, role=Role.CLIENT, wanted=Role.SCHEDULER, instance=None):
        secret = os.environ['DISPY_SECRET'] if secret is None else secret
        arrival = dial('127.0.0.1', port, derive_key(secret.encode()), role, wanted, instance
                       or os.urandom(16))
        self.sock = arrival.sock
        self.sock.settimeout(20)
        self._sealer, self._opener = (FrameEncoder(arrival.session.send_key),
                                      FrameDecoder(arrival.session.receive_key))
        self._units = []

    def say(self, *messages):
        for message in messages:
            self.sock.sendall(b''.join(map(bytes, self._sealer.seal(message))))

    def hear(self, *kinds):
        """The next message of these kinds; EOFError when the link ends."""
        while True:
            while not self._units:
                count = self.sock.recv_into(self._opener.get_buffer())
                if not count:
                    raise EOFError
                self._units += self._opener.buffer_updated(count)
            message = self._opener.open(*self._units.pop(0))
            if not kinds or isinstance(message, kinds):
                return message

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.sock.close()


def spec(**changes):
    """A computation as a client of this version sends it."""
    cluster = dispy.SharedJobCluster(answer, scheduler_port=1, loglevel=logging.CRITICAL)
    made = dict(dispy.core_of(cluster).packed.spec, modules=[],
                code=bytes(dispy.core_of(cluster).packed.spec['code']), files=[])
    made['shared'] = dict(made['shared'])
    cluster.close(terminate=True)
    return dict(made, **changes)


def answer(n=0):
    return 42
