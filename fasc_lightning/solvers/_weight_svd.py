"""The SVD of the weight alone, without data."""

from __future__ import annotations

import torch
from torch import Tensor

from fasc_lightning.solvers._registry import register_solver
from fasc_lightning.solvers._two_sided import two_sided
from fasc_lightning.solvers._types import Factorization
from fasc_lightning.statistics import LayerMoments, diagonal_moment


@register_solver("weight-svd")
def weight_svd(W: Tensor, moments: LayerMoments) -> Factorization:
    """Minimise |W - W'|_F^2 (Eckart and Young 1936): W'_k = U_k S_k V_k^T of W = U S V^T.

    The losses are squared weights. Between layers they compare only if all inputs and all outputs matter equally.

    Args:
        W: Weight, shape (m, n).
        moments: Not used.
    """
    del moments
    A, G = (diagonal_moment(torch.ones_like(side, dtype=torch.float64)) for side in (W[0], W[:, 0]))
    return two_sided(W, A, G)
