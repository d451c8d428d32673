"""Calibrations that outlive their process: what checkpoints keep of one, and how a fit goes on from it, or cannot.

A checkpoint that is saved while a calibration goes on holds its statistics, summed over all processes, and where each
process stands in its data. A fit that is resumed from it ends as it would have without the interruption. Where that
cannot be had (a loader that is not stateful, a file that is missing, another number of processes, a fit that failed
while it compressed), the fit goes back to where the calibration began, and says why.

A checkpoint of an exception is saved as things stood when it was raised: what is to be given back to the Trainer and
let go of then waits until Lightning tears down the plugin that saves checkpoints, which it does last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors import SafetensorError
from torch import Tensor

from fasc_lightning._batch_state import UnsavableBatchError
from fasc_lightning._distributed import gather_everywhere, is_distributed
from fasc_lightning.calibration import REPLAYED, Calibration
from fasc_lightning.calibration_state import pack_calibration, unpack_calibration
from fasc_lightning.loader_position import begin_epoch, go_back, obstacle, position, restore_position
from fasc_lightning.schedule import CalibrationSchedule
from fasc_lightning.sidecar import SidecarCheckpointIO, is_local, open_sidecar

#: Of what a checkpoint keeps; of another one nothing is used.
_FORMAT = 2

#: Where it is in the callback's state.
_KEY = "calibration"


class CalibrationKeeper:
    """Puts a fit's calibration into its checkpoints, and takes it out of the one that the fit is resumed from.

    Args:
        key: The callback's key in checkpoints.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._io: SidecarCheckpointIO | None = None
        self._checkpoint: dict[str, Any] | None = None  # that the fit is resumed from, while it is read
        self._state: dict[str, Any] | None = None
        self._stopping = False  # as the fit was before the calibration to which it goes back
        self._alone = False  # whether this process failed and others may be waiting for it

    def install(self, trainer: pl.Trainer) -> None:
        """Let the Trainer's checkpoints have sidecars."""
        inner = trainer.strategy.checkpoint_io
        if isinstance(inner, SidecarCheckpointIO):  # of a fit that failed
            inner = inner.inner
        trainer.strategy.checkpoint_io = self._io = SidecarCheckpointIO(inner, self._find)
        self._checkpoint, self._state = None, None
        self._stopping = self._alone = False
        vars(trainer.strategy).pop("barrier", None)

    def remove(self, trainer: pl.Trainer) -> None:
        """Give the Trainer its own plugin back; safe at any time."""
        if self._io is not None and trainer.strategy.checkpoint_io is self._io:
            trainer.strategy.checkpoint_io = self._io.inner
        if self._alone:
            vars(trainer.strategy).pop("barrier", None)
        self._io = self._checkpoint = self._state = None

    def after_exception(self, trainer: pl.Trainer, exception: BaseException, end: Callable[[], None]) -> None:
        """Call something once other callbacks have saved their checkpoints of what went wrong.

        Lightning tears nothing down after an exception but its strategy, and with that the plugin.
        """
        self._alone = is_distributed(trainer) and not isinstance(exception, SIGTERMException)
        if self._alone:
            # Lightning waits for the other processes once it has saved a checkpoint of what went wrong, and they for
            # this one, until it ends.
            trainer.strategy.barrier = _wait_for_nobody  # type: ignore[method-assign]
        tears_down = not isinstance(trainer.strategy, ModelParallelStrategy)
        if tears_down and self._io is not None and trainer.strategy.checkpoint_io is self._io:
            self._io.on_teardown = end
        else:
            end()

    def clean(self, trainer: pl.Trainer) -> None:
        """Remove the sidecars where the fit saves checkpoints: it has ended, and others may be in use elsewhere."""
        if self._io is not None and trainer.is_global_zero:
            folders = [getattr(c, "dirpath", None) for c in trainer.callbacks if isinstance(c, Checkpoint)]  # type: ignore[attr-defined]
            self._io.clean(Path(folder) for folder in folders if folder is not None and is_local(folder))

    # Saving.

    def save(
        self, trainer: pl.Trainer, calibration: Calibration, schedule: CalibrationSchedule, checkpoint: dict[str, Any]
    ) -> None:
        """Put a calibration that has begun into a checkpoint; on all processes together unless one of them failed."""
        calibration.settle(trainer)
        left = _batches_are_left(trainer)
        if calibration.passes > 1:
            hindered = "a calibration of several passes is not kept, and starts again from the first"
        elif calibration.spent:
            hindered = "the fit failed while it compressed the model"
        elif self._alone:
            hindered = "it was saved when a process of several failed"
        else:
            hindered = _of_any(trainer, obstacle(trainer) if left else "")
        state = {
            "format": _FORMAT,
            "end": _end(trainer, schedule),
            "setting": calibration.setting(trainer),
            "origin": calibration.origin,
            "schedule": schedule.state_dict(trainer),
            "left": left,
            "obstacle": hindered,
            "accumulated": calibration.options.update_weights and left and trainer.fit_loop._should_accumulate(),
            "tensors": {},
        }
        if not hindered:
            state["positions"] = gather_everywhere(trainer, position(trainer)) if left else []
            try:
                state["tensors"], state["header"] = pack_calibration(trainer, calibration)
            except UnsavableBatchError as error:
                state["obstacle"] = f"its batches, which are to be replayed, hold {error}, which a file cannot"
        checkpoint["callbacks"].setdefault(self._key, {})[_KEY] = state

    def _find(self, checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
        return checkpoint.get("callbacks", {}).get(self._key, {}).get(_KEY)

    # Resuming.

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Take a calibration out of a checkpoint, before Lightning copies what it hands to callbacks."""
        state = checkpoint["callbacks"].get(self._key, {}).pop(_KEY, None)
        if self._io is not None and state is not None and state["format"] == _FORMAT:  # in a fit
            self._checkpoint, self._state = checkpoint, state
            self._io.run = state.get("run", self._io.run)  # sharded checkpoints are not written by plugins

    def resume(self, trainer: pl.Trainer, calibration: Calibration, schedule: CalibrationSchedule) -> None:
        """Give a new calibration the statistics of the checkpoint; before Lightning restores its loops.

        If they cannot be had, the loops will be where the calibration began, whose statistics then start from nothing.
        """
        state, checkpoint = self._state, self._checkpoint
        self._checkpoint = None
        if state is None or checkpoint is None:
            return
        if state["end"] != _end(trainer, schedule):
            self._state = None
            rank_zero_info(
                "FascCallback: the statistics of the checkpoint are not used, since the fit now ends at another time "
                f"({_described(_end(trainer, schedule))}; it was {_described(state['end'])})."
            )
            return
        reason = _of_any(trainer, self._unusable(trainer, calibration, state))
        reason = reason or _of_any(trainer, self._read(trainer, calibration, state))
        if reason:
            self._state = None
            self._go_back(trainer, calibration, checkpoint, state, reason)
            return
        calibration.origin = state["origin"]
        rank_zero_info(f"FascCallback: the calibration goes on after {calibration.batches} batches.")
        if state["accumulated"]:
            rank_zero_warn(
                "FascCallback: the checkpoint was saved while gradients were accumulated, which none holds, so "
                "that the next optimizer step lacks those of some batches. The statistics are whole. HINT: "
                "ModelCheckpoint(every_n_train_steps=...) saves right after a step."
            )

    def start(self, trainer: pl.Trainer, schedule: CalibrationSchedule) -> None:
        """Go on where the checkpoint was saved, once the schedule and Lightning's loops have started."""
        state, self._state = self._state, None
        if state is not None and state["left"]:
            restore_position(trainer, state["positions"][trainer.global_rank])
        begin_epoch(trainer)
        if state is not None:
            schedule.load_state_dict(trainer, state["schedule"])
        elif self._stopping:
            trainer.should_stop = True
        elif trainer.ckpt_path is not None and (missed := schedule.missed(trainer)):
            rank_zero_warn(
                f"FascCallback: the calibration starts again with what is left of it, since the checkpoint holds no "
                f"statistics of its first {missed} {'batches' if schedule.calibration_steps is None else 'steps'}. "
                "HINT: resume from a checkpoint of before the calibration."
            )

    @staticmethod
    def _unusable(trainer: pl.Trainer, calibration: Calibration, state: Mapping[str, Any]) -> str:
        """Return why the statistics of a checkpoint are not to be had, or not this fit's; "" if nothing hinders."""
        was, now = state["setting"], calibration.setting(trainer)
        # Batches that were kept do no harm where nothing replays them.
        changed = [name for name in now if was[name] != now[name] and not (name == REPLAYED and was[name])]
        return state["obstacle"] or next((_change(name, was[name], now[name]) for name in changed), "")

    @staticmethod
    def _read(trainer: pl.Trainer, calibration: Calibration, state: dict[str, Any]) -> str:
        """Read the statistics; return why that failed, "" if it did not."""
        tensors: dict[str, Tensor] = state.pop("tensors")
        beside = "token" in state and trainer.is_global_zero
        try:
            with open_sidecar(state["token"], Path(str(trainer.ckpt_path))) if beside else nullcontext() as handle:
                tensor: Callable[[str], Tensor] = tensors.__getitem__ if handle is None else handle.get_tensor
                unpack_calibration(trainer, calibration, state["header"], tensor)
        except (OSError, KeyError, SafetensorError) as error:
            return f"its statistics cannot be read: {error}"
        return ""

    def _go_back(
        self,
        trainer: pl.Trainer,
        calibration: Calibration,
        checkpoint: dict[str, Any],
        state: Mapping[str, Any],
        reason: str,
    ) -> None:
        """Let Lightning restore its loops as they were before the first batch of the calibration."""
        calibration.reset()
        go_back(checkpoint, state["origin"])
        self._stopping = state["origin"]["stopping"]
        twice = ""
        if calibration.options.update_weights:
            twice = " The weights are trained on those batches once more, since update_weights=True."
        rank_zero_warn(
            f"FascCallback: the calibration starts again from its first batch and not where the checkpoint was saved. "
            f"Reason: {reason}.{twice} HINT: a stateful loader and the same options, processes and files let it go on."
        )


def _wait_for_nobody(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``Strategy.barrier``."""
    del args, kwargs


def _of_any(trainer: pl.Trainer, reason: str) -> str:
    """Return the reason of the first process that has one, the same on every process; "" if none has."""
    return next(filter(None, gather_everywhere(trainer, reason)), "")


def _batches_are_left(trainer: pl.Trainer) -> bool:
    """Tell whether the fit has another batch to run."""
    loop = trainer.fit_loop
    if 0 <= trainer.max_steps <= trainer.global_step or (trainer.should_stop and loop._can_stop_early):
        return False
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return True
    epochs: Any = loop.epoch_progress.current
    batches: Any = loop.epoch_loop.batch_progress.current
    ended = loop.epoch_loop.batch_progress.is_last_batch and batches.processed == batches.ready
    # An epoch counts as processed before the hooks at its end, where most checkpoints are saved.
    done = epochs.processed + int(ended and epochs.started > epochs.processed)
    return done < trainer.max_epochs


def _end(trainer: pl.Trainer, schedule: CalibrationSchedule) -> list[Any]:
    """Return what decides when the calibration takes place."""
    return [trainer.max_epochs, trainer.max_steps, schedule.calibration_steps]


def _described(end: list[Any]) -> str:
    names = ("max_epochs", "max_steps", "calibration_steps")
    return ", ".join(f"{name}={value}" for name, value in zip(names, end, strict=True))


def _change(name: str, was: Any, now: Any) -> str:
    if isinstance(was, dict) and isinstance(now, dict):  # of layers, of which there may be hundreds
        key = next(key for key in [*was, *now] if was.get(key) != now.get(key))
        name, was, now = f"{name}: {key!r}", was.get(key, "not there"), now.get(key, "not there")
    return f"{name} was {was} and is {now} now"
