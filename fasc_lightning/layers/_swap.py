"""The swap of layers by name, to low-rank and back to dense: all of them, or none."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fasc_lightning._utils import undoing
from fasc_lightning.layers._compressed_linear import CompressedLinear
from fasc_lightning.layers._fused_experts import ExpertLinear
from fasc_lightning.layers._linear import empty_conv1d, flops_per_token, is_conv1d, linear_shape
from fasc_lightning.layers._quantized_layers import quantization_of
from fasc_lightning.layers._reparametrised import remember_form
from fasc_lightning.layers._shell import own_class, shell
from fasc_lightning.layers._unfused_experts import fuse_dense, with_experts


def swap_modules(model: nn.Module, replacements: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Replace submodules of ``model`` by name, all of them or, if anything fails, none.

    A module that is registered in several places is replaced in all of them, whichever of its names is given. Each
    replacement takes over the dtype, device and training mode of the module it replaces. Its own ``requires_grad``
    flags stay as they are (a swap neither freezes nor thaws). Hooks stay on the module they were registered on.

    Args:
        model: The model, changed in place.
        replacements: New module by dotted name; projections of fused experts by the names of their virtual layers.

    Returns:
        The replaced modules by the same names, fused experts as a whole by theirs: passing them back undoes the swap.

    Raises:
        KeyError: If the model has no module of a name.
        ValueError: If a name is the model itself, lies inside another replaced module, or names one module with two
            different replacements; or if a linear layer would change its shape.
    """
    replacements = with_experts(model, replacements)
    modules = dict(model.named_modules(remove_duplicate=False))
    new_of = _check_replacements(modules, replacements)
    old_of = {name: modules[name] for name in replacements}
    slots = [
        (parent, child_name, child)
        for parent in model.modules()
        for child_name, child in parent._modules.items()
        if child is not None and id(child) in new_of
    ]
    for name, new in replacements.items():
        _match(new, old_of[name])
    with undoing() as undo:
        for parent, child_name, old in slots:
            undo.add(parent._modules.__setitem__, child_name, old)
            setattr(parent, child_name, new_of[id(old)])
        undo.forget()
    return old_of


def is_compressed(model: nn.Module) -> bool:
    """Tell whether any layer of the model (or the model itself) is a :class:`CompressedLinear`."""
    return any(isinstance(module, CompressedLinear) for module in model.modules())


def compressed_layers(model: nn.Module) -> dict[str, CompressedLinear]:
    """Return the compressed layers by dotted name; a layer registered in several places has its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def swap_to_dense(model: nn.Module) -> dict[str, nn.Module]:
    """Replace every compressed layer by a dense one of the same function, in place.

    The dense layers have the class of the layers that were compressed: ``nn.Linear``, or GPT-2's ``Conv1D``, whose
    weights a reload of the saved model would otherwise read transposed. Experts are fused again.

    Args:
        model: The model, changed in place. A lone compressed layer has :meth:`CompressedLinear.to_linear`.

    Returns:
        The replaced layers by name, for :func:`swap_modules`.

    Raises:
        ValueError: If weights of a layer are not in memory. Nothing is changed.
        TypeError: As :meth:`CompressedLinear.factors`. Nothing is changed.
    """
    layers = compressed_layers(model)
    check_in_memory(layers)
    with undoing() as undo:
        undo.keep(model)
        replaced = swap_modules(model, {name: _dense(layer) for name, layer in layers.items()})
        fuse_dense(model)
        undo.forget()
    return replaced


def check_in_memory(layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers whose weights are not in memory.

    Raises:
        ValueError: With the first such layer.
    """
    for name, layer in layers.items():
        if any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers())):
            raise ValueError(
                f"Expected weights in memory but those of layer {name!r} are offloaded, or on the meta device. Load "
                "the model without offloading."
            )


def _dense(layer: CompressedLinear) -> nn.Module:
    linear = layer.to_linear()
    if not layer.from_conv1d and layer.shell is None:
        return linear
    dense = empty_dense(layer, linear.bias is not None, linear.weight.dtype)
    weight = linear.weight.detach().T.contiguous() if layer.from_conv1d else linear.weight.detach()
    dense.weight = nn.Parameter(weight, linear.weight.requires_grad)
    dense.bias = linear.bias
    return dense.train(layer.training)


def empty_dense(layer: CompressedLinear, bias: bool, dtype: torch.dtype) -> Any:
    """Return a dense layer of the class that a compressed layer replaced, with parameters on the meta device.

    Args:
        layer: The compressed layer.
        bias: Whether the dense one has a bias.
        dtype: Dtype of its parameters.
    """
    m, n = layer.out_features, layer.in_features
    linear = empty_conv1d(m, n).to(dtype) if layer.from_conv1d else nn.Linear(n, m, bias, device="meta", dtype=dtype)
    if layer.shell is None:
        return linear
    dense: Any = copy.deepcopy(layer.shell)
    dense._parameters.update(linear._parameters)
    return dense


def _shell(layer: nn.Module) -> nn.Module | None:
    """Return a linear layer of a class of its own without its parameters; None for nn.Linear and Conv1D themselves.

    Its other state (a counter, a number that its forward reads) is shared, not copied.
    """
    linear = isinstance(layer, nn.Linear) or is_conv1d(layer)
    if not linear or isinstance(layer, ExpertLinear) or own_class(layer) is nn.Linear:
        return None
    if own_class(layer).__module__ == "transformers.pytorch_utils" or any(b.is_meta for b in layer.buffers()):
        return None  # unknown values of buffers cannot be restored
    return shell(layer)


def _check_replacements(modules: dict[str, nn.Module], replacements: dict[str, nn.Module]) -> dict[int, nn.Module]:
    """Return the new module by the id of the old one, once every rule of :func:`swap_modules` holds."""
    missing = [name for name in replacements if name not in modules]
    if missing:
        raise KeyError(f"The model has no module named {', '.join(map(repr, missing))}. See model.named_modules().")
    new_of: dict[int, nn.Module] = {}
    for name, new in replacements.items():
        if name == "":
            raise ValueError("Expected names of submodules, got '', the model itself: replace it where it is held.")
        if new_of.setdefault(id(modules[name]), new) is not new:
            raise ValueError(f"{name!r} is a second name of a module that has another replacement already: give one.")
        if flops_per_token(modules[name]) and flops_per_token(new) and linear_shape(modules[name]) != linear_shape(new):
            raise ValueError(
                f"Expected a replacement of shape {linear_shape(modules[name])} for {name!r}, got {linear_shape(new)}."
            )
    for name, module in modules.items():
        if id(module) in new_of and any(id(inner) in new_of for inner in module.modules() if inner is not module):
            raise ValueError(
                f"A module inside {name!r} is to be replaced as well as {name!r} itself: give one of them."
            )
    return new_of


def _match(new: nn.Module, old: nn.Module) -> None:
    """Give ``new`` the training mode of ``old``, and its device and floating dtype if ``old`` has just one of each."""
    new.train(old.training)
    if "expert_share" in vars(old):
        vars(new)["expert_share"] = vars(old)["expert_share"]
    remember_form(old, new)
    if isinstance(new, CompressedLinear):
        new.from_conv1d = new.from_conv1d or is_conv1d(old)
        found = old.shell if isinstance(old, CompressedLinear) else _shell(old)
        if found is not new.shell:
            vars(new)["shell"] = found
    # Scales of rounded matrices keep a type of their own.
    tensors: Any = old.parameters() if quantization_of(old) is None else [old.weight]
    kinds = {(t.device, t.dtype) for t in tensors if t.dtype.is_floating_point}
    if len(kinds) == 1:
        device, dtype = kinds.pop()
        if device.type != "meta":  # moving there would lose the values
            new.to(device=device, dtype=dtype)
