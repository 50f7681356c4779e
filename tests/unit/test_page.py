"""What the web page is made of, without a server: bars in time, lists of jobs, groups of
failures."""

import random

import pytest

import dispy
import dispy_httpd


def end(job, began, ended, node='1.a', state='done', cpus=1, **more):
    return dispy_httpd.listed_job(1, job, job, state, node=node, began=began, ended=ended,
                                  cpus=cpus, **more)


def lanes(timeline, node='1.a'):
    return [[bar.key[1] for bar in lane.bars] for lane in timeline.lanes_of(node, 0)]


def test_jobs_get_cpus_that_were_free():
    """Jobs that never were more than three at once have three lanes, and none hides another, in
    whichever order their times are drawn."""
    chance = random.Random(1)
    jobs, free = [], [1000.0] * 3
    for number in range(400):
        began = min(free)
        ended = began + chance.choice((0.01, 0.5, 2.0, 30.0))
        free[free.index(began)] = ended
        jobs.append(end(number, began, ended))
    timeline = dispy_httpd.Timeline()
    for row in sorted(jobs, key=lambda row: row['ended']):
        timeline.add(row)
    found = timeline.lanes_of('1.a', 0)
    assert len(found) == 3 and sum(len(lane.bars) for lane in found) == 400
    for lane in found:
        bars = list(lane.bars)
        assert all(one.ended <= next.began + dispy_httpd.CLOCK_STEP
                   for one, next in zip(bars, bars[1:]))


def test_a_job_stays_on_the_lane_where_it_was_seen_to_run():
    timeline = dispy_httpd.Timeline()
    running = [end(1, 1000.0, None, state='running'), end(2, 1001.0, None, state='running')]
    assert timeline.place(running) == {'1.a': [[0, 1000.0, 1, 1], [1, 1001.0, 1, 2]]}
    timeline.add(end(3, 990.0, 1010.0))    # nobody has seen it run
    timeline.add(end(2, 1001.0, 1020.0))
    timeline.add(end(1, 1000.0, 1030.0))
    assert lanes(timeline) == [[1], [2], [3]]
    # One that has moved to another node meanwhile takes a lane there
    timeline.place([end(4, 1040.0, None, state='running')])
    timeline.add(end(4, 1041.0, 1042.0, node='1.b'))
    assert lanes(timeline, '1.b') == [[4]] and timeline.place([]) == {}
    timeline.add(end(5, 1050.0, 1060.0, cpus=2))
    assert lanes(timeline) == [[1, 5], [2, 5], [3]]   # those that were used last


def test_bars_are_bounded_and_nodes_that_are_gone_are_forgotten(monkeypatch):
    monkeypatch.setattr(dispy_httpd, 'BARS_KEPT', 10)
    timeline = dispy_httpd.Timeline()
    for number in range(30):
        node = '1.b' if number > 15 else '1.a'
        timeline.add(end(number, 1000.0 + number, 1000.5 + number, node=node))
    assert lanes(timeline) == [[]] and lanes(timeline, '1.b') == [list(range(20, 30))]
    timeline.forget_nodes([])
    assert timeline.bars_at('1.a', 0, 0.0, 2000.0) == [] and timeline.count == 30
    bars = timeline.bars_at('1.b', 0, 1025.2, 1026.2)
    assert [bar.key[1] for bar in bars] == [26, 25] and timeline.bars_at('1.b', 9, 0, 1) == []


def numbers(runs, known=0):
    begin, found = runs.after(known)
    rows, end = [], 0
    for at in range(0, len(found), 4):
        first = end + found[at]
        end = first + found[at + 1]
        rows.append([first, end, *found[at + 2:at + 4]])
    return begin, rows


def test_short_jobs_become_one_run_and_a_failure_is_not_hidden():
    timeline = dispy_httpd.Timeline()
    for number in range(100):
        state = 'failed' if number == 50 else 'done'
        timeline.add(end(number, 1000.0 + number / 100, 1000.005 + number / 100, state=state))
    timeline.add(end(100, 1020.0, 1050.0))
    lane, = timeline.lanes_of('1.a', 1)
    runs = lane.runs_of(10.0, 0.0)
    assert numbers(runs) == (0, [[100, 100, 2, 100], [102, 105, 0, 1]])
    timeline.add(end(101, 1055.0, 1090.0, state='cancelled'))
    # What a browser with two runs gets: the last that it has, which may have grown, and the new
    assert numbers(runs, 2) == (1, [[102, 105, 0, 1], [106, 109, 1, 1]])
    assert lane.runs_of(10.0, 1030.0) is runs
    assert runs.first == 1 and numbers(runs, 0)[0] == 1


def test_a_browser_is_told_what_is_new():
    class Nothing:
        def ended(self):
            return []
        running = current = failures = ended
    jobs = dispy_httpd.JobList(Nothing())
    known = dispy_httpd.Known(jobs)
    node = {'id': '1.a', 'name': 'a', 'address': 'a', 'state': 'ready', 'cpus': 2}

    def news():
        rows, _ = jobs.bars([node], 1e9)
        return known.news({'rows': rows})['rows'][0]['lanes']
    assert news() == []
    jobs.timeline.add(end(1, 1e9, 1e9 + 1))
    assert [lane[:2] for lane in news()] == [[0, 0]] and news() == []
    jobs.timeline.add(end(2, 1.2e9, 1.3e9))
    jobs.timeline.add(end(3, 1.2e9, 1.3e9))
    assert sorted(lane[:2] for lane in news()) == [[0, 0], [1, 0]] and news() == []


def test_what_is_not_listed_is_counted_and_nothing_else(monkeypatch):
    """Jobs that were counted before the list was made, and are not in it: not those that have ended
    or begun in between."""
    class Jobs:
        unlisted, waiting, new = 0, 5, []

        def ended(self):
            new, self.new = self.new, []
            return new

        def current(self):
            self.unlisted = max(0, self.waiting - 3)
            return [dispy_httpd.listed_job(1, n, n, 'waiting') for n in range(self.waiting)][:3]

        def failures(self):
            return []

    def ended(job):
        return dispy.EndedJob(job, 1, job, job, None, 11, 1, None, '', 1, None, 1.0, 2.0, b'', b'',
                              ''), ''
    monkeypatch.setattr(dispy_httpd, 'LIST_APART', -1.0)
    source = Jobs()
    jobs = dispy_httpd.JobList(source)
    jobs.follow([{'done': 4, 'failed': 1, 'cancelled': 2}])
    source.new = [ended(100), ended(101)]
    assert len(jobs.rows()) == 5 and jobs.unlisted == {'waiting': 2, 'ended': 5}
    source.new = [ended(n) for n in range(102, 110)]   # more than were counted
    source.waiting = 1
    assert len(jobs.rows()) == 11 and jobs.unlisted == {'waiting': 0, 'ended': 0}


def test_a_history_of_a_node_stays_small_and_whole():
    histories = dispy_httpd.NodeHistories()
    for second in range(3000):
        rows = [{'id': name, 'used': 1, 'cpus': 2, 'load': 50.0, 'memory': 9} for name in 'ab']
        histories.add(rows, 1000.0 + second)
    plot = rows[0]['plot']
    assert (len(plot) <= dispy_httpd.NODE_POINTS and plot[0] == (1000.0, 1, 2, 50.0, 9)
            and plot[-1][0] > 3900)
    histories.add([], 5000.0)
    rows = [{'id': 'a', 'used': 1, 'cpus': 2, 'load': None, 'memory': None}]
    histories.add(rows, 5001.0)
    assert rows[0]['plot'] == [(5001.0, 1, 2, None, None)]


@pytest.mark.parametrize('line, pattern', [
    ('ValueError: 12 is odd', 'ValueError: # is odd'),
    ('OSError: [Errno 28] /scratch/node07/x: no space',
     'OSError: [Errno #] /scratch/#/x: no space'),
    ('KeyError: <object at 0x7f00ab>', 'KeyError: <object at #>'),
    ('x = 1.5e-3, y = 2.5', 'x = #, y = #'), ('', '')])
def test_the_pattern_of_a_failure(line, pattern):
    assert dispy_httpd.pattern_of(line, ('node07', '')) == pattern


def test_the_list_is_narrowed():
    rows = [end(n, 1.0, 2.0, state=state, where='attic', text=text) for n, state, text in (
        (1, 'done', ''), (2, 'failed', 'x\nValueError: 1'), (3, 'failed', 'ValueError: 2'),
        (4, 'waits there', ''))]
    rows.append(dispy_httpd.listed_job(2, 4, 'a', 'waiting'))

    def found(**query):
        wanted = dispy_httpd.JobFilter(query)
        assert query == {}
        return [(row['cluster'], row['job']) for row in rows
                if wanted.fits(row) and wanted.is_found(row, 'ARGS %s' % row['job'])]
    assert len(found()) == 5 and found(cluster='2') == [(2, 4)]
    assert found(state='waiting') == [(1, 4), (2, 4)] and found(state='ended', node='1.b') == []
    assert found(group=dispy_httpd.group_key(rows[1])) == [(1, 2), (1, 3)]
    assert found(search='args 3') == [(1, 3)] and found(search='VALUEerror') == [(1, 2), (1, 3)]
    with pytest.raises(dispy_httpd.Refusal):
        dispy_httpd.JobFilter({'state': 'lost'})


# -- what has ended --------------------------------------------------------------------------------

def add(jobs, number, cluster=1, stdout=b'', payload=b''):
    row = (cluster, number, number, payload, 11, 1, None, '', 1, None, 1.0, 2.0)
    jobs.add(row, stdout, b'', '', ())


def test_ended_jobs_are_bounded_in_number_and_in_bytes(monkeypatch):
    monkeypatch.setattr(dispy, 'ENDED_KEPT', 10)
    jobs = dispy.EndedJobs()
    for number in range(25):
        add(jobs, number, cluster=number % 2)
    assert [row.job for row in jobs.since(0)] == list(range(15, 25))
    assert [row.job for row in jobs.since(23)] == [23, 24] and jobs.since(25) == []
    assert [row.job for row in jobs.since(0, 2)] == [15, 16]
    assert [row.job for row in jobs.since(18, 9, {1})] == [19, 21, 23]
    # A number of an earlier process
    assert len(jobs.since(99)) == 10
    monkeypatch.setattr(dispy, 'ENDED_BYTES', 10000)
    add(jobs, 25, stdout=b'x' * 9000)
    row = jobs.since(25)[0]
    assert len(row.stdout) == dispy.OUTPUT_SHOWN and row.number == 26
    add(jobs, 26, stdout=b'x' * 9000)
    add(jobs, 27, stdout=b'x' * 9000, payload=b'x' * 100000)
    assert [row.job for row in jobs.since(0)] == [26, 27] and jobs.since(27)[0].payload == 100000


# -- accounts --------------------------------------------------------------------------------------

def test_a_history_is_read_on_and_no_job_is_counted_twice(monkeypatch):
    """In pages, the last of which may be asked for again with more jobs in it."""
    rows = []

    def add(user, outcome, ended=86400.0 * 20000, proven=1, name='f'):
        rows.append((user, proven, 'p', name, len(rows), 'attic', ended - 10.0, ended, 2, outcome,
                     'c' + name))

    def ask(name, after, since):
        assert (name, since) == ('history', 0.0)
        page = rows[after:after + 5]
        return (after + 5 if after + 5 < len(rows) else -1), page
    accounts = dispy_httpd.Accounts(ask)

    def by(word):
        return {(row['user'], row['computation']): (row['jobs'], row['done'], row['failed'],
                                                    row['cancelled'], row['cpu_seconds'])
                for row in dispy_httpd.summed(accounts.read(), word)}
    assert by('user') == {} and accounts.is_complete
    for number in range(12):
        add('ada', 'failed' if number % 4 == 3 else 'done')
    add('bob', 'cancelled', proven=0, name='g')
    assert by('user') == {('ada', ''): (12, 9, 3, 0, 240.0), ('bob (not proven)', ''): (
        1, 0, 0, 1, 20.0)}
    add('ada', 'done', ended=86400.0 * 20002, name='g')
    assert by('computation') == {('ada', 'f'): (12, 9, 3, 0, 240.0), ('ada', 'g'): (
        1, 1, 0, 0, 20.0), ('bob (not proven)', 'g'): (1, 0, 0, 1, 20.0)}
    assert by('user')['ada', ''] == (13, 10, 3, 0, 260.0)
    days = dispy_httpd.summed(accounts.read(), 'day')
    assert [row['jobs'] for row in sorted(days, key=lambda row: row['day'])] == [13, 1]
    for number in range(300):
        add('ada', 'done', name='n%d' % number)
    monkeypatch.setattr(dispy_httpd.Accounts, 'PAGES', 2)
    accounts.read()
    assert not accounts.is_complete
    while not accounts.is_complete:
        accounts.read()
    assert by('user')['ada', ''][0] == 313
    monkeypatch.setattr(dispy_httpd, 'ACCOUNTS_KEPT', 3)
    accounts.read()
    assert len(accounts.read()) == 3
