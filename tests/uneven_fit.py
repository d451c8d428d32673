"""Calibrations of two processes with unequal numbers of batches; each saves what it ends with.

Run as a script, by each process of a group.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from inside import moments_of
from lightning.pytorch.callbacks import ModelCheckpoint
from sharded_fit import ShardedModule, error_of, is_plain, make_module, make_trainer
from tiny import Tokens
from torch.utils.data import DataLoader, IterableDataset, Subset

from fasc_lightning import FascCallback
from fasc_lightning.layers import is_compressed

#: First and last sample of each process; two samples a batch.
SHARES = {"fewer on the second": ((0, 10), (10, 16)), "fewer on the first": ((0, 4), (4, 16))}


class Endless(IterableDataset):
    """Samples of which nobody says how many there are."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __iter__(self):
        yield from self.samples


def loader(share: tuple[int, int], endless: bool) -> DataLoader:
    """Some of sixteen samples, of unequal padding."""
    samples = Subset(Tokens(samples=16, length=24, padded=True), range(*share))
    return DataLoader(Endless(samples) if endless else samples, batch_size=2)


class Keeping(FascCallback):
    """Keeps a copy of the moments."""

    def on_fit_end(self, trainer, pl_module):
        self.kept = copy.deepcopy(moments_of(self))
        super().on_fit_end(trainer, pl_module)


def fit(strategy: str, share: str, endless: bool, *more: pl.Callback, epochs: int = 1, **options: Any) -> dict:
    """What a fit ends with, in plain data."""
    callback, module = Keeping(rank=0.5, allocation="fisher", refit=False, **options), make_module(ShardedModule)
    trainer = make_trainer(strategy, callback, *more, use_distributed_sampler=False, max_epochs=epochs)
    rank = int(trainer.global_rank)
    said = error_of(trainer.fit, module, loader(SHARES[share][rank], endless))
    found: dict[str, Any] = {"error": said, "compressed": is_compressed(module), "plain": is_plain(module)}
    if callback.report is not None:
        found["moments"] = {name: vars(callback.kept.layer(name)) for name in callback.kept.shapes}
        found["state"] = module.state_dict()
    return found


def main(folder: Path) -> None:
    found = {
        (share, endless): fit("ddp", share, endless, update_weights=False)
        for share in SHARES
        for endless in (False, True)
    }
    first = "fewer on the first"
    every = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=0, save_last=True)
    refused = {
        "trained": fit("ddp", first, False),
        "trained, endless": fit("ddp", first, True),
        "sharded": fit("fsdp2", first, False, update_weights=False),
        "sharded, endless": fit("fsdp2", first, True, update_weights=False),
        "two epochs": fit("ddp", first, False, epochs=2, update_weights=False),
        "checkpoints": fit("ddp", first, False, every, update_weights=False),
    }
    passes = fit("ddp", first, False, epochs=2, passes=2, update_weights=False)
    torch.save({"found": found, "refused": refused, "passes": passes}, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
