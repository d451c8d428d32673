"""Experts by rho: which of them hold knowledge, by the dependence of gradients on inputs, and what was kept of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from fasc_lightning.expert_views import split_name
from fasc_lightning.report import LayerReport


@dataclass(frozen=True)
class ExpertRow:
    """One expert.

    Attributes:
        experts: Name of its module.
        expert: Its number.
        tokens: That it saw in calibration.
        share: Of the tokens that all experts of its module saw.
        rho: Mean over its projections; NaN where none was measured.
        rho_debiased: Likewise.
        rank: Mean over its projections of rank over full rank; 1 if it is dense.
    """

    experts: str
    expert: int
    tokens: int
    share: float
    rho: float
    rho_debiased: float
    rank: float


def expert_rows(layers: Iterable[LayerReport]) -> list[ExpertRow]:
    """Return the experts among a report's layers, those of the highest debiased rho first, unmeasured ones last.

    Debiased, since plain rho rises as tokens get fewer, and experts differ in how many they see.
    """
    found: dict[tuple[str, int], list[LayerReport]] = defaultdict(list)
    for layer in layers:
        if (parts := split_name(layer.name)) is not None:
            found[parts[0], parts[1]].append(layer)
    totals: dict[str, int] = defaultdict(int)
    for (experts, _), projections in found.items():
        totals[experts] += _tokens(projections)
    rows = [
        ExpertRow(
            experts,
            expert,
            _tokens(projections),
            _tokens(projections) / max(1, totals[experts]),
            _mean(layer.rho for layer in projections),
            _mean(layer.rho_debiased for layer in projections),
            fmean(layer.rank / min(layer.shape) for layer in projections),
        )
        for (experts, expert), projections in found.items()
    ]
    return sorted(rows, key=lambda row: math.inf if math.isnan(row.rho_debiased) else -row.rho_debiased)


def expert_table(layers: Iterable[LayerReport], most: int = 20) -> str:
    """Return the first experts of :func:`expert_rows` as text; empty if there are none."""
    rows = expert_rows(layers)
    if not rows:
        return ""
    lines = [f"{'expert':<44}{'tokens':>9}{'share':>8}{'rho':>8}{'debiased':>10}{'rank':>7}"]
    lines += [
        f"{f'{row.experts}.{row.expert}'[-43:]:<44}{row.tokens:>9,}{row.share:>8.1%}{row.rho:>8.3f}"
        f"{row.rho_debiased:>10.3f}{row.rank:>7.2f}"
        for row in rows[:most]
    ]
    return "\n".join(lines)


def _tokens(projections: Iterable[LayerReport]) -> int:
    return max(layer.tokens for layer in projections)


def _mean(values: Iterable[float]) -> float:
    measured = [value for value in values if not math.isnan(value)]
    return fmean(measured) if measured else math.nan
