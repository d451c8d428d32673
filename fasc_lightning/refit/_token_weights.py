"""Weights of tokens in a refit: the length of the loss's gradient at a layer's output, in the dense model.

A token counts in the squared first-order change of the loss, E[(h^T e)^2] for an error e of a layer's output, by its
gradient h. G has E[h h^T] of all tokens alike. The lengths |h| of single tokens weigh them, as in the coupled moments
(:class:`~fasc_lightning.statistics.CoupledMoments`) that the factors were made with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fasc_lightning._utils import undoing
from fasc_lightning.refit._batch_loss import BatchLoss, real_tokens
from fasc_lightning.refit._blocks import BlockRunner

#: Length of the gradient at a layer's output of each real token of a batch, shape (tokens,), by layer, in one unit for
#: all batches.
Lengths = Mapping[str, Tensor]


def gradient_lengths(runner: BlockRunner, dense: Mapping[str, nn.Module], loss: BatchLoss) -> list[Lengths]:
    """Return the lengths of the gradients of each batch, from a forward and a backward pass of the dense model.

    Args:
        runner: Runner of the model and its batches.
        dense: The dense layers by name.
        loss: Function that sends a batch through the model and returns its mean loss. A method ``with_loss`` of it gets
            a function that reads the loss while its graph is there.
    """
    outputs: dict[str, Tensor] = {}
    use: Callable[..., Lengths] = getattr(loss, "with_loss", partial(_with_loss, loss))
    with runner.dense(), undoing() as undo:
        undo.keep_flags(runner.model)
        for parameter in runner.model.parameters():
            parameter.requires_grad_(False)
        for name, layer in dense.items():
            undo.hook(layer.register_forward_hook, partial(_see, outputs, name))
        found = []
        for batch in runner.batches:
            outputs.clear()
            found.append(use(runner.model, batch, partial(_lengths, outputs, real_tokens(batch))))
        outputs.clear()
    return found


def token_weights(lengths: Sequence[Lengths], group: Sequence[str], counts: Sequence[int]) -> list[Tensor]:
    """Return weights of the tokens of layers that share an input, of mean 1 over all batches.

    Args:
        lengths: Lengths of the gradients of each batch.
        group: Names of the layers; the length is that of all their gradients together.
        counts: Number of real tokens of each batch.

    Returns:
        The weights of each batch, shape (real tokens,), float64; an empty list if lengths of real tokens are missing or
        all zero, so that all tokens count alike.

    Raises:
        FloatingPointError: If a length is not finite.
    """
    for batch, count in zip(lengths, counts, strict=True):
        if any(name not in batch or len(batch[name]) != count for name in group):
            return []
    weights = [torch.stack([batch[name].double() for name in group]).norm(dim=0) for batch in lengths]
    total = float(torch.cat(weights).sum())
    if not math.isfinite(total):
        raise FloatingPointError("Expected finite gradients but some are NaN or Inf. The refit is undone.")
    return [weight * (sum(counts) / total) for weight in weights] if total > 0 else []


def _see(outputs: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Keep a layer's output, which hangs on no graph if no layer before it has been seen."""
    del module, args
    if not output.requires_grad:
        outputs[name] = output.detach().requires_grad_()
        return outputs[name].clone()  # which the model may change in place
    outputs[name] = output
    return output


def _lengths(outputs: Mapping[str, Tensor], real: Tensor | None, loss: Tensor) -> Lengths:
    if not loss.requires_grad:
        return {}
    gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
    found = {}
    for name, h in zip(outputs, gradients, strict=True):
        if h is None:
            continue
        length = h.flatten(0, -2).float().norm(dim=1)
        if real is None or len(real) == len(length):  # experts see other tokens
            length = length if real is None else length[real.to(length.device)]
            found[name] = len(length) * length  # a mean loss has about as many terms as there are tokens
    return found


def _with_loss(loss: BatchLoss, model: nn.Module, batch: Any, use: Callable[[Tensor], Lengths]) -> Lengths:
    with torch.enable_grad():
        return use(loss(model, batch))
