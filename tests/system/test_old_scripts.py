"""Scripts written for dispy 2 to 4: what they import, give, read and call works, or says what to
do."""

import functools
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request

import pytest

import dispy
import dispy_httpd
import dispynode
import dispyscheduler
import dispy4_calls
from conftest import ROOT, eventually, make_cluster  # noqa: F401
from dispy import DispyJob, DispyNode
from nodes import NodeProcess

TESTS = os.path.join(ROOT, 'tests')


def square(n):
    return n * n


def run_python(*argv, cwd=None, path=ROOT, **env):
    """A program of its own with this dispy. Returns its standard output and error."""
    done = subprocess.run([sys.executable, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=120, cwd=cwd, env=dict(os.environ, PYTHONPATH=path, **env))
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, out + err
    return out, err


@pytest.fixture
def told(caplog, monkeypatch):
    """What has been said to have no meaning any more, as if nothing had been said before."""
    monkeypatch.setattr(dispy.old_names, '_told', set())
    caplog.set_level(logging.INFO, 'dispy')
    return lambda: [record.getMessage().partition(' has no meaning any more: ')[0]
                    for record in caplog.records if 'no meaning any more' in record.getMessage()]


# -- the interface as a whole ----------------------------------------------------------------------

def test_calls_as_in_dispy_4(tmp_path):
    """dispy4_calls.json is what dispy 4.15.2 gave; what differs is in DIFFERS, with its reason."""
    with open(os.path.join(TESTS, 'dispy4_calls.json')) as file:
        there = json.load(file)
    assert len(there) == len(dispy4_calls.CALLS) == 58
    with NodeProcess(tmp_path / 'node', port=9701):
        run_python(os.path.join(TESTS, 'dispy4_calls.py'), '--json', str(tmp_path / 'here.json'),
                   cwd=str(tmp_path))
    here = json.loads((tmp_path / 'here.json').read_text())
    assert {name: here[name] for name in here if here[name] != there[name]
            and name not in dispy4_calls.DIFFERS} == {}
    assert {name for name in here if here[name] != there[name]} == set(dispy4_calls.DIFFERS)
    assert len(dispy4_calls.DIFFERS) <= 12


# -- modules and commands --------------------------------------------------------------------------

IMPORTS = """
import sys
import threading
import dispy.httpd
import dispy.dispynode, dispy.dispyscheduler
import dispy_httpd, dispynode, dispyscheduler
assert dispy.httpd is dispy_httpd and sys.modules['dispy.httpd'] is dispy_httpd
assert dispy.dispynode is dispynode and dispy.dispyscheduler is dispyscheduler
assert dispynode.__spec__.name == 'dispynode' and dispynode.dispynode_logger is dispynode.logger
from dispy.httpd import DispyHTTPServer
from dispy.config import MsgTimeout
dispy.config.MsgTimeout = 120
import dispy.config as config
assert config.MsgTimeout == 120 and MsgTimeout == 10
for name in ('json', 'dispy', 'no_such'):
    try:
        __import__('dispy.' + name)
    except ModuleNotFoundError as exc:
        assert exc.name == 'dispy.' + name, exc
    else:
        sys.exit('dispy.%s was imported' % name)
print(dispy.__path__[0])
"""


def test_modules_by_their_old_names(tmp_path):
    """Also where the files were copied; and nothing else that lies beside them is a part of
    dispy."""
    for name in ('dispy.py', 'dispynode.py', 'dispyscheduler.py', 'dispy_httpd.py'):
        shutil.copy(os.path.join(ROOT, name), str(tmp_path))
    (tmp_path / 'no_such.py').write_text('')
    out, err = run_python('-c', IMPORTS, path=str(tmp_path), cwd=str(tmp_path))
    assert out.strip() == str(tmp_path) and err.count('MsgTimeout has no meaning any more') == 1
    os.remove(str(tmp_path / 'dispy_httpd.py'))
    hidden = 'import sys\nsys.modules["dispy_httpd"] = None\n'   # it may be installed as well
    out, err = run_python('-c', hidden + 'import dispy\ntry:\n import dispy.httpd\n'
                          'except ImportError as exc:\n print(exc)',
                          path=str(tmp_path), cwd=str(tmp_path))
    assert 'dispy_httpd' in out


LOGS = """
import logging, sys
import dispy


def job():
    from dispy.dispynode import dispynode_logger
    import dispy
    dispynode_logger.warning('from a job')
    try:
        dispy.JobCluster
    except AttributeError as exc:
        return dispynode_logger.name, str(exc)


if __name__ == '__main__':
    with dispy.JobCluster(job, nodes=[('127.0.0.1', int(sys.argv[1]))],
                          forward_logs=True) as cluster:
        print(*cluster.submit()(60))
"""


@pytest.mark.skipif(any(os.path.exists(os.path.join(path, 'dispy.py'))
                        for path in sys.path if path.endswith('-packages')),
                    reason='dispy is installed, and every node finds it')
def test_a_job_finds_the_logger_of_a_host_with_one_file(tmp_path):
    """The host has dispynode.py alone."""
    alone = tmp_path / 'alone'
    alone.mkdir()
    shutil.copy(os.path.join(ROOT, 'dispynode.py'), str(alone))
    (tmp_path / 'program.py').write_text(LOGS)
    with NodeProcess(tmp_path / 'node', script=str(alone / 'dispynode.py'),
                     env={'PYTHONPATH': ''}) as node:
        out, err = run_python(str(tmp_path / 'program.py'), str(node.port))
    assert out.startswith('dispynode ') and 'dispynode.py alone' in out and 'from a job' in err


def test_commands_that_end_in_py(tmp_path):
    """They are found as modules by other commands beside them, and make way."""
    files = [os.path.join(ROOT, 'commands', name)
             for name in ('dispy.py', 'dispynode.py', 'dispyscheduler.py')]
    with open(os.path.join(ROOT, 'setup.cfg')) as file:
        text = file.read()
    assert all('    commands/%s\n' % os.path.basename(path) in text for path in files)
    assert len({open(path).read() for path in files}) == 1
    (tmp_path / 'bin').mkdir()
    for path in files:
        shutil.copy(path, str(tmp_path / 'bin'))
        name = os.path.basename(path)
        out, _ = run_python(str(tmp_path / 'bin' / name), '--version')
        assert out.startswith(name[:-3] + ' 5')
    (tmp_path / 'bin' / 'tool').write_text(
        'import dispyscheduler, dispy, dispynode, sys\n'
        'print(dispy.__file__, dispynode.__file__, dispyscheduler.Driver is dispy.Driver)\n'
        'print(sys.path[0])\n')
    out, _ = run_python(str(tmp_path / 'bin' / 'tool'))
    assert out.split() == [os.path.join(ROOT, 'dispy.py'), os.path.join(ROOT, 'dispynode.py'),
                           'True', str(tmp_path / 'bin')]
    with NodeProcess(tmp_path / 'node', script=str(tmp_path / 'bin' / 'dispynode.py')) as node, \
            dispy.JobCluster(square, nodes=[node.address]) as cluster:
        assert cluster.submit(3)(60) == 9


# -- options of the daemons ------------------------------------------------------------------------

def options_of(module, *argv):
    return dispynode.parse_arguments(module.make_parser(), argv)


def test_options_of_dispynode():
    args = options_of(dispynode, '-i', '127.0.0.1 127.0.0.2 ', '-i', '::1', '--dispy_port', '99',
                      '--scheduler_port=98', '--init', 'file', '--unsafe_setup', '--admin_secret',
                      'x', '--force_cleanup', '-c', '0', '--serve', '-1')
    assert (args.host == ['127.0.0.1', '127.0.0.2', '::1']
            and (args.port, args.scheduler_port) == (99, 98))
    assert args.force_cleanup and args.serve is None and args.cpus == 0
    assert args.obsolete == ['--init', '--unsafe-setup', '--admin-secret']
    assert (options_of(dispynode, '--serve', '0').serve is None
            and options_of(dispynode, '--serve', '3').serve == 3)


def test_options_of_dispyscheduler():
    args = options_of(dispyscheduler, '--nodes', 'a', '-n', 'b c', '--msg_timeout', '5',
                      '--dest_path_prefix', 'd', '--cooperative',
                      '--cleanup_nodes', '--early_cluster_scheduler')
    assert args.node == ['a', 'b', 'c'] and args.fifo and args.cleanup_nodes
    assert args.obsolete == ['--msg-timeout', '--dest-path-prefix', '--cooperative']
    assert options_of(dispyscheduler, '--fair_cluster_scheduler').fair


NODE_INI = """[DEFAULT]
cpus = -1
loglevel = True
hosts = ['127.0.0.1', '::1']
ext_hosts = []
dispy_port = 9700
ipv4_udp_multicast = False
name = one
node_init =
max_file_size = 0
zombie_interval = 5.0
ping_interval = 0
serve = -1
client_shutdown = True
secret = a%secret
admin_secret =
safe_setup = False
daemon = False
"""


def test_a_configuration_that_dispy_4_has_saved(tmp_path):
    path = tmp_path / 'node.ini'
    path.write_text(NODE_INI)
    args = options_of(dispynode, '--config', str(path), '--name', 'two')
    assert ((args.cpus, args.debug, args.host, args.port, args.name)
            == (-1, True, ['127.0.0.1', '::1'], 9701, 'two'))
    assert ((args.zombie_interval, args.serve, args.client_shutdown, args.secret)
            == (5.0, None, True, 'a%secret'))
    assert args.obsolete == ['--unsafe-setup'] and not args.daemon and args.max_file_size is None
    assert options_of(dispynode, '--config', str(path), '-i', '10.0.0.1').host == ['10.0.0.1']
    path.write_text(NODE_INI.replace('9700', '9800'))
    assert options_of(dispynode, '--config', str(path)).port == 9800
    for text, wrong in (('[DEFAULT]\ncolour = red\n', 'colour'),
                        ('[DEFAULT]\nhosts = [x\n', 'hosts'), ('[DEFAULT]\nx\n', 'neither JSON'),
                        ('[DEFAULT]\ndispy_port = x\n', '%s.*--port' % path)):
        path.write_text(text)
        with pytest.raises(dispynode.StartError, match=wrong):
            options_of(dispynode, '--config', str(path))
    path.write_text("[DEFAULT]\nnodes = ['a', 'b']\npulse_interval = 0\nhttp_server = True\n"
                    "scheduler_alg = fcfs_cluster\ndaemon = True\n")
    args = options_of(dispyscheduler, '--config', str(path))
    assert (args.node, args.fifo, args.httpd, args.daemon) == (['a', 'b'], True,
                                                               dispyscheduler.HTTPD_PORT, True)


def test_a_node_with_old_options(tmp_path):
    """It says what has no meaning, listens at all addresses, cleans up, and ends when a cleanup
    asks for it."""
    marks = tmp_path / 'marks'
    marks.mkdir()
    (tmp_path / 'data').write_text('x')

    def cleanup():
        try:
            dispynode_shutdown()   # noqa: F821
        except NameError:
            open(os.path.join(str(marks), 'may not'), 'w').close()

    options = ('-i', '127.0.0.2 127.0.0.3 ', '--admin_secret', 'x', '--force_cleanup')
    with NodeProcess(tmp_path / 'one', *options, '--client_shutdown', listen=(), cpus=0) as one:
        assert '--admin-secret has no meaning any more: there is no dispyadmin' in one.log()
        for host in ('127.0.0.2', '127.0.0.3'):
            with dispy.JobCluster(square, nodes=[(host, one.port)],
                                  depends=[str(tmp_path / 'data')], dest_path='/kept',
                                  cleanup=False) as cluster:
                assert cluster.submit(2)(60) == 4
            eventually(lambda: not os.path.exists(os.path.join(one.prefix, 'kept')))
        with dispy.JobCluster(square, nodes=[('127.0.0.2', one.port)], cleanup=cleanup) as cluster:
            assert cluster.submit(2)(60) == 4
        assert one.process.wait(30) == 0 and not os.listdir(str(marks))
    with NodeProcess(tmp_path / 'two') as two:
        with dispy.JobCluster(square, nodes=[two.address], cleanup=cleanup) as cluster:
            assert cluster.submit(2)(60) == 4
        eventually(lambda: os.listdir(str(marks)) == ['may not'])
        assert two.process.poll() is None


# -- clusters --------------------------------------------------------------------------------------

def test_elements_of_nodes():
    def parsed(nodes):
        return [tuple(spec[:3]) for spec in dispy.parse_nodes(nodes, 9701)]
    assert parsed(('a', 'b', 'c')) == [('a', 9701, 0), ('b', 9701, 0), ('c', 9701, 0)]
    assert (parsed(('a', '99', '2')) == parsed([('a', 99, 2)])
            == parsed([{'host': 'a', 'port': '99', 'cpus': '2'}]) == [('a', 99, 2)])
    assert (parsed([dispy.NodeAllocate('a', port='99', cpus='2')]) == [('a', 99, 2)]
            and parsed(('a',)) == [('a', 9701, 0)])
    for node in (('a', 99, 2, ['f'], (1, 2)),
                 {'host': 'a', 'port': 99, 'cpus': 2, 'depends': ['f'], 'setup_args': (1, 2)}):
        spec, = dispy.parse_nodes([node], 9701)
        assert (spec[:3] == ('a', 99, 2)
                and (spec.allocator.depends, spec.allocator.setup_args) == (['f'], (1, 2)))
    assert parsed([{'cpus': 4}]) == [('*', 9701, 4)]
    for wrong in ({}, {'colour': 1}, ('a', 1, 2, [], (), 3)):
        with pytest.raises(TypeError):
            dispy.parse_nodes([wrong], 9701)
    own = dispy.NodeAllocate('localhost')
    assert own.ip_addr == '127.0.0.1' and dispy.NodeAllocate('no.such.host.invalid').ip_addr is None
    own.ip_addr = '10.0.0.1'
    assert own.ip_addr == '10.0.0.1' and own.host == 'localhost'


def test_parameters_by_position():
    with pytest.raises(TypeError, match='as far as dispy_port, and 9 '
                       'were given: give the others by name, as ext_host=, ip_addr='):
        dispy.JobCluster(square, None, [], None, None, None, None, 'x', 'y')
    with pytest.raises(TypeError, match='SharedJobCluster takes 7 .* as client_port=$'):
        dispy.SharedJobCluster(square, None, [], None, None, None, None, 0)


def test_old_parameters_attributes_and_jobs(make_cluster, told, caplog):  # noqa: F811
    """One cluster of each kind, given and asked what old scripts give and ask."""
    seen = []
    with make_cluster(square, nodes=[], depends=[], ip_addr=['127.0.0.1', '127.0.0.2'], port=0,
                      client_port=0, node_port=None, poll_interval='5',
                      ext_ip_addr='10.0.0.1', pulse_interval='1000', ping_interval='10',
                      callback=seen.append, loglevel=logging.INFO,
                      cluster_status=lambda *change: seen.append(change)) as cluster:
        job = cluster.submit(3)
        assert job(True) == job(clear=True) == job(30) == 9 and isinstance(job.id, int)
        eventually(lambda: job in seen)
        assert (cluster.pulse_interval, cluster.ping_interval, cluster.poll_interval) == (1000, 10,
                                                                                          5)
        assert (cluster.wait(30) and cluster.start_time <= job.submit_time <= cluster.end_time
                and cluster.cpu_time >= 0)
        assert cluster.job_status == seen.append and callable(cluster.cluster_status)
        cluster.job_status = None
        assert cluster.submit(4)() == 16
        status = cluster.status()
        nodes, pending = status
        assert (len(nodes) == 1 and pending == 0 and status.refused == []
                and status.all_nodes == nodes)
        node, = nodes
        assert (node.avail_cpus == node.cpus > 0 and node.tx > 0 and node.rx > 0
                and node.update_time >= job.submit_time - 1)
        assert cluster.print_status(10) is None and cluster.print_status(wall_time='10') is None
        assert (cluster.send_file(__file__, node, relay=True)
                == cluster.send_file(__file__, node, False) == 0)
        with pytest.raises(ValueError):
            cluster.submit_node('127.0.0.99', 1)
    assert sorted(set(told())) == ['clear', 'client_port', 'ext_host', 'poll_interval', 'port',
                                   'relay'] and len(told()) == 6
    changes = [change for change in seen if isinstance(change, tuple)]
    assert ([status for status, _, other in changes if other is job]
            == [DispyJob.Created, DispyJob.Running, DispyJob.Finished])
    assert ([status for status, _, other in changes if other is None]
            == [DispyNode.Initialized, DispyNode.AvailInfo, DispyNode.Closed])
    assert (changes[-1][:1] == (16,) and changes[-1][1].state == 'closed'
            and changes[-1][1].name == node.name)


def test_nodes_that_are_off(tmp_path, caplog):
    """They are apart, and a job that is submitted to one says so, once."""
    with NodeProcess(tmp_path) as node, \
            dispy.JobCluster(square, nodes=[node.address, ('127.0.0.3', node.port)]) as cluster:
        cluster.wait_nodes(1, 30)
        off, = eventually(lambda: [other for other in cluster.status().refused
                                   if 'no program listens' in other.reason])
        assert ([other.ip_addr for other in cluster.status().nodes] == ['127.0.0.1']
                and off.ip_addr == '127.0.0.3')
        assert len(cluster.status().all_nodes) == 2
        caplog.clear()
        jobs = [cluster.submit_node('127.0.0.3', n) for n in range(3)]
        texts = [record.getMessage() for record in caplog.records
                 if 'Jobs that were submitted to it wait' in record.getMessage()]
        assert len(texts) == 1 and '127.0.0.3 cannot be used now: no program listens' in texts[0]
        assert cluster.submit_node('127.0.0.1', 5)(30) == 25 and not any(job.finish.is_set()
                                                                         for job in jobs)
        for job in jobs:
            cluster.cancel(job)


def test_more_addresses_to_wait_at(tmp_path):
    """Nodes connect to each of them."""
    with dispy.JobCluster(square, nodes=['*'],
                          host=['127.0.0.1:9731', '127.0.0.2:9731']) as cluster:
        nodes = [NodeProcess(tmp_path / host, '--name', host, '--scheduler_host', host,
                             '--scheduler_port', '9731') for host in ('127.0.0.1', '127.0.0.2')]
        try:
            eventually(lambda: {'127.0.0.1', '127.0.0.2'}
                       <= {node.name for node in cluster.status().nodes})
        finally:
            for node in nodes:
                node.stop()
    with pytest.raises(TypeError, match='host='):
        dispy.JobCluster(square, host=[5])


def test_jobs_of_a_program_and_their_order():
    job = DispyJob(None, (1, [2]), ())
    assert ((job._args, job.kwargs, job.status, job.ip_addr)
            == ((1, [2]), {}, DispyJob.Created, None) and not job.wait(0))
    assert (DispyJob('mine', (), {'a': 1}).id == 'mine'
            and DispyJob('mine', (), {'a': 1})._kwargs == {'a': 1})
    with dispy.JobCluster(square, nodes='local') as cluster:
        jobs = [cluster.submit(n) for n in range(50)]
        assert sorted(reversed(jobs)) == jobs and not jobs[0] < jobs[0]
        assert min((1, jobs[2]), (1, jobs[1])) == (1, jobs[1])
        with pytest.raises(TypeError):
            jobs[0] < 5


class Kept:
    def __init__(self, n):
        self.n = n


def made_partial():
    def partial_of(n, more):
        return n + more
    return functools.partial(partial_of, more=2)


def test_what_a_job_is_given_and_calls(told, tmp_path, monkeypatch):
    """Instances, modules and partials for one job; relay= and timeout= of what jobs call."""
    monkeypatch.chdir(str(tmp_path))
    (tmp_path / 'beside.py').write_text('VALUE = 7\n')

    def job(kept):
        with open('out.txt', 'w') as file:
            file.write('x')
        return (dispy_provisional_result(1, relay=True, timeout=5),   # noqa: F821
                dispy_send_file('out.txt', relay=True, timeout=5),   # noqa: F821
                kept.n, type(kept) is Kept, partial_of(3), beside.VALUE)   # noqa: F821
    spec = importlib.util.spec_from_file_location('beside', str(tmp_path / 'beside.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    with dispy.JobCluster(job, nodes='local', depends=[Kept(0)]) as cluster:
        done = cluster.submit(Kept(4), dispy_job_depends=[Kept(1), module, made_partial()])
        assert done(60) == (0, 0, 4, True, 5, 7), done.exception
    assert (tmp_path / 'out.txt').read_text() == 'x'


# -- the monitor, the log, recovery, the shell -----------------------------------------------------

def test_the_monitor_as_old_scripts_use_it(told):
    def fail(text):
        raise ValueError('a failure')
    with dispy.JobCluster(fail, nodes='local') as cluster:
        server = dispy_httpd.DispyHTTPServer(cluster, port=0, poll_sec=1, show_job_args=False,
                                             DocumentRoot='/data')
        try:
            assert server._clusters[cluster.name] is cluster and told() == ['DocumentRoot']
            server.cluster_status(server._clusters[cluster.name], DispyJob.Created, None, None)
            server.cluster_status(DispyJob.Created, None, None)
            with pytest.raises(TypeError):
                server.cluster_status(1)
            cluster.submit('a private word')(60)
            base, _, token = server.url.partition('/#token=')
            failures = urllib.request.Request(base + '/api/failures',
                                              headers={'Authorization': 'Bearer ' + token})

            def rows():
                with urllib.request.urlopen(failures, timeout=20) as answer:
                    return json.load(answer)['rows']
            found = eventually(rows)
            assert found[0]['jobs'][0]['arguments'] == '' and 'private' not in json.dumps(found)
        finally:
            server.shutdown(wait=False)


@pytest.mark.parametrize('configured, level, shown', [
    ('', 'INFO', True), ('', 'ERROR', False),
    ('logging.basicConfig(handlers=[logging.NullHandler()])', 'INFO', False),
    ('dispy.logger.addHandler(logging.NullHandler())', 'INFO', False)])
def test_messages_are_shown_where_no_logging_is_configured(configured, level, shown):
    out, err = run_python('-c',
                          'import logging, dispy\n%s\ndispy.logger.setLevel(dispy.logger.%s)\n'
                          'dispy.logger.info("of the %%s", "program")' % (configured, level))
    assert ('dispy - of the program\n' in err) is shown and out == ''


def test_nothing_to_recover(tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(FileNotFoundError, match='has left no jobs'):
        dispy.recover_jobs()
    (tmp_path / '_dispy_20200101000000').write_text('of dispy 4')
    with pytest.raises(FileNotFoundError, match='has left no jobs'):
        dispy.recover_jobs()
    assert os.listdir(str(tmp_path)) == ['_dispy_20200101000000']


LEAVES = """
import os, sys, dispy
cluster = dispy.JobCluster(lambda n: n * n, nodes=[('127.0.0.1', %d)], fault_recover=True)
jobs = [cluster.submit(n) for n in range(3)]
cluster.wait()
for job in jobs:
    pass
cluster.submit(3)
os._exit(0)
"""


def test_recover_jobs_takes_the_newest_file_here(tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    with NodeProcess(tmp_path / 'node') as node:
        run_python('-c', LEAVES % node.port, cwd=str(tmp_path))
        name, = [name for name in os.listdir('.') if re.fullmatch(r'_dispy_\d{14}', name)]
        jobs = dispy.recover_jobs(timeout=60)
    assert sorted(job.result for job in jobs if job.status == DispyJob.Finished)[:3] == [0, 1, 4]


def test_options_of_the_shell(tmp_path):
    (tmp_path / 'program').write_text('#!/bin/sh\necho "$1"\n')
    os.chmod(str(tmp_path / 'program'), 0o755)
    out, err = run_python('-m', 'dispy', '-c', '-d', '-n', 'local', '-a', '"--scheduler_node" x',
                          str(tmp_path / 'program'))
    assert out == '--scheduler_node\n'
    with NodeProcess(tmp_path / 'node',
                     env={'DISPY_SECRET': 'another secret of these tests'}) as node:
        out, err = run_python('-m', 'dispy', '--secret', 'another secret of these tests',
                              '--ip_addr', '127.0.0.1', '--wait-nodes', '60', '-n',
                              '127.0.0.1:%d' % node.port, '-a', 'y', str(tmp_path / 'program'))
    assert out == 'y\n'


def test_short_callbacks_come_one_after_the_other():
    """As in dispy 4, so that they may share variables; one that blocks keeps no other from its
    turn."""
    inside, most, release = [], [], threading.Event()

    def ended(job):
        inside.append(job)
        most.append(len(inside))
        if job.result == 'block':
            release.wait(60)
        inside.remove(job)
        if job.result == 'last':
            release.set()

    with dispy.JobCluster(lambda value: value, nodes='local', job_status=ended) as cluster:
        for n in range(500):
            cluster.submit(n)
        assert cluster.wait(60)
        assert len(most) == 500 and set(most) == {1}
        for _ in range(2):
            cluster.submit('block')
        eventually(lambda: len(inside) == 2)
        cluster.submit('last')
        assert cluster.wait(60) and max(most) == 3


def test_threads_for_callbacks():
    """One does all that is short; others help while it is held up, also if it is held up for long,
    and go."""
    pool, release, done = dispy.Pool('test-pool', 4, 0.05), threading.Event(), []

    def names():
        return {thread.name
                for thread in threading.enumerate() if thread.name.startswith('test-pool-')}
    for n in range(1000):
        pool.run(lambda n=n: done.append((n, threading.current_thread().name)))
    eventually(lambda: len(done) == 1000)
    assert done == [(n, 'test-pool-1') for n in range(1000)]
    pool.run(release.wait, 60)
    for n in range(30):   # each finds the others gone, or about to go
        pool.run(done.append, n)
        eventually(lambda: done[-1] == n)
    eventually(lambda: names() == {'test-pool-1'})
    for _ in range(5):
        pool.run(release.wait, 60)
    eventually(lambda: {'test-pool-2', 'test-pool-3', 'test-pool-4'} <= names())
    release.set()
    pool.run(done.append, 'last')
    eventually(lambda: done[-1] == 'last' and names() <= {'test-pool-1'})
    pool.close()
    eventually(lambda: not names())
