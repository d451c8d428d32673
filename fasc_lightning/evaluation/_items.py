"""The reader of evaluation items in jsonl files, whose errors name the file and the line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fasc_lightning.data import json_row, open_text

T = TypeVar("T")


def load_items(path: str | Path, parse: Callable[[dict[str, Any]], T], what: str) -> list[T]:
    """Read a jsonl file (also ``.xz``), one object a line; blank lines are skipped.

    Args:
        path: The file.
        parse: Turns a row into an item; file and line are put before the message of its ValueError.
        what: Name of the items, for the error of an empty file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a line is no JSON object or ``parse`` refuses it (the message names the line), or if there is no
            item.
    """
    path = Path(path)
    items = []
    for number, line in enumerate(open_text(path), start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        row = json_row(line, where)
        try:
            items.append(parse(row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not items:
        raise ValueError(f"Expected {what} in {path}, one JSON object a line, but it holds none.")
    return items


def text_fields(row: Mapping[str, Any], fields: Sequence[str]) -> dict[str, str]:
    """Return the named fields of a row, each a text that is not blank.

    Raises:
        ValueError: If a field is missing, no text or blank.
    """
    missing = [field for field in fields if not isinstance(row.get(field), str) or not row[field].strip()]
    if missing:
        raise ValueError(f"expected the text fields {', '.join(fields)}, but {', '.join(missing)} is missing.")
    return {field: row[field] for field in fields}
