"""How many backward passes a batch takes."""

from __future__ import annotations

from dataclasses import dataclass


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
