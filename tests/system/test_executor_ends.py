"""The end of a program with an executor, which waits for calls as the standard library does."""

import os
import signal
import subprocess
import sys
import textwrap

from conftest import ROOT, eventually, lives


def run_program(text, **options):
    program = 'import sys; sys.path.insert(0, %r)\n%s' % (ROOT, textwrap.dedent(text))
    return subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


def test_the_end_of_the_program_waits_for_calls():
    """Of executors that are shut down, dropped, or neither. What calls print appears."""
    process = run_program("""
        import atexit, time
        @atexit.register
        def late():
            try:
                kept.submit(int)
            except RuntimeError as exc:
                print('late:', exc, flush=True)
        import dispy
        def say(word):
            time.sleep(0.5)
            print(word, flush=True)
        kept = dispy.DispyExecutor(nodes='local')
        kept.submit(say, 'kept')
        dispy.DispyExecutor(nodes='local').submit(say, 'dropped')
        shut = dispy.DispyExecutor(nodes='local')
        shut.submit(say, 'shut')
        shut.shutdown(wait=False)
        """)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err, err
    *words, late = out.decode().splitlines()
    assert sorted(words) == ['dropped', 'kept', 'shut'] and 'cannot schedule new futures' in late


def test_control_c_ends_the_wait_at_the_end(tmp_path):
    process = run_program("""
        import dispy, os, sys, time
        def work(path):
            open(path, 'w').write(str(os.getpid()))
            time.sleep(600)
        executor = dispy.DispyExecutor(nodes='local')
        executor.submit(work, sys.argv[1])
        """ .replace('sys.argv[1]', repr(str(tmp_path / 'pid'))), start_new_session=True)
    pid = int(eventually(lambda: (tmp_path / 'pid').exists() and (tmp_path / 'pid').read_text()))
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    eventually(lambda: not lives(pid))
