"""Named tensors of a safetensors file or of a checkpoint's mapping, checked as they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasc_lightning._utils._checksum import check_sum, tensor_checksum
from fasc_lightning._utils._schema import Entry, SchemaError, check_has_numbers, check_names

#: Dtypes by their names in safetensors' headers; the package writes no others.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class NamedTensors:
    """Tensors by name, each checked against its declaration before it is returned.

    Args:
        forms: Dtype and shape of each tensor by name; None for a dtype that the package does not use.
        read: Returns the tensor of a name.
        where: The file, for messages.
    """

    def __init__(
        self,
        forms: Mapping[str, tuple[torch.dtype | None, tuple[int, ...]]],
        read: Callable[[str], Tensor],
        where: str,
    ) -> None:
        self.forms = dict(forms)
        self.where = where
        self._read = read
        self._wanted: dict[str, Entry] = {}
        self._checksums: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Any], where: str) -> NamedTensors:
        """Return the tensors of a mapping.

        Raises:
            SchemaError: If a value is no tensor.
        """
        for name, value in tensors.items():
            check_has_numbers(value, str(name))
        return cls({n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.__getitem__, where)

    @classmethod
    def in_file(cls, handle: Any, where: str) -> NamedTensors:
        """Return the tensors of an open safetensors file; ``handle`` is the library's."""
        forms = {}
        for name in handle.keys():  # noqa: SIM118 # not a mapping
            part = handle.get_slice(name)
            forms[name] = (_DTYPES.get(part.get_dtype()), tuple(part.get_shape()))
        return cls(forms, handle.get_tensor, where)

    def expect(
        self, wanted: Mapping[str, Entry], checksums: Mapping[str, Any] | None, free: Iterable[str] = ()
    ) -> None:
        """Declare all tensors; nothing is read yet.

        Args:
            wanted: Schema of each tensor by name.
            checksums: Saved checksums by name; None if none were saved.
            free: Names of further tensors of any dtype and shape.

        Raises:
            SchemaError: If a tensor is missing or superfluous, or has another dtype or shape.
        """
        free = set(free)
        check_names(self.forms, {*wanted, *free})
        if checksums is not None:
            check_names(checksums, self.forms, "checksum of the tensor")
        for name, entry in wanted.items():
            entry.check_form(*self.forms[name], name)
        self._wanted, self._checksums = dict(wanted), checksums

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU or on the device where the mapping holds it.

        Raises:
            SchemaError: If the tensor is missing, its numbers are out of range, or its checksum differs.
        """
        if name not in self.forms:
            raise SchemaError(f"Expected the tensor {name!r} but it is missing.")
        tensor = self._read(name)
        if name in self._wanted:
            self._wanted[name].check_values(tensor, name)
        if self._checksums is not None:
            check_sum(tensor_checksum(tensor), self._checksums[name], f"the tensor {name!r}")
        return tensor


@contextmanager
def open_tensors(path: str | Path, kind: str = "file") -> Iterator[tuple[NamedTensors, dict[str, str]]]:
    """Open a safetensors file; its header is read, and its size must agree with the header.

    Args:
        path: Path of the file.
        kind: Kind of file, for messages.

    Yields:
        Its tensors and its metadata.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged; the error may also come while a tensor is read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a {kind} at {path}, but there is none.")
    try:
        with safe_open(path, framework="pt") as file:
            yield NamedTensors.in_file(file, str(path)), file.metadata() or {}
    except SafetensorError as error:
        raise SchemaError(
            f"Expected a whole safetensors {kind} but {path} is damaged ({error}): truncated or altered."
        ) from error
