"""Second moments of a layer's wider side, projected through the weight: exact, and as small as the narrower side.

The solver of ``fasc`` (:func:`~fasc_lightning.solvers.two_sided`) reads the moment of the wider side in one place
only: W A W^T for wide inputs, W^T G W for wide outputs. These are the second moments of W x and of W^T h. While the
weights do not change, they can be summed in place of A and G. Nothing is lost, and a (4096, 14336) layer holds two
matrices of width 4096. A sketch of the same memory has a larger error and is slower to rebuild.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fasc_lightning.statistics._packed import add_gram_, packed_size, unpack

#: Value of the option ``sketch``, beside the kinds of sketches.
ProjectedKind = Literal["projected"]


@dataclass(frozen=True, eq=False)
class ProjectedMoment:
    """A symmetric positive semidefinite matrix S of which W S W^T and the mean of the diagonal are known.

    Attributes:
        matrix: W S W^T, shape (r, r), for the layer's W or its transpose, whichever has the wider side as columns.
        level: Mean of the diagonal of S, a scalar.
        features: d, the width of S.
        ridge: Factor of an identity added to S, a scalar.
    """

    matrix: Tensor
    level: Tensor
    features: int
    ridge: Tensor | float = 0.0

    #: The moment is exact.
    error: ClassVar[float] = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return self.features, self.features

    def diagonal(self) -> Tensor:
        """Return the mean of the diagonal of S in place of each entry, shape (d,)."""
        return (self.level + self.ridge).expand(self.features)

    def double(self) -> ProjectedMoment:
        """Return S in float64."""
        return ProjectedMoment(self.matrix.double(), self.level.double(), self.features, self.ridge)

    def to(self, device: torch.device | str) -> ProjectedMoment:
        """Return S on a device."""
        return ProjectedMoment(self.matrix.to(device), self.level.to(device), self.features, self.ridge)

    def shrunk(self, amount: float) -> ProjectedMoment:
        """Return (1 - amount) S + amount * mean(diag S) * I."""
        ridge = (1 - amount) * self.ridge + amount * (self.level + self.ridge)
        return ProjectedMoment((1 - amount) * self.matrix, (1 - amount) * self.level, self.features, ridge)

    def congruence(self, W: Tensor) -> Tensor:
        """Return W S W^T, shape (r, r), for the W of the sums, shape (r, d), in any floating dtype.

        The ridge is a small part of S, so the products of W alone are computed in W's dtype.
        """
        r = len(W)
        return self.matrix + self.ridge * unpack(add_gram_(W.new_zeros(packed_size(r)), W.T), r)

    def apply(self, X: Tensor) -> Tensor:
        """Refuse: see :meth:`dense`."""
        del X
        return self.dense()

    def dense(self) -> Tensor:
        """Refuse to return S.

        Raises:
            ValueError: Always: S is not known.
        """
        raise ValueError(
            f"Expected the second moment of width {self.features} as a matrix, but sketch='projected' holds only what "
            "the layer's weight lets through of it. HINT: sketch=None, or 'range'."
        )


@dataclass(frozen=True)
class Projection:
    """Sums of the second moment of a wider side: products of W x (or W^T h), and the squares of x (or h).

    The sums are one flat tensor, whose layout only this class knows.

    Attributes:
        features: d, the width of the moment.
        size: r, the width of the layer's other side, less than d.

    Raises:
        ValueError: If the size is not in 1 ... d - 1.
    """

    features: int
    size: int

    kind: ClassVar[ProjectedKind] = "projected"

    def __post_init__(self) -> None:
        if not 1 <= self.size < self.features:
            raise ValueError(
                f"Expected a side narrower than the one of width {self.features} that is projected but got {self.size}."
            )

    @property
    def numbers(self) -> int:
        """The count of numbers in the sums."""
        return packed_size(self.size) + 1

    def add_(self, sums: Tensor, X: Tensor, weight: float, seen: Tensor) -> None:
        """Add rows to the sums, in place.

        Args:
            sums: Shape (numbers,).
            X: Rows of the wider side, shape (tokens, d).
            weight: Factor of all products.
            seen: Product of the rows and the weight, shape (tokens, r).
        """
        sums[-1].add_(X.square().sum(), alpha=weight)
        add_gram_(sums[:-1], seen, weight)

    def diagonal(self, sums: Tensor) -> Tensor:
        """Return the mean of the diagonal of the sums in place of each entry, shape (d,)."""
        return (sums[-1] / self.features).expand(self.features)

    def second_moment(self, sums: Tensor) -> ProjectedMoment:
        """Return the moment of the sums."""
        return ProjectedMoment(unpack(sums[:-1], self.size), sums[-1] / self.features, self.features)
