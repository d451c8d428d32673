from __future__ import annotations

import pytest
import torch
from layer_moments import random_moments

from fasc_lightning.layers import Grid
from fasc_lightning.rounding import to_nearest
from fasc_lightning.solvers import leading, two_sided


def objective(D, A, G):
    return torch.trace(G @ D @ A @ D.T).item()


def problem(m, n):
    """The error of a rounded matrix, whose spectrum is flat, and moments whose spectra are not."""
    W = torch.randn(m, n)
    moments = random_moments(m, n)
    scales = [torch.logspace(0, -2, d, dtype=torch.float64) for d in (n, m)]
    A, G = (S * scale[:, None] * scale for S, scale in zip((moments.A, moments.G), scales, strict=True))
    return (W - to_nearest(W, Grid(3)).dequantize()).double(), A, G


@pytest.mark.parametrize(("m", "n"), [(160, 240), (240, 160), (200, 200)])
def test_losses_are_those_of_the_factors_and_near_the_least(m, n):
    error, A, G = problem(m, n)
    found, best = leading(error, A, G, 32, objective(error, A, G)), two_sided(error, A, G)
    assert found.left.shape == (m, 32)
    assert found.right.shape == (32, n)
    assert len(found.losses) == 33
    for k in (0, 1, 8, 32):
        B, C = found.truncate(k)
        assert objective(error - B @ C, A, G) == pytest.approx(found.losses[k].item(), rel=1e-9)
        saved, most = (losses[0] - losses[k] for losses in (found.losses, best.losses))
        assert 0.99 * most <= saved <= (1 + 1e-9) * most + 1e-12


def test_the_hardest_spectrum_is_one_without_any_decay():
    error = torch.randn(200, 300, dtype=torch.float64)
    A, G = torch.eye(300, dtype=torch.float64), torch.eye(200, dtype=torch.float64)
    found, best = leading(error, A, G, 16, objective(error, A, G)), two_sided(error, A, G)
    assert found.losses[0] - found.losses[16] >= 0.98 * (best.losses[0] - best.losses[16])


def test_it_draws_nothing_from_the_global_generator_and_repeats():
    error, A, G = problem(40, 30)
    state = torch.get_rng_state()
    first, second = (leading(error, A, G, 8, objective(error, A, G)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.left, second.left)
