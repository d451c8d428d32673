"""Magnitude pruning: zeros instead of the smallest weights."""

from __future__ import annotations

import math
import time
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import L1Unstructured

from fasc_lightning.layers import select_layers
from fasc_lightning.studies.pruning._types import PruningResult, check_keep, count_weights


@torch.no_grad()
def prune_magnitude(
    model: nn.Module,
    keep: float,
    scope: Literal["uniform", "global"] = "uniform",
    targets: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
) -> PruningResult:
    """Set the weights of smallest absolute value to zero, in place.

    The method is that of Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks". It is
    unstructured: every layer keeps its shape and memory, and a dense matrix product its cost. A comparison shows the
    quality at a number of nonzero weights. ``torch.nn.utils.prune.L1Unstructured`` computes the masks; no hook, copy or
    mask stays on the model. All masks are made before the first weight changes, so a failure leaves the model
    unchanged.

    Args:
        model: Any model, changed in place.
        keep: The largest fraction of the targeted layers' weights that stays nonzero.
        scope: "uniform" prunes the same fraction of every layer, "global" the smallest weights of all layers together.
        targets: Patterns as for ``select_layers``.
        exclude: Patterns of layers to leave alone.

    Returns:
        The figures of the pruning: ``parameters_after`` equals ``parameters_before``, and ``zeros`` counts the pruned
        weights.

    Raises:
        TypeError: If ``keep`` is not a number.
        ValueError: If an option is out of range, or nothing is selected.
        FloatingPointError: If a weight is not finite.
    """
    check_keep(keep)
    if scope not in ("uniform", "global"):
        raise ValueError(f"Expected `scope` to be 'uniform' or 'global' but got {scope!r}.")
    start = time.perf_counter()
    layers = select_layers(model, targets, exclude)
    weights: list[Tensor] = [layer.weight for layer in layers.values()]  # type: ignore[misc]
    for name, weight in zip(layers, weights, strict=True):
        if not weight.isfinite().all():
            raise FloatingPointError(
                f"Expected finite weights but {name!r} holds some that are not: they have no rank."
            )
    for weight, mask in zip(weights, _masks(weights, keep, scope), strict=True):
        weight.mul_(mask)
    parameters, zeros = count_weights(layers.values())
    seconds = time.perf_counter() - start
    return PruningResult("magnitude", keep, parameters, parameters, zeros, passes=0, tokens=0, seconds=seconds)


def _masks(weights: list[Tensor], keep: float, scope: str) -> list[Tensor]:
    """Return 0 for the weights to prune and 1 for the others."""
    if scope == "uniform":
        return [_mask(weight, keep) for weight in weights]
    # One dtype and device for the comparison; a mask takes its weight's when the two are multiplied.
    flat = torch.cat([weight.float().flatten().cpu() for weight in weights])
    parts = _mask(flat, keep).split([weight.numel() for weight in weights])
    return [part.view_as(weight).to(weight) for part, weight in zip(parts, weights, strict=True)]


def _mask(weight: Tensor, keep: float) -> Tensor:
    pruned = weight.numel() - math.floor(keep * weight.numel())
    return L1Unstructured(amount=pruned).compute_mask(weight, torch.ones_like(weight))
