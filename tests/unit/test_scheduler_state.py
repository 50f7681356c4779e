"""What a scheduler keeps on disk, without a scheduler: `State` is written, closed or abandoned as
by kill -9, and read again."""

import os
import shutil
import types

import pytest

from dispy import NodeConnection
from dispynode import Outcome
from dispyscheduler import FILE_BYTES, ClientJob, ProgramUser, State

KEY = ('127.0.0.1', 51348)


@pytest.fixture
def root(tmp_path):
    return str(tmp_path / 'state')


def begin(state, comp='c'):
    packed = types.SimpleNamespace(spec={'name': comp})
    state.began(types.SimpleNamespace(comp=comp, instance=b'i' * 16, digest=bytes(32),
                                      user=ProgramUser(), packed=packed))
    peer = NodeConnection(*KEY)
    peer.name, peer.instance = 'node', b'n' * 16
    state.met(peer)


def submit(state, payload=b'arguments', comp='c', options=None):
    state.number += 1
    work = ClientJob(comp, None, options, state.number << 16, state.number)
    state.submitted(work, payload)
    return work


def end(state, work, value=b'result'):
    row = (work.client_serial, int(Outcome.RETURNED), 1.0, 2.0, value, b'', b'')
    state.ended(work.serial >> 16, row)
    return row


def after_a_crash(state, root):
    """The files as they are now, read by another."""
    copy = root + '-copy'
    shutil.copytree(root, copy)
    state.close()
    return State(copy)


def test_a_crash_leaves_what_was_committed(root):
    state = State(root)
    begin(state)
    first = state.number + 1
    waits, sent, back, ended = [submit(state, options={'cpus': number} if number else None)
                                for number in range(4)]
    for work in (sent, back):
        work.serial += 1
    state.sent([sent, back], KEY)
    state.waits(back)
    row = end(state, ended)
    assert state.commit()
    submit(state)   # and this one not
    again = after_a_crash(state, root)
    spec = {'name': 'c', 'key': bytes(32), 'user': tuple(ProgramUser())}
    assert (again.comps() == [('c', b'i' * 16, spec)]
            and again.nodes() == [(KEY, *KEY, 'node', b'n' * 16)])
    assert list(again.jobs('c')) == [
        (first, first, None, State.WAITING, waits.serial, None),
        (first + 1, first + 1, {'cpus': 1}, State.SENT, sent.serial, KEY),
        (first + 2, first + 2, {'cpus': 2}, State.WAITING, back.serial, None),
        (first + 3, first + 3, {'cpus': 3}, State.ENDED, ended.serial, None)]
    assert again.payload(first) == b'arguments' and list(again.results([first + 3], [])) == [row]
    again.close()


def test_arguments_are_there_in_the_turn_in_which_they_come_and_after_it(root):
    state = State(root)
    begin(state)
    works = ([submit(state, b'%d' % number) for number in range(3)]
             + [submit(state, b'x' * FILE_BYTES)])
    for _ in range(2):
        assert [state.payload(work.serial >> 16) for work in works] == [b'0', b'1', b'2',
                                                                        b'x' * FILE_BYTES]
        assert state.commit()
    state.close()


def test_acknowledgements_alone_need_no_transaction_and_may_be_lost(root):
    state = State(root)
    begin(state)
    row = end(state, submit(state))
    state.commit()
    numbers = [state.number]
    state.removed(numbers)
    assert state.commit() and list(state.results(numbers, [])) == [row], 'nothing was written'
    again = after_a_crash(state, root)
    assert list(again.results(numbers, [])) == [row], 'and it comes again'
    again.removed(numbers)
    again.close()
    last = State(again.root)
    assert list(last.jobs('c')) == []
    assert last.number > numbers[0], 'a node may have its result still'
    last.close()


def test_large_files_go_with_their_jobs_and_leftovers_at_the_start(root):
    state = State(root)
    begin(state)
    large, small = submit(state, b'x' * FILE_BYTES), submit(state)
    row = end(state, large, b'y' * FILE_BYTES)
    state.commit()
    number = large.serial >> 16
    files = ['%d.%s' % (number, end) for end in 'pr']
    assert (sorted(os.listdir(state.files.directory)) == files
            and list(state.results([number], [])) == [row])
    # Of transactions that were not written
    for name in ('9.p', '9.r', '%d.p.part' % (number + 1)):
        open(os.path.join(state.files.directory, name), 'w').close()
    again = after_a_crash(state, root)
    assert sorted(os.listdir(again.files.directory)) == files
    again.removed([number, small.serial >> 16])
    assert again.commit() and os.listdir(again.files.directory) == [] and not again.files.numbers
    again.close()


def test_large_files_of_jobs_that_go_in_the_same_turn_are_not_written(root):
    state = State(root)
    begin(state)
    work = submit(state, b'x' * FILE_BYTES)
    end(state, work, b'y' * FILE_BYTES)
    state.removed([work.serial >> 16])
    assert state.commit() and os.listdir(state.files.directory) == []
    state.close()


def test_the_file_does_not_grow_with_jobs_that_have_ended(root):
    state = State(root)
    begin(state)

    def run_jobs():
        works = [submit(state, b'x' * 100) for _ in range(2000)]
        state.commit()
        state.sent(works, KEY)
        state.commit()
        for work in works:
            end(state, work)
        state.commit()
        state.removed([work.serial >> 16 for work in works])
        state.commit()
        return state._db.execute('PRAGMA page_count').fetchone()[0]
    first = run_jobs()
    assert max(run_jobs() for _ in range(10)) < 1.5 * first
    assert list(state.jobs('c')) == []
    state.close()


def test_the_history_forgets_what_is_old(root):
    state = State(root)
    computation = types.SimpleNamespace(comp='c', user=('alice', True), program='alice',
                                        name='work')
    account = state.account(computation)
    assert state.account(computation) == account
    for number in range(10):
        state.remember(account, number, 'lab2', float(number), number + 1.0, 2, 'done')
    assert state.commit()
    to, rows = state.history(0, 4, 0.0)
    assert to == 4 and [row[4] for row in rows] == [0, 1, 2, 3]
    to, rows = state.history(to, 100, 0.0)
    assert to == -1 and [row[4] for row in rows] == [4, 5, 6, 7, 8, 9]
    assert rows[0][:4] == ('alice', 1, 'alice', 'work') and rows[0][5:] == (
        'lab2', 4.0, 5.0, 2, 'done', 'c')
    assert [row[4] for row in state.history(0, 100, 9.0)[1]] == [8, 9]
    state.forget_before(4.5)
    assert state.commit() and len(state.history(0, 100, 0.0)[1]) == 6
    state.forget_all_before(100.0)
    assert state.history(0, 100, 0.0) == (-1, [])
    state.close()
