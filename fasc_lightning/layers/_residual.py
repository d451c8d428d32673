"""A linear layer of a matrix of few bits and a residual of low rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from fasc_lightning.layers._compressed_linear import CompressedLinear, matrix_of
from fasc_lightning.layers._dense_linear import DenseLinear
from fasc_lightning.layers._layouts import factors_cost


class ResidualLinear(DenseLinear):
    """``matrix(x) + factor_out(factor_in(x))``: a matrix of few bits, and the best of rank k of its error.

    Args:
        in_features: n.
        out_features: m.
        rank: Rank k of the residual.
        bias: Whether ``matrix`` has a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    layout = "residual"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        CompressedLinear.check_rank(in_features, out_features, rank)
        self.rank = rank
        self.factor_in: Any = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.factor_out: Any = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)

    @staticmethod
    @override
    def cost(m: int, n: int, k: int) -> int:
        return m * n + factors_cost(m, n, k)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        return self.matrix(x) + self.factor_out(self.factor_in(x))

    def residual(self) -> Tensor:
        """Return the residual, (m, n), in float32."""
        return matrix_of(self.factor_out) @ matrix_of(self.factor_in)

    @override
    def _whole(self) -> Tensor:
        return matrix_of(self.matrix) + self.residual()
