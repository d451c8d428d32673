"""The start of a calibration, chosen by the expected end of the fit."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fasc_lightning._utils import Undo
from fasc_lightning.batches import skips_backward
from fasc_lightning.calibration._fit_end import FitEnd, averages_epochs, batches_done, steps_per_batch


class CalibrationSchedule:
    """Decides at each batch whether the calibration has begun.

    Without ``calibration_steps`` the last epoch of ``max_epochs`` calibrates. With them, this number of optimizer steps
    at the end of the fit does. If the fit may end at any moment (EarlyStopping, ``max_time``, ``trainer.should_stop``),
    the Trainer's own ``min_steps`` delays the end until the calibration steps have been taken.

    If the loader has no length, or gives fewer batches than it claims, the length of an ended epoch counts. If no
    length is known in the last epoch, the calibration begins at once. A calibration that freezes the weights would then
    leave no step to the training, so it waits for the end. If the last epoch ends before the calibration has begun, the
    fit runs ``calibration_steps`` more steps in an extra epoch.

    Args:
        calibration_steps: Optimizer steps to calibrate on (batches, with manual optimisation), or None.
        passes: Number of last epochs that calibrate if there are no ``calibration_steps``.
        freezes: Whether a calibration freezes the weights.
    """

    def __init__(self, calibration_steps: int | None = None, passes: int = 1, freezes: bool = False) -> None:
        self.calibration_steps = calibration_steps
        self.passes = passes
        self.begun = False
        self.end = FitEnd()
        self._freezes = freezes
        self._holding = False
        self._extended = False
        self._skipped = False
        self._explained = False
        self._user_min_steps: int | None = None
        self._undo = Undo()

    def set_up(self, trainer: pl.Trainer) -> None:
        """Read the Trainer's own end before any callback changes it."""
        self.end.set_up(trainer)
        self.begun = self._skipped = self._extended = False

    def check(self, trainer: pl.Trainer) -> None:
        """Refuse a fit with an unknown last epoch and no ``calibration_steps``.

        Raises:
            MisconfigurationException: If the last epoch is not known; the message names the missing option.
        """
        if self.calibration_steps is not None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        reason = None
        if trainer.max_steps != -1:
            reason = f"max_steps={trainer.max_steps}"
        elif any(isinstance(c, Timer) for c in trainer.callbacks):  # type: ignore[attr-defined]
            reason = "max_time"
        elif any(isinstance(c, EarlyStopping) for c in trainer.callbacks):  # type: ignore[attr-defined]
            reason = "an EarlyStopping callback"
        elif trainer.max_epochs == -1:
            reason = "max_epochs=-1"
        if reason:
            raise MisconfigurationException(
                f"Expected `calibration_steps` with {reason}, since the last epoch is not known in advance. HINT: "
                "FascCallback(..., calibration_steps=64) calibrates on the last 64 steps; with `max_epochs` alone the "
                "last epoch serves."
            )

    def start(self, trainer: pl.Trainer) -> None:
        """Learn the expected end of the fit, at the start of training."""
        self.begun = False
        if self.calibration_steps is None:
            return
        self.end.start(trainer)
        self._warn_of_short_fit(trainer)
        self._holding = True
        self._user_min_steps = trainer.fit_loop.min_steps
        self._undo.set(trainer.fit_loop.epoch_loop, "min_steps", sys.maxsize)

    def is_whole_fit(self, trainer: pl.Trainer) -> bool:
        """Return whether the fit is nothing but calibration: one epoch, or one epoch a pass."""
        alone = self.calibration_steps is None and self._in_last_epoch(trainer)
        return alone and trainer.max_epochs == self.end.training_epochs(trainer)

    def begins(self, trainer: pl.Trainer) -> bool:
        """Return whether the batch that is about to run belongs to the calibration."""
        if trainer.should_stop and self._holding and (self.begun or self._may_stop(trainer)):
            self._explain_stop(trainer)
        if skips_backward(trainer) or self.end.epochs_left(trainer) <= 0:
            self._skipped = True
            return False
        if self.begun:
            return True
        if self.calibration_steps is None:
            self.begun = self._in_last_epoch(trainer)
        elif (
            self._extended
            or self.end.steps_left(trainer, self.calibration_steps) <= self.calibration_steps
            or (trainer.should_stop and self._may_stop(trainer))
        ):
            self.begun = True
        elif not self.end.is_length_known(trainer) and self.end.epochs_left(trainer) == 1:
            self.begun = not self._freezes or averages_epochs(trainer)
        if self.begun and self._holding:
            self._hold_for_calibration(trainer)
        return self.begun

    def end_epoch(self, trainer: pl.Trainer) -> None:
        """Learn the length of an epoch, and extend a fit that would end before its calibration has begun."""
        if self.calibration_steps is None or self.begun:
            return
        self.end.end_epoch(trainer)
        epochs: Any = trainer.fit_loop.epoch_progress.current
        is_last = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epochs.processed
        # More steps would spoil the work of an averaging callback.
        if not is_last or self._extended or self._skipped or averages_epochs(trainer):
            return
        rank_zero_info(
            "FascCallback: the last epoch ended before the calibration had begun, since its loader gave fewer batches "
            f"than expected. The fit goes on for {self.calibration_steps} more steps."
        )
        self._extend(trainer)
        trainer.should_stop = True

    def end_unmet(self) -> str:
        """Return the reason why a fit ended without a calibration, and the remedy."""
        if self._skipped:
            return (
                "a callback let its last batches run without backward passes (as averaging of weights does for batch "
                "norm). HINT: compress() the trained model."
            )
        if self.calibration_steps is not None:
            return (
                "the Trainer had finished before, or the loader gave no more batches. HINT: a loader that can be gone "
                "through again; or compress() the trained model."
            )
        return (
            "is the dataloader empty, or had the Trainer finished before, or was it stopped early (then give "
            "`calibration_steps`)?"
        )

    def state_dict(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return the state that lets a running calibration end in another process as it would have in this one."""
        return {
            "stopping": bool(trainer.should_stop),
            "min_steps": trainer.fit_loop.epoch_loop.min_steps,
            "extended": self._extended,
        }

    def prepare(self, trainer: pl.Trainer, state: Mapping[str, Any]) -> None:
        """Add the extra epoch again, before the Trainer finds that it has no epoch left."""
        if state.get("extended"):
            self._extend(trainer)

    def load_state_dict(self, trainer: pl.Trainer, state: Mapping[str, Any]) -> None:
        """Continue a calibration, after :meth:`start`."""
        self.begun = True
        trainer.should_stop = trainer.should_stop or state["stopping"]
        if self._holding:
            trainer.fit_loop.epoch_loop.min_steps = state["min_steps"]

    def missed(self, trainer: pl.Trainer) -> int:
        """Return how many steps (batches of a last epoch) the calibration has missed when a resumed training starts."""
        if self.calibration_steps is not None:
            left = self.end.steps_left(trainer, self.calibration_steps)
            return int(max(0, self.calibration_steps - left))
        return batches_done(trainer) if self._in_last_epoch(trainer) else 0

    def stop(self) -> None:
        """Restore the Trainer's own limits; safe to call at any time."""
        self._undo.close()
        self._holding = self._extended = self._explained = False

    def _warn_of_short_fit(self, trainer: pl.Trainer) -> None:
        """Warn of a fit that has fewer steps than its calibration; a resumed one may be in its calibration already."""
        assert self.calibration_steps is not None
        steps = self.end.steps_left(trainer, self.calibration_steps)
        if trainer.global_step == 0 and 0 < steps < self.calibration_steps:
            trains = "no step trains the weights" if self._freezes else "none trains before the calibration"
            rank_zero_warn(
                f"Expected a fit of at least calibration_steps={self.calibration_steps} steps but it has {steps:.0f}: "
                f"all of them calibrate, and {trains}. HINT: a smaller `calibration_steps`, or a longer fit."
            )

    def _explain_stop(self, trainer: pl.Trainer) -> None:
        """Log once that a fit calibrates before it heeds a stop.

        A Timer, as of ``max_time``, would say at each step from then on that the time is over.
        """
        if self._explained:
            return
        self._explained = True
        for timer in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(timer, Timer) and "_verbose" in vars(timer):
                self._undo.set(timer, "_verbose", False)
        rank_zero_info(
            "FascCallback: the fit was told to stop. It ends after the "
            f"{self.calibration_steps} steps of its calibration."
        )

    def _extend(self, trainer: pl.Trainer) -> None:
        assert trainer.max_epochs is not None
        self._undo.set(trainer.fit_loop, "max_epochs", trainer.max_epochs + 1)
        self._extended = True

    def _hold_for_calibration(self, trainer: pl.Trainer) -> None:
        """Let the fit stop after the steps of the calibration, not before."""
        assert self.calibration_steps is not None
        steps = math.ceil(self.calibration_steps * steps_per_batch(trainer))
        least = 0 if self._extended else self._user_min_steps or 0
        trainer.fit_loop.epoch_loop.min_steps = max(least, trainer.global_step + steps)

    def _may_stop(self, trainer: pl.Trainer) -> bool:
        """Return whether the user's own minimum has been met."""
        epochs_met = trainer.current_epoch >= (trainer.min_epochs or 0)
        return epochs_met and trainer.global_step >= (self._user_min_steps or 0)

    def _in_last_epoch(self, trainer: pl.Trainer) -> bool:
        return 0 < self.end.epochs_left(trainer) <= self.passes
