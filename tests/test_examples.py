"""Every example runs, and says what it should."""

import hashlib
import os
import subprocess
import sys

import pytest

from conftest import ROOT

EXPECTED = {
    'early_stop.py': ['cube root of 27 is about 3.000000', 'cancelled, cancelled, cancelled, cancelled'],
    'executor.py': ['primes: 1000003 1000033', '5 -> 120', '-1 -> factorial() not defined for negative values'],
    'files_back.py': ['THIS IS TEXT NUMBER 0', 'THIS IS TEXT NUMBER 2'],
    'monte_carlo.py': ['pi is 3.1'],
    'word_count.py': ['words', 'most of all'],
    'first_steps.py': ['job 1 on 127.0.0.1: 6', 'job 2 failed: ValueError: 7 is not liked here', "it printed 'looking at 28"],
    'setup_once.py': ['a ', 'o '],
    'run_program.py': ['exit status 0: 101 103 107 109 113'],
}


def run(name, *args):
    return subprocess.run([sys.executable, os.path.join(ROOT, 'examples', name), *args], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=120)


@pytest.mark.parametrize('name', sorted(EXPECTED))
def test_example(name):
    done = run(name)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    for text in EXPECTED[name]:
        assert text in done.stdout.decode()


def test_every_example_is_run_here():
    names = {name for name in os.listdir(os.path.join(ROOT, 'examples')) if name.endswith('.py')}
    assert names == set(EXPECTED) | {'checksum_tree.py'}


def test_checksum_tree(tmp_path):
    """The digests of a tree with odd names, and what cannot be read is told."""
    tree = tmp_path / 'tree'
    (tree / 'a' / 'b').mkdir(parents=True)
    expected = {}
    for n in range(700):
        path = tree / ('a' if n % 2 else 'a/b') / ('file %d \u00e4' % n)
        data = os.urandom(n * 13)
        path.write_bytes(data)
        expected[str(path.relative_to(tree))] = hashlib.sha256(data).hexdigest()
    out = tmp_path / 'sums'
    done = run('checksum_tree.py', str(tree), '--output', str(out))
    assert done.returncode == 0, done.stderr.decode()
    with open(str(out), errors='surrogateescape') as file:
        found = dict(reversed(line.rstrip('\n').split('  ', 1)) for line in file)
    assert found == expected
    assert '700 files' in done.stdout.decode() and '127.0.0.1' in done.stdout.decode()


def test_checksum_tree_of_nothing(tmp_path):
    done = run('checksum_tree.py', str(tmp_path / 'no such'))
    assert done.returncode == 2 and b'is not a directory' in done.stderr
