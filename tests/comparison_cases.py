"""Hand-made outcomes of cells."""

from __future__ import annotations

import random

from fasc_lightning.studies.comparison import Budget, Cell, Outcome, Setting
from fasc_lightning.studies.comparison._questions import Answers

KEEP = Budget(keep=0.8)
HALF = Budget(rank=0.5)
PUBLISHED = Setting("uniform", "factors")
BEST = Setting("fisher", "pivot")
#: Twenty windows that are hard or easy for every model alike.
HARDNESS = [2.0 + step / 10 for step in range(-10, 10)]
KINDS = ["geographic"] * 20 + ["temporal"] * 20


def outcome(worse=0.0, noise=0.0, recalled=40, kept=0.8, zeros=0.0, seconds=3.0, seed=1, pairs=0):
    """A measured outcome: so many nats worse than HARDNESS on average, give or take, and so many of 40 facts."""
    source = random.Random(seed)
    losses = [loss + worse + source.uniform(-noise, noise) for loss in HARDNESS]
    measured = Answers({"news": losses}, [i % 40 < recalled for i in range(40)], [i % 2 == 0 for i in range(pairs)])
    return Outcome(100, kept, zeros=zeros, measured=measured, seconds={"factorize": seconds, "evaluate": 1.0})


def failed(error="FloatingPointError: The loss of window 0 is not finite.\nTraceback"):
    return Outcome(error=error)


def grid():
    """Three ranked cells, one that failed, and one that only writes zeros, at one budget."""
    return {
        Cell("fasc", KEEP, BEST): outcome(0.2, recalled=38),
        Cell("svd-llm", KEEP, BEST): outcome(0.2, noise=0.3, recalled=38),
        Cell("svd", KEEP, PUBLISHED): outcome(1.5, noise=0.1, recalled=12),
        Cell("fasc-eq6", KEEP, PUBLISHED): failed(),
        Cell("magnitude", KEEP): outcome(0.0, recalled=40, kept=1.0, zeros=0.2),
    }
