"""Estimated errors of a layer's sketched moments."""

from __future__ import annotations

import math
from typing import TypedDict

from torch import Tensor

from fasc_lightning.statistics._layer_moments import LayerMoments
from fasc_lightning.statistics._layer_sketches import LayerSketches


class SketchFigures(TypedDict):
    """Size and error of one sketched side, for reports.

    Attributes:
        size: Columns of the sketch.
        error: Estimated |A - S|_F / |A|_F of the rebuilt moment S, the larger one if there are a plain and a coupled
            moment; NaN if unknown.
    """

    size: int
    error: float


def sketch_figures(sketches: LayerSketches, moments: LayerMoments) -> dict[str, SketchFigures]:
    """Return the figures of a layer's sketched sides, "inputs" and "outputs".

    Args:
        sketches: Sketches of the layer.
        moments: Moments that the solver read.
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
