"""A fit of the package `pytorch_lightning` with a FascCallback, which has to name the right import."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from tiny import feature_loader
from torch import nn

from fasc_lightning import FascCallback


class Mine(pl.LightningModule):
    """A module of the other namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(12, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


for callback in (FascCallback(rank=0.5), FascCallback(monitor=1)):
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        accelerator="cpu",
    )  # fmt: skip
    try:
        trainer.fit(Mine(), feature_loader())
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)  # noqa: T201
    else:
        raise AssertionError("the fit was not refused")
