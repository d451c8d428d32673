"""How the dense model teaches the compressed one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fasc_lightning.options._types import check_fields


@dataclass(frozen=True)
class Distillation:
    """How the dense model teaches the compressed one.

    The loss is weight T^2 KL(teacher || student) + (1 - weight) label loss + blocks times the relative squared error of
    the blocks' outputs, token by token, where the distributions are those of logits divided by the temperature T. All
    of it is over the predictions that the labels, or without labels the padding, let count.

    Attributes:
        temperature: T.
        weight: Of the teacher's predictions against the labels; at 1 no labels are needed.
        blocks: Weight of the blocks' outputs; 0 does not look at them.
        device: Where the teacher is, for example "cpu". None for that of the module: then the two share all that
            recovery does not train, and the teacher is the dense layers alone.
        dtype: Of a teacher with weights of its own, a torch dtype or its name; None for the module's.
        cache: Folder for the teacher's ``top_k`` largest logits of each prediction. They are computed once, before
            the training, and the teacher is then gone; but where the fit does not go through all of a data set of
            known length, the teacher stays and is asked when a sample is new. All runs towards the same dense layers
            can share it.
        top_k: How many of them. What is not among them counts as one outcome.

    Raises:
        ValueError: If an option is out of range, or the options exclude each other.
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
            ValueError: If it is not a floating dtype of torch.
        """
        found = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if self.dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ValueError(f"Expected `dtype` to be a floating dtype as 'bfloat16' but got {self.dtype!r}.")
        return found
