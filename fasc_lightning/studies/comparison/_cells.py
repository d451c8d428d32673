"""Cells of a comparison: one method under one budget, and its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from fasc_lightning.compression import Unit
from fasc_lightning.layers import Layout
from fasc_lightning.options import ALLOCATIONS, check_budget
from fasc_lightning.studies.comparison._questions import Answers

DENSE = "dense"

#: Methods that are not solvers: they have no ranks to allocate and no low-rank matrix to store.
PRUNERS = ("magnitude", "llm-pruner")

LAYOUTS = ("auto", "pivot", "factors")


@dataclass(frozen=True)
class Budget:
    """The budget of the targeted layers: a fraction of their parameters, or a rank (:class:`FascCallback`)."""

    keep: float | None = None
    rank: float | None = None

    def __post_init__(self) -> None:
        check_budget(self.rank, self.keep)

    def __str__(self) -> str:
        return f"rank {self.rank:g}" if self.keep is None else f"keep {self.keep:g}"


@dataclass(frozen=True)
class Setting:
    """The allocation of a budget over layers and the layout of a low-rank matrix, as "fisher-pivot"."""

    allocation: str
    layout: Layout

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Return the setting ALLOCATION-LAYOUT.

        Raises:
            ValueError: If the allocation or layout is unknown.
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
        """The unit of the losses over which a budget is spent; "fisher" compares between layers and solvers."""
        return "own" if self.allocation == "uniform" else "fisher"

    def __str__(self) -> str:
        return f"{self.allocation}-{self.layout}"


@dataclass(frozen=True)
class Cell:
    """One compression to measure.

    Attributes:
        method: A solver, a pruner, or "dense" for the unchanged model.
        budget: None for the dense model.
        setting: None for the dense model and for methods that have no ranks to allocate.
        refit: Whether the factors are refitted.
        kronecker_steps: Further steps towards gfwsvd's Kronecker factors; each is a pass over the data.
        label: The study's name of the cell; it tells apart cells of one method, budget and setting.
        layers: The layers to compress; None for all.
        methods: Solvers of single layers, as (layer, method).
    """

    method: str
    budget: Budget | None = None
    setting: Setting | None = None
    refit: bool = False
    kronecker_steps: int = 0
    label: str = ""
    layers: tuple[str, ...] | None = None
    methods: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The cell's name in messages and file names."""
        steps = f"{self.kronecker_steps} steps" if self.kronecker_steps else None
        parts = [self.method, steps, self.budget, self.setting, "refit" if self.refit else None, self.label or None]
        return " ".join(str(part) for part in parts if part is not None)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a cell.

    Attributes:
        parameters: Parameters of the cell's compressed layers.
        kept: These parameters as a share of the dense layers'.
        zeros: Share of the layers' weights that are zero and still stored.
        measured: The model's answers; None if the cell failed.
        seconds: Seconds of factorize, swap and evaluate, and of the method's other steps by their names.
        plan: The choice for each layer: name, rank, layout, loss.
        passes: Passes over the data for this cell alone.
        error: The reason of a failure; empty if it succeeded.
        lasting: Whether the same cell would fail again.
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
        """Return the outcome from its :func:`dataclasses.asdict`."""
        content = dict(content)
        measured = content.pop("measured")
        kept = content.pop("kept")
        return cls(
            measured=None if measured is None else Answers(**measured),
            kept=float("nan") if kept is None else kept,
            **content,
        )
