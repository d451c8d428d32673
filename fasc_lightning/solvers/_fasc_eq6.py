"""The eigenproblem that the FASC paper prints, for comparison only: it does not minimise the paper's objective."""

from __future__ import annotations

import torch
from torch import Tensor

from fasc_lightning.solvers._fasc import SHRINK_A
from fasc_lightning.solvers._linalg import descending_eigh, shrink, square_root, tail_sums
from fasc_lightning.solvers._registry import register_solver
from fasc_lightning.solvers._types import Factorization
from fasc_lightning.statistics import LayerMoments

#: Constant that the paper adds to the diagonal of Sigma_xx.
PRINTED_EPSILON = 1e-8


def eq6_eigenvectors(W: Tensor, moments: LayerMoments, centred: bool = False) -> tuple[Tensor, Tensor]:
    """Solve Sigma_xg Sigma_gg Sigma_xg^T v = lambda Sigma_xx v (Shihab et al., FASC, section 2.2 and Eq. 6).

    With g = W^T h: Sigma_xg = C W, Sigma_gg = W^T G W, Sigma_xx = A. The uncentred reading shrinks A relatively
    ("full-rank or regularized"). The centred one subtracts the products of means from all three, and adds an absolute
    1e-8 to A's diagonal. With A = L L^T, v = L^-T u, where u are the eigenvectors of F F^T, F = L^-1 Sigma_xg W^T R and
    R R^T = G. Sketched moments become matrices.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; A, G, ``C`` and, centred, the means are used.
        centred: Whether to take the centred reading.

    Returns:
        Eigenvalues in descending order, shape (n,), and eigenvectors in columns with v^T A v = 1, shape (n, n).
    """
    W, A, G, C = W.double(), moments.A.double(), moments.G.double(), moments.require("C").double()
    if centred:
        x, h = moments.mean_x.double(), moments.mean_h.double()
        A, G, C = A - torch.outer(x, x), G - torch.outer(h, h), C - torch.outer(x, h)
        A.diagonal().add_(PRINTED_EPSILON)
    else:
        A = shrink(A, SHRINK_A)
    root_A, root_G = square_root(A), square_root(G)
    F = root_A.solve(C @ W @ (W.T @ root_G.L))
    eigenvalues, U = descending_eigh(F @ F.T)
    return eigenvalues, root_A.solve_transposed(U)


@register_solver("fasc-eq6", needs=["C"])
def fasc_eq6(W: Tensor, moments: LayerMoments) -> Factorization:
    """For comparison only: project the inputs onto the span of the printed eigenvectors, W' = W Q_k Q_k^T.

    The eigenvectors of Eq. 6 are orthogonal in the metric of A, so the printed P = sum v v^T is no projector
    (:func:`fasc_eq6_literal`). Here P = Q_k Q_k^T, where Q_k is an orthonormal basis of the first k. This is the
    kindest reading. It still does not minimise Eq. 1: Sigma_xg is the mean weight gradient times W, which vanishes
    where a training converges, however much the directions matter. ``fasc`` minimises Eq. 1.

    The losses are sums of the eigenvalues beyond k. They are a fourth power of gradients, no loss, and layers cannot be
    compared by them.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; A, G and ``C`` are used.
    """
    return _projected(W, *eq6_eigenvectors(W, moments))


@register_solver("fasc-eq6-centred", needs=["C"])
def fasc_eq6_centred(W: Tensor, moments: LayerMoments) -> Factorization:
    """For comparison only: :func:`fasc_eq6` with centred covariances and the paper's absolute 1e-8 on Sigma_xx.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; A, G, the means and ``C`` are used.
    """
    return _projected(W, *eq6_eigenvectors(W, moments, centred=True))


@register_solver("fasc-eq6-literal", needs=["C"])
def fasc_eq6_literal(W: Tensor, moments: LayerMoments) -> Factorization:
    """For comparison only: W' = W P with P = sum v v^T to the letter, v as generalised eigensolvers return them.

    Then v^T A v = 1, so P has the unit of 1 / x^2 and is no projector: even at full rank P is A^-1, not the identity,
    and W' is not W. The losses equal the losses of :func:`fasc_eq6`, and do not show this.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; A, G and ``C`` are used.
    """
    r = min(W.shape)
    eigenvalues, V = eq6_eigenvectors(W, moments)
    V = V[:, :r]
    return Factorization(W.double() @ V, V.T.contiguous(), tail_sums(eigenvalues)[: r + 1])


def _projected(W: Tensor, eigenvalues: Tensor, V: Tensor) -> Factorization:
    r = min(W.shape)
    Q = torch.linalg.qr(V[:, :r])[0]  # the first k columns of Q span the first k of V, for every k
    return Factorization(W.double() @ Q, Q.T.contiguous(), tail_sums(eigenvalues)[: r + 1])
