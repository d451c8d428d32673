"""Batches of a calibration that run again: to measure layers' losses, and for the moments of a second stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from fasc_lightning._utils import Progress
from fasc_lightning.batches import (
    KeptBatch,
    KeptBatches,
    LossTerms,
    NoLossError,
    TokenMask,
    TokenRows,
    TrainingStep,
    brought,
    check_automatic,
    on_first_process,
    replayed_rows,
)
from fasc_lightning.compression import Approximation, evenly_spaced, measure_losses, run_batches
from fasc_lightning.distributed import is_distributed
from fasc_lightning.hooks import Taps
from fasc_lightning.statistics import CalibrationMoments, offloaded

#: Batches on the module's device, a function that describes a batch's rows, and one that returns its loss.
_Replayed: TypeAlias = tuple[list[Any], Callable[[Any], TokenRows], Callable[[nn.Module, Any], Tensor]]


class CalibrationReplay:
    """Runs the calibration's batches again: to measure what approximations of layers lose, and for further moments.

    Args:
        trainer: Trainer of the fit.
        pl_module: Its module, dense.
        layers: The targeted layers by name.
        replay: The calibration's batches.
        token_mask: As in :class:`~fasc_lightning.FascCallback`.
        loss_terms: As in :class:`~fasc_lightning.FascCallback`.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        layers: dict[str, nn.Module],
        replay: KeptBatches,
        token_mask: TokenMask | None,
        loss_terms: LossTerms | None,
    ) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._layers = layers
        self._replay = replay
        self._token_mask = token_mask
        self._loss_terms = loss_terms

    def measure(self, approximations: Mapping[str, Approximation]) -> dict[str, float]:
        """Return J by layer; empty, with a log message, if the module has no loss outside of the training loop.

        Args:
            approximations: Factors or rounded matrices of the layers to measure.

        Raises:
            FloatingPointError: If a loss is not finite.
            RuntimeError: On every process except the first, if the first one failed.
        """
        found = on_first_process(self._trainer, lambda: self._measure(approximations), "Measuring the losses of layers")
        if not is_distributed(self._trainer):
            assert found is not None
            return found
        shared: list[Any] = [found]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def _measure(self, approximations: Mapping[str, Approximation]) -> dict[str, float]:
        try:
            with self._replayed(evenly_spaced(self._replay.batches), 'Or allocate by "fisher".') as (
                batches,
                rows,
                loss,
            ):
                return measure_losses(self._module, self._layers, approximations, batches, rows, loss)
        except NoLossError as error:
            rank_zero_info(f"FascCallback: ranks and bits follow predicted losses alone. {error}")
            return {}

    def add_moments(self, moments: CalibrationMoments, progress: Progress | None = None) -> None:
        """Add the rows of all kept batches, as the targeted layers of the present module see them, to moments.

        Args:
            moments: Moments of the targeted layers. Processes other than the first add nothing.
            progress: Wraps the loop over the batches.

        Raises:
            FloatingPointError: If a loss, or rows that go into the moments, are not finite.
            NoLossError: If the module has no loss outside of the training loop.
            RuntimeError: On every process except the first, if the first one failed.
        """

        def add() -> None:
            device = self._trainer.strategy.root_device
            present = {name: self._module.get_submodule(name) for name in self._layers}
            with self._replayed(self._replay.batches, "Or calibrate in one stage.") as (batches, rows, loss):
                run_batches(self._module, Taps(present, offloaded(moments, device)), batches, rows, loss, progress)

        on_first_process(self._trainer, add, "The second stage of the calibration")

    @contextmanager
    def _replayed(self, kept: Sequence[KeptBatch], remedy: str) -> Iterator[_Replayed]:
        """Bring the module to its device; yield batches there, a function for their rows, and one for their loss.

        Raises:
            NoLossError: If the module has no loss outside of the training loop; the message ends with the remedy.
        """
        device = self._trainer.strategy.root_device
        scaler: Any = getattr(self._trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()  # gradients in float16 would vanish without it

        def rows(batch: Any) -> TokenRows:
            return replayed_rows(
                self._module, batch, token_mask=self._token_mask, loss_terms=self._loss_terms, factor=scale
            )

        def loss(module: nn.Module, batch: Any) -> Tensor:
            return step.loss(module, batch) * scale

        check_automatic(self._module, remedy)
        with brought([self._module], device):
            step = TrainingStep(self._trainer, KeptBatches(list(kept)), device)
            yield step.batches, rows, loss
