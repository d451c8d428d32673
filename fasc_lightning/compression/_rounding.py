"""Rounding of layers to few bits, with one budget of bytes for all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from fasc_lightning._utils import Progress
from fasc_lightning.compression._allocation import StorageOptions, spend, spend_evenly
from fasc_lightning.compression._budget import FLOAT_BYTES
from fasc_lightning.compression._build import CompressionResult, LayerChoice, check_reached
from fasc_lightning.compression._loss_correction import LossEstimator, correction
from fasc_lightning.compression._objective import fisher_metric
from fasc_lightning.distributed import whole
from fasc_lightning.layers import (
    Grid,
    Rounded,
    linear_shape,
    linear_weight,
    rounded_layer,
    set_trainable,
    trains_weight,
)
from fasc_lightning.rounding import round_by_moments, to_nearest
from fasc_lightning.statistics import BorrowedMoments, CalibrationMoments


@dataclass(frozen=True)
class RoundedWeight:
    """One layer's matrix on a grid.

    Attributes:
        weight: The matrix.
        loss: J, in nats squared per token; NaN if no gradient, or only zeros, reached the layer.
    """

    weight: Rounded
    loss: float

    @property
    def nbytes(self) -> int:
        """Bytes of the stored matrix."""
        return self.weight.grid.nbytes(*self.weight.codes.shape)


@dataclass
class RoundedLayers:
    """Layers on one or several grids, and the facts about them that outlive their moments.

    Attributes:
        weights: The matrix of each layer on each grid, by ascending bytes.
        tokens: Number of tokens in each layer's statistics; 0 if no gradient came.
    """

    weights: dict[str, list[RoundedWeight]]
    tokens: dict[str, int]

    def join(self, other: RoundedLayers) -> RoundedLayers:
        """Return these layers and others together."""
        return RoundedLayers({**self.weights, **other.weights}, {**self.tokens, **other.tokens})


def round_layers(
    layers: Mapping[str, nn.Module],
    moments: CalibrationMoments,
    grids: Sequence[Grid],
    *,
    calibrated: bool = True,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    consume: bool = True,
) -> RoundedLayers:
    """Round layers one after the other to one or several grids; the layers themselves are only read.

    A layer that no gradient, or only zeros, reached is rounded to the nearest numbers.

    Args:
        layers: The targeted layers by name.
        moments: Their moments, coupled or plain.
        grids: The grids.
        calibrated: Whether to round by the moments; False rounds to the nearest numbers and only computes their J.
        device: The device that rounds.
        progress: Wraps the loop over layers.
        consume: Whether to free each layer's moments after use.

    Raises:
        ValueError: If a weight is not finite.
    """
    progress = progress or (lambda names, description: names)
    tokens = {name: moments.tokens(name) for name in layers}
    borrowed = BorrowedMoments(moments, layers)
    borrowed.say()
    found: dict[str, list[RoundedWeight]] = {}
    for name in progress(list(layers), "Rounding"):
        W = whole(linear_weight(layers[name]).detach()).to(device)
        statistics = borrowed.layer(name).to(device) if tokens[name] else None
        if statistics is None or not bool(statistics.plain_moments()[1].diagonal().any()):
            results = [RoundedWeight(to_nearest(W.float(), grid), math.nan) for grid in grids]
        else:
            A, G = fisher_metric(statistics)
            plain = statistics.plain_moments()[0] if statistics.is_coupled else None
            pairs = round_by_moments(W, A, G, grids, plain=plain, calibrated=calibrated)
            results = [RoundedWeight(*pair) for pair in pairs]
        del statistics  # as large as the moments themselves
        found[name] = sorted((_held(result, moments.device) for result in results), key=lambda r: r.nbytes)
        if consume:
            moments.release(name)
    return RoundedLayers(found, tokens)


def build_rounded(
    layers: Mapping[str, nn.Module],
    rounded: RoundedLayers,
    *,
    method: str,
    budget: int | None = None,
    uniform: bool = False,
    measure: LossEstimator | None = None,
    progress: Progress | None = None,
) -> CompressionResult:
    """Choose a grid for each layer under one budget of bytes, and build the layers; the layers are only read.

    The sum of the layers' losses J is minimised (:func:`~fasc_lightning.compression._allocation.spend`). With
    ``measure``, J is then measured on tokens, each layer's losses are corrected by the result, and the budget is spent
    again.

    Args:
        layers: The targeted layers by name.
        rounded: These layers on the grids to choose from. The call empties it.
        method: Name of the metric's solver, for the report.
        budget: Bytes that the layers' matrices may take, numbers in floating point at 16 bits; None takes each layer's
            only grid.
        uniform: Whether all layers get the same bits, the most that the budget holds, whatever their losses.
        measure: Measures J of rounded layers on tokens.
        progress: Wraps the loop over layers.

    Raises:
        RuntimeError: If no gradient reached any layer.
        ValueError: If the budget does not hold the smallest grid in every layer.
    """
    progress = progress or (lambda names, description: names)
    check_reached(rounded.tokens, bool(_judged(rounded)))
    chosen = dict.fromkeys(layers, 0) if budget is None else _allocate(layers, rounded, budget, uniform, {})
    if budget is not None and measure is not None and not uniform:
        chosen = _allocate(layers, rounded, budget, uniform, _corrections(rounded, chosen, measure))
    _warn_unreached(rounded, chosen)
    replacements: dict[str, nn.Module] = {}
    choices = []
    for name in progress(list(layers), "Building"):
        module, options = layers[name], rounded.weights.pop(name)
        shape = linear_shape(module)
        choice = LayerChoice(name, shape, min(shape), "dense", rounded.tokens[name], 0.0, method)
        if chosen[name] < len(options):
            option = options[chosen[name]]
            new = rounded_layer(module, option.weight).train(module.training)
            replacements[name] = set_trainable(new, trains_weight(module))
            loss = 0.0 if math.isnan(option.loss) else option.loss
            choice = replace(choice, loss=loss, form=option.weight.grid)
        choices.append(choice)
    return CompressionResult(replacements, choices)


def _judged(rounded: RoundedLayers) -> dict[str, list[RoundedWeight]]:
    """Return the layers whose losses are known."""
    return {name: options for name, options in rounded.weights.items() if not math.isnan(options[0].loss)}


def _allocate(
    layers: Mapping[str, nn.Module],
    rounded: RoundedLayers,
    budget: int,
    uniform: bool,
    corrections: Mapping[str, float],
) -> dict[str, int]:
    """Return the index of each layer's grid; the number of its grids stands for a dense layer."""
    most = max(rounded.tokens.values())
    options: dict[str, StorageOptions] = {}
    for name, weights in rounded.weights.items():
        m, n = linear_shape(layers[name])
        # Losses are means over the layer's tokens; layers that see fewer tokens weigh less in the model's loss.
        weight = corrections.get(name, 1.0) * rounded.tokens[name] / most
        losses = [0.0 if math.isnan(option.loss) else weight * option.loss for option in weights]
        costs = [option.nbytes for option in weights]
        options[name] = StorageOptions(np.array([*costs, FLOAT_BYTES * m * n]), np.array([*losses, 0.0]))
    least = sum(int(o.costs.min()) for o in options.values())
    if budget < least:
        raise ValueError(f"Expected a size of at least {least:,} bytes for the targeted layers but got {budget:,}.")
    chosen = dict(zip(options, spend_evenly(list(options.values()), budget), strict=True))
    if uniform:
        return chosen
    # A layer whose loss is not known keeps the bits that all layers could have: nothing tells whether it needs fewer.
    judged = _judged(rounded)
    left = budget - sum(int(o.costs[chosen[name]]) for name, o in options.items() if name not in judged)
    return chosen | dict(zip(judged, spend([options[name] for name in judged], left), strict=True))


def _corrections(rounded: RoundedLayers, chosen: Mapping[str, int], measure: LossEstimator) -> dict[str, float]:
    """Return the factor by which each layer's losses are off at the chosen grids."""
    options = {name: rounded.weights[name][i] for name, i in chosen.items() if i < len(rounded.weights[name])}
    measured = measure({name: option.weight for name, option in options.items() if option.loss > 0})
    # Codes follow the tokens less than factors do: over the layers of SmolLM2-135M, J of the fitted tokens and of other
    # text go together (their logarithms correlate by 0.98).
    return {name: correction(options[name].loss, loss, trust=1.0) for name, loss in measured.items()}


def _held(result: RoundedWeight, device: torch.device) -> RoundedWeight:
    """Return a result on the device where it waits for the other layers."""
    weight = result.weight

    def moved(value: Tensor) -> Tensor:
        return value.to(device)

    return replace(
        result,
        weight=replace(weight, codes=moved(weight.codes), scale=moved(weight.scale), zero=moved(weight.zero)),
    )


def _warn_unreached(rounded: RoundedLayers, chosen: Mapping[str, int]) -> None:
    judged = _judged(rounded)
    names = [name for name, options in rounded.weights.items() if name not in judged and chosen[name] < len(options)]
    if names:
        rank_zero_warn(
            f"{len(names)} of {len(rounded.weights)} layers are rounded to the nearest numbers because no gradient (or "
            f"only zeros) reached them in calibration: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}."
        )
