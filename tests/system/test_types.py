"""What type checkers know of dispy: the types in *.pyi fit the modules, and are found where these
are installed and where they were copied. typed/right.py and typed/wrong.py are checked for that."""

import ast
import collections
import inspect
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import dispy
from conftest import ROOT

TYPED = os.path.join(ROOT, 'tests', 'typed')
MODULES = ['dispy', 'dispynode', 'dispyscheduler', 'dispy_httpd']
OF_SUBMIT = {*dispy._OPTIONS, 'dispy_job_depends', 'dispy_retry_on', 'dispy_retry_delay',
             'dispy_resources'}


def run(*command, cwd, **environment):
    """A program that ends by itself: what it printed, and its exit status."""
    environment = dict(os.environ, **environment)
    done = subprocess.run([str(part) for part in command], cwd=str(cwd), env=environment,
                          universal_newlines=True, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return done.stdout, done.stderr, done.returncode


# -- the types against the modules -----------------------------------------------------------------

def stubtest(directory):
    """What mypy.stubtest says of the modules in a directory: its lines, and whether all is well."""
    pytest.importorskip('mypy.version', '1.18', reason='mypy is not installed, or too old for this')
    out, err, status = run(
        sys.executable, '-m', 'mypy.stubtest', '--concise', '--ignore-disjoint-bases',
        '--allowlist', os.path.join(ROOT, 'tests', 'stubtest.txt'), *MODULES,
        cwd=directory, PYTHONPATH=str(directory), MYPYPATH=str(directory))
    assert not err, err
    return out.splitlines(), status == 0


@pytest.mark.long
def test_types_fit_the_modules():
    said, is_well = stubtest(ROOT)
    assert is_well, '\n'.join(said)


DRIFTS = [   # (file, text in it, what stands there instead, what is said of it)
    ('dispy.py', 'cancel_all(self)', 'cancel_all(self, force=False)', 'JobCluster.cancel_all'),
    ('dispy.py', 'def cancel_waiting(', 'def cancel_some(', 'JobCluster.cancel_some'),
    ('dispy.py', 'forward_logs: bool = False,', 'forward: bool = False,', 'JobCluster.__init__'),
    ('dispy.py', "'SecretError', 'logger'", "'SecretError', 'logger', 'Journal'", 'dispy.Journal'),
    ('dispy.pyi', 'loglevel: int | str = 20', 'loglevel: int | str = 30', 'JobCluster.__init__'),
    ('dispy_httpd.py', 'def del_cluster(', 'def remove_cluster(', 'DispyHTTPServer.del_cluster'),
    ('dispyscheduler.py', 'def main(argv', 'def main(words', 'dispyscheduler.main'),
]


@pytest.mark.long
def test_a_difference_is_found(tmp_path):
    texts = {}
    for name in MODULES:
        for ending in ('.py', '.pyi'):
            with open(os.path.join(ROOT, name + ending), encoding='utf-8') as file:
                texts[name + ending] = file.read()
    for name, there, instead, _ in DRIFTS:
        assert there in texts[name]
        texts[name] = texts[name].replace(there, instead)
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding='utf-8')
    said, is_well = stubtest(tmp_path)
    assert not is_well
    assert [what for *_, what in DRIFTS if not any(what in line for line in said)] == []


def classes_in(path):
    """Name -> class, of a file."""
    with open(path, encoding='utf-8') as file:
        tree = ast.parse(file.read())
    return {each.name: each for each in tree.body if isinstance(each, ast.ClassDef)}


def own_attributes(cls):
    """Public names that the methods of a class assign to, and those of its properties."""
    found = set()
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) \
                and getattr(node.value, 'id', '') == 'self' and not node.attr.startswith('_'):
            found.add(node.attr)
    return found


def declared(cls):
    """Names in the body of a class of a .pyi."""
    return {getattr(node, 'name', None) or getattr(getattr(node, 'target', None), 'id', '')
            for node in cls.body}


def of_the_package(module):
    """What jobs have for the schedule and for other parts, and not for users."""
    return own_attributes(module['ScheduledJob']) | declared(module['ProgramJob'])


@pytest.mark.parametrize('name', ['dispy', 'dispy_httpd'])
def test_attributes_of_instances(name):
    """stubtest sees what classes have, and not what their constructors set."""
    module, types = (classes_in(os.path.join(ROOT, name + ending)) for ending in ('.py', '.pyi'))
    public = [each for each in module if each in types]
    internal = of_the_package(module) if name == 'dispy' else set()
    assert len(public) >= {'dispy': 15, 'dispy_httpd': 1}[name]
    assert {each: own_attributes(module[each]) - declared(types[each]) - internal
            for each in public} == dict.fromkeys(public, set())


def test_keywords_that_are_handed_on():
    """Parameters that the modules take as **options or **kwargs."""
    types = classes_in(os.path.join(ROOT, 'dispy.pyi'))
    named = {name: parameter.kind for name, parameter in
             inspect.signature(dispy.JobCluster).parameters.items()}
    by_name = {name for name, kind in named.items() if kind is inspect.Parameter.KEYWORD_ONLY}
    of_clusters = declared(types['_ClusterOptions'])
    assert of_clusters == by_name - {'callback'}
    assert of_clusters | declared(types['_ExecutorOptions']) == \
        set(named) - {'computation', 'nodes', 'job_status', 'callback', 'more'}
    forms = collections.defaultdict(set)
    for each in types['JobCluster'].body:
        if getattr(each, 'name', '').startswith('submit'):
            forms[each.name].update(arg.arg for arg in each.args.kwonlyargs)
    assert forms == dict.fromkeys(
        ('submit', 'submit_job_id', 'submit_node', 'submit_job_id_node'), OF_SUBMIT)


# -- programs --------------------------------------------------------------------------------------

def copied(directory):
    """The modules and their types beside the programs. Returns the Python of the checkers."""
    for name in MODULES:
        for ending in ('.py', '.pyi'):
            shutil.copy(os.path.join(ROOT, name + ending), str(directory))
    return sys.executable


def installed(directory):
    """What a wheel would have, in an environment of its own. Returns its Python."""
    pytest.importorskip('setuptools', reason='setuptools is not installed')
    environment = directory / 'venv'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(environment)], check=True,
                   timeout=60)
    python = environment / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
    where, _, _ = run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))',
                      cwd=directory)
    source = directory / 'source'   # setuptools may write files beside setup.py
    source.mkdir()
    copied(source)
    for name in ('setup.py', 'setup.cfg', 'README.md', 'LICENSE'):
        shutil.copy(os.path.join(ROOT, name), str(source))
    out, err, status = run(sys.executable, 'setup.py', '-q', 'build_py', '--build-lib',
                           where.strip(), cwd=source)
    assert status == 0, out + err
    return str(python)


def mypy(python, directory):
    """What it finds in the programs: (file, line, text)."""
    pytest.importorskip('mypy', reason='mypy is not installed')
    out, err, status = run(
        sys.executable, '-m', 'mypy', '--strict', '--no-error-summary',
        '--python-executable', python, '--config-file', os.devnull, '--cache-dir', os.devnull,
        'right.py', 'wrong.py',
        cwd=directory, PYTHONPATH='', MYPYPATH='')
    assert status in (0, 1), out + err
    found = re.findall(r'^(.*?):(\d+): error: (.*)$', out, re.M)
    return [(name, int(line), text) for name, line, text in found]


def pyright(python, directory):
    """As `mypy`."""
    pytest.importorskip('pyright', reason='pyright is not installed')
    out, err, status = run(
        sys.executable, '-m', 'pyright', '--outputjson', '--pythonpath', python,
        'right.py', 'wrong.py', cwd=directory, PYTHONPATH='')
    if status not in (0, 1):
        pytest.skip('pyright cannot run: %s' % (err.strip() or out)[-500:])
    return [(os.path.basename(each['file']), each['range']['start']['line'] + 1, each['message'])
            for each in json.loads(out)['generalDiagnostics'] if each['severity'] == 'error']


@pytest.mark.long
@pytest.mark.parametrize('check', [mypy, pyright])
@pytest.mark.parametrize('prepare', [copied, installed])
def test_programs(tmp_path, prepare, check):
    python = prepare(tmp_path)
    program = tmp_path / 'program' if prepare is installed else tmp_path
    program.mkdir(exist_ok=True)
    for name in ('right.py', 'wrong.py'):
        shutil.copy(os.path.join(TYPED, name), str(program))
    with open(os.path.join(TYPED, 'wrong.py')) as file:
        wrong = {number for number, line in enumerate(file, 1) if line.endswith('# wrong\n')}
    found = check(python, program)
    assert [each for each in found if each[0] != 'wrong.py'] == []
    lines = {line for _, line, _ in found}
    assert lines == wrong, [each for each in found if each[1] not in wrong]


def test_the_right_program_runs(tmp_path):
    """What type checkers were told is so."""
    out, err, status = run(sys.executable, os.path.join(TYPED, 'right.py'), cwd=tmp_path)
    assert out.endswith('right %s\n' % dispy.__version__) and status == 0, out + err
