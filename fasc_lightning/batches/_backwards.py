"""The backward passes of a batch: which of them count, and whether there is one."""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl


@dataclass(frozen=True)
class Backwards:
    """Which backward passes through the layers are those of a batch's loss.

    Attributes:
        announced: Whether only those are that :meth:`Taps.begin_backward` announces, and not every one.
        several: Whether several of them may go through one call of a layer, which is then counted at the end of the
            batch with the sum of its gradients. Rows of all layers are held until then.
    """

    announced: bool = False
    several: bool = False


def skips_backward(trainer: pl.Trainer) -> bool:
    """Tell whether the Trainer runs batches without backward passes now, as for running statistics alone."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))
