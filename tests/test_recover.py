from __future__ import annotations

import copy
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recovery_cases import FAST, ranks, same, training_loader, values
from replay_cases import Blocks, loader
from tiny import Classifier, causal_model, feature_loader, mlp
from torch.utils.data import DataLoader, IterableDataset

from fasc_lightning import FactorRecovery, LoraRecovery, compress, load_compressed, recover, save_compressed
from fasc_lightning.layers import compressed_layers, is_compressed
from fasc_lightning.recovery import split_loader
from fasc_lightning.refit import RefitError
from fasc_lightning.refit._block_training import refine

recover_module = sys.modules["fasc_lightning.recover"]

pytest.importorskip("peft", reason="peft is not installed")

QUICK = {name: value for name, value in FAST.items() if name != "update_weights"} | {"progress": False}


@pytest.mark.parametrize("teacher", [None, "dense"])
@pytest.mark.parametrize("arm", [LoraRecovery, FactorRecovery])
def test_compress_recovers(arm, teacher):
    model = causal_model().eval()
    flags = {name: p.requires_grad for name, p in model.named_parameters() if "embed" in name or "norm" in name}
    recovery = arm(teacher=teacher, epochs=5, learning_rate=3e-3)
    report = compress(model, list(training_loader()), recovery=recovery, **QUICK)
    figures = report.recovery
    assert figures["held_out_loss"]["after"] < figures["held_out_loss"]["before"]
    assert figures["tokens"] == 5 * 7 * 4 * 16  # of 8 batches one is held back
    assert not model.training
    assert {name: p.requires_grad for name, p in model.named_parameters() if name in flags} == flags
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")


def test_the_data_of_a_recovery_can_be_others(tmp_path):
    model = causal_model()
    train, held = list(training_loader(16, seed=3)), list(training_loader(8, seed=4))
    report = compress(
        model, training_loader(), recovery="factors", recovery_data=train, recovery_held_out=held, **QUICK
    )
    assert report.recovery["tokens"] == 16 * 16
    save_compressed(model, tmp_path / "m", report=report)
    provenance = load_compressed(tmp_path / "m").config.quantization_config.provenance
    assert provenance["options"]["recovery"]["arm"] == "factors"
    assert "* recovery: recovery (factors, " in (tmp_path / "m" / "README.md").read_text()


def test_batches_that_can_be_gone_through_once_serve_both_fits():
    report = compress(causal_model(), iter(training_loader()), recovery="lora", **QUICK)
    assert report.recovery["tokens"] == 7 * 4 * 16
    data = iter(training_loader(16))
    report = compress(causal_model(), training_loader(8), recovery="factors", recovery_data=data, **QUICK)
    assert report.recovery["tokens"] == 3 * 4 * 16


@pytest.mark.parametrize("arm", [LoraRecovery, FactorRecovery])
@pytest.mark.parametrize("precision", [None, "bf16-mixed"])
def test_the_precision_is_that_of_the_fit_and_not_of_the_model(monkeypatch, arm, precision):
    given, make = [], pl.Trainer

    def note(**options):
        trainer = make(**options)
        given.append(trainer.precision)
        return trainer

    monkeypatch.setattr(pl, "Trainer", note)
    model = causal_model()
    recovery = arm(precision=precision, learning_rate=3e-3)
    report = compress(model, training_loader(), recovery=recovery, **QUICK)
    assert given == ["32-true", precision or "32-true"]  # the compression's own stays as it was
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert report.recovery["reverted"] is False
    assert report.options["recovery"]["precision"] == precision
    recover(model, training_loader(), recovery, progress=False)
    assert given[-1] == (precision or "32-true")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class WithoutIndex(Classifier):
    """Its training step takes a batch and nothing else."""

    def training_step(self, batch):
        return super().training_step(batch, 0)


@pytest.mark.parametrize("kind", [Classifier, WithoutIndex])
def test_held_out_batches_decide_without_a_validation_step(kind):
    module = kind(mlp().net)
    compress(module, feature_loader(), **QUICK)
    held = feature_loader()
    module.eval()
    with torch.no_grad():
        losses = [float(Classifier.training_step(module, batch, 0)) for batch in held]
    figures = recover(module, feature_loader(), "factors", held_out=held, progress=False)
    assert figures["tokens"] == len(held.dataset)  # none of them is held back
    assert figures["held_out_loss"]["before"] == pytest.approx(sum(losses) / len(losses))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(list(feature_loader()))


class Validated(Classifier):
    """Brings validation batches of its own."""

    def val_dataloader(self):
        return feature_loader()


def test_data_of_unknown_length_do_where_a_module_has_validation_batches():
    module = Validated(mlp().net)
    report = compress(module, feature_loader(), recovery="factors", recovery_data=DataLoader(Stream(), None), **QUICK)
    assert report.recovery["tokens"] == len(feature_loader().dataset)


def test_too_little_data_is_refused_before_the_compression():
    model = causal_model()
    before = values(model)
    with pytest.raises(MisconfigurationException, match="at least 2 samples"):
        compress(model, [next(iter(training_loader()))], recovery="lora", **QUICK)
    with pytest.raises(ValueError, match="Expected `recovery` together with data"):
        compress(model, training_loader(), recovery_data=training_loader(), **QUICK)
    assert same(values(model), before)


@pytest.mark.parametrize("form", ["model", "layers"])
def test_a_compressed_model_is_recovered_towards_a_dense_one(form):
    dense = causal_model().eval()
    model = copy.deepcopy(dense)
    compress(model, training_loader(), **QUICK)
    old = ranks(model)
    given = dense if form == "model" else {name: dense.get_submodule(name) for name in old}
    recovery = LoraRecovery(teacher="dense", epochs=6, learning_rate=3e-3)
    figures = recover(model, training_loader(), recovery, dense=given, progress=False)
    assert figures["held_out_loss"]["after"] < figures["held_out_loss"]["before"]
    assert ranks(model) == old
    assert not is_compressed(dense)
    with torch.no_grad():
        dense(**next(iter(training_loader())))


def test_what_cannot_be_recovered_is_refused():
    with pytest.raises(MisconfigurationException, match="Expected a compressed module"):
        recover(causal_model(), training_loader(), progress=False)
    with pytest.raises(TypeError, match="whose loss is not known"):
        recover(torch.nn.Linear(2, 2), training_loader(), progress=False)
    with pytest.raises(ValueError, match="`dense` for a recovery with a teacher or a refinement"):
        recover(causal_model(), training_loader(), dense=causal_model(), progress=False)
    model = causal_model()
    compress(model, training_loader(8), **QUICK)
    other, taught = causal_model("gpt2"), LoraRecovery(teacher="dense")
    with pytest.raises(MisconfigurationException, match="they are not at hand"):
        recover(model, training_loader(), taught, dense=other, progress=False)
    with pytest.raises(ValueError, match="to say what is trained"):
        recover(causal_model(), training_loader(), None, progress=False)


@pytest.mark.parametrize("arm", [LoraRecovery, FactorRecovery])
def test_blocks_are_refined_before_the_recovery(arm):
    model, without = causal_model().eval(), causal_model().eval()
    report = compress(model, training_loader(), recovery=arm(refine_steps=20), **QUICK)
    plain = compress(without, training_loader(), recovery=arm(), **QUICK)
    assert plain.refine is None
    assert report.refine["blocks"] == 2
    assert report.refine["steps"] == 20
    assert report.seconds["refine"] == pytest.approx(report.refine["seconds"], rel=0.2, abs=0.5)
    assert report.refine["loss"]["after"] < report.refine["loss"]["before"]
    assert report.recovery["held_out_loss"]["before"] < plain.recovery["held_out_loss"]["before"]
    assert "refinement: 2 blocks changed; held-out loss" in str(report)
    assert type(report).from_dict(report.to_dict()).refine == report.refine


def test_a_compressed_model_is_refined_towards_a_dense_one():
    dense = causal_model().eval()
    model = copy.deepcopy(dense)
    compress(model, training_loader(), **QUICK)
    other = copy.deepcopy(model)
    figures = recover(model, training_loader(), FactorRecovery(refine_steps=20), dense=dense, progress=False)
    assert figures["refine"]["blocks"] == 2
    train, held = split_loader(training_loader())
    layers = {name: dense.get_submodule(name) for name in ranks(other)}
    assert refine(other, layers, list(train), steps=20).accepted == 2
    expected = recover(other, train, FactorRecovery(), held_out=held, progress=False)
    assert figures["held_out_loss"] == expected["held_out_loss"]
    assert same(values(model), values(other))


def test_a_refined_model_is_what_it_was_if_the_recovery_fails(monkeypatch):
    dense = causal_model().eval()
    model = copy.deepcopy(dense)
    compress(model, training_loader(), **QUICK)
    before = values(model)

    def broken(*args, **kwargs):
        assert not same(values(model), before)
        raise RuntimeError("no disk")

    # The package has the function under the name of its module.
    monkeypatch.setattr(sys.modules["fasc_lightning.recover"], "run_fit", broken)
    with pytest.raises(RuntimeError, match="no disk"):
        recover(model, training_loader(), FactorRecovery(refine_steps=20), dense=dense, progress=False)
    assert same(values(model), before)


def test_a_refinement_needs_the_dense_layers_and_blocks():
    model = causal_model()
    before = values(model)
    with pytest.raises(RefitError, match="refine_steps=0"):
        compress(model, training_loader(), recovery=LoraRecovery(refine_steps=4), targets=["lm_head"], **QUICK)
    assert same(values(model), before)
    compress(model, training_loader(), **QUICK)
    with pytest.raises(MisconfigurationException, match="Expected the dense layers, towards which"):
        recover(model, training_loader(), LoraRecovery(refine_steps=4), progress=False)


class Asking(Blocks):
    """Its step asks the Trainer, and its batches are transformed on their way."""

    def __init__(self):
        super().__init__(lambda module, x, i: module.ask(x))
        self.means = []

    def ask(self, x):
        assert self.trainer.training
        assert self.trainer.current_epoch == self.current_epoch == 0
        assert 99 < x.mean() < 101
        self.means.append(float(x.mean()))
        return x - 100

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 100, batch[1]] if self.trainer.training else batch


def test_a_refinement_runs_the_step_as_a_fit_would(monkeypatch):
    def stop(*args, **kwargs):
        raise InterruptedError

    module, data = Asking(), loader()
    dense = dict(copy.deepcopy(module).named_modules())
    compress(module, data, keep=0.5, exclude=["head"], refit=False, progress=False)
    before, trainer = list(module.means), module.trainer
    layers = {name: dense[name] for name in compressed_layers(module)}
    report = []
    refined = recover_module.refine_module
    monkeypatch.setattr(recover_module, "refine_module", lambda *args: report.append(refined(*args)) or report[0])
    monkeypatch.setattr(recover_module, "run_fit", stop)
    with pytest.raises(InterruptedError):
        recover(module, data, LoraRecovery(refine_steps=8), dense=layers, progress=False)
    assert len(report[0].blocks) == 2
    assert module.means == before
    assert module.trainer is trainer
