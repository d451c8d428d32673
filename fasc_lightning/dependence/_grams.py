"""Gram matrices of one variable on a sample of tokens, cut into minibatches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasc_lightning.batches import MAX_SEQUENCES
from fasc_lightning.dependence._hsic import centered_gram

#: Most tokens of a minibatch: a Gram matrix grows with their square. MAX_SEQUENCES bounds its sequences.
MAX_TOKENS = 2048


@dataclass(frozen=True)
class Grams:
    """Centred Gram matrices of one variable on a sample of tokens, cut into minibatches.

    Attributes:
        parts: For each set of sequences, its minibatches: different tokens of the same sequences. Each minibatch is
            its Gram matrix in units of the variance, shape (sequences, tokens, sequences, tokens), and the variance.
    """

    parts: list[list[tuple[Tensor, Tensor]]]

    @classmethod
    def of(cls, values: Tensor) -> Grams:
        """Return the Gram matrices of values of shape (tokens, n) or (sequences, tokens, n)."""
        return cls([[_gram(part) for part in parts] for parts in _minibatches(values)])


def _gram(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centred Gram matrix of values of shape (sequences, tokens, n), and their variance."""
    sequences, length, _ = values.shape
    s = sequences * length
    if not values.numel():
        return values.new_zeros(sequences, length, sequences, length), values.new_zeros((), dtype=torch.float64)
    K, variance = centered_gram(values.reshape(s, -1))
    return K.view(sequences, length, sequences, length), variance


def _minibatches(values: Tensor) -> list[list[Tensor]]:
    """Cut values into sets of sequences, and each set into minibatches of at most :data:`MAX_TOKENS` tokens.

    Args:
        values: Shape (tokens, n) or (sequences, tokens, n).

    Returns:
        For each set of whole sequences its minibatches, shape (sequences, tokens, n). If a set has too many tokens, a
        minibatch takes every k-th token of each sequence, up to a multiple of k. It begins at a different token in each
        sequence, so that no minibatch has the first tokens of all. Tokens of shape (tokens, n) are sequences of one.
    """
    if values.ndim == 2:
        values = values[:, None]
    sequences, length, _ = values.shape
    most = MAX_SEQUENCES if length > 1 else MAX_TOKENS
    sets = values.tensor_split(max(1, -(-sequences // most)))
    cuts = max(1, -(-length * len(sets[0]) // MAX_TOKENS))
    if cuts == 1:
        return [[part] for part in sets]
    found = []
    for part in sets:
        turns = part[:, : length // cuts * cuts].unflatten(1, (-1, cuts))  # (sequences, tokens, cuts, n)
        place = torch.arange(len(part), device=part.device)
        found.append([turns[place, :, (place + first) % cuts] for first in range(cuts)])
    return found
