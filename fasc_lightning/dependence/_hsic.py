"""The Hilbert-Schmidt independence criterion (HSIC) of token samples, from their s x s Gram matrices.

With the linear kernel, K = X X^T and L = G G^T, HSIC(x, g) is |Sigma_xg|_F^2. Ratios of it give rho^2, and no d x d
matrix is formed. Gram matrices are stacked: (v, s, s) for v variables on the same s tokens. Results are (v, v), for
all pairs of variables.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import cycle, islice, permutations

import torch
from torch import Tensor

#: The unbiased estimator divides by s (s - 3).
MIN_TOKENS = 4

#: A variable whose variance is below this share of its second moment is constant within float32's precision.
CONSTANT = 1e-12


def centered_gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centred Gram matrix of a sample in units of its variance, and that variance.

    Gradients are tiny and enter HSIC to the fourth power. In units of their own variance they neither underflow nor
    overflow in float32. A constant variable has a zero matrix and zero variance.

    Args:
        x: Sample, shape (s, n), any floating type. The matrix is computed in float64 for float64, else in float32.

    Returns:
        K = X X^T / variance, shape (s, s), and variance = tr(Sigma_xx), a float64 scalar. Both are NaN if x holds NaN
        or Inf.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        values = x.detach().to(dtype)
        # In units of the largest number, squares cannot overflow.
        low, high = values.aminmax()
        unit = torch.maximum(-low, high).double()
        inverse = torch.where(unit > 0, 1 / unit, unit)
        mean = values.mean(0)
        values = (values - mean).mul_(inverse.to(dtype))
        K = values @ values.T
        variance = K.diagonal().double().mean()
        second = variance + mean.double().mul(inverse).square().sum()
        varies = (variance > CONSTANT * second) | ~torch.isfinite(unit)
        scale = torch.where(varies, 1 / variance, 0.0)
        K.mul_(scale.to(dtype))
    return K, torch.where(varies, variance * unit.square(), 0.0)


def hsic_biased(grams: Tensor) -> Tensor:
    """Return the biased HSIC, <K_i, K_j> / s^2 = |Sigma_ij|_F^2, for all pairs of variables (Gretton et al. 2005).

    Args:
        grams: Centred Gram matrices K_i = X_i X_i^T of v variables on the same s tokens, shape (v, s, s).

    Returns:
        Shape (v, v), float64.
    """
    flat = grams.flatten(1)
    return (flat @ flat.T).double() / grams.shape[-1] ** 2


def hsic_unbiased(grams: Tensor) -> Tensor:
    """Return the unbiased HSIC_1 (Song et al. 2012, Eq. 5) for all pairs of variables; it may be negative.

    Args:
        grams: Gram matrices of v variables on the same s tokens, shape (v, s, s), centred or not.

    Returns:
        Shape (v, v), float64.

    Raises:
        ValueError: If there are fewer than four tokens.
    """
    s = grams.shape[-1]
    if s < MIN_TOKENS:
        raise ValueError(f"Expected at least {MIN_TOKENS} tokens for the unbiased HSIC but got {s}.")
    hollow = grams.clone()
    hollow.diagonal(dim1=-2, dim2=-1).zero_()  # a token with itself
    rows = hollow.sum(-1).double()  # (v, s)
    totals = rows.sum(-1)  # (v,)
    flat = hollow.flatten(1)
    pairs = (flat @ flat.T).double()
    return (pairs + torch.outer(totals, totals) / ((s - 1) * (s - 2)) - 2 / (s - 2) * (rows @ rows.T)) / (s * (s - 3))


def hsic_between(grams: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Return the unbiased HSIC from pairs of tokens in different blocks only, and the same without each block in turn.

    This is the U-statistic of Song et al. 2012 with blocks (whole sequences) in place of tokens. It is unbiased if
    blocks are independent, however much the tokens of one block depend on each other. S_a is the sum of x g^T over a
    block of l tokens, p_a the sum of x and q_a the sum of g. The statistic is the mean over distinct blocks of

        <S_a, S_b> / l^2 - 2 <S_a, p_b q_c^T> / l^3 + <p_a q_b^T, p_c q_d^T> / l^4.

    Each term is a sum over tiles of the Gram matrices. Blocks of one token give :func:`hsic_unbiased`.

    Args:
        grams: Gram matrices, shape (v, s, s), s a multiple of ``blocks``.
        blocks: Number of equal runs of consecutive tokens; at least 4.

    Returns:
        The estimate, shape (v, v), and the estimates that leave one block out, shape (blocks, v, v), or (0, v, v)
        where fewer than four blocks would be left; float64.

    Raises:
        ValueError: If there are fewer than four blocks.
    """
    if blocks < MIN_TOKENS:
        raise ValueError(f"Expected at least {MIN_TOKENS} blocks for the unbiased HSIC but got {blocks}.")
    v, s, _ = grams.shape
    length = s // blocks
    tiles = grams.view(v, blocks, length, blocks, length)
    flat = tiles.permute(1, 3, 0, 2, 4).reshape(blocks, blocks, v, length**2)
    rows = tiles.sum(4).double()  # (v, blocks, length, blocks): each token's sum over a block
    hollow = 1 - torch.eye(blocks, dtype=torch.float64, device=grams.device)
    distinct = hollow[:, :, None] * hollow[:, None, :] * hollow[None, :, :]
    pairs = (flat @ flat.mT).double() * hollow[:, :, None, None]  # <S_a, S_b>: (blocks, blocks, v, v)
    triples = torch.einsum("uaib,waic->uwabc", rows, rows) * distinct  # <S_a, p_b q_c^T>
    sums = rows.sum(2) * hollow  # <p_a, p_b>: (v, blocks, blocks)
    # Rows of included blocks: all blocks, then all but one.
    kept = torch.cat([torch.ones_like(hollow[:1]), hollow]) if blocks > MIN_TOKENS else torch.ones_like(hollow[:1])
    two = torch.einsum("ea,eb,abuw->euw", kept, kept, pairs)
    three = torch.einsum("ea,eb,ec,uwabc->euw", kept, kept, kept, triples)
    margins = torch.einsum("eb,uab->eua", kept, sums) * kept[:, None, :]
    totals = margins.sum(-1)
    squares = torch.einsum("ea,eb,uab,wab->euw", kept, kept, sums, sums)
    four = totals[:, :, None] * totals[:, None, :] - 4 * margins @ margins.mT + 2 * squares
    b = kept.sum(1)[:, None, None]
    estimates = (
        two / (b * (b - 1)) / length**2
        - 2 * three / (b * (b - 1) * (b - 2)) / length**3
        + four / (b * (b - 1) * (b - 2) * (b - 3)) / length**4
    )
    return estimates[0], estimates[1:]


def hsic_permuted(K: Tensor, L: Tensor, orders: Tensor) -> Tensor:
    """Return the biased HSIC of x and g, with the blocks of g permuted.

    Args:
        K: Centred Gram matrix of x, shape (s, s), s a multiple of the number of blocks b.
        L: Centred Gram matrix of g, shape (s, s).
        orders: Permutations of the b equal runs of consecutive tokens of g, shape (count, b), on the CPU.

    Returns:
        <K, P L P^T> / s^2 for each order, shape (count,), float64.
    """
    s = len(K)
    blocks = orders.shape[1]
    length = s // blocks
    first, second = torch.triu_indices(blocks, blocks, device=K.device)
    tiles_of_K = K.view(blocks, length, blocks, length)[first, :, second].flatten(1)
    tiles_of_L = L.view(blocks, length, blocks, length).transpose(1, 2).reshape(blocks**2, length**2)
    # Every tile of K meets every tile of L once; a permutation only looks products up.
    # The source of each tile on and above the diagonal, numbered row by row: (tiles, count).
    places = (orders[:, first.cpu()] * blocks + orders[:, second.cpu()]).T
    found = (tiles_of_K @ tiles_of_L.T).gather(1, places.to(K.device))
    twice = 1 + (first != second).double()  # tiles above the diagonal stand for those below
    return twice @ found.double() / s**2


@lru_cache(maxsize=16)
def random_orders(blocks: int, count: int, seed: int) -> Tensor:
    """Return random orders of blocks, shape (count, blocks).

    All orders are equally likely. A test compares them and the identity: ``count`` + 1 orders. If fewer different
    orders exist, the result cycles through all of them, beginning after the identity. Every call with the same
    arguments returns the same orders, so that neither the order of batches nor the process matters.

    Args:
        blocks: Number of blocks, at least 1.
        count: Number of orders.
        seed: Seed of the draws.
    """
    if math.factorial(blocks) <= count + 1:
        return torch.tensor(list(islice(cycle(permutations(range(blocks))), 1, count + 1)))
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(blocks, generator=generator) for _ in range(count)])


def normalized(hsic: Tensor, crossed: Tensor | None = None) -> Tensor:
    """Return HSIC(x, g) / sqrt(HSIC(x, x) HSIC(g, g)) of a (2, 2) matrix, NaN where x or g does not vary.

    Args:
        hsic: HSIC of all pairs of (x, g), shape (2, 2).
        crossed: Values that replace HSIC(x, g), any shape.
    """
    crossed = hsic[0, 1] if crossed is None else crossed
    own = hsic.diagonal()
    ratio = crossed / own.clamp(min=0).sqrt().prod()
    return torch.where((own > 0).all(), ratio, float("nan"))


def signed_root(ratio: Tensor) -> Tensor:
    """Return sign(r) sqrt(|r|)."""
    return torch.sign(ratio) * ratio.abs().sqrt()
