"""The maths of the anchored refit of one layer: closed forms, losses and their statistics; no model in sight.

A layer y = W x + b is held as W' of rank k. Its model was compressed before it, so that it is given x^ where the dense
model had x. The refit of W' minimises, with the metric G of the gradients at the layer's output,

    E[(v - W' x^)^T G (v - W' x^)] + lambda E[(W'_0 x - W' x)^T G (W'_0 x - W' x)],

where the target v is W x (or what closes the error of a whole block) and W'_0 are the factors as they were before: the
anchor, which keeps few tokens from being fitted too well. Or W'_0 is the dense W, and E[x x^T] the moments that the
factors themselves were made with: the second term is then the loss J that the compression minimised, and the refit may
leave the factors it has for others that cost no more.

Both terms are least squares on tokens, the second one with tokens of weight lambda. In all, but for 1 + lambda,

    H = (E[x^ x^^T] + lambda E[x x^T]) / (1 + lambda),    P = (E[v x^^T] + lambda W'_0 E[x x^T]) / (1 + lambda),

and completing the square with T = P H^-1 leaves tr(G (T - W') H (T - W')^T) and a constant. So T is the optimum among
all matrices, and its truncation in the metrics H and G (:func:`~fasc_lightning.solvers.two_sided`) the optimum of
rank k.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from fasc_lightning.solvers import square_root, two_sided
from fasc_lightning.statistics import add_gram_, packed_size, unpack

#: "factors" solves for both factors at once; "right" holds the left one, so that the outputs' directions stay.
Variant = Literal["factors", "right"]


@dataclass(frozen=True)
class DriftMoments:
    """What the refit of one layer W (m, n) knows of the tokens; everything float64.

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
        """Return the moments with white noise added to x and, the same, to x^, and its image W noise to v.

        For A that is :func:`~fasc_lightning.solvers.shrink`; directions without data are drawn to W.

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
        """Return the moments of these tokens and others, which are ``share`` of all."""
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return DriftMoments(**{name: (1 - share) * own + share * added for name, own, added in pairs})


@dataclass(frozen=True)
class Factors:
    """A layer's rank-k matrix W' = B C, and how far its bias moves.

    Attributes:
        B: Shape (m, k).
        C: Shape (k, n).
        shift: What is added to the bias, shape (m,); None for a layer without one.
    """

    B: Tensor
    C: Tensor
    shift: Tensor | None = None


class RowMoments:
    """Sum and sum of outer products of rows; freed as soon as nobody refers to it, unlike metrics, which form cycles.

    Args:
        width: Length of the rows.
        dtype: Type of the sums.
        device: Where they live.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width = width
        self.count = 0
        self._outer = torch.zeros(packed_size(width), dtype=dtype, device=device)
        self._total = torch.zeros(width, dtype=dtype, device=device)

    def update(self, rows: Tensor) -> None:
        """Add rows, shape (tokens, width).

        Raises:
            FloatingPointError: If some are not finite.
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
    """Return the moments for the target v = W x from those of the rows [x, x^].

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
    """Return the moments for any target from those of x, and of the rows [x^, v]: x and x^ need not meet.

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
    """Moments of the tokens of one layer W (m, n): what a refit to its own outputs, or to another target, needs.

    Args:
        shape: (m, n).
        measured: Whether there is another target than W x.
        dtype: Of the sums.
        device: Where they live.
    """

    def __init__(self, shape: tuple[int, int], measured: bool, dtype: torch.dtype, device: torch.device) -> None:
        m, n = shape
        self._inputs = RowMoments(n, dtype, device) if measured else None
        self._joint = RowMoments(n + m if measured else 2 * n, dtype, device)

    def update(self, x: Tensor, x_hat: Tensor, v: Tensor | None) -> None:
        """Add tokens: dense inputs x, drifted ones x^ (tokens, n), and targets v (tokens, m) if they are measured.

        Raises:
            FloatingPointError: If some are not finite.
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
        moments: Of the tokens it is to be known on; not shrunk.
        G: Metric, shape (m, m).
        weight: W', shape (m, n).
        shift: s, what the bias has moved by, shape (m,).
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
    """Minimise the error with drifted inputs plus ``anchor`` times the distance from what the refit is anchored to.

    A bias is optimal for the matrix it comes with, so both sides are centred first; its shift is then the weighted mean
    of what the matrix leaves.

    Args:
        moments: Of the tokens to fit to, invertible (:meth:`DriftMoments.shrunk`).
        G: Metric, shape (m, m), positive definite.
        start: The factors there are; their rank is that of the result.
        anchor: lambda, at least 0.
        variant: Which factors move.
        bias: Whether the layer has a bias to shift.
        towards: The anchor: a matrix (m, n) and the moments of inputs (n, n) that the distance from it is measured in,
            in the unit of those of the tokens. None: the factors there are, and the tokens' own.

    Returns:
        The factors, in float64.

    Raises:
        ValueError: If there are a bias and an anchor: the mean of the anchor's inputs is not known.
    """
    if bias and towards is not None:
        raise ValueError("Expected no `towards` for a layer with a bias: the mean of the anchor's inputs is not known.")
    B, C = start.B.double(), start.C.double()
    goal, A = (B @ C, moments.A) if towards is None else (towards[0].double(), towards[1].double())
    H = (moments.A_hat + anchor * A) / (1 + anchor)
    P = (moments.P + anchor * (goal @ A)) / (1 + anchor)
    u = (moments.mean_x_hat + anchor * moments.mean_x) / (1 + anchor)
    v = (moments.mean_v + anchor * (B @ (C @ moments.mean_x))) / (1 + anchor)
    if bias:
        H, P = H - torch.outer(u, u), P - torch.outer(v, u)
    T = _divide(P, H)
    if variant == "right":
        GB = G @ B
        C = _gram_solve(B.T @ GB, GB.T @ T)
    else:
        B, C = two_sided(T, H, G).truncate(start.C.shape[0])
    return Factors(B, C, v - B @ (C @ u) if bias else None)


def _divide(P: Tensor, H: Tensor) -> Tensor:
    """Return P H^-1 for a symmetric positive semidefinite H (n, n), rank-revealing."""
    return _gram_solve(H, P.T).T


def _gram_solve(S: Tensor, Y: Tensor) -> Tensor:
    """Return S^-1 Y for a symmetric positive semidefinite S, directions without weight floored."""
    root = square_root(S)
    return root.solve_transposed(root.solve(Y))
