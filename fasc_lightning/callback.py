"""FascCallback: the phases of a fit that ends with a smaller model."""

from __future__ import annotations

import time
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from fasc_lightning._utils import Undo, undoing
from fasc_lightning.batches import LossScales, LossTerms, TokenMask
from fasc_lightning.calibration import CalibrationPhase
from fasc_lightning.compression import CompressionReport, check_callback_state, log_report, sealed
from fasc_lightning.dependence import MonitorPhase, RhoHistory
from fasc_lightning.distributed import check_module, check_sharded, check_single, check_strategy
from fasc_lightning.layers import Gradient, Layout, Quantization, is_compressed, target_layers, unfuse
from fasc_lightning.models import attach_config, match_on_load, quantize_layers
from fasc_lightning.options import (
    SKETCH_ABOVE,
    FactorRecovery,
    LoraRecovery,
    ReductionKind,
    Refit,
    SketchOptions,
    as_recovery,
    check_budget,
    check_gate,
    check_moments_device,
    check_monitor,
    check_monitor_only,
    check_options,
    check_passes,
    check_projected,
    checks_options,
    describe_recovery,
)
from fasc_lightning.planning import layers_forecast
from fasc_lightning.recovery import RecoveryStage, set_aside_optimizers
from fasc_lightning.statistics import MomentsDevice


class FascCallback(pl.Callback):
    """Track rho while a module trains, compress it at the end of the fit, or both.

    Calibration runs in the last epoch, or in the last ``calibration_steps``: hooks gather second moments of each
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
        >>> trainer = L.Trainer(max_epochs=9, callbacks=[FascCallback(monitor_every_n_steps=50)], logger=False)

    Args:
        rank: A float is a fraction of full rank (1.0 is full), an int an absolute rank. The budget is the number of
            degrees of freedom of uniform rank-k matrices, the sum of k (m + n - k), and is spent where it matters
            most.
        keep: Fraction of the targeted layers' parameters to keep; instead of ``rank``. Neither: only monitor.
        method: Solver, and with it what is gathered: "fasc"; "svd-llm", "svd", "weight-svd", "asvd", "grad-svd",
            "fisher-diag", "fwsvd"; "gfwsvd", by the one step of its iteration that needs no further pass; and, for
            comparison only, "fasc-eq6" and its "-centred" and "-literal", the eigenproblem as printed. See
            :mod:`fasc_lightning.solvers`.
        allocation: "measured" spends the budget over all layers, by losses that are corrected on an eighth of the
            calibration's batches (``compression/_loss_correction.py``); "fisher" by predicted losses alone; "uniform"
            gives each layer its own share.
        layout: "pivot" stores a rank-k (m, n) matrix in k (m + n - k) numbers, "factors" in k (m + n); "auto" is
            pivot, but for ranks so low that nothing is saved by it and those so high that dense layers are faster and
            as small (``layers/_layouts.py``, by times measured on a CPU).
        align: Ranks are multiples of this number (layers may stay dense); matrix products like 8 or more. Within the
            same budget.
        refit: Whether factors are refitted to the inputs that the compressed model gives them, block by block, on the
            calibration's batches (``refit/_anchored.py``). "auto" does so where the model's blocks can be run
            one by one, and says why where not; True insists. It keeps the moments for it.
        targets: Patterns of the layers to compress, as in peft; by default every linear layer but output embeddings
            and tied weights.
        exclude: Patterns of layers to leave alone.
        calibration_steps: Calibrate on the last so many optimizer steps; required where the last epoch is not known
            (max_steps, max_time, early stopping).
        update_weights: Whether the weights go on training during the calibration. False freezes them: eval mode, no
            optimizer or scheduler step, no weight gradients.
        token_fraction: Share of the tokens that enters the moments; fewer is faster and less accurate.
        seed: Of the choice of those tokens, and of rho's tokens and permutations.
        loss_terms: "mean" if the loss is a mean, "sum", or a callable that returns the number of averaged terms of a
            batch. By default the module's ``loss_terms`` method (CausalLMModule has one), else "mean". Of a mean, the
            loss's autograd graph tells the number of its terms (``batches/_loss_graph.py``); where it does not
            (fused losses), they are the tokens of ``token_mask``, else the samples, and a batch of tokens warns.
        token_mask: Callable that returns True for a batch's real tokens, shape (samples, length), or None. By default
            the module's ``token_mask`` method, else every token counts.
        monitor_every_n_steps: Observe rho at optimizer steps 0, n, 2n, ... (batches in manual optimisation); None
            does not.
        monitor_tokens: Tokens of each batch that an observation looks at, a quarter of them from one sequence at most.
        rho_threshold: Plain rho above which a layer counts as high, in logs and summaries. Chance alone reaches it
            where ``monitor_tokens`` are few, so compare with the null.
        emergence_observations: A layer emerges where rho stays above the threshold and above its null for so many
            observations.
        rho_gradient: "input" couples x with g = W^T h, the gradient at the layer's input (the paper's definition);
            "output" with h, the gradient at its output.
        gate: rho at or under which the cheap solver ("svd") serves a layer instead of ``method``; None: ``method``
            serves all.
        gate_by: What is compared with the gate: the "debiased" value; "pooled", the paper's rho of all tokens (a
            third more work for the moments); or "rho" of minibatches, which chance alone can take past 0.3. With a
            gate, every batch is scored, on ``monitor_tokens`` of its tokens.
        gate_exclude: Patterns of layers that rho does not decide and the cheap solver serves, or "paper": the
            attention of blocks 0 to 2 and the output projections of the last block.
        quantize: "int8" holds the targeted layers in int8 when all else is done, those that stay dense included;
            "int8-dynamic" rounds what goes into them, too (:func:`~fasc_lightning.quantize`). What is int8 does not
            train. None does not.
        recovery: "lora", "factors" or their options (:class:`~fasc_lightning.LoraRecovery`,
            :class:`~fasc_lightning.FactorRecovery`). This fit compresses; the next one, by a new Trainer with the same
            callback, trains what recovery trains, and only then is quantised. So does every further one. None: the next
            fit is not ours.
        sketch: "projected" holds the moment of a layer's wider side as its weight sees it, W A W^T or W^T G W: exact
            for method="fasc" and as small as the narrower side, with update_weights=False and without a refit
            (``statistics/_projected.py``). "range" holds a sketch of second moments that are too wide
            (``statistics/_sketch.py``) in place of them; "gaussian", for comparison only, the paper's projection
            with lifting, whose span is random. None: all are held whole.
        sketch_size: Columns of a sketch, or "auto": four times the rank that the budget means for a layer; twice where
            this fit, with ``monitor_every_n_steps``, has observed a rho of at most ``rho_threshold`` by the time the
            calibration begins; at most half the width.
        sketch_above: Sides of layers no wider than this stay exact, and so do those of which a sketch would not be
            clearly smaller.
        moments_device: "cpu" holds moments and factors there, beside the device of the fit: rows are copied while the
            backward pass goes on (``statistics/_cpu_offload.py``). None: on the device.
        passes: How many of the last epochs calibrate, each for a share of the layers, so that so much less memory is
            needed; with update_weights=False. Factors are the same and wait on the disk; a refit, which needs all
            moments together, is not done.

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

    @checks_options
    def __init__(
        self,
        rank: int | float | None = None,  # both spelled out: command lines read the type, and 256 is not 256.0
        keep: float | None = None,
        method: str = "fasc",
        allocation: str = "measured",
        layout: Layout = "auto",
        align: int = 1,
        refit: Refit = "auto",
        targets: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        calibration_steps: int | None = None,
        update_weights: bool = True,
        token_fraction: float = 1.0,
        seed: int = 0,
        loss_terms: LossTerms | None = None,
        token_mask: TokenMask | None = None,
        monitor_every_n_steps: int | None = None,
        monitor_tokens: int = 512,
        rho_threshold: float = 0.3,
        emergence_observations: int = 3,
        rho_gradient: Gradient = "input",
        gate: float | None = None,
        gate_by: Literal["debiased", "pooled", "rho"] = "debiased",
        gate_exclude: str | list[str] | None = None,
        quantize: Quantization | None = None,
        recovery: Literal["lora", "factors"] | LoraRecovery | FactorRecovery | None = None,
        sketch: ReductionKind | None = None,
        sketch_size: int | Literal["auto"] = "auto",
        sketch_above: int = SKETCH_ABOVE,
        moments_device: MomentsDevice | None = None,
        passes: int = 1,
    ) -> None:
        check_monitor(monitor_every_n_steps, monitor_tokens, rho_threshold, emergence_observations, rho_gradient)
        if rank is None and keep is None and monitor_every_n_steps is not None:
            check_monitor_only(calibration_steps, update_weights, gate, quantize, recovery)
        else:
            check_budget(rank, keep)
        check_gate(gate, gate_by, gate_exclude, method)
        check_options(
            method,
            allocation,
            layout,
            align,
            refit,
            token_fraction,
            calibration_steps,
            quantize,
        )
        SketchOptions(sketch or "range", sketch_size, sketch_above)  # refuses what is out of range
        check_moments_device(moments_device)
        check_passes(passes, update_weights, refit, calibration_steps)
        check_projected(sketch, method, gate, update_weights, refit)
        self.rank = rank
        self.keep = keep
        self.method = method
        self.allocation = allocation
        self.layout = layout
        self.align = align
        self.refit: Refit = refit
        self.targets = targets
        self.exclude = exclude
        self.calibration_steps = calibration_steps
        self.update_weights = update_weights
        self.token_fraction = token_fraction
        self.seed = seed
        self.loss_terms = loss_terms
        self.token_mask = token_mask
        self.monitor_every_n_steps = monitor_every_n_steps
        self.monitor_tokens = monitor_tokens
        self.rho_threshold = rho_threshold
        self.emergence_observations = emergence_observations
        self.rho_gradient: Gradient = rho_gradient
        self.gate = gate
        self.gate_by = gate_by
        self.gate_exclude = gate_exclude
        self.quantize: Quantization | None = quantize
        self.recovery = as_recovery(recovery)
        self.sketch: ReductionKind | None = sketch
        self.sketch_size: int | Literal["auto"] = sketch_size
        self.sketch_above = sketch_above
        self.moments_device: MomentsDevice | None = moments_device
        self.passes = passes
        self.report: CompressionReport | None = None
        self._set_up()

    def _set_up(self) -> None:
        """Make the parts of the callback, once it has its options."""
        self._undo = Undo()  # hooks and what is frozen, when training ends
        self._failed = Undo()  # all else, where a fit fails
        self._last = Undo()  # what is the Trainer's own, after that
        self._ended = False
        self._scales = LossScales()
        self._stage = RecoveryStage(self.recovery, self.seed, self.token_mask, self.loss_terms, self._failed)
        self._monitor = MonitorPhase(
            self.monitor_every_n_steps,
            self.monitor_tokens,
            self.rho_threshold,
            self.emergence_observations,
            self.rho_gradient,
            self.seed,
            token_mask=self.token_mask,
            loss_terms=self.loss_terms,
            scales=self._scales,
            undo=self._undo,
        )
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
        """The options that decide the result, for reports."""
        names = "rank keep method allocation layout align refit targets exclude calibration_steps update_weights "
        names += "token_fraction rho_gradient gate gate_by gate_exclude quantize"
        options = {name: getattr(self, name) for name in names.split()}
        if self.sketch is not None:
            options |= {name: getattr(self, name) for name in ("sketch", "sketch_size", "sketch_above")}
        if self.passes > 1:
            options["passes"] = self.passes
        if self.recovery is not None:  # what is not done yet is said once it is
            options |= {"recovery": describe_recovery(self.recovery), "quantize": None}
        return options

    @property
    def rho_history(self) -> RhoHistory:
        """What was observed of rho, one row a layer and a step."""
        return self._monitor.history

    @property
    @override
    def state_key(self) -> str:
        # Another budget or rhythm is still the history of the same score of the same layers.
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

    # Parts.

    @property
    def _parts(self) -> tuple[MonitorPhase, CalibrationPhase]:
        """Those of a fit that is no recovery."""
        return self._monitor, self._calibration

    @property
    def _phases(self) -> tuple[pl.Callback, ...]:
        """Who acts in the hooks of this fit: a recovery alone, or the parts."""
        running = self._stage.running
        return self._parts if running is None else (running,)

    @property
    def _compresses(self) -> bool:
        return self.rank is not None or self.keep is not None

    # Checkpoints.

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for phase in self._phases:
            phase.on_save_checkpoint(trainer, pl_module, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._calibration.on_load_checkpoint(trainer, pl_module, checkpoint)
        state = checkpoint["callbacks"].get(self.state_key, {})
        if state:
            check_callback_state(state, f"The state of FascCallback in the checkpoint {trainer.ckpt_path}")
        report = state.get("report")
        if report is not None and is_compressed(pl_module):
            attach_config(pl_module, method=report["method"], options=report["options"], seed=report["seed"])
        if trainer.state.fn == "fit":
            self._stage.load(trainer, pl_module, state, self.state_key)
            self.report = self.report if self._stage.running is not None else None

    # Hooks, in the order of a fit.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        with self._last:  # what a fit that failed may have left
            self._put_back()
        self._end()
        self._last.add(self._end)
        if stage == "fit":
            self._stage.set_up(trainer, pl_module, self.report, self.state_key)
            self._failed.add(torch.set_grad_enabled, torch.is_grad_enabled())
        # Weights of every kind load, whatever form the layers have; in modules of others nothing else can see to it.
        self._undo.hook(pl_module.register_load_state_dict_pre_hook, match_on_load)
        if stage != "fit":
            return
        if self._stage.running is None:
            self.report = None
        check_strategy(trainer, recovers=self._stage.running is not None)
        check_module(pl_module, compresses=False)  # a checkpoint may make a compressed module dense
        if self._compresses:
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            check_single([c for c in callbacks if isinstance(c, FascCallback) and c._compresses])
        for part in self._parts:  # a checkpoint may yet end a recovery
            part.setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._stage.running is None:
            self._target(trainer, pl_module)
        for phase in self._phases:
            phase.on_fit_start(trainer, pl_module)

    def _target(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the layers of a fit; none in one that goes on from a compressed checkpoint."""
        if self.report is not None and is_compressed(pl_module):  # as a checkpoint has brought both
            rank_zero_info(
                "FascCallback: the checkpoint is of a fit that has been compressed already. Its factors are trained "
                "on, and `report` is of that compression."
            )
            return
        self.report = None
        # Only here do modules made in `configure_model` exist.
        check_module(pl_module, compresses=self._compresses)
        layers = target_layers(pl_module, self.targets, self.exclude, compresses=self._compresses)
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
        # The calibration first: it says whether the module is held still, and then rho is not observed.
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
        for phase in reversed(self._phases):  # as the batch began
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
        # Nobody calls this again, or tears anything down, should it fail as well.
        with self._last, self._failed, self._undo:
            with self._failed, self._undo:
                for phase in reversed(self._phases):  # a checkpoint needs what was gathered more than a table
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
        """Say what was compressed, and quantise it unless a recovery comes first."""
        self.report = report if self.recovery is not None else self._quantized(pl_module, report)
        log_report(trainer.loggers, self.report, trainer.global_step)
        rank_zero_info(f"\n{self.report}")
        # They hold the dense parameters, which a checkpoint would otherwise store beside the factors.
        set_aside_optimizers(trainer, self._failed)
        if self.recovery is not None:
            rank_zero_info("FascCallback: the next fit, by a new Trainer with this callback, recovers.")

    def _report_recovery(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what was recovered, and quantise what is to be quantised last."""
        assert self.report is not None
        self.report = report = self._quantized(pl_module, self.report.with_recovered(self._stage.figures))
        attach_config(pl_module, method=report.method, options=report.options, seed=report.seed)
        log_report(trainer.loggers, report, trainer.global_step)
        rank_zero_info(f"\n{report}")

    def _quantized(self, pl_module: pl.LightningModule, report: CompressionReport) -> CompressionReport:
        """Hold the targeted layers in int8, if asked to, and return the report of that."""
        if self.quantize is None:
            return report
        start, layers = time.perf_counter(), [layer.name for layer in report.layers]
        unfuse(pl_module, layers)  # experts that all stayed dense
        quantize_layers(pl_module, layers, self.quantize)
        return report.with_quantized(pl_module, self.quantize, layers, time.perf_counter() - start)

    def _put_back(self) -> None:
        """Undo what a fit has changed, but for what stays when it has ended; safe at any time."""
        with self._failed:
            self._undo.close()

    def _end(self) -> None:
        """Let go of a fit, and give the Trainer back what is its own; safe at any time."""
        self._ended = False
        with undoing() as undo:
            undo.add(self._scales.forget)
            for part in self._parts:
                undo.add(part.forget)
