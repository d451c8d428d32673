"""The history of rho in a checkpoint of a callback with other targets."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from typing import Any

#: Parts of a callback's key that say which layers it observes.
_LAYERS = ("targets", "exclude")


def other_targets(callbacks: Mapping[Any, Any], key: str, present: Collection[str]) -> str | None:
    """Return the key of the saved callback that observed the same rho on other layers; None if there is not just one.

    Args:
        callbacks: The states of callbacks in a checkpoint, by key.
        key: The key of the callback that looks for its history.
        present: Keys of all callbacks of the fit: their states are their own.
    """
    if key in callbacks or (wanted := _parts(key)) is None:
        return None
    found = [other for other in callbacks if other not in present and _parts(other) == wanted]
    return found[0] if len(found) == 1 else None


def _parts(key: Any) -> tuple[str, dict[str, Any]] | None:
    """Return the class and the options in a key, except the choice of layers; None if the key has another form."""
    kind, brace, options = str(key).partition("{")
    try:
        read = ast.literal_eval(brace + options)
    except (SyntaxError, ValueError):
        return None
    return (kind, {k: v for k, v in read.items() if k not in _LAYERS}) if isinstance(read, dict) else None
