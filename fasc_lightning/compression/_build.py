"""Low-rank replacements of layers, built from their moments under one budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from fasc_lightning._utils import FreedMemory, Progress
from fasc_lightning.compression._allocation import Candidate, Cost, allocate_fisher, allocate_uniform, least_cost
from fasc_lightning.compression._budget import layer_budgets, layers_dtype, layout_cost
from fasc_lightning.compression._factorize import FactorizedLayers, Unit, factorize_layers
from fasc_lightning.compression._loss_correction import LossEstimator, correction
from fasc_lightning.distributed import is_distributed, whole
from fasc_lightning.layers import (
    CompressedLinear,
    Form,
    Layout,
    auto_layout,
    linear_shape,
    linear_weight,
    make_lowrank,
    trains_weight,
)
from fasc_lightning.options import measures_losses
from fasc_lightning.solvers import Factorization
from fasc_lightning.statistics import CalibrationMoments, SketchFigures


@dataclass(frozen=True)
class LayerChoice:
    """The rank and layout chosen for one layer.

    Attributes:
        name: Dotted name in the module.
        shape: (m, n) = (outputs, inputs).
        rank: Rank kept; min(m, n) if the layer stays dense.
        layout: "pivot", "factors" or "dense".
        tokens: Number of tokens in its statistics.
        loss: The loss by the solver's objective; 0 for a dense layer. If solvers are mixed, or the unit is "fisher", it
            is J of the Fisher metric for every solver.
        method: The layer's solver, also if the layer stays dense.
        sketches: Figures of its sketched sides (``sketch_figures``); empty for exact moments.
        form: How its matrices are rounded; None for numbers in floating point.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    layout: str
    tokens: int
    loss: float
    method: str
    sketches: dict[str, SketchFigures] = field(default_factory=dict)
    form: Form | None = None


@dataclass(frozen=True)
class CompressionResult:
    """Replacements for the layers that do not stay dense, and the choices for all layers."""

    replacements: dict[str, nn.Module]
    layers: list[LayerChoice]


def compress_layers(
    layers: dict[str, nn.Module],
    moments: CalibrationMoments,
    *,
    rank: float | None = None,
    keep: float | None = None,
    method: str = "fasc",
    allocation: str = "fisher",
    layout: Layout = "auto",
    align: int = 1,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    methods: Mapping[str, str] | None = None,
    consume: bool = True,
    unit: Unit = "own",
    measure: LossEstimator | None = None,
    known: MutableMapping[str, Factorization] | None = None,
) -> CompressionResult:
    """Factorise the layers and build their replacements; the layers themselves are only read.

    Calls :func:`factorize_layers` and then :func:`build_layers`.

    Args:
        layers: The targeted layers by name.
        moments: Their moments.
        rank: See :func:`layer_budgets`.
        keep: See :func:`layer_budgets`.
        method: Solver.
        allocation: See :func:`build_layers`.
        layout: See :func:`build_layers`.
        align: See :func:`build_layers`.
        device: The device that factorises.
        progress: Wraps the loops over layers.
        methods: See :func:`factorize_layers`.
        consume: See :func:`factorize_layers`.
        unit: See :func:`factorize_layers`.
        measure: See :func:`build_layers`.
        known: See :func:`factorize_layers`.

    Raises:
        RuntimeError: If no gradient reached any layer.
        ValueError: If the budget cannot be met, the unit is unknown, ``methods`` names an unknown layer or solver, or a
            solver needs statistics that were not gathered.
    """
    _check_measure(allocation, measure)
    factorized = factorize_layers(
        layers,
        moments,
        method=method,
        device=device,
        progress=progress,
        methods=methods,
        consume=consume,
        unit=unit,
        known=known,
    )
    return build_layers(
        layers,
        factorized,
        rank=rank,
        keep=keep,
        allocation=allocation,
        layout=layout,
        align=align,
        device=device,
        progress=progress,
        measure=measure,
    )


def build_layers(
    layers: dict[str, nn.Module],
    factorized: FactorizedLayers,
    *,
    rank: float | None = None,
    keep: float | None = None,
    allocation: str = "fisher",
    layout: Layout = "auto",
    align: int = 1,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    measure: LossEstimator | None = None,
) -> CompressionResult:
    """Spend one budget over factorised layers and build their replacements; the layers themselves are only read.

    Layers that were not factorised stay dense, because nothing tells which rank they need.

    "measured" starts from the ranks of "fisher" and measures J on tokens at these ranks. It corrects each layer's
    losses by the result (``correction``) and spends the budget again. Only J can be measured: losses in other units are
    allocated as by "fisher".

    Args:
        layers: The targeted layers by name.
        factorized: Factorisations of these layers. The call empties them.
        rank: See :func:`layer_budgets`.
        keep: See :func:`layer_budgets`.
        allocation: "measured" or "fisher" (one budget, spent where it matters most), "uniform", or another name that
            has been registered.
        layout: "auto" (:func:`~fasc_lightning.layers.auto_layout` for each layer), "pivot" or "factors".
        align: Ranks are multiples of this; layers that stay dense have full rank.
        device: The device of the compression.
        progress: Wraps the loop over layers.
        measure: Measures J of low-rank layers on tokens; needed for "measured".

    Raises:
        RuntimeError: If no gradient reached any layer.
        ValueError: If the budget cannot be met.
    """
    _check_measure(allocation, measure)
    progress = progress or (lambda names, description: names)
    budgets = layer_budgets(layers, rank, keep)
    factorizations, tokens = factorized.factorizations, factorized.tokens
    check_reached(factorized.tokens, bool(factorizations))
    _warn_unreached([name for name in layers if name not in factorizations], len(layers))

    dtype = layers_dtype(layers)
    if layout == "auto" and torch.device(device).type != "cpu":
        rank_zero_info(f"FascCallback: layout='auto' chooses layouts by times measured on a CPU, not on {device}.")
    cost = layout_cost(layout, dtype)
    ranks = _allocate(layers, factorizations, tokens, budgets, allocation, cost, align)
    if measures_losses(allocation) and measure is not None and factorized.compare:
        factorizations |= _corrected(factorizations, ranks, measure)  # in place, so that used factors are freed below
        ranks = _allocate(layers, factorizations, tokens, budgets, allocation, cost, align)
    replacements: dict[str, nn.Module] = {}
    plans = []
    freed = FreedMemory()
    for name in progress(list(layers), "Building"):
        module, solver, sketches = layers[name], factorized.solvers[name], factorized.sketches.get(name, {})
        shape = linear_shape(module)
        k = ranks.get(name)
        if k is None:
            plans.append(LayerChoice(name, shape, min(shape), "dense", tokens[name], 0.0, solver, sketches))
            continue
        factorization = factorizations.pop(name)
        freed.add(factorization.left.nbytes + factorization.right.nbytes)
        # The dtype of the budget: a layer of another dtype must not choose a layout by its own.
        stored: Any = auto_layout(*shape, k, dtype) if layout == "auto" else layout
        replacements[name] = built = factored_layer(module, factorization.truncate(k), stored)
        loss = float(factorization.losses[k])
        plans.append(LayerChoice(name, shape, k, built.layout, tokens[name], loss, solver, sketches))
    return CompressionResult(replacements, plans)


def _check_measure(allocation: str, measure: LossEstimator | None) -> None:
    if allocation == "measured" and measure is None:
        raise ValueError('Expected `measure` for allocation="measured" but got None. Or allocate by "fisher".')


def check_reached(tokens: Mapping[str, int], any_gradient: bool) -> None:
    """Refuse to compress if no gradient, or only zeros, reached every layer.

    Args:
        tokens: Number of tokens in each layer's statistics.
        any_gradient: Whether a gradient of some layer was not zero.

    Raises:
        RuntimeError: If so.
    """
    reached = sum(count > 0 for count in tokens.values())
    if not reached:
        raise RuntimeError(
            f"No gradient reached any of the {len(tokens)} tapped layers in calibration. Is the loss detached, the "
            "forward run under no_grad or inference mode, or was `manual_backward` never called?"
        )
    if not any_gradient:
        raise RuntimeError(
            f"Every gradient that reached the {reached} tapped layers was zero, so the loss does not depend on them. "
            "Is the loss a constant?"
        )


def _allocate(
    layers: dict[str, nn.Module],
    factorizations: dict[str, Factorization],
    tokens: dict[str, int],
    budgets: dict[str, int],
    allocation: str,
    cost: Cost,
    align: int,
) -> dict[str, int | None]:
    most = max(tokens.values())
    candidates = []
    for name, factorization in factorizations.items():
        m, n = linear_shape(layers[name])
        # Losses are means over the layer's tokens; layers that see fewer tokens weigh less in the model's loss.
        weighted = factorization.losses.double().numpy() * (tokens[name] / most)
        candidates.append(Candidate(name, m, n, weighted))
    unreached = [name for name in layers if name not in factorizations]
    dense = sum(math.prod(linear_shape(layers[name])) for name in unreached)
    budget = sum(budgets.values()) - dense
    least = sum(least_cost(c.m, c.n, cost, align) for c in candidates)
    if budget < least and unreached:
        raise ValueError(
            f"Expected a budget that holds the layers that no gradient reached, which stay dense, and rank {align} "
            f"elsewhere: {dense + least:,} parameters; but it is {sum(budgets.values()):,}. Exclude "
            f"{', '.join(unreached[:3])}{' ...' if len(unreached) > 3 else ''}, or raise `rank` or `keep`."
        )
    if allocation == "uniform":
        # Layers without a gradient stay dense; the other layers pay for them in proportion.
        share = min(1.0, budget / sum(budgets[c.name] for c in candidates))
        ranks = allocate_uniform(candidates, [math.floor(share * budgets[c.name]) for c in candidates], cost, align)
    else:
        ranks = allocate_fisher(candidates, budget, cost, align, allocation=allocation)
    return {c.name: k for c, k in zip(candidates, ranks, strict=True)}


def _corrected(
    factorizations: dict[str, Factorization], ranks: Mapping[str, int | None], measure: LossEstimator
) -> dict[str, Factorization]:
    """Return the factorisations of given ranks with losses corrected by their measured values at these ranks."""
    chosen = {name: k for name, k in ranks.items() if k is not None}
    measured = measure({name: factorizations[name].truncate(k) for name, k in chosen.items()})
    corrected = {}
    for name, k in chosen.items():
        losses = factorizations[name].losses
        corrected[name] = replace(
            factorizations[name], losses=losses * correction(float(losses[k]), measured.get(name, math.nan))
        )
    return corrected


def factored_layer(module: nn.Module, factors: tuple[Tensor, Tensor], layout: Layout) -> CompressedLinear:
    """Return a layer with two factors, of the mode, dtype, device and flags of the dense layer, which is only read."""
    left, right = factors
    weight: Any = linear_weight(module)
    bias: Any = getattr(module, "bias", None)
    built = make_lowrank(
        left, right, None if bias is None else whole(bias.detach()), layout, dtype=weight.dtype, device=weight.device
    )
    return built.train(module.training).requires_grad_(trains_weight(module))


def _warn_unreached(names: Sequence[str], total: int) -> None:
    if names:
        rank_zero_warn(
            f"{len(names)} of {total} layers stay dense because no gradient (or only zeros) reached them in "
            f"calibration: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}."
        )


def parameter_tensors(replacements: dict[str, nn.Module]) -> list[Tensor]:
    """Return every tensor of the replacements in a fixed order, for broadcasting."""
    return [t for name in sorted(replacements) for t in replacements[name].state_dict().values()]


def same_everywhere(trainer: pl.Trainer, result: CompressionResult) -> CompressionResult:
    """Give every process the factors of the first one, because rounding must not make replicas differ.

    The moments are equal on all processes, but other hardware may decide a tie in the allocation differently.

    Raises:
        RuntimeError: If the processes chose different ranks or grids.
    """
    if not is_distributed(trainer):
        return result
    plans: list[Any] = [[_place(p) for p in result.layers]]
    dist.broadcast_object_list(plans, src=0)
    if plans[0] != [_place(p) for p in result.layers]:
        raise RuntimeError(
            "The processes chose different ranks or bits from the same moments, which different hardware or libraries "
            "on the ranks can cause. Compress on one process instead. The model is unchanged."
        )
    device = trainer.strategy.root_device
    for tensor in parameter_tensors(result.replacements):
        shared = tensor.to(device).contiguous()
        dist.broadcast(shared, src=0)
        tensor.copy_(shared)
    return result


def _place(choice: LayerChoice) -> tuple[Any, ...]:
    return choice.name, choice.rank, choice.layout, choice.form
