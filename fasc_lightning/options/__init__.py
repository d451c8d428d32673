"""Declarations, descriptions and checks of all options."""

from fasc_lightning.options._block_training import RefineOptions, Target
from fasc_lightning.options._calibration import CalibrationOptions, SketchOptions
from fasc_lightning.options._checks import ALLOCATIONS, CHEAP_METHOD, Allocation, check_budget
from fasc_lightning.options._compression import (
    FLAT,
    GROUPS,
    CompressionOptions,
    Refit,
    flat,
    flat_name,
    named,
    options_of,
    reported,
)
from fasc_lightning.options._described import Option, described, descriptions
from fasc_lightning.options._distillation import Distillation
from fasc_lightning.options._groups import (
    GATE_BY,
    PAPER,
    SKETCH_ABOVE,
    Calibration,
    Gate,
    GateScore,
    Memory,
    Monitor,
    ReductionKind,
    SketchSize,
    holds_moments,
)
from fasc_lightning.options._keywords import CompressionKeywords, PlanKeywords
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
from fasc_lightning.options._types import checks_options

__all__ = [
    "ALLOCATIONS",
    "CHEAP_METHOD",
    "FLAT",
    "GATE_BY",
    "GROUPS",
    "PAPER",
    "RATES",
    "SKETCH_ABOVE",
    "Allocation",
    "Calibration",
    "CalibrationOptions",
    "CompressionKeywords",
    "CompressionOptions",
    "Distillation",
    "FactorRecovery",
    "Gate",
    "GateScore",
    "LoraRecovery",
    "Memory",
    "Monitor",
    "Option",
    "PlanKeywords",
    "Precision",
    "Recovery",
    "ReductionKind",
    "RefineOptions",
    "Refit",
    "SketchOptions",
    "SketchSize",
    "Target",
    "as_recovery",
    "check_budget",
    "checks_options",
    "describe_recovery",
    "described",
    "descriptions",
    "flat",
    "flat_name",
    "holds_moments",
    "named",
    "options_of",
    "refine_options",
    "reported",
    "trained_factors",
]
