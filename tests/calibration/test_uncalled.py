"""Layers whose weights other code reads: no hook sees them, and the other layers do not pay for them."""

from __future__ import annotations

import pytest
import torch
from tiny import Classifier, feature_loader, mlp
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from fasc_lightning import CausalLMModule, FascCallback, compress
from fasc_lightning.layers import CompressedLinear, compressed_layers

UNCALLED = r"1 of 4 targeted layers were never called in calibration: net\.read\. .*budget is that of the other layers"


class Reading(nn.Module):
    """An MLP with a layer whose weight is read and never called, and one without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.read, self.down = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = nn.functional.linear(torch.relu(self.up(x)), self.read.weight, self.read.bias)
        return self.head(torch.relu(self.down(x)))


class Detaching(Reading):
    """The layer is called, and no gradient reaches it."""

    def forward(self, x):
        x = torch.relu(self.up(x))
        return self.head(torch.relu(self.down(x + self.read(x).detach())))


def ranks(report):
    return {layer.name.removeprefix("net."): layer.rank for layer in report.layers}


def alone(budget):
    """The same fit without the layer among its targets."""
    torch.manual_seed(0)
    return compress(Classifier(Reading()), feature_loader(), **budget, exclude=["read"], progress=False)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0.7},
        {"rank": 0.5, "allocation": "uniform"},
        {"size": 0.3},
        {"quantize": "int4"},
        {"keep": 0.7, "passes": 2},
        {"keep": 0.7, "allocation": "fisher", "refit": False},
    ],
)
def test_a_layer_that_is_never_called_is_left_out_of_the_budget(options):
    module = Classifier(Reading())
    expected = alone(options)
    with pytest.warns(UserWarning, match=UNCALLED):
        report = compress(module, feature_loader(), **options, progress=False)
    assert ranks(report) == ranks(expected)
    assert report.kept == expected.kept
    assert report.targeted == expected.targeted
    assert type(module.net.read) is nn.Linear
    assert all(name in ("net.up", "net.down", "net.head") for name in compressed_layers(module))


def test_a_layer_without_a_gradient_is_told_from_one_that_is_not_called():
    module = Classifier(Detaching())
    with pytest.warns(UserWarning, match="1 of 4 layers stay dense because no gradient") as caught:
        report = compress(module, feature_loader(), keep=0.7, progress=False)
    assert not any("never called" in str(warning.message) for warning in caught)
    assert len(report.layers) == 4


@pytest.mark.filterwarnings("ignore:No gradient has reached")
def test_a_fit_whose_layers_are_all_read_ends_with_the_reason():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(12, 3)

        def forward(self, x):
            return nn.functional.linear(x, self.one.weight, self.one.bias)

    module = Classifier(Functional())
    with pytest.raises(RuntimeError, match="No gradient reached any of the 1 tapped layers"):
        compress(module, feature_loader(), keep=0.7, progress=False)
    assert type(module.net.one) is nn.Linear


@pytest.mark.filterwarnings("ignore:.*saw fewer tokens than they have features")
def test_layers_that_are_called_once_count(make_trainer):
    """By a batch of several: a task of its own, or a layer that is dropped at random."""

    class Sometimes(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            hidden = self.net[:3](x)
            return nn.functional.cross_entropy(self.net[3:](hidden) if batch_idx == 2 else hidden[:, :3], y)

    callback = FascCallback(keep=0.9)
    make_trainer(callback).fit(Sometimes(mlp().net), feature_loader())
    assert len(callback.report.layers) == 3


@pytest.mark.filterwarnings("ignore:.*fast path is not available")
@pytest.mark.filterwarnings("ignore:.*saw fewer tokens than they have features")
def test_mamba_is_compressed_without_the_projection_that_it_reads():
    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4)
    torch.manual_seed(0)
    model = MambaForCausalLM(config)
    batches = [{"input_ids": torch.randint(32, (4, 12))} for _ in range(4)]
    with pytest.warns(UserWarning, match=r"2 of 8 targeted layers were never called in calibration.*dt_proj"):
        report = compress(model, batches, keep=0.8, progress=False)
    assert not any(layer.name.endswith("dt_proj") for layer in report.layers)
    assert report.kept <= 0.8
    assert any(isinstance(part, CompressedLinear) for part in model.modules())
    assert torch.isfinite(CausalLMModule(model)._loss(batches[0]))
