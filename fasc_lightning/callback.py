"""FascCallback: the phases of a fit that ends with a smaller model."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from fasc_lightning._utils import Undo, undoing
from fasc_lightning.batches import LossScales, backwards_of, batch_label, observed_rows
from fasc_lightning.calibration import (
    Calibration,
    CalibrationCheckpoint,
    CalibrationSchedule,
    check_batches_given,
    check_epochs_left,
    check_loss,
    replace_calibrated,
    skips_backward,
)
from fasc_lightning.compression import (
    CompressionReport,
    check_budget_fits,
    check_callback_state,
    check_rank_fits,
    log_report,
    sealed,
)
from fasc_lightning.dependence import RhoHistory, RhoMonitor, describe, write_history
from fasc_lightning.distributed import check_module, check_sharded, check_single, check_strategy, check_weights
from fasc_lightning.layers import (
    is_compressed,
    layer_shapes,
    linear_weight,
    select_layers,
    unfuse,
    warn_other_layers,
    warn_tied_layers,
    warn_unknown_experts,
    warn_without_way_back,
)
from fasc_lightning.models import attach_config, match_on_load, quantize_layers
from fasc_lightning.options import CalibrationOptions, CompressionOptions, as_recovery, reported
from fasc_lightning.planning import layers_forecast
from fasc_lightning.recovery import RecoveryCallback, RecoveryStage, recovery_instead, set_aside_optimizers


class FascCallback(CompressionOptions, pl.Callback):
    """Track rho while a module trains, compress it at the end of the fit, or both.

    Calibration runs in the last epoch, or in the last ``calibration.steps`` steps: hooks gather second moments of each
    targeted layer's inputs and output gradients, and nothing else of the fit changes. When the fit ends, one budget
    of parameters is spent over all layers, and they are swapped for low-rank ones. ``callback.report`` then says what
    was done. If anything fails, the module is what it was.

    Monitoring observes rho, the dependence violation score, at every n-th optimizer step: ``rho/<layer>``,
    ``rho_null/<layer>``, ``rho_debiased/<layer>``, ``fasc/rho_mean``, ``fasc/rho_debiased_mean`` and
    ``fasc/rho_above_threshold`` go to every logger and into ``trainer.callback_metrics``, for ModelCheckpoint and
    EarlyStopping; the table with intervals is ``callback.rho_history``.

    What decides by losses ("measured" allocation, refit, recovery) runs the training step outside of the loop, again on
    copies of the batches: told what it was told in training, in the fit's precision, and silenced. The module, its
    containers, metrics, buffers and generators are then put back; what a step writes elsewhere is written again.

    Checkpoints of both kinds, dense and compressed, load in every stage (``models/_checkpoints.py``), and a fit
    that is killed while it calibrates goes on from its last one (``calibration/_resume.py``).

    Example:
        >>> import lightning as L
        >>> from fasc_lightning import FascCallback
        >>> trainer = L.Trainer(max_epochs=1, callbacks=[FascCallback(rank=0.5)], logger=False)
        >>> trainer = L.Trainer(max_epochs=9, callbacks=[FascCallback(monitor=50)], logger=False)

    Every option is declared and described in :class:`~fasc_lightning.options.CompressionOptions`, those in groups in
    :class:`~fasc_lightning.options.Calibration`, :class:`~fasc_lightning.options.Memory`,
    :class:`~fasc_lightning.options.Monitor` and :class:`~fasc_lightning.options.Gate`. Options are attributes, too.

    Attributes:
        report: The :class:`~fasc_lightning.compression.CompressionReport`, after the fit.
        rho_history: The :class:`~fasc_lightning.dependence.RhoHistory` of what was observed; kept in checkpoints.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of a wrong type.

    Note:
        The weights compressed are those at the end of the fit, after any averaging callback has put its own in.
        Supported strategies are a single device, script-launched DDP, and ModelParallelStrategy with FSDP2 alone
        (``distributed/_fsdp.py``), under which the fit ends with a module that is whole on every process; others
        are refused in ``setup``.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.report: CompressionReport | None = None
        self._schedule = CalibrationSchedule(self.calibration_steps, self.passes, freezes=not self.update_weights)
        self._keeper = CalibrationCheckpoint(self.state_key)
        self._undo = Undo()  # hooks and what is frozen, when training ends
        self._failed = Undo()  # all else, where a fit fails
        self._last = Undo()  # what is the Trainer's own, after that
        self._ended = False
        self._layers: dict[str, nn.Module] = {}
        self._scales = LossScales()
        self._calibration: Calibration | None = None
        self._monitor = RhoMonitor(
            self.monitor_every_n_steps or 1, self.monitor_tokens, self.rho_threshold, self.rho_gradient, self.seed
        )
        self._replaced: dict[str, nn.Module] = {}
        recovery = as_recovery(self.recovery)
        self._second = RecoveryStage(recovery, self.seed, self.token_mask, self.loss_terms, self._failed)

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, as reports state them."""
        return reported(self)

    @property
    def rho_history(self) -> RhoHistory:
        """What was observed of rho, one row a layer and a step."""
        return self._monitor.history

    @property
    @override
    def state_key(self) -> str:
        # Another budget or rhythm is still the history of the same score of the same layers.
        options = {name: getattr(self, name) for name in ("targets", "exclude", "rho_gradient")}
        return self._generate_state_key(**options, monitors=self._monitors)

    @override
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"rho_history": self.rho_history.state_dict(), **self._second.state_dict()}
        return sealed(state if self.report is None else {**state, "report": self.report.to_dict()})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_callback_state(state_dict)
        self.rho_history.load_state_dict(state_dict["rho_history"])
        if "report" in state_dict:
            self.report = CompressionReport.from_dict(state_dict["report"])

    @recovery_instead
    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._calibration is not None and self._calibration.begun and self.report is None:
            self._keeper.save(trainer, self._calibration, self._schedule, checkpoint)
        elif self._calibration is not None and self.report is None:
            self._keeper.save_place(trainer, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._keeper.load(trainer, checkpoint)
        if self._calibration is not None:  # as strategies that shard weights load them after `on_fit_start`
            self._keeper.resume(trainer, self._calibration, self._schedule)
        state = checkpoint["callbacks"].get(self.state_key, {})
        if state:
            check_callback_state(state, f"The state of FascCallback in the checkpoint {trainer.ckpt_path}")
        report = state.get("report")
        if report is not None and is_compressed(pl_module):
            attach_config(pl_module, method=report["method"], options=report["options"], seed=report["seed"])
        if trainer.state.fn == "fit":
            self._second.load(trainer, pl_module, state, self.state_key)
            self.report = self.report if self._recovering is not None else None

    # Phases, in the order of a fit.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        with self._last:  # what a fit that failed may have left
            self._put_back()
        self._forget()
        self._last.add(self._end, trainer)
        if stage == "fit":
            self._second.set_up(trainer, pl_module, self.report, self.state_key)
            self._failed.add(torch.set_grad_enabled, torch.is_grad_enabled())
        # Weights of every kind load, whatever form the layers have; in modules of others nothing else can see to it.
        self._undo.hook(pl_module.register_load_state_dict_pre_hook, match_on_load)
        if stage != "fit":
            return
        self._schedule.set_up(trainer)
        if self._recovering is None:
            self.report = None
        check_strategy(trainer, recovers=self._recovering is not None)
        check_module(pl_module, compresses=False)  # a checkpoint may make a compressed module dense
        if self._compresses:
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            check_single([c for c in callbacks if isinstance(c, FascCallback) and c._compresses])
            self._keeper.install(trainer)
        if trainer.global_step == 0:  # a checkpoint brings its own history, after this
            self._monitor.history = RhoHistory()

    @recovery_instead
    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.report is not None and is_compressed(pl_module):  # as a checkpoint has brought both
            rank_zero_info(
                "FascCallback: the checkpoint is of a fit that has been compressed already. Its factors are trained "
                "on, and `report` is of that compression."
            )
            return
        self.report = None
        # Only here do modules made in `configure_model` exist.
        check_module(pl_module, compresses=self._compresses)
        self._layers = select_layers(pl_module, self.targets, self.exclude)
        if self.targets in (None, "all-linear"):
            warn_unknown_experts(pl_module)
        warn_other_layers(pl_module, self.targets, self.exclude)
        if self._compresses:
            warn_tied_layers(pl_module, self._layers)
            warn_without_way_back(self._layers)
        if self._monitors:
            self._undo.add(self._monitor.remove)
            self._monitor.start(trainer, self._layers)
        check_sharded(trainer, pl_module, self._layers)
        if self._compresses:
            check_batches_given(pl_module, self.loss_terms, self.token_mask)
            self._schedule.check(trainer)  # only here is it known that the fit is no recovery
            check_weights((name, linear_weight(layer)) for name, layer in self._layers.items())
            check_rank_fits(layer_shapes(self._layers), self.rank)
            self._second.check(pl_module, self._layers)
            check_budget_fits(self._layers, self.rank, self.keep, self.allocation, self.layout, self.align)
            options, refinement = CalibrationOptions.of(self), self._second.refinement
            self._calibration = found = Calibration(
                trainer, pl_module, self._layers, options, refinement, self.rho_history
            )
            self._undo.add(found.release)
            device, keeps = trainer.strategy.root_device, found.refit is not None
            planned = layers_forecast(pl_module, self._layers, self, device, keeps, found.sketches, found.passes)
            rank_zero_info(f"FascCallback: {planned}")
            self._keeper.resume(trainer, self._calibration, self._schedule)

    @recovery_instead
    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._calibration is not None:
            self._schedule.start(trainer)
            self._keeper.start(trainer, self._schedule)
            check_epochs_left(trainer, self._calibration.passes)
            self._calibration.check_alike(trainer)
            self._calibration.uneven_inputs.start(trainer, self._schedule.is_whole_fit(trainer))

    @recovery_instead
    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._calibration is not None and self._schedule.begins(trainer):
            self._calibration.begin_batch(trainer, pl_module, batch)
        elif self._calibration is not None and self._calibration.running:
            self._calibration.pause()
        if skips_backward(trainer):
            return
        # A frozen module has the same rho at every step, and the calibration measures it.
        frozen = self._calibration is not None and self._calibration.frozen
        if self._monitors and self._layers and not frozen and self._monitor.due(trainer):
            rows = observed_rows(
                trainer,
                pl_module,
                batch,
                token_mask=self.token_mask,
                loss_terms=self.loss_terms,
                tokens=self.monitor_tokens,
                seed=self.seed,
            )
            self._monitor.begin_batch(trainer, rows, backwards_of(pl_module))

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        calibration = self._calibration if self._calibrating else None
        rows, label = None if calibration is None else calibration.rows, batch_label(trainer)
        counts = self._scales.take(loss, rows, self._monitor.rows, label=label)
        self._monitor.begin_backward()
        if calibration is None:
            return
        if not counts:
            calibration.leave_out()
        elif loss.requires_grad or not calibration.frozen:
            check_loss(loss, len(self._layers), label)
        calibration.begin_backward(loss)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._monitor.end_backward()
        if self._calibration is not None:
            self._calibration.end_backward()

    @recovery_instead
    @override
    def on_before_optimizer_step(self, *args: Any) -> None:
        if self._calibration is not None:
            self._calibration.settle_rows()  # what is refused is refused before it gets into the weights

    @recovery_instead
    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._calibration is not None:
            self._calibration.end_batch()
            if not outputs:  # of a step that returned None, by which it skips its batch
                self._calibration.leave_out()
            if self._calibration.running:
                self._calibration.uneven_inputs.end_batch(trainer)
        self._monitor.end_batch(trainer)

    @recovery_instead
    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._monitor.publish(trainer)
        if self._calibration is not None:
            self._calibration.end_epoch(trainer)
            self._schedule.end_epoch(trainer)

    @recovery_instead
    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._monitor.publish(trainer)

    @recovery_instead
    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._monitor.close(trainer)
        self._undo.close()
        self._schedule.stop()
        if self._monitors:
            write_history(trainer, self.rho_history, self.rho_threshold, self.emergence_observations)
        if self._calibration is not None and self._calibration.begun:
            # While every process is still in the loop, and on the device of the process group.
            self._calibration.finish(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._undo.close()
        self._failed.add(setattr, self, "report", self.report)
        if self._recovering is None:
            self._end_compression(trainer, pl_module)
        else:
            self._end_recovery(trainer, pl_module, self._recovering)
        self._ended = True

    def _end_compression(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._monitors:
            summary = describe(self.rho_history, self.rho_threshold, self.emergence_observations)
            rank_zero_info(f"FascCallback: {summary}")
        calibration = self._calibration
        if calibration is None:
            return
        if not calibration.begun:
            raise MisconfigurationException(
                "Expected at least one calibration batch but the fit ended without any: "
                f"{self._schedule.end_unmet()} The model is not compressed."
            )
        if not calibration.finished:  # the fit had nothing left to run, so that training neither started nor ended
            calibration.finish(trainer)
        self._failed.keep(pl_module, attributes=True)
        # After every `on_train_end`, so that averaging callbacks have put their weights in place.
        self._failed.add(calibration.unsharding.undo)
        self.report = replace_calibrated(trainer, pl_module, calibration, self, self._replaced)
        self._second.keep(self._replaced)
        if self.recovery is None:
            self._quantize(pl_module)
        log_report(trainer.loggers, self.report, trainer.global_step)
        rank_zero_info(f"\n{self.report}")
        # They hold the dense parameters, which a checkpoint would otherwise store beside the factors.
        set_aside_optimizers(trainer, self._failed)
        if self.recovery is not None:
            rank_zero_info("FascCallback: the next fit, by a new Trainer with this callback, recovers.")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Nobody calls this again, or tears anything down, should it fail as well.
        with self._last, self._failed, self._undo:
            with self._failed, self._undo:
                if self._recovering is not None:
                    self._recovering.on_exception(trainer, pl_module, exception)
                self._keep_what_there_is(trainer)
            self._keeper.after_exception(trainer, exception, partial(self._end, trainer))
            self._last.forget()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._ended:
            self._failed.forget()
        self._put_back()
        if self._recovering is not None:
            self._recovering.teardown(trainer, pl_module, stage)
        self._second.forget()
        if self._calibration is not None and self.report is not None:
            self._keeper.clean(trainer)
        self._last.close()

    # Parts of the phases.

    @property
    def _compresses(self) -> bool:
        return self.rank is not None or self.keep is not None

    @property
    def _monitors(self) -> bool:
        return self.monitor_every_n_steps is not None

    @property
    def _recovering(self) -> RecoveryCallback | None:
        return self._second.running

    @property
    def _calibrating(self) -> bool:
        return self._calibration is not None and self._calibration.running

    def _quantize(self, pl_module: pl.LightningModule) -> None:
        if self.quantize is None:
            return
        assert self.report is not None
        start, layers = time.perf_counter(), [layer.name for layer in self.report.layers]
        unfuse(pl_module, layers)  # experts that all stayed dense
        quantize_layers(pl_module, layers, self.quantize)
        self.report = self.report.with_quantized(pl_module, self.quantize, layers, time.perf_counter() - start)

    def _end_recovery(self, trainer: pl.Trainer, pl_module: pl.LightningModule, done: RecoveryCallback) -> None:
        """End a recovery, and quantise what is to be quantised last."""
        done.on_fit_end(trainer, pl_module)
        assert self.report is not None
        assert done.figures is not None
        self.report = self.report.with_recovered(done.figures)
        self._quantize(pl_module)
        report = self.report
        attach_config(pl_module, method=report.method, options=report.options, seed=report.seed)
        log_report(trainer.loggers, report, trainer.global_step)
        rank_zero_info(f"\n{report}")

    def _keep_what_there_is(self, trainer: pl.Trainer) -> None:
        """Keep what was gathered before a fit failed; what went wrong first is what is to be seen."""
        if self._calibration is not None:
            with suppress(Exception):
                self._calibration.settle(trainer)
        if self._monitors and self._recovering is None:
            with suppress(OSError):
                write_history(trainer, self.rho_history, self.rho_threshold, self.emergence_observations, figures=False)

    def _put_back(self) -> None:
        """Undo what a fit has changed, but for what stays when it has ended; safe at any time."""
        with self._failed:
            self._undo.close()

    def _end(self, trainer: pl.Trainer) -> None:
        """Give the Trainer back what is its own, and let go of the fit; safe at any time."""
        with undoing() as undo:
            for step in (self._forget, self._keeper.remove, self._schedule.stop):
                undo.add(step)

    def _forget(self) -> None:
        """Drop statistics and references to the module's layers."""
        self._calibration = None
        self._scales = LossScales()
        self._layers, self._replaced, self._ended = {}, {}, False
        self._monitor.forget()
