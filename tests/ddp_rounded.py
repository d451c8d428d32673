"""A calibration that rounds, under the strategy and number of devices given; each process saves what it ended with.

Run as a script, by each process of a group.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from tiny import causal_module, token_loader

from fasc_lightning import FascCallback


def main() -> None:
    devices, name, folder, options = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
    module, callback = causal_module(), FascCallback(update_weights=False, **options)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(module, token_loader(batch_size=2, samples=16, length=24, padded=True))
    report = callback.report
    bits = {row.name: row.bits for row in report.layers}
    losses = {row.name: row.loss for row in report.layers}
    content = {"bits": bits, "losses": losses, "state": module.state_dict(), "refit": report.refit}
    torch.save(content, folder / f"{name}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
