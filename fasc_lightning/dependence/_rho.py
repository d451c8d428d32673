"""rho, the dependence violation score: the coupling of a layer's activations and gradients, by its definition.

x is the input of a layer and g the gradient of the loss, both centred (Shihab et al., FASC, Eq. 2):

    rho = |Sigma_xg|_F / sqrt(|Sigma_xx|_F |Sigma_gg|_F)

rho^2 is the RV coefficient of x and g (Robert and Escoufier 1976), which is linear CKA (Kornblith et al. 2019).
The paper's g is the *input gradient* g = W^T h: the gradient at x through this layer. h is the *output gradient* dL/dy.
rho of x and h is another number, and neither bounds the other.

There are two estimators. The *pooled* one (this file, and :class:`~fasc_lightning.dependence.PooledDependenceScore` for
a stream of tokens) uses the moments of all tokens, as Eq. 2 does. The *minibatch* one
(:class:`~fasc_lightning.dependence.DependenceScore`) averages HSIC over token samples, from s x s Gram matrices
(Nguyen et al. 2021): its work is s^2 n, and it keeps a few numbers whatever the width. Both are biased upwards, each
in its own way; their debiased forms agree. Both take tokens, shape (tokens, n), and whole sequences of tokens, shape
(sequences, tokens, n).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasc_lightning.dependence._pooled import PooledDependenceScore
from fasc_lightning.dependence._tokens import as_sequences
from fasc_lightning.statistics import LayerMoments


def rho(x: Tensor, g: Tensor) -> Tensor:
    """Return rho of a token sample by its definition (Eq. 2), centred by the sample's means. It is biased upwards.

    Args:
        x: Activations, shape (tokens, n) or (sequences, tokens, n).
        g: Gradients at the same tokens: W^T h, shape (..., n), in the paper's definition; or h, shape (..., m).

    Returns:
        A float64 scalar in [0, 1]; NaN if x or g is constant.

    Raises:
        ValueError: If the shapes do not match.
    """
    x, g = (values.flatten(0, 1) for values in _centered(x, g))
    if x.shape[0] <= min(x.shape[1], g.shape[1]):
        K, L = x @ x.T, g @ g.T
        crossed, own = (K * L).sum(), (K.norm() * L.norm())
    else:
        crossed, own = (x.T @ g).square().sum(), (x.T @ x).norm() * (g.T @ g).norm()
    return (crossed / own).sqrt().clamp(max=1)


def debiased_rho(x: Tensor, g: Tensor) -> Tensor:
    """Return the signed root of the debiased rho^2 of one token sample (Song et al. 2012): about 0 under independence.

    Tokens of one text depend on one another. Give them as whole sequences: pairs of tokens of one sequence are then
    left out. Tokens of shape (tokens, n) count as independent.

    Args:
        x: Activations, shape (tokens, n) or (sequences, tokens, n).
        g: Gradients at the same tokens, shape (..., n) or (..., m).

    Returns:
        A float64 scalar, which may be negative; NaN if x or g is constant, or for fewer than four sequences (or
        independent tokens).

    Raises:
        ValueError: If the shapes do not match.
    """
    score = PooledDependenceScore()
    score.update(*_centered(x, g))
    return score.debiased


def iid_floor(x: Tensor, g: Tensor) -> Tensor:
    r"""Return about the value that rho has for independent x, g and tokens.

    It is (r_x r_g)^(1/4) / sqrt(N) with the effective ranks r = tr(Sigma)^2 / |Sigma|_F^2: the root of the mean of
    rho^2 over permutations of the tokens, up to a factor of N / (N - 1). Tokens of a text depend on one another, so
    their floor is higher; see :attr:`~fasc_lightning.dependence.DependenceScore.null`.

    Args:
        x: Activations, shape (tokens, n) or (sequences, tokens, n).
        g: Gradients at the same tokens, shape (..., n) or (..., m).

    Raises:
        ValueError: If the shapes do not match.
    """
    x, g = (values.flatten(0, 1) for values in _centered(x, g))
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


def _centered(x: Tensor, g: Tensor) -> list[Tensor]:
    """Return samples as sequences in float64 less the means of all tokens; a constant sample becomes exact zeros.

    Raises:
        ValueError: If the shapes do not match.
    """
    centered = []
    for values in as_sequences(x, g):
        values = values.detach().double()
        deviations = values - values.mean((0, 1))
        constant = deviations.norm() <= 1e-13 * values.norm()  # rounding of the mean
        centered.append(torch.zeros_like(deviations) if constant else deviations)
    return centered
