"""Declarations, descriptions and checks of all options."""

from fasc_lightning.options._allocations import (
    AllocationFunction,
    available_allocations,
    get_allocation,
    measures_losses,
    register_allocation,
)
from fasc_lightning.options._block_training import RefineOptions, Target
from fasc_lightning.options._calibration import CalibrationOptions, SketchOptions
from fasc_lightning.options._checks import CHEAP_METHOD, check_budget
from fasc_lightning.options._compression import CompressionOptions, Refit, flat, named, options_of, reported
from fasc_lightning.options._described import described
from fasc_lightning.options._distillation import Distillation
from fasc_lightning.options._groups import (
    GATE_BY,
    PAPER,
    Calibration,
    Gate,
    Memory,
    Monitor,
    ReductionKind,
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
    check_precision,
    refine_options,
    trained_factors,
)
from fasc_lightning.options._rounding import QUANTIZE_WORDS, SIZE_GRIDS, Quantize, QuantizeWord, as_size
from fasc_lightning.options._spellings import SPELLINGS, own_spelling
from fasc_lightning.options._types import checks_options

__all__ = [
    "CHEAP_METHOD",
    "GATE_BY",
    "PAPER",
    "QUANTIZE_WORDS",
    "RATES",
    "SIZE_GRIDS",
    "SPELLINGS",
    "AllocationFunction",
    "Calibration",
    "CalibrationOptions",
    "CompressionKeywords",
    "CompressionOptions",
    "Distillation",
    "FactorRecovery",
    "Gate",
    "LoraRecovery",
    "Memory",
    "Monitor",
    "PlanKeywords",
    "Precision",
    "Quantize",
    "QuantizeWord",
    "Recovery",
    "ReductionKind",
    "RefineOptions",
    "Refit",
    "SketchOptions",
    "Target",
    "as_recovery",
    "as_size",
    "available_allocations",
    "check_budget",
    "check_precision",
    "checks_options",
    "described",
    "flat",
    "get_allocation",
    "holds_moments",
    "measures_losses",
    "named",
    "options_of",
    "own_spelling",
    "refine_options",
    "register_allocation",
    "reported",
    "trained_factors",
]
