"""Which modules are the user's own, what their sources say, and the files that travel for them."""

import dis
import glob
import hashlib
import importlib
import importlib.machinery
import importlib.util
import itertools
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import threading
import types
import warnings
import zipapp
import zipfile

import cloudpickle
import hypothesis
import hypothesis.strategies as st
import pytest

import dispy
from conftest import ROOT
from dispy import ModuleKind, ModuleSource, NameKind, OwnModules

_names = ('%s%d' % ('own', number) for number in itertools.count())


def write(directory, files):
    """Files by their names, indented as they are in a test."""
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(text, bytes):
            path.write_bytes(text)
        else:
            path.write_text(textwrap.dedent(text))
        os.utime(str(path), (1000000000.5, 1000000000.5))   # old files, as those of users are


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Modules written into a directory of sys.path; what a test loads is forgotten after it."""
    before = dict(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    instance = OwnModules()
    instance.write = lambda files: write(tmp_path, files)
    yield instance
    for name in set(sys.modules) - set(before):
        del sys.modules[name]


def targets(closure):
    return [file.target for file in closure]


def run(directory, *command, **environment):
    """A program that prints something; what it printed."""
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE='1', **environment)
    environment.setdefault('PYTHONPATH', ROOT)
    done = subprocess.run([str(part) for part in command], cwd=str(directory), env=environment,
                          universal_newlines=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


# Sources: imports

@pytest.mark.parametrize('text, expected', [
    ('import a', [('a', (), True)]),
    ('import a.b as c, d', [('a.b', (), True), ('d', (), True)]),
    ('from a import b as c, d', [('a', ('b', 'd'), True)]),
    ('from a import *', [('a', ('*',), True)]),
    ('from . import b', [('top.pkg', ('b',), True)]),
    ('from .a import b', [('top.pkg.a', ('b',), True)]),
    ('from .. import b', [('top', ('b',), True)]),
    ('from ..a.c import b', [('top.a.c', ('b',), True)]),
    ('from ... import b', []),
    ('from ...a import b', []),
    ('from ....a import b', []),
    ('from .....a import b', []),
    ('def f():\n import a', [('a', (), False)]),
    ('async def f():\n  async with x:\n   import a', [('a', (), False)]),
    ('class C:\n import a\n class D:\n  import b\n def f(self):\n  import c',
     [('a', (), True), ('b', (), True), ('c', (), False)]),
    ('if x:\n import a\nelif y:\n import b\nelse:\n import c',
     [('a', (), False), ('b', (), False), ('c', (), False)]),
    ('try:\n import a\nexcept E:\n import b\nelse:\n import c\nfinally:\n import d',
     [('a', (), False), ('b', (), False), ('c', (), False), ('d', (), False)]),
    ('with x:\n import a\nfor i in x:\n import b\nwhile x:\n import c',
     [('a', (), False), ('b', (), False), ('c', (), False)]),
    ('if x:\n class C:\n  import a', [('a', (), False)]),
    ('import importlib\nm = importlib.import_module("a.b")',
     [('importlib', (), True), ('a.b', (), True)]),
    ('n = __import__("a").b', [('a', (), True)]),
    ('m = import_module(".a", __package__)', [('top.pkg.a', (), True)]),
    ('m = x and import_module("a")', [('a', (), False)]),
    ('def f(): return __import__("a")', [('a', (), False)]),
    ('m = import_module(name)', []),
])
def test_imports(text, expected):
    assert ModuleSource(text, 'top.pkg.mod').imports == expected


def test_relative_imports_of_a_module_in_no_package():
    assert ModuleSource('from . import a\nfrom .b import c\nfrom ..b import c', 'top').imports == []


def test_relative_imports_of_a_package_begin_there():
    source = ModuleSource('from . import a\nfrom .b import c\nfrom .. import d', 'top.pkg', True)
    assert source.imports == [('top.pkg', ('a',), True), ('top.pkg.b', ('c',), True),
                              ('top', ('d',), True)]


@pytest.mark.skipif(sys.version_info < (3, 10), reason='match is of Python 3.10')
def test_imports_and_names_in_match():
    source = ModuleSource('match x:\n case {"k": a, **b}:\n  import c\n'
                          ' case [d, *e] as f if (g := 1):\n  pass', 'm')
    assert source.imports == [('c', (), False)]
    assert sorted(source.names) == ['a', 'b', 'c', 'd', 'e', 'f', 'g']


def standard_sources():
    paths = sorted(glob.glob(os.path.join(sysconfig.get_path('stdlib'), '*.py')))
    return paths[::4]


def imports_in(code):
    """(level, name) of the imports that compiled code does."""
    steps = list(dis.get_instructions(code))
    for index, step in enumerate(steps):
        if step.opname == 'IMPORT_NAME':
            levels = [before.argval for before in steps[:index]
                      if before.opname in ('LOAD_CONST', 'LOAD_SMALL_INT')
                      and type(before.argval) is int]
            yield levels[-1], step.argval
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from imports_in(const)


def test_imports_are_those_that_the_compiler_sees():
    compared = 0
    for path in standard_sources():
        with open(path, 'rb') as file:
            text = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            code = compile(text, path, 'exec', dont_inherit=True)
        expected = {name for level, name in imports_in(code) if level == 0}
        source = ModuleSource(text, 'package.name')
        assert source.error == ''
        assert expected <= {imported.module for imported in source.imports}, path
        compared += len(expected)
    assert compared > 100


# Sources: names

@pytest.mark.parametrize('text, kind, value', [
    ('X = 1', NameKind.CONSTANT, 1),
    ('X = -1.5', NameKind.CONSTANT, -1.5),
    ('X: int = 1', NameKind.CONSTANT, 1),
    ('X = Y = "text"', NameKind.CONSTANT, 'text'),
    ('X = (1, ("a", None), b"b", ...)', NameKind.CONSTANT, (1, ('a', None), b'b', ...)),
    ('X, Y = 1, f()', NameKind.CONSTANT, 1),
    ('if y:\n X = True', NameKind.CONSTANT, True),
    ('X = 1\ndef f():\n global X\n X = g()', NameKind.CONSTANT, 1),
    ('class C:\n global X\n X = 1', NameKind.CONSTANT, 1),
])
def test_a_constant_and_its_value(text, kind, value):
    binding = ModuleSource(text, 'm').names['X']
    assert (binding.kind, binding.value) == (kind, value)


@pytest.mark.parametrize('text, kind', [
    ('X = 1\nX = 2', NameKind.CONSTANT),
    ('try:\n X = 1\nexcept E:\n X = None', NameKind.CONSTANT),
    ('X = {}', NameKind.COMPUTED),
    ('X = []', NameKind.COMPUTED),
    ('X = (1, [])', NameKind.COMPUTED),
    ('X = f()', NameKind.COMPUTED),
    ('X = 1\nX += 1', NameKind.COMPUTED),
    ('X = 1\ndel X', NameKind.COMPUTED),
    ('X = 1 if y else 2', NameKind.COMPUTED),
    ('Y, *X = 1, 2', NameKind.COMPUTED),
    ('(Y, [X]) = f()', NameKind.COMPUTED),
    ('for X in y: pass', NameKind.COMPUTED),
    ('with y as (X, z): pass', NameKind.COMPUTED),
    ('try: pass\nexcept E as X: pass', NameKind.COMPUTED),
    ('print(X := 1)', NameKind.COMPUTED),
    ('while (X := f()): pass', NameKind.COMPUTED),
    ('y = [X := z for z in w]', NameKind.COMPUTED),
    ('def X(): pass', NameKind.DEFINED),
    ('async def X(): pass', NameKind.DEFINED),
    ('class X: pass', NameKind.DEFINED),
    ('X = None\ndef X(): pass', NameKind.COMPUTED),
    ('import X', NameKind.IMPORTED),
    ('import X.y', NameKind.IMPORTED),
    ('try:\n import X\nexcept ImportError:\n X = None', NameKind.IMPORTED),
    ('try:\n from y import X\nexcept ImportError:\n def X(): pass', NameKind.IMPORTED),
    ('from y import X\nX = X()', NameKind.COMPUTED),
])
def test_kinds_of_names(text, kind):
    binding = ModuleSource(text, 'm').names['X']
    assert binding.kind is kind
    assert not hasattr(binding, 'value')


@pytest.mark.parametrize('text', ['X: int', 'def f():\n global X\n X = 1', 'def f(): X = 1',
                                  'y = [X for X in z]', 'f = lambda: (X := 1)',
                                  'y.X = 1', 'class C: X = 1', 'f(X=1)',
                                  'for y in z:\n def f():\n  X = 1'])
def test_what_the_top_level_does_not_bind(text):
    assert 'X' not in ModuleSource(text, 'm').names


@pytest.mark.parametrize('text, origins', [
    ('import X', ('X',)), ('import X.y', ('X',)), ('import a.b as X', ('a.b',)),
    ('from a.b import c as X', ('a.b',)),
    ('from . import X', ('pkg',)), ('from .a import X', ('pkg.a',)),
    ('try:\n from a import X\nexcept E:\n from b import X', ('a', 'b'))])
def test_origins_of_imported_names(text, origins):
    binding = ModuleSource(text, 'pkg.m').names['X']
    assert (binding.origin, binding.origins) == (origins[0], origins)


def test_stars_and_exports():
    source = ModuleSource('from os import *\nfrom .a import *\n'
                          '__all__ = ["b", "c"]\n__all__ += ("d",)', 'pkg.m')
    assert source.stars == ('os', 'pkg.a')
    assert source.exports == ('b', 'c', 'd')
    assert ModuleSource('x = 1', 'm').exports is None


def test_classes():
    source = ModuleSource('''
class A:
    limit = 3
    table = {}
    def method(self): pass
    class B:
        inner: int = 1
        annotated: int
if x:
    class C:
        a = b = 1
def f():
    class D: pass
''', 'm')
    assert sorted(source.classes) == ['A', 'A.B', 'C']
    assert {name: binding.kind for name, binding in source.classes['A'].items()} == {
        'limit': NameKind.CONSTANT, 'table': NameKind.COMPUTED, 'method': NameKind.DEFINED,
        'B': NameKind.DEFINED}
    assert source.classes['A']['limit'].value == 3
    assert sorted(source.classes['A.B']) == ['inner']


@pytest.mark.parametrize('text', ['def f(:', 'x = 1\n\0', b'\xff\xfe',
                                  '# coding: none\nx = 1'.encode(), '(' * 5000])
def test_what_cannot_be_parsed(text):
    source = ModuleSource(text, 'm')
    assert source.error
    assert (source.imports, source.names, source.classes) == ([], {}, {})
    assert source.file_names_with(lambda name: frozenset('x')) == frozenset()


def test_deeply_nested_expressions_are_read():
    source = ModuleSource('import a\nROOT = __file__\nX = ' + ' + '.join(['f(1)'] * 2000), 'm')
    assert not source.error or 'Recursion' in source.error or 'Memory' in source.error


def test_encodings_that_a_text_declares():
    assert ModuleSource('# coding: latin-1\nX = "\xe9"'.encode('latin-1'),
                        'm').names['X'].value == '\xe9'


def test_odd_escapes_are_no_warnings_and_no_errors():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('error')
        assert ModuleSource("X = '\\d'", 'm').names['X'].value == '\\d'
    assert not caught


def test_constants_are_what_the_modules_of_python_have():
    compared = 0
    for name in ('argparse', 'logging', 'socketserver', 'zipfile', 'tarfile', 'calendar',
                 'http.client', 'tokenize', 'smtplib', 'shelve', 'pickle'):
        module = importlib.import_module(name)
        with open(module.__file__, 'rb') as file:
            text = file.read()
        source = ModuleSource(text, name, hasattr(module, '__path__'))
        for name, binding in source.names.items():
            is_set_later = 'global %s\n' % name in text.decode()
            if hasattr(binding, 'value') and name in vars(module) and not is_set_later:
                assert vars(module)[name] == binding.value
                compared += 1
    assert compared > 50


STATEMENTS = [
    '{0} = {1}', '{0} = {2} = {1}', '{0}, {2} = {1}, {1}', '[{0}, *{2}] = [1, 2, 3]',
    '{0}: int = {1}', '{0}: int', 'def {0}(): {2} = 1',
    'def {0}():\n global {2}\n {2} = 1', 'class {0}:\n {2} = 1',
    'class {0}:\n global {2}\n {2} = 1', 'import {3}', 'import {3} as {0}', 'import os.path',
    'from {3} import *', 'from json import dumps as {0}', 'for {0} in (1, 2): {2} = {1}',
    'for {0} in (): pass\nelse: {2} = {1}', 'if True: {0} = {1}',
    'if 0:\n {0} = {1}\nelse:\n {2} = {1}', 'try: {0} = {1}\nfinally: {2} = {1}',
    'try:\n 1 / 0\nexcept ZeroDivisionError as {0}: {2} = {1}',
    'with open("/dev/null") as {0}: {2} = {1}', 'while True:\n {0} = {1}\n break',
    'repr({0} := {1})', '[f for f in (1, 2) if ({0} := {1})]',
    'lambda: ({0} := {1})', 'if ({0} := {1}): pass', 'async def {0}(): pass',
    '{0} = lambda {2}: {2}', 'del {0}', 'pass']
NAMES = st.sampled_from(['a', 'b', 'c', 'd', 'e'])
LITERALS = ['1', '-2', '"text"', 'None', '(1, ("x", ...))', '[1]', '{}', '2 * 3', '()', 'b""',
            'len("ab")', '1 + 2j']


@hypothesis.given(st.lists(st.tuples(st.sampled_from(STATEMENTS), NAMES, st.sampled_from(LITERALS),
                                     NAMES, st.sampled_from(['json', 'math'])), max_size=6))
@hypothesis.settings(max_examples=300, deadline=None)
def test_names_are_those_that_running_the_text_binds(statements):
    text = '\n'.join(form.format(name, literal, other, module)
                     for form, name, literal, other, module in statements)
    variables = {}
    try:
        exec(compile(text, 'm', 'exec', dont_inherit=True), variables)
    except NameError:   # del of what there is not
        hypothesis.reject()
    names = ModuleSource(text, 'm').names
    starred = {name for module in ModuleSource(text, 'm').stars
               for name in vars(importlib.import_module(module))}
    bound = {name for name in variables if not name.startswith('__')}
    assert bound <= set(names) | starred
    for name, binding in names.items():
        if hasattr(binding, 'value') and name in bound - starred:
            assert variables[name] == binding.value and type(variables[name]) is type(binding.value)
    words = ('del', 'if', 'else', 'except', 'import *')
    if not any(word in form for form, *_ in statements for word in words):
        assert set(names) <= bound


# Sources: values that depend on where a file lies

@pytest.mark.parametrize('text', [
    'X = __file__',
    'X = os.path.dirname(__file__)',
    'X = __spec__.origin',
    'X = list(__path__)',
    'X = numpy.__file__',
    'ROOT = dirname(__file__)\nX = join(ROOT, "x")',
    'X = join(Y, "x")\nY = join(ROOT, "y")\nROOT = dirname(__file__)',
    'def here(name):\n return join(dirname(__file__), name)\nX = here("x")',
    'def outer():\n return inner()\ndef inner():\n return ROOT\nROOT = __file__\nX = outer()',
    'here = lambda name: join(__file__, name)\nX = here("x")',
    'X = []\nX.append(__file__)',
    'X = {}\nX["root"] = __file__',
    'X = [1]\nX += [__file__]',
    'for X in listdir(__file__): pass',
    'with open(__file__) as f:\n X = f.read()',
    'X, Y = __file__, 1',
    'X = [join(__file__, name) for name in names]',
    'X = f"{__file__}/x"',
    'if (X := __file__): pass',
    'class Paths:\n root = __file__\nX = Paths.root',
    'class Paths:\n def __init__(self):\n  self.root = __file__\nX = Paths()',
    'class Paths:\n @staticmethod\n def root():\n  return __file__\nX = Paths.root()',
    'class Base:\n root = __file__\nclass Paths(Base): pass\nX = Paths()',
    'def f():\n global ROOT\n ROOT = __file__\nROOT = None\nX = ROOT',
    'def f():\n global ROOT\n ROOT = ROOT or 1\n return ROOT\nROOT = __file__\nX = f()',
    'X = list(map(f, names))\ndef f(name):\n return join(__file__, name)',
    'import importlib.resources\nX = importlib.resources.files("m")',
    'from importlib import resources\nX = resources.files("m")',
    'from importlib.resources import files as there\nX = there("m")',
    'X: str = __file__',
    'if y:\n  X = 1\nelse:\n  X = __file__',
])
def test_values_that_depend_on_the_file(text):
    source = ModuleSource(text, 'm')
    assert not source.error
    assert source.names['X'].from_file
    assert 'X' in source.file_names


@pytest.mark.parametrize('text', [
    'X = 1\nROOT = __file__',
    'ROOT, X = __file__, 1',
    'def f(): return __file__\nX = {"f": f}',
    'def f(ROOT): return ROOT\nROOT = __file__\nX = f(1)',
    'X = [ROOT for ROOT in range(3)]\nROOT = __file__',
    'X = (lambda ROOT: ROOT)(1)\nROOT = __file__',
    'class Config:\n root = __file__\n limit = 3\nX = Config.limit',
    'print(__file__)\nX = len(sys.argv)',
    'def f():\n ROOT = 1\n return ROOT\nROOT = __file__\nX = f()',
    'import sys\nsys.path.insert(0, ROOT)\nROOT = __file__\nX = 3',
])
def test_values_that_do_not_depend_on_the_file(text):
    source = ModuleSource(text, 'm')
    assert not source.names['X'].from_file
    assert 'X' not in source.file_names


def test_attributes_of_classes_that_depend_on_the_file():
    table = ModuleSource('''
class C:
    root = __file__
    data = root + 'x'
    limit = 1
    other = limit + 1
''', 'm').classes['C']
    assert [name for name, binding in table.items() if binding.from_file] == ['root', 'data']


def test_names_that_only_functions_assign():
    source = ModuleSource('def f():\n global ROOT, N\n ROOT = __file__\n', 'm')
    assert 'ROOT' not in source.names
    assert 'ROOT' in source.file_names


def test_values_that_depend_on_the_files_of_other_modules(own):
    own.write({'fpkg/__init__.py': '',
               'fpkg/paths.py': 'ROOT = __file__\nN = 1\ndef here(name): return ROOT + name\n'
                                'class P: root = ROOT',
               'fpkg/a.py': 'from .paths import ROOT as R, N as M\nDATA = R + "x"\nLIMIT = M + 1',
               'fpkg/b.py': 'from fpkg import paths\nimport fpkg.a as other\n'
                            'DATA = paths.here("x")\nTHERE = other.DATA\nLIMIT = paths.N',
               'fpkg/c.py': 'from .b import *\nE = DATA\nfrom .paths import P as Q\n'
                            'F = Q.root\nG = LIMIT',
               'fpkg/d.py': 'def f():\n from .c import E\n return E\nX = f()\nY = [f]'})
    found = own.file_names(own.closure(['fpkg.d', 'fpkg.c']))
    assert {'R', 'DATA'} <= found['fpkg.a'] and 'LIMIT' not in found['fpkg.a']
    assert {'DATA', 'THERE'} <= found['fpkg.b'] and 'LIMIT' not in found['fpkg.b']
    assert {'E', 'F'} <= found['fpkg.c'] and 'G' not in found['fpkg.c']
    assert 'X' in found['fpkg.d'] and 'Y' not in found['fpkg.d']


def test_modules_that_import_each_other_have_names_without_end(own):
    """Each has its own by way of the others: a.HERE, b.a.HERE, a.b.a.HERE and so on."""
    for name in 'abcd':
        own.write({'round/__init__.py': '', 'round/%s.py' % name: ''.join(
            'from round import %s\n' % other for other in 'abcd') + 'HERE = __file__\n'})
    found = own.file_names(own.closure(['round.a']))
    assert all({'HERE', 'b.HERE', 'd.HERE'} <= found['round.' + name] for name in 'abcd')


# Kinds

@pytest.mark.parametrize('name', ['sys', 'builtins', 'os', 'os.path', 'json', 'json.decoder',
                                  'encodings.utf_8', 'zipimport', '_ctypes', 'ctypes', 'math',
                                  'importlib._bootstrap',
                                  'lib2to3' if sys.version_info < (3, 13) else 'wave', 'sqlite3',
                                  'xml.parsers.expat.model',
                                  'unittest', 'this'])
def test_the_standard_library(name):
    import xml.parsers.expat   # makes a module
    assert xml.parsers.expat.model and OwnModules().kind(name) is ModuleKind.STANDARD


@pytest.mark.parametrize('name', ['pytest', '_pytest', '_pytest.fixtures', 'cloudpickle',
                                  'cloudpickle.cloudpickle', 'psutil', 'psutil._common', 'dispy',
                                  'dispynode', 'dispyscheduler', 'dispy_httpd', 'pip'])
def test_what_is_installed(name):
    assert OwnModules().kind(name) is ModuleKind.INSTALLED


@pytest.mark.parametrize('name', ['sitecustomize', 'usercustomize'])
def test_what_a_python_imports_when_it_starts_is_its_own(tmp_path, monkeypatch, name):
    path = tmp_path / (name + '.py')
    path.write_text('')
    spec = importlib.util.spec_from_file_location(name, str(path))
    monkeypatch.setitem(sys.modules, name, importlib.util.module_from_spec(spec))
    assert OwnModules().kind(name) is ModuleKind.INSTALLED


def test_nothing_in_this_process_is_taken_for_the_users_own():
    instance = OwnModules()
    own = [name for name in list(sys.modules) if instance.kind(name) is ModuleKind.OWN]
    tests = os.path.join(ROOT, 'tests')
    there = {os.path.splitext(name)[0] for _, directories, names in os.walk(tests)
             for name in directories + names}
    assert {name.partition('.')[0] for name in own} <= there | {'tests'} | {
        name for name in own if name.startswith('own')}


@pytest.mark.parametrize('name', ['', None, 3, 'nosuchmodule', 'nosuch.module', 'os.nosuch', '.',
                                  'a..b', '.a', 'a.'])
def test_what_is_missing(name):
    assert OwnModules().kind(name) is ModuleKind.MISSING


def test_own_modules_are_found_without_importing_them(own):
    own.write({'ma.py': 'raise SystemError', 'mb/__init__.py': 'raise SystemError',
               'mb/c.py': 'raise SystemError', 'mns/d.py': 'raise SystemError'})
    before = set(sys.modules)
    for name in ('ma', 'mb', 'mb.c', 'mns', 'mns.d'):
        assert own.kind(name) is ModuleKind.OWN, name
    assert own.kind('mb.nosuch') is ModuleKind.MISSING
    assert targets(own.closure(['ma', 'mb.c',
                                'mns.d'])) == ['ma.py', 'mb/__init__.py', 'mb/c.py', 'mns/d.py']
    assert set(sys.modules) == before


def test_own_modules_that_are_loaded(own):
    own.write({'la.py': '', 'lb/__init__.py': 'from . import c', 'lb/c.py': '', 'lns/d.py': ''})
    for name in ('la', 'lb.c', 'lns.d'):
        importlib.import_module(name)
    for name in ('la', 'lb', 'lb.c', 'lns', 'lns.d'):
        assert own.kind(name) is ModuleKind.OWN, name


def test_the_main_module_has_no_name():
    instance = OwnModules()
    assert instance.kind('__main__') is ModuleKind.BY_VALUE
    assert instance.kind('__mp_main__') is ModuleKind.BY_VALUE


def test_what_is_the_main_module_under_another_name(own, monkeypatch):
    own.write({'mainlike.py': ''})
    module = importlib.import_module('mainlike')
    assert own.kind('mainlike') is ModuleKind.OWN
    monkeypatch.setitem(sys.modules, '__main__', module)
    assert own.kind('mainlike') is ModuleKind.BY_VALUE


def test_modules_made_at_run_time(own, monkeypatch):
    monkeypatch.setitem(sys.modules, 'made', types.ModuleType('made'))
    assert own.kind('made') is ModuleKind.BY_VALUE
    own.write({'maker.py': 'import sys, types\n'
                           'sys.modules["maker.made"] = types.ModuleType("maker.made")'})
    importlib.import_module('maker')
    assert own.kind('maker.made') is ModuleKind.BY_VALUE
    assert own.closure(['made', 'maker.made']) == []


def test_modules_that_an_installed_package_made(own, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytest.made', types.ModuleType('pytest.made'))
    assert own.kind('pytest.made') is ModuleKind.INSTALLED   # as six.moves is
    monkeypatch.setitem(sys.modules, 'typing.made', type('made', (), {}))
    assert own.kind('typing.made') is ModuleKind.STANDARD    # as typing.io was


def test_modules_that_lie_elsewhere_than_their_names_say(own, tmp_path, monkeypatch):
    write(tmp_path / 'elsewhere', {'other.py': '', 'pkg/__init__.py': '', 'pkg/sub.py': ''})
    own.write({'same.py': ''})
    for name, path in (('other', 'other.py'), ('same', 'other.py'), ('deep.other', 'other.py'),
                       ('pkg', 'pkg/__init__.py')):
        spec = importlib.util.spec_from_file_location(name, str(tmp_path / 'elsewhere' / path))
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        assert own.kind(name) is ModuleKind.BY_VALUE, name
    # Its name leads to it only from a package that cannot be found.
    importlib.import_module('pkg.sub')
    assert own.kind('pkg.sub') is ModuleKind.BY_VALUE


def test_a_module_that_is_being_imported(own):
    own.write({'half/__init__.py': '''
                   from dispy import own_modules
                   kinds = [own_modules.kind(name) for name in ("half", "half.sub")]
                   from . import sub
                   ''',
               'half/sub.py': 'import dispy\nkind = dispy.own_modules.kind(__name__)'})
    module = importlib.import_module('half')
    assert (module.kinds, module.sub.kind) == ([ModuleKind.OWN, ModuleKind.OWN], ModuleKind.OWN)


@pytest.mark.parametrize('there, kind',
                         [('plain.py', ModuleKind.OWN),
                          ('elsewhere/plain.py', ModuleKind.BY_VALUE)])
def test_a_module_that_was_made_from_a_file_without_a_spec(own, tmp_path, monkeypatch, there, kind):
    own.write({'plain.py': '', 'elsewhere/plain.py': ''})
    module = types.ModuleType('plain')
    module.__file__ = str(tmp_path / there)
    monkeypatch.setitem(sys.modules, 'plain', module)
    assert own.kind('plain') is kind


def test_a_path_that_is_gone_from_sys_path(own, tmp_path, monkeypatch):
    write(tmp_path / 'gone', {'left.py': ''})
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path / 'gone'))
        importlib.import_module('left')
    # No node that imports as this program does would find it.
    assert own.kind('left') is ModuleKind.BY_VALUE


def test_a_file_that_only_a_hook_can_load_travels_by_value(own, tmp_path, monkeypatch):
    own.write({'odd.hy': 'X = 1', 'usesodd.py': 'import odd'})

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == 'odd':
                loader = importlib.machinery.SourceFileLoader('odd', str(tmp_path / 'odd.hy'))
                return importlib.util.spec_from_loader('odd', loader)

    monkeypatch.setattr(sys, 'meta_path', [*sys.meta_path, Finder])
    for _ in range(2):
        assert own.kind('odd') is ModuleKind.BY_VALUE
        assert targets(own.closure(['usesodd'])) == ['usesodd.py']
        importlib.import_module('odd')


def test_what_is_registered_by_value_is_asked_each_time(own):
    own.write({'reg/__init__.py': '', 'reg/sub.py': '', 'user.py': 'import reg.sub'})
    module = importlib.import_module('reg')
    assert own.kind('reg.sub') is ModuleKind.OWN
    cloudpickle.register_pickle_by_value(module)
    try:
        assert own.kind('reg') is own.kind('reg.sub') is ModuleKind.BY_VALUE
        assert targets(own.closure(['user', 'reg'])) == ['user.py']
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    assert own.kind('reg') is own.kind('reg.sub') is ModuleKind.OWN


def test_odd_entries_of_sys_modules_run_nothing(own, monkeypatch):
    ran = []

    class Module(types.ModuleType):
        def __getattribute__(self, name):
            ran.append(name)
            raise RuntimeError(name)

        @property
        def __dict__(self):
            ran.append('__dict__')

    class Thing:
        def __getattribute__(self, name):
            ran.append(name)
            raise RuntimeError(name)

        def __eq__(self, other):
            ran.append('__eq__')
            raise RuntimeError

    own.write({'replaced.py': '', 'nothing.py': '',
               'uses.py': 'import replaced, hidden, nothing, thing'})
    for name, module in (('hidden', Module('hidden')), ('replaced', Thing()), ('nothing', None),
                         ('thing', Thing()), ('number', 3)):
        monkeypatch.setitem(sys.modules, name, module)
    kinds = {name: own.kind(name) for name in ('hidden', 'replaced', 'nothing', 'thing', 'number')}
    # A node that imports it gets the object as well.
    assert targets(own.closure(['uses'])) == ['uses.py', 'replaced.py']
    assert not ran
    assert kinds == {'hidden': ModuleKind.BY_VALUE, 'replaced': ModuleKind.OWN,
                     'nothing': ModuleKind.MISSING,
                     'thing': ModuleKind.BY_VALUE, 'number': ModuleKind.BY_VALUE}


def test_lazy_modules_stay_lazy(own, monkeypatch):
    own.write({'lazy/__init__.py': 'raise SystemError', 'lazy/sub.py': ''})
    spec = importlib.util.find_spec('lazy')
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'lazy', module)
    spec.loader.exec_module(module)
    assert own.kind('lazy') is ModuleKind.OWN
    assert targets(own.closure(['lazy.sub'])) == ['lazy/__init__.py', 'lazy/sub.py']
    assert type(module).__name__ == '_LazyModule'


def test_finders_of_the_user_are_asked_for_top_level_names_and_may_fail(own, tmp_path, monkeypatch):
    write(tmp_path / 'source', {'found.py': '', 'foundpkg/__init__.py': '', 'foundpkg/sub.py': ''})
    asked = []

    class Broken:
        @staticmethod
        def find_spec(name, path=None, target=None):
            raise ZeroDivisionError

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            asked.append(name)
            paths = {'found': 'found.py', 'foundpkg': 'foundpkg/__init__.py'}
            if name in paths:
                path = str(tmp_path / 'source' / paths[name])
                return importlib.util.spec_from_file_location(name, path)

    monkeypatch.setattr(sys, 'meta_path', [Broken, *sys.meta_path, Finder])
    assert own.kind('found') is own.kind('foundpkg') is own.kind('foundpkg.sub') is ModuleKind.OWN
    assert 'found' in asked and 'foundpkg.sub' not in asked
    sys.meta_path.insert(0, object())
    assert OwnModules().kind('found') is ModuleKind.OWN
    del sys.meta_path[:2]
    importlib.import_module('foundpkg.sub')
    assert own.kind('foundpkg.sub') is ModuleKind.OWN
    assert targets(own.closure(['foundpkg.sub'])) == ['foundpkg/__init__.py', 'foundpkg/sub.py']


def test_the_finder_that_imports_setuptools_is_not_asked(own, monkeypatch):
    class DistutilsMetaFinder:   # as setuptools installs it before Python 3.12
        @staticmethod
        def find_spec(name, path=None, target=None):
            asked.append(name)

    asked = []
    DistutilsMetaFinder.__module__ = '_distutils_hack'
    instance = DistutilsMetaFinder()
    monkeypatch.setattr(sys, 'meta_path', [instance, *sys.meta_path])
    own.write({'usesdistutils.py': 'import distutils'})
    own.closure(['usesdistutils'])
    assert asked == []


def test_namespace_packages_that_lie_elsewhere_than_their_names_say(own, tmp_path, monkeypatch):
    own.write({'elsewhere/nspace/part.py': '', 'other/nspace/part.py': ''})
    spec = importlib.machinery.ModuleSpec('nspace', None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / 'elsewhere' / 'nspace')]
    monkeypatch.setitem(sys.modules, 'nspace', importlib.util.module_from_spec(spec))
    assert own.kind('nspace') is ModuleKind.BY_VALUE
    importlib.import_module('nspace.part')
    assert own.kind('nspace.part') is ModuleKind.BY_VALUE
    monkeypatch.syspath_prepend(str(tmp_path / 'other'))
    assert OwnModules().kind('nspace') is ModuleKind.BY_VALUE
    monkeypatch.syspath_prepend(str(tmp_path / 'elsewhere'))
    assert OwnModules().kind('nspace.part') is ModuleKind.OWN


def test_no_lock_is_held_while_a_finder_runs(own, monkeypatch):
    """A finder that waits for another thread, which asks the same."""
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == 'waits':
                other = threading.Thread(target=own.closure, args=(['json'],), daemon=True)
                other.start()
                other.join(20)
                waited.append(other.is_alive())

    waited = []
    monkeypatch.setattr(sys, 'meta_path', [Finder, *sys.meta_path])
    assert own.kind('waits') is ModuleKind.MISSING
    assert waited == [False]


def test_a_module_that_appears_is_found_and_what_is_loaded_counts(own, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(dispy.time, 'monotonic', lambda: clock[0])
    assert own.kind('late') is ModuleKind.MISSING
    own.write({'late.py': ''})
    importlib.invalidate_caches()
    assert own.kind('late') is ModuleKind.MISSING
    clock[0] += dispy.UNLOADED_TIME + 0.1
    assert own.kind('late') is ModuleKind.OWN
    monkeypatch.setitem(sys.modules, 'late', types.ModuleType('late'))
    assert own.kind('late') is ModuleKind.BY_VALUE


RECORD = '%s,sha256=x,10\n"with, comma.txt",,\n../../bin/x,,\n'


def test_metadata_beside_a_module_says_that_it_is_installed(own):
    own.write({'metapkg/__init__.py': '', 'metapkg/sub.py': '', 'metapkg/later.py': '',
               'metamod.py': '', 'mine.py': '',
               'metapkg-1.0.dist-info/RECORD': RECORD % 'metapkg/__init__.py'
               + 'metapkg/sub.py,,\n',
               'metamod-2.0.egg-info/installed-files.txt': '../metamod.py\nPKG-INFO\n',
               'mine.egg-info/PKG-INFO': 'Name: mine', 'mine.egg-info/SOURCES.txt': 'mine.py'})
    assert [own.kind(name)
            for name in ('metapkg', 'metapkg.sub', 'metapkg.later', 'metamod',
                         'mine')] == [ModuleKind.INSTALLED] * 4 + [ModuleKind.OWN]
    importlib.import_module('metapkg.sub')
    importlib.import_module('mine')
    assert OwnModules().kind('metapkg.sub') is ModuleKind.INSTALLED
    assert OwnModules().kind('mine') is ModuleKind.OWN


def test_metadata_is_read_once_for_a_directory(own, monkeypatch):
    own.write({'one.py': '', 'two.py': '', 'x-1.dist-info/RECORD': 'one.py,,\n'})
    read = []
    real = dispy._directory_metadata
    monkeypatch.setattr(dispy, '_directory_metadata',
                        lambda directory: read.append(directory) or real(directory))
    assert [own.kind(name)
            for name in ('one', 'two', 'one', 'two')] == [ModuleKind.INSTALLED, ModuleKind.OWN] * 2
    assert len(read) == 1


def test_namespace_parts_of_a_package_may_be_installed_or_not(own, tmp_path, monkeypatch):
    write(tmp_path / 'site-packages', {'space/installed.py': ''})
    own.write({'space/mine.py': ''})
    monkeypatch.syspath_prepend(str(tmp_path / 'site-packages'))
    assert [own.kind(name)
            for name in ('space', 'space.mine',
                         'space.installed')] == [ModuleKind.OWN, ModuleKind.OWN,
                                                 ModuleKind.INSTALLED]
    importlib.import_module('space.mine')
    importlib.import_module('space.installed')
    assert [own.kind(name)
            for name in ('space', 'space.mine',
                         'space.installed')] == [ModuleKind.OWN, ModuleKind.OWN,
                                                 ModuleKind.INSTALLED]


def test_a_link_in_site_packages_to_a_source_directory_is_the_users_own(own, tmp_path, monkeypatch):
    write(tmp_path / 'src', {'linked/__init__.py': ''})
    (tmp_path / 'site-packages').mkdir()
    os.symlink(str(tmp_path / 'src' / 'linked'), str(tmp_path / 'site-packages' / 'linked'))
    monkeypatch.syspath_prepend(str(tmp_path / 'site-packages'))
    assert own.kind('linked') is ModuleKind.OWN
    importlib.import_module('linked')
    assert own.kind('linked') is ModuleKind.OWN
    # Links into a cache of packages.
    write(tmp_path / 'site-packages', {'linked-1.dist-info/RECORD': 'linked/__init__.py,,\n'})
    assert OwnModules().kind('linked') is ModuleKind.INSTALLED


# Kinds in programs of their own

ASK = 'import dispy, sys\nfor name in %r: print(dispy.own_modules.kind(name).name)\n'


def wheel(directory, name, version, files):
    """A wheel, as pip installs it."""
    path = directory / ('%s-%s-py3-none-any.whl' % (name, version))
    info = '%s-%s.dist-info/' % (name, version)
    files = dict(files, **{info + 'METADATA': 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n'
                           % (name, version),
                           info + 'WHEEL': 'Wheel-Version: 1.0\nGenerator: test\n'
                                           'Root-Is-Purelib: true\nTag: py3-none-any\n'})
    with zipfile.ZipFile(str(path), 'w') as members:
        for file, text in files.items():
            members.writestr(file, text)
        members.writestr(info + 'RECORD',
                         ''.join('%s,,\n' % file for file in [*files, info + 'RECORD']))
    return path


def test_installed_with_target(tmp_path):
    built = wheel(tmp_path, 'vendored', '1.0',
                  {'vendored/__init__.py': '', 'vendored/sub.py': '', 'single.py': ''})
    run(tmp_path, sys.executable, '-m', 'pip', 'install', '--no-index',
        '--disable-pip-version-check', '-q', '--target', tmp_path / 'vendor', built)
    for module in (dispy, sys.modules['dispynode']):
        shutil.copy(module.__file__, str(tmp_path / 'vendor'))
    write(tmp_path, {'beside.py': '', 'script.py': 'import vendored.sub\n' + ASK % (
        ['vendored', 'vendored.sub', 'single', 'beside', 'dispy', 'dispynode', '__main__'],)})
    assert run(tmp_path, sys.executable, 'script.py', PYTHONPATH=str(tmp_path / 'vendor')) == [
        'INSTALLED', 'INSTALLED', 'INSTALLED', 'OWN', 'INSTALLED', 'INSTALLED', 'BY_VALUE']


def test_copies_of_numpy_on_the_path(tmp_path):
    numpy = pytest.importorskip('numpy')
    site = os.path.dirname(os.path.dirname(numpy.__file__))
    for path in glob.glob(os.path.join(site, 'numpy*')):
        os.symlink(path, str(tmp_path / os.path.basename(path)))
    copied = tmp_path / 'copied'
    copied.mkdir()
    for path in glob.glob(os.path.join(site, 'numpy*.dist-info')):
        shutil.copytree(path, str(copied / os.path.basename(path)))
    write(copied, {'numpy/__init__.py': ''})
    for path in (tmp_path, copied):
        assert run(tmp_path, sys.executable, '-c', ASK % (['numpy'],),
                   PYTHONPATH=os.pathsep.join([str(path), ROOT])) == ['INSTALLED']


def virtual(tmp_path):
    """(Python of a new virtual environment, its site-packages)."""
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(tmp_path / 'venv')],
                   check=True, timeout=60)
    python = str(tmp_path / 'venv' / ('Scripts' if os.name == 'nt' else 'bin') / 'python')
    site, = run(tmp_path, python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))')
    packages = os.pathsep.join({ROOT, os.path.dirname(os.path.dirname(cloudpickle.__file__))})
    return python, type(tmp_path)(site), packages


def test_editable_installs_by_a_path_file(tmp_path):
    python, site, packages = virtual(tmp_path)
    write(tmp_path / 'project' / 'src',
          {'edited/__init__.py': '', 'edited/sub.py': '',
           'edited.egg-info/SOURCES.txt': 'edited/__init__.py'})
    write(site, {'__editable__.edited-1.0.pth': str(tmp_path / 'project' / 'src'),
                 'edited-1.0.dist-info/RECORD':
                 '__editable__.edited-1.0.pth,,\nedited-1.0.dist-info/RECORD,,\n', 'plain.py': ''})
    asked = ['edited', 'edited.sub', 'plain', 'os', 'sqlite3', '_ctypes']
    expected = ['OWN', 'OWN', 'INSTALLED', 'STANDARD', 'STANDARD', 'STANDARD']
    assert run(tmp_path, python, '-c', ASK % (asked,), PYTHONPATH=packages) == expected
    assert run(tmp_path, python, '-c', 'import edited.sub, plain\n' + ASK % (asked,),
               PYTHONPATH=packages) == expected


def test_editable_installs_by_a_finder_of_setuptools(tmp_path):
    editable = pytest.importorskip('setuptools.command.editable_wheel')
    python, site, packages = virtual(tmp_path)
    write(tmp_path / 'project',
          {'code/__init__.py': '', 'code/sub.py': '', 'inner/__init__.py': '',
           'spaced/part/__init__.py': ''})
    source = tmp_path / 'project'
    mapping = {'edited': str(source / 'code'), 'edited.inner': str(source / 'inner'),
               'espace.part': str(source / 'spaced' / 'part')}
    finder = editable._finder_template('__editable___edited_finder', mapping, {'espace': []})
    write(site, {'__editable___edited_finder.py': finder,
                 '__editable__.edited.pth': 'import __editable___edited_finder; '
                                            '__editable___edited_finder.install()',
                 'edited-1.0.dist-info/RECORD': '__editable___edited_finder.py,,\n'})
    asked = ['edited', 'edited.sub', 'edited.inner', 'espace.part', '__editable___edited_finder']
    expected = ['OWN', 'OWN', 'OWN', 'OWN', 'INSTALLED']
    assert run(tmp_path, python, '-c', ASK % (asked,), PYTHONPATH=packages) == expected
    loaded = 'import edited.sub, edited.inner, espace.part\n'
    assert run(tmp_path, python, '-c', loaded + ASK % (asked,), PYTHONPATH=packages) == expected
    show = loaded + ('import dispy\nnames = ["edited.inner", "edited.sub", "espace.part"]\n'
                     'for file in dispy.own_modules.closure(names): print(file.target)')
    assert run(tmp_path, python, '-c', show, PYTHONPATH=packages) == [
        'edited/__init__.py', 'edited/inner/__init__.py', 'edited/sub.py',
        'espace/part/__init__.py']


def test_python_m_of_a_module_in_a_package(tmp_path):
    write(tmp_path,
          {'runs/__init__.py': '', 'runs/tool.py': ASK % (['__main__', 'runs', 'runs.tool'],)})
    assert run(tmp_path, sys.executable, '-m', 'runs.tool') == ['BY_VALUE', 'OWN', 'OWN']


def test_children_started_by_spawn(tmp_path):
    write(tmp_path, {'beside.py': '', 'script.py': '''
        import multiprocessing, beside, sys
        def ask():
            from dispy import own_modules
            for name in ('__mp_main__', ask.__module__, 'beside'):
                print(own_modules.kind(name).name)
        if __name__ == '__main__':
            child = multiprocessing.get_context('spawn').Process(target=ask)
            child.start()
            child.join()
        '''})
    assert run(tmp_path, sys.executable, 'script.py') == ['BY_VALUE', 'BY_VALUE', 'OWN']


@pytest.mark.parametrize('mode', ['importlib', 'prepend'])
def test_modules_that_pytest_imports(tmp_path, mode):
    write(tmp_path, {'src/inside/__init__.py': '', 'tests/helper.py': '', 'tests/test_asks.py': '''
        import sys, inside
        from dispy import own_modules
        def test_kinds():
            with open('kinds', 'w') as file:
                print(own_modules.kind(__name__).name, own_modules.kind('inside').name, file=file)
        ''', 'pytest.ini': '[pytest]\n'})
    # As the command pytest does, which does not look into the directory that it is started in.
    script = 'import sys; del sys.path[0]; import pytest; sys.exit(pytest.main(sys.argv[1:]))'
    run(tmp_path, sys.executable, '-c', script, '-q', '-p', 'no:cacheprovider', '--import-mode',
        mode, 'tests',
        PYTHONPATH=os.pathsep.join([str(tmp_path / 'src'), ROOT]))
    expected = 'BY_VALUE OWN' if mode == 'importlib' else 'OWN OWN'
    assert (tmp_path / 'kinds').read_text().strip() == expected


def test_zip_applications(tmp_path):
    write(tmp_path / 'app',
          {'__main__.py': ASK % (['zown', 'zown.sub', 'zvendored', 'single', 'dispy', '__main__'],)
           + '''
closure = dispy.own_modules.closure(['zown.sub'])
files = dispy.own_modules.files(closure)
print(*files)
rows = dispy.own_modules.rows(files)
print(rows == dispy.own_modules.rows(files),
      dispy.own_modules.changed(closure, dispy.own_modules.digests(closure)))
for name, size, digest, mode in dispy.own_modules.rows(files):
    import hashlib
    content = files[name].read()
    assert (len(content), hashlib.sha256(content).digest()) == (size, digest), name
print(files['zown/data/table.csv'].read().decode())
''', 'zown/__init__.py': '', 'zown/sub.py': 'import zvendored, single',
           'zown/data/table.csv': 'table', 'zown/.hidden': '',
           'zown/inner/__init__.py': '', 'zown/inner/other.txt': '', 'zvendored/__init__.py': '',
           'single.py': '', 'zvendored-1.0.dist-info/RECORD': 'zvendored/__init__.py,,\n'})
    for module in (dispy, sys.modules['dispynode']):
        shutil.copy(module.__file__, str(tmp_path / 'app'))
    zipapp.create_archive(str(tmp_path / 'app'), str(tmp_path / 'app.pyz'))
    packages = os.path.dirname(os.path.dirname(cloudpickle.__file__))
    assert run(tmp_path, sys.executable, 'app.pyz', PYTHONPATH=packages) == [
        'OWN', 'OWN', 'INSTALLED', 'OWN', 'INSTALLED', 'BY_VALUE',
        'zown/__init__.py', 'zown/sub.py', 'single.py', 'zown/data/table.csv', 'True', '[]',
        'table']


def test_an_import_of_dispy_loads_no_metadata():
    show = 'print(*(set(sys.modules) & {"importlib.metadata", "zipfile", "csv"}) or ["none"])'
    loaded = run(ROOT, sys.executable, '-c', 'import sys, dispy; ' + show)
    assert loaded == run(ROOT, sys.executable, '-c', 'import sys, cloudpickle, psutil; ' + show)


# Closures

def test_closure_follows_imports_and_packages(own):
    own.write({
        'top/__init__.py': 'from . import shown', 'top/shown.py': 'import json, numpy',
        'top/unused.py': '',
        'top/deep/__init__.py': '', 'top/deep/mod.py': '''
            from ..lazy import value
            def f():
                from top import late
            if False:
                import conditional
        ''', 'top/lazy.py': 'import top.deep.mod', 'top/late.py': '',
        'conditional.py': 'import nosuchmodule', 'alone.py': ''})
    assert targets(own.closure(['top.deep.mod'])) == [
        'top/__init__.py', 'top/deep/__init__.py', 'top/deep/mod.py', 'top/shown.py', 'top/lazy.py',
        'top/late.py', 'conditional.py']


def test_closure_is_the_same_for_each_order_of_names(own):
    own.write({'ca.py': 'import cb', 'cb.py': 'import cc', 'cc.py': 'import ca'})
    for names in (['cc', 'ca'], ['ca', 'cc', 'ca'], {'cc', 'ca'}):
        assert targets(own.closure(names)) == ['ca.py', 'cc.py', 'cb.py']


def test_chains_lead_from_what_was_asked_for(own):
    own.write({'ka.py': 'import kb', 'kb/__init__.py': 'from . import kc', 'kb/kc.py': ''})
    assert [file.chain
            for file in own.closure(['ka'])] == [('ka',), ('ka', 'kb'), ('ka', 'kb', 'kb.kc')]


def test_from_import_of_names_and_of_submodules(own):
    own.write({'fi/__init__.py': 'value = 1', 'fi/sub.py': '', 'fi/value.py': '',
               'user1.py': 'from fi import sub, value'})
    assert targets(own.closure(['user1'])) == ['user1.py', 'fi/__init__.py', 'fi/sub.py',
                                               'fi/value.py']
    importlib.import_module('fi')   # now it is known what fi.value is
    assert targets(own.closure(['user1'])) == ['user1.py', 'fi/__init__.py', 'fi/sub.py']


def test_star_imports(own):
    own.write({'sa/__init__.py': '__all__ = ["x", "y"]', 'sa/x.py': '', 'sa/z.py': '',
               'sb/__init__.py': '', 'sb/x.py': '', 'sb/z.py': '',
               'user2.py': 'from sa import *', 'user3.py': 'from sb import *'})
    assert targets(own.closure(['user2'])) == ['user2.py', 'sa/__init__.py', 'sa/x.py']
    assert targets(own.closure(['user3'])) == ['user3.py', 'sb/__init__.py']
    importlib.import_module('sb.x')
    assert targets(own.closure(['user3'])) == ['user3.py', 'sb/__init__.py', 'sb/x.py']


def test_shipped_modules_are_left_out_but_not_what_they_import(own):
    own.write({'sh/__init__.py': '', 'sh/sub.py': 'import beyond', 'beyond.py': '',
               'user4.py': 'import sh.sub'})
    assert targets(own.closure(['user4'], ['sh'])) == ['user4.py', 'beyond.py']
    assert targets(own.closure(['user4'], ['sh.sub'])) == ['user4.py', 'sh/__init__.py',
                                                           'beyond.py']


def test_namespace_packages_give_code_only(own):
    own.write({'ns/sub/mod.py': 'from ns.other import thing', 'ns/other/thing.py': '',
               'ns/sub/data.txt': ''})
    closure = own.closure(['ns.sub.mod'])
    assert list(own.files(closure)) == ['ns/sub/mod.py', 'ns/other/thing.py']


def test_extension_modules_keep_their_names(own):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    own.write({'ex/__init__.py': 'from . import _fast', 'ex/_fast' + suffix: b'',
               'ex/_unused' + suffix: b'', 'ex/__init__.pyi': ''})
    closure = own.closure(['ex'])
    assert [(file.target, file.is_extension, file.is_package, file.source is None)
            for file in closure] == [
        ('ex/__init__.py', False, True, False), ('ex/_fast' + suffix, True, False, True)]
    assert list(own.files(closure)) == ['ex/__init__.py', 'ex/_fast' + suffix, 'ex/__init__.pyi']


def test_a_module_without_source_travels_as_it_is(own, tmp_path):
    import py_compile
    own.write({'compiled.py': 'X = 1'})
    py_compile.compile(str(tmp_path / 'compiled.py'), str(tmp_path / 'compiled.pyc'))
    (tmp_path / 'compiled.py').unlink()
    file, = own.closure(['compiled'])
    assert (file.target, file.source, file.is_extension) == ('compiled.pyc', None, False)


def test_a_file_that_cannot_be_parsed_is_sent(own):
    own.write({'bad.py': 'import x\ndef f(:'})
    file, = own.closure(['bad'])
    assert file.source.error.startswith('SyntaxError')


def test_the_parse_of_a_loaded_module_is_kept_until_it_is_loaded_again(own, tmp_path):
    own.write({'kept.py': 'X = 1', 'kept2.py': ''})
    module = importlib.import_module('kept')
    first = own.closure(['kept'])[0].source
    own.write({'kept.py': 'import kept2\nY = 1'})
    assert own.closure(['kept'])[0].source is first
    importlib.invalidate_caches()
    importlib.reload(module)
    assert list(own.closure(['kept'])[0].source.names) == ['kept2', 'Y']
    second = own.closure(['kept'])[0].source
    del sys.modules['kept']
    importlib.import_module('kept')
    assert own.closure(['kept'])[0].source is not second


def test_the_parse_of_a_module_that_is_not_loaded_is_that_of_its_file(own):
    own.write({'un.py': 'X = 1'})
    first = own.closure(['un'])[0].source
    assert own.closure(['un'])[0].source is first
    own.write({'un.py': 'import sys'})
    assert list(own.closure(['un'])[0].source.names) == ['sys']


# Files

def data_of(instance, name):
    return [target for target in instance.files(instance.closure([name]))
            if not target.endswith('.py')]


def test_data_files_of_packages(own, tmp_path):
    own.write({'dp/__init__.py': '', 'dp/a.txt': '', 'dp/tables/b.csv': '',
               'dp/tables/deep/c.csv': '', 'dp/.hidden': '', 'dp/.git/x': '',
               'dp/__pycache__/d.txt': '', 'dp/unused.py': '', 'dp/tables/script.py': '',
               'dp/e.pyc': '', 'dp/inner/__init__.py': '',
               'dp/inner/f.txt': '', 'dp/odd\\name': '', 'dp/\xe4.txt': ''})
    if hasattr(os, 'mkfifo'):
        os.mkfifo(str(tmp_path / 'dp' / 'fifo'))
    outside = tmp_path / 'outside'
    write(outside, {'g.txt': 'linked'})
    os.symlink(str(outside / 'g.txt'), str(tmp_path / 'dp' / 'g.txt'))
    os.symlink(str(outside), str(tmp_path / 'dp' / 'directory'))
    os.symlink(str(outside / 'nosuch'), str(tmp_path / 'dp' / 'dangling'))
    os.symlink('/dev/null', str(tmp_path / 'dp' / 'device'))
    assert data_of(own, 'dp') == ['dp/a.txt', 'dp/g.txt', 'dp/\xe4.txt', 'dp/tables/b.csv',
                                  'dp/tables/deep/c.csv']
    assert data_of(own, 'dp.inner') == ['dp/a.txt', 'dp/g.txt', 'dp/\xe4.txt', 'dp/tables/b.csv',
                                        'dp/tables/deep/c.csv', 'dp/inner/f.txt']


def test_files_beside_a_module_that_is_in_no_package_stay(own):
    own.write({'single1.py': '', 'beside.txt': ''})
    assert data_of(own, 'single1') == []


@pytest.mark.skipif('.so' not in importlib.machinery.EXTENSION_SUFFIXES,
                    reason='no such suffix here')
def test_shared_libraries_are_data_and_extension_modules_are_not(own):
    own.write({'sl/__init__.py': '', 'sl/libfoo.so': b'\x7fELF foo_init',
               'sl/_fast.so': b'\x7fELF PyInit__fast', 'sl/lib-foo.so': b'', 'sl/x.so.1': b''})
    assert data_of(own, 'sl') == ['sl/lib-foo.so', 'sl/libfoo.so', 'sl/x.so.1']


def test_data_beyond_the_limit_stays_and_that_is_said_once(own, tmp_path, caplog):
    own.write({'big/__init__.py': '', 'big/a': '', 'big/b': '', 'big/c': 'small',
               'big/inner/__init__.py': '', 'big/inner/d': ''})
    for name in ('big/a', 'big/b', 'big/inner/d'):
        with open(str(tmp_path / name), 'wb') as file:
            file.truncate(dispy.PACKAGE_DATA - 100)
    with caplog.at_level(logging.WARNING, 'dispy'):
        for _ in range(2):
            # The limit is one for each package.
            assert data_of(own, 'big.inner') == ['big/a', 'big/c', 'big/inner/d']
    text, = [record.getMessage() for record in caplog.records]
    assert text == (
        'package big has more data files than the 20 MB that travel with a package; not sent are '
        '1 of 3 files (20.0 MB), the first of them big/b: list those that jobs need in depends=')


def test_a_package_in_a_directory_of_very_many_files(own, caplog, monkeypatch):
    monkeypatch.setattr(dispy, 'PACKAGE_FILES', 3)
    own.write({'many/__init__.py': '', 'many/a': '', 'many/deep/b': '', 'many/deep/c': ''})
    assert data_of(own, 'many') == ['many/a']
    assert [record.levelname for record in caplog.records] == ['WARNING']


# Rows and changes

def row_of(target, content, mode):
    return target, len(content), hashlib.sha256(content).digest(), mode


def counted(monkeypatch):
    """Paths of the files that are read."""
    read = []
    for name in ('_read_at_once', 'file_digest'):
        real = getattr(dispy, name)
        monkeypatch.setattr(dispy, name, lambda path, *rest,
                            real=real: read.append(os.path.basename(path)) or real(path, *rest))
    return read


def test_rows(own, tmp_path):
    own.write({'rp/__init__.py': 'X = 1\n', 'rp/data': b'\0\1'})
    os.chmod(str(tmp_path / 'rp' / 'data'), 0o640)
    os.chmod(str(tmp_path / 'rp' / '__init__.py'), 0o755)
    assert own.rows(own.files(own.closure(['rp']))) == [row_of('rp/__init__.py', b'X = 1\n', 0o755),
                                                        row_of('rp/data', b'\0\1', 0o640)]


def test_nothing_is_read_twice(own, monkeypatch):
    own.write({'tw/__init__.py': 'from . import a', 'tw/a.py': '', 'tw/data': ''})
    read = counted(monkeypatch)
    first = own.rows(own.files(own.closure(['tw'])))
    assert sorted(read) == ['__init__.py', 'a.py', 'data']
    assert own.rows(own.files(own.closure(['tw']))) == first
    own.digests(own.closure(['tw']))
    assert len(read) == 3


def test_a_file_that_was_just_written_is_read_again(own, tmp_path):
    """Its next text may have the same size and, as file systems count, the same time."""
    own.write({'new.py': ''})
    path = tmp_path / 'new.py'
    path.write_text('X = 1')
    stamp = path.stat().st_mtime_ns
    closure = own.closure(['new'])
    assert own.rows(own.files(closure)) == [row_of('new.py', b'X = 1', path.stat().st_mode & 0o777)]
    before = own.digests(closure)
    path.write_text('X = 2')
    os.utime(str(path), ns=(stamp, stamp))
    if dispy._is_settled(dispy.FileStamp(stamp, 5)):
        pytest.skip('this machine was too slow')
    assert own.changed(closure, before) == closure
    assert own.rows(own.files(closure)) == [row_of('new.py', b'X = 2', path.stat().st_mode & 0o777)]


def test_changed_files(own, tmp_path):
    own.write({'ch.py': 'X = 1', 'ci.py': 'import ch'})
    closure = own.closure(['ch', 'ci'])
    before, rows = own.digests(closure), own.rows(own.files(closure))
    assert own.changed(closure, before) == []
    os.utime(str(tmp_path / 'ch.py'), (1000000009, 1000000009))
    assert own.changed(closure, before) == []   # the text is the same
    (tmp_path / 'ch.py').write_text('X = 2')
    assert [file.name for file in own.changed(closure, before)] == ['ch']
    assert [file.name for file in own.changed(closure, before)] == ['ch']
    again = own.rows(own.files(closure))
    assert [row[:1] for row in again if row not in rows] == [('ch.py',)]
    assert own.changed(closure, own.digests(closure)) == []
    (tmp_path / 'ch.py').unlink()
    assert own.changed(closure, before) == []
    with pytest.raises(OSError):
        own.rows(own.files(closure))


def test_a_file_that_is_written_while_it_is_read(own, tmp_path, monkeypatch):
    own.write({'wr/__init__.py': '', 'wr/data': b'before'})
    real = dispy.file_digest
    written = []

    def digest(path):
        found = real(path)
        if not written:
            written.append(path)
            write(tmp_path, {'wr/data': b'after that'})
        return found

    monkeypatch.setattr(dispy, 'file_digest', digest)
    files = {target: file for target,
             file in own.files(own.closure(['wr'])).items() if target == 'wr/data'}
    row, = own.rows(files)
    assert row[:3] == row_of('wr/data', b'after that', 0)[:3]


# Installed packages that own modules use

def test_packages_with_versions_and_chains(own):
    own.write({'pa/__init__.py': 'import json, nosuch, cloudpickle\nfrom . import pb',
               'pa/pb.py': 'try:\n import pytest\nexcept ImportError: pass',
               'pa/pc.py': 'from _pytest.fixtures import fixture\nimport pytest',
               'pd.py': 'import pa.pc'})
    assert own.packages(own.closure(['pa'])) == {
        'pytest': (pytest.__version__, False, ('pa', 'pa.pb', 'pytest'))}
    assert own.packages(own.closure(['pd', 'pa'])) == {
        '_pytest': (pytest.__version__, True, ('pd', 'pa.pc', '_pytest')),
        'pytest': (pytest.__version__, True, ('pd', 'pa.pc', 'pytest'))}


def test_versions_by_the_metadata_that_lists_a_package(own, tmp_path, monkeypatch):
    site = tmp_path / 'site-packages'
    write(site, {'klearn/__init__.py': '',
                 'kit_klearn-3.4.5.dist-info/RECORD': 'klearn/__init__.py,,\n',
                 'bare/__init__.py': '',
                 'told/__init__.py': '__version__ = "7.0"', 'gspace/part/__init__.py': '',
                 'gspace/mod.py': ''})
    own.write({'pu.py': 'import klearn, bare, told\nfrom gspace import part\nimport gspace.mod'})
    monkeypatch.syspath_prepend(str(site))
    importlib.import_module('told')
    found = own.packages(own.closure(['pu']))
    assert {name: row[0] for name,
            row in found.items()} == {'klearn': '3.4.5', 'bare': '', 'told': '7.0',
                                      'gspace.part': '', 'gspace.mod': ''}


@pytest.mark.long
def test_the_version_of_scikit_learn(own):
    sklearn = pytest.importorskip('sklearn')
    own.write({'sk.py': 'from sklearn.base import clone'})
    assert own.packages(own.closure(['sk']))['sklearn'][0] == sklearn.__version__


def test_modules_that_use_dispy(own):
    own.write({'ud.py': 'def f():\n from dispy import JobCluster',
               'un1.py': 'import json, cloudpickle'})
    assert own.uses_dispy(own.closure(['ud']))
    assert not own.uses_dispy(own.closure(['un1']))
