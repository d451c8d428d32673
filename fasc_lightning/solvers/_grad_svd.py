"""The gradient-weighted SVD, named "Grad-Weighted SVD" in the FASC paper."""

from __future__ import annotations

from torch import Tensor

from fasc_lightning.solvers._linalg import descending_eigh, tail_sums
from fasc_lightning.solvers._registry import register_solver
from fasc_lightning.solvers._types import Factorization
from fasc_lightning.statistics import LayerMoments


@register_solver("grad-svd", needs=["saliency"])
def grad_svd(W: Tensor, moments: LayerMoments) -> Factorization:
    """Project the inputs onto the leading eigenvectors V of E[(g*x)(g*x)^T]: W' = W V_k V_k^T.

    The baseline is "SVD on gradient-weighted activation covariance" with g*x elementwise (Shihab et al., FASC, section
    3); g = W^T h is the gradient at x through this layer. The paper does not state how P follows from that covariance.
    Here it does as in the paper's plain SVD, and uncentred as in :func:`~fasc_lightning.solvers.svd`.

    The losses are E|(I - P)(g*x)|^2. (g*x)_j is the first-order change of the loss if input j is set to zero, so they
    are squared losses, and compare between layers as far as the directions are close to the axes. If n > m, ranks above
    m are not offered, because W itself has no more.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; only ``saliency`` is used.
    """
    r = min(W.shape)
    eigenvalues, V = descending_eigh(moments.require("saliency").double())
    V = V[:, :r]
    return Factorization(W.double() @ V, V.T.contiguous(), tail_sums(eigenvalues)[: r + 1])
