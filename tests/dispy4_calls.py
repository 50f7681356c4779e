"""Calls of dispy 4's interface, each with what dispy 4.15.2 does, in words that can be compared.

    python tests/dispy4_calls.py            with dispy 4.15.2, or with this one, as installed
    python tests/dispy4_calls.py --against other.json

A dispynode of the same version must run at 127.0.0.1 with two CPUs. It prints what each call gives,
as JSON with --json; `test_old_scripts.py` compares this dispy with EXPECTED. Python 3.8, since
dispy 4.15.2 needs inspect.getargspec.
"""

import json
import os
import sys
import tempfile
import time

import dispy

# Names of calls that differ, and why.
DIFFERS = {
    'submit of what cannot be pickled': 'raises where the mistake is; '
    'dispy 4 returns a job that never ends',
    'submit_node of an unknown node': 'ValueError names the nodes that '
    'there are; dispy 4 returns None',
    'recover_jobs of a file that is not there': 'FileNotFoundError; dispy '
    '4 prints a line and returns []',
    'with swallows exceptions': 'an exception inside `with` goes through',
    'status of a cancelled running job': 'Cancelled (8); Terminated (9) is for what failed',
    'cluster()': 'as wait(), whether all jobs have ended; dispy 4 returns None',
}


def double(n):
    return n * 2


def wait_for(seconds):
    import time
    time.sleep(seconds)
    return seconds


def fail():
    raise ValueError('a text')


def said(n):
    import sys
    print('out', n)
    sys.stderr.write('err\n')
    return n


def provisional():
    return dispy_provisional_result(5, relay=False, timeout=2), 6   # noqa: F821


class Pair:
    def __init__(self, a, b):
        self.a, self.b = a, b

    def total(self):
        return self.a + self.b


def total(pair):
    return pair.total()


CALLS = []     # (name, function) in the order in which they are made
TOLD = []      # what cluster_status was told
ENDED = []     # what job_status was told


def call(name):
    """Add a call: a function of what is there (`of`), which returns what can be compared."""
    def add(function):
        CALLS.append((name, function))
        return function
    return add


def raised(function, *args, **kwargs):
    """'raises', or what the call returned."""
    try:
        return function(*args, **kwargs)
    except Exception:
        return 'raises'


# -- without nodes

@call('numbers of DispyJob')
def _(of):
    job = dispy.DispyJob
    return [job.Created, job.Running, job.ProvisionalResult, job.Cancelled, job.Terminated,
            job.Abandoned, job.Finished]


@call('numbers of DispyNode')
def _(of):
    return [dispy.DispyNode.Initialized, dispy.DispyNode.Closed, dispy.DispyNode.AvailInfo]


@call('DispyJob(None, args, kwargs)')
def _(of):
    job = dispy.DispyJob(None, (1, 2), {'c': 3})
    return [type(job.id) is int, list(job._args), job._kwargs, job.status, job.result, job.ip_addr,
            job.finish.is_set()]


@call('DispyJob(id, args, kwargs)')
def _(of):
    return dispy.DispyJob('mine', (), {}).id


@call('DispyNode(ip_addr, name, cpus)')
def _(of):
    node = dispy.DispyNode('10.0.0.1', 'one', 3)
    return [node.ip_addr, node.name, node.cpus, node.avail_cpus, node.busy, node.jobs_done,
            node.cpu_time, node.tx, node.rx, node.update_time, node.avail_info]


@call('DispyNodeAvailInfo(cpu, memory, disk, swap)')
def _(of):
    info = dispy.DispyNodeAvailInfo(1.0, 2, 3, 4)
    return [info.cpu, info.memory, info.disk, info.swap]


@call('NodeAllocate.ip_addr')
def _(of):
    return [dispy.NodeAllocate('127.0.0.1').ip_addr, dispy.NodeAllocate('10.1.*').ip_addr]


@call('NodeAllocate with numbers as text')
def _(of):
    found = dispy.NodeAllocate('127.0.0.1', port='9701', cpus='1')
    return [found.port, found.cpus, list(found.depends), list(found.setup_args)]


@call('NodeAllocate.allocate')
def _(of):
    return [dispy.NodeAllocate('127.0.0.1', cpus=cpus).allocate(None, '127.0.0.1', 'one', 4)
            for cpus in (0, 2, -1, 9)]


@call('_dispy_version')
def _(of):
    return dispy._dispy_version == dispy.__version__


@call('__path__')
def _(of):
    return os.path.isfile(os.path.join(dispy.__path__[0], 'dispynode.py'))


@call('dispy.config')
def _(of):
    from dispy.config import MsgTimeout
    dispy.config.MsgTimeout = 10
    return MsgTimeout


@call('levels of dispy.logger')
def _(of):
    log = dispy.logger
    return [log.DEBUG, log.INFO, log.WARN, log.WARNING, log.ERROR, log.CRITICAL, log.FATAL]


@call('import dispy.httpd')
def _(of):
    import dispy.httpd
    return dispy.httpd.DispyHTTPServer.__name__


@call('recover_jobs of a file that is not there')
def _(of):
    return raised(dispy.recover_jobs, '/no/such/file')


@call('an unknown keyword')
def _(of):
    return raised(dispy.JobCluster, double, colour='red')


@call('pulse_interval out of range')
def _(of):
    return raised(dispy.JobCluster, double, pulse_interval=1001)


@call('pulse_interval that is no number')
def _(of):
    return raised(dispy.JobCluster, double, pulse_interval='often')


@call('job_status that is no function')
def _(of):
    return raised(dispy.JobCluster, double, job_status=5)


@call('a computation that is none')
def _(of):
    return raised(dispy.JobCluster, 5)


# -- a cluster

@call('seven parameters by position')
def _(of):
    of.cluster = dispy.JobCluster(
        double, ['127.0.0.1'], [], of.ended, of.told, ['127.0.0.1'], None,
        pulse_interval='60', ping_interval=10, loglevel=dispy.logger.WARNING)
    of.wait_node()
    return type(of.cluster).__name__


@call('attributes of a cluster')
def _(of):
    cluster = of.cluster
    return [cluster.name, type(cluster.start_time) is float, cluster.end_time, cluster.cpu_time,
            cluster.pulse_interval, cluster.ping_interval, cluster.job_status == of.ended]


@call('submit')
def _(of):
    of.job = of.cluster.submit(4)
    return [type(of.job) is dispy.DispyJob, of.job()]


@call('job after its end')
def _(of):
    job = of.job
    return [type(job.id) is int, job.status, job.result, job.exception, job.ip_addr,
            job.submit_time <= job.end_time, job.start_time <= job.end_time, job.finish.is_set()]


@call('stdout and stderr of a job that prints nothing')
def _(of):
    return [of.job.stdout or '', of.job.stderr or '']


@call('job(clear=True)')
def _(of):
    return [of.cluster.submit(5)(clear=True), of.cluster.submit(6)(True)]


@call('submit with keywords')
def _(of):
    return of.cluster.submit(n=7)()


@call('submit_job_id')
def _(of):
    job = of.cluster.submit_job_id('mine', 8)
    return [job.id, job()]


@call('submit_node of a DispyNode')
def _(of):
    return of.cluster.submit_node(of.cluster.status().nodes[0], 9)()


@call('submit_node of an address')
def _(of):
    return of.cluster.submit_node('127.0.0.1', 10)()


@call('submit_job_id_node')
def _(of):
    job = of.cluster.submit_job_id_node('there', '127.0.0.1', 11)
    return [job.id, job()]


@call('jobs compare and sort')
def _(of):
    jobs = [of.cluster.submit(n) for n in range(4)]
    return [sorted([(1, job) for job in reversed(jobs)])[0][0], [job() for job in jobs]]


@call('job.id is set')
def _(of):
    job = of.cluster.submit(12)
    job.id = {'any': 'thing'}
    return [job(), job.id]


@call('wait')
def _(of):
    of.cluster.wait()
    return of.cluster.wait(5)


@call('cluster()')
def _(of):
    return of.cluster()


@call('status()')
def _(of):
    status = of.cluster.status()
    nodes, pending = status
    return [[node.ip_addr for node in nodes], pending, status.jobs_pending, len(status)]


@call('attributes of a node')
def _(of):
    node = of.cluster.status().nodes[0]
    return [node.cpus, node.avail_cpus, node.busy, node.tx > 0, node.rx > 0, node.update_time > 1e9,
            type(node.name) is str]


@call('end_time and cpu_time')
def _(of):
    return [of.cluster.end_time >= of.cluster.start_time, type(of.cluster.cpu_time) in (int, float)]


@call('print_status(seconds)')
def _(of):
    return [of.cluster.print_status(12.5), of.cluster.print_status(wall_time=3), of.cluster.stats()]


@call('cancel of a job that has ended')
def _(of):
    return of.cluster.cancel(of.job)


@call('set_node_cpus')
def _(of):
    found = of.cluster.set_node_cpus('127.0.0.1', 1)
    of.cluster.set_node_cpus('127.0.0.1', 2)
    return found


@call('node_jobs')
def _(of):
    return of.cluster.node_jobs('127.0.0.1')


@call('send_file(path, node, relay=False)')
def _(of):
    return [of.cluster.send_file(__file__, '127.0.0.1', relay=False),
            of.cluster.send_file(__file__, '127.0.0.1', False)]


@call('submit of what cannot be pickled')
def _(of):
    job = raised(of.cluster.submit, (n for n in ()))
    return job if job == 'raises' else type(job).__name__


@call('submit_node of an unknown node')
def _(of):
    return raised(of.cluster.submit_node, '127.9.9.9', 1)


@call('close()')
def _(of):
    return of.cluster.close()


@call('submit after close')
def _(of):
    return raised(of.cluster.submit, 1)


@call('cluster_status')
def _(of):
    of.wait_closed()
    job = [status for status, _, other in TOLD if other == of.job.id][:3]
    nodes = [status for status, _, other in TOLD if other is None
             and status != dispy.DispyNode.AvailInfo]
    return [job, nodes]


@call('job_status')
def _(of):
    return [ENDED[0], len(ENDED) > 8]


# -- other computations

@call('a job that fails')
def _(of):
    with of.using(fail) as cluster:
        job = cluster.submit()
        return [job(), job.status, 'ValueError: a text' in job.exception]


@call('output of a job')
def _(of):
    with of.using(said) as cluster:
        job = cluster.submit(3)
        return [job(), job.stdout, job.stderr]


@call('a program')
def _(of):
    path = os.path.join(tempfile.mkdtemp(), 'program.sh')
    with open(path, 'w') as file:
        file.write('#!/bin/sh\necho $1\nexit 3\n')
    os.chmod(path, 0o755)
    with of.using(path) as cluster:
        job = cluster.submit(7)
        return [job(), job.status, job.stdout.decode(), type(job.stderr) is bytes]


@call('depends=[instance]')
def _(of):
    with of.using(total, depends=[Pair(1, 2)]) as cluster:
        return cluster.submit(Pair(3, 4))()


@call('dispy_job_depends=[instance]')
def _(of):
    with of.using(total) as cluster:
        return cluster.submit(Pair(5, 6), dispy_job_depends=[Pair(0, 0)])()


@call('dispy_provisional_result(value, relay=, timeout=)')
def _(of):
    with of.using(provisional) as cluster:
        job = cluster.submit()
        cluster.wait()
        return list(job.result)


@call('cancel of a running job')
def _(of):
    with of.using(wait_for, job_status=None) as cluster:
        of.job = cluster.submit(60)
        until = time.time() + 20
        while of.job.status != dispy.DispyJob.Running and time.time() < until:
            time.sleep(0.05)
        time.sleep(0.5)
        return [cluster.cancel(of.job), of.job()]


@call('status of a cancelled running job')
def _(of):
    return of.job.status


@call('with swallows exceptions')
def _(of):
    try:
        with dispy.JobCluster(double, nodes=['127.0.0.1'], host='127.0.0.1',
                              loglevel=dispy.logger.ERROR):
            raise KeyError(1)
    except KeyError:
        return 'raises'
    return 'swallowed'


class Made:
    """What the calls make one after the other."""
    cluster = job = None

    @staticmethod
    def told(status, node, job):
        TOLD.append((status, node.ip_addr if node else None, job.id if job else None))

    @staticmethod
    def ended(job):
        ENDED.append(job.result)

    def wait_node(self):
        until = time.time() + 30
        while not self.cluster.status().nodes and time.time() < until:
            time.sleep(0.1)
        while (not any(status == dispy.DispyNode.Initialized for status, _, _ in TOLD)
               and time.time() < until):
            time.sleep(0.1)

    @staticmethod
    def wait_closed():
        until = time.time() + 10
        while (not any(status == dispy.DispyNode.Closed for status, _, _ in TOLD)
               and time.time() < until):
            time.sleep(0.1)

    @staticmethod
    def using(computation, **options):
        options.setdefault('loglevel', dispy.logger.ERROR)
        return dispy.JobCluster(computation, nodes=['127.0.0.1'], host='127.0.0.1', **options)


def answers():
    """What each call gives here: name -> value that JSON can hold, or 'ERROR: ...'."""
    of, found = Made(), {}
    for name, function in CALLS:
        try:
            found[name] = json.loads(json.dumps(function(of), default=repr))
        except Exception as exc:
            found[name] = 'ERROR: %s: %s' % (type(exc).__name__, exc)
    return found


if __name__ == '__main__':
    result = answers()
    if '--json' in sys.argv:
        with open(sys.argv[sys.argv.index('--json') + 1], 'w') as out:
            json.dump(result, out, indent=1)
    elif '--against' in sys.argv:
        with open(sys.argv[sys.argv.index('--against') + 1]) as source:
            other = json.load(source)
        different = [name for name in result if result[name] != other.get(name)]
        print('%d calls, %d differ' % (len(result), len(different)))
        for name in different:
            print('%s\n    there: %s\n    here:  %s\n    %s'
                  % (name, other.get(name), result[name], DIFFERS.get(name, 'NO REASON')))
    else:
        for name, value in result.items():
            print('%-50s %s' % (name, value))
    sys.stdout.flush()
    os._exit(0)
