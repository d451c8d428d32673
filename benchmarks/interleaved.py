"""Times of several actions in one run, taken in turn, so that a slow phase of the machine affects all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch

Key = TypeVar("Key", bound=Hashable)

#: Least rounds of one run, however long they take; fewer give no useful median.
LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes of some values."""

    median: float
    low: float
    high: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Return the spread of one or more values."""
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        return cls(median, low, high, min(values), max(values))

    def to_dict(self) -> dict[str, float]:
        """Return plain types."""
        return asdict(self)


def wait_for(device: torch.device) -> None:
    """Wait until an accelerator has done all of its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(action: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that an action takes, by a clock."""
    start = clock()
    action()
    return clock() - start


def interleave(
    actions: Mapping[Key, Callable[[], Any]],
    seconds: float,
    least_rounds: int = LEAST_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, list[float]]:
    """Time actions in turn, in another order each round, after one round that does not count.

    Args:
        actions: The actions by name. Each should take well under a second.
        seconds: No new round begins after this time.
        least_rounds: Least number of rounds.
        clock: The clock; ``time.process_time`` does not count the time of other processes.

    Returns:
        Seconds of each action, round by round.
    """
    times: dict[Key, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    order, shuffle = list(actions), random.Random(0).shuffle
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least_rounds or time.perf_counter() < end:
        shuffle(order)  # each action changes caches and allocator for the next one
        for name in order:
            times[name].append(timed(actions[name], clock))
        rounds += 1
    return times


def speed_ups(times: Mapping[Key, list[float]], reference: Key) -> dict[Key, Spread]:
    """Return each action's speed-up over the reference, from ratios within each round."""
    return {
        name: Spread.of([a / b for a, b in zip(times[reference], values, strict=True)])
        for name, values in times.items()
    }
