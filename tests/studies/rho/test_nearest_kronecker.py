from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import Tokens, causal_model

from fasc_lightning.batches import TokenRows
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import layer_shapes, select_layers
from fasc_lightning.statistics import CalibrationMoments
from fasc_lightning.studies.rho import backward_windows, refine_kronecker
from fasc_lightning.studies.rho._nearest_kronecker import KroneckerStep

NAMES = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
WINDOWS = Tokens(samples=6, length=12).input_ids


@pytest.fixture
def model():
    settings = {"hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 2, "num_key_value_heads": 1}
    return causal_model("llama", **settings).double().eval().requires_grad_(False)


@pytest.fixture
def layers(model):
    return {name: module for name, module in select_layers(model).items() if name in NAMES}


def calibrated(model, layers, needs=("kronecker",)):
    moments = CalibrationMoments(layer_shapes(layers), torch.float64, needs=needs)
    for _ in backward_windows(model, Taps(layers, moments), WINDOWS):
        pass
    return moments


def gradients(model, name):
    """dL/dW of every window's summed token losses, by autograd on the weight itself."""
    weight = model.get_submodule(name).weight.requires_grad_()
    found = []
    for ids in WINDOWS.split(1):
        loss = model(input_ids=ids, labels=ids).loss * (ids.numel() - 1)
        found.append(torch.autograd.grad(loss, weight)[0].numpy())
    weight.requires_grad_(False)
    return np.stack(found)


@pytest.mark.parametrize("name", NAMES)
def test_steps_end_at_the_nearest_kronecker_product_by_brute_force(model, layers, name):
    moments = calibrated(model, layers)
    before = moments.layer(name)
    cost = refine_kronecker(model, layers, WINDOWS, moments, steps=40)
    assert cost.steps == len(cost.changes) == 40
    assert cost.seconds > 0
    assert cost.changes[-1] < 1e-5 < cost.changes[0]

    G = gradients(model, name)
    m, n = G.shape[1:]
    F = np.mean([np.outer(Gi.ravel(), Gi.ravel()) for Gi in G], 0).reshape(m, n, m, n)
    U, _, Vt = np.linalg.svd(F.transpose(0, 2, 1, 3).reshape(m * m, n * n))
    after = moments.layer(name)
    for found, vector in zip(after.kronecker, (Vt[0], U[:, 0]), strict=True):
        expected = vector.reshape(found.shape) * np.sign(vector.reshape(found.shape).trace())
        np.testing.assert_allclose((found / found.norm()).numpy(), expected, atol=1e-4)
        assert found.trace().item() == pytest.approx(math.sqrt((G**2).sum() / len(G)), rel=1e-6)
    assert torch.equal(before.A, after.A)


def test_no_pass_changes_nothing(model, layers):
    moments = calibrated(model, layers)
    expected = moments.layer(NAMES[0]).kronecker
    cost = refine_kronecker(model, layers, WINDOWS, moments, steps=0)
    assert (cost.steps, cost.changes) == (0, ())
    assert all(map(torch.equal, expected, moments.layer(NAMES[0]).kronecker))


def test_a_pass_that_fails_leaves_the_last_whole_one(model, layers):
    moments = calibrated(model, layers)
    expected = moments.layer(NAMES[0]).kronecker
    model.lm_head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="finite loss"):
        refine_kronecker(model, layers, WINDOWS, moments, steps=1)
    assert all(map(torch.equal, expected, moments.layer(NAMES[0]).kronecker))
    assert not any(module._forward_hooks for module in layers.values())


def test_it_starts_from_the_step_of_a_calibration(model, layers):
    with pytest.raises(ValueError, match=r"`kronecker`.* for the start of the iteration; but it was not gathered"):
        refine_kronecker(model, layers, WINDOWS, calibrated(model, layers, ["C"]), steps=1)
    with pytest.raises(ValueError, match="at least 0, but got -1"):
        refine_kronecker(model, layers, WINDOWS, calibrated(model, layers), steps=-1)


def test_layers_that_no_step_was_asked_for_or_that_nothing_reached_are_passed_over(model, layers):
    moments = calibrated(model, layers)
    step = KroneckerStep({NAMES[0]: moments.sequences[NAMES[0]]})
    step("elsewhere", torch.ones(3, 8), torch.ones(3, 4), TokenRows(), [3])
    assert step.finish() == {}
    unused = {**layers, "unused": torch.nn.Linear(4, 4)}
    moments = calibrated(model, unused)
    refine_kronecker(model, unused, WINDOWS, moments, steps=1)
    assert moments.tokens("unused") == 0
