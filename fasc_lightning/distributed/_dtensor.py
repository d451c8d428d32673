"""DTensors, and their full values on one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Tell whether a tensor is distributed over processes."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its values.

    A distributed tensor is gathered, without its gradient history. All processes must call this in the same order.
    """
    if not is_dtensor(tensor):
        return tensor
    spread: Any = tensor.detach()
    # Offloaded parts go to the device on which the processes communicate, and the result goes back.
    return spread.to(spread.device_mesh.device_type).full_tensor().to(tensor.device)
