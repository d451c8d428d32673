"""The factorisation that a solver returns, and the type of solvers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fasc_lightning.statistics import LayerMoments


@dataclass(frozen=True)
class Factorization:
    """Approximations of a layer's weight at all ranks: rank k is ``left[:, :k] @ right[:k]``.

    Attributes:
        left: Shape (m, r) with r = min(m, n).
        right: Shape (r, n).
        losses: The solver's objective at ranks 0, 1, ..., r, shape (r + 1,), float64, never increasing. The solver's
            docstring states their unit. They do not compare between methods, and between layers only if they estimate a
            squared change of the loss. :func:`~fasc_lightning.compression.fisher_losses` gives the losses of any
            solver's factors in one unit.
    """

    left: Tensor
    right: Tensor
    losses: Tensor

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the factors (m, rank) and (rank, n) of the best approximation of a rank."""
        return self.left[:, :rank], self.right[:rank]

    def to(self, device: torch.device | str) -> Factorization:
        """Return a copy with the factors on a device; the losses stay where they are."""
        return Factorization(self.left.to(device), self.right.to(device), self.losses)

    def checked(self, shape: tuple[int, int], solver: str) -> Factorization:
        """Return the factorisation if it is one of a weight; solvers may be a user's own.

        Args:
            shape: (m, n) of the weight.
            solver: Name of the solver, for messages.

        Raises:
            ValueError: If the shapes do not fit together and the weight, or if a loss is not finite.
        """
        m, n = shape
        r = len(self.losses) - 1
        expected = (m, r), (r, n), (r + 1,)
        found = tuple(tuple(part.shape) for part in (self.left, self.right, self.losses))
        if found != expected or not 1 <= r <= min(m, n):
            raise ValueError(
                f"Expected the solver {solver!r} to return left (m, r), right (r, n) and losses (r + 1,) for a weight "
                f"of shape {shape}, with r up to {min(m, n)}, but got {found[0]}, {found[1]} and {found[2]}."
            )
        if not bool(torch.isfinite(self.losses).all()):
            raise ValueError(
                f"Expected the solver {solver!r} to return finite losses but got NaN or Inf for a weight of shape "
                f"{shape}. HINT: moments may be singular; shrink() makes them invertible."
            )
        return self


Solver: TypeAlias = Callable[[Tensor, LayerMoments], Factorization]
