"""The size of each layer once it is compressed, and of the activations beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fasc_lightning.compression import (
    FLOAT_BYTES,
    Candidate,
    allocate_uniform,
    byte_budget,
    layer_budgets,
    layers_dtype,
    layout_cost,
    least_cost,
)
from fasc_lightning.layers import (
    Grid,
    Layout,
    Size,
    TargetedLayers,
    auto_layout,
    empty_layer,
    form_to_plain,
    layer_sizes,
    linear_shape,
    smaller_side,
)
from fasc_lightning.options import CompressionOptions


@dataclass(frozen=True)
class StoredLayer:
    """Rank, layout, bits and size of a layer after a compression; bits are None in floating point."""

    rank: int
    layout: str
    size: Size
    bits: int | None = None


def stored_layers(
    model: nn.Module, layers: Mapping[str, nn.Module], options: CompressionOptions
) -> dict[str, StoredLayer]:
    """Return each layer after a compression that spends the budget layer by layer; no weight is read.

    A size gives every layer the same grid, the largest that fits, or leaves all layers dense.

    Args:
        model: The model.
        layers: The targeted layers in it.
        options: Options of the compression.
    """
    if not options.rounds:
        return ranked_layers(layers, options.rank, options.keep, options.layout, options.align)
    grids = list(options.grids)
    if options.size is not None:
        budget, shapes = byte_budget(model, layers, options.size), [linear_shape(layer) for layer in layers.values()]
        if sum(FLOAT_BYTES * m * n for m, n in shapes) <= budget:
            return {name: _dense(layer) for name, layer in layers.items()}
        grids = [grid for grid in grids if sum(grid.nbytes(m, n) for m, n in shapes) <= budget] or grids[:1]
    return {name: _on_grid(layer, grids[-1]) for name, layer in layers.items()}


def _dense(layer: nn.Module) -> StoredLayer:
    return StoredLayer(min(linear_shape(layer)), "dense", layer_sizes({"": layer}))


def _on_grid(layer: nn.Module, grid: Grid) -> StoredLayer:
    m, n = linear_shape(layer)
    bias = getattr(layer, "bias", None) is not None
    spec = {"rank": min(m, n), "layout": "dense", "bias": bias, "quantize": form_to_plain(grid)}
    return _built(layer, spec, grid.bits)


def ranked_layers(
    layers: Mapping[str, nn.Module], rank: float | None, keep: float | None, layout: Layout, align: int = 1
) -> dict[str, StoredLayer]:
    """Return each layer after a low-rank compression that spends the budget layer by layer.

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
        return _dense(layer)
    return _built(layer, {"rank": k, "layout": held, "bias": bias, "side": smaller_side(m, n)})


def _built(layer: nn.Module, spec: dict[str, Any], bits: int | None = None) -> StoredLayer:
    """Return what the layer of a specification stores."""
    empty = empty_layer("", layer, spec)
    if (share := getattr(layer, "expert_share", None)) is not None:
        vars(empty)["expert_share"] = share  # the count of FLOPs reads it
    return StoredLayer(spec["rank"], spec["layout"], layer_sizes({"": empty}), bits)


def activation_bytes(model: nn.Module, chosen: TargetedLayers) -> int:
    """Return roughly the bytes of one token's activations between the forward and the backward pass.

    They are the inputs and outputs of the layers and a quarter more. The quarter is for norms, attention and the MLP's
    activation function, less the inputs that layers share: a block of Llama keeps 10 h + 4 i + 2 kv numbers, and its
    layers have 9 h + 3 i + 2 kv. The larger of two parts is added. At the start of the backward pass it is the logits:
    in float32 the logits, their log-softmax, and the gradients of both; and in half precision the logits and their
    gradients again. Later it is the rows of one layer, while they are summed: x and h in float32, and weighted.

    Args:
        model: The model; its output embeddings give the number of logits.
        chosen: The layers.
    """
    itemsize, summed = layers_dtype(chosen.modules).itemsize, torch.float32.itemsize
    sides = [chosen.token_shares[name] * (m + n) for name, (m, n) in chosen.shapes.items()]
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    logits = 0 if output is None else len(output.weight)
    of_logits = logits * (4 * summed + (2 * itemsize if itemsize < summed else 0))
    return math.ceil(1.25 * sum(sides) * itemsize + max(of_logits, 2 * max(sides) * summed))


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
