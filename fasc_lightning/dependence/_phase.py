"""The observation of rho by FascCallback in the hooks of a fit."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from fasc_lightning._utils import Undo
from fasc_lightning.batches import (
    LossScales,
    LossTerms,
    TokenMask,
    backwards_of,
    batch_label,
    observed_rows,
    skips_backward,
)
from fasc_lightning.dependence._history import RhoHistory
from fasc_lightning.dependence._monitor import RhoMonitor, write_history
from fasc_lightning.dependence._summary import describe
from fasc_lightning.layers import Gradient, TargetedLayers


class MonitorOptions(Protocol):
    """The options of :class:`~fasc_lightning.FascCallback` that an observation reads, each at its use."""

    seed: int

    @property
    def token_mask(self) -> TokenMask | None: ...
    @property
    def loss_terms(self) -> LossTerms | None: ...
    @property
    def monitor_every_n_steps(self) -> int | None: ...
    @property
    def monitor_tokens(self) -> int: ...
    @property
    def rho_threshold(self) -> float: ...
    @property
    def emergence_observations(self) -> int: ...
    @property
    def rho_gradient(self) -> Gradient: ...


class MonitorPhase(pl.Callback):
    """Observes rho at every n-th optimizer step of a fit, and writes the history to the folder of the fit's loggers.

    Args:
        options: Options of the callback. Those set after this count from the next fit at the latest.
        scales: Scales of gradients, read from the losses of batches.
        undo: Gets the changes to undo when training ends.
    """

    def __init__(self, options: MonitorOptions, *, scales: LossScales, undo: Undo) -> None:
        self._options = options
        self._monitor = self._made()
        self._scales = scales
        self._undo = undo
        self._layers: TargetedLayers | None = None
        self._rests = False

    def _made(self) -> RhoMonitor:
        options = self._options
        return RhoMonitor(
            options.monitor_every_n_steps or 1,
            options.monitor_tokens,
            options.rho_threshold,
            options.rho_gradient,
            options.seed,
        )

    @property
    def _observes(self) -> bool:
        return self._options.monitor_every_n_steps is not None

    @property
    def history(self) -> RhoHistory:
        """Observed rho, one row per layer and step."""
        return self._monitor.history

    def target(self, layers: TargetedLayers) -> None:
        """Take the layers of a fit, before it starts."""
        self._layers = layers

    def rest(self, rests: bool) -> None:
        """Pause or continue the observation.

        Args:
            rests: Whether the module is frozen. Its rho then stays the same, and the calibration measures it.
        """
        self._rests = rests

    def forget(self) -> None:
        """Drop all state of a fit except the history; safe at any time."""
        self._layers, self._rests = None, False
        self._monitor.forget()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.global_step == 0:  # a checkpoint loads its own history later
            self._monitor.history = RhoHistory()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._observes and self._layers is not None:
            # A resumed fit may have other targets: the layers that both have in common go on.
            history, self._monitor = self.history.only(self._layers.modules), self._made()
            self._monitor.history = history
            self._undo.add(self._monitor.remove)
            self._monitor.start(trainer, self._layers.modules)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._rests or skips_backward(trainer) or not self._monitor.due(trainer):
            return
        rows = observed_rows(
            trainer,
            pl_module,
            batch,
            token_mask=self._options.token_mask,
            loss_terms=self._options.loss_terms,
            tokens=self._monitor.tokens,
            seed=self._monitor.seed,
        )
        self._monitor.begin_batch(trainer, rows, backwards_of(pl_module))

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._scales.take(loss, self._monitor.rows, label=batch_label(trainer))
        self._monitor.begin_backward()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._monitor.end_backward()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._monitor.end_batch(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._monitor.publish(trainer)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._monitor.publish(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._monitor.close(trainer)
        if self._observes:
            self._write(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._observes:
            options = self._options
            summary = describe(self.history, options.rho_threshold, options.emergence_observations)
            rank_zero_info(f"FascCallback: {summary}")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._observes:
            with suppress(OSError):  # the user has to see the first exception
                self._write(trainer, figures=False)

    def _write(self, trainer: pl.Trainer, figures: bool = True) -> None:
        options = self._options
        write_history(trainer, self.history, options.rho_threshold, options.emergence_observations, figures)
