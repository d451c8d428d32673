"""The recovery fit of FascCallback: its recognition, and the dense layers that the compression fit leaves for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import nn

from fasc_lightning._utils import Undo
from fasc_lightning.batches import check_automatic
from fasc_lightning.layers import is_compressed, is_plain_linear
from fasc_lightning.options import CompressionOptions, Recovery, RefineOptions, as_recovery, refine_options
from fasc_lightning.recovery._callback import REMEDY, RecoveryCallback
from fasc_lightning.recovery._distillation import check_distillable
from fasc_lightning.recovery._teacher import weights_fingerprint


class RecoveryStage:
    """Recognises a recovery fit and makes a :class:`~fasc_lightning.recovery.RecoveryCallback` for it.

    Args:
        options: Options of the callback, read when they are used. Without ``recovery`` no fit is a recovery.
        failed: Gets the changes to undo if a fit fails.

    Attributes:
        running: The callback of the recovery in a recovery fit; None in other fits.
    """

    def __init__(self, options: CompressionOptions, failed: Undo) -> None:
        self.running: RecoveryCallback | None = None
        self._options = options
        self._failed = failed
        self._dense: dict[str, nn.Module] = {}
        self._teacher: str | None = None
        self._linear: dict[str, nn.Module] = {}

    @property
    def _recovery(self) -> Recovery | None:
        return as_recovery(self._options.recovery)

    @property
    def refinement(self) -> RefineOptions | None:
        """Options of the refinement before the recovery; None for no refinement."""
        return refine_options(self._recovery, self._options.seed)

    @property
    def figures(self) -> dict[str, Any]:
        """Figures of this fit's recovery, in plain types, after its end."""
        assert self.running is not None
        assert self.running.figures is not None
        return self.running.figures

    def check(self, pl_module: pl.LightningModule, layers: Mapping[str, nn.Module]) -> None:
        """Refuse, before the compression, a module that could not be recovered.

        Args:
            pl_module: The module.
            layers: The targeted layers by name.

        Raises:
            MisconfigurationException: If the module cannot be recovered; the message names the remedy.
            NoLossError: If the module optimises by hand.
        """
        if self._recovery is None:
            return
        check_automatic(pl_module, REMEDY)
        if self._recovery.distillation is not None:
            check_distillable(pl_module, self._recovery.distillation, list(layers))

    def keep(self, replaced: Mapping[str, nn.Module]) -> None:
        """Keep the replaced dense layers if a teacher needs them."""
        taught = self._recovery is not None and self._recovery.distillation is not None
        self._failed.set(self, "_dense", dict(replaced) if taught else {})
        self._failed.set(self, "_teacher", weights_fingerprint(self._dense) if taught else None)

    def set_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: object, key: str) -> None:
        """Start a fit. If a checkpoint is loaded after this, :meth:`load` starts it again.

        Args:
            trainer: Trainer of the fit.
            pl_module: Its module.
            report: Report of the compression in an earlier fit, if there was one.
            key: Key of the callback's state in checkpoints.
        """
        self.running, self._linear = None, {}
        if self._recovery is None:
            return
        if report is not None and is_compressed(pl_module):
            self.running = self._callback(key)
            self.running.setup(trainer, pl_module, "fit")
        else:  # a checkpoint may replace these layers next
            self._linear = {name: module for name, module in pl_module.named_modules() if is_plain_linear(module)}

    def load(self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: Mapping[str, Any], key: str) -> None:
        """Continue or begin a recovery from a checkpoint that was saved after the compression.

        Args:
            trainer: Trainer of the fit.
            pl_module: Its module, with the checkpoint's weights.
            state: State of the callback in the checkpoint.
            key: Key of that state.
        """
        if self.running is not None:  # it belongs to the module before the checkpoint
            self.running.teardown(trainer, pl_module, "fit")
        linear, self.running, self._linear = self._linear, None, {}
        report = state.get("report")
        if (
            self._recovery is None
            or report is None
            or report.get("recovery") is not None
            or not is_compressed(pl_module)
        ):
            return
        self._teacher = state.get("teacher", self._teacher)
        found = not self._dense
        if found:  # takes the layers that the checkpoint has just replaced
            self._dense.update(linear)
        self.running = self._callback(key)
        self.running.begin(trainer, pl_module, state.get("recovery"), found=found)

    def forget(self) -> None:
        """Drop the state that only a running fit needs."""
        if self.running is not None and self.running.figures is not None:
            self._dense = {}
        self.running, self._linear = None, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the fingerprint of the teacher's dense layers, if there is a teacher."""
        return {} if self._teacher is None else {"teacher": self._teacher}

    def _callback(self, key: str) -> RecoveryCallback:
        assert self._recovery is not None
        return RecoveryCallback(
            self._recovery,
            self._dense,
            seed=self._options.seed,
            token_mask=self._options.token_mask,
            loss_terms=self._options.loss_terms,
            key=key,
            teacher=self._teacher,
            failed=self._failed,
        )
