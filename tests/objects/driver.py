"""Runs every object of things.py in every role and writes what came of it as JSON.

    script.py OUTPUT reference                  what ProcessPoolExecutor with fork gives in it
    script.py OUTPUT local                      on the embedded node
    script.py OUTPUT node PORT                  on a dispynode
    script.py OUTPUT other PORT                 on a dispynode of another minor version of Python
    script.py OUTPUT scheduler PORT NODE_PORT   through a dispyscheduler that has that node

A cell is (object, role); what came of it is [kind, value]:
    value       what the probe or the call gave
    refused     the constructor or submit raised; the text
    failed      the job ended otherwise; the text
    silent      nothing came within SILENCE seconds after the last answer, or from nodes that have
                all refused; their reasons
"""

import concurrent.futures
import json
import logging
import multiprocessing
import os
import pickle
import re
import sys
import time

ROLES = ['computation', 'call', 'cluster', 'argument', 'result', 'exception', 'raised']
OWN_CLUSTERS = [   # these are the computation of a JobCluster of their own
                'plain_function', 'function_with_mutable_default', 'with_attributes', 'decorated',
                'decorated_twice', 'decorated_by_class',
                'mutually_recursive', 'function_of_globals', 'importing_inside', 'lambda',
                'local_function', 'closure', 'recursive_closure',
                'closure_over_class', 'finding_its_module', 'function_of_helpers',
                'lru_cache_function', 'caller_of_lru_cache', 'singledispatch',
                'partial', 'partial_of_lambda', 'partial_of_method', 'bound_method', 'class_method',
                'static_method', 'inherited_method', 'callable_instance', 'callable_with_lambda',
                'builtin_function', 'function_with_lock', 'function_of_a_library']
# These of them alone, as `first:step`
FIRST, STEP = map(int, os.environ.get('OBJECTS_CLUSTERS', '0:1').split(':'))
NOT_RAISED = {'exception_with_cause'}   # both sides replace its cause by the remote traceback
SILENCE = 20.0    # s without any answer after which the cells that wait are given up
REFUSED = 0.5    # s after which the cells of a cluster whose nodes have all refused are given up
BUDGET = 100.0   # s after which nothing new is begun
AT_ONCE = 8     # clusters that are open at the same time


def plain(value):
    """A value as JSON can hold it, with types told apart as far as a user would see them."""
    if isinstance(value, float) and type(value) is float:
        return value if value == value and abs(value) != float('inf') else repr(value)
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) in (list, tuple):
        return [plain(item) for item in value]
    if type(value) is dict:
        return {'%r' % (key,): plain(item) for key, item in value.items()}
    if type(value) in (set, frozenset):
        return sorted(plain(item) for item in value)
    state = getattr(value, '__dict__', None)
    return [type(value).__qualname__,
            plain(dict(state)) if state else re.sub('0x[0-9a-f]+', '0x', repr(value))]


def text_of(exc):
    return '%s: %s' % (type(exc).__name__, exc)


def attempt(call, *args):
    try:
        return ['value', plain(call(*args))]
    except Exception as exc:
        return ['failed', text_of(exc)]


class Table:
    """Cells, and what each thing of the script is."""

    def __init__(self, space):
        self.space = space
        self.names = [name[len('probe_'):] for name in space if name.startswith('probe_')]
        self.cells = {}

    def make(self, name):
        return self.space['make_' + name]()

    def probe(self, name):
        return self.space['probe_' + name]

    def arguments(self, name):
        """Of a call of the object, or None."""
        return self.space.get('call_' + name)

    def callables(self):
        return [name for name in self.names if self.arguments(name) is not None]

    def is_raised(self, name):
        return name not in NOT_RAISED and isinstance(self.make(name), Exception)

    def job_roles(self, name):
        return ['argument', 'result', 'exception'] + ['raised'] * self.is_raised(name)

    def job_arguments(self, name, role):
        """Of a job of `caller`."""
        if role == 'argument':
            return role, self.probe(name), self.make(name)
        return role, self.space['make_' + name]

    def note(self, name, role, found):
        self.cells['%s/%s' % (name, role)] = found

    def judge(self, name, role, value, error, text):
        """What a job's end means for its role: `error` is what it raised, `text` says how it ended
        if not well."""
        if role in ('exception', 'raised'):
            if error is None:
                return ['failed', text or 'nothing was raised']
            if role == 'raised':
                return attempt(self.probe(name), error)
            if type(error) is not ValueError or len(error.args) != 1:
                return ['failed', text_of(error)]
            return attempt(self.probe(name), error.args[0])
        if text:
            return ['failed', text]
        return attempt(self.probe(name), value) if role == 'result' else ['value', plain(value)]


# -- the reference ---------------------------------------------------------------------------------

class Reference:
    """Each cell as ProcessPoolExecutor with fork gives it, or as a call in this program does where
    that cannot pickle. The third item says which of them it was."""

    def __init__(self, table):
        self.table = table
        self.pool = None

    def run(self):
        for name in self.table.names:
            self.note(name, 'computation', self.table.space['use_' + name])
            arguments = self.table.arguments(name)
            if arguments is not None:
                self.note(name, 'call', self.table.make(name), *arguments)
                if name in OWN_CLUSTERS:
                    self.note(name, 'cluster', self.table.make(name), *arguments)
            for role in self.table.job_roles(name):
                self.note(name, role, self.table.space['caller'],
                          *self.table.job_arguments(name, role))
        if self.pool is not None:
            self.pool.shutdown()

    def note(self, name, role, function, *args):
        obstacle = self.obstacle(name, role, function, args)
        found = None if obstacle else self.in_pool(name, role, function, args)
        if found is None:
            self.table.note(name, role,
                            self.in_program(name, role, function, args) + ['program', obstacle])
        else:
            self.table.note(name, role, found + ['fork', ''])

    def obstacle(self, name, role, function, args):
        """Why pickle cannot do what the pool needs, or ''."""
        try:
            pickle.loads(pickle.dumps((function, args)))
            if role in ('result', 'raised'):
                pickle.loads(pickle.dumps(self.table.make(name)))
            elif role == 'exception':
                pickle.loads(pickle.dumps(ValueError(self.table.make(name))))
        except Exception as exc:
            return text_of(exc)
        return ''

    def in_pool(self, name, role, function, args):
        if self.pool is None:
            self.pool = concurrent.futures.ProcessPoolExecutor(
                2, mp_context=multiprocessing.get_context('fork'))
        future = self.pool.submit(function, *args)
        try:
            error = future.exception(30)
        except concurrent.futures.TimeoutError:
            return ['silent', '']
        if isinstance(error, concurrent.futures.process.BrokenProcessPool):
            self.pool = None
            return None
        if error is not None and role not in ('exception', 'raised'):
            return ['failed', text_of(error)]
        return self.table.judge(name, role, None if error else future.result(), error, '')

    def in_program(self, name, role, function, args):
        try:
            value, error = function(*args), None
        except Exception as exc:
            value, error = None, exc
        if error is not None and role not in ('exception', 'raised'):
            return ['failed', text_of(error)]
        return self.table.judge(name, role, value, error, '')


# -- clusters --------------------------------------------------------------------------------------

class Runner:
    """Runs the table on nodes. `make_cluster(computation)` makes a cluster."""

    def __init__(self, table, make_cluster):
        self.table = table
        self.make_cluster = make_cluster
        self.until = time.monotonic() + BUDGET

    def run(self, executor):
        self.run_jobs()
        self.run_executor(executor)
        self.run_clusters([(name, 'cluster') for name in OWN_CLUSTERS[FIRST::STEP]
                           if name in self.table.names])

    def run_grouped(self):
        """Where functions travel as source, and so not as arguments: functions that stand for many
        objects, and then clusters for each object that is in none of them, and for those of groups
        that were refused."""
        for group in [name for name in self.table.space if name.startswith('group_')]:
            self.run_clusters([(group, 'group')])
            cells = ['%s/%s' % (name, role) for name, role, _ in self.jobs_of_group(group)]
            if not any(self.table.cells.get(cell, [''])[0] == 'value' for cell in cells):
                for cell in cells:
                    self.table.cells.pop(cell, None)   # the node could not load it
        left = [name for name in self.table.names if name + '/argument' not in self.table.cells]
        self.run_clusters([(name, '') for name in left])
        self.run_clusters([(name, 'computation') for name in self.table.names
                           if name + '/computation' not in self.table.cells])
        self.run_clusters([(name, 'call') for name in self.table.callables()])
        for name in OWN_CLUSTERS:
            if name + '/call' in self.table.cells:
                self.table.note(name, 'cluster', self.table.cells[name + '/call'])

    def run_jobs(self):
        try:
            cluster = self.make_cluster(self.table.space['caller'])
        except Exception as exc:
            for name in self.table.names:
                for role in self.table.job_roles(name):
                    self.table.note(name, role, ['refused', text_of(exc)])
            return
        waiting = []
        for name in self.table.names:
            for role in self.table.job_roles(name):
                self.submit(waiting, name, role, cluster, *self.table.job_arguments(name, role))
        self.collect(waiting, [cluster])
        cluster.close(terminate=True, timeout=10)

    def submit(self, waiting, name, role, cluster, *args):
        try:
            waiting.append((name, role, cluster.submit(*args, dispy_timeout=20), cluster))
        except Exception as exc:
            self.table.note(name, role, ['refused', text_of(exc)])

    def run_executor(self, executor):
        waiting = []
        calls = [(name, 'computation', self.table.space['use_' + name], ())
                 for name in self.table.names]
        calls += [(name, 'call', self.table.make(name), self.table.arguments(name))
                  for name in self.table.callables()]
        for name, role, function, arguments in calls:
            try:
                waiting.append((name, role, executor.submit(function, *arguments),
                                executor.cluster))
            except Exception as exc:
                self.table.note(name, role, ['refused', text_of(exc)])
        self.collect(waiting, [executor.cluster])
        executor.cluster.close(terminate=True, timeout=10)

    def run_clusters(self, wanted):
        """One cluster for each (object, role); the role '' stands for all roles of jobs."""
        while wanted and time.monotonic() < self.until:
            some, wanted = wanted[:AT_ONCE], wanted[AT_ONCE:]
            clusters, waiting = [], []
            for name, role in some:
                self.run_cluster(name, role, clusters, waiting)
            self.collect(waiting, clusters, grouped=some[0][1] == 'group')
            for cluster in clusters:
                cluster.close(terminate=True, timeout=10)

    def jobs_of_group(self, group):
        """All roles of those that are in the source of the function `group`."""
        code = self.table.space[group].__code__
        jobs = []
        for name in self.table.names:
            if name in code.co_consts:
                roles = self.table.job_roles(name) + ['computation'] * ('use_'
                                                                        + name in code.co_names)
                jobs += [(name, role, (name, role) + ((self.table.make(name),) if role == 'argument'
                                                      else ())) for role in roles]
        return jobs

    def run_cluster(self, name, role, clusters, waiting):
        if role == 'group':
            computation, jobs = self.table.space[name], self.jobs_of_group(name)
        elif role == '':
            computation, jobs = self.table.space['all_' + name], []
            for job_role in self.table.job_roles(name):
                jobs.append((name, job_role, (job_role,)
                             + ((self.table.make(name),) if job_role == 'argument' else ())))
        elif role == 'computation':
            computation, jobs = self.table.space['use_' + name], [(name, role, ())]
        else:
            computation, jobs = self.table.make(name), [(name, role, self.table.arguments(name))]
        try:
            cluster = self.make_cluster(computation)
        except Exception as exc:
            for name_of_job, job_role, _ in jobs if role != 'group' else ():
                self.table.note(name_of_job, job_role, ['refused', text_of(exc)])
            return
        clusters.append(cluster)
        for name_of_job, job_role, args in jobs:
            self.submit(waiting, name_of_job, job_role, cluster, *args)

    def collect(self, waiting, clusters, grouped=False):
        """Wait for all that is not given up; what a group gives up is not noted, for it is tried
        again alone."""
        last = looked = time.monotonic()
        while waiting and time.monotonic() < last + SILENCE:
            ended = [row for row in waiting if self.has_ended(row[2])]
            for name, role, job, _ in ended:
                self.table.note(name, role, self.outcome(name, role, job))
            if ended:
                waiting = [row for row in waiting if row not in ended]
                last = time.monotonic()
            elif time.monotonic() > looked + REFUSED:
                looked = time.monotonic()
                waiting = self.without_refused(waiting, clusters, grouped)
            else:
                time.sleep(0.005)
        for name, role, _, cluster in waiting if not grouped else ():
            self.table.note(name, role, ['silent', reasons(cluster)])

    def without_refused(self, waiting, clusters, grouped):
        """Those whose cluster may still answer."""
        refused = [cluster for cluster in clusters if has_refused(cluster)]
        for name, role, _, cluster in waiting:
            if cluster in refused and not grouped:
                self.table.note(name, role, ['silent', reasons(cluster)])
        return [row for row in waiting if row[3] not in refused]

    @staticmethod
    def has_ended(job):
        return job.done() if isinstance(job, concurrent.futures.Future) else job.finish.is_set()

    def outcome(self, name, role, job):
        if not isinstance(job, concurrent.futures.Future):
            text = ('' if job.status == job.Finished
                    else (job.exception or 'status %s' % job.status).strip())
            return self.table.judge(name, role, job.result, job.error, text)
        error = job.exception()
        return self.table.judge(name, role, None if error else job.result(), error,
                                text_of(error) if error else '')


def has_refused(cluster):
    """Whether nothing can come, for all nodes have refused."""
    states = [node.state for node in cluster.status().all_nodes]
    return bool(states) and all(state == 'refused' for state in states)


def reasons(cluster):
    return '; '.join(node.reason.strip()
                     for node in cluster.status().all_nodes if node.reason)[-600:]


def main(space):
    output, mode, *ports = sys.argv[1:]
    ports = [int(port) for port in ports]
    logging.disable(logging.CRITICAL)
    table = Table(space)
    if mode == 'reference':
        Reference(table).run()
    else:
        import dispy
        options = {'loglevel': logging.CRITICAL}
        if mode == 'scheduler':
            options.update(nodes=[('127.0.0.1', ports[1])], scheduler_port=ports[0])
            kind = dispy.SharedJobCluster
        else:
            options.update(nodes='local' if mode == 'local' else [('127.0.0.1', ports[0])])
            kind = dispy.JobCluster

        def make_cluster(computation, nodes=None, **more):
            return kind(computation, **dict(more, **options))
        runner = Runner(table, make_cluster)
        if mode == 'other' and space['__name__'] == '__main__':
            runner.run_grouped()
        else:
            dispy.DispyExecutor._cluster_class = staticmethod(make_cluster)
            runner.run(dispy.DispyExecutor())
    with open(output, 'w') as file:
        json.dump(table.cells, file)
