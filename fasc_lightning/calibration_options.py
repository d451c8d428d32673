"""What a calibration is told to gather: the options of a callback that decide it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info

from fasc_lightning.batches import LossTerms, TokenMask
from fasc_lightning.moments import LayerSketches
from fasc_lightning.offload import MomentsDevice
from fasc_lightning.pooled import Gradient
from fasc_lightning.refit_phase import Refit
from fasc_lightning.sketch_sizes import ReductionKind, SketchOptions, SketchSize, sketches_for_budget


@dataclass(frozen=True)
class CalibrationOptions:
    """Those options of :class:`~fasc_lightning.FascCallback` that decide what is gathered, under the same names."""

    method: str
    allocation: str
    refit: Refit
    update_weights: bool
    calibration_steps: int | None
    token_fraction: float
    seed: int
    loss_terms: LossTerms | None
    token_mask: TokenMask | None
    monitor_tokens: int
    rho_gradient: Gradient
    gate: float | None
    gate_by: str
    gate_exclude: str | list[str] | None
    rank: int | float | None
    keep: float | None
    rho_threshold: float
    sketch: ReductionKind | None
    sketch_size: SketchSize
    sketch_above: int
    moments_device: MomentsDevice | None
    passes: int
    recovery: object | None

    @classmethod
    def of(cls, options: Any) -> CalibrationOptions:
        """Return them out of an object that has them and others, as a callback does."""
        return cls(**{f.name: getattr(options, f.name) for f in fields(cls)})

    @property
    def sketching(self) -> SketchOptions | None:
        """What is to be sketched; None for exact moments."""
        if self.sketch is None:
            return None
        return SketchOptions(self.sketch, self.sketch_size, self.sketch_above, self.seed, self.rho_threshold)

    def sketches(
        self, shapes: Mapping[str, tuple[int, int]], rho: Mapping[str, float] | None = None
    ) -> dict[str, LayerSketches]:
        """Return how the moments of layers of these shapes (m, n) are sketched; nothing where they are all exact.

        Args:
            shapes: By layer.
            rho: Of the layers where it is known, which makes "auto" sizes smaller where it is low.
        """
        return sketches_for_budget(shapes, self.sketching, self.rank, self.keep, rho)

    def place(self, device: torch.device) -> torch.device:
        """Return where moments and factors are held in a fit on a device."""
        return device if self.moments_device is None else torch.device(self.moments_device)

    def without_replay(self, refines: bool, reason: str) -> CalibrationOptions:
        """Return the options of a calibration whose module no process can hold as a whole, and say so.

        Args:
            refines: Whether a refinement is asked for.
            reason: Why it cannot be held.

        Raises:
            MemoryError: If what is insisted on needs it.
        """
        if self.refit is True or refines or self.recovery is not None:
            what = "a refit" if self.refit is True else "a recovery"
            raise MemoryError(
                f"Expected room for the whole module on every process, which {what} needs, but {reason}. Leave that "
                "out (layers are then compressed one after the other), or run fewer processes with more memory each."
            )
        wanted = {"refit": bool(self.refit), "measuring of losses": self.allocation == "measured"}
        if left_out := [name for name, is_wanted in wanted.items() if is_wanted]:
            rank_zero_info(
                f"FascCallback: there will be no {' and no '.join(left_out)}, for which one process runs the whole "
                f"module, since {reason}. Layers are compressed one after the other, by predicted losses."
            )
        allocation = "fisher" if self.allocation == "measured" else self.allocation
        return replace(self, allocation=allocation, refit=False)
