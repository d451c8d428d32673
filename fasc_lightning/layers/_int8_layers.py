"""Compressed layers whose matrices are int8: which there are, and how one is made of a layer in floating point."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from fasc_lightning.layers._compressed_linear import CompressedLinear, matrix_of
from fasc_lightning.layers._int8 import InputBits, Int8Linear
from fasc_lightning.layers._linear import linear_weight
from fasc_lightning.layers._lowrank import LowRankLinear
from fasc_lightning.layers._pivoted import PivotedLinear

#: "int8": weights of int8, products in floating point. "int8-dynamic": inputs are rounded, too, and products are those
#: of integers. What passes from one matrix to the other is rounded to 16 bits: few of these features are far larger
#: than the rest, which 8 bits would round away (on SmolLM2-135M at keep 0.8 that costs 37 % in perplexity, and rounding
#: the inputs 2 %).
Quantization = Literal["int8", "int8-dynamic"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)


class DenseLinear(CompressedLinear):
    """A layer of full rank that saves bytes instead of numbers: what a dense layer becomes where it is quantised.

    Args:
        in_features: n.
        out_features: m.
        bias: Whether there is a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    layout = "dense"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, min(in_features, out_features))
        self.matrix = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)

    @staticmethod
    @override
    def cost(m: int, n: int, k: int) -> int:
        return m * n

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., n) to (..., m)."""
        return self.matrix(x)

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        W = matrix_of(self.matrix)
        eye = torch.eye(self.rank, dtype=W.dtype, device=W.device)
        return (eye, W) if self.out_features == self.rank else (W, eye)

    @override
    def to_weight(self) -> Tensor:
        return matrix_of(self.matrix).to(self._like.dtype)

    @property
    @override
    def bias(self) -> Tensor | None:
        return self.matrix.bias

    @property
    @override
    def extra_bytes(self) -> int:
        return 0

    @property
    @override
    def reads_inputs(self) -> str:
        return "matrix"

    @override
    def _child(self) -> nn.Module:
        return self.matrix


def quantization_of(layer: nn.Module) -> Quantization | None:
    """Return how a compressed layer is quantised; None if it is in floating point, or another kind of layer."""
    if isinstance(layer, CompressedLinear):
        for child in layer.children():
            if isinstance(child, Int8Linear):
                return "int8" if child.input_bits is None else "int8-dynamic"
    return None


def _input_bits(layer: CompressedLinear, child: str, quantization: Quantization) -> InputBits:
    """To what the inputs of a matrix of a layer are rounded."""
    if quantization == "int8":
        return None
    return 8 if child == layer.reads_inputs else 16


def quantized_layer(layer: nn.Module, quantization: Quantization) -> CompressedLinear:
    """Return a layer of the same form and nearly the same function, its matrices rounded to int8 row by row.

    Nothing is done to the matrices before. Coefficients of pivoted layers are bounded and kept rows each have a scale
    of their own; two factors share out the lengths of their columns and rows evenly, which loses as little to one scale
    a row as moving them all to the side where each has its own.

    Args:
        layer: A compressed layer, or a dense one (``nn.Linear``, ``Conv1D``). It is only read.
        quantization: See :data:`Quantization`.

    Raises:
        TypeError: If the layer is of no such kind, or one of its matrices is no plain linear layer (adapters, another
            library's quantisation).
        ValueError: If the layer is quantised already, or its weights are not finite.
    """
    if (found := quantization_of(layer)) is not None:
        raise ValueError(f"Expected weights in floating point but the layer is quantised ({found!r}) already.")
    new = _empty_copy(layer)
    if isinstance(layer, CompressedLinear):
        weights = {name: matrix_of(child) for name, child in layer.named_children()}
        biases: dict[str, Any] = {name: child.bias for name, child in layer.named_children()}
        dtype = layer.weight.dtype
    else:
        weights, biases, dtype = {"matrix": linear_weight(layer)}, {"matrix": layer.bias}, linear_weight(layer).dtype
    for name, weight in weights.items():
        bits = _input_bits(new, name, quantization)
        setattr(new, name, Int8Linear.from_weight(weight, biases[name], bits, dtype))
    return new


def make_room_for_int8(layer: CompressedLinear, quantization: Quantization) -> CompressedLinear:
    """Replace the matrices of a compressed layer by int8 ones of the same shapes, in place, their values unset."""
    for name, child in list(layer.named_children()):
        assert isinstance(child, nn.Linear)
        shape = (child.in_features, child.out_features, child.bias is not None)
        like = child.weight
        bits = _input_bits(layer, name, quantization)
        int8 = Int8Linear(*shape, input_bits=bits, device=like.device, dtype=like.dtype)
        setattr(layer, name, int8)
    return layer


def _empty_copy(layer: nn.Module) -> CompressedLinear:
    """Return a layer of the same form on the meta device, with what is not a matrix copied.

    Raises:
        TypeError: If the layer is not linear.
    """
    if not isinstance(layer, CompressedLinear):
        m, n = linear_weight(layer).shape
        return DenseLinear(n, m, layer.bias is not None, device="meta")
    n, m, k, bias = layer.in_features, layer.out_features, layer.rank, layer.bias is not None
    new: CompressedLinear
    if isinstance(layer, PivotedLinear):
        new = PivotedLinear(n, m, k, bias, layer.side, device="meta")
        new.permutation = layer.permutation.clone()
        if layer.pivot_bias is not None:
            new.pivot_bias = nn.Parameter(layer.pivot_bias.detach().clone(), layer.pivot_bias.requires_grad)
    else:
        new = LowRankLinear(n, m, k, bias, device="meta")
    new.from_conv1d = layer.from_conv1d
    return new


def check_quantization(quantization: Any) -> None:
    """Check the option.

    Raises:
        ValueError: If it is unknown.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(
            f"Expected `quantize` to be one of {', '.join(map(repr, QUANTIZATIONS))} but got {quantization!r}."
        )
