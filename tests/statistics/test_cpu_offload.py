from __future__ import annotations

import threading

import lightning.pytorch as pl
import pytest
import torch
from tiny import causal_model, causal_module, token_loader
from torch import nn
from torch.utils.data import DataLoader
from watching import assert_no_hooks

from fasc_lightning import FascCallback, compress
from fasc_lightning.statistics import CalibrationMoments, RowsRefusedError, offloaded
from fasc_lightning.statistics._cpu_offload import CpuOffload

SHAPES = {"a": (3, 5), "b": (4, 5)}
NEEDS = {"plain", "coupled", "saliency"}


def rows(features, seed, tokens=7):
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed))


def feed(sums):
    for step in range(3):
        x = rows(5, step)
        sums.add_inputs(("a", "b"), x)
        for name, (m, _) in SHAPES.items():
            h = rows(m, 10 * step + m)
            sums.add_gradients(name, h, 2.0)
            sums.add_pairs(name, x, h, [3, 4], 2.0, rows(5, step + 99))
            h.zero_()  # as autograd may, once the hook has returned
        sums.move_inputs(("a", "b"), ("b",), rows(5, step, tokens=2))
        sums.settle()


def test_moments_fed_by_a_thread_are_the_same_to_the_last_bit():
    here, there = (CalibrationMoments(SHAPES, needs=NEEDS) for _ in range(2))
    feed(here)
    feed(CpuOffload(there))
    for mine, theirs in zip(here._streams(), there._streams(), strict=True):
        for name, value in mine.sums.items():
            assert torch.equal(value, theirs.sums[name]), name


def test_rows_are_summed_in_another_thread_while_the_caller_goes_on():
    moments = CalibrationMoments(SHAPES)
    sums, gate, threads = CpuOffload(moments), threading.Event(), []
    update = moments.add_gradients

    def slow(*args):
        assert gate.wait(30)
        threads.append(threading.current_thread())
        update(*args)

    moments.add_gradients = slow
    sums.add_gradients("a", rows(3, 0))
    assert moments.tokens("a") == 0
    gate.set()
    sums.settle()
    assert moments.tokens("a") == 7
    assert threads[0] is not threading.current_thread()


def test_no_more_rows_wait_than_there_is_room_for():
    moments = CalibrationMoments(SHAPES)
    sums = CpuOffload(moments, room=2 * rows(3, 0).nbytes)
    most = 0
    for step in range(20):
        sums.add_gradients("a", rows(3, step))
        most = max(most, sums._bytes)
    assert most <= 2 * rows(3, 0).nbytes
    sums.settle()
    assert moments.tokens("a") == 140
    assert sums._bytes == 0


def test_rows_that_are_not_finite_are_named_when_the_batch_ends_and_nothing_after_them_is_summed():
    moments = CalibrationMoments(SHAPES)
    sums = CpuOffload(moments)
    bad = rows(3, 0)
    bad[0, 0] = torch.nan
    sums.add_gradients("a", bad)
    with pytest.raises(RowsRefusedError) as refused:
        sums.settle()
    assert refused.value.what == "a gradient of layer 'a'"
    sums.settle()
    assert moments.tokens("a") == 0


def test_nothing_after_refused_rows_is_summed_however_late_they_are_looked_at():
    moments = CalibrationMoments(SHAPES)
    sums = CpuOffload(moments)
    sums.add_gradients("a", torch.full((2, 3), torch.nan))
    for step in range(50):
        sums.add_gradients("b", rows(4, step))
    sums._thread.shutdown()  # all of them have had their turn
    with pytest.raises(RowsRefusedError):
        sums.settle()
    assert moments.tokens("b") == 0
    sums.add_gradients("b", rows(4, 0))
    sums.settle()
    assert moments.tokens("b") == 7


def test_other_errors_reach_the_caller_as_they_are():
    sums = CpuOffload(CalibrationMoments(SHAPES))
    sums.add_gradients("nobody", rows(3, 0))
    with pytest.raises(KeyError):
        sums.settle()


def test_moments_on_the_device_of_the_fit_are_fed_directly():
    moments = CalibrationMoments(SHAPES)
    assert offloaded(moments, torch.device("cpu")) is moments
    assert isinstance(offloaded(moments, torch.device("cuda")), CpuOffload)


def test_a_compression_by_way_of_the_thread_is_the_same(monkeypatch):
    def compressed():
        model = causal_model().eval()
        report = compress(model, token_loader(), keep=0.6, progress=False, moments_device="cpu")
        return model.state_dict(), report

    direct, first = compressed()
    made = []

    def always(moments, device):
        made.append(CpuOffload(moments))
        return made[-1]

    monkeypatch.setattr("fasc_lightning.calibration._gathering.offloaded", always)
    threaded, second = compressed()
    assert made
    assert repr(first.layers) == repr(second.layers)  # with NaN, which equals nothing
    assert all(torch.equal(direct[name], value) for name, value in threaded.items())
    assert not [t for t in threading.enumerate() if t.name.startswith("fasc-moments")]


def test_a_bad_batch_is_named_also_where_a_thread_finds_it(monkeypatch, make_trainer):
    class Rooted(pl.LightningModule):
        """Has a loss of 0, and gradients that are not numbers."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            nn.init.zeros_(self.layer.weight)
            nn.init.zeros_(self.layer.bias)

        def training_step(self, batch):
            return self.layer(batch).abs().sqrt().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    monkeypatch.setattr("fasc_lightning.calibration._gathering.offloaded", lambda moments, device: CpuOffload(moments))
    callback = FascCallback(rank=2, update_weights=False, loss_terms="sum")
    with pytest.raises(FloatingPointError, match="a gradient of layer 'layer' is NaN or Inf in batch 0 of epoch 0"):
        make_trainer(callback).fit(Rooted(), DataLoader(torch.randn(8, 4), batch_size=4))


def test_gradients_that_are_refused_do_not_get_into_the_weights(monkeypatch, make_trainer):
    class Poisoned(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def training_step(self, batch):
            loss = self.layer(batch).square().sum()
            loss.register_hook(lambda gradient: gradient * torch.inf)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    monkeypatch.setattr("fasc_lightning.calibration._gathering.offloaded", lambda moments, device: CpuOffload(moments))
    module = Poisoned()
    with pytest.raises(FloatingPointError, match="a gradient of layer 'layer'"):
        make_trainer(FascCallback(rank=2, loss_terms="sum")).fit(module, DataLoader(torch.ones(8, 4), batch_size=4))
    assert torch.isfinite(module.layer.weight).all()


def test_a_fit_that_fails_ends_its_thread_and_lets_go_of_the_model_whatever_the_thread_had_to_say(
    monkeypatch, make_trainer
):
    made = []

    class Full(CpuOffload):
        def __init__(self, moments):
            super().__init__(moments)
            moments.add_gradients = self.refuse
            made.append(self)

        def refuse(self, *args):
            raise RuntimeError("not enough memory")

    class Interrupting(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            raise InterruptedError

    monkeypatch.setattr("fasc_lightning.calibration._gathering.offloaded", lambda moments, device: Full(moments))
    module = causal_module()
    with pytest.raises(InterruptedError):
        make_trainer(Interrupting(), FascCallback(rank=0.5, update_weights=False)).fit(module, token_loader())
    assert made
    assert all(p.requires_grad for p in module.parameters())
    assert_no_hooks(module)
    assert not [t for t in threading.enumerate() if t.name.startswith("fasc-moments")]


def test_other_places_are_refused():
    with pytest.raises(ValueError, match="`moments_device`"):
        FascCallback(rank=0.5, moments_device="cuda:1")
