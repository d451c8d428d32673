"""Tables of a comparison with the best cells and their ties; pure functions of outcomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fasc_lightning._utils import Row
from fasc_lightning.evaluation import paired_interval
from fasc_lightning.studies.comparison._cells import Budget, Cell, Outcome
from fasc_lightning.studies.comparison._questions import Answers

#: Methods that only write zeros: their parameters stay in memory, so they are not ranked.
UNRANKED = frozenset({"magnitude"})


@dataclass(frozen=True)
class Metric:
    """One figure of a model.

    Attributes:
        name: Column heading.
        items: Its single answers; two models' answers are compared in pairs.
        higher_is_better: Whether larger means are better.
        scale: Whether the figure is 100 times the mean of the items ("percent"), exp of the mean ("perplexity"), or the
            mean itself ("nats").
    """

    name: str
    items: Callable[[Answers], NDArray[np.float64]]
    higher_is_better: bool
    scale: Literal["percent", "perplexity", "nats"]

    @property
    def percent(self) -> bool:
        """Whether the figure is a percentage."""
        return self.scale == "percent"

    def value(self, measured: Answers) -> float:
        """Return the figure."""
        mean = float(self.items(measured).mean())
        if self.scale == "perplexity":
            return math.exp(mean)
        return 100 * mean if self.percent else mean

    def shown(self, value: float) -> str:
        """Return the figure as text."""
        if self.scale == "perplexity":
            return shown_perplexity(value)
        return f"{value:.1f}" if self.percent else shown_nats(value)


def _losses(text: str, measured: Answers) -> NDArray[np.float64]:
    return np.asarray(measured.losses[text], dtype=np.float64)


def _divergences(text: str, measured: Answers) -> NDArray[np.float64]:
    return np.asarray(measured.divergence[text], dtype=np.float64)


def _recalled(chosen: Sequence[int] | None, measured: Answers) -> NDArray[np.float64]:
    recalled = np.asarray(measured.recalled, dtype=np.float64)
    return recalled if chosen is None else recalled[chosen]


def _preferred(measured: Answers) -> NDArray[np.float64]:
    return np.asarray(measured.preferred, dtype=np.float64)


def metrics_of(measured: Answers) -> list[Metric]:
    """Return the metrics with answers: perplexity and divergence of each text, facts, minimal pairs."""
    metrics = [
        Metric(f"perplexity of {text}", partial(_losses, text), higher_is_better=False, scale="perplexity")
        for text in measured.losses
    ]
    metrics += [
        Metric(f"KL on {text}", partial(_divergences, text), higher_is_better=False, scale="nats")
        for text in measured.divergence
    ]
    if measured.recalled:
        metrics.append(Metric("facts %", partial(_recalled, None), higher_is_better=True, scale="percent"))
    if measured.preferred:
        metrics.append(Metric("syntax %", _preferred, higher_is_better=True, scale="percent"))
    return metrics


def kind_metrics(kinds: Sequence[str]) -> list[Metric]:
    """Return recall of the facts of each kind, and of all."""
    chosen = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in sorted(set(kinds))}
    return [
        *(
            Metric(f"{kind} ({len(facts)})", partial(_recalled, facts), higher_is_better=True, scale="percent")
            for kind, facts in chosen.items()
        ),
        Metric(f"all ({len(kinds)})", partial(_recalled, None), higher_is_better=True, scale="percent"),
    ]


# The best cells.


@lru_cache(maxsize=4096)
def tied(a: tuple[float, ...], b: tuple[float, ...], seed: int) -> bool:
    """Return whether the 95 % interval of the mean difference of two models, over the same items, contains 0.

    The result is cached because several tables need it. A single item gives no interval and so a tie.
    """
    return len(a) < 2 or paired_interval(a, b, seed).contains(0)


@dataclass(frozen=True)
class Ranking:
    """The best cell by one metric, and the cells that tie with it."""

    best: Cell
    ties: frozenset[Cell]


def rank_cells(outcomes: Mapping[Cell, Outcome], metric: Metric, seed: int = 0) -> Ranking | None:
    """Return the best cell, and its ties: cells whose paired 95 % interval against the best contains 0.

    Failed cells and methods that remove nothing (:data:`UNRANKED`) are left out.

    Returns:
        None if no cell is left.
    """
    items = {
        cell: metric.items(outcome.measured)
        for cell, outcome in outcomes.items()
        if outcome.measured is not None and cell.method not in UNRANKED
    }
    if not items:
        return None
    sign = -1 if metric.higher_is_better else 1
    best = min(items, key=lambda cell: sign * items[cell].mean())
    answers = {cell: tuple(found.tolist()) for cell, found in items.items()}
    ties = {cell for cell in items if cell != best and tied(answers[best], answers[cell], seed)}
    return Ranking(best, frozenset(ties))


# The tables.


def results_rows(dense: Outcome, outcomes: Mapping[Cell, Outcome], kinds: Sequence[str]) -> list[Row]:
    """Return a plain row of numbers for each cell, the dense model first; NaN for missing numbers."""
    assert dense.measured is not None
    metrics = metrics_of(dense.measured)
    by_kind = kind_metrics(kinds)[:-1] if kinds else []
    phases = list(dict.fromkeys(phase for outcome in outcomes.values() for phase in outcome.seconds))
    rows = []
    for cell, outcome in {Cell("dense"): dense, **outcomes}.items():
        row: Row = {
            "method": cell.method,
            "budget": str(cell.budget or ""),
            "setting": str(cell.setting or ""),
            "refit": cell.refit,
            "parameters": outcome.parameters,
            "kept": outcome.kept,
            "zeros": outcome.zeros,
        }
        for metric in metrics:
            value = math.nan if outcome.measured is None else metric.value(outcome.measured)
            row[metric.name] = value
            if metric.scale != "nats":  # the dense model's is 0
                row[f"{metric.name} / dense"] = ratio(value, metric.value(dense.measured))
        for metric in by_kind:
            name = f"facts % of {metric.name.rpartition(' ')[0]}"
            row[name] = math.nan if outcome.measured is None else metric.value(outcome.measured)
        row |= {f"seconds {phase}": outcome.seconds.get(phase, math.nan) for phase in phases}
        rows.append({**row, "refit verdict": outcome.refit_verdict, "error": outcome.reason})
    return rows


def ratio(value: float, dense: float) -> float:
    """Return value / dense; NaN if dense is 0."""
    return value / dense if dense else math.nan


def budget_rows(
    dense: Outcome, outcomes: Mapping[Cell, Outcome], metrics: Sequence[Metric], seed: int = 0
) -> list[Row]:
    """Return the table of one budget as text: the best in bold, ties marked, failures named.

    Args:
        dense: Outcome of the dense model.
        outcomes: Outcomes of one budget's cells.
        metrics: The columns.
        seed: Seed of the bootstrap.
    """
    assert dense.measured is not None
    rankings = {metric.name: rank_cells(outcomes, metric, seed) for metric in metrics}
    reference = {metric.name: metric.value(dense.measured) for metric in metrics}
    first: Row = {"method": "dense", "setting": "", "kept": "100 %"}
    first |= {metric.name: metric.shown(reference[metric.name]) for metric in metrics}
    rows = [{**first, "seconds": ""}]
    for cell, outcome in sorted(outcomes.items(), key=lambda pair: pair[0].method in UNRANKED):
        row: Row = {"method": cell.method + (", refit" if cell.refit else ""), "setting": str(cell.setting or "")}
        if outcome.measured is None:
            rows.append(
                {**row, "kept": "failed", **dict.fromkeys((metric.name for metric in metrics), "-"), "seconds": ""}
            )
            continue
        row["kept"] = f"{100 * outcome.kept:.1f} %"
        if cell.method in UNRANKED:
            row["kept"] = f"({100 * outcome.zeros:.0f} % zeros)"
        for metric in metrics:
            value = metric.value(outcome.measured)
            text = metric.shown(value)
            if metric.scale != "nats":
                text += f" ({_relation(value, reference[metric.name], metric)})"
            ranking = rankings[metric.name]
            if ranking is not None and cell == ranking.best:
                text = f"**{text}**"
            elif ranking is not None and cell in ranking.ties:
                text = f"{text} ≈"
            row[metric.name] = f"_{text}_" if cell.method in UNRANKED else text
        row["seconds"] = f"{sum(outcome.seconds.values()):.0f}"
        rows.append(row)
    return rows


def _relation(value: float, dense: float, metric: Metric) -> str:
    relation = ratio(value, dense)
    if math.isnan(relation):
        return "-"
    if metric.percent:
        return f"{100 * relation:.0f} %"
    return f"{relation:.2f}x" if relation < 1000 else f"{relation:.1e}x"


def winners_rows(
    outcomes: Mapping[Cell, Outcome], budgets: Iterable[Budget], metrics: Sequence[Metric], seed: int = 0
) -> list[Row]:
    """Return the best method at each budget, in each setting and in all, with its ties."""
    rows = []
    for budget in budgets:
        own = {cell: outcome for cell, outcome in outcomes.items() if cell.budget == budget}
        settings = list(dict.fromkeys(cell.setting for cell in own if cell.setting is not None))
        groups = {str(setting): {c: o for c, o in own.items() if c.setting in (setting, None)} for setting in settings}
        if len(groups) != 1:
            groups["any"] = own
        for name, group in groups.items():
            row: Row = {"budget": str(budget), "setting": name}
            for metric in metrics:
                ranking = rank_cells(group, metric, seed)
                row[metric.name] = "-" if ranking is None else _names(ranking, with_setting=name == "any")
            rows.append(row)
    return rows


def _names(ranking: Ranking, with_setting: bool) -> str:
    def name(cell: Cell) -> str:
        return f"{cell.method} ({cell.setting})" if with_setting and cell.setting else cell.method

    tied = ", ".join(sorted(name(cell) for cell in ranking.ties))
    return f"{name(ranking.best)}" + (f" ≈ {tied}" if tied else "")


def kinds_rows(dense: Outcome, outcomes: Mapping[Cell, Outcome], kinds: Sequence[str], seed: int = 0) -> list[Row]:
    """Return recall by relation kind at one budget as text (FASC, Table 6), marked as in :func:`budget_rows`."""
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in budget_rows(dense, outcomes, kind_metrics(kinds), seed)
    ]


def failure_lines(outcomes: Mapping[Cell, Outcome]) -> list[str]:
    """Return the reasons of failed cells, one line each."""
    return [f"{cell.name}: {outcome.reason}" for cell, outcome in outcomes.items() if outcome.measured is None]


def shown_perplexity(value: float) -> str:
    """Return a perplexity with its significant digits."""
    if value < 1000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def shown_nats(value: float) -> str:
    """Return a divergence with its significant digits."""
    if value < 0.01:
        return f"{value:.4f}"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"
