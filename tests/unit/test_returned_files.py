"""Files of programs that come back: what is asked for, where it comes, and what a node finds."""

import os

import pytest

from dispy import DispyJob, WantedOutput
from dispynode import ReturnedFiles


@pytest.mark.parametrize('dest, root, before', [
    (None, '', ''), ('results', 'results', ''), ('results/{id}', 'results', '7/'),
    ('run-{id}', '', 'run-7/'), ('a/b{id}/c', 'a', 'b7/c/'), ('{id}/{id}', '', '7/7/')])
def test_where_files_come(tmp_path, dest, root, before):
    output = WantedOutput(('out.dat', '{id}.*'), dest, str(tmp_path))
    assert output.root == os.path.join(str(tmp_path), root).rstrip('/')
    assert output.of(7) == (before, ['out.dat', '7.*'])
    assert os.path.isdir(output.root)


def test_an_absolute_path_and_ids_that_are_no_names(tmp_path):
    output = WantedOutput(('{id}.dat',), '%s/x/{id}' % tmp_path, '/nowhere')
    assert output.root == '%s/x' % tmp_path
    assert output.of('../a*[') == ('.._a_[/', ['.._a_[[].dat'])
    assert output.of('..')[0] == '_../'
    assert WantedOutput((), None, '/nowhere').of(1) == ()


@pytest.mark.parametrize('returns, dest, error, told', [
    ('out.dat', None, TypeError, 'must be a list'), ([1], None, TypeError, 'is not a text'),
    (['../x'], None, ValueError, 'below the directory of the job'),
    (['/etc/x'], None, ValueError, 'below the directory'), ([''], None, ValueError, 'returns'),
    ([], 'x', ValueError, 'needs returns'), (['x'], 5, TypeError, 'dest=5')])
def test_what_is_wrong_is_told(returns, dest, error, told):
    with pytest.raises(error, match=told):
        WantedOutput.checked(returns, dest)


def test_a_file_that_replaces_that_of_another_job_is_told_once(tmp_path, caplog):
    output = WantedOutput(('out.dat',), None, str(tmp_path))
    for number in (1, 1, 2, 3):
        output.note(DispyJob('c', None, None, number), 'out.dat')
    assert caplog.text.count('out.dat of job 2 replaces that of job 1') == 1
    assert caplog.text.count('replaces') == 1
    apart = WantedOutput(('out.dat',), '{id}', str(tmp_path))
    for number in (1, 2):
        apart.note(DispyJob('c', None, None, number), 'out.dat')
    assert caplog.text.count('replaces') == 1


def make(*names):
    for name in names:
        os.makedirs(os.path.dirname(name) or '.', exist_ok=True)
        with open(name, 'w') as file:
            file.write(name)


def test_what_the_program_has_made_is_sent_and_what_was_there_before_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make('in.dat', 'old.dat')
    files = ReturnedFiles('7/', ['*.dat', 'deep', '**/*.log', 'out.dat'])
    make('out.dat', 'deep/a/b', 'deep/c.log', '.hidden')
    with open('old.dat', 'a') as file:
        file.write('changed')
    sent = []
    files.send(False, lambda path, name: sent.append((path, name)))
    assert sent == [('old.dat', '7/old.dat'), ('out.dat', '7/out.dat'),
                    ('deep/c.log', '7/deep/c.log'), ('deep/a/b', '7/deep/a/b')]


def test_what_is_missing_is_told_with_what_there_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make('in.dat')
    files = ReturnedFiles('', ['in.dat', 'x_*.dat', 'other'])
    make('other')
    sent = []
    with pytest.raises(RuntimeError, match=r'called in\.dat or x_\*\.dat \(returns\); in its '
                                           r'directory there is in\.dat, other$'):
        files.send(False, lambda path, name: sent.append(name))
    assert sent == ['other']
    files.send(True, lambda path, name: None)   # it has failed, and its exit status says so
