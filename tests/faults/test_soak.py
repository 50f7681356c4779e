"""Many jobs under many faults, by the same code as soak.py."""

import pytest

from soak import soak


@pytest.mark.long
def test_thousands_of_jobs_with_a_node_killed_every_three_seconds(tmp_path, request):
    """Ten thousand with --long."""
    count = 10000 if request.config.getoption('--long') else 4000
    tally, history, failed, _ = soak(str(tmp_path), 240, 7, jobs_most=count, nodes=4,
                                     faults=('kill',))
    assert tally.submitted == count + 1 and tally.clean, tally
    assert not failed, failed[:5]
    assert len(history) >= count // 2000


@pytest.mark.long
def test_everything_for_a_while(tmp_path):
    """Killed, stopped, cut, held; a failing seed stands in the message of nemesis and repeats
    it."""
    tally, history, failed, rows = soak(str(tmp_path), 15, 11, every=0.5)
    assert tally.clean, (tally, history)
    assert not failed, (failed[:5], history)
    assert len({fault for fault, _, _ in history}) == 4
    client = rows[0]
    assert client[3][1] <= client[2][1] + 4, client   # descriptors


@pytest.mark.long
def test_the_node_of_this_program_for_a_while(tmp_path):
    """Its runner and workers are killed and stopped."""
    tally, history, failed, rows = soak(str(tmp_path), 8, 5, every=2.0, local=True)
    assert tally.clean, (tally, history)
    assert not failed, (failed[:5], history)
    assert rows[0][3][1] <= rows[0][2][1] + 4, rows   # descriptors
