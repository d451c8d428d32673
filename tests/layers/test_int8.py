from __future__ import annotations

import copy
import warnings

import pytest
import torch
from lowrank_cases import random
from torch import nn
from torch.nn import functional as F

from fasc_lightning.layers import _int8
from fasc_lightning.layers._int8 import Int8Linear, align_weights, round_rows


def peaked(*shape, seed=0):
    """Random rows whose largest number is positive: the largest negative one lies between -127 and -128, at a tie."""
    values = random(*shape, seed=seed)
    values[..., 0] = 1.01 * values.abs().amax(-1)
    return values


def case(m=9, n=12, bias=True, bits=None, dtype=torch.float32, seed=0):
    linear = nn.Linear(n, m, bias).to(dtype)
    linear.weight.data = peaked(m, n, seed=seed).to(dtype)
    return linear, Int8Linear.from_weight(linear.weight, linear.bias, bits)


def tokens(*shape, dtype=torch.float32, seed=5):
    return peaked(*shape, seed=seed).to(dtype)


def integers(matrix):
    """Rows as whole numbers from -128 to 127 and a scale each, in float64."""
    scale = matrix.double().abs().amax(1, keepdim=True) / 127.5
    return torch.round(matrix.double() / scale).clamp(-128, 127), scale


# Rounding


def test_each_row_is_rounded_to_the_nearest_step_of_its_own():
    weight = random(7, 20).float() * torch.logspace(-3, 3, 7)[:, None]
    rounded, scale = round_rows(weight, torch.float32)
    assert rounded.dtype == torch.int8
    error = (rounded.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= scale.double()[:, None] * 0.5001).all()
    assert (rounded.int().abs().amax(1) >= 127).all()


def test_rows_of_zeros_stay_zero():
    rounded, scale = round_rows(torch.zeros(2, 3), torch.float16)
    assert not rounded.any()
    assert (scale > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_half_precision_shift_no_row_as_a_whole(dtype):
    weight = random(64, 400).float()
    rounded, scale = round_rows(weight, dtype)
    assert scale.dtype == dtype
    restored = rounded.double() * scale.double()[:, None]
    # How much longer the rows became, along themselves. Rounding the scale afterwards would give 2^-9 here.
    stretch = (restored * weight).sum(1) / weight.double().square().sum(1) - 1
    assert stretch.abs().mean() < 5e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = torch.ones(3, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match=r"finite weights to round but a \(3, 4\) matrix"):
        round_rows(weight, torch.float32)


# The layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (12,), (0, 12)])
def test_the_product_is_that_of_the_rounded_weight(bias, shape):
    linear, layer = case(bias=bias)
    whole, scale = integers(linear.weight)
    x = tokens(*shape)
    expected = F.linear(x.double(), whole * scale, None if linear.bias is None else linear.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(layer.dequantize().double(), whole * scale, rtol=1e-6, atol=0)
    assert layer(x).shape == linear(x).shape


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (12,), (0, 12)])
def test_dynamic_rounds_each_token_too(shape):
    linear, layer = case(bits=8)
    x = tokens(*shape)
    (whole, scale), (x_whole, x_scale) = integers(linear.weight), integers(x.reshape(-1, 12))
    expected = ((x_whole * x_scale) @ (whole * scale).T + linear.bias.double()).reshape(linear(x).shape)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "n"), [(7, 1), (1, 7), (1, 1), (31, 2)])
def test_sums_of_integers_are_exact_in_every_shape(m, n):
    layer = case(m, n, bias=False, bits=8)[1]
    layer.weight.data = torch.randint(-128, 128, (m, n), dtype=torch.int8)
    layer.scale.fill_(1.0)
    x = torch.randint(-127, 127, (5, n)).float()
    x[:, 0] = 127.5  # the scale of a token is 1
    expected = x.clamp_max(127) @ layer.weight.float().T
    assert torch.equal(layer(x), expected)


def test_both_kinds_are_close_to_the_layer_that_was_rounded():
    x = tokens(64, 200)
    for bits, most in ((None, 0.012), (8, 0.02), (16, 0.012)):
        linear, layer = case(100, 200, bits=bits)
        error = (layer(x) - linear(x)).norm() / linear(x).norm()
        assert error < most


def test_sixteen_bits_keep_what_lies_beside_one_large_feature():
    x = tokens(5, 12)
    x[:, 3] = 500 * x.abs().amax()
    errors = {}
    for bits in (8, 16):
        _, layer = case(bias=False, bits=bits)
        W = layer.dequantize().double().clone()
        W[:, 3] = 0  # what is said of the others
        layer.weight.data[:, 3] = 0
        errors[bits] = float((layer(x).double() - x.double() @ W.T).norm() / (x.double() @ W.T).norm())
    assert errors[16] < 0.02
    assert errors[8] > 0.5
    # Half a step of the second number at most, of 127 times 254 to the largest feature.
    _, exact = case(bits=None)
    _, layer = case(bits=16)
    steps = x.abs().amax(1, keepdim=True) / (127.5 * 254) * layer.scale * 128 * 12 / 2
    assert ((layer(x) - exact(x)).abs() <= steps + 1e-3 * exact(x).abs()).all()


@pytest.mark.parametrize("bits", [None, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(bits, dtype):
    linear, layer = case(40, 60, bits=bits, dtype=dtype)
    assert {layer.scale.dtype, layer.bias.dtype} == {dtype}
    x = tokens(8, 60, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert (y - linear(x)).norm() / linear(x).norm() < 0.03
    moved = case(40, 60, bits=bits)[1].to(dtype)
    assert (moved.weight.dtype, moved.scale.dtype) == (torch.int8, dtype)
    assert moved(x).dtype == dtype


def test_half_precision_does_not_overflow_before_the_scale():
    linear = nn.Linear(256, 4, bias=False)
    linear.weight.data.fill_(1e-3)
    layer = Int8Linear.from_weight(linear.weight, None, dtype=torch.float16)
    x = torch.full((1, 256), 100.0, dtype=torch.float16)  # times 127, their sum is beyond 65504
    torch.testing.assert_close(layer(x), torch.full((1, 4), 25.6, dtype=torch.float16), rtol=2e-3, atol=0)


@pytest.mark.parametrize("bits", [None, 8, 16])
def test_autocast_gives_its_dtype_as_for_other_layers(bits):
    linear, layer = case(bits=bits)
    x = tokens(5, 12).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == linear(x).dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(5, 12), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bits", [None, 8, 16])
def test_gradients_reach_the_input_and_the_bias(bits):
    _, layer = case(bits=bits)
    x = tokens(2, 5, 12).requires_grad_()
    h = tokens(2, 5, 9, seed=8)
    layer(x).backward(h)
    torch.testing.assert_close(x.grad, h @ layer.dequantize())
    torch.testing.assert_close(layer.bias.grad, h.sum((0, 1)))
    assert layer.weight.grad is None


@pytest.mark.parametrize("bits", [None, 8, 16])
def test_no_float_copy_of_the_weight_is_kept_for_the_backward_pass(bits):
    _, layer = case(bits=bits)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(tokens(5, 12).requires_grad_())
    assert {t.dtype for t in saved if t.shape == (9, 12)} == {torch.int8}


def test_states_are_plain_tensors():
    _, layer = case()
    state = layer.state_dict()
    assert {name: (type(value), value.dtype) for name, value in state.items()} == {
        "weight": (torch.Tensor, torch.int8),
        "scale": (torch.Tensor, torch.float32),
        "bias": (torch.Tensor, torch.float32),
    }
    other = Int8Linear(12, 9)
    other.load_state_dict(state)
    x = tokens(5, 12)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@pytest.mark.parametrize("bits", [None, 8, 16])
def test_compiled_and_exported(bits):
    _, layer = case(bits=bits)
    x = tokens(5, 12).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, layer.dequantize().sum(0).expand(5, 12))
    exported = torch.export.export(layer, (x.detach(),)).module()
    torch.testing.assert_close(exported(x.detach()), layer(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use
@pytest.mark.parametrize("bits", [None, 8, 16])
def test_function_transforms_see_the_unrounded_product(bits):
    _, layer = case(bits=bits)
    W, x = layer.dequantize(), tokens(5, 12)
    gradient = torch.func.grad(lambda x: layer(x).sum())(x)
    torch.testing.assert_close(gradient, W.sum(0).expand(5, 12))
    with pytest.raises(RuntimeError, match="jvp"):  # not a wrong derivative
        torch.func.jvp(layer, (x,), (x,))


# Against torchao


@pytest.fixture(scope="module")
def torchao_quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed (extra `quant`)")
    configs = (quantization.Int8WeightOnlyConfig, quantization.Int8DynamicActivationInt8WeightConfig)

    def quantized(linear, dynamic):
        linear = copy.deepcopy(linear)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantization.quantize_(linear, configs[dynamic]())
        return linear

    return quantized


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_torchao(torchao_quantized, bits, dtype):
    linear, layer = case(40, 64, bits=bits, dtype=torch.float32)
    theirs = torchao_quantized(linear, bits is not None)
    weight = theirs.weight
    assert torch.equal(layer.weight, weight.qdata)
    assert torch.equal(layer.scale, weight.scale.flatten())
    x = tokens(6, 64, dtype=dtype)
    if dtype != torch.float32:
        theirs, layer = theirs.to(dtype), layer.to(dtype)
    with torch.no_grad():
        ours, theirs = layer(x).double(), theirs(x).double()
    assert (ours - theirs).norm() <= theirs.norm() * (1e-6 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("tokens", [(1, 128), (2, 3, 128), (64, 128), (65, 128), (0, 128)])
@pytest.mark.parametrize("bias", [True, False])
def test_few_tokens_in_bfloat16_take_the_kernel(tokens, bias, monkeypatch):
    """The kernel rounds once, to bfloat16; the general path rounds the sums, and again once they are scaled."""
    torch.manual_seed(0)
    dense = nn.Linear(128, 24, bias).bfloat16()
    layer = Int8Linear.from_weight(dense.weight, dense.bias)
    x, calls = torch.randn(tokens).bfloat16(), []
    real = _int8._fits_kernel
    monkeypatch.setattr(_int8, "_fits_kernel", lambda *args: calls.append(real(*args)) or calls[-1])
    with torch.no_grad():
        y = layer(x)
        assert calls == [0 < x.numel() // 128 <= _int8.KERNEL_TOKENS and _int8._has_kernel()]
        b = None if dense.bias is None else dense.bias.float()
        torch.testing.assert_close(y.float(), F.linear(x.float(), layer.dequantize(), b), rtol=0.02, atol=0.02)
        monkeypatch.setattr(_int8, "_fits_kernel", lambda *args: False)
        torch.testing.assert_close(y, layer(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(24, 120), (20, 128), (24, 8)])
def test_sizes_that_the_kernel_does_not_take_go_without_it(shape):
    x, weight = torch.randn(1, shape[1]).bfloat16(), torch.ones(shape, dtype=torch.int8)
    assert not _int8._fits_kernel(x, weight)
    assert not _int8._fits_kernel(x.to("meta"), weight)


@pytest.mark.parametrize(("of_weight", "of_input"), [(8, 0), (0, 1), (0, 4), (8, 1)])
def test_tensors_that_the_kernel_cannot_read_where_they_lie_do_not_end_the_process(of_weight, of_input):
    """A weight that is mapped from a file may begin at any byte; an input may be a part of another tensor."""
    torch.manual_seed(0)
    m, n, tokens = 328, 1024, 16
    layer = Int8Linear.from_weight(torch.randn(m, n).bfloat16(), None)
    bytes_ = torch.zeros(m * n + of_weight, dtype=torch.int8)
    moved = bytes_[of_weight:].view(m, n)
    layer.weight.data = moved.copy_(layer.weight.data)
    x = torch.randn(tokens * n + of_input).bfloat16()[of_input:].view(tokens, n)
    with torch.no_grad():
        expected = F.linear(x.float(), layer.dequantize())
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.02, atol=0.5)
    assert _int8._fits_kernel(x, layer.weight) == (of_weight == 0 and _int8._has_kernel())
    align_weights(layer)
    assert torch.equal(layer.weight, moved)
    assert _int8._fits_kernel(x, layer.weight) == _int8._has_kernel()


def test_gradients_pass_beside_the_kernel():
    torch.manual_seed(0)
    layer = Int8Linear.from_weight(torch.randn(24, 128).bfloat16(), None)
    x = torch.randn(2, 128).bfloat16().requires_grad_()
    layer(x).sum().backward()
    expected = torch.ones(2, 24) @ layer.dequantize()
    torch.testing.assert_close(x.grad.float(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
