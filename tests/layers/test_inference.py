"""Forward passes without gradients give what calling the children gives, and step aside where that is asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lowrank_cases import case, random
from torch import nn

from fasc_lightning.layers import PivotedLinear
from fasc_lightning.layers import _inference as _direct
from fasc_lightning.layers._inference import FEW_TOKENS, MANY_TOKENS, may_be_direct

# The pivot layout permutes the smaller side: outputs, inputs.
CASES = [("factors", 12, 20), ("pivot", 12, 20), ("pivot", 20, 12)]
TOKENS = [1, 5, FEW_TOKENS, MANY_TOKENS, 2 * MANY_TOKENS + 3]


def children(layer):
    return list(layer.children())


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("layout", "m", "n"), CASES)
def test_is_the_linear_map_and_leaves_its_input_alone(layout, m, n, bias, tokens):
    layer, W, b = case(layout, m, n, bias=bias)
    x = random(tokens, n)
    before = x.clone()
    with torch.no_grad():
        assert may_be_direct(x, *children(layer))
        y = layer(x)
        assert torch.allclose(y, F.linear(x, W, b), atol=1e-12)
        assert y.is_contiguous()
        assert torch.equal(layer(x[None]), y[None])
    assert torch.equal(x, before)
    assert torch.allclose(layer(x), y, atol=1e-12)


@pytest.fixture(params=[False, True], ids=["no matrix units", "matrix units"])
def matrix_units(request, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: request.param)
    _direct.multiplies_vectors.cache_clear()
    yield
    _direct.multiplies_vectors.cache_clear()


@pytest.mark.usefixtures("matrix_units")
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("layout", "m", "n"), CASES)
def test_half_precision_is_no_less_exact_than_with_gradients(layout, m, n, tokens):
    layer, *_ = case(layout, m, n, dtype=torch.bfloat16)
    x = random(tokens, n).bfloat16()
    exact = F.linear(x.double(), layer.double().to_weight(), layer.bias)
    layer.bfloat16()
    with torch.no_grad():
        quick = layer(x)
    assert quick.dtype == torch.bfloat16
    error, slow = ((y.detach().double() - exact).norm() for y in (quick, layer(x)))
    assert error <= 1.05 * slow < 0.02 * exact.norm()


def test_the_identity_needs_no_copy_of_the_callers_tensor():
    """In-place sums must never reach a tensor that is the caller's."""
    layer = PivotedLinear(12, 20, 5, side="in", dtype=torch.float64)
    x = random(3, 12)
    before = x.clone()
    with torch.no_grad():
        layer(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("tokens", [3, MANY_TOKENS])
@pytest.mark.parametrize(("layout", "m", "n"), CASES)
@pytest.mark.parametrize("index", [0, 1])
def test_hooks_of_children_are_called(layout, m, n, index, tokens):
    layer, W, b = case(layout, m, n)
    x = random(tokens, n)
    child = children(layer)[index]
    seen = []
    handles = [
        child.register_forward_pre_hook(lambda module, args: seen.append("before")),
        child.register_forward_hook(lambda module, args, output: seen.append("after")),
    ]
    with torch.no_grad():
        assert torch.allclose(layer(x), F.linear(x, W, b), atol=1e-12)
        assert seen == ["before", "after"]
        handles[0].remove()
        layer(x)
        assert seen == ["before", "after", "after"]
        handles[1].remove()
        layer(x)
    assert len(seen) == 3


def test_hooks_of_all_modules_are_called():
    layer, *_ = case("pivot", 12, 20)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        with torch.no_grad():
            layer(random(3, 20))
    finally:
        handle.remove()
    assert seen == [layer.basis, layer.coefficients, layer]


def halve(child):
    child.forward = lambda x, forward=child.forward: forward(x) / 2


def parametrise(child):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    nn.utils.parametrize.register_parametrization(child, "weight", Half())


@pytest.mark.parametrize("tokens", [3, MANY_TOKENS])
@pytest.mark.parametrize(("layout", "m", "n"), CASES)
@pytest.mark.parametrize("change", [halve, parametrise])
def test_children_that_do_something_else_are_called(change, layout, m, n, tokens):
    layer, *_ = case(layout, m, n, bias=False)
    x = random(tokens, n)
    for child in children(layer):
        change(child)
    expected = layer(x).detach()
    with torch.no_grad():
        assert not may_be_direct(x, *children(layer))
        assert torch.allclose(layer(x), expected, atol=1e-12)
    if layout == "factors":
        assert torch.allclose(expected, F.linear(x, case(layout, m, n, bias=False)[1]) / 4, atol=1e-12)


@pytest.mark.parametrize(("layout", "m", "n"), CASES)
def test_weights_of_another_tensor_type_are_left_to_the_children(layout, m, n):
    class Tagged(torch.Tensor):
        pass

    layer, W, b = case(layout, m, n)
    child = children(layer)[1]
    child.weight = nn.Parameter(child.weight.detach().as_subclass(Tagged))
    x = random(MANY_TOKENS, n)
    with torch.no_grad():
        assert not may_be_direct(x, *children(layer))
        assert torch.allclose(layer(x).as_subclass(torch.Tensor), F.linear(x, W, b), atol=1e-12)


@pytest.mark.parametrize("tokens", [3, MANY_TOKENS])
@pytest.mark.parametrize(("layout", "m", "n"), CASES)
def test_autocast_decides_the_dtype(layout, m, n, tokens):
    layer, W, b = case(layout, m, n, dtype=torch.float32)
    x = random(tokens, n)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
    assert y.dtype == torch.bfloat16
    assert float((y.double() - F.linear(x, W, b)).norm()) < 3e-2 * float(F.linear(x, W, b).norm())


@pytest.mark.parametrize("tokens", [3, MANY_TOKENS])
@pytest.mark.parametrize(("layout", "m", "n"), CASES)
def test_a_layer_can_be_mapped_over_batches(layout, m, n, tokens):
    layer, W, b = case(layout, m, n)
    x = random(2, tokens, n)
    with torch.no_grad():
        assert torch.allclose(torch.vmap(layer)(x), F.linear(x, W, b), atol=1e-12)
        half = torch.vmap(layer.bfloat16())(x.bfloat16())
        torch.testing.assert_close(half.double(), F.linear(x, W, b), rtol=0, atol=0.02 * float(W.abs().sum(1).max()))


@pytest.mark.parametrize("tokens", [3, MANY_TOKENS])
@pytest.mark.parametrize(("layout", "m", "n"), CASES)
def test_exported_programs_see_the_calls(layout, m, n, tokens):
    layer, W, b = case(layout, m, n)
    x = random(tokens, n)
    with torch.no_grad():
        program = torch.export.export(layer.eval(), (x,))
        assert torch.allclose(program.module()(x), F.linear(x, W, b), atol=1e-12)
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert operators.count("aten.linear.default") == 2
    assert not any("out" in name or name.endswith("_.default") for name in operators)


@pytest.mark.parametrize(("layout", "m", "n"), CASES)
def test_tensors_without_data_pass_through(layout, m, n):
    layer, *_ = case(layout, m, n)
    with torch.no_grad():
        assert layer.to("meta")(torch.empty(MANY_TOKENS, n, dtype=torch.float64, device="meta")).shape == (
            MANY_TOKENS,
            m,
        )


def test_children_are_not_called_otherwise(monkeypatch):
    layer, *_ = case("pivot", 12, 20)
    called = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: called.append(self) or forward(self, x))
    with torch.no_grad():
        layer(random(3, 20))
    assert not called
    layer(random(3, 20))
    assert called == [layer.basis, layer.coefficients]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, *TOKENS])
def test_columns_are_permuted_with_and_without_gradients(tokens, dtype):
    x = random(tokens, 7).to(dtype)
    index = torch.randperm(7, generator=torch.Generator().manual_seed(0)).int()
    expected = x[:, index.long()]
    y = _direct.permute_columns(x, index)
    assert torch.equal(y, expected)
    assert y.data_ptr() != x.data_ptr() or not tokens
    x = x.clone().requires_grad_()
    _direct.permute_columns(x, index).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(("layout", "m", "n"), CASES)
def test_one_compiled_or_exported_program_serves_few_and_many_tokens(layout, m, n):
    layer, *_ = case(layout, m, n)
    sizes = (2, MANY_TOKENS - 1, MANY_TOKENS, 3 * MANY_TOKENS)
    x = random(sizes[-1], n)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        free = {"x": {0: torch.export.Dim("tokens", max=4096)}}
        programs = [torch.export.export(layer.eval(), (x[:size],), dynamic_shapes=free) for size in (5, sizes[-1])]
        for size in sizes:
            for run in (compiled, *(program.module() for program in programs)):
                torch.testing.assert_close(run(x[:size]), layer(x[:size]))


def test_a_bias_of_another_kind_is_found():
    layer, W, b = case("pivot", 12, 20)
    bias = layer.coefficients.bias.detach().clone()
    del layer.coefficients.bias
    layer.coefficients.bias = bias
    nn.utils.parametrize.register_parametrization(layer, "pivot_bias", nn.Identity())
    for tokens in (1, 3, MANY_TOKENS):
        x = random(tokens, 20)
        with torch.no_grad():
            assert torch.allclose(layer(x), F.linear(x, W, b), atol=1e-12)
