"""Checks of weights from a file, before a module takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasc_lightning._utils import FLOATS, SchemaError, is_permutation, refuse, some_names
from fasc_lightning.layers import is_guard

#: Ends of the names of packed codes and zero points of few bits.
PACKED = (".weight_packed", ".weight_zero_point")

#: Ends of the names of tensors with two dimensions.
MATRICES = (".weight", ".weight_scale", *PACKED)


def check_layer_state(name: str, state: Mapping[str, Any]) -> None:
    """Refuse invalid tensors of a compressed layer; shapes are checked elsewhere.

    Args:
        name: Name of the layer.
        state: Its part of a state dict, by the layer's own names.

    Raises:
        SchemaError: If an entry is no tensor, floats are not finite or are integers, a quantised matrix has integers of
            another type, or an index is no permutation.
    """
    for key, value in state.items():
        path = f"{name}.{key}"
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise refuse("a tensor", value, path)
        if key.endswith(MATRICES) and value.ndim != 2:
            raise SchemaError(f"Expected a matrix at {path!r} but got {_form(value)}.")
        if key == "permutation":
            # An offloaded layer's index is not in memory.
            if not value.is_meta and not is_permutation(value):
                raise SchemaError(f"no permutation: {path} is {_form(value)} that does not name each feature once.")
        elif key.endswith("rounds_inputs"):
            if value.dtype != torch.bool:
                raise SchemaError(f"Expected a tensor of bool at {path!r} but got {_form(value)}.")
        elif key.endswith(PACKED):
            if value.dtype != torch.int32:
                raise SchemaError(
                    f"Expected packed numbers of a quantised layer in int32 at {path!r} but got {_form(value)}."
                )
        elif key.endswith(".weight") and f"{key.removesuffix('weight')}scale" in state:
            if value.dtype != torch.int8:
                raise SchemaError(
                    f"Expected the weight of a quantised layer in int8 at {path!r} but got {_form(value)}."
                )
        else:
            check_floats(path, value)


def check_floats(name: str, value: Tensor) -> None:
    """Refuse a weight that is not floating point or not finite.

    Raises:
        SchemaError: If it is neither.
    """
    if not value.is_floating_point():
        raise SchemaError(f"Expected a weight of a floating-point type at {name!r} but got {_form(value)}.")
    # Only the libraries of tensor subclasses (sharded, quantised) can read their numbers.
    plain = type(value) in (Tensor, nn.Parameter) and not value.is_meta
    if plain and value.dtype in FLOATS and not bool(torch.isfinite(value).all()):
        raise SchemaError(f"Expected finite weights at {name!r} but got NaN or infinity.")


def check_state(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, compressed: Iterable[str]) -> None:
    """Refuse invalid weights of a compressed module before any is loaded.

    Args:
        module: The module that takes them; its layers may still have another form.
        state_dict: Weights by name.
        prefix: Prefix of the module's names in the state dict.
        compressed: Names of the compressed layers in the state.

    Raises:
        SchemaError: If an entry is invalid, naming it; see :func:`check_layer_state`.
    """
    compressed = set(compressed)
    for name in sorted(compressed):
        start = f"{prefix}{name}."
        part = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
        check_layer_state(name, {key: value for key, value in part.items() if not is_guard(value)})
    if not compressed:
        return
    for name, parameter in module.named_parameters(remove_duplicate=False):
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and parameter.is_floating_point() and not is_guard(value):
            check_floats(prefix + name, value)


def _form(value: Tensor) -> str:
    return f"a tensor of {str(value.dtype).removeprefix('torch.')} and shape {tuple(value.shape)}"


def check_fit(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
    """Refuse weights that do not match a model exactly, before any of them is loaded.

    Args:
        model: The model.
        state_dict: Its weights, possibly among others.
        prefix: Prefix of their names.

    Raises:
        ValueError: If a weight is missing, unexpected or of another shape.
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
            f"these differ: {listed}. Is it another model's? The module is unchanged."
        )


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor; None for other values of a state dict."""
    return tuple(value.shape) if isinstance(value, Tensor) else None
