from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch

from fasc_lightning.dependence._hsic import (
    centered_gram,
    hsic_between,
    hsic_biased,
    hsic_permuted,
    hsic_unbiased,
    random_orders,
)


def samples(s=30, n=3, m=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(s, n, generator=generator, dtype=torch.float64)
    return x, x[:, :m] + torch.randn(s, m, generator=generator, dtype=torch.float64)


def grams_of(x, g):
    return torch.stack([x @ x.T, g @ g.T])


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
    K, L = grams_of(*samples(6)).numpy()
    found = hsic_unbiased(grams_of(*samples(6)))
    assert found[0, 1].item() == pytest.approx(u_statistic_by_loops(K, L))
    assert found[0, 0].item() == pytest.approx(u_statistic_by_loops(K, K))


def test_biased_is_the_squared_covariance():
    x, g = samples()
    assert hsic_biased(grams_of(x - x.mean(0), g - g.mean(0)))[0, 1].item() == pytest.approx(squared_covariance(x, g))


def test_blocks_of_one_token_give_the_unbiased_estimate():
    grams = grams_of(*samples(12))
    found, without = hsic_between(grams, 12)
    torch.testing.assert_close(found, hsic_unbiased(grams))
    for i in (0, 5, 11):
        kept = [j for j in range(12) if j != i]
        torch.testing.assert_close(without[i], hsic_unbiased(grams[:, kept][:, :, kept]))


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
    found, without = hsic_between(grams_of(x, g), 6)
    assert found[0, 1].item() == pytest.approx(between_by_loops(x.numpy(), g.numpy(), 6))
    assert found[1, 1].item() == pytest.approx(between_by_loops(g.numpy(), g.numpy(), 6))
    kept = [i for i in range(18) if i // 3 != 2]
    assert without[2][0, 1].item() == pytest.approx(between_by_loops(x[kept].numpy(), g[kept].numpy(), 5))


def test_four_blocks_leave_none_out_and_three_are_too_few():
    grams = grams_of(*samples(12))
    assert hsic_between(grams, 4)[1].shape == (0, 2, 2)
    with pytest.raises(ValueError, match="at least 4 blocks"):
        hsic_between(grams, 3)
    with pytest.raises(ValueError, match="at least 4 tokens"):
        hsic_unbiased(torch.zeros(2, 3, 3))


def test_permuting_is_permuting():
    x, g = (v - v.mean(0) for v in samples(12))
    orders = random_orders(4, 5, seed=0)
    found = hsic_permuted(x @ x.T, g @ g.T, orders)
    for value, order in zip(found, orders, strict=True):
        moved = g.view(4, 3, -1)[order].reshape(12, -1)
        assert value.item() == pytest.approx(squared_covariance(x.numpy(), moved.numpy()))


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
def test_grams_are_centred_and_in_units_of_the_variance(scale):
    x = samples(20)[0].float() + 7
    K, variance = centered_gram(x * scale)
    expected = x.double() - x.double().mean(0)
    assert variance.item() == pytest.approx(expected.square().sum(1).mean().item() * scale**2, rel=1e-4)
    torch.testing.assert_close(K.double(), expected @ expected.T / expected.square().sum(1).mean(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e20])
def test_a_constant_has_no_variance(value):
    K, variance = centered_gram(torch.full((33, 5), value))
    assert variance == 0
    assert not K.any()
