"""The mathematics of the anchored refit of one layer: closed forms, losses and their moments.

A layer y = W x + b is kept as W' of rank k. The model before it is compressed, so the layer gets x^ where the dense
model had x. With the metric G of the gradients at the layer's output, the refit of W' minimises

    E[(v - W' x^)^T G (v - W' x^)] + lambda E[(W'_0 x - W' x)^T G (W'_0 x - W' x)].

The target v is W x, or the value that corrects the error of a whole block. W'_0 is the anchor, which keeps the refit
from overfitting few tokens. It is the product of the factors before the refit. Or W'_0 is the dense W, and E[x x^T] are
the moments that the factors were made with: the second term is then the loss J that the compression minimised, and the
refit may move to other factors with the same J.

Both terms are least squares on tokens; tokens of the second term have weight lambda. With

    H = (E[x^ x^^T] + lambda E[x x^T]) / (1 + lambda),    P = (E[v x^^T] + lambda W'_0 E[x x^T]) / (1 + lambda)

and T = P H^-1, completing the square leaves tr(G (T - W') H (T - W')^T) and a constant, up to the factor 1 + lambda.
So T is the optimum among all matrices, and its truncation in the metrics H and G
(:func:`~fasc_lightning.solvers.two_sided`) is the optimum of rank k.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from fasc_lightning.solvers import square_root, two_sided
from fasc_lightning.statistics import add_gram_, packed_size, unpack

#: "factors" solves for both factors at once. "right" keeps the left factor, and with it the outputs' directions.
Variant = Literal["factors", "right"]


@dataclass(frozen=True)
class DriftMoments:
    """Moments of the tokens for the refit of one layer W of shape (m, n), in float64.

    Attributes:
        A: E[x x^T] of the dense inputs, shape (n, n).
        A_hat: E[x^ x^^T] of the drifted inputs, shape (n, n).
        P: E[v x^^T], shape (m, n).
        V: E[v v^T], shape (m, m).
        mean_x: E[x], shape (n,).
        mean_x_hat: E[x^], shape (n,).
        mean_v: E[v], shape (m,). The target is W x, without the bias.
    """

    A: Tensor
    A_hat: Tensor
    P: Tensor
    V: Tensor
    mean_x: Tensor
    mean_x_hat: Tensor
    mean_v: Tensor

    def shrunk(self, W: Tensor, amount: float) -> DriftMoments:
        """Return the moments with the same white noise added to x and to x^, and W times this noise added to v.

        For A that is :func:`~fasc_lightning.solvers.shrink`. Directions without data are pulled towards W.

        Args:
            W: Dense weight, shape (m, n).
            amount: Share of the noise in the trace of A, in [0, 1).
        """
        noise = amount * self.A.diagonal().mean()
        eye = torch.eye(len(self.A), dtype=self.A.dtype, device=self.A.device)
        keep = 1 - amount
        return replace(
            self,
            A=keep * self.A + noise * eye,
            A_hat=keep * self.A_hat + noise * eye,
            P=keep * self.P + noise * W,
            V=keep * self.V + noise * (W @ W.T),
        )

    def mixed(self, other: DriftMoments, share: float) -> DriftMoments:
        """Return the moments of these tokens and others together; the others' share of all tokens is ``share``."""
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return DriftMoments(**{name: (1 - share) * own + share * added for name, own, added in pairs})


@dataclass(frozen=True)
class Factors:
    """A layer's rank-k matrix W' = left @ right, and the shift of its bias.

    Attributes:
        left: Left factor, shape (m, k).
        right: Right factor, shape (k, n).
        shift: Shift of the bias, shape (m,); None if the bias does not move.
    """

    left: Tensor
    right: Tensor
    shift: Tensor | None = None


class RowMoments:
    """Sum, and sum of outer products, of rows.

    This is no torchmetrics Metric: metrics form reference cycles and are not freed with their last reference.

    Args:
        width: Length of the rows.
        dtype: Type of the sums.
        device: Device of the sums.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width = width
        self.count = 0
        self._outer = torch.zeros(packed_size(width), dtype=dtype, device=device)
        self._total = torch.zeros(width, dtype=dtype, device=device)

    def update(self, rows: Tensor) -> None:
        """Add rows, shape (tokens, width).

        Raises:
            FloatingPointError: If a row is not finite.
        """
        total = rows.sum(0)
        if not torch.isfinite(total.sum()):
            raise FloatingPointError("Expected finite activations but some are NaN or Inf. The refit is undone.")
        add_gram_(self._outer, rows)
        self._total += total
        self.count += len(rows)

    def compute(self) -> Tensor:
        """Return E[r r^T], shape (width, width)."""
        return unpack(self._outer, self.width) / max(self.count, 1)

    def mean(self) -> Tensor:
        """Return E[r], shape (width,)."""
        return self._total / max(self.count, 1)


def linear_target_moments(W: Tensor, joint: Tensor, mean: Tensor) -> DriftMoments:
    """Return the moments for the target v = W x from the moments of the rows [x, x^].

    Args:
        W: Dense weight, shape (m, n).
        joint: E[[x, x^] [x, x^]^T], shape (2 n, 2 n).
        mean: E[[x, x^]], shape (2 n,).
    """
    W, joint, mean = W.double(), joint.double(), mean.double()
    n = W.shape[1]
    A, S, A_hat = joint[:n, :n], joint[:n, n:], joint[n:, n:]
    return DriftMoments(A, A_hat, W @ S, W @ A @ W.T, mean[:n], mean[n:], W @ mean[:n])


def measured_target_moments(A: Tensor, mean_x: Tensor, joint: Tensor, mean: Tensor) -> DriftMoments:
    """Return the moments for any target v from the moments of x and of the rows [x^, v]. E[x x^^T] is not needed.

    Args:
        A: E[x x^T], shape (n, n).
        mean_x: E[x], shape (n,).
        joint: E[[x^, v] [x^, v]^T], shape (n + m, n + m).
        mean: E[[x^, v]], shape (n + m,).
    """
    A, mean_x, joint, mean = A.double(), mean_x.double(), joint.double(), mean.double()
    n = len(A)
    return DriftMoments(A, joint[:n, :n], joint[n:, :n], joint[n:, n:], mean_x, mean[:n], mean[n:])


class DriftRows:
    """Accumulates the moments of the tokens of one layer W for a refit to its own outputs or to another target.

    Args:
        shape: Shape (m, n) of W.
        measured: Whether the target is another one than W x.
        dtype: Type of the sums.
        device: Device of the sums.
    """

    def __init__(self, shape: tuple[int, int], measured: bool, dtype: torch.dtype, device: torch.device) -> None:
        m, n = shape
        self._inputs = RowMoments(n, dtype, device) if measured else None
        self._joint = RowMoments(n + m if measured else 2 * n, dtype, device)

    def update(self, x: Tensor, x_hat: Tensor, v: Tensor | None) -> None:
        """Add tokens.

        Args:
            x: Inputs in the dense model, shape (tokens, n).
            x_hat: Drifted inputs x^, shape (tokens, n).
            v: Targets, shape (tokens, m), if they are measured; else None.

        Raises:
            FloatingPointError: If a value is not finite.
        """
        if self._inputs is None:
            self._joint.update(torch.cat([x, x_hat], dim=1))
        else:
            assert v is not None
            self._inputs.update(x)
            self._joint.update(torch.cat([x_hat, v], dim=1))

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self._joint.count

    def moments(self, W: Tensor) -> DriftMoments:
        """Return the moments on the device of W."""
        joint, mean = self._joint.compute().to(W.device), self._joint.mean().to(W.device)
        if self._inputs is None:
            return linear_target_moments(W, joint, mean)
        inputs = self._inputs
        return measured_target_moments(inputs.compute().to(W.device), inputs.mean().to(W.device), joint, mean)


def drift_loss(moments: DriftMoments, G: Tensor, weight: Tensor, shift: Tensor | None = None) -> float:
    """Return E[(v - W' x^ - s)^T G (v - W' x^ - s)], the error in the metric of the squared first-order loss.

    Args:
        moments: Moments of the tokens, not shrunk.
        G: Metric, shape (m, m).
        weight: W', shape (m, n).
        shift: s, the shift of the bias, shape (m,).
    """
    GW = G @ weight
    loss = (G * moments.V).sum() - 2 * (GW * moments.P).sum() + ((GW @ moments.A_hat) * weight).sum()
    if shift is not None:
        residual = moments.mean_v - weight @ moments.mean_x_hat
        loss = loss + shift @ G @ (shift - 2 * residual)
    return float(loss)


def solve_refit(
    moments: DriftMoments,
    G: Tensor,
    start: Factors,
    anchor: float,
    variant: Variant = "factors",
    bias: bool = False,
    towards: tuple[Tensor, Tensor] | None = None,
) -> Factors:
    """Minimise the error with drifted inputs plus ``anchor`` times the distance from the anchor.

    With a bias both sides are centred first, since the bias is optimal for its matrix. Its shift is then the weighted
    mean of the matrix's residual.

    Args:
        moments: Moments of the tokens to fit to, invertible (:meth:`DriftMoments.shrunk`).
        G: Metric, shape (m, m), positive definite.
        start: The present factors, whose rank the result has.
        anchor: lambda, at least 0.
        variant: Factors that move.
        bias: Whether the layer has a bias to shift.
        towards: The anchor: a matrix (m, n), and the moments of inputs (n, n) that measure the distance from it, in the
            unit of the tokens' moments. None takes the present factors and the tokens' own moments.

    Returns:
        The factors, in float64.

    Raises:
        ValueError: If there is a bias and ``towards`` is given: the mean of the anchor's inputs is not known.
    """
    if bias and towards is not None:
        raise ValueError("Expected no `towards` for a layer with a bias: the mean of the anchor's inputs is not known.")
    left, right = start.left.double(), start.right.double()
    goal, A = (left @ right, moments.A) if towards is None else (towards[0].double(), towards[1].double())
    H = (moments.A_hat + anchor * A) / (1 + anchor)
    P = (moments.P + anchor * (goal @ A)) / (1 + anchor)
    u = (moments.mean_x_hat + anchor * moments.mean_x) / (1 + anchor)
    v = (moments.mean_v + anchor * (left @ (right @ moments.mean_x))) / (1 + anchor)
    if bias:
        H, P = H - torch.outer(u, u), P - torch.outer(v, u)
    T = divide(P, H)
    if variant == "right":
        G_left = G @ left
        right = _gram_solve(left.T @ G_left, G_left.T @ T)
    else:
        left, right = two_sided(T, H, G).truncate(start.right.shape[0])
    return Factors(left, right, v - left @ (right @ u) if bias else None)


def divide(P: Tensor, H: Tensor) -> Tensor:
    """Return P H^-1 for a symmetric positive semidefinite H (n, n), rank-revealing."""
    return _gram_solve(H, P.T).T


def _gram_solve(S: Tensor, Y: Tensor) -> Tensor:
    """Return S^-1 Y for a symmetric positive semidefinite S, with a floor under its smallest eigenvalues."""
    root = square_root(S)
    return root.solve_transposed(root.solve(Y))
