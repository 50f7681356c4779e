"""A TCP proxy on loopback that does to a connection what networks do.

    client ==UP==> proxy ==UP==> node
           <=DOWN=       <=DOWN=

One thread accepts; two threads for each connection copy, one each way.

Faults come at once (`cut`, `hold`, `refuse`), or at a byte: `at(n, fault, way)` arms one that
strikes the first connection on which byte n (from 0) of that way comes by, and that one alone.
"""

import collections
import contextlib
import socket
import struct
import threading

UP, DOWN = 'up', 'down'
CHUNK = 65536


class Connection:
    """One client's: `sent` counts the bytes passed on and `recorded` holds them, by way."""

    def __init__(self, proxy, client, server):
        self.proxy = proxy
        self.sent = {UP: 0, DOWN: 0}
        self.recorded = {UP: bytearray(), DOWN: bytearray()}
        self._ends = {UP: (client, server), DOWN: (server, client)}
        self._writing = {UP: threading.Lock(), DOWN: threading.Lock()}
        self._lock = threading.Lock()   # guards those below
        self._copying = 2               # threads
        self.is_open = True
        self.forgotten = False          # what comes is dropped, without a word
        self.threads = [threading.Thread(target=self._copy, args=(way,), name='proxy-' + way)
                        for way in (UP, DOWN)]

    def start(self):
        for thread in self.threads:
            thread.start()

    def _copy(self, way):
        source, target = self._ends[way]
        try:
            while True:
                with contextlib.suppress(socket.timeout):
                    data = source.recv(CHUNK)
                    if not data:
                        break
                    self.proxy._pass_on(self, way, data)   # once it was cut, what comes is dropped
            if self.is_open:
                target.shutdown(socket.SHUT_WR)
        except OSError:
            self.cut()   # the other thread ends as well
        with self._lock:
            self._copying -= 1
            if not self._copying:
                self.is_open = False
                for sock in self._ends[UP]:
                    sock.close()

    def write(self, way, data):
        """These bytes, as if they had been sent. Any thread."""
        with self._writing[way]:
            if self.proxy.record:
                self.recorded[way] += data
            view = memoryview(data)
            while view and self.is_open:
                with contextlib.suppress(socket.timeout):   # the other side does not read
                    count = self._ends[way][1].send(view)
                    view = view[count:]
                    self.sent[way] += count

    def cut(self, reset=True):
        """Both sides see its end: by a reset, before which bytes on the way may be lost, or in good
        order. Any thread."""
        with self._lock:
            self.is_open = False
            for sock in self._ends[UP] if self._copying else ():
                if reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                with contextlib.suppress(OSError):   # the other side was first
                    # SHUT_RD wakes the thread that reads there, and tells the other side nothing
                    # until it is closed.
                    sock.shutdown(socket.SHUT_RD if reset else socket.SHUT_WR)


class Proxy:
    """`with Proxy(node.address) as proxy:`, and `nodes=[proxy.address]`.

    delay: seconds that every piece waits; rate: bytes a second, each way of each connection (None:
    no limit); record: keep what was passed on. All may be changed at any time."""

    def __init__(self, to, delay=0.0, rate=None, record=False):
        self.to, self.delay, self.rate, self.record = to, delay, rate, record
        self.connections = []          # all there ever were
        self._faults = {UP: collections.deque(), DOWN: collections.deque()}
        self._lock = threading.Lock()
        self._swallowed = frozenset()
        self._flows, self._ended = threading.Event(), threading.Event()
        self._flows.set()
        self._listener = self._accepting = None
        self.address = ('127.0.0.1', 0)

    def __enter__(self):
        self.accept()
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        """All connections are cut. May be called twice."""
        self._ended.set()
        self._flows.set()
        self.refuse()
        for connection in self.connections:
            connection.cut()
            for thread in connection.threads:
                thread.join(20)

    # -- new connections ---------------------------------------------------------------------------

    @property
    def count(self):
        """How many connections were made through it."""
        return len(self.connections)

    @property
    def open(self):
        """The connections that have not been cut."""
        return [connection for connection in self.connections if connection.is_open]

    def refuse(self):
        """No new connections: nothing listens. Those that stand go on."""
        if self._listener is None:
            return
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)   # wakes the thread; not everywhere, so:
        with contextlib.suppress(OSError), socket.create_connection(self.address, 1):
            pass
        self._accepting.join(20)
        self._listener = None

    def accept(self):
        """New connections again, at the same address."""
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(self.address)
        self._listener.listen(64)
        self.address = self._listener.getsockname()
        self._accepting = threading.Thread(target=self._accept, args=(self._listener,),
                                           name='proxy-accept')
        self._accepting.start()

    def _accept(self, listener):
        with listener:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return   # refuse() was called
                try:
                    server = socket.create_connection(self.to, 10)
                except OSError:
                    client.close()   # as far as a proxy can tell it: accepted, then closed
                    continue
                for sock in (client, server):
                    sock.settimeout(0.1)   # so often a thread looks whether its connection was cut
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections.append(Connection(self, client, server))
                self.connections[-1].start()

    # -- faults ------------------------------------------------------------------------------------

    def cut(self, reset=True):
        """Every connection is closed now."""
        for connection in self.open:
            connection.cut(reset)

    def hold(self):
        """Nothing is passed on from now on, and nothing is closed."""
        self._flows.clear()

    def resume(self):
        self._flows.set()

    def forget(self):
        """As a NAT that has forgotten, or after a change of address: what comes on the connections
        so far is dropped without a word, new ones flow."""
        for connection in self.open:
            connection.forgotten = True

    def swallow(self, *ways):
        """What comes these ways is read and dropped, on all connections; without ways it flows
        again, on new connections."""
        self._swallowed = frozenset(ways)
        if not ways:
            self.forget()   # a stream with a gap is of no use

    def at(self, byte, fault, way=UP):
        """Arm a fault: 'cut' (all bytes before this one arrive, then the end), 'reset', 'hold',
        'flip' (the lowest bit of that byte), or ('repeat', n): the n bytes before this one are sent
        once more. Faults of a way are armed in the order of their bytes."""
        kind = fault[0] if isinstance(fault, tuple) else fault
        if kind not in ('cut', 'reset', 'hold', 'flip', 'repeat'):
            raise ValueError('%r is no fault' % (fault,))
        with self._lock:
            self._faults[way].append((byte, kind, fault[1] if kind == 'repeat' else 0))
        if kind == 'repeat':
            self.record = True

    @property
    def armed(self):
        """How many faults have not struck yet."""
        with self._lock:
            return sum(map(len, self._faults.values()))

    def _pass_on(self, connection, way, data):
        """These bytes, with what is to happen to them. A thread a connection and way."""
        if connection.forgotten or way in self._swallowed:
            return
        while data and connection.is_open:
            self._flows.wait()
            if self.delay:
                self._ended.wait(self.delay)
            piece = data if self.rate is None else data[:max(1, int(self.rate / 20))]
            if self.rate is not None:
                self._ended.wait(len(piece) / self.rate)
            piece, fault, length = self._next_fault(connection, way, piece)
            data = data[len(piece):]
            if fault == 'flip':
                piece, data = piece + bytes([data[0] ^ 1]), data[1:]
            connection.write(way, piece)
            if fault in ('cut', 'reset'):
                connection.cut(reset=fault == 'reset')
            if fault == 'hold':
                self.hold()
            if fault == 'repeat':
                connection.write(way, bytes(connection.recorded[way][-length:]))

    def _next_fault(self, connection, way, data):
        """What goes before the fault that strikes in these bytes, and the fault."""
        with self._lock:
            faults = self._faults[way]
            if faults:
                byte, kind, length = faults[0]
                here = byte - connection.sent[way]
                if 0 <= here < len(data):
                    faults.popleft()
                    return data[:here], kind, length
        return data, None, 0
