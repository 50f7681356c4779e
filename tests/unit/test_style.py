"""How the code reads: flake8 by the project's own configuration, and the limits of
tests/house.py."""

import ast
import functools
import glob
import hashlib
import os
import sys

import pytest

import house

SOURCE = '''
class Long:
    """A docstring
    is not counted."""
    table = {'wide': 'WIDE'}

    def method(self, other):
        if other and other._private:
            for name in self._own:
                print([value for value in name])
        return 1 if other else 2 if self else 3
'''.replace('WIDE', 'x' * 100)


@functools.lru_cache(None)
def figures_of(name):
    return house.figures_of(os.path.join(house.ROOT, name))


def python_files():
    """Those that flake8 would find."""
    for path, directories, names in os.walk(house.ROOT):
        directories[:] = [name for name in directories
                          if not name.startswith('.') and name not in ('build', 'dist')]
        for name in names:
            if name.endswith('.py'):
                yield os.path.join(path, name)


def digests(paths, versions):
    """Path -> what the complaints about a file follow from."""
    with open(os.path.join(house.ROOT, 'setup.cfg'), 'rb') as file:
        start = hashlib.sha256(file.read() + repr(versions).encode())
    found = {}
    for path in paths:
        digest = start.copy()
        with open(path, 'rb') as file:
            digest.update(file.read())
        found[path] = digest.hexdigest()
    return found


@pytest.mark.long
def test_flake8_has_no_complaints(request, capsys, monkeypatch):
    """By the configuration in setup.cfg. Without --long, files are not looked at again that had
    none in an earlier run."""
    cli = pytest.importorskip('flake8.main.cli', reason='flake8 is not installed')
    import pycodestyle
    import pyflakes
    found = digests(python_files(), [sys.version_info[:3], pycodestyle.__version__,
                                     pyflakes.__version__])
    cache = getattr(request.config, 'cache', None)
    known = set()
    if cache is not None and not request.config.getoption('--long'):
        known.update(cache.get('dispy/flake8', []))
    paths = [path for path, digest in sorted(found.items()) if digest not in known]
    monkeypatch.chdir(house.ROOT)
    if paths:
        cli.main(['--jobs', '1', *paths])    # a unit test starts no process
    complaints = capsys.readouterr().out.splitlines()
    assert not complaints, '%d complaints:\n%s' % (len(complaints), '\n'.join(complaints[:20]))
    if cache is not None:
        cache.set('dispy/flake8', sorted(found.values()))


@pytest.mark.parametrize('name', house.MODULES)
def test_figures_of_a_module(name):
    figures = figures_of(name)
    found = house.complaints(name, figures)
    assert not found, '\n'.join([*found, house.shown(name, figures)])


def test_private_attributes_of_others():
    counts = {name: figures_of(name).foreign for name in house.MODULES}
    assert sum(counts.values()) <= house.FOREIGN, counts


def test_no_file_of_tests_imports_from_another():
    """What several of them need is beside their directories. A file may import itself, in a job."""
    paths = glob.glob(os.path.join(house.ROOT, 'tests', '*', 'test_*.py'))
    names = {os.path.basename(path)[:-len('.py')] for path in paths}
    for path in paths:
        with open(path, encoding='utf-8') as file:
            tree = ast.parse(file.read())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                    for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & names - {os.path.basename(path)[:-len('.py')]}, path
    assert len(names) > 80


# -- the figures themselves ------------------------------------------------------------------------

def test_what_is_counted():
    figures = house.Figures(SOURCE)
    assert figures.foreign == 1                   # other._private, not self._own
    assert figures.functions == [(6, 'method')]   # if, and, for, [...], and twice else
    assert figures.classes == [(8, 'Long')]
    assert figures.by_name['nested'] == 1 and figures.by_name['wide'] == 1
    # The four statements are `if` (a boolean operation of two), `for`, the call, and `return`.
    assert figures.by_name['mean'] == (6 + 4 + 8 + 8) / 4
    assert figures.by_name['large'] == 0


def test_a_limit_that_is_passed_is_told():
    assert house.complaints('m.py', house.Figures(SOURCE)) == [
        'm.py: nested is 1, and may be 0 at most', 'm.py: wide is 1, and may be 0 at most']
    assert house.complaints('m.py', house.Figures('class Short:\n    table = {}\n')) == []
