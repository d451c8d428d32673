from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import byte_tokenizer, causal_model, causal_module, mlp, token_loader
from watching import assert_no_hooks, state

from fasc_lightning import FascCallback, score


def batches(samples=16, size=8):
    return [
        {"input_ids": ids} for ids in token_loader(batch_size=samples, samples=samples).dataset.input_ids.split(size)
    ]


def test_score_is_what_monitoring_sees(make_trainer):
    callback = FascCallback(monitor_every_n_steps=100)
    module = causal_module()
    module.eval()  # no dropout in this model, so the same
    expected_model = causal_model()
    make_trainer(callback).fit(module, token_loader(samples=8, batch_size=8))
    found = score(expected_model, batches(8)).at(0)
    for name, row in callback.rho_history.at(0).items():
        assert found[name.removeprefix("model.")]["rho"] == pytest.approx(row["rho"], abs=1e-6)
        assert found[name.removeprefix("model.")]["debiased"] == pytest.approx(row["debiased"], abs=1e-4)


def test_the_model_ends_as_it_began():
    model = causal_model().train()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    history = score(model, batches())
    assert len(history) == 14
    assert {row["tokens"] for row in history} == {2 * 8 * 15, 2 * 8 * 14}  # of queries
    assert all(torch.equal(value, state(model)[name]) for name, value in before.items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert_no_hooks(model)


def test_checkpoints_of_a_run_give_its_history(make_trainer, tmp_path):
    module = causal_module()
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=2, filename="{step}")
    make_trainer(saving, enable_checkpointing=True, max_epochs=2).fit(module, token_loader())
    before = state(module)
    files = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    for template in (module, module.model):
        history = score(template, batches(), files)
        assert history.steps == [2, 4, 6, 8]
        last = history.at(8)
        now = score(template, batches()).at(0)  # the last checkpoint is the module as it is
        assert [row["rho"] for row in last.values()] == pytest.approx([row["rho"] for row in now.values()])
        assert history.at(2) != last
    assert all(torch.equal(value, state(module)[name]) for name, value in before.items())


def test_folders_and_names_are_checkpoints_too(tmp_path):
    for number in (10, 20):
        model = causal_model(vocab_size=300)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * number * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / f"checkpoint-{number}")
        byte_tokenizer().save_pretrained(tmp_path / f"checkpoint-{number}")
    folders = [str(tmp_path / f"checkpoint-{number}") for number in (10, 20)]
    history = score(causal_model(vocab_size=300), batches(), folders)
    assert history.steps == [10, 20]
    alone = score(folders[1], batches()).at(0)
    assert alone["model.layers.0.mlp.up_proj"]["rho"] == history.at(20)["model.layers.0.mlp.up_proj"]["rho"]


def test_weights_of_another_model_are_refused_and_nothing_is_changed(tmp_path):
    model = causal_model()
    before = state(model)
    torch.save({"state_dict": causal_model(num_hidden_layers=1).state_dict(), "global_step": 3}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"7 are missing|9 are missing|are missing"):
        score(model, batches(), [tmp_path / "a.ckpt"])
    assert all(torch.equal(value, state(model)[name]) for name, value in before.items())


def test_files_that_hold_more_than_tensors_are_refused(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {"folder": tmp_path}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="not loaded for safety"):
        score(causal_model(), batches(), [tmp_path / "a.ckpt"])


def test_two_checkpoints_of_one_step_are_refused(tmp_path):
    torch.save({"state_dict": causal_model().state_dict(), "global_step": 3}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="different steps"):
        score(causal_model(), batches(), [tmp_path / "a.ckpt", tmp_path / "a.ckpt"])


def test_options_and_models_are_checked():
    with pytest.raises(ValueError, match="`tokens`"):
        score(causal_model(), batches(), tokens=2)
    with pytest.raises(ValueError, match="`gradient`"):
        score(causal_model(), batches(), gradient="both")
    with pytest.raises(ValueError, match="at least one batch"):
        score(causal_model(), iter(()))
    with pytest.raises(TypeError, match="loss is not known"):
        score(torch.nn.Linear(2, 2), batches())


def test_any_lightning_module_can_be_scored():
    data = [(torch.randn(32, 12), torch.randint(3, (32,))) for _ in range(3)]
    history = score(mlp(), data, gradient="output")
    assert history.layers == ["net.0", "net.3", "net.5"]
    assert all(not math.isnan(row["rho"]) for row in history)
    assert score(mlp(), data, targets=["0"]).layers == ["net.0"]
