"""A monitor of rho in training: observations of all layers at every n-th step, logged and written to files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from fasc_lightning.batches import Backwards, TokenRows
from fasc_lightning.dependence._history import RhoHistory, RhoRow
from fasc_lightning.dependence._layer_scores import LayerScores
from fasc_lightning.dependence._summary import floors, reasons
from fasc_lightning.distributed import is_distributed
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import Gradient


class RhoMonitor:
    """Observes rho at every n-th optimizer step of a fit: at steps 0, n, 2n, ...

    The layers have hooks during those steps only. An observation covers all batches of its optimizer step, on all
    processes. It does not change training and never stops it: a layer that cannot be observed has a reason in the
    history. With manual optimisation, one batch is one step and one observation.

    Args:
        every_n_steps: Optimizer steps from one observation to the next.
        tokens: Most tokens of each batch that enter an observation.
        threshold: rho above which a layer counts as high in the logged fraction.
        gradient: "input" or "output", as for :class:`LayerScores`.
        seed: Seed of the choice of tokens and of the permutations.
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
        self.rows: TokenRows | None = None  # the tokens of the observed batch
        self._taps: Taps | None = None
        self._scores: LayerScores | None = None
        self._failures: dict[str, str] = {}
        self._step = 0  # step of the open observation
        self._next = 0
        self._published: dict[str, Tensor] = {}
        self._stale: set[str] = set()
        self._explained = False
        self._floors_said = False

    def start(self, trainer: pl.Trainer, layers: dict[str, nn.Module]) -> None:
        """Begin a fit with its layers. Steps that the checkpoint's history holds are not observed again."""
        self._layers = layers
        first = _position(trainer)
        if self.history and self.history.steps[-1] >= first:
            first = self.history.steps[-1] + 1
        self._next = -(-first // self.every_n_steps) * self.every_n_steps
        if not trainer.loggers:
            rank_zero_info(
                "FascCallback: the Trainer has no logger; rho is in `callback.rho_history` "
                "(`callback.rho_history.to_csv(path)` writes it) and in `trainer.callback_metrics`."
            )

    def due(self, trainer: pl.Trainer) -> bool:
        """Tell whether the batch that is about to run belongs to an observation; none does without layers."""
        return bool(self._layers) and (self._taps is not None or _position(trainer) >= self._next)

    def begin_batch(self, trainer: pl.Trainer, rows: TokenRows, backwards: Backwards | None = None) -> None:
        """Begin to observe a batch.

        Args:
            trainer: Trainer of the fit.
            rows: The batch's tokens.
            backwards: Backward passes that count; None counts every one.
        """
        if self._scores is None:
            device = trainer.strategy.root_device
            self._scores = LayerScores(self._layers, self.tokens, self.gradient, self.seed, device)
        if self._taps is None:
            self._taps = Taps(self._layers, pairs=self._score, anchor=False, inputs=self.gradient == "input")
            self._taps.install()
            self._step = _position(trainer)
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

    def end_batch(self, trainer: pl.Trainer) -> None:
        """End a batch. The last batch of an optimizer step ends the observation."""
        self.rows = None
        if self._taps is None:
            return
        self._taps.end_batch()
        if not trainer.lightning_module.automatic_optimization or trainer.global_step != self._step:
            self.close(trainer)

    def close(self, trainer: pl.Trainer) -> None:
        """End the open observation and put it into the history, the loggers and the callback metrics."""
        if self._taps is None or self._scores is None:
            return
        scores = self._scores
        self.remove()
        self._guarded(scores.settle)
        if is_distributed(trainer):
            scores.all_reduce_()
        rows = scores.rows(self._step)
        scores.reset()  # frees the batch's tokens until the next observation
        for row in rows:
            row["reason"] = self._failures.get(row["layer"], row["reason"])
        self._failures.clear()
        self._explain_partly_undefined(rows)
        self._explain_floors(rows)
        self.history.extend(rows)
        self._next = (self._step // self.every_n_steps + 1) * self.every_n_steps
        self._log(trainer, rows)

    def _explain_partly_undefined(self, rows: list[RhoRow]) -> None:
        """Log once why values beside rho are undefined: the loggers leave them out silently."""
        partly = [row for row in rows if row["reason"] and row["rho"] == row["rho"]]
        if partly and not self._explained:
            self._explained = True
            rank_zero_info(
                f"FascCallback: {len(partly)} of {len(rows)} layers have rho at step {self._step}, but not its null, "
                f"debiased value or interval: {reasons(partly)}. HINT: use larger batches, or "
                "`accumulate_grad_batches`."
            )

    def _explain_floors(self, rows: list[RhoRow]) -> None:
        """Log once that chance alone takes rho past the threshold: the logged fraction above it then shows nothing."""
        said = "" if self._floors_said else floors([row for row in rows if row["rho"] == row["rho"]], self.threshold)
        if said:
            self._floors_said = True
            rank_zero_info(f"FascCallback: at step {self._step} {said}.")

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
                rank_zero_warn(f"FascCallback could not observe rho of {failed[0]!r}: {text}")
            self._failures.update(dict.fromkeys(failed, text))

    def publish(self, trainer: pl.Trainer) -> None:
        """Put the last values into the callback metrics again, since Lightning empties them between its loops."""
        metrics = trainer.callback_metrics
        for name in self._stale:
            metrics.pop(name, None)
        metrics.update(self._published)

    def remove(self) -> None:
        """Remove the hooks; safe at any time."""
        if self._taps is not None:
            self._taps.remove()
        self._taps, self.rows = None, None

    def forget(self) -> None:
        """Drop references to the module's layers; the history stays."""
        self.remove()
        self._scores = None
        self._layers, self._published, self._stale = {}, {}, set()

    def _log(self, trainer: pl.Trainer, rows: list[RhoRow]) -> None:
        for logger in trainer.loggers:
            figures = rho_metrics(rows, self.threshold, logger.group_separator)
            logger.log_metrics(figures, step=_logged_step(trainer))
        now = {name: torch.tensor(value) for name, value in rho_metrics(rows, self.threshold).items()}
        # The old value of a metric that is undefined now would mislead callbacks that read it.
        self._stale = (self._stale | set(self._published)) - set(now)
        self._published = now
        self.publish(trainer)


def rho_metrics(rows: list[RhoRow], threshold: float, separator: str = "/") -> dict[str, float]:
    """Return the metrics of an observation by name; undefined values are left out.

    Args:
        rows: One row for each layer.
        threshold: rho above which a layer counts in the fraction of layers.
        separator: Separator between the parts of a name.
    """
    figures: dict[str, float] = {}
    columns: tuple[tuple[str, Any], ...] = (("rho", "rho"), ("rho_null", "null"), ("rho_debiased", "debiased"))
    for name, column in columns:
        defined = {row["layer"]: row[column] for row in rows if row[column] == row[column]}  # type: ignore[literal-required]
        figures.update({f"{name}{separator}{layer}": value for layer, value in defined.items()})
        if defined and column != "null":
            figures[f"fasc{separator}{name}_mean"] = sum(defined.values()) / len(defined)
    # Beside the fraction of layers above the threshold the one that chance alone would take there.
    for name, column in (("rho_above_threshold", "rho"), ("rho_floor_above_threshold", "iid_floor")):
        values = [row[column] for row in rows if row[column] == row[column]]  # type: ignore[literal-required]
        if values:
            figures[f"fasc{separator}{name}"] = sum(value > threshold for value in values) / len(values)
    return figures


def write_history(
    trainer: pl.Trainer, history: RhoHistory, threshold: float, observations: int, figures: bool = True
) -> None:
    """Write a history into the folder of the Trainer's loggers: CSV, and figures if matplotlib is installed.

    Loggers that take figures get the figures, too.

    Args:
        trainer: Trainer with the loggers; without a logger nothing is written.
        history: Observations.
        threshold: Threshold of the marks of emergence.
        observations: Observations in a row that emergence needs.
        figures: Whether to draw figures.
    """
    if not (history and trainer.loggers and trainer.is_global_zero):
        return
    folder = _folder(trainer)
    if folder is not None:
        history.to_csv(folder / "rho_history.csv")
    if not figures or importlib.util.find_spec("matplotlib") is None:
        return
    from fasc_lightning.dependence._figures import log_figure, rho_heatmap, rho_profile, save_figure

    drawn = {
        "rho_heatmap": rho_heatmap(history, threshold=threshold, observations=observations),
        "rho_profile": rho_profile(history.at()),
    }
    for name, figure in drawn.items():
        log_figure(trainer.loggers, name, figure, _logged_step(trainer))
        if folder is not None:
            save_figure(figure, folder / f"{name}.png")


def _folder(trainer: pl.Trainer) -> Path | None:
    """Return the run's own folder of the first logger that has one."""
    for logger in trainer.loggers:
        if (folder := getattr(logger, "log_dir", None)) is not None:
            return Path(folder)
        if logger.save_dir is not None:
            return Path(logger.save_dir, str(logger.name), str(logger.version))
    return None


def _position(trainer: pl.Trainer) -> int:
    """Return the optimizer steps taken; with manual optimisation the batches, since one may take many steps or none."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return max(0, trainer.fit_loop.total_batch_idx)


def _logged_step(trainer: pl.Trainer) -> int:
    """Return the step under which Lightning logs its own metrics of this batch."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
