"""Models by their bytes: ranks, bits and other programs' models in one table, with comparisons at equal bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from fasc_lightning._utils import Row
from fasc_lightning.evaluation import paired_interval
from fasc_lightning.studies.comparison._cells import DENSE, FOLDER, PUT_BACK, Cell, Outcome
from fasc_lightning.studies.comparison._tables import Metric, metrics_of, ratio, shown_perplexity

#: Ways to save bytes, as the tables name them.
Kind = Literal["dense", "one budget", "same bits", "to the nearest", "low rank", "low rank in int8", "another program"]

#: Two models count as equal in bytes if the first has at most ``EQUAL`` times the second's bytes, and at least
#: ``NOT_FAR_BELOW`` times.
EQUAL, NOT_FAR_BELOW = 1.02, 0.8

#: Figure of a paired comparison for each scale of a metric: ratio of perplexities, ratio of divergences, points.
_COMPARED: dict[str, Literal["perplexity", "share", "percent"]] = {
    "perplexity": "perplexity",
    "nats": "share",
    "percent": "percent",
}


def kind_of(cell: Cell) -> Kind:
    """Return how a cell saves bytes."""
    if cell.method == FOLDER:
        return "another program"
    if cell.method == DENSE or cell.budget is None:
        return "dense"
    if cell.budget.size is not None:
        return "one budget"
    if cell.budget.keep is not None:
        return "low rank in int8" if cell.budget.rounds_factors else "low rank"
    return "to the nearest" if cell.budget.rounds_to_nearest else "same bits"


def name_of(cell: Cell) -> str:
    """Return a cell's name in tables and figures: its budget, or the name of its folder."""
    if cell.method == FOLDER:
        return Path(cell.label).name
    return str(cell.budget or DENSE) + (", refitted" if cell.refit else "")


def by_bytes(outcomes: Mapping[Cell, Outcome]) -> dict[Cell, Outcome]:
    """Return outcomes by descending bytes, failed ones last."""
    return dict(sorted(outcomes.items(), key=lambda pair: (pair[1].measured is None, -pair[1].bytes)))


def seconds_to_compress(cell: Cell, outcome: Outcome, calibration: float) -> float:
    """Return the seconds from the dense model to the compressed one, the pass over the calibration data included.

    Args:
        cell: The cell.
        outcome: Its outcome.
        calibration: Seconds of the pass, which cells of this package share.
    """
    if outcome.measured is None or kind_of(cell) == "dense":
        return math.nan
    shared = 0.0 if kind_of(cell) in ("to the nearest", "another program") else calibration
    return shared + sum(seconds for step, seconds in outcome.seconds.items() if step != "evaluate")


def bytes_numbers(
    dense: Outcome,
    outcomes: Mapping[Cell, Outcome],
    rest: int,
    calibration: float,
    speeds: Mapping[Cell, Mapping[str, float]],
) -> list[Row]:
    """Return a row of plain numbers for each cell, the dense model first; NaN for missing numbers.

    Args:
        dense: Outcome of the dense model.
        outcomes: Outcomes of the other cells.
        rest: Bytes of the model outside of the targeted layers, numbers in floating point in 16 bits.
        calibration: Seconds of the pass over the calibration data.
        speeds: Tokens per second of prefill and decode, of the cells in which they were measured.
    """
    assert dense.measured is not None
    metrics = metrics_of(dense.measured)
    rows = []
    for cell, outcome in {Cell(DENSE): dense, **by_bytes(outcomes)}.items():
        there = outcome.measured is not None
        row: Row = {
            "model": name_of(cell),
            "kind": kind_of(cell),
            "bytes of the layers": outcome.bytes if there else math.nan,
            "share of 16 bits": outcome.bytes / dense.bytes if there else math.nan,
            "bytes of the model": rest + outcome.bytes if there else math.nan,
        }
        for metric in metrics:
            value = math.nan if outcome.measured is None else metric.value(outcome.measured)
            row[metric.name] = value
            if metric.scale != "nats":
                row[f"{metric.name} / dense"] = ratio(value, metric.value(dense.measured))
        row["seconds to compress"] = seconds_to_compress(cell, outcome, calibration)
        if speeds:
            row |= {f"{name} tokens/s": speeds.get(cell, {}).get(name, math.nan) for name in ("prefill", "decode")}
        rows.append({**row, "refit": outcome.refit_verdict, "error": outcome.reason})
    return rows


def bytes_table(numbers: Iterable[Row], metrics: Iterable[Metric]) -> list[Row]:
    """Return the rows of :func:`bytes_numbers` as text.

    Args:
        numbers: The rows.
        metrics: The metrics in them.
    """
    rows, metrics = list(numbers), list(metrics)
    return [_as_text(row, rows[0], metrics) for row in rows]


def _as_text(row: Row, dense: Row, metrics: list[Metric]) -> Row:
    if math.isnan(row["share of 16 bits"]):
        columns = _as_text(dense, dense, metrics)
        return {**dict.fromkeys(columns, "-"), "model": row["model"], "kind": row["kind"], "bytes": "failed"}
    is_dense = row is dense
    text: Row = {
        "model": row["model"] + (" (put back)" if row["refit"] == PUT_BACK else ""),
        "kind": "" if is_dense else row["kind"],
        "bytes": f"{100 * row['share of 16 bits']:.1f} %",
        "layers, model (MB)": f"{row['bytes of the layers'] / 1e6:.1f}, {row['bytes of the model'] / 1e6:.1f}",
    }
    for metric in metrics:
        value = row[metric.name]
        shown = metric.shown(value)
        if metric.scale == "nats":
            shown = "" if is_dense else shown
        elif not is_dense:
            relation = row[f"{metric.name} / dense"]
            shown += f" ({_share(relation)})" if metric.percent else f" ({_times(relation)})"
        text[metric.name] = shown
    seconds = row["seconds to compress"]
    text["seconds"] = "" if math.isnan(seconds) else f"{seconds:.0f}"
    for name in (column for column in row if column.endswith("tokens/s")):
        speed = row[name]
        faster = "" if is_dense else f" ({speed / dense[name]:.2f}x)"
        text[name] = "" if math.isnan(speed) else f"{speed:.0f}{faster}"
    return text


def _times(relation: float) -> str:
    return f"{relation:.3f}x" if relation < 10 else f"{shown_perplexity(relation)}x"


def _share(relation: float) -> str:
    return "-" if math.isnan(relation) else f"{100 * relation:.0f} %"


def at_equal_bytes(outcomes: Mapping[Cell, Outcome], cell: Cell) -> Cell | None:
    """Return the cell of one budget with the most bytes among those with no more bytes than another cell.

    Returns:
        None if there is none, or its bytes are far fewer.
    """
    least, most = NOT_FAR_BELOW * outcomes[cell].bytes, EQUAL * outcomes[cell].bytes
    found = [
        other
        for other, outcome in outcomes.items()
        if kind_of(other) == "one budget" and outcome.measured is not None and least <= outcome.bytes <= most
    ]
    return max(found, key=lambda other: outcomes[other].bytes, default=None)


def comparison_table(dense: Outcome, outcomes: Mapping[Cell, Outcome], seed: int = 0) -> list[Row]:
    """Return the models of one budget of bytes beside other models of equal bytes, with 95 % intervals, as text.

    Args:
        dense: Outcome of the dense model.
        outcomes: Outcomes of the other cells.
        seed: Seed of the bootstrap.
    """
    assert dense.measured is not None
    rows = []
    for cell, outcome in by_bytes(outcomes).items():
        if kind_of(cell) == "one budget" or outcome.measured is None:
            continue
        if (beside := at_equal_bytes(outcomes, cell)) is None:
            continue
        ours = outcomes[beside]
        row: Row = {
            "model": name_of(beside),
            "bytes": f"{100 * ours.bytes / dense.bytes:.1f} %",
            "beside": name_of(cell),
            "its bytes": f"{100 * outcome.bytes / dense.bytes:.1f} %",
        }
        for metric in metrics_of(dense.measured):
            row[_heading(metric)] = _compared(metric, outcome, ours, seed)
        rows.append(row)
    return rows


def _heading(metric: Metric) -> str:
    return f"{metric.name}, points" if metric.percent else f"{metric.name}, ratio"


def _compared(metric: Metric, other: Outcome, ours: Outcome, seed: int) -> str:
    """Return the figure of two models on the same items with its interval: bold if ours is better, ≈ if they tie."""
    assert other.measured is not None
    assert ours.measured is not None
    first, second = (metric.items(measured) for measured in (other.measured, ours.measured))
    if len(first) < 2 or (metric.scale == "nats" and not first.all()):
        return "-"
    found = paired_interval(first.tolist(), second.tolist(), seed, scale=_COMPARED[metric.scale])
    shown, even = ("{:+.1f}", 0.0) if metric.percent else ("{:.3f}", 1.0)
    estimate, low, high = (shown.format(value) for value in (found.estimate, found.low, found.high))
    better = found.low > even if metric.higher_is_better else found.high < even
    mark = " ≈" if found.contains(even) else ""
    return f"**{estimate}** ({low} to {high})" if better else f"{estimate} ({low} to {high}){mark}"
