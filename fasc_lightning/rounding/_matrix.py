"""The rounding of one matrix by its moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasc_lightning.layers import Grid, Rounded
from fasc_lightning.rounding._grid import fit_grid, nearest
from fasc_lightning.rounding._sweep import ColumnMetric, refine, sweep
from fasc_lightning.statistics import SecondMoment, dense

#: Passes of coordinate descent after the sweep.
PASSES = 2

#: Bits from which scales stay as they are: a new scale is rounded to 16 bits, which moves large codes by half a step.
FIXED_SCALES = 8

#: Share of the plain A in the A that the sweep sees, best on text that nothing was fitted to (docs/bytes.md).
PLAIN_SHARE = 0.25


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


def blended(A: Tensor, plain: Tensor) -> Tensor:
    """Return the A of the sweep: coupled, with a share of the plain A at the same trace; shape (n, n).

    The coupled A weighs tokens by the lengths of their gradients, so that few tokens decide. Of the tokens of a
    calibration these are too few, and codes fitted to them lose more on other text.

    Args:
        A: Coupled A, shape (n, n).
        plain: Plain A of the same tokens, shape (n, n).
    """
    total, other = A.trace(), plain.trace()
    return A if other <= 0 else torch.lerp(A, plain * (total / other), PLAIN_SHARE)


def round_by_moments(
    W: Tensor,
    A: SecondMoment,
    G: SecondMoment,
    grids: Sequence[Grid],
    *,
    plain: SecondMoment | None = None,
    calibrated: bool = True,
) -> list[tuple[Rounded, float]]:
    """Round a matrix to several grids; each result has the loss J, which is never above that of the nearest numbers.

    Args:
        W: Matrix, shape (m, n).
        A: Second moment of its inputs, shape (n, n).
        G: Second moment of the gradients at its outputs, shape (m, m).
        grids: The grids.
        plain: Plain A, if ``A`` is coupled: see :func:`blended`. J does not see it.
        calibrated: False takes the nearest numbers only.

    Raises:
        ValueError: If W is not finite.
    """
    W, A, G = W.float(), dense(A).float(), dense(G).float()
    seen = A if plain is None else blended(A, dense(plain).float())
    metric = ColumnMetric.of(seen) if calibrated else None
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
