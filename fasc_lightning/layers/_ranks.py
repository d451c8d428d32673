"""Absolute ranks, and the parameters that they cost."""

from __future__ import annotations


def rank_budget(m: int, n: int, rank: int) -> int:
    """Return the degrees of freedom of a rank-k (m, n) matrix, k(m + n - k)."""
    return rank * (m + n - rank)


def resolve_rank(m: int, n: int, rank: float) -> int:
    """Return the absolute rank of a layer: a fraction of its full rank, or the given integer.

    Args:
        m: Outputs.
        n: Inputs.
        rank: float in (0, 1]: fraction of min(m, n); int: the rank.
    """
    full = min(m, n)
    return rank if isinstance(rank, int) else max(1, round(rank * full))
