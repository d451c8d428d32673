"""JSON files, written whole, with figures that JSON can hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fasc_lightning._utils._atomic_files import whole_file


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
