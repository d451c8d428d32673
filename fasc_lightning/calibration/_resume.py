"""Saving and resuming of calibrations in checkpoints.

A checkpoint saved during a calibration holds its statistics, summed over all processes, and the position of each
process in its data. A fit that is resumed from it ends as it would have without the interruption. If that is not
possible (a loader that is not stateful, a missing file, another number of processes, a fit that failed while it
compressed), the fit returns to the start of the calibration and logs the reason.

A checkpoint of an exception holds the state at the exception. So the restoring and freeing after an exception waits
until Lightning tears down the plugin that saves checkpoints, which it does last.
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

from fasc_lightning._utils import (
    NamedTensors,
    Undo,
    anything,
    check,
    checksum,
    listed,
    mapping,
    record,
    tensor_checksums,
)
from fasc_lightning.batches import (
    UnsavableBatchError,
    begin_epoch,
    check_position,
    go_back,
    is_stateful,
    obstacle,
    position,
    restore_position,
    skips_backward,
    train_loaders,
)
from fasc_lightning.calibration._run import REPLAYED, CalibrationRun
from fasc_lightning.calibration._saved_form import (
    FORMAT,
    PLACES,
    alteration_of,
    change_of,
    damage_of,
    damage_of_origin,
    state_checksum,
)
from fasc_lightning.calibration._saved_state import pack_calibration, unpack_calibration
from fasc_lightning.calibration._schedule import CalibrationSchedule
from fasc_lightning.calibration._sidecar import SidecarCheckpointIO, is_local, is_run, open_sidecar
from fasc_lightning.distributed import gather_everywhere, is_distributed

#: Keys in the callback's state: of the calibration, and of the position in the data before the calibration.
_KEY, _PLACE = "calibration", "place"

#: Bytes of an order of samples above which no position is kept, because every checkpoint of a training would hold it.
_ORDER_BYTES = 64 * 2**20


class CalibrationCheckpoint:
    """Puts a fit's calibration into its checkpoints, and reads it from the checkpoint that the fit is resumed from.

    Args:
        key: The callback's key in checkpoints.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._io: SidecarCheckpointIO | None = None
        self._checkpoint: dict[str, Any] | None = None  # source of a resumed fit, while it is read
        self._state: dict[str, Any] | None = None
        self._place: dict[str, Any] | None = None
        self._stopping = False  # whether the fit was stopping at the start of the calibration to which it returns
        self._undo = Undo()
        self._alone = False  # whether this process failed and others may be waiting for it

    def install(self, trainer: pl.Trainer) -> None:
        """Let the Trainer's checkpoints have sidecars."""
        self.remove()  # the plugin of a fit that failed
        inner = trainer.strategy.checkpoint_io
        if isinstance(inner, SidecarCheckpointIO):  # left by a fit that failed
            inner = inner.inner
        self._io = SidecarCheckpointIO(inner, self._find)
        self._undo.add(_take_out, trainer, self._io)
        trainer.strategy.checkpoint_io = self._io
        self._checkpoint = self._state = self._place = None
        self._stopping = self._alone = False

    def remove(self) -> None:
        """Restore the Trainer's own plugin; safe at any time."""
        self._undo.close()
        self._io = self._checkpoint = self._state = self._place = None

    def after_exception(self, trainer: pl.Trainer, exception: BaseException, end: Callable[[], None]) -> None:
        """Call a function after other callbacks have saved their checkpoints of an exception.

        After an exception Lightning tears down its strategy alone, and the plugin with it.
        """
        self._alone = is_distributed(trainer) and not isinstance(exception, SIGTERMException)
        if self._alone:
            # After saving a checkpoint of an exception, Lightning would wait for the other processes, which wait for
            # this one to end.
            self._undo.set(trainer.strategy, "barrier", _wait_for_nobody)
        tears_down = not isinstance(trainer.strategy, ModelParallelStrategy)
        if tears_down and self._io is not None and trainer.strategy.checkpoint_io is self._io:
            self._io.ending.add(end)
        else:
            end()

    def clean(self, trainer: pl.Trainer) -> None:
        """Remove the sidecars from the fit's checkpoint folders after its end; other folders may be in use."""
        if self._io is not None and trainer.is_global_zero:
            folders = [getattr(c, "dirpath", None) for c in trainer.callbacks if isinstance(c, Checkpoint)]  # type: ignore[attr-defined]
            self._io.clean(Path(folder) for folder in folders if folder is not None and is_local(folder))

    # Saving.

    def save(
        self, trainer: pl.Trainer, run: CalibrationRun, schedule: CalibrationSchedule, checkpoint: dict[str, Any]
    ) -> None:
        """Put a running calibration into a checkpoint; on all processes together unless one of them failed."""
        run.settle(trainer)
        left = _batches_are_left(trainer)
        hindered = run.obstacle
        if not hindered and self._alone:
            hindered = "it was saved when a process of several failed"
        elif not hindered:
            hindered = _of_any(trainer, obstacle(trainer) if left else "")
        state: dict[str, Any] = {
            "format": FORMAT,
            "end": _end(trainer, schedule),
            "setting": run.setting(trainer),
            "origin": run.origin,
            "schedule": schedule.state_dict(trainer),
            "left": left,
            "obstacle": hindered,
            "accumulated": (
                run.trains and left and not skips_backward(trainer) and trainer.fit_loop._should_accumulate()
            ),
            "tensors": {},
        }
        if not hindered:
            state["positions"] = gather_everywhere(trainer, position(trainer)) if left else []
            try:
                run.merge(trainer)
                state["tensors"], state["header"] = pack_calibration(trainer, run.statistics())
            except UnsavableBatchError as error:
                state["obstacle"] = f"its batches, which are to be replayed, hold {error}, which a file cannot"
        state["checksums"] = tensor_checksums(state["tensors"])
        state["origin_checksum"] = checksum(state["origin"])
        state["checksum"] = state_checksum(state)
        checkpoint["callbacks"].setdefault(self._key, {})[_KEY] = state

    def save_place(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Put each process's position in its data into a checkpoint before the calibration; on all processes together.

        Without it Lightning draws a new order and gives every process the first one's position. Some samples would then
        be trained on and calibrated twice, and others not at all.
        """
        if self._alone or not _batches_are_left(trainer) or _of_any(trainer, obstacle(trainer)):
            return
        place = position(trainer)
        sizes = [order["order"].nbytes for order in place["orders"] if order is not None]
        if not _of_any(trainer, "too large" if sum(sizes) > _ORDER_BYTES else ""):
            state = {"format": FORMAT, "positions": gather_everywhere(trainer, place)}
            checkpoint["callbacks"].setdefault(self._key, {})[_PLACE] = state

    def _find(self, checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
        return checkpoint.get("callbacks", {}).get(self._key, {}).get(_KEY)

    # Resuming.

    def load(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Take a calibration out of a checkpoint, before Lightning copies the states of callbacks.

        Args:
            trainer: Trainer that has read the checkpoint.
            checkpoint: Its content.

        Raises:
            ValueError: If the callbacks' states are not mappings, or if a position in the data is damaged.
        """
        callbacks: Any = checkpoint.get("callbacks")
        check(callbacks, mapping(anything, anything), f"The entry 'callbacks' of {trainer.ckpt_path}")
        own = callbacks.get(self._key, {})
        check(own, mapping(anything), f"The state of {self._key} in {trainer.ckpt_path}")
        place = own.pop(_PLACE, None)
        if self._io is not None and place is not None:
            check(place, PLACES, f"The place in the data that {trainer.ckpt_path} holds")
            self._place = place
        if _KEY not in own:
            return
        state = own.pop(_KEY)
        if self._io is not None:  # in a fit
            self._checkpoint, self._state = checkpoint, state
            if isinstance(state, dict) and is_run(state.get("run")):  # no plugin writes sharded checkpoints
                self._io.run = state["run"]

    def resume(self, trainer: pl.Trainer, run: CalibrationRun, schedule: CalibrationSchedule) -> None:
        """Give a new calibration the statistics of the checkpoint, before Lightning restores its loops.

        If the statistics cannot be used, the loops return to the start of the calibration, and it starts empty.

        Raises:
            ValueError: If the checkpoint is damaged or was edited, so that the calibration can neither continue nor
                start again.
        """
        state, checkpoint = self._state, self._checkpoint
        self._checkpoint = None
        if checkpoint is None:
            return
        where = f"The calibration in the checkpoint {trainer.ckpt_path}"
        if not isinstance(state, dict):
            self._state = None
            found = "null" if state is None else f"a {type(state).__name__}"
            rank_zero_warn(
                f"{trainer.ckpt_path} holds {found} in place of a calibration, so that none of its "
                "statistics are used and the calibration starts again with what is left of it. Was the file edited? "
                "HINT: resume from a checkpoint of before the calibration."
            )
            return
        damage, altered = damage_of(state), alteration_of(state)
        if not (damage or altered) and list(state["end"]) != _end(trainer, schedule):
            self._state = None
            rank_zero_info(
                "FascCallback: the statistics of the checkpoint are not used, since the fit now ends at another time "
                f"({_described(_end(trainer, schedule))}; it was {_described(state['end'])})."
            )
            return
        if lost := damage_of_origin(state):
            raise ValueError(
                f"{where} cannot be used{f': {damage or altered}' if damage or altered else ''}. It cannot start again "
                f"either, since where it began is damaged or was edited: {lost} HINT: resume from another checkpoint."
            )
        if not (damage or altered):
            schedule.prepare(trainer, state["schedule"])
        # Another setting, or an entry of a wrong type, explains more than a checksum.
        reason = _of_any(trainer, damage or self._unusable(trainer, run, state))
        reason = reason or _of_any(trainer, self._read(trainer, run, state, altered))
        if reason:
            self._state = None
            self._go_back(trainer, run, checkpoint, state, reason)
            return
        run.resume(state["origin"])
        rank_zero_info(f"FascCallback: the calibration goes on after {run.batches} batches.")
        if state["accumulated"]:
            rank_zero_warn(
                "The checkpoint was saved while gradients were accumulated, which none holds, so "
                "that the next optimizer step lacks those of some batches. The statistics are whole. HINT: "
                "ModelCheckpoint(every_n_train_steps=...) saves right after a step."
            )

    def start(self, trainer: pl.Trainer, schedule: CalibrationSchedule) -> None:
        """Continue from the position of the checkpoint, after the schedule and Lightning's loops have started."""
        state, self._state = self._state, None
        if state is not None and state["left"]:
            restore_position(trainer, state["positions"][trainer.global_rank])
        place, self._place = self._place, None
        if place is not None and not _of_any(trainer, _elsewhere(trainer, place["positions"])):
            restore_position(trainer, place["positions"][trainer.global_rank])
        begin_epoch(trainer)
        if state is not None:
            schedule.load_state_dict(trainer, state["schedule"])
        elif self._stopping:
            trainer.should_stop = True
        elif trainer.ckpt_path is not None and (missed := schedule.missed(trainer)):
            rank_zero_warn(
                f"The calibration starts again with what is left of it, since the checkpoint holds no "
                f"statistics of its first {missed} {'batches' if schedule.calibration_steps is None else 'steps'}. "
                "HINT: resume from a checkpoint of before the calibration."
            )

    @staticmethod
    def _unusable(trainer: pl.Trainer, run: CalibrationRun, state: Mapping[str, Any]) -> str:
        """Return why this fit cannot use the statistics of a checkpoint; "" if it can."""
        was, now = state["setting"], run.setting(trainer)
        # Kept batches do no harm if nothing replays them.
        changed = [name for name in now if was.get(name) != now[name] and not (name == REPLAYED and was.get(name))]
        return state["obstacle"] or next((change_of(name, was.get(name), now[name]) for name in changed), "")

    @staticmethod
    def _read(trainer: pl.Trainer, run: CalibrationRun, state: dict[str, Any], altered: str) -> str:
        """Read the statistics unless they were altered; return the reason if they were not read, else ""."""
        tensors: dict[str, Tensor] = state.pop("tensors")
        path = Path(str(trainer.ckpt_path))
        beside = "token" in state and trainer.is_global_zero
        try:
            record({"header": anything}, extra=True)(state, "")
            if state["left"]:
                listed(anything, trainer.world_size)(state.get("positions"), "positions")
                check_position(state["positions"][trainer.global_rank], f"positions[{trainer.global_rank}]")
            if altered:
                return altered
            checksums = state.get("checksums")
            with open_sidecar(state["token"], path) if beside else nullcontext() as handle:
                where = str(path)
                named = NamedTensors.of(tensors, where) if handle is None else NamedTensors.in_file(handle, where)
                empty, header, gated = run.statistics(), state["header"], run.scores_decide
                found = unpack_calibration(trainer, empty, header, named, checksums, needs_scores=gated)
                run.restore(found)
        except (OSError, ValueError, SafetensorError) as error:
            return f"its statistics cannot be read: {error}"
        return ""

    def _go_back(
        self,
        trainer: pl.Trainer,
        run: CalibrationRun,
        checkpoint: dict[str, Any],
        state: Mapping[str, Any],
        reason: str,
    ) -> None:
        """Let Lightning restore its loops to their state before the first batch of the calibration."""
        run.reset()
        go_back(checkpoint, state["origin"])
        self._stopping = state["origin"]["stopping"]
        twice, reason = "", reason.rstrip(".")
        if run.trains:
            twice = " The weights are trained on those batches once more, since update_weights=True."
        rank_zero_warn(
            f"The calibration starts again from its first batch and not where the checkpoint was saved. "
            f"Reason: {reason}.{twice} HINT: a stateful loader and the same options, processes and files let it go on."
        )


def _take_out(trainer: pl.Trainer, io: SidecarCheckpointIO) -> None:
    if trainer.strategy.checkpoint_io is io:
        trainer.strategy.checkpoint_io = io.inner


def _wait_for_nobody(*args: Any, **kwargs: Any) -> None:
    """Replace ``Strategy.barrier``."""
    del args, kwargs


def _of_any(trainer: pl.Trainer, reason: str) -> str:
    """Return the reason of the first process that has a reason, the same on every process; "" if none has."""
    return next(filter(None, gather_everywhere(trainer, reason)), "")


def _elsewhere(trainer: pl.Trainer, positions: list[Any]) -> str:
    """Return why a fit cannot continue from the positions of an earlier fit; "" if it can."""
    if len(positions) != trainer.world_size:
        return "another number of processes"
    loaders = train_loaders(trainer)
    if len(loaders) != len(positions[0]["loaders"]) or not all(is_stateful(loader) for loader in loaders):
        return "other loaders"
    return obstacle(trainer)


def _batches_are_left(trainer: pl.Trainer) -> bool:
    """Return whether the fit has another batch to run."""
    loop = trainer.fit_loop
    if 0 <= trainer.max_steps <= trainer.global_step or (trainer.should_stop and loop._can_stop_early):
        return False
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return True
    epochs: Any = loop.epoch_progress.current
    batches: Any = loop.epoch_loop.batch_progress.current
    ended = loop.epoch_loop.batch_progress.is_last_batch and batches.processed == batches.ready
    # Most checkpoints are saved in the hooks at the end of an epoch, before the epoch counts as processed.
    done = epochs.processed + int(ended and epochs.started > epochs.processed)
    return done < trainer.max_epochs


def _end(trainer: pl.Trainer, schedule: CalibrationSchedule) -> list[Any]:
    """Return the limits that decide when the calibration takes place."""
    return [schedule.end.max_epochs, trainer.max_steps, schedule.calibration_steps]


def _described(end: list[Any]) -> str:
    names = ("max_epochs", "max_steps", "calibration_steps")
    return ", ".join(f"{name}={value}" for name, value in zip(names, end, strict=True))
