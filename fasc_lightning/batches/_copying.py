"""Copies of batches with tensors in any nesting and in objects of any class, each on a chosen device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

#: Classes of objects that batches may refer to without owning them.
_SHARED = (nn.Module, Dataset, DataLoader)

_PLAIN = (str, bytes, int, float, complex, bool, type(None))


def batch_tensors(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch, each once. A copy of the batch has the same order."""
    return [part for part in _parts(batch, set()) if isinstance(part, Tensor)]


def copy_batch(batch: Any, device: Callable[[int, Tensor], torch.device | str] | None = None) -> Any:
    """Return a copy of a batch that shares no memory with it.

    An object that occurs several times is one object in the copy, too, and tensors that share memory share it there as
    well. Strings and numbers are shared, and so are modules, data sets and objects that cannot be copied.

    Args:
        batch: Batch of any kind.
        device: Function of a tensor's number in :func:`batch_tensors` and the tensor, which returns the copy's device.
            None keeps each tensor's device.
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
    """Yield the tensors of a batch and its objects that are no collections, each once."""
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
    except Exception:  # a user's class may raise any, as locks, generators and handles do
        return False
    return True


def _copied(tensor: Tensor, device: torch.device, storages: dict[tuple[int, torch.device], Any]) -> Tensor:
    """Return a copy of a tensor on a device, as a leaf."""
    if type(tensor) is not Tensor:  # a subclass copies itself
        if tensor.is_leaf and tensor.device == device:
            return copy.deepcopy(tensor)
        return tensor.detach().clone().to(device).requires_grad_(tensor.requires_grad)
    strided = tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_conj() or tensor.is_neg())
    # A slice of a much larger tensor, such as a whole data set, is copied without the rest of its storage.
    if not strided or tensor.untyped_storage().nbytes() > 2 * tensor.nbytes:
        return tensor.detach().to(device, copy=True).requires_grad_(tensor.requires_grad)
    storage = tensor.untyped_storage()
    key = storage.data_ptr(), device
    if key not in storages:
        storages[key] = torch.UntypedStorage(storage.nbytes(), device=device).copy_(storage, False)
    found = torch.empty(0, dtype=tensor.dtype, device=device)
    found.set_(storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())
    return found.requires_grad_(tensor.requires_grad)
