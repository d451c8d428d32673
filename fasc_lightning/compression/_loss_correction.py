"""What low-rank layers lose on tokens themselves, to correct what moments predict before a budget is spent.

Moments predict J = E[(h^T (W - W') x)^2] as tr(G D A D^T), as if inputs and gradients of a token had nothing to do
with each other, from the tokens that W' was made from. How far that is off depends on the layer: on SmolLM2-135M, at
the ranks of keep 0.6, by factors of 0.5 to 2.7 on those tokens, and of 0.6 to 4.4 on others. A budget that is spent by
predictions alone buys ranks where they were too high.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fasc_lightning._utils import evaluating, undoing
from fasc_lightning.batches import Backwards, TokenRows, untouched
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import linear_weight

#: One in so many calibration batches is measured on, where there are enough of them.
SHARE = 8
#: Batches to measure on at least, if there are as many.
LEAST = 4

#: Takes the factors (B (m, k), C (k, n)) of some layers by name and returns J of each in nats squared a token.
LossEstimator = Callable[[Mapping[str, tuple[Tensor, Tensor]]], Mapping[str, float]]


class LowRankLosses:
    """J = E[(h^T (W - B C) x)^2] of one low-rank matrix a layer; a ``pairs`` callback of the taps.

    No matrix of a layer's shape is made: h^T B C x is a product of two short vectors.

    Args:
        layers: The dense layers by name.
        factors: B (m, k) and C (k, n) of those that are measured.
    """

    def __init__(self, layers: Mapping[str, nn.Module], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.layers = layers
        self.factors = factors
        self.tokens = dict.fromkeys(factors, 0)
        self._sums = dict.fromkeys(factors, 0.0)

    @torch.no_grad()
    def __call__(self, name: str, x: Tensor, h: Tensor, batch: TokenRows, lengths: list[int] | None = None) -> None:
        """Add the tokens x (tokens, n), h (tokens, m) of one call; ``batch.scale`` makes h that of a sum of losses."""
        del lengths
        if name not in self.factors:
            return
        W = linear_weight(self.layers[name]).detach()
        dtype = torch.promote_types(W.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x, h = x.to(dtype), h.to(dtype)
            B, C = (factor.to(x) for factor in self.factors[name])
            changes = ((x @ W.to(dtype).T) * h).sum(1) - ((x @ C.T) * (h @ B)).sum(1)
            self._sums[name] += (changes.double() * batch.scale).square().sum().item()
        self.tokens[name] += len(x)

    def losses(self) -> dict[str, float]:
        """Return J of each layer; NaN if no token reached it."""
        return {name: self._sums[name] / tokens if tokens else math.nan for name, tokens in self.tokens.items()}


def measure_losses(
    model: nn.Module,
    layers: dict[str, nn.Module],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    batches: Sequence[Any],
    rows: Callable[[Any], TokenRows],
    loss: Callable[[nn.Module, Any], Tensor],
) -> dict[str, float]:
    """Send batches through the dense model and back, and return what each layer's low-rank matrix would lose alone.

    The model is in eval mode meanwhile, no parameter of it gets a gradient, and it is put back after each batch.

    Args:
        model: The model.
        layers: All targeted layers, dense, by name.
        factors: Of the layers to measure.
        batches: On the model's device.
        rows: Describes a batch: which tokens count, and the scale of its loss.
        loss: The model's loss of a batch.

    Returns:
        J by layer, in nats squared a token.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    judge = LowRankLosses(layers, factors)
    taps = Taps(layers, pairs=judge)
    with evaluating(model), _weights_at_rest(model), torch.enable_grad(), undoing() as undo:
        undo.add(taps.remove)
        taps.install()
        for batch in batches:
            tokens = rows(batch)
            taps.begin_batch(tokens, Backwards(announced=True))  # a step may differentiate by itself
            with untouched(model):  # around both: a graph may have saved what is put back
                value = loss(model, batch)
                tokens.take_loss(value)
                if not torch.isfinite(value):
                    raise FloatingPointError(
                        f"Expected a finite loss but got {value.item()} in a batch of the calibration, run again to "
                        "measure what layers would lose."
                    )
                if value.requires_grad:  # else it reaches no tapped layer
                    taps.begin_backward()
                    value.backward()
                    taps.end_backward()
            taps.end_batch()
    return judge.losses()


def evenly_spaced(batches: Sequence[Any]) -> list[Any]:
    """Return the batches to measure on: one in :data:`SHARE`, at least :data:`LEAST`, evenly over all of them."""
    count = min(len(batches), max(LEAST, len(batches) // SHARE))
    return [batches[(i + 1) * len(batches) // count - 1] for i in range(count)]


def correction(predicted: float, measured: float) -> float:
    """Return the factor by which a layer's predicted losses are corrected: the root of measured over predicted.

    The root, since the tokens measured on are those that the layer was fitted to, and few: of what they say half the
    logarithm is taken. What cannot be compared is left alone.
    """
    ratio = measured / predicted if predicted > 0 else math.nan
    return math.sqrt(ratio) if math.isfinite(ratio) and ratio > 0 else 1.0


@contextmanager
def _weights_at_rest(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient; the taps carry the gradient through."""
    with undoing() as undo:
        undo.keep_flags(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield
