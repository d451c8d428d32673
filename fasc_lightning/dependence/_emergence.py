"""Emergence: the step from which on a layer's rho stays above a threshold, its null and zero."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fasc_lightning.dependence._history import RhoHistory


def check_emergence_options(threshold: float, observations: int) -> None:
    """Check the options of :func:`emergence`.

    Raises:
        ValueError: If the threshold is outside [0, 1] or the number of observations is below 1.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"Expected a threshold of rho in [0, 1] but got {threshold}.")
    if observations < 1:
        raise ValueError(f"Expected emergence to need 1 observation or more but got {observations}.")


def emergence(history: RhoHistory, threshold: float = 0.3, observations: int = 3) -> dict[str, int | None]:
    """Return the step at which each layer emerges.

    It is the first step from which on ``observations`` consecutive observations of the layer all have rho above both
    the threshold and their own null, and the whole interval of the debiased rho above zero (``low`` > 0). Plain rho
    alone shows nothing: on few tokens chance takes it past any threshold (``iid_floor``). An undefined value does not
    count as above, so observations of fewer than eight sequences, which have no interval, show no emergence. Later
    observations do not matter: a layer that emerged may sink again.

    Args:
        history: Observations; a layer need not have one at every step.
        threshold: Threshold of the plain rho, in [0, 1].
        observations: Number of observations in a row, at least 1.

    Returns:
        The step of each layer; None for a layer that does not emerge.

    Raises:
        ValueError: If the threshold is not in [0, 1], or fewer than one observation is asked for.
    """
    check_emergence_options(threshold, observations)
    rho, null, low = (history.matrix(name) for name in ("rho", "null", "low"))
    seen = ~np.isnan(history.matrix("step"))
    above = (rho > threshold) & (rho > null) & (low > 0)
    steps = np.array(history.steps)
    return {
        layer: _first_run(steps[seen[i]].tolist(), above[i, seen[i]].tolist(), observations)
        for i, layer in enumerate(history.layers)
    }


def _first_run(steps: Sequence[int], above: Sequence[bool], length: int) -> int | None:
    """Return the step at which the first run of ``length`` observations begins."""
    run = 0
    for i, up in enumerate(above):
        run = run + 1 if up else 0
        if run == length:
            return steps[i - length + 1]
    return None
