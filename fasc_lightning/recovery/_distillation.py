"""Modules that can learn from a teacher."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from fasc_lightning.layers import expert_layers
from fasc_lightning.options import Distillation
from fasc_lightning.recovery._teacher import Teacher
from fasc_lightning.refit import RefitError, find_blocks


@runtime_checkable
class Distillable(Protocol):
    """What a LightningModule has that takes part in distillation; CausalLMModule has it.

    Attributes:
        teacher: None; while a recovery with a teacher runs, a :class:`Teacher`. ``training_step`` then returns
            ``self.teacher.loss(batch, logits, counted, label_loss)``, with what ``predictions`` returns.
    """

    teacher: Teacher | None

    def predictions(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Return the logits of a batch and which of them count.

        Returns:
            Logits (samples, ..., classes), and True for predictions that count (samples, ...); None if all do.
        """
        ...


def check_distillable(module: nn.Module, distillation: Distillation, layers: list[str]) -> None:
    """Refuse modules that cannot learn from a teacher, before any work is done.

    Args:
        module: Of the fit.
        distillation: The options.
        layers: Names of the compressed layers.

    Raises:
        MisconfigurationException: With the remedy.
    """
    if not isinstance(module, Distillable):
        raise MisconfigurationException(
            f"Expected a module that can learn from a teacher but {type(module).__name__} has no `predictions(batch)` "
            "(logits and which of them count) or no attribute `teacher`, which its `training_step` asks for the loss. "
            "HINT: see fasc_lightning.distillation.Distillable; CausalLMModule has both. Or recover with teacher=None."
        )
    if experts := expert_layers(module, layers):
        raise MisconfigurationException(
            "Expected layers other than experts' for a teacher, whose dense layers take the places of the compressed "
            f"ones, while dense experts are one module; but {experts[0]!r} and {len(experts) - 1} others are. Recover "
            "with teacher=None, or exclude the experts."
        )
    if distillation.blocks:
        try:
            find_blocks(module, layers)
        except RefitError as error:
            raise MisconfigurationException(
                f"Expected a stack of blocks, whose outputs are to be compared, but: {error} HINT: blocks=0."
            ) from error
