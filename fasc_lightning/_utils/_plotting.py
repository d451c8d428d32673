"""Shared parts of figures: names of layers, edges of cells, colours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fasc_lightning._utils._layer_names import block_of
from fasc_lightning._utils._optional import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe and Ito 2008: colour-blind readers can tell them apart, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
GREY = "0.55"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of the given size in inches, which pyplot does not list as open.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    require("Figures need", "plot", "matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def block_index(layer: str) -> int | None:
    """Return the index of a layer's block; None outside of blocks."""
    block = block_of(layer)
    return None if block is None else block[1]


def module_kinds(layers: Iterable[str]) -> dict[str, str]:
    """Return the kind of each layer: the last part of its name, for example q_proj.

    If one block holds several layers with the same last part, the kind is the whole name after the block without
    numbers: attn.c_proj and mlp.c_proj, or experts.*.up_proj for all experts.
    """
    layers = list(layers)
    last = {layer: layer.rsplit(".", 1)[-1] for layer in layers}
    in_block = Counter((block_index(layer), last[layer]) for layer in layers)
    ambiguous = {kind for (_, kind), count in in_block.items() if count > 1}
    return {layer: _tail(layer) if last[layer] in ambiguous else last[layer] for layer in layers}


def _tail(layer: str) -> str:
    tail = re.sub(r"^.*?(?:^|\.)\d+\.", "", layer, count=1)
    return ".".join("*" if part.isdecimal() else part for part in tail.split("."))


def short_names(layers: Sequence[str]) -> list[str]:
    """Return names without the leading and trailing parts that all layers of blocks share; at least one part stays.

    Layers outside of blocks, such as lm_head, keep their names.
    """
    inside = [layer.split(".") for layer in layers if block_index(layer) is not None]
    most = min((len(parts) for parts in inside), default=1) - 1
    first = min(_shared(inside), most)
    last = min(_shared([parts[::-1] for parts in inside]), most - first)
    short = {".".join(parts): ".".join(parts[first : len(parts) - last]) for parts in inside}
    return [short.get(layer, layer) for layer in layers]


def _shared(parts: Iterable[Sequence[str]]) -> int:
    """Return the number of leading parts that are the same in all names."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))


def label_rows(layers: Sequence[str], most: int) -> list[int]:
    """Return the rows that get a label, at most ``most``: all of them, or the first rows of evenly spaced blocks."""
    rows = list(range(len(layers)))
    if len(rows) > most:
        blocks = [block_index(layer) for layer in layers]
        starts = [i for i in rows if i == 0 or blocks[i] != blocks[i - 1]]
        rows = starts if len(starts) > 1 else rows
    return rows[:: -(-len(rows) // most)] if rows else rows


def cell_edges(centres: Sequence[int]) -> NDArray[np.float64]:
    """Return the edges of cells around ascending values, half-way between neighbours, shape (len(centres) + 1,)."""
    values = np.asarray(centres, dtype=np.float64)
    if len(values) == 1:
        return np.array([values[0] - 0.5, values[0] + 0.5])
    middles = (values[1:] + values[:-1]) / 2
    return np.concatenate([[2 * values[0] - middles[0]], middles, [2 * values[-1] - middles[-1]]])


def spread_positions(blocks: Sequence[int]) -> NDArray[np.float64]:
    """Return ascending positions that set layers of one block side by side, within 0.35 of the block's index."""
    values, counts = np.unique(np.asarray(blocks, dtype=np.float64), return_counts=True)
    sides = [(np.arange(count) - (count - 1) / 2) * 0.7 / count for count in counts]
    return np.repeat(values, counts) + np.concatenate(sides)


def ticks_within(first: int, last: int) -> list[int]:
    """Return about six round whole numbers from ``first`` to ``last``, none outside of the observed range."""
    from matplotlib.ticker import MaxNLocator

    if first == last:
        return [first]
    ticks = MaxNLocator(nbins=6, integer=True, min_n_ticks=2).tick_values(first, last)
    return [int(tick) for tick in ticks if first <= tick <= last]


def over_layers(values: NDArray[np.float64], *quantiles: float) -> NDArray[np.float64]:
    """Return mean and quantiles over the layers with defined values, for each step.

    Args:
        values: Shape (layers, steps), NaN where undefined.
        quantiles: In [0, 1].

    Returns:
        Shape (1 + quantiles, steps), the mean first; NaN if no layer is defined at a step.
    """
    result = np.full((1 + len(quantiles), values.shape[1]), np.nan)
    some = ~np.isnan(values).all(axis=0)
    result[0, some] = np.nanmean(values[:, some], axis=0)
    result[1:, some] = np.nanquantile(values[:, some], quantiles, axis=0)
    return result
