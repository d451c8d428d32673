"""Guards: entries of saved weights that keep a reader without this package from making up the compressed layers.

transformers fills layers whose weights a folder lacks with random numbers, and only warns. But it fails where a weight
has another shape than its layer. So each compressed layer is saved with one more entry: under the name of the dense
weight that it replaced, of a shape that no linear layer has. Of experts it is one entry a module, for the weight that
held them all; transformers gives it the name that checkpoints have, as it does with such weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from fasc_lightning.expert_views import split_name

#: One byte. Not none: transformers takes empty tensors, which all lie at address 0, for one that is shared.
GUARD_SHAPE, GUARD_DTYPE = (1,), torch.uint8


def guard_key(layer: str) -> str:
    """Return the key of a compressed layer's guard; that of an expert is its module's."""
    expert = split_name(layer)
    return f"{layer}.weight" if expert is None else f"{expert[0]}.down_proj"


def guards(layers: Iterable[str]) -> dict[str, Tensor]:
    """Return the guards of compressed layers, by key."""
    return {guard_key(layer): torch.zeros(GUARD_SHAPE, dtype=GUARD_DTYPE) for layer in layers}


def is_guard(value: Any) -> bool:
    """Whether an entry of a state dict is a guard; those of experts lose their dimension as they are saved."""
    return isinstance(value, Tensor) and value.shape in (GUARD_SHAPE, ()) and value.dtype == GUARD_DTYPE


def expect_guards(model: Any, files: Iterable[str | PathLike[str]], layers: Iterable[str]) -> None:
    """Keep ``from_pretrained`` from reporting the guards in some files as left over.

    Args:
        model: A transformers model whose weights are about to be read.
        files: To read them from; only the headers are read here, and files other than safetensors hold no guards.
        layers: The compressed layers, by the names that they were saved with.
    """
    layers = list(layers)
    keys = _found(files, {guard_key(layer) for layer in layers if split_name(layer) is None})
    # In files these have other names; whoever reads them knows them by the one of the module.
    keys |= {guard_key(layer) for layer in layers if split_name(layer) is not None}
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
