"""The pass behind ``recipes/study_rho.py``: windows of text in, the moments and scores of every layer out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fasc_lightning._undo import undoing
from fasc_lightning.dependence import DependenceScore
from fasc_lightning.history import RhoRow
from fasc_lightning.lowrank import linear_weight
from fasc_lightning.moments import CalibrationMoments
from fasc_lightning.monitor import score_row
from fasc_lightning.pooled import input_gradient, pooled_rho
from fasc_lightning.taps import Taps, layer_shapes
from fasc_lightning.tokens import TokenRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens of a minibatch of the score: several windows. Neighbouring tokens of one text depend on each other, so that
#: only pairs of tokens of different texts are evidence.
MINIBATCH = 2048


@dataclass(frozen=True)
class Observation:
    """The scores of one layer on the tokens so far.

    Attributes:
        row: The minibatch score, as monitoring has it.
        pooled: rho by the paper's Eq. 2 from the moments of all tokens; NaN where undefined.
    """

    row: RhoRow
    pooled: float


@dataclass(frozen=True)
class Statistics:
    """What one pass gathers.

    Attributes:
        moments: Of every layer, over all tokens.
        observed: By number of tokens, the observation of each layer; the last one is of all tokens.
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
    """Send every window through the model and back once, and gather moments and scores from all of its tokens.

    Args:
        model: A causal language model, in eval mode; nothing of it changes.
        layers: The layers to tap.
        windows: Token ids, shape (windows, window).
        sizes: Numbers of tokens at which to look at the scores besides; those beyond all tokens are passed over.
        seed: Of the scores' permutations and resamples.
        progress: Whether to show a bar.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    moments = CalibrationMoments(layer_shapes(layers), device=model.device, needs={"C"})
    scores = WindowScores(layers, max(1, MINIBATCH // windows.shape[1]), seed, model.device)
    wanted = sorted(size for size in sizes if size <= windows.numel())
    observed: dict[int, dict[str, Observation]] = {}
    for tokens in backward_windows(model, Taps(layers, moments, scores), windows, progress):
        if tokens == windows.numel() or (wanted and tokens >= wanted[0]):
            wanted = [size for size in wanted if size > tokens]
            rows = scores.rows()
            observed[tokens] = {
                name: Observation(rows[name], _pooled(moments, name, layer)) for name, layer in layers.items()
            }
    moments.drop_cross()  # only the pooled score needs it
    return Statistics(moments, observed)


def backward_windows(model: PreTrainedModel, taps: Taps, windows: Tensor, progress: bool = False) -> Iterator[int]:
    """Send windows through the model and back under the taps, one at a time; yields the number of tokens so far.

    Args:
        model: A causal language model; its weights get no gradients if they require none.
        taps: Installed here, and removed whatever happens.
        windows: Token ids, shape (windows, window).
        progress: Whether to show a bar.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    from tqdm.auto import tqdm

    with undoing() as undo:
        undo.add(taps.remove)
        taps.install()
        for i, ids in enumerate(tqdm(windows.to(model.device).split(1), unit="window", disable=not progress)):
            # The model's loss is a mean over the predicted tokens; J and h are those of their sum.
            taps.begin_batch(TokenRows(f"window {i}", scale=ids[:, 1:].numel()))
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            if not torch.isfinite(loss):
                raise FloatingPointError(f"Expected a finite loss but got {loss.item()} in window {i}.")
            loss.backward()
            taps.end_batch()
            yield (i + 1) * ids.numel()


class WindowScores:
    """Dependence scores that take several windows as one minibatch, though the model sees one at a time.

    Holding x and g of a few windows needs far less memory than running the model on as many at once. An instance is a
    ``pairs`` callback of :class:`~fasc_lightning.taps.Taps`.

    Args:
        layers: The tapped layers by name.
        windows: How many windows, all of one length, make a minibatch.
        seed: Of permutations and resamples.
        device: Where the scores live.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], windows: int, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self._layers = layers
        self._scores = {name: DependenceScore(seed).to(device) for name in layers}
        self._windows = windows
        self._waiting: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def __call__(self, name: str, x: Tensor, h: Tensor, batch: TokenRows, lengths: list[int]) -> None:
        """Take one window's x (tokens, n) and h (tokens, m); windows are of one length, so of one scale."""
        self._waiting[name].append((x, input_gradient(h, linear_weight(self._layers[name]).detach())))
        if len(self._waiting[name]) == self._windows:
            self._scores[name].update(*self._minibatch(name))
            self._waiting[name].clear()

    def rows(self) -> dict[str, RhoRow]:
        """Return the scores of all windows so far by layer.

        Those that wait enter as a smaller minibatch, but go on waiting: looking must not change what comes out.
        """
        rows = {}
        for name, score in self._scores.items():
            if self._waiting[name]:
                score = copy.deepcopy(score)
                score.update(*self._minibatch(name))
            rows[name] = score_row(score, name, 0)
        return rows

    def _minibatch(self, name: str) -> tuple[Tensor, Tensor]:
        x, g = zip(*self._waiting[name], strict=True)
        return torch.stack(x), torch.stack(g)


def _pooled(moments: CalibrationMoments, name: str, layer: nn.Module) -> float:
    if moments.tokens(name) == 0:
        return math.nan
    return pooled_rho(moments.layer(name), linear_weight(layer).detach()).item()
