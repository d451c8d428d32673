from __future__ import annotations

import copy
import csv
import math
from contextlib import nullcontext

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny import Tokens, causal_model, causal_module, feature_loader, mlp, token_loader
from torch import nn
from watching import assert_no_hooks, state

from fasc_lightning import CausalLMModule, DependenceScore, FascCallback, rho
from fasc_lightning.dependence import _layer_scores
from fasc_lightning.dependence._monitor import rho_metrics

BATCH = {"samples": 32, "batch_size": 8}  # four steps of eight sequences of sixteen tokens


def pairs_by_hand(module, batch):
    """Inputs and output gradients of every linear layer of the decoder, float64, shape (samples, length, features)."""
    found, handles = {}, []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and "lm_head" not in name:

            def keep(layer, args, output, name=name):
                output.retain_grad()
                found[name] = (args[0].detach().double(), output)

            handles.append(layer.register_forward_hook(keep))
    module.model(**batch, use_cache=False).loss.backward()
    for handle in handles:
        handle.remove()
    return {name: (x, y.grad.double()) for name, (x, y) in found.items()}


@pytest.mark.parametrize("gradient", ["input", "output"])
def test_the_first_observation_is_rho_of_the_first_batch(make_trainer, gradient):
    module = causal_module()
    untrained = copy.deepcopy(module)
    loader = token_loader(**BATCH)
    callback = FascCallback(monitor_every_n_steps=100, rho_gradient=gradient)
    make_trainer(callback).fit(module, loader)
    rows = callback.rho_history.at(0)
    pairs = pairs_by_hand(untrained, next(iter(loader)))
    assert list(rows) == list(pairs)
    for name, (x, h) in pairs.items():
        g = h @ untrained.get_submodule(name).weight.detach().double() if gradient == "input" else h
        # The last token predicts nothing, and the first one's query chooses among itself alone.
        reached = slice(1 if "q_proj" in name else 0, -1)
        x, g = x[:, reached], g[:, reached]
        assert rows[name]["rho"] == pytest.approx(rho(x.flatten(0, 1), g.flatten(0, 1)).item(), abs=1e-5)
        score = DependenceScore()
        score.update(x, g)
        assert rows[name]["debiased"] == pytest.approx(score.debiased.item(), abs=1e-3)
        assert [rows[name]["low"], rows[name]["high"]] == pytest.approx(score.interval.tolist(), abs=1e-3)
        assert rows[name]["tokens"] == x.shape[0] * x.shape[1]


def test_observations_come_at_every_nth_step_and_change_nothing(make_trainer):
    torch.manual_seed(1)
    watched, plain = causal_module(), causal_module()
    callback = FascCallback(monitor_every_n_steps=3)
    make_trainer(callback, max_epochs=2).fit(watched, token_loader(**BATCH))
    make_trainer(max_epochs=2).fit(plain, token_loader(**BATCH))
    assert callback.rho_history.steps == [0, 3, 6]
    assert len(callback.rho_history) == 3 * 14
    assert_no_hooks(watched)
    assert callback.report is None
    for name, value in state(plain).items():
        assert torch.equal(value, state(watched)[name])


def test_hooks_are_on_only_while_observing(make_trainer):
    class Counting(pl.Callback):
        hooks: list[int] = []  # noqa: RUF012

        def on_before_backward(self, trainer, pl_module, loss):
            self.hooks.append(sum(len(m._forward_hooks) for m in pl_module.modules()))

    counting = Counting()
    make_trainer(FascCallback(monitor_every_n_steps=2), counting).fit(causal_module(), token_loader(**BATCH))
    assert counting.hooks == [14, 0, 14, 0]


def test_a_sample_of_the_tokens_is_looked_at(make_trainer):
    callback = FascCallback(monitor_every_n_steps=100, monitor_tokens=40)
    make_trainer(callback).fit(causal_module(), token_loader(**BATCH))
    assert {row["tokens"] for row in callback.rho_history} == {40}


def test_accumulated_batches_are_one_observation(make_trainer):
    callback = FascCallback(monitor_every_n_steps=1)
    make_trainer(callback, accumulate_grad_batches=2).fit(causal_module(), token_loader(**BATCH))
    assert callback.rho_history.steps == [0, 1]
    assert {row["tokens"] for row in callback.rho_history} == {2 * 8 * 15, 2 * 8 * 14}  # of queries


def test_figures_go_to_loggers_metrics_and_files(make_trainer, tmp_path):
    logger = CSVLogger(tmp_path, name="run")
    callback = FascCallback(monitor_every_n_steps=2, rho_threshold=0.2)
    trainer = make_trainer(callback, logger=logger, log_every_n_steps=1)
    trainer.fit(causal_module(), token_loader(**BATCH))
    with open(f"{logger.log_dir}/metrics.csv") as file:
        logged = {int(row["step"]): row for row in csv.DictReader(file) if row.get("fasc/rho_mean")}
    assert sorted(logged) == [0, 2] or sorted(logged) == [1, 3]  # Lightning's own count of steps
    last = callback.rho_history.at(2)
    name = "model.model.layers.0.self_attn.q_proj"
    row = logged[max(logged)]
    for prefix, column in (("rho", "rho"), ("rho_null", "null"), ("rho_debiased", "debiased")):
        assert float(row[f"{prefix}/{name}"]) == pytest.approx(last[name][column])
        assert trainer.callback_metrics[f"{prefix}/{name}"].item() == pytest.approx(last[name][column])
    values = [r["rho"] for r in last.values()]
    assert float(row["fasc/rho_mean"]) == pytest.approx(np.mean(values))
    assert float(row["fasc/rho_above_threshold"]) == pytest.approx(np.mean([v > 0.2 for v in values]))
    files = {path.name for path in (tmp_path / "run" / "version_0").iterdir()}
    assert {"rho_history.csv", "rho_heatmap.png", "rho_profile.png"} <= files
    reread = type(callback.rho_history).from_csv(tmp_path / "run" / "version_0" / "rho_history.csv")
    assert list(reread) == list(callback.rho_history)


def test_checkpoints_and_early_stopping_can_monitor_rho(make_trainer, tmp_path):
    callback = FascCallback(monitor_every_n_steps=3)
    best = ModelCheckpoint(tmp_path, monitor="fasc/rho_mean", mode="max", filename="{step}", save_top_k=1)
    stopping = EarlyStopping("fasc/rho_debiased_mean", mode="max", patience=1, min_delta=10.0)
    trainer = make_trainer(stopping, callback, best, max_epochs=9, enable_checkpointing=True)
    trainer.fit(causal_module(), token_loader(**BATCH), token_loader(**BATCH))
    assert best.best_model_score is not None
    assert trainer.current_epoch == 2


def test_nothing_to_log_to_says_where_the_table_is(make_trainer, caplog, tmp_path):
    caplog.set_level("INFO")
    callback = FascCallback(monitor_every_n_steps=2)
    make_trainer(callback).fit(causal_module(), token_loader(**BATCH))
    assert "callback.rho_history" in caplog.text
    assert "14 layers" in caplog.text  # the summary
    assert len(callback.rho_history) == 28
    assert not list(tmp_path.rglob("*.png"))


class Stop(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 7:
            raise RuntimeError("power cut")


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_fit_has_the_history_of_one_that_was_not(make_trainer, tmp_path):
    def fit(*callbacks, ckpt_path=None):
        module, callback = causal_module(), FascCallback(monitor_every_n_steps=2)
        saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=4)
        trainer = make_trainer(callback, saving, *callbacks, max_epochs=3, enable_checkpointing=True)
        with pytest.raises(RuntimeError, match="power cut") if callbacks else nullcontext():
            trainer.fit(module, token_loader(**BATCH), ckpt_path=ckpt_path)
        return module, callback.rho_history

    whole_module, whole = fit()
    (tmp_path / "last.ckpt").unlink()
    _, cut = fit(Stop())
    assert cut.steps == [0, 2, 4, 6]
    module, resumed = fit(ckpt_path=tmp_path / "last.ckpt")
    assert resumed.steps == whole.steps == [0, 2, 4, 6, 8, 10]
    assert list(resumed) == list(whole)
    for name, value in state(whole_module).items():
        assert torch.equal(value, state(module)[name])


def test_a_new_fit_has_a_new_history(make_trainer):
    callback = FascCallback(monitor_every_n_steps=2)
    for _ in range(2):
        make_trainer(callback).fit(causal_module(), token_loader(**BATCH))
    assert callback.rho_history.steps == [0, 2]
    assert len(callback.rho_history) == 28


def test_monitoring_goes_with_compression(make_trainer):
    module = causal_module()
    callback = FascCallback(keep=0.8, monitor_every_n_steps=2)
    make_trainer(callback, max_epochs=2).fit(module, token_loader(**BATCH))
    assert callback.rho_history.steps == [0, 2, 4, 6]  # the last two while calibrating
    assert callback.report.kept <= 0.8
    assert_no_hooks(module)
    frozen = FascCallback(keep=0.8, monitor_every_n_steps=2, update_weights=False)
    make_trainer(frozen, max_epochs=2).fit(causal_module(), token_loader(**BATCH))
    assert frozen.rho_history.steps == [0, 2]  # not where the weights stand still


def test_a_watching_callback_may_stand_beside_a_compressing_one(make_trainer):
    watching = FascCallback(monitor_every_n_steps=2, targets=["q_proj"])
    compressing = FascCallback(keep=0.8, targets=["down_proj"])
    make_trainer(watching, compressing).fit(causal_module(), token_loader(**BATCH))
    assert len(watching.rho_history.layers) == 2
    assert len(compressing.report.layers) == 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own use of transformers
def test_compressed_and_adapted_modules_can_be_watched(make_trainer):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(causal_model(), peft.LoraConfig(target_modules=["q_proj"]))
    callback = FascCallback(monitor_every_n_steps=2, targets=r".*q_proj\.base_layer")
    make_trainer(callback).fit(CausalLMModule(model), token_loader(**BATCH))
    reasons = {row["layer"].split("layers.")[1][0]: row["reason"] for row in callback.rho_history}
    assert reasons == {"0": "no tokens", "1": ""}  # below the first adapter there is no gradient
    module = causal_module()
    make_trainer(FascCallback(keep=0.8)).fit(module, token_loader(**BATCH))
    callback = FascCallback(monitor_every_n_steps=2)
    make_trainer(callback).fit(module, token_loader(**BATCH))
    assert callback.rho_history.steps == [0, 2]


# Bad input.


def test_padding_does_not_count(make_trainer):
    batch = [{key: value[None] for key, value in Tokens(1, 24)[0].items()}]
    padded = [{key: torch.cat([value, torch.full_like(value, fill)], 1) for (key, value), fill in
               zip(batch[0].items(), (0, 0, -100), strict=True)}]  # fmt: skip
    histories = []
    for batches in (batch, padded):
        callback = FascCallback(monitor_every_n_steps=1)
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        make_trainer(callback).fit(causal_module(), loader)
        histories.append(callback.rho_history)
    for one, other in zip(*histories, strict=True):
        assert one["tokens"] == other["tokens"] == (22 if "q_proj" in one["layer"] else 23)
        assert one["rho"] == pytest.approx(other["rho"], abs=1e-4)


@pytest.mark.parametrize("real", [0, 1])
def test_batches_with_one_token_or_none_are_nan_with_a_reason(make_trainer, real):
    ids = torch.randint(3, 60, (1, 8))
    mask = (torch.arange(8) < real).long()[None]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    callback = FascCallback(monitor_every_n_steps=1)
    make_trainer(callback).fit(causal_module(), torch.utils.data.DataLoader([batch], batch_size=None))
    rows = callback.rho_history.at(0).values()
    assert {row["reason"] for row in rows} == {"fewer than 4 tokens"}
    assert all(math.isnan(row["rho"]) and math.isnan(row["low"]) for row in rows)


def test_a_loss_that_is_not_finite_does_not_stop_the_training(make_trainer):
    class Exploding(CausalLMModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 0 else 1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def on_before_optimizer_step(self, optimizer):
            optimizer.zero_grad()

    callback = FascCallback(monitor_every_n_steps=1)
    trainer = make_trainer(callback)
    trainer.fit(Exploding(causal_model().train()), token_loader(**BATCH))
    reasons = {row["reason"] for row in callback.rho_history.at(0).values()}
    assert reasons == {"activations or gradients that are not finite"}
    assert {row["reason"] for row in callback.rho_history.at(3).values()} == {""}
    assert math.isfinite(trainer.callback_metrics["fasc/rho_mean"].item())


def test_layers_unused_in_some_steps_have_gaps_with_a_reason(make_trainer):
    class Sometimes(type(mlp())):
        def training_step(self, batch, batch_idx):
            x, y = batch
            x = self.net[2](self.net[1](self.net[0](x)))
            x = torch.cat([self.net[3](x), x[:, :0]], 1) if batch_idx % 2 == 0 else x[:, :16]
            return nn.functional.cross_entropy(self.net[5](torch.relu(x)), y)

    callback = FascCallback(monitor_every_n_steps=1)
    make_trainer(callback).fit(Sometimes(mlp().net), feature_loader())
    reasons = [[callback.rho_history.at(step)["net.3"]["reason"] for step in steps] for steps in ([0, 2], [1, 3])]
    assert reasons == [["", ""], ["no tokens", "no tokens"]]


def test_half_precision_has_scores(make_trainer):
    callback = FascCallback(monitor_every_n_steps=1)
    make_trainer(callback, precision="bf16-mixed").fit(causal_module(), token_loader(**BATCH))
    assert {row["reason"] for row in callback.rho_history} == {""}


def test_what_no_gradient_reaches_is_left_as_it_is(make_trainer):
    class Probe(type(mlp())):
        def training_step(self, batch, batch_idx):
            x, y = batch
            with torch.inference_mode():
                hidden = self.net[0](x)
            assert not self.net[3](hidden.clone()).requires_grad  # frozen: it can go to numpy
            return nn.functional.cross_entropy(self.net[5](self.net[3](hidden.clone()).detach()), y)

    module = Probe(mlp().net)
    module.net[3].requires_grad_(False)
    callback = FascCallback(monitor_every_n_steps=1)
    make_trainer(callback).fit(module, feature_loader())
    rows = callback.rho_history.at(0)
    assert [rows[name]["reason"] for name in ("net.0", "net.3", "net.5")] == ["no tokens", "no tokens", ""]


def test_a_score_that_fails_does_not_stop_the_training(make_trainer, monkeypatch):
    def failing(samples):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(_layer_scores, "add_samples_", failing)
    callback = FascCallback(monitor_every_n_steps=3)
    with pytest.warns(UserWarning, match=r"Could not observe rho of 'model.model.*out of memory"):
        make_trainer(callback).fit(causal_module(), token_loader(**BATCH))
    assert {row["reason"] for row in callback.rho_history} == {"RuntimeError: out of memory"}


def test_batches_count_in_one_scale_whether_the_loss_is_a_mean_or_a_sum(make_trainer):
    class Summed(CausalLMModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * super().loss_terms(batch)

        def loss_terms(self, batch):
            return 1

    data = Tokens(24, 24)[:24]
    batches = [{key: value[part] for key, value in data.items()} for part in (slice(0, 16), slice(16, 24))]
    for batch in batches[1:]:
        batch["labels"] = batch["labels"].clone()
        batch["labels"][:, 6:] = -100  # a mean over few terms
    histories = []
    for kind in (CausalLMModule, Summed):
        callback = FascCallback(monitor_every_n_steps=1)
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        make_trainer(callback, accumulate_grad_batches=2).fit(kind(causal_model().train()), loader)
        histories.append(callback.rho_history)
    for one, other in zip(*histories, strict=True):
        assert one["rho"] == pytest.approx(other["rho"], abs=1e-4)


def test_manual_optimisation_is_observed_batch_by_batch(make_trainer):
    class Manual(type(mlp())):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)  # which no step counts
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    module = Manual(mlp().net)
    callback = FascCallback(monitor_every_n_steps=2)
    make_trainer(callback, max_epochs=2).fit(module, feature_loader())
    assert callback.rho_history.steps == [0, 2, 4, 6]
    assert {row["tokens"] for row in callback.rho_history} == {8}
    assert_no_hooks(module)


def test_old_values_do_not_stand_for_undefined_ones(make_trainer):
    class Looking(pl.Callback):
        seen: list[bool] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer, *args):
            self.seen.append("rho/net.3" in trainer.callback_metrics)

    class Sometimes(type(mlp())):
        def training_step(self, batch, batch_idx):
            x, y = batch
            x = torch.relu(self.net[0](x))
            x = self.net[3](x) if batch_idx % 2 == 0 else x[:, :16]
            return nn.functional.cross_entropy(self.net[5](x), y)

    looking = Looking()
    make_trainer(FascCallback(monitor_every_n_steps=1), looking).fit(Sometimes(mlp().net), feature_loader())
    assert looking.seen == [True, False, True, False]


def test_the_table_is_written_when_a_fit_is_broken_off(make_trainer, tmp_path):
    logger = CSVLogger(tmp_path, name="run")
    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer(FascCallback(monitor_every_n_steps=2), Stop(), logger=logger, max_epochs=3).fit(
            causal_module(), token_loader(**BATCH)
        )
    assert "\n6," in (tmp_path / "run" / "version_0" / "rho_history.csv").read_text()


def test_input_and_output_gradients_can_be_watched_side_by_side(make_trainer):
    both = [FascCallback(monitor_every_n_steps=2, rho_gradient=gradient) for gradient in ("input", "output")]
    make_trainer(*both).fit(causal_module(), token_loader(**BATCH))
    assert list(both[0].rho_history) != list(both[1].rho_history)


def test_too_few_sequences_leave_companions_undefined_and_say_so_once(make_trainer, tmp_path, caplog):
    caplog.set_level("INFO")
    logger = CSVLogger(tmp_path, name="run")
    callback = FascCallback(monitor_every_n_steps=1)
    trainer = make_trainer(callback, logger=logger, log_every_n_steps=1)
    trainer.fit(causal_module(), token_loader(samples=6, batch_size=2))
    assert {row["reason"] for row in callback.rho_history} == {"fewer than 4 sequences, too few for all but rho"}
    for row in callback.rho_history:
        assert math.isfinite(row["rho"])
        assert all(math.isnan(row[name]) for name in ("null", "debiased", "low", "high"))
    assert caplog.text.count("layers have rho at step 0, but not its null, debiased value or interval") == 1
    assert not any(name.startswith("rho_") for name in trainer.callback_metrics)
    assert "fasc/rho_mean" in trainer.callback_metrics
    files = tmp_path / "run" / "version_0"
    assert {"rho_heatmap.png", "rho_profile.png"} <= {path.name for path in files.iterdir()}
    reread = type(callback.rho_history).from_csv(files / "rho_history.csv")
    assert repr(list(reread)) == repr(list(callback.rho_history))


def test_small_batches_of_one_step_are_scored_together(make_trainer):
    callback = FascCallback(monitor_every_n_steps=1)
    make_trainer(callback, accumulate_grad_batches=4).fit(causal_module(), token_loader(samples=16, batch_size=2))
    assert callback.rho_history.steps == [0, 1]
    for row in callback.rho_history:
        assert row["reason"] == ""
        assert row["low"] < row["debiased"] < row["high"]
    whole = FascCallback(monitor_every_n_steps=1)
    make_trainer(whole).fit(causal_module(), token_loader(samples=16, batch_size=8))
    first, at_once = callback.rho_history.at(0), whole.rho_history.at(0)
    for name, row in at_once.items():
        assert first[name]["tokens"] == row["tokens"]
        assert first[name]["debiased"] == pytest.approx(row["debiased"], abs=1e-3)


def test_undefined_values_are_not_logged():
    row = {"step": 0, "layer": "a", "rho": 0.5, "null": 0.2, "debiased": math.nan, "low": math.nan, "high": math.nan}
    row["iid_floor"] = 0.3
    undefined = {**row, "layer": "b", "rho": math.nan, "null": math.nan, "iid_floor": math.nan}
    found = rho_metrics([row, undefined], 0.4, "-")
    fractions = {"fasc-rho_above_threshold": 1.0, "fasc-rho_floor_above_threshold": 0.0}
    assert found == {"rho-a": 0.5, "rho_null-a": 0.2, "fasc-rho_mean": 0.5, **fractions}
    assert rho_metrics([row, undefined], 0.2)["fasc/rho_floor_above_threshold"] == 1.0
    assert rho_metrics([undefined], 0.4) == {}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rho_threshold": 1.5}, ValueError, r"`rho_threshold` to be in \[0, 1\]"),
        ({"rho_threshold": -0.1}, ValueError, "rho_threshold"),
        ({"rho_threshold": "high"}, TypeError, "rho_threshold"),
        ({"monitor_every_n_steps": 0}, ValueError, "monitor_every_n_steps"),
        ({"monitor_every_n_steps": 1.5}, ValueError, "monitor_every_n_steps"),
        ({"monitor_tokens": 3}, ValueError, "at least 4 but got 3"),
        ({"emergence_observations": 0}, ValueError, "emergence_observations"),
        ({"rho_gradient": "weight"}, ValueError, "rho_gradient"),
        ({"calibration_steps": 5}, ValueError, "together with `calibration_steps`"),
        ({"update_weights": False}, ValueError, "nothing is compressed"),
        ({"gate": 0.3}, ValueError, "together with `gate`"),
        ({"gate": 1.3, "keep": 0.5}, ValueError, "gate"),
        ({"monitor_every_n_steps": None}, ValueError, "monitor=50 to only track rho"),
    ],
)
def test_options_are_checked_at_once(options, error, match):
    with pytest.raises(error, match=match):
        FascCallback(**{"monitor_every_n_steps": 5, **options})
