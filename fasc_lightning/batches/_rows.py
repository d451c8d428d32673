"""Descriptions of a Trainer's batches for the taps: tokens, scales and seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from fasc_lightning.batches._backwards import Backwards
from fasc_lightning.batches._contents import identifying_tensor
from fasc_lightning.batches._masks import TokenMask, batch_mask
from fasc_lightning.batches._sampling import sample_seeds
from fasc_lightning.batches._scaling import LossTerms, batch_terms, gradient_scale
from fasc_lightning.batches._tokens import LossScale, TokenRows


def batch_label(trainer: pl.Trainer) -> str:
    """Return the name of the running batch, for messages."""
    batch_idx = trainer.fit_loop.epoch_loop.batch_idx
    return f"batch {batch_idx} of epoch {trainer.current_epoch} on rank {trainer.global_rank}"


def backwards_of(pl_module: pl.LightningModule) -> Backwards:
    """Return which backward passes of a fit count: the Trainer's, and a step's by ``manual_backward``.

    A step that optimises by hand, or a module that overrides ``backward``, may run several through one forward.
    """
    several = not pl_module.automatic_optimization or is_overridden("backward", pl_module)
    return Backwards(announced=True, several=several)


def replayed_rows(
    pl_module: pl.LightningModule,
    batch: Any,
    *,
    token_mask: TokenMask | None,
    loss_terms: LossTerms | None,
    factor: float = 1.0,
) -> TokenRows:
    """Describe a batch whose loss is computed outside of the training loop.

    Args:
        pl_module: Module whose ``loss_terms`` is used if ``loss_terms`` is None; without one, "mean".
        batch: The batch.
        token_mask: Function that returns the mask of real tokens.
        loss_terms: Reduction of the loss.
        factor: Factor between the loss that the training step returns and the loss of the backward pass.
    """
    mask = batch_mask(pl_module, batch, token_mask)
    asked = _asked_once(pl_module, batch, loss_terms)

    def known(loss: Tensor | None = None) -> LossScale:
        found = batch_terms(pl_module, batch, mask, asked, loss, factor)
        return replace(found, scale=found.scale / factor)

    return TokenRows("a batch run again", mask, _first_guess(known), scale_of=known)


def observed_rows(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batch: Any,
    *,
    token_mask: TokenMask | None,
    loss_terms: LossTerms | None,
    tokens: int,
    seed: int,
) -> TokenRows:
    """Describe a batch of a fit of which only a sample is scored; see :func:`sampled_rows`."""
    return sampled_rows(
        pl_module,
        batch,
        label=batch_label(trainer),
        scale=partial(gradient_scale, trainer),
        token_mask=token_mask,
        loss_terms=loss_terms,
        tokens=tokens,
        seed=seed,
    )


def sampled_rows(
    pl_module: pl.LightningModule,
    batch: Any,
    *,
    label: str,
    scale: Callable[..., LossScale] = batch_terms,
    token_mask: TokenMask | None,
    loss_terms: LossTerms | None,
    tokens: int,
    seed: int,
) -> TokenRows:
    """Describe a batch of which only a sample is scored. The number of terms of its loss need not be known.

    Args:
        pl_module: Module whose ``loss_terms`` is used if ``loss_terms`` is None; without one, "mean".
        batch: The batch.
        label: Name of the batch, for messages.
        scale: Function that returns the scale from the module, the batch, its mask, the reduction and the loss.
        token_mask: Function that returns the mask of real tokens.
        loss_terms: Reduction of the loss.
        tokens: Number of tokens to keep.
        seed: Seed of the choice of tokens.
    """
    mask = batch_mask(pl_module, batch, token_mask)
    try:
        asked = _asked_once(pl_module, batch, loss_terms)
    except ValueError:
        asked = "sum"
    known = partial(scale, pl_module, batch, mask, asked)

    def scale_of(loss: Tensor) -> LossScale:
        try:
            return replace(known(loss), doubt="")
        except ValueError:
            return LossScale(1.0)

    seeds = _seeds_of(batch, seed, mask)
    rows = TokenRows(label, mask, _first_guess(known), sample_seeds=seeds, sample=tokens, scale_of=scale_of)
    rows.note(identifying_tensor(batch))
    return rows


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
        trainer: Trainer with the accumulation and the precision.
        pl_module: Module whose ``loss_terms`` is used if ``loss_terms`` is None; without one, "mean".
        batch: The batch.
        token_mask: Function that returns the mask of real tokens.
        loss_terms: Reduction of the loss.
        fraction: Share of the tokens that enters the moments.
        seed: Seed of the choice of tokens.
        steps: Whether the optimizer steps, so that a GradScaler adapts.
        scored: Whether the dependence scores take a sample of this batch.
    """
    mask = batch_mask(pl_module, batch, token_mask)
    known = partial(gradient_scale, trainer, pl_module, batch, mask, _asked_once(pl_module, batch, loss_terms))
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    seeds = sample_seeds(batch, seed, mask) if fraction < 1 else _seeds_of(batch, seed, mask) if scored else ()
    # Without optimizer steps a scaler never adapts: it would overflow for ever, which is an error.
    may_overflow = scaler is not None and steps
    label, scale = batch_label(trainer), _first_guess(known)
    rows = TokenRows(label, mask, scale, fraction, seeds, may_overflow, scored=scored, scale_of=known)
    rows.note(identifying_tensor(batch))
    return rows


def _seeds_of(batch: Any, seed: int, mask: Tensor | None) -> list[int]:
    """Return the seeds of a batch's samples; none for a batch without tensors, since a score must not stop a fit."""
    return [] if identifying_tensor(batch) is None else sample_seeds(batch, seed, mask)


def _asked_once(pl_module: pl.LightningModule, batch: Any, loss_terms: LossTerms | None) -> LossTerms | None:
    """Return the reduction of a batch's loss. A callable, which may be slow, is called once and its answer kept."""
    asked = loss_terms or getattr(pl_module, "loss_terms", None)
    if not callable(asked):
        return loss_terms
    terms = float(asked(batch))
    return lambda batch: terms


def _first_guess(scale_of: Callable[[], LossScale]) -> float:
    """Return a scale before there is a loss, for gradients whose loss is never announced."""
    try:
        return scale_of().scale
    except ValueError:
        return 1.0
