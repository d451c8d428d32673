"""Studies of rho and the cost of compression: statistics, comparisons, tables."""

from fasc_lightning.studies.rho._gather import Observation, backward_windows, gather, window_scores
from fasc_lightning.studies.rho._held_out_losses import HeldoutLosses
from fasc_lightning.studies.rho._nearest_kronecker import refine_kronecker
from fasc_lightning.studies.rho._subspaces import (
    LayerComparison,
    compare_layer,
    input_subspace,
    log_ratio,
    principal_angles,
)
from fasc_lightning.studies.rho._tables import (
    SCORES,
    angles_table,
    correlations_table,
    divisions,
    gains_table,
    layer_row,
    median,
    profile_table,
    size_correlations,
    sizes_table,
)

__all__ = [
    "SCORES",
    "HeldoutLosses",
    "LayerComparison",
    "Observation",
    "angles_table",
    "backward_windows",
    "compare_layer",
    "correlations_table",
    "divisions",
    "gains_table",
    "gather",
    "input_subspace",
    "layer_row",
    "log_ratio",
    "median",
    "principal_angles",
    "profile_table",
    "refine_kronecker",
    "size_correlations",
    "sizes_table",
    "window_scores",
]
