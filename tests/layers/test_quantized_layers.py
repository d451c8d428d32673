from __future__ import annotations

import pytest
import torch
from lowrank_cases import case, conv1d, random
from torch import nn

from fasc_lightning.layers import (
    QUANTIZATIONS,
    LowRankLinear,
    PivotedLinear,
    linear_weight,
    make_lowrank,
    quantization_of,
    quantized_layer,
)
from fasc_lightning.layers._int8 import Int8Linear
from fasc_lightning.layers._quantized_layers import DenseLinear, make_room

SHAPES = [(40, 60), (60, 40)]  # pivots of outputs, and of inputs


def layers(m=40, n=60, k=12, bias=True, dtype=torch.float32):
    for layout in ("pivot", "factors"):
        yield case(layout, m, n, k, bias, dtype)[0]
    yield nn.Linear(n, m, bias, dtype=dtype)


def error(layer, other, n=60, dtype=torch.float32):
    x = random(30, n, seed=7).to(dtype)
    y = layer(x).detach().double()
    return float((other(x).detach().double() - y).norm() / y.norm())


def stored_bytes(layer):
    return sum(t.numel() * t.element_size() for t in layer.state_dict().values())


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_form_is_kept_and_the_function_nearly(shape, bias, quantization):
    for layer in layers(*shape, bias=bias):
        new = quantized_layer(layer, quantization)
        assert quantization_of(new) == quantization
        assert quantization_of(layer) is None
        assert {type(child) for child in new.children()} == {Int8Linear}
        assert error(layer, new, shape[1]) < 0.03
        if isinstance(layer, nn.Linear):
            assert type(new) is DenseLinear
            assert (new.rank, new.layout) == (40, "dense")
        else:
            assert type(new) is type(layer)
            assert new.rank == layer.rank
            assert new.parameter_count == layer.parameter_count
            assert new.flops_per_token() == layer.flops_per_token()
            assert getattr(new, "side", None) == getattr(layer, "side", None)
        assert (new.bias is not None) == bias
        if bias:
            torch.testing.assert_close(new.bias, layer.bias, rtol=0, atol=0)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_bytes_are_one_a_number_and_a_scale_a_row(quantization):
    pivoted, factored, dense = (quantized_layer(layer, quantization) for layer in layers(40, 60, 12, bias=False))
    marks = 1 if quantization == "int8-dynamic" else 0  # a byte of each matrix
    index, scales = 4 * 40, 4 * (12 + 28)
    assert stored_bytes(pivoted) - 2 * marks == 12 * (40 + 60 - 12) + scales + index
    assert stored_bytes(factored) - 2 * marks == 12 * (40 + 60) + 4 * (12 + 40)
    assert stored_bytes(dense) - marks == 40 * 60 + 4 * 40


@pytest.mark.parametrize("shape", SHAPES)
def test_the_weight_is_that_of_the_rounded_matrices(shape):
    for layer in layers(*shape):
        new = quantized_layer(layer, "int8")
        x = random(6, shape[1], seed=7).float()
        torch.testing.assert_close(new(x), x @ new.to_weight().T + new.bias, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(new.to_linear()(x), new(x), rtol=1e-4, atol=1e-4)
        left, right = new.factors()
        assert left.shape[1] == right.shape[0] == new.rank
        torch.testing.assert_close(left @ right, new.to_weight(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_half_precision(quantization, dtype):
    for layer in layers(dtype=dtype):
        new = quantized_layer(layer, quantization)
        assert {t.dtype for t in new.state_dict().values()} <= {torch.int8, dtype, torch.int32, torch.bool}
        assert error(layer, new, dtype=dtype) < 0.04
        assert (new.weight.dtype, new.to_weight().dtype, new.to_linear().weight.dtype) == (dtype,) * 3


def test_model_code_that_reads_the_weight_sees_the_dtype_of_the_layer():
    for layer in layers(dtype=torch.bfloat16):
        weight = quantized_layer(layer, "int8").weight
        assert (weight.dtype, weight.device.type, weight.shape) == (torch.bfloat16, "cpu", (40, 60))


def test_a_steep_spectrum_is_rounded_no_worse_than_a_flat_one():
    """The components of two factors are of very different lengths, and share one scale in each row of the left one."""
    U, V = (torch.linalg.qr(random(64, 16, seed=seed)).Q for seed in (1, 2))
    for decades in (0, 3):
        W = U * torch.logspace(0, -decades, 16, dtype=torch.float64) @ V.T
        for layout in ("factors", "pivot"):
            new = quantized_layer(make_lowrank(W @ V, V.T, None, layout, dtype=torch.float32), "int8")
            assert (new.to_weight() - W).norm() < 0.015 * W.norm()


@pytest.mark.parametrize(
    ("layout", "m", "n", "reader"),
    [("factors", 40, 60, "factor_in"), ("pivot", 40, 60, "basis"), ("pivot", 60, 40, "coefficients")],
)
def test_what_passes_between_the_matrices_is_rounded_finely(layout, m, n, reader):
    new = quantized_layer(make_lowrank(random(m, 12), random(12, n), None, layout, dtype=torch.float32), "int8-dynamic")
    assert {child.input_bits: name for name, child in new.named_children()}[8] == reader
    assert {child.input_bits for child in new.children()} == {8, 16}
    assert quantization_of(new) == "int8-dynamic"


def test_flags():
    for layer in layers():
        layer.requires_grad_(False)
        new = quantized_layer(layer, "int8")
        assert not any(p.requires_grad for p in new.parameters())
    for layer in layers():
        new = quantized_layer(layer, "int8")
        assert {p.dtype: p.requires_grad for p in new.parameters()} == {torch.int8: False, torch.float32: True}
        # What int8 could not do, its dense layer can: train.
        assert all(p.requires_grad for p in new.to_linear().parameters())


def test_layers_of_gpt2():
    conv = conv1d(40, 60)
    new = quantized_layer(conv, "int8")
    torch.testing.assert_close(new.to_weight(), linear_weight(conv), rtol=0, atol=1e-3)
    pivoted = make_lowrank(random(40, 5), random(5, 60))
    pivoted.from_conv1d = True
    assert quantized_layer(pivoted, "int8").from_conv1d


def test_the_layer_that_is_read_is_not_shared():
    layer = case("pivot", 40, 60)[0]
    new = quantized_layer(layer, "int8")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for value in new.state_dict().values():
        value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_room_for_int8_has_the_form_that_is_loaded_into_it():
    for layer in layers():
        new = quantized_layer(layer, "int8-dynamic")
        if isinstance(layer, PivotedLinear):
            empty = PivotedLinear(60, 40, 12, side=layer.side)
        elif isinstance(layer, LowRankLinear):
            empty = LowRankLinear(60, 40, 12)
        else:
            empty = DenseLinear(60, 40)
        room = make_room(empty, "int8-dynamic")
        room.load_state_dict(new.state_dict())
        x = random(3, 60).float()
        assert torch.equal(room(x), new(x))
        assert repr(room) == repr(new)


def test_what_cannot_be_quantised_is_refused():
    layer = case("factors", 6, 8, 3)[0]
    with pytest.raises(ValueError, match=r"quantised \('int8'\) already"):
        quantized_layer(quantized_layer(layer, "int8"), "int8-dynamic")
    with pytest.raises(TypeError, match=r"Expected an nn\.Linear or a transformers Conv1D, got LayerNorm"):
        quantized_layer(nn.LayerNorm(4), "int8")
    layer.factor_in = nn.Sequential(layer.factor_in)
    with pytest.raises(TypeError, match="plain linear layers as the factors of a compressed layer, found torch"):
        quantized_layer(layer, "int8")
    layer = case("pivot", 6, 8, 3)[0]
    layer.basis.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite weights"):
        quantized_layer(layer, "int8")


def test_dense_layers_of_full_rank_take_no_rank():
    layer = DenseLinear(5, 3)
    assert (layer.rank, layer.cost(3, 5, 3), layer.extra_bytes) == (3, 15, 0)
    assert torch.equal(layer.to_weight(), layer.matrix.weight)
    assert DenseLinear(3, 5).factors()[1].equal(torch.eye(3))
