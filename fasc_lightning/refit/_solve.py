"""The mathematics of the anchored refit of one layer, in closed form.

A layer y = W x + b is kept as W' of rank k. With the metric G of the gradients at the layer's output, the refit of W'
minimises

    E[(v - W' x^)^T G (v - W' x^)] + lambda E[(W'_0 x - W' x)^T G (W'_0 x - W' x)].

The target v is W x, or the value that corrects the error of a whole block. W'_0 is the anchor, which keeps the refit
from overfitting few tokens. It is the product of the factors before the refit. Or W'_0 is the dense W, and E[x x^T] are
the moments that the factors were made with: the second term is then the loss J that the compression minimised, and the
refit may move to other factors with the same J.

Both terms are least squares on pairs of an input and a target; the pairs of the second term have weight lambda. So one
problem with the mixed moments H = E[x^ x^^T] and P = E[v x^^T] is left. In an output basis the metric is the identity
(:class:`~fasc_lightning.refit._drift.OutputBasis`). Completing the square leaves |(T - W') L|^2 with T = P H^-1 and
L L^T = H. Its minimum of rank k keeps the k leading left singular vectors U of T L (Eckart and Young 1936):
W' = U U^T T.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fasc_lightning.refit._drift import TargetMoments
from fasc_lightning.solvers import SquareRoot, descending_eigh, square_root


@dataclass(frozen=True)
class Factors:
    """A matrix W' = left @ right of rank k, with outputs in an output basis, and the shift of its bias.

    Attributes:
        left: Left factor, shape (r, k).
        right: Right factor, shape (k, n).
        shift: Shift of the bias, shape (r,); None if the bias does not move.
    """

    left: Tensor
    right: Tensor
    shift: Tensor | None = None

    def error(self, moments: TargetMoments) -> float:
        """Return the error of :meth:`TargetMoments.error`, for orthonormal columns of the left factor."""
        return moments.error(self.right, self.shift, self.left)


def mixed_with_anchor(moments: TargetMoments, anchor: TargetMoments, weight: float) -> TargetMoments:
    """Return the moments of the problem with an anchor.

    Args:
        moments: Moments of the tokens, invertible (:meth:`TargetMoments.shrunk`).
        anchor: E[x x^T] and W'_0 E[x x^T] of the anchor, in the same unit.
        weight: lambda, at least 0.
    """
    return moments.mixed(anchor, weight / (1 + weight))


def anchor_moments(weight: Tensor, A: Tensor, mean_x: Tensor | None = None) -> TargetMoments:
    """Return the moments of pairs of x and W'_0 x.

    Args:
        weight: W'_0 in the basis of the outputs, shape (r, n).
        A: E[x x^T], shape (n, n).
        mean_x: E[x], shape (n,); None if no bias moves, so that nothing reads it.
    """
    P = weight @ A
    mean_x = A.new_zeros(len(A)) if mean_x is None else mean_x
    return TargetMoments(A, P, mean_x, weight @ mean_x, (P * weight).sum())


def solve(moments: TargetMoments) -> Tensor:
    """Return T = P H^-1, the optimum among all matrices, shape (r, n), rank-revealing."""
    root, Z = _whitened(moments)
    return root.solve_transposed(Z).T


def solve_low_rank(moments: TargetMoments, rank: int, bias: bool = False) -> Factors:
    """Return the optimum among all matrices of a rank.

    With a bias both sides are centred first, since the bias is optimal for its matrix. Its shift is then the mean of
    the matrix's residual.

    Args:
        moments: Moments of the problem.
        rank: k.
        bias: Whether the layer has a bias to shift.

    Returns:
        The factors, in the type of the moments; the columns of the left one are orthonormal.
    """
    root, Z = _whitened(moments.centred() if bias else moments)
    left = descending_eigh(Z.T @ Z)[1][:, :rank]
    right = root.solve_transposed(Z @ left).T
    return Factors(left, right, moments.mean_v - left @ (right @ moments.mean_x) if bias else None)


def _whitened(moments: TargetMoments) -> tuple[SquareRoot, Tensor]:
    """Return L with L L^T = H, and L^-1 P^T = (T L)^T, shape (n, r)."""
    root = square_root(moments.A)
    return root, root.solve(moments.P.T)
