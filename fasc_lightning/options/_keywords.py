"""The keywords of functions that take options, for editors and type checkers."""

from __future__ import annotations

from typing import Literal, TypedDict

from fasc_lightning.layers import Layout
from fasc_lightning.options._compression import Refit
from fasc_lightning.options._groups import Calibration, Gate, Memory, Monitor, ReductionKind
from fasc_lightning.options._recovery import FactorRecovery, LoraRecovery
from fasc_lightning.options._rounding import Quantize, QuantizeWord


class PlanKeywords(TypedDict, total=False):
    """The fields of :class:`CompressionOptions` except ``memory``, and ``ignore``; a test compares the two."""

    rank: int | float | None
    keep: float | None
    size: float | str | None
    method: str
    targets: str | list[str] | None
    exclude: str | list[str] | None
    ignore: str | list[str] | None
    allocation: str
    layout: Layout
    align: int
    refit: Refit
    quantize: QuantizeWord | Quantize | None
    recovery: Literal["lora", "factors"] | LoraRecovery | FactorRecovery | None
    seed: int
    calibration: Calibration | None
    monitor: Monitor | int | None
    gate: Gate | float | None


class CompressionKeywords(PlanKeywords, total=False):
    """The fields of :class:`CompressionOptions`, which describes them, and ``ignore``; a test compares the two."""

    memory: Memory | ReductionKind | None
