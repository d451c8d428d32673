from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from fasc_lightning.evaluation import paired_interval


@pytest.fixture
def scores():
    """Outcomes of two models on 300 items of differing difficulty."""
    generator = torch.Generator().manual_seed(4)
    ease = torch.rand(300, generator=generator)
    dense = ease > 0.4
    return dense, dense & (torch.rand(300, generator=generator) > 0.1)


@pytest.mark.parametrize(
    ("scale", "statistic"),
    [
        ("percent", lambda a, b, axis: 100 * (b.mean(axis) - a.mean(axis))),
        ("perplexity", lambda a, b, axis: np.exp(b.mean(axis) - a.mean(axis))),
        ("share", lambda a, b, axis: b.mean(axis) / a.mean(axis)),
    ],
)
def test_the_interval_is_the_percentile_bootstrap_of_scipy(scores, scale, statistic):
    a, b = (part.double().numpy() for part in scores)
    interval = paired_interval(*scores, seed=0, confidence=0.9, scale=scale)
    expected = stats.bootstrap(
        (a, b), statistic, paired=True, vectorized=True, confidence_level=0.9, n_resamples=9999, method="percentile",
        rng=np.random.default_rng(1), batch=500,
    ).confidence_interval  # fmt: skip
    assert interval.estimate == pytest.approx(statistic(a, b, -1))
    width = expected.high - expected.low
    assert interval.low == pytest.approx(expected.low, abs=0.06 * width)
    assert interval.high == pytest.approx(expected.high, abs=0.06 * width)
    assert (interval.confidence, interval.count) == (0.9, 300)


def test_the_ratio_of_perplexities_is_that_of_the_mean_losses():
    dense, compressed = torch.tensor([3.0, 2.0, 4.0]), torch.tensor([3.1, 2.3, 4.2])
    interval = paired_interval(dense, compressed, seed=0, scale="perplexity")
    assert interval.estimate == pytest.approx(float(compressed.mean().exp() / dense.mean().exp()), rel=1e-6)
    assert interval.low == pytest.approx(np.exp(0.1), rel=1e-5)
    assert interval.high == pytest.approx(np.exp(0.3), rel=1e-5)


def test_pairing_takes_out_what_items_share():
    common = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    interval = paired_interval(common, common + 0.01, seed=0)
    assert interval.low == pytest.approx(1.0)
    assert interval.high == pytest.approx(1.0)


def test_equal_models_differ_by_nothing_and_a_seed_decides(scores):
    same = paired_interval(scores[0], scores[0], seed=0)
    assert (same.estimate, same.low, same.high) == (0, 0, 0)
    assert same.contains(0)
    first = paired_interval(*scores, seed=1)
    assert first == paired_interval(*scores, seed=1)
    assert first != paired_interval(*scores, seed=2)
    assert not first.contains(0)
    assert paired_interval(*scores, seed=1, confidence=0.5).low > first.low
    assert paired_interval(scores[0].tolist(), scores[1].tolist(), seed=1).to_dict() == first.to_dict()


@pytest.mark.parametrize(
    ("dense", "compressed", "options", "message"),
    [
        ([1.0, 0.0], [1.0], {}, r"vectors of one length, but got the shapes \(2,\) and \(1,\)"),
        ([1.0], [1.0], {}, "at least 2"),
        ([[1.0, 2.0]], [[1.0, 2.0]], {}, "vectors of one length"),
        ([1.0, float("nan")], [1.0, 1.0], {}, "Expected finite scores"),
        ([1.0, 0.0], [1.0, 1.0], {"confidence": 95}, "between 0 and 1, but got 95"),
        ([1.0, 0.0], [1.0, 1.0], {"scale": "ratio"}, "one of percent, perplexity, share, but got 'ratio'"),
        ([1.0, 0.0], [1.0, 1.0], {"scale": "share"}, "its mean is 0 in some"),
    ],
)
def test_what_cannot_be_compared_is_refused(dense, compressed, options, message):
    with pytest.raises(ValueError, match=message):
        paired_interval(dense, compressed, seed=0, **options)
