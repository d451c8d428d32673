"""Dense stand-ins of quantised layers."""

from __future__ import annotations

import pytest
import torch
from tiny import causal_model

from fasc_lightning.layers import compressed_layers, dequantized, make_lowrank, swap_modules
from fasc_lightning.models import quantize
from fasc_lightning.options import Quantize

IDS = torch.arange(12)[None]


@pytest.mark.parametrize("form", ["int8", Quantize(4, 16, rounding="nearest"), Quantize(3, 16, True, "nearest")])
def test_a_model_answers_alike_and_has_its_own_layers_afterwards(form):
    model = causal_model().eval()
    quantize(model, form)
    layers = compressed_layers(model)
    with torch.no_grad():
        expected = model(IDS).logits
        with dequantized(model):
            assert compressed_layers(model) == {}
            found = model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert compressed_layers(model) == layers
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())


def test_low_rank_layers_stay_and_an_error_brings_the_layers_back():
    model = causal_model()
    dense = model.model.layers[0].mlp.up_proj
    low = make_lowrank(dense.weight[:, :4].detach(), torch.randn(4, dense.in_features), None, "factors")
    swap_modules(model, {"model.layers.0.mlp.up_proj": low})
    quantize(model, Quantize(4, 16, rounding="nearest"), exclude=["up_proj"])
    before = compressed_layers(model)

    def stop():
        with dequantized(model):
            assert list(compressed_layers(model)) == ["model.layers.0.mlp.up_proj"]
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert compressed_layers(model) == before
