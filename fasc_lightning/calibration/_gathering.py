"""The statistics of one share of the layers: moments and scores, gathered by hooks while batches run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from fasc_lightning.batches import Backwards, TokenRows
from fasc_lightning.calibration._checks import warn_unannounced, warn_unreached
from fasc_lightning.dependence import DependenceScore, LayerScores, RhoRow, Sample
from fasc_lightning.distributed import is_distributed, others_present, union_everywhere
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import TargetedLayers, split_name
from fasc_lightning.options import CalibrationOptions
from fasc_lightning.statistics import CalibrationMoments, LayerSketches, offloaded

#: Without a gate, rho is only a diagnostic. A calibration then scores one batch in this many, on this many tokens, to
#: leave the time for moments.
SCORE_EVERY, SCORE_TOKENS = 8, 64

#: Number of batches after which a warning names the layers that no gradient has reached.
UNREACHED_AFTER = 8


class GradientLengths:
    """Passes pairs on to the scores, and notes the lengths of gradients where that is asked for.

    It knows no layer: a cycle of references would keep dense layers alive after the swap.

    Args:
        scores: The scores, which get all pairs.

    Attributes:
        wanted: Whether the lengths of the current batch are noted.
    """

    def __init__(self, scores: LayerScores) -> None:
        self.wanted = False
        self._scores = scores
        self._rows: dict[str, list[Tensor]] = {}

    def __call__(self, name: str, x: Tensor, h: Tensor, batch: TokenRows, lengths: list[int], *g: Tensor) -> None:
        """Take a layer's pairs, as taps pass them on."""
        self._scores(name, x, h, batch, lengths, *g)
        if self.wanted:
            wide = torch.promote_types(h.dtype, torch.float32)
            length = torch.linalg.vector_norm(h.detach(), dim=-1, dtype=wide) * batch.scale
            self._rows.setdefault(name, []).append(length.float())

    def take(self) -> dict[str, Tensor]:
        """Return the lengths of the last batch's gradients on the CPU, of layers that ran once, and forget them."""
        found = {name: rows[0].flatten() for name, rows in self._rows.items() if len(rows) == 1}
        self._rows.clear()
        if not found:
            return {}
        together = torch.cat(list(found.values())).cpu()  # one transfer
        parts = together.split([len(length) for length in found.values()])
        return dict(zip(found, parts, strict=True))


class Gathering:
    """Sums moments and scores of some layers over batches.

    No hook is on the layers before :meth:`install`.

    Args:
        layers: The share of the layers.
        empty: Returns empty moments of these layers.
        options: Options of the calibration.
        device: Device of the fit.

    Attributes:
        layers: The share of the layers.
        moments: Second moments of the layers' inputs and gradients.
        scores: Dependence scores of the layers.
        lengths: Lengths of the current batch's gradients.
        batches: Number of counted batches, on this process.
        rows: Tokens of the current batch; None between batches.
    """

    def __init__(
        self,
        layers: TargetedLayers,
        empty: Callable[[], CalibrationMoments],
        options: CalibrationOptions,
        device: torch.device,
    ) -> None:
        self.layers = layers
        self._empty = empty
        self._device = device
        self.moments = empty()
        tokens = SCORE_TOKENS if options.gate_threshold is None else options.monitor_tokens
        self.scores = LayerScores(layers.modules, tokens, options.rho_gradient, options.seed, device)
        self.lengths = GradientLengths(self.scores)
        self._taps = Taps(layers.modules, offloaded(self.moments, device), self.lengths)
        self.batches = 0
        self.rows: TokenRows | None = None

    @property
    def installed(self) -> bool:
        """Whether hooks are on the layers."""
        return self._taps.installed

    def install(self) -> None:
        """Put the hooks on."""
        self._taps.install()

    def remove(self) -> None:
        """Take the hooks off; safe at any time."""
        self._taps.remove()

    def check_alike(self) -> None:
        """Refuse processes whose statistics would not add up; all processes together.

        Raises:
            ValueError: On every process; the message names the difference.
        """
        self.moments.check_alike()

    def begin_batch(self, rows: TokenRows, backwards: Backwards) -> None:
        """Start to count a batch.

        Args:
            rows: Tokens of the batch that count, and the scale of its gradients.
            backwards: Backward passes that count.
        """
        self._taps.begin_batch(rows, backwards)
        self.rows = rows
        self.batches += 1

    def begin_backward(self) -> None:
        """Announce the backward pass that is about to run; a pass that reaches no tapped layer adds nothing."""
        self._taps.begin_backward()

    def end_backward(self) -> None:
        """End the backward pass."""
        self._taps.end_backward()

    def settle(self) -> None:
        """Wait until the statistics include the whole last backward pass.

        Raises:
            FloatingPointError: If the pass gave values that are not finite.
        """
        self._taps.settle()

    def end_batch(self) -> None:
        """End the current batch, if there is one."""
        self.rows = None
        if self.installed:
            self._taps.end_batch()
            if self.batches == 1 and self._taps.unannounced:
                warn_unannounced()
            if self.batches == UNREACHED_AFTER:
                warn_unreached(self._taps, self.batches)

    @property
    def uncalled(self) -> list[str]:
        """The layers that no batch has called: other code may read their weights, which no hook sees.

        Experts are not among them: a router may have sent them no token.
        """
        called = self._taps.called
        return [n for n in self.layers.modules if n not in called and not self.moments.tokens(n) and not split_name(n)]

    def sum_(self) -> None:
        """Sum the statistics over all processes; all processes together."""
        with others_present():
            self.moments.all_reduce_(device=self._device)
            self.scores.all_reduce_()
            self._taps.called = union_everywhere(self._taps.called)

    def share_first(self, trainer: pl.Trainer) -> None:
        """Give every process the moments of the first one; all processes together."""
        if not is_distributed(trainer):
            return
        if not trainer.is_global_zero:
            self._replace(self._empty())
        with others_present():
            self.moments.all_reduce_(device=self._device)

    def clear(self) -> None:
        """Discard all statistics; the count of batches stays."""
        self._replace(self._empty())
        self.scores.reset()

    def restore(
        self,
        moments: CalibrationMoments,
        scores: dict[str, DependenceScore],
        waiting: dict[str, list[Sample]],
        batches: int,
    ) -> None:
        """Continue from saved statistics.

        Args:
            moments: Moments of the same layers.
            scores: Dependence scores by layer.
            waiting: Samples that wait to be scored, by layer.
            batches: Number of counted batches.
        """
        moments.sum_outputs(self.moments.output_share)
        self._replace(moments)
        self.scores.restore(scores, waiting)
        self.batches = batches

    def _replace(self, moments: CalibrationMoments) -> None:
        self.moments = moments
        self._taps.moments = offloaded(moments, self._device)

    def table(self, step: int) -> dict[str, RhoRow]:
        """Return the row of rho of each layer, by layer.

        Args:
            step: The global step, for the rows.
        """
        return {row["layer"]: row for row in self.scores.rows(step)}

    def setting(self, sketches: dict[str, LayerSketches]) -> dict[str, Any]:
        """Return, in plain data, the properties that statistics have to share to add up.

        Args:
            sketches: Sketches that the options alone ask for. A checkpoint stores its own sketches, which rho may have
                sized, with its sums.
        """
        return {
            "layers": {name: list(shape) for name, shape in self.moments.shapes.items()},
            # Sketches get no entry of their own, because older checkpoints of exact moments have none.
            "statistics": sorted(self.moments.needs) + [f"{k}: {v}" for k, v in sorted(sketches.items())],
            "dtype": str(self.moments.dtype),
            "scored tokens": self.scores.tokens,
        }
