"""The compressed layer of full rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from fasc_lightning.layers._compressed_linear import CompressedLinear, matrix_of


class DenseLinear(CompressedLinear):
    """A layer of full rank that saves bytes instead of numbers: a dense layer with a quantised matrix.

    Args:
        in_features: n.
        out_features: m.
        bias: Whether there is a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    layout = "dense"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, min(in_features, out_features))
        self.matrix: Any = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)

    @staticmethod
    @override
    def cost(m: int, n: int, k: int) -> int:
        return m * n

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        return self.matrix(x)

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        W = self._whole()
        eye = torch.eye(min(W.shape), dtype=W.dtype, device=W.device)
        return (eye, W) if len(W) == len(eye) else (W, eye)

    @override
    def to_weight(self) -> Tensor:
        return self._whole().to(self._like.dtype)

    @property
    @override
    def bias(self) -> Tensor | None:
        return self.matrix.bias

    @property
    @override
    def extra_bytes(self) -> int:
        return 0

    @property
    @override
    def reads_inputs(self) -> str:
        return "matrix"

    @override
    def _child(self) -> nn.Module:
        return self.matrix

    def _whole(self) -> Tensor:
        """Return W', (m, n), in float32 for half precision."""
        return matrix_of(self.matrix)
