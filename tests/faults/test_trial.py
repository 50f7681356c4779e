"""Three programs, three nodes and a scheduler under random faults, by the same code as trial.py, which runs longer and more seeds."""

import sys

import pytest

from trial import trial


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='processes are looked for in /proc')
@pytest.mark.parametrize('seed', [1, 2, 3])
def test_a_passing_fault_passes(tmp_path, seed):
    findings, faults, counts = trial(seed, 20, str(tmp_path))
    assert not findings, 'python tests/faults/trial.py --seed %d --seconds 20: %s; after %s' % (seed, findings[:5], faults)
    assert counts['submitted'] > 50 and len(faults) > 5, (counts, faults)
