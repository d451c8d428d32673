"""Windows of tokens as a stream of training batches, for recipes that train over several epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor


def shuffled_windows(windows: Tensor, seed: int, epoch: int) -> Tensor:
    """Return the windows in the order of an epoch."""
    return windows[Random(f"order {seed} {epoch}").sample(range(len(windows)), len(windows))]


class BatchStream:
    """Batches of windows over all epochs; a stateful loader, so that a resumed fit continues with the next batch.

    Args:
        epoch_windows: Returns at least one window of an epoch by its index, shape (windows, window). Windows that do
            not fill a batch go into the next epoch's first batch.
        batch_size: Windows per batch.
        steps: Batches in all.
    """

    def __init__(self, epoch_windows: Callable[[int], Tensor], batch_size: int, steps: int) -> None:
        self.epoch_windows = epoch_windows
        self.batch_size = batch_size
        self.steps = steps
        self._step = 0
        self._epoch = 0
        self._rest: Tensor | None = None

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while self._step < self.steps:
            parts = [] if self._rest is None else [self._rest]
            while sum(map(len, parts)) < self.batch_size:
                parts.append(self.epoch_windows(self._epoch))
                self._epoch += 1
            windows = torch.cat(parts)
            batch, self._rest = windows[: self.batch_size], windows[self.batch_size :].clone()
            self._step += 1
            yield {"input_ids": batch}

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, with the remaining windows of the last epoch."""
        return {"step": self._step, "epoch": self._epoch, "rest": self._rest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the position of ``state``."""
        self._step, self._epoch, self._rest = state["step"], state["epoch"], state["rest"]
