"""Recovery of rounded layers: their scales are trained, their codes are not."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from recovery_cases import trained, training_loader
from tiny import causal_module, token_loader

from fasc_lightning import Calibration, FactorRecovery, FascCallback
from fasc_lightning.layers import SCALE_DTYPE, Grid, packed_matrices
from fasc_lightning.options import Quantize

FROZEN = Calibration(update_weights=False)
FEW = Quantize(2, 16)


def rounded(make_trainer, recovery, **options):
    module = trained()
    module.learning_rate = 1.25e-4  # scales take four times as much
    callback = FascCallback(quantize=FEW, calibration=FROZEN, recovery=recovery, **options)
    make_trainer(callback).fit(module, training_loader())
    return module, callback


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


class Watch(pl.Callback):
    """Notes what requires a gradient."""

    def on_train_start(self, trainer, pl_module):
        self.trained = {name: p.dtype for name, p in pl_module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("teacher", [None, "dense"])
def test_scales_are_trained_in_float32_and_end_in_16_bits_and_codes_stay(make_trainer, teacher):
    module, callback = rounded(make_trainer, FactorRecovery(teacher=teacher))
    before = state(module)
    watch = Watch()
    make_trainer(callback, watch, max_epochs=4).fit(module, training_loader())
    figures = callback.report.recovery
    assert figures["held_out_loss"]["after"] < figures["held_out_loss"]["before"]
    after = module.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith(("weight_scale", "bias")) or "norm" in name for name in changed)
    scales = {name for name in before if name.endswith("weight_scale")}
    assert {watch.trained[name] for name in scales} == {torch.float32}
    assert {after[name].dtype for name in scales} == {SCALE_DTYPE}
    assert not any(matrix.weight_scale.requires_grad for matrix in packed_matrices(module))
    assert {matrix.grid for matrix in packed_matrices(module)} == {Grid(2, 16)}


def test_a_recovery_that_fails_leaves_the_scales_as_they_were(make_trainer):
    module, callback = rounded(make_trainer, FactorRecovery())
    before = state(module)

    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        make_trainer(callback, Fails()).fit(module, training_loader())
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4", "recovery": "lora"}, "cannot be merged into rounded"),
        ({"size": 0.27, "recovery": "lora"}, "cannot be merged into rounded"),
        ({"quantize": "int8", "recovery": "factors"}, "leaves nothing to recover"),
    ],
)
def test_recoveries_without_anything_to_train_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        FascCallback(**options)


def test_int8_layers_of_a_size_stay_and_the_others_are_recovered(make_trainer):
    module = causal_module()
    callback = FascCallback(size=0.5, calibration=FROZEN, recovery=FactorRecovery())
    make_trainer(callback).fit(module, token_loader())
    make_trainer(callback).fit(module, token_loader())
    assert callback.report.recovery is not None
