"""What the product says: that a message names the cause, the numbers, the host and a remedy that
fits."""

import ast
import concurrent.futures
import functools
import glob
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import cloudpickle
import psutil
import pytest

import dispy
import dispynode
from conftest import ROOT, eventually
from dispy import (DispyJob, Misfits, NodeScan, how_to_share, remedy, remedy_for_source,
                   with_hint_for_module)
from dispynode import (HandshakeError, Holder, Silence, Unreached, address_in, dial_text,
                       is_own_address, same_secret, why_unreached)
from nodes import NodeProcess, SchedulerProcess

NOWHERE = ('127.0.0.1', 9)   # no program listens there


def square(n):
    return n * n


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def run_python(*argv, cwd=None, **env):
    """What a program says on stdout and stderr, and its exit status."""
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env=dict(os.environ, **env),
                          timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    return done.stdout, done.stderr, done.returncode


@pytest.fixture
def node(tmp_path):
    with NodeProcess(tmp_path / 'node') as node:
        yield node


# -- files that were copied alone, and old Pythons -------------------------------------------------

@pytest.mark.parametrize('name, lacks', [('dispy', 'dispynode.py'), ('dispyscheduler', 'dispy.py'),
                                         ('dispy_httpd', 'dispy.py')])
def test_a_file_that_was_copied_alone_says_which_belongs_beside_it(tmp_path, name, lacks):
    shutil.copy(os.path.join(ROOT, name + '.py'), str(tmp_path))
    packages = tmp_path / 'packages'
    packages.mkdir()
    for package in (cloudpickle, psutil):
        where = os.path.dirname(package.__file__)
        os.symlink(where, str(packages / os.path.basename(where)))
    for argv in ([name + '.py', '--help'], ['-c', 'import ' + name]):
        # -S: without what else is installed, where a dispy may be
        out, err, status = run_python('-S', *argv, cwd=str(tmp_path), PYTHONPATH=str(packages))
        told = err.splitlines()[-1]
        assert status == 1 and lacks in told and str(tmp_path) in told, err
        assert argv[0] == '-c' or 'Traceback' not in err, err


def test_a_file_beside_one_of_another_release_says_so(tmp_path):
    """As when dispy 4 is installed and only dispyscheduler.py was copied."""
    shutil.copy(os.path.join(ROOT, 'dispyscheduler.py'), str(tmp_path))
    (tmp_path / 'dispy.py').write_text('class JobCluster:\n    pass\n')
    _, err, status = run_python('dispyscheduler.py', cwd=str(tmp_path), PYTHONPATH='')
    assert (status == 1 and 'Traceback' not in err and 'same release' in err
            and str(tmp_path / 'dispy.py') in err), err


def test_dispynode_compiles_in_python_3_6_and_looks_at_the_version_first():
    with open(os.path.join(ROOT, 'dispynode.py')) as file:
        tree = ast.parse(file.read(), feature_version=(3, 6))
    first = next(number for number, node in enumerate(tree.body) if isinstance(node, ast.If))
    assert 'version_info' in ast.dump(tree.body[first].test)
    before = [alias.name for node in tree.body[:first]
              if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    assert before == ['sys']


@pytest.mark.parametrize('version', ['3.6', '3.7'])
def test_dispynode_ends_under_an_old_python(version):
    pyenv = os.environ.get('PYENV_ROOT', os.path.join(os.path.expanduser('~'), '.pyenv'))
    found = (glob.glob(os.path.join(pyenv, 'versions', version + '.*', 'bin', 'python3'))
             + glob.glob('/usr/bin/python' + version))
    if not found:
        pytest.skip('no Python %s was found' % version)
    done = subprocess.run(
        [found[0], os.path.join(ROOT, 'dispynode.py'), '-i', '127.0.0.1', '-p', '0'], timeout=30,
        stdin=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if not name.startswith('PYTHON')},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    assert done.returncode == 1 and 'Traceback' not in done.stdout
    assert ('needs Python 3.8 or later' in done.stdout and 'Python %s' % version in done.stdout
            and found[0].rpartition('/')[0] in done.stdout)


# -- nodes that are not reached --------------------------------------------------------------------

@pytest.mark.parametrize('exc, why, text', [
    (ConnectionRefusedError(), Unreached.DOWN, 'no program listens'),
    (Silence('no answer within 10 s'), Unreached.UNREACHABLE, '10 s'),
    (socket.timeout(), Unreached.UNREACHABLE, 'no answer within'),
    (OSError(113, 'No route to host'), Unreached.UNREACHABLE, 'No route to host'),
    (socket.gaierror(socket.EAI_NONAME, 'Name or service not known'), Unreached.NO_SUCH_NAME,
     'does not resolve'),
    (socket.gaierror(socket.EAI_AGAIN, 'Temporary failure'), Unreached.NAME_SERVICE,
     'name service'),
    (UnicodeError('label too long'), Unreached.NO_SUCH_NAME, 'label too long'),
    (HandshakeError('wrong secret'), Unreached.REFUSED, 'wrong secret'),
])
def test_only_who_was_refused_is_called_refused(exc, why, text):
    assert why_unreached(exc) is why and text in dial_text(exc)


START = 'Run `python dispynode.py`'


@pytest.mark.parametrize('attempts, others, said, not_said', [
    ([], False, [START], []),
    ([('dialling', 9701, False)], False, [START], []),
    ([('down', 9701, False)], False, [START], ['firewall']),
    ([('unreachable', 9701, False), ('unreachable', 9801, False)], False,
     ['firewall', '9701 and 9801'], [START]),
    ([('no such name', 9701, False)], False, ['name'], [START, 'firewall']),
    ([('no name service', 9701, False)], False, ['address'], [START, 'firewall']),
    ([('down', 9701, False), ('refused', 9701, False)], False, [], [START]),
    ([('down', 9701, False), ('setting up', 9701, False)], False, [], [START]),
    ([('down', 9701, False)], True, ['Name one of these'], [START]),
    ([('down', 9702, True)], False, ['Run `python dispyscheduler.py` there'], [START]),
    ([('unreachable', 9702, True)], False, ['9702'], ['Run']),
    ([('asking', 9702, True)], False, ['The scheduler is connected', 'dispynode.py'], []),
])
def test_what_to_do_fits_what_came_of_the_attempts(attempts, others, said, not_said):
    """To start a dispynode is said only where none has answered."""
    text = remedy(attempts, others)
    for part in said:
        assert part in text, text
    for part in not_said:
        assert part not in text, text
    assert bool(text) == bool(said)


def test_attempts_that_failed_are_known_by_name(caplog):
    # Longer than a part of a name may be, so that no name service is needed to know that
    no_name = 64 * 'x' + '.invalid'
    with dispy.JobCluster(square, nodes=[NOWHERE, no_name]) as cluster:
        eventually(lambda: len({node.ip_addr: node.state for node in cluster.status().refused
                                if node.reason != 'not reached yet'}) == 2)
        states = {node.ip_addr: node.state for node in cluster.status().all_nodes}
        assert states == {'127.0.0.1': 'down', no_name: 'no such name'}
        with pytest.raises(dispy.NoNodes) as caught:
            cluster.wait_nodes(1, 0.1)
        assert 'refused' not in str(caught.value) and START in str(caught.value)
    assert not [text for text in warnings_in(caplog) if 'refused' in text]


@pytest.mark.parametrize('wildcard', ['10.255.*', 'no-such-lab*'])
def test_a_wildcard_that_fits_no_node_lists_those_that_answer(node, wildcard):
    with dispy.JobCluster(square, nodes=[wildcard]) as cluster:
        def complaint():
            with pytest.raises(dispy.NoNodes) as caught:
                cluster.wait_nodes(1, 0.05)
            return str(caught.value)
        text = eventually(lambda: [text for text in [complaint()]
                                   if '127.0.0.1:%d' % node.port in text])[0]
        assert repr(wildcard) in text and 'wildcard' in text and START not in text


def test_nodes_that_are_not_meant_are_counted_and_not_all_shown():
    misfits = Misfits()
    for number in range(30):
        misfits.add('c', b'%d' % number, '10.0.0.%d:9701' % number)
    misfits.add('c', b'3', 'lab3 (10.0.0.3:9701)')      # its name is known by now
    misfits.add('c', b'3', '[fd97::3]:9701')            # it answers at another address as well
    text = misfits.text('c', {b'5'})
    assert (text.endswith(' and 19 more') and '10.0.0.5:' not in text
            and misfits.text('other', ()) == '')
    assert 'lab3 (10.0.0.3:9701)' in Misfits.text(
        misfits, 'c', {b'%d' % number for number in range(30) if number != 3})
    misfits.forget('c')
    assert misfits.text('c', ()) == ''


def test_an_address_of_a_link_has_its_interface():
    name = socket.if_indextoname(1)
    assert (address_in(('fe80::1', 9701, 0, 1)) == 'fe80::1%' + name
            == address_in(('fe80::1%' + name, 9701, 0, 1)))
    assert (address_in(('fd97::1', 9701, 0, 0)) == 'fd97::1'
            and address_in(('::ffff:10.0.0.1', 9701, 0, 0)) == '10.0.0.1')
    assert address_in(('10.0.0.1', 9701)) == '10.0.0.1'


def test_own_addresses_are_known():
    assert (is_own_address('127.0.0.1') and not is_own_address('192.0.2.1')
            and not is_own_address('no address'))


def test_a_look_at_named_nodes_waits_for_each(node):
    """Guards against: what an answer had changed was looked at after the nodes had been
    described."""
    for _ in range(30):
        with NodeScan([NOWHERE]) as survey:
            down, = survey.look()
        assert down.state == 'down' and 'no program listens' in down.reason
    out, _, status = run_python('-m', 'dispy', '--list-nodes', '-n', '127.0.0.1:9', '-n',
                                '127.0.0.1:%d' % node.port)
    assert (status == 0 and 'not reached yet' not in out
            and re.search('127.0.0.1:9 .*no program listens', out)), out


# -- nodes that serve others, and other secrets ----------------------------------------------------

def test_a_node_that_belongs_to_a_scheduler_says_so(scheduler_and_node, capsys):
    scheduler, port = scheduler_and_node
    with dispy.SharedJobCluster(square, scheduler_port=scheduler) as shared:
        assert shared.submit(3)(30) == 9
        with dispy.JobCluster(square, nodes=[('127.0.0.1', port)]) as cluster:
            with pytest.raises(dispy.NoNodes) as caught:
                cluster.wait_nodes(1, 3)
        for part in ('dispyscheduler', 'SharedJobCluster',
                     'scheduler_host=%r' % socket.gethostname(), 'scheduler_port=%d' % scheduler):
            assert part in str(caught.value), caught.value
        assert START not in str(caught.value)
        with NodeScan([('127.0.0.1', port)]) as survey:
            assert 'dispyscheduler' in survey.look()[0].reason


def test_how_a_node_that_serves_others_is_shared():
    assert 'scheduler_port' not in how_to_share(Holder('lab', 7, 9702, False))
    assert "scheduler_host='lab', scheduler_port=9800" in how_to_share(
        Holder('lab', 7, 9800, False))
    assert 'dispyscheduler' in how_to_share(Holder('lab', 7, 0, False))
    assert how_to_share(Holder('lab', 7, 0, True)) == ''    # it will be free by itself


def test_another_secret_names_the_file_that_this_side_uses(tmp_path, monkeypatch):
    monkeypatch.delenv('DISPY_SECRET')
    path = tmp_path / 'secret'
    path.write_text('one that only this test has\n')
    path.chmod(0o600)
    text = same_secret(dispynode.derive_key(dispynode.find_secret(None, str(path))))
    assert str(path) in text and '--secret-file' in text
    monkeypatch.setenv('DISPY_SECRET', 'one that only the environment has')
    text = same_secret({1: (dispynode.derive_key(dispynode.find_secret()),)})
    assert 'its own from DISPY_SECRET' in text and str(path) not in text
    assert 'secret=' in same_secret(
        dispynode.derive_key(dispynode.find_secret('one that a program gives')))


def test_a_node_of_another_user_on_this_machine_is_no_warning(tmp_path, caplog):
    """It is named where no node can be used, with its port."""
    with socket.socket() as sock:   # a port where no other node answers
        sock.bind(('127.0.0.1', 0))
        port = sock.getsockname()[1]
    with NodeProcess(tmp_path / 'other', port=port,
                     env={'DISPY_SECRET': 'the secret of another user'}) as other:
        with dispy.JobCluster(square, nodes=[('*', port)]) as cluster:
            found = eventually(lambda: [node for node in cluster.status().all_nodes
                                        if 'another secret' in node.reason])
            assert 'port %d' % other.port in found[0].reason
            with pytest.raises(dispy.NoNodes) as caught:
                cluster.wait_nodes(1, 0.1)
            assert 'another secret' in str(caught.value) and START not in str(caught.value)
        assert not warnings_in(caplog) and 'WARNING: 127' not in other.log()
        with dispy.JobCluster(square, nodes=[other.address]):   # it was named: then it is one
            eventually(lambda: [text for text in warnings_in(caplog) if 'wrong secret' in text
                                and '127.0.0.1:%d' % other.port in text])
        eventually(lambda: re.search(r'was rejected: wrong secret.*\(port %d\)' % other.port,
                                     other.log()))


# -- jobs ------------------------------------------------------------------------------------------

def sleep(seconds, what=''):
    time.sleep(seconds)


def test_a_timeout_says_what_the_job_waits_for(make_cluster):
    with make_cluster(sleep, nodes=[NOWHERE]) as cluster:
        job = cluster.submit(0, what='tea')
        eventually(lambda: any('no program listens' in node.reason
                               for node in cluster.status().all_nodes))
        for call in (job, job.get, functools.partial(cluster.gather, [job]),
                     lambda timeout: list(cluster.as_completed([job], timeout))):
            with pytest.raises(TimeoutError) as caught:
                call(0.125)
            for part in ("0, what='tea'", '0.125 s', 'waits for a node', '127.0.0.1:9',
                         'no program listens'):
                assert part in str(caught.value), caught.value
        cluster.cancel(job)
    with make_cluster(sleep, nodes='local') as cluster:
        jobs = [cluster.submit(60) for _ in range(20)]
        eventually(lambda: jobs[0].status == DispyJob.Running and jobs[0].start_time, 60)
        with pytest.raises(TimeoutError) as caught:
            jobs[0](0.0625)
        assert 'running on 127.0.0.1 for' in str(caught.value)
        with pytest.raises(TimeoutError) as caught:
            jobs[-1](0.0625)
        assert ('job 20 with the argument 60' in str(caught.value)
                and 'waits for its turn' in str(caught.value))
        assert re.search(r'\d+ running, \d+ waiting', str(caught.value))
        cluster.cancel_all()


def test_a_timeout_of_a_future_says_what_the_call_waits_for():
    with dispy.DispyExecutor(nodes=[NOWHERE]) as executor:
        future = executor.submit(sleep, 0, what='tea')
        for wait in (future.result, future.exception):
            with pytest.raises(concurrent.futures.TimeoutError) as caught:
                wait(0.125)
            assert ("0, what='tea'" in str(caught.value) and 'waits for a node' in str(caught.value)
                    and '0.125 s' in str(caught.value))
        executor.shutdown(cancel_futures=True)


def end(how, number):
    if how == 'signal':
        os.kill(os.getpid(), number)
    elif how == 'exit':
        os._exit(number)
    elif how == 'memory':
        taken = bytearray(number)   # noqa: F841
    elif how == 'timeout':
        raise TimeoutError('of its own')
    time.sleep(60)


def test_what_has_ended_a_job_has_its_numbers_and_the_arguments(make_cluster):
    with make_cluster(end, nodes='local') as cluster:
        jobs = [cluster.submit('signal', int(signal.SIGKILL)), cluster.submit('exit', 7),
                cluster.submit('sleep', 1, dispy_timeout=0.25)]
        expected = [('signal 9 (SIGKILL', "'signal', 9"), ('exit code 7', "'exit', 7"),
                    ('0.25 s', "'sleep', 1")]
        for job, parts in zip(jobs, expected):
            assert job.wait(60)
            with pytest.raises(dispy.JobFailed) as caught:
                job.get()
            for text in (job.exception, str(caught.value)):
                assert (all(part in text for part in parts) and 'job %d' % job.id in text
                        and text.count('arguments') == 1), text
        own = cluster.submit('timeout', 3)
        assert own.wait(60) and own.exception.rstrip().endswith('TimeoutError: of its own')


def test_exit_statuses_have_the_arguments(make_cluster, tmp_path):
    program = tmp_path / 'program'
    program.write_text('#!/bin/sh\n[ "$1" != kill ] || kill -9 $$\nexit "$1"\n')
    program.chmod(0o700)
    with make_cluster(str(program), nodes='local') as cluster:
        three, killed = cluster.submit('3'), cluster.submit('kill')
        with pytest.raises(subprocess.CalledProcessError) as caught:
            three.get(60)
        assert caught.value.cmd == ['program', '3'] and caught.value.returncode == 3
        with pytest.raises(subprocess.CalledProcessError, match="'kill'.*SIGKILL: 9"):
            killed.get(60)
        assert 'exit status 3' in repr(three) and 'signal 9, SIGKILL' in repr(killed)
        assert three.exception is None


def test_arguments_that_are_large_or_cannot_be_shown_are_left_out():
    job = DispyJob('c', dispy.packed_plain((bytes(100000),), {}), None, 1)
    job.state = dispy.JobState.ABANDONED
    dispy.end_without(job, 'node lab was lost', dispy.Failures('/', (), False))
    assert job.exception == 'node lab was lost'
    assert dispy.values_of(b'no pickle', False) is None


# -- callbacks -------------------------------------------------------------------------------------

def fail_for(job):
    raise KeyError('in the callback')


def take_nothing():
    pass


class Callbacks:
    def leave(self, job):
        sys.exit(3)


@pytest.mark.parametrize('callback, name, error, shows', [
    (fail_for, 'fail_for', 'KeyError', 'in fail_for'),
    (take_nothing, 'take_nothing', 'TypeError', ''),
    (Callbacks().leave, 'Callbacks.leave', 'SystemExit', 'in leave')])
def test_an_exception_in_a_callback_names_it_and_the_job(caplog, callback, name, error, shows):
    with dispy.JobCluster(square, nodes='local', callback=callback) as cluster:
        cluster.submit_job_id('tea', 3)
        assert cluster.wait(30)
    told, = warnings_in(caplog)
    assert 'callback' in told and name in told and "job 'tea'" in told and error in told
    record = next(record for record in caplog.records if record.levelno >= logging.WARNING)
    text = logging.Formatter().format(record)
    assert (error in text and shows in text and 'dispy.py' not in text
            and 'dispynode.py' not in text), text


def test_an_exception_in_cluster_status_names_it(caplog):
    def follow(status, node, job):
        raise KeyError(status)
    with dispy.JobCluster(square, nodes='local', cluster_status=follow) as cluster:
        cluster.submit_job_id('tea', 3)(30)
    assert all('follow' in told for told in warnings_in(caplog))
    for record in caplog.records:
        assert record.exc_info is None or 'dispy.py' not in logging.Formatter().format(record)
    assert any("job 'tea'" in told for told in warnings_in(caplog))


# -- modules that are missing, functions that do not travel ----------------------------------------

TOLD = ("ModuleNotFoundError: No module named '{0}'. the import failed: f -> {0}. To fix this, " +
        'install {0} on this node (/opt/bin/python -m pip install {0}), '
        'or list its file in depends if it is a module of your own')


def test_a_hint_for_a_missing_module_fits_what_it_is_here(tmp_path, monkeypatch):
    (tmp_path / 'own_of_this_test.py').write_text('')
    monkeypatch.syspath_prepend(str(tmp_path))
    installed = with_hint_for_module(TOLD.format('pytest'), 'lab2')
    assert installed.endswith('install pytest on node lab2 (/opt/bin/python -m pip install pytest)')
    standard = with_hint_for_module(TOLD.format('json'), 'lab2')
    assert ('Python %d.%d' % sys.version_info[:2] in standard and 'lab2' in standard
            and 'pip' not in standard)
    own = with_hint_for_module(TOLD.format('own_of_this_test'), 'lab2')
    assert 'depends' in own and 'pip' not in own
    unknown = TOLD.format('no_module_by_this_name')
    assert with_hint_for_module(unknown, 'lab2') == unknown
    plain = with_hint_for_module("Traceback...\nModuleNotFoundError: No module named 'psutil'\n",
                                 'lab2')
    assert plain.endswith('install psutil on node lab2 (python -m pip install psutil)\n')
    assert with_hint_for_module("ModuleNotFoundError: No module named "
                                "'cloudpickle.cloudpickle'", '').count('install cloudpickle') == 2
    distribution = dispy.own_modules.distribution_of('_pytest')
    assert distribution == 'pytest (_pytest)'


def test_a_job_that_misses_a_module_says_where_to_install_it(tmp_path, monkeypatch):
    """The node has another directory of packages than the program."""
    packages = tmp_path / 'packages'
    (packages / 'tea_of_this_test-1.0.dist-info').mkdir(parents=True)
    (packages / 'tea_of_this_test.py').write_text('')
    (packages / 'tea_of_this_test-1.0.dist-info' / 'RECORD').write_text('tea_of_this_test.py,,\n')
    with NodeProcess(tmp_path / 'node') as node:
        monkeypatch.syspath_prepend(str(packages))

        name = 'tea_of_this_test'

        def drink():
            # No statement, for which dispy would look as often as it sends this file, and believe
            # for a while what it has found
            return __import__(name).__name__
        with dispy.JobCluster(drink, nodes=[node.address]) as cluster:
            job = cluster.submit()
            with pytest.raises(ModuleNotFoundError) as caught:
                job.get(30)
            for text in (job.exception, str(caught.value)):
                assert ('install tea_of_this_test on node' in text and '-m pip install' in text
                        and 'depends' not in text), text


def test_what_to_do_about_source_fits_the_computation():
    python = sys.version_info[:3]
    assert 'into a file' in remedy_for_source({'python': python})
    assert 'into a file' not in remedy_for_source({'python': python, 'most': 0})
    for spec in ({'python': python}, {'python': python, 'most': 0}):
        assert 'Python %d.%d' % python[:2] in remedy_for_source(spec)


# -- what daemons say ------------------------------------------------------------------------------

ENDS_IN_SETUP = '''
import os
import sys
import time
import dispy

def setup():
    import time
    open(%r, 'w').close()
    time.sleep(60)

cluster = dispy.JobCluster(abs, nodes=[('127.0.0.1', %d)], setup=setup)
cluster.submit(1)
while not os.path.exists(%r):
    time.sleep(0.01)
sys.exit(5)
'''


def test_a_program_that_ends_during_setup_leaves_no_traceback(node, tmp_path):
    began = str(tmp_path / 'began')
    _, err, status = run_python('-c', ENDS_IN_SETUP % (began, node.port, began))
    assert status == 5 and 'Traceback' not in err and '1 job that has not ended' in err, err
    with dispy.JobCluster(square, nodes=[node.address]) as cluster:   # served when that is over
        assert cluster.submit(3)(30) == 9
    assert 'Traceback' not in node.log() and 'SystemExit' not in node.log(), node.log()


NORMAL = '''
import sys
import dispy
import dispy_httpd

def square(n):
    print('output')
    return n * n

port, shared = map(int, sys.argv[1:])
for kind, options in ((dispy.JobCluster, {'nodes': [('127.0.0.1', port)]}),
                      (dispy.SharedJobCluster, {'scheduler_port': shared}),
                      (dispy.JobCluster, {'nodes': 'local'})):
    with kind(square, loglevel=30, **options) as cluster:
        page = dispy_httpd.DispyHTTPServer(cluster, port=0)
        assert list(cluster.map(range(20))) == [n * n for n in range(20)]
        page.shutdown(wait=False)
    cluster = kind(square, loglevel=30, **options)
    assert cluster.submit(2)() == 4
    cluster.close()
with dispy.DispyExecutor(nodes=[('127.0.0.1', port)]) as executor:
    assert executor.submit(pow, 2, 3).result() == 8
last = dispy.JobCluster(square, nodes=[('127.0.0.1', port)])   # closed by the end of the program
assert last.submit(3)() == 9
'''


def test_a_normal_run_says_nothing_at_warning(tmp_path):
    with NodeProcess(tmp_path / 'shared') as shared, NodeProcess(tmp_path / 'node') as node, \
            SchedulerProcess(tmp_path / 'scheduler', '-n',
                             '127.0.0.1:%d' % shared.port) as scheduler:
        out, err, status = run_python('-c', NORMAL, node.port, scheduler.port)
        assert status == 0 and not re.sub('dispy monitor: http.*\n', '', err), err
        out, err, status = run_python('-m', 'dispy', '--list-nodes', '-n',
                                      '127.0.0.1:%d' % node.port)
        assert (status, err) == (0, ''), err
        out, err, status = run_python('-m', 'dispy', '-n', '127.0.0.1:%d' % node.port, '-a', 'x',
                                      '/bin/echo')
        assert (out, err, status) == ('x\n', '', 0)
    for daemon in (shared, node, scheduler):
        said = [line
                for line in daemon.log().splitlines() if re.search('WARNING|ERROR|Traceback', line)]
        # Who tests as root is told that jobs then run as root.
        assert not [line for line in said if 'jobs run as root' not in line], daemon.log()


class Opened:
    """An argument whose opening leaves a directory."""

    def __init__(self, directory):
        self.directory = directory

    def __reduce__(self):
        return tempfile.mkdtemp, ('', 'opened', self.directory)


def waits_for(path, argument):
    import os
    import time
    while not os.path.exists(path):
        time.sleep(0.01)


def test_arguments_that_run_code_are_opened_by_the_job_alone(tmp_path):
    opened, go = tmp_path / 'opened', tmp_path / 'go'
    opened.mkdir()
    with dispy.JobCluster(waits_for, nodes='local') as cluster:
        job = cluster.submit(str(go), Opened(str(opened)))
        with pytest.raises(TimeoutError, match='job 1 has not ended'):
            job.get(0.05)
        go.write_text('')
        assert job.get(30) is None
    assert len(os.listdir(str(opened))) == 1
