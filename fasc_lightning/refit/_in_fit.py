"""The refit inside a fit: checks of the module, kept batches, and one result on every process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from fasc_lightning._utils import layer_progress
from fasc_lightning.batches import KeptBatches, NoLossError, TrainingStep, brought, check_automatic, on_first_process
from fasc_lightning.distributed import is_split, share_layers
from fasc_lightning.options import Refit
from fasc_lightning.refit._anchored import MIN_BATCHES, RefitOptions, refit
from fasc_lightning.refit._block_stack import RefitError
from fasc_lightning.refit._checks import check_refit
from fasc_lightning.refit._reports import RefitReport
from fasc_lightning.statistics import CalibrationMoments


def _say_unfit(error: RefitError | NoLossError) -> None:
    """Log why refit="auto" does no refit."""
    reason = getattr(error, "reason", "") or str(error)
    rank_zero_info(f"FascCallback: not refitted (harmless): {reason}")


class RefitPhase:
    """Refits the factors of a compressed module to the calibration's batches.

    Args:
        insisted: Whether the user asked for the refit: too few batches are then a warning, an unfit module an error.
        options: Options of the refit.
    """

    def __init__(self, insisted: bool = False, options: RefitOptions | None = None) -> None:
        self.insisted = insisted
        self.options = options or RefitOptions()

    @staticmethod
    def of(wanted: Refit, pl_module: pl.LightningModule, layers: Iterable[str]) -> RefitPhase | None:
        """Return the phase, or None for no refit, before any work is done.

        Args:
            wanted: The option ``refit``.
            pl_module: The module of the fit.
            layers: Names of the targeted layers.

        Raises:
            RefitError: If ``wanted`` is True and the module's blocks cannot be run one by one.
            NoLossError: If ``wanted`` is True and the module optimises by hand.
        """
        if wanted is False:
            return None
        try:
            check_automatic(pl_module, "Compress with refit=False.")
            if is_split(pl_module):
                raise RefitError(
                    "Expected a model on one device, whose blocks can be run alone, but it is split.",
                    "the model is split over devices.",
                )
            check_refit(pl_module, layers)
        except (RefitError, NoLossError) as error:
            if wanted is True:
                raise
            _say_unfit(error)
            return None
        return RefitPhase(insisted=wanted is True)

    def run(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        dense: Mapping[str, nn.Module],
        moments: CalibrationMoments,
        kept: KeptBatches,
    ) -> RefitReport | None:
        """Refit the compressed module in place. The first process does so with its batches, for all processes.

        Args:
            trainer: Trainer of the fit.
            pl_module: The compressed module.
            dense: The dense layers by name.
            moments: The calibration's moments, whose A and G are the metric.
            kept: The calibration's batches.

        Returns:
            A report; None if nothing is compressed, if there are too few batches (which is logged), or on other
            processes.

        Raises:
            RefitError: If the refit was insisted on and the module's blocks turn out not to run one by one.
            NoLossError: If the refit was insisted on and the training step returns no loss.
            RuntimeError: On every process but the first, if the first one failed.
        """
        report = on_first_process(trainer, lambda: self._run(trainer, pl_module, dense, moments, kept), "The refit")
        share_layers(trainer, pl_module, dense)
        return report

    def _run(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        dense: Mapping[str, nn.Module],
        moments: CalibrationMoments,
        kept: KeptBatches,
    ) -> RefitReport | None:
        if not dense:
            return None
        if len(kept.batches) < MIN_BATCHES:
            few = (
                f"a refit takes at least {MIN_BATCHES} calibration batches, some of which are held out, and there were "
                f"{len(kept.batches)}."
            )
            if self.insisted:
                rank_zero_warn(f"The layers are not refitted: {few} HINT: use smaller batches, or refit=False.")
            else:
                rank_zero_info(f"FascCallback: not refitted (harmless): {few}")
            return None
        device = trainer.strategy.root_device
        try:
            with brought([pl_module, *dense.values()], device):
                step = TrainingStep(trainer, kept, device)
                return refit(
                    pl_module,
                    dense,
                    ByLayer(moments.G, dense),
                    step.batches,
                    inputs=ByLayer(moments.A, dense),
                    lengths=[batch.lengths for batch in kept.batches],
                    options=self.options,
                    loss=step,
                    device=device,
                    progress=layer_progress(trainer),
                )
        except (RefitError, NoLossError) as error:  # some modules show only when they run that they cannot be refitted
            if self.insisted:
                raise
            _say_unfit(error)
            return None


def refit_figures(report: RefitReport) -> dict[str, Any]:
    """Return the figures of a refit for a compression's report, in plain types."""
    return {
        "layers": report.accepted,
        "loss": {"before": report.loss_before, "after": report.loss_after, "error": report.loss_error},
        "batches": {"fit": report.fit_batches, "held": report.held_batches},
        "reverted": report.reverted,
    }


class ByLayer(Mapping[str, Tensor]):
    """A mapping from layers to tensors that computes each on access: all at once would be as large as a model.

    Args:
        read: Function that returns a layer's tensor.
        names: Names of the layers.
    """

    def __init__(self, read: Callable[[str], Tensor], names: Iterable[str]) -> None:
        self._read = read
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
