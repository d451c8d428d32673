"""Measuring losses as a phase of a fit: on which batches, when not, and what is left behind."""

from __future__ import annotations

import pytest
import torch
from tiny import causal_module, token_loader
from watching import assert_untouched, state

from fasc_lightning import FascCallback, compress
from fasc_lightning.calibration import _replay as measure_phase
from fasc_lightning.compression import measure_losses


def fit(make_trainer, allocation, module=None, **options):
    module = module or causal_module()
    callback = FascCallback(keep=0.5, allocation=allocation, refit=False, update_weights=False, **options)
    make_trainer(callback).fit(module, token_loader(samples=16, batch_size=2))
    return module, callback.report


@pytest.fixture
def watched(monkeypatch):
    calls = []

    def watch(model, layers, factors, batches, rows, loss):
        found = measure_losses(model, layers, factors, batches, rows, loss)
        calls.append((batches, found, rows(batches[0]).scale))
        return found

    monkeypatch.setattr(measure_phase, "measure_losses", watch)
    return calls


def test_it_measures_on_some_of_the_calibrations_batches(make_trainer, watched):
    module, report = fit(make_trainer, "measured")
    ((batches, losses, scale),) = watched
    everything = [batch["input_ids"] for batch in token_loader(samples=16, batch_size=2)]
    assert [any(torch.equal(batch["input_ids"], ids) for ids in everything) for batch in batches] == [True] * 4
    assert scale == batches[0]["input_ids"][:, 1:].numel()  # the loss is a mean over predicted tokens
    assert min(losses.values()) > 0
    assert report.options.get("allocation", FascCallback(keep=0.5).allocation) == "measured"  # a default is not stated
    assert not {"log", "log_dict"} & set(vars(module))
    assert all(p.grad is None for p in module.parameters())


def test_predicted_losses_are_of_the_size_of_measured_ones(make_trainer, watched):
    _, report = fit(make_trainer, "fisher")
    assert watched == []
    predicted = {layer.name: layer.loss for layer in report.layers if layer.layout != "dense"}
    fit(make_trainer, "measured")
    measured = watched[0][1]
    ratios = torch.tensor([measured[name] / predicted[name] for name in predicted])
    assert 0.2 < ratios.median() < 5


def test_a_module_that_optimises_by_hand_is_compressed_by_predictions(make_trainer, watched, caplog):
    class ByHand(type(causal_module())):
        def __init__(self, model):
            super().__init__(model)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))

    by_hand, plain = ByHand(causal_module().model), causal_module()
    with caplog.at_level("INFO"):
        _, report = fit(make_trainer, "measured", by_hand, loss_terms=plain.loss_terms)
    assert watched == []
    assert "ranks and bits follow predicted losses alone. Expected automatic optimization" in caplog.text
    _, expected = fit(make_trainer, "fisher", plain)
    assert [layer.rank for layer in report.layers] == [layer.rank for layer in expected.layers]


def test_a_measurement_that_fails_gives_the_dense_module_back(make_trainer, monkeypatch):
    def fail(*args, **kwargs):
        raise FloatingPointError("no")

    monkeypatch.setattr(measure_phase, "measure_losses", fail)
    module = causal_module()
    before = state(module)
    with pytest.raises(FloatingPointError, match="no"):
        fit(make_trainer, "measured", module)
    assert_untouched(module, before)


def test_compress_measures_by_default(watched):
    compress(causal_module().model, token_loader(samples=8), keep=0.5, progress=False)
    assert len(watched) == 1
