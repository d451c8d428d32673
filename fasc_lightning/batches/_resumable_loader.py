"""A loader whose place in an epoch goes into checkpoints, so that a resumed fit goes on with the next batch."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader
from typing_extensions import override


class ResumableLoader(DataLoader[Any]):
    """A DataLoader in a fixed order that tells how many batches of an epoch it has given, and can go on after them.

    Lightning keeps the state of loaders that have one; with others, a fit that is resumed in the middle of an epoch
    begins with its first batches again. For loaders without shuffling and without workers, of which every epoch takes
    all batches: after one cut short by ``limit_train_batches`` it would go on with the rest.
    """

    _given = 0
    _skip = 0

    @override
    def __iter__(self) -> Any:
        skip, self._skip = self._skip, 0
        self._given = skip
        for batch in islice(super().__iter__(), skip, None):
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return how many batches of the epoch were given; at its end that is none of the next one."""
        return {"given": self._given % max(1, len(self))}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Begin the next iteration after the batches that were given."""
        self._given = self._skip = state_dict["given"]


def restore_loaders(trainer: pl.Trainer) -> None:
    """Give stateful loaders what a checkpoint has of them, as training starts, if that has not been done.

    Lightning makes the loaders when something first asks for the length of the fit, as a learning rate's schedule does
    in ``configure_optimizers``: before it reads the loops' state, which the loaders then never get.
    """
    loop = trainer.fit_loop
    if loop._combined_loader_states_to_load and loop._data_fetcher is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)
