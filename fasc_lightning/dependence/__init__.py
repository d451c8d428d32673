"""rho, the dependence violation score: estimators, streaming metric, history, monitor and figures."""

from fasc_lightning.dependence._emergence import check_emergence_options, emergence
from fasc_lightning.dependence._figures import (
    Metrics,
    angles_figure,
    rho_gain_scatter,
    rho_heatmap,
    rho_profile,
    save_figure,
    training_figure,
)
from fasc_lightning.dependence._history import COLUMNS, RhoHistory, RhoRow
from fasc_lightning.dependence._history_files import CSV_FILE, draw_history, save_figures
from fasc_lightning.dependence._hsic import MIN_TOKENS
from fasc_lightning.dependence._layer_scores import LayerScores, Sample
from fasc_lightning.dependence._monitor import rho_metrics
from fasc_lightning.dependence._phase import MonitorPhase, monitor_of
from fasc_lightning.dependence._pooled import PooledDependenceScore
from fasc_lightning.dependence._reading import MIN_ROWS, SUMS
from fasc_lightning.dependence._rho import debiased_rho, iid_floor, pooled_rho, rho
from fasc_lightning.dependence._saved_history import other_targets
from fasc_lightning.dependence._streaming import DependenceScore
from fasc_lightning.dependence._summary import counted, describe, reasons

__all__ = [
    "COLUMNS",
    "CSV_FILE",
    "MIN_ROWS",
    "MIN_TOKENS",
    "SUMS",
    "DependenceScore",
    "LayerScores",
    "Metrics",
    "MonitorPhase",
    "PooledDependenceScore",
    "RhoHistory",
    "RhoRow",
    "Sample",
    "angles_figure",
    "check_emergence_options",
    "counted",
    "debiased_rho",
    "describe",
    "draw_history",
    "emergence",
    "iid_floor",
    "monitor_of",
    "other_targets",
    "pooled_rho",
    "reasons",
    "rho",
    "rho_gain_scatter",
    "rho_heatmap",
    "rho_metrics",
    "rho_profile",
    "save_figure",
    "save_figures",
    "training_figure",
]
