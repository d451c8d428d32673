"""The activation SVD, named "SVD" in the FASC paper."""

from __future__ import annotations

from torch import Tensor

from fasc_lightning.solvers._linalg import descending_eigh, tail_sums
from fasc_lightning.solvers._registry import register_solver
from fasc_lightning.solvers._types import Factorization
from fasc_lightning.statistics import LayerMoments


@register_solver("svd")
def svd(W: Tensor, moments: LayerMoments) -> Factorization:
    """Project the inputs onto the leading eigenvectors of their second moment: W' = W V_k V_k^T.

    Minimises E|x - P x|^2 over projections of rank k (Shihab et al., section 2.1); the loss is the sum of the
    eigenvalues of A beyond k. The paper centres x, which a layer without a bias cannot undo, so A is uncentred here. If
    n > m, ranks above m are not offered, because W itself has no more. A sketched A becomes a matrix (n, n), because a
    low-rank plus diagonal matrix has no shorter way to its eigenvectors.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; only A is used.
    """
    r = min(W.shape)
    eigenvalues, V = descending_eigh(moments.A.double())
    V = V[:, :r]
    return Factorization(W.double() @ V, V.T.contiguous(), tail_sums(eigenvalues)[: r + 1])
