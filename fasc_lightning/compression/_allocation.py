"""Allocation of ranks: a budget of parameters spent over the layers' loss curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

#: Number of parameters of a rank-k (m, n) matrix in a layout: cost(m, n, k).
Cost: TypeAlias = Callable[[int, int, int], int]


@dataclass(frozen=True)
class Candidate:
    """One layer as the allocation sees it.

    Attributes:
        name: The layer's name, for messages.
        m: Outputs.
        n: Inputs.
        losses: The solver's loss at ranks 0..r, shape (r + 1,), weighted so that the losses of different layers
            compare.
    """

    name: str
    m: int
    n: int
    losses: NDArray[np.float64]


@dataclass(frozen=True)
class _Options:
    """The ways to store one layer, by ascending rank and cost; the last one is dense."""

    ranks: NDArray[np.int64]  # 0 stands for dense
    costs: NDArray[np.int64]
    losses: NDArray[np.float64]

    def best(self, price: float) -> int:
        """Return the index of the option that minimises loss + price * cost; the cheaper option wins a tie."""
        return int(np.argmin(self.losses + price * self.costs))


def _options(candidate: Candidate, cost: Cost, align: int) -> _Options:
    dense = candidate.m * candidate.n
    ranks = np.arange(align, len(candidate.losses), align, dtype=np.int64)
    costs = np.array([cost(candidate.m, candidate.n, k) for k in ranks.tolist()], dtype=np.int64)
    saves = costs < dense
    return _Options(
        np.append(ranks[saves], 0),
        np.append(costs[saves], dense),
        np.append(np.asarray(candidate.losses, dtype=np.float64)[ranks[saves]], 0.0),
    )


def least_cost(m: int, n: int, cost: Cost, align: int = 1) -> int:
    """Return the parameters of the cheapest way to store a layer: at its lowest rank, or dense if that is cheaper.

    Args:
        m: Outputs.
        n: Inputs.
        cost: Parameters of a rank-k matrix in the layout in use.
        align: Ranks are multiples of this.
    """
    return m * n if align > min(m, n) else min(cost(m, n, align), m * n)


def allocate_fisher(candidates: Sequence[Candidate], budget: int, cost: Cost, align: int = 1) -> list[int | None]:
    """Minimise the sum of the layers' losses under a budget of parameters.

    The Lagrangian sum of loss(k) + price * cost(k) separates by layer. The search compares every rank, because the cost
    of pivot storage is concave in k, and also the dense layer. The price is bisected to the budget (Everett 1963: the
    result is optimal for the budget it spends). The rest of the budget is then spent greedily by loss saved per
    parameter.

    Args:
        candidates: The layers.
        budget: Parameters that all layers together may keep.
        cost: Parameters of a rank-k matrix in the layout in use.
        align: Ranks are multiples of this. A layer stays dense if no multiple saves parameters.

    Returns:
        The rank of each layer, None for dense.

    Raises:
        ValueError: If the budget does not hold the lowest rank in every layer.
    """
    options = [_options(candidate, cost, align) for candidate in candidates]
    least = sum(int(o.costs[0]) for o in options)
    if budget < least:
        raise ValueError(
            f"Expected a budget of at least {least:,} parameters (rank {align} in each of {len(options)} layers) but "
            f"got {budget:,}. Raise `rank` or `keep`{'' if align == 1 else ', or lower `align`'}."
        )

    def spend(price: float) -> tuple[list[int], int]:
        chosen = [o.best(price) for o in options]
        return chosen, sum(int(o.costs[i]) for o, i in zip(options, chosen, strict=True))

    chosen, spent = spend(0.0)
    if spent > budget:
        low, high = 0.0, _prohibitive_price(options)
        chosen, spent = spend(high)
        for _ in range(200):
            # Prices span many orders of magnitude, so their logarithm is bisected once the lower end is above zero.
            middle = (low * high) ** 0.5 if low > 0 else high * 1e-6
            trial, cost_of_trial = spend(middle)
            if cost_of_trial > budget:
                low = middle
            else:
                high, chosen, spent = middle, trial, cost_of_trial
            if low > 0 and high / low < 1 + 1e-12:
                break
    _spend_rest(options, chosen, budget - spent)
    return [int(o.ranks[i]) or None for o, i in zip(options, chosen, strict=True)]


def _prohibitive_price(options: Sequence[_Options]) -> float:
    """Return a price at which every layer takes its cheapest option."""
    return 2 * max(float(o.losses.max()) for o in options) + 1.0


def _spend_rest(options: Sequence[_Options], chosen: list[int], rest: int) -> None:
    """Move layers to costlier options while the budget lasts, the best gain per parameter first."""
    while True:
        best: tuple[float, int, int] | None = None
        for layer, (o, i) in enumerate(zip(options, chosen, strict=True)):
            extra = o.costs - o.costs[i]
            gain = o.losses[i] - o.losses
            affordable = (extra > 0) & (extra <= rest) & (gain > 0)
            if affordable.any():
                ratio = np.where(affordable, gain / np.maximum(extra, 1), -np.inf)
                j = int(np.argmax(ratio))
                if best is None or ratio[j] > best[0]:
                    best = (float(ratio[j]), layer, j)
        if best is None:
            return
        _, layer, j = best
        rest -= int(options[layer].costs[j] - options[layer].costs[chosen[layer]])
        chosen[layer] = j


def allocate_uniform(
    candidates: Sequence[Candidate], budgets: Sequence[int], cost: Cost, align: int = 1
) -> list[int | None]:
    """Give each layer the largest rank that its own budget holds; a layer that fits stays dense.

    Args:
        candidates: The layers; their losses are not used.
        budgets: Parameters that each layer may keep.
        cost: Parameters of a rank-k matrix in the layout in use.
        align: Ranks are multiples of this.

    Raises:
        ValueError: If a layer's budget does not hold its lowest rank.
    """
    ranks: list[int | None] = []
    for candidate, budget in zip(candidates, budgets, strict=True):
        o = _options(candidate, cost, align)
        fitting = np.flatnonzero(o.costs <= budget)
        if not len(fitting):
            raise ValueError(
                f"Expected a budget of at least {int(o.costs[0]):,} parameters for layer {candidate.name!r} but got "
                f"{budget:,}. Raise `rank` or `keep`,{'' if align == 1 else ' lower `align`,'} or exclude the layer."
            )
        ranks.append(int(o.ranks[fitting[-1]]) or None)
    return ranks
