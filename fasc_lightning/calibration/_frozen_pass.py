"""One pass over the batches of a fit that trains nothing and lets taps see every layer's inputs and gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from fasc_lightning.batches import LossScales, TokenRows, backwards_of, batch_label
from fasc_lightning.calibration._frozen_fit import FrozenFit
from fasc_lightning.distributed import check_module
from fasc_lightning.hooks import Taps


class FrozenPass(pl.Callback, ABC):
    """Runs taps over all batches with the module frozen; hooks and freezing end with the fit, however it ends."""

    def __init__(self) -> None:
        self._taps: Taps | None = None
        self._rows: TokenRows | None = None
        self._scales = LossScales()
        self._frozen: FrozenFit | None = None

    @abstractmethod
    def make_taps(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Taps:
        """Return the taps, before the first batch."""

    @abstractmethod
    def make_rows(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> TokenRows:
        """Describe a batch for the taps."""

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_module(pl_module, compresses=False)
        self._taps = self.make_taps(trainer, pl_module)
        self._frozen = FrozenFit(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._taps is not None
        assert self._frozen is not None
        self._frozen.enter()
        self._taps.install()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self._taps is not None
        self._rows = self.make_rows(trainer, pl_module, batch)
        self._taps.begin_batch(self._rows, backwards_of(pl_module))

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        assert self._taps is not None
        assert self._frozen is not None
        self._scales.take(loss, self._rows, label=batch_label(trainer))
        self._frozen.lend_gradient(loss)
        self._taps.begin_backward()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._taps is not None
        assert self._frozen is not None
        self._taps.end_backward()
        self._taps.settle()
        self._frozen.take_gradient_back()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._taps is not None
        self._taps.end_batch()
        self._rows = None

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._taps is not None:
            self._taps.remove()
        if self._frozen is not None:
            self._frozen.exit()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")
