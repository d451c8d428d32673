"""Copies of batches of many kinds: nothing shared, nothing lost."""

from __future__ import annotations

import threading
from collections import namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from fasc_lightning.batches._copying import batch_tensors, copy_batch

Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Graph:
    nodes: torch.Tensor
    extra: dict = field(default_factory=dict)


class Custom:
    """A batch class as torch's documentation pins them."""

    def __init__(self, x):
        self.x, self.names = x, ["a", "b"]

    def to(self, device):
        self.x = self.x.to(device)
        return self


KINDS = {
    "tensor": lambda x: x,
    "list": lambda x: [x, "text", 3, None],
    "dict": lambda x: {"x": {"deep": [(x,)]}},
    "named tuple": lambda x: Pair(x, "label"),
    "frozen dataclass": lambda x: Graph(x, {"name": "g"}),
    "custom class": Custom,
    "BatchEncoding": lambda x: BatchEncoding({"input_ids": x}),
    "packed sequence": lambda x: nn.utils.rnn.pack_sequence([x, x[:2]]),
    "namespace": lambda x: SimpleNamespace(x=x),
    "sparse": lambda x: {"x": x.to_sparse()},
    "parameter": lambda x: {"x": nn.Parameter(x, requires_grad=False)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_equal_and_shares_nothing(kind):
    batch = KINDS[kind](torch.arange(12.0).reshape(4, 3))
    copied = copy_batch(batch)
    assert type(copied) is type(batch)
    tensors, copies = batch_tensors(batch), batch_tensors(copied)
    assert len(tensors) == len(copies) > 0
    before = [tensor.clone() for tensor in tensors]
    for found, expected in zip(copies, before, strict=True):
        assert type(found) in (torch.Tensor, nn.Parameter)
        assert torch.equal(found.to_dense() if found.is_sparse else found, expected.to_dense())
        found.zero_()
    assert all(torch.equal(a.to_dense(), b.to_dense()) for a, b in zip(tensors, before, strict=True))


def test_arrays_are_copied_and_strings_stay():
    batch = {"x": np.ones(3), "text": ["a", "b"], "nested": [np.zeros(2)]}
    copied = copy_batch(batch)
    copied["x"][:] = 7
    copied["nested"][0][:] = 7
    copied["text"].append("c")
    assert batch["x"].sum() == 3
    assert batch["nested"][0].sum() == 0
    assert batch["text"] == ["a", "b"]


def test_what_is_one_object_or_one_memory_stays_one():
    x = torch.arange(8.0)
    copied = copy_batch({"input_ids": x, "labels": x, "head": x[:6], "list": [x]})
    assert copied["labels"] is copied["input_ids"]
    assert copied["list"][0] is copied["input_ids"]
    copied["head"][0] = -1
    assert copied["input_ids"][0] == -1
    assert x[0] == 0


def test_a_part_of_a_large_tensor_does_not_take_it_along():
    data = torch.zeros(10_000, 10)
    copied = copy_batch([data[:4], data[:, 0]])
    assert [tensor.untyped_storage().nbytes() for tensor in copied] == [160, 40_000]


def test_flags_types_and_layouts_stay():
    leaf = torch.ones(3, requires_grad=True)
    batch = [leaf, leaf * 2, torch.ones(2, 3).T, torch.ones(2, dtype=torch.cfloat).conj(), torch.zeros(0)]
    copied = copy_batch(batch)
    assert [tensor.requires_grad for tensor in copied] == [True, True, False, False, False]
    assert all(tensor.is_leaf for tensor in copied)  # else a step could not be run twice
    assert copied[2].stride() == batch[2].stride()
    assert all(torch.equal(a, b) for a, b in zip(copied, batch, strict=True))
    with torch.inference_mode():
        made = torch.ones(3)
    copy_batch(made).add_(1)


def test_modules_and_what_cannot_be_copied_are_shared():
    net, lock, numbers = nn.Linear(2, 2), threading.Lock(), iter([1, 2])
    batch = {"net": net, "lock": lock, "x": torch.ones(2), "stream": (i for i in numbers)}
    copied = copy_batch(batch)
    assert copied["net"] is net
    assert copied["lock"] is lock
    assert copied["stream"] is batch["stream"]
    assert copied["x"] is not batch["x"]
    assert list(numbers) == [1, 2]


def test_each_tensor_goes_where_it_is_wanted():
    batch = {"x": torch.ones(2, 3), "lengths": torch.tensor([3, 1]), "custom": Custom(torch.ones(2))}
    copied = copy_batch(batch, lambda i, tensor: "meta" if tensor.is_floating_point() else tensor.device)
    assert [tensor.device.type for tensor in batch_tensors(copied)] == ["meta", "cpu", "meta"]
    assert [tensor.device.type for tensor in batch_tensors(batch)] == ["cpu"] * 3
