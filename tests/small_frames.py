"""Daemons in which frames are small, so that values of a few MiB travel in parts."""

import os
import textwrap

from conftest import ROOT

MIB = 1 << 20
FRAME = 3 * MIB       # what a frame of jobs or of results may have here
LAZY = MIB // 2
STAND_IN = '''
import importlib, importlib.machinery, os, sys
if __name__ == '__main__':
    del __file__
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    sys.exit(importlib.import_module(%(name)r).main())
# The loader keeps what it has compiled.
exec(importlib.machinery.SourceFileLoader(%(name)r, %(path)r).get_code(%(name)r))
%(changes)s
'''
SMALL_FRAMES = '''
MESSAGES[4], MESSAGES[37] = (Jobs, %d), (Results, %d)
LAZY = %d
''' % (FRAME, FRAME, LAZY)


def stand_in(directory, changes=''):
    """A dispynode.py and a dispyscheduler.py with small frames, and other changes of the first."""
    os.makedirs(str(directory), exist_ok=True)
    for name, text in (('dispynode', SMALL_FRAMES + textwrap.dedent(changes)),
                       ('dispyscheduler', 'LAZY = %d\n' % LAZY)):
        with open(os.path.join(str(directory), name + '.py'), 'w') as file:
            file.write(STAND_IN
                       % {'name': name, 'path': os.path.join(ROOT, name + '.py'), 'changes': text})
    return os.path.join(str(directory), 'dispynode.py')
