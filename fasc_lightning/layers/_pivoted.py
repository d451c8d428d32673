"""Pivot storage: a rank-k matrix as k of its own rows or columns and the coefficients of the others."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.jit import is_scripting
from typing_extensions import override

from fasc_lightning.layers._compressed_linear import CompressedLinear, matrix_of
from fasc_lightning.layers._inference import (
    is_eager,
    may_be_direct,
    permute_features,
    pivot_columns,
    pivot_rows,
    weight_and_bias,
)
from fasc_lightning.layers._layouts import pivot_cost


class PivotedLinear(CompressedLinear):
    """Rank-k layer as k rows or columns of W' and the coefficients of the others, k (m + n - k) numbers.

    ``side="out"`` keeps rows: z = W_p x are k of the outputs, and T z the other m - k. ``side="in"`` keeps columns:
    y = W_c (x_p + T x_rest). Both cost the same. The side decides whether outputs or inputs are permuted.

    With ``side="out"``, the bias of the pivot outputs is the parameter ``pivot_bias``, added after T has read z.
    Folding it into ``basis``, and its image under T out of the other bias, would save that addition, about 1 % of a
    forward. But large biases, as of Qwen2's keys, would then cancel in half precision. All other biases are part of a
    matrix product.

    Args:
        in_features: n.
        out_features: m.
        rank: k, at most min(m, n) and below the number of features of the permuted side.
        bias: Whether there is a bias.
        side: "out" (rows) or "in" (columns); None for the smaller side (:func:`smaller_side`).
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        basis: Holds the rows W_p (k, n) or the columns W_c (m, k).
        coefficients: Holds T, (m - k, k) or (k, n - k).
        permutation: int32 buffer, in the state dict because the weights depend on it. Position of each output in
            [z, T z] (m,), or input at each position of [x_p, x_rest] (n,).
    """

    layout = "pivot"
    cost = staticmethod(pivot_cost)
    permutation: Tensor
    pivot_bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        side: Literal["out", "in"] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank)
        if side not in ("out", "in", None):
            raise ValueError(f'Expected side "out", "in" or None, got {side!r}.')
        self.side = side or smaller_side(out_features, in_features)
        permuted = out_features if self.side == "out" else in_features
        if rank >= permuted:
            raise ValueError(
                f'Expected a rank below {permuted}, the features that side="{self.side}" permutes, got '
                f"{rank}. At full rank nothing is saved: keep the dense layer."
            )
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if self.side == "out":
            self.basis = nn.Linear(in_features, rank, bias=False, **options)
            self.coefficients = nn.Linear(rank, out_features - rank, bias=bias, **options)
        else:
            self.basis = nn.Linear(rank, out_features, bias=bias, **options)
            self.coefficients = nn.Linear(in_features - rank, rank, bias=False, **options)
        has_pivot_bias = bias and self.side == "out"
        self.register_parameter("pivot_bias", nn.Parameter(torch.zeros(rank, **options)) if has_pivot_bias else None)
        self.register_buffer("permutation", torch.arange(permuted, dtype=torch.int32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        if not is_scripting():
            basis, coefficients = self._modules["basis"], self._modules["coefficients"]
            if may_be_direct(x, basis, coefficients):
                W, bias = weight_and_bias(basis)
                T, rest_bias = weight_and_bias(coefficients)
                permutation: Any = self._buffers["permutation"]
                if self.side == "in":
                    return pivot_columns(x, W, T, bias, permutation)
                return pivot_rows(x, W, T, self.pivot_bias, rest_bias, permutation)
            if is_eager(x):
                # On the CPU, indexing the last of two dimensions is 3 times as fast as the last of three.
                y = self._composed(x.reshape(-1, self.in_features), True)
                return y.view(*x.shape[:-1], self.out_features)
        return self._composed(x, False)

    def _composed(self, x: Tensor, eager: bool) -> Tensor:
        """Map (N, n), or (..., n) of tracers, by calls of the children: for autograd, hooks, adapters and compilers."""
        if self.side == "in":
            permuted = permute_features(x, self.permutation, eager)
            # A trace would fix the number of the dimension of a slice.
            rest = permuted.narrow(-1, self.rank, self.in_features - self.rank)
            return self.basis(permuted.narrow(-1, 0, self.rank) + self.coefficients(rest))
        z = self.basis(x)
        rest = self.coefficients(z)
        pivot_bias = self.pivot_bias
        # Autocast leaves the bias in float32, which would promote the output.
        pivots = z if pivot_bias is None else z + pivot_bias.to(z.dtype)
        return permute_features(torch.cat([pivots, rest], dim=-1), self.permutation, eager)

    @property
    @override
    def reads_inputs(self) -> str:
        return "basis" if self.side == "out" else "coefficients"

    @property
    def pivots(self) -> Tensor:
        """Indices of the kept rows or columns, shape (k,), in the order of ``basis``."""
        order = self.permutation.argsort() if self.side == "out" else self.permutation
        return order[: self.rank]

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        basis, T = matrix_of(self.basis), matrix_of(self.coefficients)
        eye = torch.eye(self.rank, dtype=T.dtype, device=T.device)
        if self.side == "out":
            return torch.cat([eye, T])[self.permutation], basis
        return basis, torch.cat([eye, T], dim=1)[:, self.permutation.argsort()]

    @property
    @override
    def bias(self) -> Tensor | None:
        if self.side == "in":
            return self.basis.bias
        if self.pivot_bias is None:
            return None
        return torch.cat([self.pivot_bias, self.coefficients.bias])[self.permutation]

    @property
    @override
    def extra_bytes(self) -> int:
        return self.permutation.numel() * self.permutation.element_size()

    @override
    def _child(self) -> nn.Module:
        return self.basis

    def extra_repr(self) -> str:
        """Return shape, rank, bias and side, for ``repr``."""
        return f"{super().extra_repr()}, side={self.side}"


def smaller_side(m: int, n: int) -> Literal["out", "in"]:
    """Return the side of an (m, n) layer with fewer features to permute; at equal widths the inputs: one copy less."""
    return "out" if m < n else "in"
