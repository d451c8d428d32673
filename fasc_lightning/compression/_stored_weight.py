"""The ways to store a layer's matrix in few bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch import Tensor

from fasc_lightning.compression._loss_correction import Approximation
from fasc_lightning.layers import INT8_ROWS, Rounded


@dataclass(frozen=True)
class RoundedWeight:
    """One layer's matrix on a grid.

    Attributes:
        weight: The matrix.
        loss: J, in nats squared per token; NaN if no gradient, or only zeros, reached the layer.
    """

    weight: Rounded
    loss: float

    #: Share of the logarithm of measured / predicted J that is believed. Codes follow the tokens less than factors do:
    #: over the layers of SmolLM2-135M, J of the fitted tokens and of other text go together (their logarithms
    #: correlate by 0.98).
    trust: ClassVar[float] = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of the stored matrix."""
        return self.weight.grid.nbytes(*self.weight.codes.shape)

    @property
    def approximation(self) -> Approximation:
        """The matrix, for a measurement."""
        return self.weight


@dataclass(frozen=True)
class LowRankWeight:
    """One layer's factors of one rank, which take int8.

    Attributes:
        left: Left factor, (m, k).
        right: Right factor, (k, n).
        loss: J before the factors are rounded, which adds a few percent.
    """

    left: Tensor
    right: Tensor
    loss: float

    trust: ClassVar[float] = 0.5

    @property
    def nbytes(self) -> int:
        """Bytes of both factors in int8, each with a scale for each of its outputs."""
        return low_rank_bytes(len(self.left), self.right.shape[1], len(self.right))

    @property
    def approximation(self) -> Approximation:
        """The factors, for a measurement."""
        return self.left, self.right


@dataclass(frozen=True)
class ResidualWeight:
    """One layer's matrix on a grid, and factors of its error, which take int8.

    Attributes:
        weight: The matrix.
        left: Left factor, (m, k).
        right: Right factor, (k, n).
        loss: J before the factors are rounded.
    """

    weight: Rounded
    left: Tensor
    right: Tensor
    loss: float

    trust: ClassVar[float] = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix and of both factors."""
        m, n = self.weight.codes.shape
        return self.weight.grid.nbytes(m, n) + low_rank_bytes(m, n, len(self.right))

    @property
    def approximation(self) -> Approximation:
        """The matrix and the factors, for a measurement."""
        return self.weight, self.left, self.right


StoredWeight: TypeAlias = RoundedWeight | LowRankWeight | ResidualWeight


def low_rank_bytes(m: int, n: int, k: int) -> int:
    """Return the bytes of factors (m, k) and (k, n) in int8 with a scale for each output."""
    return INT8_ROWS.nbytes(m, k) + INT8_ROWS.nbytes(k, n)
