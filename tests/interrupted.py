"""Fits that are interrupted and go on: what they train on, how they are stopped, and what is compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Tokens, causal_module, token_loader
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from watching import RecordingCallback

from fasc_lightning.calibration._sidecar import SUFFIX
from fasc_lightning.statistics._nystrom import NystromMoment

#: Batches of two in the training data.
BATCHES = 8


class Endless(IterableDataset):
    """Tokens one after the other, of which nobody says how many there are."""

    def __iter__(self):
        yield from Tokens(samples=2 * BATCHES)


def stateful_loader(endless: bool = False, **options):
    """Two samples a batch, shuffled by a generator of its own unless there is no length."""
    if endless:
        return StatefulDataLoader(Endless(), batch_size=2, **options)
    return StatefulDataLoader(Tokens(samples=2 * BATCHES), batch_size=2, shuffle=True, **options)


class Copying(pl.Callback):
    """Copies the folder of checkpoints as it is when a batch begins: all that a killed process leaves."""

    def __init__(self, source: Path, target: Path, batch: int, epoch: int = 0) -> None:
        self.source, self.target, self.batch, self.epoch = source, target, batch, epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            shutil.copytree(self.source, self.target)


def every_batch(folder: Path) -> ModelCheckpoint:
    """Saves last.ckpt after every batch."""
    return ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=0, save_last=True)


def failing(folder: Path) -> ModelCheckpoint:
    """Saves failed.ckpt when a fit fails, and nothing else."""
    return ModelCheckpoint(folder, "failed", save_on_exception=True, every_n_epochs=0)


class Between(pl.Callback):
    """Raises where Lightning itself does when it is told to stop: between two batches."""

    def __init__(self, batch: int, epoch: int = 0) -> None:
        self.at = epoch, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            raise InterruptedError


class Fits:
    """One fit that is never interrupted, and its continuation from what was there in the middle of it."""

    def __init__(
        self,
        make_trainer,
        folder: Path,
        *,
        family: str = "llama",
        model: dict | None = None,
        trainer: dict | None = None,
        loader=None,
        validation: bool = False,
        **options,
    ):
        self.make_trainer, self.folder, self.validation = make_trainer, folder, validation
        self.family, self.model, self.trainer = family, model or {}, trainer or {}
        self.loader = loader or stateful_loader
        # A refit reads what a compression without one reads, and takes a third of a fit's time: two cases have one.
        self.options = {"keep": 0.6, "update_weights": False, "refit": False, **options}

    def run(self, *callbacks, ckpt_path=None, loader=None, trainer=None, **options):
        """Fit; return the module and the callback."""
        torch.manual_seed(1)  # of loaders and dropout
        callback = RecordingCallback(**{**self.options, **options})
        made = self.make_trainer(callback, *callbacks, enable_checkpointing=True, **{**self.trainer, **(trainer or {})})
        module = causal_module(self.family, **self.model)
        torch.manual_seed(2 if ckpt_path is None else 3)
        validation = token_loader(samples=4) if self.validation else None
        made.fit(module, (loader or self.loader)(), validation, ckpt_path=ckpt_path)
        return module, callback

    def straight(self, batch: int, epoch: int = 0):
        """Fit without interruption; what a process killed before a batch would leave is in ``folder / "left"``."""
        running = self.folder / "running"
        result = self.run(every_batch(running), Copying(running, self.folder / "left", batch, epoch))
        self.left_running = sorted(p.name for p in running.iterdir())
        return result

    def resumed(self, folder: str = "running", **options):
        """Continue from what was left; save in the folder in which the first process did, which Lightning compares."""
        return self.run(every_batch(self.folder / folder), ckpt_path=self.folder / "left" / "last.ckpt", **options)


def sidecars(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(SUFFIX))


def assert_same(found, expected):
    """Two fits ended alike, to the last bit: factors, statistics, scores, and what the refit was given."""
    (module, callback), (straight, reference) = found, expected
    states = module.state_dict(), straight.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert callback.kept_moments.shapes == reference.kept_moments.shapes
    for name in reference.kept_moments.shapes:
        fields = vars(reference.kept_moments.layer(name))
        assert all(equal(vars(callback.kept_moments.layer(name))[key], value) for key, value in fields.items())
    assert [plain(row) for row in callback.report.layers] == [plain(row) for row in reference.report.layers]
    assert callback.report.refit == reference.report.refit


def equal(a, b):
    if isinstance(a, tuple):
        return all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, NystromMoment):
        return equal(tuple(vars(a).values()), tuple(vars(b).values()))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def plain(row):
    """A row whose undefined numbers are equal to themselves."""
    return {key: None if value != value else value for key, value in vars(row).items()}
