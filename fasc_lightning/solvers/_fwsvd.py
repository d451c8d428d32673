"""FWSVD: rows of the weight weighed by their Fisher information."""

from __future__ import annotations

import torch
from torch import Tensor

from fasc_lightning.solvers._registry import register_solver
from fasc_lightning.solvers._two_sided import two_sided
from fasc_lightning.solvers._types import Factorization
from fasc_lightning.statistics import LayerMoments, diagonal_moment


@register_solver("fwsvd", needs=["fisher_rows"])
def fwsvd(W: Tensor, moments: LayerMoments) -> Factorization:
    """Minimise sum_i f_i |W_i - W'_i|^2 over rows i: the SVD of D W with D = diag(f)^(1/2), times D^-1.

    Hsu et al. 2022, "Language model compression with weighted low-rank factorization": the empirical Fisher of a weight
    is E[(dL/dW_ij)^2], and f_i = sum_j E[(dL/dW_ij)^2] is its sum along row i, because separate weights for all entries
    have no closed solution. Rows are outputs, as torch stores W. The paper takes the gradients of samples with task
    labels; here they come from sequences with the next token. The paper also trains afterwards.

    The losses are divided by n, since a weight has f_i / n on average. They then estimate the squared change of a
    sequence's loss under a diagonal Fisher, and compare between layers.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; only ``fisher_rows`` is used.
    """
    n = W.shape[1]
    rows = moments.require("fisher_rows").double() / n
    return two_sided(W, diagonal_moment(torch.ones_like(W[0], dtype=torch.float64)), diagonal_moment(rows))
