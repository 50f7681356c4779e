"""The node that is a part of the program: it runs in the driver's loop, and disturbs nothing that
the program does."""

import ctypes
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

import dispy
import dispynode
from conftest import ROOT, eventually
from dispynode import FilePiece, Jobs, LinkBroken, MemoryLink, Output, Query, Results, TooLarge

pytestmark = pytest.mark.skipif(not dispy.IN_PROGRAM, reason='it is a process of its own here')

# A program with a job that runs; its line says where the node's directory is, and which processes
# there are
PROGRAM = '''
    import os, signal, sys, time
    import psutil
    import dispy

    def hold(path):
        import os, time
        with open(path, 'w') as file:
            file.write(dispy_job_path)
        time.sleep(1000)

    def begin(path, **options):
        cluster = dispy.JobCluster(hold, nodes='local', **options)
        job = cluster.submit(path)
        while not os.path.exists(path) or not os.path.getsize(path):
            time.sleep(0.01)
        return cluster, job
'''


def run(code, *args, **options):
    """Exit code, stdout and stderr of a program."""
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(PROGRAM) + textwrap.dedent(code),
                           *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=120, cwd=ROOT, **options)
    return done.returncode, done.stdout, done.stderr


class Started:
    """A program that goes on until it is killed."""

    def __init__(self, code, *args):
        self.process = subprocess.Popen([sys.executable, '-c', textwrap.dedent(PROGRAM)
                                         + textwrap.dedent(code), *map(str, args)],
                                        stdout=subprocess.PIPE, universal_newlines=True, cwd=ROOT)
        self.line = self.process.stdout.readline().strip()
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def are_gone(processes):
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE
                   for process in processes)


def runners_of(pid):
    return [child for child in psutil.Process(pid).children()
            if 'runner_start' in ' '.join(child.cmdline())]


def local_of(cluster):
    """The node of this program."""
    return dispy.core_of(cluster).driver.connector.local


def root_of(cluster):
    """The directory of the node of this program."""
    return local_of(cluster)._host.directory.root


def where():
    """What a job finds around its process."""
    import os
    import signal
    with open('/proc/self/status') as file:
        masks = {name: int(mask, 16)
                 for name, mask in re.findall(r'^(Sig(?:Blk|Ign)):\s*(\w+)', file.read(), re.M)}
    return (os.getppid(), os.getsid(os.getppid()), masks,
            signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL)


# -- in the program --------------------------------------------------------------------------------

def test_there_is_nothing_between_the_program_and_its_runners():
    """No process, no port; two clusters share the node."""
    with dispy.JobCluster(os.getppid,
                          nodes='local') as one, dispy.JobCluster(os.getppid, nodes='local') as two:
        parents = {one.submit()(), two.submit()()}
        assert parents == {child.pid for child in runners_of(os.getpid())} and len(parents) == 2
        assert local_of(one) is local_of(two) is not None
        assert not [connection for connection in psutil.Process().net_connections()
                    if connection.status == psutil.CONN_LISTEN]
        root = root_of(one)
        one.close()
        assert two.submit()() in parents and os.path.isdir(root)
    assert not os.path.exists(root)
    assert not runners_of(os.getpid())


def test_the_program_keeps_its_signals_and_limits():
    code, out, err = run('''
        import resource
        def state():
            return ([signal.getsignal(number) for number in sorted(signal.valid_signals())],
                    signal.pthread_sigmask(signal.SIG_BLOCK, ()),
                    [resource.getrlimit(getattr(resource, name))
                     for name in dir(resource) if name.startswith('RLIMIT_')], os.getcwd(),
                    dict(os.environ), sys.path[:], sys.argv[:])
        before = state()
        with dispy.JobCluster(abs, nodes='local') as cluster:
            assert cluster.submit(-1)() == 1
            assert state() == before
        assert state() == before
        print('same')
    ''')
    assert (code, out) == (0, 'same\n'), err


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='/proc tells')
def test_a_runner_inherits_nothing():
    """A session of its own, no blocked or ignored signals, no descriptors, whatever the program
    has."""
    def described(pid):
        return {os.readlink('/proc/%d/fd/%s' % (pid, number))
                for number in os.listdir('/proc/%d/fd' % pid)}
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM))
    ends = os.pipe()
    for end in ends:
        os.set_inheritable(end, True)
    try:
        with dispy.JobCluster(where, nodes='local') as cluster:
            runner, session, masks, is_default = cluster.submit()()
            assert session == runner != os.getsid(0)
            assert (not masks['SigBlk'] and not masks['SigIgn'] & 1 << signal.SIGCHLD - 1
                    and is_default)
            assert not described(runner) & {os.readlink('/proc/self/fd/%d' % end) for end in ends}
            job = cluster.submit_job_id('again')
            assert job()[0] == runner and job.status == dispy.DispyJob.Finished
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGCHLD, before)
        for end in ends:
            os.close(end)


def test_no_fork_of_the_program_falls_into_the_start_of_a_runner():
    """Forks and starts have the same lock, which is what keeps them apart."""
    code, out, err = run('''
        import threading, dispynode
        held = []
        starts = dispynode.subprocess.Popen
        class Popen(starts):
            def __init__(self, *args, **options):
                held.append(dispynode.process_start_lock.locked())
                super().__init__(*args, **options)
        dispynode.subprocess.Popen = Popen
        with dispy.JobCluster(abs, nodes='local') as cluster:
            assert cluster.submit(-1)() == 1
        assert held and all(held), held
        dispynode.process_start_lock.acquire()
        forked = threading.Event()
        def fork():
            pid = os.fork()
            if not pid:
                os._exit(0)
            os.waitpid(pid, 0)
            forked.set()
        thread = threading.Thread(target=fork)
        thread.start()
        assert not forked.wait(0.2)
        dispynode.process_start_lock.release()
        thread.join()
        print(forked.is_set())
    ''')
    assert (code, out) == (0, 'True\n'), err


def test_a_program_whose_children_somebody_else_waits_for():
    """`os.wait` in a thread takes the end of a runner away, and SIGCHLD may be ignored."""
    for how in ('import threading\n' 'def take():\n' '    while True:\n' '        try:\n'
                '            os.wait()\n' '        except ChildProcessError:\n'
                '            time.sleep(0.001)\n'
                'threading.Thread(target=take, daemon=True).start()\n',
                'signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n'):
        code, out, err = run(how + textwrap.dedent('''
            def work(n):
                if n < 0:
                    os._exit(1)
                return os.getppid()
            with dispy.JobCluster(work, nodes='local', loglevel=50) as cluster:
                runner = cluster.submit(1)()
                dead = cluster.submit(-1)
                dead.wait()
                assert dead.status == dead.Terminated or dead.status == dead.Abandoned, dead.status
                assert cluster.submit(1)() == runner
                os.kill(runner, signal.SIGKILL)
                again = cluster.submit(1)
                while again() in (None, runner):     # it may have been sent to the old one
                    again = cluster.submit(1)
                root = dispy.core_of(cluster).driver.connector.local._host.directory.root
            print(os.path.exists(root))
        '''))
        assert (code, out) == (0, 'False\n'), err


def test_without_descriptors_that_can_be_passed_the_node_is_a_process(monkeypatch):
    """As it is where there is no fork."""
    monkeypatch.setattr(dispy, 'IN_PROGRAM', False)
    with dispy.JobCluster(os.getppid, nodes='local') as cluster:
        runner = psutil.Process(cluster.submit()())
        assert '--embedded' in runner.parent().cmdline() and runner.parent().ppid() == os.getpid()


# -- the end ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('clusters', [1, 2])
def test_kill_9_of_the_program_leaves_nothing(tmp_path, clusters):
    program = Started('''
        kept = [begin(path) for path in sys.argv[1:]]
        print(os.getpid(), flush=True)
        time.sleep(1000)
    ''', *[tmp_path / str(number) for number in range(clusters)])
    roots = {os.path.dirname((tmp_path / str(number)).read_text()) for number in range(clusters)}
    assert len(roots) == 1 and len(program.family) >= 2 * clusters
    program.kill()
    eventually(lambda: are_gone(program.family), what='end of runners and workers')
    eventually(lambda: not any(map(os.path.exists, roots)), what='removal of the directory')


def test_kill_9_of_the_program_during_setup(tmp_path):
    program = Started('''
        def setup(path):
            hold(path)
        cluster = dispy.JobCluster(abs, nodes='local', setup=lambda: hold(sys.argv[1]),
                                   depends=[hold])
        while not os.path.exists(sys.argv[1]) or not os.path.getsize(sys.argv[1]):
            time.sleep(0.01)
        print(os.getpid(), flush=True)
        time.sleep(1000)
    ''', tmp_path / 'began')
    root = os.path.dirname((tmp_path / 'began').read_text())
    assert program.family and os.path.isdir(root)
    program.kill()
    eventually(lambda: are_gone(program.family), what='end of the runner')
    eventually(lambda: not os.path.exists(root), what='removal of the directory')


def test_what_program_and_runner_could_not_remove_the_next_start_removes(tmp_path):
    program = Started('''
        kept = begin(sys.argv[1])
        print(os.getpid(), flush=True)
        time.sleep(1000)
    ''', tmp_path / 'began')
    root = os.path.dirname((tmp_path / 'began').read_text())
    for process in program.family:
        process.suspend()
    program.process.kill()
    for process in program.family:
        process.kill()
    program.kill()
    eventually(lambda: are_gone(program.family))
    assert os.path.isdir(root)
    with dispy.JobCluster(abs, nodes='local') as cluster:
        assert cluster.submit(-1)() == 1
        own = root_of(cluster)
        eventually(lambda: not os.path.exists(root), what='removal by the next program')
        assert os.path.isdir(own)


def test_a_forked_child_does_not_keep_the_runner_alive(tmp_path):
    """It lives on when the program is killed, and jobs of its own are its own."""
    program = Started('''
        kept = begin(sys.argv[1])
        child = os.fork()
        if not child:
            cluster = dispy.JobCluster(os.getppid, nodes='local')
            assert cluster.submit()()
            os.write(1, b'%d\\n' % os.getpid())
            time.sleep(1000)
        time.sleep(1000)
    ''', tmp_path / 'began')
    child = psutil.Process(int(program.line))
    try:
        own = child.children(recursive=True)
        family = [process for process in program.family if process not in own and process != child]
        root = os.path.dirname((tmp_path / 'began').read_text())
        program.kill()
        eventually(lambda: are_gone(family), what='end of the runner of the program')
        eventually(lambda: not os.path.exists(root))
        assert child.is_running() and not are_gone(own)
    finally:
        child.kill()
    eventually(lambda: are_gone(own))


def test_the_end_of_the_interpreter_waits_for_nothing(tmp_path):
    """Neither for a job, nor for one that cannot be interrupted."""
    code, out, err = run('''
        def stubborn(path):
            import os, time
            open(path, 'w').close()
            while True:
                try:
                    time.sleep(1000)
                except BaseException:
                    continue
        cluster = dispy.JobCluster(stubborn, nodes='local')
        jobs = [cluster.submit(sys.argv[1] + str(n)) for n in range(3)]
        while not os.path.exists(sys.argv[1] + '0'):
            time.sleep(0.01)
        print(dispy.core_of(cluster).driver.connector.local._host.directory.root, flush=True)
    ''', tmp_path / 'began')
    assert code == 0 and '3 jobs that have not ended' in err
    eventually(lambda: not os.path.exists(out.strip()))


def forty_two(*args):
    return 42


def test_recovery_after_kill_9(tmp_path):
    """Results that were told are kept; what ran is abandoned at once; what was sent and had not
    begun waits again. The notes of what had begun are gone with the recover_file."""
    path = str(tmp_path / 'jobs')
    program = Started('''
        def work(n, flag):
            if n:
                open(flag, 'w').close()
                time.sleep(1000)
            return 7
        cluster = dispy.JobCluster(work, nodes='local', recover_file=sys.argv[1])
        assert cluster.submit(0, '')() == 7
        job = cluster.submit(1, sys.argv[2])
        while not os.path.exists(sys.argv[2]) or job.status != job.Running:
            time.sleep(0.01)
        others = dispy.core_of(cluster).driver.schedule.nodes['local'].cpus - 1
        runs = [cluster.submit(1, os.devnull, dispy_cpus=others)] if others else []
        # At once: while a new worker starts, the first job comes to look like a long one, behind
        # which no job is sent
        behind = cluster.submit(0, '')
        while behind.state is not dispy.JobState.SENT:
            time.sleep(0.01)
        while not all(job.status == job.Running for job in runs):
            time.sleep(0.01)
        print(os.getpid(), flush=True)
        time.sleep(1000)
    ''', path, tmp_path / 'began')
    program.kill()
    first, *ran, behind = dispy.recover_jobs(path, timeout=20)
    assert (first.status, first.result) == (dispy.DispyJob.Finished, 7)
    assert ran and all(job.status == dispy.DispyJob.Abandoned for job in ran)
    assert behind.status == dispy.DispyJob.Created
    with dispy.JobCluster(forty_two, nodes='local', recover_file=path) as cluster:
        cluster.wait()
        assert [job.result for job in cluster.recovered] == [42]
    assert [name for name in os.listdir(tmp_path) if name.startswith('jobs')] == []
    eventually(lambda: are_gone(program.family))


# -- a program that is busy ------------------------------------------------------------------------

def overdue(path):
    import time
    open(path, 'w').close()
    try:
        while True:
            time.sleep(0.01)
    finally:
        open(path + '.ended', 'w').close()


def grow(path):
    import time
    open(path, 'w').close()
    kept = []
    while True:
        kept.append(bytearray(1 << 20))
        time.sleep(0.001)


def held_until(condition):
    """Hold the GIL until a command of the shell succeeds, 20 s at most: neither node nor driver
    have a turn meanwhile."""
    return ctypes.PyDLL(None).system(b'for n in $(seq 400); do if %s; then exit '
                                     b'0; fi; sleep 0.05; done; exit 1' % condition.encode()) == 0


def test_limits_hold_while_the_program_holds_the_gil(tmp_path):
    """The runner sees to them. The job behind another has its limits, too."""
    path = str(tmp_path / 'overdue')
    with dispy.JobCluster(overdue, nodes='local') as cluster:
        job = cluster.submit(path, dispy_timeout=0.5)
        assert eventually(lambda: os.path.exists(path)) and held_until('[ -e %s.ended ]' % path)
        assert (job.wait(20) and job.status == dispy.DispyJob.Terminated
                and 'dispy_timeout' in job.exception)
    path = str(tmp_path / 'grow')
    with dispy.JobCluster(grow, nodes='local') as cluster:
        job = cluster.submit(path, dispy_memory=150 << 20)
        assert eventually(lambda: os.path.exists(path))
        runner, = runners_of(os.getpid())
        worker, = [child for child in runner.children()
                   if 'resource_tracker' not in ' '.join(child.cmdline())]
        assert held_until('! kill -0 %d 2>/dev/null' % worker.pid)
        assert (job.wait(20) and job.status == dispy.DispyJob.Terminated
                and 'dispy_memory' in job.exception)


# -- the link --------------------------------------------------------------------------------------

def test_messages_wait_until_they_are_taken():
    node, client = MemoryLink.pair(b'n' * 16, b'c' * 16, 1.0)
    assert (node.instance, client.instance) == (b'c' * 16, b'n' * 16)
    node.is_attached = client.is_attached = True
    value = bytearray(1 << 20)
    client.send(Jobs('c', [(1, pickle.PickleBuffer(value), None), (2, b'small', {'cpus': 2})]))
    client.send(Query('c'))
    assert node.has_messages and not client.has_messages and client.queued > 1 << 20
    jobs, query = node.messages(2.0)
    assert query == Query('c') and not client.queued and not node.has_messages
    assert [(row[0], len(row[1]), row[2]) for row in jobs.rows] == [(1, 1 << 20, None),
                                                                    (2, 5, {'cpus': 2})]
    value[0] = 7
    assert jobs.rows[0][1][0] == 7, 'it is the same buffer'
    node.send(Results('c', [(1, 1, 0.0, 1.0, (b'a', pickle.PickleBuffer(value)), b'out', b'err')]))
    node.send(Output('c', 1, 1, 0, pickle.PickleBuffer(b'text')))
    node.send(FilePiece('c', 1, 1, ('name', 4, b'', 0), 0, pickle.PickleBuffer(b'data')))
    results, output, piece = client.messages(3.0)
    assert (results.rows[0][4][1][0] == 7 and bytes(output.data) == b'text'
            and bytes(piece.data) == b'data')


def test_the_limits_of_size_are_those_of_other_links(monkeypatch):
    node, client = MemoryLink.pair(b'n' * 16, b'c' * 16, 1.0)
    with pytest.raises(TooLarge):
        node.send(Output('c', 1, 1, 0, bytes(3 * dispynode.FILE_PIECE)))
    monkeypatch.setattr(dispynode, 'VALUE_MOST', 1 << 20)
    with pytest.raises(TooLarge):
        client.send(Jobs('c', [(1, bytes(1 + (1 << 20)), None)]))
    assert not client.queued and not node.queued


def test_what_was_sent_before_the_end_arrives():
    node, client = MemoryLink.pair(b'n' * 16, b'c' * 16, 1.0)
    node.is_attached = client.is_attached = True
    client.send(Query('c'))
    client.close()
    assert node.messages(2.0) == [Query('c')] and node.has_messages
    with pytest.raises(LinkBroken):
        node.messages(3.0)


def test_a_fault_of_the_node_costs_its_jobs_and_not_the_program(monkeypatch, tmp_path):
    """The link breaks, as that to a dispynode would, and the node is made anew."""
    with dispy.JobCluster(os.getpid, nodes='local', loglevel=50, reentrant=True) as cluster:
        assert cluster.submit()()
        local = local_of(cluster)
        real = dispynode.NodeHost.take

        def fail(self, link, message):
            if type(message) is Jobs and self is local._host:
                raise AssertionError('a fault')
            return real(self, link, message)
        monkeypatch.setattr(dispynode.NodeHost, 'take', fail)
        assert cluster.submit()()
        assert local_of(cluster) is not local and not os.path.exists(local._host.directory.root)


def test_the_node_has_a_turn_when_there_is_something_to_do(monkeypatch):
    """Again if one has failed; and when a pipe that was held back may be read, without an event."""
    with dispy.JobCluster(abs, nodes='local', loglevel=50) as cluster:
        assert cluster.submit(-1)() == 1
        host, driver = local_of(cluster)._host, dispy.core_of(cluster).driver
        real, end_of_turn, turns, tried = dispynode.NodeHost._flush, driver.end_of_turn, [], []

        def fail(self):
            tried.append(len(turns))
            if len(tried) == 1:
                raise AssertionError('a fault')
            real(self)

        def count():
            turns.append(1)
            end_of_turn()
        with monkeypatch.context() as patched:
            patched.setattr(driver, 'end_of_turn', count)
            patched.setattr(dispynode.NodeHost, '_flush', fail)
            assert cluster.submit(-2)() == 2 and tried[1] - tried[0] <= 1

        def is_due():
            host.next_timer()
            return host.is_due
        assert eventually(lambda: not driver.ask(is_due))
        with monkeypatch.context() as patched:
            patched.setattr(dispynode.HeldPipes, 'may_let_go', lambda self: True)
            patched.setattr(dispynode.HeldPipes, 'let_go', lambda self: None)
            assert driver.ask(is_due)


def test_directories_of_a_node_that_lives_stay(tmp_path):
    assert not dispynode.is_abandoned(str(tmp_path))
    with dispy.JobCluster(abs, nodes='local') as cluster:
        assert cluster.submit(-1)() == 1
        root = root_of(cluster)
        dispynode.remove_abandoned_directory(root)
        dispy.remove_abandoned_directories()
        assert os.path.isdir(root) and cluster.submit(-2)() == 2
