from __future__ import annotations

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import (
    Classifier,
    Patches,
    Tokens,
    causal_model,
    causal_module,
    feature_loader,
    mlp,
    token_loader,
)
from torch import nn
from torch.utils.data import DataLoader

from fasc_lightning import CausalLMModule, FascCallback
from fasc_lightning.lowrank import make_lowrank
from fasc_lightning.solvers import fasc
from fasc_lightning.swap import compressed_layers, is_compressed, swap_modules


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_untouched(module, before, flags=None):
    """The module is exactly what it was: weights, structure, gradient flags; and no hook is left."""
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not is_compressed(module)
    assert_no_hooks(module)
    if flags is not None:
        assert {name: p.requires_grad for name, p in module.named_parameters()} == flags


def assert_no_hooks(module):
    for m in module.modules():
        assert not m._forward_hooks
        assert not m._forward_pre_hooks
        assert not m._backward_hooks


class RecordingCallback(FascCallback):
    """Keeps a copy of the moments and counts the batches that were calibrated."""

    batches = 0

    def on_train_batch_end(self, *args):
        self.batches += self._calibrating
        super().on_train_batch_end(*args)

    def on_fit_end(self, trainer, pl_module):
        self.kept_moments = copy.deepcopy(self._moments)
        super().on_fit_end(trainer, pl_module)


# The phases.


def test_a_fit_ends_smaller(make_trainer):
    module = causal_module()
    callback = FascCallback(rank=0.5)
    make_trainer(callback, max_epochs=2).fit(module, token_loader())
    report = callback.report
    budget = sum(k * (m + n - k) for m, n in (r.shape for r in report.layers) for k in [min(m, n) // 2])
    assert report.targeted["compressed"].parameters <= budget
    assert report.targeted["compressed"].parameters > 0.95 * budget
    assert_no_hooks(module)
    assert all(p.requires_grad for p in module.parameters())
    output = module.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert output.shape == (1, 7)


def test_only_the_last_epoch_is_calibrated(make_trainer):
    callback = RecordingCallback(rank=0.5)
    make_trainer(callback, max_epochs=3).fit(causal_module(), token_loader(samples=8, batch_size=2))
    assert callback.batches == 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_calibration_steps_are_the_last_optimizer_steps(make_trainer, accumulate):
    callback = RecordingCallback(rank=0.5, calibration_steps=3)
    trainer = make_trainer(callback, max_steps=5, max_epochs=-1, accumulate_grad_batches=accumulate)
    trainer.fit(causal_module(), token_loader(samples=8, batch_size=2))
    assert trainer.global_step == 5
    assert callback.batches == 3 * accumulate


def test_early_stopping_waits_for_the_calibration(make_trainer):
    class Stopping(CausalLMModule):
        def on_train_epoch_end(self):
            self.log("plateau", 1.0)

    module = Stopping(causal_model().train())
    callback = RecordingCallback(rank=0.5, calibration_steps=3)
    stopping = EarlyStopping("plateau", patience=1, check_on_train_epoch_end=True)
    trainer = make_trainer(callback, stopping, max_epochs=50)
    trainer.fit(module, token_loader(samples=8, batch_size=2))
    assert callback.batches == 3
    assert trainer.global_step == 2 * 4 + 3
    assert is_compressed(module)
    assert trainer.fit_loop.min_steps is None


def test_max_time_waits_for_the_calibration(make_trainer):
    module = causal_module()
    callback = RecordingCallback(rank=0.5, calibration_steps=2)
    make_trainer(callback, max_time={"seconds": 1}, max_epochs=-1).fit(module, token_loader())
    assert callback.batches == 2
    assert is_compressed(module)


def test_frozen_calibration_changes_nothing_but_the_layers(make_trainer):
    class Watched(Classifier):
        """Has dropout, running statistics, a scheduler and weight decay, all of which must stand still."""

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

        def on_train_end(self):
            self.seen = state(self)
            self.rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.steps = len(self.trainer.optimizers[0].state)

        def training_step(self, batch, batch_idx):
            assert not self.training
            assert not any(p.requires_grad for p in self.parameters())
            return super().training_step(batch, batch_idx)

    module = Watched(nn.Sequential(Patches(), nn.Dropout(0.5)))
    module.net[0].stem.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    before = state(module)
    callback = FascCallback(rank=0.5, update_weights=False)
    trainer = make_trainer(callback)
    trainer.fit(module, feature_loader((1, 16, 16)))
    assert all(torch.equal(module.seen[name], before[name]) for name in before)
    assert module.rate == 0.1
    assert module.steps == 0
    assert module.training
    assert is_compressed(module)
    kept = {name: p.requires_grad for name, p in module.named_parameters() if name in flags}
    assert kept == {name: flags[name] for name in kept}
    assert all(p.grad is None for p in module.parameters())
    assert "optimizer_step" not in vars(trainer.strategy)


def test_frozen_last_epoch_after_training(make_trainer):
    module = causal_module()
    weights = {}

    class Snapshot(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            weights[trainer.current_epoch] = state(pl_module)

    before = state(module)
    make_trainer(FascCallback(rank=0.5, update_weights=False), Snapshot(), max_epochs=2).fit(module, token_loader())
    assert any(not torch.equal(weights[0][name], before[name]) for name in before)
    assert all(torch.equal(weights[1][name], weights[0][name]) for name in before)


def test_validation_does_not_enter_the_statistics(make_trainer):
    def moments(val_loader):
        callback = RecordingCallback(rank=0.5, update_weights=False)
        make_trainer(callback, val_check_interval=1).fit(causal_module(), token_loader(), val_loader)
        return callback.kept_moments

    plain, validated = moments(None), moments(token_loader(seed=9))
    for name in plain.shapes:
        assert torch.equal(plain.layer(name).A, validated.layer(name).A)


@pytest.mark.parametrize(
    ("batch_size", "trainer_options", "loss_terms"),
    [
        (1, {}, None),
        (8, {}, None),
        (2, {"accumulate_grad_batches": 2}, None),
        (2, {}, lambda batch: int((batch["labels"][:, 1:] != -100).sum())),
    ],
)
def test_moments_do_not_depend_on_how_the_loss_is_averaged(make_trainer, batch_size, trainer_options, loss_terms):
    def gather(size, options, terms=None):
        callback = RecordingCallback(rank=0.5, update_weights=False, loss_terms=terms)
        loader = token_loader(batch_size=size, padded=True)
        make_trainer(callback, **options).fit(causal_module(), loader)
        return callback.kept_moments

    reference = gather(4, {})
    other = gather(batch_size, trainer_options, loss_terms)
    for name in reference.shapes:
        a, b = reference.layer(name), other.layer(name)
        assert a.tokens == b.tokens
        torch.testing.assert_close(a.A, b.A, rtol=1e-4, atol=1e-5 * a.A.abs().max().item())
        torch.testing.assert_close(a.G, b.G, rtol=1e-4, atol=1e-4 * a.G.abs().max().item())


def test_the_amp_scale_is_undone(make_trainer):
    from lightning.pytorch.plugins import MixedPrecision

    def gather(**options):
        callback = RecordingCallback(rank=0.5, update_weights=False)
        make_trainer(callback, **options).fit(causal_module(), token_loader())
        return callback.kept_moments

    reference = gather()
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    for other in (
        gather(plugins=[MixedPrecision("16-mixed", "cpu", scaler)]),
        gather(precision="bf16-mixed"),
    ):
        for name in reference.shapes:
            expected, found = reference.layer(name).G, other.layer(name).G
            assert (found - expected).norm() < 0.1 * expected.norm()


def test_a_summed_loss_is_taken_as_it_is(make_trainer):
    class Summed(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.functional.cross_entropy(self(x), y, reduction="sum")

    torch.manual_seed(0)
    mean_module = mlp()
    sum_module = Summed(copy.deepcopy(mean_module.net))
    gathered = []
    for module, terms in ((mean_module, "mean"), (sum_module, "sum"), (mean_module, None)):
        callback = RecordingCallback(keep=1.0, update_weights=False, loss_terms=terms)
        make_trainer(callback).fit(copy.deepcopy(module), feature_loader())
        gathered.append(callback.kept_moments)
    for name in gathered[0].shapes:
        for other in gathered[1:]:
            torch.testing.assert_close(gathered[0].layer(name).G, other.layer(name).G)


def test_manual_optimization(make_trainer):
    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            x, y = batch
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(x), y))
            optimizer.step()

    module = Manual(mlp().net)
    before = state(module)
    callback = RecordingCallback(keep=0.8, update_weights=False)
    make_trainer(callback).fit(module, feature_loader())
    assert callback.kept_moments.tokens("net.0") == 32
    assert is_compressed(module)
    dense = [name for name in before if name in module.state_dict()]
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in dense)


def test_token_fraction_keeps_its_share_and_the_result_close(make_trainer):
    callback = RecordingCallback(rank=0.5, update_weights=False, token_fraction=0.25)
    make_trainer(callback).fit(causal_module(), token_loader(samples=16, length=32))
    tokens = {callback.kept_moments.tokens(name) for name in callback.kept_moments.shapes}
    assert len(tokens) == 1
    assert 0.15 * 512 < tokens.pop() < 0.35 * 512


def test_averaged_weights_are_the_ones_compressed(make_trainer):
    """WeightAveraging puts its weights in place in `on_train_end`, wherever it stands in the list."""
    seen = {}

    class Last(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            seen.update(state(pl_module))

    class Reading(FascCallback):
        def _factorize(self, trainer):
            self.weights = {n: m.weight.detach().clone() for n, m in self._layers.items()}
            return super()._factorize(trainer)

    for order in (0, 1):
        module = causal_module()
        callback = Reading(rank=0.5)
        callbacks = [callback, WeightAveraging()] if order else [WeightAveraging(), callback]
        make_trainer(Last(), *callbacks, max_epochs=2).fit(module, token_loader())
        for name, weight in callback.weights.items():
            assert torch.equal(weight, seen[f"{name}.weight"])


def test_optimizer_state_of_the_dense_layers_is_cleared(make_trainer, tmp_path):
    module = causal_module()
    trainer = make_trainer(FascCallback(rank=0.5))
    trainer.fit(module, token_loader())
    assert trainer.optimizers == []
    path = tmp_path / "after.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert saved["optimizer_states"] == []
    assert any("coefficients" in name for name in saved["state_dict"])
    dense_names = {r.name + ".weight" for r in trainer.callbacks[0].report.layers if r.layout != "dense"}
    assert not dense_names & set(saved["state_dict"])


def test_a_compressed_module_trains_on_in_a_new_trainer(make_trainer):
    module = causal_module()
    make_trainer(FascCallback(rank=0.5)).fit(module, token_loader())
    before = state(module)
    make_trainer().fit(module, token_loader())
    changed = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
    assert any("coefficients" in name for name in changed)


def test_figures_reach_the_loggers(make_trainer, tmp_path):
    loggers = [CSVLogger(tmp_path, "a"), CSVLogger(tmp_path, "b")]
    callback = FascCallback(rank=0.5)
    make_trainer(callback, logger=loggers, log_every_n_steps=1).fit(causal_module(), token_loader())
    for logger in loggers:
        text = (tmp_path / logger.name / "version_0" / "metrics.csv").read_text()
        assert "fasc/kept" in text
        name = callback.report.layers[0].name
        assert f"fasc_rank/{name}" in text
        assert f"rho/{name}" in text


def test_report_is_complete_and_json(make_trainer, tmp_path):
    import json

    callback = FascCallback(keep=0.7, update_weights=False)
    module = causal_module()
    make_trainer(callback).fit(module, token_loader(samples=32))
    report = callback.report
    path = tmp_path / "report.json"
    report.to_json(path)
    saved = json.loads(path.read_text())
    actual = sum(p.numel() for layer in compressed_layers(module).values() for p in layer.parameters())
    dense = sum(module.get_submodule(row["name"]).weight.numel() for row in saved["layers"] if row["layout"] == "dense")
    assert saved["targeted"]["parameters"]["compressed"] == actual + dense
    assert saved["whole"]["parameters"]["compressed"] == sum(p.numel() for p in module.parameters())
    assert saved["targeted"]["parameters"]["compressed"] <= 0.7 * saved["targeted"]["parameters"]["dense"]
    flops = saved["targeted"]["flops_per_token"]
    assert flops["compressed"] == 2 * saved["targeted"]["parameters"]["compressed"]
    assert set(saved["seconds"]) == {"calibrate", "factorize", "swap"}
    assert saved["peak_memory_bytes"] > 0
    row = saved["layers"][0]
    assert set(row) == {
        "name", "shape", "rank", "layout", "tokens", "rho", "rho_null", "rho_debiased", "loss"
    }  # fmt: skip
    assert 0 <= row["rho"] <= 1
    assert row["tokens"] == 32 * 16
    assert "targeted parameters kept" in str(report)


def test_full_rank_is_the_dense_model(make_trainer):
    """At the full budget every layer is cheapest dense."""
    module = causal_module()
    ids = torch.randint(3, 60, (2, 10))
    expected = module.model(ids).logits
    callback = FascCallback(rank=1.0, update_weights=False)
    make_trainer(callback).fit(module, token_loader())
    assert {layer.layout for layer in callback.report.layers} == {"dense"}
    assert torch.equal(module.model(ids).logits, expected)


def test_factors_of_full_rank_compute_what_the_dense_layers_do(make_trainer):
    module = causal_module()
    ids = torch.randint(3, 60, (2, 10))
    expected = module.model(ids).logits
    callback = RecordingCallback(keep=1.0, update_weights=False)
    make_trainer(callback).fit(module, token_loader())
    factors = {}
    for name in list(callback.kept_moments.shapes):
        layer = module.get_submodule(name)
        found = fasc(layer.weight.detach(), callback.kept_moments.layer(name))
        factors[name] = make_lowrank(found.left, found.right, None, "factors", dtype=torch.float32)
    swap_modules(module, factors)
    torch.testing.assert_close(module.model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_model(make_trainer):
    results = []
    for _ in range(2):
        module = causal_module()
        callback = FascCallback(rank=0.5, update_weights=False, token_fraction=0.5, seed=3)
        make_trainer(callback).fit(module, token_loader())
        results.append(state(module))
    assert list(results[0]) == list(results[1])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


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
        ({"rank": 0.5, "method": "pca"}, ValueError, "one of fasc, svd, svd-llm but got 'pca'"),
        ({"rank": 0.5, "allocation": "best"}, ValueError, "one of fisher, uniform"),
        ({"rank": 0.5, "layout": "coo"}, ValueError, "one of auto, pivot, factors"),
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
    with pytest.raises(MisconfigurationException, match="holds low-rank layers already"):
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
        ("no-grad", RuntimeError, "No gradient reached any of the 14 tapped layers: the loss of batch 0 of epoch 0"),
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
    monkeypatch.setattr("fasc_lightning._checks.available_memory", lambda device: 1000)
    module = causal_module()
    before = state(module)
    with pytest.raises(MemoryError, match=r"need up to 0.00 GB and 0.00 GB is free on cpu"):
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


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_sharded_strategies_are_refused(name):
    from lightning.pytorch import strategies

    from fasc_lightning._checks import check_strategy

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
    with pytest.raises(MisconfigurationException, match="one FascCallback in a fit"):
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
