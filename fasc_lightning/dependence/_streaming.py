"""The streaming dependence score of one layer, with its null and its confidence interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from fasc_lightning.dependence._estimates import PERMUTATIONS, estimate
from fasc_lightning.dependence._grams import minibatches
from fasc_lightning.dependence._hsic import MIN_TOKENS
from fasc_lightning.dependence._reading import (
    SUMS,
    debiased_figure,
    facts,
    floor_figure,
    interval_figure,
    null_figure,
    reason,
    rho_figure,
)
from fasc_lightning.dependence._tokens import DependenceMetric, as_sequences

#: Most rows kept for the interval; beyond it neighbours are added up, so that memory is bounded.
MAX_ROWS = 2048


class DependenceScore(DependenceMetric):
    """Streaming minibatch estimate of rho for one layer, with its null and its confidence interval.

    Every update adds the HSIC of its tokens, weighted by their number; ``compute`` divides the sums. Each minibatch is
    centred by itself. Gradients of all updates should have one scale, since a minibatch weighs by its variances. The
    size of the states does not depend on the layer's width, and states add up over batches and processes. torchmetrics
    synchronises them where this metric is used by itself: under DDP, every process has to ask for a value. Data never
    raise an error: an undefined score is NaN, and :attr:`reason` says why.

    Tokens of a text depend on one another. Samples of shape (sequences, tokens, n) are therefore judged by whole
    sequences: the debiased value leaves out pairs of tokens of one sequence, the null permutes sequences, and the
    interval leaves out one sequence at a time. The debiased value and the null need at least four sequences in an
    update, the interval needs eight in all; with fewer they are NaN. Tokens of shape (tokens, n) count as independent,
    each as a sequence of its own. Tokens of one text are not independent: their debiased value comes out too high and
    their null too low.

    Example:
        >>> score = DependenceScore()
        >>> x = torch.randn(8, 32, 16)  # eight sequences of 32 tokens
        >>> score.update(x, x + 0.1 * torch.randn(8, 32, 16))
        >>> bool(score.compute() > score.null)
        True

    Args:
        seed: Seed of the permutations.
        **settings: Settings of :class:`torchmetrics.Metric`.
    """

    # Sums over minibatches of at least four sequences, each weighted by its number of tokens.
    biased: Tensor  # biased HSIC of all pairs of (x, g), shape (2, 2)
    unbiased: Tensor  # unbiased HSIC of all pairs of (x, g), shape (2, 2)
    permuted: Tensor  # biased HSIC of x with permuted g, shape (PERMUTATIONS,)
    floor: Tensor  # tr(Sigma_xx) tr(Sigma_gg) / s
    rows: list[Tensor]  # pseudo-values of HSIC: a row (xx, xg, gg) for each sequence, or for a minibatch of four
    tokens: Tensor
    # Sums over minibatches of fewer sequences; rho alone uses them, and only if there are no others.
    few_biased: Tensor
    few_floor: Tensor
    few_tokens: Tensor
    # Counts.
    short: Tensor  # samples of too few tokens
    infinite: Tensor  # samples with NaN or Inf

    def __init__(self, seed: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        self.seed = seed
        shapes = {"permuted": (PERMUTATIONS,), **dict.fromkeys(("biased", "unbiased", "few_biased"), (2, 2))}
        for name in SUMS:
            self.add_state(name, torch.zeros(shapes.get(name, ()), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, x: Tensor, g: Tensor) -> None:
        """Add tokens.

        Args:
            x: Activations, shape (sequences, tokens, n), or (tokens, n) for independent tokens.
            g: Gradients at the same tokens, shape (..., n) for input gradients or (..., m) for output gradients.

        Raises:
            ValueError: If the shapes do not match.
        """
        add_samples_([(self, *as_sequences(x, g))])

    @property
    def observed(self) -> int:
        """Number of tokens that rho is computed from."""
        return int(self.tokens or self.few_tokens)

    def compute(self) -> Tensor:
        """Return rho of the minibatches, in [0, 1]; biased upwards for small minibatches, NaN where undefined."""
        return rho_figure(self._sums())

    @property
    def null(self) -> Tensor:
        """The value that rho exceeds by chance in at most 5 of 100 cases, by permutations of whole sequences."""
        return self._synchronized(lambda: null_figure(self._sums()))

    @property
    def debiased(self) -> Tensor:
        """Signed root of the debiased rho^2 (Song et al. 2012): about 0 for independent x and g; may be negative."""
        return self._synchronized(lambda: debiased_figure(self._sums()))

    @property
    def interval(self) -> Tensor:
        """95 % interval of :attr:`debiased` by a jackknife over sequences, shape (2,); NaN for fewer than eight."""
        return self._synchronized(lambda: interval_figure(self._sums(), self.all_rows()))

    @property
    def iid_floor(self) -> Tensor:
        """About the rho of independent x, g and tokens (:func:`~fasc_lightning.dependence.iid_floor`)."""
        return self._synchronized(lambda: floor_figure(self._sums()))

    @property
    def reason(self) -> str:
        """Why the score, or only its null, debiased value or interval, is undefined; "" if all are defined."""
        return self._synchronized(lambda: reason(facts(self._sums()).tolist(), len(self.all_rows())))

    def all_rows(self) -> Tensor:
        """Return the pseudo-values of all sequences, shape (rows, 3)."""
        return dim_zero_cat(self.rows) if len(self.rows) else self.biased.new_zeros(0, 3)

    def _sums(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in SUMS}

    def add_rows(self, rows: Tensor) -> None:
        """Add pseudo-values, shape (rows, 3)."""
        self.rows.append(rows)
        if sum(len(row) for row in self.rows) > MAX_ROWS:
            rows = torch.cat(self.rows)
            even = len(rows) // 2 * 2
            self.rows = [rows[:even].view(-1, 2, 3).sum(1), rows[even:]]

    def _synchronized(self, value: Callable[[], Any]) -> Any:
        """Return a value computed from the states of all processes, as torchmetrics does for ``compute``."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn,
            should_sync=self._to_sync and not self._is_synced,
            should_unsync=self._should_unsync,
        ):
            return value()

    @override
    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Synchronise the states. A process without rows takes part with an empty table of the same shape."""
        if not len(self.rows):
            self.rows = [self.biased.new_zeros(0, 3)]
        super().sync(*args, **kwargs)


def add_samples_(samples: Iterable[tuple[DependenceScore, Tensor, Tensor]]) -> None:
    """Add a sample of tokens to each of many scores, with one transfer to the host for all of them.

    Samples of one shape are computed together. Each score comes out as by :meth:`DependenceScore.update`.

    Args:
        samples: Scores, each with x and g as :meth:`DependenceScore.update` takes them. Scores may share x.
    """
    cut: dict[int, list[list[Tensor]]] = {}  # minibatches of an input, by its id
    scores: list[DependenceScore] = []  # of each set of sequences
    groups: dict[tuple[Any, ...], list[tuple[int, Tensor, Tensor]]] = {}
    samples = list(samples)  # holds the inputs, so that their ids stay theirs
    for score, x, g in samples:
        score._update_count = max(score._update_count, 1)  # torchmetrics counts calls of `update` alone
        for parts in zip(cut.setdefault(id(x), minibatches(x)), minibatches(g), strict=True):
            scores.append(score)
            for a, b in zip(*parts, strict=True):
                if a.shape[0] * a.shape[1] < MIN_TOKENS:
                    score.short += 1
                else:
                    key = a.shape, b.shape, a.dtype, b.dtype, b.device, score.seed
                    groups.setdefault(key, []).append((len(scores) - 1, a, b))
    found = [
        ([place for place, _, _ in group], estimate([x for _, x, _ in group], [g for _, _, g in group], key[-1]))
        for key, group in groups.items()
    ]
    if not found:
        return
    finite = iter(torch.cat([estimates.finite.to(found[0][1].finite.device) for _, estimates in found]).tolist())
    rows: dict[int, list[Tensor]] = {}
    for (places, estimates), key in zip(found, groups, strict=True):
        tokens = key[0][0] * key[0][1]
        sums = {name: values.unbind() for name, values in estimates.sums.items()}
        for i, place in enumerate(places):
            score = scores[place]
            if not next(finite):
                score.infinite += 1
                continue
            for name, values in sums.items():
                state: Tensor = getattr(score, name)
                state += values[i]
            if estimates.rows.shape[1]:
                score.tokens += tokens
                rows.setdefault(place, []).append(estimates.rows[i])
            else:
                score.few_tokens += tokens
    for place, minibatch_rows in rows.items():
        scores[place].add_rows(torch.stack(minibatch_rows).sum(0))


def all_reduce_scores_(scores: Iterable[DependenceScore], group: Any | None = None) -> None:
    """Merge the states of many scores over all processes in two messages.

    Args:
        scores: The same scores in the same order on every process.
        group: Process group; None is the default group.
    """
    scores = list(scores)
    if not scores:
        return
    packed = torch.stack([torch.cat([getattr(score, name).flatten() for name in SUMS]) for score in scores])
    dist.all_reduce(packed, group=group)
    mine = [score.all_rows() for score in scores]
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, (torch.cat(mine).cpu(), [len(rows) for rows in mine]), group=group)
    parts = [rows.to(packed.device).split(counts) for rows, counts in every]
    for i, (score, row) in enumerate(zip(scores, packed, strict=True)):
        start = 0
        for name in SUMS:
            state: Tensor = getattr(score, name)
            setattr(score, name, row[start : start + state.numel()].view(state.shape).clone())
            start += state.numel()
        score.rows = [part[i] for part in parts if len(part[i])]
    seen = torch.stack([score.tokens + score.few_tokens for score in scores]).tolist()
    for score, tokens in zip(scores, seen, strict=True):
        score._update_count = max(score._update_count, int(tokens > 0))
