"""A calibration in two stages: the moments of both, against sums by hand, and what is left behind."""

from __future__ import annotations

import copy

import pytest
import scipy.linalg
import torch
from expert_cases import batches, make
from tiny import causal_model, causal_module, feature_loader, mlp, token_loader
from torch import nn
from watching import assert_untouched, state

from fasc_lightning import FascCallback, compress, plan
from fasc_lightning.batches import NoLossError
from fasc_lightning.calibration import _replay as replay
from fasc_lightning.layers import compressed_layers
from fasc_lightning.solvers import SHRINK_A, SHRINK_COUPLED_G

TWO = {"stages": 2, "allocation": "fisher", "refit": False, "progress": False}


def pairs_by_hand(module, names):
    """The inputs (tokens, n) of each layer, and the gradients (tokens, m) of the summed loss at its outputs."""
    found = {name: ([], []) for name in names}
    module = copy.deepcopy(module).eval()
    named = {module.get_submodule(name): name for name in names}
    for layer in module.modules():  # out of place, so that the outputs stay as the layers gave them
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    for x, y in feature_loader():
        seen = {}

        def see(layer, args, out, seen=seen):
            seen[named[layer]] = args[0].detach().clone(), out

        handles = [module.get_submodule(name).register_forward_hook(see) for name in names]
        loss = nn.functional.cross_entropy(module(x), y, reduction="sum")
        gradients = torch.autograd.grad(loss, [seen[name][1] for name in names])
        for name, h in zip(names, gradients, strict=True):
            found[name][0].append(seen[name][0].double())
            found[name][1].append(h.double())
        for handle in handles:
            handle.remove()
    return {name: (torch.cat(x), torch.cat(h)) for name, (x, h) in found.items()}


def by_hand(W, pairs, k):
    """W' of rank k from the coupled moments of pairs of inputs and gradients, by SciPy."""
    x, h = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    p, q = h.norm(dim=1), x.norm(dim=1)
    A, G = (x.T * p) @ x / p.sum(), (h.T * q) @ h / q.sum()
    A = (1 - SHRINK_A) * A + SHRINK_A * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype)
    G = (1 - SHRINK_COUPLED_G) * G + SHRINK_COUPLED_G * G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype)
    a, g = (torch.from_numpy(scipy.linalg.sqrtm(S.numpy()).real) for S in (A, G))
    U, S, V = torch.linalg.svd(g @ W.double() @ a)
    best = (U[:, :k] * S[:k]) @ V[:k]
    return torch.linalg.solve(g, torch.linalg.solve(a, best, left=False))


def test_factors_come_from_the_moments_of_both_models():
    dense = mlp()
    halfway, module = copy.deepcopy(dense), copy.deepcopy(dense)
    compress(halfway, feature_loader(), keep=0.75, **{**TWO, "stages": 1})
    report = compress(module, feature_loader(), keep=0.5, **TWO)
    layers = compressed_layers(module)
    names = [layer.name for layer in report.layers]
    both = [pairs_by_hand(dense, names), pairs_by_hand(halfway, names)]
    assert len(layers) >= 2
    for layer in report.layers:
        if layer.name in layers:
            W = dense.get_submodule(layer.name).weight.detach()
            expected = by_hand(W, [pairs[layer.name] for pairs in both], layer.rank)
            assert torch.allclose(layers[layer.name].to_weight().double(), expected, rtol=1e-3, atol=1e-4)
            assert layer.tokens == 2 * 32


def test_a_second_stage_changes_the_model_and_the_same_one_each_time():
    states = []
    for stages in (1, 2, 2):
        model = causal_model()
        compress(model, token_loader(samples=16), keep=0.6, **{**TWO, "stages": stages})
        states.append(model.state_dict())
    once, twice, again = states
    assert any(not torch.equal(once[name], twice[name]) for name in once.keys() & twice.keys())
    assert all(torch.equal(twice[name], again[name]) for name in twice)


def test_a_refit_and_measured_losses_follow(make_trainer):
    module = causal_module()
    callback = FascCallback(keep=0.6, stages=2, refit=True, update_weights=False)
    make_trainer(callback).fit(module, token_loader(samples=16))
    assert callback.report.refit is not None
    assert callback.report.options["stages"] == 2
    assert callback.report.kept <= 0.6


def test_weights_may_train_in_the_first_stage(make_trainer):
    module = causal_module()
    callback = FascCallback(rank=0.5, stages=2, refit=False)
    make_trainer(callback).fit(module, token_loader(samples=16))
    assert compressed_layers(module)


def test_the_model_is_dense_again_when_the_second_stage_fails(make_trainer, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(replay, "run_batches", fail)
    module = causal_module()
    before = state(module)
    callback = FascCallback(keep=0.6, stages=2, update_weights=False)
    with pytest.raises(RuntimeError, match="out of memory"):
        make_trainer(callback).fit(module, token_loader(samples=16))
    assert_untouched(module, before)


def test_a_module_that_optimises_by_hand_has_no_second_stage(make_trainer):
    module = causal_module()
    module.automatic_optimization = False
    module.training_step = lambda batch, batch_idx: module.manual_backward(module.model(**batch).loss)
    callback = FascCallback(keep=0.6, stages=2, refit=False, update_weights=False, loss_terms="mean")
    with pytest.raises(NoLossError, match="calibrate in one stage"):
        make_trainer(callback).fit(module, token_loader(samples=16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.6, "stages": 3}, "`stages` to be 1 or 2"),
        ({"size": 0.3}, "stages=1 with stages=2, since bits"),
        ({"quantize": "int4"}, "stages=1 with stages=2, since bits"),
        ({"keep": 0.6, "passes": 2, "update_weights": False}, "passes=1 with stages=2"),
        ({"keep": 0.6, "sketch": "range"}, "sketch=None with stages=2"),
        ({"keep": 0.6, "token_fraction": 0.5}, "token_fraction=1.0 with stages=2"),
    ],
)
def test_options_that_exclude_a_second_stage(options, message):
    with pytest.raises(ValueError, match=message):
        FascCallback(**{"stages": 2, **options})


def test_experts_have_no_second_stage():
    with pytest.raises(ValueError, match=r"stages=1 for a model with experts.*`exclude` the experts"):
        compress(make("mixtral"), batches(4), keep=0.6, **TWO)


def test_a_layer_that_is_never_called_is_named_once():
    module = mlp()
    module.spare = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="never called") as caught:
        report = compress(module, feature_loader(), keep=0.6, **TWO)
    assert sum("never called" in str(warning.message) for warning in caught) == 1
    assert {layer.name for layer in report.layers} == {"net.0", "net.3", "net.5"}


def test_a_plan_counts_both_stages():
    one, two = (plan(causal_model(), keep=0.6, stages=stages, tokens=1000) for stages in (1, 2))
    assert two.seconds.per_1000_tokens == pytest.approx(2 * one.seconds.per_1000_tokens)
    assert two.peak.device >= one.peak.device  # the moments stay for the second stage
