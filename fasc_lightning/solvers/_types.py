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


Solver: TypeAlias = Callable[[Tensor, LayerMoments], Factorization]
