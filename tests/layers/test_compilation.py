"""The compressed model as a graph: compiled, exported, and with parts of it computed twice."""

from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch
from lowrank_cases import case
from tiny import causal_model, token_loader
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.export import Dim

from fasc_lightning import compress, load_compressed, quantize
from fasc_lightning.layers import compressed_layers

LAYOUTS = ("pivot", "factors")
IDS = torch.arange(3, 17).reshape(2, 7)

# The compiler's own doing, where a graph holds an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A reloaded compressed model, made once."""
    made = {}

    def get(layout, family="llama", quantization=None):
        key = (layout, family, quantization)
        if key not in made:
            model = causal_model(family, num_hidden_layers=1).eval()
            compress(model, list(token_loader(samples=16)), keep=0.7, layout=layout, refit=False, progress=False)
            if quantization is not None:
                quantize(model, quantization)
            folder = tmp_path_factory.mktemp("model")
            model.save_pretrained(folder)
            made[key] = load_compressed(folder)
            assert compressed_layers(made[key])
        return copy.deepcopy(made[key])

    return get


@pytest.fixture(autouse=True)
def _forget_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_and_gradients(model, forward=None):
    """Loss of a batch, and the gradient of every parameter that has one."""
    model.zero_grad()
    loss = (model if forward is None else forward)(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(got, expected):
    torch.testing.assert_close(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


# torch.compile


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("layout", "quantization"),
    [
        ("pivot", None),
        ("factors", "int8-dynamic"),
        pytest.param("factors", None, marks=pytest.mark.exhaustive),
        pytest.param("pivot", "int8", marks=pytest.mark.exhaustive),
    ],
)
def test_whole_graph_forward_and_backward(models, layout, quantization):
    model = models(layout, quantization=quantization)
    expected = loss_and_gradients(model)
    assert expected[1]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_training(loss_and_gradients(model, compiled), expected)


@pytest.mark.parametrize(("family", "layout"), [("gpt2", "pivot"), ("opt", "factors")])
def test_whole_graph_of_other_families(models, family, layout):
    model = models(layout, family)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("layout", "quantization"),
    [
        ("pivot", None),
        pytest.param("pivot", "int8", marks=pytest.mark.exhaustive),
        pytest.param("factors", None, marks=pytest.mark.exhaustive),
    ],
)
def test_half_precision_under_no_grad(models, layout, quantization):
    model = models(layout, quantization=quantization).to(torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        # Not compiled, sums are made in place and rounded once less.
        torch.testing.assert_close(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0.02, atol=1e-3)


def test_lengths_need_as_few_graphs_as_in_the_dense_model(models):
    counts = []
    for model in (causal_model(num_hidden_layers=1).eval(), models("pivot"), models("factors")):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
        with torch.no_grad():
            for ids in (IDS, IDS[:, :5].contiguous(), torch.arange(3, 48).reshape(5, 9)):
                torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
        counts.append(counter.frame_count)
    assert counts[1:] == counts[:1] * 2


@pytest.mark.exhaustive  # ten seconds of a C++ compiler
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own use
def test_generated_code(tmp_path, monkeypatch):
    """The default backend, which writes C++: outputs permuted in one layer, inputs in the other, which is of int8."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layers = [case("pivot", m, n, dtype=torch.float32)[0] for m, n in ((12, 20), (24, 12))]
    stack = nn.Sequential(*layers)
    quantize(stack, targets=["1"])
    compiled = torch.compile(stack, fullgraph=True)
    x = torch.randn(3, 4, 20)
    with torch.no_grad():
        wanted = stack(x)
        torch.testing.assert_close(compiled(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


# torch.export


@pytest.mark.parametrize(
    ("layout", "quantization"),
    [
        ("pivot", None),
        ("factors", "int8"),
        pytest.param("pivot", "int8-dynamic", marks=pytest.mark.exhaustive),
    ],
)
def test_exported_for_all_batches_and_lengths_and_saved(models, layout, quantization, tmp_path):
    model = models(layout, quantization=quantization)
    free = {0: Dim("batch", max=64), 1: Dim("length", max=60)}
    with torch.no_grad():
        program = torch.export.export(
            model,
            (),
            {"input_ids": IDS, "use_cache": False},
            dynamic_shapes={"input_ids": free, "use_cache": None},
        )
        torch.export.save(program, tmp_path / "model.pt2")
        exported = torch.export.load(tmp_path / "model.pt2").module()
        for ids in (IDS, torch.arange(3, 48).reshape(5, 9)):
            torch.testing.assert_close(exported(input_ids=ids, use_cache=False).logits, model(input_ids=ids).logits)
    weights = {name: value for name, value in program.state_dict.items() if "layers.0.mlp" in name}
    assert weights.keys() == {name for name in model.state_dict() if "layers.0.mlp" in name}


# Gradient checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("layout", "quantization"), [("pivot", None), ("factors", None), ("pivot", "int8-dynamic")])
def test_checkpointed_blocks_have_the_same_gradients(models, layout, quantization, reentrant):
    model = models(layout, quantization=quantization).train()
    expected = loss_and_gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    layer = next(iter(compressed_layers(model).values()))
    layer.register_forward_hook(lambda *_: calls.append(1))
    assert_same_training(loss_and_gradients(model), expected)
    assert len(calls) == 2


def test_checkpointed_training_of_frozen_factors(models):
    """As for adapters: nothing in the blocks trains but what is added."""
    model = models("pivot").train()
    model.requires_grad_(False)
    norm = model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    expected = loss_and_gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same_training(loss_and_gradients(model), expected)
    assert norm.grad.any()
