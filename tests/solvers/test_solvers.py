from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_moments import full_moments, random_moments

from fasc_lightning.solvers import (
    available_methods,
    fasc,
    fasc_plain,
    get_solver,
    register_solver,
    shrink,
    solver_needs,
    square_root,
    two_sided,
)
from fasc_lightning.solvers._linalg import double_shrunk, tail_sums
from fasc_lightning.statistics import LayerMoments

#: Methods whose metric is the whole second moment of the inputs.
SEES_EVERY_TOKEN = {"fasc", "fasc-plain", "svd", "svd-llm"}
#: Methods that choose W' = W P with a projection P of the inputs.
PROJECTIONS = {"svd", "grad-svd", "fasc-eq6", "fasc-eq6-centred"}


def objective(W, B, C, A, G):
    """J = tr(G D A D^T), straight from its definition."""
    D = W - B @ C
    return torch.trace(G @ D @ A @ D.T).item()


@pytest.mark.parametrize(("m", "n"), [(48, 80), (80, 48), (64, 64)])
def test_factors_of_weights_in_float32_lose_what_factors_in_float64_lose(m, n):
    """Moments whose eigenvalues fall by six orders of magnitude, as those of a language model do."""
    W = torch.randn(m, n)
    scales = [torch.logspace(0, -3, d, dtype=torch.float64) for d in (n, m)]
    tokens = [torch.randn(500, d, dtype=torch.float64) * scale for d, scale in zip((n, m), scales, strict=True)]
    A, G = (rows.T @ rows / 500 for rows in tokens)
    short, long = two_sided(W, A, G), two_sided(W.double(), A, G)
    assert short.left.dtype == short.right.dtype == torch.float32
    torch.testing.assert_close(short.losses, long.losses, rtol=1e-9, atol=0)
    for k in range(0, min(m, n), 8):
        B, C = (factor.double() for factor in short.truncate(k))
        assert objective(W.double(), B, C, A, G) == pytest.approx(long.losses[k].item(), rel=1e-4)


@pytest.mark.parametrize(("m", "n"), [(5, 8), (8, 5), (6, 6), (1, 4), (4, 1)])
@pytest.mark.parametrize("method", ["fasc", "fasc-plain", "svd-llm", "svd"])
def test_losses_are_the_objective_of_the_factors(m, n, method):
    W = torch.randn(m, n, dtype=torch.float64)
    moments = random_moments(m, n)
    found = get_solver(method)(W, moments)
    r = min(m, n)
    assert found.losses.shape == (r + 1,)
    for k in range(r + 1):
        B, C = found.truncate(k)
        if method == "fasc":
            loss = objective(W, B, C, shrink(moments.coupled[0], 1e-4), shrink(moments.coupled[1], 0.05))
        elif method == "fasc-plain":
            loss = objective(W, B, C, shrink(moments.A, 1e-4), shrink(moments.G, 0.1))
        elif method == "svd-llm":
            loss = objective(W, B, C, shrink(moments.A, 1e-4), torch.eye(m, dtype=torch.float64))
        else:
            P = C.T @ C
            residual = torch.eye(n, dtype=torch.float64) - P
            loss = torch.trace(residual @ moments.A @ residual).item()
        assert loss == pytest.approx(found.losses[k].item(), rel=1e-8, abs=1e-8 * found.losses[0].item())


@pytest.mark.parametrize(("m", "n"), [(4, 6), (6, 4), (5, 5)])
def test_fasc_beats_every_perturbation_and_other_metrics(m, n):
    """Brute force: gradient descent on the factors from many starts never gets below the closed form."""
    W = torch.randn(m, n, dtype=torch.float64)
    moments = random_moments(m, n)
    A, G = shrink(moments.coupled[0], 1e-4), shrink(moments.coupled[1], 0.05)
    k = 2
    best = fasc(W, moments).losses[k].item()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        B = torch.randn(m, k, dtype=torch.float64, generator=generator).requires_grad_()
        C = torch.randn(k, n, dtype=torch.float64, generator=generator).requires_grad_()
        optimizer = torch.optim.LBFGS([B, C], max_iter=500, line_search_fn="strong_wolfe")

        def closure(B=B, C=C, optimizer=optimizer):
            optimizer.zero_grad()
            D = W - B @ C
            loss = torch.trace(G @ D @ A @ D.T)
            loss.backward()
            return loss

        optimizer.step(closure)
        reached = objective(W, B.detach(), C.detach(), A, G)
        assert reached >= best * (1 - 1e-9)
        assert reached <= best * 1.5 or seed > 0  # the search is a fair opponent


def test_fasc_agrees_with_scipy_square_roots():
    """The same optimum through symmetric square roots and scipy's SVD instead of Cholesky and eigh."""
    W = torch.randn(7, 5, dtype=torch.float64)
    moments = random_moments(7, 5)
    A, G = shrink(moments.coupled[0], 1e-4).numpy(), shrink(moments.coupled[1], 0.05).numpy()
    root_A, root_G = scipy.linalg.sqrtm(A).real, scipy.linalg.sqrtm(G).real
    U, s, Vt = scipy.linalg.svd(root_G @ W.numpy() @ root_A, full_matrices=False)
    k = 3
    expected = np.linalg.solve(root_G, U[:, :k] * s[:k]) @ Vt[:k] @ np.linalg.inv(root_A)
    B, C = fasc(W, moments).truncate(k)
    np.testing.assert_allclose((B @ C).numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        (method, shape)
        for method in sorted(set(available_methods()) - {"fasc-eq6-literal"})
        for shape in ((9, 6), (6, 9))
        if method not in PROJECTIONS or shape == (9, 6)  # else a projection to fewer dimensions than inputs
    ],
)
def test_full_rank_gives_the_weight_back(method, shape):
    W = torch.randn(*shape, dtype=torch.float64)
    found = get_solver(method)(W, random_moments(*shape, W=W))
    torch.testing.assert_close(found.left @ found.right, W, rtol=1e-7, atol=1e-7)


@settings(deadline=None, max_examples=20)
@given(scale_x=st.floats(-12, 6), scale_h=st.floats(-12, 6))
def test_scale_of_the_data_does_not_matter(scale_x, scale_h):
    torch.manual_seed(0)
    W = torch.randn(5, 7, dtype=torch.float64)
    moments = random_moments(5, 7)
    scaled = LayerMoments(moments.A * 10**scale_x, moments.G * 10**scale_h, moments.mean_x, moments.mean_h, 1)
    B, C = fasc_plain(W, moments).truncate(2)
    B2, C2 = fasc_plain(W, scaled).truncate(2)
    torch.testing.assert_close(B @ C, B2 @ C2, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shrinkage_moves_towards_the_mean_of_the_diagonal_and_leaves_its_argument(dtype):
    S = torch.randn(5, 5, dtype=dtype)
    before, full = S.clone(), S.double().numpy()
    expected = 0.7 * full + 0.3 * np.trace(full) / 5 * np.eye(5)
    np.testing.assert_allclose(double_shrunk(S, 0.3).numpy(), expected, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(shrink(S, 0.3).double().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(S, before)


@pytest.mark.parametrize("method", available_methods())
def test_singular_statistics_are_ordinary_input(method):
    """Fewer tokens than features, dead features, constant gradients, one sequence."""
    for m, n in ((6, 9), (9, 6)):
        W, x, h = torch.randn(m, n, dtype=torch.float32), torch.randn(3, n), torch.ones(3, m)
        x[:, 4] = 0
        h[:, 2] = 0
        found = get_solver(method)(W, full_moments(x, h, W))
        assert torch.isfinite(found.left).all()
        assert torch.isfinite(found.right).all()
        assert found.losses.dtype == torch.float64
        assert (found.losses.diff() <= 1e-12).all()
        if method in SEES_EVERY_TOKEN:
            # Three tokens span three directions: rank 3 reproduces the outputs that were seen.
            B, C = found.truncate(3)
            torch.testing.assert_close(
                (x.double() @ (B.double() @ C.double()).T).float(), x @ W.T, rtol=1e-2, atol=1e-2
            )


@pytest.mark.parametrize("method", available_methods())
def test_statistics_of_nothing_but_zeros_are_finite(method):
    W = torch.randn(4, 5)
    found = get_solver(method)(W, full_moments(torch.zeros(3, 5), torch.zeros(3, 4), W))
    assert torch.isfinite(found.left).all()
    assert torch.isfinite(found.right).all()
    assert torch.isfinite(found.losses).all()


def test_square_root_of_a_singular_matrix_is_floored():
    S = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    root = square_root(S)
    torch.testing.assert_close(root.L @ root.L.T, S, atol=1e-8, rtol=0)
    assert root.inverse is not None
    torch.testing.assert_close(root.L @ root.inverse, torch.eye(3, dtype=torch.float64))


def test_square_root_solves_match_inverses():
    S = random_moments(4, 4).A
    for root in (square_root(S), square_root(torch.zeros(4, 4, dtype=torch.float64))):
        B = torch.randn(4, 3, dtype=torch.float64)
        inverse = torch.linalg.inv(root.L)
        torch.testing.assert_close(root.solve_transposed(B), inverse.T @ B)


def test_tail_sums():
    assert tail_sums(torch.tensor([3.0, 2.0, 1.0])).tolist() == [6.0, 3.0, 1.0, 0.0]


def test_registry_names_what_it_has():
    published = {"asvd", "fisher-diag", "fwsvd", "gfwsvd", "grad-svd", "svd", "svd-llm", "weight-svd"}
    assert published | {"fasc", "fasc-eq6", "fasc-eq6-literal"} <= set(available_methods())
    assert available_methods() == sorted(available_methods())
    for lookup in (get_solver, solver_needs):
        with pytest.raises(ValueError, match=r"one of asvd, fasc, .*, weight-svd but got 'pca'"):
            lookup("pca")
    with pytest.raises(ValueError, match="registered already"):
        register_solver("fasc")(fasc_plain)
    register_solver("fasc", needs=["coupled"])(fasc)  # again, as when a cell of a notebook runs twice
    with pytest.raises(ValueError, match=r"among plain, coupled, C, .* but got 'hessian'"):
        register_solver("newton", needs=["hessian"])


def test_registry_knows_what_each_needs():
    expected = {"asvd": "abs_x", "fasc-eq6": "C", "fwsvd": "fisher_rows", "gfwsvd": "kronecker", "grad-svd": "saliency"}
    assert {method: solver_needs(method) for method in expected} == {m: {need, "plain"} for m, need in expected.items()}
    for method in ("fasc-plain", "fisher-diag", "svd", "svd-llm", "weight-svd"):
        assert solver_needs(method) == {"plain"}
    assert solver_needs("fasc") == {"coupled"}


@pytest.mark.parametrize("method", available_methods())
def test_solvers_read_what_they_say_and_refuse_moments_without_it(method):
    W = torch.randn(4, 5, dtype=torch.float64)
    full = random_moments(4, 5, W=W)
    plain = LayerMoments(full.A, full.G, full.mean_x, full.mean_h, full.tokens)
    needs = solver_needs(method) - {"plain"}
    enough = dataclasses.replace(plain, **{need: getattr(full, need) for need in needs})
    torch.testing.assert_close(get_solver(method)(W, enough).left, get_solver(method)(W, full).left)
    for need in needs:
        with pytest.raises(
            ValueError, match=rf"with `{need}`.* was not gathered.*HINT: FascCallback .* needs={{'{need}'"
        ):
            get_solver(method)(W, plain)
