"""Work of the first process alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import lightning.pytorch as pl
import torch.distributed as dist

from fasc_lightning.distributed import is_distributed

Result = TypeVar("Result")


def on_first_process(trainer: pl.Trainer, work: Callable[[], Result], what: str) -> Result | None:
    """Call a function on the first process alone; the other processes wait, and fail if it fails.

    Args:
        trainer: Trainer of the fit.
        work: The function.
        what: Name of the work, for the error of the other processes.

    Returns:
        The function's result on the first process; None on other processes.

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
