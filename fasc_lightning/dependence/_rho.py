"""rho, the dependence violation score: the coupling of a layer's activations and gradients, by its definition.

x is the input of a layer and g the gradient of the loss, both centred (Shihab et al., FASC, Eq. 2):

    rho = |Sigma_xg|_F / sqrt(|Sigma_xx|_F |Sigma_gg|_F)

rho^2 is the RV coefficient of x and g (Robert and Escoufier 1976), which is linear CKA (Kornblith et al. 2019).
The paper's g is the *input gradient* g = W^T h: the gradient at x through this layer. h is the *output gradient* dL/dy.
rho of x and h is another number, and neither bounds the other.

There are two estimators. The *pooled* one (this file) uses the moments of all tokens, as Eq. 2 does. The *minibatch*
one (:class:`~fasc_lightning.dependence.DependenceScore`) averages HSIC over token samples, from s x s Gram matrices
(Nguyen et al. 2021): its work is s^2 n, and it keeps a few numbers whatever the width. Both are biased upwards, each
in its own way; their debiased forms agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fasc_lightning.dependence._hsic import MIN_TOKENS, normalized, signed_root
from fasc_lightning.statistics import LayerMoments


def rho(x: Tensor, g: Tensor) -> Tensor:
    """Return rho of a token sample by its definition (Eq. 2), centred by the sample's means. It is biased upwards.

    Args:
        x: Activations, shape (tokens, n).
        g: Gradients at the same tokens: W^T h, shape (tokens, n), in the paper's definition; or h, shape (tokens, m).

    Returns:
        A float64 scalar in [0, 1]; NaN if x or g is constant.

    Raises:
        ValueError: If x and g do not hold the same number of tokens.
    """
    x, g = _centered(*_checked_pair(x, g))
    if x.shape[0] <= min(x.shape[1], g.shape[1]):
        K, L = x @ x.T, g @ g.T
        crossed, own = (K * L).sum(), (K.norm() * L.norm())
    else:
        crossed, own = (x.T @ g).square().sum(), (x.T @ x).norm() * (g.T @ g).norm()
    return (crossed / own).sqrt().clamp(max=1)


def debiased_rho(x: Tensor, g: Tensor) -> Tensor:
    """Return the signed root of the debiased rho^2 of one token sample (Song et al. 2012): about 0 under independence.

    Args:
        x: Activations, shape (tokens, n).
        g: Gradients at the same tokens, shape (tokens, n) or (tokens, m).

    Returns:
        A float64 scalar, which may be negative; NaN if x or g is constant, or for fewer than four tokens.

    Raises:
        ValueError: If x and g do not hold the same number of tokens.
    """
    score = PooledDependenceScore()
    score.update(*_centered(*_checked_pair(x, g)))
    return score.debiased


def iid_floor(x: Tensor, g: Tensor) -> Tensor:
    r"""Return about the value that rho has for independent x, g and tokens.

    It is (r_x r_g)^(1/4) / sqrt(N) with the effective ranks r = tr(Sigma)^2 / |Sigma|_F^2: the root of the mean of
    rho^2 over permutations of the tokens, up to a factor of N / (N - 1). Tokens of a text depend on one another, so
    their floor is higher; see :attr:`~fasc_lightning.dependence.DependenceScore.null`.

    Args:
        x: Activations, shape (tokens, n).
        g: Gradients, shape (tokens, n) or (tokens, m).

    Raises:
        ValueError: If x and g do not hold the same number of tokens.
    """
    x, g = _centered(*_checked_pair(x, g))
    tokens = x.shape[0]
    ranks = 1.0
    for values in (x, g):
        small = values @ values.T if tokens < values.shape[1] else values.T @ values
        ranks = ranks * (small.trace() / small.norm()) ** 2
    return torch.as_tensor(ranks).sqrt().sqrt() / tokens**0.5


def pooled_rho(moments: LayerMoments, W: Tensor) -> Tensor:
    """Return rho of a layer from its moments over all tokens, by the paper's Eq. 2 with g = W^T h.

    Args:
        moments: Moments with the cross moment C, not centred. Sketched moments become matrices.
        W: The layer's weight, shape (m, n).

    Returns:
        A float64 scalar in [0, 1]; NaN if x or g is constant within the moments' precision.

    Raises:
        ValueError: If C was not gathered.
    """
    C = moments.require("C").double()
    W = W.double()
    mean_x, mean_h = moments.mean_x.double(), moments.mean_h.double()
    sigma_xx = moments.A.double() - torch.outer(mean_x, mean_x)
    sigma_hh = moments.G.double() - torch.outer(mean_h, mean_h)
    sigma_xg = (C - torch.outer(mean_x, mean_h)) @ W
    norm = torch.linalg.matrix_norm
    rounding = 10 * torch.finfo(moments.A.dtype).eps
    if norm(sigma_xx) <= rounding * norm(moments.A.double()) or norm(sigma_hh) <= rounding * norm(moments.G.double()):
        return W.new_tensor(float("nan"))
    ratio = norm(sigma_xg) / (norm(sigma_xx) * norm(W.T @ sigma_hh @ W)).sqrt()
    return ratio.clamp(max=1)


class PooledDependenceScore(Metric):
    """rho from the moments of all tokens together, by the paper's Eq. 2: exact and mergeable, in d x d numbers.

    The means of all tokens centre them. :attr:`debiased` is the unbiased HSIC of all tokens. It streams, too: Song's
    sums over pairs of tokens are sums of moments. These moments are of fourth order: an offset of more than a few
    hundred standard deviations costs their last digits, even in float64.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    tokens: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"compute_with_cache": False, **settings})
        for name in ("tokens", "sum_x", "sum_g", "xx", "xg", "gg"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        # Sums over tokens of |u|^2 |v|^2 and of |u|^2 v, for u and v in (x, g): the pairs of a token with itself.
        for pair in ("xx", "xg", "gg"):
            self.add_state(f"squares_{pair}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for pair in ("xx", "xg", "gx", "gg"):
            self.add_state(f"weighted_{pair}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, g: Tensor) -> None:
        """Add tokens.

        Args:
            x: Activations, shape (tokens, n).
            g: Gradients, shape (tokens, n) or (tokens, m).

        Raises:
            ValueError: If x and g do not hold the same number of tokens.
        """
        values = dict(zip("xg", (v.detach().double() for v in _checked_pair(x, g)), strict=True))
        squares = {u: v.square().sum(1) for u, v in values.items()}
        self.tokens = self.tokens + len(x)
        for u in "xg":
            self._grow(f"sum_{u}", values[u].sum(0))
        for u, v in ("xx", "xg", "gg"):
            self._grow(u + v, values[u].T @ values[v])
            self._grow(f"squares_{u}{v}", squares[u] @ squares[v])
        for u, v in ("xx", "xg", "gx", "gg"):
            self._grow(f"weighted_{u}{v}", squares[u] @ values[v])

    def compute(self) -> Tensor:
        """Return rho of all tokens, in [0, 1]; NaN if x or g is constant."""
        N = self.tokens.clamp(min=1)
        covariances = {
            u + v: getattr(self, u + v) / N - torch.outer(getattr(self, f"sum_{u}"), getattr(self, f"sum_{v}")) / N**2
            for u, v in ("xx", "xg", "gg")
        }
        own = [covariances[pair].norm() for pair in ("xx", "gg")]
        for norm, pair in zip(own, ("xx", "gg"), strict=True):
            if not norm > 1e-13 * getattr(self, pair).norm() / N:  # nothing but rounding
                return norm.new_tensor(float("nan"))
        return (covariances["xg"].norm() / (own[0] * own[1]).sqrt()).clamp(max=1)

    @property
    def debiased(self) -> Tensor:
        """Signed root of the debiased rho^2 of all tokens; NaN for fewer than four tokens or where rho is undefined."""
        if self.tokens < MIN_TOKENS or torch.isnan(self.compute()):
            return self.tokens.new_tensor(float("nan"))
        hsic = {pair: self._hsic(*pair) for pair in ("xx", "xg", "gg")}
        return signed_root(normalized(torch.stack([hsic["xx"], hsic["xg"], hsic["xg"], hsic["gg"]]).view(2, 2)))

    def _grow(self, name: str, addend: Tensor) -> None:
        """Add to a state. It is a scalar zero until its shape is known."""
        setattr(self, name, getattr(self, name) + addend)

    def _hsic(self, u: str, v: str) -> Tensor:
        """Return HSIC_1 of Song et al. 2012, Eq. 5, with sums over pairs of tokens written as moments."""
        N, moment = self.tokens, getattr(self, u + v)
        sum_u, sum_v = getattr(self, f"sum_{u}"), getattr(self, f"sum_{v}")
        squares = getattr(self, f"squares_{u}{v}")
        pairs = moment.square().sum() - squares
        total_u, total_v = (
            total.square().sum() - getattr(self, w + w).trace() for w, total in ((u, sum_u), (v, sum_v))
        )
        crossed = sum_u @ moment @ sum_v - getattr(self, f"weighted_{u}{v}") @ sum_v
        crossed = crossed - getattr(self, f"weighted_{v}{u}") @ sum_u + squares
        return (pairs + total_u * total_v / ((N - 1) * (N - 2)) - 2 / (N - 2) * crossed) / (N * (N - 3))


def _checked_pair(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or g.ndim != 2 or x.shape[0] != g.shape[0]:
        raise ValueError(
            "Expected x and g of shape (tokens, features) with as many tokens but got "
            f"{tuple(x.shape)} and {tuple(g.shape)}."
        )
    return x, g


def _centered(*samples: Tensor) -> list[Tensor]:
    """Return samples in float64 less their means; a constant sample becomes exact zeros."""
    centered = []
    for values in samples:
        values = values.detach().double()
        deviations = values - values.mean(0)
        constant = deviations.norm() <= 1e-13 * values.norm()  # rounding of the mean
        centered.append(torch.zeros_like(deviations) if constant else deviations)
    return centered
