"""Programs without a recover_file that end before their jobs: what runs on nodes goes on, is found,
collected or ended."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time

import pytest

import dispy
from clients import PATHS
from conftest import ROOT, eventually
from dispy import DispyError, DispyJob
from nodes import NodeProcess, SchedulerProcess

# What every program here does: four jobs, which run until a file is there, or are cancelled.
PROGRAM = '''
import os, signal, sys, time
sys.path[:0] = {paths!r}
import dispy

port, directory = int(sys.argv[1]), sys.argv[2]
KIND = dispy.SharedJobCluster if 'shared' in sys.argv else dispy.JobCluster
WHERE = dict(scheduler_port=port) if 'shared' in sys.argv else dict(nodes=[('127.0.0.1', port)])


def hold(directory, name):
    import os, time
    open(os.path.join(directory, 'begun-%s' % name), 'w').close()
    while not os.path.exists(os.path.join(directory, 'end')):
        time.sleep(0.01)
    open(os.path.join(directory, 'ended-%s' % name), 'w').close()
    return 'result of %s' % name


def start(count=4, running=4, name='', **options):
    cluster = KIND(hold, **dict(WHERE, **options))
    jobs = [cluster.submit(directory, '%d-%s%d' % (os.getpid(), name, number))
            for number in range(count)]
    mine = 'begun-%d-%s' % (os.getpid(), name)
    while sum(job.status == dispy.DispyJob.Running for job in jobs) < running \
            or sum(name.startswith(mine) for name in os.listdir(directory)) < running:
        time.sleep(0.01)
    return cluster, jobs

'''
# Not one long sleep: Python does not hear a signal that comes just before the system call
WAITS = "cluster, jobs = start()\nprint('ready', flush=True)\nwhile True:\n    time.sleep(0.1)\n"
RAISES = "cluster, jobs = start()\nraise ValueError('a mistake')\n"
RECOVERS = '''
try:
    for job in dispy.recover_jobs(timeout=30):
        print(job.id, job.status_text(), job.result)
except dispy.DispyError as exc:
    print('DispyError:', exc)
'''


class Place:
    """A directory for programs, the files that their jobs make, and the state directory, which has
    nothing of other tests."""

    def __init__(self, path, monkeypatch):
        self.path, self.state = path, path / 'state'
        monkeypatch.setenv('XDG_STATE_HOME', str(self.state))

    def write(self, code, name='program.py'):
        (self.path / name).write_text(PROGRAM.format(paths=PATHS) + textwrap.dedent(code))
        return str(self.path / name)

    def start(self, node, code, *words, name='program.py', options=(), **more):
        """A program, which runs."""
        return subprocess.Popen([sys.executable, *options, self.write(code, name), str(node.port),
                                 str(self.path), *words], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, universal_newlines=True, cwd=ROOT, **more)

    def run(self, node, code, *words, **more):
        """A program that ends by itself: (exit status, stdout, stderr)."""
        process = self.start(node, code, *words, **more)
        out, err = process.communicate(timeout=90)
        return process.returncode, out, err

    def killed(self, node, code=WAITS, *words, name='program.py'):
        """A program that is killed when it has said so: its number."""
        process = self.start(node, code, *words, name=name)
        with process.stdout, process.stderr:
            assert process.stdout.readline() == 'ready\n', process.stderr.read()
            process.kill()
            process.wait()
        return process.pid

    def end(self):
        (self.path / 'end').touch()

    def names(self, beginning):
        return sorted(path.name for path in self.path.iterdir() if path.name.startswith(beginning))

    def files(self):
        return sorted((self.state / 'dispy').glob('*')) if (self.state / 'dispy').is_dir() else []


@pytest.fixture
def place(tmp_path, monkeypatch):
    place = Place(tmp_path, monkeypatch)
    yield place
    place.end()


@pytest.fixture
def node(tmp_path):
    with NodeProcess(tmp_path / 'n', cpus=4) as node:
        yield node


def is_free(node):
    with dispy.JobCluster(abs, nodes=[node.address], recover_file=False) as cluster:
        return cluster.submit(-1)(20) == 1


def command(*words):
    return subprocess.run([sys.executable, '-m', 'dispy', *words], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, cwd=ROOT, timeout=90)


FOUR = [(number, DispyJob.Finished) for number in range(1, 5)]


def collected(jobs):
    assert all(job.result.startswith('result of ') for job in jobs)
    return [(job.id, job.status) for job in jobs]


# -- how a program ends ----------------------------------------------------------------------------

def test_after_a_kill_four_of_four_go_on_and_are_collected_once(place, node):
    place.killed(node)
    file, = place.files()
    assert (stat.S_IMODE(file.stat().st_mode) == 0o600
            and stat.S_IMODE(file.parent.stat().st_mode) == 0o700)
    assert file.stat().st_size < 1000 and os.environ['DISPY_SECRET'] not in file.read_text()
    place.end()
    eventually(lambda: len(place.names('ended')) == 4)
    status, out, err = place.run(node, RECOVERS)
    lines = out.splitlines()
    assert status == 0 and [line.split()[:2] for line in lines] == [[str(n), 'finished']
                                                                    for n in range(1, 5)], out + err
    assert (sorted(line.split('of ')[1] for line in lines)
            == sorted(name[len('begun-'):] for name in place.names('begun')))
    assert place.files() == []
    assert 'has left no jobs' in place.run(node, RECOVERS)[1] and len(place.names('begun')) == 4
    assert is_free(node)


def test_after_an_exception_outside_with_four_of_four_go_on_and_are_collected(place, node):
    """The last line says so."""
    status, out, err = place.run(node, RAISES)
    assert status == 1 and 'ValueError: a mistake' in err
    last = err.splitlines()[-1]
    assert ('4 jobs run on to their end on 1 node;' in last and 'dispy.recover_jobs()' in last
            and 'python -m dispy --cancel-lost' in last)
    assert place.names('ended') == []
    place.end()
    status, out, err = place.run(node, RECOVERS)
    assert [line.split()[:2] for line in out.splitlines()] == [[str(n), 'finished']
                                                               for n in range(1, 5)], out + err
    assert len(place.names('ended')) == 4 and place.files() == []


def test_jobs_that_had_not_begun_are_lost_and_counted(place, node):
    """A node holds some beyond what it runs only when they are short."""
    _, _, err = place.run(node, "cluster, jobs = start(30, 4)\nraise ValueError('a mistake')\n")
    found = re.search(
        r'(\d+) jobs run on to their end on 1 node; (\d+) others had not begun and are lost',
        err.splitlines()[-1])
    assert found and int(found.group(1)) + int(found.group(2)) == 30, err
    place.end()
    _, out, _ = place.run(node, RECOVERS)
    assert len(out.splitlines()) == int(found.group(1)) == len(place.names('begun'))


ON_THEIR_WAY = '''
import signal, subprocess
node = int(sys.argv[3])
cluster, jobs = start(30, 4)
driver = dispy.core_of(cluster).driver


def counts():
    load, = driver.schedule.nodes.values()
    return sum(map(len, load.recalled.values())), sum(map(len, load.in_flight.values()))


os.kill(node, signal.SIGSTOP)
subprocess.Popen([sys.executable, '-c', 'import os, signal, time; time.sleep(0.7); '
                  'os.kill(%d, signal.SIGCONT)' % node], stdout=subprocess.DEVNULL,
                 stderr=subprocess.DEVNULL)
while driver.ask(counts)[0] == 0 and driver.ask(counts)[1] > 4:
    time.sleep(0.01)
raise ValueError('a mistake')
'''


@pytest.mark.skipif(not hasattr(signal, 'SIGSTOP'), reason='no process can be stopped there')
def test_jobs_that_are_on_their_way_back_are_not_counted_as_running(place, node):
    """The node, which is stopped meanwhile, has not yet given back what was called back."""
    _, _, err = place.run(node, ON_THEIR_WAY, str(node.process.pid))
    assert ('4 jobs run on to their end on 1 node; 26 others had not begun and are lost'
            in err.splitlines()[-1]), err
    place.end()
    _, out, _ = place.run(node, RECOVERS)
    assert len(out.splitlines()) == 4 == len(place.names('begun'))


INSIDE = '''
cluster, jobs = start()
with cluster:
    raise ValueError('a mistake')
'''
CAUGHT = '''
cluster, jobs = start()
try:
    raise ValueError('a mistake')
except ValueError:
    pass
'''


@pytest.mark.parametrize('code, status', [
    (INSIDE, 1), (CAUGHT, 0), ('cluster, jobs = start()\nsys.exit(3)\n', 3),
    ('cluster, jobs = start()\n', 0),
    ("cluster, jobs = start()\nsys.exit('a text')\n", 1),
    ('cluster, jobs = start()\nraise KeyboardInterrupt\n', None),
    ('import builtins\nbuiltins.__IPYTHON__ = True\n' + RAISES, 1)],
                         ids=['inside with', 'caught', 'sys.exit', 'the end',
                              'sys.exit with a text', 'KeyboardInterrupt', 'in a notebook'])
def test_other_ends_cancel_and_leave_no_file(place, node, code, status):
    found, _, err = place.run(node, code)
    assert found == status or status is None and found, err
    assert 'run on' not in err and place.files() == []
    assert is_free(node)
    place.end()
    time.sleep(0.1)
    assert place.names('ended') == [] and len(place.names('begun')) == 4


@pytest.mark.skipif(os.name == 'nt', reason='no SIGINT to one process there')
def test_control_c_cancels(place, node):
    process = place.start(node, WAITS)
    with process.stdout, process.stderr:
        assert process.stdout.readline() == 'ready\n'
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
        process.wait(20)
    assert ('KeyboardInterrupt' in err and 'run on' not in err and place.files() == []
            and is_free(node))


PROMPT = '''
cluster, jobs = start()
1 / 0

print('later', flush=True)
'''


def at_a_prompt(place, node, options, code=PROMPT, name=None):
    """Lines typed at a prompt, after a script if `name` is given."""
    file = [place.write('', name)] if name else ['-']
    process = subprocess.Popen([sys.executable, *options, *file, str(node.port), str(place.path)],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, universal_newlines=True, cwd=ROOT)
    out, err = process.communicate(code if name else PROGRAM.format(paths=PATHS) + code, timeout=60)
    return out, err


@pytest.mark.parametrize('name', (None, 'typed.py'))
def test_at_a_prompt_an_older_error_decides_nothing(place, node, name):
    out, err = at_a_prompt(place, node, ['-i'], name=name)
    assert 'ZeroDivisionError' in err and 'later' in out, err
    assert 'run on' not in err and 'are cancelled' in err and place.files() == []
    assert is_free(node)


def test_a_script_that_failed_before_its_prompt_came(place, node):
    """`python -i program.py`: the exception is older than the end."""
    process = place.start(node, RAISES, options=['-i'], stdin=subprocess.PIPE)
    _, err = process.communicate("print('at the prompt')\n", timeout=60)
    assert 'ValueError' in err and 'run on' not in err and place.files() == [] and is_free(node)


def test_under_pytest_an_older_error_decides_nothing(place, node):
    code = '''
    def test_it():
        import test_state
        test_state.made = start()
        assert False
    '''
    place.write('made = None', 'test_state.py')
    file = place.write(code, 'test_inner.py').replace('\\', '/')
    text = open(file).read().replace("int(sys.argv[1]), sys.argv[2]",
                                     "%d, %r" % (node.port, str(place.path)))
    open(file, 'w').write(text)
    open(os.path.join(str(place.path), 'test_state.py'), 'w').write('made = None')
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider',
                           '--rootdir', str(place.path), file],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True,
                          cwd=str(place.path), timeout=90)
    assert '1 failed' in done.stdout and 'run on' not in done.stdout, done.stdout
    assert len(place.names('begun')) == 4 and place.files() == [] and is_free(node)


def test_a_module_that_is_run_by_its_name_and_fails(place, node):
    place.write(RAISES, 'module.py')
    done = subprocess.run([sys.executable, '-m', 'module', str(node.port), str(place.path)],
                          stderr=subprocess.PIPE,
                          universal_newlines=True, cwd=str(place.path), timeout=60)
    assert '4 jobs run on' in done.stderr.splitlines()[-1], done.stderr
    place.end()
    row, = dispy.recoverable()
    assert row.script == os.path.realpath(str(place.path / 'module.py')) and row.jobs == 4
    assert collected(dispy.recover_jobs(row, 30)) == FOUR


# -- whose jobs they are ---------------------------------------------------------------------------

def test_another_script_is_told_what_there_is_and_may_name_it(place, node):
    pid = place.killed(node)
    row, = dispy.recoverable()
    assert (row.pid, row.name, row.jobs, row.unreached) == (pid, 'hold', 4, ())
    assert (row.nodes == ('127.0.0.1:%d' % node.port,)
            and row.script == os.path.realpath(str(place.path / 'program.py')))
    _, out, err = place.run(node, RECOVERS, name='other.py')
    assert (out.startswith('DispyError: recover_jobs: ') and 'other.py has left no jobs' in out
            and row.path in out), out + err
    out, err = at_a_prompt(place, node, ['-i'], RECOVERS + '\n')
    assert 'DispyError' in out and 'no script' in out and row.path in out, err
    with pytest.raises(FileNotFoundError, match='each of which may be given'):
        dispy.recover_jobs()
    place.end()
    assert collected(dispy.recover_jobs(row.path, 30)) == FOUR and dispy.recoverable() == []


def test_two_programs_of_one_script_one_after_the_other(place, tmp_path):
    """The newest comes first, then the older one."""
    with NodeProcess(tmp_path / 'a',
                     cpus=4) as first, NodeProcess(tmp_path / 'b', cpus=4) as second:
        older, newer = place.killed(first), place.killed(second)
        assert [row.pid for row in dispy.recoverable()] == [newer, older]
        place.end()
        for pid in (newer, older):
            _, out, err = place.run(first, RECOVERS)
            assert len(out.splitlines()) == 4 and out.count('result of %d-' % pid) == 4, out + err
        assert place.files() == []


def test_both_clusters_of_one_program(place, tmp_path):
    code = '''
    first = start(2, 2)
    second = start(2, 2, name='second')
    print('ready', flush=True)
    time.sleep(600)
    '''
    with NodeProcess(tmp_path / 'a', cpus=4) as node:
        place.killed(node, code)
        assert len(place.files()) == 2
        place.end()
        _, out, err = place.run(node, RECOVERS)
        assert len(out.splitlines()) == 4 and out.count('finished') == 4, out + err
        assert place.files() == []


def test_a_living_program_beside_a_dead_one(place, tmp_path):
    """Nobody takes or ends what belongs to the one that lives."""
    with NodeProcess(tmp_path / 'a',
                     cpus=4) as first, NodeProcess(tmp_path / 'b', cpus=4) as second:
        lives = place.start(second, "cluster, jobs = start()\nprint('ready', flush=True)\n"
                            "cluster.wait()\nprint([job() for job in jobs])\n")
        with lives.stdout, lives.stderr:
            assert lives.stdout.readline() == 'ready\n'
            dead = place.killed(first)
            assert len(place.files()) == 2
            row, = dispy.recoverable()
            assert row.pid == dead
            other, = [path for path in place.files() if str(path) != row.path]
            with pytest.raises(DispyError, match='its program is still running'):
                dispy.recover_jobs(str(other))
            done = command('--cancel-lost')
            assert (done.returncode == 0 and 'PID %d' % dead in done.stdout
                    and str(lives.pid) not in done.stdout), done.stdout
            assert is_free(first) and place.files() == [other]
            place.end()
            assert lives.stdout.readline().count('result of') == 4
            lives.wait(20)
        assert place.files() == []


def test_a_program_on_another_host_with_the_same_home_is_known_by_its_nodes(place, node):
    """No lock is seen, and its process cannot be: its nodes know that it is connected."""
    lives = place.start(node, "cluster, jobs = start()\nprint('ready', flush=True)\n"
                        "cluster.wait()\nprint([job() for job in jobs])\n")
    with lives.stdout, lives.stderr:
        assert lives.stdout.readline() == 'ready\n'
        file, = place.files()
        head, *lines = file.read_text().split('\n')
        head = dict(json.loads(head), process=['elsewhere', 5, '7'], host='elsewhere')
        copy = file.with_name('copy.recover')   # as its host shows it here
        copy.write_text('\n'.join([json.dumps(head), *lines]))
        copy.chmod(0o600)
        assert dispy.recoverable() == []
        assert dispy.recover_jobs(str(copy), 10) == []
        done = command('--cancel-lost')
        assert done.returncode == 0, done.stdout
        assert 'left alone, as its program is still running' in done.stdout
        assert copy.exists()
        place.end()
        assert lives.stdout.readline().count('result of') == 4
        lives.wait(20)
    # When it is over, nothing is left there
    assert dispy.recoverable() == [] and place.files() == []


def test_a_fork_that_lives_on_does_not_pass_for_the_program(place, node):
    code = '''
    cluster, jobs = start()
    if not os.fork():
        os.close(1), os.close(2)
        time.sleep(30)
        os._exit(0)
    print('ready', flush=True)
    time.sleep(600)
    '''
    if not hasattr(os, 'fork'):
        pytest.skip('no fork here')
    process = place.start(node, code, options=['-W', 'ignore'], start_new_session=True)
    try:
        with process.stdout, process.stderr:
            assert process.stdout.readline() == 'ready\n'
            process.kill()
            process.wait()
        place.end()
        row, = dispy.recoverable()
        assert row.pid == process.pid and collected(dispy.recover_jobs(row, 30)) == FOUR
    finally:
        os.killpg(process.pid, signal.SIGKILL)


# -- ending and collecting -------------------------------------------------------------------------

def test_cancel_lost_ends_what_runs(place, node):
    pid = place.killed(node)
    done = command('--cancel-lost')
    assert (done.returncode == 0 and 'PID %d' % pid in done.stdout
            and '4 jobs and results were found, and all of them are removed' in done.stdout)
    assert place.files() == [] and is_free(node)
    place.end()
    time.sleep(0.1)
    assert place.names('ended') == []
    assert 'none of your programs' in command('--cancel-lost').stdout


def test_what_runs_is_told_as_running_and_collected_later_each_result_once(place, node):
    place.killed(node)
    row, = dispy.recoverable()
    assert [job.status for job in dispy.recover_jobs(row, 0.5)] == [DispyJob.Running] * 4
    assert place.files() == [place.state / 'dispy' / os.path.basename(row.path)]
    place.end()
    assert collected(dispy.recover_jobs(row, 30)) == FOUR and place.files() == []


def test_results_that_were_collected_do_not_come_again(place, node):
    code = '''
    def some(directory, name):
        import os, time
        open(os.path.join(directory, 'begun-%s' % name), 'w').close()
        while not os.path.exists(os.path.join(directory, 'end' if name else 'end-0')):
            time.sleep(0.01)
        return 'result of %s' % name
    cluster = KIND(some, **WHERE)
    jobs = [cluster.submit(directory, number) for number in range(4)]
    while sum(job.status == dispy.DispyJob.Running for job in jobs) < 4:
        time.sleep(0.01)
    print('ready', flush=True)
    time.sleep(600)
    '''
    place.killed(node, code)
    row, = dispy.recoverable()
    (place.path / 'end-0').touch()
    first = dispy.recover_jobs(row, 2)
    assert ([(job.id, job.status) for job in first]
            == [(1, DispyJob.Finished)] + [(n, DispyJob.Running) for n in (2, 3, 4)])
    place.end()
    assert ([(job.id, job.result) for job in dispy.recover_jobs(row, 30)]
            == [(n, 'result of %d' % (n - 1)) for n in (2, 3, 4)])
    assert place.files() == [] and is_free(node)


def test_terminate_pending_cancels(place, node):
    place.killed(node)
    row, = dispy.recoverable()
    assert ({job.status for job in dispy.recover_jobs(row, 30, terminate_pending=True)}
            == {DispyJob.Cancelled})
    assert place.files() == [] and is_free(node)


def test_a_node_that_is_away_keeps_its_file(place, tmp_path, monkeypatch):
    monkeypatch.setattr(dispy, 'REACH_TIME', 1.0)
    with NodeProcess(tmp_path / 'a', cpus=4) as node:
        place.killed(node)
        place.end()
        eventually(lambda: len(place.names('ended')) == 4)
    row, = dispy.recoverable(1)
    assert row.jobs is None and row.unreached == row.nodes
    assert dispy.recover_jobs(row, 30) == [] and len(place.files()) == 1
    with NodeProcess(tmp_path / 'a', cpus=4, port=node.port):
        assert collected(dispy.recover_jobs(row, 30)) == FOUR and place.files() == []


def test_a_node_that_was_killed_has_nothing_more(place, tmp_path):
    with NodeProcess(tmp_path / 'a', cpus=4) as node:
        place.killed(node)
        node.kill()
        with NodeProcess(tmp_path / 'a', cpus=4, port=node.port):
            assert dispy.recoverable() == [] and place.files() == []


def test_a_later_run_is_told_by_name_and_time_who_holds_its_nodes(place, node, caplog):
    place.killed(node)
    with dispy.JobCluster(abs, nodes=[node.address]) as cluster:
        job = cluster.submit(-1)
        text = eventually(lambda: next((node.reason for node in cluster.status().all_nodes
                                        if 'connection is lost' in node.reason), ''))
        assert (str(place.path / 'program.py') in text and '(hold)' in text
                and '--cancel-lost' in text)
        assert re.search(r'began \d{4}-\d\d-\d\d \d\d:\d\d:\d\d', text)
        assert command('--cancel-lost').returncode == 0
        assert job(30) == 1


# -- files -----------------------------------------------------------------------------------------

def test_no_file_where_none_is_wanted_and_none_for_the_embedded_node(place, node):
    for options in ({'nodes': 'local'}, {'nodes': [node.address], 'recover_file': False}):
        with dispy.JobCluster(abs, **options) as cluster:
            assert cluster.submit(-1)(30) == 1
            assert place.files() == []
    with dispy.JobCluster(abs, nodes=[node.address]) as cluster:
        assert cluster.submit(-1)(30) == 1
        size = place.files()[0].stat().st_size
        assert size < 1000
        assert list(cluster.map(range(-1000, 0))) == list(range(1000, 0, -1))
        assert place.files()[0].stat().st_size == size   # nothing a job
    assert place.files() == []


@pytest.mark.parametrize('how', ('no directory', 'others', 'full'))
def test_where_none_can_be_written_the_cluster_works_without(place, node, how, caplog, monkeypatch,
                                                             request):
    if how == 'no directory':
        place.state.write_text('a file')
    elif how == 'others':
        (place.state / 'dispy').mkdir(parents=True)
        (place.state / 'dispy').chmod(0o777)
    else:
        disk = request.getfixturevalue('small_disk')
        monkeypatch.setenv('XDG_STATE_HOME', disk)
        (type(place.path)(disk) / 'dispy').mkdir(mode=0o700)
        with open(os.path.join(disk, 'filled'), 'wb', 0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
    with dispy.JobCluster(abs, nodes=[node.address]) as cluster:
        assert cluster.submit(-1)(30) == 1
        assert dispy.core_of(cluster).trail.path == ''
    records = [record
               for record in caplog.records if 'could not be collected' in record.getMessage()]
    assert len(records) == 1 and records[0].levelname == 'INFO'


def test_without_a_file_an_error_cancels_as_before(place, node):
    _, _, err = place.run(node, RAISES.replace('start()', 'start(recover_file=False)'))
    assert 'run on' not in err and 'are cancelled' in err and is_free(node)


def test_files_older_than_a_month_are_removed(place, node):
    place.killed(node)
    file, = place.files()
    torn = file.with_name('torn' + dispy.TRAIL_END)
    torn.write_text('{"dispy": 1')
    torn.chmod(0o600)
    for path, kept in ((file, True), (torn, True)):
        long_ago = time.time() - 29 * 86400
        os.utime(str(path), (long_ago, long_ago))
    assert [row.path for row in dispy.recoverable()] == [str(file)] and torn.exists()
    for path in (file, torn):
        long_ago = time.time() - 31 * 86400
        os.utime(str(path), (long_ago, long_ago))
    with NodeProcess(place.path / 'other') as other:   # by any program that makes such a file
        place.run(other, 'cluster, jobs = start(1, 1)\nopen(directory + "/end", "w").close()\n'
                  'cluster.wait()\ntime.sleep(0.5)\ncluster.close()\n')
    assert place.files() == []


@pytest.mark.parametrize('damage', ('others', 'link', 'nonsense', 'key'))
def test_files_that_are_not_ours_are_left_alone(place, node, damage):
    place.killed(node)
    file, = place.files()
    if damage == 'others':
        file.chmod(0o666)
    elif damage == 'link':
        file.rename(place.path / 'moved')
        file.symlink_to(place.path / 'moved')
    elif damage == 'nonsense':
        file.write_bytes(os.urandom(1000))
    else:
        file.write_text(file.read_text().replace('"key": "', '"key": "zz'))
    assert dispy.recoverable() == [] and len(place.files()) == 1
    assert 'none of your programs' in command('--cancel-lost').stdout
    with pytest.raises((DispyError, OSError)):
        dispy.recover_jobs(str(file), 0.1)


def test_a_file_with_another_key_gets_nothing(place, node):
    place.killed(node)
    file, = place.files()
    text = file.read_text()
    file.write_text(re.sub('"key": "[0-9a-f]{8}', '"key": "00000000', text))
    place.end()
    eventually(lambda: len(place.names('ended')) == 4)
    assert dispy.recover_jobs(str(file), 5) == []
    file.write_text(text)
    file.chmod(0o600)
    assert collected(dispy.recover_jobs(str(file), 30)) == FOUR


# -- through a scheduler ---------------------------------------------------------------------------

@pytest.fixture
def scheduler(tmp_path, node):
    with SchedulerProcess(tmp_path / 's', '-n', '127.0.0.1:%d' % node.port) as scheduler:
        yield scheduler


@pytest.mark.parametrize('ends', ('killed', 'error'))
def test_through_a_scheduler_what_runs_goes_on_and_what_waits_is_cancelled(place, scheduler, ends):
    if ends == 'killed':
        place.killed(scheduler,
                     "cluster, jobs = start(10, 4)\nprint('ready', flush=True)\ntime.sleep(600)\n",
                     'shared')
        eventually(lambda: '6 jobs that have not begun are cancelled' in scheduler.log())
    else:
        _, _, err = place.run(
            scheduler, "cluster, jobs = start(10, 4)\nraise ValueError('a mistake')\n", 'shared')
        assert ('4 jobs run on to their end on 1 node; 6 others had not begun and are lost'
                in err.splitlines()[-1]), err
    row, = dispy.recoverable()
    assert row.nodes == ('@127.0.0.1:%d' % scheduler.port,)
    assert row.jobs == 10 if ends == 'killed' else 4 <= row.jobs <= 10
    place.end()
    eventually(lambda: len(place.names('ended')) == 4)
    # By then its nodes are let go; results stay, though its process is known to have ended
    time.sleep(4)
    jobs = dispy.recover_jobs(row, 30)
    assert [job.status for job in jobs].count(DispyJob.Finished) == 4
    cancelled = [job for job in jobs if job.status == DispyJob.Cancelled]
    assert len(cancelled) == (6 if ends == 'killed' else len(jobs) - 4)
    assert all('--gone-after' in job.exception for job in cancelled if ends == 'killed')
    assert len(place.names('begun')) == 4 and place.files() == []


def test_cancel_lost_through_a_scheduler(place, scheduler):
    place.killed(scheduler, WAITS, 'shared')
    done = command('--cancel-lost')
    assert done.returncode == 0
    assert '4 jobs and results were found, and all of them are removed' in done.stdout
    with dispy.SharedJobCluster(abs, scheduler_port=scheduler.port) as cluster:
        assert cluster.submit(-1)(30) == 1
    assert place.files() == []


# -- recovery files --------------------------------------------------------------------------------

@pytest.mark.parametrize('settled', (False, True))
def test_ids_that_are_set_after_submit_and_arguments_are_recovered(place, node, settled):
    """The way of scripts for dispy 4. `settled`: the file has been written into its database
    before."""
    code = '''
    cluster = KIND(hold, recover_file=directory + '/jobs', **WHERE)
    jobs = []
    for number in range(8):
        job = cluster.submit(directory, name='job %%d' %% number)
        job.id = ('mine', number)
        jobs.append(job)
    while sum(job.status == dispy.DispyJob.Running for job in jobs) < 4:
        time.sleep(0.01)
    if %r:
        for job in jobs:
            job.id = (*job.id, 'again')
        time.sleep(0.3)
    jobs[7].id = lambda: 0   # cannot be written down: the one before counts
    print('ready', flush=True)
    time.sleep(600)
    ''' % settled
    place.killed(node, code)
    assert place.files() == []
    place.end()
    jobs = dispy.recover_jobs(str(place.path / 'jobs'), 30)
    last = ('again',) if settled else ()
    assert sorted(job.id for job in jobs) == [('mine', number, *last) for number in range(8)]
    for job in jobs:
        assert ("name='job %d'" % job.id[1] in job.arguments
                and repr(str(place.path))[:20] in job.arguments)
    assert ([job.args for job in jobs if job.status == DispyJob.Finished]
            == [None] * len(place.names('ended')))


def test_arguments_are_bounded_and_may_fail():
    class Odd:
        def __repr__(self):
            raise ValueError('no')
    assert len(dispy.words_of((list(range(10 ** 6)), 'x' * 10 ** 6), {'y' * 10 ** 5: 1})) <= 300
    assert 'Odd' in dispy.words_of((Odd(),), {'odd': Odd()})


@pytest.mark.parametrize('kept', (False, True))
def test_a_node_that_connects_by_itself_is_waited_for(place, tmp_path, kept):
    """`dispynode --scheduler-host`: it cannot be reached, and comes to whoever collects. `kept`:
    with a recover_file."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = sock.getsockname()[1]
    options = ['--scheduler-host', '127.0.0.1:%d' % port, '--ping-interval', '1', '--name',
               'caller']
    with NodeProcess(tmp_path / 'n', *options, cpus=4) as node:
        file = ', recover_file=directory + "/jobs"' if kept else ''
        place.killed(node, WAITS.replace(
            'start()', "start(host=('127.0.0.1', %d), nodes='*', dispy_port=9%s)" % (port, file)))
        place.end()
        if kept:
            path = str(tmp_path / 'jobs')
        else:
            row, = dispy.recoverable()
            assert row.nodes == ('caller',) and row.jobs == 4
            path = row.path
        assert collected(dispy.recover_jobs(path, 30)) == FOUR and not os.path.exists(path)
