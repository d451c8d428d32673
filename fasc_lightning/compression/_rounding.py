"""Rounding of layers to few bits, and low ranks in int8, with one budget of bytes for all layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from fasc_lightning._utils import FreedMemory, Progress
from fasc_lightning.compression._allocation import StorageOptions, allocate, spend_evenly
from fasc_lightning.compression._budget import FLOAT_BYTES
from fasc_lightning.compression._build import CompressionResult, LayerChoice, check_reached, factored_layer
from fasc_lightning.compression._loss_correction import LossEstimator, correction
from fasc_lightning.compression._objective import fisher_metric
from fasc_lightning.compression._stored_weight import (
    LowRankWeight,
    ResidualWeight,
    RoundedWeight,
    StoredWeight,
    low_rank_bytes,
)
from fasc_lightning.distributed import whole
from fasc_lightning.layers import (
    CompressedLinear,
    Grid,
    Rounded,
    linear_shape,
    linear_weight,
    quantized_layer,
    residual_layer,
    rounded_layer,
    set_trainable,
    trains_weight,
)
from fasc_lightning.rounding import round_by_moments, to_nearest
from fasc_lightning.solvers import Factorization, leading, two_sided
from fasc_lightning.statistics import BorrowedMoments, CalibrationMoments, SecondMoment

#: Ranks beside bits are multiples of this: the matrices of fewer bytes differ little.
RANK_STEP = 8

#: Ranks of a residual, and the most bits that may have one.
RESIDUAL_RANKS = (8, 16, 32, 64)
RESIDUAL_BITS = 4


@dataclass
class RoundedLayers:
    """Layers on one or several grids, and the facts about them that outlive their moments.

    Attributes:
        weights: The matrix of each layer on each grid, by ascending bytes.
        tokens: Number of tokens in each layer's statistics; 0 if no gradient came.
        ranks: Low ranks, and grids with a residual, that lose less than any other way of as few bytes.
    """

    weights: dict[str, list[RoundedWeight]]
    tokens: dict[str, int]
    ranks: dict[str, list[LowRankWeight | ResidualWeight]] = field(default_factory=dict)

    def leave_out(self, names: Iterable[str]) -> None:
        """Drop layers, which are then no part of the compression."""
        tables: tuple[dict[str, Any], ...] = (self.weights, self.tokens, self.ranks)
        for name in names:
            for table in tables:
                table.pop(name, None)

    def join(self, other: RoundedLayers) -> RoundedLayers:
        """Return these layers and others together."""
        return RoundedLayers(
            {**self.weights, **other.weights}, {**self.tokens, **other.tokens}, {**self.ranks, **other.ranks}
        )

    def options(self, name: str) -> list[StoredWeight]:
        """Return all ways to store a layer's matrix, by ascending bytes."""
        return sorted([*self.weights[name], *self.ranks.get(name, ())], key=lambda option: option.nbytes)


def round_layers(
    layers: Mapping[str, nn.Module],
    moments: CalibrationMoments,
    grids: Sequence[Grid],
    *,
    calibrated: bool = True,
    low_rank: bool = False,
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
        low_rank: Whether to offer low ranks and residuals in int8, too.
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
    ranks: dict[str, list[LowRankWeight | ResidualWeight]] = {}
    freed = FreedMemory()
    for name in progress(list(layers), "Rounding"):
        W = whole(linear_weight(layers[name]).detach()).to(device).float()
        statistics = borrowed.layer(name).to(device) if tokens[name] else None
        if statistics is None or not bool(statistics.plain_moments()[1].diagonal().any()):
            found[name] = _held([(to_nearest(W, grid), math.nan) for grid in grids], moments.device)
        else:
            A, G = fisher_metric(statistics)
            found[name] = _held(round_by_moments(W, A, G, grids, calibrated=calibrated), moments.device)
            if low_rank:
                ranks[name] = _with_ranks(W, A, G, found[name], moments.device)
            del A, G
        del statistics  # as large as the moments themselves
        if consume:
            moments.release(name)
            freed.add(torch.float64.itemsize * math.prod(linear_shape(layers[name])))
    return RoundedLayers(found, tokens, ranks)


def _with_ranks(
    W: Tensor, A: SecondMoment, G: SecondMoment, grids: Sequence[RoundedWeight], device: torch.device
) -> list[LowRankWeight | ResidualWeight]:
    """Return the low ranks, and the grids with a residual, that lose less than any other way of as few bytes.

    Ranks of no fewer bytes than the costliest grid are left out: the bits of a full rank lose next to nothing there.
    """
    m, n = W.shape
    most = max(grid.nbytes for grid in grids)

    def cut(found: Factorization, ranks: Iterable[int]) -> list[tuple[Tensor, Tensor, float]]:
        return [(*found.truncate(k), float(found.losses[k])) for k in ranks]

    ranks = [k for k in range(RANK_STEP, min(m, n), RANK_STEP) if low_rank_bytes(m, n, k) < most]
    ways: list[StoredWeight] = [*grids, *(LowRankWeight(*parts) for parts in cut(two_sided(W, A, G), ranks))]
    few = [k for k in RESIDUAL_RANKS if k < min(m, n)]
    for grid in grids:
        if grid.weight.grid.bits > RESIDUAL_BITS or not few:
            continue
        # The two-sided form of QERA (Zhang et al. 2024) and EoRA (Liu et al. 2024).
        error = W - grid.weight.dequantize().to(W)
        parts = cut(leading(error, A, G, few[-1], grid.loss), few)
        residuals = [ResidualWeight(grid.weight, *factors) for factors in parts]
        ways += [option for option in residuals if option.nbytes < most]

    def held(factor: Tensor) -> Tensor:  # a copy, because a part would hold the whole
        return factor.to(device, torch.float32, copy=True)

    useful: list[StoredWeight] = []
    for option in sorted(ways, key=lambda option: (option.nbytes, option.loss)):
        if not useful or option.loss < useful[-1].loss:
            useful.append(option)
    return [
        replace(option, left=held(option.left), right=held(option.right))
        for option in useful
        if not isinstance(option, RoundedWeight)
    ]


def build_rounded(
    layers: Mapping[str, nn.Module],
    rounded: RoundedLayers,
    *,
    method: str,
    budget: int | None = None,
    allocation: str = "fisher",
    measure: LossEstimator | None = None,
    progress: Progress | None = None,
) -> CompressionResult:
    """Choose bits or a rank for each layer under one budget of bytes, and build the layers; the layers are only read.

    The allocation sees the layers' losses J. With ``measure``, J is then measured on tokens, each layer's losses are
    corrected by the result, and the budget is spent again.

    Args:
        layers: The targeted layers by name.
        rounded: These layers on the grids to choose from. The call empties it.
        method: Name of the metric's solver, for the report.
        budget: Bytes that the layers' matrices may take, numbers in floating point at 16 bits; None takes each layer's
            only grid.
        allocation: "uniform" gives all layers the same bits, the most that the budget holds, whatever their losses.
            Others choose by the losses; "fisher" and "measured" minimise their sum.
        measure: Measures J of rounded layers on tokens.
        progress: Wraps the loop over layers.

    Raises:
        RuntimeError: If no gradient reached any layer.
        ValueError: If the budget does not hold the smallest grid in every layer.
    """
    progress = progress or (lambda names, description: names)
    check_reached(rounded.tokens, bool(_judged(rounded)))
    if budget is None:
        chosen: dict[str, StoredWeight | None] = {name: rounded.weights[name][0] for name in layers}
    else:
        chosen = _allocate(layers, rounded, budget, allocation, {})
        if measure is not None and allocation != "uniform":
            chosen = _allocate(layers, rounded, budget, allocation, _corrections(rounded, chosen, measure))
    _warn_unreached(rounded, chosen)
    replacements: dict[str, nn.Module] = {}
    choices = []
    for name in progress(list(layers), "Building"):
        module, option = layers[name], chosen.pop(name)
        del rounded.weights[name]
        rounded.ranks.pop(name, None)
        shape = linear_shape(module)
        choice = LayerChoice(name, shape, min(shape), "dense", rounded.tokens[name], 0.0, method)
        if option is not None:
            replacements[name] = set_trainable(_layer(module, option).train(module.training), trains_weight(module))
            choice = replace(choice, loss=0.0 if math.isnan(option.loss) else option.loss)
        if isinstance(option, RoundedWeight):
            choice = replace(choice, form=option.weight.grid)
        elif isinstance(option, LowRankWeight):
            choice = replace(choice, rank=len(option.right), layout="factors", form="int8")
        elif option is not None:
            choice = replace(choice, rank=len(option.right), layout="residual", form=option.weight.grid)
        choices.append(choice)
    return CompressionResult(replacements, choices)


def _layer(module: nn.Module, option: StoredWeight) -> CompressedLinear:
    """Return the layer that takes the place of a dense one."""
    if isinstance(option, RoundedWeight):
        return rounded_layer(module, option.weight)
    factors = option.left, option.right
    if isinstance(option, ResidualWeight):
        return residual_layer(module, option.weight, factors)
    return quantized_layer(factored_layer(module, factors, "factors"), "int8")


def _judged(rounded: RoundedLayers) -> dict[str, list[RoundedWeight]]:
    """Return the layers whose losses are known."""
    return {name: options for name, options in rounded.weights.items() if not math.isnan(options[0].loss)}


def _allocate(
    layers: Mapping[str, nn.Module],
    rounded: RoundedLayers,
    budget: int,
    allocation: str,
    corrections: Mapping[str, tuple[type, float]],
) -> dict[str, StoredWeight | None]:
    """Return the choice of each layer; None stands for a dense layer.

    Args:
        layers: The targeted layers by name.
        rounded: Their options.
        budget: Bytes.
        allocation: Name of the allocation.
        corrections: By layer, the kind of its option that was measured, and the factor for losses of that kind.
    """
    most = max(rounded.tokens.values())

    def ways(name: str, options: Sequence[StoredWeight]) -> StorageOptions:
        m, n = linear_shape(layers[name])
        # Losses are means over the layer's tokens; layers that see fewer tokens weigh less in the model's loss.
        weight, (kind, factor) = rounded.tokens[name] / most, corrections.get(name, (RoundedWeight, 1.0))
        losses = [weight * option.loss * (factor if isinstance(option, kind) else 1.0) for option in options]
        costs = [option.nbytes for option in options]
        return StorageOptions(
            np.array([*costs, FLOAT_BYTES * m * n]), np.nan_to_num([*losses, 0.0]), name=name, shape=(m, n)
        )

    def picked(chosen: Mapping[str, int], options: Mapping[str, Sequence[StoredWeight]]) -> dict[str, Any]:
        return {name: options[name][i] if i < len(options[name]) else None for name, i in chosen.items()}

    grids = {name: ways(name, weights) for name, weights in rounded.weights.items()}
    least = sum(int(way.costs.min()) for way in grids.values())
    if budget < least:
        raise ValueError(f"Expected a size of at least {least:,} bytes for the targeted layers but got {budget:,}.")
    even = dict(zip(grids, spend_evenly(list(grids.values()), budget), strict=True))
    chosen = picked(even, rounded.weights)
    if allocation == "uniform":
        return chosen
    # A layer whose loss is not known keeps the bits that all layers could have: nothing tells whether it needs fewer.
    judged = {name: rounded.options(name) for name in _judged(rounded)}
    left = budget - sum(int(way.costs[even[name]]) for name, way in grids.items() if name not in judged)
    indexes = allocate([ways(name, options) for name, options in judged.items()], left, allocation)
    return chosen | picked(dict(zip(judged, indexes, strict=True)), judged)


def _corrections(
    rounded: RoundedLayers, chosen: Mapping[str, StoredWeight | None], measure: LossEstimator
) -> dict[str, tuple[type, float]]:
    """Return the kind of each layer's choice, and the factor by which its loss is off."""
    options = {name: option for name, option in chosen.items() if option is not None and option.loss > 0}
    measured = measure({name: option.approximation for name, option in options.items()})
    return {
        name: (type(options[name]), correction(options[name].loss, loss, options[name].trust))
        for name, loss in measured.items()
    }


def _held(results: Sequence[tuple[Rounded, float]], device: torch.device) -> list[RoundedWeight]:
    """Return matrices and their J by ascending bytes, on the device where they wait for the other layers."""

    def moved(value: Tensor) -> Tensor:
        return value.to(device)

    held = [
        RoundedWeight(replace(r, codes=moved(r.codes), scale=moved(r.scale), zero=moved(r.zero)), loss)
        for r, loss in results
    ]
    return sorted(held, key=lambda option: option.nbytes)


def _warn_unreached(rounded: RoundedLayers, chosen: Mapping[str, StoredWeight | None]) -> None:
    judged = _judged(rounded)
    names = [name for name, option in chosen.items() if name not in judged and option is not None]
    if names:
        rank_zero_warn(
            f"{len(names)} of {len(rounded.weights)} layers are rounded to the nearest numbers because no gradient (or "
            f"only zeros) reached them in calibration: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}."
        )
