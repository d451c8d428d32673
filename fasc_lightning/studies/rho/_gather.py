"""The pass of ``recipes/study_rho.py``, which gathers moments and scores of every layer from windows of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fasc_lightning._utils import undoing
from fasc_lightning.batches import MIN_SEQUENCES, TokenRows, sample_seeds
from fasc_lightning.dependence import MIN_ROWS, LayerScores, RhoRow, pooled_rho
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import layer_shapes, linear_weight
from fasc_lightning.statistics import CalibrationMoments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens of a minibatch of the score: all tokens of eight windows that have a gradient, or a random part of them.
#: Neighbouring tokens of one text depend on each other, so only pairs of tokens from different texts are evidence.
MINIBATCH = 2048


@dataclass(frozen=True)
class Observation:
    """The scores of one layer over the tokens so far.

    Attributes:
        row: The minibatch score, as in monitoring.
        pooled: rho by the paper's Eq. 2 from the moments of all tokens; NaN where undefined.
    """

    row: RhoRow
    pooled: float


@dataclass(frozen=True)
class Statistics:
    """The results of one pass.

    Attributes:
        moments: Moments of every layer, over all tokens.
        observed: Observations of each layer by number of tokens; the last one covers all tokens.
    """

    moments: CalibrationMoments
    observed: dict[int, dict[str, Observation]]


def gather(
    model: PreTrainedModel,
    layers: dict[str, nn.Module],
    windows: Tensor,
    sizes: Iterable[int] = (),
    seed: int = 0,
    progress: bool = False,
) -> Statistics:
    """Run every window forward and backward once; gather moments of all tokens, and scores of some.

    Args:
        model: A causal language model, in eval mode; nothing of it changes.
        layers: The layers to tap.
        windows: Token ids, shape (windows, window).
        sizes: Further numbers of tokens at which to record the scores; numbers beyond the data are skipped.
        seed: Seed of the choice of scored tokens and of the scores' permutations.
        progress: Whether to show a bar.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    moments = CalibrationMoments(layer_shapes(layers), device=model.device, needs={"C"})
    scores = window_scores(layers, seed, model.device)
    wanted = sorted(size for size in sizes if size <= windows.numel())
    observed: dict[int, dict[str, Observation]] = {}
    for tokens in backward_windows(model, Taps(layers, moments, scores), windows, progress, seed):
        if tokens == windows.numel() or (wanted and tokens >= wanted[0]):
            wanted = [size for size in wanted if size > tokens]
            rows = {row["layer"]: row for row in scores.rows()}
            observed[tokens] = {
                name: Observation(rows[name], _pooled(moments, name, layer)) for name, layer in layers.items()
            }
    moments.drop_cross()  # only the pooled score needs it
    return Statistics(moments, observed)


def window_scores(layers: Mapping[str, nn.Module], seed: int, device: torch.device) -> LayerScores:
    """Return scores for :func:`backward_windows`, which collect single windows into minibatches."""
    # A window gives a quarter of the tokens of a batch, and eight windows are a minibatch.
    return LayerScores(layers, MINIBATCH // MIN_ROWS * MIN_SEQUENCES, seed=seed, device=device)


def backward_windows(
    model: PreTrainedModel, taps: Taps, windows: Tensor, progress: bool = False, seed: int = 0
) -> Iterator[int]:
    """Run windows forward and backward under the taps, one at a time; yield the number of tokens so far.

    Args:
        model: A causal language model; its weights get no gradients if they require none.
        taps: Taps, installed here and always removed.
        windows: Token ids, shape (windows, window).
        progress: Whether to show a bar.
        seed: Seed of the choice of scored tokens.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    from tqdm.auto import tqdm

    with undoing() as undo:
        undo.add(taps.remove)
        taps.install()
        for i, ids in enumerate(tqdm(windows.to(model.device).split(1), unit="window", disable=not progress)):
            # The model's loss is a mean over the predicted tokens; J and h belong to the sum.
            seeds = sample_seeds(ids, seed)
            taps.begin_batch(TokenRows(f"window {i}", scale=ids[:, 1:].numel(), sample_seeds=seeds))
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            if not torch.isfinite(loss):
                raise FloatingPointError(f"Expected a finite loss but got {loss.item()} in window {i}.")
            loss.backward()
            taps.end_batch()
            yield (i + 1) * ids.numel()


def _pooled(moments: CalibrationMoments, name: str, layer: nn.Module) -> float:
    if moments.tokens(name) == 0:
        return math.nan
    return pooled_rho(moments.layer(name), linear_weight(layer).detach()).item()
