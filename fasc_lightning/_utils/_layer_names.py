"""Dotted names of layers: their blocks, and short lists for messages."""

from __future__ import annotations

from collections.abc import Iterable


def block_of(layer: str) -> tuple[str, int] | None:
    """Return the stack and the index of a layer's block, from the first integer in its dotted name.

    ("model.layers", 3) for "model.layers.3.mlp.up_proj"; None for a layer outside of blocks.
    """
    parts = layer.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:i]), int(part)
    return None


def some_names(names: Iterable[str], most: int = 3) -> str:
    """Return the first names in order and the number of the others, for a message."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
