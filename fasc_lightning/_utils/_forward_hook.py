"""Forward hooks that belong to one module: copies of it are free to run, and tell nobody."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


class ForwardHook:
    """A forward hook that knows its layer's name; a copy of the layer, or of a module around it, gets one that idles.

    Args:
        call: Takes the name and what the hook is given.
        name: Of the layer.
    """

    def __init__(self, call: Callable[..., Any], name: str) -> None:
        self._call, self._name = call, name

    def __call__(self, *args: Any) -> Any:
        return self._call(self._name, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_idle,)


def _idle(*args: Any) -> None:
    """Stand in for a hook."""
    del args
