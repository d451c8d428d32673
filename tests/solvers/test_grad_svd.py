from __future__ import annotations

import numpy as np
import pytest
import torch
from layer_moments import full_moments

from fasc_lightning.solvers import grad_svd


@pytest.mark.parametrize(("m", "n"), [(5, 8), (8, 5)])
def test_inputs_are_projected_onto_the_principal_axes_of_what_each_input_does_to_the_loss(m, n):
    W, x, h = (torch.randn(*shape, dtype=torch.float64) for shape in ((m, n), (60, n), (60, m)))
    effects = ((h @ W) * x).numpy()
    Vt = np.linalg.svd(effects)[2]
    found = grad_svd(W, full_moments(x, h, W))
    for k in range(min(m, n) + 1):
        B, C = found.truncate(k)
        P = Vt[:k].T @ Vt[:k]
        np.testing.assert_allclose((B @ C).numpy(), W.numpy() @ P, atol=1e-9)
        assert found.losses[k].item() == pytest.approx(((effects - effects @ P) ** 2).sum() / 60, rel=1e-8, abs=1e-9)


def test_inputs_that_do_nothing_to_the_loss_are_the_first_to_go():
    """The largest input meets no weight, so that no gradient reaches it."""
    x, h, W = torch.randn(50, 4), torch.randn(50, 4), torch.randn(4, 4)
    x[:, 2] *= 100
    W[:, 2] = 0
    found = grad_svd(W, full_moments(x, h, W))
    assert found.right[:3, 2].abs().max() < 1e-9
