"""Copies of modules without gradients, in another type or on another device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def frozen_copy(module: nn.Module, device: Any = None, dtype: torch.dtype | None = None) -> Any:
    """Return a copy that needs no gradients, in a type and on a device; the module itself does not change.

    It takes memory for what has to be converted alone, and never more than once: parameters that are as wanted are
    shared. Buffers that are no part of the weights keep their type: the frequencies of rotary embeddings, times
    positions, are of no use in half precision.

    Args:
        module: What to copy.
        device: None for where each parameter is.
        dtype: None for the type of each.
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
