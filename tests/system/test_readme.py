"""README.md and the guides (examples/README.md): every piece of code in them runs, every line of
the table of features works, nothing is missing there, every link leads somewhere. Docstrings."""

import ast
import builtins
import contextlib
import inspect
import os
import pydoc
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest

import dispy
import dispy_httpd
from conftest import ROOT, _of_session, eventually
from documents import FENCE, PIECES, TEXTS, Piece
from nodes import NodeProcess, SchedulerProcess, start_here
from programs import make_venv

README, GUIDES = TEXTS['README.md'], TEXTS['examples/README.md']
WORDS_MOST = 1200        # of README.md, as `wc -w` counts them: a page that is read in five minutes


# -- the page as a whole --------------------------------------------------------------------------

def test_the_readme_is_short():
    assert len(README.split()) <= WORDS_MOST


def test_the_readme_has_the_command_that_ci_runs():
    """`.ci/run` takes the first line with this."""
    lines = [line for line in README.splitlines() if 'python -m pytest -q' in line]
    assert len(lines) == 1 and lines[0].endswith(' -n auto')


def test_the_licence_has_no_gaps():
    with open(os.path.join(ROOT, 'LICENSE'), encoding='utf-8') as file:
        assert not re.search(r'\[(yyyy|name)', file.read())


def headings(text):
    """Anchors of a text, as GitHub makes them."""
    found = re.findall(r'^#+ (.+)$', FENCE.sub('', text), re.M)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in found}


@pytest.mark.parametrize('name', sorted(TEXTS))
def test_every_link_leads_somewhere(name):
    links = re.findall(r'\]\(([^)\s]+)\)', FENCE.sub('', TEXTS[name]))
    for link in links:
        path, _, anchor = link.partition('#')
        target = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
        assert os.path.exists(os.path.join(ROOT, target)), link
        assert not anchor or anchor in headings(TEXTS[target]), link
    assert links


def test_every_guide_is_in_the_table_of_contents():
    contents, _, rest = GUIDES.partition('\n## ')
    titles = re.findall(r'^## (.+)$', '## ' + FENCE.sub('', rest), re.M)
    anchors = [anchor for title in titles for anchor in headings('## ' + title)]
    assert re.findall(r'\(#([\w-]+)\)', contents) == anchors


# -- pieces of code -------------------------------------------------------------------------------

PYTHON = [piece for piece in PIECES if piece.language == 'python']
SHELL = [piece for piece in PIECES if piece.language == 'sh']
LINES_OF_SHELL = [line for piece in SHELL for line in piece.code.splitlines()]
# Names that a piece of a guide may use without saying where they come from. The README has whole
# programs.
GIVEN = {
    'dispy': 'import dispy',
    'hosts': "hosts = ['host1', 'host2']",
    'compute': 'def compute(n):\n    return n * n',
    'cluster': "cluster = dispy.JobCluster(compute, nodes='local')",
    'load': 'def load(path):\n    open(path).close()',
    'score': 'def score(name):\n    return len(name)',
    'names': "names = ['one.txt', 'two.txt']",
    'url': 'url = 3',
    'train': 'def train(n):\n    return n',
}
OUTPUTS = {   # of pieces that have none in the text: what must stand in what they print
    ('README', 'More machines'): r'\A328350\n[\s\S]*127\.0\.0\.1',
    ('README', 'The web page'): r'\A332833500\n\Z',
    ('guide', 'Results'): r'\A0\n1\n4\n9\n[\s\S]* 81\n',
    ('guide', 'Results before the end'): r'\A(provisional [012]\n){3}finished 3\n\Z',
    ('guide', 'Files and programs'): r"\A(0 b'101\\n103\\n107\\n109\\n113\\n'\n)?\Z",
    ('guide', 'Setup, cleanup and callbacks'): r'\A((a 2\n|b 1\n|c 0\n){3}|9\n)\Z',
    ('guide', 'Notebooks'): r'\A328350\n\Z',
    ('guide', 'The executor'): r'\A7\n7\n\Z',
    ('guide', 'joblib and scikit-learn'): r'\A\[1\.0, 2\.0, 3\.0\]\n\Z',
    ('guide', 'By hand'): r'127\.0\.0\.1',
    ('guide', 'Sharing nodes among programs'): r'\A9\n\Z',
    ('guide', 'The web page'): r'\A328350\n\Z',
    ('guide', 'When a program ends before its jobs'): r'\A\[16\]\n\Z',
    ('guide', 'With a recovery file'): r'\A(9\n|1 finished 16\n|\[16\]\n)\Z',
}
FILES = {   # that a piece leaves in the directory of the program
    ('README', 'Files'): ['one.txt.gz', 'two.txt.gz'],
    ('guide', 'Files and programs'): ['one.txt.out', 'two.txt.out'],
}


def free_names(code):
    """Names that a program uses and nowhere binds."""
    tree = ast.parse(code)
    bound, used = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.ExceptHandler):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name.partition('.')[0])
        elif isinstance(node, ast.Global):
            bound.update(node.names)
    return used - bound - set(vars(builtins)) - set(IN_JOBS)


def whole_program(piece):
    """The code with what is given before it."""
    missing = free_names(piece.code)
    if piece.name == 'README.md':
        assert not missing, 'the README uses %s and does not say what that is' % missing
    wanted, lines = list(missing), [piece.code]
    while wanted:
        name = wanted.pop()
        assert name in GIVEN, '%s is used and not explained' % name
        lines.insert(0, GIVEN[name])
        wanted += [other for other in free_names('\n'.join(lines)) if other not in wanted]
    if 'cluster' in missing:
        lines.append('cluster.close()')
    return '\n'.join(lines)


class Hosts:
    """Nodes host1 to host3, and host0, a scheduler with a node: each at a port of its own."""

    def __init__(self, directory, stack):
        def start(daemon):
            return stack.enter_context(daemon)
        nodes = [start(NodeProcess(directory / ('node%d' % n))) for n in range(4)]
        its_node = '127.0.0.1:%d' % nodes[0].port
        scheduler = start(SchedulerProcess(directory / 'scheduler', '-n', its_node))
        self.ports = {'host%d' % n: daemon.port for n, daemon in enumerate([scheduler, *nodes[1:]])}
        self.pids = {daemon.process.pid for daemon in (scheduler, *nodes)}

    def in_python(self, code):
        """The code, with the real addresses in the place of host0 to host3."""
        def with_port(found):
            return "('127.0.0.1', %d" % self.ports[found.group(1)]

        def in_call(found):
            return "%s('127.0.0.1', %d)" % (found.group(1), self.ports[found.group(2)])

        def alone(found):
            return "'127.0.0.1:%d'" % self.ports[found.group(1)]
        code = re.sub(r"\('(host[0-3])', 9701", with_port, code)
        code = re.sub(r"(\w)\('(host[0-3])'\)", in_call, code)
        return re.sub(r"'(host[0-3])'", alone, code)

    def in_shell(self, line):
        """The same of a command."""
        def word(found):
            return '127.0.0.1:%d' % self.ports[found.group(1)]
        return re.sub(r'(?<![\w/])(host[0-3])(?![\w.])', word, line)


@pytest.fixture(scope='module')
def hosts(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        found = Hosts(tmp_path_factory.mktemp('hosts'), stack)
        _of_session.update(found.pids)
        yield found
        _of_session.difference_update(found.pids)


@pytest.fixture
def place(tmp_path):
    """A directory with the files that the pieces of code name."""
    for name in ('tools', 'examples'):
        (tmp_path / name).mkdir()
    for name in ('primes.sh', 'examples/primes.sh'):
        shutil.copy(os.path.join(ROOT, 'examples', 'primes.sh'), str(tmp_path / name))
    programs = {
        'tools/python': 'exec %s "$@"' % shlex.quote(sys.executable),
        'conv': 'tr a-z A-Z < "$1" > "${2:-out_1.dat}"',
        'program': 'echo "$@"',
    }
    texts = {
        'arguments.txt': '1 10\n10 20\n',
        'words.txt': 'apples and bread',
        'table.txt': '1 2 3',
        **{name: 'this is ' + name for name in ('one.txt', 'two.txt', 'model.bin')},
    }
    secrets = {'programs': 'the secret of the programs', 'nodes': 'the secret of the nodes'}
    for name, line in programs.items():
        (tmp_path / name).write_text('#!/bin/sh\n%s\n' % line)
        (tmp_path / name).chmod(0o755)
    for name, text in {**texts, **secrets}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    return tmp_path


def run_python(code, place, exit_code=0, **environment):
    """(output, messages) of a program. Where it names no node, none is there."""
    (place / 'program.py').write_text(code)
    done = subprocess.run(
        [sys.executable, 'program.py'], cwd=str(place), timeout=60, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
        env=dict(os.environ, DISPY_DISCOVERY='off', **environment))
    said = code + done.stdout + done.stderr
    assert done.returncode == exit_code and 'Traceback' not in done.stderr, said
    return done.stdout, done.stderr


# Ends as if it had been killed, when its job has ended.
LEAVES = """
import os
import dispy

def compute(n):
    return n * n

cluster = dispy.JobCluster(compute, nodes=['host1'], recover_file=RECOVER_FILE)
job = cluster.submit(4)
job.wait(30)
os._exit(7 if job.status == job.Finished else 1)
"""


def leave_a_job(hosts, place, recover_file, **environment):
    code = LEAVES.replace('RECOVER_FILE', repr(recover_file))
    run_python(hosts.in_python(code), place, exit_code=7, **environment)


@pytest.mark.parametrize('piece', PYTHON, ids=repr)
def test_a_piece_of_python(piece, hosts, place):
    code = hosts.in_python(whole_program(piece))
    if 'joblib' in code:
        pytest.importorskip('joblib')
    environment = {'XDG_STATE_HOME': str(place / 'state')}
    if 'recover' in code and 'cluster.submit' not in code:   # it collects what another has left
        leave_a_job(hosts, place, None if 'recoverable' in code else 'jobs.db', **environment)
    output, messages = run_python(code, place, **environment)
    if piece.output is not None:
        assert output == piece.output
    else:
        assert re.search(OUTPUTS.get(piece.key(), r'\A\Z'), output), output
    if 'dispy_send_file(' in code:
        for name in FILES[piece.key()]:
            assert (place / name).stat().st_size > 0
    assert ' failed' not in messages, messages


def test_a_piece_that_is_not_explained_is_found():
    piece = Piece('examples/README.md', FENCE.search(GUIDES))
    piece.code = 'print(something)'
    with pytest.raises(AssertionError, match='something is used and not explained'):
        whole_program(piece)
    piece.name, piece.code = 'README.md', 'print(compute)'
    with pytest.raises(AssertionError, match='the README uses'):
        whole_program(piece)


# -- lines for the shell --------------------------------------------------------------------------

# What takes more than this file has: the beginning of a line, and where it is run.
ELSEWHERE = {
    # They take packages from an index. `.ci/run` runs the second one.
    'python3 -m venv .venv && .venv/bin/pip install': 'by hand',
    'python3 -m venv venv': 'test_a_node_in_a_virtual_environment',
    'venv/bin/pip install': 'test_a_node_in_a_virtual_environment, without an index',
    'venv/bin/python dispynode.py': 'test_a_node_in_a_virtual_environment',
    'python -m dispy deploy': 'test_readme_hosts.py and test_deploy.py, with a real sshd, and '
                              'test_slurm.py',
    'python -m dispy stop': 'test_deploy.py, with a real sshd, and test_slurm.py',
    'ssh -N -L': 'test_deploy.py::test_a_forwarded_port',
    'python dispynode.py --python old=': 'test_interpreters.py, with two virtual environments',
}
DAEMONS = {'dispynode.py': '--dest-path-prefix', 'dispyscheduler.py': '--state-dir'}


def run_daemon(words, place):
    """Start it with the options of the line, at any port of loopback, and end it."""
    if words[1] == '-m':
        words = ['python', words[2] + '.py', *words[3:]]
    script = words[1]
    log = place / 'log'
    command = [sys.executable, os.path.join(ROOT, script), *words[2:], '-i', '127.0.0.1', '-p', '0',
               DAEMONS[script], str(place / 'daemon')]
    with open(str(log), 'wb') as file:
        process = start_here(
            command, cwd=str(place), stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    def has_begun():
        return process.poll() is not None or re.search(r'at port \d+', log.read_text())
    try:
        eventually(has_begun, what='start of ' + script)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, log.read_text()


def run_line(line, place):
    """The output of a command, which must not fail. It knows nothing of what other tests have
    left."""
    path = os.pathsep.join([str(place / 'tools'), os.environ['PATH']])
    done = subprocess.run(
        ['sh', '-c', line], cwd=str(place), timeout=90, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
        env=dict(os.environ, PATH=path, XDG_STATE_HOME=str(place / 'state')))
    assert done.returncode == 0, line + done.stdout + done.stderr
    return done.stdout


def check_dispy(words):
    """That dispy knows the options of a command that is run elsewhere."""
    if words[:3] == ['python', '-m', 'dispy']:
        ours = words[4:words.index('--')] if '--' in words else words[4:]
        engine = not dispy.ENGINE_OPTIONS.isdisjoint(ours)
        parser = dispy._engine_parser if engine else dispy._deploy_parser
        parser(words[3]).parse_args(ours)


@pytest.mark.parametrize('piece', SHELL, ids=repr)
def test_a_piece_for_the_shell(piece, hosts, place):
    """Its lines one after the other, in one directory."""
    if 'openssl' in piece.code and not shutil.which('openssl'):
        pytest.skip('openssl is not installed')
    for line in piece.code.splitlines():
        here = hosts.in_shell(line.replace('192.168.3.1', '127.0.0.1'))
        words = shlex.split(here, comments=True)
        if any(line.startswith(begin) for begin in ELSEWHERE):
            check_dispy(words)
        elif words[1] in DAEMONS or words[1:3] == ['-m', 'dispyscheduler']:
            run_daemon(words, place)
        else:
            check_output(line, run_line(here, place), hosts, place)


def check_output(line, output, hosts, place):
    """What a command has printed, or made."""
    if line.endswith('examples/primes.sh'):
        primes = [1, 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37]
        assert sorted(map(int, output.split())) == primes
    if '--list-nodes' in line:
        assert str(hosts.ports['host1']) in output
    if ' -o results ' in line:
        assert len(os.listdir(str(place / 'results'))) == 200


def test_every_piece_of_code_is_run_here():
    assert {piece.language for piece in PIECES} == {'python', 'sh', 'yaml', ''}
    for begin in ELSEWHERE:
        assert any(line.startswith(begin) for line in LINES_OF_SHELL), begin + ': in no text'
    for name in ('README.md', 'examples/README.md'):
        assert not re.search(r'^    ', FENCE.sub('', TEXTS[name]), re.M), 'code without a language'


def test_the_example_of_the_readme(tmp_path):
    """The first command, without making the environment."""
    line = next(line for line in LINES_OF_SHELL if 'checksum_tree' in line)
    command = [sys.executable, *shlex.split(line)[-2:]]
    output = subprocess.check_output(command, cwd=ROOT, timeout=120)
    assert b', 0 errors' in output


def test_what_prometheus_is_told(hosts, tmp_path):
    """The piece of a configuration: the usual port, and the token from the file as credentials."""
    piece, = [piece for piece in PIECES if piece.language == 'yaml']
    assert '--token-file /run/dispy.token' in piece.code
    assert 'credentials_file: /run/dispy.token' in piece.code
    port = inspect.signature(dispy_httpd.DispyHTTPServer).parameters['port'].default
    assert "'127.0.0.1:%d'" % port in piece.code
    token, log = tmp_path / 'dispy.token', tmp_path / 'log'
    command = [sys.executable, '-m', 'dispy_httpd', '-p', '0', '--token-file', str(token),
               '--nodes', '127.0.0.1:%d' % hosts.ports['host1']]
    with open(str(log), 'wb') as file:
        process = start_here(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        eventually(lambda: token.exists() and token.read_text(), what='the token')
        link = re.search(r'http://127.0.0.1:\d+/', log.read_text())
        bearer = {'Authorization': 'Bearer ' + token.read_text().strip()}
        request = urllib.request.Request(link.group() + 'metrics', headers=bearer)
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert b'# TYPE dispy_' in answer.read()
    finally:
        process.terminate()
        process.wait(20)


def test_a_node_in_a_virtual_environment(tmp_path):
    """What is installed there, and nowhere else, is found by jobs."""
    python = make_venv(tmp_path / 'venv')
    look = 'import sysconfig; print(sysconfig.get_path("purelib"))'
    packages = subprocess.check_output([python, '-c', look])
    with open(os.path.join(packages.decode().strip(), 'only_there.py'), 'w') as file:
        file.write('WORD = "found"\n')

    code = (
        'import dispy\n'
        'def look():\n'
        '    import only_there, sys\n'
        '    return only_there.WORD, sys.prefix\n'
        'with dispy.JobCluster(look, nodes=["127.0.0.1:%d"]) as cluster:\n'
        '    print(*cluster.submit().get(30))\n')
    with NodeProcess(tmp_path / 'node', python=python) as node:
        assert run_python(code % node.port, tmp_path)[0] == 'found %s\n' % (tmp_path / 'venv')


# -- messages -------------------------------------------------------------------------------------

def texts_of_dispy():
    """All texts in the four modules, as one."""
    found = []
    for name in ('dispynode.py', 'dispy.py', 'dispyscheduler.py', 'dispy_httpd.py'):
        with open(os.path.join(ROOT, name), encoding='utf-8') as file:
            nodes = ast.walk(ast.parse(file.read()))
        values = [node.value for node in nodes if isinstance(node, ast.Constant)]
        found += [value for value in values if isinstance(value, str)]
    return '\n'.join(found)


EXAMPLES = re.compile(
    r'\.\.\.|\b[A-Z]+\b|\d+(?:\.\d+)*|->|\(.*?\)|'
    r'\b(?:compute|pkg\.plots|matplotlib|numpy|connection|_connection|jobs failed|'
    r'model|Python|gpu|out\.dat|lab\d)\b')


def parts_of(message):
    """The parts of a message of the guide that are the same each time."""
    parts = [part.strip(' .,:;') for part in EXAMPLES.split(message)]
    return [part for part in parts if len(part) > 4]


def test_messages_are_those_of_dispy():
    section = GUIDES.partition('## Troubleshooting by message')[2].partition('\n## ')[0]
    rows = re.findall(r'^\| (`.+?`) \| .+ \|$', section, re.M)
    texts, foreign = texts_of_dispy(), {'No route to host', 'lock'}
    messages = [message for row in rows for message in re.findall('`([^`]+)`', row)]
    parts = [part for message in messages for part in parts_of(message)]
    assert len(rows) > 20 and len(parts) > 20
    assert [part for part in parts if part not in texts and part not in foreign] == []


# -- the table of features -------------------------------------------------------------------------

ROWS = re.findall(r'^\| (.+) \| `([^`]+)` \| (.*?) ?\|$',
                  GUIDES.partition('## Every feature')[2].partition('\n## ')[0], re.M)
LINES = [line for _, line, _ in ROWS]
KNOWN = {'dispy': dispy, 'dispy_httpd': dispy_httpd, 'cluster': dispy.JobCluster,
         'job': dispy.DispyJob, 'executor': dispy.DispyExecutor}
RETURNS = {dispy.JobCluster.status: dispy.ClusterStatus}
IN_JOBS = {'dispy_provisional_result': ['value'], 'dispy_send_file': ['path'],
           # Name -> parameters of a function
           'dispy_node_name': None, 'dispy_node_ip_addr': None, 'dispy_job_path': None}
OF_SUBMIT = {*dispy._OPTIONS, 'dispy_job_depends', 'dispy_retry_on', 'dispy_retry_delay',
             'dispy_resources'}


def parse(line):
    return ast.parse(line + ' pass' if line.endswith(':') else line)


def meaning(node):
    """What an expression of the table is in dispy; None if it has nothing to do with it. Raises if
    there is no such thing."""
    if isinstance(node, ast.Name):
        assert (node.id in IN_JOBS or node.id in KNOWN
                or not node.id.startswith('dispy_')), 'jobs know no ' + node.id
        return KNOWN.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = meaning(node.value)
        return None if owner is None else getattr(owner, node.attr)
    if isinstance(node, ast.Call):
        return RETURNS.get(meaning(node.func))
    return None


def check_call(call):
    """That the arguments fit the signature, and that there is every dispy_ keyword."""
    function = meaning(call.func)
    names = [keyword.arg for keyword in call.keywords]
    if isinstance(call.func, ast.Name) and call.func.id in IN_JOBS:
        assert len(call.args) == len(IN_JOBS[call.func.id]) and not names
    elif function is not None:
        function = function.__call__ if function is dispy.DispyJob else function
        bound = ([] if inspect.isclass(function) or inspect.getmodule(function) is dispy
                 and '.' not in function.__qualname__ else [None])
        found = inspect.signature(function).bind(*bound, *call.args, **dict.fromkeys(names))
        assert {name for name in found.arguments.get('kwargs', {})
                if name.startswith('dispy_')} <= OF_SUBMIT
        if function is dispy.DispyExecutor:
            assert set(names) <= set(inspect.signature(dispy.JobCluster).parameters)


@pytest.mark.parametrize('line', [line for line in LINES if not line.startswith('python ')])
def test_a_line_of_the_table(line):
    for node in ast.walk(parse(line)):
        if isinstance(node, ast.Call):
            check_call(node)
        elif isinstance(node, (ast.Attribute, ast.Name)):
            meaning(node)


def test_the_lines_for_the_shell():
    lines = [shlex.split(line) for line in LINES if line.startswith('python ')]
    for words in lines:
        assert words[:3] == ['python', '-m', 'dispy']
        parser = dispy.make_parser()
        options, command = parser.split(words[3:])
        args = parser.parse_args(options)
        assert args.list_nodes or args.cancel_lost or dispy.split_sources(command)[0]
    assert lines


@pytest.mark.parametrize('line', ['dispy.JobCluster(compute, colour=1)', 'cluster.sumbit(1)',
                                  'cluster.submit(1, dispy_colour=2)',
                                  'job.colour', 'cluster.status().colour', 'dispy_colour(1)',
                                  'cluster.cancel()', 'dispy_send_file()'])
def test_a_line_that_does_not_work_is_found(line):
    with pytest.raises((AssertionError, AttributeError, TypeError)):
        test_a_line_of_the_table(line)


def test_nothing_is_missing():
    """Every parameter and method of a cluster, every attribute of a job, every name for jobs, every
    example."""
    words = set(re.findall(r'\w+', ' '.join(LINES)))
    old_names = {'callback', 'stats', 'shutdown', 'ip_addr', 'ext_ip_addr', 'ext_host',
                 'poll_interval', 'fault_recover', 'node_port', 'port', 'client_port', 'more'}
    shared = {'scheduler_host', 'scheduler_port', 'exclusive'}
    assert shared < set(inspect.signature(dispy.SharedJobCluster).parameters)
    wanted = {*inspect.signature(dispy.JobCluster).parameters, *shared, *OF_SUBMIT, *IN_JOBS,
              *(name for thing in (dispy.JobCluster, dispy.DispyJob)
                for name in vars(thing) if re.match('[a-z]', name)), 'DispyExecutor',
              'NodeAllocate', 'register_joblib'} - {'computation', 'finish'} - old_names
    assert wanted - words == set()
    shown = set(re.findall(r'\((\w+\.py)\)', ' '.join(example for _, _, example in ROWS)))
    assert shown == {name
                     for name in os.listdir(os.path.join(ROOT, 'examples')) if name.endswith('.py')}


def test_names_in_jobs_are_there():
    with dispy.JobCluster(lambda names: [name in vars(__import__('builtins')) for name in names],
                          nodes='local') as cluster:
        assert all(cluster.submit(list(IN_JOBS))(30))


# -- docstrings ------------------------------------------------------------------------------------

def test_every_public_name_says_what_it_is():
    things = [getattr(dispy, name) for name in dispy.__all__ if name != 'logger']
    things += [thing for owner in things if inspect.isclass(owner)
               for name, thing in vars(owner).items()
               if inspect.isfunction(thing) and not name.startswith('_')]
    assert [thing.__qualname__ for thing in things if not thing.__doc__] == []


@pytest.mark.parametrize('name',
                         [name for name in dispy.__all__ if inspect.isclass(getattr(dispy, name))])
def test_pydoc_shows_what_dispy_says(name):
    """And not what every tuple and every exception has."""
    text = pydoc.plaintext.document(getattr(dispy, name), name)
    assert 'inherited from builtins.' not in text and '__getattribute__' not in text
    for own in {'Recoverable': ('path', 'unreached'),
                'ClusterStatus': ('nodes', 'jobs_pending', 'refused', 'all_nodes'),
                'RemoteTraceback': ('tb',)}.get(name, ()):
        assert re.search(r'^ \|  %s\b' % own, text, re.M)


# SharedJobCluster's are those and a few
@pytest.mark.parametrize('thing', [dispy.JobCluster, dispy.NodeAllocate])
def test_every_parameter_is_explained(thing):
    assert set(inspect.signature(thing).parameters) <= set(re.findall(r'\w+', thing.__doc__))


def test_every_keyword_of_submit_is_explained():
    assert OF_SUBMIT <= set(re.findall(r'\w+', dispy.JobCluster.submit.__doc__))


def test_every_test_that_is_named_is_there():
    """The tables of faults: `file::test`, in tests/ or tests/faults/."""
    named = re.findall(r'`(test_\w+\.py)::(test_\w+)`', TEXTS['tests/README.md'])
    assert len(named) > 50
    for name, test in named:
        paths = [os.path.join(ROOT, 'tests', where, name) for where in ('unit', 'system', 'faults')]
        with open(next(filter(os.path.exists, paths))) as file:
            assert re.search(r'^def %s\(' % test, file.read(), re.M), (name, test)
