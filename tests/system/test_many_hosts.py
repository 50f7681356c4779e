"""Nodes that are found, that dial, that are shared, and those that cannot be used: each on a host
of its own."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from conftest import eventually
from hosts import Hosts

# Prints a line a node that is ready, when so many are, or why not; then, as JSON, all nodes that
# the cluster knows. Words of the command line: how many nodes, options of the cluster, seconds; and
# these again for each further cluster.
FIND = '''
    import json, sys
    import dispy

    def where():
        import socket
        return socket.gethostname()

    def find(wanted, options, seconds):
        with dispy.JobCluster(where, **json.loads(options)) as cluster:
            try:
                cluster.wait_nodes(int(wanted), timeout=float(seconds))
                nodes = cluster.status().nodes
                ready = [node for node in nodes if node.state == 'ready']
                ran = [cluster.submit_node(node, ) for node in ready]
                print(*sorted('%s %s %d %s' % (node.name, node.ip_addr, node.port, job())
                              for node, job in zip(ready, ran)), sep='\\n')
            except dispy.NoNodes as exc:
                print(exc)
            print(json.dumps([[node.name, node.ip_addr, node.port, node.state, node.reason]
                              for node in cluster.status().all_nodes]))

    for place in range(1, len(sys.argv), 3):
        if place > 1:
            print('next', flush=True)
        find(*sys.argv[place:place + 3])
'''
# Holds its nodes until its stdin ends: says which, as they come.
HOLD = '''
    import json, sys, threading
    import dispy

    def status(status, node, job):
        if job is None:
            print({dispy.DispyNode.Initialized: 'ready', dispy.DispyNode.Closed: 'closed'}.get(
                status), node.name, flush=True)

    def where(seconds=0):
        import socket, time
        time.sleep(seconds)
        return socket.gethostname()

    with dispy.JobCluster(where, cluster_status=status, **json.loads(sys.argv[1])) as cluster:
        print('open', flush=True)
        for line in sys.stdin:
            if line.strip() == 'status':
                print(json.dumps([[node.name, node.ip_addr, node.port, node.state, node.reason]
                                  for node in cluster.status().all_nodes]), flush=True)
            elif line.strip() == 'jobs':
                print(*sorted(cluster.map(range(0, 1))), flush=True)
            else:
                cluster.submit(float(line))
'''


@pytest.fixture
def hosts():
    with Hosts() as made:
        yield made


def find(at, wanted, timeout=15, env=None, **options):
    """(lines of nodes that were used or why none was, rows of all that are known)."""
    *lines, rows = at.python(FIND, wanted, json.dumps(options), timeout, env=env).splitlines()
    return lines, json.loads(rows)


class Holder:
    """A client that stays, in a host; what it says on stdout and stderr is in `heard`."""

    def __init__(self, at, env=None, **options):
        self._at, self._name = at, 'client-%d.log' % id(self)
        with open(at.write(self._name, ''), 'ab') as log:
            self.process = at.popen([sys.executable, at.script(HOLD), json.dumps(options)],
                                    stdin=subprocess.PIPE, env=env,
                                    stdout=log, stderr=subprocess.STDOUT)
        self.waits_for('open')

    def heard(self):
        return self._at.read(self._name)

    def waits_for(self, text, seconds=20.0, times=1):
        eventually(lambda: self.heard().count(text) >= times or self.process.poll() is not None,
                   seconds, '%r in %s' % (text, self.heard()))
        assert self.heard().count(text) >= times, self.heard()

    def say(self, line):
        self.process.stdin.write(line.encode() + b'\n')
        self.process.stdin.flush()

    def status(self):
        before = self.heard().count('\n[')
        self.say('status')
        eventually(lambda: self.heard().count('\n[') > before)
        return json.loads(self.heard().rpartition('\n[')[2].partition('\n')[0].join(('[', '')))

    def end(self):
        self.process.stdin.close()
        return self.process.wait(20)


# -- discovery -------------------------------------------------------------------------------------

@pytest.mark.parametrize('nodes', (None, '*'))
def test_all_nodes_of_a_network_are_found(hosts, nodes):
    client = hosts.host('client')
    far = [hosts.host('far%d' % number) for number in range(3)]
    for host in far:
        host.node(cpus=1)
    lines, rows = find(client, 3, nodes=nodes)
    assert lines == ['%s %s 9701 %s' % (host.name, host.ip, host.name)
                     for host in far], (lines, rows)
    assert all(packets['connects_sent'] == 0 for packets in (host.packets() for host in far))


def test_the_order_of_start_does_not_matter(hosts):
    client, far = hosts.host('client'), hosts.host('far')
    holder = Holder(client, nodes='*')
    eventually(lambda: client.packets()['broadcast_sent'] > 2)
    node = far.node()
    holder.waits_for('ready far', 5)     # by its greeting: the client asks less and less often
    assert node.stop() == 0
    holder.waits_for('closed far')
    node = far.node()                    # another instance at the same address
    holder.waits_for('ready far', times=2)
    node.kill()
    holder.waits_for('closed far', times=2)
    node = far.node()
    holder.waits_for('ready far', times=3)
    assert holder.end() == 0
    assert find(client, 1, nodes='*')[0] == ['far %s 9701 far' % far.ip]   # node first
    node.stop()


def test_a_node_that_greets_while_the_client_asks_seldom(hosts):
    client, far = hosts.host('client'), hosts.host('far')
    holder = Holder(client, nodes='*', ping_interval=3600)
    eventually(lambda: client.packets()['broadcast_sent'] >= 6)   # after 6 s; the next is 6 s later
    far.node()
    holder.waits_for('ready far', 5)
    holder.end()


def test_several_nodes_on_one_host(hosts):
    client, far = hosts.host('client'), hosts.host('far')
    nodes = [far.node('--name', 'n%d' % number, port=port, directory='n%d' % number, cpus=1)
             for number, port in enumerate((0, 0, 9801, 9802))]
    lines, rows = find(client, 4, nodes='*')
    assert lines == ['n%d %s %d far' % (number, far.ip, node.port)
                     for number, node in enumerate(nodes)], rows
    assert {node.port for node in nodes} >= {9801, 9802} and 9701 not in [node.port
                                                                          for node in nodes]
    assert find(client, 1, nodes='*', dispy_port=9802)[0][0].startswith('n3')
    nodes.append(far.node('--name', 'n4', directory='n4', cpus=1))
    assert len(find(client, 5, nodes='*')[0]) == 5


def test_a_node_at_another_port_greets_those_who_ask_there(hosts):
    client, far = hosts.host('client'), hosts.host('far')
    holder = Holder(client, nodes='*', dispy_port=9801, ping_interval=3600)
    eventually(lambda: client.packets()['broadcast_sent'] >= 6)
    far.node(port=9801)
    holder.waits_for('ready far', 5)
    holder.end()


def test_wildcards_choose_by_address_and_by_name(hosts):
    client = hosts.host('client')
    far = [hosts.host(name) for name in ('lab1', 'lab2', 'attic')]
    for host in far:
        host.node(cpus=4)
    assert [line.split()[0] for line in find(client, 2, nodes=['lab*'])[0]] == ['lab1', 'lab2']
    assert [line.split()[0] for line in find(client, 1, nodes=[far[2].ip + '*'])[0]] == ['attic']
    before = [host.packets()['connects_received'] for host in far]
    lines, rows = find(client, 1, nodes=['10.97.0.4*', '10.99.*'])
    assert [line.split()[0] for line in lines] == ['attic'] and len(rows) == 1
    assert ([host.packets()['connects_received'] for host in far][:2]
            == before[:2]), 'an unlisted node was dialled'
    # The first element that fits counts, of an address and a name too.
    lines, rows = find(client, 2, nodes=[['zzz*', 9701, 1], ['lab*', 9701, 2]])
    assert len(lines) == 2


def test_no_datagram_and_no_other_node_without_a_wildcard(hosts):
    client, far, other = hosts.host('client'), hosts.host('far'), hosts.host('other')
    far.node()
    other.node()   # its greeting is heard by nobody
    lines, rows = find(client, 1, nodes=[far.ip])
    assert lines == ['far %s 9701 far' % far.ip] and len(rows) == 1
    assert client.packets()['udp_sent'] == client.packets()['multicast_sent'] == 0
    assert other.packets()['connects_received'] == 0


@pytest.mark.parametrize('nodes', (None, '*'))
def test_with_every_datagram_dropped_named_nodes_are_used(hosts, nodes):
    client, far = hosts.host('client'), hosts.host('far')
    for host in (client, far):
        host.drop_udp()
    far.node()
    options = {'nodes': [far.ip]} if nodes else {'nodes': [far.ip, '*']}
    assert find(client, 1, **options)[0] == ['far %s 9701 far' % far.ip]
    lines, rows = find(client, 1, 2, nodes='*')
    assert 'UDP port 9701 of the local network' in lines[-1] and rows == []


def test_ipv6_alone(hosts):
    client, far = hosts.host('client'), hosts.host('far')
    for host in (client, far):
        host.commands('ip addr del %s/24 dev eth0' % host.ip)
    far.etc_hosts({})
    far.node()
    assert find(client, 1, nodes='*')[0] == ['far %s 9701 far' % far.ip6]
    assert find(client, 1, nodes=['fd97::*'])[0] == ['far %s 9701 far' % far.ip6]
    assert find(client, 1, nodes=[far.ip6])[0] == ['far %s 9701 far' % far.ip6]
    lines, rows = find(client, 1, 3, nodes=['fd97::99'])
    assert '[fd97::99]:9701' in lines[-1]
    for host in (client, far):   # link-local addresses are left
        host.commands('ip addr del %s/64 dev eth0' % host.ip6)
    assert [line.split()[1][:6] for line in find(client, 1, nodes='*')[0]] == ['fe80::']


def test_ipv4_multicast(hosts):
    client, far = hosts.host('client'), hosts.host('far')
    for host in (client, far):
        host.drop('meta pkttype broadcast meta l4proto udp')
        host.drop('ip6 version 6')
    node = far.node('--ipv4-udp-multicast')
    assert find(client, 1, nodes='*', ipv4_udp_multicast=True)[0] == ['far %s 9701 far' % far.ip]
    assert find(client, 1, 2, nodes='*')[1] == []
    node.stop()


def without_psutil(host):
    host.write('hidden/psutil.py', 'raise ImportError("hidden by the test")\n')
    return {'PYTHONPATH': host.directory + '/hidden:' + host.environment()['PYTHONPATH']}


@pytest.mark.parametrize('multicast', (False, True))
def test_without_psutil(hosts, multicast):
    client, far = hosts.host('client'), hosts.host('far')
    for host in (client, far):
        host.drop('ip6 version 6')
        if multicast:
            host.drop('meta pkttype broadcast meta l4proto udp')
    far.node(*['--ipv4-udp-multicast'] * multicast, env=without_psutil(far))
    assert (find(client, 1, nodes='*', ipv4_udp_multicast=multicast, env=without_psutil(client))[0]
            == ['far %s 9701 far' % far.ip])


def test_discovery_can_be_fenced(hosts):
    client, far, off = hosts.host('client'), hosts.host('far'), hosts.host('off')
    far.node(env={'DISPY_DISCOVERY': 'loopback'})
    off.node(env={'DISPY_DISCOVERY': 'off'})
    near = client.node()
    assert (find(client, 1, nodes='*', env={'DISPY_DISCOVERY': 'loopback'})[0]
            == ['client 127.0.0.1 9701 client'])
    before = client.packets()
    assert find(client, 1, nodes='*', env={'DISPY_DISCOVERY': 'loopback'})[1][0][0] == 'client'
    assert client.packets()['udp_sent'] == before['udp_sent']
    lines, rows = find(client, 1, nodes='*')
    assert [row[0] for row in rows] == ['client']
    near.stop()
    for host in (far, off):   # they can be named
        assert (find(client, 1, nodes=[host.ip], env={'DISPY_DISCOVERY': 'off'})[0]
                == ['%s %s 9701 %s' % (host.name, host.ip, host.name)])
    before = client.packets()
    lines, rows = find(client, 1, env={'DISPY_DISCOVERY': 'off'})    # nodes=None: the embedded one
    assert rows[0][1] == '127.0.0.1' and client.packets()['udp_sent'] == before['udp_sent']
    with pytest.raises(AssertionError, match="DISPY_DISCOVERY"):
        find(client, 1, nodes='*', env={'DISPY_DISCOVERY': 'off'})


def test_a_node_by_two_addresses_and_two_names_is_used_once(hosts):
    client, far = hosts.host('client'), hosts.host('far')
    client.etc_hosts({'one.example': far.ip, 'two.example': far.ip})
    far.node(cpus=2)
    nodes = [far.ip, far.ip6, 'one.example', 'two.example', '*']
    lines, rows = find(client, 1, nodes=nodes)
    assert len(lines) == 1
    holder = Holder(client, nodes=nodes)
    holder.waits_for('ready far')
    eventually(lambda: [row[3] for row in holder.status()] == ['ready'], what='one node')
    holder.end()


def test_a_second_cluster_of_the_program_finds_nodes_as_the_first_did(hosts):
    client, far = hosts.host('client'), hosts.host('far')
    far.node()
    assert client.python('''
        import dispy
        for pulse in (2, 2, 3):    # the third has a driver of its own
            with dispy.JobCluster(abs, nodes='*', pulse_interval=pulse) as cluster:
                cluster.wait_nodes(1, timeout=3)
                print(cluster.submit(-5)())
        ''').split() == ['5'] * 3


# -- addresses -------------------------------------------------------------------------------------

@pytest.mark.parametrize('means', ('127.0.1.1', None))
def test_no_127_is_told_to_another_host(hosts, means):
    client, far = hosts.host('client'), hosts.host('far')
    for host in (client, far):
        host.etc_hosts({host.name: means} if means else {})
    far.node('-i', '127.0.0.1', '-i', 'eth0')
    assert find(client, 1, nodes='*')[0] == ['far %s 9701 far' % far.ip]
    assert find(client, 1)[0] == ['far %s 9701 far' % far.ip]


def test_addresses_to_listen_at(hosts):
    client, far = hosts.host('client'), hosts.host('far')
    far.commands('ip addr add 10.97.0.77/24 dev eth0')
    far.node('-i', '10.97.0.77', '-i', far.ip6)
    assert find(client, 1, nodes='*')[0] == ['far 10.97.0.77 9701 far']
    assert find(client, 1, nodes=[far.ip6])[0] == ['far %s 9701 far' % far.ip6]
    assert 'no program listens' in find(client, 1, 2, nodes=[far.ip])[0][-1]


def test_behind_a_router_with_a_forwarded_port(hosts):
    client, far = hosts.host('client'), hosts.host('far', nat=True)
    far.uplink.run(['nft', '-f', '-'], input='''
        table inet forwarded {
            chain in {
                type nat hook prerouting priority -100; iifname "eth0" tcp dport 9701 dnat ip to %s;
            }
        }''' % far.ip)
    far.uplink.commands('nft insert rule inet nat through ct status dnat accept')
    node = far.node('--ext-host', far.uplink.ip)
    assert find(client, 1, nodes=[far.uplink.ip])[0] == ['far %s 9701 far' % far.uplink.ip]
    # One beside it on its network is told that address, and comes by it where the router lets it.
    assert 'traceback' not in node.log().lower()


def test_the_outer_address_is_told(hosts):
    client, far = hosts.host('client'), hosts.host('far')
    far.commands('ip addr add 10.97.0.88/24 dev eth0')
    far.node('--ext-host', '10.97.0.88')
    assert find(client, 1, nodes='*')[0] == ['far 10.97.0.88 9701 far']


# -- nodes that dial -------------------------------------------------------------------------------

def test_nodes_behind_nat_dial_a_client_that_listens(hosts):
    client, far, near = hosts.host('client'), hosts.host('far', nat=True), hosts.host('near')
    nodes = [far.node('--scheduler-host', client.ip),
             near.node('--scheduler-host', client.ip, '--scheduler-host', '[%s]' % client.ip6)]
    holder = Holder(client, nodes=['far', 'near'], host='')
    holder.waits_for('ready far')
    holder.waits_for('ready near')
    assert sorted(row[0] for row in holder.status() if row[3] == 'ready') == ['far', 'near']
    assert far.packets()['connects_received'] == 0
    assert holder.end() == 0
    # Another client opens where one has closed
    holder = Holder(client, nodes='*', host=client.ip)
    holder.waits_for('ready far', 40)
    nodes[0].kill()
    holder.waits_for('closed far')
    nodes[0] = far.node('--scheduler-host', client.ip)    # the node is started again
    holder.waits_for('ready far', times=2)
    holder.process.kill()
    holder.process.wait()
    holder = Holder(client, nodes='*', host=client.ip)    # the client is
    holder.waits_for('ready far', 40)
    holder.end()
    for node in nodes:
        assert node.stop() == 0


def test_a_node_that_is_not_listed_and_dials_is_not_used(hosts):
    client, far = hosts.host('client'), hosts.host('far')
    far.node('--scheduler-host', client.ip)
    holder = Holder(client, nodes=['other'], host='')
    eventually(lambda: far.packets()['connects_sent'])
    eventually(lambda: 'bye' in far.read('node/log') or 'no cluster uses' in far.read('node/log'))
    assert ([row[0] for row in holder.status() if row[3] != 'no such name'] == []
            and 'ready' not in holder.heard())
    holder.end()


@pytest.mark.long
def test_a_node_that_dials_backs_off(hosts):
    client, far = hosts.host('client'), hosts.host('far')
    client.etc_hosts({})
    node = far.node('--scheduler-host', client.ip)
    eventually(lambda: far.packets()['connects_sent'] >= 3)
    since, count = time.monotonic(), far.packets()['connects_sent']
    eventually(lambda: far.packets()['connects_sent'] > count)
    assert far.packets()['connects_sent'] <= count + 2 + (time.monotonic() - since)
    assert node.log().count('cannot be reached: no program listens there') == 1
    holder = Holder(client, nodes='*', host='')
    holder.waits_for('ready far', 40)
    holder.end()


def test_a_taken_port_is_a_warning_or_an_error(hosts):
    client, far = hosts.host('client'), hosts.host('far')
    far.node()
    first = Holder(client, nodes=[far.ip], ip_addr=client.ip)      # as scripts of dispy 4 say it
    first.waits_for('ready far')
    second = Holder(client, nodes=[far.ip], ip_addr=client.ip)
    second.waits_for('port 9702 is taken by another program')
    assert first.end() == 0
    second.waits_for('ready far')
    assert second.heard().count('is taken') == 1
    third = Holder(client, nodes=[far.ip], host='')
    for host in (client.ip + ':9702', ':::9702', '10.97.0.99', 'no.such.name'):
        with pytest.raises(AssertionError, match=r'nodes cannot connect to .*host=|not HOST|host='):
            find(client, 1, nodes=[far.ip], host=host)
    third.end()
    assert second.end() == 0


# -- leases ----------------------------------------------------------------------------------------

def leave_by(holder, client, how):
    if how == 'close':
        assert holder.end() == 0
    elif how == 'kill':
        holder.process.kill()
    elif how == 'term':
        holder.process.terminate()
    elif how == 'stop':
        holder.process.send_signal(signal.SIGSTOP)
    elif how == 'cut':
        client.cut()


@pytest.mark.parametrize('how', ('close', 'term', 'kill', 'stop', 'cut'))
def test_a_node_serves_one_client_and_then_the_next(hosts, how):
    one, two, far = hosts.host('one'), hosts.host('two'), hosts.host('far')
    node = far.node()
    first = Holder(one, nodes=[far.ip], pulse_interval=0.5)
    first.waits_for('ready far')
    second = Holder(two, nodes=[far.ip])
    second.waits_for('it serves')
    holder = re.search(r'it serves (.+)', second.heard()).group(1)
    assert re.match(r'\w+@one PID %d for \d+ s' % first.process.pid, holder), holder
    row, = second.status()
    assert row[3] == 'refused' and '@one PID' in row[4]
    leave_by(first, one, how)
    second.waits_for('ready far', 10)
    assert second.heard().count('it serves') <= 3    # in the log once, in status() twice
    one.mend()
    if how == 'stop':
        first.process.send_signal(signal.SIGCONT)
    if how in ('stop', 'cut'):    # back, it is refused in its turn
        first.waits_for('@two PID')
        second.say('0')
        assert second.end() == 0
        first.waits_for('ready far', 20, times=2)
        assert first.end() == 0
    else:
        assert second.end() == 0
    assert 'Traceback' not in node.log()


def test_all_nodes_refuse(hosts):
    one, two, free = hosts.host('one'), hosts.host('two'), hosts.host('wrong', secret='another')
    far = hosts.host('far')
    far.node()
    free.node()
    first = Holder(one, nodes=[far.ip])
    first.waits_for('ready far')
    second = Holder(two, nodes=[far.ip, free.ip, '10.97.0.99', '*'])
    second.waits_for('waits for a node. Tried:', 10)
    line = next(line for line in second.heard().splitlines() if 'waits for a node' in line)
    for part in ('it serves', 'wrong secret', '10.97.0.99',
                 'all that answer at UDP port 9701 of the local network'):
        assert part in line, line
    assert 'python dispynode.py' not in line   # some have answered
    lines, rows = find(two, 1, 1, nodes=[far.ip, free.ip])
    assert ('it serves' in lines[-1] and 'wrong secret' in lines[-1]
            and {row[3] for row in rows} == {'refused'})
    second.process.kill()
    first.end()


# -- refusals --------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def certificates(tmp_path_factory):
    """Two CAs with a certificate each, and a self-signed one: made as examples/README.md says."""
    at = tmp_path_factory.mktemp('certificates')
    new = ['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256',
           '-nodes', '-days', '3650']
    for name in ('ca', 'other-ca', 'shared'):
        subprocess.run([*new, '-subj', '/CN=' + name, '-keyout', name + '.key', '-out',
                        name + '.crt'], cwd=at, check=True, stderr=subprocess.DEVNULL)
    for name, ca in (('node', 'ca'), ('client', 'ca'), ('foreign', 'other-ca')):
        subprocess.run([*new, '-subj', '/CN=' + name, '-CA', ca + '.crt', '-CAkey', ca + '.key',
                        '-keyout', name + '.key', '-out', name + '.crt'],
                       cwd=at, check=True, stderr=subprocess.DEVNULL)
    # A certificate, and who vouches for others
    for name, ca in (('node', 'ca'), ('client', 'ca'), ('foreign', 'other-ca')):
        (at / (name + '.pem')).write_text((at / (name + '.crt')).read_text()
                                          + (at / (ca + '.crt')).read_text())
    return at


SECRETS = ('right', 'wrong', 'absent')
TLS = ('right', 'wrong', 'plain')


def fits(node, client):
    return node[0] == client[0] == 'right' and (node[1], client[1]) in (('right', 'right'),
                                                                        ('plain', 'plain'))


@pytest.mark.long
@pytest.mark.parametrize('of_node', SECRETS)
def test_the_table_of_refusals(hosts, certificates, of_node):
    """Nine clients at each of nine nodes: who fits is served, each other one is told what is wrong
    with what, and so is the node."""
    clients = {(secret, tls): hosts.host('%s-%s' % (secret, tls), secret={
        'right': 'the right secret', 'wrong': 'a wrong secret', 'absent': None}[secret])
               for secret in SECRETS for tls in TLS}
    far = [hosts.host('far-' + tls) for tls in TLS]
    nodes = [start_row(host, certificates, of_node, tls) for host, tls in zip(far, TLS)]
    pem = {'right': ['client.pem', 'client.key'], 'wrong': ['foreign.pem', 'foreign.key']}
    started = {}
    for (secret, tls), client in clients.items():
        more = {}
        if tls != 'plain':
            certificate, key = pem[tls]
            more = {'certfile': str(certificates / certificate), 'keyfile': str(certificates / key)}
        words = []
        for host, node_tls in zip(far, TLS):
            served = fits((of_node, node_tls), (secret, tls))
            words += [1, json.dumps(dict(more, nodes=[host.ip])), 20 if served else 2.5]
        started[secret, tls] = client.start_python(FIND, *words)
    outputs = {key: process.communicate()[0].split('next\n') for key, process in started.items()}
    for place, (host, node, node_tls) in enumerate(zip(far, nodes, TLS)):
        row = {key: parts[place] for key, parts in outputs.items()}
        check_row(clients, host, node, (of_node, node_tls), row)


def start_row(far, certificates, node_secret, node_tls):
    """A node with such a secret and certificate."""
    if node_secret == 'absent':
        os.remove(far.secret_file)
    else:
        far.write('home/.config/dispy/secret',
                  {'right': 'the right secret', 'wrong': 'another wrong secret'}[node_secret])
    pem = {'right': ['node.pem', 'node.key'], 'wrong': ['shared.crt', 'shared.key']}
    options = []
    if node_tls != 'plain':
        certificate, key = pem[node_tls]
        options = ['--certfile', certificates / certificate, '--keyfile', certificates / key]
    return far.node(*options)


def check_row(clients, far, node, of_node, outputs):
    """One row of the table: what its clients have said, and the node."""
    node_tls = of_node[1]
    for (secret, tls), output in outputs.items():
        client = clients[secret, tls]
        if fits(of_node, (secret, tls)):
            assert output.startswith('%s %s 9701 %s' % (far.name, far.ip, far.name)), output
            continue
        option = ('--secret-file' if (node_tls, tls) in (('right', 'right'), ('plain', 'plain'))
                  else '--certfile')
        *lines, rows = output.splitlines()
        row, = json.loads(rows)
        assert row[3] == 'refused' and option in row[4], output
        assert far.ip + ':9701' in lines[-1] and option in lines[-1], output          # NoNodes
        assert output.count('cannot be used') == 1, output                            # said once
        told = [line for line in node.log().splitlines()
                if 'connection from %s was rejected' % client.ip in line]
        assert len(told) == 1 and option in told[0], (client.name, node.log())
    assert 'Traceback' not in node.log() and node.stop() == 0


@pytest.mark.parametrize('files', (('node.pem', 'node.key', 'client.pem', 'client.key', None),
                                   ('node.pem', 'node.key', 'client.crt', 'client.key', 'ca.crt'),
                                   ('shared.crt', 'shared.key', 'shared.crt', 'shared.key', None)),
                         ids=('ca', 'cafile', 'shared'))
def test_tls_both_ways(hosts, certificates, files):
    client, far = hosts.host('client'), hosts.host('far')
    certfile, keyfile, *ours = [name and str(certificates / name) for name in files]
    options = dict(zip(('certfile', 'keyfile', 'cafile'), ours))
    node = far.node('--certfile', certfile, '--keyfile', keyfile)
    assert find(client, 1, nodes='*', **options)[0] == ['far %s 9701 far' % far.ip]
    node.stop()
    far.node('--certfile', certfile, '--keyfile', keyfile, '--scheduler-host', client.ip)
    holder = Holder(client, nodes='far', host='', **options)
    holder.waits_for('ready far')
    holder.end()


def test_another_secret_is_found_and_said_on_both_sides(hosts):
    client, far, other = hosts.host('client'), hosts.host('far'), hosts.host('other',
                                                                             secret='quite another')
    node = other.node()
    holder = Holder(client, nodes='*')
    holder.waits_for('cannot be used: its node has another secret')
    eventually(lambda: re.search('(%s|%s) is looking for nodes and has another secret'
                                 % (client.ip, client.ip6), node.log()))
    row, = holder.status()
    assert row[1] in (other.ip, other.ip6) and row[3] == 'refused' and '--secret-file' in row[4]
    far.node()
    holder.waits_for('ready far')
    assert holder.heard().count('another secret') - holder.heard().count('"its node') == 1
    assert holder.end() == 0 and node.log().count('another secret') == 1
    lines, rows = find(client, 2, 3, nodes='*')
    assert re.search('(%s|%s): refused: its node has another secret' % (other.ip, other.ip6),
                     lines[-1]), lines


def test_a_client_that_listens_tells_who_was_turned_away(hosts):
    client, far = hosts.host('client'), hosts.host('far', secret='quite another')
    holder = Holder(client, nodes='*', host='', env={'DISPY_DISCOVERY': 'loopback'})
    node = far.node('--scheduler-host', client.ip)
    holder.waits_for('%s cannot be used: its connection was rejected: wrong secret' % far.ip)
    assert [row[1] for row in holder.status()] == [far.ip]
    eventually(lambda: '%s:9702 (--scheduler-host) cannot be reached: wrong secret'
               % client.ip in node.log())
    assert '--secret-file' in node.log()
    holder.end()


# -- python -m dispy --list-nodes ------------------------------------------------------------------

def list_nodes(host, *options, exit_code=0):
    return host.run([sys.executable, '-m', 'dispy', '--list-nodes', *options], exit_code=exit_code)


def test_list_nodes(hosts):
    client, far, other, busy = (hosts.host('client'), hosts.host('far'),
                                hosts.host('other', secret='quite another'), hosts.host('busy'))
    for host in (far, other, busy):
        host.node(cpus=2)
    holder = Holder(hosts.host('user'), nodes=[busy.ip])
    holder.waits_for('ready busy')
    text = list_nodes(client)
    rows = {row.split()[0]: row for row in text.splitlines() if 'WARNING' not in row}
    assert re.search(r' far +2 +\d+ % +[\d.]+ GiB +- +5\.\S+ +3\.\d+\.\d+ +free$',
                     rows[far.ip + ':9701']), text
    assert re.search(r' busy +2 .* serves \w+@user PID %d for \d+ s$' % holder.process.pid,
                     rows[busy.ip + ':9701']), text
    assert 'cannot be used: its node has another secret' in (rows.get(other.ip)
                                                             or rows[other.ip6]), text
    text = list_nodes(client, '-n', busy.ip, '-n', '10.97.0.99', '-n', far.ip6, '-n', other.ip)
    # Once each: in the table, not in a log too
    assert '[%s]:9701' % far.ip6 in text and text.count('cannot be used') == 2, text
    list_nodes(client, '-n', busy.ip, exit_code=1)
    list_nodes(client, '-n', other.ip, exit_code=1)
    # Nobody was in the way of anybody.
    assert find(client, 1, nodes=[far.ip])[0] == ['far %s 9701 far' % far.ip]
    holder.say('jobs')
    holder.waits_for('\nbusy')
    assert holder.end() == 0
    assert ' free' in list_nodes(client, '-n', busy.ip)


def test_list_nodes_of_nobody(hosts):
    assert 'no node answers' in list_nodes(hosts.host('client'), exit_code=1)


# -- strangers -------------------------------------------------------------------------------------

# 1,000 connections that say nothing, some that say a byte a while, and datagrams: garbage, replays,
# forgeries.
FLOOD = """
    import os, select, socket, sys, time
    import dispynode as d
    node, seconds = sys.argv[1], float(sys.argv[2])
    silent, good = [], d.Discovery(d.derive_key(b'quite another'), d.Role.CLIENT, os.urandom(16))
    liar = d.Discovery(d.derive_key(b'quite another'), d.Role.NODE, os.urandom(16), 9701)
    replay = bytes.fromhex(sys.argv[3]) if len(sys.argv) > 3 else b''
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    until, sent = time.monotonic() + seconds, 0
    while time.monotonic() < until or len(silent) < 1000:
        if len(silent) < 1000:
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex((node, 9701))
            silent.append(sock)
        for data in (os.urandom(128), good.build(d.DatagramType.QUESTION),
                     liar.build(d.DatagramType.HELLO),
                     liar.build(d.DatagramType.ANSWER, '', os.urandom(16)), os.urandom(1000)):
            udp.sendto(data, ('10.97.0.255', 9701))
            sent += 1
        if len(silent) % 10 == 0:
            try:
                silent[len(silent) // 2].send(b'd')
            except OSError:
                pass
        time.sleep(0.001)
    print(sent, len(silent), flush=True)
    sys.stdin.read()
"""


def resident(pid):
    with open('/proc/%d/statm' % pid) as file:
        return int(file.read().split()[1]) * 4096


def test_strangers_do_not_disturb_an_honest_client(hosts):
    client, far, stranger = (hosts.host('client'), hosts.host('far'),
                             hosts.host('stranger', secret='quite another'))
    node = far.node()
    holder = Holder(client, nodes='*')
    holder.waits_for('ready far')
    before, descriptors = resident(node.process.pid), len(far_descriptors(node))
    client_before = resident(holder.process.pid)
    flood = stranger.start_python(FLOOD, far.ip, 8, stdin=subprocess.PIPE)
    count = 0
    while not flood_is_over(flood):
        said = holder.heard().splitlines().count('far')
        holder.say('jobs')       # one that is connected
        eventually(lambda: holder.heard().splitlines().count('far') > said, 5)
        count += 1
        time.sleep(0.1)
    assert count > 10
    assert (resident(node.process.pid) - before < 16 << 20
            and resident(holder.process.pid) - client_before < 16 << 20)
    assert len(far_descriptors(node)) < descriptors + 70
    assert holder.end() == 0
    assert find(client, 1, nodes='*')[0] == ['far %s 9701 far' % far.ip]     # and one that comes
    assert node.log().count('was rejected') < 10 and 'Traceback' not in node.log()
    flood.communicate()


def far_descriptors(node):
    return os.listdir('/proc/%d/fd' % node.process.pid)


def flood_is_over(flood):
    return bool(select.select([flood.stdout], [], [], 0)[0])
