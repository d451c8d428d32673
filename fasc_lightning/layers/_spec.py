"""Descriptions of compressed layers in files and plans, and empty layers made from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from fasc_lightning.layers._compressed_linear import CompressedLinear
from fasc_lightning.layers._grid import Grid
from fasc_lightning.layers._linear import linear_shape, linear_weight
from fasc_lightning.layers._lowrank import LowRankLinear
from fasc_lightning.layers._pivoted import PivotedLinear
from fasc_lightning.layers._quantized_layers import (
    DenseLinear,
    form_from_plain,
    form_to_plain,
    make_room,
    quantization_of,
)
from fasc_lightning.layers._residual import ResidualLinear


def check_layers(layers: Any) -> dict[str, dict[str, Any]]:
    """Return plain copies of the layers' descriptions (see :class:`FascConfig`).

    Raises:
        ValueError: If there are none, or one is not valid.
    """
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"Expected `layers` to describe at least one compressed layer by its name, got {layers!r}.")
    for name, spec in layers.items():
        if not isinstance(name, str):
            raise ValueError(f"Expected `layers` to have names as keys, got {name!r}.")
        if not _is_valid(spec):
            raise ValueError(
                f'Expected {{"rank": int, "layout": "factors", "bias": bool}} or {{"rank": int, "layout": "pivot", '
                f'"side": "in" or "out", "bias": bool}}, and of a quantised layer "quantize": "int8", '
                f'"int8-dynamic" or {{"bits": int, "group": int or None, "symmetric": bool}} ("layout" may then be '
                f'"dense" or, with a grid, "residual"), of layer {name!r}, got {spec!r}.'
            )
    return {name: dict(spec) for name, spec in layers.items()}


def _is_valid(spec: Any) -> bool:
    if not isinstance(spec, Mapping) or type(spec.get("rank")) is not int or type(spec.get("bias")) is not bool:
        return False
    layout, keys, form = spec.get("layout"), set(spec) - {"quantize"}, None
    if "quantize" in spec:
        try:
            form = form_from_plain(spec["quantize"])
        except ValueError:
            return False
    if layout == "pivot":
        return keys == {"rank", "layout", "bias", "side"} and spec["side"] in ("in", "out")
    known = layout == "factors" or (layout == "dense" and form is not None)
    return keys == {"rank", "layout", "bias"} and (known or (layout == "residual" and isinstance(form, Grid)))


def describe_layer(layer: CompressedLinear) -> dict[str, Any]:
    """Return the description of a layer, for a plan and a :class:`FascConfig`."""
    spec: dict[str, Any] = {"rank": layer.rank, "layout": layer.layout, "bias": layer.bias is not None}
    if isinstance(layer, PivotedLinear):
        spec["side"] = layer.side
    if (quantization := quantization_of(layer)) is not None:
        spec["quantize"] = form_to_plain(quantization)
    return spec


def empty_layer(name: str, dense: nn.Module, spec: Mapping[str, Any]) -> CompressedLinear:
    """Return a compressed layer on the meta device that fits in the place of a dense or compressed one.

    Raises:
        ValueError: If the description does not fit the layer.
    """
    try:
        m, n = linear_shape(dense)
        weight: Any = dense.weight if isinstance(dense, CompressedLinear) else linear_weight(dense)
        options: dict[str, Any] = {"bias": spec["bias"], "device": "meta", "dtype": weight.dtype}
        layer: CompressedLinear
        if spec["layout"] == "pivot":
            layer = PivotedLinear(n, m, spec["rank"], side=spec["side"], **options)
        elif spec["layout"] == "factors":
            layer = LowRankLinear(n, m, spec["rank"], **options)
        elif spec["layout"] == "residual":
            layer = ResidualLinear(n, m, spec["rank"], **options)
        else:
            layer = DenseLinear(n, m, **options)
        return make_room(layer, form_from_plain(spec["quantize"])) if "quantize" in spec else layer
    except (TypeError, ValueError) as error:
        raise ValueError(f"The configuration of compressed layer {name!r} does not fit the model: {error}") from error


Layer = TypeVar("Layer", bound=nn.Module)


def place(layer: Layer, device: torch.device) -> Layer:
    """Give a layer on the meta device memory and zeros on another device, until its values are loaded."""
    if device.type == "meta":
        return layer
    layer = layer.to_empty(device=device)
    for value in layer.state_dict().values():
        value.zero_()
    return layer


def set_trainable(layer: Layer, trainable: bool) -> Layer:
    """Set whether a layer's parameters are trained; integers and the scales beside them are not."""
    for name, parameter in layer.named_parameters():
        is_number = parameter.is_floating_point() and not name.endswith("weight_scale")
        parameter.requires_grad_(trainable and is_number)
    return layer
