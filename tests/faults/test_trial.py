"""Three programs, three nodes and a scheduler under random faults, by the same code as trial.py,
which runs longer and more seeds."""

import sys

import pytest

import trial as trial_module
from trial import Absence, trial


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith('linux'),
                    reason='processes are looked for in /proc')
@pytest.mark.parametrize('seed', [1, 2, 3])
def test_a_passing_fault_passes(tmp_path, seed):
    findings, faults, counts = trial(seed, 20, str(tmp_path))
    assert not findings, ('python tests/faults/trial.py --seed %d --seconds 20: %s; after %s'
                          % (seed, findings[:5], faults))
    assert counts['submitted'] > 50 and len(faults) > 5, (counts, faults)


@pytest.mark.parametrize('faults, told, explained', [
    ([(0.0, 4.0)], 9.0, False),                             # the longest that there is
    # No time between them for another connection
    ([(0.0, 4.0), (6.0, 9.0)], 9.0, True),
    ([(0.0, 4.0), (9.5, 13.0)], 11.0, False),               # there was
    ([(0.0, 4.0), (2.0, 7.0), (3.0, 5.0)], 9.0, True),
    ([(0.0, 4.0), (6.0, 9.0)], 7.0, False),                 # before the limit
    ([(0.0, 4.0), (6.0, 9.0)], 60.0, False),                # long after it was back
    ([(0.0, 4.0), (6.0, None)], 60.0, True)])               # it is away still
def test_jobs_that_never_began_may_be_lost_only_with_a_node_that_several_faults_kept_away(
        monkeypatch, faults, told, explained):
    absence = Absence()
    for begin, end in faults:
        monkeypatch.setattr(trial_module.time, 'monotonic', lambda: begin)
        ended = absence.begin([0])
        monkeypatch.setattr(trial_module.time, 'monotonic', lambda: end)
        if end is not None:
            ended()
    assert absence.explains(0, told) == explained and not absence.explains(1, told)
