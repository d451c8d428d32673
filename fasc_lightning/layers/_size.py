"""Sizes of layers and models: parameters, bytes and operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fasc_lightning.layers._fused_experts import PROJECTIONS, ExpertLinear, is_fused_experts
from fasc_lightning.layers._linear import flops_per_token
from fasc_lightning.layers._packed_linear import PackedLinear


@dataclass(frozen=True)
class Size:
    """Parameters, bytes and FLOPs of a set of layers.

    Attributes:
        parameters: Numbers of the matrices and biases, without the index of a pivoted layer, scales and zero points.
        bytes: Memory of parameters and buffers, indices included.
        flops_per_token: Two for each multiply-add of a linear layer; experts count by the share that works on a token.
            Attention and element-wise operations are not counted.
    """

    parameters: int
    bytes: int
    flops_per_token: int


def bytes_in_16_bits(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors if their numbers in floating point had 16 bits, as in a saved model."""
    return sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in tensors)


def layer_sizes(layers: Mapping[str, nn.Module]) -> Size:
    """Return the total size of layers, dense or compressed."""
    modules = list({id(m): m for m in layers.values()}.values())
    counts = [_counts(m) for m in modules]
    return Size(
        parameters=sum(parameters for parameters, _ in counts),
        bytes=sum(size for _, size in counts),
        flops_per_token=_flops(modules),
    )


def model_size(model: nn.Module) -> Size:
    """Return the size of a whole model; shared parameters count once."""
    parameters, size = _counts(model)
    return Size(parameters=parameters, bytes=size, flops_per_token=_flops(_outermost_linear(model)))


def _outermost_linear(model: nn.Module) -> list[nn.Module]:
    """Return linear and low-rank layers, without the children of the latter."""
    if flops_per_token(model) > 0:
        return [model]
    if is_fused_experts(model):
        one = [ExpertLinear(model, 0, projection) for projection in PROJECTIONS]
        count: Any = model.num_experts  # all of one shape
        return one * count
    return [layer for child in model.children() for layer in _outermost_linear(child)]


def _flops(layers: Iterable[nn.Module]) -> int:
    return round(sum(flops_per_token(layer) * getattr(layer, "expert_share", 1.0) for layer in layers))


def _counts(module: nn.Module) -> tuple[int, int]:
    """Return the count of parameters, and the bytes with buffers; each is read once, since an expert's is a slice.

    A rounded matrix counts as many parameters as it has codes.
    """
    parameters = list(module.parameters())
    size = sum(t.numel() * t.element_size() for t in (*parameters, *module.buffers()))
    packed = [m for m in module.modules() if isinstance(m, PackedLinear)]
    numbers = {id(p): m.in_features * m.out_features for m in packed for p in (m.weight_packed,) if p is not None}
    scales = {id(m.weight_scale) for m in packed}
    # The scales of a prepared matrix lie in the memory of the kernel's.
    size -= sum(m.weight_scale.nbytes for m in packed if m.kernel_scales is not None)
    return sum(numbers.get(id(p), p.numel()) for p in parameters if id(p) not in scales), size
