"""Masks of a batch's real tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

#: Returns a batch's mask: True for real tokens, False for padding, shape (samples, length); None without padding.
TokenMask = Callable[[Any], Tensor | None]


def batch_mask(pl_module: pl.LightningModule, batch: Any, token_mask: TokenMask | None = None) -> Tensor | None:
    """Return a mask with True for a batch's real tokens, shape (samples, length); None if every token is real.

    Args:
        pl_module: Module whose ``token_mask`` method is used if ``token_mask`` is None.
        batch: Batch as the loader made it.
        token_mask: The user's function.
    """
    token_mask = token_mask or getattr(pl_module, "token_mask", None)
    return token_mask(batch) if token_mask is not None else None
