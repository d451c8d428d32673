from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import run_script

from fasc_lightning import RhoHistory


def run(devices: int, name: str, folder: Path, fraction: float, allocation: str, refit: bool = False) -> list[dict]:
    run_script("ddp_fit.py", devices, name, folder, fraction, allocation, refit, processes=devices)
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(devices)]


@pytest.mark.parametrize(("fraction", "allocation"), [(1.0, "uniform"), (0.5, "fisher")])
def test_two_processes_end_as_one_does(tmp_path, fraction, allocation):
    (one,) = run(1, "one", tmp_path, fraction, allocation)
    first, second = run(2, "two", tmp_path, fraction, allocation)

    # Every process ends with the same model, to the bit.
    assert list(first["state"]) == list(second["state"])
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])

    for name, expected in one["moments"].items():
        found = first["moments"][name]
        assert found["tokens"] == expected["tokens"]
        for key in ("A", "G", "mean_x", "mean_h"):
            scale = expected[key].abs().max().item()
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4 * scale)
        assert abs(first["ranks"][name] - one["ranks"][name]) <= 1
        assert first["rhos"][name] == pytest.approx(second["rhos"][name], rel=0, abs=0, nan_ok=True)

    compared = 0
    weights = dense_weights(first["state"])
    for name, expected in dense_weights(one["state"]).items():
        if first["ranks"][name] == one["ranks"][name]:
            assert (weights[name] - expected).norm() <= 1e-3 * expected.norm()
            compared += 1
    assert compared >= (14 if allocation == "uniform" else 7)


def test_two_processes_end_with_the_refit_of_the_first(tmp_path):
    (plain, _), (first, second) = (run(2, str(refit), tmp_path, 1.0, "measured", refit) for refit in (False, True))
    assert plain["refit"] is None
    assert first["refit"]["batches"] == {"fit": 2, "held": 2}
    assert second["refit"] is None
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    changed = any(not torch.equal(value, plain["state"][name]) for name, value in first["state"].items())
    assert changed is (not first["refit"]["reverted"])


def test_two_processes_end_with_the_refinement_of_the_first(tmp_path):
    run_script("ddp_refine.py", tmp_path, processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    report = first["report"]
    assert report["blocks"] == 2
    assert report["loss"]["after"] < report["loss"]["before"] - 0.05  # no close call
    assert second["report"] is None
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    assert any(not torch.equal(value, first["before"][name]) for name, value in first["state"].items())


def test_the_second_stage_of_the_first_process_is_that_of_both(tmp_path):
    run_script("ddp_stages.py", tmp_path, processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for stages in (1, 2):
        state = second[stages]["state"]
        assert all(torch.equal(value, state[name]) for name, value in first[stages]["state"].items())
    # 16 sequences of 16 tokens in both processes, and again the half that the first one has kept.
    assert set(first[1]["tokens"]) == {256}
    assert set(first[2]["tokens"]) == set(second[2]["tokens"]) == {256 + 128}


def test_two_processes_observe_what_one_does(tmp_path):
    run_script("ddp_monitor.py", 1, "one", tmp_path)
    run_script("ddp_monitor.py", 2, "two", tmp_path, processes=2)
    one, first, second = (RhoHistory.from_csv(tmp_path / f"{name}.csv") for name in ("one-0", "two-0", "two-1"))
    assert one.steps == first.steps == [0, 2, 4]
    assert list(first) == list(second)
    for expected, found in zip(one.at(0).values(), first.at(0).values(), strict=True):
        # The last token of a text has no gradient, and the queries of the first have none either.
        assert found["tokens"] == expected["tokens"] == 8 * (22 if "q_proj" in found["layer"] else 23)
        for column in ("rho", "null", "debiased", "low", "high", "iid_floor"):
            assert found[column] == pytest.approx(expected[column], abs=1e-5)
    # Later steps differ by the rounding of the optimizer.
    for expected, found in zip(one, first, strict=True):
        assert found["rho"] == pytest.approx(expected["rho"], abs=0.05)


def dense_weights(state: dict) -> dict[str, torch.Tensor]:
    """W' of every pivoted layer, rebuilt from the saved tensors."""
    weights = {}
    for key in state:
        if not key.endswith(".permutation"):
            continue
        name = key.removesuffix(".permutation")
        basis, T = state[f"{name}.basis.weight"], state[f"{name}.coefficients.weight"]
        order = state[key].long()
        if basis.shape[0] == T.shape[1]:  # rows kept
            weights[name] = torch.cat([basis, T @ basis])[order]
        else:
            columns = torch.cat([basis, basis @ T], 1)
            weights[name] = columns[:, order.argsort()]
    return weights


def test_two_processes_reduce_every_statistic_to_what_one_gathers(tmp_path):
    import ddp_moments

    run_script("ddp_moments.py", tmp_path, processes=2)
    one = ddp_moments.gather(range(4))
    for found in (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)):
        for name in ddp_moments.SHAPES:
            for field, expected in vars(one.layer(name)).items():
                torch.testing.assert_close(found[name][field], expected)
    for seeds, layers in (json.loads((tmp_path / f"{rank}.refused.json").read_text()) for rank in range(2)):
        assert "same sketches (sizes, kinds, seeds) on every process" in seeds
        assert "seed=1" in seeds
        assert layers.startswith("Expected the same layers on every process")
        assert "process 0 has (3, 4) and process 1 (3, 5) of 'q'" in layers
    sketched = [stream.sums for stream in ddp_moments.streams(ddp_moments.gather(range(4), sketched=True))]
    for found in (torch.load(tmp_path / f"{rank}.sketched.pt", weights_only=True) for rank in range(2)):
        torch.testing.assert_close(found, sketched)
