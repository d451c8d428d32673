"""Progress bars over layers, in the look of the Trainer's own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, convert_inf
from typing_extensions import override

T = TypeVar("T")


def layer_progress(trainer: pl.Trainer) -> Progress:
    """Return a progress bar over layers, of rich or tqdm as the Trainer's own, and silent if that is."""
    bar = trainer.progress_bar_callback
    # A bar can be switched off while it is attached (`disable()`); only the concrete bars know this.
    shown = bar is not None and trainer.is_global_zero and getattr(bar, "is_enabled", True)
    if shown and isinstance(bar, RichProgressBar) and bar.progress is not None:
        bar.progress.stop()  # its live display runs until teardown, and rich shows one at a time
        return _rich_progress(trainer, bar)

    def progress(names: Sequence[str], description: str) -> Iterable[str]:
        return Tqdm(
            names,
            desc=description,
            disable=not shown,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=TQDMProgressBar.BAR_FORMAT,
        )

    return progress


def _rich_progress(trainer: pl.Trainer, bar: RichProgressBar) -> Progress:
    from rich.progress import Progress as RichProgress

    def progress(names: Sequence[str], description: str) -> Iterator[str]:
        assert bar.progress is not None
        with RichProgress(*bar.configure_columns(trainer), console=bar.progress.console) as shown:
            task = shown.add_task(description, total=len(names))  # `track` would show "2/14.0"
            for name in names:
                yield name
                shown.advance(task)

    return progress


def terminal_progress(items: Sequence[T], description: str, unit: str = "layer") -> Iterable[T]:
    """Show a progress bar over layers, or other items, if there is a terminal; the bar disappears at the end."""
    from tqdm.auto import tqdm

    return tqdm(items, desc=description, unit=unit, disable=None, leave=False)


class RichWorkBar(RichProgressBar):
    """The Trainer's bar of rich, with the name of the work in place of "Epoch 0/0".

    Args:
        work: Name of the work.
    """

    def __init__(self, work: str) -> None:
        super().__init__()
        self._work = work

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        return work_of_epoch(self._work, current_epoch, self.trainer.max_epochs)


class TqdmWorkBar(TQDMProgressBar):
    """The Trainer's bar of tqdm, with the name of the work in place of "Epoch 0".

    Args:
        work: Name of the work.
    """

    def __init__(self, work: str) -> None:
        super().__init__()
        self._work = work

    @property
    @override
    def train_description(self) -> str:
        return self._work

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, *args: object) -> None:
        # Not by way of the base class, which would show "Epoch 0" for a moment.
        bar = self.train_progress_bar
        bar.reset(convert_inf(self.total_train_batches))
        bar.set_description(work_of_epoch(self._work, trainer.current_epoch, trainer.max_epochs))


def work_of_epoch(work: str, epoch: int, epochs: int | None) -> str:
    """Return the name of a work in an epoch: "Recovery 1 of 3"; the name alone if there is one epoch."""
    return work if epochs == 1 else f"{work} {epoch + 1} of {epochs or 'several'}"


#: Wraps the loop over layers in a progress bar: ``progress(names, description)``.
Progress = Callable[[Sequence[str], str], Iterable[str]]
