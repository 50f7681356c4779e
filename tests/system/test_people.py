"""What people see: representations, tables and bars in notebooks, lines of source code in
tracebacks, and failed jobs that nobody has looked at."""

import json
import linecache
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
import types

import pytest

import dispy
import dispy_httpd
import dispyscheduler
from conftest import eventually
from dispy import Counts, DispyJob, DispyNode, FAILED, JobState
from nodes import NodeProcess, SchedulerProcess
from programs import HERE, other_pythons

# -- why a job failed: pure ------------------------------------------------------------------------

TRACE = '''Traceback (most recent call last):
  File "a.py", line 1, in f
    g()
  File "b.py", line 2, in g
    raise ValueError('bad 17')
ValueError: bad 17
  a second line of the message
'''
GROUP = '''  + Exception Group Traceback (most recent call last):
  |   File "a.py", line 3, in f
  | ExceptionGroup: two (2 sub-exceptions)
  +-+---------------- 1 ----------------
    | ValueError: 1
'''


@pytest.mark.parametrize('text, reason, kind', [
    (TRACE, 'ValueError: bad 17', 'ValueError'),
    (TRACE.replace('ValueError:', 'user.Failure:'), 'user.Failure: bad 17', 'user.Failure'),
    (GROUP, 'ExceptionGroup: two (2 sub-exceptions)', 'ExceptionGroup'),
    ('  File "a.py", line 1\n    1 +\n       ^\nSyntaxError: invalid syntax\n',
     'SyntaxError: invalid syntax', 'SyntaxError'),
    ('\nsignal 9 on node 7: killed\nend of stderr\n', 'signal 9 on node 7: killed',
     'signal # on node #: killed'),
    ('', '', ''),
    ('x' * 1000, 'x' * 300, 'x' * 300)])
def test_the_reason_is_the_line_of_the_exception(text, reason, kind):
    assert dispy.reason_of(text) == reason
    assert dispy.kind_of_reason(reason) == kind


@pytest.mark.parametrize('text, path', [
    ("FileNotFoundError: [Errno 2] No such file or directory: 'a b.csv'", 'a b.csv'),
    ("builtins.FileNotFoundError: [Errno 2] No such file or directory: \"it's\"", "it's"),
    ('FileNotFoundError: in/a.csv not found.', 'in/a.csv'),             # as numpy writes it
    ("FileNotFoundError: [Errno 2] No such file or directory: 'elsewhere.csv'", ''),
    ("FileNotFoundError: [Errno 2] No such file or directory: '/tmp'", ''),
    # Words that are also names of files
    ('FileNotFoundError: no file or directory', ''),
    ("FileNotFoundError: 'a b.csv'\n\nDuring handling:\n\nRuntimeError: no", 'a b.csv'),
    ("OSError: 'a b.csv'", ''),
    ("  the text FileNotFoundError: 'a b.csv'", '')])
def test_the_path_that_was_not_found_is_looked_for_here(text, path):
    found, at = dispy.missing_file(
        text, {'a b.csv', "it's", 'in/a.csv', '/tmp', 'file', 'directory'}.__contains__)
    assert (found, at > 0) == (path, bool(path))
    assert not path or path in text[:at] and text[at:at + 1] in ('', '\n')


def test_what_to_do_about_a_path_depends_on_where_it_lands():
    assert "depends=['a.csv']" in dispy.hint_for_missing('a.csv', '/home/u', False)
    assert dispy.hint_for_missing('in/a.csv', '/home/u', False).endswith(
        "depends=['in/a.csv'], and open it in the job as 'a.csv'")
    assert "is called 'a.csv' in the directory of the job" in dispy.hint_for_missing(
        'in/a.csv', '/home/u', True)


def job(number=1, text='', state=JobState.TERMINATED):
    made = DispyJob('c', None, None, number)
    made.exception, made.state = text, state
    return made


def failed(failures, *texts):
    jobs = [job(number, text) for number, text in enumerate(texts, 1)]
    for one in jobs:
        failures.add(one, 'lab2')
        one.status = int(one.state)
    return jobs


def test_failures_are_told_once_with_the_commonest_reason():
    failures = dispy.Failures('/nowhere', (), True)
    failed(failures, *['ValueError: bad %d' % n for n in range(3)], 'KeyError: 1')
    text = failures.take(10)
    assert '4 of 10 jobs failed' in text and '(3 jobs; here of job 1): ValueError: bad 0.' in text
    assert failures.take(10) == ''
    failed(failures, 'KeyError: 2')
    assert '1 of 11 jobs failed' in failures.take(11)


def test_failures_that_somebody_has_looked_at_are_not_told():
    looks = [lambda job: job.exception, lambda job: job.error, repr, DispyJob._repr_html_,
             lambda job: repr(dispy.JobList([job])), dispy.error_of]
    failures = dispy.Failures('/nowhere', (), True)
    jobs = failed(failures, *['E: %d' % n for n in range(len(looks) + 1)])
    for look, one in zip(looks, jobs):
        look(one)
        look(one)   # a second look takes away no other job
    text = failures.take(len(jobs))
    assert '1 of %d jobs' % len(jobs) in text
    assert jobs[-1].exception == 'E: %d' % len(looks)   # after it was told
    assert failures.take(len(jobs)) == ''


def test_reasons_of_many_kinds_are_counted_all_the_same():
    failures = dispy.Failures('/nowhere', (), True)
    kinds = failures.KINDS_MOST + 50
    jobs = failed(failures, *['E%s: x' % 'x' * n for n in range(kinds)])
    assert len(failures._rows) <= failures.KINDS_MOST + 1
    for one in jobs[10:]:
        one.exception
    assert '10 of %d jobs failed' % kinds in failures.take(kinds)


# -- lines of source code: pure --------------------------------------------------------------------

@pytest.fixture
def cell(monkeypatch):
    """A callable: what is typed into a notebook, as linecache has it; returns the module that has
    run it."""
    module = types.ModuleType('cells_of_a_test')
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def run(file, text):
        lines = textwrap.dedent(text).strip('\n').splitlines(True)
        monkeypatch.setitem(linecache.cache, file, (len(text), None, lines, file))
        exec(compile(''.join(lines), file, 'exec'), vars(module))
        return module
    return run


def test_lines_that_a_node_lacks_are_added(cell, tmp_path):
    cell('/tmp/no/1.py', 'def f():\n    return 1 / 0\n')
    other = tmp_path / 'other.py'
    other.write_text('first\nsecond\n')
    bare = ('Traceback (most recent call last):\n  File "/tmp/no/1.py", line 2, in f\n'
            '  [Previous line repeated 3 more times]\n  File "%s", line 2, in g\n'
            'ZeroDivisionError: division by zero\n' % other)
    whole = dispy.source_here.added_to(bare)
    assert whole == bare.replace('in f\n', 'in f\n    return 1 / 0\n').replace('in g\n',
                                                                               'in g\n    second\n')
    assert dispy.source_here.added_to(whole) == whole
    assert dispy.source_here.added_to('no traceback') == 'no traceback'


def test_lines_of_another_file_by_the_same_name_are_replaced(cell, tmp_path):
    """Of what only this program has. Other files may be others there, with the lines that ran."""
    cell('/tmp/no/1.py', 'def f():\n    return 1 / 0\n')
    other = tmp_path / 'other.py'
    other.write_text('first\n')
    text = ('  File "/tmp/no/1.py", line 2, in f\n    an older line\n    ^^^^^^^^\n'
            '  File "%s", line 1, in g\n    its line\nE\n' % other)
    assert dispy.source_here.added_to(text) == text.replace('    an older line\n    ^^^^^^^^\n',
                                                            '    return 1 / 0\n')


def test_lines_in_groups_of_exceptions_and_of_unknown_files(cell):
    cell('/tmp/no/1.py', 'def f():\n    return 1 / 0\n')
    text = ('  | Traceback (most recent call last):\n  |   File "/tmp/no/1.py", line 2, in f\n'
            '  | ZeroDivisionError\n  File "/no/such/file.py", line 1, in g\n'
            '  File "/etc/hostname", line 1, in h\nE\n')
    assert dispy.source_here.added_to(text) == text.replace('in f\n',
                                                            'in f\n  |     return 1 / 0\n')


def test_functions_and_classes_of_cells_are_found_in_their_cells(cell):
    module = cell('/tmp/no/1.py', 'from math import sqrt\nclass Plain: pass\nFACTOR = 2\n')
    cell('/tmp/no/2.py', 'class Child(Plain):\n    value = 1\ndef old(): return 1\n')
    cell('/tmp/no/3.py', 'def compute(n):\n    return sqrt(n) * FACTOR * Child.value * old()\n')
    cell('/tmp/no/4.py', 'def old():\n    return 5\n')   # the cell was changed and run again
    data, obstacle = dispy.pack_source(module.compute, None, None, {}, [])
    assert not obstacle
    code = ('import sys, pickle; sys.path.insert(0, %r); import dispynode; compute = '
            'dispynode.load_source(*pickle.loads(%r))[0]\n'
            'print(compute(16), compute.__code__.co_filename, compute.__code__.co_firstlineno)\n'
            % (os.path.dirname(dispy.__file__), data))
    assert (subprocess.check_output([sys.executable, '-c', code]).decode().split()
            == ['40.0', '/tmp/no/3.py', '1'])


def test_a_function_whose_text_is_not_to_be_had_is_named(cell):
    module = cell('/tmp/no/1.py', 'def compute(n): return n\n')
    del linecache.cache['/tmp/no/1.py']
    assert 'is not available' in dispy.pack_source(module.compute, None, None, {}, [])[1]


# -- representations: pure -------------------------------------------------------------------------

def test_counts_in_words():
    assert str(Counts(589, 37, 0, 9, 565)) == '589 done, 37 failed, 9 running, 565 waiting'
    assert str(Counts(0, 0, 0, 0, 0)) == 'no jobs'


def test_a_job_in_a_line():
    one = job(11, state=JobState.CREATED)
    assert repr(one) == '<DispyJob 11 waiting>'
    one.status, one.ip_addr = DispyJob.Running, '10.0.0.2'
    assert repr(one) == '<DispyJob 11 running on 10.0.0.2>'
    one, = failed(dispy.Failures('/nowhere', (), True), 'TypeError: <b>')
    assert repr(one) == '<DispyJob 1 failed on lab2: TypeError: <b>>'
    assert 'TypeError: &lt;b&gt;' in one._repr_html_() and '<b>' not in one._repr_html_()
    one.status = DispyJob.Finished
    assert repr(one) == '<DispyJob 1 finished>'


def test_a_program_with_an_exit_status_has_failed():
    one = job(state=JobState.FINISHED)
    one.status, one.result, one.stdout, one.ip_addr = DispyJob.Finished, 3, b'', '10.0.0.2'
    assert repr(one) == '<DispyJob 1 failed on 10.0.0.2: exit status 3>'
    one.result = 0
    assert repr(one) == '<DispyJob 1 finished>'


def test_a_node_in_a_line_without_a_port_that_it_has_not():
    node = DispyNode.__new__(DispyNode)
    vars(node).update(ip_addr='10.0.0.2', port=0, name='lab2', state='ready', reason='', cpus=4,
                      busy=3, jobs_done=1, cpu_time=2.0, resources={}, resources_used={})
    assert repr(node) == '<DispyNode 10.0.0.2 lab2: ready, 4 CPUs, 3 running, 1 job done>'
    vars(node).update(port=9701, state='refused', reason='busy: it serves <me>', cpus=0, busy=0,
                      jobs_done=0)
    assert repr(node) == '<DispyNode 10.0.0.2:9701 lab2: refused (busy: it serves <me>)>'
    assert 'busy: it serves &lt;me&gt;' in node._repr_html_()
    vars(node).update(name='', state='', reason='')
    assert repr(node) == '<DispyNode 10.0.0.2:9701>'


def test_lists_and_tables_have_an_end():
    jobs = dispy.JobList(job(number, state=JobState.CREATED) for number in range(200))
    assert repr(jobs) == '<200 jobs: 200 waiting>' and repr(dispy.JobList()) == '<0 jobs>'
    assert (jobs._repr_html_().count('<tr>') == 1 + dispy.SHOWN_MOST + 1
            and 'and 150 more' in jobs._repr_html_())


def test_the_table_of_a_cluster():
    text = dispy.html_of_cluster('JobCluster <f>', 'open', Counts(1, 1, 0, 1, 1), [],
                                 'http://localhost:8181/#token="x')
    assert ('JobCluster &lt;f&gt;' in text
            and '2 of 4 jobs: 1 done, 1 failed, 1 running, 1 waiting' in text)
    assert 'width:25.00%' in text and '#token=&quot;x"' in text
    assert 'href' not in dispy.html_of_cluster('f', 'closed', Counts(0, 0, 0, 0, 0), None, '')


# -- with clusters ---------------------------------------------------------------------------------

def work(n):
    if n % 2:
        raise ValueError('odd %d' % n)
    if n == 100:
        open('in_the_directory_of_the_program.csv')
    if n == 102:
        time.sleep(1000)
    return n


def told(caplog):
    return [record.getMessage()
            for record in caplog.records if 'has not read the reasons' in record.getMessage()]


def test_failed_jobs_are_heard(make_cluster, caplog, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'in_the_directory_of_the_program.csv').write_text('x')
    with make_cluster(work, nodes='local') as cluster:
        jobs = [cluster.submit(n) for n in range(6)]
        cluster.wait()
        assert (repr(jobs[1]).startswith('<DispyJob 2 failed on ')
                and repr(jobs[1]).endswith(': ValueError: odd 1>'))
        cluster.print_status()
        text, = told(caplog)
        assert (text.startswith('work: 2 of 6 jobs failed')
                and re.search(r'\(2 jobs; here of job [246]\): ValueError: odd [135]', text))
        cluster.print_status()
        assert told(caplog) == [text]
        jobs = [cluster.submit(n) for n in (7, 100)]
    first, text = told(caplog)
    assert text.startswith('work: 2 of 8 jobs failed')
    hint = "send it along by depends=['in_the_directory_of_the_program.csv']"
    assert hint in jobs[1].exception.splitlines()[-1] and str(tmp_path) in jobs[1].exception
    assert "raise ValueError('odd %d' % n)" in jobs[0].exception
    assert isinstance(jobs[1].error, FileNotFoundError)
    assert 'closed; 3 done, 5 failed' in repr(cluster)


def test_failed_jobs_that_were_looked_at_draw_no_warning(make_cluster, caplog):
    seen = []
    with make_cluster(work, nodes='local', job_status=seen.append) as cluster:
        cluster.submit(1)
    with make_cluster(work, nodes='local', cluster_status=lambda status, node,
                      job: seen.append(job)) as cluster:
        cluster.submit(1)
    with make_cluster(work, nodes='local') as cluster:
        with pytest.raises(ValueError):
            list(cluster.map([1]))
        one = cluster.submit(3)
        assert one() is None and 'odd 3' in one.exception
        other = cluster.submit(102)
        cluster.cancel(other)   # a cancelled job has not failed
        other()
    assert not told(caplog) and seen


def test_one_call_cancels_all(make_cluster):
    with make_cluster(work, nodes='local') as cluster:
        assert cluster.jobs() == [] and cluster.cancel_all() == 0
        jobs = [cluster.submit(102) for _ in range(30)]
        eventually(lambda: any(one.status == DispyJob.Running for one in jobs))
        assert cluster.jobs() == jobs
        assert 'running' in repr(cluster) and 'waiting' in repr(cluster)
        assert cluster.cancel_all() == 30
        assert cluster.wait(30) and {one.status for one in jobs} == {DispyJob.Cancelled}
        assert cluster.jobs() == [] and '30 cancelled' in repr(cluster)
        assert cluster.submit(2)() == 2   # it goes on


def test_a_cluster_in_a_line_and_as_a_table():
    with dispy.JobCluster(work, nodes='local') as cluster:
        cluster.wait_nodes()
        [cluster.submit(n)() for n in (2, 4)]
        line = repr(cluster)
        assert line.startswith('<JobCluster work: 1 node, ') and line.endswith('; 2 done>')
        table = cluster._repr_html_()
        assert ('127.0.0.1' in table and '127.0.0.1:0' not in table + repr(cluster.status().nodes)
                and 'href' not in table)
        with dispy_httpd.DispyHTTPServer(cluster, port=0) as server:
            assert 'href="%s"' % server.url in cluster._repr_html_()
    assert (repr(cluster) == '<JobCluster work: closed; 2 done>'
            and 'closed' in cluster._repr_html_())


SCRIPT = '''
import linecache, os, dispy
def compute(n):
    return [1, 2][n]    # this line
linecache.getlines(__file__)
os.remove(__file__)     # as on a host that has not got it
with dispy.JobCluster(compute, nodes='local') as cluster:
    print(cluster.submit(5)() or cluster.jobs() or 'it failed')
    job = cluster.submit(5)
    job()
    print(job.exception)
'''


def test_a_traceback_shows_lines_of_a_script_that_the_node_has_not_got(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=60, universal_newlines=True)
    assert done.returncode == 0, done.stderr
    assert 'line 4, in compute\n    return [1, 2][n]    # this line\nIndexError' in done.stdout
    assert '1 of 2 jobs failed' in done.stderr


# -- progress --------------------------------------------------------------------------------------

def in_a_notebook(monkeypatch):
    shell = types.SimpleNamespace(kernel=object(), config={})
    monkeypatch.setitem(sys.modules, 'IPython', types.SimpleNamespace(get_ipython=lambda: shell))


def test_progress_in_a_notebook_without_tqdm(monkeypatch, capsys):
    in_a_notebook(monkeypatch)
    monkeypatch.setitem(sys.modules, 'tqdm', None)
    assert list(dispy.in_sight((n for n in range(3)), 3)) == [0, 1, 2]
    assert list(dispy.in_sight((n for n in range(2)), None)) == [0, 1]
    shown = capsys.readouterr().err
    assert '3 of 3 jobs' in shown and '1 jobs, ' in shown


def test_progress_shows_nothing_where_nobody_looks(capsys):
    assert not dispy.in_notebook() or pytest.fail('these tests run in no notebook')
    with dispy.JobCluster(work, nodes='local') as cluster:
        assert list(cluster.map([2, 4], progress=True)) == [2, 4]
    assert capsys.readouterr().err == ''


def test_leaving_a_loop_with_progress_leaves_the_one_within():
    closed = []

    def results():
        try:
            yield from range(5)
        finally:
            closed.append(True)
    for _ in dispy.in_sight(results(), 5):
        break
    assert closed == [True]


def test_how_many_results_there_will_be():
    assert dispy.shortest([range(5), [1, 2]]) == 2
    assert dispy.shortest([(n for n in ()), 'abc']) == 3
    assert dispy.shortest([(n for n in ())]) is None
    assert FAILED == {JobState.TERMINATED, JobState.ABANDONED}


def test_what_a_prompt_has_shown_is_told_from_what_a_program_keeps(monkeypatch):
    shown, kept = object(), object()
    user = {'_': shown, '__': shown, '_3': shown, 'name': shown, '_own': shown, '_oh': {3: shown}}
    shell = types.SimpleNamespace(user_ns=user, user_ns_hidden={'_3': shown},
                                  displayhook=types.SimpleNamespace(_=shown))
    monkeypatch.setitem(sys.modules, 'IPython', types.SimpleNamespace(get_ipython=lambda: shell))
    assert dispy.references_of_history(shown) == 6 and dispy.references_of_history(kept) == 0
    monkeypatch.delitem(sys.modules, 'IPython')
    monkeypatch.setattr('builtins._', shown, raising=False)
    assert dispy.references_of_history(shown) == 1


# -- a notebook ------------------------------------------------------------------------------------

CELLS = ['''
import dataclasses, math, os, sys, time
from math import sqrt
import dispy
FACTOR = 3
node = ('127.0.0.1', int(os.environ['TEST_NODE_PORT']))
''', '''
class Shape:
    pass

class Point(Shape):
    def __init__(self, x):
        self.x = x

@dataclasses.dataclass
class Scale:
    factor: float = FACTOR

def helper(point):
    return sqrt(point.x) * Scale().factor
''', '''
def compute(point):
    if point.x == 49:
        raise ValueError('seven times seven')
    return helper(point), '%d.%d' % sys.version_info[:2]
''', '''
cluster = dispy.JobCluster(compute, nodes=[node])
cluster.wait_nodes(1, 30)
jobs = [cluster.submit(Point(n * n)) for n in range(10)]
cluster.wait(progress=True)
[job() for job in jobs[:3]]
''', '''
cluster
''', '''
jobs[7]
''', '''
print(jobs[7].exception)
''', '''
list(cluster.map([Point(1)], progress=True))
''', '''
len([job for job in cluster.as_completed(jobs, progress=True)])
''', '''
with dispy.DispyExecutor(nodes='local') as executor:
    total = sum(executor.map(abs, range(-3, 0), progress=True))
total
''', '''
sleepers = dispy.JobCluster(time.sleep, nodes='local')
[sleepers.submit(1000) for _ in range(3)]
sleepers.wait(0.1)
sleepers.jobs()
''', '''
sleepers.cancel_all(), sleepers.wait(30), sleepers
''', '''
sleepers.close(), cluster.close()
''', '''
first = again = dispy.JobCluster(compute, nodes=[node])
first
''', '''
first
''', '''
again = dispy.JobCluster(compute, nodes=[node])   # the cell is run again
del first
''', '''
until = time.monotonic() + 30
while len(dispy._clusters) > 1 and time.monotonic() < until:
    time.sleep(0.1)
[one is again for one in dispy._clusters]
''', '''
again.close()
''']


RUN_NOTEBOOK = '''
import json, sys, nbclient, nbformat
book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text)
                                       for text in json.load(sys.stdin)])
nbclient.NotebookClient(book, timeout=120, kernel_name='python3').execute()
json.dump([cell.outputs for cell in book.cells], sys.stdout)
'''


@pytest.mark.parametrize('version', ['same', 'other'])
def test_a_notebook(tmp_path, monkeypatch, version):
    for name in ('nbformat', 'nbclient', 'ipykernel', 'tqdm'):
        pytest.importorskip(name)
    others = other_pythons()
    if version == 'other' and not others:
        pytest.skip('no other Python from 3.8 on was found')
    there = HERE if version == 'same' else min(others, key=lambda name: int(name.split('.')[1]))
    python = sys.executable if version == 'same' else others[there]
    environment = {'IPYTHONDIR': str(tmp_path / 'ipython'),
                   'JUPYTER_RUNTIME_DIR': str(tmp_path / 'runtime')}
    with NodeProcess(tmp_path / 'node', python=python) as node:
        done = subprocess.run([sys.executable, '-W', 'ignore', '-c', RUN_NOTEBOOK],
                              input=json.dumps([text.strip('\n') for text in CELLS]),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=str(tmp_path),
                              universal_newlines=True, timeout=240,
                              env=dict(os.environ, TEST_NODE_PORT=str(node.port), **environment))
    assert done.returncode == 0, done.stderr
    outputs = json.loads(done.stdout)

    def output(number, kind):
        found = [out['data'][kind] for out in outputs[number] if kind in out.get('data', ())]
        return found[-1] if found else None

    def printed(number):
        return ''.join(out['text'] for out in outputs[number] if out['output_type'] == 'stream')
    assert output(3, 'text/plain') == repr([(0.0, there), (3.0, there), (6.0, there)])
    assert ('10/10' in printed(3) or '10/10' in output(3, 'text/plain')
            or output(3, 'application/vnd.jupyter.widget-view+json'))
    assert output(4, 'text/plain').startswith('<JobCluster compute: 1 '
                                              'node, 2 CPUs; 9 done, 1 failed>')
    assert '10 of 10 jobs: 9 done, 1 failed' in output(4, 'text/html')
    assert (output(5, 'text/plain').endswith(': ValueError: seven times seven>')
            and '<table>' in output(5, 'text/html'))
    assert "in compute\n    raise ValueError('seven times seven')\n" in printed(6)
    assert output(7, 'text/plain') == repr([(3.0, there)]) and output(8, 'text/plain') == '10'
    assert output(9, 'text/plain') == '6'
    assert output(10, 'text/plain').startswith('<3 jobs: ') and '<table>' in output(10, 'text/html')
    assert (output(11, 'text/plain').startswith('(3, True, <JobCluster sleep: ')
            and '3 cancelled' in output(11, 'text/plain'))
    assert output(12, 'text/plain') == '(True, True)'
    # Though Out has the first one
    assert output(16, 'text/plain') == '[True]' and output(17, 'text/plain') == 'True'
    assert 'has not read the reasons' not in str(outputs)


# -- small things that were in the way -------------------------------------------------------------

def a_free_port():
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


def test_the_monitor_alone_shows_the_scheduler_of_this_machine_or_the_nodes(tmp_path, monkeypatch,
                                                                            capsys):
    parser = dispy_httpd.make_parser()
    with SchedulerProcess(tmp_path / 'scheduler') as scheduler:
        monkeypatch.setattr(dispy_httpd, 'SCHEDULER_PORT', scheduler.port)
        source = dispy_httpd._source_of(parser.parse_args([]))
        try:
            assert isinstance(source, dispy_httpd.SchedulerSource)
            assert ('the dispyscheduler at 127.0.0.1:%d is shown'
                    % scheduler.port in capsys.readouterr().err)
        finally:
            source.close()
    source = dispy_httpd._source_of(parser.parse_args([]))   # it has ended
    try:
        assert isinstance(source, dispy_httpd.NodesSource)
        assert 'the nodes that answer are shown' in capsys.readouterr().err
    finally:
        source.close()


def test_nodes_are_named_by_the_same_option_in_all_commands():
    for parser, option in ((dispy_httpd.make_parser(), 'nodes'),
                           (dispyscheduler.make_parser(), 'node')):
        for words in (['-n', 'a', '--node', 'b:5', '--nodes', 'c'], ['-n', 'a b:5 c']):
            assert getattr(parser.parse_args(words), option) == ['a', 'b:5', 'c'], parser.prog
        assert getattr(parser.parse_args([]), option) == []
    # They have no PROGRAM that might be meant
    for parser in (dispy_httpd.make_parser(), dispyscheduler.make_parser()):
        assert (parser.parse_args(['-n', 'a', 'b:5', '-n', 'c'])
                == parser.parse_args(['--nodes', 'a b:5 c']))
    parser = dispy.make_parser()
    for words in (['-n', 'a', '--node', 'b:5', '--nodes', 'c'], ['-n', 'a b:5 c'],
                  ['-n', 'a', '-n', 'b:5', '-n', 'c']):
        options, command = parser.split([*words, 'program'])
        assert (parser.parse_args(options).nodes, list(command)) == (['a', 'b:5', 'c'], ['program'])


def test_an_allocator_has_a_list_of_files_of_its_own():
    files = ['a.txt']
    first, second = dispy.NodeAllocate('a', depends=files), dispy.NodeAllocate('b')
    first.depends.append('b.txt')
    second.depends.append('c.txt')
    assert (files == ['a.txt'] and first.depends == ['a.txt', 'b.txt']
            and dispy.NodeAllocate('c').depends == [])


def test_nodes_that_connect_by_themselves_are_used_without_discovery(tmp_path, monkeypatch):
    monkeypatch.setenv('DISPY_DISCOVERY', 'off')
    with pytest.raises(ValueError, match='DISPY_DISCOVERY.*host='):
        dispy.JobCluster(work, nodes='*')
    port = a_free_port()
    with dispy.JobCluster(work, nodes='*', host=('127.0.0.1', port)) as cluster:
        with pytest.raises(dispy.NoNodes) as caught:
            cluster.wait_nodes(1, 0.1)
        assert ('waited for nodes to connect to 127.0.0.1:%d' % port in str(caught.value)
                and 'UDP' not in str(caught.value))
        with NodeProcess(tmp_path / 'node', '--scheduler-host', '127.0.0.1:%d' % port):
            assert cluster.submit(2)(30) == 2
            assert cluster.discover_nodes('*') == 0


def test_files_that_a_program_leaves_behind_are_told_once(make_cluster, tmp_path, caplog):
    program = tmp_path / 'conv'
    program.write_text('#!/bin/sh\ntest "$1" = 0 || echo $1 > out-$1.txt\ntouch .hidden\n'
                       'echo $1 > conv.input\n')
    program.chmod(0o755)
    (tmp_path / 'conv.input').write_text('')
    told_of = lambda: [text for text in caplog.messages if 'has left a file' in text]   # noqa: E731
    with make_cluster(str(program), nodes='local',
                      depends=[str(tmp_path / 'conv.input')]) as cluster:
        assert cluster.submit(0)(30) == 0   # it has left nothing, and changed what was there
        assert not told_of()
        assert [cluster.submit(n)(30) for n in range(1, 6)] == [0] * 5
        text, = eventually(told_of)
        assert "'out-" in text and 'dispy_send_file' in text and 'by subprocess' in text
    assert len(told_of()) == 1
    with make_cluster(str(program), nodes='local', cleanup=False,
                      depends=[str(tmp_path / 'conv.input')]) as cluster:
        assert cluster.submit(7)(30) == 0   # what shall stay there is not missed
    assert len(told_of()) == 1


# -- the log ---------------------------------------------------------------------------------------

class Unshown:
    """An object of the user's, of which the log may call nothing."""

    def __repr__(self):
        raise AssertionError('the log has called code of the user')

    __str__ = __len__ = __iter__ = __format__ = __repr__


def test_the_log_shows_values_and_runs_none_of_the_user_s_code():
    job = DispyJob('comp', b'packed', {'values': Unshown()}, Unshown())
    job.serial = (3 << 16) + 1
    assert (dispy.logged(dispy.Submitted([job])) == 'Submitted(works=[job  (serial %d)])'
            % job.serial)
    job.id = 'first'
    row = (job.serial, 1, 2.5, 1e9 / 3, b'secret', b'', memoryview(b'ab'))
    assert dispy.logged(dispy.JobsEnded(('host', 1), 'c', [(job, row)])) == (
        "JobsEnded(node=['host', 1], comp='c', pairs=[[job first (serial 196609), "
        "[196609, 1, 2.5, 333333333, <6 bytes>, <0 bytes>, <2 bytes>]]])")
    assert dispy.logged(list(range(100))) == '[0, 1, 2, 3, 4, 5, 6, 7, 92 more]'
    assert dispy.logged({'a': Unshown()}) == "[['a', <Unshown>]]"
    assert len(dispy.logged('x' * 100000)) < 200


def test_the_log_of_decisions_costs_nothing_when_it_is_off(make_cluster, monkeypatch):
    """No text is made."""
    made = []
    monkeypatch.setattr(dispy, 'logged', lambda value: made.append(value) or '')
    with make_cluster(abs, nodes='local') as cluster:
        assert list(cluster.map(range(20))) == list(range(20))
        assert made == [] and not dispy.core_of(cluster).driver.decisions.is_on
    with make_cluster(abs, nodes='local', loglevel=dispy.logger.DEBUG) as cluster:
        assert cluster.submit(-1)(30) == 1
        assert {dispy.Submitted, dispy.NodeReady, dispy.SendJobs, dispy.NodeResults,
                dispy.JobsEnded} <= set(map(type, made))


def test_the_level_that_the_program_has_set_stays():
    nowhere = [('127.0.0.1', 9)]
    dispy.logger.setLevel(dispy.logger.ERROR)
    for level, expected in ((None, 'ERROR'), (20, 'ERROR'), ('DEBUG', 'DEBUG'), ('INFO', 'INFO'),
                            ('WARNING', 'WARNING'), (None, 'INFO')):
        options = {} if level is None else {'loglevel': level}
        with dispy.JobCluster(abs, nodes=nowhere, **options):
            assert dispy.logger.level == getattr(dispy.logger, expected)
    for level in ('none', 1.5, object()):
        with pytest.raises((TypeError, ValueError)):
            dispy.JobCluster(abs, nodes=nowhere, loglevel=level)
    assert dispy.logger.level == dispy.logger.INFO


LOGGING = '''
import dispy, logging, sys
exec(sys.argv[2])
def compute(n):
    return n + 1
with dispy.JobCluster(compute, nodes='local', **eval(sys.argv[1])) as cluster:
    assert list(cluster.map(range(3))) == [1, 2, 3]
'''


STORY = ['compute: the computation begins', 'is used, with', 'has ended after', ': 3 done']
DECISIONS = ['event Submitted(', 'end of a turn: SendJobs(', 'event NodeResults(']


@pytest.mark.parametrize('options, configured, shown, hidden', [
    ({}, '', [], ['compute']),
    ({'loglevel': 40}, '', [], ['compute']),
    ({'loglevel': 10}, '', STORY + DECISIONS, []),
    ({}, 'logging.basicConfig(level=logging.INFO)', STORY, ['event ', 'end of a turn']),
    ({'loglevel': 10}, 'logging.basicConfig(level=logging.INFO)', STORY + DECISIONS, []),
    ({}, 'dispy.logger.setLevel(logging.DEBUG)', STORY + DECISIONS, [])])
def test_what_a_program_shows_of_its_log(tmp_path, options, configured, shown, hidden):
    """A program that goes well shows nothing where it neither asks for that nor configures
    logging."""
    script = tmp_path / 'script.py'
    script.write_text(LOGGING)
    done = subprocess.run([sys.executable, str(script), repr(options), configured],
                          stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=60, universal_newlines=True)
    assert done.returncode == 0 and done.stdout == ''
    assert [text for text in shown if text not in done.stderr] == [], done.stderr
    assert [text for text in hidden if text in done.stderr] == [], done.stderr


def in_turn(path):
    """A job that runs until its file is there."""
    while not os.path.exists(path):
        time.sleep(0.02)
    return path


def test_the_log_tells_of_nodes_that_are_used_lost_and_back(tmp_path, caplog):
    """And of the jobs that were there: reentrant ones wait again, others are abandoned."""
    caplog.set_level('INFO', 'dispy')
    end = str(tmp_path / 'end')
    with NodeProcess(tmp_path / 'one', '--name', 'one', cpus=2) as node:
        where = 'one (127.0.0.1:%d)' % node.port
        options = {'nodes': [node.address], 'pulse_interval': 0.5, 'ping_interval': 0.5}
        with dispy.JobCluster(in_turn, reentrant=True,
                              **options) as cluster, dispy.JobCluster(in_turn, **options) as other:
            jobs = [cluster.submit(end), other.submit(end)]
            eventually(lambda: all(job.status == DispyJob.Running for job in jobs))
            node.kill()
            eventually(lambda: [job.status for job in jobs]
                       == [DispyJob.Created, DispyJob.Abandoned])
            with NodeProcess(tmp_path / 'one', '--name', 'one', port=node.port, cpus=2):
                open(end, 'w').close()
                assert jobs[0](60) == end
    texts = '\n'.join(caplog.messages)
    assert re.search(r'in_turn: node %s is used, with [12] CPU' % re.escape(where), texts), texts
    assert re.search(
        r'lost the connection to node %s: .*; '
        r'the 2 jobs that it has are lost if it is not back within \d'
        % re.escape(where), texts), texts
    assert 'node %s is lost: 1 job waits again, 1 job was abandoned' % where in texts, texts
    assert re.search(r'node %s is connected again after \d' % re.escape(where), texts), texts
    assert re.search(
        r'in_turn: the computation has ended after [\d.]+ s: 1 done; '
        r'they ran for [\d.]+ s on 1 node',
        texts), texts
    assert re.search(
        r'in_turn: the computation has ended after [\d.]+ s: 1 failed; '
        r'they ran for 0.0 s on 0 nodes',
        texts), texts
