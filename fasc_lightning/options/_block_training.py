"""The options of block training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fasc_lightning.options._types import check_fields

#: Target of a block's training: the output of the dense block for the hidden states of the dense model ("dense") or of
#: the compressed model ("drifted").
Target = Literal["dense", "drifted"]


@dataclass(frozen=True)
class RefineOptions:
    """Options of a refinement, which trains the factors block by block.

    Attributes:
        steps: Optimizer steps of each block, each on one batch.
        lr: First learning rate, relative to the root mean square of each tensor; it falls to zero.
        target: The output that a block is trained towards, see :data:`Target`.
        holdout: One batch in this many is held out; if there are fewer batches, the last one is.
        tokens: Largest number of tokens, padding included, whose hidden states are held. The first batches within this
            number are used.
        seed: Seed of the order of batches.
    """

    steps: int = 64
    lr: float = 1e-2
    target: Target = "dense"
    holdout: int = 8
    tokens: int = 65_536
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse options that are out of range."""
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
