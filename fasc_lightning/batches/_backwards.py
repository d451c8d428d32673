"""The backward passes of a batch that count."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Backwards:
    """The backward passes through the layers that belong to a batch's loss.

    Attributes:
        announced: Whether only passes that :meth:`Taps.begin_backward` announces count; False counts every pass.
        several: Whether several passes may go through one call of a layer. The call is then counted at the end of the
            batch with the sum of its gradients, and the rows of all layers stay in memory until then.
    """

    announced: bool = False
    several: bool = False
