"""The best values that a training has seen of what it trains, judged by a held-out loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class BestState:
    """Keeps the values of the lowest held-out loss, the first being those before the training.

    Args:
        patience: After so many losses that were no better it says to stop; None never does.

    Attributes:
        losses: (step, loss) of every look.
        step: Of the best values; the first one's if nothing was better.
        values: The best values by name, on the CPU; empty if those before the training are.
    """

    def __init__(self, patience: int | None = None) -> None:
        self.losses: list[tuple[int, float]] = []
        self.step = 0
        self.values: dict[str, Tensor] = {}
        self._patience = patience

    @property
    def begun(self) -> bool:
        """Whether there was a look."""
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
        """Whether the training brought anything."""
        return self.begun and self.step != self.losses[0][0]

    @property
    def exhausted(self) -> bool:
        """Whether the last losses brought nothing, or one was not finite."""
        if not self.begun:
            return False
        since = sum(step > self.step for step, _ in self.losses)
        return not math.isfinite(self.losses[-1][1]) or (self._patience is not None and since >= self._patience)

    def look(self, step: int, loss: float, values: Mapping[str, Tensor]) -> None:
        """Judge the values at a step.

        Args:
            step: Optimizer steps done.
            loss: On held-out batches.
            values: What is trained, by name; copied if it is the best so far and not the first.
        """
        if not self.begun:
            self.step = step
        elif loss < self.loss:  # never true of NaN
            self.step = step
            self.values = {name: value.detach().to("cpu", copy=True) for name, value in values.items()}
        self.losses.append((step, loss))

    def state_dict(self) -> dict[str, Any]:
        """Return all of it in plain data and tensors."""
        return {"losses": [list(row) for row in self.losses], "step": self.step, "values": dict(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.losses = [(int(step), float(loss)) for step, loss in state["losses"]]
        self.step, self.values = int(state["step"]), dict(state["values"])
