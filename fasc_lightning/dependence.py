"""The dependence violation score of one layer as a streaming metric, with its null and its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from fasc_lightning.hsic import (
    MIN_TOKENS,
    centered_gram,
    hsic_between,
    hsic_biased,
    hsic_permuted,
    hsic_shifted,
    hsic_unbiased,
    normalized,
    signed_root,
)
from fasc_lightning.tokens import MAX_SEQUENCES

#: Largest minibatch, in tokens: beyond it Gram matrices grow out of hand. In sequences, see MAX_SEQUENCES.
MAX_TOKENS = 2048

#: Fewer sequences than these are cut into consecutive pieces for the debiased value and its interval.
MIN_BLOCKS = 8

#: Fewer sequences than these are shifted for the null: too few have too few orders.
MIN_ORDERS = 4

#: Permutations behind the null, and the share of them that it is not to exceed; resamples behind the interval.
PERMUTATIONS, NULL_LEVEL, RESAMPLES = 200, 0.95, 1000

#: Rows kept for the bootstrap; neighbours are added up beyond it, so that memory is bounded.
MAX_ROWS = 2048


#: The states that add up over batches and processes; beside them there are rows, which are put together.
SUMS = ("biased", "unbiased", "permuted", "floor", "tokens", "short", "infinite")


@dataclass(frozen=True)
class Grams:
    """Centred Gram matrices of one variable on a sample of tokens, cut into minibatches.

    Attributes:
        parts: For each minibatch the matrix in units of the variance, shape (sequences, tokens, sequences, tokens), and
            the variance.
        as_sequences: Whether sequences were told apart.
    """

    parts: list[tuple[Tensor, Tensor]]
    as_sequences: bool

    @classmethod
    def of(cls, values: Tensor) -> Grams:
        """Make those of values of shape (tokens, n) or (sequences, tokens, n)."""
        parts = []
        for part in _minibatches(values if values.ndim == 3 else values[None]):
            sequences, length, _ = part.shape
            if part.numel():
                K, variance = centered_gram(part.reshape(sequences * length, -1))
            else:
                K, variance = values.new_zeros(sequences * length, sequences * length), values.new_zeros(())
            parts.append((K.view(sequences, length, sequences, length), variance))
        return cls(parts, values.ndim == 3)


class DependenceScore(Metric):
    """Streaming minibatch estimate of rho for one layer, with its null and its interval.

    Every update adds the HSIC of its tokens, weighted by their number; the sums are divided at the end. Centring is
    within each minibatch. Gradients of all updates should be of one scale, since a minibatch counts by its variances.
    Nothing here depends on the width of the layer, and states add up over batches and processes: torchmetrics
    synchronises them where this metric is used by itself, so that under DDP every process has to ask for a value. Data
    never raise: a score that is undefined is NaN, and :attr:`reason` says why.

    Tokens of a text depend on one another, so that (sequences, tokens, n) is judged by whole sequences: the debiased
    value leaves out pairs of tokens of the same one, the null permutes them, the interval resamples them. Where there
    are few, the null shifts the gradients circularly along each (below four), and the others cut them into pieces of
    consecutive tokens (below eight). Given as (tokens, n), the debiased value takes tokens for independent.

    Example:
        >>> score = DependenceScore()
        >>> x = torch.randn(8, 32, 16)  # eight sequences of 32 tokens
        >>> score.update(x, x + 0.1 * torch.randn(8, 32, 16))
        >>> bool(score.compute() > score.null)
        True

    Args:
        seed: Of the permutations and the resamples.
        **settings: Of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    # Sums over minibatches, each weighted by its number of tokens.
    biased: Tensor  # HSIC of all pairs of (x, g), shape (2, 2)
    unbiased: Tensor  # the same without bias, shape (2, 2)
    permuted: Tensor  # biased HSIC of x with permuted g, one a permutation
    floor: Tensor  # tr(Sigma_xx) tr(Sigma_gg) / s
    rows: list[Tensor]  # pseudo-values of HSIC, one row (xx, xg, gg) a sequence
    # Counts.
    tokens: Tensor
    short: Tensor  # samples of too few tokens
    infinite: Tensor  # samples with NaN or Inf

    def __init__(self, seed: int = 0, **settings: Any) -> None:
        super().__init__(**{"compute_with_cache": False, **settings})
        self.seed = seed
        for name, shape in (("biased", (2, 2)), ("unbiased", (2, 2)), ("permuted", (PERMUTATIONS,)), ("floor", ())):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("tokens", "short", "infinite"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, x: Tensor, g: Tensor) -> None:
        """Add tokens.

        Args:
            x: Activations, shape (sequences, tokens, n), or (tokens, n) for the consecutive tokens of one text.
            g: Gradients at the same tokens, alike: (..., n), or (..., m) if they are output gradients.

        Raises:
            ValueError: If the shapes are others.
        """
        if x.ndim not in (2, 3) or x.ndim != g.ndim or x.shape[:-1] != g.shape[:-1]:
            raise ValueError(
                "Expected x and g of shape (tokens, features) or (sequences, tokens, features) with as many tokens "
                f"but got {tuple(x.shape)} and {tuple(g.shape)}."
            )
        self.add(Grams.of(x), Grams.of(g))

    def add(self, x: Grams, g: Grams) -> None:
        """Add tokens whose Gram matrices are there already, as those of an input that several layers share."""
        self._update_count = max(self._update_count, 1)  # torchmetrics counts calls of `update` alone
        for (K, variance_x), (L, variance_g) in zip(x.parts, g.parts, strict=True):
            self._add(K, L, torch.stack([variance_x, variance_g]), x.as_sequences)

    def compute(self) -> Tensor:
        """Return rho of the minibatches, in [0, 1], biased upwards for small ones; NaN where undefined."""
        return normalized(self.biased).clamp(0, 1).sqrt()

    @property
    def null(self) -> Tensor:
        """What rho reaches by chance: 95 of 100 permutations or shifts of whole sequences stay below it."""
        return self._synchronized(self._null)

    @property
    def debiased(self) -> Tensor:
        """Signed root of the debiased rho^2 (Song et al. 2012): around 0 for independent x and g; may be negative."""
        return self._synchronized(lambda: signed_root(normalized(self.unbiased)))

    @property
    def interval(self) -> Tensor:
        """95 % bootstrap interval of :attr:`debiased` over sequences, shape (2,)."""
        return self._synchronized(self._interval)

    @property
    def iid_floor(self) -> Tensor:
        """What rho would be about if x, g and tokens were independent (:func:`~fasc_lightning.pooled.iid_floor`)."""
        return self._synchronized(lambda: normalized(self.biased, self.floor).sqrt())

    @property
    def reason(self) -> str:
        """Why the score is undefined; empty if it is not."""
        return self._synchronized(self._reason)

    def _add(self, K: Tensor, L: Tensor, variances: Tensor, as_sequences: bool) -> None:
        """Add one minibatch with its centred Gram matrices of shape (sequences, tokens, sequences, tokens)."""
        sequences, length = K.shape[:2]
        s = sequences * length
        if s < MIN_TOKENS:
            self.short += 1
            return
        if not bool(torch.isfinite(variances).all()):
            self.infinite += 1
            return
        grams = torch.stack([K.view(s, s), L.view(s, s).to(K)])
        weights = s * torch.outer(variances, variances)
        self.tokens += s
        self.biased += weights * hsic_biased(grams)
        self.floor += weights[0, 1] / s
        self.permuted += weights[0, 1] * self._permuted(grams, sequences, length)

        pieces = min(length, max(1, -(-MIN_BLOCKS // sequences)))
        used = length // pieces * pieces
        if used < length:  # equal pieces: the last tokens of each sequence stay out
            inner = grams.view(2, sequences, length, sequences, length)[:, :, :used, :, :used]
            inner = inner.reshape(2, sequences * used, sequences * used)
        else:
            inner = grams
        blocks = sequences * pieces
        between, without = hsic_between(inner, blocks)
        unbiased = between if as_sequences else hsic_unbiased(grams)
        self.unbiased += weights * unbiased
        if len(without):
            # Jackknife pseudo-values (Tukey 1958), centred at the estimate.
            values = weights * (unbiased + (blocks - 1) * (without.mean(0) - without))
            self._add_rows(values[:, [0, 0, 1], [0, 1, 1]] / blocks)

    def _permuted(self, grams: Tensor, sequences: int, length: int) -> Tensor:
        """Return HSIC with g's sequences in other orders, or, where they are few, shifted, shape (PERMUTATIONS,)."""
        if sequences >= MIN_ORDERS:
            # Neighbours may move together, which costs less, where enough groups are left.
            groups = next((n for n in range(MIN_BLOCKS, sequences) if sequences % n == 0), sequences)
            return hsic_permuted(grams[0], grams[1], groups, PERMUTATIONS, self.seed)
        # Not by so little that the tokens' own memory still links x and g.
        shares = torch.rand(PERMUTATIONS, generator=torch.Generator().manual_seed(self.seed)) * 0.75 + 0.125
        shifts = (shares * length).long().clamp(min=1).to(grams.device)
        return hsic_shifted(grams[0], grams[1], sequences)[shifts % length]

    def _add_rows(self, rows: Tensor) -> None:
        self.rows.append(rows)
        if sum(len(row) for row in self.rows) > MAX_ROWS:
            rows = torch.cat(self.rows)
            even = len(rows) // 2 * 2
            self.rows = [rows[:even].view(-1, 2, 3).sum(1), rows[even:]]

    def _null(self) -> Tensor:
        permuted = normalized(self.biased, self.permuted).clamp(0, 1).sqrt()
        return torch.quantile(permuted, NULL_LEVEL)

    def _interval(self) -> Tensor:
        rows = dim_zero_cat(self.rows) if len(self.rows) else self.biased.new_zeros(0, 3)
        if len(rows) < 2 or self._reason():
            return self.biased.new_full((2,), float("nan"))
        # In an order of their own, so that it does not matter which process or batch brought them.
        rows = rows.cpu()
        xx, xg, gg = (_resamples(len(rows), self.seed) @ rows[rows[:, 1].argsort()]).T
        resampled = signed_root(torch.where((xx > 0) & (gg > 0), xg / (xx * gg).clamp(min=0).sqrt(), float("nan")))
        tail = (1 - NULL_LEVEL) / 2
        return torch.nanquantile(resampled, torch.tensor([tail, 1 - tail], dtype=rows.dtype)).to(self.biased.device)

    def _reason(self) -> str:
        if self.tokens == 0:
            if self.infinite > 0:
                return "activations or gradients that are not finite"
            return f"fewer than {MIN_TOKENS} tokens" if self.short > 0 else "no tokens"
        for i, what in enumerate(("activations", "gradients")):
            if self.biased[i, i] <= 0:
                return f"constant {what}"
            if self.unbiased[i, i] <= 0:
                return f"too few tokens to tell {what} from noise"
        return ""

    def _synchronized(self, value: Callable[[], Any]) -> Any:
        """Return a value of the states of all processes, as torchmetrics does for ``compute``."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn,
            should_sync=self._to_sync and not self._is_synced,
            should_unsync=self._should_unsync,
        ):
            return value()

    @override
    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Synchronise; a process that saw nothing has an empty table of the same form."""
        if not len(self.rows):
            self.rows = [self.biased.new_zeros(0, 3)]
        super().sync(*args, **kwargs)


def all_reduce_scores_(scores: Iterable[DependenceScore], group: Any | None = None) -> None:
    """Merge the states of many scores over all processes, in two messages; same scores and order everywhere."""
    scores = list(scores)
    if not scores:
        return
    packed = torch.stack([torch.cat([getattr(score, name).flatten() for name in SUMS]) for score in scores])
    dist.all_reduce(packed, group=group)
    rows: list[Any] = [None] * dist.get_world_size(group)
    mine = [dim_zero_cat(score.rows).cpu() if len(score.rows) else None for score in scores]
    dist.all_gather_object(rows, mine, group=group)
    for i, (score, row) in enumerate(zip(scores, packed, strict=True)):
        start = 0
        for name in SUMS:
            state: Tensor = getattr(score, name)
            setattr(score, name, row[start : start + state.numel()].view(state.shape).clone())
            start += state.numel()
        score.rows = [part[i].to(score.biased.device) for part in rows if part[i] is not None]
        score._update_count = max(score._update_count, int(score.tokens > 0))


@lru_cache(maxsize=4)
def _resamples(rows: int, seed: int) -> Tensor:
    """Return how often each row is in each bootstrap resample, shape (RESAMPLES, rows), the same for all layers."""
    drawn = torch.randint(rows, (RESAMPLES, rows), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(RESAMPLES, rows, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def _minibatches(values: Tensor) -> list[Tensor]:
    """Cut (sequences, tokens, d) into parts that are not too large, of whole sequences where they allow it."""
    sequences, length, _ = values.shape
    if length > MAX_TOKENS:
        parts = -(-length // MAX_TOKENS)
        return [piece for row in values.split(1) for piece in row.tensor_split(parts, dim=1)]
    most = max(1, min(MAX_SEQUENCES, MAX_TOKENS // max(1, length)))
    return list(values.tensor_split(max(1, -(-sequences // most))))
