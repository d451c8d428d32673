from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from layer_moments import full_moments, random_moments

from fasc_lightning.solvers import fasc_plain, gfwsvd


def exact_moments():
    """Single-token sequences whose Fisher is exactly a Kronecker product: every x with every h."""
    R, L = torch.randn(5, 5, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    W = torch.randn(4, 5, dtype=torch.float64)
    return full_moments(R.T.repeat(4, 1), L.T.repeat_interleave(5, 0), W, [1] * 20), W, R.T, L.T


def test_losses_are_the_squared_changes_of_the_loss_where_the_fisher_is_a_kronecker_product():
    moments, W, xs, hs = exact_moments()
    found = gfwsvd(W, moments, shrink_A=0.0, shrink_G=0.0)
    for k in range(5):
        B, C = found.truncate(k)
        changes = [(h @ (W - B @ C) @ x).item() ** 2 for x in xs for h in hs]
        assert found.losses[k].item() == pytest.approx(np.mean(changes), rel=1e-7, abs=1e-9)


def test_no_other_matrix_of_the_rank_changes_the_loss_less():
    moments, W, xs, hs = exact_moments()
    least = gfwsvd(W, moments, shrink_A=0.0, shrink_G=0.0).losses[2].item()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        B = torch.randn(4, 2, dtype=torch.float64, generator=generator).requires_grad_()
        C = torch.randn(2, 5, dtype=torch.float64, generator=generator).requires_grad_()
        optimizer = torch.optim.LBFGS([B, C], max_iter=300, line_search_fn="strong_wolfe")

        def loss(B=B, C=C):
            return ((hs @ (W - B @ C) @ xs.T) ** 2).mean()

        def closure(B=B, C=C, optimizer=optimizer, loss=loss):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)
        assert loss().item() >= least * (1 - 1e-9)


def test_its_factors_stand_where_those_of_fasc_do():
    W = torch.randn(4, 6, dtype=torch.float64)
    moments = random_moments(4, 6, W=W)
    swapped = dataclasses.replace(moments, A=moments.kronecker[0], G=moments.kronecker[1])
    assert torch.equal(gfwsvd(W, moments).losses, fasc_plain(W, swapped).losses)


def test_the_scale_of_a_factor_does_not_change_the_approximation():
    W = torch.randn(6, 4, dtype=torch.float64)
    moments = random_moments(6, 4, W=W)
    right, left = moments.kronecker
    B, C = gfwsvd(W, moments).truncate(2)
    B2, C2 = gfwsvd(W, dataclasses.replace(moments, kronecker=(1e6 * right, 1e-9 * left))).truncate(2)
    torch.testing.assert_close(B @ C, B2 @ C2)
