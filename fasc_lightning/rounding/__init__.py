"""Rounding of matrices to grids of few bits: to the nearest, and calibrated by moments."""

from fasc_lightning.rounding._grid import fit_grid, to_nearest
from fasc_lightning.rounding._matrix import round_by_moments, round_matrix, rounding_loss
from fasc_lightning.rounding._sweep import ColumnMetric, refine, sweep

__all__ = [
    "ColumnMetric",
    "fit_grid",
    "refine",
    "round_by_moments",
    "round_matrix",
    "rounding_loss",
    "sweep",
    "to_nearest",
]
