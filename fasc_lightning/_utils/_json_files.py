"""JSON files: atomic writes of values that JSON can hold, and reads checked against a schema."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fasc_lightning._utils._atomic_files import whole_file
from fasc_lightning._utils._schema import Schema, SchemaError, anything, check

#: Largest JSON file that is read, in bytes. The largest that the package writes hold a row for each layer.
MAX_JSON_BYTES = 256 * 2**20


def write_json(content: Any, path: str | Path) -> None:
    """Write a JSON file atomically."""
    with whole_file(Path(path)) as temporary:
        temporary.write_text(json.dumps(plain_values(content), indent=2) + "\n")


def plain_values(value: Any) -> Any:
    """Return JSON types: tuples become lists, and NaN, which JSON lacks, becomes None."""
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
    """Return the value of a JSON text.

    Raises:
        SchemaError: If it is not valid, or nested too deeply; the message begins with ``where``.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise SchemaError(f"{where} is not valid JSON ({reason}): truncated or damaged.") from None


def read_json(path: str | Path, schema: Schema = anything) -> Any:
    """Return the value of a JSON file, once it fits the schema.

    Raises:
        FileNotFoundError: If there is no such file.
        SchemaError: If the file is not JSON, is too large, or does not fit the schema; the message names the file.
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
    """Refuse truncated or damaged JSON files; missing files are skipped.

    Raises:
        ValueError: With the name of the file.
    """
    for file in files:
        try:
            if file.is_file():
                json.loads(file.read_bytes())
        except (RecursionError, ValueError) as error:
            raise ValueError(
                f"{file} is not valid JSON ({error}): truncated or damaged. Save or copy it again."
            ) from error
