from __future__ import annotations

import pytest
import torch
from tiny import byte_tokenizer

from fasc_lightning._utils import fingerprint, tokenizer_fingerprint


def test_the_same_parts_give_the_same():
    assert fingerprint({"b": 1, "a": [2.5, None]}, torch.arange(3)) == fingerprint(
        {"a": [2.5, None], "b": 1}, torch.arange(3)
    )


def test_whatever_differs_is_told_apart():
    ones = torch.ones(2, 3)
    parts = [
        (ones,), (ones.double(),), (ones.view(3, 2),), (ones + 1,), (ones, ones), ([1, 1],), ("[1, 1]",), ("a", "b"),
        ("ab",), ("a", "b", None),
    ]  # fmt: skip
    assert len({fingerprint(*part) for part in parts}) == len(parts)


def test_what_json_does_not_know_is_refused():
    with pytest.raises(TypeError):
        fingerprint(object())


def test_tokenizers_differ_by_their_vocabulary():
    tokenizer, other = byte_tokenizer(), byte_tokenizer()
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(other)
    other.add_tokens(["fox"])
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other)
