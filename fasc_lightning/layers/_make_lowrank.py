"""Conversion of two factors to a low-rank layer."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fasc_lightning.layers._compressed_linear import CompressedLinear
from fasc_lightning.layers._layouts import Layout, auto_layout
from fasc_lightning.layers._lowrank import LowRankLinear
from fasc_lightning.layers._pivoted import PivotedLinear
from fasc_lightning.layers._pivoting import orthonormal_basis, other_rows, select_basis_rows


def make_lowrank(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    layout: Layout = "auto",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    bound: float = 2.0,
    side: Literal["out", "in"] | None = None,
) -> CompressedLinear:
    """Make the layer y = left right x + b.

    Computes in float64 on the device of ``left`` (not MPS), and draws no random numbers.

    Args:
        left: Left factor of W', shape (m, k). Dependent columns are allowed.
        right: Right factor of W', shape (k, n).
        bias: Bias b, shape (m,), or None.
        layout: "pivot", which stores less at every k < min(m, n), "factors", or "auto", which chooses by
            :func:`~fasc_lightning.layers.auto_layout`. "factors" makes left's columns orthogonal and gives both factors
            equal column and row norms, so that nothing cancels or overflows in half precision.
        dtype: Dtype of the layer; None for that of ``left``.
        device: Device of the layer; None for that of ``left``.
        bound: Largest coefficient of the pivot layout in absolute value, above 1.
        side: Side of the pivot layout; None for the smaller one.

    Returns:
        The layer, in training mode, with parameters that require gradients.

    Raises:
        ValueError: If shapes disagree, a factor is not finite, the rank does not fit the layout, or layout is unknown.
    """
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"Expected factors (m, k) and (k, n), got {tuple(left.shape)} and {tuple(right.shape)}.")
    (m, k), n = left.shape, right.shape[1]
    if bias is not None and bias.shape != (m,):
        raise ValueError(f"Expected a bias of shape ({m},), got {tuple(bias.shape)}.")
    if layout not in ("auto", "pivot", "factors"):
        raise ValueError(f'Expected layout "auto", "pivot" or "factors", got {layout!r}.')
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise ValueError("Expected finite factors, got NaN or infinity. Check the statistics they were computed from.")
    target: dict[str, Any] = {"dtype": dtype or left.dtype, "device": device or left.device}
    if layout == "auto" and auto_layout(m, n, k, target["dtype"]) == "factors":
        layout = "factors"

    def parameter(value: Tensor) -> nn.Parameter:
        return nn.Parameter(value.detach().to(**target).contiguous().clone())

    # Built on meta, so that no time is spent on random values and the caller's random state does not change.
    left, right = left.detach().double(), right.detach().to(left.device, torch.float64)
    if layout == "factors":
        factored = LowRankLinear(n, m, k, bias is not None, device="meta")
        factor_out, factor_in = _balance(left, right)
        factored.factor_out.weight, factored.factor_in.weight = parameter(factor_out), parameter(factor_in)
        if bias is not None:
            factored.factor_out.bias = parameter(bias)
        return factored

    pivoted = PivotedLinear(n, m, k, bias is not None, side=side, device="meta")
    out = pivoted.side == "out"
    # An orthonormal basis rather than `left` itself: it has full rank even where columns vanished in the solver.
    rows, T = select_basis_rows(orthonormal_basis(left if out else right.T)[0], bound)
    rest = other_rows(rows, m if out else n)
    order = torch.cat([rows, rest])
    pivoted.basis.weight = parameter(left[rows] @ right if out else left @ right[:, rows])
    pivoted.coefficients.weight = parameter(T if out else T.T)
    pivoted.permutation = (order.argsort() if out else order).to(target["device"], torch.int32)
    if bias is not None and out:
        bias = bias.to(rows.device)
        pivoted.pivot_bias, pivoted.coefficients.bias = parameter(bias[rows]), parameter(bias[rest])
    elif bias is not None:
        pivoted.basis.bias = parameter(bias)
    return pivoted


def _balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product: orthogonal columns (m, k), each as long as its row of the other (k, n)."""
    Q, R = orthonormal_basis(left)
    rows = R @ right
    norms = rows.norm(dim=1)
    scale = norms.sqrt()
    return Q * scale, rows * torch.where(norms > 0, 1 / scale, 0.0)[:, None]
