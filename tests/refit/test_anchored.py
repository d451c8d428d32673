from __future__ import annotations

import copy
import weakref

import pytest
import torch
from refit_cases import Stack, compressed_case, interrupted_loss, stack_loss
from tiny import FAMILIES, causal_model
from torch import nn

from fasc_lightning.layers import LowRankLinear, PivotedLinear, compressed_layers, make_lowrank, swap_modules
from fasc_lightning.refit import RefitError, RefitOptions, causal_loss, refit
from fasc_lightning.refit import _anchored as refit_module
from fasc_lightning.refit._checks import check_refit
from fasc_lightning.refit._drift import DriftRows, TargetMoments
from fasc_lightning.refit._shares import Change, shares
from fasc_lightning.refit._solve import Factors
from fasc_lightning.solvers import shrink, two_sided

#: Without shrinkage nor choice: what the closed forms alone would do.
PLAIN = RefitOptions(holdout=4, anchors=(0.0,), target="layer", weights="equal")


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def accepting(monkeypatch):
    """Let the last check pass, for tests of what comes before it."""
    monkeypatch.setattr(Change, "is_gain", True)


def held_loss(case, model):
    held = case.batches[1::4]  # with holdout=4, every fourth one from the fourth on chooses
    with torch.no_grad():
        return sum(causal_loss(model, batch).item() for batch in held) / len(held)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_lose_less_on_held_out_tokens_with_the_same_parameters(family):
    case = compressed_case(family)
    before = held_loss(case, case.model)
    layers = compressed_layers(case.model)
    kinds = {name: (type(layer), layer.rank, layer.parameter_count, id(layer)) for name, layer in layers.items()}
    parameters = sum(p.numel() for p in case.model.parameters())
    report = refit(*case.refit_arguments(), options=RefitOptions(holdout=4, factors="all"))
    assert report.loss_before == pytest.approx(before, rel=1e-5)
    after = report.loss_before if report.reverted else report.loss_after
    assert after == pytest.approx(held_loss(case, case.model), rel=1e-5)
    assert after <= report.loss_before
    assert report.skipped == []
    assert len(report.layers) == len(case.dense)
    assert sum(p.numel() for p in case.model.parameters()) == parameters
    after = compressed_layers(case.model)
    assert kinds == {name: (type(layer), layer.rank, layer.parameter_count, id(layer)) for name, layer in after.items()}
    assert not any(p.requires_grad for p in case.model.parameters())
    assert (report.fit_batches, report.held_batches) == (9, 3)


def test_it_helps_where_drift_is_large(accepting):
    case = compressed_case(rank=0.1)
    report = refit(*case.refit_arguments(), options=RefitOptions(holdout=4, factors="all"))
    assert report.accepted > 0
    assert report.loss_after < report.loss_before
    assert str(report).startswith(f"Refit: {report.accepted} of {len(case.dense)} layers, held-out loss")


LAST = {"llama": ["mlp.down_proj"], "gpt2": ["mlp.c_proj"], "gpt_neox": ["mlp.dense_4h_to_h"]}


@pytest.mark.parametrize("family", LAST)
def test_of_low_rank_the_last_layer_of_each_block_is_refitted(family, accepting):
    case = compressed_case(family)
    before = state(case.model)
    report = refit(*case.refit_arguments(), options=RefitOptions(holdout=4))
    assert report.skipped == []
    assert [layer.name.split(".", 3)[-1] for layer in report.layers] == LAST[family] * 2
    changed = {name for name, value in case.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(any(name.startswith(layer.name) for layer in report.layers) for name in changed)


def linear_stack():
    """Two residual linear blocks of rank 2 out of 6, in float64, and Gaussian batches with the dense outputs."""
    model = Stack().double()
    batches = [{"x": torch.randn(8, 5, 6).double()} for _ in range(8)]
    with torch.no_grad():
        for batch in batches:
            batch["y"] = model(batch["x"])
    gradients, replacements = {}, {}
    for i, block in enumerate(model.blocks):
        root = torch.randn(6, 6).double()
        gradients[f"blocks.{i}.linear"] = root.T @ root
        B, C = two_sided(block.linear.weight.detach(), torch.eye(6), root.T @ root).truncate(2)
        replacements[f"blocks.{i}.linear"] = make_lowrank(B, C, layout="factors")
    return model, swap_modules(model, replacements), gradients, batches


def test_each_block_is_fitted_to_what_the_refitted_ones_before_it_give(monkeypatch):
    """Two blocks by hand: least squares on all batches but those that check, with the drift of a refitted block 0."""
    monkeypatch.setattr(refit_module, "SHRINK_A", 0.0)
    monkeypatch.setattr(refit_module, "SHRINK_COUPLED_G", 0.0)
    monkeypatch.setattr(TargetMoments, "error", lambda *arguments: float("inf"))  # every candidate is better
    monkeypatch.setattr(Factors, "error", lambda *arguments: 0.0)
    model, dense, gradients, batches = linear_stack()
    compressed = compressed_layers(model)
    fit, choose, _ = shares(8, 4)
    x = torch.cat([batches[i]["x"].reshape(-1, 6) for i in fit + choose])  # those that choose too, once they have
    x_hat = x
    expected = {}
    for name, layer in dense.items():
        W = layer.weight.detach()
        T = torch.linalg.lstsq(x_hat, x @ W.T).solution.T
        B, C = two_sided(T, x_hat.T @ x_hat / len(x), gradients[name]).truncate(2)
        expected[name] = B @ C
        x, x_hat = x + x @ W.T, x_hat + x_hat @ (B @ C).T
    losses = iter([[1.0, 1.0], [0.5, 0.5]])
    monkeypatch.setattr(refit_module, "batch_losses", lambda *arguments: next(losses))
    report = refit(model, dense, gradients, batches, loss=stack_loss, options=PLAIN)
    assert [layer.name for layer in report.layers] == ["blocks.0.linear", "blocks.1.linear"]
    assert report.accepted == 2
    for name, layer in compressed.items():
        torch.testing.assert_close(layer.to_weight(), expected[name])


def test_layers_that_join_the_stream_are_fitted_to_its_error(monkeypatch):
    monkeypatch.setattr(refit_module, "SHRINK_A", 0.0)
    monkeypatch.setattr(refit_module, "SHRINK_COUPLED_G", 0.0)
    model, dense, gradients, batches = linear_stack()
    read = [*batches[:3], batches[0]]  # what is fitted to chooses, too
    batches = [read[0], batches[4], read[1], batches[5], read[2], read[3]]
    assert shares(6, 6) == ([0, 2, 4], [5], [1, 3])
    options = RefitOptions(holdout=6, anchors=(0.0,), target="stream", weights="equal")
    x = torch.cat([batch["x"].reshape(-1, 6) for batch in read])
    exact = x + x @ dense["blocks.0.linear"].weight.detach().T
    exact = exact + exact @ dense["blocks.1.linear"].weight.detach().T
    refit(model, dense, gradients, batches, loss=stack_loss, options=options)
    layers = compressed_layers(model)
    hidden = x + x @ layers["blocks.0.linear"].to_weight().detach().T
    T = torch.linalg.lstsq(hidden, exact - hidden).solution.T  # the residual path's error is part of the target
    B, C = two_sided(T, hidden.T @ hidden, gradients["blocks.1.linear"]).truncate(2)
    torch.testing.assert_close(layers["blocks.1.linear"].to_weight(), B @ C)


def test_the_anchor_is_the_dense_layer_in_the_calibrations_moments(accepting):
    case = compressed_case()
    inputs = {name: torch.eye(layer.in_features) for name, layer in case.dense.items()}
    weights = {}
    for towards in ("dense", "factors"):
        options = RefitOptions(holdout=4, anchors=(1e9,), towards=towards, weights="equal", factors="all")
        again = compressed_case()
        refit(*again.refit_arguments(), inputs=inputs, options=options)
        weights[towards] = {name: layer.to_weight() for name, layer in compressed_layers(again.model).items()}
    changed = 0
    for name, before in compressed_layers(case.model).items():
        torch.testing.assert_close(weights["factors"][name], before.to_weight(), rtol=1e-3, atol=1e-4)
        G = shrink(case.gradients[name].double(), refit_module.SHRINK_COUPLED_G)
        B, C = two_sided(case.dense[name].weight.detach(), torch.eye(before.in_features).double(), G).truncate(
            before.rank
        )
        if not torch.equal(weights["dense"][name], before.to_weight()):
            torch.testing.assert_close(weights["dense"][name], B @ C, rtol=1e-3, atol=1e-4)
            changed += 1
    assert changed > 0


def test_what_does_not_carry_over_is_not_accepted():
    """Batches that are fitted to hold noise, those that are held out the text that the model was compressed on."""
    case = compressed_case()
    noise = [{"input_ids": torch.full((2, 24), 3 + i)} for i in range(12)]
    batches = [batch if i % 4 == 3 else noise[i] for i, batch in enumerate(case.batches)]
    before = state(case.model)
    plain = RefitOptions(holdout=4, anchors=(0.0,))
    report = refit(case.model, case.dense, case.gradients, batches, options=plain)
    assert report.accepted == 0
    assert same(before, state(case.model))
    assert report.loss_after == report.loss_before


@pytest.mark.parametrize("after", [3.0, float("nan")])
def test_the_last_check_puts_everything_back_and_says_so(monkeypatch, after):
    case = compressed_case()
    before = state(case.model)
    losses = iter([[2.0] * 3, [after] * 3])
    monkeypatch.setattr(refit_module, "batch_losses", lambda *arguments: next(losses))
    report = refit(*case.refit_arguments(), options=RefitOptions(holdout=4))
    assert report.reverted
    assert report.accepted == 0
    assert same(before, state(case.model))
    assert f"put back, since the held-out loss would have gone from 2.0000 to {after:.4f}" in str(report)


def between_blocks(names, description):
    """Progress over the blocks that is interrupted after the first one."""
    yield names[0]
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "interrupted",
    [*({"loss": interrupted_loss(calls)} for calls in (1, 8, 12, 14)), {"progress": between_blocks}],
    ids=["check", "capture", "replay", "last check", "between blocks"],
)
def test_an_interrupted_refit_leaves_the_factors_as_they_were(interrupted):
    case = compressed_case()
    before, modules = state(case.model), list(case.model.modules())
    case.model.train()
    with pytest.raises(KeyboardInterrupt):
        refit(*case.refit_arguments(), options=RefitOptions(holdout=4), **interrupted)
    assert same(before, state(case.model))
    assert modules == list(case.model.modules())
    assert case.model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())


def test_moments_are_those_of_one_group_at_a_time(monkeypatch):
    alive: weakref.WeakSet[DriftRows] = weakref.WeakSet()
    most = []

    class Counted(DriftRows):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(refit_module, "DriftRows", Counted)
    refit(*compressed_case().refit_arguments(), options=RefitOptions(factors="all"))
    assert max(most) <= 2  # to fit to, and to choose by
    assert len(most) >= 8


@pytest.mark.parametrize("layout", ["pivot", "factors"])
def test_layouts_stay(layout, accepting):
    case = compressed_case(layout=layout)
    kind = PivotedLinear if layout == "pivot" else LowRankLinear
    shapes = {name: value.shape for name, value in case.model.state_dict().items()}
    report = refit(*case.refit_arguments(), options=RefitOptions(holdout=4))
    assert report.accepted
    assert {type(layer) for layer in compressed_layers(case.model).values()} == {kind}
    assert shapes == {name: value.shape for name, value in case.model.state_dict().items()}


def test_half_precision_models_stay_so(accepting):
    case = compressed_case(rank=0.3)
    case.model.bfloat16()
    for layer in case.dense.values():
        layer.bfloat16()
    report = refit(*case.refit_arguments(), options=RefitOptions(holdout=4))
    assert report.accepted
    assert report.loss_after <= report.loss_before
    assert {p.dtype for p in case.model.parameters()} == {torch.bfloat16}


def test_padding_does_not_count(accepting):
    case = compressed_case()
    padded = []
    for batch in case.batches:
        ids = nn.functional.pad(batch["input_ids"], (0, 5), value=7)
        mask = nn.functional.pad(batch["attention_mask"], (0, 5))
        padded.append({"input_ids": ids, "attention_mask": mask})
    other = copy.deepcopy(case)
    options = RefitOptions(holdout=4, anchors=(1.0,))
    first = refit(*case.refit_arguments(), options=options)
    second = refit(other.model, other.dense, other.gradients, padded, options=options)
    assert first.accepted == second.accepted > 0
    for a, b in zip(first.layers, second.layers, strict=True):
        assert (a.name, a.accepted) == (b.name, b.accepted)
        assert a.after == pytest.approx(b.after, rel=1e-2)
    assert second.loss_after == pytest.approx(first.loss_after, rel=1e-3)


def test_biases_move_with_the_factors_unless_told_not_to():
    case = compressed_case("gpt2")
    other = copy.deepcopy(case)
    biases = {name: layer.bias.clone() for name, layer in compressed_layers(case.model).items()}
    report = refit(*case.refit_arguments(), options=RefitOptions(holdout=4))
    moved = {name for name, layer in compressed_layers(case.model).items() if not torch.equal(layer.bias, biases[name])}
    assert moved == {layer.name for layer in report.layers if layer.accepted}
    assert moved
    refit(*other.refit_arguments(), options=RefitOptions(holdout=4, bias=False))
    assert all(torch.equal(layer.bias, biases[name]) for name, layer in compressed_layers(other.model).items())


def test_layers_that_are_not_reached_are_left_alone_and_named():
    case = compressed_case()
    block = case.model.model.layers[1]
    spare = make_lowrank(torch.randn(8, 2), torch.randn(2, 8))
    block.spare = spare.requires_grad_(False)
    case.dense["model.layers.1.spare"] = nn.Linear(8, 8, bias=False)
    case.gradients["model.layers.1.spare"] = torch.eye(8)
    before = state(spare)
    report = refit(*case.refit_arguments(), options=RefitOptions(holdout=4))
    assert report.skipped == ["model.layers.1.spare"]
    assert same(before, state(spare))


def test_what_cannot_be_refitted_is_refused_before_anything_changes():
    case = compressed_case()
    before = state(case.model)
    name = next(iter(case.dense))
    few = [*case.refit_arguments()[:3], case.batches[:3]]
    with pytest.raises(ValueError, match="at least 4 batches, some of which are held out, but got 3"):
        refit(*few)
    with pytest.raises(ValueError, match="it is missing: call refit after the swap"):
        refit(case.model, {"nothing": nn.Linear(2, 2)}, {}, case.batches)
    with pytest.raises(ValueError, match="it is Linear: call refit after the swap"):
        refit(case.model, {"lm_head": nn.Linear(2, 2)}, {}, case.batches)
    with pytest.raises(ValueError, match=r"Expected G of shape .* but got None"):
        refit(case.model, case.dense, {k: v for k, v in case.gradients.items() if k != name}, case.batches)
    with pytest.raises(ValueError, match="`dense` is empty"):
        refit(case.model, {}, {}, case.batches)
    assert same(before, state(case.model))


def test_a_layer_in_two_places_is_refused():
    model = causal_model()
    model.model.layers[1].self_attn.o_proj = model.model.layers[0].self_attn.o_proj
    with pytest.raises(RefitError, match="are one: new factors for one place would change the other"):
        check_refit(model, ["model.layers.0.self_attn.o_proj"])
    check_refit(model, ["model.layers.0.self_attn.q_proj"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": ()}, "`anchors` to be finite numbers"),
        ({"anchors": (-1.0,)}, "`anchors` to be finite numbers"),
        ({"target": "model"}, 'to be "layer" or "stream" but got \'model\''),
        ({"holdout": 2}, "`holdout` of at least 3"),
        ({"factors": "first"}, 'to be "last" or "all" but got \'first\''),
        ({"weights": "loss"}, 'to be "gradient" or "equal" but got \'loss\''),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RefitOptions(**options)
