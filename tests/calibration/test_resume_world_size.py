from __future__ import annotations

import signal

import pytest
import torch
from interrupted import BATCHES
from processes import run_script


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.exhaustive)])
def test_a_calibration_that_goes_on_with_another_number_of_processes_starts_again_and_says_so(tmp_path, before, after):
    run_script("preempted_fit.py", before, tmp_path, "kill", processes=before, code=-signal.SIGKILL)
    said = run_script("preempted_fit.py", after, tmp_path, processes=after)
    assert "The calibration starts again from its first batch" in said
    assert f"number of processes was {before} and is {after} now" in said
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(after)]
    assert [ended["batches"] for ended in found] == [BATCHES] * after
    assert [ended["replayed"] for ended in found] == [BATCHES, 0][:after]
    for name, value in found[0]["state"].items():
        assert all(torch.equal(ended["state"][name], value) for ended in found)
