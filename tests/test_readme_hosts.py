"""The README's section on more machines, run as it stands: three hosts with names of their own, and a real sshd on two of them."""

import os
import shutil
import subprocess
import sys

import pytest

from conftest import eventually
from hosts import Hosts
from test_deploy import SSHD, pytestmark as needs_sshd
from test_readme import PIECES

pytestmark = needs_sshd
SSH = '#!/bin/sh\nexec %s -F none -i %s -o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no -o LogLevel=ERROR "$@"\n'


@pytest.fixture
def hosts():
    with Hosts() as made:
        yield made


def serve_ssh(host, key):
    """An sshd at the usual port; sessions there have the host's own home."""
    home = os.path.join(host.directory, 'home')
    host.write('key', open(key).read())
    config = host.write('sshd_config', '\n'.join([
        'Port 22', 'HostKey %s/key' % host.directory, 'AuthorizedKeysFile %s.pub' % key, 'StrictModes no', 'UsePAM no',
        'PasswordAuthentication no', 'PidFile none',
        'SetEnv HOME=%s XDG_CONFIG_HOME=%s/.config TMPDIR=%s' % (home, home, host.directory), '']))
    host.popen([SSHD, '-D', '-e', '-f', config], stderr=subprocess.DEVNULL)


def test_more_machines_as_the_readme_says(hosts, tmp_path):
    if not os.path.isdir('/run/sshd'):
        os.mkdir('/run/sshd', 0o755)
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
    for host in far:
        eventually(lambda: client.run(['ssh', host.name, 'true'], exit_code=None, env=environment) == '', what='sshd of ' + host.name)
    printed = {}
    for piece in PIECES:
        if piece.name == 'README.md' and piece.title == 'More machines' and '/home/me' not in piece.code:
            command = ['sh', '-e', '-c', piece.code] if piece.language == 'sh' else [sys.executable, client.script(piece.code)]
            printed[piece.language] = client.run(command, env=environment)
    assert [line.split()[:2] for line in printed['sh'].splitlines()] == [['host1', 'started:'], ['host2', 'started:']]
    assert printed['python'].startswith('328350\n')
    for host in far:
        assert '%s (%s)' % (host.ip, host.name) in printed['python']
    stopped = client.run(['sh', '-c', 'python -m dispy stop host1 host2'], env=environment)
    assert [line.split()[:2] for line in stopped.splitlines()] == [['host1', 'stopped'], ['host2', 'stopped']]
