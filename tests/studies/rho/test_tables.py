from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fasc_lightning._utils import correlate
from fasc_lightning.dependence import RhoRow
from fasc_lightning.studies.rho import (
    Observation,
    angles_table,
    correlations_table,
    divisions,
    gains_table,
    layer_row,
    median,
    profile_table,
    size_correlations,
    sizes_table,
)


def observation(layer: str, debiased: float, rho: float = 0.4, pooled: float = 0.3, half: float = 0.1) -> Observation:
    row = RhoRow(
        step=0, layer=layer, rho=rho, null=0.35, debiased=debiased, low=debiased - half, high=debiased + half,
        iid_floor=0.1, tokens=64, reason="",
    )  # fmt: skip
    return Observation(row, pooled)


def rows():
    gains = {"a.up": 1.0, "b.up": 2.0, "a.down": -1.0, "b.down": math.nan}
    flags = {"b.down": ("early attention", "last projection")}
    return [
        layer_row(
            observation(name, debiased=gain / 10, rho=gain / 4),
            (6, 8),
            3,
            flags.get(name, ()),
            {"heldout_gain": gain, "predicted_gain": abs(gain)},
        )
        for name, gain in gains.items()
    ]


def test_a_layers_row_is_flat_and_says_what_was_not_measured():
    row = rows()[3]
    assert (row["kind"], row["layer"], row["m"], row["n"], row["rank"]) == ("down", "b.down", 6, 8, 3)
    assert row["flags"] == "early attention; last projection"
    assert math.isnan(row["median_angle"])
    assert "step" not in row


def test_the_profile_is_by_kind():
    up, down = profile_table(rows())
    assert (up["kind"], up["layers"], up["undefined"], up["flagged"]) == ("up", 2, 0, 0)
    assert up["rho (median)"] == pytest.approx(0.375)
    assert up["rho above null"] == 1  # 0.25 and 0.5 against 0.35
    assert (down["rho above null"], down["undefined"], down["flagged"]) == (0, 1, 1)
    assert down["debiased (median)"] == pytest.approx(-0.1)


def test_gains_are_by_kind_and_count_the_layers_that_fasc_serves_better():
    up, down = gains_table(rows())
    assert up["gain on held-out windows (median)"] == pytest.approx(1.5)
    assert (up["fasc better, held out"], down["fasc better, held out"]) == (2, 0)
    assert down["gain predicted (median)"] == pytest.approx(1.0)


def test_correlations_leave_out_what_is_undefined_or_flagged():
    table = correlations_table(rows())
    assert len(table) == 2 * 2 * 3
    first = table[0]
    assert (first["gain"], first["layers"], first["score"]) == ("on held-out windows", "all", "rho, minibatches")
    assert first["count"] == 3
    assert first["Pearson r"] == pytest.approx(1.0)
    constant = next(row for row in table if row["score"].startswith("rho, pooled"))
    assert math.isnan(constant["Pearson r"])


def test_sizes_are_summed_up_over_layers_and_correlated():
    rng = np.random.default_rng(0)
    truth = rng.uniform(size=9)
    observed = {
        size: {
            f"l{i}": observation(f"l{i}", t + rng.normal() / size, pooled=t, half=1 / size) for i, t in enumerate(truth)
        }
        for size in (10, 1000)
    }
    table = sizes_table(observed)
    assert [row["tokens"] for row in table] == [10, 1000]
    assert [row["width of the 95 % interval (median)"] for row in table] == pytest.approx([0.2, 0.002])
    assert table[0]["pooled (median)"] == pytest.approx(np.median(truth))
    found = {(row["score"], row["tokens"]): row["r with 1,000"] for row in size_correlations(observed)}
    debiased = [[o.row["debiased"] for o in layers.values()] for layers in observed.values()]
    assert found["debiased rho", 10] == pytest.approx(np.corrcoef(debiased)[0, 1])
    assert found["debiased rho", 1000] == pytest.approx(1)
    assert found["rho, pooled (Eq. 2)", 10] == pytest.approx(1)
    assert math.isnan(found["rho, minibatches", 10])  # constant


def test_layers_are_divided_by_fifths_and_by_a_threshold():
    scores = {f"l{i}": i / 10 for i in range(10)} | {"undefined": math.nan}
    divided = divisions(scores, 0.35)
    assert divided["fifths"] == (["l8", "l9"], ["l0", "l1"])
    assert divided["threshold"] == (["l4", "l5", "l6", "l7", "l8", "l9"], ["l0", "l1", "l2", "l3"])


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_threshold_with_all_layers_on_one_side_divides_nothing(threshold):
    assert list(divisions({"a": 0.1, "b": 0.2}, threshold)) == ["fifths"]


def test_angles_are_pooled_over_a_groups_layers():
    angles = {"a": torch.tensor([0.0, 10.0, 20.0]), "b": torch.tensor([40.0, 50.0, 60.0]), "c": torch.tensor([5.0])}
    spaces = {"a": (100, 50), "b": (100, 50), "c": (100, 1)}
    high, low = angles_table({"fifths": (["a", "b"], ["c"])}, angles, spaces)
    assert (high["division"], high["debiased rho"], high["layers"], high["median"]) == ("fifths", "high", 2, 30.0)
    assert high["median of random subspaces"] == pytest.approx(45, abs=3)
    assert low["median of random subspaces"] > 60  # two lines in 100 dimensions are nearly orthogonal
    (empty, _) = angles_table({"fifths": ([], [])}, {}, {})
    assert math.isnan(empty["median"])


def test_correlations_agree_with_numpy_and_with_ranks():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=30), rng.normal(size=30)
    found = correlate([*x, math.nan, 1.0, math.inf], [*y, 1.0, math.nan, 1.0])
    assert found.pairs == 30
    assert found.r == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found.rank_r == pytest.approx(np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1])
    # By permutation: as often as the p-value says, unrelated pairs correlate as strongly.
    permuted = [abs(np.corrcoef(x, rng.permutation(y))[0, 1]) >= abs(found.r) for _ in range(2000)]
    assert found.p == pytest.approx(np.mean(permuted), abs=0.04)


@pytest.mark.parametrize(("x", "y"), [([1.0, 2.0], [1.0, 2.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([], [])])
def test_too_little_to_correlate(x, y):
    assert math.isnan(correlate(x, y).r)
    assert correlate(x, y).pairs == len(x)


def test_medians_are_of_what_is_defined():
    assert median([3.0, math.nan, 1.0]) == 2.0
    assert math.isnan(median([math.nan]))
