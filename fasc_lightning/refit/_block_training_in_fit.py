"""The refinement inside a fit: the batches it needs, and one result on every process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from torch import nn

from fasc_lightning._utils import Progress, layer_progress
from fasc_lightning.batches import KeptBatches, TrainingStep, brought, check_automatic, on_first_process
from fasc_lightning.distributed import share_layers
from fasc_lightning.options import RefineOptions
from fasc_lightning.refit._block_training import check_refine, refine
from fasc_lightning.refit._block_training_report import RefineReport


class RefinePhase:
    """Refines the factors of a compressed module on batches that were kept, before it is trained end to end.

    Args:
        options: How.
    """

    def __init__(self, options: RefineOptions | None = None) -> None:
        self.options = options or RefineOptions()

    @staticmethod
    def check(pl_module: pl.LightningModule, layers: Iterable[str]) -> None:
        """Refuse modules that cannot be refined, before any work is done.

        Args:
            pl_module: The module of the fit, dense or compressed.
            layers: Names of the targeted layers in it.

        Raises:
            RefitError: If its blocks cannot be run one by one, or layers are shared.
            NoLossError: If it optimises by hand.
            ValueError: If factors are int8.
            TypeError: If there are adapters on factors.
        """
        check_automatic(pl_module, "Recover it with refine_steps=0.")
        check_refine(pl_module, layers)

    def run(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, dense: Mapping[str, nn.Module], replay: KeptBatches
    ) -> RefineReport | None:
        """Refine the compressed module in place; on several processes with the first one's batches, for all.

        Parameters stay the same objects, so that optimizers may hold them already.

        Args:
            trainer: Of the fit.
            pl_module: The module, compressed.
            dense: The layers that were replaced, by name.
            replay: The batches.

        Returns:
            What was done; None if nothing is compressed, or on other processes.

        Raises:
            RefitError: If the module turns out not to allow it.
            NoLossError: If its training step returns no loss.
            ValueError: If there are too few batches.
            RuntimeError: On every process but the first, if the first one failed.
        """
        if not dense:
            return None
        report = on_first_process(trainer, lambda: self._run(trainer, pl_module, dense, replay), "The refinement")
        share_layers(trainer, pl_module, dense)
        return report

    def _run(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, dense: Mapping[str, nn.Module], replay: KeptBatches
    ) -> RefineReport:
        device = trainer.strategy.root_device
        with brought([pl_module, *dense.values()], device):
            step = TrainingStep(trainer, replay, device)
            return refine_module(pl_module, dense, step.batches, self.options, step, layer_progress(trainer))


def refine_module(
    pl_module: pl.LightningModule,
    dense: Mapping[str, nn.Module],
    batches: Iterable[Any],
    options: RefineOptions,
    step: TrainingStep,
    progress: Progress | None = None,
) -> RefineReport:
    """Refine a module in place, judged by its own loss; see ``refine``.

    Args:
        pl_module: The module, compressed.
        dense: The layers that were replaced, by name, on its device.
        batches: On its device.
        options: How.
        step: The module's, which gives its loss.
        progress: Wraps the loop over blocks.
    """
    return refine(pl_module, dense, batches, **vars(options), loss=step, progress=progress)


def refine_figures(report: RefineReport) -> dict[str, Any]:
    """Return what a report says of a refinement, in plain types."""
    return {
        "blocks": report.accepted,
        "steps": report.steps,
        "tokens": report.tokens,
        "loss": {"before": report.loss_before, "after": report.loss_after},
        "batches": {"fit": report.fit_batches, "held": report.held_batches},
        "reverted": report.reverted,
        "seconds": report.seconds,
    }
