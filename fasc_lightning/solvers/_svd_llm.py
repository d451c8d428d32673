"""SVD-LLM: activation-whitened truncation, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fasc_lightning.solvers._fasc import SHRINK_A
from fasc_lightning.solvers._linalg import shrink
from fasc_lightning.solvers._registry import register_solver
from fasc_lightning.solvers._two_sided import two_sided
from fasc_lightning.solvers._types import Factorization
from fasc_lightning.statistics import LayerMoments, diagonal_moment


@register_solver("svd-llm")
def svd_llm(W: Tensor, moments: LayerMoments, shrink_A: float = SHRINK_A) -> Factorization:
    """Minimise E|(W - W') x|^2 (Wang et al. 2024, SVD-LLM, truncation-aware whitening).

    The paper whitens with the Cholesky factor of X X^T and repairs a singular one. Here A is shrunk by the same
    relative amount as for ``fasc``. The paper's later steps (parameter update, LoRA) are not part of the solver.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; only A is used.
        shrink_A: Relative shrinkage of A.
    """
    identity = diagonal_moment(torch.ones_like(W[:, 0], dtype=torch.float64))
    return two_sided(W, shrink(moments.plain_moments()[0].double(), shrink_A), identity)
