"""The calibration of one fit, from the first batch to the compressed module."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from fasc_lightning._utils import Undo
from fasc_lightning.batches import KeptBatches, LossScales, backwards_of, batch_label, calibration_rows, loops_before
from fasc_lightning.calibration._checks import check_loss
from fasc_lightning.calibration._finish import Finish
from fasc_lightning.calibration._frozen_fit import FrozenFit
from fasc_lightning.calibration._gathering import SCORE_EVERY
from fasc_lightning.calibration._passes import Passes
from fasc_lightning.calibration._saved_state import Statistics
from fasc_lightning.calibration._shares import check_epochs_left
from fasc_lightning.compression import CompressionReport
from fasc_lightning.dependence import RhoHistory
from fasc_lightning.distributed import UnevenInputs, is_distributed, is_sharded, lacks_room
from fasc_lightning.layers import TargetedLayers
from fasc_lightning.options import CalibrationOptions, CompressionOptions, RefineOptions, holds_moments, named
from fasc_lightning.statistics import LayerSketches

#: Entry of :meth:`CalibrationRun.setting`.
REPLAYED = "replay of batches (refit, refinement, measured allocation)"


class CalibrationRun:
    """Gathers statistics from each batch of a calibration, keeps batches, and freezes the module if asked to.

    The module is unchanged before the first batch.

    Args:
        trainer: Trainer of the fit; its device holds the statistics.
        pl_module: The module of the fit.
        layers: The targeted layers in it.
        options: Options of the calibration.
        refine: Options of the refinement at the end; None for no refinement.
        history: Observed rho.

    Attributes:
        origin: Lightning's loops and schedulers before the first batch, from which the calibration can start again.
        trains: Whether the weights keep training.
        scores_decide: Whether a gate chooses by the dependence scores.

    Raises:
        MemoryError: If the moments do not fit; or if weights are sharded, the whole module does not fit into each
            process, and a required refit, a refinement or a recovery needs it.
        MisconfigurationException: If the fit has fewer epochs than passes, or if it averages weights at its end that
            the calibration reads before.
        ValueError: If a pattern of ``gate_exclude`` matches nothing, or if there are more passes than layers.
        RefitError: If a refit or a refinement is required and the module does not allow it.
        NoLossError: If a refit or a refinement is required and the module optimises by hand.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        layers: TargetedLayers,
        options: CalibrationOptions,
        refine: RefineOptions | None,
        history: RhoHistory,
    ) -> None:
        self._passes = Passes(trainer, layers, options, history)
        if reason := lacks_room(trainer, pl_module, self._passes.needed):
            options = options.without_replay(refine is not None, reason)
        self._passes.begin()
        held = holds_moments(self._passes.count, options.sketch)
        self._finish = Finish(pl_module, layers, options, refine, holds_moments=held)
        self._options = options
        self._layers = layers
        self._uneven_inputs = UnevenInputs(_needs_all(options, pl_module))
        self._frozen = None if options.update_weights else FrozenFit(trainer, pl_module)
        self._is_summed = False  # whether the statistics have been summed over all processes
        self._seconds = 0.0
        self._began: float | None = None
        self.origin: dict[str, Any] = {}
        self.trains = options.update_weights
        self.scores_decide = options.gate_threshold is not None

    @property
    def seconds(self) -> float:
        """Seconds that the batches took, including batches before an interruption."""
        return self._seconds if self._began is None else self._seconds + time.perf_counter() - self._began

    @property
    def begun(self) -> bool:
        """Whether there has been a batch."""
        return self._passes.begun

    @property
    def batches(self) -> int:
        """Number of counted batches in this pass, on this process."""
        return self._passes.gathering.batches

    @property
    def passes(self) -> int:
        """Number of passes over the data."""
        return self._passes.count

    @property
    def sketches(self) -> dict[str, LayerSketches]:
        """Sketches that the options alone ask for, by layer."""
        return self._passes.sketches

    @property
    def refits(self) -> bool:
        """Whether a refit follows."""
        return self._finish.refits

    @property
    def running(self) -> bool:
        """Whether hooks are on the layers."""
        return self._passes.gathering.installed

    @property
    def frozen(self) -> bool:
        """Whether the module is frozen."""
        return self._frozen is not None and self._frozen.active

    # Batches.

    def start(self, trainer: pl.Trainer, *, is_whole_fit: bool) -> None:
        """Refuse, before the first batch, a fit that is too short and processes whose statistics would not add up.

        Args:
            trainer: Trainer of the fit.
            is_whole_fit: Whether the fit is nothing but calibration.

        Raises:
            MisconfigurationException: If fewer epochs are left than passes, or if the processes' numbers of batches
                differ and must not.
            ValueError: On every process, if statistics differ; the message names the difference.
        """
        check_epochs_left(trainer, self._passes.count)
        if is_distributed(trainer):
            self._passes.gathering.check_alike()
        self._uneven_inputs.start(trainer, is_whole_fit)

    def begin_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Start to count a batch; the first one installs the hooks and freezes the module if asked to."""
        gathering, options = self._passes.gathering, self._options
        if not self.running:
            self._began = time.perf_counter()
            gathering.install()
            if self._frozen is not None:
                self._frozen.enter()
        if self._frozen is not None:
            self._frozen.hold()
        rows = calibration_rows(
            trainer,
            pl_module,
            batch,
            token_mask=options.token_mask,
            loss_terms=options.loss_terms,
            fraction=options.token_fraction,
            seed=options.seed,
            steps=self._frozen is None,
            scored=options.gate_threshold is not None or gathering.batches % SCORE_EVERY == 0,
        )
        if not self.begun:
            self.origin = loops_before(trainer)
            self._passes.size_sketches()
        self._passes.gathering.begin_batch(rows, backwards_of(pl_module))
        self._finish.keep(trainer, batch, is_first_pass=self._passes.is_first)
        gathering.lengths.wanted = self._finish.weighs

    def begin_backward(self, trainer: pl.Trainer, loss: Tensor, scales: LossScales) -> None:
        """Count the backward pass that is about to run.

        Args:
            trainer: Trainer of the fit.
            loss: Loss of the batch, as the backward pass gets it.
            scales: Scales of gradients, read from losses.

        Raises:
            RuntimeError: If the loss is detached.
            FloatingPointError: If the loss is not finite.
        """
        label = batch_label(trainer)
        if not scales.take(loss, self._passes.gathering.rows, label=label):
            self._finish.leave_out()
        elif loss.requires_grad or not self.frozen:
            check_loss(loss, len(self._layers.modules), label)
        if self._frozen is not None:
            self._frozen.lend_gradient(loss)
        self._passes.gathering.begin_backward()

    def end_backward(self) -> None:
        """End the backward pass."""
        self._passes.gathering.end_backward()
        if self._frozen is not None:
            self._frozen.take_gradient_back()

    def settle_rows(self) -> None:
        """Wait until the statistics include the whole last backward pass.

        Raises:
            FloatingPointError: If the pass gave values that are not finite.
        """
        self._passes.gathering.settle()

    def end_batch(self, trainer: pl.Trainer, outputs: Any) -> None:
        """End the current batch, if there is one, together with the other processes.

        Args:
            trainer: Trainer of the fit.
            outputs: Outputs of the training step; empty if the step skips its batch.
        """
        self._end_batch()
        if not outputs:
            self._finish.leave_out()
        if self.running:
            self._uneven_inputs.end_batch(trainer)

    def settle(self, trainer: pl.Trainer) -> None:
        """End a batch that has run, for a checkpoint that is saved before :meth:`end_batch` is called."""
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if progress.processed == progress.ready:
            self._end_batch()

    def _end_batch(self) -> None:
        self._passes.gathering.end_batch()
        if lengths := self._passes.gathering.lengths.take():
            self._finish.note(lengths)

    def end_epoch(self, trainer: pl.Trainer) -> None:
        """End a pass that is not the last: factorise its layers and free their moments."""
        if self.batches and not self._passes.is_last:
            self._stop_clock()
            self._passes.end_pass(trainer)

    def pause(self) -> None:
        """Remove the hooks and unfreeze the module until the next counted batch."""
        self._stop_clock()
        self.release()

    def release(self) -> None:
        """Remove the hooks and unfreeze the module; safe at any time."""
        self._passes.gathering.remove()
        if self._frozen is not None:
            self._frozen.exit()

    def _stop_clock(self) -> None:
        self._seconds, self._began = self.seconds, None

    # The end.

    def end(self, trainer: pl.Trainer) -> None:
        """Sum the statistics over all processes after the last batch, unless they have been summed."""
        if not self._is_summed:
            self._is_summed = True
            self._stop_clock()
            self._passes.sum_(trainer)

    def compress(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, how: CompressionOptions, failed: Undo
    ) -> tuple[CompressionReport, dict[str, nn.Module]]:
        """Swap the module's layers for low-rank ones, in place; see :meth:`Finish.replace`."""
        return self._finish.replace(trainer, pl_module, self._passes, how, seconds=self.seconds, failed=failed)

    # Checkpoints.

    @property
    def obstacle(self) -> str:
        """Why a checkpoint cannot hold the statistics; "" if it can."""
        if self._passes.count > 1:
            return "a calibration of several passes is not kept, and starts again from the first"
        return "the fit failed while it compressed the model" if self._passes.spent else ""

    def setting(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return, in plain data, the properties that statistics have to share to add up."""
        options = self._options
        return {
            **self._passes.gathering.setting(self._passes.sketches),
            "gate on every batch": options.gate_threshold is not None,
            "rho_gradient": options.rho_gradient,
            "seed": options.seed,
            "token_fraction": options.token_fraction,
            "update_weights": options.update_weights,
            "loss_terms": named(options.loss_terms),
            "token_mask": named(options.token_mask),
            REPLAYED: self._finish.replays,
            "number of processes": trainer.world_size,
        }

    def statistics(self) -> Statistics:
        """Return the statistics so far, without a copy: the next batch changes them."""
        gathering = self._passes.gathering
        scores = gathering.scores
        return Statistics(
            gathering.moments, scores.scores, scores.waiting, self._finish.kept, gathering.batches, self.seconds
        )

    def merge(self, trainer: pl.Trainer) -> None:
        """Sum the statistics of all processes on the first process, and empty them on the others.

        A resumed fit starts in the same way. Both then add sums in the same order and end with the same factors, to the
        last bit.
        """
        if not is_distributed(trainer) or self._is_summed:
            return
        gathering = self._passes.gathering
        gathering.settle()
        gathering.sum_()
        if not trainer.is_global_zero:
            gathering.clear()

    def restore(self, found: Statistics) -> None:
        """Continue from the statistics of an interrupted calibration.

        Args:
            found: On the first process, the sums over all processes; on the others, empty statistics with the same
                sketches.
        """
        self._passes.gathering.restore(found.moments, found.scores, found.waiting, found.batches)
        self._finish.restore(found.kept)
        self._seconds = found.seconds

    def resume(self, origin: dict[str, Any]) -> None:
        """Continue after every process has restored its statistics.

        Args:
            origin: Lightning's loops and schedulers before the first batch of the calibration.
        """
        self.origin = origin

    def reset(self) -> None:
        """Undo a :meth:`restore` that failed on another process: the statistics are empty again."""
        self._passes.begin_share()
        self._finish.restore(KeptBatches())
        self._seconds = 0.0


def _needs_all(options: CalibrationOptions, pl_module: pl.LightningModule) -> str:
    """Return why a batch needs all processes; "" if each works alone."""
    if is_sharded(pl_module):
        return "every layer's weights are gathered from all of them"
    return "every step averages the gradients of all of them" if options.update_weights else ""
