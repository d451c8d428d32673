"""The choice of a grid's scales and zero points, and rounding to the nearest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasc_lightning.layers import SCALE_DTYPE, Grid, Rounded

#: Shares of a group's range that its grid may span. A narrower grid clips the largest weights and is finer elsewhere.
SPANS = tuple(1 - i / 32 for i in range(20))

#: Numbers of a matrix that are tried at a time, so that they stay in a CPU's cache.
CHUNK = 2**18


def fit_grid(W: Tensor, grid: Grid, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose scales and zero points of W: those with the least weighted error of rounding to the nearest.

    Each group tries grids over :data:`SPANS` of its range; the range always includes zero.

    Args:
        W: Matrix, shape (m, n), float32.
        grid: The grid.
        weights: Weight of each input's squared error, shape (n,), such as the diagonal of A; None for equal weights.

    Returns:
        Scales, float32 with values of :data:`SCALE_DTYPE`, and zero points, uint8, both of shape (m, groups).

    Raises:
        ValueError: If W is not finite.
    """
    if not bool(torch.isfinite(W).all()):
        raise ValueError(f"Expected finite weights to round but a {tuple(W.shape)} matrix holds NaN or infinity.")
    m, n = W.shape
    groups = grid.groups(n)
    size = n if grid.group is None else grid.group
    # Inputs that fill the last group weigh nothing.
    W = torch.nn.functional.pad(W, (0, groups * size - n)).view(m, groups, size)
    weights = torch.ones(n, dtype=W.dtype, device=W.device) if weights is None else weights.to(W)
    weights = torch.nn.functional.pad(weights, (0, groups * size - n)).view(groups, size)
    rows = max(1, CHUNK // (groups * size))
    scales, zeros = zip(*(_fit_rows(part, grid, weights) for part in W.split(rows)), strict=True)
    return torch.cat(scales), torch.cat(zeros).to(torch.uint8)


def _fit_rows(W: Tensor, grid: Grid, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and zero points of W, shape (rows, groups, size); both of shape (rows, groups)."""
    low, high = W.amin(-1).clamp(max=0), W.amax(-1).clamp(min=0)
    best = torch.full_like(low, math.inf)
    scale, zero = torch.empty_like(low), torch.empty_like(low)
    for span in SPANS:
        s, z = _span(low * span, high * span, grid)
        wide, first = s[..., None], -z[..., None]
        found = (W / wide).round_().clamp_(first, first + grid.levels - 1)  # codes without the zero point
        error = torch.linalg.vecdot(found.mul_(wide).sub_(W).square_(), weights)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def _span(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero point of grids that span from ``low`` to ``high``."""
    least = torch.finfo(torch.float32).tiny * grid.levels  # a group of zeros has a scale, too
    if grid.symmetric:
        reach = torch.maximum(-low, high) / (grid.middle - 0.5)
        scale = _stored(reach.clamp(min=least))
        return scale, torch.full_like(scale, grid.middle)
    scale = _stored(((high - low) / (grid.levels - 1)).clamp(min=least))
    return scale, torch.round(-low / scale).clamp(0, grid.levels - 1)


def _stored(scale: Tensor) -> Tensor:
    """Return scales with values of :data:`SCALE_DTYPE`, in their own type."""
    return scale.to(SCALE_DTYPE).to(scale.dtype)


def to_nearest(W: Tensor, grid: Grid, weights: Tensor | None = None) -> Rounded:
    """Round each number of W to the nearest of its grid.

    Args:
        W: Matrix, shape (m, n), float32.
        grid: The grid.
        weights: As in :func:`fit_grid`.

    Raises:
        ValueError: If W is not finite.
    """
    return nearest(W, grid, *fit_grid(W, grid, weights))


def nearest(W: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> Rounded:
    """Round each number of W (m, n), float32, to the nearest of a grid with given scales and zero points."""
    columns = grid.columns(W.shape[1], W.device)
    codes = (torch.round(W / scale[:, columns]) + zero[:, columns]).clamp_(0, grid.levels - 1)
    return Rounded(grid, codes.to(torch.uint8), scale, zero)
