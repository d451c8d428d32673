from __future__ import annotations

import hashlib
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch

from fasc_lightning._utils import SchemaError, checksum, file_checksum, tensor_checksum

STATE = {"a": [1, 2.5, None, True, "x"], "b": {"t": torch.arange(6.0).view(2, 3)}, "c": np.arange(3)}


def test_what_files_and_plugins_turn_into_one_another_is_alike():
    assert checksum((1, [2])) == checksum([1, (2,)])
    assert checksum({"a": 1, "b": 2}) == checksum(OrderedDict(b=2, a=1))
    assert checksum(STATE) == checksum({key: STATE[key] for key in reversed(STATE)})
    assert checksum(math.nan) == checksum(float("nan"))


def test_a_saved_state_has_the_checksum_that_it_had(tmp_path):
    state = {**STATE, "c": [torch.ones(2, dtype=torch.bfloat16), torch.tensor(3), torch.zeros(0, 4)]}
    torch.save(state, tmp_path / "s.pt")
    assert checksum(torch.load(tmp_path / "s.pt", weights_only=True)) == checksum(state)


@pytest.mark.parametrize(
    "other",
    [
        {**STATE, "a": [1, 2.5, None, True, "y"]},
        {**STATE, "a": [1, 2.5, None, 1, "x"]},
        {**STATE, "a": [1.0, 2.5, None, True, "x"]},
        {**STATE, "a": [1, 2.5, None, True]},
        {**STATE, "a": [[1, 2.5], None, True, "x"]},
        {**STATE, "b": {"t": torch.arange(6.0).view(3, 2)}},
        {**STATE, "b": {"t": torch.arange(6).view(2, 3)}},
        {**STATE, "b": {"u": torch.arange(6.0).view(2, 3)}},
        {**STATE, "b": {"t": torch.nextafter(torch.arange(6.0), torch.tensor(9.0)).view(2, 3)}},
        {**STATE, "c": np.arange(4)},
        {**STATE, "d": None},
    ],
)
def test_whatever_else_changes_changes_it(other):
    assert checksum(other) != checksum(STATE)


def test_a_sign_of_zero_counts_and_strides_do_not():
    assert tensor_checksum(torch.tensor([0.0])) != tensor_checksum(torch.tensor([-0.0]))
    matrix = torch.randn(3, 4)
    assert tensor_checksum(matrix.T) == tensor_checksum(matrix.T.contiguous())


def test_depth_is_bounded():
    deep = []
    for _ in range(500):
        deep = [deep]
    with pytest.raises(SchemaError, match="levels"):
        checksum(deep)


def test_a_files_checksum_is_that_of_its_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"some bytes")
    assert file_checksum(tmp_path / "f") == hashlib.sha256(b"some bytes").hexdigest()
