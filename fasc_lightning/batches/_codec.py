"""Conversion of batches to tensors and plain data, for files that hold nothing else, and back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fasc_lightning._utils import MAX_DEPTH, SchemaError, anything, listed, one_of, refuse, row, text


class UnsavableBatchError(TypeError):
    """A batch that cannot be written as tensors and plain data."""


def pack_batch(value: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Return a batch, or a list of batches, as plain data and tensors.

    Args:
        value: Tensors and plain values in any nesting of dict, list, tuple and transformers' BatchEncoding.
        prefix: Prefix of the tensors' names.

    Returns:
        Plain data with names in place of tensors, and the tensors by name. No tensor shares memory with another, and
        none is a view of a larger one, which a file would hold whole.

    Raises:
        UnsavableBatchError: If the batch holds a value of another type, which could not be restored.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(value, prefix, tensors, set()), tensors


def _pack(value: Any, prefix: str, tensors: dict[str, Tensor], storages: set[int]) -> Any:
    """Return plain data; add its tensors to ``tensors`` and the addresses of their memory to ``storages``."""
    if type(value) is Tensor:
        name = f"{prefix}{len(tensors)}"
        owned = value.detach().contiguous()
        storage = owned.untyped_storage()
        # safetensors refuses tensors that share memory, as labels and inputs may do.
        if storage.data_ptr() in storages or storage.nbytes() > owned.numel() * owned.element_size():
            owned = owned.clone()
        storages.add(owned.untyped_storage().data_ptr())
        tensors[name] = owned
        return ["tensor", name]
    if value is None or type(value) in (bool, int, float, str):
        return ["value", value]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_pack(item, prefix, tensors, storages) for item in value]]
    if type(value) is dict or type(value) is _batch_encoding():
        if unsavable := [key for key in value if type(key) not in (str, int)]:
            raise UnsavableBatchError(f"a mapping with the key {unsavable[0]!r}")
        items = [[key, _pack(item, prefix, tensors, storages)] for key, item in value.items()]
        return ["dict" if type(value) is dict else "encoding", items]
    raise UnsavableBatchError(f"a {type(value).__module__}.{type(value).__qualname__}")


def unpack_batch(plain: Any, tensor: Callable[[str], Tensor]) -> Any:
    """Return the batch from the plain data of :func:`pack_batch`.

    Args:
        plain: The data as it was read, checked here.
        tensor: Function that returns a tensor by its name.

    Raises:
        SchemaError: If the data does not have the form of :func:`pack_batch`.
    """
    return _unpack(plain, tensor, 0)


def tensor_names(plain: Any) -> set[str]:
    """Return the names of the tensors that a batch in plain data needs.

    Raises:
        SchemaError: If the data does not have the form of :func:`pack_batch`.
    """
    names: set[str] = set()
    _unpack(plain, names.add, 0)
    return names


def _unpack(plain: Any, tensor: Callable[[str], Any], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise SchemaError(f"Expected at most {MAX_DEPTH} levels in a batch but there are more.")
    _NODE(plain, "a batch")
    kind, content = plain
    if kind == "tensor":
        text(content, "a batch")
        return tensor(content)
    if kind == "value":
        if content is not None and type(content) not in (bool, int, float, str):
            raise refuse("a plain value", content, "a batch")
        return content
    listed(anything)(content, "a batch")
    if kind in ("list", "tuple"):
        items = [_unpack(item, tensor, depth + 1) for item in content]
        return items if kind == "list" else tuple(items)
    listed(_ITEM)(content, "a batch")
    mapping = {key: _unpack(item, tensor, depth + 1) for key, item in content}
    if kind == "dict":
        return mapping
    from transformers import BatchEncoding

    return BatchEncoding(mapping)


def _key(value: Any, path: str) -> None:
    if type(value) not in (str, int):
        raise refuse("a name or a number as a key", value, path)


#: A node is its kind and its content; an item of a mapping is its key and its node.
_NODE = row(one_of("tensor", "value", "list", "tuple", "dict", "encoding"), anything)
_ITEM = row(_key, anything)


def _batch_encoding() -> Any:
    # A BatchEncoding exists only if its module has been imported; an import here would take a second.
    return getattr(sys.modules.get("transformers.tokenization_utils_base"), "BatchEncoding", None)
