"""A progress bar over layers that goes with the Trainer's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar


def layer_progress(trainer: pl.Trainer) -> Callable[[Sequence[str], str], Iterable[str]]:
    """Return a progress bar over layers, silent where the Trainer's own is."""
    from tqdm.auto import tqdm

    bar = trainer.progress_bar_callback
    # A bar can be switched off while it is attached (`disable()`), which only the concrete bars know.
    shown = bar is not None and trainer.is_global_zero and getattr(bar, "is_enabled", True)
    if isinstance(bar, RichProgressBar) and bar.progress is not None:
        bar.progress.stop()  # its live display lasts until teardown, and would redraw over this one

    def progress(names: Sequence[str], description: str) -> Iterable[str]:
        return tqdm(names, desc=description, unit="layer", disable=not shown)

    return progress


def terminal_progress(names: Sequence[str], description: str) -> Iterable[str]:
    """Show a progress bar over layers where there is a terminal to show it on; it goes when it is done."""
    from tqdm.auto import tqdm

    return tqdm(names, desc=description, unit="layer", disable=None, leave=False)


#: Wraps the loop over layers, for a progress bar: ``progress(names, description)``.
Progress = Callable[[Sequence[str], str], Iterable[str]]
