"""Dependence scores of all layers, fed by the taps with a sample of each batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasc_lightning.batches import TokenRows
from fasc_lightning.dependence._grams import Grams
from fasc_lightning.dependence._history import RhoRow
from fasc_lightning.dependence._streaming import MIN_ROWS, DependenceScore, all_reduce_scores_
from fasc_lightning.distributed import whole
from fasc_lightning.layers import Gradient, input_gradient, linear_weight

#: Gradients of at most this share of a batch's largest are rounding: some units of float32's last place.
ROUNDING = 32 * torch.finfo(torch.float32).eps

#: x and g of some sequences at the same tokens, each (sequences, tokens, features).
Sample = tuple[Tensor, Tensor]


class LayerScores:
    """One dependence score for each layer, fed by :class:`~fasc_lightning.hooks.Taps` as its ``pairs``.

    A sample of each batch's tokens is scored (``sample_sequences``). Tokens whose gradient at a layer is zero are left
    out there: the last token of a causal language model has no gradient by construction. The score is made of pairs of
    sequences, so samples of fewer than eight sequences wait until eight have come together. Waiting samples take less
    than twice the memory of the largest sample.

    Args:
        layers: The tapped layers by name.
        tokens: Most tokens of a batch that a layer's score takes.
        gradient: "input" couples x with g = W^T h (the paper's definition), "output" couples x with h.
        seed: Seed of the scores' permutations.
        device: Device of the scores.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        tokens: int,
        gradient: Gradient = "input",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers = layers
        self.tokens = tokens
        self.gradient = gradient
        # `all_reduce_` reduces all scores in two messages; torchmetrics would take some for each.
        self.device = torch.device(device)
        self.scores = {name: DependenceScore(seed, sync_on_compute=False).to(device) for name in layers}
        self.waiting: dict[str, list[Sample]] = {}
        # Layers that share an input get their gradients one after the other, so its sample and its Gram matrices are
        # kept: the last input, its chosen tokens and their sample; the last samples scored together and their matrices.
        self._sampled: tuple[Tensor, Tensor, Tensor] | None = None
        self._scored: tuple[list[Tensor], Grams] | None = None

    def __call__(self, name: str, x: Tensor, h: Tensor, batch: TokenRows, lengths: list[int]) -> None:
        """Add a sample of one call's tokens to a layer's score.

        Args:
            name: Name of the layer.
            x: Inputs, shape (tokens, n).
            h: Gradients at the outputs, shape (tokens, m), in the scale of the batch's loss.
            batch: The batch of these tokens; its scale makes batches comparable.
            lengths: Number of tokens of each sequence.
        """
        if not batch.scored:
            return
        chosen = batch.choose(_has_gradient(h).cpu(), lengths, self.tokens)  # (sequences, tokens of each)
        if self._sampled is None or self._sampled[0] is not x or not torch.equal(self._sampled[1], chosen):
            self._sampled = x, chosen, _sample(x, chosen).to(self.device)
        h = _sample(h, chosen).flatten(0, 1)
        g = input_gradient(h, whole(linear_weight(self.layers[name]).detach())) if self.gradient == "input" else h
        g = g.to(self.device, torch.promote_types(g.dtype, torch.float32)) * batch.scale
        sample = self._sampled[2], g.view(*chosen.shape, g.shape[1])
        if not 0 < len(chosen) < MIN_ROWS:
            self._add(self.scores[name], [sample])
            return
        waiting = self.waiting.setdefault(name, [])
        waiting.append(sample)
        if sum(len(x) for x, _ in waiting) >= MIN_ROWS:
            self._add(self.scores[name], self.waiting.pop(name))

    def reset(self) -> None:
        """Clear all scores and drop waiting samples."""
        self._sampled = self._scored = None
        self.waiting.clear()
        for score in self.scores.values():
            score.reset()

    def complete(self) -> dict[str, DependenceScore]:
        """Return the scores with the waiting samples added; scores and waiting samples stay as they are."""
        scores = dict(self.scores)
        for name, samples in self.waiting.items():
            scores[name] = deepcopy(scores[name])
            self._add(scores[name], samples)
        return scores

    def all_reduce_(self) -> None:
        """Merge the scores of all processes; waiting samples of different processes are scored together."""
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, {name: _moved(samples, "cpu") for name, samples in self.waiting.items()})
        self.waiting.clear()
        for name, score in self.scores.items() if dist.get_rank() == 0 else ():
            # One sample of each process in turn: the order in which a single process would see them.
            turns = zip_longest(*(waiting.get(name, []) for waiting in everywhere))
            for samples in _grouped([sample for turn in turns for sample in turn if sample is not None]):
                self._add(score, _moved(samples, self.device))
        all_reduce_scores_(self.scores[name] for name in sorted(self.scores))

    def rows(self, step: int = 0) -> list[RhoRow]:
        """Return one row for each layer, over all tokens so far."""
        return [score_row(score, name, step) for name, score in self.complete().items()]

    def _add(self, score: DependenceScore, samples: list[Sample]) -> None:
        """Add samples to a score as one sample."""
        inputs, gradients = ([pair[i] for pair in samples] for i in (0, 1))
        if self._scored is None or [id(x) for x in self._scored[0]] != [id(x) for x in inputs]:
            self._scored = inputs, Grams.of(_joined(inputs))
        score.add(self._scored[1], Grams.of(_joined(gradients)))


def _moved(samples: list[Sample], device: torch.device | str) -> list[Sample]:
    return [(x.to(device), g.to(device)) for x, g in samples]


def _grouped(samples: list[Sample]) -> Iterator[list[Sample]]:
    """Yield runs of samples with eight sequences or more together; the last run may have fewer."""
    group: list[Sample] = []
    for sample in samples:
        group.append(sample)
        if sum(len(x) for x, _ in group) >= MIN_ROWS:
            yield group
            group = []
    if group:
        yield group


def _has_gradient(h: Tensor) -> Tensor:
    """Return a mask of tokens whose gradient is more than rounding, shape (tokens,); all True if no token has one.

    The queries of a text's first token have no gradient by construction, since it attends to itself alone. Some
    kernels return the difference of two equal numbers instead of zero.

    Args:
        h: Gradients, shape (tokens, m).
    """
    if not h.numel():
        return h.new_ones(len(h), dtype=torch.bool)
    low, high = h.aminmax(dim=1)
    size = torch.maximum(-low, high).float()
    zero = size <= ROUNDING * size.max()  # False for NaN
    return ~zero | zero.all()


def _sample(values: Tensor, chosen: Tensor) -> Tensor:
    return values[chosen.flatten().to(values.device)].view(*chosen.shape, values.shape[1])


def _joined(samples: list[Tensor]) -> Tensor:
    """Return samples of several batches as one, shape (sequences, tokens, n).

    The number of tokens for each sequence is the one that keeps most tokens; shorter samples are left out.
    """
    if len(samples) == 1:
        return samples[0]
    sizes = sorted({sample.shape[1] for sample in samples})
    tokens = max(sizes, key=lambda size: size * sum(len(sample) for sample in samples if sample.shape[1] >= size))
    kept = [sample for sample in samples if sample.shape[1] >= tokens]
    return torch.cat([sample[:, torch.arange(tokens) * sample.shape[1] // tokens] for sample in kept])


def score_row(score: DependenceScore, layer: str, step: int) -> RhoRow:
    """Return a score's values as a row of the history."""
    low, high = score.interval.tolist()
    return RhoRow(
        step=step,
        layer=layer,
        rho=float("nan") if score.observed == 0 else score.compute().item(),
        null=score.null.item(),
        debiased=score.debiased.item(),
        low=low,
        high=high,
        iid_floor=score.iid_floor.item(),
        tokens=score.observed,
        reason=score.reason,
    )
