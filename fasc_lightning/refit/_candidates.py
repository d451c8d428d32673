"""New matrices of one layer for its refit: factors of the layer's rank, or numbers on the layer's grid."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fasc_lightning.layers import (
    INT8_ROWS,
    CompressedLinear,
    Grid,
    ResidualLinear,
    Rounded,
    make_lowrank,
    quantization_of,
    rounded_state,
)
from fasc_lightning.refit._solve import DriftMoments, Factors, Variant, divide, solve_refit
from fasc_lightning.rounding import ColumnMetric, round_matrix


class Candidates(Protocol):
    """The matrices that a layer can take, and the way to put one into it.

    Attributes:
        start: The present W', shape (m, n), float64.
        variants: Parts of the matrix that may move.
    """

    start: Tensor
    variants: tuple[Variant, ...]

    def solve(self, moments: DriftMoments, anchor: float, variant: Variant) -> Any:
        """Return the solution for moments of tokens that are shrunk."""

    def weight(self, solution: Any) -> tuple[Tensor, Tensor | None]:
        """Return W' (m, n), float64, and the shift of the bias (m,), of a solution."""

    def store(self, solution: Any) -> None:
        """Put a solution into the layer, which keeps its form, dtype, device, flags and identity."""


class FactorCandidates:
    """Factors of a layer's rank.

    Args:
        layer: The layer.
        G: Metric, shape (m, m), float64.
        variants: Factors that may move.
        bias: Whether the bias moves, too.
        towards: The anchor, as in :func:`solve_refit`.
    """

    def __init__(
        self,
        layer: CompressedLinear,
        G: Tensor,
        variants: tuple[Variant, ...],
        bias: bool,
        towards: tuple[Tensor, Tensor] | None,
    ) -> None:
        left, right = (factor.detach().to(G.device).double() for factor in layer.factors())
        self._layer, self._G, self._bias, self._towards = layer, G, bias, towards
        self._factors = Factors(left, right)
        self.start = left @ right
        self.variants = variants

    def solve(self, moments: DriftMoments, anchor: float, variant: Variant) -> Factors:
        """See :class:`Candidates`."""
        return solve_refit(moments, self._G, self._factors, anchor, variant, self._bias, self._towards)

    def weight(self, solution: Factors) -> tuple[Tensor, Tensor | None]:
        """See :class:`Candidates`."""
        return solution.left @ solution.right, solution.shift

    @torch.no_grad()
    def store(self, solution: Factors) -> None:
        """See :class:`Candidates`."""
        layer = self._layer
        bias = layer.bias
        if bias is not None and solution.shift is not None:
            bias = (bias.double() + solution.shift.to(bias.device)).to(bias.dtype)
        parameter = next(layer.parameters())
        built = make_lowrank(
            solution.left,
            solution.right,
            bias,
            "pivot" if layer.layout == "pivot" else "factors",
            dtype=parameter.dtype,
            device=parameter.device,
        )
        layer.load_state_dict(built.state_dict())


class GridCandidates:
    """Numbers on the grid of a rounded layer of full rank.

    The optimum among all matrices is P H^-1 with H and P of :mod:`fasc_lightning.refit._solve`: it is rounded in the
    metric H, so that errors of early columns are taken over by later ones for the inputs that the layer really gets.
    A residual of low rank stays as it is.

    Args:
        layer: The layer.
        W: Dense weight, shape (m, n), float64.
        A: The calibration's A in the unit of the tokens' A; None takes the tokens' own.
    """

    variants: tuple[Variant, ...] = ("factors",)

    def __init__(self, layer: CompressedLinear, W: Tensor, A: Tensor | None) -> None:
        self._layer, self._W, self._A = layer, W, A
        form = quantization_of(layer)
        self._grid = form if isinstance(form, Grid) else INT8_ROWS
        self.start = layer.to_weight().detach().to(W.device).double()
        residual = layer.residual().detach().to(W.device).double() if isinstance(layer, ResidualLinear) else 0.0
        self._residual: Tensor | float = residual

    def solve(self, moments: DriftMoments, anchor: float, variant: Variant) -> Rounded:
        """See :class:`Candidates`."""
        del variant
        A = moments.A if self._A is None else self._A
        H = (moments.A_hat + anchor * A) / (1 + anchor)
        P = (moments.P + anchor * (self._W @ A)) / (1 + anchor)
        return round_matrix(divide(P, H) - self._residual, ColumnMetric.of(H), self._grid)

    def weight(self, solution: Rounded) -> tuple[Tensor, Tensor | None]:
        """See :class:`Candidates`."""
        return solution.dequantize().double() + self._residual, None

    @torch.no_grad()
    def store(self, solution: Rounded) -> None:
        """See :class:`Candidates`."""
        self._layer.load_state_dict(rounded_state(self._layer, solution))
