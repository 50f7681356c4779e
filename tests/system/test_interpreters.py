"""Jobs on another Python of a node (`dispynode --python`): two virtual environments, which have
different versions of a package that the node's own Python does not have."""

import json
import os
import subprocess
import sys

import pytest

import dispy
from dispy import NoNodes
from nodes import NodeProcess, SchedulerProcess, script_of
from scenes import set_up_weather, weather_here, weather_of_setup

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='it is for POSIX')


def environment(path, version):
    """The Python of a virtual environment that has a package with this version."""
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(path)], check=True)
    python = path / 'bin' / 'python'
    code = 'import sysconfig; print(sysconfig.get_path("purelib"))'
    place = subprocess.run([str(python), '-c', code],
                           check=True, stdout=subprocess.PIPE,
                           universal_newlines=True).stdout.strip()
    with open(os.path.join(place, 'weather.py'), 'w') as file:
        file.write('version = %r\n' % version)
    return str(python)


@pytest.fixture(scope='module')
def node(tmp_path_factory):
    root = tmp_path_factory.mktemp('pythons')
    old = environment(root / 'old', '1.0')
    new = environment(root / 'new', '2.0')
    with NodeProcess(root / 'node', '--python', 'old=' + old, '--python', 'new=' + new) as process:
        yield process


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_each_computation_runs_on_the_python_that_it_names(node, tmp_path, method):
    own = '%d.%d' % sys.version_info[:2]
    for name, version in (('old', '1.0'), ('new', '2.0')):
        with dispy.JobCluster(weather_here, nodes=[node.address], python=name,
                              start_method=method) as cluster:
            found = cluster.submit().get(60)
            assert found[0] == version and os.path.basename(found[1]) == name
            assert found[2] == sys.version_info[:2]
        with dispy.JobCluster(weather_of_setup, nodes=[node.address], python=name,
                              setup=set_up_weather, start_method=method) as cluster:
            assert cluster.submit().get(60) == version
    with dispy.JobCluster(weather_here, nodes=[node.address], python=own,
                          start_method=method) as cluster:   # the node's own is the first
        with pytest.raises(ImportError, match='weather'):
            cluster.submit().get(60)


def test_a_program_and_an_executor_run_there_and_a_scheduler_finds_it(node, tmp_path):
    script = tmp_path / 'tell.py'
    script.write_text('import sys, weather; print(weather.version, sys.argv[1])')
    with SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:%d' % node.port) as scheduler:
        with dispy.SharedJobCluster(weather_here, scheduler_port=scheduler.port,
                                    python='new') as cluster:
            assert cluster.submit().get(60)[0] == '2.0'
        with dispy.SharedJobCluster(weather_here, scheduler_port=scheduler.port,
                                    python='lab') as cluster:
            with pytest.raises(NoNodes, match=r'no Python lab \(python=\); it has .*old \(3'):
                cluster.wait_nodes(1, timeout=10)
    with dispy.DispyExecutor(nodes=[node.address], python='old') as executor:
        assert executor.submit(weather_here).result(60)[0] == '1.0'


@pytest.mark.parametrize('kind', ['embedded', 'real'])
def test_a_node_without_it_says_what_it_has(node, kind):
    nodes = 'local' if kind == 'embedded' else [node.address]
    with dispy.JobCluster(weather_here, nodes=nodes, python='lab') as cluster:
        with pytest.raises(NoNodes, match=r'it has no Python lab \(python=\); it has %d\.%d\.'
                           % sys.version_info[:2]):
            cluster.wait_nodes(1, timeout=5)
    with pytest.raises(ValueError, match='neither a name'):
        dispy.JobCluster(weather_here, nodes='local', python='3.12 or so')
    with pytest.raises(TypeError, match='python='):
        dispy.JobCluster(weather_here, nodes='local', python=3.12)


@pytest.mark.parametrize('words, told', [
    (['lab'], 'it must be NAME=PATH'), (['lab=/nowhere/python'], 'it cannot be started'),
    (['lab=/bin/true'], 'it is not a Python'),
    (['a=%s' % sys.executable, 'a=%s' % sys.executable], 'twice')])
def test_a_wrong_interpreter_is_told_at_the_start(words, told):
    options = [option for word in words for option in ('--python', word)]
    done = subprocess.run([sys.executable, script_of('dispynode', None), *options],
                          stderr=subprocess.PIPE, universal_newlines=True, timeout=60)
    *_, line = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith('dispynode: --python') and told in line


def test_interpreters_stand_in_configuration_files(tmp_path):
    saved = tmp_path / 'saved.json'
    subprocess.run([sys.executable, script_of('dispynode', None), '--python', 'lab=/bin/python',
                    '--save-config', str(saved)], check=True, timeout=60)
    assert json.loads(saved.read_text())['python'] == ['lab=/bin/python']
