"""The refit as a phase of a fit: with whose batches, when not, and what is left behind."""

from __future__ import annotations

import pytest
import torch
from tiny import causal_module, token_loader
from watching import assert_untouched, state

from fasc_lightning import FascCallback, compress
from fasc_lightning._utils import evaluating
from fasc_lightning.batches import NoLossError
from fasc_lightning.evaluation import perplexity
from fasc_lightning.layers import is_compressed
from fasc_lightning.refit import ByLayer, RefitError, RefitPhase, refit
from fasc_lightning.refit._blocks import BlockRunner
from fasc_lightning.refit._shares import Change
from fasc_lightning.refit._token_weights import gradient_lengths, token_weights


def fit(make_trainer, refit, module=None, **options):
    module = module or causal_module()
    callback = FascCallback(keep=0.5, refit=refit, update_weights=False, **options)
    make_trainer(callback).fit(module, token_loader(samples=16, batch_size=2))
    return module, callback.report


def test_a_refit_changes_factors_but_no_shape(make_trainer, monkeypatch):
    monkeypatch.setattr(Change, "is_gain", True)  # random weights have little to gain
    refitted, report = fit(make_trainer, True)
    plain, without = fit(make_trainer, False)
    assert without.refit is None
    assert "refit" not in without.seconds
    assert report.refit["layers"] > 0
    assert report.refit["loss"].keys() == {"before", "after", "error"}
    assert report.refit["batches"] == {"fit": 6, "held": 2}
    assert report.seconds["refit"] > 0
    assert "layers changed; held-out loss" in str(report)
    shapes = [(name, value.shape) for name, value in plain.state_dict().items()]
    assert [(name, value.shape) for name, value in refitted.state_dict().items()] == shapes
    assert any(
        not torch.equal(a, b) for a, b in zip(plain.state_dict().values(), refitted.state_dict().values(), strict=True)
    )
    assert not {"log", "log_dict"} & set(vars(refitted))


def test_it_is_the_refit_of_the_calibrations_batches_by_hand(make_trainer, monkeypatch):
    seen = {}

    def watch(model, dense, gradients, batches, **options):
        seen.update(batches=batches, gradients=dict(gradients), names=list(dense))
        return refit(model, dense, gradients, batches, **options)

    monkeypatch.setattr("fasc_lightning.refit._in_fit.refit", watch)
    fit(make_trainer, True)
    expected = [batch["input_ids"] for batch in token_loader(samples=16, batch_size=2)]
    assert all(torch.equal(batch["input_ids"], ids) for batch, ids in zip(seen["batches"], expected, strict=True))
    assert list(seen["gradients"]) == seen["names"]
    assert all(G.diagonal().min() >= 0 and G.any() for G in seen["gradients"].values())


def test_tokens_weigh_by_the_gradients_of_the_calibration(make_trainer, monkeypatch):
    """The lengths that the calibration keeps are those of a backward pass of the dense model over the kept batches."""
    compared = []

    def watch(model, dense, gradients, batches, *, lengths, loss, **options):
        with evaluating(model):
            runner = BlockRunner(model, dense, batches, loss)
            again = gradient_lengths(runner, dense, loss)
        counts = [batch["input_ids"].numel() for batch in batches]
        for name in dense:
            kept, expected = (token_weights(found, [name], counts) for found in (lengths, again))
            torch.testing.assert_close(torch.cat(kept), torch.cat(expected), rtol=1e-3, atol=1e-5)
            compared.append(name)
        return refit(model, dense, gradients, batches, lengths=lengths, loss=loss, **options)

    monkeypatch.setattr("fasc_lightning.refit._in_fit.refit", watch)
    _, report = fit(make_trainer, True)
    assert len(compared) == 12  # two layers stay dense
    assert report.refit["batches"]["fit"] == 6


def test_auto_says_why_a_module_is_not_refitted_and_true_insists(make_trainer, monkeypatch, caplog):
    def no_blocks(model, layers):
        raise RefitError("Expected a model whose blocks form a ModuleList.")

    monkeypatch.setattr("fasc_lightning.refit._in_fit.check_refit", no_blocks)
    module = causal_module()
    before = state(module)
    with pytest.raises(RefitError, match="form a ModuleList"):
        fit(make_trainer, True, module)
    assert_untouched(module, before)
    with caplog.at_level("INFO"):
        _, report = fit(make_trainer, "auto")
    assert report.refit is None
    assert "not refitted (harmless): Expected a model whose blocks form a ModuleList." in caplog.text


def test_a_module_that_only_refuses_when_it_runs_is_compressed_without_under_auto(make_trainer, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise RefitError("Expected blocks whose first argument is the hidden states.")

    monkeypatch.setattr("fasc_lightning.refit._in_fit.refit", refuse)
    with caplog.at_level("INFO"):
        module, report = fit(make_trainer, "auto")
    assert is_compressed(module)
    assert report.refit is None
    assert "not refitted (harmless): Expected blocks whose first argument" in caplog.text
    module = causal_module()
    before = state(module)
    with pytest.raises(RefitError, match="first argument"):
        fit(make_trainer, True, module)
    assert_untouched(module, before)


def test_too_few_batches_leave_the_factors_as_they_are(make_trainer, caplog):
    loader = token_loader(samples=3, batch_size=1)
    with pytest.warns(UserWarning, match="at least 4 calibration batches, .* and there were 3"):
        report = compress(causal_module().model, loader, keep=0.5, refit=True, progress=False)
    assert report.refit is None


def test_a_refit_that_fails_gives_the_dense_module_back(make_trainer, monkeypatch):
    def fail(*args, **kwargs):
        raise FloatingPointError("no")

    monkeypatch.setattr("fasc_lightning.refit._in_fit.refit", fail)
    module = causal_module()
    before = state(module)
    with pytest.raises(FloatingPointError, match="no"):
        fit(make_trainer, True, module)
    assert_untouched(module, before)


def test_manual_optimization_is_not_refitted():
    module = causal_module()
    module.automatic_optimization = False
    assert RefitPhase.of("auto", module, []) is None
    with pytest.raises(NoLossError, match="automatic optimization"):
        RefitPhase.of(True, module, [])
    assert RefitPhase.of(False, module, []) is None


def test_gradient_moments_are_coupled_where_they_can_be():
    from fasc_lightning.statistics import CalibrationMoments

    x, h = torch.randn(9, 3), torch.randn(9, 4)
    for needs in (["plain"], ["coupled"], ["plain", "coupled"]):
        moments = CalibrationMoments({"q": (4, 3)}, needs=needs)
        moments.add_inputs(["q"], x)
        moments.add_gradients("q", h)
        moments.add_pairs("q", x, h)
        weights = torch.ones(9) if needs == ["plain"] else x.norm(dim=1)
        expected = (h * weights[:, None]).T @ h / weights.sum()
        torch.testing.assert_close(ByLayer(moments.G, ["q"])["q"], expected)
        with pytest.raises(KeyError):
            ByLayer(moments.G, ["q"])["k"]


def test_compress_refits_by_default_and_perplexity_on_the_batches_does_not_rise():
    batches = list(token_loader(samples=16, batch_size=1))
    windows = torch.cat([batch["input_ids"] for batch in batches])
    results = {}
    for choice in (False, "auto"):
        model = causal_module().model
        compress(model, batches, keep=0.4, refit=choice, progress=False)
        results[choice] = perplexity(model, windows)
    assert results["auto"] < results[False] * 1.02
