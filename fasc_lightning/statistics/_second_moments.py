"""Second moments as solvers read them: matrices, low-rank ones with a rest, projections through a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fasc_lightning.statistics._nystrom import NystromMoment
from fasc_lightning.statistics._projected import ProjectedMoment


@dataclass(frozen=True, eq=False)
class LowRankPlusDiagonal:
    """The symmetric positive semidefinite matrix S = F F^T + diag(D).

    Attributes:
        factor: F, shape (d, r).
        residual: D, the diagonal without F F^T's part, at least zero, shape (d,).
        error: Estimated error |A - S|_F / |A|_F, A the moment that S approximates; NaN if unknown.
    """

    factor: Tensor
    residual: Tensor
    error: float = math.nan

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return len(self.residual), len(self.residual)

    def diagonal(self) -> Tensor:
        """Return the diagonal of S, shape (d,)."""
        return self.factor.square().sum(1) + self.residual

    def double(self) -> LowRankPlusDiagonal:
        """Return S in float64."""
        return LowRankPlusDiagonal(self.factor.double(), self.residual.double(), self.error)

    def to(self, device: torch.device | str) -> LowRankPlusDiagonal:
        """Return S on a device."""
        return LowRankPlusDiagonal(self.factor.to(device), self.residual.to(device), self.error)

    def shrunk(self, amount: float) -> LowRankPlusDiagonal:
        """Return (1 - amount) S + amount * mean(diag S) * I, again a :class:`LowRankPlusDiagonal`."""
        level = amount * self.diagonal().mean()
        return LowRankPlusDiagonal(self.factor * (1 - amount) ** 0.5, (1 - amount) * self.residual + level)

    def congruence(self, W: Tensor) -> Tensor:
        """Return W S W^T, shape (m, m), for W of shape (m, d)."""
        lifted = W @ self.factor
        return lifted @ lifted.T + (W * self.residual) @ W.T

    def apply(self, X: Tensor) -> Tensor:
        """Return S X, shape (d, c), for X of shape (d, c)."""
        return self.factor @ (self.factor.T @ X) + self.residual[:, None] * X

    def norm(self) -> Tensor:
        """Return the Frobenius norm of S, a scalar."""
        crossed = (2 * self.factor.square().sum(1) + self.residual) * self.residual
        return ((self.factor.T @ self.factor).square().sum() + crossed.sum()).sqrt()

    def dense(self) -> Tensor:
        """Return S, shape (d, d)."""
        full = self.factor @ self.factor.T
        full.diagonal().add_(self.residual)
        return full


#: A second moment of shape (d, d).
SecondMoment: TypeAlias = Tensor | LowRankPlusDiagonal | NystromMoment | ProjectedMoment


def dense(S: SecondMoment) -> Tensor:
    """Return a second moment as a matrix, shape (d, d)."""
    return S if isinstance(S, Tensor) else S.dense()


def diagonal_moment(values: Tensor) -> LowRankPlusDiagonal:
    """Return the diagonal matrix of the values, shape (d,), without a (d, d) tensor."""
    return LowRankPlusDiagonal(values.new_zeros(len(values), 0), values, 0.0)


def apply(S: SecondMoment, X: Tensor) -> Tensor:
    """Return S X, shape (d, c); a low-rank S makes no (d, d) matrix.

    Args:
        S: Shape (d, d).
        X: Shape (d, c).
    """
    return S @ X if isinstance(S, Tensor) else S.apply(X)


def congruence(W: Tensor, S: SecondMoment) -> Tensor:
    """Return W S W^T, shape (m, m); a low-rank S makes no (d, d) matrix.

    Args:
        W: Shape (m, d).
        S: Shape (d, d).
    """
    return W @ S @ W.T if isinstance(S, Tensor) else S.congruence(W)
