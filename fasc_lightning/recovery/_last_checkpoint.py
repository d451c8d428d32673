"""Checkpoints that a Trainer saves at the end of a fit."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from fasc_lightning._utils import Undo


def set_aside_optimizers(trainer: pl.Trainer, failed: Undo) -> None:
    """Leave optimizers and schedulers out of a Trainer's last checkpoint, unless the fit fails."""
    strategy = trainer.strategy
    failed.add(setattr, strategy, "optimizers", strategy.optimizers)
    failed.add(setattr, strategy, "lr_scheduler_configs", strategy.lr_scheduler_configs)
    strategy.optimizers, strategy.lr_scheduler_configs = [], []


def saves_on_exception(trainer: pl.Trainer) -> bool:
    """Return whether a callback saves a checkpoint when a fit fails or is interrupted."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(c, OnExceptionCheckpoint) or getattr(c, "save_on_exception", False) for c in callbacks)
