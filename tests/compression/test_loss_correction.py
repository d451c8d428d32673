from __future__ import annotations

import math

import pytest
import torch
from tiny import causal_model
from torch import nn

from fasc_lightning.batches import TokenRows
from fasc_lightning.compression import compress_layers, evenly_spaced, measure_losses
from fasc_lightning.compression._loss_correction import LEAST, SHARE, ApproximationLosses, correction
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import layer_shapes, select_layers
from fasc_lightning.refit import causal_loss
from fasc_lightning.statistics import CalibrationMoments
from fasc_lightning.studies.rho import HeldoutLosses


def batches(count=6):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(64, (2, 12), generator=generator)} for _ in range(count)]


def rows(batch):
    return TokenRows(scale=batch["input_ids"][:, 1:].numel())


def random_factors(layers, rank=3):
    return {
        name: (torch.randn(m, rank) / rank, torch.randn(rank, n) / rank)
        for name, (m, n) in layer_shapes(layers).items()
    }


def test_losses_are_those_of_the_whole_matrices():
    torch.manual_seed(0)
    layers = {"up": nn.Linear(7, 5), "down": nn.Linear(5, 7)}
    factors = random_factors({"up": layers["up"]})
    cheap = ApproximationLosses(layers, factors)
    weights = {"up": layers["up"].weight}
    whole = HeldoutLosses(weights, {"up": {"": factors["up"][0] @ factors["up"][1]}})
    for _ in range(3):
        x, h = torch.randn(11, 7), torch.randn(11, 5)
        for judge in (cheap, whole):
            judge("up", x, h, TokenRows(scale=3.0), [11])
        cheap("down", torch.randn(11, 5), torch.randn(11, 7), TokenRows(), [11])  # not asked for
    assert cheap.losses() == pytest.approx({"up": whole.losses("up")[""]}, rel=1e-5)
    assert cheap.tokens == {"up": 33}


def test_a_layer_that_no_token_reached_has_no_loss():
    layers = {"up": nn.Linear(7, 5)}
    assert math.isnan(ApproximationLosses(layers, random_factors(layers)).losses()["up"])


def test_measuring_is_a_backward_pass_that_leaves_no_trace():
    torch.manual_seed(0)
    model = causal_model()
    model.train()
    layers = select_layers(model)
    next(model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    factors = random_factors(layers)
    found = measure_losses(model, layers, factors, batches(), rows, causal_loss)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    # The same by hand, with every gradient that autograd has.
    name = list(layers)[-1]
    model.eval()
    seen = []
    layers[name].register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    total, tokens = 0.0, 0
    for batch in batches():
        loss = causal_loss(model, batch) * batch["input_ids"][:, 1:].numel()
        x, y = seen.pop()
        (h,) = torch.autograd.grad(loss, y)
        D = layers[name].weight - factors[name][0] @ factors[name][1]
        total += (torch.einsum("bto,oi,bti->bt", h, D, x) ** 2).sum().item()
        tokens += x.shape[0] * x.shape[1]
    assert found[name] == pytest.approx(total / tokens, rel=1e-4)


def test_a_loss_that_is_not_finite_is_refused_and_hooks_are_gone():
    model = causal_model()
    layers = select_layers(model)
    with pytest.raises(FloatingPointError, match="finite loss but got nan"):
        measure_losses(model, layers, {}, batches(1), rows, lambda model, batch: causal_loss(model, batch) * math.nan)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_batches_to_measure_on_lie_evenly():
    assert evenly_spaced(range(64)) == [7, 15, 23, 31, 39, 47, 55, 63]
    assert evenly_spaced(range(3)) == [0, 1, 2]
    assert len(evenly_spaced(range(20))) == LEAST
    assert len(evenly_spaced(range(100))) == 100 // SHARE


def test_the_correction_is_the_root_of_the_ratio_or_none():
    assert correction(2.0, 8.0) == pytest.approx(2.0)
    assert correction(2.0, 8.0, trust=1.0) == pytest.approx(4.0)
    assert [correction(0.0, 1.0), correction(1.0, 0.0), correction(1.0, math.nan)] == [1.0, 1.0, 1.0]


@pytest.fixture
def calibrated():
    torch.manual_seed(1)
    model = causal_model(initializer_range=0.3).eval()
    layers = select_layers(model)
    moments = CalibrationMoments(layer_shapes(layers), needs={"coupled", "plain"})
    taps = Taps(layers, moments)
    taps.install()
    for batch in batches(8):
        taps.begin_batch(rows(batch))
        causal_loss(model, batch).backward()
        taps.end_batch()
    taps.remove()
    return layers, moments


def ranks(result):
    return {plan.name: plan.rank for plan in result.layers}


def test_a_layer_that_measures_worse_than_predicted_is_given_more(calibrated):
    layers, moments = calibrated
    options = {"keep": 0.5, "consume": False}
    predicted = compress_layers(layers, moments, allocation="fisher", **options)
    loss = {plan.name: plan.loss for plan in predicted.layers}
    chosen = next(plan.name for plan in predicted.layers if plan.layout != "dense")
    shapes = {}

    def worse(factors):
        shapes.update({name: (tuple(B.shape), tuple(C.shape)) for name, (B, C) in factors.items()})
        return {name: loss[name] * (400 if name == chosen else 1) for name in factors}

    measured = compress_layers(layers, moments, allocation="measured", measure=worse, **options)
    assert ranks(measured)[chosen] > ranks(predicted)[chosen]
    assert sum(ranks(measured).values()) <= sum(ranks(predicted).values()) + len(layers)
    for name, (m, n) in layer_shapes(layers).items():
        if name in shapes:
            k = ranks(predicted)[name]
            assert shapes[name] == ((m, k), (k, n))
    same = compress_layers(layers, moments, allocation="measured", measure=lambda factors: {}, **options)
    assert ranks(same) == ranks(predicted)


def test_what_is_reported_is_the_corrected_loss(calibrated):
    layers, moments = calibrated
    before = compress_layers(layers, moments, keep=0.5, consume=False)
    loss = {plan.name: plan.loss for plan in before.layers}
    result = compress_layers(
        layers,
        moments,
        keep=0.5,
        allocation="measured",
        measure=lambda factors: {name: 4 * loss[name] for name in factors},
        consume=False,
    )
    changed = [plan for plan in result.layers if plan.rank == ranks(before)[plan.name] and plan.loss > 0]
    assert changed
    for plan in changed:
        assert plan.loss == pytest.approx(2 * loss[plan.name], rel=1e-6)


def test_losses_in_other_units_are_not_measured(calibrated):
    layers, moments = calibrated

    def never(factors):
        raise AssertionError("measured")

    compress_layers(layers, moments, keep=0.5, method="svd", allocation="measured", measure=never, consume=False)
    with pytest.raises(AssertionError, match="measured"):
        compress_layers(
            layers, moments, keep=0.5, method="svd", unit="fisher", allocation="measured", measure=never, consume=False
        )


def test_measuring_needs_a_measure(calibrated):
    layers, moments = calibrated
    with pytest.raises(ValueError, match="Expected `measure`"):
        compress_layers(layers, moments, keep=0.5, allocation="measured")


def test_only_the_backward_pass_of_the_loss_is_measured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    layers, data = {"0": model[0]}, [torch.randn(7, 5, dtype=torch.float64) for _ in range(3)]
    factors = {"0": (torch.randn(6, 2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64))}

    def loss(model, x):
        """As a physics-informed network's, which differentiates on its way."""
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.square().sum()

    found = measure_losses(model, layers, factors, data, lambda batch: TokenRows(), loss)
    outputs, total = [], 0.0
    model[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    for x in data:
        (h,) = torch.autograd.grad(loss(model, x), outputs[-1:])
        change = model[0].weight - factors["0"][0] @ factors["0"][1]
        total += ((h @ change) * x).sum(1).square().sum().item()
    assert found["0"] == pytest.approx(total / 21)
