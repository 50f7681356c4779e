"""The parts of `python -m dispy COMMAND` that run nothing: templates, arguments, options, rules to
stop, the log."""

import argparse
import io
import os
import shlex

import pytest

import dispy
from dispy import (
    Command, Ended, HaltRule, JobLog, ShownOutput, Resume, Template, Window, as_file_name, as_node,
    combinations, delimiter_option, duration_option, hosts_in, records, results_path, split_sources,
    tagged)


def plan(*words):
    """What a command line asks for."""
    parser = dispy.make_parser()
    options, rest = parser.split(list(words))
    return dispy.Plan(parser.parse_args(options), rest)


def commands(*words):
    made = plan(*words)
    return [made.command.text(values, number) for number, values in enumerate(made.inputs, 1)]


# -- replacement strings, compared with GNU parallel 20221122 --------------------------------------

@pytest.mark.parametrize('value, forms', [
    ('foo.jpg', ('foo', 'foo.jpg', '.', 'foo')),
    ('subdir/foo.jpg', ('subdir/foo', 'foo.jpg', 'subdir', 'foo')),
    ('sub.dir/foo.jpg', ('sub.dir/foo', 'foo.jpg', 'sub.dir', 'foo')),
    ('sub.dir/bar', ('sub.dir/bar', 'bar', 'sub.dir', 'bar')),
    ('/a', ('/a', 'a', '/', 'a')), ('a.tar.gz', ('a.tar', 'a.tar.gz', '.', 'a.tar')),
    ('a.', ('a.', 'a.', '.', 'a.')),
    ('', ('', '', '.', ''))])
def test_forms_of_a_value(value, forms):
    assert Template('{.}|{/}|{//}|{/.}').expand((value,), 1) == '|'.join(forms)


@pytest.mark.parametrize('text, wanted', [
    ('{}', 'a/b.c d'), ('{1}-{2}', 'a/b.c-d'), ('{-1}{#}', 'd7'), ('{1/.}', 'b'), ('{3}', ''),
    ('{-3}', ''),
    ('{x} {0} {+1} {', '{x} {0} {+1} {'),
    ('{2}{1.}', 'da/b'), ('${HOME}', '${HOME}')])
def test_places_of_values(text, wanted):
    assert Template(text).expand(('a/b.c', 'd'), 7) == wanted


NASTY = ["it's", 'a  b', '$HOME', '`id`', '-x', '"', '\\', '*', '', 'é', 'a\nb', '~', '#x', '!',
         ';', '\udcff']


def test_a_line_quotes_what_it_is_given():
    line = Template('printf "%s|" {} {}x y{}', True)
    text = line.expand(NASTY[:1], 1)
    assert shlex.split(text) == ['printf', '%s|', "it's", "it'sx", "yit's"]
    for value in NASTY:
        assert shlex.split(Template('x{}', True).expand((value,), 1)) == ['x' + value]


def test_what_a_line_begins_with_is_not_quoted():
    assert commands('{} x', ':::', 'echo a; echo') == ['echo a; echo x']
    assert commands(':::', 'echo a | cat') == ['echo a | cat']


def test_words_are_words():
    command = Command(['echo', '{}', 'x{}y'])
    assert command.words(('a b', 'c'), 1) == ['echo', 'a b', 'c', 'xa b cy']
    assert command.text(('a b', 'c'), 1) == "echo 'a b' c 'xa b cy'"
    assert Command(['echo', 'x']).words(("it's",), 1) == ['echo', 'x', "it's"]
    assert Command(['echo']).words((), 1) == ['echo']
    assert Command(['echo {}; true']).words(("it's",), 1) == ['sh', '-c', "echo 'it'\"'\"'s'; true"]


# -- where programs come from ----------------------------------------------------------------------

def test_programs_of_the_user_travel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (('mine', '#!/bin/sh\n'), ('script.py', 'pass\n'),
                       ('tool', '#!/usr/bin/env python3\n'), ('data', 'x\n'),
                       ('ls', '#!/bin/sh\n')):
        (tmp_path / name).write_text(text)
    path = str(tmp_path / 'mine')
    assert Command(['mine']).program == ('./mine', 'mine', False)
    assert Command(['./mine', 'x']).program == ('./mine', './mine', False)
    assert Command([path]).program == ('./mine', path, False)
    assert Command(['script.py']).program == ('./script.py', 'script.py', True)
    assert Command(['script.py']).words(('a',), 1) == [dispy.RUN_BY_PYTHON, './script.py', 'a']
    assert Command(['./tool']).program == ('./tool', './tool', True)
    assert Command(['./mine {} | cat']).words(('a',), 1) == ['sh', '-c', './mine a | cat']
    assert (Command(['./script.py {} | cat']).words(('a',), 1)
            == ['sh', '-c', '"$DISPY_PYTHON" ./script.py a | cat'])
    # Installed, or to be found on the nodes
    for word in ('ls', '/bin/ls', 'ls -l', 'no-such-program', 'cd /tmp; ls'):
        assert Command([word]).program.path is None
    assert Command(['./mine'], False).words((), 1) == ['./mine']
    with pytest.raises(FileNotFoundError, match='no program ./nothing here.*`env ./nothing`'):
        Command(['./nothing'])
    with pytest.raises(ValueError, match='not executable'):
        Command(['./data'])
    with pytest.raises(ValueError, match='options stand before the command'):
        Command(['wc -l {}', '--tag'])


# -- arguments -------------------------------------------------------------------------------------

def test_records_are_taken_as_they_are():
    data = b"it's\n -x \n\n\xff\r\nlast"
    assert list(records(io.BytesIO(data).read, b'\n')) == ["it's", ' -x ', '', '\udcff\r', 'last']
    assert list(records(io.BytesIO(b'a\nb\0c\0').read, b'\0')) == ['a\nb', 'c']
    assert list(records(io.BytesIO(b'a, b,\n').read, b',')) == ['a', ' b', '\n']
    assert list(records(io.BytesIO(b'').read, b'\n')) == []


def test_a_record_is_there_when_it_has_come():
    pieces = iter([b'a\nb', b'c\n', b''])
    found = records(lambda size: next(pieces), b'\n')
    assert next(found) == 'a' and next(found) == 'bc' and next(found, None) is None


def test_combinations_read_their_first_source_as_it_comes():
    found = combinations([[iter('ab')], [iter('xy')]])
    assert list(found) == [('a', 'x'), ('a', 'y'), ('b', 'x'), ('b', 'y')]
    found = combinations([[iter('ab'), iter('123')], [iter('x')]])
    assert list(found) == [('a', '1', 'x'), ('b', '2', 'x')]
    endless = combinations([[iter(lambda: 'a', None)], [iter('x')]])
    assert next(endless) == ('a', 'x')


def test_sources_stand_behind_the_command():
    assert split_sources(['echo', ':', ':::', 'a', 'b', ':::+', 'c', '::::', 'f']) == (
        ['echo', ':'], [(':::', ['a', 'b']), (':::+', ['c']), ('::::', ['f'])])


def test_sources_of_all_kinds(tmp_path):
    path = tmp_path / 'list'
    path.write_text("it's\n\nb\n")
    name = str(path)
    assert commands('echo', '::::', name) == ["echo 'it'\"'\"'s'", "echo ''", 'echo b']
    assert commands('-r', 'echo', '::::', name)[1:] == ['echo b']
    assert commands('echo', ':::', '-n', '--', ':::+', '1', '2') == ['echo -n 1', 'echo -- 2']
    assert commands('echo {2} {1}', '::::', name, ':::', 'x')[2] == 'echo x b'
    assert commands('--arg-file', name, 'echo', ':::', '1')[2] == 'echo b 1'
    assert commands('-C', ',', 'echo', '{2}', '{1}', '{}', ':::', 'a, b') == ['echo b a a b']
    assert commands('-d', '\\t', 'echo', '::::', name) == ["echo 'it'\"'\"'s\n\nb\n'"]
    assert commands('-a', '1 "2 3"', '-a', '', 'echo') == ["echo 1 '2 3'", 'echo']
    bad = list(plan('--args-file', name, 'echo').inputs)
    assert isinstance(bad[0], ValueError) and "it's" in str(bad[0]) and bad[1:] == [('b',)]


# -- options ---------------------------------------------------------------------------------------

def options(*words):
    parser = dispy.make_parser()
    found, rest = parser.split(list(words))
    return parser.parse_args(found), rest


def test_options_end_where_the_command_begins():
    args, rest = options('-kj2', '--tag', '--timeout', '1m30s', 'grep', '-k', '--tag', ':::', '-j')
    assert (args.keep_order and args.tag and args.jobs == 2 and args.timeout == 90
            and rest == ['grep', '-k', '--tag', ':::', '-j'])
    assert options('--', '-x')[1] == ['-x'] and options('-', 'x')[1] == ['-', 'x']


def test_values_may_begin_with_a_dash():
    args, rest = options('-a', '-x y', '-a', '--help', '--args=-z', '--halt', '-1', 'echo')
    assert (args.args == ['-x y', '--help', '-z'] and str(args.halt) == 'soon,success=1'
            and rest == ['echo'])


def test_beginnings_and_old_spellings_of_options():
    args, _ = options('--keep-o', '--scheduler_node', 'host', '--dry')
    assert args.keep_order and args.scheduler_host == 'host' and args.dry_run


def test_a_bare_d_is_debug_as_in_dispy_4():
    args, rest = options('-c', '-d', '-n', 'local', './program')
    assert (args.debug and args.delimiter == b'\n' and args.nodes == ['local']
            and rest == ['./program'])
    args, rest = options('-d', 'program')
    assert args.debug and rest == ['program']
    for words in (('-d', ','), ('-d,',), ('--delimiter', ',')):
        args, rest = options(*words, 'program')
        assert not args.debug and args.delimiter == b',' and rest == ['program']


@pytest.mark.parametrize('words, text', [
    (['--no-such'], '--no-such'), (['-y'], '-y'), (['--re'], 'may be any of'),
    (['--keep'], 'may be any of --keep'),
    (['-j', 'x'], "'x'"), (['--halt', 'later'], 'later'), (['--timeout', '5x'], '5x'),
    (['--delay', 'nan'], 'nan'),
    (['-C', '('], '('),
    (['--memory', '1x'], '1x'), (['--retries', '0'], "'0'")])
def test_wrong_options_end_with_255(words, text, capsys):
    with pytest.raises(SystemExit) as ended:
        dispy.main([*words, 'echo', ':::', 'a'])
    assert ended.value.code == 255 and text in capsys.readouterr().err


@pytest.mark.parametrize('words', [['--timeout'], ['-kj'], ['-a']])
def test_an_option_without_its_value(words, capsys):
    with pytest.raises(SystemExit) as ended:
        dispy.main(words)
    assert ended.value.code == 255 and 'needs a value' in capsys.readouterr().err


@pytest.mark.parametrize('words, text', [
    (['--resume', 'echo', ':::', 'a'], '--joblog'),
    (['-a', 'x', 'echo', ':::', 'a'], 'arguments of whole jobs'),
    (['-a', 'x'], 'PROGRAM'),
    (['echo', ':::+', 'a'], 'linked'),
    (['--workdir', '.', '--return', 'x', 'echo', ':::', 'a'], '--workdir'),
    (['echo', '::::', '/no/such/file'], '/no/such/file')])
def test_command_lines_that_make_no_sense(words, text):
    with pytest.raises((ValueError, OSError), match=text):
        plan(*words)


@pytest.mark.parametrize('text, seconds', [('10', 10), ('1.5', 1.5), ('.5', 0.5), ('90s', 90),
                                           ('1h30m', 5400), ('2d', 172800), ('1m1', 61)])
def test_durations(text, seconds):
    assert duration_option(text) == seconds


@pytest.mark.parametrize('text', ['', 's', '-1', '1e9', 'inf', '1 s', '1w'])
def test_no_durations(text):
    with pytest.raises(argparse.ArgumentTypeError):
        duration_option(text)


def test_delimiters():
    assert [delimiter_option(text)
            for text in (',', '\\n', '\\0', '\\x1f', '\\t', 'ab', 'é', '\\')] == [
                b',', b'\n', b'\0', b'\x1f', b'\t', b'ab', 'é'.encode(), b'\\']
    with pytest.raises(argparse.ArgumentTypeError):
        delimiter_option('')


def test_files_of_jobs_are_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = plan('--transferfile', '{}', '--return', '{.}.out', 'true', ':::', 'x')
    assert made.files(('a/b.c',), 1) == [('a/b.c', 'a/b.c')]
    assert made.files((str(tmp_path / 'a' / 'b.c'),), 1) == [(str(tmp_path / 'a' / 'b.c'), 'a/b.c')]
    assert made.words(('./a/b.c',), 1) == ['true', './a/b.c', dispy.BRING_BACK + 'a/b.out']
    for value in ('../x', '/etc/passwd', 'a/../../x'):
        with pytest.raises(ValueError, match='not below the working directory'):
            made.files((value,), 1)


# -- hosts -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('word, node', [
    ('lab1', ('lab1', 9701)), ('4/lab1', ('lab1', 9701, 4)), ('lab1:9800', ('lab1', 9800)),
    ('me@lab1', ('lab1', 9701)),
    ('2/ssh://me@lab1:22', ('lab1', 9701, 2)), ('8/[::1]:9800', ('::1', 9800, 8)),
    ('192.168.3.*', ('192.168.3.*', 9701))])
def test_hosts(word, node):
    assert as_node(word) == node


@pytest.mark.parametrize('word', ['x/lab1', '4/', 'lab1:x', '-1/lab1'])
def test_no_hosts(word):
    with pytest.raises(ValueError):
        as_node(word)


def test_a_file_of_hosts(tmp_path):
    path = tmp_path / 'hosts'
    path.write_text('4/lab1  # the fast one\n\n# lab2\nlab3\n')
    assert hosts_in(str(path)) == ['4/lab1', 'lab3']


# -- when to stop ----------------------------------------------------------------------------------

@pytest.mark.parametrize('text, counts, reached', [
    ('soon,fail=1', (5, 0, 9), False), ('soon,fail=1', (5, 1, 9), True),
    ('now,fail=3', (5, 2, 9), False),
    ('now,fail=30%', (5, 2, 9), False),
    ('now,fail=30%', (5, 3, 9), True), ('now,success=2', (3, 2, 9), False),
    ('now,success=2', (3, 1, 9), True),
    ('soon,done=50%', (4, 0, 9), False),
    ('soon,done=50%', (5, 0, 9), True), ('1', (1, 1, 9), True), ('-2', (1, 0, 9), True),
    ('10%', (1, 1, 10), True)])
def test_halting(text, counts, reached):
    assert HaltRule.parse(text).is_reached(*counts) == reached


def test_exit_status_of_a_halt_is_that_of_parallel():
    assert HaltRule.parse('never') is None and HaltRule.parse('0') is None
    assert HaltRule.parse('now,fail=1').exit_status(7, 1, 9) == 7
    assert HaltRule.parse('now,fail=2').exit_status(7, 2, 9) == 2
    assert HaltRule.parse('now,fail=50%').exit_status(4, 2, 3) == 67
    assert HaltRule.parse('now,success=1').exit_status(0, 5, 9) == 0
    assert HaltRule.parse('soon,fail=200').exit_status(1, 200, 300) == 101


# -- what is written -------------------------------------------------------------------------------

def ended(number=3, values=('bad.csv',), **fields):
    return Ended(number, values, 'convert ' + ' '.join(values), **fields)


def test_a_failure_names_job_arguments_and_node():
    assert (ended(node='lab2', status=7, reason='exit status 7').message()
            == 'job 3 (bad.csv) failed on lab2: exit status 7')
    assert ended(values=(), reason='it was lost').message() == 'job 3 failed: it was lost'
    assert len(ended(values=('x' * 1000,), reason='r').message()) < 200
    assert '\n' not in ended(values=('a\nb',), reason='r').message()


def test_the_log_has_the_columns_of_parallel_and_the_node(tmp_path):
    path = str(tmp_path / 'log')
    log = JobLog(path, False)
    log.write(ended(1, ('a\tb\nc',), node='lab2', address='10.0.0.2', start=12.5, seconds=1.25,
                    sent=5, stdout=b'12', stderr=b'3'))
    log.write(ended(2, status=7, reason='exit status 7'))
    log.write(ended(3, signal=9, reason='killed'))
    log.close()
    with open(path) as file:
        lines = file.read().splitlines()
    assert (lines[0]
            == 'Seq\tHost\tStarttime\tJobRuntime\tSend\tReceive\tExitval\tSignal\tCommand\tNode')
    assert lines[1] == '1\t10.0.0.2\t12.500\t     1.250\t5\t3\t0\t0\tconvert a b c\tlab2'
    assert [line.split('\t')[6:8] for line in lines[2:]] == [['7', '0'], ['0', '9']]
    assert JobLog.read(path) == {1: (True, 'convert a b c'), 2: (False, 'convert bad.csv'),
                                 3: (False, 'convert bad.csv')}


def test_a_log_of_parallel_itself_is_read(tmp_path):
    path = tmp_path / 'log'
    path.write_text('Seq\tHost\tStarttime\tJobRuntime\tSend\tReceive\tExitval\tSignal\tCommand\n'
                    '1\t:\t1795690207.702\t     0.000\t0\t0\t0\t0\texit 0\n'
                    '3\t:\t1795690207.717\t     0.000\t0\t0\t-1\t15\texit 7\n2\t:\t1795')
    assert JobLog.read(str(path)) == {1: (True, 'exit 0'), 3: (False, 'exit 7')}


def test_resuming(tmp_path):
    path = str(tmp_path / 'log')
    assert not Resume(path, False).skips(1, 'x')   # there is none yet
    log = JobLog(path, True)
    for number, status in ((1, 0), (2, 7), (3, 7)):
        log.write(ended(number, status=status))
    log.write(ended(3))   # the last line counts
    log.close()
    resume, again = Resume(path, False), Resume(path, True)
    assert [resume.skips(number, 'convert bad.csv') for number in (1, 2, 3, 4)] == [True, True,
                                                                                    True, False]
    assert [again.skips(number, 'convert bad.csv') for number in (1, 2, 3, 4)] == [True, False,
                                                                                   True, False]
    assert not again.changed and again.skips(1, 'other') and 'job 1 is now `other`' in again.changed


def test_names_of_results_are_those_of_parallel():
    assert results_path(('a/b', 'c\\d')) == os.path.join('1', 'a\\_b', '2', 'c\\\\d')
    names = [as_file_name(value)
             for value in ('', '.', '..', 'a', '\\.', 'x' * 300, 'x' * 301, 'é' * 200)]
    assert len(set(names)) == len(names) and not {'', '.', '..'} & set(names)
    assert all(len(os.fsencode(name)) <= 255 and '/' not in name for name in names)


def test_tags_stand_before_each_line():
    assert (tagged(b'a\nb\rc\n\nd', 'x y') == b'x y\ta\nx y\tb\rc\nx y\t\nx y\td'
            and tagged(b'', 'x') == b'')


def test_lines_are_shown_once():
    live = ShownOutput()
    live.add(1, 'stdout', b'a\nb')
    assert live.take(1, 'stdout') == b'a\n' and live.take(1, 'stdout') == b''
    live.add(1, 'stdout', b'c\nd')
    assert live.take(1, 'stdout') == b'bc\n'
    live.add(1, 'stdout', b'e\n')   # not shown before the end comes
    assert (live.rest(1, 'stdout', b'a\nbc\nde\nf') == b'de\nf'
            and live.rest(2, 'stderr', b'x') == b'x')


def test_a_window_lets_in_again_when_a_part_has_ended():
    window = Window(lambda: 8, False)
    assert all(window.enter(0) for _ in range(8)) and not window._has_room(0)
    window.leave(0)
    assert not window._has_room(0)
    window.leave(0)
    window.leave(0)
    assert window._has_room(0) and window.enter(0)
    window.close()
    assert not window.enter(0) and window.count == 6


def test_a_window_is_full_of_large_files():
    window = Window(lambda: 1000, False)
    # One goes alone, however large
    assert window.enter(dispy.BYTES_AHEAD * 2) and not window._has_room(1)
    window.leave(dispy.BYTES_AHEAD * 2)
    assert window._has_room(1)
