"""The options of block training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fasc_lightning.options._types import check_fields

#: What a block is to give: "dense", what the dense block makes of the dense model's hidden states; "drifted", what it
#: makes of the compressed model's.
Target = Literal["dense", "drifted"]


@dataclass(frozen=True)
class RefineOptions:
    """How a refinement goes about it.

    Attributes:
        steps: Optimizer steps of each block, each on one batch.
        lr: First learning rate, relative to the root mean square of each tensor; it falls to zero.
        target: See :data:`Target`.
        holdout: Every so many-th batch is held out; the last one, where there are fewer.
        tokens: Hidden states of at most so many tokens, padding included, are held: the first batches that have no
            more are used.
        seed: Of the order in which batches are taken.
    """

    steps: int = 64
    lr: float = 1e-2
    target: Target = "dense"
    holdout: int = 8
    tokens: int = 65_536
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check_fields(self)
        least = {"steps": 1, "holdout": 2, "tokens": 1, "seed": 0}
        for name, value in least.items():
            given = getattr(self, name)
            if type(given) is not int or given < value:
                raise ValueError(f"Expected `{name}` to be an int of at least {value} but got {given!r}.")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"Expected `lr` to be a positive finite number but got {self.lr!r}.")
        if self.target not in ("dense", "drifted"):
            raise ValueError(f'Expected `target` to be "dense" or "drifted" but got {self.target!r}.')
