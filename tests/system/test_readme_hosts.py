"""The README's section on more machines, run as it stands: three hosts that have names, and a real
sshd on two of them."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import eventually
from documents import PIECES
from hosts import Hosts
from nodes import SSHD, needs_sshd

pytestmark = needs_sshd
SSH = """#!/bin/sh
exec %s -F none -i %s -o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no \\
    -o LogLevel=ERROR "$@"
"""


@pytest.fixture
def hosts():
    with Hosts() as made:
        yield made


def serve_ssh(host, key):
    """An sshd at the usual port; sessions there have the host's own home."""
    home = os.path.join(host.directory, 'home')
    host.write('key', open(key).read())
    config = host.write('sshd_config', '\n'.join([
        'Port 22', 'HostKey %s/key' % host.directory, 'AuthorizedKeysFile %s.pub' % key,
        'StrictModes no', 'UsePAM no', 'PasswordAuthentication no', 'PidFile none',
        'SetEnv HOME=%s XDG_CONFIG_HOME=%s/.config TMPDIR=%s' % (home, home, host.directory), '']))
    host.popen([SSHD, '-D', '-e', '-f', config], stderr=subprocess.DEVNULL)


def rows_of(table):
    """The first two words of each line: a host, and what was done there."""
    return re.findall(r'^(\S+) +(\w+)', table, re.M)


def test_more_machines_as_the_readme_says(hosts, tmp_path):
    os.makedirs('/run/sshd', 0o755, exist_ok=True)
    key = str(tmp_path / 'key')
    subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', key], check=True)
    client = hosts.host('client')
    far = [hosts.host(name, secret=None) for name in ('host1', 'host2')]
    client.etc_hosts({host.name: host.ip for host in (client, *far)})
    for host in far:
        serve_ssh(host, key)
    tools = os.path.dirname(client.write('tools/ssh', SSH % (shutil.which('ssh'), key), 0o755))
    client.write('tools/python', '#!/bin/sh\nexec %s "$@"\n' % sys.executable, 0o755)
    environment = {'PATH': os.pathsep.join([tools, os.environ['PATH']])}

    def run(*command):
        return client.run(command, env=environment)
    for host in far:
        reaches = ['ssh', host.name, 'true']
        eventually(lambda: client.run(reaches, exit_code=None, env=environment) == '', what='sshd')
    section = [piece for piece in PIECES if piece.key() == ('README', 'More machines')]
    deploy, program, other_python = section
    assert '--python /home/me/' in other_python.code    # see test_deploy.py
    started = run('sh', '-e', '-c', deploy.code)
    assert rows_of(started) == [('host1', 'started'), ('host2', 'started')]
    printed = run(sys.executable, client.script(program.code))
    assert printed.startswith('328350\n')
    for host in far:
        assert '%s (%s)' % (host.ip, host.name) in printed
    stopped = run('sh', '-c', 'python -m dispy stop host1 host2')
    assert rows_of(stopped) == [('host1', 'stopped'), ('host2', 'stopped')]
