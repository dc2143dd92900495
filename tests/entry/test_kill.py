"""A kill at a random moment, in real processes. ``python -m tests.kill_and_resume`` does it as often as you like."""

from tests.kill_and_resume import check


def test_killed_runs_end_as_unbroken_ones(tmp_path):
    assert sum(check(kills=1, seed=1, folder=tmp_path).values()) == 1
