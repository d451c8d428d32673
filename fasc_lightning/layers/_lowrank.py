"""The linear layer of two low-rank factors."""

import torch
from torch import Tensor, nn
from torch.jit import is_scripting
from typing_extensions import override

from fasc_lightning.layers._compressed_linear import CompressedLinear, matrix_of
from fasc_lightning.layers._inference import may_be_direct, two_factors, weight_and_bias
from fasc_lightning.layers._layouts import factors_cost


class LowRankLinear(CompressedLinear):
    """Rank-k layer of two factors: ``factor_out(factor_in(x))``, k (m + n) numbers.

    Args:
        in_features: n.
        out_features: m.
        rank: k, at most min(m, n).
        bias: Whether ``factor_out`` has a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    layout = "factors"
    cost = staticmethod(factors_cost)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank)
        self.factor_in = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.factor_out = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        if not is_scripting():
            first, second = self._modules["factor_in"], self._modules["factor_out"]
            if may_be_direct(x, first, second):
                return two_factors(x, weight_and_bias(first)[0], *weight_and_bias(second))
        return self.factor_out(self.factor_in(x))

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        return matrix_of(self.factor_out), matrix_of(self.factor_in)

    @property
    @override
    def bias(self) -> Tensor | None:
        return self.factor_out.bias

    @property
    @override
    def extra_bytes(self) -> int:
        return 0

    @property
    @override
    def reads_inputs(self) -> str:
        return "factor_in"

    @override
    def _child(self) -> nn.Module:
        return self.factor_in
