"""Runs of cells on one model: each is built, measured and undone."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fasc_lightning._utils import Progress, return_freed_memory, undoing
from fasc_lightning.batches import TokenRows
from fasc_lightning.compression import (
    Approximation,
    CompressionResult,
    LayerChoice,
    RoundedLayers,
    build_rounded,
    byte_budget,
    compress_layers,
    evenly_spaced,
    layer_budgets,
    measure_losses,
    round_layers,
)
from fasc_lightning.layers import (
    bytes_in_16_bits,
    dequantized,
    form_to_plain,
    layer_sizes,
    quantized_layer,
    swap_modules,
)
from fasc_lightning.options import measures_losses
from fasc_lightning.refit import ByLayer, causal_loss, refit, refit_figures
from fasc_lightning.solvers import Factorization
from fasc_lightning.statistics import CalibrationMoments
from fasc_lightning.studies.comparison._cell_store import CellStore
from fasc_lightning.studies.comparison._cells import DENSE, FOLDER, PRUNERS, Budget, Cell, Outcome
from fasc_lightning.studies.comparison._peer import load_peer, read_peer
from fasc_lightning.studies.comparison._questions import Evaluation
from fasc_lightning.studies.comparison._statistics import GatheredStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

#: Failures that the same cell would repeat: numbers that overflow, a budget that is too small, a model that a method
#: does not support. Other failures (memory, a missing package) may pass, so their cells are tried again.
LASTING = (FloatingPointError, ValueError, NotImplementedError)


@dataclass(frozen=True)
class Built:
    """A model with a cell's compressed layers, and the cost of building it.

    ``bytes`` is the size of the compressed layers where the layers in memory have another size, as dequantised ones do.
    """

    model: PreTrainedModel
    layers: Mapping[str, nn.Module]
    seconds: dict[str, float] = field(default_factory=dict)
    plan: list[dict[str, Any]] = field(default_factory=list)
    passes: int = 0
    bytes: int | None = None
    refit: dict[str, Any] | None = None


@dataclass
class _Factorized:
    """Factorisations that cells of one method and unit share, whatever their budgets.

    Attributes:
        key: The part of a cell on which its factorisations depend.
        layers: Factorisations by layer.
        seconds: Seconds of the last cell that computed any.
    """

    key: tuple[Any, ...] = ()
    layers: dict[str, Factorization] = field(default_factory=dict)
    seconds: float = 0.0

    def of(self, cell: Cell) -> _Factorized:
        """Drop factorisations of other cells, because two methods' factorisations take the memory of two models."""
        assert cell.setting is not None
        key = (cell.method, cell.kronecker_steps, cell.methods, cell.setting.unit)
        if key != self.key:
            self.key, self.layers, self.seconds = key, {}, 0.0
        return self


@dataclass
class _Rounded:
    """Rounded layers that cells of the same grids share, whatever their sizes.

    Attributes:
        key: Grids, layers and way of rounding.
        layers: The layers on each grid; None if there are none yet.
        seconds: Seconds that rounding took.
    """

    key: tuple[Any, ...] = ()
    layers: RoundedLayers | None = None
    seconds: float = 0.0

    def copied(self) -> RoundedLayers:
        """Return the layers for a cell, which may change its scales in place and copies codes itself."""
        assert self.layers is not None
        weights = {
            name: [replace(r, weight=replace(r.weight, scale=r.weight.scale.clone())) for r in found]
            for name, found in self.layers.weights.items()
        }
        return RoundedLayers(weights, dict(self.layers.tokens), dict(self.layers.ranks))


class Comparison:
    """Runs cells on one model, one after the other, and restores the model after each.

    Args:
        calibration: The model, its layers and the source of their statistics, which is asked once and only if a cell
            has to run.
        methods: All solvers of the cells, so that one pass serves them all.
    """

    def __init__(self, calibration: GatheredStatistics, methods: Sequence[str]) -> None:
        self.calibration = calibration
        self.model = calibration.model
        self.layers = calibration.layers
        self.methods = list(methods)
        self._factorized = _Factorized()
        self._on_grids = _Rounded()

    @cached_property
    def moments(self) -> CalibrationMoments:
        """Moments of all layers, with the statistics that all methods need."""
        return self.calibration.moments(self.methods)

    def run(
        self, cells: Sequence[Cell], evaluation: Evaluation, store: CellStore, progress: Progress | None = None
    ) -> Iterator[tuple[Cell, Outcome, bool]]:
        """Measure cells in turn, except those with a kept outcome.

        Args:
            cells: The cells.
            evaluation: The questions.
            store: The kept outcomes of this evaluation.
            progress: Wraps the loop over a cell's layers.

        Yields:
            The cell, its outcome, and whether the outcome was kept from before.
        """
        for cell in cells:
            outcome = store.load(cell)
            if found := outcome is not None:
                yield cell, outcome, found
                continue
            evaluation = evaluation.compared_with(self.model)
            outcome = self.measure(cell, evaluation, progress)
            store.save(cell, outcome)
            yield cell, outcome, found

    def run_beside_dense(
        self,
        cells: Sequence[Cell],
        evaluation: Evaluation,
        store: CellStore,
        line: Callable[[Cell, Outcome, Outcome], str],
        say: Callable[[str], None],
        progress: Progress | None = None,
    ) -> tuple[Outcome, dict[Cell, Outcome]]:
        """Measure the dense model and then cells as :meth:`run` does, and say one line each.

        Args:
            cells: The cells.
            evaluation: The questions.
            store: The kept outcomes of this evaluation.
            line: Returns the line about a cell from the cell, its outcome and the dense model's.
            say: Shows a line.
            progress: Wraps the loop over a cell's layers.

        Returns:
            The dense model's outcome, and the outcome of each cell.

        Raises:
            RuntimeError: If the dense model cannot be measured, because there is then no comparison.
        """
        outcomes: dict[Cell, Outcome] = {}
        everything = [Cell(DENSE), *cells]
        for cell, outcome, found in self.run(everything, evaluation, store, progress):
            outcomes[cell] = outcome
            text = line(cell, outcome, outcomes[Cell(DENSE)])
            say(f"[{len(outcomes)}/{len(everything)}] {text}{' (kept)' if found else ''}")
        dense = outcomes.pop(Cell(DENSE))
        if dense.measured is None:
            raise RuntimeError(f"Expected to measure the dense model, but: {dense.error}")
        return dense, outcomes

    def measure(self, cell: Cell, evaluation: Evaluation, progress: Progress | None = None) -> Outcome:
        """Build a cell, measure it and restore the model; a failure is also an outcome."""
        try:
            with self._built(cell, progress) as built:
                start = time.perf_counter()
                # The speed is that of the rounded layers themselves.
                with dequantized(built.model) if evaluation.prompt is None else nullcontext():
                    measured = evaluation.measure(built.model, self.calibration.tokenizer)
                seconds = {**built.seconds, "evaluate": time.perf_counter() - start}
                dense, compressed = layer_sizes(self._layers(cell)), layer_sizes(built.layers)
                held = (tensor for m in built.layers.values() for tensor in (*m.parameters(), *m.buffers()))
                return Outcome(
                    parameters=compressed.parameters,
                    kept=compressed.parameters / dense.parameters,
                    bytes=bytes_in_16_bits(held) if built.bytes is None else built.bytes,
                    zeros=share_of_zeros(built.layers),
                    measured=measured,
                    seconds=seconds,
                    plan=built.plan,
                    passes=built.passes,
                    refit=built.refit,
                )
        except Exception as error:  # a failing method must not end the comparison
            lasting = isinstance(error, LASTING)
            if not lasting:
                _log.exception("%s failed, and will be tried again by the next run.", cell.name)
            return Outcome(error=f"{type(error).__name__}: {error}", lasting=lasting)
        finally:
            return_freed_memory()

    def _batches(self) -> list[dict[str, Tensor]]:
        """Return the calibration windows for methods that read them themselves."""
        return [{"input_ids": ids.to(self.model.device)} for ids in self.calibration.windows.split(1)]

    def _measure(self, layers: dict[str, nn.Module], approximations: Mapping[str, Approximation]) -> dict[str, float]:
        """Return the losses of approximated layers on some of the calibration windows."""
        return measure_losses(
            self.model, layers, approximations, evenly_spaced(self._batches()), _window_rows, causal_loss
        )

    def _layers(self, cell: Cell) -> dict[str, nn.Module]:
        return self.layers if cell.layers is None else {name: self.layers[name] for name in cell.layers}

    @contextmanager
    def _built(self, cell: Cell, progress: Progress | None) -> Iterator[Built]:
        layers = self._layers(cell)
        if cell.method == DENSE:
            yield Built(self.model, layers)
        elif cell.method in PRUNERS:
            yield self._pruned(cell, layers)
        elif cell.method == FOLDER:
            peer, model = read_peer(cell.label), load_peer(cell.label, self.model, layers)
            found = {name: model.get_submodule(name) for name in layers}
            yield Built(model, found, {"compress": peer.seconds}, bytes=peer.layer_bytes)
        else:
            build = self._rounded if cell.budget is not None and cell.budget.options.rounds else self._lowrank
            with self._swapped(cell, *build(cell, layers, progress), progress) as built:
                yield built

    def _pruned(self, cell: Cell, layers: dict[str, nn.Module]) -> Built:
        """Prune a copy, because pruning cannot be undone."""
        from fasc_lightning.studies.pruning import prune_llm, prune_magnitude

        assert cell.budget is not None
        keep = budget_share(layers, cell.budget)
        model = copy.deepcopy(self.model)
        by_magnitude = cell.method == "magnitude"
        result = prune_magnitude(model, keep) if by_magnitude else prune_llm(model, self._batches(), keep)
        pruned = {name: model.get_submodule(name) for name in layers}
        return Built(model, pruned, {"prune": result.seconds}, passes=result.passes)

    def _lowrank(
        self, cell: Cell, layers: dict[str, nn.Module], progress: Progress | None
    ) -> tuple[CompressionResult, float]:
        """Return low-rank layers, and the seconds that they took."""
        assert cell.budget is not None
        assert cell.setting is not None
        moments = self.moments  # which may take a pass over the data
        start = time.perf_counter()
        factorized = self._factorized.of(cell)
        there = len(factorized.layers)
        result = compress_layers(
            layers,
            moments,
            rank=cell.budget.rank,
            keep=cell.budget.keep,
            method=cell.method,
            allocation=cell.setting.allocation,
            layout=cell.setting.layout,
            device=self.model.device,
            progress=progress,
            methods=dict(cell.methods),
            consume=False,
            unit=cell.setting.unit,
            measure=partial(self._measure, layers),
            known=factorized.layers,
        )
        spent = time.perf_counter() - start
        if len(factorized.layers) > there:
            factorized.seconds = spent
        else:  # this cell reuses the work of an earlier one, which counts
            spent += factorized.seconds
        return result, spent

    def _rounded(
        self, cell: Cell, layers: dict[str, nn.Module], progress: Progress | None
    ) -> tuple[CompressionResult, float]:
        """Return rounded layers, and the seconds that they took."""
        assert cell.budget is not None
        assert cell.setting is not None
        moments, how = self.moments, cell.budget.options
        key = (how.grids, how.is_calibrated, cell.layers)
        if key != self._on_grids.key:
            self._on_grids = _Rounded()  # two sets of codes take the memory of two models
            start = time.perf_counter()
            rounded = round_layers(
                layers,
                moments,
                how.grids,
                calibrated=how.is_calibrated,
                low_rank=how.offers_ranks,
                device=self.model.device,
                progress=progress,
                consume=False,
            )
            self._on_grids = _Rounded(key, rounded, time.perf_counter() - start)
        start = time.perf_counter()
        result = build_rounded(
            layers,
            self._on_grids.copied(),
            method=cell.method,
            budget=None if how.size is None else byte_budget(self.model, layers, how.size),
            allocation=cell.setting.allocation,
            measure=partial(self._measure, layers) if measures_losses(cell.setting.allocation) else None,
            progress=progress,
        )
        # Rounding counts for every cell, also where an earlier one did it.
        return result, self._on_grids.seconds + time.perf_counter() - start

    @contextmanager
    def _swapped(
        self, cell: Cell, result: CompressionResult, spent: float, progress: Progress | None
    ) -> Iterator[Built]:
        """Swap a cell's layers in, refit them if asked to, and swap the same dense modules back."""
        layers, start = self._layers(cell), time.perf_counter()
        plan = [_plain(layer) for layer in result.layers]
        with undoing() as undo:
            undo.keep(self.model)
            dense = swap_modules(self.model, result.replacements)
            seconds, figures = {"factorize": spent, "swap": time.perf_counter() - start}, None
            if cell.refit and dense:
                report = refit(
                    self.model,
                    dense,
                    ByLayer(self.moments.G, dense),
                    self._batches(),
                    inputs=ByLayer(self.moments.A, dense),
                    progress=progress,
                )
                seconds["refit"], figures = report.seconds, refit_figures(report)
            found = {**layers, **result.replacements}
            if cell.budget is not None and cell.budget.rounds_factors:
                found = {name: quantized_layer(layer, "int8") for name, layer in found.items()}
                swap_modules(self.model, found)
            yield Built(self.model, found, seconds, plan, refit=figures)


def _plain(layer: LayerChoice) -> dict[str, Any]:
    """Return a choice as read from JSON; a choice in floating point has no form."""
    row = {
        **asdict(layer),
        "shape": list(layer.shape),
        "form": None if layer.form is None else form_to_plain(layer.form),
    }
    return row if layer.form is not None else {key: value for key, value in row.items() if key != "form"}


def _window_rows(batch: Mapping[str, Tensor]) -> TokenRows:
    return TokenRows("a window run again", scale=batch["input_ids"][:, 1:].numel())


def budget_share(layers: Mapping[str, nn.Module], budget: Budget) -> float:
    """Return a budget as a fraction of the layers' parameters, for methods without ranks."""
    if budget.keep is not None:
        return budget.keep
    return sum(layer_budgets(dict(layers), budget.rank, None).values()) / layer_sizes(layers).parameters


def share_of_zeros(layers: Mapping[str, nn.Module]) -> float:
    """Return the share of exact zeros among the layers' parameters in floating point."""
    parameters = [p for layer in layers.values() for p in layer.parameters() if p.is_floating_point()]
    return sum(int((p == 0).sum()) for p in parameters) / max(1, sum(p.numel() for p in parameters))
