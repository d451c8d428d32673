"""Training steps that run again: on the same batches, told the same, and leaving nothing behind."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import suppress

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from replay_cases import Blocks, compressed, loader
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from fasc_lightning import FascCallback
from fasc_lightning._utils import SchemaError
from fasc_lightning.batches import KeptBatches, NoLossError, Place, TrainingStep, brought
from fasc_lightning.batches._kept import KeptBatch


class Seen:
    """Notes what steps see, where nobody puts it back."""

    def __init__(self):
        self.training, self.again = [], []
        self.fitting = True

    def note(self, *what):
        (self.training if self.fitting else self.again).append(what)


class Ends(pl.Callback):
    def __init__(self, seen):
        self.seen = seen

    def on_train_end(self, *args):
        self.seen.fitting = False


@pytest.mark.parametrize("update_weights", [False, True])
def test_a_step_is_told_what_it_was_told_in_training(make_trainer, update_weights):
    seen = Seen()

    def during(module, x, batch_idx):
        trainer = module.trainer
        seen.note(
            (float(x.sum()), batch_idx, trainer.current_epoch, module.global_step, trainer.training),
            trainer.fit_loop.batch_idx,
            trainer.state.fn.value,
            torch.is_grad_enabled() if seen.fitting else True,
        )
        return x

    callback = FascCallback(keep=0.6, exclude=["head"], refit=True, update_weights=update_weights)
    trainer = make_trainer(callback, Ends(seen), max_epochs=2, limit_val_batches=0)
    trainer.fit(Blocks(during), loader())
    assert len(seen.training) == 12
    assert len(seen.again) > 6  # measured, refitted, judged
    assert set(seen.again) == set(seen.training[6:])
    assert (trainer.current_epoch, trainer.global_step) == (2, 12)


def test_a_step_that_changes_its_batch_in_place_sees_it_unchanged(make_trainer):
    seen = Seen()

    def during(module, x, batch_idx):
        seen.note(batch_idx, float(x.sum()))
        return x.mul_(2).add_(1)

    compressed(lambda *callbacks, **how: make_trainer(*callbacks, Ends(seen), **how), Blocks(during))
    assert set(seen.again) == set(seen.training)


def test_transfer_hooks_are_not_applied_twice(make_trainer):
    seen = Seen()

    class Augmented(Blocks):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] * 3, batch[1]]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + torch.randn(1), batch[1]]

    def during(module, x, batch_idx):
        seen.note(batch_idx, float(x.sum()))
        return x

    compressed(lambda *callbacks, **how: make_trainer(*callbacks, Ends(seen), **how), Augmented(during))
    assert set(seen.again) == set(seen.training)


class Collecting(Blocks):
    """A step with all the habits: collects, counts, measures, logs, prints, draws."""

    calls: list = []  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.outs, self.counts, self.best = [], Counter(), {"loss": []}
        self.accuracy, self.logged, self.mean = MulticlassAccuracy(3), MulticlassAccuracy(3), [MeanMetric()]
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.norm = nn.BatchNorm1d(12)
        self.generator = torch.Generator().manual_seed(0)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = self.norm(x + 0.01 * torch.randn(x.shape, generator=self.generator) + 0.01 * torch.randn(x.shape))
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.outs.append(loss)
        self.counts[batch_idx] += 1
        self.best["loss"].append(loss.item())
        self.calls.append(batch_idx)
        self.accuracy(logits, y)
        self.mean[0].update(loss)
        self.seen += len(y)
        self.log("train", loss, on_epoch=True, prog_bar=True)
        self.logged(logits, y)
        self.log_dict({"accuracy": self.logged})
        self.logger.log_metrics({"by_hand": batch_idx}, step=batch_idx)
        self.logger.experiment.log_metrics({"by_experiment": batch_idx}, step=batch_idx)
        assert isinstance(self.logger, CSVLogger)
        assert self.logger.log_dir
        self.print("step", batch_idx)
        return {"loss": loss, "logits": logits}

    def on_train_epoch_end(self):
        self.log("mean", torch.stack(self.outs).mean())
        self.outs.clear()


@pytest.mark.parametrize("allocation", ["measured", "fisher"])
def test_a_fit_with_replays_leaves_what_a_fit_without_does(make_trainer, tmp_path, capsys, monkeypatch, allocation):
    left = []
    for refit in (None, False, True):
        monkeypatch.setattr(Collecting, "calls", [])
        module = Collecting()
        logger = CSVLogger(tmp_path / f"{refit}", flush_logs_every_n_steps=1)
        replays = {"refit": refit, "allocation": allocation, "exclude": ["head"]}
        callbacks = [] if refit is None else [FascCallback(keep=0.6, **replays)]
        trainer = make_trainer(*callbacks, logger=logger, log_every_n_steps=1)
        torch.manual_seed(1)
        trainer.fit(module, loader())
        if refit:
            assert callbacks[0].report.refit is not None
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        left.append(
            {
                **{key: str(own[key]) for key in ("outs", "counts", "best")},
                "modes": [m.training for m in module.children()],
                "metrics": [module.accuracy.compute(), module.accuracy._update_count, module.mean[0].compute()],
                "buffers": [
                    value.tolist() for value in (module.seen, module.norm.running_mean, module.norm.running_var)
                ],
                "drawn": torch.rand(1, generator=module.generator).item(),
                "drawn from all": torch.rand(1).item(),
                "class": list(Collecting.calls),
                "logged": [row for row in logger.experiment.metrics if not any("fasc" in key for key in row)],
                "loggers": trainer.loggers == [logger],
                "printed": capsys.readouterr().out.count("step"),
                "methods": sorted({"log", "log_dict", "print"} & set(vars(module))),
            }
        )
        copy.deepcopy(module)
    assert left[0]["printed"] == 6
    assert left[1] == left[0]
    assert left[2] == left[0]


def test_noise_in_a_step_is_the_same_each_time(make_trainer):
    values = []

    def during(module, x, batch_idx):
        noise = torch.randn_like(x)
        values.append((batch_idx, float(noise.sum())))
        return x + noise

    compressed(make_trainer, Blocks(during))  # else blocks run alone would not agree with the model
    again = values[6:]
    assert len(set(again)) == 6 < len(again)
    assert len({noise for _, noise in again}) == 6


class Physics(Blocks):
    """Its step differentiates by its input."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x.requires_grad_())
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return nn.functional.cross_entropy(logits, y) + 0.1 * slope.square().sum(1).mean()


@pytest.mark.parametrize("update_weights", [False, True])
def test_a_step_that_differentiates_can_be_refitted(make_trainer, update_weights):
    compressed(make_trainer, Physics(), update_weights=update_weights, allocation="fisher")


def test_a_step_that_differentiates_by_weights_is_predicted(make_trainer, caplog):
    def during(module, x, batch_idx):
        (found,) = torch.autograd.grad(module(x).sum(), module.head.bias, create_graph=True)
        return x + found.sum()

    with caplog.at_level("INFO"):
        compressed(make_trainer, Blocks(during), update_weights=True, refit=False, allocation="measured")
    assert "ranks and bits follow predicted losses alone. Expected a training step that can run while" in caplog.text


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_that_its_step_skips_is_not_run_again(make_trainer):
    class Skipping(Blocks):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    callback = compressed(make_trainer, Skipping())
    assert sum(callback.report.to_dict()["refit"]["batches"].values()) == 5


def test_a_step_that_takes_only_a_batch_and_returns_a_dict(make_trainer):
    class Short(Blocks):
        def training_step(self, batch):
            return {"loss": super().training_step(batch, 0), "more": 1}

    compressed(make_trainer, Short())


def test_a_step_that_fails_when_run_again_leaves_nothing(make_trainer, tmp_path):
    seen = Seen()

    def during(module, x, batch_idx):
        module.outs = [1]
        if not seen.fitting:
            raise KeyError("again")
        del module.outs
        return x

    module, logger = Blocks(during), CSVLogger(tmp_path)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback = FascCallback(keep=0.6, exclude=["head"], update_weights=False)
    trainer = make_trainer(callback, Ends(seen), logger=logger)
    with pytest.raises(KeyError, match="again"):
        trainer.fit(module, loader())
    assert not hasattr(module, "outs")
    assert not {"log", "log_dict", "print"} & set(vars(module))
    assert trainer.loggers == [logger]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_loggers_that_a_module_holds_are_muted(make_trainer):
    class Counting(DummyLogger):
        lines = 0

        def log_metrics(self, *args, **kwargs):
            type(self).lines += 1

    def during(module, x, batch_idx):
        module.mine.log_metrics({"x": 1})
        assert isinstance(module.mine, Counting)
        return x

    module = Blocks(during)
    module.mine = Counting()
    compressed(make_trainer, module)
    assert Counting.lines == 6
    assert type(module.mine) is Counting


def test_a_replay_is_kept_in_plain_data():
    replay = KeptBatches()
    replay.keep({"x": torch.ones(2)}, Place(1, 2, 3))
    replay.keep({"x": torch.zeros(2)})
    replay.note({"layer": torch.arange(2.0)})
    state = replay.state_dict()
    again = KeptBatches.from_state(state)
    assert [kept.place for kept in again.batches] == [Place(1, 2, 3), Place(0, 1, 0)]
    assert again.batches[0].batch is replay.batches[0].batch
    assert again.batches[0].lengths == {}
    assert torch.equal(again.batches[1].lengths["layer"], torch.arange(2.0))
    early = {name: value for name, value in state.items() if name != "lengths"}
    assert [kept.lengths for kept in KeptBatches.from_state(early).batches] == [{}, {}]
    for damaged in (3, [1.0, 2.0], torch.ones(2, 2), torch.ones(2, dtype=torch.long)):
        with pytest.raises(SchemaError, match="a row of floating-point numbers"):
            KeptBatches.from_state({**state, "lengths": [{}, {"layer": damaged}]})


def test_tensors_that_were_on_the_cpu_stay_there():
    kept = KeptBatch({"x": torch.ones(2), "lengths": torch.ones(2)}, Place(), stays=(1,))
    (batch,) = KeptBatches([kept]).on("meta")
    assert (batch["x"].device.type, batch["lengths"].device.type) == ("meta", "cpu")
    replay = KeptBatches()
    replay.keep({"x": torch.ones(2), "lengths": torch.ones(2)})
    assert replay.batches[0].stays == ()  # all of it goes where the fit is


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter`")
def test_a_step_with_an_iterator_is_refused_before_it_runs(make_trainer, caplog):
    class Iterating(Blocks):
        def training_step(self, dataloader_iter):
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx) * len(batch)

    options = {"keep": 0.6, "exclude": ["head"], "update_weights": False}
    with pytest.raises(MisconfigurationException, match=r"`dataloader_iter`.* HINT"):
        make_trainer(FascCallback(**options)).fit(Iterating(), loader())
    with pytest.raises(NoLossError, match=r"`dataloader_iter`.* HINT"):
        make_trainer(FascCallback(**options, loss_terms="sum", refit=True)).fit(Iterating(), loader())
    callback = FascCallback(**options, loss_terms="sum")
    with caplog.at_level("INFO"):
        make_trainer(callback).fit(Iterating(), loader())
    assert callback.report.refit is None
    assert (
        "ranks and bits follow predicted losses alone. Expected a training step that is given its batch" in caplog.text
    )


def test_modules_are_brought_to_the_device_and_back():
    class Noting(nn.Linear):
        def to(self, device):
            self.went = [str(device)]
            return self

        def cpu(self):
            self.went.append("cpu")
            return self

    module, away = Noting(2, 2), nn.Linear(2, 2, device="meta")
    with suppress(KeyError), brought([module, away], torch.device("cuda", 1)):
        assert module.went == ["cuda:1"]
        raise KeyError
    assert module.went[0] == "cuda:1"
    assert set(module.went[1:]) == {"cpu"}
    with brought([nn.Linear(2, 2)], torch.device("cpu")):
        pass


def test_a_step_that_sets_the_learning_rate_does_so_once(make_trainer):
    class Stepping(Blocks):
        def training_step(self, batch, batch_idx):
            self.lr_schedulers().step()
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    class Running(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            schedule = trainer.lr_scheduler_configs[0].scheduler
            before = schedule.state_dict(), trainer.optimizers[0].param_groups[0]["lr"]
            TrainingStep(trainer)(pl_module, next(iter(loader())))
            assert (schedule.state_dict(), trainer.optimizers[0].param_groups[0]["lr"]) == before

    make_trainer(Running()).fit(Stepping(), loader())


def test_changing_batches_in_place_makes_the_same_model(make_trainer):
    models = []
    for change in (lambda module, x, i: x * 2 + 1, lambda module, x, i: x.mul_(2).add_(1)):
        module = Blocks(change)
        compressed(make_trainer, module, loader())
        models.append(module.state_dict())
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_a_process_alone_does_not_wait_for_the_others(monkeypatch):
    class Contrastive(Blocks):
        def training_step(self, batch, batch_idx):
            return self.all_gather(self(batch[0])).sum()

    module = Contrastive()
    module.trainer = trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    replay = KeptBatches()
    replay.keep(next(iter(loader())))
    assert TrainingStep(trainer, replay)(module, replay.batches[0].batch).ndim == 0
    monkeypatch.setattr("fasc_lightning.batches._training_step.is_distributed", lambda trainer: True)
    with pytest.raises(NoLossError, match="all_gather"):
        TrainingStep(trainer, replay)(module, replay.batches[0].batch)
    assert "all_gather" not in vars(module)
