"""The web monitor in a real browser: Debian's Chromium, without a screen. Pictures of every page
come to tests/screenshots."""

import contextlib
import itertools
import os
import shutil
import time

import pytest

import dispy
import dispy_httpd
from conftest import ROOT, eventually
from nodes import NodeProcess, SchedulerProcess

webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
from selenium.common.exceptions import (  # noqa: E402
    StaleElementReferenceException, WebDriverException)
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))),
                None)
DRIVER = shutil.which('chromedriver')
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER),
                                reason='there is no Chromium with its chromedriver')

SCREENSHOTS = os.path.join(ROOT, 'tests', 'screenshots')
EVIL = ('<script>window.broken = 1</script><img src=x onerror="window.broken '
        '= 1"> & "quotes" \'and\' more')


class Browser:
    """One window. `page(name)` goes to a page of the monitor; the others look at what is there
    now."""

    def __init__(self, directory, url):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for word in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic',
                     '--no-first-run', '--disable-background-networking',
                     '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage',
                     '--user-data-dir=%s' % directory):
            options.add_argument(word)
        options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.command = self.driver.execute_cdp_cmd
        self.url = url
        self.look(1280, 860, False)

    def look(self, width, height, dark):
        self.width, self.height = width, height
        self.size(width, height)
        self.command('Emulation.setEmulatedMedia', {
            'features': [{'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}]})

    def size(self, width, height):
        self.command('Emulation.setDeviceMetricsOverride', {
            'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': width < 500})

    def open(self):
        self.driver.get(self.url)
        return self

    def page(self, name):
        self.driver.get(self.url.partition('#')[0] + '#/' + name)
        return self

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector='main'):
        return ' '.join(element.text for element in self.all(selector))

    def see(self, condition, what=''):
        """Wait until it holds; the page may change under its hands."""
        def tried():
            with contextlib.suppress(StaleElementReferenceException, IndexError):
                return condition()
        return eventually(tried, what='%s; there is: %.600s' % (what, self.text('body')))

    def reads(self, *words):
        for word in words:
            self.see(lambda: word in self.text('body'), repr(word))

    def click(self, words, selector='button'):
        def tried():
            element = next((element for element in self.all(selector) if words in element.text
                            and element.is_enabled()), None)
            if element is not None:
                # It has moved
                with contextlib.suppress(StaleElementReferenceException, WebDriverException):
                    element.click()
                    return True
        self.see(tried, 'a click on ' + words)

    def figures(self):
        """What stands under Done, Failed and so on, of the first cluster, at one moment."""
        return self.driver.execute_script(
            'return Object.fromEntries('
            '[...document.querySelector("section").querySelectorAll("[data-figure]")]'
            '.map(e => [e.dataset.figure, '
            'parseInt(e.firstChild.textContent.replace(/[^0-9]/g, ""))]))')

    def bars(self):
        """What the canvas of the timeline tells of itself."""
        return dict(self.script('const bars = document.getElementById("bars"); '
                                'return bars ? {...bars.dataset} : {}'))

    def script(self, text, *args):
        return self.driver.execute_script(text, *args)

    def errors(self):
        return [line['message'] for line in self.driver.get_log('browser')
                if line['level'] in ('SEVERE', 'WARNING')]

    def picture(self, name):
        """Of a phone, the whole page. Nothing on it is wider than the window."""
        assert self.script('return document.documentElement.scrollWidth') <= self.width
        if self.width < 500:
            length = self.script('return document.documentElement.scrollHeight')
            self.size(self.width, max(self.height, min(3000, length)))
        os.makedirs(SCREENSHOTS, exist_ok=True)
        self.driver.save_screenshot(os.path.join(SCREENSHOTS, name + '.png'))
        self.size(self.width, self.height)


@pytest.fixture
def browse(tmp_path):
    """A callable that opens browsers: browse(server)."""
    with contextlib.ExitStack() as stack:
        def opened(server):
            browser = Browser(tmp_path / ('browser-%d' % time.monotonic_ns()),
                              getattr(server, 'url', server))
            stack.callback(browser.driver.quit)
            return browser.open()
        yield opened


@contextlib.contextmanager
def monitor(cluster):
    server = dispy_httpd.DispyHTTPServer(cluster, port=0, poll_sec=0.25)
    try:
        yield server
    finally:
        server.shutdown(wait=False)


def work(n):
    time.sleep(0.01)
    if n % 50 == 49:
        raise ValueError('%d is too much' % (n % 4))
    return n


def wait_for(path, *words):
    print('waiting for', *words, flush=True)
    while not os.path.exists(path):
        time.sleep(0.01)


def test_two_browsers_show_the_numbers_of_500_jobs(browse):
    """While they run all figures add up, in both; in the end they are the cluster's."""
    with dispy.JobCluster(work, nodes='local') as cluster, monitor(cluster) as server:
        browsers = [browse(server), browse(server)]
        for browser in browsers:
            browser.reads('idle', 'live')
        jobs = [cluster.submit(n) for n in range(500)]
        while cluster.status().jobs_pending:
            for browser in browsers:
                shown = browser.figures()
                total = sum(shown[word]
                            for word in ('Done', 'Failed', 'Cancelled', 'Running', 'Waiting'))
                submitted, *ended = dispy.core_of(cluster).jobs_counted()
                ended = sum(ended)
                assert (total in (0, 500) and shown['Done'] + shown['Failed'] <= ended
                        and shown['CPUs used'] <= cluster.status().nodes[0].cpus)
        done = sum(job.status == dispy.DispyJob.Finished for job in jobs)
        for browser in browsers:
            browser.see(lambda: [browser.figures()[word]
                                 for word in ('Done', 'Failed', 'Cancelled', 'Running', 'Waiting')]
                        == [done, 500 - done, 0, 0, 0])
            browser.page('nodes').see(lambda: browser.text('td[data-label="Jobs done"]') == '500')
            browser.page('failures').see(
                lambda: sum(int(element.text) for element in browser.all('.count')) == 10)
            assert browser.errors() == []


def test_jobs_are_cancelled_and_their_arguments_shown_literally(browse, tmp_path):
    """One, some, all; a second click is asked for where it is more than one."""
    end = tmp_path / 'end'
    with dispy.JobCluster(wait_for, nodes='local') as cluster, monitor(cluster) as server:
        browser = browse(server)
        cluster.wait_nodes(1, 20)
        cpus = cluster.status().nodes[0].cpus
        jobs = [cluster.submit_job_id(EVIL + str(n), str(end), EVIL) for n in range(12 * cpus)]
        name = cluster.status().nodes[0].name
        browser.page('nodes').click(name, 'td a')
        browser.reads(EVIL, 'waiting for ' + EVIL)
        assert (browser.script('return window.broken') is None
                and browser.all('main script, main img') == [])
        first = browser.see(lambda: browser.all('td[data-label=Job]')[0].text)
        browser.see(lambda: browser.all('tbody tr')[0].find_element(By.TAG_NAME, 'button').click()
                    or True)
        browser.reads('1 job is being ended')
        ended = eventually(lambda: [job for job in jobs if job.status in dispy.ENDED])
        assert [job.id for job in ended] == [first] and ended[0].status == dispy.DispyJob.Cancelled
        browser.see(lambda: first not in [element.text
                                          for element in browser.all('td[data-label=Job]')])
        browser.see(
            lambda: browser.all('tbody tr')[0].find_element(By.CSS_SELECTOR, 'input').click()
            or True)
        browser.click('Cancel 1 selected job')
        browser.click('Yes: cancel 1 selected job')
        eventually(lambda: sum(job.status == dispy.DispyJob.Cancelled for job in jobs) == 2)
        browser.page('clusters').click('waiting')
        browser.click('Yes: cancel')
        browser.see(lambda: browser.figures()['Waiting'] == 0)
        browser.page('nodes').click(name, 'td a')
        browser.click('Cancel all')
        browser.click('Yes: cancel all')
        assert cluster.wait(30) and {job.status for job in jobs} == {dispy.DispyJob.Cancelled}
        browser.page('clusters').see(lambda: browser.figures()['Cancelled'] == len(jobs))
        assert browser.errors() == []


def test_a_node_is_added_limited_drained_and_released(browse, tmp_path):
    with NodeProcess(tmp_path / 'one', '--name',
                     'one') as one, NodeProcess(tmp_path / 'two', '--name', 'two') as two:
        with dispy.JobCluster(work, nodes=[one.address]) as cluster, monitor(cluster) as server:
            cluster.wait_nodes(1, 20)
            browser = browse(server).page('manage')
            browser.reads('0 of 2')

            def nodes():
                return {node.name: (node.state, node.cpus) for node in cluster.status().all_nodes}
            box = browser.all('td form input')[0]
            box.clear()
            box.send_keys('1' + Keys.ENTER)
            eventually(lambda: nodes()['one'] == ('ready', 1))
            browser.reads('0 of 1')
            browser.all('input[name=host]')[0].send_keys('127.0.0.1')
            browser.all('input[name=port]')[0].send_keys(str(two.port))
            time.sleep(0.6)
            # Updates leave it alone
            assert browser.all('input[name=host]')[0].get_attribute('value') == '127.0.0.1'
            browser.click('Add')
            eventually(lambda: nodes().get('two') == ('ready', 2))
            browser.reads('two')
            browser.click('Drain')
            browser.reads('drained')
            eventually(lambda: nodes()['one'] == ('ready', 0))
            browser.click('Use again')
            eventually(lambda: nodes()['one'] == ('ready', 2))
            browser.click('Release')
            browser.click('Yes: release')
            eventually(lambda: nodes()['one'][0] == 'closed')
            browser.reads('closed by the program')
            assert browser.errors() == []


def test_where_no_stream_comes_through_it_polls(browse):
    with dispy.JobCluster(work, nodes='local') as cluster, monitor(cluster) as server:
        browser = browse('about:blank')
        browser.command('Page.addScriptToEvaluateOnNewDocument',
                        {'source': '''const real = window.fetch;
            window.fetch = (url, more) => more.headers.Accept === "text/event-stream"
                ? Promise.reject(new TypeError("no")) : real(url, more);'''})
        browser.url = server.url
        browser.open().reads('polled', 'idle')
        cluster.submit(1)
        browser.see(lambda: browser.figures()['Done'] == 1)


def test_the_token_and_the_end(browse):
    """Without it the page says how to get it; with it, the address bar does not keep it, and a
    reload needs no link."""
    with dispy.JobCluster(work, nodes='local') as cluster:
        server = dispy_httpd.DispyHTTPServer(cluster, port=0, poll_sec=0.25)
        try:
            browser = browse(server.url.partition('#')[0])
            browser.reads('the link that the program printed', 'no token')
            browser.url = server.url
            browser.open().reads('live', 'idle')
            assert ('token' not in browser.driver.current_url
                    and browser.script('return document.cookie') == '')
            browser.driver.refresh()
            browser.reads('live', 'idle')
        finally:
            server.shutdown()
        browser.reads('the program has ended')


def test_the_keyboard_is_enough(browse):
    with dispy.JobCluster(work, nodes='local') as cluster, monitor(cluster) as server:
        cluster.wait_nodes(1, 20)
        browser = browse(server)
        browser.reads('live')

        def tab_to(words):
            for _ in range(30):
                browser.driver.switch_to.active_element.send_keys(Keys.TAB)
                active = browser.driver.switch_to.active_element
                if words in active.text:
                    assert browser.script('return getComputedStyle(arguments[0]).outlineStyle',
                                          active) != 'none'
                    return active
            raise AssertionError('%s is not reached' % words)
        tab_to('Nodes').send_keys(Keys.ENTER)
        browser.reads('Memory free')
        tab_to('Jobs done').send_keys(Keys.ENTER)
        browser.see(lambda: browser.all('th[aria-sort]')[0].text.startswith('Jobs done'))
        tab_to(cluster.status().nodes[0].name).send_keys(Keys.ENTER)
        browser.reads('Jobs on this node')


def test_jobs_are_found_looked_at_and_cancelled(browse, tmp_path):
    """From a count to the list, by searching, to one job, whose output follows its end; to its
    stack; and from a group of failures to its jobs. The title says how far all is."""
    end = str(tmp_path / 'end')
    with dispy.JobCluster(scene, nodes='local') as cluster, monitor(cluster) as server:
        browser = browse(server)
        jobs = [cluster.submit_job_id('job%d' % n, n, end) for n in range(43)]
        eventually(lambda: dispy.core_of(cluster).book.submitted
                   - dispy.core_of(cluster).book.pending == 42, seconds=40)
        browser.see(lambda: browser.driver.title.startswith('97 % \u00b7 6 failed \u00b7 Clusters'),
                    'a title')
        browser.click('6', 'dd a[href*="state=failed"]')
        browser.see(lambda: len(browser.all('main tbody tr')) == 6)
        browser.page('failures').click('', 'summary')
        browser.reads('no convergence after # steps', 'scene')
        browser.click('all 6 in the list', 'details a')
        browser.see(lambda: len(browser.all('main tbody tr')) == 6)
        browser.click('running', '.tabs a')
        browser.see(lambda: len(browser.all('main tbody tr')) == 1)
        browser.click('all', '.tabs a')
        browser.all('input[type=search]')[0].send_keys('JOB42')
        browser.see(lambda: len(browser.all('main tbody tr')) == 1)
        assert browser.all('input[type=search]')[0].get_attribute('value') == 'JOB42'
        browser.click('job42', 'td a')
        browser.reads('Job job42', 'step 1 of 42')
        # The end of what is printed stays in sight, until somebody scrolls away from it
        bottom = ('const box = document.querySelector("pre[aria-label=stdout]"); '
                  'return box && box.scrollHeight > box.clientHeight '
                  '&& box.scrollHeight - box.scrollTop - box.clientHeight')
        browser.see(lambda: browser.script(bottom) is not False and browser.script(bottom) < 5)
        browser.script('document.querySelector("pre[aria-label=stdout]").scrollTop = 0')
        lines = browser.text('pre[aria-label=stdout]')
        browser.see(lambda: browser.text('pre[aria-label=stdout]') != lines)
        assert browser.script(bottom) > 5
        browser.click('Show stack')
        browser.reads('most recent call first', 'in scene')
        browser.click('Cancel')
        browser.click('Yes: cancel')
        eventually(lambda: jobs[42].status == dispy.DispyJob.Cancelled)
        browser.reads('cancelled')
        assert browser.errors() == []
        (tmp_path / 'end').write_text('')
        assert cluster.wait(20)


def test_the_timeline_by_pointer_and_by_keyboard(browse, tmp_path):
    end = str(tmp_path / 'end')
    with NodeProcess(tmp_path / 'a', '--name', 'basement', cpus=1) as node:
        with dispy.JobCluster(scene, nodes=[node.address]) as cluster, monitor(cluster) as server:
            browser = browse(server).page('timeline?span=60')
            browser.reads('Timeline', '0 of 1 CPU used')
            job = cluster.submit_job_id(EVIL, 44, end)
            browser.reads('1 of 1 CPU used')
            canvas = browser.all('#bars')[0]
            pointer = webdriver.ActionChains(browser.driver)
            right = int(canvas.get_attribute('clientWidth')) // 2 - 2
            pointer.move_to_element_with_offset(canvas, right, 10).perform()
            browser.reads('basement, CPU 1', 'running', EVIL, '44, ')
            assert (browser.script('return window.broken') is None
                    and browser.all('main script, main img') == [])
            (tmp_path / 'end').write_text('')
            assert job(20) == 44
            browser.reads('0 of 1 CPU used')
            canvas = browser.all('#bars')[0]
            heading = browser.all('main h1')[0]
            pointer.move_to_element(heading).perform()
            while 'done' not in browser.text('#tip'):   # to the left, by more than a second each
                before = browser.text('#tip')
                canvas.send_keys(Keys.ARROW_DOWN, *[Keys.ARROW_LEFT] * 3)
                browser.see(lambda: browser.text('#tip') not in ('', before))
            canvas.send_keys(Keys.ENTER)
            browser.reads('Job <script>', 'Waited')
            assert browser.errors() == []


def test_nodes_are_where_it_opens_if_only_these_are_watched(browse, tmp_path):
    with NodeProcess(tmp_path / 'a', '--name', 'basement') as node:
        source = dispy_httpd.NodesSource(dispy_httpd.NodeMonitor([node.address]))
        with dispy_httpd.SourceHTTPServer(source, port=0, poll_sec=0.25) as server:
            browser = browse(server)
            browser.reads('basement', 'Memory free')
            assert browser.driver.current_url.endswith('#/nodes')
            browser.see(lambda: browser.text('#nav').split() == ['Nodes', 'Manage'])


def scene(number, end):
    print('step 1 of', number, flush=True)
    time.sleep(number / 50)
    if number % 7 == 6:
        raise ValueError('no convergence after %d steps' % (number % 3 * 100))
    while number > 40 and not os.path.exists(end):
        print('waiting', flush=True)
        time.sleep(0.1)
    return number


LOOKS = {'light': (1280, 860, False), 'dark': (1280, 860, True), 'phone': (390, 844, False),
         'phone-dark': (390, 844, True)}


@pytest.mark.long
def test_pictures_of_every_page(browse, tmp_path):
    """To be looked at. Nothing is wider than the window, and the browser has nothing to complain
    of."""
    end = str(tmp_path / 'end')
    with NodeProcess(tmp_path / 'a', '--name',
                     'basement') as a, NodeProcess(tmp_path / 'b', '--name', 'attic', cpus=1) as b:
        with dispy.JobCluster(scene, nodes=[a.address, b.address, ('127.0.0.1', 9)],
                              loglevel=dispy.logger.ERROR) as cluster, monitor(cluster) as server:
            cluster.wait_nodes(2, 20)
            for n in range(60):
                cluster.submit(n, end)
            cluster.set_node_cpus('attic', 1)
            browser = browse(server)
            eventually(lambda: dispy.core_of(cluster).book.finished > 30, seconds=40)
            pages = ('clusters', 'timeline?span=60', 'jobs', 'job?cluster=1&job=7', 'nodes',
                     'node?id=1.%s:%d' % a.address, 'failures', 'manage')
            for look, page in itertools.product(LOOKS, pages):
                browser.look(*LOOKS[look])
                browser.page(page).see(lambda: browser.all('main h1')
                                       and 'Loading' not in browser.text())
                if page == 'failures' and not browser.all('details[open]'):
                    browser.click('', 'summary')
                elif page.startswith('node?'):
                    browser.see(lambda: browser.all('pre'))
                elif page.startswith('timeline?'):
                    browser.see(lambda: browser.bars().get('nodes') == '2')
                browser.picture('%s-%s' % (page.partition('?')[0], look))
            assert browser.errors() == []
            (tmp_path / 'end').write_text('')


@pytest.mark.long
def test_a_scheduler_with_two_programs(browse, tmp_path):
    """Its numbers are the clusters'; a node is drained and used again for both."""
    end = str(tmp_path / 'end')
    with NodeProcess(tmp_path / 'a', '--name', 'basement') as a, \
            NodeProcess(tmp_path / 'b', '--name', 'attic', cpus=1) as b, \
            SchedulerProcess(tmp_path / 's', '-n', '127.0.0.1:%d' % a.port,
                             '-n', '127.0.0.1:%d' % b.port, '--httpd', '0',
                             '--history', '1') as scheduler, \
            dispy.SharedJobCluster(scene, scheduler_port=scheduler.port) as first, \
            dispy.SharedJobCluster(work, scheduler_port=scheduler.port) as second:
        browser = browse(scheduler.page())
        first.wait_nodes(2, 20)
        for n in range(60):
            second.submit(n)
        assert second.wait(60)   # the same program: what comes first is first
        for n in range(60):
            first.submit(n, end)
        eventually(lambda: dispy.core_of(first).book.finished > 30, seconds=40)

        def shown(name):
            return browser.script(
                'const card = document.querySelector(`section[aria-label="cluster '
                '${arguments[0]}"]`); return card && Object.fromEntries('
                '[...card.querySelectorAll("[data-figure]")].map(e => '
                '[e.dataset.figure, '
                'parseInt(e.firstChild.textContent.replace(/[^0-9]/g, ""))]))', name)
        browser.see(lambda: [shown('work')[word]
                             for word in ('Done', 'Failed', 'Cancelled', 'Running', 'Waiting')]
                    == [59, 1, 0, 0, 0])
        browser.see(
            lambda: sum(shown('scene')[word] for word in ('Done', 'Failed', 'Running', 'Waiting'))
            == 60 and shown('scene')['Running'] == 3)
        browser.reads('PID %d' % os.getpid(), 'all programs of the dispyscheduler')
        pages = ('clusters', 'timeline?span=60', 'jobs', 'nodes', 'node?id=1.%s:%d' % a.address,
                 'failures', 'accounts', 'manage')
        for look, page in itertools.product(('light', 'phone-dark'), pages):
            browser.look(*LOOKS[look])
            browser.page(page).see(lambda: browser.all('main h1')
                                   and 'Loading' not in browser.text())
            if page == 'failures' and not browser.all('details[open]'):
                browser.click('', 'summary')
            elif page.startswith('node?'):
                browser.reads(end, 'running')
            elif page == 'accounts':
                browser.reads('by computation', 'CPU time')
            browser.picture('scheduler-%s-%s' % (page.partition('?')[0], look))
        browser.page('manage').click('Drain')
        eventually(lambda: sorted(node.cpus for node in first.status().nodes)[0] == 0
                   and 0 in [node.cpus for node in second.status().nodes])
        browser.click('Use again')
        eventually(lambda: sorted(node.cpus for node in first.status().nodes) == [1, 2])
        assert browser.errors() == []
        (tmp_path / 'end').write_text('')
