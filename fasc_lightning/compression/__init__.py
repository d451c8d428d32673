"""Factorisation of layers, allocation of a budget, low-rank replacements, and the report."""

from fasc_lightning.compression._allocation import (
    Candidate,
    StorageOptions,
    allocate_fisher,
    allocate_uniform,
    least_cost,
    spend,
)
from fasc_lightning.compression._budget import (
    FLOAT_BYTES,
    byte_budget,
    check_fits,
    halfway_share,
    layer_budgets,
    layers_dtype,
    layout_cost,
    wanted_refit,
)
from fasc_lightning.compression._build import (
    CompressionResult,
    LayerChoice,
    build_layers,
    compress_layers,
    same_everywhere,
)
from fasc_lightning.compression._disk_factors import offload_to_disk
from fasc_lightning.compression._expert_report import expert_table
from fasc_lightning.compression._factorize import FactorizedLayers, Unit, factorize_layers
from fasc_lightning.compression._figure import allocation_figure
from fasc_lightning.compression._gate import (
    choose_methods,
    excluded_layers,
    failure_flags,
    gate_scores,
    statistics_needed,
)
from fasc_lightning.compression._layer_report import LayerReport
from fasc_lightning.compression._loss_correction import Approximation, evenly_spaced, measure_losses, run_batches
from fasc_lightning.compression._objective import fisher_losses, fisher_metric
from fasc_lightning.compression._report import CompressionReport, log_report, report_metrics
from fasc_lightning.compression._rounding import RoundedLayers, build_rounded, round_layers
from fasc_lightning.compression._state_schema import check_callback_state, check_recovery_state, sealed
from fasc_lightning.compression._summary import outcome, recovery_line
from fasc_lightning.options import AllocationFunction, available_allocations, register_allocation

__all__ = [
    "FLOAT_BYTES",
    "AllocationFunction",
    "Approximation",
    "Candidate",
    "CompressionReport",
    "CompressionResult",
    "FactorizedLayers",
    "LayerChoice",
    "LayerReport",
    "RoundedLayers",
    "StorageOptions",
    "Unit",
    "allocate_fisher",
    "allocate_uniform",
    "allocation_figure",
    "available_allocations",
    "build_layers",
    "build_rounded",
    "byte_budget",
    "check_callback_state",
    "check_fits",
    "check_recovery_state",
    "choose_methods",
    "compress_layers",
    "evenly_spaced",
    "excluded_layers",
    "expert_table",
    "factorize_layers",
    "failure_flags",
    "fisher_losses",
    "fisher_metric",
    "gate_scores",
    "halfway_share",
    "layer_budgets",
    "layers_dtype",
    "layout_cost",
    "least_cost",
    "log_report",
    "measure_losses",
    "offload_to_disk",
    "outcome",
    "recovery_line",
    "register_allocation",
    "report_metrics",
    "round_layers",
    "run_batches",
    "same_everywhere",
    "sealed",
    "spend",
    "statistics_needed",
    "wanted_refit",
]
