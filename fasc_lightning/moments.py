"""Streaming second moments of activations and gradients: updating, merging, reducing over processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric

#: Options of torchmetrics: processes are summed by our own `all_reduce_`, since its synchronisation gathers every
#: process's matrices; and a cached result would be a second matrix, and wrong once states are merged.
OWN_SYNC: dict[str, Any] = {"sync_on_compute": False, "compute_with_cache": False}

#: Widest panel of a packed matrix: wide enough for the products to run at full speed, narrow enough to skip nearly
#: half of the square.
PANEL = 384


def panel_bounds(d: int) -> list[tuple[int, int]]:
    """Return the column ranges of a packed (d, d) matrix: at least three panels, unless they would be narrow."""
    width = min(PANEL, max(64, -(-d // 3)))
    return [(start, min(start + width, d)) for start in range(0, d, width)]


def packed_size(d: int) -> int:
    """Return how many numbers a packed symmetric (d, d) matrix holds."""
    return sum((d - start) * (stop - start) for start, stop in panel_bounds(d))


def panels(packed: Tensor, d: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, rows start..d of columns start..stop) of a packed matrix, as views.

    Args:
        packed: Shape (packed_size(d),).
        d: Width of the matrix.
    """
    offset = 0
    for start, stop in panel_bounds(d):
        size = (d - start) * (stop - start)
        yield start, stop, packed[offset : offset + size].view(d - start, stop - start)
        offset += size


def add_gram_(packed: Tensor, X: Tensor, weight: float = 1.0) -> Tensor:
    """Add ``weight X^T X`` to a packed matrix, in place.

    Only the panels at and below the diagonal exist, which saves up to 3/8 of the work and of the memory of a full
    product.

    Args:
        packed: Shape (packed_size(d),).
        X: Rows to add, shape (tokens, d), same dtype and device as ``packed``.
        weight: Factor of the whole product.

    Returns:
        ``packed``.
    """
    for start, stop, panel in panels(packed, X.shape[1]):
        panel.addmm_(X[:, start:].T, X[:, start:stop], alpha=weight)
    return packed


def unpack(packed: Tensor, d: int) -> Tensor:
    """Return the symmetric matrix that a packed one stands for, shape (d, d)."""
    full = packed.new_empty(d, d)
    for start, stop, panel in panels(packed, d):
        full[start:, start:stop] = panel
        full[start:stop, start:] = panel.T
    return full


class Moments(Metric):
    """Count, sum and sum of outer products of a stream of vectors.

    The state is exact: it is a sum over tokens, so merging two streams is adding their states, in any order and
    on any number of processes. Memory is allocated by the first token (a layer that is never reached costs
    nothing); the symmetric matrix is packed (:func:`add_gram_`).

    Args:
        features: Length d of the vectors.
        dtype: Type of the accumulators, float32 or float64; inputs in half precision are converted first.
    """

    full_state_update = False
    is_differentiable = False

    outer: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, features: int, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"Expected `dtype` to be torch.float32 or torch.float64 but got {dtype}.")
        super().__init__(**OWN_SYNC)
        self.features = features
        self.accumulator_dtype = dtype
        # Scalars stand in for the zero matrices: torchmetrics keeps a second copy of every default.
        self.add_state("outer", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def allocate(self) -> None:
        """Give the states their full shapes; done by the first update and before a reduction."""
        if self.outer.ndim == 0:
            d = self.features
            self.outer = torch.zeros(packed_size(d), dtype=self.accumulator_dtype, device=self.outer.device)
            self.total = torch.zeros(d, dtype=self.accumulator_dtype, device=self.outer.device)

    def update(self, x: Tensor, scale: float = 1.0) -> None:
        """Add the rows of ``scale * x``.

        Args:
            x: Vectors, shape (tokens, d), any floating type.
            scale: Factor of all of them; cheaper here than as a copy of ``x``.

        Raises:
            ValueError: If ``x`` is not of shape (tokens, d).
            FloatingPointError: If ``x`` holds NaN or Inf (or numbers whose sum overflows); nothing is added then.
        """
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"Expected vectors of shape (tokens, {self.features}) but got {tuple(x.shape)}.")
        self.allocate()
        # Autocast may be on in the thread that runs the backward pass; the moments must not be rounded by it.
        with torch.autocast(x.device.type, enabled=False):
            X = x.detach().to(self.accumulator_dtype)
            total = X.sum(0)
            # A sum is finite only if every term is: one scalar to read back instead of another pass.
            if not torch.isfinite(total.sum()):
                raise FloatingPointError("Expected finite vectors but some hold NaN or Inf.")
            add_gram_(self.outer, X, scale**2)
            self.total.add_(total, alpha=scale)
            self.count += X.shape[0]

    def compute(self) -> Tensor:
        """Return the uncentred second moment E[x x^T], shape (d, d)."""
        self.allocate()
        return unpack(self.outer, self.features) / self.count.clamp(min=1).to(self.accumulator_dtype)

    def mean(self) -> Tensor:
        """Return the mean vector, shape (d,)."""
        self.allocate()
        return self.total / self.count.clamp(min=1).to(self.accumulator_dtype)

    def covariance(self) -> Tensor:
        """Return the centred second moment, shape (d, d)."""
        mean = self.mean()
        return self.compute() - torch.outer(mean, mean)

    def add_(self, other: Moments) -> Moments:
        """Merge another stream's moments into these, in place."""
        if other.count > 0:
            self.allocate()
            self.outer += other.outer.to(self.outer.device)
            self.total += other.total.to(self.total.device)
            self.count += other.count.to(self.count.device)
            self._update_count += other._update_count
        return self

    def all_reduce_(self, group: Any | None = None) -> None:
        """Sum the states over all processes, in place.

        torchmetrics' own synchronisation gathers every process's matrices before adding them; with d^2 numbers a
        state that is memory nobody has. Every process must call this for the same moments in the same order.
        """
        self.allocate()
        for state in (self.outer, self.total, self.count):
            dist.all_reduce(state, group=group)
        self._update_count = max(self._update_count, int(self.count > 0))

    @property
    def nbytes(self) -> int:
        """Bytes that the states hold now."""
        return sum(t.numel() * t.element_size() for t in (self.outer, self.total, self.count))


class CrossMoments(Metric):
    """Count and sum of the outer products x h^T of a stream of pairs of vectors; exact and mergeable.

    Args:
        n: Length of x.
        m: Length of h.
        dtype: Type of the accumulators.
    """

    full_state_update = False
    is_differentiable = False

    outer: Tensor
    count: Tensor

    def __init__(self, n: int, m: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(**OWN_SYNC)
        self.shape = (n, m)
        self.add_state("outer", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def allocate(self) -> None:
        """Give the state its full shape; done by the first update and before a reduction."""
        if self.outer.ndim == 0:
            self.outer = self.outer.new_zeros(self.shape)

    def update(self, x: Tensor, h: Tensor, scale: float = 1.0) -> None:
        """Add the pairs (x, scale * h).

        Args:
            x: Shape (tokens, n).
            h: Shape (tokens, m).
            scale: Factor of every h.

        Raises:
            ValueError: If the shapes are others.
        """
        if (x.shape[1:], h.shape[1:]) != ((self.shape[0],), (self.shape[1],)) or len(x) != len(h):
            raise ValueError(f"Expected as many x and h of lengths {self.shape} but got {x.shape=} and {h.shape=}.")
        self.allocate()
        with torch.autocast(x.device.type, enabled=False):
            self.outer.addmm_(x.detach().to(self.outer.dtype).T, h.detach().to(self.outer.dtype), alpha=scale)
            self.count += len(x)

    def compute(self) -> Tensor:
        """Return E[x h^T], shape (n, m)."""
        self.allocate()
        return self.outer / self.count.clamp(min=1).to(self.outer.dtype)

    def add_(self, other: CrossMoments) -> CrossMoments:
        """Merge another stream's moments into these, in place."""
        if other.count > 0:
            self.allocate()
            self.outer += other.outer.to(self.outer.device)
            self.count += other.count.to(self.count.device)
            self._update_count += other._update_count
        return self

    def all_reduce_(self, group: Any | None = None) -> None:
        """Sum the states over all processes, in place."""
        self.allocate()
        for state in (self.outer, self.count):
            dist.all_reduce(state, group=group)
        self._update_count = max(self._update_count, int(self.count > 0))

    @property
    def nbytes(self) -> int:
        """Bytes that the states hold now."""
        return sum(t.numel() * t.element_size() for t in (self.outer, self.count))


@dataclass(frozen=True)
class LayerMoments:
    """What a solver knows of one layer y = W x + b with W of shape (m, n).

    Attributes:
        A: E[x x^T] over the tokens, shape (n, n).
        G: E[h h^T] with h = dL/dy and L the sum of the token losses, shape (m, m).
        mean_x: E[x], shape (n,).
        mean_h: E[h], shape (m,).
        tokens: Number of tokens behind the expectations.
        C: E[x h^T], shape (n, m), where it was gathered; with g = W^T h, Sigma_xg = C W.
    """

    A: Tensor
    G: Tensor
    mean_x: Tensor
    mean_h: Tensor
    tokens: int
    C: Tensor | None = None


class CalibrationMoments:
    """The moments of all tapped layers; layers that share an input tensor share its A.

    Inputs are keyed by the *set* of layers that were given the same tensor, so a layer that shares its input in one
    call and not in another is still exact: its A is the sum over the sets it belongs to.

    Args:
        shapes: (m, n) of each layer by name.
        dtype: Type of the accumulators.
        device: Where they live.
        cross: Whether to gather C = E[x h^T] as well: m n more numbers a layer, and about a third more work.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        cross: bool = False,
    ) -> None:
        self.shapes = dict(shapes)
        self.dtype = dtype
        self.device = torch.device(device)
        self.inputs: dict[tuple[str, ...], Moments] = {}
        self.gradients = {name: Moments(m, dtype).to(self.device) for name, (m, _) in self.shapes.items()}
        self.crosses = {name: CrossMoments(n, m, dtype).to(self.device) for name, (m, n) in shapes.items() if cross}

    def _input(self, members: Iterable[str]) -> Moments:
        key = tuple(sorted(members))
        if key not in self.inputs:
            self.inputs[key] = Moments(self.shapes[key[0]][1], self.dtype).to(self.device)
        return self.inputs[key]

    def add_inputs(self, members: Iterable[str], x: Tensor) -> None:
        """Add input rows x (tokens, n) that all of ``members`` were given."""
        self._input(members).update(x)

    def move_inputs(self, members: Iterable[str], reached: Iterable[str], x: Tensor) -> None:
        """Move rows that were counted for ``members`` to the subset that a gradient did reach."""
        source = self._input(members)
        correction = Moments(x.shape[1], self.dtype).to(self.device)
        correction.update(x)
        for name in ("outer", "total", "count"):
            getattr(source, name).sub_(getattr(correction, name))
        if reached := tuple(reached):
            self._input(reached).add_(correction)

    def add_gradients(self, name: str, h: Tensor, scale: float = 1.0) -> None:
        """Add gradient rows ``scale * h`` (tokens, m) of one layer."""
        self.gradients[name].update(h, scale)

    def add_cross(self, name: str, x: Tensor, h: Tensor, scale: float = 1.0) -> None:
        """Add pairs of rows (x, scale * h) of one layer."""
        self.crosses[name].update(x, h, scale)

    def tokens(self, name: str) -> int:
        """Number of (x, h) pairs seen by a layer."""
        return int(self.gradients[name].count.item())

    def layer(self, name: str) -> LayerMoments:
        """Return one layer's moments, normalised.

        Raises:
            KeyError: If the layer is not tapped.
            ValueError: If no token reached it.
        """
        if self.tokens(name) == 0:
            raise ValueError(f"Expected moments of layer {name!r} but no gradient reached it in calibration.")
        parts = [moments for key, moments in self.inputs.items() if name in key]
        pooled = parts[0]
        if len(parts) > 1:
            pooled = Moments(self.shapes[name][1], self.dtype).to(self.device)
            for part in parts:
                pooled.add_(part)
        G = self.gradients[name]
        C = self.crosses[name].compute() if name in self.crosses else None
        return LayerMoments(pooled.compute(), G.compute(), pooled.mean(), G.mean(), self.tokens(name), C)

    def release(self, name: str) -> None:
        """Free what only this layer needs; a shared A goes with the last layer that shares it."""
        m, n = self.shapes.pop(name)
        self.gradients[name] = Moments(m, self.dtype).to(self.device)
        self.crosses.pop(name, None)
        for key in [key for key in self.inputs if not any(member in self.shapes for member in key)]:
            self.inputs[key] = Moments(n, self.dtype).to(self.device)

    def add_(self, other: CalibrationMoments) -> CalibrationMoments:
        """Merge another run's moments of the same layers into these, in place."""
        for key, moments in other.inputs.items():
            self._input(key).add_(moments)
        for name, moments in other.gradients.items():
            self.gradients[name].add_(moments)
        for name, cross in other.crosses.items():
            self.crosses[name].add_(cross)
        return self

    def all_reduce_(self, group: Any | None = None) -> None:
        """Sum over all processes, in place: every process ends with the moments of all batches."""
        # A process may have met other sets of layers than its peers (a branch that only some batches take).
        keys: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(keys, sorted(self.inputs), group=group)
        for key in sorted(set().union(*keys)):
            self._input(key).all_reduce_(group)
        for name in sorted(self.gradients):
            self.gradients[name].all_reduce_(group)
        for name in sorted(self.crosses):
            self.crosses[name].all_reduce_(group)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(m.nbytes for group in (self.inputs, self.gradients, self.crosses) for m in group.values())


def moment_dtype(layers: Iterable[nn.Module]) -> torch.dtype:
    """Return float64 if a layer computes in it, else float32."""
    double = any(p.dtype == torch.float64 for module in layers for p in module.parameters())
    return torch.float64 if double else torch.float32


def moments_bytes(shapes: Iterable[tuple[int, int]], dtype: torch.dtype = torch.float32) -> int:
    """Upper bound of the memory that exact moments need, in bytes.

    Which layers share an input is only known once a batch has run, so each layer's A is counted on its own.

    Args:
        shapes: (m, n) of each tapped layer.
        dtype: Type of the accumulators.
    """
    return sum(packed_size(m) + packed_size(n) + m + n for m, n in shapes) * dtype.itemsize
