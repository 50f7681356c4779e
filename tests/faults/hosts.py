"""Hosts of a test: network namespaces on a bridge, each with real processes, an own name, home and
secret.

    host a     host b     router ---- host c (nat=True: it reaches a and b, nothing reaches it)
       |          |          |
    ---+----------+----------+---  bridge in a namespace of its own: 10.97.0.0/24, fd97::/64

A namespace is held by a process that reads its stdin. When that closes, in whatever way the test
ends, it kills what still runs in the namespace and removes the host's directory; then the namespace
and its interfaces are gone as well. Nothing has a name outside, so that runs beside one another do
not meet, and no packet leaves the machine.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap

import pytest

from conftest import ROOT
from nodes import NodeProcess

TOOLS = ('ip', 'nft', 'nsenter', 'unshare', 'mount', 'env')
SECRET = 'd15b' * 16   # as dispy makes one

# $1: directory, $2: name. /proc/sys/net is the namespace's; without accept_dad=0 addresses cannot
# be used for a second or two.
SET_UP = '''
set -e
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
for kind in all default; do echo 0 > /proc/sys/net/ipv6/conf/$kind/accept_dad; done
ip link set lo up
exec "$3" -S -c "$4" "$1" "$2"
'''
HOLD = '''
import os, shutil, signal, socket, sys, time
directory, name = sys.argv[1:]
socket.sethostname(name)
print('ready', flush=True)
sys.stdin.read()
mine, until, left = os.readlink('/proc/self/ns/net'), time.monotonic() + 10, True
while left and time.monotonic() < until:
    left = False
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            if int(pid) != os.getpid() and os.readlink('/proc/%s/ns/net' % pid) == mine:
                left = True
                os.kill(int(pid), signal.SIGKILL)
        except OSError:
            pass   # it has ended meanwhile
    time.sleep(0.01)
shutil.rmtree(directory, True)
'''


def _missing():
    """Why there can be no hosts here, or ''."""
    if not sys.platform.startswith('linux') or os.geteuid() != 0:
        return 'network namespaces need root on Linux'
    tools = [tool for tool in TOOLS if not shutil.which(tool)]
    if tools:
        return 'not installed: %s' % ', '.join(tools)
    if not os.path.exists('/proc/net/if_inet6'):
        return 'this kernel has no IPv6'
    probe = subprocess.run(['unshare', '--net', '--mount', '--uts', 'true'], stderr=subprocess.PIPE,
                           universal_newlines=True)
    return 'namespaces are not allowed here: %s' % probe.stderr.strip() if probe.returncode else ''


class Namespace:
    """A network, mount and UTS namespace, and the processes in it."""

    def __init__(self, name):
        self.name = name
        self.directory = tempfile.mkdtemp(prefix='dispy-host-%s-' % name)
        self._processes = []
        self.write('nsswitch.conf', 'hosts: files\n')
        self.write('hosts', '127.0.0.1 localhost\n::1 localhost\n')
        self._holder = subprocess.Popen(
            ['unshare', '--net', '--mount', '--uts', 'sh', '-c', SET_UP, 'sh', self.directory, name,
             sys.executable, HOLD],
            # Ctrl-C must not end it first
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.pid = self._holder.pid
        if not self._holder.stdout.readline():
            self.close()
            raise OSError('the namespace %s cannot be made; see stderr' % name)

    def write(self, name, text, mode=0o600):
        """A file in the host's directory, with this text. Returns its path."""
        path = os.path.join(self.directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        # In place: what is mounted over /etc/hosts must stay the same file
        with open(path, 'w') as file:
            file.write(text)
        os.chmod(path, mode)
        return path

    def read(self, name):
        """The text of such a file."""
        with open(os.path.join(self.directory, name)) as file:
            return file.read()

    def popen(self, argv, env=None, **options):
        """subprocess.Popen in this namespace and the host's directory; `env` comes on top of the
        host's own. The process has the `pid` of what was started, nothing to read unless `stdin` is
        given, and is killed at the end."""
        options.setdefault('stdin', subprocess.DEVNULL)
        inside = ['nsenter', '--target', str(self.pid), '--net', '--mount', '--uts', 'env',
                  '--chdir=' + self.directory]
        process = subprocess.Popen(inside + [str(arg) for arg in argv],
                                   env=dict(self.environment(), **(env or {})), **options)
        self._processes.append(process)
        return process

    def environment(self):
        return dict(os.environ)

    def run(self, argv, timeout=60, exit_code=0, input=None, **options):
        """Its output, stdout and stderr, when it has ended with this exit code (None: any)."""
        process = self.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, universal_newlines=True, **options)
        try:
            output, _ = process.communicate(input, timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError('%s: %s did not end within %s '
                                 's:\n%s' % (self.name, argv, timeout, output)) from None
        assert exit_code in (None, process.returncode), '%s: %s ended with %d:\n%s' % (
            self.name, argv, process.returncode, output)
        return output

    def commands(self, text):
        """Lines for `sh`, in the namespace."""
        self.run(['sh', '-e', '-c', text])

    def processes(self):
        """The IDs of all that runs in the namespace."""
        found = []
        for pid in filter(str.isdigit, os.listdir('/proc')):
            try:
                if os.readlink('/proc/%s/ns/net' % pid) == os.readlink('/proc/%d/ns/net'
                                                                       % self.pid):
                    found.append(int(pid))
            except OSError:
                pass   # it has ended meanwhile
        return [pid for pid in found if pid != self.pid]

    def close(self):
        """Everything in it ends; the directory goes. May be called twice."""
        self._holder.stdin.close()
        self._holder.wait(20)
        self._holder.stdout.close()
        for process in self._processes:
            process.wait(20)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        shutil.rmtree(self.directory, True)


class Host(Namespace):
    """A host: `name`, `ip`, `ip6`, and the calls below. Its interface is eth0; `uplink` is the
    namespace, and `port` the interface there, at the other end of its cable. Packets are counted
    and dropped as they arrive at either end, so that the sender sees no error."""

    def __init__(self, name, uplink, ip, ip6, secret=SECRET):
        super().__init__(name)
        self.uplink, self.ip, self.ip6 = uplink, ip, ip6
        self.port = 'to-' + name[:12]   # 15 characters at most
        self._scripts = itertools.count(1)
        self.etc_hosts({name: ip})
        if secret is not None:
            self.secret_file = self.write('home/.config/dispy/secret', secret + '\n')

    def wire(self):
        """The cable, the addresses, and what counts and drops packets."""
        self.uplink.commands('ip link add %s type veth peer name eth0 netns %d'
                             % (self.port, self.pid))
        # No route leads to other networks: from outside, a host behind NAT cannot be reached.
        link_local = 'fe80::' + self.ip6.split('::')[1]
        self.commands("""
            ip link set eth0 addrgenmode none
            ip addr add {}/24 brd + dev eth0; ip addr add {}/64 dev eth0
            ip addr add {}/64 dev eth0; ip link set eth0 up
            ip route add broadcast 255.255.255.255 dev eth0
            ip route add multicast 224.0.0.0/4 dev eth0
            """.format(self.ip, self.ip6, link_local))
        # What it sends to all or to a group is looped back to it, at eth0 as well: that did not
        # come by cable.
        own = 'ip saddr %s accept\nip6 saddr { %s, %s } accept' % (self.ip, self.ip6, link_local)
        self.run(['nft', '-f', '-'], input=self._watch('eth0', own))
        self.uplink.run(['nft', '-f', '-'], input=self._watch(self.port))

    @staticmethod
    def _watch(device, first=''):
        kinds = (('udp', 'meta l4proto udp'),
                 ('broadcast', 'meta l4proto udp meta pkttype broadcast'),
                 ('multicast', 'meta l4proto udp meta pkttype multicast'),
                 ('tcp', 'meta l4proto tcp'), ('connects', 'tcp flags & (syn | ack) == syn'))
        return """
            table netdev %s {
                %s
                chain drops { }
                chain arrivals {
                    type filter hook ingress device "%s" priority 0;
                    %s
                    %s
                    jump drops
                }
            }""" % (device, '\n'.join('counter n_%s { }' % name for name, _ in kinds), device,
                    first,
                    '\n'.join('%s counter name n_%s' % (match, name) for name, match in kinds))

    def environment(self):
        """As a user of that host has it: a home with the secret, and none of the test-suite's own
        settings."""
        kept = {name: value
                for name, value in os.environ.items() if not name.startswith(('DISPY_', 'XDG_'))}
        home = os.path.join(self.directory, 'home')
        os.makedirs(home, exist_ok=True)
        return dict(kept, HOME=home, PYTHONPATH=ROOT, TMPDIR=self.directory, PYTHONUNBUFFERED='1')

    def etc_hosts(self, names):
        """What names mean to this host: {name: address}."""
        self.write('hosts', '127.0.0.1 localhost\n::1 localhost\n' +
                   ''.join('%s %s\n' % (address, name) for name, address in names.items()), 0o644)

    # -- processes ---------------------------------------------------------------------------------

    def node(self, *options, cpus=2, port=9701, directory='node', **more):
        """The real dispynode.py here, when it serves: a NodeProcess (`address`, `port`, `log()`,
        `stop()`, `kill()`)."""
        return NodeProcess(os.path.join(self.directory, directory), *options, cpus=cpus, port=port,
                           host=self.ip, listen=(), start=self.popen, **more)

    def script(self, code):
        """A file with this code. Returns its path."""
        return self.write('script-%d.py' % next(self._scripts), textwrap.dedent(code))

    def python(self, code, *args, **options):
        """Run this code as a program with these arguments. Its output, as `run` gives it."""
        return self.run([sys.executable, self.script(code), *args], **options)

    def start_python(self, code, *args, **options):
        """The same, but a Popen at once, its output in the pipe `stdout`."""
        return self.popen([sys.executable, self.script(code), *args], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, **options)

    # -- the network -------------------------------------------------------------------------------

    def drop(self, match='', sent=True, received=True):
        """Packets are lost without a word from now on: all, or those that an nft expression matches
        ('meta l4proto udp', 'ip saddr 10.97.0.3', 'tcp dport 9701', 'numgen random mod 100 < 30'),
        of those it sends, or is sent, or both."""
        for namespace, device, wanted in ((self.uplink, self.port, sent), (self, 'eth0', received)):
            if wanted:
                namespace.run(['nft', 'add rule netdev %s drops %s drop' % (device, match)])

    def lose_long(self, size=1400, sent=True, received=True):
        """Packets of more bytes are lost without a word, as where a link has a smaller MTU than the
        interfaces on both sides of it and ICMP is dropped. All packets from now on are as long as
        they are on a cable: the two ends hand over no longer ones."""
        self.commands('ip link set dev eth0 gso_max_segs 1')
        self.uplink.commands('ip link set dev %s gso_max_segs 1' % self.port)
        self.drop('meta length > %d' % size, sent, received)

    def cut(self, sent=True, received=True):
        """The cable is cut: both ways, or one."""
        self.drop('', sent, received)

    def drop_udp(self):
        self.drop('meta l4proto udp')

    def mend(self):
        """Nothing is dropped any more."""
        for namespace, device in ((self.uplink, self.port), (self, 'eth0')):
            namespace.run(['nft', 'flush chain netdev %s drops' % device])

    def packets(self):
        """Packets that crossed its cable so far, dropped ones too: {'udp_sent': n, 'udp_received':
        n, ...} for udp, broadcast and multicast (UDP to all, to a group), tcp, and connects (first
        packets of TCP connections, repeated ones too)."""
        found = {}
        for namespace, device, way in ((self.uplink, self.port, 'sent'),
                                       (self, 'eth0', 'received')):
            listed = json.loads(
                namespace.run(['nft', '-j', 'list counters table netdev ' + device]))
            for row in listed['nftables']:
                if 'counter' in row:
                    found['%s_%s' % (row['counter']['name'][2:], way)] = row['counter']['packets']
        return found


class Hosts:
    """`with Hosts() as hosts:` - a bridge; the test is skipped, with the reason, where there can be
    none."""

    def __init__(self):
        self._namespaces = []
        self._numbers = iter(range(1, 200))
        self._switch = None

    def __enter__(self):
        missing = _missing()
        if missing:
            pytest.skip(missing)
        try:
            self._switch = self._add(Namespace('switch'))
            # Without mcast_snooping=0 a group reaches only those who have told the bridge that they
            # are in it.
            self._switch.commands('ip link add lan type bridge mcast_snooping '
                                  '0; ip link set lan up')
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        while self._namespaces:
            self._namespaces.pop().close()

    def _add(self, namespace):
        self._namespaces.append(namespace)
        return namespace

    def host(self, name, secret=SECRET, nat=False):
        """One more host. `secret` is in its secret file (None: it has none). With `nat` it has a
        network of its own behind a router, `uplink`, which masquerades what it sends (`uplink.ip`
        is seen by others) and lets nothing in."""
        number = next(self._numbers)
        if nat:
            return self._behind_router(name, number, secret)
        host = self._add(Host(name, self._switch, '10.97.0.%d' % number, 'fd97::%x' % number,
                              secret))
        host.wire()
        self._switch.commands('ip link set {0} master lan; ip link set {0} up'.format(host.port))
        return host

    def _behind_router(self, name, number, secret):
        router = self.host('router-%d' % number, None)
        host = self._add(Host(name, router, '10.98.%d.2' % number, 'fd98:%x::2' % number, secret))
        host.wire()
        router.commands("""
            ip link set {port} up; ip addr add 10.98.{n}.1/24 dev {port}
            ip addr add fd98:{n:x}::1/64 dev {port}
            echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
            """.format(port=host.port, n=number))
        router.run(['nft', '-f', '-'], input="""
            table inet nat {
                chain out { type nat hook postrouting priority 100; oifname "eth0" masquerade; }
                chain through {
                    type filter hook forward priority 0; iifname "eth0" ct state new drop;
                }
            }""")
        host.commands('ip route add default via 10.98.{0}.1; ip route '
                      'add default via fd98:{0:x}::1'.format(number))
        return host
