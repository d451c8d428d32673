"""Copies of a module, made in every phase of a fit: whole, free to run, and of no influence on the module's own fit."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from expert_cases import batches as expert_batches
from expert_cases import make as make_experts
from recovery_cases import FAST, training_loader
from tiny import causal_module, token_loader

from fasc_lightning import CausalLMModule, Distillation, FascCallback, LoraRecovery, compress
from fasc_lightning.layers import is_compressed


def run(module, batch):
    """Send a batch through a copy and back, as an average of weights would not, but a test of it may."""
    loss = module.model(**{"labels": batch["input_ids"], **batch}, use_cache=False).loss
    if loss.requires_grad:
        loss.backward()
    return loss.item()


class Copier(pl.Callback):
    """Copies the module at every hook of a fit, and runs the copy where a batch is at hand."""

    def __init__(self, at=None):
        self.at, self.copies, self.batch = at, {}, None

    def copy(self, hook, pl_module):
        if self.at in (None, hook):
            self.copies[hook] = copied = copy.deepcopy(pl_module)
            run(copied, self.batch)

    def setup(self, trainer, pl_module, stage):
        if self.at is not None:
            self.batch = next(iter(token_loader()))
            self.copy("setup", pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch = batch
        self.copy("on_train_batch_start", pl_module)

    def on_before_backward(self, trainer, pl_module, loss):
        self.copy("on_before_backward", pl_module)

    def on_after_backward(self, trainer, pl_module):
        self.copy("on_after_backward", pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.copy("on_train_batch_end", pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self.copy("on_train_epoch_end", pl_module)

    def on_train_end(self, trainer, pl_module):
        self.copy("on_train_end", pl_module)

    def on_fit_end(self, trainer, pl_module):
        self.copy("on_fit_end", pl_module)


@pytest.mark.parametrize("update_weights", [False, True])
def test_copies_do_not_feed_the_fit_they_are_made_in(make_trainer, update_weights):
    results = []
    for copier in (None, Copier()):
        module = causal_module()
        callback = FascCallback(keep=0.5, monitor_every_n_steps=2, update_weights=update_weights, gate=0.2)
        make_trainer(callback, *([] if copier is None else [copier]), max_epochs=2).fit(module, token_loader())
        results.append((module, callback.report, str(callback.rho_history.state_dict())))
    (alone, report, rho), (watched, report_of_watched, rho_of_watched) = results
    assert len(copier.copies) == 7
    assert is_compressed(copier.copies["on_fit_end"])
    assert not is_compressed(copier.copies["on_train_end"])
    assert str(report.layers) == str(report_of_watched.layers)
    assert rho == rho_of_watched
    expected = alone.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in watched.state_dict().items())


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_train_end"])
def test_a_copy_is_a_module_of_its_own(make_trainer, hook):
    module, copier = causal_module(), Copier(hook)
    make_trainer(FascCallback(keep=0.5), copier).fit(module, token_loader())
    copied = copier.copies[hook]
    shared = {id(p) for p in module.parameters()} & {id(p) for p in copied.parameters()}
    assert not shared
    report = compress(copied.model, token_loader(), keep=0.5, progress=False)  # with the idle hooks on it
    assert is_compressed(copied)
    assert report.kept <= 0.5


def test_copies_of_experts_run_and_do_not_feed_the_fit(make_trainer):
    losses = []
    for copier in (None, Copier()):
        module = CausalLMModule(make_experts("mixtral"), learning_rate=0.0)
        callback = FascCallback(keep=0.5, update_weights=False)
        trainer = make_trainer(callback, *([] if copier is None else [copier]))
        trainer.fit(module, torch.utils.data.DataLoader(expert_batches(), batch_size=None))
        losses.append([layer.loss for layer in callback.report.layers])
    assert losses[0] == losses[1]
    before = run(copier.copies["on_train_batch_start"], expert_batches()[0])
    assert before == pytest.approx(run(copier.copies["on_train_end"], expert_batches()[0]))


@pytest.mark.filterwarnings("ignore:.*nothing lowered the held-out loss")
@pytest.mark.parametrize("cached", [False, True])
def test_a_module_is_copied_while_it_is_recovered(make_trainer, tmp_path, cached):
    teacher = Distillation(cache=str(tmp_path / "cache")) if cached else Distillation(blocks=0.5)
    kept = []
    for copier in (None, Copier()):
        module = causal_module()
        callback = FascCallback(**FAST, recovery=LoraRecovery(teacher=teacher, learning_rate=1e-3))
        make_trainer(callback).fit(module, training_loader(samples=8))
        make_trainer(callback, *([] if copier is None else [copier])).fit(module, training_loader(samples=8))
        kept.append(callback.report.recovery["history"])
    assert kept[0] == kept[1]
    assert len(copier.copies) == 7
    copied = copier.copies["on_after_backward"]
    assert copied.teacher is None
    assert torch.isfinite(copied._loss(copier.batch))


def test_a_module_is_copied_after_a_fit_that_failed(make_trainer):
    class Failing(Copier):
        def on_train_batch_end(self, *args):
            raise KeyError("stop")

    module = causal_module()
    with pytest.raises(KeyError, match="stop"):
        make_trainer(FascCallback(keep=0.5, update_weights=False), Failing("none")).fit(module, token_loader())
    run(copy.deepcopy(module), next(iter(token_loader())))
