from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasc_lightning.dependence import DependenceScore, hsic_biased, hsic_unbiased


def rho_by_definition(x, g):
    """FASC's Eq. 2 with d x d moments in float64."""
    x, g = x.double() - x.double().mean(0), g.double() - g.double().mean(0)
    norm = torch.linalg.matrix_norm
    return (norm(x.T @ g) / torch.sqrt(norm(x.T @ x) * norm(g.T @ g))).item()


def cka_unbiased_by_loops(K, L):
    """HSIC_1 from its definition as a U-statistic over all four distinct tokens."""
    s = len(K)
    total, count = 0.0, 0
    for i in range(s):
        for j in range(s):
            for q in range(s):
                for r in range(s):
                    if len({i, j, q, r}) == 4:
                        total += K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])
                        count += 1
    return total / count


@settings(deadline=None, max_examples=30)
@given(s=st.integers(4, 40), n=st.integers(1, 12), m=st.integers(1, 12), seed=st.integers(0, 99))
def test_one_sample_agrees_with_the_definition(s, n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(s, n, generator=generator), torch.randn(s, m, generator=generator)
    score = DependenceScore()
    score.update(x, g)
    assert score.compute().item() == pytest.approx(rho_by_definition(x, g), rel=1e-5)


def test_unbiased_hsic_is_the_u_statistic():
    x, g = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    grams = torch.stack([x @ x.T, g @ g.T])
    found = hsic_unbiased(grams)
    K, L = grams.numpy()
    assert found[0, 1].item() == pytest.approx(cka_unbiased_by_loops(K, L))
    assert found[0, 0].item() == pytest.approx(cka_unbiased_by_loops(K, K))


def test_biased_hsic_is_the_squared_covariance():
    x, g = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    covariance = np.cov(x.T, g.T, bias=True)[:3, 3:]
    found = hsic_biased(torch.stack([x @ x.T, g @ g.T]))[0, 1].item()
    assert found == pytest.approx((covariance**2).sum())


def test_independent_streams_have_a_debiased_score_around_zero_and_a_plain_one_at_the_null():
    generator = torch.Generator().manual_seed(0)
    score = DependenceScore()
    for _ in range(200):
        score.update(torch.randn(16, 8, generator=generator), torch.randn(16, 8, generator=generator))
    assert abs(score.debiased.item()) < 0.1
    assert score.compute().item() == pytest.approx(score.null.item(), rel=0.1)


def test_dependent_streams_stand_out():
    score = DependenceScore()
    for _ in range(20):
        x = torch.randn(16, 8)
        score.update(x, x + 0.1 * torch.randn(16, 8))
    assert score.debiased.item() > 0.9
    assert score.compute().item() > score.null.item() + 0.2


@settings(deadline=None, max_examples=10)
@given(a=st.floats(1e-10, 1e6), b=st.floats(1e-10, 1e6))
def test_scale_and_rotation_do_not_matter(a, b):
    torch.manual_seed(1)
    x, g = torch.randn(20, 5), torch.randn(20, 5)
    Q = torch.linalg.qr(torch.randn(5, 5))[0]
    plain, changed = DependenceScore(), DependenceScore()
    plain.update(x, g)
    changed.update(a * x @ Q, b * g)
    assert changed.compute().item() == pytest.approx(plain.compute().item(), rel=1e-4)
    assert changed.debiased.item() == pytest.approx(plain.debiased.item(), rel=1e-3)


def test_constant_gradients_have_no_score():
    score = DependenceScore()
    score.update(torch.randn(8, 3), torch.zeros(8, 3))
    assert math.isnan(score.compute().item())
    assert math.isnan(score.debiased.item())
    assert math.isnan(score.null.item())


def test_too_few_tokens_are_passed_over():
    score = DependenceScore()
    score.update(torch.randn(3, 3), torch.randn(3, 3))
    assert score.samples == 0
    with pytest.raises(ValueError, match="at least 4 tokens"):
        hsic_unbiased(torch.zeros(2, 3, 3))


def test_merging_is_adding():
    batches = [(torch.randn(10, 4), torch.randn(10, 4)) for _ in range(6)]
    whole, left, right = DependenceScore(), DependenceScore(), DependenceScore()
    for i, (x, g) in enumerate(batches):
        whole.update(x, g)
        (left if i < 3 else right).update(x, g)
    left.merge_state(right)
    assert left.compute().item() == pytest.approx(whole.compute().item())
    assert left.debiased.item() == pytest.approx(whole.debiased.item())


def test_tokens_must_match():
    with pytest.raises(ValueError, match="as many tokens"):
        DependenceScore().update(torch.zeros(5, 2), torch.zeros(4, 2))
