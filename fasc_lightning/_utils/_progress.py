"""Progress bars over layers, beside the Trainer's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar


def layer_progress(trainer: pl.Trainer) -> Callable[[Sequence[str], str], Iterable[str]]:
    """Return a progress bar over layers, silent if the Trainer's own bar is."""
    from tqdm.auto import tqdm

    bar = trainer.progress_bar_callback
    # A bar can be switched off while it is attached (`disable()`); only the concrete bars know this.
    shown = bar is not None and trainer.is_global_zero and getattr(bar, "is_enabled", True)
    if isinstance(bar, RichProgressBar) and bar.progress is not None:
        bar.progress.stop()  # its live display runs until teardown and would draw over this one

    def progress(names: Sequence[str], description: str) -> Iterable[str]:
        return tqdm(names, desc=description, unit="layer", disable=not shown)

    return progress


def terminal_progress(names: Sequence[str], description: str) -> Iterable[str]:
    """Show a progress bar over layers if there is a terminal; the bar disappears at the end."""
    from tqdm.auto import tqdm

    return tqdm(names, desc=description, unit="layer", disable=None, leave=False)


#: Wraps the loop over layers in a progress bar: ``progress(names, description)``.
Progress = Callable[[Sequence[str], str], Iterable[str]]
