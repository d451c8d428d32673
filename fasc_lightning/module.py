"""CausalLMModule: a transformers causal language model as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from fasc_lightning.checkpoints import match_checkpoint


class CausalLMModule(pl.LightningModule):
    """Next-token training of a transformers model, which tells FascCallback how its loss averages.

    Batches are mappings with "input_ids" (samples, length) and optionally "attention_mask" and "labels" of the same
    shape; without labels the inputs are predicted, padding left out. Labels are shifted by the model.

    Args:
        model: A causal language model, for example ``AutoModelForCausalLM.from_pretrained(...)``.
        learning_rate: Of AdamW over the parameters that require gradients.
        weight_decay: Of AdamW.
    """

    def __init__(self, model: nn.Module, learning_rate: float = 2e-5, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    @override
    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)

    @override
    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    @override
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch["input_ids"]))
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A model whose parameters are all frozen, as for inference, can still be calibrated.
        parameters = [p for p in self.parameters() if p.requires_grad] or list(self.parameters())
        return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        match_checkpoint(self, checkpoint)

    def token_mask(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return True for the tokens that are not padding, shape (samples, length)."""
        mask = _checked(batch).get("attention_mask")
        return None if mask is None else mask.bool()

    def loss_terms(self, batch: Mapping[str, Tensor]) -> int:
        """Return over how many token losses the model's loss is a mean: the predicted, unignored labels."""
        return int((_labels(_checked(batch))[:, 1:] != -100).sum())

    def _loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {key: value for key, value in _checked(batch).items() if key != "labels"}
        return self.model(**inputs, labels=_labels(batch), use_cache=False).loss


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    if "labels" in batch:
        return batch["labels"]
    labels = batch["input_ids"]
    mask = batch.get("attention_mask")
    return labels if mask is None else labels.masked_fill(mask == 0, -100)


def _checked(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise TypeError(
            f"Expected batches that are mappings with 'input_ids' but got {type(batch).__name__}. Collate them as "
            "{'input_ids': (samples, length)}, or wrap the model in a LightningModule of your own."
        )
    return batch
