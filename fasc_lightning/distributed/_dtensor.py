"""Tensors that several processes hold together, and their values in one of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Tell whether a tensor is spread over processes."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its values, which it has unless it is spread over processes.

    One that is is gathered, without its gradient's history: all processes have to ask for it, in the same order.
    """
    if not is_dtensor(tensor):
        return tensor
    spread: Any = tensor.detach()
    # Offloaded parts go to where the processes can exchange them, and what comes of it back.
    return spread.to(spread.device_mesh.device_type).full_tensor().to(tensor.device)
