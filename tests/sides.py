"""Both sides of a handshake: one in the thread of the test, one in another."""

import threading

from dispynode import Role, handshake_dial

PSK, OTHER_PSK = b'k' * 32, b'K' * 32
CLIENT, NODE = b'client instance.', b'instance of node'


class Side(threading.Thread):
    """One side in a thread of its own: `result` or `error` when it has ended; the socket is closed
    after an error."""

    def __init__(self, call, sock, *args, **named):
        super().__init__(daemon=True)
        self.result = self.error = None
        self._call, self._sock, self._args, self._named = call, sock, args, named
        self.start()

    def run(self):
        try:
            self.result = self._call(self._sock, *self._args, **self._named)
        except Exception as exc:   # told to the test
            self.error = exc
            self._sock.close()

    def ended(self):
        self.join(10)
        assert not self.is_alive()
        return self


def dial(sock, psk=PSK, **named):
    return handshake_dial(sock, psk, Role.CLIENT, Role.NODE, CLIENT, **named)
