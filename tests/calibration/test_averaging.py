"""Calibrations beside callbacks that average weights, and that add an epoch without backward passes for batch norm."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from inside import is_calibrating
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import Classifier, feature_loader
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader
from watching import RecordingCallback, assert_no_hooks, state

from fasc_lightning.layers import is_compressed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*saw fewer tokens than they have features"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*ended before the epoch ended and your dataloader is"),
]

#: Batches of eight in an epoch.
BATCHES = 8


class Recording(RecordingCallback):
    """Keeps the state of the module that is compressed, and the epochs of the batches that are calibrated."""

    def __init__(self, **options):
        super().__init__(**{"keep": 0.7, "refit": False, "allocation": "fisher", **options})
        self.epochs = []

    def on_train_batch_end(self, trainer, *args):
        if is_calibrating(self):
            self.epochs.append(trainer.current_epoch)
        super().on_train_batch_end(trainer, *args)

    def on_fit_end(self, trainer, pl_module):
        self.dense = state(pl_module)
        super().on_fit_end(trainer, pl_module)


def module(norm: bool = True) -> Classifier:
    torch.manual_seed(0)
    return Classifier(nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32) if norm else nn.ReLU(), nn.Linear(32, 3)))


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(1e-2, 1, 1)


def fit(make_trainer, averaging, callback, *, before=False, norm=True, ckpt_path=None, **options):
    """Fit four epochs; return the module."""
    callbacks = [callback, averaging] if before else [averaging, callback]
    fitted = module(norm)
    trainer = make_trainer(*[c for c in callbacks if c is not None], **{"max_epochs": 4, **options})
    trainer.fit(fitted, feature_loader(samples=8 * BATCHES), ckpt_path=ckpt_path)
    return fitted


@pytest.fixture
def averaged(make_trainer):
    """What the fit ends with that nothing compresses: of the averages, Lightning takes one stale step more."""

    class Averages(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.fit_loop._skip_backward and not batch_idx:
                self.weights = state(pl_module)

    callback = Averages()
    return state(fit(make_trainer, swa(), callback)), callback.weights


@pytest.mark.sampled(5)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({}, [3] * BATCHES),
        ({"update_weights": False}, [3] * BATCHES),
        ({"calibration_steps": 3}, [3] * 3),
        ({"calibration_steps": 11}, [2] * 3 + [3] * BATCHES),
        ({"calibration_steps": 3, "update_weights": False}, [3] * 3),
        ({"monitor_every_n_steps": 2}, [3] * BATCHES),
        ({"monitor_every_n_steps": 1, "update_weights": False}, [3] * BATCHES),
    ],
)
def test_an_epoch_for_batch_norm_is_left_alone(make_trainer, averaged, before, options, epochs):
    straight, averages = averaged
    callback = Recording(**options)
    fitted = fit(make_trainer, swa(), callback, before=before)
    assert callback.epochs == epochs
    assert is_compressed(fitted)
    assert_no_hooks(fitted)
    statistics = [name for name in straight if "running" in name or "tracked" in name]
    assert len(statistics) == 3
    if callback.update_weights or "calibration_steps" not in options:
        # The averages are of the weights with which epochs start: training in the last one is not among them.
        assert all(torch.equal(fitted.state_dict()[name], straight[name]) for name in statistics)
        expected = straight if callback.update_weights else averages
        weights = [name for name in straight if name not in statistics]
        assert all(torch.equal(callback.dense[name], expected[name]) for name in weights)
    else:
        assert all(torch.equal(fitted.state_dict()[name], straight[name]) for name in statistics)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("update_weights", [False, True])
@pytest.mark.parametrize("options", [{"max_epochs": 1}, {"max_epochs": 2, "accumulate_grad_batches": 2}])
def test_short_fits_with_batch_norm_are_calibrated(make_trainer, before, update_weights, options):
    callback = Recording(update_weights=update_weights)
    fit(make_trainer, swa(), callback, before=before, **options)
    assert callback.epochs == [options["max_epochs"] - 1] * BATCHES


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("place", ["in the last epoch", "at its end"])
def test_a_resumed_fit_leaves_the_epoch_for_batch_norm_alone(make_trainer, tmp_path, before, place):
    """The Trainer's own end is read before the averaging changes it, wherever that stands in the list."""
    steps = 3 * BATCHES + (4 if place == "in the last epoch" else BATCHES)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=steps, save_top_k=-1, filename="{step}")

    def run(**more):
        callback, averaging = Recording(calibration_steps=6), swa()
        callbacks = [callback, averaging] if before else [averaging, callback]
        trainer = make_trainer(*callbacks, saving, max_epochs=4, enable_checkpointing=True)
        loader = StatefulDataLoader(feature_loader(samples=8 * BATCHES).dataset, batch_size=8)
        trainer.fit(module(), loader, **more)
        return callback

    straight = run()
    resumed = run(ckpt_path=tmp_path / f"step={steps}.ckpt")
    assert straight.epochs == [3] * 6
    assert resumed.epochs == [3] * (3 * BATCHES + BATCHES - steps)
    assert resumed.report is not None
    for name in straight.kept_moments.shapes:
        found, expected = resumed.kept_moments.layer(name), straight.kept_moments.layer(name)
        assert found.tokens == expected.tokens == 6 * 8
        assert torch.equal(found.A, expected.A)
        assert torch.equal(found.G, expected.G)


def test_averages_without_batch_norm_are_compressed(make_trainer):
    straight = state(fit(make_trainer, swa(), None, norm=False))
    callback = Recording(update_weights=True)
    fit(make_trainer, swa(), callback, norm=False)
    assert callback.epochs == [3] * BATCHES
    assert all(torch.equal(callback.dense[name], value) for name, value in straight.items())


@pytest.mark.parametrize("averaging", [WeightAveraging, EMAWeightAveraging])
def test_running_averages_of_batch_norm_are_compressed(make_trainer, averaging):
    """They add no epoch, and average running statistics or leave them alone."""
    for options in ({"use_buffers": False}, {"use_buffers": True}):
        if averaging is WeightAveraging and options["use_buffers"]:
            continue  # of the counter, a whole number, no mean can be taken
        straight = state(fit(make_trainer, averaging(**options), None))
        callback = Recording()
        fitted = fit(make_trainer, averaging(**options), callback)
        assert callback.epochs == [3] * BATCHES
        assert all(torch.equal(callback.dense[name], value) for name, value in straight.items())
        assert is_compressed(fitted)


class NoBackward(pl.Callback):
    """Lets some epochs run without backward passes, as anybody may."""

    def __init__(self, *epochs):
        self.epochs = epochs

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.fit_loop._skip_backward = trainer.current_epoch in self.epochs


@pytest.mark.parametrize("update_weights", [False, True])
@pytest.mark.parametrize("options", [{}, {"calibration_steps": 3}])
def test_a_fit_whose_last_epoch_has_no_backward_passes_says_so(make_trainer, options, update_weights):
    straight = state(fit(make_trainer, NoBackward(3), None))
    callback = Recording(update_weights=update_weights, **options)
    fitted = module()
    trainer = make_trainer(NoBackward(3), callback, max_epochs=4)
    with pytest.raises(MisconfigurationException, match=r"without backward passes .*HINT: compress\(\)") as said:
        trainer.fit(fitted, feature_loader(samples=8 * BATCHES))
    assert "calibration_steps" not in str(said.value)
    assert callback.epochs == []
    assert not is_compressed(fitted)
    assert all(torch.equal(fitted.state_dict()[name], value) for name, value in straight.items())


def test_a_calibration_pauses_where_there_are_no_backward_passes(make_trainer):
    class Watching(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.fit_loop._skip_backward:
                assert pl_module.net[1].training
                assert all(p.requires_grad for p in pl_module.parameters())
                assert_no_hooks(pl_module)

    callback = Recording(update_weights=False, calibration_steps=20)
    fitted = module()
    trainer = make_trainer(NoBackward(2), callback, Watching(), max_epochs=4)
    trainer.fit(fitted, feature_loader(samples=8 * BATCHES))
    assert set(callback.epochs) == {1, 3}
    assert is_compressed(fitted)
