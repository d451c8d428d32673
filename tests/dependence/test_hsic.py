from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch

from fasc_lightning.dependence._hsic import (
    block_products,
    gram_tiles,
    hsic_between,
    hsic_permuted,
    hsic_unbiased,
    random_orders,
    standardized,
    tile_numbers,
    tile_products,
)


def samples(s=30, n=3, m=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(s, n, generator=generator, dtype=torch.float64)
    return x, x[:, :m] + torch.randn(s, m, generator=generator, dtype=torch.float64)


def grams_of(x, g):
    return torch.stack([x @ x.T, g @ g.T])


def unbiased(x, g):
    K, L = grams_of(x, g)
    diagonals, sums = torch.stack([K.diagonal(), L.diagonal()]), torch.stack([K.sum(1), L.sum(1)])
    return hsic_unbiased((K * L).sum(), diagonals, sums).item()


def between(x, g, blocks, pairs=((0, 1), (1, 1))):
    """The estimate of each pair, then those without one block: shape (pairs, 1 + blocks)."""
    tiles = [gram_tiles(values[None], blocks) for values in (x, g)]
    products = torch.stack([block_products(tiles[i], tiles[j], blocks) for i, j in pairs])
    rows = torch.stack([K.view(len(x), blocks, -1).sum(2)[None] for K in grams_of(x, g)])
    return hsic_between(products, rows, pairs)[:, 0]


def u_statistic_by_loops(K, L):
    """HSIC_1 from its definition as a U-statistic over all four distinct tokens."""
    total, count = 0.0, 0
    for i, j, q, r in permutations(range(len(K)), 4):
        total += K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])
        count += 1
    return total / count


def squared_covariance(x, g):
    covariance = np.cov(x.T, g.T, bias=True)[: x.shape[1], x.shape[1] :]
    return (covariance**2).sum()


def test_unbiased_is_the_u_statistic():
    x, g = samples(6)
    K, L = grams_of(x, g).numpy()
    assert unbiased(x, g) == pytest.approx(u_statistic_by_loops(K, L))
    assert unbiased(x, x) == pytest.approx(u_statistic_by_loops(K, K))


@pytest.mark.parametrize("groups", [1, 3, 4, 12])
def test_tiles_are_those_of_the_gram_matrix(groups):
    x, g = samples(12)
    K = (x @ x.T).view(groups, 12 // groups, groups, 12 // groups)
    tiles = gram_tiles(torch.stack([x, 2 * x]), groups)
    for number, (a, b) in enumerate(tile_numbers(groups).T.tolist()):
        torch.testing.assert_close(tiles[0, number], K[b, :, a])
        torch.testing.assert_close(tiles[1, number], 4 * K[b, :, a])
    K, L = (gram.view(12, 1, 12, 1) for gram in grams_of(x, g))
    found = block_products(tiles[:1], gram_tiles(g[None], groups), 12)
    torch.testing.assert_close(found[0], (K * L).sum((1, 3)))


@pytest.mark.parametrize("groups", [2, 6])
def test_blocks_inside_of_tiles_have_their_own_products(groups):
    x, g = samples(24)
    K, L = (gram.view(6, 4, 6, 4) for gram in grams_of(x, g))
    found = block_products(gram_tiles(x[None], groups), gram_tiles(g[None], groups), 6)
    torch.testing.assert_close(found[0], (K * L).sum((1, 3)))


def test_blocks_of_one_token_give_the_unbiased_estimate():
    x, g = samples(12)
    found, *without = between(x, g, 12)[0].tolist()
    assert found == pytest.approx(unbiased(x, g))
    for i in (0, 5, 11):
        kept = [j for j in range(12) if j != i]
        assert without[i] == pytest.approx(unbiased(x[kept], g[kept]))


def between_by_loops(x, g, blocks):
    """The U-statistic over distinct blocks, from sums over each block written out."""
    xs, gs = np.split(x, blocks), np.split(g, blocks)
    length = len(xs[0])
    S = [a.T @ b for a, b in zip(xs, gs, strict=True)]
    p, q = [a.sum(0) for a in xs], [b.sum(0) for b in gs]
    values = [
        (S[a] * S[b]).sum() / length**2
        - 2 * (S[a] * np.outer(p[b], q[c])).sum() / length**3
        + (np.outer(p[a], q[b]) * np.outer(p[c], q[d])).sum() / length**4
        for a, b, c, d in permutations(range(blocks), 4)
    ]
    return np.mean(values)


def test_between_blocks_is_the_u_statistic_over_blocks():
    x, g = samples(18)
    found = between(x, g, 6)
    assert found[0, 0].item() == pytest.approx(between_by_loops(x.numpy(), g.numpy(), 6))
    assert found[1, 0].item() == pytest.approx(between_by_loops(g.numpy(), g.numpy(), 6))
    kept = [i for i in range(18) if i // 3 != 2]
    assert found[0, 1 + 2].item() == pytest.approx(between_by_loops(x[kept].numpy(), g[kept].numpy(), 5))


def test_four_blocks_leave_none_out_and_three_are_too_few():
    x, g = samples(12)
    assert between(x, g, 4).shape == (2, 1)
    with pytest.raises(ValueError, match="at least 4 blocks"):
        between(x, g, 3)
    with pytest.raises(ValueError, match="at least 4 tokens"):
        unbiased(x[:3], g[:3])


@pytest.mark.parametrize("groups", [1, 2, 4, 6])
def test_permuting_is_permuting(groups):
    x, g = (v - v.mean(0) for v in samples(12))
    orders = torch.cat([torch.arange(groups)[None], random_orders(groups, 5, seed=0)])
    products = tile_products(gram_tiles(torch.stack([x, -3 * x]), groups), gram_tiles(torch.stack([g, g]), groups))
    found = hsic_permuted(products, orders) / 12**2
    for value, other, order in zip(*found, orders, strict=True):
        moved = g.view(groups, 12 // groups, -1)[order].reshape(12, -1)
        assert value.item() == pytest.approx(squared_covariance(x.numpy(), moved.numpy()))
        assert other.item() == pytest.approx(9 * value.item())


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5])
def test_few_blocks_are_put_in_every_order_equally_often(blocks):
    orders = Counter(tuple(order) for order in random_orders(blocks, 239, seed=0).tolist())
    orders[tuple(range(blocks))] += 1  # the order as it is
    every = set(permutations(range(blocks)))
    assert set(orders) == every
    assert set(orders.values()) == {240 // len(every)}


def test_many_blocks_are_put_in_random_orders_that_come_again():
    orders = random_orders(7, 2000, seed=3)
    assert all(sorted(order) == list(range(7)) for order in orders.tolist())
    at = torch.stack([(orders == place).double().mean(0) for place in range(7)])
    assert (at - 1 / 7).abs().max() < 0.05  # any block in any place
    random_orders.cache_clear()
    assert torch.equal(orders, random_orders(7, 2000, seed=3))
    assert not torch.equal(orders, random_orders(7, 2000, seed=4))


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_samples_are_centred_and_in_units_of_their_largest_number(scale):
    x = samples(20)[0].float() + 7
    (z, _), unit, variance, own = standardized(torch.stack([x * scale, x]))
    expected = x.double() - x.double().mean(0)
    assert z.abs().max() == 1
    assert variance[0].item() == pytest.approx(expected.square().sum(1).mean().item() * scale**2, rel=1e-4)
    torch.testing.assert_close(z.double() * unit[0].sqrt() / scale, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(own[0], z.double().square().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e20])
def test_a_constant_has_no_variance(value):
    z, unit, variance, _ = standardized(torch.full((1, 33, 5), value))
    assert unit == 0
    assert variance == 0
    assert torch.isfinite(z).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_variance_of_a_sample_that_is_not_finite_is_nan(value):
    x = samples(20)[0].float()[None].repeat(2, 1, 1)
    x[0, 3, 1] = value
    _, unit, variance, _ = standardized(x)
    assert torch.isnan(torch.stack([unit[0], variance[0]])).all()
    assert torch.isfinite(torch.stack([unit[1], variance[1]])).all()
