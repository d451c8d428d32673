"""Free and peak memory of the process and of a device."""

from __future__ import annotations

import ctypes
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch


def available_memory(device: torch.device) -> int:
    """Return the free memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = int(psutil.virtual_memory().available)
    # In a container the process may use less than the host's memory.
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    return free if limit is None or used is None else min(free, limit - used)


def _cgroup(name: str) -> int | None:
    path = Path("/sys/fs/cgroup") / name
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None  # "max" stands for no limit


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far, in bytes: of the device on CUDA, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # there is none on Windows, and psutil knows no peak elsewhere

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Return unused memory from the allocator to the system.

    After a calibration, glibc keeps a gigabyte of pages of freed activations. Later allocations (moments, factors of
    all layers) would come on top of them. Does nothing on systems without ``malloc_trim``.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class FreedMemory:
    """Returns freed memory to the system once enough of it has been freed, because each time costs page faults.

    In a loop over layers each layer frees large copies and leaves small results, which come to lie between the places
    of the copies. The allocator then holds up to as much as the results take (glibc keeps blocks of less than 32 MiB).

    Args:
        every: Bytes after which memory is returned.
    """

    def __init__(self, every: int = 2**26) -> None:
        self._every = every
        self._freed = 0

    def add(self, size: int) -> None:
        """Count freed bytes."""
        self._freed += size
        if self._freed >= self._every:
            self._freed = 0
            return_freed_memory()


def amount(value: float, unit: str) -> str:
    """Return an amount with three digits and a prefix of its unit, as "1.23 GB" or "40.0 kFLOPs".

    Args:
        value: The amount, at least 0.
        unit: The unit, for example "B" for bytes.
    """
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            scaled = value / factor
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


#: Bytes in the units of an amount given as text.
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def text_in_bytes(text: str, more: Mapping[str, int]) -> float:
    """Return an amount such as "80GB" or "24 GiB" in bytes; NaN if it cannot be read.

    Args:
        text: A number and a unit.
        more: Bytes in further units, in capitals, besides :data:`UNITS`.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    factor = None if found is None else {**UNITS, **more}.get(found[2].upper())
    return math.nan if found is None or factor is None else float(found[1]) * factor
