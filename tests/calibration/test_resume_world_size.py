from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interrupted import BATCHES

FOLDER = Path(__file__).parents[1]


def run_script(*arguments: object, code: int = 0) -> str:
    """Run a fit of several processes, or of one; return what it says."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(FOLDER / "preempted_fit.py"), *map(str, arguments)]
    done = subprocess.run(command, env={**environment, "OMP_NUM_THREADS": "1"}, timeout=600, capture_output=True)
    assert done.returncode == code, done.stderr.decode()[-3000:]
    return done.stderr.decode()


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_calibration_that_goes_on_with_another_number_of_processes_starts_again_and_says_so(tmp_path, before, after):
    run_script(before, tmp_path, "kill", code=-signal.SIGKILL)
    said = run_script(after, tmp_path)
    assert "the calibration starts again from its first batch" in said
    assert f"number of processes was {before} and is {after} now" in said
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(after)]
    assert [ended["batches"] for ended in found] == [BATCHES] * after
    assert [ended["replayed"] for ended in found] == [BATCHES, 0][:after]
    for name, value in found[0]["state"].items():
        assert all(torch.equal(ended["state"][name], value) for ended in found)
