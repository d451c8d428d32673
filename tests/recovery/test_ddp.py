from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_script

pytest.importorskip("peft", reason="peft is not installed")


def run(devices: int, folder: Path, kind: str) -> list[dict]:
    run_script("ddp_recovery.py", devices, folder, kind, processes=devices)
    return [torch.load(folder / f"{devices}-{rank}.pt", weights_only=True) for rank in range(devices)]


def assert_alike(first: dict, second: dict) -> None:
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    assert first["trained"] == second["trained"] == [n for n in first["state"] if "permutation" not in n]
    own = {"seconds": 0, "peak_memory_bytes": 0}
    assert {**first["figures"], **own} == {**second["figures"], **own}
    assert first["figures"]["reverted"] is False


def test_two_processes_recover_as_one_does(tmp_path):
    (one,) = run(1, tmp_path, "lora")
    first, second = run(2, tmp_path, "lora")
    assert_alike(first, second)
    assert list(first["state"]) == list(one["state"])
    for name, value in one["state"].items():
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-6)
    found, expected = first["figures"], one["figures"]
    assert found["tokens"] == expected["tokens"] == 3 * 32 * 16
    assert first["tokens"] == one["tokens"] == 16 * 16  # of all processes, in a checkpoint too
    assert found["best_step"] == expected["best_step"]
    for (_, loss), (_, other) in zip(found["history"], expected["history"], strict=True):
        assert loss == pytest.approx(other, rel=1e-6)


def test_two_processes_share_a_cache(tmp_path):
    first, second = run(2, tmp_path, "cache")
    assert_alike(first, second)
    assert first["figures"]["tokens"] == 3 * 28 * 16
    assert len(list((tmp_path / "cache").glob("logits-*.safetensors"))) == 2
