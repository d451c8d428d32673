"""Fits that are killed in the middle of a calibration and go on as if nothing had been."""

from __future__ import annotations

import copy
import shutil
import signal
import warnings
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import preempted_fit
import pytest
import torch
from interrupted import BATCHES, Between, Copying, Fits, assert_same, every_batch, failing, sidecars, stateful_loader
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from processes import run_script
from tiny import causal_module, token_loader
from watching import RecordingCallback

from fasc_lightning import CausalLMModule

# Lightning's notice of a folder in which an interrupted fit has left its checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


@pytest.fixture
def no_limit(monkeypatch):
    """Every checkpoint in the middle of a calibration has a sidecar."""
    monkeypatch.setattr("fasc_lightning.calibration._sidecar.SIDECAR_BYTES", 0)


CASES = {
    "frozen": {"refit": True},
    "training": {"update_weights": True, "refit": True},
    "in the second epoch": {"epoch": 1, "update_weights": True},
    "after the last batch but one": {"batch": BATCHES - 1},
    "all statistics": {"method": "gfwsvd", "gate": 0.1, "gate_by": "pooled"},
    "subsampled tokens": {"token_fraction": 0.5},
    "a share of the gradients": {"keep": None, "quantize": "int4"},
    "with dropout": {"update_weights": True, "family": "gpt2", "model": {"resid_pdrop": 0.2}},
    "a loader without length": {"loader": lambda: stateful_loader(endless=True), "update_weights": True},
    "several batches a step": {"trainer": {"accumulate_grad_batches": 2}, "update_weights": True, "batch": 4},
    "validations in between": {"trainer": {"val_check_interval": 2}, "validation": True, "update_weights": True},
    "worker processes": {"loader": lambda: stateful_loader(num_workers=2), "update_weights": True},
    "sketches sized by rho": {
        "sketch": "range",
        "sketch_above": 0,
        "rho_threshold": 0.35,
        "monitor_every_n_steps": 1,
        "keep": 0.2,
        "epoch": 1,
        "update_weights": True,
    },
    "the last steps": {"trainer": {"max_steps": 6, "max_epochs": -1}, "calibration_steps": 4, "update_weights": True},
}


#: The other cases differ in one thing from these, and run with ``-m exhaustive``.
SAMPLED = (
    *("frozen", "training", "all statistics", "with dropout", "validations in between", "sketches sized by rho"),
    "a share of the gradients",
)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("case", "limit"),
    [
        *(pytest.param(case, 0, marks=() if case in SAMPLED else pytest.mark.exhaustive) for case in CASES),
        ("frozen", 2**30),
        pytest.param("training", 2**30, marks=pytest.mark.exhaustive),
    ],
)
def test_a_fit_that_goes_on_ends_as_one_that_was_not_interrupted(make_trainer, tmp_path, monkeypatch, case, limit):
    monkeypatch.setattr("fasc_lightning.calibration._sidecar.SIDECAR_BYTES", limit)
    options = dict(CASES[case])
    epoch, batch = options.pop("epoch", 0), options.pop("batch", 5)
    options["trainer"] = {"max_epochs": epoch + 1, **options.get("trainer", {})}
    fits = Fits(make_trainer, tmp_path, **options)
    straight = fits.straight(batch, epoch)
    assert bool(sidecars(tmp_path / "left")) is (limit == 0)
    assert fits.left_running == ["last.ckpt"]  # removed at the end of the fit
    resumed = fits.resumed()
    assert_same(resumed, straight)
    assert resumed[1].batches < straight[1].batches
    assert sidecars(tmp_path / "running") == []


class Saving(pl.Callback):
    """Saves a checkpoint at the end of the first of two epochs, in one of the hooks there."""

    def __init__(self, path: Path, place: str) -> None:
        self.path, self.place = path, place

    def save(self, trainer, place, epoch):
        if place == self.place and trainer.fit_loop.epoch_progress.current.processed == epoch:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == BATCHES - 1:
            self.save(trainer, "the last batch", 0)

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, "the validation", 0)

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "the end of the epoch", 1)

    def on_train_epoch_start(self, trainer, pl_module):
        self.save(trainer, "the start of the next", 1)


EPOCHS_END = ["the last batch", "the validation", "the end of the epoch", "the start of the next"]
ENDS = [("epochs", False), ("steps", False), ("steps", True)]
EACH_PLACE_AND_END = [
    pytest.param(place, *end, marks=() if i % len(ENDS) == j else pytest.mark.exhaustive)
    for i, place in enumerate(EPOCHS_END)
    for j, end in enumerate(ENDS)
]
END = {"epochs": {"max_epochs": 2}, "steps": {"max_epochs": -1, "max_steps": 2 * BATCHES}}


@pytest.mark.parametrize(("place", "end", "endless"), EACH_PLACE_AND_END)
def test_a_calibration_of_several_epochs_goes_on_at_the_end_of_one(make_trainer, tmp_path, place, end, endless):
    options = {"validation": True, "trainer": END[end], "loader": lambda: stateful_loader(endless)}
    fits = Fits(make_trainer, tmp_path, calibration_steps=12, update_weights=True, **options)
    straight = fits.run(Saving(tmp_path / "saved.ckpt", place))
    resumed = fits.run(ckpt_path=tmp_path / "saved.ckpt")
    assert_same(resumed, straight)
    assert (straight[1].batches, resumed[1].batches) == (12, 8)


@pytest.mark.parametrize(
    "place",
    [pytest.param(place, marks=() if "end of" in place else pytest.mark.exhaustive) for place in EPOCHS_END],
)
def test_epochs_are_still_counted_right_at_the_next_interruption(make_trainer, tmp_path, place):
    fits = Fits(make_trainer, tmp_path, validation=True, trainer={"max_epochs": 3}, calibration_steps=20)
    straight = fits.run(every_batch(tmp_path / "running"), Saving(tmp_path / "saved.ckpt", place))
    fits.run(
        every_batch(tmp_path / "running"),
        Copying(tmp_path / "running", tmp_path / "left", 5, epoch=1),
        Copying(tmp_path / "running", tmp_path / "later", 0, epoch=2),
        ckpt_path=tmp_path / "saved.ckpt",
    )
    for folder, batches in (("left", 11), ("later", 8)):
        resumed = fits.run(every_batch(tmp_path / "running"), ckpt_path=tmp_path / folder / "last.ckpt")
        assert_same(resumed, straight)
        assert resumed[1].batches == batches


@pytest.mark.parametrize("end", END)
def test_a_fit_that_is_terminated_at_the_end_of_an_epoch_goes_on_with_the_next(make_trainer, tmp_path, end):
    class Terminate(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer._signal_connector.received_sigterm = True

    fits = Fits(make_trainer, tmp_path, calibration_steps=12, update_weights=True, trainer=END[end])
    straight = fits.run(failing(tmp_path))
    with pytest.raises(SIGTERMException):
        fits.run(failing(tmp_path), Terminate())
    assert_same(fits.run(failing(tmp_path), ckpt_path=tmp_path / "failed.ckpt"), straight)


class Scheduled(CausalLMModule):
    """Halves its learning rate at every step, which it takes by itself or has taken."""

    def __init__(self, model, automatic: bool) -> None:
        super().__init__(model)
        self.automatic_optimization = automatic

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            self.lr_schedulers().step()
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("automatic", [True, False])
def test_schedulers_that_stand_still_are_saved_as_they_are(make_trainer, tmp_path, automatic):
    def fit(**options):
        callback = RecordingCallback(keep=0.6, update_weights=False, calibration_steps=6, allocation="fisher")
        trainer = make_trainer(callback, *options.pop("callbacks", ()), enable_checkpointing=True)
        module = Scheduled(causal_module().model, automatic)
        torch.manual_seed(2)
        trainer.fit(module, stateful_loader(), **options)
        return module, callback

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    straight = fit(callbacks=[Save()])
    (schedule,) = torch.load(tmp_path / "saved.ckpt", weights_only=True)["lr_schedulers"]
    assert schedule["last_epoch"] == 2
    assert_same(fit(ckpt_path=tmp_path / "saved.ckpt"), straight)


@pytest.mark.parametrize("place", ["after the last batch", "after the last epoch"])
def test_nothing_is_run_again_where_only_the_factors_are_missing(make_trainer, tmp_path, no_limit, place):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if place == "after the last batch" and batch_idx == BATCHES - 1:
                trainer.save_checkpoint(tmp_path / "left" / "last.ckpt")

        def on_train_epoch_end(self, trainer, pl_module):
            if place == "after the last epoch":
                trainer.save_checkpoint(tmp_path / "left" / "last.ckpt")

        def on_fit_end(self, trainer, pl_module):
            (kept,) = sidecars(tmp_path / "left")
            (tmp_path / "left" / kept).rename(tmp_path / "kept")

    # Any loader will do: nothing more is asked of it.
    fits = Fits(make_trainer, tmp_path, loader=lambda: token_loader(samples=2 * BATCHES))
    straight = fits.run(Save())
    (tmp_path / "kept").rename(tmp_path / "left" / "statistics.fasc.safetensors")
    resumed = fits.run(ckpt_path=tmp_path / "left" / "last.ckpt")
    assert_same(resumed, straight)
    assert resumed[1].batches == 0


def test_a_second_interruption_is_no_different(make_trainer, tmp_path, no_limit):
    fits = Fits(make_trainer, tmp_path, update_weights=True)
    straight = fits.straight(3)

    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        fits.run(every_batch(tmp_path / "running"), Stop(), ckpt_path=tmp_path / "left" / "last.ckpt")
    assert len(sidecars(tmp_path / "running")) == 1
    assert_same(fits.run(every_batch(tmp_path / "running"), ckpt_path=tmp_path / "running" / "last.ckpt"), straight)


@pytest.mark.parametrize("update_weights", [True, False])
def test_gradients_that_no_checkpoint_holds_are_spoken_of(make_trainer, tmp_path, update_weights):
    options = {"update_weights": update_weights, "trainer": {"accumulate_grad_batches": 2}}
    fits = Fits(make_trainer, tmp_path, **options)
    with pytest.raises(InterruptedError):
        fits.run(failing(tmp_path), Between(4))
    lost = pytest.warns(UserWarning, match="the next optimizer step lacks those of some batches")
    with lost if update_weights else nullcontext():
        module, callback = fits.run(failing(tmp_path), ckpt_path=tmp_path / "failed.ckpt")
    assert callback.batches == BATCHES - 5
    if not update_weights:
        assert_same((module, callback), fits.run(failing(tmp_path)))


class Killed(Fits):
    """A fit whose checkpoints are all kept, interrupted after its third batch."""

    def __init__(self, make_trainer, folder, **options):
        super().__init__(make_trainer, folder, **options)
        with pytest.raises(InterruptedError):
            self.run(self.every("left"), Between(3))
        self.left = folder / "left"
        assert len(sidecars(self.left)) == 3

    def every(self, folder):
        return ModelCheckpoint(self.folder / folder, "{step}", every_n_train_steps=1, save_top_k=-1)

    def go_on(self, folder, **options):
        return self.run(self.every(folder), ckpt_path=self.left / "step=3.ckpt", **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [({}, "goes on after 3"), ({"trainer": {"max_epochs": 2}}, "another time"), ({"seed": 4}, "seed was 0")],
)
def test_no_sidecar_of_a_killed_process_outlives_the_run(make_trainer, tmp_path, no_limit, caplog, options, said):
    with caplog.at_level("INFO"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Killed(make_trainer, tmp_path).go_on("left", **options)
    assert said in caplog.text + "".join(str(warning.message) for warning in caught)
    assert sidecars(tmp_path / "left") == []


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_second_run_from_the_same_checkpoint_goes_on_from_it_too(make_trainer, tmp_path, no_limit):
    fits = Killed(make_trainer, tmp_path)
    for folder, keep in (("a", 0.6), ("b", 0.4)):
        _, callback = fits.go_on(folder, keep=keep)
        assert callback.batches == BATCHES - 3
        assert sidecars(tmp_path / folder) == []
    assert len(sidecars(tmp_path / "left")) == 3


@pytest.mark.parametrize(("saving", "name"), [(every_batch, "last"), (failing, "failed")])
def test_early_stopping_ends_the_calibration_where_it_would_have(make_trainer, tmp_path, saving, name):
    class Plateau(CausalLMModule):
        def on_train_epoch_end(self):
            self.log("plateau", 1.0)

    def fit(folder, *callbacks, ckpt_path=None):
        torch.manual_seed(1)
        callback = RecordingCallback(keep=0.6, calibration_steps=5)
        stopping = EarlyStopping("plateau", patience=1, check_on_train_epoch_end=True)
        trainer = make_trainer(callback, stopping, saving(folder), *callbacks, max_epochs=50, enable_checkpointing=True)
        module = Plateau(causal_module().model, learning_rate=1e-3)
        torch.manual_seed(2)
        try:
            trainer.fit(module, stateful_loader(), ckpt_path=ckpt_path)
        finally:
            assert trainer.fit_loop.min_steps is None
        return (module, callback), trainer

    straight, trainer = fit(tmp_path / "straight")
    assert trainer.global_step == 2 * BATCHES + 5
    with pytest.raises(InterruptedError):
        fit(tmp_path / "left", Between(2, epoch=2))
    resumed, trainer = fit(tmp_path / "left", ckpt_path=tmp_path / "left" / f"{name}.ckpt")
    assert trainer.global_step == 2 * BATCHES + 5
    assert_same(resumed, straight)


def test_a_fit_that_was_told_to_stop_counts_nothing_twice(make_trainer, tmp_path):
    class Halt(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 4

    # Any loader will do: no batch is left.
    fits = Fits(make_trainer, tmp_path, loader=lambda: token_loader(samples=2 * BATCHES))
    running = tmp_path / "running"
    straight = fits.run(every_batch(running), Halt(), CopyingAtTheEnd(running, tmp_path / "left"))
    resumed = fits.run(every_batch(running), ckpt_path=tmp_path / "left" / "last.ckpt")
    assert_same(resumed, straight)
    assert (straight[1].batches, resumed[1].batches) == (5, 0)
    with pytest.warns(UserWarning, match="The calibration starts again from its first batch.*seed was 0 and is 1 now"):
        _, callback = fits.run(every_batch(running), ckpt_path=tmp_path / "left" / "last.ckpt", seed=1)
    assert callback.batches == BATCHES  # nothing has told this fit to stop


class CopyingAtTheEnd(Copying):
    """Copies when training has ended and nothing is compressed yet."""

    def __init__(self, source: Path, target: Path) -> None:
        super().__init__(source, target, batch=-1)

    def on_train_end(self, trainer, pl_module):
        shutil.copytree(self.source, self.target)


def test_a_checkpoint_saved_by_a_callback_that_comes_first_counts_the_whole_batch(make_trainer, tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    class First(Fits):
        def run(self, *callbacks, **options):
            make = self.make_trainer
            self.make_trainer = lambda *given, **settings: make(Save(), *given, **settings)
            try:
                return super().run(*callbacks, **options)
            finally:
                self.make_trainer = make

    fits = First(make_trainer, tmp_path)
    straight = fits.run()
    assert_same(fits.run(ckpt_path=tmp_path / "first.ckpt"), straight)


def test_a_checkpoint_of_an_exception_holds_the_statistics(make_trainer, tmp_path):
    fits = Fits(make_trainer, tmp_path)
    straight = fits.run()
    saving = ModelCheckpoint(tmp_path / "left", "failed", save_on_exception=True, save_last=True)
    with pytest.raises(InterruptedError):
        fits.run(Between(4), saving)
    for name in ("failed", "last"):
        assert_same(fits.run(copy.deepcopy(saving), ckpt_path=tmp_path / "left" / f"{name}.ckpt"), straight)


def run_fit(devices: int, *arguments: object, code: int = 0) -> None:
    run_script("preempted_fit.py", devices, *arguments, processes=devices, code=code)


@pytest.fixture(scope="module")
def two_straight(tmp_path_factory):
    """What two processes end with that nothing interrupts."""
    folder = tmp_path_factory.mktemp("two")
    run_fit(2, folder / "straight")
    return folder


@pytest.mark.parametrize("devices", [1, 2])
def test_a_killed_fit_ends_with_the_factors_of_one_that_was_not(request, tmp_path, no_limit, devices):
    run, straight = run_fit, tmp_path
    if devices == 1:
        run = preempted_fit.fit
        run(1, tmp_path / "straight")
    else:
        straight = request.getfixturevalue("two_straight")
    run_fit(devices, tmp_path / "killed", "kill", code=-signal.SIGKILL)
    assert len(sidecars(tmp_path / "killed")) == 1
    assert not list((tmp_path / "killed").glob("*.pt"))
    run(devices, tmp_path / "killed")
    for rank in range(devices):
        found = assert_same_end(tmp_path / "killed", straight / "straight", rank)
        assert found["batches"] == BATCHES - 5
    assert sidecars(tmp_path / "killed") == []


def test_processes_that_are_told_to_stop_save_what_they_have_and_one_that_fails_waits_for_no_other(
    tmp_path, two_straight
):
    run_fit(2, tmp_path / "stopped", "terminate")
    assert (tmp_path / "stopped" / "failed.ckpt").exists()
    run_fit(2, tmp_path / "stopped")
    run_fit(2, tmp_path / "failed", "fail", code=1)
    run_fit(2, tmp_path / "failed")
    for rank in range(2):
        found = assert_same_end(tmp_path / "stopped", two_straight / "straight", rank)
        assert found["batches"] == BATCHES - 5
        assert torch.load(tmp_path / "failed" / f"{rank}.pt", weights_only=True)["batches"] == BATCHES


def assert_same_end(folder, straight, rank):
    """One process of the fit in a folder ended as that of a straight one; return what it ended with."""
    found, expected = (torch.load(each / f"{rank}.pt", weights_only=True) for each in (folder, straight))
    assert found["seen"] == expected["seen"][-len(found["seen"]) :]
    assert found["ranks"] == expected["ranks"]
    assert found["replayed"] == (0 if rank else BATCHES)  # one process alone runs its own again
    assert list(found["state"]) == list(expected["state"])
    for key, value in expected["state"].items():
        # Another process has its numbers elsewhere in memory, by which products round; several add up in another order.
        torch.testing.assert_close(found["state"][key], value, rtol=1e-9, atol=1e-9)
    return found
