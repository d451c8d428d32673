"""weight-svd, asvd, fisher-diag and fwsvd: an SVD of the weight with its rows and columns scaled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layer_moments import random_moments

from fasc_lightning.solvers import asvd, get_solver, two_sided


def scales(method, moments, n):
    """What rows and columns are multiplied by before the SVD, as the papers have it; and the unit of the losses."""
    ones = np.ones(1)
    return {
        "weight-svd": (ones, ones, 1.0),
        "asvd": (ones, moments.abs_x.numpy() ** 0.5, 1.0),
        "fisher-diag": (moments.G.diagonal().numpy() ** 0.5, moments.A.diagonal().numpy() ** 0.5, 1.0),
        "fwsvd": (moments.fisher_rows.numpy() ** 0.5, ones, 1 / n),
    }[method]


def scaled_svd(W, rows, columns, rank):
    """Scale, cut the SVD, undo the scales."""
    U, s, Vt = np.linalg.svd(rows[:, None] * W * columns, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vt[:rank] / rows[:, None] / columns


@pytest.mark.parametrize(("m", "n"), [(5, 8), (8, 5), (6, 6), (1, 4), (4, 1)])
@pytest.mark.parametrize("method", ["weight-svd", "asvd", "fisher-diag", "fwsvd"])
def test_every_rank_is_that_of_the_scaled_svd(method, m, n):
    W = torch.randn(m, n, dtype=torch.float64)
    moments = random_moments(m, n, W=W)
    rows, columns, unit = scales(method, moments, n)
    found = get_solver(method)(W, moments)
    for k in range(min(m, n) + 1):
        B, C = found.truncate(k)
        expected = scaled_svd(W.numpy(), rows, columns, k)
        np.testing.assert_allclose((B @ C).numpy(), expected, rtol=1e-6, atol=1e-8)
        left = unit * ((rows[:, None] * (W.numpy() - expected) * columns) ** 2).sum()
        assert found.losses[k].item() == pytest.approx(left, rel=1e-7, abs=1e-9)


def test_an_exponent_of_zero_makes_asvd_the_svd_of_the_weight():
    W = torch.randn(5, 6, dtype=torch.float64)
    moments = random_moments(5, 6, W=W)
    B, C = asvd(W, moments, alpha=0.0).truncate(2)
    np.testing.assert_allclose((B @ C).numpy(), scaled_svd(W.numpy(), np.ones(1), np.ones(1), 2), atol=1e-9)


def test_fisher_diag_is_fasc_where_moments_are_diagonal():
    W = torch.randn(5, 6, dtype=torch.float64)
    x, h = torch.eye(6, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    moments = random_moments(5, 6, W=W)
    diagonal = type(moments)(x * torch.rand(6), h * torch.rand(5), moments.mean_x, moments.mean_h, 1)
    expected = two_sided(W, diagonal.A, diagonal.G)
    torch.testing.assert_close(get_solver("fisher-diag")(W, diagonal).losses, expected.losses)
