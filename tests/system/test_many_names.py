"""Lists of thousands of hosts: a bounded number is dialled at a time, and they are added in linear
time."""

import logging
import socket
import subprocess
import sys
import threading
import time

import dispy
from conftest import ROOT, eventually
from dispy import DIALS_MOST
from nodes import NodeProcess, SchedulerProcess


def square(n):
    return n * n


def test_a_list_of_silent_hosts_is_dialled_a_few_at_a_time(tmp_path):
    """They accept and say nothing; a node behind them in the list is reached all the same when some
    are given up."""
    names = ['127.0.%d.%d' % (1 + n // 250, 1 + n % 250) for n in range(500)]
    everywhere = socket.socket()
    everywhere.bind(('0.0.0.0', 0))
    everywhere.listen(2000)
    port = everywhere.getsockname()[1]
    before, most = threading.active_count(), 0
    with dispy.JobCluster(square, nodes=[(name, port) for name in names],
                          loglevel=logging.CRITICAL) as cluster:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            most = max(most, threading.active_count() - before)
            time.sleep(0.01)
        assert DIALS_MOST <= most <= DIALS_MOST + 5
        cluster.close(terminate=True)
    everywhere.close()


def test_thousands_of_nodes_are_added_in_linear_time():
    """An order of magnitude between the two that tell linear from quadratic growth."""
    took = []
    with dispy.JobCluster(square, nodes=[('127.0.0.1', 1)], loglevel=logging.CRITICAL) as cluster:
        for first, count in ((0, 500), (1000, 4000)):
            began = time.process_time()
            assert cluster.discover_nodes([('10.255.%d.%d' % (n // 250, n % 250), 1)
                                           for n in range(first, first + count)]) == 0
            took.append(time.process_time() - began)
        cluster.close(terminate=True)
    print(took)
    assert took[1] < 5.0   # 111 s before


def test_the_command_line_with_a_scheduler(tmp_path):
    script = tmp_path / 'program'
    script.write_text('#!/bin/sh\necho hello $1\n')
    script.chmod(0o755)
    with NodeProcess(tmp_path / 'n') as node, SchedulerProcess(tmp_path / 's', '-n', '127.0.0.1:%d'
                                                               % node.port) as scheduler:
        done = subprocess.run([sys.executable, ROOT + '/dispy.py', '--scheduler-host',
                               '127.0.0.1:%d' % scheduler.port, '-a', 'one', '-a', 'two',
                               str(script)], capture_output=True, text=True, timeout=60)
        assert (done.returncode == 0
                and sorted(done.stdout.split('\n')) == ['', 'hello one', 'hello two']), done.stderr
        eventually(lambda: 'is over' in scheduler.log())
