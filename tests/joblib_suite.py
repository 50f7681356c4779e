"""Runs joblib's own tests of Parallel with the backend 'dispy' in the place of joblib's own one.

    python tests/joblib_suite.py [options of pytest]

The text of the installed joblib/test/test_parallel.py is changed in a copy below a temporary
directory: 'loky' becomes 'dispy', also as the expected class, and of two generators of one backend
the second need not fail, as with backends that do not share one pool. The tests that have the
backend as a parameter are run. Those that differ:

test_nested_parallel_warnings[dispy-multiprocessing-True]
    A job may use multiprocessing: workers are no daemonic processes.
test_error_capture[dispy]
    It looks at the backend's attribute _workers.
test_nested_backend_in_sequential[...-dispy-None] (2)
    The default of n_jobs is -1, as with other backends for clusters.
test_auto_memmap_on_arrays_from_generator[dispy]
    It expects an instance of numpy.memmap; ours is an array on a mapping.
test_memmapping_leaks[dispy]                                the same
"""

import os
import re
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HEAD = 'import dispy\n'
# Each program that the tests start finds the backend without asking for it; daemons and workers
# need not import it.
SITE = '''
import sys
if any(word.endswith('.py') or 'joblib' in word for word in getattr(sys, 'orig_argv', ())):
    import dispy
'''


def adapted(text):
    """The text of the tests for our backend."""
    text = text.replace('"loky"', '"dispy"').replace("'loky'", "'dispy'")
    before, name, after = text.partition('def test_multiple_generator_call_separated_gc')
    row = '("dispy", True)'
    place = before.rindex(row)
    text = before[:place] + '("dispy", False)' + before[place + len(row):] + name + after
    return HEAD + re.sub(r'\bis LokyBackend\b', 'is BACKENDS["dispy"]', text)


def main():
    """Exit status of pytest."""
    import joblib
    path = os.path.join(os.path.dirname(joblib.__file__), 'test', 'test_parallel.py')
    with open(path, encoding='utf-8') as file:
        text = adapted(file.read())
    with tempfile.TemporaryDirectory() as directory:
        for name, content in (('test_parallel_dispy.py', text), ('sitecustomize.py', SITE)):
            with open(os.path.join(directory, name), 'w', encoding='utf-8') as file:
                file.write(content)
        environment = dict(os.environ, DISPY_DISCOVERY='off',
                           PYTHONPATH=os.pathsep.join((directory, ROOT)))
        return subprocess.call([sys.executable, '-m', 'pytest', '-q', '-W', 'ignore', '-p',
                                'no:cacheprovider', '--tb=line',
                                '-k', 'dispy- or -dispy or dispy]', 'test_parallel_dispy.py',
                                *sys.argv[1:]], cwd=directory, env=environment)


if __name__ == '__main__':
    sys.exit(main())
