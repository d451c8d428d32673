"""A small module of blocks whose step can do what people's steps do, and what a callback that calibrates it saw."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fasc_lightning import FascCallback


class Block(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Blocks(pl.LightningModule):
    """Blocks that can be refitted; ``during`` is called in the step with the module, the batch and its number."""

    def __init__(self, during=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(12, 3)
        self._during = [during] if during is not None else []

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        for during in self._during:
            x = during(self, x, batch_idx)
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def loader(samples=48, batch_size=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 12, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=batch_size)


def compressed(make_trainer, module, data=None, trainer=None, **options):
    """Fit with a callback that replays for all it can, and return the callback."""
    callback = FascCallback(keep=0.6, exclude=["head"], **{"refit": True, "update_weights": False, **options})
    make_trainer(callback, **(trainer or {})).fit(module, loader() if data is None else data)
    assert callback.report is not None
    assert (callback.report.refit is not None) == (callback.refit is True)
    return callback
