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

from fasc_lightning.moments import OWN_SYNC, LayerMoments

#: The unbiased estimator divides by s (s - 3).
MIN_TOKENS = 4


def hsic_biased(grams: Tensor) -> Tensor:
    """Return <H K_i H, H K_j H> / s^2 for all pairs of variables: |Sigma_ij|_F^2 of the sample (Gretton et al. 2005).

    Args:
        grams: Gram matrices K_i = X_i X_i^T of v variables on the same s tokens, shape (v, s, s), not centred.

    Returns:
        Shape (v, v).
    """
    s = grams.shape[-1]
    rows = grams.mean(-1)  # (v, s)
    centered = grams - rows[:, :, None] - rows[:, None, :] + rows.mean(-1)[:, None, None]
    flat = centered.flatten(1)
    return flat @ flat.T / s**2


def hsic_unbiased(grams: Tensor) -> Tensor:
    """Return the unbiased HSIC_1 of Song et al. 2012, Eq. 5, for all pairs of variables; it may be negative.

    Args:
        grams: As for :func:`hsic_biased`.

    Returns:
        Shape (v, v).

    Raises:
        ValueError: If there are fewer than four tokens.
    """
    s = grams.shape[-1]
    if s < MIN_TOKENS:
        raise ValueError(f"Expected at least {MIN_TOKENS} tokens for the unbiased HSIC but got {s}.")
    hollow = grams.clone()
    hollow.diagonal(dim1=-2, dim2=-1).zero_()
    rows = hollow.sum(-1)  # (v, s)
    totals = rows.sum(-1)  # (v,)
    flat = hollow.flatten(1)
    cross = flat @ flat.T + torch.outer(totals, totals) / ((s - 1) * (s - 2)) - 2 / (s - 2) * (rows @ rows.T)
    return cross / (s * (s - 3))


def pooled_rho(moments: LayerMoments, W: Tensor) -> Tensor:
    """Return rho of a layer from its moments over all tokens: the paper's Eq. 2 as it stands, a scalar.

    Args:
        moments: With the cross moment C; centred here with the means.
        W: The layer's weight, shape (m, n).

    Raises:
        ValueError: If C was not gathered.
    """
    if moments.C is None:
        raise ValueError("Expected moments with C = E[x h^T] but it was not gathered: CalibrationMoments(cross=True).")
    W = W.double()
    mean_x, mean_h = moments.mean_x.double(), moments.mean_h.double()
    sigma_xx = moments.A.double() - torch.outer(mean_x, mean_x)
    sigma_gg = W.T @ (moments.G.double() - torch.outer(mean_h, mean_h)) @ W
    sigma_xg = (moments.C.double() - torch.outer(mean_x, mean_h)) @ W
    norm = torch.linalg.matrix_norm
    return norm(sigma_xg) / (norm(sigma_xx) * norm(sigma_gg)).sqrt()


class DependenceScore(Metric):
    """Streaming minibatch estimate of rho for one layer.

    Each update contributes the HSIC of one token sample; their means are divided at the end (Nguyen et al. 2021).
    Centring is within each sample. All values are NaN where the score is undefined: too few tokens, or a constant x
    or g.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    # Sums of HSIC between all pairs of two variables, shape (2, 2).
    biased: Tensor  # x, g
    unbiased: Tensor  # x, g
    shuffled: Tensor  # g, x of the sample before: biased
    samples: Tensor

    def __init__(self) -> None:
        super().__init__(**OWN_SYNC)
        for name in ("biased", "unbiased", "shuffled"):
            self.add_state(name, torch.zeros(2, 2, dtype=torch.float64), dist_reduce_fx="sum")
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
            # Gradients are tiny and enter to the fourth power; small samples are cheap in float64.
            x, g = x.detach().double(), g.detach().double()
            grams = [x @ x.T, g @ g.T]
        previous = self._previous
        paired = previous is not None and previous.shape == grams[0].shape
        if previous is not None and paired:
            grams.append(previous)
        stacked = torch.stack(grams)
        biased = hsic_biased(stacked)
        self.biased += biased[:2, :2]
        self.unbiased += hsic_unbiased(stacked[:2])
        if paired:
            self.shuffled += biased[1:, 1:]
        self.samples += 1
        self._previous = grams[0]

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
    names = ("biased", "unbiased", "shuffled", "samples")
    packed = torch.stack([torch.cat([getattr(score, name).flatten() for name in names]) for score in scores])
    dist.all_reduce(packed, group=group)
    for score, row in zip(scores, packed, strict=True):
        start = 0
        for name in names:
            state: Tensor = getattr(score, name)
            setattr(score, name, row[start : start + state.numel()].view(state.shape).clone())
            start += state.numel()
        score._update_count = max(score._update_count, int(score.samples > 0))


def _normalize(hsic: Tensor) -> Tensor:
    """Return HSIC(x, g) / sqrt(HSIC(x, x) HSIC(g, g)) of a (2, 2) matrix, NaN where x or g does not vary."""
    own = hsic.diagonal()
    if bool((own <= 0).any()):
        return hsic.new_tensor(float("nan"))
    return hsic[0, 1] / own.sqrt().prod()
