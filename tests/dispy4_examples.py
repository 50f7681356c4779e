"""Runs the examples of dispy 4.15.2 against this dispy.

    pip download --no-deps --no-binary :all: dispy==4.15.2 && tar xf dispy-4.15.2.tar.gz
    python tests/dispy4_examples.py dispy-4.15.2/py3/examples [NAME...]

Each runs unchanged in a network of its own (as root, on Linux), with a dispynode at the default
port. The interpreter needs this dispy installed, or in PYTHONPATH. What is typed at the examples
that ask for it is in STDIN. Prints a line an example, and its last lines if it failed.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
CPUS = {'bounded_submit.py': 40}   # it submits 1,000 jobs of 5 s, and never fewer than 50 at once
# What each must print, and what must not appear.
EXPECTED = {
    'bounded_submit.py': r'Jobs pending: 0',
    'delegate.py': r'func2 executed job|executed job .* at .* with',
    'httpd_example.py': r'executed job|127\.0\.0\.1|Jobs pending: 0',
    'job_scheduler.py': r'sha1sum for data000: [0-9a-f]{40}',
    'longrun.py': r'best estimate: 0\.\d+', 'node_setup.py': r'[0-9a-f]{32}',
    'node_shvars.py': r'\d',
    'node_update.py': r'finished with', 'obj_instances.py': r'C:|\d',
    'provisional_results.py': r'\d',
    'replace_inmem.py': r'job 13 finished by|job 12 finished by', 'sample.py': r'executed job',
}
WRONG = r'Traceback|failed:|failed with|Failed to|is waited for'
# It takes the number of a job for that of the next one, so that its callback raises at the last
# job, in dispy 4 too.
OWN_FAULTS = {'bounded_submit.py': r'Traceback(.|\n)*KeyError: 1000'}
# (seconds, text) typed, after which the input ends
STDIN = {'longrun.py': [(14, 'quit\n')], 'job_scheduler.py': [(16, 'quit\n')],
         'httpd_example.py': []}


def inside(example, work):
    """Run one with a node, in the namespaces that `outside` has made."""
    name = os.path.basename(example)
    env = dict(os.environ, HOME=work, DISPY_DISCOVERY='loopback',
               DISPY_SECRET='a secret of these examples', PYTHONUNBUFFERED='1')
    with open(os.path.join(work, 'node.log'), 'wb') as log:
        node = subprocess.Popen(
            [sys.executable, '-m', 'dispynode', '-i', '127.0.0.1', '-c', str(CPUS.get(name, 2)),
             '--daemon', '--dest-path-prefix', os.path.join(work, 'node')],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        program = subprocess.Popen([sys.executable, example], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, env=env, cwd=work)
        for seconds, text in STDIN.get(name, ()):
            time.sleep(seconds)
            program.stdin.write(text.encode())
            program.stdin.flush()
        out, _ = program.communicate(timeout=400)
    finally:
        node.terminate()
        node.wait(20)
    sys.stdout.write(out.decode(errors='replace'))
    return program.returncode


def outside(example):
    """(whether it ran as it should, seconds, output)"""
    work = tempfile.mkdtemp(prefix='dispy4-')
    with open(os.path.join(work, 'data000'), 'w') as file:
        file.write('data of job_scheduler.py')
    began = time.monotonic()
    try:
        done = subprocess.run(
            ['unshare', '-n', '-p', '-f', '--mount-proc', '--kill-child', 'sh', '-c',
             'ip link set lo up; exec "$@"', 'sh', sys.executable, os.path.abspath(__file__),
             '--inside', example, work],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=450)
        out = done.stdout.decode(errors='replace')
        name = os.path.basename(example)
        rest = re.sub(OWN_FAULTS[name], '', out) if name in OWN_FAULTS else out
        good = (done.returncode == 0 and re.search(EXPECTED[name], out)
                and not re.search(WRONG, rest))
        return bool(good), time.monotonic() - began, out
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main(argv):
    if argv[0] == '--inside':
        return inside(*argv[1:])
    directory, names = os.path.abspath(argv[0]), argv[1:] or sorted(EXPECTED)
    failed = 0
    for name in names:
        good, seconds, out = outside(os.path.join(directory, name))
        failed += not good
        print('%-24s %-6s %5.1f s' % (name, 'runs' if good else 'FAILS', seconds), flush=True)
        if not good:
            print('    ' + '\n    '.join(out.splitlines()[-25:]), flush=True)
    print('%d of %d run' % (len(names) - failed, len(names)))
    return failed


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
