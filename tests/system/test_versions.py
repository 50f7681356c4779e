"""Functions on nodes with another minor version of Python: as source, or refused with what stands
in the way."""

import dataclasses
import functools
import importlib
import logging
import math as mathematics
import os
import pickle
import subprocess
import sys
import textwrap
import time
import types
import typing
from collections import OrderedDict

import cloudpickle
import pytest

import dispy
from conftest import eventually
from dispy import DispyJob, SourcePicker, pack_source
from dispynode import (
    ForeignCode, ModuleState, StateRow, Versions, build_tag, load_source, loads, make_code,
    value_pickler)
from nodes import NodeProcess
from programs import HERE, other_pythons

try:
    import no_such_module as absent
except ImportError:
    absent = None

FACTOR, TABLE = 3, {'a': [1, 2], 'b': (None, b'x')}
nameless = lambda n: n   # noqa: E731
loaded = None


class Base:
    """A base class of this file."""

    def shown(self):
        return '%s(%s)' % (type(self).__name__, self.value)


class Point(Base):
    """An argument and a result."""

    def __init__(self, value):
        self.value = value


ORIGIN = Point(0)


@dataclasses.dataclass
class Sized:
    """Its Python makes methods and private objects for it, which differ from version to version."""
    size: int
    parts: list = dataclasses.field(default_factory=list)
    kept: typing.ClassVar[dict] = {}


class Unused(Base):
    """No computation here uses it."""
    value = FACTOR


class Failure(Exception):
    """What a job raises."""


def version_of(function):
    """A decorator: the result with the version that computed it."""
    @functools.wraps(function)
    def wrapper(*args):
        return '%d.%d' % sys.version_info[:2], function(*args)
    return wrapper


def helper(n):
    return n * FACTOR + recursive(0)


def recursive(n):
    return n if n == 0 else helper(n - 1)


@version_of
def compute(n):
    """Imports, constants, helpers."""
    assert absent is None
    return helper(n) + mathematics.floor(2.5), TABLE['a'], list(OrderedDict(a=1))


def where(seconds=0):
    time.sleep(seconds)
    return '%d.%d' % sys.version_info[:2]


def fail(n):
    raise Failure('it was %d' % n)


def make_point(point):
    return Point(point.value + 1), point.shown()


def grow(sized, more=None):
    assert type(sized) is Sized and sized == Sized(sized.size, sized.parts)
    return dataclasses.replace(sized, size=sized.size + 1, parts=[sized]), more


def show(thing):
    return thing.shown()


def give_code():
    return lambda: 1


def uses_object():
    return ORIGIN.value


def uses_nameless(n):
    return nameless(n)


def load(*args):
    """setup"""
    global loaded
    loaded = [FACTOR, *args]


def unload(*args):
    """cleanup"""
    directory = dispy_job_path   # noqa: F821
    with open(os.path.join(os.path.dirname(directory), 'unloaded'), 'w') as file:
        print(loaded, args, file=file)


def get_loaded():
    return loaded


def needs_depends(n):
    import own_module
    with open('data.txt') as file:
        return own_module.double(n), independent(n), file.read()   # noqa: F821


def independent(n):
    return -n


@pytest.fixture(params=['oldest', 'newest'])
def other(request, tmp_path):
    """A node with another version of Python, without any package: (node, its version)."""
    versions = sorted(other_pythons(), key=lambda version: int(version.split('.')[1]))
    if not versions or (request.param == 'newest' and len(versions) < 2):
        pytest.skip('no other Python from 3.8 on was found' if not versions
                    else 'one other Python only')
    version = versions[0 if request.param == 'oldest' else -1]
    with NodeProcess(tmp_path / 'other', python=other_pythons()[version],
                     env={'PYTHONNOUSERSITE': '1'}) as node:
        yield node, version


def run(node, computation, *args, **options):
    """One job on a node; the job, ended."""
    with dispy.JobCluster(computation, nodes=[node.address], **options) as cluster:
        cluster.wait_nodes(1, 30)
        job = cluster.submit(*args)
        job(30)
    return job


def refusal(node, computation, **options):
    """Why a node does not take a computation: the same in `status` and in NoNodes."""
    with dispy.JobCluster(computation, nodes=[node.address], loglevel=logging.CRITICAL,
                          **options) as cluster:
        text = eventually(lambda: [n.reason
                                   for n in cluster.status().all_nodes if n.state == 'refused'])[0]
        with pytest.raises(dispy.NoNodes) as caught:
            cluster.wait_nodes(1, 0.1)
        assert text.strip().splitlines()[-1] in str(caught.value)
    return text


# -- on a node -------------------------------------------------------------------------------------

def test_imports_constants_and_helpers_come_along(other):
    node, version = other
    job = run(node, compute, 5)
    assert (job.status, job.result) == (DispyJob.Finished,
                                        (version, (17, [1, 2], ['a']))), job.exception


def test_an_exception_comes_back_with_lines_of_the_file(other):
    job = run(other[0], fail, 5)
    assert (job.status == DispyJob.Terminated and type(job.error) is Failure
            and job.error.args == ('it was 5',))
    line = fail.__code__.co_firstlineno + 1
    assert 'line %d, in fail\n    raise Failure(' % line in job.exception


def test_a_class_of_the_file_as_argument_and_as_result(other):
    job = run(other[0], make_point, Point(4))
    assert job.status == DispyJob.Finished, job.exception
    point, text = job.result
    assert type(point) is Point and point.value == 5 and text == 'Point(4)'


def test_a_dataclass_as_argument_and_as_result(other):
    sized = Sized(4, ['part'])
    job = run(other[0], grow, sized, [sized])
    assert job.status == DispyJob.Finished, job.exception
    grown, again = job.result
    assert (grown, again) == (Sized(5, [sized]), [sized]) and type(again[0]) is Sized


def test_what_only_a_class_refers_to_is_needed_where_it_is_used(other):
    """What stands in a class and cannot be opened there is no obstacle, unless it is an argument
    itself."""
    job = run(other[0], grow, Sized(4), Sized.kept)
    assert job.status == DispyJob.Finished and job.result[1] == {}, job.exception
    Sized.kept['nameless'] = nameless
    try:
        assert run(other[0], grow, Sized(4)).status == DispyJob.Finished
        job = run(other[0], grow, Sized(4), Sized.kept)
        assert job.status == DispyJob.Terminated and 'Python ' + other[1] in job.exception
    finally:
        Sized.kept.clear()


def test_a_class_that_the_computation_does_not_name_as_argument(other):
    assert run(other[0], show, Unused()).result == 'Unused(3)'


def test_an_argument_that_cannot_be_opened_there_ends_the_job(other):
    """A function by value, and a class of another file."""
    node, version = other
    for argument, why in ((lambda: 1, 'depends'), (Elsewhere.make(), 'depends')):
        job = run(node, show, argument)
        assert job.status == DispyJob.Terminated
        assert all(part in job.exception
                   for part in ('Python ' + version, 'Python ' + HERE, why)), job.exception


class Elsewhere:
    """A class of a module that is made here."""

    @staticmethod
    def make():
        module = type(sys)('made_here')
        sys.modules['made_here'] = module
        exec('class Thing: pass', vars(module))
        return module.Thing()


def test_a_result_that_cannot_be_opened_here_ends_the_job(other):
    node, version = other
    job = run(node, give_code)
    assert job.status == DispyJob.Terminated and 'could not be opened' in job.exception
    assert 'Python ' + version in job.exception and 'Python ' + HERE in job.exception


def test_depends(other, tmp_path, monkeypatch):
    """A module, a file and a function; a computation in a module that is sent."""
    (tmp_path / 'own_module.py').write_text('def double(n):\n    return 2 * n\n')
    (tmp_path / 'data.txt').write_text('data')
    monkeypatch.syspath_prepend(str(tmp_path))
    own_module = importlib.import_module('own_module')
    try:
        job = run(other[0], needs_depends, 4,
                  depends=[own_module, independent, str(tmp_path / 'data.txt')])
        assert job.result == (8, -4, 'data'), job.exception
        assert run(other[0], own_module.double, 4, depends=[own_module]).result == 8
        assert run(other[0], own_module.double, 5).result == 10
    finally:
        del sys.modules['own_module']


def test_setup_and_cleanup_share_globals(other):
    node, _ = other
    allocate = dispy.NodeAllocate(*node.address, setup_args=(7,))
    with dispy.JobCluster(get_loaded, nodes=[allocate], setup=load, cleanup=unload) as cluster:
        assert cluster.submit()(30) == [3, 7]
    found = os.path.join(node.prefix, 'unloaded')
    eventually(lambda: os.path.exists(found) and open(found).read() == '[3, 7] (7,)\n')
    os.unlink(found)


def test_what_stands_in_the_way_is_told_with_both_versions(other):
    node, version = other
    variable = FACTOR

    def closure():
        return variable
    for computation, why in (
            (closure, 'a closure over variable variable'),
            (lambda: 1, 'the computation is a lambda'),
            (uses_object, 'global `ORIGIN` of uses_object, of type Point, is not a plain constant'),
            (uses_nameless, 'global `nameless` of uses_nameless is a lambda')):
        text = refusal(node, computation)
        assert ('Python %s' % version in text and 'program Python %s' % HERE in text
                and why + '. Put the function into a file' in text), text
    assert 'setup is a lambda. Put the function into a file' in refusal(node, get_loaded,
                                                                        setup=lambda: None)


def test_source_that_does_not_load_there_is_told_with_both_versions(other):
    node, version = other
    text = refusal(node, imports_what_is_here)
    assert ('Python %s' % version in text and 'Python %s here' % version in text
            and "No module named 'pytest'" in text)


def imports_what_is_here():
    return pytest.__version__


def test_a_program_runs_on_any_version(other, tmp_path):
    program = tmp_path / 'program.sh'
    program.write_text('#!/bin/sh\necho "$1"\n')
    job = run(other[0], str(program), 'hello')
    assert (job.result, job.stdout) == (0, b'hello\n')


def test_functions_of_an_executor_go_there_by_name_alone(other):
    """A function of a module that is there runs; one by value is refused with both versions
    named."""
    with dispy.DispyExecutor(nodes=[other[0].address], loglevel=logging.CRITICAL) as executor:
        assert executor.submit(mathematics.sqrt, 4).result(30) == 2
        with pytest.raises(Exception, match='Python ' + other[1].replace('.', r'\.')):
            executor.submit(nameless, 1).result(30)


def test_nodes_of_two_versions_share_the_jobs(other, tmp_path):
    """By pickle and by source, at once."""
    node, version = other
    with NodeProcess(tmp_path) as same, \
            dispy.JobCluster(where, nodes=[node.address, same.address]) as cluster:
        cluster.wait_nodes(2, 30)
        jobs = [cluster.submit(0.02) for _ in range(40)]
        assert {job(30) for job in jobs} == {version, HERE}


def test_a_script_in_main(other, tmp_path):
    """Classes of __main__ there and back; a class whose statement fails on the node harms no
    other."""
    node, version = other
    path = tmp_path / 'script.py'
    path.write_text(textwrap.dedent("""
        import os, sys, dispy

        class Worker:   # as the node calls one of its own
            def __init__(self, n):
                self.n = n

        class Seldom:
            home = os.environ['ONLY_HERE']

        class Child(Seldom):
            pass

        def compute(x):
            return Worker(x.n + sys.version_info[1])

        if __name__ == '__main__':
            with dispy.JobCluster(compute, nodes=[('127.0.0.1', int(sys.argv[1]))]) as cluster:
                job = cluster.submit(Worker(100))
                print(type(job()) is Worker, job.result.n)
                job = cluster.submit(Seldom())
                print(job(), job.exception.splitlines()[-1])
        """))
    out = subprocess.run([sys.executable, str(path), str(node.port)], stdout=subprocess.PIPE,
                         check=True, timeout=60,
                         env=dict(os.environ, ONLY_HERE='x')).stdout.decode()
    lines = out.splitlines()
    assert lines[0] == 'True %d' % (100 + int(version.split('.')[1]))
    assert lines[1].startswith('None TypeError: class __main__.Seldom') and 'ONLY_HERE' in lines[1]
    assert 'Python ' + version in lines[1] and 'Python ' + HERE in lines[1]


# -- picking, without a node -----------------------------------------------------------------------

def picked(computation, *shipped, objects=None):
    """(rows by module, wanted)"""
    code, obstacle = pack_source(computation, None, None, objects or {}, shipped)
    assert not obstacle
    version, rows, classes, wanted = pickle.loads(code)
    assert version == sys.version_info[:2]
    return {row[0]: row for row in rows}, wanted


def obstacle(computation, *shipped, **names):
    code, text = pack_source(computation, names.get('setup'), names.get('cleanup'),
                             names.get('objects', {}), shipped)
    assert code == b''
    return text


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes modules of a user's: module(name, text) is imported. They are registered to travel by
    value, as the functions of __main__ do; other modules travel as files, see
    test_modules_travel.py."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def make(name, text):
        path = tmp_path.joinpath(*name.split('.')).with_suffix('.py')
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        names.append(name)
        importlib.invalidate_caches()
        made = importlib.import_module(name)
        cloudpickle.register_pickle_by_value(made)
        return made
    yield make
    for name in names:
        made = sys.modules.pop(name, None)
        if made is not None:
            cloudpickle.unregister_pickle_by_value(made)


def test_only_what_is_needed_is_taken_with_its_line_numbers():
    rows, wanted = picked(compute)
    _, file, text, values, links = rows[__name__]
    assert wanted == ((__name__, 'compute'), None, None, {}) and file == __file__
    lines = text.splitlines()
    line = compute.__wrapped__.__code__.co_firstlineno
    assert lines[line - 1:line + 1] == ['@version_of', 'def compute(n):']
    assert ('class' not in text and 'def recursive' in text and 'def fail' not in text
            and 'import' not in text)
    assert values == {'FACTOR': 3, 'TABLE': TABLE, 'absent': None}
    assert sorted(links) == [('OrderedDict', 'collections', 'OrderedDict'),
                             ('functools', 'functools', ''),
                             ('mathematics', 'math', ''), ('sys', 'sys', '')]


def test_values_are_those_of_now(module):
    user = module('user_values', 'N = 1\ndef f():\n    return N\n')
    user.N = [2, {3}]
    assert picked(user.f)[0]['user_values'][3] == {'N': [2, {3}]}
    user.N = 1j
    assert obstacle(user.f) == 'global `N` of f, of type complex, is not a plain constant'


def test_imports_of_every_kind(module):
    user = module('user_imports', '''
from __future__ import annotations
import os.path, xml.dom.minidom
import xml.dom as dom
from os import path as p, sep
from math import *
if True:
    from random import choice
try:
    import json5_is_not_there as json
except ImportError:
    import json

def f(x: Undefined) -> os.PathLike:
    def inner():
        return sqrt(2), sep, choice
    return os, xml, dom, p, json, inner
''')
    _, _, text, values, links = picked(user.f)[0]['user_imports']
    assert not values and text.splitlines()[1] == 'from __future__ import annotations'
    assert (('os', 'os.path', '') in links
            and links.index(('os', 'os.path', '')) < links.index(('os', 'os', '')))
    assert {link[1:] for link in links} >= {('xml.dom.minidom', ''), ('xml', ''), ('xml.dom', ''),
                                            ('os.path', ''), ('os', 'sep'), ('math', 'sqrt'),
                                            ('random', 'choice'), ('json', '')}


def test_what_other_modules_of_the_user_define_is_taken_there(module):
    module('user_lower', 'class Base:\n    pass\ndef low():\n    return 1\n')
    user = module('user_upper', 'from user_lower import Base, low as deep\nclass Up(Base):\n'
                  '    f = deep\ndef up():\n    return Up\n')
    rows, _ = picked(user.up)
    assert list(rows) == ['user_lower', 'user_upper']   # in the order in which they run
    assert sorted(rows['user_upper'][4]) == [('Base', 'user_lower', 'Base'),
                                             ('deep', 'user_lower', 'low')]
    rows, _ = picked(user.up, 'user_lower')
    assert list(rows) == ['user_upper']
    user = module('user_whole', 'import user_lower\ndef f():\n    return user_lower.low()\n')
    assert (obstacle(user.f)
            == 'global `user_lower` of f is a module of your own: put it into depends')
    assert picked(user.f, 'user_lower')[0]['user_whole'][4] == [('user_lower', 'user_lower', '')]


def test_methods_and_builtins_by_name(module):
    user = module('user_methods', 'class C:\n    @classmethod\n    def k(cls): pass\n'
                  '    @staticmethod\n    def s(): pass\n    def m(self): pass\n')
    assert (picked(user.C.k)[1][0] == ('user_methods', 'C.k')
            and picked(user.C.s)[1][0] == ('user_methods', 'C.s'))
    assert picked(len) == ({}, (('builtins', 'len'), None, None, {}))
    assert (obstacle(user.C().m)
            == 'the computation, of type method, is not what is called C.m in module user_methods')
    assert (obstacle(functools.partial(len))
            == 'the computation is a partial, no function at the top level of a file')


def test_source_that_is_not_to_be_had_or_was_changed(module):
    space = {'__name__': 'user_gone'}
    exec('def f(): pass', space)
    sys.modules['user_gone'] = type(sys)('user_gone')
    vars(sys.modules['user_gone']).update(space)
    try:
        assert obstacle(space['f']) == 'the source of module user_gone is not available'
    finally:
        del sys.modules['user_gone']
    user = module('user_changed', 'def f():\n    return 1\nclass C:\n    def m(self): return 1\n'
                  'if 1:\n    def g(): pass\n')
    assert obstacle(user.g).startswith('the computation: no statement at the top level')
    with open(user.__file__, 'w') as file:
        file.write('def f():\n    return 2 + len(())\nclass C:\n    def m(self): return 3\n')
    assert (obstacle(user.f) == 'the computation: f in the file of module '
            'user_changed is not what runs: was the file changed?')
    assert 'is not what runs' in obstacle(user.C)
    with open(user.__file__, 'w') as file:
        file.write('def f(:\n')
    assert obstacle(user.f).startswith('the file of module user_changed was changed')


def test_classes_for_arguments_leave_out_what_cannot_be_sent(module):
    user = module('user_classes', 'import threading\nL = threading.Lock()\nN = 1\nclass A:\n'
                  '    n = N\nclass B(A):\n    lock = L\nclass C(A): pass\ndef f(): pass\n')
    picker = SourcePicker()
    picker.refer(user.f, 'it')
    classes = picker.classes()
    assert [(module, name) for module, name, _ in classes] == [('user_classes', 'A'),
                                                               ('user_classes', 'C')]
    assert classes[0][2][0][3] == {'N': 1} and classes[1][2][0][3] == {}


def test_nothing_is_read_while_all_nodes_are_of_this_version(monkeypatch):
    """Neither source nor anything that could fail a cluster."""
    monkeypatch.setattr(dispy, 'SourcePicker', None)
    with dispy.JobCluster(compute, nodes='local') as cluster:
        assert cluster.submit(1)()[0] == HERE


def test_code_of_another_version_is_not_made():
    """It would crash whoever calls it."""
    pieces = []
    value_pickler()(type('File', (), {'write': lambda self, piece: pieces.append(bytes(piece))})(),
                    5).dump(lambda: 41 + 1)
    assert loads(b''.join(pieces))() == 42
    stands_for_it = make_code((3, 7), (), '', 'f', 1)
    assert isinstance(stands_for_it, ForeignCode) and not callable(stands_for_it)


# -- what one version has and another has not ------------------------------------------------------

@pytest.fixture
def modules(monkeypatch):
    """Makes a module that is there for the test alone."""
    def make(name, **variables):
        module = types.ModuleType(name)
        vars(module).update(variables)
        monkeypatch.setitem(sys.modules, name, module)
        return module
    return make


@pytest.mark.parametrize('as_instance', [True, False])
def test_what_another_python_does_not_have_stays_as_the_module_computed_it(modules, as_instance):
    """Such as an object of argparse that holds one of a private class of argparse. All else that
    the program has set in its modules is put in place."""
    gone = type('Gone', (), {'__module__': 'a_library'})
    library = modules('a_library', Gone=gone)
    thing = gone()
    thing.value = 5
    kept = ['computed here']
    user = modules('of_the_user', kept=kept, n=0)
    kept_row = StateRow('of_the_user', '', 'kept', b'another', 0, True)
    row = StateRow('of_the_user', '', 'n', b'another', -1, False)
    contents = [[thing if as_instance else gone, 3]]
    pickled = pickle.dumps((contents, {('of_the_user', '', 'n'): 7}), 5)

    def apply(build, *rows):
        ModuleState(sys.platform, list(rows), [('builtins', 'list')], pickled, build).apply()
    apply('the build of another Python', kept_row, row)
    assert user.kept is kept and kept[1] == 3 and user.n == 7
    kept[:], user.n = ['computed here'], 0
    del library.Gone
    apply('the build of another Python', kept_row, row)
    assert user.kept == ['computed here'] and user.n == 7
    with pytest.raises(AttributeError, match='Gone'):   # the same Python should have it
        apply(build_tag(), kept_row, row)
    with pytest.raises(ImportError, match='variable kept of module of_the_user needs a_library'):
        apply('the build of another Python', kept_row._replace(computed=False), row)


def test_source_whose_annotations_were_to_be_evaluated_later(modules):
    """Since Python 3.14 they may have names that are defined later, or that only a type checker
    imports."""
    text = 'class Tree:\n    left: Tree\n\ndef grow(n: Tree) -> Never:\n    return n\n'
    rows = [('made_of_source', 'file.py', text, {}, [])]
    modules('made_of_source')
    wanted = (('made_of_source', 'grow'), None, None, {})
    grow, *_ = load_source((3, 14), rows, [], wanted)
    assert grow(1) == 1
    if sys.version_info < (3, 14):
        assert grow.__annotations__ == {'n': 'Tree', 'return': 'Never'}
        with pytest.raises(RuntimeError, match="cannot be loaded .*'Tree' is not defined"):
            load_source((3, 13), rows, [], wanted)


def test_a_value_that_holds_functions_and_classes_is_told_when_it_changes():
    versions, value = Versions(), {'kinds': [int, abs]}
    version = versions.of('value', value)
    assert versions.of('value', value) == versions.of('value', {'kinds': [int, abs]}) == version
    value['kinds'].append(len)
    assert versions.of('value', value) != version


def test_a_method_of_functools_travels():
    """Python 3.14 cannot open what pickle itself makes of it."""
    class Scaled:
        scale = functools.partialmethod(lambda self, n, by: (n, by), by=2)
    pieces = []
    value_pickler()(type('File', (), {'write': lambda self, piece: pieces.append(bytes(piece))})(),
                    5).dump(vars(Scaled)['scale'])
    again = loads(b''.join(pieces))
    assert type(again) is functools.partialmethod
    assert again.keywords == {'by': 2} and again.func(0, 3, by=4) == (3, 4)
