from __future__ import annotations

import math

import pytest
import torch
from tiny import Tokens, causal_model

from fasc_lightning.dependence import DependenceScore
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import linear_weight, select_layers
from fasc_lightning.studies.rho import backward_windows, gather


@pytest.fixture
def model():
    return causal_model().eval().requires_grad_(False)


WINDOWS = Tokens(samples=8, length=16).input_ids


def rows_by_hand(model, name, windows):
    """x and g = W^T h of one layer, window by window, with nothing of the taps."""
    caught = {}
    layer = model.get_submodule(name)

    def keep(module, args, output):
        output = output.detach().requires_grad_()  # a leaf: only what is downstream matters
        caught["x"], caught["y"] = args[0].detach(), output
        return output

    handle = layer.register_forward_hook(keep)
    found = []
    for ids in windows.split(1):
        model(input_ids=ids, labels=ids).loss.backward()
        h = caught["y"].grad[0] * (ids.numel() - 1)
        found.append((caught["x"][0], h @ linear_weight(layer), h))
    handle.remove()
    return found


def rho_by_definition(x, g):
    x, g = x.double() - x.double().mean(0), g.double() - g.double().mean(0)
    norm = torch.linalg.matrix_norm
    return (norm(x.T @ g) / torch.sqrt(norm(x.T @ x) * norm(g.T @ g))).item()


NAMES = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("name", NAMES)
def test_moments_are_those_of_every_token_and_scores_of_eight_windows(model, name):
    statistics = gather(model, select_layers(model), WINDOWS)
    assert list(statistics.observed) == [WINDOWS.numel()]
    observation = statistics.observed[WINDOWS.numel()][name]
    rows = rows_by_hand(model, name, WINDOWS)
    x, g, h = (torch.cat(values) for values in zip(*rows, strict=True))
    assert observation.pooled == pytest.approx(rho_by_definition(x, g), rel=1e-4)
    moments = statistics.moments.layer(name)
    torch.testing.assert_close(moments.A, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.G, h.T @ h / len(h), rtol=1e-4, atol=1e-9)

    score = DependenceScore()
    x, g = (torch.stack([row[i][:-1] for row in rows]) for i in (0, 1))  # the last token predicts nothing
    score.update(x, g)
    row = observation.row
    assert (row["layer"], row["step"], row["tokens"], row["reason"]) == (name, 0, 8 * 15, "")
    for column, expected in (("rho", score.compute()), ("debiased", score.debiased)):
        assert row[column] == pytest.approx(expected.item(), rel=1e-4)
    assert [row["low"], row["high"]] == pytest.approx(score.interval.tolist(), rel=1e-3, abs=1e-4)


def test_sizes_are_prefixes_of_the_same_windows(model):
    layers = select_layers(model)
    observed = gather(model, layers, WINDOWS, sizes=[100, 32, 10_000]).observed
    assert list(observed) == [32, 112, 128]  # the first whole windows that hold as many, and all
    alone = gather(model, layers, WINDOWS[:2]).observed[32]
    for name in NAMES:
        assert repr(observed[32][name].row) == repr(alone[name].row)  # NaN and all
        assert observed[32][name].row["reason"] == "fewer than 4 sequences, too few for all but rho"
        assert observed[32][name].pooled == pytest.approx(alone[name].pooled)


def test_a_size_of_all_tokens_is_observed_once(model):
    assert list(gather(model, select_layers(model), WINDOWS, sizes=[128]).observed) == [128]


def test_the_model_is_left_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = select_layers(model)
    gather(model, layers, WINDOWS[:2])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer._forward_hooks for layer in layers.values())


def test_a_loss_that_is_not_finite_stops_the_pass_and_takes_the_hooks_off(model):
    layers = select_layers(model)
    taps = Taps(layers)
    passed = backward_windows(model, taps, WINDOWS)
    assert next(passed) == 16
    model.lm_head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="finite loss but got nan in window 1"):
        next(passed)
    assert not taps.installed


def test_a_layer_out_of_use_is_undefined(model):
    unused = torch.nn.Linear(4, 4)
    layers = {**select_layers(model), "unused": unused}
    observation = gather(model, layers, WINDOWS[:2]).observed[32]["unused"]
    assert math.isnan(observation.pooled)
    assert math.isnan(observation.row["rho"])
    assert observation.row["reason"] == "no tokens"
