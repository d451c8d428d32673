"""The precision and the memory of moments."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import torch
from torch import nn

from fasc_lightning.statistics._layer_moments import check_needs
from fasc_lightning.statistics._layer_sketches import LayerSketches
from fasc_lightning.statistics._reduction import second_moment_size


def moment_dtype(layers: Iterable[nn.Module]) -> torch.dtype:
    """Return float64 if a layer computes in it, else float32."""
    double = any(p.dtype == torch.float64 for module in layers for p in module.parameters())
    return torch.float64 if double else torch.float32


def moments_bytes(
    shapes: Iterable[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    needs: Iterable[str] = frozenset(),
    sketches: Iterable[LayerSketches] | None = None,
) -> int:
    """Return an upper bound of the memory of moments, in bytes.

    Only a batch shows which layers share an input, so each layer's A counts on its own.

    Args:
        shapes: (m, n) of each tapped layer.
        dtype: Dtype of the sums.
        needs: Statistics to gather besides the means.
        sketches: Sketches of each layer in turn; all moments are exact by default.
    """
    needs = check_needs(needs)
    numbers = 0
    for (m, n), sketch in zip(shapes, repeat(LayerSketches()) if sketches is None else sketches, strict=False):
        second = second_moment_size(m, None) + second_moment_size(n, None)
        reduced = second_moment_size(m, sketch.outputs) + second_moment_size(n, sketch.inputs)
        numbers += reduced * len(needs & {"plain", "coupled"}) + m + n
        numbers += 2 if "coupled" in needs else 0
        numbers += 2 if "plain" not in needs else 0
        numbers += m * n if "C" in needs else 0
        numbers += n if "abs_x" in needs else 0
        numbers += second_moment_size(n, None) + n if "saliency" in needs else 0
        numbers += m if needs & {"fisher_rows", "kronecker"} else 0
        numbers += second if "kronecker" in needs else 0
    return numbers * dtype.itemsize
