"""The best values of trained parameters, by a held-out loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class BestState:
    """Keeps the values with the lowest held-out loss. The first loss is measured before the training.

    Args:
        patience: Number of losses without improvement after which training should stop; None sets no limit.

    Attributes:
        losses: Pairs (step, loss), one for each measurement.
        step: Step of the best values; the first step if nothing was better.
        values: The best values by name, on the CPU; empty if the first values are best.
    """

    def __init__(self, patience: int | None = None) -> None:
        self.losses: list[tuple[int, float]] = []
        self.step = 0
        self.values: dict[str, Tensor] = {}
        self._patience = patience

    @property
    def begun(self) -> bool:
        """Whether a loss was measured."""
        return bool(self.losses)

    @property
    def first(self) -> float:
        """The loss before the training."""
        return self.losses[0][1]

    @property
    def loss(self) -> float:
        """The best loss."""
        return dict(self.losses)[self.step]

    @property
    def improved(self) -> bool:
        """Whether the training lowered the loss."""
        return self.begun and self.step != self.losses[0][0]

    @property
    def exhausted(self) -> bool:
        """Whether training should stop: the last ``patience`` losses were no better, or the last is not finite."""
        if not self.begun:
            return False
        since = sum(step > self.step for step, _ in self.losses)
        return not math.isfinite(self.losses[-1][1]) or (self._patience is not None and since >= self._patience)

    def look(self, step: int, loss: float, values: Mapping[str, Tensor]) -> None:
        """Record the loss at a step, and keep the values if it is the lowest.

        Args:
            step: Optimizer steps done.
            loss: Loss on held-out batches.
            values: Trained parameters by name; copied if they are the best so far and not the first.
        """
        if not self.begun:
            self.step = step
        elif loss < self.loss:  # never true of NaN
            self.step = step
            self.values = {name: value.detach().to("cpu", copy=True) for name, value in values.items()}
        self.losses.append((step, loss))

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain data and tensors."""
        return {"losses": [list(row) for row in self.losses], "step": self.step, "values": dict(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a :meth:`state_dict`."""
        self.losses = [(int(step), float(loss)) for step, loss in state["losses"]]
        self.step, self.values = int(state["step"]), dict(state["values"])
