"""Dependence scores of all layers, fed by the taps with a sample of each batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasc_lightning.batches import TokenRows
from fasc_lightning.dependence._history import RhoRow
from fasc_lightning.dependence._reading import (
    MIN_ROWS,
    SUMS,
    debiased_figure,
    facts,
    floor_figure,
    interval_figure,
    null_figure,
    observed,
    reason,
    rho_figure,
)
from fasc_lightning.dependence._streaming import DependenceScore, add_samples_, all_reduce_scores_
from fasc_lightning.distributed import whole
from fasc_lightning.layers import Gradient, input_gradient, linear_weight

#: Gradients of at most this share of a batch's largest are rounding: some units of float32's last place.
ROUNDING = 32 * torch.finfo(torch.float32).eps

#: Most bytes of samples that are held at once.
HELD_BYTES = 2**28

#: x and g of some sequences at the same tokens, each (sequences, tokens, features).
Sample = tuple[Tensor, Tensor]


class _Held(NamedTuple):
    """One call's tokens, from which a sample is chosen later.

    Attributes:
        x: Inputs, shape (tokens, n), or a sample of them, shape (sequences, tokens of each, n).
        g: Gradients at the same tokens.
        alive: Mask of tokens that have a gradient, shape (tokens,); None if x and g are samples.
        batch: The batch of the tokens.
        lengths: Number of tokens of each sequence.
    """

    x: Tensor
    g: Tensor
    alive: Tensor | None
    batch: TokenRows
    lengths: list[int]


class LayerScores:
    """One dependence score for each layer, fed by :class:`~fasc_lightning.hooks.Taps` as its ``pairs``.

    A sample of each batch's tokens is scored (``sample_sequences``). Tokens whose gradient at a layer is zero are left
    out there: the last token of a causal language model has no gradient by construction. The score is made of pairs of
    sequences, so samples of fewer than eight sequences wait until eight have come together. Waiting samples take less
    than twice the memory of the largest sample.

    Which tokens have a gradient is known to the device alone, and asking it for each layer would stall it. So the
    tokens of all layers are held until a layer comes again or a result is asked for (:meth:`settle`), and all layers
    then take two transfers to the host. If the taps sample the batch, as they do for monitoring, a layer holds about
    ``tokens`` rows of x, in its own type, and of g in float32; layers with one input hold it once. That is 32 MB for
    512 tokens of 42 layers of widths 192 and 512, and 3.5 GB for Llama-3-8B in bfloat16, so that at most 256 MB are
    held at once. Batches that the taps do not sample are sampled at once, with a transfer for each layer.

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
        self.device = torch.device(device)
        # `all_reduce_` reduces all scores in two messages; torchmetrics would take some for each.
        self._scores = {name: DependenceScore(seed, sync_on_compute=False).to(device) for name in layers}
        self._waiting: dict[str, list[Sample]] = {}
        self._held: dict[str, _Held] = {}
        self._bytes = 0  # of the held samples
        # Layers that share an input get their gradients one after the other: the last input, the tokens chosen of it
        # (None for all) and their copy.
        self._last: tuple[Tensor, Tensor | None, Tensor] | None = None

    @property
    def scores(self) -> dict[str, DependenceScore]:
        """The scores by layer, without the waiting samples."""
        self.settle()
        return self._scores

    @property
    def waiting(self) -> dict[str, list[Sample]]:
        """Samples that wait to be scored, by layer."""
        self.settle()
        return self._waiting

    @property
    def held(self) -> set[str]:
        """The layers whose last tokens are held."""
        return set(self._held)

    def restore(self, scores: dict[str, DependenceScore], waiting: dict[str, list[Sample]]) -> None:
        """Continue from other scores and waiting samples of the same layers."""
        self._let_go()
        self._scores, self._waiting = scores, waiting

    def __call__(
        self, name: str, x: Tensor, h: Tensor, batch: TokenRows, lengths: list[int], g: Tensor | None = None
    ) -> None:
        """Add a sample of one call's tokens to a layer's score.

        Args:
            name: Name of the layer.
            x: Inputs, shape (tokens, n).
            h: Gradients at the outputs, shape (tokens, m), in the scale of the batch's loss.
            batch: The batch of these tokens; its scale makes batches comparable.
            lengths: Number of tokens of each sequence.
            g: Gradients at the inputs, shape (tokens, n), in float32 or wider; None computes W^T h.
        """
        if not batch.scored:
            return
        if name in self._held or self._bytes > HELD_BYTES:
            self.settle()
        alive: Tensor | None = _has_gradient(h)
        chosen = None
        if len(x) > 2 * self.tokens:
            chosen = batch.choose(alive.cpu(), lengths, self.tokens)  # type: ignore[union-attr]
            h, alive = _sample(h, chosen), None
            g = None if g is None else _sample(g, chosen)
        if g is None or self.gradient == "output":
            g = self._gradient(name, h)
        g = g.to(self.device) * batch.scale
        kept = self._input(x, chosen)
        self._held[name] = _Held(kept, g, alive, batch, lengths)
        self._bytes += g.nbytes + kept.nbytes

    def _gradient(self, name: str, h: Tensor) -> Tensor:
        """Return the gradients to score, shape (..., n) or (..., m), in float32 or wider."""
        if self.gradient == "output":
            return h.to(torch.promote_types(h.dtype, torch.float32))
        W = whole(linear_weight(self.layers[name]).detach())
        return input_gradient(h.flatten(0, -2), W).view(*h.shape[:-1], W.shape[1])

    def _input(self, x: Tensor, chosen: Tensor | None) -> Tensor:
        """Return a copy of an input's chosen tokens, the same for layers that share it: the model may overwrite x."""
        if self._last is not None and self._last[0] is x:
            _, before, kept = self._last
            if (before is None and chosen is None) or (
                before is not None and chosen is not None and torch.equal(before, chosen)
            ):
                return kept
        kept = (x.clone() if chosen is None else _sample(x, chosen)).to(self.device)
        self._last = x, chosen, kept
        return kept

    def settle(self) -> None:
        """Score the held tokens of all layers; samples of fewer than eight sequences wait."""
        held = self._held
        self._let_go()
        ready: list[tuple[DependenceScore, list[Sample]]] = []
        for name, sample in _chosen(held, self.tokens).items():
            if not 0 < len(sample[0]) < MIN_ROWS:
                ready.append((self._scores[name], [sample]))
                continue
            waiting = self._waiting.setdefault(name, [])
            waiting.append(sample)
            if sum(len(x) for x, _ in waiting) >= MIN_ROWS:
                ready.append((self._scores[name], self._waiting.pop(name)))
        _add(ready)

    def _let_go(self) -> None:
        self._held, self._bytes, self._last = {}, 0, None

    def reset(self) -> None:
        """Clear all scores and drop held and waiting samples."""
        self._let_go()
        self._waiting.clear()
        for score in self._scores.values():
            score.reset()

    def complete(self) -> dict[str, DependenceScore]:
        """Return the scores with the waiting samples added; scores and waiting samples stay as they are."""
        scores = dict(self.scores)
        for name in self.waiting:
            scores[name] = deepcopy(scores[name])
        _add([(scores[name], samples) for name, samples in self.waiting.items()])
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
                _add([(score, _moved(samples, self.device))])
        all_reduce_scores_(self.scores[name] for name in sorted(self.scores))

    def rows(self, step: int = 0) -> list[RhoRow]:
        """Return one row for each layer, over all tokens so far."""
        return score_rows(self.complete(), step)


def _chosen(held: Mapping[str, _Held], tokens: int) -> dict[str, Sample]:
    """Return the sample of each layer, with one transfer for all. Layers that share an input share its sample."""
    masks = [item.alive for item in held.values() if item.alive is not None]
    alive = iter(torch.cat(masks).cpu().split([len(mask) for mask in masks]) if masks else ())
    places: dict[Any, Tensor] = {}  # of the chosen tokens, by batch, lengths and mask
    inputs: dict[Any, Tensor] = {}
    found: dict[str, Sample] = {}
    for name, item in held.items():
        if item.alive is None:
            found[name] = item.x, item.g
            continue
        mask = next(alive)
        key = id(item.batch), tuple(item.lengths), mask.numpy().tobytes()
        if key not in places:
            places[key] = item.batch.choose(mask, item.lengths, tokens).to(item.x.device)
        if (same := (id(item.x), key)) not in inputs:
            inputs[same] = _sample(item.x, places[key])
        found[name] = inputs[same], _sample(item.g, places[key])
    return found


def _add(ready: Sequence[tuple[DependenceScore, list[Sample]]]) -> None:
    """Add samples to scores; the samples of a score count as one."""
    inputs: dict[tuple[int, ...], Tensor] = {}
    together = []
    for score, samples in ready:
        key = tuple(id(x) for x, _ in samples)
        if key not in inputs:
            inputs[key] = _joined([x for x, _ in samples])
        together.append((score, inputs[key], _joined([g for _, g in samples])))
    if together:
        add_samples_(together)


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
    size = h.abs().amax(1).float()
    zero = size <= ROUNDING * size.max()  # False for NaN
    return ~zero | zero.all()


def _sample(values: Tensor, chosen: Tensor) -> Tensor:
    return values.index_select(0, chosen.flatten().to(values.device)).view(*chosen.shape, values.shape[1])


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


def score_rows(scores: Mapping[str, DependenceScore], step: int) -> list[RhoRow]:
    """Return the values of scores as rows of the history, with one transfer for all of them."""
    by_count: dict[int, list[str]] = {}  # the jackknife computes equally many rows together
    rows = {name: score.all_rows() for name, score in scores.items()}
    for name, values in rows.items():
        by_count.setdefault(len(values), []).append(name)
    tables = []
    for names in by_count.values():
        sums = {key: torch.stack([getattr(scores[name], key) for name in names]) for key in SUMS}
        figures = [rho_figure(sums), null_figure(sums), debiased_figure(sums), floor_figure(sums)]
        interval = interval_figure(sums, torch.stack([rows[name] for name in names]))
        tables.append(torch.cat([torch.stack(figures, 1), interval, facts(sums)], 1))
    order = [name for names in by_count.values() for name in names]
    found = dict(zip(order, torch.cat(tables).tolist() if tables else [], strict=True))
    return [_row(name, step, found[name], len(rows[name])) for name in scores]


def _row(layer: str, step: int, values: list[float], rows: int) -> RhoRow:
    rho, null, debiased, floor, low, high, *known = values
    return RhoRow(
        step=step,
        layer=layer,
        rho=rho,
        null=null,
        debiased=debiased,
        low=low,
        high=high,
        iid_floor=floor,
        tokens=observed(known),
        reason=reason(known, rows),
    )
