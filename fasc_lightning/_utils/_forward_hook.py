"""Forward hooks whose copies do nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


class ForwardHook:
    """A forward hook that passes on its layer's name; when a module is copied, the copy gets a hook that does nothing.

    Args:
        call: Called with the name and the hook's arguments.
        name: Name of the layer.
    """

    def __init__(self, call: Callable[..., Any], name: str) -> None:
        self._call, self._name = call, name

    def __call__(self, *args: Any) -> Any:
        return self._call(self._name, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_idle,)


def _idle(*args: Any) -> None:
    """Do nothing, in place of a copied hook."""
    del args
