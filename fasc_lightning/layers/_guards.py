"""Guards: entries in saved weights that stop readers without this package from inventing the compressed layers.

transformers fills layers whose weights a folder lacks with random numbers, and only warns. But it fails if a weight and
its layer differ in shape. So each compressed layer is saved with one more entry: under the name of the dense weight
that it replaced, with a shape that no linear layer has. Experts have one guard for each module, under the name of the
weight that held all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from fasc_lightning.layers._fused_experts import split_name

#: One byte, and not zero: empty tensors all lie at address 0, and transformers takes them for one shared tensor.
GUARD_SHAPE, GUARD_DTYPE = (1,), torch.uint8


def guard_key(layer: str) -> str:
    """Return the key of a compressed layer's guard; experts share the key of their module."""
    expert = split_name(layer)
    return f"{layer}.weight" if expert is None else f"{expert[0]}.down_proj"


def guards(layers: Iterable[str]) -> dict[str, Tensor]:
    """Return the guards of compressed layers, by key."""
    return {guard_key(layer): torch.zeros(GUARD_SHAPE, dtype=GUARD_DTYPE) for layer in layers}


def is_guard(value: Any) -> bool:
    """Whether an entry of a state dict is a guard; experts' guards lose their dimension when names are converted."""
    return isinstance(value, Tensor) and value.shape in (GUARD_SHAPE, ()) and value.dtype == GUARD_DTYPE


def saved_guards(files: Iterable[str | PathLike[str]]) -> tuple[set[str], set[str]]:
    """Return the names of all entries in files, and the names of the entries that could be guards.

    Args:
        files: Only their headers are read. Files other than safetensors are skipped: they hold no guards.
    """
    from safetensors import safe_open

    keys: set[str] = set()
    guarded: set[str] = set()
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 # no mapping
                entry = opened.get_slice(key)
                keys.add(key)
                if entry.get_dtype() == "U8" and tuple(entry.get_shape()) in (GUARD_SHAPE, ()):
                    guarded.add(key)
    return keys, guarded


def expect_guards(model: Any, found: Mapping[str, Iterable[str]], layers: Iterable[str]) -> None:
    """Keep ``from_pretrained`` from reporting guards as unexpected.

    Args:
        model: A transformers model whose weights are about to be read.
        found: Entries that could be guards, with the names that transformers gives each when it reads them.
        layers: The compressed layers, under all their possible names.
    """
    guarded = {guard_key(layer) for layer in layers}
    keys = {name for key, names in found.items() if not guarded.isdisjoint((key, *names)) for name in (key, *names)}
    if not keys:
        return
    # A base model reads the keys of a whole model's folder without the prefix.
    keys |= {key.removeprefix(f"{model.base_model_prefix}.") for key in keys}
    known = model._keys_to_ignore_on_load_unexpected
    patterns = [*(known or ()), *(rf"^{re.escape(key)}$" for key in sorted(keys))]
    # A set, or in early versions of transformers a list or None.
    model._keys_to_ignore_on_load_unexpected = set(patterns) if isinstance(known, set) else patterns
