from __future__ import annotations

import math

import numpy as np
import pytest
import rho_levels
import torch


@pytest.mark.parametrize("truth", [0.1, 0.3, 0.6])
def test_series_have_the_rho_that_they_are_made_with(truth):
    generator = torch.Generator().manual_seed(0)
    mix = rho_levels.coupling(truth, generator).numpy()
    x, noise = (rho_levels.series(400, 100, generator).flatten(0, 1).numpy() for _ in range(2))
    covariance = np.cov(x.T, (x @ mix + noise).T)
    xx, xg, gg = covariance[:8, :8], covariance[:8, 8:], covariance[8:, 8:]
    norm = np.linalg.norm
    assert norm(xg) / math.sqrt(norm(xx) * norm(gg)) == pytest.approx(truth, abs=0.02)
    assert (x[:-1] * x[1:]).mean() == pytest.approx(0.9 * 0.99, abs=0.02)  # but from one text to the next


def test_levels_and_coverage_leave_undefined_values_out():
    row = {"rho": 0.5, "null": 0.4, "debiased": 0.3, "low": 0.2, "high": 0.4}
    rows = [
        row,
        {**row, "null": 0.6, "debiased": -0.1},
        {**row, **dict.fromkeys(["null", "debiased", "low", "high"], math.nan)},
    ]
    found = rho_levels.levels(rows)
    assert found["above the null"] == 0.5
    assert found["null defined"] == pytest.approx(2 / 3)
    assert found["root of the mean debiased square"] == pytest.approx(math.sqrt((0.09 - 0.01) / 2))
    covered = rho_levels.coverage([*rows, {**row, "high": 0.25}], 0.3)
    assert (covered["interval defined"], covered["covers 0.3"]) == (0.75, pytest.approx(2 / 3))


def test_the_table_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rho_levels, "SHAPES", ((1, 1), (8, 1)))
    one, eight = rho_levels.main(["--repeats", "3", "--length", "30", "--output", str(tmp_path)])
    assert (one["null defined"], eight["null defined"], eight["interval defined"]) == (0, 1, 1)
    assert len((tmp_path / "rho_levels.csv").read_text().splitlines()) == 3
    assert "above the null" in capsys.readouterr().out
