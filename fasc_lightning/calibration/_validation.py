"""The module's loss on validation batches, before and after a compression."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import islice

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor

from fasc_lightning.batches import NoLossError, brought, check_automatic, loss_terms_of, reads_loss
from fasc_lightning.compression import CompressionReport
from fasc_lightning.distributed import is_distributed
from fasc_lightning.options import CompressionOptions
from fasc_lightning.recovery import held_out_batches, held_out_loss, validates

#: Most validation batches that are measured. They show a broken model, and take the time of a few training steps.
BATCHES = 8


class ValidationLoss:
    """Measures the loss of the training step on the first validation batches, where a fit has some.

    A fit of several processes is not measured, and neither is a module that optimises by hand. The compression does not
    need the figure, so no error ends the fit, for example of a step that does not take validation batches.

    Args:
        trainer: Trainer of the fit.
        pl_module: Its module.
        options: Options that tell tokens and terms.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, options: CompressionOptions) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._how = {"token_mask": options.token_mask, "loss_terms": options.loss_terms}
        self._batches = 0
        self._before = self._measured()

    def add_to(self, report: CompressionReport) -> CompressionReport:
        """Return the report with the loss before and after, once the module is compressed."""
        after = None if self._before is None else self._measured()
        if self._before is None or after is None:
            return report
        return replace(report, validation={"loss": {"before": self._before, "after": after}, "batches": self._batches})

    def _measured(self) -> float | None:
        trainer, module = self._trainer, self._module
        if not validates(trainer) or is_distributed(trainer):
            return None

        def terms(batch: object, loss: Tensor | None) -> float:
            self._batches += 1
            return loss_terms_of(module, batch, loss=loss, **self._how)

        self._batches = 0
        try:
            check_automatic(module, "")
        except NoLossError:
            return None
        try:
            with brought([module], trainer.strategy.root_device):
                batches = islice(held_out_batches(trainer, None), BATCHES)
                return held_out_loss(trainer, module, batches, terms, partial(reads_loss, module, **self._how))
        except Exception as error:
            rank_zero_info(f"FascCallback: the validation loss is not measured. {type(error).__name__}: {error}")
            return None
