"""Experts ranked by rho, the dependence of gradients on inputs, with their tokens and kept ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from fasc_lightning._utils import table_text
from fasc_lightning.layers import split_name
from fasc_lightning.statistics import borrows

if TYPE_CHECKING:
    from fasc_lightning.compression._layer_report import LayerReport

#: Number of experts in a report's summary.
SHOWN = 5


@dataclass(frozen=True)
class ExpertRow:
    """One expert.

    Attributes:
        experts: Name of the module that holds the expert.
        expert: Index of the expert in the module.
        tokens: Tokens that reached it in calibration.
        share: Its share of the tokens of all targeted experts in its module.
        rho: Mean over its projections; NaN if none was measured.
        rho_debiased: Mean of the debiased scores, as ``rho``.
        rank: Mean of rank / full rank over its projections; 1 if it is dense.
    """

    experts: str
    expert: int
    tokens: int
    share: float
    rho: float
    rho_debiased: float
    rank: float


def expert_rows(layers: Iterable[LayerReport]) -> list[ExpertRow]:
    """Return the experts among a report's layers, the highest debiased rho first and unmeasured experts last.

    The order is by debiased rho because plain rho rises as tokens get fewer, and experts see different numbers of
    tokens.
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
    """Return the experts of a report as a table, the highest debiased rho first; empty without experts.

    Args:
        layers: ``report.layers``.
        most: Number of rows at most.
    """
    rows = expert_rows(layers)
    if not rows:
        return ""
    shown = [
        {
            "expert": f"{row.experts}.{row.expert}",
            "tokens": row.tokens,
            "share": row.share,
            "rho": row.rho,
            "rho debiased": row.rho_debiased,
            "rank / full": row.rank,
        }
        for row in rows[:most]
    ]
    return table_text(f"knowledge-heavy experts by debiased rho, {len(shown)} of {len(rows)}", shown, width=110)


def expert_summary(layers: Iterable[LayerReport]) -> list[str]:
    """Return the summary's lines on experts: how many tokens reached them, and the first experts by rho."""
    layers = list(layers)
    rows = expert_rows(layers)
    if not rows:
        return []
    counts = [row.tokens for row in rows]
    line = (
        f"{len(rows)} experts in {len({row.experts for row in rows})} modules: {min(counts):,} to {max(counts):,} "
        f"tokens an expert, {fmean(counts):,.0f} on average"
    )
    borrowed = [layer.name for layer in layers if borrows(layer.name, layer.tokens, layer.shape)]
    if borrowed:
        line += f"; {len({name.rpartition('.')[0] for name in borrowed})} saw few and borrow from their block's"
    if unseen := counts.count(0):
        rounded = any(layer.tokens == 0 and layer.bits is not None for layer in layers)
        line += f"; {unseen} saw none and {'are rounded to the nearest' if rounded else 'stay dense'}"
    return [line, expert_table(layers, SHOWN)]


def _tokens(projections: Iterable[LayerReport]) -> int:
    return max(layer.tokens for layer in projections)


def _mean(values: Iterable[float]) -> float:
    measured = [value for value in values if not math.isnan(value)]
    return fmean(measured) if measured else math.nan
