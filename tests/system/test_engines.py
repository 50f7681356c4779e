"""Nodes that an engine places: what is submitted, compared to the manuals of the engines; and how
many. Programs of the engines are replaced by some that note what they are given."""

import base64
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import zlib

import pytest

import dispy
from dispy import (DispyError, ENGINES, EngineNodes, NodeDemand, NodeRequest, POD_START,
                   nodes_lacking)
from dispynode import StartError

ALL = NodeRequest(cpus=4, seconds=5400, memory=(3 << 30) + 1, gpus=2, queue='short', log='/logs',
                  more=('--account=physics',))
LEAST = NodeRequest(cpus=1, seconds=61, log='/logs')

SCRIPTS = {
    'slurm': """#!/bin/sh
#SBATCH --job-name=dispy-node
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=1:30:00
#SBATCH --output=/logs/slurm-%j.log
#SBATCH --no-requeue
#SBATCH --mem=3073M
#SBATCH --gres=gpu:2
#SBATCH --partition=short
#SBATCH --account=physics
exec node
""",
    'pbs': """#!/bin/sh
#PBS -l select=1:ncpus=4:mem=3073mb:ngpus=2
#PBS -N dispy-node
#PBS -l walltime=1:30:00
#PBS -j oe
#PBS -o /logs/
#PBS -r n
#PBS -q short
#PBS --account=physics
exec node
""",
    'lsf': """#!/bin/sh
#BSUB -J dispy-node
#BSUB -n 4
#BSUB -R "span[hosts=1]"
#BSUB -W 1:30
#BSUB -o /logs/lsf-%J.log
#BSUB -rn
#BSUB -M 3073MB
#BSUB -R "rusage[mem=3073MB]"
#BSUB -gpu "num=2"
#BSUB -q short
#BSUB --account=physics
exec node
""",
    'sge': """#!/bin/sh
#$ -N dispy-node
#$ -S /bin/sh
#$ -l h_rt=1:30:00
#$ -j y
#$ -o /logs/
#$ -r n
#$ -pe smp 4
#$ -l h_vmem=769M
#$ -l gpu=2
#$ -q short
#$ --account=physics
exec node
"""
}
CLOCK = r'\d+:[0-5]\d:[0-5]\d'
# The options that are used and how their values are written, as sbatch(1), qsub(1B), bsub(1) and
# the qsub(1) of Grid Engine have them
MANUALS = {
    'slurm': [r'--job-name=\S+', r'--nodes=\d+', r'--ntasks=\d+', r'--cpus-per-task=\d+',
              '--time=' + CLOCK, r'--output=\S+', '--no-requeue', r'--mem=\d+[KMGT]',
              r'--gres=gpu:\d+', r'--partition=\S+'],
    'pbs': [r'-l select=\d+:ncpus=\d+(:mem=\d+(kb|mb|gb))?(:ngpus=\d+)?', r'-N \S{1,230}',
            '-l walltime=' + CLOCK, '-j (oe|eo|n)', r'-o \S+', '-r [yn]', r'-q \S+'],
    'lsf': [r'-J \S+', r'-n \d+', r'-R "span\[hosts=1\]"', r'-W \d+:[0-5]\d', r'-o \S+', '-rn',
            r'-M \d+(KB|MB|GB)', r'-R "rusage\[mem=\d+MB\]"', r'-gpu "num=\d+"', r'-q \S+'],
    'sge': [r'-N \S+', r'-S /\S+', '-l h_rt=' + CLOCK, '-j (y|n)', r'-o \S+', '-r (y|n)',
            r'-pe \S+ \d+', r'-l h_vmem=\d+[KMG]', r'-l gpu=\d+', r'-q \S+'],
}


@pytest.mark.parametrize('name', list(SCRIPTS))
def test_the_script_of_a_node(name):
    engine = ENGINES[name]
    assert engine.script(ALL, 'node') == SCRIPTS[name]
    for request in (ALL, LEAST):
        for option in engine.options(request):
            assert any(re.fullmatch(known, option) for known in MANUALS[name]), option
    assert not re.search('gpu|mem|short|account', engine.script(LEAST, 'node'))
    # The shell takes all of it but the last line for comments
    script = engine.script(ALL, 'echo one').encode()
    assert subprocess.run(['sh'], input=script, stdout=subprocess.PIPE).stdout == b'one\n'


@pytest.mark.parametrize('name, said, job', [
    ('slurm', '12\n', '12'), ('slurm', '12;lab\n', '12'),
    ('slurm', 'a word of the site\n12\n', '12'), ('pbs', '12.server.example.org\n', None),
    ('lsf', 'Job <12> is submitted to default queue <normal>.\n', '12'), ('sge', '12\n', '12')])
def test_the_number_of_a_job(name, said, job):
    assert ENGINES[name].answer.search(said).group(1) == (job or said.strip())


@pytest.mark.parametrize('name, jobs, said, alive', [
    ('slurm', ['1', '2', '3'], '1\n3\n', {'1', '3'}),
    ('pbs', ['1.server', '2.server'], '2.server.example.org\n', {'2.server'}),
    ('lsf', ['1', '2'], '1   \n2\n', {'1', '2'}),
    ('sge', ['1', '2'], 'job-ID prior name\n-----------\n      2 0.5 dispy-node me r\n', {'2'}),
    ('sge', ['1'], '', set()),
    ('k8s', ['job.batch/a', 'job.batch/b', 'job.batch/c'], json.dumps({'items': [
        {'metadata': {'name': 'a'}, 'status': {'active': 1}},
        {'metadata': {'name': 'b'}, 'status': {'conditions': [
            {'type': 'Complete', 'status': 'True'}]}},
        {'metadata': {'name': 'c'}, 'status': {'conditions': [
            {'type': 'Suspended', 'status': 'False'}]}}]}), {'job.batch/a', 'job.batch/c'})])
def test_which_jobs_have_not_ended(monkeypatch, name, jobs, said, alive):
    engine = ENGINES[name]
    monkeypatch.setattr(engine, '_run', lambda command: said)
    assert engine.alive(jobs) == alive


DEMANDS = [
    # waiting, idle, there; alive, CPUs of one, MIN, MAX -> more
    ((0, 0, 0), 0, 2, 0, 5, 0), ((0, 0, 0), 0, 2, 3, 5, 3), ((1, 0, 0), 0, 2, 0, 5, 1),
    ((4, 0, 0), 0, 2, 0, 5, 2), ((5, 0, 0), 0, 2, 0, 5, 3), ((99, 0, 0), 0, 2, 0, 5, 5),
    ((99, 0, 5), 5, 2, 0, 5, 0), ((5, 5, 3), 3, 2, 0, 5, 0),
    # Two that are there, and two that are to come
    ((4, 0, 2), 4, 2, 0, 9, 0), ((5, 0, 2), 4, 2, 0, 9, 1),
    # A node that is there and is not known any more
    ((2, 0, 3), 2, 2, 0, 9, 1), ((0, 0, 2), 2, 2, 4, 9, 2)]


@pytest.mark.parametrize('demand, alive, cpus, least, most, more', DEMANDS)
def test_how_many_nodes_are_lacking(demand, alive, cpus, least, most, more):
    assert nodes_lacking(NodeDemand(*demand), alive, cpus, least, most) == more


def test_nodes_are_placed_as_jobs_wait():
    """Steps of a minute, in which two nodes come and each ends eight jobs."""
    waiting, alive, there, submitted = 50, 0, 0, []
    for _ in range(8):
        more = nodes_lacking(NodeDemand(waiting, 0 if waiting else 4 * there, there), alive, 4, 1,
                             10)
        submitted.append(more)
        alive += more
        there = min(alive, there + 2)
        waiting = max(0, waiting - 8 * there)
        if not waiting:   # those that are idle end by themselves, but for one
            alive = there = 1
    assert submitted == [10, 0, 0, 0, 0, 0, 0, 0] and alive == 1


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A directory with programs that note what they are given and say what they are told to."""
    directory = tmp_path / 'bin'
    directory.mkdir()
    monkeypatch.setenv('PATH', str(directory) + os.pathsep + os.environ['PATH'])
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('DISPY_SECRET', 'a secret of this test')

    def make(name, text):
        path = directory / name
        path.write_text('#!/bin/sh\necho "$0 $*" >> %s/calls\n%s\n' % (tmp_path, text))
        path.chmod(0o755)
    return make


def place(task, *words):
    return dispy.main([task, *words])


def test_deploy_and_stop(tmp_path, programs, capsys):
    programs('qsub', 'cat > %s/script; echo 12.server' % tmp_path)
    programs('qselect', 'echo 12.server')
    programs('qdel', 'exit 0')
    words = ('--pbs', '1', '--scheduler-host', 'host:9', '--cpus', '2', '--memory', '1g', '--gpus',
             '1', '--time', '30m', '--drain-before', '60', '--python', '/opt/python')
    assert place('deploy', *words, '--', '--resource', 'licence=2', '--name', 'it is') == 0
    command = (tmp_path / 'script').read_text().splitlines()[-1]
    engines = tmp_path / '.dispy' / 'engines'
    script, = engines.glob('dispynode-*.py')
    secret, = engines.glob('secret-*')
    assert secret.read_text() == 'a secret of this test'
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert command == (
        'exec /opt/python %s --daemon --port 0 --scheduler-host host:9 --secret-file %s --cpus 2 '
        '--time-limit 1800 --drain-before 60 --memory 1073741824 --resource gpu=1 --name '
        '"pbs-$PBS_JOBID" --dest-path-prefix "${TMPDIR:-/tmp}/dispy-pbs-$PBS_JOBID" --resource '
        "licence=2 --name 'it is'" % (script, secret))
    assert json.loads((engines / 'pbs.json').read_text()) == {'12.server': True}
    assert place('stop', '--pbs') == 0
    calls = (tmp_path / 'calls').read_text()
    assert '/qdel 12.server\n' in calls and not list(engines.glob('*.*-*'))
    assert sorted(os.listdir(str(engines))) == ['lock']
    out = capsys.readouterr().out
    assert out == 'PBS: job 12.server is submitted\nPBS: 1 job cancelled\n'


def test_what_an_engine_says_is_told(programs, capsys, tmp_path):
    assert place('deploy', '--lsf', '1') == 1
    assert 'bsub: there is no such program here' in capsys.readouterr().err
    programs('bsub', 'echo "the queue is closed" >&2; exit 3')
    assert place('deploy', '--lsf', '2') == 1
    assert 'bsub: the queue is closed' in capsys.readouterr().err
    programs('bsub', 'echo nothing')
    assert place('deploy', '--lsf', '1') == 1
    assert 'said no number of a job' in capsys.readouterr().err
    # One was submitted before the next failed: it is known
    programs('bsub', 'mkdir %s/once || exit 1; echo "Job <7> is submitted"' % tmp_path)
    assert place('deploy', '--lsf', '2') == 1
    programs('bjobs', 'echo "No unfinished job found" >&2; exit 255')
    assert EngineNodes(ENGINES['lsf']).engine.alive(['7']) == set()
    programs('bjobs', 'echo 7')
    programs('bkill', 'exit 0')
    assert place('stop', '--lsf') == 0
    assert '/bkill 7\n' in (tmp_path / 'calls').read_text()
    with EngineNodes(ENGINES['lsf']), pytest.raises(StartError, match='another deploy or stop'):
        EngineNodes(ENGINES['lsf']).__enter__()


@pytest.mark.parametrize('words, text', [
    (['--slurm'], 'number of nodes'), (['--slurm', '0'], 'whole number above 0'),
    (['--slurm', '1', '--pbs', '1'], 'not allowed with'),
    (['--slurm', '1', '--adaptive', '0:1'], 'number of nodes'),
    (['--slurm', '--adaptive', '2:1'], 'MIN:MAX'), (['--slurm', '--adaptive', '0:0'], 'MIN:MAX'),
    (['--k8s', '1', '--queue', 'q'], 'no queues'), (['--slurm', '1', '--image', 'x'], '--image'),
    (['--slurm', '1', '--time', '10'], '--time-limit 10'),
    (['--slurm', '1', '--', '--cpus', 'x'], 'invalid int value'),
    (['--slurm', '1', '--secret-file', '/no/such'], '/no/such')])
def test_options_that_make_no_sense(programs, capsys, words, text):
    with pytest.raises(SystemExit) as ended:
        place('deploy', *words)
    assert ended.value.code == 2 and text in capsys.readouterr().err


def test_stop_takes_no_options_of_nodes(programs, capsys):
    with pytest.raises(SystemExit):
        place('stop', '--slurm', '--', '--cpus', '1')
    assert 'takes no options' in capsys.readouterr().err


# -- Kubernetes ------------------------------------------------------------------------------------

def test_what_kubernetes_is_given_fits_its_schema():
    kubernetes_validate = pytest.importorskip(
        'kubernetes_validate', reason='needs the schemas of Kubernetes (pip install '
                                      'kubernetes-validate)')
    engine = ENGINES['k8s']
    request = ALL._replace(queue='', more=(), image='python:3.11')
    found = [engine.manifest(LEAST, 'node'), engine.manifest(request, 'node'),
             *engine.files(b'source', b'secret')]
    for version in ('1.25', '1.30', '1.34'):
        for item in found:
            kubernetes_validate.validate(item, version, strict=True)
    wrong = engine.manifest(LEAST, 'node')
    wrong['spec']['template']['spec']['container'] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, '1.30', strict=True)


def test_the_pod_of_a_node():
    engine = ENGINES['k8s']
    job = engine.manifest(ALL._replace(image='python:3.11'), 'node')
    container, = job['spec']['template']['spec']['containers']
    assert container['resources'] == {
        'requests': {'cpu': '4', 'memory': '3073Mi'},
        'limits': {'cpu': '4', 'memory': '3073Mi', 'nvidia.com/gpu': '2'}}
    assert container['image'] == 'python:3.11' and job['spec']['activeDeadlineSeconds'] == 5400
    assert container['command'] == ['sh', '-c', POD_START + 'node']
    assert engine.manifest(LEAST, 'node') != job     # each has its own
    # Those of large clusters take 1 MiB at most
    files = engine.files(b'source', b'secret')
    assert zlib.decompress(base64.b64decode(files[0]['binaryData']['dispynode'])) == b'source'
    assert base64.b64decode(files[1]['data']['secret']) == b'secret'


def test_a_pod_unpacks_what_it_is_given(tmp_path):
    """Its command, with other directories."""
    files = ENGINES['k8s'].files(b'print("it runs")', b'secret')
    for name, data in (('dispy/dispynode', files[0]['binaryData']['dispynode']),
                       ('dispy-secret/secret', files[1]['data']['secret'])):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(base64.b64decode(data))
    (tmp_path / 'tmp').mkdir()
    command = POD_START + 'python3 /tmp/dispynode.py'
    for path in ('/tmp/', '/dispy/', '/dispy-secret/'):
        command = re.sub("(?<=[' ])" + path, str(tmp_path) + path, command)
    command = command.replace('python3 ', shlex.quote(sys.executable) + ' ')
    done = subprocess.run(['sh', '-c', command], stdout=subprocess.PIPE)
    assert done.stdout == b'it runs\n'
    assert stat.S_IMODE((tmp_path / 'tmp' / 'secret').stat().st_mode) == 0o600


def test_deploy_to_kubernetes(programs, tmp_path, capsys):
    programs('kubectl', 'cd %s; case $1 in create) cat > given; cat given >> all; echo >> all; '
                        'grep -q \'"Job"\' given && echo job.batch/dispy-node-x ;; get) '
                        'echo \'{"items": [{"metadata": {"name": "dispy-node-x"}}]}\';; esac; true'
             % tmp_path)
    assert place('deploy', '--k8s', '1', '--scheduler-host', 'host') == 0
    kinds = [json.loads(line)['kind'] for line in (tmp_path / 'all').read_text().splitlines()]
    assert kinds == ['ConfigMap', 'Secret', 'Job']
    command = json.loads((tmp_path / 'all').read_text().splitlines()[2])[
        'spec']['template']['spec']['containers'][0]['command'][2]
    assert 'exec python3 /tmp/dispynode.py --daemon' in command
    assert '--secret-file /tmp/secret' in command and '--name "k8s-$HOSTNAME"' in command
    assert 'a secret' not in command
    assert place('stop', '--k8s') == 0
    calls = (tmp_path / 'calls').read_text()
    assert '--wait=false job.batch/dispy-node-x\n' in calls
    assert 'configmap/dispy-node secret/dispy-node\n' in calls


def test_an_engine_that_was_asked_for_nothing_is_not_asked(programs, monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert place('stop', '--slurm') == 0
    with pytest.raises(DispyError, match='there is no such program'):
        ENGINES['slurm'].alive(['1'])
