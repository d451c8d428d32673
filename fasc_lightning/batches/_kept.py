"""Kept batches of a calibration, on the CPU, each with its place in the fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from fasc_lightning._utils import anything, integer, listed, record, row, undoing
from fasc_lightning.batches._copying import batch_tensors, copy_batch


@dataclass(frozen=True)
class Place:
    """Where in a fit a batch is: what its training step is told, or can ask the Trainer for.

    Attributes:
        epoch: The Trainer's ``current_epoch``.
        batch_idx: The batch's number in it.
        step: The Trainer's ``global_step``.
    """

    epoch: int = 0
    batch_idx: int = 0
    step: int = 0

    @staticmethod
    def of(trainer: pl.Trainer) -> Place:
        """Return the place of the batch that runs."""
        return Place(trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx, trainer.global_step)

    @contextmanager
    def taken(self, trainer: pl.Trainer) -> Iterator[None]:
        """Let a Trainer say that it is there, and that it trains."""
        loop: Any = trainer.fit_loop.epoch_loop
        told = [
            (trainer.fit_loop.epoch_progress.current, "completed", self.epoch),
            (loop.batch_progress.current, "ready", self.batch_idx + 1),
            (loop.automatic_optimization.optim_progress.optimizer.step.total, "completed", self.step),
            (trainer.state, "stage", pl.trainer.states.RunningStage.TRAINING),
        ]
        with undoing() as undo:
            for owner, name, value in told:
                undo.add(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
            undo.add(setattr, trainer, "should_stop", trainer.should_stop)
            yield


@dataclass(frozen=True)
class KeptBatch:
    """A batch on the CPU.

    Attributes:
        batch: As the training step was given it.
        place: Where it was.
        stays: The numbers of its tensors that were on the CPU while others were not, as lengths for packing are.
    """

    batch: Any
    place: Place
    stays: tuple[int, ...] = ()


_STATE = record(
    {
        "batches": listed(anything),
        "places": listed(row(integer(0), integer(0), integer(0))),
        "stays": listed(listed(integer(0))),
    }
)


class KeptBatches:
    """Batches of a calibration, on the CPU: copies, whatever becomes of the batches themselves."""

    def __init__(self, batches: Sequence[KeptBatch] = ()) -> None:
        self.batches = list(batches)

    def keep(self, batch: Any, place: Place | None = None) -> None:
        """Keep a batch.

        Args:
            batch: As the training step is about to be given it, moved and converted.
            place: Where it is; its number among those that are kept, where nothing is known.
        """
        on_cpu = [tensor.device.type == "cpu" for tensor in batch_tensors(batch)]
        stays = () if all(on_cpu) else tuple(i for i, here in enumerate(on_cpu) if here)
        place = place or Place(batch_idx=len(self.batches))
        self.batches.append(KeptBatch(copy_batch(batch, lambda *_: "cpu"), place, stays))

    def on(self, device: Any) -> list[Any]:
        """Return the batches on a device; on the CPU, those that are kept."""
        if torch.empty(0, device=device).device.type == "cpu":
            return [kept.batch for kept in self.batches]
        return [
            copy_batch(kept.batch, lambda i, _, stays=kept.stays: "cpu" if i in stays else device)  # type: ignore[misc]
            for kept in self.batches
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the batches, and all else in plain data."""
        places = [[kept.place.epoch, kept.place.batch_idx, kept.place.step] for kept in self.batches]
        return {
            "batches": [kept.batch for kept in self.batches],
            "places": places,
            "stays": [list(kept.stays) for kept in self.batches],
        }

    @staticmethod
    def from_state(state: Any, path: str = "") -> KeptBatches:
        """Return the replay of which :meth:`state_dict` returned the state.

        Args:
            state: As it was read. Checkpoints of version 0.1.0 before batches had places hold the list of batches.
            path: Of the state in what was read, for messages.

        Raises:
            SchemaError: If it is something else.
        """
        if isinstance(state, list):
            return KeptBatches([KeptBatch(batch, Place(batch_idx=i)) for i, batch in enumerate(state)])
        _STATE(state, path)
        parts = zip(state["batches"], state["places"], state["stays"], strict=True)
        return KeptBatches([KeptBatch(batch, Place(*place), tuple(stays)) for batch, place, stays in parts])
