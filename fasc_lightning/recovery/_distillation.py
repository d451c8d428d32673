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
    """The members of a LightningModule that can learn from a teacher; CausalLMModule has them.

    Attributes:
        teacher: None, but a :class:`Teacher` while a recovery with a teacher runs. ``training_step`` then returns
            ``self.teacher.loss(batch, logits, counted, label_loss)``, with the result of ``predictions``.
    """

    teacher: Teacher | None

    def predictions(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Return the logits of a batch and a mask of the predictions that count.

        Returns:
            Logits, shape (samples, ..., classes), and a mask with True for counted predictions, shape (samples, ...);
            None in place of the mask counts all.
        """
        ...


def check_distillable(module: nn.Module, distillation: Distillation, layers: list[str]) -> None:
    """Check that a module can learn from a teacher, before any work is done.

    Args:
        module: Module of the fit.
        distillation: The options.
        layers: Names of the compressed layers.

    Raises:
        MisconfigurationException: If the module is not :class:`Distillable`, experts are compressed, or there is no
            stack of blocks whose outputs are to be compared.
    """
    if not isinstance(module, Distillable):
        raise MisconfigurationException(
            f"Expected a module that can learn from a teacher but {type(module).__name__} has no `predictions(batch)` "
            "(logits and a mask of counted ones) or no attribute `teacher`, which gives `training_step` the loss. "
            "HINT: see fasc_lightning.distillation.Distillable; CausalLMModule has both. Or recover with teacher=None."
        )
    if experts := expert_layers(module, layers):
        raise MisconfigurationException(
            f"Expected layers other than experts' for a teacher but {experts[0]!r} and {len(experts) - 1} others are "
            "experts. The teacher puts dense layers in the places of compressed ones, and dense experts are one "
            "module. Recover with teacher=None, or exclude the experts."
        )
    if distillation.blocks:
        try:
            find_blocks(module, layers)
        except RefitError as error:
            raise MisconfigurationException(
                f"Expected a stack of blocks, whose outputs are to be compared, but: {error} HINT: blocks=0."
            ) from error
