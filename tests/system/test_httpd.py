"""The web monitor, spoken to by HTTP: what it tells, what it changes, and what it refuses."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

import dispy
import dispy_httpd
import dispynode
from conftest import ROOT, eventually
from nodes import NodeProcess, SchedulerProcess


def wait_for(path, n=0, text=''):
    """A job: prints, then runs until the file is there, or until it has 'n' in it."""
    if text:
        print(text)
    while not os.path.exists(path):
        time.sleep(0.01)
    return n


def fail(n):
    if n % 2:
        raise ValueError('%d is odd' % (n % 4))
    return n


class Site:
    """Speaks to a server."""

    def __init__(self, server):
        base, _, self.token = server.url.partition('/#token=')
        self.scheme, _, where = base.partition('://')
        self.host, _, port = where.rpartition(':')
        self.port, self.server = int(port), server

    def send(self, data, tls=None, half=False):
        """Bytes as they are: (status, headers, body)."""
        with socket.create_connection((self.host, self.port), 20) as plain:
            with tls.wrap_socket(plain) if tls is not None else contextlib.nullcontext(
                    plain) as sock:
                with contextlib.suppress(OSError):   # it may answer, and hang up, before it has all
                    sock.sendall(data)
                    if half:
                        sock.shutdown(socket.SHUT_WR)
                answer = b''
                with contextlib.suppress(ConnectionError):
                    while True:
                        piece = sock.recv(65536)
                        if not piece:
                            break
                        answer += piece
        head, _, body = answer.partition(b'\r\n\r\n')
        lines = head.decode().split('\r\n')
        return int((lines[0].split() + ['0', '0'])[1]), dict(line.split(': ', 1)
                                                             for line in lines[1:]), body

    def raw(self, method='GET', path='/api/clusters', body=b'', without=(), more=(),
            version='HTTP/1.1', **headers):
        """A request that is served, but for what is said otherwise."""
        words = {'Host': '%s:%d' % (self.host, self.port), 'Authorization': 'Bearer ' + self.token}
        if method == 'POST':
            words.update({'Content-Type': 'application/json', 'Content-Length': str(len(body)),
                          'Origin': '%s://%s:%d' % (self.scheme, self.host, self.port)})
        words.update({name.replace('_', '-'): value for name, value in headers.items()})
        lines = ['%s %s %s' % (method, path, version)] + ['%s: %s' % item for item in words.items()
                                                          if item[0] not in without] + list(more)
        return '\r\n'.join(lines).encode('latin-1') + b'\r\n\r\n' + body

    def get(self, path, **headers):
        status, _, body = self.send(self.raw('GET', path, **headers))
        return status, json.loads(body)

    def rows(self, path):
        status, found = self.get(path)
        assert status == 200, found
        return found['rows']

    def post(self, path, **fields):
        status, _, body = self.send(self.raw('POST', path, json.dumps(fields).encode()))
        return status, json.loads(body)

    @contextlib.contextmanager
    def stream(self, path):
        """An event stream: the function returns the next event, (name, value)."""
        with socket.create_connection((self.host, self.port), 20) as sock:
            sock.sendall(self.raw('GET', path, Accept='text/event-stream'))
            with sock.makefile('rb') as file:
                assert file.readline().split()[1] == b'200'
                while file.readline().strip():
                    continue

                def following():
                    name = 'message'
                    for line in file:
                        if line.startswith(b'event: '):
                            name = line[7:].strip().decode()
                        elif line.startswith(b'data: '):
                            return name, json.loads(line[6:])
                    return 'closed', None
                yield following


@contextlib.contextmanager
def serve(cluster, **options):
    server = dispy_httpd.DispyHTTPServer(cluster, port=0, poll_sec=0.25, **options)
    try:
        yield Site(server)
    finally:
        server.shutdown()


@pytest.fixture
def site(tmp_path):
    """A server over a cluster whose jobs wait for the file `end`."""
    with dispy.JobCluster(wait_for, nodes='local') as cluster:
        with serve(cluster) as found:
            cluster.wait_nodes(1, 20)
            found.cluster, found.end = cluster, tmp_path / 'end'
            try:
                yield found
            finally:
                found.end.write_text('')
                cluster.cancel_waiting()


def job_rows(site, n):
    node, = site.rows('/api/nodes')
    return eventually(lambda: [rows for rows in [site.rows('/api/node?id=' + node['id'])]
                               if len(rows) >= n], what='%d jobs on the node' % n)[0]


# -- what it tells ---------------------------------------------------------------------------------

def test_the_numbers_are_the_clusters(make_cluster, capsys):
    """At every moment the states add up, and in the end all is as the cluster says."""
    with make_cluster(fail, nodes='local') as cluster, serve(cluster) as site:
        assert 'dispy monitor: ' + site.server.url in capsys.readouterr().err
        jobs = [cluster.submit(n) for n in range(500)]
        while True:
            row, = site.rows('/api/clusters')
            assert (row['waiting'] + row['running'] + row['done'] + row['failed'] + row['cancelled']
                    == row['submitted'])
            assert row['used'] <= row['cpus'] or row['state'] == 'waiting for a node'
            if row['done'] + row['failed'] == 500:
                break
        assert cluster.wait(20) and {job.status for job in jobs[::2]} == {dispy.DispyJob.Finished}
        assert ((row['submitted'], row['done'], row['failed'], row['cancelled'], row['name'])
                == (500, 250, 250, 0, 'fail'))
        node, = site.rows('/api/nodes')
        known, = cluster.status().nodes
        assert ((node['jobs'], node['cpus'], node['address'], node['name'])
                == (known.jobs_done, known.cpus, known.ip_addr, known.name))
        assert (abs(node['job_seconds'] - known.cpu_time) < 0.01 and node['state'] == 'ready'
                and node['disk'] > 0)
        assert row['plot'][0][1] <= row['plot'][-1][1] <= 500
        cluster.close()
        row, = eventually(lambda: [row for row in site.rows('/api/clusters')
                                   if row['state'] == 'closed'])
        assert (row['done'], row['failed'], row['waiting'], row['running']) == (250, 250, 0, 0)
        node, = site.rows('/api/nodes')
        assert (node['state'], node['jobs']) == ('closed', 500)


def test_what_was_before_the_server_was_made_is_counted(make_cluster):
    with make_cluster(fail, nodes='local') as cluster:
        jobs = [cluster.submit(n) for n in range(10)]
        assert (cluster.wait(20) and len(jobs) == 10
                and dispy.core_of(cluster).live_output.monitors == ())
        with serve(cluster) as site:
            row, = site.rows('/api/clusters')
            assert (row['done'], row['failed'], row['state']) == (5, 5, 'idle')
            assert site.rows('/api/failures') == []
        assert (dispy.core_of(cluster).live_output.monitors == ()
                and dispy.core_of(cluster).packed.spec['live'] is False)


def test_several_clusters_one_server(tmp_path):
    """Each is there with its own numbers; one node that both use is one row."""
    with dispy.JobCluster(fail, nodes='local') as one, \
            dispy.JobCluster(wait_for, nodes='local') as two, serve(one) as site:
        site.server.add_cluster(two)
        site.server.add_cluster(two)
        one.submit(1)
        one.submit(2)
        two.submit(str(tmp_path))
        assert one.wait(20) and two.wait(20)
        rows = eventually(lambda: [rows for rows in [site.rows('/api/clusters')]
                                   if [row['done'] for row in rows] == [1, 1]])[0]
        assert [(row['number'], row['name'], row['failed']) for row in rows] == [(1, 'fail', 1),
                                                                                 (2, 'wait_for', 0)]
        node, = site.rows('/api/nodes')
        assert (node['jobs'] == 3
                and [(use['number'], use['jobs']) for use in node['clusters']] == [(1, 2), (2, 1)])
        site.server.del_cluster(one)
        assert eventually(lambda: [row['number'] for row in site.rows('/api/clusters')] == [2])
        with pytest.raises(TypeError, match='is not a cluster'):
            site.server.add_cluster('cluster')


def test_a_server_before_its_cluster_and_the_call_of_dispy_4(tmp_path):
    with serve(None) as site:
        assert site.rows('/api/clusters') == []
        with dispy.JobCluster(wait_for, nodes='local',
                              cluster_status=site.server.cluster_status) as cluster:
            site.server.add_cluster(cluster)
            assert cluster.submit(str(tmp_path), 3)() == 3
            assert eventually(lambda: [row['done'] for row in site.rows('/api/clusters')] == [1])


def test_failures_are_grouped_by_their_last_line(make_cluster):
    """Without its numbers, which differ; the jobs of a group are a list."""
    with make_cluster(fail, nodes='local') as cluster, serve(cluster) as site:
        for n in range(9):
            cluster.submit_job_id('<%d>' % n, n)
        assert cluster.wait(20)
        group, = site.rows('/api/failures?sort=text&desc=0')
        assert (group['text'], group['count'], group['name']) == ('ValueError: # is odd', 4, 'fail')
        assert ('in fail' in group['trace']
                and {(job['id'], job['arguments'], job['status']) for job in group['jobs']}
                == {('<%d>' % n, str(n), 'terminated') for n in (1, 3, 5, 7)})
        assert {job['node'] for job in group['jobs']} == {cluster.status().nodes[0].name}
        rows = site.rows('/api/jobs?group=%s' % group['group'])
        assert ({row['id'] for row in rows} == {job['id'] for job in group['jobs']}
                and {row['state'] for row in rows} == {'failed'})


def test_a_job_with_its_arguments_and_output(site):
    """Text that would be markup, or code, comes as it is; what a job prints is there while it
    runs."""
    evil = '<script>alert("x")</script> & \'quotes\''
    site.cluster.submit_job_id(evil, str(site.end), 1, text=evil)
    row, = eventually(lambda: [rows for rows in [job_rows(site, 1)] if rows[0]['stdout']])[0]
    assert (row['id'] == evil and row['stdout'] == evil + '\n' and row['live']
            and row['state'] == 'running')
    assert row['arguments'] == '%r, 1, text=%r' % (str(site.end), evil)


def test_output_of_a_job_that_had_begun_before(tmp_path):
    """Its node does not send what it prints, and is asked for that."""
    with dispy.JobCluster(wait_for, nodes='local') as cluster:
        cluster.submit(str(tmp_path / 'end'), text='x' * 5000 + 'seen?')
        eventually(lambda: cluster.status().nodes and cluster.status().nodes[0].busy)
        with serve(cluster) as site:
            row, = eventually(lambda: [row for row in job_rows(site, 1) if row['stdout']])
            assert row['stdout'].endswith('seen?\n') and len(row['stdout']) == 4096
            assert row['live'] and row['state'] == 'running'
            (tmp_path / 'end').write_text('')
            assert cluster.wait(20)


def stuck(end):
    """A job in C code, with a thread beside it."""
    def beside():
        event.wait()
    event = threading.Event()
    thread = threading.Thread(target=beside)
    thread.start()
    while not os.path.exists(end):
        sorted(range(2000000), key=lambda n: -n)
    event.set()
    thread.join()
    return os.getpid()


@pytest.mark.skipif(not dispynode.STACKS_SIGNAL, reason='this system has no signal for it')
@pytest.mark.parametrize('start_method', ['fork', 'spawn'])
def test_the_stack_of_a_running_job(tmp_path, start_method):
    """Of all its threads, without ours; the job goes on, and one that has changed how its process
    takes the signal is left alone."""
    with dispy.JobCluster(stuck, nodes='local', start_method=start_method) as cluster, \
            serve(cluster) as site:
        job = cluster.submit(str(tmp_path / 'end'))
        row, = eventually(lambda: [row for row in listed(site)['rows']
                                   if row['state'] == 'running'])
        for _ in range(2):
            status, answer = site.post('/api/stacks', cluster=1, job=row['job'])
            assert status == 200 and 'in stuck' in answer['text'], answer
            assert 'in beside' in answer['text'] and 'dispynode.py' not in answer['text']
        (tmp_path / 'end').write_text('')
        assert job(30) > 0 and cluster.wait(20)
        assert site.post('/api/stacks', cluster=1, job=row['job'])[0] == 409


def test_a_job_that_takes_no_signal_is_left_alone(tmp_path):
    def deaf(end, number):
        import signal
        signal.signal(number, signal.SIG_DFL)
        print('deaf', flush=True)
        while not os.path.exists(end):
            time.sleep(0.01)
    number = dispynode.STACKS_SIGNAL
    with dispy.JobCluster(deaf, nodes='local') as cluster, serve(cluster) as site:
        job = cluster.submit(str(tmp_path / 'end'), number)
        row, = eventually(lambda: [row for row in job_rows(site, 1) if row['stdout']])
        status, answer = site.post('/api/stacks', cluster=1, job=row['job'])
        assert status == 200 and 'has changed how' in answer['text']
        (tmp_path / 'end').write_text('')
        assert job(20) is None and job.status == dispy.DispyJob.Finished


def busy(n, end, text=''):
    """A job: fails for 3, waits for the file from 10 on."""
    print('%s %d' % (text, n), flush=True)
    if n == 3:
        raise ValueError('%d is too much' % n)
    while n >= 10 and not os.path.exists(end):
        time.sleep(0.01)
    return n


def listed(site, words=''):
    status, found = site.get('/api/jobs' + words)
    assert status == 200, found
    return found


def test_all_jobs_are_listed_and_each_has_a_page(tmp_path):
    """Those that wait, run and have ended: found by what they are, sorted, cut into pages, with all
    that is known of one; one is cancelled where it waits."""
    end = str(tmp_path / 'end')
    with NodeProcess(tmp_path / 'node', '--name', 'attic') as node:
        with dispy.JobCluster(busy, nodes=[node.address]) as cluster, serve(cluster) as site:
            jobs = [cluster.submit_job_id('job%d' % n, n, end, text='<b>') for n in range(40)]
            states = {}

            def is_settled():
                rows = listed(site, '?per=200')['rows']
                states.update({row['id']: row for row in rows})
                return ([states.get('job%d' % n, {}).get('state') for n in range(10)]
                        == ['done'] * 3 + ['failed'] + ['done'] * 6
                        and sum(row['state'] == 'running' for row in rows) == 2)
            eventually(is_settled)
            running = [row for row in states.values() if row['state'] == 'running']
            waiting = [row['id'] for row in states.values() if row['state'].startswith('wait')]
            waiting.sort(key=lambda word: int(word[3:]))
            found = listed(site)
            assert found['total'] == 40 and found['unlisted'] == {'waiting': 0, 'ended': 0}
            eventually(lambda: listed(site)['jobs'] == {'submitted': 40, 'ended': 10, 'failed': 1})
            assert ({state: listed(site, '?state=' + state)['total']
                     for state in ('waiting', 'running', 'done', 'failed', 'cancelled', 'ended')}
                    == {'waiting': 28, 'running': 2, 'done': 9, 'failed': 1, 'cancelled': 0,
                        'ended': 10})
            # In the order of submission
            rows = listed(site, '?state=waiting&per=5&page=2')['rows']
            assert [row['id'] for row in rows] == waiting[5:10]
            rows = listed(site, '?sort=id&desc=1&per=2')['rows']
            assert [row['id'] for row in rows] == ['job39', 'job38']
            for search, ids in (('JOB11', ['job11']), ('too+much', ['job3']), ('30,', ['job30'])):
                assert [row['id'] for row in listed(site, '?search=' + search)['rows']] == ids
            row = states['job3']
            assert (row['where'], row['attempts'], row['text']) == ('attic', 1,
                                                                    'ValueError: 3 is too much')
            assert row['submitted'] <= row['began'] <= row['ended'] and row['seconds'] >= 0
            one, = site.rows('/api/job?cluster=1&job=%d' % row['job'])
            assert (one['stdout'] == '<b> 3\n' and 'in busy' in one['trace']
                    and one['arguments'] == "3, %r, text='<b>'" % end)
            one, = eventually(lambda: [row for row in site.rows(
                '/api/job?cluster=1&job=%d' % running[0]['job']) if row['stdout']])
            assert (one['stdout'], one['state'], one['where']) == (
                '<b> %s\n' % one['id'][3:], 'running', 'attic')
            # Counts link to lists
            row, = eventually(lambda: [row for row in site.rows('/api/nodes')
                                       if row['jobs'] == 10 and row['memory'] is not None])
            assert listed(site, '?state=ended&node=' + row['id'])['total'] == 10
            assert row['memory'] <= row['memory_total'] and row['disk'] <= row['disk_total']
            # A job that waits is cancelled, and another cluster has no such job
            last = int(waiting[-1][3:])
            key = states[waiting[-1]]['job']
            assert site.post('/api/cancel', cluster=1, jobs=[key]) == (200, {'done': 1})
            eventually(lambda: jobs[last].status == dispy.DispyJob.Cancelled)
            eventually(lambda: listed(site, '?state=cancelled')['total'] == 1)
            assert site.post('/api/cancel', cluster=1, jobs='all')[0] == 400
            assert site.get('/api/job?cluster=1&job=999999')[0] == 404
            # When they ran
            row, = eventually(lambda: [row for row in site.rows('/api/timeline?span=3600')
                                       if len(row['running']) == 2])
            assert (sorted(one[0] for one in row['running']) == [0, 1] and row['name'] == 'attic'
                    and {one[3] for one in row['running']} == {one['job'] for one in running})
            assert sum(numbers[3] for lane in row['lanes'] for numbers in fours(lane[2])) == 10
            ran = states['job3']
            rows = [one for lane in (0, 1) for one in site.rows(
                '/api/at?node=%s&lane=%d&ms=%d&around=10000'
                % (row['id'], lane, 1000 * ran['ended']))]
            assert rows and {one['where'] for one in rows} == {'attic'}
            eventually(lambda: site.get('/api/node?id=' + row['id'])[1]['node']['plot'][-1][1:3]
                       == [2, 2])
            (tmp_path / 'end').write_text('')
            assert cluster.wait(30)


def fours(numbers):
    return [numbers[at:at + 4] for at in range(0, len(numbers), 4)]


def flaky(path):
    count = len(os.listdir(path))
    with open(os.path.join(path, str(count)), 'w'):
        pass
    if count < 2:
        raise ValueError('try %d' % count)
    return count


def test_attempts_that_failed_are_told(tmp_path):
    with dispy.JobCluster(flaky, nodes='local') as cluster, serve(cluster) as site:
        job = cluster.submit(str(tmp_path), dispy_retries=3, dispy_retry_on=True)
        assert job(20) == 2
        row, = eventually(lambda: listed(site, '?state=done')['rows'])
        one, = site.rows('/api/job?cluster=1&job=%d' % row['job'])
        assert row['attempts'] == 3 and one['trace'] == '' and one['lost_with'] == []
        attempts = [(attempt['number'], attempt['node'], attempt['text'])
                    for attempt in one['failed_attempts']]
        name = cluster.status().nodes[0].name
        assert attempts == [(1, name, 'ValueError: try 0'), (2, name, 'ValueError: try 1')]
        assert one['failed_attempts'][1]['ended'] <= one['ended']


def test_arguments_are_nowhere_if_they_shall_not_be_shown(tmp_path):
    with dispy.JobCluster(busy, nodes='local') as cluster:
        with serve(cluster, show_job_args=False) as site:
            for n in (1, 3):
                cluster.submit(n, 'secret')
            assert cluster.wait(20)
            rows = eventually(lambda: listed(site)['total'] == 2 and listed(site)['rows'])
            assert {row['arguments'] for row in rows} == {''}
            for row in rows:
                one, = site.rows('/api/job?cluster=1&job=%d' % row['job'])
                assert 'secret' not in one['arguments']
            assert listed(site, '?search=secret')['total'] == 0
            assert site.rows('/api/failures')[0]['jobs'][0]['arguments'] == ''


class Trap:
    def __reduce__(self):
        return (os.abort, ())


@pytest.mark.parametrize('value, text', [
    (1.5, '1.5'), ('a' * 999, None), (range(3), 'range(0, 3)'), ({'a': [None]}, "{'a': [None]}"),
    (Trap(), '<posix.abort>'), (Trap, 'Trap'), (dispy.NodeSpec, 'dispy.NodeSpec'), (len, 'len'),
    (dispy.NodeSpec('h', 1), '<dispy.NodeSpec>'), (b'\0' * 20000, '19.6 KiB of arguments'),
    (os.path.join, None), (lambda: 0, '<function>'),
    (list(range(99)), '[0, 1, 2, 3, 4, 5, 6, 7, ...]')])
def test_arguments_are_shown_without_running_what_they_are(value, text):
    shown = dispy_httpd.arguments_text(dispy.pack_arguments((value,), {}, dispy.ModuleBundles('c')))
    assert len(shown) < 310 and (
        text is None or shown == text.replace('posix', os.name if os.name != 'posix' else 'posix'))


def test_an_id_of_any_type_has_a_text():
    assert ([dispy_httpd.id_text(number) for number in (1, 'a', (1, 'b'), Trap(), [Trap()])]
            == ['1', 'a', "(1, 'b')", '<Trap>', '<list>'])


def test_prometheus_reads_the_metrics(site):
    parser = pytest.importorskip('prometheus_client.parser')
    site.cluster.name = 'a "name"\\ with\nmuch'
    site.cluster.submit(str(site.end))
    eventually(lambda: site.rows('/api/clusters')[0]['running'] == 1)
    status, headers, body = site.send(site.raw('GET', '/metrics'))
    assert status == 200 and headers['Content-Type'].startswith('text/plain; version=0.0.4')
    families = {family.name: family
                for family in parser.text_string_to_metric_families(body.decode())}
    jobs = {sample.labels['state']: sample for sample in families['dispy_jobs'].samples}
    assert (jobs['running'].value == 1 and jobs['running'].labels
            == {'cluster': site.cluster.name, 'number': '1', 'state': 'running'})
    assert (families['dispy_jobs_ended'].type == 'counter'
            and families['dispy_node_cpus_used'].samples[0].value == 1)


def test_health_is_told_without_a_token_and_nothing_else(site):
    ask = site.raw('GET', '/healthz', without=['Authorization'])
    status, headers, body = site.send(ask)
    assert (status, body) == (200, b'ok\n') and headers['Content-Type'].startswith('text/plain')
    assert site.send(site.raw('POST', '/healthz', b'{}'))[0] == 405
    source = site.server._server.source
    source.is_up = False
    assert site.send(ask)[::2] == (503, b'not ok\n')
    assert b'\ndispy_up 0\n' in site.send(site.raw('GET', '/metrics'))[2]


def test_labels_of_metrics_are_bounded_in_number():
    """The sums are whole all the same."""
    fields = {'state': 'working', 'submitted': 3, 'job_seconds': 1.5, 'cpus': 2, 'used': 1,
              'waiting': 1, 'running': 1, 'done': 1, 'failed': 0, 'cancelled': 0}
    clusters = [dict(fields, number=number, name='c%d' % number,
                     user='user%d' % (number % 150))
                for number in range(1, 301)]
    snapshot = dispy_httpd.Snapshot(1, 0.0, 0.0, clusters, [], False)
    text = dispy_httpd.metrics(snapshot, True, {'turns': 5})
    assert '\ndispy_scheduler_turns_total 5\n' in text and 'dispy_info{version="' in text
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition('{')
        if rest and not line.startswith('#'):
            found.setdefault(name, []).append((rest, float(line.rsplit(' ', 1)[1])))
    submitted = found['dispy_jobs_submitted_total']
    assert len(submitted) == dispy_httpd.METRICS_CLUSTERS + 1
    assert sum(value for _, value in submitted) == 900
    assert submitted[0] == ('cluster="others",number=""} 600', 600.0)
    used = found['dispy_user_cpus_used']
    assert len(used) == dispy_httpd.METRICS_USERS + 1
    assert sum(value for _, value in used) == 300
    assert used[0] == ('user="others"} 200.0', 200.0)


def test_a_table_is_sorted_and_cut_by_the_server():
    rows = [{'n': n, 'name': 'abc'[n % 3], 'free': None if n == 5 else -n} for n in range(10)]

    def page(**query):
        found = dispy_httpd.table(rows, query, ('n', 'name', 'free'), ('free',))
        return [row['n'] for row in found['rows']], found['page'], found['pages']
    assert page() == (list(range(10)), 1, 1)
    assert page(sort='n', desc='1', per='3', page='2') == ([6, 5, 4], 2, 4)
    assert page(per='4', page='99') == ([8, 9], 3, 3)
    # What is not known comes last, either way
    assert page(sort='free') == ([0, 1, 2, 3, 4, 6, 7, 8, 9, 5], 1, 1)
    assert page(sort='free', desc='0')[0] == [9, 8, 7, 6, 4, 3, 2, 1, 0, 5]
    names = [{'name': name} for name in ('node10', 'node9', '9', 'node', 'node9b')]
    assert ([row['name'] for row in dispy_httpd.table(names, {}, ('name',))['rows']]
            == ['9', 'node', 'node9', 'node9b', 'node10'])
    for wrong in ({'sort': 'x'}, {'page': '0'}, {'per': '201'}, {'desc': '2'}, {'page': '-1'},
                  {'page': '\u0663'}):
        with pytest.raises(dispy_httpd.Refusal):
            page(**wrong)


def test_a_plot_stays_small_and_whole():
    history = dispy_httpd.History()
    rates = [history.add(1000.0 + second, 10 * second, 2, 4) for second in range(5000)]
    assert (len(history.points) <= dispy_httpd.PLOT_POINTS and history.points[0][:2] == [1000.0, 0]
            and history.points[-1][0] > 5900)
    assert rates[0] == 0.0 and all(abs(rate - 10.0) < 0.01 for rate in rates[5:])
    assert [history.add(6000.0 + second, 50000, 0, 4) for second in range(40)][-1] == 0.0


class Idle:
    """A link to a node that says nothing."""
    is_attached, heard = False, 0.0
    bytes_in = bytes_out = 0


def test_a_snapshot_costs_the_same_with_many_jobs(site):
    """Not a time: what the driver's thread calls for it is counted, with 2 jobs and with 20,000, on
    one node and on 200."""
    driver, (watched,) = dispy.core_of(site.cluster).driver, site.server._source.watched()

    def calls():
        seen = [0]

        def count(frame, event, arg):
            seen[0] += event == 'call'
        sys.setprofile(count)
        try:
            rows, _, _ = dispy_httpd.ClusterSource._turn(watched, False)
        finally:
            sys.setprofile(None)
        return seen[0], len(rows)

    for _ in range(4):
        site.cluster.submit(str(site.end))
    job_rows(site, 2)
    few, nodes = driver.ask(calls)
    for _ in range(20000):
        site.cluster.submit(str(site.end))
    driver.ask(lambda: None)
    many, _ = driver.ask(calls)
    assert nodes == 1 and many <= few + 2 and len(dispy.core_of(site.cluster).driver.schedule.comps[
        dispy.core_of(site.cluster).comp].queue._levels[0]) > 19000

    peers = [dispy.NodeConnection('10.0.0.%d' % n, 9701) for n in range(200)]

    def add():
        for n, peer in enumerate(peers):
            peer.name, peer.link, peer.uses[dispy.core_of(site.cluster).comp] = (
                'node%03d' % n, Idle(), dispy.NodeAssignment(dispy.NodeSpec('x', 1)))
            driver.nodes.by_key[peer.key] = peer
    driver.ask(add)
    try:
        most, nodes = driver.ask(calls)
        assert nodes == 201 and most < 30 * 200
        found = eventually(lambda: [found for _, found in [site.get('/api/nodes?sort=name&page=2')]
                                    if found['total'] == 201])[0]
        assert ([row['name'] for row in found['rows']][:2] == ['node050', 'node051']
                and found['pages'] == 5)
    finally:
        driver.ask(lambda: [driver.nodes.by_key.pop(peer.key) for peer in peers])
        site.cluster.cancel_waiting()


# -- streams ---------------------------------------------------------------------------------------

def test_a_stream_tells_what_has_changed_and_the_end(tmp_path):
    with dispy.JobCluster(wait_for, nodes='local') as cluster:
        server = dispy_httpd.DispyHTTPServer(cluster, port=0, poll_sec=0.25)
        site = Site(server)
        with site.stream('/api/clusters') as following:
            name, first = following()
            assert (name == 'message' and first['rows'][0]['plot'] is not None
                    and first['manages'] is True)
            jobs = [cluster.submit(str(tmp_path), n) for n in range(5)]
            seen = eventually(lambda: [event for event in [following()[1]]
                                       if event['rows'][0]['done'] == 5])[0]
            assert seen['rows'][0]['submitted'] == 5 and all(job() is not None for job in jobs)
            ender = threading.Thread(target=server.shutdown)
            ender.start()
            assert eventually(lambda: following()[0] == 'end') and following() == ('closed', None)
            ender.join()
        server.shutdown()


def test_many_browsers_one_snapshot(site):
    """Streams of any number see the same, and a snapshot is not taken more often for them."""
    began, take = [], site.server._source.snapshot

    def snapshot(asking):
        began.append(time.monotonic())
        return take(asking)
    site.server._source.snapshot = snapshot
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(site.stream('/api/clusters')) for _ in range(8)]
        for following in streams:
            following()
        site.cluster.submit(str(site.end))
        for following in streams:
            assert eventually(lambda: following()[1]['rows'][0]['running'] == 1)
        eventually(lambda: len(began) > 6)
    assert min(after - before for before, after in zip(began, began[1:])) > 0.24


def test_a_stream_of_a_node_that_goes_ends_with_a_reason(tmp_path):
    with NodeProcess(tmp_path / 'node') as node, \
            dispy.JobCluster(wait_for, nodes=[node.address]) as cluster, serve(cluster) as site:
        cluster.wait_nodes(1, 20)
        eventually(lambda: [row for row in site.rows('/api/nodes') if row['state'] == 'ready'])
        with site.stream('/api/node?id=1.%s:%d' % node.address) as following:
            assert following()[1]['node']['state'] == 'ready'
            cluster.close()
            assert 'there is no node' in eventually(lambda: following()[1].get('error'))


# -- what it changes -------------------------------------------------------------------------------

def test_jobs_are_cancelled_one_some_all_and_those_that_wait(site):
    jobs = [site.cluster.submit(str(site.end), n) for n in range(30)]
    node, = site.rows('/api/nodes')
    first = job_rows(site, 2)
    assert (site.post('/api/cancel', cluster=1, node=node['id'], jobs=[first[0]['job']])
            == (200, {'done': 1}))
    ended = eventually(lambda: [job for job in jobs if job.status in dispy.ENDED])
    assert ([str(job.id) for job in ended] == [first[0]['id']]
            and ended[0].status == dispy.DispyJob.Cancelled)
    assert (site.post('/api/cancel', cluster=1, node=node['id'], jobs=[first[0]['job'], 99999])[1]
            == {'done': 0})
    assert site.post('/api/cancel_waiting', cluster=1)[0] == 200
    eventually(lambda: site.rows('/api/clusters')[0]['waiting'] == 0)
    status, answer = site.post('/api/cancel', cluster=1, node=node['id'], jobs='all')
    assert status == 200 and answer['done'] >= 1 and site.cluster.wait(20)
    row = eventually(lambda: [row
                              for row in site.rows('/api/clusters') if row['cancelled'] == 30])[0]
    assert row['failed'] == 0 and site.rows('/api/failures') == []


def test_nodes_are_added_limited_drained_used_again_and_released(make_cluster, tmp_path):
    with NodeProcess(tmp_path / 'one') as one, NodeProcess(tmp_path / 'two') as two:
        with make_cluster(wait_for, nodes=[one.address]) as cluster, serve(cluster) as site:
            cluster.wait_nodes(1, 20)

            def state(node):
                return next(((row['state'], row['cpus'])
                             for row in site.rows('/api/nodes') if row['port'] == node.port), None)
            name = '1.%s:%d' % one.address
            eventually(lambda: state(one) == ('ready', 2))
            assert (site.post('/api/cpus', node=name, cpus=1) == (200, {'done': 1})
                    and cluster.status().nodes[0].cpus == 1)
            assert site.post('/api/cpus', node=name, cpus=3)[0] == 400
            assert site.post('/api/drain', node=name)[0] == 200
            eventually(lambda: state(one) == ('drained', 0))
            assert site.post('/api/use', node=name, cluster=1)[0] == 200
            eventually(lambda: state(one) == ('ready', 2))
            assert site.post('/api/add', cluster=1, host=two.address[0], port=two.port,
                             cpus=None)[0] == 200
            eventually(lambda: state(two) == ('ready', 2))
            assert site.post('/api/release', node=name)[0] == 200
            eventually(lambda: state(one)[0] == 'closed')
            assert cluster.submit(str(tmp_path))() == 0
            assert (site.post('/api/drain', node='1.nowhere:1')[0] == 404
                    and site.post('/api/drain', node=name, cluster=7)[0] == 404)
            assert site.post('/api/add', cluster=1, host='a b')[0] == 400


# -- what it refuses -------------------------------------------------------------------------------

def hostile():
    """(name, status, what makes the request of a Site)"""
    post = dict(method='POST', path='/api/cancel_waiting', body=b'{"cluster": 1}')
    yield 'no token', 401, lambda s: s.raw(without=['Authorization'])
    yield 'another token', 401, lambda s: s.raw(Authorization='Bearer ' + 'x' * 32)
    yield 'the token with more behind', 401, lambda s: s.raw(Authorization='Bearer %sx' % s.token)
    yield 'the token as Basic', 401, lambda s: s.raw(Authorization='Basic ' + s.token)
    yield 'an empty token', 401, lambda s: s.raw(Authorization='Bearer ')
    yield 'a token that is no ASCII', 401, lambda s: s.raw(Authorization='Bearer \xe4\xff')
    yield 'the token in the query', 401, lambda s: s.raw(path='/api/clusters?token=' + s.token,
                                                         without=['Authorization'])
    yield 'the token as a cookie', 401, lambda s: s.raw(without=['Authorization'],
                                                        Cookie='token=' + s.token)
    yield 'metrics without token', 401, lambda s: s.raw(path='/metrics', without=['Authorization'])
    yield 'a change without token', 401, lambda s: s.raw(without=['Authorization'], **post)
    yield 'two tokens', 400, lambda s: s.raw(more=['Authorization: Bearer x'])
    yield 'another Host', 421, lambda s: s.raw(Host='evil.example:%d' % s.port)
    yield 'a Host that begins like ours', 421, lambda s: s.raw(Host='localhost.evil.example')
    yield 'an address that is not ours', 421, lambda s: s.raw(Host='10.1.2.3')
    yield 'a page for another Host', 421, lambda s: s.raw(path='/', Host='evil.example')
    yield 'a Host that is none', 421, lambda s: s.raw(Host='127.0.0.1/x')
    yield 'no Host', 400, lambda s: s.raw(without=['Host'])
    yield 'two Hosts', 400, lambda s: s.raw(more=['Host: evil.example'])
    yield 'another Origin', 403, lambda s: s.raw(Origin='http://evil.example')
    yield 'another Origin changes something', 403, lambda s: s.raw(Origin='http://evil.example',
                                                                   **post)
    yield 'Origin null', 403, lambda s: s.raw(Origin='null', **post)
    yield 'Origin at another port', 403, lambda s: s.raw(Origin='http://127.0.0.1:1')
    yield 'Origin by another scheme', 403, lambda s: s.raw(Origin='https://%s:%d'
                                                           % (s.host, s.port))
    yield 'a cross-site fetch', 403, lambda s: s.raw(Sec_Fetch_Site='cross-site')
    yield 'a same-site fetch', 403, lambda s: s.raw(Sec_Fetch_Site='same-site', **post)
    yield ('the script from another site', 403,
           lambda s: s.raw(path='/app.js', Sec_Fetch_Site='cross-site', Sec_Fetch_Mode='no-cors'))
    yield 'the page in a frame of another site', 403, lambda s: s.raw(
        path='/', Sec_Fetch_Site='cross-site', Sec_Fetch_Mode='navigate', Sec_Fetch_Dest='iframe')
    yield 'text/plain', 415, lambda s: s.raw(Content_Type='text/plain', **post)
    yield 'a form', 415, lambda s: s.raw(Content_Type='application/x-www-form-urlencoded', **post)
    yield 'no type', 415, lambda s: s.raw(without=['Content-Type'], **post)
    yield 'JSON in UTF-16', 415, lambda s: s.raw(Content_Type='application/json; charset=utf-16',
                                                 **post)
    yield 'a change by GET', 405, lambda s: s.raw(path='/api/cancel_waiting')
    yield 'a POST where nothing changes', 405, lambda s: s.raw('POST', '/api/clusters', b'{}')
    yield 'DELETE', 405, lambda s: s.raw('DELETE')
    yield 'OPTIONS', 405, lambda s: s.raw('OPTIONS', '/api/cancel')
    yield 'a method nobody knows', 501, lambda s: s.raw('BREW')
    yield 'no such path', 404, lambda s: s.raw(path='/api/secrets')
    yield 'a path that climbs', 404, lambda s: s.raw(path='/../../etc/passwd')
    yield 'a path that climbs in disguise', 404, lambda s: s.raw(path='/%2e%2e/dispy_httpd.py')
    yield 'a whole address as path', 400, lambda s: s.raw(path='http://evil.example/')
    yield 'a header of 1 MiB', 431, lambda s: s.raw(X='x' * (1 << 20))
    yield 'very many headers', 431, lambda s: s.raw(more=['X-%d: x' % n for n in range(150)])
    yield ('headers of 20 KiB in all', 431,
           lambda s: s.raw(more=['X-%d: %s' % (n, 'x' * 2000) for n in range(10)]))
    yield 'a request line of 1 MiB', 414, lambda s: s.raw(path='/' + 'x' * (1 << 20))
    yield 'a body of 1 MiB', 413, lambda s: s.raw('POST', '/api/cancel',
                                                  b'{' + b' ' * (1 << 20) + b'}')
    yield 'a body said to be of 10 GB', 413, lambda s: s.raw('POST', '/api/cancel', b'{}',
                                                             Content_Length='10000000000')
    yield 'no length', 411, lambda s: s.raw(without=['Content-Length'], **post)
    yield 'a negative length', 400, lambda s: s.raw(Content_Length='-1', **post)
    yield 'two lengths', 400, lambda s: s.raw(more=['Content-Length: 3'], **post)
    yield 'chunks', 501, lambda s: s.raw(Transfer_Encoding='chunked', **post)
    yield 'a GET with a body', 400, lambda s: s.raw(body=b'GET / HTTP/1.1\r\n\r\n',
                                                    Content_Length='18')
    yield 'Expect', 417, lambda s: s.raw(Expect='100-continue', **post)
    yield 'no JSON', 400, lambda s: s.raw('POST', '/api/cancel', b'cluster=1')
    yield 'JSON nested deeply', 400, lambda s: s.raw('POST', '/api/cancel', b'[' * 60000)
    yield 'a list', 400, lambda s: s.raw('POST', '/api/cancel', b'[1]')
    yield 'an unknown field', 400, lambda s: s.raw('POST', '/api/cancel_waiting',
                                                   b'{"cluster": 1, "secret": 1}')
    yield 'a field of another type', 400, lambda s: s.raw('POST', '/api/cancel_waiting',
                                                          b'{"cluster": "1"}')
    yield 'true for a number', 400, lambda s: s.raw('POST', '/api/cancel_waiting',
                                                    b'{"cluster": true}')
    yield 'a field that is missing', 400, lambda s: s.raw('POST', '/api/cancel_waiting', b'{}')
    yield 'jobs that are none', 400, lambda s: s.raw(
        'POST', '/api/cancel', b'{"cluster": 1, "node": "1.local", "jobs": ["x"]}')
    yield 'no such cluster', 404, lambda s: s.raw('POST', '/api/cancel_waiting', b'{"cluster": 9}')
    yield 'a method of the source that is no change', 404, lambda s: s.raw('POST', '/api/close',
                                                                           b'{}')
    yield 'an unknown word in the query', 400, lambda s: s.raw(path='/api/clusters?colour=1')
    yield 'a word twice', 400, lambda s: s.raw(path='/api/clusters?page=1&page=2')
    yield 'sorted by what is no column', 400, lambda s: s.raw(path='/api/clusters?sort=__class__')
    yield 'a page that is not a number', 400, lambda s: s.raw(path='/api/clusters?page=1e9')
    yield 'UTF-8 that is none', 400, lambda s: s.raw(path='/api/node?id=%ff')
    yield 'HTTP/2.0', 505, lambda s: s.raw(version='HTTP/2.0')
    yield 'HTTP/0.9', 505, lambda s: b'GET /\r\n\r\n'
    yield 'no HTTP', 400, lambda s: b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n'
    yield 'a header without a colon', 400, lambda s: s.raw(more=['nonsense'])
    yield 'a header with a NUL', 400, lambda s: s.raw(X='a\0b')
    yield 'a header of two lines', 400, lambda s: s.raw(more=['X: a', ' b'])
    yield 'a space before the colon', 400, lambda s: s.raw(more=['Host : evil.example'])


HOSTILE = list(hostile())


@pytest.fixture(scope='module')
def standing():
    """One server for all that is refused; its cluster is not touched."""
    # pulse_interval: a driver of its own, whose threads other tests do not start
    with dispy.JobCluster(wait_for, nodes='local',
                          pulse_interval=3) as cluster, serve(cluster) as site:
        cluster.wait_nodes(1, 20)
        yield site


@pytest.mark.parametrize('name, status, request_of', HOSTILE, ids=[name for name, _, _ in HOSTILE])
def test_a_hostile_request(standing, name, status, request_of):
    found, headers, body = standing.send(request_of(standing))
    assert found == status, (found, body)
    assert (headers['X-Content-Type-Options'] == 'nosniff'
            and "script-src 'self'" in headers['Content-Security-Policy'])
    assert (headers['Content-Type'] == 'application/json' and set(json.loads(body)) == {'error'}
            and standing.token.encode() not in body)
    assert 'Access-Control-Allow-Origin' not in headers and 'Set-Cookie' not in headers


def test_there_are_forty_of_them():
    assert len(HOSTILE) >= 40


def test_a_body_that_does_not_come(standing):
    assert standing.send(standing.raw('POST', '/api/cancel', b'{', Content_Length='10'),
                         half=True)[0] == 400


@pytest.mark.parametrize('headers', [dict(Host='localhost:%d'), dict(Host='LOCALHOST:%d'), dict(
    Host='127.0.0.1:9999'), dict(Sec_Fetch_Site='same-origin'), dict(Accept='*/*')])
def test_what_is_served(standing, headers):
    assert standing.get('/api/clusters', **{name: value % standing.port if '%' in value else value
                                            for name, value in headers.items()})[0] == 200


def test_the_page_holds_no_data_and_nothing_from_outside(standing):
    for path, kind in (('/', 'text/html'), ('/app.js', 'text/javascript'),
                       ('/style.css', 'text/css'), ('/icon.svg', 'image/svg+xml')):
        status, headers, body = standing.send(standing.raw(path=path, without=['Authorization'],
                                                           Sec_Fetch_Site='none'))
        assert (status == 200 and headers['Content-Type'].startswith(kind)
                and standing.token.encode() not in body and b'wait_for' not in body)
        assert (headers['Referrer-Policy'] == 'no-referrer'
                and headers['Cache-Control'] == 'no-store' and headers['X-Frame-Options'] == 'DENY')
        assert 'unsafe' not in headers['Content-Security-Policy']
        assert (b'//' not in body.replace(b'http://www.w3.org/2000/svg', b'').replace(b'// ', b'')
                or path == '/app.js')
        assert standing.send(standing.raw('HEAD', path))[2] == b''
    assert (b'innerHTML' not in body and 'innerHTML' not in dispy_httpd.SCRIPT
            and 'eval(' not in dispy_httpd.SCRIPT and ' style=' not in dispy_httpd.HTML)
    link = dict(Sec_Fetch_Site='cross-site', Sec_Fetch_Mode='navigate', Sec_Fetch_Dest='document')
    # A link to it on another page may be followed
    assert standing.send(standing.raw(path='/', **link))[0] == 200
    assert standing.send(standing.raw(**link))[0] == 403


def test_who_is_silent_is_cut_off(monkeypatch):
    monkeypatch.setattr(dispy_httpd, 'IO_TIME', 0.5)
    with serve(None) as site:
        for begin in (b'', b'GET / HT', b'GET / HTTP/1.1\r\nHost: x\r\nX: '):
            assert site.send(begin)[0] in (0, 408)
        # A byte now and then is no better
        with socket.create_connection((site.host, site.port), 20) as sock:
            with pytest.raises(OSError):
                while True:
                    sock.sendall(b'x')
                    time.sleep(0.05)


def test_so_many_at_once_and_no_more(monkeypatch):
    monkeypatch.setattr(dispy_httpd, 'MAX_CONNECTIONS', 3)
    with serve(None) as site, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(site.stream('/api/clusters'))
        assert site.send(site.raw())[0] in (503, 0)     # 0: the reset was faster than the answer
        stack.close()
        eventually(lambda: site.send(site.raw())[0] == 200)


@pytest.mark.skipif(shutil.which('openssl') is None,
                    reason='there is no openssl to make a certificate')
def test_tls(tmp_path):
    path = str(tmp_path / 'web.pem')
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt',
                    'ec_paramgen_curve:P-256', '-nodes', '-days', '2', '-subj', '/CN=dispy',
                    '-keyout', path, '-out', path + '.crt'], check=True, stderr=subprocess.DEVNULL)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname = False
    tls.load_verify_locations(path + '.crt')
    with serve(None, certfile=path + '.crt', keyfile=path) as site:
        assert site.scheme == 'https'
        status, _, body = site.send(site.raw(), tls)
        assert status == 200 and json.loads(body)['rows'] == []
        assert site.send(site.raw())[0] == 0     # plain
        assert site.send(site.raw(Origin='https://%s:%d' % (site.host, site.port)), tls)[0] == 200
    with pytest.raises(dispy.SecretError, match='cannot be used'):
        dispy_httpd.DispyHTTPServer(None, port=0, certfile=str(tmp_path / 'none'))


def test_arguments_of_a_server():
    with serve(None) as site:
        with pytest.raises(OSError, match='port %d.*choose another port' % site.port):
            dispy_httpd.DispyHTTPServer(None, port=site.port)
    for wrong in (dict(port=-1), dict(port='x'), dict(poll_sec=0.1), dict(poll_sec='x')):
        with pytest.raises(ValueError, match=list(wrong)[0]):
            dispy_httpd.DispyHTTPServer(None, **wrong)
    with pytest.raises(TypeError, match='is not a cluster'):
        dispy_httpd.DispyHTTPServer('cluster', port=0)


def test_all_addresses_but_no_names_of_others(caplog):
    with serve(None, host='0.0.0.0') as site:
        site.host = '127.0.0.1'
        assert 'without TLS' in caplog.text
        # An address is no name that can be made to lead here
        assert site.get('/api/clusters', Host='10.1.2.3:80')[0] == 200
        assert site.get('/api/clusters', Host='evil.example')[0] == 421


# -- nodes beside any program ----------------------------------------------------------------------

def test_nodes_are_watched_and_left_to_their_client(tmp_path):
    """The monitor is a process of its own; a program uses the node meanwhile, and both see it."""
    with NodeProcess(tmp_path / 'node') as node:
        process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'dispy_httpd.py'), '--nodes',
                                    '%s:%d' % node.address, '-p', '0', '--token-file',
                                    str(tmp_path / 'token')], stderr=subprocess.PIPE,
                                   stdout=subprocess.DEVNULL)
        try:
            line = process.stderr.readline().decode()
            assert line.startswith('dispy monitor: http://127.0.0.1:')

            token = eventually(lambda: (tmp_path / 'token').exists()
                               and (tmp_path / 'token').read_text())

            class Started:   # the token is in its file alone
                url = '%s#token=%s' % (re.search(r'http://[\d.:]+/', line).group(0), token)
            site = Site(Started)
            row = eventually(lambda: [row for row in site.rows('/api/nodes')
                                      if row['state'] == 'connected'])[0]
            assert (row['cpus'], row['used'], row['holder'], row['port']) == (2, 0, '', node.port)
            with dispy.JobCluster(wait_for, nodes=[node.address]) as cluster:
                job = cluster.submit(str(tmp_path / 'end'))
                row = eventually(lambda: [row for row in site.rows('/api/nodes') if row['used'] == 1
                                          and row['holder']])[0]
                assert 'PID %d' % os.getpid() in row['holder'] and row['disk'] > 0
                (tmp_path / 'end').write_text('')
                assert job(20) == 0
            assert (site.rows('/api/clusters') == []
                    and site.get('/api/node?id=' + row['id'])[1]['manages'] is False)
            status, answer = site.post('/api/drain', node=row['id'])
            assert status == 409 and 'only looked at' in answer['error']
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
            process.stderr.close()


# -- a scheduler -----------------------------------------------------------------------------------

class Shared:
    """A scheduler with a node of its own, watched from inside and, by a process beside it, from
    outside."""

    def __init__(self, root):
        self.root, self.end = root, root / 'end'
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.node = stack.enter_context(NodeProcess(self.root / 'node', '--name', 'attic'))
            self.scheduler = stack.enter_context(SchedulerProcess(
                self.root / 'scheduler', '-n', '127.0.0.1:%d' % self.node.port, '--httpd', '0',
                '--history', '1'))
            process = subprocess.Popen(
                [sys.executable, os.path.join(ROOT, 'dispy_httpd.py'), '--scheduler',
                 '127.0.0.1:%d' % self.scheduler.port, '-p', '0',
                 '--poll-sec', '0.25'], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
            stack.callback(process.stderr.close)
            stack.callback(process.wait, 20)
            stack.callback(process.send_signal, signal.SIGTERM)
            beside = re.search(r'http://\S+', process.stderr.readline().decode())
            self.links = [self.scheduler.page(), beside.group(0)]
            self.sites = [Site(type('Started', (), {'url': url})) for url in self.links]
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exc):
        self.stack.close()

    def cluster(self, computation, **options):
        return dispy.SharedJobCluster(computation, scheduler_port=self.scheduler.port, **options)


@pytest.fixture
def shared(tmp_path):
    with Shared(tmp_path) as found:
        yield found


PROGRAM = '''
import sys, dispy
def other(n):
    return n
with dispy.SharedJobCluster(other, scheduler_port=int(sys.argv[1])) as cluster:
    assert [job(60) for job in [cluster.submit(n) for n in range(30)]] == list(range(30))
    print('done', flush=True)
    sys.stdin.readline()
'''


def test_a_scheduler_shows_all_programs_inside_and_beside_it(shared):
    """Two programs; both monitors and that of one's own say the same."""
    other = subprocess.Popen([sys.executable, '-c', PROGRAM, str(shared.scheduler.port)],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b'done\n'
        with shared.cluster(fail) as cluster, serve(cluster) as own:
            jobs = [cluster.submit(n) for n in range(100)]
            assert (cluster.wait(60)
                    and sum(job.status == dispy.DispyJob.Finished for job in jobs) == 50)
            for site in shared.sites:
                words = ('submitted', 'done', 'failed', 'cancelled', 'waiting', 'running', 'cpus',
                         'used', 'nodes', 'state', 'job_seconds')

                def rows_that_agree():
                    rows = {row['name']: row for row in site.rows('/api/clusters')}
                    mine, = own.rows('/api/clusters')
                    if len(rows) == 2 and all(row['state'] == 'idle' for row in rows.values()) \
                            and all(mine[word] == rows['fail'][word] for word in words):
                        return rows
                rows = eventually(rows_that_agree)
                assert (rows['fail']['submitted'], rows['fail']['done']) == (100, 50)
                assert ('PID %d' % other.pid in rows['other']['program']
                        and 'PID %d' % os.getpid() in rows['fail']['program'])
                assert [rows['other'][word] for word in ('submitted', 'done', 'failed', 'cancelled',
                                                         'waiting', 'running')] == [30, 30, 0, 0, 0,
                                                                                    0]
                node, = eventually(lambda: [row for row in site.rows('/api/nodes')
                                            if row['load'] is not None])
                assert ((node['name'], node['state'], node['cpus'], node['used'], node['jobs'])
                        == ('attic', 'ready', 2, 0, 130) and node['disk'] > 0)
                assert (sorted((use['name'], use['jobs']) for use in node['clusters'])
                        == [('fail', 100), ('other', 30)])
                found, = site.rows('/api/failures')
                assert (found['text'], found['count']) == ('ValueError: # is odd', 50)
                job = found['jobs'][0]
                assert (int(job['arguments']) % 2 == 1 and 'attic' in job['node']
                        and 'raise ValueError' in found['trace'])
                assert found['name'] == 'fail' and found['user']
            node, = own.rows('/api/nodes')
            assert ((node['name'], node['state'], node['cpus'], node['jobs'], node['port'])
                    == ('attic', 'ready', 2, 100, shared.node.port))
    finally:
        other.communicate(b'\n')
    for site in shared.sites:
        eventually(lambda: site.rows('/api/clusters') == [], what='end of the clusters')


def test_jobs_of_a_scheduler_are_shown_and_cancelled(shared):
    """One by its number, all of a node, those that wait; by each of the three ways."""
    for site in (*shared.sites, None):
        with shared.cluster(wait_for) as cluster, \
                serve(cluster) if site is None else contextlib.nullcontext(site) as site:
            jobs = [cluster.submit(str(shared.end), n) for n in range(40)]
            row, = eventually(lambda: [row for row in site.rows('/api/clusters')
                                       if row['running'] == 2 and row['waiting'] == 38])
            assert row['used'] == 2
            node, = site.rows('/api/nodes')
            rows = eventually(lambda: [rows for rows in [site.rows(
                '/api/node?id=%s&sort=job' % node['id'])] if len(rows) >= 2])[0]
            assert (rows[0]['arguments'] == '%r, 0' % str(shared.end)
                    and rows[0]['state'] == 'running')
            assert site.post('/api/cancel', cluster=row['number'], node=node['id'],
                             jobs=[rows[0]['job']]) == (200, {'done': 1})
            eventually(lambda: jobs[0].status == dispy.DispyJob.Cancelled)
            assert sum(job.status in dispy.ENDED for job in jobs) == 1
            status, answer = site.post('/api/cancel_waiting', cluster=row['number'])
            assert status == 200 and answer['done'] >= 36
            eventually(lambda: sum(job.status == dispy.DispyJob.Cancelled for job in jobs) >= 37)
            eventually(lambda: site.post('/api/cancel', cluster=row['number'], node=node['id'],
                                         jobs='all')[0] == 200 and cluster.wait(0.5))
            assert {job.status for job in jobs} == {dispy.DispyJob.Cancelled}
            eventually(lambda: [row['cancelled'] for row in site.rows('/api/clusters')] == [40])


def test_all_jobs_of_a_scheduler_are_listed(shared):
    """By the page inside, the page beside it, and by that of the program."""
    end = str(shared.end)
    with shared.cluster(busy) as cluster, serve(cluster) as own:
        for site in shared.sites:
            listed(site)
            site.rows('/api/timeline')
        jobs = [cluster.submit(n, end) for n in range(40)]
        for site in (*shared.sites, own):
            counts = {'waiting': 28, 'running': 2, 'done': 9, 'failed': 1}
            eventually(lambda: {state: listed(site, '?state=' + state)['total'] for state in counts}
                       == counts)
            row, = listed(site, '?state=failed')['rows']
            assert (row['where'], row['text'], row['arguments']) == (
                'attic', 'ValueError: 3 is too much', '3, %r' % end)
            one, = site.rows('/api/job?cluster=%d&job=%d' % (row['cluster'], row['job']))
            assert one['stdout'] == ' 3\n' and 'in busy' in one['trace']
            rows = listed(site, '?state=waiting')['rows']
            assert [row['arguments'] for row in rows] == ['%d, %r' % (int(row['id']) - 1, end)
                                                          for row in rows]
            running = listed(site, '?state=running')['rows'][0]
            where = dict(cluster=running['cluster'], job=running['job'])
            one, = eventually(lambda: [row for row in site.rows(
                '/api/job?cluster=%(cluster)d&job=%(job)d' % where) if row['stdout']])
            assert one['stdout'] == ' %d\n' % (int(running['id']) - 1)
            status, answer = site.post('/api/stacks', **where)
            assert status == 200 and 'in busy' in answer['text'], answer
            row, = eventually(lambda: [row for row in site.rows('/api/timeline?span=3600')
                                       if len(row['running']) == 2])
            assert sum(numbers[3] for lane in row['lanes'] for numbers in fours(lane[2])) == 10
        first = listed(site, '?state=waiting&per=1')['rows'][0]
        assert site.post('/api/cancel', cluster=first['cluster'], jobs=[first['job']])[0] == 200
        eventually(lambda: jobs[int(first['id']) - 1].status == dispy.DispyJob.Cancelled)
        assert own.get('/api/accounts')[0] == 404
        shared.end.write_text('')
        assert cluster.wait(30)
        for site in shared.sites:   # what it remembers for accounts
            for by, name in (('user', None), ('computation', 'busy'),
                             ('day', time.strftime('%Y-%m-%d'))):
                row, = eventually(lambda: [row for row in site.rows('/api/accounts?days=2&by=' + by)
                                           if row['jobs'] == 40])
                assert (row['done'], row['failed'], row['cancelled']) == (38, 1, 1)
                assert row['cpu_seconds'] > 0 and row[by] == (name or row['user'])


def test_nodes_of_a_scheduler_are_managed_for_all(shared):
    """Also for a cluster that comes later."""
    site = shared.sites[1]
    with shared.cluster(fail) as first:
        first.wait_nodes(1, 20)
        node, = eventually(lambda: site.rows('/api/nodes'))   # as they were up to half a second ago

        def state():
            row, = site.rows('/api/nodes')
            return row['state'], row['cpus']
        assert site.post('/api/cpus', node=node['id'], cpus=1)[0] == 200
        eventually(lambda: state() == ('ready', 1)
                   and [node.cpus for node in first.status().nodes] == [1])
        status, answer = site.post('/api/cpus', node=node['id'], cpus=9)
        assert status == 400 and 'offers 2' in answer['error']
        status, answer = site.post('/api/cpus', node=node['id'], cpus=1, cluster=1)
        assert status == 400 and 'for all clusters' in answer['error']
        assert site.post('/api/drain', node=node['id'])[0] == 200
        eventually(lambda: state() == ('drained', 0))
        with shared.cluster(fail) as second:
            job = second.submit(2)
            eventually(lambda: [use['state'] for use in site.rows('/api/nodes')[0]['clusters']]
                       == ['drained', 'drained'])
            assert job.status == dispy.DispyJob.Created
            assert site.post('/api/release', node=node['id'])[0] == 200
            eventually(lambda: state()[0] == 'closed'
                       and {node.state for node in first.status().all_nodes} == {'closed'})
            with shared.cluster(fail) as third:
                eventually(lambda: [node.reason for node in third.status().all_nodes]
                           == ['released at the scheduler'])
                # Others may have it now
                with dispy.JobCluster(fail, nodes=[shared.node.address]) as direct:
                    assert direct.submit(4)(20) == 4
                assert site.post('/api/use', node=node['id'])[0] == 200
                assert job(20) == 2 and third.submit(6)(20) == 6 and first.submit(8)(20) == 8
        eventually(lambda: state() == ('ready', 2))
        with NodeProcess(shared.root / 'two', '--name', 'two') as two:
            assert site.post('/api/add', cluster=0, host='127.0.0.1', port=two.port)[0] == 200
            eventually(
                lambda: sorted((row['name'], row['state']) for row in site.rows('/api/nodes'))
                == [('attic', 'ready'), ('two', 'ready')])
            first.wait_nodes(2, 20)
        assert (site.post('/api/use', node='1.nowhere')[0] == 404
                and site.post('/api/cancel_waiting', cluster=99)[0] == 400)


def test_a_scheduler_that_is_away_is_said_to_be(shared):
    """And when it is there again, all goes on; a program's own monitor shows the scheduler
    meanwhile."""
    site = shared.sites[1]
    with shared.cluster(wait_for) as cluster, serve(cluster) as own:
        job = cluster.submit(str(shared.end))
        eventually(lambda: [row['running'] for row in site.rows('/api/clusters')] == [1])
        shared.scheduler.kill()
        eventually(lambda: site.rows('/api/clusters') == []
                   and 'is not connected' in site.get('/api/clusters')[1]['source'])
        assert site.post('/api/cancel_waiting', cluster=1)[0] == 409
        eventually(lambda: [row['port'] for row in own.rows('/api/nodes')]
                   == [shared.scheduler.port])
        with SchedulerProcess(shared.root / 'scheduler', '-n', '127.0.0.1:%d' % shared.node.port,
                              port=shared.scheduler.port):
            eventually(lambda: [(row['running'], row['waiting'])
                                for row in site.rows('/api/clusters')] == [(1, 0)], seconds=40)
            shared.end.write_text('')
            assert job(40) == 0
            eventually(lambda: [(row['done'], row['state']) for row in site.rows('/api/clusters')]
                       == [(1, 'idle')])
            eventually(lambda: [row['port'] for row in own.rows('/api/nodes')]
                       == [shared.node.port])
            cluster.close()


def test_a_scheduler_is_asked_in_pages(monkeypatch):
    """And no row comes twice or not at all; failures are told once."""
    monkeypatch.setattr(dispy_httpd, 'SCHEDULER_PAGE', 3)
    row = {'comp': 'c', 'name': 'n', 'program': 'p', 'connected': False, 'submitted': 1, 'done': 0,
           'failed': 1, 'cancelled': 0, 'job_seconds': 1.0, 'elapsed': 2.0}
    node = {'name': 'n', 'address': 'a', 'port': 1, 'state': 'connected', 'reason': '',
            'offered': 2, 'cpus': 2, 'free': [None, None, None], 'platform': '',
            'jobs': 0, 'job_seconds': 0.0, 'heard': None, 'uses': []}
    clusters = [dict(row, number=n, comp='c%d' % n) for n in range(7)]
    nodes = [dict(node, key=('a', n), uses=[(0, 'ready', '', 2, 1, 1, 0, 0.0)]) for n in range(6)]
    failed = [(n, 5.0, 0, n, None, 9, 'a', 'X', n) for n in range(1, 6)]
    asked = []

    def ask(name, first, count=2, *rest):
        asked.append(name)
        if name == 'failures':
            return 0.0, failed[first:first + count]
        if name in ('ended', 'at_nodes', 'waiting', 'arguments'):
            return 0.0, []
        return 0.5, [dict(row)
                     for row in {'clusters': clusters, 'nodes': nodes}[name][first:first + count]]
    source = dispy_httpd.SchedulerSource(ask, 'it', lambda: None)
    rows, found, cost = source.snapshot(True)
    assert ([row['number'] for row in rows] == list(range(7))
            and len({row['id'] for row in found}) == 6 and cost == 3.0)
    assert asked == ['clusters'] * 3 + ['nodes'] * 3 + ['failures'] * 4
    assert ((rows[0]['running'], rows[0]['used'], rows[0]['cpus'], rows[0]['program'])
            == (0, 6, 12, 'p (not connected)'))

    def failures():
        return [len(members) for _, members in dispy_httpd.grouped(source.job_list.rows())]
    assert failures() == [5]
    source.snapshot(True)
    assert failures() == [5]


@pytest.mark.parametrize('options, code, text', [
    (['--scheduler', 'a b', '-p', '0'], 1, "'a b' is not HOST"),
    (['--scheduler', 'x', '-n', 'y'], 2, 'not allowed with argument'),
    (['--nodes', 'a:x', '-p', '0'], 1, "'a:x' is not HOST"),
    (['--nodes', 'x', '-p', '70000'], 1, 'port=70000'),
    (['--nodes', 'x', '--secret-file', '/no/such'], 1, '/no/such')])
def test_a_command_line_that_does_not_work(options, code, text):
    done = subprocess.run([sys.executable, '-m', 'dispy_httpd', *options],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode == code and text in done.stderr.decode()
            and 'Traceback' not in done.stderr.decode())
