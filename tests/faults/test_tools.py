"""The tools keep their promises."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

import dispy
from conftest import ROOT, eventually, lives
from hosts import Hosts
from ledger import Ledger, enter, nothing_left, one_more_each
from nodes import NodeProcess
from proxy import DOWN, UP, Proxy


# -- hosts -----------------------------------------------------------------------------------------

SEND = '''
    import socket, sys
    family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    if sys.argv[1].startswith('ff'):
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF,
                        socket.if_nametoindex('eth0'))
    for _ in range(int(sys.argv[2])):
        sock.sendto(b'hello', (sys.argv[1], 9701))
'''
RECEIVE = '''
    import socket, struct, sys
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.bind(('::', 9701))
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP,
                    socket.inet_pton(socket.AF_INET6, 'ff02::97')
                    + struct.pack('@I', socket.if_nametoindex('eth0')))
    print('ready', flush=True)
    for _ in range(int(sys.argv[1])):
        print(sock.recvfrom(100)[1][0].split('%')[0], flush=True)
'''


def listening(host, count):
    process = host.start_python(RECEIVE, count)
    assert process.stdout.readline() == 'ready\n'
    return process


@pytest.fixture
def hosts():
    with Hosts() as made:
        yield made


def test_datagrams_between_hosts(hosts):
    a, b, c = [hosts.host(name) for name in 'abc']
    hearing = [listening(b, 6), listening(c, 4)]
    for to in (b.ip, b.ip6, '10.97.0.255', '255.255.255.255', 'ff02::97', 'ff02::97'):
        a.python(SEND, to, 1)
    assert hearing[0].communicate()[0].split()[:2] == ['::ffff:' + a.ip, a.ip6]
    assert len(hearing[1].communicate()[0].split()) == 4
    sent, received = a.packets(), c.packets()
    assert ((sent['udp_sent'], sent['broadcast_sent'], sent['multicast_sent'], sent['udp_received'])
            == (6, 2, 2, 0))
    assert (received['udp_received'], received['broadcast_received'],
            received['multicast_received']) == (4, 2, 2)
    assert b.packets()['udp_sent'] == 0


def test_a_host_has_its_own_name_home_and_secret(hosts):
    a, b = hosts.host('a'), hosts.host('b', secret=None)
    seen = '''
        import os, socket
        import dispynode
        print(socket.gethostname(), socket.gethostbyname(socket.gethostname()),
              os.environ.get('DISPY_DISCOVERY'))
        print(dispynode.secret_path(), os.getcwd())
        '''
    assert a.python(seen).split() == ['a', a.ip, 'None', a.secret_file, a.directory]
    assert not os.path.exists(os.path.join(b.directory, 'home', '.config'))
    a.etc_hosts({'a': '127.0.1.1', 'b': b.ip})
    assert a.python('import socket; print(socket.gethostbyname("a"), '
                    'socket.gethostbyname("b"))').split() == ['127.0.1.1', b.ip]


def test_a_cable_is_cut_and_mended(hosts):
    a, b = hosts.host('a'), hosts.host('b')
    b.popen([sys.executable, b.script('''
        import socket
        server = socket.create_server(('', 9701))
        while True:
            server.accept()[0].close()
        ''')])
    dial = '''
        import socket, sys
        try:
            socket.create_connection((sys.argv[1], 9701), float(sys.argv[2])).close()
            print('connected')
        except OSError as exc:
            print(type(exc).__name__)
        '''

    def dialled(seconds):
        return a.python(dial, b.ip, seconds).strip()
    eventually(lambda: dialled(10) == 'connected')
    for fault in (a.cut, lambda: a.cut(received=False), lambda: b.cut(sent=False),
                  lambda: a.drop('ip daddr ' + b.ip), lambda: b.drop('tcp dport 9701')):
        fault()
        assert dialled(0.3) in ('timeout', 'TimeoutError')
        a.mend()
        b.mend()
        assert dialled(10) == 'connected'
    b.drop_udp()
    assert dialled(10) == 'connected'
    a.python(SEND, b.ip, 3)
    assert a.packets()['udp_sent'] == 3 and a.packets()['connects_sent'] >= 12


def test_nothing_reaches_a_host_behind_nat(hosts):
    outside, inside = hosts.host('outside'), hosts.host('inside', nat=True)
    hearing = listening(outside, 2)
    inside.python(SEND, outside.ip, 1)
    inside.python(SEND, outside.ip6, 1)
    assert hearing.communicate()[0].split() == ['::ffff:' + inside.uplink.ip, inside.uplink.ip6]
    dial = 'import socket, sys; socket.create_connection((sys.argv[1], 9701), 1)'
    assert 'unreachable' in outside.python(dial, inside.ip, exit_code=1)
    outside.commands('ip route add 10.98.0.0/16 via ' + inside.uplink.ip)
    assert 'timed out' in outside.python(dial, inside.ip, exit_code=1)
    assert inside.packets()['tcp_received'] == 0


def test_a_run_that_is_killed_leaves_nothing_behind(hosts):
    run = subprocess.Popen([sys.executable, '-c', '''
import sys
sys.path[:0] = sys.argv[1:]
from hosts import Hosts
with Hosts() as hosts:
    host = hosts.host('doomed', nat=True)
    host.popen([sys.executable, '-c',
                'import subprocess, time; subprocess.Popen(["sleep", "600"]); time.sleep(600)'])
    host.popen(['sleep', '600'], start_new_session=True)
    while len(host.processes()) < 3:
        pass
    print(*[space.directory for space in hosts._namespaces])
    print(*[pid for space in hosts._namespaces for pid in [space.pid, *space.processes()]],
          flush=True)
    input()
''', os.path.join(ROOT, 'tests'), os.path.join(ROOT, 'tests', 'faults')],
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True)
    with run:
        directories, pids = (run.stdout.readline().split(),
                             [int(pid) for pid in run.stdout.readline().split()])
        assert len(directories) == 3 and len(pids) == 6
        run.send_signal(signal.SIGKILL)
    eventually(lambda: not any(map(lives, pids)))
    eventually(lambda: not any(map(os.path.exists, directories)))


def test_the_output_of_a_program_that_fails(hosts):
    a = hosts.host('a')
    assert a.run(['sh', '-c', 'echo out; echo err >&2; exit 3'], exit_code=3) == 'out\nerr\n'
    with pytest.raises(AssertionError, match='ended with 3:\nout'):
        a.run(['sh', '-c', 'echo out; exit 3'])
    with pytest.raises(AssertionError, match='did not end within 0.2 s:\nout'):
        a.run(['sh', '-c', 'echo out; exec sleep 600'], timeout=0.2)


# -- proxy -----------------------------------------------------------------------------------------

@pytest.fixture
def echo():
    """The address of a server that sends back what it gets, and the list of what it got by
    connection."""
    got = []

    def serve(sock):
        mine = bytearray()
        got.append(mine)
        with sock, contextlib.suppress(OSError):
            while True:
                data = sock.recv(65536)
                if not data:
                    return
                mine.extend(data)
                sock.sendall(data)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve, args=(server.accept()[0],)))
                threads[-1].start()
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        server.listen()
        threads = [threading.Thread(target=accept)]
        threads[0].start()
        yield server.getsockname(), got
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(20)


def read(sock, count=None):
    """So many bytes, or all until it ends."""
    back = bytearray()
    with contextlib.suppress(ConnectionError):
        while count is None or len(back) < count:
            piece = sock.recv(65536)
            if not piece:
                break
            back += piece
    return bytes(back)


def talk(proxy, data, count=None):
    """What comes back for these bytes."""
    with socket.create_connection(proxy.address, 20) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        return read(sock, count)


TEXT = bytes(range(256)) * 1000


def test_what_passes_is_the_same_and_is_counted(echo):
    with Proxy(echo[0], record=True) as proxy:
        for _ in range(3):
            assert talk(proxy, TEXT, len(TEXT)) == TEXT
        assert proxy.count == 3
        assert [bytes(connection.recorded[way]) for connection in proxy.connections
                for way in (UP, DOWN)] == [TEXT] * 6


@pytest.mark.parametrize('byte', (0, 1, 65535, 65536, 100000))
def test_cut_at_a_byte_once(echo, byte):
    with Proxy(echo[0]) as proxy:
        proxy.at(byte, 'cut', UP)
        talk(proxy, TEXT)
        eventually(lambda: echo[1] and bytes(echo[1][0]) == TEXT[:byte])
        assert proxy.connections[0].sent[UP] == byte and not proxy.open and not proxy.armed
        assert talk(proxy, TEXT, len(TEXT)) == TEXT
        proxy.at(byte, 'cut', DOWN)
        assert talk(proxy, TEXT) == TEXT[:byte]
        proxy.at(byte, 'reset', DOWN)
        assert TEXT[:byte].startswith(talk(proxy, TEXT))


def test_a_bit_flipped_and_a_piece_repeated(echo):
    with Proxy(echo[0]) as proxy:
        proxy.at(70000, 'flip', UP)
        proxy.at(80000, ('repeat', 100), UP)
        changed = (TEXT[:70000] + bytes([TEXT[70000] ^ 1]) + TEXT[70001:80000] + TEXT[79900:80000]
                   + TEXT[80000:])
        assert talk(proxy, TEXT, len(changed)) == changed
        proxy.at(3, 'flip', DOWN)
        assert talk(proxy, b'\0\0\0\0\0', 5) == b'\0\0\0\1\0'


def test_held_and_resumed(echo):
    with Proxy(echo[0]) as proxy:
        proxy.at(10, 'hold', UP)
        with socket.create_connection(proxy.address, 20) as sock:
            sock.sendall(b'0123456789abc')
            eventually(lambda: echo[1] and echo[1][0] == b'0123456789')
            sock.settimeout(0.2)
            with pytest.raises(socket.timeout):
                sock.recv(1)
            assert echo[1][0] == b'0123456789'
            sock.settimeout(20)
            proxy.resume()
            assert read(sock, 13) == b'0123456789abc'


def test_connections_refused_cut_and_accepted_again(echo):
    with Proxy(echo[0]) as proxy, socket.create_connection(proxy.address, 20) as sock:
        eventually(lambda: proxy.open)
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(proxy.address, 20)
        sock.sendall(b'goes on')
        assert read(sock, 7) == b'goes on'
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        proxy.accept()
        assert talk(proxy, TEXT, len(TEXT)) == TEXT
        with socket.create_connection(proxy.address, 20) as again:
            again.sendall(b'1')
            assert again.recv(1) == b'1'
            proxy.cut(reset=False)
            assert again.recv(1) == b''


def test_a_slow_link(echo):
    with Proxy(echo[0], rate=1000000, delay=0.001) as proxy:
        assert talk(proxy, TEXT, len(TEXT)) == TEXT


def test_jobs_through_a_proxy(tmp_path):
    with NodeProcess(tmp_path) as node, Proxy(node.address) as proxy:
        with dispy.JobCluster(pow, nodes=[proxy.address]) as cluster:
            assert cluster.submit(2, 3)() == 8
        with nothing_left(node.process.pid), dispy.JobCluster(pow,
                                                              nodes=[proxy.address]) as cluster:
            assert list(cluster.map(range(100), [2] * 100)) == [number ** 2
                                                                for number in range(100)]
            assert [job.result for job in one_more_each(cluster, 2, 3)] == [8, 8]
        assert proxy.count == 2


# -- ledger ----------------------------------------------------------------------------------------

def test_a_ledger_finds_what_is_wrong(tmp_path):
    ledger = Ledger(tmp_path / 'ledger')
    assert ledger.check([], []).clean and ledger.attempts() == []
    for job in (1, 2, 2, 3, 9):
        enter(ledger.path, job)
    assert ledger.attempts()[0] == ('1', socket.gethostname(), os.getpid())
    tally = ledger.check([1, 2, 3, 4], [1, 2, 3, 3, 8])
    assert tally == (4, 5, ['4'], ['8', '9'], ['3'], ['2'], 5) and not tally.clean
    assert (not ledger.check([1, 2, 3], [1, 2]).clean
            and ledger.check([1, 2, 3, 9], [9, 3, 2, 1]).clean)


def test_jobs_in_a_ledger(tmp_path):
    def compute(path, number):
        enter(path, number)
        return number
    ledger = Ledger(tmp_path / 'ledger')
    with NodeProcess(tmp_path / 'node') as node, dispy.JobCluster(compute, depends=[enter],
                                                                  nodes=[node.address]) as cluster:
        jobs = [cluster.submit_job_id(number, ledger.path, number) for number in range(200)]
        assert cluster.wait(60)
    tally = ledger.check(range(200), [job.result for job in jobs])
    assert tally.clean and not tally.again and tally.executions == 200


def test_a_process_and_a_descriptor_that_are_left_are_found():
    code = ('import os, subprocess, sys\n'
            'for line in sys.stdin:\n'
            '    exec(line)\n'
            '    print(flush=True)\n')

    def tell(line):
        process.stdin.write(line + '\n')
        process.stdin.flush()
        process.stdout.readline()
    with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, universal_newlines=True) as process:
        tell('')
        with nothing_left(process.pid):
            tell('kept = open(os.devnull)')
            tell('kept.close()')
        with pytest.raises(AssertionError, match='had 0 children'):
            with nothing_left(process.pid, seconds=0.2):
                tell('kept = open(os.devnull)')
        with pytest.raises(AssertionError, match='left are .psutil.Process'):
            with nothing_left(process.pid, seconds=0.2):
                tell('kept = subprocess.Popen(["sleep", "600"])')
        tell('kept.kill(); kept.wait()')
