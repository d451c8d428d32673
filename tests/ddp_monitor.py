"""A monitored fit on the number of devices given; each process saves the history that it ends with.

Run as a script, by each process of a group.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch.distributed as dist
from tiny import Tokens, causal_module
from torch.utils.data import DataLoader, Sampler

from fasc_lightning import FascCallback

SAMPLES = 40


class Interleaved(Sampler):
    """Every process takes its own of each round of samples; Lightning's own sampler would shuffle."""

    def __iter__(self):
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return iter(range(rank, SAMPLES, world))

    def __len__(self) -> int:
        return SAMPLES // (dist.get_world_size() if dist.is_initialized() else 1)


def main() -> None:
    devices = int(sys.argv[1])
    callback = FascCallback(monitor_every_n_steps=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        # The same eight samples in an optimizer step: accumulated by one process, or half of them by each of two.
        accumulate_grad_batches=8 // devices,
        use_distributed_sampler=False,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(causal_module(), DataLoader(Tokens(samples=SAMPLES, length=24), batch_size=1, sampler=Interleaved()))
    assert trainer.callback_metrics["fasc/rho_mean"] > 0
    callback.rho_history.to_csv(Path(sys.argv[3]) / f"{sys.argv[2]}-{trainer.global_rank}.csv")


if __name__ == "__main__":
    main()
