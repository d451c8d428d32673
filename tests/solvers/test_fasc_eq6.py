from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from layer_moments import full_moments, random_moments

from fasc_lightning.compression import fisher_losses, fisher_metric
from fasc_lightning.solvers import fasc, fasc_eq6, fasc_eq6_centred, fasc_eq6_literal, shrink
from fasc_lightning.solvers._fasc_eq6 import eq6_eigenvectors


def printed_problem(x, h, W):
    """Both sides of Eq. 6 from the tokens, as the paper estimates them, and scipy's solution in descending order."""
    x, g = x.numpy(), (h @ W).numpy()
    xx, xg, gg = x.T @ x / len(x), x.T @ g / len(x), g.T @ g / len(x)
    M, xx = xg @ gg @ xg.T, shrink(torch.from_numpy(xx), 1e-4).numpy()
    eigenvalues, V = scipy.linalg.eigh((M + M.T) / 2, xx)
    return eigenvalues[::-1], V[:, ::-1], M, xx


@pytest.fixture(params=[(5, 8), (8, 5), (6, 6)])
def case(request):
    m, n = request.param
    x, h, W = (torch.randn(*shape, dtype=torch.float64) for shape in ((80, n), (80, m), (m, n)))
    h = h + x @ torch.randn(n, m, dtype=torch.float64)
    return x, h, W, full_moments(x, h, W)


def test_eigenvectors_solve_the_printed_problem(case):
    x, h, W, moments = case
    eigenvalues, V = (value.numpy() for value in eq6_eigenvectors(W, moments))
    expected, _, M, xx = printed_problem(x, h, W)
    np.testing.assert_allclose(eigenvalues, expected.clip(min=0), atol=1e-8 * expected[0])
    np.testing.assert_allclose(V.T @ xx @ V, np.eye(len(xx)), atol=1e-9)
    np.testing.assert_allclose(M @ V, xx @ V * eigenvalues, atol=1e-7 * abs(M).max())


def test_the_centred_reading_projects_on_the_printed_eigenvectors(case):
    x, h, W, _ = case
    x, h = x + 1.5, h - 0.5  # the means are far from zero
    moments = full_moments(x, h, W)
    g = h @ W
    xx = np.cov(x.numpy().T, bias=True) + 1e-8 * np.eye(x.shape[1])
    xg = (x - x.mean(0)).T.numpy() @ (g - g.mean(0)).numpy() / len(x)
    M = xg @ np.cov(g.numpy().T, bias=True) @ xg.T
    V = scipy.linalg.eigh((M + M.T) / 2, xx)[1][:, ::-1]
    found, uncentred = fasc_eq6_centred(W, moments), fasc_eq6(W, moments)
    for k in range(1, min(W.shape)):
        Q = scipy.linalg.orth(V[:, :k])
        B, C = found.truncate(k)
        np.testing.assert_allclose((B @ C).numpy(), W.numpy() @ Q @ Q.T, atol=1e-6)
    assert not torch.allclose(uncentred.left[:, :1] @ uncentred.right[:1], found.left[:, :1] @ found.right[:1])


def test_literal_and_orthonormalised_projections(case):
    x, h, W, moments = case
    eigenvalues, V, _, _ = printed_problem(x, h, W)
    literal, orthonormal = fasc_eq6_literal(W, moments), fasc_eq6(W, moments)
    for k in range(1, min(W.shape)):
        P = V[:, :k] @ V[:, :k].T
        B, C = literal.truncate(k)
        np.testing.assert_allclose((B @ C).numpy(), W.numpy() @ P, atol=1e-6 * abs(W.numpy() @ P).max())
        Q = scipy.linalg.orth(V[:, :k])
        B, C = orthonormal.truncate(k)
        np.testing.assert_allclose((B @ C).numpy(), W.numpy() @ Q @ Q.T, atol=1e-6)
        for found in (literal, orthonormal):
            assert found.losses[k].item() == pytest.approx(eigenvalues[k:].clip(min=0).sum(), rel=1e-6, abs=1e-9)


def test_the_literal_p_is_no_projector_and_does_not_give_the_weight_back():
    W = torch.randn(9, 5, dtype=torch.float64)
    moments = random_moments(9, 5, W=W)
    found = fasc_eq6_literal(W, moments)
    inverse = torch.linalg.inv(shrink(moments.A, 1e-4))
    torch.testing.assert_close(found.left @ found.right, W @ inverse)


def test_it_does_not_minimise_eq_1():
    """What fasc-lightning calls fasc does, in the metric of both."""
    W = torch.randn(6, 8, dtype=torch.float64)
    moments = random_moments(6, 8, W=W)
    metric = fisher_metric(moments)
    least = fasc(W, moments).losses
    for printed in (fasc_eq6, fasc_eq6_literal):
        assert (fisher_losses(W, *metric, printed(W, moments))[1:6] > 1.2 * least[1:6]).all()
