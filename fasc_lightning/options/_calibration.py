"""The options of a calibration: a copy of the callback's options, and values derived from them."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, fields

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from fasc_lightning.options._compression import CompressionOptions
from fasc_lightning.options._groups import SKETCH_ABOVE, ReductionKind, SketchSize


class CalibrationOptions(CompressionOptions):
    """A callback's options at the start of a fit.

    Attributes:
        replays: Whether a process can run the whole module again on batches.
    """

    replays = True

    @classmethod
    def of(cls, options: CompressionOptions) -> CalibrationOptions:
        """Return a copy of options that have been checked, such as a callback's."""
        made = object.__new__(cls)
        for field in fields(cls):
            setattr(made, field.name, getattr(options, field.name))
        return made

    @property
    @override
    def measures(self) -> bool:
        return self.replays and super().measures

    @property
    def sketching(self) -> SketchOptions | None:
        """Options of the sketches; None for exact moments."""
        if self.sketch is None:
            return None
        return SketchOptions(self.sketch, self.sketch_size, self.sketch_above, self.seed, self.rho_threshold)

    def place(self, device: torch.device) -> torch.device:
        """Return the device that holds moments and factors in a fit on a given device."""
        return device if self.moments_device is None else torch.device(self.moments_device)

    def without_replay(self, refines: bool, reason: str) -> CalibrationOptions:
        """Return the options of a calibration whose whole module fits into no process, and log what is left out.

        Args:
            refines: Whether a refinement is asked for.
            reason: Why the module does not fit.

        Raises:
            MemoryError: If a refit is required, or a refinement or a recovery asked for: they need the whole module.
        """
        if self.refit is True or refines or self.recovery is not None:
            what = "a refit" if self.refit is True else "a recovery"
            raise MemoryError(
                f"Expected room for the whole module on every process, which {what} needs, but {reason}. Leave that "
                "out (layers are then compressed one after the other), or run fewer processes with more memory each."
            )
        wanted = {
            "refit": bool(self.refit),
            "measuring of losses": self.measures,
            "second stage": self.stages > 1,
        }
        if left_out := [name for name, is_wanted in wanted.items() if is_wanted]:
            rank_zero_info(
                f"FascCallback: there will be no {' and no '.join(left_out)}, for which one process runs the whole "
                f"module, since {reason}. Layers are compressed one after the other, by predicted losses."
            )
        made = copy(self)
        made.allocation = "fisher" if self.allocation == "measured" else self.allocation
        made.refit = made.replays = False
        made.stages = 1
        return made


@dataclass(frozen=True)
class SketchOptions:
    """Kind and size of sketches.

    Attributes:
        kind: "projected" holds wider sides as the layer's weight sees them (``statistics/_projected.py``) and ignores
            the other options. "range", or for comparison "gaussian", sketches (``statistics/_sketch.py``).
        size: Columns of the sketch, or "auto".
        above: Width up to which sides of layers stay exact.
        seed: Seed of the random matrices.
        threshold: rho up to which "auto" takes the smaller size.
    """

    kind: ReductionKind = "range"
    size: SketchSize = "auto"
    above: int = SKETCH_ABOVE
    seed: int = 0
    threshold: float = 0.3
