"""A module after code of others has run: as it was, in place."""

from __future__ import annotations

import copy
import enum
import random
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryPrecision

from fasc_lightning.batches import _untouched as untouched_module
from fasc_lightning.batches import untouched


class Meter:
    def __init__(self):
        self.sum, self.values, self.metric = 0.0, [torch.zeros(2)], MeanMetric()

    def __call__(self, value):
        self.sum += value
        self.values.append(value)
        self.values[0] += 1
        self.metric.update(value)
        self.last = value


@dataclass(slots=True)
class Slotted:
    count: int
    seen: list


class Stage(enum.Enum):
    ONE = 1


class Module(nn.Module):
    seen: list = []  # noqa: RUF012 # as people write it
    total = 0

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.outs, self.by_key, self.last = [], defaultdict(list), deque(maxlen=2)
        self.names, self.counts, self.order = {"a"}, Counter(a=2), OrderedDict(a=1, b=2)
        self.nested = {"a": ([1], {"b": [torch.zeros(2)]})}
        self.ema, self.array = torch.zeros(3), np.zeros(3)
        self.metric, self.auroc = BinaryAccuracy(), BinaryAUROC()
        self.metrics = MetricCollection([BinaryAccuracy(), BinaryPrecision()])
        self.loose = [MeanMetric()]
        self.meter, self.slotted, self.options = Meter(), Slotted(0, []), Namespace(n=1, list=[1])
        self.generator = torch.Generator().manual_seed(1)
        self.python, self.numpy = random.Random(1), np.random.default_rng(1)
        self.legacy, self.stage = np.random.RandomState(1), Stage.ONE
        self.step = 0

    def forward(self, x):
        self.calls += 1
        self.step += 1
        self.extra = object()
        del self.stage
        self.outs.append(self.net(x))
        self.by_key["new"].append(1)
        self.last.extend([1, 2, 3])
        self.names.add("b")
        self.counts.update("aab")
        self.order.move_to_end("a")
        self.nested["a"][0].append(2)
        self.nested["a"][1]["b"][0] += 1
        self.ema.mul_(0.5).add_(1)
        self.array += 1
        score, target = torch.rand(4), torch.tensor([0, 1, 0, 1])
        for metric in (self.metric, self.auroc, self.metrics):
            metric(score, target)
        self.metric.compute()
        self.loose[0].update(1.0)
        self.meter(3.0)
        self.slotted.count += 1
        self.slotted.seen.append(1)
        self.options.n += 1
        self.options.list.append(2)
        torch.rand(2, generator=self.generator)
        self.python.random(), self.numpy.random(), self.legacy.rand()
        self.seen.append(1)
        type(self).total += 1
        self.net[0].weight.data.mul_(2)
        self.net[2].weight.data = torch.zeros(1, 4)
        self.net[0].bias.grad = torch.ones(4)
        self.net[2].bias.requires_grad_(False)
        self.net.register_forward_hook(lambda *args: None)
        self.net[1].eval()
        self.added = nn.Linear(2, 2)
        return self.outs[-1].sum()


def picture(value, depth=0):
    """Everything in a module as nested plain data, by value; written for these tests alone."""
    if isinstance(value, torch.Tensor):
        grad = value.grad if value.is_leaf else None
        return ["tensor", value.tolist(), value.requires_grad, None if grad is None else grad.tolist()]
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return str(value.get_state())
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return [type(value).__name__, [(key, picture(item, depth + 1)) for key, item in value.items()]]
    if isinstance(value, list | tuple | deque):
        return [type(value).__name__, [picture(item, depth + 1) for item in value]]
    if isinstance(value, Slotted):
        return [value.count, list(value.seen)]
    if isinstance(value, nn.Module | Meter | Namespace) and depth < 12:
        return [id(value), picture(vars(value), depth + 1)]
    return repr(value)


def places(value, depth=0):
    """The identities of all containers and tensors in a module."""
    found = [id(value)] if isinstance(value, torch.Tensor | dict | list | deque | set | nn.Module) else []
    if isinstance(value, nn.Module | Meter):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | deque) and depth < 12:
        found += [place for item in value for place in places(item, depth + 1)]
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was_and_the_same_objects(fails):
    module = Module()
    module(torch.randn(5, 3))  # so that nothing is empty
    module.stage = Stage.ONE
    before, where = picture(module), places(module)
    others = list(module.seen), module.total, module.outs
    data = module.net[2].weight.data_ptr()
    try:
        with untouched(module):
            for _ in range(2):
                module(torch.randn(5, 3)).backward()
                module.stage = Stage.ONE
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert picture(module) == before
    assert places(module) == where
    assert (module.seen, module.total) == others[:2]
    assert module.outs is others[2]
    assert module.net[2].weight.data_ptr() == data
    assert "seen" not in vars(module)
    copy.deepcopy(module.metrics)


def test_a_backward_pass_inside_sees_what_the_forward_saved():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(2))

        def forward(self, x):
            self.scale += 1
            return (x * self.scale).sum()

    module, x = Counting(), torch.ones(2, requires_grad=True)
    with untouched(module):
        module(x).backward()
    assert x.grad.tolist() == [2, 2]
    assert module.scale.tolist() == [1, 1]


def test_others_objects_are_left_alone():
    class Data(torch.utils.data.Dataset):
        reads = 0

        def __len__(self):
            return 1

        def __getitem__(self, i):
            self.reads += 1
            return i

    module = nn.Linear(2, 2)
    module.data, module.optimizer = Data(), torch.optim.SGD(module.parameters(), 0.1)
    with untouched(module):
        module.data[0]
        module.optimizer.param_groups[0]["lr"] = 0.5
    assert module.data.reads == 1
    assert module.optimizer.param_groups[0]["lr"] == 0.5


def test_cycles_and_deep_structures_end():
    module = nn.Linear(2, 2)
    module.parent = [module]
    module.chain = chain = Meter()
    for _ in range(50):
        chain.next = Meter()
        chain = chain.next
    module.many = [[i] for i in range(untouched_module.ENTRIES + 1)]
    with untouched(module):
        module.many.append(1)
        module.chain.sum = 5
    assert len(module.many) == untouched_module.ENTRIES + 1
    assert module.chain.sum == 0


def test_a_write_into_a_tensor_too_large_to_copy_is_said(monkeypatch):
    monkeypatch.setattr(untouched_module, "COPIED", 64)
    module = nn.Module()
    module.large, module.other, module.small = torch.zeros(100), torch.zeros(100), torch.zeros(2)

    def write():
        with untouched(module):
            module.large += 1
            module.small += 1
            module.other = torch.ones(1)

    with pytest.warns(UserWarning, match=r"shape \(100,\).*stays as that step left it"):
        write()
    assert (module.large.sum(), module.other.sum(), module.small.sum()) == (100, 0, 0)


def test_parameters_of_large_models_are_not_copied(monkeypatch):
    monkeypatch.setattr(untouched_module, "PARAMETERS", 8)
    module = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="wrote into a tensor"), untouched(module), torch.no_grad():
        module.weight.zero_()
    assert not module.weight.any()
