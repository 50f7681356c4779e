"""What the timeline of the web page costs, with 200 nodes of 4 CPUs and 100,000 jobs.

    python tests/bench/page.py [--nodes N] [--cpus N] [--jobs N] [--rate N] [--seconds S]

A scheduler is simulated that gives the answers of `ProgramOverview`; the server, its page and the
browser (Chromium, without a screen) are the real ones. First 100,000 jobs have ended, then others
go on ending at the given rate. It prints the bytes of the first event and of a second, the
milliseconds of the browser's main thread in a second and for one painting, and the CPU of the
process that serves, all of them while the page is open.
"""

import argparse
import http.client
import json
import os
import random
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), os.path.dirname(HERE),
                os.path.join(os.path.dirname(HERE), 'system')]

import dispy_httpd  # noqa: E402


class Simulated:
    """Nodes whose CPUs run one job after the other, up to the time at which it is asked."""

    def __init__(self, nodes, cpus, jobs, rate):
        self.chance = random.Random(7)
        self.nodes, self.cpus = nodes, cpus
        self.mean = nodes * cpus / rate                # s that a job runs
        now = time.time()
        begin = now - jobs / rate
        self.free = [(begin, lane) for lane in range(nodes * cpus)]
        self.running = {}                              # lane -> (began, ends, number)
        self.count, self.rows, self.dropped = 0, [], 0
        for began, lane in self.free:
            self.begin(lane, began)
        self.go_on(now)

    def begin(self, lane, began):
        self.count += 1
        lasts = self.mean * self.chance.uniform(0.2, 1.8)
        self.running[lane] = (began, began + lasts, self.count)

    def go_on(self, now):
        ended = []
        for lane in range(self.nodes * self.cpus):
            began, ends, number = self.running[lane]
            while ends <= now:
                ended.append((ends, lane, began, number))
                self.begin(lane, ends)
                began, ends, number = self.running[lane]
        for ends, lane, began, number in sorted(ended):
            node = lane // self.cpus
            failed = number % 97 == 0
            text = 'ValueError: no convergence after %d steps' % number if failed else ''
            self.rows.append((len(self.rows) + self.dropped + 1, 1, number << 16, number, None,
                              9 if failed else 11, 1, ('10.0.0.%d' % node, 9701),
                              'node%03d' % node, 1, None, began, ends, b'', b'', text))

    def ask(self, name, *args):
        return 0.0, getattr(self, name)(*args)

    def clusters(self, first, count):
        self.go_on(time.time())
        ended = len(self.rows)
        row = {'number': 1, 'comp': 'c', 'name': 'simulated', 'program': 'somebody', 'user': 'u',
               'connected': True, 'submitted': ended + 100000, 'done': ended, 'failed': 0,
               'cancelled': 0, 'job_seconds': 1.0, 'elapsed': 2.0}
        return [row][first:first + count]

    def nodes_page(self, first, count):
        found = []
        for node in range(first, min(first + count, self.nodes)):
            found.append({
                'name': 'node%03d' % node, 'address': '10.0.0.%d' % node, 'port': 9701,
                'state': 'connected', 'reason': '', 'offered': self.cpus, 'cpus': self.cpus,
                'free': [1 << 33, 1 << 36, 40.0], 'totals': [1 << 34, 1 << 38], 'platform': 'Linux',
                'jobs': 0, 'job_seconds': 0.0, 'heard': 0.1, 'key': ('10.0.0.%d' % node, 9701),
                'uses': [(1, 'ready', '', self.cpus, self.cpus, self.cpus, 0, 0.0)]})
        return found

    def failures(self, known):
        return []

    def waiting(self, number, first, count):
        return []

    def arguments(self, jobs):
        return [None] * len(jobs)

    def looks(self, jobs, wants_stacks):
        return [None] * len(jobs)

    def ended(self, known):
        return self.rows[known:known + 500]

    def at_nodes(self, first, count):
        now = time.time()
        found = []
        for lane in range(first, min(first + count, self.nodes * self.cpus)):
            began, _, number = self.running[lane]
            found.append((1, number << 16, 1, ('10.0.0.%d' % (lane // self.cpus), 9701), True,
                          now - began, 1))
        return found


def events(url, path, seconds):
    """Yield (time, bytes) of the events of a stream."""
    base, _, token = url.partition('/#token=')
    connection = http.client.HTTPConnection(base.partition('//')[2], timeout=20)
    connection.request('GET', path, headers={'Authorization': 'Bearer ' + token,
                                             'Accept': 'text/event-stream'})
    answer = connection.getresponse()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        line = answer.readline()
        if line.startswith(b'data: '):
            yield time.monotonic(), len(line)
    connection.close()


def browse(args, url, path):
    import test_browser
    with tempfile.TemporaryDirectory() as directory:
        browser = test_browser.Browser(directory, url)
        try:
            browser.open().page(path)
            browser.see(lambda: browser.all('#bars') and browser.script(
                'return document.getElementById("bars").dataset.ms'))
            browser.command('Performance.enable', {})

            def metrics():
                found = browser.command('Performance.getMetrics', {})['metrics']
                return {row['name']: row['value'] for row in found}
            time.sleep(3)
            before, cpu, began = metrics(), time.process_time(), time.monotonic()
            paintings = []
            while time.monotonic() - began < args.seconds:
                time.sleep(0.25)
                paintings.append(float(browser.script(
                    'return document.getElementById("bars").dataset.ms')))
            after, cpu_after, took = metrics(), time.process_time(), time.monotonic() - began
            if args.pictures:
                browser.driver.save_screenshot(os.path.join(args.pictures, 'timeline-200.png'))
            found = {name: round(1000 * (after[name] - before[name]) / took, 1)
                     for name in ('TaskDuration', 'ScriptDuration', 'LayoutDuration')}
            paintings.sort()
            return {
                'main thread, ms a second': found['TaskDuration'],
                'of it scripts, ms a second': found['ScriptDuration'],
                'one painting, ms (median)': paintings[len(paintings) // 2],
                'one painting, ms (longest)': paintings[-1],
                'heap of the page, MB': round(after['JSHeapUsedSize'] / 1e6, 1),
                'CPU of this process, % of one': round(100 * (cpu_after - cpu) / took, 1),
                'errors of the browser': browser.errors(),
            }
        finally:
            browser.driver.quit()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--nodes', type=int, default=200)
    parser.add_argument('--cpus', type=int, default=4)
    parser.add_argument('--jobs', type=int, default=100000)
    parser.add_argument('--rate', type=float, default=400.0, help='jobs that end in a second')
    parser.add_argument('--seconds', type=float, default=20.0)
    parser.add_argument('--span', type=int, default=300, help='s that the timeline shows')
    parser.add_argument('--pictures', metavar='DIR')
    args = parser.parse_args()
    scheduler = Simulated(args.nodes, args.cpus, args.jobs, args.rate)
    page = scheduler.nodes_page

    def ask(name, *words):
        if name == 'nodes':
            return 0.0, page(*words[:2])
        return scheduler.ask(name, *words)
    source = dispy_httpd.SchedulerSource(ask, 'a simulation', lambda: None)
    server = dispy_httpd.SourceHTTPServer(source, port=0)
    path = 'timeline?span=%d&per=200' % args.span
    try:
        began = time.monotonic()
        sizes = list(events(server.url, '/api/' + path, args.seconds / 2))
        first, rest = sizes[0], sizes[1:]
        took = rest[-1][0] - first[0]
        found = {
            'nodes, CPUs, jobs ended': [args.nodes, args.nodes * args.cpus, len(scheduler.rows)],
            'first event, bytes': first[1],
            'until it came, s': round(first[0] - began, 2),
            'events a second': round(len(rest) / took, 1),
            'bytes a second': round(sum(size for _, size in rest) / took),
        }
        idle = time.process_time()
        time.sleep(5)
        found['CPU without a page, % of one'] = round(100 * (time.process_time() - idle) / 5, 1)
        found.update(browse(args, server.url, path))
    finally:
        server.shutdown(wait=False)
    print(json.dumps(found, indent=1))


if __name__ == '__main__':
    main()
