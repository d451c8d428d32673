"""Schemas of data read from files: names, types, shapes and ranges, checked before anything is built from the data.

A schema is a function of a value and of the path to it. It returns, or raises a :class:`SchemaError`. Larger schemas
are made of smaller ones: ``record({"rank": integer(1), "bias": boolean})``. :class:`Entry` describes a tensor, because
no dependency of the package describes tensors inside of plain data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Checks a value; the second argument is the path to it, for the message.
Schema = Callable[[Any, str], None]

#: Deepest nesting of free plain data, which is read by recursion.
MAX_DEPTH = 50

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class SchemaError(ValueError):
    """Data that does not fit its schema."""


def check(value: Any, schema: Schema, where: str) -> None:
    """Check a value that was read.

    Args:
        value: The value.
        schema: Its schema.
        where: The file and the fault in general; messages begin with it.

    Raises:
        SchemaError: With the file and the entry.
    """
    with naming(where):
        schema(value, "")


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Add the source of the data to the errors of a block, which themselves name entries only.

    Raises:
        SchemaError: In place of the block's own.
    """
    try:
        yield
    except SchemaError as error:
        raise SchemaError(f"{where} is damaged or was edited. {error}") from error


def refuse(expected: str, value: Any, path: str) -> SchemaError:
    """Return the error for a value that does not fit a schema."""
    at = f" at {path.lstrip('.')!r}" if path else ""
    return SchemaError(f"Expected {expected}{at} but got {_shown(value)}.")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        form = str(value.layout).removeprefix("torch.") if value.layout != torch.strided else str(value.device)
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)} ({form})"
    if value is None or isinstance(value, str | int | float):
        try:
            return f"{value!r:.80}"
        except ValueError:  # an integer of more digits than Python writes
            return "a huge number"
    return f"a {type(value).__name__}"


# Plain values.


def anything(value: Any, path: str) -> None:
    """Accept everything: only the owner of the value can check it."""


def boolean(value: Any, path: str) -> None:
    """Accept True and False."""
    if type(value) is not bool:
        raise refuse("True or False", value, path)


def text(value: Any, path: str) -> None:
    """Accept strings."""
    if not isinstance(value, str):
        raise refuse("a text", value, path)


def integer(low: int | None = None, high: int | None = None) -> Schema:
    """Return the schema of integers in a range, both ends included; True and False are refused."""

    def schema(value: Any, path: str) -> None:
        if type(value) is not int or (low is not None and value < low) or (high is not None and value > high):
            raise refuse(f"an integer{_range(low, high)}", value, path)

    return schema


def number(low: float | None = None, high: float | None = None, finite: bool = True) -> Schema:
    """Return the schema of numbers in a range; with ``finite=False`` it accepts NaN and infinity."""

    def schema(value: Any, path: str) -> None:
        good = type(value) in (int, float)
        if good and finite:
            good = abs(value) < math.inf
        if good and not math.isnan(value):
            good = (low is None or value >= low) and (high is None or value <= high)
        if not good:
            raise refuse(f"a {'finite ' if finite else ''}number{_range(low, high)}", value, path)

    return schema


def one_of(*values: Any) -> Schema:
    """Return the schema of a few given values; a value must have the same type and be equal."""

    def schema(value: Any, path: str) -> None:
        if not any(type(value) is type(known) and value == known for known in values):
            raise refuse(f"one of {', '.join(map(repr, values))}", value, path)

    return schema


def optional(inner: Schema) -> Schema:
    """Return the schema of None or of ``inner``."""

    def schema(value: Any, path: str) -> None:
        if value is not None:
            inner(value, path)

    return schema


# Containers. Lists and tuples count as the same: files and other plugins turn one into the other.


def listed(item: Schema, length: int | None = None, distinct: bool = False) -> Schema:
    """Return the schema of a list whose items have one schema."""

    def schema(value: Any, path: str) -> None:
        if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
            raise refuse("a list" if length is None else f"a list of {length}", value, path)
        for i, part in enumerate(value):
            item(part, f"{path}[{i}]")
        if distinct and len(set(value)) < len(value):
            raise SchemaError(f"Expected no value twice at {path.lstrip('.')!r} but there is one.")

    return schema


def row(*items: Schema) -> Schema:
    """Return the schema of a list in which each item has its own schema."""

    def schema(value: Any, path: str) -> None:
        if not isinstance(value, list | tuple) or len(value) != len(items):
            raise refuse(f"a list of {len(items)}", value, path)
        for i, (item, part) in enumerate(zip(items, value, strict=True)):
            item(part, f"{path}[{i}]")

    return schema


def mapping(item: Schema, keys: Schema = text) -> Schema:
    """Return the schema of a mapping whose values have one schema."""

    def schema(value: Any, path: str) -> None:
        _check_keys(value, keys, path)
        for key, part in value.items():
            item(part, f"{path}.{key}")

    return schema


def record(
    required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None, *, extra: bool = False
) -> Schema:
    """Return the schema of a mapping in which each name has its own schema.

    Args:
        required: Schemas of the names that must be present.
        optional: Schemas of the names that may be present.
        extra: Whether further names are allowed, with any value.
    """
    known = {**(optional or {}), **required}

    def schema(value: Any, path: str) -> None:
        _check_keys(value, text, path)
        at = f" in {path.lstrip('.')!r}" if path else ""
        if missing := [name for name in required if name not in value]:
            raise SchemaError(f"Expected the entry {missing[0]!r}{at} but it is missing.")
        if not extra and (left := [name for name in value if name not in known]):
            raise SchemaError(f"Expected no entry {left[0]!r:.80}{at} but there is one.")
        for name, part in known.items():
            if name in value:
                part(value[name], f"{path}.{name}")

    return schema


def _check_keys(value: Any, keys: Schema, path: str) -> None:
    if not isinstance(value, Mapping):
        raise refuse("a mapping of names", value, path)
    for key in value:
        try:
            keys(key, "")
        except SchemaError:
            raise refuse("names as keys", key, path) from None


def plain(value: Any, path: str) -> None:
    """Accept data that JSON can hold, NaN and infinity included, up to :data:`MAX_DEPTH` levels."""
    _plain(value, path, 0)


def _plain(value: Any, path: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise SchemaError(f"Expected at most {MAX_DEPTH} levels of lists and mappings but there are more.")
    if isinstance(value, Mapping):
        _check_keys(value, text, path)
        for key, part in value.items():
            _plain(part, f"{path}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            _plain(part, f"{path}[{i}]", depth + 1)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise refuse("plain data", value, path)


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return "" if high is None else f" of at most {high}"
    return f" of at least {low}" if high is None else f" from {low} to {high}"


# Tensors.


@dataclass(frozen=True)
class Entry:
    """Schema of a tensor.

    Attributes:
        dtypes: Allowed dtypes.
        shapes: Allowed shapes, in which None stands for any size; None for any shape.
        low: Least allowed number.
        high: Greatest allowed number.
        finite: Whether NaN and infinity are refused.
    """

    dtypes: tuple[torch.dtype, ...] = FLOATS
    shapes: tuple[tuple[int | None, ...], ...] | None = None
    low: float | None = None
    high: float | None = None
    finite: bool = True

    def __call__(self, value: Any, path: str) -> None:
        """Check a tensor: schemas are called."""
        check_has_numbers(value, path)
        self.check_form(value.dtype, tuple(value.shape), path)
        self.check_values(value, path)

    def check_form(self, dtype: torch.dtype | None, shape: tuple[int, ...], path: str) -> None:
        """Check the dtype and the shape, as a file's header gives them.

        Raises:
            SchemaError: If one does not fit.
        """
        known = self.shapes is None or any(_matches(shape, wanted) for wanted in self.shapes)
        if dtype not in self.dtypes or not known:
            form = " or ".join(str(kind).removeprefix("torch.") for kind in self.dtypes)
            if self.shapes is not None:
                form += " and shape " + " or ".join(_sizes(shape) for shape in self.shapes)
            raise SchemaError(
                f"Expected a tensor of {form} at {path.lstrip('.')!r} but got one of "
                f"{str(dtype).removeprefix('torch.')} and shape {_sizes(shape)}."
            )

    def check_values(self, tensor: Tensor, path: str) -> None:
        """Check the numbers.

        Raises:
            SchemaError: If one is not finite or out of range.
        """
        if not tensor.numel():
            return
        if self.finite and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise SchemaError(f"Expected finite numbers at {path.lstrip('.')!r} but got NaN or infinity.")
        if self.low is None and self.high is None:
            return
        least, greatest = (float(x) for x in tensor.aminmax())
        if (self.low is not None and least < self.low) or (self.high is not None and greatest > self.high):
            raise SchemaError(
                f"Expected numbers{_range(self.low, self.high)} at {path.lstrip('.')!r} but got some from "
                f"{least:g} to {greatest:g}."
            )


def check_has_numbers(value: Any, path: str) -> None:
    """Refuse anything but an ordinary tensor in memory.

    Raises:
        SchemaError: If the value is no tensor, on the meta device, or sparse.
    """
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
        raise refuse("a tensor in memory", value, path)


def check_names(found: Iterable[str], wanted: Iterable[str], what: str = "tensor") -> None:
    """Refuse a set of names that differs from the wanted set.

    Raises:
        SchemaError: With one name that is missing or superfluous.
    """
    found, wanted = set(found), set(wanted)
    if missing := sorted(wanted - found):
        raise SchemaError(f"Expected the {what} {missing[0]!r} but it is missing ({len(missing)} in all are).")
    if left := sorted(found - wanted):
        raise SchemaError(f"Expected no {what} {left[0]!r} but there is one ({len(left)} in all).")


def is_permutation(index: Tensor) -> bool:
    """Whether an integer tensor is a permutation of 0, 1, ..., len - 1."""
    if index.dtype not in INTEGERS or index.ndim != 1:
        return False
    return bool(torch.equal(index.long().sort().values, torch.arange(len(index), device=index.device)))


def _matches(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(b is None or a == b for a, b in zip(shape, wanted, strict=True))


def _sizes(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"
