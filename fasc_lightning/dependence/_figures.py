"""Figures of rho over training, by depth, and against FASC's gain.

Each function returns a matplotlib Figure without pyplot or a display. :func:`save_figure` writes figures to files, and
:func:`log_figure` gives them to loggers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fasc_lightning._utils import (
    COLOURS,
    DASHES,
    GREY,
    MARKERS,
    block_index,
    cell_edges,
    correlate,
    label_rows,
    module_kinds,
    new_figure,
    over_layers,
    short_names,
    spread_positions,
    ticks_within,
    whole_file,
)
from fasc_lightning.dependence._emergence import emergence
from fasc_lightning.dependence._history import RhoHistory, RhoRow
from fasc_lightning.dependence._summary import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Curves by name, each as (steps, values).
Metrics: TypeAlias = Mapping[str, tuple[ArrayLike, ArrayLike]]

_LABELS = {
    "rho": "rho",
    "null": "null of rho",
    "debiased": "debiased rho",
    "low": "debiased rho, lower end of the 95 % interval",
    "high": "debiased rho, upper end of the 95 % interval",
    "iid_floor": "iid floor of rho",
}
_SIGNED = ("debiased", "low", "high")
_UNDEFINED = "0.7"


def rho_heatmap(
    history: RhoHistory, column: str = "debiased", threshold: float | None = None, observations: int = 3
) -> Figure:
    """Draw a heatmap of layers by steps, depth upwards. Each cell reaches half-way to the neighbouring steps.

    Args:
        history: Observations of one layer or more.
        column: A column of scores: rho, null, debiased, low, high or iid_floor.
        threshold: Threshold for a mark at the step at which each layer emerges, by
            :func:`~fasc_lightning.dependence.emergence` and thus by the plain rho whatever the column. None draws no
            marks.
        observations: Observations in a row that emergence needs.

    Raises:
        ValueError: If nothing was observed, the column is no score, or emergence refuses its arguments.
    """
    if column not in _LABELS:
        raise ValueError(f"Expected one of the columns {', '.join(_LABELS)} but got {column!r}.")
    if not history:
        raise ValueError("Expected a history with observations but it is empty.")
    layers, steps = history.layers, history.steps
    values = np.ma.masked_invalid(history.matrix(column))
    height = float(np.clip(1.8 + 0.17 * len(layers), 3.0, 11.0))
    figure = new_figure(9.0, height)
    from matplotlib.lines import Line2D  # after new_figure, whose error says what to install
    from matplotlib.patches import Patch

    axes = figure.subplots()
    bound = float(np.abs(values).max()) if values.count() else 1.0
    signed = column in _SIGNED
    mesh = axes.pcolormesh(
        cell_edges(steps),
        np.arange(len(layers) + 1),
        values,
        cmap="RdBu_r" if signed else "viridis",
        vmin=-(bound or 1.0) if signed else 0.0,
        vmax=bound or 1.0,
    )
    axes.set_facecolor(_UNDEFINED)  # masked cells are not painted
    figure.colorbar(mesh, ax=axes, label=_LABELS[column], aspect=30, pad=0.02)

    rows = label_rows(layers, most=int(height / 0.19))
    names = short_names(layers)
    axes.set_yticks([row + 0.5 for row in rows], [names[row] for row in rows], fontsize=7)
    axes.set_xticks(ticks_within(steps[0], steps[-1]))
    axes.set_xlabel("step")
    title = f"{_LABELS[column]} of {counted(len(layers), 'layer')} at {counted(len(steps), 'step')}"
    legend: list[Line2D | Patch] = []
    if threshold is not None:
        found = emergence(history, threshold, observations)
        marks = [(step, row + 0.5) for row, step in enumerate(found.values()) if step is not None]
        criterion = (
            f"rho above {threshold:g} and its null, interval above 0, {counted(observations, 'observation')} in a row"
        )
        title += f"\n{counted(len(marks), 'layer')} emerged: {criterion}"
        if marks:
            # A mark stays within its row if rows are high enough to see it.
            size = float(np.clip(0.75 * 72 * (height - 1.2) / len(layers), 3.0, 6.0))
            x, y = zip(*marks, strict=True)
            style: dict[str, Any] = {"marker": "o", "linestyle": "", "color": "white", "markeredgecolor": "black"}
            axes.plot(x, y, markersize=size, markeredgewidth=0.15 * size, zorder=3, label="emergence", **style)
            legend.append(Line2D([], [], markersize=6, label="emergence", **style))
    if values.count() < values.size:
        legend.append(Patch(facecolor=_UNDEFINED, label="undefined or not observed"))
    if legend:
        figure.legend(handles=legend, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    axes.set_title(title, fontsize=10)
    return figure


def rho_profile(rows: Mapping[str, RhoRow]) -> Figure:
    """Draw rho by depth, a panel for each kind of module: FASC's Fig. 3, with null and interval added.

    Args:
        rows: Rows by layer, as :meth:`~fasc_lightning.dependence.RhoHistory.at` returns them. The block of a layer is
            the first number in its name; layers without a number get a panel of their own kind.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("Expected rows of one layer or more but got none.")
    kinds = module_kinds(rows)
    groups: dict[str, list[tuple[int | None, RhoRow]]] = {}
    for layer, row in rows.items():
        groups.setdefault(kinds[layer], []).append((block_index(layer), row))
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    figure = new_figure(max(4.5, 2.9 * columns), 1.3 + 2.1 * lines)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (kind, group) in zip(panels, groups.items(), strict=False):
        _profile_panel(panel, kind, group)
    for spare in panels[len(groups) :]:
        spare.set_visible(False)
    for first in panels[::columns]:
        first.set_ylabel("rho", fontsize=9)
    for lowest in panels[max(0, len(groups) - columns) : len(groups)]:
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel("block", fontsize=9)
    blocks = [block_index(layer) or 0 for layer in rows]
    panels[0].set_xlim(min(blocks) - 0.5, max(blocks) + 0.5)
    panels[0].set_xticks(ticks_within(min(blocks), max(blocks)))
    by_label = {text: handle for p in panels for handle, text in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    steps = sorted({row["step"] for row in rows.values()})
    when = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    figure.suptitle(f"rho by depth, {counted(len(rows), 'layer')}, {when}", fontsize=10)
    return figure


def _profile_panel(axes: Axes, kind: str, group: list[tuple[int | None, RhoRow]]) -> None:
    ordered = sorted(group, key=lambda pair: pair[0] or 0)
    blocks = spread_positions([block or 0 for block, _ in ordered])
    values = {name: np.array([row[name] for _, row in ordered]) for name in _LABELS}  # type: ignore[literal-required]
    # Several layers of one kind in one block, such as experts, stay points: a line through them would mean nothing.
    lines = len({block for block, _ in group}) == len(group)
    solid, dotted = ("-", ":") if lines else ("None", "None")
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.vlines(blocks, values["low"], values["high"], COLOURS[0], linewidth=2.5, alpha=0.3, label="95 % interval")
    axes.plot(blocks, values["debiased"], ls=solid, c=COLOURS[0], lw=1.2, marker="o", ms=3, label="debiased rho")
    axes.plot(blocks, values["rho"], ls=solid, c=COLOURS[1], lw=0.8, marker=".", ms=2.5, label="rho")
    dash = "" if lines and len(blocks) > 1 else "_"
    axes.plot(blocks, values["null"], ls=dotted, c="black", lw=0.9, marker=dash, ms=5, label="null of rho")
    nowhere = blocks[np.isnan(values["rho"])]
    if nowhere.size:
        axes.plot(nowhere, np.zeros(len(nowhere)), "x", color=GREY, markersize=5, label="undefined")
    outside = all(block is None for block, _ in group)
    axes.set_title(f"{kind} (no block)" if outside else kind, fontsize=9)
    axes.tick_params(labelsize=8)


@overload
def training_figure(runs: RhoHistory, metrics: Metrics) -> Figure: ...
@overload
def training_figure(runs: Mapping[str, tuple[RhoHistory, Metrics]]) -> Figure: ...
def training_figure(
    runs: RhoHistory | Mapping[str, tuple[RhoHistory, Metrics]], metrics: Metrics | None = None
) -> Figure:
    """Draw loss, recall of facts and rho above each other, against the same steps.

    Colours distinguish runs, dashes distinguish quantities. Empty panels are left out.

    Args:
        runs: The history of one run, or several runs by name, each a history and its metrics:
            ``training_figure({"facts": (history, metrics), "shuffled": (other, other_metrics)})``.
        metrics: Metrics of a single run. A name begins with "loss" or "recall", which decides the panel; recall is in
            percent.

    Raises:
        TypeError: If one run comes without metrics, or several runs come with separate metrics.
        ValueError: If a metric belongs to no panel, has not one value for each step, or there is nothing to draw.
    """
    if isinstance(runs, RhoHistory):
        if metrics is None:
            raise TypeError("Expected the metrics of the run as second argument: training_figure(history, metrics).")
        runs = {"": (runs, metrics)}
    elif metrics is not None:
        raise TypeError("Expected metrics beside each history of several runs: {name: (history, metrics)}.")
    names = list(dict.fromkeys(name for _, metrics in runs.values() for name in metrics))
    if stray := [name for name in names if not name.startswith(tuple(_PANELS))]:
        raise ValueError(f"Expected names of metrics that begin with one of {', '.join(_PANELS)} but got {stray}.")
    curves = {panel: [name for name in names if name.startswith(panel)] for panel in _PANELS}
    panels = [panel for panel in _PANELS if curves[panel]]
    if any(len(history) for history, _ in runs.values()):
        panels.append("rho")
    if not panels:
        raise ValueError("Expected a metric or an observation of rho to draw but got none.")

    figure = new_figure(9.5, 0.9 + 2.3 * len(panels))
    from matplotlib.lines import Line2D  # after new_figure, whose error says what to install

    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False).ravel()
    for panel, axes in zip(panels, all_axes, strict=True):
        for colour, (history, metrics) in zip(cycle(COLOURS), runs.values(), strict=False):
            if panel == "rho":
                _draw_rho(axes, history, colour)
            else:
                _draw_curves(axes, metrics, dict(zip(curves[panel], cycle(DASHES), strict=False)), colour)
        axes.set_ylabel(_PANELS.get(panel, "rho over layers"), fontsize=9)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
        _legend_of_dashes(axes, black=len(runs) > 1)
    all_axes[-1].set_xlabel("step", fontsize=9)
    if len(runs) > 1:
        handles = [Line2D([], [], color=colour, linewidth=3) for colour, _ in zip(cycle(COLOURS), runs, strict=False)]
        figure.legend(handles, list(runs), loc="outside upper center", ncols=5, fontsize=9, frameon=False)
    return figure


_PANELS = {"loss": "loss", "recall": "recall of facts (%)"}


def _draw_curves(axes: Axes, metrics: Metrics, dashes: Mapping[str, str], colour: str) -> None:
    for name, dash in dashes.items():
        if name not in metrics:
            continue
        steps, values = (np.atleast_1d(np.asarray(column)) for column in metrics[name])
        if steps.shape != values.shape:
            raise ValueError(f"Expected as many values of {name!r} as steps but got {len(values)} and {len(steps)}.")
        # A few measurements get a mark each.
        marker = "." if len(steps) <= 50 else ""
        axes.plot(steps, values, dash, color=colour, linewidth=1.2, marker=marker, label=name.replace("_", " "))


def _draw_rho(axes: Axes, history: RhoHistory, colour: str) -> None:
    if not history:
        return
    steps = history.steps
    mean, low, high = over_layers(history.matrix("debiased"), 0.1, 0.9)
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0, label="10 to 90 % of layers, debiased")
    marker = "." if len(steps) <= 50 else ""
    axes.plot(steps, mean, color=colour, linewidth=1.8, marker=marker, label="mean debiased")
    axes.plot(steps, over_layers(history.matrix("rho"))[0], "--", color=colour, linewidth=0.9, label="mean rho")
    axes.plot(steps, over_layers(history.matrix("null"))[0], ":", color=colour, linewidth=0.9, label="mean null")


def _legend_of_dashes(axes: Axes, black: bool) -> None:
    """Explain each dash once, in black if colours distinguish runs."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    # The legend stands beside the axes: curves may reach any corner.
    legend = axes.legend(once.values(), once, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    if black:
        for line in legend.get_lines():
            line.set_color("black")
        for band in legend.get_patches():
            band.set(color="black", alpha=0.2)


def rho_gain_scatter(
    rho: Mapping[str, float],
    gain: Mapping[str, float],
    kinds: Mapping[str, str] | None = None,
    threshold: float | None = None,
    *,
    rho_label: str = "rho",
    gain_label: str = "gain of fasc over svd",
) -> Figure:
    """Draw the gain of fasc over svd against rho, one point for each layer (FASC, Fig. 4), with their correlations.

    The p-values assume independent layers. Layers of one model depend on each other, so the p-values are too small.

    Args:
        rho: rho by layer; NaN where undefined.
        gain: Gain by layer, in any unit, for the layers of ``rho``.
        kinds: Kind of each layer, which decides its colour; by default mostly the last part of its name.
        threshold: rho at which a vertical line is drawn; None draws none.
        rho_label: Label of the axis of rho.
        gain_label: Label of the axis of the gain, with its unit.

    Raises:
        ValueError: If ``rho`` and ``gain`` have different layers, no layer has both, or a layer has no kind.
    """
    if set(rho) != set(gain):
        raise ValueError(
            f"Expected rho and gain of the same layers but got {len(rho)} and {len(gain)}; not in both: "
            f"{sorted(set(rho) ^ set(gain))[:5]}."
        )
    layers = [layer for layer in rho if np.isfinite(rho[layer]) and np.isfinite(gain[layer])]
    if not layers:
        raise ValueError(f"Expected a layer whose rho and gain are both defined but got none of {len(rho)}.")
    kinds = kinds or module_kinds(rho)
    if strangers := [layer for layer in rho if layer not in kinds]:
        raise ValueError(f"Expected the kind of each layer but {len(strangers)} have none, as {strangers[0]!r}.")
    x, y = (np.array([values[layer] for layer in layers], dtype=np.float64) for values in (rho, gain))
    figure = new_figure(7.0, 4.5)
    axes = figure.subplots()
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    for i, kind in enumerate(dict.fromkeys(kinds[layer] for layer in rho)):
        own = np.array([kinds[layer] == kind for layer in layers])
        if not own.any():
            continue
        marker = MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]
        axes.scatter(x[own], y[own], s=18, alpha=0.75, c=COLOURS[i % len(COLOURS)], marker=marker, label=kind)
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", linewidth=0.9, label=f"threshold {threshold:g}")
    axes.set_xlabel(rho_label)
    axes.set_ylabel(gain_label)
    count = f"n = {len(layers)}"
    if len(layers) < len(rho):
        count += f", {len(rho) - len(layers)} undefined left out"
    axes.set_title(f"{_correlation(x, y)}\n{count}", fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    found = correlate(x, y)
    if np.isnan(found.r):
        return "no correlation: fewer than 3 layers, or no variation"
    return f"Pearson r = {found.r:.2f} (p = {found.p:.2g}), Spearman r = {found.rank_r:.2f} (p = {found.rank_p:.2g})"


def angles_figure(
    angles_high: Mapping[str, ArrayLike], angles_low: Mapping[str, ArrayLike], threshold_label: str = "the threshold"
) -> Figure:
    """Draw the distribution of principal angles between two methods' subspaces, for high and low rho (FASC, Fig. 5).

    Args:
        angles_high: Angles of each layer with high rho, in degrees, in [0, 90]. May be empty.
        angles_low: Angles of each layer with low rho. May be empty.
        threshold_label: Name of the boundary between high and low, such as "rho = 0.3" or "the median of rho".

    Raises:
        ValueError: If an angle is not in [0, 90].
    """
    figure = new_figure(6.5, 4.5)
    panels = figure.subplots(2, sharex=True, sharey=True)
    groups = (("above", angles_high, COLOURS[1]), ("below", angles_low, COLOURS[0]))
    for axes, (side, by_layer, colour) in zip(panels, groups, strict=True):
        angles = np.concatenate([np.empty(0), *(_angles(layer, values) for layer, values in by_layer.items())])
        axes.set_title(
            f"{counted(len(by_layer), 'layer')} {side} {threshold_label}, {counted(angles.size, 'angle')}", fontsize=9
        )
        axes.set_ylabel("share of angles (%)", fontsize=9)
        axes.tick_params(labelsize=8)
        if not angles.size:
            axes.text(45, 0.5, "no layers", ha="center", va="center", transform=axes.get_xaxis_transform(), color=GREY)
            continue
        # Bins of 3 degrees; shares make groups of different sizes comparable.
        axes.hist(angles, bins=np.linspace(0, 90, 31), weights=np.full(angles.size, 100 / angles.size), color=colour)
        median = float(np.median(angles))
        axes.axvline(median, color="black", linewidth=1.2)
        left = median > 45
        axes.annotate(
            f"median {median:.1f}°", (median, 0.95), xycoords=axes.get_xaxis_transform(), va="top", fontsize=9,
            xytext=(-5 if left else 5, 0), textcoords="offset points", ha="right" if left else "left",
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    panels[-1].set_xlabel("principal angle (degrees)", fontsize=9)
    panels[-1].set_xlim(0, 90)
    panels[-1].set_xticks(range(0, 91, 15))
    return figure


def _angles(layer: str, values: ArrayLike) -> NDArray[np.float64]:
    angles = np.asarray(values, dtype=np.float64).ravel()
    # NaN compares false and is refused, too. The slack is the error of an arc cosine in single precision.
    if not ((angles >= -1e-3) & (angles <= 90 + 1e-3)).all():
        raise ValueError(
            f"Expected angles in degrees, in [0, 90], but layer {layer!r} has {angles.min()} to {angles.max()}."
        )
    return angles.clip(0, 90)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG at 150 dots per inch, whole or not at all.

    Raises:
        ValueError: If the path does not end in .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"Expected a path that ends in .png but got {path}.")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")


def log_figure(loggers: Iterable[Any], name: str, figure: Figure, step: int) -> int:
    """Give a figure to the loggers that take figures; call it on the process of rank 0.

    These are loggers with Lightning's ``log_image``, such as the one for Weights & Biases, and loggers whose experiment
    has ``add_figure``, such as TensorBoard's. Other loggers are skipped.

    Args:
        loggers: Loggers, as in ``trainer.loggers``.
        name: Tag or key of the figure.
        figure: The figure, which is neither closed nor changed.
        step: Optimizer steps done.

    Returns:
        Number of loggers that took the figure.
    """
    reached = 0
    for logger in loggers:
        if _has(logger, "log_image"):
            logger.log_image(key=name, images=[figure], step=step)
        elif _has(getattr(logger, "experiment", None), "add_figure"):
            logger.experiment.add_figure(name, figure, global_step=step)
        else:
            continue
        reached += 1
    return reached


def _has(thing: Any, method: str) -> bool:
    # Lightning's dummy loggers and experiments answer to any name through __getattr__; getattr_static does not ask it.
    return inspect.getattr_static(thing, method, None) is not None
