"""A summary of a history of rho as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from io import StringIO

import numpy as np

from fasc_lightning.dependence._emergence import check_emergence_options, emergence
from fasc_lightning.dependence._history import RhoHistory, RhoRow


def describe(history: RhoHistory, threshold: float = 0.3, observations: int = 3) -> str:
    """Return a summary as text: the last step, its highest layers, emerged layers and undefined values.

    Args:
        history: Observations.
        threshold: Threshold of the plain rho, as for :func:`emergence`.
        observations: Observations in a row, as for :func:`emergence`.

    Raises:
        ValueError: As :func:`emergence`.
    """
    check_emergence_options(threshold, observations)
    if not history:
        return "rho: nothing was observed"
    steps, last = history.steps, history.at()
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    lines = [
        f"rho of {counted(len(history.layers), 'layer')}: {counted(len(history), 'observation')} at "
        f"{counted(len(steps), 'step')} ({span})"
    ]
    defined = [row for row in last.values() if not np.isnan(row["rho"])]
    if defined:
        lines.append(f"at step {steps[-1]}: {_last_step(defined, threshold)}")
        if said := floors(defined, threshold):
            lines.append(said)
        lines.append(_highest_table(defined))
    else:
        lines.append(f"at step {steps[-1]} rho is defined for no layer")
    lines.append(_emerged(history, threshold, observations))
    undefined = [row for row in last.values() if np.isnan(row["rho"])]
    partly = [row for row in last.values() if not np.isnan(row["rho"]) and row["reason"]]
    for what, rows in (("undefined", undefined), ("undefined in part", partly)):
        if rows:
            lines.append(f"{what} at step {steps[-1]}: {counted(len(rows), 'layer')}: {reasons(rows)}")
    return "\n".join(lines)


def reasons(rows: Iterable[RhoRow]) -> str:
    """Return the reasons of undefined values as text, each with its number of rows."""
    found = Counter(row["reason"] or "no reason given" for row in rows)
    return ", ".join(f"{reason} ({count})" for reason, count in found.most_common())


def floors(rows: Sequence[RhoRow], threshold: float) -> str:
    """Return how many layers have an iid floor above the threshold, and what that means; "" if no layer has.

    Args:
        rows: Rows of one step.
        threshold: Threshold of the plain rho.
    """
    above = sum(row["iid_floor"] > threshold for row in rows)
    if not above:
        return ""
    return (
        f"the iid floor is above {threshold:g} in {_share(above, len(rows))}: there unrelated tokens alone give a rho "
        f"above {threshold:g}, which shows nothing. Read the debiased rho, or observe more tokens"
    )


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, as "1 layer" or "1,200 layers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _last_step(rows: Sequence[RhoRow], threshold: float) -> str:
    rho, null = (np.array([row[name] for row in rows]) for name in ("rho", "null"))
    debiased = np.array([row["debiased"] for row in rows])
    debiased = debiased[~np.isnan(debiased)]
    tested = ~np.isnan(null)
    parts = [f"mean rho {rho.mean():.3f}"]
    if debiased.size:
        parts.append(f"debiased mean {debiased.mean():.3f}, median {np.median(debiased):.3f}")
    parts.append(f"rho above {threshold:g} in {_share((rho > threshold).sum(), rho.size)}")
    above = int((rho > null)[tested].sum())
    parts.append(f"above its null in {_share(above, int(tested.sum()))}" if tested.any() else "no null")
    return "; ".join(parts)


def _share(count: int, total: int) -> str:
    return f"{count} of {counted(total, 'layer')} ({count / total:.1%})"


def _highest_table(rows: Sequence[RhoRow], count: int = 5) -> str:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="highest by debiased rho", title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in ("debiased", "95 % interval", "rho", "null", "iid floor", "tokens"):
        table.add_column(name, justify="right")
    ranked = sorted(rows, key=lambda row: -row["debiased"] if row["debiased"] == row["debiased"] else np.inf)
    for row in ranked[:count]:
        table.add_row(
            escape(row["layer"]),
            f"{row['debiased']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            f"{row['rho']:.3f}",
            f"{row['null']:.3f}",
            f"{row['iid_floor']:.3f}",
            f"{row['tokens']:,}",
        )
    console = Console(width=110, file=(text := StringIO()), force_terminal=False, force_jupyter=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def _emerged(history: RhoHistory, threshold: float, observations: int) -> str:
    found = emergence(history, threshold, observations)
    emerged = sorted(((step, layer) for layer, step in found.items() if step is not None), key=lambda pair: pair[0])
    criterion = (
        f"{counted(observations, 'observation')} in a row above {threshold:g} and above the null, the interval of the "
        "debiased rho above 0"
    )
    line = f"emerged ({criterion}): {len(emerged)} of {counted(len(found), 'layer')}"
    if not emerged:
        return line
    return "\n".join([f"{line}; first:", *(f"  step {step}: {layer}" for step, layer in emerged[:5])])
