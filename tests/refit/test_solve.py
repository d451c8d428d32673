from __future__ import annotations

import pytest
import torch

from fasc_lightning.refit._drift import DriftRows, OutputBasis, RowMoments
from fasc_lightning.refit._solve import anchor_moments, mixed_with_anchor, solve, solve_low_rank
from fasc_lightning.solvers import shrink, two_sided

TOKENS, M, N, K = 40, 4, 5, 2


def problem_of(m, n):
    """Tokens x, drifted x^, W, factors of rank K near it, and a metric G far from the identity; all float64."""
    double = {"dtype": torch.float64}
    mixing = torch.randn(n, n, **double)
    x = torch.randn(TOKENS, n, **double) @ mixing + 0.5
    drifted = x + 0.4 * torch.randn(TOKENS, n, **double) - 0.2 * x.tanh()
    W, root = torch.randn(m, n, **double), torch.randn(m, m, **double)
    G = root.T @ root + 0.1 * torch.eye(m)
    return x, drifted, W, G, two_sided(W, x.T @ x / TOKENS, G).truncate(K)


@pytest.fixture
def problem():
    return problem_of(M, N)


def rows_of(x, drifted, v, shape):
    rows = DriftRows(shape, v is not None, energy=True, inputs=True, dtype=x.dtype, device=x.device)
    rows.update(x, drifted, v)
    return rows


def refitted(x, drifted, W, G, start, anchor, bias=False, towards=None, v=None, whole=True):
    """The factors and the shift of the bias of a layer, as the refit finds them without shrinkage."""
    basis, rows = OutputBasis.of(W, G, whole), rows_of(x, drifted, v, W.shape)
    if towards is None:
        pull = anchor_moments(basis.dual @ start[0] @ start[1], *rows.inputs())
    else:
        pull = anchor_moments(basis.dual @ towards[0], towards[1])
    found = solve_low_rank(mixed_with_anchor(rows.moments(basis), pull, anchor), start[1].shape[0], bias)
    return basis.E @ found.left, found.right, None if found.shift is None else basis.E @ found.shift


def objective(x, drifted, v, G, start, anchor, weight, shift):
    """The definition, token by token."""
    error = v - drifted @ weight.T - shift
    change = x @ (start[0] @ start[1]).T - x @ weight.T - shift
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


@pytest.mark.sampled(4)
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("anchor", [0.0, 0.7])
def test_the_factors_reach_what_an_optimiser_reaches(problem, anchor, bias, measured):
    x, drifted, W, G, start = problem
    v = x @ W.T + (x.square() @ W.T if measured else 0)
    left, right, shift = refitted(x, drifted, W, G, start, anchor, bias, v=v if measured else None)
    zero = torch.zeros(M, dtype=torch.float64)
    closed = objective(x, drifted, v, G, start, anchor, left @ right, zero if shift is None else shift).item()

    def loss(B, C, s):
        return objective(x, drifted, v, G, start, anchor, B @ C, s if bias else 0 * s)

    # From the anchor and from elsewhere: the landscape of rank-k matrices has saddles, but no other minima.
    brute = min(
        minimise(loss, *start, zero), minimise(loss, torch.randn_like(start[0]), torch.randn_like(start[1]), zero)
    )
    assert left.shape == (M, K)
    assert right.shape == (K, N)
    assert (shift is None) is not bias
    assert closed == pytest.approx(brute, rel=1e-6)


def test_a_strong_anchor_leaves_the_factors_what_they_were(problem):
    x, drifted, W, G, start = problem
    changes = []
    for anchor in (0.0, 1.0, 10.0, 1e9):
        left, right, shift = refitted(x, drifted, W, G, start, anchor, bias=True)
        changes.append((left @ right - start[0] @ start[1]).norm().item())
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] < 1e-6
    assert shift.abs().max() < 1e-6


def test_an_anchor_elsewhere_is_measured_in_its_own_moments(problem):
    x, drifted, W, G, start = problem
    A = torch.diag(torch.arange(1.0, N + 1, dtype=torch.float64))
    left, right, _ = refitted(x, drifted, W, G, start, 0.7, towards=(W, A))

    def loss(B, C):
        error, change = x @ W.T - drifted @ (B @ C).T, W - B @ C
        return ((error @ G) * error).sum(1).mean() + 0.7 * (G * (change @ A @ change.T)).sum()

    brute = min(minimise(loss, *start), minimise(loss, torch.randn_like(start[0]), torch.randn_like(start[1])))
    assert loss(left, right).item() == pytest.approx(brute, rel=1e-6)


def test_a_strong_anchor_elsewhere_is_the_two_sided_solution(problem):
    x, drifted, W, G, start = problem
    A = torch.diag(torch.arange(1.0, N + 1, dtype=torch.float64))
    left, right, _ = refitted(x, drifted, W, G, start, 1e9, towards=(W, A))
    B, C = two_sided(W, A, G).truncate(K)
    torch.testing.assert_close(left @ right, B @ C, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("m", "n", "width"), [(7, 4, 4), (4, 7, 4)])
def test_a_basis_of_what_the_weight_reaches_gives_the_same_factors(m, n, width):
    x, drifted, W, G, start = problem_of(m, n)
    A = x.T @ x / TOKENS + torch.eye(n)
    whole, reached = (OutputBasis.of(W, G, whole) for whole in (True, False))
    assert reached.F.shape == (width, n)
    for basis in (whole, reached):
        torch.testing.assert_close(basis.E.T @ G @ basis.E, torch.eye(basis.E.shape[1], dtype=torch.float64))
        torch.testing.assert_close(basis.E @ basis.F, W)
        torch.testing.assert_close(basis.dual, basis.E.T @ G)
    first, second = (refitted(x, drifted, W, G, start, 0.7, towards=(W, A), whole=whole) for whole in (True, False))
    torch.testing.assert_close(first[0] @ first[1], second[0] @ second[1])
    rows = rows_of(x, drifted, None, W.shape)
    errors = [solve_low_rank(rows.moments(basis), K).error(rows.moments(basis)) for basis in (whole, reached)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-9)


@pytest.mark.parametrize("measured", [False, True])
def test_moments_of_two_shares_mix_to_those_of_all(problem, measured):
    x, drifted, W, G, _ = problem
    basis = OutputBasis.of(W, G)
    parts = (slice(0, 10), slice(10, TOKENS), slice(0, TOKENS))
    shares = [rows_of(x[part], drifted[part], 2 * x[part] @ W.T if measured else None, (M, N)) for part in parts]
    first, second, everything = (share.moments(basis) for share in shares)
    mixed = first.mixed(second, shares[1].count / TOKENS)
    for name, value in vars(everything).items():
        torch.testing.assert_close(getattr(mixed, name), value)


def test_without_drift_and_anchor_it_is_the_two_sided_solution(problem):
    x, _, W, G, _ = problem
    basis, rows = OutputBasis.of(W, G), rows_of(x, x, None, (M, N))
    found = solve_low_rank(rows.moments(basis).shrunk(basis, 0.01, rows.level), K)
    B, C = two_sided(W, shrink(x.T @ x / TOKENS, 0.01), G).truncate(K)
    torch.testing.assert_close(basis.E @ found.left @ found.right, B @ C)
    assert found.shift is None


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_error_is_that_of_the_tokens(problem, measured, shifted):
    x, drifted, W, G, start = problem
    v = x @ W.T + (x.square() @ W.T if measured else 0)
    basis = OutputBasis.of(W, G)
    moments = rows_of(x, drifted, v if measured else None, (M, N)).moments(basis)
    shift = torch.randn(M, dtype=torch.float64) if shifted else None
    weight = start[0] @ start[1]
    error = v - drifted @ weight.T - (0 if shift is None else shift)
    expected = ((error @ G) * error).sum(1).mean().item()
    whitened = None if shift is None else basis.dual @ shift
    assert moments.error(basis.dual @ weight, whitened) == pytest.approx(expected)
    found = solve_low_rank(moments, K, bias=shifted)
    assert found.error(moments) == pytest.approx(moments.error(found.left @ found.right, found.shift))


def test_a_measured_target_of_the_dense_outputs_is_the_linear_one(problem):
    x, drifted, W, G, _ = problem
    basis = OutputBasis.of(W, G)
    linear, measured = (
        rows.moments(basis).shrunk(basis, 0.01, rows.level)
        for rows in (rows_of(x, drifted, None, (M, N)), rows_of(x, drifted, x @ W.T, (M, N)))
    )
    for name, value in vars(linear).items():
        torch.testing.assert_close(getattr(measured, name), value)


def test_the_optimum_among_all_matrices_is_least_squares(problem):
    x, drifted, W, G, _ = problem
    basis = OutputBasis.of(W, G)
    T = basis.E @ solve(rows_of(x, drifted, None, (M, N)).moments(basis))
    torch.testing.assert_close(T, torch.linalg.lstsq(drifted, x @ W.T).solution.T)


def test_fewer_tokens_than_features_are_an_ordinary_input(problem):
    x, drifted, W, G, _ = problem
    basis, rows = OutputBasis.of(W, G), rows_of(x[:3], drifted[:3], None, (M, N))
    for given in (rows.moments(basis), rows.moments(basis).shrunk(basis, 1e-4, rows.level)):
        found = solve_low_rank(given, K, bias=True)
        assert all(value.isfinite().all() for value in (found.left, found.right, found.shift))


def test_directions_without_data_are_drawn_to_the_dense_weight(problem):
    x, drifted, W, G, _ = problem
    x, drifted = x.clone(), drifted.clone()
    x[:, 0] = drifted[:, 0] = 0
    basis, rows = OutputBasis.of(W, G), rows_of(x, drifted, None, (M, N))
    weight = basis.E @ solve(rows.moments(basis).shrunk(basis, 1e-4, rows.level))
    torch.testing.assert_close(weight[:, 0], W[:, 0], rtol=0.05, atol=0.05)


def test_moments_in_single_precision_are_solved_in_double(problem):
    x, drifted, W, G, _ = problem
    moments = rows_of(x.float(), drifted.float(), None, (M, N)).moments(OutputBasis.of(W, G))
    assert {value.dtype for value in vars(moments).values()} == {torch.float64}


def test_rows_are_summed_over_batches(problem):
    x, drifted, _, _, _ = problem
    moments, w = RowMoments(N, torch.float64, x.device), torch.rand(TOKENS, dtype=torch.float64)
    for part in (slice(0, 12), slice(12, None)):
        moments.update(x[part], w[part, None] * x[part], w[part].sum())
    expected = sum(wt * torch.outer(xt, xt) for wt, xt in zip(w, x, strict=True)) / w.sum()
    torch.testing.assert_close(moments.compute(), expected)
    torch.testing.assert_close(moments.mean(), (w[:, None] * x).sum(0) / w.sum())
    assert moments.count == pytest.approx(w.sum().item())
    rows = rows_of(x, drifted, None, (M, N))
    assert rows.level.item() == pytest.approx(x.square().mean().item())


@pytest.mark.parametrize("measured", [False, True])
def test_a_token_of_weight_two_counts_as_two_tokens(problem, measured):
    x, drifted, W, G, _ = problem
    v = x.square() @ W.T if measured else None
    weights = torch.randint(0, 3, (TOKENS,), dtype=torch.float64)
    rows = DriftRows((M, N), measured, energy=True, inputs=True, dtype=x.dtype, device=x.device)
    rows.update(x, drifted, v, weights)
    often = weights.int()
    x, drifted, v = (None if t is None else t.repeat_interleave(often, dim=0) for t in (x, drifted, v))
    expected, basis = rows_of(x, drifted, v, (M, N)), OutputBasis.of(W, G)
    assert rows.count == expected.count == len(x)
    torch.testing.assert_close(rows.level, expected.level)
    torch.testing.assert_close(rows.inputs(), expected.inputs())
    for name, value in vars(expected.moments(basis)).items():
        torch.testing.assert_close(getattr(rows.moments(basis), name), value)


@pytest.mark.parametrize("which", range(3))
def test_rows_that_are_not_finite_are_refused(problem, which):
    x, drifted, W, _, _ = problem
    rows = [x, drifted, x @ W.T]
    rows[which] = rows[which].clone()
    rows[which][3, 2] = float("nan")
    with pytest.raises(FloatingPointError, match="finite activations"):
        rows_of(*rows, (M, N))
