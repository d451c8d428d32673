"""Checksums of saved state, which tell whether the values read are the values written.

They detect damage and edits. They are no signature: anyone who can write the file can write its checksum.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasc_lightning._utils._schema import SchemaError

#: Length of a checksum, in characters.
LENGTH = 32

#: Deepest nesting of a state, which is read by recursion.
MAX_DEPTH = 200


def tensor_checksum(tensor: Tensor) -> str:
    """Return the checksum of a tensor: of its dtype, its shape and every bit of its numbers."""
    return _digest_of(tensor).hexdigest()[:LENGTH]


def tensor_checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the checksum of each tensor, by name."""
    return {name: tensor_checksum(tensor) for name, tensor in tensors.items()}


def checksum(value: Any) -> str:
    """Return the checksum of nested plain data and tensors.

    Lists and tuples count as the same, and mappings in any order, because files and plugins change these. Objects of
    other types count by their type alone.

    Raises:
        SchemaError: If the value is nested too deeply.
    """
    return _tree(value, 0).hex()[:LENGTH]


def file_checksum(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sum(found: str, expected: Any, what: str) -> None:
    """Compare a checksum with the saved one.

    Args:
        found: Checksum of the values that were read.
        expected: Checksum that was saved.
        what: Name of the values, for the message.

    Raises:
        SchemaError: If they differ.
    """
    if found != expected:
        raise SchemaError(
            f"Expected {what} with the values that were saved but found other values: their checksum differs."
        )


def _digest_of(tensor: Tensor) -> Any:
    if tensor.is_meta or tensor.layout != torch.strided:  # only an edited file has such tensors
        return hashlib.sha256(f"{tensor.layout} tensor on {tensor.device}".encode())
    value = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"tensor {value.dtype} {tuple(value.shape)}\0".encode())
    if value.numel():
        # Half precision has no NumPy type of its own.
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest


def _tree(value: Any, depth: int) -> bytes:
    if depth > MAX_DEPTH:
        raise SchemaError(f"Expected at most {MAX_DEPTH} levels of lists and mappings but there are more.")
    if isinstance(value, Tensor):
        return _digest_of(value).digest()
    if isinstance(value, np.ndarray):
        return hashlib.sha256(f"array {value.dtype} {value.shape}\0".encode() + value.tobytes()).digest()
    if isinstance(value, Mapping):
        parts = sorted(_tree(key, depth + 1) + _tree(item, depth + 1) for key, item in value.items())
        return hashlib.sha256(b"mapping" + b"".join(parts)).digest()
    if isinstance(value, list | tuple):
        return hashlib.sha256(b"list" + b"".join(_tree(item, depth + 1) for item in value)).digest()
    if isinstance(value, Set):
        return hashlib.sha256(b"set" + b"".join(sorted(_tree(item, depth + 1) for item in value))).digest()
    return hashlib.sha256(_scalar(value)).digest()


def _scalar(value: Any) -> bytes:
    if value is None or isinstance(value, bool):
        return repr(value).encode()
    if isinstance(value, int):
        return f"int {hex(value)}".encode()
    if isinstance(value, float):
        return b"float " + (b"nan" if value != value else struct.pack(">d", value))
    if isinstance(value, str):
        return b"text " + value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        return b"bytes " + value
    return f"{type(value).__module__}.{type(value).__qualname__}".encode()
