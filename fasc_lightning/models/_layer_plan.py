"""The plan of a compressed model, plain data that says which layers are compressed and how, and its use.

A plan is a mapping from the dotted names of layers to "rank" (int), "layout" ("pivot" or "factors"), of quantised
layers "quantize" ("int8" or "int8-dynamic"; then the layout can be "dense") and, where they are not what the dense
layer and the layout imply, "bias" (bool) and "side" ("out" or "in"). It holds no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasc_lightning._utils import anything, check, mapping, naming, some_names, undoing
from fasc_lightning.layers import (
    CompressedLinear,
    check_layers,
    compressed_layers,
    describe_layer,
    empty_layer,
    is_guard,
    linear_shape,
    linear_weight,
    make_lowrank,
    named_layers,
    place,
    quantized_layer,
    set_trainable,
    smaller_side,
    swap_modules,
    trains_weight,
)
from fasc_lightning.models._format import attach_config
from fasc_lightning.models._layer_state import check_state

#: Of a layer by its name.
Plan = Mapping[str, Mapping[str, Any]]

#: Attribute in which a module that became dense again remembers its plan.
REMEMBERED = "fasc_plan"


def compression_plan(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the plan of a model: what :func:`apply_plan` needs to give a dense one the same layers.

    Args:
        model: Any module.

    Returns:
        Plain data, as JSON takes it; empty if no layer is compressed.

    Example:
        >>> from fasc_lightning.layers import LowRankLinear
        >>> compression_plan(nn.Sequential(LowRankLinear(8, 6, 2)))
        {'0': {'rank': 2, 'layout': 'factors', 'bias': True}}
    """
    return {name: describe_layer(layer) for name, layer in compressed_layers(model).items()}


def apply_plan(model: nn.Module, plan: Plan, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, nn.Module]:
    """Give a dense model the compressed layers of a plan, in place: all of it, or nothing.

    With a ``state_dict`` of the compressed model, the model is that one afterwards. Without, each factorised weight is
    the nearest one of its rank (a truncated SVD). That is what it was where the weights came from ``to_dense``, and a
    poor start elsewhere: :func:`~fasc_lightning.compress` knows what the loss can spare, this does not.

    Args:
        model: Any module whose layers of the plan are dense, or already as planned.
        plan: From :func:`compression_plan` or ``report.plan``.
        state_dict: Weights of the whole compressed model, as ``state_dict()`` gave them. A model on the meta device
            takes these very tensors over; weights that it ties have to be tied again.

    Returns:
        The layers that were replaced, by name; ``swap_modules(model, ...)`` puts them back.

    Raises:
        ValueError: If the plan or the state does not fit the model. The model is what it was.

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
        layer = empty_layer(name, modules[name], spec)  # refuses what does not fit
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
            # Copying onto the meta device does nothing, and torch only warns.
            model.load_state_dict(state_dict, assign=any(p.is_meta for p in model.parameters()))
        vars(model).pop(REMEMBERED, None)
        undo.forget()
    return replaced


def swap_layers(model: nn.Module, new: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Swap layers and let the transformers models in the model describe them, both or neither.

    Raises:
        ValueError: If a model carries another quantiser's configuration.
    """
    with undoing() as undo:
        undo.keep(model, attributes=True)
        replaced = swap_modules(model, new)
        attach_config(model)
        undo.forget()
    return replaced


def check_fit(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
    """Refuse weights that are not exactly those of a model, before any of them is loaded.

    Args:
        model: The model.
        state_dict: Its weights, maybe among others.
        prefix: Of their names.

    Raises:
        ValueError: If one is missing, unexpected or of another shape.
    """
    wanted = {prefix + name: value for name, value in model.state_dict().items()}
    found = {name: v for name, v in state_dict.items() if name.startswith(prefix) and not is_guard(v)}
    shapes = [
        f"{name} {_shape(found[name])} instead of {_shape(value)}"
        for name, value in wanted.items()
        if name in found and _shape(found[name]) != _shape(value)
    ]
    problems = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape": shapes,
    }
    listed = "; ".join(f"{problem}: {some_names(names)}" for problem, names in problems.items() if names)
    if listed:
        raise ValueError(
            f"Expected the weights of {type(model).__name__} with the compressed layers of the checkpoint or plan, but "
            f"some are not: {listed}. Is it another model's? The module is what it was."
        )


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor; None of what else a state dict may hold."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _fitting(model: nn.Module, plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the descriptions of the layers that are to be replaced, complete.

    Raises:
        ValueError: If one is not valid, names no linear layer, or one that is compressed in another way.
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
            f"{some_names(missing)}. Is it another model's plan, or does one hold the other (then names begin with "
            "'model.')?"
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
    """Return a description with what the layer implies filled in.

    Raises:
        ValueError: If the layer is not linear, or has a bias where the plan has none, or the reverse.
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
    """Return the layer of a description that is nearest to a dense one."""
    layer: Any = dense if spec["layout"] == "dense" else _truncated(dense, spec)
    return quantized_layer(layer, spec["quantize"]) if "quantize" in spec else layer


def _truncated(dense: nn.Module, spec: Mapping[str, Any]) -> CompressedLinear:
    weight = linear_weight(dense).detach()
    U, S, Vh = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    k = spec["rank"]
    bias: Any = dense.bias
    return make_lowrank(
        U[:, :k] * S[:k],
        Vh[:k],
        None if bias is None else bias.detach(),
        spec["layout"],
        dtype=weight.dtype,
        device=weight.device,
        side=spec.get("side"),
    )
