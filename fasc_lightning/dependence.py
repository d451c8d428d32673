"""rho, the dependence violation score: how strongly a layer's activations and gradients are coupled.

With x the input of a layer and g = W^T h the gradient there, both centred (Shihab et al., FASC, Eq. 2),

    rho = |Sigma_xg|_F / sqrt(|Sigma_xx|_F |Sigma_gg|_F),

so rho^2 is the RV coefficient of x and g, that is linear CKA (Kornblith et al. 2019). It is estimated here from the
s x s Gram matrices of token samples, K = X X^T and L = G G^T: s^2 n work and a few scalars a layer to keep.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

#: The unbiased estimator divides by s (s - 3).
MIN_TOKENS = 4


def center_gram(K: Tensor) -> Tensor:
    """Return H K H with H = I - 11^T/s, the Gram matrix of the centred rows; K has shape (s, s)."""
    rows = K.mean(0, keepdim=True)
    return K - rows - rows.T + K.mean()


def hsic_biased(K: Tensor, L: Tensor) -> Tensor:
    """Return <H K H, H L H> / s^2 = |Sigma_xg|_F^2 of the sample (Gretton et al. 2005), a scalar."""
    return (center_gram(K) * center_gram(L)).sum() / K.shape[0] ** 2


def hsic_unbiased(K: Tensor, L: Tensor) -> Tensor:
    """Return the unbiased HSIC_1 of Song et al. 2012, Eq. 5; it may be negative.

    Args:
        K: Gram matrix of the first variable, shape (s, s), not centred.
        L: Gram matrix of the second variable, shape (s, s), not centred.

    Raises:
        ValueError: If there are fewer than four tokens.
    """
    s = K.shape[0]
    if s < MIN_TOKENS:
        raise ValueError(f"Expected at least {MIN_TOKENS} tokens for the unbiased HSIC but got {s}.")
    K = K - torch.diag(K.diagonal())
    L = L - torch.diag(L.diagonal())
    k, l_ = K.sum(0), L.sum(0)
    cross = (K * L).sum() + k.sum() * l_.sum() / ((s - 1) * (s - 2)) - 2 / (s - 2) * (k @ l_)
    return cross / (s * (s - 3))


class DependenceScore(Metric):
    """Streaming minibatch estimate of rho for one layer.

    Each update contributes the HSIC of one token sample; their means are divided at the end (Nguyen et al. 2021).
    Centring is within each sample. All values are NaN where the score is undefined: too few tokens, or a constant x
    or g.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    biased: Tensor  # (3,) sums of biased HSIC: xg, xx, gg
    unbiased: Tensor  # (3,) sums of unbiased HSIC
    shuffled: Tensor  # (3,) biased HSIC with x of the batch before: xg, xx, gg
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("biased", "unbiased", "shuffled"):
            self.add_state(name, torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self._previous: Tensor | None = None

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._previous = None

    def update(self, x: Tensor, g: Tensor) -> None:
        """Add one sample of tokens; fewer than four are passed over.

        Args:
            x: Activations, shape (s, n).
            g: Gradients at the same place and tokens, shape (s, n) (or (s, m): any second variable will do).

        Raises:
            ValueError: If x and g do not hold the same number of tokens.
        """
        if x.ndim != 2 or g.ndim != 2 or x.shape[0] != g.shape[0]:
            raise ValueError(f"Expected (s, n) matrices of as many tokens but got {x.shape=} and {g.shape=}.")
        if x.shape[0] < MIN_TOKENS:
            return
        with torch.autocast(x.device.type, enabled=False):
            x, g = x.detach().float(), g.detach().float()
            # Gradients are tiny and enter to the fourth power; the s x s matrices are cheap in float64.
            K = (x @ x.T).double()
            L = (g @ g.T).double()
        self.biased += torch.stack([hsic_biased(K, L), hsic_biased(K, K), hsic_biased(L, L)])
        self.unbiased += torch.stack([hsic_unbiased(K, L), hsic_unbiased(K, K), hsic_unbiased(L, L)])
        self.samples += 1
        previous = self._previous
        if previous is not None and previous.shape == L.shape:
            self.shuffled += torch.stack([hsic_biased(previous, L), hsic_biased(previous, previous), hsic_biased(L, L)])
        self._previous = K

    def compute(self) -> Tensor:
        """Return rho of the token samples, in [0, 1], biased upwards for small samples; NaN where undefined."""
        return _normalize(self.biased).clamp(min=0).sqrt()

    @property
    def null(self) -> Tensor:
        """What the samples give when x and g come from different batches, so are unrelated: the floor of rho."""
        return _normalize(self.shuffled).clamp(min=0).sqrt()

    @property
    def debiased(self) -> Tensor:
        """Signed root of the debiased rho^2: around 0 for independent x and g; may be negative."""
        ratio = _normalize(self.unbiased)
        return torch.sign(ratio) * ratio.abs().sqrt()


def all_reduce_scores_(scores: Iterable[DependenceScore], group: Any | None = None) -> None:
    """Sum the states of many scores over all processes, in one message; same scores and order everywhere."""
    scores = list(scores)
    if not scores:
        return
    packed = torch.stack([torch.cat([s.biased, s.unbiased, s.shuffled, s.samples[None]]) for s in scores])
    dist.all_reduce(packed, group=group)
    for score, row in zip(scores, packed, strict=True):
        score.biased, score.unbiased, score.shuffled = row[0:3].clone(), row[3:6].clone(), row[6:9].clone()
        score.samples = row[9].clone()


def _normalize(sums: Tensor) -> Tensor:
    """Return HSIC(x, g) / sqrt(HSIC(x, x) HSIC(g, g)), NaN where x or g does not vary."""
    xg, xx, gg = sums
    if xx <= 0 or gg <= 0:
        return xg.new_tensor(float("nan"))
    return xg / (xx.sqrt() * gg.sqrt())
