"""The figure of models by their bytes: a panel for each text and one for facts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fasc_lightning._utils import COLOURS, GREY, MARKERS, new_figure
from fasc_lightning.studies.comparison._bytes import Kind, kind_of, name_of
from fasc_lightning.studies.comparison._cells import Cell, Outcome
from fasc_lightning.studies.comparison._tables import metrics_of, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Perplexities are drawn as multiples of the dense model's, from LEAST to MOST, on a logarithmic axis of their excess
#: over 1. Multiples outside stand on the border. Models of this package raise MOST.
LEAST, MOST = 1.001, 100.0
TICKS = (1.001, 1.002, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
FEW_TICKS = (1.001, 1.003, 1.01, 1.03, 1.1, 1.3, 2.0, 4.0, 10.0, 30.0, 100.0, 1e3, 1e4, 1e6, 1e9, 1e12)

#: Ticks of the axis of bytes, in percent of 16 bits.
BYTES = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 80, 100)

#: The first two are the curves of this package.
STYLES: dict[Kind, dict[str, Any]] = {
    "one budget": {"color": COLOURS[0], "marker": "o", "linestyle": "-", "markersize": 6, "zorder": 5},
    "low rank": {"color": COLOURS[1], "marker": "s", "linestyle": "-", "markersize": 5, "zorder": 4},
    "low rank in int8": {"color": COLOURS[1], "marker": "s", "linestyle": ":", "markersize": 5, "fillstyle": "none"},
    "same bits": {"color": COLOURS[5], "marker": "o", "linestyle": ":", "markersize": 5, "fillstyle": "none"},
    "to the nearest": {"color": GREY, "marker": "x", "linestyle": "", "markersize": 6},
}
OTHER_COLOURS = tuple(colour for i, colour in enumerate(COLOURS) if i not in (0, 1, 5))
OTHER_MARKERS = tuple(marker for marker in MARKERS if marker not in ("o", "s"))
LABELS: dict[Kind, str] = {
    "one budget": "one budget (size)",
    "low rank": "low rank (keep)",
    "low rank in int8": "low rank in int8",
    "same bits": "same bits everywhere",
    "to the nearest": "rounded to the nearest",
}


def bytes_figure(dense: Outcome, outcomes: Mapping[Cell, Outcome], chance: float = math.nan) -> Figure:
    """Draw perplexities as multiples of the dense model's, and facts, against the bytes of the targeted layers.

    Models of this package are joined by the way they save bytes. A mark of another program's model has the name of its
    folder. Models whose names differ in the number at the end have one mark, without the number.

    Args:
        dense: Outcome of the dense model.
        outcomes: Outcomes of all other cells; failed ones are left out.
        chance: Percentage of facts by guessing.

    Raises:
        ValueError: If there is nothing to draw.
    """
    done = {cell: outcome for cell, outcome in outcomes.items() if outcome.measured is not None}
    if not done or dense.measured is None:
        raise ValueError("Expected the dense model and a compressed one or more but got none to draw.")
    metrics = [m for m in metrics_of(dense.measured) if m.scale == "perplexity" or m.name == "facts %"]
    figure = new_figure(2.3 + 3.6 * len(metrics), 5.0)
    lines = _lines(done)
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False).ravel(), metrics, strict=True):
        reference = metric.value(dense.measured)
        values = {c: metric.value(o.measured) for c, o in done.items() if o.measured is not None}
        if not metric.percent:
            values = {cell: ratio(value, reference) for cell, value in values.items()}
            most = max([MOST, *(value for cell, value in values.items() if kind_of(cell) != "another program")])
            _excess_axis(axes, values.values(), most)
            values = {cell: min(max(value, LEAST), most) - 1 for cell, value in values.items()}
        for label, (style, cells) in lines.items():
            axes.plot(
                [100 * done[cell].bytes / dense.bytes for cell in cells],
                [values[cell] for cell in cells],
                label=label,
                clip_on=False,
                **style,
            )
        if metric.percent:
            axes.axhline(reference, color="black", linewidth=0.9, label="dense")
            if not math.isnan(chance):
                axes.axhline(chance, color=GREY, linewidth=0.9, linestyle="--", label="guessing")
            axes.set_title("facts recalled (%)", fontsize=10)
        else:
            axes.set_title(f"{metric.name}, times dense", fontsize=10)
        _bytes_axis(axes, [100 * outcome.bytes / dense.bytes for outcome in done.values()])
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _lines(done: Mapping[Cell, Outcome]) -> dict[str, tuple[dict[str, Any], list[Cell]]]:
    """Return style and cells, by ascending bytes, of each label of the legend."""
    cells = sorted(done, key=lambda cell: done[cell].bytes)
    found: dict[str, tuple[dict[str, Any], list[Cell]]] = {}
    for kind, style in STYLES.items():
        if own := [cell for cell in cells if kind_of(cell) == kind]:
            found[LABELS[kind]] = ({"linewidth": 1.4, **style}, own)
    programs: dict[str, list[Cell]] = {}
    for cell in sorted(done, key=name_of):
        if kind_of(cell) == "another program":
            programs.setdefault(re.sub(r"(?<=.)[-_ ]\d+$", "", name_of(cell)), []).append(cell)
    count = len(OTHER_COLOURS)
    for i, (program, own) in enumerate(programs.items()):
        style = {
            "color": OTHER_COLOURS[i % count],
            "marker": OTHER_MARKERS[(i % count + i // count) % len(OTHER_MARKERS)],
            "linestyle": "",
            "markersize": 7,
            "markeredgecolor": "white",
            "markeredgewidth": 0.6,
            "zorder": 6,
        }
        found[program if len(own) > 1 else name_of(own[0])] = (style, own)
    return found


def _excess_axis(axes: Axes, ratios: Any, most: float) -> None:
    """Make the axis of perplexities logarithmic in what they exceed 1 by, with ticks that show the multiples."""
    drawn = [min(max(value, LEAST), most) for value in ratios]
    low, high = min(drawn) - 1, max(drawn) - 1
    axes.set_yscale("log")
    axes.set_ylim(low / 1.3, high * 1.3)
    ticks = FEW_TICKS if high > 3e4 * low else TICKS
    shown = [tick for tick in ticks if low / 1.3 <= tick - 1 <= high * 1.3]
    names = {LEAST: f"≤ {LEAST:g}" if low <= LEAST - 1 else f"{LEAST:g}", most: f"≥ {most:g}"}
    axes.set_yticks([tick - 1 for tick in shown], [names.get(tick, f"{tick:g}") for tick in shown])
    axes.minorticks_off()


def _bytes_axis(axes: Axes, shares: Sequence[float]) -> None:
    axes.set_xscale("log")
    low, high = min(shares) / 1.12, max(*shares, 80.0) * 1.12
    axes.set_xlim(low, high)
    ticks = [tick for tick in BYTES if low <= tick <= high]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("bytes of the layers, % of 16 bits", fontsize=9)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
