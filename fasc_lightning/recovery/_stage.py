"""The fit after a compression, in which FascCallback recovers: when it is one, and what the first fit leaves for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import nn

from fasc_lightning._utils import Undo
from fasc_lightning.batches import LossTerms, TokenMask, check_automatic
from fasc_lightning.layers import is_compressed, is_plain_linear
from fasc_lightning.options import Recovery, RefineOptions, refine_options
from fasc_lightning.recovery._callback import REMEDY, RecoveryCallback
from fasc_lightning.recovery._distillation import check_distillable
from fasc_lightning.recovery._teacher import weights_fingerprint


class RecoveryStage:
    """Recognises the fit that recovers and has a :class:`~fasc_lightning.recovery.RecoveryCallback` for it.

    Args:
        recovery: What to do; None if no fit is a recovery.
        seed: See :class:`~fasc_lightning.FascCallback`.
        token_mask: Likewise.
        loss_terms: Likewise.
        failed: Is given what a fit that fails has to undo.

    Attributes:
        running: Does the recovery, in a fit that is one.
    """

    def __init__(
        self,
        recovery: Recovery | None,
        seed: int,
        token_mask: TokenMask | None,
        loss_terms: LossTerms | None,
        failed: Undo,
    ) -> None:
        self.running: RecoveryCallback | None = None
        self._recovery = recovery
        self._seed = seed
        self._token_mask = token_mask
        self._loss_terms = loss_terms
        self._failed = failed
        self._dense: dict[str, nn.Module] = {}
        self._teacher: str | None = None
        self._linear: dict[str, nn.Module] = {}

    @property
    def refinement(self) -> RefineOptions | None:
        """How the factors are refined before the recovery; None for not at all."""
        return refine_options(self._recovery, self._seed)

    @property
    def figures(self) -> dict[str, Any]:
        """What the recovery of this fit has done, in plain types, once it has ended."""
        assert self.running is not None
        assert self.running.figures is not None
        return self.running.figures

    def check(self, pl_module: pl.LightningModule, layers: Mapping[str, nn.Module]) -> None:
        """Refuse a module that could be compressed and not recovered, before it is compressed.

        Args:
            pl_module: The module.
            layers: The targeted layers by name.

        Raises:
            MisconfigurationException: With the remedy.
            NoLossError: If it optimises by hand.
        """
        if self._recovery is None:
            return
        check_automatic(pl_module, REMEDY)
        if self._recovery.distillation is not None:
            check_distillable(pl_module, self._recovery.distillation, list(layers))

    def keep(self, replaced: Mapping[str, nn.Module]) -> None:
        """Keep the dense layers that a compression has replaced, if a teacher is to be made of them."""
        taught = self._recovery is not None and self._recovery.distillation is not None
        self._failed.set(self, "_dense", dict(replaced) if taught else {})
        self._failed.set(self, "_teacher", weights_fingerprint(self._dense) if taught else None)

    def set_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: object, key: str) -> None:
        """Start a fit; if a checkpoint is loaded after this, :meth:`load` starts it once more.

        Args:
            trainer: Of the fit.
            pl_module: Its module.
            report: Of the compression in an earlier fit, if there was one.
            key: Of the callback's state in checkpoints.
        """
        self.running, self._linear = None, {}
        if self._recovery is None:
            return
        if report is not None and is_compressed(pl_module):
            self.running = self._callback(key)
            self.running.setup(trainer, pl_module, "fit")
        else:  # which a checkpoint may be about to replace
            self._linear = {name: module for name, module in pl_module.named_modules() if is_plain_linear(module)}

    def load(self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: Mapping[str, Any], key: str) -> None:
        """Go on with a recovery, or begin one, from a checkpoint that was saved after the compression.

        Args:
            trainer: Of the fit.
            pl_module: Its module, with the checkpoint's weights.
            state: Of the callback in the checkpoint.
            key: Of that state.
        """
        if self.running is not None:  # of the module as it was before the checkpoint
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
        if found:  # the layers that the checkpoint has just replaced
            self._dense.update(linear)
        self.running = self._callback(key)
        self.running.begin(trainer, pl_module, state.get("recovery"), found=found)

    def forget(self) -> None:
        """Drop what only a running fit needs."""
        if self.running is not None and self.running.figures is not None:
            self._dense = {}
        self.running, self._linear = None, {}

    def state_dict(self) -> dict[str, Any]:
        """Return what says which dense layers the teacher is made of."""
        return {} if self._teacher is None else {"teacher": self._teacher}

    def _callback(self, key: str) -> RecoveryCallback:
        assert self._recovery is not None
        return RecoveryCallback(
            self._recovery,
            self._dense,
            seed=self._seed,
            token_mask=self._token_mask,
            loss_terms=self._loss_terms,
            key=key,
            teacher=self._teacher,
            failed=self._failed,
        )
