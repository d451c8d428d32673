"""Choice of k rows of a matrix in which the other rows have bounded coefficients."""

import math

import torch
from torch import Tensor

#: Largest condition number (1-norm) at which Cholesky QR is used: orthonormal to 1e10 times the unit roundoff.
CHOLESKY_QR_CONDITION = 1e5


def select_rows(B: Tensor, bound: float = 2.0, max_swaps: int | None = None) -> tuple[Tensor, Tensor]:
    r"""Find k rows of ``B`` in which every other row is a combination with small coefficients.

    .. math:: B_\text{rest} = T B_\text{rows}, \qquad \max |T_{ij}| \le \text{bound}

    Such rows exist for every bound of at least one: the rows of largest volume. Small coefficients make the form safe
    in half precision and int8. The columns of B are orthonormalised first. T depends only on the span of B, so bad
    scaling and conditioning of its columns do not enter the search (see :func:`select_basis_rows`).

    Args:
        B: Matrix of full column rank, shape (m, k) with k <= m, any floating dtype, on a device that has float64.
        bound: Largest coefficient allowed in absolute value, above 1.
        max_swaps: Largest number of row exchanges; None for the number that is always enough.

    Returns:
        The chosen rows in ascending order, shape (k,), int64, and the coefficients T of the other rows (also
        in ascending order, see :func:`other_rows`), shape (m - k, k), float64. Both are on the device of B.

    Raises:
        ValueError: If B is not a finite matrix with k <= m, is rank deficient in float64, or bound <= 1.
        RuntimeError: If max_swaps exchanges were not enough.
    """
    Q, R = orthonormal_basis(B)
    if _condition(R) * torch.finfo(R.dtype).eps * len(B) >= 1:
        raise ValueError(
            f"B must have full column rank, but the {B.shape[1]} columns of this {tuple(B.shape)} matrix are "
            "linearly dependent to float64 precision. Drop the dependent columns, that is, use a lower rank."
        )
    return select_basis_rows(Q, bound, max_swaps)


def orthonormal_basis(B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the QR decomposition of ``B`` in float64, by the Cholesky factor of its Gram matrix if that is accurate.

    Cholesky QR is three large operations. It takes half the time of Householder QR and has no hundreds of small
    parallel steps, which become fifty times as slow when other processes share the cores. But it squares the condition
    number, so matrices that stay ill-conditioned after scaling their columns go through Householder QR.

    Args:
        B: Matrix of shape (m, k), k <= m. Its columns may be scaled arbitrarily, dependent or zero.

    Returns:
        Q (m, k) with columns orthonormal to 1e-5, and to rounding if B is ill-conditioned, and the upper triangular
        R (k, k): B = Q R to rounding, column by column. The span of Q contains the span of B.

    Raises:
        ValueError: If B is not a matrix with 1 <= k <= m, or holds NaN or infinity.
    """
    if B.ndim != 2 or not 1 <= B.shape[1] <= B.shape[0]:
        raise ValueError(f"Expected a matrix of shape (m, k) with 1 <= k <= m, got shape {tuple(B.shape)}.")
    work = B.detach().double()
    # By the largest entry, which shows NaN and infinity; the squares of a 2-norm could overflow and underflow.
    scale = torch.linalg.vector_norm(work, math.inf, dim=0)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("Expected a finite matrix, got NaN or infinity. Check the statistics behind it.")
    scale = torch.where(scale > 0, scale, 1.0)
    work = work / scale
    R, info = torch.linalg.cholesky_ex(work.T @ work, upper=True)
    if int(info) == 0 and _condition(R) < CHOLESKY_QR_CONDITION:
        Q = torch.linalg.solve_triangular(R, work, upper=True, left=False)
    else:
        Q, R = torch.linalg.qr(work)
    return Q, R * scale


def select_basis_rows(Q: Tensor, bound: float = 2.0, max_swaps: int | None = None) -> tuple[Tensor, Tensor]:
    """Find the rows of :func:`select_rows` for a ``Q`` whose columns are orthonormal already.

    LU with partial pivoting gives the first choice, which for most matrices is final. Then, as long as some |T_ij| >
    bound, row i takes the place of row j, and |det Q_rows| grows by |T_ij|. A volume is at most 1 (Hadamard), so log(1
    / first volume) / log(bound) exchanges are always enough.

    References:
        M. Gu and S. C. Eisenstat (1996), Efficient algorithms for computing a strong rank-revealing QR
        factorization, SIAM J. Sci. Comput. 17(4).
        S. A. Goreinov, I. V. Oseledets, D. V. Savostyanov, E. E. Tyrtyshnikov and N. L. Zamarashkin (2010),
        How to find a good submatrix, in: Matrix Methods: Theory, Algorithms, Applications (the maxvol
        iteration).

    Args:
        Q: Matrix with orthonormal columns, shape (m, k), float64.
        bound: Largest coefficient allowed in absolute value, above 1.
        max_swaps: Largest number of row exchanges; None for the number that is always enough.

    Returns:
        The chosen rows (k,), ascending, int64, and the coefficients of the others (m - k, k).

    Raises:
        ValueError: If bound <= 1.
        RuntimeError: If max_swaps exchanges were not enough.
    """
    if not bound > 1:
        raise ValueError(f"Expected a bound above 1 (at 1 the exchanges may never end), got {bound}.")
    k = Q.shape[1]
    order, T, log_volume = _lu_choice(Q)
    # The slack covers the rounding of the volume.
    budget = math.ceil(-log_volume / math.log(bound)) + k if max_swaps is None else max_swaps
    while swaps := _exchange(T, order, bound, budget):
        budget -= swaps
        # The exchanges add up rounding errors, so the final T is solved for again.
        T = torch.linalg.solve(Q[order[:k]], Q[order[k:]], left=False)
    rows, by_row = order[:k].sort()
    _, by_rest = order[k:].sort()
    return rows, T.index_select(0, by_rest).index_select(1, by_row)


def other_rows(rows: Tensor, count: int) -> Tensor:
    """Return the indices below ``count`` that are not in ``rows``, ascending.

    Args:
        rows: Distinct indices, shape (k,).
        count: Number of rows of the whole matrix.

    Returns:
        Shape (count - k,), int64, on the device of rows.
    """
    left = torch.ones(count, dtype=torch.bool, device=rows.device)
    left[rows] = False
    return left.nonzero().squeeze(1)


def _condition(R: Tensor) -> float:
    """Return the condition number of a triangular matrix (k, k) in the 1-norm, after scaling its columns."""
    if not bool(R.diagonal().all()):
        return math.inf
    R = R / R.abs().amax(dim=0)
    inverse = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
    condition = float(torch.linalg.matrix_norm(R, 1) * torch.linalg.matrix_norm(inverse, 1))
    return condition if math.isfinite(condition) else math.inf


def _lu_choice(Q: Tensor) -> tuple[Tensor, Tensor, float]:
    """Choose rows by partial pivoting; return all rows with the k chosen first (m,), T (m - k, k), log |det Q_rows|."""
    m, k = Q.shape
    LU, pivots = torch.linalg.lu_factor(Q)
    order = list(range(m))
    for j, p in enumerate(pivots.tolist()):
        order[j], order[p - 1] = order[p - 1], order[j]  # LAPACK counts from 1
    T = torch.linalg.solve_triangular(LU[:k], LU[k:], upper=False, left=False, unitriangular=True)
    return torch.tensor(order, device=Q.device), T, float(LU.diagonal().abs().log().sum())


def _exchange(T: Tensor, order: Tensor, bound: float, budget: int) -> int:
    """Exchange rows until max |T| <= bound, in place in T (m - k, k) and order (m,); return the count."""
    k = T.shape[1]
    swaps = 0
    while T.numel():
        i, j = divmod(int(T.abs().argmax()), k)
        pivot = float(T[i, j])
        if abs(pivot) <= bound:
            break
        if swaps >= budget:
            raise RuntimeError(
                f"Expected coefficients of at most {bound}, but up to {abs(pivot):.3g} are left when the allowed "
                "exchanges are used up. Raise max_swaps or the bound."
            )
        # Gauss-Jordan step on (i, j): the basis changes by one row, T by one rank.
        row, column = T[i].clone(), T[:, j].clone()
        T.addr_(column, row, alpha=-1 / pivot)
        T[i] = row / -pivot
        T[:, j] = column / pivot
        T[i, j] = 1 / pivot
        order[[j, k + i]] = order[[k + i, j]]
        swaps += 1
    return swaps
