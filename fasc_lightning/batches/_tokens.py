"""The tokens of a batch that enter the statistics, and the scale of its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasc_lightning.batches._sampling import allotted, mixed_seed, sample_sequences, spread_tokens


@dataclass(frozen=True)
class LossScale:
    """The scale of a batch's gradients, by its loss.

    Attributes:
        scale: Factor that turns a gradient of the loss into a gradient of the sum of its token losses.
        empty: Whether the loss has no term, for example because every label is ignored.
        doubt: Why the scale is a guess; "" if it is known.
    """

    scale: float
    empty: bool = False
    doubt: str = ""


@dataclass
class TokenRows:
    """The tokens of one batch that enter the statistics.

    Attributes:
        label: Name of the batch, for messages.
        mask: True for real tokens, False for padding, shape (samples, length); None if there is no padding.
        scale: Factor that turns a gradient of the batch's loss into a gradient of the sum of its token losses.
        fraction: Share of the tokens that is kept.
        sample_seeds: One seed for each sample of the batch; needed when ``fraction`` < 1. The scored tokens depend on
            them, too.
        may_overflow: Whether a GradScaler is active. Its gradients overflow now and then and it skips the step; the
            taps then leave out the rest of the batch.
        overflowed: Whether a gradient has overflowed, or the loss has no term: arriving gradients are left out.
        sample: Number of tokens to keep, about equally many from each sequence (:func:`sample_sequences`); None keeps
            all. Each sequence keeps one more, which can replace a token whose gradient is zero.
        scored: Whether dependence scores take a sample of the counted tokens.
        scale_of: Function that returns the scale from the batch's loss; None if ``scale`` is final.
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
    _noted: tuple[int, ...] = field(default=(), repr=False)  # shape of the ids
    # For activations whose counted rows do not come sequence by sequence, by the number of rows: the order that sorts
    # them by sequence, None if they are sorted, and the lengths of the sequences.
    _regrouped: dict[int, tuple[Tensor | None, list[int]]] = field(default_factory=dict, repr=False)

    def take_loss(self, loss: Tensor) -> LossScale:
        """Set the scale from the loss whose gradients are about to arrive; a loss without terms leaves the batch out.

        Args:
            loss: The loss, before its backward pass.

        Raises:
            ValueError: If the terms of the loss cannot be counted.
        """
        found = LossScale(self.scale) if self.scale_of is None else self.scale_of(loss)
        # Manual optimisation may send several losses in one batch: the scale with the most terms serves for all.
        self.scale = max(self.scale, found.scale) if self._announced and not found.empty else found.scale
        if found.empty != self._empty:
            self.overflowed = self._empty = found.empty
        self._announced = self._announced or not found.empty
        return found

    def index(self, leading: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Return the row numbers of the counted tokens in a flattened activation.

        Args:
            leading: Shape of an activation without its features: (samples, length), (samples * length,), (samples,),
                (length, samples), or (samples, height, width) and the like. The mask applies if it has the same number
                of tokens.
            device: Device of the index.

        Returns:
            Row numbers, or None if every token counts. They ascend, except for a sample of an activation of shape
            (length, samples), whose rows come sequence by sequence.
        """
        key = (leading, device)
        if key not in self._cache:
            keep = self._keep(leading)
            lengths = self._count(leading, keep)
            index = None if keep is None else keep.nonzero().squeeze(1)
            if self.sample is not None:
                index, lengths = self._sample(index, lengths, self.sample)
            self._lengths[leading] = lengths
            self._cache[key] = None if index is None else index.to(device)
        return self._cache[key]

    def routed(self, tokens: Tensor, total: int) -> tuple[Tensor, list[int]]:
        """Return an expert's counted rows in the order of :meth:`index`, and their number in each sequence.

        Args:
            tokens: The token number of each row, shape (rows,), each at most once.
            total: Number of tokens in all sequences; their activation has shape (total, features).
        """
        counted = self.index((total,), tokens.device)
        lengths = self.lengths((total,))
        sequence = torch.full((total,), -1, device=tokens.device)
        of_counted = torch.arange(len(lengths), device=tokens.device).repeat_interleave(
            torch.tensor(lengths, device=tokens.device)
        )
        sequence[slice(None) if counted is None else counted] = of_counted
        place = torch.full((total,), -1, device=tokens.device)
        place[slice(None) if counted is None else counted] = torch.arange(sum(lengths), device=tokens.device)
        order = place[tokens].argsort()
        order = order[place[tokens[order]] >= 0]
        return order, sequence[tokens[order]].bincount(minlength=len(lengths)).tolist()

    def note(self, ids: Tensor | None) -> None:
        """Record the shape of a batch of token ids, for activations of shape (tokens, features).

        The first layers that run show the sequences as well, but experts alone may have hooks.

        Args:
            ids: Token ids, shape (samples, length); other tensors are ignored.
        """
        if ids is not None and ids.ndim == 2 and not ids.is_floating_point():
            self._sequences.setdefault(ids.numel(), len(ids))
            self._noted = tuple(ids.shape)

    def lengths(self, leading: tuple[int, ...]) -> list[int]:
        """Return the number of counted tokens of each sequence of an activation, after :meth:`index` of its shape."""
        return self._lengths[leading]

    def choose(self, alive: Tensor, lengths: list[int], tokens: int) -> Tensor:
        """Choose counted rows of an activation to score (:func:`sample_sequences`).

        Args:
            alive: Mask of the rows that have a gradient, shape (rows,), on the CPU.
            lengths: Number of rows of each sequence, from the taps.
            tokens: Most rows to choose.

        Returns:
            Row numbers, shape (sequences, tokens of each).
        """
        order, lengths = self._by_sequence(lengths)
        # The seeds differ from `sample`'s, so that any of its additional tokens may be left out.
        seeds = [mixed_seed(seed, 1) for seed in self._seeds(len(lengths))]
        if order is None:
            return sample_sequences(alive, lengths, tokens, seeds)
        return order[sample_sequences(alive[order], lengths, tokens, seeds)]

    def _by_sequence(self, lengths: list[int]) -> tuple[Tensor | None, list[int]]:
        """Return the order that sorts the counted rows of an activation by sequence.

        Args:
            lengths: Result of :meth:`lengths`, which counts rows that do not come sequence by sequence as one run.

        Returns:
            The order, None if the rows are sorted, and the number of tokens of each sequence. Samples without a length
            are sequences of one token.
        """
        return self._regrouped.get(lengths[0], (None, lengths)) if len(lengths) == 1 else (None, lengths)

    def _seeds(self, sequences: int) -> list[int]:
        """Return one seed for each sequence: the samples' own, or derived from them."""
        if sequences == len(self.sample_seeds):
            return list(self.sample_seeds)
        each = sequences // len(self.sample_seeds) if self.sample_seeds else 0
        if each and each * len(self.sample_seeds) == sequences:  # several sequences in each sample
            return [mixed_seed(seed, place) for seed in self.sample_seeds for place in range(each)]
        return [mixed_seed(*self.sample_seeds, place) for place in range(sequences)]

    def _sample(self, index: Tensor | None, lengths: list[int], tokens: int) -> tuple[Tensor | None, list[int]]:
        """Return the index and the lengths of a sample of the counted tokens."""
        order, sequences = self._by_sequence(lengths)
        seeds = self._seeds(len(sequences))
        each, members = allotted(sequences, tokens, seeds)
        if not members or each * len(members) >= sum(sequences):
            return index, lengths
        starts = np.cumsum([0, *sequences])
        take = {i: min(each + 1, sequences[i]) for i in members}
        found = [torch.from_numpy(starts[i] + spread_tokens(sequences[i], take[i], seeds[i])) for i in members]
        chosen = torch.cat(found)
        chosen = chosen if order is None else order[chosen]
        kept = [take.get(i, 0) for i in range(len(sequences))]
        if len(lengths) == 1 and len(sequences) > 1 and max(sequences) == 1:  # samples of one token are one run
            kept = [len(chosen)]
            self._regrouped[len(chosen)] = (None, [1] * len(chosen))
        return chosen if index is None else index[chosen], kept

    def _count(self, leading: tuple[int, ...], keep: Tensor | None) -> list[int]:
        """Return the number of kept tokens of each sequence of an activation; one run if sequences are not known."""
        tokens = int(torch.Size(leading).numel())
        sequences = 1
        if self.mask is not None and leading in (tuple(self.mask.shape), (self.mask.numel(),)):
            sequences = self.mask.shape[0]
        elif self._is_sequence_first(leading):
            real = torch.ones(leading, dtype=torch.bool) if keep is None else keep.view(leading)
            place = torch.full(leading, -1)
            place[real] = torch.arange(int(real.sum()))
            order = place.T[real.T]
            self._regrouped[len(order)] = order, real.sum(0).tolist()
        elif len(leading) > 1:
            sequences = self._sequences[tokens] = leading[0]
        elif len(leading) == 1:  # the same tokens flattened, as experts and some MLPs take them
            sequences = self._sequences.get(tokens, 1)
        if sequences in (0, tokens):  # samples of one token are one run
            sequences = 1
        if sequences == 1 < tokens == len(self.sample_seeds):
            counted = tokens if keep is None else int(keep.sum())
            self._regrouped[counted] = None, [1] * counted
        if keep is None:
            return [tokens // sequences] * sequences
        return keep.view(sequences, -1).sum(1).tolist()

    def _is_sequence_first(self, leading: tuple[int, ...]) -> bool:
        """Return whether an activation is (length, samples), by the mask or by the recorded ids."""
        if self.mask is not None and leading in (tuple(self.mask.shape), tuple(self.mask.T.shape)):
            return leading != tuple(self.mask.shape)
        return leading != leading[::-1] == self._noted

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
            # One draw for each real token, so that the length of the padding does not change the draws.
            draws = torch.rand(int(row.sum()), generator=generator)
            row[row.clone()] = draws < self.fraction
        return keep
