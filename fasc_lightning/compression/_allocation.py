"""Allocation of a budget, of parameters or of bytes, over the ways to store each layer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fasc_lightning.options import get_allocation, register_allocation

#: Layers up to which the choice is exact: with more, the Lagrangian leaves less than a thousandth of the loss.
_EXACT_LAYERS = 32

#: Partial choices that the exact search holds at once; beyond it the search ends without a result.
_MOST_PARTIAL = 1 << 14

#: Share of the loss that an exact search has to be able to save.
_LEAST_GAIN = 1e-4

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
class StorageOptions:
    """The ways to store one layer; the last one is the dense layer, without loss.

    Attributes:
        costs: Cost of each way in the unit of the budget, parameters or bytes, ascending but for the dense layer's.
        losses: Loss of each way, weighted so that the losses of different layers compare.
        name: The layer's name; "" if the caller gave none.
        shape: (m, n) = (outputs, inputs) of the layer; zeros if the caller gave none.
    """

    costs: NDArray[np.int64]
    losses: NDArray[np.float64]
    name: str = field(default="", kw_only=True)
    shape: tuple[int, int] = field(default=(0, 0), kw_only=True)

    def best(self, price: float) -> int:
        """Return the index of the option that minimises loss + price * cost; the cheaper option wins a tie."""
        return int(np.argmin(self.losses + price * self.costs))


@dataclass(frozen=True)
class _Ranks(StorageOptions):
    """The ranks of one layer, ascending; the last one is dense, for which 0 stands."""

    ranks: NDArray[np.int64]


def _ranks(candidate: Candidate, cost: Cost, align: int) -> _Ranks:
    dense = candidate.m * candidate.n
    ranks = np.arange(align, len(candidate.losses), align, dtype=np.int64)
    costs = np.array([cost(candidate.m, candidate.n, k) for k in ranks.tolist()], dtype=np.int64)
    saves = costs < dense
    return _Ranks(
        np.append(costs[saves], dense),
        np.append(np.asarray(candidate.losses, dtype=np.float64)[ranks[saves]], 0.0),
        np.append(ranks[saves], 0),
        name=candidate.name,
        shape=(candidate.m, candidate.n),
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


def allocate(options: Sequence[StorageOptions], budget: int, allocation: str) -> list[int]:
    """Choose one way to store each layer by an allocation that has been registered, and check its choice.

    Args:
        options: The ways to store each layer.
        budget: What all layers together may cost; at least the sum of their cheapest options.
        allocation: Name of the allocation.

    Returns:
        The index of each layer's option.

    Raises:
        TypeError: If it does not return indexes.
        ValueError: If there is no such allocation, or if it does not return one valid index for each layer, or exceeds
            the budget.
    """
    found = get_allocation(allocation)(options, budget)
    counts = [len(o.costs) for o in options]
    expected = (
        f"Expected allocation {allocation!r} to return {len(counts)} indexes, each of one option of its layer, but"
    )
    try:
        chosen = [operator.index(i) for i in found]
    except TypeError as error:
        raise TypeError(f"{expected} got {found!r:.200}.") from error
    if len(chosen) != len(counts) or not all(0 <= i < count for i, count in zip(chosen, counts, strict=True)):
        raise ValueError(f"{expected} got {found!r:.200}.")
    cost = sum(int(o.costs[i]) for o, i in zip(options, chosen, strict=True))
    if cost > budget:
        raise ValueError(
            f"Expected allocation {allocation!r} to spend at most {budget:,} but its choice costs {cost:,}."
        )
    return chosen


def allocate_fisher(
    candidates: Sequence[Candidate], budget: int, cost: Cost, align: int = 1, *, allocation: str = "fisher"
) -> list[int | None]:
    """Minimise the sum of the layers' losses under a budget of parameters, over all ranks and dense layers.

    Args:
        candidates: The layers.
        budget: Parameters that all layers together may keep.
        cost: Parameters of a rank-k matrix in the layout in use.
        align: Ranks are multiples of this. A layer stays dense if no multiple saves parameters.
        allocation: Another allocation that chooses the ranks.

    Returns:
        The rank of each layer, None for dense.

    Raises:
        ValueError: If the budget does not hold the lowest rank in every layer, or as :func:`allocate`.
    """
    options = [_ranks(candidate, cost, align) for candidate in candidates]
    least = sum(int(o.costs[0]) for o in options)
    if budget < least:
        raise ValueError(
            f"Expected a budget of at least {least:,} parameters (rank {align} in each of {len(options)} layers) but "
            f"got {budget:,}. Raise `rank` or `keep`{'' if align == 1 else ', or lower `align`'}."
        )
    return [int(o.ranks[i]) or None for o, i in zip(options, allocate(options, budget, allocation), strict=True)]


@register_allocation("fisher", measures=False)
@register_allocation("measured")
def spend(options: Sequence[StorageOptions], budget: int) -> list[int]:
    """Minimise the sum of the layers' losses under a budget of costs.

    The Lagrangian sum of loss + price * cost separates by layer. The search compares every option, because loss curves
    and costs need not be convex. The price is bisected to the budget (Everett 1963: the result is optimal for the
    budget it spends). The rest of the budget is then spent greedily by loss saved per unit of cost. Few layers leave a
    gap to the best choice that is worth closing: there the choice is exact, where the search stays small
    (:func:`_exact`).

    Args:
        options: The ways to store each layer.
        budget: What all layers together may cost; at least the sum of their first options.

    Returns:
        The index of each layer's option.
    """

    def spent_at(price: float) -> tuple[list[int], int]:
        chosen = [o.best(price) for o in options]
        return chosen, sum(int(o.costs[i]) for o, i in zip(options, chosen, strict=True))

    chosen, spent = spent_at(0.0)
    if spent <= budget:  # it holds every layer's best option
        return chosen
    low, high = 0.0, _prohibitive_price(options)
    chosen, spent = spent_at(high)
    for _ in range(200):
        # Prices span many orders of magnitude, so their logarithm is bisected once the lower end is above zero.
        middle = (low * high) ** 0.5 if low > 0 else high * 1e-6
        trial, cost_of_trial = spent_at(middle)
        if cost_of_trial > budget:
            low = middle
        else:
            high, chosen, spent = middle, trial, cost_of_trial
        if low > 0 and high / low < 1 + 1e-12:
            break
    _spend_rest(options, chosen, budget - spent)
    return _exact(options, budget, chosen, high) or chosen


def _exact(options: Sequence[StorageOptions], budget: int, known: Sequence[int], price: float) -> list[int] | None:
    """Return the choice with the least sum of losses under a budget; None if the search would hold too many.

    It is None as well for many layers, and where the known choice is at most :data:`_LEAST_GAIN` above the bound.

    Layer by layer, the partial choices that no other one beats in both cost and loss are kept (Nemhauser and Ullmann
    1969). The Lagrangian at a price bounds the loss of every completion from below. What cannot end below the loss of
    a known choice is dropped, so that few partial choices are left (Dyer et al. 1995).

    Args:
        options: The ways to store each layer.
        budget: What all layers together may cost.
        known: A choice within the budget, by index.
        price: Price of a unit of cost, near the one at which the budget is spent.
    """
    if len(options) > _EXACT_LAYERS:
        return None
    scores = [o.losses + price * o.costs for o in options]
    incumbent = sum(float(o.losses[i]) for o, i in zip(options, known, strict=True))
    bound = incumbent + price * budget
    gap = bound * (1 + 1e-12) - sum(float(score.min()) for score in scores)  # rounding must not drop the known choice
    if not gap > _LEAST_GAIN * incumbent:
        return None
    cheapest = np.array([int(o.costs.min()) for o in options])
    later = np.append(cheapest[::-1].cumsum()[::-1][1:], 0)
    costs, losses, excess = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    steps: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for o, score, rest in zip(options, scores, later, strict=True):
        over = score - score.min()
        near = np.flatnonzero(over <= gap)
        if len(costs) * len(near) > 16 * _MOST_PARTIAL:
            return None
        all_costs = (costs[:, None] + o.costs[near]).ravel()
        all_losses = (losses[:, None] + o.losses[near]).ravel()
        all_excess = (excess[:, None] + over[near]).ravel()
        kept = np.flatnonzero((all_excess <= gap) & (all_costs <= budget - rest))
        kept = kept[np.lexsort((all_losses[kept], all_costs[kept]))]
        ahead = np.append(np.inf, np.minimum.accumulate(all_losses[kept])[:-1])
        kept = kept[all_losses[kept] < ahead]
        if not 0 < len(kept) <= _MOST_PARTIAL:
            return None
        steps.append((kept // len(near), near[kept % len(near)]))
        costs, losses, excess = all_costs[kept], all_losses[kept], all_excess[kept]
    place = int(losses.argmin())
    if losses[place] >= incumbent:
        return None
    found: list[int] = []
    for before, chosen in reversed(steps):
        found.append(int(chosen[place]))
        place = int(before[place])
    return found[::-1]


@register_allocation("uniform", measures=False)
def spend_evenly(options: Sequence[StorageOptions], budget: int) -> list[int]:
    """Give all layers the same option, by index: the last one that the budget holds, or each layer's cheapest one.

    Args:
        options: The ways to store each layer.
        budget: What all layers together may cost; at least the sum of their cheapest options.

    Returns:
        The index of each layer's option.
    """
    for i in reversed(range(min(len(o.costs) for o in options))):
        if sum(int(o.costs[i]) for o in options) <= budget:
            return [i] * len(options)
    return [int(np.argmin(o.costs)) for o in options]


def _prohibitive_price(options: Sequence[StorageOptions]) -> float:
    """Return a price at which every layer takes its cheapest option."""
    return 2 * max(float(o.losses.max()) for o in options) + 1.0


def _spend_rest(options: Sequence[StorageOptions], chosen: list[int], rest: int) -> None:
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
        o = _ranks(candidate, cost, align)
        fitting = np.flatnonzero(o.costs <= budget)
        if not len(fitting):
            raise ValueError(
                f"Expected a budget of at least {int(o.costs[0]):,} parameters for layer {candidate.name!r} but got "
                f"{budget:,}. Raise `rank` or `keep`,{'' if align == 1 else ' lower `align`,'} or exclude the layer."
            )
        ranks.append(int(o.ranks[fitting[-1]]) or None)
    return ranks
