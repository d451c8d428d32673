"""The size of each layer once it is compressed, and of the activations beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fasc_lightning.compression import (
    Candidate,
    allocate_uniform,
    layer_budgets,
    layers_dtype,
    layout_cost,
    least_cost,
)
from fasc_lightning.layers import (
    Layout,
    Size,
    TargetedLayers,
    auto_layout,
    empty_layer,
    layer_sizes,
    linear_shape,
    smaller_side,
)


@dataclass(frozen=True)
class StoredLayer:
    """Rank, layout and size of a layer after a compression."""

    rank: int
    layout: str
    size: Size


def stored_layers(
    layers: Mapping[str, nn.Module], rank: float | None, keep: float | None, layout: Layout, align: int = 1
) -> dict[str, StoredLayer]:
    """Return each layer after a compression that spends the budget layer by layer.

    An allocation over all layers chooses other ranks, within the same budget. A layer whose share is too small for its
    lowest rank gets that rank.

    Args:
        layers: Linear layers by name; no weight is read.
        rank: As in ``layer_budgets``.
        keep: As in ``layer_budgets``.
        layout: As in :class:`~fasc_lightning.FascCallback`.
        align: As in :class:`~fasc_lightning.FascCallback`.
    """
    dtype = layers_dtype(layers)
    cost, budgets = layout_cost(layout, dtype), layer_budgets(dict(layers), rank, keep)
    known: dict[tuple[Any, ...], StoredLayer] = {}
    stored = {}
    for name, layer in layers.items():
        m, n = linear_shape(layer)
        bias = getattr(layer, "bias", None) is not None
        key = m, n, bias, budgets[name], type(layer), getattr(layer, "expert_share", None)
        if key not in known:
            candidate = Candidate(name, m, n, torch.zeros(min(m, n) + 1).double().numpy())
            budget = max(budgets[name], least_cost(m, n, cost, align))
            (k,) = allocate_uniform([candidate], [budget], cost, align)
            known[key] = _stored(layer, m, n, k, bias, layout, dtype)
        stored[name] = known[key]
    return stored


def _stored(
    layer: nn.Module, m: int, n: int, k: int | None, bias: bool, layout: Layout, dtype: torch.dtype
) -> StoredLayer:
    held = "dense" if k is None else auto_layout(m, n, k, dtype) if layout == "auto" else layout
    if k is None or held == "dense":
        return StoredLayer(min(m, n), "dense", layer_sizes({"": layer}))
    spec = {"rank": k, "layout": held, "bias": bias, "side": smaller_side(m, n)}
    empty = empty_layer("", layer, spec)
    if (share := getattr(layer, "expert_share", None)) is not None:
        vars(empty)["expert_share"] = share  # the count of FLOPs reads it
    return StoredLayer(k, held, layer_sizes({"": empty}))


def activation_bytes(model: nn.Module, chosen: TargetedLayers) -> int:
    """Return roughly the bytes of one token's activations between the forward and the backward pass.

    They are the inputs and outputs of the layers and a quarter more. The quarter is for norms, attention and the MLP's
    activation function, less the inputs that layers share: a block of Llama keeps 10 h + 4 i + 2 kv numbers, and its
    layers have 9 h + 3 i + 2 kv. Four times the logits in float32 are added: logits, their log-softmax, and the
    gradients of both.

    Args:
        model: The model; its output embeddings give the number of logits.
        chosen: The layers.
    """
    itemsize = layers_dtype(chosen.modules).itemsize
    held = sum(chosen.token_shares[name] * (m + n) for name, (m, n) in chosen.shapes.items())
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    logits = 0 if output is None else len(output.weight)
    return math.ceil(1.25 * held * itemsize + 4 * logits * torch.float32.itemsize)


def total_size(sizes: list[Size]) -> Size:
    return Size(
        sum(size.parameters for size in sizes),
        sum(size.bytes for size in sizes),
        sum(size.flops_per_token for size in sizes),
    )


def replaced_size(whole: Size, targeted: Mapping[str, Size]) -> Size:
    """Return the size of a model after the replacement of its targeted layers."""
    before, after = targeted["dense"], targeted["compressed"]
    return Size(
        whole.parameters - before.parameters + after.parameters,
        whole.bytes - before.bytes + after.bytes,
        whole.flops_per_token - before.flops_per_token + after.flops_per_token,
    )
