from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recovery_cases import ARMS, FAST, Saves, assert_plain, compressed, ranks, same, trained, training_loader, values
from tiny import causal_module, feature_loader
from torch import nn

from fasc_lightning import FascCallback, LoraRecovery
from fasc_lightning.layers import compressed_layers
from fasc_lightning.recovery._adapters import carries_adapters

pytest.importorskip("peft", reason="peft is not installed")


#: The first and the last arm; the others with ``-m exhaustive``.
SAMPLED = [
    pytest.param(arm, marks=() if i in (0, len(ARMS) - 1) else pytest.mark.exhaustive) for i, arm in enumerate(ARMS)
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("arm", ARMS)
def test_a_recovery_that_is_resumed_ends_as_one_that_was_not_interrupted(make_trainer, tmp_path, arm):
    module, callback = compressed(make_trainer, ARMS[arm])
    dense = trained()
    dense.learning_rate = module.learning_rate
    make_trainer(callback, Saves(tmp_path), max_epochs=4).fit(module, training_loader())

    # In another process: nothing but the checkpoint, the data and the dense module.
    fresh = FascCallback(**FAST, recovery=ARMS[arm])
    make_trainer(fresh, max_epochs=4).fit(dense, training_loader(), ckpt_path=tmp_path / "1.ckpt")
    assert same(values(dense), values(module))
    found, expected = fresh.report.recovery, callback.report.recovery
    assert {**found, "seconds": 0, "peak_memory_bytes": 0} == {**expected, "seconds": 0, "peak_memory_bytes": 0}


@pytest.mark.parametrize("arm", SAMPLED)
def test_the_callback_that_compressed_goes_on_with_its_own_module(make_trainer, tmp_path, arm):
    module, callback = compressed(make_trainer, ARMS[arm])
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    twin, its = copy.deepcopy(module), copy.deepcopy(callback)
    make_trainer(its, max_epochs=3).fit(twin, training_loader())

    class Fails(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise RuntimeError("failed on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        make_trainer(callback, Saves(tmp_path), Fails(), max_epochs=3).fit(module, training_loader())
    make_trainer(callback, max_epochs=3).fit(module, training_loader(), ckpt_path=tmp_path / "1.ckpt")
    assert same(values(module), values(twin))
    assert_plain(module, list(module.state_dict()), flags)
    found, expected = callback.report.recovery, its.report.recovery
    assert {**found, "seconds": 0, "peak_memory_bytes": 0} == {**expected, "seconds": 0, "peak_memory_bytes": 0}


@pytest.mark.parametrize("arm", SAMPLED)
def test_a_recovery_that_had_nothing_left_to_train_ends_as_it_would_have(make_trainer, tmp_path, arm):
    module, callback = compressed(make_trainer, ARMS[arm])
    twin, its = copy.deepcopy(module), copy.deepcopy(callback)

    class Ruins(pl.Callback):
        """Makes the last state a bad one."""

        def on_train_batch_start(self, trainer, *args):
            trainer.optimizers[0].param_groups[0]["lr"] = 3e-4 if trainer.global_step < 12 else 1.0

    make_trainer(callback, Ruins(), Saves(tmp_path), max_epochs=2).fit(module, training_loader())
    make_trainer(its, max_epochs=2).fit(twin, training_loader(), ckpt_path=tmp_path / "1.ckpt")
    assert callback.report.recovery["best_step"] in range(1, 13)
    assert same(values(twin), values(module))
    for name in ("held_out_loss", "history", "best_step", "tokens", "steps"):
        assert its.report.recovery[name] == callback.report.recovery[name]


def test_a_checkpoint_from_before_the_compression_makes_the_module_dense_and_plain(make_trainer, tmp_path):
    module = causal_module()
    callback = FascCallback(**{**FAST, "update_weights": True}, recovery="lora")
    make_trainer(callback, Saves(tmp_path)).fit(module, training_loader(8))
    assert compressed_layers(module)
    with pytest.warns(UserWarning, match="and is dense now"):
        make_trainer(callback, max_epochs=2).fit(module, training_loader(8), ckpt_path=tmp_path / "0.ckpt")
    assert callback.report.recovery is None
    assert compressed_layers(module)
    assert all(p.requires_grad for p in module.parameters())
    assert carries_adapters(module) is None
    assert not module._load_state_dict_pre_hooks


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_in_the_middle_is_that_of_the_merged_module(make_trainer, tmp_path, weights_only):
    module, callback = compressed(make_trainer, "lora")
    found = {}

    class Watches(pl.Callback):
        @torch.no_grad()
        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.eval()
            found[trainer.current_epoch] = pl_module(**next(iter(training_loader()))).logits
            pl_module.train()

    make_trainer(callback, Watches(), Saves(tmp_path, weights_only), max_epochs=2).fit(module, training_loader())
    checkpoint = torch.load(tmp_path / "0.ckpt", weights_only=True)
    assert not any("lora" in key or "base_layer" in key for key in checkpoint["state_dict"])
    other = causal_module().eval()
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    with torch.no_grad():
        torch.testing.assert_close(other(**next(iter(training_loader()))).logits, found[0])


@pytest.mark.filterwarnings("ignore:.*ckpt_path=:UserWarning")
def test_a_checkpoint_saved_when_the_fit_fails_goes_on(make_trainer, tmp_path):
    module, callback = compressed(make_trainer, LoraRecovery(r=4))

    class Fails(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise RuntimeError("failed on purpose")

    twin, its = copy.deepcopy(module), compressed(make_trainer, LoraRecovery(r=4))[1]
    make_trainer(its, max_epochs=2).fit(twin, training_loader())
    expected, state = its.report.recovery, values(twin)
    saver = OnExceptionCheckpoint(tmp_path, "failed")
    before = values(module)
    with pytest.raises(RuntimeError, match="on purpose"):
        make_trainer(callback, Fails(), saver, max_epochs=2, enable_checkpointing=True).fit(
            module, training_loader(), ckpt_path=None
        )
    assert same(values(module), before)
    fresh = FascCallback(**FAST, recovery=LoraRecovery(r=4))
    other = causal_module()
    other.learning_rate = module.learning_rate
    make_trainer(fresh, saver, max_epochs=2, enable_checkpointing=True).fit(
        other, training_loader(), ckpt_path=tmp_path / "failed.ckpt"
    )
    assert fresh.report.recovery["held_out_loss"] == pytest.approx(expected["held_out_loss"])
    assert same(values(other), state)


class Shallow(pl.LightningModule):
    """Its layers are its own children."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 24), nn.Linear(24, 3)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.second(torch.relu(self.first(batch[0]))), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.filterwarnings("ignore:.*ckpt_path=:UserWarning")
def test_a_checkpoint_of_a_failure_is_that_of_the_merged_module(make_trainer, tmp_path):
    module, callback, found = Shallow(), FascCallback(**FAST, recovery="lora"), {}
    make_trainer(callback).fit(module, feature_loader())

    class Fails(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                found.update(values(pl_module))
                raise RuntimeError("failed on purpose")

    saver = OnExceptionCheckpoint(tmp_path, "failed")
    with pytest.raises(RuntimeError, match="on purpose"):
        make_trainer(callback, Fails(), saver, max_epochs=2, enable_checkpointing=True).fit(module, feature_loader())
    assert not same(values(module), found)
    assert same(torch.load(tmp_path / "failed.ckpt", weights_only=True)["state_dict"], found)


def test_a_compressed_checkpoint_is_recovered_in_another_process(make_trainer, tmp_path):
    trainer = make_trainer(FascCallback(**FAST))
    other = causal_module()
    trainer.fit(other, training_loader())
    trainer.save_checkpoint(tmp_path / "compressed.ckpt")
    fresh = FascCallback(**FAST, recovery="lora")
    target = causal_module()
    target.learning_rate = 3e-3
    make_trainer(fresh, max_epochs=4).fit(target, training_loader(), ckpt_path=tmp_path / "compressed.ckpt")
    assert fresh.report.recovery["steps"] == 3 * 7
    assert ranks(target) == ranks(other)


def test_another_teacher_than_the_first_is_refused(make_trainer, tmp_path):
    recovery = LoraRecovery(teacher="dense")
    module, callback = compressed(make_trainer, recovery)
    make_trainer(callback, Saves(tmp_path)).fit(module, training_loader())
    fresh, other = FascCallback(**FAST, recovery=recovery), causal_module()
    with pytest.raises(MisconfigurationException, match="teacher, but the module's are others"):
        make_trainer(fresh, max_epochs=2).fit(other, training_loader(), ckpt_path=tmp_path / "0.ckpt")
    assert carries_adapters(other) is None
