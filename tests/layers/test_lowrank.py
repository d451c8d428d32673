import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_cases import case, conv1d, random
from torch import nn

from fasc_lightning.layers import (
    CompressedLinear,
    LowRankLinear,
    PivotedLinear,
    factors_cost,
    linear_shape,
    linear_weight,
    make_lowrank,
    pivot_cost,
    swap_modules,
)
from fasc_lightning.layers._linear import flops_per_token

# (layout, m, n): the pivot layout permutes the smaller side, so both sides are here.
CASES = [("factors", 12, 20), ("factors", 20, 12), ("pivot", 12, 20), ("pivot", 20, 12), ("auto", 16, 16)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.detach().double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("layout", "m", "n"), CASES)
def test_is_the_given_linear_map(layout, m, n, bias, dtype):
    layer, W, b = case(layout, m, n, bias=bias, dtype=dtype)
    x = random(7, n)
    assert layer.to_weight().dtype == dtype
    assert relative_error(layer.to_weight(), W) < TOLERANCE[dtype]
    assert relative_error(layer(x.to(dtype)), F.linear(x, W, b)) < TOLERANCE[dtype]
    if bias:
        assert torch.equal(layer.bias, b.to(dtype))
    else:
        assert layer.bias is None


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12), (16, 16)])
def test_both_sides_serve_every_shape(side, m, n):
    layer = PivotedLinear(n, m, 5, side=side, dtype=torch.float64)
    layer.permutation = torch.randperm(len(layer.permutation), generator=torch.Generator().manual_seed(0)).int()
    nn.init.normal_(layer.basis.weight)
    W = layer.to_weight().detach()
    if side == "out":
        assert torch.equal(W[layer.pivots], layer.basis.weight)
    else:
        assert torch.equal(W[:, layer.pivots], layer.basis.weight)
    x = random(4, n)
    assert torch.allclose(layer(x), x @ W.T + layer.bias, atol=1e-12)
    assert torch.linalg.matrix_rank(W) == 5


@given(
    layout=st.sampled_from(["pivot", "factors"]),
    m=st.integers(2, 20),
    n=st.integers(2, 20),
    fraction=st.floats(0.01, 0.99),
    scale=st.integers(0, 12),
    zeros=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=120, deadline=None)
def test_survives_any_scaling_and_lost_columns(layout, m, n, fraction, scale, zeros, seed):
    k = max(1, min(int(fraction * min(m, n)), min(m, n) - 1))
    spread = torch.logspace(0, -scale, k, dtype=torch.float64)
    B, C = random(m, k, seed=seed) / spread, spread[:, None] * random(k, n, seed=seed + 1)
    B[:, : min(zeros, k - 1)] = 0
    layer = make_lowrank(B, C, layout=layout)
    assert relative_error(layer.to_weight(), B @ C) < 1e-12
    if layout == "pivot":
        assert layer.coefficients.weight.abs().max() <= 2.0


def test_factors_are_balanced_and_do_not_cancel():
    B = random(30, 6) @ random(6, 6).tril() * 1e6
    B[:, 5] = B[:, 4] * (1 + 1e-9)  # a product of large terms that nearly cancel
    C = random(6, 25)
    C[5] = -C[4]
    layer = make_lowrank(B, C, layout="factors")
    left, right = layer.factor_out.weight, layer.factor_in.weight
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-9)
    W = B @ C
    assert relative_error(make_lowrank(B, C, layout="factors", dtype=torch.bfloat16).to_weight(), W) < 1e-2


@pytest.mark.parametrize(("layout", "m", "n"), CASES)
@pytest.mark.parametrize("shape", [(), (3,), (1,), (0,), (2, 3), (2, 0), (2, 3, 4)])
def test_accepts_every_batch_shape(layout, m, n, shape):
    layer, W, b = case(layout, m, n)
    x = random(*shape, n).requires_grad_()
    y = layer(x)
    assert y.shape == (*shape, m)
    assert y.is_contiguous()
    assert torch.allclose(y, F.linear(x, W, b), atol=1e-12)
    y.sum().backward()
    assert x.grad.shape == x.shape
    with torch.no_grad():
        assert torch.allclose(layer(x), y, rtol=0, atol=1e-12)  # by other kernels


def test_accepts_non_contiguous_input():
    layer, W, b = case("pivot", 12, 20)
    x = random(20, 3, 2).permute(2, 1, 0)
    assert torch.allclose(layer(x), F.linear(x, W, b), atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("layout", "m", "n"), [("factors", 4, 5), ("pivot", 4, 5), ("pivot", 5, 4)])
def test_gradients(layout, m, n, bias):
    layer, *_ = case(layout, m, n, k=2, bias=bias)
    names, values = zip(*layer.named_parameters(), strict=True)

    def function(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(function, (random(3, n).requires_grad_(), *values))
    assert torch.autograd.gradgradcheck(function, (random(3, n).requires_grad_(), *values))
    layer.to_weight().sum().backward()
    weights = [p for name, p in layer.named_parameters() if "bias" not in name]
    assert all(p.grad is not None for p in weights)


@pytest.mark.parametrize(("layout", "m", "n"), CASES)
def test_autocast_gives_the_dtype_of_a_linear_layer(layout, m, n):
    layer, W, b = case(layout, m, n, dtype=torch.float32)
    dense = nn.Linear(n, m)
    x = random(6, n).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, reference = layer(x), dense(x)
    assert y.dtype == reference.dtype == torch.bfloat16
    assert relative_error(y, F.linear(x.detach().double(), W, b)) < 3e-2
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize(("layout", "m", "n"), CASES)
def test_half_precision_with_and_without_gradients_agree(layout, m, n):
    layer, *_ = case(layout, m, n, dtype=torch.bfloat16)
    x = random(6, n).bfloat16().requires_grad_()
    with torch.no_grad():
        quick = layer(x)
    # Without gradients column pivots are added before the sum is rounded.
    assert relative_error(quick, layer(x).detach().double()) < TOLERANCE[torch.bfloat16] / 2


def test_large_bias_does_not_leak_into_other_outputs():
    layer, W, b = case("pivot", 12, 20, dtype=torch.float32)
    with torch.no_grad():
        layer.pivot_bias.fill_(1e8)
    x = random(4, 20)
    rest = torch.ones(12, dtype=torch.bool)
    rest[layer.pivots] = False
    assert torch.allclose(layer(x.float())[:, rest].double(), F.linear(x, W, b)[:, rest], atol=1e-4)


@pytest.mark.parametrize(("layout", "m", "n"), CASES)
def test_state_dict_round_trip(layout, m, n):
    layer, *_ = case(layout, m, n)
    args = (n, m, layer.rank, True)
    empty = type(layer)(*args, dtype=torch.float64)
    assert not torch.equal(empty.to_weight(), layer.to_weight())
    empty.load_state_dict(layer.state_dict())
    x = random(3, n)
    assert torch.equal(empty(x), layer(x))
    assert ("permutation" in layer.state_dict()) == (layer.layout == "pivot")
    assert not {"weight", "bias"} & set(layer.state_dict())
    meta = type(layer)(*args, device="meta", dtype=torch.float64)
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(meta(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize(("layout", "m", "n"), CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_counts_equal_the_formulas(layout, m, n, bias):
    k = 5
    layer, *_ = case(layout, m, n, k, bias)
    expected = k * (m + n) if layout == "factors" else k * (m + n - k)
    cost = factors_cost if layout == "factors" else pivot_cost
    assert layer.cost(m, n, k) == cost(m, n, k) == expected
    assert layer.parameter_count == expected + bias * m == sum(p.numel() for p in layer.parameters())
    assert layer.flops_per_token() == flops_per_token(layer) == 2 * expected
    stored = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert layer.extra_bytes == stored - 8 * layer.parameter_count
    assert layer.extra_bytes == (0 if layout == "factors" else 4 * min(m, n))


def test_repr_names_rank_and_side():
    text = repr(case("pivot", 12, 20)[0])
    assert "in_features=20, out_features=12, rank=5, bias=True, side=out" in text
    assert "rank=5, bias=False" in repr(case("factors", 12, 20, bias=False)[0])


def test_make_lowrank_targets_dtype_and_trains_without_touching_the_random_state():
    state = torch.get_rng_state()
    B, C = random(8, 3), random(3, 6)
    layers = [make_lowrank(B.float(), C.float()), make_lowrank(B, C, layout="factors", dtype=torch.float16)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [{p.dtype for p in layer.parameters()} for layer in layers] == [{torch.float32}, {torch.float16}]
    assert all(p.requires_grad and p.is_leaf and p.is_contiguous() for layer in layers for p in layer.parameters())
    assert all(layer.training for layer in layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"right": torch.ones(2, 6)}, r"\(8, 3\) and \(2, 6\)"),
        ({"bias": torch.ones(6)}, r"shape \(8,\), got \(6,\)"),
        ({"layout": "svd"}, "'svd'"),
        ({"left": torch.ones(8, 6), "right": torch.ones(6, 6)}, "below 6"),
        ({"left": torch.ones(8, 7), "right": torch.ones(7, 6), "layout": "factors"}, "between 1 and 6"),
        ({"left": torch.full((8, 3), float("inf"))}, "finite"),
        ({"right": torch.full((3, 6), float("nan")), "layout": "factors"}, "finite"),
    ],
)
def test_make_lowrank_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_lowrank(**{"left": torch.ones(8, 3), "right": torch.ones(3, 6), **arguments})


def test_constructors_reject():
    with pytest.raises(ValueError, match="between 1 and 4"):
        LowRankLinear(4, 6, 0)
    with pytest.raises(ValueError, match="'both'"):
        PivotedLinear(4, 6, 2, side="both")
    with pytest.raises(ValueError, match="below 4"):
        PivotedLinear(4, 6, 4)
    assert PivotedLinear(4, 6, 4, side="out").coefficients.weight.shape == (2, 4)


# the stand-in for the weight


def test_weight_is_lazy_and_right(monkeypatch):
    layer, W, _ = case("pivot", 12, 20)
    made = []
    to_weight = CompressedLinear.to_weight
    monkeypatch.setattr(CompressedLinear, "to_weight", lambda self: made.append(1) or to_weight(self))
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device, weight.shape) == (torch.float64, torch.device("cpu"), (12, 20))
    assert (weight.ndim, weight.size(0), weight.numel(), weight.is_cuda) == (2, 12, 240, False)
    assert not made
    assert torch.allclose(F.linear(torch.eye(20, dtype=torch.float64), weight), W.T, atol=1e-12)
    assert torch.allclose(weight.T @ weight, W.T @ W, atol=1e-10)
    assert made
    (weight**2).sum().backward()
    assert layer.basis.weight.grad is not None


@pytest.mark.parametrize("change", [lambda w: w.zero_(), lambda w: w.__setitem__(0, 1.0), lambda w: nn.init.ones_(w)])
def test_weight_is_read_only(change):
    layer, *_ = case("pivot", 12, 20)
    with pytest.raises(RuntimeError, match="to_dense"):
        change(layer.weight)
    with pytest.raises(KeyError, match="already exists"):
        layer.weight = nn.Parameter(torch.ones(12, 20))


def test_to_weight_refuses_wrapped_children():
    layer, *_ = case("factors", 12, 20)
    layer.factor_in = nn.Sequential(layer.factor_in)
    with pytest.raises(TypeError, match=r"found torch\..*\.Sequential"):
        layer.to_weight()


def test_t5_reads_the_dtype_of_a_swapped_layer():
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5DenseActDense

    block = T5DenseActDense(T5Config(d_model=8, d_ff=16)).eval()
    with torch.no_grad():
        block.wo.weight.copy_(random(8, 3) @ random(3, 16))
    x = torch.randn(2, 8)
    before = block(x)
    U, S, V = torch.linalg.svd(block.wo.weight.detach(), full_matrices=False)
    swap_modules(block, {"wo": make_lowrank(U[:, :3] * S[:3], V[:3])})
    assert torch.allclose(block(x), before, atol=1e-5)


# dense layers


def test_linear_weight_and_shape():
    linear, conv = nn.Linear(4, 6), conv1d(6, 4)
    x = torch.randn(3, 4)
    for module in (linear, conv):
        assert linear_shape(module) == (6, 4)
        assert linear_weight(module).data_ptr() == module.weight.data_ptr()
        assert flops_per_token(module) == 48
        assert torch.allclose(x @ linear_weight(module).T + module.bias, module(x), atol=1e-6)
    assert linear_shape(LowRankLinear(4, 6, 2)) == (6, 4)
    assert flops_per_token(nn.LayerNorm(4)) == 0
    for function in (linear_weight, linear_shape):
        with pytest.raises(TypeError, match="got LayerNorm"):
            function(nn.LayerNorm(4))


# swapping
