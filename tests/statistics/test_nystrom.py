from __future__ import annotations

import pytest
import torch

from fasc_lightning.solvers import two_sided
from fasc_lightning.statistics import Sketch
from fasc_lightning.statistics._nystrom import completed
from fasc_lightning.statistics._sketch import apply_transposed, nystrom


def decaying(d, tokens, seed=0):
    """Rows whose second moment has a spectrum that falls, with features of different scales."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, d, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    return X * torch.arange(1, d + 1) ** -0.5 @ Q * torch.logspace(-1, 1, d, dtype=torch.float64)


def omega_of(d, s):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(d, s, generator=generator, dtype=torch.float64)


def nystrom_of(A, omega):
    Y = A @ omega
    core = torch.linalg.cholesky(omega.T @ Y)
    return torch.linalg.solve_triangular(core, Y.T, upper=False).T


@pytest.fixture
def moment():
    A = (lambda X: X.T @ X / len(X))(decaying(60, 900))
    omega = omega_of(60, 20)
    F = nystrom_of(A, omega)
    return A, omega, F, completed(F, omega, A.diagonal())


def test_it_is_the_matrix_that_the_formula_says(moment):
    *_, found = moment
    Q, T = found.basis, found.scale.diag()
    P = torch.eye(60, dtype=torch.float64) - Q @ Q.T
    expected = found.factor @ found.factor.T + T @ P @ found.weights.diag() @ P @ T
    torch.testing.assert_close(found.dense(), expected)
    torch.testing.assert_close(found.diagonal(), expected.diagonal())
    W = torch.randn(7, 60, dtype=torch.float64)
    for S in (found, found.shrunk(0.2), found.shrunk(0.2).shrunk(0.1)):
        torch.testing.assert_close(S.congruence(W), W @ S.dense() @ W.T)
    shrunk = 0.8 * expected + 0.2 * expected.diagonal().mean() * torch.eye(60)
    torch.testing.assert_close(found.shrunk(0.2).dense(), shrunk)


def test_its_diagonal_is_exact_and_it_is_positive(moment):
    A, *_, found = moment
    torch.testing.assert_close(found.diagonal(), A.diagonal())
    assert torch.linalg.eigvalsh(found.dense())[0] > -1e-12 * A.norm()


def test_it_agrees_with_what_was_seen_and_is_nearer_than_with_a_diagonal_alone(moment):
    A, omega, F, found = moment
    alone = F @ F.T + (A.diagonal() - F.square().sum(1)).diag()
    scale = A.diagonal().rsqrt()

    def off(S, X=None):
        difference = scale[:, None] * (S - A) * scale
        return (difference if X is None else difference @ (X / scale[:, None])).norm()

    assert off(found.dense(), omega) < 0.25 * off(alone, omega)
    assert off(found.dense()) < 0.95 * off(alone)


def test_factors_from_it_lose_less_than_with_a_diagonal_alone():
    A = (lambda X: X.T @ X / len(X))(decaying(96, 2000))
    W, G = torch.randn(24, 96, dtype=torch.float64), torch.eye(24, dtype=torch.float64)
    omega = omega_of(96, 32)
    F = nystrom_of(A, omega)
    best = two_sided(W, A, G).losses
    excess = []
    for S in (completed(F, omega, A.diagonal()), F @ F.T + (A.diagonal() - F.square().sum(1)).diag()):
        B, C = two_sided(W, S, G).truncate(10)
        D = W - B @ C
        excess.append(float((D @ A * D).sum() / best[10] - 1))
    assert 0 <= excess[0] < 0.8 * excess[1]


def test_features_that_were_never_seen_and_moments_that_are_known_whole_are_no_trouble():
    A = (lambda X: X.T @ X / len(X))(decaying(12, 4))  # of rank 4
    A[3] = A[:, 3] = 0
    sketch = Sketch(12, 8, 1)
    F = nystrom(A @ dense(sketch), A.diagonal(), sketch.seed)
    found = completed(F, dense(sketch), A.diagonal())
    assert torch.isfinite(found.dense()).all()
    torch.testing.assert_close(found.dense(), A, rtol=1e-4, atol=1e-6 * float(A.norm()))
    assert found.diagonal()[3] == 0


def dense(sketch):
    """Omega as a matrix."""
    return apply_transposed(torch.eye(sketch.features, dtype=torch.float64), sketch.size, sketch.seed).T
