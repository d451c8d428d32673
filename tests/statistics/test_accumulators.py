from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_moments import gradients_of_sequences

from fasc_lightning.statistics import Moments, SequenceFisher
from fasc_lightning.statistics._accumulators import CrossMoments


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5), split=st.integers(0, 5))
def test_streaming_and_merging_equal_numpy(sizes, split):
    batches = [torch.randn(s, 5, dtype=torch.float64) for s in sizes]
    left, right = Moments(5, torch.float64), Moments(5, torch.float64)
    for i, batch in enumerate(batches):
        (left if i < split else right).update(batch)
    left.add_(right)
    X = torch.cat(batches).numpy()
    if not len(X):
        assert left.count == 0
        return
    torch.testing.assert_close(left.compute(), torch.from_numpy(X.T @ X / len(X)))
    torch.testing.assert_close(left.mean(), torch.from_numpy(X.mean(0)))
    assert left.count == len(X)


def test_covariance_is_centred():
    X = torch.randn(50, 4, dtype=torch.float64) + 3
    moments = Moments(4, torch.float64)
    moments.update(X)
    torch.testing.assert_close(moments.covariance(), torch.cov(X.T, correction=0))


def test_half_precision_input_is_accumulated_in_float32():
    X = torch.randn(64, 8).bfloat16()
    moments = Moments(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments.update(X)
    assert moments.outer.dtype == torch.float32
    expected = X.double().T @ X.double() / 64
    torch.testing.assert_close(moments.compute().double(), expected, rtol=1e-6, atol=1e-6)


def test_results_are_never_stale():
    a, b = Moments(1, torch.float64), Moments(1, torch.float64)
    a.update(torch.ones(2, 1))
    assert a.compute().item() == 1
    b.update(torch.full((2, 1), 5.0))
    assert a.add_(b).compute().item() == 13


def test_torchmetrics_merge_and_reset():
    a, b = Moments(3), Moments(3)
    x, y = torch.randn(4, 3), torch.randn(6, 3)
    a.update(x)
    b.update(y)
    a.merge_state(b)
    both = torch.cat([x, y])
    torch.testing.assert_close(a.compute(), both.T @ both / 10)
    a.reset()
    assert a.count == 0
    assert a.nbytes < 20


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_vectors_are_refused_and_nothing_is_added(bad):
    moments = Moments(3)
    moments.update(torch.ones(2, 3))
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        moments.update(torch.tensor([[1.0, bad, 0.0]]))
    assert moments.count == 2
    torch.testing.assert_close(moments.compute(), torch.ones(3, 3))


def test_update_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"shape \(tokens, 3\) but got \(2, 4\)"):
        Moments(3).update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="float16"):
        Moments(3, torch.float16)


def test_cross_moments_stream_and_merge():
    x, h = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    left, right = CrossMoments(3, 2, torch.float64), CrossMoments(3, 2, torch.float64)
    left.update(x[:4], h[:4])
    right.update(x[4:], h[4:] / 2, scale=2.0)
    torch.testing.assert_close(left.add_(right).compute(), x.T @ h / 9)
    with pytest.raises(ValueError, match=r"lengths \(3, 2\)"):
        left.update(h, x)


@settings(deadline=None, max_examples=20)
@given(scale=st.floats(-5, 5), half=st.booleans())
def test_magnitudes_are_gathered_where_asked_for(scale, half):
    x = torch.randn(12, 4).to(torch.bfloat16 if half else torch.float64)
    moments = Moments(4, torch.float64, absolute=True)
    moments.update(x[:5], scale)
    moments.update(x[5:], scale)
    torch.testing.assert_close(moments.mean_magnitude(), (scale * x.double()).abs().mean(0))
    assert "magnitude" not in Moments(4).sums


def test_what_was_added_can_be_taken_out():
    kept, moved = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    moments, part, expected = (Moments(3, torch.float64, absolute=True) for _ in range(3))
    for x in (kept, moved):
        moments.update(x)
    part.update(moved)
    expected.update(kept)
    moments.subtract_(part)
    for name, state in expected.sums.items():
        torch.testing.assert_close(moments.sums[name], state)


LENGTHS = [4, 1, 0, 7]


def sequences(m, n, lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(sum(lengths), d, dtype=torch.float64, generator=generator) for d in (n, m)]
    return draw[0], draw[1] + draw[0].mean(1, keepdim=True)


@pytest.mark.parametrize(("m", "n"), [(3, 5), (80, 70), (1, 1)])
def test_fisher_rows_are_sums_of_squared_gradients_of_sequences(m, n):
    x, h = sequences(m, n)
    fisher = SequenceFisher(m, n, torch.float64)
    fisher.update(x, h / 3, LENGTHS, scale=3.0)
    G = gradients_of_sequences(x.numpy(), h.numpy(), LENGTHS)
    assert len(G) == fisher.count == 3  # a sequence of no tokens is none
    np.testing.assert_allclose(fisher.fisher_rows().numpy(), (G**2).sum(2).mean(0))
    with pytest.raises(ValueError, match="kronecker=False"):
        fisher.compute()


@pytest.mark.parametrize(("m", "n"), [(3, 5), (80, 70)])
def test_one_step_from_identities_and_one_from_there(m, n):
    x, h = sequences(m, n)
    G = gradients_of_sequences(x.numpy(), h.numpy(), LENGTHS)
    total = (G**2).sum() / len(G)
    expected = (np.mean([Gi.T @ Gi for Gi in G], 0), np.mean([Gi @ Gi.T for Gi in G], 0))
    first = SequenceFisher(m, n, torch.float64, kronecker=True)
    first.update(x, h, LENGTHS)
    for found, S in zip(first.compute(), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), S * np.sqrt(total) / np.trace(S), rtol=1e-9, atol=1e-9)

    right, left = expected
    expected = (np.mean([Gi.T @ left @ Gi for Gi in G], 0), np.mean([Gi @ right @ Gi.T for Gi in G], 0))
    second = SequenceFisher(m, n, torch.float64, kronecker=True, start=first)
    second.update(x, h, LENGTHS)
    for found, S in zip(second.compute(), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), S * np.sqrt(total) / np.trace(S), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(second.fisher_rows().numpy(), (G**2).sum(2).mean(0))


def test_the_iteration_ends_at_the_dominant_singular_pair_of_the_rearranged_fisher():
    """Van Loan and Pitsianis 1993: |F - right (x) left| is least where vec(left) vec(right)^T is."""
    m, n, lengths = 3, 4, [5] * 6
    x, h = sequences(m, n, lengths)
    G = gradients_of_sequences(x.numpy(), h.numpy(), lengths)
    F = np.mean([np.outer(Gi.ravel(), Gi.ravel()) for Gi in G], 0).reshape(m, n, m, n)
    U, s, Vt = np.linalg.svd(F.transpose(0, 2, 1, 3).reshape(m * m, n * n))
    stream = SequenceFisher(m, n, torch.float64, kronecker=True)
    stream.update(x, h, lengths)
    errors = []
    for _ in range(60):
        right, left = (S.numpy() / np.linalg.norm(S.numpy()) for S in stream.compute())
        errors.append(np.linalg.norm(F - s[0] * np.einsum("ab,ij->aibj", left, right)))
        following = SequenceFisher(m, n, torch.float64, kronecker=True, start=stream)
        following.update(x, h, lengths)
        stream = following
    for found, vector in ((left, U[:, 0]), (right, Vt[0])):
        expected = vector.reshape(found.shape)
        np.testing.assert_allclose(found, np.sign(np.trace(expected)) * expected, atol=1e-7)
    assert errors[-1] == pytest.approx(np.sqrt((s[1:] ** 2).sum()))
    assert errors[-1] < errors[0]


def test_a_fisher_that_is_a_kronecker_product_is_found_in_one_step_at_its_scale():
    R, L = torch.randn(4, 4, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    h, x = L.T.repeat_interleave(4, 0), R.T.repeat(3, 1)  # every column of L with every column of R
    stream = SequenceFisher(3, 4, torch.float64, kronecker=True)
    stream.update(x, h, [1] * 12)
    right, left = stream.compute()
    torch.testing.assert_close(torch.kron(right, left), torch.kron(R @ R.T, L @ L.T) / 12)


def test_sequences_merge_in_any_split():
    x, h = sequences(3, 5)
    whole, first, second = (SequenceFisher(3, 5, torch.float64, kronecker=True) for _ in range(3))
    whole.update(x, h, LENGTHS)
    first.update(x[:4], h[:4], [4])
    second.update(x[4:], h[4:], [1, 7])
    first.add_(second)
    for name, state in whole.sums.items():
        torch.testing.assert_close(first.sums[name], state)


def test_gradients_of_zero_leave_factors_of_zero():
    stream = SequenceFisher(2, 3, kronecker=True)
    stream.update(torch.ones(4, 3), torch.zeros(4, 2), [2, 2])
    following = SequenceFisher(2, 3, kronecker=True, start=stream)
    following.update(torch.ones(4, 3), torch.zeros(4, 2), [2, 2])
    assert all(not S.any() for S in (*stream.compute(), *following.compute()))


def test_sequences_must_cover_the_tokens():
    with pytest.raises(ValueError, match="5 tokens in all but got lengths that sum to 4"):
        SequenceFisher(2, 3).update(torch.ones(5, 3), torch.ones(5, 2), [2, 2])
    with pytest.raises(ValueError, match=r"lengths \(3, 2\)"):
        SequenceFisher(2, 3).update(torch.ones(5, 2), torch.ones(5, 3), [5])
