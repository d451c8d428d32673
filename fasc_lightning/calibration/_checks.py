"""Checks of a calibration while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fasc_lightning._utils import amount, available_memory, some_names
from fasc_lightning.batches import LossTerms, TokenMask, takes_iterator
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import split_name
from fasc_lightning.statistics import tokens_behind


def check_batches_given(
    pl_module: pl.LightningModule, loss_terms: LossTerms | None, token_mask: TokenMask | None
) -> None:
    """Refuse steps that fetch their batches themselves if tokens or terms have to be counted before the step.

    Raises:
        MisconfigurationException: If the step has an argument ``dataloader_iter``; the message names the remedy.
    """
    terms = loss_terms or getattr(pl_module, "loss_terms", "mean")
    masked = token_mask is not None or getattr(pl_module, "token_mask", None) is not None
    if takes_iterator(pl_module) and (terms != "sum" or masked):
        raise MisconfigurationException(
            "Expected a training step that is given its batch, because its tokens and terms are counted before, but it "
            "has an argument `dataloader_iter` and takes batches by itself. HINT: "
            "training_step(self, batch, batch_idx); or loss_terms='sum' without a token mask."
        )


def check_loss(loss: Tensor, layers: int, label: str) -> None:
    """Refuse a calibration batch with a detached or non-finite loss, before it reaches the statistics.

    Args:
        loss: Loss of the batch.
        layers: Number of tapped layers.
        label: Name of the batch in messages.

    Raises:
        RuntimeError: If the loss is detached.
        FloatingPointError: If the loss is not finite.
    """
    if not loss.requires_grad:
        raise RuntimeError(
            f"No gradient reached any of the {layers} tapped layers: the loss of {label} is detached. Was it computed "
            "under no_grad or inference mode?"
        )
    if not torch.isfinite(loss).all():
        raise FloatingPointError(
            f"Expected a finite loss but got {loss.item()} in {label}. The batch was refused before it reached the "
            "statistics. Check the batch, or the learning rate of the training before it."
        )


def check_moments_memory(needed: int, device: torch.device, passes: int = 1, sketch: str | None = None) -> None:
    """Refuse moments that do not fit.

    Args:
        needed: Bytes of the moments.
        device: Device that holds them.
        passes: Passes of the calibration, named in the remedy.
        sketch: Option ``sketch``, named in the remedy.

    Raises:
        MemoryError: If the moments do not fit; the message holds the estimate.
    """
    free = available_memory(device)
    if needed > free:
        beside = "" if device.type == "cpu" else ", moments_device='cpu' holds them there"
        kinds = {None: ", sketch='projected' or 'range' holds less of each", "range": ", sketch='projected' holds less"}
        raise MemoryError(
            f"Expected the moments of the tapped layers to fit but they need up to {amount(needed, 'B')} and "
            f"{amount(free, 'B')} is free on {device}. HINT: passes={passes + 1} or more gathers a share of them at a "
            f"time{kinds.get(sketch, '')}{beside}; or target fewer layers (`targets`, `exclude`) "
            "in several runs. plan() finds what fits."
        )


def warn_unannounced() -> None:
    """Warn of a training step that runs its own backward passes, which hides its loss from the hooks."""
    rank_zero_warn(
        "The training step calls `loss.backward()` by itself, so that its loss is not known. All "
        "gradients that arrive are counted, those of `torch.autograd.grad` among them, and the scale of the loss is a "
        "guess. HINT: call `self.manual_backward(loss)`."
    )


def warn_unreached(taps: Taps, batches: int) -> None:
    """Warn of layers that no gradient has reached yet. Experts are left out: a router may still send tokens to them.

    Args:
        taps: Hooks on the layers.
        batches: Number of batches that have run.
    """
    missing = [name for name in taps.layers if name not in taps.reached and split_name(name) is None]
    if not missing:
        return
    idle = sum(name not in taps.called for name in missing)
    end = "The fit will end with an error" if len(missing) == len(taps.layers) else "They will stay dense"
    rank_zero_warn(
        f"No gradient has reached {len(missing)} of {len(taps.layers)} targeted layers in the first {batches} batches "
        f"of the calibration, for example {missing[0]!r}: {idle} of them did not run, {len(missing) - idle} ran and "
        f"the loss does not depend on them. {end} unless a later batch reaches them. HINT: `exclude` them, or look "
        "for a `detach` or `no_grad` on the way to the loss."
    )


def warn_uncalled(names: Sequence[str], total: int) -> None:
    """Warn of layers that no batch of the calibration has called, which are left out.

    Args:
        names: These layers.
        total: Number of targeted layers.
    """
    rank_zero_warn(
        f"{len(names)} of {total} targeted layers were never called in calibration: {some_names(names)}. Either other "
        "code reads their weights (as Mamba does of `dt_proj`), which no hook sees, or the model does not use them. "
        "They stay dense, and the budget is that of the other layers. HINT: `exclude` them."
    )


def warn_few_tokens(tokens: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Warn if layers saw fewer tokens than they have features; for experts, borrowed tokens count."""
    short = {name: t for name, t in tokens_behind(tokens, shapes).items() if 0 < t < max(shapes[name])}
    if short:
        name, t = min(short.items(), key=lambda item: item[1] / max(shapes[item[0]]))
        together = " together with all experts of its block" if t != tokens[name] else ""
        rank_zero_warn(
            f"{len(short)} of {len(shapes)} layers saw fewer tokens than they have features: {name!r} "
            f"{shapes[name]} saw {t}{together}, which supports ranks up to {min(t, *shapes[name])}. Directions that "
            "were not seen are judged by the shrinkage alone; calibrate on more tokens."
        )
