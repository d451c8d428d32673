"""Moments of the tokens that a refit fits to or chooses by.

The model before a layer is compressed, so the layer gets x^ where the dense model had x. Its target is v. A refit reads
E[x^ x^^T] and E[v x^^T] of them, and few numbers more. Targets are held in an :class:`OutputBasis`, in which the metric
of the outputs is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fasc_lightning.solvers import square_root
from fasc_lightning.statistics import add_gram_, packed_size, unpack


@dataclass(frozen=True)
class OutputBasis:
    """Outputs v = E v~ of a layer W of shape (m, n), in which the metric G is the identity: E^T G E = I.

    Attributes:
        E: Shape (m, r).
        dual: E^T G, shape (r, m): v~ = dual v.
        F: dual W, shape (r, n): W = E F.
    """

    E: Tensor
    dual: Tensor
    F: Tensor

    @staticmethod
    def of(W: Tensor, G: Tensor, whole: bool = True) -> OutputBasis:
        """Return the basis of a layer.

        Args:
            W: Dense weight, shape (m, n), float64.
            G: Metric, shape (m, m), float64, positive definite.
            whole: Whether the basis spans all outputs, r = m. Otherwise it spans the outputs that W reaches, fewer of
                them if m > n, so that r = min(m, n).
        """
        m, n = W.shape
        if whole or m <= n:
            root = square_root(G)
            eye = torch.eye(m, dtype=G.dtype, device=G.device)
            return OutputBasis(root.solve_transposed(eye), root.L.T, root.L.T @ W)
        GW = G @ W
        root = square_root(W.T @ GW)
        return OutputBasis(root.solve(W.T).T, root.solve(GW.T), root.L.T)


@dataclass(frozen=True)
class TargetMoments:
    """Moments of pairs of an input x^ and a target v~, r numbers in the basis of the outputs, in float64 or float32.

    Attributes:
        A: E[x^ x^^T], shape (n, n).
        P: E[v~ x^^T], shape (r, n).
        mean_x: E[x^], shape (n,).
        mean_v: E[v~], shape (r,).
        energy: E[v^T G v], a scalar; NaN if the rows did not sum it.
    """

    A: Tensor
    P: Tensor
    mean_x: Tensor
    mean_v: Tensor
    energy: Tensor

    def single(self) -> TargetMoments:
        """Return the moments in float32."""
        return TargetMoments(**{name: value.float() for name, value in vars(self).items()})

    def mixed(self, other: TargetMoments, share: float) -> TargetMoments:
        """Return the moments of these tokens and others together; the others' share of all tokens is ``share``."""
        pairs = ((name, own, getattr(other, name)) for name, own in vars(self).items())
        return TargetMoments(**{name: torch.lerp(own, theirs, share) for name, own, theirs in pairs})

    def shrunk(self, basis: OutputBasis, amount: float, level: Tensor) -> TargetMoments:
        """Return the moments with white noise added to x^, and W times the same noise added to v.

        It is what :func:`~fasc_lightning.solvers.shrink` does to A. Directions without data are pulled towards W.

        Args:
            basis: The basis of the outputs.
            amount: Share of the noise in the mean square of the inputs, in [0, 1).
            level: E|x|^2 / n of the dense inputs.
        """
        A, P = (1 - amount) * self.A, torch.add((1 - amount) * self.P, amount * level * basis.F)
        A.diagonal().add_(amount * level)
        return replace(self, A=A, P=P)

    def centred(self) -> TargetMoments:
        """Return the moments about the means."""
        A, P = self.A - torch.outer(self.mean_x, self.mean_x), self.P - torch.outer(self.mean_v, self.mean_x)
        return replace(self, A=A, P=P)

    def error(self, weight: Tensor, shift: Tensor | None = None, left: Tensor | None = None) -> float:
        """Return E[(v - W' x^ - s)^T G (v - W' x^ - s)], the error in the metric of the squared first-order loss.

        Args:
            weight: W' in the basis of the outputs, shape (r, n); or the right factor of W' = left @ weight.
            shift: s, the shift of the bias, in the same basis, shape (r,).
            left: Left factor with orthonormal columns, shape (r, k), which drops out of the square.
        """
        P = self.P if left is None else left.T @ self.P
        loss = self.energy - 2 * (weight * P).sum() + ((weight @ self.A) * weight).sum()
        if shift is not None:
            output = weight @ self.mean_x
            loss = loss + shift @ (shift - 2 * (self.mean_v - (output if left is None else left @ output)))
        return float(loss)


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
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._outer = torch.zeros(packed_size(width), dtype=dtype, device=device)
        self._total = torch.zeros(width, dtype=dtype, device=device)

    def update(self, rows: Tensor, weighted: Tensor, count: Tensor) -> None:
        """Add rows.

        Args:
            rows: Shape (tokens, width).
            weighted: The rows times their weights, of the same shape.
            count: Sum of the weights.
        """
        add_gram_(self._outer, rows, Y=weighted)
        self._total += weighted.sum(0)
        self._count += count

    @property
    def count(self) -> float:
        """Number of rows; of weighted ones the sum of their weights."""
        return float(self._count)

    def compute(self) -> Tensor:
        """Return E[r r^T], shape (width, width), float64."""
        return unpack(self._outer, self.width).double() / (self.count or 1)

    def mean(self) -> Tensor:
        """Return E[r], shape (width,), float64."""
        return self._total.double() / (self.count or 1)


class DriftRows:
    """Accumulates the moments of the tokens of layers that share an input, or of one layer with a measured target.

    Args:
        shape: Shape (m, n) of W.
        measured: Whether the target is another one than W x.
        energy: Whether the energy of the targets is wanted.
        inputs: Whether E[x x^T] of the dense inputs is wanted.
        dtype: Type of the sums.
        device: Device of the sums.

    Attributes:
        measured: Whether the target is another one than W x.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        measured: bool,
        energy: bool,
        inputs: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        m, n = shape
        self.measured = measured
        self._drifted = RowMoments(n, dtype, device)
        self._cross = torch.zeros(m if measured else n, n, dtype=dtype, device=device)
        self._inputs = RowMoments(n, dtype, device) if inputs or (energy and not measured) else None
        self._targets = RowMoments(m, dtype, device) if energy and measured else None
        self._total = torch.zeros(len(self._cross), dtype=dtype, device=device)  # of the targets
        self._squares = torch.zeros((), dtype=dtype, device=device)

    def update(self, x: Tensor, x_hat: Tensor, v: Tensor | None, weights: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            x: Inputs in the dense model, shape (tokens, n).
            x_hat: Drifted inputs x^, shape (tokens, n).
            v: Targets, shape (tokens, m), if they are measured; else None.
            weights: Weights of the tokens, shape (tokens,); None if all count alike.

        Raises:
            FloatingPointError: If a value is not finite.
        """
        target, w = x if v is None else v, x.new_ones(len(x)) if weights is None else weights.to(x)
        count, total, squares = w.sum(), w @ target, w @ x.square().sum(1)
        if not torch.isfinite(squares + x_hat.sum() + total.sum()):
            raise FloatingPointError("Expected finite activations but some are NaN or Inf. The refit is undone.")

        def times(rows: Tensor) -> Tensor:
            return rows if weights is None else w[:, None] * rows

        weighted = times(x_hat)
        self._drifted.update(x_hat, weighted, count)
        self._cross.addmm_(target.T, weighted)
        for rows, values in ((self._inputs, x), (self._targets, target)):
            if rows is not None:
                rows.update(values, times(values), count)
        self._total += total
        self._squares += squares

    @property
    def count(self) -> float:
        """Number of tokens; of weighted ones the sum of their weights."""
        return self._drifted.count

    @property
    def level(self) -> Tensor:
        """E|x|^2 / n of the dense inputs, a float64 scalar."""
        return self._squares.double() / ((self.count or 1) * self._drifted.width)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return E[x x^T] (n, n) and E[x] (n,) of the dense inputs; only if they were wanted."""
        assert self._inputs is not None
        return self._inputs.compute(), self._inputs.mean()

    def moments(self, basis: OutputBasis) -> TargetMoments:
        """Return the moments on the device of the basis. The target is W x, unless it was measured."""
        device, count = basis.F.device, self.count or 1
        back = basis.dual if self.measured else basis.F
        energy = torch.tensor(float("nan"), dtype=torch.float64, device=device)
        rows = self._targets if self.measured else self._inputs
        if rows is not None:
            energy = ((back @ rows.compute().to(device)) * back).sum()
        return TargetMoments(
            self._drifted.compute().to(device),
            back @ (self._cross.double() / count).to(device),
            self._drifted.mean().to(device),
            back @ (self._total.double() / count).to(device),
            energy,
        )
