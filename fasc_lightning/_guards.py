"""Guards: entries of saved weights that keep a reader without this package from making up the compressed layers.

transformers fills layers whose weights a folder lacks with random numbers, and only warns. But it fails where a weight
has another shape than its layer. So each compressed layer is saved with one more entry: under the name of the dense
weight that it replaced, of a shape that no linear layer has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from os import PathLike
from typing import Any

import torch
from torch import Tensor

#: One byte. Not none: transformers takes empty tensors, which all lie at address 0, for one that is shared.
GUARD_SHAPE, GUARD_DTYPE = (1,), torch.uint8


def guard_key(layer: str) -> str:
    """Return the key of a compressed layer's guard."""
    return f"{layer}.weight"


def guards(layers: Iterable[str]) -> dict[str, Tensor]:
    """Return the guards of compressed layers, by key."""
    return {guard_key(layer): torch.zeros(GUARD_SHAPE, dtype=GUARD_DTYPE) for layer in layers}


def is_guard(value: Any) -> bool:
    """Whether an entry of a state dict is a guard."""
    return isinstance(value, Tensor) and value.shape == GUARD_SHAPE and value.dtype == GUARD_DTYPE


def expect_guards(model: Any, files: Iterable[str | PathLike[str]], layers: Iterable[str]) -> None:
    """Keep ``from_pretrained`` from reporting the guards in some files as left over.

    Args:
        model: A transformers model whose weights are about to be read.
        files: To read them from; only the headers are read here, and files other than safetensors hold no guards.
        layers: The compressed layers, by the names that they were saved with.
    """
    keys = _found(files, {guard_key(layer) for layer in layers})
    if not keys:
        return
    # Of a whole model's folder, a base model reads keys without the prefix.
    keys |= {key.removeprefix(f"{model.base_model_prefix}.") for key in keys}
    known = model._keys_to_ignore_on_load_unexpected
    patterns = [*(known or ()), *(rf"^{re.escape(key)}$" for key in sorted(keys))]
    # A set, or in early versions of transformers a list or None.
    model._keys_to_ignore_on_load_unexpected = set(patterns) if isinstance(known, set) else patterns


def _found(files: Iterable[str | PathLike[str]], keys: set[str]) -> set[str]:
    from safetensors import safe_open

    found: set[str] = set()
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as opened:
            here = keys.intersection(opened.keys())
            found.update(key for key in here if tuple(opened.get_slice(key).get_shape()) == GUARD_SHAPE)
    return found
