"""``FascCallback``: the phases of a fit that ends with a smaller model."""

from __future__ import annotations

import time
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from fasc_lightning._utils import Undo, undoing
from fasc_lightning.batches import LossScales
from fasc_lightning.calibration import CalibrationPhase
from fasc_lightning.compression import CompressionReport, check_callback_state, log_report, sealed
from fasc_lightning.dependence import MonitorPhase, RhoHistory, other_targets
from fasc_lightning.distributed import check_module, check_sharded, check_single, check_strategy
from fasc_lightning.layers import is_compressed, target_layers, unfuse
from fasc_lightning.models import attach_config, match_on_load, quantize_layers, say_loading
from fasc_lightning.options import CompressionOptions, reported
from fasc_lightning.planning import layers_forecast
from fasc_lightning.recovery import RecoveryStage, set_aside_optimizers

#: The last line of a fit that compresses.
NOT_SAVED = "Not saved yet: save_compressed(model, folder), or trainer.save_checkpoint(file)."


class FascCallback(CompressionOptions, pl.Callback):
    """Observe rho while a module trains, compress the module at the end of the fit, or both.

    Calibration runs in the last epoch, or in the last ``calibration.steps`` steps. Hooks gather second moments of each
    targeted layer's inputs and output gradients; nothing else in the fit changes. When the fit ends, one budget of
    parameters is spent over all layers, and low-rank layers replace them. ``callback.report`` then holds the results.
    If anything fails, the module is unchanged.

    Monitoring observes rho, the dependence violation score, at every n-th optimizer step. ``rho/<layer>``,
    ``rho_null/<layer>``, ``rho_debiased/<layer>``, ``fasc/rho_mean``, ``fasc/rho_debiased_mean``,
    ``fasc/rho_above_threshold`` and ``fasc/rho_floor_above_threshold`` (the share of layers in which chance alone takes
    rho there) go to every logger and into ``trainer.callback_metrics``, for ModelCheckpoint and EarlyStopping. The
    table with intervals is ``callback.rho_history``. A fit that is resumed with other ``targets`` or ``exclude`` keeps
    the observations of the layers in common.

    Steps that depend on losses ("measured" allocation, refit, recovery) run the training step outside of the loop,
    again on copies of the batches. The step gets the same arguments as in training, runs in the fit's precision, and
    its logging is silenced. The module, its containers, metrics, buffers and generators are then restored. Anything
    that a step writes elsewhere is written again.

    Dense and compressed checkpoints load in every stage (``models/_checkpoints.py``). A fit that is killed while it
    calibrates continues from its last checkpoint (``calibration/_resume.py``).

    Example:
        >>> import lightning as L
        >>> from fasc_lightning import FascCallback
        >>> trainer = L.Trainer(max_epochs=1, callbacks=[FascCallback(rank=0.5)], logger=False)
        >>> trainer = L.Trainer(max_epochs=9, callbacks=[FascCallback(monitor=50)], logger=False)

    :class:`~fasc_lightning.options.CompressionOptions` describes the options, and
    :class:`~fasc_lightning.options.Calibration`, :class:`~fasc_lightning.options.Memory`,
    :class:`~fasc_lightning.options.Monitor` and :class:`~fasc_lightning.options.Gate` describe the options in groups.
    Every option is an attribute, too.

    Attributes:
        report: The :class:`~fasc_lightning.compression.CompressionReport`, after the fit.
        rho_history: The observed rho, a :class:`~fasc_lightning.dependence.RhoHistory`; checkpoints keep it.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of a wrong type.

    Note:
        The fit compresses its final weights, after any averaging callback has put its average in place. Supported
        strategies are a single device, script-launched DDP, and ModelParallelStrategy with FSDP2 alone
        (``distributed/_fsdp.py``), which ends with the whole module on every process. ``setup`` refuses others.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.report: CompressionReport | None = None
        self._set_up()

    def _set_up(self) -> None:
        """Make the parts of the callback from its options."""
        self._undo = Undo()  # removes hooks and unfreezes the module when training ends
        self._failed = Undo()  # undoes all other changes if a fit fails
        self._last = Undo()  # restores the Trainer after that
        self._ended = self._said_loading = False
        self._scales = LossScales()
        self._stage = RecoveryStage(self, self._failed)
        self._monitor = MonitorPhase(self, scales=self._scales, undo=self._undo)
        self._calibration = CalibrationPhase(
            self,
            self._monitor,
            self._stage,
            layers_forecast,
            key=self.state_key,
            scales=self._scales,
            undo=self._undo,
            failed=self._failed,
        )

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, as reports state them."""
        return reported(self)

    @property
    def rho_history(self) -> RhoHistory:
        """Observed rho, one row per layer and step."""
        return self._monitor.history

    @property
    @override
    def state_key(self) -> str:
        # The history belongs to a score and its layers, whatever the budget or the steps between observations.
        options = {name: getattr(self, name) for name in ("targets", "exclude", "rho_gradient")}
        return self._generate_state_key(**options, monitors=self.monitor_every_n_steps is not None)

    @override
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"rho_history": self.rho_history.state_dict(), **self._stage.state_dict()}
        return sealed(state if self.report is None else {**state, "report": self.report.to_dict()})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_callback_state(state_dict)
        self.rho_history.load_state_dict(state_dict["rho_history"])
        if "report" in state_dict:
            self.report = CompressionReport.from_dict(state_dict["report"])

    # Not Lightning.

    def on_init_end(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse a Trainer of transformers, which calls this method first.

        Raises:
            TypeError: Always; it names the callback for that Trainer.
        """
        raise TypeError(
            "Expected a Trainer of Lightning but FascCallback was given to a Trainer of transformers. HINT: "
            "FascTrainerCallback, with the same options."
        )

    on_train_begin = on_init_end  # the first method of callbacks that are added to a Trainer later

    # Parts.

    @property
    def _parts(self) -> tuple[MonitorPhase, CalibrationPhase]:
        """The phases of a fit that is no recovery."""
        return self._monitor, self._calibration

    @property
    def _phases(self) -> tuple[pl.Callback, ...]:
        """The phases that act in the hooks of this fit: a recovery alone, or the parts."""
        running = self._stage.running
        return self._parts if running is None else (running,)

    # Checkpoints.

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for phase in self._phases:
            phase.on_save_checkpoint(trainer, pl_module, checkpoint)
        if not self._said_loading:
            self._said_loading = say_loading(pl_module)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._calibration.on_load_checkpoint(trainer, pl_module, checkpoint)
        self._take_over_history(trainer, checkpoint["callbacks"])
        state = checkpoint["callbacks"].get(self.state_key, {})
        if state:
            check_callback_state(state, f"The state of FascCallback in the checkpoint {trainer.ckpt_path}")
        report = state.get("report")
        if report is not None and is_compressed(pl_module):
            attach_config(pl_module, method=report["method"], options=report["options"], seed=report["seed"])
        if trainer.state.fn == "fit":
            self._stage.load(trainer, pl_module, state, self.state_key)
            self.report = self.report if self._stage.running is not None else None

    def _take_over_history(self, trainer: pl.Trainer, states: dict[str, Any]) -> None:
        """Let a callback with other targets go on with the history of rho of the one that wrote the checkpoint."""
        present = [callback.state_key for callback in trainer.callbacks]  # type: ignore[attr-defined]
        other = None if self.monitor_every_n_steps is None else other_targets(states, self.state_key, present)
        if other is None:
            return
        check_callback_state(states[other], f"The state of {other} in the checkpoint {trainer.ckpt_path}")
        states[self.state_key] = {"rho_history": states[other]["rho_history"]}
        rank_zero_info(
            f"FascCallback: the checkpoint's history of rho, of {other}, goes on for the layers that are still "
            "observed."
        )

    # Hooks, in the order of a fit.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        with self._last:  # undoes changes that a failed fit may have left
            self._put_back()
        self._end()
        self._last.add(self._end)
        if stage == "fit":
            self._stage.set_up(trainer, pl_module, self.report, self.state_key)
            self._failed.add(torch.set_grad_enabled, torch.is_grad_enabled())
        # Dense and compressed weights load into dense and compressed layers. Users' modules have no other place for it.
        self._undo.hook(pl_module.register_load_state_dict_pre_hook, match_on_load)
        if stage != "fit":
            return
        if self._stage.running is None:
            self.report = None
        check_strategy(trainer, recovers=self._stage.running is not None)
        check_module(pl_module, compresses=False)  # a checkpoint may make a compressed module dense
        self._failed.keep_modes(pl_module)
        if self.compresses:
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            check_single([c for c in callbacks if isinstance(c, FascCallback) and c.compresses])
        for part in self._parts:  # even in a recovery, which a checkpoint may still turn into another fit
            part.setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._stage.running is None:
            self._target(trainer, pl_module)
        for phase in self._phases:
            phase.on_fit_start(trainer, pl_module)

    def _target(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the layers of a fit; none if the fit continues a compressed checkpoint."""
        if self.report is not None and is_compressed(pl_module):  # a checkpoint has set both
            rank_zero_info(
                "FascCallback: the checkpoint is of a fit that has been compressed already. Its factors are trained "
                "on, and `report` is of that compression."
            )
            return
        self.report = None
        # Modules made in `configure_model` do not exist earlier.
        check_module(pl_module, compresses=self.compresses)
        layers = target_layers(pl_module, self.targets, self.exclude, compresses=self.compresses)
        check_sharded(trainer, pl_module, layers.modules)
        for part in self._parts:
            part.target(layers)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for phase in self._phases:
            phase.on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The calibration acts first, because rho is not observed while it freezes the module.
        for phase in reversed(self._phases):
            phase.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        for phase in self._phases:
            phase.on_before_backward(trainer, pl_module, loss)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for phase in self._phases:
            phase.on_after_backward(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, *args: Any) -> None:
        for phase in self._phases:
            phase.on_before_optimizer_step(*args)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for phase in reversed(self._phases):  # in the order of on_train_batch_start
            phase.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for phase in self._phases:
            phase.on_train_epoch_end(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for phase in self._phases:
            phase.on_validation_epoch_end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for phase in self._phases:
            phase.on_train_end(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._undo.close()
        self._failed.add(setattr, self, "report", self.report)
        for phase in self._phases:
            phase.on_fit_end(trainer, pl_module)
        if self._stage.running is not None:
            self._report_recovery(trainer, pl_module)
        elif self._calibration.report is not None:
            self._report_compression(trainer, pl_module, self._calibration.report)
        self._ended = True

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # If this method fails, Lightning neither calls it again nor tears anything down.
        with self._last, self._failed, self._undo:
            with self._failed, self._undo:
                for phase in reversed(self._phases):  # the statistics for a checkpoint matter more than rho's table
                    phase.on_exception(trainer, pl_module, exception)
            self._calibration.after_exception(trainer, exception, self._end)
            self._last.forget()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._ended:
            self._failed.forget()
        self._put_back()
        for phase in self._phases:
            phase.teardown(trainer, pl_module, stage)
        self._stage.forget()
        self._last.close()

    # The end.

    def _report_compression(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: CompressionReport
    ) -> None:
        """Quantise the module unless a recovery comes first, and log the report of the compression."""
        report = report if self.recovery is not None else self._quantized(pl_module, report)
        self.report = self._calibration.validated(report)
        log_report(trainer.loggers, self.report, trainer.global_step, layers=self.log_layers is not False)
        rank_zero_info(f"\n{self.report}")
        # Optimizers hold the dense parameters, which a checkpoint would otherwise store beside the factors.
        set_aside_optimizers(trainer, self._failed)
        if self.recovery is not None:
            rank_zero_info("FascCallback: the next fit, by a new Trainer with this callback, recovers.")
        rank_zero_info(NOT_SAVED)

    def _report_recovery(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Quantise the module if asked to, and log the report of the recovery."""
        assert self.report is not None
        self.report = report = self._quantized(pl_module, self.report.with_recovered(self._stage.figures))
        attach_config(pl_module, method=report.method, options=report.options, seed=report.seed)
        log_report(trainer.loggers, report, trainer.global_step, layers=self.log_layers is not False)
        rank_zero_info(f"\n{report}")
        rank_zero_info(NOT_SAVED)

    def _quantized(self, pl_module: pl.LightningModule, report: CompressionReport) -> CompressionReport:
        """Convert the targeted layers to int8 if asked to, and return the report with it."""
        if self.quantize is None or self.rounds:
            return report
        assert self.quantize == "int8" or self.quantize == "int8-dynamic"  # the only ones beside ranks
        start, layers = time.perf_counter(), [layer.name for layer in report.layers]
        unfuse(pl_module, layers)  # splits modules of experts that all stayed dense
        quantize_layers(pl_module, layers, self.quantize)
        return report.with_quantized(pl_module, self.quantize, layers, time.perf_counter() - start)

    def _put_back(self) -> None:
        """Undo the changes of a fit, except the changes that a successful fit keeps; safe at any time."""
        with self._failed:
            self._undo.close()

    def _end(self) -> None:
        """Drop the state of a fit, and restore the Trainer; safe at any time."""
        self._ended = False
        with undoing() as undo:
            undo.add(self._scales.forget)
            for part in self._parts:
                undo.add(part.forget)
