"""What a fit gathers for its method and its gate, against the same by hand."""

from __future__ import annotations

import pytest
import torch
from layer_moments import full_moments
from tiny import causal_module, token_loader
from watching import RecordingCallback

from fasc_lightning import FascCallback, compress
from fasc_lightning.compression import statistics_needed
from fasc_lightning.layers import select_layers
from fasc_lightning.solvers import available_methods, solver_needs
from fasc_lightning.statistics._layer_moments import NEEDS


def pairs_by_hand(module, loader, name):
    """x and h of the sum of token losses at every real token of a layer, and the lengths of the sequences."""
    layer, model = module.get_submodule(name), module.model.eval()
    caught = {}

    def keep(_, args, output):
        caught["x"], caught["y"] = args[0].detach(), output.detach().requires_grad_()
        return caught["y"]

    handle = layer.register_forward_hook(keep)
    xs, hs, lengths = [], [], []
    for batch in loader:
        terms = (batch["labels"][:, 1:] != -100).sum()
        (model(**batch).loss * terms).backward()
        real = batch["attention_mask"].bool()
        xs.append(caught["x"][real])
        hs.append(caught["y"].grad[real])
        lengths += real.sum(1).tolist()
    handle.remove()
    return torch.cat(xs), torch.cat(hs), lengths


NAME = "model.model.layers.1.mlp.up_proj"


@pytest.mark.sampled(5)
@pytest.mark.parametrize("method", [m for m in available_methods() if solver_needs(m)])
def test_a_fit_gathers_what_its_method_needs_and_no_more(make_trainer, method):
    module, loader = causal_module(), token_loader(samples=8, padded=True)
    W = module.get_submodule(NAME).weight.detach().clone()
    x, h, lengths = pairs_by_hand(module, loader, NAME)
    callback = RecordingCallback(rank=0.5, method=method, update_weights=False)
    make_trainer(callback, accumulate_grad_batches=2).fit(module, loader)
    expected, found = full_moments(x, h, W, lengths), callback.kept_moments.layer(NAME)
    assert callback.kept_moments.needs == solver_needs(method)
    for need in set(NEEDS) - {"plain"}:
        if need not in solver_needs(method):
            assert getattr(found, need) is None
            continue
        values = (getattr(found, need), getattr(expected, need))
        for mine, theirs in zip(*values, strict=True) if need in ("kronecker", "coupled") else [values]:
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    assert callback.report.method == method
    assert {layer.method for layer in callback.report.layers} == {method}


def test_a_pooled_gate_gathers_its_own_beside_the_methods(make_trainer):
    callback = RecordingCallback(rank=0.5, method="asvd", gate=0.1, gate_by="pooled", update_weights=False)
    make_trainer(callback).fit(causal_module(), token_loader())
    assert callback.kept_moments.needs == {"C", "abs_x", "plain"}
    assert statistics_needed("gfwsvd", 0.3) == {"kronecker", "plain"}
    assert statistics_needed("fasc", 0.3) == {"coupled", "plain"}


def test_methods_that_need_plain_moments_gather_nothing_else(make_trainer):
    callback = RecordingCallback(rank=0.5, method="fasc-plain", update_weights=False)
    make_trainer(callback).fit(causal_module(), token_loader())
    assert not callback.kept_moments.takes_pairs
    assert len(callback.kept_moments.inputs) == 8  # of 14 layers: those that share an input share its moments


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", sorted(set(available_methods()) - {"fasc", "svd"}))
def test_every_method_compresses_a_model(method):
    module = causal_module()
    report = compress(module.model, list(token_loader()), keep=0.7, method=method, progress=False)
    assert report.kept <= 0.7
    assert all(torch.isfinite(p).all() for p in module.model.parameters())


def test_memory_is_asked_for_what_the_method_needs(make_trainer, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fasc_lightning.calibration._passes.check_moments_memory", lambda needed, *_: asked.append(needed)
    )
    for method in ("fasc", "gfwsvd"):
        make_trainer(FascCallback(rank=0.5, method=method)).fit(causal_module(), token_loader())
    shapes = [layer.weight.shape for layer in select_layers(causal_module()).values()]
    assert asked[1] - asked[0] > sum(m * m / 2 + n * n / 2 for m, n in shapes) * 4
