"""A monitor of rho in training: observations of all layers at every n-th step, whatever the trainer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from fasc_lightning.batches import Backwards, TokenRows
from fasc_lightning.dependence._history import RhoHistory, RhoRow
from fasc_lightning.dependence._layer_scores import LayerScores
from fasc_lightning.dependence._summary import floors, reasons
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import Gradient


class RhoMonitor:
    """Observes rho at every n-th optimizer step of a fit: at steps 0, n, 2n, ...

    The layers have hooks during those steps only. An observation covers all batches of its optimizer step, on all
    processes. It does not change training and never stops it: a layer that cannot be observed has a reason in the
    history.

    Args:
        every_n_steps: Optimizer steps from one observation to the next.
        tokens: Most tokens of each batch that enter an observation.
        threshold: rho above which a layer counts as high in the logged fraction.
        gradient: "input" or "output", as for :class:`LayerScores`.
        seed: Seed of the choice of tokens and of the permutations.

    Attributes:
        history: The observations.
        rows: The tokens of the observed batch; None between batches.
        step: Step of the open observation, or of the last one.
    """

    def __init__(
        self, every_n_steps: int, tokens: int, threshold: float, gradient: Gradient = "input", seed: int = 0
    ) -> None:
        self.every_n_steps = every_n_steps
        self.tokens = tokens
        self.threshold = threshold
        self.gradient: Gradient = gradient
        self.seed = seed
        self.history = RhoHistory()
        self._layers: dict[str, nn.Module] = {}
        self.rows: TokenRows | None = None
        self._taps: Taps | None = None
        self._scores: LayerScores | None = None
        self._failures: dict[str, str] = {}
        self.step = 0
        self._next = 0
        self._explained = False
        self._floors_said = False

    @property
    def observing(self) -> bool:
        """Whether an observation is open."""
        return self._taps is not None

    def start(self, layers: dict[str, nn.Module], first: int) -> None:
        """Begin a fit.

        Args:
            layers: The layers by name.
            first: Number of steps taken before. Steps that the history holds are not observed again.
        """
        self._layers = layers
        if self.history and self.history.steps[-1] >= first:
            first = self.history.steps[-1] + 1
        self._next = -(-first // self.every_n_steps) * self.every_n_steps

    def due(self, step: int) -> bool:
        """Return whether a batch of a step belongs to an observation; none does without layers."""
        return bool(self._layers) and (self.observing or step >= self._next)

    def begin_batch(self, step: int, device: torch.device, rows: TokenRows, backwards: Backwards | None = None) -> None:
        """Begin to observe a batch.

        Args:
            step: Number of steps taken before.
            device: Device of the fit.
            rows: The batch's tokens.
            backwards: Backward passes that count; None counts every one.
        """
        if self._scores is None:
            self._scores = LayerScores(self._layers, self.tokens, self.gradient, self.seed, device)
        if self._taps is None:
            self._taps = Taps(self._layers, pairs=self._score, anchor=False, inputs=self.gradient == "input")
            self._taps.install()
            self.step = step
        self._taps.begin_batch(rows, backwards)
        self.rows = rows

    def begin_backward(self) -> None:
        """Announce the backward pass that is about to run, if its batch is observed."""
        if self._taps is not None:
            self._taps.begin_backward()

    def end_backward(self) -> None:
        """End the backward pass."""
        if self._taps is not None:
            self._taps.end_backward()

    def end_batch(self) -> None:
        """End a batch."""
        self.rows = None
        if self._taps is not None:
            self._taps.end_batch()

    def close(self, *, distributed: bool = False) -> list[RhoRow]:
        """End the open observation and put it into the history.

        Args:
            distributed: Whether other processes end theirs at the same time, and all are one observation.

        Returns:
            The observation, one row for each layer; empty if none is open.
        """
        if self._taps is None or self._scores is None:
            return []
        scores = self._scores
        self.remove()
        self._guarded(scores.settle)
        if distributed:
            scores.all_reduce_()
        rows = scores.rows(self.step)
        scores.reset()  # frees the batch's tokens until the next observation
        for row in rows:
            row["reason"] = self._failures.get(row["layer"], row["reason"])
        self._failures.clear()
        self._explain_partly_undefined(rows)
        self._explain_floors(rows)
        self.history.extend(rows)
        self._next = (self.step // self.every_n_steps + 1) * self.every_n_steps
        return rows

    def _explain_partly_undefined(self, rows: list[RhoRow]) -> None:
        """Log once why values beside rho are undefined: the loggers leave them out silently."""
        partly = [row for row in rows if row["reason"] and row["rho"] == row["rho"]]
        if partly and not self._explained:
            self._explained = True
            rank_zero_info(
                f"{len(partly)} of {len(rows)} layers have rho at step {self.step}, but not its null, "
                f"debiased value or interval: {reasons(partly)}. HINT: use larger batches, or accumulate the gradients "
                "of several (`accumulate_grad_batches`; `gradient_accumulation_steps` in transformers)."
            )

    def _explain_floors(self, rows: list[RhoRow]) -> None:
        """Log once that chance alone takes rho past the threshold: the logged fraction above it then shows nothing."""
        said = "" if self._floors_said else floors([row for row in rows if row["rho"] == row["rho"]], self.threshold)
        if said:
            self._floors_said = True
            rank_zero_info(f"At step {self.step} {said}.")

    def _score(
        self, name: str, x: Tensor, h: Tensor, batch: TokenRows, lengths: list[int], g: Tensor | None = None
    ) -> None:
        """Feed a layer's score."""
        assert self._scores is not None
        self._guarded(partial(self._scores, name, x, h, batch, lengths, g), name)

    def _guarded(self, act: Callable[[], None], *names: str) -> None:
        """Do something with the scores. A failure becomes a reason, since training matters more than a score.

        Args:
            act: What to do.
            *names: Layers that fail with it, beside those whose held tokens are lost.
        """
        assert self._scores is not None
        held = self._scores.held
        try:
            act()
        except Exception as error:
            failed = [*names, *sorted(held - self._scores.held)]
            text = f"{type(error).__name__}: {error}"
            if not self._failures:
                rank_zero_warn(f"Could not observe rho of {failed[0]!r}: {text}")
            self._failures.update(dict.fromkeys(failed, text))

    def remove(self) -> None:
        """Remove the hooks; safe at any time."""
        if self._taps is not None:
            self._taps.remove()
        self._taps, self.rows = None, None

    def forget(self) -> None:
        """Drop references to the module's layers; the history stays."""
        self.remove()
        self._scores, self._layers = None, {}


def rho_metrics(rows: list[RhoRow], threshold: float, separator: str = "/", *, layers: bool = True) -> dict[str, float]:
    """Return the metrics of an observation by name; undefined values are left out.

    Args:
        rows: One row for each layer.
        threshold: rho above which a layer counts in the fraction of layers.
        separator: Separator between the parts of a name.
        layers: Whether the figures of each layer are among them, or only means.
    """
    figures: dict[str, float] = {}
    columns: tuple[tuple[str, Any], ...] = (("rho", "rho"), ("rho_null", "null"), ("rho_debiased", "debiased"))
    for name, column in columns:
        defined = {row["layer"]: row[column] for row in rows if row[column] == row[column]}  # type: ignore[literal-required]
        if layers:
            figures.update({f"{name}{separator}{layer}": value for layer, value in defined.items()})
        if defined and column != "null":
            figures[f"fasc{separator}{name}_mean"] = sum(defined.values()) / len(defined)
    # Beside the fraction of layers above the threshold the one that chance alone would take there.
    for name, column in (("rho_above_threshold", "rho"), ("rho_floor_above_threshold", "iid_floor")):
        values = [row[column] for row in rows if row[column] == row[column]]  # type: ignore[literal-required]
        if values:
            figures[f"fasc{separator}{name}"] = sum(value > threshold for value in values) / len(values)
    return figures
