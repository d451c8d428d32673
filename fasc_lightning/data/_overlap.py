"""Passages that training data share with evaluation texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

#: Tokens of a passage: some two dozen words, which no two texts share by chance.
PASSAGE = 32


def shares_passage(examples: Sequence[Tensor], windows: Iterable[Tensor], length: int = PASSAGE) -> list[bool]:
    """Tell which examples share a passage of tokens with some window; shorter ones share none.

    Passages are compared by a 64-bit polynomial hash of their tokens.

    Args:
        examples: Token ids of each example, int64 of shape (tokens,).
        windows: Token ids, each (windows, tokens).
        length: Tokens of a passage.
    """
    known = torch.cat([torch.empty(0, dtype=torch.int64), *(_hashes(w.cpu(), length).flatten() for w in windows)])
    if not len(known):
        return [False] * len(examples)
    hashes = [_hashes(ids, length) for ids in examples]
    found = torch.isin(torch.cat([known[:0], *hashes]), known)  # one search for all: it sorts what is known
    return [bool(part.any()) for part in found.split([len(part) for part in hashes])]


def _hashes(ids: Tensor, length: int) -> Tensor:
    """Return the hash of every passage along the last axis, (..., tokens - length + 1); none of shorter texts."""
    if ids.shape[-1] < length:
        return ids.new_empty(0)
    found = torch.zeros_like(ids[..., : ids.shape[-1] - length + 1])
    for start in range(length):  # int64 wraps around
        found = found * 6364136223846793005 + ids[..., start : start + found.shape[-1]] + 1442695040888963407
    return found
