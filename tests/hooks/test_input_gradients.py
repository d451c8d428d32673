from __future__ import annotations

import pytest
import torch
from tiny import causal_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from fasc_lightning.batches import Backwards, TokenRows
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import select_layers


def gathered(layers, run, **settings):
    """What the taps hand over of one batch, by layer: x, h and the gradient at the input, or None without one."""
    found = {}

    def keep(name, x, h, batch, lengths, g=None):
        assert name not in found
        found[name] = x.clone(), h.clone(), None if g is None else g.clone()

    taps = Taps(layers, pairs=keep, anchor=False, inputs=True)
    taps.install()
    taps.begin_batch(TokenRows(), **settings)
    run()
    taps.end_batch()
    taps.remove()
    return found


def assert_products(found, layers):
    for name, (_, h, g) in found.items():
        torch.testing.assert_close(g, h @ layers[name].weight.detach(), rtol=1e-5, atol=1e-7)


def test_each_layer_has_its_own_gradient_though_layers_share_an_input():
    model = causal_model("llama")
    layers, ids = select_layers(model), torch.randint(50, (4, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    found = gathered(layers, lambda: model(input_ids=ids, labels=ids).loss.backward())
    assert set(found) == set(layers)
    assert_products(found, layers)
    for name, value in model.named_parameters():
        assert torch.equal(value.grad, expected[name])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_each_gradient_once(reentrant):
    torch.manual_seed(0)
    layers = {"a": nn.Linear(5, 5), "b": nn.Linear(5, 5)}
    x = torch.randn(3, 4, 5, requires_grad=True)

    def block(values):
        return layers["a"](values).tanh() + layers["b"](values)

    found = gathered(layers, lambda: checkpoint(block, 2 * x, use_reentrant=reentrant).square().sum().backward())
    assert set(found) == {"a", "b"}
    assert_products(found, layers)


def test_inputs_without_a_gradient_half_precision_and_several_passes_have_none():
    layers = {"layer": nn.Linear(5, 5)}
    plain, wanted = torch.randn(3, 4, 5), torch.randn(3, 4, 5, requires_grad=True)
    half = {"layer": nn.Linear(5, 5).bfloat16()}

    def cast():
        with torch.autocast("cpu", torch.bfloat16):
            loss = layers["layer"](wanted * 1).float().square().sum()
        loss.backward()

    for found in (
        gathered(layers, lambda: layers["layer"](plain).square().sum().backward()),
        gathered(half, lambda: half["layer"](wanted.bfloat16()).square().sum().backward()),
        gathered(layers, cast),
        gathered(layers, lambda: layers["layer"](wanted * 1).sum().backward(), backwards=Backwards(several=True)),
    ):
        x, h, g = found["layer"]
        assert g is None
        assert len(x) == len(h) == 12


def test_a_pass_that_stops_at_the_layer_counts_without_a_gradient_at_the_input():
    layer = nn.Linear(5, 5)
    x = torch.randn(3, 4, 5, requires_grad=True)
    found = gathered({"layer": layer}, lambda: layer(x * 1).square().sum().backward(inputs=[layer.weight]))
    assert found["layer"][2] is None


def test_a_layer_called_by_keyword_has_none():
    layer = nn.Linear(5, 5)
    x = torch.randn(3, 4, 5, requires_grad=True)
    found = gathered({"layer": layer}, lambda: layer(input=x * 1).square().sum().backward())
    assert found["layer"][2] is None
