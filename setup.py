"""Installs dispy; setup.cfg says what. Here is what needs code: the types of the modules."""

import os
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = os.path.dirname(os.path.abspath(__file__))


class BuildWithTypes(build_py):
    """Copies MODULE.pyi to MODULE-stubs/__init__.pyi. Type checkers find the types of a module in
    the file beside it, but not if the module is installed and no package: then they look in a
    package of that name (PEP 561)."""

    def types(self):
        """Pairs: the file that is here, and what it is where the modules are built."""
        return [(os.path.join(ROOT, name + '.pyi'),
                 os.path.join(self.build_lib, name + '-stubs', '__init__.pyi'))
                for name in self.py_modules]

    def run(self):
        super().run()
        for source, target in self.types():
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), *(target for _, target in self.types())]

    def get_source_files(self):
        """For a source distribution."""
        files = [os.path.relpath(source, ROOT) for source, _ in self.types()]
        return [*super().get_source_files(), *files]


setup(cmdclass={'build_py': BuildWithTypes})
