"""The plan of a compressed model: plain data on its compressed layers.

A plan maps the dotted name of a layer to "rank" (int) and "layout" ("pivot" or "factors"). A quantised layer also has
"quantize": "int8", "int8-dynamic", or "bits", "group" and "symmetric" of a grid; its layout can be "dense" or, on a
grid, "residual", whose "rank" is that of the residual. "bias" (bool) and "side" ("out" or "in") are given if they
differ from the values that the dense layer and the layout imply. A plan holds no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasc_lightning._utils import anything, check, mapping, naming, some_names, undoing
from fasc_lightning.layers import (
    CompressedLinear,
    Grid,
    check_layers,
    compressed_layers,
    describe_layer,
    empty_layer,
    form_from_plain,
    linear_shape,
    linear_weight,
    make_lowrank,
    named_layers,
    place,
    quantized_layer,
    residual_layer,
    rounded_layer,
    set_trainable,
    smaller_side,
    trains_weight,
)
from fasc_lightning.models._attach import swap_layers
from fasc_lightning.models._layer_state import check_fit, check_state
from fasc_lightning.rounding import to_nearest

#: The description of each layer by its name.
Plan = Mapping[str, Mapping[str, Any]]

#: Attribute with the plan of a module that became dense again.
REMEMBERED = "fasc_plan"


def compression_plan(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the plan of a model, with which :func:`apply_plan` gives a dense model the same layers.

    Args:
        model: Any module.

    Returns:
        Plain data for JSON; empty if no layer is compressed.

    Example:
        >>> from fasc_lightning.layers import LowRankLinear
        >>> compression_plan(nn.Sequential(LowRankLinear(8, 6, 2)))
        {'0': {'rank': 2, 'layout': 'factors', 'bias': True}}
    """
    return {name: describe_layer(layer) for name, layer in compressed_layers(model).items()}


def apply_plan(model: nn.Module, plan: Plan, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, nn.Module]:
    """Give a dense model the compressed layers of a plan, in place: all of them or none.

    With a ``state_dict`` of the compressed model, the model equals the compressed one afterwards. Without it, each
    factorised weight is the nearest one of its rank (a truncated SVD). That restores weights that came from
    ``to_dense``, and is a poor start for others: unlike :func:`~fasc_lightning.compress` it does not look at the loss.

    Args:
        model: Any module; the layers that the plan names are dense or already as planned.
        plan: From :func:`compression_plan` or ``report.plan``.
        state_dict: Weights of the whole compressed model, from ``state_dict()``. A model on the meta device takes over
            these tensors without a copy; tied weights have to be tied again.

    Returns:
        The layers that were replaced, by name; ``swap_modules(model, ...)`` puts them back.

    Raises:
        ValueError: If the plan or the state does not fit the model. The model is unchanged.

    Example:
        >>> small = nn.Sequential(nn.Linear(8, 6))
        >>> replaced = apply_plan(small, {"0": {"rank": 2, "layout": "factors"}})
        >>> small[0].rank
        2
    """
    specs = _fitting(model, plan)
    modules = named_layers(model)
    new: dict[str, nn.Module] = {}
    for name, spec in specs.items():
        layer = empty_layer(name, modules[name], spec)  # refuses a misfit
        weight = linear_weight(modules[name])
        if state_dict is not None:
            layer = place(layer, weight.device)
        elif not weight.is_meta:
            layer = _nearest(modules[name], spec)
        new[name] = set_trainable(layer, trains_weight(modules[name]))
    if state_dict is not None:
        check(state_dict, mapping(anything), "The state dict of the compressed model")
    with undoing() as undo:
        undo.keep(model, attributes=True)
        replaced = swap_layers(model, new)
        if state_dict is not None:
            check_fit(model, state_dict)
            with naming("The state dict of the compressed model"):
                check_state(model, state_dict, "", compressed_layers(model))
            # Copying to the meta device does nothing, and torch only warns.
            model.load_state_dict(state_dict, assign=any(p.is_meta for p in model.parameters()))
        vars(model).pop(REMEMBERED, None)
        undo.forget()
    return replaced


def _fitting(model: nn.Module, plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the complete descriptions of the layers to replace.

    Raises:
        ValueError: If a description is invalid, or names a layer that is not linear or is compressed in another way.
    """
    if not isinstance(plan, Mapping) or not all(isinstance(spec, Mapping) for spec in plan.values()):
        raise ValueError(
            f'Expected a plan as {{"name of layer": {{"rank": 8, "layout": "pivot"}}}} but got {plan!r:.200}. '
            "compression_plan(model) and report.plan make one."
        )
    modules = named_layers(model)
    if missing := [name for name in plan if name not in modules]:
        raise ValueError(
            f"Expected a plan of the layers of {type(model).__name__} but it names some that are not there: "
            f"{some_names(missing)}. Is it another model's plan, or the plan of a module that holds this one (then "
            "names begin with 'model.')?"
        )
    complete = {name: _complete(modules[name], spec) for name, spec in plan.items()}
    specs = check_layers(complete) if complete else {}
    for name, spec in list(specs.items()):
        layer = modules[name]
        if not isinstance(layer, CompressedLinear):
            continue
        if describe_layer(layer) != spec:
            raise ValueError(
                f"Expected dense layers but {name!r} is compressed, as {describe_layer(layer)} and not as {spec}. Make "
                "the model dense first: to_dense(model)."
            )
        del specs[name]
    return specs


def _complete(layer: nn.Module, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description with the missing entries filled in from the layer.

    Raises:
        ValueError: If the layer is not linear, or only one of layer and plan has a bias.
    """
    try:
        m, n = linear_shape(layer)
    except TypeError as error:
        raise ValueError(f"Expected a plan of linear layers. {error}") from error
    bias = getattr(layer, "bias", None) is not None
    implied: dict[str, Any] = {"bias": bias}
    if spec.get("layout") == "pivot":
        implied["side"] = smaller_side(m, n)
    if spec.get("bias", bias) != bias:
        raise ValueError(f"Expected a plan of a layer with bias={bias} but it is of one with bias={spec['bias']}.")
    return {**implied, **spec}


def _nearest(dense: nn.Module, spec: Mapping[str, Any]) -> CompressedLinear:
    """Return the layer of a description whose weight is nearest to a dense layer's."""
    form = form_from_plain(spec["quantize"]) if "quantize" in spec else None
    if not isinstance(form, Grid):
        layer: Any = dense if spec["layout"] == "dense" else _truncated(dense, spec)
        return layer if form is None else quantized_layer(layer, form)
    if spec["layout"] not in ("dense", "residual"):
        raise ValueError(
            f"Expected a state dict for a plan with factors of {form.bits} bits but got none. HINT: apply_plan(model, "
            "plan, state_dict)."
        )
    W = linear_weight(dense).detach().float()
    rounded = to_nearest(W, form)
    if spec["layout"] == "dense":
        return rounded_layer(dense, rounded)
    return residual_layer(dense, rounded, _leading(W - rounded.dequantize(), spec["rank"]))


def _truncated(dense: nn.Module, spec: Mapping[str, Any]) -> CompressedLinear:
    weight = linear_weight(dense).detach()
    bias: Any = dense.bias
    return make_lowrank(
        *_leading(weight.to(torch.promote_types(weight.dtype, torch.float32)), spec["rank"]),
        None if bias is None else bias.detach(),
        spec["layout"],
        dtype=weight.dtype,
        device=weight.device,
        side=spec.get("side"),
    )


def _leading(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the factors (m, k) and (k, n) of the nearest matrix of rank k."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :k] * S[:k], Vh[:k]
