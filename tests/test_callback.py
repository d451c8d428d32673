from __future__ import annotations

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from inside import layers_of
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from tiny import (
    Classifier,
    Patches,
    causal_model,
    causal_module,
    feature_loader,
    mlp,
    token_loader,
)
from torch import nn
from watching import RecordingCallback, assert_no_hooks, state

from fasc_lightning import CausalLMModule, FascCallback
from fasc_lightning.layers import compressed_layers, is_compressed, make_lowrank, swap_modules
from fasc_lightning.solvers import fasc

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


def test_options_that_are_set_later_count_in_the_next_fit(make_trainer):
    seen = []

    def mask(batch):
        seen.append(batch["input_ids"].shape)
        return batch["attention_mask"].bool()

    callback = FascCallback(rank=0.5, refit=False, allocation="fisher")
    callback.update_weights, callback.passes, callback.seed = False, 2, 3
    callback.monitor_every_n_steps, callback.rho_threshold, callback.token_mask = 2, 0.0, mask
    callback.recovery = "factors"
    module, trainer = causal_module(), make_trainer(callback, max_epochs=3)
    trainer.fit(module, token_loader(samples=8, batch_size=2))
    assert len(seen) == 2 + 2 * 4  # two observations of the first epoch, and two passes over four batches
    assert callback.rho_history.steps == [0, 2]
    assert trainer.callback_metrics["fasc/rho_above_threshold"] == 1
    assert callback.report.options["passes"] == 2
    assert callback.report.seed == 3
    make_trainer(callback).fit(module, token_loader())
    assert callback.report.recovery["arm"] == "factors"


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
        def on_fit_end(self, trainer, pl_module):
            self.weights = {n: m.weight.detach().clone() for n, m in layers_of(self).items()}
            super().on_fit_end(trainer, pl_module)

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
    assert set(saved["seconds"]) == {"calibrate", "factorize", "swap", "refit"}
    assert saved["peak_memory_bytes"] > 0
    row = saved["layers"][0]
    assert set(row) == {
        "name", "shape", "rank", "layout", "tokens", "rho", "rho_null", "rho_debiased", "loss", "method", "flags"
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


# The gate.


@pytest.mark.parametrize("by", ["rho", "debiased"])
def test_the_gate_chooses_the_solver_of_each_layer(make_trainer, by):
    plain = FascCallback(keep=0.8, gate=0.0, gate_by=by, update_weights=False)
    make_trainer(plain).fit(causal_module(), token_loader(samples=32, batch_size=8))
    column = {"rho": "rho", "debiased": "rho_debiased"}[by]
    values = sorted(getattr(row, column) for row in plain.report.layers)
    gate = max(0.0, (values[6] + values[7]) / 2)  # between two layers, if they are above 0
    module = causal_module()
    callback = FascCallback(keep=0.8, gate=gate, gate_by=by, update_weights=False)
    make_trainer(callback).fit(module, token_loader(samples=32, batch_size=8))
    for row in callback.report.layers:
        assert row.method == ("fasc" if getattr(row, column) > gate else "svd")
    methods = {row.method for row in callback.report.layers}
    assert methods == {"fasc", "svd"}
    assert callback.report.kept <= 0.8
    assert "layers on svd" in str(callback.report)


def test_layers_whose_rho_is_undefined_keep_the_method(make_trainer, caplog):
    caplog.set_level("INFO")
    callback = FascCallback(keep=0.8, gate=0.99, update_weights=False)
    make_trainer(callback).fit(causal_module(), token_loader(samples=3, batch_size=1))
    assert {row.method for row in callback.report.layers} == {"fasc"}
    assert all("fewer than 4 sequences, too few for all but rho" in row.flags for row in callback.report.layers)
    assert all(math.isnan(row.rho_debiased) and math.isfinite(row.rho) for row in callback.report.layers)
    assert "debiased rho of 14 layers is undefined, so that the gate leaves them to fasc" in caplog.text
    assert "fewer than 4 sequences" in str(callback.report)


def test_a_gate_that_selects_nothing_says_so_and_the_papers_rho_is_pooled(make_trainer):
    callback = FascCallback(keep=0.8, gate=0.99, gate_by="pooled", update_weights=False)
    make_trainer(callback).fit(causal_module(), token_loader(samples=32, batch_size=8))
    assert {row.method for row in callback.report.layers} == {"svd"}
    assert "gate 0.99 on pooled rho: 0 layers on fasc, 14 layers on svd" in str(callback.report)
    with pytest.raises(ValueError, match=r"`gate_exclude` to match targeted layers but 'heda' matches none"):
        make_trainer(FascCallback(keep=0.8, gate=0.3, gate_exclude=["heda"])).fit(causal_module(), token_loader())


def test_the_papers_exclusions_and_flags_are_in_the_report(make_trainer):
    callback = FascCallback(keep=0.8, gate=0.0, gate_by="rho", gate_exclude="paper", update_weights=False)
    make_trainer(callback).fit(causal_module(), token_loader(samples=16))
    rows = {row.name.removeprefix("model.model.layers."): row for row in callback.report.layers}
    assert rows["0.self_attn.q_proj"].flags == ("early attention",)
    assert rows["1.mlp.down_proj"].flags == ("last projection",)
    assert rows["0.mlp.up_proj"].flags == ()
    assert rows["1.mlp.down_proj"].method == "svd"
    assert rows["0.mlp.up_proj"].method == "fasc"
