"""How the code reads: flake8 by the project's own configuration, and the limits of
tests/house.py."""

import ast
import glob
import os

import pytest

import house

SOURCE = '''
class Long:
    """A docstring
    is not counted."""
    table = {'a': 1, 'b': 2, 'c': 3, 'd': 4, 'e': 5, 'f': 6, 'g': 7, 'h': 8, 'i': 9, 'j': 10,
             'k': 11}

    def method(self, other):
        if other and other._private:
            for name in self._own:
                print([value for value in name])
        return 1 if other else 2 if self else 3
'''


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
    figures = house.figures_of(os.path.join(house.ROOT, name))
    found = house.complaints(name, figures)
    assert not found, '\n'.join([*found, house.shown(name, figures)])


def test_private_attributes_of_others():
    counts = {name: house.figures_of(os.path.join(house.ROOT, name)).foreign
              for name in house.MODULES}
    assert sum(counts.values()) <= max(house.FOREIGN, house.FOREIGN_YET), counts


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
    figures = house.Figures(SOURCE)
    table = {'m.py': {'mean': 6.5, 'nested': 1, 'wide': 1}}
    assert house.complaints('m.py', figures, table) == [
        'm.py: mean is 6.5 and keeps its limit now: take it out of NOT_YET']
    told = house.complaints('m.py', figures, {})
    assert told == ['m.py: nested is 1, and may be 0 at most',
                    'm.py: wide is 1, and may be 0 at most']
    assert figures.not_yet() == {'nested': 1, 'wide': 1}
    # In the table stands what may not become more; less is allowed.
    lower = {'m.py': {'nested': 0.5, 'wide': 2}}
    assert house.complaints('m.py', figures, lower) == ['m.py: nested is 1, and may be 0.5 at most']
