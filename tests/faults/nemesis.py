"""A seeded sequence of faults: nodes that are killed, started again and stopped, connections that
are cut and healed; of a node that is part of this program, processes that are killed and
stopped."""

import contextlib
import random
import signal
import threading

import psutil

from nodes import NodeProcess
from proxy import Proxy

FAULTS = ('kill', 'stop', 'cut', 'hold')
OWN_FAULTS = ('kill worker', 'kill runner', 'stop worker', 'stop runner')


class Nemesis:
    """`count` nodes, each behind a proxy, of which one suffers every `every` seconds, and recovers
    before its turn comes again. What happens, and to which, depends on the seed alone: `history`
    has it as (fault, node) pairs.

    with Nemesis(directory, seed=1) as nemesis:
        cluster = JobCluster(..., nodes=nemesis.addresses, reentrant=True)
        nemesis.start()
        ...
        nemesis.end()          # all nodes run, all connections flow
    """

    def __init__(self, directory, seed, count=4, every=3.0, faults=FAULTS, cpus=1):
        self.every, self.history, self.seed = every, [], seed
        self._random, self._faults, self._cpus = random.Random(seed), faults, cpus
        self._over = threading.Event()
        self._thread = None
        self.failed = None      # what ended the thread
        self.nodes = [NodeProcess('%s/node-%d' % (directory, number), '--name', 'node-%d' % number,
                                  cpus=cpus) for number in range(count)]
        self.proxies = [Proxy(node.address) for node in self.nodes]
        for proxy in self.proxies:
            proxy.accept()

    @property
    def addresses(self):
        return [proxy.address for proxy in self.proxies]

    @property
    def pids(self):
        """Of the daemons."""
        return [node.process.pid for node in self.nodes]

    def start(self):
        self._thread = threading.Thread(target=self._run, name='nemesis')
        self._thread.start()

    def _run(self):
        try:
            while not self._over.wait(self.every):
                number, fault = (self._random.randrange(len(self.nodes)),
                                 self._random.choice(self._faults))
                lasts = self._random.choice((0.0, 0.2, 0.5, 0.9)) * self.every
                self.history.append((fault, number, lasts))
                getattr(self, '_' + fault)(number, lasts)
        except BaseException as exc:   # the test tells
            self.failed = exc

    def _kill(self, number, lasts):
        self.nodes[number].kill()
        self._over.wait(lasts)
        node = self.nodes[number]
        self.nodes[number] = NodeProcess(node.directory, '--name', 'node-%d' % number,
                                         cpus=self._cpus, port=node.port)

    def _stop(self, number, lasts):
        self.nodes[number].process.send_signal(signal.SIGSTOP)
        self._over.wait(lasts)
        self.nodes[number].process.send_signal(signal.SIGCONT)

    def _cut(self, number, lasts):
        self.proxies[number].refuse()
        self.proxies[number].cut()
        self._over.wait(lasts)
        self.proxies[number].accept()

    def _hold(self, number, lasts):
        self.proxies[number].hold()
        self._over.wait(lasts)
        self.proxies[number].resume()

    def end(self):
        """No more faults; what had one is well again. Raises what went wrong."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(60)
        if self.failed is not None:
            raise AssertionError('nemesis, seed %d, '
                                 'after %s' % (self.seed, self.history)) from self.failed

    def close(self):
        self._over.set()
        if self._thread is not None:
            self._thread.join(60)
        for proxy in self.proxies:
            proxy.close()
        for node in self.nodes:
            node.stop()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class OwnNemesis(Nemesis):
    """The same for the node of this program, which has a runner and its workers for processes."""

    def __init__(self, directory, seed, every=3.0, faults=OWN_FAULTS):
        self.every, self.history, self.seed = every, [], seed
        self._random, self._faults = random.Random(seed), faults
        self._over = threading.Event()
        self._thread = self.failed = None
        self.nodes, self.proxies = [None], []

    addresses = 'local'
    pids = ()

    def _run(self):
        try:
            while not self._over.wait(self.every):
                fault = self._random.choice(self._faults)
                lasts = self._random.choice((0.0, 0.2, 0.5, 0.9)) * self.every
                self.history.append((fault, 0, lasts))
                verb, which = fault.split()
                with contextlib.suppress(psutil.NoSuchProcess, IndexError):   # none there now
                    self._strike(verb, which, lasts)
        except BaseException as exc:   # the test tells
            self.failed = exc

    def _strike(self, verb, which, lasts):
        process = [child for child in psutil.Process().children()
                   if 'runner_start' in ' '.join(child.cmdline())][0]
        if which == 'worker':
            process = self._random.choice(process.children())
        if verb == 'kill':
            process.kill()
            return
        process.suspend()
        self._over.wait(lasts)
        process.resume()

    def close(self):
        self._over.set()
        if self._thread is not None:
            self._thread.join(60)


def nemesis(seed, directory, **options):
    """A Nemesis of this seed."""
    return Nemesis(directory, seed, **options)
