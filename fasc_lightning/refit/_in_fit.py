"""The refit inside a fit: which modules allow one, the batches it needs, and one result on every process."""

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
from fasc_lightning.refit._anchored import MIN_BATCHES, RefitOptions, check_refit, refit
from fasc_lightning.refit._blocks import RefitError
from fasc_lightning.refit._reports import RefitReport
from fasc_lightning.statistics import CalibrationMoments

_NOT_REFITTED = "FascCallback: the factors will not be refitted. {}"


class RefitPhase:
    """Refits the factors to the calibration's batches once they are in the module.

    Args:
        insisted: Whether to warn, not only say so, where there turn out to be too few batches.
        options: How the refit chooses.
    """

    def __init__(self, insisted: bool = False, options: RefitOptions | None = None) -> None:
        self.insisted = insisted
        self.options = options or RefitOptions()

    @staticmethod
    def of(wanted: Refit, pl_module: pl.LightningModule, layers: Iterable[str]) -> RefitPhase | None:
        """Return the phase, or None where there shall be none; before any work is done.

        Args:
            wanted: The option.
            pl_module: The module of the fit.
            layers: Names of the targeted layers in it.

        Raises:
            RefitError: If a refit is insisted on and the module does not allow one.
            NoLossError: Likewise, if it optimises by hand.
        """
        if wanted is False:
            return None
        try:
            check_automatic(pl_module, "Compress with refit=False.")
            if is_split(pl_module):
                raise RefitError("Expected a model on one device, whose blocks can be run alone, but it is split.")
            check_refit(pl_module, layers)
        except (RefitError, NoLossError) as error:
            if wanted is True:
                raise
            rank_zero_info(_NOT_REFITTED.format(error))
            return None
        return RefitPhase(insisted=wanted is True)

    def run(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        dense: Mapping[str, nn.Module],
        moments: CalibrationMoments,
        replay: KeptBatches,
    ) -> RefitReport | None:
        """Refit the compressed module in place; on several processes with the first one's batches, for all.

        Args:
            trainer: Of the fit.
            pl_module: The module, its layers replaced.
            dense: The layers that were replaced, by name.
            moments: The calibration's, whose A and G are the metric.
            replay: The calibration's batches.

        Returns:
            What was done; None if there was nothing to do or too few batches, which is said, or on other processes.

        Raises:
            RefitError: If a refit is insisted on and the module turns out not to allow one.
            NoLossError: Likewise, if its training step returns no loss.
            RuntimeError: On every process but the first, if the first one failed.
        """
        report = on_first_process(trainer, lambda: self._run(trainer, pl_module, dense, moments, replay), "The refit")
        share_layers(trainer, pl_module, dense)
        return report

    def _run(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        dense: Mapping[str, nn.Module],
        moments: CalibrationMoments,
        replay: KeptBatches,
    ) -> RefitReport | None:
        if not dense:
            return None
        if len(replay.batches) < MIN_BATCHES:
            say = rank_zero_warn if self.insisted else rank_zero_info
            say(
                f"FascCallback: the factors are not refitted. That takes at least {MIN_BATCHES} calibration batches, "
                f"some of which are held out, and there were {len(replay.batches)}. HINT: smaller batches, or "
                "refit=False."
            )
            return None
        device = trainer.strategy.root_device
        try:
            with brought([pl_module, *dense.values()], device):
                step = TrainingStep(trainer, replay, device)
                return refit(
                    pl_module,
                    dense,
                    ByLayer(moments.G, dense),
                    step.batches,
                    inputs=ByLayer(moments.A, dense),
                    options=self.options,
                    loss=step,
                    device=device,
                    progress=layer_progress(trainer),
                )
        except (RefitError, NoLossError) as error:  # some modules only show what they are when they run
            if self.insisted:
                raise
            rank_zero_info(_NOT_REFITTED.format(error))
            return None


def refit_figures(report: RefitReport) -> dict[str, Any]:
    """Return what a compression's report says of a refit, in plain types."""
    return {
        "layers": report.accepted,
        "loss": {"before": report.loss_before, "after": report.loss_after, "error": report.loss_error},
        "batches": {"fit": report.fit_batches, "held": report.held_batches},
        "reverted": report.reverted,
    }


class ByLayer(Mapping[str, Tensor]):
    """A tensor of each layer by name, computed when it is asked for: all of them at once would be as large as a model.

    Args:
        read: Returns that of a layer.
        names: The layers.
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
