"""Options of the teacher: the dense model, from which the compressed one learns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fasc_lightning.options._types import check_fields


@dataclass(frozen=True)
class Distillation:
    """Options of distillation from the dense model into the compressed one.

    The loss is weight T^2 KL(teacher || student) + (1 - weight) label loss + blocks times the relative squared error of
    the blocks' outputs, token by token. The distributions come from logits divided by the temperature T. The labels
    select the predictions that count; without labels, the padding does.

    Attributes:
        temperature: Temperature T.
        weight: Weight of the teacher's predictions against the labels; at 1 no labels are needed.
        blocks: Weight of the blocks' outputs; 0 ignores them.
        device: Device of the teacher, for example "cpu". With None it is the module's device: the two then share all
            weights that recovery does not train, and the teacher adds the dense layers alone.
        dtype: Dtype of a teacher with weights of its own, a torch dtype or its name; None for the module's.
        cache: Folder for the teacher's ``top_k`` largest logits of each prediction. They are computed once before the
            training, and the teacher is then freed. If the fit does not go through all of a data set of known length,
            the teacher stays and serves new samples. All runs towards the same dense layers can share the folder.
        top_k: Number of logits in the cache. All other tokens count as one outcome.

    Raises:
        ValueError: If an option is out of range, or if options exclude each other.
    """

    temperature: float = 1.0
    weight: float = 1.0
    blocks: float = 0.0
    device: str | None = None
    dtype: Any = None
    cache: str | None = None
    top_k: int = 64

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"Expected `temperature` to be positive but got {self.temperature!r}.")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"Expected `weight` to be in [0, 1] but got {self.weight!r}.")
        if not 0 <= self.blocks < math.inf:
            raise ValueError(f"Expected `blocks` to be 0 or more but got {self.blocks!r}.")
        if self.weight == self.blocks == 0:
            raise ValueError(
                "Expected a `weight` or `blocks` above 0: at 0 the teacher has no say. HINT: teacher=None."
            )
        if type(self.top_k) is not int or self.top_k < 1:
            raise ValueError(f"Expected `top_k` to be a positive int but got {self.top_k!r}.")
        if self.cache is not None and self.blocks:
            raise ValueError("Expected blocks=0 with a `cache`, which holds logits, but got both. Give one.")
        self.torch_dtype()

    def torch_dtype(self) -> torch.dtype | None:
        """Return the teacher's dtype.

        Raises:
            ValueError: If ``dtype`` is not a floating dtype of torch.
        """
        found = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if self.dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ValueError(f"Expected `dtype` to be a floating dtype as 'bfloat16' but got {self.dtype!r}.")
        return found
