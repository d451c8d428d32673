from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from layer_moments import random_moments
from torch import nn

from fasc_lightning.batches import TokenRows
from fasc_lightning.compression import fisher_losses, fisher_metric
from fasc_lightning.solvers import available_methods, fasc, get_solver
from fasc_lightning.solvers._types import Factorization
from fasc_lightning.studies.rho import HeldoutLosses


def by_brute_force(W, A, G, left, right):
    """tr(G D A D^T) in numpy, a rank at a time."""
    losses = []
    for k in range(left.shape[1] + 1):
        D = W.double().numpy() - left[:, :k].double().numpy() @ right[:k].double().numpy()
        losses.append(np.trace(G.double().numpy() @ D @ A.double().numpy() @ D.T))
    return np.array(losses)


@pytest.mark.parametrize(("m", "n"), [(5, 8), (8, 5), (6, 6), (1, 4), (4, 1)])
@pytest.mark.parametrize("method", available_methods())
def test_losses_of_every_solver_are_the_objective_by_brute_force(m, n, method):
    W, moments = torch.randn(m, n), random_moments(m, n)
    A, G = fisher_metric(moments)
    found = get_solver(method)(W, moments)
    losses = fisher_losses(W, A, G, found)
    assert losses.dtype == torch.float64
    expected = by_brute_force(W, A, G, found.left, found.right)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-9, atol=1e-12 * expected[0])


def test_losses_of_arbitrary_factors_are_the_objective_by_brute_force():
    """Not a solver's: correlated columns, not the best ones, fewer than full rank."""
    W, moments = torch.randn(7, 9), random_moments(7, 9)
    left, right = torch.randn(7, 4), torch.randn(4, 9)
    losses = fisher_losses(W, moments.A, moments.G, Factorization(left, right, torch.empty(0)))
    np.testing.assert_allclose(losses.numpy(), by_brute_force(W, moments.A, moments.G, left, right), rtol=1e-9)


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6)])
def test_they_agree_with_the_losses_of_fasc_down_to_the_smallest(m, n):
    W, moments = torch.randn(m, n, dtype=torch.float64), random_moments(m, n)
    found = fasc(W, moments)
    losses = fisher_losses(W, *fisher_metric(moments), found)
    r = min(m, n)
    torch.testing.assert_close(losses[:r], found.losses[:r], rtol=1e-7, atol=0)
    assert losses[r] <= 1e-12 * losses[0]
    assert (losses >= 0).all()


def test_no_other_solver_is_below_fasc_at_any_rank():
    W, moments = torch.randn(8, 10), random_moments(8, 10)
    A, G = fisher_metric(moments)
    least = fisher_losses(W, A, G, fasc(W, moments))
    for method in available_methods():
        losses = fisher_losses(W, A, G, get_solver(method)(W, moments))
        assert (losses >= least * (1 - 1e-9) - 1e-12 * least[0]).all()


def test_heldout_losses_are_the_fourth_moment_over_all_batches():
    W, candidates = torch.randn(4, 6), {"a": torch.randn(4, 6), "b": torch.zeros(4, 6)}
    losses = HeldoutLosses({"up": W, "other": torch.randn(2, 2)}, {"up": candidates})
    squares: dict[str, list[float]] = {"a": [], "b": []}
    for scale in (1.0, 20.0):
        x, h = torch.randn(30, 6), torch.randn(30, 4) / scale
        losses("up", x, h, TokenRows(scale=scale))
        for label, approximation in candidates.items():
            D = (W - approximation).double().numpy()
            squares[label] += [
                (scale * hi @ D @ xi) ** 2 for xi, hi in zip(x.double().numpy(), h.double().numpy(), strict=True)
            ]
    losses("other", torch.randn(5, 2), torch.randn(5, 2), TokenRows())
    assert losses.tokens == {"up": 60}
    assert losses.losses("up") == pytest.approx({label: np.mean(values) for label, values in squares.items()}, rel=1e-5)


def test_heldout_losses_approach_the_prediction_where_x_and_h_are_independent():
    n, m, tokens = 5, 4, 40_000
    mix_x, mix_h = torch.randn(n, n), torch.randn(m, m)
    x, h = torch.randn(tokens, n) @ mix_x, torch.randn(tokens, m) @ mix_h
    W, approximation = torch.randn(m, n), torch.randn(m, n)
    losses = HeldoutLosses({"up": W}, {"up": {"a": approximation}})
    losses("up", x, h, TokenRows())
    D = W - approximation
    predicted = torch.trace(mix_h.T @ mix_h @ D @ mix_x.T @ mix_x @ D.T).item()
    assert losses.losses("up")["a"] == pytest.approx(predicted, rel=0.1)


def test_heldout_losses_see_the_dependence_that_the_prediction_does_not():
    """h falls only on tokens whose x the approximation keeps: nothing is lost, whatever the moments say."""
    x = torch.eye(2).repeat(10, 1)
    h = x[:, :1]
    W, approximation = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    losses = HeldoutLosses({"up": W}, {"up": {"a": approximation}})
    losses("up", x, h, TokenRows())
    assert losses.losses("up")["a"] == 0
    D, A, G = W - approximation, x.T @ x / 20, h.T @ h / 20
    assert torch.trace(G @ D @ A @ D.T) > 0.2


def test_half_precision_rows_are_computed_in_float32():
    W, approximation = torch.randn(3, 4), torch.randn(3, 4)
    x, h = torch.randn(8, 4).bfloat16(), (1e-6 * torch.randn(8, 3)).bfloat16()
    losses = HeldoutLosses({"up": nn.Parameter(W)}, {"up": {"a": approximation}})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses("up", x, h, TokenRows(scale=1e6))
    D = (W - approximation).double()
    expected = ((1e6 * h.double() * (x.double() @ D.T)).sum(1) ** 2).mean().item()
    assert losses.losses("up")["a"] == pytest.approx(expected, rel=1e-5)


def test_a_layer_without_tokens_has_no_loss():
    losses = HeldoutLosses({"up": torch.eye(2)}, {"up": {"a": torch.eye(2)}})
    assert math.isnan(losses.losses("up")["a"])


def test_candidates_must_fit_their_weights():
    with pytest.raises(ValueError, match=r"layer 'up' of the shape of W, \(2, 3\)"):
        HeldoutLosses({"up": torch.zeros(2, 3)}, {"up": {"a": torch.zeros(3, 2)}})
    with pytest.raises(ValueError, match="layer 'down' of the shape of W, None"):
        HeldoutLosses({"up": torch.zeros(2, 3)}, {"down": {"a": torch.zeros(2, 3)}})
