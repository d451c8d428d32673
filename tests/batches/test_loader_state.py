from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import DataLoaderShard
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher, _PrefetchDataFetcher
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import BatchSampler
from torchdata.stateful_dataloader.sampler import RandomSampler as StatefulRandomSampler

from fasc_lightning.batches import go_back, is_stateful, obstacle
from fasc_lightning.batches._loader_state import _drawn, _order

DATA = list(range(16))


def dealt_out(sampler):
    """A loader as Lightning makes it for the second of two processes."""
    wrapper = DistributedSamplerWrapper(sampler, num_replicas=2, rank=1, shuffle=True, seed=0)
    return StatefulDataLoader(DATA, batch_sampler=BatchSampler(wrapper, 2, drop_last=False))


@pytest.mark.parametrize(
    ("make", "stateful"),
    [
        (lambda: DataLoaderShard(DATA, batch_size=2), False),  # has the methods, and fails when they are called
        (lambda: DataLoaderShard(DATA, batch_size=2, use_stateful_dataloader=True), True),
        (lambda: DataLoader(DATA, batch_size=2), False),
        (lambda: StatefulDataLoader(DATA, batch_size=2), True),
        (lambda: SimpleNamespace(state_dict=lambda: {}), False),
    ],
)
def test_a_loader_is_stateful_if_its_methods_work(make, stateful):
    assert is_stateful(make()) == stateful


def batches(iterator):
    return [batch.tolist() for batch in iterator]


@pytest.mark.parametrize("kind", [RandomSampler, StatefulRandomSampler])
def test_an_order_that_was_dealt_out_goes_on_and_so_does_the_one_after_it(kind):
    def loader(seed):
        return dealt_out(kind(DATA, generator=torch.Generator().manual_seed(seed)))

    first = loader(0)
    iterator = iter(first)
    next(iterator)
    state, order = first.state_dict(), _order(first)
    rest, following = batches(iterator), batches(first)
    second = loader(1)
    second.load_state_dict(state)
    with _drawn([second], [order]):
        resumed = iter(second)
    assert batches(resumed) == rest
    assert batches(second) == following


def test_the_order_of_the_data_needs_no_keeping():
    loader = dealt_out(SequentialSampler(DATA))
    iterator = iter(loader)
    next(iterator)
    assert _order(loader) is None
    assert _order(StatefulDataLoader(DATA, batch_size=2, shuffle=True)) is None


def trainer(loader, fetcher=None, processed=3):
    current = SimpleNamespace(ready=3, processed=processed)
    epoch_loop = SimpleNamespace(batch_progress=SimpleNamespace(current=current))
    loop = SimpleNamespace(
        epoch_loop=epoch_loop,
        _data_fetcher=fetcher or _PrefetchDataFetcher(),
        _combined_loader=SimpleNamespace(flattened=[loader]),
    )
    return SimpleNamespace(fit_loop=loop)


class Named(RandomSampler):
    def __iter__(self):
        return map(str, super().__iter__())


def named_loader():
    loader = dealt_out(Named(DATA))
    iter(loader.batch_sampler)
    return loader


def test_what_hinders_another_process_is_named():
    stateful = StatefulDataLoader(DATA, shuffle=True)
    assert obstacle(trainer(stateful)) == ""
    assert "middle of a batch" in obstacle(trainer(stateful, processed=2))
    assert "iterator by itself" in obstacle(trainer(stateful, _DataLoaderIterDataFetcher()))
    assert "its DataLoader is not stateful" in obstacle(trainer(DataLoader(DATA)))
    drawn = StatefulDataLoader(DATA, sampler=RandomSampler(DATA))
    assert "the RandomSampler of its StatefulDataLoader is not stateful" in obstacle(trainer(drawn))
    assert "the Named of its StatefulDataLoader draws what is not a number" in obstacle(trainer(named_loader()))
    ahead = _PrefetchDataFetcher()
    ahead.batches = [({1, 2}, 0, 0)]
    assert "fetched ahead holds a builtins.set" in obstacle(trainer(stateful, ahead))


def test_going_back_keeps_what_was_learned_and_no_more():
    weights = torch.ones(2)
    checkpoint = {
        "loops": {"fit_loop": {"at": "later"}, "test_loop": {}},
        "lr_schedulers": [{"last_epoch": 9}],
        "optimizer_states": [{"state": {0: weights}, "param_groups": [{"lr": 0.9, "params": [0]}]}],
        "state_dict": {"a": weights},
    }
    before = {"loops": {"at": "first"}, "lr_schedulers": [{"last_epoch": 2}], "param_groups": [[{"lr": 0.2}]]}
    go_back(checkpoint, before)
    assert checkpoint == {
        "loops": {"fit_loop": {"at": "first"}, "test_loop": {}},
        "lr_schedulers": [{"last_epoch": 2}],
        "optimizer_states": [{"state": {0: weights}, "param_groups": [{"lr": 0.2, "params": [0]}]}],
        "state_dict": {"a": weights},
    }
