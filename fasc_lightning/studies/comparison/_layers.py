"""Studies of single layers: each compressed alone, and groups of high and low rho compressed together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fasc_lightning._utils import Row, block_index, correlate, module_kinds
from fasc_lightning.compression import choose_methods
from fasc_lightning.studies.comparison._cells import Budget, Cell, Outcome, Setting
from fasc_lightning.studies.comparison._questions import Answers
from fasc_lightning.studies.comparison._tables import metrics_of
from fasc_lightning.studies.rho import divisions, median

#: The rank of a single layer does not depend on the layout, and there is nothing to allocate.
ALONE = Setting("uniform", "pivot")


def sensitivity_cells(layers: Iterable[str], methods: Iterable[str], rank: float) -> list[Cell]:
    """Return a cell for each layer and method, with the layer alone at the given rank (FASC, Fig. 2)."""
    layers = list(layers)
    return [
        Cell(method, Budget(rank=rank), ALONE, label=layer, layers=(layer,)) for method in methods for layer in layers
    ]


def some_layers(layers: Iterable[str], count: int | None) -> list[str]:
    """Return evenly spaced layers, at least ``count`` of them, or all if there are fewer or ``count`` is None.

    The step has no factor in common with the number of kinds of layers, so that kinds take turns in all depths.

    Args:
        layers: Names of layers in the order of the model.
        count: Number of layers that are enough.
    """
    layers = list(layers)
    if count is None or count >= len(layers):
        return layers
    kinds = len(set(module_kinds(layers).values()))
    return layers[:: next(step for step in range(len(layers) // count, 0, -1) if math.gcd(step, kinds) == 1)]


def group_cells(rho: Mapping[str, float], methods: Iterable[str], rank: float) -> list[Cell]:
    """Return cells for the fifths of the layers with the highest and with the lowest rho (FASC, Table 7).

    Args:
        rho: rho by layer; NaN where undefined.
        methods: Solvers.
        rank: Rank of each layer.
    """
    critical, safe = divisions(rho, math.inf)["fifths"]
    groups = {"critical": critical, "safe": safe}
    return [
        Cell(method, Budget(rank=rank), ALONE, label=f"{name} layers", layers=tuple(sorted(group)))
        for name, group in groups.items()
        for method in methods
        if group
    ]


def gate_cells(
    rho: Mapping[str, float], thresholds: Iterable[float], method: str, cheap: str, budget: Budget, setting: Setting
) -> list[Cell]:
    """Return cells of one budget in which rho above a threshold gives layers one solver, and else another.

    The callback's gate chooses the solvers (FASC, Table 8), from "all" layers to none. Thresholds with the same choice
    are one cell.

    Args:
        rho: rho by layer; NaN where undefined.
        thresholds: Thresholds in ascending order.
        method: The solver above a threshold.
        cheap: The solver at and below a threshold.
        budget: Budget of all layers.
        setting: Setting of all layers.
    """
    outer = {f"all {method}": choose_methods(rho, None, method), f"all {cheap}": dict.fromkeys(rho, cheap)}
    gates = {f"rho above {threshold:g}": choose_methods(rho, threshold, method) for threshold in thresholds}
    first: dict[tuple[str, ...], str] = {}
    for label, methods in {**outer, **gates}.items():
        first.setdefault(tuple(methods.values()), label)
    all_above, all_below = outer.items()
    return [
        Cell(method, budget, setting, label=label, methods=tuple(methods.items()))
        for label, methods in (all_above, *gates.items(), all_below)
        if label in first.values()
    ]


# Tables.


def loss_change(dense: Answers, measured: Answers | None) -> float:
    """Return the increase of the mean token loss in nats, the mean over texts; NaN if there is nothing to compare."""
    if measured is None or not dense.losses:
        return math.nan
    return float(np.mean([np.mean(measured.losses[text]) - np.mean(losses) for text, losses in dense.losses.items()]))


def facts_change(dense: Answers, measured: Answers | None) -> float:
    """Return the change of recall in percentage points; NaN if there is nothing to compare."""
    if measured is None or not dense.recalled:
        return math.nan
    return 100 * float(np.mean(measured.recalled) - np.mean(dense.recalled))


def layer_rows(
    dense: Outcome, outcomes: Mapping[Cell, Outcome], scores: Mapping[str, Mapping[str, float]] | None = None
) -> list[Row]:
    """Return the change from compressing each layer alone, and its rho; the highest debiased rho first, if any.

    Args:
        dense: Outcome of the dense model on the same evaluation.
        outcomes: Outcomes of :func:`sensitivity_cells`.
        scores: rho, its null and its debiased value by layer.
    """
    assert dense.measured is not None
    layers = list(dict.fromkeys(cell.label for cell in outcomes))
    kinds = module_kinds(layers)
    methods = list(dict.fromkeys(cell.method for cell in outcomes))
    by_place = {(cell.label, cell.method): outcome for cell, outcome in outcomes.items()}
    totals = {
        method: math.fsum(o.plan[0]["loss"] for (_, other), o in by_place.items() if other == method and o.plan)
        for method in methods
    }
    rows: list[Row] = []
    for layer in layers:
        row: Row = {"layer": layer, "kind": kinds[layer], "block": block_index(layer)}
        if scores is not None:
            row |= {name: scores[layer][name] for name in ("rho", "null", "debiased")}
        for method in methods:
            outcome = by_place[layer, method]
            plan = outcome.plan[0]["loss"] if outcome.plan else math.nan
            row[f"loss change, {method}"] = loss_change(dense.measured, outcome.measured)
            row[f"facts change, {method}"] = facts_change(dense.measured, outcome.measured)
            row[f"share of predicted loss, {method}"] = plan / totals[method] if totals[method] else math.nan
        rows.append(row)
    if scores is not None:
        rows.sort(key=lambda row: -math.inf if math.isnan(row["debiased"]) else row["debiased"], reverse=True)
    return rows


def fifths_rows(rows: Sequence[Row]) -> list[Row]:
    """Return medians of :func:`layer_rows` over the critical fifth of the layers, the safe one, and those between."""
    high, low = divisions({row["layer"]: row["debiased"] for row in rows}, math.inf)["fifths"]
    groups = {
        "critical (highest fifth of debiased rho)": [row for row in rows if row["layer"] in high],
        "between": [row for row in rows if row["layer"] not in {*high, *low}],
        "safe (lowest fifth)": [row for row in rows if row["layer"] in low and row["layer"] not in high],
    }
    table = []
    for name, group in groups.items():
        row: Row = {"layers": name, "count": len(group), "debiased rho (median)": median(r["debiased"] for r in group)}
        for column in rows[0]:
            if "change, " in column:
                row[f"{column} (median)"] = median(r[column] for r in group)
            elif column.startswith("share of"):
                row[column] = math.fsum(r[column] for r in group if not math.isnan(r[column]))
        table.append(row)
    return table


def correlation_rows(rows: Sequence[Row]) -> list[Row]:
    """Return correlations of rho with the changes from compressing each layer alone."""
    table = []
    for score in ("rho", "debiased"):
        for column in (name for name in rows[0] if "change, " in name):
            found = correlate([row[score] for row in rows], [row[column] for row in rows])
            row: Row = {"score": score, "with": column, "layers": found.pairs, "Pearson r": found.r, "p": found.p}
            table.append({**row, "Spearman r": found.rank_r, "p of it": found.rank_p})
    return table


def labelled_rows(dense: Outcome, outcomes: Mapping[Cell, Outcome]) -> list[Row]:
    """Return cells that a study has labelled, as numbers: the dense model first."""
    assert dense.measured is not None
    metrics = metrics_of(dense.measured)
    rows = []
    for cell, outcome in {Cell("dense", label="dense"): dense, **outcomes}.items():
        own = dict(cell.methods)
        row: Row = {"cell": cell.label, "method": " and ".join(dict.fromkeys(own.values())) or cell.method}
        row["layers"] = len(cell.layers or own) or "-"
        if own:
            row["layers"] = sum(method == cell.method for method in own.values())
        row["kept"] = outcome.kept
        row |= {m.name: math.nan if outcome.measured is None else m.value(outcome.measured) for m in metrics}
        rows.append(
            {**row, "seconds to factorise": outcome.seconds.get("factorize", math.nan), "error": outcome.reason}
        )
    return rows
