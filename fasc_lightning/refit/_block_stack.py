"""The stack of blocks of a model that holds all compressed layers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

#: Last sentence of errors about models whose blocks cannot be run one by one.
WITHOUT_REFIT = "Compress it without refit."


class RefitError(ValueError):
    """The blocks of a model cannot be run one by one; the model is unchanged.

    Args:
        message: The error.
        reason: The reason in one clause, for those who did not ask for a refit; "" if the message serves.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def find_blocks(model: nn.Module, layers: Iterable[str], remedy: str = WITHOUT_REFIT) -> tuple[str, nn.ModuleList]:
    """Return the outermost ModuleList whose items hold all of the layers, and its name.

    Args:
        model: Any module.
        layers: Dotted names.
        remedy: Last sentence of the error.

    Raises:
        RefitError: If no ModuleList holds all layers, or one of its items is registered twice.
    """
    layers = list(layers)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise RefitError(
            f"Expected one stack of blocks but {type(model).__name__} is an encoder-decoder, whose decoder "
            f"reads the encoder as well. {remedy}",
            "the model is an encoder-decoder.",
        )
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for name, blocks in lists.items():  # parents come before children
        inside = re.compile(re.escape(f"{name}.") + r"\d+\.") if name else re.compile(r"\d+\.")
        if all(inside.match(layer) for layer in layers):
            if len({id(block) for block in blocks}) < len(blocks):
                raise RefitError(
                    f"Expected blocks of their own in {name!r} but some are one module, registered several times: "
                    f"new factors for one place would change the others. {remedy}",
                    "some blocks are one module.",
                )
            return name, blocks
    best = max(lists, key=lambda name: sum(layer.startswith(f"{name}.") for layer in layers), default=None)
    if best is None:
        raise RefitError(
            f"Expected a model whose blocks form a ModuleList, to be run one after the other, but "
            f"{type(model).__name__} has none. {remedy}",
            "the module has no blocks.",
        )
    outside = [layer for layer in layers if not layer.startswith(f"{best}.")]
    raise RefitError(
        f"Expected all {len(layers)} layers inside one ModuleList of blocks but {len(outside)} are outside of {best!r} "
        f"(for example {outside[0]!r}). {remedy} Or exclude them.",
        f"{len(outside)} layers are outside of the blocks.",
    )
