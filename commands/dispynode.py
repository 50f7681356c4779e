#!/usr/bin/env python3
"""The command of dispy 4 that ends in .py, which `pip install` puts beside the one without.

This file has the name of a module. Python looks for modules first in the directory of the script
that it runs, so that an import of this name by any command beside it finds this file: it then makes
way for the module that is installed. The files in this directory are equal.
"""
import gc
import importlib
import os
import sys

NAME = os.path.basename(__file__)[:-len('.py')]
HERE = os.path.realpath(os.path.dirname(os.path.abspath(__file__)))


def elsewhere():
    """The entries of sys.path but for this directory."""
    return [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != HERE]


if __name__ == '__main__':
    del __file__   # multiprocessing would run this file again in the processes that a node starts
    sys.path[:] = elsewhere()
    gc.disable()   # it would look through what is imported again and again, which stays
    main = importlib.import_module(NAME).main
    gc.freeze()
    gc.enable()
    sys.exit(main())
elif __name__ == NAME:
    before = list(sys.path)
    sys.path[:] = elsewhere()
    try:
        del sys.modules[NAME]
        importlib.import_module(NAME)   # the import that led here takes it from sys.modules
    finally:
        sys.path[:] = before
