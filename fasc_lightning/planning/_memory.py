"""The memory of a calibration, and the choice of a storage that fits: kind, device and passes of the moments.

All of it is arithmetic on shapes. A layer takes three kinds of memory: its moments, while batches run; its factors,
from their computation until ranks are chosen; and a workspace to compute them in, once for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from fasc_lightning.calibration import shares
from fasc_lightning.options import ReductionKind
from fasc_lightning.statistics import LayerSketches, Projection, Sketch, moments_bytes


@dataclass(frozen=True)
class LayerMemory:
    """Memory of one layer, in bytes.

    Attributes:
        moments: Bytes of its moments, while batches run.
        factors: Bytes of its factors of every rank, from their computation until the layers are built.
        workspace: Bytes that computing the factors takes.
    """

    moments: int
    factors: int
    workspace: int


@dataclass(frozen=True)
class Storage:
    """Storage of the moments of all layers: options of :class:`~fasc_lightning.FascCallback`.

    In several passes finished factors wait on disk (``compression/_disk_factors.py``).

    Attributes:
        kind: Kind of sketch for sides that need not be held whole; None holds all sides whole and exact.
        offloaded: Whether moments and finished factors are on the CPU, beside another device.
        passes: Number of passes over the data, each for a share of the layers.
    """

    kind: ReductionKind | None = None
    offloaded: bool = False
    passes: int = 1


@dataclass(frozen=True)
class Peak:
    """Largest memory of a compression, in bytes: on the device, and on the CPU beside it."""

    device: int
    host: int


def rebuilding_bytes(width: int, size: int, itemsize: int) -> int:
    """Return the bytes to rebuild a sketch in: one copy of it, five in float64, and five cores."""
    return width * size * (itemsize + 40) + 40 * size * size


def solving_bytes(m: int, n: int, itemsize: int, sketched: bool, projected: bool) -> int:
    """Return the bytes that :func:`~fasc_lightning.solvers.two_sided` takes beside the moments of an (m, n) layer.

    At first these are W, W and W A in float64, and two matrices of the smaller side, a root and a product. Later they
    are W, the factor of its shape, and six matrices of the smaller side in float64: the root, the product before and
    after the root, its eigenvectors, and two for LAPACK.

    Args:
        m: Outputs.
        n: Inputs.
        itemsize: Bytes of a number of W and of the factors.
        sketched: Whether a moment is sketched: the weight through a sketch takes three matrices more.
        projected: Whether a moment is projected: then W is not needed in float64.
    """
    r = min(m, n)
    products = 0 if projected else (itemsize + (40 if sketched else 16)) * m * n + 16 * r * r
    return max(products, 2 * itemsize * m * n + 48 * r * r)


def layer_memory(
    m: int,
    n: int,
    *,
    sketches: LayerSketches | None = None,
    needs: Iterable[str] = frozenset(),
    moments_dtype: torch.dtype = torch.float32,
) -> LayerMemory:
    """Return the memory of an (m, n) layer.

    The workspace holds the unpacked moments, the metric in float64, and what
    :func:`~fasc_lightning.solvers.two_sided` takes (:func:`solving_bytes`).

    Args:
        m: Outputs.
        n: Inputs.
        sketches: Sketches of its sides that are not held whole.
        needs: Statistics to gather besides the means.
        moments_dtype: Dtype of the accumulators.
    """
    sketches, needs = sketches or LayerSketches(), frozenset(needs)
    r = min(m, n)
    sides, both = ((m, sketches.outputs), (n, sketches.inputs)), moments_dtype.itemsize + 8
    rebuilt = [rebuilding_bytes(d, s.size, moments_dtype.itemsize) for d, s in sides if isinstance(s, Sketch)]
    # At this point a sketch is a factor and a basis in float64, a projection a matrix as wide as the narrower side.
    held = sum(16 * d * s.size if isinstance(s, Sketch) else both * (d if s is None else s.size) ** 2 for d, s in sides)
    projected = any(isinstance(s, Projection) for _, s in sides)
    return LayerMemory(
        moments=moments_bytes([(m, n)], moments_dtype, needs, [sketches]),
        factors=r * (m + n) * moments_dtype.itemsize,
        workspace=max(held + solving_bytes(m, n, moments_dtype.itemsize, bool(rebuilt), projected), *rebuilt, 0),
    )


def peak_memory(
    layers: Sequence[LayerMemory],
    storage: Storage,
    resident: int,
    activations: int,
    consume: bool = True,
    units: Sequence[Sequence[int]] | None = None,
    built: int = 0,
    measured: bool = False,
) -> Peak:
    """Return the largest memory of a compression, computed layer by layer.

    Args:
        layers: Memory of each layer in this storage.
        storage: Storage of the moments.
        resident: Bytes on the device at all times: weights, gradients and optimizer states.
        activations: Additional bytes while a batch runs.
        consume: Whether moments are freed once their factors exist; a refit needs them until the end.
        units: Layers that one pass gathers together (:func:`~fasc_lightning.calibration.share_units`).
        built: Bytes of the replacements, on the device beside the layers until the swap, in place of the factors.
        measured: Whether batches are replayed when all factors exist, to measure the layers' losses.
    """
    moments = [layer.moments for layer in layers]
    held = factors = busiest = most = 0
    for share in shares(moments, storage.passes, units):
        held += sum(moments[i] for i in share)
        most = max(most, held + factors)
        busiest = max(busiest, activations + (0 if storage.offloaded else held + factors))
        for i in share:
            factors += layers[i].factors if storage.passes == 1 else 0
            there = 0 if storage.offloaded else held + factors
            # The current layer's factors are on the device even if finished factors are not.
            made = 0 if storage.passes == 1 and not storage.offloaded else layers[i].factors
            busiest = max(busiest, there + made + layers[i].workspace)
            most = max(most, held + factors)
            if consume:
                held -= moments[i]
    kept = 0 if storage.offloaded else held
    there = 0 if storage.offloaded else held + factors
    # A layer's factors are freed once it is built. Replacements are smaller than the factors of every rank.
    busiest = max(busiest, kept + built, there + (activations if measured else 0))
    return Peak(busiest + resident, most if storage.offloaded else 0)


def choose_storage(
    peak: Callable[[Storage], Peak],
    memory: Peak,
    *,
    kinds: Sequence[ReductionKind | None],
    offloaded: Sequence[bool],
    passes: int | None,
    most: int,
) -> Storage | None:
    """Return the first storage that fits, in the order of accuracy, then of speed; None if none fits.

    Args:
        peak: Returns the largest memory of a storage.
        memory: Available memory, on the device and on the CPU.
        kinds: Allowed kinds of sketches, in the order of preference.
        offloaded: Allowed values of ``Storage.offloaded``, in the order of preference.
        passes: Number of passes; None tries one, then as few as fit.
        most: Largest number of passes.
    """

    def fits(storage: Storage) -> bool:
        found = peak(storage)
        return found.device <= memory.device and found.host <= memory.host

    tiers = list(product(kinds, offloaded))
    for tier in tiers:
        if fits(found := Storage(*tier, passes=passes or 1)):
            return found
    if passes is not None:
        return None
    for tier in tiers:
        if fits(Storage(*tier, passes=most)):
            return next(s for count in range(2, most + 1) if fits(s := Storage(*tier, passes=count)))
    return None


def gigabytes(size: float) -> str:
    """Return bytes as text for :func:`~fasc_lightning.planning.bytes_of`, rounded up."""
    return f"{math.ceil(size / 1e9)}GB"
