"""J measured on held-out tokens, the reference for predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fasc_lightning.batches import TokenRows


class HeldoutLosses:
    """J = E[(h^T (W - W') x)^2] of candidate approximations, on tokens that they were not fitted to.

    This is the fourth moment itself, without an assumption on x and h. An instance is a ``pairs`` callback of
    :class:`~fasc_lightning.hooks.Taps` and keeps two numbers per candidate.

    Args:
        weights: The weight W (m, n) of each layer by name; other layers are skipped.
        candidates: W' (m, n) by layer and label. Weights and candidates are not copied.

    Raises:
        ValueError: If a candidate has no weight, or another shape.

    Example:
        >>> losses = HeldoutLosses({"up": torch.eye(2)}, {"up": {"nothing": torch.zeros(2, 2)}})
        >>> losses("up", torch.ones(3, 2), torch.ones(3, 2), TokenRows())
        >>> losses.losses("up")
        {'nothing': 4.0}
    """

    def __init__(self, weights: Mapping[str, Tensor], candidates: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, approximations in candidates.items():
            shapes = {label: tuple(W.shape) for label, W in approximations.items()}
            expected = tuple(weights[name].shape) if name in weights else None
            if any(shape != expected for shape in shapes.values()):
                raise ValueError(f"Expected candidates of layer {name!r} of the shape of W, {expected}; got {shapes}.")
        self.weights = weights
        self.candidates = candidates
        self.tokens: dict[str, int] = dict.fromkeys(candidates, 0)
        self._sums: dict[str, dict[str, float]] = {
            name: dict.fromkeys(labels, 0.0) for name, labels in candidates.items()
        }

    @torch.no_grad()
    def __call__(self, name: str, x: Tensor, h: Tensor, batch: TokenRows, lengths: list[int] | None = None) -> None:
        """Add the tokens of one call.

        Args:
            name: Layer.
            x: Inputs, shape (tokens, n).
            h: Gradients at the output from the backward pass, shape (tokens, m).
            batch: Holds the factor that turns h into the gradient of a sum of token losses.
            lengths: Lengths of the sequences; not used.
        """
        if name not in self.candidates:
            return
        W = self.weights[name].detach()
        dtype = torch.promote_types(W.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x, h = x.detach().to(dtype), h.detach().to(dtype)
            for label, approximation in self.candidates[name].items():
                # One difference at a time: it costs as much as one more token, and all of them would take the memory of
                # a model.
                D = W.to(dtype) - approximation.to(dtype)
                changes = ((x @ D.T) * h).sum(1).double() * batch.scale
                self._sums[name][label] += changes.square().sum().item()
        self.tokens[name] += len(x)

    def losses(self, name: str) -> dict[str, float]:
        """Return J of each candidate of a layer by label; NaN if no token reached it."""
        tokens = self.tokens[name]
        return {label: total / tokens if tokens else math.nan for label, total in self._sums[name].items()}
