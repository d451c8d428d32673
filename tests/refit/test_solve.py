from __future__ import annotations

import pytest
import torch

from fasc_lightning.refit._solve import (
    DriftRows,
    Factors,
    RowMoments,
    drift_loss,
    linear_target_moments,
    measured_target_moments,
    solve_refit,
)
from fasc_lightning.solvers import shrink, two_sided

TOKENS, M, N, K = 40, 4, 5, 2


@pytest.fixture
def problem():
    """Tokens x, drifted x^, W, a rank-k W'_0 near it, and a metric G far from the identity; all float64."""
    torch.set_default_dtype(torch.float64)
    try:
        mixing = torch.randn(N, N)
        x = torch.randn(TOKENS, N) @ mixing + 0.5
        drifted = x + 0.4 * torch.randn(TOKENS, N) - 0.2 * x.tanh()
        W, root = torch.randn(M, N), torch.randn(M, M)
        G = root.T @ root + 0.1 * torch.eye(M)
        start = Factors(*two_sided(W, x.T @ x / TOKENS, G).truncate(K))
    finally:
        torch.set_default_dtype(torch.float32)
    return x, drifted, W, G, start


def linear_moments(x, drifted, W):
    rows = torch.cat([x, drifted], dim=1)
    return linear_target_moments(W, rows.T @ rows / len(rows), rows.mean(0))


def objective(x, drifted, v, G, start, anchor, weight, shift):
    """The definition, token by token."""
    error = v - drifted @ weight.T - shift
    change = x @ (start.left @ start.right).T - x @ weight.T - shift
    return ((error @ G) * error).sum(1).mean() + anchor * ((change @ G) * change).sum(1).mean()


def minimise(loss, *parameters):
    parameters = [p.clone(memory_format=torch.contiguous_format).requires_grad_() for p in parameters]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=1000, tolerance_grad=1e-10, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(*parameters)
        value.backward()
        return value

    optimizer.step(closure)
    return loss(*parameters).item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("anchor", [0.0, 0.7])
def test_both_factors_reach_what_an_optimiser_reaches(problem, anchor, bias):
    x, drifted, W, G, start = problem
    found = solve_refit(linear_moments(x, drifted, W), G, start, anchor, "factors", bias)
    shift = torch.zeros(M, dtype=torch.float64) if found.shift is None else found.shift
    closed = objective(x, drifted, x @ W.T, G, start, anchor, found.left @ found.right, shift).item()

    def loss(B, C, s):
        return objective(x, drifted, x @ W.T, G, start, anchor, B @ C, s if bias else 0 * s)

    # From the anchor and from elsewhere: the landscape of rank-k matrices has saddles, but no other minima.
    zero = torch.zeros(M, dtype=torch.float64)
    brute = min(
        minimise(loss, start.left, start.right, zero),
        minimise(loss, torch.randn_like(start.left), torch.randn_like(start.right), zero),
    )
    assert found.left.shape == (M, K)
    assert found.right.shape == (K, N)
    assert closed == pytest.approx(brute, rel=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("anchor", [0.0, 0.7])
def test_the_right_factor_reaches_what_an_optimiser_reaches(problem, anchor, bias):
    x, drifted, W, G, start = problem
    found = solve_refit(linear_moments(x, drifted, W), G, start, anchor, "right", bias)
    shift = torch.zeros(M, dtype=torch.float64) if found.shift is None else found.shift
    closed = objective(x, drifted, x @ W.T, G, start, anchor, found.left @ found.right, shift).item()

    def loss(C, s):
        return objective(x, drifted, x @ W.T, G, start, anchor, start.left @ C, s if bias else 0 * s)

    assert torch.equal(found.left, start.left)
    assert closed == pytest.approx(minimise(loss, start.right, torch.zeros(M, dtype=torch.float64)), rel=1e-6)


@pytest.mark.parametrize("variant", ["factors", "right"])
def test_a_strong_anchor_leaves_the_factors_what_they_were(problem, variant):
    x, drifted, W, G, start = problem
    moments, before = linear_moments(x, drifted, W), start.left @ start.right
    changes = []
    for anchor in (0.0, 1.0, 10.0, 1e9):
        found = solve_refit(moments, G, start, anchor, variant, bias=True)
        changes.append((found.left @ found.right - before).norm().item())
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] < 1e-6
    assert found.shift.abs().max() < 1e-6


@pytest.mark.parametrize("variant", ["factors", "right"])
def test_an_anchor_elsewhere_is_measured_in_its_own_moments(problem, variant):
    x, drifted, W, G, start = problem
    A = torch.diag(torch.arange(1.0, N + 1, dtype=torch.float64))
    found = solve_refit(linear_moments(x, drifted, W), G, start, 0.7, variant, towards=(W, A))

    def loss(B, C):
        error, change = x @ W.T - drifted @ (B @ C).T, W - B @ C
        return ((error @ G) * error).sum(1).mean() + 0.7 * (G * (change @ A @ change.T)).sum()

    if variant == "right":
        brute = minimise(lambda C: loss(start.left, C), start.right)
    else:
        brute = min(
            minimise(loss, start.left, start.right),
            minimise(loss, torch.randn_like(start.left), torch.randn_like(start.right)),
        )
    assert loss(found.left, found.right).item() == pytest.approx(brute, rel=1e-6)


def test_a_strong_anchor_elsewhere_is_the_two_sided_solution(problem):
    x, drifted, W, G, start = problem
    A = torch.diag(torch.arange(1.0, N + 1, dtype=torch.float64))
    found = solve_refit(linear_moments(x, drifted, W), G, start, 1e9, towards=(W, A))
    B, C = two_sided(W, A, G).truncate(K)
    torch.testing.assert_close(found.left @ found.right, B @ C, rtol=1e-5, atol=1e-6)


def test_a_bias_needs_the_tokens_own_anchor(problem):
    x, drifted, W, G, start = problem
    with pytest.raises(ValueError, match="Expected no `towards`"):
        solve_refit(linear_moments(x, drifted, W), G, start, 1.0, bias=True, towards=(W, torch.eye(N)))


@pytest.mark.parametrize("measured", [False, True])
def test_moments_of_two_shares_mix_to_those_of_all(problem, measured):
    x, drifted, W, _, _ = problem
    shares = [DriftRows((M, N), measured, torch.float64, x.device) for _ in range(3)]
    for rows, share in ((slice(0, 10), shares[0]), (slice(10, TOKENS), shares[1]), (slice(0, TOKENS), shares[2])):
        share.update(x[rows], drifted[rows], 2 * x[rows] @ W.T if measured else None)
    first, second, everything = (share.moments(W) for share in shares)
    mixed = first.mixed(second, shares[1].count / TOKENS)
    for name, value in vars(everything).items():
        torch.testing.assert_close(getattr(mixed, name), value)


def test_without_drift_and_anchor_it_is_the_two_sided_solution(problem):
    x, _, W, G, start = problem
    moments = linear_moments(x, x, W).shrunk(W, 0.01)
    rough = Factors(torch.randn_like(start.left), torch.randn_like(start.right))
    found = solve_refit(moments, G, rough, 0.0)
    B, C = two_sided(W, shrink(x.T @ x / TOKENS, 0.01), G).truncate(K)
    torch.testing.assert_close(found.left @ found.right, B @ C)
    assert found.shift is None


def test_the_loss_is_that_of_the_tokens(problem):
    x, drifted, W, G, start = problem
    moments, shift = linear_moments(x, drifted, W), torch.randn(M, dtype=torch.float64)
    weight = start.left @ start.right
    for s in (None, shift):
        error = x @ W.T - drifted @ weight.T - (0 if s is None else s)
        assert drift_loss(moments, G, weight, s) == pytest.approx(((error @ G) * error).sum(1).mean().item())


def test_a_measured_target_of_the_dense_outputs_is_the_linear_one(problem):
    x, drifted, W, _, _ = problem
    rows = torch.cat([drifted, x @ W.T], dim=1)
    measured = measured_target_moments(x.T @ x / TOKENS, x.mean(0), rows.T @ rows / TOKENS, rows.mean(0))
    measured = measured.shrunk(W, 0.01)
    linear = linear_moments(x, drifted, W).shrunk(W, 0.01)
    for name, value in vars(linear).items():
        torch.testing.assert_close(getattr(measured, name), value)


@pytest.mark.parametrize("variant", ["factors", "right"])
def test_fewer_tokens_than_features_are_an_ordinary_input(problem, variant):
    x, drifted, W, G, start = problem
    moments = linear_moments(x[:3], drifted[:3], W)
    for given in (moments, moments.shrunk(W, 1e-4)):
        found = solve_refit(given, G, start, 0.0, variant, bias=True)
        assert all(value.isfinite().all() for value in (found.left, found.right, found.shift))


def test_directions_without_data_are_drawn_to_the_dense_weight(problem):
    x, drifted, W, G, _ = problem
    x, drifted = x.clone(), drifted.clone()
    x[:, 0] = drifted[:, 0] = 0
    full = Factors(W, torch.eye(N, dtype=torch.float64))
    found = solve_refit(linear_moments(x, drifted, W).shrunk(W, 1e-4), G, full, 0.0, "right")
    weight = found.left @ found.right
    torch.testing.assert_close(weight[:, 0], W[:, 0], rtol=0.05, atol=0.05)


def test_moments_in_single_precision_are_solved_in_double(problem):
    x, drifted, W, G, start = problem
    rows = torch.cat([x, drifted], dim=1).float()
    moments = linear_target_moments(W.float(), rows.T @ rows / TOKENS, rows.mean(0))
    assert {value.dtype for value in vars(moments).values()} == {torch.float64}
    found = solve_refit(moments, G, start, 1.0)
    assert found.left.dtype == torch.float64


def test_rows_are_summed_over_batches():
    rows = torch.randn(30, 5, dtype=torch.float64)
    moments = RowMoments(5, torch.float64, rows.device)
    moments.update(rows[:12])
    moments.update(rows[12:])
    torch.testing.assert_close(moments.compute(), rows.T @ rows / 30)
    torch.testing.assert_close(moments.mean(), rows.mean(0))
    rows[3, 2] = float("nan")
    with pytest.raises(FloatingPointError, match="finite activations"):
        moments.update(rows)
