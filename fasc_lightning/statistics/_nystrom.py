"""Nystrom approximations of second moments, completed to the known diagonal."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Random sign vectors that estimate a norm, to about a tenth.
NORM_PROBES = 64


@dataclass(frozen=True, eq=False)
class NystromMoment:
    r"""The symmetric positive semidefinite matrix S = F F^T + T P diag(w) P T + ridge I, T = diag(t), P = I - Q Q^T.

    A Nystrom approximation F F^T of A from Y = A Omega leaves a rest R = A - F F^T >= 0. Two facts about R are known: R
    Omega = 0, and its diagonal. In the scale T in which every feature has second moment 1, R is therefore T P M P T,
    where P projects to the complement of T Omega. Here M is diagonal and chosen so that the diagonal of S fits. A
    diagonal alone beside F F^T would count twice the directions that Omega has seen: on the wide sides of SmolLM2-135M
    that costs about twice as much of J over the optimum.

    Attributes:
        factor: F, shape (d, r).
        basis: Q, orthonormal columns, shape (d, s).
        weights: w, at least zero, shape (d,).
        scale: t, at least zero, shape (d,).
        ridge: At least zero.
        error: Estimated error |A - S|_F / |A|_F; NaN if unknown.
    """

    factor: Tensor
    basis: Tensor
    weights: Tensor
    scale: Tensor
    ridge: Tensor | float = 0.0
    error: float = math.nan

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return len(self.scale), len(self.scale)

    def diagonal(self) -> Tensor:
        """Return the diagonal of S, shape (d,)."""
        Q, w = self.basis, self.weights
        crossed = ((Q @ (Q.T @ (w[:, None] * Q))) * Q).sum(1)
        seen = w * (1 - 2 * Q.square().sum(1)) + crossed
        return self.factor.square().sum(1) + self.scale.square() * seen.clamp(min=0) + self.ridge

    def double(self) -> NystromMoment:
        """Return S in float64."""
        F, Q, w, t = (tensor.double() for tensor in (self.factor, self.basis, self.weights, self.scale))
        return replace(self, factor=F, basis=Q, weights=w, scale=t)

    def to(self, device: torch.device | str) -> NystromMoment:
        """Return S on a device."""
        F, Q, w, t = (tensor.to(device) for tensor in (self.factor, self.basis, self.weights, self.scale))
        return replace(self, factor=F, basis=Q, weights=w, scale=t)

    def rescaled(self, scale: Tensor) -> NystromMoment:
        """Return diag(scale) S diag(scale) of a moment without a ridge; scale (d,)."""
        return replace(self, factor=self.factor * scale[:, None], scale=self.scale * scale)

    def shrunk(self, amount: float) -> NystromMoment:
        """Return (1 - amount) S + amount * mean(diag S) * I, again a :class:`NystromMoment`."""
        ridge = (1 - amount) * self.ridge + amount * self.diagonal().mean()
        return replace(
            self,
            factor=self.factor * (1 - amount) ** 0.5,
            weights=(1 - amount) * self.weights,
            ridge=ridge,
            error=math.nan,
        )

    def congruence(self, W: Tensor) -> Tensor:
        """Return W S W^T, shape (m, m), for W of shape (m, d)."""
        lifted, through = W @ self.factor, W * self.scale
        through = through - (through @ self.basis) @ self.basis.T
        return lifted @ lifted.T + (through * self.weights) @ through.T + self.ridge * (W @ W.T)

    def apply(self, X: Tensor) -> Tensor:
        """Return S X, shape (d, c), for X of shape (d, c)."""
        rest = self._complement(self.weights[:, None] * self._complement(self.scale[:, None] * X))
        return self.factor @ (self.factor.T @ X) + self.scale[:, None] * rest + self.ridge * X

    def _complement(self, X: Tensor) -> Tensor:
        """Return P X."""
        return X - self.basis @ (self.basis.T @ X)

    def norm(self) -> Tensor:
        """Return the Frobenius norm of S, a scalar, estimated with random signs to about a tenth."""
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (len(self.scale), NORM_PROBES), generator=generator).mul_(2).sub_(1)
        return self.apply(signs.to(self.factor)).norm() / NORM_PROBES**0.5

    def dense(self) -> Tensor:
        """Return S, shape (d, d)."""
        return self.apply(torch.eye(len(self.scale), dtype=self.factor.dtype, device=self.factor.device))


def completed(factor: Tensor, seen: Tensor, diagonal: Tensor) -> NystromMoment:
    """Return the moment with the given diagonal that agrees with the products of A and a random matrix.

    With P of :class:`NystromMoment`, diag(P diag(w) P) is p_i w_i, p_i = P_ii, as far as w is constant. So w_i is the
    part of the diagonal that the factor leaves at feature i, over p_i. A scale for each feature corrects the remaining
    difference.

    Args:
        factor: F, float64, shape (d, r).
        seen: Omega, float64, shape (d, s).
        diagonal: Diagonal of A, float64, shape (d,).
    """
    scale = diagonal.sqrt()
    basis = torch.linalg.qr(seen * scale[:, None])[0]
    alive = diagonal > 0
    left = torch.where(alive, 1 - factor.square().sum(1) / diagonal, 0).clamp(min=0)
    open_share = 1 - basis.square().sum(1)
    # A feature that lies in the span of Omega leaves only rounding.
    weights = torch.where(open_share > torch.finfo(basis.dtype).eps ** 0.5, left / open_share, 0)
    found = NystromMoment(factor, basis, weights, scale)
    return found.rescaled(torch.where(alive, (diagonal / found.diagonal()).sqrt(), 0))
