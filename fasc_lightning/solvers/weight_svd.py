"""The SVD of the weight itself, which knows nothing of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from fasc_lightning.moments import LayerMoments
from fasc_lightning.solvers._registry import register_solver
from fasc_lightning.solvers._types import Factorization
from fasc_lightning.solvers.fasc import two_sided


@register_solver("weight-svd")
def weight_svd(W: Tensor, moments: LayerMoments) -> Factorization:
    """Minimise |W - W'|_F^2 (Eckart and Young 1936): W'_k = U_k S_k V_k^T of W = U S V^T.

    The losses are squared weights. Between layers they compare only if all inputs and all outputs matter alike.

    Args:
        W: Weight, shape (m, n).
        moments: Not looked at.
    """
    del moments
    m, n = W.shape
    eye = {d: torch.eye(d, dtype=torch.float64, device=W.device) for d in (m, n)}
    return two_sided(W, eye[n], eye[m])
