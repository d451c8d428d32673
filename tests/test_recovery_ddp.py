from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

FOLDER = Path(__file__).parent


def run(devices: int, folder: Path, kind: str) -> list[dict]:
    paths = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, str(FOLDER / "ddp_recovery.py"), str(devices), str(folder), kind],
        env=environment,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return [torch.load(folder / f"{devices}-{rank}.pt", weights_only=True) for rank in range(devices)]


@pytest.mark.parametrize("kind", ["lora", "factors", "cache"])
def test_two_processes_recover_as_one_does(tmp_path, kind):
    (one,) = run(1, tmp_path, kind)
    first, second = run(2, tmp_path, kind)
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    assert list(first["state"]) == list(one["state"])
    assert first["trained"] == second["trained"] == one["trained"]
    for name, value in one["state"].items():
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-6)
    for found in (first["figures"], second["figures"]):
        expected = one["figures"]
        assert found["tokens"] == expected["tokens"] == 3 * 28 * 16
        assert found["best_step"] == expected["best_step"] > 0
        assert found["held_out_loss"]["before"] == pytest.approx(expected["held_out_loss"]["before"])
        assert found["held_out_loss"]["after"] == pytest.approx(expected["held_out_loss"]["after"], rel=1e-4)
