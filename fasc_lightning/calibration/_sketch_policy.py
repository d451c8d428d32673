"""Choice, sizes and descriptions of the sketches of a model's second moments."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from fasc_lightning.layers import resolve_rank
from fasc_lightning.options import SketchOptions
from fasc_lightning.statistics import LayerSketches, Projection, Sketch


def expected_rank(m: int, n: int, rank: float | None, keep: float | None) -> int:
    """Return the rank of a layer if every layer gets the same share, before any allocation.

    Args:
        m: Outputs.
        n: Inputs.
        rank: Fraction of full rank (float) or absolute rank (int), or None.
        keep: Fraction of parameters, k (m + n - k) <= keep m n, if there is no rank.
    """
    if keep is None:
        assert rank is not None
        return min(resolve_rank(m, n, rank), m, n)
    total = m + n
    return max(1, math.floor((total - math.sqrt(total**2 - 4 * keep * m * n)) / 2))


def auto_size(d: int, k: int, rho: float | None = None, threshold: float = 0.3) -> int:
    """Return the paper's size of a sketch: 2k up to the threshold of rho, 4k above, at most d / 2 (Appendix C).

    A layer with unknown rho counts as above. The paper caps 4k only. Here 2k is capped, too, because an exact moment is
    hardly larger than a sketch of half its width.

    Args:
        d: Width of the moment.
        k: Expected rank of the layer.
        rho: Dependence score of the layer, in [0, 1]; None if unknown.
        threshold: rho above which the size doubles.
    """
    low = rho is not None and rho <= threshold
    return min((2 if low else 4) * k, d // 2)


def choose_sketches(
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    options: SketchOptions,
    rho: Mapping[str, float] | None = None,
) -> dict[str, LayerSketches]:
    """Return the sketches of each layer's two sides; layers that stay exact are left out.

    Kind "projected" projects the wider side of every layer that has one. The other kinds sketch a side if it is wider
    than ``options.above`` and the sketch is clearly smaller than the exact moment
    (:attr:`~fasc_lightning.statistics.Sketch.is_worthwhile`). Inputs of one width get one size, the largest that a
    layer asks for. The reason: layers that share an input share its moment, but sharing shows only when a batch runs.

    Args:
        shapes: (m, n) of each layer by name.
        ranks: Expected rank of each layer (:func:`expected_rank`).
        options: Kind and size of the sketches.
        rho: Known dependence scores by layer.

    Raises:
        ValueError: If an absolute size is too large for every side above ``options.above``.
    """
    if options.kind == "projected":
        return {name: projected(m, n) for name, (m, n) in shapes.items() if m != n}
    rho, kind = rho or {}, options.kind

    def size(name: str, d: int) -> int:
        if options.size == "auto":
            return auto_size(d, ranks[name], rho.get(name), options.threshold)
        return options.size

    def sketch(d: int, s: int) -> Sketch | None:
        if d <= options.above or not 1 <= s < d:
            return None
        made = Sketch(d, s, options.seed, kind)
        return made if made.is_worthwhile else None

    inputs: dict[int, int] = {}
    for name, (_, n) in shapes.items():
        inputs[n] = max(inputs.get(n, 0), size(name, n))
    chosen = {name: LayerSketches(sketch(n, inputs[n]), sketch(m, size(name, m))) for name, (m, n) in shapes.items()}
    chosen = {name: sides for name, sides in chosen.items() if sides != LayerSketches()}
    widest = max(max(shape) for shape in shapes.values())
    if options.size != "auto" and widest > options.above and not chosen:
        raise ValueError(
            f"Expected a `sketch_size` that saves memory for some side wider than {options.above} (the widest is "
            f'{widest}) but got {options.size}. Take less than half the width, "auto", or leave the moments exact.'
        )
    return chosen


def projected(m: int, n: int) -> LayerSketches:
    """Return the projection of a layer's wider side as the weight sees it; the sides have to differ in width."""
    if m > n:
        return LayerSketches(outputs=Projection(m, n))
    return LayerSketches(inputs=Projection(n, m))


def sketches_for_budget(
    shapes: Mapping[str, tuple[int, int]],
    options: SketchOptions | None,
    rank: float | None,
    keep: float | None,
    rho: Mapping[str, float] | None = None,
) -> dict[str, LayerSketches]:
    """Return :func:`choose_sketches` for the expected ranks of a budget; empty without options.

    Args:
        shapes: (m, n) of each layer by name.
        options: Kind and size of the sketches; None for exact moments.
        rank: As in :func:`expected_rank`.
        keep: As in :func:`expected_rank`.
        rho: Known dependence scores by layer.
    """
    if options is None:
        return {}
    ranks = {name: expected_rank(m, n, rank, keep) for name, (m, n) in shapes.items()}
    return choose_sketches(shapes, ranks, options, rho)


def describe_sketches(
    shapes: Mapping[str, tuple[int, int]], chosen: Mapping[str, LayerSketches], options: SketchOptions
) -> tuple[str, str]:
    """Describe in words the sketched sides, and the wide sides that stay exact; each text is "" if there are none.

    Args:
        shapes: As in :func:`choose_sketches`.
        chosen: Sketches that :func:`choose_sketches` returned.
        options: As in :func:`choose_sketches`.
    """
    sketched: Counter[tuple[int, int]] = Counter()
    exact: dict[int, tuple[int, str]] = {}
    for name, (m, n) in shapes.items():
        sides = chosen.get(name, LayerSketches())
        for which, width, sketch in (("inputs", n, sides.inputs), ("outputs", m, sides.outputs)):
            if sketch is not None:
                sketched[width, sketch.size] += 1
            elif width > options.above and options.kind != "projected":
                count, first = exact.get(width, (0, f"the {which} of {name!r}"))
                exact[width] = count + 1, first
    parts = ", ".join(f"{count} of width {d} in {s} columns" for (d, s), count in sorted(sketched.items()))
    stay = ", ".join(f"{count} of width {d} ({first}{' ...' * (count > 1)})" for d, (count, first) in exact.items())
    size = "of the sizes that ranks ask for" if options.size == "auto" else f"sketch_size={options.size}"
    held = "sides held as the weight sees them" if options.kind == "projected" else "sketched sides"
    return (
        f"{held}: {parts}" if parts else "",
        f"moments that stay exact, since sketches ({size}) would not be clearly smaller: {stay}" if stay else "",
    )
