"""What dispynode.py does not have: the program that `dispy deploy` sends beside it, and messages
that no node knows."""

import ast
import builtins
import subprocess
import sys
import types

import dispy
import dispynode
from conftest import ROOT


def names_used(code):
    """Global names that a piece of code, and what is defined in it, uses."""
    found = set(code.co_names)
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            found |= names_used(part)
    return found


def global_names(code):
    """Those of them that are looked up in the module."""
    import dis
    found = {step.argval for step in dis.get_instructions(code)
             if step.opname in ('LOAD_GLOBAL', 'LOAD_NAME')}
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            found |= global_names(part)
    return found


def test_the_program_of_a_host_is_whole():
    """Every name that it uses comes from itself, from Python or from dispynode; dispy is not
    there."""
    source = dispy.program_of_host()
    space = {'__name__': 'program'}
    exec(compile(source, 'program', 'exec'), space)
    used = global_names(compile(source, 'program', 'exec'))
    assert 'deployment' in space and 'StartError' in used
    of_classes = {'__module__', '__qualname__'} | set(vars(space['Deployment']))
    assert used - set(space) - set(vars(builtins)) <= of_classes
    assert 'dispy' not in names_used(compile(source, 'program', 'exec'))


def test_nothing_is_parsed_for_the_program_of_a_host(monkeypatch):
    """For the source of a class, inspect parses the whole file before Python 3.13, which takes most
    of a second."""
    def parse(*_):
        raise AssertionError('a file is parsed')
    monkeypatch.setattr(ast, 'parse', parse)
    assert 'class Deployment:' in dispy.program_of_host()


def test_a_node_alone_does_not_know_what_only_schedulers_say():
    program = 'import dispynode as d; print(sorted(d.MESSAGES), hasattr(d, "Deployment"))'
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, stdout=subprocess.PIPE,
                          check=True, universal_newlines=True)
    alone = [op for op in sorted(dispynode.MESSAGES) if op not in dispy.SCHEDULER_MESSAGES]
    assert done.stdout.split('\n')[0] == '%s False' % alone
    assert dispy.SCHEDULER_MESSAGES.keys() == {48, 49} and dispynode.OPS[dispy.JobsAssigned] == 48
