"""Compressed layers with matrices of integers: their kinds, and the conversion of floating-point layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from fasc_lightning.layers._compressed_linear import CompressedLinear, matrix_of
from fasc_lightning.layers._dense_linear import DenseLinear
from fasc_lightning.layers._grid import Grid, Rounded
from fasc_lightning.layers._int8 import InputBits, Int8Linear
from fasc_lightning.layers._linear import linear_weight
from fasc_lightning.layers._lowrank import LowRankLinear
from fasc_lightning.layers._make_lowrank import make_lowrank
from fasc_lightning.layers._packed_linear import PackedLinear
from fasc_lightning.layers._pivoted import PivotedLinear
from fasc_lightning.layers._residual import ResidualLinear
from fasc_lightning.layers._second_matrix import first_and_second, fitted_second

#: "int8": int8 weights, products in floating point. "int8-dynamic": rounded inputs, too, for products of integers.
#: The features between the two matrices are rounded to 16 bits, because 8 bits would lose all but the few features that
#: are far larger than the rest (on SmolLM2-135M at keep 0.8 that costs 37 % in perplexity; 8-bit inputs cost 2 %).
Quantization = Literal["int8", "int8-dynamic"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

#: The grid of "int8": one scale for each output. It is held as an :class:`Int8Linear`, which has faster products.
INT8_ROWS = Grid(8, group=None, symmetric=True)

#: How the matrices of a layer are held, if not in floating point: int8 rows, or another grid.
Form: TypeAlias = Quantization | Grid


def quantization_of(layer: nn.Module) -> Form | None:
    """Return the quantisation of a compressed layer; None for one in floating point, or another kind of layer."""
    if isinstance(layer, CompressedLinear):
        for child in layer.children():
            if isinstance(child, Int8Linear):
                return "int8" if child.input_bits is None else "int8-dynamic"
            if isinstance(child, PackedLinear):
                return child.grid
    return None


def packed_matrices(model: nn.Module) -> list[PackedLinear]:
    """Return the rounded matrices of a model whose scales can be trained."""
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def form_to_plain(form: Form) -> str | dict[str, Any]:
    """Return a quantisation in JSON types, for files and reports."""
    if form == INT8_ROWS:
        return "int8"
    if isinstance(form, str):
        return form
    return {"bits": form.bits, "group": form.group, "symmetric": form.symmetric}


def form_from_plain(value: Any) -> Form:
    """Return the quantisation that :func:`form_to_plain` wrote.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, str) and value in QUANTIZATIONS:
        return value
    is_grid = isinstance(value, Mapping) and value.keys() == {"bits", "group", "symmetric"}
    if is_grid and type(value["symmetric"]) is bool:
        return Grid(value["bits"], value["group"], value["symmetric"])
    raise ValueError(
        f"Expected a quantisation, {', '.join(map(repr, QUANTIZATIONS))} or "
        f'{{"bits": int, "group": int or None, "symmetric": bool}}, but got {value!r:.200}.'
    )


def rounded_layer(layer: nn.Module, rounded: Rounded) -> CompressedLinear:
    """Return a layer of full rank with a rounded matrix.

    Args:
        layer: The dense layer (``nn.Linear``, ``Conv1D``, an expert's projection). It is only read.
        rounded: Its matrix on a grid, shape (m, n).
    """
    m, n = rounded.codes.shape
    bias: Any = layer.bias
    new = DenseLinear(n, m, bias is not None, device="meta")
    weight = linear_weight(layer)
    new.matrix = _rounded_matrix(rounded, bias, weight.dtype).to(weight.device)
    return new


def residual_layer(layer: nn.Module, rounded: Rounded, factors: tuple[Tensor, Tensor]) -> ResidualLinear:
    """Return a layer with a rounded matrix and a residual of two factors, which are rounded to int8.

    Args:
        layer: The dense layer (``nn.Linear``, ``Conv1D``, an expert's projection). It is only read.
        rounded: Its matrix on a grid, shape (m, n).
        factors: Left (m, k) and right (k, n) factor of the residual.
    """
    left, right = factors
    full = rounded_layer(layer, rounded)
    weight = linear_weight(layer)
    low = make_lowrank(left, right, None, "factors", dtype=weight.dtype, device=weight.device)
    low = quantized_layer(low, "int8")
    new = ResidualLinear(len(right[0]), len(left), len(right), layer.bias is not None, device="meta")
    new.matrix, new.factor_in, new.factor_out = full.matrix, low.factor_in, low.factor_out
    return new


def rounded_state(layer: CompressedLinear, rounded: Rounded) -> dict[str, Tensor]:
    """Return the state dict of a rounded layer of full rank with another matrix on its grid, and all else its own."""
    state = {key: value for key, value in layer.state_dict().items() if not key.startswith("matrix.")}
    matrix = _rounded_matrix(rounded, layer.bias, layer.weight.dtype)
    return state | {f"matrix.{key}": value for key, value in matrix.state_dict().items()}


def _rounded_matrix(rounded: Rounded, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    if rounded.grid == INT8_ROWS:
        return Int8Linear.from_rounded(rounded, bias, dtype)
    return PackedLinear.from_rounded(rounded, bias, dtype)


def _input_bits(layer: CompressedLinear, child: str, quantization: Quantization) -> InputBits:
    """Return the bits to which a matrix's inputs are rounded."""
    if quantization == "int8":
        return None
    return 8 if child == layer.reads_inputs else 16


def quantized_layer(layer: nn.Module, quantization: Quantization, A: Tensor | None = None) -> CompressedLinear:
    """Return a layer of the same form and nearly the same function, its matrices rounded to int8 row by row.

    Of two matrices the first is rounded as it is, and the second is fitted to the rounded first one before it is
    rounded. Two factors share the lengths of their columns and rows evenly. That loses as little to one scale a row as
    moving all lengths to the side where each has its own scale.

    Args:
        layer: A compressed layer, or a dense one (``nn.Linear``, ``Conv1D``). It is only read.
        quantization: See :data:`Quantization`.
        A: E[x x^T] of the layer's inputs, shape (n, n), in which the second matrix is fitted; None for the identity.

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
    for name in sorted(weights, key=lambda name: name != new.reads_inputs):
        bits = _input_bits(new, name, quantization)
        made = Int8Linear.from_weight(weights[name], biases[name], bits, dtype)
        setattr(new, name, made)
        if isinstance(layer, CompressedLinear) and name == new.reads_inputs and len(weights) > 1:
            weights[first_and_second(layer)[1]] = fitted_second(layer, made.dequantize(), A)
    return new


def make_room(layer: CompressedLinear, form: Form) -> CompressedLinear:
    """Replace the matrices of a compressed layer in place by quantised ones of the same shapes, without values."""
    for name, child in list(layer.named_children()):
        assert isinstance(child, nn.Linear)
        shape = (child.in_features, child.out_features)
        like: dict[str, Any] = {"device": child.weight.device, "dtype": child.weight.dtype}
        bias = child.bias is not None
        new: nn.Module
        if isinstance(layer, ResidualLinear) and name != "matrix":
            new = Int8Linear(*shape, bias, None, **like)
        elif isinstance(form, Grid):
            new = PackedLinear(*shape, form, bias, **like)
        else:
            new = Int8Linear(*shape, bias, _input_bits(layer, name, form), **like)
        setattr(layer, name, new)
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
