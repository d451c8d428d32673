"""The streaming dependence score of one layer, with its null and its confidence interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from fasc_lightning.batches import MAX_SEQUENCES, MIN_SEQUENCES
from fasc_lightning.dependence._grams import Grams
from fasc_lightning.dependence._hsic import (
    MIN_TOKENS,
    hsic_between,
    hsic_biased,
    hsic_permuted,
    hsic_unbiased,
    normalized,
    random_orders,
    signed_root,
)

#: Fewest sequences, or minibatches of four, for an interval.
MIN_ROWS = 8

#: Fewest groups of sequences that a permutation moves. Groups of neighbours cost less than single sequences.
MIN_GROUPS = 8

#: Random orders of sequences behind the null, beside the identity: with it, ten times all orders of four sequences and
#: twice all orders of five. One in twenty of them may reach the null.
PERMUTATIONS, NULL_LEVEL = 239, 0.95

#: Most rows kept for the interval; beyond it neighbours are added up, so that memory is bounded.
MAX_ROWS = 2048

#: The states that add up over batches and processes. The other state, ``rows``, is concatenated.
SUMS = (
    "biased", "unbiased", "permuted", "floor", "tokens", "few_biased", "few_floor", "few_tokens", "short", "infinite"
)  # fmt: skip


class DependenceScore(Metric):
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

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

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
        super().__init__(**{"compute_with_cache": False, **settings})
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
        if x.ndim not in (2, 3) or x.ndim != g.ndim or x.shape[:-1] != g.shape[:-1]:
            raise ValueError(
                "Expected x and g of shape (tokens, features) or (sequences, tokens, features) with as many tokens "
                f"but got {tuple(x.shape)} and {tuple(g.shape)}."
            )
        self.add(Grams.of(x), Grams.of(g))

    def add(self, x: Grams, g: Grams) -> None:
        """Add tokens by their Gram matrices. Layers that share an input share its matrices."""
        self._update_count = max(self._update_count, 1)  # torchmetrics counts calls of `update` alone
        for parts_x, parts_g in zip(x.parts, g.parts, strict=True):
            rows = [
                self._add(K, L, torch.stack([variance_x, variance_g]))
                for (K, variance_x), (L, variance_g) in zip(parts_x, parts_g, strict=True)
            ]
            found = [part for part in rows if part is not None]
            if found:
                self._add_rows(torch.stack(found).sum(0))

    @property
    def observed(self) -> int:
        """Number of tokens that rho is computed from."""
        return int(self.tokens or self.few_tokens)

    def compute(self) -> Tensor:
        """Return rho of the minibatches, in [0, 1]; biased upwards for small minibatches, NaN where undefined."""
        return normalized(self._sum("biased")).clamp(0, 1).sqrt()

    @property
    def null(self) -> Tensor:
        """The value that rho exceeds by chance in at most 5 of 100 cases, by permutations of whole sequences."""
        return self._synchronized(self._null)

    @property
    def debiased(self) -> Tensor:
        """Signed root of the debiased rho^2 (Song et al. 2012): about 0 for independent x and g; may be negative."""
        return self._synchronized(lambda: signed_root(normalized(self.unbiased)))

    @property
    def interval(self) -> Tensor:
        """95 % interval of :attr:`debiased` by a jackknife over sequences, shape (2,); NaN for fewer than eight."""
        return self._synchronized(self._interval)

    @property
    def iid_floor(self) -> Tensor:
        """About the rho of independent x, g and tokens (:func:`~fasc_lightning.dependence.iid_floor`)."""
        return self._synchronized(lambda: normalized(self._sum("biased"), self._sum("floor")).sqrt())

    @property
    def reason(self) -> str:
        """Why the score, or only its null, debiased value or interval, is undefined; "" if all are defined."""
        return self._synchronized(self._reason)

    def _sum(self, name: str) -> Tensor:
        """Return a sum over the minibatches of four sequences or more; if there are none, over the smaller ones."""
        found: Tensor = getattr(self, name if self.tokens > 0 else f"few_{name}")
        return found

    def _add(self, K: Tensor, L: Tensor, variances: Tensor) -> Tensor | None:
        """Add one minibatch by its centred Gram matrices, each of shape (sequences, tokens, sequences, tokens).

        Returns:
            Its pseudo-values, shape (blocks, 3), or (1, 3) for four blocks; None if the minibatch does not count.
        """
        sequences, length = K.shape[:2]
        s = sequences * length
        if s < MIN_TOKENS:
            self.short += 1
            return None
        if not bool(torch.isfinite(variances).all()):
            self.infinite += 1
            return None
        grams = torch.stack([K.reshape(s, s), L.reshape(s, s).to(K)])
        weights = s * torch.outer(variances, variances)
        biased = hsic_biased(grams)
        if sequences < MIN_SEQUENCES:
            self.few_tokens += s
            self.few_biased += weights * biased
            self.few_floor += weights[0, 1] / s
            return None
        self.tokens += s
        self.biased += weights * biased
        self.floor += weights[0, 1] / s

        # Many independent tokens are grouped into equal blocks; the last few stay out.
        blocks = sequences // -(-sequences // MAX_SEQUENCES)
        used = sequences // blocks * blocks * length
        inner = grams if used == s else grams[:, :used, :used].contiguous()
        self.permuted += weights[0, 1] * self._permuted(inner, blocks, biased[0, 1])
        between, without = hsic_between(inner, blocks)
        unbiased = hsic_unbiased(grams) if length == 1 else between
        self.unbiased += weights * unbiased
        if not len(without):
            return (weights * unbiased)[None, [0, 0, 1], [0, 1, 1]]
        # Jackknife pseudo-values (Tukey 1958), centred at the estimate.
        values = weights * (unbiased + (blocks - 1) * (without.mean(0) - without))
        return values[:, [0, 0, 1], [0, 1, 1]] / blocks

    def _permuted(self, grams: Tensor, blocks: int, biased: Tensor) -> Tensor:
        """Return HSIC with g's blocks permuted, shape (PERMUTATIONS,), scaled so that the identity gives ``biased``."""
        groups = next((n for n in range(MIN_GROUPS, blocks) if blocks % n == 0), blocks)
        orders = random_orders(groups, PERMUTATIONS, self.seed)
        same = (orders == torch.arange(groups)).all(1).to(biased.device)
        found = hsic_permuted(grams[0], grams[1], orders)
        inner = hsic_biased(grams)[0, 1]
        found = found * torch.where(inner > 0, biased / inner, 1.0)
        return torch.where(same, biased, found)  # exact, so that the identity does not exceed itself

    def _add_rows(self, rows: Tensor) -> None:
        self.rows.append(rows)
        if sum(len(row) for row in self.rows) > MAX_ROWS:
            rows = torch.cat(self.rows)
            even = len(rows) // 2 * 2
            self.rows = [rows[:even].view(-1, 2, 3).sum(1), rows[even:]]

    def _null(self) -> Tensor:
        # With the identity, PERMUTATIONS + 1 orders are equally likely under independence (Phipson and Smyth 2010).
        # rho exceeds the null if it is among the highest 5 % of them.
        exceeding = int((1 - NULL_LEVEL) * (PERMUTATIONS + 1))
        highest = self.permuted.topk(exceeding).values[-1]
        # Values that differ by the rounding of a sum over processes count as equal.
        return normalized(self.biased, highest * (1 + 1e-12)).clamp(0, 1).sqrt()

    def _interval(self) -> Tensor:
        rows = dim_zero_cat(self.rows) if len(self.rows) else self.biased.new_zeros(0, 3)
        if self._undefined() or len(rows) < MIN_ROWS:
            return self.biased.new_full((2,), float("nan"))
        # The infinitesimal jackknife of the ratio, with Student's t for few degrees of freedom.
        xx, xg, gg = rows.sum(0)
        norm = (xx * gg).sqrt()
        ratio = xg / norm
        count = len(rows)
        influences = count * (rows[:, 1] / norm - ratio / 2 * (rows[:, 0] / xx + rows[:, 2] / gg))
        error = (influences.square().sum() / (count * (count - 1))).sqrt()
        reach = student_quantile(count - 1) * error
        return signed_root(torch.stack([ratio - reach, ratio + reach]))

    def _reason(self) -> str:
        rows = sum(len(part) for part in self.rows)
        if (undefined := self._undefined()) or rows >= MIN_ROWS:
            return undefined
        return f"fewer than {MIN_ROWS} sequences, too few for an interval"

    def _undefined(self) -> str:
        """Return why rho or its debiased value is undefined."""
        if self.observed == 0:
            if self.infinite > 0:
                return "activations or gradients that are not finite"
            return f"fewer than {MIN_TOKENS} tokens" if self.short > 0 else "no tokens"
        for i, what in enumerate(("activations", "gradients")):
            if self._sum("biased")[i, i] <= 0:
                return f"constant {what}"
            if self.tokens == 0:
                continue
            if self.unbiased[i, i] <= 0:
                return f"too few tokens to tell {what} from noise"
        return "" if self.tokens > 0 else f"fewer than {MIN_SEQUENCES} sequences, too few for all but rho"

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
        score._update_count = max(score._update_count, int(score.observed > 0))


def student_quantile(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t, with an error below 1e-3 from 6 degrees of freedom on.

    Args:
        freedom: Degrees of freedom.
    """
    # The expansion of Cornish and Fisher (1938) in powers of 1 / freedom.
    z = 1.959963984540054
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * freedom**4)
    )
