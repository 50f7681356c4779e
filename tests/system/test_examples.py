"""Every example runs, and says what it should."""

import collections
import glob
import hashlib
import math
import os
import re
import struct
import subprocess
import sys
import zlib

import pytest

from conftest import ROOT, on_a_terminal
from nodes import NodeProcess, SchedulerProcess

EXPECTED = {
    # what must stand in the output
    'classes.py': ['earth: Ball(5.09 m, -9.81 m/s) after 1.0 s, a Ball',
                   'moon: Ball(19.19 m, -1.62 m/s)'],
    'devices.py': ['model 0 on device ', 'model 5 on device ', 'model 6 on device 0,1\n',
                   "the node offers {'gpu': 2}\n"],
    'early_stop.py': ['cube root of 27 is about 3.000000',
                      'cancelled, cancelled, cancelled, cancelled'],
    'executor.py': ['primes: 1000003 1000033', '5 -> 120',
                    '-1 -> factorial() not defined for negative values'],
    'files_back.py': ['THIS IS TEXT NUMBER %d' % n for n in range(3)],
    'first_steps.py': ['job 1 on 127.0.0.1: 6', 'job 2 failed: ValueError: 7 is not liked here',
                       "it printed 'looking at 28"],
    'job_depends.py': ['square: 14.000', 'circle: 10.996', 'without them: FileNotFoundError'],
    'live_output.py': ['job of %d steps, running, stdout: step 0\n' % n for n in (3, 4)]
    + ['stdout: step 3\n'] + ['WARNING job of %d steps: my.model: no convergence after %d steps\n'
                              % (n, n) for n in (3, 4)],
    'mandelbrot.py': ['360 x 240 points, 25.2 % in the set'],
    'priorities.py': ['submitted: any low low normal normal urgent urgent\n',
                      'ran:       any urgent urgent normal normal low low\n'],
    'program_files.py': ['first 3 -> 0 1 2\n', 'first 5 -> 0 1 2 3 4\n'],
    'progress.py': ['most divisors: 72, of 100100\n'],
    'run_program.py': ['exit status 0: 101 103 107 109 113\n',
                       'exit status 0: 181 191 193 197 199\n'],
    'shared_value.py': ['1000 primes, found by '],
    'with_joblib.py': ['[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]\n'],
}


def run(name, *args, without=None, cwd=None):
    """The example as a user runs it, or as if one module were not installed."""
    path = os.path.join(ROOT, 'examples', name)
    code = ('import runpy, sys; sys.modules[%r] = None; sys.argv.pop(0); '
            'runpy.run_path(sys.argv[0], run_name="__main__")' % without)
    return subprocess.run([sys.executable, *(['-c', code] if without else []), path,
                           *map(str, args)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=120, cwd=cwd)


def output_of(done):
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.parametrize('name', sorted(EXPECTED))
def test_example(name, tmp_path):
    if name == 'shared_value.py' and os.environ.get('DISPY_START_METHOD') == 'spawn':
        pytest.skip('workers are not forked: they share a Value of setup')
    if name == 'with_joblib.py':
        pytest.importorskip('joblib')
    out = output_of(run(name, cwd=str(tmp_path)))
    for text in EXPECTED[name]:
        assert text in out


def test_every_example_is_run_here():
    names = {name for name in os.listdir(os.path.join(ROOT, 'examples')) if name.endswith('.py')}
    assert names == set(EXPECTED) | {'checksum_tree.py', 'monitor.py', 'monte_carlo.py',
                                     'setup_once.py', 'shared_nodes.py', 'word_count.py'}


def test_the_first_line_of_every_example_says_what_it_shows():
    for path in glob.glob(os.path.join(ROOT, 'examples', '*.py')):
        with open(path, encoding='utf-8') as file:
            assert file.readline() == '#!/usr/bin/env python3\n' and re.match('"""[^"]{40,}',
                                                                              file.readline()), path


def test_monte_carlo():
    estimate, error = re.match(r'pi is ([\d.]+) give or take ([\d.]+)',
                               output_of(run('monte_carlo.py'))).groups()
    assert abs(float(estimate) - math.pi) < 5 * float(error) and float(error) <= 0.002


def test_setup_once():
    with open(os.path.join(ROOT, 'LICENSE'), encoding='utf-8') as file:
        letters = collections.Counter(word[0].lower()
                                      for word in file.read().split() if word[0].isalpha())
    assert (output_of(run('setup_once.py'))
            == ', '.join('%s %d' % item for item in letters.most_common(5)) + '\n')


def test_word_count(tmp_path):
    (tmp_path / 'one.txt').write_text('A rose is a rose')
    (tmp_path / 'two.txt').write_text('is\na rose.')
    assert output_of(run('word_count.py', tmp_path / 'one.txt', tmp_path / 'two.txt')) == (
        '2 files, 8 words, 3 different; most of all: a 3, rose 3, is 2\n')


def test_mandelbrot_draws_without_matplotlib(tmp_path):
    """A grey PNG: black within the set, light far from it, the same upside down."""
    path = tmp_path / 'set.png'
    assert str(path) in output_of(run('mandelbrot.py', path, without='matplotlib'))
    data, chunks, at = path.read_bytes(), {}, 8
    while at < len(data):
        size, kind = struct.unpack_from('>I4s', data, at)
        chunks[kind] = data[at + 8:at + 8 + size]
        assert struct.unpack_from('>I', data, at + 8 + size)[0] == zlib.crc32(kind + chunks[kind])
        at += size + 12
    assert data[:8] == b'\x89PNG\r\n\x1a\n' and list(chunks) == [b'IHDR', b'IDAT', b'IEND']
    width, height, depth, colour = struct.unpack_from('>IIBB', chunks[b'IHDR'])
    pixels = zlib.decompress(chunks[b'IDAT'])
    rows = [pixels[at + 1:at + 1 + width] for at in range(0, len(pixels), width + 1)]
    assert (width, height, depth, colour, len(rows)) == (360, 240, 8, 0, 240)
    assert rows[120][252] == 0 and rows[0][0] > 220 and rows == rows[::-1]


def test_monitor(tmp_path):
    done = run('monitor.py', 60, cwd=str(tmp_path))
    assert done.returncode == 0 and re.match(
        r'60 jobs, \d+ of them failed: (ArithmeticError: it fell below 0.1|none)\n',
        done.stdout.decode())
    assert re.fullmatch(r'dispy monitor: http://127\.0\.0\.1:\d+/#token=[\w-]{32}\s*',
                        done.stderr.decode())


def test_shared_nodes(tmp_path):
    with NodeProcess(tmp_path / 'node') as node, \
            SchedulerProcess(tmp_path / 'scheduler', '-n', '127.0.0.1:%d' % node.port) as scheduler:
        found = re.match(r'few: \[0, 1, 4, 9\]\nafter [\d.]+ s, while (\d+) jobs',
                         output_of(run('shared_nodes.py', '127.0.0.1:%d' % scheduler.port)))
    assert int(found.group(1)) > 100


def test_joblib_is_not_needed():
    assert 'joblib is not installed' in output_of(run('with_joblib.py', without='joblib'))


def test_progress_on_a_terminal():
    code, text = on_a_terminal(sys.executable, os.path.join(ROOT, 'examples', 'progress.py'))
    assert code == 0 and re.search(br'200(/| of )200', text) and re.search(br'400(/| of )400',
                                                                           text), text


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
