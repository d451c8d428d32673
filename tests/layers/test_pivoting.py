import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasc_lightning.layers._pivoting import orthonormal_basis, other_rows, select_basis_rows, select_rows


def kahan(k: int, angle: float = 1.4) -> Tensor:
    """The matrix on which pivoting reveals least (Kahan 1966), transposed since rows are chosen here."""
    s, c = torch.tensor(angle, dtype=torch.float64).sin(), torch.tensor(angle, dtype=torch.float64).cos()
    upper = torch.eye(k, dtype=torch.float64) - c * torch.ones(k, k, dtype=torch.float64).triu(1)
    return (s ** torch.arange(k, dtype=torch.float64)[:, None] * upper).T


def wilkinson(m: int, k: int) -> Tensor:
    """Element growth of 2^(k - 1) under partial pivoting (Wilkinson 1965)."""
    B = torch.eye(m, k, dtype=torch.float64) - torch.ones(m, k, dtype=torch.float64).tril(-1)
    B[:, -1] = 1
    return B


def nasty(kind: str, m: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(m, k, dtype=torch.float64, generator=generator)
    if kind == "columns":
        return B * torch.logspace(-150, 150, k, dtype=torch.float64)
    if kind == "rows":
        # Not to 1e-12: a square draw whose own condition is 1e4 would then be singular to float64.
        return B * torch.logspace(0, -9, m, dtype=torch.float64)[torch.randperm(m, generator=generator)][:, None]
    if kind == "conditioned":
        mix = torch.randn(k, k, dtype=torch.float64, generator=generator)
        return B * torch.logspace(0, -6, k, dtype=torch.float64) @ mix
    if kind == "heavy":
        return B / torch.randn(m, k, dtype=torch.float64, generator=generator)
    if kind == "triangular":
        return B.tril()
    if kind == "kahan":
        return torch.cat([kahan(k), 0.1 * B[: m - k]])
    if kind == "wilkinson":
        return wilkinson(m, k)
    if kind == "repeated":
        return B[torch.arange(m) % max(k, m // 2)]
    return B


KINDS = ["normal", "columns", "rows", "conditioned", "heavy", "triangular", "kahan", "wilkinson", "repeated"]


def check(B: Tensor, rows: Tensor, T: Tensor, bound: float, tolerance: float = 1e-9) -> None:
    m, k = B.shape
    rest = other_rows(rows, m)
    assert rows.shape == (k,)
    assert T.shape == (m - k, k)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert sorted(rows.tolist() + rest.tolist()) == list(range(m))
    if m > k:
        assert T.abs().max() <= bound
        residual = (B[rest] - T @ B[rows]).abs().amax(dim=0)
        assert (residual <= tolerance * B.abs().amax(dim=0)).all()  # column by column: scales do not mix


@given(
    kind=st.sampled_from(KINDS),
    k=st.integers(1, 24),
    extra=st.integers(0, 40),
    bound=st.sampled_from([1.05, 2.0, 10.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_reconstructs_with_bounded_coefficients(kind, k, extra, bound, seed):
    B = nasty(kind, k + extra, k, seed)
    rows, T = select_rows(B, bound)
    check(B, rows, T, bound)


def test_exchanges_repair_what_partial_pivoting_leaves():
    B = nasty("kahan", 200, 100, 0)
    Q, _ = orthonormal_basis(B)
    with pytest.raises(RuntimeError, match="max_swaps"):
        select_basis_rows(Q, max_swaps=0)
    rows, T = select_basis_rows(Q)
    check(B, rows, T, 2.0)


def test_volume_is_near_the_largest_by_brute_force():
    from itertools import combinations

    B = nasty("normal", 9, 3, 7)
    best = max(abs(torch.linalg.det(B[list(c)])) for c in combinations(range(9), 3))
    rows, T = select_rows(B, 1.0001)
    # Goreinov et al.: a dominant submatrix holds at least k^(-k/2) of the largest volume.
    assert abs(torch.linalg.det(B[rows])) >= best * 3**-1.5
    assert torch.allclose(T, B[other_rows(rows, 9)] @ torch.linalg.inv(B[rows]), atol=1e-12)


def test_choice_does_not_depend_on_the_basis():
    B = nasty("normal", 40, 8, 1)
    mix = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).triu()
    rows, T = select_rows(B)
    mixed_rows, mixed_T = select_rows(B @ mix)
    assert torch.equal(rows, mixed_rows)
    assert torch.allclose(T, mixed_T, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_input_is_solved_in_float64(dtype):
    B = nasty("normal", 30, 6, 3).to(dtype)
    rows, T = select_rows(B)
    assert T.dtype == torch.float64
    check(B.double(), rows, T, 2.0, 1e-12)


def test_square_matrix_has_no_other_rows():
    rows, T = select_rows(torch.eye(5))
    assert rows.tolist() == list(range(5))
    assert T.shape == (0, 5)


@pytest.mark.parametrize("kind", ["zero", "duplicate", "combination", "kahan"])
def test_rank_deficiency_is_an_error(kind):
    B = nasty("normal", 20, 5, 0)
    if kind == "zero":
        B[:, 2] = 0
    elif kind == "duplicate":
        B[:, 3] = 1e-30 * B[:, 1]
    elif kind == "combination":
        B[:, 4] = B[:, 0] - 3 * B[:, 1]
    else:
        B = kahan(90, 1.0).T  # no diagonal entry of R gives it away
    with pytest.raises(ValueError, match=f"full column rank, but the {B.shape[1]} columns"):
        select_rows(B)


@pytest.mark.parametrize("kind", [*KINDS, "float32"])
def test_orthonormal_basis_is_a_qr_decomposition(kind):
    B = nasty(kind, 120, 60, 5)
    Q, R = orthonormal_basis(B.float() if kind == "float32" else B)
    assert torch.allclose(Q.T @ Q, torch.eye(60, dtype=torch.float64), atol=1e-5)
    assert torch.equal(R, R.triu())
    B = B.float().double() if kind == "float32" else B
    assert ((Q @ R - B).abs().amax(dim=0) <= 1e-12 * B.abs().amax(dim=0)).all()


def test_orthonormal_basis_completes_a_deficient_matrix():
    B = torch.zeros(6, 3)
    B[:, 0] = torch.arange(6.0)
    Q, R = orthonormal_basis(B)
    assert torch.allclose(Q.T @ Q, torch.eye(3, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(Q @ R, B.double(), atol=1e-14)


@pytest.mark.parametrize(
    ("B", "bound", "message"),
    [
        (torch.ones(3), 2.0, r"got shape \(3,\)"),
        (torch.ones(2, 3), 2.0, r"got shape \(2, 3\)"),
        (torch.full((3, 1), float("nan")), 2.0, "NaN"),
        (torch.eye(3), 1.0, r"got 1\.0"),
    ],
)
def test_bad_arguments(B, bound, message):
    with pytest.raises(ValueError, match=message):
        select_rows(B, bound)
