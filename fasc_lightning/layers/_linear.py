"""Dense linear layers of any class: weight, shape, gradient at the input, operations."""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fasc_lightning.layers._compressed_linear import CompressedLinear
from fasc_lightning.layers._fused_experts import ExpertLinear
from fasc_lightning.layers._reparametrised import computed_weight, is_reparametrised

#: The gradient that rho couples with x: g = W^T h as in the paper, or h itself.
Gradient = Literal["input", "output"]

#: Rows of a half-precision weight that are converted at a time.
_PANEL = 384


def input_gradient(h: Tensor, W: Tensor) -> Tensor:
    """Return g = W^T h for each token, the gradient at a layer's input, in float32 or wider.

    Args:
        h: Gradients at the output, shape (tokens, m).
        W: Weight, shape (m, n); half precision is converted in panels, so that W is never held twice.
    """
    dtype = torch.promote_types(W.dtype, torch.float32)
    with torch.autocast(h.device.type, enabled=False):
        if W.dtype == dtype:
            return h.to(dtype) @ W
        g = h.new_zeros(len(h), W.shape[1], dtype=dtype)
        for rows, weights in zip(h.split(_PANEL, dim=1), W.split(_PANEL), strict=True):
            g.addmm_(rows.to(dtype), weights.to(dtype))
    return g


def linear_weight(module: nn.Module) -> Tensor:
    """Return the weight of a dense linear layer as an (m, n) view; GPT-2's ``Conv1D`` is transposed.

    A weight that is computed from other tensors is returned as in eval mode, and the layer's state does not change.

    Raises:
        TypeError: If the module is neither ``nn.Linear`` nor transformers' ``Conv1D``.
    """
    if isinstance(module, nn.Linear) or is_conv1d(module):
        weight: Any = computed_weight(module) if is_reparametrised(module) else module.weight
        return weight if isinstance(module, nn.Linear) else weight.T
    raise TypeError(f"Expected an nn.Linear or a transformers Conv1D, got {type(module).__name__}.")


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (m, n), outputs and inputs, of a dense or compressed linear layer.

    Raises:
        TypeError: If the module is not a linear layer.
    """
    if isinstance(module, CompressedLinear | ExpertLinear):  # without a slice of an expert's tensor
        return module.out_features, module.in_features
    if isinstance(module, nn.Linear) and is_reparametrised(module):  # without computing the weight
        return module.out_features, module.in_features
    m, n = linear_weight(module).shape
    return m, n


def flops_per_token(module: nn.Module) -> int:
    """Return the floating-point operations for a token in a linear layer, dense or compressed; 0 for other modules."""
    if isinstance(module, CompressedLinear):
        return module.flops_per_token()
    if isinstance(module, nn.Linear) or is_conv1d(module):
        m, n = linear_shape(module)
        return 2 * m * n
    return 0


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear layer, whose weight is (in, out)."""
    # An instance exists only where transformers has been imported; importing it here would take seconds.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return conv1d is not None and isinstance(module, conv1d)


def empty_conv1d(m: int, n: int) -> Any:
    """Return a transformers ``Conv1D`` with m outputs and n inputs on the meta device; draws no random numbers."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        return Conv1D(m, n)
