"""Amounts of memory as people write them, and the refusal of a plan that does not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import torch

from fasc_lightning.planned_storage import LayerMemory, Peak, Storage, choose_storage, gigabytes

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(amount: int | float | str | None, option: str) -> int | None:
    """Return an amount of memory in bytes.

    Args:
        amount: A number of bytes, or one with a unit: "80GB" (10^9 bytes each), "24GiB" (2^30).
        option: Names it in messages.

    Raises:
        ValueError: If it is no positive amount.
    """
    if amount is None:
        return None
    value = math.nan
    if isinstance(amount, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", amount)
        if found is not None and found[2].upper() in _UNITS:
            value = float(found[1]) * _UNITS[found[2].upper()]
    elif not isinstance(amount, bool):
        value = float(amount)
    if not (math.isfinite(value) and value >= 1):
        raise ValueError(
            f"Expected `{option}` to be a number of bytes, or a text like '80GB' or '24GiB', but got {amount!r}."
        )
    return int(value)


def refusal(
    taken: Sequence[LayerMemory],
    shapes: Mapping[str, tuple[int, int]],
    peak: Callable[[Storage], Peak],
    have: Peak,
    device: torch.device,
    weights: int,
    passes: int,
    most: int,
) -> str:
    """Return the message that nothing fits: what is short, and what would do.

    Args:
        taken: What each layer takes.
        shapes: (m, n) of each, by name.
        peak: Largest memory of a storage.
        have: Memory that there is.
        device: What it is planned for.
        weights: Bytes of the whole model.
        passes: How many were asked for, or the first that were tried.
        most: How many there can be.
    """
    asked = peak(Storage(passes=passes)).device
    remedies = [f"{asked / 1e9:.3g} GB on {device} hold exact moments"]
    if (least := peak(Storage(sketched=True, passes=passes)).device) < asked:
        remedies.append(f"{least / 1e9:.3g} GB hold sketched ones (`sketch`)")
    if device.type != "cpu" and (aside := peak(Storage(offloaded=True, passes=passes))).device <= have.device:
        remedies.append(f"moments_device='cpu' with {gigabytes(aside.host)} there (`host_memory` of a plan)")
    fewer = choose_storage(peak, have, sketched=(False, True), offloaded=(False,), passes=None, most=most)
    if fewer is None:
        remedies.append(f"a pass for every layer takes {peak(Storage(passes=most)).device / 1e9:.3g} GB")
    elif fewer.passes > 1:
        remedies.append(
            f"{fewer.passes} passes over the data fit (passes={fewer.passes}{', sketched' if fewer.sketched else ''})"
        )
    name, wide = max(zip(shapes, taken, strict=True), key=lambda entry: entry[1].workspace)
    alone = min(wide.exact + wide.workspace, wide.sketched + wide.sketched_workspace)
    one = (
        f" Not even one layer fits: the weights take {weights / 1e9:.3g} GB, and {name!r} {shapes[name]} "
        f"{alone / 1e9:.3g} GB to gather and factorise."
        if weights + alone + wide.factors > have.device
        else ""
    )
    return (
        f"Expected a compression of {len(taken)} layers to fit into {have.device / 1e9:.3g} GB on {device} but it "
        f"needs {asked / 1e9:.3g} GB.{one} What would do: {'; '.join(remedies)}; or target fewer layers (`targets`, "
        "`exclude`) in several runs."
    )
