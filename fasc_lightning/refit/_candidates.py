"""New matrices of one layer for its refit: factors of the layer's rank, or numbers on the layer's grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

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
from fasc_lightning.refit._drift import OutputBasis, TargetMoments
from fasc_lightning.refit._solve import Factors, solve, solve_low_rank
from fasc_lightning.rounding import ColumnMetric, round_matrix

#: Moments of the problem for a lambda: the tokens' moments, which are shrunk, mixed with the anchor's.
Problem = Callable[[float], TargetMoments]


class Candidates(Protocol):
    """The matrices that a layer can take, and the way to put one into it.

    Attributes:
        start: The present W' in the basis of the outputs, shape (r, n).
    """

    start: Tensor

    def choose(self, anchors: Sequence[float], problem: Problem, judged: TargetMoments) -> tuple[float, float]:
        """Return the lambda whose solution is best on the tokens that choose, and its error there.

        Args:
            anchors: Values of lambda.
            problem: See :data:`Problem`.
            judged: Moments of the tokens that choose.
        """

    def take(self, problem: TargetMoments) -> None:
        """Put a problem's solution into the layer, which keeps its form, dtype, device, flags and identity."""


class FactorCandidates:
    """Factors of a layer's rank.

    Args:
        layer: The layer.
        basis: Basis of its outputs.
        bias: Whether the bias moves, too.
    """

    def __init__(self, layer: CompressedLinear, basis: OutputBasis, bias: bool) -> None:
        self._layer, self._basis, self._bias = layer, basis, bias
        left, right = (factor.detach().to(basis.E.device).double() for factor in layer.factors())
        self._rank = right.shape[0]
        self.start = (basis.dual @ left) @ right

    def choose(self, anchors: Sequence[float], problem: Problem, judged: TargetMoments) -> tuple[float, float]:
        """See :class:`Candidates`."""
        error, best = min((self._solve(problem(anchor)).error(judged), anchor) for anchor in anchors)
        return best, error

    def _solve(self, problem: TargetMoments) -> Factors:
        return solve_low_rank(problem, self._rank, self._bias)

    @torch.no_grad()
    def take(self, problem: TargetMoments) -> None:
        """See :class:`Candidates`."""
        layer, E, found = self._layer, self._basis.E, self._solve(problem)
        bias = layer.bias
        if bias is not None and found.shift is not None:
            bias = (bias.double() + (E @ found.shift).to(bias.device)).to(bias.dtype)
        parameter = next(layer.parameters())
        built = make_lowrank(
            E @ found.left,
            found.right,
            bias,
            "pivot" if layer.layout == "pivot" else "factors",
            dtype=parameter.dtype,
            device=parameter.device,
        )
        layer.load_state_dict(built.state_dict())


class GridCandidates:
    """Numbers on the grid of a rounded layer of full rank.

    The optimum among all matrices, T = P H^-1, is rounded in the metric H, so that errors of early columns are taken
    over by later ones for the inputs that the layer really gets. A residual of low rank stays as it is.

    Problems are compared by T before it is rounded: rounding adds about as much to every error, and takes longer than
    all else.

    Args:
        layer: The layer.
        basis: Basis of all of its outputs.
    """

    def __init__(self, layer: CompressedLinear, basis: OutputBasis) -> None:
        self._layer, self._basis = layer, basis
        form = quantization_of(layer)
        self._grid = form if isinstance(form, Grid) else INT8_ROWS
        device = basis.E.device
        residual = layer.residual().detach().to(device).double() if isinstance(layer, ResidualLinear) else 0.0
        self._residual: Tensor | float = residual
        self.start = basis.dual @ layer.to_weight().detach().to(device).double()

    def choose(self, anchors: Sequence[float], problem: Problem, judged: TargetMoments) -> tuple[float, float]:
        """See :class:`Candidates`."""
        _, best = min((judged.error(solve(problem(anchor))), anchor) for anchor in anchors)
        weight = self._round(problem(best)).dequantize().double() + self._residual
        return best, judged.error((self._basis.dual @ weight).to(judged.P.dtype))

    def _round(self, problem: TargetMoments) -> Rounded:
        T = self._basis.E @ solve(problem).double()
        return round_matrix(T - self._residual, ColumnMetric.of(problem.A), self._grid)

    @torch.no_grad()
    def take(self, problem: TargetMoments) -> None:
        """See :class:`Candidates`."""
        self._layer.load_state_dict(rounded_state(self._layer, self._round(problem)))
