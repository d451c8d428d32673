"""The samples and tokens of a batch of any form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def identifying_tensor(batch: Any) -> Tensor | None:
    """Return the tensor of a batch whose rows are its samples: "input_ids", else the first tensor, else None."""
    if isinstance(batch, Tensor):
        return batch if batch.ndim > 0 else None
    if isinstance(batch, Mapping):
        if isinstance(batch.get("input_ids"), Tensor):
            return batch["input_ids"]
        batch = list(batch.values())
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        for item in batch:
            if (found := identifying_tensor(item)) is not None:
                return found
    return None


def batch_size(batch: Any) -> int:
    """Return the number of samples of a batch.

    Raises:
        ValueError: If the batch holds no tensor.
    """
    content = identifying_tensor(batch)
    if content is None:
        raise ValueError(
            f"Expected a batch that holds a tensor but got {type(batch).__name__}. Give `loss_terms` as a callable "
            "that returns the number of terms the loss is averaged over."
        )
    return content.shape[0]


def count_tokens(batch: Any, mask: Tensor | None = None) -> int:
    """Return the number of tokens of a batch: of real tokens by the mask, else of token ids, else of samples.

    Args:
        batch: Any batch.
        mask: True for real tokens, or None.
    """
    if mask is not None:
        return int(mask.sum())
    content = identifying_tensor(batch)
    if content is None:
        return 0
    return content.numel() if content.ndim == 2 and not content.is_floating_point() else content.shape[0]
