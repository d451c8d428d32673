"""The eigenproblem that the FASC paper prints, for comparison only: it does not minimise the paper's objective."""

from __future__ import annotations

import torch
from torch import Tensor

from fasc_lightning.layer_moments import LayerMoments
from fasc_lightning.solvers._linalg import descending_eigh, shrink, square_root, tail_sums
from fasc_lightning.solvers._registry import register_solver
from fasc_lightning.solvers._types import Factorization
from fasc_lightning.solvers.fasc import SHRINK_A


def eq6_eigenvectors(W: Tensor, moments: LayerMoments, shrink_A: float = SHRINK_A) -> tuple[Tensor, Tensor]:
    """Solve Sigma_xg Sigma_gg Sigma_xg^T v = lambda Sigma_xx v (Shihab et al., FASC, section 2.2 and Eq. 6).

    With g = W^T h: Sigma_xg = C W, Sigma_gg = W^T G W, Sigma_xx = A, uncentred as their estimates are printed; A is
    shrunk ("full-rank or regularized"). With A = L L^T, v = L^-T u and u the eigenvectors of F F^T, F = L^-1 Sigma_xg
    W^T R with R R^T = G. Sketched moments become matrices.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; A, G and ``C`` are used.
        shrink_A: Relative shrinkage of A.

    Returns:
        Eigenvalues in descending order, shape (n,), and eigenvectors in columns with v^T A v = 1, shape (n, n).
    """
    W = W.double()
    root_A = square_root(shrink(moments.A.double(), shrink_A))
    root_G = square_root(moments.G.double())
    F = root_A.solve(moments.require("C").double() @ W @ (W.T @ root_G.L))
    eigenvalues, U = descending_eigh(F @ F.T)
    return eigenvalues, root_A.solve_transposed(U)


@register_solver("fasc-eq6", needs=["C"])
def fasc_eq6(W: Tensor, moments: LayerMoments) -> Factorization:
    """For comparison only: project the inputs onto the span of the printed eigenvectors, W' = W Q_k Q_k^T.

    The eigenvectors of Eq. 6 are orthogonal in the metric of A, so the printed P = sum v v^T is no projector
    (:func:`fasc_eq6_literal`); here P = Q_k Q_k^T with Q_k an orthonormal basis of the first k. That is the kindest
    reading, and still not a minimiser of Eq. 1: Sigma_xg is the mean weight gradient times W, which vanishes where a
    training converges, whatever the directions are worth. ``fasc`` minimises Eq. 1.

    The losses are sums of the eigenvalues beyond k: a fourth power of gradients, no loss, and not comparable between
    layers.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; A, G and ``C`` are used.
    """
    r = min(W.shape)
    eigenvalues, V = eq6_eigenvectors(W, moments)
    Q = torch.linalg.qr(V[:, :r])[0]  # the first k columns of Q span the first k of V, for every k
    return Factorization(W.double() @ Q, Q.T.contiguous(), tail_sums(eigenvalues)[: r + 1])


@register_solver("fasc-eq6-literal", needs=["C"])
def fasc_eq6_literal(W: Tensor, moments: LayerMoments) -> Factorization:
    """For comparison only: W' = W P with P = sum v v^T to the letter, v as generalised eigensolvers return them.

    Then v^T A v = 1, so that P has the unit of 1 / x^2 and is no projector: even at full rank it is A^-1 and not the
    identity, and W' is not W. Losses as for :func:`fasc_eq6`; they do not see this.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; A, G and ``C`` are used.
    """
    r = min(W.shape)
    eigenvalues, V = eq6_eigenvectors(W, moments)
    V = V[:, :r]
    return Factorization(W.double() @ V, V.T.contiguous(), tail_sums(eigenvalues)[: r + 1])
