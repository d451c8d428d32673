"""The observation of rho by FascCallback in the hooks of a fit."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
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
from fasc_lightning.dependence._figures import log_figure
from fasc_lightning.dependence._history import RhoHistory
from fasc_lightning.dependence._history_files import CSV_FILE, draw_history, save_figures
from fasc_lightning.dependence._monitor import RhoMonitor, rho_metrics
from fasc_lightning.dependence._summary import describe
from fasc_lightning.distributed import is_distributed
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
    @property
    def log_layers(self) -> bool | None: ...


def monitor_of(options: MonitorOptions) -> RhoMonitor:
    """Return the monitor that the options ask for."""
    return RhoMonitor(
        options.monitor_every_n_steps or 1,
        options.monitor_tokens,
        options.rho_threshold,
        options.rho_gradient,
        options.seed,
    )


class MonitorPhase(pl.Callback):
    """Observes rho at every n-th optimizer step of a fit, and writes the history to the folder of the fit's loggers.

    Args:
        options: Options of the callback. Those set after this count from the next fit at the latest.
        scales: Scales of gradients, read from the losses of batches.
        undo: Gets the changes to undo when training ends.
    """

    def __init__(self, options: MonitorOptions, *, scales: LossScales, undo: Undo) -> None:
        self._options = options
        self._monitor = monitor_of(options)
        self._scales = scales
        self._undo = undo
        self._layers: TargetedLayers | None = None
        self._rests = False
        self._published: dict[str, Tensor] = {}
        self._stale: set[str] = set()

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
        self._published, self._stale = {}, set()
        self._monitor.forget()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.global_step == 0:  # a checkpoint loads its own history later
            self._monitor.history = RhoHistory()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._observes and self._layers is not None:
            # A resumed fit may have other targets: the layers that both have in common go on.
            history, self._monitor = self.history.only(self._layers.modules), monitor_of(self._options)
            self._monitor.history = history
            self._undo.add(self._monitor.remove)
            self._monitor.start(self._layers.modules, _position(trainer))
            if not trainer.loggers:
                rank_zero_info(
                    "FascCallback: the Trainer has no logger; rho is in `callback.rho_history` "
                    "(`callback.rho_history.to_csv(path)` writes it) and in `trainer.callback_metrics`."
                )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._rests or skips_backward(trainer) or not self._monitor.due(_position(trainer)):
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
        device = trainer.strategy.root_device
        self._monitor.begin_batch(_position(trainer), device, rows, backwards_of(pl_module))

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
        self._monitor.end_batch()
        # With manual optimisation, one batch is one step and one observation.
        ended = not pl_module.automatic_optimization or trainer.global_step != self._monitor.step
        if ended and self._monitor.observing:
            self._close(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._publish(trainer)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._publish(trainer)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._observes:
            try:
                self._write(trainer, figures=False)  # a run that is killed later keeps it
            except OSError as error:  # training and its checkpoint matter more
                rank_zero_warn(f"The history of rho could not be written: {error}.")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close(trainer)
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

    def _close(self, trainer: pl.Trainer) -> None:
        """End the open observation and send its figures to the loggers and the callback metrics."""
        rows = self._monitor.close(distributed=is_distributed(trainer))
        if not rows:
            return
        threshold, layers = self._monitor.threshold, self._options.log_layers is not False
        for logger in trainer.loggers:
            figures = rho_metrics(rows, threshold, logger.group_separator, layers=layers)
            logger.log_metrics(figures, step=_logged_step(trainer))
        now = {name: torch.tensor(value) for name, value in rho_metrics(rows, threshold).items()}
        # The old value of a metric that is undefined now would mislead callbacks that read it.
        self._stale = (self._stale | set(self._published)) - set(now)
        self._published = now
        self._publish(trainer)

    def _publish(self, trainer: pl.Trainer) -> None:
        """Put the last values into the callback metrics again, since Lightning empties them between its loops."""
        metrics = trainer.callback_metrics
        for name in self._stale:
            metrics.pop(name, None)
        metrics.update(self._published)

    def _write(self, trainer: pl.Trainer, figures: bool = True) -> None:
        """Write the history into the folder of the loggers; loggers that take figures get the figures, too."""
        if not (self.history and trainer.loggers and trainer.is_global_zero):
            return
        options, folder = self._options, _folder(trainer)
        if folder is not None:
            self.history.to_csv(folder / CSV_FILE)
        if not figures:
            return
        drawn = draw_history(self.history, options.rho_threshold, options.emergence_observations)
        for name, figure in drawn.items():
            log_figure(trainer.loggers, name, figure, _logged_step(trainer))
        if folder is not None:
            save_figures(drawn, folder)


def _folder(trainer: pl.Trainer) -> Path | None:
    """Return the run's own folder of the first logger that has one."""
    for logger in trainer.loggers:
        if (folder := getattr(logger, "log_dir", None)) is not None:
            return Path(folder)
        if logger.save_dir is not None:
            return Path(logger.save_dir, str(logger.name), str(logger.version))
    return None


def _position(trainer: pl.Trainer) -> int:
    """Return the optimizer steps taken; with manual optimisation the batches, since one may take many steps or none."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return max(0, trainer.fit_loop.total_batch_idx)


def _logged_step(trainer: pl.Trainer) -> int:
    """Return the step under which Lightning logs its own metrics of this batch."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
