from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasc_lightning.moments import (
    CalibrationMoments,
    CrossMoments,
    Moments,
    add_gram_,
    moments_bytes,
    packed_size,
    unpack,
)


@pytest.mark.parametrize("d", [1, 3, 64, 200, 500, 1200])
def test_blocked_gram_is_the_product(d):
    X = torch.randn(37, d, dtype=torch.float64)
    packed = torch.zeros(packed_size(d), dtype=torch.float64)
    add_gram_(packed, X, 2.0)
    torch.testing.assert_close(unpack(packed, d), 2 * X.T @ X)
    if d >= 500:
        assert packed_size(d) < 0.7 * d * d


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


def test_shared_inputs_hold_one_matrix_and_unequal_sharing_stays_exact():
    moments = CalibrationMoments({"q": (4, 3), "k": (2, 3)}, torch.float64)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    moments.add_inputs(["q", "k"], x)
    assert len(moments.inputs) == 1
    moments.add_inputs(["q"], y)
    moments.add_gradients("q", torch.ones(12, 4))
    moments.add_gradients("k", torch.ones(5, 2))
    both = torch.cat([x, y])
    torch.testing.assert_close(moments.layer("q").A, both.T @ both / 12)
    torch.testing.assert_close(moments.layer("k").A, x.T @ x / 5)


def test_moving_rows_takes_them_from_the_members_that_were_not_reached():
    moments = CalibrationMoments({"q": (2, 3), "k": (2, 3)}, torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    y = torch.randn(6, 3, dtype=torch.float64)
    for rows in (x, y):
        moments.add_inputs(["q", "k"], rows)
    moments.move_inputs(["q", "k"], ["q"], y)
    moments.add_gradients("q", torch.ones(11, 2))
    moments.add_gradients("k", torch.ones(5, 2))
    both = torch.cat([x, y])
    torch.testing.assert_close(moments.layer("q").A, both.T @ both / 11)
    torch.testing.assert_close(moments.layer("k").A, x.T @ x / 5)


def test_cross_moments_stream_and_merge():
    x, h = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    left, right = CrossMoments(3, 2, torch.float64), CrossMoments(3, 2, torch.float64)
    left.update(x[:4], h[:4])
    right.update(x[4:], h[4:] / 2, scale=2.0)
    torch.testing.assert_close(left.add_(right).compute(), x.T @ h / 9)
    with pytest.raises(ValueError, match=r"lengths \(3, 2\)"):
        left.update(h, x)


def test_release_frees_a_shared_matrix_with_its_last_layer():
    moments = CalibrationMoments({"q": (4, 3), "k": (2, 3)})
    moments.add_inputs(["q", "k"], torch.randn(5, 3))
    moments.add_gradients("q", torch.randn(5, 4))
    moments.add_gradients("k", torch.randn(5, 2))
    moments.release("q")
    assert moments.layer("k").A.shape == (3, 3)
    moments.release("k")
    assert moments.nbytes < 100


def test_layer_without_tokens_is_an_error():
    moments = CalibrationMoments({"q": (4, 3)})
    with pytest.raises(ValueError, match="no gradient reached it"):
        moments.layer("q")


def test_bytes_bound_what_is_allocated():
    shapes = {"q": (4, 3), "k": (2, 3)}
    moments = CalibrationMoments(shapes)
    for name, (m, n) in shapes.items():
        moments.add_inputs([name], torch.randn(5, n))
        moments.add_gradients(name, torch.randn(5, m))
    counters = 8 * 4
    assert moments.nbytes == moments_bytes(shapes.values()) + counters
