"""Temporary evaluation mode of a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fasc_lightning._utils._undo import undoing


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; afterwards each submodule, frozen or not, gets its own mode back."""
    with undoing() as undo:
        undo.keep_modes(model)
        model.eval()
        yield
