"""Training examples as tokens and labels: split, packed into rows, collated into batches."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Label of a token without a loss.
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One training example, which is never split.

    Attributes:
        ids: Token ids, int64 of shape (length,).
        labels: The learnt ids, and :data:`IGNORED` elsewhere, of the same shape. The first is always ignored, because
            the token before it in a packed window belongs to another example.
    """

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learnt(self) -> int:
        """Number of tokens in the loss."""
        return int((self.labels != IGNORED).sum())


def split_examples(
    examples: Sequence[Example], heldout: float, seed: int, seen: Iterable[Tensor] = ()
) -> tuple[list[Example], list[Example]]:
    """Split examples into training and held-out examples, each in the order given.

    The seed draws the held-out examples; copies of one example are always on one side.

    Args:
        examples: All of them.
        heldout: Share of the distinct examples to hold out; at least one if it is not 0, and never all.
        seed: Seed of the choice.
        seen: Token ids of examples that are held out only if there are too few others.

    Raises:
        ValueError: If no example would be left for training.
    """
    if heldout == 0:
        return list(examples), []
    digests = [_digest(example.ids, seed) for example in examples]
    last = {_digest(ids, seed) for ids in seen}
    distinct = sorted(set(digests), key=lambda digest: (digest in last, digest))
    if len(distinct) < 2:
        raise ValueError(
            f"Expected at least 2 distinct examples, to train on some and hold out others, but got {len(distinct)}. "
            "Give more data, a shorter window, or heldout=0."
        )
    held = set(distinct[: min(max(1, round(heldout * len(distinct))), len(distinct) - 1)])
    train = [example for example, digest in zip(examples, digests, strict=True) if digest not in held]
    return train, [example for example, digest in zip(examples, digests, strict=True) if digest in held]


def _digest(ids: Tensor, seed: int) -> bytes:
    key = seed.to_bytes(8, "little", signed=True)
    return hashlib.blake2b(ids.numpy().tobytes(), digest_size=16, key=key).digest()


def pack_examples(examples: Iterable[Example], window: int) -> list[Example]:
    """Put examples into rows of at most ``window`` tokens, each into the fullest row that has room for it.

    Args:
        examples: Examples of at most ``window`` tokens each; none is split.
        window: Most tokens of a row.

    Returns:
        The rows, in the order in which they were begun.
    """
    rows: list[list[Example]] = []
    rooms: list[tuple[int, int]] = []  # free tokens and index of each row that is not full, ascending
    for example in examples:
        place = bisect_left(rooms, (len(example), -1))
        if place == len(rooms):
            room, row = window, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(place)
        rows[row].append(example)
        if room > len(example):
            insort(rooms, (room - len(example), row))
    return [Example(torch.cat([e.ids for e in row]), torch.cat([e.labels for e in row])) for row in rows]


def collate(examples: Sequence[Example], padding: int) -> dict[str, Tensor]:
    """Return examples as a batch, padded on the right to the longest.

    Args:
        examples: One or more.
        padding: Token id for padding.

    Returns:
        ``input_ids``, ``attention_mask`` (1 for real tokens) and ``labels``, each (samples, length).
    """
    length = max(map(len, examples))
    batch = {
        "input_ids": torch.full((len(examples), length), padding),
        "attention_mask": torch.zeros(len(examples), length, dtype=torch.long),
        "labels": torch.full((len(examples), length), IGNORED),
    }
    for i, example in enumerate(examples):
        batch["input_ids"][i, : len(example)] = example.ids
        batch["attention_mask"][i, : len(example)] = 1
        batch["labels"][i, : len(example)] = example.labels
    return batch
