"""Copies of batches: tensors in any nesting and in objects of any class, each on the device that it is wanted on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

#: What batches may refer to without owning it.
_SHARED = (nn.Module, Dataset, DataLoader)

_PLAIN = (str, bytes, int, float, complex, bool, type(None))


def batch_tensors(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch, each once, in an order that a copy of it has, too."""
    return [part for part in _parts(batch, set()) if isinstance(part, Tensor)]


def copy_batch(batch: Any, device: Callable[[int, Tensor], torch.device | str] | None = None) -> Any:
    """Return a copy of a batch that shares no memory with it.

    What is one object in the batch is one in the copy, and tensors that share memory do so there as well. Strings and
    the like are shared, and so are modules, data sets and what no copy can be made of.

    Args:
        batch: Of any kind.
        device: Takes the number of a tensor in :func:`batch_tensors` and the tensor, and returns where its copy is to
            be. None leaves all where they are.
    """
    memo: dict[int, Any] = {}
    storages: dict[tuple[int, torch.device], torch.UntypedStorage] = {}
    count = 0
    for part in _parts(batch, set()):
        if isinstance(part, Tensor):
            place = part.device if device is None else torch.empty(0, device=device(count, part)).device
            memo[id(part)] = _copied(part, place, storages)
            count += 1
        elif not _copyable(part):
            memo[id(part)] = part
    return copy.deepcopy(batch, memo)


def _parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """Yield the tensors of a batch, and objects that are no collections, each once."""
    if isinstance(value, _PLAIN) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (Tensor, *_SHARED)):
        yield value
        return
    items: list[Any] = []
    if isinstance(value, Mapping):
        items += [value[key] for key in value]
    elif isinstance(value, list | tuple):
        items += value
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict) and not callable(value):
        items += attributes.values()
    elif not isinstance(value, Mapping | list | tuple):
        yield value
    for item in items:
        yield from _parts(item, seen)


def _copyable(part: Any) -> bool:
    if isinstance(part, _SHARED):
        return False
    try:
        copy.deepcopy(part)
    except Exception:  # any that a class of others may raise: locks, generators, handles
        return False
    return True


def _copied(tensor: Tensor, device: torch.device, storages: dict[tuple[int, torch.device], Any]) -> Tensor:
    """Return a copy of a tensor, a leaf, on a device."""
    if type(tensor) is not Tensor:  # whose class knows how
        if tensor.is_leaf and tensor.device == device:
            return copy.deepcopy(tensor)
        return tensor.detach().clone().to(device).requires_grad_(tensor.requires_grad)
    strided = tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_conj() or tensor.is_neg())
    # A part of a much larger tensor, of a whole data set perhaps, does not take that along.
    if not strided or tensor.untyped_storage().nbytes() > 2 * tensor.nbytes:
        return tensor.detach().to(device, copy=True).requires_grad_(tensor.requires_grad)
    storage = tensor.untyped_storage()
    key = storage.data_ptr(), device
    if key not in storages:
        storages[key] = torch.UntypedStorage(storage.nbytes(), device=device).copy_(storage, False)
    found = torch.empty(0, dtype=tensor.dtype, device=device)
    found.set_(storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())
    return found.requires_grad_(tensor.requires_grad)
