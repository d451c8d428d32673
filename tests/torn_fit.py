"""Fits of two processes that go on from what is on the disk while a checkpoint is written: all that a kill leaves.

Run as a script, by each process of a group.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from interrupted import every_batch
from lightning.fabric.plugins import TorchCheckpointIO
from tiny import Tokens, causal_module
from torchdata.stateful_dataloader import StatefulDataLoader
from watching import RecordingCallback

from fasc_lightning.calibration import _sidecar as sidecar

#: Writes that are torn: in the epoch before the calibration, the first one of the calibration, one in it, the last.
TORN = (4, 9, 11, 16)


class Torn(TorchCheckpointIO):
    """Copies the folder in the middle of some writes: the sidecar of the new checkpoint is there, and the old one."""

    def __init__(self, copies: Path | None) -> None:
        self.copies, self.writes = copies, 0

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.writes += 1
        if self.copies is not None and self.writes in TORN:
            shutil.copytree(Path(path).parent, self.copies / str(self.writes))
        super().save_checkpoint(checkpoint, path, storage_options)


class Seen(pl.Callback):
    """Notes what the batches hold."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch["input_ids"].tolist())


def fit(folder: Path, copies: Path | None = None, ckpt_path: Path | None = None) -> dict:
    """Fit two epochs in single precision; the second one is the calibration, and trains on."""
    torch.manual_seed(0 if ckpt_path is None else 1)  # of the order of samples, which the checkpoint has to bring
    callback, seen = RecordingCallback(keep=0.6, seed=1), Seen()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        callbacks=[callback, seen, every_batch(folder)],
        plugins=[Torn(copies)],
        **quiet,
    )
    module = causal_module()
    trainer.fit(module, StatefulDataLoader(Tokens(samples=32), batch_size=2, shuffle=True), ckpt_path=ckpt_path)
    rows = {row.name: (row.rank, row.loss, row.rho, row.rho_null) for row in callback.report.layers}
    return {"state": module.state_dict(), "rows": rows, "seen": seen.seen, "batches": callback.batches}


def main(folder: Path) -> None:
    sidecar.SIDECAR_BYTES = 0
    running = folder / "running"
    running.mkdir(exist_ok=True)
    ends = {"straight": fit(running, folder)}
    for write in TORN:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(running)
            shutil.copytree(folder / str(write), running)
        dist.barrier()
        ends[str(write)] = fit(running, ckpt_path=running / "last.ckpt")
    torch.save(ends, folder / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
