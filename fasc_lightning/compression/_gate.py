"""The gate: which layers get the expensive solver, decided by rho, and where rho is not to be trusted.

Shihab et al., FASC, sections 2.4 and 4.4, Appendix E and Table 8: layers above a threshold get the Fisher-aligned
solver, the others the activation SVD. The paper's threshold is 0.3, on plain rho.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from torch import nn

from fasc_lightning._utils import block_of
from fasc_lightning.dependence import RhoRow, pooled_rho
from fasc_lightning.distributed import whole
from fasc_lightning.layers import linear_weight, matches
from fasc_lightning.options import CHEAP_METHOD, PAPER
from fasc_lightning.solvers import solver_needs
from fasc_lightning.statistics import CalibrationMoments, Moments

#: Blocks whose attention the paper excludes: their index is below this.
EARLY_BLOCKS = 3
#: Names of layers that write a block's output back: of attention and MLP, across model families.
OUTPUT_PROJECTIONS = frozenset(
    {"o_proj", "out_proj", "c_proj", "dense", "down_proj", "w_down", "fc2", "dense_4h_to_h", "wo", "w2", "fc_out"}
)
#: Share of the gradients' second moment that is variation, under which they count as near-constant. The paper asks
#: for |Sigma_gg|_F < 1e-4, but gradients have no scale of their own: another loss unit, another answer. At 1 % their
#: mean is ten times as long as their typical deviation from it, and rho, which is centred, rests on the small rest.
NEAR_CONSTANT = 0.01


def choose_methods(
    scores: Mapping[str, float],
    gate: float | None,
    method: str = "fasc",
    exclude: str | Sequence[str] | None = None,
) -> dict[str, str]:
    """Return the solver of each layer: ``method`` above the gate, the cheap one at and below it.

    A layer whose score is undefined (NaN) gets ``method``: nothing speaks for saving there.

    Args:
        scores: rho or its debiased value by layer.
        gate: The threshold; None gives ``method`` to every layer.
        method: The expensive solver.
        exclude: Layers that rho does not decide, and that the cheap solver serves: patterns as for ``targets``
            (``matches``), or "paper" (:func:`excluded_layers`).
    """
    if gate is None:
        return dict.fromkeys(scores, method)
    out = excluded_layers(scores, exclude)
    # Written so that NaN passes.
    return {name: CHEAP_METHOD if name in out or score <= gate else method for name, score in scores.items()}


def statistics_needed(method: str, gate: float | None = None, gate_by: str = "debiased") -> frozenset[str]:
    """Return which statistics a compression gathers besides the means, for its solvers and its gate.

    Args:
        method: The solver above the gate.
        gate: The threshold, or None.
        gate_by: What is compared with it; "pooled" needs C.
    """
    needs = solver_needs(method)
    if gate is None:
        return needs
    return needs | solver_needs(CHEAP_METHOD) | ({"C"} if gate_by == "pooled" else set())


def gate_scores(
    gate_by: str, rows: Mapping[str, RhoRow], layers: Mapping[str, nn.Module], moments: CalibrationMoments
) -> dict[str, float]:
    """Return what the gate goes by.

    Args:
        gate_by: "debiased", "rho" or "pooled".
        rows: Of the minibatch scores, by layer.
        layers: The layers.
        moments: Theirs; "pooled" is NaN where they have no cross moments.
    """
    if gate_by != "pooled":
        column: Literal["rho", "debiased"] = "rho" if gate_by == "rho" else "debiased"
        return {name: row[column] for name, row in rows.items()}
    return {
        name: pooled_rho(moments.layer(name), whole(linear_weight(layer).detach())).item()
        if "C" in moments.needs and moments.tokens(name)
        else math.nan
        for name, layer in layers.items()
    }


def excluded_layers(names: Iterable[str], exclude: str | Sequence[str] | None) -> set[str]:
    """Return the layers that an exclusion takes from the gate.

    Args:
        names: All targeted layers; "paper" looks for the last block among them.
        exclude: Patterns, None, or "paper": attention layers of blocks 0 to 2 and the output projections of the last
            block, which the paper found to score high without gaining (Appendix E). It may also stand in a list.

    Raises:
        ValueError: If a pattern other than "paper" matches no layer.
    """
    names = list(names)
    patterns = [exclude] if isinstance(exclude, str) else list(exclude or ())
    excluded: set[str] = set()
    for pattern in patterns:
        if pattern == PAPER:
            excluded |= early_attention(names) | last_projections(names)
            continue
        found = {name for name in names if matches(name, pattern if isinstance(exclude, str) else [pattern])}
        if not found:
            raise ValueError(
                f"Expected `gate_exclude` to match targeted layers but {pattern!r} matches none of the {len(names)} "
                f"(for example {', '.join(names[:3])})."
            )
        excluded |= found
    return excluded


def early_attention(names: Iterable[str]) -> set[str]:
    """Return the attention layers of the first three blocks, by name: a part of it holds "attn" or "attention"."""
    return {
        name
        for name in names
        if (block := block_of(name)) is not None
        and block[1] < EARLY_BLOCKS
        and any("attn" in part or "attention" in part for part in name.lower().split("."))
    }


def last_projections(names: Iterable[str]) -> set[str]:
    """Return the output projections of the last block, by name; of each stack, where a model has several."""
    blocks = {name: block for name in names if (block := block_of(name)) is not None}
    last: dict[str, int] = {}
    for stack, index in blocks.values():
        last[stack] = max(index, last.get(stack, index))
    return {
        name
        for name, (stack, index) in blocks.items()
        if index == last[stack] and name.rsplit(".", 1)[-1] in OUTPUT_PROJECTIONS
    }


def failure_flags(names: Iterable[str], moments: CalibrationMoments) -> dict[str, tuple[str, ...]]:
    """Return why rho may mislead on each layer: the paper's three failure modes (Appendix E), often none.

    "near-constant gradients": the centred second moment of h is at most 1 % of the uncentred one, or h is zero. That
    is relative, where the paper's 1e-4 is absolute (:data:`NEAR_CONSTANT`). "early attention" and "last projection" go
    by name. A layer that no gradient reached has no gradients to judge.

    Args:
        names: All targeted layers.
        moments: Theirs, not yet released; of those whose moments are not there only the names are judged.
    """
    names = list(names)
    seen = [name for name in names if name in moments.shapes and moments.tokens(name)]
    constant = {name for name in seen if variation(moments.gradients[name]) <= NEAR_CONSTANT}
    kinds = {
        "near-constant gradients": constant,
        "early attention": early_attention(names),
        "last projection": last_projections(names),
    }
    return {name: tuple(kind for kind, members in kinds.items() if name in members) for name in names}


def variation(moments: Moments) -> float:
    """Return the share of a second moment that is variance, tr(Cov) / tr(E[h h^T]), in [0, 1]; 0 for nothing but zeros.

    Args:
        moments: Of at least one vector.
    """
    second = moments.mean_square()
    if second == 0:
        return 0.0
    first = moments.mean().double().square().sum()
    return float((1 - first / second).clamp(0, 1))
