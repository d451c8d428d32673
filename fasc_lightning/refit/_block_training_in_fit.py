"""The refinement inside a fit, with one result on every process."""

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
    """Refines the factors of a compressed module on kept batches, before it is trained end to end.

    Args:
        options: Options of the refinement.
    """

    def __init__(self, options: RefineOptions | None = None) -> None:
        self.options = options or RefineOptions()

    @staticmethod
    def check(pl_module: pl.LightningModule, layers: Iterable[str]) -> None:
        """Check that a module can be refined, before any work is done.

        Args:
            pl_module: The module of the fit, dense or compressed.
            layers: Names of the targeted layers.

        Raises:
            RefitError: If the module's blocks cannot be run one by one, or layers are shared.
            NoLossError: If the module optimises by hand.
            ValueError: If factors are int8.
            TypeError: If factors carry adapters.
        """
        check_automatic(pl_module, "Recover it with refine_steps=0.")
        check_refine(pl_module, layers)

    def run(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, dense: Mapping[str, nn.Module], kept: KeptBatches
    ) -> RefineReport | None:
        """Refine the compressed module in place. The first process does so with its batches, for all processes.

        Parameters stay the same objects, so that optimizers may hold them already.

        Args:
            trainer: Trainer of the fit.
            pl_module: The compressed module.
            dense: The dense layers by name.
            kept: The kept batches.

        Returns:
            A report; None if nothing is compressed, or on other processes.

        Raises:
            RefitError: If the module's blocks turn out not to run one by one.
            NoLossError: If its training step returns no loss.
            ValueError: If there are too few batches.
            RuntimeError: On every process but the first, if the first one failed.
        """
        if not dense:
            return None
        report = on_first_process(trainer, lambda: self._run(trainer, pl_module, dense, kept), "The refinement")
        share_layers(trainer, pl_module, dense)
        return report

    def _run(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, dense: Mapping[str, nn.Module], kept: KeptBatches
    ) -> RefineReport:
        device = trainer.strategy.root_device
        with brought([pl_module, *dense.values()], device):
            step = TrainingStep(trainer, kept, device)
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
        pl_module: The compressed module.
        dense: The dense layers by name, on the module's device.
        batches: Batches, on the module's device.
        options: Options of the refinement.
        step: The module's training step, which returns its loss.
        progress: Wrapper of the loop over blocks.
    """
    return refine(pl_module, dense, batches, **vars(options), loss=step, progress=progress)


def refine_figures(report: RefineReport) -> dict[str, Any]:
    """Return the figures of a refinement for a compression's report, in plain types."""
    return {
        "blocks": report.accepted,
        "steps": report.steps,
        "tokens": report.tokens,
        "loss": {"before": report.loss_before, "after": report.loss_after},
        "batches": {"fit": report.fit_batches, "held": report.held_batches},
        "reverted": report.reverted,
        "seconds": report.seconds,
    }
