"""What the dotted names of layers say."""

from __future__ import annotations


def block_of(layer: str) -> tuple[str, int] | None:
    """Return the stack and the index of the block that a layer belongs to, by the first integer of its dotted name.

    ("model.layers", 3) for "model.layers.3.mlp.up_proj"; None for a layer outside of blocks.
    """
    parts = layer.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:i]), int(part)
    return None
