"""Which gradients of a training step are those of its loss, and what taps hold until they arrive."""

from __future__ import annotations

import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from tap_cases import assert_moments, brute_force, tapped
from tiny import causal_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from fasc_lightning import FascCallback, score
from fasc_lightning.batches import Backwards, TokenRows
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import layer_shapes, select_layers
from fasc_lightning.statistics import CalibrationMoments
from fasc_lightning.statistics._layer_moments import NEEDS

BY_HAND = Backwards(announced=True, several=True)
BY_TRAINER = Backwards(announced=True)


def announced(taps, loss, **options):
    taps.begin_backward()
    loss.backward(**options)
    taps.end_backward()


@pytest.fixture
def layer():
    return nn.Linear(3, 2).double()


@pytest.fixture
def x():
    return torch.randn(5, 3, dtype=torch.float64)


def test_several_backward_passes_count_as_their_sum(layer, x):
    def losses():
        y = layer(x).tanh()
        return 1e-6 * y.square().sum(), y.sin().sum()

    expected = brute_force(layer, {"layer": layer}, lambda: sum(losses()))
    taps, moments = tapped({"layer": layer})
    taps.install()
    taps.begin_batch(TokenRows(), BY_HAND)
    small, main = losses()
    announced(taps, small, retain_graph=True)
    announced(taps, main)
    taps.end_batch()
    assert_moments(moments, "layer", *expected["layer"])
    assert moments.tokens("layer") == 5


def test_gradients_outside_of_announced_passes_do_not_count(layer, x):
    expected = brute_force(layer, {"layer": layer}, lambda: layer(x).square().sum())
    for how in (BY_TRAINER, BY_HAND):
        taps, moments = tapped({"layer": layer})
        taps.install()
        for _ in range(2):
            taps.begin_batch(TokenRows(), how)
            given = x.clone().requires_grad_()
            y = layer(given)
            (penalty,) = torch.autograd.grad(y.pow(3).sum(), given, create_graph=True)
            announced(taps, y.square().sum() + 0 * penalty.norm())
            torch.autograd.grad(layer(given).sum(), layer.weight)
        taps.end_batch()
        taps.remove()
        assert_moments(moments, "layer", *(torch.cat([part, part]) for part in expected["layer"]))


def test_a_step_that_announces_nothing_counts_its_own_passes(layer, x):
    expected = brute_force(layer, {"layer": layer}, lambda: 3 * layer(x).square().sum())
    taps, moments = tapped({"layer": layer})
    taps.install()
    taps.begin_batch(TokenRows(), BY_HAND)
    loss = layer(x).square().sum()
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    taps.end_batch()
    assert_moments(moments, "layer", *expected["layer"])


def test_sums_of_passes_are_refused_like_single_gradients(layer, x):
    taps, moments = tapped({"layer": layer})
    taps.install()
    taps.begin_batch(TokenRows("batch 3"), BY_HAND)
    with pytest.raises(FloatingPointError, match=r"a gradient of layer 'layer' is NaN or Inf in batch 3"):
        announced(taps, (layer(x) * float("inf")).sum())
    taps.begin_batch(TokenRows(), BY_HAND)
    given = x.clone()
    announced(taps, layer(given).sum())
    given += 1
    with pytest.raises(RuntimeError, match="'layer' was modified in place"):
        taps.end_batch()
    assert moments.tokens("layer") == 0
    taps.begin_batch(TokenRows(), BY_HAND)  # what failed leaves nothing behind
    announced(taps, layer(x).sum())
    taps.end_batch()
    assert moments.tokens("layer") == 5


def test_every_statistic_takes_the_sum_of_the_passes():
    model = causal_model("llama").double()
    layers, ids = select_layers(model), torch.randint(3, 64, (3, 12))

    def gathered(split):
        moments = CalibrationMoments(layer_shapes(layers), torch.float64, needs=NEEDS)
        taps = Taps(layers, moments)
        taps.install()
        taps.begin_batch(TokenRows(), BY_HAND)
        logits = model(ids).logits
        first, second = logits.softmax(-1).square().sum(), logits.sin().sum()
        if split:
            announced(taps, first, retain_graph=True)
            announced(taps, second)
        else:
            announced(taps, first + second)
        taps.end_batch()
        taps.remove()
        return moments

    whole, parts = gathered(False), gathered(True)
    for name in layers:
        for a, b in zip(whole.layer(name).coupled, parts.layer(name).coupled, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7 * a.abs().max().item())
        torch.testing.assert_close(whole.layer(name).fisher_rows, parts.layer(name).fisher_rows, rtol=1e-5, atol=0)


# What taps hold.


def note_input(seen, module, args):
    seen.append(StorageWeakRef(args[0].untyped_storage()))


def test_checkpointed_inputs_are_not_held_by_the_taps():
    """The memory of the inputs of the layers inside is free after the forward, as it is without taps."""
    for frozen in (False, True):
        block = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh()).double()
        x = torch.randn(5, 4, dtype=torch.float64)
        expected = brute_force(block, select_layers(block), lambda block=block, x=x: block(x).square().sum())
        block.requires_grad_(not frozen)
        seen = []
        block[2].register_forward_pre_hook(partial(note_input, seen))
        taps, moments = tapped(select_layers(block))
        taps.install()
        taps.begin_batch(TokenRows())
        loss = checkpoint(block, x, use_reentrant=False).square().sum()
        assert [storage.expired() for storage in seen] == [True]
        loss.backward()
        taps.end_batch()
        for name in layer_shapes(taps.layers):
            assert_moments(moments, name, *expected[name])


def test_inputs_shared_across_a_checkpoint_are_counted():
    """One tensor is read outside of a checkpoint and twice inside, before or after."""

    class Model(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.first = first
            self.apart = False
            self.out, self.q, self.k = (nn.Linear(4, 3) for _ in range(3))

        def forward(self, x):
            x = x.tanh()
            if self.first:
                return self.out(x) + self.run(x)
            return self.run(x) + self.out(x)

        def run(self, x):
            return checkpoint(self.inner, x, use_reentrant=False) if self.apart else self.inner(x)

        def inner(self, x):
            return self.q(x).sin() * self.k(x)

    for first in (False, True):
        model, x = Model(first).double(), torch.randn(5, 4, dtype=torch.float64)
        layers = select_layers(model)
        expected = brute_force(model, layers, lambda model=model, x=x: model(x).square().sum())
        model.apart = True
        for how in (BY_TRAINER, BY_HAND):
            taps, moments = tapped(layers)
            taps.install()
            taps.begin_batch(TokenRows(), how)
            announced(taps, model(x).square().sum())
            taps.end_batch()
            taps.remove()
            for name in layers:
                assert_moments(moments, name, *expected[name])


def test_tensors_saved_on_the_cpu_come_back(layer, x):
    expected = brute_force(layer, {"layer": layer}, lambda: layer(x).square().sum())
    taps, moments = tapped({"layer": layer})
    taps.install()
    taps.begin_batch(TokenRows())
    with torch.autograd.graph.save_on_cpu():
        loss = layer(x).square().sum()
    loss.backward()
    taps.end_batch()
    assert_moments(moments, "layer", *expected["layer"])


# Fits.

DATA = TensorDataset(torch.randn(32, 6, generator=torch.Generator().manual_seed(1)), torch.arange(32) // 8 % 2)


def loader():
    return DataLoader(DATA, batch_size=8)


class Steps(pl.LightningModule):
    """Two losses of one trunk, brought back in a chosen way."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.automatic_optimization = way in ("sum", "penalty", "override")
        torch.manual_seed(0)
        self.trunk, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def losses(self, x):
        z = self.trunk(x).tanh()
        return 1e-3 * self.a(z).square().mean(), self.b(z).square().mean()

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_(self.way == "penalty")
        small, main = self.losses(x)
        if self.way == "penalty":
            (slope,) = torch.autograd.grad(main, x, create_graph=True)
            return small + main + 0 * slope.square().sum()
        if self.automatic_optimization:
            self.second = main
            return small if self.way == "override" else small + main
        optimizer = self.optimizers()
        if self.way == "by hand":
            self.manual_backward(small, retain_graph=True)
            self.manual_backward(main)
        elif self.way == "raw":
            (small + main).backward()
        elif self.way == "reversed":
            self.manual_backward(main, retain_graph=True)
            self.manual_backward(small)
        optimizer.step()
        return None

    def backward(self, loss):
        loss.backward(retain_graph=self.way == "override")
        if self.way == "override":
            self.second.backward()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class OneBackward(Steps):
    backward = pl.LightningModule.backward


@pytest.mark.parametrize("update_weights", [False, True])
def test_every_way_to_bring_losses_back_gives_one_report(make_trainer, update_weights):
    found = {}
    for way in ("sum", "penalty", "override", "by hand", "reversed"):
        module = Steps(way) if way == "override" else OneBackward(way)
        callback = FascCallback(
            rank=4, targets=["trunk"], allocation="fisher", refit=False, update_weights=update_weights, gate=0.1
        )
        make_trainer(callback).fit(module, loader())
        (row,) = callback.report.layers
        found[way] = row.loss, row.rho, row.tokens
    for way, figures in found.items():
        assert figures == pytest.approx(found["sum"], rel=1e-4), way


def test_a_step_that_calls_backward_itself_is_warned(make_trainer):
    """Its losses are not known: their terms have to be given."""
    found = []
    for way in ("sum", "raw"):
        callback = FascCallback(rank=4, targets=["trunk"], allocation="fisher", refit=False, loss_terms="sum")
        fit = make_trainer(callback).fit
        if way == "raw":
            with pytest.warns(UserWarning, match=r"calls `loss.backward\(\)` by itself"):
                fit(OneBackward(way), loader())
        else:
            fit(OneBackward(way), loader())
        found.append(callback.report.layers[0].loss)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_monitoring_looks_at_the_sum_of_the_passes(make_trainer):
    def rho(way):
        callback = FascCallback(monitor_every_n_steps=1, targets=["trunk"])
        make_trainer(callback).fit(OneBackward(way), loader())
        return [callback.rho_history.at(step)["trunk"]["rho"] for step in callback.rho_history.steps]

    assert rho("by hand") == pytest.approx(rho("sum"), rel=1e-4)
    assert rho("penalty") == pytest.approx(rho("sum"), rel=1e-4)


def test_rho_of_a_score_ignores_penalties():
    plain, penalised = (score(OneBackward(way), loader(), targets=["trunk"]) for way in ("sum", "penalty"))
    assert penalised.at()["trunk"]["rho"] == pytest.approx(plain.at()["trunk"]["rho"], rel=1e-4)


class Branches(pl.LightningModule):
    """Every second batch goes past the layers that are compressed."""

    def __init__(self, always=None):
        super().__init__()
        self.always = always
        self.losses = []
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        self.b = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        net = self.a if (y[0] == 0 if self.always is None else self.always) else self.b
        loss = nn.functional.cross_entropy(net(x), y)
        self.losses.append(loss)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert not any(loss.requires_grad and loss.grad_fn is None for loss in self.losses)
        self.losses.clear()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("options", [{}, {"passes": 2}, {"allocation": "fisher", "refit": False}])
def test_batches_that_reach_no_target_count_nothing(make_trainer, options):
    data = [batch for batch in loader() if batch[1][0] == 0]
    reports = []
    for batches in (loader(), DataLoader(data, batch_size=None)):
        module = Branches()
        callback = FascCallback(keep=0.7, targets=r"a\..*", update_weights=False, **options)
        make_trainer(callback, max_epochs=options.get("passes", 1)).fit(module, batches)
        reports.append(callback.report)
        assert module.training
        assert all(p.requires_grad for p in module.parameters())
    mixed, alone = reports
    assert [(row.tokens, row.rank) for row in mixed.layers] == [(row.tokens, row.rank) for row in alone.layers]
    for row, other in zip(mixed.layers, alone.layers, strict=True):
        assert row.loss == pytest.approx(other.loss, rel=1e-5)


def test_a_loss_that_never_reaches_a_target_ends_the_fit(make_trainer):
    module = Branches(always=False)
    with pytest.raises(RuntimeError, match="No gradient reached any of the 2 tapped layers in calibration"):
        make_trainer(FascCallback(keep=0.7, targets=r"a\..*", update_weights=False)).fit(module, loader())
    assert type(module.a[0]) is nn.Linear
    assert all(p.requires_grad for p in module.parameters())


def test_a_trained_module_with_a_detached_loss_is_refused_at_once(make_trainer):
    class Detached(Branches):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).detach()

    with pytest.raises(RuntimeError, match="the loss of batch 0 of epoch 0 on rank 0 is detached"):
        make_trainer(FascCallback(keep=0.7)).fit(Detached(), loader())


@pytest.mark.parametrize("update_weights", [False, True])
def test_layers_out_of_reach_are_named_after_a_few_batches(make_trainer, update_weights):
    batches = DataLoader(DATA, batch_size=2)
    early = (
        r"No gradient has reached 1 of 3 targeted layers in the first 8 batches .* example 'b': 1 of them did not run"
    )
    with (
        pytest.warns(UserWarning, match=early),
        pytest.warns(UserWarning, match="1 of 3 targeted layers were never called in calibration: b"),
    ):
        make_trainer(FascCallback(keep=0.7, update_weights=update_weights)).fit(Branches(always=True), batches)
    with warnings.catch_warnings(record=True) as caught:
        make_trainer(FascCallback(keep=0.7, exclude=["b"])).fit(Branches(always=True), batches)
    assert not any("gradient" in str(warning.message) for warning in caught)
