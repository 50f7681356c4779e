"""Modules of the user's travel as files and are imported by their name; what has no importable
module travels by value."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap

import pytest

import dispy
from conftest import eventually
from programs import Project, bare_node, make_venv, somewhere

KINDS = ['local', 'node', 'scheduler']


@pytest.fixture(params=KINDS)
def program(request, tmp_path, places):
    """A user's directory, for each kind of node."""
    found = Project(tmp_path / 'program', places.of(request.param))
    found.kind = request.param
    return found


@pytest.fixture
def on_node(tmp_path, places):
    """A user's directory, for a bare node."""
    return Project(tmp_path / 'program', places.of('node'))


@pytest.fixture
def on_local(tmp_path):
    """A user's directory, for the embedded node."""
    return Project(tmp_path / 'program')


ONE_JOB = '''
    {imports}
    import clusters

    def compute(*args):
        {body}

    if __name__ == '__main__':
        with clusters.make_cluster(compute) as cluster:
            clusters.show(seen=clusters.outcome(cluster.submit()))
    '''


def one_job(imports, body):
    """A script with one job."""
    return textwrap.dedent(ONE_JOB).format(
        imports=textwrap.dedent(imports).strip(),
        body=textwrap.dedent(body).strip().replace('\n', '\n    '))


# -- what travels ----------------------------------------------------------------------------------

def test_a_module_beside_the_script(program):
    program.files(helper='import threading\n\n_lock = threading.Lock()\nN = 3\n\n\ndef triple(n):\n'
                  '    with _lock:\n        return N * n\n')
    program.write('script.py', one_job('import sys, helper', 'return helper.triple(4), '
                                       'helper.__name__, sys.modules["helper"] is helper'))
    assert program.run().values()['seen'] == [12, 'helper', True]


def test_a_package_with_data_read_at_import(program):
    program.write('pkg/__init__.py', '''
        import os
        with open(os.path.join(os.path.dirname(__file__), 'data', 'words.txt')) as file:
            WORDS = file.read().split()
        ''')
    program.write('pkg/data/words.txt', 'one two')
    program.write('pkg/data/.hidden', 'hidden')
    program.write('pkg/sub/__init__.py', '')
    program.write('pkg/sub/deep.py', '''
        import importlib.resources
        import pkgutil
        from .. import WORDS
        from ..other import double
        TEXT = pkgutil.get_data('pkg', 'data/words.txt').decode()
        read = getattr(importlib.resources, 'files', None)
        RESOURCE = (read('pkg') / 'data' / 'words.txt').read_text() if read else TEXT
        ''')
    program.write('pkg/other.py', 'def double(n):\n    return 2 * n\n')
    program.write('script.py', one_job('from pkg.sub import deep', 'return deep.WORDS, '
                                       'deep.TEXT, deep.RESOURCE, deep.double(4), deep.__name__'))
    assert program.run().values()['seen'] == [['one', 'two'], 'one two', 'one two', 8,
                                              'pkg.sub.deep']


def test_hidden_files_and_compiled_code_stay_at_home(on_node):
    on_node.write('pkg/__init__.py', 'import os\nHERE = os.path.dirname(__file__)\n')
    on_node.write('pkg/data.txt', 'data')
    on_node.write('pkg/.hidden', 'hidden')
    on_node.write('pkg/__pycache__/left.pyc', 'left')
    on_node.write('script.py',
                  one_job('import os, pkg', 'return [os.path.exists(os.path.join(pkg.HERE, '
                          'name)) for name in ("data.txt", ".hidden", "__pycache__/left.pyc")]'))
    assert on_node.run().values()['seen'] == [True, False, False]


def test_a_namespace_package(program):
    program.write('part_one/space/first.py', 'N = 1\n')
    program.write('part_two/space/second.py', 'from space import first\nN = first.N + 1\n')
    program.write('script.py', 'import sys\nsys.path[:0] = ["part_one", "part_two"]\n'
                  + one_job('import space.second',
                            'import space.first\nreturn space.second.N, space.first.N, '
                            'space.__file__ if hasattr(space, "__file__") else None'))
    assert program.run().values()['seen'] == [2, 1, None]


def test_an_extension_module_of_the_users(program):
    compiler = shutil.which('cc') or shutil.which('gcc')
    include = sysconfig.get_path('include')
    if not compiler or not os.path.exists(os.path.join(include, 'Python.h')):
        pytest.skip('no compiler for extension modules')
    program.write('fast.c', '''
        #include <Python.h>
        static PyObject *twice(PyObject *self, PyObject *n) {
            return PyLong_FromLong(2 * PyLong_AsLong(n));
        }
        static PyMethodDef methods[] = {{"twice", twice, METH_O, ""}, {0}};
        static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "fast", "", -1, methods};
        PyMODINIT_FUNC PyInit_fast(void) { return PyModule_Create(&module); }
        ''')
    target = os.path.join(program.directory, 'fast' + sysconfig.get_config_var('EXT_SUFFIX'))
    subprocess.run([compiler, '-shared', '-fPIC', '-I', include,
                    os.path.join(program.directory, 'fast.c'), '-o', target], check=True)
    program.write('script.py', one_job('import fast', 'return fast.twice(4), fast.__name__'))
    assert program.run().values()['seen'] == [8, 'fast']


def test_modules_that_are_imported_inside_of_functions_and_conditions(program):
    program.files(lower='N = 1\n', middle='def get():\n    import lower\n    return lower.N\n',
                  chosen='N = 5\n', upper='import sys\nif sys.version_info > (3,):\n'
                  '    import chosen\nelse:\n    import no_such_module_at_all\n')
    program.write('script.py',
                  one_job('import middle, upper', 'return middle.get(), upper.chosen.N'))
    assert program.run().values()['seen'] == [1, 5]


def test_a_module_that_is_imported_by_a_computed_name_while_the_job_runs(program):
    """It is asked of the client."""
    program.files(plugin_a='NAME = "a"\n', plugin_b='import plugin_a\nNAME = "b" + plugin_a.NAME\n')
    program.write('script.py', one_job('import importlib', '''
        found = [importlib.import_module("plugin_" + name).NAME for name in "ab"]
        try:
            importlib.import_module("no_such_" + "module")
        except ModuleNotFoundError as exc:
            found.append(exc.name)
        return found'''))
    assert program.run().values()['seen'] == ['a', 'ba', 'no_such_module']


def test_a_module_of_which_only_an_argument_knows(program):
    program.files(shapes='class Shape:\n    def __init__(self, n):\n        self.n = n\n'
                  '    def area(self):\n        return self.n ** 2\n')
    program.write('script.py', '''
        import clusters

        def compute(shape):
            import shapes
            return shape.area(), isinstance(shape, shapes.Shape), shape

        if __name__ == '__main__':
            with clusters.make_cluster(compute) as cluster:
                import shapes
                area, same, shape = clusters.outcome(cluster.submit(shapes.Shape(3)))
                clusters.show(seen=[area, same, type(shape) is shapes.Shape])
        ''')
    assert program.run().values()['seen'] == [9, True, True]


def test_two_computations_with_modules_of_one_name_do_not_see_each_other(tmp_path):
    """On one node, at the same time."""
    with somewhere('node', tmp_path / 'nodes') as where:
        seen = {}
        for name in ('first', 'second'):
            other = Project(tmp_path / name, where)
            other.files(helper='NAME = %r\n' % name)
            other.write('script.py', one_job(
                'import helper', 'import helper as again\nreturn helper.NAME, again.NAME'))
            seen[name] = other.run().values()['seen']
        assert seen == {'first': ['first', 'first'], 'second': ['second', 'second']}
        both = Project(tmp_path / 'both', where)
        both.files(**{'one/helper': 'NAME = "one"\n', 'two/helper': 'NAME = "two"\n'})
        both.write('script.py', '''
            import importlib
            import sys
            import clusters

            def name():
                import helper
                return helper.NAME

            if __name__ == '__main__':
                made = []
                for directory in ('one', 'two'):
                    sys.path.insert(0, directory)
                    sys.modules.pop('helper', None)
                    importlib.invalidate_caches()
                    import helper
                    made.append(clusters.make_cluster(name, depends=[helper]))
                clusters.show(seen=[clusters.outcome(cluster.submit()) for cluster in made + made])
                for cluster in made:
                    cluster.close()
            ''')
        assert both.run().values()['seen'] == ['one', 'two', 'one', 'two']


def test_the_script_itself_never_runs_on_a_node(program):
    """Nor in children of a job: it has no main guard here."""
    program.files(helper='def get():\n    return 1\n')
    program.write('script.py', '''
        import multiprocessing
        import os
        import sys
        import helper
        import clusters

        with open(sys.argv[2], 'a') as file:
            file.write('ran\\n')

        def square(n):
            return n * n

        def compute():
            with multiprocessing.get_context('spawn').Pool(1) as pool:
                return helper.get(), pool.map(square, [3])

        with clusters.make_cluster(compute) as cluster:
            clusters.show(seen=clusters.outcome(cluster.submit()))
        ''')
    flag = os.path.join(program.directory, 'flag')
    where, program.where = program.where, flag
    assert program.run('script.py', where).values()['seen'] == [1, [9]]
    with open(flag) as file:
        assert file.read() == 'ran\n'


# -- what cannot be imported there -----------------------------------------------------------------

MISSING = dict({
    'vendor/not_there_1.py': 'N = 1\n',
    'vendor/not_there_1-1.0.dist-info/METADATA': 'Metadata-Version: 2.1\nName: not-there-1\n'
    'Version: 1.0\n',
    'vendor/not_there_1-1.0.dist-info/RECORD': 'not_there_1.py,,\n'
    'not_there_1-1.0.dist-info/METADATA,,\nnot_there_1-1.0.dist-info/RECORD,,\n',
    'pkg/__init__.py': '',
    'pkg/plots.py': 'import not_there_1\n\ndef plot(n):\n    return not_there_1.N * n\n',
    'pkg/tries.py': 'try:\n    import not_there_1\nexcept ImportError:\n    not_there_1 = None\n\n'
    'def get():\n    return not_there_1 is None\n\ndef needs():\n    import not_there_1\n'
    '    return not_there_1.N\n'})


def with_missing(found):
    """A package of the user's that imports what is installed at the client alone."""
    for name, text in MISSING.items():
        found.write(name, text)
    return {'PYTHONPATH': os.pathsep.join([os.path.join(found.directory, 'vendor'),
                                           os.environ['PYTHONPATH']])}


def test_a_module_that_imports_a_missing_package(on_node):
    """The refusal names the chain and the remedies; the jobs end at once."""
    env = with_missing(on_node)
    on_node.write('script.py', '''
        import clusters
        import dispy
        import logging
        import pkg.plots

        def compute(n):
            return pkg.plots.plot(n)

        if __name__ == '__main__':
            with clusters.make_cluster(compute, loglevel=logging.CRITICAL) as cluster:
                job = cluster.submit(1)
                clusters.show(ended=job.wait(20), status=job.status == job.Terminated,
                              text=job.exception)
                try:
                    cluster.wait_nodes(1, 20)
                except dispy.NoNodes as exc:
                    clusters.show(no_nodes=str(exc))
                job = cluster.submit(2)
                clusters.show(later=[job.wait(20), job.status == job.Terminated])
                cluster.close(terminate=True)
        ''')
    values = on_node.run(env=env).values()
    assert values['ended'] and values['status'] and values['later'] == [True, True]
    for text in (values['text'], values['no_nodes']):
        assert ('compute -> pkg -> pkg.plots -> not_there_1' in text
                or 'compute -> pkg.plots -> not_there_1' in text), text
        assert ('install' in text and 'pip install' in text
                and 'cloudpickle.register_pickle_by_value(pkg)' in text), text
        assert 'depends' not in text, text   # what is installed here is to be installed there


def test_what_a_module_only_tries_to_import_may_be_missing(on_node):
    """The job that needs it fails, with the remedy."""
    env = with_missing(on_node)
    on_node.write('script.py', '''
        import clusters
        import pkg.tries

        def compute(need):
            return pkg.tries.needs() if need else pkg.tries.get()

        if __name__ == '__main__':
            with clusters.make_cluster(compute) as cluster:
                clusters.show(tried=clusters.outcome(cluster.submit(False)),
                              needed=clusters.outcome(cluster.submit(True)))
        ''')
    values = on_node.run(env=env).values()
    assert values['tried'] is True
    assert ('status 9' in values['needed'] and 'not_there_1' in values['needed']
            and 'install' in values['needed'])


def test_what_comes_with_an_argument_refuses_no_node(on_node):
    env = with_missing(on_node)
    on_node.write('script.py', '''
        import clusters

        def compute(function, *args):
            return function(*args)

        if __name__ == '__main__':
            with clusters.make_cluster(compute) as cluster:
                import pkg.plots
                clusters.show(plain=clusters.outcome(cluster.submit(len, 'abc')),
                              missing=clusters.outcome(cluster.submit(pkg.plots.plot, 1)),
                              after=clusters.outcome(cluster.submit(len, 'abcd')))
            with clusters.make_executor() as executor:
                future = executor.submit(pkg.plots.plot, 1)
                error = future.exception(20)
                clusters.show(future=[type(error).__name__, str(error)])
        ''')
    values = on_node.run(env=env).values()
    assert (values['plain'], values['after']) == (3, 4)
    assert 'status 9' in values['missing'] and 'pkg.plots -> not_there_1' in values['missing']
    assert (values['future'][0] == 'ModuleNotFoundError'
            and 'pkg.plots -> not_there_1' in values['future'][1])


def test_a_module_that_says_import_dispy(tmp_path):
    """On a node that has only dispynode.py, and a Python without packages."""
    with bare_node(tmp_path / 'node', python=make_venv(tmp_path / 'venv')) as node:
        found = Project(tmp_path / 'program', 'node,%d' % node.port)
        found.files(helper='import dispy\n\ndef get():\n'
                    '    return dispy.DispyJob.Finished, dispy.__name__\n')
        found.write('script.py', one_job(
            'import helper', 'import dispy\nreturn helper.get(), dispy.DispyJob.Terminated'))
        assert found.run().values()['seen'] == [[11, 'dispy'], 9]


def test_a_module_that_makes_a_cluster_without_a_main_guard(program):
    """The import on the node raises at once, with a text; it neither waits nor makes clusters of
    its own."""
    program.files(helper='import clusters\n\n\ndef compute(n=1):\n    return n\n\n\n'
                  'cluster = clusters.make_cluster(compute)\n')
    program.write('script.py', '''
        import clusters
        import helper

        if __name__ == '__main__':
            job = helper.cluster.submit()
            clusters.show(ended=job.wait(20), text=job.exception)
            helper.cluster.close(terminate=True)
        ''')
    done = program.run()
    values = done.values()
    assert values['ended'], done.text()
    assert ('helper' in values['text']
            and "if __name__ == '__main__'" in values['text']), values['text']


def test_code_that_cannot_be_loaded_anywhere_ends_jobs_at_once(on_local):
    """A module made at run time whose function refers to what the node cannot make."""
    on_local.write('script.py', '''
        import sys
        import types
        import clusters

        class Fails:
            def __reduce__(self):
                return fail, ()

        def fail():
            raise RuntimeError('it cannot be made here')

        made = types.ModuleType('made_here')
        made.THING = Fails()
        exec('def compute():\\n    return THING\\n', vars(made))
        sys.modules['made_here'] = made

        if __name__ == '__main__':
            with clusters.make_cluster(made.compute) as cluster:
                job = cluster.submit()
                clusters.show(ended=job.wait(20), status=job.status == job.Terminated,
                              text=job.exception)
                cluster.close(terminate=True)
        ''')
    values = on_local.run().values()
    assert values['ended'] and values['status'] and 'it cannot be made here' in values['text']


# -- edited modules --------------------------------------------------------------------------------

def test_code_of_an_edited_module(program):
    """The executor runs the new text; an open JobCluster keeps what it began with and says so
    once."""
    program.files(helper='def get():\n    return "old"\n')
    program.write('script.py', '''
        import importlib
        import os
        import time
        import clusters
        import helper

        def by_cluster():
            return helper.get()

        def edit():
            with open('helper.py', 'w') as file:
                file.write('def get():\\n    return "new text"\\n')
            importlib.reload(helper)

        if __name__ == '__main__':
            with clusters.make_executor() as executor, clusters.make_cluster(by_cluster) as cluster:
                before = [clusters.attempt(executor.submit(helper.get).result, 20),
                          clusters.outcome(cluster.submit())]
                edit()
                # The file is looked at once a second at most
                after, until = None, time.monotonic() + 10
                while after != 'new text' and time.monotonic() < until:
                    after = clusters.attempt(executor.submit(helper.get).result, 20)
                    kept = [clusters.outcome(cluster.submit()) for _ in range(3)]
                clusters.show(before=before, after=after, kept=kept)
        ''')
    done = program.run()
    values = done.values()
    assert (values['before'] == ['old', 'old'] and values['after'] == 'new text'
            and values['kept'] == ['old'] * 3)
    assert (len([line for line in done.err.splitlines() if 'helper' in line and 'changed' in line])
            == 1), done.err


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_workers_that_are_started_after_an_edit_get_what_the_others_have(on_local, method):
    """Of the embedded node, which imports the files of the program where they are: new workers of
    its runner, and a new runner. So they do when the file has gone."""
    on_local.files(helper='def get():\n    return "old"\n')
    on_local.write('package/__init__.py', 'from .part import VALUE\n')
    on_local.write('package/part.py', 'VALUE = "old"\n')
    on_local.write('script.py', '''
        import os
        import signal
        import sys
        import clusters
        import helper
        import package

        def seen():
            return helper.get() + ' ' + package.VALUE

        def end(what):
            if what == 'worker':
                os._exit(3)
            os.kill(os.getppid(), signal.SIGKILL)

        def both(what):
            return (seen(), os.getppid()) if what == 'seen' else end(what)

        if __name__ == '__main__':
            with clusters.make_cluster(both, start_method=sys.argv[1]) as cluster:
                texts, runners = [], []

                def look():
                    job = cluster.submit('seen')
                    found = job()
                    if job.status == job.Finished:   # and not lost with the runner
                        texts.append(found[0])
                        runners.append(found[1])
                look()
                with open('helper.py', 'w') as file:
                    file.write('def get():\\n    return "new text"\\n')
                os.remove('package/part.py')
                for _ in range(3):
                    clusters.outcome(cluster.submit('worker'))
                    look()
                clusters.outcome(cluster.submit('runner'))
                while runners[-1] == runners[0]:
                    look()
                clusters.show(texts=sorted(set(texts)))
        ''')
    values = on_local.run('script.py', method).values()
    assert values['texts'] == ['old old']


def test_a_node_that_comes_after_an_edit_gets_what_the_others_have(tmp_path, monkeypatch, caplog):
    """Modules with the text that they had. A data file that has changed cannot be sent any more, as
    the log says."""
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / 'edited_here.py'
    module.write_text('VALUE = "old"\n')
    data = tmp_path / 'data.txt'
    data.write_text('old')

    def seen():
        import edited_here
        return edited_here.VALUE, dispy_node_name   # noqa: F821

    with bare_node(tmp_path / 'a', '--name', 'a') as first, \
            bare_node(tmp_path / 'b', '--name', 'b') as second, \
            dispy.JobCluster(seen, nodes=[first.address]) as cluster, \
            dispy.JobCluster(seen, nodes=[first.address], depends=[str(data)]) as other:
        assert cluster.submit()() == other.submit()() == ('old', 'a')
        module.write_text('VALUE = "new text"\n')
        data.write_text('new')
        for each in (cluster, other):
            assert each.allocate_node(second.address) == 0
        found = set()
        while len(found) < 2:
            found.update(job() for job in [cluster.submit() for _ in range(8)])
        assert found == {('old', 'a'), ('old', 'b')}
        eventually(lambda: 'data.txt' in caplog.text)
        text, = [record.getMessage() for record in caplog.records
                 if 'data.txt' in record.getMessage()]
        assert 'was changed' in text and 'Make a new cluster' in text and 'node b' in text
        assert other.submit()() == ('old', 'a')


# -- ways to start a program -----------------------------------------------------------------------

def test_python_m_package_module(program):
    program.write('app/__init__.py', '')
    program.write('app/lib.py', 'def double(n):\n    return 2 * n\n')
    program.write('app/run.py', '''
        import clusters
        from . import lib
        from .lib import double

        class Own:
            def __init__(self, n):
                self.n = n

        def compute(own):
            from .lib import double as again
            return lib.double(own.n), double(own.n), again(own.n), isinstance(own, Own), Own(5)

        if __name__ == '__main__':
            with clusters.make_cluster(compute) as cluster:
                *seen, own = clusters.outcome(cluster.submit(Own(4)))
                clusters.show(seen=seen + [type(own) is Own])
        ''')
    assert program.run('-m', 'app.run').values()['seen'] == [8, 8, 8, True, True]


def test_a_script_in_a_zip_application(program, tmp_path):
    app = Project(tmp_path / 'app')
    app.write('helper.py', 'def double(n):\n    return 2 * n\n')
    app.write('pkg/__init__.py', 'from . import inner\n')
    app.write('pkg/inner.py', 'N = 5\n')
    app.write('__main__.py', one_job('import helper, pkg',
                                     'return helper.double(4), pkg.inner.N, helper.__name__'))
    target = os.path.join(program.directory, 'app.pyz')
    subprocess.run([sys.executable, '-m', 'zipapp', app.directory, '-o', target], check=True)
    assert program.run(target).values()['seen'] == [8, 5, 'helper']


def test_register_pickle_by_value(program):
    """For the computation, arguments and the executor: the module is not imported on the node."""
    program.files(helper='import os\nFLAG = os.environ.get("OF_THE_CLIENT")\n\nclass Thing:\n'
                  '    def get(self):\n        return FLAG\n\ndef get():\n    return FLAG\n')
    program.write('script.py', '''
        import cloudpickle
        import clusters
        import helper

        def compute(thing):
            return thing.get(), helper.get()

        if __name__ == '__main__':
            import os
            os.environ.pop('OF_THE_CLIENT')
            cloudpickle.register_pickle_by_value(helper)
            with clusters.make_cluster(compute) as cluster:
                clusters.show(cluster=clusters.outcome(cluster.submit(helper.Thing())))
            with clusters.make_executor() as executor:
                clusters.show(executor=clusters.attempt(executor.submit(helper.get).result, 20))
        ''')
    values = program.run(env={'OF_THE_CLIENT': 'yes'}).values()
    assert values['cluster'] == ['yes', 'yes'] and values['executor'] == 'yes'


PYTEST = '''
    import sys
    import pytest
    import clusters
    {imports}

    class Own:
        pass

    def helper(n):
        return n + 1

    def compute(own):
        return helper(1), isinstance(own, Own), own

    @pytest.fixture
    def cluster():
        with clusters.make_cluster(compute) as cluster:
            yield cluster

    def test_own(cluster):
        seen = clusters.outcome(cluster.submit(Own()))
        assert seen[:2] == (2, True) and type(seen[2]) is Own
    {more}
    '''


@pytest.mark.parametrize('layout', ['src', 'importlib'])
def test_a_run_of_pytest(program, layout):
    """With a src layout, and in importlib mode, where the name of a test module leads to no
    file."""
    program.write('src/product/__init__.py', 'from .inner import double\n')
    program.write('src/product/inner.py',
                  'class Thing:\n    pass\n\ndef double(n):\n    return 2 * n\n')
    more = '''
    def test_product():
        with clusters.make_executor() as executor:
            assert executor.submit(product.double, 4).result(20) == 8
            assert type(executor.submit(product.inner.Thing).result(20)) is product.inner.Thing
    '''
    program.write('tests/test_it.py', textwrap.dedent(PYTEST).format(imports='import product',
                                                                     more=textwrap.dedent(more)))
    program.write('pytest.ini', '[pytest]\n')
    runner = program.write('run_pytest.py', '''
        import sys
        import pytest
        where = sys.argv.pop()
        sys.argv = [sys.argv[0], where]
        options = ['--import-mode=importlib'] if {!r} == 'importlib' else []
        sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests', *options]))
        '''.format(layout))
    paths = [os.path.join(program.directory, 'src'), program.directory, os.environ['PYTHONPATH']]
    done = program.run(runner, env={'PYTHONPATH': os.pathsep.join(paths)})
    assert done.code == 0 and '2 passed' in done.out, done.text()


def test_cells_of_ipython_and_run_and_reload(program):
    pytest.importorskip('IPython')
    program.files(helper='def get():\n    return "old"\n', shown='import clusters\n\nclass Run:\n'
                  '    pass\n\ndef of_run(thing):\n    return isinstance(thing, Run), thing\n')
    program.write('script.py', '''
        import sys
        from IPython.core.interactiveshell import InteractiveShell

        shell = InteractiveShell.instance()

        def cell(text):
            result = shell.run_cell(text)
            result.raise_error()

        cell("import clusters, helper\\nexecutor = clusters.make_executor()\\nseen = []")
        cell("class A:\\n    level = 1\\ndef level(a):\\n    return a.level, isinstance(a, A), a")
        cell("first = A()\\na, b, c = executor.submit(level, first).result(20)\\n"
             "seen.append([a, b, type(c) is A])")
        cell("Old = A\\nclass A:\\n    level = 2")
        cell("a, b, c = executor.submit(level, A()).result(20)\\n"
             "seen.append([a, b, type(c) is A, isinstance(c, Old)])")
        cell("a, b, c = executor.submit(level, first).result(20)\\n"
             "seen.append([a, b, type(c) is Old])")
        cell("seen.append(executor.submit(helper.get).result(20))")
        cell("open('helper.py', 'w').write('def get():\\\\n    return \\"new text\\"\\\\n')")
        cell("import importlib, time; importlib.reload(helper); until = time.monotonic() + 10")
        cell("while executor.submit(helper.get).result(20) != 'new text' "
             "and time.monotonic() < until: pass")
        cell("seen.append(executor.submit(helper.get).result(20))")
        cell("%run shown.py {}".format(sys.argv[1]))
        cell("a, b = executor.submit(of_run, Run()).result(20)\\nseen.append([a, type(b) is Run])")
        cell("executor.shutdown()\\nclusters.show(seen=seen)")
        ''')
    env = {'IPYTHONDIR': os.path.join(program.directory, 'ipython')}
    values = program.run(env=env).values()
    assert values['seen'] == [[1, True, True], [2, True, True, False], [1, False, True], 'old',
                              'new text', [True, True]]


def test_a_cluster_made_in_a_child_that_was_started_by_spawn(program):
    program.files(helper='N = 2\n')
    program.write('script.py', '''
        import multiprocessing
        import sys
        import helper

        class Own:
            def __init__(self, n):
                self.n = n

        def compute(own):
            return isinstance(own, Own), own.n * helper.N, own

        def child(words, queue):
            sys.argv = words
            import clusters
            with clusters.make_cluster(compute) as cluster:
                seen = clusters.outcome(cluster.submit(Own(3)))
                queue.put(seen if isinstance(seen, str)
                          else [seen[0], seen[1], type(seen[2]) is Own])
            with clusters.make_executor() as executor:
                seen = clusters.attempt(executor.submit(compute, Own(4)).result, 20)
                queue.put(seen if isinstance(seen, str)
                          else [seen[0], seen[1], type(seen[2]) is Own])

        if __name__ == '__main__':
            context = multiprocessing.get_context('spawn')
            queue = context.Queue()
            process = context.Process(target=child, args=(sys.argv, queue))
            process.start()
            import clusters
            clusters.show(cluster=queue.get(timeout=40), executor=queue.get(timeout=40))
            process.join()
        ''')
    values = program.run().values()
    assert values == {'cluster': [True, 6, True], 'executor': [True, 8, True]}


METHODS = ['fork', 'spawn', 'forkserver']


@pytest.mark.parametrize('method', METHODS)
def test_pools_in_jobs(program, method):
    """For functions and classes of the script and of a module; in a JobCluster and in an
    executor."""
    program.files(helper='N = 1\n\nclass Thing:\n    def __init__(self, n):\n        self.n = n\n\n'
                  'def double(n):\n    return 2 * n * N\n\ndef of_thing(thing):\n'
                  '    return isinstance(thing, Thing), thing\n\ndef pool(method):\n'
                  '    import multiprocessing\n'
                  '    with multiprocessing.get_context(method).Pool(1) as pool:\n'
                  '        return pool.map(double, [1, 2])\n')
    program.write('script.py', '''
        import multiprocessing
        import helper

        FACTOR = 1

        class Own:
            def __init__(self, n):
                self.n = n

        def square(n):
            return n * n * FACTOR

        def of_own(own):
            return isinstance(own, Own), own

        def compute(method):
            with multiprocessing.get_context(method).Pool(1) as pool:
                own = pool.apply(of_own, (Own(1),))
                thing = pool.apply(helper.of_thing, (helper.Thing(1),))
                return (pool.map(square, range(4)), pool.map(helper.double, range(3)),
                        own[0], type(own[1]) is Own,
                        thing[0], type(thing[1]) is helper.Thing, helper.pool(method))

        if __name__ == '__main__':
            import clusters
            method = {!r}
            FACTOR = helper.N = 3
            with clusters.make_cluster(compute) as cluster:
                job = cluster.submit(method, dispy_timeout=15)
                clusters.show(cluster=clusters.outcome(job))
            with clusters.make_executor() as executor:
                for name, function in (('executor', compute), ('of_module', helper.pool)):
                    future = executor.submit(function, method)
                    clusters.show(**{{name: clusters.attempt(future.result, 20)}})
                executor.cluster.close(terminate=True)
        '''.format(method))
    values = program.run().values()
    expected = [[0, 3, 12, 27], [0, 6, 12], True, True, True, True, [6, 12]]
    assert values == {'cluster': expected, 'executor': expected, 'of_module': [6, 12]}


# -- depends ---------------------------------------------------------------------------------------

DEPENDS = '''
    import functools
    import helper
    import clusters

    class Own:
        level = 1

        def __init__(self, n):
            self.n = n

    def function(n):
        return n + 1

    INSTANCE = Own(7)
    PARTIAL = functools.partial(function, 5)
    NAMES = ['function', 'Own', 'helper']

    def seen():
        found = globals()
        return [found['function'](1), found['Own'](2).n, found['helper'].double(3),
                isinstance(found['Own'](1), found['Own'])]

    def compute(own):
        names = globals()
        try:
            return [names['function'](1), names['Own'](2).n, names['helper'].double(3),
                    isinstance(own, names['Own']), names['dispy_node_name'] != '',
                    names['dispy_node_ip_addr'], 'function' in vars(__builtins__)
                    if not isinstance(__builtins__, dict) else 'function' in __builtins__]
        except KeyError as exc:
            return 'no %s' % exc

    def load():
        names = globals()
        with open('setup', 'w') as file:
            file.write('%s %s %s'
                       % (names['function'](1), names['Own'](2).n, names['helper'].double(3)))

    def read():
        with open('setup') as file:
            return file.read(), globals()['function'](2)

    def clean():
        names = globals()
        with open({flag!r}, 'w') as file:
            file.write('%s %s %s'
                       % (names['function'](1), names['Own'](2).n, names['helper'].double(3)))

    def alone(*names):
        found = globals()
        return [name in found for name in names] + (
            [found['function'](1), found['helper'].double(2)] if 'function' in found
            and 'helper' in found else [])

    if __name__ == '__main__':
        things = [function, Own, helper, INSTANCE, PARTIAL]
        with clusters.make_cluster(compute, depends=things) as cluster:
            clusters.show(computation=clusters.outcome(cluster.submit(Own(1))))
        with clusters.make_cluster(read, depends=things, setup=load, cleanup=clean) as cluster:
            clusters.show(setup=clusters.outcome(cluster.submit()))
        with clusters.make_cluster(alone) as cluster:
            with_them = clusters.outcome(cluster.submit('function', 'Own', 'helper',
                                                        dispy_job_depends=things))
            clusters.show(job=with_them,
                          without=[clusters.outcome(cluster.submit('function', 'Own', 'helper'))
                                   for _ in range(4)])
    '''


def test_depends_are_found_by_name_in_the_globals_of_the_computation(program):
    """In computation, setup and cleanup; those of one job in that job alone. dispy_node_name and
    its like, too."""
    flag = os.path.join(program.directory, 'flag')
    program.files(helper='def double(n):\n    return 2 * n\n')
    program.write('script.py', textwrap.dedent(DEPENDS).format(flag=flag))
    values = program.run().values()
    assert values['computation'] == [2, 2, 6, True, True, '127.0.0.1', False]
    assert values['setup'] == ['2 2 6', 3]
    eventually(lambda: os.path.exists(flag) and os.path.getsize(flag), what='cleanup')
    with open(flag) as file:
        assert file.read() == '2 2 6'
    assert values['job'] == [True, True, True, 2, 4]
    assert values['without'] == [[False, False, False]] * 4


# -- errors while pickling, and the user's code under no lock of ours ------------------------------

def test_an_error_while_pickling_names_the_path(on_local):
    on_local.files(helper='import threading\n\nclass Model:\n    def __init__(self):\n'
                   '        self.lock = threading.Lock()\n')
    on_local.write('script.py', '''
        import threading
        import clusters
        import helper

        class Holder:
            def __init__(self):
                self.model = helper.Model()

        def compute(*args, **kwargs):
            return 1

        if __name__ == '__main__':
            with clusters.make_cluster(compute) as cluster:
                clusters.show(second=clusters.attempt(cluster.submit, 1, Holder()),
                              item=clusters.attempt(cluster.submit, [0, {'a': Holder()}]),
                              keyword=clusters.attempt(cluster.submit, named=Holder()))
            with clusters.make_executor() as executor:
                clusters.show(
                    executor=clusters.attempt(executor.submit(compute, 1, Holder()).result, 20))
        ''')
    values = on_local.run().values()
    assert (values['second'].startswith('TypeError: ')
            and 'argument 2 -> .model -> .lock (a _thread.lock)' in values['second'])
    assert re.search(r"argument 1 -> \[1\] -> \['a'\] -> \.model -> \.lock \(a _thread\.lock\)",
                     values['item']), values['item']
    assert 'named' in values['keyword'] and '.model -> .lock (a _thread.lock)' in values['keyword']
    assert '.model -> .lock (a _thread.lock)' in values['executor']
    for text in values.values():
        assert 'helper' in text and '__getstate__' in text, text   # the module, and what mends it


def test_the_users_code_runs_under_no_lock(program):
    """__reduce__ that takes another job's result, __del__ that closes a cluster, and a wait beside
    a thread that pickles slowly."""
    program.write('script.py', '''
        import gc
        import threading
        import time
        import clusters

        class TakesResult:
            def __init__(self, job):
                self.job = job

            def __reduce__(self):
                return int, (self.job(20),)

        class ClosesCluster:
            def __init__(self, cluster):
                self.cluster = cluster
                self.own = self

            def __del__(self):
                self.cluster.close()

        class Slow:
            begun = threading.Event()

            def __reduce__(self):
                self.begun.set()
                time.sleep(4)
                return int, (1,)

        def compute(n):
            time.sleep(0.1)
            return n

        if __name__ == '__main__':
            with clusters.make_cluster(compute) as cluster:
                clusters.show(
                    reduce=clusters.outcome(cluster.submit(TakesResult(cluster.submit(5)))))
                other = clusters.make_cluster(compute)
                clusters.outcome(other.submit(1))
                thing = ClosesCluster(other)
                del thing
                gc.collect()
                clusters.show(closed=clusters.outcome(cluster.submit(6)))
                job = cluster.submit(2)
                clusters.outcome(job)
                thread = threading.Thread(target=cluster.submit, args=(Slow(),))
                thread.start()
                Slow.begun.wait(20)
                order = []
                waiting = clusters.make_cluster(time.sleep)
                slow = waiting.submit(60)
                slow.wait(0.5)
                order.append('waited')
                if thread.is_alive():
                    order.append('still pickling')
                waiting.close(terminate=True)
                thread.join()
                clusters.show(order=order)
        ''')
    values = program.run().values()
    assert values == {'reduce': 5, 'closed': 6, 'order': ['waited', 'still pickling']}


# -- no state between calls ------------------------------------------------------------------------

def test_calls_get_fresh_objects(program):
    """Unpickled functions are never kept, but plain functions without state."""
    program.files(helper='class Counter:\n    def __init__(self):\n        self.n = 0\n'
                  '    def inc(self):\n        self.n += 1\n        return self.n\n'
                  '    __call__ = inc\n')
    program.write('script.py', '''
        import functools
        import clusters
        import helper

        class Counter(helper.Counter):
            pass

        def collect(rows, n):
            rows.append(n)
            return len(rows)

        def closure():
            n = 0
            def inc():
                nonlocal n
                n += 1
                return n
            return inc

        def local():
            def remember(n, seen=[]):
                seen.append(n)
                return len(seen)
            return remember

        if __name__ == '__main__':
            inc, remember, rows = closure(), local(), functools.partial(collect, [])
            own, counter = Counter(), helper.Counter()
            with clusters.make_executor() as executor:
                for name, call in dict(own=own.inc, module=counter.inc, callable=own, closure=inc,
                                       default=lambda: 0, partial=rows).items():
                    args = (1,) if name == 'partial' else ()
                    if name == 'default':
                        call, args = remember, (1,)
                    clusters.show(**{name: [clusters.attempt(executor.submit(call, *args).result,
                                                             20) for _ in range(4)]})
            clusters.show(here=[own.n, counter.n])
        ''')
    values = program.run().values()
    assert values.pop('here') == [0, 0]
    assert values == {name: [1, 1, 1, 1]
                      for name in ('own', 'module', 'callable', 'closure', 'default', 'partial')}


def test_workers_keep_no_batches(on_local):
    """Functions that hold 16 MiB each: what a worker holds does not grow with their number."""
    on_local.write('script.py', '''
        import functools
        import gc
        import clusters

        class Batch:
            def __init__(self, n):
                self.data = bytes([n]) * (16 << 20)

            def __call__(self):
                return sum(len(thing.data)
                           for thing in gc.get_objects() if type(thing).__name__ == 'Batch')

        if __name__ == '__main__':
            with clusters.make_executor() as executor:
                clusters.show(held=[clusters.attempt(executor.submit(Batch(n)).result, 20) >> 20
                                    for n in range(12)])
        ''')
    held = on_local.run().values()['held']
    assert max(held) <= 32, held
