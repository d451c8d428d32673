"""The options of the replacement at fit end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fasc_lightning.layers import Layout


@dataclass(frozen=True)
class ReplacementOptions:
    """What a :class:`~fasc_lightning.FascCallback` makes of a calibration, its options under the same names.

    Attributes:
        rank: See there.
        keep: Likewise.
        layout: Likewise.
        align: Likewise.
        method: Likewise.
        seed: Likewise.
        options: All that decide the result, for reports.
    """

    rank: int | float | None
    keep: float | None
    layout: Layout
    align: int
    method: str
    seed: int
    options: dict[str, Any]
