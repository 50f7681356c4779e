"""A directory for each job, and files of programs that come back, on every kind of cluster."""

import os
import subprocess

import pytest

import dispy

PROGRAM = '''#!/bin/sh
cat in.txt own.txt 2>/dev/null > out_$1.dat
mkdir deep; echo $1 > deep/x.log
pwd
[ $1 != 3 ] || rm out_3.dat
[ $1 != 4 ] || exit 4
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The client's working directory, with a program and a file."""
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    with open('program', 'w') as file:
        file.write(PROGRAM)
    os.chmod('program', 0o755)
    for name in ('in.txt', 'own.txt'):
        with open(name, 'w') as file:
            file.write('the text of %s\n' % name)
    return tmp_path / 'here'


def look(name):
    import os
    with open('in.txt') as file:
        text = file.read()
    with open('made by %s' % name, 'w'):
        return os.getcwd(), sorted(os.listdir('.')), text, dispy_job_path   # noqa: F821


def test_each_job_has_a_directory_that_is_removed_after_it(make_cluster, here):
    with make_cluster(look, nodes='local', depends=['in.txt'], job_dir=True) as cluster:
        first = cluster.submit('a').get(30)
        second = cluster.submit('b', dispy_job_depends=['own.txt']).get(30)
    assert first[1] == ['in.txt', 'made by a'] and second[1] == ['in.txt', 'made by b', 'own.txt']
    assert first[2] == 'the text of in.txt\n' and first[0] != second[0]
    assert os.path.basename(first[3]) != os.path.basename(first[0])
    assert not os.path.exists(first[0]) and not os.path.exists(second[0])


def test_files_of_a_program_come_back_before_its_job_has_ended(make_cluster, here):
    with make_cluster('./program', nodes='local', depends=['in.txt'], dest='results/{id}',
                      returns=['out_{id}.dat', 'deep/*.log']) as cluster:
        jobs = [cluster.submit(number) for number in range(1, 5)]
        jobs.append(cluster.submit_job_id('five/5', 5, dispy_job_depends=['own.txt']))
        assert [jobs[0].get(30), jobs[1].get(30)] == [0, 0]
        assert (here / 'results/1/out_1.dat').read_text() == 'the text of in.txt\n'
        assert (here / 'results/2/deep/x.log').read_text() == '2\n'
        assert not os.path.exists(jobs[0].stdout.decode().strip())
        assert jobs[2].wait(30) and jobs[2].status == dispy.DispyJob.Terminated
        assert 'no file that is called out_3.dat (returns); in its directory there is deep, ' \
            'in.txt, program' in jobs[2].exception
        assert (here / 'results/3/deep/x.log').read_text() == '3\n'   # what there was has come
        with pytest.raises(subprocess.CalledProcessError):
            jobs[3].get(30)
        assert jobs[3].status == dispy.DispyJob.Finished and jobs[3].result == 4
        assert (here / 'results/4/out_4.dat').exists()
        assert jobs[4].wait(30) and 'called out_five_5.dat' in jobs[4].exception


def test_files_come_below_the_directory_of_the_program_and_clashes_are_told(here, caplog):
    with dispy.JobCluster('./program', nodes='local', returns=['deep/x.log']) as cluster:
        assert [cluster.submit(number).get(30) for number in (1, 2)] == [0, 0]
        assert (here / 'deep/x.log').read_text() == '2\n'
    assert 'deep/x.log of job 2 replaces that of job 1' in caplog.text
    assert 'leaves' not in caplog.text
    with pytest.raises(ValueError, match='dispy_send_file'):
        dispy.JobCluster(look, nodes='local', returns=['x'])
