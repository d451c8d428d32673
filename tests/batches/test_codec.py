from __future__ import annotations

import json
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from transformers import BatchEncoding

from fasc_lightning.batches import UnsavableBatchError, pack_batch, unpack_batch


def returned(batch):
    """A batch after the way that it takes: through JSON and a safetensors file."""
    plain, tensors = pack_batch(batch, "batch.")
    return unpack_batch(json.loads(json.dumps(plain)), load(save(tensors)).__getitem__)


def test_batches_of_every_usual_kind_come_back():
    x, y = torch.randn(2, 3), torch.tensor([1, 2])
    for batch in (
        x,
        [x, y],
        (x, (y, None)),
        {"x": x, "names": ["a", "b"], "scale": 0.5, "flag": True, 3: y},
        [torch.zeros(0, 4), torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor(True)],
    ):
        found = returned(batch)
        assert type(found) is type(batch)
        assert str(found) == str(batch)


def test_a_batch_of_transformers_is_one_again():
    batch = BatchEncoding({"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 1]])})
    found = returned(batch)
    assert type(found) is BatchEncoding
    assert torch.equal(found.input_ids, batch.input_ids)
    assert torch.equal(found["attention_mask"], batch["attention_mask"])


def test_tensors_that_share_memory_or_are_strided_come_back_alone():
    ids = torch.arange(12).view(3, 4)
    batch = {"input_ids": ids, "labels": ids, "first": ids[0], "columns": ids.T}
    _, tensors = pack_batch(batch)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 4
    found = returned(batch)
    assert all(torch.equal(found[name], value) for name, value in batch.items())


def test_a_part_of_a_larger_tensor_is_packed_without_the_rest():
    data = torch.arange(1000.0)
    _, tensors = pack_batch([data[:4], data[4:8], torch.zeros(0), torch.zeros(0)])
    assert [tensor.untyped_storage().nbytes() for tensor in tensors.values()] == [16, 16, 0, 0]


def test_packing_looks_at_each_tensor_once(monkeypatch):
    looked = []
    storage = torch.Tensor.untyped_storage
    monkeypatch.setattr(torch.Tensor, "untyped_storage", lambda tensor: looked.append(1) or storage(tensor))
    pack_batch([torch.ones(2) for _ in range(50)])
    assert len(looked) == 100


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        (Pair(1, 2), "Pair"),
        ({"x": [OrderedDict()]}, "a collections.OrderedDict"),
        ({("a", 1): 2}, r"a mapping with the key \('a', 1\)"),
        ([np.zeros(2)], "a numpy.ndarray"),
        ([torch.nn.Parameter(torch.zeros(2))], "Parameter"),
    ],
)
def test_what_could_not_be_made_again_is_refused(batch, what):
    with pytest.raises(UnsavableBatchError, match=what):
        pack_batch(batch)
