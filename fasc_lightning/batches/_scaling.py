"""What a Trainer's batch means to the taps: its padding, its tokens, and the scale of its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from fasc_lightning.batches._backwards import Backwards
from fasc_lightning.batches._loss_graph import count_terms
from fasc_lightning.batches._tokens import LossScale, TokenRows, batch_size, identifying_tensor, sample_seeds

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
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batch: Any,
    mask: Tensor | None,
    loss_terms: LossTerms | None,
    loss: Tensor | None = None,
) -> LossScale:
    """Return the factor that makes a batch's gradients those of the sum of its token losses.

    Args:
        trainer: Knows of accumulation and precision.
        pl_module: Its ``loss_terms`` serves where none is given, else "mean".
        batch: The batch.
        mask: Its real tokens.
        loss_terms: How the loss averages.
        loss: As the Trainer sends it backwards; None while there is none.

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
    """Return over how many terms a batch's loss is a mean; 1 for a sum. What is asked for counts, then the loss itself.

    Args:
        pl_module: Its ``loss_terms`` serves where none is given, else "mean".
        batch: The batch.
        mask: Its real tokens.
        loss_terms: How the loss averages. Of a "mean", the loss's graph tells over what; where it does not, over the
            mask's tokens, or the samples.
        loss: The scalar, before its backward pass; None while there is none.
        factor: What the loss has been multiplied by since the module returned it.
        divisor: What it has been divided by.

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
    """Tell whether every label of a batch is ignored and the loss is what comes of that: 0, or 0 over 0."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if loss is None or not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.numel():
        return False
    return bool((labels == -100).all()) and not (bool(torch.isfinite(loss).all()) and bool(loss.any()))


def _doubt(batch: Any, mask: Tensor | None, terms: float) -> str:
    """Return why a number of terms is a guess, where batches are of tokens; "" where samples are likely meant."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if mask is None:
        tokens = _tokens_of_a_sample(batch)
        return f"a mean over {terms:.0f} samples, each of {tokens} tokens" if tokens > 1 else ""
    if isinstance(labels, Tensor) and labels.shape == mask.shape and (labels[mask.bool()] == -100).any():
        return f"a mean over the {terms:.0f} tokens of the mask, some of which have the label -100"
    return ""


class LossScales:
    """Takes the scales of a fit's batches from their losses, and warns once of each kind of doubt."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def forget(self) -> None:
        """Begin another fit: each doubt may be warned of once more."""
        self._said.clear()

    def take(self, loss: Tensor, *batches: TokenRows | None, label: str = "a batch") -> bool:
        """Tell whether a loss has terms; if not, its gradients are left out of the statistics.

        Args:
            loss: About to be sent backwards.
            *batches: What the statistics know of the batch.
            label: Names it.

        Raises:
            ValueError: If the terms of a mean cannot be counted.
        """
        found = [rows.take_loss(loss) for rows in batches if rows is not None]
        for doubt in [scale.doubt for scale in found if scale.doubt][:1]:
            self._warn(
                "doubt",
                f"FascCallback: over how many terms the loss of {label} is a mean cannot be told from its graph; it is "
                f"taken for {doubt}. Gradients are scaled by that number, and batches weigh by it. HINT: give "
                "`loss_terms`, 'sum' or a callable on the batch that returns the number of terms, or let the module "
                "have a method of that name.",
            )
        empty = any(scale.empty for scale in found)
        if empty:
            self._warn(
                "empty",
                f"FascCallback: the loss of {label} has no term (is each of its labels -100?), so that it says nothing "
                "of any layer. Such batches are left out of the statistics.",
            )
        return not empty

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            rank_zero_warn(text)


def replayed_rows(
    pl_module: pl.LightningModule,
    batch: Any,
    *,
    token_mask: TokenMask | None,
    loss_terms: LossTerms | None,
    factor: float = 1.0,
) -> TokenRows:
    """Describe a batch whose loss is had outside of the training loop.

    Args:
        pl_module: Its ``loss_terms`` serves where none is given, else "mean".
        batch: The batch.
        token_mask: Tells real tokens from padding.
        loss_terms: How the loss averages.
        factor: What the loss that the training step returned is multiplied by before its backward pass.
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
    """Describe a batch of which a sample is scored and nothing else; its loss may average in a way nobody can tell."""
    mask = batch_mask(pl_module, batch, token_mask)
    try:
        asked = _asked_once(pl_module, batch, loss_terms)
    except ValueError:
        asked = "sum"
    known = partial(gradient_scale, trainer, pl_module, batch, mask, asked)

    def scale_of(loss: Tensor) -> LossScale:
        try:
            return replace(known(loss), doubt="")
        except ValueError:
            return LossScale(1.0)

    seeds, label = _seeds_of(batch, seed, mask), batch_label(trainer)
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
    known = partial(gradient_scale, trainer, pl_module, batch, mask, _asked_once(pl_module, batch, loss_terms))
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    seeds = sample_seeds(batch, seed, mask) if fraction < 1 else _seeds_of(batch, seed, mask) if scored else ()
    # A scaler that never adapts would overflow on and on: that is an error.
    may_overflow = scaler is not None and steps
    label, scale = batch_label(trainer), _first_guess(known)
    rows = TokenRows(label, mask, scale, fraction, seeds, may_overflow, scored=scored, scale_of=known)
    rows.note(identifying_tensor(batch))
    return rows


def _seeds_of(batch: Any, seed: int, mask: Tensor | None) -> list[int]:
    """Return the seeds of a batch's samples; none if it holds no tensor, since a score is no reason to stop."""
    return [] if identifying_tensor(batch) is None else sample_seeds(batch, seed, mask)


def loss_terms_of(
    pl_module: pl.LightningModule,
    batch: Any,
    *,
    token_mask: TokenMask | None,
    loss_terms: LossTerms | None,
    loss: Tensor | None = None,
) -> float:
    """Return over how many terms a batch's loss is a mean; 1 for a sum, 0 where there is nothing to predict.

    Args:
        pl_module: Its ``loss_terms`` serves where none is given, else "mean".
        batch: The batch.
        token_mask: Tells real tokens from padding.
        loss_terms: How the loss averages.
        loss: As the training step returned it; None, or one without a graph, tells nothing.
    """
    found = batch_terms(pl_module, batch, batch_mask(pl_module, batch, token_mask), loss_terms, loss)
    return 0.0 if found.empty else found.scale


def _asked_once(pl_module: pl.LightningModule, batch: Any, loss_terms: LossTerms | None) -> LossTerms | None:
    """Return how a batch's loss averages with a callable's answer in place of the callable, which need not be cheap."""
    asked = loss_terms or getattr(pl_module, "loss_terms", None)
    if not callable(asked):
        return loss_terms
    terms = float(asked(batch))
    return lambda batch: terms


def reads_loss(
    pl_module: pl.LightningModule, batch: Any, *, token_mask: TokenMask | None, loss_terms: LossTerms | None
) -> bool:
    """Tell whether only the graph tells how many terms a loss has: nobody said it, and batches are of tokens."""
    if (loss_terms or getattr(pl_module, "loss_terms", "mean")) != "mean":
        return False
    return _tokens_of_a_sample(batch) > 1 or batch_mask(pl_module, batch, token_mask) is not None


def _tokens_of_a_sample(batch: Any) -> int:
    """Return how many tokens each sample of a batch of token ids has; 0 of other batches."""
    content = identifying_tensor(batch)
    return 0 if content is None or content.ndim != 2 or content.is_floating_point() else content.shape[1]


def _first_guess(scale_of: Callable[[], LossScale]) -> float:
    """Return a scale before there is a loss; it serves gradients of which no loss is announced."""
    try:
        return scale_of().scale
    except ValueError:
        return 1.0
