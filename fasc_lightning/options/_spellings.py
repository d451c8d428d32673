"""Other libraries' spellings of options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Option by its other spelling: llm-compressor says ``ignore``, the hub's metadata ``license``.
SPELLINGS = {"ignore": "exclude", "license": "licence"}


def own_spelling(given: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """Return options by name, with other spellings replaced by this package's own.

    Args:
        given: Options by name. None counts as not given.
        *others: The spellings to replace, of :data:`SPELLINGS`.

    Raises:
        ValueError: If an option is given in both spellings.
    """
    found = dict(given)
    for other in others:
        name, value = SPELLINGS[other], found.pop(other, None)
        if value is None:
            continue
        if found.get(name) is not None:
            raise ValueError(
                f"Expected `{name}` or `{other}`, two spellings of one option, but got both "
                f"({name}={found[name]!r:.200}, {other}={value!r:.200}). Give one."
            )
        found[name] = value
    return found
