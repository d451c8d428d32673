"""Uneven inputs: processes of one calibration with different numbers of batches, and processes that have ended.

Collective operations are matched by their order. A process whose epoch is over calls other ones than the processes that
still have batches. They then wait for each other until the process group's timeout (30 minutes by default), or mix up
two sums. So after each batch of a calibration the processes count how many of them have had their last batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fasc_lightning.distributed._collectives import gather_everywhere, is_distributed, sum_everywhere

_HINT = (
    "HINT: limit_train_batches, or a loader that deals samples out evenly (Trainer(use_distributed_sampler=True)). "
    "A fit of one epoch under 'ddp' with update_weights=False takes uneven ones."
)


class UnevenInputs:
    """Lets processes calibrate on different numbers of batches, or ends the calibration on all of them at once.

    If every process works alone until the statistics are summed (frozen weights, under DDP), processes that are done
    take part in the operations that the others' batches need. Otherwise a batch needs all processes.

    Args:
        needed: Why a batch needs all processes; "" if each works alone.
    """

    def __init__(self, needed: str) -> None:
        self._needed = needed

    def start(self, trainer: pl.Trainer, whole_fit: bool) -> None:
        """Compare the known numbers of batches, before the first batch of training.

        Args:
            trainer: Trainer of the fit.
            whole_fit: Whether the whole fit is the calibration, one epoch for each pass.

        Raises:
            MisconfigurationException: On every process, if the numbers differ and must not.
        """
        if not whole_fit:
            self._needed = self._needed or "batches before the calibration are trained on"
        self._needed = self._needed or _meets_in_epoch(trainer)
        counts = gather_everywhere(trainer, trainer.num_training_batches)
        if len(set(counts)) == 1:
            return
        said = f"there are {', '.join(map(str, counts))}, process by process"
        if self._needed:
            raise MisconfigurationException(
                f"Expected as many batches on every process but {said}, and {self._needed}: some would wait for "
                f"batches that never come. {_HINT}"
            )
        rank_zero_info(f"FascCallback: processes calibrate on unequal numbers of batches; {said}.")

    def end_batch(self, trainer: pl.Trainer) -> None:
        """Tell the other processes that a batch is over; return once this process may go on.

        Raises:
            RuntimeError: On every process, if some have had their last batch and the others need them; or if another
                process has ended.
        """
        if not is_distributed(trainer):
            return
        loop = trainer.fit_loop.epoch_loop
        last = loop._num_ready_batches_reached()
        ended = _sum(trainer, last)
        if ended in (0, trainer.world_size):
            return
        if self._needed:
            raise RuntimeError(
                f"Expected as many batches on every process but {ended} of {trainer.world_size} processes have had "
                f"their last one, and {self._needed}. The model is unchanged. {_HINT}"
            )
        while last and ended < trainer.world_size:
            if hasattr(loop, "_broadcast_sigterm_tensor"):  # as Lightning does before each batch
                loop._broadcast_sigterm_tensor()
            ended = _sum(trainer, last)


@contextmanager
def others_present() -> Iterator[None]:
    """Explain a failure of a collective operation during the calibration.

    Raises:
        RuntimeError: In place of the backend's own.
    """
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "Expected an answer of every process but one has ended, or failed, while the model was calibrated. See "
            f"its own output. The model is unchanged. ({error})"
        ) from error


def _sum(trainer: pl.Trainer, value: bool) -> int:
    with others_present():
        return sum_everywhere(trainer, int(value))


def _meets_in_epoch(trainer: pl.Trainer) -> str:
    """Return why the processes must meet before their epoch is over; "" if they do not."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.enable_validation and (trainer.val_check_interval or 0) not in (1.0, 0):
        return f"all validate together before the epoch is over (val_check_interval={trainer.val_check_interval})"
    checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    if any(c._every_n_train_steps > 0 or c._train_time_interval is not None for c in checkpoints):
        return "all save checkpoints together before the epoch is over"
    return "" if loop.max_steps == -1 else "all stop at the same step (max_steps)"
