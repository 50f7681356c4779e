"""What a program has set in its modules reaches its jobs, as it reaches a forked process; what a
node has made its own stays."""

import os

import pytest

from programs import Project, somewhere

pytestmark = pytest.mark.long(together=True)   # most of them need `told`
KINDS = ['local', 'node', 'scheduler']

MODULES = dict(
    config='''
        N = 0
        RATIO = 0.5
        NAMES = ('a',)

        def get():
            return N
        ''',
    settings='''
        OPTS = {'a': 1, 'b': [1]}

        def option(name):
            return OPTS[name]
        ''',
    limits='''
        LIMIT = 10

        def over(n):
            return n > LIMIT
        ''',
    models='''
        import dataclasses
        import enum

        class Kind(enum.Enum):
            ROUND = 'round'
            SQUARE = 'square'

        class Model:
            depth = 1
            options = {}
            device = 'cpu'

            def __init__(self, kind=Kind.ROUND):
                self.kind = kind

            def get(self):
                return self.depth, self.options

        class Child(Model):
            pass

        @dataclasses.dataclass
        class Point:
            x: int
            y: int = 0

        POINT = Point(0)
        MODE = Kind.ROUND
        DEVICE = 'cpu'
        ''',
    spaces='''
        import types

        OPTIONS = types.SimpleNamespace(n=0, tags=[])
        ''',
    places='''
        import pathlib

        OUTPUT = pathlib.Path('.')
        ''',
    blobs='''
        DATA = None
        WORDS = None

        def size():
            return len(DATA)
        ''',
    registry='''
        HANDLERS = {}

        def handles(name):
            def note(function):
                HANDLERS[name] = function
                return function
            return note

        def handle(name, n):
            return HANDLERS[name](n)
        ''',
    plugins_b='''
        from registry import handles

        @handles('double')
        def double(n):
            return 2 * n
        ''',
    plugins_a='''
        import registry

        @registry.handles('square')
        def square(n):
            return n * n
        ''',
    first='''
        import second

        LEFT = [0]
        RIGHT = [0]
        ''',
    second='''
        SHARED = [0]
        ''',
    lists='''
        L = [1]
        D = {}

        class Holder:
            def __init__(self):
                self.items = []

        HOLDER = Holder()
        ''',
    user_of_lists='''
        from lists import D, HOLDER, L

        def seen():
            return L, D, HOLDER.items
        ''',
    uses_library='''
        import sys
        from os import environ
        from sys import path

        def same():
            import os
            return path is sys.path, environ is os.environ
        ''',
    connection='''
        _connection = None
        _connected = False
        RETRIES = 3

        def state():
            return _connection is None, _connected, RETRIES
        ''',
    dunder='''
        __version__ = '1'
        __author__ = 'nobody'
        PLAIN = 1
        ''',
    cached='''
        import functools

        @functools.lru_cache(maxsize=None)
        def square(n):
            return n * n

        def counters(n):
            square(n)
            info = square.cache_info()
            return info.hits + info.misses
        ''',
    more='''
        import datetime

        TODAY = datetime.date(2000, 1, 1)
        WHEN = None
        STEPS = []
        ''',
    late='''
        VALUE = 'at import'
        ''',
)

SCRIPT = '''
    import argparse
    import datetime
    import multiprocessing
    import pathlib
    import socket
    import sys

    import blobs
    import cached
    import config
    import connection
    import dunder
    import first
    import home
    import late
    import limits
    import lists
    import models
    import more
    import places
    import plugins_b
    import plugins_a
    import registry
    import second
    import settings
    import spaces
    import user_of_lists
    import uses_library

    FACTOR = 1

    def a_constant_under_the_guard():
        return config.N, config.get()

    def other_constants():
        return config.RATIO, config.NAMES, config.EXTRA

    def an_item_of_a_dict():
        return settings.OPTS, settings.option('a')

    def a_constant_of_a_function_of_the_module():
        return limits.over(5), limits.LIMIT

    def a_class_attribute():
        return models.Model.depth, models.Model().get(), models.Child().get(), models.Child.device

    def a_dataclass_instance():
        return models.POINT == models.Point(3, 4), isinstance(models.POINT,
                                                              models.Point), models.POINT.x

    def an_enum_member():
        return models.MODE is models.Kind.SQUARE, models.Model().kind is models.Kind.ROUND

    def a_namespace():
        return spaces.OPTIONS.n, spaces.OPTIONS.tags, spaces.OPTIONS.added

    def a_path():
        return str(places.OUTPUT), isinstance(places.OUTPUT, pathlib.Path)

    def two_mebibytes_over_none():
        return blobs.size(), blobs.DATA[:3].decode(), len(blobs.WORDS)

    def a_registry_that_a_module_fills_which_only_the_script_imports():
        return (list(registry.HANDLERS), registry.handle('double', 4), registry.handle('square', 4),
                registry.handle('own', 4))

    def one_list_under_two_names_and_in_two_modules():
        first.LEFT.append(9)
        seen = first.LEFT is first.RIGHT, first.LEFT is second.SHARED, list(second.SHARED)
        first.LEFT.pop()
        return seen

    def a_list_that_another_module_has_imported():
        return (user_of_lists.seen(), user_of_lists.L is lists.L, user_of_lists.D is lists.D,
                user_of_lists.HOLDER is lists.HOLDER)

    def names_from_the_file_of_the_module():
        with open(home.DATA) as file:
            return file.read(), home.NAME, home.ROOT.is_dir(), home.LEVEL

    def names_from_the_library():
        return uses_library.same(), uses_library.path is sys.path

    def dates_and_what_the_source_does_not_compute():
        return more.TODAY.isoformat(), more.WHEN.isoformat(), more.STEPS

    def two_underscores():
        return dunder.__version__, dunder.__author__, dunder.PLAIN

    def what_was_set_after_the_cluster_was_made():
        return late.VALUE

    def a_socket_over_none():
        return connection.state()

    def a_global_of_the_script():
        return FACTOR

    def where_the_file_is():
        return str(home.ROOT)

    def own(n):
        return 'own', n

    TOLD = [a_constant_under_the_guard, other_constants, an_item_of_a_dict,
            a_constant_of_a_function_of_the_module, a_class_attribute,
            a_dataclass_instance, an_enum_member, a_namespace, a_path, two_mebibytes_over_none,
            a_registry_that_a_module_fills_which_only_the_script_imports,
            one_list_under_two_names_and_in_two_modules, a_list_that_another_module_has_imported,
            names_from_the_file_of_the_module, names_from_the_library,
            dates_and_what_the_source_does_not_compute, a_global_of_the_script, two_underscores,
            what_was_set_after_the_cluster_was_made, a_socket_over_none, where_the_file_is]

    def change(args):
        global FACTOR
        FACTOR = args.n
        config.N = args.n
        config.RATIO, config.NAMES, config.EXTRA = 0.75, ('a',
                                                          'b'), {'set': {1, 2}.issubset({1, 2, 3})}
        settings.OPTS['a'] = 7
        settings.OPTS['b'].append(2)
        limits.LIMIT = 3
        models.Model.depth = 5
        models.Model.options['deep'] = [5]
        models.Child.device = 'gpu'
        models.POINT = models.Point(3, 4)
        models.MODE = models.Kind.SQUARE
        spaces.OPTIONS.n = 2
        spaces.OPTIONS.tags.append('t')
        spaces.OPTIONS.added = True
        places.OUTPUT = pathlib.Path('results') / 'today'
        blobs.DATA = b'abc' + bytes(2 << 20)
        blobs.WORDS = ['word %d' % n for n in range(200_000)]
        registry.HANDLERS['own'] = own
        first.LEFT = first.RIGHT = second.SHARED = [1, 2]
        lists.L.append(5)
        lists.D['key'] = 'value'
        lists.HOLDER.items.append('item')
        more.TODAY = datetime.date(2024, 2, 29)
        more.WHEN = datetime.datetime(2024, 2, 29, 12)
        more.STEPS.extend([1, (2, 3)])
        dunder.__version__ = '2'
        dunder.PLAIN = 2
        connection._connection = socket.socket()
        connection._connected = True
        connection.RETRIES = 5

    if __name__ == '__main__':
        import clusters
        parser = argparse.ArgumentParser()
        parser.add_argument('where')
        parser.add_argument('-n', type=int, default=0)
        args = parser.parse_args()
        change(args)
        with multiprocessing.get_context('fork').Pool(1) as pool:
            fork = {function.__name__: pool.apply(function) for function in TOLD}
        made = [(function, clusters.attempt(clusters.make_cluster, function)) for function in TOLD]
        late.VALUE = 'after the cluster was made'
        for function, cluster in made:
            seen = cluster if isinstance(cluster, str) else clusters.outcome(cluster.submit())
            clusters.show(**{function.__name__: [seen, fork[function.__name__]]})
            if cluster is not seen:
                cluster.close(terminate=True)
        with clusters.make_executor() as executor:
            for function in TOLD[:5]:
                future = executor.submit(function)
                seen = clusters.attempt(future.result, 20)
                clusters.show(**{'executor_' + function.__name__: [seen, fork[function.__name__]]})
    '''

AS_WITH_FORK = [
    'a_constant_under_the_guard', 'other_constants', 'an_item_of_a_dict',
    'a_constant_of_a_function_of_the_module', 'a_class_attribute',
    'a_dataclass_instance', 'an_enum_member', 'a_namespace', 'a_path', 'two_mebibytes_over_none',
    'a_registry_that_a_module_fills_which_only_the_script_imports',
    'one_list_under_two_names_and_in_two_modules',
    'a_list_that_another_module_has_imported', 'names_from_the_file_of_the_module',
    'names_from_the_library',
    'dates_and_what_the_source_does_not_compute', 'a_global_of_the_script',
    'executor_a_constant_under_the_guard', 'executor_other_constants',
    'executor_an_item_of_a_dict', 'executor_a_constant_of_a_function_of_the_module',
    'executor_a_class_attribute']


def project(directory, where):
    """The user's modules: those above, and a package that finds its data from its own file."""
    found = Project(directory, where)
    found.files(**MODULES)
    found.write('home/__init__.py', '''
        import pathlib

        ROOT = pathlib.Path(__file__).parent
        DATA = ROOT / 'data.txt'
        NAME = DATA.name
        LEVEL = 1
        ''')
    found.write('home/data.txt', 'the data')
    return found


@pytest.fixture(scope='module', params=KINDS)
def told(request, tmp_path_factory, all_places):
    """(kind of node, what the jobs and the forked process saw, stderr)"""
    program = project(tmp_path_factory.mktemp('state') / 'program', all_places.of(request.param))
    program.write('script.py', SCRIPT)
    done = program.run('script.py', '-n', '4', timeout=170)
    return request.param, done.values(), done.err, program.directory


@pytest.mark.parametrize('case', AS_WITH_FORK)
def test_jobs_see_what_the_program_has_set(told, case):
    seen, by_fork = told[1][case]
    assert seen == by_fork


def test_the_reference_is_what_the_program_has_set(told):
    """What fork gives is what these tests are about."""
    values = {name: by_fork for name, (_, by_fork) in told[1].items()}
    assert (values['a_constant_under_the_guard'] == [4, 4]
            and values['an_item_of_a_dict'] == [{'a': 7, 'b': [1, 2]}, 7])
    assert values['a_constant_of_a_function_of_the_module'] == [True, 3]
    assert values['two_mebibytes_over_none'] == [3 + (2 << 20), 'abc', 200_000]
    assert values['one_list_under_two_names_and_in_two_modules'] == [True, True, [1, 2, 9]]
    assert (values['a_list_that_another_module_has_imported']
            == [[[1, 5], {'key': 'value'}, ['item']], True, True, True])
    assert values['names_from_the_file_of_the_module'] == ['the data', 'data.txt', True, 1]
    assert values['names_from_the_library'] == [[True, True], True]


def test_names_of_two_underscores_stay_as_the_import_made_them(told):
    assert told[1]['two_underscores'][0] == ['1', 'nobody', 2]


def test_a_cluster_has_what_was_set_when_it_was_made(told):
    assert told[1]['what_was_set_after_the_cluster_was_made'][0] == 'at import'


def test_names_from_the_file_keep_the_value_of_the_node(told):
    """On the embedded node they are those of the program: its modules are imported from where they
    are."""
    kind, values, _, directory = told
    seen = values['where_the_file_is'][0]
    if kind == 'local':
        assert seen == os.path.join(directory, 'home')
    else:
        assert (os.path.isabs(seen) and os.path.basename(seen) == 'home'
                and not seen.startswith(directory))


def test_nothing_of_a_module_is_put_in_place_when_a_connection_cannot_be_carried(told):
    """A flag that says that there is a connection would lie; one warning names module and name."""
    _, values, err, _ = told
    assert values['a_socket_over_none'][0] == [True, False, 3]
    lines = [line for line in err.splitlines() if '_connection' in line]
    assert len(lines) == 1, err
    assert all(word in lines[0] for word
               in ('connection', '_connection', 'setup', 'register_pickle_by_value')), lines[0]


# -- what setup has set ----------------------------------------------------------------------------

SETUP = '''
    import clusters
    import config
    import models

    class Own:
        device = 'cpu'
        count = 0

        def __init__(self, n):
            self.n = n

    def load():
        config.N = 'of the node'
        models.DEVICE = 'device of the node'
        models.Model.device = 'set by setup'
        models.Model.made_by_setup = True
        Own.device = 'set by setup'
        Own.made_by_setup = True

    def compute(model, own):
        return (config.N, config.get(), models.DEVICE, models.Model.device, model.device,
                getattr(models.Model, 'made_by_setup', None), models.Model.depth, Own.device,
                own.device, getattr(Own, 'made_by_setup', None), own.n,
                isinstance(model, models.Model), isinstance(own, Own),
                model.kind is models.Kind.SQUARE)

    def changed(own):
        return own.device, own.count, Own.count

    if __name__ == '__main__':
        config.N = 'of the client'
        models.DEVICE = 'of the client'
        models.Model.device = Own.device = 'of the client'
        models.Model.depth = 8
        with clusters.make_cluster(compute, setup=load) as cluster:
            jobs = [cluster.submit(models.Model(models.Kind.SQUARE), Own(n)) for n in range(6)]
            clusters.show(jobs=[clusters.outcome(job) for job in jobs],
                          here=[Own.device, models.Model.device])
        Own.device = 'again of the client'
        with clusters.make_cluster(changed, setup=load) as cluster:
            found = [clusters.outcome(cluster.submit(Own(1)))]
            Own.count = 5
            found += [clusters.outcome(cluster.submit(Own(1))),
                      clusters.outcome(cluster.submit(Own(1)))]
        clusters.show(changed=found)
    '''


@pytest.fixture(params=KINDS)
def program(request, tmp_path, places):
    """A user's directory with the modules above."""
    found = project(tmp_path / 'program', places.of(request.param))
    found.kind = request.param
    return found


def test_what_setup_has_set_stays_over_jobs_that_bring_instances(program):
    program.write('script.py', SETUP)
    values = program.run().values()
    expected = ['of the node', 'of the node', 'device of the node', 'set by setup', 'set by setup',
                True, 8, 'set by setup', 'set by setup', True]
    assert values['jobs'] == [expected + [n, True, True, True] for n in range(6)]
    assert values['here'] == ['of the client', 'of the client']
    # what the client has changed since comes with the next job, and nothing else of the class
    assert values['changed'] == [['set by setup', 0, 0], ['set by setup', 5, 5],
                                 ['set by setup', 5, 5]]


def test_counters_of_lru_cache_go_on_from_job_to_job(program):
    program.write('script.py', '''
        import functools
        import os

        import cached
        import clusters

        @functools.lru_cache(maxsize=None)
        def own(n):
            return n + 1

        def compute(n):
            own(n)
            info = own.cache_info()
            return (os.getpid(), cached.counters(n), info.hits + info.misses, own(n),
                    cached.square(n))

        if __name__ == '__main__':
            with clusters.make_cluster(compute) as cluster:
                clusters.show(jobs=[clusters.outcome(cluster.submit(3)) for _ in range(12)])
        ''')
    calls = {}
    for pid, *rest in program.run().values()['jobs']:
        calls[pid] = number = calls.get(pid, 0) + 1
        assert rest == [1 + 2 * (number - 1), 1 + 2 * (number - 1), 4, 9]
    assert sum(calls.values()) == 12


# -- one class, wherever it comes from -------------------------------------------------------------

IDENTITY = '''
    import enum
    import pickle
    import sys

    import clusters
    import models

    class Size(enum.Enum):
        SMALL = 1

    class Shape:
        def __init__(self, n, size=Size.SMALL):
            self.n = n
            self.size = size

        def __eq__(self, other):
            return type(other) is type(self) and other.n == self.n

    HELD = Shape(1), models.Model(models.Kind.SQUARE)
    from_setup = None

    def load(*args):
        global from_setup
        from_setup = args or HELD

    def of(shape, model):
        import models as imported
        return (isinstance(shape, Shape), type(shape) is Shape, shape == Shape(shape.n),
                shape.size is Size.SMALL, isinstance(model, models.Model),
                type(model) is imported.Model, model.kind is models.Kind.SQUARE, imported is models,
                imported is sys.modules['models'],
                pickle.loads(pickle.dumps(model)).kind is models.Kind.SQUARE)

    def compute(shape, model):
        return of(shape, model), of(*HELD), of(*from_setup), shape, model, Shape, models.Kind.SQUARE

    def given():
        return Shape(7), models.Model(models.Kind.SQUARE)

    if __name__ == '__main__':
        options = ({} if clusters.MODE == 'local'
                   else {'setup_args': (Shape(2), models.Model(models.Kind.SQUARE))})
        depends = {'depends': [models]} if sys.argv[2:] == ['depends'] else {}
        with clusters.make_cluster(compute, setup=load, **options, **depends) as cluster:
            for _ in range(3):
                job = cluster.submit(Shape(3), models.Model(models.Kind.SQUARE))
                result = clusters.outcome(job)
                if isinstance(result, str):
                    clusters.show(failed=result)
                    break
                argument, held, setup, shape, model, cls, member = result
                clusters.show(argument=argument, held=held, setup=setup, result=of(shape, model),
                              classes=[cls is Shape, member is models.Kind.SQUARE,
                                       shape == Shape(3)])
        with clusters.make_executor() as executor:
            future = executor.submit(of, Shape(3), models.Model(models.Kind.SQUARE))
            clusters.show(executor=clusters.attempt(future.result, 20))
            future = executor.submit(given)
            found = clusters.attempt(future.result, 20)
            clusters.show(executor_result=found if isinstance(found, str) else of(*found))
    '''


@pytest.mark.parametrize('depends', ['', 'depends'])
def test_classes_and_enums_are_one_wherever_they_come_from(program, depends):
    """setup_args (on a node that is not embedded), arguments, globals and results; with the module
    in `depends`, too."""
    program.write('script.py', IDENTITY)
    command = ['script.py']
    done = program.run(*command) if not depends else Swapped(program).run(*command, depends)
    values = done.values()
    assert 'failed' not in values, values
    for name in ('argument', 'held', 'setup', 'result', 'executor', 'executor_result'):
        assert values[name] == [True] * 10, (name, values[name])
    assert values['classes'] == [True] * 3


class Swapped:
    """Runs a program whose first word is where it runs."""

    def __init__(self, program):
        self.program = program

    def run(self, script, *words):
        where, self.program.where = self.program.where, words[-1]
        try:
            return self.program.run(script, where, *words[:-1])
        finally:
            self.program.where = where


def test_recovered_results_are_of_the_classes_of_the_program(tmp_path):
    """The program ends by a kill while its job runs; the next one of the same script collects the
    result."""
    with somewhere('node', tmp_path / 'nodes') as where:
        program = project(tmp_path / 'program', where)
        program.write('script.py', '''
            import os
            import sys
            import time

            import clusters
            import dispy
            import models

            class Shape:
                def __init__(self, n):
                    self.n = n

            def compute(flag):
                while not os.path.exists(flag):
                    time.sleep(0.01)
                return Shape(5), models.Model(models.Kind.SQUARE)

            if __name__ == '__main__':
                if sys.argv[2] == 'first':
                    cluster = clusters.make_cluster(compute, recover_file='recover')
                    job = cluster.submit(os.path.abspath('flag'))
                    while job.status != job.Running:
                        time.sleep(0.01)
                    os._exit(0)
                found = []
                for job in dispy.recover_jobs('recover', timeout=30):
                    shape, model = job.result
                    found.append([isinstance(shape, Shape), shape.n, isinstance(
                        model, models.Model), model.kind is models.Kind.SQUARE])
                clusters.show(found=found)
            ''')
        assert Swapped(program).run('script.py', 'first').code == 0
        with open(os.path.join(program.directory, 'flag'), 'w'):
            pass
        values = Swapped(program).run('script.py', 'second').values()
    assert values['found'] == [[True, 5, True, True]]


def test_a_result_changes_nothing_in_the_class_of_the_program(program):
    program.write('script.py', '''
        import clusters
        import models

        class Own:
            level = 'of the client'

        def compute():
            Own.level = models.Model.device = 'of the job'
            Own.added = models.Model.added = True
            return Own(), models.Model()

        if __name__ == '__main__':
            with clusters.make_cluster(compute) as cluster:
                own, model = clusters.outcome(cluster.submit())
                clusters.show(seen=[Own.level, models.Model.device, hasattr(Own, 'added'),
                                    hasattr(models.Model, 'added'),
                                    type(own) is Own, type(model) is models.Model])
        ''')
    assert program.run().values()['seen'] == ['of the client', 'cpu', False, False, True, True]


def test_a_module_is_imported_on_the_node_in_the_order_of_the_program(program):
    program.files(order='NAMES = []\n', z_first="import order\norder.NAMES.append('z')\n",
                  a_second="import order\norder.NAMES.append('a')\n")
    program.write('script.py', '''
        import order
        import z_first
        import a_second
        import clusters

        def compute():
            return order.NAMES, z_first.order is order

        if __name__ == '__main__':
            with clusters.make_cluster(compute) as cluster:
                clusters.show(seen=clusters.outcome(cluster.submit()))
        ''')
    assert program.run().values()['seen'] == [['z', 'a'], True]
