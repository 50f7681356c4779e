"""DispyExecutor under the tests of others: those of CPython 3.13 for process pools, and those of
loky. They take minutes (--long), and run where that Python or loky's source distribution is
(DISPY_LOKY: its directory)."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT
from programs import other_pythons

# What differs, and why.
OF_CPYTHON = {
    'ExecutorTest.test_killed_child': 'a pool goes on when a worker was killed: `submit` works',
    'ExecutorTest.test_max_tasks_per_child_defaults_to_spawn_context': 'looks at _mp_context',
    'ExecutorTest.test_python_finalization_error':
    'counts the threads that the pool of the library starts',
    'FailingInitializerResourcesTest.test_spawn':
    'looks at _resource_tracker of multiprocessing, which is not used',
    'FailingInitializerResourcesTest.test_forkserver': 'the same',
}
OF_LOKY = {
    'TestsProcessPoolLokyShutdown::test_shutdown_and_kill_workers':
    'kill_workers= is its own; ours cancels',
    'TestsProcessPoolLokyExecutor::test_killed_child':
    'a pool goes on when a worker was killed: `submit` works',
    'TestsProcessPoolLokyExecutor::test_exited_child':
    'the same, and the text says "exit code 42" instead of EXIT(42)',
    'TestsProcessPoolLokyExecutor::test_max_depth[True]':
    'loky bounds how deep executors nest; 11 deep work here',
    'TestsProcessPoolLokyExecutor::test_max_depth[False]': 'the same',
    'TestsProcessPoolLokyExecutor::test_memory_leak_protection':
    'loky replaces workers that grow: see dispy_memory',
    'TestsProcessPoolLokyExecutor::test_reference_cycle_collection':
    'loky collects garbage in its workers each second',
    'TestsProcessPoolLokyExecutor::test_manager_thread_crash_breaks_executor':
    'replaces a method of _executor_manager_thread',
    'TestsProcessPoolLokyExecutor::test_feeder_error_hook_crash_breaks_executor':
    'sets an attribute of _call_queue',
}


def outcomes_of(python, *words, path=()):
    process = subprocess.run([python, os.path.join(ROOT, 'tests', 'suites.py'), *words],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             timeout=1500, env=dict(os.environ, PYTHONPATH=os.pathsep.join(path)))
    last = process.stdout.decode().splitlines()[-1]
    assert last.startswith('{'), (last, process.stderr[-5000:].decode())
    return json.loads(last)


def check(outcomes, known):
    failed = {name: text for name, (outcome, text) in outcomes.items() if outcome == 'failed'}
    others = {name: text
              for name, text in failed.items() if not any(word in name for word in known)}
    assert not others, '\n'.join('%s: %s' % pair for pair in others.items())


@pytest.fixture(autouse=True)
def only_if_long(request):
    if not request.config.getoption('--long'):
        pytest.skip('takes minutes: --long')


def test_process_pools_of_cpython(tmp_path):
    python = sys.executable if sys.version_info[:2] == (3, 13) else other_pythons().get('3.13')
    if python is None or subprocess.run([python, '-c', 'import test.test_concurrent_futures.util'],
                                        stderr=subprocess.DEVNULL).returncode:
        pytest.skip('no Python 3.13 with its `test` package was found')
    for name in ('cloudpickle', 'psutil'):
        shutil.copytree(os.path.dirname(__import__(name).__file__), str(tmp_path / name))
    if subprocess.run([python, '-c', 'import cloudpickle, psutil'],
                      env=dict(os.environ, PYTHONPATH=str(tmp_path))).returncode:
        pytest.skip('cloudpickle and psutil of this Python do not fit Python 3.13')
    outcomes = outcomes_of(python, 'cpython', path=[str(tmp_path)])
    assert len(outcomes) >= 60
    check(outcomes, OF_CPYTHON)


def test_executor_of_loky():
    directory = os.environ.get('DISPY_LOKY', '')
    if not os.path.exists(os.path.join(directory, 'tests', 'test_process_executor_loky.py')):
        pytest.skip('DISPY_LOKY names no source distribution of loky')
    pytest.importorskip('loky')
    outcomes = outcomes_of(sys.executable, 'loky', directory)
    assert len(outcomes) >= 50
    check(outcomes, OF_LOKY)
