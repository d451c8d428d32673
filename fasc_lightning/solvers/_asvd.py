"""ASVD: columns of the weight scaled by the mean magnitude of their inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from fasc_lightning.solvers._registry import register_solver
from fasc_lightning.solvers._two_sided import two_sided
from fasc_lightning.solvers._types import Factorization
from fasc_lightning.statistics import LayerMoments, diagonal_moment

#: Exponent of the scaling, as published.
ALPHA = 0.5


@register_solver("asvd", needs=["abs_x"])
def asvd(W: Tensor, moments: LayerMoments, alpha: float = ALPHA) -> Factorization:
    """Minimise |(W - W') S|_F^2 with S = diag(E|x|)^alpha: the SVD of W S, times S^-1 (Yuan et al. 2023, ASVD).

    This is the paper's "absmean" scaling with its alpha of 0.5. The paper also searches each layer's rank by
    perplexity; here the allocation sets the ranks. A feature that is always zero gets a floor instead of the paper's
    constant.

    The losses are squared weights times magnitudes to the power of 2 alpha, a unit of their own.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; only ``abs_x`` is used.
        alpha: Exponent.
    """
    scales = moments.require("abs_x").double().pow(2 * alpha)
    return two_sided(W, diagonal_moment(scales), diagonal_moment(torch.ones_like(W[:, 0], dtype=torch.float64)))
