"""The README's table of features: every line of code in it is one that works, and nothing is missing. Public docstrings."""

import ast
import inspect
import os
import re
import shlex

import pytest

import dispy
import dispy_httpd
from conftest import ROOT

with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as _file:
    README = _file.read()
ROWS = re.findall(r'^\| (.+) \| `([^`]+)` \| (.*?) ?\|$', README.partition('## Every feature')[2].partition('\n## ')[0], re.M)
LINES = [line for _, line, _ in ROWS]
KNOWN = {'dispy': dispy, 'dispy_httpd': dispy_httpd, 'cluster': dispy.JobCluster, 'job': dispy.DispyJob, 'executor': dispy.DispyExecutor}
RETURNS = {dispy.JobCluster.status: dispy.ClusterStatus}
IN_JOBS = {'dispy_provisional_result': ['value'], 'dispy_send_file': ['path'], 'dispy_node_name': None, 'dispy_node_ip_addr': None,
           'dispy_job_path': None}   # name -> parameters of a function
OF_SUBMIT = {*dispy._OPTIONS, 'dispy_job_depends', 'dispy_retry_on', 'dispy_retry_delay'}


def parse(line):
    return ast.parse(line + ' pass' if line.endswith(':') else line)


def meaning(node):
    """What an expression of the table is in dispy; None if it has nothing to do with it. Raises if there is no such thing."""
    if isinstance(node, ast.Name):
        assert node.id in IN_JOBS or node.id in KNOWN or not node.id.startswith('dispy_'), 'jobs know no ' + node.id
        return KNOWN.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = meaning(node.value)
        return None if owner is None else getattr(owner, node.attr)
    if isinstance(node, ast.Call):
        return RETURNS.get(meaning(node.func))
    return None


def check_call(call):
    """That the arguments fit the signature, and that there is every dispy_ keyword."""
    function = meaning(call.func)
    names = [keyword.arg for keyword in call.keywords]
    if isinstance(call.func, ast.Name) and call.func.id in IN_JOBS:
        assert len(call.args) == len(IN_JOBS[call.func.id]) and not names
    elif function is not None:
        function = function.__call__ if function is dispy.DispyJob else function
        bound = [] if inspect.isclass(function) or inspect.getmodule(function) is dispy and '.' not in function.__qualname__ else [None]
        found = inspect.signature(function).bind(*bound, *call.args, **dict.fromkeys(names))
        assert {name for name in found.arguments.get('kwargs', {}) if name.startswith('dispy_')} <= OF_SUBMIT
        if function is dispy.DispyExecutor:
            assert set(names) <= set(inspect.signature(dispy.JobCluster).parameters)


@pytest.mark.parametrize('line', [line for line in LINES if not line.startswith('python ')])
def test_a_line_of_the_table(line):
    for node in ast.walk(parse(line)):
        if isinstance(node, ast.Call):
            check_call(node)
        elif isinstance(node, (ast.Attribute, ast.Name)):
            meaning(node)


def test_the_lines_for_the_shell():
    lines = [shlex.split(line) for line in LINES if line.startswith('python ')]
    for words in lines:
        assert words[:3] == ['python', '-m', 'dispy']
        dispy._parser().parse_args(words[3:])
    assert lines


@pytest.mark.parametrize('line', ['dispy.JobCluster(compute, colour=1)', 'cluster.sumbit(1)', 'cluster.submit(1, dispy_colour=2)',
                                  'job.colour', 'cluster.status().colour', 'dispy_colour(1)', 'cluster.cancel()', 'dispy_send_file()'])
def test_a_line_that_does_not_work_is_found(line):
    with pytest.raises((AssertionError, AttributeError, TypeError)):
        test_a_line_of_the_table(line)


def test_nothing_is_missing():
    """Every parameter and method of a cluster, every attribute of a job, every name for jobs, every example."""
    words = set(re.findall(r'\w+', ' '.join(LINES)))
    old_names = {'callback', 'stats', 'shutdown', 'ip_addr', 'ext_ip_addr', 'ext_host', 'poll_interval', 'fault_recover',
                 'node_port', 'port', 'client_port', 'more'}
    shared = {'scheduler_host', 'scheduler_port', 'exclusive'}
    assert shared < set(inspect.signature(dispy.SharedJobCluster).parameters)
    wanted = {*inspect.signature(dispy.JobCluster).parameters, *shared, *OF_SUBMIT, *IN_JOBS,
              *(name for thing in (dispy.JobCluster, dispy.DispyJob) for name in vars(thing) if re.match('[a-z]', name)),
              'DispyExecutor', 'NodeAllocate', 'register_joblib'} - {'computation', 'finish'} - old_names
    assert wanted - words == set()
    shown = set(re.findall(r'\(examples/(\w+\.py)\)', ' '.join(example for _, _, example in ROWS)))
    assert shown == {name for name in os.listdir(os.path.join(ROOT, 'examples')) if name.endswith('.py')}


def test_names_in_jobs_are_there():
    with dispy.JobCluster(lambda names: [name in vars(__import__('builtins')) for name in names], nodes='local') as cluster:
        assert all(cluster.submit(list(IN_JOBS))(30))


# -- docstrings ---------------------------------------------------------------------------------------------------------

def test_every_public_name_says_what_it_is():
    things = [getattr(dispy, name) for name in dispy.__all__ if name != 'logger']
    things += [thing for owner in things if inspect.isclass(owner) for name, thing in vars(owner).items()
               if inspect.isfunction(thing) and not name.startswith('_')]
    assert [thing.__qualname__ for thing in things if not thing.__doc__] == []


@pytest.mark.parametrize('thing', [dispy.JobCluster, dispy.NodeAllocate])   # SharedJobCluster's are those and a few
def test_every_parameter_is_explained(thing):
    assert set(inspect.signature(thing).parameters) <= set(re.findall(r'\w+', thing.__doc__))


def test_every_keyword_of_submit_is_explained():
    assert OF_SUBMIT <= set(re.findall(r'\w+', dispy.JobCluster.submit.__doc__))


def test_every_test_that_is_named_is_there():
    """The table of faults: `file::test`, in tests/ or tests/faults/."""
    with open(os.path.join(ROOT, 'README.md')) as file:
        named = re.findall(r'`(test_\w+\.py)::(test_\w+)`', file.read())
    assert len(named) > 50
    for name, test in named:
        paths = [os.path.join(ROOT, 'tests', where, name) for where in ('', 'faults')]
        with open(next(filter(os.path.exists, paths))) as file:
            assert re.search(r'^def %s\(' % test, file.read(), re.M), (name, test)
