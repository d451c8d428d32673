"""The number of terms of a batch's loss, and the scale of its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from fasc_lightning.batches._contents import batch_size, identifying_tensor
from fasc_lightning.batches._loss_graph import count_terms
from fasc_lightning.batches._masks import TokenMask, batch_mask
from fasc_lightning.batches._tokens import LossScale, TokenRows

#: The reduction of the scalar loss, or a callable on the batch that returns the number of its terms.
LossTerms = Literal["mean", "sum"] | Callable[[Any], float]


def gradient_scale(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batch: Any,
    mask: Tensor | None,
    loss_terms: LossTerms | None,
    loss: Tensor | None = None,
) -> LossScale:
    """Return the factor that turns a batch's gradients into gradients of the sum of its token losses.

    Args:
        trainer: Trainer with the accumulation and the precision.
        pl_module: Module whose ``loss_terms`` is used if ``loss_terms`` is None; without one, "mean".
        batch: The batch.
        mask: Mask of its real tokens.
        loss_terms: Reduction of the loss.
        loss: The loss before its backward pass; None if there is none yet.

    Raises:
        ValueError: If the terms of a mean cannot be counted.
    """
    divisor = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    factor = 1.0 if scaler is None else scaler.get_scale()
    found = batch_terms(pl_module, batch, mask, loss_terms, loss, factor, divisor)
    return replace(found, scale=found.scale * divisor / factor)


def batch_terms(
    pl_module: pl.LightningModule,
    batch: Any,
    mask: Tensor | None,
    loss_terms: LossTerms | None,
    loss: Tensor | None = None,
    factor: float = 1.0,
    divisor: float = 1.0,
) -> LossScale:
    """Return the number of terms that a batch's loss averages; 1 for a sum.

    Args:
        pl_module: Module whose ``loss_terms`` is used if ``loss_terms`` is None; without one, "mean".
        batch: The batch.
        mask: Mask of its real tokens.
        loss_terms: Reduction of the loss. For "mean", the loss's graph gives the number of terms; if it does not, the
            terms are the mask's tokens, or without a mask the samples.
        loss: The scalar loss before its backward pass; None if there is none yet.
        factor: Product of all factors that multiplied the loss after the module returned it.
        divisor: Product of all divisors of the loss after the module returned it.

    Raises:
        ValueError: If the terms of a mean cannot be counted.
    """
    asked = loss_terms or getattr(pl_module, "loss_terms", "mean")
    counted = None if loss is None else count_terms(loss, factor, divisor)
    empty = (counted is not None and counted.empty) or _unlabelled(batch, loss)
    if callable(asked):
        terms = float(asked(batch))
        return LossScale(terms, empty or terms == 0)
    if asked == "sum":
        return LossScale(1.0, empty)
    if counted is not None:
        return LossScale(counted.terms, empty or counted.terms == 0)
    terms = float(mask.sum()) if mask is not None else float(batch_size(batch))
    doubt = "" if loss is None or loss_terms == "mean" else _doubt(batch, mask, terms)
    return LossScale(terms, terms == 0, doubt)


def _unlabelled(batch: Any, loss: Tensor | None) -> bool:
    """Return whether every label of a batch is ignored and the loss is thus 0, or 0 over 0."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if loss is None or not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.numel():
        return False
    return bool((labels == -100).all()) and not (bool(torch.isfinite(loss).all()) and bool(loss.any()))


def _doubt(batch: Any, mask: Tensor | None, terms: float) -> str:
    """Return why a number of terms is a guess for a batch of tokens; "" if samples are likely meant."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if mask is None:
        tokens = _tokens_of_a_sample(batch)
        return f"a mean over {terms:.0f} samples, each of {tokens} tokens" if tokens > 1 else ""
    if isinstance(labels, Tensor) and labels.shape == mask.shape and (labels[mask.bool()] == -100).any():
        return f"a mean over the {terms:.0f} tokens of the mask, some of which have the label -100"
    return ""


class LossScales:
    """Reads the scales of a fit's batches from their losses, and warns once of each kind of problem."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def forget(self) -> None:
        """Begin another fit, in which each kind of problem is warned of once more."""
        self._warned.clear()

    def take(self, loss: Tensor, rows: TokenRows | None, label: str = "a batch") -> bool:
        """Set the scales of a batch from its loss.

        Args:
            loss: The loss, before its backward pass.
            rows: Description of the batch, whose scale is set; None if no statistics read this batch.
            label: Name of the batch, for warnings.

        Returns:
            Whether the loss has terms; the statistics leave out the gradients of a loss without terms.

        Raises:
            ValueError: If the terms of a mean cannot be counted.
        """
        if rows is None:
            return True
        scale = rows.take_loss(loss)
        if scale.doubt:
            self._warn(
                "doubt",
                f"The graph of the loss of {label} does not show over how many terms it is a mean; it is "
                f"taken for {scale.doubt}. Gradients are scaled by that number, and batches weigh by it. HINT: give "
                "`loss_terms`, 'sum' or a callable on the batch that returns the number of terms, or let the module "
                "have a method of that name.",
            )
        if scale.empty:
            self._warn(
                "empty",
                f"The loss of {label} has no term (is each of its labels -100?). Batches without terms "
                "are left out of the statistics.",
            )
        return not scale.empty

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(text)


def loss_terms_of(
    pl_module: pl.LightningModule,
    batch: Any,
    *,
    token_mask: TokenMask | None,
    loss_terms: LossTerms | None,
    loss: Tensor | None = None,
) -> float:
    """Return the number of terms that a batch's loss averages; 1 for a sum, 0 if there is nothing to predict.

    Args:
        pl_module: Module whose ``loss_terms`` is used if ``loss_terms`` is None; without one, "mean".
        batch: The batch.
        token_mask: Function that returns the mask of real tokens.
        loss_terms: Reduction of the loss.
        loss: The loss that the training step returned. None, or a loss without a graph, gives no number of terms.
    """
    found = batch_terms(pl_module, batch, batch_mask(pl_module, batch, token_mask), loss_terms, loss)
    return 0.0 if found.empty else found.scale


def reads_loss(
    pl_module: pl.LightningModule, batch: Any, *, token_mask: TokenMask | None, loss_terms: LossTerms | None
) -> bool:
    """Return whether only the graph shows a loss's number of terms: no option gives it, and batches are of tokens."""
    if (loss_terms or getattr(pl_module, "loss_terms", "mean")) != "mean":
        return False
    return _tokens_of_a_sample(batch) > 1 or batch_mask(pl_module, batch, token_mask) is not None


def _tokens_of_a_sample(batch: Any) -> int:
    """Return the number of tokens of each sample of a batch of token ids; 0 for other batches."""
    content = identifying_tensor(batch)
    return 0 if content is None or content.ndim != 2 or content.is_floating_point() else content.shape[1]
