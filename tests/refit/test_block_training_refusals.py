from __future__ import annotations

import pytest
from refit_cases import arguments, compressed_case, same, state
from torch import nn

from fasc_lightning.layers import compressed_layers
from fasc_lightning.models import quantize_layers
from fasc_lightning.options import RefineOptions
from fasc_lightning.refit import RefitError
from fasc_lightning.refit._block_training import check_refine, refine


def test_what_cannot_be_refined_is_refused_before_anything_changes():
    case = compressed_case()
    before = state(case.model)
    with pytest.raises(ValueError, match="it is missing: call refine after the swap"):
        refine(case.model, {"nothing": nn.Linear(2, 2)}, case.batches)
    with pytest.raises(ValueError, match="`dense` is empty"):
        refine(case.model, {}, case.batches)
    with pytest.raises(ValueError, match=r"at least 4 batches, .* but got 0"):
        refine(case.model, case.dense, [])
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match=r"Expected a dense layer of shape \(48, 32\) .* but got \(2, 2\)"):
        refine(case.model, {**case.dense, name: nn.Linear(2, 2)}, case.batches)
    assert same(before, state(case.model))


def test_shared_layers_and_parameters_are_refused():
    case = compressed_case()
    first, second = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    layers = compressed_layers(case.model)
    kept = layers[second].basis
    layers[second].basis = nn.Linear(32, layers[second].rank, bias=False)
    layers[second].basis.weight = layers[first].basis.weight
    with pytest.raises(RefitError, match=r"one is also 'model.layers.1.self_attn.q_proj.basis.weight'.*refine_steps=0"):
        check_refine(case.model, case.dense)
    layers[second].basis = kept
    case.model.model.layers[1].self_attn.q_proj = layers[first]
    with pytest.raises(RefitError, match=r"are one: new factors .* \(refine_steps=0\)\. Or exclude it"):
        check_refine(case.model, [first])


def test_models_without_one_stack_of_blocks_are_refused_with_what_to_do():
    with pytest.raises(RefitError, match=r"Sequential has none. Recover it without refinement \(refine_steps=0\)"):
        check_refine(nn.Sequential(nn.Linear(2, 2)), ["0"])


def test_factors_that_cannot_be_trained_are_refused():
    case = compressed_case()
    name = "model.layers.0.mlp.up_proj"
    layer = case.model.get_submodule(name)
    basis = layer.basis
    layer.basis = nn.Sequential(basis)  # as an adapter wraps it
    with pytest.raises(TypeError, match="Merge adapters"):
        refine(*arguments(case))
    layer.basis = basis
    quantize_layers(case.model, {name: layer}, "int8")
    with pytest.raises(ValueError, match=r"up_proj' are torch.int8. Refine first and quantise then"):
        refine(*arguments(case))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps` to be an int of at least 1 but got 0"),
        ({"steps": 2.0}, "`steps` to be an int of at least 1 but got 2.0"),
        ({"holdout": 1}, "`holdout` to be an int of at least 2"),
        ({"tokens": 0}, "`tokens` to be an int of at least 1"),
        ({"seed": -1}, "`seed` to be an int of at least 0"),
        ({"lr": 0.0}, "`lr` to be a positive finite number but got 0.0"),
        ({"lr": float("nan")}, "`lr` to be a positive finite number but got nan"),
        ({"target": "exact"}, 'to be "dense" or "drifted" but got \'exact\''),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RefineOptions(**options)
