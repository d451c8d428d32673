"""Experts on two processes, each of which meets some of them only."""

from __future__ import annotations

import torch
from processes import run_script


def run(devices, folder):
    run_script("ddp_experts.py", devices, devices, folder, processes=devices)
    return [torch.load(folder / f"{devices}-{rank}.pt", weights_only=True) for rank in range(devices)]


def test_two_processes_that_meet_other_experts_end_as_one_that_meets_all(tmp_path):
    (one,) = run(1, tmp_path)
    first, second = run(2, tmp_path)
    assert set(first["moments"]) == set(second["moments"]) == set(one["moments"])
    assert first["tokens"] == second["tokens"] == one["tokens"]
    counts = {name.rsplit(".", 2)[1]: tokens for name, tokens in one["tokens"].items()}
    assert counts == {"0": 96, "1": 192, "2": 96, "3": 0}
    for name, expected in one["moments"].items():
        found = first["moments"][name]
        assert found["tokens"] == expected["tokens"]
        for field in ("mean_x", "mean_h"):
            torch.testing.assert_close(found[field], expected[field], rtol=1e-4, atol=1e-5)
        for value, right in zip(found["coupled"], expected["coupled"], strict=True):
            torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-4 * right.abs().max().item())
        assert all(
            torch.equal(value, second["moments"][name]["coupled"][i]) for i, value in enumerate(found["coupled"])
        )

    # The expert that neither of them meets stays dense, and this is said once.
    for content in (one, first, second):
        assert {content["layouts"][name] for name in content["layouts"] if ".experts.3." in name} == {"dense"}
    for content in (one, first):
        assert sum("3 of 16 layers stay dense because no gradient" in message for message in content["said"]) == 1

    # Both hold the same model, after the compression and after steps in which each has other experts' gradients.
    for state in ("state", "trained"):
        assert all(torch.equal(value, second[state][name]) for name, value in first[state].items())
    moved = [name for name, value in first["trained"].items() if not torch.equal(value, first["state"][name])]
    assert {name.split(".experts.")[1][0] for name in moved if ".experts." in name} >= {"0", "1", "2"}
