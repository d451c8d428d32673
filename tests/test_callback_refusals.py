from __future__ import annotations

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import (
    Classifier,
    Tokens,
    causal_model,
    causal_module,
    feature_loader,
    mlp,
    token_loader,
)
from torch import nn
from torch.utils.data import DataLoader
from watching import RecordingCallback, assert_untouched, state

from fasc_lightning import CausalLMModule, FascCallback
from fasc_lightning.layers import is_compressed

# Bad input: a clear error, and nothing lost.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "neither `rank` nor `keep`"),
        ({"rank": 0.5, "keep": 0.5}, ValueError, "got both"),
        ({"rank": 0.0}, ValueError, r"\(0, 1\] but got 0.0"),
        ({"rank": 1.5}, ValueError, r"\(0, 1\] but got 1.5"),
        ({"rank": math.nan}, ValueError, "fraction of full rank"),
        ({"rank": 0}, ValueError, "at least 1 but got 0"),
        ({"rank": True}, TypeError, "a number but got True"),
        ({"keep": 1.2}, ValueError, r"`keep` to be a fraction in \(0, 1\] but got 1.2"),
        ({"keep": "0.5"}, TypeError, "a number but got '0.5'"),
        ({"rank": 0.5, "method": "pca"}, ValueError, "one of asvd, fasc, .* but got 'pca'"),
        ({"rank": 0.5, "allocation": "best"}, ValueError, "one of measured, fisher, uniform"),
        ({"rank": 0.5, "layout": "coo"}, ValueError, "one of auto, pivot, factors"),
        ({"rank": 0.5, "align": 0}, ValueError, "`align` to be a positive int"),
        ({"rank": 0.5, "align": 8.0}, ValueError, "multiples, but got 8.0"),
        ({"rank": 0.5, "token_fraction": 0}, ValueError, "token_fraction"),
        ({"rank": 0.5, "calibration_steps": 0}, ValueError, "calibration_steps"),
        ({"rank": 0.5, "calibration_steps": True}, ValueError, "calibration_steps"),
        ({"rank": 0.5, "seed": "a"}, TypeError, "`seed` to be an int but got 'a'"),
        ({"rank": 0.5, "loss_terms": "median"}, ValueError, "'mean', 'sum' or a callable"),
        ({"rank": 0.5, "token_mask": "mask"}, TypeError, "token_mask"),
    ],
)
def test_wrong_options_are_refused_at_once(options, error, message):
    with pytest.raises(error, match=message):
        FascCallback(**options)


@pytest.mark.parametrize(("text", "rank"), [("256", 256), ("0.5", 0.5), ("1.0", 1.0)])
def test_command_lines_tell_ints_from_fractions(text, rank):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(FascCallback, "fasc")
    options = parser.parse_args(["--fasc.rank", text, "--fasc.targets", "[q_proj]", "--fasc.loss_terms", "sum"])
    callback = parser.instantiate(options).fasc
    assert callback.rank == rank
    assert type(callback.rank) is type(rank)
    assert callback.targets == ["q_proj"]


def test_rank_one_as_an_int_warns():
    with pytest.warns(UserWarning, match=r"write rank=1\.0"):
        FascCallback(rank=1)


@pytest.mark.parametrize(
    ("options", "callbacks", "reason"),
    [
        ({"max_steps": 5, "max_epochs": -1}, [], "max_steps=5"),
        ({"max_time": "00:00:01:00"}, [], "max_time"),
        ({}, [EarlyStopping("train_loss")], "EarlyStopping"),
        ({"max_epochs": -1}, [], "max_epochs=-1"),
    ],
)
def test_an_unknown_end_needs_calibration_steps(make_trainer, options, callbacks, reason):
    module = causal_module()
    before = state(module)
    with pytest.raises(MisconfigurationException, match=f"`calibration_steps` with {reason}|with an {reason}"):
        make_trainer(FascCallback(rank=0.5), *callbacks, **options).fit(module, token_loader())
    assert_untouched(module, before)


FAILURES = {
    "targets that match nothing": (ValueError, "matches none", {"targets": ["query"]}),
    "rank larger than a layer": (ValueError, r"rank=20 is larger than 4 of 14", {"rank": 20}),
    "budget below rank 1": (ValueError, "budget of at least", {"rank": None, "keep": 0.01}),
    "budget below the least aligned rank": (ValueError, "rank 16 in each.*lower `align`", {"rank": 0.3, "align": 16}),
}


@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.parametrize("update_weights", [False, True])
def test_failures_leave_the_model_as_it_was(make_trainer, case, update_weights):
    error, message, options = FAILURES[case]
    module = causal_module()
    before = state(module)
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    callback = FascCallback(**{"rank": 0.5, "update_weights": update_weights, **options})
    with pytest.raises(error, match=message):
        make_trainer(callback).fit(module, token_loader())
    assert_untouched(module, before, flags)
    assert module.training


def test_an_already_compressed_model_is_refused(make_trainer):
    module = causal_module()
    make_trainer(FascCallback(rank=0.5)).fit(module, token_loader())
    before = list(module.state_dict())
    with pytest.raises(MisconfigurationException, match="holds compressed layers already"):
        make_trainer(FascCallback(rank=0.5)).fit(module, token_loader())
    assert list(module.state_dict()) == before


class Broken(CausalLMModule):
    """Fails in a chosen way in its second batch."""

    def __init__(self, failure):
        super().__init__(causal_model().train())
        self.failure = failure

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.failure == "detached":
            return loss.detach().requires_grad_()
        if self.failure == "no-grad":
            with torch.no_grad():
                return super().training_step(batch, batch_idx)
        if batch_idx == 1:
            if self.failure == "nan":
                return loss * float("nan")
            if self.failure == "error":
                raise RuntimeError("out of luck")
            if self.failure == "ctrl-c":
                raise KeyboardInterrupt
        return loss


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        ("detached", RuntimeError, "No gradient reached any of the 14 tapped layers in calibration"),
        ("no-grad", RuntimeError, "No gradient reached any of the 14 tapped layers in calibration"),
        ("nan", FloatingPointError, "finite loss but got nan in batch 1 of epoch 0"),
        ("error", RuntimeError, "out of luck"),
        ("ctrl-c", SystemExit, "1"),
    ],
)
def test_failing_fits_leave_the_model_as_it_was(make_trainer, failure, error, message):
    module = Broken(failure)
    before = state(module)
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    trainer = make_trainer(FascCallback(rank=0.5, update_weights=False))
    with pytest.raises(error, match=message):
        trainer.fit(module, token_loader())
    assert_untouched(module, before, flags)
    assert module.training
    assert "optimizer_step" not in vars(trainer.strategy)
    assert "update_lr_schedulers" not in vars(trainer.fit_loop.epoch_loop)


def test_manual_optimization_that_never_calls_backward(make_trainer):
    class Idle(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self(batch[0])

    module = Idle(mlp().net)
    before = state(module)
    with pytest.raises(RuntimeError, match="manual_backward"):
        make_trainer(FascCallback(rank=0.5)).fit(module, feature_loader())
    assert_untouched(module, before)


def test_failure_while_swapping_restores_the_model(make_trainer, monkeypatch):
    module = causal_module()
    before = state(module)
    original = nn.Module.__setattr__
    calls = []

    def failing(self, name, value):
        if name == "down_proj":
            calls.append(name)
            if len(calls) == 2:
                raise RuntimeError("disk on fire")
        original(self, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__setattr__", failing)
        with pytest.raises(RuntimeError, match="disk on fire"):
            make_trainer(FascCallback(rank=0.5, update_weights=False)).fit(module, token_loader())
    assert len(calls) >= 2
    assert_untouched(module, before)


@pytest.mark.filterwarnings("ignore:Total length of `(CombinedLoader|DataLoader)` across ranks is zero")
def test_an_empty_dataloader_is_an_error(make_trainer):
    module = causal_module()
    before = state(module)
    with pytest.raises(MisconfigurationException, match="is the dataloader empty"):
        make_trainer(FascCallback(rank=0.5)).fit(module, DataLoader([]))
    assert_untouched(module, before)


def test_layers_that_no_batch_reaches_stay_dense(make_trainer):
    class Unused(Classifier):
        def __init__(self):
            super().__init__(mlp().net)
            self.spare = nn.Linear(8, 8)

        def forward(self, x):
            self.spare(x[:, :8])
            return self.net(x)

    module = Unused()
    callback = FascCallback(keep=0.8, update_weights=False)
    with pytest.warns(UserWarning, match=r"1 of 4 layers stay dense because no gradient .*: spare"):
        make_trainer(callback).fit(module, feature_loader())
    assert isinstance(module.spare, nn.Linear)
    assert callback.report.targeted["compressed"].parameters <= 0.8 * callback.report.targeted["dense"].parameters


def test_fewer_tokens_than_features_warn_with_the_rank_they_support(make_trainer):
    callback = FascCallback(rank=0.5)
    with pytest.warns(UserWarning, match=r"saw fewer tokens than they have features: .* saw 16, .* up to 16"):
        make_trainer(callback).fit(causal_module(), token_loader(samples=1))
    assert callback.report is not None


def test_dead_features_and_constant_gradients_are_ordinary(make_trainer):
    class Linear(Classifier):
        def training_step(self, batch, batch_idx):
            x, _ = batch
            x = x.clone()
            x[:, :4] = 0
            return self(x).sum()  # the same gradient at every sample

    module = Linear(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 6)))
    callback = FascCallback(rank=0.5, update_weights=False)
    make_trainer(callback).fit(module, feature_loader())
    x = torch.randn(5, 12)
    assert torch.isfinite(module(x)).all()


def test_too_little_memory_is_refused_with_the_estimate(make_trainer, monkeypatch):
    monkeypatch.setattr("fasc_lightning.calibration._checks.available_memory", lambda device: 1000)
    module = causal_module()
    before = state(module)
    with pytest.raises(MemoryError, match=r"need up to [\d.]+ kB and 1.00 kB is free on cpu. HINT: passes=2"):
        make_trainer(FascCallback(rank=0.5)).fit(module, token_loader())
    assert_untouched(module, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_compiled_modules_are_refused(make_trainer):
    module = causal_module()
    module.model = torch.compile(module.model)
    with pytest.raises(MisconfigurationException, match=r"'model' is: hooks added after compilation"):
        make_trainer(FascCallback(rank=0.5)).fit(module, token_loader())


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_launchers_that_lose_the_layers_are_refused(make_trainer, strategy):
    trainer = make_trainer(FascCallback(rank=0.5), strategy=strategy, devices=2)
    started = "ddp_spawn" if strategy == "ddp_spawn" else "ddp_fork"
    with pytest.raises(MisconfigurationException, match=rf"DDPStrategy \({started}\) is .* HINT: use strategy='ddp'"):
        trainer.callbacks[0].setup(trainer, causal_module(), "fit")


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_sharded_strategies_are_refused(name):
    from lightning.pytorch import strategies

    from fasc_lightning.distributed import check_strategy

    class FakeTrainer:
        strategy = object.__new__(getattr(strategies, name))

    FakeTrainer.strategy._launcher = None
    with pytest.raises(MisconfigurationException, match=f"but got {name}, which shards or wraps .* HINT"):
        check_strategy(FakeTrainer())


def test_modules_compiled_in_place_are_refused(make_trainer):
    module = causal_module()
    module.model.model.layers[0]._compiled_call_impl = lambda *args, **kwargs: None
    with pytest.raises(MisconfigurationException, match=r"'model\.model\.layers\.0' is: hooks added"):
        make_trainer(FascCallback(rank=0.5)).fit(module, token_loader())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's use
def test_adapters_must_be_merged_first(make_trainer):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(causal_model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(MisconfigurationException, match="merge_and_unload"):
        make_trainer(FascCallback(rank=0.5)).fit(CausalLMModule(model), token_loader())


def test_two_callbacks_are_refused(make_trainer):
    module = causal_module()
    before = state(module)
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    callbacks = [FascCallback(keep=0.8, targets=[name], update_weights=False) for name in ("q_proj", "down_proj")]
    with pytest.raises(MisconfigurationException, match="one FascCallback with a budget"):
        make_trainer(*callbacks).fit(module, token_loader())
    assert_untouched(module, before, flags)


def test_a_failure_after_the_swap_takes_it_back(make_trainer):
    class Failing(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            assert is_compressed(pl_module)
            raise OSError("disk full")

    module = causal_module()
    before = state(module)
    with pytest.raises(OSError, match="disk full"):
        make_trainer(FascCallback(rank=0.5, update_weights=False), Failing()).fit(module, token_loader())
    assert_untouched(module, before)
    assert not hasattr(module.model.config, "quantization_config")


def test_a_frozen_scheduler_stands_still_in_manual_optimization(make_trainer):
    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            x, y = batch
            self.manual_backward(nn.functional.cross_entropy(self(x), y))
            self.optimizers().step()
            self.lr_schedulers().step()

        def configure_optimizers(self):
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [self.optimizer], [torch.optim.lr_scheduler.StepLR(self.optimizer, 1)]

    module = Manual(mlp().net)
    make_trainer(FascCallback(keep=0.8, update_weights=False)).fit(module, feature_loader())
    assert module.optimizer.param_groups[0]["lr"] == 0.1


def test_calibration_steps_are_batches_in_manual_optimization(make_trainer):
    class Two(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            x, y = batch
            self.manual_backward(nn.functional.cross_entropy(self(x), y))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

    callback = RecordingCallback(keep=0.8, calibration_steps=2)
    make_trainer(callback, max_epochs=4).fit(Two(mlp().net), feature_loader(batch_size=16))
    assert callback.batches == 2


def test_a_stop_by_hand_waits_for_the_calibration(make_trainer):
    class Stopping(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 2

    callback = RecordingCallback(rank=0.5, calibration_steps=3)
    trainer = make_trainer(callback, Stopping(), max_epochs=50)
    trainer.fit(causal_module(), token_loader())
    assert callback.batches == 3
    assert trainer.global_step == 5


def test_fast_dev_run(make_trainer):
    module = causal_module()
    trainer = make_trainer(FascCallback(rank=0.5), fast_dev_run=4)
    trainer.fit(module, token_loader())
    assert is_compressed(module)


def test_overflows_under_a_grad_scaler_leave_the_batch_out(make_trainer):
    from lightning.pytorch.plugins import MixedPrecision

    callback = RecordingCallback(rank=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    trainer = make_trainer(callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_epochs=1)
    module = causal_module()
    trainer.fit(module, token_loader(samples=48))
    assert scaler.get_scale() < 2.0**24
    tokens = {callback.kept_moments.tokens(name) for name in callback.kept_moments.shapes}
    assert 0 < min(tokens) < 48 * 16
    assert all(torch.isfinite(callback.kept_moments.layer(name).G).all() for name in callback.kept_moments.shapes)


def test_budgets_are_refused_before_the_first_batch(make_trainer):
    callback = RecordingCallback(keep=0.01)
    with pytest.raises(ValueError, match=r"at least 914 parameters .* keep=0\.01 gives"):
        make_trainer(callback, max_epochs=3).fit(causal_module(), token_loader())
    assert callback.batches == 0


@pytest.mark.parametrize("allocation", ["fisher", "uniform"])
def test_unreached_layers_count_in_the_budget(make_trainer, allocation):
    class Unused(Classifier):
        def __init__(self, spare):
            super().__init__(mlp().net)
            self.spare = nn.Linear(spare, spare)

        def forward(self, x):
            self.spare(nn.functional.pad(x, (0, self.spare.in_features - 12)))
            return self.net(x)

    module = Unused(14)
    callback = FascCallback(keep=0.8, update_weights=False, allocation=allocation)
    with pytest.warns(UserWarning, match="stay dense because no gradient"):
        make_trainer(callback).fit(module, feature_loader())
    assert callback.report.kept <= 0.8
    module = Unused(64)
    before = state(module)
    callback = FascCallback(keep=0.8, update_weights=False, allocation=allocation)
    with (
        pytest.warns(UserWarning, match="stay dense because no gradient"),
        pytest.raises(ValueError, match="Exclude spare"),
    ):
        make_trainer(callback).fit(module, feature_loader())
    assert_untouched(module, before)


def test_a_constant_loss_is_an_error(make_trainer):
    class Constant(Classifier):
        def training_step(self, batch, batch_idx):
            return (self(batch[0]) * 0).sum()

    module = Constant(mlp().net)
    before = state(module)
    with pytest.raises(RuntimeError, match="Every gradient that reached the 3 tapped layers was zero"):
        make_trainer(FascCallback(rank=0.5, update_weights=False)).fit(module, feature_loader())
    assert_untouched(module, before)


def test_setup_for_other_stages_does_nothing(make_trainer):
    module = causal_module()
    trainer = make_trainer(FascCallback(rank=0.5))
    trainer.validate(module, DataLoader(Tokens(), batch_size=4), verbose=False)
    assert not is_compressed(module)
