"""Calibrations that cannot go on where they were interrupted, and files that cannot be written: said, and survived."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from interrupted import BATCHES, Between, Fits, assert_same, every_batch, failing, sidecars, stateful_loader
from tiny import Tokens, causal_module, token_loader
from torch.utils.data import RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from watching import RecordingCallback, assert_untouched, state

from fasc_lightning import CausalLMModule, FascCallback
from fasc_lightning.layers import is_compressed, model_size

# Lightning's notice of a folder in which an interrupted fit has left its checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

AGAIN = "[Tt]he calibration starts again"


@pytest.fixture
def no_limit(monkeypatch):
    """Every checkpoint in the middle of a calibration has a sidecar."""
    monkeypatch.setattr("fasc_lightning.calibration._sidecar.SIDECAR_BYTES", 0)


@pytest.mark.parametrize("validation", [False, True])
def test_any_other_loader_starts_the_calibration_again_and_says_so(make_trainer, tmp_path, no_limit, validation):
    fits = Fits(make_trainer, tmp_path, loader=lambda: token_loader(samples=2 * BATCHES), validation=validation)
    straight = fits.straight(5)
    assert sidecars(tmp_path / "left") == []
    with pytest.warns(UserWarning, match=rf"{AGAIN} from its first batch.*DataLoader is not stateful, as torchdata's"):
        resumed = fits.resumed()
    # Frozen, and in the order of the data: nothing is lost but time.
    assert_same(resumed, straight)
    assert resumed[1].batches == BATCHES


def test_weights_that_train_are_trained_on_those_batches_twice(make_trainer, tmp_path):
    fits = Fits(make_trainer, tmp_path, loader=lambda: token_loader(samples=2 * BATCHES), update_weights=True)
    fits.straight(5)
    with pytest.warns(UserWarning, match=r"trained on those batches once more, since update_weights=True"):
        module, callback = fits.resumed()
    assert callback.batches == BATCHES
    assert is_compressed(module)
    assert callback.report.layers[0].tokens == 2 * BATCHES * 16


def test_learning_rates_go_back_with_the_calibration(make_trainer, tmp_path):
    class Scheduled(CausalLMModule):
        rates: list

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=BATCHES)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def on_train_batch_start(self, batch, batch_idx):
            self.rates.append(self.optimizers().param_groups[0]["lr"])

    def fit(folder, *callbacks, **options):
        module = Scheduled(causal_module().model)
        module.rates = []
        trainer = make_trainer(FascCallback(keep=0.6), every_batch(folder), *callbacks, enable_checkpointing=True)
        trainer.fit(module, token_loader(samples=2 * BATCHES), **options)
        return module.rates

    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                raise InterruptedError

    expected = fit(tmp_path / "straight")
    with pytest.raises(InterruptedError):
        fit(tmp_path / "left", Stop())
    with pytest.warns(UserWarning, match=AGAIN):
        # One more step than its total would be an error of the scheduler.
        assert fit(tmp_path / "left", ckpt_path=tmp_path / "left" / "last.ckpt") == expected


@pytest.mark.sampled(2)
@pytest.mark.parametrize("damage", ["missing", "truncated", "of another checkpoint", "of another kind"])
def test_statistics_that_cannot_be_read_are_never_guessed(make_trainer, tmp_path, no_limit, damage):
    fits = Fits(make_trainer, tmp_path)
    straight = fits.straight(5)
    (name,) = sidecars(tmp_path / "left")
    path = tmp_path / "left" / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        path.unlink()
    if damage == "of another checkpoint":
        other = Fits(make_trainer, tmp_path / "other")
        other.straight(3)
        (tmp_path / "other" / "left" / sidecars(tmp_path / "other" / "left")[0]).rename(path)
    elif damage == "of another kind":
        from safetensors.torch import save_file

        save_file({"a": torch.ones(2)}, path)
    with pytest.warns(UserWarning, match=rf"{AGAIN}.*cannot be read: there is no last\.ckpt\.\w+\.fasc\.safetensors"):
        _, callback = fits.resumed()
    assert callback.batches == BATCHES
    assert callback.report.layers[0].tokens == straight[1].report.layers[0].tokens


def every_token(batch):
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)


def half_of_the_terms(batch):
    return batch["input_ids"].numel() / 2


CHANGES = {
    "the mask": ({"token_mask": every_token}, r"token_mask was None and is .*every_token now"),
    "the terms": ({"loss_terms": half_of_the_terms}, r"loss_terms was None and is .*half_of_the_terms now"),
    "the seed": ({"seed": 3}, "seed was 0 and is 3 now"),
    "the statistics": ({"method": "gfwsvd"}, "statistics was .* and is .* now"),
    "the tokens": ({"token_fraction": 0.5}, "token_fraction was 1.0 and is 0.5 now"),
    "the weights": ({"update_weights": True}, "update_weights was False and is True now"),
    "the gate": ({"gate": 0.2}, "was .* and is .* now"),
    "a refit": ({"refit": True}, r"replay of batches \(.*\) was False and is True now"),
    "the allocation": ({"allocation": "measured"}, r"replay of batches \(.*\) was False and is True now"),
}


SAMPLED = ("the mask", "the seed", "the statistics", "a refit")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in SAMPLED else pytest.mark.exhaustive) for case in CHANGES]
)
def test_other_options_start_the_calibration_again(make_trainer, tmp_path, case):
    options, message = CHANGES[case]
    fits = Fits(make_trainer, tmp_path, refit=False, allocation="fisher")
    fits.straight(5)
    with pytest.warns(UserWarning, match=f"{AGAIN}.*{message}"):
        _, callback = fits.resumed(**options)
    assert callback.batches == BATCHES


def test_another_budget_uses_the_same_statistics(make_trainer, tmp_path):
    fits = Fits(make_trainer, tmp_path, refit=True)
    _, straight = fits.straight(5)
    _, callback = fits.resumed(keep=0.4, allocation="uniform", layout="factors", refit=False)
    assert callback.batches == BATCHES - 5
    assert callback.report.kept <= 0.4
    assert [row.rho for row in callback.report.layers] == [row.rho for row in straight.report.layers]


@pytest.mark.parametrize("what", ["number of processes", "layers"])
def test_another_setting_starts_the_calibration_again(make_trainer, tmp_path, what):
    fits = Fits(make_trainer, tmp_path)
    straight = fits.straight(5)
    path = tmp_path / "left" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (kept,) = [s["calibration"] for s in checkpoint["callbacks"].values() if "calibration" in s]
    if what == "layers":
        name, said = list(kept["setting"]["layers"])[-1], r"layers: 'model.*' was not there and is \[\d+, \d+\] now"
        del kept["setting"]["layers"][name]
    else:
        kept["setting"][what], said = 2, "number of processes was 2 and is 1 now"
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match=f"{AGAIN}.*{said}"):
        _, callback = fits.resumed()
    assert callback.batches == BATCHES
    assert callback.report.layers[0].tokens == straight[1].report.layers[0].tokens


def test_a_fit_that_is_made_longer_calibrates_at_its_new_end(make_trainer, tmp_path, caplog):
    fits = Fits(make_trainer, tmp_path)
    fits.straight(5)
    with caplog.at_level("INFO"):
        _, callback = fits.resumed(trainer={"max_epochs": 2})
    assert (
        "ends at another time (max_epochs=2, max_steps=-1, calibration_steps=None; it was max_epochs=1" in caplog.text
    )
    assert callback.batches == BATCHES


def test_a_checkpoint_without_statistics_in_the_middle_of_the_last_epoch_is_not_passed_over(make_trainer, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                raise InterruptedError

    trainer = make_trainer(Stop(), every_batch(tmp_path), enable_checkpointing=True)
    with pytest.raises(InterruptedError):
        trainer.fit(causal_module(), stateful_loader())
    callback = RecordingCallback(keep=0.6)
    trainer = make_trainer(callback, every_batch(tmp_path), enable_checkpointing=True)
    with pytest.warns(UserWarning, match=f"{AGAIN} with what is left .* no statistics of its first 5 batches"):
        trainer.fit(causal_module(), stateful_loader(), ckpt_path=tmp_path / "last.ckpt")
    assert callback.batches == BATCHES - 5


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_checkpoint_of_before_the_calibration_is_as_ever(make_trainer, tmp_path, epoch):
    fits = Fits(make_trainer, tmp_path, update_weights=True, trainer={"max_epochs": 2})
    straight = fits.straight(0 if epoch else 5, epoch)
    resumed = fits.resumed()
    assert_same(resumed, straight)
    assert resumed[1].batches == BATCHES


def test_the_middle_of_a_batch_is_no_place_to_go_on_from(make_trainer, tmp_path):
    class Save(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.fit_loop.epoch_loop.batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    fits = Fits(make_trainer, tmp_path)
    fits.run(Save())
    with pytest.warns(UserWarning, match=f"{AGAIN}.*saved in the middle of a batch"):
        _, callback = fits.run(ckpt_path=tmp_path / "middle.ckpt")
    assert callback.batches == BATCHES


def test_an_order_that_nobody_keeps_is_no_order_to_go_on_in(make_trainer, tmp_path):
    def loader():
        data = Tokens(samples=2 * BATCHES)
        return StatefulDataLoader(data, batch_size=2, sampler=RandomSampler(data))

    fits = Fits(make_trainer, tmp_path, loader=loader)
    fits.straight(5)
    with pytest.warns(UserWarning, match=f"{AGAIN}.*the RandomSampler of its StatefulDataLoader is not stateful"):
        fits.resumed()


class Bag(dict):
    """A batch of a type of one's own."""


def bagged(samples):
    return Bag(torch.utils.data.default_collate(samples))


@pytest.mark.parametrize(("refit", "allocation"), [(True, "fisher"), (False, "measured")])
def test_batches_that_no_file_holds_cannot_be_replayed_later(make_trainer, tmp_path, refit, allocation):
    options = {"refit": refit, "allocation": allocation}
    fits = Fits(make_trainer, tmp_path, loader=lambda: stateful_loader(collate_fn=bagged), **options)
    fits.straight(5)
    with pytest.warns(UserWarning, match=rf"{AGAIN}.*its batches, which are to be replayed, hold a .*Bag"):
        fits.resumed()


def test_and_go_on_where_nothing_replays_them(make_trainer, tmp_path):
    options = {"refit": False, "allocation": "fisher"}
    fits = Fits(make_trainer, tmp_path, loader=lambda: stateful_loader(collate_fn=bagged), **options)
    straight = fits.straight(5)
    assert_same(fits.resumed(), straight)


# Fits that fail.


def fail(*unused):
    raise InterruptedError


class Fail(pl.Callback):
    on_fit_end = fail


@pytest.mark.sampled(2)
@pytest.mark.parametrize("fails", ["in the middle", "afterwards"])
@pytest.mark.parametrize("refit", [True, False])
def test_a_checkpoint_of_a_fit_that_failed_while_it_compressed_starts_the_calibration_again(
    make_trainer, tmp_path, monkeypatch, fails, refit
):
    def fit(*others, **options):
        callback, module = RecordingCallback(keep=0.6, refit=refit), causal_module()
        trainer = make_trainer(callback, *others, failing(tmp_path), enable_checkpointing=True)
        trainer.fit(module, stateful_loader(), **options)
        return module, callback

    if fails == "in the middle":
        monkeypatch.setattr("fasc_lightning.calibration._finish.model_size", fail_after(1))
    with pytest.raises(InterruptedError):
        fit(*([Fail()] if fails == "afterwards" else []))
    monkeypatch.undo()
    checkpoint = torch.load(tmp_path / "failed.ckpt", weights_only=True)
    (of_adam,) = checkpoint["optimizer_states"]
    assert of_adam["state"]
    (kept,) = [s["calibration"] for s in checkpoint["callbacks"].values() if "calibration" in s]
    assert kept["tensors"] == {}
    with pytest.warns(UserWarning, match=f"{AGAIN}.*Reason: the fit failed while it compressed the model"):
        module, callback = fit(ckpt_path=tmp_path / "failed.ckpt")
    assert callback.batches == BATCHES
    assert is_compressed(module)


def fail_after(calls):
    """The model is measured once before and once after the swap."""
    results = iter([model_size] * calls)

    def measured(*arguments):
        for measure in results:
            return measure(*arguments)
        raise InterruptedError

    return measured


def test_nothing_of_a_failed_fit_is_kept_or_acts_in_the_next(make_trainer, tmp_path):
    compressed = tmp_path / "compressed.ckpt"
    trainer = make_trainer(FascCallback(keep=0.6))
    trainer.fit(causal_module(), stateful_loader())
    trainer.save_checkpoint(compressed)
    callback = FascCallback(keep=0.6)
    trainer = make_trainer(callback, Between(4), failing(tmp_path), enable_checkpointing=True)
    plugin = trainer.strategy.checkpoint_io
    with pytest.raises(InterruptedError):
        trainer.fit(causal_module(), stateful_loader())
    assert "calibration" in str(torch.load(tmp_path / "failed.ckpt", weights_only=True)["callbacks"].values())
    assert callback._calibration.run is None
    assert trainer.strategy.checkpoint_io is plugin
    callback._calibration.run = object()  # as where another callback's failure kept Lightning from tearing down
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(causal_module(), stateful_loader(), ckpt_path=compressed)
    assert trainer.global_step == 2 * BATCHES
    assert trainer.optimizers  # of a fit that compresses nothing


# Files.


def test_a_sidecar_that_cannot_be_written_costs_the_statistics_and_nothing_else(
    make_trainer, tmp_path, no_limit, monkeypatch
):
    import safetensors.torch

    write = safetensors.torch.save_file

    def full(tensors, target, metadata=None):
        if fail:
            Path(target).write_bytes(b"half")
            raise OSError("No space left on device")
        write(tensors, target, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    fail = False
    fits = Fits(make_trainer, tmp_path)

    class Full(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            nonlocal fail
            fail = batch_idx == 4

    make = fits.make_trainer
    fits.make_trainer = lambda *given, **settings: make(Full(), *given, **settings)
    with pytest.warns(UserWarning, match=r"could not be written beside .*last\.ckpt: No space left on device"):
        straight = fits.straight(5)
    fits.make_trainer = make
    fail = False
    assert [p.name for p in (tmp_path / "left").iterdir()] == ["last.ckpt"]
    with pytest.warns(UserWarning, match=rf"{AGAIN}.*its sidecar file could not be written \(No space left"):
        _, callback = fits.resumed()
    assert callback.report.layers[0].tokens == straight[1].report.layers[0].tokens


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_and_its_sidecar(
    make_trainer, tmp_path, no_limit, monkeypatch
):
    from lightning.fabric.plugins.io import torch_io

    save = torch_io._atomic_save
    fits = Fits(make_trainer, tmp_path)
    straight = fits.run()

    def full(checkpoint, path):
        if checkpoint["global_step"] == 5:
            raise OSError("Read-only file system")
        save(checkpoint, path)

    monkeypatch.setattr(torch_io, "_atomic_save", full)
    with pytest.raises(OSError, match="Read-only file system"):
        fits.run(every_batch(tmp_path / "left"))
    monkeypatch.undo()
    assert len(sidecars(tmp_path / "left")) == 2  # the one that was there, and the new one's
    resumed = fits.resumed("left")
    assert_same(resumed, straight)
    assert resumed[1].batches == BATCHES - 4
    assert sidecars(tmp_path / "left") == []


def test_a_failed_fit_leaves_the_module_the_trainer_and_the_files(make_trainer, tmp_path, no_limit):
    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                raise InterruptedError

    module = causal_module()
    before = state(module)
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    callback = FascCallback(keep=0.6, update_weights=False)
    trainer = make_trainer(callback, Stop(), every_batch(tmp_path), enable_checkpointing=True)
    plugin = trainer.strategy.checkpoint_io
    with pytest.raises(InterruptedError):
        trainer.fit(module, stateful_loader())
    assert_untouched(module, before, flags)
    assert trainer.strategy.checkpoint_io is plugin
    assert len(sidecars(tmp_path)) == 1
