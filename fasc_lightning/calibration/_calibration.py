"""The calibration of a fit: all that is gathered on its batches, from the first of them to the factors."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from fasc_lightning._utils import Progress, available_memory, layer_progress, return_freed_memory
from fasc_lightning.batches import KeptBatches, Place, TokenRows, backwards_of, calibration_rows, loops_before
from fasc_lightning.calibration._checks import check_moments_memory, warn_few_tokens, warn_unannounced, warn_unreached
from fasc_lightning.calibration._frozen_fit import FrozenFit
from fasc_lightning.calibration._loss_measurement import LossMeasurement
from fasc_lightning.calibration._passes import check_averaging, passes_of, share_units, shares
from fasc_lightning.calibration._sketch_policy import describe_sketches, sketches_for_budget
from fasc_lightning.compression import (
    CompressionResult,
    FactorizedLayers,
    LayerReport,
    build_layers,
    choose_methods,
    excluded_layers,
    factorize_layers,
    failure_flags,
    gate_scores,
    offload_to_disk,
    same_everywhere,
    statistics_needed,
)
from fasc_lightning.dependence import DependenceScore, LayerScores, RhoHistory, RhoRow, reasons
from fasc_lightning.distributed import (
    UnevenInputs,
    Unsharding,
    is_distributed,
    is_sharded,
    lacks_room,
    others_present,
    sum_everywhere,
)
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import Layout, layer_shapes
from fasc_lightning.options import CalibrationOptions, RefineOptions, holds_moments
from fasc_lightning.refit import RefinePhase, RefineReport, RefitPhase, RefitReport
from fasc_lightning.statistics import CalibrationMoments, LayerSketches, moment_dtype, moments_bytes, offloaded

#: Where rho decides nothing, a calibration scores every so many batches, on so many tokens: it is a diagnostic then,
#: and moments are what the time is for.
SCORE_EVERY, SCORE_TOKENS = 8, 64

#: After so many batches layers that no gradient has reached are named.
UNREACHED_AFTER = 8

#: Entry of :meth:`Calibration.setting`.
REPLAYED = "replay of batches (refit, refinement, measured allocation)"


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
        rows: The batch that runs; None between batches.
        passes: How often the data are gone through, each time for a share of the layers.
        moments: Second moments of the inputs and gradients of this pass's layers.
        scores: Their dependence scores.
        refit: The refit that is to follow; None where there shall be none.
        refine: The refinement after it, likewise.
        replay: The batches of the first process, where what follows runs them once more; empty on the others.
        sketches: Of the layers some of whose moments are sketched, as the options alone ask for them.
        batches: How many batches were counted in this pass, on this process.
        finished: Whether the statistics are those of all processes.
        spent: Whether factors are being made of them, which uses them up.
        origin: Lightning's loops and schedulers before the first batch, from which the calibration can start again.
        unsharding: Makes a sharded module whole.
        uneven_inputs: Keeps the processes in step.

    Raises:
        MemoryError: If the moments do not fit; or if weights are sharded, the whole module does not fit into each
            process, and what is insisted on needs it.
        MisconfigurationException: If the fit has fewer epochs than passes, or averages weights that are read before.
        ValueError: If a pattern of ``gate_exclude`` matches nothing, or there are more passes than layers.
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
        self.rows: TokenRows | None = None
        self._kept = False
        self.batches = 0
        self.finished = False
        self.spent = False
        self.origin: dict[str, Any] = {}
        self.passes = passes_of(trainer, options.passes)
        check_averaging(trainer, self.passes, options.sketch)
        self._device = trainer.strategy.root_device
        shapes, needs = layer_shapes(layers), statistics_needed(options.method, options.gate_threshold, options.gate_by)
        sketches = sketches_for_budget(shapes, options.sketching, options.rank, options.keep)
        dtype = moment_dtype(layers.values())
        self._empty = partial(CalibrationMoments, dtype=dtype, device=options.place(self._device), needs=needs)
        self.sketches = sketches
        exact = LayerSketches()
        sizes = [moments_bytes([shape], dtype, needs, [sketches.get(n, exact)]) for n, shape in shapes.items()]
        names = list(shapes)
        parts = shares(sizes, self.passes, share_units(names))
        self._shares = [{names[i]: layers[names[i]] for i in part} for part in parts]
        needed, place = max(sum(sizes[i] for i in part) for part in parts), options.place(self._device)
        check_moments_memory(needed, place, self.passes, options.sketch)
        rank_zero_info(
            f"FascCallback: {len(shapes)} layers with {sum(m * n for m, n in shapes.values()):,} weights; their "
            f"moments need at most {needed / 1e9:.2f} GB ({dtype}) of the {available_memory(place) / 1e9:.2f} GB free "
            f"on {place}{'' if self.passes == 1 else f', in each of {self.passes} passes'}."
        )
        self._history = RhoHistory() if history is None else history
        self._sized = sketches
        if reason := lacks_room(trainer, pl_module, needed):
            options = options.without_replay(refine is not None, reason)
        self.options = options
        self._say_sketches(shapes, sketches)
        self.unsharding = Unsharding()
        self.uneven_inputs = UnevenInputs(_needs_all(options, pl_module))
        return_freed_memory()
        excluded_layers(layers, options.gate_exclude)  # refuses patterns that match nothing
        self._factorized: FactorizedLayers | None = None
        self._rows: dict[str, tuple[RhoRow, tuple[str, ...]]] = {}
        self._counts: list[int] = []  # batches of each pass, on all processes
        self.moments_bytes = 0
        self._begin_share()
        # "auto" does without where the moments are not all there in the end.
        refit = options.refit if holds_moments(self.passes, options.sketch) else False
        self.refit = RefitPhase.of(refit, pl_module, layers)
        self.refine = None if refine is None else RefinePhase(refine)
        if refine is not None:
            RefinePhase.check(pl_module, layers)
        self.replay = KeptBatches()
        self._frozen = None if options.update_weights else FrozenFit(trainer, pl_module)
        self._seconds = 0.0
        self._began: float | None = None
        self.factorizing = 0.0

    def _begin_share(self) -> None:
        """Start to gather for the next share of the layers."""
        options = self.options
        share = self._shares[0]
        sketches = {name: sides for name, sides in self._sized.items() if name in share}
        self.moments = self._empty(layer_shapes(share), sketches=sketches)
        tokens = SCORE_TOKENS if options.gate_threshold is None else options.monitor_tokens
        self.scores = LayerScores(share, tokens, options.rho_gradient, options.seed, self._device)
        self._taps = Taps(share, offloaded(self.moments, self._device), self.scores)
        self.batches = 0

    @property
    def seconds(self) -> float:
        """Seconds that the batches took, those before an interruption included."""
        return self._seconds if self._began is None else self._seconds + time.perf_counter() - self._began

    @property
    def replays(self) -> bool:
        """Whether batches are kept: refit, refinement and the measuring of losses run them once more."""
        return self.refit is not None or self.refine is not None or self.options.allocation == "measured"

    @property
    def needs_whole(self) -> bool:
        """Whether a sharded module has to be whole before it is compressed: one process alone runs it, or keeps it."""
        return self.replays or self.options.recovery is not None

    @property
    def begun(self) -> bool:
        """Whether there was a batch."""
        return self.batches > 0 or self._factorized is not None

    @property
    def running(self) -> bool:
        """Whether hooks are on the layers."""
        return self._taps.installed

    @property
    def frozen(self) -> bool:
        """Whether the module is held still."""
        return self._frozen is not None and self._frozen.active

    def check_alike(self, trainer: pl.Trainer) -> None:
        """Refuse, before the first batch, processes whose statistics would not add up.

        Raises:
            ValueError: On every process, with what differs.
        """
        if is_distributed(trainer):
            self.moments.check_alike()

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
            scored=options.gate_threshold is not None or self.batches % SCORE_EVERY == 0,
        )
        if not self.begun:
            self.origin = loops_before(trainer)
            self._size_sketches()
        self._taps.begin_batch(rows, backwards_of(pl_module))
        self.rows = rows
        self.batches += 1
        # The first process runs its own alone; a further pass has the same ones.
        self._kept = self.replays and trainer.is_global_zero and self._factorized is None
        if self._kept:
            self.replay.keep(batch, Place.of(trainer))
            if options.calibration_steps is not None:  # of a stream, more may come than were asked for
                del self.replay.batches[: -options.calibration_steps * trainer.accumulate_grad_batches]

    def leave_out(self) -> None:
        """Do not replay the batch that runs, or has just run: it has no loss, or one that says nothing."""
        if self._kept:
            self.replay.batches.pop()
            self._kept = False

    def _size_sketches(self) -> None:
        """Choose sizes anew by what monitoring knows of rho by now, before anything is summed: never larger ones.

        Every process has the same history, so that all choose alike.
        """
        known = {name: row["rho"] for name, row in self._history.at().items() if not math.isnan(row["rho"])}
        options = self.options
        sized = sketches_for_budget(layer_shapes(self.layers), options.sketching, options.rank, options.keep, known)
        if sized != self._sized:
            self._sized = sized
            installed = self._taps.installed
            self._taps.remove()
            self._begin_share()
            if installed:
                self._taps.install()
            rank_zero_info(f"FascCallback: rho is known of {len(known)} layers, by which sketches are sized.")
            self._say_sketches(layer_shapes(self.layers), sized)

    def _say_sketches(self, shapes: Mapping[str, tuple[int, int]], sketches: Mapping[str, LayerSketches]) -> None:
        options = self.options.sketching
        if options is None:
            return
        sketched, exact = describe_sketches(shapes, sketches, options)
        if sketched:
            rank_zero_info(f"FascCallback: {sketched}.")
        if exact:  # an absolute size was meant for all of them
            (rank_zero_info if options.size == "auto" else rank_zero_warn)(f"FascCallback: {exact}.")

    def begin_backward(self, loss: Tensor) -> None:
        """Count the backward pass that is about to run; one that reaches no tapped layer brings nothing.

        Args:
            loss: Of the batch, as the backward pass gets it.
        """
        if self._frozen is not None:
            self._frozen.lend_gradient(loss)
        self._taps.begin_backward()

    def end_backward(self) -> None:
        """End the backward pass."""
        self._taps.end_backward()
        if self._frozen is not None:
            self._frozen.take_gradient_back()

    def settle_rows(self) -> None:
        """Wait until the statistics hold all that a backward pass has brought.

        Raises:
            FloatingPointError: If some of it is not finite.
        """
        self._taps.settle()

    def end_batch(self) -> None:
        """End a batch, if there is one."""
        self.rows = None
        if self.running:
            self._taps.end_batch()
            if self.batches == 1 and self._taps.unannounced:
                warn_unannounced()
            if self.batches == UNREACHED_AFTER:
                warn_unreached(self._taps, self.batches)

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
            "statistics": sorted(self.moments.needs) + [f"{k}: {v}" for k, v in sorted(self.sketches.items())],
            "dtype": str(self.moments.dtype),
            "scored tokens": self.scores.tokens,
            "gate on every batch": options.gate_threshold is not None,
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
        kept: KeptBatches,
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
            self.moments = moments
            self._taps.moments = offloaded(moments, self._device)
        if scores is not None:
            self.scores.scores = scores
        self.replay = kept if self.replays else KeptBatches()
        self.batches, self._seconds = batches, seconds

    def reset(self) -> None:
        """Undo a :meth:`restore` that other processes could not follow: nothing has been counted."""
        self._begin_share()
        self.restore(None, None, KeptBatches(), 0, 0.0)

    def end_epoch(self, trainer: pl.Trainer) -> None:
        """End a pass that others follow: its layers are factorised, and their moments let go of."""
        if not (self.batches and len(self._shares) > 1):
            return
        self._taps.remove()
        self._sum(trainer)
        rank_zero_info(
            f"FascCallback: pass {self.passes - len(self._shares) + 1} of {self.passes} is over; its "
            f"{len(self._shares[0])} layers are factorised."
        )
        start = time.perf_counter()
        self._factorize_share(trainer, None)
        self.factorizing += time.perf_counter() - start
        return_freed_memory()
        self._shares.pop(0)
        self._begin_share()

    def finish(self, trainer: pl.Trainer) -> None:
        """Sum the statistics over all processes, once the last batch has run."""
        self.finished = True
        self._sum(trainer)

    def merge(self, trainer: pl.Trainer) -> None:
        """Let the first process go on with what all have gathered so far, and the others with nothing.

        As they do after an interruption: that sums are then added up in the same order lets both end with the same
        factors, to the last bit.
        """
        if not is_distributed(trainer) or self.finished:
            return
        self._taps.settle()
        with others_present():
            self.moments.all_reduce_(device=self._device)
            self.scores.all_reduce_()
        if not trainer.is_global_zero:
            share = self._shares[0]
            sketches = {name: sides for name, sides in self._sized.items() if name in share}
            self.moments = self._empty(layer_shapes(share), sketches=sketches)
            self._taps.moments = offloaded(self.moments, self._device)
            self.scores.reset()

    def _sum(self, trainer: pl.Trainer) -> None:
        self._seconds, self._began = self.seconds, None
        if is_distributed(trainer):
            with others_present():
                self.moments.all_reduce_(device=self._device)
                self.scores.all_reduce_()
        if self.passes > 1:
            with others_present():
                self._counts.append(sum_everywhere(trainer, self.batches))
        self.moments_bytes = max(self.moments_bytes, self.moments.nbytes)

    def pause(self) -> None:
        """Take the hooks off and thaw the module until the next batch that is counted."""
        self._seconds, self._began = self.seconds, None
        self.release()

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
            rank: See ``layer_budgets``.
            keep: Likewise.
            layout: See :func:`~fasc_lightning.compression.compress_layers`.
            align: Likewise.

        Raises:
            MisconfigurationException: If the fit was stopped before the last pass.
            RuntimeError: If no gradient reached any layer, or processes chose different ranks.
            ValueError: If the budget cannot be met.
        """
        if len(self._shares) > 1:
            raise MisconfigurationException(
                f"Expected {self.passes} passes over the data, one an epoch, but the fit was stopped in pass "
                f"{self.passes - len(self._shares) + 1}. The model is not compressed."
            )
        self._check_counts()
        self.spent = True
        options = self.options
        progress = layer_progress(trainer)
        self._factorize_share(trainer, progress)
        factorized = self._factorized
        assert factorized is not None
        return_freed_memory()  # of the moments, on top of which the batches of a measuring would be put
        warn_few_tokens(factorized.tokens, layer_shapes(self.layers))
        result = build_layers(
            self.layers,
            factorized,
            rank=rank,
            keep=keep,
            allocation=options.allocation,
            layout=layout,
            align=align,
            device=self._device,
            progress=progress,
            measure=LossMeasurement(
                trainer, pl_module, self.layers, self.replay, options.token_mask, options.loss_terms
            ).measure,
        )
        reports = [LayerReport.of(plan, *self._rows[plan.name]) for plan in result.layers]
        return same_everywhere(trainer, result), reports

    def _check_counts(self) -> None:
        """Refuse a last pass without data, and warn of passes over unequal ones."""
        if len(set(self._counts)) < 2:
            return
        if self._counts[-1] == 0:
            raise MisconfigurationException(
                f"Expected batches in each of {self.passes} passes over the data but the last had none. The model is "
                "not compressed. HINT: a loader that can be gone through again."
            )
        rank_zero_warn(
            f"Passes over the data had unequal numbers of batches: {', '.join(map(str, self._counts))}. Layers that "
            "saw more of them weigh more when the budget is spent. HINT: a loader that gives all passes the same."
        )

    def _factorize_share(self, trainer: pl.Trainer, progress: Progress | None) -> None:
        """Factorise the layers of this pass, and keep what reports say of their statistics."""
        options, moments, share = self.options, self.moments, self._shares[0]
        rows = {row["layer"]: row for row in self.scores.rows(trainer.global_step)}
        scores = gate_scores(options.gate_by, rows, share, moments)
        undecided = [rows[name] for name in share if math.isnan(scores[name])]
        if options.gate_threshold is not None and undecided:
            rank_zero_info(
                f"FascCallback: {options.gate_by} rho of {len(undecided)} layers is undefined, so that the gate leaves "
                f"them to {options.method}: {reasons(undecided)}."
            )
        # Of all layers, since the last block and what an exclusion matches may be in another pass.
        flags = failure_flags(self.layers, moments)
        methods = choose_methods(
            {**dict.fromkeys(self.layers, math.nan), **scores},
            options.gate_threshold,
            options.method,
            options.gate_exclude,
        )
        for name in share:
            # Why debiased is NaN; that its interval alone is, which a report does not have, is no matter.
            undefined = (rows[name]["reason"],) if math.isnan(rows[name]["debiased"]) else ()
            self._rows[name] = rows[name], flags[name] + undefined
        found = factorize_layers(
            share,
            moments,
            method=options.method,
            device=self._device,
            progress=progress,
            methods={name: methods[name] for name in share},
            consume=self.refit is None,
            # One pass cannot know whether the gate will mix solvers in another.
            unit="fisher" if self.passes > 1 and options.gate_threshold is not None else "own",
            hold=offload_to_disk if self.passes > 1 else None,
        )
        self._factorized = found if self._factorized is None else self._factorized.join(found)

    def run_refit(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, dense: dict[str, nn.Module]
    ) -> RefitReport | None:
        """Refit the compressed module; see :meth:`~fasc_lightning.refit.RefitPhase.run`."""
        assert self.refit is not None
        return self.refit.run(trainer, pl_module, dense, self.moments, self.replay)

    def run_refine(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, dense: dict[str, nn.Module]
    ) -> RefineReport | None:
        """Refine the compressed module; see :meth:`~fasc_lightning.refit.RefinePhase.run`."""
        assert self.refine is not None
        return self.refine.run(trainer, pl_module, dense, self.replay)


def _needs_all(options: CalibrationOptions, pl_module: pl.LightningModule) -> str:
    """Return why a batch needs all processes; "" if each works alone."""
    if is_sharded(pl_module):
        return "every layer's weights are gathered from all of them"
    return "every step averages the gradients of all of them" if options.update_weights else ""


def _named(option: Any) -> str | None:
    """Return an option in plain data: a callable by the name of its code, which is as far as files can tell."""
    if not callable(option):
        return option
    code = option if hasattr(option, "__qualname__") else type(option)
    return f"{code.__module__}.{code.__qualname__}"
