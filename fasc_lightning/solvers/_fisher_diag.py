"""The diagonal Fisher on both sides of the weight."""

from __future__ import annotations

from torch import Tensor

from fasc_lightning.solvers._registry import register_solver
from fasc_lightning.solvers._two_sided import two_sided
from fasc_lightning.solvers._types import Factorization
from fasc_lightning.statistics import LayerMoments, diagonal_moment


@register_solver("fisher-diag")
def fisher_diag(W: Tensor, moments: LayerMoments) -> Factorization:
    """Minimise sum_ij G_ii (W - W')_ij^2 A_jj: the SVD of diag(G)^(1/2) W diag(A)^(1/2), with the scales undone.

    If x and h are independent, E[(h_i x_j)^2] = G_ii A_jj is the diagonal of the Fisher of W over tokens. It is a
    product, so its minimiser is closed. The paper's baseline "Fisher-Diag" uses "only diagonal gradient information"
    and gives no formula (Shihab et al., FASC, section 3). This is the two-sided solution of ``fasc`` without the
    entries off the diagonals. Nothing is shrunk.

    The losses are J of ``fasc`` with diagonal moments: squared losses, comparable between layers.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; only the diagonals of A and G are used.
    """
    A, G = (diagonal_moment(S.double().diagonal().clamp(min=0)) for S in moments.plain_moments())
    return two_sided(W, A, G)
