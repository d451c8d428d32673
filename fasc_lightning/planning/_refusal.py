"""Parsing of memory amounts, and the message for a plan that does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from fasc_lightning._utils import amount, text_in_bytes
from fasc_lightning.options import ReductionKind
from fasc_lightning.planning._memory import LayerMemory, Peak, Storage, choose_storage, gigabytes


def bytes_of(amount: int | float | str | None, option: str) -> int | None:
    """Return an amount of memory in bytes.

    Args:
        amount: A number of bytes, or a number with a unit: "80GB" (10^9 bytes each), "24GiB" (2^30).
        option: Name of the option in messages.

    Raises:
        ValueError: If the amount is not positive, or cannot be read.
    """
    if amount is None:
        return None
    value = math.nan
    if isinstance(amount, str):
        value = text_in_bytes(amount, {"": 1, "TB": 10**12})
    elif not isinstance(amount, bool):
        value = float(amount)
    if not (math.isfinite(value) and value >= 1):
        raise ValueError(
            f"Expected `{option}` to be a number of bytes, or a text like '80GB' or '24GiB', but got {amount!r}."
        )
    return int(value)


def refusal(
    memories: Mapping[ReductionKind | None, Sequence[LayerMemory]],
    shapes: Mapping[str, tuple[int, int]],
    peak: Callable[[Storage], Peak],
    have: Peak,
    device: torch.device,
    weights: int,
    passes: int,
    most: int,
) -> str:
    """Return the message for a plan that does not fit: the missing memory and the remedies.

    Args:
        memories: Memory of each layer, by kind of sketch.
        shapes: (m, n) of each layer by name.
        peak: Returns the largest memory of a storage.
        have: Available memory.
        device: Device of the compression.
        weights: Bytes of the whole model.
        passes: Number of passes asked for, or tried first.
        most: Largest number of passes.
    """
    first, *others = memories
    asked = peak(Storage(first, passes=passes)).device
    remedies = [f"{amount(asked, 'B')} on {device} hold {_held(first)} moments"]
    less = ((kind, peak(Storage(kind, passes=passes)).device) for kind in others)
    remedies += [f"{amount(least, 'B')} hold {_held(kind)} ones" for kind, least in less if least < asked]
    if device.type != "cpu" and (aside := peak(Storage(first, True, passes))).device <= have.device:
        remedies.append(f"moments_device='cpu' with {gigabytes(aside.host)} there (`host_memory` of a plan)")
    fewer = choose_storage(peak, have, kinds=list(memories), offloaded=(False,), passes=None, most=most)
    if fewer is None:
        least = min(peak(Storage(kind, passes=most)).device for kind in memories)
        remedies.append(f"a pass for every layer takes {amount(least, 'B')}")
    elif fewer.passes > 1:
        held = "" if fewer.kind is None else f", sketch={fewer.kind!r}"
        remedies.append(f"{fewer.passes} passes over the data fit (passes={fewer.passes}{held}, update_weights=False)")
    taken = list(memories.values())
    largest = max(range(len(shapes)), key=lambda i: taken[0][i].workspace)
    name = list(shapes)[largest]
    alone = min(layers[largest].moments + layers[largest].workspace for layers in taken)
    one = (
        f" Not even one layer fits: the weights take {amount(weights, 'B')}, and {name!r} {shapes[name]} "
        f"{amount(alone, 'B')} to gather and factorise."
        if weights + alone + taken[0][largest].factors > have.device
        else ""
    )
    return (
        f"Expected a compression of {len(shapes)} layers to fit into {amount(have.device, 'B')} on {device} but it "
        f"needs {amount(asked, 'B')}.{one} What would do: {'; '.join(remedies)}; or target fewer layers (`targets`, "
        "`exclude`) in several runs."
    )


def _held(kind: ReductionKind | None) -> str:
    return "whole" if kind is None else kind
