"""The objective of FASC with coupled and with plain moments, solved in closed form."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from fasc_lightning.solvers._linalg import double_shrunk
from fasc_lightning.solvers._registry import register_solver
from fasc_lightning.solvers._two_sided import two_sided
from fasc_lightning.solvers._types import Factorization
from fasc_lightning.statistics import LayerMoments, SecondMoment

#: Relative shrinkage of A, enough to make it invertible.
SHRINK_A = 1e-4
#: Relative shrinkage of the plain G, whose samples have far heavier tails.
SHRINK_G = 0.1
#: Relative shrinkage of the coupled G: the best value on windows that nothing was fitted to (docs/results.md).
SHRINK_COUPLED_G = 0.05


@overload
def coupled_metric(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]: ...
@overload
def coupled_metric(A: SecondMoment, G: SecondMoment) -> tuple[SecondMoment, SecondMoment]: ...
def coupled_metric(A: SecondMoment, G: SecondMoment) -> tuple[SecondMoment, SecondMoment]:
    """Return the shrunk coupled A (n, n) and G (m, m) in float64: the metric in which ``fasc`` measures a loss."""
    return double_shrunk(A, SHRINK_A), double_shrunk(G, SHRINK_COUPLED_G)


@overload
def plain_metric(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]: ...
@overload
def plain_metric(A: SecondMoment, G: SecondMoment) -> tuple[SecondMoment, SecondMoment]: ...
def plain_metric(A: SecondMoment, G: SecondMoment) -> tuple[SecondMoment, SecondMoment]:
    """Return the shrunk plain A (n, n) and G (m, m) in float64: the metric in which ``fasc-plain`` measures a loss."""
    return double_shrunk(A, SHRINK_A), double_shrunk(G, SHRINK_G)


@register_solver("fasc", needs=["coupled"])
def fasc(W: Tensor, moments: LayerMoments) -> Factorization:
    """Minimise E[(h^T (W - W') x)^2], FASC's Eq. 1 with W' = W P, with moments that couple x and h.

    J = E[(g^T (I - P) x)^2] (Shihab et al., Eq. 1) is the squared first-order change of the loss. If x and h of a token
    were independent, J would be tr(G D A D^T), which :func:`two_sided` minimises. They are not independent, and J is a
    fourth moment. Therefore tokens weigh by |h| in A and by |x| in G
    (:class:`~fasc_lightning.statistics.CoupledMoments`): an input without gradient counts little, however large it is.
    The eigenproblem that the paper prints (Eq. 6) does not minimise Eq. 1.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; only ``coupled`` is used. They may be singular.
    """
    return two_sided(W, *coupled_metric(*moments.coupled_moments()))


@register_solver("fasc-plain")
def fasc_plain(W: Tensor, moments: LayerMoments) -> Factorization:
    """Minimise tr(G D A D^T), D = W - W': FASC's Eq. 1 as if x and h of a token were independent.

    The objective has the form of GFWSVD's Kronecker-factored Fisher (Chekalina et al. 2025), with the factors of K-FAC
    (Martens and Grosse 2015). It shows for comparison what ``fasc`` is without coupling.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer; only A and G are used. They may be singular.
    """
    return two_sided(W, *plain_metric(*moments.plain_moments()))
