"""Where the moments of a calibration fit: exact or sketched, on the device or beside it, in how many passes.

All of it is arithmetic on shapes. A layer's memory is of three kinds: its moments, while batches run; its factors, from
when they are made until ranks are known; and the room that making them takes, once for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fasc_lightning.layer_moments import check_needs
from fasc_lightning.moments import LayerSketches, moments_bytes
from fasc_lightning.packed import packed_size
from fasc_lightning.sketch import Sketch

#: What a sketch can stand in for; statistics of other kinds are exact or not at all.
SKETCHED_NEEDS = frozenset({"plain", "coupled", "abs_x"})

Kind = Literal["exact", "sketched"]


def rebuilding_bytes(width: int, size: int, itemsize: int) -> int:
    """Return the room in which a sketch becomes a factor: a copy of it, three of these in float64, five cores."""
    return width * size * (itemsize + 24) + 40 * size * size


@dataclass(frozen=True)
class LayerMemory:
    """What one layer takes, in bytes.

    Attributes:
        exact: Its moments, exact.
        sketched: Its moments with the sides sketched for which that is smaller; ``exact`` where it is for neither.
        factors: Its factors of every rank, from when they are made until the layers are built.
        workspace: The room in which they are made of exact moments.
        sketched_workspace: The room in which they are made of sketched ones.
    """

    exact: int
    sketched: int
    factors: int
    workspace: int
    sketched_workspace: int


@dataclass(frozen=True)
class Storage:
    """How the moments of all layers are held.

    Attributes:
        sketched: Indices of the layers whose moments are sketched.
        offloaded: Indices of those whose moments are beside the device, on the CPU.
        factors_offloaded: Whether finished factors wait there, too.
        passes: How often the data are gone through, each time for a share of the layers.
    """

    sketched: frozenset[int] = frozenset()
    offloaded: frozenset[int] = frozenset()
    factors_offloaded: bool = False
    passes: int = 1


@dataclass(frozen=True)
class Peak:
    """Largest memory of a compression, in bytes: on the device, and beside it on the CPU."""

    device: int
    host: int


def layer_memory(
    m: int,
    n: int,
    *,
    sketch_size: int | None = None,
    needs: Iterable[str] = frozenset(),
    moments_dtype: torch.dtype = torch.float32,
    sketches: LayerSketches | None = None,
) -> LayerMemory:
    """Return what an (m, n) layer takes.

    The room for factors is that of :func:`~fasc_lightning.solvers.fasc.two_sided`, in float64: the moments unpacked,
    the metric, W and W A, and eight matrices of the smaller side for its root and its eigenvectors.

    Args:
        m: Outputs.
        n: Inputs.
        sketch_size: Columns of a sketch; None for no sketch.
        needs: What is gathered besides the means.
        moments_dtype: Of the accumulators.
        sketches: Of the layer, where it is settled which sides are sketched: ``exact`` is then what that takes, too.
    """
    needs = check_needs(needs)
    exact = moments_bytes([(m, n)], moments_dtype, needs)
    sketched, widths = exact, {m: m, n: n}
    if sketch_size is not None and needs <= SKETCHED_NEEDS:
        copies = len(needs & {"plain", "coupled"})
        for width in (m, n):
            if sketch_size < width and (made := Sketch(width, sketch_size)).is_worthwhile:
                sketched -= (packed_size(width) - made.numbers) * copies * moments_dtype.itemsize
                widths[width] = sketch_size
    if sketches is not None:  # what there shall be, and nothing else
        exact = sketched = moments_bytes([(m, n)], moments_dtype, needs, [sketches])
        for width, made_of in ((n, sketches.inputs), (m, sketches.outputs)):
            if made_of is not None:
                widths[width] = made_of.size
    r = min(m, n)

    def workspace(sides: int) -> int:
        return sides * (moments_dtype.itemsize + 8) + (2 * m * n + 8 * r * r) * 8

    rebuilt = [rebuilding_bytes(d, s, moments_dtype.itemsize) for d, s in widths.items() if s < d]
    sketched_workspace = max([workspace(m * widths[m] + n * widths[n]), *rebuilt])

    return LayerMemory(
        exact=exact,
        sketched=sketched,
        factors=r * (m + n) * moments_dtype.itemsize,
        workspace=workspace(m * m + n * n) if sketches is None else sketched_workspace,
        sketched_workspace=sketched_workspace,
    )


def shares(sizes: Sequence[int], passes: int) -> list[list[int]]:
    """Split layers into consecutive shares of about equal size, so that those with one input stay together.

    Args:
        sizes: Of the layers, in order.
        passes: How many shares; more than there are layers give one a layer.

    Returns:
        The indices of each share, none of them empty.
    """
    total, before = sum(sizes), 0
    found: list[list[int]] = []
    current: list[int] = []
    for i, size in enumerate(sizes):
        # A layer belongs to the share in which its middle lies.
        if current and (before + size / 2) * passes >= total * (len(found) + 1):
            found.append(current)
            current = []
        current.append(i)
        before += size
    return [*found, current] if current else found


def peak_memory(
    layers: Sequence[LayerMemory], storage: Storage, resident: int, activations: int, consume: bool = True
) -> Peak:
    """Return the largest memory of a compression, going through it layer by layer.

    Args:
        layers: What each takes.
        storage: How it is held.
        resident: Bytes on the device all the time: weights, and what training them needs.
        activations: Bytes that a batch takes on top while it runs.
        consume: Whether moments are freed as factors are made of them; a refit needs them to the end.
    """
    moments = [layer.sketched if i in storage.sketched else layer.exact for i, layer in enumerate(layers)]
    on_host = [i in storage.offloaded for i in range(len(layers))]
    device = host = factors = 0
    for share in shares(moments, storage.passes):
        held = sum(moments[i] for i in share if not on_host[i])
        aside = sum(moments[i] for i in share if on_host[i])
        beside = factors if storage.factors_offloaded else 0
        device = max(device, held + factors - beside + activations)
        host = max(host, aside + beside)
        for i in share:
            factors += layers[i].factors
            beside = factors if storage.factors_offloaded else 0
            # The factors that are being made are on the device in any case.
            made = layers[i].factors if storage.factors_offloaded else factors
            room = layers[i].sketched_workspace if i in storage.sketched else layers[i].workspace
            device = max(device, held + made + room)
            host = max(host, aside + beside)
            if consume and on_host[i]:
                aside -= moments[i]
            elif consume:
                held -= moments[i]
    return Peak(device + resident, host)


def choose_storage(
    layers: Sequence[LayerMemory],
    peak: Callable[[Storage], Peak],
    memory: Peak,
    *,
    sketches: bool,
    passes: int | None,
) -> Storage | None:
    """Return the first storage that fits, the most faithful and then the fastest first; None if none does.

    Exact moments come before sketched ones, those on the device before those beside it, and one pass before several;
    of the layers no more are sketched than need be, those first where it saves most, and likewise moved.

    Args:
        layers: What each takes.
        peak: Largest memory of a storage.
        memory: What there is, on the device and beside it; none beside it keeps everything on the device.
        sketches: Whether sketches may stand in.
        passes: How many passes; None for as few as fit.
    """
    by_saving = sorted(range(len(layers)), key=lambda i: layers[i].sketched - layers[i].exact)
    by_saving = [i for i in by_saving if sketches and layers[i].sketched < layers[i].exact]
    by_size = sorted(range(len(layers)), key=lambda i: -layers[i].exact)
    everything = frozenset(by_saving)

    def on_device(storage: Storage) -> bool:
        return peak(storage).device <= memory.device

    def placed(sketched: frozenset[int], count: int) -> Storage | None:
        """Find places for moments of given kinds in a given number of passes."""
        storage = Storage(sketched, passes=count)
        if on_device(storage):
            return storage
        if memory.host == 0:
            return None

        def moved(some: int) -> Storage:
            return Storage(sketched, frozenset(by_size[:some]), factors_offloaded=True, passes=count)

        if not on_device(moved(len(by_size))):
            return None
        storage = moved(_fewest(len(by_size), lambda some: on_device(moved(some))))
        return storage if peak(storage).host <= memory.host else None

    found = placed(frozenset(), passes or 1)
    if found is None and by_saving and placed(everything, passes or 1) is not None:
        some = _fewest(len(by_saving), lambda some: placed(frozenset(by_saving[:some]), passes or 1) is not None)
        found = placed(frozenset(by_saving[:some]), passes or 1)
    if found is not None or passes is not None:
        return found
    for sketched in dict.fromkeys((frozenset[int](), everything)):
        if placed(sketched, len(layers)) is not None:
            count = _fewest(len(layers), lambda count: placed(sketched, max(count, 1)) is not None)  # noqa: B023
            return placed(sketched, max(count, 1))
    return None


def _fewest(most: int, enough: Callable[[int], bool]) -> int:
    """Return the least number that is enough, where ``most`` is and more never hurts."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return high
