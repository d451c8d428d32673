"""The statistics of one share of the layers: moments and scores, fed by hooks while batches run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fasc_lightning.batches import Backwards, TokenRows
from fasc_lightning.calibration._checks import warn_unannounced, warn_unreached
from fasc_lightning.dependence import DependenceScore, LayerScores, RhoRow, Sample
from fasc_lightning.distributed import others_present
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import TargetedLayers
from fasc_lightning.options import CalibrationOptions
from fasc_lightning.statistics import CalibrationMoments, LayerSketches, offloaded

#: Where rho decides nothing, a calibration scores every so many batches, on so many tokens: it is a diagnostic then,
#: and moments are what the time is for.
SCORE_EVERY, SCORE_TOKENS = 8, 64

#: After so many batches layers that no gradient has reached are named.
UNREACHED_AFTER = 8


class Gathering:
    """Sums moments and scores of some layers over batches.

    No hook is on the layers before :meth:`install`.

    Args:
        layers: The share.
        empty: Returns moments of these layers, of no batch.
        options: Of the calibration.
        device: Of the fit.

    Attributes:
        layers: The share.
        moments: Second moments of the layers' inputs and gradients.
        scores: Dependence scores of the layers.
        batches: How many batches were counted, on this process.
        rows: The batch that runs; None between batches.
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
        self._taps = Taps(layers.modules, offloaded(self.moments, device), self.scores)
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
            ValueError: On every process, with what differs.
        """
        self.moments.check_alike()

    def begin_batch(self, rows: TokenRows, backwards: Backwards) -> None:
        """Start to count a batch.

        Args:
            rows: The batch's tokens that count, and the scale of its gradients.
            backwards: The backward passes that count.
        """
        self._taps.begin_batch(rows, backwards)
        self.rows = rows
        self.batches += 1

    def begin_backward(self) -> None:
        """Announce the backward pass that is about to run; one that reaches no tapped layer brings nothing."""
        self._taps.begin_backward()

    def end_backward(self) -> None:
        """End the backward pass."""
        self._taps.end_backward()

    def settle(self) -> None:
        """Wait until the statistics hold all that a backward pass has brought.

        Raises:
            FloatingPointError: If some of it is not finite.
        """
        self._taps.settle()

    def end_batch(self) -> None:
        """End a batch, if there is one."""
        self.rows = None
        if self.installed:
            self._taps.end_batch()
            if self.batches == 1 and self._taps.unannounced:
                warn_unannounced()
            if self.batches == UNREACHED_AFTER:
                warn_unreached(self._taps, self.batches)

    def sum_(self) -> None:
        """Sum the statistics over all processes; all processes together."""
        with others_present():
            self.moments.all_reduce_(device=self._device)
            self.scores.all_reduce_()

    def clear(self) -> None:
        """Forget all that was gathered; the count of batches stays."""
        self._replace(self._empty())
        self.scores.reset()

    def restore(
        self,
        moments: CalibrationMoments,
        scores: dict[str, DependenceScore],
        waiting: dict[str, list[Sample]],
        batches: int,
    ) -> None:
        """Go on from statistics that were saved.

        Args:
            moments: Of the same layers.
            scores: By layer.
            waiting: Samples that wait to be scored, by layer.
            batches: How many batches were counted.
        """
        self._replace(moments)
        self.scores.scores, self.scores.waiting = scores, waiting
        self.batches = batches

    def _replace(self, moments: CalibrationMoments) -> None:
        self.moments = moments
        self._taps.moments = offloaded(moments, self._device)

    def table(self, step: int) -> dict[str, RhoRow]:
        """Return what is known of each layer's rho, by layer.

        Args:
            step: The global step, for the table.
        """
        return {row["layer"]: row for row in self.scores.rows(step)}

    def setting(self, sketches: dict[str, LayerSketches]) -> dict[str, Any]:
        """Return, in plain data, what has to be the same for these statistics to add up with others.

        Args:
            sketches: As the options alone ask for them: those of a checkpoint, sized by what rho was then, come with
                its sums.
        """
        return {
            "layers": {name: list(shape) for name, shape in self.moments.shapes.items()},
            # Sketches have no entry of their own: checkpoints of exact moments know no such entry.
            "statistics": sorted(self.moments.needs) + [f"{k}: {v}" for k, v in sorted(sketches.items())],
            "dtype": str(self.moments.dtype),
            "scored tokens": self.scores.tokens,
        }
