"""Square roots, shrinkage and spectra of second moments, in float64, or float32 for mere choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from fasc_lightning.statistics import SecondMoment

#: Smallest eigenvalue in the rank-revealing fallback, relative to the largest. It makes directions without calibration
#: tokens cheap to lose, not free, and keeps inverses finite.
EIGENVALUE_FLOOR = 1e-10


@overload
def shrink(S: Tensor, amount: float) -> Tensor: ...
@overload
def shrink(S: SecondMoment, amount: float) -> SecondMoment: ...
def shrink(S: SecondMoment, amount: float) -> SecondMoment:
    """Return (1 - amount) S + amount * mean(diag S) * I; relative, so the scale of the data does not matter.

    Args:
        S: Symmetric positive semidefinite, shape (d, d).
        amount: In [0, 1).
    """
    return _shrink_(S.clone(), amount) if isinstance(S, Tensor) else S.shrunk(amount)


@overload
def double_shrunk(S: Tensor, amount: float) -> Tensor: ...
@overload
def double_shrunk(S: SecondMoment, amount: float) -> SecondMoment: ...
def double_shrunk(S: SecondMoment, amount: float) -> SecondMoment:
    """Return :func:`shrink` of S in float64, with one copy of it where ``shrink(S.double(), amount)`` makes two."""
    if isinstance(S, Tensor):
        return _shrink_(S.to(torch.float64, copy=True), amount)
    return S.double().shrunk(amount)


def _shrink_(S: Tensor, amount: float) -> Tensor:
    mean = S.diagonal().mean()
    S *= 1 - amount
    S.diagonal().add_(amount * mean)
    return S


@dataclass(frozen=True)
class SquareRoot:
    """A matrix L with L L^T = S; lower triangular if Cholesky succeeded.

    Attributes:
        L: Shape (d, d).
        inverse: L^-1 if L is not triangular; otherwise None.
    """

    L: Tensor
    inverse: Tensor | None = None

    def solve(self, B: Tensor) -> Tensor:
        """Return L^-1 B."""
        if self.inverse is not None:
            return self.inverse @ B
        return torch.linalg.solve_triangular(self.L, B, upper=False)

    def solve_transposed(self, B: Tensor) -> Tensor:
        """Return L^-T B."""
        if self.inverse is not None:
            return self.inverse.T @ B
        return torch.linalg.solve_triangular(self.L.T, B, upper=True)


def square_root(S: Tensor) -> SquareRoot:
    """Return L with L L^T = S: by Cholesky, or by the eigendecomposition if S is numerically singular.

    Args:
        S: Symmetric positive semidefinite, shape (d, d), float64 or float32.
    """
    L, info = torch.linalg.cholesky_ex(S)
    pivots = L.diagonal()
    if info == 0 and bool(pivots.min() ** 2 > EIGENVALUE_FLOOR * S.diagonal().max()):
        return SquareRoot(L)
    eigenvalues, Q = torch.linalg.eigh(S)
    largest = eigenvalues[-1]
    # A second moment of zeros prefers no direction, so it counts as the identity.
    floor = EIGENVALUE_FLOOR * largest if largest > 0 else torch.ones_like(largest)
    roots = eigenvalues.clamp(min=floor).sqrt()
    return SquareRoot(Q * roots, (Q / roots).T)


def descending_eigh(S: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues in descending order, clamped at zero, and eigenvectors in columns."""
    eigenvalues, Q = torch.linalg.eigh(S)
    return eigenvalues.flip(0).clamp(min=0), Q.flip(1)


def tail_sums(values: Tensor) -> Tensor:
    """Return the sums of ``values[k:]`` for k = 0, ..., len(values), shape (len + 1,).

    They are summed from the small end, so the last entries keep their relative accuracy.
    """
    tails = values.flip(0).cumsum(0).flip(0)
    return torch.cat([tails, tails.new_zeros(1)])
