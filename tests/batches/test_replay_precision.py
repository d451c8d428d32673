"""Training steps that run again in the precision of their fit."""

from __future__ import annotations

import math

import pytest
import torch
from replay_cases import Blocks, compressed, loader
from tiny import causal_module, token_loader
from torch import nn
from torch.utils.data import DataLoader

from fasc_lightning import FascCallback, LoraRecovery, compress
from fasc_lightning.calibration import _replay as measure_phase
from fasc_lightning.compression import measure_losses

PRECISIONS = {
    "32-true": (torch.float32, torch.float32),
    "64-true": (torch.float64, torch.float64),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "16-true": (torch.float16, torch.float16),
    "bf16-mixed": (torch.float32, torch.bfloat16),
}


class Noisy(Blocks):
    """Makes tensors in its step, as diffusion models and denoisers do, and notes losses where nobody puts them back."""

    def __init__(self, noted):
        super().__init__()
        self.noted = lambda *what: noted.append(what)

    def training_step(self, batch, batch_idx):
        x, y = batch
        mask = torch.ones(x.shape)  # of the default type, which true precisions set
        loss = nn.functional.cross_entropy(self(x * mask + 0 * torch.randn(x.shape)), y)
        types = x.dtype, mask.dtype, self.layers[0].up(x).dtype, torch.is_autocast_enabled("cpu")
        self.noted(batch_idx, loss.item(), types)
        return loss


@pytest.mark.parametrize("update_weights", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_fit_ends_in_its_precision(make_trainer, monkeypatch, precision, update_weights):
    noted, dense = [], []

    def watch(*args):
        start = len(noted)
        found = measure_losses(*args)
        dense.extend(noted[start:])
        assert all(0 < value < float("inf") for value in found.values())
        return found

    monkeypatch.setattr(measure_phase, "measure_losses", watch)
    module = Noisy(noted)
    compressed(make_trainer, module, trainer={"precision": precision}, update_weights=update_weights)
    weights, inside = PRECISIONS[precision]
    assert {p.dtype for p in module.parameters()} == {weights}
    assert {types for _, _, types in noted} == {(weights, weights, inside, precision == "bf16-mixed")}
    assert len(dense) == 4
    if not update_weights:  # the same weights gave the same loss, digit by digit
        assert set(dense) <= set(noted[:6])
    assert torch.get_default_dtype() == torch.float32
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_in_half_precision_under_mixed(make_trainer, dtype):
    data = [(x.to(dtype), y) for x, y in loader()]
    module = compressed(make_trainer, Blocks(), DataLoader(data, batch_size=None), {"precision": "bf16-mixed"})
    loss = module.report.refit["loss"]
    assert math.isfinite(loss["before"])
    assert loss["after"] == pytest.approx(loss["before"], rel=0.05)  # random weights have little to gain


@pytest.mark.filterwarnings("ignore:.*in 16 bits", "ignore:.*nothing lowered the held-out loss")
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_language_model_is_refined_in_its_precision(make_trainer, precision):
    callback = FascCallback(keep=0.5, update_weights=False, recovery=LoraRecovery(refine_steps=4), refit=True)
    module = causal_module()
    make_trainer(callback, precision=precision).fit(module, token_loader(samples=16))
    assert callback.report.refine["steps"] == 4
    make_trainer(callback, precision=precision).fit(module, token_loader(samples=16))
    assert callback.report.recovery["held_out_loss"]["before"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_compress_takes_models_of_other_types(dtype):
    model = causal_module().model.to(dtype)
    report = compress(model, token_loader(samples=16), keep=0.5, refit=True, progress=False)
    assert report.refit is not None
    assert {p.dtype for p in model.parameters()} == {dtype}
