"""Nodes and clients on different hosts."""

import re
import sys

import pytest

from hosts import Hosts
from ledger import nothing_left

CLIENT = '''
    import sys
    import dispy

    def compute(number):
        import socket
        return number * 2, socket.gethostname()

    with dispy.JobCluster(compute, nodes=[(name, 9701) for name in sys.argv[1:]]) as cluster:
        jobs = [cluster.submit(number) for number in range(20)]
        if not cluster.wait(30):
            cluster.print_status()
        for job in jobs:
            print(*(job.result or [job.exception]))
'''
REFUSED = '''
    import sys
    import dispy

    with dispy.JobCluster(pow, nodes=sys.argv[1:]) as cluster:
        try:
            cluster.wait_nodes(1, timeout=2)
        except dispy.NoNodes as exc:
            print(exc)
'''


@pytest.fixture
def hosts():
    with Hosts() as made:
        yield made


def answers(host):
    return ['%d %s' % (2 * number, host.name) for number in range(20)]


def test_a_node_on_another_host_by_ipv4_ipv6_and_name(hosts):
    client, far = hosts.host('client'), hosts.host('far')
    client.etc_hosts({'far.example': far.ip})
    with far.node('-i', far.ip, '-i', far.ip6) as node:
        assert client.python(CLIENT, far.ip).splitlines() == answers(far)
        with nothing_left(node.process.pid):
            for address in (far.ip6, 'far.example'):
                assert client.python(CLIENT, address).splitlines() == answers(far)


def test_jobs_on_three_hosts(hosts):
    client = hosts.host('client')
    others = [hosts.host('far%d' % number) for number in range(3)]
    nodes = [other.node(cpus=1) for other in others]
    output = client.python('''
        import sys
        import dispy

        def compute(number):
            import socket, time
            time.sleep(0.05)
            return socket.gethostname()

        with dispy.JobCluster(compute, nodes=sys.argv[1:]) as cluster:
            cluster.wait_nodes(3, timeout=20)
            print(*sorted(set(cluster.map(range(60)))))
        ''', *[other.ip for other in others])
    assert output.split() == ['far0', 'far1', 'far2']
    for node in nodes:
        assert node.stop() == 0


# Debian writes such a line when it is installed; dispy 4 advertised that address to other hosts.
@pytest.mark.parametrize('means', ('127.0.1.1', None))
def test_a_host_name_that_means_127_0_1_1_or_nothing(hosts, means):
    client, far = hosts.host('client'), hosts.host('far')
    for host in (client, far):
        host.etc_hosts({host.name: means} if means else {})
    with far.node() as node:
        assert client.python(CLIENT, far.ip).splitlines() == answers(far)
        assert '127.0.1.1' not in node.log()


def test_nothing_but_unicast_when_no_node_has_a_wildcard(hosts):
    client, far, absent = hosts.host('client'), hosts.host('far'), hosts.host('absent')
    with far.node():
        before = client.packets()
        assert client.python(CLIENT, far.ip, absent.ip).splitlines()[-20:] == answers(far)
        after = client.packets()
    assert before['udp_sent'] == after['udp_sent'] == 0
    assert after['connects_sent'] > 1


def test_a_client_behind_nat(hosts):
    client, far = hosts.host('client', nat=True), hosts.host('far')
    with far.node() as node:
        assert client.python(CLIENT, far.ip).splitlines() == answers(far)
        assert client.ip not in node.log()
    assert far.packets()['connects_sent'] == 0


def test_jobs_while_every_datagram_is_dropped(hosts):
    client, far = hosts.host('client'), hosts.host('far')
    client.drop_udp()
    far.drop_udp()
    with far.node():
        assert client.python(CLIENT, far.ip).splitlines() == answers(far)


def test_another_secret_is_told_to_the_client(hosts):
    client, far = hosts.host('client'), hosts.host('far', secret='quite another secret')
    with far.node() as node:
        told = client.python(REFUSED, far.ip)
        assert re.search(r'%s.*secret' % re.escape(far.ip), told), told
        far_secret = far.read('home/.config/dispy/secret').strip()
        assert far_secret not in told and client.ip in node.log()
        assert (client.python(CLIENT, far.ip, env={'DISPY_SECRET': far_secret}).splitlines()
                == answers(far))


def test_a_host_without_a_secret_makes_its_own(hosts):
    client, far = hosts.host('client'), hosts.host('far', secret=None)
    with far.node():
        assert 'secret' in client.python(REFUSED, far.ip)
        client.write('home/.config/dispy/secret', far.read('home/.config/dispy/secret'))
        assert client.python(CLIENT, far.ip).splitlines() == answers(far)


def test_nothing_listens_and_nobody_answers(hosts):
    client, idle, gone = hosts.host('client'), hosts.host('idle'), hosts.host('gone')
    gone.cut()
    told = client.python(REFUSED, idle.ip, gone.ip)
    assert 'no program listens' in told and gone.ip in told, told


def test_down_unreachable_and_unknown_names_are_told_apart(hosts):
    client, idle, gone = hosts.host('client'), hosts.host('idle'), hosts.host('gone')
    gone.cut()
    told = client.python(REFUSED, idle.ip, '10.99.0.1', 'no-such-host.example')
    for part in ('%s:9701: down: no program listens' % idle.ip,
                 '10.99.0.1:9701: unreachable: it cannot be reached',
                 'no-such-host.example:9701: no such name: its name does not resolve'):
        assert part in told, told
    assert 'refused' not in told and 'Errno' not in told, told
    told = client.python(REFUSED.replace('timeout=2', 'timeout=11'), gone.ip)
    assert re.search(r'%s:9701: unreachable: (no answer within \d+ s|it cannot be reached)'
                     % re.escape(gone.ip), told), told
    assert 'firewall accepts TCP port 9701' in told and 'Run `' not in told, told


def test_a_link_local_address_is_shown_with_its_interface(hosts):
    client, far = hosts.host('client'), hosts.host('far')
    address = 'fe80::%s%%eth0' % far.ip6.split('::')[1]
    with far.node() as node:
        shown = client.python('''
            import sys
            import dispy

            with dispy.JobCluster(abs, nodes=[sys.argv[1]]) as cluster:
                job = cluster.submit(-1)
                job.get(30)
                print(job.ip_addr, cluster.status().nodes)
                cluster.print_status()
            ''', address)
        assert shown.splitlines()[0].startswith('%s [<DispyNode [%s]:9701'
                                                % (address, address)), shown
        assert shown.count(address) == 3
        listed = client.run([sys.executable, '-m', 'dispy', '--list-nodes', '-n', address])
        assert '[%s]:9701' % address in listed and 'free' in listed, listed
        assert 'link to fe80::%s%%eth0' % client.ip6.split('::')[1] in node.log()
