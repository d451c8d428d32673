"""The hub's tags of compressed models, which ``push_to_hub`` of transformers puts into a card."""

from __future__ import annotations

from typing import Any

from torch import nn

from fasc_lightning.layers import compressed_layers

#: All tags that :func:`tags_of` gives.
TAGS = ("fasc", "low-rank", "compressed-tensors", "quantization", "compression")


def tags_of(model: nn.Module, format: str = "fasc") -> list[str]:
    """Return the tags of a compressed model in a folder of a format."""
    low_rank = any(layer.layout != "dense" for layer in compressed_layers(model).values())
    holds = dict.fromkeys(TAGS, True)
    holds |= {"low-rank": low_rank, "compressed-tensors": format == "compressed-tensors", "quantization": not low_rank}
    return [tag for tag in TAGS if holds[tag]]


def set_tags(model: Any) -> None:
    """Give a transformers model the tags of its compressed layers beside the user's; none if it is dense."""
    others = [tag for tag in model.model_tags or () if tag not in TAGS]
    model.model_tags = others + (tags_of(model) if compressed_layers(model) else []) or None
