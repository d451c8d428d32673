"""Perplexity over token windows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from fasc_lightning._utils import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MeanTokenLoss(Metric):
    """Mean loss per token, in nats, over all updates; its ``exp`` is the perplexity.

    The sum is kept in float64, because a float32 sum over millions of tokens loses the digits in which two compressed
    models differ.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    loss_sum: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, losses: Tensor) -> None:
        """Add the losses of some tokens.

        Args:
            losses: Negative log-probabilities in nats, of any shape.
        """
        self.loss_sum += losses.double().sum()
        self.tokens += losses.numel()

    def compute(self) -> Tensor:
        """Return the mean loss per token, a scalar; NaN before the first token."""
        return self.loss_sum / self.tokens


def perplexity(model: PreTrainedModel, windows: Tensor, batch_size: int = 4) -> float:
    """Return the perplexity of a causal language model: exp of the mean loss per token.

    Each window is read by itself and predicts its tokens 1 to T-1. Uniform predictions score the size of the
    vocabulary.

    Args:
        model: Causal language model; its training mode is restored.
        windows: Token ids of shape (windows, T).
        batch_size: Windows per forward pass.

    Returns:
        The perplexity, at least 1; infinite if exp of the mean loss exceeds the largest float.

    Raises:
        FloatingPointError: If a window's loss is not finite.
        ValueError: If the windows are not a non-empty (windows, T >= 2) tensor.
    """
    metric = MeanTokenLoss()
    for losses in _window_losses(model, windows, batch_size):
        metric.update(losses.cpu())
    return float(metric.compute().exp())


def token_losses(model: PreTrainedModel, windows: Tensor, batch_size: int = 4) -> Tensor:
    """Return the mean token loss of each window, for paired comparisons of two models.

    Args:
        model: Causal language model; its training mode is restored.
        windows: Token ids of shape (windows, T).
        batch_size: Windows per forward pass.

    Returns:
        Losses in nats of shape (windows,), float64, on the CPU. ``exp`` of their mean is :func:`perplexity`.

    Raises:
        FloatingPointError: If a window's loss is not finite.
        ValueError: If the windows are not a non-empty (windows, T >= 2) tensor.
    """
    return torch.stack([losses.cpu().double().mean() for losses in _window_losses(model, windows, batch_size)])


def check_windows(windows: Tensor) -> None:
    """Refuse windows that predict nothing.

    Raises:
        ValueError: If they are not a non-empty (windows, T >= 2) tensor.
    """
    if windows.ndim != 2 or len(windows) == 0 or windows.shape[1] < 2:
        raise ValueError(
            f"Expected at least one window of at least 2 tokens, as (windows, tokens), but got the shape "
            f"{tuple(windows.shape)}."
        )


def _window_losses(model: PreTrainedModel, windows: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yield the token losses of each window, of shape (T - 1,), checked to be finite."""
    check_windows(windows)
    done = 0
    for batch in windows.split(batch_size):
        with evaluating(model), torch.no_grad():
            ids = batch.to(model.device)
            logits = model(ids, use_cache=False).logits
            # One row at a time, because the float32 log-probabilities of a whole batch would set the peak of memory.
            losses = [
                F.cross_entropy(row[:-1].float(), label[1:], reduction="none")
                for row, label in zip(logits, ids, strict=True)
            ]
            del logits
        for window_loss in losses:
            if not window_loss.isfinite().all():
                raise FloatingPointError(
                    f"The loss of window {done} is not finite (mean {float(window_loss.mean())}). The model's weights "
                    "or activations overflow: check its dtype and the layers that were replaced."
                )
            done += 1
            yield window_loss
