"""A callback that refines when a second fit starts, as recovery does, for tests."""

from __future__ import annotations

import lightning.pytorch as pl
from inside import layers_of
from tiny import token_loader

from fasc_lightning import FascCallback
from fasc_lightning.batches import KeptBatches
from fasc_lightning.options import RefineOptions
from fasc_lightning.refit import RefinePhase

OPTIONS = RefineOptions(steps=30, lr=3e-3)


class Refining(pl.Callback):
    """Keeps the dense layers of the fit in which another callback compresses, and refines at the start of the next."""

    def __init__(self, compression: FascCallback) -> None:
        self.compression = compression
        self.dense = {}
        self.report = None

    def on_fit_end(self, trainer, pl_module):
        if not self.dense:
            layers = layers_of(self.compression)
            self.dense = {name: dense for name, dense in layers.items() if pl_module.get_submodule(name) is not dense}

    def on_fit_start(self, trainer, pl_module):
        if self.dense:
            replay = KeptBatches()
            for batch in token_loader(samples=16, batch_size=2):
                replay.keep(batch)
            RefinePhase.check(pl_module, self.dense)
            self.report = RefinePhase(OPTIONS).run(trainer, pl_module, self.dense, replay)
