"""A size that is spent over bits and low ranks in int8: fits, files, refits, recoveries and what is chosen."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny import causal_model, causal_module, made_once, token_loader
from watching import assert_no_hooks

from fasc_lightning import (
    FascCallback,
    apply_plan,
    compress,
    load_compressed,
    match_checkpoint,
    save_compressed,
    to_dense,
)
from fasc_lightning.batches import TokenRows
from fasc_lightning.compression import CompressionReport, build_rounded, fisher_metric, round_layers
from fasc_lightning.compression._loss_correction import ApproximationLosses
from fasc_lightning.compression._rounding import RANK_STEP
from fasc_lightning.compression._stored_weight import LowRankWeight, ResidualWeight
from fasc_lightning.layers import (
    LowRankLinear,
    bytes_in_16_bits,
    compressed_layers,
    dequantized,
    describe_layer,
    quantization_of,
    residual_layer,
    select_layers,
    swap_modules,
)
from fasc_lightning.options import SIZE_GRIDS
from fasc_lightning.statistics import CalibrationMoments, dense

IDS = torch.arange(3, 19)[None]
SIZE = 0.24
WIDE = ("gate_proj", "up_proj")


def of_low_rank(model):
    """Give the wide layers' weights a rank of 8 and a little more."""
    for name, layer in select_layers(model).items():
        if name.endswith(WIDE):
            m, n = layer.weight.shape
            low = torch.randn(m, RANK_STEP) @ torch.randn(RANK_STEP, n) / math.sqrt(RANK_STEP * n)
            layer.weight.data = low + 1e-3 * torch.randn(m, n)
    return model


@made_once
def compressed(**options):
    torch.manual_seed(3)
    model = of_low_rank(causal_model().eval())
    return model, compress(model, token_loader(samples=16), size=SIZE, progress=False, **options)


def wide(model):
    return {name: layer for name, layer in compressed_layers(model).items() if name.endswith(WIDE)}


def test_layers_of_low_rank_get_factors_and_the_budget_holds():
    model, report = compressed()
    rows = {row.name: row for row in report.layers}
    assert wide(model)
    for name, layer in wide(model).items():
        assert isinstance(layer, LowRankLinear)
        assert quantization_of(layer) == "int8"
        assert layer.rank % RANK_STEP == 0
        row = rows[name]
        assert (row.layout, row.rank, row.bits, row.quantize) == ("factors", layer.rank, 8, "int8")
        assert bytes_in_16_bits(layer.state_dict().values()) <= row.nbytes
    assert any(row.layout == "dense" for row in report.layers)
    whole = sum(2 * math.prod(row.shape) for row in report.layers)
    stored = sum(bytes_in_16_bits(layer.state_dict().values()) for layer in compressed_layers(model).values())
    assert stored <= sum(row.nbytes for row in report.layers) <= SIZE * whole
    for text in (str(report), str(CompressionReport.from_dict(report.to_dict()))):
        assert "rank 8 " in text


def test_a_model_with_both_is_saved_loaded_planned_and_made_dense(tmp_path):
    model, report = compressed()
    expected = model(IDS).logits
    save_compressed(model, tmp_path / "both", report=report)
    torch.testing.assert_close(load_compressed(tmp_path / "both").eval()(IDS).logits, expected)
    planned = causal_model().eval()
    apply_plan(planned, report.plan)
    planned.load_state_dict(model.state_dict())
    torch.testing.assert_close(planned(IDS).logits, expected)
    # A residual in place of a matrix of few bits alone, in the same files.
    grid, mixed = {"bits": 3, "group": 16, "symmetric": False}, causal_model().eval()
    name = next(name for name in report.plan if name.endswith("down_proj"))
    apply_plan(mixed, report.plan | {name: {"rank": 8, "layout": "residual", "bias": False, "quantize": grid}})
    save_compressed(mixed, tmp_path / "residual")
    loaded = load_compressed(tmp_path / "residual").eval()
    assert describe_layer(loaded.get_submodule(name))["layout"] == "residual"
    torch.testing.assert_close(loaded(IDS).logits, mixed(IDS).logits)
    few = loaded.bfloat16()
    assert torch.isfinite(few.generate(IDS, max_new_tokens=3, do_sample=False)).all()
    to_dense(planned)
    assert not compressed_layers(planned)
    torch.testing.assert_close(planned(IDS).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"passes": 3}, {"allocation": "fisher"}])
def test_other_ways_to_calibrate_offer_ranks_too(options):
    model, report = compressed(**options)
    assert {row.layout for row in report.layers if row.name.endswith(WIDE)} == {"factors"}
    if "passes" in options:  # which rule out the refit that this size gets otherwise
        expected = compressed(refit=False)[0].state_dict()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.items())


def test_equal_bits_for_all_layers_leave_no_ranks():
    assert {row.layout for row in compressed(allocation="uniform")[1].layers} == {"dense"}


def test_a_refit_and_a_recovery_leave_int8_factors_alone(make_trainer):
    (plain, _), (refitted, report) = compressed(), compressed(refit=True)
    assert report.refit is not None
    for name, layer in wide(plain).items():
        state = refitted.get_submodule(name).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    torch.manual_seed(3)
    module = causal_module()
    of_low_rank(module.model)
    callback = FascCallback(size=SIZE, update_weights=False, recovery="factors")
    make_trainer(callback).fit(module, token_loader(samples=16))
    kept = {name: {k: v.clone() for k, v in x.state_dict().items()} for name, x in wide(module).items()}
    assert kept
    make_trainer(callback).fit(module, token_loader(samples=16))
    for name, layer in wide(module).items():
        assert all(torch.equal(value, kept[name][key]) for key, value in layer.state_dict().items())
    assert_no_hooks(module)


def options_of(W, x, h):
    """The options of one layer from its tokens."""
    layer = torch.nn.Linear(W.shape[1], W.shape[0])
    layer.weight.data = W
    moments = CalibrationMoments({"a": tuple(W.shape)}, needs=["plain", "coupled"])
    moments.add_inputs(["a"], x)
    moments.add_gradients("a", h)
    moments.add_pairs("a", x, h)
    A, G = (dense(moment) for moment in fisher_metric(moments.layer("a")))
    return layer, round_layers({"a": layer}, moments, SIZE_GRIDS, low_rank=True, consume=False), A, G


def test_a_rank_is_offered_where_it_loses_less_than_every_grid_of_as_few_bytes():
    x, h = torch.randn(400, 64), torch.randn(400, 48)
    low = torch.randn(48, RANK_STEP) @ torch.randn(RANK_STEP, 64)
    layer, found, A, G = options_of(low + 0.05 * torch.randn(48, 64), x, h)
    grids, ranks = found.weights["a"], found.ranks["a"]
    assert {type(option) for option in ranks} == {LowRankWeight}
    for option in ranks:
        D = layer.weight.detach().double() - (option.left @ option.right).double()
        assert option.loss == pytest.approx(float(torch.trace(G @ D @ A @ D.T)), rel=1e-3)
        assert all(option.loss < grid.loss for grid in grids if grid.nbytes <= option.nbytes)
    assert [o.nbytes for o in found.options("a")] == sorted(o.nbytes for o in (*grids, *ranks))
    # Of a matrix of full rank every grid loses less.
    others = options_of(torch.linalg.qr(torch.randn(64, 64))[0], x, torch.randn(400, 64))[1].ranks.get("a", [])
    assert LowRankWeight not in {type(option) for option in others}


def skewed_tokens(m, n):
    """Tokens with a few directions that are far larger than the rest, which a residual can serve."""
    return torch.randn(400, n) * torch.logspace(0, -2, n), torch.randn(400, m) * torch.logspace(0, -2, m)


def test_a_residual_is_the_best_of_its_rank_and_takes_its_bytes():
    W, (x, h) = torch.randn(96, 128), skewed_tokens(96, 128)
    layer, found, A, G = options_of(W, x, h)
    residuals = [option for option in found.ranks["a"] if isinstance(option, ResidualWeight)]
    assert residuals
    L, R = torch.linalg.cholesky(G), torch.linalg.cholesky(A)
    for option in residuals:
        E = (W - option.weight.dequantize()).double()
        tail = torch.linalg.svdvals(L.T @ E @ R)[len(option.right) :].square().sum()
        D = E - (option.left @ option.right).double()
        assert float(torch.trace(G @ D @ A @ D.T)) == pytest.approx(float(tail), rel=1e-3)
        assert option.loss == pytest.approx(float(tail), rel=1e-3)
        new = residual_layer(layer, option.weight, (option.left, option.right))
        assert bytes_in_16_bits(t for name, t in new.state_dict().items() if "bias" not in name) == option.nbytes
        # int8 factors add a little to what the residual leaves.
        D = W.double() - new.to_weight().double()
        assert float(torch.trace(G @ D @ A @ D.T)) < 1.1 * option.loss
        y = new(x[:5])
        torch.testing.assert_close(y, x[:5] @ new.to_weight().T + layer.bias, rtol=1e-4, atol=1e-4)


def test_residuals_are_chosen_measured_saved_and_loaded(tmp_path):
    W, (x, h) = torch.randn(96, 128), skewed_tokens(96, 128)
    layer, found, _, _ = options_of(W, x, h)
    option = next(option for option in found.ranks["a"] if isinstance(option, ResidualWeight))
    asked = {}

    def measure(approximations):
        asked.update(approximations)
        return {}

    result = build_rounded({"a": layer}, found, method="fasc", budget=option.nbytes, measure=measure)
    (choice,) = result.layers
    assert (choice.layout, choice.rank, choice.form) == ("residual", len(option.right), option.weight.grid)
    losses = ApproximationLosses({"a": layer}, asked)
    losses("a", x, h, TokenRows("tokens", scale=1.0))
    D = W - option.weight.dequantize() - option.left @ option.right
    assert losses.losses()["a"] == pytest.approx(float(((x @ D.T) * h).sum(1).double().square().mean()), rel=1e-3)
    new, model, again = result.replacements["a"], torch.nn.Sequential(layer), torch.nn.Sequential(copy.deepcopy(layer))
    swap_modules(model, {"0": new})
    spec = describe_layer(new)
    for known in (spec, None):
        other = copy.deepcopy(again)
        if known is None:
            match_checkpoint(other, {"state_dict": model.state_dict()})
        else:
            apply_plan(other, {"0": spec})
        assert describe_layer(other[0]) == spec
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x[:3]), model(x[:3]))
        with dequantized(other):
            assert isinstance(other[0], torch.nn.Linear)
            torch.testing.assert_close(other(x[:3]), model(x[:3]), rtol=1e-4, atol=1e-4)
    to_dense(model)
    torch.testing.assert_close(model(x[:3]), other(x[:3]), rtol=1e-4, atol=1e-4)


def test_a_plan_without_values_gives_the_nearest_matrix_and_its_residual():
    model = torch.nn.Sequential(torch.nn.Linear(64, 48))
    W = model[0].weight.detach().clone()
    spec = {"rank": 8, "layout": "residual", "bias": True, "quantize": {"bits": 2, "group": 64, "symmetric": False}}
    apply_plan(model, {"0": spec})
    assert describe_layer(model[0]) == spec
    E = W - model[0].matrix.dequantize()
    error = torch.linalg.svdvals(E)[8:].square().sum().sqrt()
    assert float((W - model[0].to_weight()).norm()) == pytest.approx(float(error), rel=0.01)


@pytest.mark.parametrize("quantize", ["int8", None])
def test_a_residual_needs_a_grid(quantize):
    spec = {"rank": 8, "layout": "residual", "bias": True} | ({} if quantize is None else {"quantize": quantize})
    with pytest.raises(ValueError, match="residual"):
        apply_plan(torch.nn.Sequential(torch.nn.Linear(64, 48)), {"0": spec})


def test_a_rank_that_is_measured_to_lose_more_gives_way_to_bits():
    low = torch.randn(48, RANK_STEP) @ torch.randn(RANK_STEP, 64)
    layer, found, _, _ = options_of(low + 0.05 * torch.randn(48, 64), torch.randn(400, 64), torch.randn(400, 48))
    rank = found.ranks["a"][0]
    budget = next(grid.nbytes for grid in found.weights["a"] if grid.nbytes > rank.nbytes)

    def chosen(factor):
        asked = []

        def measure(approximations):
            asked.append(approximations["a"])
            return {"a": factor * rank.loss}

        _, again, _, _ = options_of(layer.weight.detach(), *tokens)
        result = build_rounded({"a": layer}, again, method="fasc", budget=budget, measure=measure)
        return result.layers[0].layout, asked[0]

    tokens = torch.randn(400, 64), torch.randn(400, 48)
    assert isinstance(rank, LowRankWeight)
    layout, asked = chosen(1.0)
    assert layout == "factors"
    assert isinstance(asked, tuple)
    assert chosen(1e12)[0] == "dense"
