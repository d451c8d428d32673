"""The calibration of a fit: all that is gathered on its batches, from the first of them to the factors."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from fasc_lightning import _checks
from fasc_lightning._distributed import is_distributed, same_everywhere
from fasc_lightning._memory import available_memory, return_freed_memory
from fasc_lightning._progress import layer_progress
from fasc_lightning.batches import LossTerms, TokenMask, calibration_rows
from fasc_lightning.dependence import DependenceScore
from fasc_lightning.factorize import CompressionResult, compress_layers
from fasc_lightning.frozen import FrozenFit
from fasc_lightning.gate import choose_methods, excluded_layers, failure_flags, gate_scores, statistics_needed
from fasc_lightning.history import RhoHistory
from fasc_lightning.layouts import Layout
from fasc_lightning.loader_position import loops_before
from fasc_lightning.measure_phase import MeasurePhase
from fasc_lightning.moments import CalibrationMoments, LayerSketches, moment_dtype, moments_bytes
from fasc_lightning.monitor import LayerScores
from fasc_lightning.pooled import Gradient
from fasc_lightning.refine import RefineOptions
from fasc_lightning.refine_phase import RefinePhase
from fasc_lightning.refine_report import RefineReport
from fasc_lightning.refit import RefitReport
from fasc_lightning.refit_phase import Refit, RefitPhase
from fasc_lightning.replay import Replay
from fasc_lightning.report import LayerReport
from fasc_lightning.sketch import SketchKind
from fasc_lightning.sketch_sizes import (
    SketchOptions,
    SketchSize,
    describe_sketches,
    sketches_for_budget,
)
from fasc_lightning.taps import Taps, layer_shapes

#: Where rho decides nothing, a calibration scores every so many batches, on so many tokens: it is a diagnostic then,
#: and moments are what the time is for.
SCORE_EVERY, SCORE_TOKENS = 8, 64

#: Entry of :meth:`Calibration.setting`.
REPLAYED = "replay of batches (refit, refinement, measured allocation)"


@dataclass(frozen=True)
class CalibrationOptions:
    """Those options of :class:`~fasc_lightning.FascCallback` that decide what is gathered, under the same names."""

    method: str
    allocation: str
    refit: Refit
    update_weights: bool
    token_fraction: float
    seed: int
    loss_terms: LossTerms | None
    token_mask: TokenMask | None
    monitor_tokens: int
    rho_gradient: Gradient
    gate: float | None
    gate_by: str
    gate_exclude: str | list[str] | None
    rank: int | float | None
    keep: float | None
    rho_threshold: float
    sketch: SketchKind | None
    sketch_size: SketchSize
    sketch_above: int

    @property
    def sketching(self) -> SketchOptions | None:
        """What is to be sketched; None for exact moments."""
        if self.sketch is None:
            return None
        return SketchOptions(self.sketch, self.sketch_size, self.sketch_above, self.seed, self.rho_threshold)

    def sketches(
        self, shapes: Mapping[str, tuple[int, int]], rho: Mapping[str, float] | None = None
    ) -> dict[str, LayerSketches]:
        """Return how the moments of layers of these shapes (m, n) are sketched; nothing where they are all exact.

        Args:
            shapes: By layer.
            rho: Of the layers where it is known, which makes "auto" sizes smaller where it is low.
        """
        return sketches_for_budget(shapes, self.sketching, self.rank, self.keep, rho)


class Calibration:
    """Gathers moments, scores and batches to replay while a Trainer goes through batches, and makes factors of them.

    Nothing is put on the module before the first batch.

    Args:
        trainer: Of the fit; its device holds the statistics.
        pl_module: The module of the fit.
        layers: The targeted layers in it, by name.
        options: What to gather.
        refine: How factors are refined in the end; None for not at all.
        history: What the fit observes of rho. By its last observation of before the first batch "auto" sizes of
            sketches are chosen; where there is none, as if rho were high.

    Attributes:
        layers: The targeted layers.
        moments: Second moments of their inputs and gradients.
        scores: Their dependence scores.
        refit: The refit that is to follow; None where there shall be none.
        refine: The refinement after it, likewise.
        replay: The batches of the first process, where what follows runs them once more; empty on the others.
        batches: How many batches were counted, on this process.
        finished: Whether the statistics are those of all processes.
        spent: Whether factors are being made of them, which uses them up.
        origin: Lightning's loops and schedulers before the first batch, from which the calibration can start again.

    Raises:
        MemoryError: If the moments do not fit.
        ValueError: If a pattern of ``gate_exclude`` matches nothing.
        RefitError: If a refit is insisted on, or a refinement asked for, and the module does not allow one.
        NoLossError: Likewise, if the module optimises by hand.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        layers: dict[str, nn.Module],
        options: CalibrationOptions,
        refine: RefineOptions | None = None,
        history: RhoHistory | None = None,
    ) -> None:
        self.layers = layers
        self.options = options
        self.batches = 0
        self.finished = False
        self.spent = False
        self.origin: dict[str, Any] = {}
        device, dtype = trainer.strategy.root_device, moment_dtype(layers.values())
        shapes, needs = layer_shapes(layers), statistics_needed(options.method, options.gate, options.gate_by)
        self._history = RhoHistory() if history is None else history
        self._sketches = sketches = options.sketches(shapes)
        sides = [sketches.get(name, LayerSketches()) for name in shapes]
        needed = moments_bytes(shapes.values(), dtype, needs, sides)
        _checks.check_memory(needed, device)
        rank_zero_info(
            f"FascCallback: {len(shapes)} layers with {sum(m * n for m, n in shapes.values()):,} weights; their "
            f"moments need at most {needed / 1e9:.2f} GB ({dtype}) of the "
            f"{available_memory(device) / 1e9:.2f} GB free on {device}."
        )
        self._say_sketches(shapes, sketches)
        return_freed_memory()
        excluded_layers(layers, options.gate_exclude)  # refuses patterns that match nothing
        self.moments = CalibrationMoments(shapes, dtype, device, needs, sketches)
        tokens = SCORE_TOKENS if options.gate is None else options.monitor_tokens
        self.scores = LayerScores(layers, tokens, options.rho_gradient, options.seed, device)
        self.refit = RefitPhase.of(options.refit, pl_module, layers)
        self.refine = None if refine is None else RefinePhase(refine)
        if refine is not None:
            RefinePhase.check(pl_module, layers)
        self.replay = Replay()
        self._taps = Taps(layers, self.moments, self.scores)
        self._frozen = None if options.update_weights else FrozenFit(trainer, pl_module)
        self._seconds = 0.0
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds that the batches took, those before an interruption included."""
        return self._seconds if self._began is None else self._seconds + time.perf_counter() - self._began

    @property
    def replays(self) -> bool:
        """Whether batches are kept: refit, refinement and the measuring of losses run them once more."""
        return self.refit is not None or self.refine is not None or self.options.allocation == "measured"

    @property
    def begun(self) -> bool:
        """Whether there was a batch."""
        return self.batches > 0

    @property
    def running(self) -> bool:
        """Whether hooks are on the layers."""
        return self._taps.installed

    @property
    def frozen(self) -> bool:
        """Whether the module is held still."""
        return self._frozen is not None and self._frozen.active

    def begin_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Start to count a batch; the first one puts the hooks on and freezes what is to be frozen."""
        if not self.running:
            self._began = time.perf_counter()
            self._taps.install()
            if self._frozen is not None:
                self._frozen.enter()
        if self._frozen is not None:
            self._frozen.hold()
        options = self.options
        rows = calibration_rows(
            trainer,
            pl_module,
            batch,
            token_mask=options.token_mask,
            loss_terms=options.loss_terms,
            fraction=options.token_fraction,
            seed=options.seed,
            steps=self._frozen is None,
            scored=options.gate is not None or self.batches % SCORE_EVERY == 0,
        )
        if not self.begun:
            self.origin = loops_before(trainer)
            self._size_sketches()
        self._taps.begin_batch(rows)
        self.batches += 1
        if self.replays and trainer.is_global_zero:  # which runs its own alone
            self.replay.keep(batch)

    def _size_sketches(self) -> None:
        """Choose sizes anew by what monitoring knows of rho by now, before anything is summed: never larger ones.

        Every process has the same history, so that all choose alike.
        """
        known = {name: row["rho"] for name, row in self._history.at().items() if not math.isnan(row["rho"])}
        sketches = self.options.sketches(self.moments.shapes, known)
        if sketches != self.moments.sketches:
            old = self.moments
            self.moments = CalibrationMoments(old.shapes, old.dtype, old.device, old.needs, sketches)
            self._taps.moments = self.moments
            rank_zero_info(f"FascCallback: rho is known of {len(known)} layers, by which sketches are sized.")
            self._say_sketches(old.shapes, sketches)

    def _say_sketches(self, shapes: Mapping[str, tuple[int, int]], sketches: Mapping[str, LayerSketches]) -> None:
        options = self.options.sketching
        if options is None:
            return
        sketched, exact = describe_sketches(shapes, sketches, options)
        if sketched:
            rank_zero_info(f"FascCallback: {sketched}.")
        if exact:  # an absolute size was meant for all of them
            (rank_zero_info if options.size == "auto" else rank_zero_warn)(f"FascCallback: {exact}.")

    def end_batch(self) -> None:
        """End a batch, if there is one."""
        if self.running:
            self._taps.end_batch()

    def settle(self, trainer: pl.Trainer) -> None:
        """End a batch that has run, for a checkpoint that is saved before this calibration's turn to do so."""
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if progress.processed == progress.ready:
            self.end_batch()

    def setting(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return, in plain data, what has to be the same for statistics to add up."""
        options = self.options
        return {
            "layers": {name: list(shape) for name, shape in self.moments.shapes.items()},
            # Sketches are said among these, and not on their own: checkpoints of exact moments know no such entry. As
            # the options alone ask for them: those of a checkpoint, sized by what rho was then, come with its sums.
            "statistics": sorted(self.moments.needs) + [f"{k}: {v}" for k, v in sorted(self._sketches.items())],
            "dtype": str(self.moments.dtype),
            "scored tokens": self.scores.tokens,
            "gate on every batch": options.gate is not None,
            "rho_gradient": options.rho_gradient,
            "seed": options.seed,
            "token_fraction": options.token_fraction,
            "update_weights": options.update_weights,
            "loss_terms": _named(options.loss_terms),
            "token_mask": _named(options.token_mask),
            REPLAYED: self.replays,
            "number of processes": trainer.world_size,
        }

    def restore(
        self,
        moments: CalibrationMoments | None,
        scores: dict[str, DependenceScore] | None,
        kept: list[Any],
        batches: int,
        seconds: float,
    ) -> None:
        """Go on from the statistics of a calibration that was interrupted.

        Args:
            moments: Of all processes, on the first of them; of the same sketches and empty on the others. None keeps
                what there is.
            scores: Likewise.
            kept: Batches to replay.
            batches: How many were counted.
            seconds: What they took.
        """
        if moments is not None:
            self.moments = self._taps.moments = moments
        if scores is not None:
            self.scores.scores = scores
        self.replay.batches = kept if self.replays else []
        self.batches, self._seconds = batches, seconds

    def reset(self) -> None:
        """Undo a :meth:`restore` that other processes could not follow: nothing has been counted."""
        old = self.moments
        nothing = CalibrationMoments(old.shapes, old.dtype, old.device, old.needs, self._sketches)
        self.restore(nothing, None, [], 0, 0.0)

    def finish(self, trainer: pl.Trainer) -> None:
        """Sum the statistics over all processes, once the last batch has run."""
        self._seconds, self._began, self.finished = self.seconds, None, True
        if is_distributed(trainer):
            self.moments.all_reduce_()
            self.scores.all_reduce_()

    def release(self) -> None:
        """Take the hooks off and thaw the module; safe at any time."""
        self._taps.remove()
        if self._frozen is not None:
            self._frozen.exit()

    def factorize(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        *,
        rank: int | float | None,
        keep: float | None,
        layout: Layout,
        align: int,
    ) -> tuple[CompressionResult, list[LayerReport]]:
        """Turn the statistics into replacements, the same ones on every process, and say what becomes of each layer.

        The statistics are used up, unless a refit needs them.

        Args:
            trainer: Of the fit.
            pl_module: The module, dense.
            rank: See :func:`~fasc_lightning.factorize.layer_budgets`.
            keep: Likewise.
            layout: See :func:`~fasc_lightning.factorize.compress_layers`.
            align: Likewise.

        Raises:
            RuntimeError: If no gradient reached any layer, or processes chose different ranks.
            ValueError: If the budget cannot be met.
        """
        self.spent = True
        options, moments = self.options, self.moments
        _checks.warn_few_tokens({name: moments.tokens(name) for name in self.layers}, layer_shapes(self.layers))
        rows = {row["layer"]: row for row in self.scores.rows(trainer.global_step)}
        scores = gate_scores(options.gate_by, rows, self.layers, moments)
        methods = choose_methods(scores, options.gate, options.method, options.gate_exclude)
        flags = failure_flags(self.layers, moments)
        result = compress_layers(
            self.layers,
            moments,
            rank=rank,
            keep=keep,
            method=options.method,
            allocation=options.allocation,
            layout=layout,
            align=align,
            device=trainer.strategy.root_device,
            progress=layer_progress(trainer),
            methods=methods,
            consume=self.refit is None,
            measure=MeasurePhase(
                trainer, pl_module, self.layers, self.replay, options.token_mask, options.loss_terms
            ).measure,
        )
        reports = [LayerReport.of(plan, rows[plan.name], flags[plan.name]) for plan in result.layers]
        return same_everywhere(trainer, result), reports

    def run_refit(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, dense: dict[str, nn.Module]
    ) -> RefitReport | None:
        """Refit the compressed module; see :meth:`~fasc_lightning.refit_phase.RefitPhase.run`."""
        assert self.refit is not None
        return self.refit.run(trainer, pl_module, dense, self.moments, self.replay)

    def run_refine(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, dense: dict[str, nn.Module]
    ) -> RefineReport | None:
        """Refine the compressed module; see :meth:`~fasc_lightning.refine_phase.RefinePhase.run`."""
        assert self.refine is not None
        return self.refine.run(trainer, pl_module, dense, self.replay)


def _named(option: Any) -> str | None:
    """Return an option in plain data: a callable by the name of its code, which is as far as files can tell."""
    if not callable(option):
        return option
    code = option if hasattr(option, "__qualname__") else type(option)
    return f"{code.__module__}.{code.__qualname__}"
