from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from tiny import causal_model

from fasc_lightning.layers import select_layers
from fasc_lightning.studies.pruning import prune_magnitude


def weights(model):
    return {name: layer.weight.detach().numpy().copy() for name, layer in select_layers(model).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("keep", [0.8, 0.35])
def test_uniform_pruning_zeroes_the_smallest_weights_of_each_layer(family, keep):
    model = causal_model(family)
    dense = weights(model)
    result = prune_magnitude(model, keep)
    for name, weight in weights(model).items():
        kept = math.floor(keep * weight.size)
        threshold = np.sort(np.abs(dense[name]), axis=None)[weight.size - kept]
        np.testing.assert_array_equal(weight, np.where(np.abs(dense[name]) >= threshold, dense[name], 0))
    assert result.nonzero <= keep
    assert result.zeros == sum((w == 0).sum() for w in weights(model).values())


def test_global_pruning_has_one_threshold_for_all_layers():
    model = causal_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(100)
    dense = weights(model)
    result = prune_magnitude(model, 0.5, scope="global")
    pooled = np.sort(np.concatenate([np.abs(w).ravel() for w in dense.values()]))
    threshold = pooled[len(pooled) - math.floor(0.5 * len(pooled))]
    for name, weight in weights(model).items():
        np.testing.assert_array_equal(weight, np.where(np.abs(dense[name]) >= threshold, dense[name], 0))
    assert (weights(model)["model.layers.0.mlp.up_proj"] == 0).mean() < 0.05
    assert result.nonzero == pytest.approx(0.5, abs=1e-4)


def test_zeros_are_not_called_saved_memory():
    model = causal_model()
    parameters, keys = list(model.parameters()), list(model.state_dict())
    result = prune_magnitude(model, 0.5)
    assert result.parameters_after == result.parameters_before == sum(w.size for w in weights(model).values())
    assert result.kept == 1.0
    assert result.passes == result.tokens == 0
    # Made permanent: the same parameters under the same names, no masks, no hooks.
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert result.to_dict()["nonzero"] == result.nonzero


def test_only_targeted_layers_change():
    model = causal_model()
    dense = copy.deepcopy(model.state_dict())
    prune_magnitude(model, 0.5, targets=["up_proj"])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, dense[name])}
    assert changed == {f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)}


def test_keeping_everything_changes_nothing():
    model = causal_model()
    dense = copy.deepcopy(model.state_dict())
    assert prune_magnitude(model, 1.0).zeros == 0
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


def test_a_weight_that_is_not_finite_is_refused_and_nothing_changes():
    model = causal_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    dense = weights(model)
    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.down_proj"):
        prune_magnitude(model, 0.5)
    for name, weight in weights(model).items():
        np.testing.assert_array_equal(weight, dense[name])


@pytest.mark.parametrize(
    ("options", "error"),
    [({"keep": 0.0}, ValueError), ({"keep": True}, TypeError), ({"keep": 0.5, "scope": "x"}, ValueError)],
)
def test_options_out_of_range_are_refused(options, error):
    with pytest.raises(error, match="Expected"):
        prune_magnitude(causal_model(), **options)
