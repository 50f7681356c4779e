"""A table of objects: whatever a program hands to a job is there what it is in a forked process.

Each cell is an object of objects/things.py in a role: as computation (a function that uses it as a
global variable; the object itself as the executor's call, and as the computation of a JobCluster),
as argument, as result, as what an exception carries. The objects are defined in the script, in a
module beside it, in a package, or in an editable install; the jobs run on the embedded node, on a
node in an empty directory, through a scheduler, or on a node of another minor version of Python.
Each cell is compared with what concurrent.futures.ProcessPoolExecutor with fork gives in the same
program or, where that cannot pickle the object, with what a call in the program itself gives.

    python tests/system/test_objects.py --print [PLACE-NODE...]
        prints the table by place and node
"""

import ast
import collections
import concurrent.futures
import fnmatch
import functools
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time

import pytest

if __name__ == '__main__':   # pytest finds the tools of the tests by itself
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from conftest import ROOT  # noqa: E402
from nodes import SchedulerProcess  # noqa: E402
from objects.driver import OWN_CLUSTERS  # noqa: E402
from programs import bare_node, make_venv, other_pythons  # noqa: E402

pytestmark = pytest.mark.long(together=True)   # they all need `tables`
VERSION = sys.version_info[:2]
PLACES = ['main', 'module', 'package', 'editable']
NODES = ['local', 'node', 'scheduler', 'other']
PAIRS = [(place, node) for node in NODES for place in PLACES]
# Functions go as source, not as arguments: many clusters; it is begun first
LONGEST = ('main', 'other')
# Those that are run without --long: each place and each kind of node once. Each object that is the
# computation of a cluster is that in one of them.
SHORT = [('main', 'node'), ('package', 'local'), ('editable', 'scheduler'), ('module', 'other')]
LIMIT = 0.05    # of the cells elsewhere than on the embedded node may differ, each for a reason

# What nothing but a forked process can have: a computation of __main__ that uses it is refused,
# with a text.
FORKED_ONLY = {'cmp_to_key', 'open_file', 'socket', 'generator', 'async_generator', 'shared_value',
               'process_lock', 'process_queue', 'process_event', 'instance_with_open_file', 'hash'}
if VERSION >= (3, 14):   # iterators of itertools cannot be pickled any more
    FORKED_ONLY.add('count')
# What pickle refuses for good reason: as argument, result and in an exception it is refused here
# too, with a text.
REFUSED = FORKED_ONLY | {'lock', 'rlock', 'condition', 'event', 'semaphore', 'queue',
                         'simple_queue', 'thread_local', 'own_thread_local', 'thread', 'context',
                         'future', 'weak_reference', 'hash', 'match', 'dict_view', 'library'}
# (place, node, object, role, why it may fail there, with a text; a wrong value is never allowed),
# as patterns
EXPECTED = [
    ('*', 'other', 'numpy_*', '*', 'numpy is not installed on that node'),
    ('*', 'other', 'code', '*', 'code objects are of one minor version of Python'),
    ('*', 'other', 'function_of_exec', '*',
     'code that was made at run time is of one minor version of Python'),
    ('*', 'other', 'module_made_here', '*',
     'code that was made at run time is of one minor version of Python'),
    ('*', 'other', 'type_of_type', '*', 'a class that is made by a call has no source'),
    ('*', 'other', 'argument_parser', '*',
     'it holds a function of the standard library, whose source is another one there'),
    ('main', 'other', '*', '*',
     'functions of __main__ go as source, which gives those at the top level with plain constants'),
    ('main', 'other', '*', 'computation',
     'source of __main__ gives no global variables but plain constants'),
    ('main', 'other', '*closure*', '*', 'source of __main__ gives no closures'),
    ('main', 'other', '*lambda*', '*', 'source of __main__ gives no lambdas'),
    ('main', 'other', 'local_*', '*',
     'source of __main__ gives nothing that is defined inside of a function'),
    ('main', 'other', '*', 'call',
     'source of __main__ gives functions at the top level of its file only'),
    ('main', 'other', '*', 'cluster',
     'source of __main__ gives functions at the top level of its file only'),
]

# What the source of __main__ is known not to give: it is not grouped with others, see `groups`.
HARD = set('named_lambda namedtuple functional_enum sentinel_by_name '
           'default_is_a_sentinel plain_object sentinel_by_class typevar generic_class '
           'generic_instance generic_alias_of_own subclass_of_generic '
           'newtype paramspec decorated_with_paramspec thread_local context_variable '
           'class_with_weak_registry function_of_a_library library registered '
           'function_of_globals function_with_lock own_module ' 'module_in_a_container'.split())
GROUP = 24   # objects in a function
# Scripts that the objects are distributed to there: every class of a script goes along with each
# computation
PARTS = 8

Cell = collections.namedtuple('Cell', 'name role verdict expected actual why')


# -- the user's programs ---------------------------------------------------------------------------

def blocks(text, version, modules):
    """The text without the blocks that need a newer Python or a module that is not there."""
    kept, skipping = [], []
    for line in text.splitlines():
        since = re.match(r'#: since 3\.(\d+)', line)
        needs = re.match(r'#: needs (\w+)', line)
        if since:
            skipping.append(version < (3, int(since.group(1))))
        elif needs:
            skipping.append(needs.group(1) not in modules)
        elif line == '#: end':
            skipping.pop()
        elif not any(skipping):
            kept.append(line)
    assert not skipping
    return '\n'.join(kept) + '\n'


def things(version, modules, common, parent, part=None):
    """The text of a copy of things.py; `common` is imported from `parent` (or is a top-level
    module). `part` is a number: this one of PARTS of the objects alone."""
    with open(os.path.join(ROOT, 'tests', 'objects', 'things.py')) as file:
        text = blocks(file.read(), version, modules)
    whole = ('from %s import %s as common_module' % (parent, common) if parent
             else 'import %s as common_module' % common)
    text = text.replace('import COMMON as common_module', whole)
    text = text.replace('from COMMON import', 'from %s import'
                        % ((parent.rstrip('.') + '.' if parent.strip('.') else parent) + common))
    if part is not None:
        text = sliced(text, re.findall(r'^def make_(\w+)', text, re.MULTILINE)[part::PARTS])
    for name in re.findall(r'^def make_(\w+)', text, re.MULTILINE):
        text += textwrap.dedent('''

            held_{0} = make_{0}()
            def use_{0}():
                return probe_{0}(held_{0})
            def all_{0}(role, *things):
                return in_role(role, probe_{0}, make_{0}, *things)
            ''').format(name)
    return text + textwrap.dedent('''

        def in_role(role, probe, make, *things):
            return caller(role, probe if things else make, *things)


        def caller(role, function, *things):
            """The computation of the cluster for arguments, results and exceptions."""
            if role == 'exception':
                raise ValueError(function())
            if role == 'raised':
                raise function()
            return function(*things)
        ''')


def sliced(text, names):
    """The imports and what these objects need of the text: statements that give names which others
    use, and those that change or register something that is used."""
    lines, statements = text.splitlines(), []
    wanted = {kind + name for kind in ('make_', 'probe_', 'call_') for name in names}
    for node in ast.parse(text).body:
        used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)
                and isinstance(part.ctx, ast.Load)}
        given = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)
                 and isinstance(part.ctx, ast.Store)}
        given = {node.name} if hasattr(node, 'name') else given
        decorators = [part.func.value for part in getattr(node, 'decorator_list', ())
                      if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute)]
        if decorators or not given:   # what it works on comes first
            first = (decorators
                     or [part for part in ast.walk(node) if isinstance(part, ast.Name)][:2])
            given = ({part.id for part in first if isinstance(part, ast.Name)}
                     - {'copyreg', 'functools', 'typing'} | given)
        statements.append((node, given, used))
    kept, before = set(), -1
    while len(kept) != before:
        before = len(kept)
        for number, (node, given, used) in enumerate(statements):
            if number not in kept and (given & wanted
                                       or isinstance(node, (ast.Import, ast.ImportFrom))):
                kept.add(number)
                wanted |= used
    return '\n\n\n'.join('\n'.join(lines[min([part.lineno for part in getattr(
        node, 'decorator_list', ())] + [node.lineno]) - 1:node.end_lineno])
                         for number, (node, _, _) in enumerate(statements) if number in kept) + '\n'


def groups(text):
    """Functions that each stand for all roles of many objects; where these travel as source, a
    cluster an object takes too long. The role of the computation is in them where the object is a
    function or class at the top level of the file."""
    named = set(re.findall(r'^(?:async def|def|class) (\w+)', text, re.MULTILINE))
    names = [name for name in re.findall(r'^def make_(\w+)', text, re.MULTILINE)
             if name not in HARD | FORKED_ONLY]
    held = dict(re.findall(r'^def make_(\w+)\(\):\n    return (\w+)\n', text, re.MULTILINE))
    text = ''
    for number in range(0, len(names), GROUP):
        text += '\n\ndef group_%d(name, role, *things):\n' % (number // GROUP)
        for name in names[number:number + GROUP]:
            text += '    if name == %r:\n' % name
            if held.get(name) in named:
                text += '        if role == "computation":\n            return use_%s()\n' % name
            text += '        return in_role(role, probe_{0}, make_{0}, *things)\n'.format(name)
    return text


SCRIPT = '''
if __name__ == '__main__':
    import objects_driver
    objects_driver.main(%s)
'''


class Program:
    """A program of the user's whose objects are defined in `place`: `run(mode, ...)` gives the
    cells."""

    def __init__(self, directory, place, version, modules, part=None):
        self.directory = str(directory)
        self.place = place
        self.part = part
        self.python = sys.executable
        self.script = os.path.join(self.directory, 'script.py')
        self._write('objects_driver.py', self._read('driver.py'))
        getattr(self, '_in_' + place)(functools.partial(things, version, modules))

    def _in_main(self, text):
        self._write('objects_common.py', self._read('common.py'))
        text = text('objects_common', '', self.part)
        self._write('script.py',
                    text + (groups(text) if self.part is not None else '') + SCRIPT % 'globals()')

    def _in_module(self, text):
        self._write('objects_common.py', self._read('common.py'))
        self._write('objects_module.py', text('objects_common', ''))
        self._write('script.py', 'import objects_module\n' + SCRIPT % 'vars(objects_module)')

    def _in_package(self, text):
        self._write('objects_package/__init__.py', '"""A package of the user\'s."""\n')
        self._write('objects_package/common.py', self._read('common.py'))
        self._write('objects_package/inner/__init__.py', '')
        self._write('objects_package/inner/things.py', text('common', '..'))
        self._write('script.py',
                    'from objects_package.inner import things\n' + SCRIPT % 'vars(things)')

    def _in_editable(self, text):
        """As `pip install --editable` leaves it: a .pth file and metadata, and the source
        elsewhere."""
        source = os.path.join(self.directory, 'project', 'src')
        for name, content in (('__init__.py', ''), ('common.py', self._read('common.py')),
                              ('things.py', text('common', 'objects_editable'))):
            self._write(os.path.join(source, 'objects_editable', name), content)
        self.python = make_venv(os.path.join(self.directory, 'venv'), sys.executable)
        site = subprocess.check_output([self.python, '-c', 'import sysconfig; '
                                        'print(sysconfig.get_path("purelib"))']).decode().strip()
        self._write(os.path.join(site, '_others.pth'), sysconfig.get_path('purelib') + '\n')
        self._write(os.path.join(site, '__editable__.objects_editable-1.0.pth'), source + '\n')
        metadata = os.path.join(site, 'objects_editable-1.0.dist-info')
        self._write(os.path.join(metadata, 'METADATA'),
                    'Metadata-Version: 2.1\nName: objects-editable\nVersion: 1.0\n')
        self._write(os.path.join(metadata, 'INSTALLER'), 'pip\n')
        self._write(os.path.join(metadata, 'top_level.txt'), 'objects_editable\n')
        self._write(os.path.join(metadata, 'direct_url.json'), json.dumps(
            {'dir_info': {'editable': True}, 'url': 'file://' + os.path.dirname(source)}))
        self._write(os.path.join(metadata, 'RECORD'), ''.join(name + ',,\n' for name in (
            '__editable__.objects_editable-1.0.pth',
            *('objects_editable-1.0.dist-info/' + name for name in
              ('METADATA', 'INSTALLER', 'top_level.txt', 'direct_url.json', 'RECORD')))))
        self._write('program/objects_driver.py', self._read('driver.py'))
        self.script = os.path.join(self.directory, 'program', 'script.py')
        self._write(self.script, 'from objects_editable import things\n' + SCRIPT % 'vars(things)')

    @staticmethod
    def _read(name):
        with open(os.path.join(ROOT, 'tests', 'objects', name)) as file:
            return file.read()

    def _write(self, name, text):
        path = os.path.join(self.directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'w') as file:
            file.write(text)

    def run(self, mode, *ports, clusters=(0, 1)):
        """(cells, seconds). `clusters`: the first of the objects that are the computation of a
        cluster of their own, and the step to the next."""
        output = os.path.join(self.directory, '-'.join(['cells', mode, *map(str, ports)]))
        began = time.monotonic()
        done = subprocess.run([self.python, self.script, output, mode, *map(str, ports)],
                              cwd=os.path.dirname(self.script), timeout=400,
                              env=dict(os.environ, OBJECTS_CLUSTERS='%d:%d' % clusters),
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout.decode(errors='replace')[-3000:]
        with open(output) as file:
            return json.load(file), time.monotonic() - began


def other_version():
    """(Python, version) of another minor version, a newer one if there is one; None if there is
    none."""
    versions = {tuple(map(int, version.split('.'))): python
                for version, python in other_pythons().items()}
    newer = sorted(version for version in versions if version > VERSION)
    older = sorted(version for version in versions if version < VERSION)
    if not newer and not older:
        return None
    version = newer[0] if newer else older[-1]
    return versions[version], version


def own_modules():
    """Which of the modules that blocks need are here."""
    found = set()
    for name in ('numpy', 'zoneinfo'):
        try:
            __import__(name)
            found.add(name)
        except ImportError:
            continue
    return found


# -- running and comparing -------------------------------------------------------------------------

class Tables:
    """Runs pairs of place and node, two at a time, and holds what came of each. Unless they are run
    `whole`, they share out the clusters that single objects have."""

    def __init__(self, directory, pairs, whole=True):
        self.directory = str(directory)
        self.other = other_version()
        self._clusters = {pair: (0, 1) if whole else (SHORT.index(pair), len(SHORT))
                          for pair in pairs}
        pairs = [pair for pair in pairs if pair[1] != 'other' or self.other]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            places = sorted({place for place, _ in pairs}, key=PLACES.index)
            references = {place: pool.submit(self._reference, place) for place in places}
            found = {pair: pool.submit(self._run, *pair)
                     for pair in sorted(pairs, key=LONGEST.__ne__)}
            self.references = {place: future.result()[0] for place, future in references.items()}
            self.found = {pair: found[pair].result() for pair in pairs}

    def _programs(self, place, node):
        """One, or as many as there are parts."""
        version, modules = VERSION, own_modules()
        if node == 'other':
            version = min(version, self.other[1])
            modules = modules - {'numpy'}
        directory = os.path.join(self.directory, place + '-' + node)
        if (place, node) != LONGEST:
            return [Program(directory, place, version, modules)]
        return [Program('%s-%d' % (directory, part), place, version, modules, part)
                for part in range(PARTS)]

    def _reference(self, place):
        return self._programs(place, 'reference')[0].run('reference')

    def _run(self, place, node):
        programs = self._programs(place, node)
        directory = os.path.join(self.directory, 'nodes', place + '-' + node)
        clusters = self._clusters[place, node]
        if node == 'local':
            return programs[0].run('local', clusters=clusters)
        python = sys.executable
        if node == 'other':
            python = make_venv(directory + '-venv', self.other[0])
        with bare_node(directory, python=python) as daemon:
            if node == 'scheduler':
                with SchedulerProcess(directory + '-scheduler', '-n',
                                      '127.0.0.1:%d' % daemon.port) as scheduler:
                    return programs[0].run('scheduler', scheduler.port, daemon.port,
                                           clusters=clusters)
            cells, seconds = {}, 0
            for program in programs:
                found, took = program.run(node, daemon.port, clusters=clusters)
                cells.update(found)
                seconds += took
            return cells, seconds

    def cells(self, place, node):
        found = self.found[place, node][0]
        rows = []
        first, step = self._clusters[place, node]
        elsewhere = set(OWN_CLUSTERS) - set(OWN_CLUSTERS[first::step])
        for key, (kind, value, _, obstacle) in self.references[place].items():
            name, role = key.split('/')
            if role == 'cluster' and name in elsewhere:
                continue
            actual = found.get(key)
            if actual is None and node == 'other':
                actual = ['absent', 'left out of the program for this node']
            verdict, why = judge(place, node, name, role, [kind, value], actual, obstacle)
            rows.append(Cell(name, role, verdict, [kind, value], actual, why))
        return rows


def judge(place, node, name, role, expected, actual, obstacle):
    """'equal', 'allowed' or 'differs', and why."""
    if actual == expected:
        return 'equal', ''
    if role in ('argument', 'result', 'exception') and name in REFUSED and obstacle and is_refusal(
            role, actual):
        return 'equal', 'refused, as by pickle: ' + obstacle
    refused = is_refusal('argument', actual) or is_refusal('call', actual)
    # An executor tells by the future
    if (place == 'main' and name in FORKED_ONLY
            and role in ('computation', 'call', 'cluster') and refused):
        return 'allowed', 'nothing but a forked process can have it'
    if node != 'local' and actual and actual[0] in ('refused', 'failed', 'absent',
                                                    'silent') and len(actual[1]) > 20:
        for pattern in EXPECTED:
            if all(fnmatch.fnmatchcase(what, part)
                   for what, part in zip((place, node, name, role), pattern)):
                return 'allowed', pattern[4]
    return 'differs', ''


def is_refusal(role, actual):
    """Whether the user was told, where it can be told: by the constructor or submit, or by the end
    of the job that made it."""
    kind = 'refused' if role == 'argument' else 'failed'
    return actual[0] == kind and len(actual[1].strip()) > 20 if actual else False


def report(cells):
    """Lines that list each cell that differs, with both values."""
    return ['%s as %s: expected %s, got %s'
            % (cell.name, cell.role, shorten(cell.expected), shorten(cell.actual)) for cell in cells
            if cell.verdict == 'differs']


def shorten(found, most=240):
    if found is None:
        return 'nothing'
    text = ' '.join(str(found[1]).split())
    return '%s %s' % (found[0], text if len(text) <= most else '...' + text[-most:])


# -- tests -----------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def tables(request, tmp_path_factory):
    """The pairs that were asked for, all run."""
    wanted = {item.callspec.params['pair'] for item in request.session.items
              if 'pair' in getattr(getattr(item, 'callspec', None), 'params', {})}
    whole = request.config.getoption('--long')
    return Tables(tmp_path_factory.mktemp('objects'),
                  [pair for pair in PAIRS if pair in wanted and (whole or pair in SHORT)], whole)


@pytest.fixture
def cells(request, tables, pair):
    if pair not in SHORT and not request.config.getoption('--long'):
        pytest.skip('with --long')
    if pair not in tables.found:
        pytest.skip('no Python of another minor version was found')
    return tables.cells(*pair)


@pytest.mark.fork('setup makes an object of multiprocessing that only forked processes share')
@pytest.mark.parametrize('pair', PAIRS, ids='-'.join)
def test_objects_are_what_they_are_in_a_forked_process(cells, pair):
    lines = report(cells)
    assert not lines, '%d of %d cells differ:\n%s' % (len(lines), len(cells), '\n'.join(lines))


def test_the_reference_is_complete(tables):
    """As many objects as promised, each in each role, and no cell of the reference is an error."""
    for place, cells in tables.references.items():
        roles = collections.defaultdict(set)
        for key, found in cells.items():
            name, role = key.split('/')
            roles[name].add(role)
            assert found[0] == 'value', '%s of %s: %s' % (key, place, found)
        assert len(roles) >= 144
        assert all({'computation', 'argument', 'result', 'exception'} <= of_one
                   for of_one in roles.values())


@pytest.mark.fork('the same')
def test_few_cells_differ_elsewhere(tables):
    """Of those that are allowed to, by reason, elsewhere than on the embedded node."""
    elsewhere = [cell for place, node in tables.found if node != 'local'
                 for cell in tables.cells(place, node)]
    other = [cell for cell in elsewhere if cell.verdict != 'equal']
    assert len(other) <= LIMIT * len(elsewhere), '%d of %d' % (len(other), len(elsewhere))


def print_tables(wanted):
    """The table by place and node: how many cells are equal, allowed and differing; then those that
    are not equal."""
    pairs = [pair for pair in PAIRS if not wanted or '-'.join(pair) in wanted]
    with tempfile.TemporaryDirectory(prefix='objects-') as directory:
        tables = Tables(directory, pairs)
    total = collections.Counter()
    print('%-10s %-10s %7s %7s %8s %8s %8s'
          % ('place', 'node', 'cells', 'equal', 'allowed', 'differs', 'seconds'))
    for pair in tables.found:
        cells = tables.cells(*pair)
        count = collections.Counter(cell.verdict for cell in cells)
        total.update(count)
        print('%-10s %-10s %7d %7d %8d %8d %8.1f'
              % (*pair, len(cells), count['equal'], count['allowed'], count['differs'],
                 tables.found[pair][1]))
    print('%-21s %7d %7d %8d %8d'
          % ('all', sum(total.values()), total['equal'], total['allowed'], total['differs']))
    for pair in tables.found:
        cells = tables.cells(*pair)
        print('\n%s: %d differ'
              % ('-'.join(pair), sum(cell.verdict == 'differs' for cell in cells)))
        for line in report(cells):
            print('  ' + line)
        for cell in cells:
            if cell.verdict == 'allowed':
                print('  %s as %s may differ: %s; %s'
                      % (cell.name, cell.role, cell.why, shorten(cell.actual)))


if __name__ == '__main__':
    print_tables([word for word in sys.argv[1:] if not word.startswith('-')])
