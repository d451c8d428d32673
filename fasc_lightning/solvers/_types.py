"""What a solver returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fasc_lightning.statistics import LayerMoments


@dataclass(frozen=True)
class Factorization:
    """All ranks of a layer's approximation at once: the rank-k one is ``left[:, :k] @ right[:k]``.

    Attributes:
        left: Shape (m, r) with r = min(m, n).
        right: Shape (r, n).
        losses: The solver's objective at ranks 0, 1, ..., r, shape (r + 1,), float64, never increasing. In a unit of
            its own, which the solver's docstring states: not comparable between methods, and between layers only
            where it estimates a squared change of the loss. :func:`~fasc_lightning.compression.fisher_losses` puts any
            solver's factors into one unit.
    """

    left: Tensor
    right: Tensor
    losses: Tensor

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return factors (m, rank) and (rank, n) of the best approximation of that rank."""
        return self.left[:, :rank], self.right[:rank]

    def to(self, device: torch.device | str) -> Factorization:
        """Return the same with factors on a device; losses stay where they are."""
        return Factorization(self.left.to(device), self.right.to(device), self.losses)


Solver: TypeAlias = Callable[[Tensor, LayerMoments], Factorization]
