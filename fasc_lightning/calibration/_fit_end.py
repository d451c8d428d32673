"""The remaining length of a fit, as far as its Trainer knows it.

A Trainer knows its end by epochs, by steps or not at all, and it may be wrong: a stream has no length, an
`IterableDataset` or `limit_train_batches` may overstate it, accumulation may change with the epoch, and a callback may
add an epoch that trains nothing.
"""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging

from fasc_lightning.batches import is_stateful, train_loaders
from fasc_lightning.distributed import gather_everywhere


class FitEnd:
    """Counts the steps that are left of a fit; with manual optimisation a step is a batch.

    Attributes:
        max_epochs: ``max_epochs`` of the Trainer, as its user gave it.
    """

    def __init__(self) -> None:
        self.max_epochs: int | None = None
        self._batches: int | None = None  # real length of an epoch, if its loader claims more or has no length
        self._again = 0  # batches of a resumed epoch that Lightning has counted and yet takes from the loader again

    def set_up(self, trainer: pl.Trainer) -> None:
        """Read the Trainer's own end. Call it in ``setup``: averaging callbacks add epochs in ``on_fit_start``."""
        self.max_epochs, self._batches, self._again = trainer.max_epochs, None, 0

    def start(self, trainer: pl.Trainer) -> None:
        """Learn the length of an epoch from the epochs before a resumed training."""
        total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        done = batches_done(trainer)
        if trainer.current_epoch > 0:
            self._learn(trainer, (total.processed - done) // trainer.current_epoch)
        if not all(is_stateful(loader) for loader in train_loaders(trainer)):
            self._again = done

    def end_epoch(self, trainer: pl.Trainer) -> None:
        """Learn the length of an epoch that ended; on all processes together."""
        current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        self._learn(trainer, current.ready, self._again)
        self._again = 0

    def _learn(self, trainer: pl.Trainer, batches: int, again: int = 0) -> None:
        fewest = min(gather_everywhere(trainer, batches))  # processes have to agree on the start of a calibration
        self._batches = fewest - again if again < fewest < trainer.num_training_batches else None

    def training_epochs(self, trainer: pl.Trainer) -> int | None:
        """Return the number of epochs with backward passes; None if there is no limit.

        StochasticWeightAveraging adds an epoch for running statistics alone if a module has batch norm.
        """
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            return None
        return self.max_epochs if averages_epochs(trainer) else trainer.max_epochs

    def epochs_left(self, trainer: pl.Trainer) -> float:
        """Return how many epochs with backward passes are left, this one included; 0 or less after the last."""
        epochs = self.training_epochs(trainer)
        return math.inf if epochs is None else epochs - trainer.current_epoch

    def is_length_known(self, trainer: pl.Trainer) -> bool:
        """Return whether the Trainer or an earlier epoch gives the number of batches of an epoch, right or wrong."""
        return self._batches is not None or trainer.num_training_batches != math.inf

    def steps_left(self, trainer: pl.Trainer, enough: int) -> float:
        """Return how many steps are left, this batch's included; infinity if that is not known.

        Args:
            trainer: Trainer of the fit, at the start of a batch or of the training.
            enough: Number of steps above which the count may stop.
        """
        left = self._left_by_epochs(trainer, enough)
        if trainer.max_steps != -1:
            left = min(left, math.ceil((trainer.max_steps - trainer.global_step) / steps_per_batch(trainer)))
        return left

    def _left_by_epochs(self, trainer: pl.Trainer, enough: int) -> float:
        epochs = self.training_epochs(trainer)
        if epochs is None or not self.is_length_known(trainer):
            return math.inf
        if trainer.current_epoch >= epochs:
            return 0
        current = trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 1
        left = self._steps(trainer, current) - batches_done(trainer) // current
        for epoch in range(trainer.current_epoch + 1, epochs):
            if left > enough:
                break
            left += self._steps(trainer, _accumulation(trainer, epoch))
        return left

    def _steps(self, trainer: pl.Trainer, accumulate: int) -> int:
        """Return the steps of an epoch."""
        claimed = trainer.num_training_batches
        if self._batches is None:
            return math.ceil(claimed / accumulate)
        if claimed == math.inf:
            return math.ceil(self._batches / accumulate)
        # If the loader claims more, Lightning does not notice the last batch and takes no step for an incomplete group.
        return max(1, self._batches // accumulate)


def averages_epochs(trainer: pl.Trainer) -> bool:
    """Return whether a callback averages weights over a number of epochs that is fixed at the start of the fit."""
    return any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]


def batches_done(trainer: pl.Trainer) -> int:
    """Return the number of finished batches of this epoch; 0 between two epochs."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return batches.processed if epochs.started > epochs.processed else 0


def steps_per_batch(trainer: pl.Trainer) -> float:
    """Return the increase of the Trainer's step count per step of a calibration."""
    if trainer.lightning_module.automatic_optimization:
        return 1
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    if total.processed and trainer.global_step:
        return trainer.global_step / total.processed
    return max(1, len(trainer.optimizers))


def _accumulation(trainer: pl.Trainer, epoch: int) -> int:
    """Return the number of batches per step in a future epoch."""
    if not trainer.lightning_module.automatic_optimization:
        return 1
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches
