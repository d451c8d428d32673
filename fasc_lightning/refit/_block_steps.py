"""Gradient steps on copies of one block's factors, and the error that they minimise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fasc_lightning.layers import CompressedLinear

#: Least root mean square of a tensor to which a learning rate is relative: biases may start at zero.
MIN_LENGTH = 1e-3


class FactorCopies:
    """Trainable copies of the parameters of a block's compressed layers; the block itself stays as it is.

    Args:
        block: A block of a model.
        layers: Its compressed layers by their name inside the block.

    Attributes:
        tensors: Every parameter and floating-point buffer of the block by name, at least float32. The copies require
            gradients, the other tensors do not.
        dtype: Type of the tensors.
    """

    def __init__(self, block: nn.Module, layers: Mapping[str, CompressedLinear]) -> None:
        own = {id(p) for layer in layers.values() for p in layer.parameters()}
        parameters = dict(block.named_parameters())
        buffers = {name: value for name, value in block.named_buffers() if value.is_floating_point()}
        self.dtype = torch.float32
        for value in parameters.values():
            if value.is_floating_point():
                self.dtype = torch.promote_types(self.dtype, value.dtype)
        self._originals = {name: p for name, p in parameters.items() if id(p) in own}
        self._leaves = {
            name: p.detach().to(self.dtype, copy=True).requires_grad_() for name, p in self._originals.items()
        }
        held = {
            name: value.detach().to(self.dtype) if value.is_floating_point() else value.detach()
            for name, value in {**parameters, **buffers}.items()
        }
        self.tensors: dict[str, Tensor] = {**held, **self._leaves}

    def groups(self, lr: float) -> list[dict[str, object]]:
        """Return an optimizer's parameter groups: learning rates relative to each tensor's root mean square."""
        return [
            {"params": [leaf], "lr": lr * max(float(leaf.detach().square().mean().sqrt()), MIN_LENGTH)}
            for leaf in self._leaves.values()
        ]

    @torch.no_grad()
    def store(self) -> None:
        """Put the copies into the block's parameters, rounded to their type."""
        for name, original in self._originals.items():
            original.copy_(self._leaves[name])


def relative_error(output: Tensor, target: Tensor, rows: Tensor | None) -> Tensor:
    """Return the mean over tokens of |y - t|^2 / |t|^2, a scalar, in at least float32.

    The error is relative for each token: modules that read the stream of hidden states normalise it, and a few tokens
    are hundreds of times as long as others.

    Args:
        output: y, shape (..., d).
        target: t, shape (..., d).
        rows: Mask or indices of the flattened tokens that count; None counts all.
    """
    dtype = torch.promote_types(output.dtype, torch.float32)
    y, t = (value.reshape(-1, value.shape[-1]).to(dtype) for value in (output, target))
    if rows is not None:
        y, t = y[rows.to(y.device)], t[rows.to(y.device)]
    lengths = t.square().sum(1).clamp(min=torch.finfo(dtype).tiny)
    return ((y - t).square().sum(1) / lengths).mean()


def train_copies(
    copies: FactorCopies, error: Callable[[int], Tensor], batches: Iterator[int], steps: int, lr: float
) -> bool:
    """Take steps of Adam with a learning rate that falls linearly to zero.

    Args:
        copies: The copies to train.
        error: Function that returns the error of a batch, computed with the copies.
        batches: Number of the batch of each step.
        steps: Number of steps.
        lr: First learning rate, relative to the root mean square of each tensor.

    Returns:
        Whether something was trained and every error and every tensor stayed finite.
    """
    optimizer = torch.optim.Adam(copies.groups(lr))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        with torch.enable_grad():
            loss = error(next(batches))
        if not (loss.requires_grad and math.isfinite(loss.item())):
            return False
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return all(bool(value.isfinite().all()) for value in copies.tensors.values() if value.requires_grad)
