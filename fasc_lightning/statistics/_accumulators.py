"""Accumulators: sums over tokens that merge by addition, of which all statistics of a layer are made."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from fasc_lightning.statistics._projected import Projection
from fasc_lightning.statistics._reduction import (
    Reduction,
    add_second_moment_,
    second_moment,
    second_moment_diagonal,
    second_moment_size,
)
from fasc_lightning.statistics._second_moments import SecondMoment, dense

#: Options of torchmetrics. `all_reduce_` sums over processes, since torchmetrics would gather every process's matrices.
#: A cached result would be a second matrix, and wrong after a merge.
OWN_SYNC: dict[str, Any] = {"sync_on_compute": False, "compute_with_cache": False}

#: (sqrt(5) - 1) / 2.
GOLDEN_SECTION = (5**0.5 - 1) / 2


class Accumulator(Metric):
    """Sums over rows, and the count of the rows.

    Merging is exact: the states of two streams add up, in any order and on any number of processes. The first update
    allocates the memory, so a layer that never runs costs nothing.

    Args:
        dtype: Dtype of the sums, float32 or float64; half-precision inputs are converted first.
        shapes: Shape of each state by name.
    """

    full_state_update = False
    is_differentiable = False

    count: Tensor

    def __init__(self, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]]) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"Expected `dtype` to be torch.float32 or torch.float64 but got {dtype}.")
        super().__init__(**OWN_SYNC)
        self.accumulator_dtype = dtype
        self.state_shapes = shapes
        # Scalars stand in for the zero matrices: torchmetrics keeps a second copy of every default.
        for name in shapes:
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self._unwrap()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._unwrap()

    def _unwrap(self) -> None:
        """Drop torchmetrics' wrappers of ``update`` and ``compute``, which count calls and cache results.

        An accumulator that held them would be part of a reference cycle. Its matrices would stay in memory until the
        next run of the garbage collector, which comes after thousands of new objects: never, in a loop over layers.
        """
        del self.update, self.compute

    def allocate(self) -> None:
        """Give the states their full shapes; the first update and a reduction call this."""
        for name, shape in self.state_shapes.items():
            state = getattr(self, name)
            if state.shape != shape:
                setattr(self, name, torch.zeros(shape, dtype=self.accumulator_dtype, device=state.device))

    def average(self, name: str) -> Tensor:
        """Return a state divided by the count; zeros if nothing was added."""
        self.allocate()
        return getattr(self, name) / self.count.clamp(min=1).to(self.accumulator_dtype)

    @property
    def sums(self) -> dict[str, Tensor]:
        """The states and the count, by name."""
        return {name: getattr(self, name) for name in (*self.state_shapes, "count")}

    def add_(self, other: Self, weight: float = 1.0) -> Self:
        """Add another stream's sums in place; with a weight, as if its rows had come that many times."""
        if other.count > 0:
            self.allocate()
            theirs = other.sums
            for name, mine in self.sums.items():
                mine.add_(theirs[name].to(mine.device), alpha=weight)
        return self

    def subtract_(self, other: Self) -> Self:
        """Subtract another stream's sums in place; its rows must be among the rows here."""
        theirs = other.sums
        for name, mine in self.sums.items():
            mine -= theirs[name]
        if self.count == 0:  # no rows are left, so no rounding may be left either
            for mine in self.sums.values():
                mine.zero_()
        return self

    def all_reduce_(self, group: Any | None = None, device: torch.device | None = None) -> None:
        """Sum the states over all processes, in place.

        torchmetrics would first gather every process's matrices. With d^2 numbers a state, no process has the memory
        for them. All processes must call this for the same streams in the same order.
        """
        self.allocate()
        for state in self.sums.values():
            moved = state if device is None else state.to(device)
            dist.all_reduce(moved, group=group)
            state.copy_(moved)

    @property
    def nbytes(self) -> int:
        """Bytes that the states hold now."""
        return sum(t.numel() * t.element_size() for t in self.sums.values())


class Moments(Accumulator):
    """Count, sum and sum of outer products of a stream of vectors.

    The symmetric matrix is packed (:func:`~fasc_lightning.statistics.add_gram_`).

    Args:
        features: Length d of the vectors.
        dtype: Dtype of the sums.
        absolute: Whether to sum the absolute values as well.
        second: Whether to sum the outer products, which are nearly all of the work and memory; otherwise only their
            trace.
        sketch: Sketch or projection that takes the place of the outer products.
    """

    outer: Tensor
    energy: Tensor
    total: Tensor
    magnitude: Tensor

    def __init__(
        self,
        features: int,
        dtype: torch.dtype = torch.float32,
        absolute: bool = False,
        second: bool = True,
        sketch: Reduction | None = None,
    ) -> None:
        shapes: dict[str, tuple[int, ...]] = {"total": (features,)}
        if second:
            shapes["outer"] = (second_moment_size(features, sketch),)
        else:
            shapes["energy"] = (1,)
        if absolute:
            shapes["magnitude"] = (features,)
        super().__init__(dtype, shapes)
        self.features = features
        self.absolute = absolute
        self.second = second
        self.sketch = sketch

    def update(self, x: Tensor, scale: float = 1.0, finite: list[Tensor] | None = None) -> None:
        """Add the rows of ``scale * x``.

        Args:
            x: Vectors, shape (tokens, d), any floating dtype.
            scale: Factor of all rows; cheaper here than as a copy of ``x``.
            finite: Gets a scalar that tells whether ``x`` is finite, in place of an error: reading it at once would
                make the host wait for an accelerator.

        Raises:
            ValueError: If ``x`` is not of shape (tokens, d).
            FloatingPointError: If ``x`` holds NaN or Inf, or its sum overflows; nothing is added then.
        """
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"Expected vectors of shape (tokens, {self.features}) but got {tuple(x.shape)}.")
        self.allocate()
        # The thread of the backward pass may have autocast on, which must not round the moments.
        with torch.autocast(x.device.type, enabled=False):
            X = x.detach().to(self.accumulator_dtype)
            total = X.sum(0)
            # A sum is finite only if every term is, so one scalar is read back instead of another pass.
            is_finite = torch.isfinite(total.sum())
            if finite is not None:
                finite.append(is_finite)
            elif not is_finite:
                raise FloatingPointError("Expected finite vectors but some hold NaN or Inf.")
            if self.second:
                add_second_moment_(self.outer, self.sketch, X, scale**2)
            else:
                self.energy.add_(X.square().sum(), alpha=scale**2)
            self.total.add_(total, alpha=scale)
            if self.absolute:
                self.magnitude.add_(X.abs().sum(0), alpha=abs(scale))
            self.count += X.shape[0]

    def compute(self) -> Tensor:
        """Return the uncentred second moment E[x x^T], shape (d, d)."""
        return dense(self.second_moment())

    def second_moment(self) -> SecondMoment:
        """Return E[x x^T] as it is held: a sketch stays low-rank."""
        self.allocate()
        return second_moment(self.outer, self.features, self.sketch, self.count.clamp(min=1))

    def mean(self) -> Tensor:
        """Return the mean vector, shape (d,)."""
        return self.average("total")

    def mean_square(self) -> Tensor:
        """Return E|x|^2, the trace of the second moment, a float64 scalar."""
        self.allocate()
        total = second_moment_diagonal(self.outer, self.features, self.sketch) if self.second else self.energy
        return total.double().sum() / self.count.clamp(min=1)

    def mean_magnitude(self) -> Tensor:
        """Return E|x|, shape (d,); only for a stream made with ``absolute``."""
        return self.average("magnitude")

    def covariance(self) -> Tensor:
        """Return the centred second moment, shape (d, d)."""
        mean = self.mean()
        return self.compute() - torch.outer(mean, mean)


class CrossMoments(Accumulator):
    """Count and sum of the outer products x h^T of a stream of pairs of vectors.

    Args:
        n: Length of x.
        m: Length of h.
        dtype: Type of the accumulators.
    """

    outer: Tensor

    def __init__(self, n: int, m: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype, {"outer": (n, m)})
        self.shape = (n, m)

    def update(self, x: Tensor, h: Tensor, scale: float = 1.0) -> None:
        """Add the pairs (x, scale * h).

        Args:
            x: Shape (tokens, n).
            h: Shape (tokens, m).
            scale: Factor of every h.

        Raises:
            ValueError: If a shape is wrong.
        """
        check_pairs(x, h, self.shape)
        self.allocate()
        with torch.autocast(x.device.type, enabled=False):
            self.outer.addmm_(
                x.detach().to(self.accumulator_dtype).T, h.detach().to(self.accumulator_dtype), alpha=scale
            )
            self.count += len(x)

    def compute(self) -> Tensor:
        """Return E[x h^T], shape (n, m)."""
        return self.average("outer")


class CoupledMoments(Accumulator):
    r"""Second moments of x and of h in which each token weighs by the length of its other vector.

    With p = |h| and q = |x|,

        A = \sum_t p_t x_t x_t^T / \sum_t p_t,    G = \sum_t q_t h_t h_t^T / \sum_t q_t.

    The weights |h|^2 and |x|^2 would be one step from identities towards the Kronecker product nearest to E[(x x^T) (x)
    (h h^T)] (Van Loan and Pitsianis 1993). Because the lengths of gradients have heavy tails, few tokens would then
    decide. The square roots give up some of the coupling for more tokens.

    Files hold the sums of A as ``right`` and the sums of G as ``left``.

    Args:
        m: Length of h.
        n: Length of x.
        dtype: Dtype of the sums.
        sketches: Sketch or projection of A and of G, None for exact ones.
        output_share: Share of the tokens of an update whose outer products enter G (:func:`systematic_sample`). G then
            is an estimate; A is exact.
    """

    right: Tensor
    left: Tensor
    weights: Tensor

    def __init__(
        self,
        m: int,
        n: int,
        dtype: torch.dtype = torch.float32,
        sketches: tuple[Reduction | None, Reduction | None] = (None, None),
        output_share: float = 1.0,
    ) -> None:
        A, G = (second_moment_size(d, sketch) for d, sketch in zip((n, m), sketches, strict=True))
        super().__init__(dtype, {"right": (A,), "left": (G,), "weights": (2,)})  # state names, as in files
        self.shape = (m, n)
        self.sketches = sketches
        self.output_share = output_share

    def update(self, x: Tensor, h: Tensor, scale: float = 1.0, seen: Tensor | None = None) -> None:
        """Add the pairs (x, scale * h).

        Args:
            x: Shape (tokens, n).
            h: Shape (tokens, m).
            scale: Factor of every h.
            seen: W x, shape (tokens, m), if A is projected; W^T h, shape (tokens, n), if G is.

        Raises:
            ValueError: If a shape is wrong, or a moment is projected and ``seen`` is missing.
        """
        m, n = self.shape
        check_pairs(x, h, (n, m))
        self.allocate()
        with torch.autocast(x.device.type, enabled=False):
            S = None if seen is None else seen.detach().to(self.accumulator_dtype)
            X, H = x.detach().to(self.accumulator_dtype), h.detach().to(self.accumulator_dtype)
            p, q = H.norm(dim=1), X.norm(dim=1)
            of_A, of_G = self.sketches
            for sums, sketch, rows, root, weight, share in (
                (self.right, of_A, X, p.sqrt()[:, None], abs(scale), 1.0),
                (self.left, of_G, H, q.sqrt()[:, None], scale**2, self.output_share),
            ):
                weighted = rows * root
                through = S * root if S is not None and isinstance(sketch, Projection) else None
                if share < 1 and through is None:
                    # Multiples of the golden section spread the starts evenly, wherever a fit was resumed.
                    weighted = systematic_sample(weighted, p * q, share, (self.count * GOLDEN_SECTION).frac())
                add_second_moment_(sums, sketch, weighted, weight, through)
            self.weights += torch.stack([p.sum() * abs(scale), q.sum()])
            self.count += len(x)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return A (n, n) and G (m, m); zeros if all weights are zero."""
        A, G = self.second_moments()
        return dense(A), dense(G)

    def second_moments(self) -> tuple[SecondMoment, SecondMoment]:
        """Return A and G as they are held: a sketch stays low-rank."""
        self.allocate()
        (m, n), (of_A, of_G) = self.shape, self.sketches
        p, q = self.weights.clamp(min=torch.finfo(self.accumulator_dtype).tiny)
        return second_moment(self.right, n, of_A, p), second_moment(self.left, m, of_G, q)


def systematic_sample(rows: Tensor, sizes: Tensor, share: float, start: Tensor) -> Tensor:
    """Return a share of the rows, each scaled so that the sum of their outer products is about that of all rows.

    Systematic sampling with probability proportional to size (Madow 1949): the rows stand one after the other on a
    line, each as long as its size, and points at equal distances pick rows. A row is scaled by the root of the inverse
    of its number of points to expect; a long one may be picked several times. Over all starts, the expectation is the
    sum of all rows.

    Args:
        rows: Shape (tokens, d).
        sizes: At least zero, shape (tokens,); rows of size zero count as zero.
        share: Share of the rows to pick, above 0.
        start: Place of the first point, as a part of the distance between two, in [0, 1); a float64 scalar.
    """
    count = math.ceil(share * len(rows))
    if count == 0:
        return rows
    ends = sizes.double().cumsum(0)
    distance = ends[-1] / count
    points = (torch.arange(count, dtype=torch.float64, device=rows.device) + start) * distance
    picked = torch.searchsorted(ends, points).clamp(max=len(rows) - 1)
    # Divided first: the inverse of the smallest numbers would overflow.
    expected = sizes[picked].double() / distance.clamp(min=torch.finfo(torch.float64).tiny)
    factor = torch.where(expected > 0, expected.rsqrt(), 0.0)
    return rows[picked] * factor.to(rows.dtype)[:, None]


def check_pairs(x: Tensor, h: Tensor, shape: tuple[int, int]) -> None:
    """Refuse x and h that are not pairs of rows of the given lengths.

    Raises:
        ValueError: If they are not.
    """
    if (x.shape[1:], h.shape[1:]) != ((shape[0],), (shape[1],)) or len(x) != len(h):
        raise ValueError(f"Expected as many x and h of lengths {shape} but got {x.shape=} and {h.shape=}.")
