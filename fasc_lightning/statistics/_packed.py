"""Packed symmetric storage: only the panels at and below the diagonal are held."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Widest panel of a packed matrix: wide enough for products at full speed, narrow enough to skip nearly half of the
#: square.
PANEL = 384


def panel_bounds(d: int) -> list[tuple[int, int]]:
    """Return the column ranges of a packed (d, d) matrix: at least three panels, unless they would be narrow."""
    width = min(PANEL, max(64, -(-d // 3)))
    return [(start, min(start + width, d)) for start in range(0, d, width)]


def packed_size(d: int) -> int:
    """Return the count of numbers in a packed symmetric (d, d) matrix."""
    return sum((d - start) * (stop - start) for start, stop in panel_bounds(d))


def panels(packed: Tensor, d: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, rows start..d of columns start..stop) of a packed matrix, as views.

    Args:
        packed: Shape (packed_size(d),).
        d: Width of the matrix.
    """
    offset = 0
    for start, stop in panel_bounds(d):
        size = (d - start) * (stop - start)
        yield start, stop, packed[offset : offset + size].view(d - start, stop - start)
        offset += size


def add_gram_(packed: Tensor, X: Tensor, weight: float = 1.0, Y: Tensor | None = None) -> Tensor:
    """Add ``weight X^T X``, or a symmetric ``weight X^T Y``, to a packed matrix, in place.

    Only the panels at and below the diagonal exist, which saves up to 3/8 of the work and memory of a full product.

    Args:
        packed: Shape (packed_size(d),).
        X: Rows to add, shape (tokens, d), same dtype and device as ``packed``.
        weight: Factor of the product.
        Y: Shape (tokens, d), with X^T Y symmetric, as for Y = S X with a symmetric S; X by default.

    Returns:
        ``packed``.
    """
    Y = X if Y is None else Y
    for start, stop, panel in panels(packed, X.shape[1]):
        panel.addmm_(X[:, start:].T, Y[:, start:stop], alpha=weight)
    return packed


def unpack(packed: Tensor, d: int) -> Tensor:
    """Return the symmetric matrix (d, d) of a packed one."""
    full = packed.new_empty(d, d)
    for start, stop, panel in panels(packed, d):
        full[start:, start:stop] = panel
        full[start:stop, start:] = panel.T
    return full


def packed_diagonal(packed: Tensor, d: int) -> Tensor:
    """Return the diagonal of a packed matrix, shape (d,)."""
    return torch.cat([panel[: stop - start].diagonal() for start, stop, panel in panels(packed, d)])
