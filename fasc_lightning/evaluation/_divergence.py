"""Kullback-Leibler divergence of a compressed model's predictions from the dense model's, window by window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fasc_lightning._utils import evaluating
from fasc_lightning.evaluation._perplexity import check_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def log_probabilities(model: PreTrainedModel, windows: Tensor, batch_size: int = 2) -> Tensor:
    """Return a model's predictions on windows, for :func:`window_divergences`.

    They take two bytes for each position and token of the vocabulary: 50 MB for a window of 512 tokens and a
    vocabulary of 49,152.

    Args:
        model: Causal language model; its training mode is restored.
        windows: Token ids of shape (windows, T).
        batch_size: Windows per forward pass.

    Returns:
        Log-probabilities in nats, float16, on the CPU, shape (windows, T - 1, vocabulary).

    Raises:
        FloatingPointError: If a prediction is NaN.
        ValueError: If the windows are not a non-empty (windows, T >= 2) tensor.
    """
    return torch.stack([row.half().cpu() for row in _predictions(model, windows, batch_size)])


def window_divergences(model: PreTrainedModel, windows: Tensor, dense: Tensor, batch_size: int = 2) -> Tensor:
    """Return the mean divergence KL(dense || model) of each window, for paired comparisons of two models.

    It is the mean over positions of sum_v p(v) (log p(v) - log q(v)), with p of the dense model and q of the model. The
    kept log-probabilities are normalised again, so that their rounding to float16 makes no divergence negative.

    Args:
        model: Causal language model; its training mode is restored.
        windows: Token ids of shape (windows, T).
        dense: :func:`log_probabilities` of the dense model on the same windows.
        batch_size: Windows per forward pass.

    Returns:
        Nats a token, shape (windows,), float64, on the CPU.

    Raises:
        FloatingPointError: If a window's divergence is not finite.
        ValueError: If the windows are not a non-empty (windows, T >= 2) tensor, or the dense model's predictions are of
            other windows or of another vocabulary.
    """
    found = []
    for i, log_q in enumerate(_predictions(model, windows, batch_size)):
        if len(dense) != len(windows) or dense.shape[1:] != log_q.shape:
            raise ValueError(
                f"Expected predictions of the dense model of shape {(len(windows), *log_q.shape)} but got "
                f"{tuple(dense.shape)}. Both models need the same windows and the same vocabulary."
            )
        log_p = dense[i].to(log_q.device).float().log_softmax(-1)
        p = log_p.exp()
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0)  # tokens that a model never predicts have log p = -inf
        divergence = terms.sum(-1).double().mean()
        if not bool(divergence.isfinite()):
            raise FloatingPointError(
                f"The divergence of window {i} is not finite ({float(divergence)}). The model's weights or activations "
                "overflow: check its dtype and the layers that were replaced."
            )
        found.append(divergence.cpu())
    return torch.stack(found).clamp_min(0.0)


def _predictions(model: PreTrainedModel, windows: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yield the log-probabilities of each window, shape (T - 1, vocabulary), float32; NaN is refused."""
    check_windows(windows)
    done = 0
    for batch in windows.split(batch_size):
        with evaluating(model), torch.no_grad():
            logits = model(batch.to(model.device), use_cache=False).logits
        # One window at a time, because the float32 log-probabilities of a whole batch would set the peak of memory.
        for row in logits:
            log_q = row[:-1].float().log_softmax(-1)
            if bool(log_q.isnan().any()):
                raise FloatingPointError(f"The predictions of window {done} hold NaN: the model overflows.")
            done += 1
            yield log_q
