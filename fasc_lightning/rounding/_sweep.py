"""Calibrated rounding of a matrix: errors of earlier columns are corrected by later columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fasc_lightning.layers import SCALE_DTYPE, Grid, Rounded

#: Columns whose corrections wait for one matrix product. Each column corrects the rest of its block at once, which is
#: bound by memory: with 64, coordinate descent takes 1.6 times as long at 576 inputs, 2.6 times at 5,632 outputs.
BLOCK = 16

#: Share of the mean diagonal of A that is added to the diagonal. GPTQ (Frantar et al. 2023) takes 0.01, which fits the
#: codes to the tokens of A too closely: at 3 bits KL on other text is 5 % higher than with 0.05 (docs/bytes.md).
DAMPING = 0.05


@dataclass(frozen=True)
class ColumnMetric:
    """A = E[x x^T] prepared for rounding: damped, with columns in the order of rounding.

    Attributes:
        A: Damped A, shape (n, n), float32.
        order: Columns by descending diagonal of A, shape (n,).
        correction: In that order, upper triangular and unit, shape (n, n), float32. Row j holds what an
            error of 1 in column j adds to the later columns.
    """

    A: Tensor
    order: Tensor
    correction: Tensor

    @classmethod
    def of(cls, A: Tensor, damping: float = DAMPING) -> ColumnMetric:
        """Prepare A, shape (n, n), with ``damping`` times the mean of its diagonal added to the diagonal."""
        A, mean = A.to(torch.float32, copy=True), A.diagonal().mean()
        A.diagonal().add_(damping * mean if mean > 0 else 1.0)
        order = A.diagonal().argsort(descending=True, stable=True)
        # A = M M^T with M upper triangular is the Cholesky factorisation of the flipped matrix. The best correction of
        # later columns for an error in column j is row j of M^-1, divided by its diagonal.
        flipped = A[order.flip(0)][:, order.flip(0)]
        L, failed = torch.linalg.cholesky_ex(flipped)
        if failed:  # the damping bounds the condition, but not for every width in float32
            L = torch.linalg.cholesky(flipped.double())
        eye = torch.eye(len(A), dtype=L.dtype, device=A.device)
        inverse = torch.linalg.solve_triangular(L, eye, upper=False).flip(0, 1)
        return cls(A, order, (inverse / inverse.diagonal()[:, None]).float())


def sweep(W: Tensor, metric: ColumnMetric, grid: Grid, scale: Tensor, zero: Tensor) -> Tensor:
    """Round W column by column; each later column takes over the errors of earlier columns as well as it can.

    For rows d of D = W - W' this lowers d A d^T: GPTQ (Frantar et al. 2023), which is LDLQ (Chee et al. 2023).

    Args:
        W: Matrix, shape (m, n), float32.
        metric: The metric.
        grid: The grid.
        scale: Shape (m, groups).
        zero: Shape (m, groups).

    Returns:
        Codes, uint8, shape (m, n).
    """
    n = W.shape[1]
    columns = grid.columns(n, W.device)[metric.order]
    left = W.T[metric.order].contiguous()  # (n, m): a column is contiguous
    S, Z = scale.T.contiguous(), zero.T.to(W.dtype).contiguous()
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    U, top = metric.correction, grid.levels - 1
    # Rows as lists, because an index of a tensor takes as long as the operations on a row.
    wanted, scales, zeros = left.unbind(), S.unbind(), Z.unbind()
    found, missing, group = codes.unbind(), errors.unbind(), columns.tolist()
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        for j in range(start, end):
            s, z = scales[group[j]], zeros[group[j]]
            q = torch.div(wanted[j], s, out=found[j]).round_().add_(z).clamp_(0, top)
            torch.addcmul(wanted[j], q - z, s, value=-1, out=missing[j])
            if j + 1 < end:
                left[j + 1 : end].addr_(U[j, j + 1 : end], missing[j], alpha=-1)
        if end < n:
            left[end:].addmm_(U[start:end, end:].T, errors[start:end], alpha=-1)
    return codes[metric.order.argsort()].T.to(torch.uint8).contiguous()


def refine(W: Tensor, rounded: Rounded, metric: ColumnMetric, passes: int = 1, scales: bool = True) -> Rounded:
    """Lower d A d^T by coordinate descent: each code, and then its group's scale, takes its best value given the rest.

    Args:
        W: Matrix, shape (m, n), float32.
        rounded: W on a grid.
        metric: The metric.
        passes: Number of times that all groups are visited.
        scales: Whether scales move, too.
    """
    grid, A, n = rounded.grid, metric.A, W.shape[1]
    S, Z = rounded.scale.T.clone(), rounded.zero.T.to(W.dtype)
    size = n if grid.group is None else grid.group
    bounds = [(g, a, min(a + size, n)) for g, a in enumerate(range(0, n, size))]
    V = rounded.codes.T.to(W.dtype)  # (n, m): W' = scale * V once zero points are subtracted
    for g, a, b in bounds:
        V[a:b] -= Z[g]
    slope = A @ (W.T - torch.cat([V[a:b] * S[g] for g, a, b in bounds]))  # A d, (n, m)
    moves, inverse = torch.empty_like(V), (1 / A.diagonal()).tolist()
    values, slopes, moved = V.unbind(), slope.unbind(), moves.unbind()  # as in the sweep
    for _ in range(passes):
        for g, a, b in bounds:
            s, low, high = S[g].clone(), -Z[g], grid.levels - 1 - Z[g]
            before = V[a:b] * s
            for start in range(a, b, BLOCK):
                end = min(start + BLOCK, b)
                inside = slope[start:end]
                for j in range(start, end):
                    v = torch.addcdiv(values[j], slopes[j], s, value=inverse[j]).round_().clamp_(low, high)
                    torch.mul(torch.sub(v, values[j], out=moved[j]), s, out=moved[j])
                    values[j].copy_(v)
                    inside.addr_(A[j, start:end], moved[j], alpha=-1)
                slope[a:start].addmm_(A[a:start, start:end], moves[start:end], alpha=-1)
                slope[end:b].addmm_(A[end:b, start:end], moves[start:end], alpha=-1)
            if scales:
                S[g] = best_scale(V[a:b], A[a:b, a:b], slope[a:b], s)
                slope[a:b].addmm_(A[a:b, a:b], V[a:b] * (s - S[g]))
            change = before - V[a:b] * S[g]
            slope[:a].addmm_(A[:a, a:b], change)
            slope[b:].addmm_(A[b:, a:b], change)
    for g, a, b in bounds:
        V[a:b] += Z[g]
    return replace(rounded, codes=V.T.to(torch.uint8).contiguous(), scale=S.T.contiguous())


def best_scale(V: Tensor, A: Tensor, slope: Tensor, scale: Tensor) -> Tensor:
    """Return the scale of a group that minimises d A d^T given all other groups; one that is not positive stays.

    Args:
        V: Codes less zero points of the group, shape (inputs, m).
        A: Shape (inputs, inputs).
        slope: A d at the group's inputs, shape (inputs, m), with the present scale.
        scale: The present scale, shape (m,).
    """
    curvature = (V * (A @ V)).sum(0)
    found = scale + (V * slope).sum(0) / curvature
    found = found.to(SCALE_DTYPE).to(scale.dtype)
    return torch.where(torch.isfinite(found) & (found > 0), found, scale)
