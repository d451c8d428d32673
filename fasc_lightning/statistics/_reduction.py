"""Sums of a second moment, packed or reduced by a sketch or a projection."""

from __future__ import annotations

from torch import Tensor

from fasc_lightning.statistics._packed import add_gram_, packed_diagonal, packed_size, unpack
from fasc_lightning.statistics._projected import Projection
from fasc_lightning.statistics._second_moments import SecondMoment
from fasc_lightning.statistics._sketch import Sketch

#: Ways to hold less than the whole second moment.
Reduction = Sketch | Projection


def second_moment_size(d: int, sketch: Reduction | None) -> int:
    """Return the count of numbers that a second moment of width d holds, packed or reduced."""
    return packed_size(d) if sketch is None else sketch.numbers


def add_second_moment_(
    sums: Tensor, sketch: Reduction | None, X: Tensor, weight: float, seen: Tensor | None = None
) -> None:
    """Add ``weight X^T X`` to the sums of a second moment, packed or reduced, in place.

    Args:
        sums: Sums of the moment.
        sketch: Sketch or projection of the moment; None for a packed one.
        X: Rows, shape (tokens, d).
        weight: Factor of all products.
        seen: Product of the rows and the layer's weight, for a projection.
    """
    if sketch is None:
        add_gram_(sums, X, weight)
    elif isinstance(sketch, Projection):
        if seen is None:
            raise ValueError("Expected the rows times the layer's weight, for a projected moment, but got None.")
        sketch.add_(sums, X, weight, seen)
    else:
        sketch.add_(sums, X, weight)


def second_moment(sums: Tensor, d: int, sketch: Reduction | None, divisor: Tensor) -> SecondMoment:
    """Return sums over a divisor: a matrix (d, d) of packed sums, or the moment rebuilt from reduced ones."""
    divisor = divisor.to(sums.dtype)
    return unpack(sums, d).div_(divisor) if sketch is None else sketch.second_moment(sums / divisor)


def second_moment_diagonal(sums: Tensor, d: int, sketch: Reduction | None) -> Tensor:
    """Return the diagonal of packed or reduced sums, shape (d,)."""
    return packed_diagonal(sums, d) if sketch is None else sketch.diagonal(sums)
