"""The picture of a compression: what each layer got of the budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fasc_lightning._utils import block_index, module_kinds, new_figure, ticks_within
from fasc_lightning.compression._layer_report import LayerReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def allocation_figure(layers: Sequence[LayerReport]) -> Figure:
    """Draw a cell for each layer, blocks from left to right: its bits a weight, over all numbers that it stores.

    Scales, zero points and all factors count, so 16 is a dense layer in 16 bits. A rounded layer's cell also shows the
    bits of its codes, as "3+8" with a residual of rank 8, or "r64" for factors of rank 64 in int8. Layers outside of
    blocks, and experts, have one cell of their mean for each kind and block.

    Args:
        layers: ``report.layers``.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there are no layers.
    """
    if not layers:
        raise ValueError("Expected the layers of a report but got none.")
    kinds = module_kinds(layer.name for layer in layers)
    names = list(dict.fromkeys(kinds.values()))
    blocks = sorted({block_index(layer.name) or 0 for layer in layers})
    cells: dict[tuple[int, int], list[LayerReport]] = {}
    for layer in layers:
        place = names.index(kinds[layer.name]), blocks.index(block_index(layer.name) or 0)
        cells.setdefault(place, []).append(layer)
    bits = np.full((len(names), len(blocks)), np.nan)
    for place, group in cells.items():
        weights = sum(m * n for m, n in (layer.shape for layer in group))
        bits[place] = 8 * sum(layer.nbytes for layer in group) / weights

    figure = new_figure(2.2 + 0.3 * len(blocks), 1.4 + 0.34 * len(names))
    axes = figure.add_subplot()
    image = axes.imshow(bits, aspect="auto", cmap="viridis", vmin=0, vmax=max(8.0, float(np.nanmax(bits))))
    for (row, column), group in cells.items():
        codes = {layer.code for layer in group}
        if len(codes) == 1 and (code := codes.pop()):
            dark, size = bits[row, column] < 0.6 * image.get_clim()[1], 7 if len(code) < 3 else 5
            axes.text(column, row, code, ha="center", va="center", fontsize=size, color="white" if dark else "black")
    axes.set_yticks(range(len(names)), names)
    shown = ticks_within(blocks[0], blocks[-1])
    axes.set_xticks([blocks.index(block) for block in shown if block in blocks], [str(b) for b in shown if b in blocks])
    axes.set_xlabel("block")
    figure.colorbar(image, label="bits a weight")
    return figure
