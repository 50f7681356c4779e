"""Programs with a cluster, to be killed, stopped and interrupted."""

import os
import re
import subprocess
import sys
import textwrap

from conftest import ROOT

HEAD = '''
import os, signal, sys, time
sys.path[:0] = {paths!r}
import dispy
from ledger import Ledger, enter

path, port, host, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]


def compute(path, number, seconds=0.0):
    enter(path, number)
    time.sleep(seconds)
    return number


def cluster(**options):
    options.setdefault('loglevel', 30)   # its output is read
    return dispy.JobCluster(compute, depends=[enter], nodes=[(host, port)], **options)


'''
PATHS = [ROOT, os.path.join(ROOT, 'tests'), os.path.join(ROOT, 'tests', 'faults')]


class Client:
    """A program with a cluster on a node; `code` has `cluster(**options)`, `compute`, `path` of a
    ledger, and `directory`. Made when it has printed its first line. `options` are those of its
    Python."""

    def __init__(self, code, path, node, wait=True, options=()):
        self.directory = os.path.dirname(path)
        self.process = subprocess.Popen(
            [sys.executable, *options, '-c', HEAD.format(paths=PATHS) + textwrap.dedent(code), path,
             str(node.port), node.host, self.directory], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        self.first = self._first_line() if wait else ''

    def _first_line(self):
        """The first that the program prints; what it logs before, as that a node is still busy, is
        passed over."""
        line = self.process.stdout.readline()
        while re.match(r'[-0-9]+ [:0-9]+ dispy - ', line):
            line = self.process.stdout.readline()
        return line

    def rest(self, timeout=60):
        """What it prints until it ends by itself."""
        out, _ = self.process.communicate(timeout=timeout)
        assert self.process.returncode == 0, self.first + out
        return out

    def kill(self):
        self.process.kill()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class There:
    """A node or, with a node behind it, a scheduler; as `Client` wants to be told of one."""

    def __init__(self, address):
        self.host, self.port = address


MAKE = '''
def make(kind, **options):
    if kind == 'JobCluster':
        return cluster(**options)
    return dispy.SharedJobCluster(compute, depends=[enter], scheduler_host=host,
                                  scheduler_port=port, **options)


'''


def program(kind, code):
    """Source of a program that uses make(...)."""
    return MAKE + 'KIND = %r\n' % kind + code
