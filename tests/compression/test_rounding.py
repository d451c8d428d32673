"""Rounding of layers under one budget of bytes: against exhaustive search, and against the bytes really stored."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from expert_cases import PLACE, batches, make
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import causal_model, made_once, token_loader
from torch import nn

from fasc_lightning import compress, plan
from fasc_lightning.compression import build_rounded, byte_budget, check_fits, fisher_metric, round_layers
from fasc_lightning.compression._allocation import StorageOptions, spend, spend_evenly
from fasc_lightning.compression._budget import check_size_fits
from fasc_lightning.layers import (
    INT8_ROWS,
    Grid,
    TargetedLayers,
    compressed_layers,
    is_compressed,
    quantization_of,
    select_layers,
)
from fasc_lightning.options import SIZE_GRIDS, CompressionOptions, Quantize
from fasc_lightning.statistics import CalibrationMoments

SHAPES = {"a": (8, 24), "b": (16, 8), "c": (8, 8)}


def linears(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return {name: nn.Linear(n, m, bias, dtype=dtype) for name, (m, n) in SHAPES.items()}


def gathered(needs=("plain", "coupled"), reached=SHAPES, zero=(), scale=None):
    """Moments of tokens, in which some layers got no gradients, or zeros."""
    torch.manual_seed(1)
    moments = CalibrationMoments(SHAPES, needs=needs)
    for i, (name, (m, n)) in enumerate(SHAPES.items()):
        x, h = torch.randn(100, n) @ torch.randn(n, n), 3**i * torch.randn(100, m) @ torch.randn(m, m)
        if name in reached:
            h = torch.zeros_like(h) if name in zero else h * (scale or {}).get(name, 1.0)
            moments.add_inputs([name], x)
            moments.add_gradients(name, h)
            moments.add_pairs(name, x, h)
    return moments


def rounded(layers=None, moments=None, grids=SIZE_GRIDS, **options):
    return round_layers(layers or linears(), moments or gathered(), grids, consume=False, **options)


def curves(layers, found):
    """Bytes and J of every way to store each layer: its grids, or 16 bits."""
    return {
        name: [(r.nbytes, r.loss) for r in found.weights[name]] + [(2 * layer.weight.numel(), 0.0)]
        for name, layer in layers.items()
    }


def brute_force(ways, budget):
    """The least sum of losses under a budget, over all assignments."""
    best = math.inf
    for chosen in itertools.product(*ways.values()):
        if sum(size for size, _ in chosen) <= budget:
            best = min(best, sum(loss for _, loss in chosen))
    return best


options_of_layer = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=80)
@given(layers=st.lists(options_of_layer, min_size=1, max_size=4), share=st.floats(0, 1))
def test_what_is_spent_is_within_the_budget_and_within_one_step_of_the_best(layers, share):
    options, ways = [], {}
    for i, layer in enumerate(layers):
        costs = np.cumsum([cost for cost, _ in layer])
        losses = np.array(sorted((loss for _, loss in layer), reverse=True))
        options.append(StorageOptions(costs, losses))
        ways[str(i)] = list(zip(costs.tolist(), losses.tolist(), strict=True))
    least, most = (sum(int(o.costs[i]) for o in options) for i in (0, -1))
    budget = least + int(share * (most - least))
    found = spend(options, budget)
    assert sum(int(o.costs[i]) for o, i in zip(options, found, strict=True)) <= budget
    loss = sum(float(o.losses[i]) for o, i in zip(options, found, strict=True))
    # Relaxing one constraint leaves a gap of at most one layer's range of losses (Shapley-Folkman).
    assert loss <= brute_force(ways, budget) + max(float(np.ptp(o.losses)) for o in options) + 1e-9
    even = spend_evenly(options, budget)
    assert sum(int(o.costs[i]) for o, i in zip(options, even, strict=True)) <= budget


@settings(deadline=None, max_examples=60)
@given(
    drops=st.lists(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), min_size=1, max_size=4),
    steps=st.integers(0, 12),
)
def test_convex_curves_of_equal_steps_are_spent_as_well_as_by_exhaustive_search(drops, steps):
    options = []
    for drop in drops:
        falling = np.sort(drop)[::-1]
        options.append(StorageOptions(np.array([10, 15, 20, 25]), np.append(np.cumsum(falling[::-1])[::-1], 0.0)))
    ways = {str(i): list(zip(o.costs.tolist(), o.losses.tolist(), strict=True)) for i, o in enumerate(options)}
    budget = 10 * len(options) + 5 * min(steps, 3 * len(options))
    found = spend(options, budget)
    loss = sum(float(o.losses[i]) for o, i in zip(options, found, strict=True))
    assert loss == pytest.approx(brute_force(ways, budget), abs=1e-9)


@pytest.mark.parametrize("share", [0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0])
def test_layers_are_built_within_the_budget_and_near_the_best_assignment(share):
    layers, found = linears(), rounded()
    ways = curves(layers, found)
    total = sum(2 * layer.weight.numel() for layer in layers.values())
    budget = max(int(share * total), sum(sizes[0][0] for sizes in ways.values()))
    result = build_rounded(layers, found, method="fasc", budget=budget)
    loss = sum(choice.loss for choice in result.layers)
    spent = sum(
        2 * m * n if choice.form is None else choice.form.nbytes(m, n)
        for choice, (m, n) in zip(result.layers, SHAPES.values(), strict=True)
    )
    assert spent <= budget
    best = brute_force(ways, budget)
    assert best - 1e-12 <= loss <= best + max(sizes[0][1] for sizes in ways.values())
    for choice in result.layers:
        others = [
            j for size, j in ways[choice.name] if size <= budget - spent + dict(bytes_of(choice, layers))[choice.name]
        ]
        assert choice.loss <= min(others) * (1 + 1e-9)  # no layer alone can do better with what is left
        layer = result.replacements.get(choice.name)
        assert choice.form == (None if layer is None else form_of(layer))
        assert choice.layout == "dense"


def bytes_of(choice, layers):
    m, n = SHAPES[choice.name]
    yield choice.name, 2 * m * n if choice.form is None else choice.form.nbytes(m, n)


def form_of(layer):
    found = quantization_of(layer)
    return INT8_ROWS if found == "int8" else found


def test_one_grid_needs_no_budget_and_a_budget_that_is_too_small_is_refused():
    layers = linears()
    result = build_rounded(layers, rounded(grids=(Grid(3, 8),)), method="fasc")
    assert {choice.form for choice in result.layers} == {Grid(3, 8)}
    least = sum(Grid(2).nbytes(m, n) for m, n in SHAPES.values())
    build_rounded(layers, rounded(), method="fasc", budget=least)
    with pytest.raises(ValueError, match=f"a size of at least {least:,} bytes for the targeted layers but got"):
        build_rounded(layers, rounded(), method="fasc", budget=least - 1)


def test_uniform_gives_all_layers_the_most_bits_that_fit():
    layers = linears()
    sizes = {grid.bits: sum(grid.nbytes(m, n) for m, n in SHAPES.values()) for grid in SIZE_GRIDS}
    sizes[16] = sum(2 * layer.weight.numel() for layer in layers.values())
    assert list(sizes.values()) == sorted(sizes.values())
    for i, (bits, size) in enumerate(sizes.items()):
        budgets = [size] if i == len(sizes) - 1 else [size, list(sizes.values())[i + 1] - 1]
        for budget in budgets if budgets[-1] >= size else []:
            result = build_rounded(layers, rounded(), method="fasc", budget=budget, allocation="uniform")
            assert {16 if choice.form is None else choice.form.bits for choice in result.layers} == {bits}


@pytest.mark.parametrize(("reached", "zero"), [(("a", "b"), ()), (tuple(SHAPES), ("c",))])
def test_layers_without_gradients_are_rounded_to_the_nearest_and_warned_of(reached, zero):
    from fasc_lightning.rounding import to_nearest

    layers, moments = linears(), gathered(reached=reached, zero=zero)
    found = rounded(layers, moments)
    assert [math.isnan(result.loss) for result in found.weights["c"]] == [True] * 4
    for result in found.weights["c"]:
        assert torch.equal(result.weight.codes, to_nearest(layers["c"].weight.detach(), result.weight.grid).codes)
    total = sum(2 * layer.weight.numel() for layer in layers.values())
    with pytest.warns(
        UserWarning, match=r"1 of 3 layers are rounded to the nearest numbers because no gradient .*: c\."
    ):
        result = build_rounded(layers, found, method="fasc", budget=int(0.46 * total))
    assert result.layers[2].loss == 0
    # Nothing tells that it needs fewer bits than all layers could have.
    assert result.layers[2].form == Grid(4)
    # With room for all in 16 bits, it stays dense like the others, and there is nothing to warn of.
    assert build_rounded(layers, rounded(layers, moments), method="fasc", budget=total).replacements == {}


def test_no_gradient_at_all_is_an_error():
    for moments, message in (
        (gathered(reached=()), "No gradient reached any of the 3"),
        (gathered(zero=tuple(SHAPES)), "Every gradient that reached the 3 .* was zero"),
    ):
        with pytest.raises(RuntimeError, match=message):
            build_rounded(linears(), rounded(moments=moments), method="fasc", budget=10_000)


@pytest.mark.parametrize("needs", [("plain",), ("plain", "coupled")])
def test_losses_are_traces_by_brute_force_and_never_above_those_of_the_nearest_numbers(needs):
    layers, moments = linears(), gathered(needs)
    found, nearest = rounded(layers, moments), rounded(layers, moments, calibrated=False)
    for name, layer in layers.items():
        A, G = (side.double() for side in fisher_metric(moments.layer(name)))
        for results in (found, nearest):
            for result in results.weights[name]:
                D = layer.weight.detach().double() - result.weight.dequantize().double()
                assert result.loss == pytest.approx(float(torch.trace(G @ D @ A @ D.T)), rel=1e-5)
        for calibrated, plain in zip(found.weights[name], nearest.weights[name], strict=True):
            assert calibrated.loss <= plain.loss
        assert sum(r.loss for r in found.weights[name]) < sum(r.loss for r in nearest.weights[name])


def test_moments_are_released_or_kept_as_asked():
    moments = gathered()
    held = moments.nbytes
    first = round_layers(linears(), moments, (Grid(4),), consume=False)
    assert moments.nbytes == held
    second = round_layers(linears(), moments, (Grid(4),))
    assert moments.nbytes < held
    for name in SHAPES:
        assert torch.equal(first.weights[name][0].weight.codes, second.weights[name][0].weight.codes)


def test_shares_of_the_layers_are_joined_to_all_of_them():
    layers, moments = linears(), gathered()
    parts = [rounded({name: layers[name]}, moments) for name in layers]
    joined, whole = parts[0].join(parts[1]).join(parts[2]), rounded(layers, moments)
    assert joined.tokens == whole.tokens
    assert curves(layers, joined) == curves(layers, whole)


def test_the_measured_loss_moves_the_budget():
    """Layers that are measured to lose more than was predicted get more bits, those that lose less fewer."""
    layers = linears()
    budget = int(0.5 * sum(2 * layer.weight.numel() for layer in layers.values()))
    asked = []

    def estimator(factors):
        def measure(approximations):
            asked.append(approximations)
            predicted = {name: r.loss for name in approximations for r in rounded().weights[name]
                         if torch.equal(r.weight.codes, approximations[name].codes)}  # fmt: skip
            return {name: factors.get(name, 1.0) * predicted[name] for name in approximations}

        return measure

    def bits(measure):
        result = build_rounded(layers, rounded(), method="fasc", budget=budget, measure=measure)
        return {c.name: 16 if c.form is None else c.form.bits for c in result.layers}, result

    plain, _ = bits(None)
    same, _ = bits(estimator({}))
    assert same == plain
    assert all(hasattr(weight, "grid") for weight in asked[0].values())
    name = min(plain, key=plain.get)
    raised, result = bits(estimator({name: 1e4}))
    assert raised[name] > plain[name]
    assert min(raised.values()) < min(value for other, value in plain.items() if other != name)
    # Reports state the predicted loss, in the unit of the solver.
    losses = [r.loss for r in rounded().weights[name]] + [0.0]
    assert next(c.loss for c in result.layers if c.name == name) in losses
    assert bits(lambda approximations: {})[0] == plain  # a module whose loss cannot be measured
    build_rounded(layers, rounded(grids=(Grid(4),)), method="fasc", measure=estimator({}))
    assert len(asked) == 2  # one grid leaves nothing to choose


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_the_whole_model_leave_the_rest_to_the_layers(tied):
    model = causal_model(tie_word_embeddings=tied)
    layers = select_layers(model)
    targeted = sum(2 * layer.weight.numel() for layer in layers.values())
    everything = {id(t): 2 * t.numel() for t in (*model.parameters(), *model.buffers())}
    rest = sum(everything.values()) - targeted
    assert rest >= 2 * (1 if tied else 2) * 64 * 32
    assert byte_budget(model, layers, "100KB") == 100_000 - rest
    assert byte_budget(model.to(torch.bfloat16), layers, "100KB") == 100_000 - rest  # whatever the model's type
    assert byte_budget(model, layers, 0.27) == math.floor(0.27 * targeted)
    assert byte_budget(model, layers, 1.0) == targeted


@pytest.mark.parametrize("tied", [True, False])
def test_a_size_that_holds_no_layer_is_refused_with_the_least_that_works(tied):
    model = causal_model(tie_word_embeddings=tied)
    layers = select_layers(model)
    with pytest.raises(ValueError, match=r"at least ([\d.]+) .* bytes in 16 bits\) but got 0\.05") as refused:
        check_size_fits(model, layers, 0.05, SIZE_GRIDS)
    least = float(str(refused.value).split("at least ")[1].split(" ")[0])
    check_size_fits(model, layers, least, SIZE_GRIDS)
    with pytest.raises(ValueError, match="at least"):
        check_size_fits(model, layers, least - 2e-4, SIZE_GRIDS)
    with pytest.raises(ValueError, match="KB are not of the targeted layers, but got '1KB'") as refused:
        check_size_fits(model, layers, "1KB", SIZE_GRIDS)
    kilobytes = int(str(refused.value).split("at least ")[1].split(" KB")[0])
    check_size_fits(model, layers, f"{kilobytes}KB", SIZE_GRIDS)
    with pytest.raises(ValueError, match="at least"):
        check_size_fits(model, layers, f"{kilobytes - 1}KB", SIZE_GRIDS)
    for size in (0.05, "1KB"):
        with pytest.raises(ValueError, match="Expected a `size` of at least"):
            check_fits(model, TargetedLayers.of(layers), CompressionOptions(size=size))
        with pytest.raises(ValueError, match="Expected a `size` of at least"):
            compress(model, [], size=size, progress=False)
    assert not is_compressed(model)


@settings(deadline=None, max_examples=200)
@given(m=st.integers(1, 500), n=st.integers(8, 500))
def test_the_least_fraction_that_a_message_names_is_enough(m, n):
    layers = {"one": nn.Linear(n, m, device="meta")}
    with pytest.raises(ValueError, match="at least") as refused:
        check_size_fits(nn.Module(), layers, 1e-6, SIZE_GRIDS)
    least = float(str(refused.value).split("at least ")[1].split(" ")[0])
    check_size_fits(nn.Module(), layers, min(least, 1.0), SIZE_GRIDS)


@made_once
def compressed(family="llama", dtype=torch.float32, samples=8, **options):
    model = causal_model(family, **options.pop("model", {})).to(dtype)
    return model, compress(model, token_loader(samples=samples), progress=False, **options)


def stored(layer):
    """Bytes of a layer's tensors, without its bias."""
    bias = layer.bias
    tensors = [t for t in layer.state_dict().values() if bias is None or t.shape != bias.shape or not t.equal(bias)]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    "options", [{"size": 0.4}, {"quantize": "int8"}, {"quantize": "int3"}, {"quantize": Quantize(4, 8, symmetric=True)}]
)
def test_reports_plans_and_stored_tensors_agree_on_bytes(family, options):
    model, report = compressed(family, **options)
    dense = causal_model(family).to(torch.bfloat16)
    layers = dict(model.to(torch.bfloat16).named_modules())
    for row in report.layers:
        layer = layers[row.name]
        if row.bits is None:
            assert not is_compressed(layer)
            assert row.nbytes == 2 * row.shape[0] * row.shape[1]
        else:
            assert row.nbytes == stored(layer)
    rest = {id(t): t for t in (*dense.parameters(), *dense.buffers())}.values()
    targeted = sum(2 * row.shape[0] * row.shape[1] for row in report.layers)
    whole = sum(2 * t.numel() for t in rest) - targeted + sum(row.nbytes for row in report.layers)
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    assert whole == sum(t.numel() * t.element_size() for t in held)
    if "size" in options:
        assert sum(row.nbytes for row in report.layers) <= 0.4 * targeted
    else:
        forecast = plan(dense, memory="1GB", probed=False, **options)
        assert forecast.whole["compressed"].bytes == whole
        assert {layer.bits for layer in forecast.layers} == {row.bits for row in report.layers}
        assert report.whole["compressed"].parameters == report.whole["dense"].parameters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_layers_of_half_precision_are_rounded_in_their_type(dtype, quantize):
    model, report = compressed(dtype=dtype, quantize=quantize)
    dense = dict(causal_model().to(dtype).named_modules())
    for name, layer in compressed_layers(model).items():
        assert layer.weight.dtype == dtype
        W = dense[name].weight.float()
        assert (layer.to_weight().float() - W).norm() < (0.02 if quantize == "int8" else 0.2) * W.norm()
    assert model(torch.arange(3, 9)[None]).logits.dtype == dtype
    assert all(row.loss > 0 for row in report.layers if "layers.0" in row.name and "v_proj" in row.name)


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2"])
def test_conv1d_and_biases_are_kept(family):
    model, _ = compressed(family, quantize="int8")
    dense = dict(causal_model(family).named_modules())
    for name, layer in compressed_layers(model).items():
        W = dense[name].weight.T if family == "gpt2" else dense[name].weight
        assert layer.from_conv1d is (family == "gpt2")
        assert (layer.bias is None) is (dense[name].bias is None)
        assert layer.bias is None or torch.equal(layer.bias, dense[name].bias)
        torch.testing.assert_close(layer.to_weight(), W, rtol=0, atol=float(W.detach().abs().max()) / 40)
        assert layer.bias is None or layer.bias.requires_grad
    ids = torch.arange(3, 19)[None]
    torch.testing.assert_close(model.eval()(ids).logits, dense[""].eval()(ids).logits, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("family", ["mixtral", "qwen3"])
def test_experts_get_bits_of_their_own_and_none_without_tokens_fewer_than_all_could_have(family):
    model = make(family)
    data = batches()
    with torch.no_grad():
        gate = model.model.layers[0].mlp.gate
        gate.weight[0] = -100 * gate.weight[1:].abs().sum(0)  # an expert that hardly any token chooses
    report = compress(model, data, size=0.36, progress=False)
    rows = {row.name: row for row in report.layers}
    assert {name.rsplit(".", 1)[1] for name in rows if name.startswith(PLACE)} == {"w_gate", "w_up", "w_down"}
    assert sum(row.nbytes for row in rows.values()) <= 0.36 * sum(
        2 * m * n for m, n in (r.shape for r in rows.values())
    )
    assert torch.isfinite(model(**data[0]).logits).all()
    assert {quantization_of(layer) is not None for layer in compressed_layers(model).values()} == {True}
    assert "stay dense" not in str(report)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_and_the_model_is_unchanged(value):
    model = causal_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((ValueError, FloatingPointError)):
        compress(model, token_loader(), size=0.4, progress=False)
    assert not is_compressed(model)
    assert all(torch.equal(before[name].nan_to_num(7), t.nan_to_num(7)) for name, t in model.state_dict().items())
    layers = linears()
    with torch.no_grad():
        layers["b"].weight[0, 0] = value
    with pytest.raises(ValueError, match=r"Expected finite weights to round but a \(16, 8\) matrix holds NaN"):
        rounded(layers)
