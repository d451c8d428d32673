"""The Hilbert-Schmidt independence criterion (HSIC) of token samples, from their s x s Gram matrices.

With the linear kernel, K = X X^T and L = G G^T, HSIC(x, g) is |Sigma_xg|_F^2. Ratios of it give rho^2, and no d x d
matrix is formed. All functions take L samples of one shape at once, so that an observation of many layers makes few
calls. Gram matrices are symmetric and come as tiles, each tile above the diagonal once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import cycle, islice, permutations

import torch
from torch import Tensor

#: The unbiased estimator divides by s (s - 3).
MIN_TOKENS = 4

#: A variable whose variance is below this share of its second moment is constant within float32's precision.
CONSTANT = 1e-12


def standardized(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return centred samples in units of their largest number, that unit squared, and the variances.

    Gradients are tiny and enter HSIC to the fourth power. In units of their own size they neither underflow nor
    overflow in float32.

    Args:
        x: Samples, shape (..., s, n), any floating type. The result is in float64 for float64, else in float32.

    Returns:
        z, shape (..., s, n), with |z| <= 1; unit^2, shape (...), float64, so that unit^2 z z^T is the centred Gram
        matrix; the variance tr(Sigma_xx), shape (...), float64; and |z_i|^2 of each token, shape (..., s), float64.
        unit^2 and the variance of a constant variable are zero. Both are NaN if x holds NaN or Inf.
    """
    values = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    mean = values.mean(-2, keepdim=True)
    z = values - mean
    unit = torch.maximum(-z.amin((-2, -1)), z.amax((-2, -1))).double()
    inverse = torch.where(unit > 0, 1 / unit, unit)[..., None, None]
    z.mul_(inverse.to(z.dtype))
    own = torch.linalg.vector_norm(z, dim=-1).double().square()
    variance = own.mean(-1)
    second = variance + mean.double().mul(inverse).square().sum((-2, -1))
    varies = (variance > CONSTANT * second) | ~torch.isfinite(unit)
    square = torch.where(varies, unit.square(), 0.0)
    return z, square, torch.where(varies, variance * unit.square(), 0.0), own


def tile_numbers(groups: int, device: torch.device | None = None) -> Tensor:
    """Return the numbers of the tiles on and above the diagonal, shape (2, tiles), row by row: rows, then columns."""
    return torch.triu_indices(groups, groups, device=device)


def gram_tiles(z: Tensor, groups: int) -> Tensor:
    """Return the Gram matrices z z^T as tiles, each tile above the diagonal once.

    Args:
        z: Samples, shape (L, s, n), s a multiple of ``groups``.
        groups: Number of equal runs of t consecutive tokens.

    Returns:
        Shape (L, tiles, t, t), in the order of :func:`tile_numbers`. The tile (a, b) holds the products of the tokens
        of run b, its rows, with the tokens of run a, its columns.
    """
    samples, s, _ = z.shape
    t = s // groups
    tiles = z.new_empty(samples, groups * (groups + 1) // 2, t, t)
    at = 0
    for a in range(groups):  # one product for each column of tiles: it begins at the diagonal
        column = tiles[:, at : at + groups - a].flatten(1, 2)
        torch.bmm(z[:, a * t :], z[:, a * t : (a + 1) * t].mT, out=column)
        at += groups - a
    return tiles


def block_products(K: Tensor, L: Tensor, blocks: int) -> Tensor:
    """Return <K_ab, L_ab> for all pairs of blocks (a, b).

    Args:
        K: Tiles of Gram matrices, shape (L, tiles, t, t).
        L: Tiles of other Gram matrices, the same shape.
        blocks: Number of equal runs of consecutive tokens, a multiple of the number of groups.

    Returns:
        Shape (L, blocks, blocks), symmetric, float64.
    """
    samples, tiles, t, _ = K.shape
    groups = (math.isqrt(8 * tiles + 1) - 1) // 2
    inner = blocks // groups  # blocks of a group
    found = (K * L).view(samples, tiles, inner, t // inner, inner, t // inner).sum(3).sum(-1).double()
    first, second = tile_numbers(groups, K.device)
    every = found.new_empty(samples, groups, groups, inner, inner)
    every[:, first, second] = found.mT
    every[:, second, first] = found
    return every.transpose(2, 3).reshape(samples, blocks, blocks)


def tile_products(K: Tensor, L: Tensor) -> Tensor:
    """Return the products of every tile of K with every tile of L, for :func:`hsic_permuted`.

    Args:
        K: Tiles of Gram matrices, shape (L, tiles, t, t).
        L: Tiles of other Gram matrices, the same shape.

    Returns:
        Shape (L, tiles, groups^2): with the tiles of L in the order of :func:`tile_numbers`, then with those below the
        diagonal in the order of the tiles above it.
    """
    samples, tiles, t, _ = K.shape
    groups = (math.isqrt(8 * tiles + 1) - 1) // 2
    every = L.new_empty(samples, groups**2, t, t)
    every[:, :tiles] = L
    at, below = 0, tiles
    for size in range(groups, 0, -1):  # each column of tiles but its first, which lies on the diagonal
        every[:, below : below + size - 1] = L[:, at + 1 : at + size].mT
        at, below = at + size, below + size - 1
    return K.flatten(2) @ every.flatten(2).mT


def hsic_permuted(products: Tensor, orders: Tensor) -> Tensor:
    """Return s^2 times the biased HSIC of x and g, with the groups of g permuted.

    Every tile of K has met every tile of L once, so a permutation only looks products up.

    Args:
        products: Result of :func:`tile_products` for the Gram matrices of x and g, shape (L, tiles, groups^2).
        orders: Permutations of the groups of g, shape (count, groups), on the CPU.

    Returns:
        <K, P L P^T> for each order, shape (L, count), float64.
    """
    groups = orders.shape[1]
    first, second = tile_numbers(groups)
    above = first != second
    number = torch.empty(groups, groups, dtype=torch.long)
    number[second[above], first[above]] = len(first) + torch.arange(int(above.sum()))
    number[first, second] = torch.arange(len(first))
    places = number[orders[:, first], orders[:, second]].T.to(products.device)  # (tiles, count)
    found = products.gather(2, places.expand(len(products), -1, -1))
    twice = (1 + above.double()).to(products.device)  # tiles above the diagonal stand for those below
    return (twice[:, None] * found).sum(1)


def hsic_unbiased(pairs: Tensor, own: Tensor, rows: Tensor) -> Tensor:
    """Return the unbiased HSIC_1 (Song et al. 2012, Eq. 5) of two variables on the same s tokens; may be negative.

    Args:
        pairs: <K, L> of the whole Gram matrices, shape (...).
        own: Diagonals of K and L, shape (2, ..., s).
        rows: Sums of the rows of K and L, shape (2, ..., s).

    Returns:
        Shape (...), float64.

    Raises:
        ValueError: If there are fewer than four tokens.
    """
    s = own.shape[-1]
    if s < MIN_TOKENS:
        raise ValueError(f"Expected at least {MIN_TOKENS} tokens for the unbiased HSIC but got {s}.")
    hollow = rows - own  # without the pairs of a token with itself
    totals = hollow.sum(-1)
    pairs = pairs - own.prod(0).sum(-1)
    crossed = hollow.prod(0).sum(-1)
    return (pairs + totals.prod(0) / ((s - 1) * (s - 2)) - 2 / (s - 2) * crossed) / (s * (s - 3))


def hsic_between(products: Tensor, rows: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Return the unbiased HSIC from pairs of tokens in different blocks only, and the same without each block in turn.

    This is the U-statistic of Song et al. 2012 with blocks (whole sequences) in place of tokens. It is unbiased if
    blocks are independent, however much the tokens of one block depend on each other. S_a is the sum of x g^T over a
    block of l tokens, p_a the sum of x and q_a the sum of g. The statistic is the mean over distinct blocks of

        <S_a, S_b> / l^2 - 2 <S_a, p_b q_c^T> / l^3 + <p_a q_b^T, p_c q_d^T> / l^4.

    Each term is a sum over tiles of the Gram matrices. Blocks of one token give :func:`hsic_unbiased`.

    Args:
        products: <K_ab, L_ab> of all pairs of blocks, for each pair (K, L) of variables, shape
            (pairs, ..., blocks, blocks).
        rows: For each variable, the sum of each token's row over each block, shape (v, ..., blocks * l, blocks).
        pairs: Pairs of variables, by their place in ``rows``.

    Returns:
        The estimate, then the estimates that leave one block out, shape (pairs, ..., 1 + blocks); or the estimate
        alone, shape (pairs, ..., 1), where fewer than four blocks would be left; float64.

    Raises:
        ValueError: If there are fewer than four blocks.
    """
    blocks = products.shape[-1]
    if blocks < MIN_TOKENS:
        raise ValueError(f"Expected at least {MIN_TOKENS} blocks for the unbiased HSIC but got {blocks}.")
    hollow = 1 - torch.eye(blocks, dtype=torch.float64, device=products.device)
    rows = rows.double().unflatten(-2, (blocks, -1)) * hollow[:, None]  # (v, ..., a, l, b)
    length = rows.shape[-2]
    # A column for all blocks, then one for all but each: (blocks, 1 + blocks).
    kept = torch.ones_like(hollow[:, :1])
    if blocks > MIN_TOKENS:
        kept = torch.cat([kept, hollow], 1)
    two = _both(products.double() * hollow, kept)
    sums = rows @ kept  # each token's sum over the other kept blocks: (v, ..., a, l, 1 + blocks)

    def crossed(values: Tensor) -> Tensor:
        return torch.stack([values[i] * values[j] for i, j in pairs])

    # <S_a, p_b q_c^T> over distinct b and c: over all of them, less b = c.
    summed, same = (torch.stack([(v[i] * v[j]).sum(-2) for i, j in pairs]) for v in (sums, rows))
    three = ((summed - same @ kept) * kept).sum(-2)
    margins = sums.sum(-2) * kept
    means = rows.sum(-2)  # <p_a, p_b>
    four = crossed(margins.sum(-2)) - 4 * crossed(margins).sum(-2) + 2 * _both(crossed(means), kept)
    b = kept.sum(0)
    return (
        two / (b * (b - 1)) / length**2
        - 2 * three / (b * (b - 1) * (b - 2)) / length**3
        + four / (b * (b - 1) * (b - 2) * (b - 3)) / length**4
    )


def _both(values: Tensor, kept: Tensor) -> Tensor:
    """Return the sum of (..., blocks, blocks) values over pairs of kept blocks, one for each column of ``kept``."""
    return ((values @ kept) * kept).sum(-2)


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
    """Return HSIC(x, g) / sqrt(HSIC(x, x) HSIC(g, g)), NaN where x or g does not vary.

    Args:
        hsic: HSIC of all pairs of (x, g), shape (..., 2, 2).
        crossed: Values that replace HSIC(x, g), shape (...).
    """
    crossed = hsic[..., 0, 1] if crossed is None else crossed
    own = hsic.diagonal(dim1=-2, dim2=-1)
    ratio = crossed / own.clamp(min=0).sqrt().prod(-1)
    return torch.where((own > 0).all(-1), ratio, float("nan"))


def signed_root(ratio: Tensor) -> Tensor:
    """Return sign(r) sqrt(|r|)."""
    return torch.sign(ratio) * ratio.abs().sqrt()
