from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from expert_cases import batches, make
from interrupted import failing
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import causal_model, causal_module, token_loader
from torch.utils.data import DataLoader, IterableDataset
from watching import RecordingCallback, state

from fasc_lightning import FascCallback, compress
from fasc_lightning.calibration import share_units, shares
from fasc_lightning.layers import is_compressed


def compressed(passes, **options):
    model = causal_model().eval()
    report = compress(model, token_loader(), keep=0.6, refit=False, passes=passes, progress=False, **options)
    return model, report


@pytest.mark.parametrize(
    "options", [{}, {"token_fraction": 0.5}, {"gate": 0.05}, {"sketch": "range", "sketch_above": 40}]
)
def test_four_passes_give_the_factors_of_one(options):
    (one, first), (four, second) = compressed(1, **options), compressed(4, **options)
    assert [(a.name, a.rank, a.layout, a.tokens) for a in first.layers] == [
        (b.name, b.rank, b.layout, b.tokens) for b in second.layers
    ]
    assert [layer.method for layer in first.layers] == [layer.method for layer in second.layers]
    ids = torch.arange(3, 19)[None]
    torch.testing.assert_close(one(ids).logits, four(ids).logits, rtol=1e-4, atol=1e-5)


def test_experts_of_a_later_pass_know_of_the_sequences_of_a_batch():
    def scored(passes):
        report = compress(
            make("mixtral"), batches(), keep=0.6, allocation="fisher", passes=passes, gate=0.05, progress=False
        )
        return [(layer.method, layer.rank) for layer in report.layers], [layer.rho_debiased for layer in report.layers]

    (one, first), (three, second) = scored(1), scored(3)
    assert one == three
    assert first == pytest.approx(second, abs=1e-5)


def test_the_exclusions_of_the_gate_know_of_all_layers_in_every_pass():
    options = {"gate": 0.0, "gate_exclude": "paper"}
    (_, first), (_, second) = compressed(1, **options), compressed(5, **options)
    assert [layer.method for layer in first.layers] == [layer.method for layer in second.layers]
    assert [layer.flags for layer in first.layers] == [layer.flags for layer in second.layers]


def test_passes_need_a_share_of_the_moments_at_a_time():
    (_, one), (_, four) = compressed(1), compressed(4)
    assert four.moments_bytes < 0.5 * one.moments_bytes
    assert four.options["passes"] == 4
    assert "passes" not in one.options


def test_as_many_passes_as_layers_see_the_same_tokens_in_each_and_more_are_refused():
    (_, one), (_, most) = compressed(1), compressed(14)
    assert [(a.name, a.rank, a.tokens) for a in one.layers] == [(b.name, b.rank, b.tokens) for b in most.layers]
    with pytest.raises(ValueError, match="at most 14 passes"):
        compressed(15)


def test_a_pass_without_data_leaves_the_model_as_it_was():
    class Once(IterableDataset):
        batches = iter(list(token_loader()))

        def __iter__(self):
            return self.batches

    model = causal_model().eval()
    with pytest.raises(MisconfigurationException, match="but the last had none"):
        compress(model, DataLoader(Once(), batch_size=None), keep=0.6, passes=2, progress=False)
    assert not is_compressed(model)


def test_passes_over_unequal_data_are_warned_of(make_trainer):
    class Shrinking(IterableDataset):
        left = 5

        def __iter__(self):
            self.left -= 1
            return iter(list(token_loader())[: self.left])

    callback = FascCallback(rank=0.5, passes=2, update_weights=False)
    with pytest.warns(UserWarning, match="unequal numbers of batches: 4, 3"):
        make_trainer(callback, max_epochs=2).fit(causal_module(), DataLoader(Shrinking(), batch_size=None))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_fit_that_is_resumed_in_its_second_pass_begins_again_with_the_first(make_trainer, tmp_path):
    class Failing(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 2):
                raise InterruptedError

    def fit(*callbacks, passes=2, ckpt_path=None):
        callback, module = RecordingCallback(rank=0.5, passes=passes, update_weights=False), causal_module()
        trainer = make_trainer(callback, *callbacks, max_epochs=2, enable_checkpointing=bool(callbacks))
        trainer.fit(module, token_loader(), ckpt_path=ckpt_path)
        return callback, state(module)

    _, straight = fit()
    for passes in (2, 1):
        with pytest.raises(InterruptedError):
            fit(failing(tmp_path / str(passes)), Failing(), passes=passes)
    with pytest.warns(UserWarning, match="starts again from the first"):
        callback, resumed = fit(ckpt_path=tmp_path / "2" / "failed.ckpt")
    assert callback.batches == 8
    torch.testing.assert_close(straight, resumed)
    # The calibration of one pass began in the last epoch.
    with (
        pytest.warns(UserWarning, match="its first batch"),
        pytest.raises(MisconfigurationException, match="in epoch 1 of 2"),
    ):
        fit(ckpt_path=tmp_path / "1" / "failed.ckpt")


def test_the_last_epochs_calibrate_and_nothing_is_trained_in_them(make_trainer):
    module, callback = causal_module(), RecordingCallback(rank=0.5, passes=2, update_weights=False)
    make_trainer(callback, max_epochs=3).fit(module, token_loader())
    assert is_compressed(module)
    assert callback.report.seconds["calibrate"] > 0


def test_a_fit_that_is_stopped_before_its_last_pass_leaves_the_model_as_it_was(make_trainer):
    class Stopping(FascCallback):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            trainer.should_stop = True

    module = causal_module()
    before = state(module)
    with pytest.raises(MisconfigurationException, match="stopped in pass 2"):
        make_trainer(Stopping(rank=0.5, passes=3, update_weights=False), max_epochs=3).fit(module, token_loader())
    assert not is_compressed(module)
    assert all(torch.equal(before[name], value) for name, value in state(module).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 0}, "positive int"),
        ({"passes": 2}, "update_weights=False"),
        ({"passes": 2, "update_weights": False, "refit": True}, "refit=False"),
        ({"passes": 2, "update_weights": False, "calibration_steps": 4}, "either"),
    ],
)
def test_options_that_do_not_go_with_passes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FascCallback(rank=0.5, **options)


def test_fewer_epochs_than_passes_are_refused_before_the_first_batch(make_trainer):
    callback = RecordingCallback(rank=0.5, passes=3, update_weights=False)
    with pytest.raises(MisconfigurationException, match="at least 3 epochs"):
        make_trainer(callback, max_epochs=2).fit(causal_module(), token_loader())
    assert callback.batches == 0


@pytest.mark.parametrize("averaging", [WeightAveraging(use_buffers=False), StochasticWeightAveraging(1e-3)])
@pytest.mark.parametrize("options", [{"passes": 2}, {"sketch": "projected"}])
def test_averaged_weights_are_refused(make_trainer, averaging, options):
    callbacks = FascCallback(rank=0.5, update_weights=False, **options), averaging
    with pytest.raises(MisconfigurationException, match="averaging"):
        make_trainer(*callbacks, max_epochs=2).fit(causal_module(), token_loader())


@pytest.mark.filterwarnings("ignore:.*saw fewer tokens")
def test_a_fast_development_run_has_one_pass(make_trainer):
    module = causal_module()
    callback = FascCallback(rank=0.5, passes=3, update_weights=False)
    make_trainer(callback, max_epochs=3, fast_dev_run=True).fit(module, token_loader())
    assert is_compressed(module)


def test_shares_are_consecutive_about_equal_and_do_not_part_experts():
    names = ["a", "b", *(f"experts.{e}.w_up" for e in range(3)), "c", *(f"b.experts.{e}.w_up" for e in range(2))]
    units = share_units(names)
    assert units == [[0], [1], [2, 3, 4], [5], [6, 7]]
    found = shares([1] * 8, 3, units)
    assert [i for share in found for i in share] == list(range(8))
    assert all(any(set(unit) <= set(share) for share in found) for unit in units)
    assert len(found) == 3
    assert shares([100, 1, 1], 3) == [[0], [1], [2]]
    with pytest.raises(ValueError, match="at most 2 passes"):
        shares([5, 1], 9)
