"""The end of a calibration: layers are replaced, refitted and refined, on batches that were kept meanwhile."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn

from fasc_lightning._utils import Clock, Undo, layer_progress, peak_memory_bytes, return_freed_memory
from fasc_lightning.batches import KeptBatches, Place
from fasc_lightning.calibration._checks import warn_few_tokens
from fasc_lightning.calibration._loss_measurement import LossMeasurement
from fasc_lightning.calibration._passes import Passes
from fasc_lightning.compression import (
    CompressionReport,
    CompressionResult,
    LayerReport,
    build_layers,
    same_everywhere,
)
from fasc_lightning.distributed import Unsharding
from fasc_lightning.layers import TargetedLayers, layer_sizes, model_size, swap_modules
from fasc_lightning.models import attach_config
from fasc_lightning.options import CalibrationOptions, CompressionOptions, RefineOptions, reported
from fasc_lightning.refit import RefinePhase, RefitPhase, refine_figures, refit_figures


class Finish:
    """Keeps the batches of a calibration, and makes a compressed module of its statistics.

    Args:
        pl_module: The module of the fit.
        layers: The targeted layers in it.
        options: Of the calibration.
        refine: How factors are refined in the end; None for not at all.
        holds_moments: Whether the moments of all layers are there in the end. "auto" does without a refit where not.

    Attributes:
        kept: The batches of the first process, where what follows runs them once more; empty on the others.

    Raises:
        RefitError: If a refit is insisted on, or a refinement asked for, and the module does not allow one.
        NoLossError: Likewise, if the module optimises by hand.
    """

    def __init__(
        self,
        pl_module: pl.LightningModule,
        layers: TargetedLayers,
        options: CalibrationOptions,
        refine: RefineOptions | None,
        *,
        holds_moments: bool,
    ) -> None:
        self._layers = layers
        self._options = options
        self._refit = RefitPhase.of(options.refit if holds_moments else False, pl_module, layers.modules)
        self._refine = None if refine is None else RefinePhase(refine)
        if refine is not None:
            RefinePhase.check(pl_module, layers.modules)
        self._unsharding = Unsharding()
        self.kept = KeptBatches()
        self._keeps = False  # whether the batch that runs, or has just run, is kept

    @property
    def refits(self) -> bool:
        """Whether a refit follows."""
        return self._refit is not None

    @property
    def replays(self) -> bool:
        """Whether batches are kept: refit, refinement and the measuring of losses run them once more."""
        return self.refits or self._refine is not None or self._options.allocation == "measured"

    def keep(self, trainer: pl.Trainer, batch: Any, *, is_first_pass: bool) -> None:
        """Keep a batch that is about to run, if something runs it once more.

        Args:
            trainer: Of the fit.
            batch: As the training step is about to be given it.
            is_first_pass: A further pass has the same batches.
        """
        self._keeps = self.replays and trainer.is_global_zero and is_first_pass  # which runs its own alone
        if self._keeps:
            self.kept.keep(batch, Place.of(trainer))
            steps = self._options.calibration_steps
            if steps is not None:  # of a stream, more may come than were asked for
                del self.kept.batches[: -steps * trainer.accumulate_grad_batches]

    def leave_out(self) -> None:
        """Drop the batch that runs, or has just run: it has no loss, or one that says nothing."""
        if self._keeps:
            self.kept.batches.pop()
            self._keeps = False

    def restore(self, kept: KeptBatches) -> None:
        """Go on from batches that were saved, if something runs them once more."""
        self.kept = kept if self.replays else KeptBatches()

    def replace(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        passes: Passes,
        how: CompressionOptions,
        *,
        seconds: float,
        failed: Undo,
    ) -> tuple[CompressionReport, dict[str, nn.Module]]:
        """Swap the module's layers for low-rank ones, in place.

        Args:
            trainer: Of the fit.
            pl_module: The module, dense.
            passes: Whose statistics are those of all processes. They are used up, unless a refit needs them.
            how: The options that decide the factors and their form.
            seconds: That the batches took.
            failed: Is given what a fit that fails has to undo of the sharding.

        Returns:
            What was done, and the dense layers by name.

        Raises:
            MisconfigurationException: If the fit was stopped before the last pass, or the last pass had no data.
            RuntimeError: If no gradient reached any layer, or processes chose different ranks.
            ValueError: If the budget cannot be met.
        """
        failed.add(self._unsharding.undo)
        timed = Clock()
        before = layer_sizes(self._layers.modules), model_size(pl_module)
        return_freed_memory()
        with timed("factorize"):
            # One process alone runs the whole module, or keeps it for a recovery.
            if self.replays or self._options.recovery is not None:
                self._unsharding.run(pl_module)
            result, layers = self._build(trainer, pl_module, passes, how)
        with timed("swap"):
            replaced = swap_modules(pl_module, result.replacements)
            attach_config(pl_module, method=how.method, options=reported(how), seed=how.seed)
            self._unsharding.run(pl_module)
        refitted = refined = None
        if self._refit is not None:
            with timed("refit"):
                refitted = self._refit.run(trainer, pl_module, replaced, passes.gathering.moments, self.kept)
        if self._refine is not None:
            with timed("refine"):
                refined = self._refine.run(trainer, pl_module, replaced, self.kept)
        after = layer_sizes({**self._layers.modules, **result.replacements}), model_size(pl_module)
        report = CompressionReport(
            method=how.method,
            options=reported(how),
            seed=how.seed,
            targeted={"dense": before[0], "compressed": after[0]},
            whole={"dense": before[1], "compressed": after[1]},
            seconds={
                "calibrate": seconds,
                **timed.seconds,
                "factorize": timed.seconds["factorize"] + passes.factorizing,
            },
            moments_bytes=passes.moments_bytes,
            peak_memory_bytes=peak_memory_bytes(trainer.strategy.root_device),
            layers=layers,
            refit=None if refitted is None else refit_figures(refitted),
            refine=None if refined is None else refine_figures(refined),
        )
        return report, replaced

    def _build(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, passes: Passes, how: CompressionOptions
    ) -> tuple[CompressionResult, list[LayerReport]]:
        """Turn the statistics into replacements, the same ones on every process, and say what becomes of each layer."""
        options, progress = self._options, layer_progress(trainer)
        factorized = passes.factorize(trainer, progress, consume=not self.refits)
        return_freed_memory()  # of the moments, on top of which the batches of a measuring would be put
        warn_few_tokens(factorized.tokens, self._layers.shapes)
        measurement = LossMeasurement(
            trainer, pl_module, self._layers.modules, self.kept, options.token_mask, options.loss_terms
        )
        result = build_layers(
            self._layers.modules,
            factorized,
            rank=how.rank,
            keep=how.keep,
            allocation=options.allocation,
            layout=how.layout,
            align=how.align,
            device=trainer.strategy.root_device,
            progress=progress,
            measure=measurement.measure,
        )
        reports = passes.reports(result)
        return same_everywhere(trainer, result), reports
