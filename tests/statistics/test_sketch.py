from __future__ import annotations

import math

import pytest
import torch

from fasc_lightning.statistics import Moments, Sketch, apply, congruence, diagonal_moment, packed_size
from fasc_lightning.statistics._nystrom import NystromMoment
from fasc_lightning.statistics._sketch import (
    BLOCK,
    NONZEROS,
    PROBES,
    add_gaussian_,
    add_range_,
    apply_transposed,
    gaussian_rows,
    nystrom,
    probe_signs,
    sparse_signs,
)


def dense_omega(d: int, s: int, seed: int) -> torch.Tensor:
    columns, values = sparse_signs(d, s, seed)
    omega = torch.zeros(d, s, dtype=torch.float64)
    for row in range(d):
        for column, value in zip(columns[:, row].tolist(), values[:, row].tolist(), strict=True):
            omega[row, column] += value
    return omega


def decaying(d: int, tokens: int, seed: int = 0, power: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    scales = torch.arange(1, d + 1, dtype=torch.float64) ** -power
    return torch.randn(tokens, d, generator=generator, dtype=torch.float64) * scales @ basis.T


def sums_of(sketch: Sketch, X: torch.Tensor) -> torch.Tensor:
    return sketch.add_(torch.zeros(sketch.numbers, dtype=X.dtype), X)


def test_every_row_has_its_signs_in_different_columns_and_no_column_is_empty():
    omega = dense_omega(100, 20, seed=3)
    assert (omega.abs().sum(1) == NONZEROS).all()
    assert set(omega.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert (omega.abs().sum(0) > 0).all()


def test_a_seed_gives_one_omega_and_another_seed_another():
    assert torch.equal(dense_omega(30, 9, 1), dense_omega(30, 9, 1))
    assert not torch.equal(dense_omega(30, 9, 1), dense_omega(30, 9, 2))


def test_products_without_omega_are_those_with_it():
    Z = torch.randn(50, 7, dtype=torch.float64)
    torch.testing.assert_close(apply_transposed(Z, 12, 5), dense_omega(50, 12, 5).T @ Z)


def test_the_range_sketch_is_the_moment_times_omega_and_probes():
    X = torch.randn(40, 30, dtype=torch.float64)
    Y = add_range_(torch.zeros(30, 10 + PROBES, dtype=torch.float64), X, 10, 7, weight=0.5)
    random = torch.cat([dense_omega(30, 10, 7), probe_signs(30, 7).double()], 1)
    torch.testing.assert_close(Y, 0.5 * X.T @ X @ random)


def test_nystrom_is_the_textbook_formula():
    A = (lambda X: X.T @ X)(decaying(60, 200))
    omega = dense_omega(60, 20, 2)
    textbook = A @ omega @ torch.linalg.inv(omega.T @ A @ omega) @ omega.T @ A
    F = nystrom(A @ omega, A.diagonal(), 2)
    torch.testing.assert_close(F @ F.T, textbook, rtol=1e-9, atol=1e-9)


def test_truncated_nystrom_is_the_best_approximation_of_the_whole_one():
    A = (lambda X: X.T @ X)(decaying(60, 200))
    Y = A @ dense_omega(60, 20, 2)
    whole, cut = (nystrom(Y, A.diagonal(), 2, rank) for rank in (None, 5))
    values, Q = torch.linalg.eigh(whole @ whole.T)
    torch.testing.assert_close(cut @ cut.T, Q[:, -5:] * values[-5:] @ Q[:, -5:].T, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_moment_of_lower_rank_than_the_sketch_comes_back_whole(dtype):
    generator = torch.Generator().manual_seed(0)
    X = (torch.randn(300, 6, generator=generator) @ torch.randn(6, 80, generator=generator)).to(dtype)
    sketch = Sketch(80, 20, 1)
    sums = sums_of(sketch, X)
    A = X.double().T @ X.double()
    accuracy = 1e-4 if dtype == torch.float32 else 1e-9
    assert (sketch.second_moment(sums).dense() - A).norm() < accuracy * A.norm()
    assert sketch.error(sums) < accuracy


def test_nystrom_error_is_within_the_bound_of_tropp_in_the_mean():
    # E|A - A_hat|_* <= (1 + r / (s - r - 1)) sum of the eigenvalues beyond r, for every r < s - 1 (Gaussian Omega)
    d, s = 120, 30
    A = (lambda X: X.T @ X)(decaying(d, 400))
    spectrum = torch.linalg.eigvalsh(A).flip(0)
    bound = min((1 + r / (s - r - 1)) * spectrum[r:].sum() for r in range(s - 1))
    errors = []
    for seed in range(8):
        F = nystrom(A @ dense_omega(d, s, seed), A.diagonal(), seed)
        errors.append((A - F @ F.T).trace())
    assert torch.stack(errors).mean() < 1.1 * bound
    assert torch.stack(errors).min() > spectrum[s:].sum() * (1 - 1e-9)  # no better than the best of that rank


def test_the_rebuilt_moment_is_positive_and_has_the_exact_diagonal():
    X = decaying(64, 500).float()
    sketch = Sketch(64, 16)
    S = sketch.second_moment(sums_of(sketch, X))
    A = X.double().T @ X.double()
    torch.testing.assert_close(S.diagonal(), A.diagonal(), rtol=1e-4, atol=1e-5 * float(A.diagonal().max()))
    assert torch.linalg.eigvalsh(S.dense())[0] > -1e-9 * A.norm()


def test_the_diagonal_is_what_saves_a_flat_tail():
    X = torch.randn(2000, 64, dtype=torch.float64) * torch.linspace(0.5, 2, 64, dtype=torch.float64)
    sketch = Sketch(64, 16)
    S, A = sketch.second_moment(sums_of(sketch, X)), X.T @ X
    alone = S.factor @ S.factor.T
    beside = alone + (A.diagonal() - alone.diagonal()).diag()
    assert (S.dense() - A).norm() < 0.9 * (beside - A).norm() < 0.7 * (alone - A).norm()


def test_streams_merge_by_adding():
    X = torch.randn(50, 30, dtype=torch.float64)
    for kind in ("range", "gaussian"):
        sketch = Sketch(30, 9, 4, kind)
        parts = sums_of(sketch, X[:20]) + sums_of(sketch, X[20:])
        torch.testing.assert_close(parts, sums_of(sketch, X))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_square_of_the_error_estimate_has_no_bias(power, dtype):
    ratios = []
    for seed in range(24):
        X = decaying(80, 300, seed, power).to(dtype)
        sketch = Sketch(80, 20, seed)
        S, A = sketch.second_moment(sums_of(sketch, X)), X.double().T @ X.double()
        ratios.append(S.error / float((S.dense() - A).norm() / S.norm()))
    squares = torch.tensor(ratios).square()
    # Two and a half standard errors of the mean, as they come out.
    assert abs(squares.mean() - 1) < 2.5 * squares.std() / len(squares) ** 0.5 + 0.02
    assert all(0.4 < ratio < 2 for ratio in ratios)


def test_nothing_but_zeros_comes_back_as_zeros():
    sketch = Sketch(20, 5)
    sums = sums_of(sketch, torch.zeros(3, 20))
    assert not sketch.second_moment(sums).dense().any()
    assert sketch.error(sums) == 0


def noisy_low_rank(d: int, tokens: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = (torch.randn(shape, generator=generator) for shape in ((tokens, rank), (rank, d), (tokens, d)))
    left, right, noise = parts
    return left @ right + 0.1 * noise


def correlation_error(S: NystromMoment, X: torch.Tensor) -> float:
    """How far off the rebuilt moment is, every feature at the scale that it has."""
    A = X.double().T @ X.double()
    scale = A.diagonal().rsqrt()
    error = scale[:, None] * (S.dense() - A) * scale
    return float(error.norm() / (scale[:, None] * A * scale).norm())


SCALES = {
    "all alike": torch.ones(128),
    "an outlier": torch.ones(128).index_fill(0, torch.tensor([3]), 1e4),
    "over six decades": torch.logspace(-3, 3, 128),
    "tiny": torch.full((128,), 1e-12),
    "huge": torch.full((128,), 1e12),
}


@pytest.mark.parametrize("name", SCALES)
def test_float32_sums_lose_nothing_whatever_the_scales_of_the_features(name):
    X = noisy_low_rank(128, 4096, 16) * SCALES[name]
    single, double = Sketch(128, 40, 1), Sketch(128, 40, 1)
    sums = torch.zeros(single.numbers)
    for part in X.split(256):
        single.add_(sums, part)
    expected = correlation_error(double.second_moment(sums_of(double, X.double())), X)
    assert correlation_error(single.second_moment(sums), X) < 1.1 * expected


@pytest.mark.parametrize("tokens", [1, 20, 200])
@pytest.mark.parametrize("size", [3, 16, 60])
def test_the_diagonal_is_exact_and_all_is_finite_with_few_tokens_and_dead_features(tokens, size):
    X = noisy_low_rank(64, tokens, 8) * (torch.arange(64) % 3 > 0) * torch.logspace(-2, 2, 64)
    sketch = Sketch(64, size, 1)
    S = sketch.second_moment(sums_of(sketch, X))
    assert torch.isfinite(S.dense()).all()
    assert (S.weights >= 0).all()
    A = X.double().T @ X.double()
    torch.testing.assert_close(S.diagonal(), A.diagonal(), rtol=1e-5, atol=0)
    if tokens == 1 and size > 3:
        assert (S.dense() - A).norm() < 1e-5 * A.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_half_precision_are_summed_in_the_accumulators(dtype):
    x = noisy_low_rank(64, 300, 6).to(dtype)
    sketched, exact = Moments(64, sketch=Sketch(64, 24, 1)), Moments(64)
    for part in x.split(100):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sketched.update(part)
            exact.update(part)
    S, A = sketched.second_moment(), exact.compute().double()
    assert isinstance(S, NystromMoment)
    torch.testing.assert_close(S.diagonal(), A.diagonal(), rtol=1e-5, atol=0)
    assert (S.dense() - A).norm() < 2e-3 * A.norm()
    assert S.error < 2e-3


def test_the_parts_in_which_rows_come_change_nothing_but_rounding():
    X = noisy_low_rank(64, 300, 6)
    found = []
    for size in (7, 64, 300):
        moments = Moments(64, sketch=Sketch(64, 16, 1))
        for part in X.split(size):
            moments.update(part)
        found.append(moments.second_moment().dense())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def test_what_was_moved_away_leaves_what_never_was_there():
    X = noisy_low_rank(64, 300, 6)
    sketch = Sketch(64, 16, 1)
    moved, stayed, others = (Moments(64, sketch=sketch) for _ in range(3))
    moved.update(X)
    others.update(X[20:])
    stayed.update(X[:20])
    rest = moved.subtract_(others).second_moment()
    torch.testing.assert_close(rest.diagonal(), stayed.second_moment().diagonal(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rest.dense(), stayed.second_moment().dense(), rtol=1e-2, atol=1e-2)
    moved.subtract_(stayed)
    assert not any(value.any() for value in moved.sums.values())


def test_the_gaussian_sketch_is_the_projected_moment_and_lifts_as_printed(monkeypatch):
    monkeypatch.setattr("fasc_lightning.statistics._sketch.BLOCK", 16)  # several blocks, the last of them short
    d, s = 40, 8
    X = torch.randn(30, d, dtype=torch.float64)
    R = torch.cat([gaussian_rows(start, min(16, d - start), s, 5) for start in range(0, d, 16)]).double()
    core = add_gaussian_(torch.zeros(s, s, dtype=torch.float64), X, 5)
    torch.testing.assert_close(core, R.T @ X.T @ X @ R)
    sketch = Sketch(d, s, 5, "gaussian")
    S = sketch.second_moment(sums_of(sketch, X))
    torch.testing.assert_close(S.dense(), R @ core @ R.T)


def test_gaussian_blocks_are_of_different_numbers():
    assert not torch.equal(gaussian_rows(0, 4, 3, 1), gaussian_rows(BLOCK, 4, 3, 1))


def test_a_quarter_of_the_width_takes_half_of_the_exact_memory():
    for d in (2048, 4096, 14336):
        assert Sketch(d, d // 4).numbers < 0.5 * packed_size(d)


@pytest.mark.parametrize("size", [0, 10, 11])
def test_a_sketch_as_wide_as_the_moment_is_refused(size):
    with pytest.raises(ValueError, match=f"from 1 to 9 for a moment of width 10 but got {size}"):
        Sketch(10, size)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="range, gaussian but got 'srht'"):
        Sketch(10, 3, kind="srht")  # type: ignore[arg-type]


def test_the_gaussian_sketch_has_no_error_estimate():
    sketch = Sketch(10, 3, kind="gaussian")
    assert math.isnan(sketch.error(sums_of(sketch, torch.randn(5, 10))))


def test_a_congruence_needs_no_square():
    X = decaying(30, 90)
    sketch = Sketch(30, 10)
    S = sketch.second_moment(sums_of(sketch, X))
    W = torch.randn(4, 30, dtype=torch.float64)
    torch.testing.assert_close(congruence(W, S), W @ S.dense() @ W.T)
    torch.testing.assert_close(congruence(W, S.shrunk(0.1)), W @ S.shrunk(0.1).dense() @ W.T)
    shrunk = 0.9 * S.dense() + 0.1 * S.dense().diagonal().mean() * torch.eye(30)
    torch.testing.assert_close(S.shrunk(0.1).dense(), shrunk)
    torch.testing.assert_close(S.apply(W.T), S.dense() @ W.T)
    torch.testing.assert_close(S.norm(), S.dense().norm(), rtol=0.2, atol=0)


def test_a_diagonal_moment_is_the_matrix_with_that_diagonal():
    values = torch.tensor([3.0, 0.0, 2.0], dtype=torch.float64)
    S, W = diagonal_moment(values), torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(S.dense(), values.diag())
    torch.testing.assert_close(congruence(W, S), W @ values.diag() @ W.T)
    torch.testing.assert_close(apply(S, W.T), values.diag() @ W.T)
