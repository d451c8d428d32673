"""The gate: rho decides which layers get the expensive solver, and flags say where rho may mislead.

Shihab et al., FASC, sections 2.4 and 4.4, Appendix E and Table 8: layers above a threshold get the Fisher-aligned
solver, and the other layers get the activation SVD. The paper's threshold is 0.3, on plain rho.
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

#: The paper excludes the attention of blocks with an index below this.
EARLY_BLOCKS = 3
#: Names, across model families, of the attention and MLP layers that write a block's output.
OUTPUT_PROJECTIONS = frozenset(
    {"o_proj", "out_proj", "c_proj", "dense", "down_proj", "w_down", "fc2", "dense_4h_to_h", "wo", "w2", "fc_out"}
)
#: Gradients count as near-constant if their variance is at most this share of their second moment. The paper asks for
#: |Sigma_gg|_F < 1e-4, but that depends on the unit of the loss. At 1 % the mean is ten times as long as the typical
#: deviation from it, and rho, which is centred, sees the deviation alone.
NEAR_CONSTANT = 0.01


def choose_methods(
    scores: Mapping[str, float],
    gate: float | None,
    method: str = "fasc",
    exclude: str | Sequence[str] | None = None,
) -> dict[str, str]:
    """Return the solver of each layer: ``method`` above the gate, the cheap solver at and below it.

    A layer with an undefined score (NaN) gets ``method``, because nothing shows that the cheap solver is enough.

    Args:
        scores: rho or its debiased value by layer.
        gate: The threshold; None gives ``method`` to every layer.
        method: The expensive solver.
        exclude: Layers that get the cheap solver whatever their rho: patterns as for ``targets`` (``matches``), or
            "paper" (:func:`excluded_layers`).
    """
    if gate is None:
        return dict.fromkeys(scores, method)
    out = excluded_layers(scores, exclude)
    # NaN compares false, so undefined scores keep `method`.
    return {name: CHEAP_METHOD if name in out or score <= gate else method for name, score in scores.items()}


def statistics_needed(method: str, gate: float | None = None, gate_by: str = "debiased") -> frozenset[str]:
    """Return the statistics that the solvers and the gate of a compression need besides the means.

    Args:
        method: The solver above the gate.
        gate: The threshold, or None.
        gate_by: The score that is compared with the threshold; "pooled" needs C.
    """
    needs = solver_needs(method)
    if gate is None:
        return needs
    return needs | solver_needs(CHEAP_METHOD) | ({"C"} if gate_by == "pooled" else set())


def gate_scores(
    gate_by: str, rows: Mapping[str, RhoRow], layers: Mapping[str, nn.Module], moments: CalibrationMoments
) -> dict[str, float]:
    """Return each layer's score for the gate.

    Args:
        gate_by: "debiased", "rho" or "pooled".
        rows: Minibatch scores by layer.
        layers: The layers.
        moments: Their moments; "pooled" is NaN for layers without cross moments.
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
    """Return the layers that an exclusion takes out of the gate.

    Args:
        names: All targeted layers; "paper" looks for the last block among them.
        exclude: Patterns, None, or "paper", also as one item of a list. "paper" means the attention layers of blocks 0
            to 2 and the output projections of the last block: in the paper they score high and gain nothing (Appendix
            E).

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
    """Return the attention layers of the first three blocks: a part of their name holds "attn" or "attention"."""
    return {
        name
        for name in names
        if (block := block_of(name)) is not None
        and block[1] < EARLY_BLOCKS
        and any("attn" in part or "attention" in part for part in name.lower().split("."))
    }


def last_projections(names: Iterable[str]) -> set[str]:
    """Return the output projections of the last block by name; a model with several stacks has several."""
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
    """Return for each layer which of the paper's three failure modes of rho apply (Appendix E), often none.

    "near-constant gradients": the centred second moment of h is at most 1 % of the uncentred one, or h is zero. This
    limit is relative; the paper's 1e-4 is absolute (:data:`NEAR_CONSTANT`). "early attention" and "last projection"
    follow from the name. A layer that no gradient reached is judged by its name alone.

    Args:
        names: All targeted layers.
        moments: Their moments, not yet released; layers without moments are judged by their names alone.
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
    """Return the share of variance in a second moment, tr(Cov) / tr(E[h h^T]), in [0, 1]; 0 if all vectors are zero.

    Args:
        moments: Moments of at least one vector.
    """
    second = moments.mean_square()
    if second == 0:
        return 0.0
    first = moments.mean().double().square().sum()
    return float((1 - first / second).clamp(0, 1))
