"""Resources on every kind of cluster: jobs see the devices that are theirs, nodes show what they
offer, and what nobody has is
told. The devices are pretended; the last test uses a real one where there is one."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request

import pytest

import dispy
import dispy_httpd
import dispynode
from conftest import eventually
from nodes import NodeProcess, SchedulerProcess, script_of
from scenes import Gate, hold

OFFER = ('--resource', 'gpu=2', '--resource', 'licence=1')


def device(path=None, name=None):
    """The devices that a job sees, and its process; it waits for the gate at this path."""
    import os
    if path is not None:
        hold(path, name)
    return os.environ.get('CUDA_VISIBLE_DEVICES'), os.getpid()


def at_import():
    """What a module would have seen that was loaded by setup or at the import of the
    computation."""
    import os
    global seen
    seen = os.environ.get('CUDA_VISIBLE_DEVICES')


def seen_at_import():
    return seen  # noqa: F821


@contextlib.contextmanager
def embedded(tmp_path, monkeypatch):
    monkeypatch.setenv('DISPY_RESOURCES', 'gpu=2 licence=1')
    yield lambda computation, **options: dispy.JobCluster(computation, nodes='local', **options)


@contextlib.contextmanager
def real(tmp_path, monkeypatch):
    with NodeProcess(tmp_path / 'node', *OFFER, cpus=3) as node:
        yield lambda computation, **options: dispy.JobCluster(
            computation, nodes=[node.address], **options)


@contextlib.contextmanager
def shared(tmp_path, monkeypatch):
    with NodeProcess(tmp_path / 'node', *OFFER, cpus=3) as node, \
            SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:%d' % node.port) as scheduler:
        yield lambda computation, **options: dispy.SharedJobCluster(
            computation, scheduler_port=scheduler.port, **options)


@pytest.mark.parametrize('kind', [embedded, real, shared])
def test_jobs_have_the_devices_that_they_ask_for(kind, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr(dispy, 'available_cpus', lambda: 3)
    gate = Gate(tmp_path / 'gate')
    with kind(tmp_path, monkeypatch) as make, make(device, depends=[hold],
                                                   resources={'gpu': 1}) as cluster:
        jobs = [cluster.submit(gate.path, number) for number in range(1, 4)]
        eventually(lambda: len(gate.started()) == 2, what='two jobs with a device')
        assert cluster.submit(dispy_resources={}).get(30)[0] is None  # a third CPU is free
        assert len(gate.started()) == 2
        node, = cluster.status().nodes
        assert node.resources == {
            'gpu': 2,
            'licence': 1
        } and node.resources_used == {
            'gpu': 2,
            'licence': 0
        }
        assert 'gpu 2 of 2' in repr(node)
        wide = cluster.submit(dispy_resources={'gpu': 2})
        with caplog.at_level('WARNING', 'dispy'):
            more = [cluster.submit(dispy_resources={'gpu': 3}) for _ in range(3)]
            eventually(lambda: 'it needs 3 gpu (dispy_resources), and no node has more than 2' in
                       caplog.text,
                       what='a warning')
        gate.open()
        found = [job.get(30) for job in jobs]
        assert sorted(devices for devices, _ in found[:2]) == ['0', '1'] and found[2] in found[:2]
        assert wide.get(30)[0] == '0,1'
        assert cluster.submit(dispy_resources={'licence': 1}).get(30)[0] is None
        assert [job.status for job in more] == [dispy.DispyJob.Created] * 3
        for job in more:
            cluster.cancel(job)
        with pytest.raises(ValueError, match='gpu=-1'):
            cluster.submit(dispy_resources={'gpu': -1})
        cluster.wait()
        eventually(lambda: cluster.status().nodes[0].resources_used == {
            'gpu': 0,
            'licence': 0
        },
                   what='the end of the last')
    assert caplog.text.count('it needs 3 gpu') == 1


def rows_of_page(cluster):
    """What the web page is told of nodes."""
    with dispy_httpd.DispyHTTPServer(cluster, port=0) as server:
        address, _, token = server.url.partition('/#token=')
        request = urllib.request.Request(address + '/api/nodes',
                                         headers={'Authorization': 'Bearer ' + token})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)['rows']


def test_memory_is_kept_for_jobs_and_the_page_shows_what_they_have(tmp_path):
    gate = Gate(tmp_path / 'gate')
    whole = dispynode.whole_memory()
    with NodeProcess(tmp_path / 'node', *OFFER, cpus=3) as node, \
            dispy.JobCluster(device, nodes=[node.address], depends=[hold]) as cluster:
        jobs = [cluster.submit(gate.path, number, dispy_memory=int(0.6 * whole),
                               dispy_resources={'gpu': 1}) for number in (1, 2)]
        small = cluster.submit(gate.path, 3, dispy_memory=int(0.2 * whole))
        eventually(lambda: len(gate.started()) == 2, what='the jobs for which there is memory')
        assert sorted(gate.started()) == ['1', '3']
        assert [row['resources'] for row in rows_of_page(cluster)] == ['gpu 1 of 2, licence 0 of 1']
        gate.open()
        cluster.gather([*jobs, small])


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_a_device_is_chosen_before_the_computation_is_loaded_in_its_worker(
        method, tmp_path, monkeypatch):
    """With fork before its first job; setup has run before, for all workers."""
    monkeypatch.setenv('DISPY_RESOURCES', 'gpu=1')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '7')
    with dispy.JobCluster(seen_at_import,
                          nodes='local',
                          setup=at_import,
                          start_method=method,
                          resources={'gpu': 1}) as cluster:
        assert cluster.submit().get(60) == '7'
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', 'A,B')
    monkeypatch.setenv('DISPY_RESOURCES', 'gpu=2')
    with dispy.JobCluster(seen_at_import,
                          nodes='local',
                          setup=at_import,
                          start_method=method,
                          resources={'gpu': 1}) as cluster:
        assert cluster.submit().get(60) == ('A' if method == 'spawn' else 'A,B')


def test_an_executor_and_programs_ask_for_devices_and_both_commands_name_them(
        tmp_path, monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    with NodeProcess(tmp_path / 'node', '--resource', 'gpu=1') as node:
        with dispy.DispyExecutor(nodes=[node.address], resources={'gpu': 1}) as executor:
            assert executor.submit(os.getenv, 'CUDA_VISIBLE_DEVICES').result(30) == '0'
            plain = executor.with_options(resources={})
            assert plain.submit(os.getenv, 'CUDA_VISIBLE_DEVICES').result(30) is None
        command = [sys.executable, script_of('dispy', None), '-n', '127.0.0.1:%d' % node.port]
        shown = subprocess.run([*command, '--list-nodes'],
                               stdout=subprocess.PIPE,
                               universal_newlines=True,
                               timeout=60).stdout
        assert 'RESOURCES' in shown and 'gpu=1' in shown
        ran = subprocess.run(
            [*command, '--resource', 'gpu=1', 'echo device $CUDA_VISIBLE_DEVICES {}', ':::', 'x'],
            stdout=subprocess.PIPE,
            universal_newlines=True,
            timeout=60)
        assert ran.stdout == 'device 0 x\n'
    wrong = subprocess.run(
        [sys.executable, script_of('dispynode', None), '--resource', 'gpu=many'],
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=60)
    assert wrong.returncode == 1 and 'it must be NAME=N' in wrong.stderr
    saved = tmp_path / 'saved.json'
    subprocess.run(
        [sys.executable,
         script_of('dispynode', None), *OFFER, '--save-config',
         str(saved)],
        check=True,
        timeout=60)
    assert json.loads(saved.read_text())['resource'] == ['gpu=2', 'licence=1']


@pytest.mark.skipif(not shutil.which('nvidia-smi'), reason='there is no device here')
def test_a_real_device_is_found_and_used():

    def name_of_device():
        import subprocess
        return subprocess.run(['nvidia-smi', '-L'], stdout=subprocess.PIPE, check=True).stdout

    with dispy.JobCluster(name_of_device, nodes='local', resources={'gpu': 1}) as cluster:
        assert cluster.submit().get(60).startswith(b'GPU')
