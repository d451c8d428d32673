"""Two-sided Fisher low-rank approximation: the objective of FASC, solved in closed form."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from fasc_lightning.solvers._linalg import descending_eigh, shrink, square_root, tail_sums
from fasc_lightning.solvers._registry import register_solver
from fasc_lightning.solvers._types import Factorization
from fasc_lightning.statistics import LayerMoments, SecondMoment, congruence, dense

#: Relative shrinkage of the activations' second moment: enough to make it invertible.
SHRINK_A = 1e-4
#: Relative shrinkage of the gradients' second moment, which is estimated from far heavier tails.
SHRINK_G = 0.1
#: The same where tokens weigh by |x|: what was best on windows that nothing was fitted to (docs/results.md).
SHRINK_COUPLED_G = 0.05


def two_sided(W: Tensor, A: SecondMoment, G: SecondMoment) -> Factorization:
    r"""Minimise tr(G D A D^T), D = W - W', over all W' of each rank.

    With any R_A R_A^T = A and R_G^T R_G = G, let M = R_G W R_A = U S V^T; the optimum is
    W'_k = R_G^-1 U_k S_k V_k^T R_A^-1 and the loss left is the sum of s_i^2 beyond k (Eckart and Young 1936 in the
    metric of the two factors). As U_k S_k V_k^T = U_k U_k^T M, one root cancels, W'_k = R_G^-1 U_k U_k^T R_G W, and U
    are the eigenvectors of M M^T = R_G (W A W^T) R_G^T: only the smaller side needs a root and an eigh. A low-rank form
    on the larger side therefore stays one; on the smaller side it becomes a matrix, which is no larger than W.

    Note the orientation: with Cholesky's G = L L^T it is R_G = L^T, not L.

    Args:
        W: Shape (m, n).
        A: Symmetric positive semidefinite, shape (n, n).
        G: Symmetric positive semidefinite, shape (m, m).

    Returns:
        The factorisation, in float64.
    """
    m, n = W.shape
    if m > n:  # the same problem for W^T, whose smaller side is its outputs
        transposed = two_sided(W.T, G, A)
        return Factorization(transposed.right.T, transposed.left.T, transposed.losses)
    W, A, G = W.double(), A.double(), dense(G.double())
    root = square_root(G)  # L with G = L L^T
    spectrum, U = descending_eigh(root.L.T @ congruence(W, A) @ root.L)
    return Factorization(root.solve_transposed(U), (root.L @ U).T @ W, tail_sums(spectrum))


@overload
def coupled_metric(A_h: Tensor, G_x: Tensor) -> tuple[Tensor, Tensor]: ...
@overload
def coupled_metric(A_h: SecondMoment, G_x: SecondMoment) -> tuple[SecondMoment, SecondMoment]: ...
def coupled_metric(A_h: SecondMoment, G_x: SecondMoment) -> tuple[SecondMoment, SecondMoment]:
    """Return A (n, n) and G (m, m) in float64, shrunk: the metric in which ``fasc`` measures a loss."""
    return shrink(A_h.double(), SHRINK_A), shrink(G_x.double(), SHRINK_COUPLED_G)


@overload
def plain_metric(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]: ...
@overload
def plain_metric(A: SecondMoment, G: SecondMoment) -> tuple[SecondMoment, SecondMoment]: ...
def plain_metric(A: SecondMoment, G: SecondMoment) -> tuple[SecondMoment, SecondMoment]:
    """Return A (n, n) and G (m, m) in float64, shrunk: the metric in which ``fasc-plain`` measures a loss."""
    return shrink(A.double(), SHRINK_A), shrink(G.double(), SHRINK_G)


@register_solver("fasc", needs=["coupled"])
def fasc(W: Tensor, moments: LayerMoments) -> Factorization:
    """Minimise E[(h^T (W - W') x)^2], FASC's Eq. 1 with W' = W P, with the coupling of x and h in the moments.

    J = E[(g^T (I - P) x)^2] (Shihab et al., Eq. 1) is the squared first-order change of the loss. If x and h of a
    token were independent it would be tr(G D A D^T), and :func:`two_sided` would minimise it. They are not, and J is
    a fourth moment; here tokens weigh by |h| in A and by |x| in G
    (:class:`~fasc_lightning.statistics.CoupledMoments`), so that an input that no gradient comes back to counts little,
    however large it is. The eigenproblem that the paper prints (Eq. 6) does not minimise Eq. 1.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; only ``coupled`` is used. Singular ones are fine.
    """
    return two_sided(W, *coupled_metric(*moments.coupled_forms()))


@register_solver("fasc-plain")
def fasc_plain(W: Tensor, moments: LayerMoments) -> Factorization:
    """Minimise tr(G D A D^T), D = W - W': FASC's Eq. 1 as if x and h of a token were independent.

    The same form as the Kronecker-factored Fisher of GFWSVD (Chekalina et al. 2025), with the factors of K-FAC
    (Martens and Grosse 2015). What ``fasc`` is without coupling, for comparison.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; only A and G are used. Singular ones are fine.
    """
    return two_sided(W, *plain_metric(*moments.plain_forms()))
