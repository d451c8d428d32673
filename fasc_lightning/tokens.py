"""Which tokens of a batch count, and how its gradients are scaled back to those of a sum of token losses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: Most sequences that a sample for the dependence score is taken from.
MAX_SEQUENCES = 24


@dataclass(frozen=True)
class LossScale:
    """What a batch's loss says of its gradients.

    Attributes:
        scale: Factor that turns a gradient of the loss into one of the sum of its token losses.
        empty: Whether the loss has no term, as where every label is ignored: there is nothing to learn from.
        doubt: Why the scale is a guess; "" where it is known.
    """

    scale: float
    empty: bool = False
    doubt: str = ""


@dataclass
class TokenRows:
    """The tokens of one batch that enter the statistics.

    Attributes:
        label: Names the batch in messages.
        mask: True for real tokens, False for padding, shape (samples, length); None if there is no padding.
        scale: Factor that turns a gradient of the batch's loss into one of the sum of its token losses.
        fraction: Share of the tokens that is kept.
        sample_seeds: One seed for each sample of the batch; needed when ``fraction`` < 1.
        may_overflow: Whether a GradScaler is at work, which makes gradients overflow now and then and skips such a
            step; the taps then leave the rest of the batch out.
        overflowed: Whether that has happened, or the loss has no term: gradients that arrive are left out.
        sample: Keep at most so many tokens, alike from each sequence, instead of all (:func:`sample_sequences`).
        scored: Whether dependence scores take a sample of the tokens that count.
        scale_of: Returns the scale by the batch's loss, once there is one; None where ``scale`` is final.
    """

    label: str = "the batch"
    mask: Tensor | None = None
    scale: float = 1.0
    fraction: float = 1.0
    sample_seeds: Sequence[int] = ()
    may_overflow: bool = False
    overflowed: bool = False
    sample: int | None = None
    scored: bool = True
    scale_of: Callable[[Tensor], LossScale] | None = field(default=None, repr=False)
    _announced: bool = field(default=False, repr=False)
    _empty: bool = field(default=False, repr=False)
    _cache: dict[tuple[Any, ...], Tensor | None] = field(default_factory=dict, repr=False)
    _lengths: dict[tuple[int, ...], list[int]] = field(default_factory=dict, repr=False)
    _sequences: dict[int, int] = field(default_factory=dict, repr=False)

    def take_loss(self, loss: Tensor) -> LossScale:
        """Take the scale from the loss whose gradients are about to arrive, and leave out a batch that has no term.

        Args:
            loss: Before its backward pass, as it is sent backwards.

        Raises:
            ValueError: If its terms cannot be counted.
        """
        found = LossScale(self.scale) if self.scale_of is None else self.scale_of(loss)
        # Of several losses in one batch, as manual optimisation sends them, that of the most terms is taken for all.
        self.scale = max(self.scale, found.scale) if self._announced and not found.empty else found.scale
        if found.empty != self._empty:
            self.overflowed = self._empty = found.empty
        self._announced = self._announced or not found.empty
        return found

    def index(self, leading: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Return which of the flattened tokens count.

        Args:
            leading: Shape of an activation without its features: (samples, length), (samples * length,), (samples,),
                (length, samples), or (samples, height, width) and the like. The mask applies where the tokens are as
                many as it has.
            device: Where the index is wanted.

        Returns:
            Row numbers in ascending order, or None when every token counts.
        """
        key = (leading, device)
        if key not in self._cache:
            keep = self._keep(leading)
            lengths = self._count(leading, keep)
            index = None if keep is None else keep.nonzero().squeeze(1)
            if self.sample is not None and (chosen := sample_sequences(lengths, self.sample)).numel() < sum(lengths):
                lengths = [chosen.shape[1]] * chosen.shape[0]
                index = chosen.flatten() if index is None else index[chosen.flatten()]
            self._lengths[leading] = lengths
            self._cache[key] = None if index is None else index.to(device)
        return self._cache[key]

    def routed(self, tokens: Tensor, total: int) -> tuple[Tensor, list[int]]:
        """Return which rows of an expert's activations count, in the order of their tokens, and how many a sequence.

        Args:
            tokens: The token of each row, shape (rows,), each at most once.
            total: Number of all tokens, of which sequences are made; their activation is (total, features).
        """
        counted = self.index((total,), tokens.device)
        lengths = self.lengths((total,))
        sequence = torch.full((total,), -1, device=tokens.device)
        of_counted = torch.arange(len(lengths), device=tokens.device).repeat_interleave(
            torch.tensor(lengths, device=tokens.device)
        )
        sequence[slice(None) if counted is None else counted] = of_counted
        order = tokens.argsort()
        order = order[sequence[tokens[order]] >= 0]
        return order, sequence[tokens[order]].bincount(minlength=len(lengths)).tolist()

    def note(self, ids: Tensor | None) -> None:
        """Take note of the sequences of a batch of token ids, for activations that are one row of all tokens.

        The first layers that run tell as well, but hooks may be on experts alone.

        Args:
            ids: Shape (samples, length); anything else says nothing.
        """
        if ids is not None and ids.ndim == 2 and not ids.is_floating_point():
            self._sequences.setdefault(ids.numel(), len(ids))

    def lengths(self, leading: tuple[int, ...]) -> list[int]:
        """Return how many counted tokens each sequence of an activation has, after :meth:`index` of its shape."""
        return self._lengths[leading]

    def _count(self, leading: tuple[int, ...], keep: Tensor | None) -> list[int]:
        """Return the number of kept tokens of each sequence of an activation; [all] if sequences cannot be told."""
        tokens = int(torch.Size(leading).numel())
        sequences = 1
        if self.mask is not None and leading in (tuple(self.mask.shape), (self.mask.numel(),)):
            sequences = self.mask.shape[0]
        elif len(leading) > 1 and not (self.mask is not None and leading == tuple(self.mask.T.shape)):
            sequences = self._sequences[tokens] = leading[0]
        elif len(leading) == 1:  # the same tokens in one row, as experts and some MLPs take them
            sequences = self._sequences.get(tokens, 1)
        if sequences in (0, tokens):  # samples of a token each are one run of samples
            sequences = 1
        if keep is None:
            return [tokens // sequences] * sequences
        return keep.view(sequences, -1).sum(1).tolist()

    def _keep(self, leading: tuple[int, ...]) -> Tensor | None:
        tokens = int(torch.Size(leading).numel())
        keep = None
        if self.mask is not None and leading in (tuple(self.mask.shape), (self.mask.numel(),)):
            keep = self.mask.bool().flatten().cpu()
        elif self.mask is not None and leading == tuple(self.mask.T.shape):  # sequence first
            keep = self.mask.bool().T.flatten().cpu()
        if self.fraction < 1:
            keep = self._subsample(torch.ones(tokens, dtype=torch.bool) if keep is None else keep.clone())
        if keep is None or bool(keep.all()):
            return None
        return keep

    def _subsample(self, keep: Tensor) -> Tensor:
        """Keep a random share of the real tokens, drawn for each sample from its own seed."""
        samples = len(self.sample_seeds)
        if samples == 0 or keep.numel() % samples:
            raise ValueError(
                f"Expected tokens that divide among the {samples} samples of {self.label} but got {keep.numel()}. "
                "Use `token_fraction=1.0` for models that mix samples."
            )
        for seed, row in zip(self.sample_seeds, keep.view(samples, -1), strict=True):
            generator = torch.Generator().manual_seed(seed)
            # One draw a real token: padding to another length must not change what is drawn.
            draws = torch.rand(int(row.sum()), generator=generator)
            row[row.clone()] = draws < self.fraction
        return keep


def sample_sequences(lengths: Sequence[int], tokens: int) -> Tensor:
    """Choose equally many tokens from each of several sequences, as many in all as are allowed.

    Short sequences are left out where the others then give more; tokens of a sequence are evenly spaced, so that they
    depend on each other as little as may be.

    Args:
        lengths: Number of tokens of each sequence.
        tokens: At most so many in all.

    Returns:
        Positions in the concatenated sequences, shape (chosen sequences, tokens of each).
    """
    best = (0, 0)  # tokens of each, sequences
    for length in sorted(set(lengths)):
        sequences = min(sum(other >= length for other in lengths), MAX_SEQUENCES, tokens)
        each = min(length, tokens // max(1, sequences))
        if each * sequences > best[0] * best[1]:
            best = (each, sequences)
    each, sequences = best
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    eligible = [i for i, length in enumerate(lengths) if length >= max(1, each)]
    chosen = [eligible[int(i)] for i in torch.linspace(0, len(eligible) - 1, sequences)] if eligible else []
    rows = [starts[i] + torch.linspace(0, lengths[i] - 1, each).long() for i in chosen]
    return torch.stack(rows) if rows else torch.zeros(0, 0, dtype=torch.long)


def sample_seeds(batch: Any, seed: int, mask: Tensor | None = None) -> list[int]:
    """Return one seed a sample, a function of ``seed`` and of the sample's own content.

    So a sample draws the same tokens on whichever process and in whichever batch it turns up.

    Args:
        batch: A tensor, or any nesting of mappings and sequences of tensors; "input_ids" identifies the samples if
            there is one, else the first tensor.
        seed: The user's seed.
        mask: True for real tokens, shape (samples, length); padding does not enter.

    Raises:
        ValueError: If the batch holds no tensor.
    """
    content = identifying_tensor(batch)
    if content is None:
        raise ValueError(f"Expected a batch that holds a tensor but got {type(batch).__name__}.")
    seeds = []
    for i, sample in enumerate(content.detach().cpu()):
        if mask is not None and sample.ndim >= 1 and mask.shape == content.shape[:2]:
            sample = sample[mask[i].bool().cpu()]
        data = sample.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest = hashlib.blake2b(data, digest_size=8, key=seed.to_bytes(8, "little", signed=True)).digest()
        seeds.append(int.from_bytes(digest, "little") >> 1)  # torch seeds are signed
    return seeds


def identifying_tensor(batch: Any) -> Tensor | None:
    """Return the tensor of a batch whose rows are its samples: "input_ids", or the first there is."""
    if isinstance(batch, Tensor):
        return batch if batch.ndim > 0 else None
    if isinstance(batch, Mapping):
        if isinstance(batch.get("input_ids"), Tensor):
            return batch["input_ids"]
        batch = list(batch.values())
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        for item in batch:
            if (found := identifying_tensor(item)) is not None:
                return found
    return None


def batch_size(batch: Any) -> int:
    """Return the number of samples of a batch.

    Raises:
        ValueError: If the batch holds no tensor.
    """
    content = identifying_tensor(batch)
    if content is None:
        raise ValueError(
            f"Expected a batch that holds a tensor but got {type(batch).__name__}. Give `loss_terms` as a callable "
            "that returns the number of terms the loss is averaged over."
        )
    return content.shape[0]


def count_tokens(batch: Any, mask: Tensor | None = None) -> int:
    """Return the number of tokens of a batch: real ones where a mask tells, else those of its integers, else samples.

    Args:
        batch: Any batch.
        mask: True for real tokens, or None.
    """
    if mask is not None:
        return int(mask.sum())
    content = identifying_tensor(batch)
    if content is None:
        return 0
    return content.numel() if content.ndim == 2 and not content.is_floating_point() else content.shape[0]
