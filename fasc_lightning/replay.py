"""The calibration's batches once more: kept while it runs, and given back to the module's own training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from fasc_lightning._distributed import is_distributed
from fasc_lightning._undo import undoing

Result = TypeVar("Result")


class NoLossError(ValueError):
    """A module whose loss of a batch cannot be had outside of the training loop; nothing of it was changed."""


class Replay:
    """Batches of a calibration, on the CPU."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def keep(self, batch: Any) -> None:
        """Keep a batch."""
        self.batches.append(move_data_to_device(batch, "cpu"))

    def on(self, device: Any) -> list[Any]:
        """Return the batches on a device."""
        return [move_data_to_device(batch, device) for batch in self.batches]


def check_automatic(pl_module: pl.LightningModule, remedy: str) -> None:
    """Refuse modules whose training step does its own optimisation: it returns no loss to look at.

    Raises:
        NoLossError: With the remedy.
    """
    if not pl_module.automatic_optimization:
        raise NoLossError(f"Expected automatic optimization, so that `training_step` returns a batch's loss. {remedy}")


def training_loss(module: nn.Module, batch: Any) -> Tensor:
    """Return the module's own loss of a batch.

    Raises:
        NoLossError: If the training step skips it.
    """
    assert isinstance(module, pl.LightningModule)
    indexed = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)  # as the Trainer asks
    outputs: Any = module.training_step(batch, 0) if indexed else module.training_step(batch)
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor):
        raise NoLossError(
            f"Expected a training step that returns a loss for every batch but got {type(loss).__name__}."
        )
    return loss


@contextmanager
def silent(module: pl.LightningModule) -> Iterator[None]:
    """Let a training step run outside of the training loop, where ``self.log`` is an error."""
    with undoing() as undo:
        for name in ("log", "log_dict"):
            undo.set(module, name, lambda *args, **kwargs: None)
        yield


def on_first_process(trainer: pl.Trainer, work: Callable[[], Result], what: str) -> Result | None:
    """Do something on the first process alone; the others wait, and fail if it fails.

    Args:
        trainer: Of the fit.
        work: What to do.
        what: Names it in the error of the others.

    Returns:
        The result there; None on other processes.

    Raises:
        RuntimeError: On every process but the first, if the first one failed.
    """
    if not is_distributed(trainer):
        return work()
    result, error = None, None
    if trainer.is_global_zero:
        try:
            result = work()
        except Exception as caught:
            error = caught
    failed = [error is not None]
    dist.broadcast_object_list(failed, src=0)
    if error is not None:
        raise error
    if failed[0]:
        raise RuntimeError(f"{what} failed on the first process; see its error. The module is put back.")
    return result
