"""CausalLMModule: a transformers causal language model as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from fasc_lightning.batches import as_token_batch
from fasc_lightning.models import match_checkpoint
from fasc_lightning.recovery import Teacher


class CausalLMModule(pl.LightningModule):
    """Next-token training of a transformers model, which tells FascCallback how its loss averages.

    Batches are mappings with "input_ids" (samples, length) and optionally "attention_mask" and "labels" of the same
    shape; without labels the inputs are predicted, padding left out. Labels are shifted by the model. Lists,
    arrays and single sequences become such tensors (:func:`~fasc_lightning.batches.as_token_batch`).

    Args:
        model: A causal language model, for example ``AutoModelForCausalLM.from_pretrained(...)``.
        learning_rate: Of AdamW over the parameters that require gradients.
        weight_decay: Of AdamW.
        schedule: "constant", or "cosine": after a warm-up of a tenth of the steps, down to a tenth along a cosine.

    Attributes:
        teacher: While a recovery with a teacher runs, what gives the loss of the training; None at other times.
    """

    teacher: Teacher | None

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.0,
        schedule: Literal["constant", "cosine"] = "constant",
    ) -> None:
        super().__init__()
        if schedule not in ("constant", "cosine"):
            raise ValueError(f"Expected `schedule` to be 'constant' or 'cosine' but got {schedule!r}.")
        self.teacher = None
        self.schedule = schedule
        self.model = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    @override
    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)

    @override
    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch) if self.teacher is None else self._distilled(self.teacher, batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    @override
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch["input_ids"]))
        return loss

    @override
    def configure_optimizers(self) -> Any:
        # A model whose parameters are all frozen, as for inference, can still be calibrated.
        parameters = [p for p in self.parameters() if p.requires_grad] or list(self.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        if self.schedule == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not 0 <= steps < float("inf"):  # below 0 with a loader of unknown length
            raise ValueError("Expected a fit of known length for schedule='cosine': give the Trainer max_steps.")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_cosine, steps=float(steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        match_checkpoint(self, checkpoint)

    @override
    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        # Before the hook of that name, and not in it: of a module with that hook and a LightningDataModule without,
        # Lightning warns.
        return super()._on_before_batch_transfer(as_token_batch(batch), dataloader_idx)

    def token_mask(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return True for the tokens that are not padding, shape (samples, length)."""
        mask = _checked(batch).get("attention_mask")
        return None if mask is None else mask.bool()

    def loss_terms(self, batch: Mapping[str, Tensor]) -> int:
        """Return over how many token losses the model's loss is a mean: the predicted, unignored labels.

        Models divide by "num_items_in_batch" instead where a batch has it, as of several batches of one step; 0 where
        no label is to be predicted.
        """
        shifted = _checked(batch).get("shift_labels")
        labels = _labels(batch)[:, 1:] if shifted is None else shifted
        count = int((labels != -100).sum())
        items: Any = batch.get("num_items_in_batch")
        return count if items is None or count == 0 else int(items)

    def predictions(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits of all tokens, and which tokens have a successor that is a label.

        Returns:
            Shapes (samples, length, vocabulary), as the model makes them and not a copy, and (samples, length).
        """
        return self.model(**_inputs(batch), use_cache=False).logits, _counted(_labels(batch))

    def _distilled(self, teacher: Teacher, batch: Mapping[str, Tensor]) -> Tensor:
        labels = _labels(_checked(batch))
        output = self.model(**_inputs(batch), labels=labels if teacher.needs_labels else None, use_cache=False)
        return teacher.loss(batch, output.logits, _counted(labels), output.loss)

    def _loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.model(**_inputs(batch), labels=_labels(batch), use_cache=False).loss


def _cosine(step: int, steps: float) -> float:
    """Return the share of the learning rate at a step of so many.

    By hand: past the last step, where a longer second fit goes, the schedules of transformers rise again.
    """
    warm = max(1.0, 0.1 * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    done = min(1.0, (step - warm) / max(1.0, steps - warm))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in _checked(batch).items() if key != "labels"}


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    if "labels" in batch:
        return batch["labels"]
    labels = batch["input_ids"]
    mask = batch.get("attention_mask")
    return labels if mask is None else labels.masked_fill(mask == 0, -100)


def _counted(labels: Tensor) -> Tensor:
    """Return True where the next token is a label; False for the last token, which has none."""
    return nn.functional.pad(labels[:, 1:] != -100, (0, 1), value=False)


def _checked(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if isinstance(ids, Tensor) and ids.ndim == 2:
        return batch
    raise TypeError(
        f"Expected batches that are mappings with 'input_ids' but got {_described(batch)}. Collate them as "
        "{'input_ids': (samples, length)}, or wrap the model in a LightningModule of your own."
    )


def _described(batch: Any) -> str:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if ids is None:
        return type(batch).__name__
    return f"'input_ids' of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__} of ids"
