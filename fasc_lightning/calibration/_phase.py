"""The calibration and compression of FascCallback in the hooks of a fit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from fasc_lightning._utils import Undo, undoing
from fasc_lightning.batches import LossScales
from fasc_lightning.calibration._checks import check_batches_given
from fasc_lightning.calibration._resume import CalibrationCheckpoint
from fasc_lightning.calibration._run import CalibrationRun
from fasc_lightning.calibration._schedule import CalibrationSchedule
from fasc_lightning.calibration._validation import ValidationLoss
from fasc_lightning.compression import CompressionReport, check_fits
from fasc_lightning.dependence import MonitorPhase
from fasc_lightning.distributed import check_weights
from fasc_lightning.layers import TargetedLayers, linear_weight
from fasc_lightning.options import CalibrationOptions, CompressionOptions
from fasc_lightning.recovery import RecoveryStage


class CalibrationPhase(pl.Callback):
    """Calibrates on the last batches of a fit, compresses the module when the fit ends, and survives interruptions.

    Without a budget, and in a fit that continues a compressed checkpoint, it does nothing.

    Args:
        options: Options of the callback.
        monitor: Phase that observes rho, but not while the module is frozen. Its observations size the sketches.
        recovery: The recovery in the next fit, which has needs in this one.
        forecast: Function that returns the forecast of the compression, or raises if it does not fit. Its arguments are
            the module, its layers, the options, the device, whether the moments stay for a refit, the sketches and the
            number of passes.
        key: Key of the callback's state in checkpoints.
        scales: Scales of gradients, read from the losses of batches.
        undo: Gets the changes to undo when training ends, and is closed then.
        failed: Gets the changes to undo if the fit fails.

    Attributes:
        run: The calibration of this fit, if there is one.
        schedule: Decides when the calibration takes place.
        report: The report, once the module is compressed.
    """

    def __init__(
        self,
        options: CompressionOptions,
        monitor: MonitorPhase,
        recovery: RecoveryStage,
        forecast: Callable[..., object],
        *,
        key: str,
        scales: LossScales,
        undo: Undo,
        failed: Undo,
    ) -> None:
        self._options = options
        self._monitor = monitor
        self._recovery = recovery
        self._forecast = forecast
        self._scales = scales
        self._undo = undo
        self._failed = failed
        self._checkpoint = CalibrationCheckpoint(key)
        self._layers: TargetedLayers | None = None
        self.schedule = self._scheduled()
        self.run: CalibrationRun | None = None
        self.report: CompressionReport | None = None
        self._validation: ValidationLoss | None = None

    def _scheduled(self) -> CalibrationSchedule:
        options = self._options
        return CalibrationSchedule(options.calibration_steps, options.passes, freezes=not options.update_weights)

    @property
    def _compresses(self) -> bool:
        return self._options.compresses

    def target(self, layers: TargetedLayers) -> None:
        """Take the layers of a fit, before it starts."""
        self._layers = layers

    def forget(self) -> None:
        """Drop all state of a fit, and restore the Trainer; safe at any time."""
        with undoing() as undo:
            undo.add(self._drop)
            undo.add(self._checkpoint.remove)
            undo.add(self.schedule.stop)

    def _drop(self) -> None:
        self.run = self._layers = self.report = self._validation = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.schedule = self._scheduled()  # by the options that have been set since the last fit
        self.schedule.set_up(trainer)
        if self._compresses:
            self._checkpoint.install(trainer)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.run is None or self.report is not None:
            return
        if self.run.begun:
            self._checkpoint.save(trainer, self.run, self.schedule, checkpoint)
        else:
            self._checkpoint.save_place(trainer, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._checkpoint.load(trainer, checkpoint)
        if self.run is not None:  # strategies that shard weights load them after `on_fit_start`
            self._checkpoint.resume(trainer, self.run, self.schedule)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._layers is None or not self._compresses:
            return
        options, layers, modules = self._options, self._layers, self._layers.modules
        check_batches_given(pl_module, options.loss_terms, options.token_mask)
        self.schedule.check(trainer)  # earlier the fit might still turn out to be a recovery
        check_weights((name, linear_weight(layer)) for name, layer in modules.items())
        self._recovery.check(pl_module, modules)
        check_fits(pl_module, layers, options)
        gathered, refinement = CalibrationOptions.of(options), self._recovery.refinement
        self.run = run = CalibrationRun(trainer, pl_module, layers, gathered, refinement, self._monitor.history)
        self._undo.add(run.release)
        device = trainer.strategy.root_device
        planned = self._forecast(pl_module, layers, options, device, run.refits, run.sketches, run.passes)
        rank_zero_info(f"FascCallback: {planned}")
        self._checkpoint.resume(trainer, run, self.schedule)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.run is not None:
            self.schedule.start(trainer)
            self._checkpoint.start(trainer, self.schedule)
            self.run.start(trainer, is_whole_fit=self.schedule.is_whole_fit(trainer))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.run is None:
            return
        if self.schedule.begins(trainer):
            self.run.begin_batch(trainer, pl_module, batch)
        elif self.run.running:
            self.run.pause()
        self._monitor.rest(self.run.frozen)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self.run is not None and self.run.running:
            self.run.begin_backward(trainer, loss, self._scales)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.run is not None:
            self.run.end_backward()

    @override
    def on_before_optimizer_step(self, *args: Any) -> None:
        if self.run is not None:
            self.run.settle_rows()  # refuses values before they get into the weights

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.run is not None:
            self.run.end_batch(trainer, outputs)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.run is not None:
            self.run.end_epoch(trainer)
            self.schedule.end_epoch(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._undo.close()
        self.schedule.stop()
        if self.run is not None and self.run.begun:
            # Every process is still in the loop here, and on the device of the process group.
            self.run.end(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.run is None:
            return
        if not self.run.begun:
            raise MisconfigurationException(
                "Expected at least one calibration batch but the fit ended without any: "
                f"{self.schedule.end_unmet()} The model is not compressed."
            )
        self.run.end(trainer)  # A fit with no batch left to run neither starts nor ends its training.
        self._failed.keep(pl_module, attributes=True)
        # Every `on_train_end` has run, so averaging callbacks have put their weights in place.
        self._validation = ValidationLoss(trainer, pl_module, self._options)
        report, replaced = self.run.compress(trainer, pl_module, self._options, self._failed)
        self._failed.set(self, "report", report)
        self._recovery.keep(replaced)

    def validated(self, report: CompressionReport) -> CompressionReport:
        """Return the report with the loss on validation batches, of the module as it is now."""
        return report if self._validation is None else self._validation.add_to(report)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.run is not None:
            with suppress(Exception):  # the user has to see the first exception
                self.run.settle(trainer)

    def after_exception(self, trainer: pl.Trainer, exception: BaseException, end: Callable[[], None]) -> None:
        """Call a function after other callbacks have saved their checkpoints of an exception."""
        self._checkpoint.after_exception(trainer, exception, end)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.run is not None and self.report is not None:
            self._checkpoint.clean(trainer)
