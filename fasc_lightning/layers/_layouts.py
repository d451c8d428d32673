"""Layouts of a rank-k matrix: their sizes, their measured times, and the choice of "auto".

The times are in ``break_even.csv`` beside this file: single linear layers of the shapes of language models, over dense
layers of the same shape, on a few threads of a CPU (``benchmarks/break_even.py`` makes the table). Other devices and
sizes have other times. So "auto" decides by size, and uses the times only if sizes hardly differ.
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

#: Shares of a dense layer's parameters, ascending, and the time of a layer with that share; a dense layer takes 1.
_Curve: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]


def factors_cost(m: int, n: int, k: int) -> int:
    """Return the count of numbers in two factors of a rank-k (m, n) matrix, k (m + n)."""
    return k * (m + n)


def pivot_cost(m: int, n: int, k: int) -> int:
    """Return the count of numbers in k rows (or columns) and the coefficients of the others, k (m + n - k)."""
    return k * (m + n - k)


def auto_cost(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> int:
    """Return the count of numbers in a rank-k (m, n) matrix under the layout of "auto"; m n if that is dense."""
    layout = auto_layout(m, n, k, dtype)
    return m * n if layout == "dense" else _COSTS[layout](m, n, k)


_COSTS = {"factors": factors_cost, "pivot": pivot_cost}


@cache  # an allocation asks for every rank of every layer
def auto_layout(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> Literal["pivot", "factors", "dense"]:
    """Return the layout that ``layout="auto"`` gives a rank-k (m, n) matrix.

    It is "pivot", which holds fewer numbers at every rank, with three exceptions:

    * "factors", if they are faster and one more rank in pivot storage would hold no less than this rank in factors,
      (k + 1)^2 <= m + n: a budget could then buy nothing with the numbers that pivots save.
    * "dense", if a dense layer is faster and the index of the pivots takes as many bytes as they save against it.
    * "dense", if the rank is full.

    So "auto" spends no parameters on speed. A layer stays pivoted even if the table says that a dense one, or factors
    with as many numbers and a lower rank, would be faster. ``layout="factors"`` is the other choice.

    Args:
        m: Outputs.
        n: Inputs.
        k: Rank, at least 1.
        dtype: Dtype of the layer.
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
    """Return the time of a rank-k layer over the time of a dense layer, as measured on a CPU.

    It is the geometric mean over prefilling and decoding for the nearest shape in the table, interpolated to the share
    of the dense layer's parameters that the rank keeps. Shares outside of the table get the time at its edge.

    Args:
        m: Outputs.
        n: Inputs.
        k: Rank.
        layout: Layout of the matrix.
        dtype: Dtype of the layer: float32, or a 16-bit dtype, all with the times of bfloat16.

    Returns:
        The ratio; NaN if no shape was measured within a factor of two in outputs and inputs.
    """
    curves = _curves(m, n, layout, dtype)
    if not curves:
        return math.nan
    kept = _COSTS[layout](m, n, k) / (m * n)
    return geometric_mean(float(np.interp(kept, *curve)) for curve in curves)


@cache
def _curves(m: int, n: int, layout: str, dtype: torch.dtype) -> tuple[_Curve, ...]:
    """Return the curve of each number of tokens for the nearest shape; none if it is far away."""
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
