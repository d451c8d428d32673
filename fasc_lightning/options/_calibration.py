"""What a calibration is told to gather: the options of a callback that decide it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info

from fasc_lightning.batches import LossTerms, TokenMask
from fasc_lightning.layers import Gradient
from fasc_lightning.statistics import MomentsDevice


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


#: Width above which the paper sketches (Shihab et al., section 2.3).
SKETCH_ABOVE = 4096

#: How second moments can be held that are too large.
ReductionKind = Literal["projected", "range", "gaussian"]

#: An absolute size, or "auto" (:func:`auto_size`).
SketchSize = int | Literal["auto"]


@dataclass(frozen=True)
class SketchOptions:
    """What is to be sketched, and how.

    Attributes:
        kind: "projected" holds wider sides as the layer's weight sees them (``statistics/_projected.py``), for
            which no other option counts; "range", or for comparison "gaussian", sketches
            (``statistics/_sketch.py``).
        size: Columns of the sketch, or "auto".
        above: Sides of layers no wider than this stay exact.
        seed: Of the random matrices.
        threshold: rho up to which "auto" takes the smaller size.

    Raises:
        ValueError: If one is out of range.
    """

    kind: ReductionKind = "range"
    size: SketchSize = "auto"
    above: int = SKETCH_ABOVE
    seed: int = 0
    threshold: float = 0.3

    def __post_init__(self) -> None:
        if self.kind not in get_args(ReductionKind):
            kinds = ", ".join(get_args(ReductionKind))
            raise ValueError(f"Expected `sketch` to be one of {kinds}, or None, but got {self.kind!r}.")
        if self.size != "auto" and (not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1):
            raise ValueError(f'Expected `sketch_size` to be "auto" or an int of at least 1 but got {self.size!r}.')
        if self.above < 0:
            raise ValueError(f"Expected `sketch_above` to be a width of at least 0 but got {self.above}.")


def check_passes(passes: int, update_weights: bool, refit: object, calibration_steps: int | None) -> None:
    """Check the number of passes against the options that it rules out.

    Raises:
        ValueError: With the remedy.
    """
    if type(passes) is not int or passes < 1:
        raise ValueError(f"Expected `passes` to be a positive int but got {passes!r}.")
    if passes == 1:
        return
    if update_weights:
        raise ValueError(
            f"Expected update_weights=False with {passes=}: every pass has to see the same weights. HINT: "
            "FascCallback(..., update_weights=False) freezes them, as compress() does."
        )
    if refit is True:
        raise ValueError(
            f"Expected refit=False or 'auto' with {passes=} but got True: a refit reads the moments of all layers in "
            "the end, and several passes are for moments that are not there together."
        )
    if calibration_steps is not None:
        raise ValueError(
            f"Expected either `passes` or `calibration_steps` but got {passes=} and {calibration_steps=}: a pass is "
            "an epoch."
        )


def holds_moments(passes: int, sketch: str | None) -> bool:
    """Tell whether the whole moments of all layers are there in the end, as a refit reads them."""
    return passes == 1 and sketch != "projected"


def check_projected(sketch: object, method: str, gate: float | None, update_weights: bool, refit: object) -> None:
    """Check ``sketch="projected"`` against the options that it does not serve.

    Raises:
        ValueError: With the remedy.
    """
    if sketch != "projected":
        return
    wanted: dict[str, tuple[bool, Any, str]] = {
        "update_weights": (update_weights, False, "it sums what the weights let through, which have to stay the same"),
        "method": (method != "fasc", "fasc", "the other solvers read whole moments"),
        "gate": (gate is not None, None, "the cheap solver reads whole moments"),
        "refit": (refit is True, "auto", "a refit reads whole moments"),
    }
    for name, (wrong, value, reason) in wanted.items():
        if wrong:
            raise ValueError(
                f"Expected {name}={value!r} with sketch='projected', since {reason}. HINT: that, or sketch='range'."
            )


#: "auto" refits where a module allows it and says why where not; True insists.
Refit = bool | Literal["auto"]
