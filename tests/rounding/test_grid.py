"""Grids: their bytes, their scales and zero points, and the nearest numbers."""

from __future__ import annotations

import math

import pytest
import torch

from fasc_lightning.layers import INT8_ROWS, Grid
from fasc_lightning.rounding import fit_grid, to_nearest
from fasc_lightning.rounding._grid import SPANS

GRIDS = [
    Grid(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (8, 16, None) for symmetric in (False, True)
]


def matrix(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def groups(grid, n):
    size = n if grid.group is None else grid.group
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_bytes_are_those_of_words_of_codes_and_zero_points_and_of_scales(grid):
    m, n = 10, 44
    count = len(groups(grid, n))
    zeros = 0 if grid.symmetric else count * math.ceil(m * grid.bits / 32) * 4
    assert grid.groups(n) == count
    assert grid.nbytes(m, n) == m * math.ceil(n * grid.bits / 32) * 4 + 2 * m * count + zeros


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("n", [40, 44])
def test_scales_are_the_best_of_all_spans(grid, n):
    W, weights = matrix(3, n), matrix(1, n, 1)[0].abs() + 0.1
    scale, zero = fit_grid(W, grid, weights)
    assert torch.equal(scale, scale.bfloat16().float())
    for i in range(3):
        for g, columns in enumerate(groups(grid, n)):
            numbers = [float(W[i, j]) for j in columns]
            low, high = min(0.0, *numbers), max(0.0, *numbers)
            errors = []
            for span in SPANS:
                if grid.symmetric:
                    s, z = span * max(-low, high) / (grid.middle - 0.5), grid.middle
                    s = float(torch.tensor(s).bfloat16())
                else:
                    s = float(torch.tensor(span * (high - low) / (grid.levels - 1)).bfloat16())
                    z = min(max(round(-low * span / s), 0), grid.levels - 1)
                errors.append(sum(float(weights[j]) * nearest(float(W[i, j]), s, z, grid.levels) ** 2 for j in columns))
            found = sum(
                float(weights[j]) * nearest(float(W[i, j]), float(scale[i, g]), int(zero[i, g]), grid.levels) ** 2
                for j in columns
            )
            assert found == pytest.approx(min(errors), rel=1e-4, abs=1e-9)


def nearest(w, scale, zero, levels):
    """Return the distance of a number from the nearest of a grid."""
    return min(abs(w - scale * (code - zero)) for code in range(levels))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_number_is_the_nearest(grid):
    W = matrix(4, 24)
    rounded = to_nearest(W, grid)
    assert int(rounded.codes.max()) < grid.levels
    error = (W - rounded.dequantize()).abs()
    for i in range(4):
        for g, columns in enumerate(groups(grid, 24)):
            for j in columns:
                best = nearest(float(W[i, j]), float(rounded.scale[i, g]), int(rounded.zero[i, g]), grid.levels)
                assert float(error[i, j]) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_group_of_zeros_is_exact_and_has_a_scale(grid):
    W = matrix(2, 32)
    W[0] = 0
    rounded = to_nearest(W, grid)
    assert torch.equal(rounded.dequantize()[0], W[0])
    assert bool((rounded.scale > 0).all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(value):
    W = matrix(4, 16)
    W[2, 3] = value
    with pytest.raises(ValueError, match=r"Expected finite weights to round but a \(4, 16\) matrix"):
        fit_grid(W, Grid(4, 8))


def test_int8_rows_have_one_symmetric_scale_an_output():
    W = matrix(5, 40)
    rounded = to_nearest(W, INT8_ROWS)
    assert rounded.scale.shape == (5, 1)
    assert bool((rounded.zero == 128).all())
    assert bool(((W - rounded.dequantize()).abs().mean(1) < 0.3 * rounded.scale[:, 0]).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "`bits` to be one of 2, 3, 4, 8"),
        ({"bits": True}, "`bits`"),
        ({"bits": 4, "group": 12}, "positive multiple of 8"),
        ({"bits": 4, "group": 0}, "positive multiple of 8"),
    ],
)
def test_other_grids_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Grid(**options)
