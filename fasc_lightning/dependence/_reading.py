"""The figures of dependence scores, computed from their sums: of one score, or of many at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fasc_lightning.batches import MIN_SEQUENCES
from fasc_lightning.dependence._hsic import MIN_TOKENS, normalized, signed_root

#: Fewest sequences, or minibatches of four, for an interval.
MIN_ROWS = 8

#: One in twenty of the orders may reach the null.
NULL_LEVEL = 0.95

#: The states of a score that add up over batches and processes. The other state, ``rows``, is concatenated.
SUMS = (
    "biased", "unbiased", "permuted", "floor", "tokens", "few_biased", "few_floor", "few_tokens", "short", "infinite"
)  # fmt: skip

#: Sums of some scores by the names in SUMS. All functions take them with any leading dimensions (...).
Sums = Mapping[str, Tensor]


def rho_figure(sums: Sums) -> Tensor:
    """Return rho, shape (...); NaN where undefined."""
    return normalized(_main(sums, "biased")).clamp(0, 1).sqrt()


def null_figure(sums: Sums) -> Tensor:
    """Return the value that rho exceeds by chance in at most 5 of 100 cases, shape (...)."""
    # With the identity, one order more than the permutations is equally likely under independence (Phipson and Smyth
    # 2010). rho exceeds the null if it is among the highest 5 % of them.
    permuted = sums["permuted"]
    exceeding = int((1 - NULL_LEVEL) * (permuted.shape[-1] + 1))
    highest = permuted.topk(exceeding).values[..., -1]
    # Values that differ by the rounding of a sum over processes count as equal.
    return normalized(sums["biased"], highest * (1 + 1e-12)).clamp(0, 1).sqrt()


def debiased_figure(sums: Sums) -> Tensor:
    """Return the signed root of the debiased rho^2, shape (...)."""
    return signed_root(normalized(sums["unbiased"]))


def floor_figure(sums: Sums) -> Tensor:
    """Return about the rho of independent x, g and tokens, shape (...)."""
    return normalized(_main(sums, "biased"), _main(sums, "floor")).sqrt()


def interval_figure(sums: Sums, rows: Tensor) -> Tensor:
    """Return the 95 % interval of the debiased value, shape (..., 2); NaN where undefined.

    Args:
        sums: Sums of the scores.
        rows: Pseudo-values of HSIC, shape (..., rows, 3).
    """
    count = rows.shape[-2]
    if count < MIN_ROWS:
        return rows.new_full((*rows.shape[:-2], 2), float("nan"))
    # The infinitesimal jackknife of the ratio, with Student's t for few degrees of freedom.
    xx, xg, gg = rows.sum(-2, keepdim=True).unbind(-1)
    norm = (xx * gg).sqrt()
    ratio = xg / norm
    influences = count * (rows[..., 1] / norm - ratio / 2 * (rows[..., 0] / xx + rows[..., 2] / gg))
    error = (influences.square().sum(-1, keepdim=True) / (count * (count - 1))).sqrt()
    reach = student_quantile(count - 1) * error
    defined = (sums["tokens"] > 0) & ~_not_positive(sums["biased"]) & ~_not_positive(sums["unbiased"])
    return torch.where(defined[..., None], signed_root(torch.cat([ratio - reach, ratio + reach], -1)), float("nan"))


def facts(sums: Sums) -> Tensor:
    """Return the numbers that :func:`reason` reads, shape (..., 8)."""
    counts = [sums[name] for name in ("tokens", "few_tokens", "short", "infinite")]
    own = [_diagonal(values) for values in (_main(sums, "biased"), sums["unbiased"])]
    return torch.cat([torch.stack(counts, -1), *own], -1)


def observed(found: Sequence[float]) -> int:
    """Return the number of tokens that rho is computed from, by the score's :func:`facts`."""
    return int(found[0] or found[1])


def reason(found: Sequence[float], rows: int) -> str:
    """Return why a score, or only its null, debiased value or interval, is undefined; "" if all are defined.

    Args:
        found: The score's :func:`facts`.
        rows: Number of its pseudo-values.
    """
    tokens, _, short, infinite, *own = found
    if observed(found) == 0:
        if infinite > 0:
            return "activations or gradients that are not finite"
        return f"fewer than {MIN_TOKENS} tokens" if short > 0 else "no tokens"
    for what, biased, unbiased in zip(("activations", "gradients"), own[:2], own[2:], strict=True):
        if biased <= 0:
            return f"constant {what}"
        if tokens > 0 and unbiased <= 0:
            return f"too few tokens to tell {what} from noise"
    if tokens == 0:
        return f"fewer than {MIN_SEQUENCES} sequences, too few for all but rho"
    return "" if rows >= MIN_ROWS else f"fewer than {MIN_ROWS} sequences, too few for an interval"


def _main(sums: Sums, name: str) -> Tensor:
    """Return a sum over the minibatches of four sequences or more; if there are none, over the smaller ones."""
    values = sums[name]
    many = sums["tokens"] > 0
    return torch.where(many.view(many.shape + (1,) * (values.ndim - many.ndim)), values, sums[f"few_{name}"])


def _diagonal(hsic: Tensor) -> Tensor:
    return hsic.diagonal(dim1=-2, dim2=-1)


def _not_positive(hsic: Tensor) -> Tensor:
    """Return whether HSIC(x, x) or HSIC(g, g) shows no variance, shape (...)."""
    return (_diagonal(hsic) <= 0).any(-1)


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
