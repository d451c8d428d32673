"""What sketching the moments of a layer lost."""

from __future__ import annotations

import math
from typing import TypedDict

from torch import Tensor

from fasc_lightning.statistics._layer_moments import LayerMoments
from fasc_lightning.statistics._layer_sketches import LayerSketches


class SketchFigures(TypedDict):
    """What a report says of one sketched side.

    Attributes:
        size: Columns.
        error: Estimated |A - S|_F / |A|_F of the rebuilt moment S, the largest where there are a plain and a coupled
            one; NaN where it cannot be told.
    """

    size: int
    error: float


def sketch_figures(sketches: LayerSketches, moments: LayerMoments) -> dict[str, SketchFigures]:
    """Return the figures of a layer's sketched sides, "inputs" and "outputs".

    Args:
        sketches: Of the layer.
        moments: Its moments, as the solver was given them.
    """
    pairs = [moments.plain_moments(), *([moments.coupled_moments()] if moments.is_coupled else [])]
    figures: dict[str, SketchFigures] = {}
    for side, sketch, found in zip(
        ("inputs", "outputs"), (sketches.inputs, sketches.outputs), zip(*pairs, strict=True), strict=True
    ):
        if sketch is not None:
            errors = [math.nan if isinstance(S, Tensor) else S.error for S in found]
            figures[side] = SketchFigures(
                size=sketch.size, error=math.nan if any(map(math.isnan, errors)) else max(errors)
            )
    return figures
