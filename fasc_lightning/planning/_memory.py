"""Where the moments of a calibration fit: whole or not, on the device or beside it, in how many passes.

All of it is arithmetic on shapes. A layer's memory is of three kinds: its moments, while batches run; its factors, from
when they are made until ranks are known; and the room that making them takes, once for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from fasc_lightning.calibration import shares
from fasc_lightning.options import ReductionKind
from fasc_lightning.statistics import LayerSketches, Sketch, moments_bytes


@dataclass(frozen=True)
class LayerMemory:
    """What one layer takes, in bytes.

    Attributes:
        moments: While batches run.
        factors: Of every rank, from when they are made until the layers are built.
        workspace: The room in which they are made.
    """

    moments: int
    factors: int
    workspace: int


@dataclass(frozen=True)
class Storage:
    """How the moments of all layers are held: options of :class:`~fasc_lightning.FascCallback`.

    In several passes finished factors wait on the disk (``compression/_disk_factors.py``).

    Attributes:
        kind: How those sides are held that need not be held whole; None for all of them whole and exact.
        offloaded: Whether moments and finished factors are beside the device, on the CPU.
        passes: How often the data are gone through, each time for a share of the layers.
    """

    kind: ReductionKind | None = None
    offloaded: bool = False
    passes: int = 1


@dataclass(frozen=True)
class Peak:
    """Largest memory of a compression, in bytes: on the device, and beside it on the CPU."""

    device: int
    host: int


def rebuilding_bytes(width: int, size: int, itemsize: int) -> int:
    """Return the room in which a sketch is rebuilt: a copy of it, five of these in float64, five cores."""
    return width * size * (itemsize + 40) + 40 * size * size


def layer_memory(
    m: int,
    n: int,
    *,
    sketches: LayerSketches | None = None,
    needs: Iterable[str] = frozenset(),
    moments_dtype: torch.dtype = torch.float32,
) -> LayerMemory:
    """Return what an (m, n) layer takes.

    The room for factors is that of :func:`~fasc_lightning.solvers.two_sided`, in float64: the moments unpacked,
    the metric, W and W A, and eight matrices of the smaller side for its root and its eigenvectors.

    Args:
        m: Outputs.
        n: Inputs.
        sketches: Of its sides that are not held whole.
        needs: What is gathered besides the means.
        moments_dtype: Of the accumulators.
    """
    sketches, needs = sketches or LayerSketches(), frozenset(needs)
    r = min(m, n)
    sides, both = ((m, sketches.outputs), (n, sketches.inputs)), moments_dtype.itemsize + 8
    rebuilt = [rebuilding_bytes(d, s.size, moments_dtype.itemsize) for d, s in sides if isinstance(s, Sketch)]
    # A sketch is a factor and a basis in float64 by then, a projection a matrix as wide as the narrower side.
    held = sum(16 * d * s.size if isinstance(s, Sketch) else both * (d if s is None else s.size) ** 2 for d, s in sides)
    products = 5 if rebuilt else 2  # the weight through a sketch takes three more
    return LayerMemory(
        moments=moments_bytes([(m, n)], moments_dtype, needs, [sketches]),
        factors=r * (m + n) * moments_dtype.itemsize,
        workspace=max(held + (products * m * n + 8 * r * r) * 8, *rebuilt, 0),
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
    """Return the largest memory of a compression, going through it layer by layer.

    Args:
        layers: What each takes, held so.
        storage: How it is held.
        resident: Bytes on the device all the time: weights, and what training them needs.
        activations: Bytes that a batch takes on top while it runs.
        consume: Whether moments are freed as factors are made of them; a refit needs them to the end.
        units: Layers that one pass gathers together (:func:`~fasc_lightning.calibration.share_units`).
        built: Bytes of what replaces the layers, on the device beside them until the swap.
        measured: Whether batches run once more when all factors are there, to measure what layers lose.
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
            # The factors that are being made are on the device, also where finished ones are not.
            made = 0 if storage.passes == 1 and not storage.offloaded else layers[i].factors
            busiest = max(busiest, there + made + layers[i].workspace)
            most = max(most, held + factors)
            if consume:
                held -= moments[i]
    there = 0 if storage.offloaded else held + factors
    busiest = max(busiest, there + built, there + (activations if measured else 0))
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
    """Return the first storage that fits, the most faithful and then the fastest first; None if none does.

    Args:
        peak: Largest memory of a storage.
        memory: What there is, on the device and beside it.
        kinds: How moments may be held, in the order of preference.
        offloaded: Likewise, whether they are beside the device.
        passes: How many passes; None for one, else as few as fit.
        most: How many passes at most.
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
    """Return bytes as a text that :func:`~fasc_lightning.planning.bytes_of` reads, rounded up."""
    return f"{math.ceil(size / 1e9)}GB"
