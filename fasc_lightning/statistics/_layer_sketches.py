"""Sketches and projections of the two second moments of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fasc_lightning.statistics._projected import Projection
from fasc_lightning.statistics._reduction import Reduction


@dataclass(frozen=True)
class LayerSketches:
    """Sketches or projections of one layer's second moments; None for an exact one.

    Attributes:
        inputs: Sketch of width n. Layers that may share an input tensor need the same one.
        outputs: Sketch of width m.
    """

    inputs: Reduction | None = None
    outputs: Reduction | None = None

    @property
    def projects(self) -> Literal["inputs", "outputs"] | None:
        """The side that is projected through the weight, if one is."""
        if isinstance(self.inputs, Projection):
            return "inputs"
        return "outputs" if isinstance(self.outputs, Projection) else None


def check_sketches(shapes: Mapping[str, tuple[int, int]], sketches: Mapping[str, LayerSketches], shared: bool) -> None:
    """Refuse sketches of other layers or widths, and different sketches of inputs that may share one moment."""
    if shared and (names := [name for name, sides in sketches.items() if sides.projects]):
        raise ValueError(
            f"Expected `needs` of nothing but 'coupled' with projected moments (layer {names[0]!r} has one): a shared "
            "input cannot be projected through the weight of every layer that shares it."
        )
    widths: dict[int, tuple[str, Reduction | None]] = {}
    for name in sketches:
        if name not in shapes:
            raise ValueError(f"Expected sketches of tapped layers but {name!r} is none of the {len(shapes)}.")
    for name, (m, n) in shapes.items():
        sketch = sketches.get(name, LayerSketches())
        for side, width in ((sketch.inputs, n), (sketch.outputs, m)):
            if side is not None and side.features != width:
                raise ValueError(
                    f"Expected a sketch of width {width} for layer {name!r} of shape {(m, n)} but got {side.features}."
                )
        other, first = widths.setdefault(n, (name, sketch.inputs))
        if shared and first != sketch.inputs:
            raise ValueError(
                f"Expected one sketch for all inputs of width {n}, since layers may share an input tensor; but "
                f"{other!r} has {first} and {name!r} {sketch.inputs}. Give both the larger one."
            )
