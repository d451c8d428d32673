"""The report's row of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fasc_lightning.compression._budget import FLOAT_BYTES
from fasc_lightning.compression._build import LayerChoice
from fasc_lightning.compression._stored_weight import low_rank_bytes
from fasc_lightning.dependence import RhoRow
from fasc_lightning.layers import INT8_ROWS, Grid, form_from_plain, form_to_plain
from fasc_lightning.statistics import SketchFigures


@dataclass(frozen=True)
class LayerReport:
    """One targeted layer; ``rho``, ``rho_null`` and ``rho_debiased`` are NaN if they were not measured.

    ``method`` is the layer's solver, and ``flags`` say why its rho may mislead or is undefined. ``sketches`` holds the
    size and the estimated error of each sketched side, "inputs" and "outputs"; it is empty for exact moments.
    ``quantize`` tells how the calibration rounded the matrix ("int8" or a grid's bits, group and symmetry); it is None
    for a matrix in floating point.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    layout: str
    tokens: int
    rho: float
    rho_null: float
    rho_debiased: float
    loss: float
    method: str
    flags: tuple[str, ...] = ()
    sketches: dict[str, SketchFigures] = field(default_factory=dict)
    quantize: str | dict[str, Any] | None = None

    @property
    def bits(self) -> int | None:
        """Bits of a rounded number; None in floating point."""
        if isinstance(self.quantize, dict):
            return int(self.quantize["bits"])
        return None if self.quantize is None else 8

    @property
    def code(self) -> str:
        """Bits of the codes as "4", with the rank of a residual as "3+8"; "r57" for factors in int8; else empty."""
        if self.bits is None:
            return ""
        if self.layout == "residual":
            return f"{self.bits}+{self.rank}"
        return str(self.bits) if self.layout == "dense" else f"r{self.rank}"

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix; numbers in floating point have 16 bits."""
        m, n = self.shape
        if self.quantize is not None and self.layout in ("dense", "residual"):
            form = form_from_plain(self.quantize)
            matrix = (form if isinstance(form, Grid) else INT8_ROWS).nbytes(m, n)
            return matrix if self.layout == "dense" else matrix + low_rank_bytes(m, n, self.rank)
        if self.quantize is not None:
            return low_rank_bytes(m, n, self.rank)
        cost = {"dense": m * n, "factors": self.rank * (m + n), "pivot": self.rank * (m + n - self.rank)}[self.layout]
        return FLOAT_BYTES * cost

    @classmethod
    def of(cls, plan: LayerChoice, rho: RhoRow, flags: tuple[str, ...]) -> LayerReport:
        """Return the row of a layer from its choice, its rho and its flags."""
        return cls(
            name=plan.name,
            shape=plan.shape,
            rank=plan.rank,
            layout=plan.layout,
            tokens=plan.tokens,
            rho=rho["rho"],
            rho_null=rho["null"],
            rho_debiased=rho["debiased"],
            loss=plan.loss,
            method=plan.method,
            flags=flags,
            sketches=plan.sketches,
            quantize=None if plan.form is None else form_to_plain(plan.form),
        )


def _layer_report(row: Mapping[str, Any]) -> LayerReport:
    """Return a row as it was before JSON, which turns tuples into lists and NaN into None."""
    figures: dict[str, Any] = {name: float("nan") if value is None else value for name, value in row.items()}
    sketches = {
        side: SketchFigures(size=of["size"], error=float("nan") if of["error"] is None else of["error"])
        for side, of in row.get("sketches", {}).items()
    }
    known = {field.name for field in fields(LayerReport)}
    figures = {name: value for name, value in figures.items() if name in known}
    return LayerReport(**{**figures, "shape": tuple(row["shape"]), "flags": tuple(row["flags"]), "sketches": sketches})
