"""Names near a mistyped one, for messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" with the known word nearest to a word; "" if none is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean {near[0]!r}?" if near else ""


def nearest_names(pattern: str, names: Iterable[str], most: int = 3) -> list[str]:
    """Return the dotted names nearest to a pattern, best first, or their last parts; the first names if none is near.

    Args:
        pattern: A dotted name, the last parts of one, or a regular expression.
        names: The known names.
        most: Number of names.
    """
    names = list(names)
    words = re.sub(r"[^\w.]", "", pattern).strip(".")
    parts = words.count(".") + 1
    endings = dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names)
    return difflib.get_close_matches(words, endings, most) or names[:most]
