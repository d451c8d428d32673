"""Passes over the data: each gathers statistics for one share of the layers and factorises this share at its end."""

from __future__ import annotations

import math
import time
from functools import partial

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fasc_lightning._utils import Progress, amount, available_memory, return_freed_memory
from fasc_lightning.calibration._checks import check_moments_memory
from fasc_lightning.calibration._gathering import Gathering
from fasc_lightning.calibration._shares import check_averaging, passes_of, share_units, shares
from fasc_lightning.calibration._sketch_policy import describe_sketches, sketches_for_budget
from fasc_lightning.compression import (
    CompressionResult,
    FactorizedLayers,
    LayerReport,
    RoundedLayers,
    choose_methods,
    excluded_layers,
    factorize_layers,
    failure_flags,
    gate_scores,
    offload_to_disk,
    round_layers,
    statistics_needed,
)
from fasc_lightning.dependence import RhoHistory, RhoRow, reasons
from fasc_lightning.distributed import is_distributed, others_present, sum_everywhere
from fasc_lightning.layers import TargetedLayers
from fasc_lightning.options import CalibrationOptions
from fasc_lightning.statistics import CalibrationMoments, LayerSketches, moment_dtype, moments_bytes


class Passes:
    """Goes through the data once for each share of the layers, and keeps the factors of finished shares.

    Nothing is gathered before :meth:`begin`.

    Args:
        trainer: Trainer of the fit; its device holds the statistics.
        layers: The targeted layers.
        options: Options of the calibration.
        history: Observed rho. "auto" sizes of sketches follow its last observation before the first batch; without an
            observation they are the sizes for a high rho.

    Attributes:
        count: Number of passes.
        gathering: Statistics of the share of the current pass.
        sketches: Sketches that the options alone ask for, by layer.
        needed: Bytes that the moments of the largest share may take.
        moments_bytes: Most bytes that the moments of a share have taken so far.
        factorizing: Seconds of factorisation between passes.
        spent: Whether the last factorisation has begun, which uses up the statistics.
        uncalled: The layers of finished shares that no batch has called.

    Raises:
        MemoryError: If the moments do not fit.
        MisconfigurationException: If the fit has fewer epochs than passes, or if it averages weights at its end that
            the calibration reads before.
        ValueError: If a pattern of ``gate_exclude`` matches nothing, or if there are more passes than layers.
    """

    gathering: Gathering

    def __init__(
        self, trainer: pl.Trainer, layers: TargetedLayers, options: CalibrationOptions, history: RhoHistory
    ) -> None:
        self.count = passes_of(trainer, options.passes)
        check_averaging(trainer, self.count, options.sketch)
        self._layers = layers
        self._options = options
        self._history = history
        self._device = trainer.strategy.root_device
        needs = statistics_needed(options.method, options.gate_threshold, options.gate_by)
        self.sketches = sketches_for_budget(layers.shapes, options.sketching, options.rank, options.keep)
        self._sized = self.sketches
        dtype, place = moment_dtype(layers.modules.values()), options.place(self._device)
        self._empty = partial(
            CalibrationMoments, dtype=dtype, device=place, needs=needs, output_share=options.output_share
        )
        exact, names = LayerSketches(), list(layers.shapes)
        sizes = [
            moments_bytes([shape], dtype, needs, [self.sketches.get(name, exact)])
            for name, shape in layers.shapes.items()
        ]
        parts = shares(sizes, self.count, share_units(names))
        self._shares = [layers.share(names[i] for i in part) for part in parts]
        self.needed = max(sum(sizes[i] for i in part) for part in parts)
        check_moments_memory(self.needed, place, self.count, options.sketch)
        rank_zero_info(
            f"FascCallback: {len(names)} layers with {layers.weights:,} weights; their moments need at most "
            f"{amount(self.needed, 'B')} ({dtype}) of the {amount(available_memory(place), 'B')} free on {place}"
            f"{'' if self.count == 1 else f', in each of {self.count} passes'}."
        )
        self._factorized: FactorizedLayers | None = None
        self._rounded: RoundedLayers | None = None
        self._rows: dict[str, tuple[RhoRow, tuple[str, ...]]] = {}
        self._counts: list[int] = []  # batches of each pass, on all processes
        self.moments_bytes = 0
        self.factorizing = 0.0
        self.spent = False
        self.uncalled: list[str] = []

    def begin(self) -> None:
        """Start to gather for the first share of the layers."""
        self._say_sketches()
        return_freed_memory()
        excluded_layers(self._layers.modules, self._options.gate_exclude)  # refuses patterns that match nothing
        self.begin_share()

    def begin_share(self) -> None:
        """Start to gather for the share of the current pass, with empty statistics."""
        share = self._shares[0]
        sketches = {name: sides for name, sides in self._sized.items() if name in share.modules}
        self.gathering = Gathering(
            share, partial(self._empty, share.shapes, sketches=sketches), self._options, self._device
        )

    @property
    def is_first(self) -> bool:
        """Whether no share has been factorised or rounded yet."""
        return self._factorized is None and self._rounded is None

    @property
    def is_last(self) -> bool:
        """Whether no other share follows."""
        return len(self._shares) == 1

    @property
    def begun(self) -> bool:
        """Whether there has been a batch."""
        return self.gathering.batches > 0 or not self.is_first

    def size_sketches(self) -> None:
        """Choose the sizes again by the observed rho, before the first batch; they never grow.

        Every process has the same history, so all choose alike.
        """
        known = {name: row["rho"] for name, row in self._history.at().items() if not math.isnan(row["rho"])}
        options = self._options
        sized = sketches_for_budget(self._layers.shapes, options.sketching, options.rank, options.keep, known)
        if sized == self._sized:
            return
        self._sized = sized
        installed = self.gathering.installed
        self.gathering.remove()
        self.begin_share()
        if installed:
            self.gathering.install()
        rank_zero_info(f"FascCallback: rho is known of {len(known)} layers, by which sketches are sized.")
        self._say_sketches()

    def _say_sketches(self) -> None:
        options = self._options.sketching
        if options is None:
            return
        sketched, exact = describe_sketches(self._layers.shapes, self._sized, options)
        if sketched:
            rank_zero_info(f"FascCallback: {sketched}.")
        if exact:  # an absolute size was meant for all wide sides
            (rank_zero_info if options.size == "auto" else rank_zero_warn)(f"FascCallback: {exact}.")

    def sum_(self, trainer: pl.Trainer) -> None:
        """Sum the statistics of a pass over all processes, after its last batch."""
        if is_distributed(trainer):
            self.gathering.sum_()
        if self.count > 1:
            with others_present():
                self._counts.append(sum_everywhere(trainer, self.gathering.batches))
        self.moments_bytes = max(self.moments_bytes, self.gathering.moments.nbytes)

    def end_pass(self, trainer: pl.Trainer) -> None:
        """Factorise the layers of a pass that is not the last, and free their moments."""
        self.gathering.remove()
        self.sum_(trainer)
        share = self._shares[0]
        rank_zero_info(
            f"FascCallback: pass {self.count - len(self._shares) + 1} of {self.count} is over; its "
            f"{len(share.modules)} layers are {'rounded' if self._options.rounds else 'factorised'}."
        )
        start = time.perf_counter()
        return_freed_memory()  # the activations of the last batch
        self._end_share(trainer, None, consume=True)
        self.factorizing += time.perf_counter() - start
        return_freed_memory()
        self._shares.pop(0)
        self.begin_share()

    def end(self, trainer: pl.Trainer, progress: Progress | None, *, consume: bool) -> FactorizedLayers | RoundedLayers:
        """Factorise or round the layers of the last pass, and return the results of all layers.

        Args:
            trainer: Trainer of the fit.
            progress: Progress bar of the loop over layers.
            consume: Whether to free the moments.

        Raises:
            MisconfigurationException: If the fit was stopped before the last pass, or if the last pass had no data.
        """
        if not self.is_last:
            raise MisconfigurationException(
                f"Expected {self.count} passes over the data, one an epoch, but the fit was stopped in pass "
                f"{self.count - len(self._shares) + 1}. The model is not compressed."
            )
        self._check_counts()
        self.spent = True
        self._end_share(trainer, progress, consume=consume)
        found = self._rounded if self._options.rounds else self._factorized
        assert found is not None
        return found

    def again(self) -> None:
        """Forget the factors of a calibration in one pass, whose moments have changed since."""
        self._factorized = None

    def _check_counts(self) -> None:
        """Refuse a last pass without data, and warn of passes with unequal numbers of batches."""
        if len(set(self._counts)) < 2:
            return
        if self._counts[-1] == 0:
            raise MisconfigurationException(
                f"Expected batches in each of {self.count} passes over the data but the last had none. The model is "
                "not compressed. HINT: a loader that can be gone through again."
            )
        rank_zero_warn(
            f"Passes over the data had unequal numbers of batches: {', '.join(map(str, self._counts))}. Layers that "
            "saw more of them weigh more when the budget is spent. HINT: a loader that gives all passes the same."
        )

    def _end_share(self, trainer: pl.Trainer, progress: Progress | None, *, consume: bool) -> None:
        """Factorise or round the layers of this pass, and keep the figures of their statistics for reports."""
        options, moments, share = self._options, self.gathering.moments, self._shares[0].modules
        self.uncalled += self.gathering.uncalled
        rows = self.gathering.table(trainer.global_step)
        scores = gate_scores(options.gate_by, rows, share, moments)
        undecided = [rows[name] for name in share if math.isnan(scores[name])]
        if options.gate_threshold is not None and undecided:
            rank_zero_info(
                f"FascCallback: {options.gate_by} rho of {len(undecided)} layers is undefined, so that the gate leaves "
                f"them to {options.method}: {reasons(undecided)}."
            )
        # Over all layers, because the last block and excluded layers may be in another pass.
        everywhere = self._layers.modules
        flags = failure_flags(everywhere, moments)
        methods = choose_methods(
            {**dict.fromkeys(everywhere, math.nan), **scores},
            options.gate_threshold,
            options.method,
            options.gate_exclude,
        )
        for name in share:
            # The reason why debiased is NaN. Reports have no interval, so they need no reason for its NaN.
            undefined = (rows[name]["reason"],) if math.isnan(rows[name]["debiased"]) else ()
            self._rows[name] = rows[name], flags[name] + undefined
        if options.rounds:
            rounded = round_layers(
                share,
                moments,
                options.grids,
                calibrated=options.is_calibrated,
                low_rank=options.offers_ranks,
                device=self._device,
                progress=progress,
                consume=consume,
            )
            self._rounded = rounded if self._rounded is None else self._rounded.join(rounded)
            return
        found = factorize_layers(
            share,
            moments,
            method=options.method,
            device=self._device,
            progress=progress,
            methods={name: methods[name] for name in share},
            consume=consume,
            # A pass does not know whether the gate will mix solvers in another pass.
            unit="fisher" if self.count > 1 and options.gate_threshold is not None else "own",
            hold=offload_to_disk if self.count > 1 else None,
        )
        self._factorized = found if self._factorized is None else self._factorized.join(found)

    def reports(self, result: CompressionResult) -> list[LayerReport]:
        """Return the report of each layer: its compression and the figures of its statistics."""
        return [LayerReport.of(choice, *self._rows[choice.name]) for choice in result.layers]
