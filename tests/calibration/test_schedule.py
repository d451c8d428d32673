"""Calibrations of the last steps of fits whose end nobody knows, or of which something else is claimed."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
from inside import kept_by
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import Classifier, feature_loader, mlp
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from watching import RecordingCallback, assert_untouched, state

from fasc_lightning.layers import is_compressed

pytestmark = [
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
    pytest.mark.filterwarnings("ignore:.*saw fewer tokens than they have features"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

#: Batches in the data, of eight samples.
BATCHES = 9


class Stream(IterableDataset):
    """Samples of which nobody says how many there are; as many batches as ``lengths`` says, epoch by epoch."""

    def __init__(self, *lengths: int, once: bool = False) -> None:
        self.lengths = lengths or (BATCHES,)
        self.once = once
        self.epoch = 0

    def __iter__(self):
        if self.once and self.epoch:
            return
        count = self.lengths[min(self.epoch, len(self.lengths) - 1)]
        self.epoch += 1
        generator = torch.Generator().manual_seed(0)
        for _ in range(8 * count) if count else iter(int, 1):  # without an end
            x = torch.randn(12, generator=generator)
            yield x, int(x.sum() > 0)


class Overstated(Stream):
    """Claims 15 batches."""

    def __len__(self) -> int:
        return 8 * 15


class Fit:
    """A fit, and what it has counted."""

    def __init__(
        self,
        make_trainer,
        data,
        *callbacks,
        ckpt_path=None,
        module=None,
        calibration_steps=4,
        update_weights=True,
        **trainer,
    ):
        self.callback = RecordingCallback(keep=0.7, calibration_steps=calibration_steps, update_weights=update_weights)
        self.trainer = make_trainer(self.callback, *callbacks, **trainer)
        self.module = module or mlp()
        loader = DataLoader(data, batch_size=8) if isinstance(data, IterableDataset) else data
        self.trainer.fit(self.module, loader, ckpt_path=ckpt_path)

    @property
    def counts(self) -> tuple[int, int]:
        """Batches of the calibration, steps of the fit."""
        assert is_compressed(self.module)
        return self.callback.batches, self.trainer.global_step


@pytest.mark.parametrize("update_weights", [True, False])
@pytest.mark.parametrize(
    ("data", "options", "counts"),
    [
        (Stream, {"max_epochs": 2}, (4, 18)),
        (Stream, {"max_epochs": 2, "max_steps": 1000}, (4, 18)),
        (Stream, {"max_epochs": 3, "max_steps": 20}, (4, 20)),
        (Stream, {"max_epochs": -1, "max_steps": 20}, (4, 20)),
        (Overstated, {"max_epochs": 2}, (4, 18)),
        (Overstated, {"max_epochs": 3, "max_steps": 1000}, (4, 27)),
        (Stream, {"max_epochs": 2, "limit_train_batches": 40}, (4, 18)),
        (Stream, {"max_epochs": 2, "limit_train_batches": 5}, (4, 10)),
        (Overstated, {"max_epochs": 2, "limit_train_batches": 0.4}, (4, 12)),
        (Stream, {"max_epochs": 3, "accumulate_grad_batches": 2}, (7, 15)),  # 5 steps an epoch; the last of one batch
        (Overstated, {"max_epochs": 3, "accumulate_grad_batches": 2}, (10, 12)),  # 4; one batch belongs to none
    ],
)
def test_the_last_steps_of_a_stream_are_calibrated(make_trainer, data, options, counts, update_weights):
    assert Fit(make_trainer, data(), update_weights=update_weights, **options).counts == counts


def test_a_single_epoch_of_a_stream_is_calibrated_as_a_whole(make_trainer):
    fit = Fit(make_trainer, Stream(), max_epochs=1)
    assert fit.counts == (BATCHES, BATCHES)


def test_only_as_many_batches_are_kept_as_were_asked_for(make_trainer):
    kept = []

    class Watching(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            kept.append(len(kept_by(trainer.callbacks[0])))

    Fit(make_trainer, Stream(), Watching(), max_epochs=1)
    assert kept == [4]


@pytest.mark.parametrize(("data", "frozen"), [(Stream, True), (Overstated, True), (Overstated, False)])
def test_a_fit_goes_on_where_it_would_end_without_a_calibration(make_trainer, data, frozen):
    """Weights that are to be frozen are trained before; and nobody knows of a claim that it is too high."""
    fit = Fit(make_trainer, data(), update_weights=not frozen, max_epochs=1)
    assert fit.counts == (4, BATCHES + 4)
    assert fit.trainer.max_epochs == 1
    assert fit.trainer.fit_loop.min_steps is None


def test_epochs_that_grow_or_shrink_are_calibrated(make_trainer):
    assert Fit(make_trainer, Stream(9, 12), max_epochs=2).counts == (7, 21)  # from the ninth batch but four
    assert Fit(make_trainer, Stream(9, 7), max_epochs=2).counts == (2, 16)
    assert Fit(make_trainer, Stream(9, 5), max_epochs=2).counts == (4, 18)  # four more than there were to be


def test_more_steps_than_the_last_epoch_has_begin_before_it(make_trainer):
    assert Fit(make_trainer, Stream(), max_epochs=4, calibration_steps=11).counts == (11, 36)
    assert Fit(make_trainer, Stream(), max_epochs=2, calibration_steps=11).counts == (9, 18)


def test_a_stream_that_ends_for_good_is_refused_with_its_reason(make_trainer):
    module = mlp()
    before = state(module)
    with pytest.raises(MisconfigurationException, match=r"no more batches\. HINT: a loader") as said:
        Fit(make_trainer, Overstated(once=True), module=module, max_epochs=1)
    assert "calibration_steps" not in str(said.value)
    assert not is_compressed(module)
    assert list(before) == list(module.state_dict())


def test_a_stop_in_the_calibration_of_an_endless_stream_is_heeded(make_trainer):
    class Stopping(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 2

    assert Fit(make_trainer, Stream(0), Stopping(), max_epochs=1).counts == (4, 4)
    assert Fit(make_trainer, Stream(0), max_epochs=1, max_time={"seconds": 1}).callback.batches >= 4
    assert Fit(make_trainer, Stream(0), max_epochs=-1, max_time={"seconds": 1}).callback.batches == 4


def test_validation_stops_a_fit_of_streams(make_trainer):
    class Plateau(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("plateau", 1.0)

        def val_dataloader(self):
            return feature_loader(samples=8)

    options = {"module": Plateau(mlp().net), "max_epochs": 50, "num_sanity_val_steps": 0}
    stopping = EarlyStopping("plateau", patience=1)
    assert Fit(make_trainer, Stream(), stopping, **options).counts == (4, 2 * BATCHES + 4)


@pytest.mark.parametrize("grows", [False, True])
def test_accumulation_that_changes_is_counted_by_epoch(make_trainer, grows):
    """Estimates of the fit's end at its start are far off either way."""
    scheduling = {0: 1, 2: 4} if grows else {0: 4, 2: 1}
    fit = Fit(make_trainer, feature_loader(samples=64), GradientAccumulationScheduler(scheduling), max_epochs=4)
    assert fit.counts == ((16, 20) if grows else (4, 20))


@pytest.mark.parametrize("calibration_steps", [1, 2])
def test_steps_of_two_optimizers_are_counted_by_batch(make_trainer, calibration_steps):
    class Two(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            x, y = batch
            self.manual_backward(nn.functional.cross_entropy(self(x), y))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

    for options, steps in (({"max_steps": 10, "max_epochs": -1}, 10), ({"max_steps": 1000, "max_epochs": 2}, 36)):
        module = Two(mlp().net)
        fit = Fit(make_trainer, Stream(), module=module, calibration_steps=calibration_steps, **options)
        assert fit.counts == (calibration_steps, steps)


@pytest.mark.parametrize("step", [2, 12, 16])
@pytest.mark.parametrize("data", [Stream, Overstated])
def test_a_resumed_fit_of_streams_calibrates_its_last_steps(make_trainer, tmp_path, data, step):
    """Lightning does not move such loaders forward: an interrupted epoch starts with its first batch again."""
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    options = {"max_epochs": 2, "enable_checkpointing": True}
    assert Fit(make_trainer, data(), saving, **options).counts == (4, 2 * BATCHES)
    with pytest.warns(UserWarning, match="starts again") if step == 16 else nullcontext():
        resumed = Fit(make_trainer, data(), saving, ckpt_path=tmp_path / f"step={step}.ckpt", **options)
    assert is_compressed(resumed.module)
    assert resumed.callback.batches >= 4


@pytest.mark.filterwarnings("ignore:.*not stateful")
def test_the_steps_added_to_a_fit_go_on_after_an_interruption(make_trainer, tmp_path):
    step = BATCHES + 2
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    options = {"max_epochs": 1, "enable_checkpointing": True}
    assert Fit(make_trainer, Overstated(), saving, **options).counts == (4, BATCHES + 4)
    resumed = Fit(make_trainer, Overstated(), saving, ckpt_path=tmp_path / f"step={step}.ckpt", **options)
    assert resumed.callback.batches == 4
    assert is_compressed(resumed.module)
    assert resumed.trainer.max_epochs == 1


def test_a_failure_gives_the_limits_back(make_trainer):
    class Failing(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1:
                raise InterruptedError

    module = mlp()
    callback = RecordingCallback(keep=0.7, calibration_steps=4, update_weights=False)
    trainer = make_trainer(callback, Failing(), max_epochs=1)
    with pytest.raises(InterruptedError):
        trainer.fit(module, DataLoader(Stream(), batch_size=8))
    assert trainer.max_epochs == 1
    assert trainer.fit_loop.epoch_loop.min_steps is None
    assert_untouched(module, state(module))


@pytest.mark.parametrize("update_weights", [True, False])
def test_a_fit_shorter_than_its_calibration_warns_with_both_numbers(make_trainer, update_weights):
    with pytest.warns(
        UserWarning, match=r"at least calibration_steps=64 steps but it has 8: all of them calibrate, and no"
    ):
        fit = Fit(
            make_trainer,
            feature_loader(),
            calibration_steps=64,
            update_weights=update_weights,
            max_epochs=2,
        )
    assert fit.counts[0] == 8


def test_the_whole_fit_may_calibrate_without_a_warning(make_trainer):
    assert Fit(make_trainer, feature_loader(), calibration_steps=8, max_epochs=2).counts == (8, 8)


def test_a_time_limit_is_said_once(make_trainer, caplog):
    class Late(Timer):
        """A limit of time that is over at the fourth batch."""

        def time_elapsed(self, stage="train"):
            return 1e9 if self.batches >= 4 else 0.0

        batches = 0

        def on_train_batch_end(self, *args, **kwargs):
            self.batches += 1
            super().on_train_batch_end(*args, **kwargs)

    timer = Late(duration={"hours": 1})
    caplog.set_level(logging.INFO)
    fit = Fit(make_trainer, feature_loader(samples=256), timer, calibration_steps=19, max_epochs=5)
    assert fit.counts == (19, 4 + 19)
    assert caplog.text.count("Time limit reached") == 1
    assert caplog.text.count("It ends after the 19 steps of its calibration") == 1
    assert timer._verbose
