"""How the code reads: flake8 by the project's own configuration, and the limits of
tests/house.py."""

import ast
import functools
import glob
import os

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


@pytest.mark.long
def test_flake8_has_no_complaints(capsys, monkeypatch):
    """By the configuration in setup.cfg."""
    cli = pytest.importorskip('flake8.main.cli', reason='flake8 is not installed')
    monkeypatch.chdir(house.ROOT)
    cli.main(['--jobs', '1'])    # a unit test starts no process
    found = capsys.readouterr().out.splitlines()
    assert not found, '%d complaints:\n%s' % (len(found), '\n'.join(found[:20]))


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
