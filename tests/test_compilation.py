"""The compressed model as a graph: compiled, exported, and with parts of it computed twice."""

from __future__ import annotations

import copy

import pytest
import torch
from lowrank_cases import case
from tiny import causal_model, token_loader
from torch import nn
from torch.export import Dim

from fasc_lightning import compress, load_compressed, quantize
from fasc_lightning.swap import compressed_layers

LAYOUTS = ("pivot", "factors")
IDS = torch.arange(3, 17).reshape(2, 7)

# The compiler's own doing, where a graph holds an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A reloaded compressed model, made once."""
    made = {}

    def get(layout, family="llama", quantization=None, **settings):
        key = (layout, family, quantization, *settings.items())
        if key not in made:
            model = causal_model(family, **settings).eval()
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
    loss = (forward or model)(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(got, expected):
    torch.testing.assert_close(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


# torch.compile


@pytest.mark.parametrize("quantization", [None, "int8", "int8-dynamic"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_graph_forward_and_backward(models, layout, quantization):
    model = models(layout, quantization=quantization)
    expected = loss_and_gradients(model)
    assert expected[1]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_training(loss_and_gradients(model, compiled), expected)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_whole_graph_of_other_families(models, family):
    for layout in LAYOUTS:
        model = models(layout, family)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_under_no_grad(models, layout, quantization):
    model = models(layout, quantization=quantization).to(torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_graph_serves_all_lengths(models, layout):
    model = models(layout)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for ids in (IDS, IDS[:, :5], torch.arange(3, 48).reshape(5, 9)):
            torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


def test_generated_code(tmp_path, monkeypatch):
    """The default backend, which writes C++, on a stack of every kind of layer."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    float32 = {"dtype": torch.float32}
    stack = nn.Sequential(
        case("pivot", 12, 20, **float32)[0],
        nn.GELU(),
        case("factors", 20, 12, **float32)[0],
        nn.GELU(),
        case("pivot", 20, 20, **float32)[0],
        case("pivot", 24, 20, **float32)[0],
    )
    quantize(stack, targets=["5"])
    compiled = torch.compile(stack, fullgraph=True)
    x = torch.randn(3, 4, 20)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), stack(x))


# torch.export


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
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
@pytest.mark.parametrize("quantization", [None, "int8-dynamic"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpointed_blocks_have_the_same_gradients(models, layout, quantization, reentrant):
    model = models(layout, quantization=quantization).train()
    expected = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
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
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_training(loss_and_gradients(model), expected)
    assert norm.grad.any()
