"""A module in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fasc_lightning._utils._undo import undoing


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; every submodule gets back the mode it had, frozen ones included."""
    with undoing() as undo:
        undo.keep_modes(model)
        model.eval()
        yield
