"""Figures of a comparison; each function returns a matplotlib Figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fasc_lightning._utils import COLOURS, DASHES, GREY, MARKERS, block_index, module_kinds, new_figure, ticks_within
from fasc_lightning.dependence import counted
from fasc_lightning.studies.comparison._cells import Budget, Cell, Outcome
from fasc_lightning.studies.comparison._tables import UNRANKED, Metric, kind_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Share of the layers within the colour scale; larger changes have the last colour.
COLOURED = 0.98


def budget_figure(
    dense: Outcome,
    outcomes: Mapping[Cell, Outcome],
    metrics: Sequence[Metric],
    chance: Mapping[str, float] | None = None,
) -> Figure:
    """Draw metrics against the share of parameters kept, with a panel per metric and a line per method and setting.

    Colour and marker show the method, dashes the setting. Methods that only write zeros are grey and stand at the share
    of nonzero weights. Perplexities are on a logarithmic axis.

    Args:
        dense: Outcome of the dense model.
        outcomes: Outcomes of all cells; failed cells are counted in the title.
        metrics: The metrics to draw.
        chance: Percentage by guessing, by the name of the metric.

    Raises:
        ValueError: If there is nothing to draw.
    """
    done = {cell: outcome for cell, outcome in outcomes.items() if outcome.measured is not None}
    if not metrics or dense.measured is None:
        raise ValueError("Expected a metric to draw and a measured dense model.")
    figure = new_figure(1.8 + 4.2 * len(metrics), 4.4)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # after new_figure

    panels = figure.subplots(1, len(metrics), squeeze=False).ravel()
    styles = method_styles(list(dict.fromkeys(cell.method for cell in outcomes)))
    settings = list(dict.fromkeys(str(cell.setting or "") for cell in outcomes))
    lines: dict[str, list[Cell]] = {}
    for cell in done:
        lines.setdefault(_line_name(cell), []).append(cell)
    for axes, metric in zip(panels, metrics, strict=True):
        for name, members in lines.items():
            cells = sorted(members, key=lambda cell: _position(cell, done[cell]))
            first = cells[0]
            axes.plot(
                [100 * _position(cell, done[cell]) for cell in cells],
                [metric.value(m) for cell in cells if (m := done[cell].measured) is not None],
                linestyle=DASHES[settings.index(str(first.setting or "")) % len(DASHES)],
                markersize=5,
                linewidth=1.3,
                label=name,
                **styles[first.method],
            )
        axes.axhline(metric.value(dense.measured), color="black", linewidth=0.9, label="dense")
        if chance is not None and metric.name in chance:
            axes.axhline(chance[metric.name], color=GREY, linewidth=0.9, linestyle=":", label="chance")
        if not metric.percent:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1e4 * low else (1.0,)))
            axes.yaxis.set_major_formatter(
                FuncFormatter(lambda value, _: f"{value:g}" if value < 1e6 else f"{value:.0e}")
            )
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(metric.name, fontsize=10)
        axes.set_xlabel("parameters of the targeted layers kept (%)", fontsize=9)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8, frameon=False)
    if len(done) < len(outcomes):
        figure.suptitle(f"{len(outcomes) - len(done)} of {counted(len(outcomes), 'cell')} failed", fontsize=9)
    return figure


def method_styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return colour and marker of each method; methods that only write zeros are grey."""
    return {
        method: {
            "color": GREY if method in UNRANKED else COLOURS[i % len(COLOURS)],
            "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
        }
        for i, method in enumerate(methods)
    }


def _position(cell: Cell, outcome: Outcome) -> float:
    return 1 - outcome.zeros if cell.method in UNRANKED else outcome.kept


def _line_name(cell: Cell) -> str:
    name = cell.method + (", refit" if cell.refit else "")
    if cell.method in UNRANKED:
        return f"{name} (zeros, still stored)"
    return f"{name}, {cell.setting}" if cell.setting else name


def kinds_figure(
    dense: Outcome, outcomes: Mapping[Cell, Outcome], budgets: Sequence[Budget], kinds: Sequence[str]
) -> Figure:
    """Draw recall by kind of relation, with a panel per budget and setting (FASC, Table 6, as bars).

    Args:
        dense: Outcome of the dense model: black lines across the bars of a kind.
        outcomes: Outcomes of all cells.
        budgets: The budgets, one row of panels each.
        kinds: Kind of each fact.

    Raises:
        ValueError: If there are no facts.
    """
    if not kinds or dense.measured is None:
        raise ValueError("Expected facts, and a dense model that was asked for them.")
    metrics = kind_metrics(kinds)
    settings = list(dict.fromkeys(str(cell.setting) for cell in outcomes if cell.setting is not None)) or [""]
    methods = list(dict.fromkeys(cell.method for cell in outcomes))
    styles = method_styles(methods)
    figure = new_figure(
        2.0 + max(4.0, 0.12 * len(metrics) * (len(methods) + 1)) * len(settings), 0.8 + 2.3 * len(budgets)
    )
    panels = figure.subplots(len(budgets), len(settings), sharex=True, sharey=True, squeeze=False)
    width = 0.84 / len(methods)
    reference = [metric.value(dense.measured) for metric in metrics]
    places = np.arange(len(metrics))
    for row, budget in zip(panels, budgets, strict=True):
        for axes, setting in zip(row, settings, strict=True):
            for cell, outcome in outcomes.items():
                if cell.budget != budget or str(cell.setting or setting) != setting or outcome.measured is None:
                    continue
                offset = (methods.index(cell.method) - (len(methods) - 1) / 2) * width
                bars = [metric.value(outcome.measured) for metric in metrics]
                hatch = "///" if methods.index(cell.method) >= len(COLOURS) else None
                style: dict[str, Any] = {"color": styles[cell.method]["color"], "hatch": hatch, "edgecolor": "white"}
                axes.bar(places + offset, bars, width, label=cell.method, linewidth=0.4, **style)
            axes.hlines(reference, places - 0.45, places + 0.45, color="black", linewidth=1.1, label="dense")
            axes.set_title(f"{budget}, {setting}" if setting else str(budget), fontsize=9)
            axes.tick_params(labelsize=8)
            axes.set_axisbelow(True)
            axes.grid(axis="y", color="0.92")
        row[0].set_ylabel("facts recalled (%)", fontsize=9)
    for axes in panels[-1]:
        axes.set_xticks(places, [metric.name.replace(" (", "\n(") for metric in metrics])
    handles = {
        label: handle
        for axes in panels.ravel()
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def sensitivity_figure(by_method: Mapping[str, Mapping[str, float]], label: str, title: str) -> Figure:
    """Draw the change from compressing one layer alone, blocks by kinds of layer, a panel per method (FASC, Fig. 2).

    Args:
        by_method: The change by layer for each method; NaN if the cell failed. Layers outside blocks are drawn at 0.
        label: Label of the change.
        title: Title of the figure.

    Raises:
        ValueError: If there are no layers.
    """
    layers = list(dict.fromkeys(layer for changes in by_method.values() for layer in changes))
    if not layers:
        raise ValueError("Expected the change of a layer or more but got none.")
    kind_of = module_kinds(layers)
    kinds = list(dict.fromkeys(kind_of.values()))
    last = max(block_index(layer) or 0 for layer in layers)
    figure = new_figure(max(6.0, 2.4 + 0.24 * (last + 1)), 0.9 + (0.5 + 0.26 * len(kinds)) * len(by_method))
    from matplotlib.cm import ScalarMappable  # after new_figure, whose error says what to install
    from matplotlib.colors import Normalize

    panels = figure.subplots(len(by_method), 1, sharex=True, squeeze=False).ravel()
    grids = {method: _grid(changes, kind_of, kinds, last + 1) for method, changes in by_method.items()}
    finite = np.concatenate([grid[np.isfinite(grid)] for grid in grids.values()] + [np.zeros(1)])
    # One scale for all panels, signed if changes go both ways. It is clipped because a few layers are far beyond the
    # rest.
    signed = bool(finite.min() < 0 < finite.max())
    low, high = np.quantile(np.abs(finite) if signed else finite, [1 - COLOURED, COLOURED]).tolist()
    low = -high if signed else min(low, 0.0)
    colours = ScalarMappable(Normalize(low, high if high > low else low + 1), "RdBu_r" if signed else "viridis")
    for axes, (method, grid) in zip(panels, grids.items(), strict=True):
        axes.pcolormesh(
            np.arange(last + 2) - 0.5,
            np.arange(len(kinds) + 1) - 0.5,
            np.ma.masked_invalid(grid),
            cmap=colours.cmap,
            norm=colours.norm,
        )
        axes.set_facecolor("0.7")  # masked cells are not painted
        axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(method, fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
    panels[-1].set_xlabel("block", fontsize=9)
    panels[-1].set_xticks(ticks_within(0, last))
    below, above = bool((finite < low).any()), bool((finite > high).any())
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    figure.colorbar(colours, ax=list(panels), label=label, pad=0.02, aspect=30, extend=extend)
    figure.suptitle(title, fontsize=10)
    return figure


def _grid(
    changes: Mapping[str, float], kind_of: Mapping[str, str], kinds: Sequence[str], blocks: int
) -> NDArray[np.float64]:
    """Return the mean change of each kind in each block, shape (kinds, blocks); NaN if there is none."""
    found: dict[tuple[int, int], list[float]] = {}
    for layer, change in changes.items():
        if math.isfinite(change):
            found.setdefault((kinds.index(kind_of[layer]), block_index(layer) or 0), []).append(change)
    grid = np.full((len(kinds), blocks), np.nan)
    for place, values in found.items():
        grid[place] = np.mean(values)
    return grid
