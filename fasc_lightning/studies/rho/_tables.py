"""Tables of ``recipes/study_rho.py``: pure functions from rows of layers to rows of groups of layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fasc_lightning._utils import Row, correlate
from fasc_lightning.studies.rho._gather import Observation
from fasc_lightning.studies.rho._subspaces import random_angles

#: The three scores: columns of a layer's row, and their labels.
SCORES = {"rho": "rho, minibatches", "pooled": "rho, pooled (Eq. 2)", "debiased": "debiased rho"}
GAINS = {"heldout_gain": "on held-out windows", "predicted_gain": "predicted"}


def layer_row(
    observation: Observation, shape: tuple[int, int], rank: int, flags: Sequence[str], comparison: Mapping[str, float]
) -> Row:
    """Return the row of one layer.

    Args:
        observation: Its scores on all tokens.
        shape: (m, n).
        rank: Rank at which the solvers are compared.
        flags: Reasons why its rho may mislead.
        comparison: "predicted_gain", "heldout_gain" and "median_angle", if they were measured.
    """
    scores: Row = {name: value for name, value in observation.row.items() if name != "step"}
    undefined = dict.fromkeys((*GAINS, "median_angle"), math.nan)
    return {
        "kind": observation.row["layer"].rsplit(".", 1)[-1],
        **scores,
        "pooled": observation.pooled,
        "m": shape[0],
        "n": shape[1],
        "rank": rank,
        "flags": "; ".join(flags),
        **undefined,
        **comparison,
    }


def profile_table(rows: Sequence[Row]) -> list[Row]:
    """Return rho by kind of layer."""
    return [
        {
            "kind": kind,
            "layers": len(group),
            **_scores(group),
            "null (median)": median(row["null"] for row in group),
            "rho above null": sum(row["rho"] > row["null"] for row in group),
            "undefined": sum(math.isnan(row["rho"]) for row in group),
            "flagged": sum(bool(row["flags"]) for row in group),
        }
        for kind, group in by_kind(rows).items()
    ]


def sizes_table(observed: Mapping[int, Mapping[str, Observation]]) -> list[Row]:
    """Return medians of the scores over layers, by number of tokens (FASC, Appendix E)."""
    return [
        {
            "tokens": size,
            **{f"{score} (median)": median(of_layers(layers, score)) for score in SCORES},
            "null (median)": median(of_layers(layers, "null")),
            "width of the 95 % interval (median)": median(of_layers(layers, "high") - of_layers(layers, "low")),
        }
        for size, layers in observed.items()
    ]


def size_correlations(observed: Mapping[int, Mapping[str, Observation]]) -> list[Row]:
    """Return Pearson's r between the scores at every two sizes, across layers."""
    return [
        {
            "score": label,
            "tokens": size,
            **{
                f"r with {other:,}": correlate(of_layers(layers, score), of_layers(others, score)).r
                for other, others in observed.items()
            },
        }
        for score, label in SCORES.items()
        for size, layers in observed.items()
    ]


def of_layers(layers: Mapping[str, Observation], name: str) -> NDArray[np.float64]:
    """Return one number of every layer, shape (layers,): "pooled", or a column of the rows."""
    return np.array([o.pooled if name == "pooled" else dict(o.row)[name] for o in layers.values()], dtype=np.float64)


def gains_table(rows: Sequence[Row]) -> list[Row]:
    """Return the gain of fasc over svd by kind of layer, as log10 of the ratio of losses."""
    return [
        {
            "kind": kind,
            "layers": len(group),
            **_scores(group),
            **{f"gain {label} (median)": median(row[gain] for row in group) for gain, label in GAINS.items()},
            "fasc better, held out": sum(row["heldout_gain"] > 0 for row in group),
        }
        for kind, group in by_kind(rows).items()
    ]


def correlations_table(rows: Sequence[Row]) -> list[Row]:
    """Return correlations of each score with each gain, over all layers and over layers without a flag."""
    groups = {"all": rows, "not flagged": [row for row in rows if not row["flags"]]}
    table = []
    for gain, gain_label in GAINS.items():
        for which, group in groups.items():
            for score, label in SCORES.items():
                found = correlate([row[score] for row in group], [row[gain] for row in group])
                table.append(
                    {
                        "gain": gain_label,
                        "layers": which,
                        "score": label,
                        "count": found.pairs,
                        "Pearson r": found.r,
                        "p": found.p,
                        "Spearman r": found.rank_r,
                        "p of it": found.rank_p,
                    }
                )
    return table


def divisions(scores: Mapping[str, float], threshold: float) -> dict[str, tuple[list[str], list[str]]]:
    """Return layers with high and with low scores: "fifths", top and bottom, and "threshold" if both sides have layers.

    Args:
        scores: Scores by layer; NaN is left out.
        threshold: Layers above it are high.
    """
    defined = {name: score for name, score in scores.items() if not math.isnan(score)}
    ranked = sorted(defined, key=lambda name: defined[name])
    fifth = math.ceil(len(ranked) / 5)
    found = {"fifths": (ranked[len(ranked) - fifth :], ranked[:fifth])}
    high = [name for name in ranked if defined[name] > threshold]
    low = [name for name in ranked if defined[name] <= threshold]
    if high and low:
        found["threshold"] = (high, low)
    return found


def angles_table(
    divided: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    angles: Mapping[str, ArrayLike],
    spaces: Mapping[str, tuple[int, int]],
) -> list[Row]:
    """Return quartiles of the principal angles in groups of layers, beside the median of random subspaces.

    Args:
        divided: The result of :func:`divisions`.
        angles: Angles of each layer, in degrees.
        spaces: For each layer the dimension of its inputs and of the subspaces.
    """
    unrelated = {space: random_angles(*space).tolist() for space in sorted(set(spaces.values()))}
    table = []
    for division, sides in divided.items():
        for side, members in zip(("high", "low"), sides, strict=True):
            found = np.concatenate([np.asarray(angles[name]) for name in members] or [np.array([math.nan])])
            lower, middle, upper = np.quantile(found, [0.25, 0.5, 0.75]).tolist()
            table.append(
                {
                    "division": division,
                    "debiased rho": side,
                    "layers": len(members),
                    "lower quartile": lower,
                    "median": middle,
                    "upper quartile": upper,
                    "median of random subspaces": median(a for name in members for a in unrelated[spaces[name]]),
                }
            )
    return table


def median(values: Iterable[float]) -> float:
    """Return the median of the defined values, or NaN."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.median(defined)) if defined else math.nan


def by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return rows by the kind of their layer, in order of appearance."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    return kinds


def _scores(rows: Sequence[Row]) -> Row:
    return {f"{score} (median)": median(row[score] for row in rows) for score in SCORES}
