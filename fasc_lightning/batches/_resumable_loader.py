"""A loader whose position in an epoch is saved in checkpoints, so that a resumed fit continues with the next batch."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader
from typing_extensions import override


class ResumableLoader(DataLoader[Any]):
    """A DataLoader in a fixed order that counts the batches of an epoch, and can continue after them.

    Lightning saves the state of loaders that have one. With other loaders, a fit resumed in the middle of an epoch
    repeats its first batches. This loader works without shuffling and without workers, and for epochs that take all
    batches: after an epoch cut short by ``limit_train_batches`` it would continue with the rest.
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
        """Return the number of batches given in this epoch; 0 at its end, for the next epoch."""
        return {"given": self._given % max(1, len(self))}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Begin the next iteration after the batches already given."""
        self._given = self._skip = state_dict["given"]


def restore_loaders(trainer: pl.Trainer) -> None:
    """Load a checkpoint's states into stateful loaders when training starts, unless Lightning has done so.

    Lightning makes the loaders when something first asks for the length of the fit, such as a learning rate's schedule
    in ``configure_optimizers``. That is before it reads the loops' state, which these loaders then never get.
    """
    loop = trainer.fit_loop
    if loop._combined_loader_states_to_load and loop._data_fetcher is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)
