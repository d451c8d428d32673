"""``CausalLMModule``: a transformers causal language model as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from fasc_lightning.batches import as_token_batch, check_token_ids
from fasc_lightning.layers import packed_matrices
from fasc_lightning.models import match_checkpoint
from fasc_lightning.recovery import Teacher

#: Learning rate of the scales of rounded matrices, in units of the learning rate (docs/recovery.md).
SCALE_RATE = 4.0


class CausalLMModule(pl.LightningModule):
    """Next-token training of a transformers model, with the hooks that tell FascCallback how the loss averages.

    Batches are mappings with "input_ids" (samples, length) and optionally "attention_mask" and "labels" of the same
    shape. Without labels the inputs are the labels, except padding. The model shifts the labels. Lists, arrays and
    single sequences are converted to such tensors (:func:`~fasc_lightning.batches.as_token_batch`).

    A fit trains a model that is in eval mode in training mode, and returns it in eval mode.

    Args:
        model: A causal language model, for example ``AutoModelForCausalLM.from_pretrained(...)``.
        learning_rate: Learning rate of AdamW over the parameters that require gradients. The scales of rounded
            matrices, where they train, take ``SCALE_RATE`` times of it.
        weight_decay: Weight decay of AdamW; the scales of rounded matrices have none.
        schedule: "constant", or "cosine": a warm-up over a tenth of the steps, then a cosine down to a tenth of the
            rate.

    Attributes:
        teacher: The teacher, which gives the training loss during a recovery with one; None at other times.
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
        self._trained: list[nn.Module] | None = None  # during a fit: the parts that were in training mode before it
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    @override
    def on_fit_start(self) -> None:
        # `from_pretrained` returns a model in eval mode, in which a fit would leave it, without dropout. A model in
        # training mode may hold parts that its user set to eval mode: it stays as it is.
        if not self.model.training:
            self._trained = [part for part in self.model.modules() if part.training]
            self.model.train()

    @override
    def on_train_end(self) -> None:
        self._restore_mode()

    @override
    def teardown(self, stage: str) -> None:
        self._restore_mode()  # of a fit without a batch

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
        # A model with only frozen parameters, as for inference, can still be calibrated.
        parameters = [p for p in self.parameters() if p.requires_grad] or list(self.parameters())
        scales = {id(matrix.weight_scale) for matrix in packed_matrices(self)}
        groups: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) not in scales]}]
        # A scale stands for a group of weights, and the steps that suit single weights move it too little.
        if trained := [p for p in parameters if id(p) in scales]:
            groups.append({"params": trained, "lr": SCALE_RATE * self.learning_rate, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.learning_rate, weight_decay=self.weight_decay
        )
        if self.schedule == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not 0 <= steps < float("inf"):  # negative with a loader of unknown length
            raise ValueError("Expected a fit of known length for schedule='cosine': give the Trainer max_steps.")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_cosine, steps=float(steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        match_checkpoint(self, checkpoint)

    @override
    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        # Before the public hook and not in it: Lightning warns if a module has that hook and the LightningDataModule
        # lacks it. On a GPU an id that is too large would be an assertion without a name.
        batch = as_token_batch(batch)
        check_token_ids(batch, self.model)
        return super()._on_before_batch_transfer(batch, dataloader_idx)

    def _restore_mode(self) -> None:
        """Put the model back into eval mode, with the layers that have replaced others since."""
        if self._trained is not None:
            self.model.eval()
            for part in self._trained:
                part.training = True
            self._trained = None

    def token_mask(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return True for the tokens that are not padding, shape (samples, length)."""
        mask = _checked(batch).get("attention_mask")
        return None if mask is None else mask.bool()

    def loss_terms(self, batch: Mapping[str, Tensor]) -> int:
        """Return the number of token losses in the mean that is the model's loss: the predicted, unignored labels.

        Models divide by "num_items_in_batch" if a batch has it, as with several batches per step. The result is 0 if no
        label is predicted.
        """
        shifted = _checked(batch).get("shift_labels")
        labels = _labels(batch)[:, 1:] if shifted is None else shifted
        count = int((labels != -100).sum())
        items: Any = batch.get("num_items_in_batch")
        return count if items is None or count == 0 else int(items)

    def predictions(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits of all tokens, and a mask of the tokens whose successor is a label.

        Returns:
            Shapes (samples, length, vocabulary), the model's own tensor and not a copy, and (samples, length).
        """
        return self.model(**_inputs(batch), use_cache=False).logits, _counted(_labels(batch))

    def _distilled(self, teacher: Teacher, batch: Mapping[str, Tensor]) -> Tensor:
        labels = _labels(_checked(batch))
        output = self.model(**_inputs(batch), labels=labels if teacher.needs_labels else None, use_cache=False)
        return teacher.loss(batch, output.logits, _counted(labels), output.loss)

    def _loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.model(**_inputs(batch), labels=_labels(batch), use_cache=False).loss


def _cosine(step: int, steps: float) -> float:
    """Return the share of the learning rate at a step out of ``steps``.

    It is written by hand because schedules of transformers rise again past the last step, which a longer second fit
    reaches.
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
