"""J, the loss that a low-rank approximation costs to second order: predicted from moments, or measured on tokens.

For a layer y = W x + b, D = W - W' and h = dL/dy with L the sum of the token losses,

    J = E[(h^T D x)^2],

FASC's Eq. 1 with W' = W P (Shihab et al.). If x and h were independent, J would be tr(G D A D^T) with A = E[x x^T] and
G = E[h h^T]; they are not, so the same J on tokens that nothing was fitted to is the judge.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasc_lightning.solvers import Factorization, coupled_metric, plain_metric
from fasc_lightning.statistics import LayerMoments, SecondMoment, apply


def fisher_metric(moments: LayerMoments) -> tuple[SecondMoment, SecondMoment]:
    """Return A (n, n) and G (m, m) in float64 as the solver "fasc" takes them, "fasc-plain" if nothing is coupled.

    Sketched ones stay low rank plus diagonal.

    Losses in this metric compare between layers, whichever solver made the approximation.
    """
    if moments.is_coupled:
        return coupled_metric(*moments.coupled_moments())
    return plain_metric(*moments.plain_moments())


def fisher_losses(W: Tensor, A: SecondMoment, G: SecondMoment, factorization: Factorization) -> Tensor:
    r"""Return J_k = tr(G D_k A D_k^T), D_k = W - L_k R_k, for every rank k of any solver's factors L (m, r), R (r, n).

    With D_k = D_r + \sum_{i > k} l_i r_i^T, the loss is a quadratic form in which one more rank is one row and one
    column:

        J_k = tr(G D_r A D_r^T) + 2 \sum_{i > k} (L^T G D_r A R^T)_ii + \sum_{i, j > k} (L^T G L)_ij (R A R^T)_ij.

    Summed from the full rank downwards, where the terms are small, so that small losses keep their digits; the same
    sums from rank 0 upwards are differences of large ones.

    Args:
        W: Weight, shape (m, n).
        A: Symmetric positive semidefinite, shape (n, n).
        G: Symmetric positive semidefinite, shape (m, m).
        factorization: Of W, by any solver. Its own losses are not looked at.

    Returns:
        Shape (r + 1,), float64. Unlike the losses of the solver that minimises J, they may increase with the rank.
    """
    W, A, G = W.double(), A.double(), G.double()
    L, R = factorization.left.double(), factorization.right.double()
    D = W - L @ R
    GL, AR = apply(G, L), apply(A, R.T)  # (m, r), (n, r)
    rest = (apply(G, D) * apply(A, D.T).T).sum()
    cross = ((D @ AR) * GL).sum(0)  # (r,)
    gram = (L.T @ GL) * (R @ AR)  # (r, r)
    tails = 2 * cross.flip(0).cumsum(0) + gram.flip(0, 1).cumsum(0).cumsum(1).diagonal()
    # Rounding may take what is zero below it.
    return torch.cat([rest[None], rest + tails]).flip(0).clamp(min=0)
