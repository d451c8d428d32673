"""When calibration begins, given how the fit is going to end."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fasc_lightning._undo import Undo


class CalibrationSchedule:
    """Decides at each batch whether the calibration phase has begun.

    Without ``calibration_steps`` it is the last epoch of ``max_epochs``. With them it is the last so many optimizer
    steps; where something may end the fit at any moment (EarlyStopping, ``max_time``, ``trainer.should_stop``), the end
    is put off until the calibration steps have been taken, through the Trainer's own ``min_steps``.

    Args:
        calibration_steps: Optimizer steps to calibrate on (batches, with manual optimisation), or None.
        passes: How many of the last epochs serve, where no steps are given.
    """

    def __init__(self, calibration_steps: int | None = None, passes: int = 1) -> None:
        self.calibration_steps = calibration_steps
        self.passes = passes
        self.begun = False
        self._last_step: float = math.inf
        self._user_min_steps: int | None = None
        self._undo = Undo()

    def check(self, trainer: pl.Trainer) -> None:
        """Refuse a fit whose end is not known, unless ``calibration_steps`` says how long to calibrate.

        Raises:
            MisconfigurationException: With the option that is missing.
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
        """Look at how the fit will end; at the start of training."""
        self.begun = False
        if self.calibration_steps is None:
            return
        end = trainer.estimated_stepping_batches
        self._last_step = end if end >= 0 else math.inf
        self._user_min_steps = trainer.fit_loop.min_steps
        self._undo.set(trainer.fit_loop.epoch_loop, "min_steps", sys.maxsize)

    def is_whole_fit(self, trainer: pl.Trainer) -> bool:
        """Tell whether the fit is nothing but calibration: one epoch, or one a pass."""
        return self.calibration_steps is None and self._in_last_epoch(trainer)

    def begins(self, trainer: pl.Trainer) -> bool:
        """Tell whether the batch that is about to run belongs to the calibration."""
        if self.begun:
            return True
        if self.calibration_steps is None:
            self.begun = self._in_last_epoch(trainer)
        elif self._position(trainer) >= self._last_step - self.calibration_steps:
            self.begun = True
        elif trainer.should_stop and self._may_stop(trainer):
            optimizers = 1 if trainer.lightning_module.automatic_optimization else len(trainer.optimizers)
            trainer.fit_loop.epoch_loop.min_steps = trainer.global_step + self.calibration_steps * optimizers
            self.begun = True
        elif self._last_step == math.inf:
            # A loader without a length: the last epoch is the best that is known.
            self.begun = self._in_last_epoch(trainer)
        return self.begun

    def state_dict(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return what a calibration that has begun needs to end where it would have, in another process."""
        return {"stopping": bool(trainer.should_stop), "min_steps": trainer.fit_loop.epoch_loop.min_steps}

    def load_state_dict(self, trainer: pl.Trainer, state: Mapping[str, Any]) -> None:
        """Go on with a calibration, after :meth:`start`."""
        self.begun = True
        if state["stopping"]:
            trainer.should_stop = True
            if self.calibration_steps is not None:
                trainer.fit_loop.epoch_loop.min_steps = state["min_steps"]

    def missed(self, trainer: pl.Trainer) -> int:
        """Return how many steps (batches, of a last epoch) the calibration has missed as a resumed training starts."""
        if self.calibration_steps is not None:
            begin = max(0, self._last_step - self.calibration_steps)
            return int(max(0, self._position(trainer) - begin))
        epochs: Any = trainer.fit_loop.epoch_progress.current
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        begun = self._in_last_epoch(trainer) and epochs.started > epochs.processed
        return batches.processed if begun else 0

    def stop(self) -> None:
        """Give the Trainer its own ``min_steps`` back; safe to call at any time."""
        self._undo.close()

    @staticmethod
    def _position(trainer: pl.Trainer) -> int:
        """Return the steps taken, in the unit in which the Trainer estimates the end of the fit."""
        if trainer.lightning_module.automatic_optimization or trainer.max_steps != -1:
            return trainer.global_step
        return trainer.fit_loop.total_batch_idx  # every optimizer counts in `global_step`

    def _may_stop(self, trainer: pl.Trainer) -> bool:
        """Tell whether the user's own minimum has been met."""
        epochs_met = trainer.current_epoch >= (trainer.min_epochs or 0)
        return epochs_met and trainer.global_step >= (self._user_min_steps or 0)

    def _in_last_epoch(self, trainer: pl.Trainer) -> bool:
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            return False
        return trainer.current_epoch >= trainer.max_epochs - self.passes
