"""JSON files, written whole, with figures that JSON can hold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fasc_lightning._utils._atomic_files import whole_file
from fasc_lightning._utils._schema import Schema, SchemaError, anything, check

#: Bytes of a JSON file of ours; the largest hold a row for each layer.
MAX_JSON_BYTES = 256 * 2**20


def write_json(content: Any, path: str | Path) -> None:
    """Write JSON whole or not at all."""
    with whole_file(Path(path)) as temporary:
        temporary.write_text(json.dumps(plain_values(content), indent=2) + "\n")


def plain_values(value: Any) -> Any:
    """Return JSON types: tuples become lists, NaN (which JSON has not) None."""
    if isinstance(value, dict):
        return {str(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(v) for v in value]
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return str(value)


def parse_json(content: str | bytes, where: str) -> Any:
    """Return what JSON says.

    Raises:
        SchemaError: If it is not valid, or nested so deeply that it cannot be read; naming ``where``.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise SchemaError(f"{where} is not valid JSON ({reason}): truncated or damaged.") from None


def read_json(path: str | Path, schema: Schema = anything) -> Any:
    """Return what a JSON file holds, once it is known to be what it should.

    Raises:
        FileNotFoundError: If there is no such file.
        SchemaError: If it is no JSON, too large, or not of the schema; naming the file.
    """
    path = Path(path)
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise SchemaError(
            f"{path} has {size:,} bytes, more than the {MAX_JSON_BYTES:,} that a JSON file may have here."
        )
    content = parse_json(path.read_bytes(), str(path))
    check(content, schema, str(path))
    return content


def check_json_files(files: Iterable[Path]) -> None:
    """Refuse JSON files that are cut short or damaged; those that do not exist are passed over.

    Raises:
        ValueError: With the file.
    """
    for file in files:
        try:
            if file.is_file():
                json.loads(file.read_bytes())
        except (RecursionError, ValueError) as error:
            raise ValueError(
                f"{file} is not valid JSON ({error}): truncated or damaged. Save or copy it again."
            ) from error
