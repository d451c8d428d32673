"""Copies of modules without gradients, in another type or on another device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def frozen_copy(module: nn.Module, device: Any = None, dtype: torch.dtype | None = None) -> Any:
    """Return a copy of a module without gradients, in a type and on a device; the module itself does not change.

    Only converted parameters take memory, each once; all others are shared. Buffers that are no weights keep their
    type: the frequencies of rotary embeddings, multiplied by positions, are too coarse in half precision.

    Args:
        module: The module to copy.
        device: Device of the copy; None keeps each parameter's own.
        dtype: Type of the copy; None keeps each parameter's own.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        wanted = dtype if parameter.is_floating_point() else None
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(device=device, dtype=wanted), requires_grad=False)
    for each in module.modules():
        for name, buffer in each._buffers.items():
            if buffer is not None:
                weights = buffer.is_floating_point() and name not in each._non_persistent_buffers_set
                memo[id(buffer)] = buffer.detach().to(device=device, dtype=dtype if weights else None, copy=True)
    return copy.deepcopy(module, memo)
