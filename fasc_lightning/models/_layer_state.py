"""Checks of weights from a file, before a module takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasc_lightning._utils import FLOATS, SchemaError, is_permutation, refuse
from fasc_lightning.layers import is_guard


def check_layer_state(name: str, state: Mapping[str, Any]) -> None:
    """Refuse invalid tensors of a compressed layer; shapes are checked elsewhere.

    Args:
        name: Name of the layer.
        state: Its part of a state dict, by the layer's own names.

    Raises:
        SchemaError: If an entry is no tensor, floats are not finite or are integers, int8 numbers have another type, or
            an index is no permutation.
    """
    for key, value in state.items():
        path = f"{name}.{key}"
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise refuse("a tensor", value, path)
        if key.endswith(".weight") and value.ndim != 2:
            raise SchemaError(f"Expected a matrix at {path!r} but got {_form(value)}.")
        if key == "permutation":
            # An offloaded layer's index is not in memory.
            if not value.is_meta and not is_permutation(value):
                raise SchemaError(f"no permutation: {path} is {_form(value)} that does not name each feature once.")
        elif key.endswith("rounds_inputs"):
            if value.dtype != torch.bool:
                raise SchemaError(f"Expected a tensor of bool at {path!r} but got {_form(value)}.")
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
        prefix: Of the module's names in it.
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
