from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fasc_lightning.layers import _packed_codes, _packed_linear, model_size
from fasc_lightning.layers._grid import BITS, SCALE_DTYPE, Grid, Rounded
from fasc_lightning.layers._packed_codes import kernel_takes
from fasc_lightning.layers._packed_linear import PackedLinear

needs_kernel = pytest.mark.skipif(not kernel_takes(16, 32, 32), reason="this torch has no int4 kernel for CPUs")

GROUPS_OF_16, GROUPS_OF_32 = Grid(4, 16), Grid(4, 32)
GRIDS = [Grid(bits, group, symmetric) for bits in BITS for group, symmetric in ((8, True), (16, False), (None, False))]


def rounded(m, n, grid, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = grid.groups(n)
    codes = torch.randint(0, grid.levels, (m, n), dtype=torch.uint8, generator=generator)
    zero = torch.randint(0, grid.levels, (m, groups), dtype=torch.uint8, generator=generator)
    if grid.symmetric:
        zero.fill_(grid.middle)
    scale = torch.rand(m, groups, generator=generator).add_(0.1).to(SCALE_DTYPE).float()
    return Rounded(grid, codes, scale / grid.levels, zero)


def dense(rounded):
    """The matrix in float64, entry by entry."""
    m, n = rounded.codes.shape
    group = rounded.grid.group or n
    W = torch.empty(m, n, dtype=torch.float64)
    for j in range(n):
        g = j // group
        W[:, j] = rounded.scale[:, g].double() * (rounded.codes[:, j].double() - rounded.zero[:, g].double())
    return W


def case(m=11, n=40, grid=GROUPS_OF_16, bias=True, dtype=torch.float32):
    matrix = rounded(m, n, grid)
    b = nn.Parameter(tokens(m, seed=3).to(dtype)) if bias else None
    return PackedLinear.from_rounded(matrix, b, dtype), dense(matrix)


def prepared(m=80, n=64, grid=GROUPS_OF_32, dtype=torch.bfloat16):
    layer, W = case(m, n, grid, dtype=dtype)
    assert layer.prepare()
    return layer, W


def tokens(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expected(layer, W, x):
    return F.linear(x.double(), W, None if layer.bias is None else layer.bias.detach().double())


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in a small layer."""
    monkeypatch.setattr(_packed_codes, "_BLOCK", 160)
    monkeypatch.setattr(_packed_codes, "_COMPILED_BLOCK", 160)
    monkeypatch.setattr(_packed_codes, "_PASS", 80)


# The product


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("m", "n"), [(11, 40), (32, 64), (3, 24), (1, 7)])
def test_the_product_is_that_of_the_dense_matrix(grid, m, n):
    layer, W = case(m, n, grid)
    assert torch.equal(layer.dequantize().double(), W)
    matrix, found = rounded(m, n, grid), layer.rounded()
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(found, name), getattr(matrix, name)), name
        assert getattr(found, name).dtype == getattr(matrix, name).dtype
    x = tokens(5, n)
    torch.testing.assert_close(layer(x).double(), expected(layer, W, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 40), (2, 1, 3, 40), (40,), (0, 40), (2, 0, 40)])
def test_inputs_of_any_number_of_dimensions(small_blocks, shape, bias):
    layer, W = case(bias=bias)
    x = tokens(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 11)
    torch.testing.assert_close(y.double(), expected(layer, W, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(4, 16), Grid(3, None), Grid(8, 8, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(small_blocks, dtype, grid, graded):
    layer, W = case(grid=grid, dtype=dtype)
    x = tokens(6, 40).to(dtype).requires_grad_(graded)
    y = layer(x)
    assert y.dtype == dtype
    # The weight is rounded once: the layer equals a dense one that holds it.
    same = F.linear(x, W.to(dtype)) + layer.bias
    torch.testing.assert_close(y, same, rtol=1e-9 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps, atol=1e-3)
    assert (y.double() - expected(layer, W, x)).norm() <= 2 * torch.finfo(dtype).eps * y.double().norm()


def test_autocast_gives_its_dtype_as_for_other_layers(small_blocks):
    layer, W = case()
    layer.widen_scales()
    x = tokens(5, 40).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert (x.grad.dtype, layer.weight_scale.grad.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(x.grad.double(), W.sum(0).expand(5, 40), rtol=0.02, atol=0.02)


# Gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(3, 8, True), Grid(2, None), Grid(8, 16)], ids=str)
def test_gradients_are_those_of_a_dense_layer(small_blocks, grid, dtype):
    layer, W = case(grid=grid, dtype=dtype)
    layer.widen_scales()
    x, h = tokens(2, 5, 40).to(dtype).requires_grad_(), tokens(2, 5, 11, seed=8).to(dtype)
    layer(x).backward(h)
    columns = grid.columns(40)
    scale = layer.weight_scale.detach().double().requires_grad_()
    steps = W / scale.detach()[:, columns]
    x64 = x.detach().double().requires_grad_()
    F.linear(x64, steps * scale[:, columns]).backward(h.double())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight_scale.grad.double(), scale.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, h.sum((0, 1)))
    assert layer.weight_packed.grad is None


@pytest.mark.parametrize("make", [case, pytest.param(prepared, marks=needs_kernel)])
def test_half_precision_sums_gradients_over_blocks_in_float32(small_blocks, make):
    layer, W = make(dtype=torch.bfloat16)
    x = tokens(50, W.shape[1]).bfloat16().requires_grad_()
    h = tokens(50, W.shape[0], seed=8).bfloat16()
    layer(x).backward(h)
    exact = h.double() @ W
    assert x.grad.dtype == torch.bfloat16
    assert (x.grad.double() - exact).norm() <= 0.004 * exact.norm()


def test_gradients_of_gradients(small_blocks):
    layer, W = case(dtype=torch.bfloat16)
    x, h = (tokens(5, k).bfloat16().requires_grad_() for k in (40, 11))
    (first,) = torch.autograd.grad(layer(x), x, h, create_graph=True)
    (second,) = torch.autograd.grad(first, h, x.detach())
    torch.testing.assert_close(second.double(), x.double() @ W.T, rtol=0.02, atol=0.02)


def test_only_packed_codes_are_kept_for_the_backward_pass():
    layer, _ = case(64, 640, Grid(4, 64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(tokens(5, 640).requires_grad_())
    assert sum(t.numel() * t.element_size() for t in saved) <= layer.grid.nbytes(64, 640)
    assert (5, 640) not in {t.shape for t in saved}


def test_checkpointing_gives_the_same_gradients():
    layer, _ = case()
    layer.widen_scales()
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        x = tokens(5, 40).requires_grad_()
        found.append(torch.autograd.grad(run(x).square().sum(), (x, layer.weight_scale)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use
def test_function_transforms_and_functional_calls():
    layer, W = case()
    x, twice = tokens(5, 40), (2 * layer.weight_scale.detach().float()).requires_grad_()
    gradient = torch.func.grad(lambda x: layer(x).sum())(x)
    torch.testing.assert_close(gradient.double(), W.sum(0).expand(5, 40), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="jvp"):  # not a wrong derivative
        torch.func.jvp(layer, (x,), (x,))
    y = torch.func.functional_call(layer, {"weight_scale": twice}, (x,))
    torch.testing.assert_close(y.double(), expected(layer, 2 * W, x), rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(y.sum(), twice)[0].any()


# Compilers and tracers


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(3, 16, True)], ids=str)
def test_compiled_and_exported(small_blocks, grid):
    layer, _ = case(grid=grid)
    layer.widen_scales()
    x = tokens(5, 40).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    found = torch.autograd.grad(y.sum(), (x, layer.weight_scale))
    for one, other in zip(found, torch.autograd.grad(layer(x).sum(), (x, layer.weight_scale)), strict=True):
        torch.testing.assert_close(one, other)
    layer.narrow_scales()
    dynamic = {0: torch.export.Dim("tokens", min=2, max=1000)}
    exported = torch.export.export(layer, (x.detach(),), dynamic_shapes=(dynamic,)).module()
    torch.testing.assert_close(exported(tokens(9, 40)), layer(tokens(9, 40)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@needs_kernel
def test_a_prepared_layer_compiled_and_exported(small_blocks):
    layer, _ = prepared()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        for count in (3, 5, 100):
            x = tokens(count, 64).bfloat16()
            torch.testing.assert_close(compiled(x), layer(x))
        dynamic = {0: torch.export.Dim("tokens", min=2, max=1000)}
        exported = torch.export.export(layer, (x,), dynamic_shapes=(dynamic,)).module()
        few = tokens(3, 64).bfloat16()
        torch.testing.assert_close(exported(few), layer(few), rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
@pytest.mark.parametrize("ready", [False, pytest.param(True, marks=needs_kernel)])
def test_traced(small_blocks, ready):
    layer, W = prepared() if ready else case(80, 64)
    dtype = layer.like.dtype
    traced = torch.jit.trace(layer, (tokens(5, 64).to(dtype),), check_trace=False)
    more = tokens(2, 90, 64).to(dtype)
    torch.testing.assert_close(traced(more), layer(more))
    x = tokens(3, 64).to(dtype).requires_grad_()
    traced(x).sum().backward()
    torch.testing.assert_close(x.grad.double(), W.sum(0).expand(3, 64), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("ready", [False, pytest.param(True, marks=needs_kernel)])
def test_symbolic_trace(ready):
    layer, _ = prepared() if ready else case(80, 64)
    module = torch.fx.symbolic_trace(layer)
    assert _packed_linear.packed_product in {node.target for node in module.graph.nodes}
    for count in (3, 90):
        x = tokens(count, 64).to(layer.like.dtype)
        assert torch.equal(module(x), layer(x))


# Dtypes, states and copies


def test_scales_keep_their_type():
    layer, W = case()
    before = layer.weight_scale.clone()
    for convert, dtype in (
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to(torch.float64), torch.float64),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.float(), torch.float32),
    ):
        convert(layer)
        assert (layer.like.dtype, layer.bias.dtype) == (dtype, dtype)
        assert layer.weight_packed.dtype == torch.int32
        assert layer.weight_scale.dtype == SCALE_DTYPE
        assert torch.equal(layer.weight_scale, before)
        assert torch.equal(layer.dequantize().double(), W)


def test_scales_are_wide_while_they_are_trained():
    layer, _ = case()
    stored = layer.weight_scale.clone()
    assert not layer.weight_scale.requires_grad
    layer.widen_scales()
    assert layer.weight_scale.requires_grad
    layer(tokens(2, 40)).sum().backward()
    layer.bfloat16()
    assert layer.weight_scale.dtype == layer.weight_scale.grad.dtype == torch.float32
    assert torch.equal(layer.weight_scale.to(SCALE_DTYPE), stored)
    layer.weight_scale.data *= 1.001
    wide = layer.weight_scale.detach().clone()
    layer.narrow_scales()
    assert not layer.weight_scale.requires_grad
    assert torch.equal(layer.weight_scale, wide.to(SCALE_DTYPE))
    assert torch.equal(layer.rounded().scale, wide.to(SCALE_DTYPE).float())


@pytest.mark.parametrize("symmetric", [True, False])
def test_names_and_shapes_are_those_of_compressed_tensors(symmetric):
    layer, _ = case(11, 40, Grid(3, 16, symmetric))
    shapes = {name: (type(v), v.dtype, tuple(v.shape)) for name, v in layer.state_dict().items()}
    zero = {} if symmetric else {"weight_zero_point": (torch.Tensor, torch.int32, (2, 3))}
    assert shapes == {
        "weight_packed": (torch.Tensor, torch.int32, (11, 4)),
        "weight_scale": (torch.Tensor, torch.bfloat16, (11, 3)),
        "bias": (torch.Tensor, torch.float32, (11,)),
        **zero,
    }
    empty = PackedLinear(40, 11, layer.grid, device="meta", dtype=torch.float16)
    assert {name: tuple(v.shape) for name, v in empty.state_dict().items()} == {k: s for k, (_, _, s) in shapes.items()}
    assert (empty.like.device.type, empty.like.dtype) == ("meta", torch.float16)
    assert empty(torch.empty(3, 40, device="meta")).shape == (3, 11)
    assert not PackedLinear(40, 11, layer.grid)(tokens(2, 40)).any()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_states_load_with_scales_of_any_type(stored, assign):
    layer, _ = case()
    state = layer.state_dict()
    state["weight_scale"] = state["weight_scale"].to(stored)
    other = PackedLinear(40, 11, layer.grid)
    other.load_state_dict(state, strict=True, assign=assign)
    assert other.weight_scale.dtype == SCALE_DTYPE
    assert torch.equal(other.dequantize(), layer.dequantize())


@pytest.mark.parametrize("ready", [False, pytest.param(True, marks=needs_kernel)])
def test_copies_and_files_have_the_stored_form(ready):
    plain, _ = case(80, 64, Grid(4, 32), dtype=torch.bfloat16)
    layer = prepared()[0] if ready else plain
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert state.keys() == plain.state_dict().keys()
    assert list(state) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name
        assert state[name].is_contiguous()
    copied = copy.deepcopy(layer)
    assert copied.kernel_codes is None
    assert torch.equal(copied.weight_packed, plain.weight_packed)
    assert torch.equal(copied.rounded().codes, layer.rounded().codes)
    x = tokens(100, 64).bfloat16()
    assert torch.equal(copied(x), layer(x))


# The int4 kernel


@needs_kernel
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("m", "n", "group"), [(16, 64, 32), (80, 128, 64), (144, 128, 128), (48, 64, None)])
def test_few_tokens_go_through_the_kernel(monkeypatch, m, n, group, symmetric):
    layer, W = prepared(m, n, Grid(4, group, symmetric))
    monkeypatch.setattr(_packed_linear, "_product", None)
    for shape in ((n,), (1, n), (2, 3, n), (_packed_linear.KERNEL_TOKENS, n)):
        for x in (tokens(*shape).bfloat16(), tokens(*shape, 2).bfloat16()[..., 0]):
            y = layer(x)
            exact = expected(layer, W, x)
            assert (y.dtype, y.shape) == (torch.bfloat16, exact.shape)
            assert (y.double() - exact).norm() <= 0.01 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(tokens(3, n)).dtype == torch.bfloat16


@needs_kernel
@pytest.mark.parametrize("graded", [False, True])
def test_all_other_inputs_give_what_they_gave_before(graded):
    layer, _ = prepared()
    plain = copy.deepcopy(layer)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        many = 5 if dtype != torch.bfloat16 or graded else _packed_linear.KERNEL_TOKENS + 1
        x = tokens(many, 64).to(dtype).requires_grad_(graded)
        assert torch.equal(layer(x), plain(x))
    assert layer(tokens(0, 64).bfloat16()).shape == (0, 80)


@needs_kernel
def test_preparing_holds_one_form_and_can_be_undone():
    plain, W = case(80, 64, Grid(4, 32), dtype=torch.bfloat16)
    layer, _ = prepared()
    assert layer.prepare()
    assert layer.weight_packed is None
    tensors = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*layer.parameters(), *layer.buffers())
    }
    assert sum(tensors.values()) <= layer.grid.nbytes(80, 64) + 2 * 80 * 2 + 2 * 80
    assert model_size(layer).bytes == sum(tensors.values())  # scales that lie in one memory count once
    assert torch.equal(layer.dequantize().double(), W)
    layer.unprepare()
    assert layer.kernel_codes is None
    assert layer.weight_scale.is_contiguous()
    assert torch.equal(layer.weight_packed, plain.weight_packed)
    assert torch.equal(layer.weight_scale, plain.weight_scale)


@needs_kernel
def test_a_prepared_layer_stays_prepared_and_right():
    layer, _ = prepared()
    other = PackedLinear.from_rounded(rounded(80, 64, layer.grid, seed=7), layer.bias.detach())
    few = tokens(2, 64).bfloat16()
    layer.load_state_dict(other.state_dict(), strict=True)
    assert layer.weight_packed is None
    other.prepare()
    assert torch.equal(layer(few), other(few))
    layer.float().bfloat16()
    assert layer.weight_packed is None
    assert torch.equal(layer(few), other(few))
    layer.widen_scales()
    assert layer.weight_packed is not None
    assert not layer.prepare()
    layer.narrow_scales()
    assert layer.prepare()
    assert layer.to("meta").kernel_codes is None


@pytest.mark.parametrize(
    ("m", "n", "grid"), [(80, 64, Grid(8, 32)), (80, 64, Grid(4, 16)), (80, 96, Grid(4, 64)), (24, 64, Grid(4, 64))]
)
def test_what_the_kernel_does_not_take_stays_as_it_is(m, n, grid):
    layer, W = case(m, n, grid, dtype=torch.bfloat16)
    assert not layer.prepare()
    assert torch.equal(layer.dequantize().double(), W)


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(5, dtype=torch.uint8)}, r"a matrix of codes .* got codes of shape \(5,\)"),
        ({"codes": torch.zeros(4, 32, dtype=torch.int32)}, "got codes of shape .* and torch.int32"),
        ({"codes": torch.full((4, 32), 16, dtype=torch.uint8)}, "codes from 0 to 15"),
        (
            {"scale": torch.ones(4, 3)},
            r"shape \(4, 2\), one a group of a \(4, 32\) matrix, but got \(4, 3\) and \(4, 2\)",
        ),
        ({"zero": torch.zeros(2, 4, dtype=torch.uint8)}, r"got \(4, 2\) and \(2, 4\)"),
        ({"zero": torch.full((4, 2), 16, dtype=torch.uint8)}, "codes from 0 to 15"),
        ({"scale": torch.tensor([[1.0, float("nan")]] * 4)}, "finite scales"),
        ({"scale": torch.tensor([[1.0, float("inf")]] * 4)}, "finite scales"),
        ({"bias": torch.zeros(5)}, r"bias of shape \(4,\) but got \(5,\)"),
        ({"grid": Grid(4, 16, True)}, "zero points of 8 on a symmetric grid"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    parts = {**vars(rounded(4, 32, Grid(4, 16))), "bias": None, **change}
    bias = parts.pop("bias")
    with pytest.raises(ValueError, match=message):
        PackedLinear.from_rounded(Rounded(**parts), bias)
