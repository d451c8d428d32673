"""Cells of a comparison: one method under one budget, and its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from fasc_lightning.compression import Unit
from fasc_lightning.layers import Layout
from fasc_lightning.options import CompressionOptions, Quantize, QuantizeWord, available_allocations
from fasc_lightning.studies.comparison._questions import Answers

DENSE = "dense"

#: The method of a model that another program compressed; its cell's label names the folder.
FOLDER = "folder"

#: Methods that are not solvers: they have no ranks to allocate and no low-rank matrix to store.
PRUNERS = ("magnitude", "llm-pruner")

#: What became of a refit whose last check put everything back.
PUT_BACK = "refit put back"

LAYOUTS = ("auto", "pivot", "factors")


@dataclass(frozen=True)
class Budget:
    """The budget of the targeted layers, as in :class:`FascCallback`: one of its four ways."""

    keep: float | None = None
    rank: float | None = None
    size: float | None = None
    quantize: QuantizeWord | Quantize | None = None

    def __post_init__(self) -> None:
        self.options  # noqa: B018 # refuses wrong budgets

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Return the budget of a size, as "0.27", or of bits, as "int4", "int4/32" or "nearest-int4".

        A number behind the slash is the inputs that share a scale. "nearest" rounds to the nearest numbers.

        Raises:
            ValueError: If it is none of them.
        """
        word, slash, group = text.removeprefix("nearest-").partition("/")
        words = [known for known in get_args(QuantizeWord) if known != "int8-dynamic"]
        try:
            if word not in words:
                return cls(size=float(text))
            if word == text:
                return cls(quantize=cast(QuantizeWord, word))
            bits = int(word.removeprefix("int"))
            rows = bits == 8 and not slash  # one symmetric scale for each output, as of "int8"
            form = Quantize(
                bits,
                int(group) if slash else None if rows else 64,
                symmetric=rows,
                rounding="nearest" if text.startswith("nearest-") else "calibrated",
            )
            return cls(quantize=form)
        except ValueError as error:
            raise ValueError(
                f"Expected a size as 0.27, or bits as {', '.join(words)}, int4/32 or nearest-int4, but got {text!r}: "
                f"{error}"
            ) from None

    @classmethod
    def parse_keep(cls, text: str) -> Budget:
        """Return the budget of a share of the parameters, as "0.8", or "0.8+int8" with its matrices in int8.

        Raises:
            ValueError: If it is none of them.
        """
        share, plus, word = text.partition("+")
        try:
            if plus and word != "int8":
                raise ValueError("only int8 rounds factors.")
            return cls(keep=float(share), quantize="int8" if plus else None)
        except ValueError as error:
            raise ValueError(f"Expected a share as 0.8, or 0.8+int8, but got {text!r}: {error}") from None

    @property
    def rounds_factors(self) -> bool:
        """Whether layers of low rank are rounded to int8 as the last step."""
        return self.keep is not None and self.quantize is not None

    @property
    def rounds_to_nearest(self) -> bool:
        """Whether numbers are rounded without the calibration."""
        return isinstance(self.quantize, Quantize) and self.quantize.rounding == "nearest"

    @property
    def options(self) -> CompressionOptions:
        """The budget as options of a compression."""
        return CompressionOptions(self.rank, self.keep, size=self.size, quantize=self.quantize)

    def __str__(self) -> str:
        if self.size is not None:
            return f"size {self.size:g}"
        if isinstance(self.quantize, Quantize):
            form = self.quantize
            group = "" if form.group is None else f" groups of {form.group}"
            nearest = " to the nearest" if self.rounds_to_nearest else ""
            return f"int{form.bits}{group}{' symmetric' if form.symmetric and form.group else ''}{nearest}"
        if self.quantize is not None and self.keep is None:
            return self.quantize
        if self.keep is not None:
            return f"keep {self.keep:g}{', int8' if self.rounds_factors else ''}"
        return f"rank {self.rank:g}"


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
        if allocation not in available_allocations() or layout not in LAYOUTS:
            raise ValueError(
                f"Expected a setting ALLOCATION-LAYOUT of {', '.join(available_allocations())} and "
                f"{', '.join(LAYOUTS)}, as uniform-factors or fisher-pivot, but got {text!r}."
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
        label = Path(self.label).name if self.method == FOLDER else self.label
        parts = [self.method, steps, self.budget, self.setting, "refit" if self.refit else None, label or None]
        return " ".join(str(part) for part in parts if part is not None)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a cell.

    Attributes:
        parameters: Parameters of the cell's compressed layers.
        kept: These parameters as a share of the dense layers'.
        bytes: Bytes of the cell's compressed layers, numbers in floating point in 16 bits.
        zeros: Share of the layers' weights that are zero and still stored.
        measured: The model's answers; None if the cell failed.
        seconds: Seconds of factorize, swap and evaluate, and of the method's other steps by their names.
        plan: The choice for each layer: name, rank, layout, loss.
        passes: Passes over the data for this cell alone.
        refit: Figures of the refit, as ``refit_figures`` returns them; None without a refit.
        error: The reason of a failure; empty if it succeeded.
        lasting: Whether the same cell would fail again.
    """

    parameters: int = 0
    kept: float = float("nan")
    bytes: int = 0
    zeros: float = 0.0
    measured: Answers | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    plan: list[dict[str, Any]] = field(default_factory=list)
    passes: int = 0
    refit: dict[str, Any] | None = None
    error: str = ""
    lasting: bool = True

    @property
    def reason(self) -> str:
        """The first line of the error."""
        return self.error.partition("\n")[0]

    @property
    def refit_verdict(self) -> str:
        """What became of the refit, in words; empty without a refit."""
        if self.refit is None:
            return ""
        return PUT_BACK if self.refit["reverted"] else f"refit of {self.refit['layers']} layers"

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
