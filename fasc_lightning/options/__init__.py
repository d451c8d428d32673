"""Every option, declared, described and checked once."""

from fasc_lightning.options._block_training import RefineOptions, Target
from fasc_lightning.options._calibration import (
    SKETCH_ABOVE,
    CalibrationOptions,
    ReductionKind,
    Refit,
    SketchOptions,
    SketchSize,
    check_passes,
    check_projected,
    holds_moments,
)
from fasc_lightning.options._checks import (
    ALLOCATIONS,
    CHEAP_METHOD,
    GATE_BY,
    PAPER,
    check_budget,
    check_gate,
    check_moments_device,
    check_monitor,
    check_monitor_only,
    check_options,
)
from fasc_lightning.options._distillation import Distillation
from fasc_lightning.options._recovery import (
    RATES,
    FactorRecovery,
    LoraRecovery,
    Precision,
    Recovery,
    as_recovery,
    describe_recovery,
    refine_options,
    trained_factors,
)
from fasc_lightning.options._replacement import ReplacementOptions
from fasc_lightning.options._types import checks_options

__all__ = [
    "ALLOCATIONS",
    "CHEAP_METHOD",
    "GATE_BY",
    "PAPER",
    "RATES",
    "SKETCH_ABOVE",
    "CalibrationOptions",
    "Distillation",
    "FactorRecovery",
    "LoraRecovery",
    "Precision",
    "Recovery",
    "ReductionKind",
    "RefineOptions",
    "Refit",
    "ReplacementOptions",
    "SketchOptions",
    "SketchSize",
    "Target",
    "as_recovery",
    "check_budget",
    "check_gate",
    "check_moments_device",
    "check_monitor",
    "check_monitor_only",
    "check_options",
    "check_passes",
    "check_projected",
    "checks_options",
    "describe_recovery",
    "holds_moments",
    "refine_options",
    "trained_factors",
]
