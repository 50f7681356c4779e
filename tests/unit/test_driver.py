"""The parts of a driver by themselves: which nodes are used, how a computation is set up there, and
which files go there. What they say and decide is looked at; nothing is connected."""

import concurrent.futures
import hashlib
import re

import pytest

import dispy
from dispy import (
    Allocation, DispyNode, Evidence, NodeAllocate, NodeDoubted, NodeDrained, NodeDrains, NodeLeft,
    NodeOffers, NodeReady, NodeSpec, Unloadable, AssignmentState)
from dispynode import (
    Compute, Done, FilePiece, FileStored, Limit, Need, CpusChanged, PeerError, Purpose, Ready,
    Reclaim, Refused, Shutdown)
from talk_driver import Cluster, FakeDriver

ROW = ('a.txt', 3, b'd' * 32, 0o600)


@pytest.fixture
def driver():
    return FakeDriver()


def ready(driver, comp='c', held=()):
    driver.setup.on_ready(driver.one(comp), Ready(comp, list(held)))


def refuse(driver, text, code, comp='c'):
    driver.setup.on_refused(driver.one(comp), Refused(comp, code, text))


# -- which nodes are used --------------------------------------------------------------------------

def test_a_named_node_is_known_at_once_and_a_wildcard_is_asked_for(driver):
    driver.open(Cluster('c', [NodeSpec('10.0.0.1', 9701), NodeSpec('10.*', 9801)]))
    peer = driver.one()
    assert peer.key == ('10.0.0.1', 9701) and peer.listed
    assert driver.connector.searches.begun == [(9801, False)]
    assert driver.said() == []


def test_a_connected_node_is_used_by_a_cluster_that_means_it_by_a_wildcard(driver):
    _, peer = driver.connected()
    driver.said()
    driver.open(Cluster('d', [NodeSpec('10.*', 9701)]))
    driver.open(Cluster('e', [NodeSpec('192.*', 9701)]))
    assert [message.comp for message in driver.said(Compute)] == ['d']
    assert set(peer.uses) == {'c', 'd'}


def test_a_node_that_turns_out_to_have_another_name_is_let_go(driver):
    cluster = driver.open(Cluster('c', [NodeSpec('lab*', 9701)]))
    peer = driver.selection.use_address('c', '10.0.0.1', 9701, cluster.specs[0], False)
    driver.welcome(peer)
    assert driver.nodes.of('c') == [] and driver.said() == []
    assert driver.parted == [(1, 'no cluster uses this node any more')]


def test_the_last_cluster_lets_a_node_go(driver):
    _, peer = driver.connected()
    driver.open(Cluster('d', [NodeSpec('10.0.0.1', 9701)]))
    driver.said()
    for comp in 'cd':
        assert driver.parted == []
        driver.selection.done(peer, comp, shutdown=comp == 'd')
        del peer.uses[comp]
        driver.selection.drop_unused(peer)
    assert driver.said() == [Done('c'), Shutdown('d'), Done('d')]
    assert driver.parted == [(1, 'no cluster uses this node any more')]
    assert driver.nodes.by_key == {} and peer.link is None


def test_a_link_that_ends_forgets_what_went_along_it(driver):
    _, peer = driver.connected()
    ready(driver)
    asked = {('c', 'call 1'): concurrent.futures.Future(), ('c', ''): concurrent.futures.Future()}
    peer.answers.update(asked)
    driver.selection.unlink(peer, peer.link)
    assert peer.uses['c'].state is AssignmentState.WAITING and driver.nodes.by_link == {}
    assert isinstance(asked['c', 'call 1'].exception(0), ConnectionError)   # may be asked again
    assert isinstance(asked['c', ''].exception(0), RuntimeError)


@pytest.mark.parametrize('cpus, limit, event', [
    (2, 2, NodeOffers(('10.0.0.1', 9701), 'c', 2)),
    (-1, 3, NodeOffers(('10.0.0.1', 9701), 'c', 3)),
    (None, 4, NodeOffers(('10.0.0.1', 9701), 'c', 4)),
    (0, 0, NodeDrains(('10.0.0.1', 9701), 'c'))])
def test_the_cpus_of_a_node_are_limited(driver, cpus, limit, event):
    _, peer = driver.connected()
    ready(driver)
    driver.said(), driver.decided()
    assert driver.selection.set_cpus('c', peer, cpus) == limit
    assert driver.decided() == [event]
    assert driver.said() == ([Limit('c', limit)] if limit else [])


def test_more_cpus_than_a_node_has_are_refused(driver):
    _, peer = driver.connected()
    ready(driver)
    driver.decided()
    with pytest.raises(ValueError, match='cpus=5.*offers 4'):
        driver.selection.set_cpus('c', peer, 5)
    assert driver.decided() == [] and peer.limit('c') == 4


def test_a_node_is_closed_when_its_jobs_have_ended(driver):
    _, peer = driver.connected()
    ready(driver)
    driver.said(), driver.decided()
    driver.selection.leave('c', '10.0.0.1', 'close', False)
    assert driver.decided() == [NodeDrains(peer.key, 'c')] and driver.said() == []
    driver.selection.drained(NodeDrained(peer.key, 'c'))
    assert driver.said() == [Done('c')] and len(driver.decided(NodeLeft)) == 1
    assert peer.uses['c'].state is AssignmentState.CLOSED
    driver.selection.allocate('c', [NodeSpec('10.0.0.1', 9701)])
    assert [message.comp for message in driver.said(Compute)] == ['c']


def test_a_node_is_set_up_anew_at_once(driver):
    _, peer = driver.connected()
    ready(driver)
    driver.said(), driver.decided()
    driver.selection.leave('c', None, 'open', True)
    assert [type(message) for message in driver.said()] == [Done, Compute]
    assert len(driver.decided(NodeLeft)) == 1 and driver.told[-1] == (DispyNode.Closed, peer, ['c'])
    assert peer.uses['c'].state is AssignmentState.SETTING_UP


# -- setting up ------------------------------------------------------------------------------------

def test_a_computation_is_offered_when_the_node_has_told_what_it_is(driver):
    cluster, peer = driver.connected()
    compute, = driver.said()
    assert (compute.comp, compute.spec['kind'], compute.spec['client']) == ('c', 'function', '')
    assert peer.uses['c'].state is AssignmentState.SETTING_UP and driver.decided() == []
    ready(driver, held=[7])
    decided, = driver.decided()
    assert decided[:6] == NodeReady(peer.key, 'c', 4, [7], str(peer), 4)[:6]
    assert driver.said() == [Limit('c', 4)] and cluster.ready == [peer]
    assert driver.told[0] == (DispyNode.Initialized, peer, ['c'])


def test_ready_for_what_was_not_offered_changes_nothing(driver):
    driver.connected()
    driver.setup.on_ready(driver.one(), Ready('other', []))
    ready(driver)
    ready(driver)
    assert len(driver.decided(NodeReady)) == 1


def test_what_a_node_has_from_before_is_claimed_first(driver):
    cluster = Cluster(specs=[NodeSpec('10.0.0.1', 9701)])
    cluster.key = b'k'
    driver.connected(cluster, kept={'c': [1]})
    assert [type(message) for message in driver.said()] == [Reclaim, Compute]


def test_a_node_that_was_away_when_a_computation_ended_is_told(driver):
    driver.connected(kept={'over': [1]})
    assert [(type(message), message.comp) for message in driver.said()] == [
        (Done, 'over'), (Compute, 'c')]


def test_a_node_that_was_started_anew_is_doubted(driver):
    cluster = driver.open(Cluster(specs=[NodeSpec('10.0.0.1', 9701)]))
    peer = driver.one(cluster.comp)
    peer.restarted, peer.memory = True, 'one'
    driver.welcome(peer, memory='another')
    doubted, = driver.decided()
    assert (doubted.evidence, doubted.node) == (Evidence.OTHER_INSTANCE, peer.key)
    assert not peer.whole and not peer.restarted


def test_a_node_that_remembers_is_not_doubted(driver):
    cluster = driver.open(Cluster(specs=[NodeSpec('10.0.0.1', 9701)]))
    peer = driver.one(cluster.comp)
    peer.restarted, peer.memory = True, 'one'
    driver.welcome(peer, memory='one')
    assert driver.decided() == [] and peer.whole


@pytest.mark.parametrize('code, passes', [('busy', True), ('room', True), ('setup', False)])
def test_a_refusal_is_told_once_and_one_that_passes_is_tried_again(driver, code, passes):
    cluster, peer = driver.connected()
    waits = []
    for attempt in range(3):
        refuse(driver, 'no, for the time %d' % attempt if passes else 'no', code)
        assert peer.uses['c'].state is AssignmentState.REFUSED
        if not passes:
            break
        waits.append(peer.retry_at - driver.now)
        driver.now = peer.retry_at
        driver.said()
        driver.setup.retry(peer)
        assert len(driver.said(Compute)) == 1
    assert len(cluster.warnings) == 1 and ('tried again' in cluster.warnings[0]) == passes
    if passes:
        assert waits == pytest.approx([waits[0], 2 * waits[0], 4 * waits[0]])
    else:
        assert peer.retry_at is None
    driver.setup.on_offer(peer, CpusChanged(4))
    assert peer.uses['c'].state is AssignmentState.SETTING_UP


def test_a_node_that_refuses_after_it_was_ready_gives_its_jobs_back(driver):
    _, peer = driver.connected()
    ready(driver)
    driver.said(), driver.decided()
    refuse(driver, 'its runner has ended', 'setup')
    doubted, left = driver.decided()
    assert isinstance(doubted, NodeDoubted) and doubted.evidence is Evidence.REFUSAL
    assert isinstance(left, NodeLeft) and left.text == 'its runner has ended'
    assert peer.link.abandoned == ['c'] and driver.told[-1] == (DispyNode.Closed, peer, ['c'])
    assert peer.retry_at is not None     # another runner may live


def test_code_that_no_node_can_load_ends_its_jobs(driver):
    driver.connected()
    refuse(driver, 'SyntaxError', 'code')
    assert driver.decided(Unloadable) == [
        Unloadable('c', 'no node can load the code of c: SyntaxError')]


def test_code_that_another_node_may_load_ends_none(driver):
    driver.connected(Cluster(specs=[NodeSpec('10.0.0.1', 9701), NodeSpec('lab*', 9701)]))
    refuse(driver, 'SyntaxError', 'code')
    assert driver.decided(Unloadable) == []


def test_another_version_of_python_gets_source(driver):
    cluster = Cluster(specs=[NodeSpec('10.0.0.1', 9701)])
    _, peer = driver.connected(cluster, python=(3, 11, 0))
    assert driver.said() == [] and cluster.asked_source == [(peer, peer.link)]
    driver.setup.source_found(cluster, peer, peer.link, (b'the source', ''))
    compute, = driver.said()
    assert compute.spec['kind'] == 'source'


@pytest.mark.parametrize('late', [False, True])
def test_a_function_without_source_is_refused_for_its_obstacle(driver, late):
    cluster = Cluster(specs=[NodeSpec('10.0.0.1', 9701)])
    _, peer = driver.connected(cluster, python=(3, 11, 0))
    link = peer.link
    if late:
        driver.selection.unlink(peer, link)
    driver.setup.source_found(cluster, peer, link, (b'', 'it is a lambda'))
    assert driver.said() == []
    assert peer.uses['c'].state is (AssignmentState.WAITING if late else AssignmentState.REFUSED)
    assert ['it is a lambda' in text for text in cluster.warnings] == [True] * (not late)


def test_a_node_without_cpus_is_refused_until_it_offers_some(driver):
    cluster = driver.open(Cluster(specs=[NodeSpec('10.0.0.1', 9701)]))
    peer = driver.welcome(driver.one(), cpus=0)
    assert driver.said() == [] and '0 offered' in cluster.warnings[0]
    driver.setup.on_offer(peer, CpusChanged(2))
    assert len(driver.said(Compute)) == 1


@pytest.mark.parametrize('allocation, error, state, cpus', [
    (Allocation(3, b'args', [ROW], {}), '', AssignmentState.SETTING_UP, 3),
    (Allocation(0, b'', [], {}), '', AssignmentState.REFUSED, 0),
    (Allocation(3, b'', [], {}), 'ZeroDivisionError', AssignmentState.REFUSED, 0)])
def test_an_allocator_decides(driver, allocation, error, state, cpus):
    allocator = NodeAllocate('10.0.0.1')
    cluster = Cluster(specs=[NodeSpec('10.0.0.1', 9701, 0, allocator)])
    _, peer = driver.connected(cluster)
    driver.setup.set_up(peer, 'c')
    assert cluster.asked_allocators == [allocator] and driver.said() == []   # asked once
    driver.setup.allocated('c', peer, peer.link, allocation, error)
    assert peer.uses['c'].state is state
    assert [(message.spec['cpus'], message.spec['files']) for message in driver.said()] == (
        [(cpus, [ROW])] if cpus else [])
    assert len(cluster.warnings) == (not cpus)


# -- files -----------------------------------------------------------------------------------------

def need(driver, purpose, key=0, row=ROW):
    driver.files.on_need(driver.one(), Need('c', [(int(purpose), key, row)]))
    driver.files.send()


def test_a_file_that_was_offered_is_sent(driver, tmp_path):
    path = tmp_path / 'a.txt'
    path.write_bytes(b'abc')
    cluster, _ = driver.connected()
    cluster.packed.paths['a.txt'] = str(path)
    driver.said()
    need(driver, Purpose.DEPENDS)
    assert [message.offset for message in driver.said(FilePiece)] == [0]
    assert driver.broken == []


def test_a_file_of_an_allocation_is_sent(driver, tmp_path):
    path = tmp_path / 'a.txt'
    path.write_bytes(b'abc')
    _, peer = driver.connected()
    peer.uses['c'].allocation = Allocation(1, b'', [ROW], {'a.txt': str(path)})
    driver.said()
    need(driver, Purpose.DEPENDS)
    assert len(driver.said(FilePiece)) == 1


def test_a_file_that_was_not_offered_ends_the_link(driver):
    driver.connected()
    with pytest.raises(PeerError, match='not offered'):
        need(driver, Purpose.DEPENDS, row=('/etc/shadow', 3, b'd' * 32, 0o600))
    with pytest.raises(PeerError, match='not offered'):
        need(driver, Purpose.MODULES)


def test_a_file_that_is_gone_ends_the_link_of_a_node_that_waits_for_it(driver, tmp_path):
    cluster, _ = driver.connected()
    cluster.packed.paths['a.txt'] = str(tmp_path / 'gone')
    need(driver, Purpose.DEPENDS)
    (number, text), = driver.broken
    assert number == 1 and 'cannot be read' in text


def test_a_value_that_is_gone_is_told(driver):
    cluster, _ = driver.connected()
    driver.said()
    need(driver, Purpose.VALUES, 5)
    stored, = driver.said(FileStored)
    assert (stored.key, bool(stored.error)) == (5, True)
    cluster.values[ROW[2]] = b'abc'
    need(driver, Purpose.VALUES, 6)
    assert [message.key for message in driver.said(FilePiece)] == [6]


def test_a_node_sends_files_of_running_jobs_alone(driver):
    cluster, peer = driver.connected()
    piece = FilePiece('c', int(Purpose.FROM_JOB), 65537, ROW, 0, b'abc')
    driver.files.on_file_piece(peer, piece)
    assert cluster.pieces == []      # its job is over
    driver.jobs.at_nodes['c', 65537] = 'a job'
    driver.files.on_file_piece(peer, piece)
    assert cluster.pieces == [(peer, 'a job', piece)]
    with pytest.raises(PeerError, match='not asked for'):
        driver.files.on_file_piece(peer, piece._replace(purpose=int(Purpose.DEPENDS)))


def test_a_file_of_a_job_is_stored_and_half_a_file_is_removed(driver, tmp_path):
    _, peer = driver.connected()
    driver.said()
    row = ('a.txt', 6, hashlib.sha256(b'abcdef').digest(), 0o600)
    first, second = [FilePiece('c', int(Purpose.FROM_JOB), 65537, row, offset, data)
                     for offset, data in ((0, b'abc'), (3, b'def'))]
    driver.files.store(peer, str(tmp_path), first)
    driver.files.abort_attempt(('c', 65537))
    assert not list(tmp_path.iterdir()) and driver.said() == []
    for piece in (first, second):
        driver.files.store(peer, str(tmp_path), piece)
    stored, = driver.said(FileStored)
    assert not stored.error and (tmp_path / 'a.txt').read_bytes() == b'abcdef'
    driver.files.store(peer, str(tmp_path), first._replace(row=('b.txt', *row[1:])))
    driver.files.abort(lambda number, comp: comp == 'c')
    assert [path.name for path in tmp_path.iterdir()] == ['a.txt']


# -- what is made when it is used first ------------------------------------------------------------

def test_patterns_that_are_compiled_when_they_are_used_first_are_right():
    values = list(vars(dispy).values())
    for kind in [value for value in values if isinstance(value, type)]:
        values += vars(kind).values()
    patterns = [value for value in values if isinstance(value, dispy.LazyPattern)]
    assert len(patterns) > 10
    for pattern in patterns:
        empty = b'' if isinstance(pattern.pattern, bytes) else ''
        assert pattern.findall(empty) == re.compile(pattern.pattern, pattern.flags).findall(empty)
