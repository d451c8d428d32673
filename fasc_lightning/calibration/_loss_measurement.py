"""Measurement of layers' losses inside a fit: on the first process, with the module's own loss, shared with all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from fasc_lightning.batches import (
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
from fasc_lightning.compression import Approximation, evenly_spaced, measure_losses
from fasc_lightning.distributed import is_distributed


class LossMeasurement:
    """Measures the loss that approximations of layers add on the calibration's batches.

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
        device = self._trainer.strategy.root_device
        scaler: Any = getattr(self._trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()  # gradients in float16 would vanish without it

        def rows(batch: Any) -> TokenRows:
            return replayed_rows(
                self._module, batch, token_mask=self._token_mask, loss_terms=self._loss_terms, factor=scale
            )

        def loss(module: nn.Module, batch: Any) -> Tensor:
            return step.loss(module, batch) * scale

        try:
            check_automatic(self._module, 'Or allocate by "fisher".')
            with brought([self._module], device):
                step = TrainingStep(self._trainer, KeptBatches(evenly_spaced(self._replay.batches)), device)
                return measure_losses(self._module, self._layers, approximations, step.batches, rows, loss)
        except NoLossError as error:
            rank_zero_info(f"FascCallback: ranks and bits follow predicted losses alone. {error}")
            return {}
