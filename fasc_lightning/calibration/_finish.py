"""The end of a calibration: replacement, refit and refinement of layers on the batches that were kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from fasc_lightning._utils import Clock, Progress, Undo, layer_progress, peak_memory_bytes, return_freed_memory
from fasc_lightning.batches import KeptBatches, Place
from fasc_lightning.calibration._checks import warn_few_tokens, warn_uncalled
from fasc_lightning.calibration._passes import Passes
from fasc_lightning.calibration._replay import CalibrationReplay
from fasc_lightning.compression import (
    CompressionReport,
    CompressionResult,
    FactorizedLayers,
    LayerReport,
    RoundedLayers,
    build_layers,
    build_rounded,
    byte_budget,
    halfway_share,
    same_everywhere,
    wanted_refit,
)
from fasc_lightning.distributed import Unsharding
from fasc_lightning.layers import TargetedLayers, expert_layers, layer_sizes, model_size, swap_modules
from fasc_lightning.models import attach_config
from fasc_lightning.options import CalibrationOptions, CompressionOptions, RefineOptions, reported
from fasc_lightning.refit import RefinePhase, RefitPhase, refine_figures, refit_figures


class Finish:
    """Keeps the batches of a calibration, and compresses the module by its statistics.

    Args:
        pl_module: The module of the fit.
        layers: The targeted layers in it.
        options: Options of the calibration.
        refine: Options of the refinement; None for no refinement.
        holds_moments: Whether the moments of all layers exist at the end. If not, refit="auto" does no refit.

    Attributes:
        kept: The batches of the first process, if a later step replays them; empty on the other processes.

    Raises:
        RefitError: If a refit or a refinement is required and the module does not allow it.
        NoLossError: If a refit or a refinement is required and the module optimises by hand.
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
        wanted = wanted_refit(pl_module, layers.modules, options) if holds_moments else False
        self._refit = RefitPhase.of(wanted, pl_module, layers.modules)
        if options.stages > 1 and (experts := expert_layers(pl_module, layers.modules)):
            raise ValueError(
                f"Expected stages=1 for a model with experts among the targets, such as {next(iter(experts))}: a "
                "second stage reads layers that stand alone. HINT: `exclude` the experts."
            )
        self._refine = None if refine is None else RefinePhase(refine)
        if refine is not None:
            RefinePhase.check(pl_module, layers.modules)
        self._unsharding = Unsharding()
        self.kept = KeptBatches()
        self._keeps = False  # whether the current batch, or the last one between batches, is kept

    @property
    def refits(self) -> bool:
        """Whether a refit follows."""
        return self._refit is not None

    @property
    def replays(self) -> bool:
        """Whether batches are kept: the refit, the refinement and the measurement of losses replay them."""
        return self.refits or self._refine is not None or self._options.measures or self._options.stages > 1

    def keep(self, trainer: pl.Trainer, batch: Any, *, is_first_pass: bool) -> None:
        """Keep a batch that is about to run, if a later step replays it.

        Args:
            trainer: Trainer of the fit.
            batch: The batch as the training step gets it.
            is_first_pass: Whether this is the first pass; later passes have the same batches.
        """
        self._keeps = self.replays and trainer.is_global_zero and is_first_pass  # replays run on the first process
        if self._keeps:
            self.kept.keep(batch, Place.of(trainer))
            steps = self._options.calibration_steps
            if steps is not None:  # a stream may give more batches than the steps asked for
                del self.kept.batches[: -steps * trainer.accumulate_grad_batches]

    @property
    def weighs(self) -> bool:
        """Whether the lengths of the current batch's gradients are kept: the refit weighs tokens by them."""
        return self._keeps and self.refits

    def note(self, lengths: Mapping[str, Tensor]) -> None:
        """Keep the lengths of the current batch's gradients, if the batch is kept."""
        if self.weighs:
            self.kept.note(lengths)

    def leave_out(self) -> None:
        """Drop the current batch, or the last one between batches: it has no usable loss."""
        if self._keeps:
            self.kept.batches.pop()
            self._keeps = False

    def restore(self, kept: KeptBatches) -> None:
        """Continue from saved batches, if a later step replays them."""
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
            trainer: Trainer of the fit.
            pl_module: The module, dense.
            passes: The statistics, summed over all processes. They are used up unless a refit needs them.
            how: The options that decide the factors and their form.
            seconds: Seconds that the batches took.
            failed: Gets the changes to the sharding that a failed fit has to undo.

        Returns:
            The report, and the dense layers by name.

        Raises:
            MisconfigurationException: If the fit was stopped before the last pass, or if the last pass had no data.
            RuntimeError: If no gradient reached any layer, or if processes chose different ranks.
            ValueError: If the budget cannot be met.
        """
        failed.add(self._unsharding.undo)
        timed = Clock()
        whole = model_size(pl_module)
        return_freed_memory()
        with timed("factorize"):
            # The first process alone runs the whole module, or keeps it for a recovery.
            if self.replays or self._options.recovery is not None:
                self._unsharding.run(pl_module)
            result, layers = self._build(trainer, pl_module, passes, how)
        before = layer_sizes(self._layers.modules), whole  # of the layers that are left
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
        """Return the replacements, the same on every process, and the report of each layer."""
        options, progress = self._options, layer_progress(trainer)
        replay = CalibrationReplay(
            trainer, pl_module, self._layers.modules, self.kept, options.token_mask, options.loss_terms
        )
        if options.stages > 1:
            self._second_stage(trainer, pl_module, passes, how, replay, progress)
        found = passes.end(trainer, progress, consume=not self.refits)
        self._leave_out_uncalled(found, passes.uncalled)
        return_freed_memory()  # The batches of a measurement need the memory of the moments.
        warn_few_tokens(found.tokens, self._layers.shapes)
        measure = replay.measure if options.measures else None
        if isinstance(found, RoundedLayers):
            result = build_rounded(
                self._layers.modules,
                found,
                method=how.method,
                budget=None if how.size is None else byte_budget(pl_module, self._layers.modules, how.size),
                allocation=options.allocation,
                measure=measure,
                progress=progress,
            )
            return same_everywhere(trainer, result), passes.reports(result)
        result = build_layers(
            self._layers.modules,
            found,
            rank=how.rank,
            keep=how.keep,
            allocation=options.allocation,
            layout=how.layout,
            align=how.align,
            device=trainer.strategy.root_device,
            progress=progress,
            measure=measure,
        )
        reports = passes.reports(result)
        return same_everywhere(trainer, result), reports

    def _leave_out_uncalled(self, found: FactorizedLayers | RoundedLayers, uncalled: list[str]) -> None:
        """Leave out layers that were never called, so that the budget is the other layers' alone.

        If no layer was called, all stay, and the compression is refused with the reason.
        """
        kept = [name for name in self._layers.modules if name not in uncalled]
        if not uncalled or not kept:
            return
        found.leave_out(uncalled)
        if len(kept) < len(self._layers.modules):  # a second stage has left them out before
            warn_uncalled(uncalled, len(self._layers.modules))
            self._layers = self._layers.share(kept)

    def _second_stage(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        passes: Passes,
        how: CompressionOptions,
        replay: CalibrationReplay,
        progress: Progress | None,
    ) -> None:
        """Add the moments of the batches in the module compressed halfway to the budget; the module stays dense."""
        found = passes.end(trainer, progress, consume=False)
        assert isinstance(found, FactorizedLayers)
        self._leave_out_uncalled(found, passes.uncalled)
        halfway = build_layers(
            self._layers.modules,
            found,
            keep=halfway_share(self._layers.modules, how.rank, how.keep),
            layout=how.layout,
            align=how.align,
            device=trainer.strategy.root_device,
            progress=progress,
        )
        del found
        halfway = same_everywhere(trainer, halfway)
        replaced = swap_modules(pl_module, halfway.replacements)
        try:
            replay.add_moments(passes.gathering.moments, progress)
        finally:
            swap_modules(pl_module, replaced)
        passes.gathering.share_first(trainer)
        passes.again()
