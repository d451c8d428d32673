"""Losses of approximated layers measured on tokens, which correct the losses predicted from moments.

Moments predict J = E[(h^T (W - W') x)^2] as tr(G D A D^T): this takes a token's input and gradient as independent, and
it uses the tokens that W' was fitted to. The error depends on the layer. On SmolLM2-135M, at the ranks of keep 0.6, J
is 0.5 to 2.7 times the prediction on the fitted tokens and 0.6 to 4.4 times on other tokens. A budget spent by
predictions alone buys ranks where predictions are too high.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fasc_lightning._utils import Progress, evaluating, undoing
from fasc_lightning.batches import Backwards, TokenRows, untouched
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import Rounded, linear_weight

#: One in this many calibration batches is used for measuring, if there are enough batches.
SHARE = 8
#: The least number of batches for measuring, if there are as many.
LEAST = 4

#: What may take the place of a matrix (m, n): factors left (m, k) and right (k, n), the matrix on a grid, or the sum.
Approximation: TypeAlias = tuple[Tensor, Tensor] | Rounded | tuple[Rounded, Tensor, Tensor]

#: Takes the approximations of some layers by name and returns J of each in nats squared per token.
LossEstimator = Callable[[Mapping[str, Approximation]], Mapping[str, float]]


class ApproximationLosses:
    """J = E[(h^T (W - W') x)^2] of one approximation W' per layer; a ``pairs`` callback of the taps.

    Factors make no matrix of a layer's shape, because h^T left right x is a product of two short vectors.

    Args:
        layers: The dense layers by name.
        approximations: W' of the layers to measure.
    """

    def __init__(self, layers: Mapping[str, nn.Module], approximations: Mapping[str, Approximation]) -> None:
        self.layers = layers
        self.approximations = approximations
        self.tokens = dict.fromkeys(approximations, 0)
        self._sums = dict.fromkeys(approximations, 0.0)

    @torch.no_grad()
    def __call__(self, name: str, x: Tensor, h: Tensor, batch: TokenRows, lengths: list[int] | None = None) -> None:
        """Add the tokens x (tokens, n), h (tokens, m) of one call; ``batch.scale`` makes h that of a summed loss."""
        del lengths
        if name not in self.approximations:
            return
        W = linear_weight(self.layers[name]).detach()
        dtype = torch.promote_types(W.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x, h = x.to(dtype), h.to(dtype)
            approximation, W = self.approximations[name], W.to(dtype)
            rounded, factors = _parts(approximation)
            if rounded is not None:
                W = W - rounded.dequantize().to(x)
            changes = ((x @ W.T) * h).sum(1)
            if factors is not None:
                left, right = (factor.to(x) for factor in factors)
                changes -= ((x @ right.T) * (h @ left)).sum(1)
            self._sums[name] += (changes.double() * batch.scale).square().sum().item()
        self.tokens[name] += len(x)

    def losses(self) -> dict[str, float]:
        """Return J of each layer; NaN if no token reached it."""
        return {name: self._sums[name] / tokens if tokens else math.nan for name, tokens in self.tokens.items()}


def _parts(approximation: Approximation) -> tuple[Rounded | None, tuple[Tensor, Tensor] | None]:
    """Return the matrix on a grid and the factors that an approximation is the sum of."""
    if isinstance(approximation, Rounded):
        return approximation, None
    if len(approximation) == 2:
        return None, approximation
    return approximation[0], approximation[1:]


def measure_losses(
    model: nn.Module,
    layers: dict[str, nn.Module],
    approximations: Mapping[str, Approximation],
    batches: Sequence[Any],
    rows: Callable[[Any], TokenRows],
    loss: Callable[[nn.Module, Any], Tensor],
) -> dict[str, float]:
    """Run batches forward and backward through the dense model, and return the loss of each approximation alone.

    Args:
        model: The model; :func:`run_batches` leaves it as it was.
        layers: All targeted layers by name, dense.
        approximations: Approximations of the layers to measure.
        batches: Batches on the model's device.
        rows: Returns which tokens of a batch count, and the scale of its loss.
        loss: Returns the model's loss of a batch.

    Returns:
        J by layer, in nats squared per token.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    judge = ApproximationLosses(layers, approximations)
    run_batches(model, Taps(layers, pairs=judge), batches, rows, loss)
    return judge.losses()


def run_batches(
    model: nn.Module,
    taps: Taps,
    batches: Sequence[Any],
    rows: Callable[[Any], TokenRows],
    loss: Callable[[nn.Module, Any], Tensor],
    progress: Progress | None = None,
) -> None:
    """Run batches forward and backward through a model with taps, which are removed afterwards.

    The model is in eval mode meanwhile, and none of its parameters gets a gradient. Its state is restored after each
    batch.

    Args:
        model: The model.
        taps: Taps on some of its layers.
        batches: Batches on the model's device.
        rows: Returns which tokens of a batch count, and the scale of its loss.
        loss: Returns the model's loss of a batch.
        progress: Wraps the loop over the batches.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    numbers = [str(i) for i in range(len(batches))]
    with evaluating(model), _weights_at_rest(model), torch.enable_grad(), undoing() as undo:
        undo.add(taps.remove)
        taps.install()
        for number in numbers if progress is None else progress(numbers, "Second stage"):
            batch = batches[int(number)]
            tokens = rows(batch)
            taps.begin_batch(tokens, Backwards(announced=True))  # a step may differentiate by itself
            with untouched(model):  # around both: a graph may have saved the restored tensors
                value = loss(model, batch)
                tokens.take_loss(value)
                if not torch.isfinite(value):
                    raise FloatingPointError(
                        f"Expected a finite loss but got {value.item()} in a batch of the calibration that ran again."
                    )
                if value.requires_grad:  # else the loss depends on no tapped layer
                    taps.begin_backward()
                    value.backward()
                    taps.end_backward()
            taps.end_batch()


def evenly_spaced(batches: Sequence[Any]) -> list[Any]:
    """Return one batch in :data:`SHARE`, at least :data:`LEAST`, evenly spaced over all batches."""
    count = min(len(batches), max(LEAST, len(batches) // SHARE))
    return [batches[(i + 1) * len(batches) // count - 1] for i in range(count)]


def correction(predicted: float, measured: float, trust: float = 0.5) -> float:
    """Return the factor that corrects a layer's predicted losses: (measured / predicted)^trust.

    The factor is 1 if the two cannot be compared.

    Args:
        predicted: J of moments.
        measured: J of tokens, which are few and to which the layer was fitted.
        trust: Share of the ratio's logarithm that is believed. Factors of low rank fit the tokens closely: half.
    """
    ratio = measured / predicted if predicted > 0 else math.nan
    return ratio**trust if math.isfinite(ratio) and ratio > 0 else 1.0


@contextmanager
def _weights_at_rest(model: nn.Module) -> Iterator[None]:
    """Make no parameter require a gradient meanwhile; the taps pass the gradient on."""
    with undoing() as undo:
        undo.keep_flags(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield
