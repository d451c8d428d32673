"""A fit that ends itself in its calibration, or goes on after that; each process saves what it ends with.

Run as a script, by each process of a group.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from inside import kept_by
from interrupted import every_batch, failing
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tiny import Tokens, causal_module
from torchdata.stateful_dataloader import StatefulDataLoader
from watching import RecordingCallback

from fasc_lightning.calibration import _sidecar as sidecar


class Watch(pl.Callback):
    """Notes what the batches hold, and ends the fit before one of them."""

    def __init__(self, what: str) -> None:
        self.what, self.seen, self.replayed = what, [], 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.what == "kill" and (trainer.current_epoch, batch_idx) == (1, 5):
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append(batch["input_ids"].tolist())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) != (1, 4):
            return
        if self.what == "terminate":
            raise SIGTERMException
        if self.what == "fail" and trainer.is_global_zero:
            raise InterruptedError

    def on_train_end(self, trainer, pl_module):
        self.replayed = len(kept_by(trainer.callbacks[0]))


def fit(devices: int, folder: Path, what: str = "") -> None:
    """Fit for two epochs; in the second one "kill", "terminate" or "fail" (the first process does).

    It goes on from what an earlier one has left in the folder.
    """
    torch.manual_seed(0)
    callback, watch = RecordingCallback(keep=0.6, seed=1), Watch(what)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, watch, every_batch(folder), failing(folder)],
    )
    # In double precision, so that the order of sums does not decide what is compared.
    module = causal_module().double()
    loader = StatefulDataLoader(Tokens(samples=16 * devices), batch_size=2, shuffle=True)
    last = next((path for name in ("failed", "last") if (path := folder / f"{name}.ckpt").exists()), None)
    trainer.fit(module, loader, ckpt_path=last)
    content = {
        "state": module.state_dict(),
        "ranks": {row.name: row.rank for row in callback.report.layers},
        "batches": callback.batches,
        "seen": watch.seen,
        "replayed": watch.replayed,
    }
    torch.save(content, folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    sidecar.SIDECAR_BYTES = 0
    fit(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
