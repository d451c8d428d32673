"""Losses of batches, and their real tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: A function that sends a batch through the model and returns its mean loss, a scalar.
BatchLoss = Callable[[nn.Module, Any], Tensor]


def causal_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean token loss of a causal language model; without labels in the batch, its real tokens are used."""
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"]
        if batch.get("attention_mask") is not None:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return model(
        input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), labels=labels, use_cache=False
    ).loss


@torch.no_grad()
def batch_losses(model: nn.Module, batches: Sequence[Any], loss: BatchLoss) -> list[float]:
    """Return a model's mean loss of each batch."""
    return [float(loss(model, batch)) for batch in batches]


def real_tokens(batch: Any) -> Tensor | None:
    """Return a mask of a batch's real tokens, flattened, by its "attention_mask"; None if all tokens are real."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return None if mask is None or bool(mask.all()) else mask.bool().flatten()
