from __future__ import annotations

import math

import lightning.pytorch as pl
import pytest
import torch
from recovery_cases import ARMS, FAST, assert_plain, compressed, factor_keys, ranks, same, training_loader, values
from tiny import Classifier, feature_loader, mlp
from torch import nn

from fasc_lightning import CausalLMModule, FactorRecovery, FascCallback, LoraRecovery
from fasc_lightning.layers import PivotedLinear, compressed_layers
from fasc_lightning.layers._int8 import Int8Linear
from fasc_lightning.recovery._adapters import carries_adapters

pytest.importorskip("peft", reason="peft is not installed")


class Watch(pl.Callback):
    """Notes what requires a gradient, and what changes."""

    def on_train_start(self, trainer, pl_module):
        self.trained = {name for name, p in pl_module.named_parameters() if p.requires_grad}
        self.optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        self.by_name = {id(p) for name, p in pl_module.named_parameters() if name in self.trained}
        self.classes = {type(layer) for layer in compressed_layers(pl_module).values()}
        self.teacher = pl_module.teacher


@pytest.mark.parametrize("arm", ARMS)
def test_the_second_fit_recovers_and_leaves_a_plain_module(make_trainer, arm):
    module, callback = compressed(make_trainer, ARMS[arm])
    before, flags = values(module), {name: p.requires_grad for name, p in module.named_parameters()}
    old_ranks, first_report = ranks(module), callback.report
    watch = Watch()
    make_trainer(callback, watch, max_epochs=4).fit(module, training_loader())
    figures = callback.report.recovery
    assert figures["held_out_loss"]["after"] < figures["held_out_loss"]["before"]
    assert figures["reverted"] is False
    assert figures["arm"] == arm.split(",")[0]
    assert figures["teacher"] == ("distilled" in arm)
    assert figures["tokens"] == 4 * 28 * 16
    assert figures["trained_parameters"] > 0
    assert_plain(module, list(before), flags)
    assert ranks(module) == old_ranks
    after = values(module)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    factors = factor_keys(module)
    if "factors" in arm:
        norms = {key for key in before if "norm" in key}
        assert changed <= factors | (norms if "distilled" in arm else set())
        assert bool(changed & norms) == ("distilled" in arm)
        assert watch.trained >= {key for key in factors if not key.endswith("permutation")}
    else:
        assert changed <= factors
        assert all("lora_" in name for name in watch.trained)
        assert watch.classes <= {PivotedLinear}
    assert watch.optimized == watch.by_name
    assert (watch.teacher is not None) == ("distilled" in arm)
    assert callback.report.layers == first_report.layers
    assert "recovery (" in str(callback.report)
    assert callback.report.options["recovery"]["arm"] == figures["arm"]


def test_merged_adapters_compute_what_they_did_beside_the_factors(make_trainer):
    module, callback = compressed(make_trainer, LoraRecovery(r=4))
    batch = next(iter(training_loader()))
    found = {}

    class Last(pl.Callback):
        @torch.no_grad()
        def on_train_end(self, trainer, pl_module):
            assert carries_adapters(pl_module) is not None
            found["logits"] = pl_module(**batch).logits
            found["state"] = values(pl_module)

    make_trainer(callback, Last(), max_epochs=3).fit(module, training_loader())
    with torch.no_grad():
        torch.testing.assert_close(module(**batch).logits, found["logits"])
    # While adapters are on, the module's state is that of the merged one.
    assert list(found["state"]) == list(module.state_dict())
    assert all(torch.equal(found["state"][key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("arm", ["lora", "factors"])
def test_nothing_worse_than_without_recovery_is_kept(make_trainer, arm):
    module, callback = compressed(make_trainer, arm, learning_rate=0.5)
    before = values(module)
    with pytest.warns(UserWarning, match="nothing lowered the held-out loss .* the factors are what they were"):
        make_trainer(callback, max_epochs=1).fit(module, training_loader())
    assert same(values(module), before)
    figures = callback.report.recovery
    assert figures["reverted"] is True
    assert figures["best_step"] == 0
    assert figures["held_out_loss"]["after"] == figures["held_out_loss"]["before"]


@pytest.mark.parametrize("arm", ["lora", "factors"])
def test_the_best_state_is_kept_and_not_the_last(make_trainer, arm):
    options = {"validate_every": 1}
    recovery = LoraRecovery(**options) if arm == "lora" else FactorRecovery(**options)
    module, callback = compressed(make_trainer, recovery)
    seen = {}

    class Worse(pl.Callback):
        """Ruins the learning rate half-way."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen[trainer.global_step] = values(pl_module)
            if trainer.global_step == 10:
                trainer.optimizers[0].param_groups[0]["lr"] = 1.0

    make_trainer(callback, Worse(), max_epochs=2).fit(module, training_loader())
    figures = callback.report.recovery
    history = dict(figures["history"])
    assert list(history) == list(range(15))
    assert figures["best_step"] == min(history, key=history.get) <= 10
    assert same(values(module), seen[figures["best_step"]])
    assert figures["held_out_loss"]["after"] == history[figures["best_step"]]


def test_patience_ends_the_fit(make_trainer):
    module, callback = compressed(make_trainer, LoraRecovery(validate_every=2, patience=2), learning_rate=0.5)
    trainer = make_trainer(callback, max_epochs=50)
    with pytest.warns(UserWarning, match="nothing lowered"):
        trainer.fit(module, training_loader())
    assert trainer.global_step == 4


@pytest.mark.parametrize("arm", ["lora", "factors"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_and_the_best_state_is_restored(make_trainer, arm, what):
    options = {"validate_every": 1}
    recovery = LoraRecovery(**options) if arm == "lora" else FactorRecovery(**options)
    module, callback = compressed(make_trainer, recovery)
    calls = []
    step = module.training_step

    def broken(batch, batch_idx):
        loss = step(batch, batch_idx)
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 12 and calls[-1]:
            return loss * math.nan if what == "loss" else torch.sqrt(loss - loss) + loss.detach()
        return loss

    module.training_step = broken
    trainer = make_trainer(callback, max_epochs=9)
    with pytest.warns(UserWarning, match="not finite after 11 steps"):
        trainer.fit(module, training_loader())
    figures = callback.report.recovery
    assert figures["diverged_at"] == 11
    assert trainer.global_step == 12
    assert figures["best_step"] in range(1, 12)
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


@pytest.mark.parametrize("what", ["nan", "inf"])
def test_a_held_out_loss_that_is_not_finite_stops_and_is_said(make_trainer, what):
    module, callback = compressed(make_trainer, LoraRecovery(validate_every=1))
    step = module.training_step

    def broken(batch, batch_idx):
        loss = step(batch, batch_idx)
        return loss if torch.is_grad_enabled() or module.trainer.global_step < 3 else loss * float(what)

    module.training_step = broken
    trainer = make_trainer(callback, max_epochs=2)
    with pytest.warns(UserWarning, match="The held-out loss is not finite after 3 steps"):
        trainer.fit(module, training_loader())
    figures = callback.report.recovery
    assert (figures["diverged_at"], trainer.global_step) == (3, 3)
    assert figures["best_step"] in (1, 2)
    assert "stopped after 3 steps, as the numbers were no longer finite" in str(callback.report)


@pytest.mark.parametrize("what", ["nan", "inf"])
def test_a_first_loss_that_is_not_finite_is_refused(make_trainer, what):
    module, callback = compressed(make_trainer, "lora")
    before, step = values(module), module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx) * float(what)
    with pytest.raises(FloatingPointError, match=f"before the recovery but got {what}"):
        make_trainer(callback).fit(module, training_loader())
    assert same(values(module), before)


class StopsAt(pl.Callback):
    """Ends a fit whose length is not known."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= 16


@pytest.mark.parametrize("options", [{"max_steps": 5, "max_epochs": -1}, {"max_epochs": -1}])
def test_the_end_of_a_recovery_need_not_be_known(make_trainer, options):
    module, callback = compressed(make_trainer, LoraRecovery(), learning_rate=5e-4)
    trainer = make_trainer(callback, StopsAt(), **options)
    trainer.fit(module, training_loader())
    figures = callback.report.recovery
    assert figures["steps"] == trainer.global_step
    # Eight looks in a fit of known length, else one at the end of every epoch, and one before and after it.
    steps = [step for step, _ in figures["history"]]
    if "max_steps" in options:
        assert steps == [0, 1, 2, 3, 4, 5]
    else:
        assert steps == [0, 7, 14, 16]


class Stream(torch.utils.data.IterableDataset):
    """Samples of which nobody knows how many there are."""

    def __iter__(self):
        return iter(training_loader(samples=16).dataset)


def test_the_length_of_the_data_need_not_be_known(make_trainer):
    module, callback = compressed(make_trainer, LoraRecovery())
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(module, torch.utils.data.DataLoader(Stream(), batch_size=4), training_loader(8, seed=4))
    assert [step for step, _ in callback.report.recovery["history"]] == [0, 4, 8]


def test_validation_batches_decide_where_there_are_any(make_trainer):
    module, callback = compressed(make_trainer, "lora")
    held = training_loader(8, seed=5)
    with torch.no_grad():
        expected = sum(float(module._loss(batch)) for batch in held) / 2
    make_trainer(callback, max_epochs=2).fit(module, training_loader(), held)
    figures = callback.report.recovery
    assert figures["held_out_loss"]["before"] == pytest.approx(expected)
    assert figures["tokens"] == 2 * 32 * 16  # none are held back
    with torch.no_grad():
        after = sum(float(module._loss(batch)) for batch in held) / 2
    assert figures["held_out_loss"]["after"] == pytest.approx(after, rel=1e-5)


def test_callbacks_that_average_weights_do_not_have_the_last_word(make_trainer):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module, callback = compressed(make_trainer, "factors")
    held = training_loader(8, seed=5)
    averages = EMAWeightAveraging(use_buffers=False, decay=0.9)  # its buffers would be averages of whole numbers
    make_trainer(callback, averages).fit(module, training_loader(), held)
    with torch.no_grad():
        after = sum(float(module._loss(batch)) for batch in held) / 2
    assert callback.report.recovery["held_out_loss"]["after"] == pytest.approx(after, rel=1e-5)


def test_what_is_judged_is_what_is_kept_where_merging_rounds(make_trainer):
    module, callback = compressed(make_trainer, LoraRecovery(validate_every=2))
    module.to(torch.bfloat16)
    held = training_loader(8, seed=5)
    make_trainer(callback).fit(module, training_loader(16), held)
    with torch.no_grad():
        after = sum(float(module._loss(batch)) for batch in held) / 2
    assert callback.report.recovery["held_out_loss"]["after"] == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize("arm", ["lora", "factors"])
def test_training_in_16_bits_is_warned_of(make_trainer, arm):
    module = Classifier(mlp().net)
    callback = FascCallback(**FAST, recovery=arm)
    make_trainer(callback).fit(module, feature_loader())
    with pytest.warns(UserWarning, match="in 16 bits, in which small steps round to nothing"):
        make_trainer(callback, precision="bf16-true").fit(module, feature_loader())
    assert callback.report.recovery["steps"] > 0


def test_the_peak_of_memory_is_that_of_the_recovery_too(make_trainer, monkeypatch):
    module, callback = compressed(make_trainer, "factors")
    before = callback.report.peak_memory_bytes
    monkeypatch.setattr("fasc_lightning.recovery._callback.peak_memory_bytes", lambda device: 2 * before)
    make_trainer(callback).fit(module, training_loader(8))
    assert callback.report.peak_memory_bytes == 2 * before


def test_quantisation_waits_for_the_recovery(make_trainer):
    module, callback = compressed(make_trainer, "lora", quantize="int8")
    assert not any(isinstance(m, Int8Linear) for m in module.modules())
    assert "unquantized" not in callback.report.targeted
    assert callback.report.plan
    make_trainer(callback, max_epochs=3).fit(module, training_loader())
    assert callback.report.recovery["reverted"] is False
    for layer in compressed_layers(module).values():
        assert all(isinstance(child, Int8Linear) for child in layer.children())
    assert callback.report.options["quantize"] == "int8"
    assert callback.report.targeted["compressed"].bytes < callback.report.targeted["unquantized"].bytes
    assert module.model.config.quantization_config.provenance["options"]["recovery"]["arm"] == "lora"
    module(**next(iter(training_loader())))


@pytest.mark.parametrize("arm", ["lora", "factors"])
def test_a_fit_that_fails_gives_back_the_compressed_module(make_trainer, arm):
    module, callback = compressed(make_trainer, arm)
    before, flags = values(module), {name: p.requires_grad for name, p in module.named_parameters()}

    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 5:
                raise RuntimeError("failed on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        make_trainer(callback, Fails()).fit(module, training_loader())
    assert same(values(module), before)
    assert_plain(module, list(before), flags)
    assert callback.report is not None
    assert callback.report.recovery is None
    make_trainer(callback, max_epochs=2).fit(module, training_loader())
    assert callback.report.recovery["reverted"] is False


# Modules of others


class Distilled(Classifier):
    """Takes part in distillation by the protocol."""

    teacher = None

    def predictions(self, batch):
        return self(batch[0]), None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if self.teacher is None else self.teacher.loss(batch, self(batch[0]), None, loss)


@pytest.mark.parametrize("teacher", [None, "dense"])
@pytest.mark.parametrize("arm", [LoraRecovery, FactorRecovery])
def test_any_lightning_module_recovers(make_trainer, arm, teacher):
    module = Distilled(mlp().net)
    callback = FascCallback(**FAST, recovery=arm(teacher=teacher))
    make_trainer(callback, max_epochs=1).fit(module, feature_loader())
    before = list(module.state_dict())
    make_trainer(callback, max_epochs=12).fit(module, feature_loader())
    figures = callback.report.recovery
    assert figures["held_out_loss"]["after"] <= figures["held_out_loss"]["before"]
    assert figures["tokens"] == 12 * 28
    assert list(module.state_dict()) == before


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(16), nn.InstanceNorm2d(16, track_running_stats=True)])
def test_running_statistics_are_frozen_too(make_trainer, norm):
    from tiny import Patches

    module = Classifier(Patches())
    module.net.norm = norm
    callback = FascCallback(**FAST, recovery="factors")
    loader = feature_loader((1, 16, 16))
    make_trainer(callback).fit(module, loader)
    before = values(module)
    make_trainer(callback, max_epochs=3).fit(module, loader)
    after = values(module)
    assert {key for key in before if not torch.equal(before[key], after[key])} <= factor_keys(module)
    assert module.net.norm.training


def test_a_module_without_anything_of_ours_is_left_alone_between_the_fits(make_trainer):
    module, callback = compressed(make_trainer, "lora")
    assert isinstance(module, CausalLMModule)
    make_trainer(callback).validate(module, training_loader(), verbose=False)
    assert carries_adapters(module) is None
