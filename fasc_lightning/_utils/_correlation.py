"""Correlations of two series, with p-values."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fasc_lightning._utils._optional import require


class Correlation(NamedTuple):
    """Pearson's and Spearman's correlation, each with its p-value, and the number of pairs."""

    r: float
    p: float
    rank_r: float
    rank_p: float
    pairs: int


def correlate(x: ArrayLike, y: ArrayLike) -> Correlation:
    """Return the correlations of the finite pairs; NaN for fewer than three pairs or a constant series.

    The p-values assume independent pairs. Layers of one model are not independent, so there they are lower bounds.

    Raises:
        ModuleNotFoundError: If scipy is not installed.
    """
    require("Correlations need", "plot", "scipy")
    from scipy.stats import pearsonr, spearmanr

    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    if len(a) < 3 or not np.ptp(a) or not np.ptp(b):
        return Correlation(math.nan, math.nan, math.nan, math.nan, len(a))
    (r, p), (rank_r, rank_p) = pearsonr(a, b), spearmanr(a, b)
    return Correlation(float(r), float(p), float(rank_r), float(rank_p), len(a))
