"""Which second moments of a model are sketched, how large the sketches are, and what is said of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from fasc_lightning.layers import resolve_rank
from fasc_lightning.options import SketchOptions
from fasc_lightning.statistics import LayerSketches, Projection, Sketch


def expected_rank(m: int, n: int, rank: float | None, keep: float | None) -> int:
    """Return the rank that a layer gets under a uniform treatment, before any allocation.

    Args:
        m: Outputs.
        n: Inputs.
        rank: Fraction of full rank (float) or absolute rank (int), or None.
        keep: Fraction of parameters, k (m + n - k) <= keep m n, where there is no rank.
    """
    if keep is None:
        assert rank is not None
        return min(resolve_rank(m, n, rank), m, n)
    total = m + n
    return max(1, math.floor((total - math.sqrt(total**2 - 4 * keep * m * n)) / 2))


def auto_size(d: int, k: int, rho: float | None = None, threshold: float = 0.3) -> int:
    """Return the paper's size of a sketch: 2k up to the threshold of rho, 4k above, at most d / 2 (Appendix C).

    A layer whose rho is not known yet counts as above. The paper caps 4k only; 2k is capped here as well, since an
    exact moment is hardly larger than a sketch of half its width.

    Args:
        d: Width of the moment.
        k: Rank that the layer is to have.
        rho: Dependence score of the layer, in [0, 1].
        threshold: Where the size doubles.
    """
    low = rho is not None and rho <= threshold
    return min((2 if low else 4) * k, d // 2)


def choose_sketches(
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    options: SketchOptions,
    rho: Mapping[str, float] | None = None,
) -> dict[str, LayerSketches]:
    """Return how each layer's second moments are sketched, side by side; layers that stay exact are left out.

    Of kind "projected", the wider side of every layer that has one. Else a side is sketched if it is wider than
    ``options.above`` and the sketch is clearly smaller than the exact moment
    (:attr:`~fasc_lightning.statistics.Sketch.is_worthwhile`). Inputs of one width get one size, the largest that a
    layer asks for: layers that share an input share its moment, and which do is known only once a batch has run.

    Args:
        shapes: (m, n) of each layer by name.
        ranks: Rank that each is to have (:func:`expected_rank`).
        options: What is to be sketched, and how.
        rho: Of the layers where it is known.

    Raises:
        ValueError: If an absolute size is too large for every side that it was meant for.
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
    """Return how a layer whose sides are of different widths is held as its weight sees the wider one."""
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
    """Return what :func:`choose_sketches` does with the ranks that a budget means; nothing without options.

    Args:
        shapes: (m, n) of each layer by name.
        options: What is to be sketched; None for exact moments.
        rank: See :func:`expected_rank`.
        keep: Likewise.
        rho: Of the layers where it is known.
    """
    if options is None:
        return {}
    ranks = {name: expected_rank(m, n, rank, keep) for name, (m, n) in shapes.items()}
    return choose_sketches(shapes, ranks, options, rho)


def describe_sketches(
    shapes: Mapping[str, tuple[int, int]], chosen: Mapping[str, LayerSketches], options: SketchOptions
) -> tuple[str, str]:
    """Return in words what is sketched, and which sides stay exact though they are wide enough; each "" if none.

    Args:
        shapes: As for :func:`choose_sketches`.
        chosen: What it returned.
        options: Likewise.
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
