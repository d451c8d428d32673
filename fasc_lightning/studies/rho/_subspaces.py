"""Input subspaces that two solvers keep of a layer: the angles between them, and the losses.

Shihab et al., FASC, Appendix D and Figures 4 and 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fasc_lightning.compression import fisher_losses, fisher_metric
from fasc_lightning.solvers import Factorization, get_solver
from fasc_lightning.statistics import LayerMoments


def input_subspace(factorization: Factorization, rank: int) -> Tensor:
    """Return an orthonormal basis of the row space of W'_k, the inputs that it keeps, shape (n, k).

    Args:
        factorization: Factorisation of the layer.
        rank: k.
    """
    _, right = factorization.truncate(rank)
    return torch.linalg.qr(right.double().T)[0]


def principal_angles(Q1: Tensor, Q2: Tensor) -> Tensor:
    """Return the principal angles between two subspaces in degrees, ascending, shape (k,).

    The cosines are the singular values of Q1^T Q2, the sines the singular values of (I - Q1 Q1^T) Q2 (Björck and Golub
    1973, "Numerical Methods for Computing Angles Between Linear Subspaces"). Cosines do not resolve angles below 1e-6
    degrees, and sines do not resolve angles near 90; both together give every angle to full precision. It is written
    by hand because ``scipy.linalg.subspace_angles`` is exact to 1e-6 degrees only.

    Args:
        Q1: Orthonormal basis, shape (n, k).
        Q2: Orthonormal basis, shape (n, k).

    Raises:
        ValueError: If the shapes differ.
    """
    if Q1.shape != Q2.shape:
        raise ValueError(f"Expected bases of one shape (n, k) but got {tuple(Q1.shape)} and {tuple(Q2.shape)}.")
    Q1, Q2 = Q1.double(), Q2.double()
    projection = Q1.T @ Q2
    cosines = torch.linalg.svdvals(projection)
    sines = torch.linalg.svdvals(Q2 - Q1 @ projection)[: len(cosines)].flip(0)
    return torch.rad2deg(torch.atan2(sines, cosines))


def random_angles(n: int, rank: int, seed: int = 0) -> Tensor:
    """Return the principal angles between two random subspaces of R^n, the reference for "unrelated", shape (rank,).

    At half the dimension their median is 45 degrees, so an angle means little without this reference.

    Args:
        n: Dimension of the space.
        rank: Dimension of the subspaces.
        seed: Seed of the draw, which is uniform: orthonormalised Gaussian vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, n, rank, dtype=torch.float64, generator=generator)
    Q1, Q2 = torch.linalg.qr(draws)[0]
    return principal_angles(Q1, Q2)


@dataclass(frozen=True)
class LayerComparison:
    """Two solvers on one layer, at one rank.

    Attributes:
        angles: Principal angles between their input subspaces in degrees, ascending, shape (k,).
        losses: J_k of each solver by name, in the metric of the solver "fasc".
        approximations: W'_k of each solver by name, shape (m, n), in the dtype of W.
        gain: log10 of the baseline's loss over the method's: 1 means a tenth of the loss, 0 no gain, a negative value a
            worse loss. NaN if both losses are 0.
    """

    angles: Tensor
    losses: dict[str, float]
    approximations: dict[str, Tensor]
    gain: float


def compare_layer(
    W: Tensor, moments: LayerMoments, rank: int, method: str = "fasc", baseline: str = "svd"
) -> LayerComparison:
    """Compare two solvers on one layer at the same rank.

    Args:
        W: Weight, shape (m, n).
        moments: Moments of the layer.
        rank: k, at most min(m, n).
        method: Solver.
        baseline: The solver to compare with.

    Raises:
        ValueError: If the rank is out of range or a solver unknown.
    """
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"Expected a rank from 1 to min(m, n) = {min(W.shape)} but got {rank}.")
    A, G = fisher_metric(moments)
    bases, losses, approximations = [], {}, {}
    for name in (method, baseline):
        found = get_solver(name)(W, moments)
        bases.append(input_subspace(found, rank))
        losses[name] = fisher_losses(W, A, G, found)[rank].item()
        left, right = found.truncate(rank)
        approximations[name] = (left @ right).to(W.dtype)
    gain = log_ratio(losses[baseline], losses[method])
    return LayerComparison(principal_angles(bases[0], bases[1]), losses, approximations, gain)


def log_ratio(numerator: float, denominator: float) -> float:
    """Return log10(numerator / denominator) of losses: NaN for 0 / 0, infinite if only one is 0."""
    if numerator == denominator == 0 or math.isnan(numerator) or math.isnan(denominator):
        return math.nan
    if denominator == 0:
        return math.inf
    return -math.inf if numerator == 0 else math.log10(numerator) - math.log10(denominator)
