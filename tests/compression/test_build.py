from __future__ import annotations

import pytest
import torch
from torch import nn

from fasc_lightning.compression import _build as factorize
from fasc_lightning.compression import build_layers, compress_layers, factorize_layers, fisher_losses, fisher_metric
from fasc_lightning.compression._factorize import UNITS
from fasc_lightning.layers import _layouts as layouts
from fasc_lightning.solvers import get_solver
from fasc_lightning.statistics import CalibrationMoments

SHAPES = {"a": (12, 16), "b": (16, 12), "c": (14, 14)}


@pytest.fixture
def layers():
    return {name: nn.Linear(n, m) for name, (m, n) in SHAPES.items()}


@pytest.fixture
def moments():
    gathered = CalibrationMoments(SHAPES, needs=["plain", "coupled"])
    for i, (name, (m, n)) in enumerate(SHAPES.items()):
        x, h = torch.randn(100, n) @ torch.randn(n, n), 10**i * torch.randn(100, m) @ torch.randn(m, m)
        gathered.add_inputs([name], x)
        gathered.add_gradients(name, h)
        gathered.add_pairs(name, x, h)
    return gathered


def losses_of(layers, moments, name, method):
    W, statistics = layers[name].weight.detach(), moments.layer(name)
    return fisher_losses(W, *fisher_metric(statistics), get_solver(method)(W, statistics))


def test_plans_name_the_solver_and_the_layout_of_the_built_layer(layers, moments):
    for layout in ("pivot", "factors"):
        result = compress_layers(layers, moments, keep=0.6, layout=layout, consume=False)
        assert [plan.method for plan in result.layers] == ["fasc"] * 3
        for plan in result.layers:
            built = result.replacements.get(plan.name)
            assert plan.layout == ("dense" if built is None else built.layout)
        assert {plan.layout for plan in result.layers} <= {layout, "dense"}


@pytest.mark.parametrize("allocation", ["fisher", "uniform", "measured"])
def test_factors_are_freed_as_soon_as_their_layer_is_built(layers, moments, allocation):
    factorized, left = factorize_layers(layers, moments), []

    def progress(names, description):
        for name in names:
            left.append(len(factorized.factorizations))
            yield name

    def measure(factors):
        return dict.fromkeys(factors, 1.0)

    result = build_layers(
        layers, factorized, keep=0.4, layout="factors", allocation=allocation, measure=measure, progress=progress
    )
    assert len(result.replacements) == 3
    assert left == [3, 2, 1]
    assert not factorized.factorizations


@pytest.mark.parametrize("allocation", ["fisher", "uniform"])
@pytest.mark.parametrize("layout", ["auto", "pivot", "factors"])
def test_aligned_ranks_are_multiples_within_the_budget(layers, moments, layout, allocation):
    options = {"layout": layout, "allocation": allocation, "consume": False}
    result = compress_layers(layers, moments, keep=0.7, align=4, **options)
    assert result.replacements
    assert all(plan.rank % 4 == 0 or plan.layout == "dense" for plan in result.layers)
    built = {**layers, **result.replacements}
    total = sum(p.numel() for layer in layers.values() for p in layer.parameters())
    assert sum(p.numel() for layer in built.values() for p in layer.parameters()) <= 0.7 * total


def test_auto_builds_what_the_budget_was_told(layers, moments, monkeypatch):
    """Layers of another dtype than the rest may be faster in another layout, which would hold other numbers."""
    layers["b"].to(torch.bfloat16)
    wanted = {"a": "factors", "b": "factors", "c": "pivot"}
    by_shape = {shape: wanted[name] for name, shape in SHAPES.items()}
    asked = []

    def auto_layout(m, n, k, dtype=torch.bfloat16):
        asked.append(dtype)
        return by_shape[m, n]

    monkeypatch.setattr(layouts, "auto_layout", auto_layout)
    monkeypatch.setattr(factorize, "auto_layout", auto_layout)
    result = compress_layers(layers, moments, keep=0.6, consume=False)
    assert {name: built.layout for name, built in result.replacements.items()}.items() <= wanted.items()
    assert set(asked) == {torch.float32}
    built = {**layers, **result.replacements}
    total = sum(p.numel() for layer in layers.values() for p in layer.parameters())
    assert sum(p.numel() for layer in built.values() for p in layer.parameters()) <= 0.6 * total


def test_each_layer_is_served_by_its_own_solver(layers, moments):
    result = compress_layers(
        layers, moments, rank=0.5, allocation="uniform", methods={"b": "svd", "c": "svd-llm"}, consume=False
    )
    assert {plan.name: plan.method for plan in result.layers} == {"a": "fasc", "b": "svd", "c": "svd-llm"}
    for plan in result.layers:
        W = layers[plan.name].weight.detach()
        B, C = get_solver(plan.method)(W, moments.layer(plan.name)).truncate(plan.rank)
        torch.testing.assert_close(
            result.replacements[plan.name].to_weight().detach(), (B @ C).float(), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("method", ["fasc", "svd-llm"])
def test_where_solvers_are_mixed_every_loss_is_in_the_fisher_metric(layers, moments, method):
    result = compress_layers(layers, moments, rank=0.5, method=method, methods={"b": "svd"}, consume=False)
    for plan in result.layers:
        expected = losses_of(layers, moments, plan.name, plan.method)[plan.rank].item()
        assert plan.loss == pytest.approx(0 if plan.layout == "dense" else expected, rel=1e-6)


@pytest.mark.parametrize("method", ["svd", "svd-llm", "weight-svd", "fisher-diag"])
def test_one_solver_can_be_allocated_in_the_fisher_metric(layers, moments, method):
    found = {
        unit: compress_layers(layers, moments, keep=0.6, method=method, consume=False, unit=unit) for unit in UNITS
    }
    total = dict.fromkeys(UNITS, 0.0)
    for unit, result in found.items():
        for plan in result.layers:
            J = losses_of(layers, moments, plan.name, method)[plan.rank].item() if plan.layout != "dense" else 0.0
            total[unit] += J
            if unit == "fisher":
                assert plan.loss == pytest.approx(J, rel=1e-6)
    assert total["fisher"] <= total["own"] * (1 + 1e-9)


def test_the_unit_of_fasc_is_the_fisher_metric(layers, moments):
    own, fisher = (compress_layers(layers, moments, keep=0.6, consume=False, unit=unit) for unit in UNITS)
    assert own.layers == fisher.layers


def test_solvers_whose_statistics_are_missing_are_refused_before_any_work(layers, moments):
    held = moments.nbytes
    with pytest.raises(ValueError, match=r"`abs_x`, E\|x\|, for the solver 'asvd'; but it was not gathered"):
        compress_layers(layers, moments, keep=0.6, method="asvd")
    with pytest.raises(ValueError, match=r"`saliency`.* for the solver 'grad-svd'"):
        compress_layers(layers, moments, keep=0.6, methods={"a": "grad-svd"})
    with pytest.raises(ValueError, match="`unit` to be one of own, fisher but got 'bits'"):
        compress_layers(layers, moments, keep=0.6, unit="bits")
    assert moments.nbytes == held


def test_where_they_are_not_the_losses_are_the_solvers_own(layers, moments):
    result = compress_layers(layers, moments, rank=0.5, method="svd", methods={"a": "svd"}, consume=False)
    for plan in result.layers:
        own = get_solver("svd")(layers[plan.name].weight.detach(), moments.layer(plan.name)).losses
        assert plan.loss == pytest.approx(own[plan.rank].item())


def test_a_mixed_budget_goes_where_the_loss_is_whichever_solver_serves_it(layers, moments):
    """Layer c weighs a million times layer a; in units of their own inputs a cheap solver would not know."""
    mixed = compress_layers(layers, moments, keep=0.6, methods=dict.fromkeys(layers, "svd"), consume=False)
    own = compress_layers(layers, moments, keep=0.6, method="svd", consume=False)
    total = {}
    for label, result in (("mixed", mixed), ("own", own)):
        total[label] = sum(
            0.0 if plan.layout == "dense" else losses_of(layers, moments, plan.name, "svd")[plan.rank].item()
            for plan in result.layers
        )
    assert total["mixed"] < total["own"]
    ranks = {plan.name: plan.rank for plan in mixed.layers}
    assert ranks["c"] > ranks["a"]


def test_moments_that_are_kept_serve_another_run(layers, moments):
    held = moments.nbytes
    first = compress_layers(layers, moments, keep=0.6, consume=False)
    assert moments.nbytes == held
    second = compress_layers(layers, moments, keep=0.6)
    assert moments.nbytes < held
    assert first.layers == second.layers
    for name, built in first.replacements.items():
        for key, value in built.state_dict().items():
            assert torch.equal(value, second.replacements[name].state_dict()[key])


def test_unknown_names_are_refused_before_any_work(layers, moments):
    held = moments.nbytes
    with pytest.raises(ValueError, match="'d' is none of the 3"):
        compress_layers(layers, moments, keep=0.6, methods={"d": "svd"})
    with pytest.raises(ValueError, match="but got 'pca'"):
        compress_layers(layers, moments, keep=0.6, methods={"a": "pca"})
    assert moments.nbytes == held


def test_a_layer_that_no_gradient_reached_stays_dense_and_keeps_its_solvers_name(layers):
    moments = CalibrationMoments(SHAPES)
    for name in ("a", "b"):
        m, n = SHAPES[name]
        moments.add_inputs([name], torch.randn(100, n))
        moments.add_gradients(name, torch.randn(100, m))
    with pytest.warns(UserWarning, match="1 of 3 layers stay dense"):
        result = compress_layers(layers, moments, keep=0.8, method="fasc-plain", methods={"c": "svd"})
    assert (result.layers[2].layout, result.layers[2].method, result.layers[2].loss) == ("dense", "svd", 0.0)
