"""FascCallback: the phases of a fit that ends with a smaller model."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from fasc_lightning import _checks
from fasc_lightning._distributed import is_distributed, same_everywhere
from fasc_lightning._memory import available_memory, peak_memory_bytes, return_freed_memory
from fasc_lightning._progress import layer_progress
from fasc_lightning.batches import LossTerms, TokenMask, batch_label, calibration_rows, observed_rows
from fasc_lightning.factorize import CompressionResult, check_budget_fits, compress_layers
from fasc_lightning.frozen import FrozenFit
from fasc_lightning.gate import (
    check_gate,
    choose_methods,
    excluded_layers,
    failure_flags,
    gate_scores,
    statistics_needed,
)
from fasc_lightning.history import RhoHistory, describe
from fasc_lightning.hub import attach_config
from fasc_lightning.layouts import Layout
from fasc_lightning.moments import CalibrationMoments, moment_dtype, moments_bytes
from fasc_lightning.monitor import LayerScores, RhoMonitor, write_history
from fasc_lightning.pooled import Gradient
from fasc_lightning.refit import RefitReport
from fasc_lightning.refit_phase import Refit, RefitPhase, refit_figures
from fasc_lightning.report import (
    CompressionReport,
    LayerReport,
    Size,
    log_report,
    measure_layers,
    measure_model,
)
from fasc_lightning.schedule import CalibrationSchedule
from fasc_lightning.swap import swap_modules
from fasc_lightning.taps import Taps, layer_shapes, select_layers

#: Where rho decides nothing, a calibration scores every so many batches, on so many tokens: it is a diagnostic then,
#: and moments are what the time is for.
SCORE_EVERY, SCORE_TOKENS = 8, 64


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
            comparison only, "fasc-eq6" and "fasc-eq6-literal", the eigenproblem as printed. See
            :mod:`fasc_lightning.solvers`.
        allocation: "fisher" spends the budget over all layers; "uniform" gives each layer its own share.
        layout: "pivot" stores a rank-k (m, n) matrix in k (m + n - k) numbers, "factors" in k (m + n); "auto" is
            pivot, but for ranks so low that nothing is saved by it and those so high that dense layers are faster and
            as small (:mod:`~fasc_lightning.layouts`, by times measured on a CPU).
        align: Ranks are multiples of this number (layers may stay dense); matrix products like 8 or more. Within the
            same budget.
        refit: Whether factors are refitted to the inputs that the compressed model gives them, block by block, on the
            calibration's batches (:mod:`~fasc_lightning.refit`). "auto" does so where the model's blocks can be run
            one by one, and says why where not; True insists. It keeps the batches and the moments for it.
        targets: Patterns of the layers to compress, as in peft; by default every linear layer but output embeddings
            and tied weights.
        exclude: Patterns of layers to leave alone.
        calibration_steps: Calibrate on the last so many optimizer steps; required where the last epoch is not known
            (max_steps, max_time, early stopping).
        update_weights: Whether the weights go on training during the calibration. False freezes them: eval mode, no
            optimizer or scheduler step, no weight gradients.
        token_fraction: Share of the tokens that enters the moments; fewer is faster and less accurate.
        seed: Of the choice of those tokens, and of rho's permutations and resamples.
        loss_terms: "mean" if the loss is a mean (over the tokens of ``token_mask``, or over samples), "sum", or a
            callable that returns the number of averaged terms of a batch. By default the module's ``loss_terms``
            method (CausalLMModule has one), else "mean".
        token_mask: Callable that returns True for a batch's real tokens, shape (samples, length), or None. By default
            the module's ``token_mask`` method, else every token counts.
        monitor_every_n_steps: Observe rho at optimizer steps 0, n, 2n, ... (batches in manual optimisation); None
            does not.
        monitor_tokens: Tokens of each batch that an observation looks at.
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

    Attributes:
        report: The :class:`~fasc_lightning.report.CompressionReport`, after the fit.
        rho_history: The :class:`~fasc_lightning.history.RhoHistory` of what was observed; kept in checkpoints.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of a wrong type.

    Note:
        The weights compressed are those at the end of the fit, after any averaging callback has put its own in.
        Supported strategies are a single device and script-launched DDP; others are refused in ``setup``.
    """

    def __init__(
        self,
        rank: int | float | None = None,  # both spelled out: command lines read the type, and 256 is not 256.0
        keep: float | None = None,
        method: str = "fasc",
        allocation: str = "fisher",
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
    ) -> None:
        _checks.check_monitor(
            monitor_every_n_steps, monitor_tokens, rho_threshold, emergence_observations, rho_gradient
        )
        if rank is None and keep is None and monitor_every_n_steps is not None:
            _checks.check_monitor_only(calibration_steps, update_weights, gate)
        else:
            _checks.check_budget(rank, keep)
        check_gate(gate, gate_by, gate_exclude, method)
        _checks.check_options(
            method, allocation, layout, align, refit, token_fraction, calibration_steps, seed, loss_terms, token_mask
        )
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
        self.report: CompressionReport | None = None
        self._schedule = CalibrationSchedule(calibration_steps)
        self._layers: dict[str, nn.Module] = {}
        self._moments: CalibrationMoments | None = None
        self._scores: LayerScores | None = None
        self._calibrated = 0  # batches
        self._monitor = RhoMonitor(monitor_every_n_steps or 1, monitor_tokens, rho_threshold, rho_gradient, seed)
        self._taps: Taps | None = None
        self._refit: RefitPhase | None = None
        self._frozen: FrozenFit | None = None
        self._replaced: dict[str, nn.Module] = {}
        self._reports: list[LayerReport] = []
        self._seconds: dict[str, float] = {}
        self._moments_bytes = 0
        self._began = 0.0

    @property
    def options(self) -> dict[str, Any]:
        """The options that decide the result, for reports."""
        names = "rank keep method allocation layout align refit targets exclude calibration_steps update_weights "
        names += "token_fraction rho_gradient gate gate_by gate_exclude"
        return {name: getattr(self, name) for name in names.split()}

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
        return {"rho_history": self.rho_history.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rho_history.load_state_dict(state_dict["rho_history"])

    # Phases, in the order of a fit.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        _checks.check_strategy(trainer)
        _checks.check_module(pl_module, compresses=self._compresses)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if self._compresses and any(isinstance(c, FascCallback) and c._compresses and c is not self for c in callbacks):
            raise MisconfigurationException(
                "Expected one FascCallback with a budget in a fit but got several: each would freeze and restore what "
                "the other holds. HINT: one callback spends one budget over all its `targets`."
            )
        if self._compresses:
            self._schedule.check(trainer)
        if trainer.global_step == 0:  # a checkpoint brings its own history, after this
            self._monitor.history = RhoHistory()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Only here do modules made in `configure_model` exist.
        _checks.check_module(pl_module, compresses=self._compresses)
        self._layers = select_layers(pl_module, self.targets, self.exclude)
        self.report = None
        if self._monitors:
            self._monitor.start(trainer, self._layers)
        if self._compresses:
            self._prepare_calibration(trainer, pl_module)

    def _prepare_calibration(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shapes = layer_shapes(self._layers)
        _checks.check_rank_fits(shapes, self.rank)
        check_budget_fits(self._layers, self.rank, self.keep, self.allocation, self.layout, self.align)
        device = trainer.strategy.root_device
        dtype = moment_dtype(self._layers.values())
        needs = statistics_needed(self.method, self.gate, self.gate_by)
        needed = moments_bytes(shapes.values(), dtype, needs)
        _checks.check_memory(needed, device)
        rank_zero_info(
            f"FascCallback: {len(shapes)} layers with {sum(m * n for m, n in shapes.values()):,} weights; their "
            f"moments need at most {needed / 1e9:.2f} GB ({dtype}) of the "
            f"{available_memory(device) / 1e9:.2f} GB free on {device}."
        )
        return_freed_memory()
        self._seconds = {}
        self._calibrated = 0
        excluded_layers(self._layers, self.gate_exclude)  # refuses patterns that match nothing
        self._moments = CalibrationMoments(shapes, dtype, device, needs)
        tokens = SCORE_TOKENS if self.gate is None else self.monitor_tokens
        self._scores = LayerScores(self._layers, tokens, self.rho_gradient, self.seed, device)
        self._taps = Taps(self._layers, self._moments, self._scores)
        self._refit = RefitPhase.of(self.refit, pl_module, self._layers)
        self._frozen = None if self.update_weights else FrozenFit(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._compresses:
            self._schedule.start(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._compresses and self._schedule.begins(trainer):
            self._calibrate_batch(trainer, pl_module, batch)
        # A frozen module has the same rho at every step, and the calibration measures it.
        frozen = self._frozen is not None and self._frozen.active
        if self._monitors and not frozen and self._monitor.due(trainer):
            rows = observed_rows(
                trainer,
                pl_module,
                batch,
                token_mask=self.token_mask,
                loss_terms=self.loss_terms,
                tokens=self.monitor_tokens,
            )
            self._monitor.begin_batch(trainer, rows)

    def _calibrate_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        assert self._taps is not None
        if not self._taps.installed:
            self._began = time.perf_counter()
            self._taps.install()
            if self._frozen is not None:
                self._frozen.enter()
        if self._frozen is not None:
            self._frozen.hold()
        rows = calibration_rows(
            trainer,
            pl_module,
            batch,
            token_mask=self.token_mask,
            loss_terms=self.loss_terms,
            fraction=self.token_fraction,
            seed=self.seed,
            steps=self._frozen is None,
            scored=self.gate is not None or self._calibrated % SCORE_EVERY == 0,
        )
        self._taps.begin_batch(rows)
        self._calibrated += 1
        if self._refit is not None:
            self._refit.keep(batch)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if not self._calibrating:
            return
        _checks.check_loss(loss, len(self._layers), batch_label(trainer))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._calibrating:
            assert self._taps is not None
            self._taps.end_batch()
        self._monitor.end_batch(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._monitor.publish(trainer)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._monitor.publish(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        calibrated = self._calibrating
        self._monitor.close(trainer)
        self._release(trainer)
        if self._monitors:
            write_history(trainer, self.rho_history, self.rho_threshold, self.emergence_observations)
        if not calibrated:
            return
        self._seconds["calibrate"] = time.perf_counter() - self._began
        # While every process is still in the loop, and on the device of the process group.
        if is_distributed(trainer):
            assert self._moments is not None
            assert self._scores is not None
            self._moments.all_reduce_()
            self._scores.all_reduce_()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._monitors:
            summary = describe(self.rho_history, self.rho_threshold, self.emergence_observations)
            rank_zero_info(f"FascCallback: {summary}")
        if self._moments is None:
            return
        if "calibrate" not in self._seconds:
            raise MisconfigurationException(
                "Expected at least one calibration batch but the fit ended without any: is the dataloader empty, or "
                "had the Trainer finished before, or was it stopped early (then give `calibration_steps`)? The model "
                "is not compressed."
            )
        self._moments_bytes = self._moments.nbytes
        before = self._measure(pl_module, self._layers)
        start = time.perf_counter()
        return_freed_memory()
        # After every `on_train_end`, so that averaging callbacks have put their weights in place.
        result = self._factorize(trainer)
        self._seconds["factorize"] = time.perf_counter() - start
        start = time.perf_counter()
        self._replaced = swap_modules(pl_module, result.replacements)
        attach_config(pl_module, method=self.method, options=self.options)
        self._seconds["swap"] = time.perf_counter() - start
        refitted = self._run_refit(trainer, pl_module)
        # They hold the dense parameters, which a checkpoint would otherwise store beside the factors.
        trainer.strategy.optimizers = []
        trainer.strategy.lr_scheduler_configs = []
        after = self._measure(pl_module, {**self._layers, **result.replacements})
        self.report = self._make_report(trainer, before, after, refitted)
        log_report(trainer.loggers, self.report, trainer.global_step)
        rank_zero_info(f"\n{self.report}")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release(trainer)
        if self._monitors:
            with suppress(OSError):  # what went wrong first is what is to be seen
                write_history(trainer, self.rho_history, self.rho_threshold, self.emergence_observations, figures=False)
        if self._replaced:  # something failed after the swap, here or in another callback
            swap_modules(pl_module, self._replaced)
            attach_config(pl_module)
            self.report = None
        self._forget()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release(trainer)
        self._forget()

    # Parts of the phases.

    @property
    def _compresses(self) -> bool:
        return self.rank is not None or self.keep is not None

    @property
    def _monitors(self) -> bool:
        return self.monitor_every_n_steps is not None

    @property
    def _calibrating(self) -> bool:
        return self._taps is not None and self._taps.installed

    def _factorize(self, trainer: pl.Trainer) -> CompressionResult:
        assert self._moments is not None
        assert self._scores is not None
        _checks.warn_few_tokens({name: self._moments.tokens(name) for name in self._layers}, layer_shapes(self._layers))
        rows = {row["layer"]: row for row in self._scores.rows(trainer.global_step)}
        scores = gate_scores(self.gate_by, rows, self._layers, self._moments)
        methods = choose_methods(scores, self.gate, self.method, self.gate_exclude)
        flags = failure_flags(self._layers, self._moments)
        result = compress_layers(
            self._layers,
            self._moments,
            rank=self.rank,
            keep=self.keep,
            method=self.method,
            allocation=self.allocation,
            layout=self.layout,
            align=self.align,
            device=trainer.strategy.root_device,
            progress=layer_progress(trainer),
            methods=methods,
            consume=self._refit is None,
        )
        self._reports = [LayerReport.of(plan, rows[plan.name], flags[plan.name]) for plan in result.layers]
        return same_everywhere(trainer, result)

    def _run_refit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> RefitReport | None:
        if self._refit is None:
            return None
        assert self._moments is not None
        start = time.perf_counter()
        report = self._refit.run(trainer, pl_module, self._replaced, self._moments)
        self._seconds["refit"] = time.perf_counter() - start
        return report

    @staticmethod
    def _measure(pl_module: pl.LightningModule, layers: dict[str, nn.Module]) -> tuple[Size, Size]:
        return measure_layers(layers), measure_model(pl_module)

    def _make_report(
        self,
        trainer: pl.Trainer,
        before: tuple[Size, Size],
        after: tuple[Size, Size],
        refitted: RefitReport | None,
    ) -> CompressionReport:
        return CompressionReport(
            method=self.method,
            options=self.options,
            seed=self.seed,
            targeted={"dense": before[0], "compressed": after[0]},
            whole={"dense": before[1], "compressed": after[1]},
            seconds=dict(self._seconds),
            moments_bytes=self._moments_bytes,
            peak_memory_bytes=peak_memory_bytes(trainer.strategy.root_device),
            layers=self._reports,
            refit=None if refitted is None else refit_figures(refitted),
        )

    def _release(self, trainer: pl.Trainer) -> None:
        """Take hooks off and put back what was held; safe at any time."""
        self._monitor.remove()
        if self._taps is not None:
            self._taps.remove()
        if self._frozen is not None:
            self._frozen.exit()
        self._schedule.stop(trainer)

    def _forget(self) -> None:
        """Drop statistics and references to the module's layers."""
        self._taps = self._moments = self._frozen = self._scores = self._refit = None
        self._layers, self._replaced, self._reports = {}, {}, []
        self._monitor.forget()
