"""Kept batches of a calibration, on the CPU, each with its place in the fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from fasc_lightning._utils import anything, integer, listed, mapping, record, refuse, row, undoing
from fasc_lightning.batches._copying import batch_tensors, copy_batch


@dataclass(frozen=True)
class Place:
    """The place of a batch in a fit, as its training step and the Trainer report it.

    Attributes:
        epoch: The Trainer's ``current_epoch``.
        batch_idx: Number of the batch in the epoch.
        step: The Trainer's ``global_step``.
    """

    epoch: int = 0
    batch_idx: int = 0
    step: int = 0

    @staticmethod
    def of(trainer: pl.Trainer) -> Place:
        """Return the place of the running batch."""
        return Place(trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx, trainer.global_step)

    @contextmanager
    def taken(self, trainer: pl.Trainer) -> Iterator[None]:
        """Make a Trainer report this place, and that it trains, inside the context."""
        loop: Any = trainer.fit_loop.epoch_loop
        reported = [
            (trainer.fit_loop.epoch_progress.current, "completed", self.epoch),
            (loop.batch_progress.current, "ready", self.batch_idx + 1),
            (loop.automatic_optimization.optim_progress.optimizer.step.total, "completed", self.step),
            (trainer.state, "stage", pl.trainer.states.RunningStage.TRAINING),
        ]
        with undoing() as undo:
            for owner, name, value in reported:
                undo.add(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
            undo.add(setattr, trainer, "should_stop", trainer.should_stop)
            yield


@dataclass(frozen=True)
class KeptBatch:
    """A batch on the CPU.

    Attributes:
        batch: The training step's argument, on the CPU.
        place: Place of the batch in its fit.
        stays: Numbers of its tensors that were on the CPU while others were not, such as lengths for packing.
        lengths: Length of the gradient at a layer's output of each counted token, shape (tokens,), by layer, in one
            unit for all batches; empty if it was not kept.
    """

    batch: Any
    place: Place
    stays: tuple[int, ...] = ()
    lengths: Mapping[str, Tensor] = field(default_factory=dict)


def _row_of_numbers(value: Any, path: str) -> None:
    if not (isinstance(value, Tensor) and value.ndim == 1 and value.is_floating_point()):
        raise refuse("a row of floating-point numbers", value, path)


_STATE = record(
    {
        "batches": listed(anything),
        "places": listed(row(integer(0), integer(0), integer(0))),
        "stays": listed(listed(integer(0))),
    },
    {"lengths": listed(mapping(_row_of_numbers))},  # earlier files lack it
)


class KeptBatches:
    """Copies of a calibration's batches on the CPU; later changes of the batches do not reach them."""

    def __init__(self, batches: Sequence[KeptBatch] = ()) -> None:
        self.batches = list(batches)

    def keep(self, batch: Any, place: Place | None = None) -> None:
        """Keep a batch.

        Args:
            batch: The training step's argument, moved and converted.
            place: Place in the fit; None numbers the batch by the kept batches.
        """
        on_cpu = [tensor.device.type == "cpu" for tensor in batch_tensors(batch)]
        stays = () if all(on_cpu) else tuple(i for i, here in enumerate(on_cpu) if here)
        place = place or Place(batch_idx=len(self.batches))
        self.batches.append(KeptBatch(copy_batch(batch, lambda *_: "cpu"), place, stays))

    def note(self, lengths: Mapping[str, Tensor]) -> None:
        """Keep the lengths of the gradients of the last batch (:class:`KeptBatch`)."""
        self.batches[-1] = replace(self.batches[-1], lengths=lengths)

    def on(self, device: Any) -> list[Any]:
        """Return the batches on a device; on the CPU the kept batches themselves, on other devices copies."""
        if torch.empty(0, device=device).device.type == "cpu":
            return [kept.batch for kept in self.batches]
        return [
            copy_batch(kept.batch, lambda i, _, stays=kept.stays: "cpu" if i in stays else device)  # type: ignore[misc]
            for kept in self.batches
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the batches as they are, and everything else as plain data."""
        places = [[kept.place.epoch, kept.place.batch_idx, kept.place.step] for kept in self.batches]
        return {
            "batches": [kept.batch for kept in self.batches],
            "places": places,
            "stays": [list(kept.stays) for kept in self.batches],
            "lengths": [dict(kept.lengths) for kept in self.batches],
        }

    @staticmethod
    def from_state(state: Any, path: str = "") -> KeptBatches:
        """Return the kept batches of a :meth:`state_dict`.

        Args:
            state: The state as it was read. Early checkpoints of version 0.1.0, before batches had places, hold a list
                of batches.
            path: Path of the state in the checkpoint, for messages.

        Raises:
            SchemaError: If the state has another form.
        """
        if isinstance(state, list):
            return KeptBatches([KeptBatch(batch, Place(batch_idx=i)) for i, batch in enumerate(state)])
        _STATE(state, path)
        lengths = state.get("lengths") or [{}] * len(state["batches"])
        parts = zip(state["batches"], state["places"], state["stays"], lengths, strict=True)
        return KeptBatches(
            [KeptBatch(batch, Place(*place), tuple(stays), found) for batch, place, stays, found in parts]
        )
