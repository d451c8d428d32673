"""A compression and a recovery by as many processes as given; each saves what it ended with.

Run as a script, by each process of a group.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from recovery_cases import FAST
from tiny import Tokens, causal_module
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from fasc_lightning import Distillation, FascCallback, LoraRecovery


def trainer(devices: int, *callbacks: pl.Callback, epochs: int = 1) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


class Saves(pl.Callback):
    """Saves a checkpoint after four steps, in the middle of an epoch of eight."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.file)


def tokens_of(file: Path) -> int:
    """Return the tokens seen so far, as a checkpoint has them."""
    (state,) = torch.load(file, weights_only=True)["callbacks"].values()
    return state["recovery"]["tokens"]


def main() -> None:
    devices, folder, kind = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    recovery = LoraRecovery(r=4, validate_every=3)
    if kind == "cache":
        recovery = LoraRecovery(r=4, teacher=Distillation(cache=str(folder / "cache")))
    # In double precision, so that the order of sums does not decide what is compared.
    module = causal_module().double()
    module.learning_rate = 3e-3
    data, held = Tokens(samples=32), Tokens(samples=8, seed=3)
    callback = FascCallback(**FAST, recovery=recovery)
    trainer(devices, callback).fit(module, DataLoader(data, batch_size=4 // devices))
    fit = trainer(devices, callback, Saves(folder / "middle.ckpt"), epochs=3)
    if kind == "cache":  # samples are held back, and go from one process to the other at every epoch
        fit.fit(module, DataLoader(data, batch_size=4 // devices))
    else:  # Lightning's own sampler shuffles; so that a step sees the same samples, this one does not
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        sampler = DistributedSampler(data, devices, rank, shuffle=False)
        fit.fit(module, DataLoader(data, 4 // devices, sampler=sampler), DataLoader(held, 2))
    content = {"state": module.state_dict(), "figures": callback.report.recovery}
    content["trained"] = [name for name, p in module.named_parameters() if p.requires_grad]
    torch.save({"tokens": tokens_of(folder / "middle.ckpt"), **content}, folder / f"{devices}-{fit.global_rank}.pt")


if __name__ == "__main__":
    main()
