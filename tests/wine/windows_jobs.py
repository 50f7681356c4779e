"""What jobs of test_windows.py do on a Windows node. It travels there as a file: it imports the
standard library alone."""

import ctypes
import logging
import os
import subprocess
import sys
import time


def double(n):
    return 2 * n


def setup():
    global made
    made = os.getpid()


def of_setup(n):
    return made == os.getpid(), os.name


def failing_setup():
    raise LookupError('nothing there')


def die(way):
    if way == 'raise':
        raise ValueError('as it was told')
    if way == 'exit':
        sys.exit(3)
    if way == '_exit':
        os._exit(7)
    if way == 'fault':
        ctypes.string_at(0)
    if way == 'killed':
        os.kill(os.getpid(), 9)
    if way == 'abort':
        os.abort()
    return way


def endless(how):
    if how == 'loop':
        while True:
            pass
    if how == 'interrupted':
        try:
            time.sleep(1000)
        except KeyboardInterrupt:
            return 'returned'
    time.sleep(1000)


def prints(n):
    print('from Python', n)
    print('to stderr', file=sys.stderr)
    subprocess.run([sys.executable, '-c', 'print("from a child")'], check=True)
    os.system('echo from the shell')
    logging.getLogger('job').warning('logged %d', n)
    return n


def prints_slowly(path):
    print('early', flush=True)
    until = time.monotonic() + 60
    while not os.path.exists(path) and time.monotonic() < until:
        time.sleep(0.05)
    print('late')


def tree(path):
    """A child and a grandchild, whose pids go to a file; then it waits to be killed."""
    text = ('import os, subprocess, sys, time; '
            'subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]); '
            'time.sleep(1000)')
    subprocess.Popen([sys.executable, '-c', text])
    import psutil
    until = time.monotonic() + 60
    pids = []
    while len(pids) < 2 and time.monotonic() < until:
        pids = [child.pid for child in psutil.Process().children(recursive=True)]
    with open(path + '.part', 'w') as file:
        file.write(' '.join(map(str, pids)))
    os.replace(path + '.part', path)
    time.sleep(1000)


def console():
    """The window of the console of this process, this process, its parent, and all that have the
    console."""
    kernel = ctypes.WinDLL('kernel32')
    room = (ctypes.c_uint32 * 64)()
    count = kernel.GetConsoleProcessList(room, len(room))
    return kernel.GetConsoleWindow(), os.getpid(), os.getppid(), list(room[:count])


def which_live(pids):
    import psutil
    return [pid for pid in pids if psutil.pid_exists(pid)]


def leaves_a_child():
    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])
    return os.getpid()


def pid():
    return os.getpid()


def files(name):
    with open(name, 'rb') as file:
        data = file.read()
    with open('back.bin', 'wb') as file:
        file.write(data[::-1])
    dispy_send_file('back.bin')  # noqa: F821
    return len(data), sorted(os.listdir('.'))


def own_file(name):
    with open(name) as file:
        return file.read(), os.path.exists('data.bin')


def changes():
    os.chdir(os.path.dirname(sys.executable))
    os.environ['LEFT_BY_A_JOB'] = '1'


def surroundings():
    in_own = os.getcwd() == os.path.realpath(dispy_job_path)   # noqa: F821
    return in_own, 'LEFT_BY_A_JOB' in os.environ


def takes(size):
    data = bytearray(size)
    time.sleep(1000 if size > 1 << 28 else 0)
    return len(data)


def provisional(n):
    dispy_provisional_result(n + 1)  # noqa: F821
    return n
