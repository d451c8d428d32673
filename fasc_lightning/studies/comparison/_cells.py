"""Cells of a comparison: one method under one budget, built, measured, taken back, and kept on disk as it ends."""

from __future__ import annotations

import copy
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from fasc_lightning._utils import (
    Progress,
    anything,
    boolean,
    fingerprint,
    integer,
    listed,
    mapping,
    number,
    optional,
    plain,
    read_json,
    record,
    return_freed_memory,
    text,
    undoing,
    write_json,
)
from fasc_lightning.batches import TokenRows
from fasc_lightning.compression import Unit, compress_layers, evenly_spaced, layer_budgets, measure_losses
from fasc_lightning.layers import Layout, layer_sizes, swap_modules
from fasc_lightning.options import ALLOCATIONS, check_budget
from fasc_lightning.refit import ByLayer, causal_loss, refit
from fasc_lightning.solvers import Factorization
from fasc_lightning.statistics import CalibrationMoments
from fasc_lightning.studies.comparison._questions import Answers, Evaluation
from fasc_lightning.studies.comparison._statistics import GatheredStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

DENSE = "dense"
#: Methods that are no solvers: they have no ranks to allocate and no low-rank matrix to store.
PRUNERS = ("magnitude", "llm-pruner")
LAYOUTS = ("auto", "pivot", "factors")

#: Failures that running the same cell again would repeat: numbers that overflow, a budget that is too small, a model
#: that a method does not know. Others (memory, a missing package) may go away, and are tried again.
LASTING = (FloatingPointError, ValueError, NotImplementedError)


@dataclass(frozen=True)
class Budget:
    """What the targeted layers may keep: a fraction of their parameters, or a rank (:class:`FascCallback`)."""

    keep: float | None = None
    rank: float | None = None

    def __post_init__(self) -> None:
        check_budget(self.rank, self.keep)

    def __str__(self) -> str:
        return f"rank {self.rank:g}" if self.keep is None else f"keep {self.keep:g}"


@dataclass(frozen=True)
class Setting:
    """How a budget is spent over layers and how a low-rank matrix is stored, as "fisher-pivot"."""

    allocation: str
    layout: Layout

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Return the setting ALLOCATION-LAYOUT.

        Raises:
            ValueError: If there is no such allocation or layout.
        """
        allocation, _, layout = text.partition("-")
        if allocation not in ALLOCATIONS or layout not in LAYOUTS:
            raise ValueError(
                f"Expected a setting ALLOCATION-LAYOUT of {', '.join(ALLOCATIONS)} and {', '.join(LAYOUTS)}, as "
                f"uniform-factors or fisher-pivot, but got {text!r}."
            )
        return cls(allocation, cast(Layout, layout))

    @property
    def unit(self) -> Unit:
        """What is spent over layers: losses that compare between them, whatever the solver."""
        return "own" if self.allocation == "uniform" else "fisher"

    def __str__(self) -> str:
        return f"{self.allocation}-{self.layout}"


@dataclass(frozen=True)
class Cell:
    """One compression to measure.

    Attributes:
        method: A solver, or "dense" for the model as it is.
        budget: None for the dense model.
        setting: None for the dense model and for methods that have no ranks to allocate.
        refit: Whether the factors are refitted.
        passes: Further passes over the data behind the method's statistics.
        label: Tells cells apart that are of one method, budget and setting: what a study calls it.
        layers: The layers to compress, in place of all.
        methods: Solvers of single layers, as (layer, method).
    """

    method: str
    budget: Budget | None = None
    setting: Setting | None = None
    refit: bool = False
    passes: int = 0
    label: str = ""
    layers: tuple[str, ...] | None = None
    methods: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """What it is called, in messages and among files."""
        passes = f"{self.passes} passes" if self.passes else None
        parts = [self.method, passes, self.budget, self.setting, "refit" if self.refit else None, self.label or None]
        return " ".join(str(part) for part in parts if part is not None)


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        parameters: Of the cell's layers as they were built.
        kept: The same as a share of the dense layers.
        zeros: Share of the layers' weights that are zero and still stored.
        measured: None if it failed.
        seconds: factorize, swap and evaluate; whatever else the method did by its own name.
        plan: Of each layer what was planned: name, rank, layout, loss.
        passes: Passes over the data that the method made for this cell alone.
        error: Why it failed; empty if it did not.
        lasting: Whether it would fail again.
    """

    parameters: int = 0
    kept: float = float("nan")
    zeros: float = 0.0
    measured: Answers | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    plan: list[dict[str, Any]] = field(default_factory=list)
    passes: int = 0
    error: str = ""
    lasting: bool = True

    @property
    def reason(self) -> str:
        """The first line of the error."""
        return self.error.partition("\n")[0]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Outcome:
        """Return what :func:`dataclasses.asdict` was given."""
        content = dict(content)
        measured = content.pop("measured")
        kept = content.pop("kept")
        return cls(
            measured=None if measured is None else Answers(**measured),
            kept=float("nan") if kept is None else kept,
            **content,
        )


#: Of a file of :class:`CellStore`.
_CELL = record(
    {
        "key": text,
        "cell": mapping(anything),
        "outcome": record(
            {
                "parameters": integer(0),
                "kept": optional(number()),
                "zeros": optional(number()),
                "measured": optional(
                    record(
                        {
                            "losses": mapping(listed(optional(number()))),
                            "recalled": listed(boolean),
                            "preferred": listed(boolean),
                        }
                    )
                ),
                "seconds": mapping(number(0)),
                "plan": listed(mapping(plain)),
                "passes": integer(0),
                "error": text,
                "lasting": boolean,
            }
        ),
    }
)


class CellStore:
    """Outcomes of cells as JSON files, one a cell, each written whole as the cell ends.

    A file serves only the comparison that wrote it: it holds a key of the cell and of everything that it depends on.

    Args:
        folder: Of the files.
        context: Fingerprint of what all cells share: model, statistics, evaluation, versions.
    """

    def __init__(self, folder: Path, context: str) -> None:
        self.folder = folder
        self.context = context

    def key(self, cell: Cell) -> str:
        """Return the fingerprint of a cell and its context."""
        return fingerprint(self.context, asdict(cell))

    def path(self, cell: Cell) -> Path:
        """Return the file of a cell."""
        return self.folder / (re.sub(r"[^\w.]+", "-", cell.name) + ".json")

    def load(self, cell: Cell) -> Outcome | None:
        """Return the outcome of a cell that ended in the same context, unless it is worth another try."""
        path = self.path(cell)
        if not path.is_file():
            return None
        content = read_json(path, _CELL)
        if content.pop("key") != self.key(cell):
            return None
        outcome = Outcome.from_dict(content["outcome"])
        return outcome if outcome.lasting else None

    def save(self, cell: Cell, outcome: Outcome) -> None:
        """Write the outcome of a cell."""
        content = {"key": self.key(cell), "cell": asdict(cell), "outcome": asdict(outcome)}
        write_json(content, self.path(cell))


@dataclass(frozen=True)
class Built:
    """A model to measure in which a cell's layers are compressed, and what that took."""

    model: PreTrainedModel
    layers: Mapping[str, nn.Module]
    seconds: dict[str, float] = field(default_factory=dict)
    plan: list[dict[str, Any]] = field(default_factory=list)
    passes: int = 0


@dataclass
class _Factorized:
    """Factorisations that cells of one method and unit share, whatever their budgets.

    Attributes:
        key: Of those cells.
        layers: By name.
        seconds: What the last cell took that made any.
    """

    key: tuple[Any, ...] = ()
    layers: dict[str, Factorization] = field(default_factory=dict)
    seconds: float = 0.0

    def of(self, cell: Cell) -> _Factorized:
        """Forget what is not of this cell: all layers of two methods would be two models."""
        assert cell.setting is not None
        key = (cell.method, cell.passes, cell.methods, cell.setting.unit)
        if key != self.key:
            self.key, self.layers, self.seconds = key, {}, 0.0
        return self


class Comparison:
    """Runs cells on one model, one after the other, and leaves the model as it was after each.

    Args:
        calibration: The model, its layers, and where their statistics come from: they are asked for once, and only if
            a cell has to be run.
        methods: All solvers that cells may name, so that one pass serves them all.
    """

    def __init__(self, calibration: GatheredStatistics, methods: Sequence[str]) -> None:
        self.calibration = calibration
        self.model = calibration.model
        self.layers = calibration.layers
        self.methods = list(methods)
        self._factorized = _Factorized()

    @cached_property
    def moments(self) -> CalibrationMoments:
        """Of all layers, with what all methods need."""
        return self.calibration.moments(self.methods)

    def run(
        self, cells: Sequence[Cell], evaluation: Evaluation, store: CellStore, progress: Progress | None = None
    ) -> Iterator[tuple[Cell, Outcome, bool]]:
        """Measure cells in turn, those that ended before not again.

        Args:
            cells: What to measure.
            evaluation: With what.
            store: Of this evaluation.
            progress: Wraps the loop over a cell's layers.

        Yields:
            The cell, its outcome, and whether that was there before.
        """
        for cell in cells:
            outcome = store.load(cell)
            if found := outcome is not None:
                yield cell, outcome, found
                continue
            outcome = self.measure(cell, evaluation, progress)
            store.save(cell, outcome)
            yield cell, outcome, found

    def measure(self, cell: Cell, evaluation: Evaluation, progress: Progress | None = None) -> Outcome:
        """Build a cell, measure it, take it back; a failure is an outcome, too."""
        try:
            with self._built(cell, progress) as built:
                start = time.perf_counter()
                measured = evaluation.measure(built.model, self.calibration.tokenizer)
                seconds = {**built.seconds, "evaluate": time.perf_counter() - start}
                dense, compressed = layer_sizes(self._layers(cell)), layer_sizes(built.layers)
                return Outcome(
                    parameters=compressed.parameters,
                    kept=compressed.parameters / dense.parameters,
                    zeros=share_of_zeros(built.layers),
                    measured=measured,
                    seconds=seconds,
                    plan=built.plan,
                    passes=built.passes,
                )
        except Exception as error:  # whatever a method does must not end the comparison
            lasting = isinstance(error, LASTING)
            if not lasting:
                _log.exception("%s failed, and will be tried again by the next run.", cell.name)
            return Outcome(error=f"{type(error).__name__}: {error}", lasting=lasting)
        finally:
            return_freed_memory()

    def _batches(self) -> list[dict[str, Tensor]]:
        """Return the calibration windows for methods that read them themselves."""
        return [{"input_ids": ids.to(self.model.device)} for ids in self.calibration.windows.split(1)]

    def _measure(self, layers: dict[str, nn.Module], factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Return what low-rank layers lose on some of the calibration windows."""
        return measure_losses(self.model, layers, factors, evenly_spaced(self._batches()), _window_rows, causal_loss)

    def _layers(self, cell: Cell) -> dict[str, nn.Module]:
        return self.layers if cell.layers is None else {name: self.layers[name] for name in cell.layers}

    @contextmanager
    def _built(self, cell: Cell, progress: Progress | None) -> Iterator[Built]:
        layers = self._layers(cell)
        if cell.method == DENSE:
            yield Built(self.model, layers)
        elif cell.method in PRUNERS:
            yield self._pruned(cell, layers)
        else:
            with self._lowrank(cell, layers, progress) as built:
                yield built

    def _pruned(self, cell: Cell, layers: dict[str, nn.Module]) -> Built:
        """Prune a copy: what a pruner does to a model is not for us to undo."""
        from fasc_lightning.studies.pruning import prune_llm, prune_magnitude

        assert cell.budget is not None
        keep = budget_share(layers, cell.budget)
        model = copy.deepcopy(self.model)
        by_magnitude = cell.method == "magnitude"
        result = prune_magnitude(model, keep) if by_magnitude else prune_llm(model, self._batches(), keep)
        pruned = {name: model.get_submodule(name) for name in layers}
        return Built(model, pruned, {"prune": result.seconds}, passes=result.passes)

    @contextmanager
    def _lowrank(self, cell: Cell, layers: dict[str, nn.Module], progress: Progress | None) -> Iterator[Built]:
        """Swap low-rank layers in, and the very same dense modules back."""
        assert cell.budget is not None
        assert cell.setting is not None
        moments = self.moments
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
        ended = time.perf_counter()
        spent = ended - start
        if len(factorized.layers) > there:
            factorized.seconds = spent
        else:  # what an earlier cell did would have been this one's work
            spent += factorized.seconds
        plan = [{**asdict(layer), "shape": list(layer.shape)} for layer in result.layers]  # as JSON gives it back
        with undoing() as undo:
            undo.keep(self.model)
            dense = swap_modules(self.model, result.replacements)
            seconds = {"factorize": spent, "swap": time.perf_counter() - ended}
            if cell.refit and dense:
                report = refit(
                    self.model,
                    dense,
                    ByLayer(moments.G, dense),
                    self._batches(),
                    inputs=ByLayer(moments.A, dense),
                    progress=progress,
                )
                seconds["refit"] = report.seconds
            yield Built(self.model, {**layers, **result.replacements}, seconds, plan)


def _window_rows(batch: Mapping[str, Tensor]) -> TokenRows:
    return TokenRows("a window run again", scale=batch["input_ids"][:, 1:].numel())


def budget_share(layers: Mapping[str, nn.Module], budget: Budget) -> float:
    """Return the fraction of the layers' parameters that a budget is, for methods that know no ranks."""
    if budget.keep is not None:
        return budget.keep
    return sum(layer_budgets(dict(layers), budget.rank, None).values()) / layer_sizes(layers).parameters


def share_of_zeros(layers: Mapping[str, nn.Module]) -> float:
    """Return the share of exact zeros among the layers' parameters."""
    parameters = [p for layer in layers.values() for p in layer.parameters()]
    return sum(int((p == 0).sum()) for p in parameters) / max(1, sum(p.numel() for p in parameters))
