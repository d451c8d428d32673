"""What a Trainer's batch means to the taps: its padding, its tokens, and the scale of its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from fasc_lightning.taps import Backwards
from fasc_lightning.tokens import TokenRows, batch_size, identifying_tensor, sample_seeds

#: How the scalar loss averages its terms, or a callable on the batch that returns their number.
LossTerms = Literal["mean", "sum"] | Callable[[Any], float]

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


def batch_label(trainer: pl.Trainer) -> str:
    """Return a name for the batch that runs, for messages."""
    batch_idx = trainer.fit_loop.epoch_loop.batch_idx
    return f"batch {batch_idx} of epoch {trainer.current_epoch} on rank {trainer.global_rank}"


def backwards_of(pl_module: pl.LightningModule) -> Backwards:
    """Return which backward passes of a fit count: those that the Trainer runs, or a step by ``manual_backward``.

    A step that optimises by hand, or a module that overrides ``backward``, may run several through one forward.
    """
    several = not pl_module.automatic_optimization or is_overridden("backward", pl_module)
    return Backwards(announced=True, several=several)


def gradient_scale(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, mask: Tensor | None, loss_terms: LossTerms | None
) -> float:
    """Return the factor that makes a batch's gradients those of the sum of its token losses.

    Args:
        trainer: Knows of accumulation and precision.
        pl_module: Its ``loss_terms`` serves where none is given, else "mean".
        batch: The batch.
        mask: Its real tokens.
        loss_terms: How the loss averages.

    Raises:
        ValueError: If the terms of a mean cannot be counted.
    """
    scale = _scale(pl_module, batch, mask, loss_terms)
    if pl_module.automatic_optimization:
        scale *= trainer.accumulate_grad_batches
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scale if scaler is None else scale / scaler.get_scale()


def replayed_rows(
    pl_module: pl.LightningModule, batch: Any, *, token_mask: TokenMask | None, loss_terms: LossTerms | None
) -> TokenRows:
    """Describe a batch whose loss is had outside of the training loop, as the training step returns it."""
    mask = batch_mask(pl_module, batch, token_mask)
    return TokenRows("a batch run again", mask, _scale(pl_module, batch, mask, loss_terms))


def observed_rows(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batch: Any,
    *,
    token_mask: TokenMask | None,
    loss_terms: LossTerms | None,
    tokens: int,
) -> TokenRows:
    """Describe a batch of which a sample is scored and nothing else; its loss may average in a way nobody can tell."""
    mask = batch_mask(pl_module, batch, token_mask)
    try:
        scale = gradient_scale(trainer, pl_module, batch, mask, loss_terms)
    except ValueError:
        scale = 1.0
    return TokenRows(batch_label(trainer), mask, scale, sample=tokens)


def calibration_rows(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batch: Any,
    *,
    token_mask: TokenMask | None,
    loss_terms: LossTerms | None,
    fraction: float,
    seed: int,
    steps: bool,
    scored: bool,
) -> TokenRows:
    """Describe a batch that enters the moments.

    Args:
        trainer: Knows of accumulation and precision.
        pl_module: Its ``loss_terms`` serves where none is given, else "mean".
        batch: The batch.
        token_mask: Tells real tokens from padding.
        loss_terms: How the loss averages.
        fraction: Share of the tokens that enters.
        seed: Of their choice.
        steps: Whether the optimizer steps, and with it a GradScaler adapts.
        scored: Whether the dependence scores look at this batch.
    """
    mask = batch_mask(pl_module, batch, token_mask)
    scale = gradient_scale(trainer, pl_module, batch, mask, loss_terms)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    seeds = sample_seeds(batch, seed, mask) if fraction < 1 else ()
    # A scaler that never adapts would overflow on and on: that is an error.
    may_overflow = scaler is not None and steps
    rows = TokenRows(batch_label(trainer), mask, scale, fraction, seeds, may_overflow, scored=scored)
    rows.note(identifying_tensor(batch))
    return rows


def loss_terms_of(
    pl_module: pl.LightningModule, batch: Any, *, token_mask: TokenMask | None, loss_terms: LossTerms | None
) -> float:
    """Return over how many terms a batch's loss is a mean; 1 for a sum."""
    return _scale(pl_module, batch, batch_mask(pl_module, batch, token_mask), loss_terms)


def _scale(pl_module: pl.LightningModule, batch: Any, mask: Tensor | None, loss_terms: LossTerms | None) -> float:
    return _terms(loss_terms or getattr(pl_module, "loss_terms", "mean"), batch, mask)


def _terms(loss_terms: LossTerms | Any, batch: Any, mask: Tensor | None) -> float:
    """Return the number of terms that a batch's loss is a mean of."""
    if callable(loss_terms):
        return float(loss_terms(batch))
    if loss_terms == "sum":
        return 1.0
    return float(mask.sum()) if mask is not None else float(batch_size(batch))
