"""Compressed layers of every kind in the hands of TorchScript, fx, the exporter and the compiler."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import fx, nn

from fasc_lightning.layers import LowRankLinear, PivotedLinear, quantized_layer, swap_modules

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # the compiler's own doing
]

#: Sizes on both sides of every limit in the layers' forward: none, one, few and many tokens, and dimensions.
SHAPES = ((12,), (1, 12), (3, 12), (0, 12), (100, 12), (2, 5, 12), (3, 40, 12), (2, 2, 40, 12))


def layer(layout, bias=True, quantization=None):
    torch.manual_seed(0)
    if layout == "dense":
        new = nn.Linear(12, 10, bias)
    elif layout == "factors":
        new = LowRankLinear(12, 10, 4, bias)
    else:
        new = PivotedLinear(12, 10, 4, bias, side=layout)
        new.permutation = torch.randperm(len(new.permutation), dtype=torch.int32)
        if new.pivot_bias is not None:
            nn.init.normal_(new.pivot_bias)
    return new if quantization is None else quantized_layer(new, quantization)


KINDS = [
    (layout, bias, quantization)
    for bias in (True, False)
    for layout in ("factors", "out", "in", "dense")
    for quantization in (None, "int8", "int8-dynamic")
    if (layout, quantization) != ("dense", None)
]


def assert_same(program, net, shapes=SHAPES):
    for shape in shapes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(program(x), net(x), atol=1e-5), shape


def net_of(kind):
    return nn.Sequential(nn.Linear(12, 12), layer(*kind), nn.ReLU()).eval()


@pytest.mark.sampled(30)
@pytest.mark.parametrize("example", [(3, 12), (100, 12), pytest.param((2, 5, 12), marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_holds_for_all_sizes_and_warns_of_nothing(kind, grad, example, tmp_path):
    net = net_of(kind)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        trace = torch.jit.trace(net, torch.randn(example))
        assert_same(trace, net)
    trace.save(tmp_path / "trace.pt")
    assert_same(torch.jit.load(tmp_path / "trace.pt"), net)


@pytest.mark.parametrize("kind", KINDS)
def test_scripts_hold_for_all_sizes_and_leave_the_module(kind, tmp_path):
    net = net_of(kind)
    children = list(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=r"`torch.jit.*` is deprecated", category=DeprecationWarning)
        script = torch.jit.script(net)
    assert all(a is b for a, b in zip(net, children, strict=True))
    assert_same(script, net)
    script.save(tmp_path / "script.pt")
    loaded = torch.jit.load(tmp_path / "script.pt")
    assert_same(loaded, net)
    assert loaded.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_fx_traces_and_its_graphs_have_the_gradients(kind):
    net = net_of(kind)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            graph = fx.symbolic_trace(net)
            assert_same(graph, net)
    assert_same(copy.deepcopy(graph), net)
    assert_same(pickle.loads(pickle.dumps(graph)), net)
    gradients = []
    for each in (net, graph):
        x = torch.linspace(-1, 1, 36).reshape(3, 12).requires_grad_()
        each(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, atol=1e-6)
    assert gradients[0].abs().sum() > 0


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", KINDS[: len(KINDS) // 2])
def test_exported_and_compiled_for_all_sizes(kind):
    net = net_of(kind)
    dims = ({0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)},)
    program = torch.export.export(net, (torch.randn(4, 6, 12),), dynamic_shapes=dims).module()
    assert_same(program, net, [(2, 5, 12), (3, 40, 12)])
    torch.compiler.reset()
    assert_same(torch.compile(net, fullgraph=True, backend="eager"), net, [(3, 12), (100, 12)])


@pytest.mark.parametrize("layout", ["factors", "pivot"])
def test_a_traced_model_of_transformers(layout):
    from transformers import ViTConfig, ViTForImageClassification

    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(**settings, image_size=8, patch_size=4))
    new = {
        name: LowRankLinear(m.in_features, m.out_features, 3)
        if layout == "factors"
        else PivotedLinear(m.in_features, m.out_features, 3)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and min(m.weight.shape) > 4
    }
    swap_modules(model.eval(), new)
    assert new
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model's own code
        trace = torch.jit.trace(model, torch.zeros(2, 3, 8, 8), strict=False)
    x = torch.linspace(-1, 1, 3 * 192).reshape(3, 3, 8, 8)
    assert torch.allclose(trace(x)["logits"], model(x).logits, atol=1e-5)
