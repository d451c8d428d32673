"""Masks of a batch's real tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

#: Tells a batch's real tokens from padding.
TokenMask = Callable[[Any], Tensor | None]


def batch_mask(pl_module: pl.LightningModule, batch: Any, token_mask: TokenMask | None = None) -> Tensor | None:
    """Return True for a batch's real tokens, shape (samples, length), or None if every token is one.

    Args:
        pl_module: Its ``token_mask`` method serves where none is given.
        batch: As the loader made it.
        token_mask: The user's.
    """
    token_mask = token_mask or getattr(pl_module, "token_mask", None)
    return token_mask(batch) if token_mask is not None else None
