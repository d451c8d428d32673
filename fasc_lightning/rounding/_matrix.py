"""The rounding of one matrix by its moments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fasc_lightning.layers import Grid, Rounded
from fasc_lightning.rounding._grid import fit_grid, nearest
from fasc_lightning.rounding._sweep import ColumnMetric, refine, sweep
from fasc_lightning.statistics import SecondMoment, dense

#: Passes of coordinate descent after the sweep.
PASSES = 2

#: Bits from which scales stay as they are: a new scale is rounded to 16 bits, which moves large codes by half a step.
FIXED_SCALES = 8


def round_matrix(W: Tensor, metric: ColumnMetric, grid: Grid, passes: int = PASSES) -> Rounded:
    """Round a matrix so that tr(D A D^T), D = W - W', is small: a sweep, then coordinate descent.

    Args:
        W: Matrix, shape (m, n).
        metric: A, prepared.
        grid: The grid.
        passes: Passes of coordinate descent.

    Raises:
        ValueError: If W is not finite.
    """
    W = W.float()
    return _round(W, metric, grid, *fit_grid(W, grid, metric.A.diagonal()), passes)


def _round(W: Tensor, metric: ColumnMetric, grid: Grid, scale: Tensor, zero: Tensor, passes: int) -> Rounded:
    found = Rounded(grid, sweep(W, metric, grid, scale, zero), scale, zero)
    return refine(W, found, metric, passes, scales=grid.bits < FIXED_SCALES)


def rounding_loss(W: Tensor, rounded: Rounded, A: Tensor, G: Tensor) -> float:
    """Return J = tr(G D A D^T), D = W - W', in nats squared per token, computed in the moments' type.

    Args:
        W: Matrix, shape (m, n).
        rounded: W' on a grid.
        A: Shape (n, n).
        G: Shape (m, m).
    """
    D = (W - rounded.dequantize()).to(A.dtype)
    return float(((G @ D) * (D @ A)).sum().clamp(min=0))


def round_by_moments(
    W: Tensor,
    A: SecondMoment,
    G: SecondMoment,
    grids: Sequence[Grid],
    *,
    calibrated: bool = True,
) -> list[tuple[Rounded, float]]:
    """Round a matrix to several grids; each result has the loss J, which is never above that of the nearest numbers.

    Args:
        W: Matrix, shape (m, n).
        A: Second moment of its inputs, shape (n, n).
        G: Second moment of the gradients at its outputs, shape (m, m).
        grids: The grids.
        calibrated: False takes the nearest numbers only.

    Raises:
        ValueError: If W is not finite.
    """
    W, A, G = W.float(), dense(A).float(), dense(G).float()
    metric = ColumnMetric.of(A) if calibrated else None
    results = []
    for grid in grids:
        scale, zero = fit_grid(W, grid, None if metric is None else metric.A.diagonal())
        candidates = [nearest(W, grid, scale, zero)]
        if metric is not None:
            candidates.append(_round(W, metric, grid, scale, zero, PASSES))
        losses = [rounding_loss(W, candidate, A, G) for candidate in candidates]
        best = min(range(len(candidates)), key=losses.__getitem__)
        results.append((candidates[best], losses[best]))
    return results
