from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import scipy.stats
import torch
from dependence_cases import autocorrelated, scored
from hypothesis import given, settings
from hypothesis import strategies as st

from fasc_lightning import DependenceScore, debiased_rho, iid_floor, rho
from fasc_lightning.dependence._grams import MAX_TOKENS
from fasc_lightning.dependence._reading import student_quantile
from fasc_lightning.dependence._streaming import MAX_ROWS


@settings(deadline=None, max_examples=30)
@given(s=st.integers(4, 40), n=st.integers(1, 12), m=st.integers(1, 12), seed=st.integers(0, 99))
def test_one_sample_agrees_with_the_definitions(s, n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(s, n, generator=generator), torch.randn(s, m, generator=generator)
    score = scored((x, g))
    assert score.compute().item() == pytest.approx(rho(x, g).item(), abs=1e-5)
    assert score.iid_floor.item() == pytest.approx(iid_floor(x, g).item(), rel=1e-4)
    expected = debiased_rho(x, g).item()
    if not math.isnan(expected) and abs(expected) < 2:  # else a variance is nothing but noise
        assert score.debiased.item() ** 2 == pytest.approx(expected**2, abs=1e-3)


def test_sequences_change_the_debiased_value_but_not_rho():
    x, g = torch.randn(10, 6, 4), torch.randn(10, 6, 4)
    together, flat = scored((x, g)), scored((x.flatten(0, 1), g.flatten(0, 1)))
    assert together.compute().item() == pytest.approx(flat.compute().item(), rel=1e-6)
    assert together.debiased.item() != pytest.approx(flat.debiased.item(), rel=1e-3)


@pytest.mark.parametrize("tokens", [64, 1024, pytest.param(16384, marks=pytest.mark.exhaustive)])
def test_independence_gives_a_debiased_value_around_zero(tokens):
    generator = torch.Generator().manual_seed(0)
    squares, plain = [], []
    for _ in range(12 if tokens < 10_000 else 4):
        score = scored((torch.randn(tokens, 24, generator=generator), torch.randn(tokens, 24, generator=generator)))
        debiased = score.debiased.item()
        squares.append(math.copysign(debiased**2, debiased))
        plain.append(score.compute().item())
    spread = (24 / min(tokens, MAX_TOKENS)) * 2  # of rho^2 in one minibatch
    assert abs(sum(squares) / len(squares)) < spread / math.sqrt(len(squares)) * (MAX_TOKENS / max(tokens, MAX_TOKENS))
    assert min(plain) > 0.05  # the plain score never tells


@pytest.mark.parametrize("shape", [(8, 128), (16, 64), (24, 42)])
def test_autocorrelated_but_independent_series_stay_inside_the_sequence_null(shape):
    generator = torch.Generator().manual_seed(1)
    inside = covered = 0
    floors = []
    for _ in range(40):
        score = scored((autocorrelated(*shape, 8, generator), autocorrelated(*shape, 8, generator)))
        low, high = score.interval.tolist()
        inside += score.compute().item() <= score.null.item()
        covered += low <= 0 <= high
        floors.append(score.null.item() / score.iid_floor.item())
    assert inside >= 34  # 38 expected
    assert covered >= 34
    assert min(floors) > 1.5  # what takes tokens for independent is far off


@pytest.mark.parametrize(("sequences", "updates"), [(4, 1), (4, 3), (8, 1)])
def test_the_null_is_exceeded_by_chance_as_often_as_it_says(sequences, updates):
    generator = torch.Generator().manual_seed(3)
    shape, above, ratios = (sequences, 24), 0, []
    for _ in range(200):
        pairs = [tuple(autocorrelated(*shape, 4, generator) for _ in "xg") for _ in range(updates)]
        score = scored(*pairs)
        above += bool(score.compute() > score.null)
        debiased = score.debiased.item()
        if not math.isnan(debiased):
            ratios.append(math.copysign(debiased**2, debiased))
    assert 2 <= above <= 20  # 10, or 8.3 of four sequences; both ends are beyond three standard deviations
    assert len(ratios) > 150
    assert abs(np.mean(ratios)) < 4 * np.std(ratios) / math.sqrt(len(ratios))


@pytest.mark.parametrize("sequences", [4, 5])
def test_the_null_of_few_sequences_is_the_rank_among_all_orders(sequences):
    generator = torch.Generator().manual_seed(4)
    for _ in range(20):
        x = torch.randn(sequences, 6, 3, generator=generator).double()
        g = torch.randn(sequences, 6, 3, generator=generator).double() + 0.3 * x
        score = scored((x, g))
        values = np.array([rho(x.flatten(0, 1), g[list(o)].flatten(0, 1)) for o in permutations(range(sequences))])
        share = (values >= values[0] * (1 - 1e-9)).mean()  # of all orders, the one as it is among them
        assert bool(score.compute() > score.null) == (share <= 0.05)


@pytest.mark.parametrize("updates", [1, 5])
@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_fewer_than_four_sequences_have_rho_and_nothing_else(sequences, updates):
    pairs = [(torch.randn(sequences, 50, 3), torch.randn(sequences, 50, 3)) for _ in range(updates)]
    score = scored(*pairs)
    assert "fewer than 4 sequences" in score.reason
    assert all(math.isnan(value.item()) for value in (score.null, score.debiased, *score.interval))
    assert score.observed == updates * sequences * 50
    if updates == 1:
        x, g = (values.flatten(0, 1) for values in pairs[0])
        assert score.compute().item() == pytest.approx(rho(x, g).item(), abs=1e-5)
        assert score.iid_floor.item() == pytest.approx(iid_floor(x, g).item(), rel=1e-4)
    enough = torch.randn(8, 5, 3), torch.randn(8, 5, 3)
    score.update(*enough)
    alone = scored(enough)
    assert (score.reason, score.observed) == ("", 40)
    for name in ("null", "debiased", "interval", "iid_floor"):
        assert torch.equal(getattr(score, name), getattr(alone, name))
    assert score.compute() == alone.compute()


def test_fewer_than_eight_sequences_have_no_interval():
    score = scored((torch.randn(7, 20, 3), torch.randn(7, 20, 3)))
    assert score.reason == "fewer than 8 sequences, too few for an interval"
    assert all(math.isfinite(value.item()) for value in (score.compute(), score.null, score.debiased))
    assert all(math.isnan(value.item()) for value in score.interval)


def test_the_interval_is_the_jackknife_over_sequences():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(12, 10, 4, generator=generator).double()
    g = torch.randn(12, 10, 4, generator=generator).double() + 0.7 * x
    score = scored((x, g))
    squares = []
    for i in range(12):  # the ratio without each sequence, from scores of the others
        kept = [j for j in range(12) if j != i]
        squares.append(scored((x[kept], g[kept])).debiased.item() ** 2)
    squares = np.array(squares)
    error = math.sqrt(11 / 12 * ((squares - squares.mean()) ** 2).sum())
    middle, reach = score.debiased.item() ** 2, scipy.stats.t.ppf(0.975, 11) * error
    low, high = score.interval.tolist()
    assert math.copysign(low**2, low) == pytest.approx(middle - reach, abs=0.15 * reach)
    assert math.copysign(high**2, high) == pytest.approx(middle + reach, abs=0.15 * reach)


def test_tokens_of_long_sequences_are_cut_across_all_of_them():
    x, g = torch.randn(8, 600, 3), torch.randn(8, 600, 3)
    x[:, :, 0] += torch.randn(8, 1)
    score = scored((x, g))
    places = [torch.arange(200) * 3 + (torch.arange(8)[:, None] + first) % 3 for first in range(3)]
    sequence = torch.arange(8)[:, None]
    parts = [(x[sequence, place], g[sequence, place]) for place in places]
    together = scored(*parts)
    assert score.observed == 4800
    for name in ("null", "debiased", "iid_floor"):
        torch.testing.assert_close(getattr(score, name), getattr(together, name))
    assert score.compute() == together.compute()
    assert sum(len(rows) for rows in score.rows) == 8  # one a sequence, not one a part
    assert sum(len(rows) for rows in together.rows) == 24


def test_first_tokens_that_are_unlike_the_others_weigh_as_much_in_minibatches():
    generator = torch.Generator().manual_seed(7)
    x, g = torch.randn(16, 512, 4, generator=generator), torch.randn(16, 512, 4, generator=generator)
    x[:, 0], g[:, 0] = 8.0, 100.0
    values = scored((x, g)).debiased.item(), debiased_rho(x.flatten(0, 1), g.flatten(0, 1)).item()
    assert values[0] == pytest.approx(values[1], rel=0.1)


def test_the_interval_covers_the_truth_of_autocorrelated_dependent_series():
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(8, 8, generator=generator) / 4

    def draw():
        x = autocorrelated(8, 64, 8, generator)
        return x, x @ mix + autocorrelated(8, 64, 8, generator)

    truth = mix.norm() / math.sqrt(math.sqrt(8) * torch.linalg.matrix_norm(mix.T @ mix + torch.eye(8)))
    covered = 0
    for _ in range(40):
        low, high = scored(draw()).interval.tolist()
        covered += low <= truth <= high
    assert covered >= 34
    many = scored(*(draw() for _ in range(60)))
    assert many.debiased.item() == pytest.approx(truth.item(), abs=0.03)
    low, high = many.interval.tolist()
    assert low < many.debiased.item() < high
    assert high - low < 0.15
    assert many.compute() > many.null


@settings(deadline=None, max_examples=10)
@given(a=st.floats(1e-20, 1e15), b=st.floats(1e-20, 1e15))
def test_scale_and_rotation_do_not_matter(a, b):
    torch.manual_seed(1)
    x, g = torch.randn(8, 5, 5), torch.randn(8, 5, 5)
    Q = torch.linalg.qr(torch.randn(5, 5))[0]
    plain, changed = scored((x, g)), scored((a * x @ Q, b * g))
    for name in ("null", "debiased", "iid_floor", "interval"):
        torch.testing.assert_close(getattr(changed, name), getattr(plain, name), rtol=1e-3, atol=1e-3)
    assert changed.compute().item() == pytest.approx(plain.compute().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("x", "g", "reason"),
    [
        (torch.randn(8, 3), torch.zeros(8, 3), "constant gradients"),
        (torch.full((8, 3), 0.1), torch.randn(8, 3), "constant activations"),
        (torch.randn(3, 3), torch.randn(3, 3), "fewer than 4 tokens"),
        (torch.randn(1, 1, 3), torch.randn(1, 1, 3), "fewer than 4 tokens"),
        (torch.randn(0, 3), torch.randn(0, 3), "fewer than 4 tokens"),
        (torch.randn(8, 3), torch.full((8, 3), math.nan), "not finite"),
        (torch.full((8, 3), math.inf), torch.randn(8, 3), "not finite"),
    ],
)
def test_undefined_scores_are_nan_with_a_reason(x, g, reason):
    score = scored((x, g))
    assert reason in score.reason
    values = [score.compute(), score.null, score.debiased, score.iid_floor, *score.interval]
    assert all(math.isnan(value.item()) for value in values)
    good = torch.randn(8, 6, 3), torch.randn(8, 6, 3)
    score.update(*good)
    assert score.reason == ""
    alone = scored(good).compute().item()
    if "constant" in reason:  # a variable that varies only at times is coupled the less
        assert 0 < score.compute().item() < alone
    else:  # as if nothing had been
        assert score.compute().item() == pytest.approx(alone)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_nothing_seen_is_a_reason_too():
    score = DependenceScore()
    assert score.reason == "no tokens"
    assert math.isnan(score.null.item())
    assert math.isnan(score.compute().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_rounding(dtype):
    x, g = torch.randn(8, 16, 6), 1e-3 * torch.randn(8, 16, 6)
    found, expected = scored((x.to(dtype), g.to(dtype))), scored((x, g))
    assert found.compute().item() == pytest.approx(expected.compute().item(), rel=0.02)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"as many tokens but got \(5, 3\) and \(4, 3\)"):
        DependenceScore().update(torch.zeros(5, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="sequences, tokens, features"):
        DependenceScore().update(torch.zeros(5), torch.zeros(5))


def test_large_updates_are_cut_into_minibatches():
    x, g = torch.randn(MAX_TOKENS + 10, 3), torch.randn(MAX_TOKENS + 10, 3)
    half = (MAX_TOKENS + 10) // 2
    assert scored((x, g)).compute().item() == pytest.approx(
        scored((x[:half], g[:half]), (x[half:], g[half:])).compute().item()
    )
    many = torch.randn(30, 4, 3), torch.randn(30, 4, 3)
    halves = [tuple(v[part] for v in many) for part in (slice(15), slice(15, 30))]
    assert scored(many).compute().item() == pytest.approx(scored(*halves).compute().item())


def test_merging_is_adding_in_any_order():
    batches = [(torch.randn(8, 5, 4), torch.randn(8, 5, 4)) for _ in range(6)]
    whole, left, right = scored(*batches), scored(*batches[3:]), scored(*batches[:3])
    left.merge_state(right)
    for name in ("null", "debiased", "iid_floor", "interval"):
        torch.testing.assert_close(getattr(left, name), getattr(whole, name))
    assert left.compute().item() == pytest.approx(whole.compute().item())


def test_memory_does_not_grow_with_the_data_or_the_width():
    score = DependenceScore()
    for _ in range(MAX_ROWS // 8 + 100):
        score.update(torch.randn(8, 1, 2), torch.randn(8, 1, 2))
    assert sum(len(row) for row in score.rows) <= MAX_ROWS + 8
    low, high = score.interval.tolist()
    assert low < score.debiased.item() < high
    narrow, wide = (scored((torch.randn(8, 4, n), torch.randn(8, 4, n))) for n in (2, 500))
    sizes = [
        sum(t.numel() for t in [*(v for v in s.metric_state.values() if isinstance(v, torch.Tensor)), *s.rows])
        for s in (narrow, wide)
    ]
    assert sizes[0] == sizes[1] < 1000


def test_results_are_the_same_again():
    batch = torch.randn(9, 7, 4), torch.randn(9, 7, 4)
    first, second, other = scored(batch), scored(batch), scored(batch, seed=1)
    assert torch.equal(first.interval, second.interval)
    assert torch.equal(first.null, second.null)
    assert not torch.equal(first.null, other.null)


@pytest.mark.parametrize("freedom", [7, 8, 15, 63, 2047])
def test_student_quantile_is_students(freedom):
    assert student_quantile(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), abs=1e-4)
