"""FascTrainerCallback in Trainers of transformers."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import transformers
from hf_cases import StandIn, trainer_of
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from tiny import Tokens, causal_model, causal_module, token_loader
from watching import assert_no_hooks, state

from fasc_lightning import FascCallback, FascTrainerCallback, RhoHistory, compress, load_compressed
from fasc_lightning.layers import is_compressed
from fasc_lightning.trainer_callback import HISTORY, check_arguments

pytestmark = pytest.mark.filterwarnings("ignore:.*saw fewer tokens than they have features")

#: A compression that takes no time.
QUICK = {"keep": 0.8, "refit": False, "allocation": "fisher"}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_a_training_ends_smaller_with_rho_observed(tmp_path):
    callback = FascTrainerCallback(**QUICK, monitor=4)
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    assert is_compressed(trainer.model)
    assert callback.report.kept <= 0.8
    assert not callback.report.layers[0].name.startswith("model.model.")
    assert callback.rho_history.steps == [0, 4, 8, 12]
    assert callback.rho_history.layers == [row.name for row in callback.report.layers]
    assert logged(trainer, "fasc/kept") == [callback.report.kept]
    assert len(logged(trainer, "fasc/rho_mean")) == 4
    assert not any(name.startswith(("rho/", "fasc_rank/")) for entry in trainer.state.log_history for name in entry)
    assert_no_hooks(trainer.model)
    assert not {"training_step", "compute_loss"} & set(vars(trainer))
    assert trainer.optimizer is None
    assert RhoHistory.from_csv(tmp_path / "rho_history.csv").steps == [0, 4, 8, 12]


def test_layers_are_logged_on_request(tmp_path):
    trainer = trainer_of(tmp_path, FascTrainerCallback(**QUICK, monitor=8, log_layers=True))
    trainer.train()
    assert len(logged(trainer, "rho/model.layers.0.mlp.up_proj")) == 2
    assert len(logged(trainer, "fasc_rank/model.layers.0.mlp.up_proj")) == 1


def test_the_result_is_that_of_compress_on_the_first_batches(tmp_path):
    model = causal_model().train()
    trainer = trainer_of(tmp_path, FascTrainerCallback(**QUICK, calibration_steps=5), model=model, learning_rate=0.0)
    dense = copy.deepcopy(model)
    trainer.train()
    compress(dense, list(token_loader(samples=32))[:5], **QUICK, progress=False)
    ids = torch.randint(3, 60, (2, 9))
    torch.testing.assert_close(model.eval()(ids).logits, dense.eval()(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"size": 0.3}, {"quantize": "int4"}, {"keep": 0.7}])
def test_a_saved_model_reloads(tmp_path, options):
    trainer = trainer_of(tmp_path, FascTrainerCallback(**options))
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    ids = torch.randint(3, 60, (2, 9))
    model = trainer.model.eval()
    torch.testing.assert_close(load_compressed(tmp_path / "saved")(ids).logits, model(ids).logits)


def test_observing_does_not_change_the_training(tmp_path):
    states = []
    for callbacks in ([], [FascTrainerCallback(monitor=2)]):
        trainer = trainer_of(tmp_path, *callbacks, train_sampling_strategy="random", activation_checkpointing=True)
        trainer.train()
        states.append(state(trainer.model))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_an_observation_covers_the_accumulated_batches(tmp_path):
    callback = FascTrainerCallback(monitor=2)
    trainer_of(tmp_path, callback, gradient_accumulation_steps=4).train()
    assert callback.rho_history.steps == [0, 2]
    assert all(row["tokens"] > 3 * 2 * 16 for row in callback.rho_history)  # the last tokens have no gradient
    assert all(row["reason"] == "" for row in callback.rho_history)


def test_rho_is_that_of_a_fit_by_lightning(tmp_path, make_trainer):
    found, expected = FascTrainerCallback(monitor=1), FascCallback(monitor=1)
    trainer_of(tmp_path, found, learning_rate=0.0, per_device_train_batch_size=8).train()
    module = causal_module()
    module.learning_rate = 0.0
    make_trainer(expected).fit(module, token_loader(samples=32, batch_size=8))
    for ours, theirs in zip(found.rho_history, expected.rho_history, strict=True):
        assert theirs["layer"] == f"model.{ours['layer']}"
        assert ours["tokens"] == theirs["tokens"]
        for column in ("rho", "debiased", "null"):
            assert ours[column] == pytest.approx(theirs[column], abs=1e-4)


def test_a_resumed_training_goes_on_with_the_history(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 5}
    options["eval_dataset"] = Tokens(samples=4, seed=1)
    whole, resumed = FascTrainerCallback(**QUICK, monitor=3), FascTrainerCallback(**QUICK, monitor=3)
    first = trainer_of(tmp_path, whole, **options)
    first.train()
    written = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert set(written["stateful_callbacks"][HISTORY]["step"]) == {0, 3}
    second = trainer_of(tmp_path, resumed, **options, restore_callback_states_from_checkpoint=True)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.rho_history.steps == whole.rho_history.steps == [0, 3, 6, 9, 12, 15]
    for ours, theirs in zip(resumed.rho_history, whole.rho_history, strict=True):
        assert ours["rho"] == pytest.approx(theirs["rho"], abs=1e-4)
    assert resumed.report.kept == pytest.approx(whole.report.kept, abs=0.02)


def test_the_best_weights_are_the_ones_compressed(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    trainer = trainer_of(
        tmp_path,
        FascTrainerCallback(rank=1.0, refit=False, allocation="fisher"),  # leaves every layer as it is
        **options,
        load_best_model_at_end=True,
        greater_is_better=True,  # so that the first weights are called the best
        eval_dataset=Tokens(samples=4, seed=1),
    )
    trainer.train()
    assert trainer.state.best_global_step == 4
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    found = trainer.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in best.items())


def test_a_step_that_fails_leaves_no_hook(tmp_path):
    class Fails(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.state.global_step == 2:
                loss.register_hook(self.fail)  # in the middle of the backward pass
            return loss

        def fail(self, gradient):
            raise InterruptedError

    trainer = trainer_of(tmp_path, FascTrainerCallback(**QUICK, monitor=1), kind=Fails)
    with pytest.raises(InterruptedError):
        trainer.train()
    assert_no_hooks(trainer.model)
    assert not {"training_step", "compute_loss"} & set(vars(trainer))
    assert not is_compressed(trainer.model)


def test_a_compression_that_fails_leaves_the_trained_model(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        seen.append(state(args[0].model))
        raise OSError("no space left")

    seen = []
    monkeypatch.setattr("fasc_lightning.calibration._finish.attach_config", fail)
    callback = FascTrainerCallback(**QUICK)
    trainer = trainer_of(tmp_path, callback)
    trained = []
    monkeypatch.setattr(
        callback, "_compress", lambda *args, run=callback._compress: (trained.append(state(trainer.model)), run(*args))
    )
    with pytest.raises(OSError, match="no space left"):
        trainer.train()
    assert seen
    after = trainer.model.state_dict()
    assert after.keys() == trained[0].keys()
    assert all(torch.equal(value, after[name]) for name, value in trained[0].items())
    assert_no_hooks(trainer.model)
    assert callback.report is None
    assert trainer.optimizer is not None


def test_a_subclass_with_metrics_of_its_own_keeps_them(tmp_path):
    callback = FascTrainerCallback(**QUICK, monitor=8)
    trainer = trainer_of(tmp_path, callback, kind=StandIn)
    trainer.train()
    assert is_compressed(trainer.model)
    assert trainer._metrics == {"train": [], "eval": []}


def test_the_loss_is_the_trainers_own(tmp_path):
    calls = []

    def squared(outputs, labels, num_items_in_batch=None):
        calls.append(outputs.logits.requires_grad)
        return outputs.logits.square().mean()

    callback = FascTrainerCallback(**QUICK, calibration_steps=3)
    trainer_of(tmp_path, callback, compute_loss_func=squared).train()
    assert len(calls) == 16 + 3
    assert callback.report is not None


def test_a_classifier_is_compressed(tmp_path):
    class Labelled(Tokens):
        def __getitem__(self, i):
            return {"input_ids": self.input_ids[i], "labels": self.input_ids[i, 0] % 2}

    config = causal_model().config
    config.num_labels = 2
    model = transformers.LlamaForSequenceClassification(config).train()
    callback = FascTrainerCallback(**QUICK, monitor=8)
    trainer_of(tmp_path, callback, model=model, data=Labelled(samples=32)).train()
    assert is_compressed(model)
    assert callback.rho_history.steps == [0, 8]


def test_a_training_set_without_end_is_read_up_to_the_option(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            data = Tokens(samples=8)
            while True:
                yield from (data[i] for i in range(8))

    callback = FascTrainerCallback(**QUICK)
    trainer_of(tmp_path, callback, data=Endless(), max_steps=2).train()
    assert {row.tokens for row in callback.report.layers} == {64 * 2 * 16}


def test_each_kind_of_trainer_refuses_the_others_callback(tmp_path, make_trainer):
    with pytest.raises(TypeError, match="HINT: FascTrainerCallback"):
        trainer_of(tmp_path, FascCallback(monitor=1))
    trainer = trainer_of(tmp_path)
    trainer.add_callback(FascCallback(monitor=1))
    with pytest.raises(TypeError, match="HINT: FascTrainerCallback"):
        trainer.train()
    with pytest.raises(TypeError, match="HINT: FascCallback"):
        make_trainer(FascTrainerCallback(monitor=1)).fit(causal_module(), token_loader())
    assert issubclass(FascTrainerCallback, pl.Callback)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"world_size": 2}, "2 processes"),
        ({"n_gpu": 2}, "DataParallel on 2 devices"),
        ({"deepspeed": "zero3.json"}, "DeepSpeed"),
        ({"fsdp": "full_shard"}, "FSDP"),
        ({"torch_compile": True}, "torch_compile"),
    ],
)
def test_what_is_not_supported_is_refused_at_the_start(setting, named):
    alone = {"world_size": 1, "n_gpu": 0, "deepspeed": None, "fsdp": None, "torch_compile": False}
    check_arguments(SimpleNamespace(**alone))
    with pytest.raises(MisconfigurationException, match=f"but got {named}.*HINT: train without it"):
        check_arguments(SimpleNamespace(**alone | setting))


def test_impossible_budgets_are_refused_before_the_first_step(tmp_path):
    trainer = trainer_of(tmp_path, FascTrainerCallback(rank=1000))
    with pytest.raises(ValueError, match="rank=1000 is larger"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_options_are_those_of_the_callback_for_lightning():
    callback = FascTrainerCallback(0.5, passes=2, gate=0.1, monitor=50)
    assert (callback.rank, callback.passes, callback.update_weights) == (0.5, 2, False)
    assert FascTrainerCallback(monitor=5).compresses is False
    with pytest.raises(ValueError, match=r"recover\(model, batches\)"):
        FascTrainerCallback(0.5, recovery="lora")
    with pytest.raises(ValueError, match="Expected a budget"):
        FascTrainerCallback()


def test_a_damaged_history_is_refused_by_name(tmp_path):
    trainer_of(tmp_path, FascTrainerCallback(monitor=1), save_strategy="steps", save_steps=8, max_steps=8).train()
    path = tmp_path / "checkpoint-8" / "trainer_state.json"
    content = json.loads(path.read_text())
    del content["stateful_callbacks"][HISTORY]["rho"]
    path.write_text(json.dumps(content))
    trainer = trainer_of(tmp_path, FascTrainerCallback(monitor=1))
    with pytest.raises(ValueError, match=r"'fasc_rho_history' in the checkpoint's trainer_state\.json but 'rho'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # there is no accelerator
def test_the_guide_runs(tmp_path, monkeypatch):
    guide = (Path(__file__).parents[1] / "docs" / "guides" / "transformers-trainer.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {"model": causal_model().train(), "dense": causal_model(), "train_dataset": Tokens(samples=64)}
    for block in re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL):
        names |= {} if not is_compressed(names["model"]) or "load_compressed" in block else {"model": causal_model()}
        exec(compile(block, "guide", "exec"), names)
    assert is_compressed(names["dense"])
    assert names["watching"].rho_history.steps == [0]
