"""How a matrix of rank k can be stored: what it costs, how fast it is, and what "auto" makes of both.

The times are measured ones, beside this file in ``break_even.csv``: single linear layers of the shapes of language
models against dense ones of the same shape, on a few threads of a CPU (``benchmarks/break_even.py`` makes the table).
Other devices and other sizes have other times. "auto" therefore leaves little to them: the layouts' sizes decide, and
times only where sizes hardly differ.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import geometric_mean
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Layout = Literal["auto", "pivot", "factors"]

#: A layout that a layer can have.
Stored = Literal["pivot", "factors"]

#: The table of measured times.
BREAK_EVEN = Path(__file__).with_name("break_even.csv")

#: Shares of a dense layer's parameters, ascending, and the time of a layer that keeps them, dense layers taking 1.
_Curve: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]


def factors_cost(m: int, n: int, k: int) -> int:
    """Numbers that two factors of a rank-k (m, n) matrix hold: k (m + n)."""
    return k * (m + n)


def pivot_cost(m: int, n: int, k: int) -> int:
    """Numbers that k rows (or columns) and the coefficients of the others hold: k (m + n - k)."""
    return k * (m + n - k)


def auto_cost(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> int:
    """Numbers that a rank-k (m, n) matrix holds in the layout that "auto" takes; m n where that is dense."""
    layout = auto_layout(m, n, k, dtype)
    return m * n if layout == "dense" else _COSTS[layout](m, n, k)


_COSTS = {"factors": factors_cost, "pivot": pivot_cost}


@cache  # an allocation asks for every rank of every layer
def auto_layout(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> Literal["pivot", "factors", "dense"]:
    """Return the layout that ``layout="auto"`` takes for a rank-k (m, n) matrix.

    Pivot storage, which holds fewer numbers at every rank, unless

    * one more rank in pivot storage would hold no less than this one in two factors, (k + 1)^2 <= m + n, and factors
      are faster: a budget could buy nothing with what the pivots save; or
    * the index of the pivots takes as many bytes as they save against a dense layer, and a dense layer is faster; or
    * the rank is full, for which only "dense" is left.

    So "auto" spends no parameters on speed: a layer that is slower than a dense one, as the table says of small ones,
    or than two factors of as many numbers and less rank, stays pivoted. ``layout="factors"`` is the other choice.

    Args:
        m: Outputs.
        n: Inputs.
        k: Rank, at least 1.
        dtype: Of the layer.
    """
    if k >= min(m, n):
        return "dense"
    if (k + 1) ** 2 <= m + n and relative_time(m, n, k, "factors", dtype) < relative_time(m, n, k, "pivot", dtype):
        return "factors"
    saved = (m * n - pivot_cost(m, n, k)) * dtype.itemsize
    index = min(m, n) * torch.int32.itemsize
    if saved <= index and relative_time(m, n, k, "pivot", dtype) >= 1:
        return "dense"
    return "pivot"


def relative_time(m: int, n: int, k: int, layout: Stored, dtype: torch.dtype = torch.float32) -> float:
    """Return the time of a rank-k layer over that of a dense one, as measured on a CPU.

    The geometric mean over prefilling and decoding, of the nearest shape in the table, interpolated to the share of the
    dense layer's parameters that the rank keeps; shares outside of the table have the time of its edge.

    Args:
        m: Outputs.
        n: Inputs.
        k: Rank.
        layout: How the matrix is stored.
        dtype: Of the layer: float32, or the times of bfloat16 for all types of 16 bits.

    Returns:
        The ratio; NaN where no shape was measured within a factor of two in outputs and inputs.
    """
    curves = _curves(m, n, layout, dtype)
    if not curves:
        return math.nan
    kept = _COSTS[layout](m, n, k) / (m * n)
    return geometric_mean(float(np.interp(kept, *curve)) for curve in curves)


@cache
def _curves(m: int, n: int, layout: str, dtype: torch.dtype) -> tuple[_Curve, ...]:
    """Return the curve of each number of tokens, for the nearest shape; none if it is far."""
    table = _table()["bfloat16" if dtype.itemsize < 4 else "float32", layout]

    def distances(shape: tuple[int, int]) -> tuple[float, float]:
        return abs(math.log2(shape[0] / m)), abs(math.log2(shape[1] / n))

    nearest = min(table, key=lambda shape: math.hypot(*distances(shape)))
    return tuple(table[nearest]) if max(distances(nearest)) <= 1 else ()


@cache
def _table() -> dict[tuple[str, str], dict[tuple[int, int], list[_Curve]]]:
    """Return curves by dtype and layout, then by shape."""
    points: dict[tuple[str, str], dict[tuple[int, int], dict[int, list[tuple[float, float]]]]] = {}
    for dtype, layout, m, n, tokens, kept, time in _rows():
        shapes = points.setdefault((dtype, layout), {})
        shapes.setdefault((m, n), {}).setdefault(tokens, []).append((kept, time))
    return {
        kind: {shape: [_curve(curve) for curve in by_tokens.values()] for shape, by_tokens in shapes.items()}
        for kind, shapes in points.items()
    }


def _curve(points: list[tuple[float, float]]) -> _Curve:
    kept, times = np.array(sorted(points)).T
    return kept, times


def _rows() -> Iterator[tuple[str, str, int, int, int, float, float]]:
    with BREAK_EVEN.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield (
                row["dtype"],
                row["layout"],
                int(row["m"]),
                int(row["n"]),
                int(row["tokens"]),
                float(row["kept"]),
                float(row["time"]),
            )
