"""Nearest Kronecker factors of a layer's Fisher, by further passes over the data that store no gradient.

Calibration takes the first step of the power iteration (:class:`~fasc_lightning.statistics.SequenceFisher`). Every
further step needs all gradients G_i again, so it is another pass: forward, backward, and two products per sequence.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fasc_lightning.batches import TokenRows
from fasc_lightning.hooks import Taps
from fasc_lightning.statistics import CalibrationMoments, SequenceFisher, not_gathered
from fasc_lightning.studies.rho._gather import backward_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class KroneckerStep:
    """One step of the iteration for several layers: a ``pairs`` callback of :class:`~fasc_lightning.hooks.Taps`.

    Args:
        start: The previous step of each layer by name, whose factors this step starts from; other layers are skipped.
    """

    def __init__(self, start: Mapping[str, SequenceFisher]) -> None:
        self.streams = {
            name: SequenceFisher(*before.shape, before.accumulator_dtype, kronecker=True, start=before).to(
                before.device
            )
            for name, before in start.items()
        }

    @torch.no_grad()
    def __call__(self, name: str, x: Tensor, h: Tensor, batch: TokenRows, lengths: list[int]) -> None:
        """Add the sequences of one call.

        Args:
            name: Layer.
            x: Inputs, shape (tokens, n).
            h: Gradients at the output from the backward pass, shape (tokens, m).
            batch: Holds the factor that turns h into the gradient of a sum of token losses.
            lengths: Tokens of each sequence.
        """
        if name in self.streams:
            self.streams[name].update(x, h, lengths, batch.scale)

    def finish(self) -> dict[str, SequenceFisher]:
        """Return the accumulators that a sequence reached, without their start; nothing may be added afterwards."""
        reached = {name: stream for name, stream in self.streams.items() if stream.count > 0}
        for stream in reached.values():
            stream.start = None
        return reached


@dataclass(frozen=True)
class KroneckerCost:
    """The cost of the iteration, and whether it has converged.

    Attributes:
        steps: Steps taken, each a pass over the data.
        seconds: Seconds of all steps.
        changes: For each step, the largest change of a factor over all layers, with factors scaled to a Frobenius norm
            of 1.
    """

    steps: int
    seconds: float
    changes: tuple[float, ...]


def refine_kronecker(
    model: PreTrainedModel,
    layers: dict[str, nn.Module],
    windows: Tensor,
    moments: CalibrationMoments,
    steps: int,
    progress: bool = False,
) -> KroneckerCost:
    """Take further steps towards the nearest Kronecker factors, and put them into the moments.

    Each step multiplies the distance by the ratio of the second to the first singular value of the rearranged Fisher.
    The moments should come from the same windows. A step also replaces the row sums by the sums of its own pass.
    Nothing may be added to the moments afterwards, because sums of different steps do not mix.

    Args:
        model: A causal language model, frozen and in eval mode; nothing of it changes.
        layers: The layers.
        windows: Token ids, shape (windows, window); each window is one sequence.
        moments: Moments with "kronecker", whose factors are the start; the factors of the last step replace them.
        steps: Number of steps, each a pass over the data.
        progress: Whether to show a bar.

    Returns:
        The cost.

    Raises:
        ValueError: If the moments have no Kronecker factors, or ``steps`` is negative.
        FloatingPointError: If a loss is not finite; the moments then keep the last whole step.
    """
    if steps < 0:
        raise ValueError(f"Expected `steps` to be at least 0, but got {steps}.")
    if "kronecker" not in moments.needs:
        raise not_gathered("kronecker", "the start of the iteration")
    start = time.perf_counter()
    changes = []
    for _ in range(steps):
        before = {name: moments.sequences[name] for name in layers if moments.sequences[name].count > 0}
        step = KroneckerStep(before)
        for _ in backward_windows(model, Taps(layers, pairs=step), windows, progress):
            pass
        after = step.finish()
        changes.append(max((_change(before[name], stream) for name, stream in after.items()), default=0.0))
        moments.sequences.update(after)
    return KroneckerCost(steps, time.perf_counter() - start, tuple(changes))


def _change(before: SequenceFisher, after: SequenceFisher) -> float:
    """Return the larger change of the two factors, each scaled to norm 1."""
    pairs = zip(before.compute(), after.compute(), strict=True)
    return max(float((normalize(a.flatten(), dim=0) - normalize(b.flatten(), dim=0)).norm()) for a, b in pairs)
