"""Tables and the figure of `inference.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fasc_lightning.cli import COLOURS, DASHES, GREY, MARKERS, Row, markdown_table, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def result_rows(cells: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return one row per variant of a cell."""
    rows: list[Row] = []
    for cell in cells:
        for name, found in cell["variants"].items():
            layout, _, keep = name.partition(" ")
            row: Row = {key: cell[key] for key in ("shape", "dtype", "part", "workload")}
            row |= {"layout": layout, "keep": float(keep) if keep else found["kept"], "kept": found["kept"]}
            row |= {"tokens/s": found["tokens_per_second"]["median"]}
            row |= {f"speed-up {key}": value for key, value in found["speed_up"].items()}
            row |= {"weights MB": found["weight_bytes"] / 1e6}
            peak = found["peak_bytes"]
            row |= {"peak MB": math.nan if peak is None else peak / 1e6, "rounds": cell["rounds"]}
            row |= {"threads": cell["settings"]["threads"], "align": cell["settings"]["align"]}
            rows.append(row)
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Return a table for each shape and part: one line per variant, one column per workload."""
    parts = []
    for shape, part in dict.fromkeys((row["shape"], row["part"]) for row in rows):
        chosen = [row for row in rows if (row["shape"], row["part"]) == (shape, part)]
        lines = []
        for key in dict.fromkeys((row["dtype"], row["layout"], row["keep"]) for row in chosen):
            variant = [row for row in chosen if (row["dtype"], row["layout"], row["keep"]) == key]
            line = {"dtype": key[0], "layout": key[1], "kept": f"{100 * variant[0]['kept']:.1f} %"}
            line["weights"] = f"{variant[0]['weights MB']:,.0f} MB"
            lines.append(line | {row["workload"]: _measured(row) for row in variant})
        settings = f"{chosen[0]['threads']} threads, ranks in multiples of {chosen[0]['align']}"
        what = "tokens/s, times as fast as dense [middle half of the rounds], peak memory"
        parts.append(f"{shape}, {part} ({settings}): {what}.\n\n{markdown_table(lines)}\n")
    return "\n".join(parts)


def _measured(row: Row) -> str:
    ratio = f", {row['speed-up median']:.2f}x [{row['speed-up low']:.2f}, {row['speed-up high']:.2f}]"
    peak = "" if math.isnan(row["peak MB"]) else f", {row['peak MB']:,.0f} MB"
    return f"{row['tokens/s']:,.0f}{'' if row['layout'] == 'dense' else ratio}{peak}"


def speed_up_figure(rows: Sequence[Row]) -> Figure:
    """Draw the speed-up of each variant over dense: a column per shape and part, a row per workload."""
    columns = list(dict.fromkeys((row["shape"], row["part"]) for row in rows))
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = new_figure(2.6 * len(columns) + 1.2, 2.3 * len(workloads) + 0.6)
    axes = figure.subplots(len(workloads), len(columns), squeeze=False, sharex=True, sharey="row")
    for i, workload in enumerate(workloads):
        for j, (shape, part) in enumerate(columns):
            chosen = [row for row in rows if (row["workload"], row["shape"], row["part"]) == (workload, shape, part)]
            _panel(axes[i, j], [row for row in chosen if not row["layout"].startswith("dense")], dtypes)
            if i == 0:
                axes[i, j].set_title(f"{shape}\n{part}", fontsize=9)
            if i == len(workloads) - 1:
                axes[i, j].set_xlabel("parameters (bytes) kept")
        axes[i, 0].set_ylabel(f"{workload}\ntimes as fast as dense")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7), fontsize=8)
    return figure


def _panel(axis: Axes, rows: Sequence[Row], dtypes: Sequence[str]) -> None:
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    for d, dtype in enumerate(dtypes):
        for k, layout in enumerate(layouts):
            points = sorted((r for r in rows if (r["dtype"], r["layout"]) == (dtype, layout)), key=lambda r: r["kept"])
            if not points:
                continue
            x, y = [r["kept"] for r in points], [r["speed-up median"] for r in points]
            bars = [[a - r["speed-up low"] for a, r in zip(y, points, strict=True)]]
            bars += [[r["speed-up high"] - a for a, r in zip(y, points, strict=True)]]
            style: dict[str, Any] = {"color": COLOURS[d], "marker": MARKERS[k], "linestyle": DASHES[k]}
            axis.errorbar(x, y, bars, label=f"{dtype}, {layout}", linewidth=1.2, elinewidth=0.8, markersize=4, **style)
    kept = sorted({row["kept"] for row in rows})
    axis.plot(kept, [1 / x for x in kept], color=GREY, linestyle=":", linewidth=1, label="1 / kept")
    axis.axhline(1, color=GREY, linewidth=0.8)
