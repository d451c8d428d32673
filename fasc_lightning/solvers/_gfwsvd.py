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
    """Minimise tr(left D right D^T), D = W - W', with E[vec(G_i) vec(G_i)^T] ~ right (x) left.

    Chekalina et al. 2025, "Generalized Fisher-Weighted SVD": G_i is a sequence's weight gradient, and the factors are
    the nearest Kronecker product to the observed Fisher, found by iteration. As gathered by one calibration they have
    made one step of it, from identities: E[G_i^T G_i] and E[G_i G_i^T]. More steps need more passes over the data:
    :func:`~fasc_lightning.studies.rho.refine_kronecker` takes them and puts the factors into the moments. Singular
    factors are shrunk by the amounts of ``fasc``, so that the two differ in their statistics alone.

    The losses are E[tr(G_i^T D)^2] as far as the Kronecker product has the Fisher's trace: the squared change of a
    sequence's loss, comparable between layers.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; only ``kronecker`` is used.
        shrink_A: Relative shrinkage of the factor of the inputs.
        shrink_G: Relative shrinkage of the factor of the outputs.
    """
    A, G = moments.require("kronecker")
    return two_sided(W, shrink(A.double(), shrink_A), shrink(G.double(), shrink_G))
