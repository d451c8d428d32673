"""Compressed layers with int8 matrices: their kinds, and the conversion of floating-point layers."""

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

#: "int8": int8 weights, products in floating point. "int8-dynamic": rounded inputs, too, for products of integers.
#: The features between the two matrices are rounded to 16 bits, because 8 bits would lose all but the few features that
#: are far larger than the rest (on SmolLM2-135M at keep 0.8 that costs 37 % in perplexity; 8-bit inputs cost 2 %).
Quantization = Literal["int8", "int8-dynamic"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)


class DenseLinear(CompressedLinear):
    """A layer of full rank that saves bytes instead of numbers: a dense layer with a quantised matrix.

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
        """Map (..., n) to (..., m)."""
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
    """Return the quantisation of a compressed layer; None for one in floating point, or another kind of layer."""
    if isinstance(layer, CompressedLinear):
        for child in layer.children():
            if isinstance(child, Int8Linear):
                return "int8" if child.input_bits is None else "int8-dynamic"
    return None


def _input_bits(layer: CompressedLinear, child: str, quantization: Quantization) -> InputBits:
    """Return the bits to which a matrix's inputs are rounded."""
    if quantization == "int8":
        return None
    return 8 if child == layer.reads_inputs else 16


def quantized_layer(layer: nn.Module, quantization: Quantization) -> CompressedLinear:
    """Return a layer of the same form and nearly the same function, its matrices rounded to int8 row by row.

    The matrices are rounded as they are. In a pivoted layer, coefficients are bounded and each kept row has its own
    scale. Two factors share the lengths of their columns and rows evenly. That loses as little to one scale a row as
    moving all lengths to the side where each has its own scale.

    Args:
        layer: A compressed layer, or a dense one (``nn.Linear``, ``Conv1D``). It is only read.
        quantization: See :data:`Quantization`.

    Raises:
        TypeError: If the layer is of another kind, or one of its matrices is no plain linear layer (adapters, another
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
    """Replace the matrices of a compressed layer in place by int8 matrices of the same shapes, without values."""
    for name, child in list(layer.named_children()):
        assert isinstance(child, nn.Linear)
        shape = (child.in_features, child.out_features, child.bias is not None)
        like = child.weight
        bits = _input_bits(layer, name, quantization)
        int8 = Int8Linear(*shape, input_bits=bits, device=like.device, dtype=like.dtype)
        setattr(layer, name, int8)
    return layer


def _empty_copy(layer: nn.Module) -> CompressedLinear:
    """Return a layer of the same form on the meta device; everything but the matrices is copied.

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
    """Refuse an unknown value of the option.

    Raises:
        ValueError: If it is unknown.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(
            f"Expected `quantize` to be one of {', '.join(map(repr, QUANTIZATIONS))} but got {quantization!r}."
        )
