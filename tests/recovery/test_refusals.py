from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recovery_cases import FAST, compressed, same, training_loader, values
from tiny import causal_module, feature_loader, mlp

from fasc_lightning import FactorRecovery, FascCallback, RecoveryCallback
from fasc_lightning.layers import compressed_layers
from fasc_lightning.recovery._adapters import carries_adapters

pytest.importorskip("peft", reason="peft is not installed")


def test_adapters_on_the_module_are_refused(make_trainer):
    peft = pytest.importorskip("peft")
    module, callback = compressed(make_trainer, "factors")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["basis"]), module.model)
    with pytest.raises(MisconfigurationException, match=r"without adapters but 'model\..*basis' carries some"):
        make_trainer(callback).fit(module, training_loader())


def test_int8_is_refused(make_trainer):
    from fasc_lightning import quantize

    module, callback = compressed(make_trainer, "lora")
    quantize(module)
    with pytest.raises(MisconfigurationException, match=r"is in int8\. HINT: recover first"):
        make_trainer(callback).fit(module, training_loader())


def test_a_budget_is_needed():
    for options in ({}, {"monitor_every_n_steps": 2}):
        with pytest.raises(ValueError, match="a budget"):
            FascCallback(recovery="lora", **options)
    with pytest.raises(ValueError, match="'lora', 'factors', a LoraRecovery"):
        FascCallback(rank=0.5, recovery="adapters")


@pytest.mark.parametrize("kind", ["none", "frozen", "stale"])
def test_optimizers_without_the_adapters_are_refused(make_trainer, kind):
    module, callback = compressed(make_trainer, "lora")
    before = values(module)
    chosen = list(module.parameters())
    optimizers = {
        "none": lambda: None,
        "frozen": lambda: torch.optim.AdamW(module.model.lm_head.parameters()),
        "stale": lambda: torch.optim.AdamW(chosen),
    }
    module.configure_optimizers = optimizers[kind]
    with pytest.warns() if kind == "none" else pytest.MonkeyPatch.context():  # noqa: SIM117
        with pytest.raises(MisconfigurationException, match="none of the 56 parameters"):
            make_trainer(callback).fit(module, training_loader())
    assert same(values(module), before)
    assert carries_adapters(module) is None


def test_some_parameters_in_no_optimizer_are_said(make_trainer):
    module, callback = compressed(make_trainer, "factors")
    module.configure_optimizers = lambda: torch.optim.AdamW(
        [p for p in module.model.model.layers[0].parameters() if p.requires_grad], lr=1e-3
    )
    with pytest.warns(UserWarning, match="14 of the 28 parameters that recovery trains are in no optimizer"):
        make_trainer(callback).fit(module, training_loader())


def test_no_held_out_batches_to_be_had_are_refused(make_trainer):
    module, callback = compressed(make_trainer, "lora")
    before = values(module)
    with pytest.raises(MisconfigurationException, match=r"held-out batches.*come from list"):
        make_trainer(callback).fit(module, list(training_loader()))
    assert same(values(module), before)


def test_modules_that_know_no_teacher_are_refused_before_the_compression(make_trainer):
    module = mlp()
    callback = FascCallback(**FAST, recovery=FactorRecovery(teacher="dense"))
    with pytest.raises(MisconfigurationException, match="Classifier has no `predictions"):
        make_trainer(callback).fit(module, feature_loader())
    assert not compressed_layers(module)


def test_modules_that_optimise_by_hand_are_refused_before_the_compression(make_trainer):
    module = mlp()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic optimization"):
        make_trainer(FascCallback(**FAST, recovery="lora")).fit(module, feature_loader())


def test_a_dense_module_has_nothing_to_recover(make_trainer):
    with pytest.raises(MisconfigurationException, match="Expected a compressed module"):
        make_trainer(RecoveryCallback("lora")).fit(causal_module(), training_loader())
