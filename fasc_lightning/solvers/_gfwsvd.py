"""GFWSVD: the two-sided solution with the nearest Kronecker factors of the Fisher of whole sequences."""

from __future__ import annotations

from torch import Tensor

from fasc_lightning.solvers._fasc import SHRINK_A, SHRINK_G
from fasc_lightning.solvers._linalg import shrink
from fasc_lightning.solvers._registry import register_solver
from fasc_lightning.solvers._two_sided import two_sided
from fasc_lightning.solvers._types import Factorization
from fasc_lightning.statistics import LayerMoments


@register_solver("gfwsvd", needs=["kronecker"])
def gfwsvd(W: Tensor, moments: LayerMoments, shrink_A: float = SHRINK_A, shrink_G: float = SHRINK_G) -> Factorization:
    """Minimise tr(G D A D^T), D = W - W', with A (x) G ~ E[vec(dW) vec(dW)^T], dW a sequence's weight gradient.

    Chekalina et al. 2025, "Generalized Fisher-Weighted SVD": A and G are the factors of the Kronecker product nearest
    to the observed Fisher, found by iteration. One calibration makes one step of the iteration from identities: E[dW^T
    dW] and E[dW dW^T]. More steps need more passes over the data: :func:`~fasc_lightning.studies.rho.refine_kronecker`
    makes them and puts the factors into the moments. Singular factors are shrunk as in ``fasc``, so the two methods
    differ only in their statistics.

    The losses are E[tr(dW^T D)^2], as far as the Kronecker product has the Fisher's trace: the squared change of a
    sequence's loss, comparable between layers.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; only ``kronecker`` is used.
        shrink_A: Relative shrinkage of the factor of the inputs.
        shrink_G: Relative shrinkage of the factor of the outputs.
    """
    A, G = moments.require("kronecker")
    return two_sided(W, shrink(A.double(), shrink_A), shrink(G.double(), shrink_G))
