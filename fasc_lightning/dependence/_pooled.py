"""The pooled dependence score: rho from the moments of all tokens, with its debiased value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fasc_lightning.dependence._hsic import MIN_TOKENS, normalized, signed_root
from fasc_lightning.dependence._tokens import DependenceMetric, as_sequences

#: Pairs of variables: of the moments, and of the sums that are not symmetric in the two.
PAIRS = (("x", "x"), ("x", "g"), ("g", "g"))
ORDERED = (*PAIRS, ("g", "x"))


class PooledDependenceScore(DependenceMetric):
    """rho from the moments of all tokens together, by the paper's Eq. 2: exact and mergeable, in d x d numbers.

    The means of all tokens centre them. :attr:`debiased` is the unbiased HSIC of whole sequences: it leaves out pairs
    of tokens of one sequence, and each sequence counts the same, however long it is. Tokens of shape (tokens, n) count
    as independent, each as a sequence of its own. It streams, too: Song's sums over pairs of sequences are sums of
    moments. These moments are of fourth order: an offset of more than a few hundred standard deviations costs their
    last digits, even in float64.

    Example:
        >>> score = PooledDependenceScore()
        >>> x = torch.randn(8, 32, 16)  # eight sequences of 32 tokens
        >>> score.update(x, x + 0.1 * torch.randn(8, 32, 16))
        >>> bool(score.compute() > 0.9)
        True

    Args:
        **settings: Settings of :class:`torchmetrics.Metric`.
    """

    tokens: Tensor
    sequences: Tensor

    # Of one sequence let S = u^T v / tokens, p = mean of u and q = mean of v, where u and v are x or g. All states are
    # sums. Over all tokens: "sum_u" of u and "uv" of u v^T. Over sequences: "means_u" of p, "norm_u" of |p|^2,
    # "alone_uv" of (|S|^2, p^T S q, |p|^2 |q|^2), "weighted_uv" of S^T p and "scaled_uv" of |p|^2 q. "within_uv" and
    # "between_uv" are the sums of S and of p q^T less "uv", which is zero for sequences of one token.
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        names = ["tokens", "sequences", *(f"{kind}_{u}" for kind in ("sum", "means", "norm") for u in "xg")]
        names += [f"{kind}{u}{v}" for kind in ("", "within_", "between_") for u, v in PAIRS]
        names += [f"{kind}_{u}{v}" for kind in ("weighted", "scaled") for u, v in ORDERED]
        for name in names:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for u, v in PAIRS:
            self.add_state(f"alone_{u}{v}", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, x: Tensor, g: Tensor) -> None:
        """Add tokens.

        Args:
            x: Activations, shape (sequences, tokens, n), or (tokens, n) for independent tokens.
            g: Gradients at the same tokens, shape (..., n) for input gradients or (..., m) for output gradients.

        Raises:
            ValueError: If the shapes do not match.
        """
        values = dict(zip("xg", (v.detach().double() for v in as_sequences(x, g)), strict=True))
        count, length = values["x"].shape[:2]
        if not count * length:
            return
        flat = {u: v.flatten(0, 1) for u, v in values.items()}
        means = {u: v.mean(1) for u, v in values.items()}
        grams = {u: v @ v.mT / length for u, v in values.items()}
        rows = {u: gram.sum(-1) for u, gram in grams.items()}  # <token, mean of its sequence>, (sequences, tokens)
        norms = {u: row.mean(1) for u, row in rows.items()}  # |p|^2
        self.tokens = self.tokens + count * length
        self.sequences = self.sequences + count
        for u in "xg":
            self._grow(f"sum_{u}", flat[u].sum(0))
            self._grow(f"means_{u}", means[u].sum(0))
            self._grow(f"norm_{u}", norms[u].sum())
        for u, v in PAIRS:
            product = flat[u].T @ flat[v]
            self._grow(u + v, product)
            if length > 1:
                self._grow(f"within_{u}{v}", product / length - product)
                self._grow(f"between_{u}{v}", means[u].T @ means[v] - product)
            crossed = (rows[u] * rows[v]).sum() / length
            alone = [(grams[u] * grams[v]).sum(), crossed, norms[u] @ norms[v]]
            self._grow(f"alone_{u}{v}", torch.stack(alone))
        for u, v in ORDERED:
            self._grow(f"weighted_{u}{v}", rows[u].flatten() @ flat[v] / length)
            self._grow(f"scaled_{u}{v}", norms[u] @ means[v])

    @override
    def compute(self) -> Tensor:
        """Return rho of all tokens, in [0, 1]; NaN without tokens, or if x or g is constant."""
        N = self.tokens
        if not N:
            return N.new_tensor(float("nan"))
        covariances = {
            u + v: getattr(self, u + v) / N - torch.outer(getattr(self, f"sum_{u}"), getattr(self, f"sum_{v}")) / N**2
            for u, v in PAIRS
        }
        own = [covariances[pair].norm() for pair in ("xx", "gg")]
        for norm, pair in zip(own, ("xx", "gg"), strict=True):
            if not norm > 1e-13 * getattr(self, pair).norm() / N:  # nothing but rounding
                return norm.new_tensor(float("nan"))
        return (covariances["xg"].norm() / (own[0] * own[1]).sqrt()).clamp(max=1)

    @property
    def debiased(self) -> Tensor:
        """Signed root of the debiased rho^2; NaN for fewer than four sequences or where rho is undefined."""
        if self.sequences < MIN_TOKENS or torch.isnan(self.compute()):
            return self.tokens.new_tensor(float("nan"))
        xx, xg, gg = (self._hsic(u, v) for u, v in PAIRS)
        return signed_root(normalized(torch.stack([xx, xg, xg, gg]).view(2, 2)))

    def _grow(self, name: str, addend: Tensor) -> None:
        """Add to a state. It is a scalar zero until its shape is known."""
        setattr(self, name, getattr(self, name) + addend)

    def _hsic(self, u: str, v: str) -> Tensor:
        """Return HSIC_1 of Song et al. 2012, Eq. 5, of sequences, with sums over pairs of sequences as moments.

        It is :func:`~fasc_lightning.dependence._hsic.hsic_between`, where each term is written out there.
        """
        b = self.sequences
        inner = getattr(self, u + v) + getattr(self, f"within_{u}{v}")  # sum of S
        outer = getattr(self, u + v) + getattr(self, f"between_{u}{v}")  # sum of p q^T
        p, q = getattr(self, f"means_{u}"), getattr(self, f"means_{v}")
        squares, crossed, norms = getattr(self, f"alone_{u}{v}")
        two = inner.square().sum() - squares
        three = p @ inner @ q - getattr(self, f"weighted_{u}{v}") @ q - getattr(self, f"weighted_{v}{u}") @ p
        three = three - (inner * outer).sum() + 2 * crossed
        totals = [total.square().sum() - getattr(self, f"norm_{w}") for w, total in ((u, p), (v, q))]
        margins = p @ outer @ q - getattr(self, f"scaled_{u}{v}") @ q - getattr(self, f"scaled_{v}{u}") @ p + norms
        four = totals[0] * totals[1] - 4 * margins + 2 * (outer.square().sum() - norms)
        return (two - 2 * three / (b - 2) + four / ((b - 2) * (b - 3))) / (b * (b - 1))
