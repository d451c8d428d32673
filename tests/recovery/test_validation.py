from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from replay_cases import Blocks, loader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from fasc_lightning.recovery import split_loader
from fasc_lightning.recovery._validation import held_out_loss


def samples(loader) -> list[int]:
    return [int(x) for batch in loader for x in torch.as_tensor(batch).flatten()]


def test_every_eighth_sample_is_held_back():
    train, held = split_loader(DataLoader(range(20), batch_size=3))
    assert samples(held) == [7, 15]
    assert samples(train) == [i for i in range(20) if i not in (7, 15)]
    assert [len(batch) for batch in train] == [3] * 6


def test_of_few_samples_the_last_one_is():
    train, held = split_loader(DataLoader(range(3)))
    assert (samples(train), samples(held)) == ([0, 1], [2])


def test_of_many_samples_64_are_at_most():
    train, held = split_loader(DataLoader(range(1000)))
    assert samples(held) == list(range(15, 1000, 16))  # 62
    assert len(samples(train)) == 1000 - 62
    assert len(samples(split_loader(DataLoader(range(512)))[1])) == 64


def test_a_shuffled_loader_stays_shuffled_and_nothing_held_back_comes_up():
    loader = DataLoader(range(64), batch_size=4, shuffle=True, drop_last=True, generator=torch.Generator())
    train, held = split_loader(loader)
    assert isinstance(train.sampler, RandomSampler)
    assert train.generator is loader.generator
    assert train.drop_last
    epochs = [samples(train) for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) == set(epochs[1]) == set(range(64)) - set(samples(held))
    assert samples(held) == samples(held) == list(range(7, 64, 8))


def test_batches_that_are_made_already_are_split_as_such():
    batches = [{"x": torch.tensor([i, i])} for i in range(8)]
    train, held = split_loader(DataLoader(batches, batch_size=None))
    assert [int(batch["x"][0]) for batch in held] == [7]
    assert len(list(train)) == 7


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(9))


class Odd(DataLoader):
    def __init__(self, count):
        super().__init__(range(count))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Stream()), "a DataLoader over Stream"),
        (DataLoader(range(9), sampler=WeightedRandomSampler([1.0] * 9, 9)), "WeightedRandomSampler"),
        ([1, 2], "come from list"),
        (DataLoader(range(9), batch_sampler=BatchSampler(SequentialSampler(range(9)), 3, False)), "a batch sampler"),
        (Odd(9), "Odd takes other arguments than DataLoader"),
        (DataLoader(range(1)), "at least 2 samples"),
    ],
)
def test_what_cannot_be_split_is_refused(loader, message):
    with pytest.raises(MisconfigurationException, match=message):
        split_loader(loader)


class Trained(Blocks):
    """Transforms its batches on their way, draws noise, and keeps what it sees."""

    def __init__(self):
        super().__init__(lambda module, x, i: module.note(x, i))
        self.outs, self.seen = [], []

    def note(self, x, batch_idx):
        self.outs.append(batch_idx)
        self._seen(batch_idx, round(float(x.mean()), 4), self.trainer.fit_loop.batch_idx)
        return x + torch.randn_like(x)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 100, batch[1]]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 1000 + torch.rand(1), batch[1]]


def test_batches_are_transformed_as_in_training_and_nothing_stays(make_trainer):
    seen, losses = [], []
    module, held = Trained(), list(loader(samples=16))
    module._seen = lambda *what: seen.append(what)

    class Looking(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            here, drawn = len(seen), torch.get_rng_state()
            losses.append(held_out_loss(trainer, pl_module, held, lambda batch, loss: 1.0))
            assert [what[0] for what in seen[here:]] == [what[2] for what in seen[here:]] == [0, 1]
            for number, value, _ in seen[here:]:
                assert 1000 < value - 100 * float(held[number][0].mean()) < 1001
            assert torch.equal(torch.get_rng_state(), drawn)
            assert pl_module.outs == list(range(batch_idx + 1))
            assert trainer.fit_loop.batch_idx == batch_idx
            assert pl_module.training
            looks.append(seen[here:])

    looks = []
    make_trainer(Looking(), limit_train_batches=3).fit(module, loader())
    assert looks[0] == looks[1] == looks[2]  # the same noise at every look
    assert len(set(losses)) == 3  # of other weights


def test_a_step_that_differentiates_is_judged(make_trainer):
    class Physics(Blocks):
        def training_step(self, batch, batch_idx):
            x = batch[0].requires_grad_()
            (slope,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
            return slope.square().mean()

    class Looking(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            held = list(loader())
            found = held_out_loss(trainer, pl_module, held, lambda batch, loss: 1.0)
            expected = sum(pl_module.training_step(copy.deepcopy(batch), 0).item() for batch in held) / len(held)
            assert found == pytest.approx(expected)
            assert not any(x.requires_grad for x, _ in held)
            assert all(p.requires_grad for p in pl_module.parameters())

    make_trainer(Looking()).fit(Physics(), loader())
